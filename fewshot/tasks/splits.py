"""A dataset and its division into training, validation and test classes."""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.images.cache import cached, fingerprint
from fewshot.images.folders import folder_arrays, list_folder, must_be_readable
from fewshot.images.glyphs import draw_glyphs, glyph_arrays
from fewshot.images.mnist import locate_mnist, mnist_arrays
from fewshot.images.omniglot import ARCHIVES, NotFound, list_omniglot, locate_omniglot, omniglot_arrays
from fewshot.images.preparation import Preparation, decide, prepare
from fewshot.tasks import leaks

import csv
import hashlib
import inspect
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class Dataset(NamedTuple):
    """Packed images. The images of class c are `images[starts[c] : starts[c] + counts[c]]`."""

    name: str  # omniglot, glyphs, folder or mnist
    images: np.ndarray  # uint8 [total, C, H, W], 255 is ink
    counts: np.ndarray  # int64 [classes], images per class
    names: list[str]  # of the classes, "group/class"; the group is the alphabet
    splits: dict[str, np.ndarray]  # train, val, test -> int64 class indices
    source: str  # where the images came from
    digest: str  # of the images and names, whatever form they were read from
    cache_file: Path
    inverted: bool = False  # a grey folder of dark strokes on bright paper, turned to 255 is ink
    turned: bool = False  # the turns of a class are classes too, in each part (--split vinyals)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts


