"""Processes that start warm: forked by a server that has already imported torch, which is most of a short run.

A script started here is a process of its own, with its own exit code, signals, working directory, environment and
output, and it imports every file of this package itself. What it does not have is an interpreter of its own: what
Python reads when it starts (PYTHONIOENCODING, say) needs `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OURS = {"", str(REPO), str(REPO / "tests"), str(REPO / "homework")}

kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
context = multiprocessing.get_context(kind)
# Of other people's packages alone, and nothing that starts a thread.
context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.utils.tensorboard", "torch.distributed.run", "imageio.v3", "matplotlib.pyplot"]
)


def enter(command: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """The new process: becomes `python SCRIPT ARGUMENTS` or `python -m MODULE ARGUMENTS`."""
    for fd, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY)
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


class Process:
    """As much of subprocess.Popen as the tests use; output goes to files, read when the process has ended."""

    def __init__(self, *command, cwd, env: dict[str, str] | None = None):
        self.args = [str(word) for word in command]
        self.files = [tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        names = [file.name for file in self.files]
        self.process = context.Process(target=enter, args=(self.args, str(cwd), dict(environment), *names))
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
