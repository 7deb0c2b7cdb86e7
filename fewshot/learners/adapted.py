"""A Conv4 with a linear head as a function of its parameters, which an inner loop adapts to a task.

B tasks never share these parameters: each has adapted its own. Batch norm therefore has no running averages; its
statistics are those of the task's images.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.learners.conv4 import LAYERS, Conv4, conv4, on_sphere

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._C._functorch import is_batchedtensor

Parameters = dict[str, torch.Tensor]


class Setting(NamedTuple):
    """How a task is learned; the flags of the same names."""

    num_classes: int
    strided: bool = True
    head: str = "linear"
    freeze_body: bool = False
    first_order: bool = False
    per_step_norm: bool = False
    batch_norm: str = "transductive"
    dtype: torch.dtype = torch.float32
    sphere: bool = False


def embed(theta: Parameters, images: torch.Tensor, s: Setting, num_support: int) -> torch.Tensor:
    """Features [n, D] of one task's images [n, C, H, W], of which the first `num_support` are its support set.

    batch_norm="transductive" normalises with all images of the call, "support" with the support set alone. With
    `sphere` the features are centred by the mean of the same images and stretched to length sqrt(D). A linear head
    whose weights are class means then compares distances: ||f - c||^2 = 2 D - 2 <f, c>.
    """
    with experiment.autocast(images.device, s.dtype):
        n = len(images) if s.batch_norm == "transductive" else num_support  # images that give the statistics
        # Under vmap the second derivative of F.batch_norm is wrong (torch 2.13): there it is spelled out.
        if n == len(images) and not is_batchedtensor(images):
            features = conv4(theta, images, norm="batch", strided=s.strided)
        else:
            features = conv4(theta, images[None], norm="support", num_support=n, strided=s.strided)[0]
    features = features if features.dtype == torch.float64 else features.float()
    return on_sphere(features, n) if s.sphere else features


def classify(theta: Parameters, images: torch.Tensor, s: Setting, num_support: int) -> torch.Tensor:
    """Logits [n, N] of one task's images by the network with parameters theta."""
    features = embed(theta, images, s, num_support=num_support)
    return F.linear(features, theta["head_weight"], theta["head_bias"])


def query_logits(theta: Parameters, support: torch.Tensor, query: torch.Tensor, s: Setting) -> torch.Tensor:
    """Logits [N*Q, N] of the queries; they pass through the network together with the support set or by themselves."""
    if s.batch_norm == "transductive":
        return classify(theta, query, s, num_support=0)
    return classify(theta, torch.cat([support, query]), s, num_support=len(support))[len(support) :]


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(dim=-1) == labels).float().mean()


class MAML(nn.Module):
    """What the outer loop learns: theta (a Conv4 and a linear head) and the inner learning rates.

    With head="proto" there is no head to learn. `rates` [inner steps, tensors of theta] has the order of `names`. With
    per_step_norm each inner step also adds its learned `shifts` [inner steps, 8, filters] to the scales and shifts of
    batch norm: every step has its own (MAML++).
    """

    def __init__(
        self,
        encoder: Conv4,
        num_classes: int,
        inner_steps: int,
        inner_lr: float,
        head: str = "linear",
        learn: bool = False,
        head_lr: float | None = None,
        zero_head: bool = False,
        per_step_norm: bool = False,
    ):
        super().__init__()
        self.encoder = encoder
        if head == "linear":
            # From zero the first inner step makes the weight of a class (rate / N) (c - mean of all c), and leaves the
            # bias at zero: nearly a head of prototypes.
            shapes = (num_classes, encoder.out_features), (num_classes,)
            self.head_weight, self.head_bias = (
                nn.Parameter(torch.zeros(shape), requires_grad=not zero_head) for shape in shapes
            )
        self.names = [name for name, _ in encoder.named_parameters()] + ["head_weight", "head_bias"]
        of_tensors = [head_lr if head_lr and name == "head_weight" else inner_lr for name in self.names]
        self.rates = nn.Parameter(torch.tensor(of_tensors).repeat(max(1, inner_steps), 1), requires_grad=learn)
        self.of_norms = [name for name in self.names if name.startswith(("gamma", "beta"))]
        zeros = torch.zeros(inner_steps, len(self.of_norms), len(encoder.gamma0))
        self.shifts = nn.Parameter(zeros) if per_step_norm else None

    def theta(self) -> Parameters:
        own = {name: p for name, p in self.named_parameters(recurse=False) if name not in ("rates", "shifts")}
        return dict(self.encoder.named_parameters()) | own

    def step_sizes(self, steps: int) -> list[Parameters]:
        """The learning rate of each tensor in each of `steps` inner steps; beyond the trained ones the last repeats.

        With per_step_norm also what a trained step adds to a tensor NAME, as "NAME+"; later steps add nothing.
        """
        rows = [self.rates[min(i, len(self.rates) - 1)] for i in range(steps)]  # [tensors] each
        sizes = [dict(zip(self.names, row, strict=True)) for row in rows]
        for step, shift in zip(sizes, () if self.shifts is None else self.shifts, strict=False):
            step |= {f"{name}+": of_tensor for name, of_tensor in zip(self.of_norms, shift, strict=True)}
        return sizes


def update_norms(before: Parameters, after: Parameters) -> torch.Tensor:
    """How far the inner loop moves each of LAYERS: ||theta' - theta|| / ||theta||, all tensors of a layer together.

    Not finite for a layer of zeros, such as the head with --zero_head.
    """
    of_layer: dict[str, list[str]] = {layer: [] for layer in LAYERS}
    for name in before:
        of_layer["head" if name.startswith("head") else f"conv{int(name[-1]) + 1}"].append(name)
    length = lambda tensors: sum(t.square().sum() for t in tensors).sqrt()
    return torch.stack(
        [length(after[k] - before[k] for k in names) / length(before[k] for k in names) for names in of_layer.values()]
    )
