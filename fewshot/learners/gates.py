"""What a learned update rule does: its gates, layer by layer, and the loss that falls meanwhile."""

from __future__ import annotations

from fewshot.learners.conv4 import LAYERS
from fewshot.learners.side_by_side import Learner

import math

import torch


class Watch:
    """Means over tasks of the support loss and of the gates of each layer, at every update."""

    def __init__(self, learner: Learner, updates: int):
        shapes = learner.shapes()
        sizes = [sum(math.prod(s) for name, s in shapes.items() if layer_of(name) == layer) for layer in LAYERS]
        self.sizes, self.updates, self.rows = sizes, updates, []

    def __call__(self, losses: torch.Tensor, state) -> None:
        row = [losses.mean()]
        for gate in () if state is None else (state.forget, state.input):
            row += [part.mean() for part in gate[:, : sum(self.sizes)].split(self.sizes, dim=1)]
        self.rows.append(torch.stack(row).detach().cpu())

    def means(self) -> dict[str, list]:
        """support_loss [updates], and forget and input [updates][layers] where there are gates."""
        table = torch.stack(self.rows).view(-1, self.updates, len(self.rows[0])).mean(dim=0)
        result = {"support_loss": table[:, 0].tolist()}
        if table.shape[1] > 1:
            result |= {"forget": table[:, 1:6].tolist(), "input": table[:, 6:].tolist()}
        return result


def layer_of(name: str) -> str:
    """The layer of LAYERS that a parameter of the learner belongs to."""
    return "head" if name.startswith("head") else f"conv{int(name.removesuffix('.weight')[-1]) + 1}"


def log_gates(run, means: dict[str, list]) -> None:
    """To TensorBoard: the learner's support loss and the mean gates of each layer at every update."""
    if not run.writes:
        return
    for t, loss in enumerate(means["support_loss"], start=1):
        run.writer.add_scalar(f"Support/loss_update{t:02d}", loss, run.step)
    for gate in ("forget", "input"):
        for t, row in enumerate(means[gate], start=1):
            for layer, value in zip(LAYERS, row, strict=True):
                run.writer.add_scalar(f"Gate_{gate}/{layer}_update{t:02d}", value, run.step)
