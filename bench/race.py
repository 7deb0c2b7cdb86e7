"""A race: contestants take turns within one run, after a warm-up; medians with their spread."""

from __future__ import annotations

from fewshot import experiment

import json
import time
from argparse import Namespace

import numpy as np
import torch
from tqdm import tqdm


def race(contestants: dict, repeats: int, warmup: int = 5) -> dict[str, np.ndarray]:
    """Seconds of each call of each contestant, [repeats], taking turns."""
    seconds = {name: [] for name in contestants}
    for turn in tqdm(range(warmup + repeats), leave=False, disable=None):
        for name, call in contestants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def precisions(device: torch.device, probe=None) -> list[torch.dtype]:
    """The precisions to race: float32, and bfloat16 where the kernels of `probe` exist, be they emulated."""
    return list({torch.float32: 0, experiment.precision(Namespace(dtype="bfloat16"), device, probe): 0})


def print_race(title: str, seconds: dict[str, np.ndarray], device: torch.device, **more) -> dict:
    """Print the medians and their ratio to the first contestant; returns them, and `more` that was measured."""
    print(f"{title}, on {experiment.device_name(device)}")
    reference = np.median(next(iter(seconds.values())))
    result = {"title": title, "device": experiment.device_name(device), **more}
    for name, values in seconds.items():
        low, median, high = np.percentile(values * 1e3, [10, 50, 90])
        ratio = reference * 1e3 / median
        print(f"  {name:34s} {median:8.3f} ms  ({low:.3f} to {high:.3f})  {ratio:6.2f}x")
        result[name] = {"ms": round(median, 4), "ratio": round(ratio, 3)}
    print(json.dumps(result))
    return result


def plain_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """Backward pass and update as the files of basics/ show them."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
