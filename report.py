"""Every table and every picture of the documents, from the result files; nothing in them is typed or drawn by hand.

    python report.py                      README.md, docs/, results/README.md, all tables and pictures of results/
    python report.py --results DIR        the tables and pictures of another folder that reproduce.py has filled
    python report.py --run RUN_DIR        the curves of one run as RUN_DIR/figure.png

It reads `results/**/*.json`, writes text between the markers `<!-- name -->` and `<!-- /name -->` of the documents, and
CSV and PNG files beside the JSON. The same JSON gives the same bytes. A result on other images than those its row is
about is refused. What the source documents and the papers report is typed here, in CLAIMS, and nowhere else.
"""

from __future__ import annotations

import experiment
from experiment import UserError, mean_and_ci95, write_atomically

import csv
import io
import math
import re
import statistics
from pathlib import Path

import pictures
from pictures import (
    COST_TITLES,
    PARTS,
    SWEEPS,
    TITLES,
    digits_of,
    interval,
    interval_of,
    load,
    processor,
    read,
    tasks_a_step,
    warmed_up,
)

HERE = Path(__file__).resolve().parent
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
    ("ProtoNet", "the same, of one drawer", "comparison/protonet_lake", "test_accuracy_one_drawer", "-",
     "86 (Lake's trials)"),
    ("Fine-tuning", "423-way", "comparison/transfer", "finetuned_accuracy", "78.5", "-"),
    ("Fine-tuning", "5-way 1-shot", "comparison/transfer", "test_accuracy", "-", "-"),
    ("First-order MAML", "5-way 1-shot", "comparison/fomaml", "test_accuracy", "81.5", "98.3" + VINYALS),
    ("Proto-MAML (first order)", "5-way 1-shot", "comparison/protomaml", "test_accuracy", "89.2", "-"),
    ("MAML", "5-way 1-shot", "comparison/maml", "test_accuracy", "-", "98.7" + VINYALS),
    ("MAML", "5-way 1-shot, plain features", "comparison/maml_plain", "test_accuracy", "-", "98.7" + VINYALS),
    ("MAML", "5-way 5-shot", "comparison/maml_5way5shot", "test_accuracy", "-", "99.9" + VINYALS),
    ("MAML", "20-way 1-shot", "comparison/maml_20way1shot", "test_accuracy", "-", "95.8" + VINYALS),
    ("MAML", "20-way 5-shot", "comparison/maml_20way5shot", "test_accuracy", "-", "98.9" + VINYALS),
    ("MAML", "5-way 5-shot, 32 x 32 pixels", "comparison/maml_5way5shot_32_pixels", "test_accuracy", "-", "-"),
    ("MAML", "20-way 5-shot, 32 x 32 pixels", "comparison/maml_20way5shot_32_pixels", "test_accuracy", "-", "-"),
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
    ("First-order MAML", "5-way 1-shot, from scratch", "comparison/fomaml_scratch", "test_accuracy", "81.5",
     "98.3" + VINYALS),
    ("Proto-MAML (first order)", "5-way 1-shot, from scratch", "comparison/protomaml_scratch", "test_accuracy", "89.2",
     "-"),
    ("MAML", "5-way 1-shot, from scratch", "comparison/maml_scratch", "test_accuracy", "-", "98.7" + VINYALS),
    ("MAML++", "5-way 1-shot, from scratch", "comparison/mamlpp_scratch", "test_accuracy", "-", "99.47" + VINYALS),
    *[("MANN", f"{N}-way {K}-shot, attention", f"mann/attention_K{K}N{N}", "test_accuracy_alone", "-",
       f"{snail} (SNAIL, Vinyals' split)") for N, K, snail in ((5, 1, "99.07"), (5, 5, "99.78"), (20, 1, "97.64"))],
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
# What the documents say of the feature weights: (what, weights, training points, their test error)
FEATURE_CLAIMS = [
    ("weights 1", "ones", 32, "0.95"),
    ("oracle", "oracle", 32, "1e-30"),
    ("meta-learned", "meta", 32, "0.31"),
    ("meta-learned", "meta", 31, "0.45"),
    ("meta-learned", "meta", 33, "0.39"),
]
COST_CLAIMS = [("maml", "grows linearly"), ("es", "does not grow")]  # peak memory with the inner steps

# ------------------------------------------------------------------------------------- results


def with_interval(mean: float, half: float) -> str:
    """Such as 98.7 ± 0.2, in per cent."""
    return f"{mean:.{digits_of(half)}f} ± {half:.{digits_of(half)}f}"


def figure_of(runs: list[dict], key: str = "test_accuracy") -> str:
    return with_interval(*interval(runs, key)[:2])


