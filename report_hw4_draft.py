"""Draft for report.py: the tables and pictures of docs/memorization.md and docs/bayes.md from results/*/*.json.

python report_hw4_draft.py      writes results/memorization.png, results/bayes.png, results/bayes_posterior.png,
                                results/bayes_plates.png, and prints both tables in Markdown
"""

import json
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

RESULTS = Path(__file__).parent / "results"
TASKS = ("basis", "diseased", "grasping", "sinusoid", "characters")
REGULARISERS = ("none", "activations", "weights")
CONDITIONS = ("own", "emptied", "other")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito


def load(folder: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))]


def over_seeds(runs: list[dict], key: str) -> tuple[float, float]:
    """Mean over runs and a 95 % half-width: the larger of the tasks' (averaged) and the seeds' (with three or more)."""
    values, tasks = [r[key] for r in runs], [r[f"{key}_ci95"] for r in runs]
    of_tasks = math.sqrt(sum(t * t for t in tasks)) / len(runs)
    of_seeds = 4.30 * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) == 3 else 0.0
    return float(np.mean(values)), max(of_tasks, float(of_seeds))


def of(results: list[dict], *row: str) -> list[dict]:
    """The runs of a task, learner and regulariser."""
    return [r for r in results if (r["task"], r["learner"], r["regulariser"]) == row]


