"""What can go wrong and what the user can mend; imports nothing of ours."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


class Diverged(Exception):
    """The loss is no longer a finite number."""
