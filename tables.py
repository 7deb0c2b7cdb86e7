"""Accuracies: the rows of the results table, the tables of the methods' pages, and what the figures teach.

A part of report.py: every function reads `results/**/*.json` and gives Markdown. What the source documents and the
papers report of accuracies is typed here, in CLAIMS, and nowhere else.
"""

from __future__ import annotations

from experiment import mean_and_ci95

import re
import statistics
from pathlib import Path

import pictures
from evidence import (
    BY_SIGHT,
    SIGHTS,
    digits_of,
    interval,
    interval_of,
    load,
    processor,
    read,
    tasks_a_step,
    warmed_up,
)

# (method, setting, folder/name of our runs, metric, figure of the source documents, best published one).
# Published figures are of Vinyals' split unless the row says otherwise: 1,200 characters and their rotations for
# training, the rotations of the other 423 among the test classes. Our rows are of the course split.
VINYALS = " (Vinyals' split)"
CLAIMS = [
    ("MANN", "1-shot 2-way", "mann/K1N2", "test_accuracy", "above 90", "-"),
    ("MANN", "2-shot 2-way", "mann/K2N2", "test_accuracy", "above 90", "-"),
    ("MANN", "1-shot 3-way", "mann/K1N3", "test_accuracy", "about 80", "-"),
    ("MANN", "1-shot 4-way", "mann/K1N4", "test_accuracy", "about 70", "-"),
    ("MANN", "5-way 1-shot, conv encoder", "mann/conv_K1N5", "test_accuracy", "-",
     "82.8 to 89.2 (MANN, second sight in a stream)"),
    ("ProtoNet", "5-way 1-shot, default", "comparison/protonet", "test_accuracy", "98.8", "98.8" + VINYALS),
    ("ProtoNet", "5-way 1-shot, long", "comparison/protonet_long", "test_accuracy_5way1shot", "98.8", "98.8" + VINYALS),
    ("ProtoNet", "5-way 5-shot, long", "comparison/protonet_long", "test_accuracy_5way5shot", "-", "99.7" + VINYALS),
    ("ProtoNet", "20-way 1-shot, long", "comparison/protonet_long", "test_accuracy_20way1shot", "-", "96.0" + VINYALS),
    ("ProtoNet", "20-way 5-shot, long", "comparison/protonet_long", "test_accuracy_20way5shot", "-", "98.9" + VINYALS),
    ("ProtoNet", "5-way 1-shot, residual", "comparison/protonet_residual", "test_accuracy_5way1shot", "-", "-"),
    ("ProtoNet", "5-way 5-shot, residual", "comparison/protonet_residual", "test_accuracy_5way5shot", "-", "-"),
    ("ProtoNet", "20-way 1-shot, residual", "comparison/protonet_residual", "test_accuracy_20way1shot", "-", "-"),
    ("ProtoNet", "20-way 5-shot, residual", "comparison/protonet_residual", "test_accuracy_20way5shot", "-", "-"),
    ("ProtoNet", "20-way 1-shot in one alphabet, residual", "comparison/protonet_lake", "test_accuracy", "-", "-"),
    ("ProtoNet", "the same, of one drawer", "comparison/protonet_lake", "test_accuracy_one_drawer", "-", "-"),
    ("Fine-tuning", "423-way", "comparison/transfer", "finetuned_accuracy", "78.5", "-"),
    ("Fine-tuning", "5-way 1-shot", "comparison/transfer", "test_accuracy", "-", "-"),
    ("First-order MAML", "5-way 1-shot", "comparison/fomaml", "test_accuracy", "81.5", "98.3" + VINYALS),
    ("Proto-MAML (first order)", "5-way 1-shot", "comparison/protomaml", "test_accuracy", "89.2", "-"),
    ("MAML", "5-way 1-shot", "comparison/maml", "test_accuracy", "-", "98.7" + VINYALS),
    ("MAML", "5-way 1-shot, plain features", "comparison/maml_plain", "test_accuracy", "-", "98.7" + VINYALS),
    ("MAML", "5-way 5-shot", "comparison/maml_5way5shot", "test_accuracy", "-", "99.9" + VINYALS),
    ("MAML", "20-way 1-shot", "comparison/maml_20way1shot", "test_accuracy", "-", "95.8" + VINYALS),
    ("MAML", "20-way 5-shot", "comparison/maml_20way5shot", "test_accuracy", "-", "98.9" + VINYALS),
    ("MAML", "20-way 5-shot, by Muon", "comparison/maml_20way5shot_muon", "test_accuracy", "-", "98.9" + VINYALS),
    ("ANIL", "5-way 1-shot", "comparison/anil", "test_accuracy", "-", "-"),
    ("Meta-LSTM", "5-way 1-shot", "meta_lstm/5way1shot", "test_accuracy", "-", "none"),
    ("Meta-LSTM", "5-way 5-shot", "meta_lstm/5way5shot", "test_accuracy", "-", "none"),
    ("Meta-LSTM", "10-way 10-shot, the paper's flags", "meta_lstm/10way10shot", "test_accuracy", "-", "none"),
    ("Meta-LSTM", "miniImageNet 5-way 1-shot", "meta_lstm/miniImagenet_5way1shot", "test_accuracy", "42.6", "43.4"),
    ("Meta-LSTM", "miniImageNet 5-way 5-shot", "meta_lstm/miniImagenet_5way5shot", "test_accuracy", "37.6", "60.6"),
    ("Meta-LSTM", "miniImageNet 10-way 10-shot", "meta_lstm/miniImagenet_10way10shot", "test_accuracy", "23.3", "-"),
    ("Meta-LSTM", "miniImageNet 10-way 20-shot", "meta_lstm/miniImagenet_10way20shot", "test_accuracy", "22.8", "-"),
]  # fmt: skip
# Rows that stand in the tables once they are measured; columns as above.
WHEN_MEASURED = [
    ("MANN", "1-shot 2-way, first command of the README", "mann/default", "test_accuracy", "above 90", "-"),
    ("ProtoNet", "Lake's 400 official trials, residual", "comparison/protonet_lake", "test_accuracy_lake_runs", "-",
     "95.5 (people), 96.7 (BPL), 98.5 (ARC)"),
    ("First-order MAML", "5-way 1-shot, from scratch", "comparison/fomaml_scratch", "test_accuracy", "81.5",
     "98.3" + VINYALS),
    ("Proto-MAML (first order)", "5-way 1-shot, from scratch", "comparison/protomaml_scratch", "test_accuracy", "89.2",
     "-"),
    ("MAML", "5-way 1-shot, from scratch", "comparison/maml_scratch", "test_accuracy", "-", "98.7" + VINYALS),
    ("MAML++", "5-way 1-shot, from scratch", "comparison/mamlpp_scratch", "test_accuracy", "-", "99.47" + VINYALS),
    *[("MANN", f"{N}-way {K}-shot, attention", f"mann/attention_K{K}N{N}", "test_accuracy_alone", "-",
       f"{snail} (SNAIL, Vinyals' split)") for N, K, snail in ((5, 1, "99.07"), (5, 5, "99.78"), (20, 1, "97.64"))],
    ("MANN", "5-way 5-shot, attention learned with one shot", "mann/attention_K1N5_at_K5N5", "test_accuracy_alone", "-",
     "99.78 (SNAIL, Vinyals' split)"),
    ("Masked auto-encoding", "5-way 1-shot, no label in training", "mae/mae", "test_accuracy", "-",
     "94.9 (Meta-GMVAE, queries together), 88.4 (AAL), on splits of their own"),
]  # fmt: skip
# On the published protocol: (method, which figures its paper reports, the results of a setting, what their
# transductive and non-transductive metrics are called, {(N, K): published}).
ON_VINYALS = [
    ("ProtoNet", "non-transductive", "comparison/protonet_vinyals",
     ("test_accuracy_{N}way{K}shot_transductive", "test_accuracy_{N}way{K}shot"),
     {(5, 1): "98.8", (5, 5): "99.7", (20, 1): "96.0", (20, 5): "98.9"}),
    ("MAML", "transductive", "comparison/maml_vinyals_{N}way{K}shot",
     ("test_accuracy_transductive", "test_accuracy_support"),
     {(5, 1): "98.7", (5, 5): "99.9", (20, 1): "95.8", (20, 5): "98.9"}),
]  # fmt: skip
# ------------------------------------------------------------------------------------- results


