"""The runs behind every table and figure of the source documents, and the ledger of their results.

    python reproduce.py status                     which results stand, and which the code has left behind
    python reproduce.py all --scale smoke          everything in its smallest form, to see that it works
    python reproduce.py all --scale cpu --jobs 2   what is due of what two CPU cores can do in some hours
    python reproduce.py all --scale full           the papers' lengths, for a GPU
    python reproduce.py comparison                 one part: mann, meta_lstm, comparison, memorization, ...

Each run is a script of this package in a process of its own, `--jobs` at a time; what was interrupted is resumed; what
fails is named and makes the exit code 1. Results go to `--out` (results/, or a folder of runs/ for smoke), a JSON file
a run; `python report.py` then writes the tables, pictures and documents.

A result belongs to what the code computes, not to how it is spelled. `status` says of each result: measured (by this
very code), confirmed (the code was changed since, its pulse is equal: see pulse.py), drifted (the pulse differs, and in
which step and quantity) or missing. Only the last two are due.
"""

from __future__ import annotations

import experiment
from experiment import UserError, whole, write_json

import ast
import ctypes
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import pulse
from omniglot import ARCHIVES

HERE = Path(__file__).resolve().parent
OWN_OUTPUT = ("costs", "features")  # parts whose script writes several files itself, to --out
PARTS = ("mann", "meta_lstm", "comparison", "mae", "memorization", "bayes", "costs", "features")
WHERE = {"device", "data_folder", "dataset", "log_dir", "run_name", "out"}  # flags that change no figure
TOLERANCE = 1e-3  # relative, of pulses taken on two machines whose old code is not at hand
COURSE = "--head recurrent --logit_scale 1 --forget_bias 0 --no-rotations --schedule constant --clip 0"
LAKE = "--split lake --num_classes 20 --within_alphabet"
RESIDUAL = "--encoder residual --image_size 32"
LONG = "--jitter 0.1 --train_steps 12000 --eval_freq 500"
TASKS = "--num_test_tasks 2000"
TEST = "--test --num_test_tasks 600"
MNIST = f"{TEST} --dataset mnist --num_classes 10"  # another hand's digits
SCRATCH = "--warmup_steps 0 --encoder strided"  # by the inner loop from the first step
SEQUENCE = "--protocol sequence --num_shot 9 --hidden_dim 200 --shift 0.1 --jitter 0.1 --num_val_tasks 400"
MUON = "--meta_batch_size 16 --optimizer muon --learning_rate 0.05"


class Case(NamedTuple):
    """One line of a table or one curve: `recipe` is what it is about, `cpu` and `full` how long it trains and tests."""

    part: str
    name: str
    script: str
    recipe: str = ""
    cpu: str = ""
    full: str = ""
    seeds: int = 1
    minutes: float = 5  # of one seed at --scale cpu with one core, for the progress bar
    beyond: bool = False  # more than three hours hold: at --scale cpu only where --only names it
    start: str = ""  # part/name of the case, with the same seed, whose weights it starts from or tests

    @property
    def tests(self) -> bool:
        """Whether it trains nothing and only tests the run of `start`."""
        return "--test" in self.recipe.split()


