"""A Bayesian black-box learner with metadata: not one function that fits the points but a distribution over them.

phi1 is what a family of tasks has in common, phi2 is the task, m is metadata (what is known of the task beforehand):

    p(phi1) p(phi2 | phi1, m) p(Y | phi2, X)        the model: two priors and a decoder
    q(phi2 | X, Y) q(phi1 | phi2, m)                what stands for the posterior: a set encoder, and a network

Both are trained by the whole bound E_q[log p(Y | phi2, X) + log p(phi2 | phi1, m) + log p(phi1) - log q(phi2 | X, Y)
- log q(phi1 | phi2, m)] <= log p(Y | X, m) (Kingma, Welling 2014, reparametrised), of a context and of context and
targets together; the encoder averages over points, so that their order is nothing (Garnelo et al. 2018, "Neural
processes"). Predictions weigh samples of prior and encoder by what the model says of the context.

    python bayes.py                                    sinusoids, the quarter of the phase is known, or is not
    python bayes.py --metadata amplitude               a noisy amplitude is known instead
    python bayes.py --drop_phi1                        without the two terms of phi1: what goes wrong
    python bayes.py --world omniglot                   N-way characters of one alphabet, whose name is the metadata
    python bayes.py --smoke                            a complete run in seconds

Measured on one thread of an Intel Xeon, three seeds: without a point the quarter of the phase gains 0.54 +- 0.01 nats
a target.
Results, calibration and what they teach: docs/bayes.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, VAL_SEED, Run, number, whole
from fewshot.learners.conv4 import Conv4
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.distributions import KnownBatch, OfAlphabet, Stream, known_sinusoids

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

UNUSED = ("--dtype", "--split", "--image_size", "--rotations")
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # of the predictive intervals


class Gaussian(NamedTuple):
    """Independent normal numbers; tensors of one shape."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std * noise: a sample whose gradient reaches mean and std."""
        return self.mean + self.std * noise

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """The log density of every element of x, in nats."""
        return -((x - self.mean) / self.std).square() / 2 - self.std.log() - math.log(2 * math.pi) / 2


def kl(q: Gaussian, p: Gaussian) -> torch.Tensor:
    """KL(q || p) of every element, in nats."""
    ratio = (q.std / p.std).square()
    return (ratio + ((q.mean - p.mean) / p.std).square() - 1 - ratio.log()) / 2


# ---------------------------------------------------------------------------------- the model


def network(*sizes: int) -> nn.Sequential:
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def gaussian(outputs: torch.Tensor) -> Gaussian:
    """The first half of the last dimension are means, the second half standard deviations above 0.01."""
    mean, raw = outputs.chunk(2, dim=-1)
    return Gaussian(mean, 0.01 + F.softplus(raw))


