"""Conv4, the encoder of few-shot learning, as a module and as a pure function of its parameters.

Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max-pooling, 64 filters each (Vinyals et al.
2016; Snell et al. 2017): 28x28 images become 64 features. The strided variant (Finn et al. 2017)
halves the size by stride 2 instead of pooling and averages what is left over space.

Which images batch norm takes its statistics from is an argument of every call, never a hidden
train/eval switch:

    norm="running"  the averages collected in training: no image influences another
    norm="batch"    all images of the call; for episodes with queries among them: transductive
    norm="support"  the first `num_support` images of each task, for all images of that task
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

NORMS = ("running", "batch", "support")
EPS = 1e-5  # of batch norm


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

    images: [n, C, H, W], or [B, n, C, H, W] for B tasks, which norm="support" needs.
    running: mean0, var0, ...; needed for norm="running", updated in place where momentum > 0. Under torchrun these
    are the statistics of the images of all processes, as if one had them all.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown; use one of {NORMS}")
    lead = images.shape[:-3]
    if norm == "support" and not (len(lead) == 2 and 0 < num_support <= lead[1]):
        raise ValueError("norm='support' needs images [B, n, C, H, W] and 0 < num_support <= n")
    x = images.flatten(0, -4)
    for i in range(4):
        x = F.conv2d(x, parameters[f"weight{i}"], stride=2 if strided else 1, padding=1)
        gamma, beta = parameters[f"gamma{i}"], parameters[f"beta{i}"]
        if norm == "support":
            x = support_norm(x.unflatten(0, lead), gamma, beta, num_support).flatten(0, 1)
        elif norm == "running":
            x = F.batch_norm(x, running[f"mean{i}"], running[f"var{i}"], gamma, beta, training=False, eps=EPS)
        elif momentum > 0 and dist.is_initialized() and dist.get_world_size() > 1:
            x = norm_of_all(x, running[f"mean{i}"], running[f"var{i}"], gamma, beta, momentum)
        else:
            averages = (running[f"mean{i}"], running[f"var{i}"]) if momentum > 0 else (None, None)
            x = F.batch_norm(x, *averages, gamma, beta, training=True, momentum=momentum, eps=EPS)
        if not strided:
            x = F.max_pool2d(x, 2)  # before the ReLU: the same values, a quarter of the work
        x = F.relu(x)
    features = x.mean(dim=(2, 3)) if strided else x.flatten(1)
    return features.unflatten(0, lead) if len(lead) > 1 else features


def support_norm(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, num_support: int) -> torch.Tensor:
    """Batch norm of x [B, n, C, H, W] with each task's statistics of its first `num_support` images."""
    support = x[:, :num_support]
    support = support if x.dtype == torch.float64 else support.float()  # statistics in bfloat16 have two digits
    var, mean = torch.var_mean(support, dim=(1, 3, 4), correction=0, keepdim=True)
    if len(x) == 1 and not torch.is_grad_enabled():  # fused, but blind to the statistics' own gradient
        return F.batch_norm(x[0], mean.flatten(), var.flatten(), gamma, beta, training=False, eps=EPS)[None]
    scale = gamma.view(-1, 1, 1) * (var + EPS).rsqrt()
    return (x - mean) * scale + beta.view(-1, 1, 1)


class SumOfAll(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def norm_of_all(x: torch.Tensor, mean, var, gamma, beta, momentum: float) -> torch.Tensor:
    """Batch norm of x [n, C, H, W] with the statistics of all processes (n may differ); updates mean and var."""
    wide = x.float() if x.dtype != torch.float64 else x
    count = torch.full((1,), x.numel() / x.shape[1], dtype=wide.dtype, device=x.device)
    total = SumOfAll.apply(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
    now_mean = total[:-1] / total[-1]
    centred = wide - now_mean.view(-1, 1, 1)
    now_var = SumOfAll.apply(centred.square().sum(dim=(0, 2, 3))) / total[-1]
    with torch.no_grad():
        mean.lerp_(now_mean, momentum)
        var.lerp_(now_var * total[-1] / (total[-1] - 1), momentum)  # unbiased, as F.batch_norm keeps it
    return (centred * (gamma * (now_var + EPS).rsqrt()).view(-1, 1, 1) + beta.view(-1, 1, 1)).to(x.dtype)


def prototypes(support: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean feature of each class (Snell et al. 2017, eq. 1): support [B, N*K, D] in class order -> [B, N, D]."""
    return support.unflatten(1, (num_classes, -1)).mean(dim=2)


def fast_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """What --dtype means for convolutions: auto takes bfloat16 where the processor computes in it."""
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:  # without such instructions bfloat16 is emulated and slower than float32
            probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonal (Jordan et al. 2024, "Muon"; torch.optim.Muon takes matrices only).

    The filters of a convolution are a matrix [filters, inputs]. A gradient changes it most in the few directions that
    all images share; an orthogonal step, its singular values all near 1, learns the rare directions as fast. The step
    of a vector, here of batch norm's scales and shifts, has length 1. `lr` multiplies both.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.9):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].mul_(group["momentum"]).add_(p.grad)
                ahead = p.grad + group["momentum"] * momentum  # Nesterov's
                step = orthogonal(ahead.flatten(1)) if p.ndim > 1 else ahead / (ahead.norm() + 1e-7)
                p.sub_(step.view_as(p), alpha=group["lr"])


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
