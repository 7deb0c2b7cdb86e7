"""Masked auto-encoding: what its frozen features are worth, few labels, how much to hide, what it draws."""

from __future__ import annotations

from fewshot.experiment import mean_and_ci95

import base64
from pathlib import Path

from studies.ledger import Case
from studies.results import (
    BLUE,
    GREEN,
    GREY,
    RED,
    Row,
    figure_of,
    interval,
    interval_of,
    load,
    new_figure,
    plain_command,
    table,
    time_of,
    with_interval,
)

# ---------------------------------------------------------------------------------------- recipes

PULSE = (
    "--train_steps 8 --eval_freq 4 --num_val_tasks 20 --num_test_tasks 20 --width 16 --depth 1 --decoder_width 16 "
    "--meta_batch_size 32 --views 2 --whitening_images 100"
)

TASKS = "--num_test_tasks 2000"

CASES = [
    Case("mae", "", "", "--train_steps 30000", seeds=3, minutes=60, beyond=True),
    Case("mae_1000_steps", "", *["--train_steps 1000 --eval_freq 250"] * 2, seeds=3, minutes=18, beyond=True),
    # By what is hidden, shorter: one reading of a drawing costs half of two, and teaches more slowly.
    *[Case(f"{kind}_{ratio}_masked", f"{flags}--mask_ratio 0.{ratio}", f"--train_steps {steps} --eval_freq 200",
           minutes=4, beyond=True)
      for kind, flags, steps in (("mae", "", 200), ("mae_alone", "--contrast 0 ", 600)) for ratio in (25, 50, 75, 90)],
    *[Case(f"vit_{n}_characters", f"--encoder vit --train_characters {n}", TASKS, TASKS, seeds=3, minutes=12,
           beyond=True, script="protonet.py") for n in (50, 200, 1100)],
    # A tenth of the rate: at the usual one the start is forgotten.
    *[Case(f"vit_{n}_characters_from_mae",
           f"--encoder vit --train_characters {n} --learning_rate 0.01 --train_steps 500 --eval_freq 100",
           TASKS, TASKS, seeds=3, minutes=3, beyond=True, start="mae/mae", script="protonet.py")
      for n in (50, 200, 1100)],
]  # fmt: skip

# ---------------------------------------------------------------------------------------- results

ROWS = [
    Row(
        "Masked auto-encoding, 5-way 1-shot, no label in training",
        "mae",
        published="94.9 (Meta-GMVAE, queries together), 88.4 (AAL), on splits of their own",
        front=True,
    ),
]
WAYS = {  # to use the frozen features, and the same of the untrained transformer
    "test_accuracy": "whitened, views",
    "test_accuracy_one_view": "whitened, one view",
    "test_accuracy_plain": "plain",
    "test_accuracy_linear": "linear head",
    "test_accuracy_untrained": "untrained",
    "test_accuracy_untrained_plain": "untrained, plain",
    "probe_accuracy": "probe, all characters",
}
LABELLED = 50, 200, 1100  # characters whose labels the transformer is trained on with
STARTS = {"": ("from scratch", RED), "_from_mae": ("from masked auto-encoding", BLUE)}


def own_runs(out: Path) -> dict[str, list[dict]]:
    """{case: its seeds} of the runs of mae.py; results/mae/ also holds runs of protonet.py that start from them."""
    names = sorted({path.stem.rsplit("_seed", 1)[0] for path in out.glob("mae/*_seed*.json")})
    found = {name: load(out, f"mae/{name}") for name in names}
    return {name: runs for name, runs in found.items() if runs[0]["script"] == "mae"}


def features(out: Path) -> str:
    """Each way to use the frozen features, and the same of the untrained transformer; of runs of mae.py alone."""
    rows, commands = [], []
    for name, runs in own_runs(out).items():
        masked, second = f"{100 * runs[0]['mask_ratio']:.0f} %", "yes" if runs[0]["contrast"] else "no"
        figures = [figure_of(runs, key) for key in WAYS]
        error = f"{runs[0]['test_error']:.2f}" if "test_error" in runs[0] else ""
        end = [interval(runs)[2], len(runs), error, time_of(runs)]
        rows.append([name.replace("_", " "), masked, second, *figures, *end])
        commands.append(plain_command(runs[0]))
    titles = f"mae, course split | masked | second loss | {' | '.join(WAYS.values())} | ± over | seeds "
    return table(titles + "| error on hidden squares | minutes", rows, commands)


def of_labels(out: Path) -> dict[int, dict[str, list[dict]]]:
    """{labelled characters: {start: its seeds, none where it is not measured}} of what is measured."""
    found = {n: {start: load(out, f"mae/vit_{n}_characters{start}") for start in STARTS} for n in LABELLED}
    return {n: starts for n, starts in found.items() if any(starts.values())}


