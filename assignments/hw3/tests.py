"""Graded tests of hw3: pre-processing, the cell, the gates and their update, training a learner by it, its gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from checks import close, expect, graded, shaped


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------- 1: pre-processing


def probe_preprocess(x):
    from fewshot.learners import lstm_rule

    return list(lstm_rule.preprocess(x))


@graded("1", public=True)
def test_preprocessing_by_hand(student):
    """1 becomes (0, 1), -e^5 (0.5, -1), e^-10 (-1, 1), e^-12 (-1, e^-2) and 0 (-1, 0)."""
    x = torch.tensor([1.0, -math.exp(5), 1.0001 * math.exp(-10), math.exp(-12), 0.0], dtype=torch.float64)
    found = student.run(probe_preprocess, x=x)
    expect(isinstance(found, list) and len(found) == 2, "not two tensors")
    close(found[0], torch.tensor([0.0, 0.5, -1.0, -1.0, -1.0]), "the size", 1e-4)
    close(found[1], torch.tensor([1.0, -1.0, 1.0, math.exp(-2), 0.0]), "the sign", 1e-4)


@graded("1")
def test_preprocessing(student):
    """Numbers of any size and sign, in any shape."""
    x = randn(4, 3, 50, seed=1).sign() * 10 ** (4 * randn(4, 3, 50, seed=2) - 4)
    size, sign = [], []
    for v in x.flatten().tolist():
        big = abs(v) >= math.exp(-10)
        size.append(math.log(abs(v)) / 10 if big else -1.0)
        sign.append(math.copysign(1, v) if big else math.exp(10) * v)
    found = student.run(probe_preprocess, x=x)
    close(found[0], torch.tensor(size).view(x.shape), "the size", 1e-5)
    close(found[1], torch.tensor(sign).view(x.shape), "the sign", 1e-5)


def probe_preprocess_gradient(x, directions):
    from fewshot.learners import lstm_rule

    x = x.clone().requires_grad_()
    value = sum((part * d).sum() for part, d in zip(lstm_rule.preprocess(x), directions, strict=True))
    return torch.autograd.grad(value, x)[0] if value.requires_grad else None


@graded("1")
def test_derivative_of_the_preprocessing(student):
    """Second order goes through it: 1 / (p x) of the size, e^p of a small sign; finite at zero."""
    x = torch.tensor([[[2.0, -0.3]], [[1e-6, -1e-7]], [[0.0, 4e-5]]], dtype=torch.float64)
    directions = [randn(*x.shape, seed=3), randn(*x.shape, seed=4)]
    big = x.abs() >= math.exp(-10)
    size = torch.where(big, 0.1 / torch.where(big, x, 1.0), 0.0)
    sign = torch.where(big, 0.0, math.exp(10))
    found = student.run(probe_preprocess_gradient, x=x, directions=directions)
    expect(found is not None, "the inputs have no derivative to the numbers")
    close(found[big], (size * directions[0])[big], "the derivative of the size", 1e-5)
    close(found[~big], (sign * directions[1])[~big], "the derivative of the sign", 1e-5)


# -------------------------------------------------------------------------------- 2a: the cell


def probe_cell(inputs, h, c, weight_ih, weight_hh, bias, u, v, constant_inputs):
    """New h and c; and the derivative of their products with u and v to everything."""
    from fewshot.learners import lstm_rule

    given = [t.clone().requires_grad_() for t in (inputs, h, c, weight_ih, weight_hh, bias)]
    if constant_inputs:
        given[0] = inputs.clone()
    new_h, new_c = lstm_rule.LSTMCell.apply(*given)
    value = (new_h * u).sum() + (new_c * v).sum()
    wanted = given[1:] if constant_inputs else given
    gradients = torch.autograd.grad(value, wanted, allow_unused=True)
    return {"h": new_h, "c": new_c, "gradients": list(gradients)}


def cell_inputs(R, n, H, W, seed):
    shapes = {
        "inputs": (R, n, W),
        "h": (R, H, W),
        "c": (R, H, W),
        "weight_ih": (4 * H, n),
        "weight_hh": (4 * H, H),
        "bias": (4 * H,),
        "u": (R, H, W),
        "v": (R, H, W),
    }
    return {name: randn(*shape, seed=seed + k) for k, (name, shape) in enumerate(shapes.items())}


def oracle_cell(p):
    """torch's own cell with every coordinate as a row of a batch."""
    R, _, W = p["inputs"].shape
    H = p["h"].shape[1]
    given = {k: t.clone().requires_grad_() for k, t in p.items() if k not in ("u", "v")}
    rows = lambda t: t.transpose(1, 2).reshape(R * W, -1)
    gates = torch.lstm_cell(
        rows(given["inputs"]),
        (rows(given["h"]), rows(given["c"])),
        given["weight_ih"],
        given["weight_hh"],
        given["bias"],
        torch.zeros(4 * H).double(),
    )
    new_h, new_c = (t.reshape(R, W, H).transpose(1, 2) for t in gates)
    gradients = torch.autograd.grad((new_h * p["u"]).sum() + (new_c * p["v"]).sum(), list(given.values()))
    return new_h.detach(), new_c.detach(), gradients


