"""What moves the initialisation that MAML learns: the optimisers of its outer loop and their schedule."""

from __future__ import annotations

from fewshot.learners.adapted import MAML
from fewshot.learners.muon import Muon

import math

import torch

STEPS_RATE = 2e-3  # of Adam beside Muon


def make_optimizers(learner: MAML, kind: str, rate: float) -> dict[str, torch.optim.Optimizer]:
    """Of the outer loop. With Muon what each inner step has of its own, no matrix, is moved by Adam at STEPS_RATE."""
    trained = [p for p in learner.parameters() if p.requires_grad]
    if kind == "adam":
        return {"optimizer": torch.optim.Adam(trained, rate, fused=True)}
    of_steps = [p for p in (learner.rates, learner.shifts) if p is not None and p.requires_grad]
    weights = [p for p in trained if not any(p is own for own in of_steps)]
    more = {"steps_optimizer": torch.optim.Adam(of_steps, STEPS_RATE, fused=True)} if of_steps else {}
    return {"optimizer": Muon(weights, rate)} | more


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


def multi_step_weights(steps: int, progress: float) -> list[float]:
    """Weights of the losses after each inner step (MAML++): equal at first, only the last from `progress` 0.25 on."""
    if steps < 2 or progress >= 0.25:
        return [1.0]
    others = (1 - progress / 0.25) / steps
    return [others] * (steps - 1) + [1 - (steps - 1) * others]
