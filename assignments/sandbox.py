"""Runs a student's code where it can do no harm: it computes what it is asked and decides nothing.

Three processes. The judge (homework.py) holds the tests and the expected values. The nursery, `python -I sandbox.py`,
has torch in memory and nothing of the package; it forks a worker for every test. The worker takes guards.py upon
itself, imports the student's files from a folder of its own and answers the judge's probes. What comes back is data
(JSON and raw tensors, no pickle), which the judge compares; so whatever a submission patches, prints or forges, only
a right value counts.
"""

from __future__ import annotations

import array
import contextlib
import inspect
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there in `python -I`
from guards import LIBC, take_guards

sys.path.pop(0)  # what a worker may import it may read

OUTPUT_LIMIT = 2**20  # bytes that a test may print
REPLY_LIMIT = 2**28  # bytes of an answer
MEMORY_LIMIT = 3 * 2**30  # bytes beside what Python and torch take
WALL_FACTOR, WALL_EXTRA = 3, 10  # seconds of wall clock = factor * processor seconds + extra: others may be busy

# ------------------------------------------------------------------------------------ messages


def encode(value) -> bytes:
    """A message: two lengths, JSON, the bytes of the tensors. TypeError for what is not plain data or a tensor."""
    blobs: list[bytes] = []

    def pack(v):
        if isinstance(v, torch.Tensor):
            v = v.detach().cpu().contiguous()
            v = v.float() if v.dtype in (torch.bfloat16, torch.float16) else v
            blobs.append(v.numpy().tobytes())
            return {"t": [str(v.dtype).removeprefix("torch."), list(v.shape)]}
        if isinstance(v, dict):
            return {"d": [[str(k), pack(x)] for k, x in v.items()]}
        if isinstance(v, (list, tuple)):
            return {"l": [pack(x) for x in v]}
        if v is None or isinstance(v, (bool, int, float, str)):
            return {"v": v}
        if hasattr(v, "__array__"):
            return pack(torch.as_tensor(v))
        raise TypeError(f"a {type(v).__name__} where a tensor or a number was expected")

    text = json.dumps(pack(value)).encode()
    body = b"".join(blobs)
    return struct.pack("<QQ", len(text), len(body)) + text + body


def decode(text: bytes, body: bytes):
    """The value of a message; ValueError (or what json raises) for anything that `encode` does not write."""
    position = 0

    def unpack(v):
        nonlocal position
        ((kind, content),) = v.items()
        if kind == "t":
            name, shape = content
            if name not in ("float32", "float64", "int64", "int32", "uint8", "bool", "int16", "int8"):
                raise ValueError(f"unknown type {name!r}")
            dtype, count = getattr(torch, name), 1
            for n in shape:
                count *= int(n)
            size = count * dtype.itemsize
            if count < 0 or position + size > len(body):
                raise ValueError("a tensor is longer than the message")
            part = bytearray(body[position : position + size])
            position += size
            tensor = torch.frombuffer(part, dtype=dtype) if count else torch.empty(0, dtype=dtype)
            return tensor.reshape(shape)
        if kind == "d":
            return {str(k): unpack(x) for k, x in content}
        if kind == "l":
            return [unpack(x) for x in content]
        return content

    return unpack(json.loads(text))


