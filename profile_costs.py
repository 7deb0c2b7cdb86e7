"""What meta-learning costs: runtime and peak memory of MAML and of Evolution Strategies, and why.

Both look for an initialisation theta from which a few gradient steps fit a new sinusoid. MAML (Finn et al. 2017)
differentiates through the inner steps exactly, so all of them stay in memory until the backward pass. Evolution
Strategies (Salimans et al. 2017; Song et al. 2020, "ES-MAML") only compare the losses that theta + sigma*eps and
theta - sigma*eps reach after adaptation: nothing is kept, and the gradient is a noisy estimate. Beside them:
first-order MAML, and MAML that keeps only every sqrt(steps)-th inner step and computes the others again.

    python profile_costs.py --sweep all                        three sweeps, as CSV and JSON
    python profile_costs.py --sweep all --engine auto          the same with every engine, for comparison
    python profile_costs.py --inner_steps 20 --hidden_dim 64  one setting
    python profile_costs.py --train                            train with MAML and with ES
    python profile_costs.py --smoke                            a complete run in seconds
    python reproduce.py report --results runs/costs            draws what the sweeps and the training have written

What is measured is an outer step: sampling the tasks, the meta-gradient, the optimiser. Memory is the peak of what
the step allocates above what was there before it (parameters and optimiser state): on a GPU as CUDA's allocator
reports it, on a CPU as the profiler's record of all allocations and releases has it, the same in every run.

Measured: mean squared error after 1,500 outer steps MAML 0.0156 ± 0.0021, ES 0.2389 ± 0.0099 (over 600 tasks).
Everything else: docs/profile_costs.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole
from fewshot.learners.mlp import (
    Initialisation,
    inner_step_in_factors,
    inner_step_in_place,
    inputs_and_errors,
    mse,
    predict,
    recomputed,
)

import argparse
import math
from functools import partial

import torch

from bench.meters import clock, cost
from bench.sweeps import fits_and_losses, measure_points, output_folder, write_sweep

METHODS = ("maml", "es", "fomaml", "checkpoint")
LABELS = {"maml": "MAML", "es": "Evolution Strategies", "fomaml": "first-order MAML", "checkpoint": "checkpointed MAML"}
ENGINES = {method: ("vmap", "loop") for method in METHODS} | {"maml": ("vmap", "loop", "factors")}
SWEEPS = {"inner_steps": (1, 2, 5, 10, 15, 20), "layers": (1, 2, 3, 4, 6), "hidden_dim": (32, 64, 128, 256, 512)}
SMOKE_SWEEPS = {"inner_steps": (1, 2, 4), "layers": (1, 2, 3), "hidden_dim": (8, 16, 32)}
UNUSED = """--out --dtype --test --checkpoint --dataset --data_folder --split --image_size --num_classes
--allow_overlap --allow_new_classes --rotations --train_steps --patience""".split()

# ------------------------------------------------------------------------- the study: MAML and ES


def sample_tasks(B: int, K: int, Q: int, device=None, dtype=torch.float32):
    """B sinusoids a sin(x + phase) + bias: support x, y [B, K, 1] at random, query x, y [B, Q, 1] on a grid.

    x in [0, 2 pi], a ~ U(0.5, 1), phase ~ U(0, 2 pi), bias ~ U(-0.3, 0.3); all from torch's global generator, whose
    state checkpoints hold.
    """
    a, phase, bias, x = torch.rand(B, 3 + K, 1, device=device, dtype=dtype).split([1, 1, 1, K], dim=1)
    x = 2 * math.pi * x
    query_x = torch.linspace(0, 2 * math.pi, Q, device=device, dtype=dtype).view(1, Q, 1).expand(B, Q, 1)
    curve = lambda x: (0.5 + 0.5 * a) * torch.sin(x + 2 * math.pi * phase) + 0.6 * bias - 0.3
    return x, curve(x), query_x, curve(query_x)


def inner_step(layers: list[tuple], x: torch.Tensor, y: torch.Tensor, rate: float, second_order: bool = True):
    """phi <- phi - rate * dL/dphi on the support set (MAML, eq. 1), in new tensors, one network a task."""
    with torch.set_grad_enabled(second_order and torch.is_grad_enabled()):
        pairs = inputs_and_errors(layers, x, y)  # first order: a constant
    return [
        (torch.baddbmm(W.expand(len(x), *W.shape[-2:]), a.mT, d, alpha=-rate), b - rate * d.sum(-2, keepdim=True))
        for (W, b), (a, d) in zip(layers, pairs, strict=True)
    ]


def adapt(layers: list[tuple], x: torch.Tensor, y: torch.Tensor, rate: float, steps: int, method: str, engine: str):
    """The layers after `steps` inner steps on the support set, differentiable as the method wants it."""
    if method == "checkpoint":
        return recomputed(lambda layers: inner_step(layers, x, y, rate), layers, steps)
    for _ in range(steps):
        if engine == "factors":
            layers = inner_step_in_factors(layers, x, y, rate)
        else:
            layers = inner_step(layers, x, y, rate, second_order=method != "fomaml")
    return layers


def maml_gradient(model: Initialisation, tasks, rate: float, steps: int, at_once: int, method="maml", engine="vmap"):
    """Add the gradient of the tasks' mean query loss after adaptation to theta.grad; returns that loss.

    `at_once` tasks are adapted together; their graph is freed before the next ones are.
    """
    B, total = len(tasks[0]), 0.0
    for begin in range(0, B, at_once):
        x, y, query_x, query_y = (t[begin : begin + at_once] for t in tasks)
        loss = mse(adapt(model(), x, y, rate, steps, method, engine), query_x, query_y).sum() / B
        loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def es_gradient(model: Initialisation, tasks, rate: float, steps: int, at_once: int, perturbations: int, sigma: float):
    """Write the antithetic estimate of the gradient to theta.grad; returns the mean loss of the perturbed networks.

    g = mean over pairs of (J(theta + sigma eps) - J(theta - sigma eps)) / (2 sigma) * eps with eps ~ N(0, I);
    pair number n is judged on task n modulo B. `at_once` networks are adapted together.
    """
    theta, pairs, total = model.theta, perturbations // 2, 0.0
    gradient, together = torch.zeros_like(theta), max(1, at_once // 2)
    for begin in range(0, pairs, together):
        index = torch.arange(begin, min(begin + together, pairs), device=theta.device)
        eps = torch.empty(len(index), len(theta), device=theta.device, dtype=theta.dtype)
        for one in eps:  # pair by pair, so that the random stream does not depend on at_once
            one.normal_()
        phi = theta.repeat(2 * len(eps), 1)  # theta + sigma eps, then theta - sigma eps
        phi[: len(eps)].add_(eps, alpha=sigma)
        phi[len(eps) :].sub_(eps, alpha=sigma)
        chosen = (index % len(tasks[0])).repeat(2)
        losses = []
        for first in range(0, len(phi), at_once):
            x, y, query_x, query_y = (t[chosen[first : first + at_once]] for t in tasks)
            layers = model(phi[first : first + at_once])
            for _ in range(steps):
                inner_step_in_place(layers, x, y, rate)
            losses.append(mse(layers, query_x, query_y))
        plus, minus = torch.cat(losses).chunk(2)
        gradient += ((plus - minus) / (2 * sigma * pairs)) @ eps
        total = total + (plus + minus).sum() / perturbations
    theta.grad = gradient
    return total


def gradient_by(args, method: str, engine: str, at_once: int = 0):
    """How many tasks an outer step has, and its gradient as a function (model, tasks) -> loss."""
    at_once = 1 if engine == "loop" else at_once or max(args.meta_batch_size, args.num_perturbations)
    inner = {"rate": args.inner_lr, "steps": args.inner_steps, "at_once": at_once}
    if method != "es":
        return args.meta_batch_size, partial(maml_gradient, **inner, method=method, engine=engine)
    estimate = partial(es_gradient, **inner, perturbations=args.num_perturbations, sigma=args.sigma)
    return min(args.meta_batch_size, args.num_perturbations // 2), estimate


def meta_step(model: Initialisation, optimizer, args, method: str, engine: str, at_once: int = 0) -> torch.Tensor:
    """One outer step, as it is measured: tasks, meta-gradient into theta.grad, optimiser; the mean query loss."""
    B, gradient = gradient_by(args, method, engine, at_once)
    optimizer.zero_grad()
    loss = gradient(model, sample_tasks(B, args.num_shot, args.num_query, model.theta.device))
    optimizer.step()
    return loss


def start(args, device: torch.device) -> tuple[Initialisation, torch.optim.Optimizer]:
    """A new initialisation and its optimiser."""
    model = Initialisation(args.layers, args.hidden_dim).to(device)
    return model, torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)


# --------------------------------------------------------------------------------- measuring


def measure(args, method: str, engine: str, device: torch.device) -> dict:
    """Median, 10th and 90th percentile of the seconds of an outer step, and its peak memory in bytes."""
    torch.manual_seed(args.random_seed)
    model, optimizer = start(args, device)

    def step():
        meta_step(model, optimizer, args, method, engine, args.at_once)
        model.theta.grad = None  # so that each step allocates what the first one does

    return cost(step, device, args.warmup, args.outer_steps)


def fastest_engine(args, method: str, device: torch.device) -> tuple[str, int]:
    """The engine and the number of adaptations at once that are fastest here, by three outer steps of each."""
    everything = args.num_perturbations if method == "es" else args.meta_batch_size
    parts = [n for n in (4, 8, 16) if n < everything]
    candidates = [("loop", 1), *(("vmap", n) for n in [*parts, everything])]
    if "factors" in ENGINES[method]:
        candidates.append(("factors", everything))
    seconds = {}
    state = torch.get_rng_state()
    for engine, at_once in candidates:
        model, optimizer = start(args, device)
        step = lambda: meta_step(model, optimizer, args, method, engine, at_once)  # noqa: B023
        step()
        seconds[engine, at_once] = min(clock(step, device, 3))
    torch.set_rng_state(state)  # a measurement must not change what follows
    return min(seconds, key=seconds.get)


def points(args) -> list[tuple[str, str, str, argparse.Namespace]]:
    """(sweep, method, engine, flags) of every point to measure."""
    sweeps = SMOKE_SWEEPS if args.smoke else SWEEPS
    return [
        (sweep, method, engine, argparse.Namespace(**vars(args) | {sweep: value}))
        for sweep in (sweeps if args.sweep == "all" else [args.sweep])
        for value in sweeps[sweep]
        for method in (METHODS if args.method == "all" else [args.method])
        for engine in (ENGINES[method] if args.engine == "auto" else [args.engine])
        if engine in ENGINES[method]
    ]


def run_sweep(args, device: torch.device) -> dict:
    """Measure every point, then write costs.csv and costs.json to --out; `reproduce.py report` draws them."""
    rows = measure_points(args, points(args), lambda *point: measure(*point, device), device)
    summary = {
        "script": "profile_costs",
        "command": args.command,
        "git_commit": args.git_commit,
        "seed": args.random_seed,
        "device": experiment.device_name(device),
        "torch": torch.__version__,
        "processor": experiment.processor(),
        **fits_and_losses(rows),
        "es_cosine": [] if args.method not in ("all", "es") else es_cosines(args, device),
        "rows": rows,
    }
    write_sweep(args, rows, summary)
    return summary


def es_cosines(args, device: torch.device) -> list[dict]:
    """Cosine between the ES estimate and the exact meta-gradient g, by the number of perturbations.

    A pair on a task with gradient g_t adds noise of size |g_t|^2 (D + 1), so that n pairs reach a cosine of about
    1 / sqrt(1 + m (D + 1) / n) with D parameters and the tasks' disagreement m = mean |g_t|^2 / |g|^2.
    """
    torch.manual_seed(args.random_seed)
    model, _ = start(args, device)
    tasks = sample_tasks(args.meta_batch_size, args.num_shot, args.num_query, device)
    each = []
    for n in range(args.meta_batch_size):
        model.theta.grad = None
        maml_gradient(model, [t[n : n + 1] for t in tasks], args.inner_lr, args.inner_steps, 1)
        each.append(model.theta.grad)
    each, found = torch.stack(each), []
    exact = each.mean(0)
    m, D = (each.square().sum(1).mean() / exact.square().sum()).item(), exact.numel()
    for count in [2 * args.meta_batch_size * 4**n for n in range(2 if args.smoke else 5)]:
        es_gradient(model, tasks, args.inner_lr, args.inner_steps, args.meta_batch_size, count, args.sigma)
        cosine = torch.nn.functional.cosine_similarity(exact, model.theta.grad, dim=0).item()
        expected = (1 + 2 * m * (D + 1) / count) ** -0.5
        found.append({"perturbations": count, "cosine": cosine, "expected": expected})
        found[-1] |= {"parameters": D, "disagreement": m}
    return found


# ----------------------------------------------------------------------------------- training


def train_all(args, methods: tuple[str, ...], device: torch.device) -> dict:
    """Train with each method in a run of its own; of several, also write costs_train.json to --out."""
    metrics = {}
    for method in methods:
        name = args.run_name if len(methods) == 1 or not args.run_name else f"{args.run_name}_{method}"
        flags = argparse.Namespace(**vars(args) | {"run_name": name})
        metrics[method] = train(flags, method, device)
    if len(methods) == 1:
        return metrics[methods[0]]
    folder = output_folder(args)
    experiment.write_json(folder / "costs_train.json", metrics)
    print(f"written: {folder / 'costs_train.json'}; picture: python reproduce.py report --results {folder}")
    return metrics


def fixed_tasks(args, num_tasks: int, seed: int, like: torch.Tensor):
    """The same tasks in every run and on every device: drawn on the CPU from a seed of their own."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tasks = sample_tasks(num_tasks, args.num_shot, args.num_query)
    torch.set_rng_state(state)
    return [t.to(like.device) for t in tasks]


