"""basics/: each method in one screen; equal to the fast script in float64: same weights and task, same gradient."""

from fewshot import experiment
from fewshot.learners import lstm_rule, side_by_side
from fewshot.learners.conv4 import Conv4
from fewshot.tasks.episodes import EpisodeSampler, fixed_tasks
from fewshot.tasks.splits import load_dataset

import ast
import importlib
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from torch import nn

import attention
import basics
import basics.attention
import basics.evolution_strategies
import basics.maml
import basics.mann
import basics.meta_lstm
import basics.protonet
import hw1
import maml
import meta_lstm
import profile_costs
import protonet
from bench import networks, race

NAMES = sorted(path.stem for path in (REPO / "basics").glob("[a-z]*.py"))
f64 = torch.float64
N, K, Q = 3, 2, 5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ------------------------------------------- what the fast scripts compute: all that knows their names stands here


def copied(values, into) -> None:
    with torch.no_grad():
        for value, parameter in zip(values, into, strict=True):
            parameter.copy_(value.view_as(parameter))


def fast_mann(plain: nn.Module, images, labels) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Logits and loss of hw1.py with the weights of `plain`, and its gradients in the same order."""
    model = hw1.MANN(labels.shape[-1], labels.shape[1], plain.layer1.hidden_size).double()
    copied(plain.parameters(), model.parameters())
    logits = model(images, labels)
    loss = model.loss_function(logits, labels)
    return logits, loss, torch.autograd.grad(loss, list(model.parameters()))


def fast_mann_after_a_step(plain: nn.Module, images, labels) -> list:
    """The parameters of hw1.py after a step as the race takes it, by Adam in one kernel."""
    model = hw1.MANN(labels.shape[-1], labels.shape[1], plain.layer1.hidden_size).double()
    copied(plain.parameters(), model.parameters())
    networks.our_step(model, torch.optim.Adam(model.parameters(), 1e-3, fused=True), images, labels, torch.float32)
    return list(model.parameters())


def fast_attention(plain: nn.Module, images, labels) -> tuple[torch.Tensor, list]:
    """Logits of the queries by attention.py with one layer; pairs of a parameter of `plain` and its gradient."""
    model = attention.AttentionLearner(layers=1).double()
    weights = {name: p for name, p in plain.named_parameters() if not name.startswith("encoder.")}
    encoder = [p for name, p in plain.encoder.named_parameters() if name not in biases_of_convolutions(plain.encoder)]
    layer = model.attention.layers[0]
    names = [*layer.state_dict(), *(f"{part}.{kind}" for part in ("query", "key") for kind in ("weight", "bias"))]
    copied([*encoder, *(weights[name] for name in names)], model.parameters())
    logits = model(images, labels)
    attention.query_loss(logits, labels).backward()
    return logits[:, -1], [
        *zip((*encoder, *(weights[name] for name in names)), (p.grad for p in model.parameters()), strict=True)
    ]


def fast_protonet(plain: nn.Sequential, support, query, query_labels) -> tuple[torch.Tensor, list]:
    """Loss of one task by protonet.py and its gradients but for the convolutions' biases, which it does not have."""
    encoder = Conv4().double()
    copied(
        [p for name, p in plain.named_parameters() if name not in biases_of_convolutions(plain)], encoder.parameters()
    )
    support_labels = torch.arange(N).repeat_interleave(K)
    episode = [x[None] for x in (support, support_labels, query, query_labels)]
    loss = protonet.episode_loss(encoder, episode, num_classes=N, dtype=f64)
    return loss, torch.autograd.grad(loss, list(encoder.parameters()))


def fast_maml(plain: nn.Sequential, tasks, rate, steps, **options) -> tuple[torch.Tensor, list, list]:
    """Loss and meta-gradients of maml.py; and what its inner loop makes of the first task's parameters."""
    learner = maml.MAML(Conv4(strided=options["strided"]), N, steps, rate).double()
    theta, sizes = learner.theta(), [dict.fromkeys(learner.names, rate)] * steps
    copied(plain.parameters(), theta.values())
    s = maml.Setting(N, dtype=f64, **options)
    losses = [maml.task_loss(theta, sizes, *task, s) for task in zip(*tasks, strict=True)]
    loss = sum(losses) / len(losses)
    adapted = maml.inner_loop(theta, sizes, tasks[0][0], tasks[1][0], s)[-1]
    return loss, torch.autograd.grad(loss, list(theta.values())), [adapted[name] for name in theta]