def receive(sock: socket.socket):
    """The next message on a blocking socket; None at its end."""

    def exactly(count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = sock.recv(min(count - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)

    header = exactly(16)
    if header is None:
        return None
    text, body = struct.unpack("<QQ", header)
    return decode(exactly(text), exactly(body))


# -------------------------------------------------------------------------------------- worker


def describe(error: BaseException, folder: str) -> dict:
    """Kind, first line of the message, and the place in the student's files."""
    lines = str(error).strip().splitlines() or [""]
    where, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(folder):
            where = [os.path.basename(code.co_filename), getattr(code, "co_qualname", code.co_name)]
        trace = trace.tb_next
    return {"kind": type(error).__name__, "message": lines[0][:300], "where": where}


def work(sock: socket.socket, folder: str) -> None:
    """Answer the judge's probes until it hangs up."""
    import math
    import random

    import numpy as np

    sys.path.insert(0, folder)
    while (request := receive(sock)) is not None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            namespace = {"torch": torch, "np": np, "math": math, "F": torch.nn.functional}
            exec(compile(request["source"], "<probe>", "exec"), namespace)
            answer = encode({"result": namespace[request["name"]](**request["inputs"])})
        except BaseException as error:  # sys.exit and Ctrl-C too
            answer = encode({"error": describe(error, folder)})
        sys.stdout.flush()
        sock.sendall(answer)


def serve(fd: int) -> None:
    """The nursery: fork a worker for each request, and clean up behind it when the judge says so."""
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):  # so that no worker spends time on them
        import imageio.v3  # noqa: F401
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import tqdm  # noqa: F401
        from torch import _dynamo  # noqa: F401  (the first call of torch.func imports it, for seconds)
    if sys.platform == "linux":
        LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of a worker come here
    judge = socket.socket(fileno=fd)
    while True:
        text, ancillary, _, _ = judge.recvmsg(1 << 16, socket.CMSG_SPACE(8))
        if not text:
            return
        request = json.loads(text)
        fds = array.array("i", ancillary[0][2])
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            run_worker(request, list(fds), told)
        for descriptor in [*fds, told]:
            os.close(descriptor)
        with os.fdopen(ready) as pipe:
            guards = pipe.read()
        judge.sendall(json.dumps({"pid": pid, "guards": guards.split()}).encode())
        if not judge.recv(1):  # the judge is through with it
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        while True:  # orphans, where a worker could fork
            for orphan in children():
                os.kill(orphan, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        judge.sendall(json.dumps({"status": status, "seconds": usage.ru_utime + usage.ru_stime}).encode())


def children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def run_worker(request: dict, fds: list[int], told: int) -> None:
    """Become the worker; never returns."""
    code = 1
    try:
        os.setsid()
        sock_fd, output = fds
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2), (sock_fd, 3)):
            os.dup2(source, target)
        told = os.dup2(told, 4)
        os.closerange(5, 1 << 16)
        os.chdir(request["folder"])
        os.umask(0o077)
        home = {"HOME": request["folder"], "TMPDIR": request["folder"], "MPLCONFIGDIR": request["folder"]}
        os.environ.clear()
        os.environ.update({"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", **home})
        tempfile.tempdir = None
        guards = take_guards(request["folder"], request["seconds"], request["memory"])
        os.write(told, " ".join(guards).encode())
        os.close(told)
        sys.stdout = os.fdopen(1, "w", buffering=1 << 13, errors="replace", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="replace", closefd=False)
        work(socket.socket(fileno=3), request["folder"])
        code = 0
    except BaseException as error:
        with contextlib.suppress(Exception):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


# --------------------------------------------------------------------------------- for the judge


class Failed(Exception):
    """The student's code gave no answer; the message says why. kind: open, error, time, memory, output or exit."""

    def __init__(self, message: str, kind: str = "error"):
        super().__init__(message)
        self.kind = kind


def source_of(probe) -> str:
    """The text of a probe and of the functions of its file that it calls; never of one that knows an answer."""
    wanted, queue = {}, [probe]
    while queue:
        function = queue.pop()
        if function.__name__ in wanted:
            continue
        if function.__name__.startswith("oracle"):
            raise ValueError(f"the probe {probe.__name__} would give {function.__name__} to the student's process")
        wanted[function.__name__] = textwrap.dedent(inspect.getsource(function))
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            named = (function.__globals__.get(name) for name in code.co_names)
            queue += [f for f in named if inspect.isfunction(f) and f.__module__ == probe.__module__]
    return "\n\n".join(wanted.values())


class Sandbox:
    """The judge's end of a nursery; use it in a `with`. patience: factor on the wall clock of every test."""

    def __init__(self, patience: float = 1.0):
        self.patience = patience

    def __enter__(self) -> Sandbox:
        self.socket, theirs = socket.socketpair()
        kept = (
            "PATH",
            "LD_LIBRARY_PATH",
            "VIRTUAL_ENV",
            "HOME",
            "XDG_CACHE_HOME",
            "MPLCONFIGDIR",
        )
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self.folder = tempfile.mkdtemp(prefix="homework_")
        os.chmod(self.folder, 0o711)
        environment |= single | {"LANG": "C.UTF-8"}
        command = [sys.executable, "-I", "-B", __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, cwd=self.folder, stdin=subprocess.DEVNULL
        )
        theirs.close()
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def student(self, files: dict[str, str], seconds: float, memory: int = MEMORY_LIMIT):
        """A worker with these files; gone, with all that it wrote, at the end of the block."""
        folder = tempfile.mkdtemp(dir=self.folder)
        for name, text in files.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_text(text, encoding="utf-8", errors="surrogatepass")
        ours, theirs = socket.socketpair()
        output, output_end = os.pipe()
        request = json.dumps({"folder": folder, "seconds": seconds, "memory": memory}).encode()
        fds = array.array("i", [theirs.fileno(), output_end])
        self.socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        theirs.close()
        os.close(output_end)
        started = json.loads(self.socket.recv(1 << 16))
        worker = Worker(ours, output, seconds, started["guards"], self.patience)
        try:
            yield worker
        finally:
            self.socket.sendall(b"x")
            ended = json.loads(self.socket.recv(1 << 16))
            worker.seconds = ended["seconds"]
            ours.close()
            os.close(output)
            shutil.rmtree(folder, ignore_errors=True)


