"""Races against plain references, threads on busy computers, and how a training step grows."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

from studies.results import BLUE, RED, new_figure, processor, read_if, table

AXES = {"N": "classes N", "K": "shots K", "Q": "queries Q", "B": "meta-batch B", "side": "pixels a side"}


def speed_processor(race: dict) -> str:
    """Where a race was run, in short: "AMD EPYC, AVX512 with bfloat16", or the GPU's name."""
    if not race.get("device", "cpu").startswith("cpu"):
        return race["device"]
    name, _, kind = race["processor"].partition(", ")
    return f"{re.sub(r'[(]R[)]| CPU| Processor', '', name)}, {kind}"


def races_of(out: Path) -> list[dict]:
    return sorted(read_if(out / "speed.json"), key=lambda race: race["title"])


def races(out: Path) -> str:
    """A table for each benchmark, a row for each race: milliseconds and their ratio to those of its first column."""
    tables: dict[str, list] = {}
    for race in races_of(out):
        timed = lambda value: isinstance(value, dict) and ("ms" in value or "tasks_per_second" in value)
        found = {name: value for name, value in race.items() if timed(value)}
        # "auto: vmap, 32 at once" says what auto chose: of the row, not of the column
        found = {name.split(":")[0]: value | {"what": name.partition(": ")[2]} for name, value in found.items()}
        whole_run = ".py " in race["title"] and not race["title"].startswith("busy, ")
        kind = "training tasks a second" if whole_run else race["title"].split(",")[0]
        tables.setdefault(kind, []).append((race, found))
    parts = []
    for kind, rows in tables.items():
        names = list(dict.fromkeys(name for _, found in rows for name in found))
        cells = [
            [race["title"].removeprefix(f"{kind}, "), speed_processor(race), *(cell(found.get(n)) for n in names)]
            for race, found in rows
        ]
        unit = "" if kind == "training tasks a second" else ", ms"
        parts.append(table(" | ".join([f"{kind}{unit}", "on", *names]), cells))
    return "\n\n".join(parts) or "(not measured)"


def cell(value: dict | None) -> str:
    if value is None:
        return ""
    if "tasks_per_second" in value:
        return f"{value['tasks_per_second']:,.1f}"
    return f"{value['ms']:.2f} ({value['ratio']:.2f}x" + (f"; {value['what']})" if value["what"] else ")")


def busy(out: Path) -> str:
    """Times of a step beside endless loops, as multiples of that of spinning threads on an idle computer."""
    found, rows = [race for race in races_of(out) if race["title"].startswith("busy, ")], []
    for n in (0, 1, 2) if found else ():
        spans = [[1 / race[f"{n} loops, {whose}"]["ratio"] for race in found] for whose in ("ours", "spinning")]
        rows.append([n, *(f"{min(times):.1f} to {max(times):.1f}" for times in spans)])
    return table("endless loops beside it | our threads | threads that always spin", rows)


def to_accuracy(out: Path) -> str:
    """Seconds of training until a validation accuracy was first passed."""
    rows = []
    for race in races_of(out):
        for reached in race.get("to_accuracy", []):
            command, median = f"`protonet.py {reached['recipe']}".strip() + "`", statistics.median(reached["seconds"])
            each, final = (", ".join(map(str, reached[key])) for key in ("seconds", "test_accuracy"))
            rows.append([command, f"{reached['target']:.1%}", each, f"{median:.0f}", final, speed_processor(race)])
    return table("training | validation accuracy | seconds of each seed | median | test accuracy in the end | on", rows)


def growth(out: Path) -> str:
    """The default training step of each method, and the powers by which it grows."""
    found, rows = read_if(out / "growth.json"), []
    axes = list(dict.fromkeys(fit["axis"] for fit in found.get("fits", ())))
    for name, defaults in found.get("defaults", {}).items():
        fits = {fit["axis"]: fit for fit in found["fits"] if fit["method"] == name}
        default = next(r for r in found["rows"] if (r["method"], r["axis"]) == (name, "default"))
        powers = [grown(fits.get(axis), "{seconds:.2f}, {peak_bytes:.2f}") for axis in axes]
        setting = ", ".join(f"{axis} {value}" for axis, value in defaults.items())
        rows.append([name, setting, step(default), *powers, processor(found)])
    titles = ["method", "around", "step, ms; peak, MB", *(f"{axis}: time, memory" for axis in axes), "on"]
    return table(" | ".join(titles), rows, [f"`{found['command']}`"] if rows else [])


