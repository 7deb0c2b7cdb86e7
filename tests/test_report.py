"""report.py: the documents are those of the result files, come back when deleted, and never mix data sets."""

from experiment import UserError

import base64
import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np
import pytest
from conftest import REPO, one_line_error

import evidence
import feature_weights
import findings
import hw1
import pictures
import profile_costs
import report
import study_pictures
import tables

RESULTS = REPO / "results"
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
SAME_MATPLOTLIB = f"Matplotlib version{matplotlib.__version__},".encode() in (RESULTS / "mann.png").read_bytes()


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """A copy of the repository's documents whose tables and pictures were all deleted, after report.py."""
    here = tmp_path_factory.mktemp("repo")
    if os.environ.get("RECORD"):
        pytest.skip("results are being written anew; python report.py then brings the documents along")
    shutil.copytree(RESULTS, here / "results")
    shutil.copytree(REPO / "docs", here / "docs")
    shutil.copy(REPO / "README.md", here)
    for file in [*(here / "results").glob("*.png"), *(here / "results").glob("*.csv"), here / "results" / "README.md"]:
        file.unlink()
    for page in [here / "README.md", *(here / "docs").glob("*.md")]:
        page.write_text(
            re.sub(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", r"\1gone\n\3", page.read_text(), flags=re.DOTALL)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "HERE", here)
        patch.setattr(pictures, "find_browser", lambda: None)
        report.main(["--results", str(here / "results")])
    return here


def test_every_table_comes_back_bit_for_bit(restored):
    for page in [*DOCUMENTS, RESULTS / "README.md", *RESULTS.glob("*.csv")]:
        assert (restored / page.relative_to(REPO)).read_bytes() == page.read_bytes(), f"{page}: run python report.py"


def test_every_picture_comes_back(restored):
    back, before = ({p.name for p in (folder / "results").glob("*.png")} for folder in (restored, REPO))
    of_browser, of_network = {"tensorboard.png", "page.png"}, {"attention.png", "memory.png"}
    assert back == before - of_browser - of_network
    for name in back:
        old, new = (RESULTS / name).read_bytes(), (restored / "results" / name).read_bytes()
        assert struct.unpack(">II", old[16:24]) == struct.unpack(">II", new[16:24]), name  # width and height
        assert old == new or not SAME_MATPLOTLIB, f"{name}: run python report.py"
        assert 3_000 < len(new) < 250_000, name


def test_without_a_browser_the_picture_of_tensorboard_is_kept_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(pictures, "find_browser", lambda: None)
    for room, name in ((pictures, "draw_glyphs"), (study_pictures, "draw_plates"), (pictures, "draw_everything")):
        monkeypatch.setattr(room, name, lambda *args: None)
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").touch()
    report.main(["--results", str(tmp_path / "results")])
    assert "missing: it needs chromium" in capsys.readouterr().out
    (tmp_path / "results" / "tensorboard.png").write_bytes(b"old")
    report.main(["--results", str(tmp_path / "results"), "--tensorboard"])
    assert "kept as it is" in capsys.readouterr().out
    assert (tmp_path / "results" / "tensorboard.png").read_bytes() == b"old"


def test_results_hold_data_and_pictures_and_no_code():
    assert {path.suffix for path in RESULTS.rglob("*") if path.is_file()} <= {".json", ".csv", ".png", ".md", ".txt"}


def test_a_result_on_glyphs_in_an_omniglot_row_is_refused(run_script, tmp_path):
    (tmp_path / "hw1").mkdir()
    run = json.loads((RESULTS / "hw1" / "K1N2_seed1.json").read_text()) | {"dataset": "glyphs"}
    (tmp_path / "hw1" / "K1N2_seed1.json").write_text(json.dumps(run))
    done = run_script("report.py", "--results", tmp_path)
    one_line_error(done, "K1N2_seed1.json is a result on glyphs", "--dataset glyphs")
    assert not list(tmp_path.glob("*.md")) and not list(tmp_path.glob("*.png"))
    # Named as what it is, it is shown as what it is.
    report.main(["--results", str(tmp_path), "--dataset", "glyphs"])
    assert "**Figures on glyphs, not on Omniglot" in (tmp_path / "README.md").read_text()
    with pytest.raises(UserError, match="is a result on omniglot, its row is of glyphs"):
        evidence.refuse_other_images(RESULTS, "glyphs")


def test_bad_flags_and_files_get_one_line(run_script, tmp_path):
    one_line_error(run_script("report.py", "--results", tmp_path / "nowhere"), "--results", "not a folder")
    with pytest.raises(UserError, match="metrics.json"):
        report.main(["--run", str(tmp_path)])
    (tmp_path / "profile_costs").mkdir()
    (tmp_path / "profile_costs" / "costs.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*costs.json"):
        report.main(["--results", str(tmp_path)])
    with pytest.raises(UserError, match="nothing_known"):
        report.render("<!-- nothing_known -->\n<!-- /nothing_known -->", RESULTS)


# ---------------------------------------------------------------------------------- intervals


def runs(*accuracies, half=0.01):
    return [{"test_accuracy": a, "ci95": half, "num_test_tasks": 600} for a in accuracies]


def test_where_seeds_agree_the_interval_is_over_tasks_and_does_not_shrink_with_seeds():
    assert evidence.interval(runs(0.919, 0.92, 0.921)) == (pytest.approx(92), pytest.approx(1.0), "600 tasks")
    assert evidence.interval(runs(0.92))[1:] == (pytest.approx(1.0), "600 tasks")


def test_where_seeds_differ_by_more_the_interval_is_over_seeds():
    """The textbook's example by hand: mean 0.9, s = 0.02, n = 3, t = 4.303."""
    mean, half, over = evidence.interval(runs(0.88, 0.90, 0.92, half=0.003))
    assert (mean, over) == (pytest.approx(90), "3 seeds")
    assert half == pytest.approx(100 * 4.303 * 0.02 / math.sqrt(3))
    # The border is the tasks' standard error.
    assert evidence.interval(runs(0.88, 0.90, 0.92, half=1.96 * 0.0201))[2] == "600 tasks"


def test_students_t_by_integration():
    """The table's points leave 2.5 % above them (Simpson's rule on the density of t)."""
    for n, t in evidence.STUDENT.items():
        nu, steps = n - 1, 20_000
        density = lambda x, nu=nu: (
            math.gamma((nu + 1) / 2)
            / math.sqrt(nu * math.pi)
            / math.gamma(nu / 2)
            * (1 + x * x / nu) ** (-(nu + 1) / 2)
        )
        h = t / steps
        weights = [1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1)]
        half = sum(w * density(i * h) for i, w in enumerate(weights)) * h / 3
        assert 0.5 - half == pytest.approx(0.025, abs=2e-5), n


def test_rows_say_what_they_are():
    rows = {row["what"]: row for row in tables.claim_rows(RESULTS)}
    fine = rows["Fine-tuning, 423-way"]
    assert fine["over"] == "2,115 drawings"  # five held-out drawings of each of 423 characters, not 600 tasks
    assert rows["MANN, 1-shot 4-way"]["over"] == "3 seeds"
    of_maml = {what: row for what, row in rows.items() if "MAML" in what or what.startswith("ANIL")}
    assert len(of_maml) > 5
    for what, row in of_maml.items():
        assert ("after a prototype warm-up" in what) == evidence.warmed_up(evidence.load(RESULTS, row["name"])[0])
        assert ("from scratch" in what) == row["name"].endswith("_scratch")
    assert all(
        "Vinyals" in row["published"]
        for what, row in rows.items()
        if what.startswith("ProtoNet") and row["published"][:2] == "98"
    )
    assert evidence.warmed_up({"script": "maml", "flags": {"warmup_steps": 4000}})
    assert not evidence.warmed_up({"script": "maml", "flags": {"warmup_steps": 0}})
    assert evidence.warmed_up({"script": "maml", "flags": {"warmup_steps": 0, "init_from": "runs/protonet"}})
    assert not evidence.warmed_up({"script": "hw1"})


def test_what_is_not_measured_is_said(tmp_path):
    page = report.page(tmp_path)
    assert page.count("| not measured |") == len(tables.CLAIMS)


def made_up(folder: Path, name: str, **figures) -> None:
    """A result file of METHOD/CASE, with figures that no run has."""
    common = json.loads((RESULTS / "maml" / "maml_seed1.json").read_text())
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / f"{name}_seed1.json").write_text(json.dumps(common | figures))


