"""The pictures of the studies: costs, feature weights, memorisation, Bayes, learning without labels.

Like pictures.py it reads `results/**/*.json`, trains nothing and loads no network.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path

from evidence import (
    BLUE,
    COST_COLOURS,
    COST_TITLES,
    GREEN,
    GREY,
    MNIST,
    MNIST_SHOTS,
    PINK,
    RED,
    SWEEPS,
    interval,
    interval_of,
    load,
    new_figure,
    processor,
    read,
    save,
)


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
    file = out / "profile_costs" / "costs.json"
    if not file.exists() or not (rows := (costs := read(file)).get("rows")):
        return
    engines = {row["engine"] for row in rows}
    engine = "vmap" if "vmap" in engines else sorted(engines)[0]
    save(cost_figure(rows, engine, costs), out / "costs.png")


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
    file = out / "feature_weights" / "features.json"
    runs = read(file) if file.exists() else {}
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
        if 1100 in found and (conv4 := load(out, "protonet/default")):
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


def resets(out: Path) -> dict[str, dict[str, dict]]:
    """{images: {start: a run of the 10-way 10-shot meta-LSTM}}: characters and digits, learned and random start."""
    names = {
        "Omniglot": {"learned": "meta_lstm/10way10shot", "random": "meta_lstm/10way10shot_reset"},
        "MNIST": {"learned": "meta_lstm/mnist_10shot", "random": "meta_lstm/mnist_reset_10shot"},
    }
    found = {images: {start: load(out, name) for start, name in of.items()} for images, of in names.items()}
    if not all(runs for of in found.values() for runs in of.values()):
        return {}
    return {images: {start: runs[0] for start, runs in of.items()} for images, of in found.items()}


def draw_mnist(out: Path) -> None:
    """Accuracy of networks of characters on digits, by shots; and what the meta-LSTM's start is worth."""
    curves = []
    for what, name, key, colour in MNIST:
        found = {K: runs for K in MNIST_SHOTS if (runs := load(out, f"{name}{K}shot"))}
        points = [(K, *interval(runs, key)[:2]) for K, runs in found.items()]
        curves += [(what, colour, list(zip(*points, strict=True)))] if points else []
    if not curves:
        return
    found = resets(out)
    figure, ((left, *others),) = new_figure(1, 2 if found else 1, (10 if found else 5, 4))
    for k, (what, colour, (shots, means, halves)) in enumerate(curves):
        places = [shot * 1.02 ** (k - len(curves) / 2) for shot in shots]  # side by side, so that bars can be read
        left.errorbar(places, means, halves, color=colour, marker="o", markersize=4, capsize=2, label=what)
    left.set_xscale("log")
    left.set_xticks(MNIST_SHOTS, map(str, MNIST_SHOTS))
    left.minorticks_off()
    left.set(title="MNIST, 10 classes", xlabel="images of each class", ylabel="accuracy (%)")
    left.legend(frameon=False, fontsize=8)
    for right in others:
        groups = [(images, start) for images in found for start in found[images]]
        for k, (label, kind, colour) in enumerate(
            (("learned rule", "", "#000000"), ("gradient descent", "_sgd", GREY))
        ):
            runs = [found[images][start] for images, start in groups]
            values, halves = ([100 * run[f"{key}{kind}"] for run in runs] for key in ("test_accuracy", "ci95"))
            places = [place + 0.38 * (k - 0.5) for place in range(len(runs))]
            right.bar(places, values, 0.36, yerr=halves, color=colour, capsize=2, label=label)
        right.set_xticks(range(len(groups)), [f"{images}\n{start} start" for images, start in groups])
        right.axhline(10, color="0.5", linestyle=":", linewidth=1)
        right.set(title="meta-LSTM, 10-way 10-shot (dotted: guessing)", ylabel="accuracy (%)", ylim=(0, 115))
        right.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    save(figure, out / "mnist.png")
