"""The LSTM meta-learner: counts, hand values, gradient descent inside it, a plain reference, finite differences."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.learners.lstm_rule import HIDDEN, LSTMCell, preprocess
from fewshot.learners.side_by_side import EPS, Learner, ask, task_losses
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import load_dataset

import json
import math
import re
import shlex

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, known_dataset, one_line_error
from torch import nn

import meta_lstm
from bench import races
from meta_lstm import PRESETS, GradientDescent, Inner, MetaLSTM, evaluate, fixed_pool, query_losses, train_learner

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu"]
f64 = torch.float64


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def doubles(learner, trained_share=1.0):
    """A meta-learner in float64 whose gates and hidden layer are far from their initial near-zeros."""
    rule = MetaLSTM(learner.initial(), trained_share).double()
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gate_weight"):
            getattr(rule, name).normal_(std=0.4)
        rule.gate_bias.copy_(torch.tensor([2.0, -2.0]))
    return rule


def episode(B=2, N=3, K=2, Q=2, size=28, channels=1):
    """Random images in float64: (support, labels, query, labels)."""
    support = torch.rand(B, N * K, channels, size, size, dtype=f64)
    query = torch.rand(B, N * Q, channels, size, size, dtype=f64)
    labels = torch.arange(N).repeat_interleave(K).expand(B, -1)
    return support, labels, query, torch.stack([torch.randperm(N * Q) % N for _ in range(B)])


def meta_gradient(rule, learner, tasks, inner, tasks_at_once=4, **options):
    """As in the train loop: the gradient of the mean query loss, part after part, and the mean."""
    B, total = len(tasks[0]), 0.0
    for part in meta_lstm.in_parts(tasks, tasks_at_once):
        loss = query_losses(rule, learner, part, inner, **options)[0].sum() / B
        loss.backward()
        total += loss.item()
    return total


# ------------------------------------------------------------------------------- counts and pieces


def test_parameter_counts_are_the_papers():
    learner = Learner(channels=3, image_size=84, num_classes=5)
    rule = MetaLSTM(learner.initial())
    assert learner.size() == len(rule.theta0) == 32901
    layer1 = [rule.weight_ih, rule.weight_hh, rule.bias_ih, rule.bias_hh]
    assert sum(p.numel() for p in layer1) == 2080
    assert sum(p.numel() for p in rule.parameters()) - 2080 == 32947


def test_initial_values():
    rule = MetaLSTM(Learner(1, 28, 5).initial())
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gate_weight"):
        value = getattr(rule, name)
        assert 0.005 < value.abs().max() <= 0.01, name
    assert 4 <= rule.gate_bias[0] <= 5 and -5 <= rule.gate_bias[1] <= -4


def test_preprocessing_by_hand():
    x = torch.tensor([1.0, -(math.e**2), math.exp(-10), -math.exp(-10), 0.5 * math.exp(-10), 0.0, -1e-30], dtype=f64)
    size, sign = preprocess(x)
    assert torch.allclose(size, torch.tensor([0, 0.2, -1, -1, -1, -1, -1], dtype=f64), atol=1e-12)
    assert torch.allclose(sign, torch.tensor([1, -1, 1, -1, 0.5, 0, -1e-30 * math.exp(10)], dtype=f64), atol=1e-12)
    below = preprocess(torch.tensor(0.999 * math.exp(-10), dtype=f64))  # the branches meet at the boundary
    assert below[0] == -1 and float(below[1]) == pytest.approx(0.999)
    assert torch.isfinite(torch.stack(preprocess(torch.tensor([0.0, 1e-45, 3e38])))).all()


def test_lstm_cell_equals_nn_lstmcell_with_all_gradients():
    cell = nn.LSTMCell(4, HIDDEN).double()
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    x, h, c = (torch.randn(3, n, 7, dtype=f64, requires_grad=True) for n in (4, HIDDEN, HIDDEN))
    rows = lambda t: t.transpose(1, 2).flatten(0, 1)
    weigh = torch.randn(21, HIDDEN, dtype=f64)

    def twice(step, arrange):  # two steps, so that gradients flow through h and c
        state = step(x, *step(x, h, c))
        loss = (arrange(state[0]) * weigh).sum() + (arrange(state[1]) * weigh.cos()).sum()
        return [arrange(s) for s in state], torch.autograd.grad(loss, [x, h, c, *weights])

    ours, our_grads = twice(
        lambda x, h, c: LSTMCell.apply(x, h, c, weights[0], weights[1], weights[2] + weights[3]), rows
    )
    back = lambda t: t.unflatten(0, (3, 7)).transpose(1, 2)
    theirs, their_grads = twice(lambda x, h, c: tuple(back(s) for s in cell(rows(x), (rows(h), rows(c)))), rows)
    for a, b in zip([*ours, *our_grads], [*theirs, *their_grads], strict=True):
        assert torch.allclose(a, b, atol=1e-12)


class PlainNet(nn.Module):
    """The learner as a module of torch's own layers, to compare with."""

    def __init__(self, channels, size, N, momentum=0.1):
        super().__init__()
        layers = []
        for i in range(4):
            layers += [
                nn.Conv2d(channels if i == 0 else 32, 32, 3, padding=1),
                nn.BatchNorm2d(32, eps=EPS, momentum=momentum),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (size // 16) ** 2, N)).double()

    def forward(self, x):
        return self.net(x)

    def functional(self, theta, x):
        """The scores with `theta` in place of the parameters, in the modules' order."""
        shapes = {name: p.shape for name, p in self.named_parameters()}
        parts = theta.split([s.numel() for s in shapes.values()])
        named = {name: part.view(s) for (name, s), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(self, named, (x,))


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 84)])
def test_learner_equals_plain_networks_and_their_running_statistics(channels, size):
    learner, B = Learner(channels, size, 3), 2
    theta = torch.stack([learner.initial() for _ in range(B)]).double()
    theta += 0.1 * torch.randn_like(theta)  # also the offsets and scales
    images = torch.rand(B, 6, channels, size, size, dtype=f64)
    statistics = learner.fresh_statistics(theta)
    by_batch = learner(theta, images, statistics, 0.9, f64)
    later = learner(theta, images[:, :2], statistics, 0.0, f64)
    for b in range(B):
        plain = PlainNet(channels, size, 3, momentum=0.9)
        assert torch.allclose(plain.train().functional(theta[b], images[b]), by_batch[b], atol=1e-10)
        norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm, pair in zip(norms, statistics, strict=True):
            mean, var = pair.unflatten(1, (B, 32))[:, b]
            assert torch.allclose(norm.running_mean, mean) and torch.allclose(norm.running_var, var)
        assert torch.allclose(plain.eval().functional(theta[b], images[b, :2]), later[b], atol=1e-10)
    assert torch.allclose(learner(theta, images, None, 0.0, f64), by_batch, atol=1e-12)


