"""What MAML and Evolution Strategies cost: how time and memory grow, where ES is the dearer one, what it is worth."""

from __future__ import annotations

from pathlib import Path

from studies.ledger import Case
from studies.results import BLUE, GREEN, PINK, RED, new_figure, plain_command, processor, read_if, table

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--smoke"
OWN_OUTPUT = True

CASES = [Case("costs", "--sweep all --engine auto", minutes=5)]

# ---------------------------------------------------------------------------------------- results

COST_TITLES = {"maml": "MAML", "es": "ES", "fomaml": "first-order MAML", "checkpoint": "checkpointed MAML"}
COST_COLOURS = {"maml": BLUE, "es": RED, "fomaml": GREEN, "checkpoint": PINK}
SWEEPS = {"inner_steps": "inner steps", "layers": "hidden layers", "hidden_dim": "hidden units"}
CLAIMS = [("maml", "grows linearly"), ("es", "does not grow")]  # peak memory with the inner steps


def file_of(out: Path, name: str) -> dict:
    """costs.json or costs_train.json: where it is kept, or as the script itself writes it."""
    return read_if(out / "profile_costs" / f"{name}.json") or read_if(out / f"{name}.json")


def growth(f: dict, unit: str) -> str:
    """A fit of costs.json in words: a line a + b x, or a power x^b."""
    if f["form"] == "power":
        return f"x^{f['b']:.2f}"
    if abs(f["b"]) < 1e-9:
        return f"{f['a']:.1f} {unit}, flat"
    return f"{f['a']:.1f} {'+' if f['b'] > 0 else '-'} {abs(f['b']):.2f} x {unit}"


def claims(out: Path) -> list[list[str]]:
    """What the documents say of the memory beside what we measured."""
    if not (costs := file_of(out, "costs")):
        return []
    found = {f["method"]: f for f in costs["fits"] if (f["sweep"], f["engine"]) == ("inner_steps", "vmap")}
    what = "{}, peak memory with x inner steps"
    memory = {method: growth(found[method]["memory"], "MB") for method, _ in CLAIMS}
    return [[what.format(COST_TITLES[m]), claim, memory[m], plain_command(costs)] for m, claim in CLAIMS]


def fits(out: Path) -> str:
    """How runtime and peak memory grow with each sweep."""
    costs = file_of(out, "costs")
    rows = []
    for f in [f for f in costs.get("fits", ()) if f["engine"] == "vmap"]:
        both = [(growth(f[what], unit), f"{f[what]['r2']:.3f}") for what, unit in (("runtime", "ms"), ("memory", "MB"))]
        rows.append([SWEEPS[f["sweep"]], COST_TITLES[f["method"]], *both[0], *both[1], processor(costs)])
    commands = [plain_command(costs)] if rows else []
    return table("engine `vmap`, x = | method | runtime | R² | peak memory | R² | on", rows, commands)


def large(out: Path) -> str:
    """MAML and ES at 512 units, by engine."""
    found = [row for row in file_of(out, "costs").get("rows", ()) if row["method"] in ("maml", "es")]
    found = [row for row in found if (row["sweep"], row["hidden_dim"]) == ("hidden_dim", 512)]
    figures = lambda row: (f"{1e3 * row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.1f}")
    cells = [[COST_TITLES[row["method"]], row["engine"], *figures(row)] for row in found]
    return table("at 512 units | engine | ms | MB", cells)


def dearer(out: Path) -> str:
    """The settings at which ES costs more than MAML, by engine and kind of cost."""
    costs, rows = file_of(out, "costs"), []
    for engine in ("vmap", "loop") if costs else ():
        total = sum((row["method"], row["engine"]) == ("es", engine) for row in costs["rows"])
        for what, word in (("seconds", "time"), ("peak_bytes", "memory")):
            found = [d for d in costs["es_dearer"] if (d["engine"], d["what"]) == (engine, what)]
            at = ", ".join(f"{SWEEPS[d['sweep']]} {d['value']}: {d['es'] / d['maml']:.2f} times" for d in found)
            rows.append([f"`{engine}`", word, f"{len(found)} of {total}", at])
    return table("engine | cost | points where ES costs more | which", rows)


def cosines(out: Path) -> str:
    """What the estimate is worth, also at the number of perturbations that takes as long as MAML's exact gradient."""
    costs = file_of(out, "costs")
    found = costs.get("es_cosine") or []
    rows = [[c["perturbations"], f"{c['cosine']:.3f}", f"{c['expected']:.3f}"] for c in found]
    base = {"sweep": "inner_steps", "engine": "vmap", "inner_steps": 5}
    at = {row["method"]: row for row in costs.get("rows", ()) if base.items() <= row.items()}
    if found and at:
        pairs = at["es"]["num_perturbations"] / 2 * at["maml"]["seconds"] / at["es"]["seconds"]
        expected = (1 + found[0]["disagreement"] * (found[0]["parameters"] + 1) / pairs) ** -0.5
        rows.append([f"{2 * pairs:.0f}: in the time of a MAML step", "", f"{expected:.3f}"])
    return table("perturbed networks | cosine with the exact meta-gradient | expected", rows)


