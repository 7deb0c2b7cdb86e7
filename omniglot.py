"""From disk or network to one verified, cached uint8 array: Omniglot in every form, and folders of pictures.

Found are the two official archives, the same extracted, the course's `omniglot_resized/`, or any folder of class
folders: side by side, in `train/ val/ test/`, in alphabets, or as miniImageNet's `images/` with csv files. An Omniglot
is trusted by what it decodes to, a picture file means what a picture viewer shows, and a cache file is named by the
bytes it was made of. Images are uint8 [C, H, W]; of Omniglot 255 is ink. `decide` prepares those of folders.
"""

from __future__ import annotations

from experiment import UserError

import contextlib
import csv
import functools
import gzip
import hashlib
import io
import json
import os
import re
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

try:  # photographs of iPhones, where the package is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass

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
CACHE_VERSION = 2  # raise it when the packing changes
PARTS = {  # of a divided folder, in lower case
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
NO_CLASSES = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
NO_PICTURES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


# ------------------------------------------------------------------------------------ any picture


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


# ---------------------------------------------------------------------------- a folder of classes


def is_junk(name: str) -> bool:
    """Whether a file or folder is the system's or an editor's and no data."""
    lower = name.lower()
    return name.startswith((".", "~$")) or name.endswith("~") or lower in NO_CLASSES or lower in NO_PICTURES


def plain_name(name: str) -> str:
    """A name of a file or class in one Unicode normal form; bytes in it that are no UTF-8 become \\x and two digits.

    Macs write "é" as two characters and others as one: names are compared in this form wherever they meet.
    """
    return unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def must_be_readable(folder: Path, asked: str) -> None:
    """UserError where the folder is there and closed to this user; `asked` is how the user named it."""
    try:
        os.stat(os.path.join(folder, "."))
        os.listdir(folder)
    except PermissionError as error:
        raise UserError(f"{asked} cannot be read ({error.strerror}); make it readable or name another") from None
    except OSError:
        pass  # missing or a file: whoever needs a folder says so


def has_pictures(files: list[Path]) -> bool:
    """Whether one of the files looks like a picture, by its name."""
    Image.init()
    return any(file.suffix.lower() in Image.EXTENSION or file.suffix.lower() in (".heic", ".heif") for file in files)


def contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sub-folders and the files of a folder, sorted and without junk."""
    try:
        entries = sorted(
            (p for p in folder.iterdir() if not is_junk(p.name)), key=lambda p: (plain_name(p.name), p.name)
        )
        is_folder = {p: p.is_dir() for p in entries}
    except OSError as error:
        raise UserError(f"cannot list the folder {folder} ({error}); make it readable or name another") from None
    return [p for p in entries if is_folder[p]], [p for p in entries if not is_folder[p]]


def walk(folder: Path, above: frozenset = frozenset()):
    """Yield (a folder, its sub-folders, its files), from the top down, following links but never in a circle."""
    above = above | {os.path.realpath(folder)}
    folders, files = contents(folder)
    folders = [p for p in folders if os.path.realpath(p) not in above]
    yield folder, folders, files
    for sub in folders:
        yield from walk(sub, above)


def list_folder(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """{class: its files} below `folder`, and notes on what is not used.

    A class is a folder that holds pictures; its name is the path to it, where the first part is train, val or test when
    the folder is divided. miniImageNet's form is `images/` with train.csv, val.csv and test.csv (file name, class).
    """
    tables = {
        PARTS[p.stem.lower()]: p for p in contents(folder)[1] if p.suffix.lower() == ".csv" and p.stem.lower() in PARTS
    }
    if "train" in tables and "test" in tables:
        return list_tables(folder, tables)
    top, folders = folder, contents(folder)[0]
    while len(folders) == 1 and folders[0].name.lower() not in PARTS and contents(folders[0])[0]:
        top, folders = folders[0], contents(folders[0])[0]  # only wrapped, as archives often extract
    classes, notes, inside = {}, [], None
    for path, below, files in walk(top):
        name = plain_name(path.relative_to(top).as_posix())
        if inside is not None and path.is_relative_to(inside):
            if files:
                notes.append(f"{len(files)} files in {name}, a folder inside the class {inside.name}, are not used")
        elif path == top:
            loose = sum(has_pictures([file]) for file in files)
            if loose:
                notes.append(f"{loose} pictures in no class folder, directly in {folder}, are not used")
        elif has_pictures(files) or (files and not below):
            inside = path
            classes[name] = classes.get(name, []) + files  # of two folders whose names are one
    return divide(top, classes, notes)


def divide(top: Path, classes: dict[str, list[Path]], notes: list[str]):
    """Name the parts of a divided folder train, val and test, whatever their spelling; say what is missing."""
    outer = {name.split("/")[0] for name in classes if "/" in name}
    parts = {name for name in outer if name.lower() in PARTS}
    found = {PARTS[name.lower()] for name in parts}
    there = {PARTS[p.name.lower()] for p in contents(top)[0] if p.name.lower() in PARTS}
    if "train" not in there or not found or (found == {"train"} and there == {"train"} and outer != parts):
        return classes, notes
    for part in ("train", "test"):
        if part not in found:
            lacks = f"{part}/ holds no class folders with pictures" if part in there else f"{part}/ is missing"
            raise UserError(
                f"--data_folder {top} has {' and '.join(sorted(found))} but {lacks}; add its classes, or name a folder "
                "with all class folders side by side to have them divided"
            )
    divided: dict[str, list[Path]] = {}
    for name, files in classes.items():
        outer_name, _, rest = name.partition("/")
        if rest and outer_name in parts:
            divided[f"{PARTS[outer_name.lower()]}/{rest}"] = files
        else:
            notes.append(f"the folder {name} lies beside train/ and test/ and is not used")
    return divided, notes


def list_tables(folder: Path, tables: dict[str, Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """miniImageNet's form: the files and classes that train.csv, val.csv and test.csv name."""
    images = next((p for p in (folder / "images", folder / "Images", folder) if p.is_dir()), folder)
    listed = functools.cache(
        lambda folder: {plain_name(p.name): p for p in folder.iterdir()} if folder.is_dir() else {}
    )

    def find(name: str) -> Path:
        """A picture, though its name is stored in another normal form than the table's."""
        if name.isascii() or (images / name).exists():
            return images / name
        return functools.reduce(lambda at, step: listed(at).get(plain_name(step), at / step), Path(name).parts, images)

    classes: dict[str, list[Path]] = {}
    for part in ("train", "val", "test"):
        if part not in tables:
            continue
        text = tables[part].read_text(encoding="utf-8-sig", errors="replace")
        rows = [row for row in csv.reader(text.splitlines(), delimiter=";" if ";" in text[:200] else ",") if row]
        if not rows or min(map(len, rows)) < 2:
            raise UserError(f"{tables[part]} has a line without file name and class; want two columns")
        titles = [title.strip().lower() for title in rows[0]]
        file_column = next((i for i, t in enumerate(titles) if t in ("filename", "file", "image", "path")), 0)
        label_column = next((i for i, t in enumerate(titles) if t in ("label", "class", "category")), file_column + 1)
        if not find(rows[0][file_column].strip()).is_file():
            rows = rows[1:]  # the titles
        for row in rows:
            label = plain_name(row[label_column].strip())
            classes.setdefault(f"{part}/{label}", []).append(find(row[file_column].strip()))
    return {c: sorted(files) for c, files in sorted(classes.items())}, []


def read_classes(classes: dict[str, list[Path]], image_size: int | None, strict: bool = False):
    """{class: its uint8 images [C, H, W]}, resized as they are read, and the files that could not be read.

    With `strict` such a file raises UserError.
    """
    found: dict[str, list[np.ndarray]] = {}
    unread = []
    for name, files in tqdm(classes.items(), desc="reading", unit="class", disable=not sys.stderr.isatty()):
        for file in files:
            try:
                if not file.is_file():  # a link that leads nowhere, or a pipe that would never end
                    raise UserError(f"cannot read the image {file}")
                image = read_image(file, str(file))
            except (UserError, OSError):
                if strict:
                    raise
                unread.append(f"{name}/{plain_name(file.name)}")
                continue
            found.setdefault(name, []).append(resize(image[None], image_size)[0] if image_size else image)
    return found, unread


def few(names: list[str]) -> str:
    """The first names of a list, in words."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def unread_note(files: list[str]) -> str:
    """One line that counts and names the files that could not be read as pictures."""
    heic = any(f.lower().endswith((".heic", ".heif")) for f in files) and "pillow_heif" not in sys.modules
    remedy = "; for .heic: pip install pillow-heif" if heic else ""
    return f"{len(files)} file{'s' * (len(files) > 1)} could not be read as pictures: {few(files)}{remedy}"


def folder_arrays(folder: Path, classes: dict[str, list[Path]], image_size: int):
    """Images as their files have them, counts, names and remarks of the listed classes."""
    found, unread = read_classes(classes, image_size)
    notes = [unread_note(unread)] if unread else []
    lost = [c for c in classes if c not in found]
    if lost:
        notes = [*notes, f"{len(lost)} classes hold no readable picture and are left out: {', '.join(lost[:5])}"]
    if len(found) < 3:
        hint = f" ({notes[-1]})" if notes else ""
        raise UserError(
            f"--data_folder {folder} has {len(found)} classes with images{hint}; want a folder of pictures for each "
            "class, side by side, in train/ val/ test/, or in alphabets"
        )
    return *stack(found), {"notes": notes}


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


def stack(classes: dict[str, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 [total, C, H, W], counts and names; grey images join colour ones as grey RGB."""
    flat = [image for images in classes.values() for image in images]
    channels = max(image.shape[0] for image in flat)
    images = np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in flat])
    return images, np.array([len(images) for images in classes.values()]), list(classes)