def test_rows_of_the_published_protocol_and_from_scratch_appear_when_they_are_measured(tmp_path):
    assert tables.vinyals_table(tmp_path) == "" and tables.inner_loop_text(tmp_path) == ""
    before = report.page(tmp_path)
    assert "scratch" not in before and "published protocol" not in before
    made_up(tmp_path, "maml/vinyals_20way1shot", test_accuracy_transductive=0.9571, test_accuracy_support=0.9432)
    of_protonet = {"script": "protonet", "num_test_tasks": 2000}
    for N, K, value in ((5, 1, 0.981), (5, 5, 0.991), (20, 1, 0.951), (20, 5, 0.981)):
        for mode, more in (("", 0), ("_transductive", 0.004)):
            of_protonet[f"test_accuracy_{N}way{K}shot{mode}"] = value + more
            of_protonet[f"ci95_{N}way{K}shot{mode}"] = 0.002
    made_up(tmp_path, "protonet/vinyals", **of_protonet)
    text = tables.vinyals_table(tmp_path)
    assert text.count("| ProtoNet, ") == 4 and text.count("MAML after a prototype warm-up, ") == 1
    assert "| ProtoNet, 20-way 1-shot | 96.0 (non-transductive) | 95.5 ± 0.2 | 95.1 ± 0.2 | 1 |" in text
    assert re.search(r"20-way 1-shot \| 95.8 \(transductive\) \| 95.7 ± \S+ \| 94.3 ± ", text)
    assert text in report.page(tmp_path) and "not measured" not in text
    made_up(tmp_path, "maml/maml_scratch", flags={"warmup_steps": 0})
    assert "| MAML, 5-way 1-shot, from scratch |" in report.page(tmp_path)


