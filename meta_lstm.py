"""The LSTM meta-learner: a learned update rule whose cell state is the parameters of another network.

Ravi and Larochelle 2017, "Optimization as a model for few-shot learning". A learner (a small
convolutional network) is trained on the support set of a task by a meta-learner: an LSTM that reads
every parameter's gradient and the loss, and decides how much of the parameter to forget and how far to
go down the gradient. The rule and the parameters to start from are learned so that the learner does
well on the queries. All parameters of all tasks of a meta-batch go through the cell together.

    python meta_lstm.py                                    Omniglot, 5-way 1-shot, half an hour on a CPU core
    python meta_lstm.py --preset 5way5shot                 the paper's hyper-parameters, one episode a step
    python meta_lstm.py --smoke                            a complete run in seconds
    python meta_lstm.py --preset 5way1shot --dataset folder --data_folder miniImagenet --image_size 84
    python meta_lstm.py --test --checkpoint RUN_DIR --num_classes 10 --reset_theta0    the rule alone

Measured: 5-way 1-shot 96.2 ± 0.4 % (three seeds, over 600 tasks), 4.7 minutes on an NVIDIA H200 that others shared.
Everything else: docs/meta_lstm.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import Run, UserError, number, whole
from fewshot.experiment.replay import recorded
from fewshot.learners.gates import Watch, log_gates
from fewshot.learners.lstm_rule import HIDDEN, CoordinateLSTM, Memory, pad, small
from fewshot.learners.side_by_side import Learner, ask, in_parts, task_losses
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler, fixed_tasks
from fewshot.tasks.splits import Dataset

import argparse
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from load_data import log_episode

# ---------------------------------------------------------------------------------- the method


class State(NamedTuple):
    """What the meta-learner remembers between updates."""

    memory: Memory  # of the LSTM that reads the gradients
    forget: torch.Tensor  # [B, P], the last gates
    input: torch.Tensor


class MetaLSTM(CoordinateLSTM):
    """The meta-learner: an LSTM shared over coordinates, then a cell whose state is the learner's parameters."""

    def __init__(self, theta0: torch.Tensor, trained_share: float = 1.0):
        super().__init__(trained_share)
        self.gate_weight = small(2, HIDDEN + 2)  # rows: forget, input; columns: h, parameter, previous gate
        # Forget little and take small steps: at first the rule is close to gradient descent.
        self.gate_bias = nn.Parameter(torch.tensor([4.0, -5.0]) + torch.rand(2))
        self.theta0 = nn.Parameter(theta0)

    def start(self, B: int, dtype: torch.dtype, tiles: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, State]:
        """Initial parameters [B, P], padded to whole tiles, and the empty memory; tiles: as drawn by draw_tiles."""
        theta = pad(self.theta0).expand(B, -1)
        tiles = self.draw_tiles(len(self.theta0), B) if tiles is None else tiles
        gate = torch.zeros_like(theta)
        return theta, State(self.empty_memory(theta, dtype, tiles), gate, gate)

    def forward(self, theta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor, state: State):
        """One update of parameters [B, P] by their gradient [B, P] and the losses [B]; returns (theta, state).

        Equation 2 with the parameters as the cell's state and minus the gradient as its candidate; the gates are those
        of section 3.2, where h is the LSTM's output for (gradient, loss).
        """
        of_h, memory = self.read(grad, loss, state.memory, weight=self.gate_weight)  # W h of both gates, [B, 2, P]
        (W_F, W_I), (b_F, b_I) = self.gate_weight, self.gate_bias
        forget = torch.sigmoid(of_h[:, 0] + W_F[-2] * theta + W_F[-1] * state.forget + b_F)
        input = torch.sigmoid(of_h[:, 1] + W_I[-2] * theta + W_I[-1] * state.input + b_I)
        return forget * theta - input * grad, State(memory, forget, input)


class GradientDescent:
    """The same update with the gates forced (equation 1): nothing is forgotten, every step is `rate` long."""

    def __init__(self, theta0: torch.Tensor, rate: float):
        self.theta0, self.rate = theta0, rate

    def start(self, B: int, dtype: torch.dtype):
        return self.theta0.expand(B, -1), None

    def __call__(self, theta, grad, loss, state):
        return theta - self.rate * grad, None


