"""Write the tables of the README from the committed result files; nothing in them is typed by hand.

python results/table.py            rewrites README.md between its markers
"""

from __future__ import annotations

import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parent / "README.md"
# setting -> what the course or the slides report, and the best published figure where there is one
MANN = {"K1N2": "above 90", "K2N2": "above 90", "K1N3": "about 80", "K1N4": "about 70", "conv_K1N5": "not tried"}


def load(name: str) -> list[dict]:
    """The metrics of all seeds of a setting, in the order of the seeds."""
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{name}_seed*.json"))]


def mean_of_seeds(runs: list[dict], key: str, ci: str) -> str:
    """Mean over seeds in per cent, with the 95 % interval over their test tasks.

    The seeds share their test tasks, so their errors go together: the interval does not shrink with seeds.
    """
    values, halves = [100 * r[key] for r in runs], [100 * r[ci] for r in runs]
    half = sum(halves) / len(runs)
    return f"{sum(values) / len(values):.1f} ± {half:.1f}"


def mann_table() -> str:
    rows = ["| MANN, course split | course | ours | each seed | queries asked alone | minutes |", "|---" * 6 + "|"]
    for setting, course in MANN.items():
        runs = load(f"mann/{setting}")
        if not runs:
            continue
        seeds = ", ".join(f"{100 * r['test_accuracy']:.1f}" for r in runs)
        minutes = sum(r["train_seconds"] for r in runs) / len(runs) / 60
        ours = mean_of_seeds(runs, "test_accuracy", "ci95")
        alone = mean_of_seeds(runs, "test_accuracy_alone", "ci95_alone")
        first = runs[0]
        name = f"{first['K']}-shot {first['N']}-way" + (", conv encoder" if "conv" in setting else "")
        rows.append(f"| {name} | {course} | {ours} | {seeds} | {alone} | {minutes:.0f} |")
    runs = load("mann/K1N2")
    return "\n".join(rows) + (
        f"\n\nTest accuracy in per cent, mean of {len(runs)} seeds ± 95 % interval over "
        f"{runs[0]['num_test_tasks']} fixed tasks each; minutes of training on one of two CPU cores, both busy. "
        "Command of the first row:\n"
        f"`{runs[0]['command']}`."
    )


def memorisation_text() -> str:
    (run,) = load("mann/memorisation")
    return (
        f"With `--fixed_labels` every training character keeps one label. The network then answers "
        f"{100 * run['train_accuracy']:.1f} % of the training tasks right, and {100 * run['test_accuracy']:.1f} ± "
        f"{100 * run['ci95']:.1f} % of the tasks with new characters, where guessing gives {100 / run['N']:.1f} %: it "
        f"has memorised the characters and has not learned to learn.\n`{run['command']}`"
    )


def protonet_text() -> str:
    (run,) = load("protonet/5way1shot")
    return (
        f"5-way 1-shot, seed {run['seed']}: {100 * run['test_accuracy']:.1f} ± {100 * run['ci95']:.1f} % on "
        f"{run['num_test_tasks']} test tasks after {run['train_seconds']:.0f} seconds of training on two CPU cores "
        f"(the paper: 98.8 %).\n`{run['command']}`"
    )


def meta_lstm_table() -> str:
    """The LSTM meta-learner: the learned rule, the same start before adaptation and with gradient descent."""
    rows = [
        "| meta-LSTM, course split | learned rule | tuned gradient descent | before | updates | episodes | minutes |"
    ]
    rows.append("|---" * 7 + "|")
    names = {"5way1shot": "", "5way5shot": "", "5way1shot_short": ", short", "5way1shot_pool": ", short, fixed pool",
             "5way1shot_second_order": ", short, second order"}  # fmt: skip
    for setting, remark in names.items():
        for run in load(f"meta_lstm/{setting}"):
            figures = (
                f"{100 * run[f'test_accuracy{k}']:.1f} ± {100 * run[f'ci95{k}']:.1f}" for k in ("", "_sgd", "_before")
            )
            ours, sgd, before = figures
            episodes = round(run["train_seconds"] * run["tasks_per_second"], -2)
            rows.append(
                f"| {run['N']}-way {run['K']}-shot{remark} | {ours} | {sgd} (rate {run['sgd_rate']:g}) | {before} "
                f"| {run['updates']} | {episodes:.0f} | {run['train_seconds'] / 60:.0f} |"
            )
    commands = [f"`{run['command']}`" for setting in names for run in load(f"meta_lstm/{setting}")]
    note = "Test accuracy in per cent ± 95 % interval on 600 fixed tasks with 15 queries a class; minutes of training."
    return "\n".join(rows) + f"\n\n{note}\n" + "\n".join(commands)


def meta_lstm_figure() -> None:
    """results/meta_lstm.png: the training curves, and what the learned rule does at each update."""
    from matplotlib.figure import Figure

    colours = {"5way1shot": "#0072B2", "5way5shot": "#D55E00"}  # told apart by colour-blind readers
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for setting, colour in colours.items():
        for run in load(f"meta_lstm/{setting}")[:1]:
            name = f"{run['N']}-way {run['K']}-shot"
            B = round(run["train_seconds"] * run["tasks_per_second"] / run["steps"])
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


def speed_table() -> str:
    rows = ["| what | contestant | ms | ratio |", "|---|---|---|---|"]
    for race in json.loads((RESULTS / "speed.json").read_text()):
        for name, value in race.items():
            if isinstance(value, dict):
                rows.append(f"| {race['title']} | {name} | {value['ms']:.2f} | {value['ratio']:.2f}x |")
    return "\n".join(rows)


def render(text: str) -> str:
    """README text with everything between its markers written anew."""
    tables = {"results": mann_table, "memorisation": memorisation_text, "protonet": protonet_text, "speed": speed_table,
              "meta_lstm": meta_lstm_table}  # fmt: skip
    for name, table in tables.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, table=table: m[1] + table() + m[2], text)
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
    if load("meta_lstm/5way1shot"):
        meta_lstm_figure()