def test_the_inner_loop_is_drawn_of_the_rows_that_tell_it(tmp_path):
    made_up(tmp_path, "maml/fomaml")  # an older result, which does not tell it
    pictures.draw_inner_loop(tmp_path)
    assert not (tmp_path / "inner_loop.png").exists() and tables.inner_loop_text(tmp_path) == ""
    layers = ("conv1", "conv2", "conv3", "conv4", "head")
    moved = {name: dict(zip(layers, values, strict=True)) for name, values in {
        "maml": (1e-4, 2e-4, 3e-4, 4e-3, 0.5), "anil": (0.0, 0.0, 0.0, 0.0, 0.5),
        "fomaml_scratch": (0.03, 0.04, 0.05, 0.06, None)}.items()}  # fmt: skip
    for name, values in moved.items():
        flags = {"flags": {"warmup_steps": 0}} if name.endswith("scratch") else {}
        made_up(tmp_path, f"maml/{name}", update_norm_per_layer=values, **flags)
    assert list(pictures.inner_loops(tmp_path)) == list(moved)
    pictures.draw_inner_loop(tmp_path)
    first = (tmp_path / "inner_loop.png").read_bytes()
    assert len(first) > 8_000
    pictures.draw_inner_loop(tmp_path)
    assert (tmp_path / "inner_loop.png").read_bytes() == first
    text = tables.inner_loop_text(tmp_path)
    assert "| MAML after a prototype warm-up | 2" in text and "| 1.0e-04 | 2.0e-04 | 3.0e-04 | 4.0e-03 |" in text
    assert "| 0 | 0 | 0 | 0 | 5.0e-01 |" in text and "| First-order MAML from scratch |" in text
    assert text.count("| - |") == 1


