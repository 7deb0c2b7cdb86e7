"""What the grader of each assignment was put to."""

from __future__ import annotations

from pathlib import Path

from studies.results import read_if, table


def proof(out: Path) -> str:
    """A row for each assignment, and their sums, from homework.json."""
    rows = []
    for name, proof in read_if(out / "homework.json").items():
        kinds = [case["kind"] for case in proof["cases"] if case["as_expected"]]
        rows.append([name, len(proof["points"]), kinds.count("mutant"), kinds.count("right")])
    rows += [["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])]] if rows else []
    titles = " | functions to write | mistakes, each found at its question alone "
    return table(titles + "| right answers written in other ways, unharmed", rows)
