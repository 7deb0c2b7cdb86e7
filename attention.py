"""A black-box learner that looks back: every query attends to all support images and takes over their labels.

Mishra et al. 2018, "A simple neural attentive meta-learner" (SNAIL), with the attention of Vaswani et al. 2017. Nothing
is compressed into a state: causal attention compares the support images with those before them, and each query with the
support set. The probability of a class is the share of a query's last look that falls on its images (Vinyals et al.
2016).

    python attention.py                                     5-way 1-shot, the default
    python attention.py --num_shot 5 --shared_classes 20    trained with five shots
    python attention.py --test --checkpoint RUN_DIR --num_classes 20 --num_shot 5    more than it was trained with
    python attention.py --smoke                             a complete run in seconds

Measured: 5-way 1-shot 99.08 ± 0.08 % (three seeds, 8,000 steps), 1.6 minutes on an NVIDIA H200.
Everything else: docs/attention.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole
from fewshot.experiment.replay import recorded
from fewshot.learners import memory
from fewshot.learners.memory import ImageReader, features_once, guess
from fewshot.learners.muon import Muon
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler, deal_tasks
from fewshot.tasks.lake import lake_runs

import torch
import torch.nn.functional as F
from torch import nn

from load_data import log_episode

# ---------------------------------------------------------------------------------- attention


def visible(S: int, N: int, device=None) -> torch.Tensor:
    """Who may look at whom, bool [S + N, S + N]: row t is the item that looks.

    A support item sees the support items up to itself; each of the N queries sees the support set and itself, so that N
    queries in one pass are asked as if each were alone.
    """
    seen = torch.ones(S + N, S + N, dtype=torch.bool, device=device).tril()
    seen[S:, S:] = torch.eye(N, dtype=torch.bool, device=device)
    return seen


def attend(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys (last axis) that `seen` allows; each row sums to one (Vaswani et al., eq. 1)."""
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


