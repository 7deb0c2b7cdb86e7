"""studies/: the documents are those of the result files, come back when deleted, and never mix data sets."""

from fewshot.experiment import UserError

import base64
import json
import math
import os
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import matplotlib
import numpy as np
import pytest
from conftest import REPO, one_line_error

import feature_weights
import hw1
import profile_costs
from studies import attention, comparison, external_memory, mae, maml, report, results, speed
from studies import hw1 as hw1_study

RESULTS = REPO / "results"
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
MADE_ELSEWHERE = {
    "hw1/tensorboard",
    "predict/page",
    "attention/attention",
    "external_memory/memory",
}  # browser, network
SAME_MATPLOTLIB = f"Matplotlib version{matplotlib.__version__},".encode() in (RESULTS / "hw1/mann.png").read_bytes()


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """A copy of the documents whose tables, quoted numbers and pictures were all deleted, after the report."""
    here = tmp_path_factory.mktemp("repo")
    if os.environ.get("RECORD"):
        pytest.skip("results are being written anew; python reproduce.py report then brings the documents along")
    shutil.copytree(RESULTS, here / "results")
    shutil.copytree(REPO / "docs", here / "docs")
    shutil.copy(REPO / "README.md", here)
    for file in [*(here / "results").glob("*/*.png"), *(here / "results").glob("*/runs.csv")]:
        if str(file.relative_to(here / "results").with_suffix("")) not in MADE_ELSEWHERE:
            file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "HERE", here)
        patch.setattr(hw1_study, "find_browser", lambda: None)
        for page in report.documents():
            emptied = re.sub(report.TABLE, lambda m: m[0].splitlines()[0] + f"\ngone\n<!-- /{m[1]}.{m[2]} -->",
                             page.read_text(), flags=re.DOTALL)  # fmt: skip
            page.write_text(re.sub(report.QUOTE, lambda m: "?" + m[0][m[0].index("<!--") :], emptied))
        assert (here / "docs" / "mae.md").read_text().count("?<!--") > 10
        report.main(["--results", str(here / "results")])
    return here


@pytest.mark.thorough
def test_every_table_and_quoted_number_comes_back_bit_for_bit(restored):
    for page in [*DOCUMENTS, RESULTS / "README.md", *RESULTS.glob("*/runs.csv")]:
        same = (restored / page.relative_to(REPO)).read_bytes() == page.read_bytes()
        assert same, f"{page}: run python reproduce.py report"


