"""Tasks that say what they hide, meta-gradients by finite differences, costs by quadrature, whole runs."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.tasks.distributions import Diseased, Grasping, Stream, basis_tasks, sinusoid_tasks

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import known_dataset, one_line_error
from torch import distributions

import memorization
from memorization import (
    CONDITIONS,
    Activations,
    BlackBox,
    Maml,
    MetaLearner,
    Mlp,
    Weights,
    adapt,
    kl_to_standard,
    mlp,
    task_figures,
    task_losses,
)

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu"]
D = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_pictures(num_classes=240, drawings=20):
    """Every pixel says the class, but for a block that says the drawing; training, val and test classes differ."""
    data = known_dataset(num_classes, drawings)
    images = np.repeat(np.arange(num_classes, dtype=np.uint8), drawings)[:, None, None, None] * np.ones_like(
        data.images
    )
    images[:, :, :2, :2] = np.tile(np.arange(drawings, dtype=np.uint8), num_classes)[:, None, None, None]
    parts = np.split(np.arange(num_classes), [160, 200])
    return data._replace(images=images, splits=dict(zip(("train", "val", "test"), parts, strict=True)))


# ------------------------------------------------------------------------------------- the tasks


def test_basis_tasks_are_combinations_of_five_functions():
    batch = basis_tasks(4000, 10, 10, rng())
    x, y = (
        torch.cat([batch.support_x, batch.query_x], 1).double(),
        torch.cat([batch.support_y, batch.query_y], 1).double(),
    )
    functions = torch.cat([torch.ones_like(x), x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()], dim=-1)
    w = torch.linalg.lstsq(functions, y).solution
    noise = (y - functions @ w).square().sum() / (4000 * 15)
    assert noise.sqrt().item() == pytest.approx(0.1, rel=0.02)
    assert w.mean(0).abs().max() < 5 / 4000**0.5 + 0.02 and (w.std(0) - 1).abs().max() < 0.15


def test_sinusoid_tasks_give_the_amplitude_away_in_training_only():
    for part in ("train", "test"):
        batch = sinusoid_tasks(3000, 10, 200, rng(), part)
        numbers = batch.query_x[:, 0, 1:].argmax(-1)
        assert torch.equal(batch.query_x[..., 1:].sum(-1), torch.ones(3000, 200)) and numbers.max() == 15
        assert (numbers.bincount(minlength=16) - 3000 / 16).abs().max() < 5 * (3000 / 16) ** 0.5
        x, y = batch.query_x[..., 0], batch.query_y[..., 0]
        A = (x.sin() * y).sum(1) / x.sin().square().sum(1)
        given = torch.linspace(0.1, 4, 20)[numbers]
        if part == "train":
            assert (A - given).abs().max() < 0.1
        else:
            assert abs(np.corrcoef(A, given)[0, 1]) < 0.1 and A.max() > 3.9 and x[0, 0] == -4.5
        support = batch.support_y[..., 0] - A[:, None] * batch.support_x[..., 0].sin()
        assert support.std().item() == pytest.approx(0.1 if part == "train" else 0.02**0.5, rel=0.05)


def test_diseased_label_0_is_always_healthy():
    tasks = Diseased(plain_pictures(), healthy=100, diseases=50)
    seen = {}
    for part in ("train", "val", "test"):
        batch = tasks.sample(500, 3, 4, rng(), part)
        x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)[..., 0]
        classes, drawings = (x[..., -1] * 255).round().long(), (x[..., 0] * 255).round().long()
        assert y.sum(1).tolist() == [7.0] * 500 and batch.support_y.sum(1).unique().tolist() == [3.0]
        assert classes[y == 0].max() < 100  # the pool
        ill = classes[y == 1].view(500, 7)
        assert (ill == ill[:, :1]).all()  # one disease a task
        seen[part] = set(ill[:, 0].tolist())
        images = classes * 100 + drawings
        assert all(len(set(row.tolist())) == 14 for row in images)  # no support image is asked
        held_out = drawings[y == 0]
        assert (held_out < 15).all() if part == "train" else (held_out >= 15).all()
    assert seen["train"] == set(range(100, 150)) and seen["val"] <= set(range(160, 200)) and min(seen["test"]) >= 200
    with pytest.raises(UserError, match="--dataset folder has 30 training classes"):
        Diseased(known_dataset())


def test_grasping_names_the_target_in_training_only():
    tasks = Grasping(plain_pictures(), targets=20)
    names = {}
    for part in ("train", "test"):
        batch = tasks.sample(1000, 2, 3, rng(), part)
        x = torch.cat([batch.support_x, batch.query_x], 1).unflatten(1, (5, 3))
        y = torch.cat([batch.support_y, batch.query_y], 1).unflatten(1, (5, 3))[..., 0]
        assert (y.sum(-1) == 1).all()
        classes = (x[..., 195] * 255).round().long()  # [B, pictures, slots]
        target = classes[y == 1].view(1000, 5)
        assert (target == target[:, :1]).all() and (classes[y == 0] != target[:, 0].repeat_interleave(10)).all()
        places = y.flatten(0, 1).mean(0)
        assert (places - 1 / 3).abs().max() < 5 * (2 / 9 / 5000) ** 0.5
        written = x[..., 196:].flatten(1, 2)
        assert (written == written[:, :1]).all()
        if part == "train":
            for c, name in zip(target[:, 0].tolist(), written[:, 0], strict=True):
                assert names.setdefault(c, name).equal(name)
            assert len({tuple(n.tolist()) for n in names.values()}) == len(names) == 20
        else:
            assert (written == 0).all() and target.min() >= 200


def test_streams_continue_and_shards_are_slices():
    draw = lambda B, g: basis_tasks(B, 5, 6, g)
    whole, parts = Stream(draw, 3, 4), [Stream(draw, 3, 4, (rank, 2)) for rank in range(2)]
    first = whole.sample()
    assert torch.equal(first.query_y, torch.cat([p.sample().query_y for p in parts]))
    state, second = whole.state_dict(), whole.sample()
    whole.load_state_dict({"generator": state["generator"].clone()})
    assert torch.equal(whole.sample().query_y, second.query_y)
    whole.reset()
    assert torch.equal(whole.sample().support_x, first.support_x)
    with pytest.raises(UserError, match="--meta_batch_size 3"):
        Stream(draw, 3, 3, (0, 2))


# --------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("kind, ways, out", [("square", 1, 1), ("binary", 2, 1), ("choice", 3, 1), ("classes", 4, 4)])
def test_the_meta_gradient_is_that_of_finite_differences(kind, ways, out):
    """Second order through two inner steps, for every kind of loss."""
    torch.manual_seed(0)
    model = Maml(3, out, 5, kind, ways).double()
    for bias in model.network.biases:  # from zero a point without active units would sit on the kink of the next layer
        torch.nn.init.uniform_(bias, -0.5, 0.5)
    z, query = torch.randn(2, 2, 6, 3, dtype=D)
    y = torch.randn(2, 6, 1, dtype=D)
    if kind == "binary":
        y = (y > 0).double()
    elif kind == "choice":
        y = torch.eye(3, dtype=D)[torch.randint(3, (2, 2))].flatten(1)[..., None]
    elif kind == "classes":
        y = torch.eye(4, dtype=D)[torch.randint(4, (2, 6))]
    loss = lambda: task_losses(model(z, y, query, 0.3, 2), y, kind, ways).mean()
    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        place = gradient.abs().flatten().argmax()
        values = []
        for change in (1e-6, -2e-6):
            p.data.view(-1)[place] += change
            values.append(loss().detach())
        p.data.view(-1)[place] += 1e-6
        assert torch.allclose(gradient.flatten()[place], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_adapting_tasks_together_is_adapting_each_alone_by_gradient_descent():
    torch.manual_seed(0)
    network = Mlp([2, 6, 6, 1]).double()
    z, y = torch.randn(3, 5, 2, dtype=D), torch.randn(3, 5, 1, dtype=D)
    for second_order in (True, False):
        together = adapt(network.layers(), z, y, 0.1, 3, "square", 1, second_order)
        for b in range(3):
            alone = Mlp([2, 6, 6, 1]).double()
            alone.load_state_dict(network.state_dict())
            descent = torch.optim.SGD(alone.parameters(), 0.1)
            for _ in range(3):
                descent.zero_grad()
                F.mse_loss(alone(z[b : b + 1]), y[b : b + 1]).backward()
                descent.step()
            for (weight, bias), own in zip(together, alone.layers(), strict=True):
                assert torch.allclose(weight[b], own[0], atol=1e-12) and torch.allclose(bias[b], own[1], atol=1e-12)


def test_losses_and_figures_are_torchs():
    scores, logits = torch.randn(4, 6, 1), torch.randn(4, 6, 5)
    chosen, labels = torch.randint(3, (4, 2)), torch.randint(5, (4, 6))
    y = F.one_hot(chosen, 3).float().flatten(1)[..., None]
    for b in range(4):
        picked = F.cross_entropy(scores[b].view(2, 3), chosen[b])
        assert torch.allclose(task_losses(scores, y, "choice", 3)[b], picked, atol=1e-6)
        named = F.cross_entropy(logits[b], labels[b])
        assert torch.allclose(task_losses(logits, F.one_hot(labels, 5).float(), "classes", 5)[b], named, atol=1e-6)
    right = (scores.view(4, 2, 3).argmax(-1) == chosen).float().mean(1)
    assert torch.equal(task_figures(scores, y, "choice", 3), right)
    assert torch.equal(task_figures(scores, (scores > 0).float(), "binary", 2), torch.ones(4))
    assert torch.allclose(task_figures(scores, y, "square", 1), (scores - y).square().mean((1, 2)))


def test_costs_against_torch_and_quadrature():
    mean, std = torch.randn(50, dtype=D), 0.05 + 2 * torch.rand(50, dtype=D)
    q, p = distributions.Normal(mean, std), distributions.Normal(torch.zeros(50, dtype=D), torch.ones(50, dtype=D))
    assert torch.allclose(kl_to_standard(mean, std), distributions.kl_divergence(q, p), rtol=1e-10)
    grid = mean + std * torch.linspace(-12, 12, 20001, dtype=D)[:, None]
    integral = torch.trapezoid(q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid)), grid, dim=0)
    assert torch.allclose(kl_to_standard(mean, std), integral, atol=1e-6)
    torch.manual_seed(0)
    weights, x = Weights(3, 2, raw_std=-1.0), torch.randn(1, 4, 3)
    cost = sum(kl_to_standard(w, F.softplus(torch.tensor(-1.0))).sum() for w in weights.body.weights)
    assert weights(x, 2, True)[1].item() == pytest.approx(cost.item(), rel=1e-5)
    activations = Activations(3, 2)
    h = torch.relu(activations.body(x[:, 2:]))  # the cost is that of the queries
    cost = kl_to_standard(activations.mean(h), F.softplus(activations.raw_std(h))).mean()
    assert activations(x, 2, True)[1].item() == pytest.approx(cost.item(), rel=1e-5)


def test_regularised_codes_have_the_noise_they_claim():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3)
    for encoder in (Activations(3, 2), Weights(3, 2, raw_std=-2.0)):
        with torch.no_grad():
            mean, _ = encoder(x, 1, False)
            drawn = torch.stack([encoder(x, 1, True)[0] for _ in range(4000)])
        assert torch.equal(encoder(x, 1, False)[0], mean) and (drawn.std(0) > 0.01).all()
        if isinstance(encoder, Activations):
            std = F.softplus(encoder.raw_std(torch.relu(encoder.body(x))))
            assert (drawn.mean(0) - mean).abs().max() < 5 * std.max() / 4000**0.5
            assert torch.allclose(drawn.std(0), std, rtol=0.1)
        else:  # one network for all points of a call: the same x gets the same z
            twice = encoder(x[:, :1].expand(-1, 2, -1), 1, True)[0][0]
            assert torch.allclose(twice[0], twice[1])


@pytest.mark.parametrize("learner", ["maml", "blackbox"])
@pytest.mark.parametrize("regulariser", ["none", "activations", "weights"])
def test_without_a_support_set_it_has_no_influence(learner, regulariser):
    args = memorization.parse_args(["--task", "basis", "--learner", learner, "--regulariser", regulariser])
    torch.manual_seed(0)
    model, batch = MetaLearner(args, 1, 1), basis_tasks(4, 5, 6, rng())
    changed = batch._replace(support_y=batch.support_y + 1)
    outputs = lambda batch, condition: model(batch, 0.1, 2, condition, sample=False)[0]
    assert torch.equal(outputs(batch, "emptied"), outputs(changed, "emptied"))
    assert not torch.allclose(outputs(batch, "own"), outputs(changed, "own"))
    neighbour = batch._replace(support_x=batch.support_x.roll(1, 0), support_y=batch.support_y.roll(1, 0))
    assert torch.allclose(outputs(batch, "other"), outputs(neighbour, "own"), atol=1e-6)
    if learner == "maml" and regulariser == "none":
        assert torch.equal(outputs(batch, "emptied"), mlp(model.head.network.layers(), batch.query_x))


def test_the_black_box_does_not_see_the_order_of_the_support_set():
    torch.manual_seed(0)
    model, order = BlackBox(2, 1).double(), torch.randperm(7)
    z, y, query = torch.randn(3, 7, 2, dtype=D), torch.randn(3, 7, 1, dtype=D), torch.randn(3, 4, 2, dtype=D)
    assert torch.allclose(model(z, y, query), model(z[:, order], y[:, order], query), atol=1e-12)


# -------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(
    "flags",
    [
        ["--task", "basis", "--num_shot", "3", "--num_query", "4", "--test_shot", "6", "--inner_lr", "0.1"],
        ["--task", "diseased", "--learner", "blackbox", "--regulariser", "activations", "--beta", "0.5"],
        ["--task", "grasping", "--regulariser", "activations", "--code_dim", "8", "--hidden_dim", "16"],
        ["--task", "sinusoid", "--regulariser", "weights", "--raw_std", "-50", "--fresh_adam", "all"],
        ["--task", "sinusoid", "--regulariser", "activations", "--fresh_adam", "encoder", "--test_inner_steps", "3"],
        [
            "--task",
            "characters",
            "--regulariser",
            "weights",
            "--train_steps",
            "2",
            "--eval_freq",
            "1",
            "--code_dim",
            "8",
            "--num_test_tasks",
            "2",
            "--num_val_tasks",
            "2",
            "--meta_batch_size",
            "2",
            "--inner_steps",
            "2",
        ],
        [
            "--task",
            "characters",
            "--learner",
            "blackbox",
            "--train_steps",
            "2",
            "--eval_freq",
            "2",
            "--code_dim",
            "8",
            "--num_test_tasks",
            "2",
            "--num_val_tasks",
            "2",
            "--meta_batch_size",
            "2",
            "--learning_rate",
            "1e-4",
        ],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    metrics = memorization.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", "a", *flags])
    names = [f"{part}_{condition}" for part in ("train", "test") for condition in CONDITIONS]
    assert all(np.isfinite(metrics[name]) and metrics[f"{name}_ci95"] >= 0 for name in names)
    again = memorization.main(["--test", "--checkpoint", str(tmp_path / "a")])
    assert [again[name] for name in names] == [metrics[name] for name in names]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a")).Reload()
    assert {"Loss/train", "Loss/val", "Loss/val_emptied", "Regulariser/nats"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["memorisation"]


@pytest.mark.thorough
def test_what_needs_the_support_set_fails_without_it_and_what_does_not_does_not(tmp_path):
    """The two ends of the lesson in short runs: basis functions, and an amplitude that is written beside x."""
    flags = ["--smoke", "--eval_freq", "1000", "--num_test_tasks", "200", "--log_dir", str(tmp_path)]
    needs = memorization.main([*flags, "--train_steps", "400", "--task", "basis", "--learner", "blackbox"])
    assert needs["train_emptied"] > 1.5 * needs["train_own"] and needs["test_other"] > needs["test_own"]
    knows = memorization.main([*flags, "--train_steps", "1000", "--meta_batch_size", "4", "--learning_rate", "3e-3"])
    assert max(knows["train_emptied"], knows["train_other"]) < 0.2 < 0.5 < knows["test_own"]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["objects"]["model"]


REGULARISED = [["--regulariser", "activations"], ["--regulariser", "weights", "--fresh_adam", "all"]]


@pytest.mark.parametrize("flags", REGULARISED)
def test_resume_is_bit_exact(flags, tmp_path, monkeypatch):
    base = [*SMOKE, *flags, "--log_dir", str(tmp_path)]
    whole = memorization.main([*base, "--run_name", "whole"])
    real = experiment.Run.save

    def save(run):
        real(run)
        if run.step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "save", save)
        memorization.main([*base, "--run_name", "stopped"])
    resumed = memorization.main(["--resume", str(tmp_path / "stopped")])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(a[k], b[k]) for k in a) and resumed["test_own"] == whole["test_own"]


def test_bad_input(run_script):
    with pytest.raises(UserError, match="--beta 0.5 needs --regulariser"):
        memorization.parse_args(["--beta", "0.5"])
    with pytest.raises(UserError, match="--hidden_dim 0"):
        memorization.parse_args(["--hidden_dim", "0"])
    with pytest.raises(UserError, match="--num_shot 19"):
        memorization.main([*SMOKE, "--task", "characters", "--num_shot", "19", "--num_query", "2"])
    with pytest.raises(UserError, match="--num_shot 15"):
        memorization.main([*SMOKE, "--task", "diseased", "--num_shot", "15", "--num_query", "6"])
    one_line_error(run_script("memorization.py", "--task", "chess"), "--task")
