"""Graded tests of hw1: the episodes, the network with memory, its loss, its measurement, and a training."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from checks import close, expect, graded, same, shaped
from torch import nn

# ------------------------------------------------------------- 1a: drawing without replacement


def probe_draw(rows, n, k, seed, allowed=None):
    from fewshot.tasks import episodes

    return episodes.draw_distinct(rows, n, k, torch.Generator().manual_seed(seed), allowed)


def uniform(drawn, outcomes, what):
    """Every row of `drawn` [rows, k] is one of the equally likely `outcomes`: five standard deviations."""
    counts = {outcome: 0 for outcome in outcomes}
    for row in drawn.long().tolist():
        expect(tuple(row) in counts, f"{what}: a row that is no choice without repetition")
        counts[tuple(row)] += 1
    mean = len(drawn) / len(outcomes)
    sigma = math.sqrt(mean * (1 - 1 / len(outcomes)))
    worst = max(abs(count - mean) for count in counts.values())
    expect(worst <= 5 * sigma, f"{what}: not every ordered choice is equally likely")


@graded("1a", public=True)
def test_draws_are_distinct(student):
    """Each row holds k different whole numbers below n."""
    for rows, n, k in ((500, 6, 6), (2000, 100, 5), (3, 1, 1)):
        drawn = shaped(student.run(probe_draw, rows=rows, n=n, k=k, seed=1), (rows, k), "the draws")
        expect(((drawn >= 0) & (drawn < n) & (drawn == drawn.round())).all(), "a number is not in 0 to n - 1")
        ordered = drawn.sort(dim=1).values
        expect((ordered[:, 1:] != ordered[:, :-1]).all(), "a row holds a number twice")


@graded("1a")
def test_draws_are_uniform(student):
    """Every ordered choice is equally likely."""
    for n, k in ((4, 2), (3, 3), (12, 2), (5, 1)):
        drawn = shaped(student.run(probe_draw, rows=24000, n=n, k=k, seed=2), (24000, k), "the draws")
        uniform(drawn, list(itertools.permutations(range(n), k)), f"{k} of {n}")


@graded("1a")
def test_draws_keep_to_what_is_allowed(student):
    """`allowed` restricts each row, and the choice among what it allows is uniform."""
    allowed = torch.tensor([[True, False, True, True, False, True], [False, True, False, True, True, True]])
    drawn = student.run(probe_draw, rows=16000, n=6, k=2, seed=3, allowed=allowed.repeat(8000, 1))
    drawn = shaped(drawn, (16000, 2), "the draws")
    for row, numbers in ((0, (0, 2, 3, 5)), (1, (1, 3, 4, 5))):
        uniform(drawn[row::2], list(itertools.permutations(numbers, 2)), "with `allowed`")


@graded("1a")
def test_draws_come_from_the_generator(student):
    """The generator alone decides: the same seed draws the same, another seed something else."""
    once, again, other = (student.run(probe_draw, rows=200, n=50, k=4, seed=seed) for seed in (4, 4, 5))
    same(again, once, "the draws of the same seed")
    expect(not torch.equal(once, other), "another seed draws the same")


def probe_draw_twice(rows, n, k):
    """Two draws from one generator, and one from a generator of the same seed that was used before."""
    from fewshot.tasks import episodes

    first, used = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
    torch.rand(5, generator=used)
    return [episodes.draw_distinct(rows, n, k, g) for g in (first, first, used)]


@graded("1a")
def test_every_draw_is_another(student):
    """What the generator has given is not given again."""
    found = [shaped(d, (200, 4), "the draws") for d in student.run(probe_draw_twice, rows=200, n=50, k=4)]
    expect(not torch.equal(found[0], found[1]), "the second draw from a generator is the first one again")
    expect(not torch.equal(found[0], found[2]), "a generator that was used before draws as a new one")


# -------------------------------------------------------------------- 1b: episodes as rows


def known(counts):
    """A dataset whose images say what they are: pixel 0 is the class, pixel 1 the drawing, in 255ths."""
    from fewshot.tasks import splits

    images = np.zeros((sum(counts), 1, 28, 28), np.uint8)
    images[:, 0, 0, 0] = np.repeat(np.arange(len(counts)), counts)
    images[:, 0, 0, 1] = np.concatenate([np.arange(n) for n in counts])
    everything = np.arange(len(counts))
    values = {
        "name": "folder",
        "images": images,
        "counts": np.array(counts),
        "source": "a test",
        "digest": "0" * 64,
        "names": [f"alphabet{c // 10}/character{c:03d}" for c in range(len(counts))],
        "splits": {"train": everything, "val": everything, "test": everything},
    }
    return splits.Dataset(**{name: values.get(name) for name in splits.Dataset._fields})


def probe_rows(N, K, B, seed, batch_size=None):
    from fewshot.tasks import episodes

    sampler = episodes.EpisodeSampler(known([20] * 30), "train", N, K, 1, B, seed)
    images, labels = sampler.sample_rows(batch_size)
    return {"image_shape": list(images.shape), "marks": images[..., :2] * 255, "most": images.max(), "labels": labels}


def rows_of(student, N, K, B, seed, batch_size=None):
    """Classes, drawings and labels, each [B, K+1, N], after checking the shapes."""
    found = student.run(probe_rows, N=N, K=K, B=B, seed=seed, batch_size=batch_size)
    B = batch_size or B
    expect(found["image_shape"] == [B, K + 1, N, 784], f"the images have shape {found['image_shape']}")
    expect(float(found["most"]) <= 1, "the images are not in 0 to 1")
    labels = shaped(found["labels"], (B, K + 1, N, N), "the labels")
    one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(-1) == 1).all()
    expect(one_hot, "the labels are not one-hot")
    marks = shaped(found["marks"], (B, K + 1, N, 2), "the images").round()
    return marks[..., 0], marks[..., 1], labels.argmax(-1)


@graded("1b", public=True)
def test_rows_have_their_labels(student):
    """Support rows in class order, then the queries; each image bears the label of its class."""
    for N, K, B in ((5, 1, 8), (3, 4, 8), (2, 2, 1)):
        classes, _, labels = rows_of(student, N, K, B, seed=1)
        expect((labels[:, :-1] == torch.arange(N)).all(), "the support labels are not in class order")
        of_label = classes[:, 0]  # [B, N]
        ordered = of_label.sort(dim=1).values
        expect((ordered[:, 1:] != ordered[:, :-1]).all(), "two labels of an episode name the same class")
        expect((classes[:, :-1] == of_label[:, None]).all(), "a support image is not of the class of its column")
        expect((labels[:, -1].sort(dim=1).values == torch.arange(N)).all(), "not one query of each class")
        expect((classes[:, -1] == of_label.gather(1, labels[:, -1])).all(), "a query does not bear its class's label")
    rows_of(student, 3, 1, 4, seed=1, batch_size=7)


@graded("1b")
def test_support_and_query_are_different_images(student):
    """No image comes twice in an episode."""
    classes, drawings, _ = rows_of(student, 4, 3, 200, seed=2)
    images = (classes * 1000 + drawings).flatten(1).sort(dim=1).values
    expect((images[:, 1:] != images[:, :-1]).all(), "the same image is there twice, say in support and query")


@graded("1b")
def test_queries_are_shuffled(student):
    """The N queries stand in every order equally often, each episode for itself."""
    _, _, labels = rows_of(student, 3, 1, 6000, seed=3)
    uniform(labels[:, -1], list(itertools.permutations(range(3))), "the order of the queries")


def probe_options(N, K, B, options, calls=1):
    """The marks and labels of some meta-batches of a sampler with these options, and the first image's pixels."""
    from fewshot.tasks import episodes

    sampler = episodes.EpisodeSampler(known([20] * 30), "train", N, K, 1, B, 11, **options)
    batches = [sampler.sample_rows() for _ in range(calls)]
    marks, labels = (torch.stack(parts) for parts in zip(*((x[..., :2] * 255, y) for x, y in batches), strict=True))
    return {"marks": marks, "labels": labels, "images": batches[0][0][0]}