@pytest.mark.thorough
def test_every_picture_comes_back(restored):
    names = [
        {path.relative_to(folder) for path in folder.glob("*/*.png")} for folder in (restored / "results", RESULTS)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        old, new = (RESULTS / name).read_bytes(), (restored / "results" / name).read_bytes()
        assert struct.unpack(">II", old[16:24]) == struct.unpack(">II", new[16:24]), name  # width and height
        assert old == new or not SAME_MATPLOTLIB, f"{name}: run python reproduce.py report"
        assert 3_000 < len(new) < 250_000, name


def test_without_a_browser_the_picture_of_tensorboard_is_kept_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(hw1_study, "find_browser", lambda: None)
    (tmp_path / "results" / "hw1").mkdir(parents=True)
    for page in ("README.md", "results/README.md"):
        (tmp_path / page).touch()
    report.main(["--results", str(tmp_path / "results")])
    assert "missing: it needs chromium" in capsys.readouterr().out
    picture = tmp_path / "results" / "hw1" / "tensorboard.png"
    picture.write_bytes(b"old")
    report.main(["--results", str(tmp_path / "results"), "--tensorboard"])
    assert "kept as it is" in capsys.readouterr().out
    assert picture.read_bytes() == b"old"


def test_results_hold_data_and_pictures_and_no_code():
    assert {path.suffix for path in RESULTS.rglob("*") if path.is_file()} <= {".json", ".csv", ".png", ".md", ".txt"}


def test_a_result_on_glyphs_in_an_omniglot_row_is_refused(run_script, tmp_path):
    (tmp_path / "hw1").mkdir()
    run = json.loads((RESULTS / "hw1" / "K1N2_seed1.json").read_text()) | {"dataset": "glyphs"}
    (tmp_path / "hw1" / "K1N2_seed1.json").write_text(json.dumps(run))
    done = run_script("reproduce.py", "report", "--results", tmp_path)
    one_line_error(done, "K1N2_seed1.json is a result on glyphs", "--dataset glyphs")
    assert not list(tmp_path.rglob("*.md")) and not list(tmp_path.rglob("*.png"))
    # Named as what it is, it is shown as what it is.
    report.main(["--results", str(tmp_path), "--dataset", "glyphs"])
    page = (tmp_path / "README.md").read_text()
    assert "**Figures on glyphs, not on Omniglot" in page
    assert "| MANN, 1-shot 2-way | above 90 | - | 96.5 ± 0.3 |" in page
    assert "![hw1, mann](hw1/mann.png)" in page and (tmp_path / "hw1" / "mann.png").exists()
    with pytest.raises(UserError, match="is a result on omniglot, its row is of glyphs"):
        results.refuse_other_images(RESULTS, "glyphs")


def test_bad_flags_and_files_get_one_line(run_script, tmp_path):
    done = run_script("reproduce.py", "report", "--results", tmp_path / "nowhere")
    one_line_error(done, "--results", "not a folder")
    with pytest.raises(UserError, match="metrics.json"):
        report.main(["--run", str(tmp_path)])
    (tmp_path / "costs.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*costs.json"):
        report.main(["--results", str(tmp_path)])


# ------------------------------------------------------------------------------ rooms and quotes


def test_a_room_that_has_only_rows_has_a_table(monkeypatch):
    """Rooms are found by listing the folder: a new one is shown without being named anywhere."""
    assert results.rooms().keys() >= {path.stem for path in (REPO / "studies").glob("*.py")} - {"__init__"}
    room = SimpleNamespace(ROWS=[results.Row("Nearest mean, 5-way 1-shot", "default", front=True)])
    for module in (report, comparison):
        monkeypatch.setattr(module, "rooms", lambda: {"protonet": room})
    text = report.render("Words.\n<!-- protonet.rows -->\n<!-- /protonet.rows -->\nMore.\n", RESULTS)
    assert re.search(r"Words.\n.*\| Nearest mean, 5-way 1-shot \| - \| - \| 98.93 ± 0.11 \|", text, re.DOTALL)
    assert text.endswith("<!-- /protonet.rows -->\nMore.\n") and report.render(text, RESULTS) == text
    assert "| Nearest mean, 5-way 1-shot |" in comparison.front(RESULTS) and "protonet.md)" in comparison.front(RESULTS)


@pytest.mark.parametrize("marker", ["nothing.known", "mae.nothing", "mae.load", "mae.new_figure", "speed.rows"])
def test_a_marker_that_names_no_function_of_the_room_is_refused(marker):
    with pytest.raises(UserError, match=f"<!-- {marker} -->"):
        report.render(f"<!-- {marker} -->\n<!-- /{marker} -->", RESULTS)


@pytest.mark.parametrize(
    ("before", "source", "after"),
    [
        ("?", "a/case:test_accuracy", "90.0 ± 10.0"),
        ("about ?", "a/case:test_accuracy", "about 90.0 ± 10.0"),
        ("(12.3 ± 0.45", "a/case:test_accuracy", "(90.0 ± 10.0"),
        ("5-way 98.1 ± 2", "a/case:test_accuracy", "5-way 90.0 ± 10.0"),
        ("-0.5", "a/case:test_accuracy:.0%", "90"),
        ("1.2e-30", "a/file.json:deep.1.small:.1e", "2.5e-31"),
        ("7,", "a/file.json:deep.0:,", "12,345"),
    ],
)
def test_a_quoted_number_is_written_before_its_source(before, source, after, tmp_path):
    (tmp_path / "a").mkdir()
    for seed, value in enumerate((0.88, 0.92), start=1):
        run = {"test_accuracy": value, "ci95": 0.1, "num_test_tasks": 600}
        (tmp_path / "a" / f"case_seed{seed}.json").write_text(json.dumps(run))
    (tmp_path / "a" / "file.json").write_text(json.dumps({"deep": [12345, {"small": 2.5e-31}]}))
    text = report.render(f"It is {before}<!-- {source} --> % here, 3.", tmp_path)
    assert text == f"It is {after}<!-- {source} --> % here, 3."


@pytest.mark.parametrize("source", ["hw1/K1N2:nothing", "hw1/nothing:test_accuracy", "speed.json:9999.ms:d",
                                    "hw1/K1N2:command:.1%", "nothing.json:key"])  # fmt: skip
def test_a_number_that_the_results_lack_is_refused_with_its_place(source):
    with pytest.raises(UserError, match="mend the document|cannot read"):
        report.render(f"?<!-- {source} -->", RESULTS)


def test_no_document_has_an_empty_quote_or_an_old_marker():
    for page in report.documents():
        text = page.read_text()
        assert "?<!--" not in text and "(not measured)" not in text, page
        markers = re.findall(r"<!-- (.*?) -->", re.sub(report.QUOTE, "", re.sub(report.TABLE, "", text, flags=re.S)))
        assert not [m for m in markers if "`" not in m and not m.startswith(("room.", "/room."))] or page.name in (
            "reproduce.md", "add_a_method.md"), page  # fmt: skip


# ---------------------------------------------------------------------------------- intervals


def runs(*accuracies, half=0.01):
    return [{"test_accuracy": a, "ci95": half, "num_test_tasks": 600} for a in accuracies]


def test_where_seeds_agree_the_interval_is_over_tasks_and_does_not_shrink_with_seeds():
    assert results.interval(runs(0.919, 0.92, 0.921)) == (pytest.approx(92), pytest.approx(1.0), "600 tasks")
    assert results.interval(runs(0.92))[1:] == (pytest.approx(1.0), "600 tasks")


def test_where_seeds_differ_by_more_the_interval_is_over_seeds():
    """The textbook's example by hand: mean 0.9, s = 0.02, n = 3, t = 4.303."""
    mean, half, over = results.interval(runs(0.88, 0.90, 0.92, half=0.003))
    assert (mean, over) == (pytest.approx(90), "3 seeds")
    assert half == pytest.approx(100 * 4.303 * 0.02 / math.sqrt(3))
    # The border is the tasks' standard error.
    assert results.interval(runs(0.88, 0.90, 0.92, half=1.96 * 0.0201))[2] == "600 tasks"


def test_students_t_by_integration():
    """The table's points leave 2.5 % above them (Simpson's rule on the density of t)."""
    for n, t in results.STUDENT.items():
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
    found = {row.what: (room, row) for room, row in comparison.listed("ROWS")}
    cells = {what: comparison.cells(RESULTS, *pair) for what, pair in found.items()}
    fine = cells["Fine-tuning, 423-way"]
    assert fine["over"] == "2,115 drawings"  # five held-out drawings of each of 423 characters, not 600 tasks
    assert cells["MANN, 1-shot 4-way"]["over"] == "3 seeds"
    assert len(maml.ROWS) > 5
    for row in maml.ROWS:
        warmed = results.warmed_up(results.load(RESULTS, f"maml/{row.case}")[0])
        assert ("after a prototype warm-up" in cells[row.what]["what"]) == warmed != ("from scratch" in row.what)
        assert ("from scratch" in row.what) == row.case.endswith("_scratch")
    protonet = [row for _, row in found.values() if row.what.startswith("ProtoNet") and row.published[:2] == "98"]
    assert protonet and all("Vinyals" in row.published for row in protonet)
    assert results.warmed_up({"script": "maml", "flags": {"warmup_steps": 4000}})
    assert not results.warmed_up({"script": "maml", "flags": {"warmup_steps": 0}})
    assert results.warmed_up({"script": "maml", "flags": {"warmup_steps": 0, "init_from": "runs/protonet"}})
    assert not results.warmed_up({"script": "hw1"})


def test_what_is_not_measured_is_said(tmp_path):
    assert comparison.everything(tmp_path).count("| not measured |") == len(comparison.listed("ROWS")) > 40
    texts = [comparison.vinyals, comparison.paired, comparison.mnist, comparison.others, maml.inner_loop, mae.features]
    texts += [mae.labels, attention.beyond, external_memory.sights, speed.races, speed.growth]
    assert {text(tmp_path) for text in texts} == {"(not measured)"}
    assert not [path for name in results.rooms() for path in results.draw(name, tmp_path)]


def made_up(folder: Path, case: str, like: str = "maml/maml", **figures) -> None:
    """A result file of a case, with figures that no run has."""
    common = json.loads((RESULTS / f"{like}_seed1.json").read_text())
    (folder / case).parent.mkdir(exist_ok=True)
    (folder / f"{case}_seed{figures.get('seed', 1)}.json").write_text(json.dumps(common | figures))


def test_rows_of_the_published_protocol_stand_beside_the_published_figures(tmp_path):
    made_up(tmp_path, "maml/vinyals_20way1shot", test_accuracy_transductive=0.9571, test_accuracy_support=0.9432)
    of_protonet = {"script": "protonet", "num_test_tasks": 2000}
    for N, K, value in ((5, 1, 0.981), (5, 5, 0.991), (20, 1, 0.951), (20, 5, 0.981)):
        for mode, more in (("", 0), ("_transductive", 0.004)):
            of_protonet[f"test_accuracy_{N}way{K}shot{mode}"] = value + more
            of_protonet[f"ci95_{N}way{K}shot{mode}"] = 0.002
    made_up(tmp_path, "protonet/vinyals", **of_protonet)
    text = comparison.vinyals(tmp_path)
    assert text.count("| ProtoNet, ") == 4 and text.count("MAML after a prototype warm-up, ") == 1
    assert "| ProtoNet, 20-way 1-shot | 96.0 (non-transductive) | 95.5 ± 0.2 | 95.1 ± 0.2 | 1 |" in text
    assert re.search(r"20-way 1-shot \| 95.8 \(transductive\) \| 95.7 ± \S+ \| 94.3 ± ", text)


def test_differences_are_of_the_same_tasks(tmp_path):
    """Seeds are averaged first; a network that was asked other tasks, by its shape or its device, has no row."""
    shape = {"N": 5, "K": 1, "Q": 15, "device": "cpu, 1 threads"}
    for seed, accuracies in ((1, [0.5, 0.7, 0.1]), (2, [0.7, 0.7, 0.1])):
        made_up(tmp_path, "protonet/long", **shape | {"seed": seed, "accuracies": accuracies})
    made_up(tmp_path, "maml/maml", **shape | {"accuracies": [0.7, 0.8]})  # the first two of three tasks
    made_up(tmp_path, "maml/anil", **shape | {"accuracies": [0.7, 0.8], "Q": 5})
    made_up(tmp_path, "maml/fomaml", **shape | {"accuracies": [0.7, 0.8], "device": "NVIDIA H200"})
    rows = [line for line in comparison.paired(tmp_path).splitlines() if "±" in line]
    assert rows == ["| MAML | +10.00 ± 0.00 |"]


def test_the_inner_loop_is_drawn_of_the_cases_that_tell_it(tmp_path):
    made_up(tmp_path, "maml/fomaml")  # an older result, which does not tell it
    assert "inner_loop" not in dict(maml.pictures(tmp_path)) and maml.inner_loop(tmp_path) == "(not measured)"
    layers = ("conv1", "conv2", "conv3", "conv4", "head")
    moved = {name: dict(zip(layers, values, strict=True)) for name, values in {
        "maml": (1e-4, 2e-4, 3e-4, 4e-3, 0.5), "anil": (0.0, 0.0, 0.0, 0.0, 0.5),
        "fomaml_scratch": (0.03, 0.04, 0.05, 0.06, None)}.items()}  # fmt: skip
    for name, values in moved.items():
        flags = {"flags": {"warmup_steps": 0}} if name.endswith("scratch") else {}
        made_up(tmp_path, f"maml/{name}", update_norm_per_layer=values, **flags)
    assert list(maml.inner_loops(tmp_path)) == list(moved)
    first = [path.read_bytes() for path in results.draw("maml", tmp_path)]
    assert [path.read_bytes() for path in results.draw("maml", tmp_path)] == first and min(map(len, first)) > 8_000
    assert {path.name for path in tmp_path.glob("maml/*.png")} == {"adaptation.png", "inner_loop.png"}
    text = maml.inner_loop(tmp_path)
    assert "| MAML after a prototype warm-up | 2" in text and "| 1.0e-04 | 2.0e-04 | 3.0e-04 | 4.0e-03 |" in text
    assert "| 0 | 0 | 0 | 0 | 5.0e-01 |" in text and "| First-order MAML from scratch |" in text
    assert text.count("| - |") == 1


OF_MAE = {f"{kind}{way}": value
          for way, value in (("", 0.97), ("_one_view", 0.96), ("_plain", 0.95), ("_linear", 0.969),
                             ("_untrained", 0.61), ("_untrained_plain", 0.44))
          for kind, value in (("test_accuracy", value), ("ci95", 0.004))} | {
    "script": "mae", "contrast": 0.3, "mask_ratio": 0.5, "probe_accuracy": 0.85, "probe_ci95": 0.015,
    "flags": {"held_out": 5}, "command": "python mae.py", "num_test_tasks": 600}  # fmt: skip


def made_up_vit(folder: Path, name: str, seed: int, accuracies: list[float]) -> None:
    """A run of protonet.py among those of mae/."""
    command = f"python protonet.py --init_from runs/somewhere_{seed} --random_seed {seed}"
    figures = {"accuracies": accuracies, "test_accuracy": sum(accuracies) / len(accuracies), "ci95": 0.01}
    made_up(folder, f"mae/{name}", "protonet/default", seed=seed, command=command, curves={}, **figures)


def test_the_transformers_of_protonet_stand_beside_the_auto_encoder_and_not_among_its_rows(tmp_path):
    for seed in (1, 2):
        made_up_vit(tmp_path, "vit_50_characters", seed, [0.8, 0.9, 1.0, 0.9])
        made_up_vit(tmp_path, "vit_50_characters_from_mae", seed, [0.9, 1.0, 1.0, 1.0])
    made_up_vit(tmp_path, "vit_1100_characters", 1, [1.0, 0.9, 1.0, 0.9])
    assert list(mae.of_labels(tmp_path)) == [50, 1100]  # nothing is made of 200
    made_up(tmp_path, "mae/mae", **OF_MAE)
    rows = [line for line in mae.features(tmp_path).splitlines() if line.startswith("| ")]
    assert len(rows) == 2 and rows[1].startswith("| mae | 50 % | yes | 97.0 ± 0.4 | 96.0 ± 0.4 | 95.0 ± 0.4 |")
    assert "| Masked auto-encoding, 5-way 1-shot, no label in training |" in comparison.front(tmp_path)
    text = mae.labels(tmp_path)
    # Each task is 0.1, 0.1, 0, 0.1 better: 7.5 points, standard error 2.5, and the seeds agree.
    assert "| 50 | 90.0 ± 1.0 | 90.0, 90.0 | 97.5 ± 1.0 | 97.5, 97.5 | +7.5 ± 4.9 |  |" in text
    assert "| 1,100 | 95.0 ± 1.0 | 95.0 |  |  |  |  |" in text  # a start that was not measured leaves its cells empty
    assert "--init_from RUN_DIR --random_seed 1" in text and "somewhere" not in text


def test_gains_are_of_the_same_tasks_and_seeds():
    run = lambda seed, *accuracies: {"seed": seed, "accuracies": list(accuracies), "device": "cpu, 2 threads"}
    assert mae.gain([run(1, 0.5, 0.7)], [run(2, 0.4, 0.6)]) == ""
    assert mae.gain([run(1, 0.5, 0.7)], [run(1, 0.4, 0.6) | {"device": "NVIDIA H200"}]) == ""
    assert mae.gain([run(1, 0.5, 0.7), run(3, 0.0, 0.0)], [run(1, 0.6, 0.8)]) == "-10.00 ± 0.00"


def test_pictures_of_the_auto_encoder_are_drawn_of_what_is_measured(tmp_path):
    drawn = lambda: {path.stem: path.read_bytes() for path in results.draw("mae", tmp_path)}
    sheet = np.full((3 * 30, 12 * 30), 255, np.uint8)
    sheet[30:60, ::2] = 128
    kept = base64.b64encode(iio.imwrite("<bytes>", sheet, extension=".png")).decode()
    of_drawings = {"reconstruction": kept, "test_error": 0.41, "steps": 600}
    made_up(tmp_path, "mae/mae", **OF_MAE)  # measured before drawings were kept
    made_up(tmp_path, "mae/mae_alone_75_masked", **OF_MAE | {"contrast": 0.0, "mask_ratio": 0.75})
    assert drawn() == {}  # two ratios, but neither curve has two
    made_up(tmp_path, "mae/mae_alone_25_masked", **OF_MAE | {"contrast": 0.0, "mask_ratio": 0.25})
    assert drawn().keys() == {"masks"}
    made_up(tmp_path, "mae/mae_1000_steps", **OF_MAE | of_drawings | {"steps": 1000})
    made_up(tmp_path, "mae/mae_alone_75_masked", **OF_MAE | of_drawings | {"contrast": 0.0, "mask_ratio": 0.75})
    made_up(tmp_path, "mae/mae_75_masked", **OF_MAE | of_drawings | {"mask_ratio": 0.75})  # only there for its ratio
    titles = list(map(mae.reconstruction_title, mae.reconstructed(tmp_path)))
    assert titles == ["75 % hidden; masked auto-encoding alone, 600 steps", "50 % hidden; both losses, 1,000 steps"]
    made_up_vit(tmp_path, "vit_200_characters_from_mae", 1, [0.9, 1.0])
    first = drawn()
    assert first.keys() == {"labels", "masks", "reconstruction"} and drawn() == first
    assert min(map(len, first.values())) > 5_000
    assert "| 0.41 |" in mae.features(tmp_path)


def test_memories_stand_side_by_side_with_what_is_measured_of_them(tmp_path):
    assert attention.memories(tmp_path).count("| `") == 3
    lstm = {"test_accuracy": 0.967, "ci95": 0.002, "test_accuracy_alone": 0.9498, "ci95_alone": 0.002}
    lstm |= {"device": "cpu, 1 threads", "processor": "AMD EPYC, AVX512"}
    of_attention = lstm | {"test_accuracy": 0.99, "ci95": 0.001, "test_accuracy_alone": 0.99, "ci95_alone": 0.001}
    of_attention |= {"device": "NVIDIA H200", "parameters": 186952}
    made_up(tmp_path, "hw1/conv_K1N5", "hw1/conv_K1N5", **lstm)
    made_up(tmp_path, "attention/K1N5", "hw1/conv_K1N5", **of_attention)
    race = {"title": "mann, B 128, K 1, N 5, hidden 128", "device": "cpu, 2 threads", "processor": "AMD EPYC, AVX512"}
    times = {"lstm": 4, "attention": 7}
    race |= {f"{memory}, 64 features an image": {"ms": ms, "ratio": 1} for memory, ms in times.items()}
    race["megabytes_kept"] = {"lstm": 30.2, "attention": 52.1}
    (tmp_path / "speed.json").write_text(json.dumps([race]))
    text = attention.memories(tmp_path)
    assert "| 4.0 ms, 30 MB | 96.7 ± 0.2 | 95.0 ± 0.2 |" in text and "| 7.0 ms, 52 MB | 99.00 ± 0.10 |" in text
    assert "52.1" not in speed.races(tmp_path)  # bytes are no contestant
    (row,) = (line for line in comparison.rows(tmp_path, "hw1").splitlines() if "conv encoder" in line)
    assert row.endswith("| 95.0 ± 0.2 | " + row.split(" | ")[-1]) and row.endswith("(1 thread of AMD EPYC) |")
    (row,) = (line for line in comparison.rows(tmp_path, "attention").splitlines() if "5-way 1-shot" in line)
    assert "| - | 99.07 (SNAIL, Vinyals' split) | 99.00 ± 0.10 |" in row and row.endswith("(NVIDIA H200) |")
    by_sight = {"accuracy_by_sight": [i / 10 for i in range(10)], "ci95_by_sight": [0.01] * 10}
    made_up(tmp_path, "external_memory/external", "hw1/conv_K1N5", **by_sight)
    text = external_memory.sights(tmp_path)
    assert "| external memory, the paper | 36.4 | 82.8 | 91.0 | 94.9 | 98.1 |" in text and "LSTM" not in text
    assert "| external memory, ours | 0.0 ± 1.0 | 10.0 ± 1.0 | 20.0 ± 1.0 | 40.0 ± 1.0 | 90.0 ± 1.0 | 1 |" in text


def test_other_peoples_digits_stand_in_a_table_and_pictures_of_what_is_measured(tmp_path):
    figures = {"dataset": "mnist", "test_accuracy": 0.912, "ci95": 0.004}
    of_reset = figures | {"test_accuracy": 0.31, "ci95": 0.006, "test_accuracy_sgd": 0.27, "ci95_sgd": 0.007}
    for K in (1, 5):
        made_up(tmp_path, f"protonet/mnist_{K}shot", **figures)
    made_up(tmp_path, "meta_lstm/mnist_10shot", **figures | {"test_accuracy_sgd": 0.83, "ci95_sgd": 0.005})
    assert "| ProtoNet | 91.2 ± 0.4 | 91.2 ± 0.4 |  |  | 1 |" in comparison.mnist(tmp_path)
    assert [path.stem for path in results.draw("comparison", tmp_path)] == ["mnist"]
    assert not results.draw("meta_lstm", tmp_path)
    for case in ("mnist_reset_10shot", "10way10shot", "10way10shot_reset"):
        made_up(tmp_path, f"meta_lstm/{case}", **of_reset | {"dataset": "mnist" if "mnist" in case else "omniglot"})
    assert [path.stem for path in results.draw("meta_lstm", tmp_path)] == ["reset"]
    results.refuse_other_images(tmp_path, "omniglot")
    made_up(tmp_path, "maml/mnist_1shot", dataset="omniglot")
    with pytest.raises(UserError, match="mnist_1shot_seed1.json is a result on omniglot, its row is of mnist"):
        results.refuse_other_images(tmp_path, "omniglot")


def test_lakes_trials_are_a_row_of_runs_that_tell_them(tmp_path):
    old = {"script": "protonet", "num_test_tasks": 2000, "test_accuracy_one_drawer": 0.9, "ci95_one_drawer": 0.004}
    made_up(tmp_path, "protonet/lake", **old)
    assert "official trials" not in comparison.rows(tmp_path, "protonet")
    made_up(tmp_path, "protonet/lake", **old | {"test_accuracy_lake_runs": 0.981, "ci95_lake_runs": 0.012})
    (row,) = (line for line in comparison.rows(tmp_path, "protonet").splitlines() if "official trials" in line)
    assert "| 98.1 ± 1.2 | 20 runs of 20 trials |" in row and "BPL" in row


def test_the_processor_is_named_shortly():
    intel = {"device": "cpu, 2 threads", "processor": "Intel(R) Xeon(R) Processor @ 2.80GHz, AVX512"}
    assert results.processor(intel) == "2 threads of Intel Xeon"
    assert results.processor({"device": "cpu, 1 threads"}) == "1 thread of AMD EPYC"
    narrow = {"device": "cpu, 1 threads", "processor": "AMD EPYC, AVX2"}
    assert results.processor(narrow) == "1 thread of AMD EPYC with AVX2"
    assert results.processor({"device": "NVIDIA H100"}) == "NVIDIA H100"


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


@pytest.mark.parametrize("page", [*DOCUMENTS, RESULTS / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_figure_of_metrics_json_is_explained():
    """Each name in a committed result stands on its method's or script's page or on that of the run folder."""
    common = (REPO / "docs" / "experiment.md").read_text()
    for file in RESULTS.glob("*/*_seed1.json"):
        run = json.loads(file.read_text())
        page = common + "".join(
            (REPO / "docs" / f"{name}.md").read_text() for name in {file.parent.name, run["script"]}
        )
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
    cells = {(room, row.case): comparison.cells(RESULTS, room, row) for room, row in comparison.listed("ROWS")}
    for script, case in {"protonet": "default", "maml": "maml", "meta_lstm": "5way1shot"}.items():
        text, row = (REPO / f"{script}.py").read_text().split('"""')[1], cells[script, case]
        assert row["ours"] in text and f"{row['minutes']} minutes" in text and f"docs/{script}.md" in text
    ours = cells["mae", "mae"]["ours"]
    assert f"5-way 1-shot {ours} %" in (REPO / "mae.py").read_text().split('"""')[1]
    for script in ("hw1", "transfer", "profile_costs", "feature_weights"):
        assert f"docs/{script}.md" in (REPO / f"{script}.py").read_text().split('"""')[1]
    es = json.loads((RESULTS / "profile_costs" / "costs_train.json").read_text())["es"]
    assert f"ES {es['test_loss']:.4f} ± {es['ci95']:.4f}" in (REPO / "profile_costs.py").read_text()


# ----------------------------------------------------------------- what the sentences compare

A, ALONE = "test_accuracy", "test_accuracy_alone"
F = "feature_weights/features.json"
COMPARED = [  # page, words of a sentence, left figure, how they stand beyond their intervals, right figure
    ("hw1", "Harder", f"hw1/K1N2:{A}", ">", f"hw1/K1N3:{A}"),
    ("hw1", "Harder", f"hw1/K1N3:{A}", ">", f"hw1/K1N4:{A}"),
    ("hw1", "Easier", f"hw1/K2N2:{A}", ">", f"hw1/K1N2:{A}"),
    ("hw1", "Asked alone, without the hint", f"hw1/K2N2:{ALONE}", ">", f"hw1/K1N2:{ALONE}"),
    ("hw1", "Which learning rate", f"hw1/K1N3_rate_1e-3:{A}", ">", f"hw1/K1N3_rate_1e-5:{A}"),
    ("hw1", "Which learning rate", f"hw1/K1N3_rate_1e-5:{A}", ">", f"hw1/K1N3_rate_1e-1:{A}"),
    ("hw1", "How much memory", f"hw1/K1N3_memory_8:{A}", "<", f"hw1/K1N3_rate_1e-3:{A}"),
    ("hw1", "How much memory", f"hw1/K1N3_memory_256:{A}", "<", f"hw1/K1N3_rate_1e-3:{A}"),
    ("hw1", "Neither differs from two LSTM layers", f"hw1/K1N3_gru:{A}", "~", f"hw1/K1N3_rate_1e-3:{A}"),
    ("hw1", "Neither differs from two LSTM layers", f"hw1/K1N3_3_layers:{A}", "~", f"hw1/K1N3_rate_1e-3:{A}"),
    ("attention", "The rest of the course's figure", f"hw1/conv_K1N5:{A}", ">", f"hw1/conv_K1N5:{ALONE}"),
    ("attention", "For attention the two are one figure", f"attention/K1N5:{A}", "~", f"attention/K1N5:{ALONE}"),
    ("attention", "Asked alone, attention is right", f"attention/K1N5:{ALONE}", ">", f"hw1/conv_K1N5:{ALONE}"),
    ("attention", "One shot is the better school", f"attention/K1N5_at_K5N5:{ALONE}", ">", f"attention/K5N5:{ALONE}"),
    ("external_memory", "the LSTM forgets", "external_memory/lstm_at_K19:19", "<", "external_memory/lstm:9"),
    ("external_memory", "so holds most of it", "external_memory/external_at_K19:19", ">",
     "external_memory/lstm_at_K19:19"),
    ("transfer", "gradient descent of as many steps", f"meta_lstm/mnist_reset_10shot:{A}", ">",
     f"meta_lstm/mnist_reset_10shot:{A}_sgd"),
    ("transfer", "From its learned start", f"meta_lstm/mnist_10shot:{A}", ">", f"meta_lstm/mnist_reset_10shot:{A}"),
    ("transfer", "What defeats the rule is fewer shots", f"meta_lstm/mnist_1shot:{A}", "<",
     f"meta_lstm/mnist_1shot:{A}_sgd"),
    ("transfer", "What defeats the rule is fewer shots", f"meta_lstm/mnist_reset_1shot:{A}", "<",
     f"meta_lstm/mnist_reset_1shot:{A}_sgd"),
    ("transfer", "With fewer shots it is better to compare", f"protonet/mnist_1shot:{A}", ">",
     f"meta_lstm/mnist_1shot:{A}"),
    ("maml", "half a point behind the others", f"maml/mamlpp_scratch:{A}", "<", f"maml/maml_scratch:{A}"),
    ("meta_lstm", "clearly so with five shots", f"meta_lstm/5way5shot:{A}", "~", f"meta_lstm/5way5shot:{A}_sgd"),
    ("meta_lstm", "within the interval", f"meta_lstm/5way1shot_pool:{A}", "~", f"meta_lstm/5way1shot_short:{A}"),
    ("meta_lstm", "no better rule", f"meta_lstm/5way1shot_second_order:{A}", "~", f"meta_lstm/5way1shot_short:{A}"),
    ("mae", "Is the architecture enough?** No", f"mae/mae:{A}", ">", f"mae/mae:{A}_untrained"),
    ("mae", "Without whitening and views", f"mae/mae:{A}_plain", ">", f"mae/mae:{A}_untrained_plain"),
    ("mae", "Whitening takes", f"mae/mae:{A}_one_view", ">", f"mae/mae:{A}_plain"),
    ("mae", "the views take that", f"mae/mae:{A}", ">", f"mae/mae:{A}_one_view"),
    ("mae", "To random weights both together give", f"mae/mae:{A}_untrained", ">", f"mae/mae:{A}_untrained_plain"),
    ("mae", "no difference beyond the intervals", f"mae/mae:{A}", "~", f"mae/mae:{A}_linear"),
    ("mae", "What would labels be worth", f"protonet/default:{A}", ">", f"mae/mae:{A}"),
    *[("mae", "helps at each of the three sizes", f"mae/vit_{n}_characters_from_mae:{A}", ">",
       f"mae/vit_{n}_characters:{A}") for n in mae.LABELLED],
    ("mae", "as good as training from scratch with 50", f"mae/mae:{A}", "~", f"mae/vit_50_characters:{A}"),
    ("mae", "less than with 200 or 1,100", f"mae/mae:{A}", "<", f"mae/vit_200_characters:{A}"),
    ("mae", "less than with 200 or 1,100", f"mae/mae:{A}", "<", f"mae/vit_1100_characters:{A}"),
    *[("mae", "With the second loss less is better", f"mae/mae_{a}_masked:{A}", ">", f"mae/mae_{b}_masked:{A}")
      for a, b in ((25, 50), (50, 75), (75, 90))],
    *[("mae", "are best, a quarter", f"mae/mae_alone_{a}_masked:{A}", how, f"mae/mae_alone_{b}_masked:{A}")
      for a, how, b in ((50, "~", 75), (50, ">", 25), (50, ">", 90), (75, ">", 25), (75, ">", 90))],
    ("profile_costs", "MAML gets far more out of it", "profile_costs/costs_train.json:maml", "<",
     "profile_costs/costs_train.json:es"),
    *[("feature_weights", words, f"{F}:{left}", how, f"{F}:{right}") for words, left, how, right in (
        ("All weights 1", "closed_form.meta.32", "<", "closed_form.ones.32"),
        ("with Adam; the oracle's", "closed_form_adam.meta.32", "<", "closed_form.meta.32"),
        ("SGD's beat Adam's", "closed_form.meta.31", "<", "closed_form_adam.meta.31"),
        ("Why does the error dip", "closed_form.meta.32", "<", "closed_form.meta.31"),
        ("Why does the error dip", "closed_form.meta.32", "<", "closed_form.meta.33"),
        ("so the error falls once more", "closed_form.meta.64", "<", "closed_form.meta.32"),
        ("no dip at 32", "closed_form_random.meta.32", "~", "closed_form_random.meta.33"),
        ("It helps less", "closed_form_random.meta.32", "<", "closed_form_random.ones.32"),
        ("It helps less", "closed_form_random.meta.32", ">", "closed_form.meta.32"),
        ("as much as the closed form", "gradient_5_steps.meta.32", "~", "closed_form.meta.32"),
        ("Does one step still work", "gradient_1_steps.meta.32", "<", "gradient_1_steps.ones.32"),
        ("as good as the oracle", "classification.meta.32", "~", "classification.oracle.32"),
        ("they beat the oracle", "classification.meta.64", "<", "classification.oracle.64"),
        ("and beat the oracle at 64", "logistic_10_steps.meta.64", "<", "logistic_10_steps.oracle.64"))],
]  # fmt: skip


def figure(source: str) -> tuple[float, float]:
    """(value, half-width of its 95 % interval) of a source as the documents quote it; a number n: of the n-th sight."""
    case, key = source.split(":")
    if case.endswith("features.json"):
        part, kind, points = key.split(".")
        run = json.loads((RESULTS / case).read_text())[part]
        return run[kind][points], run["ci95"][kind][points]
    if case.endswith(".json"):
        run = json.loads((RESULTS / case).read_text())[key]
        return run["test_loss"], run["ci95"]
    runs = results.load(RESULTS, case)
    if key.isdigit():
        runs = [{"a": r["accuracy_by_sight"][int(key)], "a_ci95": r["ci95_by_sight"][int(key)]} for r in runs]
    return results.interval_of(runs, "a" if key.isdigit() else key)


@pytest.mark.parametrize(("page", "words", "left", "how", "right"), COMPARED)
def test_a_sentence_that_compares_two_figures_is_true_beyond_their_intervals(page, words, left, how, right):
    text = re.sub(r"[-+\d][^<\s]*(?: ± [\d.]+)?<!--.*?-->", "", (REPO / "docs" / f"{page}.md").read_text())
    assert words in " ".join(text.split())
    (a, half_a), (b, half_b) = figure(left), figure(right)
    apart = abs(a - b) > math.hypot(half_a, half_b)
    assert {"<": a < b and apart, ">": a > b and apart, "~": not apart}[how], f"{a} ± {half_a}, {b} ± {half_b}"
