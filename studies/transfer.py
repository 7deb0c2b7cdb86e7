"""The fine-tuning baseline: the slides' 423-way figure, and few-shot tasks on the same features."""

from studies.results import GREY, Digits, Row

ROWS = [
    Row("Fine-tuning, 423-way", "default", "78.5", metric="finetuned_accuracy"),
    Row("Fine-tuning, 5-way 1-shot", "default", front=True, bar=("fine-tuning", GREY)),
]
DIGITS = [Digits("fine-tuning, a new head", GREY)]
