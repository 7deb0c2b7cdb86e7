"""On a GPU: a replayed step is the step, all scripts run, and two processes share one card. Skipped without one."""

from fewshot.experiment.replay import Gradient, Replayed
from fewshot.learners.conv4 import Conv4
from fewshot.learners.memory import one_step_late
from fewshot.learners.muon import Muon
from fewshot.learners.task_loop import mean_over_tasks
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import load_dataset

import json
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import REPO, known_dataset, one_line_error
from torch.func import vmap

import hw1
import protonet
from maml import MAML, Setting, multi_step_loss, task_loss

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
cuda = torch.device("cuda")
SCRIPTS = [
    "hw1.py", "attention.py", "external_memory.py", "protonet.py", "protonet.py --encoder residual",
    "maml.py", "maml.py --first_order", "maml.py --head proto --optimizer muon", "maml.py --freeze_body",
    "maml.py --inner_steps 2 --multi_step_loss --learn_inner_lrs --per_step_norm --optimizer muon", "meta_lstm.py",
    "transfer.py", "mae.py", "memorization.py", "bayes.py", "profile_costs.py", "feature_weights.py --part closed_form",
]  # fmt: skip
NO_REPORT = ("profile_costs.py", "feature_weights.py")  # they write tables


def test_without_a_gpu_nothing_is_recorded():
    seen = []

    def compute(x):
        seen.append(x)
        return [2 * x]

    doubled = Replayed(compute, torch.device("cpu"))
    one, two = torch.ones(2), torch.ones(2)
    assert doubled(one)[0].tolist() == [2, 2] and doubled(two)[0].tolist() == [2, 2]
    assert seen[0] is one and seen[1] is two and len(seen) == 2


def test_the_gradient_of_a_step_replaces_that_of_the_step_before():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})

    def compute(x):
        loss = model["used"](x).sum()
        loss.backward()
        return loss.detach()

    gradient = Gradient(compute, model, torch.device("cpu"))
    model["unused"].weight.grad = torch.ones(1, 2)
    for x in (torch.ones(1, 2), torch.full((1, 2), 3.0)):
        assert gradient(x) == model["used"](x).sum()
        assert torch.equal(model["used"].weight.grad, x) and model["unused"].weight.grad is None


def trained(make, steps: int, replays: bool) -> tuple[list, list]:
    """Losses and parameters of `steps` training steps, with graphs or without."""
    torch.manual_seed(0)
    model, compute, generators, optimizer = make()
    gradient = Gradient(compute, model, cuda, generators)
    gradient.replayed.records = replays
    losses = []
    for _ in range(steps):
        losses.append(gradient().clone())
        optimizer.step()
    return losses, [*model.parameters(), *model.buffers(), *[g.get_state() for g in generators]]


def of_protonet():
    encoder = Conv4(width=16).to(cuda, memory_format=torch.channels_last)
    sampler = EpisodeSampler(load_dataset("glyphs"), "train", 10, 1, 1, 1, 1, cuda, jitter=0.1, shift=0.1)

    def compute():
        loss = protonet.episode_loss(encoder, sampler.sample(), 10, torch.float32)
        loss.backward()
        return loss.detach()

    # Not Muon: it makes steps of the order of sums where the gradient is almost none.
    return encoder, compute, [sampler.generator], torch.optim.SGD(encoder.parameters(), 0.1)


def of_maml(**setting):
    learner = MAML(Conv4(width=16, strided=True), 5, 2, 0.1, learn=True).to(cuda)
    sampler = EpisodeSampler(load_dataset("glyphs"), "train", 5, 1, 2, 4, 1, cuda, jitter=0.1)
    s = Setting(5, sphere=True, **setting)

    def compute():
        loss_of = partial(multi_step_loss, learner.theta(), learner.step_sizes(2), s=s, weights=[0.5, 0.5])
        loss = mean_over_tasks(loss_of, sampler.sample(), learner)
        loss.backward()
        return loss.detach()

    optimizer = torch.optim.Adam(learner.parameters(), 1e-3, fused=True)
    return learner, compute, [sampler.generator], optimizer


def of_mann():
    model = hw1.MANN(5, 2, 32).to(cuda)
    sampler = EpisodeSampler(load_dataset("glyphs"), "train", 5, 1, 1, 8, 1, cuda)

    def compute():
        images, labels = sampler.sample_rows()
        loss = model.loss_function(model(images, labels), labels)
        loss.backward()
        return loss.detach()

    return model, compute, [sampler.generator], torch.optim.Adam(model.parameters(), 1e-3, fused=True)


