"""MAML and its relatives: accuracy, and what the inner loop does to answers and layers."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from studies.ledger import Case, on_mnist
from studies.results import (
    BLUE,
    GREEN,
    PINK,
    RED,
    SKY,
    VINYALS,
    YELLOW,
    Digits,
    Row,
    figure_of,
    load,
    mean,
    new_figure,
    table,
    warmed_up,
)

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 10 --warmup_steps 5 --eval_freq 5 --num_val_tasks 4 --num_test_tasks 4 --width 16"

FULL = "--train_steps 60000 --eval_freq 1000"
SCRATCH = "--warmup_steps 0 --encoder strided"  # by the inner loop from the first step
MUON = "--meta_batch_size 16 --optimizer muon --learning_rate 0.05"
PROTO = "--head proto --first_order --inner_lr 0.01"

CASES = [
    Case("fomaml", "--first_order --zero_head", "", FULL, seeds=3, minutes=7),
    Case("protomaml", PROTO, "", FULL, seeds=3, minutes=7),
    Case("maml", "", "", FULL, seeds=3, minutes=8),
    Case("anil", "--freeze_body", "", FULL, seeds=3, minutes=7),
    *[Case(f"{N}way{K}shot", f"--num_classes {N} --num_shot {K}", "--num_val_tasks 100", FULL, seeds=3,
           minutes=minutes, beyond=True)
      for N, K, minutes in ((5, 5, 10), (10, 1, 12), (20, 1, 20), (20, 5, 25))],
    Case("20way5shot_muon", "--num_classes 20 --num_shot 5 --optimizer muon --learning_rate 0.05",
         "--num_val_tasks 100 --train_steps 4200 --eval_freq 2100", FULL, seeds=3, minutes=40, beyond=True),
    # From ProtoNet's network; at 5 shots by two inner steps at half the head's usual rate, N / sqrt(64) (docs/log.md).
    *[Case(f"vinyals_{N}way{K}shot",
           f"--split vinyals --num_classes {N} --num_shot {K} --warmup_steps 0 --learning_rate 1e-3{inner}",
           f"--num_val_tasks 100 --train_steps {steps} --eval_freq {steps // 2}", FULL, seeds=3, minutes=minutes,
           beyond=True, start="protonet/vinyals")
      for N, K, steps, minutes, inner in (
          (5, 1, 200, 3, ""),
          (5, 5, 200, 8, " --inner_steps 2 --head_lr 0.31"),
          (20, 1, 100, 8, ""),
          (20, 5, 60, 15, " --inner_steps 2 --head_lr 1.25"))],
    *[Case(f"{name}_scratch", recipe, f"--train_steps {steps} --eval_freq 500", FULL, seeds=3, minutes=minutes,
           beyond=True)
      for name, steps, minutes, recipe in (
          ("maml", 6000, 50, f"{SCRATCH} {MUON}"),
          ("fomaml", 8000, 50, f"{SCRATCH} {MUON} --first_order --zero_head"),
          ("mamlpp", 3500, 50, f"{SCRATCH} --meta_batch_size 16 --learn_inner_lrs --multi_step_loss --per_step_norm "
                               "--optimizer muon --learning_rate 0.05 --inner_steps 2"),
          ("protomaml", 4000, 45, f"{PROTO} --optimizer muon --learning_rate 0.05 --warmup_steps 0 --encoder conv4"))],
    Case("plain", "--features plain", "", FULL, seeds=3, minutes=8, beyond=True),
    # The paper's own 5-way recipe, with as many queries as the course asks.
    Case("paper",
         f"{SCRATCH} --features plain --head_lr 0.4 --meta_batch_size 32 --train_query 15 --schedule constant "
         "--learning_rate 1e-3", *["--train_steps 60000 --eval_freq 2000"] * 2, minutes=600, beyond=True),
    Case("fixed_labels", "--num_classes 20 --fixed_labels --warmup_steps 0 --features plain", "--num_val_tasks 100",
         minutes=20, beyond=True),
    *on_mnist("maml/10way1shot"),
]  # fmt: skip

# ---------------------------------------------------------------------------------------- results

AT_ONCE = "5-way 1-shot, from scratch"
ROWS = [
    Row("First-order MAML, 5-way 1-shot", "fomaml", "81.5", "98.3" + VINYALS, front=True,
        bar=("first-order MAML", YELLOW)),
    Row("Proto-MAML (first order), 5-way 1-shot", "protomaml", "89.2", front=True, bar=("Proto-MAML (f.o.)", GREEN)),
    Row("MAML, 5-way 1-shot", "maml", "-", "98.7" + VINYALS, front=True, bar=("MAML", RED)),
    Row("MAML, 5-way 1-shot, plain features", "plain", "-", "98.7" + VINYALS),
    Row("MAML, 5-way 5-shot", "5way5shot", "-", "99.9" + VINYALS),
    Row("MAML, 20-way 1-shot", "20way1shot", "-", "95.8" + VINYALS),
    Row("MAML, 20-way 5-shot", "20way5shot", "-", "98.9" + VINYALS),
    Row("MAML, 20-way 5-shot, by Muon", "20way5shot_muon", "-", "98.9" + VINYALS),
    Row("ANIL, 5-way 1-shot", "anil", front=True, bar=("ANIL", SKY)),
    Row(f"First-order MAML, {AT_ONCE}", "fomaml_scratch", "81.5", "98.3" + VINYALS),
    Row(f"Proto-MAML (first order), {AT_ONCE}", "protomaml_scratch", "89.2"),
    Row(f"MAML, {AT_ONCE}", "maml_scratch", "-", "98.7" + VINYALS),
    Row(f"MAML++, {AT_ONCE}", "mamlpp_scratch", "-", "99.47" + VINYALS),
]  # fmt: skip
COLUMNS = {"by the support set's batch norm": "test_accuracy_support"}
DIGITS = [
    Digits("MAML", RED, "test_accuracy_support"),
    Digits("MAML, transductive", SKY, "test_accuracy_transductive"),
]
INNER_LOOPS = {  # cases whose inner loops are drawn; a broken line: from scratch
    "maml": ("MAML", RED, "-"),
    "10way1shot": ("10-way MAML", BLUE, "-"),
    "fomaml": ("first-order MAML", YELLOW, "-"),
    "protomaml": ("Proto-MAML (f.o.)", GREEN, "-"),
    "anil": ("ANIL", SKY, "-"),
    "maml_scratch": ("MAML", RED, "--"),
    "fomaml_scratch": ("first-order MAML", YELLOW, "--"),
    "protomaml_scratch": ("Proto-MAML (f.o.)", GREEN, "--"),
    "mamlpp_scratch": ("MAML++", PINK, "--"),
}


def inner_loops(out: Path) -> dict[str, dict[str, float | None]]:
    """{case: {layer: its relative update in the inner loop, mean over tasks and seeds}} of the cases that tell it."""
    found = {}
    for case in INNER_LOOPS:
        runs = [run for run in load(out, f"maml/{case}") if "update_norm_per_layer" in run]
        moved = [run["update_norm_per_layer"] for run in runs]
        if moved:
            known = {layer: [m[layer] for m in moved if m[layer] is not None] for layer in moved[0]}
            found[case] = {layer: statistics.fmean(some) if some else None for layer, some in known.items()}
    return found


def inner_loop(out: Path) -> str:
    """Accuracy before and after the inner loop, and how far it moves each layer."""
    rows, layers = [], []
    for case, moved in inner_loops(out).items():
        runs, layers = load(out, f"maml/{case}"), list(moved)
        title = re.sub("^f", "F", INNER_LOOPS[case][0])
        title += " after a prototype warm-up" if warmed_up(runs[0]) else " from scratch"
        shares = ["-" if value is None else f"{value:.1e}" if value else "0" for value in moved.values()]
        rows.append([title, mean(runs, "accuracy_before_adaptation"), figure_of(runs), *shares])
    return table(" | ".join(["1-shot, 5-way unless said | before, % | after, %", *layers]), rows)


def pictures(out: Path):
    """Accuracy before and after each inner step; how far the inner loop moves each layer."""
    adapted = {row: runs for row in ROWS if row.bar and (runs := load(out, f"maml/{row.case}"))}
    if adapted:
        figure, (axes,) = new_figure(1, 2, (9, 3.4))
        for row, runs in adapted.items():
            for ax, what in zip(axes, ("support", "query"), strict=True):
                steps = range(len(runs[0][f"{what}_accuracy_per_step"]))
                values = [100 * statistics.fmean(run[f"{what}_accuracy_per_step"][i] for run in runs) for i in steps]
                ax.plot(steps, values, "o-", color=row.bar[1], label=row.bar[0] + " *" * warmed_up(runs[0]))
                ax.set(title=f"{what} set", xlabel="inner steps on the support set", ylabel="test accuracy (%)")
                ax.set_xticks(list(steps))
        axes[0].axhline(20, color="0.5", linestyle=":", label="guessing")
        axes[1].axhline(20, color="0.5", linestyle=":")
        axes[0].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.08))  # clear of the line
        if any(warmed_up(runs[0]) for runs in adapted.values()):
            figure.supxlabel("* after a prototype warm-up", fontsize=9, x=1, ha="right")
        yield "adaptation", figure
    if found := inner_loops(out):
        yield "inner_loop", inner_loop_figure(found)


def inner_loop_figure(found: dict[str, dict[str, float | None]]):
    """How far the inner loop moves each layer: one line for each case that tells it."""
    figure, ((ax,),) = new_figure(1, 1, (7, 3.6))
    for case, moved in found.items():
        title, colour, line = INNER_LOOPS[case]
        some = {layer: value for layer, value in moved.items() if value}
        still = [layer for layer, value in moved.items() if value == 0]
        label = title + (", from scratch" if line == "--" else " *") + (" (body: 0)" if still else "")
        places = [list(moved).index(layer) for layer in some]
        ax.plot(places, list(some.values()), f"o{line}", color=colour, label=label)
    ax.set_yscale("log")
    layers = list(next(iter(found.values())))
    ax.set_xticks(range(len(layers)), layers)
    ax.set_xlim(-0.3, len(layers) - 0.7)
    ax.set(title="How far the inner loop moves each layer", ylabel=r"$\|\theta' - \theta\| / \|\theta\|$")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    if any(INNER_LOOPS[case][2] == "-" for case in found):
        figure.supxlabel("* after a prototype warm-up", fontsize=9, x=1, ha="right")
    return figure
