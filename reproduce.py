"""Every table and figure of the source documents by one command, from runs of this package.

    python reproduce.py all --scale smoke          everything in its smallest form, to see that it works
    python reproduce.py all --scale cpu --jobs 2   what two CPU cores can do in some hours
    python reproduce.py all --scale full           the papers' lengths, for a GPU
    python reproduce.py comparison                 one part: mann, meta_lstm, comparison, costs, features

Each run is a script of this package in a process of its own, `--jobs` at a time. What is done, by the same flags and
the same code, is skipped; what was interrupted is resumed; what fails is named and makes the exit code 1. Results go to
`--out` (results/, or a folder of runs/ for smoke): a JSON file a run, a CSV file a part, figures, and README.md with a
row for each claim of the documents.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import experiment
from experiment import UserError, whole, write_atomically, write_json

HERE = Path(__file__).resolve().parent
WRITERS = {"costs": "--out", "features": "--results_dir"}  # they write their results themselves, to this folder
PARTS = ("mann", "meta_lstm", "comparison", "costs", "features")
COURSE = "--head recurrent --logit_scale 1 --forget_bias 0 --no-rotations --schedule constant --clip 0"
LAKE = "--split lake --num_classes 20 --within_alphabet"
RESIDUAL = "--encoder residual --image_size 32"
LONG = "--jitter 0.1 --train_steps 12000 --eval_freq 500 --dtype bfloat16"


class Case(NamedTuple):
    """One line of a table or one curve: `recipe` is what it is about, `cpu` and `full` how long it trains."""

    part: str
    name: str
    script: str
    recipe: str = ""
    cpu: str = ""
    full: str = ""
    seeds: int = 1
    minutes: float = 5  # of one seed at --scale cpu with one core, for the progress bar
    beyond: bool = False  # more than three hours hold: at --scale cpu only where --only names it


CASES = [
    *[Case("mann", f"K{K}N{N}", "hw1.py", f"--num_shot {K} --num_classes {N}", LONG,
           "--jitter 0.1 --train_steps 50000 --eval_freq 1000", 3, minutes)
      for K, N, minutes in ((1, 2, 3), (2, 2, 4), (1, 3, 4), (1, 4, 5))],
    Case("mann", "conv_K1N5", "hw1.py",
         "--num_shot 1 --num_classes 5 --encoder conv --shared_classes 60 --hidden_dim 256 --learning_rate 2e-3",
         "--train_steps 8000 --eval_freq 500 --dtype bfloat16", "--train_steps 40000 --eval_freq 1000", 3, 6),
    Case("mann", "memorisation", "hw1.py",
         "--num_shot 1 --num_classes 5 --fixed_labels --no-rotations --head recurrent --forget_bias 0",
         "--train_steps 5000 --eval_freq 250 --dtype bfloat16", "--train_steps 25000"),
    *[Case("mann", f"K1N3_{name}", "hw1.py", f"--num_shot 1 --num_classes 3 {COURSE} {flags}", "--train_steps 5000",
           "--train_steps 25000", minutes=2)
      for name, flags in (("rate_1e-1", "--learning_rate 1e-1"), ("rate_1e-3", "--learning_rate 1e-3"),
                          ("rate_1e-5", "--learning_rate 1e-5"), ("memory_8", "--learning_rate 1e-3 --hidden_dim 8"),
                          ("memory_256", "--learning_rate 1e-3 --hidden_dim 256"),
                          ("gru", "--learning_rate 1e-3 --recurrent gru"),
                          ("3_layers", "--learning_rate 1e-3 --num_layers 3"))],
    Case("meta_lstm", "5way1shot", "meta_lstm.py", "--num_classes 5 --num_shot 1", "", "--train_steps 30000", 1, 30),
    Case("meta_lstm", "5way5shot", "meta_lstm.py", "--num_classes 5 --num_shot 5", "--train_steps 3000 --eval_freq 300",
         "--train_steps 30000", 1, 25),
    # 10 shots leave 10 of a character's 20 images for queries, where the preset wants 15
    Case("meta_lstm", "10way10shot", "meta_lstm.py", "--preset 10way10shot --train_query 5 --num_query 5",
         "--train_steps 250 --eval_freq 125 --num_val_tasks 40", "", 1, 15),
    *[Case("meta_lstm", f"5way1shot_{name}", "meta_lstm.py", recipe, "--train_steps 600 --eval_freq 200",
           "--train_steps 6000", minutes=minutes)
      for name, recipe, minutes in (("short", "", 3), ("pool", "--fixed_pool 6", 3),
                                    ("second_order", "--second_order --trained_share 1", 11))],
    Case("comparison", "transfer", "transfer.py", "", "", "--train_steps 16000 --finetune_steps 6000", 1, 5),
    Case("comparison", "protonet", "protonet.py", "--num_test_tasks 2000", "", "", 3, 2),
    Case("comparison", "protonet_long", "protonet.py", "--num_test_tasks 2000", "--train_steps 15000 --eval_freq 1500",
         "--train_steps 60000 --eval_freq 2000", 3, 10),
    Case("comparison", "protonet_residual", "protonet.py", f"--num_test_tasks 2000 {RESIDUAL}",
         "--train_steps 8000 --eval_freq 1000", "--train_steps 30000 --eval_freq 2000", 3, 15),
    Case("comparison", "protonet_lake", "protonet.py",
         f"--num_test_tasks 2000 {LAKE} {RESIDUAL} --jitter 0.2 --shift 0.15 --views 32",
         "--train_steps 10000 --eval_freq 1000", "--train_steps 30000 --eval_freq 2000", 1, 20),
    Case("comparison", "fomaml", "maml.py", "--first_order --zero_head", "",
         "--train_steps 60000 --eval_freq 1000", 3, 7),
    Case("comparison", "protomaml", "maml.py", "--head proto --first_order --inner_lr 0.01", "",
         "--train_steps 60000 --eval_freq 1000", 3, 7),
    Case("comparison", "maml", "maml.py", "", "", "--train_steps 60000 --eval_freq 1000", 3, 8),
    Case("comparison", "anil", "maml.py", "--freeze_body", "", "--train_steps 60000 --eval_freq 1000", 1, 7),
    *[Case("comparison", f"maml_{N}way{K}shot", "maml.py", f"--num_classes {N} --num_shot {K}",
           "--num_val_tasks 100", "--train_steps 60000 --eval_freq 1000", 1, minutes, beyond=True)
      for N, K, minutes in ((5, 5, 10), (20, 1, 20), (20, 5, 25))],
    *[Case("comparison", f"maml_{N}way5shot_32_pixels", "maml.py", f"--num_classes {N} --num_shot 5 --image_size 32",
           f"--num_val_tasks 100 {steps}", "--train_steps 60000 --eval_freq 1000", 1, minutes, beyond=True)
      for N, steps, minutes in ((5, "", 15), (20, "--warmup_steps 12000 --train_steps 12500 --eval_freq 6250", 40))],
    Case("comparison", "maml_plain", "maml.py", "--features plain", "", "--train_steps 60000 --eval_freq 1000", 1, 8,
         beyond=True),
    Case("costs", "costs", "profile_costs.py", "--sweep all --engine auto", "", "", 1, 5),
    Case("features", "features", "feature_weights.py", "--part all", "", "", 1, 2),
]  # fmt: skip

# (line of the documents, part/name of ours, metric, their figure, best published); all on the course split
CLAIMS = [
    ("MANN, 1-shot 2-way", "mann/K1N2", "test_accuracy", "above 90", "-"),
    ("MANN, 2-shot 2-way", "mann/K2N2", "test_accuracy", "above 90", "-"),
    ("MANN, 1-shot 3-way", "mann/K1N3", "test_accuracy", "about 80", "-"),
    ("MANN, 1-shot 4-way", "mann/K1N4", "test_accuracy", "about 70", "-"),
    ("MANN with a conv encoder, 5-way 1-shot", "mann/conv_K1N5", "test_accuracy", "-", "82.8 to 89.2 (MANN)"),
    ("ProtoNet, 5-way 1-shot, default", "comparison/protonet", "test_accuracy", "98.8", "98.8"),
    ("ProtoNet, 5-way 1-shot, long", "comparison/protonet_long", "test_accuracy_5way1shot", "98.8", "98.8"),
    ("ProtoNet, 5-way 5-shot, long", "comparison/protonet_long", "test_accuracy_5way5shot", "-", "99.7"),
    ("ProtoNet, 20-way 1-shot, long", "comparison/protonet_long", "test_accuracy_20way1shot", "-", "96.0"),
    ("ProtoNet, 20-way 5-shot, long", "comparison/protonet_long", "test_accuracy_20way5shot", "-", "98.9"),
    ("ProtoNet, 5-way 1-shot, residual", "comparison/protonet_residual", "test_accuracy_5way1shot", "-", "-"),
    ("ProtoNet, 5-way 5-shot, residual", "comparison/protonet_residual", "test_accuracy_5way5shot", "-", "-"),
    ("ProtoNet, 20-way 1-shot, residual", "comparison/protonet_residual", "test_accuracy_20way1shot", "-", "-"),
    ("ProtoNet, 20-way 5-shot, residual", "comparison/protonet_residual", "test_accuracy_20way5shot", "-", "-"),
    ("ProtoNet, 20-way 1-shot in one alphabet, residual", "comparison/protonet_lake", "test_accuracy", "-", "-"),
    ("ProtoNet, the same, of one drawer (Lake)", "comparison/protonet_lake", "test_accuracy_one_drawer", "-", "86"),
    ("Fine-tuning, 423-way", "comparison/transfer", "finetuned_accuracy", "78.5", "-"),
    ("Fine-tuning, 5-way 1-shot", "comparison/transfer", "test_accuracy", "-", "-"),
    ("First-order MAML, 5-way 1-shot", "comparison/fomaml", "test_accuracy", "81.5", "98.3"),
    ("Proto-MAML (first order), 5-way 1-shot", "comparison/protomaml", "test_accuracy", "89.2", "-"),
    ("MAML, 5-way 1-shot", "comparison/maml", "test_accuracy", "-", "98.7"),
    ("MAML, 5-way 1-shot, plain features", "comparison/maml_plain", "test_accuracy", "-", "98.7"),
    ("MAML, 5-way 5-shot", "comparison/maml_5way5shot", "test_accuracy", "-", "99.9"),
    ("MAML, 20-way 1-shot", "comparison/maml_20way1shot", "test_accuracy", "-", "95.8"),
    ("MAML, 20-way 5-shot", "comparison/maml_20way5shot", "test_accuracy", "-", "98.9"),
    ("MAML, 5-way 5-shot, 32 x 32 pixels", "comparison/maml_5way5shot_32_pixels", "test_accuracy", "-", "-"),
    ("MAML, 20-way 5-shot, 32 x 32 pixels", "comparison/maml_20way5shot_32_pixels", "test_accuracy", "-", "-"),
    ("ANIL, 5-way 1-shot", "comparison/anil", "test_accuracy", "-", "-"),
    ("Meta-LSTM, 5-way 1-shot", "meta_lstm/5way1shot", "test_accuracy", "-", "none"),
    ("Meta-LSTM, 5-way 5-shot", "meta_lstm/5way5shot", "test_accuracy", "-", "none"),
    ("Meta-LSTM, 10-way 10-shot, the paper's flags", "meta_lstm/10way10shot", "test_accuracy", "-", "none"),
    ("Meta-LSTM, miniImageNet 5-way 1-shot", "meta_lstm/miniImagenet_5way1shot", "test_accuracy", "42.6", "43.4"),
    ("Meta-LSTM, miniImageNet 5-way 5-shot", "meta_lstm/miniImagenet_5way5shot", "test_accuracy", "37.6", "60.6"),
    ("Meta-LSTM, miniImageNet 10-way 10-shot", "meta_lstm/miniImagenet_10way10shot", "test_accuracy", "23.3", "-"),
    ("Meta-LSTM, miniImageNet 10-way 20-shot", "meta_lstm/miniImagenet_10way20shot", "test_accuracy", "22.8", "-"),
]
# Okabe and Ito's colours, which the colour-blind can tell apart; one for each method in every figure
COLOURS = {"transfer": "#7f7f7f", "mann": "#CC79A7", "protonet": "#0072B2", "fomaml": "#E69F00", "protomaml": "#009E73",
           "maml": "#D55E00", "anil": "#56B4E9", "meta_lstm": "#000000"}  # fmt: skip
TITLES = {"transfer": "fine-tuning", "mann": "MANN, conv", "protonet": "ProtoNet", "fomaml": "first-order MAML",
          "protomaml": "Proto-MAML (f.o.)", "maml": "MAML", "anil": "ANIL", "meta_lstm": "meta-LSTM"}  # fmt: skip


# --------------------------------------------------------------------------------------- runs


class Job(NamedTuple):
    name: str  # of the run folder
    case: Case
    seed: int
    flags: list[str]
    key: str  # of the flags and the code: the same key, the same result


def code_version(script: str) -> str:
    """A digest of the code that a run of `script` executes."""
    files = [script, "load_data.py", "omniglot.py", "glyphs.py", "backbone.py", "experiment.py"]
    return hashlib.sha256(b"".join((HERE / file).read_bytes() for file in files)).hexdigest()[:12]


def cases_of(what: str, mini_imagenet: str | None = None) -> list[Case]:
    """The cases of a part or of "all"; the meta-LSTM's with those on the folder `mini_imagenet` where it is given."""
    cases = list(CASES)
    if mini_imagenet:
        images = f"--image_size 84 --dataset folder --data_folder {shlex.quote(mini_imagenet)}"
        cases += [Case("meta_lstm", f"miniImagenet_{preset}", "meta_lstm.py", f"--preset {preset} {images}",
                       "--train_steps 500 --eval_freq 100", minutes=60)
                  for preset in ("5way1shot", "5way5shot", "10way10shot", "10way20shot")]  # fmt: skip
    return [case for case in cases if what in ("all", case.part)]


