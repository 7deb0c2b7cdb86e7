"""Every table and every picture of the documents, from the result files; nothing in them is typed or drawn by hand.

    python report.py                      README.md, docs/, results/README.md, all tables and pictures of results/
    python report.py --results DIR        the tables and pictures of another folder that reproduce.py has filled
    python report.py --run RUN_DIR        the curves of one run as RUN_DIR/figure.png

It reads `results/**/*.json`, writes text between the markers `<!-- name -->` and `<!-- /name -->` of the documents, and
CSV and PNG files beside the JSON. The same JSON gives the same bytes. A result on other images than those its row is
about is refused. The tables of accuracies are in tables.py, those of the studies in findings.py.
"""

from __future__ import annotations

import experiment
from experiment import UserError, write_atomically

import csv
import io
import re
import statistics
from pathlib import Path

import findings
import pictures
import study_pictures
import tables
from evidence import PARTS, TITLES, processor, read, refuse_other_images
from tables import speed_processor, table, with_interval

HERE = Path(__file__).resolve().parent


def speed_table(out: Path) -> str:
    """A table for each benchmark, a row for each race: milliseconds and their ratio to those of its first column."""
    races = sorted(read(out / "speed.json"), key=lambda race: race["title"])
    tables, lines = {}, []
    for race in races:
        timed = lambda value: isinstance(value, dict) and ("ms" in value or "tasks_per_second" in value)
        found = {name: value for name, value in race.items() if timed(value)}
        # "auto: vmap, 32 at once" says what auto chose: of the row, not of the column
        found = {name.split(":")[0]: value | {"what": name.partition(": ")[2]} for name, value in found.items()}
        whole_run = ".py " in race["title"] and not race["title"].startswith("busy, ")
        kind = "training tasks a second" if whole_run else race["title"].split(",")[0]
        tables.setdefault(kind, []).append((race, found))
    for kind, rows in tables.items():
        names = list(dict.fromkeys(name for _, found in rows for name in found))
        cells = [
            [race["title"].removeprefix(f"{kind}, "), speed_processor(race), *(speed_cell(found.get(n)) for n in names)]
            for race, found in rows
        ]
        unit = "" if kind == "training tasks a second" else ", ms"
        lines += ["", *table(" | ".join([f"{kind}{unit}", "on", *names]), cells)]
    busy = [race for race in races if race["title"].startswith("busy, ")]
    if busy:
        times = lambda name: [1 / race[name]["ratio"] for race in busy]
        span = lambda name: f"{min(times(name)):.1f} to {max(times(name)):.1f}"
        says = {n: (span(f"{n} loops, ours"), span(f"{n} loops, spinning")) for n in (0, 1, 2)}
        lines += [
            "",
            f"On an idle computer a step with our threads takes {says[0][0]} times that of threads that always spin.\n"
            f"Beside one endless loop it is {says[1][0]} times that idle step, not {says[1][1]}, beside two\n"
            f"{says[2][0]}, not {says[2][1]}. We aimed for 1.1, 1.8 and 2.7.",
        ]
    for race in races:
        for reached in race.get("to_accuracy", []):
            command, median = f"protonet.py {reached['recipe']}".strip(), statistics.median(reached["seconds"])
            each, final = (", ".join(map(str, reached[key])) for key in ("seconds", "test_accuracy"))
            lines += [
                "",
                f"On {speed_processor(race)} `{command}` first passed {reached['target']:.1%} on 5-way 1-shot\n"
                f"validation tasks after {each} seconds of training (seeds 1 to {len(reached['seconds'])}; median "
                f"{median:.0f}); test accuracy in the end {final}.",
            ]
    return "\n".join(lines[1:])


def growth_table(out: Path) -> str:
    """The default training step of each method, the powers by which it grows, and two points far from it."""
    if not (out / "growth.json").exists():
        return "Not measured."
    found, lines = read(out / "growth.json"), []
    axes = list(dict.fromkeys(fit["axis"] for fit in found["fits"]))
    powers, far = [], []
    for name, defaults in found["defaults"].items():
        of_axis = {fit["axis"]: fit for fit in found["fits"] if fit["method"] == name}
        rows = [row for row in found["rows"] if row["method"] == name]
        cells = [growth_powers(of_axis.get(axis)) for axis in axes]
        setting = ", ".join(f"{axis} {value}" for axis, value in defaults.items())
        powers.append([name, setting, *(growth_cell(row) for row in rows if row["axis"] == "default"), *cells])
        far += [
            [name, row["axis"], growth_cell(row), growth_prediction(row, rows, of_axis[row["varied"]])]
            for row in rows
            if "varied" in row
        ]
        skipped = [row for row in rows if "skipped" in row]
        lines += [f"- {name}, {row['axis']} {row['value']}: {row['skipped']}, so it was skipped" for row in skipped]
    titles = " | ".join(["method", "around", "step, ms; peak, MB", *(f"{axis}: time, memory" for axis in axes)])
    text = table(titles, powers)
    text += ["", *table("method | at | measured: ms; MB | predicted: ms; MB", far), "", *lines]
    shown = [f"![Time and memory of a step: {name}](../results/growth_{name}.png)" for name in found["defaults"]]
    return "\n".join([*text, f"On {processor(found)}. Command: `{found['command']}`.", "", *shown])