CASES = [
    *[Case("mann", f"K{K}N{N}", "hw1.py", f"--num_shot {K} --num_classes {N}", LONG,
           "--jitter 0.1 --train_steps 50000 --eval_freq 1000", 3, minutes)
      for K, N, minutes in ((1, 2, 3), (2, 2, 4), (1, 3, 4), (1, 4, 5))],
    # The first command of the README; its first seed is timed, on an idle machine.
    Case("mann", "default", "hw1.py", "--num_shot 1 --num_classes 2", seeds=3, minutes=5, beyond=True),
    Case("mann", "conv_K1N5", "hw1.py",
         "--num_shot 1 --num_classes 5 --encoder strided --shared_classes 60 --hidden_dim 256 --learning_rate 2e-3",
         "--train_steps 8000 --eval_freq 500", "--train_steps 40000 --eval_freq 1000", 3, 6),
    Case("mann", "memorisation", "hw1.py",
         "--num_shot 1 --num_classes 5 --fixed_labels --no-rotations --head recurrent --forget_bias 0",
         "--train_steps 5000 --eval_freq 250", "--train_steps 25000"),
    *[Case("mann", f"K1N3_{name}", "hw1.py", f"--num_shot 1 --num_classes 3 {COURSE} {flags}", "--train_steps 5000",
           "--train_steps 25000", minutes=2)
      for name, flags in (("rate_1e-1", "--learning_rate 1e-1"), ("rate_1e-3", "--learning_rate 1e-3"),
                          ("rate_1e-5", "--learning_rate 1e-5"), ("memory_8", "--learning_rate 1e-3 --hidden_dim 8"),
                          ("memory_256", "--learning_rate 1e-3 --hidden_dim 256"),
                          ("gru", "--learning_rate 1e-3 --recurrent gru"),
                          ("3_layers", "--learning_rate 1e-3 --num_layers 3"))],
    *[Case("mann", f"attention_{name}", "hw1.py", f"--memory attention {recipe}",
           f"--train_steps {steps} --eval_freq 500", "--train_steps 40000 --eval_freq 2000", 3, minutes, beyond=True)
      for name, recipe, steps, minutes in (
          ("K1N5", "--num_shot 1 --num_classes 5", 8000, 30),
          ("K5N5", "--num_shot 5 --num_classes 5 --shared_classes 20", 12000, 60),
          ("K1N20", "--num_shot 1 --num_classes 20", 12000, 60))],
    *[Case("mann", f"{name}_sequence", "hw1.py", f"{recipe} --meta_batch_size 128 --learning_rate 3e-3",
           "--train_steps 4000 --eval_freq 500", "--train_steps 100000 --eval_freq 1000", 3, minutes, beyond=True)
      for name, recipe, minutes in (("external", "--memory external", 100), ("lstm", SEQUENCE, 60))],
    # Asked for more classes, shots and sights than they have learned.
    *[Case("mann", f"attention_K1N5_at_K{K}N{N}", "hw1.py",
           f"--test --num_test_tasks 10000 --num_shot {K} --num_classes {N}", seeds=3, minutes=2, beyond=True,
           start="mann/attention_K1N5") for K, N in ((5, 5), (1, 20), (5, 20))],
    *[Case("mann", f"{name}_sequence_at_K19", "hw1.py", "--test --num_test_tasks 10000 --num_shot 19", seeds=3,
           minutes=5, beyond=True, start=f"mann/{name}_sequence") for name in ("external", "lstm")],
    Case("meta_lstm", "5way1shot", "meta_lstm.py", "--num_classes 5 --num_shot 1", "", "--train_steps 30000", 3, 30,
         beyond=True),
    Case("meta_lstm", "5way5shot", "meta_lstm.py", "--num_classes 5 --num_shot 5", "--train_steps 3000 --eval_freq 300",
         "--train_steps 30000", 3, 25, beyond=True),
    # 10 shots leave 10 of a character's 20 images for queries, where the preset wants 15
    Case("meta_lstm", "10way10shot", "meta_lstm.py", "--preset 10way10shot --train_query 5 --num_query 5",
         "--train_steps 250 --eval_freq 125 --num_val_tasks 40", "", 3, 15, beyond=True),
    Case("meta_lstm", "10way10shot_reset", "meta_lstm.py", f"{TEST} --reset_theta0", minutes=15, beyond=True,
         start="meta_lstm/10way10shot"),
    *[Case("meta_lstm", f"5way1shot_{name}", "meta_lstm.py", recipe, "--train_steps 600 --eval_freq 200",
           "--train_steps 6000", minutes=minutes)
      for name, recipe, minutes in (("short", "", 3), ("pool", "--fixed_pool 6", 3),
                                    ("second_order", "--second_order --trained_share 1", 11))],
    Case("comparison", "transfer", "transfer.py", "", "", "--train_steps 16000 --finetune_steps 6000", 3, 5),
    Case("comparison", "protonet", "protonet.py", "", TASKS, TASKS, 3, 2),
    Case("comparison", "protonet_long", "protonet.py", "", f"{TASKS} --train_steps 15000 --eval_freq 1500",
         f"{TASKS} --train_steps 60000 --eval_freq 2000", 3, 10),
    Case("comparison", "protonet_residual", "protonet.py", RESIDUAL,
         f"{TASKS} --train_steps 8000 --eval_freq 1000", f"{TASKS} --train_steps 30000 --eval_freq 2000", 3, 15),
    Case("comparison", "protonet_lake", "protonet.py",
         f"{LAKE} {RESIDUAL} --jitter 0.2 --shift 0.15 --views 32",
         f"{TASKS} --train_steps 10000 --eval_freq 1000", f"{TASKS} --train_steps 30000 --eval_freq 2000", 3, 20,
         beyond=True),
    # The network that ships (pretrained/): other people's pens and sizes, each picture read once as predict.py does.
    Case("comparison", "pretrained", "protonet.py", "--width 48 --jitter 0.2 --shift 0.15 --views 1",
         "--train_steps 800 --eval_freq 400", "--train_steps 15000 --eval_freq 1500", 1, 2),
    Case("comparison", "fomaml", "maml.py", "--first_order --zero_head", "",
         "--train_steps 60000 --eval_freq 1000", 3, 7),
    Case("comparison", "protomaml", "maml.py", "--head proto --first_order --inner_lr 0.01", "",
         "--train_steps 60000 --eval_freq 1000", 3, 7),
    Case("comparison", "maml", "maml.py", "", "", "--train_steps 60000 --eval_freq 1000", 3, 8),
    Case("comparison", "anil", "maml.py", "--freeze_body", "", "--train_steps 60000 --eval_freq 1000", 3, 7),
    *[Case("comparison", f"maml_{N}way{K}shot", "maml.py", f"--num_classes {N} --num_shot {K}",
           "--num_val_tasks 100", "--train_steps 60000 --eval_freq 1000", 3, minutes, beyond=True)
      for N, K, minutes in ((5, 5, 10), (10, 1, 12), (20, 1, 20), (20, 5, 25))],
    Case("comparison", "maml_20way5shot_muon", "maml.py",
         "--num_classes 20 --num_shot 5 --optimizer muon --learning_rate 0.05",
         "--num_val_tasks 100 --train_steps 4200 --eval_freq 2100", "--train_steps 60000 --eval_freq 1000", 3, 40,
         beyond=True),
    # All four N and K are tested with one network, from which MAML goes on; at 5 shots by two inner steps at half the
    # head's usual rate, N / sqrt(64) (docs/log.md).
    Case("comparison", "protonet_vinyals", "protonet.py", "--split vinyals",
         f"{TASKS} --train_steps 15000 --eval_freq 1500", f"{TASKS} --train_steps 60000 --eval_freq 2000", 3, 20,
         beyond=True),
    *[Case("comparison", f"maml_vinyals_{N}way{K}shot", "maml.py",
           f"--split vinyals --num_classes {N} --num_shot {K} --warmup_steps 0 --learning_rate 1e-3{inner}",
           f"--num_val_tasks 100 --train_steps {steps} --eval_freq {steps // 2}",
           "--train_steps 60000 --eval_freq 1000", 3, minutes, beyond=True, start="comparison/protonet_vinyals")
      for N, K, steps, minutes, inner in (
          (5, 1, 200, 3, ""),
          (5, 5, 200, 8, " --inner_steps 2 --head_lr 0.31"),
          (20, 1, 100, 8, ""),
          (20, 5, 60, 15, " --inner_steps 2 --head_lr 1.25"))],
    *[Case("comparison", f"{name}_scratch", "maml.py", f"{SCRATCH} {recipe}", f"--train_steps {steps} --eval_freq 500",
           "--train_steps 60000 --eval_freq 1000", 3, 50, beyond=True)
      for name, steps, recipe in (
          ("maml", 6000, MUON),
          ("fomaml", 8000, f"{MUON} --first_order --zero_head"),
          ("mamlpp", 3500, "--meta_batch_size 16 --learn_inner_lrs --multi_step_loss --per_step_norm --optimizer muon "
                           "--learning_rate 0.05 --inner_steps 2"))],
    Case("comparison", "protomaml_scratch", "maml.py", "--head proto --first_order --inner_lr 0.01 --optimizer muon "
         "--learning_rate 0.05 --warmup_steps 0 --encoder conv4", "--train_steps 4000 --eval_freq 500",
         "--train_steps 60000 --eval_freq 1000", 3, 45, beyond=True),
    Case("comparison", "maml_plain", "maml.py", "--features plain", "", "--train_steps 60000 --eval_freq 1000", 3, 8,
         beyond=True),
    # The paper's own 5-way recipe, with as many queries as the course asks.
    Case("comparison", "maml_paper", "maml.py",
         f"{SCRATCH} --features plain --head_lr 0.4 --meta_batch_size 32 --train_query 15 --schedule constant "
         "--learning_rate 1e-3", "--train_steps 60000 --eval_freq 2000", "--train_steps 60000 --eval_freq 2000", 1, 600,
         beyond=True),
    Case("comparison", "maml_fixed_labels", "maml.py",
         "--num_classes 20 --fixed_labels --warmup_steps 0 --features plain", "--num_val_tasks 100", "", 1, 20,
         beyond=True),
    *[Case("comparison", f"mnist_{name}_{K}shot", script, f"{MNIST} --num_shot {K}{flags}", seeds=seeds, minutes=3,
           beyond=True, start=start)
      for name, script, flags, start, seeds in (
          ("protonet", "protonet.py", "", "comparison/protonet", 3),
          ("transfer", "transfer.py", "", "comparison/transfer", 3),
          ("maml", "maml.py", "", "comparison/maml_10way1shot", 3),
          ("attention", "hw1.py", "", "mann/attention_K1N5", 3),
          ("meta_lstm", "meta_lstm.py", "", "meta_lstm/10way10shot", 1),
          ("meta_lstm_reset", "meta_lstm.py", " --reset_theta0", "meta_lstm/10way10shot", 1))
      for K in (1, 5, 10, 20)],
    Case("mae", "mae", "mae.py", "", "", "--train_steps 30000", 3, 60, beyond=True),
    Case("mae", "mae_1000_steps", "mae.py", "", *["--train_steps 1000 --eval_freq 250"] * 2, 3, 18, beyond=True),
    # By what is hidden, shorter: one reading of a drawing costs half of two, and teaches more slowly.
    *[Case("mae", f"{kind}_{ratio}_masked", "mae.py", f"{flags}--mask_ratio 0.{ratio}",
           f"--train_steps {steps} --eval_freq 200", "", 1, 4, beyond=True)
      for kind, flags, steps in (("mae", "", 200), ("mae_alone", "--contrast 0 ", 600)) for ratio in (25, 50, 75, 90)],
    *[Case("mae", f"vit_{n}_characters", "protonet.py", f"--encoder vit --train_characters {n}", TASKS, TASKS, 3, 12,
           beyond=True) for n in (50, 200, 1100)],
    # A tenth of the rate: at the usual one the start is forgotten.
    *[Case("mae", f"vit_{n}_characters_from_mae", "protonet.py",
           f"--encoder vit --train_characters {n} --learning_rate 0.01 --train_steps 500 --eval_freq 100",
           TASKS, TASKS, 3, 3, beyond=True, start="mae/mae") for n in (50, 200, 1100)],
    *[Case("memorization", f"{task}_{learner}_{regulariser}", "memorization.py",
           f"--task {task} --learner {learner} --regulariser {regulariser}", seeds=3, minutes=2, beyond=True)
      for task in ("sinusoid", "basis", "diseased", "grasping") for learner in ("maml", "blackbox")
      for regulariser in ("none", "weights", "activations")],
    *[Case("memorization", f"characters_maml_{regulariser}", "memorization.py",
           f"--task characters --regulariser {regulariser}", minutes=12, beyond=True)
      for regulariser in ("none", "weights", "activations")],
    *[Case("bayes", name, "bayes.py", recipe, seeds=3, minutes=minutes, beyond=True)
      for name, recipe, minutes in (("phase", "", 3), ("amplitude", "--metadata amplitude", 3),
                                    ("phase_without_phi1", "--drop_phi1", 3), ("omniglot", "--world omniglot", 8))],
    Case("costs", "costs", "profile_costs.py", "--sweep all --engine auto", "", "", 1, 5),
    Case("features", "features", "feature_weights.py", "--part all", "", "", 1, 2),
]  # fmt: skip

