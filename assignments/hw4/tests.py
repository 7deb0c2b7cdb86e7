"""Graded tests of hw4: sinusoid tasks, MAML's inner step on them, the Evolution Strategies estimate, six panels."""

from __future__ import annotations

import math

import torch
from checks import close, expect, graded, shaped


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- 1a: sinusoids


def probe_tasks(B, K, Q):
    import profile_costs

    return list(profile_costs.sample_tasks(B, K, Q, dtype=torch.float64))


def tasks_of(student, B, K, Q):
    found = student.run(probe_tasks, B=B, K=K, Q=Q)
    expect(isinstance(found, list) and len(found) == 4, "not four tensors")
    names = ("support x", "support y", "query x", "query y")
    return [shaped(t, (B, n, 1), name)[..., 0] for t, n, name in zip(found, (K, K, Q, Q), names, strict=True)]


def curve_parameters(x, y):
    """Least-squares sine, cosine and constant of each task [B, n] -> [B, 3], and the largest residual."""
    basis = torch.stack([x.sin(), x.cos(), torch.ones_like(x)], dim=-1)
    found = torch.linalg.lstsq(basis, y.unsqueeze(-1)).solution
    return found[..., 0], (basis @ found - y.unsqueeze(-1)).abs().max()


def is_uniform(values, low, high, what):
    """Range, mean and mean square at five standard deviations."""
    share = (values - low) / (high - low)
    expect((share > -1e-6).all() and (share < 1 + 1e-6).all(), f"{what} is not in its range")
    n = len(share)
    expect((share.mean() - 1 / 2).abs() < 5 * math.sqrt(1 / 12 / n), f"{what} is not uniform in its range")
    expect((share.square().mean() - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / n), f"{what} is not uniform in its range")


@graded("1a", public=True)
def test_tasks_are_sinusoids(student):
    """Support and query of a task lie on one curve a sin(x + phase) + bias; the query x are a grid over [0, 2 pi]."""
    x, y, query_x, query_y = tasks_of(student, 20, 12, 40)
    close(query_x, torch.linspace(0, 2 * math.pi, 40).double().expand(20, -1), "the query x", 1e-6)
    found, residual = curve_parameters(query_x, query_y)
    expect(residual < 1e-5, "the queries of a task lie on no such curve")
    on_curve = found[:, :1] * x.sin() + found[:, 1:2] * x.cos() + found[:, 2:]
    expect((on_curve - y).abs().max() < 1e-4, "the support points are not on the curve of the queries")


@graded("1a")
def test_tasks_are_uniform(student):
    """Amplitude in [0.5, 1], phase in [0, 2 pi], bias in [-0.3, 0.3], support x in [0, 2 pi]."""
    x, _, query_x, query_y = tasks_of(student, 5000, 3, 20)
    found, residual = curve_parameters(query_x, query_y)
    expect(residual < 1e-5, "the queries of a task lie on no such curve")
    is_uniform(found[:, :2].norm(dim=1), 0.5, 1.0, "the amplitude")
    is_uniform(torch.atan2(found[:, 1], found[:, 0]), -math.pi, math.pi, "the phase")
    is_uniform(found[:, 2], -0.3, 0.3, "the bias")
    is_uniform(x.flatten(), 0, 2 * math.pi, "a support x")
    parts = [found[:, :2].norm(dim=1), torch.atan2(found[:, 1], found[:, 0]), found[:, 2], *x.T]
    related = torch.corrcoef(torch.stack(parts)) - torch.eye(len(parts))
    expect(related.abs().max() < 6 / math.sqrt(5000), "amplitude, phase, bias and x depend on each other")


def probe_tasks_again(B, K, Q, seeds):
    """Tasks of two calls after each seed of the global generator, and of a call in single precision."""
    import profile_costs

    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found += [list(profile_costs.sample_tasks(B, K, Q, dtype=torch.float64)) for _ in range(2)]
    kinds = [str(t.dtype) for t in (*found[0], *profile_costs.sample_tasks(B, K, Q))]
    return {"found": found, "kinds": kinds}


@graded("1a")
def test_every_call_has_other_tasks(student):
    """They come from torch's global generator, which goes on; in the precision that is asked for."""
    found = student.run(probe_tasks_again, B=4, K=3, Q=5, seeds=[1, 1, 2])
    curves = [shaped(tasks[3], (4, 5, 1), "query y") for tasks in found["found"]]
    once, then, again, _, other, _ = curves
    expect(torch.equal(once, again), "the same seed of torch's generator gives other tasks")
    expect(not torch.equal(once, then) and not torch.equal(once, other), "the tasks of another call are the same")
    expect(found["kinds"] == ["torch.float64"] * 4 + ["torch.float32"] * 4, "the tasks have another type than dtype")


