"""Feature weights for 1-D functions: the smallest problem in which meta-learning repairs regression.

A task is a function y = sum over s in S of alpha_s phi_s(x) of a few out of d Fourier features, orthonormal under
x ~ U(-1, 1). With fewer points than features the min-norm solution spreads over all features that look alike on the
points (aliases). Learning one weight c_k per feature, y = sum over k of beta_k c_k phi_k(x), through that solution
makes the features in S cheap and their aliases expensive. After the homework "meta-learning for learning 1-D
functions" (Berkeley CS 182), whose parts are named here.

    python feature_weights.py --part alias             (d) one feature and its alias: where gradient descent goes
    python feature_weights.py --part closed_form       (e) the inner solution in closed form
    python feature_weights.py --part gradient          (f) by 5 gradient steps, then by 1
    python feature_weights.py --part classification    (g) labels are signs, same regression
    python feature_weights.py --part logistic          (h) inner loop logistic regression
    python feature_weights.py                          all of them
    python feature_weights.py --smoke                  all of them, tiny, in seconds
    python reproduce.py report --run RUN_DIR           draws one of them

Shapes: d features, n training points, T tasks. Tasks that share their points (a grid) are the columns of one group,
[1, ..., n, T]; tasks with points of their own are groups of one column, [T, ..., n, 1].

Measured: test error at 32 points 0.32 with meta-learned weights, 0.93 with weights 1 (closed form, over 600 tasks).
Everything else: docs/feature_weights.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, Diverged, Run, UserError, number, whole

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

PARTS = ("alias", "closed_form", "gradient", "classification", "logistic")
GD_STEPS = {"gradient": [5, 1], "logistic": [10]}  # inner steps of the parts that take steps
OPTIMIZERS = {"closed_form": ["sgd", "adam"]}  # of the feature weights; elsewhere sgd alone
LEARNING_RATE = {"closed_form": 0.1, "gradient": 0.1, "classification": 0.3, "logistic": 1.0}  # of sgd
ADAM = 0.01  # learning rate of adam
# 0.032 is n / (2 d): with all weights 1 one step on the grid is then nearly the min-norm solution, within 4 %. It would
# be exact if all eigenvalues of A A^T were d = 500; at 32 points they are 480 to 512.
INNER_LR = {"gradient": 0.032, "logistic": 0.128}
ALIAS_STARTS = [(1.0, 1.0), (0.5, 1.5), (-1.2, 0.4), (0.3, -0.6)]
MEASURED_FLAGS = (
    "part",
    "points",
    "num_features",
    "num_true",
    "num_points",
    "num_gd_steps",
    "inner_lr",
    "optimizer",
    "learning_rate",
    "meta_batch_size",
    "train_steps",
    "num_test_tasks",
)
UNUSED = (
    "--allow_overlap",
    "--allow_new_classes",
    "--out",
    "--dtype",
    "--test",
    "--checkpoint",
    "--dataset",
    "--data_folder",
    "--split",
    "--image_size",
    "--num_classes",
    "--num_shot",
    "--num_query",
    "--rotations",
    "--patience",
    "--num_val_tasks",
)

# ---------------------------------------------------------------------- (d) one feature, one alias


def alias_solution(c: torch.Tensor) -> torch.Tensor:
    """Min-norm beta [..., 2] with beta_0 c_0 + beta_1 c_1 = 1: beta = c / ||c||^2, for weights c [..., 2]."""
    return c / c.square().sum(-1, keepdim=True)


def alias_loss(c: torch.Tensor) -> torch.Tensor:
    """Expected squared error [...] when the two features part again: (1 - c_0 beta_0)^2 + (c_1 beta_1)^2."""
    learned = c * alias_solution(c)
    return (1 - learned[..., 0]).square() + learned[..., 1].square()


def alias_gradient(c: torch.Tensor) -> torch.Tensor:
    """Derivative of alias_loss = 2 c_1^4 / ||c||^4 to c: 8 c_0 c_1^3 / ||c||^6 (-c_1, c_0), at a right angle to c."""
    c0, c1 = c.unbind(-1)
    return (8 * c0 * c1**3 / c.square().sum(-1) ** 3)[..., None] * torch.stack([-c1, c0], -1)


def alias_descent(start: torch.Tensor, learning_rate: float, growth: float, steps: int) -> torch.Tensor:
    """Gradient descent from `start` [B, 2]: all iterates [steps + 1, B, 2].

    The slope vanishes as c_1^3, so that at a constant step c_1 falls like 1/sqrt(steps). The step therefore
    grows by `growth` each time; c_1 then falls geometrically, and the product of step and curvature stays small.
    """
    path, c = [start], start
    for step in tqdm(range(steps), unit="step", leave=False, disable=None):
        c = c - learning_rate * (1 + growth) ** step * alias_gradient(c)
        path.append(c)
    return torch.stack(path)


# ------------------------------------------------------------------------------- features and tasks


def fourier_features(x: torch.Tensor, d: int) -> torch.Tensor:
    """1, sqrt2 sin(pi x), sqrt2 cos(pi x), sqrt2 sin(2 pi x), ... [..., d], orthonormal under U(-1, 1), at x [...]."""
    angle = math.pi * x[..., None] * torch.arange(1, d // 2 + 1, dtype=x.dtype, device=x.device)
    waves = math.sqrt(2) * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)
    return torch.cat([torch.ones_like(x)[..., None], waves], dim=-1)[..., :d]


def training_points(kind: str, groups: int, sizes: torch.Tensor, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Points x [groups, sizes, n_max] in [-1, 1), and which of them are there (n_max is the largest size).

    grid: -1 + 2 i / n; the end point is left out, since all features have period 2. random: uniform.
    """
    i, sizes = torch.arange(int(sizes.max()), device=device), sizes.to(device)[:, None]
    grid = (-1 + 2 * i / sizes.double()).expand(groups, -1, -1)
    x = grid if kind == "grid" else 2 * torch.rand(grid.shape, dtype=torch.float64, device=device) - 1
    return x, (i < sizes).expand(groups, -1, -1)


