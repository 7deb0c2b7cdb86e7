"""Graded tests of hw9: features, the alias, min-norm regression, the loss of the weights, gradient-step learners."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from checks import close, expect, graded, shaped


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- 1a: features


def probe_features(x, d):
    import feature_weights

    return feature_weights.fourier_features(x, d)


@graded("1a", public=True)
def test_features_are_orthonormal(student):
    """The mean product of two features over x in [-1, 1) is 1 for a feature with itself and 0 otherwise."""
    x = torch.arange(400, dtype=torch.float64) / 200 - 1
    for d in (1, 2, 9, 12):
        features = shaped(student.run(probe_features, x=x, d=d), (400, d), "the features")
        close(features.T @ features / 400, torch.eye(d), "their mean products", 1e-9)


@graded("1a")
def test_features_in_order(student):
    """1, sqrt2 sin(pi x), sqrt2 cos(pi x), sqrt2 sin(2 pi x), ..., at x of any shape."""
    x = randn(3, 1, 4, seed=1)
    expected = []
    for k in range(7):
        wave = torch.sin if k % 2 else torch.cos
        expected.append(math.sqrt(2) * wave((k + 1) // 2 * math.pi * x) if k else torch.ones_like(x))
    close(student.run(probe_features, x=x, d=7), torch.stack(expected, dim=-1), "the features", 1e-9)


# ------------------------------------------------------------------------- 1b, 1c: the alias


def probe_alias(c):
    import feature_weights

    return feature_weights.alias_solution(c)


def probe_alias_gradient(c):
    import feature_weights

    return feature_weights.alias_gradient(c)


@graded("1b", public=True)
def test_alias_solution_by_hand(student):
    """Weights (3, 4): beta = (3, 4) / 25."""
    found = student.run(probe_alias, c=torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64))
    close(found, torch.tensor([[0.12, 0.16], [1.0, 0.0]], dtype=torch.float64), "beta", 1e-9)


@graded("1b")
def test_alias_solution(student):
    """It fits the point, and no other solution is shorter."""
    c = randn(5, 4, 2, seed=2)
    beta = shaped(student.run(probe_alias, c=c), c.shape, "beta")
    close((beta * c).sum(-1), torch.ones(5, 4), "the fit", 1e-9)
    across = torch.stack([-c[..., 1], c[..., 0]], dim=-1)
    expect((beta * across).sum(-1).abs().max() < 1e-9, "there is a shorter solution")


@graded("1c", public=True)
def test_alias_gradient_by_hand(student):
    """At (1, 1) the loss is 1/2 and falls by turning to the true feature: gradient (-1, 1)."""
    found = student.run(probe_alias_gradient, c=torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64))
    close(found, torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64), "the gradient", 1e-9)


@graded("1c")
def test_alias_gradient(student):
    """It is the derivative of the loss with the solution put in."""
    c = randn(6, 3, 2, seed=3).requires_grad_()
    learned = c * c / c.square().sum(-1, keepdim=True)
    loss = (1 - learned[..., 0]).square() + learned[..., 1].square()
    (expected,) = torch.autograd.grad(loss.sum(), c)
    close(student.run(probe_alias_gradient, c=c.detach()), expected, "the gradient", 1e-8)


# ------------------------------------------------------------------------------- 2: min-norm


def probe_min_norm(A, y, direction):
    """The solution, and the derivative of its product with `direction` to A."""
    import feature_weights

    A = A.clone().requires_grad_()
    beta = feature_weights.min_norm(A, y)
    (gradient,) = torch.autograd.grad((beta * direction).sum(), A, allow_unused=True)
    return {"beta": beta, "gradient": gradient}


def probe_solution(A, y):
    import feature_weights

    return feature_weights.min_norm(A, y)


@graded("2", public=True)
def test_min_norm_by_hand(student):
    """One point, three features: beta = A y / ||A||^2."""
    A, y = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64), torch.tensor([[9.0, -9.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, -1.0], [2.0, -2.0], [2.0, -2.0]], dtype=torch.float64)
    close(student.run(probe_solution, A=A, y=y), expected, "beta", 1e-9)


@graded("2")
def test_min_norm(student):
    """The shortest least-squares solution for fewer and for more points than features, in batches."""
    for seed, (lead, n, d, T) in enumerate((((), 4, 9, 3), ((2, 3), 5, 20, 2), ((2,), 9, 4, 2), ((), 5, 5, 1))):
        A, y = randn(*lead, n, d, seed=seed), randn(*lead, n, T, seed=10 + seed)
        expected = torch.from_numpy(np.linalg.pinv(A.numpy()) @ y.numpy())
        close(student.run(probe_solution, A=A, y=y), expected, f"{n} points, {d} features", 1e-7)


@graded("2")
def test_min_norm_of_rank_deficient_systems(student):
    """Weights of zero (the oracle) and points that are there twice leave A A^T singular."""
    A = randn(6, 12, seed=5)
    A[:, 3:] = 0
    twice = randn(3, 8, seed=6).repeat(2, 1)
    for what, matrix in (("most features of weight zero", A), ("points that are there twice", twice)):
        y = randn(6, 2, seed=7)
        expected = torch.from_numpy(np.linalg.pinv(matrix.numpy(), rcond=1e-10) @ y.numpy())
        close(student.run(probe_solution, A=matrix, y=y), expected, what, 1e-6)
    for seed in range(80):  # some drivers of lstsq are right by chance, mostly
        A, y = randn(2, 6, 12, seed=30 + seed), randn(2, 6, 2, seed=130 + seed)
        A[..., 3:] = 0
        expected = torch.from_numpy(np.linalg.pinv(A.numpy(), rcond=1e-10) @ y.numpy())
        close(student.run(probe_solution, A=A, y=y), expected, "most features of weight zero, in batches", 1e-6)


@graded("2")
def test_gradient_of_min_norm(student):
    """The derivative of the solution to A, by differences."""
    A, y, direction = randn(3, 6, seed=8), randn(3, 2, seed=9), randn(6, 2, seed=10)
    value = lambda matrix: (torch.from_numpy(np.linalg.pinv(matrix.numpy())) @ y * direction).sum()
    expected, h = torch.zeros_like(A), 1e-6
    for i in range(A.shape[0]):
        for j in range(A.shape[1]):
            step = torch.zeros_like(A)
            step[i, j] = h
            expected[i, j] = (value(A + step) - value(A - step)) / (2 * h)
    found = student.run(probe_min_norm, A=A, y=y, direction=direction)
    close(found["gradient"], expected, "the derivative to A", 1e-5)


# -------------------------------------------------------------------- 3: the loss of the weights


def probe_meta_loss(c, alpha, x, fresh, part, steps, rate):
    from argparse import Namespace

    import feature_weights

    args = Namespace(part=part, num_gd_steps=steps, inner_lr=rate)
    c = c.clone().requires_grad_()
    loss = feature_weights.meta_loss(c, alpha, x, fresh, args)
    (gradient,) = torch.autograd.grad(loss, c, allow_unused=True)
    return {"loss": loss, "gradient": gradient}


def meta_problem(part, kind, seed, d=14, S=3, n=6, T=4, M=20):
    """Weights, tasks, their points and fresh points; float64."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: 2 * torch.rand(*shape, dtype=torch.float64, generator=g) - 1
    c, alpha, fresh = 1 + 0.4 * rand(d), rand(T, S), rand(M)
    x = (-1 + 2 * torch.arange(n, dtype=torch.float64) / n)[None, None] if kind == "grid" else rand(T, 1, n)
    alpha = alpha.T[None, None] if kind == "grid" else alpha[:, None, :, None]
    return {"c": c, "alpha": alpha, "x": x, "fresh": fresh, "part": part, "steps": 4, "rate": 0.1}