# --------------------------------------------------------------------------- 1b: inner step


def network(sizes, G, seed):
    """Layers (W, b) of an MLP: shared [i, o] and [1, o], or with G of their own for each task; float64."""
    lead = (G,) if G else ()
    pairs = list(zip(sizes, sizes[1:], strict=False))
    return [
        [0.7 * randn(*lead, i, o, seed=seed + n), 0.3 * randn(*lead, 1, o, seed=seed + 50 + n)]
        for n, (i, o) in enumerate(pairs)
    ]


def probe_inner_step(layers, x, y, rate, second_order, direction, tracked=True):
    """The new layers; and the derivative of their product with `direction` to the old ones."""
    import profile_costs

    layers = [(W.clone().requires_grad_(tracked), b.clone().requires_grad_(tracked)) for W, b in layers]
    before = [W.detach().clone() for W, _ in layers]
    with torch.set_grad_enabled(tracked):
        new = profile_costs.inner_step(layers, x, y, rate, second_order=second_order)
    untouched = all(torch.equal(W, old) for (W, _), old in zip(layers, before, strict=True))
    result = {"new": [list(layer) for layer in new], "untouched": untouched}
    if tracked:
        pairs = zip(new, direction, strict=True)
        value = sum((W * u).sum() + (b * v).sum() for (W, b), (u, v) in pairs)
        old = [p for layer in layers for p in layer]
        result["gradient"] = list(torch.autograd.grad(value, old, allow_unused=True))
    return result


def oracle_loss(layers, x, y):
    for W, b in layers[:-1]:
        x = (x @ W + b).relu()
    return ((x @ layers[-1][0] + layers[-1][1] - y) ** 2).mean()


def oracle_step(layers, x, y, rate, second_order, own):
    """One task after the other by autograd: the new layers, stacked."""
    tasks = []
    for g in range(len(x)):
        mine = [(W[g], b[g]) if own else (W, b) for W, b in layers]
        loss = oracle_loss(mine, x[g], y[g])
        flat = [p for layer in mine for p in layer]
        gradients = torch.autograd.grad(loss, flat, create_graph=second_order, retain_graph=True)
        gradients = gradients if second_order else [g.detach() for g in gradients]
        tasks.append([p - rate * d for p, d in zip(flat, gradients, strict=True)])
    stacked = [torch.stack(parts) for parts in zip(*tasks, strict=True)]
    return list(zip(stacked[::2], stacked[1::2], strict=True))


def check_step(student, sizes, G, own, second_order):
    layers, x, y = network(sizes, G if own else 0, seed=1), randn(G, 6, 1, seed=2), randn(G, 6, 1, seed=3)
    direction = network(sizes, G, seed=200)
    found = student.run(
        probe_inner_step, layers=layers, x=x, y=y, rate=0.2, second_order=second_order, direction=direction
    )
    expect(found["untouched"] is True, "the layers that were handed in have been changed")
    layers = [(W.requires_grad_(), b.requires_grad_()) for W, b in layers]
    expected = oracle_step(layers, x, y, 0.2, second_order, own)
    expect(len(found["new"]) == len(expected), "not as many layers as before")
    for n, (got, layer) in enumerate(zip(found["new"], expected, strict=True)):
        for name, p, q in zip(("weights", "biases"), got, layer, strict=True):
            close(p, q.detach(), f"the {name} of layer {n}", 1e-7)
    value = sum((W * u).sum() + (b * v).sum() for (W, b), (u, v) in zip(expected, direction, strict=True))
    gradients = torch.autograd.grad(value, [p for layer in layers for p in layer], allow_unused=True)
    for n, (got, gradient) in enumerate(zip(found["gradient"], gradients, strict=True)):
        expect(got is not None, f"the new layers do not depend on layer {n // 2}")
        close(got, gradient, f"the derivative to layer {n // 2}", 1e-6)