# --------------------------------------------------------------------------------------- Omniglot


class NotFound(UserError):
    """Omniglot is neither on disk nor downloadable."""


def locate_omniglot(data_folder: str | None) -> tuple[str, list[Path]]:
    """(form, paths) of Omniglot on disk, downloading it to ./data when it is nowhere.

    The form is "resized" with one path, or else "official": for each of ARCHIVES its zip file or its extracted folder.
    """
    wanted = "images_background.zip and images_evaluation.zip, the same extracted, or omniglot_resized/"
    if data_folder:
        must_be_readable(Path(data_folder), f"--data_folder {data_folder}")
        found = find_omniglot(Path(data_folder), f"--data_folder {data_folder}")
        if found is None:
            raise UserError(f"--data_folder {data_folder} holds no Omniglot; want {wanted}")
        return found
    searched = [Path(p).expanduser() for p in (os.environ.get("OMNIGLOT_DIR"), CACHE_FOLDER) if p]
    for folder in searched:
        try:
            must_be_readable(folder, "./data" if folder == CACHE_FOLDER else f"$OMNIGLOT_DIR {folder}")
        except UserError as error:
            raise (NotFound(str(error)) if folder == CACHE_FOLDER else error) from None
        # In ./data the download fetches what is missing.
        found = find_omniglot(folder, None if folder == CACHE_FOLDER else f"$OMNIGLOT_DIR {folder}")
        if found is not None:
            return found
    try:
        return "official", download_omniglot(CACHE_FOLDER)
    except UserError as error:
        where = " nor ".join(str(p) for p in searched)
        raise NotFound(f"no Omniglot in {where}, and {error}; put {wanted} there or use --data_folder") from None


