"""Omniglot from its archives, their extracted folders, the course's folder or the network, trusted by its pixels."""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.images.cache import CACHE_FOLDER
from fewshot.images.folders import is_junk, must_be_readable, read_classes, stack
from fewshot.images.pictures import read_image, resize

import hashlib
import os
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

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
