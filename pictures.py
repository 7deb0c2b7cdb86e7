"""What the result files hold, and every picture of the documents drawn from it.

The lower half of report.py: it reads `results/**/*.json`, trains nothing and loads no network. The same JSON and
the same matplotlib give the same bytes.
"""

from __future__ import annotations

from experiment import UserError, write_atomically

import base64
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PARTS = ("mann", "meta_lstm", "comparison", "memorization", "bayes", "mae")  # folders of results/: a JSON file a run
# 97.5 % points of Student's t for n - 1 degrees of freedom, by the number n of seeds
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

# Okabe and Ito's colours, which the colour-blind can tell apart; one for each method in every picture
BLUE, RED, GREEN, PINK, YELLOW, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f"
COLOURS = {
    "transfer": GREY,
    "mann": PINK,
    "protonet": BLUE,
    "fomaml": YELLOW,
    "protomaml": GREEN,
    "maml": RED,
    "anil": SKY,
    "meta_lstm": "#000000",
}
TITLES = {
    "transfer": "fine-tuning",
    "mann": "MANN, conv",
    "protonet": "ProtoNet",
    "fomaml": "first-order MAML",
    "protomaml": "Proto-MAML (f.o.)",
    "maml": "MAML",
    "anil": "ANIL",
    "meta_lstm": "meta-LSTM",
}
COST_TITLES = {"maml": "MAML", "es": "ES", "fomaml": "first-order MAML", "checkpoint": "checkpointed MAML"}
COST_COLOURS = {"maml": BLUE, "es": RED, "fomaml": GREEN, "checkpoint": PINK}
SWEEPS = {"inner_steps": "inner steps", "layers": "hidden layers", "hidden_dim": "hidden units"}

# ------------------------------------------------------------------------------------- results


def read(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--results: cannot read {path} ({error}); measure it again or name another folder") from None


def load(out: Path, name: str) -> list[dict]:
    """The metrics of all seeds of part/name, in the order of the seeds."""
    return [read(path) for path in sorted(out.glob(f"{name}_seed*.json"))]


def refuse_other_images(out: Path, dataset: str) -> None:
    """UserError when a run under `out` is not of `dataset` (miniImageNet: of a folder), whatever its name says."""
    for path in sorted(out.glob("*/*_seed*.json")):
        if path.parent.name not in PARTS:
            continue
        expected, found = "folder" if path.stem.startswith("miniImagenet") else dataset, read(path).get("dataset")
        of_images = path.parent.name not in ("memorization", "bayes") or found in ("omniglot", "glyphs")
        if of_images and found != expected:  # sinusoids and their like are made, not found
            raise UserError(
                f"{path} is a result on {found}, its row is of {expected}; move it to a folder of its own "
                f"and read it with --results FOLDER --dataset {found}"
            )


def interval(runs: list[dict], key: str = "test_accuracy") -> tuple[float, float, str]:
    """(mean over seeds, half-width of its 95 % interval, what the interval is over); the first two in per cent.

    The seeds share their test tasks, so their errors go together and the interval over tasks does not shrink with
    seeds. Where the seeds' standard deviation is larger than the tasks' standard error, training matters more than
    the choice of tasks: then the interval is over seeds, by Student's t.
    """
    values = [run[key] for run in runs]
    ci95 = key.replace("test_accuracy", "ci95").replace("accuracy", "ci95")
    half = sum(run[ci95] for run in runs) / len(runs)
    over = f"{runs[0]['num_test_tasks']:,} tasks"
    if key.startswith("finetuned"):  # one classifier of all classes, asked about every held-out drawing
        over = f"{runs[0]['held_out'] * runs[0]['finetuned_classes']:,} drawings"
    if len(values) > 1 and statistics.stdev(values) > half / 1.96:
        half, over = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values)), f"{len(values)} seeds"
    return 100 * statistics.fmean(values), 100 * half, over


def interval_of(runs: list[dict], key: str) -> tuple[float, float]:
    """Mean over runs of a figure that has its own `<key>_ci95`, and its 95 % half-width by the rule of `interval`."""
    as_accuracy = [{"test_accuracy": r[key], "ci95": r[f"{key}_ci95"], "num_test_tasks": 0} for r in runs]
    mean, half, _ = interval(as_accuracy)
    return mean / 100, half / 100


