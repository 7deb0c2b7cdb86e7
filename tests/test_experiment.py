"""The run folder: atomic writes, hostile and foreign checkpoints, intervals, the common flags."""

from fewshot import SPIN, experiment
from fewshot.experiment import UserError, device, load_checkpoint, mean_and_ci95, write_atomically

import json
import math
import os
import pickle
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import REPO

import hw1


def test_mean_and_interval_by_hand():
    mean, ci95 = mean_and_ci95([1.0, 0.0, 1.0, 1.0])
    assert mean == 0.75 and ci95 == pytest.approx(1.96 * 0.5 / 2)


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_atomically(path, lambda out: out.write(b"good"))

    def full(out):
        out.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*checkpoint.pt .*No space left"):
        write_atomically(path, full)
    assert path.read_bytes() == b"good" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_hostile_and_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(path)
    torch.save({"step": 1, "model": Hostile()}, path)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)
    assert not os.path.exists("executed")
    torch.save({"step": 1}, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        experiment.load_best(tmp_path, torch.nn.Linear(1, 1))
    torch.save({"step": 1, "model": torch.nn.Linear(2, 1).state_dict()}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="is of another model"):
        experiment.load_best(tmp_path, torch.nn.Linear(1, 1))


def test_every_flag_has_a_help_text_and_its_default(capsys):
    with pytest.raises(SystemExit):
        hw1.parse_args(["--help"])
    text = capsys.readouterr().out
    for group in ("run", "data", "model", "optimisation", "evaluation"):
        assert f"\n{group}:\n" in text
    assert "(default: 128)" in text and "Santoro et al. 2016" in text
    parser, _ = experiment.make_parser("doc")
    assert all(action.help for action in parser._actions)


def test_smoke_changes_defaults_but_not_what_was_typed():
    assert hw1.parse_args(["--smoke"]).train_steps == 40
    assert hw1.parse_args(["--smoke", "--train_steps", "7"]).train_steps == 7


def test_two_runs_in_the_same_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    args = hw1.parse_args(["--smoke", "--log_dir", str(tmp_path)])
    folders = {experiment.Run(args, "hw1", "glyphs").folder.name for _ in range(3)}
    assert folders == {f"hw1_glyphs_5way_1shot_seed1_now{end}" for end in ("", "_2", "_3")}
    args.run_name = "mine"
    experiment.Run(args, "hw1", "glyphs")
    with pytest.raises(UserError, match="mine exists; use --resume"):
        experiment.Run(args, "hw1", "glyphs")


def test_a_run_continues_on_its_own_data_only(tmp_path):
    run = experiment.Run(hw1.parse_args(["--log_dir", str(tmp_path), "--run_name", "a"]), "hw1", "omniglot")
    args = hw1.parse_args(["--resume", str(run.folder)])
    assert experiment.Run(args, "hw1", "omniglot").folder == run.folder
    with pytest.raises(UserError, match="trained on omniglot, but the data found now is glyphs"):
        experiment.Run(args, "hw1", "glyphs")


def test_patience_and_best(tmp_path):
    args = hw1.parse_args(["--log_dir", str(tmp_path), "--patience", "2", "--eval_freq", "1", "--train_steps", "10"])
    run = experiment.Run(args, "hw1", "glyphs")
    model = torch.nn.Linear(1, 1)
    run.track(model=model)
    accuracies = iter([0.1, 0.5, 0.5, 0.4, 0.9])
    for step in run.steps():
        with torch.no_grad():
            model.weight.fill_(step)
        run.record(torch.tensor(float(step)))
        run.evaluated(next(accuracies), {})
    assert run.step == 4 and run.best == 0.5  # an equal accuracy is not a better one
    assert run.load_best(model) == 2 and model.weight.item() == 2
    with pytest.raises(StopIteration):
        next(iter(run.steps()))
    assert math.isfinite(run.seconds) and run.seconds > 0


def test_a_bug_in_what_is_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError):
        experiment.write_atomically(tmp_path / "file", lambda out: {}["missing"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dtype, fast, works, expected, note",
    [
        ("auto", True, True, torch.bfloat16, False),
        ("auto", True, False, torch.float32, False),
        ("auto", False, True, torch.float32, False),
        ("bfloat16", False, True, torch.bfloat16, False),
        ("bfloat16", True, False, torch.float32, True),
        ("float32", True, True, torch.float32, False),
    ],
)
def test_precision_is_what_the_processor_and_the_kernels_can(dtype, fast, works, expected, note, monkeypatch, capsys):
    monkeypatch.setattr(device, "fast_in_bfloat16", lambda device: fast)

    def probe():
        assert torch.is_autocast_enabled("cpu")
        torch.rand(3)
        if not works:
            raise RuntimeError("could not create a primitive descriptor")

    torch.manual_seed(4)
    expected_next = torch.rand(1)
    torch.manual_seed(4)
    assert experiment.precision(Namespace(dtype=dtype), torch.device("cpu"), probe) == expected
    assert torch.equal(torch.rand(1), expected_next)  # the probe leaves the stream alone
    assert ("cannot compute the network in bfloat16" in capsys.readouterr().err) == note


def test_an_older_processor_is_believed(monkeypatch):
    """ATEN_CPU_CAPABILITY=avx2 makes a better processor stand for one without bfloat16 instructions."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert experiment.fast_in_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not experiment.fast_in_bfloat16(torch.device("cpu"))


def test_a_warm_up_chooses_no_checkpoint_and_costs_no_patience(tmp_path):
    """Three evaluations of a warm-up with --patience 1, then two of the method, of which the first is better."""
    args = Namespace(
        resume=None,
        random_seed=1,
        log_dir=str(tmp_path),
        run_name="run",
        train_steps=6,
        eval_freq=1,
        patience=1,
        meta_batch_size=1,
        command="",
        git_commit=None,
    )
    run = experiment.Run(args, "maml", "glyphs")
    model = torch.nn.Linear(1, 1)
    run.track(model=model)
    for step, accuracy in zip(run.steps(), (0.9, 0.1, 0.1, 0.5, 0.4, 0.6), strict=False):
        run.record(torch.tensor(1.0))
        run.evaluated(accuracy, {"Accuracy/val": accuracy}, choose=step > 3)
        assert (run.folder / "best.pt").exists() == (step > 3)
    assert run.step == 5 and run.best == 0.5 and run.best_step == 4  # the sixth was not waited for
    metrics = run.finish({})
    assert metrics["val_accuracy"] == 0.5 and metrics["curves"]["Accuracy/val"][0] == [1, 0.9]


def test_without_validation_there_is_no_validation_accuracy(tmp_path):
    args = Namespace(
        resume=None,
        random_seed=1,
        log_dir=str(tmp_path),
        run_name="run",
        train_steps=2,
        eval_freq=1,
        meta_batch_size=1,
        command="python x.py",
        git_commit=None,
    )
    run = experiment.Run(args, "transfer", "glyphs", "d" * 64)
    run.track(model=torch.nn.Linear(1, 1))
    for _ in run.steps():
        run.record(torch.tensor(1.0))
        run.evaluated(None, {})
    metrics = run.finish({"test_accuracy": 0.5})
    assert "val_accuracy" not in metrics and metrics["best_step"] == 2 and metrics["dataset_digest"] == "d" * 64


def test_a_long_curve_keeps_its_last_point():
    curve = [[step, float(step)] for step in range(1, 1001)]
    thin = experiment.thinned(curve)
    assert 50 <= len(thin) <= 100 and thin[-1] == [1000, 1000.0] and experiment.thinned(curve[:49]) == curve[:49]


def test_json_keeps_lists_on_one_line_and_strings_as_they_are(tmp_path):
    content = {"list": [1, 2.5, "a  b"], "text": "[ 1,  2 ]", "odd": ["a  [ b ]"], "of": [[1, 2], {"x": []}]}
    experiment.write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content and '"list": [1, 2.5, "a  b"]' in text


def test_the_command_is_a_newcomers_one():
    words = ["--num_shot", "1", "--log_dir", "/tmp/x", "--run_name=a b", "--dataset", "glyphs"]
    assert experiment.newcomers_command("hw1.py", words) == "python hw1.py --num_shot 1 --dataset glyphs"


@pytest.mark.thorough
def test_denormal_numbers_count_as_zero_in_every_thread():
    """Gradients of saturated gates are full of them, and arithmetic with them is up to a hundred times slower."""
    code = """
from fewshot import SPIN, experiment
import argparse, threading, torch
experiment.setup(argparse.Namespace(random_seed=1, device="cpu"))
torch.set_num_threads(2)
tiny, left = torch.full((1_000_000,), 1e-30), []
count = lambda: left.append(int((tiny * 1e-10).count_nonzero()))
count()
other = threading.Thread(target=count)
other.start(), other.join()
x = torch.ones(1_000_000, requires_grad=True)
(x * 1e-30 * 1e-10).sum().backward()
print(left + [int(x.grad.count_nonzero())] if torch.set_flush_denormal(True) else "cannot")
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    if found.stdout.strip() == "cannot":
        pytest.skip("this processor has no such mode")
    assert found.stdout.strip() == "[0, 0, 0]", found.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}], ids=str)
