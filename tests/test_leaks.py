"""What stands in two parts of a folder, what has changed since a run was trained, and how pictures are read."""

from fewshot.images.pictures import read_image
from fewshot.images.preparation import Preparation, decide, prepare
from fewshot.tasks import leaks
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.splits import load_dataset

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import has_omniglot
from PIL import Image
from test_field import draw, mini, refused

import predict
import protonet
from load_data import DataGenerator

load = functools.partial(load_dataset, "folder")


def smoke(data, log_dir, *flags):
    """A tiny run of protonet.py on a folder."""
    tiny = "--smoke --dataset folder --device cpu --width 4 --num_query 1 --num_classes 2 --train_classes 3 --views 1"
    tiny += " --train_steps 2 --eval_freq 2 --num_test_tasks 2 --num_val_tasks 2 --run_name run"
    return protonet.main([*tiny.split(), "--data_folder", str(data), "--log_dir", str(log_dir), *flags])


def blobs(folder, names, each=4, paper=255, size=28, first=0, suffix="png", **options):
    """Class folders of smooth drawings, which JPEG and resizing hardly change; the first class names them."""
    y, x = np.mgrid[:size, :size] / size
    for n, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            a, b, c, d = np.random.default_rng([first, n, i]).uniform(2, 9, 4)
            drawn = 127 + 127 * np.sin(a * x + b * y) * np.sin(c * y - d * x)
            shown = drawn if paper < 128 else 255 - drawn
            Image.fromarray(shown.astype(np.uint8)).save(folder / name / f"{i}.{suffix}", **options)
    return folder


# ---------------------------------------------------------------- the same thing in two parts


def copied_class(d):
    draw(d / "train", [f"a{i}" for i in range(4)])
    draw(d / "test", ["t0", "t1"], first=1)
    shutil.copytree(d / "train" / "a2", d / "test" / "renamed")
    return "4 test pictures of 1 class are", "test/renamed (test) = train/a2 (train)"


def one_picture(d):
    draw(d / "train", [f"a{i}" for i in range(4)])
    draw(d / "test", ["t0", "t1"], first=1)
    shutil.copy(d / "train" / "a1" / "3.png", d / "test" / "t1" / "another.png")
    return "1 test picture of 1 class is", "test/t1 (test) = train/a1 (train)"


def of_validation(d):
    for n, part in enumerate(("train", "val", "test")):
        draw(d / part, [f"{part}{i}" for i in range(3)], first=n)
    shutil.copy(d / "val" / "val2" / "0.png", d / "test" / "test0" / "another.png")
    return "1 test picture of 1 class is", "test/test0 (test) = val/val2 (val)"


def negative_in_colour(d):
    """The same drawing, white on black, with three channels."""
    draw(d / "train", [f"a{i}" for i in range(4)])
    draw(d / "test", ["t0", "t1"], first=1)
    turned = 255 - np.asarray(Image.open(d / "train" / "a0" / "0.png"))
    Image.fromarray(turned).convert("RGB").save(d / "test" / "t0" / "x.bmp")
    return "1 test picture of 1 class is", "test/t0 (test) = train/a0 (val)"  # no val/: two of four are for validation


def twice_in_tables(d):
    mini(d)
    row = (d / "train.csv").read_text().splitlines()[1]
    (d / "test.csv").write_text((d / "test.csv").read_text() + row.split(",")[0] + ",again\n")
    return "1 test picture of 1 class is", f"test/again (test) = train/{row.split(',')[1]} (train)"


@pytest.mark.parametrize("case", [copied_class, one_picture, of_validation, negative_in_colour, twice_in_tables])
def test_test_pictures_in_training_are_refused_and_can_be_meant(case, tmp_path, capsys):
    words = case(tmp_path / "d")
    refused(lambda: load(str(tmp_path / "d")), *words, "--allow_overlap")
    data = load(str(tmp_path / "d"), allow_overlap=True)
    assert all(word in capsys.readouterr().err for word in words[:1]) and len(data.splits["test"])