def make_jobs(cases: list[Case], scale: str, device: str, dataset: str, only: str = "") -> list[Job]:
    jobs = []
    for case in cases:
        for seed in range(1, (1 if scale == "smoke" else case.seeds) + 1):
            name = f"{case.part}_{case.name}_seed{seed}"
            if case.beyond and scale == "cpu" and not only:
                continue
            if not any(text in name for text in only.split(",")):
                continue
            # At smoke scale the script's own --smoke decides on lengths and sizes.
            length = {"smoke": "--smoke", "cpu": case.cpu, "full": case.full}[scale]
            flags = shlex.split(f"{case.recipe} {length}")
            if case.part not in WRITERS and "--dataset" not in flags:
                flags += ["--dataset", dataset]
            flags += ["--random_seed", str(seed), "--device", device]
            key = hashlib.sha256(json.dumps([case.script, flags, code_version(case.script)]).encode()).hexdigest()[:16]
            jobs.append(Job(name, case, seed, flags, key))
    return jobs


class Ledger:
    """`<out>/reproduce.json`: which runs are done, by key, with command and minutes."""

    def __init__(self, out: Path):
        self.path, self.lock = out / "reproduce.json", threading.Lock()
        self.entries = json.loads(self.path.read_text()) if self.path.exists() else {}

    def has(self, job: Job) -> bool:
        return self.entries.get(job.name, {}).get("key") == job.key

    def add(self, job: Job, minutes: float) -> None:
        with self.lock:
            command = " ".join(["python", job.case.script, *map(shlex.quote, job.flags)])
            self.entries[job.name] = {"key": job.key, "command": command, "minutes": round(minutes, 2)}
            write_json(self.path, dict(sorted(self.entries.items())))


