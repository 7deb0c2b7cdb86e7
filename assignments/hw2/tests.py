"""Graded tests of hw2: prototypes, distances, the loss of an episode; MAML's inner loop and outer loss, Proto-MAML."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from checks import close, expect, graded, shaped


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- 1a: prototypes


def probe_prototypes(support, num_classes):
    from fewshot.learners import conv4

    return conv4.prototypes(support, num_classes)


@graded("1a", public=True)
def test_prototypes_by_hand(student):
    """Two classes of two examples."""
    support = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [-1.0, 5.0], [-3.0, 5.0]]])
    found = student.run(probe_prototypes, support=support, num_classes=2)
    close(found, torch.tensor([[[2.0, 1.0], [-2.0, 5.0]]]), "the prototypes")


@graded("1a")
def test_prototypes(student):
    """The mean of each class, in every task, for any number of classes and examples."""
    for B, N, K, D in ((2, 3, 5, 4), (1, 4, 2, 3), (3, 2, 1, 6), (2, 3, 3, 3)):
        support = randn(B, N * K, D, seed=B + N)
        expected = torch.zeros(B, N, D, dtype=torch.float64)
        for i in range(N * K):
            expected[:, i // K] += support[:, i] / K
        close(student.run(probe_prototypes, support=support, num_classes=N), expected, f"{N} classes, {K} examples")


def probe_prototypes_gradient(support, num_classes, direction):
    from fewshot.learners import conv4

    support = support.clone().requires_grad_()
    value = (conv4.prototypes(support, num_classes) * direction).sum()
    return torch.autograd.grad(value, support)[0] if value.requires_grad else None


@graded("1a")
def test_gradient_of_the_prototypes(student):
    """Every example has its share of the derivative."""
    for B, N, K, D in ((2, 3, 4, 5), (1, 2, 1, 3)):
        support, direction = randn(B, N * K, D, seed=1), randn(B, N, D, seed=2)
        found = student.run(probe_prototypes_gradient, support=support, num_classes=N, direction=direction)
        expect(found is not None, "the prototypes have no derivative to the support set")
        expected = direction[:, :, None].expand(B, N, K, D).reshape(B, N * K, D) / K
        close(found, expected, "the derivative to the support set", 1e-6)


# ---------------------------------------------------------------------------- 1b: distances


def probe_distances(points, centres):
    import protonet

    return protonet.squared_distances(points, centres)


@graded("1b", public=True)
def test_distances_by_hand(student):
    """From (0, 0) to (3, 4) it is 25."""
    points, centres = torch.tensor([[[0.0, 0.0], [3.0, 3.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.0, 3.0]]])
    found = student.run(probe_distances, points=points, centres=centres)
    close(found, torch.tensor([[[25.0, 0.0, 9.0], [1.0, 18.0, 9.0]]]), "the squared distances")


@graded("1b")
def test_distances(student):
    """Every point of a task to every centre of the same task."""
    for B, M, N, D in ((2, 7, 3, 5), (1, 2, 4, 64), (3, 4, 4, 1)):
        points, centres = randn(B, M, D, seed=1), randn(B, N, D, seed=2)
        expected = torch.zeros(B, M, N, dtype=torch.float64)
        for b in range(B):
            for m in range(M):
                for n in range(N):
                    expected[b, m, n] = sum((points[b, m, d] - centres[b, n, d]) ** 2 for d in range(D))
        close(student.run(probe_distances, points=points, centres=centres), expected, "the squared distances", 1e-8)


def probe_distances_gradient(points, centres, direction):
    import protonet

    given = [points.clone().requires_grad_(), centres.clone().requires_grad_()]
    value = (protonet.squared_distances(*given) * direction).sum()
    return list(torch.autograd.grad(value, given, allow_unused=True)) if value.requires_grad else [None, None]


@graded("1b")
def test_gradient_of_the_distances(student):
    """The derivative to points and centres, also where a point lies on a centre."""
    points, centres, direction = randn(2, 5, 4, seed=3), randn(2, 3, 4, seed=4), randn(2, 5, 3, seed=5)
    points[0, 1] = centres[0, 2]
    difference = 2 * direction[..., None] * (points[:, :, None] - centres[:, None])
    found = student.run(probe_distances_gradient, points=points, centres=centres, direction=direction)
    names = ("points", "centres")
    for name, got, expected in zip(names, found, (difference.sum(dim=2), -difference.sum(dim=1)), strict=True):
        expect(got is not None, f"the distances have no derivative to the {name}")
        close(got, expected, f"the derivative to the {name}", 1e-6)


# ----------------------------------------------------------------------------- 1c: the loss


def probe_episode(episode, num_classes):
    from fewshot.learners import conv4

    import protonet

    torch.manual_seed(1)
    encoder = conv4.Conv4(1, 6, 28)
    start = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    loss = protonet.episode_loss(encoder, episode, num_classes, torch.float32)
    loss.backward()
    gradient = {name: p.grad for name, p in encoder.named_parameters()}
    return {"loss": loss, "parameters": start, "gradient": gradient, "mean0": encoder.mean0, "var0": encoder.var0}


def episode(B, N, K, Q, seed):
    """Random pictures of B tasks, the queries shuffled."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.rand(B, N, 1, 1, 28, 28, generator=g)  # pictures of a class resemble each other
    images = 0.6 * kinds + 0.4 * torch.rand(B, N, K + Q, 1, 28, 28, generator=g)
    support = images[:, :, :K].flatten(1, 2)
    labels = torch.arange(N).repeat_interleave(K).repeat(B, 1)
    order = torch.rand(B, N * Q, generator=g).argsort(dim=1)
    query = torch.stack([q[o] for q, o in zip(images[:, :, K:].flatten(1, 2), order, strict=True)])
    return [support, labels, query, order // Q]


def oracle_network(p, images, strided=False, given=None, sphere=False):
    """Conv4 and, where p has one, its linear head; batch norm by the images `given`, or by `images` themselves."""
    everything = images if given is None else torch.cat([given, images])
    x = everything
    for i in range(4):
        x = F.conv2d(x, p[f"weight{i}"], stride=2 if strided else 1, padding=1)
        source = x if given is None else x[: len(given)]
        mean = source.mean(dim=(0, 2, 3), keepdim=True)
        var = (source - mean).square().mean(dim=(0, 2, 3), keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt() * p[f"gamma{i}"].view(1, -1, 1, 1) + p[f"beta{i}"].view(1, -1, 1, 1)
        x = x.relu()
        x = x if strided else F.max_pool2d(x, 2)
    features = x.mean(dim=(2, 3)) if strided else x.flatten(1)
    if sphere:
        features = features - features[: len(everything) if given is None else len(given)].mean(dim=0)
        features = features / (features.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    features = features[len(everything) - len(images) :]
    return features @ p["head_weight"].T + p["head_bias"] if "head_weight" in p else features


def oracle_episode_loss(p, tasks, N):
    support, support_labels, query, query_labels = tasks
    B, n = support_labels.shape
    images = torch.cat([support.flatten(0, 1), query.flatten(0, 1)]).double()
    features = oracle_network(p, images)
    features = features / features.shape[1] ** 0.25
    of_support, of_query = features[: B * n].view(B, n, -1), features[B * n :].view(B, query.shape[1], -1)

    def cross_entropy(known, labels, asked, truth):
        losses = []
        for b in range(B):
            for i in range(asked.shape[1]):
                centres = [known[b][labels[b] == c].mean(dim=0) for c in range(N)]
                scores = torch.stack([-(asked[b, i] - c).square().sum() for c in centres])
                losses.append(scores.logsumexp(0) - scores[truth[b, i]])
        return torch.stack(losses).mean()

    loss = cross_entropy(of_support, support_labels, of_query, query_labels)
    if support.shape == query.shape:
        loss = (loss + cross_entropy(of_query, query_labels, of_support, support_labels)) / 2
    return loss


@graded("1c", public=True)
def test_loss_does_not_know_the_order_of_the_queries(student):
    """Queries in another order, with their labels, have the same loss; with other labels a larger one."""
    tasks = episode(2, 3, 2, 2, seed=1)
    loss = shaped(student.run(probe_episode, episode=tasks, num_classes=3)["loss"], (), "the loss")
    turned = [*tasks[:2], tasks[2].flip(1), tasks[3].flip(1)]
    close(student.run(probe_episode, episode=turned, num_classes=3)["loss"], loss, "the loss of reordered queries")
    wrong = [*tasks[:3], (tasks[3] + 1) % 3]
    expect(student.run(probe_episode, episode=wrong, num_classes=3)["loss"] > loss, "wrong labels have no larger loss")


@graded("1c")
def test_episode_loss(student):
    """The loss and its gradient; with as many queries as support images both change places, too."""
    for B, N, K, Q in ((2, 3, 2, 3), (2, 4, 1, 1), (1, 2, 2, 2)):
        tasks = episode(B, N, K, Q, seed=2)
        found = student.run(probe_episode, episode=tasks, num_classes=N)
        p = {name: value.double().requires_grad_() for name, value in found["parameters"].items()}
        expected = oracle_episode_loss(p, tasks, N)
        close(found["loss"], expected.detach(), f"the loss, {K} support and {Q} query images", 1e-3)
        gradients = torch.autograd.grad(expected, list(p.values()))
        for name, gradient in zip(p, gradients, strict=True):
            close(found["gradient"][name], gradient, f"the gradient of {name}", 1e-2)


@graded("1c")
def test_running_averages_of_the_episode(student):
    """Batch norm sees all images of the meta-batch in one call and moves its averages by a tenth."""
    tasks = episode(3, 3, 2, 3, seed=3)
    found = student.run(probe_episode, episode=tasks, num_classes=3)
    images = torch.cat([tasks[0].flatten(0, 1), tasks[2].flatten(0, 1)]).double()
    x = F.conv2d(images, found["parameters"]["weight0"].double(), padding=1)
    close(found["mean0"], 0.1 * x.mean(dim=(0, 2, 3)), "the running mean", 1e-3)
    close(found["var0"], 0.9 + 0.1 * x.var(dim=(0, 2, 3)), "the running variance", 1e-3)


# ------------------------------------------------------------------ 2a: MAML's inner loop

WIDTH = 5


def weights(N, seed, head=True):
    """A small strided Conv4 and its head, float64."""
    p = {}
    for i in range(4):
        p[f"weight{i}"] = 0.4 * randn(WIDTH, WIDTH if i else 1, 3, 3, seed=seed + i)
        p[f"gamma{i}"], p[f"beta{i}"] = (
            1 + 0.1 * randn(WIDTH, seed=seed + 10 + i),
            0.3 * randn(WIDTH, seed=seed + 20 + i),
        )
    if head:
        p["head_weight"], p["head_bias"] = 0.5 * randn(N, WIDTH, seed=seed + 30), 0.2 * randn(N, seed=seed + 31)
    return p


def rates(steps):
    """A different rate for every tensor and every step."""
    names = [f"{kind}{i}" for i in range(4) for kind in ("weight", "gamma", "beta")] + ["head_weight", "head_bias"]
    return [
        {name: torch.tensor(0.1 + 0.02 * k + 0.15 * step).double() for k, name in enumerate(names)}
        for step in range(steps)
    ]


def probe_adapt(theta, step_sizes, support, labels, options, direction, tracked=True):
    """The parameters along the way, and the derivative of the last ones times `direction` to the first ones."""
    import maml

    theta = {name: p.clone().requires_grad_() for name, p in theta.items()}
    s = maml.Setting(**{**options, "dtype": torch.float64})
    if not tracked:
        with torch.no_grad():
            return {"path": maml.inner_loop(theta, step_sizes, support, labels, s)}
    step_sizes = [{name: r.clone().requires_grad_() for name, r in sizes.items()} for sizes in step_sizes]
    path = maml.inner_loop(theta, step_sizes, support, labels, s)
    value = sum((path[-1][name] * d).sum() for name, d in direction.items())
    learned = [*theta.values(), *(r for sizes in step_sizes for r in sizes.values())]
    gradient = torch.autograd.grad(value, learned, allow_unused=True)
    of_rates = list(gradient[len(theta) :])
    return {"path": path, "gradient": dict(zip(theta, gradient, strict=False)), "of_rates": of_rates}


def oracle_adapt(theta, step_sizes, support, labels, options):
    """Inner steps by autograd, in plain steps."""
    p, N = dict(theta), options["num_classes"]
    how = {"strided": options.get("strided", True), "sphere": options.get("sphere", False)}
    if options.get("head") == "proto":
        features = oracle_network(p, support, **how)
        centres = torch.stack([features[labels == n].mean(dim=0) for n in range(N)])
        p = {**p, "head_weight": 2 * centres, "head_bias": -centres.square().sum(dim=1)}
    path = [dict(p)]
    for sizes in step_sizes:
        p = {name: value.clone() for name, value in p.items()}  # each tensor's gradient with the others held fixed
        loss = F.cross_entropy(oracle_network(p, support, **how), labels)
        moving = [n for n in p if n.startswith("head") or not options.get("freeze_body")]
        first_order = options.get("first_order", False)
        gradients = torch.autograd.grad(loss, [p[n] for n in moving], create_graph=not first_order, retain_graph=True)
        for name, gradient in zip(moving, gradients, strict=True):
            p[name] = p[name] - sizes[name] * (gradient.detach() if first_order else gradient)
        path.append(dict(p))
    return path


def check_adapt(student, options, steps, head=True, derivative=True):
    N = options["num_classes"]
    support, labels, _, _ = (t[0] for t in episode(1, N, 2, 1, seed=4))
    support, theta, sizes = support.double(), weights(N, 5, head), rates(steps)
    direction = {name: randn(*p.shape, seed=60) for name, p in weights(N, 5).items()}
    found = student.run(
        probe_adapt, theta=theta, step_sizes=sizes, support=support, labels=labels, options=options, direction=direction
    )
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    sizes = [{name: r.requires_grad_() for name, r in step.items()} for step in sizes]
    path = oracle_adapt(theta, sizes, support, labels, options)
    expect(
        isinstance(found["path"], list) and len(found["path"]) == steps + 1,
        "not one set of parameters before and after every step",
    )
    for i, (got, expected) in enumerate(zip(found["path"], path, strict=True)):
        expect(set(got) == set(expected), f"after {i} steps some parameters are missing, or there are others")
        for name, value in expected.items():
            close(got[name], value.detach(), f"{name} after {i} steps", 1e-6)
    if derivative:
        value = sum((path[-1][name] * d).sum() for name, d in direction.items())
        for name, gradient in zip(
            theta, torch.autograd.grad(value, list(theta.values()), retain_graph=True), strict=True
        ):
            got = found["gradient"][name]
            expect(got is not None, f"the result does not depend on the initial {name}")
            close(got, gradient, f"the derivative to the initial {name}", 1e-6)
        compare_rates(found["of_rates"], value, sizes)


def compare_rates(found, value, step_sizes):
    """The derivatives to the rates of every step and tensor, which can be learned."""
    names = [f"{name} in step {k + 1}" for k, sizes in enumerate(step_sizes) for name in sizes]
    rates = [r for sizes in step_sizes for r in sizes.values()]
    for name, got, expected in zip(names, found, torch.autograd.grad(value, rates, allow_unused=True), strict=True):
        if expected is not None:
            expect(got is not None, f"the result does not depend on the rate of {name}")
            close(got, expected, f"the derivative to the rate of {name}", 1e-5)


@graded("2a", public=True)
def test_no_step_changes_nothing_and_one_step_goes_down(student):
    """Before any step the parameters are theta; a small step lowers the support loss."""
    support, labels, _, _ = (t[0] for t in episode(1, 3, 2, 1, seed=6))
    theta, options = weights(3, 7), {"num_classes": 3}
    sizes = [{name: torch.tensor(0.01).double() for name in theta}]
    inputs = {"support": support.double(), "labels": labels, "options": options, "tracked": False, "direction": {}}
    path = student.run(probe_adapt, theta=theta, step_sizes=[], **inputs)["path"]
    expect(len(path) == 1, "without steps there is one set of parameters, the initial one")
    close(path[0]["head_weight"], theta["head_weight"], "the initial head")
    path = student.run(probe_adapt, theta=theta, step_sizes=sizes, **inputs)["path"]
    expect(len(path) == 2, "with one step there are two sets of parameters")
    close(path[0]["weight2"], theta["weight2"], "the initial parameters")
    for name in ("weight0", "gamma3", "head_bias"):
        expect((path[1][name] - theta[name]).abs().max() > 0, f"{name} has not moved")


@graded("2a")
def test_inner_loop(student):
    """Every step starts where the last one ended, with its own rates; the derivative goes through all of them."""
    check_adapt(student, {"num_classes": 3}, steps=1)
    check_adapt(student, {"num_classes": 2}, steps=3)


@graded("2a")
def test_first_order(student):
    """With first_order the gradients of the steps are constants."""
    check_adapt(student, {"num_classes": 3, "first_order": True}, steps=2)


@graded("2a")
def test_frozen_body(student):
    """With freeze_body the head alone moves (ANIL)."""
    check_adapt(student, {"num_classes": 3, "freeze_body": True}, steps=2)


@graded("2a")
def test_head_of_prototypes(student):
    """Proto-MAML starts from the head of the prototypes; the derivative goes through it."""
    check_adapt(student, {"num_classes": 3, "head": "proto"}, steps=2, head=False)
    check_adapt(student, {"num_classes": 3, "head": "proto", "first_order": True}, steps=2, head=False)


@graded("2a")
def test_modes_of_the_inner_loop(student):
    """batch_norm, sphere and the pooled encoder are modes of `classify` and `embed`, which get s as it is."""
    check_adapt(student, {"num_classes": 3, "batch_norm": "support"}, steps=1)
    check_adapt(student, {"num_classes": 3, "sphere": True}, steps=1)
    check_adapt(student, {"num_classes": 2, "head": "proto", "batch_norm": "support", "sphere": True}, 1, head=False)
    check_adapt(student, {"num_classes": 2, "strided": False}, steps=1)


@graded("2a")
def test_inner_loop_without_graph(student):
    """It also works under torch.no_grad, where the evaluation calls it."""
    support, labels, _, _ = (t[0] for t in episode(1, 3, 2, 1, seed=8))
    theta, sizes, options = weights(3, 9), rates(2), {"num_classes": 3, "first_order": True}
    found = student.run(
        probe_adapt,
        theta=theta,
        step_sizes=sizes,
        support=support.double(),
        labels=labels,
        options=options,
        direction={},
        tracked=False,
    )
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    path = oracle_adapt(theta, sizes, support.double(), labels, options)
    for name in theta:
        close(found["path"][-1][name], path[-1][name].detach(), f"{name} after two steps", 1e-6)


# ---------------------------------------------------------------------- 2b: the outer loss


def probe_task_loss(theta, step_sizes, task, options, weights):
    import maml

    theta = {name: p.clone().requires_grad_() for name, p in theta.items()}
    s = maml.Setting(**{**options, "dtype": torch.float64})
    step_sizes = [{name: r.clone().requires_grad_() for name, r in sizes.items()} for sizes in step_sizes]
    loss = maml.multi_step_loss(theta, step_sizes, *task, s, weights)
    plain = maml.task_loss(theta, step_sizes, *task, s) if weights == [1.0] else None
    learned = [*theta.values(), *(r for sizes in step_sizes for r in sizes.values())]
    gradient = torch.autograd.grad(loss, learned, allow_unused=True)
    of_rates = list(gradient[len(theta) :])
    found = {"loss": loss, "gradient": dict(zip(theta, gradient, strict=False)), "of_rates": of_rates}
    if plain is None:
        return found
    gradient = torch.autograd.grad(plain, list(theta.values()), allow_unused=True)
    return found | {"plain": plain, "plain_gradient": dict(zip(theta, gradient, strict=True))}


def check_task_loss(student, options, steps, shares):
    N = options["num_classes"]
    task = [t[0] for t in episode(1, N, 2, 3, seed=10)]
    task = [task[0].double(), task[1], task[2].double(), task[3]]
    theta, sizes = weights(N, 11, options.get("head", "linear") == "linear"), rates(steps)
    found = student.run(probe_task_loss, theta=theta, step_sizes=sizes, task=task, options=options, weights=shares)
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    sizes = [{name: r.requires_grad_() for name, r in step.items()} for step in sizes]
    path = oracle_adapt(theta, sizes, task[0], task[1], options)
    given = task[0] if options.get("batch_norm") == "support" else None
    expected = 0.0
    for share, p in zip(shares, path[len(path) - len(shares) :], strict=True):
        scores = oracle_network(p, task[2], strided=True, given=given, sphere=options.get("sphere", False))
        expected = expected + share * F.cross_entropy(scores, task[3])
    close(found["loss"], expected.detach(), "the loss of the queries", 1e-6)
    gradients = torch.autograd.grad(expected, list(theta.values()), retain_graph=True)
    for name, gradient in zip(theta, gradients, strict=True):
        got = found["gradient"][name]
        expect(got is not None, f"the loss does not depend on the initial {name}")
        close(got, gradient, f"the gradient of {name}", 1e-5)
    compare_rates(found["of_rates"], expected, sizes)
    if shares == [1.0]:
        close(found["plain"], expected.detach(), "task_loss: the loss of the queries", 1e-6)
        for name, gradient in zip(theta, gradients, strict=True):
            got = found["plain_gradient"][name]
            expect(got is not None, f"task_loss does not depend on the initial {name}")
            close(got, gradient, f"task_loss: the gradient of {name}", 1e-5)


@graded("2b", public=True)
def test_the_outer_loss_sees_the_queries(student):
    """Other labels of the queries change the loss, and the loss is a number."""
    task = [t[0] for t in episode(1, 3, 2, 3, seed=12)]
    task = [task[0].double(), task[1], task[2].double(), task[3]]
    inputs = {"theta": weights(3, 13), "step_sizes": rates(1), "options": {"num_classes": 3}, "weights": [1.0]}
    loss = shaped(student.run(probe_task_loss, task=task, **inputs)["loss"], (), "the loss")
    other = [*task[:3], (task[3] + 1) % 3]
    again = shaped(student.run(probe_task_loss, task=other, **inputs)["loss"], (), "the loss")
    expect((again - loss).abs() > 1e-3, "the labels of the queries have no influence")
    other = [*task[:2], 1 - task[2], task[3]]
    again = shaped(student.run(probe_task_loss, task=other, **inputs)["loss"], (), "the loss")
    expect((again - loss).abs() > 1e-4, "the queries have no influence")


@graded("2b")
def test_outer_loss(student):
    """The loss of the queries after the inner loop, and its exact gradient."""
    check_task_loss(student, {"num_classes": 3}, steps=2, shares=[1.0])


@graded("2b")
def test_outer_loss_normalised_by_the_support_set(student):
    """With batch_norm="support" the support set normalises the queries."""
    check_task_loss(student, {"num_classes": 2, "batch_norm": "support"}, steps=1, shares=[1.0])


@graded("2b")
def test_modes_of_the_outer_loss(student):
    """The modes of s are those of the inner loop and of the queries."""
    check_task_loss(student, {"num_classes": 3, "sphere": True}, steps=1, shares=[1.0])
    check_task_loss(student, {"num_classes": 3, "first_order": True}, steps=2, shares=[1.0])
    check_task_loss(student, {"num_classes": 3, "head": "proto"}, steps=1, shares=[1.0])


@graded("2b")
def test_multi_step_loss(student):
    """Several weights are those of the losses after the last steps, in order."""
    check_task_loss(student, {"num_classes": 3}, steps=3, shares=[0.5, 0.3, 0.2])


# ------------------------------------------------------------------- 3: Proto-MAML's head


def probe_head(support, options):
    import maml

    support = support.clone().requires_grad_()
    make = maml.one_step_head if options["head"] == "one_step" else maml.proto_head
    head = make(support, options["num_classes"])
    value = sum(p.square().sum() for p in head.values())
    return {**head, "gradient": torch.autograd.grad(value, support)[0] if value.requires_grad else None}


@graded("3", public=True)
def test_head_orders_classes_as_distances_do(student):
    """Its scores and minus the squared distances to the prototypes differ by the same number for all classes."""
    support, queries = randn(6, 4, seed=14), randn(5, 4, seed=15)
    head = student.run(probe_head, support=support, options={"num_classes": 3, "head": "proto"})
    weight, bias = shaped(head["head_weight"], (3, 4), "the weights"), shaped(head["head_bias"], (3,), "the biases")
    scores = queries @ weight.T + bias
    centres = support.view(3, 2, 4).sum(dim=1) / 2
    difference = scores + torch.cdist(queries, centres).square()
    expect((difference - difference[:, :1]).abs().max() < 1e-4, "the scores are not those of the distances")


def in_order(found):
    """What uses the head unpacks its values."""
    expect(list(found)[:2] == ["head_weight", "head_bias"], "not head_weight and head_bias, in this order")


@graded("3")
def test_head(student):
    """w = 2 c and b = -||c||^2, with a derivative to the features."""
    for N, K in ((3, 2), (4, 1), (2, 5)):
        support = randn(N * K, 6, seed=16).requires_grad_()
        centres = torch.stack([support[n * K : (n + 1) * K].mean(dim=0) for n in range(N)])
        weight, bias = 2 * centres, -centres.square().sum(dim=1)
        (gradient,) = torch.autograd.grad(weight.square().sum() + bias.square().sum(), support)
        found = student.run(probe_head, support=support.detach(), options={"num_classes": N, "head": "proto"})
        in_order(found)
        close(found["head_weight"], weight.detach(), "the weights", 1e-6)
        close(found["head_bias"], bias.detach(), "the biases", 1e-6)
        expect(found["gradient"] is not None, "the head has no derivative to the features")
        close(found["gradient"], gradient, "the derivative to the features", 1e-6)


@graded("3")
def test_head_of_the_warmup(student):
    """With head="one_step" w = (c - mean of all c) / sqrt(D) and b = 0."""
    support = randn(6, 9, seed=17)
    centres = support.view(3, 2, 9).mean(dim=1)
    found = student.run(probe_head, support=support, options={"num_classes": 3, "head": "one_step"})
    in_order(found)
    close(found["head_weight"], (centres - centres.mean(dim=0)) / 3, "the weights", 1e-6)
    expect(shaped(found["head_bias"], (3,), "the biases").abs().max() == 0, "the biases are not zero")
    support = support.requires_grad_()
    centres = support.view(3, 2, 9).mean(dim=1)
    (gradient,) = torch.autograd.grad(((centres - centres.mean(dim=0)) / 3).square().sum(), support)
    expect(found["gradient"] is not None, "the head has no derivative to the features")
    close(found["gradient"], gradient, "the derivative to the features", 1e-6)