def plain_command(run: dict) -> str:
    """A run's command without what does not change its figures: where it wrote, and defaults."""
    return re.sub(r" --(log_dir|run_name|out|results_dir) \S+| --(dataset|device) auto", "", run["command"])


def minutes(runs: list[dict]) -> str:
    seconds = [run["train_seconds"] for run in runs if "train_seconds" in run]
    return f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "-"


def claim_rows(out: Path) -> list[dict[str, str]]:
    """The cells of the results table: a row for each of CLAIMS, "not measured" where there is no result file.

    Those of WHEN_MEASURED follow where there is one.
    """
    rows = []
    measured = [claim for claim in WHEN_MEASURED if load(out, claim[2])]
    for method, setting, name, key, documents, published in CLAIMS + measured:
        runs = load(out, name)
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


# -------------------------------------------------------------------------------------- tables


def front_table(out: Path) -> str:
    """One row a method, for the front door."""
    chosen = {
        "mann/K1N2": "hw1",
        "mann/attention_K1N5": "hw1",
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
    rows, commands = [], []
    for method, kind, name, keys, published in ON_VINYALS:
        for (N, K), theirs in published.items():
            if runs := load(out, name.format(N=N, K=K)):
                what = f"{method}{' after a prototype warm-up' if warmed_up(runs[0]) else ''}, {N}-way {K}-shot"
                ours = [figure_of(runs, key.format(N=N, K=K)) for key in keys]
                rows.append([what, f"{theirs} ({kind})", *ours, len(runs), minutes(runs)])
                commands.append(f"- `{plain_command(runs[0])}`")
    if not rows:
        return ""
    lines = [
        "On the published protocol (`--split vinyals`: 1,200 characters for training and validation, 423 for the test,",
        "each with its turns by 90, 180 and 270 degrees as further classes, also in the test). ProtoNet's authors use",
        "these very lists. MAML's divide the characters at random, 1,200 and 423, and turn each class of a task at",
        "random, also of a test task; two turns of one character never meet there.",
        "",
        *table("test accuracy in % | published | ours, transductive | ours, not transductive | seeds | minutes", rows),
        "",
        "Commands of the rows:",
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
        *table(f"5-way 1-shot | before, % | after, % | {layers}", rows),
        "",
        "![relative norm of the inner update of each layer](../results/inner_loop.png)",
    ]
    return "\n".join(lines)


def mann_table(out: Path) -> str:
    found = [row for row in claim_rows(out) if row["method"] == "MANN" and row["over"]]
    on, marks = device_notes([row["device"] for row in found])
    rows = []
    for row, mark in zip(found, marks, strict=True):
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


SIGHTS = (1, 2, 3, 5, 10)
BY_SIGHT = [  # of a character in a sequence of 50 images (Santoro et al. 2016, table 1, 5 classes, one-hot labels)
    ("LSTM", "mann/lstm_sequence", (24.4, 49.5, 55.3, 63.6, 62.5)),
    ("external memory", "mann/external_sequence", (36.4, 82.8, 91.0, 94.9, 98.1)),
]


def sights_table(out: Path) -> str:
    """Accuracy at the first, second, ... sight of a character beside the paper's; nothing where none is measured."""
    rows, notes, commands = [], [], []
    for what, name, theirs in BY_SIGHT:
        if not (runs := load(out, name)):
            continue
        ours = []
        for i in (sight - 1 for sight in SIGHTS):
            at = [{"a": run["accuracy_by_sight"][i], "a_ci95": run["ci95_by_sight"][i]} for run in runs]
            ours.append(with_interval(*(100 * value for value in interval_of(at, "a"))))
        rows += [[f"{what}, the paper", *theirs, "", ""], [f"{what}, ours", *ours, len(runs), minutes(runs)]]
        notes.append(f"{what}: {runs[0]['steps']:,} steps of {tasks_a_step(runs[0])} sequences on {processor(runs[0])}")
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
        f"{'; '.join(notes)}. The paper's are after 100,000 episodes.",
        "Commands:",
        "",
        *commands,
    ]
    return "\n".join(lines)


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
        for run in load(out, f"meta_lstm/{setting}"):
            ours, sgd, before = (
                with_interval(100 * run[f"test_accuracy{k}"], 100 * run[f"ci95{k}"]) for k in ("", "_sgd", "_before")
            )
            rows.append(
                [
                    f"{run['N']}-way {run['K']}-shot{remark}",
                    ours,
                    f"{sgd} (rate {run['sgd_rate']:g})",
                    before,
                    run["Q"],
                    run["updates"],
                    f"{run['steps'] * tasks_a_step(run):,}",
                    minutes([run]),
                ]
            )
            found.append(run)
    on, marks = device_notes([processor(run) for run in found])
    for row, mark in zip(rows, marks, strict=True):
        row[-1] += mark
    titles = "meta-LSTM, course split | learned rule | tuned gradient descent | before | queries | updates | episodes "
    titles += "| minutes"
    note = "Test accuracy in per cent ± 95 % interval on 600 fixed tasks, one seed; queries of each class; minutes of "
    note += f"training{on}. Commands:\n"
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


