"""Invented characters: what makes everything run with no data and no network.

`draw_glyphs` invents pen strokes and draws each character 20 times, as 20 people would; `glyph_arrays` gives as many
characters as Omniglot has, in invented alphabets. Images are uint8, 255 is ink.
"""

from __future__ import annotations

import numpy as np
import torch

CHARACTERS, DRAWINGS = 1623, 20  # as many as Omniglot has


def draw_glyphs(num_classes: int = 1623, image_size: int = 28, seed: int = 0) -> np.ndarray:
    """Invent `num_classes` characters and draw each 20 times: uint8 [num_classes * 20, 1, H, W].

    A character is two to four pen strokes, straight or bent (cubic Bezier curves), between points of
    a 3x3 lattice; most start where the last one ended. A drawer moves all points a little and has
    an own slant, size, position and pen width.
    """
    strokes, points = 4, 24
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(shape, generator=g) * (high - low) + low

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=g) * std

    # Strokes end on another lattice point than they start from: 1 to 8 places further round.
    begin = torch.randint(9, (num_classes, strokes), generator=g)
    step = torch.randint(1, 9, (num_classes, strokes), generator=g)
    for s in range(1, strokes):
        joined = uniform(num_classes) < 0.7  # the pen was not lifted
        begin[:, s] = torch.where(joined, (begin[:, s - 1] + step[:, s - 1]) % 9, begin[:, s])
    end = (begin + step) % 9
    ends = torch.stack([begin, end], dim=-1)  # [classes, strokes, 2]
    lattice = torch.stack([ends % 3, ends.div(3, rounding_mode="floor")], dim=-1).float() - 1
    start, stop = (0.57 * lattice + normal(num_classes, strokes, 2, 2, std=0.1)).unbind(2)
    chord = stop - start
    across = torch.stack([-chord[..., 1], chord[..., 0]], dim=-1)
    bend = normal(num_classes, strokes, 2, std=0.7) * (uniform(num_classes, strokes, 1) < 0.6)
    control = torch.stack(
        [start, start + chord / 3 + across * bend[..., :1], start + chord * 2 / 3 + across * bend[..., 1:], stop], dim=2
    )  # [classes, strokes, 4, 2]
    used = torch.arange(strokes) < torch.randint(2, strokes + 1, (num_classes, 1), generator=g)

    t = torch.linspace(0, 1, points)[:, None]
    bernstein = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)  # [points, 4]
    pixels = torch.linspace(-1, 1, image_size)
    images = []
    for chunk, chunk_used in zip(control.split(100), used.split(100), strict=True):
        n = len(chunk) * DRAWINGS
        drawn = chunk.repeat_interleave(DRAWINGS, 0) + normal(n, strokes, 4, 2, std=0.06)
        curve = torch.einsum("pc,nscd->nspd", bernstein, drawn)
        # Blots add up to even ink along the stroke when each weighs the way to its neighbours.
        way = torch.zeros(n, strokes, points)
        way[..., 1:] += (curve[:, :, 1:] - curve[:, :, :-1]).norm(dim=-1) / 2
        way[..., :-1] += (curve[:, :, 1:] - curve[:, :, :-1]).norm(dim=-1) / 2
        angle, zero = normal(n, std=0.08), torch.zeros(n)
        width, height = uniform(n, low=0.8, high=1.1), uniform(n, low=0.8, high=1.1)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
        shear = torch.stack([width, normal(n, std=0.12), zero, height], dim=1).view(n, 2, 2)
        curve = curve.flatten(1, 2) @ (turn @ shear).transpose(1, 2) + normal(n, 1, 2, std=0.05)
        pen = uniform(n, 1, 1, low=0.03, high=0.05)
        # Ink far away is cut at exp(-40), which no pixel shows: smaller numbers are denormal, and those are slow.
        blots = (curve[..., None] - pixels).div_(pen[..., None]).square_().mul_(-0.5)  # [n, points, 2, image_size]
        blots = blots.clamp_(min=-40).exp_()
        weight = (way * chunk_used.repeat_interleave(DRAWINGS, 0)[..., None]).flatten(1) / pen[..., 0]
        coverage = torch.einsum("np,npy,npx->nyx", weight, blots[:, :, 1], blots[:, :, 0])
        images.append((255 * (1 - torch.exp(-1.5 * coverage))).round().to(torch.uint8))
    return torch.cat(images)[:, None].numpy()


def glyph_arrays(image_size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The glyphs in the form of Omniglot: 1623 characters in 50 invented alphabets."""
    names = [f"alphabet{i * 50 // CHARACTERS:02d}/character{i:04d}" for i in range(CHARACTERS)]
    return draw_glyphs(CHARACTERS, image_size), np.full(CHARACTERS, DRAWINGS), names
