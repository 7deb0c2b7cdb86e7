"""A folder of class folders, or lists of files, as classes of pictures."""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.images.pictures import read_image, resize

import csv
import functools
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

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


def stack(classes: dict[str, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 [total, C, H, W], counts and names; grey images join colour ones as grey RGB."""
    flat = [image for images in classes.values() for image in images]
    channels = max(image.shape[0] for image in flat)
    images = np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in flat])
    return images, np.array([len(images) for images in classes.values()]), list(classes)