def growth(f: dict, unit: str) -> str:
    """A fit of costs.json in words: a line a + b x, or a power x^b."""
    if f["form"] == "power":
        return f"x^{f['b']:.2f}"
    if abs(f["b"]) < 1e-9:
        return f"{f['a']:.1f} {unit}, flat"
    return f"{f['a']:.1f} {'+' if f['b'] > 0 else '-'} {abs(f['b']):.2f} x {unit}"


def other_rows(out: Path) -> list[list[str]]:
    """What the documents say about costs and feature weights beside what we measured: the cells of each row."""
    rows = []
    if (file := out / "costs.json").exists():
        costs = read(file)
        found = {f["method"]: f for f in costs["fits"] if (f["sweep"], f["engine"]) == ("inner_steps", "vmap")}
        for method, claim in COST_CLAIMS:
            what = f"{COST_TITLES[method]}, peak memory with x inner steps"
            rows.append([what, claim, growth(found[method]["memory"], "MB"), f"`{plain_command(costs)}`"])
    if (file := out / "features.json").exists() and "closed_form" in (results := read(file)):
        run = results["closed_form"]
        for what, weights, points, claim in FEATURE_CLAIMS:
            what = f"Feature weights, test error at {points} points, {what}"
            if str(points) in run[weights]:
                rows.append([what, claim, f"{run[weights][str(points)]:#.2g}", f"`{plain_command(run)}`"])
    return rows


def costs_text(out: Path) -> str:
    """How MAML's and ES's costs grow, where ES is the dearer one, and what its gradient is worth."""
    costs = read(out / "costs.json")
    fits, rows = [f for f in costs["fits"] if f["engine"] == "vmap"], costs["rows"]
    cells = [
        [
            SWEEPS[f["sweep"]],
            COST_TITLES[f["method"]],
            growth(f["runtime"], "ms"),
            f"{f['runtime']['r2']:.3f}",
            growth(f["memory"], "MB"),
            f"{f['memory']['r2']:.3f}",
        ]
        for f in fits
    ]
    first = rows[0]
    lines = [
        *table("engine `vmap`, x = | method | runtime | R² | peak memory | R²", cells),
        "",
        f"Medians on {processor(costs)}, {first['meta_batch_size']} tasks; ES compares {first['num_perturbations']} "
        "perturbed networks, so both adapt the same number of them. With x^b twice the units cost 2^b times as much. "
        f"Command: `{plain_command(costs)}`.",
        "",
    ]
    large = [row for row in rows if (row["sweep"], row["hidden_dim"]) == ("hidden_dim", 512)]
    cells = [
        [COST_TITLES[row["method"]], row["engine"], f"{1e3 * row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.1f}"]
        for row in large
        if row["method"] in ("maml", "es")
    ]
    lines += [*table("at 512 units | engine | ms | MB", cells), "", dearer_text(costs), "", cosine_text(costs)]
    if (out / "costs_train.json").exists():
        lines += ["", training_text(read(out / "costs_train.json"))]
    return "\n".join(lines)


def dearer_text(costs: dict) -> str:
    """The settings at which ES costs more than MAML, by engine and kind of cost."""
    parts = []
    for engine in ("vmap", "loop"):
        total = sum((row["method"], row["engine"]) == ("es", engine) for row in costs["rows"])
        for what, word in (("seconds", "time"), ("peak_bytes", "memory")):
            found = [d for d in costs["es_dearer"] if (d["engine"], d["what"]) == (engine, what)]
            at = ", ".join(f"{SWEEPS[d['sweep']]} {d['value']}: {d['es'] / d['maml']:.2f} times" for d in found)
            parts.append(f"{word}, engine `{engine}`: {len(found)} of {total}" + (f" ({at})" if at else ""))
    return "Points of the sweeps at which ES costs more than MAML: " + "; ".join(parts) + "."


