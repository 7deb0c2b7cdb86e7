"""The LSTM meta-learner: its rule beside gradient descent from the same start, and what the rule does."""

from __future__ import annotations

import shlex
from pathlib import Path

from studies.ledger import TEST, Case, on_mnist
from studies.results import (
    BLUE,
    GREEN,
    GREY,
    PINK,
    RED,
    SKY,
    YELLOW,
    Digits,
    Row,
    figure_of,
    load,
    new_figure,
    plain_command,
    table,
    tasks_a_step,
    time_of,
)

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 4 --eval_freq 2 --num_val_tasks 4 --num_test_tasks 4 --meta_batch_size 2 --inner_epochs 2"

CASES = [
    Case("5way1shot", "--num_classes 5 --num_shot 1", "", "--train_steps 30000", seeds=3, minutes=30, beyond=True),
    Case("5way5shot", "--num_classes 5 --num_shot 5", "--train_steps 3000 --eval_freq 300", "--train_steps 30000",
         seeds=3, minutes=25, beyond=True),
    # 10 shots leave 10 of a character's 20 images for queries, where the preset wants 15
    Case("10way10shot", "--preset 10way10shot --train_query 5 --num_query 5",
         "--train_steps 250 --eval_freq 125 --num_val_tasks 40", seeds=3, minutes=15, beyond=True),
    Case("10way10shot_reset", f"{TEST} --reset_theta0", minutes=15, beyond=True, start="meta_lstm/10way10shot"),
    *[Case(f"5way1shot_{name}", recipe, "--train_steps 600 --eval_freq 200", "--train_steps 6000", minutes=minutes)
      for name, recipe, minutes in (("short", "", 3), ("pool", "--fixed_pool 6", 3),
                                    ("second_order", "--second_order --trained_share 1", 11))],
    *on_mnist("meta_lstm/10way10shot", seeds=1),
    *on_mnist("meta_lstm/10way10shot", " --reset_theta0", "reset_", seeds=1),
]  # fmt: skip


def with_images(folder: str) -> list[Case]:
    """The cases that need miniImageNet, whose images nobody may hand on: those of --mini_imagenet FOLDER."""
    images = f"--image_size 84 --dataset folder --data_folder {shlex.quote(folder)}"
    return [
        Case(f"miniImagenet_{preset}", f"--preset {preset} {images}", "--train_steps 500 --eval_freq 100", minutes=60)
        for preset in ("5way1shot", "5way5shot", "10way10shot", "10way20shot")
    ]


# ---------------------------------------------------------------------------------------- results

BLACK = "#000000"
ROWS = [
    Row("Meta-LSTM, 5-way 1-shot", "5way1shot", published="none", front=True, bar=("meta-LSTM", BLACK)),
    Row("Meta-LSTM, 5-way 5-shot", "5way5shot", published="none"),
    Row("Meta-LSTM, 10-way 10-shot, the paper's flags", "10way10shot", published="none"),
    Row("Meta-LSTM, miniImageNet 5-way 1-shot", "miniImagenet_5way1shot", "42.6", "43.4"),
    Row("Meta-LSTM, miniImageNet 5-way 5-shot", "miniImagenet_5way5shot", "37.6", "60.6"),
    Row("Meta-LSTM, miniImageNet 10-way 10-shot", "miniImagenet_10way10shot", "23.3"),
    Row("Meta-LSTM, miniImageNet 10-way 20-shot", "miniImagenet_10way20shot", "22.8"),
]
DIGITS = [Digits("meta-LSTM", BLACK), Digits("meta-LSTM, random start", YELLOW, prefix="mnist_reset")]
COMPARED = {
    "5way1shot": "",
    "5way5shot": "",
    "5way1shot_short": ", short",
    "5way1shot_pool": ", short, fixed pool",
    "5way1shot_second_order": ", short, second order",
    "10way10shot": ", paper's flags, short",
}


def rules(out: Path) -> str:
    """The learned rule, the same start before adaptation, and gradient descent from it."""
    rows, commands = [], []
    for case, remark in COMPARED.items():
        if runs := load(out, f"meta_lstm/{case}"):
            run, rates = runs[0], ", ".join(f"{rate:g}" for rate in sorted({run["sgd_rate"] for run in runs}))
            ours, sgd, before = (figure_of(runs, f"test_accuracy{kind}") for kind in ("", "_sgd", "_before"))
            shape = [len(runs), run["Q"], run["updates"], f"{run['steps'] * tasks_a_step(run):,}", time_of(runs)]
            rows.append([f"{run['N']}-way {run['K']}-shot{remark}", ours, f"{sgd} (rate {rates})", before, *shape])
            commands.append(plain_command(run))
    titles = "meta-LSTM, course split | learned rule | tuned gradient descent | before | seeds | queries | updates "
    return table(f"{titles}| episodes | minutes", rows, commands)


def pictures(out: Path):
    """The training curves of the meta-LSTM, and what the learned rule does at each update."""
    found = {case: runs[0] for case in ("5way1shot", "5way5shot") if (runs := load(out, f"meta_lstm/{case}"))}
    if found:
        yield "meta_lstm", rule_figure(found)
    if all((found := digits_and_characters(out)).values()):
        yield "reset", reset_figure(found)


def rule_figure(found: dict[str, dict]):
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
            for k, (layer, shade) in enumerate(zip(layers, (SKY, GREEN, YELLOW, PINK, BLACK), strict=True)):
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
    return figure


def digits_and_characters(out: Path) -> dict[tuple[str, str], list[dict]]:
    """{(images, start): runs} of the 10-way 10-shot meta-LSTM: characters and digits, learned and random start."""
    cases = {
        ("Omniglot", "learned"): "10way10shot",
        ("Omniglot", "random"): "10way10shot_reset",
        ("MNIST", "learned"): "mnist_10shot",
        ("MNIST", "random"): "mnist_reset_10shot",
    }
    return {which: load(out, f"meta_lstm/{case}") for which, case in cases.items()}


def reset_figure(found: dict[tuple[str, str], list[dict]]):
    """What the meta-LSTM's start is worth: the learned rule beside gradient descent, from either start."""
    figure, ((ax,),) = new_figure(1, 1, (5, 4))
    runs = [some[0] for some in found.values()]
    for k, (label, kind, colour) in enumerate((("learned rule", "", BLACK), ("gradient descent", "_sgd", GREY))):
        values, halves = ([100 * run[f"{key}{kind}"] for run in runs] for key in ("test_accuracy", "ci95"))
        places = [place + 0.38 * (k - 0.5) for place in range(len(runs))]
        ax.bar(places, values, 0.36, yerr=halves, color=colour, capsize=2, label=label)
    ax.set_xticks(range(len(found)), [f"{images}\n{start} start" for images, start in found])
    ax.axhline(10, color="0.5", linestyle=":", linewidth=1)
    ax.set(title="meta-LSTM, 10-way 10-shot (dotted: guessing)", ylabel="accuracy (%)", ylim=(0, 115))
    ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    return figure