@torch.no_grad()
def evaluate(model: Initialisation, args, num_tasks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query losses of `num_tasks` fixed tasks before and after adaptation, [num_tasks] each."""
    before, after = [], []
    tasks = fixed_tasks(args, num_tasks, seed, model.theta)
    for x, y, query_x, query_y in zip(*(t.split(100) for t in tasks), strict=True):
        before.append(mse(model(), query_x, query_y))
        layers = adapt(model(), x, y, args.inner_lr, args.inner_steps, "maml", "vmap")
        after.append(mse(layers, query_x, query_y))
    return torch.cat(before).cpu(), torch.cat(after).cpu()


def train(args, method: str, device: torch.device) -> dict:
    """Meta-train, then report the query loss of fixed test tasks and some of the adapted functions."""
    args.method = method
    if args.engine == "auto":  # written into flags.json: a resumed run computes in the same order
        args.engine, args.at_once = fastest_engine(args, method, device)
        print(f"{LABELS[method]}: engine {args.engine}, {args.at_once} adaptations at once")
    torch.manual_seed(args.random_seed)
    model, optimizer = start(args, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / args.train_steps))
    run = Run(args, "profile_costs", f"sinusoids_{method}")
    run.track(model=model, optimizer=optimizer, schedule=schedule)
    B, gradient = gradient_by(args, method, args.engine, args.at_once)
    for _ in run.steps():
        optimizer.zero_grad()
        loss = gradient(model, sample_tasks(B, args.num_shot, args.num_query, device))  # MAML's calls backward()
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                before, after = evaluate(model, args, args.num_val_tasks, VAL_SEED)
            run.evaluated(None, {"Loss/val": after.mean().item(), "Loss/val_before": before.mean().item()})
    before, after = evaluate(model, args, args.num_test_tasks, TEST_SEED)
    loss, ci95 = experiment.mean_and_ci95(after)
    setting = "method engine num_test_tasks learning_rate inner_steps".split()
    metrics = {name: getattr(args, name) for name in setting} | {"parameters": model.theta.numel()}
    metrics |= {"test_loss": loss, "ci95": ci95, "test_loss_before": before.mean().item()}
    return run.finish(metrics | {"device": experiment.device_name(device), "examples": examples(model, args)})


@torch.no_grad()
def examples(model: Initialisation, args, count: int = 4) -> list[dict]:
    """The first test tasks: support points, the true function, and ours before and after adaptation, rounded."""
    x, y, query_x, query_y = (t[:count] for t in fixed_tasks(args, args.num_test_tasks, TEST_SEED, model.theta))
    after = predict(adapt(model(), x, y, args.inner_lr, args.inner_steps, "maml", "vmap"), query_x)
    drawn = {"support_x": x, "support_y": y, "x": query_x, "truth": query_y, "before": predict(model(), query_x)}
    lists = {name: values.flatten(1).cpu().tolist() for name, values in (drawn | {"after": after}).items()}
    return [{name: [round(v, 4) for v in rows[n]] for name, rows in lists.items()} for n in range(len(x))]


# --------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    """The flags; values and combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, without=UNUSED, num_shot=10, num_query=100, meta_batch_size=32, eval_freq=500, num_val_tasks=600
    )
    parser.prog = "profile_costs.py"
    add = groups["run"].add_argument
    add("--sweep", choices=["all", *SWEEPS], help="measure over a range of this flag; all: the three one by one")
    add("--train", action="store_true", help="meta-train instead of measuring")
    add("--method", choices=["all", *METHODS], default="all", help="what to measure or, with --train, to train with")
    engines = (
        "vmap: adapts all together; loop: one by one; factors: together, MAML's weights as low-rank factors; auto: "
    )
    engines += "measures all of these, training takes the fastest"
    add("--engine", choices=["vmap", "loop", "factors", "auto"], default="vmap", help=engines)
    add("--at_once", type=whole(0), default=0, help="adaptations that vmap and factors do together; 0: all")
    add("--out", default="runs/costs", help="folder of a sweep's tables, and of --train's with all methods")
    add("--warmup", type=whole(1), default=2, help="outer steps before the measured ones")
    add = groups["model"].add_argument
    add("--layers", type=whole(1, 100), default=2, help="hidden layers")
    add("--hidden_dim", type=whole(1, 16384), default=128, help="units of each hidden layer")
    add = groups["optimisation"].add_argument
    add("--outer_steps", "--train_steps", type=whole(1), help="outer steps to measure or train; None: 9, 5000")
    add("--inner_steps", type=whole(1), default=5, help="gradient steps on a support set")
    add("--inner_lr", type=number(above=True), default=1e-2, help="learning rate of the inner steps")
    add("--learning_rate", type=number(above=True), default=1e-3, help="of Adam; ES: 3e-3 is too much")
    add("--num_perturbations", type=whole(2), help="ES: perturbed networks in an outer step; None: as many as tasks")
    add("--sigma", type=number(above=True), default=1e-3, help="ES: standard deviation of the perturbations")
    smoke = {"hidden_dim": 16, "meta_batch_size": 4, "num_query": 20, "num_val_tasks": 20, "num_test_tasks": 20}
    smoke |= {"eval_freq": 10, "outer_steps": 3}
    args = experiment.parse(parser, argv, smoke)
    if args.smoke and not args.train and not args.sweep:
        args.sweep = "all"
    if args.train and args.sweep:
        raise UserError("--train and --sweep exclude each other; drop one")
    if args.resume and not args.train:
        raise UserError("--resume continues a --train run; a sweep continues by itself when started again")
    if args.num_perturbations is None:
        args.num_perturbations = args.meta_batch_size + args.meta_batch_size % 2
    if args.num_perturbations % 2:
        raise UserError(f"--num_perturbations {args.num_perturbations} is odd; antithetic pairs need an even number")
    if args.engine == "factors" and args.method != "maml":
        raise UserError("--engine factors is for --method maml; ES perturbs every weight, so it forms them anyway")
    args.num_classes, args.patience = 1, 0  # one output; train to the end
    args.train_steps = args.outer_steps = args.outer_steps or (5000 if args.train else 9)
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    if experiment.shard()[1] > 1:
        raise UserError("profile_costs.py measures one process; start it with python, not with torchrun")
    if args.train:
        return train_all(args, ("maml", "es") if args.method == "all" else (args.method,), device)
    if args.sweep:
        return run_sweep(args, device)
    found = []
    for method in METHODS if args.method == "all" else [args.method]:
        for engine in ENGINES[method] if args.engine == "auto" else [args.engine]:
            row = {"method": method, "engine": engine} | measure(args, method, engine, device)
            found.append(row)
            median, low, high = (1e3 * row[name] for name in ("seconds", "seconds_p10", "seconds_p90"))
            cost_of = f"{median:9.2f} ms  ({low:.2f} to {high:.2f})  {row['peak_bytes'] / 1e6:9.3f} MB"
            print(f"{LABELS[method]:20s} {engine:8s} {cost_of}")
    setting = {name: getattr(args, name) for name in SWEEPS} | {"device": experiment.device_name(device)}
    return experiment.report(args, "profile_costs", "sinusoids", setting | {"costs": found})


if __name__ == "__main__":
    experiment.run_script(main)
