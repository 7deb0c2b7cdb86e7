"""Other people's handwriting: Lake's official runs, image by image, and files in MNIST's format."""

from fewshot.experiment import UserError
from fewshot.images.pictures import read_image, resize
from fewshot.tasks import lake
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.lake import LakeRuns
from fewshot.tasks.splits import Dataset, load_dataset

import csv
import gzip
import json
import os
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, has_omniglot

import attention
import maml
import protonet
import transfer

RUNS = list(csv.DictReader(open(REPO / "fewshot" / "tasks" / "lake_runs.csv")))


def evaluation_set():
    """All characters of Lake's runs and some more, as images that say what they are: pixel 0 character, 1 drawer."""
    names = sorted({f"{r['alphabet']}/character{c:02d}" for r in RUNS for c in range(1, 56)})
    images = np.zeros((len(names) * 20, 1, 28, 28), np.uint8)
    images[:, 0, 0, 0] = [int(n[-2:]) for n in names for _ in range(20)]
    images[:, 0, 0, 1] = np.tile(np.arange(1, 21), len(names))
    images[:, 0, 0, 2] = [
        sorted({n.split("/")[0] for n in names}).index(n.split("/")[0]) for n in names for _ in range(20)
    ]
    shuffled = np.random.default_rng(0).permutation(len(names))
    splits = {"train": shuffled[:0], "val": shuffled[:0], "test": shuffled}
    return Dataset("omniglot", images, np.full(len(names), 20), names, splits, "a test", "0", Path("none"))


def test_lakes_runs_are_the_official_ones():
    """Every support image and every item is the character and the drawer that the table names."""
    data = evaluation_set()
    support, support_labels, query, labels = next(LakeRuns(data).first(20))
    assert support.shape == query.shape == (20, 20, 1, 28, 28)
    said = lambda images: (images[..., 0, 0, :3] * 255).round().long()
    alphabets = sorted({r["alphabet"] for r in RUNS})
    for i, run in enumerate(RUNS):
        characters = [int(c) for c in run["characters_in_class_order"].split()]
        answers = [int(a) for a in list(run.values())[-1].split()]
        assert said(support[i])[:, 0].tolist() == characters
        assert said(query[i])[:, 0].tolist() == [characters[a - 1] for a in answers]
        assert labels[i].tolist() == [a - 1 for a in answers] and support_labels[i].tolist() == list(range(20))
        assert set(said(support[i])[:, 1].tolist()) == {int(run["train_drawer"])}
        assert set(said(query[i])[:, 1].tolist()) == {int(run["test_drawer"])}
        assert set(said(support[i])[:, 2].tolist()) == {alphabets.index(run["alphabet"])}
    assert len(next(LakeRuns(data).first(7))[0]) == 7


def test_lakes_runs_need_the_evaluation_set():
    with pytest.raises(UserError, match="--split lake"):
        LakeRuns(load_dataset("glyphs", split="lake"))
    some = evaluation_set()
    with pytest.raises(UserError, match="--split lake"):
        LakeRuns(some._replace(splits=some.splits | {"test": some.splits["test"][:300]}))
    with pytest.raises(UserError, match="--lake_runs .*--split lake"):
        protonet.parse_args(["--lake_runs"])


def test_which_runs_are_asked_lakes_trials():
    data = evaluation_set()
    flags = lambda N, K, split="lake": Namespace(num_classes=N, num_shot=K, split=split)
    assert len(lake.lake_runs(data, flags(20, 1), "cpu").order) == 20
    assert lake.lake_runs(data, flags(5, 1), "cpu") is None  # a head for five classes
    assert lake.lake_runs(data, flags(20, 5), "cpu") is None
    assert lake.lake_runs(data, flags(5, 5), "cpu", any_task=True).N == 20
    assert lake.lake_runs(data, flags(20, 1, "course"), "cpu", any_task=True) is None
    assert lake.lake_runs(data._replace(name="glyphs"), flags(20, 1), "cpu") is None


