"""The recipe of profile_costs.py, which writes its own files."""

from .ledger import Case

PULSE = "--smoke"
OWN_OUTPUT = True

CASES = [Case("costs", "--sweep all --engine auto", minutes=5)]