def find_omniglot(folder: Path, asked: str | None) -> tuple[str, list[Path]] | None:
    """(form, paths) in `folder` or where archives, git and torchvision put it below; None when nothing is there.

    `asked` is how the user named the folder; one official part without the other is then an error.
    """
    if folder.name in ARCHIVES:  # one of the two folders themselves; they belong together
        folder = folder.parent if folder.parent.name not in ARCHIVES else folder.parent.parent
    places = [folder, folder / "python", folder / "omniglot", folder / "omniglot" / "python", folder / "omniglot-py"]
    for place in places:
        paths = {part: find_part(place, part) for part in ARCHIVES}
        missing = [part for part, path in paths.items() if path is None]
        if not missing:
            return "official", list(paths.values())
        if len(missing) < len(paths) and asked:
            has = next(path for path in paths.values() if path)
            raise UserError(
                f"{asked} has {has.name} but no {missing[0]}; put {missing[0]}.zip or the extracted folder beside it "
                f"(from {DOWNLOAD_URL}{missing[0]}.zip)"
            )
    for candidate in (folder / "omniglot_resized", folder):
        if next(candidate.glob("*/character*/*.png"), None) is not None:
            return "resized", [candidate]
    return None


def find_part(folder: Path, part: str) -> Path | None:
    """The archive of an official set in `folder`, or the set extracted, also when it was wrapped once more."""
    if (folder / f"{part}.zip").exists():
        return folder / f"{part}.zip"
    for path in (folder / part / part, folder / part):
        if path.is_dir():
            return path
    return None


