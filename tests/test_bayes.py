"""The bound against exact evidence, densities against torch and quadrature, order of points, calibration, runs."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.tasks.distributions import OfAlphabet, known_sinusoids

import json
import math

import numpy as np
import pytest
import torch
from conftest import known_dataset, one_line_error
from torch import distributions

import bayes
from bayes import Characters, Gaussian, Sinusoid, bound, coverage, kl, noise, posterior

SMOKE = ["--smoke", "--device", "cpu"]
D = torch.float64


class LinearGaussian:
    """phi1 ~ N(0, 1), phi2 ~ N(a phi1 + b m, s), y ~ N(phi2 x, r): all is known. One model for each of B tasks."""

    sizes = 1, 1, 1

    def __init__(self, B, seed, exact=False):
        g = torch.Generator().manual_seed(seed)
        self.a, self.b, self.c, self.d, self.e = torch.randn(5, B, 1, 1, generator=g, dtype=D)
        self.s, self.r, self.std1, self.std2 = (0.2 + 2 * torch.rand(B, 1, 1, generator=g, dtype=D) for _ in range(4))
        self.m = torch.randn(B, 1, generator=g, dtype=D)
        self.x, self.y = torch.randn(2, B, 4, 1, generator=g, dtype=D)
        self.exact = exact

    def q2(self, x, y):
        if not self.exact:  # any function of X and Y
            return Gaussian(self.c * y.mean(1, keepdim=True) + self.d, self.std2)
        before = self.a**2 + self.s**2  # the variance of phi2 given m
        precision = 1 / before + x.square().sum(1, keepdim=True) / self.r**2
        mean = (self.b * self.m[..., None] / before + (x * y).sum(1, keepdim=True) / self.r**2) / precision
        return Gaussian(mean, precision.rsqrt())

    def q1(self, phi2, m):
        if not self.exact:
            mean = self.e * phi2 + m[..., None]
            return Gaussian(mean, self.std1.expand_as(mean))
        precision = 1 + (self.a / self.s) ** 2
        mean = self.a * (phi2 - self.b * m[..., None]) / self.s**2 / precision
        return Gaussian(mean, precision.rsqrt().expand_as(mean))

    def p2(self, phi1, m):
        mean = self.a * phi1 + self.b * m[..., None]
        return Gaussian(mean, self.s.expand_as(mean))

    def log_likelihood(self, phi2, x, y):
        return Gaussian(phi2 * x, self.r).log_prob(y).sum(-1)

    def log_evidence(self):
        """log N(Y; b m x, (a^2 + s^2) x x^T + r^2 I) by torch's multivariate normal."""
        x = self.x[..., 0]
        covariance = (self.a**2 + self.s**2) * x[:, :, None] * x[:, None] + self.r**2 * torch.eye(4, dtype=D)
        return distributions.MultivariateNormal(self.b[..., 0] * self.m * x, covariance).log_prob(self.y[..., 0])


