"""Which results stand: measured, confirmed, drifted, missing; or an error, where nobody can tell.

A result belongs to what the code computes, so the pulse of its recipe is taken with the code of now and compared with
the one that was kept. On another processor the bits are others: there the old code is asked too, that of the commit
beside the pulse.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import write_json

import functools
import hashlib
import importlib
import io
import json
import shlex
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from . import pulse
from .ledger import HERE, Case, Job, Ledger, case_of, code_of, collected, studies

STATES = ("measured", "confirmed", "drifted", "missing", "error")
# Flags that change no figure; the run that --init_from names is the case's start, which its key knows.
WHERE = {"device", "data_folder", "dataset", "log_dir", "run_name", "out", "init_from"}
PULSES = Path("runs") / "pulses"
UNPACKING = threading.Lock()


class CannotTell(Exception):
    """A pulse cannot be taken; says which and why."""


def pulse_case(case: Case) -> Case:
    """Whose pulse a case has: that of a test is the one of the run it tests, whose end is such a test."""
    return case_of(case.start) if case.tests else case


def length_of(case: Case) -> str:
    """The flags that make a pulse of a case's script short."""
    return studies()[case.script.removesuffix(".py")].PULSE


def take_pulse(case: Case, code: Path = HERE, take: Callable = pulse.take) -> dict:
    """The pulse of a case's recipe with the code in folder `code`: on glyphs, in float32, one thread."""
    case = pulse_case(case)
    flags = shlex.split(f"{case.recipe} {length_of(case)}") + ["--random_seed", "1", "--device", "cpu"]
    flags += ["--warmup_steps", "0"] if "--warmup_steps 0" in case.recipe else []  # without it stays without
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--log_dir", folder]
        if case.writes_its_own:
            flags += ["--out", folder]
        else:
            flags += ["--dataset", "glyphs"]
            flags += [] if hasattr(studies()[case.method], "OF_NUMBERS") else ["--dtype", "float32"]
        return take(code, case.script, flags, PULSES)


def kept(path_of: list, ask: Callable[[], dict]) -> dict:
    """What `ask` gave when it was last asked on this machine for the same `path_of`; an error is not kept."""
    name = hashlib.sha256(json.dumps([*path_of, pulse.machine()]).encode()).hexdigest()[:16]
    path = PULSES / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    taken = ask()
    if "error" not in taken:
        write_json(path, taken)
    return taken


def known_pulse(case: Case, take: Callable = pulse.take) -> dict:
    """take_pulse(case), or what it was for this very code when it was last taken here."""
    case = pulse_case(case)
    asked = [code_of(case.script), length_of(case), case.script, case.recipe]
    return kept(asked, lambda: take_pulse(case, take=take))


def pulse_at(commit: str, case: Case, take: Callable = pulse.take) -> dict:
    """The pulse of a case with the code of an older commit, taken on this machine."""
    case = pulse_case(case)
    asked = [commit, length_of(case), case.script, case.recipe]
    return kept(asked, lambda: take_pulse(case, code_at(commit), take))


def code_at(commit: str) -> Path:
    """A folder with the code of an older commit."""
    folder = PULSES / f"code_{commit}"
    with UNPACKING:
        if not folder.exists():
            git = ["git", "-C", str(HERE), "archive", commit.rstrip("+"), ".", ":!results", ":!docs", ":!tests"]
            done = subprocess.run(git, capture_output=True)
            if done.returncode != 0:
                raise CannotTell(f"the code of {commit} is not in this clone (git fetch --unshallow brings it)")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
                tarfile.open(fileobj=io.BytesIO(done.stdout)).extractall(f"{unpacked}/code", filter="data")
                Path(unpacked, "code").rename(folder)
    return folder


def drift(job: Job, ledger: Ledger, out: Path, take: Callable = pulse.take) -> str | None:
    """In what the code of now differs from the code of a job's result; None where it computes the same."""
    found, reasons = collected(job, out), []
    if found.exists():
        now, before = flags_now(job), json.loads(found.read_text())["flags"]
        if job.case.tests:  # its own flags are in its key
            now = {name: value for name, value in now.items() if f"--{name}" not in job.flags}
        for name in sorted(now.keys() & before.keys() - WHERE):
            if now[name] != before[name]:
                reasons.append(f"--{name} {before[name]} -> {now[name]}")
    before = ledger.pulse_of(job)
    if before is None:
        return "no pulse was kept"
    now = taken(known_pulse(job.case, take), "the code of now")
    different = pulse.difference(before, now)
    if different and before["on"] != now["on"]:
        # Another processor or torch has other bits: compare old and new code here. The old code is asked as it was.
        case = pulse_case(job.case)
        case = case.then if "command_then" in ledger.entries[job.name] else case
        old = taken(pulse_at(before["commit"], case, take), f"the code of {before['commit']}")
        different = pulse.difference(old, now)
    return "; ".join([*([different] if different else []), *reasons]) or None


def taken(pulse: dict, whose: str) -> dict:
    if "error" in pulse:
        raise CannotTell(f"{whose} gives no pulse: {pulse['error']}")
    return pulse


def flags_now(job: Job) -> dict:
    """Every flag of a job as its script resolves them now; of a test those of the run it tests."""
    job = job.start if job.case.tests else job
    module = importlib.import_module(job.case.script.removesuffix(".py"))
    return json.loads(json.dumps(experiment.flags_of(module.parse_args(job.flags))))


def status(jobs: list[Job], out: Path, num_jobs: int) -> dict[str, tuple[str, str]]:
    """{job: (one of STATES, why)}; pulses are taken `num_jobs` at a time, first all of now, then those of old code."""
    ledger, found = Ledger(out), {}
    code = functools.cache(code_of)
    for job in jobs:
        if not ledger.has(job):
            found[job.name] = "missing", "no result of this recipe"
        elif ledger.entries[job.name]["code"] == code(job.case.script):
            found[job.name] = "measured", ""

    def ask(jobs: list[Job]) -> None:
        for job in jobs:
            try:
                why = drift(job, ledger, out, warm.take)
                found[job.name] = ("drifted", why) if why else ("confirmed", "")
            except CannotTell as error:
                found[job.name] = "error", str(error)
        bar.update()

    # What shares a pulse is asked one after another; what asks the same old code stands together.
    by_pulse: dict[tuple, list[Job]] = {}
    for job in jobs:
        if job.name not in found:
            case, before = pulse_case(job.case), ledger.pulse_of(job) or {}
            by_pulse.setdefault((before.get("commit", ""), case.script, case.recipe), []).append(job)
    cases = {key[1:]: jobs[0].case for key, jobs in by_pulse.items()}
    bar = tqdm(total=len(cases) + len(by_pulse), desc="pulses", disable=None)
    with pulse.WarmProcesses() as warm, ThreadPoolExecutor(num_jobs) as pool:
        for _ in pool.map(lambda case: known_pulse(case, warm.take), cases.values()):
            bar.update()
        list(pool.map(ask, [by_pulse[key] for key in sorted(by_pulse)]))
    bar.close()
    return {job.name: found[job.name] for job in jobs}


def print_status(found: dict[str, tuple[str, str]]) -> None:
    for name, (state, why) in found.items():
        print(f"{state:10s}{name}" + (f": {why}" if why else ""))
    counts = [f"{sum(state == s for state, _ in found.values())} {s}" for s in STATES]
    print(", ".join(counts if not counts[-1].startswith("0") else counts[:-1]))
