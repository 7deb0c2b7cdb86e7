"""MAML and ES on sinusoids: exact gradients against a plain network, the memory count, sweeps that resume."""

from fewshot.experiment import UserError
from fewshot.learners.mlp import Initialisation, inner_step_in_factors, inner_step_in_place, mse, predict

import csv
import json
import math
import re
import shlex
import weakref
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, one_line_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import basics.evolution_strategies
import profile_costs
from bench import races
from bench.meters import peak_memory
from bench.sweeps import COLUMNS, fit
from profile_costs import es_gradient, inner_step, maml_gradient, parse_args, sample_tasks

RATE = 0.05


def network(layers=2, hidden=7, seed=0):
    """An initialisation in float64, and the same function as an nn.Sequential."""
    torch.manual_seed(seed)
    model = Initialisation(layers, hidden).double()
    plain = basics.evolution_strategies.mlp(layers, hidden).double()
    with torch.no_grad():
        for linear, (W, b) in zip([m for m in plain if isinstance(m, nn.Linear)], model(), strict=True):
            linear.weight.copy_(W.T)
            linear.bias.copy_(b[0])
    return model, plain


def tasks(B=5, K=6, Q=9, seed=1):
    torch.manual_seed(seed)
    return sample_tasks(B, K, Q, dtype=torch.float64)


def gradient(model, *args, **kwargs):
    model.theta.grad = None
    loss = maml_gradient(model, *args, **kwargs)
    return model.theta.grad.clone(), loss


def flat(plain, values):
    """Gradients of an nn.Sequential's parameters in the order of theta."""
    values = dict(zip([name for name, _ in plain.named_parameters()], values, strict=True))
    return torch.cat([(v.T if v.dim() == 2 else v).reshape(-1) for v in values.values()])


# --------------------------------------------------------------------------------- the tasks


def test_sinusoids_are_what_the_homework_asks_for():
    x, y, query_x, query_y = tasks(B=4000, K=10, Q=100)
    assert x.shape == y.shape == (4000, 10, 1) and query_x.shape == query_y.shape == (4000, 100, 1)
    assert torch.equal(query_x[0], query_x[7]) and query_x[0, 0] == 0 and query_x[0, -1] == pytest.approx(2 * math.pi)
    # Any such curve is p sin x + q cos x + r; solved from the queries it must also go through the support points.
    basis = lambda x: torch.stack([x.sin(), x.cos(), torch.ones_like(x)], dim=-1).squeeze(-2)
    p = torch.linalg.lstsq(basis(query_x), query_y).solution
    assert torch.allclose(basis(x) @ p, y, atol=1e-9)
    amplitude, phase, bias = p[:, :2].norm(dim=1).squeeze(-1), torch.atan2(p[:, 1], p[:, 0]), p[:, 2].squeeze(-1)
    for value, low, high in ((amplitude, 0.5, 1), (phase, -math.pi, math.pi), (bias, -0.3, 0.3), (x, 0, 2 * math.pi)):
        assert low - 1e-9 <= value.min() and value.max() <= high + 1e-9
        sigma = (high - low) / math.sqrt(12 * value.numel())  # of the mean of a uniform sample
        assert abs(value.mean() - (low + high) / 2) < 5 * sigma
    assert abs(np.corrcoef(amplitude, bias)[0, 1]) < 5 / math.sqrt(4000)


# -------------------------------------------------------------------------- network and steps


@pytest.mark.parametrize("layers", [1, 3])
def test_network_is_the_plain_one(layers):
    model, plain = network(layers)
    x = tasks()[0]
    assert torch.allclose(predict(model(), x), plain(x), atol=1e-14)
    assert model.theta.numel() == sum(p.numel() for p in plain.parameters())
    bound = [m.weight.abs().max() * math.sqrt(m.in_features) for m in plain if isinstance(m, nn.Linear)]
    assert all(0.5 < b <= 1 for b in bound)  # drawn as nn.Linear draws