def cosine_text(costs: dict) -> str:
    """What the estimate is worth, also at the number of perturbations that takes as long as MAML's exact gradient."""
    found = costs["es_cosine"]
    if not found:
        return "The cosine of the ES estimate was not measured."
    shown = ", ".join(f"{c['cosine']:.3f} with {c['perturbations']} ({c['expected']:.3f})" for c in found)
    D, m = found[0]["parameters"], found[0]["disagreement"]
    base = {"sweep": "inner_steps", "engine": "vmap", "inner_steps": 5}
    at = [row for row in costs["rows"] if base.items() <= row.items()]
    text = (
        "Cosine between the ES estimate and the exact meta-gradient at the initialisation by the number of perturbed "
        f"networks, at {D:,} parameters, 5 inner steps and m = {m:.1f} (what the formula below expects): {shown}."
    )
    if at:
        maml, es = (next(row for row in at if row["method"] == method) for method in ("maml", "es"))
        pairs = es["num_perturbations"] / 2 * maml["seconds"] / es["seconds"]
        text += (
            f" In the time of one MAML step ES can compare {2 * pairs:.0f} networks; the cosine to expect of them is "
        )
        text += f"{(1 + m * (D + 1) / pairs) ** -0.5:.3f}."
    return text


def training_text(runs: dict) -> str:
    parts = [
        f"{COST_TITLES[method]} {run['test_loss']:.4f} ± {run['ci95']:.4f} (before adaptation "
        f"{run['test_loss_before']:.3f}) after {run['steps']} outer steps"
        for method, run in runs.items()
    ]
    run = next(iter(runs.values()))
    return (
        f"Trained (`{plain_command(run)}`), mean squared error on {run['num_test_tasks']} test tasks after "
        f"{run['inner_steps']} inner steps: " + "; ".join(parts) + "."
    )


def features_text(out: Path) -> str:
    """The homework's questions on feature weights, each answered in two sentences."""
    r = read(out / "features.json")
    d, e, adam = r["alias"], r["closed_form"], r["closed_form_adam"]
    five, one, g, h = r["gradient_5_steps"], r["gradient_1_steps"], r["classification"], r["logistic_10_steps"]
    random, n = r["closed_form_random"], e["num_points"]
    at = lambda run, name="meta", m=n: f"{run[name][str(m)]:#.2g}"
    percent = lambda run, name="meta", m=n: f"{100 * run[name][str(m)]:.1f} ± {100 * run['ci95'][name][str(m)]:.1f} %"
    span = lambda run, k: f"{run['weights'][k]['min']:.2f} to {run['weights'][k]['max']:.2f}"
    excess = max(abs(end[0]) / norm - 1 for end, norm in zip(d["end"], d["norm"], strict=True))
    never = "never worse than" if e["at_most_ones_from"] == 1 else "not always better than"
    seconds = sum(run.get("train_seconds", 0) for run in r.values() if run is not random)
    return f"""\
- **(d) Where does gradient descent on c end, and where does beta go?** From c = (1, 1), of norm {d["norm"][0]:.4f},
  it ends at ({d["end"][0][0]:.4f}, {d["end"][0][1]:.0e}) with beta = ({d["beta"][0][0]:.4f},
  {d["beta"][0][1]:.0e}): the limits are (‖c⁽⁰⁾‖, 0) and (1/‖c⁽⁰⁾‖, 0), or their negatives for a start with c_0
  below 0. The gradient is at a right angle to c, so that only the finite step lengthens c, here by at most
  {100 * excess:.2f} % over {len(d["norm"])} starts; the tests let the step go to 0 and find the limit to 1e-6.
- **(e) How do the errors compare at {n} grid points?** All weights 1: {at(e, "ones")}, where predicting zero gives
  1; meta-learned: {at(e)} after {e["train_steps"]} SGD steps and {at(adam)} with Adam; the oracle:
  {at(e, "oracle")}, zero up to rounding. The meta-learned weights are {never} weights 1 at any number of points
  from 1 to {2 * n}, but off the training grid SGD's beat Adam's ({at(e, m=n - 1)} against {at(adam, m=n - 1)} at
  {n - 1}), whose weights in S rose less.
- **(e) Why does the error dip at {n}, below {n - 1} and {n + 1} ({at(e, m=n - 1)} and {at(e, m=n + 1)})?**
  Meta-training on {n} grid points only takes weight from the features that look like one in S on just that grid,
  frequencies within 5 of a multiple of {n}; of the aliases on {n - 1} and {n + 1} points
  {100 * e["untrained_aliases"][str(n - 1)]:.0f} and {100 * e["untrained_aliases"][str(n + 1)]:.0f} % are others,
  which still weigh 1. At {2 * n} points all aliases are among the trained ones again, so the error falls once more,
  to {at(e, m=2 * n)}.
- **(e) How do the weights change, and why does that help?** With SGD the weights in S rise from 1 to
  {span(e, "S")}, those of the aliases fall to {span(e, "aliases")} and those of all others stay at 1 (with Adam the
  aliases fall to {span(adam, "aliases")}). An alias takes the share c_k² of a coefficient's sum of c², so that a
  heavy true feature among light aliases keeps nearly all of it.
- **(e) And with uniformly random training points?** No feature is an exact alias then, so all outside S lose a
  little weight ({span(random, "others")}; in S {span(random, "S")}). It helps less and has no dip: {at(random)} at
  {n} points (weights 1: {at(random, "ones")}), {at(random, m=n - 1)} and {at(random, m=n + 1)} beside it.
- **(f) Does meta-learning help with 5 gradient steps as inner loop?** Yes, as much as the closed form: {at(five)}
  at {n} points (weights 1: {at(five, "ones")}). The fixed inner step is too long for few points; from
  {five["at_most_ones_from"]} points on the meta-learned weights are never worse than weights 1.
- **(f) Does one step still work?** Yes, {at(one)} at {n} points (weights 1: {at(one, "ones")}), with no dip to
  speak of: {at(one, m=n - 1)} at {n - 1} points. On a grid the features in S are orthogonal, so one step of the
  right length is exact, and the weights themselves set that length: in S they rise to {span(one, "S")}, and
  {(2 * one["inner_lr"]) ** -0.5:.2f} would be exact (the oracle has it: {at(one, "oracle")}).
- **(g) Are the weights useful when labels are signs and the code is that of regression?** Yes: {percent(g)} wrong
  signs at {n} points, against {percent(g, "ones")} with weights 1 and {percent(g, "oracle")} with the oracle. At
  {2 * n} points they beat the oracle ({percent(g, m=2 * n)} against {percent(g, "oracle", 2 * n)}): a sign function
  has overtones outside S, and features there gain weight too (up to {g["weights"]["others"]["max"]:.2f}).
- **(h) And with logistic regression as inner loop?** {h["num_gd_steps"]} logistic steps give {percent(h)} wrong
  signs at {n} points, against {percent(h, "ones")} with weights 1 and {percent(h, "oracle")} with the oracle. At
  {2 * n} points it is {percent(h, m=2 * n)} against {percent(h, "oracle", 2 * n)}; the two parts have their own
  learning rates, so (g) and (h) do not rank the two losses.

Seed {e["seed"]}, mean over {e["num_test_tasks"]} test tasks ({random["num_test_tasks"]} with random points), ± 95 %
interval;
{seconds:.0f} seconds of meta-training in all for the parts on a grid ({processor(e)}).
Command: `{plain_command(e)}`; random points: `{plain_command(random)}`."""


