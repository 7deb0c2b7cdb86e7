"""The fine-tuning baseline: the slides' 423-way figure, and few-shot tasks on the same features."""

from __future__ import annotations

from studies.ledger import Case, on_mnist
from studies.results import GREY, Digits, Row

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 12 --finetune_steps 6 --eval_freq 6 --num_test_tasks 20 --width 16 --meta_batch_size 32"

CASES = [
    Case("default", "", "", "--train_steps 16000 --finetune_steps 6000", seeds=3, minutes=5),
    *on_mnist("transfer/default"),
]

# ---------------------------------------------------------------------------------------- results

ROWS = [
    Row("Fine-tuning, 423-way", "default", "78.5", metric="finetuned_accuracy"),
    Row("Fine-tuning, 5-way 1-shot", "default", front=True, bar=("fine-tuning", GREY)),
]
DIGITS = [Digits("fine-tuning, a new head", GREY)]
