"""Faults found in the field: every kind as cases with their right values.

Each test is named kind[case]; with RECORD=1 in the environment the outcomes are written to results/field.json, the
table of docs/reliability.md: kind, cases tried, cases right.
"""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.images import glyphs, omniglot
from fewshot.images.drawings import prepare_drawing
from fewshot.images.pictures import read_image
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import load_dataset

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, known_dataset, one_line_error
from PIL import Image, ImageCms

import hw1
import maml
import meta_lstm
import predict
import protonet
import transfer
from load_data import DataGenerator
from studies import warm

GLYPHS = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_test_tasks", "4"]
TINY = {
    "hw1": ["--hidden_dim", "8", "--meta_batch_size", "4", "--num_classes", "2", "--num_val_tasks", "4"],
    "protonet": ["--width", "4", "--meta_batch_size", "2", "--num_query", "2", "--views", "1", "--num_val_tasks", "4"],
    "transfer": ["--width", "4", "--num_query", "2", "--head_steps", "2", "--finetune_steps", "2"],
    "maml": ["--width", "4", "--num_query", "2", "--train_query", "1", "--warmup_steps", "1", "--num_val_tasks", "4"],
    "meta_lstm": ["--num_query", "2", "--train_query", "1", "--meta_batch_size", "2", "--num_val_tasks", "4"],
}
MODULES = {"hw1": hw1, "protonet": protonet, "transfer": transfer, "maml": maml, "meta_lstm": meta_lstm}