def digits_of(half: float) -> int:
    """Digits behind the point that a figure with an interval of this half-width deserves, in per cent."""
    return 1 if half >= 0.15 else 2


def warmed_up(run: dict) -> bool:
    """Whether a run of maml.py began as a prototypical network."""
    return run["script"] == "maml" and run.get("flags", {}).get("warmup_steps", 4000) > 0


def processor(run: dict) -> str:
    """On what a run was timed, such as "1 thread of AMD EPYC"; files that name no processor are of that one."""
    threads = re.search(r"(\d+) threads", run["device"])
    name = run.get("processor", "AMD EPYC").split(",")[0]
    name = re.sub(r"\((R|TM)\)| CPU| Processor| @.*", "", name).strip()
    return f"{threads[1]} thread{'s' * (threads[1] != '1')} of {name}" if threads else run["device"]


def tasks_a_step(run: dict) -> int:
    """The meta-batch: a flag of the run; files without flags tell it by what they trained."""
    if "meta_batch_size" in run.get("flags", {}):
        return run["flags"]["meta_batch_size"]
    return round(run["train_seconds"] * run["tasks_per_second"] / run["steps"])


# ------------------------------------------------------------------------------------ pictures


def new_figure(rows: int, columns: int, size: tuple[float, float], grid: str = "y"):
    """A figure without pyplot (no window system, nothing to close) and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis=grid, color="0.9")
        ax.set_axisbelow(True)
    return figure, axes


def save(figure, path: Path) -> None:
    """PNG; its only metadata is matplotlib's version, so that the same version writes the same bytes."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=100, format="png"))


def draw_lines(ax, out: Path, names: dict[str, str], tag: str, scale: float) -> None:
    """One curve for each {part/name: label}, seed 1."""
    for colour, (name, label) in zip((BLUE, RED, GREEN, PINK, YELLOW, SKY), names.items(), strict=False):
        if (runs := load(out, name)) and tag in runs[0].get("curves", {}):
            steps, values = zip(*runs[0]["curves"][tag], strict=True)
            ax.plot(steps, [scale * v for v in values], color=colour, label=label)
    if ax.lines:
        ax.legend(frameon=False, fontsize=9)
    ax.set_xlabel("training step")


def draw_mann(out: Path) -> None:
    """Figures 3 to 8 of the report (K, N grid), 9 (learning rate) and 10 (memory size)."""
    grid = {f"mann/K{K}N{N}": f"{K}-shot {N}-way" for K, N in ((1, 2), (2, 2), (1, 3), (1, 4))}
    rates = {f"mann/K1N3_rate_{r}": f"learning rate {r}" for r in ("1e-1", "1e-3", "1e-5")}
    sizes = {"mann/K1N3_memory_8": "8 units", "mann/K1N3_rate_1e-3": "128 units", "mann/K1N3_memory_256": "256 units"}
    kinds = {
        "mann/K1N3_rate_1e-3": "two LSTM layers",
        "mann/K1N3_gru": "two GRU layers",
        "mann/K1N3_3_layers": "three LSTM layers",
    }
    sweeps = {
        "learning rate (1-shot 3-way)": rates,
        "memory size (1-shot 3-way)": sizes,
        "recurrent layers (1-shot 3-way)": kinds,
    }
    for file, rows in (("mann.png", {"MANN by shot K and way N": grid}), ("mann_sweeps.png", sweeps)):
        if not any(load(out, name) for names in rows.values() for name in names):
            continue
        figure, axes = new_figure(len(rows), 2, (9, 3.2 * len(rows)))
        for (title, names), (left, right) in zip(rows.items(), axes, strict=True):
            draw_lines(left, out, names, "Accuracy/test", 100)
            draw_lines(right, out, names, "Loss/test", 1)
            left.set(title=title, ylabel="test accuracy (%)")
            right.set(title=title, ylabel="test loss (nats)")
        save(figure, out / file)