def test_asking_task_by_task_gives_the_same_scores():
    learner = Learner(1, 28, 5)
    theta = learner.initial().expand(3, -1) + 0.01 * torch.randn(3, learner.size())
    images, statistics = torch.rand(3, 4, 1, 28, 28), learner.fresh_statistics(theta)
    learner(theta, images, statistics, 0.9)
    for stats in (statistics, None):
        together = learner(theta, images, stats, 0.0)
        assert torch.allclose(ask(learner, theta, images, stats, torch.float32), together, atol=1e-4)


# --------------------------------------------------------------------------- the meta-learner whole


def test_with_forced_gates_it_is_gradient_descent():
    learner, rate = Learner(1, 28, 3), 0.2
    rule = MetaLSTM(learner.initial()).double()
    with torch.no_grad():
        rule.gate_weight.zero_()
        rule.gate_bias.copy_(torch.tensor([1e3, math.log(rate / (1 - rate))], dtype=f64))  # f = 1, i = rate
    support, labels, _, _ = episode()
    inner = Inner(4, 6, 0.9)
    theta, statistics = train_learner(rule, learner, support, labels, inner, dtype=f64)
    by_rule, same_statistics = train_learner(
        GradientDescent(rule.theta0, rate), learner, support, labels, inner, dtype=f64
    )
    P = learner.size()
    assert torch.allclose(theta[:, :P], by_rule, atol=1e-12) and not theta[:, P:].any()
    assert all(torch.allclose(a, b) for a, b in zip(statistics, same_statistics, strict=True))
    for b in range(2):  # and gradient descent is torch's
        plain = PlainNet(1, 28, 3).train()
        nn.utils.vector_to_parameters(rule.theta0.detach().clone(), plain.parameters())
        sgd = torch.optim.SGD(plain.parameters(), rate)
        for _ in range(4):
            sgd.zero_grad()
            F.cross_entropy(plain(support[b]), labels[b]).backward()
            sgd.step()
        assert torch.allclose(nn.utils.parameters_to_vector(plain.parameters()), theta[b, :P], atol=1e-9)


