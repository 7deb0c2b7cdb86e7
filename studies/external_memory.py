"""A table beside the controller, and the LSTM, on the paper's sequences: accuracy at each sight of a character."""

from __future__ import annotations

import statistics
from pathlib import Path

from studies.ledger import Case
from studies.results import (
    GREY,
    PINK,
    interval_of,
    load,
    minutes,
    new_figure,
    plain_command,
    processor,
    table,
    tasks_a_step,
    with_interval,
)

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 200 --num_test_tasks 200"

# The flags of the LSTM when its first results were measured, by hw1.py.
SEQUENCE = "--protocol sequence --num_shot 9 --hidden_dim 200 --shift 0.1 --jitter 0.1 --num_val_tasks 400"

CASES = [
    *[Case(name, f"{flags}{rest}", "--train_steps 4000 --eval_freq 500", "--train_steps 100000 --eval_freq 1000",
           seeds=3, minutes=minutes, beyond=True, was=f"hw1.py {flags_then} {rest}")
      for rest in ["--meta_batch_size 128 --learning_rate 3e-3"] for name, flags, flags_then, minutes in (
          ("external", "", "--memory external", 100),
          ("lstm", "--no_table ", SEQUENCE, 60))],
    # Asked for more sights than they have learned.
    *[Case(f"{name}_at_K19", recipe := "--test --num_test_tasks 10000 --num_shot 19", seeds=3, minutes=5, beyond=True,
           start=f"external_memory/{name}", was=f"hw1.py {recipe}") for name in ("external", "lstm")],
]  # fmt: skip

# ---------------------------------------------------------------------------------------- results

SIGHTS = (1, 2, 3, 5, 10)
BY_SIGHT = [  # of a character in a sequence of 50 images (Santoro et al. 2016, table 1, 5 classes, one-hot labels)
    ("LSTM", "lstm", (24.4, 49.5, 55.3, 63.6, 62.5)),
    ("external memory", "external", (36.4, 82.8, 91.0, 94.9, 98.1)),
]


def sights(out: Path) -> str:
    """Accuracy at the first, second, ... sight of a character beside the paper's."""
    rows, commands = [], []
    for what, case, theirs in BY_SIGHT:
        if runs := load(out, f"external_memory/{case}"):
            ours = []
            for i in (sight - 1 for sight in SIGHTS):
                at = [{"a": run["accuracy_by_sight"][i], "a_ci95": run["ci95_by_sight"][i]} for run in runs]
                ours.append(with_interval(*(100 * value for value in interval_of(at, "a"))))
            steps = f"{runs[0]['steps']:,} of {tasks_a_step(runs[0])} sequences"
            rows += [[f"{what}, the paper", *theirs, "", "100,000 episodes", ""]]
            rows += [[f"{what}, ours", *ours, len(runs), steps, f"{minutes(runs)} ({processor(runs[0])})"]]
            commands.append(plain_command(runs[0]))
    return table(" | ".join(["sight", *map(str, SIGHTS), "seeds", "steps", "minutes"]), rows, commands)


def beyond(out: Path) -> str:
    """The memories of the sequences asked for more sights than they have learned."""
    rows = []
    for what, case, _ in BY_SIGHT:
        if runs := load(out, f"external_memory/{case}_at_K19"):
            own = load(out, f"external_memory/{case}")
            places = [(own, 2), (own, 10), (runs, 2), (runs, 10), (runs, 20)]
            curves = [[run["accuracy_by_sight"][i - 1] for run in at] for at, i in places]
            rows.append([what, *(f"{100 * statistics.fmean(values):.1f}" if values else "-" for values in curves)])
    return table("% | 2nd of 10 sights, as learned | 10th of 10 | 2nd of 20 | 10th of 20 | 20th of 20", rows)


def pictures(out: Path):
    """Accuracy at each sight of a character in a sequence, and what the paper has."""
    found = [(what, load(out, f"external_memory/{case}"), theirs) for what, case, theirs in BY_SIGHT]
    if not any(runs for _, runs, _ in found):
        return
    figure, ((ax,),) = new_figure(1, 1, (6, 3.8))
    for (what, runs, theirs), colour in zip(found, (GREY, PINK), strict=True):
        ax.plot(SIGHTS, theirs, ":o", color=colour, mfc="white", label=f"{what}, the paper")
        if runs:
            curves = [run["accuracy_by_sight"] for run in runs]
            means = [100 * statistics.fmean(values) for values in zip(*curves, strict=True)]
            ax.plot(range(1, len(means) + 1), means, "-o", color=colour, label=f"{what}, ours")
    ax.axhline(20, color="black", lw=0.8, ls="--", label="guessing")
    ax.set(xlabel="sight of a character", ylabel="test accuracy (%)", ylim=(0, 101), xticks=range(1, 11))
    ax.legend(fontsize=8)
    yield "sights", figure