def draw_comparison(out: Path) -> None:
    """The slides' bar chart with our other methods beside it, and accuracy before and after adaptation."""
    where = {name: f"comparison/{name}" for name in TITLES}
    where |= {"meta_lstm": "meta_lstm/5way1shot", "mann": "mann/conv_K1N5"}
    found = {name: runs for name in TITLES if (runs := load(out, where[name]))}
    titles = {name: TITLES[name] + " *" * warmed_up(runs[0]) for name, runs in found.items()}
    if found:
        figure, ((ax,),) = new_figure(1, 1, (9, 4))
        for i, (name, runs) in enumerate(found.items()):
            mean, half, _ = interval(runs)
            ax.bar(i + 0.2, mean, 0.38, color=COLOURS[name], yerr=half, capsize=3)
            ax.text(i + 0.2, mean + half + 0.3, f"{mean:.{digits_of(half)}f}", ha="center", fontsize=9)
            on_val = [run["val_accuracy"] for run in runs if run.get("val_accuracy")]
            if on_val:
                ax.bar(i - 0.2, 100 * statistics.fmean(on_val), 0.38, color=COLOURS[name], alpha=0.4)
        low = min(interval(runs)[0] for runs in found.values())
        ax.set_ylim(max(0, low - 8), 100.9)
        ax.set_xticks(range(len(found)), [titles[name].replace(" ", "\n", 1) for name in found], fontsize=9)
        ax.set(title="Omniglot, 5-way 1-shot, new characters: validation (pale) and test", ylabel="accuracy (%)")
        if any("*" in title for title in titles.values()):
            ax.set_xlabel("* after a prototype warm-up", loc="right", fontsize=9)
        save(figure, out / "comparison.png")
    adapted = {name: found[name] for name in ("fomaml", "protomaml", "maml", "anil") if name in found}
    if adapted:
        figure, (axes,) = new_figure(1, 2, (9, 3.4))
        for name, runs in adapted.items():
            for ax, what in zip(axes, ("support", "query"), strict=True):
                steps = range(len(runs[0][f"{what}_accuracy_per_step"]))
                values = [100 * statistics.fmean(run[f"{what}_accuracy_per_step"][i] for run in runs) for i in steps]
                ax.plot(steps, values, "o-", color=COLOURS[name], label=titles[name])
                ax.set(title=f"{what} set", xlabel="inner steps on the support set", ylabel="test accuracy (%)")
                ax.set_xticks(list(steps))
        axes[0].axhline(20, color="0.5", linestyle=":", label="guessing")
        axes[1].axhline(20, color="0.5", linestyle=":")
        axes[0].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.08))  # clear of the line
        if any("*" in titles[name] for name in adapted):
            figure.supxlabel("* after a prototype warm-up", fontsize=9, x=1, ha="right")
        save(figure, out / "adaptation.png")


INNER_LOOPS = {  # rows of MAML whose inner loops are drawn; a broken line: from scratch
    "maml": ("MAML", RED, "-"),
    "fomaml": ("first-order MAML", YELLOW, "-"),
    "protomaml": ("Proto-MAML (f.o.)", GREEN, "-"),
    "anil": ("ANIL", SKY, "-"),
    "maml_scratch": ("MAML", RED, "--"),
    "fomaml_scratch": ("first-order MAML", YELLOW, "--"),
    "protomaml_scratch": ("Proto-MAML (f.o.)", GREEN, "--"),
    "mamlpp_scratch": ("MAML++", PINK, "--"),
}


def inner_loops(out: Path) -> dict[str, dict[str, float | None]]:
    """{row: {layer: its relative update in the inner loop, mean over tasks and seeds}} of the rows that tell it."""
    found = {}
    for name in INNER_LOOPS:
        moved = [
            run["update_norm_per_layer"] for run in load(out, f"comparison/{name}") if "update_norm_per_layer" in run
        ]
        if moved:
            known = {layer: [m[layer] for m in moved if m[layer] is not None] for layer in moved[0]}
            found[name] = {layer: statistics.fmean(some) if some else None for layer, some in known.items()}
    return found


