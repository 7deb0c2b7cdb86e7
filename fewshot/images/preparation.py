"""What is done to the pictures of a folder: decided once from its training classes, then applied everywhere."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Preparation(NamedTuple):
    """What is done to a folder's pictures. The training classes decide it once; the run keeps it."""

    channels: int  # 1: every picture becomes grey; 3: grey ones become grey RGB
    inverted: bool  # dark strokes on bright paper are turned, so that 255 is ink

    def __str__(self) -> str:
        ink = ", turned to bright ink on black" if self.inverted else ", as bright as they are"
        return ("in colour" if self.channels == 3 else "as grey") + ink


def decide(images: np.ndarray, channels: int | None = None) -> tuple[Preparation, str]:
    """How to prepare a folder, from its training pictures uint8 [n, C, H, W], and what to say of it, if anything.

    Without `channels` they are read in colour where one in twenty has it in more than a hundredth of its pixels.
    """
    why = ""
    if channels is None and images.shape[1] == 3:
        spread = lambda some: some.max(axis=1).astype(np.int16) - some.min(axis=1)  # [n, H, W]
        parts = np.array_split(images, -(-len(images) // 1000))
        coloured = sum(int(((spread(part) > 24).mean(axis=(1, 2)) > 0.01).sum()) for part in parts)
        channels = 3 if coloured >= 0.05 * len(images) else 1
        if channels == 1:
            why = f"{coloured} of {len(images)} training pictures have colour, so all are read as grey"
    channels = channels or images.shape[1]
    return Preparation(channels, channels == 1 and bool(images.mean() > 127)), why


def prepare(images: np.ndarray, how: Preparation) -> np.ndarray:
    """Pictures uint8 [n, C, H, W] as `how` says: [n, how.channels, H, W]."""
    if how.channels < images.shape[1]:
        parts = np.array_split(images, -(-len(images) // 1000))
        images = np.concatenate([part.mean(axis=1, keepdims=True).round().astype(np.uint8) for part in parts])
    elif how.channels > images.shape[1]:
        images = np.repeat(images, how.channels, axis=1)
    return 255 - images if how.inverted else images
