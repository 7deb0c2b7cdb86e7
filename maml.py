"""Model-agnostic meta-learning: an initialisation from which a few gradient steps learn a new task.

Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks". The inner
loop takes L gradient steps on a task's support loss, starting from theta; the outer loop moves theta so that the
loss of the queries after these steps falls. The gradient goes through the inner steps exactly (second order),
or treats their gradients as constants (`--first_order`).

    python maml.py --num_classes 5 --num_shot 1                MAML after a prototype warm-up
    python maml.py --first_order --zero_head                   first-order MAML
    python maml.py --head proto --first_order --inner_lr 0.01  Proto-MAML: the head starts from the prototypes
    python maml.py --freeze_body                               ANIL: only the head is adapted
    python maml.py --smoke                                     a complete run in seconds

Measured: 5-way 1-shot 99.2 ± 0.2 % after a prototype warm-up (three seeds, over 600 tasks, transductive), 6.4 minutes
on one AMD EPYC core with bfloat16. The paper's recipes, the sources of the variants and everything else: docs/maml.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import Run, UserError, number, whole
from fewshot.experiment.replay import recorded
from fewshot.learners.adapted import MAML, Parameters, Setting, accuracy_of, classify, embed, query_logits, update_norms
from fewshot.learners.conv4 import LAYERS, Conv4, prototypes
from fewshot.learners.outer_loop import make_optimizers, multi_step_weights, rate_factor
from fewshot.learners.task_loop import mean_over_tasks, over_tasks
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler, fixed_tasks
from fewshot.tasks.lake import LakeRuns, lake_runs

import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

from load_data import log_episode

# ---------------------------------------------------------------------------------- the method


def adapt(theta: Parameters, step_sizes: list[Parameters], support_loss, gradient_of=grad) -> list[Parameters]:
    """MAML's inner loop on one task (algorithm 1, lines 5 to 7): the parameters before and after every step.

    theta <- theta - alpha * gradient of support_loss(theta), with an alpha for each step and tensor. Everything stays
    differentiable, the gradients too: that is the second order. `gradient_of` is where variants differ.
    """
    path = [theta]
    for alpha in step_sizes:
        gradient = gradient_of(support_loss)(theta)
        theta = theta | {name: theta[name] - alpha[name] * g for name, g in gradient.items()}
        path.append(theta)
    return path


def task_loss(theta: Parameters, step_sizes, support, support_labels, query, query_labels, s: Setting) -> torch.Tensor:
    """MAML's outer loss of one task (algorithm 1, line 10): cross entropy of the queries after the inner loop."""
    adapted = inner_loop(theta, step_sizes, support=support, labels=support_labels, s=s)[-1]
    return F.cross_entropy(query_logits(adapted, support, query, s), query_labels)


def inner_loop(theta: Parameters, step_sizes: list[Parameters], support, labels, s: Setting) -> list[Parameters]:
    """`adapt` to support images [N*K, C, H, W] in class order with labels [N*K], as the variant that `s` names."""
    support_loss = lambda theta: F.cross_entropy(classify(theta, support, s, num_support=len(support)), labels)
    gradient_of = anil if s.freeze_body else grad
    gradient_of = first_order(gradient_of) if s.first_order else gradient_of
    start = theta if s.head == "linear" else proto_maml(theta, support, s)
    loop = adapt_with_own_norms if s.per_step_norm else adapt
    return loop(start, step_sizes, support_loss, gradient_of=gradient_of)


def first_order(gradient_of):
    """First-order MAML (section 5.2): the gradient of a step counts as a constant."""
    return lambda support_loss: lambda theta: gradient_of(support_loss)({name: p.detach() for name, p in theta.items()})


def anil(support_loss):
    """ANIL (Raghu et al. 2020): the gradient of the head alone, so that the body stays as it is."""

    def gradient(theta: Parameters) -> Parameters:
        head = {name: p for name, p in theta.items() if name.startswith("head")}
        return grad(lambda head: support_loss(theta | head))(head)

    return gradient


def proto_maml(theta: Parameters, support: torch.Tensor, s: Setting) -> Parameters:
    """Proto-MAML (Triantafillou et al. 2020): the loop starts from a head made of the support set."""
    return theta | HEADS[s.head](embed(theta, support, s, num_support=len(support)), s.num_classes)


def proto_head(support: torch.Tensor, num_classes: int) -> Parameters:
    """The linear head that computes -||f - c||^2 up to a constant: w = 2c, b = -||c||^2 (Triantafillou, eq. 4).

    support: features [N*K, D] in class order, of which c are the class means.
    """
    centres = prototypes(support[None], num_classes)[0]  # [N, D]
    return {"head_weight": 2 * centres, "head_bias": -centres.square().sum(-1)}