def growth_powers(fit: dict | None) -> str:
    return "" if not fit or fit["seconds"] is None else f"{fit['seconds']:.2f}, {fit['peak_bytes']:.2f}"


def growth_cell(row: dict) -> str:
    return "skipped" if "skipped" in row else f"{1e3 * row['seconds']:.1f}; {row['peak_bytes'] / 1e6:.1f}"


def growth_prediction(row: dict, rows: list[dict], fit: dict) -> str:
    """What the power of the axis that `row` lies on makes of the last measured point of this axis."""
    curve = [r for r in rows if r["axis"] == fit["axis"] and "seconds" in r]
    if len(curve) < 2:
        return "-"
    last = max(curve, key=lambda r: r["value"])
    grown = {key: last[key] * (row["value"] / last["value"]) ** fit[key] for key in ("seconds", "peak_bytes")}
    return growth_cell(grown)


def speed_cell(value: dict | None) -> str:
    if value is None:
        return ""
    if "tasks_per_second" in value:
        return f"{value['tasks_per_second']:,.1f}"
    return f"{value['ms']:.2f} ({value['ratio']:.2f}x" + (f"; {value['what']})" if value["what"] else ")")


def faults_text(out: Path) -> str:
    """What the fault tests counted, from faults.json."""
    found, rows = read(out / "faults.json"), []
    for script, cases in found["flag_cases"].items():
        kills, memory, two = (found[key].get(script) for key in ("kills", "memory", "two_processes"))
        size, grown = (f"{memory['MB']} MB", f"{memory['growth_percent']:.2f} %") if memory else ("", "")
        kills, two = f"{kills} / {kills}" if kills else "", f"{two:.0e}" if two else ""
        rows.append([f"`{script}.py`", kills, two, size, grown, f"{cases} of {cases}"])
    titles = "script | kills survived / made, bit for bit equal | meta-gradient of two processes differs by "
    titles += "| peak memory of 2,000 steps | growth in the last 1,000 | bad flag values refused"
    versions = [[name, row["processor"], row["result"]] for name, row in found["versions"].items()]
    kills, values, folders, huge = (
        sum(found[key].values()) for key in ("kills", "flag_cases", "folder_cases", "huge_cases")
    )
    return "\n".join(
        [
            *table(titles, rows),
            "",
            f"In all {kills} kills, {values:,} bad values, {folders} strange run folders and {huge} values too large "
            "for any memory. Differences are relative, in float64, the largest of a script's optimisers. Commands: "
            "`RECORD=1 pytest -m slow -n 0 tests/test_faults.py`, "
            "`RECORD=1 pytest -m 'not slow' tests/test_faults.py`.",
            *(["", *table("Python and torch | on | `RECORD=1 pytest`", versions)] if versions else []),
        ]
    )


