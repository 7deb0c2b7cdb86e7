"""Every table, picture and quoted number of the documents, from the result files; none of them is typed or drawn.

    python reproduce.py report                      README.md, docs/, results/: all tables, pictures and numbers
    python reproduce.py report --results DIR        the tables and pictures of another folder that a sweep has filled
    python reproduce.py report --run RUN_DIR        the curves of one run as RUN_DIR/figure.png

The words stand in the documents, the figures in `results/**/*.json`. A table stands between `<!-- room.function -->`
and `<!-- /room.function -->`: it is what that function of studies/room.py makes of the results. A number stands
before the comment that says where it is from, `96.2 ± 0.6<!-- hw1/K1N2:test_accuracy -->`. The pictures of a room
are results/room/*.png. The same JSON gives the same bytes. A result on other images than its row is about is refused.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError, write_atomically

import csv
import io
import re
import statistics
from pathlib import Path

from studies import comparison, hw1
from studies.results import (
    BLUE,
    GREEN,
    RED,
    draw,
    interval,
    load,
    load_all,
    new_figure,
    read,
    refuse_other_images,
    rooms,
    save,
    with_interval,
)

HERE = Path(__file__).resolve().parents[1]
TABLE = r"<!-- (\w+)\.(\w+)((?: [\w-]+)*) -->\n.*?<!-- /\1\.\2 -->"
NUMBER = r"(?:[-+]?\d[\d,.]*(?:e[-+]?\d+)?(?: ± [\d.]+)?|\?)"
QUOTE = rf"{NUMBER}<!-- ([\w/.-]+):([\w.-]+)(?::(\S+))? -->"
IN_CSV = ("name script N K Q steps test_accuracy ci95 num_test_tasks val_accuracy train_seconds device seed git_commit "
          "command").split()  # fmt: skip

# ------------------------------------------------------------------------------------- documents


def documents() -> list[Path]:
    return [HERE / "README.md", *sorted((HERE / "docs").glob("*.md")), HERE / "results" / "README.md"]


def made_table(name: str, function: str, arguments: list[str], out: Path) -> str:
    """What studies/name.py makes of the results; "rows" of its ROWS, where it has no function of this name."""
    room = rooms().get(name)
    made = getattr(room, function, None)
    if getattr(made, "__module__", "") == f"studies.{name}":
        return made(out, *arguments)
    if function == "rows" and hasattr(room, "ROWS"):
        return comparison.rows(out, name)
    raise UserError(f"a document has the marker <!-- {name}.{function} -->, and studies/ has no such function; mend it")


def quoted(case: str, keys: str, form: str | None, out: Path) -> str:
    """The number at `keys` of a JSON file, or the mean over the seeds of a case, here with its interval.

    With "%" at its end a format gives per cent without the sign, which belongs to the text.
    """
    try:
        if case.endswith(".json"):
            value = read(out / case)
            for key in keys.split("."):
                value = value[int(key) if isinstance(value, list) else key]
        else:
            runs = load(out, case)
            if form is None:
                return with_interval(*interval(runs, keys)[:2])
            value = statistics.fmean(run[keys] for run in runs)
        return format(value, form or "").removesuffix("%")
    except (KeyError, IndexError, ValueError, TypeError):
        raise UserError(f"{out / case} has no {keys} for a document that quotes it; mend the document") from None


def render(text: str, out: Path) -> str:
    """A document's text with everything between its markers, and every quoted number, written anew."""

    def block(match: re.Match) -> str:
        name, function, arguments = match[1], match[2], match[3]
        made = made_table(name, function, arguments.split(), out)
        return f"<!-- {name}.{function}{arguments} -->\n{made}\n<!-- /{name}.{function} -->"

    def quote(match: re.Match) -> str:
        return quoted(match[1], match[2], match[3], out) + match[0][match[0].index("<!--") :]

    return re.sub(QUOTE, quote, re.sub(TABLE, block, text, flags=re.DOTALL))


