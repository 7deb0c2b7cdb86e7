"""A learner that looks back at every support item: its accuracy, its cost beside other memories, larger tasks."""

from __future__ import annotations

from pathlib import Path

from studies.ledger import Case, on_mnist
from studies.results import PINK, Digits, Row, figure_of, load, read_if, table, time_of

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 200 --num_test_tasks 200"

WAS = "hw1.py --memory attention "  # how it was called when the first results were measured

CASES = [
    *[Case(name, recipe, f"--train_steps {steps} --eval_freq 500",
           "--train_steps 40000 --eval_freq 2000", seeds=3, minutes=minutes, beyond=True,
           was=f"{WAS}{recipe}")
      for name, recipe, steps, minutes in (
          ("K1N5", "--num_shot 1 --num_classes 5", 8000, 30),
          ("K5N5", "--num_shot 5 --num_classes 5 --shared_classes 20", 12000, 60),
          ("K1N20", "--num_shot 1 --num_classes 20", 12000, 60))],
    # Asked for more classes, shots and sights than it has learned.
    *[Case(f"K1N5_at_K{K}N{N}", recipe := f"--test --num_test_tasks 10000 --num_shot {K} --num_classes {N}", seeds=3,
           minutes=2, beyond=True, start="attention/K1N5", was=f"hw1.py {recipe}")
      for K, N in ((5, 5), (1, 20), (5, 20))],
    *[case._replace(was=f"hw1.py {case.recipe}") for case in on_mnist("attention/K1N5")],
]  # fmt: skip

# ---------------------------------------------------------------------------------------- results

ALONE = "test_accuracy_alone"
SNAIL = "(SNAIL, Vinyals' split)"
ROWS = [
    Row("Attention, 5-way 1-shot", "K1N5", "-", f"99.07 {SNAIL}", ALONE, front=True),
    Row("Attention, 5-way 5-shot", "K5N5", "-", f"99.78 {SNAIL}", ALONE),
    Row("Attention, 20-way 1-shot", "K1N20", "-", f"97.64 {SNAIL}", ALONE),
    Row("Attention, 5-way 5-shot, learned with one shot", "K1N5_at_K5N5", "-", f"99.78 {SNAIL}", ALONE),
]
DIGITS = [Digits("attention, learned with 5 classes", PINK, ALONE)]
MEMORIES = {  # --memory: its idea, what a task of K N images costs, how it answers queries asked alone, its case
    "lstm": ("two LSTM layers; all of the support set must fit into their state",
             "time K N, one item after another; the state does not grow",
             "asked one by one from the state that the support set left", "hw1/conv_K1N5"),
    "attention": ("nothing is compressed: every query looks back at every support item",
                  "time and memory (K N)², all items at once",
                  "in the same pass: queries do not see each other", "attention/K1N5"),
    "external": ("an LSTM with a table; writes over the least used rows, reads by likeness",
                 "time K N rows, one item after another; the table does not grow", "as the LSTM", "external_memory/-"),
}  # fmt: skip


def memories(out: Path) -> str:
    """The three memories side by side: idea, cost of a step as it was raced, accuracy on 5-way 1-shot."""
    races = [r for r in read_if(out / "speed.json") if r["title"].startswith("mann,") and step_of(r, "attention")]
    race = next((race for race in races if ", N 5," in race["title"]), {})
    rows = []
    for memory, (idea, cost, asked, case) in MEMORIES.items():
        runs = load(out, case)
        figures = [figure_of(runs), figure_of(runs, ALONE), asked]
        size, time = (f"{runs[0]['parameters']:,}", time_of(runs)) if runs else ("", "")
        rows.append([f"`{memory}`", idea, cost, step_of(race, memory), *figures, size, time])
    titles = "memory | idea | what a task of K N images costs | a training step | 5-way 1-shot, together | alone "
    return table(f"{titles}| queries alone | parameters | minutes", rows)


def step_of(race: dict, memory: str) -> str:
    """The cost of a step with a memory, "4.1 ms, 35 MB"; "" where the race did not have it."""
    cell = race.get(f"{memory}, 64 features an image")
    kept = race.get("megabytes_kept", {}).get(memory)
    return (f"{cell['ms']:.1f} ms" + (f", {kept:.0f} MB" if kept else "")) if cell else ""


def beyond(out: Path) -> str:
    """Attention asked for more classes and shots than it has learned, beside attention that learned such tasks."""
    rows = []
    for K, N in ((5, 5), (1, 20), (5, 20)):
        other, own = load(out, f"attention/K1N5_at_K{K}N{N}"), load(out, f"attention/K{K}N{N}")
        if other:
            rows.append([f"{N}-way {K}-shot", figure_of(other, ALONE), figure_of(own, ALONE, "-")])
    return table("attention, % | learned with 5-way 1-shot tasks | learned with such tasks", rows)