def make_splits(name: str, names: list[str], split: str) -> dict[str, np.ndarray]:
    """Class indices of train, val and test; the same on every machine (sorted names, seeded shuffle).

    A folder that is divided stays so; without a val/ a fifth of its training classes are for validation. Other folders
    are divided 64:16:20, with `lake` by alphabets. MNIST is all test. `vinyals` is the published division of Omniglot
    (Vinyals et al. 2016, as Snell et al. 2017 list it); glyphs are divided at random into parts of the same sizes.
    """
    if name == "mnist":
        none = np.array([], int)
        return {"train": none, "val": none, "test": np.arange(len(names))}
    if split == "vinyals" and name == "folder":
        raise UserError("--split vinyals lists the characters of Omniglot; use --split course for --dataset folder")
    if split == "vinyals" and name == "omniglot":
        return vinyals_split(names)
    order = sorted(range(len(names)), key=names.__getitem__)
    groups = [n.split("/")[0] for n in names]
    shuffle = random.Random(1).shuffle
    if name == "folder" and {"train", "test"} <= set(groups) <= {"train", "val", "test"}:
        parts = {p: np.array([i for i, q in enumerate(groups) if q == p]) for p in ("train", "val", "test")}
        if len(parts["val"]) == 0:
            train = [i for i in order if groups[i] == "train"]
            shuffle(train)
            held = max(round(0.2 * len(train)), min(5, len(train) // 2))
            parts |= {"train": np.array(sorted(train[held:])), "val": np.array(sorted(train[:held]))}
        return parts
    if name == "folder" and split == "lake":
        alphabets = sorted(set(groups))
        if len(alphabets) < 3 or len(alphabets) == len(names):
            raise UserError("--split lake divides alphabets; want --data_folder with alphabet/character folders")
        shuffle(alphabets)
        ends = [max(1, round(0.64 * len(alphabets))), max(2, round(0.8 * len(alphabets)))]
        parts = alphabets[: ends[0]], alphabets[ends[0] : ends[1]], alphabets[ends[1] :]
        chosen = [np.array([i for i in order if groups[i] in part]) for part in parts]
        return dict(zip(("train", "val", "test"), chosen, strict=True))
    if name == "folder":
        sizes = [round(0.64 * len(names)), round(0.16 * len(names))]
    elif split in ("course", "vinyals"):
        sizes = [1100, 100] if split == "course" else [1028, 172]
    else:  # lake: train and validate on the 964 background characters, test on the 659 of evaluation
        order = [i for i in order if i < ARCHIVES["images_background"][0]]
        sizes = [len(order) - 100, 100]
    shuffle(order)
    if split == "lake":
        order += range(ARCHIVES["images_background"][0], len(names))
    train, val, test = np.split(np.array(order), np.cumsum(sizes))
    return {"train": train, "val": val, "test": test}


def vinyals_split(names: list[str]) -> dict[str, np.ndarray]:
    """Indices of the 1028, 172 and 423 characters of the published split; a line of vinyals_split.csv is a range."""
    place, parts = {name: i for i, name in enumerate(names)}, {"train": [], "val": [], "test": []}
    with open(Path(__file__).with_name("vinyals_split.csv"), newline="") as file:
        for part, alphabet, first, last in list(csv.reader(file))[1:]:
            parts[part] += [place[f"{alphabet}/character{c:02d}"] for c in range(int(first), int(last) + 1)]
    return {part: np.array(chosen) for part, chosen in parts.items()}


def load_dataset(
    name: str = "auto",
    data_folder: str | None = None,
    split: str = "course",
    image_size: int = 28,
    allow_overlap: bool = False,
    like: Preparation | None = None,
    channels: int | None = None,
) -> Dataset:
    """Find, verify, pack and split a dataset; a second call reads one cache file.

    `name` is omniglot, glyphs, folder, mnist or auto: Omniglot, and the glyphs only where Omniglot is
    neither on disk nor downloadable. Omniglot is looked for in `data_folder`, or else in
    $OMNIGLOT_DIR, then ./data, then on the network. Raises UserError with the remedy; one is that a folder has the same
    pictures in training and in test, unless `allow_overlap`. By default the training classes of a folder decide how its
    pictures are prepared; `like` is how they were where a network was trained, `channels` all that its pictures tell.
    """
    if not 8 <= image_size <= 1024:
        raise UserError(f"--image_size {image_size} is out of range; use 28 to 1024")
    if name == "auto":
        try:
            return load_dataset("omniglot", data_folder, split, image_size, allow_overlap, like, channels)
        except NotFound as error:
            print(
                f"WARNING: {error}\nWARNING: training on built-in GLYPHS instead; "
                "none of the figures below are Omniglot figures.",
                file=sys.stderr,
            )
            return load_dataset("glyphs", None, split, image_size, allow_overlap, like, channels)
    notes: list[str] = []
    if name == "omniglot":
        form, paths = locate_omniglot(data_folder)
        source, held = (
            f"{form} in {paths[0].parent if form != 'resized' else paths[0]}",
            fingerprint(list_omniglot(paths)),
        )
        build = lambda: omniglot_arrays(form, paths, image_size)
    elif name == "glyphs":
        # Other drawing code makes other glyphs, and so another cache file.
        held = hashlib.sha256(inspect.getsource(draw_glyphs).encode()).hexdigest()
        source = "drawn by glyphs.draw_glyphs"
        build = lambda: (*glyph_arrays(image_size), {})
    elif name == "mnist":
        pair = locate_mnist(data_folder)
        source, held = " and ".join(map(str, pair)), fingerprint({name: pair})
        build = lambda: mnist_arrays(*pair, image_size)
    elif name == "folder":
        folder = Path(data_folder or "")
        must_be_readable(folder, f"--data_folder {data_folder}")
        if not data_folder or not folder.is_dir():
            raise UserError(f"--dataset folder needs --data_folder, a folder of class folders; got {data_folder!r}")
        classes, notes = list_folder(folder)
        # Caches of earlier versions held prepared pictures; the name tells them apart.
        source, held = str(folder), hashlib.sha256(f"as read {fingerprint(classes)}".encode()).hexdigest()
        build = lambda: folder_arrays(folder, classes, image_size)
    else:
        raise UserError(f"--dataset {name} is unknown; use auto, omniglot, glyphs, folder or mnist")
    images, counts, names, remarks, cache_file = cached(name, held, image_size, build)
    splits = make_splits(name, names, split)
    notes += remarks.get("notes", [])
    if name == "folder" and {n.split("/")[0] for n in names} == {"train", "test"}:
        notes.append(f"no val/ with classes: {len(splits['val'])} classes of train/ are for validation")
    how = Preparation(like.channels if like else channels or images.shape[1], False)
    if name == "folder":
        how, said = as_trained(images, counts, splits, like, channels)
        notes += [said] if said else []
    images = prepare(images, how)
    digest = hashlib.sha256(json.dumps([images.shape, counts.tolist(), names]).encode())
    digest.update(np.ascontiguousarray(images))
    turned = split == "vinyals" and name != "mnist"
    data = Dataset(name, images, counts, names, splits, source, digest.hexdigest(), cache_file, how.inverted, turned)
    if name == "folder":
        found, error = leaks.overlaps(data)
        if error and not allow_overlap:
            remedy = "keep each class and picture in one part, or, where it is meant so, go on by --allow_overlap"
            raise UserError(f"--data_folder {source}: {error}; {remedy}")
        notes += [*found, *([f"{error}; such a test is on what was trained"] if error else [])]
    for note in notes:
        print(f"note: {source}: {note}", file=sys.stderr)
    return data


def as_trained(images, counts, splits: dict, like: Preparation | None, channels: int | None) -> tuple[Preparation, str]:
    """How to prepare a folder, and what to say of it: `like` a run's pictures, else as its training classes decide."""
    starts = np.cumsum(counts) - counts
    rows = np.concatenate([np.arange(starts[c], starts[c] + counts[c]) for c in splits["train"]])
    own, why = decide(images[rows], channels)
    if like is None:
        return own, why
    differs = f"the pictures are read as the run's were, {like}; by themselves they would be read {own}"
    return like, differs if like != own else ""


def turns(images: torch.Tensor) -> torch.Tensor:
    """Images [n, C, H, W] as they are, then all turned by 90, 180 and 270 degrees: [4 * n, C, H, W]."""
    return torch.cat([images.rot90(turn, (2, 3)) for turn in range(4)])
