"""Omniglot, built-in glyphs and your own folders of images, served as few-shot episodes.

An episode (a task) is N classes with K labelled support images and Q query images each
(Vinyals et al. 2016, "Matching networks for one shot learning"). `load_dataset` gets the images from
`omniglot.py` or `glyphs.py` and divides the classes; from then on one uint8 array lives on the training
device and a whole meta-batch of B episodes is a few tensor operations (`EpisodeSampler`, every kind of
episode). `DataGenerator` serves the same episodes one at a time through the course's interface.

    python load_data.py                      # what is here, with pictures of an episode and of classes
    python load_data.py --dataset glyphs     # procedurally drawn characters, needs no data
    python load_data.py --dataset folder --data_folder my_images

Everywhere: float32 images in [0, 1], 1 is ink and 0 is paper; colour photographs keep their values.

Everything else: docs/load_data.md.
"""

from __future__ import annotations

import experiment
from experiment import TEST_SEED, VAL_SEED, UserError

import csv
import hashlib
import inspect
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F

import leaks
from glyphs import draw_glyphs, glyph_arrays
from omniglot import (
    ARCHIVES,
    DRAWINGS,
    NotFound,
    Preparation,
    cached,
    decide,
    fingerprint,
    folder_arrays,
    list_folder,
    list_omniglot,
    locate_mnist,
    locate_omniglot,
    mnist_arrays,
    must_be_readable,
    omniglot_arrays,
    prepare,
)


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


# ---------------------------------------------------------------------------- splits and datasets


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


def load_for(args) -> Dataset:
    """The dataset that a script's flags name, as the run that they name knows it (--resume, --checkpoint, --init_from).

    Its pictures are prepared as that run's were. Where the run's own folder has changed since, the run keeps its parts.
    UserError where a test class was seen in training by the run, or by one whose weights it started from. A new run
    finds in `args.kept` the record of its data, and in `args.inverted` whether ink was turned.
    """
    get = lambda name, default=None: getattr(args, name, default)
    flag = next((flag for flag in ("resume", "checkpoint", "init_from") if get(flag)), None)
    begins = flag in (None, "init_from")  # of others it is compared below what they have seen
    named = args.dataset, args.data_folder, get("split", "course"), get("image_size", 28)
    like, channels = None, None
    if flag:
        saved, known = experiment.read_flags(get(flag), flag), leaks.read_record(get(flag), flag)
        if saved["dataset"] != "folder":  # characters, which come as ink
            channels = 1
        elif known:
            like = Preparation(known.channels, known.inverted)
        else:
            like = prepared_before(saved["flags"], named[3])
            print(
                f"note: --{flag} {get(flag)} is older than the records of data: whether its folder has changed is not "
                "known, and its pictures are read as that version read them",
                file=sys.stderr,
            )
    data = load_dataset(*named, get("allow_overlap", False) or not begins, like, channels)
    if flag:
        data = follow_run(args, data, saved, known, flag)
        if flag != "resume" or get("allow_new_classes"):
            refuse_trained_classes(args, data, flag)
    if data.name == "folder" and experiment.shard()[0] == 0:
        print(f"pictures of {data.source} are read {Preparation(data.images.shape[1], data.inverted)}")
    args.inverted = data.inverted  # predict.py prepares pictures the same way
    args.kept = {leaks.RECORD: leaks.write_record(leaks.record_of(data))} if begins else {}
    return data


def prepared_before(flags: dict, image_size: int) -> Preparation | None:
    """How a folder's run that is older than records read its pictures: by the brightness of all of them."""
    folder = Path(flags.get("data_folder") or "")
    try:
        classes, _ = list_folder(folder)
        images, *_ = folder_arrays(folder, classes, image_size)
    except (UserError, OSError):
        return None
    return Preparation(images.shape[1], flags.get("inverted", bool(images.shape[1] == 1 and images.mean() > 127)))