class Inner(NamedTuple):
    """How a learner is trained on its support set."""

    epochs: int
    batch: int  # images of an update
    momentum: float  # weight of the newest batch-norm statistics


def train_learner(
    rule, learner: Learner, support, labels, inner: Inner, second_order=False, dtype=torch.float32, watch=None, start=()
):
    """Train B learners on their support sets [B, N*K, C, H, W] (algorithm 1, lines 5 to 12).

    Returns (theta [B, P], batch-norm statistics). The learner's gradients and losses are constants to the meta-learner
    unless `second_order`. `watch` is called with the losses [B] and the state after each update. start: what
    rule.start gives; empty: it is asked here.
    """
    B, n = labels.shape
    theta, state = start or rule.start(B, dtype)
    statistics = learner.fresh_statistics(theta)
    # Image 1 of every class, then image 2 of every class, ...: a batch holds all classes in equal parts.
    order = torch.arange(n, device=labels.device).view(learner.num_classes, -1).t().flatten()
    batches = [batch for _ in range(inner.epochs) for batch in order.split(inner.batch)]
    for batch in batches:
        keep_graph = second_order and torch.is_grad_enabled()
        with torch.enable_grad():
            point = theta if keep_graph else theta.detach().requires_grad_()
            losses = task_losses(learner(point, support[:, batch], statistics, inner.momentum, dtype), labels[:, batch])
            (grad,) = torch.autograd.grad(losses.sum(), point, create_graph=keep_graph)
        losses = losses if keep_graph else losses.detach()
        theta, state = rule(theta, grad, losses, state)
        if watch is not None:
            watch(losses, state)
    return theta, statistics


