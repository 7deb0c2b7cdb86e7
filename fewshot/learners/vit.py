"""A small vision transformer and its patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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
