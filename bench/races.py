"""Plain references of each hot path beside ours: speed as a ratio, measured side by side in one run.

    python -m bench episodes --num_classes 5      sampling a meta-batch for the MANN
    python -m bench mann --num_classes 5          one training step of the MANN
    python -m bench protonet --repeats 10         one training step of prototypical networks
    python -m bench protonet --seeds 3            also the seconds of training to 98.8 %, of three seeds
    python -m bench costs --hidden_dim 128        one outer step of MAML and of Evolution Strategies on sinusoids
    python -m bench maml --repeats 5              one meta-gradient of MAML
    python -m bench meta_lstm --repeats 10        one training step of the LSTM meta-learner
    python -m bench processes                     whole trainings: one thread, two threads, two processes of torchrun
    python -m bench busy                          a step of each script alone and beside endless loops
    python -m bench gpu --repeats 10              on a GPU: steps replayed, kernel by kernel, and task by task
    python -m bench maml --peers                  also MAML by installed peers; protonet and costs as well (peers.py)
    python -m bench NAME --out results            also into results/speed.json, in place of older figures of NAME

The references (basics/) are written the way papers and course code do it. Both contestants take turns within one
run, after a warm-up; the figures are medians, with the 10th to 90th percentile.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.experiment.replay import Gradient
from fewshot.learners.conv4 import Conv4
from fewshot.learners.memory import learn_a_little
from fewshot.learners.task_loop import mean_over_tasks
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import Dataset, load_dataset

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import basics.evolution_strategies
import basics.maml
import basics.mann
import basics.meta_lstm
import basics.protonet
import meta_lstm
import profile_costs
import protonet
from attention import CausalAttention, query_loss
from external_memory import SequenceLearner
from hw1 import MANN, Recurrent
from maml import MAML, Setting, embed, task_loss


def race(contestants: dict, repeats: int, warmup: int = 5) -> dict[str, np.ndarray]:
    """Seconds of each call of each contestant, [repeats], taking turns."""
    seconds = {name: [] for name in contestants}
    for turn in tqdm(range(warmup + repeats), leave=False, disable=None):
        for name, call in contestants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def precisions(device: torch.device, probe=None) -> list[torch.dtype]:
    """The precisions to race: float32, and bfloat16 where the kernels of `probe` exist, be they emulated."""
    return list({torch.float32: 0, experiment.precision(Namespace(dtype="bfloat16"), device, probe): 0})


def print_race(title: str, seconds: dict[str, np.ndarray], device: torch.device, **more) -> dict:
    """Print the medians and their ratio to the first contestant; returns them, and `more` that was measured."""
    print(f"{title}, on {experiment.device_name(device)}")
    reference = np.median(next(iter(seconds.values())))
    result = {"title": title, "device": experiment.device_name(device), **more}
    for name, values in seconds.items():
        low, median, high = np.percentile(values * 1e3, [10, 50, 90])
        ratio = reference * 1e3 / median
        print(f"  {name:34s} {median:8.3f} ms  ({low:.3f} to {high:.3f})  {ratio:6.2f}x")
        result[name] = {"ms": round(median, 4), "ratio": round(ratio, 3)}
    print(json.dumps(result))
    return result


def plain_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """Backward pass and update as the files of basics/ show them."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


# ----------------------------------------------------------------------------------- episodes


