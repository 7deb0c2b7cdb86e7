"""MNIST's four files, as a data set that is only tested on."""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.images.folders import contents, must_be_readable
from fewshot.images.pictures import resize

import gzip
import os
import re
import zlib
from pathlib import Path

import numpy as np


def locate_mnist(data_folder: str | None) -> list[Path]:
    """The files of images and labels in MNIST's format in `data_folder` or $MNIST_DIR; the test set before others."""
    folder = data_folder or os.path.expanduser(os.environ.get("MNIST_DIR", ""))
    wanted = "t10k-images-idx3-ubyte(.gz) and t10k-labels-idx1-ubyte(.gz)"
    if not folder:
        raise UserError(f"--dataset mnist needs --data_folder (or $MNIST_DIR), a folder with {wanted}")
    must_be_readable(Path(folder), f"--data_folder {folder}" if data_folder else f"$MNIST_DIR {folder}")
    files = {p.name: p for p in contents(Path(folder))[1]} if Path(folder).is_dir() else {}
    pairs = []
    for name, path in files.items():
        if match := re.fullmatch(r"(.*)images([-.])idx3-ubyte(\.gz)?", name):
            labels = [f"{match[1]}labels{match[2]}idx1-ubyte{end}" for end in ("", ".gz")]
            pairs += [[path, files[label]] for label in labels if label in files]
    if not pairs:
        raise UserError(f"--data_folder {folder} has no images and labels in MNIST's format; want {wanted}")
    return min(pairs, key=lambda pair: not re.search("t10k|test", pair[0].name))


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a file in MNIST's format, packed or not."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            kind, rank = file.read(4)[2:]
            shape = np.frombuffer(file.read(4 * rank), ">u4").astype(int)
            values = np.frombuffer(file.read(int(shape.prod()) + 1), np.uint8)
            if kind != 8 or len(values) != shape.prod():
                raise ValueError(f"{len(values)} values, want {'x'.join(map(str, shape))} of 8 bits")
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it readable or name another folder") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not a whole file of MNIST's format ({error}); name another --data_folder") from None
    return values.reshape(shape)


def mnist_arrays(images: Path, labels: Path, image_size: int):
    """Images, counts, names and remarks of the digits (or whatever the labels say), class by class; 255 is ink."""
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or len(pixels) != len(classes):
        raise UserError(f"{images} has shape {list(pixels.shape)}, {labels} {list(classes.shape)}; they are no pair")
    found = np.unique(classes)
    small = resize(pixels[np.argsort(classes, kind="stable"), None], image_size)
    return small, np.array([(classes == c).sum() for c in found]), [f"mnist/{c}" for c in found], {}
