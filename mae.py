"""MAE: a transformer learns to see by completing drawings of which it is shown a part, without a label.

He et al. 2022, "Masked autoencoders are scalable vision learners". An image is cut into squares; the encoder
reads a random part of them, a light decoder draws the others, and the loss is the squared error on those
alone. Beside it two masked views of a drawing have to agree (--contrast). Of the encoder, frozen, few-shot
tasks of new characters are solved by prototypes. docs/mae.md has the derivation and all figures.

    python mae.py                                            pre-train, then test the frozen features
    python mae.py --contrast 0 --mask_ratio 0.75             the paper's masked auto-encoder alone
    python mae.py --smoke                                    a complete run in seconds
    python mae.py --test --checkpoint RUN_DIR --num_classes 20
    python protonet.py --encoder vit --init_from RUN_DIR     train on with labels

Measured: 5-way 1-shot 97.1 ± 0.3 % without a label (three seeds, 600 tasks), 1.4 to 2.5 minutes on a shared H200.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import VAL_SEED, Run, UserError, number, whole
from fewshot.experiment.replay import recorded
from fewshot.learners.batch_norm import SumOfAll
from fewshot.learners.conv4 import prototypes
from fewshot.learners.muon import Muon
from fewshot.learners.vit import Block, ViT, patchify, sines_and_cosines, unpatchify
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler, distort, fixed_tasks
from fewshot.tasks.splits import Dataset, turns

import argparse
import base64

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PATCH = 4  # pixels a side
GRID = 4, 4  # points that `bend` moves
VARIANCE = 1e-2  # added to a patch's own when it is normalised

# ---------------------------------------------------------------------------------- the method


class MAE(nn.Module):
    """The encoder and a light decoder, which needs another width and one block; only the encoder is kept."""

    def __init__(self, channels: int, width: int, image_size: int, depth: int, decoder_width: int, decoder_depth: int):
        super().__init__()
        self.encoder = ViT(channels, width, image_size, depth, PATCH)
        self.narrow = nn.Linear(width, decoder_width)
        self.hidden = nn.Parameter(torch.randn(decoder_width) * 0.02)  # stands where a patch is masked
        self.register_buffer("places", sines_and_cosines(self.encoder.side, decoder_width), persistent=False)
        self.blocks = nn.ModuleList(Block(decoder_width) for _ in range(decoder_depth))
        self.norm = nn.LayerNorm(decoder_width)
        self.pixels = nn.Linear(decoder_width, channels * PATCH * PATCH)

    def forward(self, patches: torch.Tensor, order: torch.Tensor, num_visible: int):
        """Predicted patches [n, L, C*p*p], all of them, from the first `num_visible` in `order`; and their tokens."""
        tokens = self.encoder.tokens(patches, order[:, :num_visible])  # [n, V, width]
        x = unshuffle(self.narrow(tokens), self.hidden, order) + self.places
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x)), tokens


def random_order(n: int, L: int, generator: torch.Generator) -> torch.Tensor:
    """For each of n images an order of its L patches, each equally likely [n, L]; the first ones stay visible."""
    return torch.rand(n, L, generator=generator, device=generator.device).argsort(dim=1)


def count_visible(L: int, mask_ratio: float) -> int:
    """How many of L patches stay visible: the nearest whole number, at least one and not all."""
    return min(max(L - round(L * mask_ratio), 1), L - 1)


def unshuffle(tokens: torch.Tensor, hidden: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens [n, V, D] of the first V patches in `order` [n, L] put back in their places, `hidden` [D] elsewhere."""
    n, V, D = tokens.shape
    L = order.shape[1]
    shuffled = torch.cat([tokens, hidden.to(tokens.dtype).expand(n, L - V, D)], dim=1)
    return shuffled.gather(1, order.argsort(dim=1)[..., None].expand(n, L, D))


def targets(patches: torch.Tensor, normalised: bool) -> torch.Tensor:
    """What is to be predicted: the pixels, or each patch's with mean 0 and variance 1 (He et al. 2022, section 3).

    An empty patch has no variance; the constant keeps it, and the grey edge of a stroke, from being blown up.
    """
    if not normalised:
        return patches
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + VARIANCE).sqrt()


