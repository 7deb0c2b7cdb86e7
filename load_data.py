"""Omniglot, built-in glyphs and your own folders of images, served as few-shot episodes.

An episode (a task) is N classes with K labelled support images and Q query images each
(Vinyals et al. 2016, "Matching networks for one shot learning"). This file finds, verifies, packs
and caches the images once; from then on one uint8 array lives on the training device and a whole
meta-batch of B episodes is a few tensor operations (`EpisodeSampler`). `DataGenerator` serves the
same episodes one at a time through the course's interface.

    python load_data.py                      # what is here, with pictures of an episode and of classes
    python load_data.py --dataset glyphs     # procedurally drawn characters, needs no data
    python load_data.py --dataset folder --data_folder my_images

Everywhere: float32 images in [0, 1], 1 is ink and 0 is paper; colour photographs keep their values.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiment import TEST_SEED, VAL_SEED, UserError

# The two official archives: classes, and the SHA-256 of their pixels (packbits of each 105x105
# image, True is paper, in sorted path order). An archive is trusted by what it decodes to.
ARCHIVES = {
    "images_background": (964, "0c9dd3e690771a96b7005791e921146797608178e3c6ee5ba6e82cc98a57121e"),
    "images_evaluation": (659, "9981879aa1d6238ebf877b6a048c375fec76cf8ab66b261d4edca5c50a8c9e32"),
}
ARCHIVE_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
DOWNLOAD_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
DRAWINGS = 20  # per character, one by each of 20 people
EVALUATION_ALPHABETS = set(
    "Angelic Atemayar_Qelisayer Atlantean Aurek-Besh Avesta Ge_ez Glagolitic Gurmukhi Kannada "
    "Keble Malayalam Manipuri Mongolian Old_Church_Slavonic_(Cyrillic) Oriya Sylheti "
    "Syriac_(Serto) Tengwar Tibetan ULOG".split()
)
CACHE_FOLDER = Path("data")  # in the working directory; the only place this file writes to
CACHE_VERSION = 1  # raise it when the packing changes
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Dataset(NamedTuple):
    """Packed images. The images of class c are `images[starts[c] : starts[c] + counts[c]]`."""

    name: str  # omniglot, glyphs or folder
    images: np.ndarray  # uint8 [total, C, H, W], 255 is ink
    counts: np.ndarray  # int64 [classes], images per class
    names: list[str]  # of the classes, "group/class"; the group is the alphabet
    splits: dict[str, np.ndarray]  # train, val, test -> int64 class indices
    source: str  # where the images came from
    digest: str  # of the source, names the cache file
    cache_file: Path

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts


# ------------------------------------------------------------------------------------ reading


def read_image(data: bytes | Path, name: str) -> np.ndarray:
    """Decode one image file to uint8 [C, H, W] with C = 1 (grey) or 3 (colour)."""
    try:
        image = iio.imread(data, plugin="pillow")
    except Exception as error:  # imageio raises whatever its plugin raises
        raise UserError(f"cannot read the image {name} ({type(error).__name__}); replace or remove it") from error
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif image.dtype != np.uint8:  # 16-bit greys
        image = (image.astype(np.float64) / max(float(image.max()), 1.0) * 255).astype(np.uint8)
    if image.ndim == 4:  # an animation: its first frame
        image = image[0]
    if image.ndim == 2:
        return image[None]
    if image.shape[-1] in (2, 4):  # transparent means paper
        alpha = image[..., -1:].astype(np.float32) / 255
        image = (image[..., :-1] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(image[..., :3].transpose(2, 0, 1))


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bilinear resize of uint8 [n, C, H, W] to uint8 [n, C, size, size]."""
    if images.shape[-2:] == (size, size):
        return images
    small = [
        F.interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True)
        for chunk in torch.from_numpy(images).split(2048)
    ]
    return torch.cat(small).round_().clamp_(0, 255).to(torch.uint8).numpy()