def memorization_table(out: Path) -> str:
    """A row for each task, learner and regulariser; accuracies in per cent, squared errors as they are."""
    results, rows = [read(path) for path in sorted(out.glob("memorization/*.json"))], []
    for task in pictures.TASKS:
        for learner in ("maml", "blackbox"):
            for regulariser in pictures.REGULARISERS:
                chosen = (task, learner, regulariser)
                runs = [run for run in results if (run["task"], run["learner"], run["regulariser"]) == chosen]
                cells = [
                    interval_of(runs, f"{part}_{condition}")
                    for part in ("train", "test")
                    for condition in pictures.CONDITIONS
                    if runs
                ]
                if runs and runs[0]["figure"] == "accuracy":
                    rows.append([*chosen, len(runs), *(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in cells)])
                elif runs:
                    rows.append([*chosen, len(runs), *(f"{mean:.3f} ± {half:.3f}" for mean, half in cells)])
    if not rows:
        return "Not measured."
    titles = "task | learner | regulariser | seeds | train, own | train, emptied | train, other "
    seconds = [run["train_seconds"] for run in results]
    return "\n".join(
        [
            *table(titles + "| test, own | test, emptied | test, other", rows),
            "",
            "The commands: `python memorization.py --task sinusoid --learner maml --regulariser weights "
            f"--random_seed 1` with what the row says, and seeds from 1; {min(seconds):.0f} to {max(seconds):.0f} "
            f"seconds of training on {processor(results[0])}, upper bounds, for the machine was busy.",
        ]
    )


