"""One file a method, with its recipes; and the ledger of their results (ledger.py, status.py, pulse.py, runner.py)."""