def refused(call, *words):
    """Assert that call() is a UserError with all `words` and no advice to delete anything."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert all(word in text for word in words) and "delete" not in text, text


# ----------------------------------------------------------------------------------- pictures


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def colour(rgb, mode="RGB", size=(6, 4)):
    return Image.new(mode, size, rgb)


def corner(kind: str, orientation: int, **options) -> bytes:
    """A picture 16x8 that a viewer shows with its dark quarter at the upper left, stored as `orientation` says."""
    upright = Image.new("L", (16, 8), 255)
    upright.paste(0, (0, 0, 8, 4))
    undo = {
        1: [],
        2: [Image.FLIP_LEFT_RIGHT],
        3: [Image.ROTATE_180],
        4: [Image.FLIP_TOP_BOTTOM],
        5: [Image.TRANSPOSE],
        6: [Image.ROTATE_90],
        7: [Image.TRANSVERSE],
        8: [Image.ROTATE_270],
    }[orientation]
    stored = functools.reduce(lambda image, turn: image.transpose(turn), undo, upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind, options", [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_turned_pictures(kind, options, orientation):
    shown = read_image(corner(kind, orientation, **options), "x")
    assert shown.shape == (1, 8, 16)
    assert shown[0, 1:3, 1:7].max() < 40 and shown[0, 5:].min() > 215 and shown[0, :, 9:].min() > 215


def test_damaged_exif_turns_nothing():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0"):
        assert read_image(encoded(colour((1, 2, 3)), "PNG", exif=exif), "x").shape == (3, 4, 6)


def grey16(values, kind, **options):
    return encoded(Image.fromarray(np.asarray(values, np.uint16)), kind, **options)


def palette(alpha):
    image = colour((200, 30, 30)).convert("P", palette=Image.ADAPTIVE)
    index = image.getpixel((0, 0))
    transparency = index if alpha == "index" else bytes(128 if i == index else 255 for i in range(256))
    return encoded(image, "PNG", transparency=transparency)


def lab():
    to = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return encoded(ImageCms.applyTransform(colour((200, 30, 30)), to), "TIFF")


def animation(kind):
    frames = [colour((200, 30, 30)), colour((0, 0, 255)), colour((0, 255, 0))]
    return encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


RED, PINK = (200, 30, 30), (228, 143, 143)  # and red, half transparent, on white
SHOWN = {  # name: (file, what a viewer shows, tolerance)
    "CMYK JPEG": (lambda: encoded(colour(RED).convert("CMYK"), "JPEG", quality=98), RED, 6),
    "CMYK TIFF": (lambda: encoded(colour(RED).convert("CMYK"), "TIFF"), RED, 1),
    "LAB TIFF": (lab, RED, 4),
    "YCbCr TIFF": (lambda: encoded(colour(RED).convert("YCbCr"), "TIFF"), RED, 4),
    "grey JPEG": (lambda: encoded(Image.new("L", (6, 4), 70), "JPEG"), (70,), 1),
    "black and white": (lambda: encoded(Image.new("1", (6, 4), 1), "PNG"), (255,), 0),
    "RGB of equal parts is grey": (lambda: encoded(colour((70, 70, 70)), "PNG"), (70,), 0),
    "palette": (lambda: encoded(colour(RED).convert("P", palette=Image.ADAPTIVE), "PNG"), RED, 0),
    "grey palette": (lambda: encoded(colour((9, 9, 9)).convert("P", palette=Image.ADAPTIVE), "PNG"), (9,), 0),
    "palette, transparent colour": (lambda: palette("index"), (255,), 0),
    "palette, half transparent": (lambda: palette("half"), PINK, 1),
    "RGBA, half transparent": (lambda: encoded(colour((*RED, 128), "RGBA"), "PNG"), PINK, 1),
    "RGBA, transparent black": (lambda: encoded(colour((0, 0, 0, 0), "RGBA"), "PNG"), (255,), 0),
    "LA, half transparent": (lambda: encoded(Image.new("LA", (6, 4), (0, 128)), "PNG"), (127,), 1),
    "grey, transparent value": (lambda: encoded(Image.new("L", (6, 4), 70), "PNG", transparency=70), (255,), 0),
    "black and white, black transparent": (
        lambda: encoded(Image.new("1", (6, 4), 0), "PNG", transparency=0),
        (255,),
        0,
    ),
    "RGB, transparent colour": (lambda: encoded(colour(RED), "PNG", transparency=RED), (255,), 0),
    "RGB, another colour transparent": (lambda: encoded(colour(RED), "PNG", transparency=(1, 2, 3)), RED, 0),
    "WebP, half transparent": (lambda: encoded(colour((*RED, 128), "RGBA"), "WEBP", lossless=True), PINK, 1),
    "TIFF, half transparent": (lambda: encoded(colour((*RED, 128), "RGBA"), "TIFF"), PINK, 1),
    "transparent GIF": (lambda: encoded(Image.new("P", (6, 4), 3), "GIF", transparency=3), (255,), 0),
    "16-bit grey, dark": (lambda: grey16(np.full((4, 6), 2570), "PNG"), (10,), 0),
    "16-bit grey, bright": (lambda: grey16(np.full((4, 6), 51400), "PNG"), (200,), 0),
    "16-bit grey TIFF": (lambda: grey16(np.full((4, 6), 25700), "TIFF"), (100,), 0),
    "float TIFF of 0 to 1": (lambda: encoded(Image.fromarray(np.full((4, 6), 0.4, np.float32)), "TIFF"), (102,), 0),
    "animated GIF": (lambda: animation("GIF"), RED, 0),
    "animated WebP": (lambda: animation("WEBP"), RED, 1),
    "animated PNG": (lambda: animation("PNG"), RED, 0),
    "TIFF of three pages": (lambda: animation("TIFF"), RED, 0),
    "two-picture JPEG (MPO)": (lambda: animation("MPO"), RED, 6),
    "BMP": (lambda: encoded(colour(RED), "BMP"), RED, 0),
    "JPEG 2000": (lambda: encoded(colour(RED), "JPEG2000"), RED, 4),
    "AVIF": (lambda: encoded(colour(RED, size=(64, 64)), "AVIF", quality=100), RED, 6),
    "PPM": (lambda: encoded(colour(RED), "PPM"), RED, 0),
    "ICO with transparency": (lambda: encoded(colour((0, 0, 0, 0), "RGBA", (16, 16)), "ICO"), (255,), 0),
}


@pytest.mark.parametrize("case", SHOWN)
def test_pictures_as_a_viewer_shows_them(case):
    make, expected, tolerance = SHOWN[case]
    try:
        file = make()
        Image.open(io.BytesIO(file)).load()
    except (KeyError, OSError) as error:
        pytest.skip(f"Pillow was built without it: {error}")
    shown = read_image(file, case)
    assert shown.dtype == np.uint8 and shown.shape[0] == len(expected), shown.shape
    assert np.abs(shown.astype(int) - np.array(expected)[:, None, None]).max() <= tolerance, shown[:, 0, 0]


def test_sixteen_bits_keep_their_proportion():
    ramp = np.linspace(0, 30000, 24).reshape(4, 6)
    shown = read_image(grey16(ramp, "PNG"), "x")[0]
    assert np.abs(shown - ramp / 257).max() <= 0.51 and shown.max() == 117


# ------------------------------------------------------------------------------ unreadable files


def draw(folder: Path, names, each=4, first=0, size=12):
    """Class folders of `each` small grey pictures, all different."""
    for n, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            value = np.random.default_rng([first, n, i]).integers(0, 256, (size, size), np.uint8)
            Image.fromarray(value).save(folder / name / f"{i}.png")
    return folder


def dangling(path):
    path.symlink_to("nowhere")


def pipe(path):
    os.mkfifo(path)


TEN = [f"c{i}" for i in range(10)]
UNREADABLE = {
    "text named .png": lambda d: (d / "a.png").write_text("no picture"),
    "empty file": lambda d: (d / "a.jpg").write_bytes(b""),
    "cut off": lambda d: (d / "a.png").write_bytes((d / "0.png").read_bytes()[:60]),
    "heic without its package": lambda d: (d / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40)),
    "dangling link": lambda d: dangling(d / "a.png"),
    "pipe": lambda d: pipe(d / "a.png"),
    "vector picture": lambda d: (d / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "unknown suffix": lambda d: (d / "a.xyz").write_bytes(b"123"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files_are_counted_and_named(case, tmp_path, capsys):
    UNREADABLE[case](draw(tmp_path / "d", TEN) / "c3")
    for _ in range(2):  # packed, and from the cache
        data = load_dataset("folder", str(tmp_path / "d"))
        err = capsys.readouterr().err
        assert data.counts.tolist() == [4] * 10
        assert err.count("\n") == 1 and "1 file could not be read as pictures: c3/a." in err, err


def test_a_class_of_unreadable_files_is_named(tmp_path, capsys):
    (draw(tmp_path / "d", TEN) / "phone").mkdir()
    for i in range(3):
        (tmp_path / "d" / "phone" / f"{i}.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert len(load_dataset("folder", str(tmp_path / "d")).names) == 10
    err = capsys.readouterr().err
    assert "3 files could not be read" in err and "phone/0.heic" in err and "left out: phone" in err
    assert "pillow-heif" in err or "pillow_heif" in sys.modules


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".jpe", "", ".avif", ".png.bak"])
def test_names_do_not_decide_what_is_a_picture(suffix, tmp_path, capsys):
    folder = draw(tmp_path / "d", TEN)
    content = encoded(Image.new("L", (12, 12), 70), "AVIF" if suffix == ".avif" else "JPEG")
    (folder / "c3" / f"new{suffix}").write_bytes(content)
    assert load_dataset("folder", str(folder)).counts.tolist() == [4, 4, 4, 5] + [4] * 6
    assert capsys.readouterr().err == ""


JUNK = {
    "checkpoints": ".ipynb_checkpoints/0-checkpoint.png",
    "git": ".git/a.png",
    "macosx": "__MACOSX/c0/._0.png",
    "thumbs": "c0/Thumbs.db",
    "desktop": "c0/desktop.ini",
    "emacs lock": "c0/.#0.png",
    "vim": "c0/.0.png.swp",
    "backup": "c0/0.png~",
    "mac file": "c0/._0.png",
    "synology": "@eaDir/c0/0.png",
    "trash": ".Trash-0/0.png",
    "DS_Store": ".DS_Store",
    "office lock": "c0/~$0.png",
    "recycle": "$RECYCLE.BIN/0.png",
}


@pytest.mark.parametrize("case", JUNK)
def test_hidden_folders_and_files_are_no_data(case, tmp_path, capsys):
    folder = draw(tmp_path / "d", TEN)
    clean = load_dataset("folder", str(folder))
    path = folder / JUNK[case]
    path.parent.mkdir(parents=True, exist_ok=True)
    if case == "emacs lock":
        path.symlink_to("me@host.123")
    else:
        shutil.copy(folder / "c1" / "0.png", path)
    data = load_dataset("folder", str(folder))
    assert data.names == TEN and data.digest == clean.digest and data.cache_file == clean.cache_file
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------- caches


def links_of_classes(a, b, here):
    for name, source in (("la", a), ("lb", b)):
        (here / name).mkdir()
        for c in source.iterdir():
            (here / name / c.name).symlink_to(c)
    return here / "la", here / "lb"


def links_of_files(a, b, here):
    for name, source in (("la", a), ("lb", b)):
        for file in source.glob("*/*.png"):
            (here / name / file.parent.name).mkdir(parents=True, exist_ok=True)
            (here / name / file.parent.name / file.name).symlink_to(file)
    return here / "la", here / "lb"


def link_to_the_whole(a, b, here):
    (here / "l").symlink_to(a)
    yield here / "l"
    (here / "l").unlink()
    (here / "l").symlink_to(b)
    yield here / "l"


def same_size_and_time(a, b, here):
    def copy(source):
        for c in source.iterdir():
            (here / "x" / c.name).mkdir(parents=True)
            for file in c.iterdir():
                Image.open(file).save(here / "x" / c.name / f"{file.stem}.bmp")  # all files of one size
                os.utime(here / "x" / c.name / f"{file.stem}.bmp", (1, 1))

    copy(a)
    yield here / "x"
    shutil.rmtree(here / "x")
    copy(b)
    yield here / "x"


def swapped_files(a, b, here):
    shutil.copytree(a, here / "x")
    yield here / "x"
    one, two = here / "x" / "c0" / "0.png", here / "x" / "c1" / "0.png"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    yield here / "x"


@pytest.mark.parametrize(
    "change", [links_of_classes, links_of_files, link_to_the_whole, same_size_and_time, swapped_files]
)
def test_a_cache_belongs_to_what_it_holds(change, tmp_path):
    a, b = draw(tmp_path / "A", TEN), draw(tmp_path / "B", TEN, first=9)
    seen = []
    for folder in change(a, b, tmp_path):
        data = load_dataset("folder", str(folder), image_size=12)
        fresh = np.stack([read_image(p, "") for c in TEN for p in sorted((folder / c).iterdir())])
        assert np.array_equal(data.images, 255 - fresh if data.inverted else fresh)
        seen.append(data)
    assert seen[0].digest != seen[1].digest and seen[0].cache_file != seen[1].cache_file


def test_one_content_has_one_digest_wherever_it_lies(tmp_path):
    a = draw(tmp_path / "A", TEN)
    shutil.copytree(a, tmp_path / "copy")
    (tmp_path / "l").symlink_to(a)
    digests = {load_dataset("folder", str(f)).digest for f in (a, tmp_path / "copy", tmp_path / "l")}
    assert len(digests) == 1


def test_circular_links_end(tmp_path):
    folder = draw(tmp_path / "A", TEN)
    (folder / "c0" / "again").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    assert load_dataset("folder", str(folder)).names[:10] == TEN


# --------------------------------------------------------------------------------------- folders


def parts_of(data):
    return {part: {data.names[i] for i in classes} for part, classes in data.splits.items()}


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAIN", "validation", "TEST"),
        ("training", "dev", "testing"),
    ],
)
def test_divided_folders_stay_divided(train, val, test, tmp_path, capsys):
    for part, n in ((train, 6), (val, 3), (test, 4)):
        draw(tmp_path / "d" / part, [f"{part}{i}" for i in range(n)], first=n)
    found = parts_of(load_dataset("folder", str(tmp_path / "d")))
    assert {p: len(c) for p, c in found.items()} == {"train": 6, "val": 3, "test": 4}
    assert found["test"] == {f"test/{test}{i}" for i in range(4)} and capsys.readouterr().err == ""


@pytest.mark.parametrize("val", ["missing", "empty", "of empty classes", "hidden only"])
def test_without_validation_classes_the_test_classes_stay_untouched(val, tmp_path, capsys):
    draw(tmp_path / "d" / "train", [f"a{i}" for i in range(20)])
    draw(tmp_path / "d" / "test", [f"b{i}" for i in range(6)], first=1)
    if val != "missing":
        (tmp_path / "d" / "val").mkdir()
    if val == "of empty classes":
        (tmp_path / "d" / "val" / "x").mkdir()
    if val == "hidden only":
        draw(tmp_path / "d" / "val", [".x"])
    found = parts_of(load_dataset("folder", str(tmp_path / "d")))
    assert found["test"] == {f"test/b{i}" for i in range(6)}
    assert (len(found["train"]) == 16 and len(found["val"]) == 5) or (len(found["train"]), len(found["val"])) == (15, 5)
    assert found["train"] | found["val"] == {f"train/a{i}" for i in range(20)}
    assert "no val/ with classes" in capsys.readouterr().err


def test_what_a_divided_folder_lacks_is_said(tmp_path):
    load = lambda: load_dataset("folder", str(tmp_path / "d"))
    draw(tmp_path / "d" / "train", TEN)
    refused(load, "has train but test/ is missing")
    draw(tmp_path / "d" / "val", ["v"])
    refused(load, "has train and val but test/ is missing")
    (tmp_path / "d" / "test").mkdir()
    refused(load, "test/ holds no class folders")
    draw(tmp_path / "e" / "test", TEN)
    (tmp_path / "e" / "train").mkdir()
    refused(lambda: load_dataset("folder", str(tmp_path / "e")), "train/ holds no class folders")


def test_the_same_class_names_in_train_and_test_are_pointed_out(tmp_path, capsys):
    draw(tmp_path / "d" / "train", TEN)
    draw(tmp_path / "d" / "test", ["c1", "z"], first=1)
    load_dataset("folder", str(tmp_path / "d"))
    assert "1 class names are in train/ and in test/ (c1)" in capsys.readouterr().err


def test_links_as_parts(tmp_path):
    for name in ("A", "B", "C"):
        draw(tmp_path / name, [f"{name}{i}" for i in range(4)], first=ord(name))
    for where, order in (("x", "ABC"), ("y", "BCA")):
        (tmp_path / where).mkdir()
        for part, source in zip(("train", "val", "test"), order, strict=True):
            (tmp_path / where / part).symlink_to(tmp_path / source)
        found = parts_of(load_dataset("folder", str(tmp_path / where)))
        assert found["test"] == {f"test/{order[2]}{i}" for i in range(4)}


@pytest.mark.parametrize("wrapped", [False, True])
def test_alphabets_of_characters(wrapped, tmp_path):
    root = tmp_path / "d" / "inside" if wrapped else tmp_path / "d"
    for a in range(6):
        draw(root / f"alphabet{a}", [f"character{i}" for i in range(5)], first=a)
        (root / f"alphabet{a}" / "readme.txt").write_text("about")
    data = load_dataset("folder", str(tmp_path / "d"))
    assert len(data.names) == 30 and data.names[0] == "alphabet0/character0"
    sampler = EpisodeSampler(data, "train", 3, 1, 1, 50, within_alphabet=True)
    classes = sampler.draw()[0][:, :, 0] // 4
    alphabets = np.array([data.names[c].split("/")[0] for c in data.splits["train"]])
    assert all(len(set(alphabets[row])) == 1 for row in classes.numpy())
    lake = parts_of(load_dataset("folder", str(tmp_path / "d"), split="lake"))
    groups = {part: {c.split("/")[0] for c in names} for part, names in lake.items()}
    assert [len(g) for g in groups.values()] == [4, 1, 1] and len(set.union(*groups.values())) == 6


def test_divided_alphabets(tmp_path):
    for part, alphabets in (("Train", "ABC"), ("val", "D"), ("Test", "EF")):
        for a in alphabets:
            draw(tmp_path / "d" / part / a, ["x", "y", "z"], first=ord(a))
    found = parts_of(load_dataset("folder", str(tmp_path / "d")))
    assert {p: len(c) for p, c in found.items()} == {"train": 9, "val": 3, "test": 6} and "test/E/x" in found["test"]


def test_pictures_elsewhere_are_counted(tmp_path, capsys):
    folder = draw(tmp_path / "d", TEN)
    shutil.copy(folder / "c0" / "0.png", folder / "loose.png")
    shutil.copytree(folder / "c0", folder / "c1" / "more")
    assert load_dataset("folder", str(folder)).names == TEN
    err = capsys.readouterr().err
    assert "1 pictures in no class folder" in err and "4 files in c1/more" in err


def mini(folder, header="filename,label\n", sep=",", images="images", skip=()):
    """Generated miniImageNet: images/ and three tables."""
    (folder / images).mkdir(parents=True)
    for part, n in (("train", 6), ("val", 3), ("test", 4)):
        if part in skip:
            continue
        rows = []
        for c in range(n):
            for i in range(3):
                name = f"n{part}{c:02d}_{i}.jpg"
                Image.fromarray(np.random.default_rng([n, c, i]).integers(0, 256, (84, 84, 3), np.uint8)).save(
                    folder / images / name
                )
                rows.append(f"{name}{sep}n{part}{c:02d}\n")
        (folder / f"{part}.csv").write_text(header.replace(",", sep) + "".join(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "form", [{}, {"header": ""}, {"sep": ";"}, {"header": "\ufefffilename,label\n"}, {"images": "Images"}]
)
def test_miniImageNet_with_tables(form, tmp_path, capsys):
    data = load_dataset("folder", str(mini(tmp_path / "mini", **form)), image_size=84)
    assert {p: len(c) for p, c in data.splits.items()} == {"train": 6, "val": 3, "test": 4}
    assert data.images.shape == (39, 3, 84, 84) and data.counts.tolist() == [3] * 13
    assert {data.names[i] for i in data.splits["test"]} == {f"test/ntest{i:02d}" for i in range(4)}
    assert capsys.readouterr().err == ""


def test_miniImageNet_with_faults(tmp_path, capsys):
    folder = mini(tmp_path / "mini")
    (folder / "images" / "ntrain00_0.jpg").unlink()
    data = load_dataset("folder", str(folder))
    assert data.counts[data.names.index("train/ntrain00")] == 2
    assert "1 file could not be read as pictures: train/ntrain00/ntrain00_0.jpg" in capsys.readouterr().err
    (folder / "test.csv").write_text("only one column\n")
    refused(lambda: load_dataset("folder", str(folder)), "test.csv", "two columns")
    found = load_dataset("folder", str(mini(tmp_path / "two", skip=("val",))))
    assert len(found.splits["test"]) == 4 and len(found.splits["val"]) == 3


# -------------------------------------------------------------------------------------- Omniglot


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Small stand-ins for the two official sets, extracted: official/images_background and images_evaluation."""
    import hashlib

    drawings = glyphs.draw_glyphs(7, image_size=35).reshape(7, 20, 35, 35) > 127
    archives = {}
    for part, characters in (("images_background", range(4)), ("images_evaluation", range(4, 7))):
        sha = hashlib.sha256()
        for c in characters:
            folder = tmp_path / "official" / part / "Latin" / f"character{c:02d}"
            folder.mkdir(parents=True)
            for d in range(20):
                Image.fromarray(~drawings[c, d]).save(folder / f"{c:04d}_{d:02d}.png")
                sha.update(np.packbits(~drawings[c, d]).tobytes())
        archives[part] = (len(characters), sha.hexdigest())
    monkeypatch.setattr(omniglot, "ARCHIVES", archives)
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "official"