@graded("1b", public=True)
def test_a_step_by_hand(student):
    """y = w x + b with w = 1, b = 0 at the point (2, 5): dL/dw = -12, dL/db = -6."""
    layers = [[torch.ones(1, 1).double(), torch.zeros(1, 1).double()]]
    x, y = torch.tensor([[[2.0]]]).double(), torch.tensor([[[5.0]]]).double()
    found = student.run(
        probe_inner_step, layers=layers, x=x, y=y, rate=0.1, second_order=True, direction=[], tracked=False
    )["new"]
    close(found[0][0], torch.tensor([[[2.2]]]), "the weight", 1e-6)
    close(found[0][1], torch.tensor([[[0.6]]]), "the bias", 1e-6)


@graded("1b")
def test_inner_step(student):
    """One gradient step on each task's mean squared error, from shared layers and from layers of its own."""
    check_step(student, [1, 5, 4, 1], 3, own=False, second_order=True)
    check_step(student, [1, 4, 1], 2, own=True, second_order=True)


@graded("1b")
def test_inner_step_of_first_order(student):
    """With second_order=False the gradient is a constant."""
    check_step(student, [1, 5, 4, 1], 3, own=True, second_order=False)


@graded("1b")
def test_inner_step_without_graph(student):
    """It also steps under torch.no_grad, where the evaluation calls it."""
    layers, x, y = network([1, 4, 4, 1], 0, seed=4), randn(2, 5, 1, seed=5), randn(2, 5, 1, seed=6)
    found = student.run(
        probe_inner_step, layers=layers, x=x, y=y, rate=0.3, second_order=True, direction=[], tracked=False
    )["new"]
    layers = [(W.requires_grad_(), b.requires_grad_()) for W, b in layers]
    for got, layer in zip(found, oracle_step(layers, x, y, 0.3, False, False), strict=True):
        for p, q in zip(got, layer, strict=True):
            close(p, q.detach(), "the new layers", 1e-7)


# --------------------------------------------------------- 2: the estimate of Evolution Strategies


def probe_es(theta, hidden, tasks, rate, steps, at_once, perturbations, sigma, repeats=1, layers=1):
    """theta.grad after each of `repeats` estimates [repeats, D], the losses, and theta itself."""
    from fewshot.learners import mlp

    import profile_costs

    torch.manual_seed(7)
    model = mlp.Initialisation(layers, hidden).double()
    model.theta.data.copy_(theta)
    gradients, losses = [], []
    for _ in range(repeats):
        loss = profile_costs.es_gradient(model, tasks, rate, steps, at_once, perturbations, sigma)
        gradients.append(model.theta.grad.clone())
        losses.append(float(loss))
    return {"gradients": torch.stack(gradients), "losses": losses, "theta": model.theta}


def es_problem(B, seed, hidden=3):
    """theta of an MLP 1 -> hidden -> 1 in one vector, and B tasks that disagree."""
    theta = 0.8 * randn(3 * hidden + 1, seed=seed)
    x, query_x = randn(B, 6, 1, seed=seed + 1), randn(B, 9, 1, seed=seed + 2)
    slope = torch.linspace(-1, 2, B).double().view(B, 1, 1)
    return theta, [x, slope * x + 1, query_x, slope * query_x + 1]


def oracle_gradient(theta, hidden, tasks, rate, steps):
    """The exact gradient of each task's query loss after `steps` inner steps [B, D], and the losses [B]."""
    gradients, losses = [], []
    for task in zip(*tasks, strict=True):
        theta = theta.detach().requires_grad_()
        W1, b1, W2, b2 = theta.split([hidden, hidden, hidden, 1])
        layers = [(W1.view(1, hidden), b1.view(1, hidden)), (W2.view(hidden, 1), b2.view(1, 1))]
        for _ in range(steps):
            flat = [p for layer in layers for p in layer]
            down = torch.autograd.grad(oracle_loss(layers, *task[:2]), flat, create_graph=True)
            new = [p - rate * d for p, d in zip(flat, down, strict=True)]
            layers = list(zip(new[::2], new[1::2], strict=True))
        loss = oracle_loss(layers, *task[2:])
        gradients.append(torch.autograd.grad(loss, theta)[0])
        losses.append(loss.detach())
    return torch.stack(gradients), torch.stack(losses)


def is_unbiased(found, exact, pairs, what):
    """Every coordinate within five standard deviations: a pair's estimate (g eps) eps has variance |g|^2 + g_i^2."""
    mean = exact.mean(dim=0)
    sigma = ((exact.square().sum(dim=1, keepdim=True) + exact.square()).mean(dim=0) / pairs).sqrt()
    expect(((found - mean).abs() < 5 * sigma + 1e-6).all(), what)