def follow_run(args, data: Dataset, saved: dict, known: leaks.Known | None, flag: str) -> Dataset:
    """The dataset in the parts that a run's own folder had; UserError where it has changed so that it would leak."""
    get = lambda name, default=None: getattr(args, name, default)
    run, flags, place = get(flag), saved["flags"], lambda folder: Path(folder or "").resolve()
    own = data.name == saved["dataset"] == "folder" and place(flags.get("data_folder")) == place(args.data_folder)
    own = own and get("split", "course") == flags.get("split", "course")
    # Of another size the pictures cannot be compared here; the test classes still are.
    if not own or known is None or known.image_size != data.images.shape[-1] or known.digest == data.digest:
        return data
    allowed = get("allow_new_classes", False)
    if flag == "init_from" and not allowed:
        words = leaks.compare(known, data).words
        print(f"note: --{flag} {run}: its data folder has changed since it was trained: {words}", file=sys.stderr)
        return data
    parts, note = leaks.follow(known, data, flag, run, allowed, flags.get("allow_overlap", False))
    print(f"note: {note}", file=sys.stderr)
    return data._replace(splits=parts)


def turns(images: torch.Tensor) -> torch.Tensor:
    """Images [n, C, H, W] as they are, then all turned by 90, 180 and 270 degrees: [4 * n, C, H, W]."""
    return torch.cat([images.rot90(turn, (2, 3)) for turn in range(4)])


# --------------------------------------------------------------------------------------- episodes