def query_losses(
    rule, learner: Learner, tasks, inner: Inner, second_order=False, dtype=torch.float32, query_norm="batch", start=()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss [B] and accuracy [B] of each task's queries after the training on its support set (lines 13 and 14).

    query_norm: the queries are normalised by themselves ("batch", the paper) or by their support set ("support"), as
    in a test, but with the gradient of its statistics: where they count as constants training gets worse.
    """
    support, labels, query, query_labels = tasks
    options = {"second_order": second_order, "dtype": dtype, "start": start}
    theta, _ = train_learner(rule, learner, support, labels, inner=inner, **options)
    if query_norm == "support":
        n = support.shape[1]
        logits = learner(theta, torch.cat([support, query], dim=1), dtype=dtype, num_support=n)[:, n:]
    else:
        logits = ask(learner, theta, query, statistics=None, dtype=dtype)
    return task_losses(logits, query_labels), (logits.argmax(dim=-1) == query_labels).float().mean(dim=1)


@torch.no_grad()
def evaluate(rule, learner: Learner, sampler: EpisodeSampler, num_tasks: int, inner: Inner, dtype, watch=None):
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], and the mean loss.

    The queries are normalised by the running statistics of their task's support set (non-transductive).
    """
    correct, losses = [], []
    bar = tqdm(total=num_tasks, desc="evaluation", unit="task", leave=False, disable=None)
    for tasks in sampler.first(num_tasks):
        for support, support_labels, query, labels in in_parts(tasks, EVALUATED_AT_ONCE):
            theta, statistics = train_learner(
                rule, learner, support, support_labels, inner=inner, dtype=dtype, watch=watch
            )
            logits = ask(learner, theta, query, statistics=statistics, dtype=dtype)
            losses.append(task_losses(logits, labels).cpu())
            correct.append((logits.argmax(dim=-1) == labels).float().mean(dim=1).cpu())
            bar.update(len(labels))
    bar.close()
    return torch.cat(correct), torch.cat(losses).mean().item()


def fixed_pool(dataset: Dataset, images: int, seed: int) -> Dataset:
    """The dataset with only `images` images of each class, drawn once: how other implementations load data."""
    if images > dataset.counts.min():
        name = dataset.names[int(dataset.counts.argmin())]
        raise UserError(f"--fixed_pool {images} is more than the {dataset.counts.min()} images of {name}")
    rng = np.random.default_rng(seed)
    rows = [s + rng.permutation(c)[:images] for s, c in zip(dataset.starts, dataset.counts, strict=True)]
    return dataset._replace(images=dataset.images[np.concatenate(rows)], counts=np.full(len(rows), images))


# ------------------------------------------------------------------------------------ the script

SGD_RATES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)  # tried on validation tasks for the comparison
EVALUATED_AT_ONCE = 5  # tasks
PAPER = {  # what all presets share: one episode a step, no tricks of ours
    "meta_batch_size": 1, "train_query": 15, "num_query": 15, "learning_rate": 1e-3, "rule_rate": 1e-3,
    "schedule": "constant", "clip": 0.25, "rotations": False, "jitter": 0.0, "trained_share": 1.0,
    "query_norm": "batch", "eval_freq": 1000,
}  # fmt: skip
PRESETS = {  # the report's table of hyper-parameters
    "5way1shot": (5, 1, {"inner_epochs": 12, "inner_batch": 5, "bn_momentum": 0.9, "train_steps": 75000}),
    "5way5shot": (5, 5, {"inner_epochs": 8, "inner_batch": 25, "bn_momentum": 0.95, "train_steps": 50000}),
    "10way10shot": (10, 10, {"inner_epochs": 8, "inner_batch": 25, "bn_momentum": 0.95, "train_steps": 50000}),
    "10way20shot": (10, 20, {"inner_epochs": 8, "inner_batch": 25, "bn_momentum": 0.95, "train_steps": 50000}),
}


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    defaults = {"meta_batch_size": 8, "train_steps": 6000, "eval_freq": 500, "num_val_tasks": 200}
    parser, groups = experiment.make_parser(__doc__, rotations=True, **defaults)
    parser.prog = "meta_lstm.py"
    add = groups["data"].add_argument
    add("--preset", choices=list(PRESETS), help="the report's hyper-parameters; flags typed beside it count more")
    add("--fixed_pool", type=whole(0), default=0, metavar="M", help="training classes offer only M images; 0: all")
    add("--train_query", type=whole(1), default=5, help="query images of each class in training")
    add("--jitter", type=number(0, 1), default=0.0, help="random turn (radians), size and slant of training images")
    add = groups["model"].add_argument
    add("--inner_epochs", type=whole(1), default=5, help="passes over the support set")
    add("--inner_batch", type=whole(1), default=25, help="support images of one update")
    add("--bn_momentum", type=number(0, 1, above=True), default=0.95, help="weight of the newest batch statistics")
    whose = "whose statistics normalise training queries: their own (the papers), their support set's, as in a test, "
    whose += "or their own in the first half of training and then the support set's"
    add("--query_norm", choices=["batch", "support", "both"], default="both", help=whose)
    add("--second_order", action="store_true", help="gradients through the learner's gradients as well")
    add("--reset_theta0", action="store_true", help="with --test: fresh initial parameters, the learned rule")
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=3e-3, help="of Adam, for the initial parameters")
    add("--rule_rate", type=number(above=True), default=1e-2, help="of Adam, for the update rule")
    add("--schedule", choices=["constant", "cosine"], default="cosine", help="of both rates")
    add("--clip", type=number(), default=0.25, help="largest norm of the meta-gradient; 0: no limit")
    add("--trained_share", type=number(0, 1, above=True), default=0.1, help="of coordinates that train layer 1")
    add("--tasks_at_once", type=whole(1), default=4, help="tasks that go through the cell together; bounds memory")
    preset = PRESETS.get(chosen_preset(argv))
    if preset:
        parser.set_defaults(**PAPER, num_classes=preset[0], num_shot=preset[1], **preset[2])
    smoke = {"train_steps": 4, "eval_freq": 2, "num_test_tasks": 8, "num_val_tasks": 8, "meta_batch_size": 2}
    smoke |= {"inner_epochs": 2, "num_query": 2, "train_query": 2, "tasks_at_once": 2}
    args = experiment.parse(parser, argv, smoke, longer=why_no_longer)
    if args.second_order and args.trained_share < 1:
        raise UserError("--second_order needs --trained_share 1; it takes the gradient through every coordinate")
    if args.reset_theta0 and not args.test:
        raise UserError("--reset_theta0 needs --test --checkpoint RUN_DIR, the run whose rule is tested")
    if 0 < args.fixed_pool < args.num_shot + args.train_query:
        need = f"{args.num_shot} + {args.train_query}"
        raise UserError(f"--fixed_pool {args.fixed_pool} is less than --num_shot plus --train_query ({need})")
    return args


