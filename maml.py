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

The paper's 5-way and 20-way recipes:

    python maml.py --encoder strided --features plain --warmup_steps 0 --head_lr 0.4 --meta_batch_size 32 \\
        --train_query 15 --train_steps 60000 --schedule constant --learning_rate 1e-3
    python maml.py --num_classes 20 --encoder strided --features plain --warmup_steps 0 --head_lr 0.1 \\
        --inner_lr 0.1 --inner_steps 5 --meta_batch_size 16 --train_query 15 --train_steps 60000 \\
        --schedule constant --learning_rate 1e-3

Sources beside it: Antoniou et al. 2019 (MAML++: learned inner rates, multi-step loss, cosine schedule),
Raghu et al. 2020 (ANIL), Triantafillou et al. 2020 (Proto-MAML), Kao et al. 2022 (zeroing the head).

Measured: 5-way 1-shot 99.2 ± 0.2 % after a prototype warm-up (three seeds, over 600 tasks, transductive), 6.4 minutes
on one AMD EPYC core with bfloat16. Everything else: docs/maml.md.
"""

from __future__ import annotations

import experiment
from experiment import Run, UserError, number, whole

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._C._functorch import is_batchedtensor
from torch.func import grad, vmap

from backbone import EPS, Conv4, Muon, conv4, prototypes
from load_data import EpisodeSampler, LakeRuns, fixed_tasks, lake_runs, load_for, log_episode
from replay import Gradient

Parameters = dict[str, torch.Tensor]
LAYERS = ("conv1", "conv2", "conv3", "conv4", "head")
STEPS_RATE = 2e-3  # of Adam beside Muon

# ---------------------------------------------------------------------------------- the method


class MAML(nn.Module):
    """What the outer loop learns: theta (a Conv4 and a linear head) and the inner learning rates.

    With head="proto" there is no head to learn. `rates` [inner steps, tensors of theta] has the order of `names`. With
    per_step_norm each inner step also adds its learned `shifts` [inner steps, 8, filters] to the scales and shifts of
    batch norm: every step has its own (MAML++).
    """

    def __init__(
        self,
        encoder: Conv4,
        num_classes: int,
        inner_steps: int,
        inner_lr: float,
        head="linear",
        learn=False,
        head_lr: float | None = None,
        zero_head: bool = False,
        per_step_norm: bool = False,
    ):
        super().__init__()
        self.encoder = encoder
        if head == "linear":
            # From zero the first inner step makes the weight of a class (rate / N) (c - mean of all c), and leaves the
            # bias at zero: nearly a head of prototypes.
            shapes = (num_classes, encoder.out_features), (num_classes,)
            self.head_weight, self.head_bias = (
                nn.Parameter(torch.zeros(shape), requires_grad=not zero_head) for shape in shapes
            )
        self.names = [name for name, _ in encoder.named_parameters()] + ["head_weight", "head_bias"]
        of_tensors = [head_lr if head_lr and name == "head_weight" else inner_lr for name in self.names]
        self.rates = nn.Parameter(torch.tensor(of_tensors).repeat(max(1, inner_steps), 1), requires_grad=learn)
        self.of_norms = [name for name in self.names if name.startswith(("gamma", "beta"))]
        zeros = torch.zeros(inner_steps, len(self.of_norms), len(encoder.gamma0))
        self.shifts = nn.Parameter(zeros) if per_step_norm else None

    def theta(self) -> Parameters:
        own = {name: p for name, p in self.named_parameters(recurse=False) if name not in ("rates", "shifts")}
        return dict(self.encoder.named_parameters()) | own

    def step_sizes(self, steps: int) -> list[Parameters]:
        """The learning rate of each tensor in each of `steps` inner steps; beyond the trained ones the last repeats.

        With per_step_norm also what a trained step adds to a tensor NAME, as "NAME+"; later steps add nothing.
        """
        rows = [self.rates[min(i, len(self.rates) - 1)] for i in range(steps)]  # [tensors] each
        sizes = [dict(zip(self.names, row, strict=True)) for row in rows]
        for step, shift in zip(sizes, () if self.shifts is None else self.shifts, strict=False):
            step |= {f"{name}+": of_tensor for name, of_tensor in zip(self.of_norms, shift, strict=True)}
        return sizes


class Setting(NamedTuple):
    """How a task is learned; the flags of the same names."""

    num_classes: int
    strided: bool = True
    head: str = "linear"
    freeze_body: bool = False
    first_order: bool = False
    batch_norm: str = "transductive"
    dtype: torch.dtype = torch.float32
    sphere: bool = False


def embed(theta: Parameters, images: torch.Tensor, s: Setting, num_support: int) -> torch.Tensor:
    """Features [n, D] of one task's images [n, C, H, W], of which the first `num_support` are its support set.

    batch_norm="transductive" normalises with all images of the call, "support" with the support set alone. With
    `sphere` the features are centred by the mean of the same images and stretched to length sqrt(D). A linear head
    whose weights are class means then compares distances: ||f - c||^2 = 2 D - 2 <f, c>.
    """
    with experiment.autocast(images.device, s.dtype):
        n = len(images) if s.batch_norm == "transductive" else num_support  # images that give the statistics
        # Under vmap the second derivative of F.batch_norm is wrong (torch 2.13): there it is spelled out.
        if n == len(images) and not is_batchedtensor(images):
            features = conv4(theta, images, "batch", strided=s.strided)
        else:
            features = conv4(theta, images[None], "support", None, n, strided=s.strided)[0]
    features = features if features.dtype == torch.float64 else features.float()
    if s.sphere:
        centred = features - features[:n].mean(dim=0)
        features = centred * (centred.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return features


def classify(theta: Parameters, images: torch.Tensor, s: Setting, num_support: int) -> torch.Tensor:
    """Logits [n, N] of one task's images by the network with parameters theta."""
    return F.linear(embed(theta, images, s, num_support), theta["head_weight"], theta["head_bias"])


