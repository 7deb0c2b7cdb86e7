"""The recipes of sequences with late labels: a table beside the controller, and an LSTM to compare."""

from .ledger import Case

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 200 --num_test_tasks 200"

SEQUENCE = "--protocol sequence --num_shot 9 --hidden_dim 200 --shift 0.1 --jitter 0.1 --num_val_tasks 400"
# Its flags were those of hw1.py, which `was` keeps; where the script gets another name, it stands here.
SCRIPT = "hw1.py"

CASES = [
    *[Case(name, f"{flags} {rest}", "--train_steps 4000 --eval_freq 500", "--train_steps 100000 --eval_freq 1000",
           seeds=3, minutes=minutes, beyond=True, script=SCRIPT, was=f"hw1.py {flags_then} {rest}")
      for rest in ["--meta_batch_size 128 --learning_rate 3e-3"] for name, flags, flags_then, minutes in (
          ("external", "--memory external", "--memory external", 100),
          ("lstm", SEQUENCE, SEQUENCE, 60))],
    # Asked for more sights than they have learned.
    *[Case(f"{name}_at_K19", recipe := "--test --num_test_tasks 10000 --num_shot 19", seeds=3, minutes=5, beyond=True,
           start=f"external_memory/{name}", script=SCRIPT, was=f"hw1.py {recipe}") for name in ("external", "lstm")],
]  # fmt: skip
