"""Prototypical networks: a class is the mean of its embedded support images, a query the nearest class.

Snell et al. 2017, "Prototypical networks for few-shot learning". A Conv4 embeds every image; the
prototype of a class is the mean embedding of its support images; a softmax over the negative squared
Euclidean distances to the prototypes labels the queries. Nothing is adapted at test time, and batch
norm uses running averages, so no query influences another (non-transductive).

    python protonet.py --num_classes 5 --num_shot 1            a minute of training on two CPU cores
    python protonet.py --encoder residual --image_size 32      a deeper encoder, at twice the time a step
    python protonet.py --smoke                                 a complete run in seconds
    python protonet.py --test --checkpoint RUN_DIR --num_classes 20 --num_shot 5
    python protonet.py --predict DIR --checkpoint RUN_DIR      label your own pictures: DIR/support/CLASS/*.png
                                                               and DIR/query/*.png
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import experiment
from backbone import EPS, Conv4, Muon, fast_dtype, norm_of_all, prototypes
from experiment import Run, UserError, number, whole
from load_data import (
    IMAGE_SUFFIXES,
    Dataset,
    EpisodeSampler,
    distort,
    episode_figure,
    fixed_tasks,
    load_dataset,
    read_image,
    resize,
)

# ---------------------------------------------------------------------------------- the method


def squared_distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """||f - c||^2 for points f [B, M, D] and centres c [B, N, D] -> [B, M, N]."""
    cross = points @ centres.transpose(1, 2)
    return points.square().sum(-1, keepdim=True) - 2 * cross + centres.square().sum(-1)[:, None]


def proto_logits(support: torch.Tensor, query: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Class scores of the queries (eq. 2): features [B, N*K, D] in class order and [B, M, D] -> [B, M, N]."""
    return -squared_distances(query, prototypes(support, num_classes))


def temper(features: torch.Tensor) -> torch.Tensor:
    """Shrink features [..., D] so that squared distances are divided by sqrt(D), as attention does.

    Squared distances in 64 dimensions are so large at first that the softmax is saturated and little
    is learned.
    """
    return features / features.shape[-1] ** 0.25


def embed(encoder: nn.Module, images: torch.Tensor, dtype: torch.dtype, **norm) -> torch.Tensor:
    """Features [B, n, D] in float32 of images [B, n, C, H, W]: all tasks in one call of the encoder."""
    B, n = images.shape[:2]
    flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        features = encoder(flat, **norm)
    return temper(features.float()).view(B, n, -1)


