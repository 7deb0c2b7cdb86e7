"""The recipes of bayes.py."""

from .ledger import Case

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 20 --num_test_tasks 20 --test_samples 8"
OF_NUMBERS = True  # its script knows one precision

CASES = [
    Case("phase", "", seeds=3, minutes=3, beyond=True),
    Case("amplitude", "--metadata amplitude", seeds=3, minutes=3, beyond=True),
    Case("phase_without_phi1", "--drop_phi1", seeds=3, minutes=3, beyond=True),
    Case("omniglot", "--world omniglot", seeds=3, minutes=8, beyond=True),
]
