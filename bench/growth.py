"""How a training step grows: its seconds and peak memory against N, K, Q, B and the image size, of every method.

    python -m bench growth --out results            every method, about eight minutes on two cores of an Intel Xeon
    python -m bench growth --method maml            one method
    python -m bench growth --smoke                  a complete run in seconds, of tiny networks

One value at a time is varied around the method's defaults. A step is the script's own: its `main` runs with its
flags and is given noise for pictures and a stopwatch for a run; what a step costs does not depend on what pictures
show. Measured are whole steps: drawing tasks, forward and backward pass, optimiser. Memory is the peak above what was
there before the step, on a CPU of one thread (`bench.meters.memory_meter`); on a GPU a step that was recorded as a
graph keeps its memory, and the figure says little.

Figures grow like value ** power; the powers are fitted over the upper half of each range, where the constant part of
a step no longer counts. DIR/growth.json holds all of it, DIR/speed/growth_<method>.png shows it.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError, whole
from fewshot.tasks.splits import Dataset

import math
import statistics
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

import attention
import hw1
import mae
import maml
import meta_lstm
import protonet
import transfer
from bench.meters import memory_meter
from studies.results import draw

LIMIT, ENOUGH = 20.0, 2.0  # seconds that a point may take, and after which no further step of it is timed
UNUSED = """--out --log_dir --run_name --resume --test --checkpoint --dataset --data_folder --split --image_size
--num_classes --num_shot --num_query --rotations --meta_batch_size --train_steps --eval_freq --patience
--num_val_tasks --num_test_tasks --allow_overlap --allow_new_classes""".split()


class Method(NamedTuple):
    """A script, the flags that all its points have, and of each axis the flag and the values."""

    script: ModuleType
    flags: str
    axes: dict[str, tuple[str, tuple[int, ...]]]


FEW = "--num_query 1"  # of validation and test tasks, which are made but not drawn
BY_TWO, SHOTS = (32, 64, 128, 256, 512), (1, 2, 5, 10)
WAYS, SIDES = (2, 5, 10, 20, 40), (28, 40, 56, 84)  # multiples of four: mae.py's patches
N, K, B = ("--num_classes", WAYS), ("--num_shot", SHOTS), "--meta_batch_size"
Q, SIDE = ("--train_query", SHOTS), ("--image_size", SIDES)
METHODS = {
    "mann": Method(hw1, "", {"N": N, "K": K, "B": (B, BY_TWO), "side": SIDE}),
    # By default it deals from 60 classes, which is too few for 100 ways.
    "attention": Method(attention, "--shared_classes 100", {"N": N, "K": K, "B": (B, BY_TWO)}),
    "protonet": Method(
        protonet,
        FEW,
        {
            "N": ("--train_classes", (10, 20, 40, 60, 80)),
            "K": ("--train_shot", SHOTS),
            "Q": Q,
            "B": (B, (1, 2, 4, 8)),
            "side": SIDE,
        },
    ),
    "maml": Method(maml, f"--warmup_steps 0 {FEW}", {"N": N, "K": K, "Q": Q, "B": (B, (1, 2, 4, 8, 16)), "side": SIDE}),
    "meta_lstm": Method(meta_lstm, FEW, {"N": N, "K": K, "Q": Q, "B": (B, (2, 4, 8, 16)), "side": SIDE}),
    # N is how many characters it learns at first: what the data have, no flag.
    "transfer": Method(transfer, FEW, {"N": ("", (150, 300, 600, 1200, 2400)), "B": (B, BY_TWO), "side": SIDE}),
    "mae": Method(mae, FEW, {"B": (B, BY_TWO[:4]), "side": SIDE}),
}
CHARACTERS = {"transfer": 1200}  # of the data; each other script draws its tasks from 104

# ------------------------------------------------------------------------------------ a point


class Measured(Exception):
    """The stopwatch has what it wants; leaves the script's main."""