def masked_error(predicted: torch.Tensor, target: torch.Tensor, order: torch.Tensor, num_visible: int) -> torch.Tensor:
    """Mean squared error over the masked patches alone; predicted and target [n, L, P]."""
    rows = torch.arange(len(order), device=order.device)[:, None]
    masked = order[:, num_visible:]
    return F.mse_loss(predicted[rows, masked], target[rows, masked])


def agreement(features: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018) of two views of each image: features [2n, D], views n apart.

    Each view has to tell the other view of its image from both views of all other images, by the cosine.
    """
    z = F.normalize(features, dim=1)
    n = len(z) // 2
    logits = z @ z.T / temperature
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def bend(images: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Images [n, C, H, W] drawn on rubber: `moves` [n, 2, 4, 4] of a grid of points, as shares of half an image."""
    field = F.interpolate(moves, size=images.shape[-2:], mode="bicubic", align_corners=True)
    still = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=False) + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False)


def distorted(images: torch.Tensor, noise: torch.Tensor, moves: torch.Tensor, limits) -> torch.Tensor:
    """Images [n, C, H, W] as if drawn anew: noise [n, 6] in (-1, 1), moves [n, 2, 4, 4] normal; jitter, shift, bend."""
    jitter, shift, most = limits
    if jitter or shift:
        images = distort(images, noise * torch.tensor([jitter] * 4 + [shift] * 2, device=images.device))
    return bend(images, most * moves) if most else images