def die_with_parent() -> None:
    """In the child: SIGTERM, on which the scripts save and leave, should reproduce.py be killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def run_job(job: Job, out: Path, runs: Path, threads: int, lock_file, children: set) -> str | None:
    """Run or resume one job; collects its results. Returns why it failed, or None."""
    folder = runs / f"{job.name}_{job.key}"
    if (folder / "metrics.json").exists():  # finished, and stopped before it was collected
        return collect(job, folder, out)
    command = [sys.executable, str(HERE / job.case.script)]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # it had saved nothing
        command += job.flags
        if job.case.part in WRITERS:  # and name their own run
            command += ["--log_dir", str(runs), WRITERS[job.case.part], str(out)]
        else:
            command += ["--log_dir", str(runs), "--run_name", folder.name]
    threads = min(threads, int(os.environ.get("OMP_NUM_THREADS", threads)))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(runs / f"{job.name}.log", "ab") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                                 pass_fds=(lock_file.fileno(),), preexec_fn=die_with_parent)  # fmt: skip
        children.add(child)
        code = child.wait()
        children.discard(child)
    if code != 0:
        last = (runs / f"{job.name}.log").read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        return f"exit code {code}: {last[0][:200]}"
    return collect(job, folder, out)


def collected(job: Job, out: Path) -> Path:
    return out / job.case.part / f"{job.case.name}_seed{job.seed}.json"


def collect(job: Job, folder: Path, out: Path) -> None:
    """Copy a run's metrics, with its curves, to `<out>/<part>/<name>_seed<S>.json`."""
    if job.case.part in WRITERS:
        return
    metrics = json.loads((folder / "metrics.json").read_text()) | {"curves": read_curves(folder)}
    if job.case.script == "protonet.py":
        metrics["episode"] = embedded_episode(folder)
    target = collected(job, out)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda file: file.write((json.dumps(metrics) + "\n").encode()))


