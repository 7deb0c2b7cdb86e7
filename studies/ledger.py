"""The ledger: which recipes there are, and whose results stand.

A case is one recipe of a method and has one stable name, METHOD/CASE. Its result of seed S is
`results/METHOD/CASE_seedS.json`, and its entry in `results/reproduce.json` is METHOD/CASE_seedS. Where a script or a
flag was called otherwise when results were measured, the case says so in `was`: the key, and with it the result, stays.
"""

from __future__ import annotations

from fewshot.experiment import git_commit, parse_python, write_json
from fewshot.images.omniglot import ARCHIVES

import ast
import functools
import hashlib
import importlib
import json
import re
import shlex
import threading
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
TEST = "--test --num_test_tasks 600"
MNIST = f"{TEST} --dataset mnist --num_classes 10"  # another hand's digits


class Case(NamedTuple):
    """One line of a table or one curve: `recipe` is what it is about, `cpu` and `full` how long it trains and tests."""

    name: str
    recipe: str = ""
    cpu: str = ""
    full: str = ""
    seeds: int = 1
    minutes: float = 5  # of one seed at --scale cpu with one core, for the progress bar
    beyond: bool = False  # more than three hours hold: at --scale cpu only where --only names it
    start: str = ""  # METHOD/CASE, with the same seed, whose weights it starts from or tests
    script: str = ""  # where it is not METHOD.py
    was: str = ""  # script and recipe when its results were measured, where they were called otherwise
    method: str = ""  # the study's name; `methods` fills it in

    @property
    def full_name(self) -> str:
        return f"{self.method}/{self.name}"

    @property
    def tests(self) -> bool:
        """Whether it trains nothing and only tests the run of `start`."""
        return "--test" in self.recipe.split()

    @property
    def writes_its_own(self) -> bool:
        """Whether its script writes several files itself, to --out."""
        return getattr(studies()[self.method], "OWN_OUTPUT", False)

    @property
    def then(self) -> Case:
        """The case as it was called when its results were measured."""
        script, _, recipe = self.was.partition(" ")
        return self._replace(script=script, recipe=recipe, was="") if self.was else self


def on_mnist(start: str, flags: str = "", kind: str = "", seeds: int = 3) -> list[Case]:
    """What the run `start` says of MNIST's digits, by shots."""
    return [
        Case(f"mnist_{kind}{K}shot", f"{MNIST} --num_shot {K}{flags}", seeds=seeds, minutes=3, beyond=True, start=start)
        for K in (1, 5, 10, 20)
    ]


@functools.cache
def studies() -> dict[str, ModuleType]:
    """{method: its study}: the files of this folder that hold CASES."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    with_cases = [file.stem for file in files if re.search(r"^CASES = ", file.read_text(), re.MULTILINE)]
    return {name: importlib.import_module(f"studies.{name}") for name in with_cases}


def named(method: str, cases: list[Case]) -> list[Case]:
    return [case._replace(method=method, script=case.script or f"{method}.py") for case in cases]


@functools.cache
def all_cases() -> tuple[Case, ...]:
    return tuple(case for method, study in studies().items() for case in named(method, study.CASES))


def cases_of(what: str, mini_imagenet: str | None = None) -> list[Case]:
    """The cases of a method or of "all"; the meta-LSTM's with those on the folder `mini_imagenet` where it is given."""
    cases = list(all_cases())
    if mini_imagenet:
        cases += named("meta_lstm", studies()["meta_lstm"].with_images(mini_imagenet))
    return [case for case in cases if what in ("all", case.method)]


def case_of(start: str) -> Case:
    """The case that another names METHOD/CASE as its start."""
    (case,) = (case for case in all_cases() if case.full_name == start)
    return case


# --------------------------------------------------------------------------------------- jobs


class Job(NamedTuple):
    name: str  # METHOD/CASE_seedS
    case: Case
    seed: int
    flags: list[str]
    key: str  # of script, flags and dataset as they were called then: the same key, the same result
    start: Job | None = None  # the run that must be there before

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"{self.name.replace('/', '_')}_{self.key}"

    @property
    def command(self) -> str:
        return " ".join(["python", self.case.script, *map(shlex.quote, self.flags)])


