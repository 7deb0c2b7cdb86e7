"""Muon: an optimiser whose steps are orthogonal matrices."""

from __future__ import annotations

from fewshot.experiment.replay import Replayed

from contextlib import contextmanager
from functools import partial

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonal (Jordan et al. 2024, "Muon"; torch.optim.Muon takes matrices only).

    The filters of a convolution are a matrix [filters, inputs]. A gradient changes it most in the few directions that
    all images share; an orthogonal step, its singular values all near 1, learns the rare directions as fast. The step
    of a vector, here of batch norm's scales and shifts, has length 1. `lr` multiplies both.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.9):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.replayed: dict[tuple, Replayed] = {}  # the steps of these momenta

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]  # not a head that is not yet used
            for p in moved:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in moved]
            key = tuple(map(id, momenta))
            if key not in self.replayed:
                self.replayed[key] = Replayed(partial(muon_steps, momenta, group["momentum"]), moved[0].device, momenta)
            with one_thread_for(moved):
                for p, step in zip(moved, self.replayed[key](*(p.grad for p in moved)), strict=True):
                    p.sub_(step, alpha=group["lr"])


@contextmanager
def one_thread_for(tensors: list[torch.Tensor]):
    """One thread where all tensors are small and of a CPU: what is done with each ends before a second thread wakes."""
    threads = torch.get_num_threads()
    small = all(x.device.type == "cpu" and x.numel() < 200_000 for x in tensors)
    if not small or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def muon_steps(momenta: list[torch.Tensor], momentum: float, *gradients: torch.Tensor) -> list[torch.Tensor]:
    """The steps of length or singular values 1 of parameters with these gradients; moves their `momenta`."""
    steps = []
    for average, gradient in zip(momenta, gradients, strict=True):
        average.mul_(momentum).add_(gradient)
        ahead = gradient + momentum * average  # Nesterov's
        step = orthogonal(ahead.flatten(1)) if ahead.ndim > 1 else ahead / (ahead.norm() + 1e-7)
        steps.append(step.view_as(gradient))
    return steps


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of a matrix U S V^T [rows, columns], times sqrt(rows / columns) where there are more rows.

    Newton-Schulz: an odd polynomial of a matrix is the polynomial of its singular values; this one moves them to
    between 0.7 and 1.2 in five steps.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.T if tall else matrix
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T * (matrix.shape[0] / matrix.shape[1]) ** 0.5 if tall else X
