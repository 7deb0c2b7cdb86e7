"""Overlap: the same thing in two parts of a dataset, and between a run and the data that it meets later.

A picture is known by its pixels, as they were packed, whatever its file is called and wherever it lies. `overlaps`
finds what stands in two parts: by content, by name and, as a note, nearly alike. `record_of` is what a run keeps of its
data. `follow` and `trained_on` tell from it what has changed since, and which test classes the run has seen.

Only folders are searched: the official sets are verified and known.
"""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.images.folders import PARTS
from fewshot.images.pictures import resize

import base64
import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECORD = "data.json"  # in a run folder
ALIKE = 0.98  # correlation of the pixels of two pictures that are one, re-encoded or resized
MOST_PAIRS = 10**9  # of pictures that are compared for likeness; of more, a part of the test pictures
LAST: dict = {}  # the digest of a dataset and the numbers of its pictures
COPY = re.compile(r"( - (copy|kopie|copie|copia)|[ _-]copy)?( ?\(\d+\))?$", re.IGNORECASE)  # that systems append


# ------------------------------------------------------------------------------- known by content


def numbers_of(images: np.ndarray) -> np.ndarray:
    """A number for the content of each picture uint8 [n, C, H, W]: uint64 [n].

    It is the same for a grey picture, the same in three equal channels, and their negatives. Pictures of a single
    colour, which tell nothing, have the number 0.
    """
    numbers = np.zeros(len(images), np.uint64)
    for i, image in enumerate(images):
        if (image == image[:, :1, :1]).all():
            continue
        if len(image) > 1 and (image == image[:1]).all():
            image = image[:1]
        image = 255 - image if image[0, 0, 0] > 127 else image
        digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest()
        numbers[i] = int.from_bytes(digest, "little")
    return numbers


def by_class(data) -> list[np.ndarray]:
    """The numbers of each class's pictures."""
    if LAST.get("digest") != data.digest:  # a start asks several times
        LAST.update(digest=data.digest, numbers=numbers_of(data.images))
    return np.split(LAST["numbers"], np.cumsum(data.counts)[:-1])


def few(items: list[str], most: int = 3) -> str:
    """Some examples: "a, b, c, ..."."""
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")


def counted(n: int, word: str) -> str:
    """ "1 class", "2 classes"."""
    plural = word + ("es" if word.endswith("s") else "s")
    return f"{n} {word if n == 1 else plural}"


# ------------------------------------------------------------------- the same thing in two parts


def overlaps(data) -> tuple[list[str], str]:
    """What stands twice in a folder's dataset: notes, and the error where test pictures are trained on (or "")."""
    part = np.full(len(data.names), -1)
    for p, classes in enumerate(data.splits.values()):
        part[classes] = p
    numbers = np.concatenate(by_class(data))
    owner = np.repeat(np.arange(len(data.names)), data.counts)
    order = np.argsort(numbers, kind="stable")
    order = order[numbers[order] > 0]
    groups = np.split(order, np.nonzero(np.diff(numbers[order]))[0] + 1) if len(order) else []
    name = lambda c: f"{data.names[c]} ({list(data.splits)[part[c]]})"
    found: dict[str, list[tuple[int, int]]] = {"test": [], "val": [], "class": [], "classes": []}
    twice = np.zeros(len(numbers), bool)
    for group in (g for g in groups if len(g) > 1):
        twice[group] = True
        classes = sorted(owner[group], key=lambda c: (-part[c], c))
        first, last = classes[0], classes[-1]
        if first == last:
            kind = "class"
        elif part[first] == part[last]:
            kind = "classes"
        else:
            kind = "test" if part[first] == 2 else "val"
        # Of a picture in the test the pictures of it there count.
        found[kind] += [(first, last)] * (sum(part[classes] == 2) if kind == "test" else 1)
    pairs = {k: [f"{name(a)} = {name(b)}" for a, b in dict.fromkeys(v)] for k, v in found.items()}
    error, notes = "", names_twice(data, part)
    if found["test"]:
        classes = len({a for a, _ in found["test"]})
        error = (
            f"{counted(len(found['test']), 'test picture')} of {counted(classes, 'class')} "
            f"{'is' if len(found['test']) == 1 else 'are'} also in training or validation: the same pictures in "
            f"{few(pairs['test'])}"
        )
    if found["val"]:
        notes.append(f"{counted(len(found['val']), 'picture')} in training and in validation: {few(pairs['val'])}")
    if found["classes"]:
        notes.append(f"the same picture in two classes, {len(found['classes'])} times: {few(pairs['classes'])}")
    if found["class"]:
        names = [name(a) for a, _ in dict.fromkeys(found["class"])]
        notes.append(f"the same picture twice in one class, {len(found['class'])} times: {few(names)}")
    alike = nearly_alike(data, part[owner], ~twice & (numbers > 0))
    if alike:
        names = list(dict.fromkeys(f"{name(owner[a])} ~ {name(owner[b])}" for a, b in alike))
        notes.append(
            f"{counted(len(alike), 'test picture')} {'looks' if len(alike) == 1 else 'look'} like copies (re-encoded "
            f"or resized) of pictures in training or validation: {few(names)}; the figures of such a test are too good"
        )
    return notes, error