NAMES = ("the inputs", "h", "c", "weight_ih", "weight_hh", "the bias")


@graded("2a", public=True)
def test_a_cell_at_rest(student):
    """With all weights zero: gates of 1/2 and a candidate of 0, so that c is halved and h = tanh(c) / 2."""
    p = cell_inputs(1, 2, 3, 4, seed=1)
    p |= {name: torch.zeros_like(p[name]) for name in ("weight_ih", "weight_hh", "bias")}
    found = student.run(probe_cell, **p, constant_inputs=False)
    close(found["c"], p["c"] / 2, "the new c", 1e-6)
    close(found["h"], (p["c"] / 2).tanh() / 2, "the new h", 1e-6)


@graded("2a")
def test_cell(student):
    """The values of torch's own LSTM cell."""
    for seed, (R, n, H, W) in enumerate(((2, 4, 5, 3), (1, 1, 2, 7), (3, 4, 20, 2))):
        p = cell_inputs(R, n, H, W, seed=10 * seed)
        h, c, _ = oracle_cell(p)
        found = student.run(probe_cell, **p, constant_inputs=False)
        close(found["h"], h, "the new h", 1e-6)
        close(found["c"], c, "the new c", 1e-6)


@graded("2a")
def test_derivative_of_the_cell(student):
    """The derivative to everything, through h and through c; also where the inputs are constants."""
    for constant, seed in ((False, 30), (True, 40)):
        p = cell_inputs(2, 4, 5, 3, seed)
        _, _, gradients = oracle_cell(p)
        found = student.run(probe_cell, **p, constant_inputs=constant)["gradients"]
        for name, got, expected in zip(NAMES[constant:], found, gradients[constant:], strict=True):
            expect(got is not None, f"no derivative to {name}")
            close(got, expected, f"the derivative to {name}", 1e-6)


# ------------------------------------------------------------------- 2b: gates and the update


def probe_updates(parameters, grads, losses):
    """Updates by the rule with these parameters: theta and both gates after each, and derivatives of the last theta."""
    import meta_lstm

    rule = meta_lstm.MetaLSTM(parameters["theta0"].clone()).double()
    for name, p in rule.named_parameters():
        p.data.copy_(parameters[name])
    _, B, P = grads.shape
    theta, state = rule.start(B, torch.float64)
    wide = theta.shape[1]
    steps, grads = [], grads.clone().requires_grad_()
    for grad, loss in zip(grads, losses, strict=True):
        theta, state = rule(theta, F.pad(grad, (0, wide - P)), loss, state)
        steps.append([theta[:, :P], state.forget[:, :P], state.input[:, :P]])
    padding = theta[:, P:].abs().sum()
    learned = [*rule.parameters(), grads]
    gradients = torch.autograd.grad((theta[:, :P] ** 2).sum(), learned, allow_unused=True)
    names = [*(name for name, _ in rule.named_parameters()), "the gradients"]
    return {"steps": steps, "padding": padding, "gradients": dict(zip(names, gradients, strict=True))}


