"""What the studies found: costs of meta-learning, feature weights, memorisation, Bayes, learning without labels.

A part of report.py: every function reads `results/**/*.json` and gives Markdown.
"""

from __future__ import annotations

from experiment import mean_and_ci95

import math
import statistics
from pathlib import Path

import study_pictures
from evidence import COST_TITLES, MNIST, MNIST_SHOTS, SWEEPS, interval, interval_of, load, processor, read
from tables import device_notes, figure_of, minutes, plain_command, table, with_interval

# What the documents say of the feature weights: (what, weights, training points, their test error)
FEATURE_CLAIMS = [
    ("weights 1", "ones", 32, "0.95"),
    ("oracle", "oracle", 32, "1e-30"),
    ("meta-learned", "meta", 32, "0.31"),
    ("meta-learned", "meta", 31, "0.45"),
    ("meta-learned", "meta", 33, "0.39"),
]
COST_CLAIMS = [("maml", "grows linearly"), ("es", "does not grow")]  # peak memory with the inner steps


def growth(f: dict, unit: str) -> str:
    """A fit of costs.json in words: a line a + b x, or a power x^b."""
    if f["form"] == "power":
        return f"x^{f['b']:.2f}"
    if abs(f["b"]) < 1e-9:
        return f"{f['a']:.1f} {unit}, flat"
    return f"{f['a']:.1f} {'+' if f['b'] > 0 else '-'} {abs(f['b']):.2f} x {unit}"


def other_rows(out: Path) -> list[list[str]]:
    """What the documents say about costs and feature weights beside what we measured: the cells of each row."""
    rows = []
    if (file := out / "profile_costs" / "costs.json").exists():
        costs = read(file)
        found = {f["method"]: f for f in costs["fits"] if (f["sweep"], f["engine"]) == ("inner_steps", "vmap")}
        for method, claim in COST_CLAIMS:
            what = f"{COST_TITLES[method]}, peak memory with x inner steps"
            rows.append([what, claim, growth(found[method]["memory"], "MB"), f"`{plain_command(costs)}`"])
    if (file := out / "feature_weights" / "features.json").exists() and "closed_form" in (results := read(file)):
        run = results["closed_form"]
        for what, weights, points, claim in FEATURE_CLAIMS:
            what = f"Feature weights, test error at {points} points, {what}"
            if str(points) in run[weights]:
                rows.append([what, claim, f"{run[weights][str(points)]:#.2g}", f"`{plain_command(run)}`"])
    return rows


def costs_text(out: Path) -> str:
    """How MAML's and ES's costs grow, where ES is the dearer one, and what its gradient is worth."""
    costs = read(out / "profile_costs" / "costs.json")
    fits, rows = [f for f in costs["fits"] if f["engine"] == "vmap"], costs["rows"]
    cells = [
        [
            SWEEPS[f["sweep"]],
            COST_TITLES[f["method"]],
            growth(f["runtime"], "ms"),
            f"{f['runtime']['r2']:.3f}",
            growth(f["memory"], "MB"),
            f"{f['memory']['r2']:.3f}",
        ]
        for f in fits
    ]
    first = rows[0]
    lines = [
        *table("engine `vmap`, x = | method | runtime | R² | peak memory | R²", cells),
        "",
        f"Medians on {processor(costs)}, {first['meta_batch_size']} tasks; ES compares {first['num_perturbations']} "
        "perturbed networks, so both adapt the same number of them. With x^b twice the units cost 2^b times as much. "
        f"Command: `{plain_command(costs)}`.",
        "",
    ]
    large = [row for row in rows if (row["sweep"], row["hidden_dim"]) == ("hidden_dim", 512)]
    cells = [
        [COST_TITLES[row["method"]], row["engine"], f"{1e3 * row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.1f}"]
        for row in large
        if row["method"] in ("maml", "es")
    ]
    lines += [*table("at 512 units | engine | ms | MB", cells), "", dearer_text(costs), "", cosine_text(costs)]
    if (out / "profile_costs" / "costs_train.json").exists():
        lines += ["", training_text(read(out / "profile_costs" / "costs_train.json"))]
    return "\n".join(lines)