# The length of a pulse by script: it must cross each phase of a recipe (warm-up and MAML, both halves of --query_norm,
# pre-training and fine-tuning), the evaluation and the final report.
PULSES = {
    "hw1.py": "--train_steps 12 --eval_freq 6 --num_val_tasks 200 --num_test_tasks 200",
    "protonet.py": "--train_steps 8 --eval_freq 4 --num_val_tasks 20 --num_test_tasks 20 --width 16 --views 2",
    "transfer.py": "--train_steps 12 --finetune_steps 6 --eval_freq 6 --num_test_tasks 20 --width 16 "
                   "--meta_batch_size 32",
    "maml.py": "--train_steps 10 --warmup_steps 5 --eval_freq 5 --num_val_tasks 4 --num_test_tasks 4 --width 16",
    "meta_lstm.py": "--train_steps 4 --eval_freq 2 --num_val_tasks 4 --num_test_tasks 4 --meta_batch_size 2 "
                    "--inner_epochs 2",
    "mae.py": "--train_steps 8 --eval_freq 4 --num_val_tasks 20 --num_test_tasks 20 --width 16 --depth 1 "
              "--decoder_width 16 --meta_batch_size 32 --views 2 --whitening_images 100",
    "memorization.py": "--train_steps 12 --eval_freq 6 --num_val_tasks 20 --num_test_tasks 20",
    "bayes.py": "--train_steps 12 --eval_freq 6 --num_val_tasks 20 --num_test_tasks 20 --test_samples 8",
    "profile_costs.py": "--smoke",
    "feature_weights.py": "--smoke",
}  # fmt: skip

