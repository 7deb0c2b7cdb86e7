"""Files of a run: written whole or not at all, read without executing anything, locked while a run trains."""

from __future__ import annotations

from fewshot.experiment.errors import UserError

import ast
import atexit
import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import torch

try:  # locks of files; Windows has others
    import fcntl
except ImportError:
    fcntl = None


def read_json(path: Path, flag: str, **parts) -> dict:
    """The JSON object in a run folder; UserError names `flag` when there is none that has `parts`, of these types."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        if lacks := [name for name, kind in parts.items() if not isinstance(content.get(name), kind)]:
            raise ValueError(f"it lacks {', '.join(lacks)}")
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {path.parent} is not a run folder ({path.name}: {error})") from None
    return content


def read_flags(folder: Path | str, flag: str, *needed: str) -> dict:
    """What flags.json of a run says: script, dataset, command, and all flags, those `needed` too, under "flags"."""
    saved = read_json(Path(folder) / "flags.json", flag, script=str, dataset=str, command=str, flags=dict)
    if lacks := [name for name in needed if name not in saved["flags"]]:
        raise UserError(f"--{flag} {folder} is not a run folder (flags.json lacks --{lacks[0]})")
    return saved


def write_atomically(path: Path, write, flag: str = "place") -> None:
    """Call write(file) on a temporary file and move it to `path`; the old file survives a failure.

    flag: what chooses another place, for the words of the error.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")  # two threads may write it
    try:
        with open(partial, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path} ({error}); free some space or choose another {flag}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # there only after a failure, of whatever kind


def write_beside(checkpoint: str, name: str, write) -> None:
    """write_atomically into a tested run's folder; where nothing can be written there the test is worth no less."""
    with contextlib.suppress(UserError):
        write_atomically(Path(checkpoint) / name, write)


def write_json(path: Path, content: dict, flag: str = "place") -> None:
    """Indented, but innermost lists each on one line."""
    text = json.dumps(content, indent=2)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text)
    write_atomically(path, lambda out: out.write((text + "\n").encode()), flag)


def load_checkpoint(path: Path, parts: tuple[str, ...] = ("model", "step")) -> dict:
    """A checkpoint's content; nothing pickled in it is executed. UserError when it cannot be read or lacks `parts`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the run has saved nothing yet, start a new one") from None
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it readable or use another run") from None
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason}); use another run") from error
    whole = isinstance(content, dict) and content.keys() >= set(parts)
    if not whole or not all(isinstance(content.get(part, {}), dict) for part in ("model", "objects", "rng")):
        raise UserError(f"{path} is not a checkpoint that these scripts have written; use another run")
    return content


def load_state(target, state: dict, path: Path) -> None:
    """target.load_state_dict(state), with one line when the checkpoint is of another model."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is of another model ({reason}); give the run's own flags") from error


PARSING = threading.Lock()


def parse_python(text: str) -> ast.Module:
    """The syntax tree of a program, from one thread at a time: Python 3.11 miscounts when two parse at once.

    It then raises SystemError (python/cpython#106905).
    """
    with PARSING:
        return ast.parse(text)


def git_commit() -> str | None:
    """Commit of the code, with a + when it holds more than that commit; None outside a repository of its own.

    A copy of the package that another repository ignores or does not track has no commit. Variables such as GIT_DIR,
    which name another repository, are ignored. A module of the package that was imported and never added is more.
    """
    here = Path(__file__).resolve().parents[2]
    own = Path(__file__).resolve().relative_to(here).as_posix()
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG_")}

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, check=True, env=env)
        return os.fsdecode(done.stdout).strip()

    files = [str(getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    mine = {f for f in files if f.startswith(f"{here}{os.sep}") and "site-packages" not in f}
    mine = {Path(f).relative_to(here).as_posix() for f in mine}
    try:
        added = set(git("ls-files", "-z", "--", own, *mine).split("\0"))
        if own not in added:
            return None
        commit = git("rev-parse", "--short=12", "HEAD")
        # What a run writes into results/ is no change of the code.
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!results") or mine - added
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


LOCKS: dict[Path, object] = {}  # of run folders, held until this process ends


def hold(folder: Path) -> None:
    """Take the lock of a run folder; UserError when another process trains that run. The system frees it at our end."""
    path = folder.resolve() / ".lock"
    if path in LOCKS:
        return
    try:
        file = open(path, "a")
    except OSError:
        return  # a folder that cannot be written to will say so when it must be
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            file.close()
            raise UserError(f"--resume {folder}: another process is training this run; wait for its end") from None
        print(f"note: no locks on this file system ({error.strerror}); start {folder} only once", file=sys.stderr)
    LOCKS[path] = file
    atexit.register(release, folder)


def release(folder: Path) -> None:
    """Give up the lock of a run folder, and remove its file."""
    file = LOCKS.pop(folder.resolve() / ".lock", None)
    if file:
        with contextlib.suppress(OSError):
            Path(file.name).unlink(missing_ok=True)
        file.close()
