"""People's own pictures, brought into the form of the training images: drawings of characters, or any pictures."""

from __future__ import annotations

from fewshot.images.pictures import resize
from fewshot.images.preparation import Preparation, prepare

import numpy as np
import torch
import torch.nn.functional as F


def paper_of(grey: torch.Tensor, degree: int = 4, side: int = 64) -> torch.Tensor:
    """The brightness that the paper of a picture [H, W] (0..255) has at each place, under uneven light: [H, W].

    A polynomial in x and y, fitted to most of the pixels of a small copy; strokes, far from it and fewer, drop out.
    """

    powers = lambda n: torch.linspace(-1, 1, n, dtype=torch.float64)[:, None] ** torch.arange(degree + 1)
    size = [max(1, round(n * min(1.0, side / max(grey.shape)))) for n in grey.shape]
    small = F.adaptive_avg_pool2d(grey[None, None], size)[0, 0].double().flatten()
    order = sorted(((a, b) for a in range(degree + 1) for b in range(degree + 1 - a)), key=sum)  # of y^a x^b
    ys, xs = map(powers, size)
    terms = torch.stack([torch.outer(ys[:, a], xs[:, b]).flatten() for a, b in order], dim=1)  # [pixels, 15]
    paper = small.median().expand_as(small)
    for now in (0, 1, 2, 2, 2, 2, *[degree] * 5):
        off = (small - paper).abs()
        used = (off <= 2.5 * max(1.4826 * off.median().item(), 2.0)).double()  # 1.4826 median: a standard deviation
        basis = terms[:, : (now + 1) * (now + 2) // 2]
        kept = basis * used[:, None]
        weights = torch.linalg.solve(basis.T @ kept + 1e-6 * torch.eye(basis.shape[1]), kept.T @ small)
        paper = basis @ weights
        if ((small - paper).abs() * used).max() < 0.01:  # grey levels: nothing is left for more bends, as in a drawing
            break
    surface = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    for (a, b), weight in zip(order, weights, strict=False):
        surface[a, b] = weight
    return (powers(grey.shape[0]) @ surface @ powers(grey.shape[1]).T).float()


def prepare_drawing(image: torch.Tensor, ink: str, size: int) -> torch.Tensor:
    """A photographed or drawn character [C, H, W] in 0..255 as the training images look: [1, size, size].

    Grey, as a share of what the paper would be there; bright strokes on dark paper (`ink` says how it is now: dark,
    bright, or auto, which takes what most of the picture is for paper); contrast stretched; cut out around the ink,
    with a margin.
    """
    grey = image.float().mean(dim=0)
    paper = paper_of(grey)
    level = (grey - paper) / paper.clamp(min=8)  # light changes paper and ink in proportion
    if ink == "auto":
        noise = 3 * 1.4826 * level.abs().median()
        darker, brighter = ((sign * level - noise).clamp(min=0).sum() for sign in (-1, 1))
        ink = "dark" if darker > brighter else "bright"
    level = (-level if ink == "dark" else level).clamp(min=0)
    level = level / level.max().clamp(min=1 / 255)
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


def prepare_as_trained(image: np.ndarray, channels: int, inverted: bool, size: int) -> torch.Tensor:
    """A picture uint8 [C, H, W] as a run on a folder of pictures had its own: float32 [channels, size, size]."""
    return torch.from_numpy(prepare(resize(image[None], size), Preparation(channels, inverted)))[0].float() / 255