def rule_parameters(P, seed, hidden=20):
    shapes = {
        "weight_ih": (4 * hidden, 4),
        "weight_hh": (4 * hidden, hidden),
        "bias_ih": (4 * hidden,),
        "bias_hh": (4 * hidden,),
        "gate_weight": (2, hidden + 2),
        "gate_bias": (2,),
        "theta0": (P,),
    }
    return {name: 0.4 * randn(*shape, seed=seed + k) for k, (name, shape) in enumerate(shapes.items())}


def oracle_updates(p, grads, losses):
    """One task and one coordinate after the other's update, by torch's cell and eq. 2 of the paper."""
    T, B, P = grads.shape

    def inputs(x):
        big = x.abs() >= math.exp(-10)
        size = torch.where(big, x.abs().clamp(min=1e-30).log() / 10, torch.tensor(-1.0).double())
        return torch.stack([size, torch.where(big, x.sign(), math.exp(10) * x)], dim=-1)

    steps = [[] for _ in range(T)]
    for b in range(B):
        h = c = torch.zeros(P, 20).double()
        theta, forget, take = p["theta0"], torch.zeros(P).double(), torch.zeros(P).double()
        for t in range(T):
            x = torch.cat([inputs(grads[t, b]), inputs(losses[t, b]).expand(P, 2)], dim=1)
            h, c = torch.lstm_cell(x, (h, c), p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"])
            w, bias = p["gate_weight"], p["gate_bias"]
            forget, take = (
                (h @ w[k, :20] + w[k, 20] * theta + w[k, 21] * before + bias[k]).sigmoid()
                for k, before in ((0, forget), (1, take))
            )
            theta = forget * theta - take * grads[t, b]
            steps[t].append([theta, forget, take])
    return [[torch.stack([task[k] for task in step]) for k in range(3)] for step in steps]


@graded("2b", public=True)
def test_gates_that_do_nothing(student):
    """Forget gate near 1 and input gate near 0: theta stays. Both near 1: a gradient step of size 1."""
    P = 7
    grads, losses = randn(1, 2, P, seed=50), torch.tensor([[0.7, 1.1]]).double()
    for bias, rate in ((-40.0, 0.0), (40.0, 1.0)):
        p = rule_parameters(P, seed=51)
        p["gate_weight"], p["gate_bias"] = torch.zeros(2, 22).double(), torch.tensor([40.0, bias]).double()
        found = student.run(probe_updates, parameters=p, grads=grads, losses=losses)["steps"]
        close(found[0][0], p["theta0"] - rate * grads[0], f"theta with an input gate near {rate:g}", 1e-6)


@graded("2b")
def test_updates(student):
    """Gates and parameters after several updates."""
    for T, B, P, seed in ((1, 1, 5, 60), (3, 2, 9, 70)):
        p, grads, losses = rule_parameters(P, seed), randn(T, B, P, seed=seed + 20), randn(T, B, seed=seed + 21).exp()
        found = student.run(probe_updates, parameters=p, grads=grads, losses=losses)
        expected = oracle_updates(p, grads, losses)
        for t, (got, step) in enumerate(zip(found["steps"], expected, strict=True)):
            for name, a, b in zip(("theta", "the forget gate", "the input gate"), got, step, strict=True):
                close(a, b, f"{name} after update {t + 1}", 1e-6)
        expect(found["padding"] == 0, "the padding behind the parameters is no longer zero")


@graded("2b")
def test_derivative_of_the_updates(student):
    """The derivative of the last parameters to everything that the meta-learner learns."""
    p, grads, losses = rule_parameters(6, 80), randn(3, 2, 6, seed=90), randn(3, 2, seed=91).exp()
    found = student.run(probe_updates, parameters=p, grads=grads, losses=losses)["gradients"]
    p = {name: value.requires_grad_() for name, value in p.items()}
    grads = grads.requires_grad_()
    theta = oracle_updates(p, grads, losses)[-1][0]
    p["the gradients"] = grads
    for name, gradient in zip(p, torch.autograd.grad(theta.square().sum(), list(p.values())), strict=True):
        expect(found.get(name) is not None, f"no derivative to {name}")
        close(found[name], gradient, f"the derivative to {name}", 1e-5)


# ------------------------------------------------------------- 3: training a learner by a rule


def episodes(B, N, K, Q, seed):
    """Random pictures of B tasks in class order, support and query, float64."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.rand(B, N, 1, 1, 28, 28, generator=g)
    images = (0.5 * kinds + 0.5 * torch.rand(B, N, K + Q, 1, 28, 28, generator=g)).double()
    labels = lambda n: torch.arange(N).repeat_interleave(n).repeat(B, 1)
    return [images[:, :, :K].flatten(1, 2), labels(K), images[:, :, K:].flatten(1, 2), labels(Q)]


def make_rule(learner, rate):
    """A rule as simple as can be: gradient descent with a learned rate for all parameters.

    Its state counts the updates.
    """

    class Rule(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.theta0 = torch.nn.Parameter(learner.initial().double())
            self.rate = torch.nn.Parameter(torch.tensor(rate, dtype=torch.float64))

        def start(self, B, dtype):
            return self.theta0.expand(B, -1), 0

        def forward(self, theta, grad, loss, state):
            self.losses = getattr(self, "losses", 0) + loss.sum()
            return theta - self.rate * grad, state + 1

    return Rule()


def probe_train(support, labels, N, inner, second_order=False, tracked=True, first=None, calls=1):
    """What the training gives; `first`: it starts from twice the rule's parameters, and the state counts from there."""
    from fewshot.learners import side_by_side

    import meta_lstm

    learner = side_by_side.Learner(1, 28, N)
    rule = make_rule(learner, 0.3)
    watch = lambda losses, state: seen.append([losses.detach().clone(), state])
    for _ in range(calls):
        seen = []
        with torch.set_grad_enabled(tracked):
            start = () if first is None else (2 * rule.theta0.expand(len(labels), -1), first)
            theta, statistics = meta_lstm.train_learner(
                rule, learner, support, labels, meta_lstm.Inner(**inner), second_order, torch.float64, watch, start
            )
    result = {"theta0": rule.theta0, "theta": theta, "statistics": list(statistics), "seen": seen}
    if tracked:
        value = theta.square().sum() + (rule.losses if second_order else 0)
        result["gradients"] = list(torch.autograd.grad(value, [rule.theta0, rule.rate]))
    return result


def oracle_learner(theta, images, N, given=None):
    """Scores of one network with flat parameters, and mean and unbiased variance of the four batch norms."""
    shapes = []
    for i in range(4):
        shapes += [(32, 32 if i else 1, 3, 3), (32,), (32,), (32,)]
    shapes += [(N, 32), (N,)]
    parts = [p.view(s) for p, s in zip(theta.split([math.prod(s) for s in shapes]), shapes, strict=True)]
    x, statistics = images, []
    for i in range(4):
        weight, bias, gamma, beta = parts[4 * i : 4 * i + 4]
        x = F.conv2d(x, weight, bias, padding=1)
        source = x if given is None else x[:given]
        mean, var = source.mean(dim=(0, 2, 3)), source.var(dim=(0, 2, 3), correction=0)
        statistics.append((mean.detach(), source.var(dim=(0, 2, 3)).detach()))
        x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-3).sqrt()
        x = F.max_pool2d((x * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)).relu(), 2)
    return x.flatten(1) @ parts[-2].T + parts[-1], statistics