def draw_inner_loop(out: Path) -> None:
    """How far the inner loop moves each layer: one line for each row of MAML that tells it; nothing where none does."""
    if not (found := inner_loops(out)):
        return
    figure, ((ax,),) = new_figure(1, 1, (7, 3.6))
    for name, moved in found.items():
        title, colour, line = INNER_LOOPS[name]
        some = {layer: value for layer, value in moved.items() if value}
        still = [layer for layer, value in moved.items() if value == 0]
        label = title + (", from scratch" if line == "--" else " *") + (" (body: 0)" if still else "")
        places = [list(moved).index(layer) for layer in some]
        ax.plot(places, list(some.values()), f"o{line}", color=colour, label=label)
    ax.set_yscale("log")
    layers = list(next(iter(found.values())))
    ax.set_xticks(range(len(layers)), layers)
    ax.set_xlim(-0.3, len(layers) - 0.7)
    ax.set(title="How far the inner loop moves each layer", ylabel=r"$\|\theta' - \theta\| / \|\theta\|$")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    if any(INNER_LOOPS[name][2] == "-" for name in found):
        figure.supxlabel("* after a prototype warm-up", fontsize=9, x=1, ha="right")
    save(figure, out / "inner_loop.png")


def draw_protonet(out: Path) -> None:
    """Accuracy while ProtoNet trains, and one embedded test task."""
    runs = [found[0] for name in ("protonet", "protonet_long") if (found := load(out, f"comparison/{name}"))]
    if not runs or "curves" not in runs[0]:
        return
    figure, ((left, right),) = new_figure(1, 2, (10, 4))
    for run, colour in zip(runs, (BLUE, RED), strict=False):
        for tag, style in (("Accuracy/val", ":"), ("Accuracy/test", "-")):
            steps, values = zip(*run["curves"][tag], strict=True)
            label = f"{run['steps']:,} steps, {tag.split('/')[1]}"
            left.plot(steps, [100 * v for v in values], style, color=colour, label=label)
    left.legend(frameon=False, fontsize=9)
    left.set(title="5-way 1-shot, one view", xlabel="training step", ylabel="accuracy (%)")
    if episode := runs[-1].get("episode"):
        for c, colour in enumerate((BLUE, RED, GREEN, PINK, YELLOW)):
            mine = [point for point, label in zip(episode["query"], episode["labels"], strict=True) if label == c]
            right.plot(*zip(*mine, strict=True), ".", color=colour)
            right.plot(*episode["support"][c], "*", color=colour, markersize=16, markeredgecolor="black")
    right.set(
        title="a test task: prototypes (stars) and queries",
        xlabel="first principal component",
        ylabel="second principal component",
    )
    right.set_aspect("equal", adjustable="datalim")
    save(figure, out / "protonet.png")