def fast_meta_lstm(plain: nn.Module, task, updates: int) -> tuple[float, list]:
    """Query loss of one task by meta_lstm.py and its gradients, in the shapes of `plain`."""
    learner = side_by_side.Learner(1, 28, N)
    rule = meta_lstm.MetaLSTM(learner.initial()).double()
    gates = torch.cat([plain.forget.weight, plain.input.weight]), torch.cat([plain.forget.bias, plain.input.bias])
    lstm = plain.lstm
    values = (lstm.weight_ih, lstm.weight_hh, lstm.bias_ih, lstm.bias_hh, *gates, plain.theta0)
    mine = (rule.weight_ih, rule.weight_hh, rule.bias_ih, rule.bias_hh, rule.gate_weight, rule.gate_bias, rule.theta0)
    copied(values, mine)
    inner = meta_lstm.Inner(updates, N * K, 0.9)
    losses, _ = meta_lstm.query_losses(rule, learner, [x[None] for x in task], inner, dtype=f64)
    losses.sum().backward()
    return losses.item(), [p.grad for p in mine]


def fast_estimate(plain: nn.Sequential, tasks, sigma, rate, steps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient and loss of profile_costs.py, and the noise that it has drawn, in the order of `plain`."""
    linears = [m for m in plain if isinstance(m, nn.Linear)]
    model = profile_costs.Initialisation(len(linears) - 1, linears[0].out_features).double()
    copied([torch.cat([x for m in linears for x in (m.weight.T.flatten(), m.bias)])], [model.theta])
    stacked = [torch.stack(x) for x in zip(*tasks, strict=True)]
    torch.manual_seed(5)
    loss = profile_costs.es_gradient(model, stacked, rate, steps, 4, perturbations=2 * len(tasks), sigma=sigma)
    torch.manual_seed(5)
    noise = [torch.empty(len(model.theta), dtype=f64).normal_() for _ in tasks]
    turned = lambda flat: torch.cat([x for W, b in model(flat) for x in (W.T.flatten(), b.flatten())])
    return turned(model.theta.grad), loss, torch.stack([turned(eps) for eps in noise])


# --------------------------------------------------------------------------------------------- equal


def biases_of_convolutions(net: nn.Sequential) -> set[str]:
    return {f"{name}.bias" for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}


def noisy(module: nn.Module, size: float = 0.1) -> nn.Module:
    """In float64 and away from what it starts with: no scale is one, no bias zero."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn_like(p)
    return module


def tasks_of_noise(B: int) -> tuple[torch.Tensor, ...]:
    """B tasks: support in class order, queries shuffled, both near images of their classes."""
    centres = torch.rand(B, N, 1, 28, 28, dtype=f64)
    labels = torch.arange(N).repeat_interleave(K).expand(B, -1)
    query_labels = torch.stack([torch.arange(N).repeat(Q)[torch.randperm(N * Q)] for _ in range(B)])
    support, query = (torch.stack([c[y] for c, y in zip(centres, ys, strict=True)]) for ys in (labels, query_labels))
    return support + torch.rand_like(support), labels, query + torch.rand_like(query), query_labels


def same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> bool:
    assert b.abs().max() > 1e-7
    return torch.allclose(a.view_as(b), b, rtol=0, atol=atol)


def test_mann_equals_hw1():
    plain = noisy(basics.mann.MANN(N, 16))
    images, labels = torch.rand(3, K + 1, N, 784, dtype=f64), torch.eye(N, dtype=f64).expand(3, K + 1, N, N).clone()
    labels[:, -1] = labels[:, -1, [2, 0, 1]]
    logits = plain(images, labels)
    loss = basics.mann.query_loss(logits, labels)
    fast_logits, fast_loss, fast = fast_mann(plain, images, labels)
    assert same(logits, fast_logits) and same(loss, fast_loss)
    assert all(map(same, torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True), fast))
    fast = fast_mann_after_a_step(plain, images, labels)
    race.plain_step(torch.optim.Adam(plain.parameters(), 1e-3), loss)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(plain.parameters(), fast, strict=True))