def options_of(student, N, K, B, options, calls=1, rows=None):
    """Classes, drawings and labels, each [calls * B, K+1, N]."""
    found = student.run(probe_options, N=N, K=K, B=B, options=options, calls=calls)
    shape = (calls, rows or B, K + 1, N)
    marks = shaped(found["marks"], (*shape, 2), "the images").round().flatten(0, 1)
    return marks[..., 0], marks[..., 1], shaped(found["labels"], (*shape, N), "the labels").argmax(-1).flatten(0, 1)


@graded("1b")
def test_rows_of_other_samplers(student):
    """What `self.draw` chooses is what comes: fixed labels, one alphabet, one drawer, a share of the meta-batch."""
    classes, _, labels = options_of(student, 3, 2, 40, {"fixed_labels": True})
    expect((classes % 3 == labels).all(), "with fixed_labels a class does not keep its label")
    classes, _, _ = options_of(student, 4, 1, 40, {"within_alphabet": True})
    alphabets = classes.div(10, rounding_mode="floor").flatten(1)
    expect((alphabets == alphabets[:, :1]).all(), "within_alphabet: a task has classes of several alphabets")
    _, drawings, _ = options_of(student, 4, 2, 20, {"one_drawer": True})
    expect((drawings == drawings[..., :1]).all(), "one_drawer: an episode's row has several drawers")
    everything = options_of(student, 3, 2, 8, {})
    part = options_of(student, 3, 2, 8, {"shard": (1, 2)}, rows=4)
    for got, expected in zip(part[:2], everything[:2], strict=True):
        same(got[:, :-1], expected[4:, :-1], "the support images of the second of two shards")