class Sinusoid(nn.Module):
    """The five densities for regression; phi1 [S, B, 1, D1], phi2 [S, B, 1, D2]: S samples of B tasks."""

    def __init__(self, phi1_dim: int, phi2_dim: int, hidden: int, metadata_dim: int = 6):
        super().__init__()
        self.sizes = 1, phi1_dim, phi2_dim
        self.pairs, self.read = network(2, hidden, hidden), network(hidden + 1, hidden, 2 * phi2_dim)
        self.upper = network(phi2_dim + metadata_dim, hidden, 2 * phi1_dim)
        self.prior = network(phi1_dim + metadata_dim, hidden, hidden, 2 * phi2_dim)
        self.decoder = network(phi2_dim + 1, hidden, hidden, hidden, 1)
        self.raw_noise = nn.Parameter(torch.zeros(()))

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def q2(self, x: torch.Tensor, y: torch.Tensor) -> Gaussian:
        """q(phi2 | X, Y): the pairs' features are averaged; beside the average stands how many there are."""
        pooled = self.pairs(torch.cat([x, y], -1)).sum(1, keepdim=True) / max(1, x.shape[1])  # [B, 1, hidden]
        count = pooled.new_full((len(pooled), 1, 1), math.log1p(x.shape[1]))
        return gaussian(self.read(torch.cat([pooled, count], dim=-1)))

    def q1(self, phi2: torch.Tensor, m: torch.Tensor) -> Gaussian:
        """q(phi1 | phi2, m)."""
        return gaussian(self.upper(beside(phi2.mean(dim=2, keepdim=True), m)))

    def p2(self, phi1: torch.Tensor, m: torch.Tensor) -> Gaussian:
        """p(phi2 | phi1, m)."""
        return gaussian(self.prior(beside(phi1, m)))

    def decode(self, phi2: torch.Tensor, x: torch.Tensor) -> Gaussian:
        """p(y | phi2, x): [S, B, P, 1]."""
        S, P = phi2.shape[0], x.shape[1]
        pairs = torch.cat([phi2.expand(-1, -1, P, -1), x.expand(S, *x.shape)], dim=-1)
        mean = self.decoder(pairs)
        return Gaussian(mean, (0.01 + F.softplus(self.raw_noise)).expand_as(mean))

    def log_likelihood(self, phi2: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """log p(y | phi2, x) of each point: [S, B, P]."""
        return self.decode(phi2, x).log_prob(y).sum(-1)


class Characters(Sinusoid):
    """The same for N-way classification: phi2 [S, B, N, D2] has a vector for every class, as prototypes do.

    Classes of an alphabet are alike: given phi1 they are independent. p(y | phi2, x) is a softmax over the negative
    squared distances of x's features to them. phi1 reads the average of the classes and of their squares.
    """

    def __init__(self, ways: int, phi1_dim: int, phi2_dim: int, hidden: int, metadata_dim: int, channels: int):
        super().__init__(phi1_dim, phi2_dim, hidden, metadata_dim)
        self.sizes = ways, phi1_dim, phi2_dim
        self.conv = Conv4(channels, strided=True)
        self.place = nn.Linear(self.conv.out_features, phi2_dim)
        self.read = network(phi2_dim + 1, hidden, 2 * phi2_dim)
        self.upper = network(2 * phi2_dim + metadata_dim, hidden, 2 * phi1_dim)
        del self.pairs, self.decoder

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, P, D2] of images; batch norm with all images of the task (transductive)."""
        return self.place(self.conv(x, norm="support", num_support=x.shape[1]))

    def q2(self, x: torch.Tensor, y: torch.Tensor) -> Gaussian:
        counts = y.sum(1)[..., None]  # [B, N, 1]
        pooled = y.mT @ x / counts.clamp_min(1)  # [B, N, D2]: the class means
        change = gaussian(self.read(torch.cat([pooled, counts.log1p()], dim=-1)))
        return Gaussian(pooled + change.mean, change.std)

    def q1(self, phi2: torch.Tensor, m: torch.Tensor) -> Gaussian:
        averages = torch.cat([phi2, phi2.square()], dim=-1).mean(dim=2, keepdim=True)
        return gaussian(self.upper(beside(averages, m)))

    def logits(self, phi2: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[S, B, P, N]."""
        return -torch.cdist(x.expand(len(phi2), *x.shape), phi2).square() / x.shape[-1] ** 0.5

    def log_likelihood(self, phi2: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.logits(phi2, x).log_softmax(-1) * y).sum(-1)