def test_attention_equals_hw1():
    plain = noisy(basics.attention.Attention())
    images, labels = torch.rand(2, K + 1, N, 784, dtype=f64), torch.eye(N, dtype=f64).expand(2, K + 1, N, N).clone()
    labels[:, -1] = labels[:, -1, [2, 0, 1]]
    logits = plain(images, labels)
    F.cross_entropy(logits.flatten(0, 1), labels[:, -1].flatten(0, 1)).backward()
    fast_logits, fast = fast_attention(plain, images, labels)
    assert same(logits, fast_logits) and len(fast) == 12 + 17
    assert all(same(mine.grad, gradient) for mine, gradient in fast)


def test_protonet_equals_protonet():
    plain = noisy(basics.protonet.conv4())
    support, _, query, query_labels = (x[0] for x in tasks_of_noise(1))
    loss = basics.protonet.episode_loss(plain, support, query, query_labels, num_classes=N)
    loss.backward()
    fast_loss, fast = fast_protonet(plain, support, query, query_labels)
    biases = biases_of_convolutions(plain)
    assert same(loss, fast_loss)
    assert all(map(same, [p.grad for name, p in plain.named_parameters() if name not in biases], fast))
    assert all(
        p.grad.abs().max() < 1e-10 for name, p in plain.named_parameters() if name in biases
    )  # they are cancelled


