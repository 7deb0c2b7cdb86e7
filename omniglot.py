"""From disk or network to one verified, cached uint8 array: Omniglot in every form, and folders of pictures.

Found are the two official archives, the same extracted, the course's `omniglot_resized/`, or any folder of class
folders. An Omniglot is trusted by what it decodes to. What was read is packed into one cache file, so that the next
start reads one array. Images are uint8 [C, H, W]; of Omniglot 255 is ink, colour photographs keep their values.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiment import UserError

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


# ------------------------------------------------------------------------------------ any picture


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


# ---------------------------------------------------------------------------- a folder of classes


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


# --------------------------------------------------------------------------------------- Omniglot


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


# -------------------------------------------------------------------------------------- the cache


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