def episode_loss(encoder: nn.Module, episode, num_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """Cross entropy of the queries given the support set; batch norm sees the whole meta-batch.

    When support and query have the same size they also change places: the same features give twice
    as many questions.
    """
    support, support_labels, query, query_labels = episode
    n = support.shape[1]
    features = embed(encoder, torch.cat([support, query], dim=1), dtype, norm="batch", momentum=0.1)
    support, query = features[:, :n], features[:, n:]
    loss = F.cross_entropy(proto_logits(support, query, num_classes).flatten(0, 1), query_labels.flatten())
    if support.shape == query.shape:
        order = query_labels.argsort(dim=1, stable=True)  # queries in class order, to serve as support
        query = query.gather(1, order[..., None].expand_as(query))
        swapped = proto_logits(query, support, num_classes).flatten(0, 1)
        loss = (loss + F.cross_entropy(swapped, support_labels.flatten())) / 2
    return loss


class Residual(Conv4):
    """A deeper encoder of the same size: a pair of convolutions behind each block of a Conv4 adds to its output.

    He et al. 2016. The last batch norm of a pair starts at scale zero: at first the network is a Conv4.
    """

    def __init__(self, channels: int = 1, width: int = 64, image_size: int = 28):
        super().__init__(channels, width, image_size)
        for name in (f"{i}{which}" for i in range(4) for which in "ab"):
            weight = torch.empty(width, width, 3, 3)
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
            self.register_parameter(f"weight{name}", nn.Parameter(weight))
            self.register_parameter(f"gamma{name}", nn.Parameter(torch.full((width,), float("a" in name))))
            self.register_parameter(f"beta{name}", nn.Parameter(torch.zeros(width)))
            self.register_buffer(f"mean{name}", torch.zeros(width))
            self.register_buffer(f"var{name}", torch.ones(width))

    def forward(self, images, norm: str = "running", momentum: float = 0.0):
        """Features [n, out_features] of images [n, C, H, W]; norm and momentum as Conv4's, "running" or "batch"."""
        x = images
        for i in range(4):
            x = F.relu(F.max_pool2d(self.convolve(x, f"{i}", norm, momentum), 2))
            inside = F.relu(self.convolve(x, f"{i}a", norm, momentum))
            x = F.relu(x + self.convolve(inside, f"{i}b", norm, momentum))
        return x.flatten(1)

    def convolve(self, x: torch.Tensor, name: str, norm: str, momentum: float) -> torch.Tensor:
        """The convolution `name` and its batch norm."""
        if norm not in ("running", "batch"):
            raise ValueError(f"norm {norm!r} is unknown here; use running or batch")
        of = {kind: getattr(self, kind + name) for kind in ("weight", "gamma", "beta", "mean", "var")}
        x = F.conv2d(x, of["weight"], padding=1)
        averages, affine = (of["mean"], of["var"]), (of["gamma"], of["beta"])
        if norm == "batch" and momentum > 0 and dist.is_initialized() and dist.get_world_size() > 1:
            return norm_of_all(x, *averages, *affine, momentum)
        if norm == "batch" and momentum == 0:
            averages = (None, None)
        return F.batch_norm(x, *averages, *affine, training=norm == "batch", momentum=momentum, eps=EPS)


def make_encoder(args, channels: int) -> Conv4:
    """The encoder that --encoder, --width and --image_size describe."""
    return (Residual if args.encoder == "residual" else Conv4)(channels, args.width, args.image_size)


@torch.no_grad()
def embed_split(encoder: nn.Module, sampler: EpisodeSampler, dtype: torch.dtype, views: int = 1, limits=(0.1, 0.1)):
    """Features [images, D] of all images of the sampler's split, each embedded once for all tasks.

    With running averages an image's features depend on nothing but itself. With views > 1 they are the mean over the
    image and views - 1 copies of it, distorted at random by up to `limits`, the jitter and shift of training.
    """
    images = sampler.images
    limits = torch.tensor([limits[0]] * 4 + [limits[1]] * 2)
    generator = torch.Generator().manual_seed(sampler.seed)
    features = []
    for part in images.split(500):
        part, total = part.float() / 255, 0
        for view in range(views):
            noise = 2 * torch.rand(len(part), 6, generator=generator) - 1
            seen = distort(part, (limits * noise).to(part.device)) if view else part
            total = total + embed(encoder, seen[None], dtype)[0]
        features.append(total / views)
    return torch.cat(features)


@torch.no_grad()
def evaluate(features: torch.Tensor, sampler: EpisodeSampler, num_tasks: int):
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], and the mean loss.

    features: what `embed_split` gives, so that no query influences another (non-transductive).
    """
    sampler.reset()
    correct, losses = [], []
    while (done := sum(map(len, correct))) < num_tasks:
        support, _, query, labels = sampler.sample(features=features)
        logits = proto_logits(support, query, sampler.N)
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
        right = (logits.argmax(dim=-1) == labels).float().mean(dim=1)
        correct.append(right[: num_tasks - done].cpu())
    return torch.cat(correct), sum(losses) / len(losses)


class OneDrawer(EpisodeSampler):
    """Tasks whose K support images of every class are by the same K people, the queries by others.

    So are the one-shot trials of Lake et al. 2015. Image d of each character of an alphabet is by its drawer d; all
    characters need as many images.
    """

    def draw(self, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        rows, order = super().draw(batch_size)  # [B, N, K + Q]
        drawers = rows % self.same_count
        return rows - drawers + drawers[:, :1], order  # those that the first class has drawn


@torch.no_grad()
def evaluate_transductive(encoder: nn.Module, sampler: EpisodeSampler, num_tasks: int, dtype: torch.dtype):
    """Accuracy of each task [num_tasks] when batch norm takes the statistics of its own support set and queries."""
    sampler.reset()
    correct = []
    while len(correct) < num_tasks:
        support, _, query, labels = sampler.sample()
        for s, q, y in zip(support, query, labels, strict=True):
            features = embed(encoder, torch.cat([s, q])[None], dtype, norm="batch")
            logits = proto_logits(features[:, : len(s)], features[:, len(s) :], sampler.N)
            correct.append((logits[0].argmax(dim=-1) == y).float().mean())
    return torch.stack(correct[:num_tasks]).cpu()


# ---------------------------------------------------------------------------- your own pictures


def prepare_drawing(image: torch.Tensor, ink: str, size: int) -> torch.Tensor:
    """A photographed or drawn character [C, H, W] in 0..255 as the training images look: [1, size, size].

    Grey; bright strokes on dark paper (`ink` says how it is now: dark, bright, or auto, which takes the
    border for paper); contrast stretched; cut out around the ink, with a margin.
    """
    grey = image.float().mean(dim=0)
    border = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).median()
    if ink == "auto":
        ink = "dark" if border > grey.mean() else "bright"
    level = (border - grey if ink == "dark" else grey - border).clamp(min=0)
    level = level / level.max().clamp(min=1)
    ys, xs = (level > 0.4).nonzero(as_tuple=True)
    if len(ys) == 0:
        return torch.zeros(1, size, size)
    top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
    side = int(1.35 * max(bottom - top, right - left)) + 2
    canvas = torch.zeros(side, side)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    canvas[y : y + bottom - top, x : x + right - left] = level[top:bottom, left:right]
    small = F.interpolate(canvas[None, None], size=(size, size), mode="bilinear", antialias=True)[0]
    return (small / small.max()).clamp(0, 1)  # thin strokes lose contrast when they shrink


def read_pictures(folder: Path, what: str) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise UserError(f"--predict: {what} {folder} has no pictures; put .png or .jpg files there")
    return files


def predict(args, encoder: nn.Module, channels: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Label DIR/query/* by DIR/support/CLASS/*; prints a table, writes predictions.csv and .png."""
    root = Path(args.predict)
    for part in ("support", "query"):
        if not (root / part).is_dir():
            raise UserError(f"--predict: {root / part} is missing; DIR holds support/CLASS/*.png and query/*.png")
    classes = sorted(p for p in (root / "support").iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"--predict: {root / 'support'} has {len(classes)} class folders; it takes two or more")

    def load(path: Path) -> torch.Tensor:
        image = torch.from_numpy(read_image(path, str(path)))
        if channels == 1:
            return prepare_drawing(image, args.ink, args.image_size)
        small = resize(image.expand(channels, -1, -1)[None].numpy(), args.image_size)
        return torch.from_numpy(small)[0].float() / 255

    support = [(i, load(file)) for i, c in enumerate(classes) for file in read_pictures(c, "class")]
    files = read_pictures(root / "query", "folder")
    query = torch.stack([load(file) for file in files]).to(device)
    labels = torch.tensor([i for i, _ in support], device=device)
    with torch.no_grad():
        features = embed(encoder, torch.stack([image for _, image in support]).to(device)[None], dtype)[0]
        one_hot = F.one_hot(labels, len(classes)).float()
        centres = (one_hot.T @ features) / one_hot.sum(dim=0)[:, None]  # classes may differ in size
        logits = -squared_distances(embed(encoder, query[None], dtype), centres[None])[0]
    probability, guess = logits.softmax(dim=-1).max(dim=-1)
    rows = [
        {"file": file.name, "predicted_class": classes[int(g)].name, "probability": round(float(p), 4)}
        for file, g, p in zip(files, guess, probability, strict=True)
    ]
    width = max(len(row["file"]) for row in rows) + 2
    for row in rows:
        print(f"{row['file']:{width}}{row['predicted_class']:24}{row['probability']:.3f}")
    folder = Path(args.checkpoint)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    experiment.write_atomically(folder / "predictions.csv", lambda out: out.write(text.getvalue().encode()))
    figure = prediction_figure(support, classes, query.cpu(), rows)
    experiment.write_atomically(folder / "predictions.png", lambda out: figure.savefig(out, dpi=120, format="png"))
    print(f"written: {folder / 'predictions.csv'}, {folder / 'predictions.png'}")
    return rows