def beside(phi: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """phi [S, B, 1, D] and metadata [B, M] as [S, B, 1, D + M]."""
    return torch.cat([phi, m[:, None].expand(*phi.shape[:-1], -1)], dim=-1)


def total(log_density: torch.Tensor) -> torch.Tensor:
    """[S, B, ...] to [S, B]: independent numbers' log densities add."""
    return log_density.flatten(2).sum(-1)


def bound(model, x, y, m, noise2: torch.Tensor, noise1: torch.Tensor, drop_phi1: bool = False) -> torch.Tensor:
    """The five terms for each sample and task [S, B], in nats; their mean over samples is at most log p(Y | X, m).

    noise2 [S, B, G, D2] and noise1 [S, B, 1, D1]: standard normal numbers that phi2 and phi1 are made of. With
    drop_phi1 the terms log p(phi1) and -log q(phi1 | phi2, m) are left out, and it is no bound.
    """
    q2 = model.q2(x, y)
    phi2 = q2.sample(noise2)
    q1 = model.q1(phi2, m)
    phi1 = q1.sample(noise1)
    terms = total(model.log_likelihood(phi2, x, y)) + total(model.p2(phi1, m).log_prob(phi2)) - total(q2.log_prob(phi2))
    if drop_phi1:
        return terms
    return terms + total(standard_log_prob(phi1)) - total(q1.log_prob(phi1))


def standard_log_prob(x: torch.Tensor) -> torch.Tensor:
    """log N(x; 0, 1) of every element."""
    return -x.square() / 2 - math.log(2 * math.pi) / 2


def noise(model, S: int, B: int, g: torch.Generator | None = None, shard=(0, 1)) -> list[torch.Tensor]:
    """What `bound` makes S samples for B tasks of, [S, B, G, D2] and [S, B, 1, D1]: this process's share of all."""
    (G, D1, D2), (rank, world) = model.sizes, shard
    drawn = [torch.randn(S, world * B, *size, generator=g) for size in ((G, D2), (1, D1))]
    return [t[:, rank * B : (rank + 1) * B] for t in drawn]


def posterior(model, x, y, m, S: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S weighted samples of p(phi2 | X, Y, m): phi2 [S, B, G, D2], log weights [S, B] with sum 1, log p(Y | X, m) [B].

    Half of the samples come from the prior (phi1, then phi2), half from the encoder; each is weighed by the model's
    joint density over the average density of both sources (Veach, Guibas 1995, the balance heuristic). The mean weight
    estimates the evidence p(Y | X, m) without bias. The encoder alone does not see m; the weights do.
    """
    B, half = len(m), S // 2
    q2 = model.q2(x, y)
    noise2, noise1 = noise(model, 2 * half, B, g)
    prior1 = noise1[:half]
    phi2 = torch.cat([model.p2(prior1, m).sample(noise2[:half]), q2.sample(noise2[half:])])
    phi1 = torch.cat([prior1, model.q1(phi2[half:], m).sample(noise1[half:])])
    from_prior = total(standard_log_prob(phi1)) + total(model.p2(phi1, m).log_prob(phi2))
    from_encoder = total(q2.log_prob(phi2)) + total(model.q1(phi2, m).log_prob(phi1))
    joint = from_prior + total(model.log_likelihood(phi2, x, y))
    weights = joint - (torch.logaddexp(from_prior, from_encoder) - math.log(2))
    return phi2, weights.log_softmax(0), weights.logsumexp(0) - math.log(2 * half)


# ----------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(
    model, stream: Stream | OfAlphabet, num_tasks: int, sizes: list[int], samples: int, drop_phi1=False
) -> dict:
    """What the model predicts of the targets of the stream's first tasks, for contexts of `sizes` points (or shots).

    Returns, by (size, known): nll [tasks] (mean over targets, nats), evidence [tasks] of the context, its bound
    [tasks], the effective number of samples [tasks]; for sinusoids `place` [tasks, Q], the predictive distribution
    function at y, uniform if calibrated; for characters accuracy [tasks].
    """
    stream.reset()
    model.eval()
    found: dict = {}
    ways = model.sizes[0]
    done = 0
    while done < num_tasks:
        batch = stream.sample()
        features = model.inputs(torch.cat([batch.support_x, batch.query_x], dim=1))
        x, target_x = features.split([batch.support_x.shape[1], batch.query_x.shape[1]], dim=1)
        for size in sizes:
            for known in (True, False):
                g = torch.Generator().manual_seed(VAL_SEED + done)
                m = batch.m * float(known)
                context = x[:, : size * ways], batch.support_y[:, : size * ways]
                phi2, weights, evidence = posterior(model, *context, m, samples, g)
                claimed = bound(model, *context, m, *noise(model, 8, len(m), g), drop_phi1=drop_phi1)
                rows = {"evidence": evidence, "bound": claimed.mean(0), "effective": 1 / weights.exp().square().sum(0)}
                if isinstance(model, Characters):
                    shares = model.logits(phi2, target_x).log_softmax(-1) + weights[..., None, None]
                    shares = shares.logsumexp(0)  # [B, Q, N]
                    rows["accuracy"] = (shares.argmax(-1) == batch.query_y.argmax(-1)).float().mean(-1)
                    rows["nll"] = -(shares * batch.query_y).sum(-1).mean(-1)
                else:
                    y = model.decode(phi2, target_x)  # [S, B, Q, 1]
                    mixed = (y.log_prob(batch.query_y)[..., 0] + weights[..., None]).logsumexp(0)
                    below = torch.special.ndtr((batch.query_y - y.mean) / y.std)[..., 0]
                    rows |= {"nll": -mixed.mean(-1), "place": (weights.exp()[..., None] * below).sum(0)}
                for name, values in rows.items():
                    found.setdefault((size, known), {}).setdefault(name, []).append(values)
        done += len(batch.m)
    model.train()
    return {key: {k: torch.cat(v)[:num_tasks] for k, v in rows.items()} for key, rows in found.items()}


def coverage(place: torch.Tensor, level: float) -> torch.Tensor:
    """The share of each task's targets inside the central interval of that probability: [tasks]."""
    return ((place - 0.5).abs() <= level / 2).double().mean(dim=1)


def final_report(args, model, test: Stream) -> dict:
    """The curves by size and metadata as lists, with intervals; what metadata gains is paired by task."""
    sizes = args.sizes
    found = evaluate(model, test, args.num_test_tasks, sizes, args.test_samples, args.drop_phi1)
    metrics: dict = {
        "world": args.world,
        "metadata": args.metadata,
        "drop_phi1": args.drop_phi1,
        "points": sizes,
        "num_test_tasks": args.num_test_tasks,
    }
    for known, end in ((True, "with"), (False, "without")):
        rows = [found[size, known] for size in sizes]
        for name in set(rows[0]) - {"place"}:
            means = [experiment.mean_and_ci95(row[name]) for row in rows]
            metrics |= {f"{name}_{end}": [m for m, _ in means], f"{name}_{end}_ci95": [c for _, c in means]}
        if "place" in rows[0]:
            covered = [experiment.mean_and_ci95(coverage(row["place"], 0.9)) for row in rows]
            metrics |= {f"coverage90_{end}": [m for m, _ in covered], f"coverage90_{end}_ci95": [c for _, c in covered]}
            metrics[f"coverage_{end}"] = [[coverage(row["place"], v).mean().item() for v in LEVELS] for row in rows]
    gains = [experiment.mean_and_ci95(found[s, False]["nll"] - found[s, True]["nll"]) for s in sizes]
    return metrics | {
        "gain": [g for g, _ in gains],
        "gain_ci95": [c for _, c in gains],
        "levels": LEVELS,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def drawn_functions(model: Sinusoid, test: Stream, sizes=(0, 1, 3, 10), functions: int = 12) -> dict:
    """Functions from the posterior of the first test task, as lists: what the picture of posteriors shows."""
    test.reset()
    batch = KnownBatch(*(t[:1] for t in test.sample()))
    grid = torch.linspace(-math.pi, math.pi, 61).view(1, -1, 1)
    rounded = lambda t: [round(v, 2) for v in t.flatten().tolist()]
    drawn: dict = {"x": rounded(grid), "context_x": rounded(batch.support_x), "context_y": rounded(batch.support_y)}
    for size in [s for s in sizes if s <= batch.support_x.shape[1]]:
        for known in (True, False):
            g = torch.Generator().manual_seed(0)
            context = batch.support_x[:, :size], batch.support_y[:, :size], batch.m * float(known)
            phi2, weights, _ = posterior(model, *context, 2000, g)
            chosen = phi2[weights[:, 0].exp().multinomial(functions, replacement=True, generator=g)]
            curves = model.decode(chosen, grid).mean[:, 0, :, 0]
            drawn[f"{size}_{'with' if known else 'without'}"] = [rounded(curve) for curve in curves]
    return drawn


def posterior_figure(drawn: dict):
    """Columns: 0, 1, 3, 10 points; rows: with and without metadata. Functions drawn from the posterior."""
    from matplotlib.figure import Figure

    sizes = sorted({int(key.split("_")[0]) for key in drawn if key[0].isdigit()})
    figure = Figure(figsize=(2.6 * len(sizes), 4.2), layout="constrained")
    axes = figure.subplots(2, len(sizes), sharex=True, sharey=True, squeeze=False)
    for row, end in zip(axes, ("with", "without"), strict=True):
        for ax, size in zip(row, sizes, strict=True):
            for curve in drawn[f"{size}_{end}"]:
                ax.plot(drawn["x"], curve, color="#0072B2", lw=0.8, alpha=0.6)
            ax.plot(drawn["context_x"][:size], drawn["context_y"][:size], "k.")
            ax.spines[["top", "right"]].set_visible(False)
            if end == "with":
                ax.set_title(f"{size} point{'s' * (size != 1)}", fontsize=10)
        row[0].set_ylabel(f"{end} metadata")
    return figure


# --------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__,
        without=UNUSED,
        num_shot=None,
        num_query=None,
        meta_batch_size=None,
        train_steps=None,
        eval_freq=500,
        num_test_tasks=2000,
        num_val_tasks=200,
    )
    parser.prog = "bayes.py"
    own = "; None: the world's own"
    add = groups["data"].add_argument
    add("--world", choices=["sinusoid", "omniglot"], default="sinusoid", help="what the tasks are made of")
    add("--metadata", choices=["phase", "amplitude"], default="phase", help="what is known of a sinusoid beforehand")
    add("--forget", type=number(0, 1), default=0.5, help="share of training tasks whose metadata is withheld")
    add = groups["model"].add_argument
    add("--phi1_dim", type=whole(1, 16384), default=4, help="dimensions of phi1")
    add("--phi2_dim", type=whole(1, 16384), help="dimensions of phi2, for characters of each class" + own)
    add("--hidden_dim", type=whole(1, 16384), default=64, help="units of each hidden layer")
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=2e-3, help="of Adam; falls to 0 in a line")
    add("--samples", type=whole(1), default=1, help="of phi1 and phi2 for each task in training")
    add("--drop_phi1", action="store_true", help="leave out the two terms of phi1: no bound any more")
    groups["evaluation"].add_argument("--test_samples", type=whole(2), default=200, help="of the posterior of a task")
    smoke = {"train_steps": 20, "eval_freq": 10, "num_val_tasks": 20, "num_test_tasks": 40, "test_samples": 20}
    shapes = ("world", "num_classes", "phi1_dim", "phi2_dim", "hidden_dim")
    args = experiment.parse(parser, argv, smoke, fixed=shapes)
    characters = args.world == "omniglot"
    own = {
        "num_shot": (10, 5),
        "num_query": (20, 5),
        "meta_batch_size": (64, 4),
        "train_steps": (6000, 2000),
        "phi2_dim": (8, 64),
    }
    for name, values in own.items():
        if getattr(args, name) is None:
            setattr(args, name, values[characters])
    if not characters:
        args.num_classes = 1
    args.sizes = [s for s in (1, 2, 5) if s <= args.num_shot] if characters else list(range(args.num_shot + 1))
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)  # the networks are small: they stay on the CPU
    dataset = load_for(args) if args.world == "omniglot" else None

    def stream(part: str, seed: int, B: int, shard: tuple[int, int] = (0, 1)) -> Stream | OfAlphabet:
        K, Q = args.num_shot, args.num_query
        if dataset:
            return OfAlphabet(dataset, part, args.num_classes, K, Q, B, seed, shard)
        return Stream(lambda B, g: known_sinusoids(B, K, Q, g, args.metadata), seed, B, shard)

    shard = experiment.shard()
    train = stream("train", args.random_seed, args.meta_batch_size, shard=shard)
    val, test = (stream(part, seed, 20 if dataset else 50) for part, seed in (("val", VAL_SEED), ("test", TEST_SEED)))
    if dataset:
        model: Sinusoid = Characters(
            args.num_classes,
            args.phi1_dim,
            args.phi2_dim,
            args.hidden_dim,
            train.num_alphabets + 1,
            dataset.images.shape[1],
        )
    else:
        model = Sinusoid(args.phi1_dim, args.phi2_dim, args.hidden_dim)
    name = dataset.name if dataset else "sinusoids"
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        return experiment.report(args, "bayes", name, {"best_step": step} | final_report(args, model, test))

    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / args.train_steps)
    run = Run(args, "bayes", name)
    run.track(model=model, optimizer=optimizer, schedule=schedule, sampler=train)
    for _ in run.steps():
        batch = train.sample()
        B, ways = len(batch.m), model.sizes[0]
        rank, world = shard
        m = batch.m * (torch.rand(world * B, 1) >= args.forget)[rank * B : (rank + 1) * B]
        x = model.inputs(torch.cat([batch.support_x, batch.query_x], dim=1))
        y = torch.cat([batch.support_y, batch.query_y], dim=1)
        sizes = ways * int(torch.randint(args.num_shot + 1, ())), x.shape[1]  # the context, then all points
        loss = torch.zeros(())
        for n in sizes:
            made_of = noise(model, args.samples, B, None, shard)
            loss = loss - bound(model, x[:, :n], y[:, :n], m, *made_of, args.drop_phi1).mean() / sum(sizes)
        optimizer.zero_grad()
        loss.backward()
        experiment.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                sizes = [args.sizes[0], args.sizes[len(args.sizes) // 3], args.sizes[-1]]  # for all contexts alike
                found = evaluate(model, val, args.num_val_tasks, sizes, args.test_samples)
            scalars = {
                f"Loss/val_{'with' if known else 'without'}_{size}": rows["nll"].mean().item()
                for (size, known), rows in found.items()
            }
            scalars["Loss/val"] = sum(scalars.values()) / len(scalars)
            if dataset:
                scalars["Accuracy/val"] = found[sizes[0], True]["accuracy"].mean().item()
            run.evaluated(-scalars["Loss/val"], scalars)  # the best is the one of the least loss
    run.load_best(model)
    metrics = final_report(args, model, test) | {"device": experiment.device_name(device)}
    if not dataset:
        metrics["functions"] = drawn_functions(model, test)
        if run.writes:
            run.writer.add_figure("posterior", posterior_figure(metrics["functions"]), run.step)
    return run.finish(metrics)


if __name__ == "__main__":
    experiment.run_script(main)
