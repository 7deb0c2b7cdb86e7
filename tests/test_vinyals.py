"""The published split: its lists, its turned classes in every part, and every script on it."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.images import omniglot
from fewshot.tasks import leaks, splits
from fewshot.tasks.data_of_run import record_anew
from fewshot.tasks.episodes import EpisodeSampler, fixed_tasks
from fewshot.tasks.splits import load_dataset, vinyals_split

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import REPO, has_omniglot, known_dataset, one_line_error

import hw1
import load_data
import mae
import maml
import meta_lstm
import protonet
import transfer
from load_data import DataGenerator

SIZES = {"train": 1028, "val": 172, "test": 423}
GLYPHS = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--split", "vinyals"]
TASKS = ["--num_test_tasks", "4", "--num_val_tasks", "4"]
SHORT = ["--train_steps", "2", "--eval_freq", "2"]


def lines() -> list[tuple[str, str, int, int]]:
    text = (REPO / "fewshot" / "tasks" / "vinyals_split.csv").read_text()
    rows = [line.split(",") for line in text.splitlines()[1:]]
    return [(part, alphabet, int(first), int(last)) for part, alphabet, first, last in rows]


def turned(num_classes=30, **kwargs):
    return known_dataset(num_classes, **kwargs)._replace(turned=True)


def decode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(class, drawing, turn) of images [..., 1, 28, 28] of `known_dataset`, of whose pixels only a corner is inked.

    A quarter turn moves pixel (0, 1), the drawing, to (26, 0), then (27, 26), then (1, 27); drawing 0 is nothing but
    the class's pixel (0, 0), which goes to (27, 0), (27, 27), (0, 27).
    """
    values = (images[..., 0, :, :] * 255).round().long()
    classes = torch.stack([values[..., i, j] for i, j in ((0, 0), (27, 0), (27, 27), (0, 27))], dim=-1)
    drawings = torch.stack([values[..., i, j] for i, j in ((0, 1), (26, 0), (27, 26), (1, 27))], dim=-1)
    return classes.sum(-1), drawings.sum(-1), (classes + drawings).argmax(-1)


# ------------------------------------------------------------------------------------ the lists


def test_the_lists_have_the_published_sizes_and_no_character_is_in_two_parts():
    names = [f"{a}/character{c:02d}" for _, a, first, last in lines() for c in range(first, last + 1)]
    assert len(names) == len(set(names)) == 1623
    shuffled = [names[i] for i in np.random.default_rng(0).permutation(1623)]
    parts = vinyals_split(shuffled)
    assert {part: len(chosen) for part, chosen in parts.items()} == SIZES
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1623))
    # Whatever the order in which the characters lie, the same ones are in a part.
    again = vinyals_split(names)
    assert all({names[i] for i in again[part]} == {shuffled[i] for i in parts[part]} for part in SIZES)


