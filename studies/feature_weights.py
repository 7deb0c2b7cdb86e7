"""The recipe of feature_weights.py, which writes its own files."""

from .ledger import Case

PULSE = "--smoke"
OWN_OUTPUT = True

CASES = [Case("features", "--part all", minutes=2)]