def plain_episode(rule, support, labels, query, query_labels, steps, N, second_order=False):
    """One episode written like the paper's algorithm, one task, one vector, torch's own cell; its query loss."""
    net = PlainNet(1, 28, N, momentum=0.9).train()
    cell = lambda x, h, c: torch._VF.lstm_cell(x, (h, c), rule.weight_ih, rule.weight_hh, rule.bias_ih, rule.bias_hh)
    P = len(rule.theta0)
    h = c = torch.zeros(P, HIDDEN, dtype=f64)
    f = i = torch.zeros(P, 1, dtype=f64)
    theta = rule.theta0[:, None]

    def pre(v):
        large = torch.stack([torch.log(v.abs()) / 10, torch.sign(v)], dim=-1)
        small = torch.stack([-torch.ones_like(v), math.exp(10) * v], dim=-1)
        return torch.where((v.abs() >= math.exp(-10))[..., None], large, small)

    for _ in range(steps):
        at = theta[:, 0] if second_order else theta[:, 0].detach().requires_grad_()
        loss = F.cross_entropy(net.functional(at, support), labels)
        (grad,) = torch.autograd.grad(loss, at, create_graph=second_order)
        if not second_order:
            loss = loss.detach()
        h, c = cell(torch.cat([pre(grad), pre(loss).expand(P, 2)], dim=1), h, c)
        f = torch.sigmoid(torch.cat([h, theta, f], dim=1) @ rule.gate_weight[0][:, None] + rule.gate_bias[0])
        i = torch.sigmoid(torch.cat([h, theta, i], dim=1) @ rule.gate_weight[1][:, None] + rule.gate_bias[1])
        theta = f * theta - i * grad[:, None]
    return F.cross_entropy(net.functional(theta[:, 0], query), query_labels)


def test_an_episode_equals_the_plain_reference_with_its_meta_gradient():
    learner = Learner(1, 28, 3)
    rule = doubles(learner)
    support, labels, query, query_labels = episode()
    theta, _ = train_learner(rule, learner, support, labels, Inner(3, 6, 0.9), dtype=f64)
    losses = task_losses(learner(theta, query, None, 0.0, f64), query_labels)
    names, parameters = zip(*rule.named_parameters(), strict=True)
    grads = torch.autograd.grad(losses.sum(), parameters)
    plain = [
        plain_episode(rule, s, y, q, z, 3, 3) for s, y, q, z in zip(support, labels, query, query_labels, strict=True)
    ]
    assert torch.allclose(losses, torch.stack(plain), atol=1e-9)
    expected = torch.autograd.grad(sum(plain), parameters)
    for name, a, b in zip(names, grads, expected, strict=True):
        # Some gradients of convolution biases are 0 up to rounding and lie on the small branch in either way.
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7 * float(b.abs().max()) + 1e-10), name
        assert b.abs().max() > 1e-8, name


