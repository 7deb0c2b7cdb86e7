"""Across methods: the table of all accuracies, the front page's, the published split, MNIST's digits, the bars."""

from __future__ import annotations

from fewshot.experiment import mean_and_ci95

import statistics
from pathlib import Path

from studies.results import (
    Row,
    digits_of,
    figure_of,
    interval,
    load,
    load_all,
    minutes,
    new_figure,
    plain_command,
    processor,
    rooms,
    table,
    time_of,
    warmed_up,
    with_interval,
)

SHOTS = (1, 5, 10, 20)  # images of each of MNIST's digits
# On the published protocol: method, which figures its paper reports, the cases of a setting, what their transductive
# and non-transductive metrics are called, {(N, K): published}
ON_VINYALS = [
    ("ProtoNet", "non-transductive", "protonet/vinyals",
     ("test_accuracy_{N}way{K}shot_transductive", "test_accuracy_{N}way{K}shot"),
     {(5, 1): "98.8", (5, 5): "99.7", (20, 1): "96.0", (20, 5): "98.9"}),
    ("MAML", "transductive", "maml/vinyals_{N}way{K}shot", ("test_accuracy_transductive", "test_accuracy_support"),
     {(5, 1): "98.7", (5, 5): "99.9", (20, 1): "95.8", (20, 5): "98.9"}),
]  # fmt: skip


def listed(kind: str) -> list[tuple[str, tuple]]:
    """(room, entry) of every entry of the lists ROWS, or DIGITS, of all rooms."""
    return [(name, entry) for name, room in rooms().items() for entry in getattr(room, kind, ())]


def runs_of(out: Path, room: str, row: Row) -> list[dict]:
    """The runs of a row that have its figure; older ones may lack it."""
    return [run for run in load(out, f"{room}/{row.case}") if row.metric in run]


def name_of(what: str, runs: list[dict]) -> str:
    """`what` of a row, its method with "after a prototype warm-up" where its runs began as a prototypical network."""
    method, _, setting = what.partition(", ")
    return f"{method} after a prototype warm-up, {setting}" if runs and warmed_up(runs[0]) else what


def cells(out: Path, room: str, row: Row) -> dict[str, str]:
    """The cells of a row by their names; "not measured" where there is no result file."""
    runs = runs_of(out, room, row)
    found = {"what": name_of(row.what, runs), "documents": row.documents, "published": row.published}
    if not runs:
        return (
            found | {"ours": "not measured"} | dict.fromkeys(("over", "seeds", "minutes", "on", "time", "command"), "")
        )
    mean, half, over = interval(runs, row.metric)
    seeds = ", ".join(f"{100 * run[row.metric]:.{digits_of(half)}f}" for run in runs)
    found |= {"ours": with_interval(mean, half), "over": over, "seeds": seeds, "minutes": minutes(runs)}
    return found | {"on": processor(runs[0]), "time": time_of(runs), "command": plain_command(runs[0])}


def rows(out: Path, room: str) -> str:
    """The measured rows of a room, with the figures that its COLUMNS add, and the commands of seed 1."""
    module, lines, commands = rooms()[room], [], []
    extra = getattr(module, "COLUMNS", {})
    for row in module.ROWS:
        if runs := runs_of(out, room, row):
            cell = cells(out, room, row)
            more = [figure_of(runs, metric) for metric in extra.values()]
            keys = ("what", "documents", "published", "ours", "over", "seeds")
            lines.append([*(cell[key] for key in keys), *more, cell["time"]])
            commands.append(cell["command"])
    titles = ["test accuracy in % | documents | published | ours | ± over | each seed", *extra, "minutes"]
    return table(" | ".join(titles), lines, commands)


def everything(out: Path) -> str:
    """Every row of every room."""
    keys = ("what", "documents", "published", "ours", "over", "seeds", "minutes", "on", "command")
    lines = [[cells(out, room, row)[key] for key in keys] for room, row in listed("ROWS")]
    titles = "what | documents | published | ours | ± over | each seed | minutes | on | command of seed 1"
    return table(titles, lines)


def others(out: Path) -> str:
    """What the documents say in other figures than accuracies beside what we measured, of the rooms that tell it."""
    found = [line for room in rooms().values() if hasattr(room, "claims") for line in room.claims(out)]
    return table("what | documents | ours | command", found)


def front(out: Path) -> str:
    """The front page's rows."""
    found = [(room, cells(out, room, row)) for room, row in listed("ROWS") if row.front]
    keys = ("what", "published", "documents", "ours", "over")
    lines = [
        [*(cell[key] for key in keys), f"{cell['minutes']}, {cell['on']}", f"[{room}](docs/{room}.md)"]
        for room, cell in found
    ]
    return table("test accuracy in % | paper | documents | ours | ± over | minutes of training | page", lines)


def vinyals(out: Path) -> str:
    """ProtoNet and MAML on the published protocol, beside the published figures."""
    lines, commands = [], []
    for method, kind, case, keys, published in ON_VINYALS:
        for (N, K), theirs in published.items():
            if runs := load(out, case.format(N=N, K=K)):
                ours = [figure_of(runs, key.format(N=N, K=K)) for key in keys]
                what = name_of(f"{method}, {N}-way {K}-shot", runs)
                lines.append([what, f"{theirs} ({kind})", *ours, len(runs), time_of(runs)])
                commands.append(plain_command(runs[0]))
    titles = "test accuracy in % | published | ours, transductive | ours, not transductive | seeds | minutes"
    return table(titles, lines, commands)


