"""A distribution over functions, with metadata: likelihood by points, calibration, the bound, the plates."""

from __future__ import annotations

from pathlib import Path

from studies.ledger import Case
from studies.results import BLUE, GREY, RED, interval_of, load, new_figure, plain_command, table

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 20 --num_test_tasks 20 --test_samples 8"
OF_NUMBERS = True  # its script knows one precision

CASES = [
    Case("phase", "", seeds=3, minutes=3, beyond=True),
    Case("amplitude", "--metadata amplitude", seeds=3, minutes=3, beyond=True),
    Case("phase_without_phi1", "--drop_phi1", seeds=3, minutes=3, beyond=True),
    Case("omniglot", "--world omniglot", seeds=3, minutes=8, beyond=True),
]

# ---------------------------------------------------------------------------------------- results

METADATA = {"phase": "the quarter of the phase", "amplitude": "the amplitude, with noise"}


def likelihoods(out: Path, case: str) -> str:
    """Negative log likelihood by points with and without metadata, the paired gain, coverage, of one case."""
    rows, runs = [], load(out, f"bayes/{case}")
    for i, n in enumerate(runs[0]["points"] if runs else ()):

        def at(key, i=i):
            return interval_of([{name: run[name][i] for name in (key, f"{key}_ci95")} for run in runs], key)

        pairs = ["{:.3f} ± {:.3f}".format(*at(key)) for key in ("nll_with", "nll_without", "gain")]
        keys = ("coverage90_with", "coverage90_without")
        covered = [f"{100 * at(key)[0]:.1f}" if key in runs[0] else "" for key in keys]
        rows.append([n, *pairs, *covered, *(f"{at(key)[0]:.2f}" for key in ("bound_with", "evidence_with")), len(runs)])
    titles = "points | NLL with | NLL without | gain, paired | 90 % covers, with | without | bound | evidence | seeds"
    return table(titles, rows, [plain_command(runs[0])] if runs else [])


def pictures(out: Path):
    """Likelihood by number of points, calibration, the bound beside the evidence; functions from the posterior."""
    runs = [load(out, f"bayes/{case}")[:1] for case in ("phase", "phase_without_phi1", "amplitude")]
    runs = [run for some in runs for run in some]
    whole = [run for run in runs if not run["drop_phi1"]]
    if whole:
        yield "bayes", likelihood_figure(runs, whole)
        if drawn := next((run for run in whole if run.get("functions")), None):
            yield "posterior", posterior_figure(drawn)
        yield "plates", plates_figure()


def likelihood_figure(runs: list[dict], whole: list[dict]):
    figure, ((likelihood, calibration, bounds),) = new_figure(1, 3, (10, 3.2))
    for run in whole:
        for end, colour in (("with", BLUE), ("without", RED)):
            label = f"{run['metadata']}, {end} metadata"
            style = "-" if run["metadata"] == whole[0]["metadata"] else "--"
            likelihood.errorbar(
                run["points"], run[f"nll_{end}"], run[f"nll_{end}_ci95"], color=colour, ls=style, label=label
            )
            for row in sorted({0, 1, 3, len(run["points"]) - 1} & set(range(len(run["points"])))):
                calibration.plot([0, *run["levels"], 1], [0, *run[f"coverage_{end}"][row], 1], color=colour, lw=0.8)
    calibration.plot([0, 1], [0, 1], "k:", lw=0.8)
    for run in [whole[0], *(run for run in runs if run["drop_phi1"])]:
        name, style = ("phi1 dropped", "--") if run["drop_phi1"] else ("whole bound", "-")
        colour = RED if run["drop_phi1"] else BLUE
        bounds.plot(run["points"], run["bound_with"], style, color=colour, label=name)
        bounds.plot(run["points"], run["evidence_with"], style, color=GREY, label=f"log evidence ({name})")
    likelihood.set(xlabel="points", ylabel="negative log likelihood (nats a target)")
    calibration.set(xlabel="level of the interval", ylabel="share of targets inside")
    bounds.set(xlabel="points", ylabel="nats a context")
    for ax in (likelihood, bounds):
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    return figure


def posterior_figure(run: dict):
    drawn = run["functions"]
    sizes = sorted({int(key.split("_")[0]) for key in drawn if key[0].isdigit()})
    figure, axes = new_figure(2, len(sizes), (2.6 * len(sizes), 4.2))
    for row, end in zip(axes, ("with", "without"), strict=True):
        for ax, size in zip(row, sizes, strict=True):
            for curve in drawn[f"{size}_{end}"]:
                ax.plot(drawn["x"], curve, color=BLUE, lw=0.8, alpha=0.6)
            ax.plot(drawn["context_x"][:size], drawn["context_y"][:size], "k.")
            ax.set_ylim(-3.2, 3.2)
            ax.set_title(f"{size} point{'s' * (size != 1)}", fontsize=10)
        row[0].set_ylabel(f"{end} metadata")
    figure.supxlabel(f"metadata: {METADATA[run['metadata']]}", fontsize=9, color="0.4")
    return figure


def plates_figure():
    """The plate diagram of bayes.py: arrows of the model are solid, those of q dashed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

    figure = Figure(figsize=(5, 2.4))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 5), ylim=(0, 2.4))
    ax.axis("off")
    nodes = {"$\\varphi_1$": (0.6, 1.7), "m": (0.6, 0.6), "$\\varphi_2$": (2.1, 1.2), "y": (3.8, 1.2), "x": (3.8, 0.45)}
    phi1, m, phi2, y, x = nodes.values()
    for name, (across, up) in nodes.items():
        ax.add_patch(Circle((across, up), 0.25, fc="#DDDDDD" if name in "mxy" else "white", ec="black", zorder=2))
        ax.text(across, up, name, ha="center", va="center", zorder=3)  # grey: observed
    arrows = [(phi1, phi2, "-"), (m, phi2, "-"), (phi2, y, "-"), (x, y, "-"), (y, phi2, "--"), (phi2, phi1, "--")]
    for start, end, style in arrows:
        bend = f"arc3,rad={0 if style == '-' else 0.35}"
        arrow = {"arrowstyle": "-|>", "mutation_scale": 12, "linestyle": style, "connectionstyle": bend}
        ax.add_patch(FancyArrowPatch(posA=start, posB=end, shrinkA=19, shrinkB=19, color="black", **arrow))
    for left, low, width, height, label in ((3.3, 0.1, 1.0, 1.5, "points"), (0.2, 0.03, 4.4, 2.1, "tasks")):
        ax.add_patch(FancyBboxPatch((left, low), width, height, boxstyle="round,pad=0.02", fc="none", ec=GREY))
        ax.text(left + width - 0.05, low + height - 0.05, label, ha="right", va="top", fontsize=8, color=GREY)
    return figure
