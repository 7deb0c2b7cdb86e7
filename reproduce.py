"""The runs behind every table and figure of the source documents by one command; report.py writes those.

    python reproduce.py all --scale smoke          everything in its smallest form, to see that it works
    python reproduce.py all --scale cpu --jobs 2   what two CPU cores can do in some hours
    python reproduce.py all --scale full           the papers' lengths, for a GPU
    python reproduce.py comparison                 one part: mann, meta_lstm, comparison, costs, features

Each run is a script of this package in a process of its own, `--jobs` at a time. What is done, by the same flags and
the same code, is skipped; what was interrupted is resumed; what fails is named and makes the exit code 1. Results go to
`--out` (results/, or a folder of runs/ for smoke): a JSON file a run. `python report.py` then writes the tables, the
pictures and the documents.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
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

# --------------------------------------------------------------------------------------- runs


class Job(NamedTuple):
    name: str  # of the run folder
    case: Case
    seed: int
    flags: list[str]
    key: str  # of the flags and the code: the same key, the same result


def code_version(script: str) -> str:
    """A digest of the code that a run of `script` executes."""
    files = [script, "load_data.py", "backbone.py", "experiment.py"]
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
    runs = args.out / "runs" if args.scale == "smoke" else Path("runs") / f"reproduce_{args.scale}"
    cases = cases_of(args.what, args.mini_imagenet)
    jobs = make_jobs(cases, args.scale, args.device, args.dataset, args.only)
    if not jobs:
        raise UserError(f"--only {args.only}: no run of {args.what} has this in its name")
    failures = run_all(jobs, args.out, runs, args.jobs)
    print(f"results: {args.out}; tables and pictures: python report.py --results {args.out}")
    if failures:
        print("\n".join(f"error: {failure}" for failure in failures), file=sys.stderr)
        sys.exit(1)
    return failures


if __name__ == "__main__":
    experiment.run_script(main)