def with_interval(mean: float, half: float) -> str:
    """Such as 98.7 ± 0.2, in per cent."""
    return f"{mean:.{digits_of(half)}f} ± {half:.{digits_of(half)}f}"


def figure_of(runs: list[dict], key: str = "test_accuracy") -> str:
    return with_interval(*interval(runs, key)[:2])


def plain_command(run: dict) -> str:
    """A run's command without where it wrote, and defaults; RUN_DIR is the run that it goes on from."""
    command = re.sub(r" --(log_dir|run_name|out|results_dir) \S+| --(dataset|device) auto", "", run["command"])
    return re.sub(r"(?<=--init_from )\S+", "RUN_DIR", command)


def minutes(runs: list[dict]) -> str:
    """Minutes of training of the seeds that ran where, and in the precision in which, the first did.

    Of one thread of a CPU they are the processor's own, which other work does not stretch.
    """
    where = lambda run: (processor(run), run.get("dtype"))
    runs = [run for run in runs if where(run) == where(runs[0])]
    cpu = lambda run: run.get("train_cpu_seconds") if run["device"] == "cpu, 1 threads" else None
    seconds = [cpu(run) or run["train_seconds"] for run in runs if "train_seconds" in run]
    return f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "-"


def claim_rows(out: Path) -> list[dict[str, str]]:
    """The cells of the results table: a row for each of CLAIMS, "not measured" where there is no result file.

    Those of WHEN_MEASURED follow where there is one.
    """
    rows = []
    runs_of = lambda name, key: [run for run in load(out, name) if key in run]  # older runs lack the newer figures
    measured = [claim for claim in WHEN_MEASURED if runs_of(claim[2], claim[3])]
    for method, setting, name, key, documents, published in CLAIMS + measured:
        runs = runs_of(name, key)
        what = f"{method}{' after a prototype warm-up' if runs and warmed_up(runs[0]) else ''}, {setting}"
        row = {"what": what, "documents": documents, "published": published, "ours": "not measured"}
        row |= dict.fromkeys(("over", "seeds", "minutes", "device", "command"), "")
        if runs:
            mean, half, over = interval(runs, key)
            row |= {
                "ours": with_interval(mean, half),
                "over": over,
                "minutes": minutes(runs),
                "seeds": ", ".join(f"{100 * run[key]:.{digits_of(half)}f}" for run in runs),
                "device": processor(runs[0]),
                "command": f"`{plain_command(runs[0])}`",
            }
        rows.append(row | {"method": method, "name": name})
    return rows