class AttentionLayer(nn.Module):
    """Items look at other items and take over what they find: multi-head attention, then two linear layers.

    Labels enter by comparison: `same` is added to a head's score where the two items bear the same label, so that a
    head can gather the images of a class or pass them over. No label has a name, and permuting the labels permutes
    nothing. The last linear maps start at zero: at first the layer hands on what it gets.
    """

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.same = nn.Parameter(torch.zeros(heads, 1, 1))
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        for last in (self.out, self.mlp[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: torch.Tensor, same: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Items x [B, T, D]; same [B, T, T] is 1 where labels agree; seen [T, T]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        weights = attend(q @ k.mT / q.shape[-1] ** 0.5 + self.same * same[:, None], seen)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    """Attention layers over the support set and the queries, then one look back that reads the labels off.

    The last look (SNAIL's read; Vinyals et al. 2016, eq. 1) gives the class of an item as the share of its attention
    that falls on each label, p(c) = sum over support items j of a_j [y_j = c]. Scores are negative squared distances of
    learned projections, which start as the identity: training starts at the nearest-neighbour rule. Any number of
    classes and shots can be asked of one network.
    """

    def __init__(self, D: int, layers: int = 1, heads: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(D, heads) for _ in range(layers))
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)
        for linear in (self.query, self.key):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def look(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Attention weights [B, T, S] of all T = (K+1) N items over the S = K N support items; rows sum to one."""
        rows, N, D = features.shape[1:]
        S = (rows - 1) * N
        x, y = features.flatten(1, 2), labels[:, :-1].flatten(1, 2)  # [B, T, D], [B, S, N]
        same = F.pad(y @ y.mT, (0, N, 0, N))  # queries have no labels
        seen = visible(S, N, x.device)
        for layer in self.layers:
            x = layer(x, same, seen)
        q, k = self.query(x), self.key(x[:, :S])
        # -|q - k|^2 without |q|^2, which the softmax does not see; over sqrt(D) lest it be saturated at first.
        return attend((2 * q @ k.mT - k.square().sum(dim=-1)[:, None]) / D**0.5, seen[:, :S])

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [B, K+1, N, N] for features [B, K+1, N, D] and one-hot labels [B, K+1, N, N].

        The labels of the last row, the queries, are not looked at. A support item sees its own label.
        """
        shares = self.look(features, labels) @ labels[:, :-1].flatten(1, 2)  # [B, T, N]
        return torch.log(shares + 1e-30).view(labels.shape)


# -------------------------------------------------------------------------------- the learner


class AttentionLearner(ImageReader):
    """An encoder of images and causal attention over an episode's (image, label) pairs."""

    def __init__(self, layers: int = 2, heads: int = 4, encoder: str = "conv4", dim_input: int = 784):
        super().__init__(encoder, dim_input)
        self.attention = CausalAttention(self.D, layers, heads)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [B, K+1, N, N] for images [B, K+1, N, 784] and one-hot labels [B, K+1, N, N].

        The labels of the last row, the queries, are not looked at. A query is asked alone: it sees no other query.
        """
        return self.attention(self.encode(images), labels)


def query_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the N queries of each task; logits and labels are [B, K+1, N, N]."""
    return F.cross_entropy(logits[:, -1].flatten(0, 1), labels[:, -1].flatten(0, 1).argmax(dim=-1))


def large_task_loss(attention: CausalAttention, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one task of P classes, features [1, K+1, P, D]; it tells more classes apart than a dealt one.

    With one shot, support and queries also change places: the same features give twice as many questions.
    """
    loss = query_loss(attention(features, labels).float(), labels)
    if features.shape[1] > 2:
        return loss
    order = labels[:, 1].argmax(dim=-1).argsort(dim=1)  # queries in class order, to serve as support
    query = features[:, 1].gather(1, order[..., None].expand_as(features[:, 1]))
    swapped, in_order = torch.stack([query, features[:, 0]], dim=1), labels[:, :1].expand_as(labels)
    return (loss + query_loss(attention(swapped, in_order).float(), in_order)) / 2


@torch.no_grad()
def evaluate(model: AttentionLearner, sampler: EpisodeSampler, num_tasks: int) -> tuple[torch.Tensor, float]:
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], and the mean loss."""
    was_training = model.training
    model.eval()
    correct, losses = [], []
    once = features_once(model, sampler, num_tasks)
    answer = model if once is None else model.attention
    for images, labels in sampler.first(num_tasks, sampler.sample_rows, features=once):
        logits = answer(images, labels)
        losses.append(query_loss(logits, labels).item() * len(labels))
        right = logits[:, -1].argmax(dim=-1) == labels[:, -1].argmax(dim=-1)  # [B, N]
        correct.append(right.float().mean(dim=1).cpu())
    model.train(was_training)
    return torch.cat(correct), sum(losses) / num_tasks


@torch.no_grad()
def look(model: AttentionLearner, sampler: EpisodeSampler):
    """A matplotlib figure of the sampler's first task: which support images each query looks at."""
    images, labels = next(sampler.first(1, sampler.sample_rows))
    model.eval()
    looks = model.attention.look(model.encode(images), labels)[0, -sampler.N :]
    support, query = (part.reshape(-1, *sampler.images.shape[1:]) for part in (images[0, :-1], images[0, -1]))
    return memory.attention_figure(support, query, looks)


# --------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    sizes = {"meta_batch_size": 256, "train_steps": 4000, "eval_freq": 500}
    sizes |= {"num_val_tasks": 2000, "num_test_tasks": 10_000}
    parser, groups = experiment.make_parser(__doc__, without=("--num_query",), num_query=1, rotations=True, **sizes)
    parser.prog = "attention.py"
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
    add = groups["model"].add_argument
    add("--num_layers", type=whole(1, 100), default=2, help="layers of attention before the last look")
    add("--heads", type=whole(1, 64), default=4, help="of each layer")
    encoder = "reads the images first: the Conv4 of protonet.py, or a strided one"
    add("--encoder", choices=["none", "strided", "conv4"], default="conv4", help=encoder)
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=1e-3, help="of Adam, at its peak")
    add("--encoder_rate", type=number(), default=0.1, help="of Muon, for the encoder alone; 0: Adam trains it too")
    add("--schedule", choices=["constant", "linear"], default="linear", help="linear: falls to 0 over the second half")
    shared = "deal the tasks of a step from the images of P classes, each encoded once; 0: no"
    add("--shared_classes", type=whole(0), default=60, metavar="P", help=shared)
    add("--clip", type=number(above=True), default=1.0, help="largest norm of the gradient")
    add = groups["data"].add_argument
    add("--jitter", type=number(0, 1), default=0.1, help="random turn (radians), size and slant of training images")
    add("--shift", type=number(0, 1), default=0.1, help="random shift of training images, a share of half their size")
    smoke = {"meta_batch_size": 4, "train_steps": 10, "eval_freq": 5, "num_val_tasks": 40, "num_test_tasks": 120}
    shapes = ("heads", "num_layers", "encoder", "image_size")  # it may be asked for other N and K than it learned
    falls = "its learning rate falls to zero there (--schedule linear)"
    longer = lambda flags: falls if flags["schedule"] == "linear" else None
    args = experiment.parse(parser, argv, smoke | {"shared_classes": 20}, fixed=shapes, longer=longer)
    if not args.test and 0 < args.shared_classes < args.num_classes:
        raise UserError(f"--shared_classes {args.shared_classes} is less than --num_classes {args.num_classes}")
    if args.encoder != "none" and args.image_size != 28:
        raise UserError(f"--encoder {args.encoder} reads 28x28 images; drop --image_size {args.image_size}")
    if args.encoder_rate and args.encoder == "none":
        raise UserError(f"--encoder_rate {args.encoder_rate:g} needs an encoder; add --encoder conv4")
    if (64 if args.encoder != "none" else args.image_size**2) % args.heads:
        raise UserError(f"--heads {args.heads} does not divide the features of an image; use 1, 2 or 4")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device)
    if args.shared_classes and experiment.shard()[1] > 1:
        raise UserError("--shared_classes cannot be split over processes; use 0 or run without torchrun")
    dataset = load_for(args)
    B, N, K, P = args.meta_batch_size, args.num_classes, args.num_shot, args.shared_classes
    flags = ("num_classes", "num_shot", None)
    test = EpisodeSampler(dataset, "test", N, K, 1, 200, TEST_SEED, device, flags=flags)
    runs = lake_runs(dataset, args, device)
    model = AttentionLearner(args.num_layers, args.heads, args.encoder, dataset.images[0].size)
    model = model.to(device, memory_format=torch.channels_last)
    where = {"dtype": str(dtype).removeprefix("torch."), "device": experiment.device_name(device)}
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        metrics = {"best_step": step} | test_report(model, test, args.num_test_tasks, runs) | where
        figure, name = look(model, test), f"attention_{dataset.name}.png"
        experiment.write_beside(args.checkpoint, name, lambda out: figure.savefig(out, format="png"))
        return experiment.report(args, "attention", dataset.name, metrics, digest=dataset.digest)

    train = EpisodeSampler(
        dataset,
        "train",
        P or N,
        K,
        batch_size=1 if P else B,
        seed=args.random_seed,
        device=device,
        rotations=args.rotations,
        jitter=args.jitter,
        shift=args.shift,
        shard=experiment.shard(),
        flags=("shared_classes", *flags[1:]) if P not in (0, N) else flags,
    )
    val = EpisodeSampler(dataset, "val", N, K, 1, 200, VAL_SEED, device, flags=flags)
    experiment.init_from(args, model)
    encoder = list(model.encoder.parameters()) if args.encoder_rate else []
    others = model.attention.parameters() if encoder else model.parameters()
    optimizers = {"optimizer": torch.optim.Adam(others, args.learning_rate, fused=True)}
    if encoder:
        optimizers["encoder_optimizer"] = Muon(encoder, args.encoder_rate)
    share = lambda done: min(1.0, 2 * (1 - done / args.train_steps)) if args.schedule == "linear" else 1.0
    schedules = {
        name.replace("optimizer", "schedule"): torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        for name, optimizer in optimizers.items()
    }
    run = Run(args, "attention", dataset.name, dataset.digest)
    run.track(model=model, **optimizers, **schedules, sampler=train)

    @recorded(model, device, train.generator)  # one CUDA graph on a GPU; on a CPU this line does nothing
    def forward_backward() -> torch.Tensor:
        images, labels = train.sample_rows()  # [B, K+1, N, 784], [B, K+1, N, N]; or one task of P classes
        with experiment.autocast(device, dtype):
            features, loss = model.encode(images), 0
            if P:
                loss = large_task_loss(model.attention, features, labels)
                features, labels = deal_tasks(features, labels, B, N, train.generator)
            loss = loss + query_loss(model.attention(features, labels).float(), labels)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    for _ in run.steps():
        loss = forward_backward()
        experiment.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer, schedule in zip(optimizers.values(), schedules.values(), strict=True):
            optimizer.step()
            schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                scalars = {}
                for part, sampler in (("val", val), ("test", test)):  # test is only drawn; nothing is decided by it
                    accuracies, loss_there = evaluate(model, sampler, args.num_val_tasks)
                    scalars |= {f"Loss/{part}": loss_there, f"Accuracy/{part}": accuracies.mean().item()}
            run.evaluated(scalars["Accuracy/val"], scalars)
    run.load_best(model)
    metrics = test_report(model, test, args.num_test_tasks, runs) | where
    log_episode(run, test, lambda support, _, query: guess(model, support, query))
    if run.writes:
        run.writer.add_figure("attention", look(model, test), run.step)
    return run.finish(metrics)


def test_report(model: AttentionLearner, test: EpisodeSampler, num_tasks: int, runs: EpisodeSampler | None) -> dict:
    """Accuracy on the fixed test tasks (and Lake's `runs`); `_alone` is the same, for its queries are asked alone."""
    accuracies, figures = evaluate(model, test, num_tasks)[0], {}
    asked = {"": accuracies} | ({"_lake_runs": evaluate(model, runs, runs.B)[0]} if runs else {})
    for name, found in asked.items():
        figures |= experiment.figures_of(name, found) | experiment.figures_of(f"{name}_alone", found)
    return figures | {
        "num_test_tasks": num_tasks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
    }


if __name__ == "__main__":
    experiment.run_script(main)