def test_how_threads_wait_is_the_users_choice_where_there_is_one(given):
    code = """
from fewshot import SPIN, experiment
import os, threading, argparse, torch
torch.set_num_threads(2)
for _ in range(2):
    experiment.setup(argparse.Namespace(random_seed=1, device="cpu"))
watching = [thread.name for thread in threading.enumerate()].count("share_cores")
print([os.environ.get(name) for name in SPIN], watching)
"""
    environment = {name: value for name, value in os.environ.items() if name not in SPIN} | given
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True, check=True
    )
    expected = [given.get(name) for name in SPIN] if given else list(SPIN.values())
    watched = int(not given and experiment.busy_seconds() is not None)
    assert found.stdout.strip() == f"{expected} {watched}"


@pytest.mark.thorough
def test_threads_doze_while_other_processes_need_the_cores():
    """Told that others fill the computer, a thread opens a team of its own; told that none does, it goes."""
    code = """
from fewshot import SPIN, experiment
import os, threading, time, torch
torch.set_num_threads(2)
others, clock = 0.0, [time.monotonic(), 0.0]

def busy_seconds():
    now = time.monotonic()
    clock[:] = now, clock[1] + others * (now - clock[0])
    return clock[1] + time.process_time()

def becomes(expected):
    while any(thread.name == "doze" for thread in threading.enumerate()) != expected:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0

experiment.busy_seconds = busy_seconds
experiment.share_cores(0.05)
for others, expected in ((os.cpu_count(), True), (0, False), (os.cpu_count(), True)):
    print(becomes(expected))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and len(done.stdout.split()) == 3, done.stderr
