"""The fine-tuning baseline: an ordinary classifier, pre-trained on many characters and adapted to others.

The slides' baseline for few-shot learning (see also Chen et al. 2019, "A closer look at few-shot
classification"). Phase 1 trains a Conv4 with a linear head to tell the 1200 training and validation
characters apart. Phase 2 gives a copy of it a new head and fine-tunes all of it to tell the 423 test
characters apart. Of every character some drawings are held out and only ever measured. Beside it, on the
same test tasks as the episodic methods, a fresh head is fitted to the support set of each N-way K-shot
task, on features of phase 1 alone, which never saw a test character.

    python transfer.py                        both phases and the few-shot figure
    python transfer.py --smoke                a complete run in seconds
    python transfer.py --adapt all            few-shot tasks fine-tune a whole network each

Measured: 423-way 90.6 ± 1.2 % (over 2,115 drawings), both phases in 4.8 minutes on one AMD EPYC core with bfloat16.
Everything else: docs/transfer.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import Run, UserError, number, whole
from fewshot.experiment.replay import recorded
from fewshot.learners.conv4 import Conv4
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler, distort, fixed_tasks
from fewshot.tasks.lake import LakeRuns, lake_runs
from fewshot.tasks.splits import Dataset, turns

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class LabelledDrawings:
    """Random minibatches of (image, class) from the training drawings of some classes, and the held-out ones.

    A generator of its own, whose state can be saved, draws the batches and their distortions.
    """

    def __init__(self, dataset: Dataset, classes, held_out: int, seed: int, device, jitter: float, shard=(0, 1)):
        if held_out >= dataset.counts[classes].min():
            raise UserError(f"--held_out {held_out} leaves no drawing of a class with {dataset.counts[classes].min()}")
        images, starts = torch.from_numpy(dataset.images), dataset.starts[classes]
        if dataset.turned:  # each turn of a class is a class
            starts = np.concatenate([starts + turn * len(images) for turn in range(4)])
            images = turns(images)
        counts = np.resize(dataset.counts[classes], len(starts))
        rows = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        self.num_classes = len(rows)
        train = [(row, y) for y, drawings in enumerate(rows) for row in drawings[:-held_out]]
        test = [(row, y) for y, drawings in enumerate(rows) for row in drawings[-held_out:]]
        self.images = images.to(device)
        self.train, self.test = (torch.tensor(pairs, device=device).T for pairs in (train, test))  # [2, n]
        self.shard = shard  # (rank, world): all draw the same minibatch, each keeps its part
        self.jitter, self.generator = jitter, torch.Generator(device).manual_seed(seed)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 images [size, C, H, W] and labels [size] of training drawings."""
        g = self.generator
        rows, labels = self.train[:, torch.randint(self.train.shape[1], (size,), generator=g, device=g.device)]
        images = self.images[rows].float() / 255
        noise = 2 * torch.rand(size, 4, generator=g, device=g.device) - 1
        rank, world = self.shard
        mine = slice(rank * size // world, (rank + 1) * size // world)
        images, labels, noise = images[mine], labels[mine], noise[mine]
        return (distort(images, self.jitter * noise) if self.jitter > 0 else images), labels

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


class Classifier(nn.Module):
    """A Conv4 and a linear head."""

    def __init__(self, encoder: Conv4, num_classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.out_features, num_classes)

    def forward(self, images: torch.Tensor, dtype: torch.dtype, **norm) -> torch.Tensor:
        """Logits [n, classes] of images [n, C, H, W]."""
        with experiment.autocast(images.device, dtype):
            features = self.encoder(images.contiguous(memory_format=torch.channels_last), **norm)
        return self.head(features.float())


@torch.no_grad()
def held_out_accuracy(model: Classifier, drawings: LabelledDrawings, dtype: torch.dtype) -> torch.Tensor:
    """Whether each held-out drawing is labelled right: float [n]."""
    right = []
    for rows, labels in zip(drawings.test[0].split(1000), drawings.test[1].split(1000), strict=True):
        logits = model(drawings.images[rows].float() / 255, dtype)
        right.append((logits.argmax(dim=-1) == labels).float())
    return torch.cat(right).cpu()


def fit_heads(features: torch.Tensor, labels: torch.Tensor, N: int, steps: int, rate: float, decay: float):
    """Fit a linear head to each task's support features, all tasks together, by gradient descent with momentum.

    features [B, n, D], labels [B, n] -> weights [B, D, N] and biases [B, 1, N], both started at zero.
    """
    B, _, D = features.shape
    weight = torch.zeros(B, D, N, device=features.device, requires_grad=True)
    bias = torch.zeros(B, 1, N, device=features.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], rate, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        logits = features @ weight + bias
        # The sum over tasks: every task descends its own mean loss.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * B
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def few_shot(args, encoder: Conv4, sampler: EpisodeSampler, num_tasks: int, dtype: torch.dtype) -> torch.Tensor:
    """Accuracy of each of the first `num_tasks` tasks: a fresh head (or network) for every support set."""
    N, correct = sampler.N, []
    for support, support_labels, query, query_labels in sampler.first(num_tasks):
        if args.adapt == "all":
            logits = torch.stack(
                [
                    adapt_network(args, encoder, s, y, q, dtype)
                    for s, y, q in zip(support, support_labels, query, strict=True)
                ]
            )
        else:
            with torch.no_grad():
                flat = torch.cat([support, query], dim=1).flatten(0, 1)
                with experiment.autocast(flat.device, dtype):
                    features = encoder(flat.contiguous(memory_format=torch.channels_last))
                # Unit vectors: a cosine head needs neither a tuned rate nor a tuned number of steps.
                features = F.normalize(features.float().view(len(support), -1, encoder.out_features), dim=-1)
            n = support.shape[1]
            weight, bias = fit_heads(
                features[:, :n], support_labels, N, args.head_steps, args.head_rate, args.head_decay
            )
            logits = features[:, n:] @ weight + bias
        correct.append((logits.argmax(dim=-1) == query_labels).float().mean(dim=1).cpu())
    return torch.cat(correct)


def adapt_network(args, encoder: Conv4, support, labels, query, dtype: torch.dtype) -> torch.Tensor:
    """Query logits [N*Q, N] of a copy of the whole network fine-tuned on one support set."""
    copy = Conv4(support.shape[1], args.width, args.image_size).to(support.device)
    copy.load_state_dict(encoder.state_dict())
    model = Classifier(copy, int(labels.max()) + 1).to(support.device)
    optimizer = torch.optim.Adam(
        [
            {"params": model.encoder.parameters(), "lr": args.finetune_rate / 10},
            {"params": model.head.parameters(), "lr": 0.1},
        ]
    )
    for _ in range(args.head_steps):
        loss = F.cross_entropy(model(support, dtype, norm="running"), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(query, dtype, norm="running")


def parse_args(argv=None):
    """The flags; --train_steps counts both phases."""
    parser, groups = experiment.make_parser(
        __doc__,
        without=("--rotations", "--patience", "--num_val_tasks"),
        meta_batch_size=128,
        train_steps=3200,
        eval_freq=200,
    )
    parser.prog = "transfer.py"
    add = groups["data"].add_argument
    add("--held_out", type=whole(1), default=5, help="drawings of each character that are only measured")
    add("--jitter", type=number(0, 1), default=0.15, help="random turn (radians), size and slant of training images")
    groups["model"].add_argument("--width", type=whole(1, 4096), default=64, help="filters of each convolution")
    add = groups["optimisation"].add_argument
    add("--finetune_steps", type=whole(1), default=1200, help="the last of --train_steps, on the test characters")
    add("--learning_rate", type=number(above=True), default=3e-3, help="of AdamW at its peak, phase 1")
    add("--finetune_rate", type=number(above=True), default=3e-3, help="of AdamW at its peak, phase 2")
    add = groups["evaluation"].add_argument
    add("--adapt", choices=["head", "all"], default="head", help="what a few-shot task fits: a head, or everything")
    add("--head_steps", type=whole(1), default=100, help="gradient steps on a few-shot task's support set")
    add("--head_rate", type=number(above=True), default=1.0, help="their rate")
    add("--head_decay", type=number(), default=0.001, help="their weight decay")
    smoke = {
        "train_steps": 20,
        "finetune_steps": 10,
        "eval_freq": 5,
        "num_test_tasks": 10,
        "width": 8,
        "meta_batch_size": 32,
    }
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
    falls = "the learning rate of each phase falls to zero in it"
    args = experiment.parse(parser, argv, smoke, fixed=("width", "image_size"), longer=lambda flags: falls)
    if args.finetune_steps >= args.train_steps:
        raise UserError(f"--finetune_steps {args.finetune_steps} must be less than --train_steps {args.train_steps}")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device)
    dataset = load_for(args)
    if args.test and (elsewhere := few_shot_elsewhere(args, dataset, dtype, device)):
        return experiment.report(args, "transfer", dataset.name, elsewhere, digest=dataset.digest)
    splits = dataset.splits
    channels = dataset.images.shape[1]
    known = [*splits["train"], *splits["val"]]
    common = args.held_out, args.random_seed, device, args.jitter, experiment.shard()
    first, second = LabelledDrawings(dataset, known, *common), LabelledDrawings(dataset, splits["test"], *common)
    if args.meta_batch_size % experiment.shard()[1]:
        processes = experiment.shard()[1]
        raise UserError(f"--meta_batch_size {args.meta_batch_size} does not divide over {processes} processes")
    model = nn.ModuleDict(
        {
            "pretrained": Classifier(Conv4(channels, args.width, args.image_size), first.num_classes),
            "finetuned": Classifier(Conv4(channels, args.width, args.image_size), second.num_classes),
        }
    ).to(device, memory_format=torch.channels_last)
    tasks, runs = fixed_tasks(dataset, "test", args, device), lake_runs(dataset, args, device, any_task=True)
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        metrics = {"best_step": step} | report(args, model, first, second, tasks, runs, dtype, device)
        return experiment.report(args, "transfer", dataset.name, metrics, digest=dataset.digest)

    experiment.init_from(args, model["pretrained"].encoder)
    pretrain_steps = args.train_steps - args.finetune_steps
    optimizers, schedules = {}, {}
    for name, rate, steps in (
        ("pretrained", args.learning_rate, pretrain_steps),
        ("finetuned", args.finetune_rate, args.finetune_steps),
    ):
        optimizers[name] = torch.optim.AdamW(model[name].parameters(), rate, weight_decay=0.05, fused=True)
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(optimizers[name], rate, total_steps=max(20, steps + 1))
    run = Run(args, "transfer", dataset.name, dataset.digest)
    run.track(
        model=model,
        first=first,
        second=second,
        **{f"optimizer_{k}": v for k, v in optimizers.items()},
        **{f"schedule_{k}": v for k, v in schedules.items()},
    )

    def forward_backward(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(classifier(images, dtype, norm="batch", momentum=0.1), labels)
        classifier.zero_grad()
        loss.backward()
        return loss.detach()

    # One CUDA graph a phase on a GPU; on a CPU `recorded` does nothing.
    of_phase = {name: recorded(part, device)(partial(forward_backward, part)) for name, part in model.items()}
    for step in run.steps():
        name, drawings = ("pretrained", first) if step <= pretrain_steps else ("finetuned", second)
        if step == pretrain_steps + 1:  # phase 2 starts from the pre-trained body and a new head
            model["finetuned"].encoder.load_state_dict(model["pretrained"].encoder.state_dict())
        loss = of_phase[name](*drawings.batch(args.meta_batch_size))
        experiment.average_gradients(model[name])
        optimizers[name].step()
        schedules[name].step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                accuracy = held_out_accuracy(model[name], drawings, dtype).mean().item()
            # No checkpoint is chosen by these drawings: the last one counts.
            run.evaluated(None, {f"Accuracy/{name}": accuracy})
    run.load_best(model)
    return run.finish(report(args, model, first, second, tasks, runs, dtype, device))


def few_shot_elsewhere(args, dataset: Dataset, dtype: torch.dtype, device: torch.device) -> dict | None:
    """Where the run of --checkpoint knew other classes: the few-shot figure alone, on them its heads say nothing."""
    saved = experiment.read_flags(args.checkpoint, "checkpoint")
    if (saved["dataset"], saved["flags"].get("split")) == (dataset.name, args.split):
        return None
    path = Path(args.checkpoint) / "best.pt"
    best = experiment.load_checkpoint(path)
    encoder, prefix = Conv4(dataset.images.shape[1], args.width, args.image_size), "pretrained.encoder."
    # Of another script's run nothing is left: refused below, in one line.
    state = {name.removeprefix(prefix): value for name, value in best["model"].items() if name.startswith(prefix)}
    experiment.load_state(encoder, state, path)
    encoder.to(device, memory_format=torch.channels_last)
    tasks = fixed_tasks(dataset, "test", args, device)
    runs = lake_runs(dataset, args, device, any_task=True)
    return {"best_step": best["step"]} | few_shot_report(args, encoder, tasks, runs, dtype, device)


def few_shot_report(args, encoder: Conv4, tasks: EpisodeSampler, runs: LakeRuns | None, dtype, device) -> dict:
    """The few-shot figure on the common test tasks, and on Lake's, and how it was made."""
    accuracies = few_shot(args, encoder, tasks, args.num_test_tasks, dtype)
    accuracy, ci95 = experiment.mean_and_ci95(accuracies)
    lake = experiment.figures_of("_lake_runs", few_shot(args, encoder, runs, runs.B, dtype)) if runs else {}
    return lake | {
        "test_accuracy": accuracy,
        "ci95": ci95,
        "num_test_tasks": args.num_test_tasks,
        "adapt": args.adapt,
        "batch_norm": "running",
        "dtype": str(dtype).removeprefix("torch."),
        "device": experiment.device_name(device),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
    }


def report(
    args, model, first: LabelledDrawings, second: LabelledDrawings, tasks: EpisodeSampler, runs, dtype, device
) -> dict:
    """Held-out accuracy of both phases and the few-shot figure on the common test tasks."""
    pretrained, pretrained_ci95 = experiment.mean_and_ci95(held_out_accuracy(model["pretrained"], first, dtype))
    finetuned, finetuned_ci95 = experiment.mean_and_ci95(held_out_accuracy(model["finetuned"], second, dtype))
    return {
        "pretrained_accuracy": pretrained,
        "pretrained_ci95": pretrained_ci95,
        "pretrained_classes": model["pretrained"].head.out_features,
        "finetuned_accuracy": finetuned,
        "finetuned_ci95": finetuned_ci95,
        "finetuned_classes": model["finetuned"].head.out_features,
        "held_out": args.held_out,
    } | few_shot_report(args, model["pretrained"].encoder, tasks, runs, dtype, device)


if __name__ == "__main__":
    experiment.run_script(main)
