"""What the result files hold: runs, means and their intervals; how tables and pictures of them look.

`out` is the folder of results everywhere. A case is "method/name"; its files are `<out>/method/name_seed*.json`.
"""

from __future__ import annotations

from fewshot.experiment import UserError, write_atomically

import importlib
import json
import math
import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# 97.5 % points of Student's t for n - 1 degrees of freedom, by the number n of seeds
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, RED, GREEN, PINK, YELLOW, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f"
VINYALS = " (Vinyals' split)"  # of a published figure on another protocol than the course's split


class Row(NamedTuple):
    """A row of the table of accuracies: what the documents and the papers say stands beside what was measured.

    Published figures are of Vinyals' split where they say so, ours of the course's.
    """

    what: str  # "method, setting"
    case: str
    documents: str = "-"  # the homework's text and slides
    published: str = "-"
    metric: str = "test_accuracy"
    front: bool = False  # also on the front page
    bar: tuple[str, str] | None = None  # short name and colour of its bar beside the other methods


class Digits(NamedTuple):
    """Networks of characters asked about MNIST's digits: the cases are `prefix`_1shot, `prefix`_5shot, ..."""

    what: str
    colour: str
    metric: str = "test_accuracy"
    prefix: str = "mnist"


def rooms() -> dict[str, ModuleType]:
    """{name: module} of everything in this folder, in the order of the names."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    return {name: importlib.import_module(f"studies.{name}") for name in names if name != "__init__"}


# --------------------------------------------------------------------------------------- reading


def read(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--results: cannot read {path} ({error}); measure it again or name another folder") from None


def read_if(path: Path) -> dict | list:
    """What the file holds; an empty dictionary where there is none."""
    return read(path) if path.exists() else {}


def load(out: Path, case: str) -> list[dict]:
    """The metrics of all seeds of method/name, in the order of the seeds."""
    return [read(path) for path in sorted(out.glob(f"{case}_seed*.json"))]


def load_all(out: Path, method: str) -> list[dict]:
    """The metrics of every run of a method, in the order of their files."""
    return [read(path) for path in sorted(out.glob(f"{method}/*_seed*.json"))]


def refuse_other_images(out: Path, dataset: str) -> None:
    """UserError when a run under `out` is not of `dataset`, whatever its name says.

    Those of miniImageNet are of a folder, those whose name begins with mnist_ of MNIST.
    """
    for path in sorted(out.glob("*/*_seed*.json")):
        named, found = {"miniImagenet": "folder", "mnist": "mnist"}, read(path).get("dataset")
        expected = named.get(path.stem.split("_")[0], dataset)
        of_images = path.parent.name not in ("memorization", "bayes") or found in ("omniglot", "glyphs")
        if of_images and found != expected:  # sinusoids and their like are made, not found
            raise UserError(
                f"{path} is a result on {found}, its row is of {expected}; move it to a folder of its own "
                f"and read it with --results FOLDER --dataset {found}"
            )


# -------------------------------------------------------------------------------------- figures


def interval(runs: list[dict], key: str = "test_accuracy") -> tuple[float, float, str]:
    """(mean over seeds, half-width of its 95 % interval, what the interval is over); the first two in per cent.

    The seeds share their test tasks, so their errors go together and the interval over tasks does not shrink with
    seeds. Where the seeds' standard deviation is larger than the tasks' standard error, training matters more than
    the choice of tasks: then the interval is over seeds, by Student's t.
    """
    values = [run[key] for run in runs]
    ci95 = key.replace("test_accuracy", "ci95").replace("accuracy", "ci95")
    ci95 = f"{key}_ci95" if f"{key}_ci95" in runs[0] else ci95
    half = sum(run[ci95] for run in runs) / len(runs)
    over = f"{runs[0].get('num_test_tasks', 0):,} tasks"
    if key.startswith("finetuned"):  # one classifier of all classes, asked about every held-out drawing
        over = f"{runs[0]['held_out'] * runs[0]['finetuned_classes']:,} drawings"
    if key.endswith("lake_runs"):
        over = "20 runs of 20 trials"
    if len(values) > 1 and statistics.stdev(values) > half / 1.96:
        half, over = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values)), f"{len(values)} seeds"
    return 100 * statistics.fmean(values), 100 * half, over


def interval_of(runs: list[dict], key: str) -> tuple[float, float]:
    """Mean over runs and its 95 % half-width by the rule of `interval`, not in per cent."""
    mean, half, _ = interval(runs, key)
    return mean / 100, half / 100


def mean(runs: list[dict], key: str = "test_accuracy") -> str:
    """The mean over runs in per cent, to a tenth."""
    return f"{100 * statistics.fmean(run[key] for run in runs):.1f}"


def digits_of(half: float) -> int:
    """Digits behind the point that a figure with an interval of this half-width deserves, in per cent."""
    return 1 if half >= 0.15 else 2


def with_interval(mean: float, half: float) -> str:
    """Such as 98.7 ± 0.2, in per cent."""
    return f"{mean:.{digits_of(half)}f} ± {half:.{digits_of(half)}f}"


def figure_of(runs: list[dict], key: str = "test_accuracy", missing: str = "") -> str:
    """The mean with its interval, in per cent; `missing` where there are no runs or they lack the figure."""
    return with_interval(*interval(runs, key)[:2]) if runs and key in runs[0] else missing


# ----------------------------------------------------------------------------- where runs come from


def warmed_up(run: dict) -> bool:
    """Whether a run of maml.py began as a prototypical network, by a warm-up or from the weights of one."""
    flags = run.get("flags", {})
    return run["script"] == "maml" and (flags.get("warmup_steps", 4000) > 0 or bool(flags.get("init_from")))


def processor(run: dict) -> str:
    """On what a run was timed, such as "1 thread of AMD EPYC"; files that name no processor are of that one.

    One without AVX-512 says so: a training takes it two to three times as long.
    """
    threads = re.search(r"(\d+) threads", run["device"])
    name, *kind = run.get("processor", "AMD EPYC").split(", ")
    name = re.sub(r"\((R|TM)\)| CPU| Processor| @.*", "", name).strip() + " with AVX2" * (kind == ["AVX2"])
    return f"{threads[1]} thread{'s' * (threads[1] != '1')} of {name}" if threads else run["device"]


def tasks_a_step(run: dict) -> int:
    """The meta-batch: a flag of the run; files without flags tell it by what they trained."""
    if "meta_batch_size" in run.get("flags", {}):
        return run["flags"]["meta_batch_size"]
    return round(run["train_seconds"] * run["tasks_per_second"] / run["steps"])


def plain_command(run: dict) -> str:
    """A run's command in a code span, without where it wrote, and defaults; RUN_DIR is what it goes on from."""
    command = re.sub(r" --(log_dir|run_name|out|results_dir) \S+| --(dataset|device) auto", "", run["command"])
    return f"`{re.sub(r'(?<=--init_from )[^ ]+', 'RUN_DIR', command)}`"


