"""MANN: a network with memory reads a small labelled set and then labels new images.

Santoro et al. 2016, "Meta-learning with memory-augmented neural networks", in the course's form: the
sequence of support images, each with its label, is followed by the queries, whose labels are zeros.
An LSTM has to store which picture bore which label; labels are drawn anew for every task, so the
weights can only learn how to learn. The loss is the cross entropy of the N query predictions alone.

    python hw1.py --num_shot 1 --num_classes 2            the default
    python hw1.py --memory attention --num_classes 5      attention in place of the LSTM (memory.py)
    python hw1.py --memory external                       an external memory, sequences of 50 images
    python hw1.py --num_shot 1 --num_classes 2 --smoke    a complete run in seconds
    python hw1.py --num_shot 1 --num_classes 2 --head recurrent --logit_scale 1 --forget_bias 0 --no-rotations \\
        --schedule constant --learning_rate 1e-3 --clip 0 --train_steps 25000    the course's recipe

Measured: 1-shot 2-way 96.2 ± 0.6 % (three seeds, 12,000 steps with --jitter 0.1), 7.5 minutes on one Intel Xeon core.
Everything else: docs/hw1.md.
"""

from __future__ import annotations

import experiment
from experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole

import argparse
import contextlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import memory
from backbone import Conv4, Muon
from load_data import EpisodeSampler, LakeRuns, deal_tasks, lake_runs, load_for, log_episode
from memory import CausalAttention, ExternalMemory, accuracy_by_sight, one_step_late
from replay import Gradient

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
RECIPES = {  # what --memory changes of the defaults
    "lstm": {},
    "attention": {
        "encoder": "conv4", "encoder_rate": 0.1, "learning_rate": 1e-3, "shared_classes": 60, "meta_batch_size": 256,
        "jitter": 0.1, "shift": 0.1, "train_steps": 4000, "eval_freq": 500,
    },
    "external": {
        "protocol": "sequence", "num_shot": 9, "hidden_dim": 200, "learning_rate": 3e-3, "jitter": 0.1, "shift": 0.1,
        "train_steps": 4000, "eval_freq": 500, "num_val_tasks": 400,
    },
}  # fmt: skip


