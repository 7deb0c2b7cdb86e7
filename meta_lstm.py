"""The LSTM meta-learner: a learned update rule whose cell state is the parameters of another network.

Ravi and Larochelle 2017, "Optimization as a model for few-shot learning". A learner (a small
convolutional network) is trained on the support set of a task by a meta-learner: an LSTM that reads
every parameter's gradient and the loss, and decides how much of the parameter to forget and how far to
go down the gradient. The rule and the parameters to start from are learned so that the learner does
well on the queries. All parameters of all tasks of a meta-batch go through the cell together.

    python meta_lstm.py                                    Omniglot, 5-way 1-shot
    python meta_lstm.py --preset 5way5shot                 the report's table of hyper-parameters
    python meta_lstm.py --smoke                            a complete run in seconds
    python meta_lstm.py --preset 5way1shot --dataset folder --data_folder miniImagenet --image_size 84
    python meta_lstm.py --test --checkpoint RUN_DIR --num_classes 10 --reset_theta0    the rule alone
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import experiment
from backbone import fast_dtype
from experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole
from load_data import Dataset, EpisodeSampler, episode_figure, load_dataset

FILTERS, EPS = 32, 1e-3  # of the learner's convolutions and batch norms
HIDDEN = 20  # units of the meta-learner's first layer
P_SCALE = 10.0  # p of the pre-processing
TILE = 1024  # parameters whose LSTM state fits in the processor's cache
PRESETS = {  # the report's table; one episode a step
    "5way1shot": {"num_classes": 5, "num_shot": 1, "inner_epochs": 12, "inner_batch": 5, "bn_momentum": 0.9,
                  "train_steps": 75000},
    "5way5shot": {"num_classes": 5, "num_shot": 5, "inner_epochs": 8, "inner_batch": 25, "bn_momentum": 0.95,
                  "train_steps": 50000},
    "10way10shot": {"num_classes": 10, "num_shot": 10, "inner_epochs": 8, "inner_batch": 25, "bn_momentum": 0.95,
                    "train_steps": 50000},
    "10way20shot": {"num_classes": 10, "num_shot": 20, "inner_epochs": 8, "inner_batch": 25, "bn_momentum": 0.95,
                    "train_steps": 50000},
}  # fmt: skip

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
                parts.append(torch.full(shape, float("gamma" in name)))
        return torch.cat([part.flatten() for part in parts])

    def unpack(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> [B, *shape] of flat parameters [B, P or more]; what is beyond P is padding."""
        shapes = self.shapes()
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = theta[:, : sum(sizes)].split(sizes, dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def fresh_statistics(self, B: int, device) -> list[torch.Tensor]:
        """Running mean 0 and variance 1 of the four batch norms of B tasks: each [2, B * FILTERS]."""
        return [torch.stack([torch.zeros(B * FILTERS), torch.ones(B * FILTERS)]).to(device) for _ in range(4)]

    def __call__(self, theta, images, statistics=None, momentum: float = 0.0, dtype=torch.float32) -> torch.Tensor:
        """Scores [B, n, N] of images [B, n, C, H, W] by the B networks with parameters theta [B, P].

        The tasks lie side by side as groups of channels, so that each operation handles all of them.
        Batch norm normalises with the images of the call; with statistics and momentum > 0 these also
        enter the running averages, with momentum 0 the running averages normalise.
        """
        p, B = self.unpack(theta), len(theta)
        x = images.transpose(0, 1).flatten(1, 2).to(dtype).contiguous(memory_format=torch.channels_last)
        for i in range(4):  # x: [n, B * channels, side, side]
            weight, bias = p[f"conv{i}.weight"].flatten(0, 1).to(dtype), p[f"bias{i}"].flatten().to(dtype)
            x = F.conv2d(x, weight, bias, padding=1, groups=B)
            mean, var = (None, None) if statistics is None else statistics[i]
            use_batch = statistics is None or momentum > 0
            gamma, beta = p[f"gamma{i}"].flatten(), p[f"beta{i}"].flatten()
            x = F.batch_norm(x, mean, var, gamma, beta, training=use_batch, momentum=momentum, eps=EPS)
            x = F.relu(F.max_pool2d(x, 2))  # pooling first: the same values, a quarter of the work
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

    inputs [R, 4, W], h and c [R, H, W]. Written out because it is what an episode costs: one matrix
    product for all gates, one sigmoid (tanh z = 2 sigmoid(2z) - 1), and of each step only what the
    backward pass needs.
    """

    @staticmethod
    def forward(ctx, inputs, h, c, weight_ih, weight_hh, bias):
        H = h.shape[1]
        scale = torch.ones_like(bias)
        scale[2 * H : 3 * H] = 2
        weight = (torch.cat([weight_ih, bias[:, None], weight_hh], dim=1) * scale[:, None]).to(h.dtype)
        inputs = torch.cat([inputs.to(h.dtype), torch.ones_like(h[:, :1]), h], dim=1)  # [R, 4 + 1 + H, W]
        gates = torch.matmul(weight, inputs).sigmoid_()  # [R, 4H, W]
        i, f, s, o = gates.chunk(4, dim=1)
        new_c = torch.addcmul(f * c, i, 2 * s - 1)
        tanh_c = (2 * new_c).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(weight, inputs, gates, c, tanh_c, scale)
        return o * tanh_c, new_c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h, grad_c):
        weight, inputs, gates, c, tanh_c, scale = ctx.saved_tensors
        H = c.shape[1]
        i, f, s, o = gates.chunk(4, dim=1)
        grad_c = torch.addcmul(grad_c, grad_h * o, 1 - tanh_c.square())
        grad = gates * (1 - gates)  # of the sigmoids, then times what lies behind each
        grad[:, :H] *= grad_c * (2 * s - 1)
        grad[:, H : 2 * H] *= grad_c * c
        grad[:, 2 * H : 3 * H] *= grad_c * i * 2
        grad[:, 3 * H :] *= grad_h * tanh_c
        n = inputs.shape[1] - H - 1
        grad_weight = torch.bmm(grad, inputs.transpose(1, 2)).sum(dim=0, dtype=scale.dtype) * scale[:, None]
        first = 0 if ctx.needs_input_grad[0] else n + 1  # of the inputs that need a gradient
        grad_inputs = torch.matmul(weight[:, first:].t().contiguous(), grad)
        grad_x = grad_inputs[:, :n] if first == 0 else None
        return (
            grad_x, grad_inputs[:, -H:], grad_c * f,
            grad_weight[:, :n], grad_weight[:, n + 1 :], grad_weight[:, n],
        )  # fmt: skip


class State(NamedTuple):
    """What the meta-learner remembers between updates."""

    memory: list  # of layer 1: (tiles, h, c) of the tiles that are trained on, then of the others
    forget: torch.Tensor  # [B, P], the last gates
    input: torch.Tensor


class MetaLSTM(nn.Module):
    """The meta-learner: an LSTM shared over coordinates, then a cell whose state is the learner's parameters."""

    def __init__(self, theta0: torch.Tensor, share: float = 1.0):
        super().__init__()
        self.share = share
        small = lambda *shape: nn.Parameter(0.02 * torch.rand(shape) - 0.01)
        self.weight_ih, self.weight_hh = small(4 * HIDDEN, 4), small(4 * HIDDEN, HIDDEN)
        self.bias_ih, self.bias_hh = small(4 * HIDDEN), small(4 * HIDDEN)
        self.gate_weight = small(2, HIDDEN + 2)  # rows: forget, input; columns: h, parameter, previous gate
        # Remember everything and take small steps: at first the rule is close to gradient descent.
        self.gate_bias = nn.Parameter(torch.tensor([4.0, -5.0]) + torch.rand(2))
        self.theta0 = nn.Parameter(theta0)

    def start(self, B: int, dtype: torch.dtype) -> tuple[torch.Tensor, State]:
        """Initial parameters [B, P padded to whole tiles] and the empty memory."""
        tiles = -(-len(self.theta0) // TILE)
        theta = F.pad(self.theta0, (0, tiles * TILE - len(self.theta0))).expand(B, -1)
        order = torch.randperm(B * tiles).to(theta.device) if self.share < 1 else torch.arange(B * tiles)
        trained = max(1, round(self.share * len(order)))
        memory = []
        for part in (order[:trained], order[trained:]):
            zeros = theta.new_zeros(len(part), HIDDEN, TILE, dtype=dtype)
            memory.append((part, zeros, zeros))
        gate = torch.zeros_like(theta)
        return theta, State(memory, gate, gate)

    def layer1(self, grad: torch.Tensor, loss: torch.Tensor, memory: list) -> tuple[torch.Tensor, list]:
        """h of every coordinate times the gates' weights, [B, 2, P], and the new memory."""
        B, P = grad.shape
        rows = lambda x: x.reshape(B * P // TILE, TILE)
        inputs = [rows(x) for x in preprocess(grad)] + [rows(x[:, None].expand(B, P)) for x in preprocess(loss)]
        inputs = torch.stack(inputs, dim=1)  # [B * tiles, 4, TILE]
        weights = (self.weight_ih, self.weight_hh, self.bias_ih + self.bias_hh)
        after, of_h = [], []
        for (part, h, c), train in zip(memory, (True, False), strict=True):
            if train or len(part):
                with torch.set_grad_enabled(train and torch.is_grad_enabled()):
                    h, c = LSTMCell.apply(inputs if len(part) == len(inputs) else inputs[part], h, c, *weights)
                seen = h if self.share == 1 or not train else h.detach() + (h - h.detach()) / self.share
                of_h.append(torch.matmul(self.gate_weight[:, :HIDDEN].to(h.dtype), seen))
            after.append((part, h, c))
        of_h = torch.cat(of_h)[torch.cat([part for part, _, _ in memory]).argsort()].to(grad.dtype)
        return of_h.view(B, -1, 2, TILE).transpose(1, 2).reshape(B, 2, P), after

    def forward(self, theta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor, state: State):
        """One update of parameters [B, P] by their gradient [B, P] and the losses [B]; returns (theta, state)."""
        of_h, memory = self.layer1(grad, loss, state.memory)
        gates = []
        for k, previous in enumerate((state.forget, state.input)):  # eqs. of section 3.2
            w_theta, w_gate = self.gate_weight[k, HIDDEN], self.gate_weight[k, HIDDEN + 1]
            gates.append(torch.sigmoid(of_h[:, k] + w_theta * theta + w_gate * previous + self.gate_bias[k]))
        forget, input = gates
        return forget * theta - input * grad, State(memory, forget, input)


class GradientDescent:
    """The same update with the gates forced: nothing forgotten, every step `rate` long."""

    def __init__(self, theta0: torch.Tensor, rate: float):
        self.theta0, self.rate = theta0, rate

    def start(self, B: int, dtype: torch.dtype):
        return self.theta0.expand(B, -1), None

    def __call__(self, theta, grad, loss, state):
        return theta - self.rate * grad, None


class Inner(NamedTuple):
    """How a learner is trained on its support set."""

    epochs: int
    batch: int
    momentum: float


def adapt(rule, learner: Learner, support, labels, inner, second_order: bool = False, dtype=torch.float32, watch=None):
    """Train B learners on their support sets [B, N*K, C, H, W]; returns (theta [B, P], batch-norm statistics).

    `inner` holds epochs, images of a batch and the batch-norm momentum. The learner's gradients and losses
    are constants to the meta-learner unless `second_order`.
    """
    B, n = labels.shape
    theta, state = rule.start(B, dtype)
    statistics = learner.fresh_statistics(B, theta.device)
    keep_graph = torch.is_grad_enabled()
    # Image 1 of every class, image 2 of every class, ...: a batch holds all classes in equal parts.
    order = torch.arange(n, device=labels.device).view(learner.num_classes, -1).t().flatten()
    for _ in range(inner.epochs):
        for batch in order.split(inner.batch):
            with torch.enable_grad():
                point = theta if second_order else theta.detach().requires_grad_()
                if not point.requires_grad:
                    point = point.detach().requires_grad_()
                logits = learner(point, support[:, batch], statistics, inner.momentum, dtype)
                losses = task_losses(logits, labels[:, batch])
                (grad,) = torch.autograd.grad(losses.sum(), point, create_graph=second_order and keep_graph)
            if not second_order:
                losses = losses.detach()
            theta, state = rule(theta, grad, losses, state)
            if watch is not None:
                watch(losses.detach(), state)
    return theta, statistics


def meta_gradient(rule: MetaLSTM, learner: Learner, episodes, inner: Inner, args, dtype) -> tuple:
    """Add the gradient of the mean query loss to rule's .grad; returns (loss, accuracy) of the meta-batch."""
    B, loss, accuracy = len(episodes[0]), 0.0, 0.0
    for chunk in zip(*(x.split(args.tasks_at_once) for x in episodes), strict=True):
        support, labels, query, query_labels = chunk
        theta, statistics = adapt(rule, learner, support, labels, inner, args.second_order, dtype)
        # Batch norm as the paper trains it (the queries' own statistics), or as it is tested.
        logits = learner(theta, query, statistics if args.query_norm == "support" else None, 0.0, dtype)
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
    sampler.reset()
    correct, losses = [], []
    bar = tqdm(total=num_tasks, desc="evaluation", unit="task", leave=False, disable=None)
    while (done := sum(map(len, correct))) < num_tasks:
        support, support_labels, query, labels = sampler.sample()
        theta, statistics = adapt(rule, learner, support, support_labels, inner, dtype=dtype, watch=watch)
        logits = learner(theta, query, statistics, 0.0, dtype)
        losses.append(task_losses(logits, labels).mean().item())
        correct.append((logits.argmax(dim=-1) == labels).float().mean(dim=1)[: num_tasks - done].cpu())
        bar.update(len(correct[-1]))
    bar.close()
    return torch.cat(correct), sum(losses) / len(losses)


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, meta_batch_size=8, train_steps=2000, eval_freq=100, rotations=True, num_val_tasks=200
    )
    parser.prog = "meta_lstm.py"
    add = groups["data"].add_argument
    add("--preset", choices=list(PRESETS), help="the report's hyper-parameters; what is typed beside it counts more")
    add("--fixed_pool", type=whole(0), default=0, metavar="M", help="training classes offer only M images; 0: all")
    add("--train_query", type=whole(1), default=5, help="query images of each class in training")
    add = groups["model"].add_argument
    add("--inner_epochs", type=whole(1), default=5, help="passes over the support set")
    add("--inner_batch", type=whole(1), default=25, help="support images of one update")
    add("--bn_momentum", type=number(0, 1, above=True), default=0.95, help="weight of the newest batch statistics")
    add("--query_norm", choices=["batch", "support"], default="batch", help="of the queries in meta-training")
    add("--second_order", action="store_true", help="gradients through the learner's gradients")
    add("--reset_theta0", action="store_true", help="with --checkpoint: fresh initial parameters, the learned rule")
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=1e-3, help="of Adam, for the initial parameters")
    add("--rule_rate", type=number(above=True), default=1e-3, help="of Adam, for the rest of the meta-learner")
    add("--schedule", choices=["constant", "cosine"], default="cosine", help="of both rates")
    add("--clip", type=number(above=True), default=0.25, help="largest norm of the meta-gradient")
    add("--share", type=number(0, 1, above=True), default=0.1, help="of coordinates that train layer 1, drawn anew")
    add("--tasks_at_once", type=whole(1), default=4, help="tasks that go through the cell together; bounds memory")
    args = experiment.parse(parser, argv, {}, fixed=())
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = fast_dtype(args.dtype, device)
    inner = Inner(args.inner_epochs, args.inner_batch, args.bn_momentum)
    dataset = load_dataset(args.dataset, args.data_folder, args.split, args.image_size)
    learner = Learner(dataset.images.shape[1], args.image_size, args.num_classes)
    rule = MetaLSTM(learner.initial(), args.share).to(device)

    def tasks(part: str, seed: int) -> EpisodeSampler:
        N, K, Q = args.num_classes, args.num_shot, args.num_query
        return EpisodeSampler(dataset, part, N, K, Q, args.tasks_at_once, seed, device)

    val, test = tasks("val", VAL_SEED), tasks("test", TEST_SEED)
    train = EpisodeSampler(
        dataset, "train", args.num_classes, args.num_shot, args.train_query, args.meta_batch_size, args.random_seed,
        device, rotations=args.rotations, shard=experiment.shard(),
    )  # fmt: skip
    own = [p for name, p in rule.named_parameters() if name != "theta0"]
    groups = [{"params": [rule.theta0], "lr": args.learning_rate}, {"params": own, "lr": args.rule_rate}]
    optimizer = torch.optim.Adam(groups)
    curve = lambda step: 1.0 if args.schedule == "constant" else 0.5 + 0.5 * math.cos(math.pi * step / args.train_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
    run = Run(args, "meta_lstm", dataset.name)
    run.track(model=rule, optimizer=optimizer, schedule=schedule, sampler=train)
    for _ in run.steps():
        optimizer.zero_grad()
        loss, accuracy = meta_gradient(rule, learner, train.sample(), inner, args, dtype)
        experiment.average_gradients(rule)
        norm = nn.utils.clip_grad_norm_(rule.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                val_accuracy, val_loss = evaluate(rule, learner, val, args.num_val_tasks, inner, dtype)
            val_accuracy = val_accuracy.mean().item()
            run.evaluated(val_accuracy, {
                "Loss/val": val_loss, "Accuracy/val": val_accuracy,
                "Accuracy/train": float(accuracy), "Gradient/meta_norm": float(norm),
                "Gate/forget_bias": rule.gate_bias[0].item(), "Gate/input_bias": rule.gate_bias[1].item(),
                "seconds": run.seconds,
            })  # fmt: skip
    run.load_best(rule)
    accuracy, ci95 = experiment.mean_and_ci95(evaluate(rule, learner, val, 600, inner, dtype)[0])
    return run.finish({"test_accuracy": accuracy, "ci95": ci95})


if __name__ == "__main__":
    experiment.run_script(main)
