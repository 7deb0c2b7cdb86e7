"""What was counted: kills, bad values, memory, faults that people met in the field."""

from __future__ import annotations

from pathlib import Path

from studies.results import read_if, table

ROOMS = {"bench": ("races", "growth"), "studies": ("report",)}  # scripts behind the doors


def faults(out: Path) -> str:
    """What the fault tests counted of each script, from faults.json."""
    found, rows = read_if(out / "faults.json"), []
    for script, cases in found.get("flag_cases", {}).items():
        kills, memory, two = (found[key].get(script) for key in ("kills", "memory", "two_processes"))
        size, grown = (f"{memory['MB']} MB", f"{memory['growth_percent']:.2f} %") if memory else ("", "")
        kills, two = f"{kills} / {kills}" if kills else "", f"{two:.0e}" if two else ""
        place = next((f"{folder}/" for folder in ("bench", "studies") if script in ROOMS[folder]), "")
        rows.append([f"`{place}{script}.py`", kills, two, size, grown, f"{cases} of {cases}"])
    titles = "script | kills survived / made, bit for bit equal | meta-gradient of two processes differs by "
    titles += "| peak memory of 2,000 steps | growth in the last 1,000 | bad flag values refused"
    return table(titles, rows)


def sums(out: Path) -> str:
    """All cases together."""
    found = read_if(out / "faults.json")
    keys = ("kills", "flag_cases", "folder_cases", "huge_cases")
    rows = [[f"{sum(found[key].values()):,}" for key in keys]] if found else []
    return table("kills | bad values | strange run folders | values too large for any memory", rows)


def versions(out: Path) -> str:
    """Which versions of Python and torch the tests ran on."""
    found = read_if(out / "faults.json").get("versions", {})
    rows = [[name, row["processor"], row["result"]] for name, row in found.items()]
    return table("Python and torch | on | `RECORD=1 pytest`", rows)


def field(out: Path) -> str:
    """The kinds of faults that people met in the field, from field.json."""
    found = read_if(out / "field.json")
    kinds = sorted(found.get("kinds", {}).items(), key=lambda item: -item[1]["tried"])
    rows = [[kind, row["tried"], row["right"]] for kind, row in kinds]
    rows += [["all", sum(row["tried"] for _, row in kinds), sum(row["right"] for _, row in kinds)]] if rows else []
    return table("kind | cases tried | cases right", rows, [f"`{found.get('command')}`"])
