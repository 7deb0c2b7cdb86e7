"""reproduce.py: runs once what is not done, survives Ctrl-C and kill -9, names failures, types no figure by hand."""

import json
import os
import signal
import subprocess
import sys
import time

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import REPO, one_line_error

import protonet
import reproduce
from experiment import UserError
from reproduce import cases_of

SMOKE = ["mann", "--scale", "smoke", "--only", "K1N2", "--dataset", "glyphs", "--device", "cpu"]


def start(out, work, *flags):
    command = [sys.executable, str(REPO / "reproduce.py"), *SMOKE, "--out", str(out), *flags]
    # A shell's background jobs ignore SIGINT and hand that down; here it must count.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=heed, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def result(out):
    return json.loads((out / "mann" / "K1N2_seed1.json").read_text())


@pytest.fixture(scope="module")
def done(work, tmp_path_factory):
    """The results of one uninterrupted run."""
    out = tmp_path_factory.mktemp("reproduce")
    child = start(out, work)
    _, err = child.communicate(timeout=200)
    assert child.returncode == 0, err
    return out


def test_leaves_results_tables_figures_and_a_ledger(done):
    metrics, ledger = result(done), json.loads((done / "reproduce.json").read_text())
    assert metrics["dataset"] == "glyphs" and metrics["steps"] == 40
    assert [step for step, _ in metrics["curves"]["Accuracy/test"]] == [20, 40]
    assert ledger["mann_K1N2_seed1"]["minutes"] > 0
    assert "python hw1.py" in ledger["mann_K1N2_seed1"]["command"]
    page = (done / "README.md").read_text()
    assert f"| MANN, 1-shot 2-way | above 90 | - | {100 * metrics['test_accuracy']:.1f} ±" in page
    assert (done / "mann.csv").read_text().count("\n") == 2 and (done / "mann.png").stat().st_size < 200_000


def test_a_second_time_nothing_runs(done, work):
    before = (done / "mann" / "K1N2_seed1.json").stat().st_mtime_ns
    child = start(done, work)
    out, _ = child.communicate(timeout=100)
    assert child.returncode == 0 and "1 of 1 runs are done already" in out
    assert (done / "mann" / "K1N2_seed1.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_started_again_nothing_is_lost_or_twice(done, work, tmp_path, sent):
    """The run's process ends with reproduce.py, and the second start resumes it to the same figure."""
    child = start(tmp_path, work)
    runs = tmp_path / "runs"
    deadline = time.time() + 100
    while not list(runs.glob("mann_K1N2*/flags.json")) and time.time() < deadline:
        time.sleep(0.05)
    child.send_signal(sent)
    child.communicate(timeout=100)
    assert child.returncode == (-9 if sent == signal.SIGKILL else 130)
    again = start(tmp_path, work)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert len(list(runs.glob("mann_K1N2*/metrics.json"))) == 1 and len(list((tmp_path / "mann").iterdir())) == 1
    assert result(tmp_path)["test_accuracy"] == result(done)["test_accuracy"]
    assert result(tmp_path)["curves"]["Accuracy/test"] == result(done)["curves"]["Accuracy/test"]


def test_the_ledger_counts_minutes_before_an_interruption(tmp_path):
    """A run that trained for ten minutes and ended just before it was collected."""
    job = reproduce.make_jobs(cases_of("mann"), "cpu", "cpu", "auto")[0]
    folder = tmp_path / "runs" / f"{job.name}_{job.key}"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"train_seconds": 600}))
    assert reproduce.run_all([job], tmp_path, tmp_path / "runs", 1) == []
    assert json.loads((tmp_path / "reproduce.json").read_text())[job.name]["minutes"] == 10


def test_an_embedded_episode_is_drawn(tmp_path, capsys):
    flags = ["--smoke", "--dataset", "glyphs", "--num_test_tasks", "4", "--num_val_tasks", "4", "--log_dir", tmp_path]
    metrics = protonet.main([*map(str, flags), "--run_name", "a"])
    episode = reproduce.embedded_episode(tmp_path / "a")
    assert len(episode["support"]) == 5 and sorted(set(episode["labels"])) == [0, 1, 2, 3, 4]
    points = torch.tensor(episode["support"] + episode["query"])
    assert points.shape == (80, 2) and points.mean(dim=0).abs().max() < 1e-2  # centred
    assert points[:, 0].std() >= points[:, 1].std() > 0  # the first component has more spread
    (tmp_path / "comparison").mkdir()
    found = metrics | {"episode": episode, "curves": reproduce.read_curves(tmp_path / "a")}
    (tmp_path / "comparison" / "protonet_seed1.json").write_text(json.dumps(found))
    reproduce.draw_protonet(tmp_path)
    assert (tmp_path / "protonet.png").stat().st_size > 10_000


