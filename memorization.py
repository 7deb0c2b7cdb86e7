"""When meta-learning memorises: a network that solves the training tasks without looking at their support sets.

Yin, Tucker, Zhou, Levine, Finn 2020, "Meta-learning without memorization". If one function solves all training tasks,
nothing forces a learner to read the support set, and on new tasks it fails. Meta-regularisation makes information in
the part that is not adapted costly: in its activations, z ~ N(mu(x), sigma(x)), or in its weights, w ~ N(mu, sigma).
Here it is measured: what is left of the accuracy when the support set is emptied, or is another task's?

    python memorization.py --task sinusoid                             MAML memorises the given amplitude
    python memorization.py --task sinusoid --regulariser weights       and with meta-regularisation does not
    python memorization.py --task diseased --learner blackbox          a label that always means the same
    python memorization.py --task characters --regulariser weights     20-way Omniglot with fixed labels
    python memorization.py --smoke                                     a complete run in seconds

Measured on one thread of an Intel Xeon, three seeds: test error of the sinusoids 0.76 +- 0.10 plain, 0.16 +- 0.11 with
the cost on weights.
The five task distributions: fewshot/tasks/distributions.py. All figures and what they teach: docs/memorization.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole
from fewshot.learners.conv4 import Conv4, conv4, on_sphere
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.distributions import (
    RECIPES,
    Batch,
    Diseased,
    FixedLabels,
    Grasping,
    Recipe,
    Stream,
    basis_tasks,
    sinusoid_tasks,
)

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

CONDITIONS = ("own", "emptied", "other")  # whose support set the learner gets: the task's, nobody's, the next task's
UNUSED = ("--dtype", "--split", "--image_size", "--num_classes", "--num_shot", "--rotations", "--patience")

# ---------------------------------------------------------------------------------- the model


def glorot(i: int, o: int) -> torch.Tensor:
    return (2 * torch.rand(i, o) - 1) * math.sqrt(6 / (i + o))


class Mlp(nn.Module):
    """Linear layers with ReLUs between: sizes[0] inputs to sizes[-1] outputs. Glorot's weights, zero biases."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.weights = nn.ParameterList([glorot(i, o) for i, o in pairwise(sizes)])
        self.biases = nn.ParameterList([torch.zeros(1, o) for o in sizes[1:]])

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.weights, self.biases, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mlp(self.layers(), x)