class Worker:
    """A student's process, as the tests see it."""

    def __init__(self, sock: socket.socket, output: int, seconds: float, guards: list[str], patience: float):
        self.socket, self.output, self.guards, self.limit = sock, output, guards, seconds
        self.wall = patience * (WALL_FACTOR * seconds + WALL_EXTRA)
        self.deadline = time.monotonic() + self.wall
        self.seconds, self.printed, self.said = 0.0, 0, b""

    def run(self, probe, **inputs):
        """What the probe returns there; Failed when there is no answer."""
        message = encode({"source": source_of(probe), "name": probe.__name__, "inputs": inputs})
        answer = self._exchange(message)
        if not isinstance(answer, dict) or not {"result", "error"} & set(answer):
            raise Failed("the answer cannot be read")
        if "result" in answer:
            return answer["result"]
        raise self._failure(answer["error"])

    def _failure(self, error) -> Failed:
        try:
            kind, message, where = str(error["kind"]), str(error["message"]), error["where"]
            place = f" in {where[0]}, {where[1]}" if where else ""
        except (TypeError, KeyError, IndexError):
            return Failed("the answer cannot be read")
        text = "".join(c if c.isprintable() else "?" for c in f"{kind}{place}: {message}")[:300]
        if kind == "NotImplementedError":
            return Failed(f"not written yet ({text})", "open")
        if kind == "SystemExit":
            return Failed(f"sys.exit was called{place}", "exit")
        if kind == "MemoryError" or "allocate memory" in message:
            return Failed(f"more than {MEMORY_LIMIT >> 30} GB of memory{place}", "memory")
        return Failed(text)

    def _exchange(self, message: bytes):
        """Send a request and wait for the answer, while what the worker prints is read and counted."""
        self.socket.setblocking(False)
        os.set_blocking(self.output, False)
        waiting, received = memoryview(message), bytearray()
        with selectors.DefaultSelector() as selector:
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            selector.register(self.socket, both)
            selector.register(self.output, selectors.EVENT_READ)
            while True:
                left = self.deadline - time.monotonic()
                events = selector.select(max(0.0, left)) if left > 0 else []
                if not events:
                    raise Failed(f"no answer after {self.wall:g} seconds", "time")
                for key, mask in events:
                    if key.fileobj == self.output:
                        part = os.read(self.output, 1 << 16)
                        self.printed += len(part)
                        self.said = (self.said + part)[:2000]
                        if self.printed > OUTPUT_LIMIT:
                            raise Failed(f"printed more than {OUTPUT_LIMIT >> 20} MB", "output")
                        if not part:
                            selector.unregister(self.output)
                        continue
                    try:
                        if mask & selectors.EVENT_WRITE and waiting:
                            waiting = waiting[self.socket.send(waiting[: 1 << 20]) :]
                            if not waiting:
                                selector.modify(self.socket, selectors.EVENT_READ)
                        if mask & selectors.EVENT_READ:
                            part = self.socket.recv(1 << 20)
                            if not part:
                                raise ConnectionError
                            received += part
                    except BlockingIOError:
                        continue
                    except ConnectionError:
                        raise Failed(
                            f"the process ended without an answer (or used up {self.limit:g} seconds)", "exit"
                        ) from None
                if len(received) >= 16:
                    text, body = struct.unpack("<QQ", received[:16])
                    if text + body > REPLY_LIMIT:
                        raise Failed("the answer is too long", "output")
                    if len(received) >= 16 + text + body:
                        try:
                            return decode(bytes(received[16 : 16 + text]), bytes(received[16 + text :]))
                        except (ValueError, TypeError, KeyError, RecursionError, RuntimeError, AttributeError):
                            raise Failed("the answer cannot be read") from None


if __name__ == "__main__":
    serve(int(sys.argv[1]))