class Sphere(nn.Module):
    """maml.py's --features sphere as a layer: centred over the images of the call, of length sqrt(D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(dim=0)
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("strided, sphere", [(True, False), (False, False), (False, True)])
def test_maml_equals_maml(steps, first_order, strided, sphere):
    plain = noisy(basics.maml.strided_conv4(N) if strided else networks.pooled_conv4(N))
    if sphere:
        plain = nn.Sequential(*plain[:-1], Sphere(), plain[-1])
    tasks, theta = tasks_of_noise(2), dict(plain.named_parameters())
    loss = basics.maml.meta_loss(plain, theta, tasks, 0.05, steps, first_order)
    adapted = basics.maml.adapt(plain, theta, tasks[0][0], tasks[1][0], 0.05, steps, first_order)
    setting = {"first_order": first_order, "strided": strided, "sphere": sphere}
    fast_loss, fast, fast_adapted = fast_maml(plain, tasks, 0.05, steps, **setting)
    assert same(loss, fast_loss) and all(map(same, adapted.values(), fast_adapted))
    assert all(map(same, torch.autograd.grad(loss, list(theta.values())), fast))


def test_meta_lstm_equals_meta_lstm():
    learner = basics.meta_lstm.make_learner(N).double()
    plain = basics.meta_lstm.MetaLSTM(nn.utils.parameters_to_vector(learner.parameters()).detach()[:, None])
    plain = noisy(plain, 0.1)
    with torch.no_grad():
        plain.forget.bias -= 3  # gates that are neither open nor shut
        plain.input.bias += 3
    *task, query_labels = (x[0] for x in tasks_of_noise(1))
    loss = F.cross_entropy(basics.meta_lstm.query_logits(plain, learner, *task, updates=3), query_labels)
    loss.backward()
    fast_loss, fast = fast_meta_lstm(plain, (*task, query_labels), 3)
    assert loss.item() == pytest.approx(fast_loss, abs=1e-10)
    lstm, gates = plain.lstm, (plain.forget, plain.input)
    mine = [p.grad for p in (lstm.weight_ih, lstm.weight_hh, lstm.bias_ih, lstm.bias_hh)]
    mine += [torch.cat([g.weight.grad for g in gates]), torch.cat([g.bias.grad for g in gates]), plain.theta0.grad]
    assert all(map(same, mine, fast))


def test_a_tiny_gradient_is_shown_in_another_way():
    """0, one below e^-10 and one above, as meta_lstm.py shows them to its rule."""
    x = torch.tensor([0.0, 1e-6, -1e-6, 1e-3, -20.0], dtype=f64)
    shown = basics.meta_lstm.preprocess(x[:, None])
    assert torch.allclose(shown, torch.stack(lstm_rule.preprocess(x), dim=1), atol=1e-14)


def test_evolution_strategies_equal_profile_costs():
    plain = basics.evolution_strategies.mlp(2, 7).double()
    theta = nn.utils.parameters_to_vector(plain.parameters()).detach()
    tasks = [tuple(x.double() for x in basics.evolution_strategies.sinusoid(6, 9)) for _ in range(5)]
    fast, fast_loss, noise = fast_estimate(plain, tasks, sigma=0.1, rate=0.05, steps=3)
    gradient, loss = basics.evolution_strategies.estimate(plain, theta, tasks, noise, 0.1, 0.05, 3)
    assert same(gradient, fast) and same(loss, fast_loss)


def test_sinusoids_are_those_of_the_homework():
    """Amplitude 0.5 to 1, any phase, bias -0.3 to 0.3, found again from the queries on the grid."""
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(300):
        x, y, grid, curve = basics.evolution_strategies.sinusoid(4, 101, g)
        waves = torch.stack([grid[:, 0].sin(), grid[:, 0].cos(), torch.ones(101)], dim=1)
        sin, cos, bias = torch.linalg.lstsq(waves, curve).solution[:, 0]
        assert torch.allclose(y, sin * x.sin() + cos * x.cos() + bias, atol=1e-4)
        found.append((torch.hypot(sin, cos), torch.atan2(cos, sin), bias))
    amplitude, phase, bias = torch.tensor(found).T
    assert 0.5 <= amplitude.min() < 0.55 and 0.95 < amplitude.max() <= 1
    assert -0.3 <= bias.min() < -0.28 and 0.28 < bias.max() <= 0.3
    assert phase.min() < -3 and phase.max() > 3


# --------------------------------------------------------------------------------------- one screen


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_one_screen_of_plain_pytorch(name):
    text = (REPO / "basics" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 90
    tree, imported = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported <= {"torch", "numpy", "basics", "load_data"} | sys.stdlib_module_names
    assert ".backward()" in text and "optimizer.step()" in text
    assert f"python -m basics.{name}" in ast.get_docstring(tree)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_without_data_and_keeps_what_it_found(name, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"basics.{name}")
    if hasattr(module, "load_dataset"):
        monkeypatch.setattr(module, "load_dataset", lambda: load_dataset("glyphs"))
    first = EpisodeSampler.first
    monkeypatch.setattr(EpisodeSampler, "first", lambda self, tasks, *sample: first(self, 4, *sample))
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["", "--steps", "3", "--random_seed", "2", "--json", str(file)])
    basics.run(module.main)
    found = json.loads(file.read_text())
    assert found["command"].startswith(f"python -m basics.{name} ") and "--steps 3 --random_seed 2" in found["command"]
    assert found["flags"]["random_seed"] == found["seed"] == 2 and found["processor_minutes"] > 0
    assert found["mean"] == pytest.approx(sum(found["figures"]) / len(found["figures"]), abs=1e-4)
    assert found["num_test_tasks"] == len(found["figures"]) == (600 if name == "evolution_strategies" else 4)
    assert f"{found['mean']:.4f} ± " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_classes", "5000"], "error: --num_classes 5000 is more than"),
        (["--json", "nowhere/a.json"], "error: --json nowhere/a.json"),
        (["--num_shot", "0"], "error: argument --num_shot"),
    ],
)
def test_a_mistake_is_told_before_training(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(basics.maml, "load_dataset", lambda: load_dataset("glyphs"))
    monkeypatch.setattr(sys, "argv", ["", *flags])
    with pytest.raises(SystemExit) as end:
        basics.run(basics.maml.main)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_the_test_tasks_are_those_of_the_scripts():
    data, flags = load_dataset("glyphs"), experiment.make_parser("")[0].parse_args(["--num_shot", "1"])
    flags.num_classes, flags.num_query = 5, 15
    theirs = fixed_tasks(data, "test", flags, torch.device("cpu")).sample()
    mine = EpisodeSampler(data, "test", 5, 1, 15, 2000 // (5 * (1 + 15)), seed=1_000_002).sample()
    assert all(map(torch.equal, mine, theirs))


MEASURED = [name for name in NAMES if (REPO / "results" / "basics" / f"{name}.json").exists()]


@pytest.mark.parametrize("name", MEASURED)
def test_what_a_file_says_that_it_reaches_is_what_was_measured(name):
    found = json.loads((REPO / "results" / "basics" / f"{name}.json").read_text())
    words = f"{found['mean']:.3f} ± {found['ci95']:.3f}"
    if name != "evolution_strategies":
        words = f"{100 * found['mean']:.1f} ± {100 * found['ci95']:.1f} %"
    for text in (importlib.import_module(f"basics.{name}").__doc__, (REPO / "docs" / "basics.md").read_text()):
        text = " ".join(text.split())
        assert words in text and f"{found['processor_minutes']:.1f} minutes" in text
    assert found["command"].split(" --")[0] == f"python -m basics.{name}"