def trained_minutes(job: Job, out: Path) -> float:
    """Minutes in which a collected run trained, all its parts together; 0 for the parts that do not tell."""
    path = collected(job, out)
    return json.loads(path.read_text())["train_seconds"] / 60 if path.exists() else 0.0


def read_curves(folder: Path, points: int = 40) -> dict:
    """{tag: [[step, value], ...]} of the homework's curves, thinned to about `points`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in ("Loss/train", "Loss/test", "Accuracy/test", "Accuracy/val"):
        if tag in events.Tags()["scalars"]:
            values = [[e.step, round(e.value, 4)] for e in events.Scalars(tag)]
            thin = max(1, len(values) // points)
            curves[tag] = values[::-1][::thin][::-1]  # the last one stays
    return curves


def embedded_episode(folder: Path) -> dict:
    """The first 5-way 1-shot test task of a run of protonet.py in its two principal components.

    support [5, 2] and query [75, 2] in the order of `labels` [75].
    """
    import torch

    import protonet
    from load_data import fixed_tasks, load_dataset

    flags = argparse.Namespace(**json.loads((folder / "flags.json").read_text())["flags"])
    flags.num_classes, flags.num_shot, flags.num_query = 5, 1, 15
    dataset = load_dataset(flags.dataset, flags.data_folder, flags.split, flags.image_size)
    encoder = protonet.make_encoder(flags, dataset.images.shape[1])
    experiment.load_best(folder, encoder)
    test = fixed_tasks(dataset, "test", flags, torch.device("cpu"))
    support, _, query, labels = (x[0] for x in test.sample())
    with torch.no_grad():
        features = protonet.embed(encoder, torch.cat([support, query])[None], torch.float32)[0]
    centred = features - features.mean(dim=0)
    plane = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    points = [[round(v, 3) for v in row] for row in plane.tolist()]
    return {"support": points[: len(support)], "query": points[len(support) :], "labels": labels.tolist()}


def run_all(jobs: list[Job], out: Path, runs: Path, num_jobs: int) -> list[str]:
    """Run what the ledger lacks, `num_jobs` at a time; returns the failures, one line each."""
    out.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    lock_file = open(runs / "reproduce.lock", "w")  # inherited by the runs: free when all of them have ended
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"waiting for runs that another reproduce.py started in {runs}", file=sys.stderr)
        fcntl.flock(lock_file, fcntl.LOCK_EX)
    ledger, failures, children = Ledger(out), [], set()
    todo = [job for job in jobs if not ledger.has(job)]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done already")
    bar = tqdm(total=sum(job.case.minutes for job in todo), disable=None, bar_format="{l_bar}{bar}| left: {remaining}")
    threads, stop = max(1, (os.cpu_count() or 1) // num_jobs), threading.Event()

    def work(job: Job) -> None:
        if stop.is_set():
            return
        begin = time.perf_counter()
        why = run_job(job, out, runs, threads, lock_file, children)
        minutes = (time.perf_counter() - begin) / 60
        if stop.is_set() and why:
            return
        if why is None:
            ledger.add(job, max(minutes, trained_minutes(job, out)))  # the latter where the run had been interrupted
        else:
            failures.append(f"{job.name}: {why} (see {runs / job.name}.log)")
        bar.update(job.case.minutes)
        bar.write(f"{job.name}: {'failed' if why else 'done'} in {minutes:.1f} minutes")

    order = lambda job: (job.seed, -job.case.minutes)  # a first seed of everything, long runs before short ones
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
    return failures


# ------------------------------------------------------------------------- tables and figures


def load(out: Path, name: str) -> list[dict]:
    """The metrics of all seeds of part/name, in the order of the seeds."""
    return [json.loads(p.read_text()) for p in sorted(out.glob(f"{name}_seed*.json"))]


def mean_of_seeds(runs: list[dict], key: str = "test_accuracy") -> tuple[float, float]:
    """Mean over seeds and half-width of its 95 % interval over test tasks, both in per cent.

    The seeds share their test tasks, so their errors go together: the interval does not shrink with seeds.
    """
    ci = key.replace("test_accuracy", "ci95").replace("accuracy", "ci95")
    return tuple(100 * sum(r[k] for r in runs) / len(runs) for k in (key, ci))


def digits_of(half: float) -> int:
    """Digits behind the point that a figure with an interval of this half-width deserves, in per cent."""
    return 1 if half >= 0.15 else 2


def with_interval(mean: float, half: float) -> str:
    """Such as 98.7 ± 0.2, in per cent."""
    digits = digits_of(half)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def plain_command(run: dict) -> str:
    """A run's command without what does not change its figures: where it wrote, and defaults."""
    return re.sub(r" --(log_dir|run_name|out|results_dir) \S+| --(dataset|device) auto", "", run["command"])