def sample_tasks(num_tasks: int, num_true: int, points: str, device=None) -> torch.Tensor:
    """Coefficients alpha, uniform, then of norm 1: [1, 1, num_true, T] on a grid, [T, 1, num_true, 1] if random."""
    alpha = F.normalize(2 * torch.rand(num_tasks, num_true, dtype=torch.float64, device=device) - 1, dim=1)
    return alpha.T[None, None] if points == "grid" else alpha[:, None, :, None]


def alias_mask(d: int, num_true: int, n: int) -> torch.Tensor:
    """Which of the d features are outside S and look like a feature of S, up to sign, on n grid points: bool [d]."""
    x, _ = training_points("grid", 1, torch.tensor([n]))
    features = fourier_features(x[0, 0], d)
    overlap = (features[:, :num_true].T @ features / n).abs().amax(dim=0)  # 0 or 1 on the grid, sqrt2 at frequency 0
    overlap[:num_true] = 0
    return overlap > 0.5


# ------------------------------------------------------------------------------- the inner learners


def min_norm(A: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """argmin ||beta|| over the least-squares solutions of A beta = y: [..., n, d], [..., n, T] -> beta [..., d, T].

    The pseudo-inverse by SVD, because weights make A rank-deficient: with fewer features than points (the oracle)
    A A^T is singular, and lstsq's default driver on a CPU (gelsy) gave wrong solutions there, its only one on a
    GPU (gels) assumes full rank. Its derivative (Golub and Pereyra) never divides by differences of singular
    values, unlike that of an SVD written out; on a grid they coincide in pairs.
    """
    return torch.linalg.pinv(A) @ y


def regression_steps(A: torch.Tensor, y: torch.Tensor, n: torch.Tensor, steps: int, lr: float) -> torch.Tensor:
    """beta after `steps` gradient steps from 0 on the mean squared error over n points; shapes as in min_norm."""
    beta = A.new_zeros(A.shape[-1], y.shape[-1])
    for _ in range(steps):
        beta = beta - lr * 2 / n * (A.mT @ (A @ beta - y))
    return beta


def logistic_steps(A: torch.Tensor, y: torch.Tensor, n: torch.Tensor, steps: int, lr: float) -> torch.Tensor:
    """beta after `steps` gradient steps from 0 on the mean of log(1 + exp(-y A beta)), for labels y = +-1."""
    beta = A.new_zeros(A.shape[-1], y.shape[-1])
    for _ in range(steps):
        beta = beta + lr / n * (A.mT @ (y * torch.sigmoid(-y * (A @ beta))))
    return beta


def adapt(c: torch.Tensor, phi: torch.Tensor, y: torch.Tensor, n: torch.Tensor, args) -> torch.Tensor:
    """The function learned from the points: coefficients c * beta [..., d, T] of the features.

    phi [..., n, d] and y [..., n, T] may end in rows of zeros, which change no solution; n counts the others.
    """
    A = phi * c
    if args.part in ("closed_form", "classification"):
        beta = min_norm(A, y)
    else:
        learner = regression_steps if args.part == "gradient" else logistic_steps
        beta = learner(A, y, n, args.num_gd_steps, args.inner_lr)
    return c[:, None] * beta


# ------------------------------------------------------------------------- meta-training, evaluation


def labels(values: torch.Tensor, part: str) -> torch.Tensor:
    """What is to be learned of the function's values: themselves, or (parts g and h) their signs."""
    return values.sign() if part in ("classification", "logistic") else values


def meta_loss(c: torch.Tensor, alpha: torch.Tensor, x: torch.Tensor, fresh: torch.Tensor, args) -> torch.Tensor:
    """Loss on `fresh` points [M] of the functions alpha that are learned from the points x [groups, 1, n].

    Mean squared error; in part (h) the logistic loss. Differentiable to the weights c [d].
    """
    S, n = alpha.shape[-2], x.shape[-1]
    phi, phi_fresh = fourier_features(x, len(c)), fourier_features(fresh, len(c))
    learned = adapt(c, phi, labels(phi[..., :S] @ alpha, args.part), torch.tensor(n, dtype=torch.float64), args)
    prediction, truth = phi_fresh @ learned, labels(phi_fresh[:, :S] @ alpha, args.part)
    if args.part == "logistic":
        return F.softplus(-truth * prediction).mean()
    return (prediction - truth).square().mean()


@torch.no_grad()
def test_curve(c: torch.Tensor, sizes: torch.Tensor, args, device=None, chunk: int = 4) -> torch.Tensor:
    """Test error of each task after learning from each number of points: [sizes, T], the same tasks for every c.

    Regression: the expected squared error over x ~ U(-1, 1), which for orthonormal features is exactly
    ||c beta - alpha||^2. Classification: the fraction of wrong signs on 200 uniform points.
    """
    S, kind = args.num_true, args.points
    with torch.random.fork_rng(devices=[]):  # the training stream does not depend on evaluations
        torch.manual_seed(TEST_SEED)
        alpha = sample_tasks(args.num_test_tasks, S, kind)
        x, there = training_points(kind, len(alpha), sizes)
        phi_fresh = fourier_features(2 * torch.rand(200, dtype=torch.float64) - 1, args.num_features).to(device)
    errors = []
    # All sizes and, on a grid, all tasks are one batch; own points for each task would need gigabytes.
    for a, points, real in zip(alpha.split(chunk), x.split(chunk), there.split(chunk), strict=True):
        a, points, real = a.to(device), points.to(device), real.to(device)
        phi = fourier_features(points, args.num_features) * real[..., None]
        y = labels(phi[..., :S] @ a, args.part)
        learned = adapt(c, phi, y, real.sum(-1)[..., None, None].double(), args)  # [groups, sizes, d, T]
        if args.part in ("classification", "logistic"):
            wrong = (phi_fresh @ learned).sign() != (phi_fresh[:, :S] @ a).sign()
            error = wrong.double().mean(dim=-2)
        else:
            error = (learned[..., :S, :] - a).square().sum(-2) + learned[..., S:, :].square().sum(-2)
        errors.append(error.permute(1, 0, 2).flatten(1))
    return torch.cat(errors, dim=1)


class FeatureWeights(nn.Module):
    """The meta-parameters c [d], 1 at first, and their history [evaluations + 1, d] for the figure."""

    def __init__(self, d: int, evaluations: int):
        super().__init__()
        self.c = nn.Parameter(torch.ones(d, dtype=torch.float64))
        self.register_buffer("history", torch.ones(evaluations + 1, d, dtype=torch.float64))


def meta_train(args, device: torch.device) -> tuple[Run, FeatureWeights]:
    """Gradient descent on c: in each step new tasks, and new uniform points for the meta-loss."""
    model = FeatureWeights(args.num_features, math.ceil(args.train_steps / args.eval_freq)).to(device)
    make = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
    optimizer = make(model.parameters(), args.learning_rate)
    groups = 1 if args.points == "grid" else args.meta_batch_size
    size = torch.tensor([args.num_points])
    kinds = groups_of_features(args)
    run = Run(args, "feature_weights", args.name)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps():
        alpha = sample_tasks(args.meta_batch_size, args.num_true, args.points, device)
        x, _ = training_points(args.points, groups, size, device)
        fresh = 2 * torch.rand(args.num_fresh, dtype=torch.float64, device=device) - 1
        loss = meta_loss(model.c, alpha, x, fresh, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not model.c.isfinite().all():  # before the next pseudo-inverse fails on it
            raise Diverged(f"the feature weights are no longer finite at step {step}; lower --learning_rate")
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped(), torch.no_grad():
                model.history[math.ceil(step / args.eval_freq)] = model.c
                error = test_curve(model.c, size, args, device).mean().item()
                for name, k in kinds.items():
                    if k.any():
                        run.writer.add_histogram(f"Weights/{name}", model.c.cpu()[k], step)
            run.evaluated(None, {"Loss/test" if regression(args) else "Error/test": error})
    return run, model


def regression(args) -> bool:
    return args.part in ("closed_form", "gradient")


# --------------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, without=UNUSED, meta_batch_size=16, train_steps=600, eval_freq=20, num_test_tasks=600
    )
    parser.prog = "feature_weights.py"
    add = groups["run"].add_argument
    add("--part", choices=[*PARTS, "all"], default="all", help="of the homework: d, e, f, g, h")
    add("--out", metavar="DIR", help="add the results to features.json there, which `reproduce.py report` draws")
    add = groups["data"].add_argument
    add("--num_features", type=whole(2), default=500, metavar="d", help="Fourier features")
    add("--num_true", type=whole(1), default=11, help="features in S: the first ones")
    add("--points", choices=["grid", "random"], default="grid", help="training points of a task")
    add("--num_points", type=whole(1), default=32, metavar="n", help="training points of a task in meta-training")
    add("--num_fresh", type=whole(1), default=128, help="uniform points of the meta-loss in each step")
    add = groups["model"].add_argument
    add("--num_gd_steps", type=whole(1), help=f"inner gradient steps (default: {GD_STEPS})")
    add("--inner_lr", type=number(above=True), help=f"of these steps (default: {INNER_LR})")
    add = groups["optimisation"].add_argument
    add("--optimizer", choices=["sgd", "adam"], help="of the feature weights (default: sgd; closed_form: both)")
    add("--learning_rate", type=number(above=True), help=f"of adam (default: {ADAM}) or sgd (default: {LEARNING_RATE})")
    add("--alias_learning_rate", type=number(above=True), default=1e-3, help="part alias: first step size")
    add("--alias_growth", type=number(0, 0.1), default=1e-3, help="part alias: growth of the step size in each step")
    add("--alias_steps", type=whole(1), default=30_000, help="part alias: steps")
    add = groups["evaluation"].add_argument
    add("--max_points", type=whole(1), default=64, help="the curves go from 1 to this many training points")
    smoke = {
        "train_steps": 20,
        "eval_freq": 10,
        "num_test_tasks": 20,
        "num_features": 100,
        "max_points": 40,
        "alias_steps": 3000,
        "alias_growth": 1e-2,
    }
    args = experiment.parse(parser, argv, smoke, longer=lambda flags: None)  # its learning rate is constant
    args.patience = 0  # the last weights count; there is no early stop
    if args.num_true > args.num_features:
        raise UserError(f"--num_true {args.num_true} is more than --num_features {args.num_features}; use fewer")
    if args.num_points > args.max_points:
        raise UserError(f"--num_points {args.num_points} is beyond the curves; use --max_points {args.num_points}")
    if args.out:
        read_results(Path(args.out))  # refused now rather than after the work
    return args


def trainings(args) -> list[argparse.Namespace]:
    """The flags of each meta-training of --part; what was left open is filled in for the part."""
    planned = []
    for part in PARTS[1:] if args.part == "all" else [args.part]:
        inner = [args.num_gd_steps] if args.num_gd_steps else GD_STEPS[part] if part in GD_STEPS else [None]
        for steps in inner if part in GD_STEPS else [None]:
            for optimizer in [args.optimizer] if args.optimizer else OPTIMIZERS.get(part, ["sgd"]):
                one = argparse.Namespace(**vars(args))
                one.part, one.num_gd_steps, one.optimizer = part, steps, optimizer
                one.inner_lr = args.inner_lr or INNER_LR.get(part)
                one.learning_rate = args.learning_rate or (LEARNING_RATE[part] if optimizer == "sgd" else ADAM)
                one.name = part + (f"_{steps}_steps" if steps else "") + ("_adam" if optimizer == "adam" else "")
                one.name += "_random" if args.points == "random" else ""
                one.out = None  # a resumed run does not replace the results of all
                planned.append(one)
    if args.run_name and len(planned) > 1:
        for one in planned:
            one.run_name = f"{args.run_name}_{one.name}"
    return planned


def groups_of_features(args) -> dict[str, torch.Tensor]:
    """bool [d] of the features in S, of their aliases on the grid of the meta-training, and of all others."""
    in_S = torch.arange(args.num_features) < args.num_true
    aliases = alias_mask(args.num_features, args.num_true, args.num_points)
    return {"S": in_S, "aliases": aliases, "others": ~in_S & ~aliases}


def untrained_aliases(args, n: int) -> float:
    """The part of the features looking like S on n grid points that did not do so in the meta-training."""
    now = alias_mask(args.num_features, args.num_true, n)
    return (now & ~groups_of_features(args)["aliases"]).sum().item() / max(1, now.sum().item())


def measure(args, device: torch.device) -> dict:
    """One meta-training; its metrics with the test curves beside those of weights 1 and of the oracle."""
    run, model = meta_train(args, device)
    sizes = torch.arange(1, args.max_points + 1)
    # To gradient steps the size of the weights matters: at 1 / sqrt(2 lr) one step of regression is exact.
    scale = 1 / math.sqrt(2 * args.inner_lr) if args.part == "gradient" else 1.0
    oracle = scale * (torch.arange(args.num_features, device=device) < args.num_true).double()
    weights = {"meta": model.c.detach(), "ones": torch.ones_like(oracle), "oracle": oracle}
    errors = {name: test_curve(c, sizes, args, device).cpu() for name, c in weights.items()}
    n, c = args.num_points, model.c.detach().cpu()
    shown = sorted({m for m in (n // 2, n - 1, n, n + 1, 2 * n) if 0 < m <= args.max_points})
    above = (errors["meta"].mean(dim=1) > errors["ones"].mean(dim=1) + 1e-12).nonzero().flatten()
    metrics = {
        "error": "expected squared error" if regression(args) else "fraction of wrong signs",
        "errors": {name: spread(error) for name, error in errors.items()},
        "history": history(model, args),
        **{name: {str(m): errors[name][m - 1].mean().item() for m in shown} for name in weights},
        "ci95": {name: {str(m): experiment.mean_and_ci95(errors[name][m - 1])[1] for m in shown} for name in weights},
        "at_most_ones_from": int(above[-1]) + 2 if len(above) else 1,  # number of points
        "untrained_aliases": {str(m): untrained_aliases(args, m) for m in shown},
        "weights": {
            name: {"min": c[k].min().item(), "mean": c[k].mean().item(), "max": c[k].max().item()}
            for name, k in groups_of_features(args).items()
            if k.any()
        },
        **{flag: getattr(args, flag) for flag in MEASURED_FLAGS},
        "train_seconds": round(run.seconds, 2),
        "device": experiment.device_name(device),
    }
    run.writer.close()
    print(f"\n{args.name}: {metrics['error']} after learning from m points")
    print("".join(f"{x:>12}" for x in ("m", *weights)))
    for m in shown:
        print(f"{m:12d}" + "".join(f"{metrics[name][str(m)]:12.3g}" for name in weights))
    print("weights: " + ", ".join(f"{k} {w['min']:.3g} to {w['max']:.3g}" for k, w in metrics["weights"].items()))
    return experiment.report(args, "feature_weights", args.name, metrics, run.folder / "metrics.json")


def spread(errors: torch.Tensor) -> dict[str, list[float]]:
    """Mean and 10 to 90 % of the tasks' errors [sizes, T] at each number of points, with four digits."""
    rows = {"mean": errors.mean(1), "p10": errors.quantile(0.1, dim=1), "p90": errors.quantile(0.9, dim=1)}
    return {name: [float(f"{v:.4g}") for v in row.tolist()] for name, row in rows.items()}


def history(model: FeatureWeights, args) -> dict:
    """At each evaluation the step and the smallest, mean and largest weight of each group of features."""
    past, kept = model.history.cpu(), {}
    for name, k in groups_of_features(args).items():
        if k.any():
            rows = torch.stack([past[:, k].amin(1), past[:, k].mean(1), past[:, k].amax(1)], dim=1)
            kept[name] = [[round(v, 4) for v in row] for row in rows.tolist()]
    return {"steps": [min(i * args.eval_freq, args.train_steps) for i in range(len(past))]} | kept


def alias_part(args) -> dict:
    """Gradient descent from each of ALIAS_STARTS: start, norm, end and path, printed and returned."""
    run = Run(args, "feature_weights", "alias")
    start = torch.tensor(ALIAS_STARTS, dtype=torch.float64)
    path = alias_descent(start, args.alias_learning_rate, args.alias_growth, args.alias_steps)
    end, beta = path[-1], alias_solution(path[-1])
    print("\nalias: gradient descent on the weights of a feature and of its alias")
    for i, first in enumerate(ALIAS_STARTS):
        norm = start[i].norm().item()
        print(
            f"start {first}, norm {norm:.6f}; end ({end[i, 0]:.6f}, {end[i, 1]:.1e}); "
            f"beta ({beta[i, 0]:.6f}, {beta[i, 1]:.1e}), 1 / norm {1 / norm:.6f}"
        )
    metrics = {
        "start": start.tolist(),
        "norm": start.norm(dim=1).tolist(),
        "end": end.tolist(),
        "beta": beta.tolist(),
        "meta_loss": [alias_loss(start).tolist(), alias_loss(end).tolist()],
        "steps": args.alias_steps,
        "learning_rate": args.alias_learning_rate,
        "growth": args.alias_growth,
        "path": thin(path),
    }
    run.track()
    for step in range(0, args.alias_steps + 1, max(1, args.alias_steps // 100)):
        for i in range(len(ALIAS_STARTS)):
            run.writer.add_scalars(f"Weights/start {i}", {"c0": path[step, i, 0], "c1": path[step, i, 1]}, step)
    run.writer.close()
    return experiment.report(args, "feature_weights", "alias", metrics, run.folder / "metrics.json")


def thin(path: torch.Tensor, points: int = 150) -> list:
    """[[step, iterates [B, 2]], ...] of a path [steps + 1, B, 2]: the start, then steps evenly spaced in logarithm."""
    steps = torch.logspace(0, math.log10(len(path) - 1), points).round().long().unique()
    return [[step, [[float(f"{v:.5g}") for v in c] for c in path[step].tolist()]] for step in [0, *steps.tolist()]]


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    results = {}
    if args.part in ("alias", "all"):
        one = argparse.Namespace(**vars(args) | {"part": "alias"})
        if args.run_name and args.part == "all":
            one.run_name = f"{args.run_name}_alias"
        results["alias"] = alias_part(one)
    for one in trainings(args) if args.part != "alias" else []:
        experiment.setup(one)  # each meta-training has the stream that it would have alone
        results[one.name] = measure(one, device)
    if args.out:
        write_results(Path(args.out), results)
    if len(results) > 1:
        print(json.dumps(results))
    return results


def read_results(folder: Path) -> dict:
    """What features.json holds so far; UserError when it, or the folder, cannot be used."""
    if not folder.is_dir():
        raise UserError(f"--out {folder} is not a folder; create it first")
    return experiment.read_json(folder / "features.json", "out") if (folder / "features.json").exists() else {}


def write_results(folder: Path, results: dict) -> None:
    """features.json with the parts of this run replaced; `reproduce.py report` draws it."""
    experiment.write_json(folder / "features.json", read_results(folder) | results)


if __name__ == "__main__":
    experiment.run_script(main)
