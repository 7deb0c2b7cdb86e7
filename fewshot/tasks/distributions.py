"""Task distributions beside plain few-shot episodes: what memorization.py and bayes.py learn from.

For memorization.py: which of them can be solved without looking at a support set?

    basis       y = w . (fixed basis functions of x): the same x has another y in another task
    diseased    label 0: characters of one pool, the healthy; label 1: the character of the task, a disease
    grasping    three glyphs; find the target. Its name is written beside them in training only; the support set
                shows it always
    sinusoid    Yin et al. 2020: y = A sin x, and a one-hot vector beside x names A in training; at test A is new
    characters  N-way Omniglot where training characters keep their labels

For bayes.py: sinusoids, or characters of one alphabet, of which something is known beforehand (metadata).
A distribution is a function (tasks, support points, query points, generator, part) -> `Batch`; `Stream` draws from it.
"""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.tasks.episodes import EpisodeSampler, draw_distinct
from fewshot.tasks.splits import Dataset

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Recipe(NamedTuple):
    """What a task's flags of the same names are by default; `betas` by (learner, regulariser)."""

    kind: str  # of the loss: square, binary, choice (one of `ways` points) or classes
    ways: int
    num_shot: int  # support points (pictures, for grasping; images of each class, for diseased and characters)
    num_query: int
    meta_batch_size: int
    train_steps: int
    hidden_dim: int
    code_dim: int
    inner_lr: float
    inner_steps: int
    test_inner_steps: int
    test_shot: int
    betas: dict[tuple[str, str], float]


def betas(*four: float) -> dict[tuple[str, str], float]:
    """The costs of (maml, activations), (maml, weights), (blackbox, activations), (blackbox, weights)."""
    pairs = [(learner, regulariser) for learner in ("maml", "blackbox") for regulariser in ("activations", "weights")]
    return dict(zip(pairs, four, strict=True))


RECIPES = {
    "basis": Recipe("square", 1, 10, 10, 16, 3000, 40, 5, 0.05, 5, 20, 10, betas(0.1, 5e-5, 0.01, 5e-5)),
    "diseased": Recipe("binary", 2, 5, 5, 16, 3000, 64, 32, 0.1, 3, 10, 5, betas(0.3, 1e-4, 0.3, 1e-4)),
    "grasping": Recipe("choice", 3, 5, 10, 16, 3000, 64, 32, 0.1, 3, 10, 5, betas(0.3, 1e-4, 0.3, 1e-4)),
    "sinusoid": Recipe("square", 1, 10, 10, 1, 15000, 40, 5, 0.01, 1, 100, 5, betas(5.0, 5e-5, 0.05, 3e-4)),
    "characters": Recipe("classes", 20, 1, 1, 8, 3000, 0, 64, 2.5, 1, 1, 1, betas(0.1, 1e-5, 0.1, 1e-5)),
}


class Batch(NamedTuple):
    """B tasks. Inputs [B, P, d] (images [B, P, C, H, W] for characters), outputs [B, P, o]: a number, or 0 and 1.

    For grasping a picture is three points, its glyphs; the target's output is 1.
    """

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor


def basis_tasks(B: int, K: int, Q: int, g: torch.Generator, part: str = "train") -> Batch:
    """y = w . (1, sin x, cos x, sin 2x, cos 2x) + 0.1 noise, x ~ U(-pi, pi); w ~ N(0, 1) is new in every task."""
    x = math.pi * (2 * torch.rand(B, K + Q, 1, generator=g) - 1)
    functions = torch.cat([torch.ones_like(x), x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()], dim=-1)
    y = functions @ torch.randn(B, 5, 1, generator=g) + 0.1 * torch.randn(x.shape, generator=g)
    return Batch(x[:, :K], y[:, :K], x[:, K:], y[:, K:])


def sinusoid_tasks(B: int, K: int, Q: int, g: torch.Generator, part: str, amplitudes: int = 20) -> Batch:
    """y = A sin x with A of 20 between 0.1 and 4, x ~ U(-5, 5), noise 0.1; beside x a one-hot vector of A's number.

    As in the authors' code only the first 16 amplitudes are trained on; in val and test A ~ U(0.1, 4) beside the
    number of any of them, the noise of the support set is drawn twice, and the Q queries are a grid over 9/10 of x's
    range.
    """
    numbers = torch.randint(amplitudes - 4, (B,), generator=g)
    A = torch.linspace(0.1, 4, amplitudes)[numbers].view(B, 1, 1)
    x = 10 * torch.rand(B, K + Q, 1, generator=g) - 5
    noise = 0.1 * torch.randn(x.shape, generator=g)
    if part != "train":
        A = 0.1 + 3.9 * torch.rand(B, 1, 1, generator=g)
        x[:, K:] = torch.linspace(-4.5, 4.5, Q).view(1, Q, 1)
        noise[:, :K] += 0.1 * torch.randn(B, K, 1, generator=g)
    y = A * x.sin() + noise
    x = torch.cat([x, F.one_hot(numbers, amplitudes).float()[:, None].expand(-1, K + Q, -1)], dim=-1)
    return Batch(x[:, :K], y[:, :K], x[:, K:], y[:, K:])