def labels(out: Path) -> str:
    """The transformer trained on with few labels, from scratch and from masked auto-encoding."""
    rows, commands = [], []
    for n, starts in of_labels(out).items():
        cells = []
        for runs in starts.values():
            cells += [figure_of(runs), ", ".join(f"{100 * run['test_accuracy']:.1f}" for run in runs)]
            commands += [plain_command(runs[0])] if runs else []
        conv4 = figure_of(load(out, "protonet/default")) if n == 1100 else ""
        rows.append([f"{n:,}", *cells, gain(*reversed(starts.values())), conv4])
    titles = "labelled characters | from scratch | each seed | from masked auto-encoding | each seed "
    return table(titles + "| gain, paired | Conv4 from scratch", rows, commands)


def gain(new: list[dict], old: list[dict]) -> str:
    """Points by which `new` is better than `old` on the same tasks and seeds; "" where they share no seed.

    Only runs of one kind of device are paired: there were results of a GPU whose test tasks were drawn by the GPU.
    """
    kind = lambda run: (run["seed"], run["device"].startswith("cpu"))
    before = {kind(run): run["accuracies"] for run in old}
    pairs = [(run["accuracies"], before[kind(run)]) for run in new if kind(run) in before]
    differences = [mean_and_ci95([a - b for a, b in zip(*pair, strict=True)]) for pair in pairs]
    if not differences:
        return ""
    mean, half = interval_of([{"gain": mean, "gain_ci95": half} for mean, half in differences], "gain")
    return f"{'+' if mean >= 0 else '-'}{with_interval(100 * abs(mean), 100 * half)}"


def by_ratio(out: Path) -> dict[bool, dict[float, list[dict]]]:
    """{with the second loss?: {masking ratio: its seeds}}; empty unless one of the two is measured at two ratios.

    Of the short runs that are there for this, each curve of one length, and not of the default one.
    """
    curves: dict[bool, dict[float, list[dict]]] = {True: {}, False: {}}
    for name, runs in own_runs(out).items():
        if name.endswith("_masked"):
            curves[runs[0]["contrast"] > 0][runs[0]["mask_ratio"]] = runs
    curves = {second: dict(sorted(runs_at.items())) for second, runs_at in curves.items() if runs_at}
    return curves if any(len(runs_at) > 1 for runs_at in curves.values()) else {}


def pictures(out: Path):
    """Accuracy by labelled characters and by masking ratio; what the networks draw."""
    frozen = load(out, "mae/mae")
    if found := of_labels(out):
        yield "labels", labels_figure(found, frozen, load(out, "protonet/default"))
    if curves := by_ratio(out):
        yield "masks", masks_figure(curves, frozen)
    if runs := reconstructed(out):
        yield "reconstruction", reconstruction_figure(runs)


def draw_curve(ax, places: list[float], rows: list[list[dict]], colour: str, label: str, aside: float = 1) -> None:
    """Accuracies with their intervals over `places`, times `aside` so that two curves do not cover each other."""
    means, halves = zip(*(interval(runs)[:2] for runs in rows), strict=True)
    places = [place * aside for place in places]
    ax.errorbar(places, means, halves, fmt="o-", ms=5, capsize=3, color=colour, label=label)


def labels_figure(found: dict[int, dict[str, list[dict]]], frozen: list[dict], conv4: list[dict]):
    figure, ((ax,),) = new_figure(1, 1, (7, 3.8))
    for (start, (label, colour)), aside in zip(STARTS.items(), (0.98, 1.02), strict=True):
        if at := {n: starts[start] for n, starts in found.items() if starts[start]}:
            draw_curve(ax, list(at), list(at.values()), colour, f"transformer, {label}", aside)
    if 1100 in found and conv4:
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
    return figure


def masks_figure(curves: dict[bool, dict[float, list[dict]]], frozen: list[dict]):
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
    return figure


def reconstructed(out: Path) -> list[dict]:
    """Runs whose completed drawings are shown: first seeds of the auto-encoders alone, by ratio, then of both losses.

    Of both losses the short ones, which only compare ratios, are left out.
    """
    first = [runs[0] for name, runs in own_runs(out).items() if "alone" in name or not name.endswith("_masked")]
    first = [run for run in first if "reconstruction" in run]
    return sorted(first, key=lambda run: (run["contrast"] > 0, run["mask_ratio"], run["steps"]))


def reconstruction_figure(runs: list[dict]):
    """Test characters, and of each run what it saw of them and how it completed that."""
    import imageio.v3 as iio
    from matplotlib.figure import Figure

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
    return figure


def reconstruction_title(run: dict) -> str:
    second = "both losses" if run["contrast"] else "masked auto-encoding alone"
    return f"{100 * run['mask_ratio']:.0f} % hidden; {second}, {run['steps']:,} steps"
