"""The fine-tuning baseline: what is held out stays held out, heads fit, both phases run and resume."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.learners.conv4 import Conv4

import numpy as np
import pytest
import torch
from conftest import known_dataset

import transfer
from transfer import Classifier, LabelledDrawings, fit_heads, held_out_accuracy

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu"]


def test_held_out_drawings_are_never_drawn_for_training():
    data = known_dataset(num_classes=6)
    drawings = LabelledDrawings(data, [1, 4, 5], 5, seed=0, device="cpu", jitter=0.0)
    images, labels = drawings.batch(5000)
    classes, numbers = ((images[:, 0, 0, i] * 255).round().long() for i in (0, 1))
    assert torch.equal(torch.tensor([1, 4, 5])[labels], classes)
    counts = (labels * 20 + numbers).bincount(minlength=60).view(3, 20)
    assert (counts[:, 15:] == 0).all() and (counts[:, :15] > 0).all()
    assert (counts[:, :15] - 5000 / 45).abs().max() < 5 * np.sqrt(5000 / 45)
    held = data.images[drawings.test[0].numpy()]
    assert set(held[:, 0, 0, 1].tolist()) == set(range(15, 20)) and len(held) == 15
    with pytest.raises(UserError, match="--held_out 20 leaves no drawing"):
        LabelledDrawings(data, [1], 20, seed=0, device="cpu", jitter=0.0)


def test_heads_fit_each_task_on_its_own():
    torch.manual_seed(0)
    centres = torch.eye(8)[torch.stack([torch.randperm(8)[:3] for _ in range(4)])]  # [B, N, D]
    features = centres.repeat_interleave(5, dim=1) + 0.1 * torch.randn(4, 15, 8)
    labels = torch.arange(3).repeat_interleave(5).expand(4, 15)
    weight, bias = fit_heads(features, labels, 3, steps=100, rate=1.0, decay=0.0)
    assert torch.equal((features @ weight + bias).argmax(-1), labels)
    alone, _ = fit_heads(features[1:2], labels[1:2], 3, steps=100, rate=1.0, decay=0.0)
    assert torch.allclose(weight[1], alone[0], atol=1e-4)  # tasks do not mix


def test_accuracy_of_a_perfect_and_a_blind_classifier():
    drawings = LabelledDrawings(known_dataset(num_classes=6), range(6), 5, seed=0, device="cpu", jitter=0.0)
    model = Classifier(Conv4(width=4), 6)
    model.forward = lambda images, dtype: -(images[:, 0, 0, :1] * 255 - torch.arange(6)).abs()
    assert held_out_accuracy(model, drawings, torch.float32).tolist() == [1.0] * 30
    model.forward = lambda images, dtype: torch.zeros(len(images), 6)
    assert held_out_accuracy(model, drawings, torch.float32).mean() == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--jitter", "0", "--held_out", "3", "--num_classes", "3", "--dtype", "float32"],
        ["--adapt", "all", "--head_steps", "2", "--num_test_tasks", "3", "--num_query", "2", "--split", "lake"],
        ["--head_rate", "0.5", "--head_decay", "0", "--finetune_rate", "1e-3", "--learning_rate", "1e-2"],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    metrics = transfer.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", "a", *flags])
    assert metrics["steps"] == 20 and metrics["pretrained_classes"] + metrics["finetuned_classes"] == 1623
    again = transfer.main(["--test", "--checkpoint", str(tmp_path / "a")])
    assert again["test_accuracy"] == metrics["test_accuracy"]
    assert again["finetuned_accuracy"] == metrics["finetuned_accuracy"]


def test_resume_in_both_phases_is_bit_exact(tmp_path, monkeypatch):
    """Stopped after 5 (phase 1) and after 15 steps (phase 2), the run ends where the whole one ends."""

    def weights(name):
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["objects"]["model"]

    base = [*SMOKE, "--num_test_tasks", "4", "--log_dir", str(tmp_path)]
    transfer.main([*base, "--run_name", "whole"])
    for stop in (5, 15):
        real = experiment.Run.save

        def save(run, real=real, stop=stop):
            real(run)
            if run.step == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(experiment.Run, "save", save)
            transfer.main([*base, "--run_name", f"stopped{stop}"])
        transfer.main(["--resume", str(tmp_path / f"stopped{stop}")])
        a, b = weights("whole"), weights(f"stopped{stop}")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_contradictory_flags():
    with pytest.raises(UserError, match="--finetune_steps 20 must be less"):
        transfer.parse_args([*SMOKE, "--finetune_steps", "20"])
    with pytest.raises(UserError, match="--rotations"):
        transfer.parse_args([*SMOKE, "--rotations"])