def memorization_table(results: list[dict]) -> str:
    """A row for each task, learner and regulariser; accuracies in per cent, squared errors as they are."""
    head = ["task", "learner", "regulariser", "seeds"] + [f"{p}, {c}" for p in ("train", "test") for c in CONDITIONS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in TASKS:
        for learner in ("maml", "blackbox"):
            for regulariser in REGULARISERS:
                runs = [
                    r for r in results if (r["task"], r["learner"], r["regulariser"]) == (task, learner, regulariser)
                ]
                if not runs:
                    continue
                square = runs[0]["figure"] != "accuracy"
                cells = []
                for part in ("train", "test"):
                    for condition in CONDITIONS:
                        mean, ci = over_seeds(runs, f"{part}_{condition}")
                        cells.append(f"{mean:.3f} ± {ci:.3f}" if square else f"{100 * mean:.1f} ± {100 * ci:.1f}")
                lines.append("| " + " | ".join([task, learner, regulariser, str(len(runs)), *cells]) + " |")
    return "\n".join(lines)


def draw_memorization(results: list[dict]) -> Figure:
    """A panel for each task and learner: test figures with the own, no, and another task's support set."""
    tasks = [t for t in TASKS if any(r["task"] == t for r in results)]
    figure = Figure(figsize=(3.0 * len(tasks), 5.2), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for row, learner in zip(axes, ("maml", "blackbox"), strict=True):
        for ax, task in zip(row, tasks, strict=True):
            for i, regulariser in enumerate(REGULARISERS):
                runs = of(results, task, learner, regulariser)
                for j, condition in enumerate(CONDITIONS):
                    for part, shade in (("train", 0.4), ("test", 1.0)):
                        if runs:
                            mean, ci = over_seeds(runs, f"{part}_{condition}")
                            colour = (BLUE, GREY, ORANGE)[j]
                            place = i + 0.26 * (j - 1) + (0.06 if part == "test" else -0.06)
                            ax.errorbar(place, mean, ci, fmt="o", ms=5, color=colour, alpha=shade)
            ax.set_xticks(range(3), ["plain", "activations", "weights"], fontsize=8)
            ax.spines[["top", "right"]].set_visible(False)
            shown = [r for r in results if r["task"] == task]
            if shown[0]["figure"] == "accuracy":
                ax.set_ylim(0, 1.03)
            else:
                ax.set_yscale("log")
            ax.set_title(f"{task}: {shown[0]['figure']}", fontsize=9)
        row[0].set_ylabel({"maml": "MAML", "blackbox": "black box"}[learner])
    handles = [axes[0, 0].plot([], [], "o", color=c)[0] for c in (BLUE, GREY, ORANGE)]
    names = ["own support set", "emptied", "another task's (pale: training tasks)"]
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return figure


def bayes_table(results: list[dict]) -> str:
    """For each run: negative log likelihood by points with and without metadata, the paired gain, coverage."""
    lines = []
    for r in results:
        lines += [f"{r['world']}, metadata {r['metadata']}, {'phi1 dropped' if r['drop_phi1'] else 'whole bound'}, "
                  f"seed {r['seed']}, {r['num_test_tasks']} test tasks", "",
                  "| points | NLL with | NLL without | gain, paired | 90 % covers, with | without | bound | evidence |",
                  "|" + "---|" * 8]  # fmt: skip
        for i, n in enumerate(r["points"]):
            pair = lambda key, i=i, r=r: f"{r[key][i]:.3f} ± {r[f'{key}_ci95'][i]:.3f}"
            cells = [str(n), pair("nll_with"), pair("nll_without"), pair("gain")]
            for end in ("with", "without"):
                cells.append(f"{100 * r[f'coverage90_{end}'][i]:.1f}" if "coverage90_with" in r else "")
            cells += [f"{r['bound_with'][i]:.2f}", f"{r['evidence_with'][i]:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw_bayes(results: list[dict]) -> Figure:
    """Left: likelihood by number of points; middle: calibration; right: the bound beside the evidence."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    likelihood, calibration, bounds = figure.subplots(1, 3)
    runs = [r for r in results if r["world"] == "sinusoid"]
    for r in (r for r in runs if not r["drop_phi1"]):
        for end, colour in (("with", BLUE), ("without", ORANGE)):
            likelihood.errorbar(
                r["points"], r[f"nll_{end}"], r[f"nll_{end}_ci95"], color=colour, label=f"{end} metadata"
            )
            for row in (0, 1, 3, len(r["points"]) - 1):
                if row < len(r["points"]):
                    calibration.plot([0, *r["levels"], 1], [0, *r[f"coverage_{end}"][row], 1], color=colour, lw=0.8)
    calibration.plot([0, 1], [0, 1], "k:", lw=0.8)
    for r in runs:
        name, style = ("phi1 dropped", "--") if r["drop_phi1"] else ("whole bound", "-")
        bounds.plot(r["points"], r["bound_with"], style, color=ORANGE if r["drop_phi1"] else BLUE, label=name)
        bounds.plot(r["points"], r["evidence_with"], style, color=GREY, label=f"log evidence ({name})")
    names = {
        likelihood: ("points", "negative log likelihood (nats a target)"),
        calibration: ("level of the interval", "share of targets inside"),
        bounds: ("points", "nats a context"),
    }
    for ax, (x, y) in names.items():
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (likelihood, bounds):
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    return figure


def draw_plates() -> Figure:
    """The plate diagram of bayes.py: arrows of the model are black, those of q dashed."""
    figure = Figure(figsize=(5, 2.4))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, 5)
    ax.set_ylim(0, 2.4)
    ax.axis("off")
    nodes = {"phi1": (0.6, 1.7, r"$\varphi_1$"), "m": (0.6, 0.6, "m"), "phi2": (2.1, 1.2, r"$\varphi_2$"),
             "y": (3.8, 1.2, "y"), "x": (3.8, 0.45, "x")}  # fmt: skip
    for name, (x, y, label) in nodes.items():
        fill = "#DDDDDD" if name in ("m", "x", "y") else "white"  # grey: observed
        ax.add_patch(Circle((x, y), 0.25, fc=fill, ec="black", zorder=2))
        ax.text(x, y, label, ha="center", va="center", zorder=3)
    model = (("phi1", "phi2"), ("m", "phi2"), ("phi2", "y"), ("x", "y"))
    for a, b in (*model, ("y", "phi2"), ("phi2", "phi1")):
        style, bend = ("-", 0) if (a, b) in model else ("--", 0.35)
        ends = {"posA": nodes[a][:2], "posB": nodes[b][:2], "shrinkA": 19, "shrinkB": 19}
        curve = f"arc3,rad={bend}"
        ax.add_patch(
            FancyArrowPatch(**ends, arrowstyle="-|>", mutation_scale=12, linestyle=style, connectionstyle=curve)
        )
    for x, y, w, h, label in ((3.3, 0.1, 1.0, 1.5, "points"), (0.2, 0.03, 4.4, 2.1, "tasks")):
        ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.02", fc="none", ec=GREY))
        ax.text(x + w - 0.05, y + h - 0.05, label, ha="right", va="top", fontsize=8, color=GREY)
    return figure


def main() -> None:
    from bayes import posterior_figure

    memorization, bayes = load("memorization"), load("bayes")
    pictures = {"bayes_plates": draw_plates()}
    if memorization:
        pictures["memorization"] = draw_memorization(memorization)
        print(memorization_table(memorization), end="\n\n")
    if bayes:
        pictures["bayes"] = draw_bayes(bayes)
        drawn = next((r["functions"] for r in bayes if r.get("functions") and not r["drop_phi1"]), None)
        pictures |= {"bayes_posterior": posterior_figure(drawn)} if drawn else {}
        print(bayes_table(bayes))
    for name, figure in pictures.items():
        figure.savefig(RESULTS / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