def bayes_tables(out: Path) -> str:
    """For each setting: negative log likelihood by points with and without metadata, the paired gain, coverage."""
    settings: dict[tuple, list[dict]] = {}
    for run in [read(path) for path in sorted(out.glob("bayes/*.json"))]:
        known = run["metadata"] if run["world"] == "sinusoid" else "alphabet"
        settings.setdefault((run["world"], known, run["drop_phi1"]), []).append(run)
    lines: list[str] = []
    for (world, known, dropped), runs in sorted(settings.items(), key=lambda item: (item[0][2], item[0])):
        rows, first = [], runs[0]
        for i, n in enumerate(first["points"]):

            def at(key, i=i, runs=runs):
                return interval_of([{name: run[name][i] for name in (key, f"{key}_ci95")} for run in runs], key)

            pairs = ["{:.3f} ± {:.3f}".format(*at(key)) for key in ("nll_with", "nll_without", "gain")]
            covered = [
                f"{100 * at(key)[0]:.1f}" if key in first else "" for key in ("coverage90_with", "coverage90_without")
            ]
            rows.append([n, *pairs, *covered, *(f"{at(key)[0]:.2f}" for key in ("bound_with", "evidence_with"))])
        what = f"{world}, metadata {known}, {'terms of phi1 dropped' if dropped else 'whole bound'}"
        titles = "points | NLL with | NLL without | gain, paired | 90 % covers, with | without | bound | evidence"
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
        lines += [f"{what}, {seeds}, {first['num_test_tasks']:,} test tasks, `{plain_command(first)}`:", ""]
        lines += [*table(titles, rows), ""]
    return "\n".join(lines).rstrip() or "Not measured."


def mae_table(out: Path) -> str:
    """Each way to use the frozen features, and the same of the untrained transformer; of runs of mae.py alone."""
    ways = {
        "test_accuracy": "whitened, views",
        "test_accuracy_one_view": "whitened, one view",
        "test_accuracy_plain": "plain",
        "test_accuracy_linear": "linear head",
        "test_accuracy_untrained": "untrained",
        "probe_accuracy": "probe, all characters",
    }
    rows, commands = [], []
    found = pictures.mae_runs(out)
    on, marks = device_notes([processor(runs[0]) for runs in found.values()])
    for name, runs in found.items():
        figures = [figure_of(runs, key) if key in runs[0] else "" for key in ways]
        masked, second = f"{100 * runs[0]['mask_ratio']:.0f} %", "yes" if runs[0]["contrast"] else "no"
        rows.append([name.replace("_", " "), masked, second, *figures, interval(runs)[2], len(runs), minutes(runs)])
        commands.append(f"- `{plain_command(runs[0])}`")
    titles = f"mae, course split | masked | second loss | {' | '.join(ways.values())} | ± over | seeds | minutes"
    if not rows:
        return "Not measured."
    note = f"Minutes of training of one seed{on}; of several seeds the mean. Commands:"
    rows = [[*row[:-1], row[-1] + mark] for row, mark in zip(rows, marks, strict=True)]
    return "\n".join([*table(titles, rows), "", note, "", *commands])


def mae_lessons(out: Path) -> str:
    """What the default's figures teach, beside those of a network that was told every label."""
    if not (runs := load(out, "mae/mae")):
        return ""
    of = lambda name, key="test_accuracy": statistics.fmean(100 * run[key] for run in load(out, name))
    more = lambda a, b: f"{of('mae/mae', a) - of('mae/mae', b):.1f}"
    ours, bare, head, probe, untrained, bare_untrained = (
        figure_of(runs, key)
        for key in (
            "test_accuracy",
            "test_accuracy_plain",
            "test_accuracy_linear",
            "probe_accuracy",
            "test_accuracy_untrained",
            "test_accuracy_untrained_plain",
        )
    )
    whitening = more("test_accuracy_one_view", "test_accuracy_plain")
    views = more("test_accuracy", "test_accuracy_one_view")
    both = more("test_accuracy_untrained", "test_accuracy_untrained_plain")
    drawings = 20 - runs[0]["flags"]["held_out"]
    lines = [
        "- **Is the architecture enough?** No. The same transformer with random weights, whitened and averaged alike,",
        f"  answers {untrained} %, trained without a label {ours} %. Without whitening and views it is",
        f"  {bare_untrained} % and {bare} %.",
        f"- **What do whitening and views add?** {whitening} and {views} points; to random weights together {both}.",
        f"- **Prototypes or a linear head?** With one drawing a class {ours} % and {head} %. A linear head for all",
        f"  test characters at once, from {drawings} drawings of each, is right in {probe} % of cases.",
    ]
    if load(out, "comparison/protonet"):
        points = of("comparison/protonet") - of("mae/mae")
        lines += [
            "- **What would labels be worth?** The default ProtoNet, told the label of every training drawing, answers",
            f"  {figure_of(load(out, 'comparison/protonet'))} %: {abs(points):.1f} points "
            f"{'more' if points > 0 else 'less'}.",
        ]
    return "\n".join(lines)