def claim_rows(out: Path) -> list[dict[str, str]]:
    """The cells of the results table: a row for each of CLAIMS, "not measured" where there is no result file."""
    rows = []
    for what, name, key, documents, published in CLAIMS:
        row = {"what": what, "documents": documents, "published": published, "ours": "not measured", "seeds": "",
               "tasks": "", "minutes": "", "device": "", "command": ""}  # fmt: skip
        if runs := load(out, name):
            mean, half = mean_of_seeds(runs, key)
            seconds = [r["train_seconds"] for r in runs if "train_seconds" in r]
            digits = digits_of(half)
            row |= {"ours": with_interval(mean, half), "seeds": ", ".join(f"{100 * r[key]:.{digits}f}" for r in runs),
                    "tasks": str(runs[0]["num_test_tasks"]), "device": runs[0]["device"],
                    "minutes": f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else "-",
                    "command": f"`{plain_command(runs[0])}`"}  # fmt: skip
        rows.append(row)
    return rows


def growth(f: dict, unit: str) -> str:
    """A fit of costs.json in words: a line a + b x, or a power x^b."""
    if f["form"] == "power":
        return f"x^{f['b']:.2f}"
    if abs(f["b"]) < 1e-9:
        return f"{f['a']:.1f} {unit}, flat"
    return f"{f['a']:.1f} {'+' if f['b'] > 0 else '-'} {abs(f['b']):.2f} x {unit}"


