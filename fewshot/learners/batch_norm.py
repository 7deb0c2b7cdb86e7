"""Batch norm whose statistics are an argument of each call."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

NORMS = ("running", "batch", "support")
EPS = 1e-5  # of batch norm


def batch_norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    norm: str,
    averages: tuple[torch.Tensor, torch.Tensor] | None = None,
    num_support: int = 0,
    momentum: float = 0.0,
    eps: float = EPS,
    all_processes: bool = False,
) -> torch.Tensor:
    """Batch norm of x [n, C, H, W], with norm="support" also of B tasks [B, n, C, H, W]; gamma, beta [C].

    averages: running mean and variance [C] each; they normalise with norm="running", and with norm="batch" and
    momentum > 0 the statistics of x enter them. all_processes: under torchrun these are the statistics of the images of
    all processes, as if one had them all.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown; use one of {NORMS}")
    if norm == "support":
        if not 0 < num_support <= x.shape[-4]:
            raise ValueError("norm='support' needs the images of tasks and 0 < num_support <= n")
        return support_norm(x, gamma, beta, num_support, eps)
    if norm == "running":
        return F.batch_norm(x, *averages, gamma, beta, training=False, eps=eps)
    if all_processes and momentum > 0 and dist.is_initialized() and dist.get_world_size() > 1:
        return norm_of_all(x, *averages, gamma, beta, momentum, eps)
    averages = averages if momentum > 0 else (None, None)
    return F.batch_norm(x, *averages, gamma, beta, training=True, momentum=momentum, eps=eps)


def support_norm(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, num_support: int, eps: float):
    """Batch norm of x [B, n, C, H, W], or [n, C, H, W], with each task's statistics of its first num_support images."""
    support = x.narrow(-4, 0, num_support)
    support = support if x.dtype == torch.float64 else support.float()  # statistics in bfloat16 have two digits
    var, mean = torch.var_mean(support, dim=(-4, -2, -1), correction=0, keepdim=True)
    if x.dim() == 5 and len(x) == 1 and not torch.is_grad_enabled():  # fused, but blind to the statistics' own gradient
        return F.batch_norm(x[0], mean.flatten(), var.flatten(), gamma, beta, training=False, eps=eps)[None]
    scale = gamma.view(-1, 1, 1) * (var + eps).rsqrt()
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


def norm_of_all(x: torch.Tensor, mean, var, gamma, beta, momentum: float, eps: float) -> torch.Tensor:
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
    return (centred * (gamma * (now_var + eps).rsqrt()).view(-1, 1, 1) + beta.view(-1, 1, 1)).to(x.dtype)