OF_MAE = {f"{kind}{way}": value
          for way, value in (("", 0.97), ("_one_view", 0.96), ("_plain", 0.95), ("_linear", 0.969),
                             ("_untrained", 0.61), ("_untrained_plain", 0.44))
          for kind, value in (("test_accuracy", value), ("ci95", 0.004))} | {
    "script": "mae", "contrast": 0.3, "mask_ratio": 0.5, "probe_accuracy": 0.85, "probe_ci95": 0.015,
    "flags": {"held_out": 5}, "command": "python mae.py", "num_test_tasks": 600}  # fmt: skip


def made_up_vit(folder: Path, name: str, seed: int, accuracies: list[float], **figures) -> None:
    """A run of protonet.py among those of mae/."""
    (folder / "mae").mkdir(exist_ok=True)
    run = json.loads((RESULTS / "protonet" / "default_seed1.json").read_text())
    run |= {"seed": seed, "accuracies": accuracies, "test_accuracy": sum(accuracies) / len(accuracies), "ci95": 0.01}
    run |= {"command": f"python protonet.py --init_from runs/somewhere_{seed} --random_seed {seed}", "curves": {}}
    run |= figures
    (folder / "mae" / f"{name}_seed{seed}.json").write_text(json.dumps(run))


def made_up_mae(folder: Path, name: str, **figures) -> None:
    made_up(folder, f"mae/{name}", **OF_MAE | figures)


def test_the_transformers_of_protonet_stand_beside_the_auto_encoder_and_not_among_its_rows(tmp_path):
    for text in (findings.few_labels_text, findings.masks_text, findings.mae_lessons):
        assert text(tmp_path) == ""
    for seed in (1, 2):
        made_up_vit(tmp_path, "vit_50_characters", seed, [0.8, 0.9, 1.0, 0.9])
        made_up_vit(tmp_path, "vit_50_characters_from_mae", seed, [0.9, 1.0, 1.0, 1.0])
    made_up_vit(tmp_path, "vit_1100_characters", 1, [1.0, 0.9, 1.0, 0.9])
    assert findings.mae_table(tmp_path) == "Not measured." and "Masked" not in report.page(tmp_path)
    assert list(study_pictures.few_labels(tmp_path)) == [50, 1100]  # nothing is made of 200
    made_up_mae(tmp_path, "mae")
    rows = [line for line in findings.mae_table(tmp_path).splitlines() if line.startswith("| ")]
    assert len(rows) == 2 and rows[1].startswith("| mae | 50 % | yes | 97.0 ± 0.4 | 96.0 ± 0.4 | 95.0 ± 0.4 |")
    assert "| Masked auto-encoding, 5-way 1-shot, no label in training |" in tables.front_table(tmp_path)
    text = findings.few_labels_text(tmp_path)
    # Each task is 0.1, 0.1, 0, 0.1 better: 7.5 points, standard error 2.5, and the seeds agree.
    assert "| 50 | 90.0 ± 1.0 | 90.0, 90.0 | 97.5 ± 1.0 | 97.5, 97.5 | +7.5 ± 4.9 |  |" in text
    assert "| 1,100 | 95.0 ± 1.0 | 95.0 |  |  |  |  |" in text  # a start that was not measured leaves its cells empty
    assert "--init_from RUN_DIR --random_seed 1" in text and "somewhere" not in text
    assert "answer 97.0 ± 0.4 %" in text and "labelled characters: more than 50 and 1,100." in text
    assert "+7.5 ± 4.9 points with 50 labelled" in text and "lost on the way" not in text
    made_up_vit(tmp_path, "vit_200_characters", 1, [0.97, 0.98])  # 97.5 ± 1.0 is not apart from 97.0 ± 0.4
    curve = {"curves": {"Accuracy/val": [[250, 0.92], [500, 0.81], [750, 0.95]]}}
    made_up_vit(tmp_path, "vit_50_characters_from_mae", 1, [0.9, 1.0, 1.0, 1.0], **curve)
    text = findings.few_labels_text(tmp_path)
    assert "more than 50 and 1,100; within the intervals of 200." in text
    assert "With 50 the start is lost" in text and "92.0 % at step 250 of that training and 81.0 % at step 500" in text