def test_flat_folders_copied_under_another_name(tmp_path, capsys):
    draw(tmp_path, [f"c{i}" for i in range(10)])
    for i in range(10):
        shutil.copytree(tmp_path / f"c{i}", tmp_path / f"c{i} - Copy")
    data = load(str(tmp_path), allow_overlap=True)
    parts = {data.names[c]: p for p, classes in data.splits.items() for c in classes}
    torn = [i for i in range(10) if {parts[f"c{i}"], parts[f"c{i} - Copy"]} in ({"test", "train"}, {"test", "val"})]
    said = capsys.readouterr().err
    assert f"{4 * len(torn)} test pictures of {len(torn)} class" in said and torn
    assert "classes and a copy of them, by the name, are in two parts" in said
    refused(
        lambda: DataGenerator(2, 2, "train", {"dataset": "folder", "data_folder": str(tmp_path)}), "--allow_overlap"
    )


def test_objects_divided_inside(tmp_path, capsys):
    draw(tmp_path, [f"{o}/{p}/good" for o in ("bottle", "cable", "nut") for p in ("train", "test")])
    load(str(tmp_path))
    said = capsys.readouterr().err
    assert "3 class names differ only by a folder train or test inside them" in said
    assert "bottle/test/good and bottle/train/good" in said


@pytest.mark.parametrize("name", ["train/é", "Train/e\u0301"])
def test_one_class_by_its_name_in_two_parts(name, tmp_path, capsys):
    draw(tmp_path / name.split("/")[0], ["a", "b", name.split("/")[1]])
    draw(tmp_path / "test", ["é", "z"], first=1)
    load(str(tmp_path))
    assert "1 class names are in train/ and in test/ (é): if they are the same" in capsys.readouterr().err


def test_a_picture_twice_in_one_table(tmp_path, capsys):
    mini(tmp_path / "d")
    table = tmp_path / "d" / "val.csv"
    row = table.read_text().splitlines()[1]
    table.write_text(table.read_text() + row + "\n")
    load(str(tmp_path / "d"))
    assert f"the same picture twice in one class, 1 times: val/{row.split(',')[1]} (val)" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["jpeg", "larger", "webp"])
def test_copies_of_another_form_are_noted(how, tmp_path, capsys):
    blobs(tmp_path / "train", [f"a{i}" for i in range(4)])
    blobs(tmp_path / "test", ["t0", "t1"], first=1)
    options = {"jpeg": {"suffix": "jpg", "quality": 60}, "larger": {"size": 70}, "webp": {"suffix": "webp"}}[how]
    blobs(tmp_path / "other", ["a0"], **options)
    shutil.copytree(tmp_path / "other" / "a0", tmp_path / "test" / "t9")
    shutil.rmtree(tmp_path / "other")
    load(str(tmp_path))
    said = capsys.readouterr().err
    assert "4 test pictures look like copies" in said and "test/t9 (test) ~ train/a0 (val)" in said


def test_what_is_different_is_not_reported(tmp_path, capsys):
    """Other drawings, a class turned by 90 degrees, and blank pages say nothing."""
    blobs(tmp_path / "train", [f"a{i}" for i in range(4)])
    blobs(tmp_path / "test", ["t0", "t1"], first=1)
    for part in ("train/a0", "test/t0"):
        Image.new("L", (28, 28), 255).save(tmp_path / part / "blank.png")
    (tmp_path / "test" / "turned").mkdir()
    for i in range(4):
        image = Image.open(tmp_path / "train" / "a0" / f"{i}.png").transpose(Image.ROTATE_90)
        image.save(tmp_path / "test" / "turned" / f"{i}.png")
    for part in ("a", "b"):
        blobs(tmp_path / "val", [part], first=ord(part))
    load(str(tmp_path))
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------- the folder changed since


@pytest.fixture
def run(tmp_path, work):
    """(its folder of 12 classes, the run)"""
    data = draw(tmp_path / "d", [f"c{i:02d}" for i in range(12)])
    smoke(data, tmp_path)
    return data, tmp_path / "run"


def test_a_run_keeps_its_classes_by_content_and_its_parts(run):
    data, folder = load(str(run[0])), run[1]
    known = leaks.read_record(folder, "resume")
    assert {p: list(c) for p, c in known.parts.items()} == {p: c.tolist() for p, c in data.splits.items()}
    assert known.digest == data.digest and list(known.classes) == data.names
    assert (folder / leaks.RECORD).stat().st_size < 2000
    assert "kept" not in json.loads((folder / "flags.json").read_text())["flags"]