def dearer_text(costs: dict) -> str:
    """The settings at which ES costs more than MAML, by engine and kind of cost."""
    parts = []
    for engine in ("vmap", "loop"):
        total = sum((row["method"], row["engine"]) == ("es", engine) for row in costs["rows"])
        for what, word in (("seconds", "time"), ("peak_bytes", "memory")):
            found = [d for d in costs["es_dearer"] if (d["engine"], d["what"]) == (engine, what)]
            at = ", ".join(f"{SWEEPS[d['sweep']]} {d['value']}: {d['es'] / d['maml']:.2f} times" for d in found)
            parts.append(f"{word}, engine `{engine}`: {len(found)} of {total}" + (f" ({at})" if at else ""))
    return "Points of the sweeps at which ES costs more than MAML: " + "; ".join(parts) + "."


def cosine_text(costs: dict) -> str:
    """What the estimate is worth, also at the number of perturbations that takes as long as MAML's exact gradient."""
    found = costs["es_cosine"]
    if not found:
        return "The cosine of the ES estimate was not measured."
    shown = ", ".join(f"{c['cosine']:.3f} with {c['perturbations']} ({c['expected']:.3f})" for c in found)
    D, m = found[0]["parameters"], found[0]["disagreement"]
    base = {"sweep": "inner_steps", "engine": "vmap", "inner_steps": 5}
    at = [row for row in costs["rows"] if base.items() <= row.items()]
    text = (
        "Cosine between the ES estimate and the exact meta-gradient at the initialisation by the number of perturbed "
        f"networks, at {D:,} parameters, 5 inner steps and m = {m:.1f} (what the formula below expects): {shown}."
    )
    if at:
        maml, es = (next(row for row in at if row["method"] == method) for method in ("maml", "es"))
        pairs = es["num_perturbations"] / 2 * maml["seconds"] / es["seconds"]
        text += (
            f" In the time of one MAML step ES can compare {2 * pairs:.0f} networks; the cosine to expect of them is "
        )
        text += f"{(1 + m * (D + 1) / pairs) ** -0.5:.3f}."
    return text


def training_text(runs: dict) -> str:
    parts = [
        f"{COST_TITLES[method]} {run['test_loss']:.4f} ± {run['ci95']:.4f} (before adaptation "
        f"{run['test_loss_before']:.3f}) after {run['steps']} outer steps"
        for method, run in runs.items()
    ]
    run = next(iter(runs.values()))
    return (
        f"Trained (`{plain_command(run)}`), mean squared error on {run['num_test_tasks']} test tasks after "
        f"{run['inner_steps']} inner steps: " + "; ".join(parts) + "."
    )