def read_archive(path: Path, part: str) -> dict[str, list[np.ndarray]]:
    """{"alphabet/character": 20 uint8 images [1, 105, 105]} of one official zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
            for name in members:
                if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                    raise UserError(f"{path} holds the unsafe path {name!r}; take the official archive instead")
            members = sorted(n for n in members if n.startswith(f"{part}/") and n.endswith(".png"))
            read = tqdm(members, desc=f"reading {path.name}", unit="png", disable=not sys.stderr.isatty())
            classes: dict[str, list[np.ndarray]] = {}
            for name in read:
                if not is_junk(name.rsplit("/", 1)[1]):
                    character = name[len(part) + 1 :].rsplit("/", 1)[0]
                    classes.setdefault(character, []).append(read_image(archive.read(name), f"{path}:{name}"))
            return classes
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it readable or name another folder") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); move it away and download it again from {DOWNLOAD_URL}{part}.zip"
        ) from error


def list_characters(path: Path) -> dict[str, list[Path]]:
    """{"alphabet/character": its .png files} two folders below `path`."""
    classes: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*/*/*.png"), key=lambda p: p.relative_to(path).as_posix()):
        names = file.relative_to(path).parts
        if not any(map(is_junk, names)):
            classes.setdefault("/".join(names[:2]), []).append(file)
    return classes


def check_counts(classes: dict[str, list[np.ndarray]], expected: int, source: Path) -> None:
    """Raise UserError unless there are `expected` characters with 20 drawings each."""
    short = [name for name, images in classes.items() if len(images) != DRAWINGS]
    if len(classes) != expected or short:
        found = f"{short[0]} has {len(classes[short[0]])} drawings" if short else f"{len(classes)} characters"
        raise UserError(
            f"{source} is not the whole Omniglot: {found}, want {expected} with {DRAWINGS}; name another "
            f"--data_folder with the official files, from {DOWNLOAD_URL}"
        )


def check_pixels(classes: dict[str, list[np.ndarray]], digest: str, source: Path) -> None:
    """Raise UserError unless the images, in sorted order, are the official ones."""
    sha = hashlib.sha256()
    for images in classes.values():
        for image in images:
            sha.update(np.packbits(image > 127).tobytes())
    if sha.hexdigest() != digest:
        raise UserError(
            f"{source} is not the official Omniglot: wrong pixel digest {sha.hexdigest()[:12]}; name another "
            f"--data_folder with the official files, from {DOWNLOAD_URL}"
        )


def list_omniglot(paths: list[Path]) -> dict[str, list[Path]]:
    """All files of an Omniglot, for its fingerprint."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files |= {path.name: [path]} if path.is_file() else list_characters(path)
    return files


