"""bench/: its doors, the plain loader, what is kept, peers that must show that they compute the same."""

from fewshot import experiment
from fewshot.learners.conv4 import Conv4

import json
from argparse import Namespace

import pytest
import torch
from conftest import REPO, known_dataset

from bench import __main__ as door
from bench import machines, peers, races, ship
from bench.episodes import ListSampler
from bench.machines import seconds_to_accuracy
from bench.races import keep
from studies import speed

pytestmark = pytest.mark.thorough  # races take seconds each


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
    args = Namespace(command="python -m bench mann", git_commit="abc")
    race = {"title": "mann, N 2", "device": "cpu, 1 threads", "course step": {"ms": 2.0, "ratio": 1.0}}
    for processor, ms in (("AMD", 2.0), ("Intel", 3.0), ("Intel", 4.0)):
        monkeypatch.setattr(experiment, "processor", lambda processor=processor: processor)
        keep([race | {"course step": {"ms": ms, "ratio": 1.0}}], args, tmp_path / "speed.json")
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert [(r["processor"], r["course step"]["ms"]) for r in kept] == [("AMD", 2.0), ("Intel", 4.0)]
    assert all(r["command"] == args.command and r["git_commit"] == "abc" and "torch" in r["versions"] for r in kept)


def test_the_door_finds_every_room_and_names_them_where_it_finds_none(monkeypatch, capsys):
    assert set(races.BENCHMARKS) == {"episodes", "mann", "protonet", "maml", "meta_lstm", "costs", "gpu",
                                     "processes", "busy"}  # fmt: skip
    assert door.main(["--help"]) is None and "python -m bench NAME" in capsys.readouterr().out
    with pytest.raises(experiment.UserError, match="mann.*growth, ship"):
        door.main(["nothing"])
    for room in door.ROOMS:
        with pytest.raises(SystemExit) as stop:
            door.main([room, "--help"])
        assert stop.value.code == 0 and f"-m bench {room}" in capsys.readouterr().out


def test_every_training_is_that_of_a_script_at_the_top():
    for training in (*machines.TRAININGS, *machines.BUSY):
        assert (machines.REPO / training.split()[0]).is_file()
    assert ship.RESULT == REPO / "results" / "shipped.json"


def test_a_busy_computer_is_raced(tmp_path, monkeypatch):
    """A training beside no, one and two endless loops, with threads that always spin and with ours."""
    monkeypatch.setattr(machines, "BUSY", ("hw1.py --hidden_dim 8 --num_test_tasks 8",))
    [result] = races.main(["busy", "--smoke", "--dataset", "glyphs", "--device", "cpu"])
    times = {name: value["ms"] for name, value in result.items() if isinstance(value, dict)}
    assert list(times) == [f"{n} loops, {whose}" for n in (0, 1, 2) for whose in ("spinning", "ours")]
    assert min(times.values()) > 0


@pytest.mark.slow
def test_processes_are_raced(tmp_path, monkeypatch):
    """A whole training in one process with one and two threads and in two processes, each as it says."""
    monkeypatch.setattr(machines, "TRAININGS", ("hw1.py --num_test_tasks 8",))
    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--out", str(tmp_path)]
    [result] = races.main(["processes", *flags])
    rates = [value["tasks_per_second"] for value in result.values() if isinstance(value, dict)]
    assert len(rates) == 3 and min(rates) > 0
    assert json.loads((tmp_path / "speed.json").read_text())[0]["title"] == "hw1.py --num_test_tasks 8"


# -------------------------------------------------------------------------------------- peers


def tiny(**more) -> Namespace:
    sizes = {"meta_batch_size": 2, "num_shot": 1, "num_classes": 3, "num_query": 2, "random_seed": 1}
    return Namespace(**sizes | {"hidden_dim": 8, "smoke": True} | more)


def quadratic_step(offset: float = 0.0):
    """(loss, gradient) of a function of two numbers; `offset` is an error in the gradient."""
    return lambda: (2.0, torch.tensor([1.0, 2.0 + offset], dtype=torch.float64))