def wrap(folder, part):
    (folder / part).rename(folder / "x")
    (folder / part).mkdir()
    (folder / "x").rename(folder / part / part)
    return folder


def below(folder, *names):
    place = folder.parent / "new" / Path(*names)
    place.parent.mkdir(parents=True)
    folder.rename(place)
    return folder.parent / "new"


@pytest.mark.parametrize(
    "arrange",
    [
        lambda f: f,
        lambda f: wrap(wrap(f, "images_background"), "images_evaluation"),
        lambda f: wrap(f, "images_background"),
        lambda f: f / "images_background",
        lambda f: f / "images_evaluation",
        lambda f: below(f, "python"),
        lambda f: below(f, "omniglot-py"),
        lambda f: below(f, "omniglot", "python"),
    ],
    ids=["plain", "doubled", "one doubled", "one part", "the other", "git", "torchvision", "clone"],
)
def test_the_official_folders_are_found(arrange, official):
    data = load_dataset("omniglot", str(arrange(official)))
    assert data.images.shape == (140, 1, 28, 28) and len(data.names) == 7


def test_the_missing_part_is_named(official):
    shutil.move(official / "images_evaluation", official.parent / "elsewhere")
    refused(
        lambda: load_dataset("omniglot", str(official)), "--data_folder", "images_background but no images_evaluation"
    )
    refused(lambda: load_dataset("omniglot", str(official / "images_background")), "no images_evaluation")
    os.environ["OMNIGLOT_DIR"] = str(official)
    refused(lambda: load_dataset("omniglot"), "$OMNIGLOT_DIR", "no images_evaluation")
    del os.environ["OMNIGLOT_DIR"]