def few_labels_text(out: Path) -> str:
    """The transformer trained on with few labels, from scratch and from masked auto-encoding; nothing where neither."""
    found, rows, commands = pictures.few_labels(out), [], []
    if not found:
        return ""
    for n, starts in found.items():
        cells = []
        for runs in starts.values():
            seeds = ", ".join(f"{100 * run['test_accuracy']:.1f}" for run in runs)
            cells += [figure_of(runs) if runs else "", seeds]
            commands += [f"- `{plain_command(runs[0])}`"] if runs else []
        conv4 = load(out, "comparison/protonet") if n == 1100 else []
        rows.append([f"{n:,}", *cells, gain(*reversed(starts.values())), figure_of(conv4) if conv4 else ""])
    some = next(runs for starts in found.values() for runs in starts.values() if runs)
    titles = "labelled characters | from scratch | each seed | from masked auto-encoding | each seed "
    titles += "| gain, paired | Conv4 from scratch"
    lines = [
        "## Few labels",
        "",
        "The transformer is trained on as a prototypical network (`protonet.py --encoder vit`) with the labels of the",
        "first 50, 200 or all 1,100 training characters: from random weights, and from those of the masked",
        "auto-encoder, which saw every training drawing and no label.",
        "",
        *table(titles, rows),
        "",
        f"5-way 1-shot, accuracy in per cent on {some[0]['num_test_tasks']:,} test tasks, ± 95 % interval over them or",
        "over the seeds where they differ by more; the gain, in points, is that on the same tasks and seeds. Conv4 is",
        "the default ProtoNet. Commands (RUN_DIR: a run of `mae.py` with the same seed):",
        "",
        *dict.fromkeys(commands),
        *few_labels_lesson(out, found),
        "",
        "![accuracy by the number of labelled characters](../results/mae_labels.png)",
    ]
    return re.sub(r"--init_from \S+?( |`)", r"--init_from RUN_DIR\1", "\n".join(lines))


def gain(new: list[dict], old: list[dict]) -> str:
    """Points by which `new` is better than `old` on the same tasks and seeds; "" where they share no seed.

    Only runs of one kind of device are paired: there were results of a GPU whose test tasks were drawn by the GPU.
    """
    kind = lambda run: (run["seed"], run["device"].startswith("cpu"))
    before = {kind(run): run["accuracies"] for run in old}
    pairs = [(run["accuracies"], before[kind(run)]) for run in new if kind(run) in before]
    differences = [mean_and_ci95([a - b for a, b in zip(*pair, strict=True)]) for pair in pairs]
    if not differences:
        return ""
    mean, half = interval_of([{"gain": mean, "gain_ci95": half} for mean, half in differences], "gain")
    return f"{'+' if mean >= 0 else '-'}{with_interval(100 * abs(mean), 100 * half)}"


def few_labels_lesson(out: Path, found: dict[int, dict[str, list[dict]]]) -> list[str]:
    """The lines on what the labels and the start are worth, from what is measured of them."""
    gains = {n: gain(*reversed(starts.values())) for n, starts in found.items()}
    parts = ", ".join(f"{points} points with {n:,}" for n, points in gains.items() if points)
    lines = ["", f"What the start without labels is worth: {parts} labelled characters."] if parts else []
    for n, starts in found.items():
        if starts["_from_mae"] and "Accuracy/val" in (curves := starts["_from_mae"][0].get("curves", {})):
            (first, begin), *rest = curves["Accuracy/val"]
            step, lowest = min(rest, key=lambda point: point[1], default=(first, begin))
            if lowest < begin - 0.02:
                lines += [
                    f"With {n:,} the start is lost on the way: validation accuracy is {100 * begin:.1f} % at step "
                    f"{first:,} of that training and {100 * lowest:.1f} % at step {step:,}."
                ]
    if frozen := load(out, "mae/mae"):
        mean, half, _ = interval(frozen)
        verdicts: dict[str, list[str]] = {"more than": [], "within the intervals of": [], "less than": []}
        for n, starts in found.items():
            if starts[""]:
                other, its_half, _ = interval(starts[""])
                apart = abs(mean - other) > math.hypot(half, its_half)
                verdict = "within the intervals of" if not apart else "more than" if mean > other else "less than"
                verdicts[verdict].append(f"{n:,}")
        text = "; ".join(f"{verdict} {' and '.join(ns)}" for verdict, ns in verdicts.items() if ns)
        if text:
            lines += [
                "",
                f"The frozen features, without a label, answer {with_interval(mean, half)} %; beside training from "
                f"scratch, by labelled characters: {text}.",
            ]
    return lines


