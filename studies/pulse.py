"""The pulse of a recipe: what a script computes, in its smallest form, as numbers that can be compared.

    python studies/pulse.py . protonet.py --train_steps 8 --dataset glyphs     prints the pulse as one line of JSON

A refactoring must not change what a training computes. The pulse tells: the loss of every step, a digest of the
parameters where training ends, and the final figures. Taken twice from the same code it is equal bit for bit; where
two codes part, the first step that differs says where to look. `reproduce.py status` keeps the pulse of every result
and compares.

It imports nothing of this package, so that it can also take the pulse of an older version in another folder
(`git worktree add /tmp/old COMMIT`, then `python studies/pulse.py /tmp/old SCRIPT FLAGS`), whether that has its `Run`
in fewshot/experiment/ or in an experiment.py at the top.
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
import tempfile
import threading
import traceback
from pathlib import Path

# One thread, and kernels that every processor with AVX2 has: the same bits on most machines.
STEADY = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
          "MKL_CBWR": "AVX2", "PYTHONHASHSEED": "0"}  # fmt: skip
NOISE = 1e-20  # figures below are the rounding errors of zero: their bits mean nothing
RUN = ("fewshot/experiment/run.py", "experiment.py")  # where a version of this package has its class Run
# Torch's slow parts that a script loads only while it runs.
LATE = ("torch.utils.tensorboard", "torch._dynamo")
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
    done = subprocess.run(**_process(code, scratch, script, *flags), capture_output=True, timeout=timeout)
    if done.returncode != 0:
        return {"error": last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def _process(code: Path, scratch: Path, *arguments: str) -> dict:
    """What subprocess needs to start this file on the code in folder `code`."""
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), str(Path(code).resolve()), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | STEADY
    return {"args": command, "cwd": scratch, "env": environment, "text": True}


def last_line(text: str) -> str:
    return ([""] + text.strip().splitlines())[-1][:300]


class Warm:
    """A process that has imported torch and the code in folder `code` once, and forks itself for each pulse.

    It gives what `take` gives, without the seconds of importing. Where a process cannot fork it is `take`.
    """

    def __init__(self, code: Path, scratch: Path):
        self.code, self.scratch, self.process = code, scratch, None

    def take(self, script: str, flags: list[str]) -> dict:
        if not hasattr(os, "fork") or sys.platform == "darwin":  # torch's libraries do not survive a fork there
            return take(self.code, script, flags, self.scratch)
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(**_process(self.code, self.scratch, "--serve"), **pipes)
        try:
            self.process.stdin.write(json.dumps([script, flags]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": f"the process that takes pulses of {self.code} has died"}

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


class WarmProcesses:
    """`take` in processes that stay warm: one for each folder of code and each thread that asks for it.

    One that nobody uses ends when another folder is asked for, so there are never more than threads.
    """

    def __init__(self):
        self.idle: list[Warm] = []
        self.lock = threading.Lock()

    def take(self, code: Path, script: str, flags: list[str], scratch: Path) -> dict:
        with self.lock:
            warm = next((warm for warm in self.idle if warm.code == code), None)
            for other in [warm] if warm else self.idle[:]:
                self.idle.remove(other)
                if other is not warm:
                    other.close()
        warm = warm or Warm(code, scratch)
        try:
            return warm.take(script, flags)
        finally:
            with self.lock:
                self.idle.append(warm)

    def __enter__(self) -> WarmProcesses:
        return self

    def __exit__(self, *_) -> None:
        for warm in self.idle:
            warm.close()


def difference(before: dict, now: dict) -> str | None:
    """Where two pulses part, in words with the step and the quantity; None where they are equal bit for bit.

    Numbers below NOISE are equal. Figures that only one of them has do not count.
    """
    same = lambda a, b: a == b or max(abs(a), abs(b)) < NOISE or (math.isnan(a) and math.isnan(b))
    for step, (a, b) in enumerate(zip(before["losses"], now["losses"], strict=False), start=1):
        if not same(a, b):
            return f"loss of step {step}: {a:.8g} -> {b:.8g}"
    if len(before["losses"]) != len(now["losses"]):
        return f"{len(before['losses'])} -> {len(now['losses'])} steps"
    if before["parameters"] != now["parameters"]:
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


def run_class() -> type:
    """The class Run of the code that comes first on the path, in either layout."""
    for file in RUN:
        if (Path(sys.path[0]) / file).exists():
            return importlib.import_module(file.removesuffix(".py").replace("/", ".")).Run
    raise ModuleNotFoundError(f"{sys.path[0]} has no {' and no '.join(RUN)}")


def inside(script: str, flags: list[str]) -> dict:
    """Run the script's main in this process and listen to its `Run`."""
    Run, losses, parameters = run_class(), [], []
    record, steps = Run.record, Run.steps

    def listening_record(run, loss, *rest):
        losses.append(float(loss))
        return record(run, loss, *rest)

    def listening_steps(run):
        yield from steps(run)
        if "model" in run.tracked:
            parameters.append(digest_of(run.tracked["model"]))

    Run.record, Run.steps = listening_record, listening_steps
    main = importlib.import_module(script.removesuffix(".py")).main
    with contextlib.redirect_stdout(sys.stderr):
        metrics = main(flags)
    return {"losses": losses, "parameters": parameters, "figures": numbers_in(metrics), "on": machine()}


def child(script: str, flags: list[str], answer) -> None:
    """In a forked process: one pulse, or why there is none, into the file `answer`."""
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            taken = inside(script, flags)
        except BaseException:  # sys.exit too: whatever a script ends with is told
            traceback.print_exc()
            sys.stderr.flush()
            said.seek(0)
            taken = {"error": last_line(said.read())}
    answer.write(json.dumps(taken))
    answer.flush()


def serve() -> None:
    """Answer each line [script, flags] on stdin by a line with its pulse, from a fork of this process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(Exception):  # what cannot be imported is told by the pulse that needs it
        run_class()
        for name in LATE:
            importlib.import_module(name)
    for line in sys.stdin:
        script, flags = json.loads(line)
        with contextlib.suppress(BaseException):
            importlib.import_module(script.removesuffix(".py"))
        with tempfile.TemporaryFile("w+") as file:
            pid = os.fork()
            if pid == 0:
                try:
                    child(script, flags, file)
                finally:
                    os._exit(0)  # nothing of the parent is closed twice
            os.waitpid(pid, 0)
            file.seek(0)
            taken = file.read() or json.dumps({"error": f"the process of {script} was killed"})
        answers.write(taken + "\n")
        answers.flush()


if __name__ == "__main__":
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [sys.argv[1], *(path for path in sys.path if path != here)]  # the code is that of the folder named
    serve() if sys.argv[2] == "--serve" else print(json.dumps(inside(sys.argv[2], sys.argv[3:])))