class Drawings:
    """Random minibatches of pictures, each distorted at random as if drawn anew; what they show it is not told.

    jitter, shift: as of `load_data.distort`; bend: as of `bend`. A generator of its own, whose state can be saved,
    draws pictures, distortions and masks. shard: (rank, world); all ranks draw the same and keep their part.
    """

    def __init__(self, images: torch.Tensor, seed: int, jitter=0.0, shift=0.0, bend=0.0, shard=(0, 1)):
        self.images, self.limits, self.shard = images, (jitter, shift, bend), shard
        self.generator = torch.Generator(images.device).manual_seed(seed)

    def draw(self, size: int, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 images [copies * n, C, H, W] and an order of the L patches of each [copies * n, L].

        The copies of a picture, differently distorted, stand n apart.
        """
        g, (rank, world) = self.generator, self.shard
        mine = slice(rank * size // world, (rank + 1) * size // world)
        rows = torch.randint(len(self.images), (size,), generator=g, device=g.device)[mine]
        noise = torch.rand(copies, size, 6, generator=g, device=g.device)[:, mine].flatten(0, 1) * 2 - 1
        moves = torch.randn(copies, size, 2, *GRID, generator=g, device=g.device)[:, mine].flatten(0, 1)
        order = random_order(copies * size, (self.images.shape[-1] // PATCH) ** 2, g)
        images = self.images[rows].float().div(255).repeat(copies, 1, 1, 1)
        return distorted(images, noise, moves, self.limits), order.unflatten(0, (copies, size))[:, mine].flatten(0, 1)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


def losses(model: MAE, images: torch.Tensor, order: torch.Tensor, args, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The error on masked patches of `draw`n images, and the disagreement of two views (zero without --contrast).

    The encoder sees each view once, masked, for both.
    """
    patches, visible = patchify(images, PATCH), count_visible(order.shape[1], args.mask_ratio)
    with experiment.autocast(patches.device, dtype):
        predicted, tokens = model(patches, order, visible)
    error = masked_error(predicted.float(), targets(patches, args.normalise), order, visible)
    if not args.contrast:
        return error, torch.zeros_like(error)
    return error, agreement(of_all_processes(tokens.float().mean(dim=1)))


def of_all_processes(features: torch.Tensor) -> torch.Tensor:
    """Features [2n, D] of two views of each image, with those of all processes [2n * world, D], views still apart."""
    rank, world = experiment.shard()
    if world == 1:
        return features
    slots = features.new_zeros(2, world, len(features) // 2, features.shape[1])
    slots = slots.index_copy(1, torch.tensor([rank], device=features.device), features.unflatten(0, (2, 1, -1)))
    return SumOfAll.apply(slots).flatten(0, 2)


# ---------------------------------------------------------------------------- frozen features


def quarters(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [n, L, D] of a picture averaged over each of its quarters (which overlap): features [n, 4 * D]."""
    n, L, D = tokens.shape
    side = round(L**0.5)
    return F.adaptive_avg_pool2d(tokens.transpose(1, 2).reshape(n, D, side, side), 2).flatten(1)


@torch.no_grad()
def embed(encoder: ViT, images: torch.Tensor, dtype: torch.dtype, views: int = 1, limits=(0, 0, 0), seed=0):
    """Features [views, n, D] of uint8 images [n, C, H, W]: of each as it is, then of `views` - 1 distorted copies."""
    g = torch.Generator().manual_seed(seed)  # the CPU's: the same copies on a GPU
    features = []
    for part in images.split(250):
        part, seen = part.float() / 255, []
        for view in range(views):
            noise = (torch.rand(len(part), 6, generator=g) * 2 - 1).to(part.device)
            moves = torch.randn(len(part), 2, *GRID, generator=g).to(part.device)
            copy = distorted(part, noise, moves, limits) if view else part
            with experiment.autocast(images.device, dtype):
                tokens = encoder.tokens(patchify(copy, PATCH))
            seen.append(quarters(tokens.float()))
        features.append(torch.stack(seen))
    return torch.cat(features, dim=1)


def whitening(copies: torch.Tensor, ridge: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre [D] and matrix [D, D] that make features vary as little in every direction between copies of a picture.

    copies [V, n, D]: V distorted copies of n pictures. Fisher's discriminant (1936) with each picture as a class of
    its own: what a distortion changes says little of the character. `ridge`, a share of the mean variance, is added
    to the variance between copies.
    """
    means = copies.mean(dim=0)
    apart = (copies - means).flatten(0, 1).double()
    within = apart.T @ apart / (len(apart) - len(means))
    least = within.diagonal().mean().clamp(min=1e-9)  # equal copies: all directions are treated alike
    within += ridge * least * torch.eye(len(within), device=within.device)
    lower = torch.linalg.cholesky(within)  # within = L L^T; x L^-T has unit variance between copies
    return means.mean(dim=0), torch.linalg.inv(lower).T.to(copies.dtype)


def unit(features: torch.Tensor, centre: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Whitened features of length one: nearest prototypes then compare directions."""
    return F.normalize((features - centre) @ matrix, dim=-1)


def nearest(support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, N: int) -> torch.Tensor:
    """Scores [B, N*Q, N] of queries [B, N*Q, D]: minus the distances to the prototypes of support [B, N*K, D]."""
    return -torch.cdist(query, prototypes(support, N))


def ridge(support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, N: int) -> torch.Tensor:
    """The same by a linear head with bias on the support set, in closed form (Bertinetto et al. 2019, eq. 5)."""
    X, Q = F.pad(support, (0, 1), value=1.0), F.pad(query, (0, 1), value=1.0)  # [B, N*K, D + 1]
    square = X.transpose(1, 2) @ X + torch.eye(X.shape[2], device=X.device)
    # Cholesky: torch 2.13's LU (solve, inv) of several matrices of 193 rows never ends on two threads of a CPU.
    factor = torch.linalg.cholesky(square)
    return Q @ torch.cholesky_solve(X.transpose(1, 2) @ F.one_hot(labels, N).to(X.dtype), factor)


def task_accuracy(features: torch.Tensor, sampler: EpisodeSampler, num_tasks: int, head=nearest) -> torch.Tensor:
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], by `head`."""
    correct = []
    for support, support_labels, query, labels in sampler.first(num_tasks, features=features):
        guesses = head(support, support_labels, query, sampler.N).argmax(dim=-1)
        correct.append((guesses == labels).float().mean(dim=1))
    return torch.cat(correct).cpu()


def probe(features: torch.Tensor, held_out: int, per_class: int) -> torch.Tensor:
    """Whether a linear head for all characters at once labels each of the last `held_out` drawings right: float [n].

    features [classes * per_class, D] in class order; the head is fitted to the first drawings of each character.
    """
    split = features.unflatten(0, (-1, per_class))
    labels = torch.arange(len(split), device=features.device)
    train, test = split[:, :-held_out].flatten(0, 1), split[:, -held_out:].flatten(0, 1)
    scores = ridge(train[None], labels.repeat_interleave(per_class - held_out)[None], test[None], len(split))[0]
    return (scores.argmax(dim=-1) == labels.repeat_interleave(held_out)).float().cpu()


@torch.no_grad()
def frozen(args, encoder: ViT, dataset: Dataset, parts: tuple, dtype: torch.dtype, device, views: int) -> list[dict]:
    """For each of the splits in `parts` features of its images, "plain" and "whitened" by training pictures' copies.

    Labels order the images and serve nothing else. Whitened and averaged over `views`, or of "one_view" alone.
    """
    limits = args.jitter, args.shift, args.bend
    # Distorted half as much as in training, a picture still looks like one that somebody has drawn.
    half = tuple(limit / 2 for limit in limits)
    train = pictures(dataset, "train", device)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(VAL_SEED))[: args.whitening_images]
    centre, matrix = whitening(embed(encoder, train[chosen.to(device)], dtype, 4, limits, VAL_SEED))
    kinds = []
    for part in parts:
        seen = embed(encoder, pictures(dataset, part, device), dtype, views, half, VAL_SEED)
        one, mean = (unit(features, centre, matrix) for features in (seen[0], seen.mean(dim=0)))
        kinds.append({"plain": seen[0], "one_view": one, "whitened": mean})
    return kinds


def pictures(dataset: Dataset, part: str, device) -> torch.Tensor:
    """All images uint8 [total, C, H, W] of a split, in the order of `EpisodeSampler.images`."""
    starts, counts = dataset.starts, dataset.counts
    rows = [row for c in dataset.splits[part] for row in range(starts[c], starts[c] + counts[c])]
    images = torch.from_numpy(dataset.images[rows]).to(device)
    return turns(images) if dataset.turned else images


def make_model(args, channels: int) -> MAE:
    """The network that the flags describe; its first weights follow from --random_seed alone."""
    torch.manual_seed(args.random_seed)
    return MAE(channels, args.width, args.image_size, args.depth, args.decoder_width, args.decoder_depth)


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, ("--rotations", "--patience"), meta_batch_size=256, train_steps=3500, eval_freq=500
    )
    parser.prog = "mae.py"
    add = groups["data"].add_argument
    add("--rotations", action=argparse.BooleanOptionalAction, default=True, help="pictures turned by 90, 180, 270 too")
    add("--jitter", type=number(0, 1), default=0.2, help="random turn (radians), size and slant of training pictures")
    add("--shift", type=number(0, 1), default=0.1, help="random shift of training pictures, a share of half their size")
    add("--bend", type=number(0, 1), default=0.05, help="random bending, a share of half their size")
    add = groups["model"].add_argument
    add("--width", type=whole(8, 4096), default=64, help="numbers in a token of the encoder, a multiple of 8")
    add("--depth", type=whole(1, 100), default=4, help="blocks of the encoder")
    add("--decoder_width", type=whole(8, 4096), default=32, help="numbers in a token of the decoder, a multiple of 8")
    add("--decoder_depth", type=whole(1, 100), default=1, help="blocks of the decoder")
    add = groups["optimisation"].add_argument
    add("--mask_ratio", type=number(0.0, 0.99, above=True), default=0.5, help="share of the patches that is masked")
    normalise = "predict each patch with its mean and variance taken out"
    add("--normalise", action=argparse.BooleanOptionalAction, default=True, help=normalise)
    add("--contrast", type=number(), default=0.3, help="weight of the agreement of two masked views; 0: MAE alone")
    add("--learning_rate", type=number(above=True), default=0.02, help="of Muon, at its peak")
    add = groups["evaluation"].add_argument
    add("--views", type=whole(1), default=8, help="slightly distorted copies whose features the final test averages")
    add("--whitening_images", type=whole(2), default=2000, help="training pictures that the whitening is fitted to")
    add("--held_out", type=whole(1), default=5, help="drawings of a test character that the linear probe is tested on")
    smoke = {
        "train_steps": 20,
        "eval_freq": 10,
        "num_test_tasks": 20,
        "num_val_tasks": 20,
        "width": 16,
        "depth": 1,
        "decoder_width": 16,
        "meta_batch_size": 32,
        "views": 2,
        "whitening_images": 100,
    }
    shapes = ("width", "depth", "decoder_width", "decoder_depth", "image_size")
    args = experiment.parse(parser, argv, smoke, fixed=shapes)
    for flag, part in (("width", 8), ("decoder_width", 8), ("image_size", PATCH)):
        if getattr(args, flag) % part:
            raise UserError(f"--{flag} {getattr(args, flag)} is no multiple of {part}")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device)
    dataset = load_for(args)
    model = make_model(args, dataset.images.shape[1]).to(device)
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        metrics = {"best_step": step} | test_report(args, model, dataset, dtype, device)
        sheet = base64.b64decode(metrics["reconstruction"])
        experiment.write_beside(args.checkpoint, f"reconstruction_{dataset.name}.png", lambda out: out.write(sheet))
        return experiment.report(args, "mae", dataset.name, metrics, digest=dataset.digest)

    if args.meta_batch_size % experiment.shard()[1]:
        raise UserError(f"--meta_batch_size {args.meta_batch_size} does not divide over the processes of torchrun")
    images = pictures(dataset, "train", device)
    if args.rotations and not dataset.turned:
        images = turns(images)
    train = Drawings(images, args.random_seed, args.jitter, args.shift, args.bend, experiment.shard())
    val = fixed_tasks(dataset, "val", args, device)
    optimizer = Muon(model.parameters(), args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # fewer than 20 steps it cannot divide into phases
        optimizer, args.learning_rate, total_steps=max(20, args.train_steps + 1), pct_start=0.2, cycle_momentum=False
    )
    run = Run(args, "mae", dataset.name, dataset.digest)
    run.track(model=model, optimizer=optimizer, schedule=schedule, sampler=train)

    @recorded(model, device)  # one CUDA graph on a GPU; on a CPU this line does nothing
    def forward_backward(images: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, ...]:
        error, disagreement = losses(model, images, order, args, dtype)
        loss = error + args.contrast * disagreement
        optimizer.zero_grad()
        loss.backward()
        return loss.detach(), error.detach(), disagreement.detach()

    for _ in run.steps():
        images, order = train.draw(args.meta_batch_size, copies=2 if args.contrast else 1)
        loss, error, disagreement = forward_backward(images, order)
        experiment.average_gradients(model)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                features = frozen(args, model.encoder, dataset, ("val",), dtype, device, views=1)[0]
                val_accuracy = task_accuracy(features["whitened"], val, args.num_val_tasks).mean().item()
                val_error = reconstruct(args, model, pictures(dataset, "val", device)[:500], dtype)[0].item()
                if run.writes:
                    sheet = reconstruction(args, model, dataset, dtype, device)
                    run.writer.add_image("reconstruction", sheet, run.step, dataformats="HWC")
            # Labels choose no checkpoint: the last one counts.
            run.evaluated(
                None,
                {
                    "Loss/error": error.item(),
                    "Loss/disagreement": disagreement.item(),
                    "Loss/val": val_error,
                    "Accuracy/val": val_accuracy,
                },
            )
    run.load_best(model)
    return run.finish(test_report(args, model, dataset, dtype, device))


def test_report(args, model: MAE, dataset: Dataset, dtype: torch.dtype, device: torch.device) -> dict:
    """Accuracies on the fixed test tasks, of the trained and of the untrained network, and the linear probe."""
    test, val = (fixed_tasks(dataset, part, args, device) for part in ("test", "val"))
    features, chosen_by = frozen(args, model.encoder, dataset, ("test", "val"), dtype, device, args.views)
    untrained = make_model(args, dataset.images.shape[1]).to(device).encoder
    before = frozen(args, untrained, dataset, ("test",), dtype, device, args.views)[0]
    n = args.num_test_tasks
    named = {
        "test_accuracy": task_accuracy(features["whitened"], test, n),
        "test_accuracy_one_view": task_accuracy(features["one_view"], test, n),
        "test_accuracy_plain": task_accuracy(features["plain"], test, n),
        "test_accuracy_linear": task_accuracy(features["whitened"], test, n, ridge),
        "test_accuracy_untrained": task_accuracy(before["whitened"], test, n),
        "test_accuracy_untrained_plain": task_accuracy(before["plain"], test, n),
        "val_accuracy": task_accuracy(chosen_by["whitened"], val, args.num_val_tasks),
    }
    if test.same_count and args.held_out < test.same_count:
        named["probe_accuracy"] = probe(features["whitened"], args.held_out, test.same_count)
    metrics = {"num_test_tasks": n, "accuracies": [round(a, 4) for a in named["test_accuracy"].tolist()]}
    for name, values in named.items():
        interval = name.replace("test_accuracy", "ci95").replace("accuracy", "ci95")
        metrics[name], metrics[interval] = experiment.mean_and_ci95(values)
    sheet = np.squeeze(reconstruction(args, model, dataset, dtype, device))  # grey pictures have no third dimension
    return metrics | {
        "reconstruction": base64.b64encode(iio.imwrite("<bytes>", sheet, extension=".png")).decode(),
        "test_error": reconstruct(args, model, pictures(dataset, "test", device)[:500], dtype)[0].item(),
        "labels_used": "none",
        "mask_ratio": args.mask_ratio,
        "contrast": args.contrast,
        "views": args.views,
        "dtype": str(dtype).removeprefix("torch."),
        "device": experiment.device_name(device),
        "parameters": sum(p.numel() for p in model.encoder.parameters()),
    }


@torch.no_grad()
def reconstruct(args, model: MAE, images: torch.Tensor, dtype: torch.dtype, seed: int = 0):
    """The error of masked patches of uint8 images [n, C, H, W], the images with grey masks, and completed ones.

    Where the network predicts normalised patches, the completed ones borrow each patch's true mean and variance.
    """
    images = images.float() / 255
    patches = patchify(images, PATCH)
    generator = torch.Generator(images.device).manual_seed(seed)
    order, visible = random_order(*patches.shape[:2], generator), count_visible(patches.shape[1], args.mask_ratio)
    with experiment.autocast(images.device, dtype):
        predicted = model(patches, order, visible)[0].float()
    error = masked_error(predicted, targets(patches, args.normalise), order, visible)
    if args.normalise:
        predicted = predicted * (patches.var(dim=-1, keepdim=True) + VARIANCE).sqrt() + patches.mean(-1, keepdim=True)
    shown = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :visible], True)[..., None]
    masked, completed = torch.where(shown, patches, 0.5), torch.where(shown, patches, predicted.clamp(0, 1))
    return error, *(unpatchify(x, PATCH, images.shape[1]) for x in (masked, completed))


def reconstruction(args, model: MAE, dataset: Dataset, dtype: torch.dtype, device: torch.device) -> np.ndarray:
    """Twelve test characters, always the same and equally masked: uint8 [3 * (H + 2), 12 * (W + 2), C], black on white.

    Three rows: as they are, as the encoder sees them, and completed.
    """
    classes = dataset.splits["test"][:12]
    images = torch.from_numpy(dataset.images[dataset.starts[classes]]).to(device)
    _, masked, completed = reconstruct(args, model, images, dtype, seed=1)
    rows = torch.stack([images / 255, masked, completed])  # [3, n, C, H, W]
    rows = rows if rows.shape[2] == 3 else 1 - rows
    rows = F.pad(rows, (1, 1, 1, 1), value=1.0).permute(0, 3, 1, 4, 2)  # [3, H, n, W, C]
    return (255 * rows.flatten(2, 3).flatten(0, 1)).round().byte().cpu().numpy()


if __name__ == "__main__":
    experiment.run_script(main)