def draw_distinct(rows: int, n: int, k: int, generator: torch.Generator, allowed: torch.Tensor | None = None):
    """k distinct integers below n for each row, every ordered choice equally likely: int64 [rows, k].

    `allowed` (bool [rows, n]) restricts each row to some of the integers.
    """
    device = generator.device
    if allowed is None and k * k <= n and device.type == "cpu":
        # Rare repeats: draw with replacement and draw the offending rows again, far fewer random
        # numbers than one key per integer (they are what a meta-batch costs; a GPU would have to wait for the look).
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
    continue a stream exactly, `reset` starts it again. Training tasks are drawn on `device`; those of the other
    splits on the CPU, so that a GPU is tested on the very same ones.

    rotations: adds every class turned by 90, 180 and 270 degrees as three more classes. Where the dataset is `turned`
        they are there in any case, in validation and test too.
    within_alphabet: all N classes of a task come from one alphabet, drawn uniformly from those
        that have N classes (Lake et al. 2015).
    one_drawer: the K support images of every class of a task are by the same K people, the queries by others, as in
        the one-shot trials of Lake et al. Image d of each character of an alphabet is by its drawer d.
    fixed_labels: class c always gets the label c mod N, so a network can memorise the labels of the
        training classes instead of learning to learn from the support set.
    jitter: every image is turned (by up to so many radians), scaled and slanted (by up to this share)
        at random, as if another person had drawn it.
    shift: and moved by up to this share of half its size.
    shard: (rank, world) keeps the rank-th of `world` equal slices of every meta-batch; all ranks draw
        the same tasks together, so their union does not depend on `world`.
    flags: what the user sets N, K and Q by, for the words of an error; None where there is no flag.
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
        one_drawer: bool = False,
        fixed_labels: bool = False,
        jitter: float = 0.0,
        shift: float = 0.0,
        shard: tuple[int, int] = (0, 1),
        flags: tuple[str | None, ...] = ("num_classes", "num_shot", "num_query"),
    ):
        chosen = dataset.splits[split]
        if len(chosen) == 0:
            raise UserError(f"--dataset {dataset.name} has no classes of split '{split}'; it is for tests alone")
        self.N, self.K, self.Q, self.B = num_classes, num_shot, num_query, batch_size
        self.seed, self.shard, self.fixed_labels, self.jitter, self.shift = seed, shard, fixed_labels, jitter, shift
        if batch_size % shard[1]:
            raise UserError(f"--meta_batch_size {batch_size} does not divide over {shard[1]} processes")
        starts, counts = dataset.starts[chosen], dataset.counts[chosen]
        rows = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
        images = torch.from_numpy(dataset.images[rows])
        alphabets = [dataset.names[c].rsplit("/", 1)[0] for c in chosen]
        if rotations or dataset.turned:
            images = turns(images)
            counts = np.tile(counts, 4)
            alphabets = [f"{a} turned {turn}" for turn in range(4) for a in alphabets]
        self.num_available = len(counts)
        smallest = int(counts.argmin())
        n, k, q = (f"--{flag} {v}" if flag else str(v) for flag, v in zip(flags, (self.N, self.K, self.Q), strict=True))
        if self.N > self.num_available:
            raise UserError(f"{n} is more than the {self.num_available} classes of split '{split}'; use fewer")
        if self.K + self.Q > counts[smallest]:
            name = dataset.names[chosen[smallest % len(chosen)]]
            raise UserError(f"{k} plus {q} is more than the {counts[smallest]} images of {name}; use fewer")
        self.images = images.contiguous().to(device)  # uint8 [total, C, H, W]
        drawn_on = device if split == "train" else "cpu"
        self.counts = torch.from_numpy(counts).to(drawn_on)
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        self.most = int(counts.max())
        self.same_count = self.most if len(set(counts.tolist())) == 1 else None
        self.limits = torch.tensor([jitter] * 4 + ([shift] * 2 if shift > 0 else []), device=device)
        if one_drawer and not self.same_count:
            raise UserError(f"tasks of one drawer need as many images of each class; those of split '{split}' differ")
        self.one_drawer = one_drawer
        self.groups = None  # bool [alphabets, classes]
        if within_alphabet:
            members = np.array([[a == b for b in alphabets] for a in dict.fromkeys(alphabets)])
            members = members[members.sum(1) >= self.N]
            if len(members) == 0:
                raise UserError(f"--within_alphabet: no alphabet of split '{split}' has {self.N} characters")
            self.groups = torch.from_numpy(members).to(drawn_on)
        self.labels = torch.arange(self.N, device=device)
        self.one_hot = torch.eye(self.N, device=device)
        self.generator = torch.Generator(drawn_on)
        self.reset()

    def __getstate__(self) -> dict:
        """What pickle and copy take, for workers that do not start as copies of this process: arrays, no tensors."""
        tensors = {k: v for k, v in self.__dict__.items() if isinstance(v, torch.Tensor)}
        arrays = {k: v.cpu().numpy() for k, v in tensors.items()} | {"generator": self.generator.get_state().numpy()}
        devices = {k: v.device for k, v in tensors.items()} | {"generator": self.generator.device}
        return self.__dict__ | arrays | {"devices": devices}

    def __setstate__(self, state: dict) -> None:
        generator, devices = torch.from_numpy(state.pop("generator").copy()), state.pop("devices")
        self.__dict__ |= {k: torch.from_numpy(v.copy()).to(devices[k]) if k in devices else v for k, v in state.items()}
        self.generator = torch.Generator(devices["generator"])
        self.generator.set_state(generator)

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
            places = torch.arange(self.most, device=device)
            members = draw_distinct(B * N, self.most, K + Q, g, places < self.counts[classes, None])
        rows = (self.starts[classes, None] + members).view(B, N, K + Q)
        if self.one_drawer:  # those that have drawn the first class
            drawers = rows % self.same_count
            rows = rows - drawers + drawers[:, :1]
        order = torch.rand(B, N * Q, generator=g, device=device).argsort(dim=1)
        rank, world = self.shard
        mine = slice(rank * B // world, (rank + 1) * B // world)
        return rows[mine].to(self.images.device), order[mine].to(self.images.device)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 images [B, ..., C, H, W] in [0, 1] of int64 rows [B, ...]."""
        images = self.images.index_select(0, rows.reshape(-1)).to(torch.float32).div_(255)
        if self.jitter > 0 or self.shift > 0:
            rank, world = self.shard
            shape = (world, rows.numel(), len(self.limits))  # all ranks draw for all and use their own
            noise = torch.rand(shape, generator=self.generator, device=rows.device)[rank]
            images = distort(images, self.limits * (2 * noise - 1))
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

    def first(self, num_tasks: int, sample=None, **options):
        """Start the stream again and yield its meta-batches, the last one cut, until they hold `num_tasks` tasks.

        They are drawn by `sample`, a method that draws (by default `self.sample`), with `options`.
        """
        self.reset()
        sample, done = sample or self.sample, 0
        while done < num_tasks:
            batch = tuple(x[: num_tasks - done] for x in sample(**options))
            done += len(batch[0])
            yield batch


def refuse_trained_classes(args, dataset: Dataset, flag: str) -> None:
    """UserError where a test class was seen in training by the run that --`flag` names, or by one before it."""
    run = getattr(args, flag)
    while run:
        try:
            saved = experiment.read_flags(run, flag)
            name, flags = saved["dataset"], saved["flags"]
            split, folder = flags.get("split", "course"), flags.get("data_folder")
            known, data = leaks.read_record(run, flag) or record_anew(dataset, name, flags), dataset
            if data.name == "folder" and name not in ("folder", "mnist"):  # of an official set no pictures are kept
                official = load_dataset(name, folder, split, known.image_size)
                known = leaks.record_of(official._replace(name="folder"))
            if "folder" in (name, data.name) and known.image_size != data.images.shape[-1]:
                like = Preparation(known.channels, data.inverted)
                where = data.name, args.data_folder, getattr(args, "split", "course"), known.image_size
                data = load_dataset(*where, True, like)._replace(splits=dataset.splits)
            seen = len(leaks.trained_on(known, data))
        except (OSError, ValueError, KeyError, UserError) as error:
            print(f"note: cannot compare the test classes with those that {run} saw ({error})", file=sys.stderr)
            return
        if seen:
            found = (
                f"--{flag} {run} was trained on, or chosen by, {seen} of {len(dataset.splits['test'])} test classes "
                f"(its data: {name}, --split {split})"
            )
            if not getattr(args, "allow_overlap", False):
                raise UserError(f"{found}; test on that, or train a run with --split {getattr(args, 'split', split)}")
            print(f"note: {found}; the figures of such a test are too good", file=sys.stderr)
        run = flags.get("init_from")


def record_anew(dataset: Dataset, name: str, flags: dict) -> leaks.Known:
    """What a run that is older than records was trained on, by what is found there now."""
    split, folder = flags.get("split", "course"), flags.get("data_folder")
    if "folder" in (name, dataset.name):
        return leaks.record_of(load_dataset(name, folder, split, flags.get("image_size", 28), allow_overlap=True))
    names = dataset.names if name == dataset.name else []
    parts = make_splits(name, names, split) if names else dict.fromkeys(("train", "val", "test"), np.zeros(0, int))
    return leaks.record_of(dataset._replace(name=name, splits=parts))


def fixed_tasks(dataset: Dataset, part: str, args, device: torch.device, **options) -> EpisodeSampler:
    """The tasks of validation or test (`part`): the same for every method, seed and processor.

    The size of its meta-batches is part of the stream; it depends on the setting alone: about 2000 images.
    """
    N, K, Q = args.num_classes, args.num_shot, args.num_query
    seed = {"val": VAL_SEED, "test": TEST_SEED}[part]
    return EpisodeSampler(dataset, part, N, K, Q, max(1, 2000 // (N * (K + Q))), seed, device, **options)


def deal_tasks(features: torch.Tensor, labels: torch.Tensor, B: int, N: int, g: torch.Generator):
    """Deal B tasks of N classes from one large episode, so that each of its images is encoded only once.

    features [1, K+1, P, D] and one-hot labels [1, K+1, P, P] of P classes -> [B, K+1, N, D], [B, K+1, N, N].
    """
    in_order = labels[0].argmax(dim=-1).argsort(dim=-1)  # [K+1, P]: the query row is shuffled
    classes = draw_distinct(B, features.shape[2], N, g)  # [B, N]
    order = torch.rand(B, N, generator=g, device=g.device).argsort(dim=1)  # of the queries
    columns = classes.unsqueeze(1).repeat(1, features.shape[1], 1)  # [B, K+1, N]
    columns[:, -1] = classes.gather(1, order)
    places = in_order.expand(B, -1, -1).gather(2, columns)
    rows = torch.arange(features.shape[1], device=g.device)[:, None]
    one_hot = torch.eye(N, device=g.device).repeat(B, features.shape[1], 1, 1)
    one_hot[:, -1] = one_hot[:, 0].gather(1, order[..., None].expand(-1, -1, N))
    return features[0][rows, places], one_hot


class LakeRuns(EpisodeSampler):
    """The 20 official runs of Lake et al. 2015: 20-way 1-shot tasks within an alphabet, 400 trials in all.

    One person has drawn a run's support set, another its 20 queries; `lake_runs.csv` names them and the characters.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str = "cpu"):
        test = {dataset.names[c]: place for place, c in enumerate(dataset.splits["test"])}
        with open(Path(__file__).with_name("lake_runs.csv"), newline="") as file:
            runs = [list(row.values()) for row in csv.DictReader(file)]
        rows, order = [], []
        for _, alphabet, train_drawer, test_drawer, characters, answers in runs:
            names = [f"{alphabet}/character{c}" for c in characters.split()]
            if dataset.name != "omniglot" or not all(name in test for name in names):
                raise UserError("Lake's runs are of Omniglot's evaluation set: use --dataset omniglot --split lake")
            first = torch.tensor([DRAWINGS * test[name] for name in names])
            rows.append(torch.stack([first + int(train_drawer) - 1, first + int(test_drawer) - 1], dim=-1))
            order.append(torch.tensor([int(answer) - 1 for answer in answers.split()]))
        super().__init__(dataset, "test", len(order[0]), 1, 1, len(runs), device=device)
        self.rows, self.order = torch.stack(rows).to(device), torch.stack(order).to(device)

    def draw(self, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the runs [20, 20, 2] and the classes of their items [20, 20]."""
        return self.rows[:batch_size], self.order[:batch_size]


def lake_runs(dataset: Dataset, args, device: torch.device, any_task: bool = False) -> LakeRuns | None:
    """Lake's runs for the report of a run with --split lake; None elsewhere.

    None too for a network that knows another N and K than their 20 and 1, unless it takes `any_task`.
    """
    known = any_task or (args.num_classes, args.num_shot) == (20, 1)
    return LakeRuns(dataset, device) if known and args.split == "lake" and dataset.name == "omniglot" else None


class DataGenerator(torch.utils.data.IterableDataset):
    """The course's interface: an endless stream of single episodes for a `DataLoader`.

    num_samples_per_class is K + 1; batch_type is train, val or test. `config` may hold data_folder,
    img_size, and also dataset, split, rotations and allow_overlap as the scripts' flags name them. `cache` is kept
    for the course's callers: the packed images are always in memory. Episodes are on `device`
    (leave it on the CPU for a DataLoader with workers).

    The stream follows from torch's seed alone (`torch.manual_seed`): each pass over the loader and
    each worker has an own stream, also with `persistent_workers` and whatever way workers are started.
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
        allowed = config.get("allow_overlap", False)
        dataset = load_dataset(name, config.get("data_folder"), split, self.img_size[0], allowed)
        self.dim_input, self.dim_output = int(np.prod(dataset.images.shape[1:])), num_classes
        self.device = torch.device(device)
        self.passes = 0  # of this worker process
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
        if worker is None:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        elif self.passes == 0:
            seed = worker.seed  # a fresh base seed of the loader's pass plus the worker's number
        else:  # a persistent worker keeps its seed
            seed = int(np.random.SeedSequence([worker.seed, self.passes]).generate_state(1, np.uint64)[0] >> 1)
        self.passes += worker is not None
        self.sampler.generator.manual_seed(seed)
        while True:
            yield self._sample()


# --------------------------------------------------------------------------------------- pictures


def episode_figure(support, support_labels, query, query_labels, predictions=None):
    """A matplotlib figure of one episode: support rows above the queries, one column a class.

    support [N*K, C, H, W] and query [N*Q, C, H, W] in [0, 1], integer labels. With `predictions`
    (int [N*Q]) each query is titled "predicted (true)" in green when right and red when wrong.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing to close

    columns, (C, H, W) = int(support_labels.max()) + 1, support.shape[1:]
    K, rows_query = len(support) // columns, -(-len(query) // columns)
    high, wide = round(1.3 * H), round(1.15 * W)  # of a tile, its title above the image
    # One picture of all tiles: axes for each would take seconds at 20 ways.
    paper = np.ones(((K + rows_query) * high, columns * wide, C), dtype=np.float32)
    figure = Figure(figsize=(max(columns, 4) * 0.95, (K + rows_query) * 1.1))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")

    def show(row: int, column: int, image, title: str, colour: str) -> None:
        y, x = (row + 1) * high - H, column * wide + (wide - W) // 2
        pixels = image.cpu().permute(1, 2, 0).numpy()
        paper[y : y + H, x : x + W] = 1 - pixels if C == 1 else pixels
        ax.text(x + W / 2, y - 1, title, fontsize=9, color=colour, ha="center", va="bottom")

    for i in range(len(support)):
        c = int(support_labels[i])
        show(i % K, c, support[i], f"class {c}", "black")
    for j in range(len(query)):
        true = int(query_labels[j])
        guess = None if predictions is None else int(predictions[j])
        title = f"query: {true}" if guess is None else f"query: {guess} ({true})"
        colour = "tab:blue" if guess is None else "green" if guess == true else "red"
        show(K + j // columns, j % columns, query[j], title, colour)
    ax.imshow(paper[..., 0] if C == 1 else paper, cmap="gray", vmin=0, vmax=1)
    return figure


def log_episode(run, sampler: EpisodeSampler, guess) -> None:
    """Send a picture of the first task of a sampler's stream, with predictions, to TensorBoard.

    guess(support [1, N*K, C, H, W], support labels [1, N*K], query [1, N*Q, C, H, W]) -> classes [N*Q].
    """
    if not run.writes:
        return
    support, support_labels, query, query_labels = next(sampler.first(1))
    with torch.no_grad():
        guesses = guess(support, support_labels, query)
    shown = 3 * sampler.N
    figure = episode_figure(support[0], support_labels[0], query[0, :shown], query_labels[0, :shown], guesses[:shown])
    run.writer.add_figure("episode", figure, run.step)


def class_sheet(dataset: Dataset, rows: int = 10, columns: int = 10) -> np.ndarray:
    """uint8 picture of `rows` classes, spread over the dataset, by `columns` images each."""
    columns = min(columns, int(dataset.counts.min()))
    chosen = np.linspace(0, len(dataset.names) - 1, rows).astype(int)
    sheet = np.stack([dataset.images[dataset.starts[c] :][:columns] for c in chosen])  # [rows, columns, C, H, W]
    sheet = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * sheet.shape[3], columns * sheet.shape[4], -1)
    paper = 255 - sheet[..., 0] if sheet.shape[-1] == 1 else sheet
    return paper.repeat(2, axis=0).repeat(2, axis=1)


def main(argv=None) -> Dataset:
    """Print what was found; write a picture of one episode and one of some classes to runs/."""
    parser = experiment._Parser(prog="load_data.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", choices=["auto", "omniglot", "glyphs", "folder", "mnist"], default="auto")
    parser.add_argument("--data_folder", help="where the images are")
    parser.add_argument("--split", choices=experiment.SPLITS, default="course")
    parser.add_argument("--image_size", type=int, default=28, help="pixels a side")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    data = load_dataset(args.dataset, args.data_folder, args.split, args.image_size, allow_overlap=True)
    seconds = time.perf_counter() - begin
    print(f"dataset     {data.name}, {data.source}")
    for part, classes in data.splits.items():
        copies = ", and each turned by 90, 180 and 270 degrees" if data.turned else ""
        print(f"{part:11s} {len(classes)} classes, {data.counts[classes].sum()} images{copies}")
    print(f"images      uint8 {list(data.images.shape)}, {data.images.mean() / 255:.3f} ink on average")
    if data.name == "folder":
        print(f"read        {Preparation(data.images.shape[1], data.inverted)}")
    print(f"digest      {data.digest}\ncache file  {data.cache_file}\nloaded in   {seconds:.2f} s")
    part = "train" if len(data.splits["train"]) else "test"
    sampler = EpisodeSampler(data, part, min(5, len(data.splits[part])), 1, 1)
    episode = [tensor[0] for tensor in sampler.sample(1)]
    try:
        Path("runs").mkdir(exist_ok=True)
        episode_figure(*episode).savefig("runs/episode.png", dpi=150)
        iio.imwrite("runs/classes.png", class_sheet(data))
    except OSError as error:
        raise UserError(f"cannot write pictures into runs/ ({error}); start in another working directory") from None
    print("pictures    runs/episode.png, runs/classes.png")
    return data


if __name__ == "__main__":
    experiment.run_script(main)