def features_text(out: Path) -> str:
    """The homework's questions on feature weights, each answered in two sentences."""
    r = read(out / "feature_weights" / "features.json")
    d, e, adam = r["alias"], r["closed_form"], r["closed_form_adam"]
    five, one, g, h = r["gradient_5_steps"], r["gradient_1_steps"], r["classification"], r["logistic_10_steps"]
    random, n = r["closed_form_random"], e["num_points"]
    at = lambda run, name="meta", m=n: f"{run[name][str(m)]:#.2g}"
    percent = lambda run, name="meta", m=n: f"{100 * run[name][str(m)]:.1f} ± {100 * run['ci95'][name][str(m)]:.1f} %"
    span = lambda run, k: f"{run['weights'][k]['min']:.2f} to {run['weights'][k]['max']:.2f}"
    excess = max(abs(end[0]) / norm - 1 for end, norm in zip(d["end"], d["norm"], strict=True))
    never = "never worse than" if e["at_most_ones_from"] == 1 else "not always better than"
    seconds = sum(run.get("train_seconds", 0) for run in r.values() if run is not random)
    return f"""\
- **(d) Where does gradient descent on c end, and where does beta go?** From c = (1, 1), of norm {d["norm"][0]:.4f},
  it ends at ({d["end"][0][0]:.4f}, {d["end"][0][1]:.0e}) with beta = ({d["beta"][0][0]:.4f},
  {d["beta"][0][1]:.0e}): the limits are (‖c⁽⁰⁾‖, 0) and (1/‖c⁽⁰⁾‖, 0), or their negatives for a start with c_0
  below 0. The gradient is at a right angle to c, so that only the finite step lengthens c, here by at most
  {100 * excess:.2f} % over {len(d["norm"])} starts; the tests let the step go to 0 and find the limit to 1e-6.
- **(e) How do the errors compare at {n} grid points?** All weights 1: {at(e, "ones")}, where predicting zero gives
  1; meta-learned: {at(e)} after {e["train_steps"]} SGD steps and {at(adam)} with Adam; the oracle:
  {at(e, "oracle")}, zero up to rounding. The meta-learned weights are {never} weights 1 at any number of points
  from 1 to {2 * n}, but off the training grid SGD's beat Adam's ({at(e, m=n - 1)} against {at(adam, m=n - 1)} at
  {n - 1}), whose weights in S rose less.
- **(e) Why does the error dip at {n}, below {n - 1} and {n + 1} ({at(e, m=n - 1)} and {at(e, m=n + 1)})?**
  Meta-training on {n} grid points only takes weight from the features that look like one in S on just that grid,
  frequencies within 5 of a multiple of {n}; of the aliases on {n - 1} and {n + 1} points
  {100 * e["untrained_aliases"][str(n - 1)]:.0f} and {100 * e["untrained_aliases"][str(n + 1)]:.0f} % are others,
  which still weigh 1. At {2 * n} points all aliases are among the trained ones again, so the error falls once more,
  to {at(e, m=2 * n)}.
- **(e) How do the weights change, and why does that help?** With SGD the weights in S rise from 1 to
  {span(e, "S")}, those of the aliases fall to {span(e, "aliases")} and those of all others stay at 1 (with Adam the
  aliases fall to {span(adam, "aliases")}). An alias takes the share c_k² of a coefficient's sum of c², so that a
  heavy true feature among light aliases keeps nearly all of it.
- **(e) And with uniformly random training points?** No feature is an exact alias then, so all outside S lose a
  little weight ({span(random, "others")}; in S {span(random, "S")}). It helps less and has no dip: {at(random)} at
  {n} points (weights 1: {at(random, "ones")}), {at(random, m=n - 1)} and {at(random, m=n + 1)} beside it.
- **(f) Does meta-learning help with 5 gradient steps as inner loop?** Yes, as much as the closed form: {at(five)}
  at {n} points (weights 1: {at(five, "ones")}). The fixed inner step is too long for few points; from
  {five["at_most_ones_from"]} points on the meta-learned weights are never worse than weights 1.
- **(f) Does one step still work?** Yes, {at(one)} at {n} points (weights 1: {at(one, "ones")}), with no dip to
  speak of: {at(one, m=n - 1)} at {n - 1} points. On a grid the features in S are orthogonal, so one step of the
  right length is exact, and the weights themselves set that length: in S they rise to {span(one, "S")}, and
  {(2 * one["inner_lr"]) ** -0.5:.2f} would be exact (the oracle has it: {at(one, "oracle")}).
- **(g) Are the weights useful when labels are signs and the code is that of regression?** Yes: {percent(g)} wrong
  signs at {n} points, against {percent(g, "ones")} with weights 1 and {percent(g, "oracle")} with the oracle. At
  {2 * n} points they beat the oracle ({percent(g, m=2 * n)} against {percent(g, "oracle", 2 * n)}): a sign function
  has overtones outside S, and features there gain weight too (up to {g["weights"]["others"]["max"]:.2f}).
- **(h) And with logistic regression as inner loop?** {h["num_gd_steps"]} logistic steps give {percent(h)} wrong
  signs at {n} points, against {percent(h, "ones")} with weights 1 and {percent(h, "oracle")} with the oracle. At
  {2 * n} points it is {percent(h, m=2 * n)} against {percent(h, "oracle", 2 * n)}; the two parts have their own
  learning rates, so (g) and (h) do not rank the two losses.

Seed {e["seed"]}, mean over {e["num_test_tasks"]} test tasks ({random["num_test_tasks"]} with random points), ± 95 %
interval;
{seconds:.0f} seconds of meta-training in all for the parts on a grid ({processor(e)}).
Command: `{plain_command(e)}`; random points: `{plain_command(random)}`."""


