"""When meta-learning memorises: every task, learner and regulariser with three kinds of support sets."""

from __future__ import annotations

from pathlib import Path

from studies.ledger import Case
from studies.results import BLUE, GREY, RED, interval_of, load_all, new_figure, processor, table

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 20 --num_test_tasks 20"
OF_NUMBERS = True  # its script knows one precision

CASES = [
    *[Case(f"{task}_{learner}_{regulariser}", f"--task {task} --learner {learner} --regulariser {regulariser}",
           seeds=3, minutes=2, beyond=True)
      for task in ("sinusoid", "basis", "diseased", "grasping") for learner in ("maml", "blackbox")
      for regulariser in ("none", "weights", "activations")],
    *[Case(f"characters_maml_{regulariser}", f"--task characters --regulariser {regulariser}", minutes=12, beyond=True)
      for regulariser in ("none", "weights", "activations")],
]  # fmt: skip

# ---------------------------------------------------------------------------------------- results

TASKS = ("basis", "diseased", "grasping", "sinusoid", "characters")
LEARNERS = {"maml": "MAML", "blackbox": "black box"}
REGULARISERS = ("none", "activations", "weights")
CONDITIONS = {"own": "own support set", "emptied": "emptied", "other": "another task's"}


def figures(out: Path) -> str:
    """A row for each task, learner and regulariser; accuracies in per cent, squared errors as they are."""
    results, rows = load_all(out, "memorization"), []
    for task in TASKS:
        for learner in LEARNERS:
            for regulariser in REGULARISERS:
                if runs := of(results, task, learner, regulariser):
                    scale, form = (
                        (100, "{:.1f} ± {:.1f}") if runs[0]["figure"] == "accuracy" else (1, "{:.3f} ± {:.3f}")
                    )
                    keys = [f"{part}_{condition}" for part in ("train", "test") for condition in CONDITIONS]
                    pairs = [(scale * value for value in interval_of(runs, key)) for key in keys]
                    cells = [form.format(*pair) for pair in pairs]
                    seconds = " to ".join(
                        dict.fromkeys(f"{f(r['train_seconds'] for r in runs):.0f}" for f in (min, max))
                    )
                    rows.append([task, learner, regulariser, len(runs), *cells, f"{seconds} ({processor(runs[0])})"])
    titles = "task | learner | regulariser | seeds | train, own | train, emptied | train, other "
    return table(titles + "| test, own | test, emptied | test, other | seconds", rows)


def of(results: list[dict], task: str, learner: str, regulariser: str) -> list[dict]:
    return [r for r in results if (r["task"], r["learner"], r["regulariser"]) == (task, learner, regulariser)]


def pictures(out: Path):
    """A panel for each task and learner: figures with the own, no, and another task's support set."""
    results = load_all(out, "memorization")
    tasks = [task for task in TASKS if any(run["task"] == task for run in results)]
    if not tasks:
        return
    figure, axes = new_figure(2, len(tasks), (max(5, 3 * len(tasks)), 5.2))
    for row, learner in zip(axes, LEARNERS, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            for i, regulariser in enumerate(REGULARISERS):
                runs = of(results, task, learner, regulariser)
                for j, (condition, colour) in enumerate(zip(CONDITIONS, (BLUE, GREY, RED), strict=True)):
                    for part, shade, aside in (("train", 0.4, -0.06), ("test", 1.0, 0.06)):
                        if runs:
                            mean, half = interval_of(runs, f"{part}_{condition}")
                            place = i + 0.26 * (j - 1) + aside
                            ax.errorbar(place, mean, half, fmt="o", ms=5, color=colour, alpha=shade)
            ax.set_xticks(range(3), ["plain", "activations", "weights"], fontsize=8)
            ax.set_xlim(-0.6, 2.6)
            ax.set_visible(bool(ax.containers))
            kind = next(run["figure"] for run in results if run["task"] == task)
            ax.set_title(f"{task}: {kind}", fontsize=9)
            if kind == "accuracy":
                ax.set_ylim(0, 1.03)
            else:
                ax.set_yscale("log")
        row[0].set_ylabel(LEARNERS[learner])
    handles = [axes[0, 0].plot([], [], "o", color=colour)[0] for colour in (BLUE, GREY, RED)]
    figure.legend(handles, CONDITIONS.values(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("regulariser; pale: training tasks", fontsize=9, color="0.4")
    yield "memorization", figure
