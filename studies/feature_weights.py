"""Feature weights for 1-D functions: errors by number of points, the weights that are learned, the alias."""

from __future__ import annotations

import math
from pathlib import Path

from studies.ledger import Case
from studies.results import BLUE, GREEN, GREY, PINK, RED, new_figure, plain_command, read_if, table

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--smoke"
OWN_OUTPUT = True

CASES = [Case("features", "--part all", minutes=2)]

# ---------------------------------------------------------------------------------------- results

# What the documents say: (what, weights, training points, their test error)
CLAIMS = [
    ("weights 1", "ones", "32", "0.95"),
    ("oracle", "oracle", "32", "1e-30"),
    ("meta-learned", "meta", "32", "0.31"),
    ("meta-learned", "meta", "31", "0.45"),
    ("meta-learned", "meta", "33", "0.39"),
]
PARTS = {  # of features.json, in the order of the homework
    "closed_form": "e: closed form, SGD",
    "closed_form_adam": "e: closed form, Adam",
    "closed_form_random": "e: closed form, random points",
    "gradient_5_steps": "f: 5 gradient steps",
    "gradient_1_steps": "f: 1 gradient step",
    "classification": "g: signs by regression",
    "logistic_10_steps": "h: signs by 10 logistic steps",
}
WEIGHTS = {"ones": "all weights 1", "meta": "meta-learned", "oracle": "oracle (knows S)"}
POINTS = "31", "32", "33", "64"


def file_of(out: Path) -> dict:
    """features.json: where it is kept, or as the script itself writes it."""
    return read_if(out / "feature_weights" / "features.json") or read_if(out / "features.json")


def claims(out: Path) -> list[list[str]]:
    """What the documents say of the errors beside what we measured."""
    if not (run := file_of(out).get("closed_form")):
        return []
    what, command = "Feature weights, test error at {} points, {}", plain_command(run)
    known = [claim for claim in CLAIMS if claim[2] in run[claim[1]]]
    return [[what.format(n, who), theirs, f"{run[kind][n]:#.2g}", command] for who, kind, n, theirs in known]


def errors(out: Path) -> str:
    """Test errors of every part by number of points: squared errors, wrong signs in per cent with their intervals."""
    rows, found = [], {part: run for part in PARTS if (run := file_of(out).get(part))}
    for part, run in found.items():
        signs = run["error"] == "fraction of wrong signs"
        for kind, name in WEIGHTS.items():
            figure = lambda n, run=run, kind=kind: f"{100 * run[kind][n]:.1f} ± {100 * run['ci95'][kind][n]:.1f}"
            cells = [figure(n) + " %" if signs else f"{run[kind][n]:#.2g}" for n in POINTS]
            rows.append([PARTS[part], name, *cells, run["num_test_tasks"]])
    titles = "part | weights | " + " | ".join(f"{n} points" for n in POINTS) + " | test tasks"
    return table(titles, rows, [plain_command(run) for run in found.values()])


def learned(out: Path) -> str:
    """Smallest to largest weight of each group after meta-training, and from where on they are never worse than 1."""
    rows = []
    for part, title in PARTS.items():
        if run := file_of(out).get(part):
            span = lambda kind, run=run: "{min:.2f} to {max:.2f}".format(**run["weights"][kind])
            groups = [span(kind) if kind in run["weights"] else "-" for kind in ("S", "aliases", "others")]
            rows.append([title, *groups, run["at_most_ones_from"], f"{run['train_seconds']:.0f}"])
    titles = "part | in S | aliases | others | never worse than weights 1 from | seconds"
    return table(titles, rows)


def alias(out: Path) -> str:
    """Part d: where gradient descent on c ends from each start."""
    run = file_of(out).get("alias", {})
    pair = lambda c: f"({c[0]:.4f}, {c[1]:.0e})"
    starts = zip(*(run.get(key, ()) for key in ("start", "norm", "end", "beta")), strict=True)
    rows = [[f"({c[0]:g}, {c[1]:g})", f"{norm:.4f}", pair(end), pair(beta)] for c, norm, end, beta in starts]
    return table("start c | its norm | end of c | beta there", rows)