@graded("2", public=True)
def test_estimate_goes_uphill(student):
    """With one pair the estimate never points down the exact gradient, and theta itself stays where it is."""
    theta, tasks = es_problem(1, seed=1)
    found = student.run(
        probe_es,
        theta=theta,
        hidden=3,
        tasks=tasks,
        rate=0.05,
        steps=0,
        at_once=2,
        perturbations=2,
        sigma=1e-4,
        repeats=100,
    )
    close(found["theta"], theta, "theta afterwards", 1e-12)
    # Without inner steps the exact gradient is that of the query loss, by differences.
    exact = torch.zeros(10, dtype=torch.float64)

    def loss(t):
        x = (tasks[2][0] @ t[:3].view(1, 3) + t[3:6]).relu() @ t[6:9].view(3, 1) + t[9]
        return (x - tasks[3][0]).square().mean()

    for i in range(10):
        step = torch.zeros(10, dtype=torch.float64)
        step[i] = 1e-6
        exact[i] = (loss(theta + step) - loss(theta - step)) / 2e-6
    along = shaped(found["gradients"], (100, 10), "the gradients") @ exact
    expect((along > -1e-3).all() and along.mean() > 0, "an estimate points down the exact gradient")


@graded("2")
def test_estimate_is_unbiased(student):
    """The mean over many pairs is the exact gradient through the inner steps, averaged over the tasks."""
    for steps, B, seed in ((2, 2, 3), (0, 3, 5)):
        theta, tasks = es_problem(B, seed)
        exact, losses = oracle_gradient(theta, 3, tasks, 0.1, steps)
        found = student.run(
            probe_es,
            theta=theta,
            hidden=3,
            tasks=tasks,
            rate=0.1,
            steps=steps,
            at_once=12000,
            perturbations=24000,
            sigma=1e-4,
        )
        shaped(found["gradients"], (1, 10), "theta.grad")
        is_unbiased(found["gradients"][0], exact, 12000, f"the estimate is biased ({steps} inner steps)")
        expect(abs(found["losses"][0] - losses.mean()) < 0.01 * losses.mean(), "the returned loss: wrong value")