def test_meta_gradient_adds_up_over_chunks_of_tasks():
    learner = Learner(1, 28, 3)
    rule = doubles(learner)
    tasks = episode(B=3)
    grads = []
    for at_once in (1, 2, 3):
        rule.zero_grad()
        meta_gradient(rule, learner, tasks, Inner(2, 6, 0.9), at_once, dtype=f64)
        grads.append(torch.cat([p.grad.flatten() for p in rule.parameters()]))
    assert torch.allclose(grads[0], grads[1], atol=1e-9) and torch.allclose(grads[0], grads[2], atol=1e-9)


def test_support_statistics_normalise_training_queries_with_their_gradient():
    learner = Learner(1, 28, 3)
    rule = doubles(learner)
    tasks = episode()
    meta_gradient(rule, learner, tasks, Inner(2, 6, 0.9), dtype=f64, query_norm="support")

    def plain_scores(theta, support, query):  # the learner of one task, every batch norm in full
        p = {name: part[0] for name, part in learner.unpack(theta[None]).items()}
        x = torch.cat([support, query])
        for i in range(4):
            x = F.conv2d(x, p[f"conv{i}.weight"], p[f"bias{i}"], padding=1)
            of_support = x[: len(support)]
            mean = of_support.mean(dim=(0, 2, 3), keepdim=True)
            var = (of_support - mean).square().mean(dim=(0, 2, 3), keepdim=True)
            x = (x - mean) / torch.sqrt(var + 1e-3) * p[f"gamma{i}"].view(-1, 1, 1) + p[f"beta{i}"].view(-1, 1, 1)
            x = F.max_pool2d(F.relu(x), 2)
        return F.linear(x.flatten(1), p["head.weight"], p["head.bias"])[len(support) :]

    theta, _ = train_learner(rule, learner, *tasks[:2], Inner(2, 6, 0.9), dtype=f64)
    losses = [F.cross_entropy(plain_scores(t, s, q), y) for t, s, q, y in zip(theta, tasks[0], *tasks[2:], strict=True)]
    expected = torch.autograd.grad(sum(losses) / 2, list(rule.parameters()))
    for p, other in zip(rule.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, other, rtol=1e-5, atol=1e-7 * float(other.abs().max()) + 1e-10)


def test_support_statistics_in_training_are_those_of_a_test():
    learner = Learner(1, 28, 3)
    theta = learner.initial().double().expand(2, -1)
    support, _, query, _ = episode(K=5)
    statistics = learner.fresh_statistics(theta)
    learner(theta, support, statistics, 1.0, f64)  # gathered on the support set alone
    in_test = ask(learner, theta, query, statistics, f64)
    in_training = learner(theta, torch.cat([support, query], dim=1), dtype=f64, num_support=15)[:, 15:]
    # Running variances are divided by n - 1, with n >= 15 * 9 values at the last layer.
    assert torch.allclose(in_test, in_training, rtol=0.02, atol=0.02)
    assert not torch.allclose(in_test, ask(learner, theta, query, None, f64), rtol=0.02, atol=0.02)


def query_loss(rule, learner, tasks, second_order):
    theta, _ = train_learner(rule, learner, *tasks[:2], Inner(2, 6, 0.9), second_order, f64)
    return task_losses(learner(theta, tasks[2], None, 0.0, f64), tasks[3]).sum()


