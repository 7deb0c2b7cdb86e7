"""What the result files hold: runs, means and their intervals; and how every picture of them looks.

Shared by pictures.py, study_pictures.py, tables.py and findings.py.
"""

from __future__ import annotations

from experiment import UserError, write_atomically

import json
import math
import re
import statistics
from pathlib import Path

# Folders of results/: a JSON file a run
PARTS = (
    "hw1",
    "attention",
    "external_memory",
    "protonet",
    "transfer",
    "maml",
    "meta_lstm",
    "memorization",
    "bayes",
    "mae",
)
# 97.5 % points of Student's t for n - 1 degrees of freedom, by the number n of seeds
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

# Okabe and Ito's colours, which the colour-blind can tell apart; one for each method in every picture
BLUE, RED, GREEN, PINK, YELLOW, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f"
COLOURS = {
    "transfer": GREY,
    "mann": PINK,
    "protonet": BLUE,
    "fomaml": YELLOW,
    "protomaml": GREEN,
    "maml": RED,
    "anil": SKY,
    "meta_lstm": "#000000",
}
TITLES = {
    "transfer": "fine-tuning",
    "mann": "MANN, conv",
    "protonet": "ProtoNet",
    "fomaml": "first-order MAML",
    "protomaml": "Proto-MAML (f.o.)",
    "maml": "MAML",
    "anil": "ANIL",
    "meta_lstm": "meta-LSTM",
}
# Networks of characters asked about MNIST's digits: what a row says, the results, the metric, the colour
MNIST_SHOTS = (1, 5, 10, 20)
MNIST = [
    ("ProtoNet", "protonet/mnist_", "test_accuracy", COLOURS["protonet"]),
    ("fine-tuning, a new head", "transfer/mnist_", "test_accuracy", COLOURS["transfer"]),
    ("MAML", "maml/mnist_", "test_accuracy_support", COLOURS["maml"]),
    ("MAML, transductive", "maml/mnist_", "test_accuracy_transductive", SKY),
    ("attention, learned with 5 classes", "attention/mnist_", "test_accuracy_alone", COLOURS["mann"]),
    ("meta-LSTM", "meta_lstm/mnist_", "test_accuracy", COLOURS["meta_lstm"]),
    ("meta-LSTM, random start", "meta_lstm/mnist_reset_", "test_accuracy", YELLOW),
]
COST_TITLES = {"maml": "MAML", "es": "ES", "fomaml": "first-order MAML", "checkpoint": "checkpointed MAML"}
COST_COLOURS = {"maml": BLUE, "es": RED, "fomaml": GREEN, "checkpoint": PINK}
SWEEPS = {"inner_steps": "inner steps", "layers": "hidden layers", "hidden_dim": "hidden units"}
SIGHTS = (1, 2, 3, 5, 10)
BY_SIGHT = [  # of a character in a sequence of 50 images (Santoro et al. 2016, table 1, 5 classes, one-hot labels)
    ("LSTM", "external_memory/lstm", (24.4, 49.5, 55.3, 63.6, 62.5)),
    ("external memory", "external_memory/external", (36.4, 82.8, 91.0, 94.9, 98.1)),
]

# ------------------------------------------------------------------------------------- results


def case_of(name: str) -> str:
    """METHOD/CASE of a row of the comparison."""
    others = {"transfer": "transfer/default", "protonet": "protonet/default", "protonet_long": "protonet/long"}
    others |= {"meta_lstm": "meta_lstm/5way1shot", "mann": "hw1/conv_K1N5"}
    return others.get(name, f"maml/{name}")


def read(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--results: cannot read {path} ({error}); measure it again or name another folder") from None


def load(out: Path, name: str) -> list[dict]:
    """The metrics of all seeds of METHOD/CASE, in the order of the seeds."""
    return [read(path) for path in sorted(out.glob(f"{name}_seed*.json"))]


def refuse_other_images(out: Path, dataset: str) -> None:
    """UserError when a run under `out` is not of `dataset`, whatever its name says.

    Those of miniImageNet are of a folder, those whose name begins with mnist_ of MNIST.
    """
    for path in sorted(out.glob("*/*_seed*.json")):
        if path.parent.name not in PARTS:
            continue
        named = {"miniImagenet": "folder", "mnist": "mnist"}
        expected, found = named.get(path.stem.split("_")[0], dataset), read(path).get("dataset")
        of_images = path.parent.name not in ("memorization", "bayes") or found in ("omniglot", "glyphs")
        if of_images and found != expected:  # sinusoids and their like are made, not found
            raise UserError(
                f"{path} is a result on {found}, its row is of {expected}; move it to a folder of its own "
                f"and read it with --results FOLDER --dataset {found}"
            )


def interval(runs: list[dict], key: str = "test_accuracy") -> tuple[float, float, str]:
    """(mean over seeds, half-width of its 95 % interval, what the interval is over); the first two in per cent.

    The seeds share their test tasks, so their errors go together and the interval over tasks does not shrink with
    seeds. Where the seeds' standard deviation is larger than the tasks' standard error, training matters more than
    the choice of tasks: then the interval is over seeds, by Student's t.
    """
    values = [run[key] for run in runs]
    ci95 = key.replace("test_accuracy", "ci95").replace("accuracy", "ci95")
    half = sum(run[ci95] for run in runs) / len(runs)
    over = f"{runs[0]['num_test_tasks']:,} tasks"
    if key.startswith("finetuned"):  # one classifier of all classes, asked about every held-out drawing
        over = f"{runs[0]['held_out'] * runs[0]['finetuned_classes']:,} drawings"
    if key.endswith("lake_runs"):
        over = "20 runs of 20 trials"
    if len(values) > 1 and statistics.stdev(values) > half / 1.96:
        half, over = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values)), f"{len(values)} seeds"
    return 100 * statistics.fmean(values), 100 * half, over


def interval_of(runs: list[dict], key: str) -> tuple[float, float]:
    """Mean over runs of a figure that has its own `<key>_ci95`, and its 95 % half-width by the rule of `interval`."""
    as_accuracy = [{"test_accuracy": r[key], "ci95": r[f"{key}_ci95"], "num_test_tasks": 0} for r in runs]
    mean, half, _ = interval(as_accuracy)
    return mean / 100, half / 100


def digits_of(half: float) -> int:
    """Digits behind the point that a figure with an interval of this half-width deserves, in per cent."""
    return 1 if half >= 0.15 else 2


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


# ------------------------------------------------------------------------------------ pictures


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


def save(figure, path: Path) -> None:
    """PNG; its only metadata is matplotlib's version, so that the same version writes the same bytes."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=100, format="png"))