def test_nothing_good_is_to_be_deleted(official):
    png = official / "images_background" / "Latin" / "character03" / "0003_19.png"
    whole = png.read_bytes()
    png.unlink()
    refused(lambda: load_dataset("omniglot", str(official)), "19 drawings", "another --data_folder")
    Image.new("1", (35, 35), 1).save(png)
    refused(lambda: load_dataset("omniglot", str(official)), "wrong pixel digest", "another --data_folder")
    png.write_bytes(b"text")
    refused(lambda: load_dataset("omniglot", str(official)), "cannot read the image")
    png.write_bytes(whole)
    (official / "images_background" / "Latin" / "character03" / "._0003_19.png").write_bytes(b"mac")
    assert len(load_dataset("omniglot", str(official)).names) == 7
    for script in REPO.glob("*.py"):
        assert "delete it" not in script.read_text(), script


# ------------------------------------------------------------------------- trained and test classes


@pytest.fixture(scope="module")
def runs(work, tmp_path_factory):
    """{script: the folder of a finished tiny run} on the glyphs, split course."""
    folder, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(work)
    try:
        for script, flags in TINY.items():
            MODULES[script].main(
                [
                    *GLYPHS,
                    *flags,
                    "--train_steps",
                    "4",
                    "--eval_freq",
                    "2",
                    "--log_dir",
                    str(folder),
                    "--run_name",
                    script,
                ]
            )
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("script", TINY)
def test_a_test_on_trained_classes_is_refused(script, runs):
    test = ["--test", "--checkpoint", str(runs / script), "--num_test_tasks", "4"]
    refused(lambda: MODULES[script].main([*test, "--split", "lake"]), "--checkpoint", "of 659 test classes", "--split")
    if script == "protonet":
        assert MODULES[script].main(test)["num_test_tasks"] == 4