def test_second_order_gradient_is_that_of_finite_differences_and_first_order_is_not():
    learner = Learner(1, 28, 3)
    rule, tasks = doubles(learner), episode(B=1)
    full = torch.autograd.grad(query_loss(rule, learner, tasks, True), list(rule.parameters()))
    first = torch.autograd.grad(query_loss(rule, learner, tasks, False), list(rule.parameters()))
    names = [name for name, _ in rule.named_parameters()]
    for name, p, g, g1 in zip(names, rule.parameters(), full, first, strict=True):
        direction = torch.randn_like(p)
        if name == "theta0":  # not along the convolutions' biases, whose gradients are rounding noise
            shapes = {
                n: torch.zeros(s) if "bias" in n and "head" not in n else torch.ones(s)
                for n, s in learner.shapes().items()
            }
            direction *= torch.cat([m.flatten() for m in shapes.values()])
        direction *= 1e-6 / direction.norm()
        with torch.no_grad():
            p += direction
            above = query_loss(rule, learner, tasks, False)
            p -= 2 * direction
            below = query_loss(rule, learner, tasks, False)
            p += direction
        difference = float(above - below) / 2
        assert difference == pytest.approx(float((g * direction).sum()), rel=2e-3, abs=1e-12), name
        if name == "theta0":
            assert abs(float((g1 * direction).sum()) - difference) > 0.05 * abs(difference)


def test_trained_share_changes_no_value_and_keeps_the_expected_gradient():
    learner = Learner(1, 28, 3)
    whole, part = doubles(learner), doubles(learner, 0.25)
    part.load_state_dict(whole.state_dict())
    tasks = episode(B=1)

    def gradients(rule):
        rule.zero_grad()
        loss = query_loss(rule, learner, tasks, False)
        loss.backward()
        return float(loss.detach()), {name: p.grad.clone() for name, p in rule.named_parameters()}

    loss, expected = gradients(whole)
    sums = {name: torch.zeros_like(g) for name, g in expected.items()}
    squares = torch.zeros_like(expected["weight_ih"])
    draws = 30
    for _ in range(draws):
        same, grads = gradients(part)
        assert same == pytest.approx(loss, abs=1e-10)
        for name, g in grads.items():
            sums[name] += g / draws
        squares += grads["weight_ih"] ** 2 / draws
    assert torch.allclose(sums["theta0"], expected["theta0"], atol=1e-9)  # exact, it does not pass through layer 1
    assert torch.allclose(sums["gate_weight"], expected["gate_weight"], atol=1e-9)
    error = ((squares - sums["weight_ih"] ** 2).clamp(min=0) / draws).sqrt() + 1e-12
    assert ((sums["weight_ih"] - expected["weight_ih"]).abs() < 5 * error).all()  # five sigma
    assert error.max() > 1e-9  # it was drawn


# --------------------------------------------------------------------------------- data and testing


def test_batches_hold_all_classes_in_equal_parts(monkeypatch):
    seen = []

    def spy(theta, images, *rest):
        seen.append(images[0, :, 0, 0, 0].long().tolist())
        return (images.flatten(2)[..., :1] * 0 + theta[:, :1, None]).expand(-1, -1, 10)

    learner = Learner(1, 28, 10)
    monkeypatch.setattr(Learner, "__call__", lambda self, *a: spy(*a))
    labels = torch.arange(10).repeat_interleave(10)[None]
    images = labels[..., None, None, None].expand(1, 100, 1, 28, 28).float()
    train_learner(GradientDescent(learner.initial(), 0.1), learner, images, labels, Inner(2, 25, 0.9))
    assert len(seen) == 8 and all(len(batch) == 25 for batch in seen)
    for batch in seen:
        assert all(2 <= batch.count(c) <= 3 for c in range(10))
    assert sorted(c for batch in seen[:4] for c in batch) == sorted(labels[0].tolist())


def test_no_query_influences_another_at_test_time():
    learner = Learner(1, 28, 5)
    rule = MetaLSTM(learner.initial())
    sampler = EpisodeSampler(known_dataset(), "test", 5, 1, 3, 2, 0)
    support, labels, query, _ = sampler.sample()
    support, query = torch.rand_like(support), torch.rand_like(query)
    with torch.no_grad():
        theta, statistics = train_learner(rule, learner, support, labels, Inner(2, 5, 0.9))
        whole = ask(learner, theta, query, statistics, torch.float32)
        alone = ask(learner, theta, query[:, 3:4], statistics, torch.float32)
    assert torch.allclose(whole[:, 3:4], alone, atol=1e-5)