def draw_meta_lstm(out: Path) -> None:
    """The training curves of the meta-LSTM, and what the learned rule does at each update."""
    found = {name: runs[0] for name in ("5way1shot", "5way5shot") if (runs := load(out, f"meta_lstm/{name}"))}
    if not found:
        return
    figure, ((left, middle, right),) = new_figure(1, 3, (11, 3.4))
    for (setting, run), colour in zip(found.items(), (BLUE, RED), strict=False):
        name, B = f"{run['N']}-way {run['K']}-shot", tasks_a_step(run)
        steps, accuracy = zip(*run["curves"]["Accuracy/val"], strict=True)
        left.plot([B * s / 1000 for s in steps], [100 * a for a in accuracy], "o-", ms=3, color=colour, label=name)
        updates = range(1, run["updates"] + 1)
        middle.semilogy(updates, run["rule"]["support_loss"], "o-", ms=3, color=colour)
        middle.semilogy(updates, run["sgd_support_loss"], "s--", ms=3, color=colour)
        if setting == "5way1shot":
            layers = ("conv 1", "conv 2", "conv 3", "conv 4", "head")
            for k, (layer, shade) in enumerate(zip(layers, (SKY, GREEN, YELLOW, PINK, "#000000"), strict=True)):
                lengths = [row[k] for row in run["rule"]["input"]]
                right.plot(updates, lengths, "o-", ms=3, color=shade, label=layer)
    for line, name in (("o-", "learned rule"), ("s--", "gradient descent, same start")):
        middle.plot([], [], line, ms=3, color="#555555", label=name)
    left.set(title="Validation accuracy", xlabel="training episodes (thousands)", ylabel="per cent")
    middle.set(title="Loss on the support set", xlabel="update", ylabel="cross entropy (nats)")
    right.set(title="Input gate, 5-way 1-shot", xlabel="update", ylabel="step length, mean over the layer")
    for ax in (left, middle, right):
        ax.legend(frameon=False, fontsize=8, handlelength=4)
    for ax in (middle, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
    save(figure, out / "meta_lstm.png")


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


def draw_costs(out: Path) -> None:
    """Runtime and memory of an outer step against inner steps, layers and hidden units; vmap's, if it was measured."""
    if not (out / "costs.json").exists() or not (rows := (costs := read(out / "costs.json")).get("rows")):
        return
    engines = {row["engine"] for row in rows}
    engine = "vmap" if "vmap" in engines else sorted(engines)[0]
    save(cost_figure(rows, engine, costs), out / "costs.png")


AXES = {"N": "classes N", "K": "shots K", "Q": "queries Q", "B": "meta-batch B", "side": "pixels a side"}


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


def draw_growth(out: Path) -> None:
    """How a training step of each method grows, as growth_<method>.png."""
    if not (out / "growth.json").exists():
        return
    found = read(out / "growth.json")
    for name, defaults in found["defaults"].items():
        rows, fits = ([row for row in found[key] if row["method"] == name] for key in ("rows", "fits"))
        setting = ", ".join(f"{axis} {value}" for axis, value in defaults.items())
        save(growth_figure(rows, fits, f"{name} around {setting}; {processor(found)}"), out / f"growth_{name}.png")


def draw_adapted(runs: dict[str, dict], path: Path) -> None:
    """Truth, support points, and the function before and after adaptation on test tasks; a row for each method."""
    runs = {method: run for method, run in runs.items() if "examples" in run}
    if not runs:
        return
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
    save(figure, path)


def draw_alias(run: dict, path: Path) -> None:
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
    save(figure, path)


def draw_features(runs: list[dict], path: Path) -> None:
    """One row for each meta-training: test error by the number of points, and the weights over the steps."""
    figure, axes = new_figure(len(runs), 2, (10, 3.6 * len(runs)))
    for (left, right), run in zip(axes, runs, strict=True):
        errors, regression = run["errors"], run["part"] in ("closed_form", "gradient")
        name, value = ("predicting zero", 1.0) if regression else ("guessing", 0.5)
        left.axhline(value, color=GREY, linestyle="--", linewidth=1, label=name)
        left.axvline(run["num_points"], color=GREY, linestyle=":", linewidth=1, label="points in meta-training")
        for kind, label, colour in (
            ("ones", "all weights 1", RED),
            ("meta", "meta-learned", BLUE),
            ("oracle", "oracle (knows S)", GREEN),
        ):
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
    save(figure, path)


def draw_all_features(out: Path) -> None:
    """features_<part>.png for each part in features.json; of one part with other points features_<part>_random.png."""
    runs = read(out / "features.json") if (out / "features.json").exists() else {}
    if "path" in runs.get("alias", {}):
        draw_alias(runs["alias"], out / "features_alias.png")
    of_part: dict[str, list] = {}
    for run in runs.values():
        if "errors" in run:
            of_part.setdefault(run["part"] + "_random" * (run["points"] == "random"), []).append(run)
    for part, some in of_part.items():
        draw_features(some, out / f"features_{part}.png")


TASKS = ("basis", "diseased", "grasping", "sinusoid", "characters")  # of memorization.py
REGULARISERS = ("none", "activations", "weights")
CONDITIONS = {"own": "own support set", "emptied": "emptied", "other": "another task's"}


def draw_memorization(out: Path) -> None:
    """A panel for each task and learner: figures with the own, no, and another task's support set."""
    results = [read(path) for path in sorted(out.glob("memorization/*.json"))]
    tasks = [task for task in TASKS if any(run["task"] == task for run in results)]
    if not tasks:
        return
    figure, axes = new_figure(2, len(tasks), (max(5, 3 * len(tasks)), 5.2))
    for row, learner in zip(axes, ("maml", "blackbox"), strict=True):
        for ax, task in zip(row, tasks, strict=True):
            for i, regulariser in enumerate(REGULARISERS):
                chosen = (task, learner, regulariser)
                runs = [run for run in results if (run["task"], run["learner"], run["regulariser"]) == chosen]
                for j, (condition, colour) in enumerate(zip(CONDITIONS, (BLUE, GREY, RED), strict=True)):
                    for part, shade, aside in (("train", 0.4, -0.06), ("test", 1.0, 0.06)):
                        if runs:
                            mean, half = interval_of(runs, f"{part}_{condition}")
                            place = i + 0.26 * (j - 1) + aside
                            ax.errorbar(place, mean, half, fmt="o", ms=5, color=colour, alpha=shade)
            ax.set_xticks(range(3), ["plain", "activations", "weights"], fontsize=8)
            ax.set_xlim(-0.6, 2.6)
            ax.set_visible(bool(ax.containers))
            kind = next(run["figure"] for run in results if run["task"] == task)
            ax.set_title(f"{task}: {kind}", fontsize=9)
            if kind == "accuracy":
                ax.set_ylim(0, 1.03)
            else:
                ax.set_yscale("log")
        row[0].set_ylabel({"maml": "MAML", "blackbox": "black box"}[learner])
    handles = [axes[0, 0].plot([], [], "o", color=colour)[0] for colour in (BLUE, GREY, RED)]
    figure.legend(handles, CONDITIONS.values(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("regulariser; pale: training tasks", fontsize=9, color="0.4")
    save(figure, out / "memorization.png")


METADATA = {"phase": "the quarter of the phase", "amplitude": "the amplitude, with noise"}


def draw_bayes(out: Path) -> None:
    """Likelihood by number of points, calibration, the bound beside the evidence; functions from the posterior."""
    runs = [run for path in sorted(out.glob("bayes/*_seed1.json")) if (run := read(path))["world"] == "sinusoid"]
    runs.sort(key=lambda run: run["metadata"] != "phase")
    whole = [run for run in runs if not run["drop_phi1"]]
    if not whole:
        return
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
    save(figure, out / "bayes.png")
    if drawn := next((run["functions"] for run in whole if run.get("functions")), None):
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
        figure.supxlabel(f"metadata: {METADATA[whole[0]['metadata']]}", fontsize=9, color="0.4")
        save(figure, out / "bayes_posterior.png")


LABELLED = 50, 200, 1100  # characters whose labels the transformer of mae.py is trained on with
STARTS = {"": ("from scratch", RED), "_from_mae": ("from masked auto-encoding", BLUE)}


def mae_runs(out: Path) -> dict[str, list[dict]]:
    """{row: its seeds} of the runs of mae.py; results/mae/ also holds the runs of protonet.py that start from them."""
    names = sorted({path.stem.rsplit("_seed", 1)[0] for path in out.glob("mae/*_seed*.json")})
    found = {name: load(out, f"mae/{name}") for name in names}
    return {name: runs for name, runs in found.items() if runs[0]["script"] == "mae"}


def few_labels(out: Path) -> dict[int, dict[str, list[dict]]]:
    """{labelled characters: {start: its seeds, none where it is not measured}} of what is measured."""
    found = {n: {start: load(out, f"mae/vit_{n}_characters{start}") for start in STARTS} for n in LABELLED}
    return {n: starts for n, starts in found.items() if any(starts.values())}


def masks(out: Path) -> dict[bool, dict[float, list[dict]]]:
    """{with the second loss?: {masking ratio: its seeds}}; empty unless one of the two is measured at two ratios.

    Of the short runs that are there for this, each curve of one length, and not of the default one.
    """
    curves: dict[bool, dict[float, list[dict]]] = {True: {}, False: {}}
    for name, runs in mae_runs(out).items():
        if name.endswith("_masked"):
            curves[runs[0]["contrast"] > 0][runs[0]["mask_ratio"]] = runs
    curves = {second: dict(sorted(runs_at.items())) for second, runs_at in curves.items() if runs_at}
    return curves if any(len(runs_at) > 1 for runs_at in curves.values()) else {}


def draw_curve(ax, places: list[float], rows: list[list[dict]], colour: str, label: str, aside: float = 1) -> None:
    """Accuracies with their intervals over `places`, times `aside` so that two curves do not cover each other."""
    means, halves = zip(*(interval(runs)[:2] for runs in rows), strict=True)
    places = [place * aside for place in places]
    ax.errorbar(places, means, halves, fmt="o-", ms=5, capsize=3, color=colour, label=label)


def draw_mae(out: Path) -> None:
    """mae_labels.png: accuracy by labelled characters; mae_masks.png: by masking ratio; each where it is measured."""
    frozen = load(out, "mae/mae")
    if found := few_labels(out):
        figure, ((ax,),) = new_figure(1, 1, (7, 3.8))
        for (start, (label, colour)), aside in zip(STARTS.items(), (0.98, 1.02), strict=True):
            if at := {n: starts[start] for n, starts in found.items() if starts[start]}:
                draw_curve(ax, list(at), list(at.values()), colour, f"transformer, {label}", aside)
        if 1100 in found and (conv4 := load(out, "comparison/protonet")):
            draw_curve(ax, [1100], [conv4], GREEN, "Conv4, from scratch")
        if frozen:
            mean, half, _ = interval(frozen)
            ax.axhspan(mean - half, mean + half, color=GREY, alpha=0.25, lw=0)
            ax.axhline(mean, color=GREY, linestyle="--", lw=1, label="frozen features, no label")
        ax.set_xscale("log")
        ax.set_xticks(LABELLED, [f"{n:,}" for n in LABELLED])
        ax.set_xlim(LABELLED[0] / 1.3, LABELLED[-1] * 1.3)
        ax.minorticks_off()
        ax.set(title="Few labels: 5-way 1-shot, new characters", ylabel="test accuracy (%)")
        ax.set_xlabel("training characters with labels")
        ax.legend(frameon=False, fontsize=9)
        save(figure, out / "mae_labels.png")
    if curves := masks(out):
        figure, ((ax,),) = new_figure(1, 1, (7, 3.8))
        for second, runs_at in curves.items():
            label, colour = ("with the second loss", BLUE) if second else ("masked auto-encoding alone", RED)
            label += f", {next(iter(runs_at.values()))[0]['steps']:,} steps"
            draw_curve(ax, [100 * ratio for ratio in runs_at], list(runs_at.values()), colour, label)
        if frozen:
            untrained = interval(frozen, "test_accuracy_untrained")[0]
            ax.axhline(untrained, color=GREY, linestyle="--", lw=1, label="untrained")
        ax.set_xticks(sorted({100 * ratio for runs_at in curves.values() for ratio in runs_at}))
        ax.set(title="Frozen features by masking ratio: 5-way 1-shot, new characters", ylabel="test accuracy (%)")
        ax.set_xlabel("squares hidden (%)")
        ax.legend(frameon=False, fontsize=9)
        save(figure, out / "mae_masks.png")


def reconstructed(out: Path) -> list[dict]:
    """Runs whose completed drawings are shown: first seeds of the auto-encoders alone, by ratio, then of both losses.

    Of both losses the short ones, which only compare ratios, are left out.
    """
    first = [runs[0] for name, runs in mae_runs(out).items() if "alone" in name or not name.endswith("_masked")]
    first = [run for run in first if "reconstruction" in run]
    return sorted(first, key=lambda run: (run["contrast"] > 0, run["mask_ratio"], run["steps"]))


def draw_reconstructions(out: Path) -> None:
    """mae_reconstruction.png: test characters, and of each run what it saw of them and how it completed that."""
    import imageio.v3 as iio
    from matplotlib.figure import Figure

    if not (runs := reconstructed(out)):
        return
    sheets = [iio.imread(base64.b64decode(run["reconstruction"]), extension=".png") for run in runs]
    row = len(sheets[0]) // 3  # a sheet has the rows original, visible, completed
    titles = ["as drawn", *map(reconstruction_title, runs)]
    heights = [1] + [2] * len(runs)
    figure = Figure(figsize=(7.4, 0.85 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights})
    for ax, title, picture in zip(axes, titles, [sheets[0][:row], *(sheet[row:] for sheet in sheets)], strict=True):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        ax.axis("off")
        ax.set_title(title, fontsize=9, loc="left", pad=3)
    save(figure, out / "mae_reconstruction.png")


def reconstruction_title(run: dict) -> str:
    second = "both losses" if run["contrast"] else "masked auto-encoding alone"
    return f"{100 * run['mask_ratio']:.0f} % hidden; {second}, {run['steps']:,} steps"


def draw_plates(path: Path) -> None:
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
    save(figure, path)


def draw_glyphs(path: Path) -> None:
    """Ten of the built-in characters, each by ten drawers."""
    import imageio.v3 as iio

    from load_data import class_sheet, load_dataset

    sheet = class_sheet(load_dataset("glyphs", None, "course", 28))
    write_atomically(path, lambda file: file.write(iio.imwrite("<bytes>", sheet, extension=".png")))


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def draw_tensorboard(out: Path) -> None:
    """A browser's picture of TensorBoard with the accuracy curves of the MANN; nothing where there is no browser."""
    from torch.utils.tensorboard import SummaryWriter

    browser, names = find_browser(), ("K2N2", "K1N2", "K1N3", "K1N4")
    if not browser or not all(load(out, f"mann/{name}") for name in names):
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with SummaryWriter(str(Path(folder) / "runs" / f"hw1_{name}_seed1")) as writer:
                for tag in ("Accuracy/test", "Accuracy/val"):
                    for step, value in load(out, f"mann/{name}")[0]["curves"][tag]:
                        writer.add_scalar(tag, value, step)
        board = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "0", "--load_fast", "false"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            text=True,
        )
        try:
            address = next(m[0] for line in board.stderr if (m := re.search(r"http://\S+:\d+/", line)))
            picture = Path(folder) / "page.png"
            command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1240,600"]
            command += ["--virtual-time-budget=20000", f"--screenshot={picture}", f"{address}#scalars"]
            urllib.request.urlopen(address, timeout=30).close()
            time.sleep(5)  # until TensorBoard has read the files
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            write_atomically(out / "tensorboard.png", lambda file: file.write(picture.read_bytes()))
        finally:
            board.terminate()
            board.wait()


def draw_run(folder: Path) -> Path:
    """The curves of one run as <folder>/figure.png, from its metrics.json."""
    run, path = read(folder / "metrics.json"), folder / "figure.png"
    if run.get("script") == "feature_weights":
        (draw_alias if "path" in run else lambda run, path: draw_features([run], path))(run, path)
        return path
    if "examples" in run:
        draw_adapted({run["method"]: run}, path)
        return path
    curves = {tag: curve for tag, curve in run.get("curves", {}).items() if tag.startswith(("Loss/", "Accuracy/"))}
    if not curves:
        raise UserError(f"--run {folder}: metrics.json holds no curves; name the folder of a training")
    kinds = sorted({tag.split("/")[0] for tag in curves})
    figure, (axes,) = new_figure(1, len(kinds), (4.5 * len(kinds), 3.4))
    for ax, kind in zip(axes, kinds, strict=True):
        for tag, colour in zip(sorted(t for t in curves if t.startswith(kind)), (BLUE, RED, GREEN), strict=False):
            ax.plot(*zip(*curves[tag], strict=True), color=colour, label=tag)
        ax.legend(frameon=False, fontsize=9)
        ax.set(xlabel="training step", ylabel=kind.lower())
    save(figure, path)
    return path


def draw_everything(out: Path) -> None:
    draw_mann(out)
    draw_comparison(out)
    draw_inner_loop(out)
    draw_protonet(out)
    draw_meta_lstm(out)
    draw_costs(out)
    draw_growth(out)
    draw_all_features(out)
    draw_memorization(out)
    draw_bayes(out)
    draw_mae(out)
    draw_reconstructions(out)
    if (out / "costs_train.json").exists():
        draw_adapted(read(out / "costs_train.json"), out / "costs_train.png")