def test_three_inner_steps_equal_sgd_in_every_form():
    model, plain = network()
    x, y, query_x, _ = tasks()
    start = {k: v.clone() for k, v in plain.state_dict().items()}
    expected = []
    for task in range(len(x)):
        plain.load_state_dict(start)
        sgd = torch.optim.SGD(plain.parameters(), RATE)
        for _ in range(3):
            sgd.zero_grad()
            F.mse_loss(plain(x[task]), y[task]).backward()
            sgd.step()
        expected.append(plain(query_x[task]).detach())
    expected = torch.stack(expected)
    fresh, factors = model(), model()
    own = model(model.theta.detach().repeat(len(x), 1))
    for _ in range(3):
        fresh, factors = inner_step(fresh, x, y, RATE), inner_step_in_factors(factors, x, y, RATE)
        inner_step_in_place(own, x, y, RATE)
    for layers in (fresh, factors, own):
        assert torch.allclose(predict(layers, query_x), expected, atol=1e-12)
    assert not torch.allclose(predict(model(), query_x), expected, atol=1e-3)


# ------------------------------------------------------------------------------------- MAML


def reference_gradient(plain, data, steps, create_graph=True):
    """The course's way: task after task, functional weights, autograd through everything."""
    grads, losses = 0, []
    names = [name for name, _ in plain.named_parameters()]
    for x, y, query_x, query_y in zip(*data, strict=True):
        call = lambda fast, x: torch.func.functional_call(plain, dict(zip(names, fast, strict=True)), (x,))
        fast = list(plain.parameters())
        for _ in range(steps):
            step = torch.autograd.grad(F.mse_loss(call(fast, x), y), fast, create_graph=create_graph)
            fast = [w - RATE * g for w, g in zip(fast, step, strict=True)]
        loss = F.mse_loss(call(fast, query_x), query_y) / len(data[0])
        grads = grads + flat(plain, torch.autograd.grad(loss, list(plain.parameters())))
        losses.append(loss.detach())
    return grads, sum(losses)


@pytest.mark.parametrize("method, engine", [("maml", "vmap"), ("maml", "factors"), ("checkpoint", "vmap")])
@pytest.mark.parametrize("at_once, steps", [(1, 3), (2, 4), (5, 5)])
def test_exact_gradient_equals_the_reference(method, engine, at_once, steps):
    model, plain = network()
    data = tasks()
    expected, loss = reference_gradient(plain, data, steps)
    found, found_loss = gradient(model, data, RATE, steps, at_once, method, engine)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-13)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-12)


def test_first_order_gradient_equals_its_reference_and_is_another():
    model, plain = network()
    data = tasks()
    first, _ = gradient(model, data, RATE, 3, 5, "fomaml")
    assert torch.allclose(first, reference_gradient(plain, data, 3, create_graph=False)[0], rtol=1e-9, atol=1e-13)
    assert not torch.allclose(first, gradient(model, data, RATE, 3, 5)[0], rtol=0.01)