@graded("1b")
def test_rows_are_distorted(student):
    """With jitter `self.gather` distorts the images."""
    plain, turned = (student.run(probe_options, N=3, K=1, B=4, options=o) for o in ({}, {"jitter": 0.5}))
    plain, turned = (shaped(found["images"], (2, 3, 784), "the images") for found in (plain, turned))
    expect((plain - turned).abs().amax(-1).min() > 0, "with jitter an image is as it was")


@graded("1b")
def test_every_meta_batch_is_another(student):
    """The sampler's stream goes on from call to call."""
    classes, drawings, _ = options_of(student, 3, 2, 10, {}, calls=3)
    marks = (classes * 1000 + drawings).view(3, -1)
    expect(not any(torch.equal(marks[i], marks[j]) for i, j in ((0, 1), (1, 2), (0, 2))), "a meta-batch comes again")


def probe_features(N, K, B):
    """The images of a meta-batch, and the same meta-batch from a table of their marks, as features."""
    from fewshot.tasks import episodes

    sampler = episodes.EpisodeSampler(known([20] * 30), "train", N, K, 1, B, 9)
    images, labels = sampler.sample_rows()
    table = sampler.images.flatten(1)[:, :2].float() / 255
    sampler.reset()
    features, again = sampler.sample_rows(features=table)
    return {"marks": images[..., :2], "features": features, "labels": labels, "again": again}


@graded("1b")
def test_rows_of_features(student):
    """A table of features stands in place of the images; the tasks are the same."""
    found = student.run(probe_features, N=4, K=2, B=6)
    marks = shaped(found["marks"], (6, 3, 4, 2), "the images")
    close(found["features"], marks, "the features", 1e-6)
    same(found["again"], shaped(found["labels"], (6, 3, 4, 4), "the labels"), "the labels of the features")


@graded("1b")
def test_drawings_of_the_rows_are_uniform(student):
    """Every drawing of a class is a query as often as a support image."""
    classes, drawings, _ = rows_of(student, 5, 1, 4000, seed=4)
    for row in (0, 1):
        for marks, kinds in ((classes, 30), (drawings, 20)):
            counts = torch.bincount(marks[:, row].long().flatten(), minlength=kinds).double()
            mean = 20000 / kinds
            expect((counts - mean).abs().max() < 6 * math.sqrt(mean), "some images are drawn more often than others")


# ------------------------------------------------------------------------ 2: the network