def minutes(runs: list[dict]) -> str:
    """Minutes of training of the seeds that ran where, and in the precision in which, the first did.

    Of one thread of a CPU they are the processor's own, which other work does not stretch.
    """
    where = lambda run: (processor(run), run.get("dtype"))
    runs = [run for run in runs if where(run) == where(runs[0])]
    cpu = lambda run: run.get("train_cpu_seconds") if run["device"] == "cpu, 1 threads" else None
    seconds = [cpu(run) or run["train_seconds"] for run in runs if "train_seconds" in run]
    return f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "-"


def time_of(runs: list[dict]) -> str:
    """Such as "1.6 (NVIDIA H200)": minutes of training of a seed, and where; "-" for runs that only test."""
    return f"{minutes(runs)} ({processor(runs[0])})" if minutes(runs) != "-" else "-"


# -------------------------------------------------------------------------- tables and pictures


def table(titles: str, rows: list, commands: list | tuple = ()) -> str:
    """A Markdown table and, below it, the list of its `commands`, each once; `titles` are separated by bars."""
    if not rows:
        return "(not measured)"
    lines = [f"| {titles} |", "|---" * (titles.count(" | ") + 1) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([*lines, *[""] * bool(commands), *dict.fromkeys(f"- {command}" for command in commands)])


def new_figure(rows: int, columns: int, size: tuple[float, float], grid: str = "y"):
    """A figure without pyplot (no window system, nothing to close) and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis=grid, color="0.9")
        ax.set_axisbelow(True)
    return figure, axes


def save(drawing, path: Path) -> Path:
    """A figure or an array of pixels as PNG; its only metadata is matplotlib's version, so its bytes come back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(drawing, "savefig"):
        write_atomically(path, lambda file: drawing.savefig(file, dpi=100, format="png"))
    else:
        import imageio.v3 as iio

        write_atomically(path, lambda file: file.write(iio.imwrite("<bytes>", drawing, extension=".png")))
    return path


def draw(name: str, out: Path) -> list[Path]:
    """All pictures of a room, as <out>/name/*.png."""
    pictures = getattr(importlib.import_module(f"studies.{name}"), "pictures", lambda out: ())
    return [save(drawing, out / name / f"{title}.png") for title, drawing in pictures(out)]