def page(out: Path, dataset: str = "omniglot") -> str:
    """`<out>/README.md`: a row for each claim of the documents, the paired differences, the pictures."""
    lines = ["# Results", ""]
    if dataset != "omniglot":
        lines += [f"**Figures on {dataset}, not on Omniglot: they say that everything runs, and nothing else.**", ""]
    lines += [
        "Written by `python report.py` from the JSON files beside it.",
        "Accuracy on new characters in per cent, mean of the seeds ± 95 % interval. The interval is over the fixed",
        "test tasks, which the seeds share; where the seeds differ by more than that, it is over the seeds (Student's",
        "t). Documents: the homework's text and slides. Published figures are of another protocol where they say so.",
        "Minutes are those of training, of one seed.",
        "",
    ]
    keys = ("what", "documents", "published", "ours", "over", "seeds", "minutes", "device", "command")
    titles = "what | documents | published | ours | ± over | each seed | minutes | on | command of seed 1"
    lines += table(titles, [[row[key] for key in keys] for row in tables.claim_rows(out)])
    command = "python reproduce.py meta_lstm --scale full --mini_imagenet DIR"
    lines += ["", f"The miniImageNet rows need its images: `{command}`."]
    if others := findings.other_rows(out):
        lines += ["", *table("what | documents | ours | command", others)]
    lines += ["", tables.norm_table(out)]
    if on_vinyals := tables.vinyals_table(out):
        lines += ["", on_vinyals]
    if differences := tables.paired(out):
        rows = [[TITLES[name], f"{mean:+.2f} ± {half:.2f}"] for name, (mean, half) in differences.items()]
        lines += ["", "Differences to the long ProtoNet on the same test tasks (points, 95 % interval over tasks):", ""]
        lines += table("method | difference", rows)
    runs = [read(file) for part in PARTS for file in sorted((out / part).glob("*.json"))]
    seconds = [run["train_seconds"] for run in runs if "train_seconds" in run]  # those that only test have none
    lines += ["", f"All {len(seconds)} runs together trained for {sum(seconds) / 3600:.1f} hours."]
    for picture in sorted(out.glob("*.png")):
        if picture.stem not in ("glyphs", "tensorboard", "bayes_plates", "page", "attention", "memory"):
            lines += ["", f"![{picture.stem.replace('_', ' ')}]({picture.name})"]
    return "\n".join(lines) + "\n"


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, names: list[str], rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_tables(out: Path, dataset: str) -> None:
    """CSV files of the runs and of the cost sweep, and the page of results."""
    names = [
        "name",
        "script",
        "N",
        "K",
        "Q",
        "steps",
        "test_accuracy",
        "ci95",
        "num_test_tasks",
        "val_accuracy",
        "train_seconds",
        "device",
        "seed",
        "git_commit",
        "command",
    ]
    for part in PARTS:
        if files := sorted((out / part).glob("*.json")):
            write_csv(out / f"{part}.csv", names, [{"name": file.stem} | read(file) for file in files])
    if (file := out / "profile_costs" / "costs.json").exists() and (rows := read(file).get("rows")):
        write_csv(out / "costs.csv", list(rows[0]), rows)
    write_text(out / "README.md", page(out, dataset))


def homework_table(out: Path) -> str:
    """What the grader of each assignment was put to, from homework.json."""
    if not (out / "homework.json").exists():
        return "Not measured: `python homework.py check all --out results/homework.json`."
    rows = []
    for name, proof in read(out / "homework.json").items():
        kinds = [case["kind"] for case in proof["cases"] if case["as_expected"]]
        rows.append([name, len(proof["points"]), kinds.count("mutant"), kinds.count("right")])
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    titles = " | functions to write | mistakes, each found at its question alone "
    return "\n".join(table(titles + "| right answers written in other ways, unharmed", rows))


def field_table(out: Path) -> str:
    """The kinds of faults that people met in the field, from field.json."""
    if not (out / "field.json").exists():
        return "(not counted yet)"
    found = read(out / "field.json")
    kinds = sorted(found["kinds"].items(), key=lambda item: -item[1]["tried"])
    rows = [[kind, row["tried"], row["right"]] for kind, row in kinds]
    rows.append(["all", sum(row["tried"] for _, row in kinds), sum(row["right"] for _, row in kinds)])
    return "\n".join([*table("kind | cases tried | cases right", rows), "", f"Command: `{found['command']}`."])


def light_table(out: Path) -> str:
    """Prediction on photographs under uneven light, from prediction_light.json."""
    if not (out / "prediction_light.json").exists():
        return "(not measured yet)"
    found = read(out / "prediction_light.json")
    shares = list(next(iter(found["accuracy"].values())))
    rows = [[what, *(f"{100 * value:.1f}" for value in row.values())] for what, row in found["accuracy"].items()]
    lines = table("accuracy in % | " + " | ".join(f"{share} %" for share in shares), rows)
    return "\n".join([*lines, "", found["what"]])


