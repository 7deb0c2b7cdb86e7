"""One picture file as a viewer shows it, as uint8 values."""

from __future__ import annotations

from fewshot.experiment import UserError

import io
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps

try:  # photographs of iPhones, where the package is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass


def read_image(data: bytes | Path, name: str) -> np.ndarray:
    """One picture file as a viewer shows it on white paper: uint8 [C, H, W], C = 1 where all is grey, else 3.

    The first frame, turned as EXIF says, in sRGB; 16-bit values keep their proportion to white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF and large pictures
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
                shown = on_paper(upright(image))
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"cannot read the image {name} ({type(error).__name__}); replace it") from error
    if shown.ndim == 3 and (shown == shown[..., :1]).all():
        shown = shown[..., 0]
    # A copy: Pillow's own array may not be written to.
    return np.array(shown[None] if shown.ndim == 2 else shown.transpose(2, 0, 1), order="C")


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; a damaged EXIF turns nothing."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def on_paper(image: Image.Image) -> np.ndarray:
    """The uint8 values [H, W] or [H, W, 3] of a picture of any mode, what is transparent on white paper."""
    clear = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):  # greys of more than 8 bits
        values = np.asarray(image).astype(np.float64)
        white = 65535 if image.mode.startswith("I") else 1.0 if values.max() <= 1 else 255.0
        shown = (values / white * 255).clip(0, 255).round().astype(np.uint8)
        return np.where(values == clear, np.uint8(255), shown) if isinstance(clear, int) else shown
    if image.mode in ("1", "L") and clear is None:
        return np.asarray(image.convert("L"))
    if isinstance(clear, tuple) and max(clear) > 255:  # of a 16-bit file, of which Pillow keeps the upper bytes
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode == "RGBX":
        image = image.convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        image = in_srgb(image, profile)
    if image.mode in ("RGB", "CMYK", "YCbCr", "HSV", "LAB") and clear is None:
        return np.asarray(image.convert("RGB"))
    if image.mode == "La":
        image = image.convert("LA")
    pixels = np.asarray(image.convert("RGBA")).astype(np.float32)
    alpha = pixels[..., 3:] / 255
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture's colours by its own profile; as they are where that is sRGB anyway or damaged."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return shown


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bilinear resize of uint8 [n, C, H, W] to uint8 [n, C, size, size]."""
    if images.shape[-2:] == (size, size):
        return images
    small = [
        F.interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True)
        for chunk in torch.from_numpy(images).split(2048)
    ]
    return torch.cat(small).round_().clamp_(0, 255).to(torch.uint8).numpy()