def oracle_features(x, d):
    columns = [np.ones_like(x)]
    for k in range(1, d):
        columns.append(math.sqrt(2) * (np.sin if k % 2 else np.cos)((k + 1) // 2 * math.pi * x))
    return np.stack(columns, axis=-1)


@functools.cache
def oracle_meta_gradient(part, kind, seed, h=1e-5):
    p = meta_problem(part, kind, seed)
    c = p["c"].numpy()
    steps = h * np.eye(len(c))
    expected = [(oracle_meta_loss(p, c + s) - oracle_meta_loss(p, c - s)) / (2 * h) for s in steps]
    return torch.tensor(expected, dtype=torch.float64)


def oracle_meta_loss(p, c):
    """One task after the other in numpy."""
    part, d = p["part"], len(c)
    alpha = p["alpha"].numpy().squeeze(1)  # [1, S, T] or [T, S, 1]
    S, losses = alpha.shape[1], []
    tasks = [(0, t) for t in range(alpha.shape[2])] if len(alpha) == 1 else [(t, 0) for t in range(len(alpha))]
    sign = np.sign if part in ("classification", "logistic") else lambda v: v
    for group, t in tasks:
        a, x = alpha[group, :, t], p["x"][group, 0].numpy()
        phi, phi_fresh = oracle_features(x, d), oracle_features(p["fresh"].numpy(), d)
        y, truth = sign(phi[:, :S] @ a), sign(phi_fresh[:, :S] @ a)
        A, beta = phi * c, np.zeros(d)
        if part in ("closed_form", "classification"):
            beta = np.linalg.pinv(A) @ y
        for _ in range(p["steps"] if part in ("gradient", "logistic") else 0):
            if part == "gradient":
                beta = beta - p["rate"] * 2 / len(x) * A.T @ (A @ beta - y)
            else:
                beta = beta + p["rate"] / len(x) * A.T @ (y / (1 + np.exp(y * (A @ beta))))
        prediction = phi_fresh @ (c * beta)
        loss = np.log1p(np.exp(-truth * prediction)) if part == "logistic" else (prediction - truth) ** 2
        losses.append(loss.mean())
    return float(np.mean(losses))


PROBLEMS = [
    (part, kind) for part in ("closed_form", "gradient", "classification", "logistic") for kind in ("grid", "random")
]


@graded("3", public=True)
def test_meta_loss_of_weights_that_know_the_features(student):
    """With the weights of other features at 0 and more points than true features nothing is lost."""
    p = meta_problem("closed_form", "grid", seed=1)
    p["c"][3:] = 0
    loss = shaped(student.run(probe_meta_loss, **p)["loss"], (), "the loss")
    expect(loss.abs() < 1e-12, "there is a loss where the true features alone fit the points")
    p["c"][1] = 0  # a true feature is missing
    expect(student.run(probe_meta_loss, **p)["loss"] > 1e-3, "there is no loss where a true feature is missing")


@graded("3")
def test_meta_loss(student):
    """The loss on fresh points of what is learned from the training points, in every part of the homework."""
    for seed, (part, kind) in enumerate(PROBLEMS):
        p = meta_problem(part, kind, seed=seed)
        expected = oracle_meta_loss(p, p["c"].numpy())
        close(
            student.run(probe_meta_loss, **p)["loss"],
            torch.tensor(expected, dtype=torch.float64),
            f"part {part}, {kind}",
            1e-8,
        )


@graded("3")
def test_gradient_of_the_feature_weights(student):
    """The derivative of the loss to the weights goes through the learner, by differences."""
    for seed, (part, kind) in enumerate(PROBLEMS):
        p = meta_problem(part, kind, seed=20 + seed)
        found = student.run(probe_meta_loss, **p)["gradient"]
        close(found, oracle_meta_gradient(part, kind, 20 + seed), f"part {part}, {kind}", 1e-5)


# -------------------------------------------------------------- 4, 5: learners of a few steps


def probe_steps(name, A, y, n, steps, lr):
    import feature_weights

    A = A.clone().requires_grad_()
    beta = getattr(feature_weights, name)(A, y, n, steps, lr)
    gradient = None
    if beta.requires_grad:
        (gradient,) = torch.autograd.grad(beta.square().sum(), A)
    return {"beta": beta, "gradient": gradient}


def steps_problem(seed, binary, steps=3):
    """Two groups of different size: rows of zeros fill the smaller one up."""
    A, y, n = randn(2, 6, 4, seed=seed), randn(2, 6, 3, seed=seed + 1), torch.tensor([6.0, 4.0]).double()[:, None, None]
    y = y.sign() if binary else y
    A[1, 4:], y[1, 4:] = 0, 0
    return {"A": A, "y": y, "n": n, "steps": steps, "lr": 0.3}


def oracle_steps(p, binary):
    """Gradient steps by autograd on the written-out loss; and the derivative of ||beta||^2 to A by differences."""

    def beta_of(A):
        results = []
        for g in range(2):
            n = int(p["n"][g])
            a, y = A[g, :n], p["y"][g, :n]
            beta = torch.zeros(A.shape[-1], y.shape[-1], dtype=torch.float64)
            for _ in range(p["steps"]):
                beta = beta.detach().requires_grad_()
                losses = torch.log1p(torch.exp(-y * (a @ beta))) if binary else (a @ beta - y).square()
                (gradient,) = torch.autograd.grad(losses.sum() / n, beta)
                beta = beta - p["lr"] * gradient
            results.append(beta.detach())
        return torch.stack(results)

    gradient, h = torch.zeros_like(p["A"]), 1e-6
    for place in [(0, 1, 2), (0, 5, 0), (1, 0, 3), (1, 3, 1)]:
        step = torch.zeros_like(p["A"])
        step[place] = h
        plus, minus = (beta_of(p["A"] + s * step).square().sum() for s in (1, -1))
        gradient[place] = (plus - minus) / (2 * h)
    return beta_of(p["A"]), gradient


def compare_steps(student, name, binary):
    for seed, steps in ((1, 1), (3, 4)):
        p = steps_problem(seed, binary, steps)
        beta, gradient = oracle_steps(p, binary)
        found = student.run(probe_steps, name=name, **p)
        close(found["beta"], beta, f"beta after {steps} steps", 1e-8)
        known = gradient != 0
        got = shaped(found["gradient"], gradient.shape, "the derivative to A")
        close(got[known], gradient[known], "the derivative of beta to A", 1e-4)


@graded("4", public=True)
def test_a_regression_step_by_hand(student):
    """Two points of one feature, a step of 1/4: beta = 1/4 * 2/2 * (1*1 + 2*3)."""
    A, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    n = torch.tensor(2.0, dtype=torch.float64)
    found = student.run(probe_steps, name="regression_steps", A=A, y=y, n=n, steps=1, lr=0.25)
    close(found["beta"], torch.tensor([[1.75]]), "beta", 1e-9)
    found = student.run(probe_steps, name="regression_steps", A=A, y=y, n=n, steps=0, lr=0.25)
    close(found["beta"], torch.tensor([[0.0]]), "beta before any step", 1e-9)


@graded("4")
def test_regression_steps(student):
    """Gradient descent on the mean squared error over the points that are there."""
    compare_steps(student, "regression_steps", binary=False)


@graded("5", public=True)
def test_a_logistic_step_by_hand(student):
    """At beta = 0 every point pulls with half its weight: beta = 1/4 * 1/2 * (1 + 2) / 2."""
    A, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    n = torch.tensor(2.0, dtype=torch.float64)
    found = student.run(probe_steps, name="logistic_steps", A=A, y=y, n=n, steps=1, lr=0.25)
    close(found["beta"], torch.tensor([[0.1875]]), "beta", 1e-9)


@graded("5")
def test_logistic_steps(student):
    """Gradient descent on the mean logistic loss of labels +1 and -1."""
    compare_steps(student, "logistic_steps", binary=True)


@graded("5")
def test_logistic_steps_of_large_margins(student):
    """Margins of hundreds, on the right and on the wrong side, have a pull of 0 and of 1."""
    A, y = (torch.tensor(v, dtype=torch.float64)[:, None] for v in ([40.0, 40.0, 30.0], [1.0, 1.0, -1.0]))
    n, beta = torch.tensor(3.0, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for _ in range(3):
        beta = beta + 3.0 / 3 * (A.T @ (y * torch.sigmoid(-y * (A @ beta))))
    found = student.run(probe_steps, name="logistic_steps", A=A, y=y, n=n, steps=3, lr=3.0)["beta"]
    close(found, beta, "beta", 1e-9)
