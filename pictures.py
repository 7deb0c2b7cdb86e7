"""Every picture of the documents, drawn from the result files; those of the studies are in study_pictures.py.

The lower half of report.py: it reads `results/**/*.json`, trains nothing and loads no network. The same JSON and
the same matplotlib give the same bytes.
"""

from __future__ import annotations

from experiment import UserError, write_atomically

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

import study_pictures
from evidence import (
    BLUE,
    BY_SIGHT,
    COLOURS,
    GREEN,
    GREY,
    PINK,
    RED,
    SIGHTS,
    SKY,
    TITLES,
    YELLOW,
    case_of,
    digits_of,
    interval,
    load,
    new_figure,
    processor,
    read,
    save,
    tasks_a_step,
    warmed_up,
)


def draw_lines(ax, out: Path, names: dict[str, str], tag: str, scale: float) -> None:
    """One curve for each {METHOD/CASE: label}, seed 1."""
    for colour, (name, label) in zip((BLUE, RED, GREEN, PINK, YELLOW, SKY), names.items(), strict=False):
        if (runs := load(out, name)) and tag in runs[0].get("curves", {}):
            steps, values = zip(*runs[0]["curves"][tag], strict=True)
            ax.plot(steps, [scale * v for v in values], color=colour, label=label)
    if ax.lines:
        ax.legend(frameon=False, fontsize=9)
    ax.set_xlabel("training step")


def draw_mann(out: Path) -> None:
    """Figures 3 to 8 of the report (K, N grid), 9 (learning rate) and 10 (memory size)."""
    grid = {f"hw1/K{K}N{N}": f"{K}-shot {N}-way" for K, N in ((1, 2), (2, 2), (1, 3), (1, 4))}
    rates = {f"hw1/K1N3_rate_{r}": f"learning rate {r}" for r in ("1e-1", "1e-3", "1e-5")}
    sizes = {"hw1/K1N3_memory_8": "8 units", "hw1/K1N3_rate_1e-3": "128 units", "hw1/K1N3_memory_256": "256 units"}
    kinds = {
        "hw1/K1N3_rate_1e-3": "two LSTM layers",
        "hw1/K1N3_gru": "two GRU layers",
        "hw1/K1N3_3_layers": "three LSTM layers",
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


def draw_sights(out: Path) -> None:
    """Accuracy at each sight of a character in a sequence, and what the paper has (Santoro et al. 2016, table 1)."""
    found = [(what, load(out, name), theirs) for what, name, theirs in BY_SIGHT]
    if not any(runs for _, runs, _ in found):
        return
    figure, ((ax,),) = new_figure(1, 1, (6, 3.8))
    for (what, runs, theirs), colour in zip(found, (GREY, PINK), strict=True):
        ax.plot(SIGHTS, theirs, ":o", color=colour, mfc="white", label=f"{what}, the paper")
        if runs:
            curves = [run["accuracy_by_sight"] for run in runs]
            means = [100 * statistics.fmean(values) for values in zip(*curves, strict=True)]
            ax.plot(range(1, len(means) + 1), means, "-o", color=colour, label=f"{what}, ours")
    ax.axhline(20, color="black", lw=0.8, ls="--", label="guessing")
    ax.set(xlabel="sight of a character", ylabel="test accuracy (%)", ylim=(0, 101), xticks=range(1, 11))
    ax.legend(fontsize=8)
    save(figure, out / "sights.png")


def draw_comparison(out: Path) -> None:
    """The slides' bar chart with our other methods beside it, and accuracy before and after adaptation."""
    found = {name: runs for name in TITLES if (runs := load(out, case_of(name)))}
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
    "10way1shot": ("10-way MAML", BLUE, "-"),
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
        moved = [run["update_norm_per_layer"] for run in load(out, f"maml/{name}") if "update_norm_per_layer" in run]
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
    runs = [found[0] for name in ("default", "long") if (found := load(out, f"protonet/{name}"))]
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
    if not browser or not all(load(out, f"hw1/{name}") for name in names):
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with SummaryWriter(str(Path(folder) / "runs" / f"hw1_{name}_seed1")) as writer:
                for tag in ("Accuracy/test", "Accuracy/val"):
                    for step, value in load(out, f"hw1/{name}")[0]["curves"][tag]:
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
        if "path" in run:
            study_pictures.draw_alias(run, path)
        else:
            study_pictures.draw_features([run], path)
        return path
    if "examples" in run:
        study_pictures.draw_adapted({run["method"]: run}, path)
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
    draw_sights(out)
    draw_comparison(out)
    draw_inner_loop(out)
    draw_protonet(out)
    draw_meta_lstm(out)
    study_pictures.draw_costs(out)
    draw_growth(out)
    study_pictures.draw_all_features(out)
    study_pictures.draw_memorization(out)
    study_pictures.draw_bayes(out)
    study_pictures.draw_mae(out)
    study_pictures.draw_reconstructions(out)
    study_pictures.draw_mnist(out)
    if (file := out / "profile_costs" / "costs_train.json").exists():
        study_pictures.draw_adapted(read(file), out / "costs_train.png")