def proto_head(support: torch.Tensor, s: Setting) -> Parameters:
    """The linear head that computes -||f - c||^2 up to a constant: w = 2c, b = -||c||^2 (Triantafillou, eq. 4).

    support: features [N*K, D] in class order, of which c are the class means.
    head="one_step" is, without the step, what one inner step at the rate N / sqrt(D) makes of a zero head:
    w = (c - mean of all c) / sqrt(D), b = 0. The division keeps the softmax from saturating, as in attention.
    """
    centres = prototypes(support[None], s.num_classes)[0]  # [N, D]
    if s.head == "one_step":
        weight = (centres - centres.mean(dim=0)) / centres.shape[1] ** 0.5
        return {"head_weight": weight, "head_bias": torch.zeros_like(centres[:, 0])}
    return {"head_weight": 2 * centres, "head_bias": -centres.square().sum(-1)}


def adapt(theta: Parameters, step_sizes: list[Parameters], support, labels, s: Setting) -> list[Parameters]:
    """The inner loop of one task (algorithm 1, lines 5 to 7): parameters before and after every step.

    support [N*K, C, H, W] in class order, labels [N*K]. Everything stays differentiable; with first_order the
    gradient of a step is a constant.
    """
    if s.head != "linear":
        theta = theta | proto_head(embed(theta, support, s, len(support)), s)
    adapted = {"head_weight", "head_bias"} if s.freeze_body else set(theta)
    slow = {name: p for name, p in theta.items() if name not in adapted}
    fast = {name: p for name, p in theta.items() if name in adapted}

    def support_loss(fast: Parameters, slow: Parameters) -> torch.Tensor:
        return F.cross_entropy(classify(slow | fast, support, s, len(support)), labels)

    path = [slow | fast]
    for step_size in step_sizes:
        at = (fast, slow)
        if s.first_order:
            at = tuple({name: p.detach() for name, p in part.items()} for part in at)
        gradient = grad(support_loss)(*at)
        fast = {name: p - step_size[name] * gradient[name] for name, p in fast.items()}
        fast |= {name: p + step_size[f"{name}+"] for name, p in fast.items() if f"{name}+" in step_size}
        path.append(slow | fast)
    return path