def test_gains_are_of_the_same_tasks_and_seeds():
    run = lambda seed, *accuracies: {"seed": seed, "accuracies": list(accuracies), "device": "cpu, 2 threads"}
    assert findings.gain([run(1, 0.5, 0.7)], [run(2, 0.4, 0.6)]) == ""
    assert findings.gain([run(1, 0.5, 0.7)], [run(1, 0.4, 0.6) | {"device": "NVIDIA H200"}]) == ""
    assert findings.gain([run(1, 0.5, 0.7), run(3, 0.0, 0.0)], [run(1, 0.6, 0.8)]) == "-10.00 ± 0.00"


def test_the_picture_of_reconstructions_is_drawn_from_the_kept_drawings(tmp_path):
    assert findings.reconstructions_text(tmp_path) == ""
    sheet = np.full((3 * 30, 12 * 30), 255, np.uint8)
    sheet[30:60, ::2] = 128
    kept = base64.b64encode(iio.imwrite("<bytes>", sheet, extension=".png")).decode()
    figures = {"reconstruction": kept, "test_error": 0.41, "steps": 600}
    made_up_mae(tmp_path, "mae")  # measured before drawings were kept
    study_pictures.draw_reconstructions(tmp_path)
    assert findings.reconstructions_text(tmp_path) == "" and not (tmp_path / "mae_reconstruction.png").exists()
    made_up_mae(tmp_path, "mae_1000_steps", **figures | {"steps": 1000})
    made_up_mae(tmp_path, "mae_alone_75_masked", **figures | {"contrast": 0.0, "mask_ratio": 0.75})
    made_up_mae(tmp_path, "mae_75_masked", **figures | {"mask_ratio": 0.75})  # only there for its ratio
    titles = list(map(study_pictures.reconstruction_title, study_pictures.reconstructed(tmp_path)))
    assert titles == ["75 % hidden; masked auto-encoding alone, 600 steps", "50 % hidden; both losses, 1,000 steps"]
    study_pictures.draw_reconstructions(tmp_path)
    assert len((tmp_path / "mae_reconstruction.png").read_bytes()) > 5_000
    text = findings.reconstructions_text(tmp_path)
    assert "mae_reconstruction.png" in text and f"0.41 ({titles[0]}); 0.41 ({titles[1]})." in text


def test_pictures_of_the_auto_encoder_are_drawn_where_it_is_measured(tmp_path):
    labels, masks = tmp_path / "mae_labels.png", tmp_path / "mae_masks.png"
    study_pictures.draw_mae(tmp_path)
    made_up_mae(tmp_path, "mae")
    made_up_mae(tmp_path, "mae_alone_75_masked", contrast=0.0, mask_ratio=0.75, test_accuracy=0.7)
    study_pictures.draw_mae(tmp_path)  # two ratios, but neither curve has two
    assert not labels.exists() and not masks.exists() and findings.masks_text(tmp_path) == ""
    made_up_mae(tmp_path, "mae_alone_25_masked", contrast=0.0, mask_ratio=0.25, test_accuracy=0.65)
    study_pictures.draw_mae(tmp_path)
    assert masks.exists() and not labels.exists()
    text = findings.masks_text(tmp_path)
    assert "without the second loss best 70.0 ± 0.4 % at 75 % masked, worst 65.0 ± 0.4 % at 25 %" in text
    made_up_vit(tmp_path, "vit_200_characters_from_mae", 1, [0.9, 1.0])
    study_pictures.draw_mae(tmp_path)
    first = labels.read_bytes()
    study_pictures.draw_mae(tmp_path)
    assert len(first) > 8_000 and labels.read_bytes() == first
    for text in (findings.few_labels_text(tmp_path), findings.masks_text(tmp_path)):
        (picture,) = re.findall(r"results/(\w+\.png)", text)
        assert (tmp_path / picture).exists()


