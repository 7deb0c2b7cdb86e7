"""The recipes of memorization.py."""

from .ledger import Case

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