def list_tree(folder: Path, depth: int) -> list[str]:
    """Sorted paths, relative to `folder`, of the image files exactly `depth` folders down."""
    pattern = "/".join(["*"] * (depth + 1))
    found = (p for p in folder.glob(pattern) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(p.relative_to(folder).as_posix() for p in found)


def group_by_class(paths: list[str]) -> dict[str, list[str]]:
    """{class folder: its files}, both in sorted order."""
    classes: dict[str, list[str]] = {}
    for path in sorted(paths):
        classes.setdefault(path.rsplit("/", 1)[0], []).append(path)
    return classes


# ----------------------------------------------------------------------------------- Omniglot


def find_omniglot(folder: Path) -> tuple[str, list[Path]] | None:
    """The accepted form in `folder`: ("archives" | "extracted" | "resized", its paths), or None."""
    archives = [folder / f"{part}.zip" for part in ARCHIVES]
    extracted = [folder / part for part in ARCHIVES]
    for form, paths in (("archives", archives), ("extracted", extracted)):
        missing = [path for path in paths if not path.exists()]
        if len(missing) == 0:
            return form, paths
        partial = form == "archives" and not extracted[0].is_dir() and folder != CACHE_FOLDER
        if len(missing) < len(paths) and partial:  # in ./data the download fetches the other one
            raise UserError(f"{missing[0]} is missing; put both official archives into {folder}")
    for candidate in (folder / "omniglot_resized", folder):
        if next(candidate.glob("*/character*/*.png"), None) is not None:
            return "resized", [candidate]
    return None


def read_archive(path: Path, part: str) -> dict[str, list[np.ndarray]]:
    """{"alphabet/character": 20 uint8 images [1, 105, 105]} of one official zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
            for name in members:
                if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                    raise UserError(f"{path} holds the unsafe path {name!r}; download the official archive again")
            members = sorted(n for n in members if n.startswith(f"{part}/") and n.endswith(".png"))
            read = tqdm(members, desc=f"reading {path.name}", unit="png", disable=not sys.stderr.isatty())
            images = {name[len(part) + 1 :]: read_image(archive.read(name), f"{path}:{name}") for name in read}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and download it again") from error
    return {c: [images[f] for f in files] for c, files in group_by_class(list(images)).items()}


def read_folder(path: Path, depth: int, image_size: int | None = None) -> dict[str, list[np.ndarray]]:
    """{class: its uint8 images [C, H, W]} of class folders `depth` folders deep, resized as they are read."""
    classes = group_by_class(list_tree(path, depth))
    read = tqdm(classes.items(), desc=f"reading {path}", unit="class", disable=not sys.stderr.isatty())


    def load(file: Path) -> np.ndarray:
        image = read_image(file, str(file))
        return resize(image[None], image_size)[0] if image_size else image

    return {c: [load(path / f) for f in files] for c, files in read}


def check_counts(classes: dict[str, list[np.ndarray]], expected: int, source: Path) -> None:
    """Raise UserError unless there are `expected` characters with 20 drawings each."""
    short = [name for name, images in classes.items() if len(images) != DRAWINGS]
    if len(classes) != expected or short:
        found = f"{short[0]} has {len(classes[short[0]])} drawings" if short else f"{len(classes)} characters"
        want = f"want {expected} with {DRAWINGS}"
        raise UserError(f"{source} is not the whole Omniglot: {found}, {want}; delete it and get it again")


def check_pixels(classes: dict[str, list[np.ndarray]], digest: str, source: Path) -> None:
    """Raise UserError unless the images, in sorted order, are the official ones."""
    sha = hashlib.sha256()
    for images in classes.values():
        for image in images:
            sha.update(np.packbits(image > 127).tobytes())
    if sha.hexdigest() != digest:
        found = f"wrong pixel digest {sha.hexdigest()[:12]}"
        raise UserError(f"{source} is not the official Omniglot: {found}; delete it and get it again")


def read_omniglot(form: str, paths: list[Path], image_size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, counts and names of all 1623 characters: the background set, then the evaluation set."""
    classes: dict[str, list[np.ndarray]] = {}
    if form == "resized":  # by the course, which merged both sets into one folder; the alphabets tell them apart
        found = read_folder(paths[0], depth=2, image_size=image_size)
        check_counts(found, sum(n for n, _ in ARCHIVES.values()), paths[0])
        order = sorted(found, key=lambda name: (name.split("/")[0] in EVALUATION_ALPHABETS, name))
        classes = {name: found[name] for name in order}
    else:
        for (part, (expected, digest)), path in zip(ARCHIVES.items(), paths, strict=True):
            found = read_archive(path, part) if form == "archives" else read_folder(path, depth=2)
            check_counts(found, expected, path)
            check_pixels(found, digest, path)
            classes.update(found)
    images, counts, names = stack(classes)
    return 255 - resize(images[:, :1], image_size), counts, names  # the files have white paper


def stack(classes: dict[str, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 [total, C, H, W], counts and names; grey images join colour ones as grey RGB."""
    flat = [image for images in classes.values() for image in images]
    channels = max(image.shape[0] for image in flat)
    images = np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in flat])
    return images, np.array([len(images) for images in classes.values()]), list(classes)


def download_omniglot(folder: Path) -> list[Path]:
    """Fetch both archives into `folder`; three tries each, to a temporary name first."""
    paths = []
    for part, md5 in ARCHIVE_MD5.items():
        path = folder / f"{part}.zip"
        paths.append(path)
        for attempt in range(3):
            if path.exists():
                break
            partial = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with urllib.request.urlopen(DOWNLOAD_URL + path.name, timeout=10) as answer, open(partial, "wb") as out:
                    total = int(answer.headers.get("Content-Length") or 0)
                    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"downloading {path.name}")
                    while chunk := answer.read(1 << 16):
                        out.write(chunk)
                        bar.update(len(chunk))
                    bar.close()
                if hashlib.md5(partial.read_bytes()).hexdigest() != md5:
                    raise OSError("the download is damaged")
                os.replace(partial, path)
            except OSError as error:  # URLError, timeouts and a full disk are all OSErrors
                partial.unlink(missing_ok=True)
                if attempt == 2:
                    raise UserError(f"cannot download {path.name} ({error})") from error
                time.sleep(0.5)
    return paths


# ------------------------------------------------------------------------------------- glyphs


def draw_glyphs(num_classes: int = 1623, image_size: int = 28, seed: int = 0) -> np.ndarray:
    """Invent `num_classes` characters and draw each 20 times: uint8 [num_classes * 20, 1, H, W].

    A character is two to four pen strokes, straight or bent (cubic Bezier curves), between points of
    a 3x3 lattice; most start where the last one ended. A drawer moves all points a little and has
    an own slant, size, position and pen width.
    """
    strokes, points = 4, 24
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(shape, generator=g) * (high - low) + low

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=g) * std

    # Strokes end on another lattice point than they start from: 1 to 8 places further round.
    begin = torch.randint(9, (num_classes, strokes), generator=g)
    step = torch.randint(1, 9, (num_classes, strokes), generator=g)
    for s in range(1, strokes):
        joined = uniform(num_classes) < 0.7  # the pen was not lifted
        begin[:, s] = torch.where(joined, (begin[:, s - 1] + step[:, s - 1]) % 9, begin[:, s])
    end = (begin + step) % 9
    ends = torch.stack([begin, end], dim=-1)  # [classes, strokes, 2]
    lattice = torch.stack([ends % 3, ends.div(3, rounding_mode="floor")], dim=-1).float() - 1
    start, stop = (0.57 * lattice + normal(num_classes, strokes, 2, 2, std=0.1)).unbind(2)
    chord = stop - start
    across = torch.stack([-chord[..., 1], chord[..., 0]], dim=-1)
    bend = normal(num_classes, strokes, 2, std=0.7) * (uniform(num_classes, strokes, 1) < 0.6)
    control = torch.stack(
        [start, start + chord / 3 + across * bend[..., :1], start + chord * 2 / 3 + across * bend[..., 1:], stop], dim=2
    )  # [classes, strokes, 4, 2]
    used = torch.arange(strokes) < torch.randint(2, strokes + 1, (num_classes, 1), generator=g)

    t = torch.linspace(0, 1, points)[:, None]
    bernstein = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)  # [points, 4]
    pixels = torch.linspace(-1, 1, image_size)
    images = []
    for chunk, chunk_used in zip(control.split(100), used.split(100), strict=True):
        n = len(chunk) * DRAWINGS
        drawn = chunk.repeat_interleave(DRAWINGS, 0) + normal(n, strokes, 4, 2, std=0.06)
        curve = torch.einsum("pc,nscd->nspd", bernstein, drawn)
        # Blots add up to even ink along the stroke when each weighs the way to its neighbours.
        way = torch.zeros(n, strokes, points)
        way[..., 1:] += (curve[:, :, 1:] - curve[:, :, :-1]).norm(dim=-1) / 2
        way[..., :-1] += (curve[:, :, 1:] - curve[:, :, :-1]).norm(dim=-1) / 2
        angle, zero = normal(n, std=0.08), torch.zeros(n)
        width, height = uniform(n, low=0.8, high=1.1), uniform(n, low=0.8, high=1.1)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
        shear = torch.stack([width, normal(n, std=0.12), zero, height], dim=1).view(n, 2, 2)
        curve = curve.flatten(1, 2) @ (turn @ shear).transpose(1, 2) + normal(n, 1, 2, std=0.05)
        pen = uniform(n, 1, 1, low=0.03, high=0.05)
        blots = torch.exp(-(((curve[..., None] - pixels) / pen[..., None]) ** 2) / 2)  # [n, points, 2, image_size]
        weight = (way * chunk_used.repeat_interleave(DRAWINGS, 0)[..., None]).flatten(1) / pen[..., 0]
        coverage = torch.einsum("np,npy,npx->nyx", weight, blots[:, :, 1], blots[:, :, 0])
        images.append((255 * (1 - torch.exp(-1.5 * coverage))).round().to(torch.uint8))
    return torch.cat(images)[:, None].numpy()


# ------------------------------------------------------------------------- packing and caching


def fingerprint(paths: list[Path]) -> str:
    """SHA-256 of archive bytes, or of the names, sizes and times of all files below folders."""
    sha = hashlib.sha256()
    for path in paths:
        if path.is_file():
            sha.update(path.read_bytes())
            continue
        for root, folders, files in os.walk(path):
            folders.sort()
            for file in sorted(files):
                stat = os.stat(os.path.join(root, file))
                name = os.path.relpath(os.path.join(root, file), path)
                sha.update(f"{name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def cached(name: str, digest: str, image_size: int, build) -> tuple[np.ndarray, np.ndarray, list[str], Path]:
    """(images, counts, names, cache file) from the cache; a missing or damaged one is rebuilt.

    The cache is an uncompressed .npz: its zip checksums betray damage, nothing in it is pickled.
    It is written under a private name and moved into place, so that concurrent runs share it safely.
    """
    path = CACHE_FOLDER / f"{name}_{image_size}px_{digest[:12]}_v{CACHE_VERSION}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as packed:
                images, counts, names = packed["images"], packed["counts"], json.loads(str(packed["names"]))
            if images.dtype == np.uint8 and len(images) == counts.sum() and len(names) == len(counts):
                return images, counts, names, path
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        print(f"note: the cache {path} is damaged; packing the images again", file=sys.stderr)
    images, counts, names = build()
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            np.savez(out, images=images, counts=counts, names=np.array(json.dumps(names)))
        os.replace(partial, path)
    except OSError as error:  # a full disk costs the next start some seconds, not this run
        partial.unlink(missing_ok=True)
        print(f"note: cannot write the cache {path} ({error}); going on without it", file=sys.stderr)
    return images, counts, names, path


def make_splits(name: str, names: list[str], split: str) -> dict[str, np.ndarray]:
    """Class indices of train, val and test; the same on every machine (sorted names, seeded shuffle)."""
    parts = [n.split("/")[0] for n in names]
    if name == "folder" and set(parts) == {"train", "val", "test"}:  # the miniImageNet layout
        return {p: np.array([i for i, q in enumerate(parts) if q == p]) for p in ("train", "val", "test")}
    order = sorted(range(len(names)), key=names.__getitem__)
    if name == "folder":
        sizes = [round(0.64 * len(names)), round(0.16 * len(names))]
    elif split == "course":
        sizes = [1100, 100]
    else:  # lake: train and validate on the 964 background characters, test on the 659 of evaluation
        order = [i for i in order if i < ARCHIVES["images_background"][0]]
        sizes = [len(order) - 100, 100]
    random.Random(1).shuffle(order)
    if split == "lake" and name != "folder":
        order += range(ARCHIVES["images_background"][0], len(names))
    train, val, test = np.split(np.array(order), np.cumsum(sizes))
    return {"train": train, "val": val, "test": test}


def load_dataset(
    name: str = "auto", data_folder: str | None = None, split: str = "course", image_size: int = 28
) -> Dataset:
    """Find, verify, pack and split a dataset; a second call reads one cache file.

    `name` is omniglot, glyphs, folder or auto: Omniglot, and the glyphs only where Omniglot is
    neither on disk nor downloadable. Omniglot is looked for in `data_folder`, or else in
    $OMNIGLOT_DIR, then ./data, then on the network. Raises UserError with the remedy.
    """
    if not 8 <= image_size <= 1024:
        raise UserError(f"--image_size {image_size} is out of range; use 28 to 1024")
    if name == "auto":
        try:
            return load_dataset("omniglot", data_folder, split, image_size)
        except NotFound as error:
            print(
                f"WARNING: {error}\nWARNING: training on built-in GLYPHS instead; "
                "none of the figures below are Omniglot figures.",
                file=sys.stderr,
            )
            return load_dataset("glyphs", None, split, image_size)
    if name == "omniglot":
        form, paths = locate_omniglot(data_folder)
        source, digest = f"{form} in {paths[0].parent if form != 'resized' else paths[0]}", fingerprint(paths)
        build = lambda: read_omniglot(form, paths, image_size)
    elif name == "glyphs":
        # Other drawing code makes other glyphs, and so another cache file.
        digest = hashlib.sha256(inspect.getsource(draw_glyphs).encode()).hexdigest()
        source = "drawn by load_data.draw_glyphs"
        build = lambda: glyph_arrays(image_size)
    elif name == "folder":
        folder = Path(data_folder or "")
        if not data_folder or not folder.is_dir():
            raise UserError(f"--dataset folder needs --data_folder, a folder of class folders; got {data_folder!r}")
        depth = 2 if all((folder / part).is_dir() for part in ("train", "val", "test")) else 1
        source, digest = str(folder), fingerprint([folder])
        build = lambda: folder_arrays(folder, depth, image_size)
    else:
        raise UserError(f"--dataset {name} is unknown; use auto, omniglot, glyphs or folder")
    images, counts, names, cache_file = cached(name, digest, image_size, build)
    return Dataset(name, images, counts, names, make_splits(name, names, split), source, digest, cache_file)


class NotFound(UserError):
    """Omniglot is neither on disk nor downloadable."""


def locate_omniglot(data_folder: str | None) -> tuple[str, list[Path]]:
    """(form, paths) of Omniglot on disk, downloading it to ./data when it is nowhere."""
    wanted = "images_background.zip and images_evaluation.zip, the same extracted, or omniglot_resized/"
    if data_folder:
        found = find_omniglot(Path(data_folder))
        if found is None:
            raise UserError(f"--data_folder {data_folder} holds no Omniglot; want {wanted}")
        return found
    searched = [Path(p) for p in (os.environ.get("OMNIGLOT_DIR"), CACHE_FOLDER) if p]
    for folder in searched:
        found = find_omniglot(folder)
        if found is not None:
            return found
    try:
        return "archives", download_omniglot(CACHE_FOLDER)
    except UserError as error:
        where = " nor ".join(str(p) for p in searched)
        raise NotFound(f"no Omniglot in {where}, and {error}; put {wanted} there or use --data_folder") from None


def glyph_arrays(image_size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The glyphs in the form of Omniglot: 1623 characters in 50 invented alphabets."""
    total = sum(n for n, _ in ARCHIVES.values())
    names = [f"alphabet{i * 50 // total:02d}/character{i:04d}" for i in range(total)]
    return draw_glyphs(total, image_size), np.full(total, DRAWINGS), names


def folder_arrays(folder: Path, depth: int, image_size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images of the class folders in `folder`, or below its train, val and test (depth 2)."""
    classes = read_folder(folder, depth, image_size)
    if depth == 2:
        classes = {c: images for c, images in classes.items() if c.split("/")[0] in ("train", "val", "test")}
    if len(classes) < 3:
        raise UserError(f"--data_folder {folder} has {len(classes)} classes with images; want sub-folders of pictures")
    images, counts, names = stack(classes)
    if images.shape[1] == 1 and images.mean() > 127:  # dark strokes on bright paper: ink is 255
        images = 255 - images
    return images, counts, names


# ----------------------------------------------------------------------------------- episodes


def draw_distinct(rows: int, n: int, k: int, generator: torch.Generator, allowed: torch.Tensor | None = None):
    """k distinct integers below n for each row, every ordered choice equally likely: int64 [rows, k].

    `allowed` (bool [rows, n]) restricts each row to some of the integers.
    """
    device = generator.device
    if allowed is None and k * k <= n:
        # Rare repeats: draw with replacement and draw the offending rows again, far fewer random
        # numbers than one key per integer (on the CPU they are what a meta-batch costs).
        drawn = torch.randint(n, (rows, k), generator=generator, device=device)
        while k > 1:
            ordered = drawn.sort(dim=1).values
            repeats = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()[:, 0]
            if len(repeats) == 0:
                break
            drawn[repeats] = torch.randint(n, (len(repeats), k), generator=generator, device=device)
        return drawn
    keys = torch.rand(rows, n, generator=generator, device=device)
    if allowed is not None:
        keys = keys.masked_fill_(~allowed, -1.0)
    return keys.topk(k, dim=1).indices


def distort(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Turn, scale, slant and shift images [n, C, H, W].

    amounts [n, 4 or 6]: radians, size, slant in x and in y; shift in x and in y, as a share of half an image.
    """
    angle, size, slant_x, slant_y, *shift = amounts.unbind(dim=1)
    cos, sin = (1 + size) * angle.cos(), angle.sin()
    shift_x, shift_y = shift or (torch.zeros_like(angle),) * 2
    affine = torch.stack([cos, slant_x - sin, shift_x, slant_y + sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class EpisodeSampler:
    """Draws meta-batches of B episodes of N classes, K support and Q query images, on one device.

    The packed images of one split live on `device`; a draw is one gather, without a Python loop over
    tasks, classes or images. The generator is the sampler's own: `state_dict` and `load_state_dict`
    continue a stream exactly, `reset` starts it again.

    rotations: adds every class turned by 90, 180 and 270 degrees as three more classes.
    within_alphabet: all N classes of a task come from one alphabet, drawn uniformly from those
        that have N classes (Lake et al. 2015).
    fixed_labels: class c always gets the label c mod N, so a network can memorise the labels of the
        training classes instead of learning to learn from the support set.
    jitter: every image is turned (by up to so many radians), scaled and slanted (by up to this share)
        at random, as if another person had drawn it.
    shift: and moved by up to this share of half its size.
    shard: (rank, world) keeps the rank-th of `world` equal slices of every meta-batch; all ranks draw
        the same tasks together, so their union does not depend on `world`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        num_classes: int,
        num_shot: int,
        num_query: int = 1,
        batch_size: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rotations: bool = False,
        within_alphabet: bool = False,
        fixed_labels: bool = False,
        jitter: float = 0.0,
        shift: float = 0.0,
        shard: tuple[int, int] = (0, 1),
    ):
        chosen = dataset.splits[split]
        self.N, self.K, self.Q, self.B = num_classes, num_shot, num_query, batch_size
        self.seed, self.shard, self.fixed_labels, self.jitter, self.shift = seed, shard, fixed_labels, jitter, shift
        if batch_size % shard[1]:
            raise UserError(f"--meta_batch_size {batch_size} does not divide over {shard[1]} processes")
        starts, counts = dataset.starts[chosen], dataset.counts[chosen]
        rows = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
        images = torch.from_numpy(dataset.images[rows])
        alphabets = [dataset.names[c].rsplit("/", 1)[0] for c in chosen]
        if rotations:
            images = torch.cat([images.rot90(turn, (2, 3)) for turn in range(4)])
            counts = np.tile(counts, 4)
            alphabets = [f"{a} turned {turn}" for turn in range(4) for a in alphabets]
        self.num_available = len(counts)
        smallest = int(counts.argmin())
        if self.N > self.num_available:
            raise UserError(f"--num_classes {self.N} is more than the {self.num_available} classes of split '{split}'")
        if self.K + self.Q > counts[smallest]:
            name = dataset.names[chosen[smallest % len(chosen)]]
            raise UserError(
                f"--num_shot {self.K} plus --num_query {self.Q} is more than the {counts[smallest]} images of {name}"
            )
        self.images = images.contiguous().to(device)  # uint8 [total, C, H, W]
        self.counts = torch.from_numpy(counts).to(device)
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        self.same_count = int(counts[0]) if len(set(counts.tolist())) == 1 else None
        self.groups = None  # bool [alphabets, classes]
        if within_alphabet:
            members = np.array([[a == b for b in alphabets] for a in dict.fromkeys(alphabets)])
            members = members[members.sum(1) >= self.N]
            if len(members) == 0:
                raise UserError(f"--within_alphabet: no alphabet of split '{split}' has {self.N} characters")
            self.groups = torch.from_numpy(members).to(device)
        self.labels = torch.arange(self.N, device=device)
        self.one_hot = torch.eye(self.N, device=device)
        self.generator = torch.Generator(device)
        self.reset()

    def reset(self) -> None:
        """Start the stream of tasks again from the seed."""
        self.generator.manual_seed(self.seed)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())

    def draw(self, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the images of a meta-batch without touching them.

        Returns int64 rows of `images`, [B, N, K + Q], and the query order, [B, N * Q]: query j of a
        task is the (order[j] mod Q)-th query image of class order[j] div Q.
        """
        B, N, K, Q, g = batch_size or self.B, self.N, self.K, self.Q, self.generator
        device = self.counts.device
        if self.fixed_labels:
            turns = torch.randint(self.num_available // N, (B, N), generator=g, device=device)
            classes = turns * N + self.labels
        elif self.groups is not None:
            allowed = self.groups[torch.randint(len(self.groups), (B,), generator=g, device=device)]
            classes = draw_distinct(B, self.num_available, N, g, allowed)
        else:
            classes = draw_distinct(B, self.num_available, N, g)
        classes = classes.reshape(B * N)
        if self.same_count:
            members = draw_distinct(B * N, self.same_count, K + Q, g)
        else:
            largest = torch.arange(int(self.counts.max()), device=device)
            members = draw_distinct(B * N, len(largest), K + Q, g, largest < self.counts[classes, None])
        rows = (self.starts[classes, None] + members).view(B, N, K + Q)
        order = torch.rand(B, N * Q, generator=g, device=device).argsort(dim=1)
        rank, world = self.shard
        mine = slice(rank * B // world, (rank + 1) * B // world)
        return rows[mine], order[mine]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 images [B, ..., C, H, W] in [0, 1] of int64 rows [B, ...]."""
        images = self.images.index_select(0, rows.reshape(-1)).to(torch.float32).div_(255)
        if limits := [self.jitter] * 4 * (self.jitter > 0 or self.shift > 0) + [self.shift] * 2 * (self.shift > 0):
            rank, world = self.shard
            shape = (world, rows.numel(), len(limits))  # all ranks draw for all and use their own
            noise = torch.rand(shape, generator=self.generator, device=rows.device)[rank]
            images = distort(images, torch.tensor(limits, device=rows.device) * (2 * noise - 1))
        return images.view(*rows.shape, *self.images.shape[1:])

    def sample(self, batch_size: int | None = None, one_hot: bool = False, features: torch.Tensor | None = None):
        """A meta-batch as (support, support labels, query, query labels).

        support [B, N*K, C, H, W] in class order, query [B, N*Q, C, H, W] shuffled; labels are int64
        [B, N*K] and [B, N*Q], or with `one_hot` float32 [..., N]. With `features` [len(self.images), D] the same tasks
        hold these rows in place of the images.
        """
        rows, order = self.draw(batch_size)
        B, N, K, Q = len(rows), self.N, self.K, self.Q
        gather = self.gather if features is None else features.__getitem__
        support = gather(rows[:, :, :K].reshape(B, N * K))
        query = gather(rows[:, :, K:].reshape(B, N * Q).gather(1, order))
        support_labels = self.labels.repeat_interleave(K).expand(B, N * K)
        query_labels = order.div(Q, rounding_mode="floor")
        if one_hot:
            support_labels, query_labels = self.one_hot[support_labels], self.one_hot[query_labels]
        return support, support_labels, query, query_labels

    def sample_rows(self, batch_size: int | None = None, features: torch.Tensor | None = None):
        """A meta-batch in the course's layout, for Q = 1.

        Returns float32 images [B, K+1, N, C*H*W] and one-hot float32 labels [B, K+1, N, N]. Rows
        0 to K-1 are the support set in class order; row K holds the N queries, shuffled. With `features`
        [len(self.images), D] the same tasks hold these rows in place of the images.
        """
        rows, order = self.draw(batch_size)
        B, N, K = len(rows), self.N, self.K
        rows = torch.cat([rows[:, :, :K].transpose(1, 2), rows[:, :, K].gather(1, order)[:, None]], dim=1)
        labels = torch.cat([self.labels.expand(B, K, N), order[:, None]], dim=1)
        one_hot = self.one_hot.index_select(0, labels.reshape(-1)).view(B, K + 1, N, N)
        return (self.gather if features is None else features.__getitem__)(rows).flatten(3), one_hot


def fixed_tasks(dataset: Dataset, part: str, args, device: torch.device, **options) -> EpisodeSampler:
    """The tasks of validation or test (`part`): the same for every method, seed and processor.

    The size of its meta-batches is part of the stream; it depends on the setting alone: about 2000 images.
    """
    N, K, Q = args.num_classes, args.num_shot, args.num_query
    seed = {"val": VAL_SEED, "test": TEST_SEED}[part]
    return EpisodeSampler(dataset, part, N, K, Q, max(1, 2000 // (N * (K + Q))), seed, device, **options)


class DataGenerator(torch.utils.data.IterableDataset):
    """The course's interface: an endless stream of single episodes for a `DataLoader`.

    num_samples_per_class is K + 1; batch_type is train, val or test. `config` may hold data_folder,
    img_size, and also dataset, split and rotations as the scripts' flags name them. `cache` is kept
    for the course's callers: the packed images are always in memory. Episodes are on `device`
    (leave it on the CPU for a DataLoader with workers).

    The stream follows from torch's seed alone (`torch.manual_seed`): each pass over the loader and
    each worker has an own stream.
    """

    def __init__(
        self,
        num_classes: int,
        num_samples_per_class: int,
        batch_type: str,
        config: dict = {},  # noqa: B006 (the course's signature; never changed here)
        device: torch.device = torch.device("cpu"),  # noqa: B008
        cache: bool = True,
    ):
        if batch_type not in ("train", "val", "test"):
            raise UserError(f"batch_type {batch_type!r} is unknown; use train, val or test")
        self.num_classes, self.num_samples_per_class = num_classes, num_samples_per_class
        self.img_size = tuple(config.get("img_size", (28, 28)))
        if len(set(self.img_size)) != 1:
            raise UserError(f"img_size {self.img_size} is not square")
        name, split = config.get("dataset", "auto"), config.get("split", "course")
        dataset = load_dataset(name, config.get("data_folder"), split, self.img_size[0])
        self.dim_input, self.dim_output = int(np.prod(dataset.images.shape[1:])), num_classes
        self.device = torch.device(device)
        seed = int(torch.empty((), dtype=torch.int64).random_())
        rotations = config.get("rotations", False) and batch_type == "train"
        self.sampler = EpisodeSampler(
            dataset, batch_type, num_classes, num_samples_per_class - 1, seed=seed, device=device, rotations=rotations
        )

    def _sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One episode: float32 images [K+1, N, 784] and one-hot float32 labels [K+1, N, N]."""
        images, labels = self.sampler.sample_rows(1)
        return images[0], labels[0]

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        # DataLoader draws a fresh base seed for each pass and adds the worker's number to it.
        seed = worker.seed if worker else int(torch.empty((), dtype=torch.int64).random_())
        self.sampler.generator.manual_seed(seed)
        while True:
            yield self._sample()


# ----------------------------------------------------------------------------------- pictures


def episode_figure(support, support_labels, query, query_labels, predictions=None):
    """A matplotlib figure of one episode: support rows above the queries, one column a class.

    support [N*K, C, H, W] and query [N*Q, C, H, W] in [0, 1], integer labels. With `predictions`
    (int [N*Q]) each query is titled "predicted (true)" in green when right and red when wrong.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing to close

    columns = int(support_labels.max()) + 1
    K, rows_query = len(support) // columns, -(-len(query) // columns)
    figure = Figure(figsize=(max(columns, 4) * 0.95, (K + rows_query) * 1.2 + 0.5), layout="constrained")
    axes = figure.subplots(K + rows_query, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")

    def show(ax, image, title, colour):
        image = image.cpu().permute(1, 2, 0).numpy()
        ax.imshow(1 - image if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=9, color=colour, pad=2)

    for i in range(len(support)):
        c = int(support_labels[i])
        show(axes[i % K, c], support[i], f"class {c}", "black")
    for j in range(len(query)):
        true = int(query_labels[j])
        guess = None if predictions is None else int(predictions[j])
        title = f"query: {true}" if guess is None else f"query: {guess} ({true})"
        colour = "tab:blue" if guess is None else "green" if guess == true else "red"
        show(axes[K + j // columns, j % columns], query[j], title, colour)
    return figure


def class_sheet(dataset: Dataset, rows: int = 10, columns: int = 10) -> np.ndarray:
    """uint8 picture of `rows` classes, spread over the dataset, by `columns` images each."""
    columns = min(columns, int(dataset.counts.min()))
    chosen = np.linspace(0, len(dataset.names) - 1, rows).astype(int)
    sheet = np.stack([dataset.images[dataset.starts[c] :][:columns] for c in chosen])  # [rows, columns, C, H, W]
    sheet = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * sheet.shape[3], columns * sheet.shape[4], -1)
    paper = 255 - sheet[..., 0] if sheet.shape[-1] == 1 else sheet
    return paper.repeat(2, axis=0).repeat(2, axis=1)


def one_line(message: str):
    """What argparse calls on bad flags, without its usage text."""
    raise UserError(f"{message} (see python load_data.py --help)")


def main(argv=None) -> Dataset:
    """Print what was found; write a picture of one episode and one of some classes to runs/."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = one_line
    parser.add_argument("--dataset", choices=["auto", "omniglot", "glyphs", "folder"], default="auto")
    parser.add_argument("--data_folder", help="where the images are")
    parser.add_argument("--split", choices=["course", "lake"], default="course")
    parser.add_argument("--image_size", type=int, default=28, help="pixels a side")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    data = load_dataset(args.dataset, args.data_folder, args.split, args.image_size)
    seconds = time.perf_counter() - begin
    print(f"dataset     {data.name}, {data.source}")
    for part, classes in data.splits.items():
        print(f"{part:11s} {len(classes)} classes, {data.counts[classes].sum()} images")
    print(f"images      uint8 {list(data.images.shape)}, {data.images.mean() / 255:.3f} ink on average")
    print(f"digest      {data.digest}\ncache file  {data.cache_file}\nloaded in   {seconds:.2f} s")
    sampler = EpisodeSampler(data, "train", min(5, len(data.splits["train"])), 1, 1)
    episode = [tensor[0] for tensor in sampler.sample(1)]
    Path("runs").mkdir(exist_ok=True)
    episode_figure(*episode).savefig("runs/episode.png", dpi=150)
    iio.imwrite("runs/classes.png", class_sheet(data))
    print("pictures    runs/episode.png, runs/classes.png")
    return data


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
