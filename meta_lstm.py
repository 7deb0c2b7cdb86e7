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

import experiment
from experiment import Run, UserError, number, whole

import argparse
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from backbone import batch_norm
from load_data import Dataset, EpisodeSampler, fixed_tasks, load_for, log_episode
from replay import Gradient

FILTERS, EPS = 32, 1e-3  # of the learner's convolutions and batch norms
HIDDEN = 20  # units of the meta-learner's first layer
P_SCALE = 10.0  # p of the pre-processing
TILE = 1024  # parameters whose LSTM state fits in the processor's cache
SGD_RATES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)  # tried on validation tasks for the comparison
EVALUATED_AT_ONCE = 5  # tasks
LAYERS = ("conv0", "conv1", "conv2", "conv3", "head")
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

# --------------------------------------------------------------------------------- the learner


class Learner(NamedTuple):
    """Sizes of the learner: four blocks of convolution, batch norm, ReLU and pooling, and a linear layer."""

    channels: int
    image_size: int
    num_classes: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, in the order in which the flat vector holds them."""
        shapes = {}
        for i in range(4):
            shapes[f"conv{i}.weight"] = (FILTERS, self.channels if i == 0 else FILTERS, 3, 3)
            shapes |= {f"{name}{i}": (FILTERS,) for name in ("bias", "gamma", "beta")}
        features = FILTERS * (self.image_size // 16) ** 2
        return shapes | {"head.weight": (self.num_classes, features), "head.bias": (self.num_classes,)}

    def size(self) -> int:
        return sum(map(math.prod, self.shapes().values()))

    def initial(self) -> torch.Tensor:
        """Fresh parameters [P]: weights uniform in 1 / sqrt(inputs), scales 1, offsets 0."""
        parts = []
        for name, shape in self.shapes().items():
            if "weight" in name:
                parts.append((2 * torch.rand(shape) - 1) / math.sqrt(math.prod(shape[1:])))
            else:
                parts.append(torch.ones(shape) if "gamma" in name else torch.zeros(shape))
        return torch.cat([part.flatten() for part in parts])

    def unpack(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> [B, *shape] of flat parameters [B, P or more]; what is beyond P is padding."""
        shapes = self.shapes()
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = theta[:, : sum(sizes)].split(sizes, dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def fresh_statistics(self, theta: torch.Tensor) -> list[torch.Tensor]:
        """Running mean 0 and variance 1 of the four batch norms of the B tasks of theta: each [2, B * FILTERS]."""
        zeros = theta.new_zeros(len(theta) * FILTERS)
        return [torch.stack([zeros, zeros + 1]) for _ in range(4)]

    def __call__(
        self, theta, images, statistics=None, momentum: float = 0.0, dtype=torch.float32, num_support: int = 0
    ) -> torch.Tensor:
        """Scores [B, n, N] of images [B, n, C, H, W] by the B networks with parameters theta [B, P].

        The tasks lie side by side as groups of channels, so that each operation handles all of them.
        Batch norm normalises with the images of the call; with statistics and momentum > 0 these also
        enter the running averages, with momentum 0 the running averages normalise. With num_support the first
        so many images of the call normalise all of them, and their statistics have a gradient.
        """
        p, B = self.unpack(theta), len(theta)
        x = images.transpose(0, 1).flatten(1, 2).to(dtype).contiguous(memory_format=torch.channels_last)
        for i in range(4):  # x: [n, B * channels, side, side]
            weight, bias = p[f"conv{i}.weight"].flatten(0, 1).to(dtype), p[f"bias{i}"].flatten().to(dtype)
            x = F.conv2d(x, weight, bias, padding=1, groups=B)
            averages = None if statistics is None else tuple(statistics[i])
            gamma, beta = p[f"gamma{i}"].flatten(), p[f"beta{i}"].flatten()
            if num_support:
                x = batch_norm(x, gamma, beta, "support", num_support=num_support, eps=EPS)
            else:
                norm = "batch" if statistics is None or momentum > 0 else "running"
                x = batch_norm(x, gamma, beta, norm, averages, momentum=momentum, eps=EPS)
            x = F.relu(F.max_pool2d(x, 2)).to(dtype)  # pooling first: the same values, a quarter of the work
        x = x.unflatten(1, (B, FILTERS)).transpose(0, 1).flatten(2).to(theta.dtype)
        return torch.baddbmm(p["head.bias"][:, None], x, p["head.weight"].transpose(1, 2))


def task_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each task: scores [B, n, N], labels [B, n] -> [B]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(dim=1)


# ----------------------------------------------------------------------------- the meta-learner


def preprocess(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two inputs of ordinary size for each number of any size (section 3.4 and appendix of the paper).

    (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x); p = 10.
    """
    big = x.abs() >= math.exp(-P_SCALE)
    size = x.abs().clamp(min=math.exp(-P_SCALE)).log() / P_SCALE
    return torch.where(big, size, -torch.ones_like(x)), torch.where(big, x.sign(), x * math.exp(P_SCALE))


class LSTMCell(torch.autograd.Function):
    """One step of an LSTM with the parameters of nn.LSTMCell (gates i, f, g, o), coordinates last.

    inputs [R, n, W], h and c [R, H, W] -> new h and c. Written out because it is most of what an episode
    costs: one matrix product and one sigmoid for all gates (tanh z = 2 sigmoid(2z) - 1), everything else
    in place, and no gradient for inputs that are constants.
    """

    @staticmethod
    def forward(ctx, inputs, h, c, weight_ih, weight_hh, bias):
        H = h.shape[1]
        scale = torch.ones_like(bias)
        scale[2 * H : 3 * H] = 2  # of g's argument, for the tanh
        weight = (torch.cat([weight_ih, bias[:, None], weight_hh], dim=1) * scale[:, None]).to(h.dtype)
        inputs = torch.cat([inputs.to(h.dtype), torch.ones_like(h[:, :1]), h], dim=1)  # [R, n + 1 + H, W]
        gates = torch.matmul(weight, inputs).sigmoid_()  # [R, 4H, W]
        i, f, s, o = gates.chunk(4, dim=1)
        new_c = (f * c).addcmul_(i, s, value=2).sub_(i)  # g = 2s - 1
        new_h = torch.mul(new_c, 2).sigmoid_().mul_(2).sub_(1).mul_(o)
        ctx.save_for_backward(weight, inputs, gates, c, new_c, scale)
        return new_h, new_c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h, grad_c):
        weight, inputs, gates, c, new_c, scale = ctx.saved_tensors
        H = c.shape[1]
        i, f, s, o = gates.chunk(4, dim=1)
        tanh_c = torch.mul(new_c, 2).sigmoid_().mul_(2).sub_(1)
        grad_c = tanh_c.square().neg_().add_(1).mul_(o).mul_(grad_h).add_(grad_c)  # through h as well
        grad = gates.square().neg_().add_(gates)  # sigmoid' of all gates; then times what each multiplies
        grad_i, grad_f, grad_s, grad_o = grad.chunk(4, dim=1)
        grad_o.mul_(tanh_c).mul_(grad_h)
        grad_f.mul_(c).mul_(grad_c)
        grad_s.mul_(i).mul_(grad_c).mul_(2)
        grad_i.mul_(tanh_c.copy_(s).mul_(2).sub_(1)).mul_(grad_c)
        n = inputs.shape[1] - H - 1
        grad_weight = torch.bmm(grad, inputs.transpose(1, 2)).sum(dim=0, dtype=scale.dtype) * scale[:, None]
        first = 0 if ctx.needs_input_grad[0] else n + 1
        grad_inputs = torch.matmul(weight[:, first:].t().contiguous(), grad)
        return (
            None if first else grad_inputs[:, :n],
            grad_inputs[:, -H:],
            grad_c.mul_(f),
            grad_weight[:, :n],
            grad_weight[:, n + 1 :],
            grad_weight[:, n],
        )


class State(NamedTuple):
    """What the meta-learner remembers between updates."""

    memory: list  # of layer 1: (its tiles, h, c); first of the tiles that are trained on, then of the others
    forget: torch.Tensor  # [B, P], the last gates
    input: torch.Tensor


class MetaLSTM(nn.Module):
    """The meta-learner: an LSTM shared over coordinates, then a cell whose state is the learner's parameters.

    The vector of parameters is padded to whole tiles; a padded parameter stays 0 and has no gradient.
    trained_share < 1: layer 1 runs on all coordinates, but only a random share of the tiles, drawn for each
    meta-batch, takes part in its backward pass, weighted up so that the expected gradient is the same.
    """

    def __init__(self, theta0: torch.Tensor, trained_share: float = 1.0):
        super().__init__()
        small = lambda *shape: nn.Parameter(0.02 * torch.rand(shape) - 0.01)
        self.weight_ih, self.weight_hh = small(4 * HIDDEN, 4), small(4 * HIDDEN, HIDDEN)
        self.bias_ih, self.bias_hh = small(4 * HIDDEN), small(4 * HIDDEN)
        self.gate_weight = small(2, HIDDEN + 2)  # rows: forget, input; columns: h, parameter, previous gate
        # Forget little and take small steps: at first the rule is close to gradient descent.
        self.gate_bias = nn.Parameter(torch.tensor([4.0, -5.0]) + torch.rand(2))
        self.theta0 = nn.Parameter(theta0)
        self.trained_share = trained_share

    def draw_tiles(self, B: int) -> list[torch.Tensor]:
        """The tiles of B tasks: all of them, or in training those that layer 1 is trained on and the others."""
        tiles, device = -(-len(self.theta0) // TILE), self.theta0.device
        if self.trained_share == 1 or not torch.is_grad_enabled():
            return [torch.arange(B * tiles, device=device)]
        trained = max(1, round(self.trained_share * B * tiles))
        return [part.to(device) for part in torch.randperm(B * tiles).tensor_split([trained])]

    def start(self, B: int, dtype: torch.dtype, tiles: list[torch.Tensor]) -> tuple[torch.Tensor, State]:
        """Initial parameters [B, P] and the empty memory."""
        theta, memory = F.pad(self.theta0, (0, -len(self.theta0) % TILE)).expand(B, -1), []
        for part in tiles:
            zeros = theta.new_zeros(len(part), HIDDEN, TILE, dtype=dtype)
            memory.append((part, zeros, zeros))
        gate = torch.zeros_like(theta)
        return theta, State(memory, gate, gate)

    def layer1(self, grad: torch.Tensor, loss: torch.Tensor, memory: list) -> tuple[torch.Tensor, list]:
        """The gates' weights times h for every coordinate, [B, 2, P], and the new memory."""
        B, P = grad.shape
        rows = lambda x: x.reshape(B * P // TILE, TILE)
        inputs = [rows(x) for x in preprocess(grad)] + [rows(x[:, None].expand(B, P)) for x in preprocess(loss)]
        inputs = torch.stack(inputs, dim=1)  # [B * tiles, 4, TILE]
        weights = (self.weight_ih, self.weight_hh, self.bias_ih + self.bias_hh)
        whole_vector, total = len(memory) == 1, len(inputs)
        after, of_h = [], []
        for k, (part, h, c) in enumerate(memory):
            with torch.set_grad_enabled(k == 0 and torch.is_grad_enabled()):
                h, c = LSTMCell.apply(inputs if whole_vector else inputs[part], h, c, *weights)
            after.append((part, h, c))
            if k == 0 and not whole_vector:  # the same value, its gradient weighted up
                h = h.detach() + (h - h.detach()) * (total / len(part))
            of_h.append(torch.matmul(self.gate_weight[:, :HIDDEN].to(h.dtype), h))  # [tiles, 2, TILE]
        if whole_vector:
            (of_h,) = of_h
        else:
            of_h = torch.cat(of_h)[torch.cat([part for part, _, _ in memory]).argsort()]
        return of_h.to(grad.dtype).view(B, -1, 2, TILE).transpose(1, 2).reshape(B, 2, P), after

    def forward(self, theta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor, state: State):
        """One update of parameters [B, P] by their gradient [B, P] and the losses [B]; returns (theta, state).

        forget_t = sigmoid(W_F [h, theta_{t-1}, forget_{t-1}] + b_F), input_t likewise (section 3.2),
        theta_t = forget_t * theta_{t-1} - input_t * gradient_t (eq. 2).
        """
        of_h, memory = self.layer1(grad, loss, state.memory)
        forget, input = (
            torch.sigmoid(of_h[:, k] + w[HIDDEN] * theta + w[HIDDEN + 1] * previous + b)
            for k, w, b, previous in zip(
                (0, 1), self.gate_weight, self.gate_bias, (state.forget, state.input), strict=True
            )
        )
        return forget * theta - input * grad, State(memory, forget, input)


class GradientDescent:
    """The same update with the gates forced: nothing is forgotten, every step is `rate` long."""

    def __init__(self, theta0: torch.Tensor, rate: float):
        self.theta0, self.rate = theta0, rate

    def draw_tiles(self, B: int) -> list[torch.Tensor]:
        return []

    def start(self, B: int, dtype: torch.dtype, tiles: list[torch.Tensor]):
        return self.theta0.expand(B, -1), None

    def __call__(self, theta, grad, loss, state):
        return theta - self.rate * grad, None


class Inner(NamedTuple):
    """How a learner is trained on its support set."""

    epochs: int
    batch: int  # images of an update
    momentum: float  # weight of the newest batch-norm statistics


def adapt(
    rule,
    learner: Learner,
    support,
    labels,
    inner: Inner,
    second_order=False,
    dtype=torch.float32,
    watch=None,
    tiles: list[torch.Tensor] | None = None,
):
    """Train B learners on their support sets [B, N*K, C, H, W]; returns (theta [B, P], batch-norm statistics).

    The learner's gradients and losses are constants to the meta-learner unless `second_order`.
    `watch` is called with the losses [B] and the state after each update. `tiles` as rule.draw_tiles draws them; None:
    they are drawn here.
    """
    B, n = labels.shape
    theta, state = rule.start(B, dtype, rule.draw_tiles(B) if tiles is None else tiles)
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
        if not keep_graph:
            losses = losses.detach()
        theta, state = rule(theta, grad, losses, state)
        if watch is not None:
            watch(losses, state)
    return theta, statistics


def ask(learner: Learner, theta, query, statistics, dtype) -> torch.Tensor:
    """Scores [B, n, N] of the queries; normalised by `statistics`, or by the queries themselves where None."""
    if dtype == torch.float32 and theta.device.type == "cpu" and len(theta) > 1:
        # With many images an ordinary float32 convolution for each task is faster than one with groups.
        parts = [None] * len(theta)
        if statistics is not None:
            parts = zip(*(s.split(FILTERS, dim=1) for s in statistics), strict=True)
        each = zip(theta.split(1), query.split(1), parts, strict=True)
        return torch.cat([learner(t, q, part, 0.0, dtype) for t, q, part in each])
    return learner(theta, query, statistics, 0.0, dtype)


def meta_gradient(
    rule: MetaLSTM,
    learner: Learner,
    episodes,
    inner: Inner,
    dtype=torch.float32,
    tasks_at_once: int = 4,
    query_norm: str = "batch",
    second_order: bool = False,
    tiles: list[list[torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of the mean query loss to rule's .grad; returns (loss, accuracy) of the meta-batch.

    query_norm: the queries are normalised by themselves ("batch", the paper) or by their support set ("support"), as
    in a test, but with the gradient of its statistics: where they count as constants training gets worse.
    tiles: of each `tasks_at_once` tasks, as `adapt` takes them.
    """
    B, loss, accuracy = len(episodes[0]), 0.0, 0.0
    for k, chunk in enumerate(zip(*(x.split(tasks_at_once) for x in episodes), strict=True)):
        support, labels, query, query_labels = chunk
        theta, _ = adapt(
            rule, learner, support, labels, inner, second_order, dtype, tiles=None if tiles is None else tiles[k]
        )
        if query_norm == "support":
            n = support.shape[1]
            logits = learner(theta, torch.cat([support, query], dim=1), dtype=dtype, num_support=n)[:, n:]
        else:
            logits = ask(learner, theta, query, None, dtype)
        part = task_losses(logits, query_labels).sum() / B
        part.backward()
        loss += part.detach()
        accuracy += (logits.argmax(dim=-1) == query_labels).float().mean(dim=1).sum() / B
    return loss, accuracy


@torch.no_grad()
def evaluate(rule, learner: Learner, sampler: EpisodeSampler, num_tasks: int, inner: Inner, dtype, watch=None):
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], and the mean loss.

    The queries are normalised by the running statistics of their task's support set (non-transductive).
    """
    correct, losses = [], []
    bar = tqdm(total=num_tasks, desc="evaluation", unit="task", leave=False, disable=None)
    for tasks in sampler.first(num_tasks):
        for support, support_labels, query, labels in zip(*(x.split(EVALUATED_AT_ONCE) for x in tasks), strict=True):
            theta, statistics = adapt(rule, learner, support, support_labels, inner, dtype=dtype, watch=watch)
            logits = ask(learner, theta, query, statistics, dtype)
            losses.append(task_losses(logits, labels).cpu())
            correct.append((logits.argmax(dim=-1) == labels).float().mean(dim=1).cpu())
            bar.update(len(labels))
    bar.close()
    return torch.cat(correct), torch.cat(losses).mean().item()


class Watch:
    """Means over tasks of the support loss and of the gates of each layer, at every update."""

    def __init__(self, learner: Learner, updates: int):
        shapes = learner.shapes()
        sizes = [sum(math.prod(s) for name, s in shapes.items() if layer_of(name) == layer) for layer in LAYERS]
        self.sizes, self.updates, self.rows = sizes, updates, []

    def __call__(self, losses: torch.Tensor, state) -> None:
        row = [losses.mean()]
        for gate in () if state is None else (state.forget, state.input):
            row += [part.mean() for part in gate[:, : sum(self.sizes)].split(self.sizes, dim=1)]
        self.rows.append(torch.stack(row).detach().cpu())

    def means(self) -> dict[str, list]:
        """support_loss [updates], and forget and input [updates][layers] where there are gates."""
        table = torch.stack(self.rows).view(-1, self.updates, len(self.rows[0])).mean(dim=0)
        result = {"support_loss": table[:, 0].tolist()}
        if table.shape[1] > 1:
            result |= {"forget": table[:, 1:6].tolist(), "input": table[:, 6:].tolist()}
        return result


def layer_of(name: str) -> str:
    """The layer of LAYERS that a parameter of the learner belongs to."""
    return "head" if name.startswith("head") else f"conv{name.removesuffix('.weight')[-1]}"


def fixed_pool(dataset: Dataset, images: int, seed: int) -> Dataset:
    """The dataset with only `images` images of each class, drawn once: how other implementations load data."""
    if images > dataset.counts.min():
        name = dataset.names[int(dataset.counts.argmin())]
        raise UserError(f"--fixed_pool {images} is more than the {dataset.counts.min()} images of {name}")
    rng = np.random.default_rng(seed)
    rows = [s + rng.permutation(c)[:images] for s, c in zip(dataset.starts, dataset.counts, strict=True)]
    return dataset._replace(images=dataset.images[np.concatenate(rows)], counts=np.full(len(rows), images))


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, meta_batch_size=8, train_steps=6000, eval_freq=500, rotations=True, num_val_tasks=200
    )
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
    add(
        "--query_norm",
        choices=["batch", "support", "both"],
        default="both",
        help="whose statistics normalise training queries: their own (the papers), their support set's, as in a test, "
        "or their own in the first half of training and then the support set's",
    )
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
    smoke = {
        "train_steps": 4,
        "eval_freq": 2,
        "num_test_tasks": 8,
        "num_val_tasks": 8,
        "meta_batch_size": 2,
        "inner_epochs": 2,
        "num_query": 2,
        "train_query": 2,
        "tasks_at_once": 2,
    }
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
    test = fixed_tasks(dataset, "test", args, device)
    val = fixed_tasks(dataset, "val", args, device) if len(dataset.splits["val"]) else None  # mnist is all test
    if args.test:
        step = load_rule(args, rule)
        metrics = {"best_step": step} | test_report(args, rule, learner, val, test, inner, dtype, device)
        return experiment.report(args, "meta_lstm", dataset.name, metrics, digest=dataset.digest)

    offered = fixed_pool(dataset, args.fixed_pool, args.random_seed) if args.fixed_pool else dataset
    train = EpisodeSampler(
        offered,
        "train",
        args.num_classes,
        args.num_shot,
        args.train_query,
        args.meta_batch_size,
        args.random_seed,
        device,
        rotations=args.rotations,
        jitter=args.jitter,
        shard=experiment.shard(),
        flags=("num_classes", "num_shot", "train_query"),
    )
    gates = [p for name, p in rule.named_parameters() if name != "theta0"]
    optimizer = torch.optim.Adam(
        [{"params": [rule.theta0], "lr": args.learning_rate}, {"params": gates, "lr": args.rule_rate}]
    )
    falling = lambda step: 0.5 + 0.5 * math.cos(math.pi * step / args.train_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling if args.schedule == "cosine" else lambda step: 1.0)
    run = Run(args, "meta_lstm", dataset.name, dataset.digest)
    run.track(model=rule, optimizer=optimizer, schedule=schedule, sampler=train)
    world = experiment.shard()[1]
    chunks = [len(chunk) for chunk in torch.arange(args.meta_batch_size // world).split(args.tasks_at_once)]

    def compute(query_norm: str, *drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = [drawn[k :: len(chunks)] for k in range(len(chunks))]
        return meta_gradient(
            rule, learner, train.sample(), inner, dtype, args.tasks_at_once, query_norm, args.second_order, tiles
        )

    gradients = {
        norm: Gradient(partial(compute, norm), rule, device, [train.generator]) for norm in ("batch", "support")
    }
    for step in run.steps():
        query_norm = args.query_norm
        if query_norm == "both":
            query_norm = "batch" if step <= args.train_steps // 2 else "support"
        tiles = [rule.draw_tiles(B) for B in chunks]
        loss, accuracy = gradients[query_norm](*(part for parts in zip(*tiles, strict=True) for part in parts))
        experiment.average_gradients(rule)
        norm = nn.utils.clip_grad_norm_(rule.parameters(), args.clip or math.inf)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                watch = Watch(learner, updates_of(args))
                val_accuracy, val_loss = evaluate(rule, learner, val, args.num_val_tasks, inner, dtype, watch)
                # On the test classes is for plots; nothing is decided by it.
                test_accuracy, test_loss = evaluate(rule, learner, test, args.num_val_tasks, inner, dtype)
            log_rule(run, watch.means())
            val_accuracy, test_accuracy = val_accuracy.mean().item(), test_accuracy.mean().item()
            run.evaluated(
                val_accuracy,
                {
                    "Loss/val": val_loss,
                    "Accuracy/val": val_accuracy,
                    "Loss/test": test_loss,
                    "Accuracy/test": test_accuracy,
                    "Accuracy/train": float(accuracy),
                    "Gradient/meta_norm": float(norm),
                },
            )
    run.load_best(rule)
    log_episode(run, test, lambda *task: guess(rule, learner, inner, dtype, *task))
    return run.finish(test_report(args, rule, learner, val, test, inner, dtype, device))


def updates_of(args) -> int:
    """Updates of a learner in one task."""
    return args.inner_epochs * -(-args.num_classes * args.num_shot // args.inner_batch)


def load_rule(args, rule: MetaLSTM) -> int:
    """Load the run of --checkpoint into `rule`, with --reset_theta0 all but theta0; returns its step."""
    path = Path(args.checkpoint) / "best.pt"
    best = experiment.load_checkpoint(path)
    state = best["model"]
    if "theta0" not in state:
        raise UserError(f"{path} is not a best.pt of meta_lstm.py; use another run")
    if args.reset_theta0:
        state["theta0"] = rule.theta0.detach().cpu()
    elif len(state["theta0"]) != len(rule.theta0):
        raise UserError(
            f"{path} starts from {len(state['theta0'])} learned parameters, but a learner for {args.num_classes} "
            f"classes of {args.image_size}x{args.image_size} images has {len(rule.theta0)}; use the run's own "
            "--num_classes and --image_size, or --reset_theta0 to keep only the learned update rule"
        )
    experiment.load_state(rule, state, path)
    return best["step"]


def test_report(args, rule, learner, val, test, inner: Inner, dtype, device) -> dict:
    """Accuracy on the fixed test tasks: of the learned rule, before adaptation, and of tuned gradient descent.

    Gradient descent starts from the same theta0 and takes as many steps; its rate is the best of SGD_RATES
    on validation tasks.
    """
    theta0 = rule.theta0.detach()
    watch, sgd_watch = (Watch(learner, updates_of(args)) for _ in range(2))
    accuracies = evaluate(rule, learner, test, args.num_test_tasks, inner, dtype, watch)[0]
    accuracy, ci95 = experiment.mean_and_ci95(accuracies)
    # No update, but the batch-norm statistics of the support set.
    still, once = GradientDescent(theta0, 0.0), Inner(1, args.num_classes * args.num_shot, 1.0)
    before, before_ci95 = experiment.mean_and_ci95(evaluate(still, learner, test, args.num_test_tasks, once, dtype)[0])
    if val is None:  # as it was chosen on the run's own validation classes
        report = experiment.read_json(Path(args.checkpoint) / "metrics.json", "checkpoint", sgd_rate=int | float)
        rate = report["sgd_rate"]
    else:
        on_val = lambda rate: evaluate(GradientDescent(theta0, rate), learner, val, args.num_val_tasks, inner, dtype)[0]
        rate = max(SGD_RATES, key=lambda rate: on_val(rate).mean())
    sgd, sgd_ci95 = experiment.mean_and_ci95(
        evaluate(GradientDescent(theta0, rate), learner, test, args.num_test_tasks, inner, dtype, sgd_watch)[0]
    )
    return {
        "test_accuracy": accuracy,
        "ci95": ci95,
        "num_test_tasks": args.num_test_tasks,
        "batch_norm": "support",
        "test_accuracy_before": before,
        "ci95_before": before_ci95,
        "test_accuracy_sgd": sgd,
        "ci95_sgd": sgd_ci95,
        "sgd_rate": rate,
        "updates": updates_of(args),
        "rule": watch.means(),
        "sgd_support_loss": sgd_watch.means()["support_loss"],
        "second_order": args.second_order,
        "fixed_pool": args.fixed_pool,
        "reset_theta0": args.reset_theta0,
        "dtype": str(dtype).removeprefix("torch."),
        "device": experiment.device_name(device),
        "parameters": len(theta0),
        "parameters_of_rule": sum(p.numel() for p in rule.parameters()) - len(theta0),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
    }


def log_rule(run: Run, means: dict[str, list]) -> None:
    """To TensorBoard: the learner's support loss and the mean gates of each layer at every update."""
    if not run.writes:
        return
    for t, loss in enumerate(means["support_loss"], start=1):
        run.writer.add_scalar(f"Support/loss_update{t:02d}", loss, run.step)
    for gate in ("forget", "input"):
        for t, row in enumerate(means[gate], start=1):
            for layer, value in zip(LAYERS, row, strict=True):
                run.writer.add_scalar(f"Gate_{gate}/{layer}_update{t:02d}", value, run.step)


def guess(rule, learner, inner: Inner, dtype, support, support_labels, query) -> torch.Tensor:
    """The classes [N*Q] of the queries of one task after adaptation."""
    theta, statistics = adapt(rule, learner, support, support_labels, inner, dtype=dtype)
    return ask(learner, theta, query, statistics, dtype)[0].argmax(dim=-1)


if __name__ == "__main__":
    experiment.run_script(main)