def test_evaluation_keeps_no_graph_and_repeats_exactly():
    learner = Learner(1, 28, 5)
    rule = MetaLSTM(learner.initial(), 0.1)
    sampler = EpisodeSampler(known_dataset(), "test", 5, 1, 3, 2, 0)
    state = torch.get_rng_state()
    first = evaluate(rule, learner, sampler, 5, Inner(2, 5, 0.9), torch.float32)
    again = evaluate(rule, learner, sampler, 5, Inner(2, 5, 0.9), torch.float32)
    assert len(first[0]) == 5 and torch.equal(first[0], again[0]) and first[1] == again[1]
    assert torch.equal(torch.get_rng_state(), state)  # no randomness of the training stream is used up
    assert not first[0].requires_grad and all(p.grad is None for p in rule.parameters())


def test_fixed_pool_offers_the_same_few_images():
    small = fixed_pool(known_dataset(num_classes=12), 6, seed=3)
    assert small.images.shape[0] == 72 and (small.counts == 6).all()
    drawings = small.images[:, 0, 0, 1].reshape(12, 6)
    assert all(len(set(row)) == 6 for row in drawings.tolist())
    assert len({tuple(sorted(row)) for row in drawings.tolist()}) > 1  # each class has its own
    assert (small.images[:, 0, 0, 0].reshape(12, 6) == np.arange(12)[:, None]).all()
    assert np.array_equal(small.images, fixed_pool(known_dataset(num_classes=12), 6, seed=3).images)
    with pytest.raises(UserError, match="--fixed_pool 21 is more than the 20 images of alphabet0/character000"):
        fixed_pool(known_dataset(num_classes=12), 21, seed=3)


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def one_rate(monkeypatch):
    """Tries one rate of gradient descent instead of eight: the other tests need not wait for them."""
    monkeypatch.setattr(meta_lstm, "SGD_RATES", (0.1,))


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta_lstm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        metrics = meta_lstm.main([*SMOKE, "--num_val_tasks", "4", "--log_dir", str(folder), "--run_name", "small"])
    return folder / "small", metrics


def test_smoke_run_reports_everything(trained):
    folder, metrics = trained
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["test_accuracy_before"] < 0.45 and metrics["sgd_rate"] in meta_lstm.SGD_RATES
    assert metrics["parameters_of_rule"] == 2080 + 46 and metrics["updates"] == 2
    assert [step for step, _ in metrics["curves"]["Accuracy/val"]] == [2, 4]
    assert len(metrics["rule"]["support_loss"]) == 2 and len(metrics["rule"]["forget"][0]) == 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {
        "Loss/train",
        "Accuracy/train",
        "Gradient/meta_norm",
        "Support/loss_update02",
        "Accuracy/val",
        "Gate_forget/conv1_update01",
        "Gate_input/head_update02",
        "Accuracy/test",
    }
    assert wanted <= tags and [e.step for e in events.Scalars("Support/loss_update01")] == [2, 4]


def test_training_lowers_the_loss():
    learner = Learner(1, 28, 5)
    rule = MetaLSTM(learner.initial(), 0.1)
    optimizer = torch.optim.Adam(rule.parameters(), 3e-3)
    tasks = EpisodeSampler(load_dataset("glyphs"), "train", 5, 1, 3, 4, 0).sample()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(meta_gradient(rule, learner, tasks, Inner(2, 5, 0.9)))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_resume_is_bit_exact(tmp_path, one_rate):
    base = [*SMOKE, "--dtype", "float32", "--num_val_tasks", "2", "--num_test_tasks", "2", "--log_dir", str(tmp_path)]
    whole = meta_lstm.main([*base, "--run_name", "whole"])

    real, calls = meta_lstm.query_losses, []

    def stop_after_three(*args, **options):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_lstm, "query_losses", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            meta_lstm.main([*base, "--run_name", "cut"])
    resumed = meta_lstm.main(["--resume", str(tmp_path / "cut"), "--num_test_tasks", "2"])
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    for name, value in a["objects"]["model"].items():
        assert torch.equal(value, b["objects"]["model"][name]), name
    assert whole["test_accuracy"] == resumed["test_accuracy"]