def memorization_table(out: Path) -> str:
    """A row for each task, learner and regulariser; accuracies in per cent, squared errors as they are."""
    results, rows = [read(path) for path in sorted(out.glob("memorization/*.json"))], []
    for task in study_pictures.TASKS:
        for learner in ("maml", "blackbox"):
            for regulariser in study_pictures.REGULARISERS:
                chosen = (task, learner, regulariser)
                runs = [run for run in results if (run["task"], run["learner"], run["regulariser"]) == chosen]
                cells = [
                    interval_of(runs, f"{part}_{condition}")
                    for part in ("train", "test")
                    for condition in study_pictures.CONDITIONS
                    if runs
                ]
                if runs and runs[0]["figure"] == "accuracy":
                    rows.append([*chosen, len(runs), *(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in cells)])
                elif runs:
                    rows.append([*chosen, len(runs), *(f"{mean:.3f} ± {half:.3f}" for mean, half in cells)])
    if not rows:
        return "Not measured."
    titles = "task | learner | regulariser | seeds | train, own | train, emptied | train, other "
    seconds = [run["train_seconds"] for run in results]
    return "\n".join(
        [
            *table(titles + "| test, own | test, emptied | test, other", rows),
            "",
            "The commands: `python memorization.py --task sinusoid --learner maml --regulariser weights "
            f"--random_seed 1` with what the row says, and seeds from 1; {min(seconds):.0f} to {max(seconds):.0f} "
            f"seconds of training on {processor(results[0])}, upper bounds, for the machine was busy.",
        ]
    )


def bayes_tables(out: Path) -> str:
    """For each setting: negative log likelihood by points with and without metadata, the paired gain, coverage."""
    settings: dict[tuple, list[dict]] = {}
    for run in [read(path) for path in sorted(out.glob("bayes/*.json"))]:
        known = run["metadata"] if run["world"] == "sinusoid" else "alphabet"
        settings.setdefault((run["world"], known, run["drop_phi1"]), []).append(run)
    lines: list[str] = []
    for (world, known, dropped), runs in sorted(settings.items(), key=lambda item: (item[0][2], item[0])):
        rows, first = [], runs[0]
        for i, n in enumerate(first["points"]):

            def at(key, i=i, runs=runs):
                return interval_of([{name: run[name][i] for name in (key, f"{key}_ci95")} for run in runs], key)

            pairs = ["{:.3f} ± {:.3f}".format(*at(key)) for key in ("nll_with", "nll_without", "gain")]
            covered = [
                f"{100 * at(key)[0]:.1f}" if key in first else "" for key in ("coverage90_with", "coverage90_without")
            ]
            rows.append([n, *pairs, *covered, *(f"{at(key)[0]:.2f}" for key in ("bound_with", "evidence_with"))])
        what = f"{world}, metadata {known}, {'terms of phi1 dropped' if dropped else 'whole bound'}"
        titles = "points | NLL with | NLL without | gain, paired | 90 % covers, with | without | bound | evidence"
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
        lines += [f"{what}, {seeds}, {first['num_test_tasks']:,} test tasks, `{plain_command(first)}`:", ""]
        lines += [*table(titles, rows), ""]
    return "\n".join(lines).rstrip() or "Not measured."