def trained(out: Path) -> str:
    """The test losses of both after as many outer steps."""
    runs, rows = file_of(out, "costs_train"), []
    for method, run in runs.items():
        after = f"{run['test_loss']:.4f} ± {run['ci95']:.4f}"
        rows.append([COST_TITLES[method], run["steps"], f"{run['test_loss_before']:.3f}", after])
    titles = "mean squared error of | outer steps | before adaptation | after adaptation"
    return table(titles, rows, [plain_command(run) for run in runs.values()][:1])


def cost_figure(rows: list[dict], engine: str, summary: dict):
    """Runtime (above) and memory (below) of an outer step: a column for each sweep of `rows`, a curve for each method.

    rows as in costs.json, of which those of `engine` are drawn; `summary` names the device. Returns the figure.
    """
    sweeps = [sweep for sweep in SWEEPS if any((row["sweep"], row["engine"]) == (sweep, engine) for row in rows)]
    figure, axes = new_figure(2, len(sweeps), (3.9 * len(sweeps), 6.4), "both")
    for column, sweep in enumerate(sweeps):
        of_sweep = [row for row in rows if (row["sweep"], row["engine"]) == (sweep, engine)]
        upper, lower = axes[:, column]
        for method, marker in zip(COST_TITLES, "osD^", strict=True):
            curve = [row for row in of_sweep if row["method"] == method]
            x, ms = [row[sweep] for row in curve], [1e3 * row["seconds"] for row in curve]
            bars = [
                [1e3 * (row["seconds"] - row["seconds_p10"]) for row in curve],
                [1e3 * (row["seconds_p90"] - row["seconds"]) for row in curve],
            ]
            style = {"color": COST_COLOURS[method], "marker": marker, "markersize": 4, "capsize": 2}
            if curve:
                upper.errorbar(x, ms, bars, **style, label=COST_TITLES[method])
                lower.errorbar(x, [row["peak_bytes"] / 1e6 for row in curve], **style, label=COST_TITLES[method])
        for ax in (upper, lower):
            ax.set_xlabel(SWEEPS[sweep])
            if sweep == "hidden_dim":
                ax.set_xscale("log")
                ax.set_yscale("log")
                ax.minorticks_off()
            else:
                ax.set_ylim(bottom=0)
            values = sorted({row[sweep] for row in of_sweep})
            ax.set_xticks(values, [str(value) for value in values])
    axes[0, 0].set_ylabel("runtime of an outer step (ms)")
    axes[1, 0].set_ylabel("peak memory (MB)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    note = f"{rows[0]['meta_batch_size']} tasks (ES: {rows[0]['num_perturbations']} perturbations), engine {engine}, "
    figure.supxlabel(f"{note}{processor(summary)}; bars: 10th to 90th percentile", fontsize=8, color="0.4")
    return figure


def adapted_figure(runs: dict[str, dict]):
    """Truth, support points, and the function before and after adaptation on test tasks; a row for each method."""
    count = len(next(iter(runs.values()))["examples"])
    figure, axes = new_figure(len(runs), count, (3 * count, 0.5 + 2.3 * len(runs)))
    for row, (method, run) in zip(axes, runs.items(), strict=True):
        steps = f"after {run['inner_steps']} inner step{'s' * (run['inner_steps'] > 1)}"
        for ax, task in zip(row, run["examples"], strict=True):
            ax.plot(task["x"], task["truth"], color="black", lw=1, label="truth")
            ax.plot(task["x"], task["before"], color="#999999", ls="--", label="before adaptation")
            ax.plot(task["x"], task["after"], color=BLUE, label=steps)
            ax.plot(task["support_x"], task["support_y"], "k.", label="support points")
            ax.set_ylim(-1.3, 1.3)  # where the sinusoids lie
        row[0].set_ylabel(f"{COST_TITLES[method]}\ny")
    for ax in axes[-1]:
        ax.set_xlabel("x")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def pictures(out: Path):
    """Runtime and memory of an outer step, vmap's if it was measured; functions before and after adaptation."""
    costs = file_of(out, "costs")
    if rows := costs.get("rows"):
        engines = {row["engine"] for row in rows}
        yield "costs", cost_figure(rows, "vmap" if "vmap" in engines else sorted(engines)[0], costs)
    if runs := {method: run for method, run in file_of(out, "costs_train").items() if "examples" in run}:
        yield "costs_train", adapted_figure(runs)


def run_figure(run: dict):
    """The picture of one training; None of a run that kept no examples."""
    return adapted_figure({run["method"]: run}) if "examples" in run else None