def test_exact_gradient_equals_finite_differences():
    model, _ = network()
    x, y, query_x, query_y = data = tasks()
    exact, _ = gradient(model, data, RATE, 3, 5)

    def objective(theta):
        layers = model(theta)
        for _ in range(3):
            layers = inner_step(layers, x, y, RATE)
        return mse(layers, query_x, query_y).mean().item()

    theta, h = model.theta.detach(), 1e-6
    direction = torch.eye(len(theta), dtype=torch.float64)[:: max(1, len(theta) // 25)]
    slopes = [(objective(theta + h * e) - objective(theta - h * e)) / (2 * h) for e in direction]
    assert torch.allclose(torch.tensor(slopes, dtype=torch.float64), direction @ exact, atol=1e-7)
    assert (direction @ exact).abs().max() > 1e-2


# --------------------------------------------------------------------------------------- ES


def es(model, data, at_once, perturbations, sigma, seed=3):
    torch.manual_seed(seed)
    loss = es_gradient(model, data, RATE, 2, at_once, perturbations, sigma)
    return model.theta.grad.clone(), loss


def test_es_is_the_formula_of_the_handout():
    model, _ = network()
    data = tasks(B=4)
    found, loss = es(model, data, 1000, 16, 0.01)
    torch.manual_seed(3)
    eps = [torch.randn(model.theta.numel(), dtype=torch.float64) for _ in range(8)]
    expected, total = 0, 0
    for pair, e in enumerate(eps):
        J = []
        for sign in (1, -1):
            shifted, _ = network()
            shifted.theta.data = model.theta.data + sign * 0.01 * e
            J.append(gradient(shifted, [t[pair % 4 : pair % 4 + 1] for t in data], RATE, 2, 1)[1])
        expected = expected + (J[0] - J[1]) / 0.02 * e / 8
        total += sum(J) / 16
    assert torch.allclose(found, expected, atol=1e-10)
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)


def test_es_does_not_depend_on_how_many_are_computed_together():
    model, _ = network()
    data = tasks(B=4)
    results = []
    for at_once in (1, 2, 3, 6, 16, 100):
        results.append((es(model, data, at_once, 16, 0.01)[0], torch.rand(1)))
    assert all(torch.allclose(r, results[0][0], atol=1e-11) for r, _ in results)
    assert all(torch.equal(after, results[0][1]) for _, after in results)  # the stream goes on from the same place
    assert results[0][0].abs().max() > 1e-3


def test_es_is_unbiased_and_its_cosine_rises():
    model, _ = network(layers=1, hidden=5)
    data = tasks(B=4)
    exact, _ = gradient(model, data, RATE, 2, 4)
    each = torch.stack([gradient(model, [t[n : n + 1] for t in data], RATE, 2, 1)[0] for n in range(4)])
    D, cosines = len(exact), []
    for pairs in (8, 128, 2048, 32768):
        estimate, _ = es(model, data, 4096, 2 * pairs, 1e-4)
        cosines.append(F.cosine_similarity(exact, estimate, dim=0).item())
    assert cosines == sorted(cosines) and cosines[0] < 0.9 and cosines[-1] > 0.995
    # One pair on a task with gradient g gives (eps . g) eps, of mean g and variance |g|^2 + g_i^2.
    variance = (each.square().sum(1, keepdim=True) + each.square()).mean(0) / pairs
    z = (estimate - exact) / variance.sqrt()
    assert z.abs().max() < 5, z
    assert 0.3 < z.square().mean() < 3 and D == 16  # the noise is neither too small nor too large


# ----------------------------------------------------------------------------------- memory


class LiveStorage(TorchDispatchMode):
    """An independent count: bytes of all tensor storages allocated inside and not yet released: `now`, `peak`.

    Every operation passes here. A storage counts from the operation that returns it first until nothing refers to it,
    saved tensors of autograd included. It overstates checkpointed MAML, whose backward keeps more while it watches.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.live = 0, 0, set()

    def release(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = lambda tree: [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.live:
                self.live.add(key)
                weakref.finalize(storage, self.release, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return result


def test_memory_count_on_known_answers():
    peak = lambda function: peak_memory(function, torch.device("cpu"))
    a = torch.zeros(250)  # 1000 bytes, there before
    kept = []
    assert peak(lambda: a.view(5, 50)[1:].mul_(2)) <= 64  # views and in-place results are no new storage; scalars are
    assert peak(lambda: kept.append(a + 1)) == pytest.approx(1000, abs=64)
    assert peak(lambda: ((a + 1).mul_(2) + 1).sum().item()) == pytest.approx(2000, abs=64)  # two alive at once
    assert peak(lambda: [(a + i).sum().item() for i in range(9)]) == pytest.approx(1004, abs=64)  # freed in between
    w = torch.zeros(250, requires_grad=True)
    assert peak(lambda: (w.exp().sin().sum()).detach()) == pytest.approx(2004, abs=64)  # autograd keeps exp for sin
    assert peak(lambda: w.exp().exp().exp().sum()) == pytest.approx(3004, abs=64)  # the graph keeps all three


@pytest.mark.parametrize("method", profile_costs.METHODS)
def test_memory_is_what_an_independent_count_finds(method):
    """Two records of the same step; of a checkpointed one the independent count is an upper bound."""
    for engine in profile_costs.ENGINES[method]:
        flags = Namespace(
            meta_batch_size=4,
            num_perturbations=4,
            num_shot=10,
            num_query=20,
            inner_lr=0.01,
            sigma=1e-3,
            layers=2,
            hidden_dim=64,
            learning_rate=1e-3,
            inner_steps=5,
        )
        model, optimizer = profile_costs.start(flags, torch.device("cpu"))

        def step(model=model, optimizer=optimizer, flags=flags, engine=engine):
            profile_costs.meta_step(model, optimizer, flags, method, engine)
            model.theta.grad = None

        step()  # Adam's state is there from now on
        found = peak_memory(step, torch.device("cpu"))
        with LiveStorage() as meter:
            step()
        if method == "checkpoint":
            assert 0.7 * meter.peak < found <= meter.peak + 1000
        else:
            assert found == pytest.approx(meter.peak, rel=0.07)  # which misses scratch space, and the moment of release


def costs(method, engine="vmap", layers=2, hidden=24, steps=(1, 3, 6, 10)):
    flags = Namespace(
        meta_batch_size=4,
        num_perturbations=4,
        num_shot=10,
        num_query=20,
        inner_lr=0.01,
        sigma=1e-3,
        layers=layers,
        hidden_dim=hidden,
        learning_rate=1e-3,
    )
    found = []
    for flags.inner_steps in steps:
        model, optimizer = profile_costs.start(flags, torch.device("cpu"))
        step = lambda: profile_costs.meta_step(model, optimizer, flags, method, engine)  # noqa: B023
        found.append(peak_memory(step, torch.device("cpu")))
        model.theta.grad = None
        assert peak_memory(step, torch.device("cpu")) == pytest.approx(found[-1], abs=64)  # Adam's state is there now
    return list(steps), found


@pytest.mark.parametrize("engine", ["vmap", pytest.param("loop", marks=pytest.mark.thorough)])
def test_memory_grows_with_inner_steps_for_maml_and_not_for_es(engine):
    maml = fit("inner_steps", *costs("maml", engine))
    assert maml["r2"] > 0.99 and maml["b"] > 0
    for method in ("es", "fomaml"):
        assert abs(fit("inner_steps", *costs(method, engine))["b"]) < 0.02 * maml["b"], method
    steps, kept = costs("maml", engine, steps=(4, 16))
    _, recomputed = costs("checkpoint", engine, steps=steps)
    # From 4 to 16 steps the exact one keeps twelve more, the checkpointed one two segments of two more.
    assert recomputed[1] - recomputed[0] < 0.35 * (kept[1] - kept[0])


def test_factors_do_not_form_the_weights_of_every_task():
    _, (formed,) = costs("maml", hidden=128, steps=(3,))
    _, (factors,) = costs("maml", "factors", hidden=128, steps=(3,))
    assert factors < 0.65 * formed
    widths = [32, 64, 128]
    growth = [
        fit("hidden_dim", widths, [costs("maml", e, hidden=h, steps=(2,))[1][0] for h in widths])["b"]
        for e in ("vmap", "factors")
    ]
    assert growth[0] > growth[1] + 0.3, growth


# ----------------------------------------------------------------------- fits, sweeps, engines


def test_fits_on_known_answers():
    line = fit("layers", [1, 2, 3], [5, 7, 9])
    assert line["form"] == "line" and [line[k] for k in ("a", "b", "r2")] == pytest.approx([3, 2, 1])
    power = fit("hidden_dim", [1, 10, 100], [3, 300, 30000])
    assert power["form"] == "power" and (power["a"], power["b"]) == (pytest.approx(3), pytest.approx(2))
    assert fit("layers", [1, 2, 3], [4, 4, 4])["b"] == pytest.approx(0, abs=1e-12)
    assert fit("layers", [0, 1, 2, 3], [0, 1, 0, 1])["r2"] == pytest.approx(0.2)


@pytest.mark.thorough
def test_killed_sweep_resumes_and_a_complete_one_measures_anew(tmp_path, monkeypatch):
    flags = ["--smoke", "--device", "cpu", "--engine", "auto", "--meta_batch_size", "2", "--warmup", "1"]
    flags += ["--out", str(tmp_path)]
    real, calls = profile_costs.measure, []

    def counting(args, method, engine, device, limit=1000):
        if len(calls) == counting.limit:
            raise KeyboardInterrupt
        calls.append((method, engine, args.inner_steps, args.layers, args.hidden_dim))
        return real(args, method, engine, device)

    monkeypatch.setattr(profile_costs, "measure", counting)
    counting.limit = 30
    with pytest.raises(KeyboardInterrupt):
        profile_costs.main(flags)
    assert {p.name for p in tmp_path.iterdir()} == {"costs.partial.csv"}
    with open(tmp_path / "costs.partial.csv") as file:
        before = [row["seconds"] for row in csv.DictReader(file)]
    counting.limit = 1000
    summary = profile_costs.main(flags)
    # inner steps 1 2 4, layers 1 2 3, hidden units 8 16 32 around (5, 2, 16): eight settings by nine curves.
    assert len(calls) == len(set(calls)) == 8 * 9
    assert {p.name for p in tmp_path.iterdir()} == {"costs.csv", "costs.json"}
    with open(tmp_path / "costs.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 9 * 9
    assert [row["seconds"] for row in rows[: len(before)]] == before and len(before) >= 30
    assert all(row["runtime_fit"] and row["memory_fit"] and float(row["peak_bytes"]) > 0 for row in rows)
    saved = json.loads((tmp_path / "costs.json").read_text())
    assert saved == summary and saved["command"].startswith("python profile_costs.py --smoke")
    memory = {f["method"]: f["memory"] for f in saved["fits"] if (f["sweep"], f["engine"]) == ("inner_steps", "vmap")}
    assert memory["maml"]["b"] > 0 and abs(memory["es"]["b"]) < 0.02 * memory["maml"]["b"]
    assert all(abs(c["cosine"] - c["expected"]) < 0.4 for c in saved["es_cosine"]) and len(saved["es_cosine"]) == 2
    counting.limit = len(calls) + 1
    with pytest.raises(KeyboardInterrupt):
        profile_costs.main(flags)
    assert len(calls) == 8 * 9 + 1  # complete: nothing is reused


@pytest.mark.thorough
def test_cosine_grows_as_the_formula_says():
    args, found = parse_args("--hidden_dim 8 --layers 1 --meta_batch_size 8".split()), []
    for args.random_seed in range(8):
        found.append(profile_costs.es_cosines(args, torch.device("cpu")))
    assert [c["perturbations"] for c in found[0]] == [16, 64, 256, 1024, 4096] and found[0][0]["disagreement"] >= 1
    for same_count in list(zip(*found, strict=True))[2:]:
        gap = np.mean([c["cosine"] - c["expected"] for c in same_count])
        assert abs(gap) < 0.04, same_count


def test_a_foreign_table_is_refused_and_other_settings_are_measured(tmp_path):
    (tmp_path / "costs.partial.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="costs.partial.csv is not a table"):
        profile_costs.main(["--smoke", "--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        profile_costs.main(["--smoke", "--out", str(tmp_path / "file")])


def test_auto_takes_the_fastest_and_leaves_the_generator_alone(monkeypatch):
    args = parse_args(["--hidden_dim", "8", "--meta_batch_size", "12"])
    times = iter([[9.0], [3.0], [5.0], [4.0], [1.0]])  # loop, 4, 8, all at once, factors
    monkeypatch.setattr(profile_costs, "clock", lambda step, device, repeats: next(times))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert profile_costs.fastest_engine(args, "maml", torch.device("cpu")) == ("factors", 12)
    assert torch.equal(torch.get_rng_state(), state)
    times = iter([[9.0], [3.0], [5.0], [4.0]])
    assert profile_costs.fastest_engine(args, "es", torch.device("cpu")) == ("vmap", 4)


def test_one_setting_prints_every_cost(capsys):
    metrics = profile_costs.main("--hidden_dim 8 --meta_batch_size 4 --outer_steps 3 --engine auto".split())
    assert [(c["method"], c["engine"]) for c in metrics["costs"]] == [
        (m, e) for m in profile_costs.METHODS for e in profile_costs.ENGINES[m]
    ]
    assert all(c["repeats"] == 3 and c["seconds_p10"] <= c["seconds"] <= c["seconds_p90"] for c in metrics["costs"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed.items() <= metrics.items() and metrics["flags"]["engine"] == "auto"


# ---------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method, steps, below", [("maml", 150, 0.7), ("es", 250, 0.9), ("fomaml", 150, 0.7)])
def test_training_learns_to_adapt(method, steps, below, tmp_path):
    metrics = profile_costs.main(
        [
            "--train",
            "--method",
            method,
            "--hidden_dim",
            "32",
            "--outer_steps",
            str(steps),
            "--eval_freq",
            "50",
            "--num_perturbations",
            "64",
            "--learning_rate",
            "5e-3",
            "--log_dir",
            str(tmp_path),
            "--run_name",
            "run",
        ]
    )
    assert metrics["test_loss"] < below * 0.3 and metrics["test_loss"] < metrics["test_loss_before"]
    assert {"best.pt", "checkpoint.pt", "flags.json", "metrics.json"} <= {p.name for p in (tmp_path / "run").iterdir()}


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    flags = ["--smoke", "--train", "--method", "es", "--outer_steps", "30", "--log_dir", str(tmp_path), "--run_name"]
    whole_run = profile_costs.main([*flags, "whole"])
    saved = profile_costs.Run.save

    def die(run):
        saved(run)
        if run.step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(profile_costs.Run, "save", die)
        with pytest.raises(KeyboardInterrupt):
            profile_costs.main([*flags, "killed"])
    resumed = profile_costs.main(["--resume", str(tmp_path / "killed")])
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["objects"] for n in ("whole", "killed"))
    assert torch.equal(a["model"]["theta"], b["model"]["theta"]) and resumed["test_loss"] == whole_run["test_loss"]


def test_train_without_a_method_trains_both_and_auto_is_written_down(tmp_path):
    flags = ["--smoke", "--train", "--engine", "auto", "--log_dir", str(tmp_path), "--run_name", "x"]
    metrics = profile_costs.main([*flags, "--out", str(tmp_path / "out")])
    assert set(metrics) == {"maml", "es"}
    assert json.loads((tmp_path / "out" / "costs_train.json").read_text()) == metrics
    for method in metrics:
        written = json.loads((tmp_path / f"x_{method}" / "flags.json").read_text())["flags"]
        assert written["method"] == method and written["engine"] in ("vmap", "loop", "factors")


# ------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--layers 0", "--layers"),
        ("--inner_steps -1", "--inner_steps"),
        ("--inner_steps 0", "--inner_steps"),
        ("--hidden_dim 0", "--hidden_dim"),
        ("--hidden_dim 1.5", "--hidden_dim"),
        ("--sigma 0", "--sigma"),
        ("--num_perturbations 3", "--num_perturbations 3 is odd"),
        ("--num_perturbations 0", "--num_perturbations"),
        ("--inner_lr nan", "--inner_lr"),
        ("--method reptile", "--method"),
        ("--sweep width", "--sweep"),
        ("--train --sweep all", "exclude"),
        ("--engine factors --method es", "--engine factors"),
        ("--engine factors", "--engine factors"),
        ("--outer_steps 0", "--outer_steps"),
        ("--dataset glyphs", "--dataset"),
        ("--resume nowhere", "--resume nowhere"),
        ("--at_once -1", "--at_once"),
    ],
)
def test_bad_values_get_one_line(flags, words):
    with pytest.raises(UserError) as error:
        parse_args(flags.split())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_values_end_with_code_two(run_script):
    one_line_error(run_script("profile_costs.py", "--num_perturbations", "5"), "--num_perturbations 5 is odd", "even")


# ----------------------------------------------------------------------- benchmark and README


def test_benchmark_runs(capsys):
    for race in races.main(["costs", "--smoke", "--hidden_dim", "8", "--device", "cpu"]):
        assert next(v["ratio"] for v in race.values() if isinstance(v, dict)) == 1
    assert "auto: " in capsys.readouterr().out


COMMANDS = sorted(set(re.findall(r"python profile_costs\.py[^`|\n]*", (REPO / "README.md").read_text())))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command):
    assert parse_args(shlex.split(command)[2:]).command.startswith("python profile_costs")