@pytest.mark.parametrize("script", ["protonet", "maml", "hw1", "transfer"])
def test_weights_that_saw_the_test_classes_are_refused(script, runs, tmp_path):
    start = [
        *GLYPHS,
        *TINY[script],
        "--train_steps",
        "4",
        "--log_dir",
        str(tmp_path),
        "--init_from",
        str(runs / script),
    ]
    refused(lambda: MODULES[script].main([*start, "--split", "lake"]), "--init_from", "of 659 test classes")


def test_a_chain_of_weights_is_followed(runs, tmp_path):
    flags = [*GLYPHS, *TINY["protonet"], "--train_steps", "2", "--eval_freq", "2", "--log_dir", str(tmp_path)]
    protonet.main([*flags, "--run_name", "second", "--init_from", str(runs / "protonet")])
    saved = json.loads((tmp_path / "second" / "flags.json").read_text())
    assert saved["flags"]["init_from"] == str(runs / "protonet")
    saved["flags"]["split"] = "lake"  # as if the second had trained on Lake's background set alone
    (tmp_path / "second" / "flags.json").write_text(json.dumps(saved))
    (tmp_path / "second" / "data.json").unlink()  # which knows better
    test = ["--test", "--checkpoint", str(tmp_path / "second")]
    refused(lambda: protonet.main([*test, "--split", "lake"]), str(runs / "protonet"))


