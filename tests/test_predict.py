"""Prediction on the user's own pictures: of any look, in any order, with one line for every fault."""

import csv
import json
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import REPO, has_omniglot, one_line_error

import experiment
import load_data
import omniglot
import predict
import protonet


def photograph(character, size, ink, paper, noise=0):
    """A glyph [28, 28] (1 is ink) as a picture: enlarged, off-centre, in colours, with noise."""
    big = omniglot.resize((character * 255).astype(np.uint8)[None, None], size)[0, 0][..., None] / 255
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
def pictures(tmp_path):
    """support/<class>/* and query/* of five glyphs of the test split, in several styles and sizes."""
    data = load_data.load_dataset("glyphs")
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
    return tmp_path


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
    inverted = [255 - omniglot.read_image(p, "")[0] for p in sorted((pictures / "query").glob("*style 0.png"))]
    for image in inverted:
        dark = predict.prepare_drawing(torch.from_numpy(255 - image[None]), "dark", 28)
        assert torch.allclose(predict.prepare_drawing(torch.from_numpy(image[None]), "bright", 28), dark, atol=0.02)
        assert torch.allclose(predict.prepare_drawing(torch.from_numpy(image[None]), "auto", 28), dark, atol=0.02)
    blank = predict.prepare_drawing(torch.full((3, 40, 40), 200, dtype=torch.uint8), "auto", 28)
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
    data = load_data.load_dataset("omniglot", image_size=105)
    found = {}
    for darker in (0, 5, 10, 15, 20, 30):
        rng, right = np.random.default_rng(1), []
        for _ in range(20):
            classes = rng.choice(data.splits["test"], 5, replace=False)
            drawings = [data.images[data.starts[c] + rng.choice(20, 5, replace=False), 0] / 255 for c in classes]
            photographs = [[shaded_photograph(d, rng, ink, darker / 100, kind) for d in five] for five in drawings]
            images = torch.stack(
                [torch.stack([predict.prepare_drawing(p, "auto", 28) for p in f]) for f in photographs]
            )
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
