"""Races of whole machines: processes and threads, a busy computer, a GPU, seconds to an accuracy."""

from __future__ import annotations

from fewshot import SPIN, experiment
from fewshot.experiment import UserError
from fewshot.experiment.replay import Gradient
from fewshot.learners.conv4 import Conv4
from fewshot.learners.task_loop import mean_over_tasks
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import Dataset

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

import basics.maml
import protonet
from bench.race import print_race, race
from hw1 import MANN
from maml import MAML, Setting, task_loss

REPO = Path(__file__).resolve().parent.parent


def seconds_to_accuracy(args, target: float, recipe: str = "") -> dict:
    """Seconds of training from scratch until protonet.py's validation accuracy (5-way 1-shot) first passes `target`.

    recipe: its flags. Validated every 100 steps on 2,000 tasks; the time of evaluations does not count.
    """
    found = {"recipe": recipe, "target": target, "seconds": [], "test_accuracy": []}
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
            flags = f"{recipe} --random_seed {seed} --eval_freq 100 --num_val_tasks 2000 --dtype {args.dtype}".split()
            metrics = protonet.main([*flags, "--log_dir", root, "--run_name", "run", *common_flags(args)])
            validation = metrics["curves"]["Accuracy/val"]
        passed = [step for step, accuracy in validation if accuracy > target]
        each = metrics["train_seconds"] / metrics["steps"]
        found["seconds"].append(round(passed[0] * each, 1) if passed else None)
        found["test_accuracy"].append(round(metrics["test_accuracy"], 4))
    print(f"protonet.py {recipe}: seconds of training to {target:.1%} on validation tasks, by seed: {found['seconds']}")
    print(json.dumps(found))
    return found