def prediction_figure(support, classes, query, rows):
    """One row a class: its first support image, then the queries it was chosen for."""
    from matplotlib.figure import Figure

    members = [[j for j, row in enumerate(rows) if row["predicted_class"] == c.name][:8] for c in classes]
    columns = 1 + max(1, *map(len, members))
    figure = Figure(figsize=(1.3 * columns, 1.45 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")

    def show(ax, image, title):
        image = image.permute(1, 2, 0).numpy()
        ax.imshow(1 - image if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=8, parse_math=False)

    for i, c in enumerate(classes):
        show(axes[i, 0], next(image for label, image in support if label == i), f"class {c.name[:14]}")
        for column, j in enumerate(members[i], start=1):
            show(axes[i, column], query[j], f"{rows[j]['file'][:14]} {rows[j]['probability']:.2f}")
    return figure


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, meta_batch_size=1, train_steps=2500, eval_freq=250, rotations=True, num_val_tasks=1000
    )
    parser.prog = "protonet.py"
    add = groups["data"].add_argument
    add("--train_classes", type=whole(2), default=60, help="classes in a training task; the paper: 60")
    add("--train_shot", type=whole(1), default=1, help="support images of each class in training")
    add("--train_query", type=whole(1), default=1, help="query images of each class in training")
    add("--jitter", type=number(0, 1), default=0.1, help="random turn (radians), size and slant of training images")
    add("--shift", type=number(0, 1), default=0.1, help="random shift of training images, a share of half their size")
    add("--within_alphabet", action="store_true", help="test tasks of characters of one alphabet (Lake et al.)")
    add("--train_within_alphabet", action="store_true", help="training tasks too: likeness is learned where it is hard")
    add("--predict", metavar="DIR", help="label DIR/query/* by DIR/support/CLASS/*, with --checkpoint")
    add("--ink", choices=["auto", "dark", "bright"], default="auto", help="for --predict: strokes against the paper")
    add = groups["model"].add_argument
    add("--encoder", choices=["conv4", "residual"], default="conv4", help="residual: twelve convolutions, not four")
    add("--width", type=whole(1), default=64, help="filters of each convolution")
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=0.1, help="of Muon, at its peak")
    views = "the final test averages the features of so many slightly distorted copies of each image"
    groups["evaluation"].add_argument("--views", type=whole(1), default=8, help=views)
    smoke = {"train_steps": 20, "eval_freq": 10, "num_test_tasks": 20, "num_val_tasks": 20, "train_classes": 10,
             "width": 16, "views": 2}  # fmt: skip
    args = experiment.parse(parser, argv, smoke, fixed=("encoder", "width", "image_size"))
    if args.predict and not args.checkpoint:
        raise UserError("--predict needs --checkpoint RUN_DIR, the trained run")
    return args