class MANN(nn.Module):
    """Recurrent layers over the sequence of (image, label) pairs of an episode.

    With the defaults it is the course's network: two LSTM layers, (N + 784) -> hidden_dim -> N.

    recurrent: lstm, gru or rnn; num_layers of them.
    head: "recurrent", the last recurrent layer has N units, its state is the logits; or "linear", it
        has hidden_dim units and a linear layer reads the logits off.
    logit_scale: a recurrent state lies in (-1, 1), too narrow for a confident softmax; the
        recurrent head's logits are multiplied by this.
    forget_bias: added to the LSTM's initial forget-gate bias; at 1 the memory of the support set
        survives to the queries from the first step on (Jozefowicz et al. 2015).
    encoder: "none" feeds the pixels, "strided" 64 features of a strided Conv4 trained along (28x28 images), "conv4"
        those of the Conv4 of protonet.py.
    memory: "lstm" is all of the above; "attention" puts num_layers of causal attention with `heads` heads in the place
        of the recurrent layers, "external" an LSTM of hidden_dim units with a table (memory.py).
    """

    def __init__(
        self,
        num_classes: int,
        samples_per_class: int,
        hidden_dim: int,
        recurrent: str = "lstm",
        num_layers: int = 2,
        head: str = "recurrent",
        logit_scale: float = 1.0,
        forget_bias: float = 0.0,
        encoder: str = "none",
        dim_input: int = 784,
        memory: str = "lstm",
        heads: int = 4,
    ):
        super().__init__()
        self.num_classes, self.samples_per_class = num_classes, samples_per_class
        self.encoder = None if encoder == "none" else Conv4(dim_input // 784, strided=encoder == "strided")
        features = self.encoder.out_features if self.encoder else dim_input
        # Averaged over space, the features of all images are alike at first; this brings out the difference.
        self.standardise = nn.BatchNorm1d(features, affine=False) if encoder == "strided" else nn.Identity()
        self.attention = CausalAttention(features, num_layers, heads) if memory == "attention" else None
        self.layers, self.readout, self.logit_scale = nn.ModuleList(), None, 1.0
        if memory == "external":
            self.layers.append(ExternalMemory(num_classes + features, hidden_dim, heads=heads))
            self.readout = nn.Linear(self.layers[0].units, num_classes)
        if memory != "lstm":
            return
        last = num_classes if head == "recurrent" else hidden_dim
        sizes = [num_classes + features] + [hidden_dim] * (num_layers - 1) + [last]
        cell = CELLS[recurrent]
        self.layers = nn.ModuleList(
            cell(size, next_size, batch_first=True) for size, next_size in zip(sizes, sizes[1:], strict=False)
        )
        self.readout = nn.Linear(hidden_dim, num_classes) if head == "linear" else None
        for layer, units in zip(self.layers, sizes[1:], strict=True):
            if recurrent == "lstm":
                with torch.no_grad():
                    layer.bias_ih_l0[units : 2 * units] += forget_bias  # gates are ordered i, f, g, o
        self.logit_scale = logit_scale if head == "recurrent" else 1.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[..., 784] pixels to [..., D] features."""
        if self.encoder is None:
            return images
        flat = images.reshape(-1, self.encoder.weight0.shape[1], 28, 28)
        flat = flat.contiguous(memory_format=torch.channels_last)
        norm = "batch" if self.training else "running"
        return self.standardise(self.encoder(flat, norm=norm, momentum=0.1)).view(*images.shape[:-1], -1)

    def read(self, sequence: torch.Tensor, states: list | None = None) -> tuple[torch.Tensor, list]:
        """Run the recurrent layers over [B, T, D + N]; returns logits [B, T, N] and the final states."""
        states, ends = states or [None] * len(self.layers), []
        for layer, state in zip(self.layers, states, strict=True):
            sequence, end = layer(sequence, state)
            ends.append(end)
        logits = self.readout(sequence) if self.readout else sequence * self.logit_scale
        return logits, ends

    def forward(self, input_images: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """Predictions (logits) for every image of the episodes.

        input_images [B, K+1, N, 784], input_labels one-hot [B, K+1, N, N] -> [B, K+1, N, N]. The
        labels of the last row, the queries, are replaced by zeros; the inputs are not modified.
        """
        return self.classify(self.encode(input_images), input_labels)

    def classify(self, features: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """`forward` for encoded images [B, K+1, N, D]."""
        if self.attention:
            return self.attention(features, input_labels)
        B, rows, N, _ = features.shape
        labels = torch.cat([input_labels[:, :-1], torch.zeros_like(input_labels[:, -1:])], dim=1)
        pairs = torch.cat([features, labels], dim=-1)  # [B, K+1, N, D + N]
        logits, _ = self.read(pairs.flatten(1, 2))  # [B, (K+1) * N, N]
        return logits.view(B, rows, N, N)

    def forward_alone(self, input_images: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """Query predictions [B, N, N] when each query is the only one after the support set.

        Every query continues from the memory that the support set left, so that no prediction can
        rule out the classes of the other queries.
        """
        return self.classify_alone(self.encode(input_images), input_labels)

    def classify_alone(self, features: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """`forward_alone` for encoded images [B, K+1, N, D]."""
        if self.attention:  # its queries do not see each other
            return self.attention(features, input_labels)[:, -1]
        B, _, N, _ = features.shape
        support = torch.cat([features[:, :-1], input_labels[:, :-1]], dim=-1).flatten(1, 2)
        queries = torch.cat([features[:, -1], torch.zeros_like(input_labels[:, -1])], dim=-1)  # [B, N, D + N]
        _, ends = self.read(support)
        copies = []  # of the state [1, B, hidden] for the N queries of each task
        for end in ends:
            state = end if isinstance(end, tuple) else (end,)
            state = tuple(s.repeat_interleave(N, dim=1) for s in state)
            copies.append(state if isinstance(end, tuple) else state[0])
        logits, _ = self.read(queries.reshape(B * N, 1, -1), copies)
        return logits.view(B, N, N)

    def loss_function(self, preds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the N queries of each task; preds and labels are [B, K+1, N, N]."""
        return F.cross_entropy(preds[:, -1].flatten(0, 1), labels[:, -1].flatten(0, 1).argmax(dim=-1))


def learn_a_little(recurrent: str, device: torch.device) -> None:
    """One forward and backward pass of a small recurrent layer: not every processor has these kernels in bfloat16."""
    states, _ = CELLS[recurrent](8, 8, batch_first=True).to(device)(torch.zeros(2, 3, 8, device=device))
    states.sum().backward()


def large_task_loss(model: MANN, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one task of P classes, features [1, K+1, P, D]; it tells more classes apart than a dealt one.

    With one shot, support and queries also change places: the same features give twice as many questions.
    """
    loss = model.loss_function(model.classify(features, labels).float(), labels)
    if features.shape[1] > 2:
        return loss
    order = labels[:, 1].argmax(dim=-1).argsort(dim=1)  # queries in class order, to serve as support
    query = features[:, 1].gather(1, order[..., None].expand_as(features[:, 1]))
    swapped, in_order = torch.stack([query, features[:, 0]], dim=1), labels[:, :1].expand_as(labels)
    return (loss + model.loss_function(model.classify(swapped, in_order).float(), in_order)) / 2


def features_once(model: MANN, sampler: EpisodeSampler, num_tasks: int) -> torch.Tensor | None:
    """Features [images, D] of the sampler's split, where its tasks would encode more images than it has; else None."""
    few = num_tasks * sampler.N * (sampler.K + 1) < len(sampler.images)
    if model.encoder is None or few or sampler.jitter or sampler.shift:
        return None
    return torch.cat([model.encode(part.flatten(1).float() / 255) for part in sampler.images.split(1000)])


@torch.no_grad()
def evaluate_sights(model: MANN, sampler: EpisodeSampler, num_tasks: int) -> tuple[torch.Tensor, float]:
    """Accuracy [num_tasks, K+1] at the first, second, ... sight of a class in sequences with late labels; mean loss."""
    was_training = model.training
    model.eval()
    once, right, losses = features_once(model, sampler, num_tasks), [], []
    for images, labels in sampler.first(num_tasks, sampler.sample_rows, features=once):
        features = model.encode(images) if once is None else images
        sequence, targets, sights = one_step_late(features, labels, sampler.generator)
        logits = model.read(sequence)[0]
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() * len(labels))
        right.append(accuracy_by_sight((logits.argmax(dim=-1) == targets).float(), sights, sampler.K + 1).cpu())
    model.train(was_training)
    return torch.cat(right), sum(losses) / num_tasks


@torch.no_grad()
def evaluate(model: MANN, sampler: EpisodeSampler, num_tasks: int, alone: bool = False) -> tuple[torch.Tensor, float]:
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], and the mean loss.

    alone: each query is asked alone instead of in one sequence with the others of its task.
    """
    was_training = model.training
    model.eval()
    correct, losses = [], []
    once = features_once(model, sampler, num_tasks)
    together, apart = (model, model.forward_alone) if once is None else (model.classify, model.classify_alone)
    for images, labels in sampler.first(num_tasks, sampler.sample_rows, features=once):
        preds = apart(images, labels)[:, None] if alone else together(images, labels)
        losses.append(model.loss_function(preds, labels).item() * len(labels))
        right = preds[:, -1].argmax(dim=-1) == labels[:, -1].argmax(dim=-1)  # [B, N]
        correct.append(right.float().mean(dim=1).cpu())
    model.train(was_training)
    return torch.cat(correct), sum(losses) / num_tasks


def guess(model: MANN, support: torch.Tensor, support_labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The classes [N] that the model gives the queries of one task in the layout of `EpisodeSampler.sample`."""
    N = model.num_classes
    images = torch.cat([support.view(1, N, -1, query[0, 0].numel()).transpose(1, 2), query.view(1, 1, N, -1)], dim=1)
    labels = torch.eye(N, device=query.device).expand(1, images.shape[1], N, N)  # the last row is not looked at
    model.eval()
    return model(images, labels)[0, -1].argmax(dim=-1)