def names_twice(data, part: np.ndarray) -> list[str]:
    """Notes on classes that are one by their names: equal in two parts, but for train/ or test/ inside, or copies."""
    groups: dict[str, list[int]] = {}
    plain = [unicodedata.normalize("NFC", name) for name in data.names]
    without = ["/".join(w for w in name.split("/") if w.lower() not in PARTS) or name for name in plain]
    known = set(without)
    for c, name in enumerate(without):
        base = COPY.sub("", name)
        groups.setdefault(base if base in known else name, []).append(c)
    several = {base: classes for base, classes in groups.items() if len(classes) > 1}
    apart = {base: classes for base, classes in several.items() if len(set(part[classes])) > 1}
    tops = {name.split("/")[0] for name in plain}
    if "train" in tops and tops <= {"train", "val", "test"}:
        tested = [b for b, classes in apart.items() if 2 in part[classes]]
        others = [b for b in apart if b not in tested]
        notes = []
        if tested:
            notes.append(
                f"{len(tested)} class names are in train/ and in test/ ({few(tested)}): if they are the same "
                "classes, the test is on trained classes and its figures are no few-shot figures"
            )
        return notes + [f"{len(others)} class names are in train/ and in val/ ({few(others)})"] * bool(others)
    inside = [b for b, classes in several.items() if any(plain[c] != without[c] for c in classes)]
    notes = []
    if inside:
        names = few([" and ".join(data.names[c] for c in several[b][:2]) for b in inside], 2)
        notes.append(
            f"{len(inside)} class names differ only by a folder train or test inside them, and so the same class is "
            f"taken as two ({names}); put train/ and test/ at the top to have them divided so"
        )
    copies = [b for b in apart if b not in inside]
    if copies:
        names = few([" and ".join(data.names[c] for c in apart[b][:2]) for b in copies], 2)
        notes.append(f"{len(copies)} classes and a copy of them, by the name, are in two parts: {names}")
    return notes