def test_a_peer_that_differs_is_refused_with_a_line(capsys):
    others = {"same": quadratic_step(), "close": quadratic_step(1e-9), "wrong": quadratic_step(1e-6)}
    others |= {"nan": quadratic_step(float("nan")), "loss": lambda: (2.1, quadratic_step()()[1])}
    assert peers.admitted("a race", quadratic_step(), others) == ["same", "close"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["wrong", "nan", "loss"]
    assert all("is refused" in line and "a race" in line for line in lines)


def test_a_peer_that_is_not_installed_gives_a_line_and_no_race(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(peers, "import_module", missing)
    for kind, names in (("maml", ["higher", "torchopt"]), ("protonet", ["easyfsl"]), ("costs", ["higher", "torchopt"])):
        data = None if kind == "costs" else known_dataset()
        assert list(peers.RACES[kind](tiny(), torch.device("cpu"), data)) == []
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == names
        assert all("left out" in line and "requirements-peers.txt" in line for line in lines)


def plain_inner_loop(net, loss_of, tasks, rate, steps, wrong_rate=1.0):
    """A peer made of torch alone, which needs no installation."""
    total, names = 0.0, [name for name, _ in net.named_parameters()]
    for x, y, query_x, query_y in zip(*tasks, strict=True):
        call = lambda weights, x: torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,))
        fast = list(net.parameters())
        for _ in range(steps):
            found = torch.autograd.grad(loss_of(call(fast, x), y), fast, create_graph=True)
            fast = [w - rate * wrong_rate * g for w, g in zip(fast, found, strict=True)]
        loss = loss_of(call(fast, query_x), query_y) / len(tasks[0])
        loss.backward()
        total += loss.item()
    return total


def one_loop(monkeypatch, wrong_rate: float) -> None:
    loop = lambda *args: plain_inner_loop(*args, wrong_rate=wrong_rate)
    monkeypatch.setattr(peers, "INNER_LOOPS", {"plain": loop})
    monkeypatch.setattr(peers, "MODULES", {"plain": "torch"})


@pytest.mark.parametrize("kind", ["maml", "costs"])
def test_an_independent_inner_loop_is_admitted_and_a_wrong_one_is_not(kind, monkeypatch, capsys):
    """Ours, the network that peers get, and the order of the gradients agree with torch's own to 1e-8."""
    data, cpu = None if kind == "costs" else known_dataset(), torch.device("cpu")
    monkeypatch.setattr(peers, "Conv4", lambda channels, strided: Conv4(channels, 4, strided=strided))
    one_loop(monkeypatch, 1.0)
    races = dict(peers.RACES[kind](tiny(), cpu, data))
    assert len(races) == (4 if kind == "maml" else 1)
    for title, contestants in races.items():
        assert title.startswith(f"peers, {kind}, ") and list(contestants) == ["ours", "plain"]
        [step() for step in contestants.values()]
    one_loop(monkeypatch, 1 + 1e-5)
    assert list(peers.RACES[kind](tiny(), cpu, data)) == []
    assert "plain is refused" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "names"), [("maml", ["higher", "torchopt"]), ("costs", ["higher", "torchopt"])])
def test_installed_inner_loops_agree(kind, names, monkeypatch):
    for name in names:
        pytest.importorskip(name)
    monkeypatch.setattr(peers, "Conv4", lambda channels, strided: Conv4(channels, 4, strided=strided))
    data = None if kind == "costs" else known_dataset()
    for _, contestants in peers.RACES[kind](tiny(), torch.device("cpu"), data):
        assert list(contestants) == ["ours", *names]
        [step() for step in contestants.values()]


def test_installed_prototypes_agree(monkeypatch):
    pytest.importorskip("easyfsl.methods")
    monkeypatch.setattr(peers, "Conv4", lambda channels: Conv4(channels, 4))
    [(title, contestants)] = peers.RACES["protonet"](tiny(), torch.device("cpu"), known_dataset())
    assert title == "peers, protonet, B 2, N 3, K 1, Q 2" and list(contestants) == ["ours", "easyfsl"]
    [step() for step in contestants.values()]


def test_peers_are_raced_and_kept(monkeypatch, tmp_path):
    """From the flag to speed.json and the table; of a benchmark without peers the flag is refused."""
    one_loop(monkeypatch, 1.0)
    monkeypatch.setitem(races.BENCHMARKS, "costs", lambda *_: [])
    races.main(["costs", "--smoke", "--peers", "--hidden_dim", "8", "--device", "cpu", "--out", str(tmp_path)])
    [race] = json.loads((tmp_path / "speed.json").read_text())
    assert race["title"] == "peers, costs, MAML, B 4, hidden 2 x 8, 5 inner steps"
    assert race["ours"]["ratio"] == 1.0 and race["plain"]["ms"] > 0 and "--peers" in race["command"]
    assert "| peers, ms | on | ours | plain |" in speed.races(tmp_path)
    with pytest.raises(experiment.UserError, match="--peers"):
        races.main(["mann", "--peers", "--device", "cpu"])