def test_memories_stand_side_by_side_with_what_is_measured_of_them(tmp_path):
    empty = tables.memories_table(tmp_path)
    assert empty.count("| `") == 4 and "training step" not in empty and "LSTM answers" not in empty
    assert tables.sights_table(tmp_path) == ""
    lstm = json.loads((RESULTS / "hw1" / "conv_K1N5_seed1.json").read_text())
    lstm |= {"test_accuracy": 0.967, "ci95": 0.002, "test_accuracy_alone": 0.9498, "ci95_alone": 0.002}
    lstm |= {"device": "cpu, 1 threads", "processor": "AMD EPYC, AVX512"}
    attention = lstm | {"test_accuracy": 0.99, "ci95": 0.001, "test_accuracy_alone": 0.99, "ci95_alone": 0.001}
    attention |= {"device": "NVIDIA H200", "parameters": 186952}
    for name, run in (("hw1/K1N2", lstm), ("hw1/conv_K1N5", lstm), ("attention/K1N5", attention)):
        made_up(tmp_path, name, **run)
    race = {"title": "mann, B 128, K 1, N 5, hidden 128", "device": "cpu, 2 threads", "processor": "AMD EPYC, AVX512"}
    times = {"lstm": 4, "attention": 7}
    race |= {f"{memory}, 64 features an image": {"ms": ms, "ratio": 1} for memory, ms in times.items()}
    race["megabytes_kept"] = {"lstm": 30.2, "attention": 52.1}
    (tmp_path / "speed.json").write_text(json.dumps([race]))
    text = tables.memories_table(tmp_path)
    assert "| 4.0 ms, 30 MB | 96.7 ± 0.2 | 95.0 ± 0.2 |" in text and "| 7.0 ms, 52 MB | 99.00 ± 0.10 |" in text
    assert "1.7 points" in text and "errs 5.0 times as often as attention" in text  # 5.02 % against 1.00 %
    assert "52.1" not in report.speed_table(tmp_path)  # bytes are no contestant
    rows = [line for line in tables.mann_table(tmp_path).splitlines() if "attention" in line or "conv" in line]
    assert rows[0].endswith("(1 thread of AMD EPYC) |") and rows[1].endswith("(NVIDIA H200) |")
    assert "| 5-way 1-shot, attention | - | 99.07 (SNAIL, Vinyals' split) | 99.00 ± 0.10 |" in rows[1]
    sequence = lstm | {"accuracy_by_sight": [i / 10 for i in range(10)], "ci95_by_sight": [0.01] * 10}
    made_up(tmp_path, "external_memory/external", **sequence)
    text = tables.sights_table(tmp_path)
    assert "| external memory, the paper | 36.4 | 82.8 | 91.0 | 94.9 | 98.1 |" in text and "LSTM" not in text
    assert "| external memory, ours | 0.0 ± 1.0 | 10.0 ± 1.0 | 20.0 ± 1.0 | 40.0 ± 1.0 | 90.0 ± 1.0 | 1 |" in text


