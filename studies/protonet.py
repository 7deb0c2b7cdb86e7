"""The recipes of protonet.py; the first fifteen thousand steps of others start from one of them."""

from .ledger import Case, on_mnist

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