# --------------------------------------------------------------------------------------- jobs


class Job(NamedTuple):
    name: str
    case: Case
    seed: int
    flags: list[str]
    key: str  # of script, flags and dataset: the same key, the same result
    start: Job | None = None  # the run that must be there before

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"{self.name}_{self.key}"


def cases_of(what: str, mini_imagenet: str | None = None) -> list[Case]:
    """The cases of a part or of "all"; the meta-LSTM's with those on the folder `mini_imagenet` where it is given."""
    cases = list(CASES)
    if mini_imagenet:
        images = f"--image_size 84 --dataset folder --data_folder {shlex.quote(mini_imagenet)}"
        cases += [
            Case(
                "meta_lstm",
                f"miniImagenet_{preset}",
                "meta_lstm.py",
                f"--preset {preset} {images}",
                "--train_steps 500 --eval_freq 100",
                minutes=60,
            )
            for preset in ("5way1shot", "5way5shot", "10way10shot", "10way20shot")
        ]
    return [case for case in cases if what in ("all", case.part)]


def case_of(start: str) -> Case:
    """The case that another names part/name as its start."""
    (case,) = (case for case in CASES if f"{case.part}/{case.name}" == start)
    return case


def make_jobs(cases: list[Case], scale: str, device: str, dataset: str, only: str = "") -> list[Job]:
    """A job for each seed of each case; `only`: texts of which a job's name must hold one."""
    jobs, kinds = [], set()
    # A table's results are Omniglot's; only a smoke run takes what it finds.
    dataset = "omniglot" if dataset == "auto" and scale != "smoke" else dataset
    pixels = hashlib.sha256(repr(ARCHIVES).encode()).hexdigest()[:16] if dataset == "omniglot" else dataset
    for case in cases:
        kind = case.part, re.sub(r"\d+", "", case.name)
        if scale == "smoke" and (kind in kinds or case.tests):
            continue  # the same code with other numbers; what a test needs is not there
        kinds.add(kind)
        for seed in range(1, (1 if scale == "smoke" else case.seeds) + 1):
            name = f"{case.part}_{case.name}_seed{seed}"
            if case.beyond and scale == "cpu" and not only:
                continue
            if not any(text in name for text in only.split(",")):
                continue
            # At smoke scale the script's own --smoke decides on lengths and sizes.
            length = {"smoke": "--smoke", "cpu": case.cpu, "full": case.full}[scale]
            flags = shlex.split(f"{case.recipe} {length}")
            if case.part not in OWN_OUTPUT and "--dataset" not in flags:
                flags += ["--dataset", dataset]
            flags += ["--random_seed", str(seed)]
            start = None
            if case.start and scale != "smoke":  # at smoke scale it starts afresh
                (start,) = (j for j in make_jobs([case_of(case.start)], scale, device, dataset, "_") if j.seed == seed)
                weights = Path("runs") / f"reproduce_{scale}" / start.folder
                flags += ["--checkpoint" if case.tests else "--init_from", str(weights)]
            key = hashlib.sha256(json.dumps([case.script, flags, pixels]).encode()).hexdigest()[:16]
            jobs.append(Job(name, case, seed, [*flags, "--device", device], key, start))
    return jobs