def test_other_peoples_digits_stand_in_a_table_and_a_picture_of_what_is_measured(tmp_path):
    assert findings.mnist_text(tmp_path) == "(not measured yet)"
    study_pictures.draw_mnist(tmp_path)
    assert not (tmp_path / "mnist.png").exists()
    figures = {"dataset": "mnist", "test_accuracy": 0.912, "ci95": 0.004}
    for K in (1, 5):
        made_up(tmp_path, f"protonet/mnist_{K}shot", **figures)
    made_up(tmp_path, "meta_lstm/mnist_10shot", **figures | {"test_accuracy_sgd": 0.83, "ci95_sgd": 0.005})
    text = findings.mnist_text(tmp_path)
    assert "| ProtoNet | 91.2 ± 0.4 | 91.2 ± 0.4 |  |  | 1 |" in text and "attempt" not in text
    assert "NAME is, row by row, `protonet/mnist_`, `meta_lstm/mnist_`." in text
    study_pictures.draw_mnist(tmp_path)
    half = (tmp_path / "mnist.png").read_bytes()
    of_reset = {"test_accuracy": 0.31, "ci95": 0.006, "test_accuracy_sgd": 0.27, "ci95_sgd": 0.007}
    made_up(tmp_path, "meta_lstm/mnist_reset_10shot", **figures | of_reset)
    for name, more in (("10way10shot", {"test_accuracy": 0.963}), ("10way10shot_reset", of_reset)):
        made_up(tmp_path, f"meta_lstm/{name}", **{"test_accuracy_sgd": 0.95, "ci95_sgd": 0.005, "ci95": 0.003} | more)
    text = findings.mnist_text(tmp_path)
    for figure in ("31.0 ± 0.6 %, gradient", "31.0 ± 0.6 and 96.3 ± 0.3 %", "91.2 ± 0.4; on Omniglot", "27.0 ± 0.7,"):
        assert figure in text, figure
    assert "fewer shots" not in text
    for start in ("", "reset_"):
        made_up(tmp_path, f"meta_lstm/mnist_{start}1shot", **figures | of_reset | {"test_accuracy": 0.21})
    assert "with one, 21.0 ± 0.6 % from the learned" in findings.mnist_text(tmp_path)
    study_pictures.draw_mnist(tmp_path)
    assert len((tmp_path / "mnist.png").read_bytes()) > len(half) > 8_000
    evidence.refuse_other_images(tmp_path, "omniglot")
    made_up(tmp_path, "maml/mnist_1shot", dataset="omniglot")
    with pytest.raises(UserError, match="mnist_1shot_seed1.json is a result on omniglot, its row is of mnist"):
        evidence.refuse_other_images(tmp_path, "omniglot")


def test_lakes_trials_are_a_row_once_they_are_measured(tmp_path):
    old = {"script": "protonet", "num_test_tasks": 2000, "test_accuracy_one_drawer": 0.9, "ci95_one_drawer": 0.004}
    made_up(tmp_path, "protonet/lake", **old)
    assert "official trials" not in report.page(tmp_path)
    made_up(tmp_path, "protonet/lake", **old | {"test_accuracy_lake_runs": 0.981, "ci95_lake_runs": 0.012})
    row = next(line for line in report.page(tmp_path).splitlines() if "official trials" in line)
    assert "| 98.1 ± 1.2 | 20 runs of 20 trials |" in row and "BPL" in row


def test_the_processor_is_named_shortly():
    intel = {"device": "cpu, 2 threads", "processor": "Intel(R) Xeon(R) Processor @ 2.80GHz, AVX512"}
    assert evidence.processor(intel) == "2 threads of Intel Xeon"
    assert evidence.processor({"device": "cpu, 1 threads"}) == "1 thread of AMD EPYC"
    narrow = {"device": "cpu, 1 threads", "processor": "AMD EPYC, AVX2"}
    assert evidence.processor(narrow) == "1 thread of AMD EPYC with AVX2"
    assert evidence.processor({"device": "NVIDIA H100"}) == "NVIDIA H100"


# ----------------------------------------------------------------------------------- pictures