def mae_table(out: Path) -> str:
    """Each way to use the frozen features, and the same of the untrained transformer; of runs of mae.py alone."""
    ways = {
        "test_accuracy": "whitened, views",
        "test_accuracy_one_view": "whitened, one view",
        "test_accuracy_plain": "plain",
        "test_accuracy_linear": "linear head",
        "test_accuracy_untrained": "untrained",
        "probe_accuracy": "probe, all characters",
    }
    rows, commands = [], []
    found = study_pictures.mae_runs(out)
    on, marks = device_notes([processor(runs[0]) for runs in found.values()])
    for name, runs in found.items():
        figures = [figure_of(runs, key) if key in runs[0] else "" for key in ways]
        masked, second = f"{100 * runs[0]['mask_ratio']:.0f} %", "yes" if runs[0]["contrast"] else "no"
        rows.append([name.replace("_", " "), masked, second, *figures, interval(runs)[2], len(runs), minutes(runs)])
        commands.append(f"- `{plain_command(runs[0])}`")
    titles = f"mae, course split | masked | second loss | {' | '.join(ways.values())} | ± over | seeds | minutes"
    if not rows:
        return "Not measured."
    note = f"Minutes of training of one seed{on}; of several seeds the mean. Commands:"
    rows = [[*row[:-1], row[-1] + mark] for row, mark in zip(rows, marks, strict=True)]
    return "\n".join([*table(titles, rows), "", note, "", *commands])


def mae_lessons(out: Path) -> str:
    """What the default's figures teach, beside those of a network that was told every label."""
    if not (runs := load(out, "mae/mae")):
        return ""
    of = lambda name, key="test_accuracy": statistics.fmean(100 * run[key] for run in load(out, name))
    more = lambda a, b: f"{of('mae/mae', a) - of('mae/mae', b):.1f}"
    ours, bare, head, probe, untrained, bare_untrained = (
        figure_of(runs, key)
        for key in (
            "test_accuracy",
            "test_accuracy_plain",
            "test_accuracy_linear",
            "probe_accuracy",
            "test_accuracy_untrained",
            "test_accuracy_untrained_plain",
        )
    )
    whitening = more("test_accuracy_one_view", "test_accuracy_plain")
    views = more("test_accuracy", "test_accuracy_one_view")
    both = more("test_accuracy_untrained", "test_accuracy_untrained_plain")
    drawings = 20 - runs[0]["flags"]["held_out"]
    lines = [
        "- **Is the architecture enough?** No. The same transformer with random weights, whitened and averaged alike,",
        f"  answers {untrained} %, trained without a label {ours} %. Without whitening and views it is",
        f"  {bare_untrained} % and {bare} %.",
        f"- **What do whitening and views add?** {whitening} and {views} points; to random weights together {both}.",
        f"- **Prototypes or a linear head?** With one drawing a class {ours} % and {head} %. A linear head for all",
        f"  test characters at once, from {drawings} drawings of each, is right in {probe} % of cases.",
    ]
    if load(out, "protonet/default"):
        points = of("protonet/default") - of("mae/mae")
        lines += [
            "- **What would labels be worth?** The default ProtoNet, told the label of every training drawing, answers",
            f"  {figure_of(load(out, 'protonet/default'))} %: {abs(points):.1f} points "
            f"{'more' if points > 0 else 'less'}.",
        ]
    return "\n".join(lines)