@has_omniglot
@pytest.mark.parametrize(
    "script, flags, kinds",
    [
        (maml, ["--meta_batch_size", "1", "--train_query", "1"], ["_transductive", "_support"]),
        pytest.param(attention, ["--encoder", "strided"], ["", "_alone"], marks=pytest.mark.thorough),
        (transfer, [], [""]),
    ],
)
def test_lakes_trials_in_the_report_of_other_methods(script, flags, kinds, tmp_path):
    base = ["--smoke", "--dataset", "omniglot", "--split", "lake", "--num_shot", "1", "--log_dir", str(tmp_path)]
    base += ["--train_steps", "2", "--eval_freq", "2", "--num_test_tasks", "2", "--device", "cpu"]
    base += [] if script is transfer else ["--num_val_tasks", "2"]
    base += {"maml": ["--warmup_steps", "1"], "attention": [], "transfer": ["--finetune_steps", "1"]}[script.__name__]
    found = script.main([*base, *flags, "--num_classes", "20", "--run_name", "20"])
    for kind in kinds:
        right = 400 * found[f"test_accuracy_lake_runs{kind}"]
        assert 0 <= right <= 400 and right == pytest.approx(round(right), abs=1e-3)
        assert found[f"ci95_lake_runs{kind}"] >= 0
    if script is transfer:  # any N: the heads are made for the task
        again = transfer.main(["--test", "--checkpoint", str(tmp_path / "20"), "--num_classes", "5"])
        assert again["test_accuracy_lake_runs"] == pytest.approx(found["test_accuracy_lake_runs"])


@has_omniglot
def test_lakes_runs_in_the_official_archive():
    """The 400 trials by reading the archive's own files by name."""
    archive = Path(os.environ["OMNIGLOT_DIR"]) / "images_evaluation.zip"
    if not archive.exists():
        pytest.skip("the archive is not there as a zip file")
    runs = LakeRuns(load_dataset("omniglot", split="lake"))
    support, _, query, labels = next(runs.first(20))
    with zipfile.ZipFile(archive) as files:
        where = {}
        for name in files.namelist():
            if name.endswith(".png"):
                _, alphabet, character, file = name.split("/")
                where[alphabet, character[-2:], file[-6:-4]] = name
        for i, run in list(enumerate(RUNS))[::5]:
            characters = run["characters_in_class_order"].split()
            for j, c in enumerate(characters):
                file = lambda c, drawer, run=run: read_image(files.read(where[run["alphabet"], c, run[drawer]]), "")
                small = lambda image: torch.from_numpy(255 - resize(image[None], 28))[0].float() / 255
                assert torch.equal(small(file(c, "train_drawer")), support[i, j])
                assert torch.equal(small(file(characters[labels[i, j]], "test_drawer")), query[i, j])


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, prefix="t10k-", end=".gz", dot="-", size=28, shift=0):
    """40 images of ten classes that say what they are: pixel 0 the label, pixel 1 the number."""
    folder.mkdir(exist_ok=True)
    labels = np.random.default_rng(1).permutation(np.arange(40) % 10)
    images = np.zeros((40, size, size))
    images[:, 0, 0], images[:, 0, 1] = labels, np.arange(40) + shift
    write_idx(folder / f"{prefix}images{dot}idx3-ubyte{end}", images)
    write_idx(folder / f"{prefix}labels{dot}idx1-ubyte{end}", labels)
    return folder


@pytest.mark.parametrize("form", [{}, {"end": ""}, {"dot": "."}, {"prefix": "emnist-letters-test-"}])
def test_files_in_mnists_format(form, tmp_path, monkeypatch):
    folder = write_mnist(tmp_path / "m", **form)
    write_mnist(tmp_path / "m", prefix="train-", shift=100)  # the test set is taken
    data = load_dataset("mnist", str(folder))
    assert data.names == [f"mnist/{i}" for i in range(10)] and data.counts.tolist() == [4] * 10
    assert np.array_equal(data.images[:, 0, 0, 0], np.repeat(np.arange(10), 4))
    assert sorted(data.images[:, 0, 0, 1].tolist()) == list(range(40))
    assert [len(data.splits[p]) for p in ("train", "val", "test")] == [0, 0, 10]
    monkeypatch.setenv("MNIST_DIR", str(folder))
    assert load_dataset("mnist").digest == data.digest
    _, _, query, _ = EpisodeSampler(data, "test", 10, 1, 3, 5, seed=1).sample()
    assert query.shape == (5, 30, 1, 28, 28)
    with pytest.raises(UserError, match="no classes of split 'train'"):
        EpisodeSampler(data, "train", 5, 1, 1)


