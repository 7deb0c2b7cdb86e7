"""The run folder: atomic writes, hostile and foreign checkpoints, intervals, the common flags."""

import math
import os
import pickle

import pytest
import torch

import experiment
import hw1
from experiment import UserError, load_checkpoint, mean_and_ci95, write_atomically


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
    monkeypatch.setattr(experiment.time, "strftime", lambda _: "now")
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