def nearly_alike(data, part: np.ndarray, asked: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (test picture, its likest picture of training or validation) that correlate by more than ALIKE.

    part: of each picture; asked (bool): which pictures to compare. A perceptual hash, 7x7 means of blocks, finds the
    candidates by one matrix product, their pixels decide.
    """
    test, known = np.nonzero(asked & (part == 2))[0], np.nonzero(asked & (part >= 0) & (part < 2))[0]
    if not len(test) or not len(known):
        return []
    test = test[:: -(-len(test) * len(known) // MOST_PAIRS)]

    def unit(values: np.ndarray) -> np.ndarray:
        values = values.reshape(len(values), -1).astype(np.float32)
        values = values - values.mean(axis=1, keepdims=True)
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)

    def small(rows: np.ndarray) -> np.ndarray:
        parts = [data.images[some] for some in np.array_split(rows, -(-len(rows) // 1000))]
        return np.concatenate([resize(p, 28).mean(axis=1).round().astype(np.uint8) for p in parts])  # [n, 28, 28]

    blocks = lambda images: unit(images.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)))
    seen, asking, pairs = small(known), small(test), []
    hashes = blocks(seen)
    for start in range(0, len(test), 256):
        some = asking[start : start + 256]
        rows, columns = np.nonzero(blocks(some) @ hashes.T > ALIKE + 0.01)
        for first in range(0, len(rows), 10_000):
            r, c = rows[first : first + 10_000], columns[first : first + 10_000]
            likeness = (unit(some[r]) * unit(seen[c])).sum(axis=1)
            pairs += [(s, test[start + i], known[j]) for s, i, j in zip(likeness, r, c, strict=True) if s > ALIKE]
    best = {a: b for _, a, b in sorted(pairs)}  # the likest comes last
    return sorted(best.items())


# ------------------------------------------------------------------------ a run and its data


class Known(NamedTuple):
    """What a run knows of its data."""

    dataset: str
    digest: str
    image_size: int
    channels: int
    inverted: bool
    parts: dict[str, list[int]]  # train, val, test -> numbers of classes, in order
    classes: dict[str, np.ndarray]  # name -> the numbers of its pictures, in order; none of an official set


def record_of(data) -> Known:
    numbers = by_class(data) if data.name == "folder" else []
    parts = {part: classes.tolist() for part, classes in data.splits.items()}
    classes = dict(zip(data.names, numbers, strict=False))
    _, channels, size, _ = data.images.shape
    return Known(data.name, data.digest, size, channels, data.inverted, parts, classes)


def write_record(known: Known) -> bytes:
    """The record as JSON, eight bytes a picture in base64."""
    classes = {name: base64.b64encode(n.astype("<u8").tobytes()).decode() for name, n in known.classes.items()}
    return (json.dumps(known._replace(classes=classes)._asdict()) + "\n").encode()


def read_record(run: Path | str, flag: str) -> Known | None:
    """The record of a run; None where it is older than records."""
    path = Path(run) / RECORD
    try:
        saved = json.loads(path.read_text())
        classes = {name: np.frombuffer(base64.b64decode(text), "<u8") for name, text in saved["classes"].items()}
        known = Known(**saved | {"classes": classes})
        if not all(isinstance(c, int) for part in ("train", "val", "test") for c in known.parts[part]):
            raise ValueError("its parts are no lists of numbers")
        return known
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--{flag} {run}: {RECORD} is damaged ({error}); restore it, or use another run") from None


def trained_on(known: Known, data) -> np.ndarray:
    """The numbers of the test classes of `data` that hold a picture which `known` trained on or was chosen by."""
    test = data.splits["test"]
    if "folder" not in (known.dataset, data.name):
        seen = {*known.parts["train"], *known.parts["val"]} if known.dataset == data.name else set()
        return np.array([c for c in test if c in seen], int)
    names = list(known.classes)
    parts = lambda *which: [known.classes[names[c]] for part in which for c in known.parts[part]]
    seen = np.concatenate([np.zeros(0, np.uint64), *parts("train", "val")])
    seen = seen[seen > 0]
    classes = by_class(data)
    return np.array([c for c in test if np.isin(classes[c], seen).any()], int)


class Change(NamedTuple):
    """What has become of the classes of a run."""

    words: str  # what has changed, with counts and examples
    same: dict[int, int]  # number of a class of the run -> its number now; of those that are still there
    whole: set[int]  # the classes of the run whose pictures are still the very same
    new: list[int]  # numbers of the classes now that the run did not know


def compare(known: Known, data) -> Change:
    """Match a folder's classes with those that a run knew: by content, then by name."""
    names, now = list(known.classes), by_class(data)
    place = {name: c for c, name in enumerate(data.names)}
    content: dict[bytes, list[int]] = {}
    for c, numbers in enumerate(now):
        content.setdefault(np.sort(numbers).tobytes(), []).append(c)
    same: dict[int, int] = {}
    whole, changed, renamed = set(), [], []
    for old, name in enumerate(names):  # what kept its name and its pictures
        if name in place and np.array_equal(np.sort(known.classes[name]), np.sort(now[place[name]])):
            same[old] = place[name]
            whole.add(old)
    for old, name in enumerate(names):
        free = [c for c in content.get(np.sort(known.classes[name]).tobytes(), []) if c not in same.values()]
        if old not in same and free:
            same[old] = free[0]
            whole.add(old)
            renamed.append(f"{name} -> {data.names[free[0]]}")
    for old, name in enumerate(names):
        if old not in same and name in place and place[name] not in same.values():
            same[old] = place[name]
            both = int(np.isin(known.classes[name], now[place[name]]).sum())
            changed.append(f"{name}: {both} of its {len(known.classes[name])} pictures are still there")
    new = [c for c in range(len(now)) if c not in same.values()]
    removed = [name for old, name in enumerate(names) if old not in same]
    lists = {"added": [data.names[c] for c in new], "removed": removed, "renamed": renamed, "replaced": changed}
    words = [f"{counted(len(found), 'class')} {kind} ({few(found)})" for kind, found in lists.items() if found]
    if not words:
        words = ["the order of the pictures, or their division"]
    return Change(", ".join(words), same, whole, new)


def keep_division(known: Known, data, change: Change) -> dict[str, np.ndarray]:
    """The run's own parts, of the classes that are still there, in its order; what is new joins the test classes.

    A folder that is divided stays so.
    """
    kept = {part: [change.same[c] for c in known.parts[part] if c in change.same] for part in known.parts}
    if {name.split("/")[0] for name in data.names} in ({"train", "test"}, {"train", "val", "test"}):
        kept["test"] = data.splits["test"].tolist()
    else:
        kept["test"] += change.new
    return {part: np.array(classes, int) for part, classes in kept.items()}


def follow(known: Known, data, flag: str, run: str, allowed: bool, meant: bool = False) -> tuple[dict, str]:
    """The parts of a run's own folder that has changed since, and a note that says so; UserError where it would leak.

    With --resume the classes of the run must be as they were. `allowed`: new test classes are accepted; `meant`: test
    classes of the run that it was trained on were accepted when it began.
    """
    change = compare(known, data)
    parts = keep_division(known, data, change)
    said = f"--{flag} {run}: its data folder has changed since it was trained: {change.words}"
    back = "bring the folder back to what it was"
    tested = {change.same[c] for c in known.parts["test"] if c in change.whole}
    seen = [c for c in trained_on(known, data._replace(splits=parts)).tolist() if not (meant and c in tested)]
    if seen:
        raise UserError(
            f"{said}; {len(seen)} of {len(parts['test'])} test classes are ones that it was trained on or chosen by "
            f"({few([data.names[c] for c in seen])}); {back}, or train a new run"
        )
    added = [c for c in parts["test"].tolist() if c not in tested]
    kept = [c for c in (*known.parts["train"], *known.parts["val"], *known.parts["test"]) if c in change.whole]
    if flag == "resume":
        names = list(known.classes)
        now = by_class(data)
        as_they_were = len(kept) == sum(map(len, known.parts.values())) and all(
            np.array_equal(known.classes[names[c]], now[change.same[c]]) for c in kept
        )
        if not as_they_were:
            raise UserError(f"{said}; the run cannot go on as it began: {back}, or train a new run")
    if added and not allowed:
        anew = len(trained_on(known, data))
        leak = f"divided anew, {anew} of {len(data.splits['test'])} test classes would be trained ones; " * (anew > 0)
        raise UserError(
            f"{said}; {leak}{back}, or keep the run's parts and test the {counted(len(added), 'new class')} too by "
            "--allow_new_classes"
        )
    return parts, f"{said}; the run's own parts are kept" + f", with {len(added)} new test classes" * bool(added)
