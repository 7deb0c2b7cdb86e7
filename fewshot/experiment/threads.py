"""How threads wait and how freed memory is kept, so that a shared computer stays fast."""

from __future__ import annotations

from fewshot import SPIN

import atexit
import contextlib
import ctypes
import os
import threading
import time
from pathlib import Path

import torch


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the tensors of the next step (Linux; nothing happens elsewhere).

    glibc gives blocks above 32 MB back to the system when they are freed; each step then waits for the system to zero
    the same pages anew, which took half of the time of a large step on two cores.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def share_cores(seconds: float = 0.5) -> None:
    """From now on let waiting threads spin while the computer is idle, and sleep while others need its cores.

    Awake, a thread takes up its next piece of work at once, but holds a core meanwhile: beside one busy process a step
    of spinning threads takes two to four times as long. libgomp spins GOMP_SPINCOUNT times, and no more than 1,000
    while it has more threads than there are cores (its manual, "GOMP_SPINCOUNT"). So a thread of ours looks every few
    `seconds` at what other processes take, and where that is too much, another one owns idle threads: "more". Figures
    do not depend on it. On other systems than Linux, or where the user has said how to wait, nothing happens.
    """
    spins = all(os.environ.get(name) == value for name, value in SPIN.items())
    threads = torch.get_num_threads()
    watched = any(thread.name == "share_cores" for thread in threading.enumerate())
    if threads == 1 or not spins or watched or busy_seconds() is None:
        return

    def doze(awake: threading.Event) -> None:
        torch.ones(2**20).add_(1)  # large enough for a team of this thread's own, which then lies idle
        awake.wait()

    def watch() -> None:
        awake, dozing, begin, busy, own = None, None, time.monotonic(), busy_seconds(), time.process_time()
        while not over.wait(seconds):
            now = time.monotonic(), busy_seconds(), time.process_time()
            others = (now[1] - busy - (now[2] - own)) / (now[0] - begin)  # the cores that other processes took
            begin, busy, own = now
            crowded = others > os.cpu_count() - threads + 0.25
            if crowded and not dozing:
                awake = threading.Event()
                dozing = threading.Thread(target=doze, args=(awake,), name="doze", daemon=True)
                dozing.start()
            elif dozing and not crowded:
                awake.set()
                dozing = None
        if dozing:
            awake.set()
            dozing.join()

    def end() -> None:  # Python must not end while a thread is inside torch
        over.set()
        watcher.join()

    over = threading.Event()
    watcher = threading.Thread(target=watch, name="share_cores", daemon=True)
    watcher.start()
    atexit.register(end)


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the computer started; None where no file tells."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, _, _, interrupts, soft = map(int, line.split()[1:8])
        return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