class Stopwatch:
    """What a script gets as its run: it times whole turns of the train loop and weighs the last one."""

    def __init__(self, repeats: int, limit: float):
        self.repeats, self.limit, self.found = repeats, limit, {}

    def track(self, model: torch.nn.Module, **_) -> None:
        self.model = model

    def record(self, loss: torch.Tensor) -> None:
        if not math.isfinite(loss):  # also waits for a GPU
            raise UserError("a loss was not finite; use --dtype float32")

    def time_to_evaluate(self) -> bool:
        return False

    def steps(self):
        """The steps of the train loop: one to warm up, the timed ones, one whose memory is recorded."""
        seconds: list[float] = []  # of the first, then of the timed ones
        while len(seconds) < 2 or (len(seconds) <= self.repeats and sum(seconds[1:]) < ENOUGH):
            begin = time.perf_counter()
            yield len(seconds) + 1
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            if 3 * seconds[0] > self.limit:  # one more to time and one to weigh
                words = f"a step takes {seconds[0]:.1f} s, the point more than {self.limit:g} s"
                self.found = {"skipped": words}
                raise Measured
        self.model.zero_grad()  # freed in a step, the old gradients would count against it
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the record is of one thread
        try:
            with memory_meter(next(self.model.parameters()).device) as peak:
                yield len(seconds) + 1
        finally:
            torch.set_num_threads(threads)
        timed = seconds[1:]
        self.found = {"seconds": statistics.median(timed), "seconds_low": min(timed), "seconds_high": max(timed)}
        self.found |= {"repeats": len(timed), "peak_bytes": peak()}
        raise Measured


def noise(characters: int, drawings: int, side: int, channels: int) -> Dataset:
    """Pictures of noise, in every split the same; transfer.py, which trains on two splits, finds one of them empty."""
    shape = (characters * drawings, channels, side, side)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    everything = np.arange(characters)
    splits = {"train": everything, "val": everything if drawings > 8 else everything[:0], "test": everything[:104]}
    names = [f"noise/{c:04d}" for c in everything]
    return Dataset("noise", images, np.full(characters, drawings), names, splits, "made", "0" * 64, Path("none"))


def measure(name: str, flags: list[str], characters: int, channels: int, args) -> dict:
    """Median, least and most seconds and peak bytes of a step of method `name` with `flags`; or why it was skipped."""
    script, clock = METHODS[name].script, Stopwatch(args.repeats, LIMIT)
    drawings = 8 if script is transfer else 24

    def load_for(args) -> Dataset:
        return noise(characters, drawings, args.image_size, channels)

    common = ["--device", args.device, "--dtype", args.dtype, "--random_seed", str(args.random_seed)]
    try:
        with patch.multiple(script, load_for=load_for, Run=lambda *_: clock):
            script.main([*METHODS[name].flags.split(), *flags, *common, *(["--smoke"] if args.smoke else [])])
    except Measured:
        pass
    return clock.found


# ---------------------------------------------------------------------------------- all points


def default(name: str, axis: str, args) -> int:
    """The value of an axis where another one is varied: the script's own default."""
    method = METHODS[name]
    if not method.axes[axis][0]:
        return CHARACTERS[name]
    flags = method.script.parse_args([*method.flags.split(), *(["--smoke"] if args.smoke else [])])
    return getattr(flags, method.axes[axis][0].removeprefix("--"))


def points(name: str, args) -> list[dict]:
    """What is to be measured of a method: its defaults, each axis, 100-way, and colour pictures of 84 pixels."""
    axes = METHODS[name].axes
    ways, side = (12, 32) if args.smoke else (100, 84)
    found = [{"axis": "default", "value": 0}]
    for axis, (_, values) in axes.items():
        # The default is one of the values, or becomes one.
        every = sorted({*values[: 2 if args.smoke else None], default(name, axis, args)})
        found += [{"axis": axis, "value": value} for value in every]
    if "N" in axes and axes["N"][0]:
        found.append({"axis": f"{ways}-way", "value": ways, "varied": "N"})
    if "side" in axes:
        found.append({"axis": f"{side} x {side} colour", "value": side, "varied": "side", "channels": 3})
    return [{"method": name} | point for point in found]