def gallery(out: Path) -> str:
    """All pictures of the results."""
    found = [path.relative_to(out) for path in sorted(out.glob("*/*.png"))]
    return "\n\n".join(f"![{path.parent}, {path.stem}]({path})" for path in found)


def results_page(out: Path, dataset: str) -> str:
    """results/README.md with the figures of another folder; those of other images say so first."""
    text = (HERE / "results" / "README.md").read_text()
    if dataset != "omniglot":
        warning = f"**Figures on {dataset}, not on Omniglot: they say that everything runs, and nothing else.**"
        text = text.replace("\n", f"\n\n{warning}\n", 1)
    return render(text, out)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(out: Path, room: str) -> None:
    """runs.csv of a room: a line for each of its runs."""
    paths, runs = sorted(out.glob(f"{room}/*_seed*.json")), load_all(out, room)
    text = io.StringIO()
    writer = csv.DictWriter(text, IN_CSV, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"name": path.stem} | run for path, run in zip(paths, runs, strict=True))
    if runs:
        write_text(out / room / "runs.csv", text.getvalue())


# -------------------------------------------------------------------------------------- one run


def draw_run(folder: Path) -> Path:
    """The curves of one run as <folder>/figure.png, from its metrics.json."""
    run = read(folder / "metrics.json")
    own = getattr(rooms().get(run.get("script")), "run_figure", lambda run: None)(run)
    return save(own or curves_figure(run, folder), folder / "figure.png")


def curves_figure(run: dict, folder: Path):
    curves = {tag: curve for tag, curve in run.get("curves", {}).items() if tag.startswith(("Loss/", "Accuracy/"))}
    if not curves:
        raise UserError(f"--run {folder}: metrics.json holds no curves; name the folder of a training")
    kinds = sorted({tag.split("/")[0] for tag in curves})
    figure, (axes,) = new_figure(1, len(kinds), (4.5 * len(kinds), 3.4))
    for ax, kind in zip(axes, kinds, strict=True):
        for tag, colour in zip(sorted(t for t in curves if t.startswith(kind)), (BLUE, RED, GREEN), strict=False):
            ax.plot(*zip(*curves[tag], strict=True), color=colour, label=tag)
        ax.legend(frameon=False, fontsize=9)
        ax.set(xlabel="training step", ylabel=kind.lower())
    return figure


# ----------------------------------------------------------------------------------------- main


def parse_args(argv=None):
    parser = experiment.Parser(
        prog="reproduce.py report", description=__doc__, formatter_class=experiment.Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--results", default=str(HERE / "results"), metavar="DIR", help="folder of the result files")
    add("--dataset", default="omniglot", help="the images that all results must be of; only omniglot for the documents")
    add("--run", metavar="RUN_DIR", help="only draw this run's curves")
    add("--tensorboard", action="store_true", help="draw the picture of TensorBoard anew (needs chromium)")
    args = parser.parse_args(argv)
    args.results = Path(args.results)
    if not args.run and not args.results.is_dir():
        raise UserError(f"--results {args.results} is not a folder; run reproduce.py first or name another")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.run:
        print(f"written: {draw_run(Path(args.run))}")
        return
    out = args.results
    refuse_other_images(out, args.dataset)
    ours = out.resolve() == HERE / "results"
    for room in rooms():
        draw(room, out)
        write_csv(out, room)
    if ours:
        if args.tensorboard or not (out / "hw1" / "tensorboard.png").exists():
            hw1.draw_tensorboard(out)
        kept = "kept as it is" if (out / "hw1" / "tensorboard.png").exists() else "missing: it needs chromium"
        print(f"picture of TensorBoard: {'drawn anew' if args.tensorboard and hw1.find_browser() else kept}")
        texts = {path: render(path.read_text(), out) for path in documents()}  # all or none
    else:
        texts = {out / "README.md": results_page(out, args.dataset)}
    for path, text in texts.items():
        write_text(path, text)
    print("written: " + ", ".join(str(path.relative_to(HERE) if HERE in path.parents else path) for path in texts))


if __name__ == "__main__":
    experiment.run_script(main)
