"""The seconds and the peak memory of one call, such as a training step."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch


@contextlib.contextmanager
def memory_meter(device: torch.device):
    """Bytes allocated at the worst moment of the block, above what was there before it: a function to call after it.

    By the allocator's own record: CUDA's statistics, and on a CPU the profiler's list of allocations and releases.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        torch.cuda.synchronize(device)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        yield lambda: highest(record)


def highest(record: torch.profiler.profile) -> int:
    """The most bytes that were allocated at once in a record of the CPU's allocations."""
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # negative where memory is released
        peak = max(peak, now)
    return peak


def peak_memory(step, device: torch.device) -> int:
    """The same of one call of `step`."""
    with memory_meter(device) as peak:
        step()
    return peak()


def clock(step, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls of `step`; long ones stop after three when eight seconds are used up."""
    seconds = []
    while len(seconds) < repeats and (len(seconds) < 3 or sum(seconds) < 8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def cost(step, device: torch.device, warmup: int, repeats: int) -> dict:
    """Median, 10th and 90th percentile of the seconds of a call of `step`, and its peak memory in bytes."""
    clock(step, device, warmup)
    seconds = clock(step, device, repeats)
    low, median, high = np.percentile(seconds, [10, 50, 90])
    return {
        "seconds": float(median),
        "seconds_p10": float(low),
        "seconds_p90": float(high),
        "repeats": len(seconds),
        "peak_bytes": peak_memory(step, device),
    }