@gpu
@pytest.mark.parametrize("make", [of_protonet, of_maml, partial(of_maml, first_order=True), of_mann])
def test_a_replayed_step_is_the_step(make):
    """The same losses, parameters, running averages and streams, to what the order of sums changes on a GPU."""
    (losses, values), (replayed, replayed_values) = trained(make, 4, False), trained(make, 4, True)
    assert len({float(loss) for loss in losses}) == 4  # a step that repeats the last one's tasks would show here
    torch.testing.assert_close(torch.stack(replayed), torch.stack(losses), rtol=1e-4, atol=1e-5)
    for a, b in zip(replayed_values, values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@gpu
def test_replayed_steps_of_muon_are_its_steps():
    torch.manual_seed(0)
    models = [Conv4(width=16).to(cuda, memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Muon(model.parameters(), 0.05) for model in models]
    for _ in range(4):
        for pair in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn_like(pair[0])
            for p in pair:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        for replayed in optimizers[1].replayed.values():
            replayed.records = False  # from the second step on
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@gpu
def test_a_gpu_samples_as_evenly_as_a_cpu():
    """No class or image twice in a task, each equally often, and no look at a value while drawing."""
    sampler = EpisodeSampler(known_dataset(30, 20), "train", 5, 1, 1, 500, 1, cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, order = sampler.draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows, order = rows.cpu(), order.cpu()
    classes = rows[:, :, 0] // 20
    assert all(len(set(task.tolist())) == 5 for task in classes) and (rows[:, :, 0] != rows[:, :, 1]).all()
    counts = torch.bincount(classes.flatten(), minlength=30).double()
    assert ((counts - 2500 / 30) ** 2 / (2500 / 30)).sum() < 58  # chi-square, 29 degrees of freedom, p 0.001
    assert all(sorted(task.tolist()) == list(range(5)) for task in order)


@gpu
def test_a_gpu_is_tested_on_the_tasks_of_a_cpu():
    """Validation and test tasks, the order of sequences with late labels, and distorted copies."""
    dataset = load_dataset("glyphs")
    here, there = (EpisodeSampler(dataset, "test", 5, 1, 3, 4, 1, device) for device in ("cpu", cuda))
    pairs = list(zip(here.sample(), there.sample(), strict=True))
    here, there = (EpisodeSampler(dataset, "val", 5, 2, 1, 4, 1, device) for device in ("cpu", cuda))
    sequences = [one_step_late(*sampler.sample_rows(), sampler.generator) for sampler in (here, there)]
    for a, b in [*pairs, *zip(*sequences, strict=True)]:
        assert b.is_cuda
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)  # a card divides pixels by 255 a little otherwise
    again = pickle.loads(pickle.dumps(there))
    assert again.images.is_cuda and torch.equal(again.draw()[0], there.draw()[0])


@gpu
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_run_does_not_change_the_device(first, run_script, tmp_path):
    """Resumed where it was trained it goes on, even if another device were chosen by itself; elsewhere one line."""
    flags = ["--smoke", "--dataset", "glyphs", "--schedule", "constant", "--log_dir", tmp_path, "--run_name", "run"]
    assert run_script("hw1.py", *flags, "--device", first).returncode == 0
    other = {"cpu": "cuda", "cuda": "cpu"}[first]
    refused = run_script("hw1.py", "--resume", tmp_path / "run", "--train_steps", 60, "--device", other)
    one_line_error(refused, "--device", first)
    assert run_script("hw1.py", "--resume", tmp_path / "run", "--train_steps", 60).returncode == 0


@gpu
def test_tasks_together_have_the_meta_gradient_of_a_loop():
    torch.manual_seed(0)
    learner = MAML(Conv4(width=8, strided=True), 5, 1, 0.4).to(cuda).double()
    sampler = EpisodeSampler(load_dataset("glyphs"), "train", 5, 1, 2, 3, 1, cuda)
    batch = tuple(x.double() if x.is_floating_point() else x for x in sampler.sample())
    loss_of = partial(task_loss, learner.theta(), learner.step_sizes(1), s=Setting(5))
    parameters = [p for p in learner.parameters() if p.requires_grad]
    together = torch.autograd.grad(vmap(loss_of)(*batch).mean(), parameters)
    single = torch.stack([loss_of(*task) for task in zip(*batch, strict=True)]).mean()
    for a, b in zip(together, torch.autograd.grad(single, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@gpu
@pytest.mark.parametrize("command", SCRIPTS)
def test_every_script_runs_and_resumes(command, run_script, tmp_path):
    script, *flags = command.split()
    data = (
        []
        if script in ("profile_costs.py", "feature_weights.py", "bayes.py", "memorization.py")
        else ["--dataset", "glyphs"]
    )
    done = run_script(script, *flags, "--smoke", *data, "--device", "cuda", "--log_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert script in NO_REPORT or json.loads(done.stdout.splitlines()[-1])["seed"] == 1


@gpu
@pytest.mark.parametrize("script", ["protonet.py", "maml.py", "hw1.py"])
def test_two_processes_share_a_gpu(script, work, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPO / script), "--smoke", "--dataset", "glyphs", "--device", "cuda", "--meta_batch_size", "8"]
    done = subprocess.run(
        [*command, "--log_dir", str(tmp_path)],
        cwd=work, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = tmp_path.glob("*/metrics.json")
    assert json.loads(found.read_text())["processes"] == 2
