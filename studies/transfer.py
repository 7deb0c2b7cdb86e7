"""The recipes of transfer.py."""

from .ledger import Case, on_mnist

PULSE = "--train_steps 12 --finetune_steps 6 --eval_freq 6 --num_test_tasks 20 --width 16 --meta_batch_size 32"

CASES = [
    Case("default", "", "", "--train_steps 16000 --finetune_steps 6000", seeds=3, minutes=5),
    *on_mnist("transfer/default"),
]