def test_trained_classes_of_folders_are_known_by_content(tmp_path, work):
    a = draw(tmp_path / "A", [f"c{i:02d}" for i in range(20)])
    flags = [
        "--smoke",
        "--dataset",
        "folder",
        "--device",
        "cpu",
        "--width",
        "4",
        "--num_query",
        "1",
        "--num_classes",
        "2",
        "--train_classes",
        "3",
        "--train_steps",
        "2",
        "--eval_freq",
        "2",
        "--num_test_tasks",
        "2",
        "--num_val_tasks",
        "2",
        "--views",
        "1",
        "--log_dir",
        str(tmp_path),
        "--run_name",
        "run",
    ]
    protonet.main([*flags, "--data_folder", str(a)])
    trained = [a / load_dataset("folder", str(a)).names[i] for i in load_dataset("folder", str(a)).splits["train"]]
    draw(tmp_path / "B" / "train", ["x", "y", "z"], first=3)
    for i, c in enumerate(trained[:2]):
        shutil.copytree(c, tmp_path / "B" / "test" / f"renamed{i}")
    draw(tmp_path / "B" / "test", ["u"], first=4)
    test = ["--test", "--checkpoint", str(tmp_path / "run"), "--num_test_tasks", "2"]
    refused(lambda: protonet.main([*test, "--data_folder", str(tmp_path / "B")]), "2 of 3 test classes")
    assert protonet.main([*test, "--data_folder", str(a)])["num_test_tasks"] == 2


@pytest.mark.parametrize("script", TINY)
def test_a_checkpoint_without_a_test_is_refused(script, runs):
    words = ["--checkpoint needs --test", "--resume"] + ["--init_from"] * (script != "meta_lstm")
    refused(lambda: MODULES[script].main(["--checkpoint", str(runs / script)]), *words)


@pytest.mark.parametrize("script", ["protonet", "maml", "hw1"])
def test_training_starts_from_the_weights_of_a_run(script, runs):
    args = MODULES[script].parse_args([*GLYPHS, *TINY[script], "--train_steps", "4", "--init_from", str(runs / script)])
    model = {
        "protonet": lambda: protonet.make_encoder(args, 1),
        "hw1": lambda: hw1.MANN(2, 2, 8, hw1.Recurrent(head="linear")),
        "maml": lambda: maml.MAML(protonet.Conv4(1, 4, 28, strided=True), 5, 1, 0.4, "linear", False, 1.0, False),
    }[script]()
    experiment.init_from(args, model)
    best = torch.load(runs / script / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    args.init_from = str(runs / "nowhere")
    refused(lambda: experiment.init_from(args, model), "--init_from", "no best.pt")


def test_weights_of_another_method_give_the_encoder(runs):
    args = protonet.parse_args(["--init_from", str(runs / "protonet"), "--width", "4"])
    classifier = transfer.Classifier(protonet.make_encoder(args, 1), 9)
    experiment.init_from(args, classifier)
    best = torch.load(runs / "protonet" / "best.pt", weights_only=True)["model"]
    assert torch.equal(classifier.encoder.weight3, best["weight3"])
    args.init_from = str(runs / "transfer")
    encoder = protonet.make_encoder(args, 1)
    experiment.init_from(args, encoder)
    best = torch.load(runs / "transfer" / "best.pt", weights_only=True)["model"]
    assert torch.equal(encoder.weight2, best["pretrained.encoder.weight2"])
    args.width = 8
    refused(lambda: experiment.init_from(args, protonet.make_encoder(args, 1)), "another model")


# ---------------------------------------------------------------------------------------- workers


def loader_tasks(passes, **options):
    torch.manual_seed(1)
    generator = DataGenerator(3, 2, "val", config={"dataset": "glyphs"})
    loader = torch.utils.data.DataLoader(generator, batch_size=4, **options)
    return [torch.stack([x for (x, _), _ in zip(loader, range(3), strict=False)]) for _ in range(passes)]


@pytest.mark.parametrize(
    ("context", "persistent"),
    [("fork", False), ("fork", True), pytest.param("spawn", True, marks=pytest.mark.thorough), ("forkserver", False)],
)
def test_workers_of_every_kind(context, persistent):
    options = {"num_workers": 2, "multiprocessing_context": context, "persistent_workers": persistent}
    seen = loader_tasks(3, **options)
    tasks = torch.cat([x.flatten(0, 1) for x in seen]).flatten(1)
    assert len(tasks.unique(dim=0)) == len(tasks) == 36
    assert all(torch.equal(a, b) for a, b in zip(seen[:1], loader_tasks(1, **options), strict=True))
    plain = loader_tasks(1, num_workers=2)[0]
    assert torch.equal(seen[0], plain)  # the first pass is the same, however workers start


def test_samplers_can_be_copied():
    import copy
    import pickle

    sampler = EpisodeSampler(known_dataset(), "train", 5, 1, 1, 4, seed=1)
    sampler.sample()
    others = copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))
    expected = sampler.sample()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, other.sample(), strict=True))


# ----------------------------------------------------------------------------------- other systems