def main(argv=None) -> dict | list[dict]:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = fast_dtype(args.dtype, device)
    if args.predict:
        weight = experiment.load_checkpoint(Path(args.checkpoint) / "best.pt")["model"]["weight0"]
        encoder = make_encoder(args, weight.shape[1]).to(device)
        experiment.load_best(args.checkpoint, encoder)
        return predict(args, encoder, weight.shape[1], dtype, device)

    dataset = load_dataset(args.dataset, args.data_folder, args.split, args.image_size)
    encoder = make_encoder(args, dataset.images.shape[1]).to(device, memory_format=torch.channels_last)

    if args.test:
        step = experiment.load_best(args.checkpoint, encoder)
        metrics = {"best_step": step} | test_report(args, encoder, dataset, dtype, device)
        return experiment.report(args, "protonet", dataset.name, metrics)

    test = fixed_tasks(dataset, "test", args, device, within_alphabet=args.within_alphabet)
    # Of any alphabets: the 100 characters of validation are too few of one.
    val = fixed_tasks(dataset, "val", args, device)
    N = args.train_classes
    train = EpisodeSampler(
        dataset, "train", N, args.train_shot, args.train_query, args.meta_batch_size, args.random_seed, device,
        rotations=args.rotations, within_alphabet=args.train_within_alphabet, jitter=args.jitter, shift=args.shift,
        shard=experiment.shard(),
    )  # fmt: skip
    optimizer = Muon(encoder.parameters(), args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # fewer than 20 steps it cannot divide into phases
        optimizer, args.learning_rate, max(20, args.train_steps + 1), pct_start=0.2, cycle_momentum=False
    )
    run = Run(args, "protonet", dataset.name)
    run.track(model=encoder, optimizer=optimizer, schedule=schedule, sampler=train)
    for _ in run.steps():
        loss = episode_loss(encoder, train.sample(), N, dtype)
        optimizer.zero_grad()
        loss.backward()
        experiment.average_gradients(encoder)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                val_accuracy, val_loss = evaluate(embed_split(encoder, val, dtype), val, args.num_val_tasks)
                # The curve on the test classes is for plots; nothing is decided by it.
                test_accuracy, test_loss = evaluate(embed_split(encoder, test, dtype), test, args.num_val_tasks)
            val_accuracy, test_accuracy = val_accuracy.mean().item(), test_accuracy.mean().item()
            run.evaluated(val_accuracy, {
                "Loss/val": val_loss, "Accuracy/val": val_accuracy,
                "Loss/test": test_loss, "Accuracy/test": test_accuracy,
            })  # fmt: skip
    run.load_best(encoder)
    log_episode(run, encoder, test, dtype)
    return run.finish(test_report(args, encoder, dataset, dtype, device))


