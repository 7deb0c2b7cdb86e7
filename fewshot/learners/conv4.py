"""Convolutional encoders: Conv4, its strided form, a residual one, and class means of features."""

from __future__ import annotations

from fewshot.learners.batch_norm import EPS, batch_norm

import torch
import torch.nn.functional as F
from torch import nn

LAYERS = ("conv1", "conv2", "conv3", "conv4", "head")  # of a network of four blocks with a linear head
PARTS_OF_A_BLOCK = ("weight", "gamma", "beta", "mean", "var")


class Conv4(nn.Module):
    """The encoder: float32 images [n, C, H, W] or [B, n, C, H, W] to features [..., out_features].

    The convolutions have no bias: the batch norm behind each would cancel it.
    """

    def __init__(self, channels: int = 1, width: int = 64, image_size: int = 28, strided: bool = False):
        super().__init__()
        if image_size < 28:
            raise ValueError(f"image_size {image_size} is below 28")
        self.strided = strided
        for i in range(4):
            weight = torch.empty(width, channels if i == 0 else width, 3, 3)
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
            self.register_parameter(f"weight{i}", nn.Parameter(weight))
            self.register_parameter(f"gamma{i}", nn.Parameter(torch.ones(width)))
            self.register_parameter(f"beta{i}", nn.Parameter(torch.zeros(width)))
            self.register_buffer(f"mean{i}", torch.zeros(width))
            self.register_buffer(f"var{i}", torch.ones(width))
        side = image_size
        for _ in range(4):
            side = -(-side // 2) if strided else side // 2
        self.out_features = width if strided else width * side * side

    def forward(self, images, norm: str = "running", num_support: int = 0, momentum: float = 0.0):
        """Encode; with norm="batch" and momentum > 0 also update the running averages."""
        parameters = dict(self.named_parameters())
        return conv4(parameters, images, norm, dict(self.named_buffers()), num_support, momentum, self.strided)


def conv4(
    parameters: dict[str, torch.Tensor],
    images: torch.Tensor,
    norm: str,
    running: dict[str, torch.Tensor] | None = None,
    num_support: int = 0,
    momentum: float = 0.0,
    strided: bool = False,
) -> torch.Tensor:
    """Conv4 as a function of `parameters` (weight0, gamma0, beta0, ... of a `Conv4`).

    images: [n, C, H, W] of one task, or [B, n, C, H, W] of B tasks, which norm="support" keeps apart.
    running: mean0, var0, ...; needed for norm="running", updated in place where momentum > 0. Under torchrun these
    are the statistics of the images of all processes, as if one had them all.
    """
    lead = images.shape[:-3]
    x = images.flatten(0, -4)
    for i in range(4):
        x = F.conv2d(x, parameters[f"weight{i}"], stride=2 if strided else 1, padding=1)
        averages = (running[f"mean{i}"], running[f"var{i}"]) if running else None
        x = x.unflatten(0, lead) if norm == "support" else x
        gamma, beta = parameters[f"gamma{i}"], parameters[f"beta{i}"]
        x = batch_norm(x, gamma, beta, norm, averages, num_support, momentum, all_processes=True)
        x = x.flatten(0, 1) if norm == "support" else x
        if not strided:
            x = pool(x)  # before the ReLU: the same values, a quarter of the work
        x = F.relu(x)
    features = x.mean(dim=(2, 3)) if strided else x.flatten(1)
    return features.unflatten(0, lead) if len(lead) > 1 else features


def pool(x: torch.Tensor) -> torch.Tensor:
    """Max pooling 2 x 2 of x [n, C, H, W]; on a CPU, where no gradient is asked for, by halves.

    The same values. PyTorch's kernel also keeps where each maximum was, which is slow unless channels come last
    (docs/log.md).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.is_contiguous(memory_format=torch.channels_last):
        return F.max_pool2d(x, 2)
    x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
    x = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(x[..., ::2], x[..., 1::2])


class Residual(Conv4):
    """A deeper encoder of the same size: a pair of convolutions behind each block of a Conv4 adds to its output.

    He et al. 2016. The last batch norm of a pair starts at scale zero: at first the network is a Conv4.
    """

    def __init__(self, channels: int = 1, width: int = 64, image_size: int = 28):
        super().__init__(channels, width, image_size)
        for name in (f"{i}{which}" for i in range(4) for which in "ab"):
            weight = torch.empty(width, width, 3, 3)
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
            gamma = torch.ones(width) if name.endswith("a") else torch.zeros(width)
            self.register_parameter(f"weight{name}", nn.Parameter(weight))
            self.register_parameter(f"gamma{name}", nn.Parameter(gamma))
            self.register_parameter(f"beta{name}", nn.Parameter(torch.zeros(width)))
            self.register_buffer(f"mean{name}", torch.zeros(width))
            self.register_buffer(f"var{name}", torch.ones(width))

    def forward(self, images, norm: str = "running", momentum: float = 0.0):
        """Features [n, out_features] of images [n, C, H, W]; norm and momentum as Conv4's, "running" or "batch"."""
        x = images
        for i in range(4):
            x = F.relu(F.max_pool2d(self.convolve(x, f"{i}", norm, momentum), 2))
            inside = F.relu(self.convolve(x, f"{i}a", norm, momentum))
            x = F.relu(x + self.convolve(inside, f"{i}b", norm, momentum))
        return x.flatten(1)

    def convolve(self, x: torch.Tensor, name: str, norm: str, momentum: float) -> torch.Tensor:
        """The convolution `name` and its batch norm."""
        weight, gamma, beta, mean, var = (getattr(self, part + name) for part in PARTS_OF_A_BLOCK)
        x = F.conv2d(x, weight, padding=1)
        return batch_norm(x, gamma, beta, norm, (mean, var), momentum=momentum, all_processes=True)


def prototypes(support: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean feature of each class (Snell et al. 2017, eq. 1): support [B, N*K, D] in class order -> [B, N, D]."""
    return support.unflatten(1, (num_classes, -1)).mean(dim=2)


def on_sphere(features: torch.Tensor, num_support: int) -> torch.Tensor:
    """Features [..., n, D] less the mean of each task's first num_support, stretched to length sqrt(D)."""
    centred = features - features.narrow(-2, 0, num_support).mean(dim=-2, keepdim=True)
    return centred * (centred.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