def few_labels_text(out: Path) -> str:
    """The transformer trained on with few labels, from scratch and from masked auto-encoding; nothing where neither."""
    found, rows, commands = study_pictures.few_labels(out), [], []
    if not found:
        return ""
    for n, starts in found.items():
        cells = []
        for runs in starts.values():
            seeds = ", ".join(f"{100 * run['test_accuracy']:.1f}" for run in runs)
            cells += [figure_of(runs) if runs else "", seeds]
            commands += [f"- `{plain_command(runs[0])}`"] if runs else []
        conv4 = load(out, "protonet/default") if n == 1100 else []
        rows.append([f"{n:,}", *cells, gain(*reversed(starts.values())), figure_of(conv4) if conv4 else ""])
    some = next(runs for starts in found.values() for runs in starts.values() if runs)
    titles = "labelled characters | from scratch | each seed | from masked auto-encoding | each seed "
    titles += "| gain, paired | Conv4 from scratch"
    lines = [
        "## Few labels",
        "",
        "The transformer is trained on as a prototypical network (`protonet.py --encoder vit`) with the labels of the",
        "first 50, 200 or all 1,100 training characters: from random weights, and from those of the masked",
        "auto-encoder, which saw every training drawing and no label.",
        "",
        *table(titles, rows),
        "",
        f"5-way 1-shot, accuracy in per cent on {some[0]['num_test_tasks']:,} test tasks, ± 95 % interval over them or",
        "over the seeds where they differ by more; the gain, in points, is that on the same tasks and seeds. Conv4 is",
        "the default ProtoNet. Commands (RUN_DIR: a run of `mae.py` with the same seed):",
        "",
        *dict.fromkeys(commands),
        *few_labels_lesson(out, found),
        "",
        "![accuracy by the number of labelled characters](../results/mae_labels.png)",
    ]
    return "\n".join(lines)


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


def few_labels_lesson(out: Path, found: dict[int, dict[str, list[dict]]]) -> list[str]:
    """The lines on what the labels and the start are worth, from what is measured of them."""
    gains = {n: gain(*reversed(starts.values())) for n, starts in found.items()}
    parts = ", ".join(f"{points} points with {n:,}" for n, points in gains.items() if points)
    lines = ["", f"What the start without labels is worth: {parts} labelled characters."] if parts else []
    for n, starts in found.items():
        if starts["_from_mae"] and "Accuracy/val" in (curves := starts["_from_mae"][0].get("curves", {})):
            (first, begin), *rest = curves["Accuracy/val"]
            step, lowest = min(rest, key=lambda point: point[1], default=(first, begin))
            if lowest < begin - 0.02:
                lines += [
                    f"With {n:,} the start is lost on the way: validation accuracy is {100 * begin:.1f} % at step "
                    f"{first:,} of that training and {100 * lowest:.1f} % at step {step:,}."
                ]
    if frozen := load(out, "mae/mae"):
        mean, half, _ = interval(frozen)
        verdicts: dict[str, list[str]] = {"more than": [], "within the intervals of": [], "less than": []}
        for n, starts in found.items():
            if starts[""]:
                other, its_half, _ = interval(starts[""])
                apart = abs(mean - other) > math.hypot(half, its_half)
                verdict = "within the intervals of" if not apart else "more than" if mean > other else "less than"
                verdicts[verdict].append(f"{n:,}")
        text = "; ".join(f"{verdict} {' and '.join(ns)}" for verdict, ns in verdicts.items() if ns)
        if text:
            lines += [
                "",
                f"The frozen features, without a label, answer {with_interval(mean, half)} %; beside training from "
                f"scratch, by labelled characters: {text}.",
            ]
    return lines


def masks_text(out: Path) -> str:
    """The best masking ratio with and without the second loss, and the picture; nothing where one ratio is measured."""
    if not (curves := study_pictures.masks(out)):
        return ""
    parts = []
    for second, runs_at in curves.items():
        figure = lambda ratio, runs_at=runs_at: f"{figure_of(runs_at[ratio])} % at {100 * ratio:.0f} %"
        best = max(runs_at, key=lambda ratio, runs_at=runs_at: interval(runs_at[ratio])[0])
        worst = min(runs_at, key=lambda ratio, runs_at=runs_at: interval(runs_at[ratio])[0])
        parts.append(f"{'with' if second else 'without'} the second loss best {figure(best)} masked")
        parts[-1] += f", worst {figure(worst)}" if best != worst else ""
    lines = [
        "## How much to hide",
        "",
        f"Test accuracy of short runs by the share of squares that is hidden: {'; '.join(parts)}.",
        "The default's share was chosen on validation characters, before these runs.",
        "",
        "![accuracy by masking ratio](../results/mae_masks.png)",
    ]
    return "\n".join(lines)


