"""The recipes of the learner that looks back, a MANN with attention as its memory."""

from .ledger import Case, on_mnist

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 200 --num_test_tasks 200"

# How the learner is called now, and how it was called when the first results were measured.
SCRIPT, LEARNER = "hw1.py", "--memory attention "
WAS = "hw1.py --memory attention "

CASES = [
    *[Case(name, f"{LEARNER}{recipe}", f"--train_steps {steps} --eval_freq 500",
           "--train_steps 40000 --eval_freq 2000", seeds=3, minutes=minutes, beyond=True, script=SCRIPT,
           was=f"{WAS}{recipe}")
      for name, recipe, steps, minutes in (
          ("K1N5", "--num_shot 1 --num_classes 5", 8000, 30),
          ("K5N5", "--num_shot 5 --num_classes 5 --shared_classes 20", 12000, 60),
          ("K1N20", "--num_shot 1 --num_classes 20", 12000, 60))],
    # Asked for more classes, shots and sights than it has learned.
    *[Case(f"K1N5_at_K{K}N{N}", recipe := f"--test --num_test_tasks 10000 --num_shot {K} --num_classes {N}", seeds=3,
           minutes=2, beyond=True, start="attention/K1N5", script=SCRIPT, was=f"hw1.py {recipe}")
      for K, N in ((5, 5), (1, 20), (5, 20))],
    *[case._replace(script=SCRIPT, was=f"hw1.py {case.recipe}") for case in on_mnist("attention/K1N5")],
]  # fmt: skip