def device_notes(devices: list[str]) -> tuple[str, list[str]]:
    """Where the rows of a table were trained: what to say below it, and what to add to each row's minutes.

    (" on X", nothing for each) where all are of one device, ("", " (X)" for each) where they are of several.
    """
    if len(set(devices)) == 1:
        return f" on {devices[0]}", [""] * len(devices)
    return "", [f" ({device})" for device in devices]


def table(titles: str, rows: list) -> list[str]:
    """The lines of a Markdown table; `titles` are separated by bars."""
    lines = [f"| {titles} |", "|---" * (titles.count(" | ") + 1) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def speed_processor(race: dict) -> str:
    """Where a race was run, in short: "AMD EPYC, AVX512 with bfloat16", or the GPU's name."""
    if not race.get("device", "cpu").startswith("cpu"):
        return race["device"]
    name, _, kind = race["processor"].partition(", ")
    return f"{re.sub(r'[(]R[)]| CPU| Processor', '', name)}, {kind}"


# -------------------------------------------------------------------------------------- tables


def front_table(out: Path) -> str:
    """One row a method, for the front door."""
    chosen = {
        "mann/K1N2": "hw1",
        "mann/attention_K1N5": "attention",
        "comparison/protonet": "protonet",
        "comparison/transfer": "transfer",
        "comparison/fomaml": "maml",
        "comparison/protomaml": "maml",
        "comparison/maml": "maml",
        "comparison/anil": "maml",
        "meta_lstm/5way1shot": "meta_lstm",
        "mae/mae": "mae",
    }
    rows = []
    for name, page in chosen.items():
        for row in (row for row in claim_rows(out) if row["name"] == name and "423" not in row["what"]):
            time = f"{row['minutes']}, {row['device']}"
            rows.append(
                [
                    row["what"],
                    row["published"],
                    row["documents"],
                    row["ours"],
                    row["over"],
                    time,
                    f"[{page}](docs/{page}.md)",
                ]
            )
    return "\n".join(table("test accuracy in % | paper | documents | ours | ± over | minutes of training | page", rows))


def short_table(out: Path, *methods: str) -> str:
    """The measured rows of some methods, and their commands."""
    rows = [row for row in claim_rows(out) if row["method"] in methods and row["over"]]
    on, marks = device_notes([row["device"] for row in rows])
    keys = ("what", "documents", "published", "ours", "over", "seeds")
    cells = [[row[k] for k in keys] + [row["minutes"] + mark] for row, mark in zip(rows, marks, strict=True)]
    lines = table("test accuracy in % | documents | published | ours | ± over | each seed | minutes", cells)
    lines += [
        "",
        f"Minutes of training of one seed{on}.",
        "Commands of the rows:",
        "",
        *dict.fromkeys(f"- {row['command']}" for row in rows),
    ]
    return "\n".join(lines)


def norm_table(out: Path) -> str:
    """MAML and its relatives with both kinds of batch norm."""
    rows = []
    for row in claim_rows(out):
        runs = load(out, row["name"])
        if runs and runs[0]["script"] == "maml" and "test_accuracy_support" in runs[0]:
            rows.append(
                [row["what"], *(figure_of(runs, f"test_accuracy_{mode}") for mode in ("transductive", "support"))]
            )
    lines = [
        "MAML and its relatives with queries normalised by their own batch (transductive, as above) and by the",
        "support set alone:",
        "",
        *table("test accuracy in % | transductive | support", rows),
    ]
    return "\n".join(lines)


def vinyals_table(out: Path) -> str:
    """ProtoNet and MAML on the published protocol, beside the published figures; nothing where none is measured."""
    rows, devices, commands = [], [], []
    for method, kind, name, keys, published in ON_VINYALS:
        for (N, K), theirs in published.items():
            if runs := load(out, name.format(N=N, K=K)):
                what = f"{method}{' after a prototype warm-up' if warmed_up(runs[0]) else ''}, {N}-way {K}-shot"
                ours = [figure_of(runs, key.format(N=N, K=K)) for key in keys]
                rows.append([what, f"{theirs} ({kind})", *ours, len(runs), minutes(runs)])
                devices.append(processor(runs[0]))
                commands.append(f"- `{plain_command(runs[0])}`")
    if not rows:
        return ""
    on, marks = device_notes(devices)
    rows = [[*row[:-1], row[-1] + mark] for row, mark in zip(rows, marks, strict=True)]
    lines = [
        "On the published protocol (`--split vinyals`: 1,200 characters for training and validation, 423 for the test,",
        "each with its turns by 90, 180 and 270 degrees as further classes, also in the test). ProtoNet's authors use",
        "these very lists. MAML's divide the characters at random, 1,200 and 423, and turn each class of a task at",
        "random, also of a test task; two turns of one character never meet there. Our MAML goes on from the network",
        "of ProtoNet's rows with the same seed (RUN_DIR below): its minutes come after those.",
        "",
        *table("test accuracy in % | published | ours, transductive | ours, not transductive | seeds | minutes", rows),
        "",
        f"Minutes of training of one seed{on}. Commands of the rows:",
        "",
        *dict.fromkeys(commands),
    ]
    return "\n".join(lines)


def inner_loop_text(out: Path) -> str:
    """Accuracy before and after the inner loop, how far it moves each layer, and the picture of that."""
    rows = []
    for name, moved in pictures.inner_loops(out).items():
        runs = load(out, f"comparison/{name}")
        title = re.sub("^f", "F", pictures.INNER_LOOPS[name][0])
        title += " after a prototype warm-up" if warmed_up(runs[0]) else " from scratch"
        before = statistics.fmean(run["accuracy_before_adaptation"] for run in runs)
        shares = ["-" if value is None else f"{value:.1e}" if value else "0" for value in moved.values()]
        rows.append([title, f"{100 * before:.1f}", figure_of(runs), *shares])
        layers = " | ".join(moved)
    if not rows:
        return ""
    lines = [
        "## How much the inner loop does",
        "",
        "Accuracy on the queries before and after the inner loop, and how far it moves each layer, ‖θ' - θ‖ / ‖θ‖,",
        "mean over the test tasks. Where the body's figures lie far below the head's, MAML is ANIL in all but name:",
        "its features are used as they are. Where they are alike, the task changes the features too.",
        "",
        *table(f"1-shot, 5-way unless said | before, % | after, % | {layers}", rows),
        "",
        "![relative norm of the inner update of each layer](../results/inner_loop.png)",
    ]
    return "\n".join(lines)


def mann_table(out: Path) -> str:
    found = [row for row in claim_rows(out) if row["method"] == "MANN" and row["over"]]
    on, marks = device_notes([row["device"] for row in found])
    rows = []
    for row, mark in zip(found, marks, strict=True):
        mark = mark if row["minutes"] != "-" else ""  # tested, not trained
        alone = figure_of(load(out, row["name"]), "test_accuracy_alone")
        cells = [row[k] for k in ("documents", "published", "ours", "over", "seeds")]
        rows.append([row["what"].removeprefix("MANN, "), *cells, alone, row["minutes"] + mark])
    lines = table(
        "MANN, course split | course | published | ours | ± over | each seed | queries asked alone | minutes", rows
    )
    runs = load(out, "mann/K1N2")
    return "\n".join(lines) + (
        f"\n\nTest accuracy in per cent, mean of the seeds on {runs[0]['num_test_tasks']:,} fixed tasks; "
        f"minutes of training of one seed{on}.\nCommand of the first row: `{plain_command(runs[0])}`."
    )


MEMORIES = {  # --memory: its idea, what a task of K N images costs, how it answers queries asked alone, its results
    "lstm": ("two LSTM layers; all of the support set must fit into their state",
             "time K N, one item after another; the state does not grow",
             "asked one by one from the state that the support set left", "mann/conv_K1N5"),
    "attention": ("nothing is compressed: every query looks back at every support item",
                  "time and memory (K N)², all items at once",
                  "in the same pass: queries do not see each other", "mann/attention_K1N5"),
    "external": ("an LSTM with a table; writes over the least used rows, reads by likeness",
                 "time K N rows, one item after another; the table does not grow", "as the LSTM", ""),
}  # fmt: skip


def memories_table(out: Path) -> str:
    """The three memories side by side: idea, cost, accuracy on 5-way 1-shot; of the cost what speed.json holds."""
    races = read(out / "speed.json") if (out / "speed.json").exists() else []
    of_memories = [race for race in races if race["title"].startswith("mann,") and step_of(race, "attention")]
    race = next((race for race in of_memories if ", N 5," in race["title"]), next(iter(of_memories), None))
    rows = []
    for memory, (idea, cost, alone, name) in MEMORIES.items():
        runs = load(out, name) if name else []
        figures = [figure_of(runs, f"test_accuracy{kind}") if runs else "" for kind in ("", "_alone")]
        size = f"{runs[0]['parameters']:,}" if runs else ""
        time = f"{minutes(runs)} ({processor(runs[0])})" if runs else ""
        step = [step_of(race, memory)] if race else []
        rows.append([f"`{memory}`", idea, cost, *step, *figures, alone, size, time])
    titles = ["`--memory`", "idea", "what a task of K N images costs", *(["a training step"] if race else [])]
    titles += ["5-way 1-shot, together", "alone", "queries alone", "parameters", "minutes"]
    lines = table(" | ".join(titles), rows)
    lines += ["", "Test accuracy in per cent ± 95 % interval; minutes of training of one seed."]
    if race:
        lines += [f"A step is that of {race['title'].removeprefix('mann, ')}, 64 features an image, float32, on"]
        lines += [f"{speed_processor(race)}, and the megabytes that it keeps for its backward pass."]
    lstm, attention = (load(out, MEMORIES[memory][-1]) for memory in ("lstm", "attention"))
    if lstm and attention:
        lines += ["", memories_lesson(lstm, attention)]
    return "\n".join(lines)


def step_of(race: dict, memory: str) -> str:
    """The cost of a step with a memory, "4.1 ms, 35 MB"; "" where the race did not have it."""
    cell = race.get(f"{memory}, 64 features an image")
    kept = race.get("megabytes_kept", {}).get(memory)
    return (f"{cell['ms']:.1f} ms" + (f", {kept:.0f} MB" if kept else "")) if cell else ""


def memories_lesson(lstm: list[dict], attention: list[dict]) -> str:
    """What the LSTM and attention teach when put beside each other."""
    of = lambda runs, kind: 100 * statistics.fmean(run[f"test_accuracy{kind}"] for run in runs)
    together, alone, other = of(lstm, ""), of(lstm, "_alone"), of(attention, "_alone")
    text = (
        f"The LSTM answers {together:.1f} % of the queries when they come together, one of each class, and "
        f"{alone:.1f} % of those asked alone:\n{together - alone:.1f} points of the course's figure come from ruling "
        "classes out. For attention the two are one figure.\n"
    )
    if other > alone:
        text += (
            f"Asked alone the LSTM errs {(100 - alone) / (100 - other):.1f} times as often as attention: what must be "
            "compressed into a state before the query is\nknown is in part lost; what is kept is there to be compared. "
        )
    return text + "Encoders and lengths of training differ, so these\nare two recipes, not the memories alone."


def sights_table(out: Path) -> str:
    """Accuracy at the first, second, ... sight of a character beside the paper's; nothing where none is measured."""
    rows, notes, commands = [], {}, []
    for what, name, theirs in BY_SIGHT:
        if not (runs := load(out, name)):
            continue
        ours = []
        for i in (sight - 1 for sight in SIGHTS):
            at = [{"a": run["accuracy_by_sight"][i], "a_ci95": run["ci95_by_sight"][i]} for run in runs]
            ours.append(with_interval(*(100 * value for value in interval_of(at, "a"))))
        rows += [[f"{what}, the paper", *theirs, "", ""], [f"{what}, ours", *ours, len(runs), minutes(runs)]]
        how = f"{runs[0]['steps']:,} steps of {tasks_a_step(runs[0])} sequences on {processor(runs[0])}"
        notes[how] = [*notes.get(how, []), what]
        commands.append(f"- `{plain_command(runs[0])}`")
        tested = f"{runs[0]['num_test_tasks']:,} test sequences"
    if not rows:
        return ""
    lines = [
        "The paper's sequences: accuracy in per cent at the n-th sight of a character. At the first sight nothing but",
        "ruling out the labels already told can help; what is learned from one label shows at the second.",
        "",
        *table(" | ".join(["sight", *map(str, SIGHTS), "seeds", "minutes"]), rows),
        "",
        f"± 95 % interval over {tested}, or over the seeds where they differ by more.",
        "; ".join(f"{' and '.join(names)}: {how}" for how, names in notes.items()) + ".",
        "The paper's are after 100,000 episodes.",
        "Commands:",
        "",
        *commands,
    ]
    return "\n".join(lines)


def beyond_table(out: Path) -> str:
    """Attention, and the memories of the sequences, asked for more classes, shots and sights than they have learned."""
    tasks, sequences = [], []
    for K, N in ((5, 5), (1, 20), (5, 20)):
        if runs := load(out, f"mann/attention_K1N5_at_K{K}N{N}"):
            own = load(out, f"mann/attention_K{K}N{N}")
            figures = [figure_of(at, "test_accuracy_alone") if at else "-" for at in (runs, own)]
            tasks.append([f"{N}-way {K}-shot", *figures])
    for what, name, _ in BY_SIGHT:
        if runs := load(out, f"{name}_at_K19"):
            places = [(load(out, name), i) for i in (2, 10)] + [(runs, i) for i in (2, 10, 20)]
            curves = [[run["accuracy_by_sight"][i - 1] for run in at] for at, i in places]
            sequences.append([what, *(f"{100 * statistics.fmean(values):.1f}" if values else "-" for values in curves)])
    if not tasks + sequences:
        return ""
    lines = ["Attention can be asked for any number of classes and shots, queries alone:", ""]
    lines += table("attention, % | learned with 5-way 1-shot tasks | learned with such tasks", tasks)
    lines += ["", "The memories of the sequences can be asked to go on, 20 sights of each character instead of 10:", ""]
    titles = "% | 2nd of 10 sights, as learned | 10th of 10 | 2nd of 20 | 10th of 20 | 20th of 20"
    command = "`python reproduce.py mann --only attention_K1N5_at,sequence_at`"
    return "\n".join([*lines, *table(titles, sequences), "", f"Command, which trains first what it tests: {command}."])


def mann_answers(out: Path) -> str:
    """The homework's questions on the MANN, answered by our runs."""
    of = lambda name, key="test_accuracy": figure_of(load(out, f"mann/{name}"), key)
    three = lambda name: of(f"K1N3_{name}")
    run = load(out, "mann/K1N3_rate_1e-3")[0]
    return f"""\
- **More classes?** Harder: {of("K1N2")} with 2, {of("K1N3")} with 3, {of("K1N4")} with 4 classes at one shot. There
  are more labels to tell apart and more images to keep in mind.
- **More shots?** Easier: {of("K2N2")} with 2 images of each of 2 classes, {of("K1N2")} with one. Asked alone,
  without the hint that the queries are one of each class, it is {of("K2N2", "test_accuracy_alone")} and
  {of("K1N2", "test_accuracy_alone")}.
- **Which learning rate?** 1-shot 3-way with the course's network and recipe, {run["steps"]} steps:
  {three("rate_1e-1")} at 1e-1, {three("rate_1e-3")} at 1e-3, {three("rate_1e-5")} at 1e-5, where guessing gives
  33.3.
- **How much memory?** The same with 8, 128 and 256 units: {three("memory_8")}, {three("rate_1e-3")} and
  {three("memory_256")}.
- **Which layers?** The same with two GRU layers: {three("gru")}, with three LSTM layers: {three("3_layers")}.

The last three are one seed each, intervals over tasks. Command at rate 1e-3: `{plain_command(run)}`."""


def memorisation_text(out: Path) -> str:
    (run,) = load(out, "mann/memorisation")
    return (
        f"With `--fixed_labels` every training character keeps one label. The network then answers "
        f"{100 * run['train_accuracy']:.1f} % of the training tasks right, and {100 * run['test_accuracy']:.1f} ± "
        f"{100 * run['ci95']:.1f} % of the tasks with new characters, where guessing gives {100 / run['N']:.1f} %: it "
        f"has memorised the characters and has not learned to learn.\n`{plain_command(run)}`"
    )


def meta_lstm_table(out: Path) -> str:
    """The LSTM meta-learner: the learned rule, the same start before adaptation and with gradient descent."""
    names = {
        "5way1shot": "",
        "5way5shot": "",
        "5way1shot_short": ", short",
        "5way1shot_pool": ", short, fixed pool",
        "5way1shot_second_order": ", short, second order",
        "10way10shot": ", paper's flags, short",
    }
    rows, found = [], []
    for setting, remark in names.items():
        if not (runs := load(out, f"meta_lstm/{setting}")):
            continue
        run, rates = runs[0], sorted({run["sgd_rate"] for run in runs})
        ours, sgd, before = (figure_of(runs, f"test_accuracy{k}") for k in ("", "_sgd", "_before"))
        rows.append(
            [
                f"{run['N']}-way {run['K']}-shot{remark}",
                ours,
                f"{sgd} (rate {', '.join(f'{rate:g}' for rate in rates)})",
                before,
                len(runs),
                run["Q"],
                run["updates"],
                f"{run['steps'] * tasks_a_step(run):,}",
                minutes(runs),
            ]
        )
        found.append(run)
    on, marks = device_notes([processor(run) for run in found])
    for row, mark in zip(rows, marks, strict=True):
        row[-1] += mark
    titles = "meta-LSTM, course split | learned rule | tuned gradient descent | before | seeds | queries | updates "
    titles += "| episodes | minutes"
    note = "Test accuracy in per cent ± 95 % interval on 600 fixed tasks, or over the seeds where they differ by more; "
    note += f"queries of each class; minutes of training of one seed{on}. Commands of the rows:\n"
    return "\n".join([*table(titles, rows), "", note, *(f"- `{plain_command(run)}`" for run in found)])


def paired(out: Path) -> dict[str, tuple[float, float]]:
    """{method: (mean, half-width)} of the tasks' differences to the long ProtoNet in points, seeds averaged first."""

    def per_task(name: str) -> list[float]:
        runs = [run["accuracies"] for run in load(out, f"comparison/{name}") if "accuracies" in run]
        return [statistics.fmean(values) for values in zip(*runs, strict=False)]

    reference, found = per_task("protonet_long"), {}
    for name in ("protonet", "transfer", "fomaml", "protomaml", "maml", "anil"):
        if reference and (mine := per_task(name)):
            mean, half = mean_and_ci95([a - b for a, b in zip(mine, reference, strict=False)])
            found[name] = 100 * mean, 100 * half
    return found