def other_rows(out: Path) -> list[list[str]]:
    """What the documents say about costs and feature weights beside what we measured: the cells of each row."""
    rows = []
    if (file := out / "costs.json").exists():
        costs = json.loads(file.read_text())
        found = {f["method"]: f for f in costs["fits"] if (f["sweep"], f["engine"]) == ("inner_steps", "vmap")}
        for method, name, claim in (("maml", "MAML", "grows linearly"), ("es", "ES", "does not grow")):
            ours = growth(found[method]["memory"], "MB")
            rows.append([f"{name}, peak memory with x inner steps", claim, ours, f"`{plain_command(costs)}`"])
    if (file := out / "features.json").exists():
        run = json.loads(file.read_text())["closed_form"]
        for what, weights, points, claim in (("weights 1", "ones", 32, "0.95"), ("oracle", "oracle", 32, "1e-30"),
                                             ("meta-learned", "meta", 32, "0.31"), ("meta-learned", "meta", 31, "0.45"),
                                             ("meta-learned", "meta", 33, "0.39")):  # fmt: skip
            what = f"Feature weights, test error at {points} points, {what}"
            rows.append([what, claim, f"{run[weights][str(points)]:.2g}", f"`{plain_command(run)}`"])
    return rows


def norm_lines(out: Path) -> list[str]:
    """A table of MAML and its relatives with both kinds of batch norm."""
    lines = ["MAML and its relatives with queries normalised by their own batch (transductive, as above) and by the",
             "support set alone:", "", "| test accuracy in % | transductive | support |", "|---|---|---|"]  # fmt: skip
    for name in ("fomaml", "protomaml", "maml", "anil", "maml_5way5shot", "maml_20way1shot", "maml_20way5shot",
                 "maml_5way5shot_32_pixels", "maml_20way5shot_32_pixels"):  # fmt: skip
        if runs := load(out, f"comparison/{name}"):
            found = [mean_of_seeds(runs, f"test_accuracy_{mode}") for mode in ("transductive", "support")]
            cells = " | ".join(with_interval(mean, half) for mean, half in found)
            size = ", 32 x 32 pixels" if name.endswith("32_pixels") else ""
            lines.append(f"| {TITLES[name.split('_')[0]]}, {runs[0]['N']}-way {runs[0]['K']}-shot{size} | {cells} |")
    return lines


def page(out: Path) -> str:
    """`<out>/README.md`: a row for each claim of the documents, the paired differences, the pictures."""
    lines = ["# Results", "", "Written by `python reproduce.py` from the JSON files beside it.",
             "Accuracy on new characters in per cent, mean of the seeds ± 95 % interval over fixed test tasks, which",
             "the seeds share. Minutes are those of training, of one seed.", "",
             "| what | documents | published | ours | each seed | test tasks | minutes | on | command of seed 1 |",
             "|---" * 9 + "|"]  # fmt: skip
    for row in claim_rows(out):
        lines.append("| " + " | ".join(row.values()) + " |")
    command = "python reproduce.py meta_lstm --scale full --mini_imagenet DIR"
    lines += ["", f"The miniImageNet rows need its images: `{command}`."]
    if others := other_rows(out):
        lines += ["", "| what | documents | ours | command |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in others]
    lines += ["", *norm_lines(out)]
    if differences := paired(out):
        lines += ["", "Differences to the long ProtoNet on the same test tasks (points, 95 % interval):",
                  "", "| method | difference |", "|---|---|"]
        lines += [f"| {TITLES[name]} | {mean:+.1f} ± {half:.1f} |" for name, (mean, half) in differences.items()]
    if (file := out / "reproduce.json").exists():
        beyond = tuple(f"{case.part}_{case.name}_seed" for case in CASES if case.beyond)
        runs = json.loads(file.read_text())
        more = sum(run["minutes"] for name, run in runs.items() if name.startswith(beyond))
        minutes = sum(run["minutes"] for run in runs.values()) - more
        lines += ["", f"The runs in `reproduce.json` took {minutes:.0f} minutes in all, each on one core: "
                  f"{minutes / 120:.1f} hours of two cores."]  # fmt: skip
        lines[-1] += f" Those that wait for `--only` took {more:.0f} minutes more." if more else ""
    for picture in sorted(out.glob("*.png")):
        if picture.stem not in ("glyphs", "tensorboard"):
            lines += ["", f"![{picture.stem.replace('_', ' ')}]({picture.name})"]
    return "\n".join(lines) + "\n"


def paired(out: Path) -> dict[str, tuple[float, float]]:
    """{method: (mean, half-width)} of the tasks' differences to the long ProtoNet in points, seeds averaged first."""
    def per_task(name: str) -> list[float]:
        runs = [r["accuracies"] for r in load(out, f"comparison/{name}") if "accuracies" in r]
        return [sum(values) / len(values) for values in zip(*runs, strict=False)]

    reference, found = per_task("protonet_long"), {}
    for name in ("protonet", "transfer", "fomaml", "protomaml", "maml", "anil"):
        if reference and (mine := per_task(name)):
            mean, half = experiment.mean_and_ci95([a - b for a, b in zip(mine, reference, strict=False)])
            found[name] = 100 * mean, 100 * half
    return found


def write_csv(out: Path, part: str) -> None:
    """`<out>/<part>.csv`: one row a run with the figures that all scripts report."""
    names = ["name", "script", "N", "K", "Q", "steps", "test_accuracy", "ci95", "num_test_tasks", "val_accuracy",
             "train_seconds", "device", "seed", "git_commit", "command"]  # fmt: skip
    files = sorted((out / part).glob("*.json"))
    if not files:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"name": file.stem} | json.loads(file.read_text()) for file in files)
    write_atomically(out / f"{part}.csv", lambda file: file.write(text.getvalue().encode()))


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
    return figure, axes


