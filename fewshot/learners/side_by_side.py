"""Small networks of B tasks side by side, each with parameters of its own: the learners of the LSTM meta-learner."""

from __future__ import annotations

from fewshot.learners.batch_norm import batch_norm

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

FILTERS, EPS = 32, 1e-3  # of the convolutions and batch norms


class Learner(NamedTuple):
    """Sizes of the learner: four blocks of convolution, batch norm, ReLU and pooling, and a linear layer."""

    channels: int
    image_size: int
    num_classes: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, in the order in which the flat vector holds them."""
        shapes = {}
        for i in range(4):
            shapes[f"conv{i}.weight"] = (FILTERS, self.channels if i == 0 else FILTERS, 3, 3)
            shapes |= {f"{name}{i}": (FILTERS,) for name in ("bias", "gamma", "beta")}
        features = FILTERS * (self.image_size // 16) ** 2
        return shapes | {"head.weight": (self.num_classes, features), "head.bias": (self.num_classes,)}

    def size(self) -> int:
        return sum(map(math.prod, self.shapes().values()))

    def initial(self) -> torch.Tensor:
        """Fresh parameters [P]: weights uniform in 1 / sqrt(inputs), scales 1, offsets 0."""
        parts = []
        for name, shape in self.shapes().items():
            if "weight" in name:
                parts.append((2 * torch.rand(shape) - 1) / math.sqrt(math.prod(shape[1:])))
            else:
                parts.append(torch.ones(shape) if "gamma" in name else torch.zeros(shape))
        return torch.cat([part.flatten() for part in parts])

    def unpack(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> [B, *shape] of flat parameters [B, P or more]; what is beyond P is padding."""
        shapes = self.shapes()
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = theta[:, : sum(sizes)].split(sizes, dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def fresh_statistics(self, theta: torch.Tensor) -> list[torch.Tensor]:
        """Running mean 0 and variance 1 of the four batch norms of the B tasks of theta: each [2, B * FILTERS]."""
        zeros = theta.new_zeros(len(theta) * FILTERS)
        return [torch.stack([zeros, zeros + 1]) for _ in range(4)]

    def __call__(
        self, theta, images, statistics=None, momentum: float = 0.0, dtype=torch.float32, num_support: int = 0
    ) -> torch.Tensor:
        """Scores [B, n, N] of images [B, n, C, H, W] by the B networks with parameters theta [B, P].

        The tasks lie side by side as groups of channels, so that each operation handles all of them.
        Batch norm normalises with the images of the call; with statistics and momentum > 0 these also
        enter the running averages, with momentum 0 the running averages normalise. With num_support the first
        so many images of the call normalise all of them, and their statistics have a gradient.
        """
        p, B = self.unpack(theta), len(theta)
        x = images.transpose(0, 1).flatten(1, 2).to(dtype).contiguous(memory_format=torch.channels_last)
        for i in range(4):  # x: [n, B * channels, side, side]
            weight, bias = p[f"conv{i}.weight"].flatten(0, 1).to(dtype), p[f"bias{i}"].flatten().to(dtype)
            x = F.conv2d(x, weight, bias, padding=1, groups=B)
            averages = None if statistics is None else tuple(statistics[i])
            gamma, beta = p[f"gamma{i}"].flatten(), p[f"beta{i}"].flatten()
            if num_support:
                x = batch_norm(x, gamma, beta, "support", num_support=num_support, eps=EPS)
            else:
                norm = "batch" if statistics is None or momentum > 0 else "running"
                x = batch_norm(x, gamma, beta, norm, averages, momentum=momentum, eps=EPS)
            x = F.relu(F.max_pool2d(x, 2)).to(dtype)  # pooling first: the same values, a quarter of the work
        x = x.unflatten(1, (B, FILTERS)).transpose(0, 1).flatten(2).to(theta.dtype)
        return torch.baddbmm(p["head.bias"][:, None], x, p["head.weight"].transpose(1, 2))


def task_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each task: scores [B, n, N], labels [B, n] -> [B]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(dim=1)


def ask(learner: Learner, theta, query, statistics, dtype) -> torch.Tensor:
    """Scores [B, n, N] of the queries; normalised by `statistics`, or by the queries themselves where None."""
    if dtype == torch.float32 and theta.device.type == "cpu" and len(theta) > 1:
        # With many images an ordinary float32 convolution for each task is faster than one with groups.
        parts = [None] * len(theta)
        if statistics is not None:
            parts = zip(*(s.split(FILTERS, dim=1) for s in statistics), strict=True)
        each = zip(theta.split(1), query.split(1), parts, strict=True)
        return torch.cat([learner(t, q, part, 0.0, dtype) for t, q, part in each])
    return learner(theta, query, statistics, 0.0, dtype)


def in_parts(tasks, tasks_at_once: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """A meta-batch in parts of so many tasks, which bounds the memory of a step."""
    return zip(*(x.split(tasks_at_once) for x in tasks), strict=True)