def picture_folder(root, classes, images, size, channels=3, seed=0):
    """train/val/test of class folders with coloured noise: each class has its own colour."""
    rng = np.random.default_rng(seed)
    for part in ("train", "val", "test"):
        for c in range(classes):
            folder = root / part / f"class{c}"
            folder.mkdir(parents=True)
            colour = rng.integers(40, 215, channels)
            for i in range(images):
                picture = np.clip(rng.normal(colour, 30, (size, size, channels)), 0, 255).astype(np.uint8)
                iio.imwrite(folder / f"{i}.png", picture.squeeze())
    return root


def test_folder_of_colour_images_end_to_end(tmp_path, one_rate):
    folder = picture_folder(tmp_path / "images", classes=5, images=4, size=84)
    flags = [
        "--smoke",
        "--dataset",
        "folder",
        "--data_folder",
        str(folder),
        "--image_size",
        "84",
        "--preset",
        "5way1shot",
        "--num_val_tasks",
        "2",
        "--num_test_tasks",
        "2",
        "--log_dir",
        str(tmp_path),
    ]
    metrics = meta_lstm.main(flags)
    assert metrics["parameters"] == 32901 and metrics["dataset"] == "folder" and metrics["updates"] == 2


FEW, LONG = list(PRESETS)[:-1], pytest.param(list(PRESETS)[-1], marks=pytest.mark.thorough)


@pytest.mark.parametrize("preset", [*FEW, LONG])
def test_every_preset_in_smoke_form(preset, tmp_path_factory, work, one_rate):
    folder = work / "small_images"
    if not folder.exists():
        picture_folder(folder, classes=10, images=22, size=28, channels=1)
    runs = tmp_path_factory.mktemp("preset")
    small = ["--num_val_tasks", "2", "--num_test_tasks", "2", "--train_steps", "1", "--inner_epochs", "1"]
    flags = ["--smoke", "--preset", preset, "--dataset", "folder", "--data_folder", str(folder), *small]
    flags += ["--meta_batch_size", "1", "--log_dir", str(runs)]
    metrics = meta_lstm.main(flags)
    N, K, _ = PRESETS[preset]
    assert (metrics["N"], metrics["K"]) == (N, K)
    assert metrics["updates"] == max(1, N * K // 25)


def test_presets_are_the_reports_table_and_give_way_to_typed_flags():
    args = meta_lstm.parse_args(["--preset", "5way1shot"])
    assert (args.inner_epochs, args.inner_batch, args.bn_momentum, args.train_steps) == (12, 5, 0.9, 75000)
    assert (args.meta_batch_size, args.learning_rate, args.clip, args.trained_share) == (1, 1e-3, 0.25, 1.0)
    args = meta_lstm.parse_args(["--preset=10way20shot", "--inner_epochs", "3", "--rotations"])
    assert (args.num_classes, args.num_shot, args.inner_epochs, args.inner_batch) == (10, 20, 3, 25)
    assert args.rotations and args.train_steps == 50000 and args.bn_momentum == 0.95
    with pytest.raises(UserError, match="--preset"):
        meta_lstm.parse_args(["--preset", "6way"])


def test_transfer_of_the_rule(trained, one_rate):
    folder, _ = trained
    base = ["--test", "--checkpoint", str(folder), "--num_test_tasks", "4"]
    with pytest.raises(UserError, match="28485 learned parameters.*10 classes.*28650.*--reset_theta0"):
        meta_lstm.main([*base, "--num_classes", "10"])
    with pytest.raises(UserError, match="32x32"):
        meta_lstm.main([*base, "--image_size", "32"])
    moved = meta_lstm.main([*base, "--num_classes", "10", "--reset_theta0", "--inner_epochs", "3"])
    assert moved["N"] == 10 and moved["reset_theta0"] and moved["updates"] == 3
    assert len(moved["rule"]["support_loss"]) == 3
    same = meta_lstm.main([*base, "--num_test_tasks", "8"])
    assert same["test_accuracy"] == trained[1]["test_accuracy"]  # the same tasks, the same answer
    fresh = meta_lstm.main([*base, "--reset_theta0"])
    assert fresh["rule"]["support_loss"] != same["rule"]["support_loss"]


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--second_order",
            "--trained_share",
            "1",
            "--schedule",
            "constant",
            "--no-rotations",
            "--query_norm",
            "support",
        ],
        ["--fixed_pool", "4", "--jitter", "0.1", "--clip", "1", "--learning_rate", "1e-2", "--bn_momentum", "1"],
        pytest.param(
            ["--dtype", "bfloat16", "--rule_rate", "1e-3", "--inner_batch", "2", "--num_shot", "2", "--split", "lake"],
            marks=pytest.mark.thorough,
        ),
        ["--tasks_at_once", "1", "--patience", "1"],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path, one_rate):
    metrics = meta_lstm.main(
        [*SMOKE, "--num_val_tasks", "2", "--num_test_tasks", "2", "--log_dir", str(tmp_path), *flags]
    )
    assert 0 <= metrics["test_accuracy"] <= 1


