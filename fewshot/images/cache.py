"""Packed images on disk, in a file that is named by what it holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

CACHE_FOLDER = Path("data")  # in the working directory; the only place this file writes to
CACHE_VERSION = 2  # raise it when the packing changes


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
