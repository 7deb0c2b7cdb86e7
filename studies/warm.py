"""Processes that start warm: forked by a server that has already imported torch, which is most of a short run.

A script started here is a process of its own, with its own exit code, signals, working directory, environment and
output, and it imports every file of this package itself. What it does not have is an interpreter of its own: what
Python reads when it starts (PYTHONIOENCODING, say) needs `subprocess`, and so does another number of threads.

The tests start their scripts so, and `reproduce.py --scale smoke`, whose runs are mostly imports.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import reduction
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OURS = {"", *(str(REPO / folder) for folder in ("", "tests", "homework", "assignments"))}

kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
context = multiprocessing.get_context(kind)
# Of other people's packages alone, and nothing that starts a thread.
context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.utils.tensorboard", "torch.distributed.run", "imageio.v3", "matplotlib.pyplot"]
)


def die_with_parent() -> None:
    """In the child: SIGTERM, on which the scripts save and leave, should its parent be killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def enter(command: list[str], cwd: str, env: dict[str, str], out: str, err: str, kept) -> None:
    """The new process: becomes `python SCRIPT ARGUMENTS` or `python -m MODULE ARGUMENTS`."""
    die_with_parent()
    if kept is not None:
        kept.detach()  # open until this process ends
    for fd, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths += [path for path in sys.path if path not in OURS]
    if command[0] == "-m":
        sys.path[:], sys.argv = [cwd, *paths], command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:], sys.argv = [str(Path(command[0]).parent), *paths], command
        runpy.run_path(command[0], run_name="__main__")


class Kept:
    """An open file on its way into the new process."""

    def __init__(self, file):
        self.file = file

    def __getstate__(self):
        return {"fd": reduction.DupFd(self.file.fileno())}  # only while the process is being started

    def __setstate__(self, state):
        self.detach = state["fd"].detach


class Process:
    """As much of subprocess.Popen as is used here; output goes to files, read when the process has ended.

    log: one file that stdout and stderr are added to, in place of two of its own; keep: a file that stays open in it.
    """

    def __init__(self, *command, cwd, env: dict[str, str] | None = None, log: Path | None = None, keep=None):
        self.args = [str(word) for word in command]
        self.files = [] if log else [tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        names = [str(Path(log).resolve())] * 2 if log else [file.name for file in self.files]
        kept = None if keep is None else Kept(keep)
        self.process = context.Process(target=enter, args=(self.args, str(cwd), dict(environment), *names, kept))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 3600) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout: float = 3600) -> tuple[str, str]:
        """Waits for the end; (stdout, stderr)."""
        self.wait(timeout)
        out, err = (Path(file.name).read_text() for file in self.files)
        return out, err


def run(*command, cwd, env: dict[str, str] | None = None, timeout: float = 3600) -> subprocess.CompletedProcess:
    """Like subprocess.run with captured text."""
    process = Process(*command, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