def reconstructions_text(out: Path) -> str:
    """The picture of what the networks draw, where a run has kept its drawings."""
    if not (runs := study_pictures.reconstructed(out)):
        return ""
    errors = [f"{run['test_error']:.2f} ({study_pictures.reconstruction_title(run)})" for run in runs]
    lines = [
        "## What it draws",
        "",
        "Twelve test characters, none of them seen in training; for each network what it saw (grey: hidden) and how it",
        "completed that. A completed square borrows its true mean and variance, so what the network draws is the shape",
        "of the stroke in it, and an empty square stays empty.",
        "",
        "![test characters, hidden squares, and what networks made of them](../results/mae_reconstruction.png)",
        "",
        f"Squared error on the hidden squares of 500 test drawings: {'; '.join(errors)}.",
    ]
    return "\n".join(lines)


def mnist_text(out: Path) -> str:
    """Accuracy on MNIST's digits of networks that learned from characters, and what became of the report's try."""
    rows, names = [], []
    for what, name, key, _ in MNIST:
        found = {K: load(out, f"{name}{K}shot") for K in MNIST_SHOTS}
        if not (measured := [runs for runs in found.values() if runs]):
            continue
        rows.append([what, *(figure_of(found[K], key) if found[K] else "" for K in MNIST_SHOTS), len(measured[0])])
        names.append(f"`{name}`")
    if not rows:
        return "(not measured yet)"
    lines = table(" | ".join(["10-way, %", *(f"{K}-shot" for K in MNIST_SHOTS), "seeds"]), rows)
    but = " but in the transductive row" if any("transductive" in row[0] for row in rows) else ""
    lines += [
        "",
        "± is the 95 % interval over 600 tasks, or over the seeds where they differ by more: training fixes what a",
        "network makes of characters far better than what it makes of digits.",
        f"No query influences another{but}.",
        "Command of a row, which trains first what it tests: `python reproduce.py all --only NAME`, where",
        f"NAME is, row by row, {', '.join(names)}.",
        "",
        "![accuracy on MNIST by shots](../results/mnist.png)",
    ]
    return "\n".join([*lines, *reset_lesson(out)])


def reset_lesson(out: Path) -> list[str]:
    """Whether the learned rule alone, without its start, learns digits and characters; and with fewer shots."""
    if not (found := study_pictures.resets(out)):
        return []
    of = lambda images, start, kind="": with_interval(
        100 * found[images][start][f"test_accuracy{kind}"], 100 * found[images][start][f"ci95{kind}"]
    )
    lines = [
        "",
        "**The report's attempt.** It kept the learned update rule, began from random weights (`--reset_theta0`) and",
        "did not succeed on MNIST. With as many shots as the rule was learned with it does: at 10 shots it gives",
        f"{of('MNIST', 'random')} %, gradient descent, as long, from the same weights {of('MNIST', 'random', '_sgd')},",
        f"the rule from its learned start {of('MNIST', 'learned')}; on Omniglot's test characters random and learned",
        f"start give {of('Omniglot', 'random')} and {of('Omniglot', 'learned')} %.",
    ]
    one = [load(out, f"meta_lstm/mnist_{start}1shot") for start in ("", "reset_")]
    if all(one) and all(runs[0]["test_accuracy"] < runs[0]["test_accuracy_sgd"] for runs in one):
        rule, descent = ([figure_of(runs, f"test_accuracy{kind}") for runs in one] for kind in ("", "_sgd"))
        lines += [
            f"What defeats the rule is fewer shots, from either start: with one, {rule[0]} % from the learned and",
            f"{rule[1]} % from random weights, where gradient descent gives {descent[0]} and {descent[1]} %. It was",
            "learned on tasks of 100 images and does not carry over to ten. What does succeed is as many shots as it",
            "was learned with, from either start; or, with fewer, to compare features, as the first rows do.",
        ]
    return lines