def make_jobs(cases: list[Case], scale: str, device: str, dataset: str, only: str = "") -> list[Job]:
    """A job for each seed of each case; `only`: texts of which a job's name must hold one."""
    jobs, kinds = [], set()
    # A table's results are Omniglot's; only a smoke run takes what it finds.
    dataset = "omniglot" if dataset == "auto" and scale != "smoke" else dataset
    pixels = hashlib.sha256(repr(ARCHIVES).encode()).hexdigest()[:16] if dataset == "omniglot" else dataset
    for case in cases:
        kind = case.method, re.sub(r"\d+", "", case.name)
        if scale == "smoke" and (kind in kinds or case.tests):
            continue  # the same code with other numbers; what a test needs is not there
        kinds.add(kind)
        for seed in range(1, (1 if scale == "smoke" else case.seeds) + 1):
            name = f"{case.full_name}_seed{seed}"
            if case.beyond and scale == "cpu" and not only:
                continue
            if not any(text in name for text in only.split(",")):
                continue
            # At smoke scale the script's own --smoke decides on lengths and sizes.
            length = {"smoke": "--smoke", "cpu": case.cpu, "full": case.full}[scale]

            def words(case: Case, length: str = length, seed: int = seed) -> list[str]:
                flags = shlex.split(f"{case.recipe} {length}")
                flags += [] if case.writes_its_own or "--dataset" in flags else ["--dataset", dataset]
                return [*flags, "--random_seed", str(seed)]

            flags, identity, start = words(case), words(case.then), None
            if case.start and scale != "smoke":  # at smoke scale it starts afresh
                (start,) = (j for j in make_jobs([case_of(case.start)], scale, device, dataset, "_") if j.seed == seed)
                from_run = "--checkpoint" if case.tests else "--init_from"
                flags += [from_run, str(Path("runs") / f"reproduce_{scale}" / start.folder)]
                identity += [from_run, start.key]
            key = hashlib.sha256(json.dumps([case.then.script, identity, pixels]).encode()).hexdigest()[:16]
            jobs.append(Job(name, case, seed, [*flags, "--device", device], key, start))
    return jobs


# ------------------------------------------------------------------------------------- results


def code_of(script: str, root: Path = HERE) -> str:
    """A digest of the files that `script` consists of: itself and what it imports of this folder, directly or not.

    Of a package these are the modules imported and the __init__.py of every folder on the way.
    """
    files, todo = set(), [root / script]
    while todo:
        file = todo.pop()
        if file in files or not file.is_file():
            continue
        files.add(file)
        package = file.relative_to(root).parent.parts
        for level, name in imports_of(file.read_text()):
            parts = [*package[: len(package) - level + 1], *name] if level else name
            for i in range(1, len(parts) + 1):
                path = root.joinpath(*parts[:i])
                todo += [path.with_name(f"{path.name}.py"), path / "__init__.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


@functools.cache
def imports_of(text: str) -> list[tuple[int, list[str]]]:
    """(dots, names) of each import of a program: "from ..a import b" is (2, ["a", "b"]), for b may be a module."""
    found = []
    for node in ast.walk(parse_python(text)):
        if isinstance(node, ast.ImportFrom):
            before = node.module.split(".") if node.module else []
            found += [(node.level, [*before, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(0, alias.name.split(".")) for alias in node.names]
    return found


def collected(job: Job, out: Path) -> Path:
    return out / f"{job.name}.json"


def collect(job: Job, out: Path, runs: Path) -> None:
    """Copy a run's metrics to `<out>/<METHOD>/<CASE>_seed<S>.json`."""
    if job.case.writes_its_own:
        return
    target = collected(job, out)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, json.loads((runs / job.folder / "metrics.json").read_text()))


class Ledger:
    """`<out>/reproduce.json`, which runs are done, and `<out>/pulses.json`, what their code computed.

    An entry holds the key of its job, the command, minutes, the digest of the code and the name of its pulse. One that
    was measured under another name keeps `command_then`, and `key_then` where the key is another for it.
    """

    def __init__(self, out: Path):
        self.path, self.pulse_path, self.lock = out / "reproduce.json", out / "pulses.json", threading.Lock()
        self.entries, self.pulses = (
            json.loads(path.read_text()) if path.exists() else {} for path in (self.path, self.pulse_path)
        )

    def has(self, job: Job) -> bool:
        return self.entries.get(job.name, {}).get("key") == job.key

    def pulse_of(self, job: Job) -> dict | None:
        return self.pulses.get(self.entries.get(job.name, {}).get("pulse"))

    def add(self, job: Job, minutes: float, taken: dict | None) -> None:
        with self.lock:
            code = code_of(job.case.script)
            entry = {"key": job.key, "command": job.command, "minutes": round(minutes, 2), "code": code}
            if taken:
                content = json.dumps([taken[part] for part in ("losses", "parameters", "figures")])
                entry["pulse"] = hashlib.sha256(content.encode()).hexdigest()[:12]
                self.pulses[entry["pulse"]] = taken | {"commit": git_commit()}
            self.entries[job.name] = entry
            in_use = {entry.get("pulse") for entry in self.entries.values()}
            self.pulses = {name: taken for name, taken in self.pulses.items() if name in in_use}
            write_json(self.path, dict(sorted(self.entries.items())))
            write_json(self.pulse_path, self.pulses)