def bench_gpu(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """Forward and backward pass as train loops replay them, beside the same launched kernel by kernel and by task."""
    if device.type != "cuda":
        raise UserError(
            "python -m bench gpu measures what a GPU replays, and there is none here; choose another benchmark"
        )
    dtype, results = experiment.precision(args, device), []
    of_tasks = lambda *shape, **more: EpisodeSampler(dataset, "train", *shape, args.random_seed, device, **more)

    def compare(title: str, step, model: nn.Module, sampler: EpisodeSampler, others: dict) -> None:
        gradient = Gradient(step, model, device, [sampler.generator])
        contestants = others | {"kernel by kernel": step, "replayed": gradient}
        results.append(print_race(title, race(contestants, args.repeats, warmup=2), device))

    for B in (16, 32, 100):
        learner, s = MAML(Conv4(strided=True), 5, 1, 0.4).to(device), Setting(5, dtype=dtype)
        net, sampler = basics.maml.strided_conv4(5).to(device), of_tasks(5, 1, 15, B)

        def by_task(net=net, sampler=sampler):
            with experiment.autocast(device, dtype):
                basics.maml.meta_loss(net, dict(net.named_parameters()), sampler.sample(), 0.4, 1).backward()

        def together(learner=learner, sampler=sampler, s=s):
            loss_of = partial(task_loss, learner.theta(), learner.step_sizes(1), s=s)
            loss = mean_over_tasks(loss_of, sampler.sample(), learner)
            loss.backward()
            return loss.detach()

        compare(
            f"gpu, maml, strided, 1 step, second order, B {B}", together, learner, sampler, {"task by task": by_task}
        )
    encoder = Conv4().to(device, memory_format=torch.channels_last)
    sampler = of_tasks(60, 1, 1, 1, rotations=True, jitter=0.1, shift=0.1)

    def of_protonet() -> torch.Tensor:
        loss = protonet.episode_loss(encoder, sampler.sample(), 60, dtype)
        loss.backward()
        return loss.detach()

    compare("gpu, protonet, 60 classes", of_protonet, encoder, sampler, {})
    model, rows = MANN(2, 2, 128).to(device), of_tasks(2, 1, 1, 128, rotations=True)

    def of_mann() -> torch.Tensor:
        images, labels = rows.sample_rows()
        with experiment.autocast(device, dtype):
            loss = model.loss_function(model(images, labels).float(), labels)
        loss.backward()
        return loss.detach()

    compare("gpu, mann, B 128, K 1, N 2", of_mann, model, rows, {})
    return results


TRAININGS = (
    "hw1.py --num_shot 1 --num_classes 5 --train_steps 300 --eval_freq 300 --num_test_tasks 8",
    "maml.py --warmup_steps 0 --train_steps 60 --eval_freq 60 --num_val_tasks 4 --num_test_tasks 8",
    "protonet.py --meta_batch_size 2 --train_steps 100 --eval_freq 100 --num_test_tasks 8",
)


def bench_processes(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """Training tasks a second of whole runs: in one process with one and two threads, and in two by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ways = {
        "one process, one thread": ([sys.executable], "1"),
        "one process, two threads": ([sys.executable], "2"),
        "two processes of torchrun": (torchrun, "1"),
    }
    results = []
    for training in TRAININGS:
        result = {"title": training, "device": "cuda" if device.type == "cuda" else "cpu"}
        print(training)
        for name, (start, threads) in ways.items():
            rate = train(args, start, training, "tasks_per_second", OMP_NUM_THREADS=threads)
            print(f"  {name:34s} {rate:8.1f} tasks a second")
            result[name] = {"tasks_per_second": rate}
        print(json.dumps(result))
        results.append(result)
    return results


def common_flags(args) -> list[str]:
    """The flags of a script that trains on the device and the data of this race."""
    data = ["--data_folder", args.data_folder] if args.data_folder else []
    return ["--device", args.device, "--dataset", args.dataset, *data, *(["--smoke"] if args.smoke else [])]


def train(args, start: list[str], training: str, figure: str, **environment: str) -> float:
    """The `figure` of metrics.json of `training`, a script at the top and its flags, in a process that `start` begins.

    "step_ms" are the milliseconds of a training step.
    """
    script, *flags = training.split()
    with tempfile.TemporaryDirectory() as root:
        command = [*start, str(REPO / script), *flags, "--log_dir", root, "--run_name", "run", *common_flags(args)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
        found = experiment.read_json(Path(root) / "run" / "metrics.json", "log_dir")
        return 1e3 * found["train_seconds"] / found["steps"] if figure == "step_ms" else found[figure]


BUSY = (  # a few seconds each
    "hw1.py --num_shot 1 --num_classes 5 --train_steps 150 --eval_freq 150 --num_val_tasks 8 --num_test_tasks 8",
    "protonet.py --train_steps 40 --eval_freq 40 --num_val_tasks 8 --num_test_tasks 8 --views 1",
    "maml.py --warmup_steps 20 --train_steps 40 --eval_freq 40 --num_val_tasks 4 --num_test_tasks 8",
    "meta_lstm.py --train_steps 6 --eval_freq 6 --num_val_tasks 4 --num_test_tasks 4",
    "transfer.py --train_steps 60 --finetune_steps 20 --eval_freq 60 --num_test_tasks 8",
    "mae.py --train_steps 8 --eval_freq 8 --num_val_tasks 8 --num_test_tasks 8 --views 1 --whitening_images 50",
)


def bench_busy(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """A training step on all cores, alone and beside one and two endless loops: threads that always spin, and ours.

    Milliseconds of a step; the ratio is to the idle computer with threads that spin as long as libgomp's do by itself.
    """
    cores, results = str(os.cpu_count()), []
    # One spin more than ours is the user's own wish, and so nobody looks after it (`experiment.share_cores`).
    policies = {"spinning": SPIN | {"GOMP_SPINCOUNT": "300001"}, "ours": SPIN}
    for training in BUSY:
        result, alone = {"title": f"busy, {training}", "device": "cpu"}, None
        print(training)
        for loops in (0, 1, 2):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
            try:
                for name, policy in policies.items():
                    ms = train(args, [sys.executable], training, "step_ms", OMP_NUM_THREADS=cores, **policy)
                    alone = alone or ms
                    result[f"{loops} loops, {name}"] = {"ms": round(ms, 2), "ratio": round(alone / ms, 3)}
                    print(f"  {loops} loops, threads {name:10s} {ms:8.1f} ms a step, {ms / alone:5.2f} times the first")
            finally:
                for loop in busy:
                    loop.kill()
                    loop.wait()
        print(json.dumps(result))
        results.append(result)
    return results