def oracle_train(theta0, rate, support, labels, N, inner, second_order):
    """Each task by itself: parameters [B, P], running averages, and the losses of every update [T][B]."""
    thetas, averages, losses = [], [], []
    for images, truth in zip(support, labels, strict=True):
        K, theta = len(truth) // N, theta0
        running = [[torch.zeros(32).double(), torch.ones(32).double()] for _ in range(4)]
        order = [n * K + k for k in range(K) for n in range(N)]
        batches = [order[i : i + inner["batch"]] for i in range(0, len(order), inner["batch"])] * inner["epochs"]
        mine = []
        for batch in batches:
            point = theta if second_order else theta.detach().requires_grad_()
            scores, statistics = oracle_learner(point, images[batch], N)
            loss = F.cross_entropy(scores, truth[batch])
            (gradient,) = torch.autograd.grad(loss, point, create_graph=second_order)
            theta = theta - rate * gradient
            for old, new in zip(running, statistics, strict=True):
                for k in range(2):
                    old[k] = (1 - inner["momentum"]) * old[k] + inner["momentum"] * new[k]
            mine.append(loss)
        thetas.append(theta)
        averages.append(running)
        losses.append(torch.stack(mine))
    return torch.stack(thetas), averages, torch.stack(losses, dim=1)


