"""The pulse of a recipe: what a script computes, in its smallest form, as numbers that can be compared.

    python pulse.py . protonet.py --train_steps 8 --dataset glyphs     prints the pulse as one line of JSON

A refactoring must not change what a training computes. The pulse tells: the loss of every step, a digest of the
parameters where training ends, and the final figures. Taken twice from the same code it is equal bit for bit; where
two codes part, the first step that differs says where to look. `reproduce.py status` keeps the pulse of every result
and compares.

It imports nothing of this package, so that it can also take the pulse of an older version in another folder
(`git worktree add /tmp/old COMMIT`, then `python pulse.py /tmp/old SCRIPT FLAGS`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

# One thread, and kernels that every processor with AVX2 has: the same bits on most machines.
STEADY = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
          "MKL_CBWR": "AVX2", "PYTHONHASHSEED": "0"}  # fmt: skip
# Parts of the names of figures that differ from run to run, or say how and where instead of what.
NOT_COMPUTED = (
    "second",
    "runtime",
    "dearer",
    "memory_mb",
    "minutes",
    "flags",
    "functions",
    "curves",
    "versions",
    "device",
    "processor",
    "accuracies",
    "cores",
    "processes",
    "resumed",
)


def take(code: Path, script: str, flags: list[str], scratch: Path, timeout: float = 3600) -> dict:
    """The pulse of `script flags` with the code in folder `code`, in a process of its own; runs go to `scratch`.

    Returns {"losses": [one a step], "parameters": [a digest a training], "figures": {name: number}, "on": machine}, or
    {"error": last line} where the script failed.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), str(Path(code).resolve()), script, *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | STEADY
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        return {"error": ([""] + done.stderr.strip().splitlines())[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def difference(before: dict, now: dict, tolerance: float = 0.0) -> str | None:
    """Where two pulses part, in words with the step and the quantity; None where they are equal.

    tolerance: relative, for pulses of two machines; 0 compares bits. Figures that only one of them has do not count.
    """
    if "error" in now:
        return f"fails: {now['error']}"
    same = lambda a, b: a == b or abs(a - b) <= tolerance * max(abs(a), abs(b)) or (math.isnan(a) and math.isnan(b))
    for step, (a, b) in enumerate(zip(before["losses"], now["losses"], strict=False), start=1):
        if not same(a, b):
            return f"loss of step {step}: {a:.8g} -> {b:.8g}"
    if len(before["losses"]) != len(now["losses"]):
        return f"{len(before['losses'])} -> {len(now['losses'])} steps"
    if tolerance == 0 and before["parameters"] != now["parameters"]:
        return f"parameters after step {len(now['losses'])}"
    for name in before["figures"].keys() & now["figures"].keys():
        a, b = before["figures"][name], now["figures"][name]
        if not same(a, b):
            return f"{name}: {a:.8g} -> {b:.8g}"
    return None


def machine() -> dict[str, str]:
    """What bits may depend on: the processor's name and the versions of torch and numpy."""
    import numpy
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"processor": name, "torch": torch.__version__.split("+")[0], "numpy": numpy.__version__}


# -------------------------------------------------------------------------- inside the process


def digest_of(module) -> str:
    """SHA-256 of a module's tensors, whatever their names and order are."""
    parts = []
    for tensor in module.state_dict().values():
        raw = tensor.detach().cpu().contiguous()
        parts.append(hashlib.sha256(f"{tuple(raw.shape)}{raw.dtype}".encode() + raw.numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16]


def numbers_in(tree, path: str = "") -> dict[str, float]:
    """{"a.b.0": number} of the numbers in nested dictionaries and lists, but those named in NOT_COMPUTED."""
    if any(word in path.lower() for word in NOT_COMPUTED) or isinstance(tree, (str, bool, type(None))):
        return {}
    if isinstance(tree, (int, float)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, float] = {}
    for name, value in items:
        found |= numbers_in(value, f"{path}.{name}" if path else str(name))
    return found


def inside(code: str, script: str, flags: list[str]) -> dict:
    """Run the script's main in this process and listen to its `Run`."""
    sys.path.insert(0, code)
    import experiment  # of `code`

    losses, parameters = [], []
    record, steps = experiment.Run.record, experiment.Run.steps

    def listening_record(run, loss, *rest):
        losses.append(float(loss))
        return record(run, loss, *rest)

    def listening_steps(run):
        yield from steps(run)
        if "model" in run.tracked:
            parameters.append(digest_of(run.tracked["model"]))

    experiment.Run.record, experiment.Run.steps = listening_record, listening_steps
    main = importlib.import_module(script.removesuffix(".py")).main
    with contextlib.redirect_stdout(sys.stderr):
        metrics = main(flags)
    return {"losses": losses, "parameters": parameters, "figures": numbers_in(metrics), "on": machine()}


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # the code is that of the folder named
    print(json.dumps(inside(sys.argv[1], sys.argv[2], sys.argv[3:])))