def test_the_lists_are_by_alphabet_but_for_gurmukhi():
    of = {part: {a for p, a, _, _ in lines() if p == part} for part in SIZES}
    assert of["val"] == {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
    assert of["train"] & of["test"] == {"Gurmukhi"} and not of["val"] & (of["train"] | of["test"])
    assert of["test"] < omniglot.EVALUATION_ALPHABETS and len(set.union(*of.values())) == 50
    assert [row[2:] for row in lines() if row[1] == "Gurmukhi"] == [(1, 41), (42, 45)]


@has_omniglot
def test_the_lists_are_of_the_characters_in_the_archives():
    data = load_dataset("omniglot", split="vinyals")
    assert data.turned and {part: len(chosen) for part, chosen in data.splits.items()} == SIZES
    for part, alphabet, first, last in lines():
        inside = {c for c in data.splits[part] if data.names[c].split("/")[0] == alphabet}
        assert {data.names[c].split("/")[1] for c in inside} == {f"character{c:02d}" for c in range(first, last + 1)}
    course = load_dataset("omniglot")
    assert not course.turned and course.digest == data.digest  # the same images, divided in another way
    sampler = EpisodeSampler(data, "test", 20, 5, 15)
    assert sampler.num_available == 1692
    first = np.flatnonzero(np.isin(np.repeat(np.arange(1623), 20), data.splits["test"]))
    originals = torch.from_numpy(data.images[first])  # the list is in the order of the archives
    assert data.splits["test"].tolist() == sorted(data.splits["test"])
    for turn in range(4):
        assert torch.equal(sampler.images[8460 * turn : 8460 * (turn + 1)], torch.rot90(originals, turn, (2, 3)))
    seen = lambda split: len(leaks.trained_on(record_anew(data, "omniglot", {"split": split}), data))
    assert seen("course") > 100 and seen("vinyals") == 0


def test_glyphs_are_divided_into_parts_of_the_same_sizes():
    """With the test glyphs of the course's split, so that a run on either can be tested on both."""
    data, course = load_dataset("glyphs", split="vinyals"), load_dataset("glyphs")
    assert data.turned and {part: len(chosen) for part, chosen in data.splits.items()} == SIZES
    assert sorted(np.concatenate(list(data.splits.values())).tolist()) == list(range(1623))
    assert set(data.splits["test"]) == set(course.splits["test"])
    for part, n in SIZES.items():
        sampler = EpisodeSampler(data, part, 5, 1, 1)
        assert sampler.num_available == 4 * n and len(sampler.images) == 80 * n


# ----------------------------------------------------------------------------- the turned classes


def test_turns_are_those_of_torch_and_none_is_there_twice():
    data = turned(5)
    sampler = EpisodeSampler(data, "val", 20, 1, 1)
    originals = torch.from_numpy(data.images)
    for turn in range(4):
        assert torch.equal(sampler.images[100 * turn : 100 * (turn + 1)], torch.rot90(originals, turn, (2, 3)))
    again = EpisodeSampler(data, "val", 20, 1, 1, rotations=True)  # a training sampler asks for them as well
    assert torch.equal(again.images, sampler.images) and again.num_available == 20
    with pytest.raises(UserError, match="--num_classes 21 is more than the 20 classes"):
        EpisodeSampler(data, "val", 21, 1, 1)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_each_turn_of_each_class_is_drawn_as_often_and_support_and_queries_are_turned_alike(part):
    B, N = 8000, 5
    support, _, query, query_labels = EpisodeSampler(turned(), part, N, 1, 1, B, seed=3).sample()
    classes, drawings, turn = decode(support)
    visible = classes + drawings > 0  # drawing 0 of class 0 is an empty picture
    counts = (classes * 4 + turn)[visible & (classes > 0)].bincount(minlength=120)[4:]
    expected = B * N / 120
    assert (counts - expected).abs().max() < 5 * expected**0.5
    query_classes, query_drawings, query_turn = decode(query)
    asked = lambda x: x.gather(1, query_labels)
    seen = asked(visible) & (query_classes + query_drawings > 0)
    assert torch.equal(asked(classes), query_classes) and torch.equal(asked(turn)[seen], query_turn[seen])
    assert (asked(drawings) != query_drawings).all()
    # Two turns of one character are two classes, and may meet in one task.
    pairs = (classes[:, :1] == classes[:, 1:]) & (classes[:, 1:] > 0)
    assert pairs.any() and (turn[:, :1] != turn[:, 1:])[pairs].all()


def test_the_fixed_tasks_are_of_turned_classes_and_always_the_same():
    data = load_dataset("glyphs", split="vinyals")
    args = Namespace(num_classes=20, num_shot=1, num_query=5, split="vinyals")
    for part, n in (("val", 172), ("test", 423)):
        first, again = (fixed_tasks(data, part, args, torch.device("cpu")) for _ in range(2))
        assert first.num_available == 4 * n
        rows = torch.cat([first.draw()[0] for _ in range(40)])
        assert torch.equal(rows, torch.cat([again.draw()[0] for _ in range(40)]))
        turn = rows[:, :, 0].div(20 * n, rounding_mode="floor").flatten()
        expected = len(turn) / 4
        assert (turn.bincount(minlength=4) - expected).abs().max() < 5 * expected**0.5


def test_within_an_alphabet_all_are_turned_alike():
    sampler = EpisodeSampler(turned(), "test", 10, 1, 1, 200, seed=1, within_alphabet=True)
    classes, drawings, turn = decode(sampler.sample()[0])
    for b in range(200):
        seen = (classes[b] + drawings[b]) > 0
        assert len(turn[b][seen].unique()) == 1 and len((classes[b] // 10).unique()) == 1


def test_the_course_s_interface_has_the_turned_classes_too():
    torch.manual_seed(0)
    generator = DataGenerator(5, 2, "val", config={"dataset": "glyphs", "split": "vinyals"})
    assert generator.sampler.num_available == 688


def test_the_fine_tuning_baseline_tells_turned_classes_apart():
    drawings = transfer.LabelledDrawings(turned(6), [1, 4, 5], 5, seed=0, device="cpu", jitter=0.0)
    assert drawings.num_classes == 12
    images, labels = drawings.batch(5000)
    classes, numbers, turn = decode(images)
    seen = classes + numbers > 0
    assert torch.equal(torch.tensor([1, 4, 5])[labels % 3], classes)
    assert torch.equal(labels[seen].div(3, rounding_mode="floor"), turn[seen])
    counts = labels.bincount(minlength=12)
    assert (counts - 5000 / 12).abs().max() < 5 * (5000 / 12) ** 0.5
    held = decode(drawings.images[drawings.test[0]].float() / 255)[1]
    assert set(held.tolist()) == set(range(15, 20)) and len(held) == 60


# ------------------------------------------------------------------------------------ the scripts

TINY = {
    hw1: ["--hidden_dim", "8", "--meta_batch_size", "2"],
    protonet: ["--width", "4", "--train_classes", "5", "--views", "1"],
    maml: ["--width", "4", "--train_classes", "5", "--warmup_steps", "1", "--num_query", "3"],
    meta_lstm: ["--inner_epochs", "1", "--meta_batch_size", "1"],
    transfer: ["--width", "4", "--finetune_steps", "1", "--head_steps", "2"],
    mae: ["--whitening_images", "300", "--views", "1", "--width", "8"],
}


THOROUGH = [pytest.param(module, marks=pytest.mark.thorough) if module is mae else module for module in TINY]


@pytest.mark.parametrize("module", THOROUGH, ids=lambda module: module.__name__)
def test_every_script_says_on_which_split_it_was(module, tmp_path):
    tasks = [word for word in TASKS if module is not transfer or word != "--num_val_tasks"]
    tasks = tasks[:2] if module is transfer else tasks
    metrics = module.main([*GLYPHS, *TINY[module], *SHORT, *tasks, "--log_dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"{module.__name__}_glyphs_vinyals_")
    assert metrics["split"] == metrics["flags"]["split"] == "vinyals" and 0 <= metrics["test_accuracy"] <= 1
    assert metrics["flags"].get("rotations", True) is True and "--split vinyals" in metrics["command"]
    if module is protonet:  # both modes beside each other, at every N and K
        for N, K in ((5, 1), (5, 5), (20, 1), (20, 5)):
            assert {
                f"{kind}_{N}way{K}shot{mode}" for kind in ("test_accuracy", "ci95") for mode in ("", "_transductive")
            } <= set(metrics)
    if module is transfer:
        assert metrics["pretrained_classes"] == 4800 and metrics["finetuned_classes"] == 1692
    if module is maml:
        assert {"test_accuracy_transductive", "test_accuracy_support"} <= set(metrics)
        again = maml.main(["--test", "--checkpoint", str(folder)])
        assert again["test_accuracy"] == metrics["test_accuracy"] and again["split"] == "vinyals"


def test_a_run_on_the_course_s_split_is_named_as_ever(tmp_path):
    maml.main([*GLYPHS[:-2], *TINY[maml], *SHORT, *TASKS, "--log_dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("maml_glyphs_5way_1shot_seed1_")


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    flags = [*GLYPHS, *TINY[maml], "--train_steps", "6", "--eval_freq", "2", *TASKS, "--log_dir", str(tmp_path)]
    whole = maml.main([*flags, "--run_name", "whole"])
    saves, save = [], experiment.Run.save

    def save_and_stop(run):
        save(run)
        saves.append(run.step)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "save", save_and_stop)
        maml.main([*flags, "--run_name", "stopped"])
    resumed = maml.main(["--resume", str(tmp_path / "stopped")])
    assert saves == [2, 4] and resumed["split"] == "vinyals"
    assert resumed["accuracies"] == whole["accuracies"] and resumed["curves"] == whole["curves"]
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["objects"] for n in ("whole", "stopped"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    with pytest.raises(UserError, match="--split course is not the run's vinyals"):
        maml.main(["--resume", str(tmp_path / "stopped"), "--split", "course"])


def test_what_cannot_be_is_refused_in_one_line(tmp_path, run_script):
    (tmp_path / "a").mkdir()
    folder = ["--dataset", "folder", "--data_folder", str(tmp_path), "--split", "vinyals"]
    with pytest.raises(UserError, match="has 0 classes"):
        load_dataset("folder", str(tmp_path), "vinyals")
    with pytest.raises(UserError, match="--split vinyals lists the characters of Omniglot; use --split course"):
        splits.make_splits("folder", ["a", "b", "c"], "vinyals")
    for script, module in (("maml", maml), ("protonet", protonet), ("hw1", hw1), ("meta_lstm", meta_lstm)):
        with pytest.raises(UserError, match="--no-rotations with --split vinyals"):
            module.parse_args([*GLYPHS, "--no-rotations"])
        assert module.parse_args(GLYPHS).rotations, script
    assert meta_lstm.parse_args([*GLYPHS, "--preset", "5way1shot"]).rotations  # whose own default is without
    one_line_error(run_script("maml.py", *folder, "--smoke"), "--data_folder")
    one_line_error(run_script("maml.py", "--split", "vynials"), "--split", "vinyals")


def test_the_command_line_says_that_classes_are_turned(capsys):
    load_data.main(["--dataset", "glyphs", "--split", "vinyals"])
    said = capsys.readouterr().out
    assert "1028 classes" in said and "423 classes" in said and said.count("turned by 90, 180 and 270 degrees") == 3


def test_the_mnist_of_a_run_on_this_split_is_not_turned():
    """Turned sixes are nines: MNIST's ten classes stay ten."""
    names = [f"mnist/{c}" for c in range(10)]
    assert splits.make_splits("mnist", names, "vinyals")["test"].tolist() == list(range(10))
    assert json.dumps(experiment.SPLITS) == '["course", "lake", "vinyals"]'
