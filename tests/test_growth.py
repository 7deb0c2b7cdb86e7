"""bench/growth.py: what it fits, and that the steps it measures are the scripts' own, at the sizes it says."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import REPO, one_line_error

import attention
import hw1
import mae
import maml
import meta_lstm
import protonet
import transfer
from bench import growth
from studies import speed, warm

ARGS = Namespace(smoke=True, repeats=1, device="cpu", dtype="float32", random_seed=1)


def test_a_quadratic_is_fitted_with_power_two():
    values = [1, 2, 4, 8, 16]
    assert growth.power([(v, 3e-3 * v**2) for v in values]) == 2.0
    assert growth.power([(v, 5.0) for v in values]) == 0.0
    assert growth.power([(1, 1.0)]) is None and growth.power([]) is None


def test_the_constant_part_of_a_step_does_not_bend_the_power():
    curve = [(v, 1 + 1e-2 * v**2) for v in (1, 2, 4, 100, 200, 400)]
    assert growth.upper_half(curve) == curve[3:]
    assert growth.power(growth.upper_half(curve)) == pytest.approx(2, abs=0.01) and growth.power(curve) < 1.9
    assert [v for v, _ in growth.upper_half(curve[:5])] == [4, 100, 200]
    assert growth.upper_half(curve[:2]) == curve[:2]


def test_fits_skip_what_was_skipped():
    rows = [{"method": "mae", "axis": "B", "value": v, "seconds": v**2, "peak_bytes": v} for v in (1, 2, 4, 8)]
    rows.append({"method": "mae", "axis": "B", "value": 16, "skipped": "too long"})
    found = {fit["axis"]: fit for fit in growth.fits(rows)}
    assert found["B"] == {"method": "mae", "axis": "B", "fitted_over": [4, 8], "seconds": 2.0, "peak_bytes": 1.0}
    assert found["side"]["seconds"] is None and found["side"]["fitted_over"] == []


# Of each method where its loss can be looked at, and what it says of N, K, Q, B and side there.


def sides(images: torch.Tensor) -> dict:
    return {"channels": images.shape[-3], "side": images.shape[-1]}


def seen_by_hw1(model, images):
    rows, N = images.shape[1:3]
    return {"N": N, "K": rows - 1, "B": len(images), "side": round(images.shape[-1] ** 0.5)}


def seen_by_protonet(encoder, episode, num_classes, dtype):
    (support, _, query, _), N = episode, num_classes
    return {"N": N, "K": support.shape[1] // N, "Q": query.shape[1] // N, "B": len(support)} | sides(support)


def seen_by_maml(loss_of, batch, learner):
    support, _, query, _ = batch
    N = len(learner.head_weight)
    return {"N": N, "K": support.shape[1] // N, "Q": query.shape[1] // N, "B": len(support)} | sides(support)


def seen_by_meta_lstm(tasks, tasks_at_once):
    support, labels, query, _ = tasks
    N = int(labels.max()) + 1
    return {"N": N, "K": support.shape[1] // N, "Q": query.shape[1] // N, "B": len(support)} | sides(support)


def seen_by_transfer(model, images, dtype, **_):
    return {"N": model.head.out_features, "B": len(images)} | sides(images)


def seen_by_mae(model, images, order, args, dtype):
    return {"B": len(images) // 2} | sides(images)  # two views


SPIES = {
    "mann": (hw1.MANN, "encode", seen_by_hw1),
    "protonet": (protonet, "episode_loss", seen_by_protonet),
    "maml": (maml, "mean_over_tasks", seen_by_maml),
    "meta_lstm": (meta_lstm, "in_parts", seen_by_meta_lstm),
    "transfer": (transfer.Classifier, "forward", seen_by_transfer),
    "mae": (mae, "losses", seen_by_mae),
}


@pytest.mark.parametrize("name", SPIES)
def test_every_axis_reaches_the_step(name, monkeypatch):
    """The loss sees the value that a point names, and the defaults on all other axes."""
    owner, attribute, look = SPIES[name]
    original, seen = getattr(owner, attribute), []

    def spy(*args, **kwargs):
        seen.append(look(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, spy)
    defaults = {axis: growth.default(name, axis, ARGS) for axis in growth.METHODS[name].axes}
    for axis, (_, values) in growth.METHODS[name].axes.items():
        value = next(v for v in values if v != defaults[axis])
        seen.clear()
        found = growth.run_point({"method": name, "axis": axis, "value": value}, ARGS, {})
        assert found["seconds"] > 0 and found["peak_bytes"] > 0 and found["repeats"] == 1
        assert len(seen) == 3  # one to warm up, one timed, one weighed
        assert all({axis: step[axis] for axis in defaults} == defaults | {axis: value} for step in seen)
    if name != "mann":
        seen.clear()
        growth.run_point({"method": name, "axis": "colour", "value": 32, "varied": "side", "channels": 3}, ARGS, {})
        assert {(step["channels"], step["side"]) for step in seen} == {(3, 32)}


def test_classes_and_tasks_of_attention_reach_the_step(monkeypatch):
    seen, original = [], attention.deal_tasks

    def spy(features, labels, B, N, generator):
        seen.append((B, N, features.shape[1] - 1))
        return original(features, labels, B, N, generator)

    monkeypatch.setattr(attention, "deal_tasks", spy)
    for axis, value in (("N", 3), ("B", 2), ("K", 2)):
        growth.run_point({"method": "attention", "axis": axis, "value": value}, ARGS, {})
    assert seen == [(4, 3, 1)] * 3 + [(2, 5, 1)] * 3 + [(4, 5, 2)] * 3


def test_the_defaults_are_measured_once_and_every_point_has_its_name(monkeypatch):
    calls = []
    monkeypatch.setattr(growth, "measure", lambda name, flags, *rest: calls.append((name, *flags)) or {"seconds": 1.0})
    full = Namespace(**vars(ARGS) | {"smoke": False})
    for name in growth.METHODS:
        known, todo = {}, growth.points(name, full)
        rows = [growth.run_point(point, full, known) for point in todo]
        assert all(row["seconds"] == 1.0 for row in rows)
        named = {row["axis"] for row in rows}
        assert {"default", *growth.METHODS[name].axes} <= named
        assert ("100-way" in named) == (name not in ("transfer", "mae"))
        assert ("84 x 84 colour" in named) == (name != "attention")
    assert ("maml", "--num_classes", "100") in calls and ("maml",) in calls
    assert calls.count(("maml",)) == 1 and calls.count(("protonet",)) == 1


def test_a_long_point_is_skipped_after_one_step(monkeypatch):
    monkeypatch.setattr(growth, "LIMIT", 1e-6)
    found = growth.run_point({"method": "mae", "axis": "B", "value": 32}, ARGS, {})
    assert "seconds" not in found and "a step takes" in found["skipped"]


def test_threads_are_what_they_were_after_the_record(monkeypatch):
    before = torch.get_num_threads()
    growth.run_point({"method": "mae", "axis": "B", "value": 16}, ARGS, {})
    assert torch.get_num_threads() == before


def test_memory_grows_with_the_meta_batch():
    few, many = (growth.run_point({"method": "mae", "axis": "B", "value": B}, ARGS, {}) for B in (32, 128))
    assert 2 < many["peak_bytes"] / few["peak_bytes"] < 5
    again = growth.run_point({"method": "mae", "axis": "B", "value": 32}, ARGS, {})
    # Within a few per cent: what the step before has left is released sooner or later.
    assert again["peak_bytes"] == pytest.approx(few["peak_bytes"], rel=0.05)


def test_smoke_leaves_json_and_pictures(tmp_path):
    found = growth.main(["--smoke", "--method", "transfer", "--device", "cpu", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "growth.json").read_text())
    assert kept == json.loads(json.dumps(found))
    assert kept["command"] == "python -m bench growth --smoke --method transfer --device cpu"
    assert (tmp_path / "speed" / "growth_transfer.png").stat().st_size > 5000
    text = speed.growth(tmp_path) + speed.far(tmp_path)
    assert "| transfer | N 1200, B 32, side 28 |" in text and "32 x 32 colour" in text and "skipped" not in text


def test_the_table_predicts_and_names_what_was_skipped(tmp_path):
    of = lambda axis, value, **more: {"method": "mae", "axis": axis, "value": value} | more
    cost = lambda seconds: {"seconds": seconds, "peak_bytes": 2e6 * seconds}
    rows = [of("default", 0, **cost(0.1)), of("side", 28, **cost(0.1)), of("side", 56, **cost(0.4))]
    rows += [of("84 x 84 colour", 112, varied="side", **cost(9.0)), of("B", 512, skipped="a step takes 9.0 s")]
    result = {"fits": growth.fits(rows), "rows": rows, "defaults": {"mae": {"B": 256, "side": 28}}}
    result |= {"command": "python -m bench growth", "device": "cpu, 2 threads", "processor": "Intel Xeon, AVX512"}
    (tmp_path / "growth.json").write_text(json.dumps(result))
    text = speed.far(tmp_path)
    assert "| mae | 84 x 84 colour | 9000.0; 18.0 | 1600.0; 3.2 |" in text  # four times 0.4 s
    assert "| mae | B 512 | a step takes 9.0 s | - |" in text
    assert "| mae | B 256, side 28 | 100.0; 0.2 |" in speed.growth(tmp_path)
    assert speed.growth(tmp_path / "elsewhere") == speed.far(tmp_path / "elsewhere") == "(not measured)"


def test_noise_is_the_same_every_time():
    one, other = (growth.noise(5, 8, 28, 3) for _ in range(2))
    assert one.images.shape == (40, 3, 28, 28) and np.array_equal(one.images, other.images)


def test_an_out_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    words = ["growth", "--smoke", "--method", "mae", "--out", tmp_path / "file"]
    result = warm.run("-m", "bench", *words, cwd=tmp_path, env={"PYTHONPATH": str(REPO)})
    one_line_error(result, "--out")