def test_report(args, encoder: nn.Module, dataset: Dataset, dtype: torch.dtype, device: torch.device) -> dict:
    """Accuracy on the fixed test tasks: of features averaged over views, of the images alone, and transductive.

    The same network is also tested at the four usual N and K, where the images suffice; with --within_alphabet on
    tasks whose support set is by one drawer.
    """
    test = fixed_tasks(dataset, "test", args, device, within_alphabet=args.within_alphabet)
    features = embed_split(encoder, test, dtype, args.views, (args.jitter, args.shift))
    accuracies = evaluate(features, test, args.num_test_tasks)[0]
    alone = evaluate(embed_split(encoder, test, dtype), test, args.num_test_tasks)[0]
    some = min(args.num_test_tasks, 600)
    metrics = {"num_test_tasks": args.num_test_tasks, "accuracies": [round(a, 4) for a in accuracies.tolist()]}
    named = {"": accuracies, "_one_view": alone, "_transductive": evaluate_transductive(encoder, test, some, dtype)}
    if args.within_alphabet and test.same_count:
        lake = OneDrawer(dataset, "test", test.N, test.K, test.Q, test.B, test.seed, device, within_alphabet=True)
        named["_one_drawer"] = evaluate(features, lake, args.num_test_tasks)[0]
    for N, K in ((5, 1), (5, 5), (20, 1), (20, 5)):
        if N <= test.num_available and K + args.num_query <= int(test.counts.min()) and not args.within_alphabet:
            setting = Namespace(num_classes=N, num_shot=K, num_query=args.num_query)
            tasks = fixed_tasks(dataset, "test", setting, device)
            named[f"_{N}way{K}shot"] = evaluate(features, tasks, args.num_test_tasks)[0]
    for name, values in named.items():
        metrics[f"test_accuracy{name}"], metrics[f"ci95{name}"] = experiment.mean_and_ci95(values)
    return metrics | {
        "batch_norm": "running", "views": args.views, "within_alphabet": args.within_alphabet,
        "dtype": str(dtype).removeprefix("torch."), "device": experiment.device_name(device),
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }  # fmt: skip


def log_episode(run: Run, encoder: nn.Module, test: EpisodeSampler, dtype: torch.dtype) -> None:
    """Send one test episode to TensorBoard: a picture with predictions, and its embedding for the projector."""
    if not run.writes:
        return
    test.reset()
    support, support_labels, query, query_labels = (x[:1] for x in test.sample())
    with torch.no_grad():
        features = embed(encoder, torch.cat([support, query], dim=1), dtype)
    n = support.shape[1]
    guesses = proto_logits(features[:, :n], features[:, n:], test.N)[0].argmax(dim=-1)
    shown = 3 * test.N
    figure = episode_figure(
        support[0], support_labels[0], query[0, :shown], query_labels[0, :shown], guesses[:shown]
    )
    run.writer.add_figure("episode", figure, run.step)
    names = [f"support {y}" for y in support_labels[0].tolist()] + [f"query {y}" for y in query_labels[0].tolist()]
    images = 1 - torch.cat([support, query], dim=1)[0]
    run.writer.add_embedding(features[0], names, images, run.step, "episode")


if __name__ == "__main__":
    experiment.run_script(main)