@torch.no_grad()
def look(model: MANN, sampler: EpisodeSampler, in_sequence: bool):
    """A matplotlib figure of what the memory does with the sampler's first task; None for an LSTM.

    Of attention: which support images each query looks at. Of an external memory: what it reads and writes in a
    sequence, so none without.
    """
    images, labels = next(sampler.first(1, sampler.sample_rows))
    model.eval()
    if model.attention:
        looks = model.attention.look(model.encode(images), labels)[0, -sampler.N :]
        support, query = (part.reshape(-1, *sampler.images.shape[1:]) for part in (images[0, :-1], images[0, -1]))
        return memory.attention_figure(support, query, looks)
    if in_sequence and isinstance(model.layers[0], ExternalMemory):
        sequence = one_step_late(model.encode(images), labels, sampler.generator)[0]
        return memory.memory_figure(model.layers[0], sequence)
    return None


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__,
        without=("--num_query",),
        num_classes=5,
        num_query=1,
        meta_batch_size=128,
        train_steps=5000,
        eval_freq=100,
        num_val_tasks=2000,
        num_test_tasks=10_000,
        rotations=True,
    )
    parser.prog = "hw1.py"
    add = groups["model"].add_argument
    add("--memory", choices=list(RECIPES), default="lstm", help="what remembers; it has defaults of its own")
    add("--heads", type=whole(1, 64), default=4, help="of attention, or of the external memory")
    add("--hidden_dim", type=whole(1, 16384), default=128, help="units of the hidden recurrent layers or controller")
    add("--recurrent", choices=sorted(CELLS), default="lstm", help="kind of recurrent layer")
    add("--num_layers", type=whole(1, 100), default=2, help="recurrent layers, or layers of attention")
    add("--head", choices=["linear", "recurrent"], default="linear", help="what makes N logits; the course: recurrent")
    add("--logit_scale", type=number(above=True), default=10.0, help="factor on the recurrent head's states; course: 1")
    add("--forget_bias", type=number(), default=1.0, help="added to the LSTM's forget-gate bias; the course: 0")
    encoder = "reads the images first: a strided Conv4, or the one of protonet.py"
    add("--encoder", choices=["none", "strided", "conv4"], default="none", help=encoder)
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=4e-3, help="of Adam, at its peak; the course: 1e-3")
    add("--encoder_rate", type=number(), default=0.0, help="of Muon, for the encoder alone; 0: Adam trains it too")
    add("--schedule", choices=["constant", "linear"], default="linear", help="linear: falls to 0 over the second half")
    add(
        "--shared_classes",
        type=whole(0),
        default=0,
        metavar="P",
        help="deal the tasks of a step from the images of P classes, each encoded once; 0: no",
    )
    add("--clip", type=number(), default=1.0, help="largest norm of the gradient; 0: no limit, as in the course")
    add = groups["data"].add_argument
    add("--num_workers", type=whole(0), default=0, help="kept for the course's commands: episodes need no workers here")
    add("--image_caching", type=str, default="True", help="kept for the course's commands: images are always in memory")
    add(
        "--protocol",
        choices=["support", "sequence"],
        default="support",
        help="sequence: the K+1 images of each class in one shuffled sequence, each label one step late",
    )
    add("--jitter", type=number(0, 1), default=0.0, help="random turn (radians), size and slant of training images")
    add("--shift", type=number(0, 1), default=0.0, help="random shift of training images, a share of half their size")
    add("--fixed_labels", action="store_true", help="training characters keep their labels: the memorisation lesson")
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--memory", nargs="?")
    chosen.add_argument("--checkpoint", nargs="?")
    early = chosen.parse_known_args(argv)[0]
    kind = early.memory or memory_of(early.checkpoint)
    parser.set_defaults(**RECIPES.get(kind, {}))
    smoke = {
        "train_steps": 40,
        "eval_freq": 20,
        "num_val_tasks": 200,
        "num_test_tasks": 600,
        "hidden_dim": 32,
        "meta_batch_size": 32,
    }
    less = {"meta_batch_size": 4, "train_steps": 10, "eval_freq": 5, "num_val_tasks": 40, "num_test_tasks": 120}
    smoke |= {"attention": less | {"shared_classes": 20}, "external": less | {"num_shot": 3}}.get(kind, {})
    shapes = tuple("memory heads hidden_dim recurrent num_layers head logit_scale encoder image_size".split())
    shapes += () if kind == "attention" else ("num_classes",)  # attention may be asked for other N than it learned
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
    falls = "its learning rate falls to zero there (--schedule linear)"
    longer = lambda flags: falls if flags["schedule"] == "linear" else None
    args = experiment.parse(parser, argv, smoke, fixed=shapes, longer=longer)
    if not args.test and 0 < args.shared_classes < args.num_classes:
        raise UserError(f"--shared_classes {args.shared_classes} is less than --num_classes {args.num_classes}")
    if args.encoder != "none" and args.image_size != 28:
        raise UserError(f"--encoder {args.encoder} reads 28x28 images; drop --image_size {args.image_size}")
    if args.encoder_rate and args.encoder == "none":
        raise UserError(f"--encoder_rate {args.encoder_rate:g} needs an encoder; add --encoder conv4")
    if args.protocol == "sequence" and (args.memory == "attention" or args.shared_classes):
        raise UserError("--protocol sequence has no support set: use --memory external or lstm, no --shared_classes")
    if args.memory == "attention" and (64 if args.encoder != "none" else args.image_size**2) % args.heads:
        raise UserError(f"--heads {args.heads} does not divide the features of an image; use 1, 2 or 4")
    return args