def shipped_table(out: Path) -> str:
    """The network that ships: "none of these" on tasks and right answers on real drawings, from shipped*.json."""
    if not (out / "shipped.json").exists():
        return "(not measured yet)"
    found, rows = read(out / "shipped.json"), []
    for part, split in (("val", "validation"), ("test", "test")):
        for name, row in found[part].items():
            shares = ("kept_of_known", "refused_of_unknown", "refused_at_kept", "accuracy_of_known")
            cells = [with_interval(100 * row[key], 100 * row[f"{key}_ci95"]) for key in shares]
            setting = name.replace("way", "-way ").replace("shot", "-shot")
            rows.append([split, setting, f"{row['area_under_curve']:.3f}", *cells])
    titles = "classes of | setting | area under the curve | known kept | unknown refused | refused at 90 % kept "
    titles += "| accuracy without `--unknown`"
    notes = [
        f"In per cent ± 95 % interval over {found['num_tasks']} tasks with as many unknown classes as known ones, five",
        f"queries of each; one network of {found['bytes']:,} bytes, trained by `{found['trained_by']}`.",
        f"Command: `{found['command']}`.",
    ]
    if (out / "shipped_drawings.json").exists():
        drawn = read(out / "shipped_drawings.json")
        right = " and ".join(f"{n} of {drawn['of']}" for n in drawn["right"])
        notes += [
            "",
            f"Real drawings without data and network, five test characters of one example each: right are {right},",
            f"in at most {max(drawn['cpu_seconds']):g} seconds of one processor with the start of Python "
            f"({processor(drawn)}).",
            f"Command: `{drawn['command']}`.",
        ]
    return "\n".join([*table(titles, rows), "", *notes])


def page_text(out: Path) -> str:
    """How long an answer of the page takes, from page.json."""
    if not (out / "page.json").exists():
        return "(not measured yet)"
    found = read(out / "page.json")
    where = processor(found) + ", busy with other work" * found["busy"]
    return (
        f"An answer with {found['classes']} classes takes {found['median_ms']:g} ms on the server, median of "
        f"{found['answers']}, {found['cpu_ms']:g} of them computing ({where}).\nCommand: `{found['command']}`."
    )


# ----------------------------------------------------------------------------------- documents

OF_MAML = "First-order MAML", "Proto-MAML (first order)", "MAML", "ANIL", "MAML++"
BLOCKS = {
    "front": tables.front_table,
    "mann": tables.mann_table,
    "mann_answers": tables.mann_answers,
    "memories": tables.memories_table,
    "sights": tables.sights_table,
    "beyond": tables.beyond_table,
    "memorisation": tables.memorisation_text,
    "protonet": lambda out: tables.short_table(out, "ProtoNet"),
    "transfer": lambda out: tables.short_table(out, "Fine-tuning"),
    "mnist": findings.mnist_text,
    "maml": lambda out: tables.short_table(out, *OF_MAML),
    "maml_norm": tables.norm_table,
    "maml_inner_loop": tables.inner_loop_text,
    "vinyals": tables.vinyals_table,
    "meta_lstm": tables.meta_lstm_table,
    "costs": findings.costs_text,
    "features": findings.features_text,
    "memorization": findings.memorization_table,
    "bayes": findings.bayes_tables,
    "mae": findings.mae_table,
    "mae_lessons": findings.mae_lessons,
    "mae_labels": findings.few_labels_text,
    "mae_masks": findings.masks_text,
    "mae_reconstruction": findings.reconstructions_text,
    "speed": speed_table,
    "growth": growth_table,
    "faults": faults_text,
    "homework": homework_table,
    "field": field_table,
    "light": light_table,
    "shipped": shipped_table,
    "page": page_text,
}


def documents() -> list[Path]:
    return [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]


def render(text: str, out: Path) -> str:
    """A document's text with everything between its markers written anew."""

    def block(match: re.Match) -> str:
        if match[1] not in BLOCKS:
            raise UserError(f"a document has the marker <!-- {match[1]} -->, which report.py does not know; mend it")
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]](out)}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def parse_args(argv=None):
    parser = experiment._Parser(
        prog="report.py", description=__doc__, formatter_class=experiment._Formatter, allow_abbrev=False
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
        print(f"written: {pictures.draw_run(Path(args.run))}")
        return
    out = args.results
    refuse_other_images(out, args.dataset)
    pictures.draw_everything(out)
    if out.resolve() == HERE / "results":
        pictures.draw_glyphs(out / "glyphs.png")
        study_pictures.draw_plates(out / "bayes_plates.png")
        if args.tensorboard or not (out / "tensorboard.png").exists():
            pictures.draw_tensorboard(out)
        kept = "kept as it is" if (out / "tensorboard.png").exists() else "missing: it needs chromium"
        print(f"picture of TensorBoard: {'drawn anew' if args.tensorboard and pictures.find_browser() else kept}")
    write_tables(out, args.dataset)
    written = [out / "README.md"]
    if out.resolve() == HERE / "results":
        texts = {path: render(path.read_text(), out) for path in documents()}  # all or none
        for path, text in texts.items():
            write_text(path, text)
        written = documents() + written
    print("written: " + ", ".join(str(path.relative_to(HERE) if HERE in path.parents else path) for path in written))


if __name__ == "__main__":
    experiment.run_script(main)
