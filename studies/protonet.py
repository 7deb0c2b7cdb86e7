"""Prototypical networks: accuracy at the four usual N and K, within alphabets, and one embedded task."""

from __future__ import annotations

from pathlib import Path

from studies.ledger import Case, on_mnist
from studies.results import BLUE, GREEN, PINK, RED, VINYALS, YELLOW, Digits, Row, load, new_figure

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 8 --eval_freq 4 --num_val_tasks 20 --num_test_tasks 20 --width 16 --views 2"

TASKS = "--num_test_tasks 2000"
LAKE = "--split lake --num_classes 20 --within_alphabet"
RESIDUAL = "--encoder residual --image_size 32"

CASES = [
    Case("default", "", TASKS, TASKS, seeds=3, minutes=2),
    Case("long", "", f"{TASKS} --train_steps 15000 --eval_freq 1500",
         f"{TASKS} --train_steps 60000 --eval_freq 2000", seeds=3, minutes=10),
    Case("residual", RESIDUAL, f"{TASKS} --train_steps 8000 --eval_freq 1000",
         f"{TASKS} --train_steps 30000 --eval_freq 2000", seeds=3, minutes=15),
    Case("lake", f"{LAKE} {RESIDUAL} --jitter 0.2 --shift 0.15 --views 32",
         f"{TASKS} --train_steps 10000 --eval_freq 1000", f"{TASKS} --train_steps 30000 --eval_freq 2000", seeds=3,
         minutes=20, beyond=True),
    # The network that ships (pretrained/): other people's pens and sizes, each picture read once as predict.py does.
    Case("pretrained", "--width 48 --jitter 0.2 --shift 0.15 --views 1", "--train_steps 800 --eval_freq 400",
         "--train_steps 15000 --eval_freq 1500", minutes=2),
    # All N and K of the published split are tested with this network, from which MAML goes on.
    Case("vinyals", "--split vinyals", f"{TASKS} --train_steps 15000 --eval_freq 1500",
         f"{TASKS} --train_steps 60000 --eval_freq 2000", seeds=3, minutes=20, beyond=True),
    *on_mnist("protonet/default"),
]  # fmt: skip

# ---------------------------------------------------------------------------------------- results

USUAL = {"5-way 1-shot": "98.8", "5-way 5-shot": "99.7", "20-way 1-shot": "96.0", "20-way 5-shot": "98.9"}
of = lambda setting: f"test_accuracy_{setting.replace('-way ', 'way').replace('-shot', 'shot')}"
ROWS = [
    Row("ProtoNet, 5-way 1-shot, default", "default", "98.8", "98.8" + VINYALS, front=True, bar=("ProtoNet", BLUE)),
    *(
        Row(f"ProtoNet, {setting}, long", "long", "98.8" if theirs == "98.8" else "-", theirs + VINYALS, of(setting))
        for setting, theirs in USUAL.items()
    ),
    *(Row(f"ProtoNet, {setting}, residual", "residual", metric=of(setting)) for setting in USUAL),
    Row("ProtoNet, 20-way 1-shot in one alphabet, residual", "lake"),
    Row("ProtoNet, the same, of one drawer", "lake", metric="test_accuracy_one_drawer"),
    Row(
        "ProtoNet, Lake's 400 official trials, residual",
        "lake",
        published="95.5 (people), 96.7 (BPL), 98.5 (ARC)",
        metric="test_accuracy_lake_runs",
    ),
]
DIGITS = [Digits("ProtoNet", BLUE)]


def pictures(out: Path):
    """Accuracy while ProtoNet trains, and one embedded test task."""
    runs = [found[0] for name in ("default", "long") if (found := load(out, f"protonet/{name}"))]
    if not runs or "curves" not in runs[0]:
        return
    figure, ((left, right),) = new_figure(1, 2, (10, 4))
    for run, colour in zip(runs, (BLUE, RED), strict=False):
        for tag, style in (("Accuracy/val", ":"), ("Accuracy/test", "-")):
            steps, values = zip(*run["curves"][tag], strict=True)
            label = f"{run['steps']:,} steps, {tag.split('/')[1]}"
            left.plot(steps, [100 * v for v in values], style, color=colour, label=label)
    left.legend(frameon=False, fontsize=9)
    left.set(title="5-way 1-shot, one view", xlabel="training step", ylabel="accuracy (%)")
    if episode := runs[-1].get("episode"):
        for c, colour in enumerate((BLUE, RED, GREEN, PINK, YELLOW)):
            mine = [point for point, label in zip(episode["query"], episode["labels"], strict=True) if label == c]
            right.plot(*zip(*mine, strict=True), ".", color=colour)
            right.plot(*episode["support"][c], "*", color=colour, markersize=16, markeredgecolor="black")
    right.set(
        title="a test task: prototypes (stars) and queries",
        xlabel="first principal component",
        ylabel="second principal component",
    )
    right.set_aspect("equal", adjustable="datalim")
    yield "protonet", figure
