"""Prediction on the user's own pictures: of any look, in any order, with one line for every fault; the network that
ships, classes kept in a file, and "none of these"."""

from fewshot import experiment
from fewshot.images.drawings import paper_of, prepare_drawing
from fewshot.images.pictures import read_image, resize
from fewshot.tasks.splits import load_dataset

import csv
import json
import os
import pickle
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import REPO, has_omniglot, one_line_error
from matplotlib.figure import Figure

import predict
import protonet
from bench import ship


def photograph(character, size, ink, paper, noise=0):
    """A glyph [28, 28] (1 is ink) as a picture: enlarged, off-centre, in colours, with noise."""
    big = resize((character * 255).astype(np.uint8)[None, None], size)[0, 0][..., None] / 255
    canvas = np.zeros((size + size // 2, size * 2, 1))
    canvas[size // 4 : size // 4 + size, size // 2 : size // 2 + size] = big
    picture = canvas * np.array(ink) + (1 - canvas) * np.array(paper)
    picture = picture + np.random.default_rng(0).normal(0, noise, picture.shape)
    return picture.clip(0, 255).round().astype(np.uint8)


STYLES = [
    {"size": 60, "ink": (0, 0, 0), "paper": (255, 255, 255)},
    {"size": 150, "ink": (40, 40, 160), "paper": (235, 225, 200), "noise": 6},  # blue ink on yellowish paper
    {"size": 90, "ink": (250, 250, 250), "paper": (20, 60, 20)},  # chalk on a board
    {"size": 40, "ink": (90, 20, 20), "paper": (200, 200, 200), "noise": 3},
]


@pytest.fixture
def pictures(tmp_path, drawn_pictures):
    """A copy of `drawn_pictures` for each test."""
    return shutil.copytree(drawn_pictures, tmp_path, dirs_exist_ok=True)


DRAW = (
    "test_predict_labels_pictures_of_any_look",
    "test_the_network_that_ships",
    "test_fifty_real_drawings",
    "test_the_figure",
)


@pytest.fixture(autouse=True)
def _small_figure(request, monkeypatch):
    """An empty figure but in the tests that look at it: matplotlib's many axes are most of a prediction's time."""
    if not request.node.name.startswith(DRAW):
        monkeypatch.setattr(predict, "prediction_figure", lambda *_: Figure((1, 1)))


@pytest.fixture(scope="module")
def drawn_pictures(work, tmp_path_factory):
    """support/<class>/* and query/* of five glyphs of the test split, in several styles and sizes."""
    tmp_path = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        draw_pictures(tmp_path)
    return tmp_path


def draw_pictures(tmp_path):
    data = load_dataset("glyphs")
    rng = np.random.default_rng(3)
    classes = rng.choice(data.splits["test"], 5, replace=False)
    for n, c in enumerate(classes):
        drawings = data.images[data.starts[c] : data.starts[c] + 20, 0] / 255
        folder = tmp_path / "support" / f"letter {n}"
        folder.mkdir(parents=True)
        for i in range(1 + n % 3):  # one or more each
            iio.imwrite(folder / f"{i}.png", photograph(drawings[i], **STYLES[(n + i) % 4]))
        (tmp_path / "query").mkdir(exist_ok=True)
        for i, style in enumerate(STYLES):
            suffix = ("png", "jpg")[i % 2]
            iio.imwrite(tmp_path / "query" / f"letter {n} style {i}.{suffix}", photograph(drawings[10 + i], **style))


def test_predict_labels_pictures_of_any_look(trained_protonet, pictures, capsys):
    folder, _ = trained_protonet
    rows = predict.main([str(pictures), "--checkpoint", str(folder)])
    assert len(rows) == 20
    right = sum(row["file"].startswith(row["predicted_class"]) for row in rows)
    assert right >= 18, rows
    with open(folder / "predictions.csv") as file:
        assert [row["predicted_class"] for row in csv.DictReader(file)] == [row["predicted_class"] for row in rows]
    assert iio.imread(folder / "predictions.png").shape[0] > 300
    assert "letter 0 style 0.png" in capsys.readouterr().out
    assert {p.name for p in pictures.iterdir()} == {"support", "query"}  # nothing is written into DIR


def test_ink_flag(trained_protonet, pictures):
    inverted = [255 - read_image(p, "")[0] for p in sorted((pictures / "query").glob("*style 0.png"))]
    for image in inverted:
        dark = prepare_drawing(torch.from_numpy(255 - image[None]), "dark", 28)
        assert torch.allclose(prepare_drawing(torch.from_numpy(image[None]), "bright", 28), dark, atol=0.02)
        assert torch.allclose(prepare_drawing(torch.from_numpy(image[None]), "auto", 28), dark, atol=0.02)
    blank = prepare_drawing(torch.full((3, 40, 40), 200, dtype=torch.uint8), "auto", 28)
    assert blank.shape == (1, 28, 28) and not blank.any()


def test_bad_folders_get_one_line(trained_protonet, pictures, tmp_path, run_script, capsys):
    folder, _ = trained_protonet

    def refused(*words):
        with pytest.raises(SystemExit) as stop:
            experiment.run_script(lambda: predict.main([str(pictures), "--checkpoint", str(folder)]))
        err = capsys.readouterr().err
        last = err.strip().splitlines()[-1]
        assert stop.value.code == 2 and last.startswith("error: ") and all(word in last for word in words), err

    (pictures / "support" / "letter 1" / "0.png").write_text("not a picture")
    (pictures / "support" / "letter 1" / "1.png").write_text("not a picture")
    refused("letter 1", "no pictures that can be read")
    iio.imwrite(pictures / "support" / "letter 1" / "0.png", np.zeros((9, 9), np.uint8))
    (pictures / "support" / "empty").mkdir()
    refused("empty", "has no pictures that can be read")
    for p in list((pictures / "support").iterdir()):
        if p.name != "letter 0":
            p.rename(tmp_path / f"moved {p.name}")
    refused("has 1 class folders")
    (pictures / "support").rename(pictures / "elsewhere")
    refused("support is missing")
    one_line_error(run_script("predict.py"), "DIR")
    one_line_error(run_script("predict.py", pictures, "--checkpoint", tmp_path), "not a run folder")


@pytest.mark.parametrize(
    "best", [[1], {}, {"model": 3, "step": 1}, {"model": {}, "step": 1}, {"model": {"weight0": 3}}]
)
def test_a_strange_network_gets_one_line(best, trained_protonet, pictures, tmp_path, capsys):
    shutil.copy(trained_protonet[0] / "flags.json", tmp_path)
    torch.save(best, tmp_path / "best.pt")
    refused(capsys, [pictures, "--checkpoint", tmp_path], str(tmp_path))
    with pytest.raises(experiment.UserError, match="best.pt is "):
        protonet.main(
            ["--smoke", "--dataset", "glyphs", "--init_from", str(tmp_path), "--log_dir", str(tmp_path / "runs")]
        )
    assert not (tmp_path / "runs").exists() and not (tmp_path / "predictions.csv").exists()
    (tmp_path / "flags.json").write_text('{"script": "protonet", "dataset": "glyphs", "command": "", "flags": {}}')
    refused(capsys, [pictures, "--checkpoint", tmp_path], "lacks --image_size")
    for flags in ("3", "[1]", '{"dataset": "glyphs", "flags": 3}'):  # whose classes cannot be known
        (tmp_path / "flags.json").write_text(flags)
        refused(capsys, [pictures, "--checkpoint", tmp_path], "not a run folder")
        with pytest.raises(experiment.UserError, match="is not a run folder"):
            protonet.main(["--smoke", "--dataset", "glyphs", "--init_from", str(tmp_path)])


# ------------------------------------------------------------------------ the network that ships


def refused(capsys, argv, *words):
    """predict.main(argv) ends with exit code 2 and one line that has all words."""
    with pytest.raises(SystemExit) as stop:
        experiment.run_script(lambda: predict.main([str(word) for word in argv]))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and all(word in last for word in words), last


def test_the_network_that_ships(pictures, tmp_path, monkeypatch, capsys):
    """Half a megabyte without pickled code; it labels pictures where there is no data and leaves DIR as it was."""
    assert predict.SHIPPED.stat().st_size <= 500_000
    content = torch.load(predict.SHIPPED, weights_only=True)
    assert set(content) == {"flags", "model", "unknown"} and set(content["flags"]) == set(ship.FLAGS)
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)
    rows = predict.main([str(pictures)])
    assert sum(row["file"].startswith(row["predicted_class"]) for row in rows) >= 18, rows
    assert {p.name for p in here.rglob("*") if p.is_file()} == {"predictions.csv", "predictions.png"}
    assert (here / "runs" / "predict" / "predictions.csv").exists()
    predict.main([str(pictures), "--out", str(here / "there")])
    assert (here / "there" / "predictions.png").exists()
    monkeypatch.setattr(predict, "SHIPPED", here / "gone.pt")
    refused(capsys, [pictures], "gone.pt is missing", "--checkpoint")


def test_it_is_the_network_of_its_result_file():
    """results/shipped.json, the run in the ledger and the file tell of the same network."""
    result = json.loads((REPO / "results" / "shipped.json").read_text())
    run = json.loads((REPO / "results" / "protonet" / "pretrained_seed1.json").read_text())
    content = torch.load(predict.SHIPPED, weights_only=True)
    assert result["threshold"] == content["unknown"]["threshold"] and result["trained_by"] == run["command"]
    assert result["dataset"] == run["dataset"] == "omniglot" and result["num_tasks"] >= 600
    assert sum(v.numel() for n, v in content["model"].items() if not n.startswith(("mean", "var"))) == run["parameters"]
    assert result["val"]["5way5shot"]["kept_of_known"] == pytest.approx(0.9, abs=0.03)
    assert result["test"]["5way5shot"]["refused_at_kept"] >= 0.8


@pytest.mark.thorough
@has_omniglot
def test_fifty_real_drawings_of_a_fresh_folder(tmp_path, run_script):
    """Shows what the README promises: five test characters, ten drawings each to label, without data or network.

    RECORD=1 writes results/shipped_drawings.json.
    """
    data = load_dataset("omniglot", image_size=105)
    rng, right, seconds = np.random.default_rng(5), [], []
    used = lambda: sum(os.times()[2:4])  # processor time of programs that were run
    environment = {"OMNIGLOT_DIR": "", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    for folder in range(3 if os.environ.get("RECORD") else 1):
        root = tmp_path / f"folder{folder}"
        for c in rng.choice(data.splits["test"], 5, replace=False):
            name = data.names[c].replace("/", " ")
            (root / "query" / name).mkdir(parents=True)
            (root / "support" / name).mkdir(parents=True)
            drawers = rng.permutation(20)
            for i, drawer in enumerate(drawers[:11]):
                image = 255 - data.images[data.starts[c] + drawer, 0]
                iio.imwrite(root / ("support" if i == 0 else "query") / name / f"{drawer}.png", image)
        begin = used()
        done = run_script("predict.py", root, env=environment, cwd=root, cold=True)
        seconds.append(round(used() - begin, 1))
        assert done.returncode == 0, done.stderr
        with open(root / "runs" / "predict" / "predictions.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 50
        right.append(sum(row["predicted_class"] == row["true_class"] for row in rows))
        assert f"right: {right[-1]} of 50" in done.stdout
    if os.environ.get("RECORD"):
        found = {"right": right, "of": 50, "cpu_seconds": seconds}
        found |= {"processor": experiment.processor(), "device": "cpu, 1 threads"}
        found["command"] = "RECORD=1 pytest -n 0 tests/test_predict.py -k fifty"
        experiment.write_json(REPO / "results" / "shipped_drawings.json", found)
    assert sum(right) >= 0.95 * 50 * len(right), right


# ------------------------------------------------------------------------- classes kept in a file


def test_kept_classes_give_the_same_answers(trained_protonet, pictures, tmp_path, capsys):
    run, kept = trained_protonet[0], tmp_path / "kept.npz"
    before = predict.main([str(pictures), "--checkpoint", str(run), "--save_classes", str(kept)])
    assert "5 classes, 9 pictures" in capsys.readouterr().out
    (pictures / "support").rename(pictures / "elsewhere")
    assert predict.main([str(pictures), "--checkpoint", str(run), "--classes", str(kept)]) == before
    refused(capsys, [pictures, "--classes", kept, "--save_classes", kept], "--save_classes", "--classes")


def test_classes_alone_are_kept_without_queries(trained_protonet, pictures, tmp_path):
    (pictures / "query").rename(pictures / "later")
    kept = tmp_path / "kept.npz"
    assert predict.main([str(pictures), "--checkpoint", str(trained_protonet[0]), "--save_classes", str(kept)]) == []
    with np.load(kept, allow_pickle=False) as saved:
        assert saved["images"].shape == (9, 1, 28, 28) and list(saved["names"]) == [f"letter {n}" for n in range(5)]


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    "broken",
    [
        {"labels": np.array([0, 1, 1, 2, 2, 2, 3, 4, 9])},  # of a class without a name
        {"labels": np.array([0, 1, 2, 3, 3, 3, 3, 3, 3])},  # a class without pictures
        {"labels": np.arange(5)},
        {"images": np.full((9, 1, 28, 28), 7, np.float32)},
        {"images": np.full((9, 1, 28, 28), np.nan, np.float32)},
        {"images": np.zeros((9, 28, 28), np.float32)},
        {"names": np.array([Trap()] * 5, dtype=object)},
        {"kind": np.array("1 x 32 x 32, as ink"), "images": np.zeros((9, 1, 32, 32), np.float32)},
        {"kind": np.array("1 x 28 x 28, as a folder's")},
        None,
        b"not an archive",
        pickle.dumps(Trap()),
    ],
)
def test_files_that_are_not_kept_classes_get_one_line(trained_protonet, pictures, tmp_path, capsys, broken):
    run, kept = trained_protonet[0], tmp_path / "kept.npz"
    if isinstance(broken, dict):
        predict.main([str(pictures), "--checkpoint", str(run), "--save_classes", str(kept)])
        with np.load(kept) as saved:
            np.savez(kept, **(dict(saved) | broken))
    elif broken is not None:
        kept.write_bytes(broken)
    other = isinstance(broken, dict) and "kind" in broken
    words = ("is for another network", "1 x 28 x 28, as ink") if other else ("not a file of --save_classes",)
    refused(capsys, [pictures, "--checkpoint", run, "--classes", kept], *words)
    assert not os.path.exists("sprung")


# ------------------------------------------------------------------- none of these, and the table


def test_strangeness_is_the_distance_in_units_of_what_a_class_s_own_pictures_have():
    """Classes of K pictures with known variance: on average it is that variance, whatever K."""
    rng = np.random.default_rng(0)
    for K in (1, 2, 5, 20):
        support = torch.from_numpy(rng.normal(0, 3, (4000, K, 2))).mean(dim=1)
        query = torch.from_numpy(rng.normal(0, 3, (4000, 2)))
        distances = (query - support).square().sum(-1)[:, None, None]  # tasks of one class
        mean = predict.strangeness(distances, torch.tensor([K])).mean().item()
        assert mean == pytest.approx(2 * 9, abs=5 * 18 / 4000**0.5)
    distances = torch.tensor([[4.0, 1.0], [2.0, 9.0]])
    assert predict.strangeness(distances, torch.tensor([1, 3])).tolist() == pytest.approx([0.75, 1.0])


def test_unknown_needs_a_threshold_and_obeys_it(trained_protonet, pictures, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("flags.json", "best.pt"):
        (run / name).write_bytes((trained_protonet[0] / name).read_bytes())
    refused(capsys, [pictures, "--checkpoint", run, "--unknown"], "--unknown", "bench ship")
    experiment.write_json(run / "unknown.json", {"threshold": 1e9})
    rows = predict.main([str(pictures), "--checkpoint", str(run), "--unknown"])
    assert not any(row["predicted_class"] == predict.NONE for row in rows)
    experiment.write_json(run / "unknown.json", {"threshold": 1})
    rows = predict.main([str(pictures), "--checkpoint", str(run), "--unknown"])
    middle = float(np.median([row["strangeness"] for row in rows]))
    experiment.write_json(run / "unknown.json", {"threshold": middle})
    rows = predict.main([str(pictures), "--checkpoint", str(run), "--unknown"])
    assert sum(row["predicted_class"] == predict.NONE for row in rows) in (9, 10, 11)
    assert all((row["predicted_class"] == predict.NONE) == (row["strangeness"] > 1) for row in rows)
    plain = predict.main([str(pictures), "--checkpoint", str(run)])
    assert [row["probability"] for row in plain] == [row["probability"] for row in rows]
    assert not any(row["predicted_class"] == predict.NONE for row in plain)


def test_the_figure_has_a_row_for_what_is_none_of_the_classes():
    images = torch.rand(2, 1, 28, 28)
    rows = [
        {"predicted_class": name, "file": f"{i}.png", "probability": 0.5} for i, name in enumerate(["b", predict.NONE])
    ]
    figure = predict.prediction_figure(predict.Classes(["a", "b"], images, torch.arange(2)), images, rows)
    found = [ax.get_title() for ax in figure.axes]
    assert found == ["class a", "", "class b", "0.png 0.50", predict.NONE, "1.png 0.50"]


def test_queries_in_class_folders_give_a_table(trained_protonet, pictures, capsys):
    for n in range(5):
        (pictures / "query" / f"letter {n}").mkdir()
        for file in list((pictures / "query").glob(f"letter {n} style *")):
            file.rename(pictures / "query" / f"letter {n}" / file.name)
    stranger = pictures / "query" / "somebody's"
    stranger.mkdir()
    iio.imwrite(stranger / "x.png", photograph(load_dataset("glyphs").images[0, 0] / 255, **STYLES[0]))
    rows = predict.main([str(pictures), "--checkpoint", str(trained_protonet[0])])
    lines = capsys.readouterr().out.splitlines()
    right = sum(row["predicted_class"] == row["true_class"] for row in rows)
    assert len(rows) == 21 and right >= 18 and f"right: {right} of 21 ({100 * right / 21:.1f} %)" in lines
    at = next(i for i, line in enumerate(lines) if line.startswith("true \\ predicted"))
    table = np.array([[int(cell) for cell in line.split()[-6:]] for line in lines[at + 1 : at + 7]])
    assert table.sum(axis=1).tolist() == [4, 4, 4, 4, 4, 1] and np.trace(table) == right
    assert lines[at + 6].startswith(predict.NONE) and table[:, 5].sum() == 0


# ------------------------------------------------------------------------------------ bench/ship.py


def test_area_under_the_curve_against_all_pairs():
    g = torch.Generator().manual_seed(0)
    known = torch.randint(0, 12, (7, 9), generator=g).float()  # with many ties
    unknown = torch.randint(4, 20, (5, 11), generator=g).float()
    u, k = unknown.flatten()[:, None].double(), known.flatten().double()
    pairs = (u > k).double() + 0.5 * (u == k).double()
    assert ship.area_under_curve(known, unknown) == pytest.approx(pairs.mean().item(), abs=1e-9)
    assert ship.area_under_curve(known, known) == pytest.approx(0.5)
    assert ship.area_under_curve(known, known + 100) == 1


@pytest.fixture
def few_glyphs():
    """The glyphs with 24 validation and 24 test characters, so that preparing them takes seconds."""
    data = load_dataset("glyphs")
    return data._replace(splits={part: classes[:24] for part, classes in data.splits.items()})


@pytest.mark.thorough
def test_the_threshold_is_of_validation_classes_alone(trained_protonet, few_glyphs, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("flags.json", "best.pt"):
        (run / name).write_bytes((trained_protonet[0] / name).read_bytes())
    monkeypatch.setattr(ship, "load_for", lambda _: few_glyphs)
    monkeypatch.setattr(predict, "SHIPPED", tmp_path / "pretrained" / "protonet.pt")
    monkeypatch.setattr(ship, "RESULT", tmp_path / "shipped.json")
    result = ship.main([str(run), "--num_tasks", "40", "--ship"])
    assert json.loads((tmp_path / "shipped.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["val"]) == {"5way1shot", "5way5shot"} == set(result["test"])  # 40 classes are not there
    kept = [result["val"][name]["kept_of_known"] for name in result["val"]]
    assert np.mean(kept) == pytest.approx(0.9, abs=0.01) and result["val"]["5way5shot"]["area_under_curve"] > 0.7
    shuffled = few_glyphs.images.copy()
    for c in few_glyphs.splits["test"]:  # other test pictures, the same threshold
        shuffled[few_glyphs.starts[c] : few_glyphs.starts[c] + 20] = few_glyphs.images[:20]
    monkeypatch.setattr(ship, "load_for", lambda _: few_glyphs._replace(images=shuffled))
    other = ship.main([str(run), "--num_tasks", "40"])
    assert other["threshold"] == result["threshold"] and other["test"] != result["test"]
    rows = [predict.load_network(predict.parse_args(["x", *flags])) for flags in ([], ["--checkpoint", str(run)])]
    assert rows[0].threshold == rows[1].threshold == result["threshold"]
    weights = [network.encoder.state_dict() for network in rows]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_known_queries_are_of_the_first_classes(few_glyphs):
    """With features that say which class a picture is of, known queries are not strange, unknown ones are."""
    images = np.zeros_like(few_glyphs.images)
    for c in range(len(few_glyphs.counts)):
        images[few_glyphs.starts[c] : few_glyphs.starts[c] + 20, 0, c % 28, c // 28 % 28] = 255
    data = few_glyphs._replace(images=images)
    tasks = ship.tasks_of(data, "val", 5, 2)
    known, unknown, right = ship.known_and_unknown(tasks.images.flatten(1).float(), tasks, 30)
    assert known.shape == unknown.shape == (30, 25) and right.shape == (30,)
    assert known.abs().max() < 1e-6 and unknown.min() > 1e-3 and (right == 1).all()


def test_ship_needs_classes_enough(trained_protonet, few_glyphs, monkeypatch, capsys):
    scarce = few_glyphs._replace(splits=few_glyphs.splits | {"val": few_glyphs.splits["val"][:9]})
    monkeypatch.setattr(ship, "load_for", lambda _: scarce)
    with pytest.raises(experiment.UserError, match="10 classes of split 'val'"):
        ship.main([str(trained_protonet[0]), "--num_tasks", "2"])


# --------------------------------------------------------------------------------- uneven light


def test_even_paper_is_recognised_at_once():
    """Stopping early changes nothing: the paper of a drawing is its brightness everywhere."""
    image = torch.full((105, 105), 240.0)
    image[20:80, 50:54] = 10
    assert (paper_of(image) - 240).abs().max() < 0.05
    shaded = image * torch.linspace(1, 0.7, 105)
    assert (paper_of(shaded) - 240 * torch.linspace(1, 0.7, 105)).abs().max() < 3


WHAT = (
    "20 tasks, 5-way 1-shot, of photographs made of characters of the test split, labelled by `predict.py` with "
    "`--ink auto` and a ProtoNet of 800 steps, by how much darker the darkest place is. Command: "
    "`RECORD=1 pytest -m slow -n 0 tests/test_predict.py`."
)


def shade(height, width, darker, kind):
    """A factor [H, W] of light: 1 in the middle or at the lit side, 1 - darker where it is darkest."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    one = np.exp(-((x - 1) ** 2 + (y - 1) ** 2) / 0.5)
    return 1 - darker * {"four corners": (x**2 + y**2) / 2, "one side": (x + y + 2) / 4, "one corner": one}[kind]


def shaded_photograph(drawing, rng, ink, darker, kind):
    """A drawing [H, W] (1 is ink) as a photograph uint8 [3, H', W']: any size, margin, ink and paper, noise."""
    size = int(rng.integers(80, 180))
    big = torch.nn.functional.interpolate(torch.from_numpy(drawing)[None, None].float(), (size, size), mode="bilinear")
    canvas = np.pad(big[0, 0].numpy(), int(size * rng.uniform(0.05, 0.3)))
    pen, paper = rng.uniform(10, 80), rng.uniform(190, 250)
    if ink == "bright":
        pen, paper = paper, rng.uniform(15, 60)
    light = (canvas * pen + (1 - canvas) * paper) * shade(*canvas.shape, darker, kind)
    light = (light + rng.normal(0, 3, light.shape)).clip(0, 255).round().astype(np.uint8)
    return torch.from_numpy(light)[None].expand(3, -1, -1)


@pytest.mark.slow
@has_omniglot
@pytest.mark.parametrize("ink", ["dark", "bright"])
@pytest.mark.parametrize("kind", ["four corners", "one side", "one corner"])
def test_uneven_light_on_real_characters(ink, kind, trained_on_omniglot):
    """20 tasks, 5-way 1-shot, of real characters of the test split: at least 95 % right at 0 to 30 % less light.

    RECORD=1 writes the figures to results/prediction_light.json.
    """
    encoder = trained_on_omniglot
    data = load_dataset("omniglot", image_size=105)
    found = {}
    for darker in (0, 5, 10, 15, 20, 30):
        rng, right = np.random.default_rng(1), []
        for _ in range(20):
            classes = rng.choice(data.splits["test"], 5, replace=False)
            drawings = [data.images[data.starts[c] + rng.choice(20, 5, replace=False), 0] / 255 for c in classes]
            photographs = [[shaded_photograph(d, rng, ink, darker / 100, kind) for d in five] for five in drawings]
            images = torch.stack([torch.stack([prepare_drawing(p, "auto", 28) for p in f]) for f in photographs])
            with torch.no_grad():
                features = protonet.embed(encoder, images.flatten(0, 1)[None], torch.float32)[0].view(5, 5, -1)
            logits = protonet.proto_logits(features[None, :, 0], features[None, :, 1:].flatten(1, 2), 5)
            right.append((logits[0].argmax(dim=-1) == torch.arange(5).repeat_interleave(4)).float().mean().item())
        found[darker] = float(np.mean(right))
    if os.environ.get("RECORD"):
        path = REPO / "results" / "prediction_light.json"
        content = json.loads(path.read_text()) if path.exists() else {"accuracy": {}}
        content["what"] = WHAT
        content["accuracy"][f"{ink} ink, {kind} darker"] = {str(k): round(v, 4) for k, v in found.items()}
        experiment.write_json(path, content)
    assert min(found.values()) >= 0.95, found


@pytest.fixture(scope="module")
def trained_on_omniglot(work, tmp_path_factory):
    """An encoder of a short run on the real characters."""
    folder = tmp_path_factory.mktemp("light")
    flags = ["--train_steps", "800", "--eval_freq", "400", "--num_val_tasks", "200", "--device", "cpu", "--log_dir"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        protonet.main([*flags, str(folder), "--run_name", "light", "--dataset", "omniglot"])
        encoder = protonet.make_encoder(protonet.parse_args([]), 1)
        experiment.load_best(folder / "light", encoder)
    return encoder