def test_the_key_is_of_flags_and_code(monkeypatch, tmp_path):
    def keys(device="cpu"):
        return [job.key for job in reproduce.make_jobs(cases_of("mann"), "cpu", device, "auto")]

    first = keys()
    assert keys() == first and len(set(first)) == len(first) > 15
    assert not set(keys("cuda")) & set(first)
    monkeypatch.setattr(reproduce, "code_version", lambda script: "another")
    assert not set(keys()) & set(first)


def test_only_chooses_runs_by_parts_of_their_names():
    def names(only: str) -> set[str]:
        return {job.name for job in reproduce.make_jobs(cases_of("comparison"), "cpu", "cpu", "auto", only)}

    assert names("anil,maml_seed1") == {f"comparison_{m}_seed1" for m in ("anil", "maml", "fomaml", "protomaml")}
    assert len(names("")) > len(names("seed1")) > 5 and not names("nothing")


def test_what_three_hours_cannot_hold_waits_to_be_named():
    def names(scale: str, only: str = "") -> set[str]:
        return {job.name for job in reproduce.make_jobs(cases_of("all"), scale, "cpu", "auto", only)}

    beyond = {f"comparison_maml_20way{case}_seed1" for case in ("1shot", "5shot", "5shot_32_pixels")}
    assert not beyond & names("cpu") and beyond < names("full") and beyond < names("smoke")
    assert names("cpu", "maml_20way") == beyond
    assert sum(case.minutes * case.seeds for case in cases_of("all") if not case.beyond) <= 2 * 180


def test_a_failure_is_named_and_the_others_run(monkeypatch, tmp_path, capsys):
    bad = reproduce.Case("mann", "bad", "hw1.py", "--learning_rate nan")
    good = reproduce.Case("mann", "good", "hw1.py", "--num_classes 2")
    monkeypatch.setattr(reproduce, "CASES", [bad, good])
    flags = ["mann", "--scale", "smoke", "--out", str(tmp_path), "--dataset", "glyphs", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(flags)
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "mann_bad_seed1: exit code 2: error: " in line and "--learning_rate" in line
    assert (tmp_path / "mann" / "good_seed1.json").exists() and not (tmp_path / "mann" / "bad_seed1.json").exists()


ALL = cases_of("all", "mini imagenet")


@pytest.mark.parametrize("job", reproduce.make_jobs(ALL, "cpu", "cpu", "auto")
                         + reproduce.make_jobs(ALL, "full", "cpu", "auto"),
                         ids=lambda job: job.name)  # fmt: skip
def test_every_command_parses(job):
    module = __import__(job.case.script.removesuffix(".py"))
    args = module.parse_args(job.flags)
    assert args.random_seed == job.seed
    if getattr(args, "dataset", "folder") != "folder":  # a character of Omniglot has 20 images
        assert args.num_shot + max(getattr(args, "num_query", 1), getattr(args, "train_query", 0)) <= 20


def test_mini_imagenet_is_measured_where_its_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for c in range(5):
            folder = tmp_path / "mini" / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(4):
                imageio.imwrite(folder / f"{i}.png", rng.integers(0, 255, (84, 84, 3), dtype=np.uint8))
    flags = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path / "out"), "--only", "miniImagenet_5way1shot"]
    reproduce.main(["meta_lstm", *flags, "--mini_imagenet", str(tmp_path / "mini")])
    metrics = json.loads((tmp_path / "out" / "meta_lstm" / "miniImagenet_5way1shot_seed1.json").read_text())
    assert metrics["parameters"] == 32901  # the learner's on 84 x 84 colour images
    row = f"| Meta-LSTM, miniImageNet 5-way 1-shot | 42.6 | 43.4 | {100 * metrics['test_accuracy']:.1f} ±"
    assert row in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="--mini_imagenet nowhere has no train/"):
        reproduce.parse_args(["meta_lstm", "--mini_imagenet", "nowhere"])


def test_the_committed_page_is_generated():
    results = REPO / "results"
    assert reproduce.page(results) == (results / "README.md").read_text(), "run: python reproduce.py all --draw_only"


def test_the_seeds_share_their_tasks_so_the_interval_does_not_shrink():
    runs = [{"test_accuracy": a, "ci95": 0.01} for a in (0.9, 0.92, 0.94)]
    assert reproduce.mean_of_seeds(runs) == pytest.approx((92.0, 1.0))


def test_bad_flags_get_one_line(run_script, tmp_path):
    one_line_error(run_script("reproduce.py", "mann", "--jobs", "0"), "--jobs")
    one_line_error(run_script("reproduce.py", "everything"), "everything")
    one_line_error(run_script("reproduce.py", "mann", "--only", "nothing", "--out", tmp_path / "o"), "--only nothing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        reproduce.parse_args(["mann", "--out", str(tmp_path / "file")])