def test_mistakes_get_one_line(run_script, tmp_path, trained, capsys):
    one_line_error(run_script("meta_lstm.py", "--test", "--checkpoint", trained[0], "--num_classes", "10"), "theta0")

    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            experiment.run_script(lambda: meta_lstm.main([str(flag) for flag in flags]))
        err = capsys.readouterr().err
        notes, error = err.splitlines()[:-1], err.splitlines()[-1]  # what is odd about a folder is said first
        assert stop.value.code == 2 and error.startswith("error: ") and all(n.startswith("note: ") for n in notes), err
        return error

    assert "--data_folder" in refused("--dataset", "folder", "--data_folder", tmp_path / "no")
    small = picture_folder(tmp_path / "few", classes=5, images=3, size=28)
    few = refused("--smoke", "--dataset", "folder", "--data_folder", small, "--num_shot", "5")
    assert "--num_shot 5" in few and "3 images of" in few and "class0" in few
    assert "not a run folder" in refused("--test", "--checkpoint", tmp_path)
    assert "no/such" in refused("--resume", "no/such")
    saved = {"script": "protonet", "dataset": "glyphs", "command": "", "flags": {"num_test_tasks": 600}}
    (tmp_path / "flags.json").write_text(json.dumps(saved))
    assert "is a run of protonet.py" in refused("--test", "--checkpoint", tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--second_order"], "--trained_share 1"),
        (["--reset_theta0"], "--reset_theta0 needs --test"),
        (["--fixed_pool", "3"], "--fixed_pool 3 is less than"),
        (["--trained_share", "0"], "trained_share"),
        (["--bn_momentum", "2"], "bn_momentum"),
        (["--test"], "--test needs --checkpoint"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        meta_lstm.parse_args(flags)


README = (REPO / "README.md").read_text()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python meta_lstm\.py [^`|\n]*", README))))
def test_every_command_of_the_readme_parses(command, trained):
    folder = str(trained[0])
    flags = [folder if flag == "RUN_DIR" else flag for flag in shlex.split(command)[2:]]
    args = meta_lstm.parse_args(flags)
    assert args.command.startswith("python meta_lstm.py") and args.test == ("--test" in flags)


# -------------------------------------------------------------------------------------- the speed


def test_benchmark_runs(capsys):
    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_query", "2", "--meta_batch_size", "1"]
    [result] = races.main(["meta_lstm", *flags])
    assert sum(isinstance(v, dict) for v in result.values()) == 5
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == result
