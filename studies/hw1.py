"""MANN: accuracy by shots and ways, and the homework's questions on rate, memory and layers."""

from __future__ import annotations

from fewshot.experiment import write_atomically

import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from studies.ledger import Case
from studies.results import BLUE, GREEN, PINK, RED, Row, load, new_figure, plain_command

# ---------------------------------------------------------------------------------------- recipes

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 200 --num_test_tasks 200"

LONG = "--jitter 0.1 --train_steps 12000 --eval_freq 500"
COURSE = "--head recurrent --logit_scale 1 --forget_bias 0 --no-rotations --schedule constant --clip 0"

CASES = [
    *[Case(f"K{K}N{N}", f"--num_shot {K} --num_classes {N}", LONG, "--jitter 0.1 --train_steps 50000 --eval_freq 1000",
           seeds=3, minutes=minutes)
      for K, N, minutes in ((1, 2, 3), (2, 2, 4), (1, 3, 4), (1, 4, 5))],
    # The first command of the README; its first seed is timed, on an idle machine.
    Case("default", "--num_shot 1 --num_classes 2", seeds=3, minutes=5, beyond=True),
    Case("conv_K1N5",
         "--num_shot 1 --num_classes 5 --encoder strided --shared_classes 60 --hidden_dim 256 --learning_rate 2e-3",
         "--train_steps 8000 --eval_freq 500", "--train_steps 40000 --eval_freq 1000", seeds=3, minutes=6),
    Case("memorisation", "--num_shot 1 --num_classes 5 --fixed_labels --no-rotations --head recurrent --forget_bias 0",
         "--train_steps 5000 --eval_freq 250", "--train_steps 25000"),
    *[Case(f"K1N3_{name}", f"--num_shot 1 --num_classes 3 {COURSE} {flags}", "--train_steps 5000",
           "--train_steps 25000", minutes=2)
      for name, flags in (("rate_1e-1", "--learning_rate 1e-1"), ("rate_1e-3", "--learning_rate 1e-3"),
                          ("rate_1e-5", "--learning_rate 1e-5"), ("memory_8", "--learning_rate 1e-3 --hidden_dim 8"),
                          ("memory_256", "--learning_rate 1e-3 --hidden_dim 256"),
                          ("gru", "--learning_rate 1e-3 --recurrent gru"),
                          ("3_layers", "--learning_rate 1e-3 --num_layers 3"))],
]  # fmt: skip

# ---------------------------------------------------------------------------------------- results

ROWS = [
    Row("MANN, 1-shot 2-way", "K1N2", "above 90", front=True),
    Row("MANN, 2-shot 2-way", "K2N2", "above 90"),
    Row("MANN, 1-shot 3-way", "K1N3", "about 80"),
    Row("MANN, 1-shot 4-way", "K1N4", "about 70"),
    Row(
        "MANN, 5-way 1-shot, conv encoder",
        "conv_K1N5",
        "-",
        "82.8 to 89.2 (MANN, second sight in a stream)",
        bar=("MANN, conv", PINK),
    ),
    Row("MANN, 1-shot 2-way, first command of the README", "default", "above 90"),
]
COLUMNS = {"queries asked alone": "test_accuracy_alone"}  # further figures of a row
SETTINGS = {"MANN by shot K and way N": {f"K{K}N{N}": f"{K}-shot {N}-way" for K, N in ((1, 2), (2, 2), (1, 3), (1, 4))}}
SWEEPS = {
    "learning rate (1-shot 3-way)": {f"K1N3_rate_{r}": f"learning rate {r}" for r in ("1e-1", "1e-3", "1e-5")},
    "memory size (1-shot 3-way)": {
        "K1N3_memory_8": "8 units",
        "K1N3_rate_1e-3": "128 units",
        "K1N3_memory_256": "256 units",
    },
    "recurrent layers (1-shot 3-way)": {
        "K1N3_rate_1e-3": "two LSTM layers",
        "K1N3_gru": "two GRU layers",
        "K1N3_3_layers": "three LSTM layers",
    },
}


def command(out: Path, case: str) -> str:
    """The command of a case's first seed."""
    return plain_command(load(out, f"hw1/{case}")[0])


def curves_of(out: Path, rows: dict[str, dict[str, str]]):
    """A row of two panels for each {title: {case: label}}: test accuracy and test loss over training, seed 1."""
    figure, axes = new_figure(len(rows), 2, (9, 3.2 * len(rows)))
    for (title, cases), panels in zip(rows.items(), axes, strict=True):
        kinds = ("Accuracy/test", 100, "test accuracy (%)"), ("Loss/test", 1, "test loss (nats)")
        for ax, (tag, scale, label) in zip(panels, kinds, strict=True):
            for colour, (case, name) in zip((BLUE, RED, GREEN, PINK), cases.items(), strict=False):
                if (runs := load(out, f"hw1/{case}")) and tag in runs[0].get("curves", {}):
                    steps, values = zip(*runs[0]["curves"][tag], strict=True)
                    ax.plot(steps, [scale * value for value in values], color=colour, label=name)
            if ax.lines:
                ax.legend(frameon=False, fontsize=9)
            ax.set(title=title, xlabel="training step", ylabel=label)
    return figure


def pictures(out: Path):
    """Figures 3 to 8 of the homework's report (K, N grid), 9 (learning rate) and 10 (memory size)."""
    for name, rows in (("mann", SETTINGS), ("sweeps", SWEEPS)):
        if any(load(out, f"hw1/{case}") for cases in rows.values() for case in cases):
            yield name, curves_of(out, rows)


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
            write_atomically(out / "hw1" / "tensorboard.png", lambda file: file.write(picture.read_bytes()))
        finally:
            board.terminate()
            board.wait()