def check_training(student, B, N, K, inner, second_order, tracked=True, first=None, calls=1):
    support, labels, _, _ = episodes(B, N, K, 1, seed=100)
    how = {"second_order": second_order, "tracked": tracked, "first": first, "calls": calls}
    found = student.run(probe_train, support=support, labels=labels, N=N, inner=inner, **how)
    theta0 = found["theta0"].double().requires_grad_()
    rate = torch.tensor(0.3).double().requires_grad_()
    begin = theta0 if first is None else 2 * theta0
    theta, averages, losses = oracle_train(begin, rate, support, labels, N, inner, second_order)
    close(found["theta"], theta.detach(), "the trained parameters", 1e-6)
    for i in range(4):
        expected = torch.stack([torch.cat([task[i][k] for task in averages]) for k in range(2)])
        close(found["statistics"][i], expected, f"the running averages of batch norm {i}", 1e-6)
    expect(len(found["seen"]) == len(losses), "`watch` is not called once after each update")
    for t, (got, expected) in enumerate(zip(found["seen"], losses, strict=True)):
        close(got[0], expected.detach(), f"the losses that `watch` sees in update {t + 1}", 1e-6)
        expect(got[1] == (first or 0) + t + 1, "the rule's state is not the one after the update")
    if tracked:
        value = theta.square().sum() + (losses.sum() if second_order else 0)
        gradients = torch.autograd.grad(value, [theta0, rate])
        for name, got, expected in zip(("theta0", "the rule"), found["gradients"], gradients, strict=True):
            close(got, expected, f"the derivative to {name}", 1e-5)


@graded("3", public=True)
def test_training_lowers_the_loss(student):
    """Twelve updates on a support set: twelve losses, and the last is lower than the first."""
    support, labels, _, _ = episodes(2, 3, 2, 1, seed=101)
    inner = {"epochs": 12, "batch": 6, "momentum": 0.9}
    found = student.run(probe_train, support=support, labels=labels, N=3, inner=inner, tracked=False)
    expect(len(found["seen"]) == 12, "not one update for each epoch when all images fit into one batch")
    first, last = (shaped(found["seen"][t][0], (2,), "the losses") for t in (0, -1))
    expect((last < first).all(), "the loss of the support set does not fall")


@graded("3")
def test_training(student):
    """Batches of every class, epochs, running averages; gradients and losses are constants to the meta-learner."""
    check_training(student, 2, 2, 2, {"epochs": 2, "batch": 2, "momentum": 0.9}, second_order=False)
    check_training(student, 1, 3, 2, {"epochs": 2, "batch": 6, "momentum": 0.7}, second_order=False)


@graded("3")
def test_training_again(student):
    """A second call begins anew; a start that is handed in is where it begins."""
    inner = {"epochs": 2, "batch": 2, "momentum": 0.8}
    check_training(student, 2, 2, 1, inner, second_order=False, calls=2)
    check_training(student, 2, 2, 1, inner, second_order=False, first=7)


@graded("3")
def test_training_of_second_order(student):
    """With second_order gradients and losses are differentiated, too."""
    check_training(student, 2, 2, 2, {"epochs": 2, "batch": 2, "momentum": 0.9}, second_order=True)


@graded("3")
def test_training_without_graph(student):
    """It also works under torch.no_grad, where the evaluation calls it."""
    check_training(student, 2, 2, 1, {"epochs": 2, "batch": 2, "momentum": 0.9}, second_order=False, tracked=False)


# ----------------------------------------------------------------- 4: the losses of the queries