def small_drawings(dataset: Dataset, part: str) -> torch.Tensor:
    """The characters of a split as [classes, drawings, 196]: pictures of 14 x 14, 1 is ink."""
    size, fewest = dataset.images.shape[-1], int(dataset.counts.min())
    classes = dataset.splits[part]
    rows = np.concatenate([np.arange(s, s + fewest) for s in dataset.starts[classes]])
    images = torch.from_numpy(dataset.images[rows]).float().mean(dim=1, keepdim=True) / 255
    return F.adaptive_avg_pool2d(images, size // 2).reshape(len(classes), fewest, -1)


class Diseased:
    """Two classes, of which label 0 is always the healthy pool; 50 training diseases, new ones in val and test.

    The last quarter of the healthy drawings is kept for val and test.
    """

    def __init__(self, dataset: Dataset, healthy: int = 100, diseases: int = 50):
        train = small_drawings(dataset, "train")
        if len(train) < healthy + diseases:
            raise UserError(
                f"--dataset {dataset.name} has {len(train)} training classes, fewer than the "
                f"{healthy + diseases} of --task diseased; use --dataset glyphs or omniglot"
            )
        cut = train.shape[1] * 3 // 4
        self.healthy = {"train": train[:healthy, :cut].flatten(0, 1)}
        self.healthy |= dict.fromkeys(("val", "test"), train[:healthy, cut:].flatten(0, 1))
        self.diseases = {part: small_drawings(dataset, part) for part in ("val", "test")}
        self.diseases["train"] = train[healthy : healthy + diseases]

    def sample(self, B: int, K: int, Q: int, g: torch.Generator, part: str) -> Batch:
        """K healthy and K diseased support points, Q and Q queries: x [B, ., 196], y 0 or 1."""
        healthy, diseases, n = self.healthy[part], self.diseases[part], K + Q
        if n > diseases.shape[1]:
            raise UserError(
                f"--num_shot {K} plus --num_query {Q} is more than the {diseases.shape[1]} drawings of each"
            )
        well = healthy[draw_distinct(B, len(healthy), n, g)]  # [B, n, 196]
        disease = torch.randint(len(diseases), (B, 1), generator=g)
        ill = diseases[disease, draw_distinct(B, diseases.shape[1], n, g)]
        cat = lambda first, last: torch.cat([well[:, first:last], ill[:, first:last]], dim=1)
        y = lambda n: torch.arange(2.0).repeat_interleave(n).view(1, -1, 1).repeat(B, 1, 1)
        return Batch(cat(0, K), y(K), cat(K, n), y(Q))


class Grasping:
    """Pictures of three glyphs, one of them the target: each glyph is 196 pixels and 16 numbers, the target's name.

    50 training targets have names, random signs; in val and test the targets are new and the name is zeros.
    """

    NAME = 16

    def __init__(self, dataset: Dataset, targets: int = 50):
        self.glyphs = {part: small_drawings(dataset, part) for part in ("train", "val", "test")}
        self.glyphs["train"] = self.glyphs["train"][:targets]
        g = torch.Generator().manual_seed(0)
        self.names = torch.randint(2, (targets, self.NAME), generator=g) * 2.0 - 1

    def sample(self, B: int, K: int, Q: int, g: torch.Generator, part: str, slots: int = 3) -> Batch:
        """K support and Q query pictures as points [B, K * 3, 212]; the target stands in a random place."""
        glyphs, n = self.glyphs[part], K + Q
        target = torch.randint(len(glyphs), (B, 1), generator=g)
        others = torch.randint(1, len(glyphs), (B, n, slots), generator=g)  # so many places further: never the target
        place = torch.randint(slots, (B, n, 1), generator=g)
        is_target = torch.arange(slots) == place  # [B, n, slots]
        shown = torch.where(is_target, target[:, None], (target[:, None] + others) % len(glyphs))
        x = glyphs[shown, torch.randint(glyphs.shape[1], shown.shape, generator=g)]  # [B, n, slots, 196]
        name = self.names[target[:, 0]] if part == "train" else torch.zeros(B, self.NAME)
        x = torch.cat([x, name[:, None, None].expand(-1, n, slots, -1)], dim=-1)
        points = lambda t, first, last: t[:, first:last].flatten(1, 2)
        y = is_target.float()[..., None]
        return Batch(points(x, 0, K), points(y, 0, K), points(x, K, n), points(y, K, n))


class FixedLabels(EpisodeSampler):
    """N-way episodes of images as batches with one-hot outputs; training characters keep their labels."""

    def sample(self) -> Batch:
        return Batch(*super().sample(one_hot=True))


class KnownBatch(NamedTuple):
    """As `Batch`, with metadata m [B, M]; m[:, 0] is 1, and all of m is 0 where nothing is known."""

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor
    m: torch.Tensor


def known_sinusoids(B: int, K: int, Q: int, g: torch.Generator, metadata: str) -> KnownBatch:
    """y = a sin(x + phase) + 0.2 noise, a ~ U(0.5, 2.5), phase ~ U(0, 2 pi), x ~ U(-pi, pi).

    m [B, 6]: 1, the amplitude with noise 0.2, the quarter of the phase (one-hot); zeros for what is not `metadata`.
    """
    a, phase = 0.5 + 2 * torch.rand(B, 1, 1, generator=g), 2 * math.pi * torch.rand(B, 1, 1, generator=g)
    x = math.pi * (2 * torch.rand(B, K + Q, 1, generator=g) - 1)
    y = a * (x + phase).sin() + 0.2 * torch.randn(x.shape, generator=g)
    noisy = a[:, :, 0] + 0.2 * torch.randn(B, 1, generator=g)
    quarter = F.one_hot((phase.view(B) / (math.pi / 2)).long().clamp_(max=3), 4).float()
    known = torch.tensor([1.0, metadata == "amplitude"] + 4 * [metadata == "phase"])
    m = torch.cat([torch.ones(B, 1), noisy, quarter], dim=1) * known
    return KnownBatch(x[:, :K], y[:, :K], x[:, K:], y[:, K:], m)


class OfAlphabet(EpisodeSampler):
    """N-way episodes within an alphabet, whose one-hot number is the metadata.

    Images come as [B, P, C, H, W], one of each class after the other: the first n * N of a support set are n-shot.
    """

    def __init__(self, dataset: Dataset, part: str, N: int, K: int, Q: int, B: int, seed: int, shard=(0, 1)):
        names = [name.rsplit("/", 1)[0] for name in dataset.names]
        chosen, order = dataset.splits[part], {name: i for i, name in enumerate(dict.fromkeys(names))}
        largest = max(Counter(names[c] for c in chosen).values())
        if N > largest:
            raise UserError(f"--num_classes {N} is more than any alphabet has in split '{part}': {largest}")
        super().__init__(dataset, part, N, K, Q, B, seed, within_alphabet=True, shard=shard)
        of_class = torch.tensor([order[names[c]] for c in chosen])
        self.alphabets = of_class.repeat_interleave(torch.tensor(dataset.counts[chosen]))  # of the rows of images
        self.num_alphabets = len(order)

    def sample(self) -> KnownBatch:
        rows, _ = self.draw()  # [B, N, K + Q]
        m = F.one_hot(self.alphabets[rows[:, 0, 0]], self.num_alphabets).float()
        m = torch.cat([torch.ones(len(m), 1), m], dim=1)
        rows = rows.transpose(1, 2)  # [B, K + Q, N]
        y = torch.eye(self.N).expand(*rows.shape, -1).flatten(1, 2)  # [B, (K + Q) * N, N]
        images, cut = self.gather(rows.flatten(1)), self.K * self.N
        return KnownBatch(images[:, :cut], y[:, :cut], images[:, cut:], y[:, cut:], m)


class Stream:
    """Endless meta-batches draw(B, generator) from an own generator, of which each process keeps its share."""

    def __init__(self, draw, seed: int, batch_size: int, shard: tuple[int, int] = (0, 1)):
        if batch_size % shard[1]:
            raise UserError(f"--meta_batch_size {batch_size} does not divide over {shard[1]} processes")
        self.draw, self.seed, self.B, self.shard, self.generator = draw, seed, batch_size, shard, torch.Generator()
        self.reset()

    def reset(self) -> None:
        """Start the stream of tasks again from the seed."""
        self.generator.manual_seed(self.seed)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())

    def sample(self):
        batch, (rank, world) = self.draw(self.B, self.generator), self.shard
        return type(batch)(*(t[rank * self.B // world : (rank + 1) * self.B // world] for t in batch))
