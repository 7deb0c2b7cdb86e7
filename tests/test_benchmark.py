"""The plain references of benchmark.py compute what the fast paths compute."""

import experiment

import json
from argparse import Namespace

import pytest
import torch
from conftest import known_dataset

import benchmark
from backbone import Conv4
from benchmark import (
    CourseMANN,
    ListSampler,
    PlainConv4,
    course_step,
    keep,
    our_step,
    plain_protonet_step,
    seconds_to_accuracy,
)
from hw1 import MANN
from load_data import EpisodeSampler
from protonet import proto_logits


def test_course_network_and_ours_are_the_same_function():
    torch.manual_seed(0)
    ours, course = MANN(4, 2, 16).double(), CourseMANN(4, 16).double()
    course.layer1.load_state_dict(ours.layers[0].state_dict())
    course.layer2.load_state_dict(ours.layers[1].state_dict())
    images = torch.rand(3, 2, 4, 784, dtype=torch.float64)
    labels = torch.eye(4, dtype=torch.float64).expand(3, 2, 4, 4).clone()
    assert torch.allclose(ours(images, labels), course(images, labels), atol=1e-14)
    # One step of plain Adam and one of ours, which runs fused, end at the same parameters.
    course_step(course, torch.optim.Adam(course.parameters(), 1e-3), images, labels)
    our_step(ours, torch.optim.Adam(ours.parameters(), 1e-3, fused=True), images, labels, torch.float32)
    for a, b in zip(ours.parameters(), course.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_plain_protonet_step_is_ours_for_one_task():
    torch.manual_seed(0)
    plain, ours = PlainConv4(width=8), Conv4(width=8)
    with torch.no_grad():
        for i in range(4):
            plain[4 * i].weight.copy_(getattr(ours, f"weight{i}"))
            plain[4 * i].bias.zero_()
    support, support_labels, query, query_labels = EpisodeSampler(known_dataset(), "train", 4, 2, 2, 1, 1).sample()
    task = (support[0], support_labels[0], query[0], query_labels[0])
    loss = plain_protonet_step(plain, torch.optim.SGD(plain.parameters(), 0.0), [task])
    # The plain way normalises support and query apart; so must ours, to be compared.
    features = [ours(x[0], norm="batch")[None] for x in (support, query)]
    expected = torch.nn.functional.cross_entropy(proto_logits(*features, 4)[0], query_labels[0])
    assert abs(loss - expected.item()) < 1e-3 * expected.item()


@pytest.mark.parametrize(("target", "reached"), [(0.25, True), (1.0, False)])
def test_seconds_to_an_accuracy(target, reached, work, monkeypatch):
    monkeypatch.chdir(work)
    flags = Namespace(seeds=2, device="cpu", dtype="float32", dataset="glyphs", data_folder=None, smoke=True)
    found = seconds_to_accuracy(flags, target)
    assert len(found["seconds"]) == 2
    assert all(seconds > 0 for seconds in found["seconds"]) if reached else found["seconds"] == [None, None]


def test_list_sampler_draws_proper_episodes(tmp_path):
    sampler = ListSampler(known_dataset(), "train", 4, 2, 0, tmp_path)
    images, labels = sampler.sample(50)
    assert images.shape == (50, 3, 4, 784) and labels.shape == (50, 3, 4, 4)
    classes = (images[..., 0] * 255).round().long()
    assert torch.equal(labels[:, :2], torch.eye(4).expand(50, 2, 4, 4))
    assert torch.equal(classes[:, 0].gather(1, labels[:, 2].argmax(-1)), classes[:, 2])
    assert (labels[:, 2].argmax(-1) != torch.arange(4)).any()  # queries are shuffled


def test_races_are_kept_by_title_and_processor(tmp_path, monkeypatch):
    args = Namespace(command="python benchmark.py mann", git_commit="abc")
    race = {"title": "mann, N 2", "device": "cpu, 1 threads", "course step": {"ms": 2.0, "ratio": 1.0}}
    for processor, ms in (("AMD", 2.0), ("Intel", 3.0), ("Intel", 4.0)):
        monkeypatch.setattr(experiment, "processor", lambda processor=processor: processor)
        keep([race | {"course step": {"ms": ms, "ratio": 1.0}}], args, tmp_path / "speed.json")
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert [(r["processor"], r["course step"]["ms"]) for r in kept] == [("AMD", 2.0), ("Intel", 4.0)]
    assert all(r["command"] == args.command and r["git_commit"] == "abc" and "torch" in r["versions"] for r in kept)


@pytest.mark.slow
def test_processes_are_raced(tmp_path, monkeypatch):
    """A whole training in one process with one and two threads and in two processes, each as it says."""
    monkeypatch.setattr(benchmark, "TRAININGS", ("hw1.py --num_test_tasks 8",))
    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--out", str(tmp_path)]
    [result] = benchmark.main(["processes", *flags])
    rates = [value["tasks_per_second"] for value in result.values() if isinstance(value, dict)]
    assert len(rates) == 3 and min(rates) > 0
    assert json.loads((tmp_path / "speed.json").read_text())[0]["title"] == "hw1.py --num_test_tasks 8"