def query_logits(theta: Parameters, support: torch.Tensor, query: torch.Tensor, s: Setting) -> torch.Tensor:
    """Logits [N*Q, N] of the queries; they pass through the network together with the support set or by themselves."""
    if s.batch_norm == "transductive":
        return classify(theta, query, s, 0)
    return classify(theta, torch.cat([support, query]), s, len(support))[len(support) :]


def task_loss(theta: Parameters, step_sizes, support, support_labels, query, query_labels, s: Setting, weights):
    """The outer loss of one task (algorithm 1, line 10): cross entropy of the queries after the inner loop.

    weights: of the losses after the last len(weights) steps; [1.] is MAML, more are MAML++'s multi-step loss.
    """
    path = adapt(theta, step_sizes, support, support_labels, s)
    losses = [F.cross_entropy(query_logits(p, support, query, s), query_labels) for p in path[-len(weights) :]]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True))


def warmup_loss(theta: Parameters, support, support_labels, query, query_labels, s: Setting) -> torch.Tensor:
    """The loss of one task with one query a class and no inner step, in the warm-up.

    The queries are asked of the head made of the support set; the same features then change places.
    """
    ordered = query_labels.argsort()
    one, other = embed(theta, support, s, len(support)), embed(theta, query[ordered], s, len(query))
    asked = F.linear(other, *proto_head(one, s).values()), F.linear(one, *proto_head(other, s).values())
    return (F.cross_entropy(asked[0], query_labels[ordered]) + F.cross_entropy(asked[1], support_labels)) / 2


@torch.no_grad()
def evaluate(learner: MAML, sampler: EpisodeSampler, num_tasks: int, s: Setting, steps: int, both=False) -> dict:
    """Accuracy after 0 to `steps` inner steps of the first `num_tasks` tasks of the sampler's stream.

    Returns query and support [num_tasks, steps + 1], moved [num_tasks, layers] as `update_norms` gives it, and the mean
    query loss. No graph is kept. both: also other [num_tasks], the queries' after the last step in the other mode of
    batch norm, for which the same inner loop does.
    """
    s = s._replace(first_order=True)  # the same steps; nothing is differentiated through them
    other = s._replace(batch_norm="support" if s.batch_norm == "transductive" else "transductive")
    theta, step_sizes = learner.theta(), learner.step_sizes(steps)

    def learn(support, support_labels, query, query_labels):
        right, loss, path = [], None, adapt(theta, step_sizes, support, support_labels, s)
        for p in path:
            logits = query_logits(p, support, query, s)
            loss = F.cross_entropy(logits, query_labels)
            known = classify(p, support, s, len(support))
            right.append(torch.stack([accuracy_of(logits, query_labels), accuracy_of(known, support_labels)]))
        logits = query_logits(path[-1], support, query, other) if both else logits
        in_other, moved = accuracy_of(logits, query_labels), update_norms(path[0], path[-1])
        return torch.stack(right, dim=1), in_other, loss, moved  # [2, steps + 1], [], [], [layers]

    accuracies, others, losses, moved = [], [], [], []
    for batch in sampler.first(num_tasks):
        together = vmap(learn)(*batch) if batch[0].is_cuda else zip(*each_task(learn, *batch), strict=True)
        accuracy, in_other, loss, norms = (x if isinstance(x, torch.Tensor) else torch.stack(x) for x in together)
        accuracies.append(accuracy.cpu())
        others.append(in_other.cpu())
        losses.append(loss.sum().item())
        moved.append(norms.cpu())
    accuracy, loss = torch.cat(accuracies), sum(losses) / num_tasks
    found = {"query": accuracy[:, 0], "support": accuracy[:, 1], "moved": torch.cat(moved), "loss": loss}
    return found | ({"other": torch.cat(others)} if both else {})