def why_no_longer(flags: dict) -> str | None:
    """Why a run with these flags cannot be resumed with more steps; None when it can."""
    if flags["schedule"] == "cosine":
        return "its learning rates fall until then (--schedule cosine)"
    return "--query_norm both changes at half of it" if flags["query_norm"] == "both" else None


def chosen_preset(argv) -> str | None:
    """The value of --preset, read before the other flags, whose defaults it changes."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", nargs="?")
    return early.parse_known_args(argv)[0].preset


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device)
    inner = Inner(args.inner_epochs, args.inner_batch, args.bn_momentum)
    dataset = load_for(args)
    learner = Learner(dataset.images.shape[1], args.image_size, args.num_classes)
    rule = MetaLSTM(learner.initial(), args.trained_share).to(device)
    test = fixed_tasks(dataset, "test", args, device=device)
    val = fixed_tasks(dataset, "val", args, device=device) if len(dataset.splits["val"]) else None  # mnist is all test
    measure = partial(evaluate, learner=learner, inner=inner, dtype=dtype)
    updates = inner.epochs * -(-args.num_classes * args.num_shot // inner.batch)  # of a learner in a task

    def report() -> dict:
        if val is None:  # as it was chosen on the run's own validation classes
            saved = experiment.read_json(Path(args.checkpoint) / "metrics.json", "checkpoint", sgd_rate=int | float)
            rate = saved["sgd_rate"]
        else:
            descents = {rate: GradientDescent(rule.theta0.detach(), rate) for rate in SGD_RATES}
            on_val = lambda rate: measure(descents[rate], sampler=val, num_tasks=args.num_val_tasks)[0].mean()
            rate = max(SGD_RATES, key=on_val)
        on_test = partial(measure, sampler=test, num_tasks=args.num_test_tasks)
        found = test_report(rule, learner, rate, measure=on_test, updates=updates)
        found |= {name: getattr(args, name) for name in ("second_order", "fixed_pool", "reset_theta0")}
        return found | {"dtype": str(dtype).removeprefix("torch."), "device": experiment.device_name(device)}

    if args.test:
        metrics = {"best_step": load_rule(args.checkpoint, rule, learner, reset_theta0=args.reset_theta0)} | report()
        return experiment.report(args, "meta_lstm", dataset.name, metrics, digest=dataset.digest)

    B = args.meta_batch_size // experiment.shard()[1]  # of this process
    offered = fixed_pool(dataset, args.fixed_pool, args.random_seed) if args.fixed_pool else dataset
    options = {"rotations": args.rotations, "jitter": args.jitter, "shard": experiment.shard(), "device": device}
    options |= {"seed": args.random_seed, "flags": ("num_classes", "num_shot", "train_query")}
    N, K, Q = args.num_classes, args.num_shot, args.train_query
    train = EpisodeSampler(offered, "train", N, num_shot=K, num_query=Q, batch_size=args.meta_batch_size, **options)
    gates = [p for name, p in rule.named_parameters() if name != "theta0"]
    rates = {"params": [rule.theta0], "lr": args.learning_rate}, {"params": gates, "lr": args.rule_rate}
    optimizer = torch.optim.Adam(rates)
    falling = lambda step: 0.5 + 0.5 * math.cos(math.pi * step / args.train_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling if args.schedule == "cosine" else lambda step: 1.0)
    run = Run(args, "meta_lstm", dataset.name, dataset.digest)
    run.track(model=rule, optimizer=optimizer, schedule=schedule, sampler=train)
    sizes = [len(part) for part in torch.arange(B).split(args.tasks_at_once)]

    def forward_backward(query_norm: str, *tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        loss, accuracy, options = 0.0, 0.0, {"second_order": args.second_order, "dtype": dtype}
        for k, tasks in enumerate(in_parts(train.sample(), args.tasks_at_once)):  # gradients add up over the parts
            start = rule.start(sizes[k], dtype, tiles=tiles[k :: len(sizes)])
            losses, right = query_losses(rule, learner, tasks, inner, query_norm=query_norm, start=start, **options)
            part = losses.sum() / B
            part.backward()
            loss, accuracy = loss + part.detach(), accuracy + right.sum() / B
        return loss, accuracy

    # One CUDA graph each on a GPU; on a CPU `recorded` does nothing.
    of_norm = {
        norm: recorded(rule, device, train.generator)(partial(forward_backward, norm)) for norm in ("batch", "support")
    }
    for step in run.steps():
        query_norm = args.query_norm
        if query_norm == "both":
            query_norm = "batch" if step <= args.train_steps // 2 else "support"
        tiles = [rule.draw_tiles(len(rule.theta0), size) for size in sizes]
        loss, accuracy = of_norm[query_norm](*(part for parts in zip(*tiles, strict=True) for part in parts))
        experiment.average_gradients(rule)
        norm = nn.utils.clip_grad_norm_(rule.parameters(), args.clip or math.inf)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                watch = Watch(learner, updates)
                val_accuracy, val_loss = measure(rule, sampler=val, num_tasks=args.num_val_tasks, watch=watch)
                # On the test classes is for plots; nothing is decided by it.
                test_accuracy, test_loss = measure(rule, sampler=test, num_tasks=args.num_val_tasks)
            log_gates(run, watch.means())
            scalars = {"Loss/val": val_loss, "Accuracy/val": val_accuracy.mean().item()}
            scalars |= {"Loss/test": test_loss, "Accuracy/test": test_accuracy.mean().item()}
            scalars |= {"Accuracy/train": float(accuracy), "Gradient/meta_norm": float(norm)}
            run.evaluated(scalars["Accuracy/val"], scalars)
    run.load_best(rule)
    log_episode(run, test, partial(guess, rule, learner, inner, dtype))
    return run.finish(report())


def load_rule(folder: str, rule: MetaLSTM, learner: Learner, reset_theta0: bool) -> int:
    """Load the run in `folder` into `rule`, with reset_theta0 all but theta0; returns its step."""
    path = Path(folder) / "best.pt"
    best = experiment.load_checkpoint(path)
    state = best["model"]
    if "theta0" not in state:
        raise UserError(f"{path} is not a best.pt of meta_lstm.py; use another run")
    if reset_theta0:
        state["theta0"] = rule.theta0.detach().cpu()
    elif len(state["theta0"]) != len(rule.theta0):
        has, side = len(state["theta0"]), learner.image_size
        raise UserError(
            f"{path} starts from {has} learned parameters, but a learner for {learner.num_classes} classes of "
            f"{side}x{side} images has {len(rule.theta0)}; use the run's own --num_classes and --image_size, "
            "or --reset_theta0 to keep only the learned update rule"
        )
    experiment.load_state(rule, state, path)
    return best["step"]


def test_report(rule: MetaLSTM, learner: Learner, rate: float, measure, updates: int) -> dict:
    """Accuracy on test tasks: of the learned rule, before adaptation, and of gradient descent from the same theta0.

    Gradient descent takes as many steps, at the given rate; measure: `evaluate` on these tasks.
    """
    theta0, watch, sgd_watch = rule.theta0.detach(), Watch(learner, updates), Watch(learner, updates)
    accuracies = measure(rule, watch=watch)[0]
    # No update, but the batch-norm statistics of the support set.
    still = measure(GradientDescent(theta0, 0.0), inner=Inner(epochs=1, batch=10**6, momentum=1.0))[0]
    sgd = measure(GradientDescent(theta0, rate), watch=sgd_watch)[0]
    named = {"": accuracies, "_before": still, "_sgd": sgd}
    figures = {key: value for name in named for key, value in experiment.figures_of(name, named[name]).items()}
    return figures | {
        "num_test_tasks": len(accuracies),
        "batch_norm": "support",
        "sgd_rate": rate,
        "updates": updates,
        "rule": watch.means(),
        "sgd_support_loss": sgd_watch.means()["support_loss"],
        "parameters": len(theta0),
        "parameters_of_rule": sum(p.numel() for p in rule.parameters()) - len(theta0),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
    }


def guess(rule, learner: Learner, inner: Inner, dtype, support, support_labels, query) -> torch.Tensor:
    """The classes [N*Q] of the queries of one task after adaptation."""
    theta, statistics = train_learner(rule, learner, support, support_labels, inner=inner, dtype=dtype)
    return ask(learner, theta, query, statistics=statistics, dtype=dtype)[0].argmax(dim=-1)


if __name__ == "__main__":
    experiment.run_script(main)