def test_every_script_imports_where_unix_modules_are_missing():
    """As on Windows: no fcntl, resource, pwd, grp or termios."""
    scripts = sorted(p.stem for p in REPO.glob("*.py"))
    code = "import sys\nfor m in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[m] = None\n"
    code += "\n".join(f"import {script}" for script in scripts)
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-400:]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_a_console_lacks(encoding, runs, tmp_path, run_script):
    for name in ("日本", "Ω≈ç"):
        draw(tmp_path / "support", [name], each=1, first=len(name))
    (tmp_path / "query").mkdir()
    shutil.copy(tmp_path / "support" / "日本" / "0.png", tmp_path / "query" / "z日.png")
    shutil.copytree(runs / "protonet", tmp_path / "run")
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    result = run_script("predict.py", tmp_path, "--checkpoint", tmp_path / "run", env=env, cold=True)
    assert result.returncode == 0, result.stderr
    assert "日本" in (tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8")
    assert "\\u65e5" in result.stdout


@pytest.mark.parametrize("file", ["runs", "data"])
def test_a_file_where_a_folder_should_be(file, tmp_path, run_script):
    (tmp_path / file).touch()
    draw(tmp_path / "A", TEN)
    result = run_script("load_data.py", "--dataset", "folder", "--data_folder", "A", cwd=tmp_path)
    if file == "runs":
        one_line_error(result, "runs/", "another working directory")
    else:
        assert result.returncode == 0 and "cannot write the cache" in result.stderr, result.stderr


def test_mps_is_accepted_where_torch_has_it(monkeypatch):
    args = protonet.parse_args(["--device", "mps"])
    refused(lambda: experiment.setup(args), "--device mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert experiment.setup(args).type == "mps"


# ------------------------------------------------------------------------------------------ words


def test_messages_name_the_flag_that_can_be_changed(tmp_path):
    a = draw(tmp_path / "A", TEN)
    folder = ["--dataset", "folder", "--data_folder", str(a), "--smoke", "--log_dir", str(tmp_path), "--width", "4"]
    two = [*folder, "--num_classes", "2", "--num_query", "1", "--no-rotations"]
    refused(lambda: protonet.main([*two]), "--train_classes 10 is more than the 6 classes")
    refused(
        lambda: protonet.main([*two, "--train_classes", "3", "--train_query", "5"]), "--train_shot 1", "--train_query 5"
    )
    refused(lambda: protonet.main([*two, "--train_classes", "3", "--num_query", "9"]), "--num_shot 1", "--num_query 9")
    refused(lambda: protonet.main([*folder, "--num_classes", "3"]), "--num_classes 3 is more than the 2 classes")
    refused(lambda: maml.main([*two, "--train_classes", "9"]), "--train_classes 9")
    refused(lambda: maml.main([*two, "--train_classes", "3", "--train_query", "5"]), "--num_shot 1", "--train_query 5")
    flags = [f for f in two if f not in ("--width", "4")]
    refused(lambda: meta_lstm.main([*flags, "--train_query", "5"]), "--train_query 5")
    hw = ["--dataset", "folder", "--data_folder", str(a), "--smoke", "--log_dir", str(tmp_path), "--num_classes", "2"]
    refused(lambda: hw1.main([*hw, "--no-rotations", "--shared_classes", "50"]), "--shared_classes 50")
    refused(lambda: hw1.main([*hw, "--num_shot", "4"]), "--num_shot 4")


@pytest.mark.parametrize("flags", [["--num_val_tasks", "2"], ["--num_test_tasks", "2", "--num_val_tasks", "3"]])
def test_few_tasks_of_evaluation(flags, work, tmp_path):
    common = [*GLYPHS, *TINY["maml"], "--train_steps", "2", "--eval_freq", "2", "--log_dir", str(tmp_path)]
    assert 0 <= maml.main([*common, *flags])["test_accuracy"] <= 1


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.thorough
def test_the_resume_line_can_be_typed(work, tmp_path):
    folder = tmp_path / "my runs (1)"
    command = [
        REPO / "hw1.py",
        "--dataset",
        "glyphs",
        "--num_classes",
        "2",
        "--hidden_dim",
        "8",
        "--meta_batch_size",
        "2",
        "--train_steps",
        "100000",
        "--log_dir",
        str(folder),
        "--run_name",
        "a b",
        "--num_val_tasks",
        "2",
        "--num_test_tasks",
        "2",
        "--eval_freq",
        "2",
    ]
    run = warm.Process(*command, cwd=work)
    saved = folder / "a b" / "checkpoint.pt"
    while not saved.exists() and run.poll() is None:
        time.sleep(0.1)
    other = warm.run(REPO / "hw1.py", "--resume", folder / "a b", cwd=work)
    one_line_error(other, "--resume", "another process")  # a lock against two trainings of one run
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=3600)[1]
    line = err.strip().splitlines()[-1]
    typed = line.split("continue with: ")[1]
    assert str(REPO / "hw1.py") in typed and "'" in typed
    again = subprocess.Popen(
        ["bash", "-c", f"exec {typed.replace('python', sys.executable, 1)}"],
        cwd=work,
        stderr=subprocess.PIPE,
        text=True,
    )
    before = saved.stat().st_mtime_ns
    while saved.stat().st_mtime_ns == before and again.poll() is None:
        time.sleep(0.1)
    again.send_signal(signal.SIGINT)
    assert "interrupted at step" in again.communicate(timeout=3600)[1]


def test_a_run_with_a_constant_rate_can_be_made_longer(work, tmp_path):
    constant = [*GLYPHS, *TINY["hw1"], "--schedule", "constant", "--eval_freq", "2", "--log_dir", str(tmp_path)]
    hw1.main([*constant, "--train_steps", "4", "--run_name", "short"])
    longer = hw1.main(["--resume", str(tmp_path / "short"), "--train_steps", "8"])
    hw1.main([*constant, "--train_steps", "8", "--run_name", "long"])
    states = [
        torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["objects"]["model"] for n in ("short", "long")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert longer["steps"] == 8
    assert json.loads((tmp_path / "short" / "flags.json").read_text())["flags"]["train_steps"] == 8
    assert hw1.main(["--resume", str(tmp_path / "short")])["steps"] == 8  # the longer run is the run now


@pytest.mark.parametrize(
    "script, reason",
    [("hw1", "linear"), ("protonet", "falls"), ("maml", "cosine"), ("transfer", "falls"), ("meta_lstm", "cosine")],
)
def test_why_a_run_cannot_be_longer_is_said(script, reason, runs):
    resume = ["--resume", str(runs / script), "--train_steps", "9"]
    refused(lambda: MODULES[script].main(resume), "--train_steps 9", "ends after 4", reason)


# ------------------------------------------------------------------------------------- prediction


def disc(radius, size=40, paper=230):
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    return np.where(x**2 + y**2 < radius**2, 25, paper).astype(np.uint8)


@pytest.mark.parametrize("paper, ink", [(230, 25), (25, 230)])
def test_folder_runs_prepare_pictures_as_they_trained(paper, ink, tmp_path, work):
    """Discs that differ in nothing but size: cut out around the ink they would be all alike."""
    rng = np.random.default_rng(0)
    picture = lambda r: np.where(disc(r) < 100, ink, paper) + rng.integers(-5, 6, (40, 40))
    for c in range(12):
        (tmp_path / "d" / f"r{c:02d}").mkdir(parents=True)
        for i in range(6):
            Image.fromarray(picture(2 + 1.4 * c).astype(np.uint8)).save(tmp_path / "d" / f"r{c:02d}" / f"{i}.png")
    flags = [
        "--smoke",
        "--dataset",
        "folder",
        "--data_folder",
        str(tmp_path / "d"),
        "--device",
        "cpu",
        "--width",
        "8",
        "--train_classes",
        "5",
        "--num_classes",
        "2",
        "--num_query",
        "1",
        "--train_steps",
        "2",
        "--eval_freq",
        "2",
        "--num_test_tasks",
        "2",
        "--num_val_tasks",
        "2",
        "--log_dir",
        str(tmp_path),
        "--run_name",
        "run",
    ]
    protonet.main(flags)
    saved = json.loads((tmp_path / "run" / "flags.json").read_text())
    assert saved["flags"]["inverted"] == (paper > ink)
    data = load_dataset("folder", str(tmp_path / "d"))
    files = [p for name in data.names for p in sorted((tmp_path / "d" / name).iterdir())]
    prepared = [predict.prepare_as_trained(read_image(p, ""), 1, paper > ink, 28) for p in files]
    assert torch.equal(torch.stack(prepared), torch.from_numpy(data.images).float() / 255)
    for r in (3, 16):
        (tmp_path / "support" / f"r{r}").mkdir(parents=True)
        (tmp_path / "query").mkdir(exist_ok=True)
        for n in range(3):
            where = tmp_path / "query" / f"r{r} {n}.png" if n else tmp_path / "support" / f"r{r}" / "0.png"
            Image.fromarray(picture(r).astype(np.uint8)).save(where)
    rows = predict.main([str(tmp_path), "--checkpoint", str(tmp_path / "run")])
    assert [row["predicted_class"] for row in rows] == [row["file"].split()[0] for row in rows]
    refused(lambda: predict.main([str(tmp_path), "--checkpoint", str(tmp_path / "run"), "--ink", "dark"]), "--ink dark")


def shaded(height, width, darker, kind):
    """A factor [H, W]: 1 in the middle or at one side, 1 - darker in the corners, at the other or in one corner."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    share = {
        "corners": (x**2 + y**2) / 2,
        "side": (x + y + 2) / 4,
        "corner": np.exp(-((x - 1) ** 2 + (y - 1) ** 2) / 0.5),
    }
    return 1 - darker * share[kind]


@pytest.mark.parametrize("kind", ["corners", "side", "corner"])
@pytest.mark.parametrize("ink, paper", [(30, 235), (60, 180), (240, 40), (200, 70)])
def test_paper_under_uneven_light(ink, paper, kind):
    """The prepared drawing is the same to a few per cent of ink whatever the light; ink is found by itself."""
    for drawing in glyphs.draw_glyphs(4, image_size=96)[::20, 0] / 255:
        canvas = np.pad(drawing, 20)
        clean = canvas * ink + (1 - canvas) * paper
        prepare = lambda p: prepare_drawing(torch.from_numpy(p.round().astype(np.uint8))[None], "auto", 28)
        even = prepare(clean)
        assert 0.03 < even.mean() < 0.4
        for darker in (0.05, 0.1, 0.2, 0.3):
            light = prepare(clean * shaded(*clean.shape, darker, kind))
            assert (light - even).abs().mean() < 0.03, (darker, (light - even).abs().mean())


def test_queries_that_cannot_be_read_are_named(runs, tmp_path, capsys):
    draw(tmp_path / "support", ["a", "b"], each=2)
    (tmp_path / "query").mkdir()
    shutil.copy(tmp_path / "support" / "a" / "0.png", tmp_path / "query" / "x.jfif")
    (tmp_path / "query" / "y.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    dangling(tmp_path / "query" / "z.png")
    (tmp_path / "query" / "sub").mkdir()
    rows = predict.main([str(tmp_path), "--checkpoint", str(runs / "protonet")])
    assert [row["file"] for row in rows] == ["x.jfif"]
    assert "2 files could not be read as pictures: query/y.heic, query/z.png" in capsys.readouterr().err
    draw(tmp_path / "support", [".hidden", "__MACOSX"], each=1)
    assert len(predict.main([str(tmp_path), "--checkpoint", str(runs / "protonet")])) == 1