def update_norms(before: Parameters, after: Parameters) -> torch.Tensor:
    """How far the inner loop moves each of LAYERS: ||theta' - theta|| / ||theta||, all tensors of a layer together.

    Not finite for a layer of zeros, such as the head with --zero_head.
    """
    of_layer: dict[str, list[str]] = {layer: [] for layer in LAYERS}
    for name in before:
        of_layer["head" if name.startswith("head") else f"conv{int(name[-1]) + 1}"].append(name)
    length = lambda tensors: sum(t.square().sum() for t in tensors).sqrt()
    return torch.stack(
        [length(after[k] - before[k] for k in names) / length(before[k] for k in names) for names in of_layer.values()]
    )


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(dim=-1) == labels).float().mean()


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, meta_batch_size=4, train_steps=5000, eval_freq=1000, rotations=True, num_val_tasks=200
    )
    parser.prog = "maml.py"
    add = groups["data"].add_argument
    add("--train_query", type=whole(1), default=5, help="query images of a class in training")
    add("--train_classes", type=whole(2), default=60, help="classes of a training task with a head of prototypes")
    add("--jitter", type=number(0, 1), default=0.1, help="random turn (radians), size and slant of training images")
    add("--shift", type=number(0, 1), default=0.1, help="random shift of training images, a share of half their size")
    add("--fixed_labels", action="store_true", help="training characters keep their labels: see memorization.py")
    add = groups["model"].add_argument
    add("--encoder", choices=["strided", "conv4"], default="conv4", help="Conv4-64, or the paper's for Omniglot")
    add("--width", type=whole(1, 4096), default=64, help="filters of each convolution")
    add(
        "--features",
        choices=["auto", "sphere", "plain"],
        default="auto",
        help="sphere: centred and stretched to one length before the head; auto: before a linear head",
    )
    add("--head", choices=["linear", "proto"], default="linear", help="proto: Proto-MAML, started from the prototypes")
    add("--zero_head", action="store_true", help="every task starts from a head of zeros that is not meta-learned")
    add("--freeze_body", action="store_true", help="ANIL: the inner loop adapts the head alone")
    add(
        "--batch_norm",
        choices=["transductive", "support"],
        default="transductive",
        help="whose statistics normalise the queries: their own, or the support set's",
    )
    add = groups["optimisation"].add_argument
    add("--inner_steps", type=whole(0), default=1, help="gradient steps on a support set in training")
    add("--inner_lr", type=number(), default=0.4, help="rate of the inner steps, or where the learned rates start")
    add("--head_lr", type=number(), default=0.0, help="the same for a linear head; 0: N / sqrt(features)")
    add("--learn_inner_lrs", action="store_true", help="learn a rate per tensor and step")
    own = "learn scales and shifts of batch norm of their own for every inner step (MAML++)"
    add("--per_step_norm", action="store_true", help=own)
    add(
        "--warmup_steps",
        type=whole(0),
        default=4000,
        help="first training steps, one-shot, with a head of prototypes and no inner step; the papers: 0",
    )
    add("--first_order", action="store_true", help="drop the second derivative")
    add("--multi_step_loss", action="store_true", help="early in training count the loss after every inner step")
    orthogonal = "of the outer loop; muon: orthogonal steps of the weights, Adam's of learned rates and --per_step_norm"
    add("--optimizer", choices=["adam", "muon"], default="adam", help=orthogonal)
    add("--learning_rate", type=number(above=True), default=2e-3, help="of the outer loop at its start; muon: say 0.05")
    add("--schedule", choices=["cosine", "constant"], default="cosine", help="cosine: the rate falls to 1 %% of it")
    add("--clip", type=number(), default=1.0, help="largest norm of the meta-gradient; 0: no limit")
    steps = "gradient steps at validation and test (default: as many as --inner_steps)"
    groups["evaluation"].add_argument("--test_inner_steps", type=whole(0), help=steps)
    smoke = {
        "train_steps": 20,
        "eval_freq": 10,
        "num_test_tasks": 20,
        "num_val_tasks": 20,
        "width": 16,
        "encoder": "strided",
        "train_classes": 8,
        "warmup_steps": 5,
    }
    shapes = ("num_classes", "image_size", "encoder", "width", "head", "inner_steps")
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
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
    strided = args.encoder == "strided"
    encoder = Conv4(dataset.images.shape[1], args.width, args.image_size, strided)
    head_lr = (args.head_lr or args.num_classes / encoder.out_features**0.5) if args.head == "linear" else None
    learner = MAML(
        encoder,
        args.num_classes,
        args.inner_steps,
        args.inner_lr,
        args.head,
        args.learn_inner_lrs,
        head_lr,
        args.zero_head,
        args.per_step_norm,
    ).to(device)
    dtype = experiment.precision(args, device)
    s = Setting(
        args.num_classes,
        strided,
        args.head,
        args.freeze_body,
        args.first_order,
        args.batch_norm,
        dtype,
        sphere=args.features == "sphere" or (args.features == "auto" and args.head == "linear"),
    )

    test, runs = fixed_tasks(dataset, "test", args, device), lake_runs(dataset, args, device)
    if args.test:
        step = experiment.load_best(args.checkpoint, learner)
        metrics = {"best_step": step} | test_report(args, learner, test, runs, s, device)
        return experiment.report(args, "maml", dataset.name, metrics, digest=dataset.digest)

    val = fixed_tasks(dataset, "val", args, device)

    def training_tasks(N: int, K: int, Q: int, B: int, seed: int, flags: tuple, fixed_labels=False) -> EpisodeSampler:
        return EpisodeSampler(
            dataset,
            "train",
            N,
            K,
            Q,
            B,
            seed,
            device,
            rotations=args.rotations,
            jitter=args.jitter,
            shift=args.shift,
            fixed_labels=fixed_labels,
            shard=experiment.shard(),
            flags=flags,
        )

    # Prototypes make a head for any number of classes; harder tasks teach the encoder faster.
    N, B = args.train_classes, max(experiment.shard()[1], args.meta_batch_size // 4)
    warmup = training_tasks(N, 1, 1, B, args.random_seed + 1, ("train_classes", None, None))
    if args.head == "linear":
        train = training_tasks(
            args.num_classes,
            args.num_shot,
            args.train_query,
            args.meta_batch_size,
            args.random_seed,
            ("num_classes", "num_shot", "train_query"),
            args.fixed_labels,
        )
    else:
        train = training_tasks(N, args.num_shot, 1, B, args.random_seed, ("train_classes", "num_shot", None))
    experiment.init_from(args, learner)
    s_warmup = s._replace(head="proto" if args.head == "proto" else "one_step", num_classes=warmup.N)
    s_train = s._replace(num_classes=train.N)
    trained = [p for p in learner.parameters() if p.requires_grad]
    optimizers = make_optimizers(learner, args.optimizer, args.learning_rate)
    factor = lambda done: rate_factor(done, args.warmup_steps, args.train_steps, args.schedule)
    schedules = {
        name.replace("optimizer", "schedule"): torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for name, optimizer in optimizers.items()
    }
    run = Run(args, "maml", dataset.name, dataset.digest)
    run.track(model=learner, **optimizers, **schedules, warmup=warmup, sampler=train)

    def of_warmup() -> torch.Tensor:
        return meta_gradient(learner, warmup.sample(), partial(warmup_loss, learner.theta(), s=s_warmup))

    def of_tasks(weights) -> torch.Tensor:
        step_sizes = learner.step_sizes(args.inner_steps)
        loss_of = partial(task_loss, learner.theta(), step_sizes, s=s_train, weights=weights)
        return meta_gradient(learner, train.sample(), loss_of)

    warmup_gradient = Gradient(of_warmup, learner, device, [warmup.generator])
    gradient = Gradient(of_tasks, learner, device, [train.generator])
    for step in run.steps():
        weights = multi_step_weights(args.inner_steps, step / args.train_steps) if args.multi_step_loss else [1.0]
        loss = warmup_gradient() if step <= args.warmup_steps else gradient(torch.tensor(weights, device=device))
        experiment.average_gradients(learner)
        norm = nn.utils.clip_grad_norm_(trained, args.clip or float("inf"))
        run.record(torch.where(norm.isfinite(), loss, norm))  # a norm that is not finite ends the run like such a loss
        for moving in (*optimizers.values(), *schedules.values()):
            moving.step()
        if run.time_to_evaluate():
            with run.clock_stopped():
                on_val = evaluate(learner, val, args.num_val_tasks, s, args.test_inner_steps)
                # The curve on the test classes is for plots; nothing is decided by it.
                on_test = evaluate(learner, test, max(2, args.num_val_tasks // 3), s, args.test_inner_steps)
            # No checkpoint of the warm-up is chosen: it is not yet the method.
            accuracy = on_val["query"][:, -1].mean().item()
            # Of what is memorised the last is kept: it is where training ends that is of interest.
            chosen_by = None if args.fixed_labels else accuracy
            run.evaluated(chosen_by, scalars(learner, on_val, on_test, norm, args), choose=step > args.warmup_steps)
    run.load_best(learner)
    log_episode(run, test, lambda *task: guess(learner, s, args.test_inner_steps, *task))
    metrics = test_report(args, learner, test, runs, s, device)
    if args.fixed_labels:
        found = evaluate(learner, train, args.num_val_tasks, s, args.test_inner_steps)["query"]
        metrics |= {"train_accuracy": found[:, -1].mean().item(), "train_accuracy_before": found[:, 0].mean().item()}
    return run.finish(metrics)


def scalars(learner: MAML, on_val: dict, on_test: dict, norm: torch.Tensor, args) -> dict[str, float]:
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
        "Memory/peak_MB": peak_memory(norm.device),
    }
    found |= {f"Adaptation/query_after_{i}_steps": accuracy for i, accuracy in enumerate(query)}
    if args.learn_inner_lrs:
        rates = [f"Rates/{name}_step{i + 1}" for i in range(args.inner_steps) for name in learner.names]
        found |= dict(zip(rates, learner.rates.flatten().tolist(), strict=True))
    return found


def test_report(args, learner: MAML, test: EpisodeSampler, runs: LakeRuns | None, s: Setting, device) -> dict:
    """Accuracy on the fixed test tasks before and after adaptation (on Lake's after), in both modes of batch norm."""
    metrics, steps = {}, args.test_inner_steps
    found = evaluate(learner, test, args.num_test_tasks, s, steps, both=True)
    of_runs = evaluate(learner, runs, runs.B, s, steps, both=True) if runs else None
    for mode in ("transductive", "support"):
        after = lambda found, mode=mode: found["query"][:, -1] if mode == s.batch_norm else found["other"]
        mean, ci95 = experiment.mean_and_ci95(after(found))
        metrics |= {f"test_accuracy_{mode}": mean, f"ci95_{mode}": ci95}
        if of_runs:
            metrics |= experiment.figures_of(f"_lake_runs_{mode}", after(of_runs))
        if mode == s.batch_norm:
            metrics |= {
                "test_accuracy": mean,
                "ci95": ci95,
                "num_test_tasks": args.num_test_tasks,
                "accuracy_before_adaptation": experiment.mean_and_ci95(found["query"][:, 0])[0],
                "query_accuracy_per_step": found["query"].mean(0).tolist(),
                "support_accuracy_per_step": found["support"].mean(0).tolist(),
                "update_norm_per_layer": {
                    layer: value if math.isfinite(value) else None
                    for layer, value in zip(LAYERS, found["moved"].mean(0).tolist(), strict=True)
                },
                "accuracies": [round(a, 4) for a in found["query"][:, -1].tolist()],
            }
    return metrics | {
        "batch_norm": args.batch_norm,
        "dtype": str(s.dtype).removeprefix("torch."),
        "peak_memory_MB": round(peak_memory(device), 1),
        "device": experiment.device_name(device),
        "parameters": sum(p.numel() for p in learner.theta().values()),
        "cpu_cores": os.cpu_count(),
    }


def guess(learner: MAML, s: Setting, steps: int, support, support_labels, query) -> torch.Tensor:
    """The classes [N*Q] of the queries of one task after adaptation."""
    s = s._replace(first_order=True)
    path = adapt(learner.theta(), learner.step_sizes(steps), support[0], support_labels[0], s)
    return query_logits(path[-1], support[0], query[0], s).argmax(dim=-1)


# ------------------------------------------------------------------- engine, schedules, memory


def meta_gradient(learner: MAML, batch, loss_of) -> torch.Tensor:
    """Add the gradient of the mean of loss_of(task) over the tasks of a meta-batch to `.grad`; returns the mean.

    On a GPU all tasks go through one `vmap`. On a CPU convolutions with different weights for every task are slow
    when batched, and each task goes by itself; its graph is freed before the next.
    """
    if batch[0].is_cuda:
        loss = vmap(loss_of)(*batch).mean()
        loss.backward()
        return loss.detach()
    parameters = [p for p in learner.parameters() if p.requires_grad]

    def gradient_of(*task):
        loss = loss_of(*task)
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    losses, gradients = zip(*each_task(gradient_of, *batch), strict=True)
    for p, of_tasks in zip(parameters, zip(*gradients, strict=True), strict=True):
        if of_tasks[0] is None:
            continue  # a head that the warm-up does not use: Adam's averages of it begin with its first gradient
        mean = sum(of_tasks) / len(losses)  # in the tasks' order
        p.grad = mean if p.grad is None else p.grad + mean
    return sum(losses) / len(losses)


def each_task(function, *batch: torch.Tensor) -> list:
    """[function(task) for task in batch], on all CPU cores: one thread a task beats many threads an operation."""
    workers = torch.get_num_threads()
    tasks = list(zip(*batch, strict=True))
    if workers == 1 or len(tasks) == 1:
        return [function(*task) for task in tasks]
    enabled = torch.is_grad_enabled()  # belongs to a thread, as the number of threads of an operation does

    def alone(task):
        torch.set_num_threads(1)
        with torch.set_grad_enabled(enabled):
            return function(*task)

    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(alone, tasks))
    finally:
        torch.set_num_threads(workers)


def make_optimizers(learner: MAML, kind: str, rate: float) -> dict[str, torch.optim.Optimizer]:
    """Of the outer loop. With Muon what each inner step has of its own, no matrix, is moved by Adam at STEPS_RATE."""
    trained = [p for p in learner.parameters() if p.requires_grad]
    if kind == "adam":
        return {"optimizer": torch.optim.Adam(trained, rate, fused=True)}
    of_steps = [p for p in (learner.rates, learner.shifts) if p is not None and p.requires_grad]
    weights = [p for p in trained if not any(p is own for own in of_steps)]
    more = {"steps_optimizer": torch.optim.Adam(of_steps, STEPS_RATE, fused=True)} if of_steps else {}
    return {"optimizer": Muon(weights, rate)} | more


def multi_step_weights(steps: int, progress: float) -> list[float]:
    """Weights of the losses after each inner step (MAML++): equal at first, only the last from `progress` 0.25 on."""
    if steps < 2 or progress >= 0.25:
        return [1.0]
    others = (1 - progress / 0.25) / steps
    return [others] * (steps - 1) + [1 - (steps - 1) * others]


def rate_factor(done: int, warmup_steps: int, train_steps: int, schedule: str) -> float:
    """The outer rate after `done` steps as a share of its start: a cosine to 1 %, in the warm-up one to 10 % first.

    The steps after the warm-up refine what it has found; at the full rate they destroy it.
    """
    if schedule == "constant":
        return 1.0
    first = done < warmup_steps
    begin, end = (1.0, 0.1) if first else (0.1 if warmup_steps else 1.0, 0.01)
    share = done / warmup_steps if first else (done - warmup_steps) / (train_steps - warmup_steps)
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


def peak_memory(device: torch.device) -> float:
    """Most memory so far in MB: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    experiment.run_script(main)