def save(figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, dpi=100, format="png"))


def draw_lines(ax, out: Path, names: dict[str, str], tag: str, scale: float) -> None:
    """One curve for each {part/name: label}, seed 1, labelled at its end."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    for colour, (name, label) in zip(colours, names.items(), strict=False):
        if (runs := load(out, name)) and tag in runs[0].get("curves", {}):
            steps, values = zip(*runs[0]["curves"][tag], strict=True)
            ax.plot(steps, [scale * v for v in values], color=colour, label=label)
    if ax.lines:
        ax.legend(frameon=False, fontsize=9)
    ax.set_xlabel("training step")


def draw_mann(out: Path) -> None:
    """Figures 3 to 8 of the report (K, N grid), 9 (learning rate) and 10 (memory size)."""
    grid = {f"mann/K{K}N{N}": f"{K}-shot {N}-way" for K, N in ((1, 2), (2, 2), (1, 3), (1, 4))}
    rates = {f"mann/K1N3_rate_{r}": f"learning rate {r}" for r in ("1e-1", "1e-3", "1e-5")}
    sizes = {"mann/K1N3_memory_8": "8 units", "mann/K1N3_rate_1e-3": "128 units", "mann/K1N3_memory_256": "256 units"}
    kinds = {"mann/K1N3_rate_1e-3": "two LSTM layers", "mann/K1N3_gru": "two GRU layers",
             "mann/K1N3_3_layers": "three LSTM layers"}  # fmt: skip
    for file, rows in (("mann.png", {"MANN by shot K and way N": grid}),
                       ("mann_sweeps.png", {"learning rate (1-shot 3-way)": rates, "memory size (1-shot 3-way)": sizes,
                                            "recurrent layers (1-shot 3-way)": kinds})):  # fmt: skip
        if not any(load(out, name) for names in rows.values() for name in names):
            continue
        figure, axes = new_figure(len(rows), 2, (9, 3.2 * len(rows)))
        for (title, names), (left, right) in zip(rows.items(), axes, strict=True):
            draw_lines(left, out, names, "Accuracy/test", 100)
            draw_lines(right, out, names, "Loss/test", 1)
            left.set(title=title, ylabel="test accuracy (%)")
            right.set(title=title, ylabel="test loss (nats)")
        save(figure, out / file)


def draw_comparison(out: Path) -> None:
    """The slides' bar chart with our other methods beside it, and accuracy before and after adaptation."""
    where = {name: f"comparison/{name}" for name in TITLES}
    where |= {"meta_lstm": "meta_lstm/5way1shot", "mann": "mann/conv_K1N5"}
    found = {name: runs for name in TITLES if (runs := load(out, where[name]))}
    if found:
        figure, ((ax,),) = new_figure(1, 1, (9, 3.8))
        for i, (name, runs) in enumerate(found.items()):
            mean, half = mean_of_seeds(runs)
            ax.bar(i + 0.2, mean, 0.38, color=COLOURS[name], yerr=half, capsize=3)
            ax.text(i + 0.2, mean + half + 0.3, f"{mean:.{digits_of(half)}f}", ha="center", fontsize=9)
            on_val = [r["val_accuracy"] for r in runs if r.get("val_accuracy")]  # fine-tuning chooses nothing by it
            if on_val:
                ax.bar(i - 0.2, 100 * sum(on_val) / len(on_val), 0.38, color=COLOURS[name], alpha=0.4)
        low = min(mean_of_seeds(runs)[0] for runs in found.values())
        ax.set_ylim(max(0, low - 8), 100.9)
        ax.set_xticks(range(len(found)), [TITLES[name].replace(" ", "\n", 1) for name in found], fontsize=9)
        ax.set(title="Omniglot, 5-way 1-shot, new characters: validation (pale) and test", ylabel="accuracy (%)")
        save(figure, out / "comparison.png")
    adapted = {name: found[name] for name in ("fomaml", "protomaml", "maml", "anil") if name in found}
    if adapted:
        figure, (axes,) = new_figure(1, 2, (9, 3.4))
        for name, runs in adapted.items():
            for ax, what in zip(axes, ("support", "query"), strict=True):
                steps = range(len(runs[0][f"{what}_accuracy_per_step"]))
                values = [100 * sum(r[f"{what}_accuracy_per_step"][i] for r in runs) / len(runs) for i in steps]
                ax.plot(steps, values, "o-", color=COLOURS[name], label=TITLES[name])
                ax.set(title=f"{what} set", xlabel="inner steps on the support set", ylabel="test accuracy (%)")
                ax.set_xticks(list(steps))
        axes[0].axhline(20, color="0.5", linestyle=":", label="guessing")
        axes[1].axhline(20, color="0.5", linestyle=":")
        axes[0].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.08))  # clear of the line
        save(figure, out / "adaptation.png")