def test_a_run_is_drawn_from_its_metrics(tmp_path):
    common = ["--smoke", "--log_dir", str(tmp_path), "--run_name"]
    hw1.main([*common, "mann", "--dataset", "glyphs", "--device", "cpu", "--train_steps", "4", "--eval_freq", "2"])
    feature_weights.main([*common, "alias", "--part", "alias", "--alias_steps", "300"])
    feature_weights.main([*common, "logistic", "--part", "logistic", "--train_steps", "4", "--eval_freq", "2"])
    profile_costs.main([*common, "sine", "--train", "--method", "maml"])
    for name in ("mann", "alias", "logistic", "sine"):
        report.main(["--run", str(tmp_path / name)])
        first = (tmp_path / name / "figure.png").read_bytes()
        assert len(first) > 8_000
        report.main(["--run", str(tmp_path / name)])
        assert (tmp_path / name / "figure.png").read_bytes() == first
    (tmp_path / "mann" / "metrics.json").write_text(json.dumps({"script": "hw1"}))
    with pytest.raises(UserError, match="holds no curves"):
        report.main(["--run", str(tmp_path / "mann")])


# ---------------------------------------------------------------------------------- documents


def test_the_front_door_is_small():
    assert (REPO / "README.md").stat().st_size <= 12_500


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        drawn_later = target.endswith(".png") and not list(RESULTS.glob(f"{page.stem}/*.json"))  # not measured yet
        assert target.startswith("http") or (page.parent / target).exists() or drawn_later, target


def test_every_figure_of_metrics_json_is_explained():
    """Each name in a committed result stands on its script's page or on that of the run folder."""
    common = (REPO / "docs" / "experiment.md").read_text()
    for file in RESULTS.glob("*/*_seed1.json"):
        run = json.loads(file.read_text())
        page = common + (REPO / "docs" / f"{run['script']}.md").read_text()
        known = lambda name, page=page: any(f"{text}`" in page for text in (f"`{name}", name.split("_")[-1]))
        unknown = [name for name in run if not known(name) and not known(name.removesuffix("_ci95"))]
        assert not unknown, f"docs/{run['script']}.md does not explain {unknown}"


def test_every_tag_of_tensorboard_is_explained():
    common = (REPO / "docs" / "experiment.md").read_text()
    for page in (REPO / "docs").glob("*.md"):
        script = REPO / f"{page.stem}.py"
        if script.exists():
            kinds = "Loss|Accuracy|Adaptation|Rates|Gradient|Memory|Time|Support|Gate_forget|Gate_input|Weights|Error"
            for tag in re.findall(rf'"((?:{kinds})/\w+)"', script.read_text()):
                assert tag in page.read_text() + common, f"docs/{page.name} does not explain {tag}"


def test_every_script_stands_in_the_tree():
    readme = (REPO / "README.md").read_text()
    assert not [path.name for path in Path(REPO).glob("*.py") if path.name not in readme]


def test_the_measured_line_of_a_script_is_that_of_the_table():
    rows = {row["name"]: row for row in tables.claim_rows(RESULTS)}
    for script, name in {
        "protonet": "protonet/default",
        "maml": "maml/maml",
        "meta_lstm": "meta_lstm/5way1shot",
    }.items():
        text = (REPO / f"{script}.py").read_text().split('"""')[1]
        assert rows[name]["ours"] in text and f"{rows[name]['minutes']} minutes" in text and f"docs/{script}.md" in text
    if "mae/mae" in rows:
        assert f"5-way 1-shot {rows['mae/mae']['ours']} %" in (REPO / "mae.py").read_text().split('"""')[1]
    for script in ("hw1", "transfer", "profile_costs", "feature_weights"):
        assert f"docs/{script}.md" in (REPO / f"{script}.py").read_text().split('"""')[1]
    trained = json.loads((RESULTS / "profile_costs" / "costs_train.json").read_text())
    assert (
        f"ES {trained['es']['test_loss']:.4f} ± {trained['es']['ci95']:.4f}" in (REPO / "profile_costs.py").read_text()
    )
