"""Write the tables of the README from the committed result files; nothing in them is typed by hand.

python results/table.py            rewrites README.md between its markers
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
import reproduce  # noqa: E402

README = RESULTS.parent / "README.md"
# setting -> what the course or the slides report, and the best published figure where there is one
MANN = {"K1N2": "above 90", "K2N2": "above 90", "K1N3": "about 80", "K1N4": "about 70", "conv_K1N5": "not tried"}


def load(name: str) -> list[dict]:
    return reproduce.load(RESULTS, name)


def of_seeds(runs: list[dict], key: str = "test_accuracy") -> str:
    """Mean over seeds in per cent with its 95 % interval, as text."""
    return reproduce.with_interval(*reproduce.mean_of_seeds(runs, key))


def mann_table() -> str:
    rows = ["| MANN, course split | course | ours | each seed | queries asked alone | minutes |", "|---" * 6 + "|"]
    for setting, course in MANN.items():
        runs = load(f"mann/{setting}")
        if not runs:
            continue
        seeds = ", ".join(f"{100 * r['test_accuracy']:.1f}" for r in runs)
        minutes = sum(r["train_seconds"] for r in runs) / len(runs) / 60
        ours = of_seeds(runs)
        alone = of_seeds(runs, "test_accuracy_alone")
        first = runs[0]
        name = f"{first['K']}-shot {first['N']}-way" + (", conv encoder" if "conv" in setting else "")
        rows.append(f"| {name} | {course} | {ours} | {seeds} | {alone} | {minutes:.0f} |")
    runs = load("mann/K1N2")
    return "\n".join(rows) + (
        f"\n\nTest accuracy in per cent, mean of {len(runs)} seeds ± 95 % interval over "
        f"{runs[0]['num_test_tasks']} fixed tasks each; minutes of training on one of two CPU cores, both busy. "
        "Command of the first row:\n"
        f"`{reproduce.plain_command(runs[0])}`."
    )


def mann_answers() -> str:
    """The homework's questions on the MANN, answered by our runs."""
    def figure(name: str, key: str = "test_accuracy") -> str:
        return of_seeds(load(f"mann/{name}"), key)

    names = ("rate_1e-1", "rate_1e-3", "rate_1e-5", "memory_8", "memory_256", "gru", "3_layers")
    swept = {name: figure(f"K1N3_{name}") for name in names if load(f"mann/K1N3_{name}")}
    lines = [f"- **More classes?** Harder: {figure('K1N2')} with 2, {figure('K1N3')} with 3, {figure('K1N4')} with 4 "
             "classes at one shot. There are more labels to tell apart and more images to keep in mind.",
             f"- **More shots?** Easier: {figure('K2N2')} with 2 images of each of 2 classes, {figure('K1N2')} with "
             "one. Asked alone, without the hint that the queries are one of each class, it is "
             f"{figure('K2N2', 'test_accuracy_alone')} and {figure('K1N2', 'test_accuracy_alone')}."]  # fmt: skip
    if len(swept) == 7:
        run = load("mann/K1N3_rate_1e-3")[0]
        lines += [
            "- **Which learning rate?** 1-shot 3-way with the course's network and recipe, "
            f"{run['steps']} steps: {swept['rate_1e-1']} at 1e-1, {swept['rate_1e-3']} at 1e-3, "
            f"{swept['rate_1e-5']} at 1e-5, where guessing gives 33.3.",
            f"- **How much memory?** The same with 8, 128 and 256 units: {swept['memory_8']}, {swept['rate_1e-3']} and "
            f"{swept['memory_256']}.",
            f"- **Which layers?** The same with two GRU layers: {swept['gru']}, with three LSTM layers: "
            f"{swept['3_layers']}. Command of the first: `{reproduce.plain_command(run)}`.",
        ]  # fmt: skip
    return "\n".join(lines)


