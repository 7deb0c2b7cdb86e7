"""Running what is due: each run in a process of its own, resumed where it was interrupted, collected where it ended."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from . import status, warm
from .ledger import HERE, Job, Ledger, collect, collected


def log_of(job: Job, runs: Path) -> Path:
    """What a job's process says."""
    return runs / f"{job.name.replace('/', '_')}.log"


def run_job(job: Job, out: Path, runs: Path, threads: int, lock_file, children: set, drifted: bool) -> str | None:
    """Run or resume one job. Returns why it failed, or None."""
    folder = runs / job.folder
    if (folder / "metrics.json").exists():  # finished, and stopped before it was collected; or of older code
        if not drifted:
            return None
        shutil.rmtree(folder)
    command = [str(HERE / job.case.script)]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # it had saved nothing
        command += [*job.flags, "--log_dir", str(runs)]
        # Scripts with an output of their own name their own runs.
        own = ["--out", str(out / job.case.method)]
        if job.case.writes_its_own:
            (out / job.case.method).mkdir(parents=True, exist_ok=True)
        command += own if job.case.writes_its_own else ["--run_name", folder.name]
        if job.case.tests:
            folder.mkdir()
            command += ["--out", str(folder / "metrics.json")]
    threads = min(threads, int(os.environ.get("OMP_NUM_THREADS", threads)))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log_of(job, runs), "ab") as log:
        if "--smoke" in job.flags and threads == 1:  # seconds of importing torch are most of such a run
            child = warm.Process(*command, cwd=Path.cwd(), env=environment, log=log_of(job, runs), keep=lock_file)
        else:
            linux = (
                {"pass_fds": (lock_file.fileno(),), "preexec_fn": warm.die_with_parent} if os.name == "posix" else {}
            )
            words = [sys.executable, *command]
            child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, **linux)
        children.add(child)
        code = child.wait()
        children.discard(child)
    if code != 0:
        last = log_of(job, runs).read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        return f"exit code {code}: {last[0][:200]}"
    return None


def trained_minutes(job: Job, out: Path) -> float:
    """Minutes in which a collected run trained, all its parts together; 0 for the parts that do not tell."""
    path = collected(job, out)
    return json.loads(path.read_text()).get("train_seconds", 0) / 60 if path.exists() else 0.0


def lock(file, wait: bool) -> None:
    """Hold `file` for this process and its runs; OSError where another has it and `wait` is False."""
    try:
        import fcntl
    except ImportError:  # Windows: two reproduce.py at once are the user's own care
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise
        print(f"note: no locks on this file system ({error.strerror}); start reproduce.py only once", file=sys.stderr)


def run_all(jobs: list[Job], drifted: set[str], out: Path, runs: Path, num_jobs: int) -> list[str]:
    """Run `jobs`, `num_jobs` at a time, those named `drifted` anew; returns the failures, one line each."""
    out.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    lock_file = open(runs / "reproduce.lock", "w")  # inherited by the runs: free when all of them have ended
    try:
        lock(lock_file, wait=False)
    except OSError:
        print(f"waiting for runs that another reproduce.py started in {runs}", file=sys.stderr)
        lock(lock_file, wait=True)
    ledger, failures, children = Ledger(out), [], set()
    todo = {j.folder: j for job in jobs for j in (job.start, job) if j}.values()
    bar = tqdm(total=sum(job.case.minutes for job in todo), disable=None, bar_format="{l_bar}{bar}| left: {remaining}")
    threads, stop = max(1, (os.cpu_count() or 1) // num_jobs), threading.Event()
    smoke = any("--smoke" in job.flags for job in jobs)
    due = {job.folder for job in jobs}
    one_at_a_time, ended = defaultdict(threading.Lock), {}  # by folder: two tests may wait for one training

    def done(job: Job) -> bool:
        """Run a job, after the one whose weights it needs; that one's result stays as it is where it is not due."""
        if stop.is_set() or (job.start and not done(job.start)):
            return False
        with one_at_a_time[job.folder]:
            if job.folder in ended:
                return ended[job.folder]
            begin, new = time.perf_counter(), job.folder in due or not ledger.has(job)
            why = run_job(job, out, runs, threads, lock_file, children, job.name in drifted)
            minutes = (time.perf_counter() - begin) / 60
            if stop.is_set() and why:
                return False
            taken = status.known_pulse(job.case) if why is None and new and not smoke else None
            if taken and "error" in taken:
                why = f"its pulse cannot be taken: {taken['error']}"
            if why is None and new:
                collect(job, out, runs)
                # The training's minutes where they are more: the run had been interrupted.
                ledger.add(job, max(minutes, trained_minutes(job, out)), taken)
            elif why:
                failures.append(f"{job.name}: {why} (see {log_of(job, runs)})")
            bar.write(f"{job.name}: {'failed' if why else 'done'} in {minutes:.1f} minutes")
            ended[job.folder] = why is None
            return ended[job.folder]

    def work(job: Job) -> None:
        done(job)
        bar.update(job.case.minutes)

    # A first seed of everything; what others start from before them, long runs before short ones.
    order = lambda job: (job.seed, job.start is not None, -job.case.minutes)
    with ThreadPoolExecutor(num_jobs) as pool:
        futures = [pool.submit(work, job) for job in sorted(todo, key=order)]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            stop.set()
            for child in list(children):
                child.send_signal(signal.SIGINT)  # they save and leave
            print("interrupted: the runs save and stop; the same command continues", file=sys.stderr)
            raise
        finally:
            bar.close()
    lock_file.close()
    return failures