def mlp(layers: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """x [B, P, i] through layers of weights [i, o] and biases [1, o], or of an own network each task: [B, i, o]."""
    for n, (weight, bias) in enumerate(layers):
        x = (torch.relu(x) if n else x) @ weight + bias
    return x


def own_noise(like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers [B, ...] for this process's tasks: what one process would draw for them."""
    rank, world = experiment.shard()
    return torch.randn(world * len(like), *like.shape[1:])[rank * len(like) : (rank + 1) * len(like)]


def kl_to_standard(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each element, in nats."""
    return (std.square() + mean.square() - 1) / 2 - std.log()


class Activations(nn.Module):
    """z ~ N(mu(x), sigma(x)) (Yin et al., equation 4): 80 hidden units, or a Conv4; the cost is KL to N(0, 1).

    The cost is the mean over points and dimensions, as in the authors' code.
    """

    def __init__(self, inputs: int, code_dim: int, conv: Conv4 | None = None):
        super().__init__()
        self.conv = conv
        self.body = None if conv else Mlp([inputs, 80])
        features = conv.out_features if conv else 80
        self.mean, self.raw_std = Mlp([features, code_dim]), Mlp([features, code_dim])

    def forward(self, x: torch.Tensor, num_support: int, sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self.conv:
            h = on_sphere(self.conv(x, norm="support", num_support=num_support), num_support)
        else:
            h = torch.relu(self.body(x))
        mean, std = self.mean(h), F.softplus(self.raw_std(h))
        z = mean + std * own_noise(std) if sample else mean
        return z, kl_to_standard(mean, std)[:, num_support:].mean()


class Weights(nn.Module):
    """z = h(x; w), w ~ N(mu, sigma) (Yin et al., equation 5): 100 hidden units, or a Conv4; the cost is KL to N(0, 1).

    The cost is the sum over all weight matrices; biases and batch norm are without noise. One w for all points of a
    call.
    """

    def __init__(self, inputs: int, code_dim: int, conv: Conv4 | None = None, raw_std: float = -3.0):
        super().__init__()
        self.conv, self.body = conv, None if conv else Mlp([inputs, 100, code_dim])
        self.noisy = [n for n, p in self.named_parameters() if "weight" in n]
        matrices = dict(self.named_parameters())
        self.raw_stds = nn.ParameterList([torch.full_like(matrices[n], raw_std) for n in self.noisy])

    def forward(self, x: torch.Tensor, num_support: int, sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
        parameters, cost = dict(self.named_parameters()), 0.0
        for name, raw_std in zip(self.noisy, self.raw_stds, strict=True):
            mean, std = parameters[name], F.softplus(raw_std) + torch.finfo(torch.float32).eps
            cost = cost + kl_to_standard(mean, std).sum()
            parameters[name] = mean + std * torch.randn_like(std) if sample else mean
        if self.conv:
            own = {n.removeprefix("conv."): p for n, p in parameters.items() if n.startswith("conv.")}
            features = conv4(own, x, "support", None, num_support, strided=self.conv.strided)
            return on_sphere(features, num_support), cost
        layers = [(parameters[f"body.weights.{i}"], parameters[f"body.biases.{i}"]) for i in range(2)]
        return mlp(layers, x), cost


class Plain(nn.Module):
    """No meta-regularisation: the learner reads x itself, or for images the features of a Conv4. No cost."""

    def __init__(self, conv: Conv4 | None = None):
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor, num_support: int, sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self.conv:
            x = on_sphere(self.conv(x, norm="support", num_support=num_support), num_support)
        return x, torch.zeros(())


class Maml(nn.Module):
    """Predictions by a network (two hidden layers, or a linear head) whose weights a few gradient steps adapt."""

    def __init__(self, inputs: int, outputs: int, hidden: int, kind: str, ways: int):
        super().__init__()
        self.network = Mlp([inputs, hidden, hidden, outputs] if hidden else [inputs, outputs])
        if not hidden:
            nn.init.zeros_(self.network.weights[0])
        self.kind, self.ways = kind, ways

    def forward(self, z, y, query, rate: float, steps: int) -> torch.Tensor:
        """Outputs [B, Q, o] at query [B, Q, i] after `steps` steps on z [B, K, i], y [B, K, o]; z None: no steps."""
        layers = self.network.layers()
        if z is not None:
            layers = adapt(layers, z, y, rate, steps, self.kind, self.ways, second_order=self.training)
        return mlp(layers, query)


def adapt(layers, z, y, rate: float, steps: int, kind: str, ways: int, second_order: bool) -> list:
    """The inner loop for B tasks at once: each starts from `layers` and descends its own support loss.

    Returns layers with weights [B, i, o] and biases [B, 1, o]; with second_order they stay differentiable.
    """
    flat = [p.expand(len(z), *p.shape) for layer in layers for p in layer]
    with torch.enable_grad():
        if not second_order:
            flat = [p.detach().requires_grad_() for p in flat]
        for _ in range(steps):
            loss = task_losses(mlp(list(zip(flat[::2], flat[1::2], strict=True)), z), y, kind, ways).sum()
            gradients = torch.autograd.grad(loss, flat, create_graph=second_order)
            flat = [p - rate * g for p, g in zip(flat, gradients, strict=True)]
    return list(zip(flat[::2], flat[1::2], strict=True))


class BlackBox(nn.Module):
    """A conditional neural process (Garnelo et al. 2018): the support set's pairs, encoded and averaged, beside z."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 100, summary: int = 10, context: int = 5):
        super().__init__()
        self.pairs = Mlp([inputs + outputs, hidden, hidden, summary])
        self.context = Mlp([summary, context])
        self.decoder = Mlp([context + inputs, hidden, hidden, outputs])

    def forward(self, z, y, query, rate: float = 0.0, steps: int = 0) -> torch.Tensor:
        """Outputs [B, Q, o] at query [B, Q, i] with the pairs z [B, K, i], y [B, K, o]; z None: an average of 0."""
        if z is None:
            r = query.new_zeros(len(query), 1, self.context.weights[0].shape[0])
        else:
            r = self.pairs(torch.cat([z, y], dim=-1)).mean(dim=1, keepdim=True)
        context = self.context(r).expand(-1, query.shape[1], -1)
        return self.decoder(torch.cat([context, query], dim=-1))


class MetaLearner(nn.Module):
    """An encoder that is not adapted (Plain, Activations or Weights), then MAML or the black box."""

    def __init__(self, args, inputs: int, outputs: int):
        super().__init__()
        conv = Conv4(inputs, args.code_dim, strided=True) if args.task == "characters" else None
        if args.regulariser == "activations":
            self.encoder = Activations(inputs, args.code_dim, conv)
        elif args.regulariser == "weights":
            self.encoder = Weights(inputs, args.code_dim, conv, args.raw_std)
        else:
            self.encoder = Plain(conv)
        read = args.code_dim if conv or args.regulariser != "none" else inputs
        if args.learner == "maml":
            self.head = Maml(read, outputs, args.hidden_dim, args.kind, args.num_classes)
        else:
            wide = 10 if args.task in ("basis", "sinusoid") else 64
            self.head = BlackBox(read, outputs, summary=wide, context=wide if wide > 10 else 5)

    def forward(self, batch: Batch, rate: float, steps: int, condition: str = "own", sample: bool = True):
        """Outputs [B, Q, o] for the queries, and the regulariser's cost."""
        K = batch.support_x.shape[1]
        z, cost = self.encoder(torch.cat([batch.support_x, batch.query_x], dim=1), K, sample)
        support, y = z[:, :K], batch.support_y
        if condition == "emptied":
            support = y = None
        elif condition == "other":
            support, y = support.roll(1, 0), y.roll(1, 0)
        return self.head(support, y, z[:, K:], rate, steps), cost


def task_losses(outputs: torch.Tensor, y: torch.Tensor, kind: str, ways: int) -> torch.Tensor:
    """The mean loss of each task [B]: squared error, or cross entropy in nats. outputs and y: [B, P, o]."""
    if kind == "square":
        losses = (outputs - y).square()
    elif kind == "binary":
        losses = F.binary_cross_entropy_with_logits(outputs, y, reduction="none")
    else:
        losses = -(y * outputs.log_softmax(-1)).sum(-1) if kind == "classes" else choice_losses(outputs, y, ways)
    return losses.flatten(1).mean(dim=1)


def choice_losses(scores: torch.Tensor, y: torch.Tensor, ways: int) -> torch.Tensor:
    """Cross entropy of choosing the one point of y = 1 among each `ways` successive ones: [B, P / ways]."""
    scores, y = scores.unflatten(1, (-1, ways)).squeeze(-1), y.unflatten(1, (-1, ways)).squeeze(-1)
    return -(y * scores.log_softmax(-1)).sum(-1)


def task_figures(outputs: torch.Tensor, y: torch.Tensor, kind: str, ways: int) -> torch.Tensor:
    """What is reported of each task [B]: the squared error, or the accuracy."""
    if kind == "square":
        return task_losses(outputs, y, kind, ways)
    if kind == "binary":
        right = (outputs > 0) == (y > 0.5)
    else:
        if kind == "choice":
            outputs, y = (t.unflatten(1, (-1, ways)).squeeze(-1) for t in (outputs, y))
        right = outputs.argmax(-1) == y.argmax(-1)
    return right.float().flatten(1).mean(dim=1)


@torch.no_grad()
def evaluate(learner: MetaLearner, stream: Stream, num_tasks: int, args, steps: int, condition: str = "own") -> dict:
    """Figure and loss of each of the stream's first `num_tasks` tasks: {"figure": [n], "loss": [n]}.

    The encoder gives means, without noise. With condition="other" each task gets its neighbour's support set.
    """
    stream.reset()
    learner.eval()
    found = []
    while len(found) * stream.B < num_tasks:
        batch = stream.sample()
        outputs, _ = learner(batch, args.inner_lr, steps, condition, sample=False)
        measures = (f(outputs, batch.query_y, args.kind, args.num_classes) for f in (task_figures, task_losses))
        found.append(torch.stack(list(measures)))
    learner.train()
    figure, loss = torch.cat(found, dim=1)[:, :num_tasks]
    return {"figure": figure, "loss": loss}


# --------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    """The flags; what is not given comes from the task's recipe, and combinations that cannot work are refused."""
    parser, groups = experiment.make_parser(
        __doc__,
        without=UNUSED,
        num_query=None,
        meta_batch_size=None,
        train_steps=None,
        eval_freq=1000,
        num_val_tasks=200,
    )
    parser.prog = "memorization.py"
    own = "; None: the task's own"
    add = groups["data"].add_argument
    add("--task", choices=sorted(RECIPES), default="sinusoid", help="the distribution of tasks")
    add("--num_shot", type=whole(1), help="support points in training: see RECIPES" + own)
    add("--test_shot", type=whole(1), help="support points in validation and test" + own)
    add = groups["model"].add_argument
    add("--learner", choices=["maml", "blackbox"], default="maml", help="blackbox: a conditional neural process")
    add("--regulariser", choices=["none", "activations", "weights"], default="none", help="what carries the cost")
    add("--hidden_dim", type=whole(0, 16384), help="units of each of MAML's two hidden layers; 0: a linear head" + own)
    add("--code_dim", type=whole(1, 16384), help="dimensions of the regularised code z" + own)
    add("--raw_std", type=float, help="where softplus^-1 of the weights' standard deviations starts" + own)
    add = groups["optimisation"].add_argument
    add("--beta", type=number(), help="price of a nat of the regulariser's cost" + own)
    add("--inner_lr", type=number(above=True), help="rate of MAML's inner steps" + own)
    add("--inner_steps", type=whole(1), help="MAML's gradient steps on a support set in training" + own)
    add("--learning_rate", type=number(above=True), default=1e-3, help="of Adam")
    add(
        "--fresh_adam",
        choices=["none", "encoder", "all"],
        help="what a new Adam moves in every step, by its rate in the gradient's sign" + own,
    )
    groups["evaluation"].add_argument("--test_inner_steps", type=whole(1), help="the same in validation and test" + own)
    smoke = {"train_steps": 20, "eval_freq": 10, "num_val_tasks": 20, "num_test_tasks": 40}
    shapes = ("task", "learner", "regulariser", "hidden_dim", "code_dim")
    args = experiment.parse(parser, argv, smoke, fixed=shapes)
    recipe = RECIPES[args.task]
    authors = args.task == "sinusoid" and args.learner == "maml"  # the figures of their notebook need all of it
    if authors and args.regulariser == "activations":
        recipe = recipe._replace(train_steps=10_000)
    if args.fresh_adam is None:
        args.fresh_adam = (
            {"activations": "encoder", "weights": "all"}.get(args.regulariser, "none") if authors else "none"
        )
    args.raw_std = args.raw_std if args.raw_std is not None else -50.0 if authors else -3.0
    for name in set(Recipe._fields) - {"kind", "ways", "betas"}:
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    args.kind, args.num_classes, args.patience = recipe.kind, recipe.ways, 0  # no early stop: memorising is the end
    if args.regulariser == "none":
        if args.beta:
            raise UserError(f"--beta {args.beta} needs --regulariser activations or weights")
        args.beta = 0.0
    elif args.beta is None:
        args.beta = recipe.betas[args.learner, args.regulariser]
    if args.hidden_dim == 0 and args.regulariser == "none" and args.task != "characters":
        raise UserError("--hidden_dim 0 leaves a linear network; use 1 or more, or a --regulariser with its encoder")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)  # the tasks are small: they stay on the CPU
    dataset, world, inputs, outputs = None, basis_tasks, 1, 1
    if args.task == "sinusoid":
        world, inputs = sinusoid_tasks, 21
    elif args.task != "basis":
        dataset = load_for(args)
        inputs, outputs = dataset.images.shape[1], args.num_classes
        if args.task != "characters":
            world = (Diseased if args.task == "diseased" else Grasping)(dataset)
            inputs, outputs, world = 196 + (args.task == "grasping") * Grasping.NAME, 1, world.sample

    def stream(part: str, seed: int, B: int, shard: tuple[int, int] = (0, 1)) -> Stream | FixedLabels:
        K, Q = (args.num_shot if part == "train" else args.test_shot), args.num_query
        if args.task == "characters":
            return FixedLabels(
                dataset, part, args.num_classes, K, Q, B, seed, fixed_labels=part == "train", shard=shard
            )
        Q = 200 if args.task == "sinusoid" and part != "train" else Q
        return Stream(lambda B, g: world(B, K, Q, g, part), seed, B, shard)

    train = stream("train", args.random_seed, args.meta_batch_size, experiment.shard())
    val = stream("val", VAL_SEED, min(100, args.num_val_tasks))
    learner = MetaLearner(args, inputs, outputs)
    name = dataset.name if dataset else args.task
    if args.test:
        step = experiment.load_best(args.checkpoint, learner)
        return experiment.report(args, "memorization", name, {"best_step": step} | final_report(args, learner, stream))

    optimizer = torch.optim.Adam(learner.parameters(), args.learning_rate, eps=1e-7, fused=True)
    run = Run(args, "memorization", name)
    run.track(model=learner, optimizer=optimizer, sampler=train)
    for _ in run.steps():
        batch = train.sample()
        predictions, cost = learner(batch, args.inner_lr, args.inner_steps)
        error = task_losses(predictions, batch.query_y, args.kind, args.num_classes).mean()
        loss = error + args.beta * cost
        optimizer.zero_grad()
        loss.backward()
        experiment.average_gradients(learner)
        for p in {"none": [], "encoder": learner.encoder.parameters(), "all": learner.parameters()}[args.fresh_adam]:
            optimizer.state.pop(p, None)
        optimizer.step()
        run.record(error)
        if run.time_to_evaluate():
            with run.clock_stopped():
                scalars = {"Regulariser/nats": cost.item()}
                for condition in CONDITIONS:
                    found = evaluate(learner, val, args.num_val_tasks, args, args.test_inner_steps, condition)
                    tag = "" if condition == "own" else f"_{condition}"
                    scalars[f"Loss/val{tag}"] = found["loss"].mean().item()
                    if args.kind != "square":
                        scalars[f"Accuracy/val{tag}"] = found["figure"].mean().item()
            run.evaluated(None, scalars)  # where training ends is what the lesson is about: the last model counts
    metrics = final_report(args, learner, stream)
    if run.writes:
        run.writer.add_figure("memorisation", conditions_figure(metrics), run.step)
    return run.finish(metrics | {"device": experiment.device_name(device)})


def final_report(args, learner: MetaLearner, stream) -> dict:
    """The figures on fresh training tasks and on the fixed test tasks, with each support set."""
    metrics = {
        "task": args.task,
        "learner": args.learner,
        "regulariser": args.regulariser,
        "beta": args.beta,
        "figure": "mean squared error" if args.kind == "square" else "accuracy",
        "num_test_tasks": args.num_test_tasks,
    }
    for part, seed, steps in (("train", TEST_SEED + 1, args.inner_steps), ("test", TEST_SEED, args.test_inner_steps)):
        for condition in CONDITIONS:
            tasks = stream(part, seed, min(100, args.num_test_tasks))
            figure = evaluate(learner, tasks, args.num_test_tasks, args, steps, condition)["figure"]
            mean, ci95 = experiment.mean_and_ci95(figure)
            metrics |= {f"{part}_{condition}": mean, f"{part}_{condition}_ci95": ci95}
            if (part, condition) == ("test", "own"):
                metrics["accuracies"] = [round(a, 4) for a in figure.tolist()]
    return metrics | {"parameters": sum(p.numel() for p in learner.parameters())}


def conditions_figure(metrics: dict):
    """Bars of the six figures of a run: training and test tasks by whose support set the learner got."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.6), layout="constrained")
    ax = figure.subplots()
    for shift, part in ((-0.2, "train"), (0.2, "test")):
        values, errors = ([metrics[f"{part}_{c}{end}"] for c in CONDITIONS] for end in ("", "_ci95"))
        ax.bar([i + shift for i in range(3)], values, 0.38, yerr=errors, label=f"{part}ing tasks")
    ax.set_xticks(range(3), ["own", "emptied", "another task's"])
    ax.set_xlabel("support set")
    ax.set_ylabel(metrics["figure"])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    experiment.run_script(main)