def short_table(words: tuple[str, ...] = ("",), command: bool = False) -> str:
    """The measured lines of the results table whose name starts with one of `words`."""
    rows = [row for row in reproduce.claim_rows(RESULTS) if row["what"].startswith(words) and row["tasks"]]
    lines = ["| test accuracy in % | documents | published | ours | each seed | minutes |", "|---" * 6 + "|"]
    for row in rows:
        cells = [row[k] for k in ("what", "documents", "published", "ours", "seeds", "minutes")]
        lines.append(f"| {' | '.join(cells)} |")
    if command:
        lines += ["", "Commands of the rows: " + "; ".join(dict.fromkeys(row["command"] for row in rows)) + "."]
    return "\n".join(lines)


def maml_table() -> str:
    rows = short_table(("First-order MAML", "Proto-MAML", "MAML", "ANIL"), True)
    return "\n".join([rows, "", *reproduce.norm_lines(RESULTS)])


def memorisation_text() -> str:
    (run,) = load("mann/memorisation")
    return (
        f"With `--fixed_labels` every training character keeps one label. The network then answers "
        f"{100 * run['train_accuracy']:.1f} % of the training tasks right, and {100 * run['test_accuracy']:.1f} ± "
        f"{100 * run['ci95']:.1f} % of the tasks with new characters, where guessing gives {100 / run['N']:.1f} %: it "
        f"has memorised the characters and has not learned to learn.\n`{reproduce.plain_command(run)}`"
    )


def meta_lstm_table() -> str:
    """The LSTM meta-learner: the learned rule, the same start before adaptation and with gradient descent."""
    titles = "meta-LSTM, course split | learned rule | tuned gradient descent | before"
    rows = [f"| {titles} | queries | updates | episodes | minutes |", "|---" * 8 + "|"]
    names = {"5way1shot": "", "5way5shot": "", "5way1shot_short": ", short", "5way1shot_pool": ", short, fixed pool",
             "5way1shot_second_order": ", short, second order", "10way10shot": ", paper's flags, short"}  # fmt: skip
    for setting, remark in names.items():
        for run in load(f"meta_lstm/{setting}"):
            figures = (
                f"{100 * run[f'test_accuracy{k}']:.1f} ± {100 * run[f'ci95{k}']:.1f}" for k in ("", "_sgd", "_before")
            )
            ours, sgd, before = figures
            episodes = run["steps"] * tasks_a_step(run)
            rows.append(
                f"| {run['N']}-way {run['K']}-shot{remark} | {ours} | {sgd} (rate {run['sgd_rate']:g}) | {before} "
                f"| {run['Q']} | {run['updates']} | {episodes} | {run['train_seconds'] / 60:.0f} |"
            )
    commands = [f"`{reproduce.plain_command(run)}`" for setting in names for run in load(f"meta_lstm/{setting}")]
    note = "Test accuracy in per cent ± 95 % interval on 600 fixed tasks; queries of each class; minutes of training."
    return "\n".join(rows) + f"\n\n{note}\n" + "\n".join(commands)


def tasks_a_step(run: dict) -> int:
    return round(run["train_seconds"] * run["tasks_per_second"] / run["steps"])