def grown(fit: dict | None, form: str) -> str:
    return form.format(**fit) if fit and fit["seconds"] is not None else ""


def step(row: dict) -> str:
    """Time and memory of a step; of a point that was skipped the reason."""
    return row["skipped"] if "skipped" in row else f"{1e3 * row['seconds']:.1f}; {row['peak_bytes'] / 1e6:.1f}"


def far(out: Path) -> str:
    """Points far from the defaults, measured and predicted by the powers; and what was skipped."""
    found, rows = read_if(out / "growth.json"), []
    for row in found.get("rows", ()):
        mine = [other for other in found["rows"] if other["method"] == row["method"]]
        if "varied" in row:
            fit = next(f for f in found["fits"] if (f["method"], f["axis"]) == (row["method"], row["varied"]))
            rows.append([row["method"], row["axis"], step(row), predicted(row, mine, fit)])
        elif "skipped" in row:
            rows.append([row["method"], f"{row['axis']} {row['value']}", step(row), "-"])
    return table("method | at | measured: ms; MB | predicted: ms; MB", rows)


def predicted(row: dict, rows: list[dict], fit: dict) -> str:
    """What the power of the axis that `row` lies on makes of the last measured point of this axis."""
    curve = [r for r in rows if r["axis"] == fit["axis"] and "seconds" in r]
    if len(curve) < 2:
        return "-"
    last = max(curve, key=lambda r: r["value"])
    grown = {key: last[key] * (row["value"] / last["value"]) ** fit[key] for key in ("seconds", "peak_bytes")}
    return step(grown)


def growth_figure(rows: list[dict], fits: list[dict], note: str):
    """Time (above) and peak memory (below) of a training step: a column an axis; the line is the fitted power."""
    figure, axes = new_figure(2, len(fits), (2.9 * len(fits) + 0.8, 5.0), "both")
    for column, fit in enumerate(fits):
        curve = sorted((r for r in rows if r["axis"] == fit["axis"] and "seconds" in r), key=lambda r: r["value"])
        x = [row["value"] for row in curve]
        sides = ("seconds", 1e3, BLUE), ("peak_bytes", 1e-6, RED)
        for ax, (key, scale, colour) in zip(axes[:, column], sides, strict=True):
            figures = [row[key] * scale for row in curve]
            ax.set(xscale="log", yscale="log")
            ax.minorticks_off()
            ax.set_xticks(x, [str(value) for value in x])
            ax.plot(x, figures, "o", color=colour)
            if not curve:
                continue
            low, high = min(figures), max(figures)
            ax.set_ylim(low / 1.6, high * 1.6)
            ticks = [low, (low * high) ** 0.5, high] if high > 2 * low else [high]
            ax.set_yticks(ticks, [f"{tick:,.0f}" if tick >= 100 else f"{tick:.3g}" for tick in ticks])
            if fit[key] is not None:
                over = fit["fitted_over"]
                rests = [math.log(y / v ** fit[key]) for v, y in zip(over, figures[-len(over) :], strict=True)]
                level = math.exp(statistics.fmean(rests))
                ax.plot(over, [level * v ** fit[key] for v in over], color=colour, label=f"power {fit[key]:.2f}")
                ax.legend(frameon=False, fontsize=8, loc="upper left")
        axes[1, column].set_xlabel(AXES[fit["axis"]])
    axes[0, 0].set_ylabel("a training step (ms)")
    axes[1, 0].set_ylabel("its peak memory (MB)")
    figure.supxlabel(note, fontsize=8, color="0.4")
    return figure


def pictures(out: Path):
    """How a training step of each method grows, as growth_<method>."""
    found = read_if(out / "growth.json")
    for name, defaults in found.get("defaults", {}).items():
        rows, fits = ([row for row in found[key] if row["method"] == name] for key in ("rows", "fits"))
        setting = ", ".join(f"{axis} {value}" for axis, value in defaults.items())
        yield f"growth_{name}", growth_figure(rows, fits, f"{name} around {setting}; {processor(found)}")