def one_step_head(support: torch.Tensor, num_classes: int) -> Parameters:
    """What one inner step at the rate N / sqrt(D) makes of a head of zeros: w = (c - mean of all c) / sqrt(D), b = 0.

    The division keeps the softmax from saturating, as in attention. For the warm-up before MAML.
    """
    centres = prototypes(support[None], num_classes)[0]
    weight = (centres - centres.mean(dim=0)) / centres.shape[1] ** 0.5
    return {"head_weight": weight, "head_bias": torch.zeros_like(centres[:, 0])}


HEADS = {"proto": proto_head, "one_step": one_step_head}


def adapt_with_own_norms(theta: Parameters, step_sizes, support_loss, gradient_of=grad) -> list[Parameters]:
    """MAML++ (Antoniou et al. 2019): after each step its learned shift "NAME+" of batch norm's tensor NAME is added."""
    path = [theta]
    for alpha in step_sizes:
        theta = adapt(theta, [alpha], support_loss, gradient_of=gradient_of)[-1]
        theta = theta | {name: p + alpha[f"{name}+"] for name, p in theta.items() if f"{name}+" in alpha}
        path.append(theta)
    return path


def multi_step_loss(theta: Parameters, step_sizes, support, support_labels, query, query_labels, s: Setting, weights):
    """MAML++'s outer loss of one task: the queries' losses after the last len(weights) steps, weighted."""
    path = inner_loop(theta, step_sizes, support=support, labels=support_labels, s=s)
    losses = [F.cross_entropy(query_logits(p, support, query, s), query_labels) for p in path[-len(weights) :]]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True))


def warmup_loss(theta: Parameters, support, support_labels, query, query_labels, s: Setting) -> torch.Tensor:
    """The loss of one task with one query a class and no inner step, in the warm-up.

    The queries are asked of the head made of the support set; the same features then change places.
    """
    ordered, make_head = query_labels.argsort(), HEADS[s.head]
    one = embed(theta, support, s, num_support=len(support))
    other = embed(theta, query[ordered], s, num_support=len(query))
    asked = F.linear(other, *make_head(one, s.num_classes).values())
    back = F.linear(one, *make_head(other, s.num_classes).values())
    return (F.cross_entropy(asked, query_labels[ordered]) + F.cross_entropy(back, support_labels)) / 2