def draw_protonet(out: Path) -> None:
    """Accuracy while ProtoNet trains, and one embedded test task."""
    runs = {name: found[0] for name in ("protonet", "protonet_long") if (found := load(out, f"comparison/{name}"))}
    runs = {name: run for name, run in runs.items() if "episode" in run}
    if not runs:
        return
    figure, ((left, right),) = new_figure(1, 2, (10, 4))
    for run, colour in zip(runs.values(), ("#0072B2", "#D55E00"), strict=False):
        label = f"{run['steps']:,} steps"
        for tag, style in (("Accuracy/val", ":"), ("Accuracy/test", "-")):
            steps, values = zip(*run["curves"][tag], strict=True)
            left.plot(steps, [100 * v for v in values], style, color=colour, label=f"{label}, {tag.split('/')[1]}")
    left.legend(frameon=False, fontsize=9)
    left.set(title="5-way 1-shot, one view", xlabel="training step", ylabel="accuracy (%)")
    episode, colours = list(runs.values())[-1]["episode"], ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
    for c, colour in enumerate(colours):
        mine = [point for point, label in zip(episode["query"], episode["labels"], strict=True) if label == c]
        right.plot(*zip(*mine, strict=True), ".", color=colour)
        right.plot(*episode["support"][c], "*", color=colour, markersize=16, markeredgecolor="black")
    right.set(title="a test task: prototypes (stars) and queries", xlabel="first principal component",
              ylabel="second principal component")  # fmt: skip
    right.set_aspect("equal", adjustable="datalim")
    save(figure, out / "protonet.png")


def write_everything(out: Path) -> None:
    """All tables and figures from the JSON files that are there."""
    for part in PARTS:
        write_csv(out, part)
    draw_mann(out)
    draw_comparison(out)
    draw_protonet(out)
    write_atomically(out / "README.md", lambda file: file.write(page(out).encode()))


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    parser = experiment._Parser(prog="reproduce.py", description=__doc__, formatter_class=experiment._Formatter,
                                allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("what", choices=[*PARTS, "all"], help="which part of the documents")
    add("--scale", choices=["smoke", "cpu", "full"], default="cpu", help="how long the runs train")
    add("--jobs", type=whole(1), default=1, metavar="J", help="runs at a time; the CPU cores are shared among them")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of all runs")
    add("--dataset", choices=["auto", "omniglot", "glyphs"], default="auto", help="auto: Omniglot or glyphs")
    folder = "folder of miniImageNet with train/, val/ and test/: adds its four settings to meta_lstm"
    add("--mini_imagenet", metavar="DIR", help=folder)
    some = "only runs whose name, like comparison_maml_seed1, holds one of these texts, separated by commas"
    add("--only", default="", metavar="TEXTS", help=some)
    add("--out", help="folder of the results (default: results, or runs/reproduce_smoke)")
    add("--draw_only", action="store_true", help="no runs: tables and figures from the result files that are there")
    args = parser.parse_args(argv)
    args.out = Path(args.out or ("runs/reproduce_smoke" if args.scale == "smoke" else HERE / "results"))
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder; name another")
    if args.mini_imagenet and not (Path(args.mini_imagenet) / "train").is_dir():
        raise UserError(f"--mini_imagenet {args.mini_imagenet} has no train/; name the folder that holds train/, val/ "
                        "and test/")  # fmt: skip
    return args


def main(argv=None) -> list[str]:
    args = parse_args(argv)
    failures = []
    if not args.draw_only:
        runs = args.out / "runs" if args.scale == "smoke" else Path("runs") / f"reproduce_{args.scale}"
        cases = cases_of(args.what, args.mini_imagenet)
        jobs = make_jobs(cases, args.scale, args.device, args.dataset, args.only)
        if not jobs:
            raise UserError(f"--only {args.only}: no run of {args.what} has this in its name")
        failures = run_all(jobs, args.out, runs, args.jobs)
    write_everything(args.out)
    print(f"written: {args.out / 'README.md'}")
    if failures:
        print("\n".join(f"error: {failure}" for failure in failures), file=sys.stderr)
        sys.exit(1)
    return failures


if __name__ == "__main__":
    experiment.run_script(main)
