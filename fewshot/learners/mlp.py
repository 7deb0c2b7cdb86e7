"""A small fully connected network for many tasks at once: its gradient by hand, and cheaper forms of gradient steps.

A layer is (W, b), or (W, b, A, D) for the weights W - A^T D and the bias b - sum of D's rows. W is [i, o] while all
tasks share it, as before the first inner step, and [G, i, o] when each of G tasks has its own.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint


class Initialisation(torch.nn.Module):
    """theta: all weights and biases of an MLP with one input and one output, in one vector [D]."""

    def __init__(self, layers: int, hidden_dim: int):
        super().__init__()
        self.sizes = [1, *[hidden_dim] * layers, 1]
        uniform = lambda i, o: (2 * torch.rand(i * o + o) - 1) / math.sqrt(i)  # torch's own for nn.Linear
        self.theta = torch.nn.Parameter(torch.cat([uniform(i, o) for i, o in pairwise(self.sizes)]))

    def forward(self, theta: torch.Tensor | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The layers (W [..., i, o], b [..., 1, o]) in a vector theta [..., D]: views, no copies."""
        theta = self.theta if theta is None else theta
        shapes = list(pairwise(self.sizes))
        pieces = theta.split([n for i, o in shapes for n in (i * o, o)], dim=-1)
        return [(pieces[2 * n].unflatten(-1, s), pieces[2 * n + 1].unsqueeze(-2)) for n, s in enumerate(shapes)]


def apply(layer: tuple, a: torch.Tensor) -> torch.Tensor:
    """Inputs a [G, n, i] of a layer -> a W + b [G, n, o]."""
    W, b, *factors = layer
    z = torch.baddbmm(b, a, W) if W.dim() == 3 else a @ W + b
    return z - (a @ factors[0].mT + 1) @ factors[1] if factors else z


def apply_transposed(layer: tuple, d: torch.Tensor) -> torch.Tensor:
    """Errors d [G, n, o] behind a layer -> d W^T [G, n, i], the errors before it."""
    W, _, *factors = layer
    back = d @ W.mT
    return back - (d @ factors[1].mT) @ factors[0] if factors else back


def predict(layers: list[tuple], x: torch.Tensor, inputs: list | None = None) -> torch.Tensor:
    """The network's output [G, n, 1] at x [G, n, 1]; appends the input of every layer [G, n, i] to `inputs`."""
    for layer in layers[:-1]:
        if inputs is not None:
            inputs.append(x)
        x = apply(layer, x).relu_()
    if inputs is not None:
        inputs.append(x)
    return apply(layers[-1], x)


def mse(layers: list[tuple], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each task [G]."""
    return (predict(layers, x) - y).square().mean(dim=(-2, -1))


def inputs_and_errors(layers: list[tuple], x: torch.Tensor, y: torch.Tensor) -> list[tuple]:
    """(a [G, n, i], d [G, n, o]) of every layer: the gradient of the mean squared error is a^T d for W, d's sum for b.

    Back-propagation in tensor operations, so that autograd can differentiate through it.
    """
    inputs, pairs = [], []
    d = (predict(layers, x, inputs) - y) * (2 / x.shape[-2])
    for layer, a in zip(layers[::-1], inputs[::-1], strict=True):
        pairs.append((a, d))
        if a is not x:
            d = apply_transposed(layer, d) * (a > 0)
    return pairs[::-1]


# --------------------------------------------------------- gradient steps on the mean squared error


def inner_step_in_place(layers: list[tuple], x: torch.Tensor, y: torch.Tensor, rate: float) -> None:
    """phi <- phi - rate * dL/dphi, written over phi: nothing is kept."""
    for (W, b), (a, d) in zip(layers, inputs_and_errors(layers, x, y), strict=True):
        W.baddbmm_(a.mT, d, alpha=-rate)
        b.sub_(d.sum(-2, keepdim=True), alpha=rate)


def inner_step_in_factors(layers: list[tuple], x: torch.Tensor, y: torch.Tensor, rate: float) -> list[tuple]:
    """The same step, but phi is never formed: theta stays shared, and a step adds K rows to the factors A and D.

    A gradient on K points has rank K, and K is 10 where a weight matrix has hundreds of rows.
    """
    new = []
    for (W, b, *old), (a, d) in zip(layers, inputs_and_errors(layers, x, y), strict=True):
        A, D = (torch.cat(rows, dim=-2) for rows in zip(old, (a, rate * d), strict=True)) if old else (a, rate * d)
        new.append((W, b, A, D))
    return new


def recomputed(step, layers: list[tuple], steps: int) -> list[tuple]:
    """`layers` after so many calls of step(layers), of which only every sqrt(steps)-th result is kept.

    The backward pass computes the others again.
    """

    def segment(count: int, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = list(zip(flat[::2], flat[1::2], strict=True))
        for _ in range(count):
            layers = step(layers)
        return tuple(tensor for layer in layers for tensor in layer)

    length = math.isqrt(steps - 1) + 1  # rounded up
    flat = tuple(tensor for layer in layers for tensor in layer)
    for begin in range(0, steps, length):
        count = min(length, steps - begin)
        flat = checkpoint(segment, count, *flat, use_reentrant=False, preserve_rng_state=False)
    return list(zip(flat[::2], flat[1::2], strict=True))