def paired(out: Path) -> str:
    """The tasks' differences to the long ProtoNet in points, seeds averaged first, of whoever had the same tasks."""
    long = load(out, "protonet/long")
    # Results of an H200 are of as many other tasks (docs/reliability.md)
    same = lambda run: all(run[key] == long[0][key] for key in ("N", "K", "Q")) and run["device"] != "NVIDIA H200"
    of_tasks = lambda runs: [statistics.fmean(values) for values in zip(*(r["accuracies"] for r in runs), strict=True)]
    lines = []
    for room, row in listed("ROWS"):
        if long and row.bar and (runs := load(out, f"{room}/{row.case}")) and all(map(same, runs)):
            pairs = zip(of_tasks(runs), of_tasks(long), strict=False)  # some were asked the first 600 alone
            mean, half = mean_and_ci95([mine - theirs for mine, theirs in pairs])
            lines.append([row.bar[0], f"{100 * mean:+.2f} ± {100 * half:.2f}"])
    return table("method | difference in points", lines)


def hours(out: Path) -> str:
    """How many runs there are, and how long all of them trained."""
    runs = [run for room in rooms() for run in load_all(out, room)]
    seconds = [run["train_seconds"] for run in runs if "train_seconds" in run]  # those that only test have none
    return table("runs that trained | hours together", [[len(seconds), f"{sum(seconds) / 3600:.1f}"]])


def mnist(out: Path) -> str:
    """Accuracy on MNIST's digits of networks that learned from characters."""
    lines = []
    for room, digits in listed("DIGITS"):
        found = [load(out, f"{room}/{digits.prefix}_{K}shot") for K in SHOTS]
        if measured := [runs for runs in found if runs]:
            lines.append([digits.what, *(figure_of(runs, digits.metric) for runs in found), len(measured[0])])
    return table(" | ".join(["10-way, %", *(f"{K}-shot" for K in SHOTS), "seeds"]), lines)


def pictures(out: Path):
    """Validation and test accuracy of all methods, the best at the right; accuracy on MNIST by shots."""
    found = [(row, load(out, f"{room}/{row.case}")) for room, row in listed("ROWS") if row.bar]
    if found := sorted(((row, runs) for row, runs in found if runs), key=lambda pair: interval(pair[1])[0]):
        yield "comparison", bars(found)
    if any(load(out, f"{room}/{digits.prefix}_{K}shot") for room, digits in listed("DIGITS") for K in SHOTS):
        yield "mnist", digits_figure(out)


def bars(found: list[tuple[Row, list[dict]]]):
    figure, ((ax,),) = new_figure(1, 1, (9, 4))
    for i, (row, runs) in enumerate(found):
        mean, half, _ = interval(runs)
        ax.bar(i + 0.2, mean, 0.38, color=row.bar[1], yerr=half, capsize=3)
        ax.text(i + 0.2, mean + half + 0.3, f"{mean:.{digits_of(half)}f}", ha="center", fontsize=9)
        on_val = [run["val_accuracy"] for run in runs if run.get("val_accuracy")]
        if on_val:
            ax.bar(i - 0.2, 100 * statistics.fmean(on_val), 0.38, color=row.bar[1], alpha=0.4)
    ax.set_ylim(max(0, interval(found[0][1])[0] - 8), 100.9)
    titles = [row.bar[0] + " *" * warmed_up(runs[0]) for row, runs in found]
    ax.set_xticks(range(len(found)), [title.replace(" ", "\n", 1) for title in titles], fontsize=9)
    ax.set(title="Omniglot, 5-way 1-shot, new characters: validation (pale) and test", ylabel="accuracy (%)")
    if any("*" in title for title in titles):
        ax.set_xlabel("* after a prototype warm-up", loc="right", fontsize=9)
    return figure


def digits_figure(out: Path):
    """Accuracy of networks of characters on digits, by shots."""
    figure, ((ax,),) = new_figure(1, 1, (5, 4))
    everyone = listed("DIGITS")
    for k, (room, digits) in enumerate(everyone):
        found = {K: runs for K in SHOTS if (runs := load(out, f"{room}/{digits.prefix}_{K}shot"))}
        points = [
            (K * 1.02 ** (k - len(everyone) / 2), *interval(runs, digits.metric)[:2]) for K, runs in found.items()
        ]
        if points:  # side by side, so that the bars can be read
            shots, means, halves = zip(*points, strict=True)
            style = {"marker": "o", "markersize": 4, "capsize": 2, "label": digits.what}
            ax.errorbar(shots, means, halves, color=digits.colour, **style)
    ax.set_xscale("log")
    ax.set_xticks(SHOTS, map(str, SHOTS))
    ax.minorticks_off()
    ax.set(title="MNIST, 10 classes", xlabel="images of each class", ylabel="accuracy (%)")
    ax.legend(frameon=False, fontsize=8)
    return figure