def masks_text(out: Path) -> str:
    """The best masking ratio with and without the second loss, and the picture; nothing where one ratio is measured."""
    if not (curves := pictures.masks(out)):
        return ""
    parts = []
    for second, runs_at in curves.items():
        figure = lambda ratio, runs_at=runs_at: f"{figure_of(runs_at[ratio])} % at {100 * ratio:.0f} %"
        best = max(runs_at, key=lambda ratio, runs_at=runs_at: interval(runs_at[ratio])[0])
        worst = min(runs_at, key=lambda ratio, runs_at=runs_at: interval(runs_at[ratio])[0])
        parts.append(f"{'with' if second else 'without'} the second loss best {figure(best)} masked")
        parts[-1] += f", worst {figure(worst)}" if best != worst else ""
    lines = [
        "## How much to hide",
        "",
        f"Test accuracy of short runs by the share of squares that is hidden: {'; '.join(parts)}.",
        "The default's share was chosen on validation characters, before these runs.",
        "",
        "![accuracy by masking ratio](../results/mae_masks.png)",
    ]
    return "\n".join(lines)


def reconstructions_text(out: Path) -> str:
    """The picture of what the networks draw, where a run has kept its drawings."""
    if not (runs := pictures.reconstructed(out)):
        return ""
    errors = [f"{run['test_error']:.2f} ({pictures.reconstruction_title(run)})" for run in runs]
    lines = [
        "## What it draws",
        "",
        "Twelve test characters, none of them seen in training; for each network what it saw (grey: hidden) and how it",
        "completed that. A completed square borrows its true mean and variance, so what the network draws is the shape",
        "of the stroke in it, and an empty square stays empty.",
        "",
        "![test characters, hidden squares, and what networks made of them](../results/mae_reconstruction.png)",
        "",
        f"Squared error on the hidden squares of 500 test drawings: {'; '.join(errors)}.",
    ]
    return "\n".join(lines)


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


def speed_processor(race: dict) -> str:
    """Where a race was run, in short: "AMD EPYC, AVX512 with bfloat16", or the GPU's name."""
    if not race.get("device", "cpu").startswith("cpu"):
        return race["device"]
    name, _, kind = race["processor"].partition(", ")
    return f"{re.sub(r'[(]R[)]| CPU| Processor', '', name)}, {kind}"


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
    lines += table(titles, [[row[key] for key in keys] for row in claim_rows(out)])
    command = "python reproduce.py meta_lstm --scale full --mini_imagenet DIR"
    lines += ["", f"The miniImageNet rows need its images: `{command}`."]
    if others := other_rows(out):
        lines += ["", *table("what | documents | ours | command", others)]
    lines += ["", norm_table(out)]
    if on_vinyals := vinyals_table(out):
        lines += ["", on_vinyals]
    if differences := paired(out):
        rows = [[TITLES[name], f"{mean:+.2f} ± {half:.2f}"] for name, (mean, half) in differences.items()]
        lines += ["", "Differences to the long ProtoNet on the same test tasks (points, 95 % interval over tasks):", ""]
        lines += table("method | difference", rows)
    seconds = [read(file).get("train_seconds", 0) for part in PARTS for file in sorted((out / part).glob("*.json"))]
    lines += ["", f"All {len(seconds)} runs together trained for {sum(seconds) / 3600:.1f} hours."]
    for picture in sorted(out.glob("*.png")):
        if picture.stem not in ("glyphs", "tensorboard", "bayes_plates", "page"):
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
    if (file := out / "costs.json").exists() and (rows := read(file).get("rows")):
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

BLOCKS = {
    "front": front_table,
    "mann": mann_table,
    "mann_answers": mann_answers,
    "memories": memories_table,
    "sights": sights_table,
    "memorisation": memorisation_text,
    "protonet": lambda out: short_table(out, "ProtoNet"),
    "transfer": lambda out: short_table(out, "Fine-tuning"),
    "maml": lambda out: short_table(out, "First-order MAML", "Proto-MAML (first order)", "MAML", "ANIL", "MAML++"),
    "maml_norm": norm_table,
    "maml_inner_loop": inner_loop_text,
    "vinyals": vinyals_table,
    "meta_lstm": meta_lstm_table,
    "costs": costs_text,
    "features": features_text,
    "memorization": memorization_table,
    "bayes": bayes_tables,
    "mae": mae_table,
    "mae_lessons": mae_lessons,
    "mae_labels": few_labels_text,
    "mae_masks": masks_text,
    "mae_reconstruction": reconstructions_text,
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
    pictures.refuse_other_images(out, args.dataset)
    pictures.draw_everything(out)
    if out.resolve() == HERE / "results":
        pictures.draw_glyphs(out / "glyphs.png")
        pictures.draw_plates(out / "bayes_plates.png")
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