@torch.no_grad()
def evaluate(learner: MAML, sampler: EpisodeSampler, num_tasks: int, s: Setting, steps: int, both=False) -> dict:
    """Accuracy after 0 to `steps` inner steps of the first `num_tasks` tasks of the sampler's stream.

    Returns query and support [num_tasks, steps + 1], moved [num_tasks, layers] as `update_norms` gives it, and the mean
    query loss. both: also other [num_tasks], the queries' after the last step in the other mode of batch norm.
    """
    s = s._replace(first_order=True)  # the same steps; nothing is differentiated through them
    other = s._replace(batch_norm="support" if s.batch_norm == "transductive" else "transductive")
    theta, step_sizes = learner.theta(), learner.step_sizes(steps)

    def learn(support, support_labels, query, query_labels):
        right, loss = [], None
        path = inner_loop(theta, step_sizes, support=support, labels=support_labels, s=s)
        for p in path:
            logits = query_logits(p, support, query, s)
            loss = F.cross_entropy(logits, query_labels)
            known = classify(p, support, s, num_support=len(support))
            right.append(torch.stack([accuracy_of(logits, query_labels), accuracy_of(known, support_labels)]))
        logits = query_logits(path[-1], support, query, other) if both else logits
        in_other, moved = accuracy_of(logits, query_labels), update_norms(path[0], path[-1])
        return torch.stack(right, dim=1), in_other, loss, moved  # [2, steps + 1], [], [], [layers]

    batches = [[x.cpu() for x in over_tasks(learn, batch)] for batch in sampler.first(num_tasks)]
    loss = sum(losses.sum().item() for _, _, losses, _ in batches) / num_tasks
    accuracy, others, _, moved = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = {"query": accuracy[:, 0], "support": accuracy[:, 1], "moved": moved, "loss": loss}
    return found | ({"other": others} if both else {})


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    defaults = {"meta_batch_size": 4, "train_steps": 5000, "eval_freq": 1000, "num_val_tasks": 200}
    parser, groups = experiment.make_parser(__doc__, rotations=True, **defaults)
    parser.prog = "maml.py"
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
    add = groups["data"].add_argument
    add("--train_query", type=whole(1), default=5, help="query images of a class in training")
    add("--train_classes", type=whole(2), default=60, help="classes of a training task with a head of prototypes")
    add("--jitter", type=number(0, 1), default=0.1, help="random turn (radians), size and slant of training images")
    add("--shift", type=number(0, 1), default=0.1, help="random shift of training images, a share of half their size")
    add("--fixed_labels", action="store_true", help="training characters keep their labels: see memorization.py")
    add = groups["model"].add_argument
    add("--encoder", choices=["strided", "conv4"], default="conv4", help="Conv4-64, or the paper's for Omniglot")
    add("--width", type=whole(1, 4096), default=64, help="filters of each convolution")
    features = "sphere: centred and stretched to one length before the head; auto: before a linear head"
    add("--features", choices=["auto", "sphere", "plain"], default="auto", help=features)
    add("--head", choices=["linear", "proto"], default="linear", help="proto: Proto-MAML, started from the prototypes")
    add("--zero_head", action="store_true", help="every task starts from a head of zeros that is not meta-learned")
    add("--freeze_body", action="store_true", help="ANIL: the inner loop adapts the head alone")
    whose = "whose statistics normalise the queries: their own, or the support set's"
    add("--batch_norm", choices=["transductive", "support"], default="transductive", help=whose)
    add = groups["optimisation"].add_argument
    add("--inner_steps", type=whole(0), default=1, help="gradient steps on a support set in training")
    add("--inner_lr", type=number(), default=0.4, help="rate of the inner steps, or where the learned rates start")
    add("--head_lr", type=number(), default=0.0, help="the same for a linear head; 0: N / sqrt(features)")
    add("--learn_inner_lrs", action="store_true", help="learn a rate per tensor and step")
    add("--per_step_norm", action="store_true", help="learn scales and shifts of batch norm for each step (MAML++)")
    first = "first training steps, one-shot, with a head of prototypes and no inner step; the papers: 0"
    add("--warmup_steps", type=whole(0), default=4000, help=first)
    add("--first_order", action="store_true", help="drop the second derivative")
    add("--multi_step_loss", action="store_true", help="early in training count the loss after every inner step")
    orthogonal = "of the outer loop; muon: orthogonal steps of the weights, Adam's of learned rates and --per_step_norm"
    add("--optimizer", choices=["adam", "muon"], default="adam", help=orthogonal)
    add("--learning_rate", type=number(above=True), default=2e-3, help="of the outer loop at its start; muon: say 0.05")
    add("--schedule", choices=["cosine", "constant"], default="cosine", help="cosine: the rate falls to 1 %% of it")
    add("--clip", type=number(), default=1.0, help="largest norm of the meta-gradient; 0: no limit")
    steps = "gradient steps at validation and test (default: as many as --inner_steps)"
    groups["evaluation"].add_argument("--test_inner_steps", type=whole(0), help=steps)
    smoke = {"train_steps": 20, "warmup_steps": 5, "eval_freq": 10, "num_test_tasks": 20, "num_val_tasks": 20}
    smoke |= {"width": 16, "encoder": "strided", "train_classes": 8}
    shapes = ("num_classes", "image_size", "encoder", "width", "head", "inner_steps")
    args = experiment.parse(parser, argv, smoke, fixed=shapes, longer=why_no_longer)
    if args.head == "linear" and args.inner_steps == 0:
        raise UserError("--inner_steps 0 with --head linear: a shared head cannot know a task's labels; use 1 or more")
    if args.learn_inner_lrs and args.inner_steps == 0:
        raise UserError("--learn_inner_lrs needs --inner_steps 1 or more")
    if args.per_step_norm and (args.inner_steps == 0 or args.freeze_body):
        raise UserError("--per_step_norm needs --inner_steps 1 or more, and a body that they adapt (no --freeze_body)")
    if args.test_inner_steps is None:
        args.test_inner_steps = args.inner_steps
    if args.fixed_labels and args.head == "proto":
        raise UserError("--fixed_labels with --head proto: a head of prototypes has no labels to memorise; drop one")
    if args.warmup_steps >= args.train_steps:
        raise UserError(f"--warmup_steps {args.warmup_steps} must be less than --train_steps {args.train_steps}")
    return args


