"""The dataset that a script's flags name, as the run that they name knows it."""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.images.folders import folder_arrays, list_folder
from fewshot.images.preparation import Preparation
from fewshot.tasks import leaks
from fewshot.tasks.splits import Dataset, load_dataset, make_splits

import sys
from pathlib import Path

import numpy as np


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