class ListSampler:
    """The course's loader in its fastest state: every image already decoded and held in memory.

    Each task draws class folders, lists them (`list_folders`, as the course's code does every time),
    draws files of each, looks every file up, stacks, shuffles the queries and is then stacked with the
    other tasks, as a DataLoader would. The folders hold empty files; no image is read from them.
    """

    def __init__(self, dataset: Dataset, split: str, num_classes: int, num_shot: int, seed: int, root: Path):
        self.N, self.K, self.list_folders = num_classes, num_shot, True
        self.random = random.Random(seed)
        self.memory, self.files = {}, {}
        for c in dataset.splits[split].tolist():
            folder = root / f"character{c:04d}"
            folder.mkdir()
            for i in range(dataset.counts[c]):
                path = folder / f"{i:04d}.png"
                path.touch()
                image = dataset.images[dataset.starts[c] + i]
                self.memory[str(path)] = image.reshape(-1).astype(np.float32) / 255
            self.files[str(folder)] = os.listdir(folder)
        self.folders = list(self.files)

    def sample_task(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 images [K+1, N, 784] and one-hot labels [K+1, N, N]."""
        N, K = self.N, self.K
        images = [[None] * N for _ in range(K + 1)]
        labels = np.zeros((K + 1, N, N), dtype=np.float32)
        for label, folder in enumerate(self.random.sample(self.folders, N)):
            files = os.listdir(folder) if self.list_folders else self.files[folder]
            for row, file in enumerate(self.random.sample(files, K + 1)):
                images[row][label] = self.memory[os.path.join(folder, file)]
                labels[row, label, label] = 1
        order = self.random.sample(range(N), N)
        images[K] = [images[K][i] for i in order]
        labels[K] = labels[K][order]
        return np.stack([np.stack(row) for row in images]), labels

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        tasks = [self.sample_task() for _ in range(batch_size)]
        images = torch.stack([torch.from_numpy(images) for images, _ in tasks])
        return images, torch.stack([torch.from_numpy(labels) for _, labels in tasks])


def bench_episodes(args, device: torch.device, dataset: Dataset) -> list[dict]:
    B, K, N = args.meta_batch_size, args.num_shot, args.num_classes
    sampler = EpisodeSampler(dataset, "train", N, K, 1, B, args.random_seed, device)

    with tempfile.TemporaryDirectory() as root:
        plain = ListSampler(dataset, "train", N, K, args.random_seed, Path(root))

        def course(list_folders: bool):
            plain.list_folders = list_folders
            return [x.to(device) for x in plain.sample(B)]

        contestants = {
            "course loader, images in memory": lambda: course(True),
            "the same with folders listed once": lambda: course(False),
            "EpisodeSampler": sampler.sample_rows,
        }
        return [print_race(f"episodes, B {B}, K {K}, N {N}", race(contestants, args.repeats), device)]


# --------------------------------------------------------------------------------------- mann


def our_step(model, optimizer, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> None:
    """The step of the train loop of hw1.py and of attention.py."""
    with experiment.autocast(images.device, dtype):
        preds = model(images, labels)
    loss = query_loss(preds.float() if dtype == torch.bfloat16 else preds, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class OverEpisodes(torch.nn.Module):
    """A reader of sequences that is given episodes as hw1.py is: support images with their labels, then the queries."""

    def __init__(self, reader: SequenceLearner):
        super().__init__()
        self.reader = reader

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        told = torch.cat([labels[:, :-1], torch.zeros_like(labels[:, -1:])], dim=1)
        return self.reader(torch.cat([features, told], dim=-1).flatten(1, 2)).view(labels.shape)


def kept_for_backward(call) -> float:
    """Megabytes of all tensors that `call` keeps for its backward pass, each counted once."""
    storages = {}

    def remember(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        call()
    return round(sum(storages.values()) / 1e6, 2)


def products_of_a_step(course: nn.Module, B: int, T: int):
    """A function that does the matrix products that no step on B sequences of length T can do without, and no more.

    For each layer: the input's and the state's share of the gates, forward and backward, on numbers of the right
    shapes. The gradient of the pixels, which oneDNN's LSTM also computes, is not among them.
    """
    layers = []
    for layer in (course.layer1, course.layer2):
        into, back = layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach()  # [4 H, inputs], [4 H, H]
        sizes = (into.shape[1], *back.T.shape)
        layers.append((into, back, *(torch.randn(B * T, n, device=into.device) for n in sizes)))

    def products() -> None:
        for into, back, inputs, states, gates in layers:
            inputs @ into.T
            for _ in range(T):  # one step of the sequence waits for the one before
                states[:B] @ back.T
                gates[:B] @ back
            gates.T @ inputs
            gates.T @ states
        gates @ into  # of the last layer: what the layer before it learns from

    return products


def bench_mann(args, device: torch.device, dataset: Dataset) -> list[dict]:
    sampler = EpisodeSampler(
        dataset, "train", args.num_classes, args.num_shot, 1, args.meta_batch_size, args.random_seed, device
    )
    images, labels = sampler.sample_rows()
    course = basics.mann.MANN(args.num_classes, args.hidden_dim).to(device)
    course_adam = torch.optim.Adam(course.parameters(), 1e-3)

    def course_step() -> None:
        plain_step(course_adam, basics.mann.query_loss(course(images, labels), labels))

    contestants = {"course step": course_step}
    for dtype in precisions(device, probe=lambda: learn_a_little(torch.nn.LSTM, device)):
        ours = MANN(args.num_classes, args.num_shot + 1, args.hidden_dim).to(device)
        adam = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
        step = lambda ours=ours, adam=adam, dtype=dtype: our_step(ours, adam, images, labels, dtype)
        contestants[f"our step, {str(dtype).removeprefix('torch.')}"] = step
    features, kept = torch.rand(*images.shape[:3], 64, device=device), {}  # as an encoder would give them
    N = args.num_classes
    learners = {
        "lstm": MANN(N, args.num_shot + 1, args.hidden_dim, Recurrent(head="linear"), dim_input=64),
        "attention": CausalAttention(64, layers=2),
        "external": OverEpisodes(SequenceLearner(N, args.hidden_dim, dim_input=64)),
    }
    for memory, ours in learners.items():
        ours = ours.to(device)
        adam = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
        step = lambda ours=ours, adam=adam: our_step(ours, adam, features, labels, torch.float32)
        contestants[f"{memory}, 64 features an image"] = step
        kept[memory] = kept_for_backward(step)
    contestants["the step's matrix products alone, float32"] = products_of_a_step(
        course, len(images), images.shape[1] * images.shape[2]
    )
    title = f"mann, B {args.meta_batch_size}, K {args.num_shot}, N {args.num_classes}, hidden {args.hidden_dim}"
    print("  megabytes kept for the backward pass:", kept)
    return [print_race(title, race(contestants, args.repeats), device, megabytes_kept=kept)]


# ----------------------------------------------------------------------------------- protonet


def bench_protonet(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """16 tasks of 5-way 1-shot 15-query: sampling and one training step, at the same network."""
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    plain = basics.protonet.conv4().to(device)
    plain_adam = torch.optim.Adam(plain.parameters(), 1e-3)
    with tempfile.TemporaryDirectory() as root:
        lists = ListSampler(dataset, "train", N, K + Q - 1, args.random_seed, Path(root))

        def one_after_another() -> None:
            losses = []
            for _ in range(B):
                images, labels = (torch.from_numpy(x).to(device) for x in lists.sample_task())
                images, labels = images.view(K + Q, N, 1, 28, 28), labels.argmax(dim=-1)
                support, query = images[:K].transpose(0, 1).flatten(0, 1), images[K:].flatten(0, 1)  # in class order
                losses.append(basics.protonet.episode_loss(plain, support, query, labels[K:].flatten(), N))
            plain_step(plain_adam, torch.stack(losses).mean())

        contestants = {"tasks one after another": one_after_another}
        for dtype in precisions(device):
            encoder = Conv4().to(device, memory_format=torch.channels_last)
            adam = torch.optim.Adam(encoder.parameters(), 1e-3, fused=True)
            sampler = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device)

            def our_step(encoder=encoder, adam=adam, sampler=sampler, dtype=dtype) -> None:
                loss = protonet.episode_loss(encoder, sampler.sample(), N, dtype)
                adam.zero_grad()
                loss.backward()
                adam.step()

            contestants[f"together, {str(dtype).removeprefix('torch.')}"] = our_step
        result = print_race(f"protonet, B {B}, K {K}, N {N}, Q {Q}", race(contestants, args.repeats, warmup=2), device)
    if args.seeds:
        recipes = ["", "--image_size 32 --train_steps 1500"]
        result["to_accuracy"] = [seconds_to_accuracy(args, 0.988, recipe) for recipe in recipes]
    return [result]


def seconds_to_accuracy(args, target: float, recipe: str = "") -> dict:
    """Seconds of training from scratch until protonet.py's validation accuracy (5-way 1-shot) first passes `target`.

    recipe: its flags. Validated every 100 steps on 2,000 tasks; the time of evaluations does not count.
    """
    found = {"recipe": recipe, "target": target, "seconds": [], "test_accuracy": []}
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
            metrics = protonet.main(
                [
                    *recipe.split(),
                    "--random_seed",
                    str(seed),
                    "--eval_freq",
                    "100",
                    "--num_val_tasks",
                    "2000",
                    "--log_dir",
                    root,
                    "--run_name",
                    "run",
                    "--device",
                    args.device,
                    "--dtype",
                    args.dtype,
                    "--dataset",
                    args.dataset,
                    *(["--data_folder", args.data_folder] if args.data_folder else []),
                    *(["--smoke"] if args.smoke else []),
                ]
            )
            validation = metrics["curves"]["Accuracy/val"]
        passed = [step for step, accuracy in validation if accuracy > target]
        each = metrics["train_seconds"] / metrics["steps"]
        found["seconds"].append(round(passed[0] * each, 1) if passed else None)
        found["test_accuracy"].append(round(metrics["test_accuracy"], 4))
    print(f"protonet.py {recipe}: seconds of training to {target:.1%} on validation tasks, by seed: {found['seconds']}")
    print(json.dumps(found))
    return found


# -------------------------------------------------------------------------------------- costs


def bench_costs(args, device: torch.device, dataset: Dataset | None) -> list[dict]:
    """32 sinusoids, 5 inner steps, MAML and ES (two perturbations a task): one after another, together, and `auto`."""
    B = 4 if args.smoke else 32
    flags = Namespace(
        meta_batch_size=B,
        num_perturbations=2 * B,
        num_shot=10,
        num_query=100,
        inner_steps=5,
        inner_lr=1e-2,
        sigma=1e-3,
        layers=2,
        hidden_dim=args.hidden_dim,
        learning_rate=1e-3,
    )
    results = []
    for method in ("maml", "es"):
        net = basics.evolution_strategies.mlp(flags.layers, flags.hidden_dim).to(device)
        flat = nn.utils.parameters_to_vector(net.parameters()).detach()  # what Evolution Strategies move
        adam = torch.optim.Adam(net.parameters() if method == "maml" else [flat], 1e-3)

        def plain(net=net, flat=flat, adam=adam, method=method) -> None:
            tasks = [basics.evolution_strategies.sinusoid(flags.num_shot, flags.num_query) for _ in range(B)]
            tasks = [tuple(x.to(device) for x in task) for task in tasks]
            inner = {"rate": flags.inner_lr, "steps": flags.inner_steps}
            if method == "maml":
                theta, stacked = dict(net.named_parameters()), zip(*tasks, strict=True)
                plain_step(adam, basics.maml.meta_loss(net, theta, list(stacked), **inner, criterion=F.mse_loss))
            else:
                noise = torch.randn(B, len(flat), device=device)
                flat.grad, _ = basics.evolution_strategies.estimate(net, flat, tasks, noise, flags.sigma, **inner)
                adam.step()

        model, optimizer = profile_costs.start(flags, device)
        chosen, at_once = profile_costs.fastest_engine(flags, method, device)
        contestants = {"one task after another": plain}
        for name, engine, n in (("vmap", "vmap", 0), (f"auto: {chosen}, {at_once} at once", chosen, at_once)):
            contestants[name] = lambda m=model, o=optimizer, k=method, e=engine, n=n: profile_costs.meta_step(
                m, o, flags, k, e, n
            )
        title = f"costs, {profile_costs.LABELS[method]}, B {B}, hidden 2 x {flags.hidden_dim}, 5 inner steps"
        results.append(print_race(title, race(contestants, args.repeats, warmup=2), device))
    return results


# --------------------------------------------------------------------------------------- maml


def pooled_conv4(num_classes: int, width: int = 64) -> nn.Sequential:
    """`strided_conv4` of basics/maml.py with pooling in place of strides."""
    blocks = []
    for channels in (1, width, width, width):
        blocks += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
        ]
        blocks += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width, num_classes))


def bench_maml(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """One meta-gradient of the same tasks at the same network.

    Beside them the same images forward and backward through one network in one call, without any inner loop: what is
    left when all arrangement of the tasks costs nothing.
    """
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    tasks = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device).sample()
    images = torch.cat([tasks[0], tasks[2]], dim=1).flatten(0, 1)  # support and query of all tasks
    results = []
    for strided in (True, False):
        shared_encoder = Conv4(strided=strided).to(device, memory_format=torch.channels_last)
        for steps in (1, 5):
            for first_order in (False, True):
                encoder = Conv4(strided=strided)
                learner = MAML(encoder, N, steps, 0.4).to(device)
                net = (basics.maml.strided_conv4 if strided else pooled_conv4)(N).to(device)
                contestants = {}
                for dtype in precisions(device):
                    s = Setting(N, strided, first_order=first_order, dtype=dtype)
                    name = str(dtype).removeprefix("torch.")

                    def plain(net=net, steps=steps, s=s):
                        with experiment.autocast(device, s.dtype):
                            theta = dict(net.named_parameters())
                            basics.maml.meta_loss(net, theta, tasks, 0.4, steps, s.first_order).backward()

                    contestants[f"loop over tasks, {name}"] = plain

                    def ours(learner=learner, s=s, steps=steps):
                        theta, sizes = learner.theta(), learner.step_sizes(steps)
                        loss_of = lambda *task: task_loss(theta, sizes, *task, s)
                        mean_over_tasks(loss_of, tasks, learner).backward()

                    contestants[f"maml.py, {name}"] = ours

                    def shared(encoder=shared_encoder, s=s):
                        embed(dict(encoder.named_parameters()), images, s, 0).sum().backward()

                    contestants[f"all images through one network, {name}"] = shared
                network, order = "strided" if strided else "pooled", "first" if first_order else "second"
                title = f"maml, {network}, {steps} steps, {order} order, B {B}, N {N}, K {K}, Q {Q}"
                results.append(print_race(title, race(contestants, args.repeats, warmup=1), device))
    return results


# ---------------------------------------------------------------------------------------- gpu


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


# ---------------------------------------------------------------------------------- meta-LSTM


def bench_meta_lstm(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """B episodes of training: one at a time, as the re-implementations do, against all together."""
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    updates, momentum = (12, 0.9) if K == 1 else (8, 0.95)
    learner = basics.meta_lstm.make_learner(N).to(device)
    meta = basics.meta_lstm.MetaLSTM(nn.utils.parameters_to_vector(learner.parameters()).detach()[:, None]).to(device)
    adam = torch.optim.Adam(meta.parameters(), 1e-3)
    sampler = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device)

    def one_at_a_time() -> None:
        for *task, query_labels in zip(*sampler.sample(), strict=True):
            loss = F.cross_entropy(basics.meta_lstm.query_logits(meta, learner, *task, updates), query_labels)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(meta.parameters(), 0.25)
            adam.step()

    contestants = {"one episode at a time": one_at_a_time}
    sizes, inner = meta_lstm.Learner(1, 28, N), meta_lstm.Inner(updates, N * K, momentum)
    for dtype in precisions(device):
        for share in (1.0, 0.1):
            rule = meta_lstm.MetaLSTM(sizes.initial(), share).to(device)
            ours = torch.optim.Adam(rule.parameters(), 1e-3, fused=True)

            def together(rule=rule, ours=ours, dtype=dtype) -> None:
                ours.zero_grad()
                for tasks in meta_lstm.in_parts(sampler.sample(), args.tasks_at_once):
                    losses, _ = meta_lstm.query_losses(rule, sizes, tasks, inner, dtype=dtype)
                    (losses.sum() / B).backward()
                nn.utils.clip_grad_norm_(rule.parameters(), 0.25)
                ours.step()

            name = str(dtype).removeprefix("torch.")
            contestants[f"together, {name}" + (f", trained share {share}" if share < 1 else "")] = together
    title = f"meta_lstm, {B} episodes, N {N}, K {K}, Q {Q}, {updates} updates"
    return [print_race(title, race(contestants, args.repeats, warmup=1), device)]


# ---------------------------------------------------------------------------------- processes

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
        script, *flags = training.split()
        result = {"title": training, "device": "cuda" if device.type == "cuda" else "cpu"}
        print(training)
        for name, (start, threads) in ways.items():
            rate = train(args, [*start, str(Path(__file__).with_name(script)), *flags], OMP_NUM_THREADS=threads)
            print(f"  {name:34s} {rate:8.1f} tasks a second")
            result[name] = {"tasks_per_second": rate}
        print(json.dumps(result))
        results.append(result)
    return results


def train(args, command: list[str], figure: str = "tasks_per_second", **environment: str) -> float:
    """Training tasks a second, or milliseconds of a step, of `command`, a script and its flags, in its own process."""
    with tempfile.TemporaryDirectory() as root:
        where = ["--log_dir", root, "--run_name", "run", "--device", args.device, "--dataset", args.dataset]
        where += ["--data_folder", args.data_folder] if args.data_folder else []
        where += ["--smoke"] if args.smoke else []
        subprocess.run([*command, *where], check=True, capture_output=True, env=os.environ | environment)
        found = experiment.read_json(Path(root) / "run" / "metrics.json", "log_dir")
        return 1e3 * found["train_seconds"] / found["steps"] if figure == "step_ms" else found[figure]


# --------------------------------------------------------------------------------------- busy

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
    policies = {"spinning": experiment.SPIN | {"GOMP_SPINCOUNT": "300001"}, "ours": experiment.SPIN}
    for training in BUSY:
        script, *flags = training.split()
        result, alone = {"title": f"busy, {training}", "device": "cpu"}, None
        print(training)
        for loops in (0, 1, 2):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
            try:
                for name, policy in policies.items():
                    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
                    ms = train(args, command, "step_ms", OMP_NUM_THREADS=cores, **policy)
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


# -------------------------------------------------------------------------------------- peers


def bench_peers(args, device: torch.device, dataset: Dataset | None) -> list[dict]:
    """Ours beside installed peers, which have shown that they compute the same."""
    from bench import peers

    races = peers.RACES[args.benchmark](args, device, dataset)
    return [print_race(title, race(contestants, args.repeats, warmup=2), device) for title, contestants in races]


BENCHMARKS = {
    "episodes": bench_episodes,
    "mann": bench_mann,
    "protonet": bench_protonet,
    "maml": bench_maml,
    "meta_lstm": bench_meta_lstm,
    "costs": bench_costs,
    "processes": bench_processes,
    "busy": bench_busy,
    "gpu": bench_gpu,
}


def keep(results: list[dict], args, path: Path) -> None:
    """Write `results` into the JSON file `path`, each in place of an older one of this title and processor."""
    come_from = {"command": args.command, "git_commit": args.git_commit, "processor": experiment.processor()}
    come_from["versions"] = experiment.versions()
    races = json.loads(path.read_text()) if path.exists() else []
    kept = {(race["title"], race["processor"]): race for race in races + [race | come_from for race in results]}
    experiment.write_json(path, [kept[name] for name in sorted(kept)])


def main(argv=None) -> list[dict]:
    parser, groups = experiment.make_parser(__doc__, ("--out", "--allow_overlap", "--allow_new_classes"))
    parser.prog = "-m bench"
    parser.add_argument("benchmark", choices=list(BENCHMARKS), help="what to measure")
    units = experiment.whole(1, 16384)
    groups["model"].add_argument("--hidden_dim", type=units, default=128, help="units: mann, costs")
    groups["run"].add_argument("--repeats", type=experiment.whole(1), default=100, help="timed turns")
    once = "for meta_lstm: episodes that go through the cell together"
    groups["run"].add_argument("--tasks_at_once", type=experiment.whole(1), default=4, help=once)
    seeds = "for protonet: trainings that are timed until validation passes 98.8 %%"
    groups["run"].add_argument("--seeds", type=experiment.whole(0), default=0, help=seeds)
    installed = "for maml, protonet and costs: also race installed peers (requirements-peers.txt)"
    groups["run"].add_argument("--peers", action="store_true", help=installed)
    groups["run"].add_argument("--out", metavar="DIR", help="keep the figures in DIR/speed.json, as results/ does")
    named = argv or sys.argv
    parser.set_defaults(meta_batch_size=128 if {"episodes", "mann"} & set(named) else 4 if "meta_lstm" in named else 16)
    args = experiment.parse(parser, argv, smoke={"repeats": 1})
    if args.out and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is not a folder; name one that exists")
    if args.peers and args.benchmark not in ("maml", "protonet", "costs"):
        raise UserError(f"--peers: there is no peer of {args.benchmark}; drop it, or choose maml, protonet or costs")
    device = experiment.setup(args)
    # Sinusoids need no images.
    dataset = None if args.benchmark == "costs" else load_dataset(args.dataset, args.data_folder, args.split)
    results = BENCHMARKS[args.benchmark](args, device, dataset)
    if args.peers:
        results += bench_peers(args, device, dataset)
    if args.out:
        keep(results, args, Path(args.out) / "speed.json")
    return results


if __name__ == "__main__":
    experiment.run_script(main)