def resumed(folder, *flags):
    return protonet.main(["--resume", str(folder), *flags])


def retested(folder, *flags):
    return protonet.main(["--test", "--checkpoint", str(folder), *flags])


@pytest.mark.parametrize("again", [resumed, retested])
def test_added_classes_are_named_refused_and_can_be_test_classes(again, run, capsys):
    data, folder = run
    before = again(folder)
    capsys.readouterr()
    draw(data, [f"a{i}" for i in range(3)], first=7)
    refused(lambda: again(folder), "3 classes added (a0, a1, a2)", "divided anew", "--allow_new_classes")
    capsys.readouterr()
    now = again(folder, "--allow_new_classes")
    assert "with 3 new test classes" in capsys.readouterr().err
    assert now["best_step"] == before["best_step"] and now.get("val_accuracy") == before.get("val_accuracy")


def test_new_test_classes_leave_the_others_where_they_were(run):
    data, folder = run
    own = load(str(data))
    names = {part: [own.names[c] for c in classes] for part, classes in own.splits.items()}
    draw(data, ["a0", "zz"], first=7)
    args = protonet.parse_args(["--test", "--checkpoint", str(folder), "--allow_new_classes"])
    now = load_for(args)
    found = {part: [now.names[c] for c in classes] for part, classes in now.splits.items()}
    assert found == names | {"test": [*names["test"], "a0", "zz"]}


def part_of(data, part):
    found = load(str(data))
    return [found.names[c] for c in found.splits[part]]


@pytest.mark.parametrize("again", [resumed, retested])
@pytest.mark.parametrize("change", ["removed", "replaced", "renamed"])
def test_changed_training_classes(change, again, run, capsys):
    """A run cannot be resumed; retested it is on its own test classes, as before."""
    data, folder = run
    before, name = retested(folder)["accuracies"], part_of(data, "train")[0]
    if change == "removed":
        shutil.rmtree(data / name)
        words = f"1 class removed ({name})"
    elif change == "replaced":
        shutil.rmtree(data / name)
        draw(data, [name], first=9)
        words = f"1 class replaced ({name}: 0 of its 4 pictures are still there)"
    else:
        (data / name).rename(data / "aa")
        words = f"1 class renamed ({name} -> aa)"
    capsys.readouterr()
    if again is resumed and change != "renamed":
        refused(lambda: resumed(folder), words, "bring the folder back")
    elif again is retested:
        assert retested(folder)["accuracies"] == before
        assert words in capsys.readouterr().err


def test_a_trained_class_moved_to_the_test_is_refused(tmp_path, work):
    for n, part in enumerate(("train", "val", "test")):
        draw(tmp_path / "d" / part, [f"{part}{i}" for i in range(4)], first=n)
    smoke(tmp_path / "d", tmp_path)
    (tmp_path / "d" / "train" / "train3").rename(tmp_path / "d" / "test" / "fresh")
    words = "1 class renamed (train/train3 -> test/fresh)", "1 of 5 test classes", "(test/fresh)"
    refused(lambda: retested(tmp_path / "run"), *words)
    shutil.copy(tmp_path / "d" / "test" / "fresh" / "0.png", tmp_path / "d" / "test" / "test0" / "x.png")
    shutil.rmtree(tmp_path / "d" / "test" / "fresh")
    refused(lambda: resumed(tmp_path / "run"), "1 of 4 test classes", "(test/test0)")


def test_weights_on_a_changed_folder(run, tmp_path, capsys):
    data, folder = run
    draw(data, [f"a{i}" for i in range(4)], first=7)
    start = ["--init_from", str(folder), "--log_dir", str(tmp_path / "other")]
    seen = set(part_of(data, "test")) & set(leaks.read_record(folder, "init_from").classes)
    assert seen  # the new division
    refused(lambda: smoke(data, tmp_path, *start), "--init_from", "was trained on, or chosen by")
    assert "4 classes added (a0, a1, a2, ...)" in capsys.readouterr().err
    assert smoke(data, tmp_path, *start, "--allow_new_classes")["best_step"] == 2


