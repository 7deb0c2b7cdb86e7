"""Measuring: `python -m bench NAME`.

python -m bench mann --num_classes 5    a hot path beside a plain reference; every NAME is listed in races.py
python -m bench growth --method maml    how a training step grows with N, K, Q, B and the image size
python -m bench ship RUN_DIR            the network that ships, and its threshold for "none of these"
"""

from __future__ import annotations

from fewshot.experiment import UserError, run_script

import sys
from importlib import import_module

from bench import races

ROOMS = ("growth", "ship")  # with flags of their own; every other name is a race


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return None
    if argv[0] in ROOMS:
        return import_module(f"bench.{argv[0]}").main(argv[1:])
    if argv[0] not in races.BENCHMARKS:
        names = ", ".join([*races.BENCHMARKS, *ROOMS])
        raise UserError(f"python -m bench {argv[0]} is unknown; use one of {names}")
    return races.main(argv)


if __name__ == "__main__":
    run_script(main)