def run_point(point: dict, args, known: dict) -> dict:
    """The point with its figures; `known` has those of the same flags, as the defaults come up on every axis."""
    name, axes, flags, characters = point["method"], METHODS[point["method"]].axes, [], 104
    axis, characters = point.get("varied", point["axis"]), CHARACTERS.get(name, 104)
    if axis in axes:
        flag = axes[axis][0]
        if not flag:
            characters = point["value"]
        elif point["value"] != default(name, axis, args):
            flags = [flag, str(point["value"])]
    key = (name, *flags, characters, point.get("channels", 1))
    if key not in known:
        known[key] = measure(name, flags, characters, point.get("channels", 1), args)
    return point | known[key]


def upper_half(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (value, figure) with the larger values, at least two if there are."""
    return sorted(curve)[-max(2, (len(curve) + 1) // 2) :]


def power(curve: list[tuple[float, float]]) -> float | None:
    """The exponent of the power law through points (value, figure), by least squares of logarithms."""
    if len(curve) < 2:
        return None
    x, y = np.log(np.array(curve, dtype=float)).T
    return round(float(np.polyfit(x, y, 1)[0]), 3)


def fits(rows: list[dict]) -> list[dict]:
    """Of each method and axis the powers of seconds and of peak bytes, and the values they are fitted over."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        for axis in METHODS[name].axes:
            curve = [row for row in rows if (row["method"], row["axis"]) == (name, axis) and "seconds" in row]
            fit = {"method": name, "axis": axis, "fitted_over": []}
            for key in ("seconds", "peak_bytes"):
                half = upper_half([(row["value"], row[key]) for row in curve])
                fit |= {"fitted_over": [value for value, _ in half], key: power(half)}
            found.append(fit)
    return found


def parse_args(argv=None):
    parser, groups = experiment.make_parser(__doc__, tuple(UNUSED))
    parser.prog = "-m bench growth"
    add = groups["run"].add_argument
    add("--method", choices=["all", *METHODS], default="all", help="whose training step")
    add("--repeats", type=whole(1), default=3, help="timed steps of each point, if they are short")
    add("--out", metavar="DIR", default="runs/growth", help="folder of growth.json and its pictures")
    return experiment.parse(parser, argv, smoke={"repeats": 1})


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    if experiment.shard()[1] > 1:
        raise UserError("python -m bench growth measures one process; start it with python, not with torchrun")
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} is no folder to write to ({error}); choose another") from None
    names = list(METHODS) if args.method == "all" else [args.method]
    todo, rows, known = [point for name in names for point in points(name, args)], [], {}
    for point in (bar := tqdm(todo, unit="point", disable=None)):
        bar.set_description(f"{point['method']}, {point['axis']}")
        rows.append(run_point(point, args, known))
    result = {"script": "growth", "command": args.command, "git_commit": args.git_commit, "seed": args.random_seed}
    result |= {"device": experiment.device_name(device), "processor": experiment.processor()}
    defaults = {name: {axis: default(name, axis, args) for axis in METHODS[name].axes} for name in names}
    result |= {"versions": experiment.versions(), "defaults": defaults, "fits": fits(rows), "rows": rows}
    experiment.write_json(folder / "growth.json", result)
    for fit in result["fits"]:
        powers = f"seconds ~ value^{fit['seconds']}, bytes ~ value^{fit['peak_bytes']}"
        print(f"{fit['method']:10s} {fit['axis']:5s} {powers}")
    draw("speed", folder)
    print(f"written: {folder / 'growth.json'} and a picture of each method in {folder / 'speed'}")
    return result


if __name__ == "__main__":
    experiment.run_script(main)