def probe_queries(episodes, N, inner, query_norm="batch", calls=1, second_order=False, first=None):
    """Losses and accuracies of the last call, and the gradients that the means of all calls have left."""
    from fewshot.learners import side_by_side

    import meta_lstm

    learner = side_by_side.Learner(1, 28, N)
    rule, B = make_rule(learner, 0.3), len(episodes[0])
    for _ in range(calls):
        start = () if first is None else (2 * rule.theta0.expand(B, -1), first)
        losses, right = meta_lstm.query_losses(
            rule, learner, episodes, meta_lstm.Inner(**inner), second_order, torch.float64, query_norm, start
        )
        if losses.requires_grad:
            losses.mean().backward()
    gradients = [rule.theta0.grad, rule.rate.grad]
    return {"losses": losses, "right": right, "theta0": rule.theta0, "gradients": gradients}


def check_queries(student, query_norm="batch", calls=1, second_order=False, first=None):
    B, N, inner = 3, 2, {"epochs": 2, "batch": 2, "momentum": 0.9}
    tasks = episodes(B, N, 1, 4, seed=110)
    turn = torch.randperm(N * 4, generator=torch.Generator().manual_seed(1))
    tasks[2], tasks[3] = tasks[2][:, turn], tasks[3][:, turn]
    tasks[3][0, :5] = 1 - tasks[3][0, :5]  # so that not all queries are right
    how = {"query_norm": query_norm, "calls": calls, "second_order": second_order, "first": first}
    found = student.run(probe_queries, episodes=tasks, N=N, inner=inner, **how)
    theta0, rate = found["theta0"].double().requires_grad_(), torch.tensor(0.3).double().requires_grad_()
    begin = theta0 if first is None else 2 * theta0
    theta, _, _ = oracle_train(begin, rate, tasks[0], tasks[1], N, inner, second_order)
    losses, right = [], []
    for b in range(B):
        if query_norm == "support":
            scores = oracle_learner(theta[b], torch.cat([tasks[0][b], tasks[2][b]]), N, given=N)[0][N:]
        else:
            scores = oracle_learner(theta[b], tasks[2][b], N)[0]
        losses.append(F.cross_entropy(scores, tasks[3][b]))
        right.append((scores.argmax(dim=1) == tasks[3][b]).double().mean())
    losses = torch.stack(losses)
    close(found["losses"], losses.detach(), "the loss of each task's queries", 1e-6)
    close(found["right"], torch.stack(right), "the accuracy of each task's queries", 1e-6)
    gradients = torch.autograd.grad(calls * losses.mean(), [theta0, rate])
    for name, got, expected in zip(("theta0", "the rule"), found["gradients"], gradients, strict=True):
        expect(got is not None, f"{name} has no gradient")
        close(got, expected, f"the gradient of {name}", 1e-5)


@graded("4", public=True)
def test_every_task_has_a_loss_of_its_own(student):
    """Three tasks, three losses and accuracies; other labels of one task's queries change that task alone."""
    tasks, inner = episodes(3, 2, 1, 3, seed=111), {"epochs": 1, "batch": 2, "momentum": 0.9}
    found = student.run(probe_queries, episodes=tasks, N=2, inner=inner)
    other = [*tasks[:3], tasks[3].clone()]
    other[3][1] = 1 - other[3][1]
    again = student.run(probe_queries, episodes=other, N=2, inner=inner)
    shaped(found["right"], (3,), "the accuracies")
    changed = (shaped(found["losses"], (3,), "the losses") - shaped(again["losses"], (3,), "the losses")).abs() > 1e-6
    expect(changed.tolist() == [False, True, False], "a loss is not that of its own task's queries alone")


@graded("4")
def test_queries(student):
    """Loss and accuracy of the queries, and the gradient of their mean; a second call adds to what was there."""
    check_queries(student)
    check_queries(student, calls=2)


@graded("4")
def test_queries_normalised_by_the_support_set(student):
    """With query_norm="support" the support set normalises the queries, with a gradient of its statistics."""
    check_queries(student, query_norm="support")


@graded("4")
def test_queries_after_a_start_of_ones_own(student):
    """`start` is handed on to the training."""
    check_queries(student, first=3)


@graded("4")
def test_queries_of_second_order(student):
    """second_order is handed on."""
    check_queries(student, second_order=True)