def omniglot_arrays(form: str, paths: list[Path], image_size: int):
    """Images, counts, names and remarks of all 1623 characters: the background set, then the evaluation set."""
    classes: dict[str, list[np.ndarray]] = {}
    if form == "resized":  # by the course, which merged both sets into one folder; the alphabets tell them apart
        found, _ = read_classes(list_characters(paths[0]), image_size, strict=True)
        check_counts(found, sum(n for n, _ in ARCHIVES.values()), paths[0])
        order = sorted(found, key=lambda name: (name.split("/")[0] in EVALUATION_ALPHABETS, name))
        classes = {name: found[name] for name in order}
    else:
        for (part, (expected, digest)), path in zip(ARCHIVES.items(), paths, strict=True):
            if path.is_file():
                found = read_archive(path, part)
            else:
                found, _ = read_classes(list_characters(path), None, strict=True)
            check_counts(found, expected, path)
            check_pixels(found, digest, path)
            classes.update(found)
    images, counts, names = stack(classes)
    return 255 - resize(images[:, :1], image_size), counts, names, {}  # the files have white paper


def download_omniglot(folder: Path) -> list[Path]:
    """Fetch both archives into `folder`; three tries each, to a temporary name first."""
    paths = []
    for part, md5 in ARCHIVE_MD5.items():
        path = folder / f"{part}.zip"
        paths.append(find_part(folder, part) or path)
        for attempt in range(3):
            if paths[-1].exists():
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


# ------------------------------------------------------------------------------------------ MNIST


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


# -------------------------------------------------------------------------------------- the cache


def fingerprint(classes: dict[str, list[Path]]) -> str:
    """SHA-256 of the names of classes and files and of every file's bytes, whatever links, sizes and times say."""

    def digest(file: Path) -> bytes:
        sha = hashlib.sha256()
        try:
            if not file.is_file():
                return b"no file"
            with open(file, "rb") as content:
                while part := content.read(1 << 20):
                    sha.update(part)
        except OSError:
            return b"unreadable"
        return sha.digest()

    files = [file for members in classes.values() for file in members]
    names = [[name, [file.name for file in members]] for name, members in classes.items()]
    sha = hashlib.sha256(json.dumps([names, "pillow_heif" in sys.modules]).encode())
    with ThreadPoolExecutor(4) as pool:
        for part in pool.map(digest, files):
            sha.update(part)
    return sha.hexdigest()


def cached(name: str, digest: str, image_size: int, build) -> tuple[np.ndarray, np.ndarray, list[str], dict, Path]:
    """(images, counts, names, remarks, cache file) from the cache; a missing or damaged one is rebuilt.

    The cache is an uncompressed .npz: its zip checksums betray damage, nothing in it is pickled.
    It is written under a private name and moved into place, so that concurrent runs share it safely.
    """
    path = CACHE_FOLDER / f"{name}_{image_size}px_{digest[:16]}_v{CACHE_VERSION}.npz"
    usable = True
    try:
        with np.load(path, allow_pickle=False) as packed:
            images, counts = packed["images"], packed["counts"]
            names, remarks = (json.loads(str(packed[key])) for key in ("names", "remarks"))
        if images.dtype != np.uint8 or len(images) != counts.sum() or len(names) != len(counts):
            raise ValueError("its arrays do not fit together")
        return images, counts, names, remarks, path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError as error:  # another user's: neither read nor replaced
        usable = False
        print(f"note: cannot read the cache {path} ({error.strerror}); going on without it", file=sys.stderr)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        print(f"note: the cache {path} is damaged; packing the images again", file=sys.stderr)
    images, counts, names, remarks = build()
    if not usable:
        return images, counts, names, remarks, path
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    texts = {"names": np.array(json.dumps(names)), "remarks": np.array(json.dumps(remarks))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            np.savez(out, images=images, counts=counts, **texts)
        os.replace(partial, path)
    except OSError as error:  # a full disk costs the next start some seconds, not this run
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        print(f"note: cannot write the cache {path} ({error}); going on without it", file=sys.stderr)
    return images, counts, names, remarks, path