def why_no_longer(flags: dict) -> str | None:
    """Why a run with these flags cannot be resumed with more steps; None when it can."""
    if flags["schedule"] == "cosine":
        return "its learning rate falls until then (--schedule cosine)"
    return "the weights of --multi_step_loss are shares of its length" if flags["multi_step_loss"] else None


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dataset = load_for(args)
    encoder = Conv4(dataset.images.shape[1], args.width, args.image_size, strided=args.encoder == "strided")
    head_lr = (args.head_lr or args.num_classes / encoder.out_features**0.5) if args.head == "linear" else None
    of_flags = lambda *names: {name: getattr(args, name) for name in names}
    shape = of_flags("num_classes", "inner_steps", "inner_lr", "head", "zero_head", "per_step_norm")
    learner = MAML(encoder, learn=args.learn_inner_lrs, head_lr=head_lr, **shape).to(device)
    s = Setting(
        strided=encoder.strided,
        sphere=args.features == "sphere" or (args.features == "auto" and args.head == "linear"),
        dtype=experiment.precision(args, device),
        **of_flags("num_classes", "head", "freeze_body", "first_order", "per_step_norm", "batch_norm"),
    )
    test, runs = fixed_tasks(dataset, "test", args, device=device), lake_runs(dataset, args, device)
    report = partial(test_report, learner, test, runs, s, steps=args.test_inner_steps, num_tasks=args.num_test_tasks)
    if args.test:
        metrics = {"best_step": experiment.load_best(args.checkpoint, learner)} | report()
        return experiment.report(args, "maml", dataset.name, metrics, digest=dataset.digest)

    val = fixed_tasks(dataset, "val", args, device=device)
    options = {"device": device, "shard": experiment.shard()} | of_flags("rotations", "jitter", "shift")
    tasks = partial(EpisodeSampler, dataset, "train", **options)
    # Prototypes make a head for any number of classes; harder tasks teach the encoder faster.
    N, K, B = args.train_classes, args.num_shot, max(experiment.shard()[1], args.meta_batch_size // 4)
    flags = ("train_classes", None, None)
    warmup = tasks(N, num_shot=1, num_query=1, batch_size=B, seed=args.random_seed + 1, flags=flags)
    if args.head == "linear":
        N, Q, B = args.num_classes, args.train_query, args.meta_batch_size
        more = {"flags": ("num_classes", "num_shot", "train_query"), "fixed_labels": args.fixed_labels}
    else:
        Q, more = 1, {"flags": ("train_classes", "num_shot", None)}
    train = tasks(N, num_shot=K, num_query=Q, batch_size=B, seed=args.random_seed, **more)
    experiment.init_from(args, learner)
    s_warmup = s._replace(head="proto" if args.head == "proto" else "one_step", num_classes=warmup.N)
    s_train = s._replace(num_classes=train.N)
    optimizers = make_optimizers(learner, args.optimizer, args.learning_rate)
    factor = partial(rate_factor, **of_flags("warmup_steps", "train_steps", "schedule"))
    schedules = {
        name.replace("optimizer", "schedule"): torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for name, optimizer in optimizers.items()
    }
    measure = partial(evaluate, learner, s=s, steps=args.test_inner_steps)
    run = Run(args, "maml", dataset.name, dataset.digest)
    run.track(model=learner, **optimizers, **schedules, warmup=warmup, sampler=train)

    @recorded(learner, device, warmup.generator)  # one CUDA graph on a GPU; on a CPU this line does nothing
    def forward_backward_of_warmup() -> torch.Tensor:
        loss_of_task = partial(warmup_loss, learner.theta(), s=s_warmup)
        loss = mean_over_tasks(loss_of_task, warmup.sample(), learner)
        learner.zero_grad()
        loss.backward()
        return loss.detach()

    @recorded(learner, device, train.generator)
    def forward_backward(weights: torch.Tensor) -> torch.Tensor:
        outer_loss = partial(multi_step_loss, weights=weights) if args.multi_step_loss else task_loss
        loss_of_task = partial(outer_loss, learner.theta(), learner.step_sizes(args.inner_steps), s=s_train)
        loss = mean_over_tasks(loss_of_task, train.sample(), learner)
        learner.zero_grad()
        loss.backward()
        return loss.detach()

    for step in run.steps():
        if step <= args.warmup_steps:
            loss = forward_backward_of_warmup()
        else:
            weights = multi_step_weights(args.inner_steps, step / args.train_steps) if args.multi_step_loss else [1.0]
            loss = forward_backward(torch.tensor(weights, device=device))
        experiment.average_gradients(learner)
        norm = nn.utils.clip_grad_norm_(learner.parameters(), args.clip or float("inf"))
        run.record(torch.where(norm.isfinite(), loss, norm))  # a norm that is not finite ends the run like such a loss
        for moving in (*optimizers.values(), *schedules.values()):
            moving.step()
        if run.time_to_evaluate():
            with run.clock_stopped():
                on_val = measure(val, args.num_val_tasks)
                # The curve on the test classes is for plots; nothing is decided by it.
                on_test = measure(test, max(2, args.num_val_tasks // 3))
            # No checkpoint of the warm-up is chosen: it is not yet the method. Of what is memorised the last is kept.
            chosen_by = None if args.fixed_labels else on_val["query"][:, -1].mean().item()
            run.evaluated(chosen_by, scalars(learner, on_val, on_test, norm=norm), choose=step > args.warmup_steps)
    run.load_best(learner)
    log_episode(run, test, partial(guess, learner, s, args.test_inner_steps))
    metrics = report()
    if args.fixed_labels:
        found = measure(train, args.num_val_tasks)["query"]
        metrics |= {"train_accuracy": found[:, -1].mean().item(), "train_accuracy_before": found[:, 0].mean().item()}
    return run.finish(metrics)


def scalars(learner: MAML, on_val: dict, on_test: dict, norm: torch.Tensor) -> dict[str, float]:
    """What TensorBoard shows of an evaluation."""
    query, support = on_val["query"].mean(0).tolist(), on_val["support"].mean(0).tolist()
    found = {
        "Loss/val": on_val["loss"],
        "Accuracy/val": query[-1],
        "Loss/test": on_test["loss"],
        "Accuracy/test": on_test["query"][:, -1].mean().item(),
        "Adaptation/support_before": support[0],
        "Adaptation/support_after": support[-1],
        "Gradient/norm": norm.item(),
        "Memory/peak_MB": experiment.peak_megabytes(norm.device),
    }
    found |= {f"Adaptation/query_after_{i}_steps": accuracy for i, accuracy in enumerate(query)}
    if learner.rates.requires_grad:
        rates = [f"Rates/{name}_step{i + 1}" for i in range(len(learner.rates)) for name in learner.names]
        found |= dict(zip(rates, learner.rates.flatten().tolist(), strict=True))
    return found


def test_report(learner: MAML, test: EpisodeSampler, runs: LakeRuns | None, s: Setting, steps: int, num_tasks) -> dict:
    """Accuracy on the fixed test tasks before and after adaptation (on Lake's after), in both modes of batch norm."""
    found = evaluate(learner, test, num_tasks, s=s, steps=steps, both=True)
    of_runs = evaluate(learner, runs, runs.B, s=s, steps=steps, both=True) if runs else None
    metrics = {}
    for mode in ("transductive", "support"):
        after = lambda found, mode=mode: found["query"][:, -1] if mode == s.batch_norm else found["other"]
        metrics |= experiment.figures_of(f"_{mode}", after(found))
        metrics |= experiment.figures_of(f"_lake_runs_{mode}", after(of_runs)) if of_runs else {}
    moved = zip(LAYERS, found["moved"].mean(0).tolist(), strict=True)
    device = learner.rates.device
    return metrics | {
        "test_accuracy": metrics[f"test_accuracy_{s.batch_norm}"],
        "ci95": metrics[f"ci95_{s.batch_norm}"],
        "num_test_tasks": num_tasks,
        "accuracy_before_adaptation": experiment.mean_and_ci95(found["query"][:, 0])[0],
        "query_accuracy_per_step": found["query"].mean(0).tolist(),
        "support_accuracy_per_step": found["support"].mean(0).tolist(),
        "update_norm_per_layer": {layer: value if math.isfinite(value) else None for layer, value in moved},
        "accuracies": [round(a, 4) for a in found["query"][:, -1].tolist()],
        "batch_norm": s.batch_norm,
        "dtype": str(s.dtype).removeprefix("torch."),
        "peak_memory_MB": round(experiment.peak_megabytes(device), 1),
        "device": experiment.device_name(device),
        "parameters": sum(p.numel() for p in learner.theta().values()),
        "cpu_cores": os.cpu_count(),
    }


def guess(learner: MAML, s: Setting, steps: int, support, support_labels, query) -> torch.Tensor:
    """The classes [N*Q] of the queries of one task after adaptation."""
    s, step_sizes = s._replace(first_order=True), learner.step_sizes(steps)
    path = inner_loop(learner.theta(), step_sizes, support=support[0], labels=support_labels[0], s=s)
    return query_logits(path[-1], support[0], query[0], s).argmax(dim=-1)


if __name__ == "__main__":
    experiment.run_script(main)