@graded("2")
def test_estimate_in_parts(student):
    """It is the same estimate however many networks are adapted at once; it replaces the last one."""
    theta, tasks = es_problem(2, seed=7)
    exact, losses = oracle_gradient(theta, 3, tasks, 0.1, 1)
    for at_once, perturbations, repeats in ((10, 400, 10), (2, 40, 40)):
        found = student.run(
            probe_es,
            theta=theta,
            hidden=3,
            tasks=tasks,
            rate=0.1,
            steps=1,
            at_once=at_once,
            perturbations=perturbations,
            sigma=1e-4,
            repeats=repeats,
        )
        gradients = shaped(found["gradients"], (repeats, 10), "theta.grad")
        is_unbiased(gradients.mean(0), exact, repeats * perturbations // 2, f"biased with at_once={at_once}")
        off = (torch.tensor(found["losses"]) - losses.mean()).abs() / losses.mean()
        expect((off < 0.01).all(), "the returned loss: wrong value, of one call or another")


@graded("2")
def test_variance_of_the_estimate(student):
    """Its noise is that of independent antithetic pairs, neither more nor less."""
    theta, tasks = es_problem(1, seed=9)
    exact, _ = oracle_gradient(theta, 3, tasks, 0.1, 1)
    found = student.run(
        probe_es,
        theta=theta,
        hidden=3,
        tasks=tasks,
        rate=0.1,
        steps=1,
        at_once=20,
        perturbations=20,
        sigma=1e-4,
        repeats=400,
    )
    error = shaped(found["gradients"], (400, 10), "theta.grad") - exact.mean(0)
    expected = 11 * exact.square().sum() / 10  # |g|^2 (D + 1) / pairs
    ratio = error.square().sum(dim=1).mean() / expected
    expect(0.6 < ratio < 1.6, "the noise of the estimate is not that of independent antithetic pairs")


@graded("2")
def test_pairs_are_antithetic(student):
    """On a parabola the difference of both sides has no error, however wide the pair."""
    theta, tasks = randn(2, seed=11), es_problem(1, seed=12)[1]
    residual = theta[0] * tasks[2] + theta[1] - tasks[3]
    exact = 2 * torch.stack([(residual * tasks[2]).mean(), residual.mean()])
    how = {"rate": 0.1, "steps": 0, "at_once": 20, "perturbations": 20, "repeats": 400, "hidden": 3, "layers": 0}
    found = student.run(probe_es, theta=theta, tasks=tasks, sigma=3.0, **how)
    error = shaped(found["gradients"], (400, 2), "theta.grad") - exact
    ratio = error.square().sum(dim=1).mean() / (3 * exact.square().sum() / 10)
    expect(0.6 < ratio < 1.6, "the two networks of a pair are not as far from theta on either side")


@graded("2")
def test_every_pair_has_its_own_noise(student):
    """With tasks that are all the same the noise of the estimate falls with the number of pairs."""
    theta, tasks = es_problem(1, seed=13)
    exact, _ = oracle_gradient(theta, 3, tasks, 0.1, 1)
    tasks = [t.expand(5, -1, -1).contiguous() for t in tasks]
    how = {"rate": 0.1, "steps": 1, "perturbations": 40, "sigma": 1e-4, "repeats": 300, "hidden": 3}
    for at_once in (40, 8):
        found = student.run(probe_es, theta=theta, tasks=tasks, at_once=at_once, **how)
        error = shaped(found["gradients"], (300, 10), "theta.grad") - exact.mean(0)
        ratio = error.square().sum(dim=1).mean() / (11 * exact.square().sum() / 20)
        expect(0.6 < ratio < 1.6, "pairs share their noise")


# ----------------------------------------------------------------------------- 3a: how it grows


def probe_fit(sweep, x, y):
    from bench import sweeps

    return sweeps.fit(sweep, x, y)


@graded("3a", public=True)
def test_exact_curves_are_found(student):
    """3 + 2 x over inner steps is a line, 3 x^2 over hidden units a power."""
    x = [1.0, 2.0, 5.0, 10.0]
    line = student.run(probe_fit, sweep="inner_steps", x=x, y=[3 + 2 * v for v in x])
    power = student.run(probe_fit, sweep="hidden_dim", x=x, y=[3 * v**2 for v in x])
    expect((line["form"], power["form"]) == ("line", "power"), "the form: wrong")
    for found in (line, power):
        for name, value in (("a", 3), ("b", 2), ("r2", 1)):
            expect(abs(found[name] - value) < 1e-6, f"{name}: wrong value for an exact curve")


@graded("3a")
def test_fits(student):
    """Least squares, in the logarithms for a power, and the share of the variance that is explained."""
    for seed, sweep in enumerate(("inner_steps", "layers", "hidden_dim")):
        x = [1.0, 2.0, 3.0, 7.0, 9.0]
        y = (4 + torch.tensor(x) + 2 * torch.rand(5, generator=torch.Generator().manual_seed(seed))).tolist()
        u, v = torch.tensor(x).double(), torch.tensor(y).double()
        if sweep == "hidden_dim":
            u, v = u.log(), v.log()
        b = ((u - u.mean()) * (v - v.mean())).sum() / (u - u.mean()).square().sum()
        a = v.mean() - b * u.mean()
        r2 = 1 - (v - a - b * u).square().sum() / (v - v.mean()).square().sum()
        expected = {"a": a.exp() if sweep == "hidden_dim" else a, "b": b, "r2": r2}
        found = student.run(probe_fit, sweep=sweep, x=x, y=y)
        for name, value in expected.items():
            expect(abs(found[name] - value) < 1e-6 * (1 + abs(value)), f"{name}: wrong value over {sweep}")


@graded("3a")
def test_fit_of_what_does_not_grow(student):
    """Where y is the same everywhere nothing is left to explain: slope 0 and r2 = 1."""
    for sweep, value in (("inner_steps", 8.0), ("hidden_dim", 1.0)):
        found = student.run(probe_fit, sweep=sweep, x=[1.0, 2.0, 4.0, 8.0], y=[value] * 4)
        for name, expected in (("a", value), ("b", 0.0), ("r2", 1.0)):
            expect(abs(found[name] - expected) < 1e-6, f"{name}: wrong value where y does not vary")


# ------------------------------------------------------------------------------- 3b: six panels

VALUES = {"inner_steps": (1, 2, 5), "layers": (1, 3, 4), "hidden_dim": (32, 64, 256)}


def panel_rows():
    """Invented measurements: every number is another."""
    rows = []
    for s, (sweep, values) in enumerate(VALUES.items()):
        for e, engine in enumerate(("vmap", "loop")):
            for m, method in enumerate(("maml", "es")):
                for k, value in enumerate(values):
                    seconds = 0.011 + 0.1 * s + 0.013 * m + 0.007 * k**2 + 0.05 * e
                    rows.append(
                        {
                            "sweep": sweep,
                            "method": method,
                            "engine": engine,
                            "inner_steps": 5,
                            "layers": 2,
                            "hidden_dim": 128,
                            "seconds": seconds,
                            "seconds_p10": 0.9 * seconds,
                            "seconds_p90": 1.2 * seconds,
                            "peak_bytes": 1e6 * (3 + 5 * s + 2 * m + k**2 + 40 * e),
                            "meta_batch_size": 32,
                            "num_perturbations": 32,
                            "device": "cpu",
                            sweep: value,
                        }
                    )
    return rows


def probe_panels(rows, engine="vmap"):
    from studies import profile_costs as study

    figure = study.cost_figure(rows, engine, {"device": "cpu"})
    figure.savefig("figure.png")
    panels, legends = [], [*figure.legends, *(ax.get_legend() for ax in figure.axes)]
    shown = [[text.get_text() for text in legend.get_texts()] for legend in legends if legend is not None]
    for ax in figure.axes:
        curves = {}
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            line = handle if hasattr(handle, "get_xydata") else handle[0]
            curves[label] = [[float(v) for v in point] for point in line.get_xydata()]
        box = ax.get_position()
        panels.append(
            {
                "x0": float(box.x0),
                "y0": float(box.y0),
                "xlabel": ax.get_xlabel(),
                "ylabel": ax.get_ylabel(),
                "scales": [ax.get_xscale(), ax.get_yscale()],
                "curves": curves,
                "bottom": float(ax.get_ylim()[0]),
            }
        )
    labels, axes = study.COST_TITLES, study.SWEEPS
    return {"panels": panels, "labels": labels, "axes": axes, "legends": shown}


def panels_of(student, engine="vmap", rows=None):
    """The panels [row][column] and the names of methods and axes."""
    rows = rows or panel_rows()
    found = student.run(probe_panels, rows=rows, engine=engine)
    panels = sorted(found["panels"], key=lambda p: (-round(p["y0"], 2), p["x0"]))
    expect(len(panels) == 6, f"{len(panels)} panels, not six")
    named = {label for legend in found["legends"] for label in legend}
    expect({found["labels"]["maml"], found["labels"]["es"]} <= named, "no legend names both methods")
    return rows, [panels[:3], panels[3:]], found["labels"], found["axes"]


@graded("3b", public=True)
def test_six_panels(student):
    """Two rows of three panels, one column for each sweep, both methods in each; runtime above, memory below."""
    _, panels, labels, axes = panels_of(student)
    for row in panels:
        for panel, sweep in zip(row, VALUES, strict=True):
            expect(panel["xlabel"] == axes[sweep], f"the x axis of a panel of {sweep} is not called {axes[sweep]!r}")
            names = set(panel["curves"])
            expect({labels["maml"], labels["es"]} <= names, "the curves are not labelled by their methods")
    for row, word in zip(panels, ("runtime", "memory"), strict=True):
        expect(word in row[0]["ylabel"].lower(), f"the first y axis of a row is not called after the {word}")


@graded("3b")
def test_curves_of_the_panels(student):
    """Milliseconds and megabytes over the values of the sweep, of the engine asked for."""
    for engine in ("vmap", "loop"):
        rows, panels, labels, _ = panels_of(student, engine)
        for line, (name, unit) in zip(panels, (("seconds", 1e3), ("peak_bytes", 1e-6)), strict=True):
            for panel, sweep in zip(line, VALUES, strict=True):
                for method in ("maml", "es"):
                    curve = [r for r in rows if (r["sweep"], r["method"], r["engine"]) == (sweep, method, engine)]
                    expected = torch.tensor([[r[sweep], r[name] * unit] for r in curve])
                    points = torch.tensor(panel["curves"].get(labels[method], []))
                    close(points, expected, f"the curve of {labels[method]} over {sweep}, {name}", 1e-5)


@graded("3b")
def test_scales_of_the_panels(student):
    """Hidden units, where costs grow as a power, on two logarithmic axes; the others on linear ones from zero."""
    _, panels, _, _ = panels_of(student)
    for row in panels:
        for panel, sweep in zip(row, VALUES, strict=True):
            wanted = "log" if sweep == "hidden_dim" else "linear"
            expect(panel["scales"] == [wanted] * 2, f"the axes of {sweep} are not {wanted}")
            expect(wanted == "log" or panel["bottom"] == 0, f"the y axis of {sweep} does not begin at zero")