def alias_figure(run: dict):
    """Part d: the iterates in the plane of the weights, on circles around 0, and c_1 over the steps."""
    figure, ((plane, decay),) = new_figure(1, 2, (9, 4))
    turn = [2 * math.pi * i / 199 for i in range(200)]
    steps = [step for step, _ in run["path"]]
    for i, (norm, colour) in enumerate(zip(run["norm"], (BLUE, RED, GREEN, PINK), strict=True)):
        c0, c1 = zip(*(starts[i] for _, starts in run["path"]), strict=True)
        plane.plot([norm * math.cos(t) for t in turn], [norm * math.sin(t) for t in turn], ":", color=GREY, lw=0.7)
        plane.plot(c0, c1, color=colour, linewidth=2)
        plane.plot(c0[0], c1[0], "o", color=colour)
        plane.plot(c0[-1], c1[-1], "X", color=colour, markersize=9)
        decay.loglog(steps[1:], [abs(c) for c in c1[1:]], color=colour, label=f"start ({c0[0]:g}, {c1[0]:g})")
    plane.axhline(0, color="black", linewidth=0.5)
    plane.set(
        xlabel="$c_0$, weight of the true feature",
        ylabel="$c_1$, weight of its alias",
        aspect="equal",
        title="Gradient descent keeps ‖c‖: start ●, end ✖",
    )
    decay.set(xlabel="step", ylabel="$|c_1|$", title="The alias loses its weight")
    decay.legend(frameon=False)
    return figure


def features_figure(runs: list[dict]):
    """One row for each meta-training: test error by the number of points, and the weights over the steps."""
    figure, axes = new_figure(len(runs), 2, (10, 3.6 * len(runs)))
    for (left, right), run in zip(axes, runs, strict=True):
        errors, regression = run["errors"], run["part"] in ("closed_form", "gradient")
        name, value = ("predicting zero", 1.0) if regression else ("guessing", 0.5)
        left.axhline(value, color=GREY, linestyle="--", linewidth=1, label=name)
        left.axvline(run["num_points"], color=GREY, linestyle=":", linewidth=1, label="points in meta-training")
        for (kind, label), colour in zip(WEIGHTS.items(), (RED, BLUE, GREEN), strict=True):
            mean, low, high = (errors[kind][key] for key in ("mean", "p10", "p90"))
            points = range(1, len(mean) + 1)
            left.fill_between(points, low, high, color=colour, alpha=0.2, lw=0)
            left.plot(points, mean, color=colour, label=label)
        left.set(
            xlabel="training points n",
            xlim=(1, len(points)),
            ylim=(0, 1.25 if regression else 0.6),
            ylabel="mean squared test error" if regression else "fraction of wrong signs",
        )
        for kind, label, colour in (
            ("others", "other features", GREY),
            ("aliases", "look like S on the grid", RED),
            ("S", "features in S", BLUE),
        ):
            if kind in run["history"]:
                low, mean, high = zip(*run["history"][kind], strict=True)
                right.fill_between(run["history"]["steps"], low, high, color=colour, alpha=0.3, lw=0)
                right.plot(run["history"]["steps"], mean, color=colour, label=label)
        right.set(xlabel="step of meta-training", ylabel="feature weight $c_k$", xlim=(0, run["train_steps"]))
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
        steps = f"{run['num_gd_steps']} gradient step{'s' * (run['num_gd_steps'] != 1)}"
        title = {
            "closed_form": "regression, closed form",
            "classification": "classification by regression on signs",
            "logistic": f"classification, logistic, {steps}",
            "gradient": f"regression, {steps}",
        }
        text = f"{title[run['part']]} ({run['optimizer']} {run['learning_rate']:g})"
        left.set_title(text, loc="left", fontsize=10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9
    )
    return figure


def run_figure(run: dict):
    """The picture of one run of any part."""
    return alias_figure(run) if "path" in run else features_figure([run])


def pictures(out: Path):
    """Each part of features.json; a part with random points in a picture of its own."""
    runs, of_part = file_of(out), {}
    if "path" in runs.get("alias", {}):
        yield "alias", alias_figure(runs["alias"])
    for run in runs.values():
        if "errors" in run:
            of_part.setdefault(run["part"] + "_random" * (run["points"] == "random"), []).append(run)
    for part, some in of_part.items():
        yield part, features_figure(some)