def meta_lstm_figure() -> None:
    """results/meta_lstm.png: the training curves, and what the learned rule does at each update."""
    from matplotlib.figure import Figure

    colours = {"5way1shot": "#0072B2", "5way5shot": "#D55E00"}  # told apart by colour-blind readers
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for setting, colour in colours.items():
        for run in load(f"meta_lstm/{setting}")[:1]:
            name = f"{run['N']}-way {run['K']}-shot"
            B = tasks_a_step(run)
            steps, accuracy = zip(*run["curves"]["Accuracy/val"], strict=True)
            left.plot([B * s / 1000 for s in steps], [100 * a for a in accuracy], "o-", ms=3, color=colour)
            left.annotate(name, (B * steps[-1] / 1000, 100 * accuracy[-1]), (0, -30), textcoords="offset points",
                          ha="right", color=colour)  # fmt: skip
            updates = range(1, run["updates"] + 1)
            middle.semilogy(updates, run["rule"]["support_loss"], "o-", ms=3, color=colour)
            middle.semilogy(updates, run["sgd_support_loss"], "s--", ms=3, color=colour)
            if setting == "5way1shot":
                greys = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#000000")
                for k, layer in enumerate(("conv 1", "conv 2", "conv 3", "conv 4", "head")):
                    right.plot(
                        updates, [row[k] for row in run["rule"]["input"]], "o-", ms=3, color=greys[k], label=layer
                    )
    for line, name in (("o-", "learned rule"), ("s--", "gradient descent, same start")):
        middle.plot([], [], line, ms=3, color="#555555", label=name)
    middle.legend(frameon=False, fontsize=8, handlelength=4)
    left.set(title="Validation accuracy", xlabel="training episodes (thousands)", ylabel="per cent")
    middle.set(title="Loss on the support set", xlabel="update", ylabel="cross entropy (nats)")
    right.set(title="Input gate, 5-way 1-shot", xlabel="update", ylabel="step length, mean over the layer")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (middle, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(RESULTS / "meta_lstm.png", dpi=110)


def faults_text() -> str:
    """What the fault tests counted, from results/faults.json."""
    found = json.loads((RESULTS / "faults.json").read_text())
    lines = ["| script | kills survived / made, bit for bit equal | meta-gradient of two processes differs by "
             "| peak memory of 2,000 steps | growth in the last 1,000 | bad flag values refused |",
             "|---" * 6 + "|"]  # fmt: skip
    for script, cases in found["flag_cases"].items():
        kills, memory = found["kills"].get(script, ""), found["memory"].get(script)
        kills = f"{kills} / {kills}" if kills else ""
        size, growth = (f"{memory['MB']} MB", f"{memory['growth_percent']:.2f} %") if memory else ("", "")
        two = found["two_processes"].get(script)
        two = f"{two:.0e}" if two else ""
        lines.append(f"| `{script}.py` | {kills} | {two} | {size} | {growth} | {cases} of {cases} |")
    lines += ["", f"In all {sum(found['kills'].values())} kills, {sum(found['flag_cases'].values())} bad values, "
              f"{found['folder_cases']} strange run folders and {found['huge_cases']} values too large for any memory. "
              "Differences are relative, in float64, the largest of a script's optimisers. Commands: "
              f"`{found['command_slow']}`, `{found['command_fast']}`.",
              "", "| Python | torch | `pytest` |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {v['python']} | {v['torch']} | {v['result']} |" for v in found["versions"]]
    lines += ["", "| training tasks a second on two cores | one process, one thread | one process, two threads "
              "| two processes |", "|---|---|---|---|"]  # fmt: skip
    lines += [f"| `{p['command']}` | {p['one']:g} | {p['threads']:g} | {p['two']:g} |" for p in found["processes"]]
    return "\n".join(lines)


def speed_table() -> str:
    rows = ["| what | contestant | ms | ratio |", "|---|---|---|---|"]
    races = json.loads((RESULTS / "speed.json").read_text())
    for race in races:
        for name, value in race.items():
            if isinstance(value, dict):
                rows.append(f"| {race['title']} | {name} | {value['ms']:.2f} | {value['ratio']:.2f}x |")
    for race in races:
        for reached in race.get("to_accuracy", []):
            command, median = f"protonet.py {reached['recipe']}".strip(), statistics.median(reached["seconds"])
            each, final = (", ".join(map(str, reached[key])) for key in ("seconds", "test_accuracy"))
            rows += ["", f"`{command}` first passed {reached['target']:.1%} on 5-way 1-shot validation tasks\n"
                     f"after {each} seconds of training (seeds 1 to {len(reached['seconds'])}; median {median:.0f}); "
                     f"test accuracy in the end {final}."]  # fmt: skip
    return "\n".join(rows)


def costs_text() -> str:
    """How MAML's and ES's costs grow, where ES is the dearer one, and what its gradient is worth."""
    summary = json.loads((RESULTS / "costs.json").read_text())
    with open(RESULTS / "costs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"maml": "MAML", "es": "ES", "fomaml": "first-order MAML", "checkpoint": "checkpointed MAML"}
    sweeps = {"inner_steps": "inner steps", "layers": "hidden layers", "hidden_size": "hidden units"}
    fits = {(f["sweep"], f["method"], f["engine"]): f for f in summary["fits"]}
    lines = ["| engine `vmap`, x = | method | runtime | R² | peak memory | R² |", "|---" * 6 + "|"]
    for (sweep, method, engine), f in fits.items():
        if engine == "vmap":
            time, memory = f["runtime"], f["memory"]
            lines.append(f"| {sweeps[sweep]} | {names[method]} | {reproduce.growth(time, 'ms')} | {time['r2']:.3f} | "
                         f"{reproduce.growth(memory, 'MB')} | {memory['r2']:.3f} |")  # fmt: skip
    first = rows[0]
    lines += ["", f"Medians on {summary['device']}, {first['meta_batch_size']} tasks; ES compares "
              f"{first['num_perturbations']} perturbed networks, so both adapt the same number of them. With x^b twice "
              f"the units cost 2^b times as much. Command: `{reproduce.plain_command(summary)}`.", ""]  # fmt: skip
    lines += ["| at 512 units | engine | ms | MB |", "|---|---|---|---|"]
    for row in rows:
        if row["sweep"] == "hidden_size" and row["hidden_size"] == "512" and row["method"] in ("maml", "es"):
            ms, mb = 1e3 * float(row["seconds"]), float(row["peak_bytes"]) / 1e6
            lines.append(f"| {names[row['method']]} | {row['engine']} | {ms:.0f} | {mb:.1f} |")
    lines += ["", dearer_text(summary, rows, sweeps), "", cosine_text(summary, rows)]
    if (RESULTS / "costs_train.json").exists():
        lines += ["", training_text(names)]
    return "\n".join(lines)


def dearer_text(summary: dict, rows: list[dict], sweeps: dict) -> str:
    """The settings at which ES costs more than MAML, by engine and kind of cost."""
    parts = []
    for engine in ("vmap", "loop"):
        total = sum(row["method"] == "es" and row["engine"] == engine for row in rows)
        for what, word in (("seconds", "time"), ("peak_bytes", "memory")):
            found = [d for d in summary["es_dearer"] if (d["engine"], d["what"]) == (engine, what)]
            at = ", ".join(f"{sweeps[d['sweep']]} {d['value']}: {d['es'] / d['maml']:.2f} times" for d in found)
            parts.append(f"{word}, engine `{engine}`: {len(found)} of {total}" + (f" ({at})" if at else ""))
    return "Points of the sweeps at which ES costs more than MAML: " + "; ".join(parts) + "."


def cosine_text(summary: dict, rows: list[dict]) -> str:
    """What the estimate is worth, also at the number of perturbations that takes as long as MAML's exact gradient."""
    found = summary["es_cosine"]
    shown = ", ".join(f"{c['cosine']:.3f} with {c['perturbations']} ({c['expected']:.3f})" for c in found)
    D, m = found[0]["parameters"], found[0]["disagreement"]
    base = {"sweep": "inner_steps", "engine": "vmap", "inner_steps": "5"}
    maml, es = (next(r for r in rows if base.items() <= r.items() and r["method"] == m) for m in ("maml", "es"))
    pairs = float(es["num_perturbations"]) / 2 * float(maml["seconds"]) / float(es["seconds"])
    return (
        "Cosine between the ES estimate and the exact meta-gradient at the initialisation by the number of perturbed "
        f"networks, at {D} parameters, 5 inner steps and m = {m:.1f} (what the formula below expects): {shown}. In the "
        f"time of one MAML step ES can compare {2 * pairs:.0f} networks; the cosine to expect of them is "
        f"{(1 + m * (D + 1) / pairs) ** -0.5:.3f}."
    )


def training_text(names: dict) -> str:
    runs = json.loads((RESULTS / "costs_train.json").read_text())
    parts = [
        f"{names[m]} {r['test_loss']:.4f} ± {r['ci95']:.4f} after {r['steps']} outer steps and "
        f"{r['train_seconds']:.0f} s (before adaptation {r['test_loss_before']:.2f})"
        for m, r in runs.items()
    ]
    run = runs["maml"]
    return (
        f"Trained (`{reproduce.plain_command(run)}`), mean squared error on {run['num_test_tasks']} test tasks after "
        f"{run['inner_steps']} inner steps: " + "; ".join(parts) + "."
    )


def features_text() -> str:
    """The homework's questions on feature weights, each answered in two sentences."""
    r = json.loads((RESULTS / "features.json").read_text())
    d, e, adam = r["alias"], r["closed_form"], r["closed_form_adam"]
    five, one, g, h, random = (r[k] for k in ("gradient_5_steps", "gradient_1_steps", "classification",
                                              "logistic_10_steps", "closed_form_random"))  # fmt: skip
    n = e["num_points"]
    at = lambda run, name="meta", m=n: f"{run[name][str(m)]:.2g}"
    percent = lambda run, name="meta", m=n: f"{100 * run[name][str(m)]:.1f} ± {100 * run['ci95'][name][str(m)]:.1f} %"
    span = lambda run, k: f"{run['weights'][k]['min']:.2f} to {run['weights'][k]['max']:.2f}"
    excess = max(abs(end[0]) / norm - 1 for end, norm in zip(d["end"], d["norm"], strict=True))
    answers = {
        "(d) Where does gradient descent on c end, and where does beta go?":
        f"From c = (1, 1), of norm {d['norm'][0]:.4f}, it ends at ({d['end'][0][0]:.4f}, {d['end'][0][1]:.0e}) with "
        f"beta = ({d['beta'][0][0]:.4f}, {d['beta'][0][1]:.0e}): the limits are (‖c⁽⁰⁾‖, 0) and (1/‖c⁽⁰⁾‖, 0), or "
        f"their negatives for a start with c_0 below 0. The gradient is at a right angle to c, so that only the "
        f"finite step lengthens c, here by at most {100 * excess:.2f} % over {len(d['norm'])} starts; "
        f"the tests let the step go to 0 and find the limit to 1e-6.",
        f"(e) How do the errors compare at {n} grid points?":
        f"All weights 1: {at(e, 'ones')}, where predicting zero gives 1; meta-learned: {at(e)} after "
        f"{e['train_steps']} SGD steps and {at(adam)} with Adam; the oracle: {at(e, 'oracle')}, zero up to rounding. "
        f"The meta-learned weights are "
        f"{'never worse than' if e['at_most_ones_from'] == 1 else 'not always better than'} weights 1 at any "
        f"number of points from 1 to {2 * n}, but off the training grid SGD's beat Adam's "
        f"({at(e, m=n - 1)} against {at(adam, m=n - 1)} at {n - 1}), whose weights in S rose less.",
        f"(e) Why does the error dip at {n}, below {n - 1} and {n + 1} ({at(e, m=n - 1)} and {at(e, m=n + 1)})?":
        f"Meta-training on {n} grid points only takes weight from the features that look like one in S on just that "
        f"grid, frequencies within 5 of a multiple of {n}; of the aliases on {n - 1} and {n + 1} points "
        f"{100 * e['untrained_aliases'][str(n - 1)]:.0f} and {100 * e['untrained_aliases'][str(n + 1)]:.0f} % are "
        f"others, which still weigh 1. At {2 * n} points all aliases are among the trained ones again, "
        f"so the error falls once more, to {at(e, m=2 * n)}.",
        "(e) How do the weights change, and why does that help?":
        f"With SGD the weights in S rise from 1 to {span(e, 'S')}, those of the aliases fall to {span(e, 'aliases')} "
        f"and those of all others stay at 1 (with Adam the aliases fall to {span(adam, 'aliases')}). An alias takes "
        f"the share c_k² of a coefficient's sum of c², so that a heavy true feature among light aliases keeps "
        f"nearly all of it.",
        "(e) And with uniformly random training points?":
        f"No feature is an exact alias then, so all outside S lose a little weight ({span(random, 'others')}; in S "
        f"{span(random, 'S')}). It helps less and has no dip: {at(random)} at {n} points (weights 1: "
        f"{at(random, 'ones')}), {at(random, m=n - 1)} and {at(random, m=n + 1)} beside it.",
        "(f) Does meta-learning help with 5 gradient steps as inner loop?":
        f"Yes, as much as the closed form: {at(five)} at {n} points (weights 1: {at(five, 'ones')}). The fixed inner "
        f"step is too long for few points; from {five['at_most_ones_from']} points on the meta-learned weights are "
        f"never worse than weights 1.",
        "(f) Does one step still work?":
        f"Yes, {at(one)} at {n} points (weights 1: {at(one, 'ones')}), with no dip to speak of: {at(one, m=n - 1)} at "
        f"{n - 1} points. On a grid the features in S are orthogonal, so one step of the right length is exact, "
        f"and the weights themselves set that length: in S they rise to {span(one, 'S')}, and "
        f"{(2 * one['inner_learning_rate']) ** -0.5:.2f} would be exact (the oracle has it: {at(one, 'oracle')}).",
        "(g) Are the weights useful when labels are signs and the code is that of regression?":
        f"Yes: {percent(g)} wrong signs at {n} points, against {percent(g, 'ones')} with weights 1 and "
        f"{percent(g, 'oracle')} with the oracle. At {2 * n} points they beat the oracle ({percent(g, m=2 * n)} "
        f"against {percent(g, 'oracle', 2 * n)}): a sign function has overtones outside S, and features there gain "
        f"weight too (up to {g['weights']['others']['max']:.2f}).",
        "(h) And with logistic regression as inner loop?":
        f"{h['num_gd_steps']} logistic steps give {percent(h)} wrong signs at {n} points, against "
        f"{percent(h, 'ones')} with weights 1 and {percent(h, 'oracle')} with the oracle. At {2 * n} points it is "
        f"{percent(h, m=2 * n)} against {percent(h, 'oracle', 2 * n)}; the two parts have their own learning rates, "
        f"so (g) and (h) do not rank the two losses.",
    }  # fmt: skip
    lines = [f"- **{question}** {answer}" for question, answer in answers.items()]
    seconds = sum(run.get("train_seconds", 0) for run in r.values() if run is not random)
    return "\n".join(lines) + (
        f"\n\nSeed {e['seed']}, mean over {e['num_test_tasks']} test tasks ({random['num_test_tasks']} with random "
        f"points), ± 95 % interval; {seconds:.0f} seconds of meta-training in all for the parts on a grid "
        f"({e['device']}).\nRandom points: "
        f"`{reproduce.plain_command(random)}`."
    )


def render(text: str) -> str:
    """README text with everything between its markers written anew."""
    tables = {
        "results": short_table, "mann": mann_table, "mann_answers": mann_answers, "memorisation": memorisation_text,
        "protonet": lambda: short_table(("ProtoNet",), True), "transfer": lambda: short_table(("Fine-tuning",), True),
        "maml": maml_table,
        "meta_lstm": meta_lstm_table, "costs": costs_text, "features": features_text, "speed": speed_table,
        "faults": faults_text,
    }  # fmt: skip
    for name, table in tables.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, table=table: m[1] + table() + m[2], text)
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
    if load("meta_lstm/5way1shot"):
        meta_lstm_figure()