def probe_predict(images, labels, options, alone=False, calls=1):
    """The predictions of the last of some calls, and the derivative of the queries' to the images."""
    import hw1

    torch.manual_seed(3)
    _, rows, N, _ = images.shape
    model = hw1.MANN(N, rows, 12, hw1.Recurrent(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # so that each input can be seen in the output
    before = labels.clone()
    predict = model.forward_alone if alone else model
    images = images.clone().requires_grad_()
    for _ in range(calls):
        preds = predict(images, labels)
    result = {"preds": preds, "parameters": [p.detach().clone() for p in model.parameters()]}
    queries = preds if alone else preds[:, -1]
    weights = torch.arange(queries.numel()).view(queries.shape).cos()
    value = (queries * weights).sum()
    gradient = torch.autograd.grad(value, images, allow_unused=True)[0] if preds.requires_grad else None
    return result | {"untouched": torch.equal(before, labels), "gradient": gradient}


def episodes(B, K, N, seed):
    """Random images, and one-hot labels with shuffled queries."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(B, K + 1, N, 784, generator=g)
    labels = torch.eye(N).repeat(B, K + 1, 1, 1)
    for b in range(B):
        labels[b, -1] = torch.eye(N)[torch.randperm(N, generator=g)]
    return images, labels


SETTINGS = ({"head": "linear"}, {"head": "recurrent", "logit_scale": 3.0}, {"head": "linear", "cell": "gru"})


def oracle_predict(parameters, options, images, labels, alone=False):
    """Our own network with these parameters: predictions, and the derivative that probe_predict takes."""
    import hw1

    _, rows, N, _ = images.shape
    model = hw1.MANN(N, rows, 12, hw1.Recurrent(**options)).eval()
    for p, value in zip(model.parameters(), parameters, strict=True):
        p.data.copy_(value)
    images = images.clone().requires_grad_()
    preds = model.forward_alone(images, labels) if alone else model(images, labels)
    queries = preds if alone else preds[:, -1]
    weights = torch.arange(queries.numel()).view(queries.shape).cos()
    return preds.detach(), torch.autograd.grad((queries * weights).sum(), images)[0]


def compare_with_ours(student, alone):
    """Every kind of network: predictions of the second call, and the derivative through the features."""
    images, labels = episodes(3, 2, 4, seed=5)
    for options in SETTINGS:
        found = student.run(probe_predict, images=images, labels=labels, options=options, alone=alone, calls=2)
        preds, gradient = oracle_predict(found["parameters"], options, images, labels, alone)
        name = options.get("cell", "lstm")
        close(found["preds"], preds, f"the predictions of a second call, {name}", 1e-3)
        expect(found["gradient"] is not None, "the predictions have no derivative to the images")
        close(found["gradient"], gradient, f"the derivative of the queries' predictions to the images, {name}", 1e-3)


def oracle_sequence(parameters, options, pairs):
    """The recurrent network over [B, T, D + N] in float64, one layer after the other."""
    linear = options.get("head") == "linear"
    cell = {"lstm": nn.LSTM, "gru": nn.GRU}[options.get("cell", "lstm")]
    parameters = [p.double() for p in parameters]
    layers, rest = parameters[: len(parameters) - 2 * linear], parameters[len(parameters) - 2 * linear :]
    sequence = pairs.double()
    for i in range(0, len(layers), 4):
        layer = cell(layers[i].shape[1], layers[i + 1].shape[1], batch_first=True).double()
        for p, value in zip(layer.parameters(), layers[i : i + 4], strict=True):
            p.data.copy_(value)
        with torch.no_grad():
            sequence = layer(sequence)[0]
    return sequence @ rest[0].T + rest[1] if linear else sequence * options.get("logit_scale", 1.0)


def oracle_episode(parameters, options, images, labels):
    """One episode after the other, one image after the other."""
    B, rows, N, _ = images.shape
    result = torch.zeros(B, rows, N, N, dtype=torch.float64)
    for b in range(B):
        steps = []
        for row in range(rows):
            for n in range(N):
                label = labels[b, row, n] if row < rows - 1 else torch.zeros(N)
                steps.append(torch.cat([images[b, row, n], label]))
        out = oracle_sequence(parameters, options, torch.stack(steps)[None])[0]
        for row in range(rows):
            for n in range(N):
                result[b, row, n] = out[row * N + n]
    return result


@graded("2a", public=True)
def test_labels_of_the_queries_are_hidden(student):
    """Other query labels change nothing, other support labels do; the inputs stay as they are."""
    images, labels = episodes(3, 2, 4, seed=1)
    found = [student.run(probe_predict, images=images, labels=labels, options={})]
    preds = shaped(found[0]["preds"], (3, 3, 4, 4), "the predictions")
    expect(found[0]["untouched"] is True, "the labels that were handed in have been changed")
    other = labels.clone()
    other[:, -1] = labels[:, -1].roll(1, dims=-1)
    again = student.run(probe_predict, images=images, labels=other, options={})
    close(again["preds"], preds, "the predictions with other query labels", 1e-6)
    other = labels.clone()
    other[:, 0] = labels[:, 0].roll(1, dims=-1)
    again = shaped(student.run(probe_predict, images=images, labels=other, options={})["preds"], preds.shape, "them")
    expect((again - preds)[:, -1].abs().max() > 1e-4, "the support labels have no influence on the queries")


@graded("2a")
def test_predictions(student):
    """The predictions are the network's over the sequence of (image, label) pairs."""
    for options in SETTINGS:
        for B, K, N in ((3, 1, 4), (2, 3, 2)):
            images, labels = episodes(B, K, N, seed=2)
            found = student.run(probe_predict, images=images, labels=labels, options=options)
            expected = oracle_episode(found["parameters"], options, images, labels)
            close(found["preds"], expected, f"the predictions of a {options.get('recurrent', 'lstm')} network")


@graded("2a")
def test_every_memory(student):
    """Other memories, calls after the first, and what an encoder would learn from."""
    compare_with_ours(student, alone=False)


@graded("2b", public=True)
def test_a_query_alone_knows_no_other(student):
    """Another image in one query's place changes the prediction of that query alone."""
    images, labels = episodes(3, 2, 4, seed=3)
    preds = student.run(probe_predict, images=images, labels=labels, options={}, alone=True)["preds"]
    preds = shaped(preds, (3, 4, 4), "the predictions")
    other = images.clone()
    other[:, -1, 1] = 1 - images[:, -1, 1]
    again = student.run(probe_predict, images=other, labels=labels, options={}, alone=True)["preds"]
    again = shaped(again, (3, 4, 4), "the predictions")
    change = (again - preds).abs().amax(dim=(0, 2))
    expect(change[1] > 1e-4, "a query's image has no influence on its prediction")
    expect(change[[0, 2, 3]].max() < 1e-5, "a query's image changes the predictions of the others")


@graded("2b")
def test_predictions_alone(student):
    """Each query is the only one behind its own support set."""
    for options in SETTINGS:
        B, K, N = 3, 2, 4
        images, labels = episodes(B, K, N, seed=4)
        found = student.run(probe_predict, images=images, labels=labels, options=options, alone=True)
        support = torch.cat([images[:, :-1], labels[:, :-1]], dim=-1).flatten(1, 2)
        expected = []
        for n in range(N):
            query = torch.cat([images[:, -1, n], torch.zeros(B, N)], dim=-1)[:, None]
            pairs = torch.cat([support, query], dim=1)
            expected.append(oracle_sequence(found["parameters"], options, pairs)[:, -1])
        close(found["preds"], torch.stack(expected, dim=1), f"with {options.get('recurrent', 'lstm')} layers")


@graded("2b")
def test_every_memory_alone(student):
    """Other memories, calls after the first, and what an encoder would learn from."""
    compare_with_ours(student, alone=True)


# ------------------------------------------------------------------------------ 3: the loss


def probe_loss(preds, labels):
    import hw1

    preds = preds.clone().requires_grad_()
    N = preds.shape[-1]
    loss = hw1.MANN(N, preds.shape[1], 8).loss_function(preds, labels)
    return {"loss": loss, "gradient": torch.autograd.grad(loss, preds)[0] if loss.requires_grad else None}


@graded("3", public=True)
def test_loss_by_hand(student):
    """Two tasks of two classes: three queries are right with probability 3/4, one with 1/4."""
    labels = torch.eye(2).repeat(2, 2, 1, 1)
    preds = torch.full((2, 2, 2, 2), 7.0)
    preds[:, -1] = math.log(3.0) * torch.eye(2)
    preds[1, -1, 1] = preds[1, -1, 1].flip(0)
    loss = student.run(probe_loss, preds=preds, labels=labels)["loss"]
    close(loss, torch.tensor(-(3 * math.log(0.75) + math.log(0.25)) / 4), "the loss")


@graded("3")
def test_loss(student):
    """The mean cross entropy of the queries, for episodes of any size."""
    for B, K, N in ((3, 2, 4), (1, 1, 5), (6, 3, 2)):
        _, labels = episodes(B, K, N, seed=5)
        preds = 3 * torch.randn(B, K + 1, N, N, generator=torch.Generator().manual_seed(6))
        total = 0.0
        for b in range(B):
            for n in range(N):
                scores = preds[b, -1, n].double()
                total = total + scores.exp().sum().log() - (scores * labels[b, -1, n].double()).sum()
        found = student.run(probe_loss, preds=preds, labels=labels)
        close(found["loss"], torch.as_tensor(total / (B * N)), "the loss")


@graded("3")
def test_loss_of_the_queries_alone(student):
    """The predictions for the support set have no gradient."""
    _, labels = episodes(3, 2, 4, seed=7)
    preds = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(8))
    gradient = student.run(probe_loss, preds=preds, labels=labels)["gradient"]
    expect(gradient is not None, "the loss has no gradient")
    gradient = shaped(gradient, preds.shape, "the gradient")
    expect(gradient[:, :-1].abs().max() == 0, "the predictions for the support set enter the loss")
    expected = (preds[:, -1].softmax(-1) - labels[:, -1]) / 12
    close(gradient[:, -1], expected, "the gradient")


@graded("3")
def test_loss_of_confident_predictions(student):
    """Logits of hundreds are ordinary numbers, for the gradient too."""
    labels = torch.eye(3).repeat(2, 2, 1, 1)
    preds = torch.zeros(2, 2, 3, 3)
    preds[:, -1] = 400 * torch.eye(3).roll(1, 0) - 200
    found = student.run(probe_loss, preds=preds, labels=labels)
    close(found["loss"], torch.tensor(400.0), "the loss of logits of -200 and 200")
    expect(found["gradient"] is not None, "the loss has no gradient")
    shaped(found["gradient"], preds.shape, "the gradient of logits of -200 and 200")


# --------------------------------------------------------------------------- 4: the measurement


def probe_evaluate(num_tasks, B, alone=False, encoder="none", first=0, training=True, calls=1, seed=5):
    """What evaluate says; and, drawn again, the predictions and labels of the tasks it should have seen."""
    from fewshot.tasks import episodes

    import hw1

    pixels = np.random.default_rng(4).integers(0, 256, (600, 1, 28, 28)).astype(np.uint8)
    sampler = episodes.EpisodeSampler(known([20] * 30)._replace(images=pixels), "test", 3, 1, 1, B, seed)
    torch.manual_seed(6)
    model = hw1.MANN(3, 2, 8, encoder=encoder).train(training)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(3)  # so that predictions differ from task to task
    for _ in range(first):
        sampler.sample_rows()
    torch.manual_seed(7)
    np.random.seed(7)
    for _ in range(calls):
        accuracy, loss = hw1.evaluate(model, sampler, num_tasks, alone=alone)
    result = {"accuracy": accuracy, "loss": float(loss), "training": model.training, "tracked": accuracy.requires_grad}
    result["next"] = [float(torch.rand(())), float(np.random.rand())]
    sampler.reset()
    model.eval()
    queries, labels = [], []
    for _ in range(-(-num_tasks // B)):
        images, y = sampler.sample_rows()
        queries.append((model.forward_alone(images, y) if alone else model(images, y)[:, -1]).detach())
        labels.append(y[:, -1])
    return result | {"queries": torch.cat(queries), "labels": torch.cat(labels)}


def compare_evaluation(found, num_tasks):
    queries, labels = found["queries"].double(), found["labels"].argmax(-1)
    right = (queries.argmax(-1) == labels).double().mean(1)
    close(found["accuracy"], right[:num_tasks], "the accuracy of each task", 1e-6)
    losses = F.cross_entropy(queries.transpose(1, 2), labels, reduction="none").mean(1)
    means = [losses.mean(), losses[:num_tasks].mean()]  # with the rest of the last meta-batch or without it
    expect(any(abs(found["loss"] - m) < 1e-4 * m for m in means), "the mean loss: wrong value")


@graded("4", public=True)
def test_evaluation_of_a_fixed_stream(student):
    """Called twice, wherever the sampler stands, it measures the same tasks and leaves the model as it was."""
    once, again = (student.run(probe_evaluate, num_tasks=25, B=10, first=first) for first in (0, 2))
    expect(shaped(once["accuracy"], (25,), "the accuracy of each task").std() > 0, "all tasks have the same accuracy")
    same(again["accuracy"], once["accuracy"], "the accuracy of a sampler that was used before")
    expect(once["training"] is True, "the model was in training mode and is no longer")
    expect(once["tracked"] is False, "the accuracy carries a graph")
    resting = student.run(probe_evaluate, num_tasks=5, B=10, training=False)
    expect(resting["training"] is False, "the model was not in training mode and is now")


@graded("4")
def test_evaluation(student):
    """Accuracy and loss are those of the queries."""
    for num_tasks, B in ((25, 10), (40, 20), (3, 50)):
        compare_evaluation(student.run(probe_evaluate, num_tasks=num_tasks, B=B), num_tasks)


@graded("4")
def test_evaluation_leaves_no_trace(student):
    """Random numbers go on as if nothing had been measured; a second call and another stream are as right."""
    found = student.run(probe_evaluate, num_tasks=15, B=10, calls=2, seed=8)
    compare_evaluation(found, 15)
    expected = [float(torch.rand((), generator=torch.Generator().manual_seed(7))), np.random.RandomState(7).rand()]
    expect(found["next"] == expected, "the random numbers after a measurement are not those that were next")


@graded("4")
def test_evaluation_alone(student):
    """With alone=True each query is asked by itself."""
    compare_evaluation(student.run(probe_evaluate, num_tasks=60, B=20, alone=True), 60)


@graded("4")
def test_evaluation_uses_the_running_averages(student):
    """The model is measured in evaluation mode."""
    compare_evaluation(student.run(probe_evaluate, num_tasks=20, B=10, encoder="conv"), 20)


# ------------------------------------------------------------------------------- 5: a training

STEPS, HIDDEN, ENOUGH = 300, 64, 0.8


@functools.cache
def glyphs():
    """500 invented characters by 20 drawers, uint8 [10000, 1, 28, 28]."""
    from fewshot.images import glyphs as drawn

    return torch.from_numpy(drawn.draw_glyphs(500, 28, seed=7))


def probe_train(images, classes, steps, hidden):
    """Train the student's network K = 1, N = 2 on these images; the parameters."""
    from fewshot.tasks import episodes, splits

    import hw1

    values = {
        "name": "glyphs",
        "images": images.numpy(),
        "counts": np.full(classes, 20),
        "source": "",
        "digest": "0" * 64,
        "names": [f"alphabet{c // 30}/character{c}" for c in range(classes)],
        "splits": {"train": np.arange(classes)},
    }
    dataset = splits.Dataset(**{name: values.get(name) for name in splits.Dataset._fields})
    sampler = episodes.EpisodeSampler(dataset, "train", 2, 1, 1, 32, 1, rotations=True)
    model = hw1.MANN(2, 2, hidden, hw1.Recurrent(head="linear", forget_bias=1.0))
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(steps):
        x, y = sampler.sample_rows()
        loss = model.loss_function(model(x.float(), y.float()), y.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [p for p in model.parameters()]


@graded("5", seconds=100, whole=True)  # a network that reads episode by episode takes its time
def test_training(student):
    """Trained here on glyphs, K = 1, N = 2, your functions together reach 80 % on new characters."""
    from fewshot.tasks import episodes

    import hw1

    images = glyphs()
    trained = student.run(probe_train, images=images[:8000], classes=400, steps=STEPS, hidden=HIDDEN)
    model = hw1.MANN(2, 2, HIDDEN, hw1.Recurrent(head="linear", forget_bias=1.0))
    expect(len(trained) == len(list(model.parameters())), "the trained network has other parameters")
    for p, value in zip(model.parameters(), trained, strict=True):
        p.data.copy_(shaped(value, p.shape, "a parameter"))
    # The grader's own tasks and its own measurement.
    rest = known([20] * 100)._replace(images=images[8000:].numpy())
    sampler = episodes.EpisodeSampler(rest, "test", 2, 1, 1, 200, 12345)
    accuracy = hw1.evaluate(model.eval(), sampler, 2000)[0].mean().item()
    expect(accuracy >= ENOUGH, f"accuracy {accuracy:.1%} after {STEPS} steps; a right network has more than 80 %")
    return {"accuracy": round(accuracy, 3)}
