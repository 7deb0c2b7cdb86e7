"""Encoders of few-shot learning, as modules and as pure functions of their parameters, and prototypes.

Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max-pooling, 64 filters each (Vinyals et al.
2016; Snell et al. 2017): 28x28 images become 64 features. The strided variant (Finn et al. 2017)
halves the size by stride 2 instead of pooling and averages what is left over space. `Residual` is a Conv4 with a
pair of convolutions behind each block.

Which images batch norm takes its statistics from is an argument of every call, never a hidden
train/eval switch:

    norm="running"  the averages collected in training: no image influences another
    norm="batch"    all images of the call; for episodes with queries among them: transductive
    norm="support"  the first `num_support` images of each task, for all images of that task
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from replay import Replayed

NORMS = ("running", "batch", "support")
EPS = 1e-5  # of batch norm
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


def prototypes(support: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean feature of each class (Snell et al. 2017, eq. 1): support [B, N*K, D] in class order -> [B, N, D]."""
    return support.unflatten(1, (num_classes, -1)).mean(dim=2)


def on_sphere(features: torch.Tensor, num_support: int) -> torch.Tensor:
    """Features [..., n, D] less the mean of each task's first num_support, stretched to length sqrt(D)."""
    centred = features - features.narrow(-2, 0, num_support).mean(dim=-2, keepdim=True)
    return centred * (centred.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021): images [n, C, H, W] to features [n, out_features].

    Each square of `patch` x `patch` pixels is a token, told its place by fixed sines and cosines; `depth` blocks of
    attention and a two-layer network follow, layer norm before each. The features are the mean over the tokens.
    """

    def __init__(self, channels: int = 1, width: int = 64, image_size: int = 28, depth: int = 4, patch: int = 4):
        super().__init__()
        if image_size % patch or width % 8:
            raise ValueError(f"image_size {image_size} must divide by {patch} and width {width} by 8")
        self.patch, self.side, self.out_features = patch, image_size // patch, width
        self.embed = nn.Linear(channels * patch * patch, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("places", sines_and_cosines(self.side, width), persistent=False)

    def tokens(self, patches: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [n, V, width] of patches [n, L, C*patch*patch]: of all, or of those at `visible` [n, V] alone."""
        if visible is None:
            x = self.embed(patches) + self.places
        else:
            rows = torch.arange(len(patches), device=patches.device)[:, None]
            x = self.embed(patches[rows, visible]) + self.places[visible]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: torch.Tensor, norm: str = "running", momentum: float = 0.0) -> torch.Tensor:
        """Features; `norm` and `momentum` are Conv4's and change nothing here: layer norm knows no other image."""
        return self.tokens(patchify(images, self.patch)).mean(dim=1)


class Block(nn.Module):
    """Attention of all tokens to all (Vaswani et al. 2017) and a two-layer network, each added to its input."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [n, L, width] to tokens of the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [n, L, 3, heads, width / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def sines_and_cosines(side: int, width: int) -> torch.Tensor:
    """Place of each of side x side tokens, rows first [side^2, width]: a quarter each of sin y, cos y, sin x, cos x."""
    rates = 10_000 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates  # [side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Images [n, C, H, W] cut into L squares, rows first: [n, L, C * patch * patch]."""
    n, C, H, W = images.shape
    squares = images.reshape(n, C, H // patch, patch, W // patch, patch)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, C * patch * patch)


def unpatchify(patches: torch.Tensor, patch: int, channels: int) -> torch.Tensor:
    """The images [n, C, H, W], H = W, whose squares are `patches` [n, L, C * patch * patch]."""
    side = round(patches.shape[1] ** 0.5)
    squares = patches.reshape(len(patches), side, side, channels, patch, patch)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), channels, side * patch, side * patch)


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