def test_a_run_without_a_record_goes_on_with_a_note(run, capsys):
    _, folder = run
    (folder / leaks.RECORD).unlink()
    assert retested(folder)["num_test_tasks"] == 2
    assert "older than the records of data" in capsys.readouterr().err
    (folder / leaks.RECORD).write_text('{"dataset": "folder"}')
    refused(lambda: retested(folder), "data.json is damaged")


# --------------------------------------------------------------------------- how pictures are read


def test_other_pictures_are_read_as_the_run_was(tmp_path, work, capsys):
    """Faint drawings on dark paper are not turned when the run's, on white paper, were; and the other way."""
    for paper, other in ((255, 0), (0, 255)):
        a = blobs(tmp_path / f"{paper}", [f"c{i}" for i in range(10)])
        b = blobs(tmp_path / f"{paper}b", [f"c{i}" for i in range(10)], first=5)
        for folder, bright in ((a, paper), (b, other)):
            for path in folder.rglob("*.png"):
                value = np.asarray(Image.open(path)) // 4
                Image.fromarray(255 - value if bright else value).save(path)
        log = tmp_path / f"log{paper}"
        smoke(a, log)
        known = leaks.read_record(log / "run", "checkpoint")
        assert (known.channels, known.inverted) == (1, paper == 255)
        args = protonet.parse_args(["--test", "--checkpoint", str(log / "run"), "--data_folder", str(b)])
        capsys.readouterr()
        data, raw = load_for(args), read_image(b / "c0" / "0.png", "")
        assert "are read as the run's were, as grey" in capsys.readouterr().err and data.inverted == (paper == 255)
        assert np.array_equal(data.images[0], 255 - raw if paper == 255 else raw)
        shown = predict.prepare_as_trained(raw, 1, known.inverted, 28)
        assert torch.equal(shown, torch.from_numpy(data.images[0]).float() / 255)


@pytest.mark.parametrize("pixels, pictures, channels", [(1, 1, 1), (400, 1, 1), (1, 96, 1), (400, 24, 3)])
def test_a_little_colour_changes_no_set(pixels, pictures, channels, tmp_path, capsys):
    blobs(tmp_path, [f"c{i:02d}" for i in range(24)])
    for path in sorted(tmp_path.rglob("*.png"))[:: 96 // pictures]:
        value = np.asarray(Image.open(path).convert("RGB")).copy()
        value.reshape(-1, 3)[:pixels] = (200, 30, 30)
        Image.fromarray(value).save(path)
    data = load(str(tmp_path))
    assert data.images.shape == (96, channels, 28, 28)
    assert ("training pictures have colour, so all are read as grey" in capsys.readouterr().err) == (channels == 1)


def test_decide_and_prepare():
    grey, colour = np.full((4, 1, 2, 2), 200, np.uint8), np.full((4, 3, 2, 2), 200, np.uint8)
    assert decide(grey)[0] == (1, True) and decide(grey // 2)[0] == (1, False)
    colour[:, 0] = 20
    assert decide(colour)[0] == (3, False) and decide(colour, 1)[0] == (1, True)
    assert prepare(colour, Preparation(1, False)).tolist() == np.full((4, 1, 2, 2), 140).tolist()
    assert prepare(grey, Preparation(3, False)).shape == (4, 3, 2, 2)


@has_omniglot
@pytest.mark.parametrize("split", ["course", "lake", "vinyals"])
def test_the_official_omniglot_says_nothing(split, capsys):
    """One character has the same drawing twice, and crosses are their own turns."""
    data = load_dataset("omniglot", split=split)
    assert capsys.readouterr().err == ""
    numbers = leaks.numbers_of(data.images)
    assert len(np.unique(numbers)) == len(numbers) - 1  # Braille's character01


def test_a_run_on_characters_keeps_its_parts(tmp_path, work):
    smoke = "--smoke --dataset glyphs --device cpu --width 4 --views 1 --train_steps 2 --eval_freq 2 --run_name run"
    protonet.main([*smoke.split(), "--num_test_tasks", "2", "--num_val_tasks", "2", "--log_dir", str(tmp_path)])
    known = leaks.read_record(tmp_path / "run", "resume")
    assert known.classes == {} and [len(c) for c in known.parts.values()] == [1100, 100, 423]
    assert retested(tmp_path / "run")["num_test_tasks"] == 2