def code_of(script: str) -> str:
    """A digest of the files that `script` consists of: itself and what it imports of this folder, directly or not."""
    files, todo = set(), [HERE / script]
    while todo:
        file = todo.pop()
        if file in files or not file.exists():
            continue
        files.add(file)
        for node in ast.walk(experiment.parse_python(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            todo += [HERE / f"{name}.py" for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


# ------------------------------------------------------------------------------------- ledger


class Ledger:
    """`<out>/reproduce.json`, which runs are done, and `<out>/pulses.json`, what their code computed.

    An entry holds the key of its job, the command, minutes, the digest of the code and the name of its pulse.
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
            command = " ".join(["python", job.case.script, *map(shlex.quote, job.flags)])
            entry = {"key": job.key, "command": command, "minutes": round(minutes, 2), "code": code_of(job.case.script)}
            if taken:
                content = json.dumps([taken[part] for part in ("losses", "parameters", "figures")])
                entry["pulse"] = hashlib.sha256(content.encode()).hexdigest()[:12]
                self.pulses[entry["pulse"]] = taken | {"commit": experiment.git_commit()}
            self.entries[job.name] = entry
            in_use = {entry.get("pulse") for entry in self.entries.values()}
            self.pulses = {name: taken for name, taken in self.pulses.items() if name in in_use}
            write_json(self.path, dict(sorted(self.entries.items())))
            write_json(self.pulse_path, self.pulses)


def take_pulse(case: Case, code: Path = HERE) -> dict:
    """The pulse of a case's recipe with the code in folder `code`: on glyphs, in float32, one thread.

    That of a test is the pulse of the run it tests, whose end is such a test.
    """
    case = case_of(case.start) if case.tests else case
    flags = shlex.split(f"{case.recipe} {PULSES[case.script]}") + ["--random_seed", "1", "--device", "cpu"]
    flags += ["--warmup_steps", "0"] if "--warmup_steps 0" in case.recipe else []  # without it stays without
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--log_dir", folder]
        if case.part in OWN_OUTPUT:
            flags += ["--out", folder]
        else:
            flags += ["--dataset", "glyphs"]
            # Those of sinusoids and small networks know no other precision.
            flags += [] if case.script in ("memorization.py", "bayes.py") else ["--dtype", "float32"]
        return pulse.take(code, case.script, flags, Path("runs") / "pulses")


def known_pulse(case: Case) -> dict:
    """take_pulse(case), or what it was for this very code when it was last taken here."""
    case = case_of(case.start) if case.tests else case
    name = hashlib.sha256(json.dumps([code_of(case.script), PULSES[case.script], case.recipe]).encode()).hexdigest()
    path = Path("runs") / "pulses" / f"{name[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    taken = take_pulse(case)
    if "error" not in taken:
        write_json(path, taken)
    return taken


def drift(job: Job, ledger: Ledger, out: Path) -> str | None:
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
    now = known_pulse(job.case)
    different = pulse.difference(before, now)
    if different and before["on"] != now.get("on"):
        # Another processor or torch has other bits: compare old and new code here.
        old = pulse_at(before["commit"], job.case)
        different = pulse.difference(old, now) if old else pulse.difference(before, now, TOLERANCE)
    return "; ".join([*([different] if different else []), *reasons]) or None


def flags_now(job: Job) -> dict:
    """Every flag of a job as its script resolves them now; of a test those of the run it tests."""
    job = job.start if job.case.tests else job
    module = importlib.import_module(job.case.script.removesuffix(".py"))
    return json.loads(json.dumps(experiment.flags_of(module.parse_args(job.flags))))


def pulse_at(commit: str, case: Case) -> dict | None:
    """The pulse of a case with the code of an older commit, taken on this machine; None where it cannot be had."""
    folder = Path("runs") / "pulses" / f"code_{commit}"
    if not folder.exists():
        git = ["git", "-C", str(HERE), "worktree", "add", "--detach", str(folder.resolve()), commit.rstrip("+")]
        if subprocess.run(git, capture_output=True).returncode != 0:
            return None
    taken = take_pulse(case, folder)
    return None if "error" in taken else taken


def status(jobs: list[Job], out: Path, num_jobs: int) -> dict[str, tuple[str, str]]:
    """{job: (measured | confirmed | drifted | missing, why)}; pulses are taken `num_jobs` at a time."""
    ledger = Ledger(out)

    def of(job: Job) -> tuple[str, str]:
        if not ledger.has(job):
            return "missing", "no result of this recipe"
        if ledger.entries[job.name]["code"] == code_of(job.case.script):
            return "measured", ""
        why = drift(job, ledger, out)
        return ("drifted", why) if why else ("confirmed", "")

    by_case: dict[str, list[Job]] = {}  # the seeds of a case share its pulse: one after another
    for job in jobs:
        by_case.setdefault(f"{job.case.part}_{job.case.name}", []).append(job)
    with ThreadPoolExecutor(num_jobs) as pool:
        bar = tqdm(total=len(jobs), desc="pulses", unit="result", disable=None)

        def of_case(case: list[Job]) -> dict:
            found = {job.name: of(job) for job in case}
            bar.update(len(case))
            return found

        found = {name: answer for part in pool.map(of_case, by_case.values()) for name, answer in part.items()}
        bar.close()
    return found


def print_status(found: dict[str, tuple[str, str]]) -> None:
    for name, (state, why) in found.items():
        print(f"{state:10s}{name}" + (f": {why}" if why else ""))
    states = [state for state, _ in found.values()]
    print(", ".join(f"{states.count(s)} {s}" for s in ("measured", "confirmed", "drifted", "missing")))


# --------------------------------------------------------------------------------------- runs


def die_with_parent() -> None:
    """In the child: SIGTERM, on which the scripts save and leave, should reproduce.py be killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def run_job(job: Job, out: Path, runs: Path, threads: int, lock_file, children: set, drifted: bool) -> str | None:
    """Run or resume one job. Returns why it failed, or None."""
    folder = runs / job.folder
    if (folder / "metrics.json").exists():  # finished, and stopped before it was collected; or of older code
        if not drifted:
            return None
        shutil.rmtree(folder)
    command = [sys.executable, str(HERE / job.case.script)]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # it had saved nothing
        command += [*job.flags, "--log_dir", str(runs)]
        # Scripts with an output of their own name their own runs.
        command += ["--out", str(out)] if job.case.part in OWN_OUTPUT else ["--run_name", folder.name]
        if job.case.tests:
            folder.mkdir()
            command += ["--out", str(folder / "metrics.json")]
    threads = min(threads, int(os.environ.get("OMP_NUM_THREADS", threads)))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(runs / f"{job.name}.log", "ab") as log:
        linux = {"pass_fds": (lock_file.fileno(),), "preexec_fn": die_with_parent} if os.name == "posix" else {}
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, **linux)
        children.add(child)
        code = child.wait()
        children.discard(child)
    if code != 0:
        last = (runs / f"{job.name}.log").read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        return f"exit code {code}: {last[0][:200]}"
    return None


def collected(job: Job, out: Path) -> Path:
    return out / job.case.part / f"{job.case.name}_seed{job.seed}.json"


def collect(job: Job, out: Path, runs: Path) -> None:
    """Copy a run's metrics to `<out>/<part>/<name>_seed<S>.json`."""
    if job.case.part in OWN_OUTPUT:
        return
    target = collected(job, out)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, json.loads((runs / job.folder / "metrics.json").read_text()))


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
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


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
            if why is None and new:
                collect(job, out, runs)
                # The training's minutes where they are more: the run had been interrupted.
                taken = None if smoke else known_pulse(job.case)
                ledger.add(job, max(minutes, trained_minutes(job, out)), taken)
            elif why:
                failures.append(f"{job.name}: {why} (see {runs / job.name}.log)")
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


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    parser = experiment._Parser(
        prog="reproduce.py", description=__doc__, formatter_class=experiment._Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("what", choices=["status", *PARTS, "all"], help="which part of the documents, or what is due of them")
    add("--scale", choices=["smoke", "cpu", "full"], default="cpu", help="how long the runs train")
    add("--jobs", type=whole(1), help="runs at a time, which share the CPU cores (default: 1; of status: all cores)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of all runs")
    add("--dataset", choices=["auto", "omniglot", "glyphs"], default="auto", help="auto: Omniglot; smoke: or glyphs")
    folder = "folder of miniImageNet with train/, val/ and test/: adds its four settings to meta_lstm"
    add("--mini_imagenet", metavar="DIR", help=folder)
    some = "only runs whose name, like comparison_maml_seed1, holds one of these texts, separated by commas"
    add("--only", default="", metavar="TEXTS", help=some)
    add("--out", help="folder of the results (default: results, or runs/reproduce_smoke)")
    args = parser.parse_args(argv)
    args.out = Path(args.out or ("runs/reproduce_smoke" if args.scale == "smoke" else HERE / "results"))
    args.jobs = args.jobs or (os.cpu_count() or 1 if args.what == "status" else 1)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder; name another")
    if args.mini_imagenet and not (Path(args.mini_imagenet) / "train").is_dir():
        raise UserError(
            f"--mini_imagenet {args.mini_imagenet} has no train/; name the folder that holds train/, val/ and test/"
        )
    return args


def main(argv=None) -> dict | list[str]:
    args = parse_args(argv)
    runs = args.out / "runs" if args.scale == "smoke" else Path("runs") / f"reproduce_{args.scale}"
    cases = cases_of("all" if args.what == "status" else args.what, args.mini_imagenet)
    every = "seed" if args.what == "status" else ""  # what waits for --only counts too
    jobs = make_jobs(cases, args.scale, args.device, args.dataset, args.only or every)
    if not jobs:
        raise UserError(f"--only {args.only}: no run of {args.what} has this in its name")
    if args.what == "status":  # what three hours do not hold is not due before it was measured once
        ledger = Ledger(args.out).entries
        waiting = [job.name for job in jobs if job.case.beyond and job.name not in ledger]
        found = status([job for job in jobs if job.name not in waiting], args.out, args.jobs)
        if waiting:
            print(f"waiting to be named by --only: {', '.join(waiting)}")
        print_status(found)
        return found
    found = status(jobs, args.out, args.jobs)
    due = [job for job in jobs if found[job.name][0] in ("drifted", "missing")]
    print(f"{len(jobs) - len(due)} of {len(jobs)} runs are done already")
    drifted = {job.name for job in due if found[job.name][0] == "drifted"}
    failures = run_all(due, drifted, args.out, runs, args.jobs)
    print(f"results: {args.out}; tables and pictures: python report.py --results {args.out}")
    if failures:
        print("\n".join(f"error: {failure}" for failure in failures), file=sys.stderr)
        sys.exit(1)
    return failures


if __name__ == "__main__":
    experiment.run_script(main)