def memory_of(run: str | None) -> str:
    """--memory of a saved run, whose flags `experiment.parse` judges later; lstm where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((Path(run) / "flags.json").read_text())["flags"]["memory"]
    return "lstm"


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device, probe=lambda: learn_a_little(args.recurrent, device))
    if args.shared_classes and experiment.shard()[1] > 1:
        raise UserError("--shared_classes cannot be split over processes; use 0 or run without torchrun")
    dataset = load_for(args)

    def sampler(part: str, seed: int, B: int, num_classes: int = args.num_classes, **options) -> EpisodeSampler:
        flags = ("num_classes" if num_classes == args.num_classes else "shared_classes", "num_shot", None)
        return EpisodeSampler(dataset, part, num_classes, args.num_shot, 1, B, seed, device, flags=flags, **options)

    B, N, P = args.meta_batch_size, args.num_classes, args.shared_classes
    test, runs = sampler("test", TEST_SEED, 200), lake_runs(dataset, args, device)
    model = MANN(
        args.num_classes,
        args.num_shot + 1,
        args.hidden_dim,
        args.recurrent,
        args.num_layers,
        args.head,
        args.logit_scale,
        args.forget_bias,
        args.encoder,
        dataset.images[0].size,
        args.memory,
        args.heads,
    ).to(device, memory_format=torch.channels_last)
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        metrics = {"best_step": step} | test_report(args, model, test, runs, dtype, device)
        if figure := look(model, test, args.protocol == "sequence"):
            name = f"{args.memory}_{dataset.name}.png"
            experiment.write_beside(args.checkpoint, name, lambda out: figure.savefig(out, format="png"))
        return experiment.report(args, "hw1", dataset.name, metrics, digest=dataset.digest)

    train = sampler(
        "train",
        args.random_seed,
        1 if P else B,
        num_classes=P or N,
        rotations=args.rotations,
        fixed_labels=args.fixed_labels,
        jitter=args.jitter,
        shift=args.shift,
        shard=experiment.shard(),
    )
    val = sampler("val", VAL_SEED, 200)
    experiment.init_from(args, model)
    encoder = dict(model.encoder.named_parameters(prefix="encoder")) if args.encoder_rate else {}
    others = [p for name, p in model.named_parameters() if name not in encoder]
    optimizers = {"optimizer": torch.optim.Adam(others, args.learning_rate, fused=True)}
    if encoder:
        optimizers["encoder_optimizer"] = Muon(encoder.values(), args.encoder_rate)
    share = lambda done: min(1.0, 2 * (1 - done / args.train_steps)) if args.schedule == "linear" else 1.0
    schedules = {
        name.replace("optimizer", "schedule"): torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        for name, optimizer in optimizers.items()
    }
    in_sequence = args.protocol == "sequence"
    judge = evaluate_sights if in_sequence else evaluate
    run = Run(args, "hw1", dataset.name, dataset.digest)
    run.track(model=model, **optimizers, **schedules, sampler=train)

    def compute() -> torch.Tensor:
        images, labels = train.sample_rows()  # [B, K+1, N, 784], [B, K+1, N, N]; or one task of P classes
        with experiment.autocast(device, dtype):
            features = model.encode(images)
            if in_sequence:
                sequence, targets, _ = one_step_late(features, labels, train.generator)
                loss = F.cross_entropy(model.read(sequence)[0].float().flatten(0, 1), targets.flatten())
            else:
                large = large_task_loss(model, features, labels) if P and model.attention else 0
                if P:
                    features, labels = deal_tasks(features, labels, B, N, train.generator)
                loss = large + model.loss_function(model.classify(features, labels).float(), labels)
        loss.backward()
        return loss.detach()

    gradient = Gradient(compute, model, device, [train.generator])
    for _ in run.steps():
        loss = gradient()
        experiment.average_gradients(model)
        if args.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer, schedule in zip(optimizers.values(), schedules.values(), strict=True):
            optimizer.step()
            schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                val_accuracy, val_loss = judge(model, val, args.num_val_tasks)
                # The homework plots the test curve; nothing is decided by it.
                test_accuracy, test_loss = judge(model, test, args.num_val_tasks)
            val_accuracy, test_accuracy = val_accuracy.mean().item(), test_accuracy.mean().item()
            # The memorisation lesson is about where training ends, so there the last model counts.
            run.evaluated(
                None if args.fixed_labels else val_accuracy,
                {
                    "Loss/val": val_loss,
                    "Accuracy/val": val_accuracy,
                    "Loss/test": test_loss,
                    "Accuracy/test": test_accuracy,
                },
            )
    run.load_best(model)
    metrics = test_report(args, model, test, runs, dtype, device)
    if in_sequence and run.writes:
        by_sight = memory.sights_figure(torch.tensor(metrics["accuracy_by_sight"]), N)
        run.writer.add_figure("accuracy_by_sight", by_sight, run.step)
    if not in_sequence:
        log_episode(run, test, lambda *task: guess(model, *task))
    if run.writes and (figure := look(model, test, in_sequence)):
        run.writer.add_figure("memory" if in_sequence else "attention", figure, run.step)
    if args.fixed_labels:
        metrics["train_accuracy"] = evaluate(model, train, args.num_val_tasks)[0].mean().item()
    return run.finish(metrics)


def test_report(args, model: MANN, test: EpisodeSampler, runs: LakeRuns | None, dtype, device: torch.device) -> dict:
    """Accuracy on the fixed test tasks (and Lake's), queries together (the course's way) and alone; or by sight."""
    if args.protocol == "sequence":
        return sights_report(args, model, test, dtype, device)
    accuracies = evaluate(model, test, args.num_test_tasks)[0]
    accuracy, ci95 = experiment.mean_and_ci95(accuracies)
    alone, alone_ci95 = experiment.mean_and_ci95(evaluate(model, test, args.num_test_tasks, alone=True)[0])
    lake = {}
    for how in ("", "_alone") if runs else ():
        found = evaluate(model, runs, runs.B, alone=how == "_alone")[0]
        lake |= experiment.figures_of(f"_lake_runs{how}", found)
    return lake | {
        "test_accuracy": accuracy,
        "ci95": ci95,
        "num_test_tasks": args.num_test_tasks,
        "test_accuracy_alone": alone,
        "ci95_alone": alone_ci95,
        "dtype": str(dtype).removeprefix("torch."),
        "device": experiment.device_name(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
    }


def sights_report(args, model: MANN, test: EpisodeSampler, dtype: torch.dtype, device: torch.device) -> dict:
    """Accuracy on the fixed test sequences: at the first, second, ... sight of a class, and of all."""
    accuracies = evaluate_sights(model, test, args.num_test_tasks)[0]
    by_sight = [experiment.mean_and_ci95(column) for column in accuracies.unbind(dim=1)]
    accuracy, ci95 = experiment.mean_and_ci95(accuracies.mean(dim=1))
    return {
        "test_accuracy": accuracy,
        "ci95": ci95,
        "num_test_tasks": args.num_test_tasks,
        "memory": args.memory,
        "accuracy_by_sight": [mean for mean, _ in by_sight],
        "ci95_by_sight": [ci95 for _, ci95 in by_sight],
        "dtype": str(dtype).removeprefix("torch."),
        "device": experiment.device_name(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracies": [round(a, 4) for a in accuracies.mean(dim=1).tolist()],
    }


if __name__ == "__main__":
    experiment.run_script(main)