def hermite():
    """Nodes and weights that integrate squares of two normal numbers exactly: noise2, noise1 [9, 1, 1, 1], [9]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    places = [t.reshape(-1, 1, 1, 1) for t in torch.meshgrid(nodes, nodes, indexing="ij")]
    return *places, torch.outer(weights, weights).flatten()


def test_the_bound_never_exceeds_the_evidence_of_1000_linear_gaussian_models():
    model = LinearGaussian(1000, seed=0)
    noise2, noise1, weights = hermite()
    expected = weights @ bound(model, model.x, model.y, model.m, noise2, noise1)  # exact: all terms are quadratic
    gap = model.log_evidence() - expected
    assert gap.min() > 0 and gap.max() > 1
    dropped = weights @ bound(model, model.x, model.y, model.m, noise2, noise1, drop_phi1=True)
    # Without the terms of phi1 it exceeds the evidence of some; the difference is KL(q1 || p1) in expectation.
    q1 = model.q1(model.q2(model.x, model.y).sample(noise2), model.m)
    lost = weights @ kl(q1, Gaussian(torch.zeros_like(q1.mean), torch.ones_like(q1.mean)))[..., 0, 0]
    assert torch.allclose(dropped - expected, lost, atol=1e-9)


def test_without_phi1_the_terms_exceed_the_evidence():
    """The exact posterior of phi2 and a q(phi1) that copies it: the rest is above the log evidence."""
    model = LinearGaussian(1000, seed=0, exact=True)
    noise2, noise1, weights = hermite()
    dropped = weights @ bound(model, model.x, model.y, model.m, noise2, noise1, drop_phi1=True)
    assert (dropped > model.log_evidence()).all()  # by the KL of the exact q1 to the prior


def test_the_bound_of_the_exact_posterior_is_the_evidence():
    model = LinearGaussian(1000, seed=1, exact=True)
    values = bound(model, model.x, model.y, model.m, *(t.double() for t in noise(model, 5, 1000)))
    assert (values - model.log_evidence()).abs().max() < 1e-8  # every sample, not only their mean


def test_weighted_samples_are_the_exact_posterior():
    exact = LinearGaussian(20, seed=2, exact=True)
    crude = LinearGaussian(20, seed=2)  # the same model, a useless encoder
    torch.set_default_dtype(D)
    try:
        phi2, weights, evidence = posterior(crude, crude.x, crude.y, crude.m, 200_000, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(weights.exp().sum(0), torch.ones(20, dtype=D))
    truth = exact.q2(exact.x, exact.y)
    mean = (weights.exp() * phi2[..., 0, 0]).sum(0)
    second = (weights.exp() * (phi2[..., 0, 0] - mean).square()).sum(0)
    assert ((mean - truth.mean[:, 0, 0]) / truth.std[:, 0, 0]).abs().max() < 0.05
    assert torch.allclose(second.sqrt(), truth.std[:, 0, 0], rtol=0.05)
    assert torch.allclose(evidence, exact.log_evidence(), atol=0.05)


def test_densities_against_torch_and_quadrature():
    g = torch.Generator().manual_seed(0)
    mean, other, x = torch.randn(3, 50, generator=g, dtype=D)
    std, wide = 0.1 + 3 * torch.rand(2, 50, generator=g, dtype=D)
    p, q = distributions.Normal(other, wide), distributions.Normal(mean, std)
    assert torch.allclose(Gaussian(mean, std).log_prob(x), q.log_prob(x), atol=1e-12)
    assert torch.allclose(bayes.standard_log_prob(x), distributions.Normal(0.0, 1.0).log_prob(x), atol=1e-7)
    exact = distributions.kl_divergence(q, p)
    assert torch.allclose(kl(Gaussian(mean, std), Gaussian(other, wide)), exact, rtol=1e-10)
    grid = mean + std * torch.linspace(-12, 12, 20001, dtype=D)[:, None]
    integral = torch.trapezoid(q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid)), grid, dim=0)
    assert torch.allclose(exact, integral, atol=1e-6)


@pytest.mark.parametrize("world", ["sinusoid", "omniglot"])
def test_gradients_of_the_bound_against_finite_differences(world):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    if world == "sinusoid":
        model, batch = Sinusoid(2, 3, 8).double(), known_sinusoids(2, 4, 1, g, "phase")
        x, y, m = batch.support_x.double(), batch.support_y.double(), batch.m.double()
    else:
        model = Characters(3, 2, 5, 8, metadata_dim=4, channels=1).double()
        x, m = torch.randn(2, 6, 5, generator=g, dtype=D), torch.eye(4, dtype=D)[:2]
        y = torch.eye(3, dtype=D).repeat(2, 2, 1)
    made_of = [t.double() for t in noise(model, 2, 2, g)]
    loss = lambda: bound(model, x, y, m, *made_of).mean()
    parameters = [p for n, p in model.named_parameters() if not n.startswith(("conv", "place"))]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    checked = 0
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:  # the noise of y, for characters
            continue
        place = gradient.abs().flatten().argmax()
        with torch.no_grad():
            flat, values = p.view(-1), []
            for change in (1e-6, -2e-6):
                flat[place] += change
                values.append(loss())
            flat[place] += 1e-6
        numeric = (values[0] - values[1]) / 2e-6
        assert torch.allclose(gradient.flatten()[place], numeric, rtol=1e-5, atol=1e-7)
        checked += 1
    assert checked > 8


def test_the_order_of_the_points_is_nothing():
    torch.manual_seed(0)
    model, order = Sinusoid(2, 3, 8).double(), torch.tensor([3, 0, 4, 1, 2])
    x, y = torch.randn(2, 4, 5, 1, dtype=D)
    for a, b in zip(model.q2(x, y), model.q2(x[:, order], y[:, order]), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    twice = model.q2(x.repeat(1, 2, 1), y.repeat(1, 2, 1))  # the same average, but more points
    assert not torch.allclose(twice.std, model.q2(x, y).std)
    assert torch.isfinite(model.q2(x[:, :0], y[:, :0]).mean).all()  # a context of none
    characters = Characters(3, 2, 5, 8, 4, 1).double()
    x, y = torch.randn(1, 6, 5, dtype=D), torch.eye(3, dtype=D).repeat(1, 2, 1)
    shuffled = characters.q2(x[:, [5, 2, 0, 4, 3, 1]], y[:, [5, 2, 0, 4, 3, 1]])
    assert torch.allclose(shuffled.mean, characters.q2(x, y).mean, atol=1e-12)
    renamed = characters.q2(x, y[..., [2, 0, 1]])  # other names of the classes: the vectors change places
    assert torch.allclose(renamed.mean, characters.q2(x, y).mean[:, [2, 0, 1]], atol=1e-12)


def test_metadata_tells_the_truth():
    g = torch.Generator().manual_seed(0)
    for metadata in ("phase", "amplitude"):
        batch = known_sinusoids(20_000, 30, 1, g, metadata)
        x, y = batch.support_x[..., 0].double(), batch.support_y[..., 0].double()
        basis = torch.stack([x.sin(), x.cos()], dim=-1)  # a cos(phase), a sin(phase) by least squares
        cos, sin = torch.linalg.lstsq(basis, y[..., None]).solution[..., 0].T
        a, phase = (cos.square() + sin.square()).sqrt(), torch.atan2(sin, cos) % (2 * math.pi)
        residual = y - (basis @ torch.stack([cos, sin], dim=-1)[..., None])[..., 0]
        assert (residual.square().sum() / (20_000 * 28)).sqrt().item() == pytest.approx(0.2, rel=0.01)
        assert (batch.m[:, 0] == 1).all()
        if metadata == "phase":
            assert (batch.m[:, 1] == 0).all() and (batch.m[:, 2:].sum(1) == 1).all()
            quarter = (phase / (math.pi / 2)).long().clamp(max=3)
            assert (batch.m[:, 2:].argmax(1) == quarter).double().mean() > 0.9  # but for noise at the borders
            shares = batch.m[:, 2:].mean(0)
            assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 20_000) ** 0.5
        else:
            assert (batch.m[:, 2:] == 0).all()
            assert (batch.m[:, 1] - a).std().item() == pytest.approx(0.2, abs=0.03)


def test_alphabets_are_the_metadata_of_characters():
    batch = OfAlphabet(known_dataset(), "train", 5, 2, 3, 50, seed=1).sample()
    classes = (batch.support_x[:, :, 0, 0, 0] * 255).round().long()
    targets = (batch.query_x[:, :, 0, 0, 0] * 255).round().long()
    alphabet = batch.m[:, 1:].argmax(1)
    assert batch.m.shape == (50, 4) and (classes // 10 == alphabet[:, None]).all() and len(alphabet.unique()) == 3
    one_shot, labels = classes[:, :5], batch.support_y[:, :5].argmax(-1)  # the first shot of each class
    assert (labels == torch.arange(5)).all() and all(len(set(row.tolist())) == 5 for row in one_shot)
    assert torch.equal(one_shot, classes[:, 5:]) and torch.equal(one_shot.repeat(1, 3), targets)


def test_coverage_of_uniform_places():
    place = torch.rand(2000, 50, generator=torch.Generator().manual_seed(0))
    for level in (0.1, 0.5, 0.9):
        assert coverage(place, level).mean().item() == pytest.approx(level, abs=5 * 0.5 / 100_000**0.5)
    assert coverage(torch.tensor([[0.04, 0.06, 0.5, 0.94, 0.96]]), 0.9).item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--metadata", "amplitude", "--forget", "0.2", "--samples", "3", "--num_shot", "3", "--num_query", "4"],
        ["--drop_phi1", "--phi1_dim", "2", "--phi2_dim", "3", "--hidden_dim", "8", "--learning_rate", "1e-4"],
        [
            "--world",
            "omniglot",
            "--dataset",
            "glyphs",
            "--num_classes",
            "3",
            "--num_shot",
            "2",
            "--num_query",
            "1",
            "--meta_batch_size",
            "2",
            "--train_steps",
            "4",
            "--eval_freq",
            "2",
        ],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    metrics = bayes.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", "a", *flags])
    assert len(metrics["nll_with"]) == len(metrics["points"]) and all(map(math.isfinite, metrics["nll_with"]))
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["gain"] == metrics["gain"]
    again = bayes.main(["--test", "--checkpoint", str(tmp_path / "a")])
    assert again["nll_without"] == metrics["nll_without"] and again["gain_ci95"] == metrics["gain_ci95"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a")).Reload()
    assert {"Loss/train", "Loss/val", "Time/tasks_per_second"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ([] if "omniglot" in flags else ["posterior"])


@pytest.mark.thorough
def test_it_learns_and_metadata_helps():
    """A short training: with ten points better than without any; the quarter of the phase helps before the first."""
    metrics = bayes.main(
        [
            *SMOKE,
            "--train_steps",
            "400",
            "--eval_freq",
            "400",
            "--num_test_tasks",
            "200",
            "--test_samples",
            "100",
            "--hidden_dim",
            "32",
        ]
    )
    assert metrics["nll_without"][10] < metrics["nll_without"][0] - 0.2
    assert metrics["gain"][0] > metrics["gain_ci95"][0]


def weights(folder, file="checkpoint.pt"):
    return torch.load(folder / file, weights_only=True)["objects"]["model"]


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    base = [*SMOKE, "--log_dir", str(tmp_path)]
    whole = bayes.main([*base, "--run_name", "whole"])
    real = experiment.Run.save

    def save(run):
        real(run)
        if run.step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "save", save)
        bayes.main([*base, "--run_name", "stopped"])
    resumed = bayes.main(["--resume", str(tmp_path / "stopped")])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(a[k], b[k]) for k in a) and resumed["nll_with"] == whole["nll_with"]


def test_bad_input(run_script):
    with pytest.raises(UserError, match="--forget"):
        bayes.parse_args(["--forget", "1.5"])
    with pytest.raises(UserError, match="--rotations"):
        bayes.parse_args(["--rotations"])
    with pytest.raises(UserError, match="--num_classes 99"):
        bayes.main([*SMOKE, "--world", "omniglot", "--dataset", "glyphs", "--num_classes", "99"])
    one_line_error(run_script("bayes.py", "--metadata", "colour"), "--metadata")
    one_line_error(run_script("bayes.py", "--test"), "--checkpoint")