def test_faults_of_mnist_files(tmp_path, monkeypatch):
    monkeypatch.delenv("MNIST_DIR", raising=False)
    with pytest.raises(UserError, match="--data_folder .or .MNIST_DIR"):
        load_dataset("mnist")
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="no images and labels in MNIST's format"):
        load_dataset("mnist", str(tmp_path / "m"))
    folder = write_mnist(tmp_path / "m")
    images = folder / "t10k-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for damaged in (whole[:200], b"", b"hello", gzip.compress(gzip.decompress(whole)[:999])):
        images.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole file of MNIST's format"):
            load_dataset("mnist", str(folder))
    images.write_bytes(whole)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(39))
    with pytest.raises(UserError, match="no pair"):
        load_dataset("mnist", str(folder))
    with pytest.raises(UserError, match="--dataset mnist is for --test"):
        protonet.parse_args(["--dataset", "mnist"])


def test_a_network_of_characters_on_mnist(trained_protonet, tmp_path):
    """The run's own --data_folder is not looked at for another dataset."""
    run, _ = trained_protonet
    folder = write_mnist(tmp_path / "m")
    flags = ["--test", "--checkpoint", str(run), "--dataset", "mnist", "--data_folder", str(folder)]
    kept = tmp_path / "report.json"
    flags += ["--num_classes", "10", "--num_query", "3", "--num_test_tasks", "4", "--out", str(kept)]
    metrics = protonet.main(flags)
    assert metrics["dataset"] == "mnist" and 0 <= metrics["test_accuracy"] <= 1
    assert torch.isfinite(torch.tensor(metrics["ci95"]))
    assert json.loads(kept.read_text()) == json.loads(json.dumps(metrics)) and len(metrics["accuracies"]) == 4
    assert "--out" not in metrics["command"]
    for nowhere in (str(tmp_path), str(tmp_path / "no" / "report.json")):
        with pytest.raises(UserError, match="argument --out: .* name one in a folder that exists"):
            protonet.parse_args([*flags, "--out", nowhere])


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_a_classifier_of_characters_on_mnist(adapt, tmp_path):
    """Its heads know no digit: only the few-shot figure is told."""
    flags = ["--smoke", "--dataset", "glyphs", "--log_dir", str(tmp_path), "--run_name", "a", "--device", "cpu"]
    transfer.main(flags)
    folder = write_mnist(tmp_path / "m")
    flags = ["--test", "--checkpoint", str(tmp_path / "a"), "--dataset", "mnist", "--data_folder", str(folder)]
    flags += ["--adapt", adapt, "--head_steps", "2", "--num_classes", "4", "--num_query", "1", "--num_test_tasks", "3"]
    metrics = transfer.main(flags)
    assert metrics["dataset"] == "mnist" and len(metrics["accuracies"]) == 3 and metrics["adapt"] == adapt
    assert "finetuned_accuracy" not in metrics and "pretrained_accuracy" not in metrics
    for content in ({"step": 1}, {"step": 1, "model": {}}, {"step": 1, "model": {"encoder.w": torch.zeros(1)}}):
        torch.save(content, tmp_path / "a" / "best.pt")
        with pytest.raises(UserError, match="best.pt"):
            transfer.main(flags)


@pytest.mark.thorough
def test_attention_on_mnist(tmp_path):
    flags = ["--smoke", "--dataset", "glyphs", "--log_dir", str(tmp_path), "--device", "cpu"]
    few = "--encoder strided --train_steps 2 --eval_freq 2 --num_val_tasks 2 --num_test_tasks 2".split()
    attention.main([*flags, *few, "--run_name", "a"])
    folder = write_mnist(tmp_path / "m")
    flags = ["--test", "--checkpoint", str(tmp_path / "a"), "--dataset", "mnist", "--data_folder", str(folder)]
    metrics = attention.main([*flags, "--num_classes", "10", "--num_shot", "2", "--num_test_tasks", "4"])
    assert (metrics["N"], metrics["K"]) == (10, 2)
