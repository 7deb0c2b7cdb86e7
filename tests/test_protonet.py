"""Prototypical networks: hand-computed probabilities, independence of queries, training."""

from fewshot.learners import muon
from fewshot.learners.conv4 import Conv4, Residual, prototypes
from fewshot.learners.muon import Muon, orthogonal
from fewshot.tasks.episodes import EpisodeSampler

import json

import numpy as np
import pytest
import torch
from conftest import known_dataset
from torch import nn

import protonet
from protonet import (
    embed,
    embed_split,
    episode_loss,
    evaluate,
    proto_logits,
    rows_of,
    squared_distances,
)

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu"]


def test_hand_made_points_give_hand_computed_probabilities():
    # Two classes in the plane with prototypes (0, 1) and (4, 1); the query (1, 1) is at distances 1 and 9.
    support = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]]])
    query = torch.tensor([[[1.0, 1.0], [2.0, 5.0]]])
    assert torch.equal(prototypes(support, 2), torch.tensor([[[0.0, 1.0], [4.0, 1.0]]]))
    logits = proto_logits(support, query, 2)
    assert torch.equal(logits, torch.tensor([[[-1.0, -9.0], [-20.0, -20.0]]]))
    first = 1 / (1 + np.exp(-8.0))
    assert logits.softmax(-1)[0].tolist() == [[pytest.approx(first), pytest.approx(1 - first)], [0.5, 0.5]]


def test_distance_equals_the_definition_and_the_linear_form():
    f, c = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    distances = (f[:, :, None] - c[:, None]).square().sum(-1)
    assert torch.allclose(squared_distances(f, c), distances, atol=1e-12)
    linear = 2 * f @ c.transpose(1, 2) - c.square().sum(-1)[:, None]  # up to ||f||^2, the same for all classes
    assert torch.allclose(-distances, linear - f.square().sum(-1, keepdim=True), atol=1e-12)
    assert torch.allclose((-distances).softmax(-1), linear.softmax(-1), atol=1e-12)


def test_permuting_the_classes_permutes_the_predictions():
    support, query = torch.randn(1, 4, 3, 5, dtype=torch.float64), torch.randn(1, 6, 5, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    logits = proto_logits(support.flatten(1, 2), query, 4)
    assert torch.allclose(proto_logits(support[:, order].flatten(1, 2), query, 4), logits[..., order], atol=1e-12)


def test_queries_influence_each_other_only_in_the_transductive_mode():
    torch.manual_seed(0)
    encoder = Conv4(width=8)
    images = torch.rand(1, 8, 1, 28, 28)
    changed = images.clone()
    changed[:, 7] = 1 - changed[:, 7]
    for norm, same in (("running", True), ("batch", False)):
        a, b = (embed(encoder, x, torch.float32, norm=norm)[:, :7] for x in (images, changed))
        assert torch.allclose(a, b, atol=1e-6) == same, norm


class Corner(nn.Module):
    """An encoder that reads the class off the images of `known_dataset`, as a one-hot vector times 9."""

    def forward(self, images, norm="running", momentum=0.0):
        return 9 * torch.nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 30).float()


@pytest.mark.parametrize("K, Q", [(1, 1), (2, 2), (5, 3)])
def test_a_perfect_encoder_scores_one_and_has_no_loss(K, Q):
    sampler = EpisodeSampler(known_dataset(), "test", 6, K, Q, 4, seed=1)
    accuracy, loss = evaluate(embed_split(Corner(), sampler, torch.float32), sampler, 10)
    assert accuracy.tolist() == [1.0] * 10 and loss < 1e-6
    assert episode_loss(Corner(), sampler.sample(), 6, torch.float32) < 1e-6  # also with swapped roles


def test_features_of_each_image_give_the_tasks_of_the_images():
    """Embedding each image once is the same as embedding every task, shuffled queries and all."""
    torch.manual_seed(0)
    encoder, sampler = Conv4(width=8), EpisodeSampler(known_dataset(), "test", 5, 2, 3, 4, seed=1)
    support, _, query, labels = sampler.sample()
    logits = proto_logits(embed(encoder, support, torch.float32), embed(encoder, query, torch.float32), 5)
    right = (logits.argmax(dim=-1) == labels).float().mean(dim=1)
    features = embed_split(encoder, sampler, torch.float32)
    assert torch.equal(evaluate(features, sampler, 4)[0], right) and 0 < right.mean() < 1
    seen = embed_split(encoder, sampler, torch.float32, views=3, limits=(0.0, 0.0))  # three times the same
    assert torch.allclose(seen, features, atol=1e-3)
    again = [embed_split(encoder, sampler, torch.float32, views=3) for _ in range(2)]
    assert torch.equal(*again) and not torch.allclose(again[0], features, atol=1e-3)


@pytest.mark.parametrize("views", [1, 3])
def test_only_the_images_of_the_tasks_are_embedded(views):
    """The same features of these images, distorted copies and all, and the same accuracies; nothing of the others."""
    torch.manual_seed(0)
    encoder, dataset = Conv4(width=8), known_dataset(40)
    dataset.images[:] = np.random.default_rng(0).integers(0, 256, dataset.images.shape, np.uint8)
    few, many = (EpisodeSampler(dataset, "test", N, 1, 2, 3, seed=N) for N in (3, 5))
    rows = rows_of((few, 5), (many, 7))
    held = torch.zeros(len(few.images), dtype=torch.bool)
    for sampler, batches in ((few, [3, 2]), (many, [3, 3, 1])):
        sampler.reset()
        for n in batches:
            held[sampler.draw()[0][:n].flatten()] = True
    assert torch.equal(rows, held.nonzero()[:, 0]) and 100 < len(rows) < 400  # 800 there are, in two parts
    whole, part = (embed_split(encoder, few, torch.float32, views, rows=r) for r in (None, rows))
    assert torch.allclose(part[rows], whole[rows], atol=1e-6) and not part[~held].any() and whole[~held].any(1).all()
    for sampler, n in ((few, 5), (many, 7)):
        assert torch.equal(evaluate(part, sampler, n)[0], evaluate(whole, sampler, n)[0])


def test_swapped_roles_equal_the_swapped_task():
    torch.manual_seed(0)
    encoder = Conv4(width=8).double()
    support, labels, query, query_labels = EpisodeSampler(known_dataset(), "train", 5, 1, 1, 2, seed=3).sample()
    support, query = support.double(), query.double()
    loss = episode_loss(encoder, (support, labels, query, query_labels), 5, torch.float32)
    in_order = query_labels.argsort(1)
    query_sorted = torch.stack([q[o] for q, o in zip(query, in_order, strict=True)])
    features = encoder(torch.cat([support, query_sorted], 1).flatten(0, 1), norm="batch").view(2, 10, -1)
    features = protonet.temper(features)
    s, q = features[:, :5], features[:, 5:]
    cross = lambda a, b: nn.functional.cross_entropy(proto_logits(a, b, 5).flatten(0, 1), labels.flatten())
    both = [cross(s, q), cross(q, s)]
    assert torch.allclose(loss, sum(both) / 2, atol=1e-12)


def test_tasks_of_one_drawer():
    """One person draws the support set of all classes, K people with K shots, and none of the queries.

    The classes, the query order and the first class are those of the ordinary tasks; all drawers come up.
    """
    dataset, options = known_dataset(), {"within_alphabet": True}
    make = lambda **more: EpisodeSampler(dataset, "test", 4, 2, 3, 500, seed=1, **options, **more)
    lake, plain = make(one_drawer=True), make()
    each = plain.same_count
    (rows, order), (plain_rows, plain_order) = lake.draw(), plain.draw()
    drawers = rows % each
    assert torch.equal(drawers, drawers[:, :1].expand_as(drawers)) and torch.equal(order, plain_order)
    assert torch.equal(rows // each, plain_rows // each) and torch.equal(rows[:, 0], plain_rows[:, 0])
    assert drawers[:, 0].sort().values.diff().all(), "a drawer twice in a task"
    assert len(drawers[:, 0, 0].unique()) == each
    support, _, query, query_labels = lake.sample()
    kind = lambda images: (images[:, :, 0, 0, 0] * 255).round()
    assert torch.equal(kind(support)[:, ::2].gather(1, query_labels), kind(query))
    accuracy, _ = evaluate(embed_split(Corner(), lake, torch.float32), lake, 10)
    assert accuracy.tolist() == [1.0] * 10


def plain_residual(encoder, images, training):
    """`Residual` of torch's own layers."""

    def layers(name):
        weight, mean, var = (getattr(encoder, kind + name) for kind in ("weight", "mean", "var"))
        convolution = nn.Conv2d(*weight.shape[1::-1], 3, padding=1, bias=False).double()
        norm = nn.BatchNorm2d(len(weight), momentum=0.1).double().train(training)
        convolution.weight, norm.weight, norm.bias = (getattr(encoder, k + name) for k in ("weight", "gamma", "beta"))
        norm.running_mean, norm.running_var = mean.clone(), var.clone()
        return nn.Sequential(convolution, norm)

    x = images
    for i in range(4):
        x = nn.functional.max_pool2d(layers(f"{i}")(x).relu(), 2)
        x = (x + layers(f"{i}b")(layers(f"{i}a")(x).relu())).relu()
    return x.flatten(1)


def test_residual_equals_torch_layers_and_starts_as_conv4():
    torch.manual_seed(0)
    encoder, plain = Residual(1, 6, 32).double(), Conv4(1, 6, 32).double()
    images = torch.rand(5, 1, 32, 32, dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in encoder.state_dict().items() if name in plain.state_dict()})
    for norm in ("running", "batch"):
        assert torch.allclose(encoder(images, norm), plain(images, norm), atol=1e-12)
    for p in encoder.parameters():
        nn.init.normal_(p, 0.5, 0.5)
    assert not torch.allclose(encoder(images), plain(images), atol=0.1)
    reference = plain_residual(encoder, images, True)
    assert torch.allclose(encoder(images, "batch"), reference, atol=1e-10)
    assert not any(getattr(encoder, f"mean{i}b").any() for i in range(4))  # with momentum 0 they stay
    assert torch.allclose(encoder(images, "batch", momentum=0.1), reference, atol=1e-10)
    assert all(getattr(encoder, f"mean{i}{k}").any() for i in range(4) for k in ("", "a", "b"))
    assert torch.allclose(encoder(images), plain_residual(encoder, images, False), atol=1e-10)
    with pytest.raises(ValueError, match="support"):
        encoder(images, "support")


@pytest.mark.parametrize("shape", [(64, 576), (64, 9), (3, 5), (4, 4)])
def test_the_step_of_a_matrix_is_orthogonal(shape):
    """Singular values near 1, the singular vectors of the gradient; scaled where there are more rows than columns."""
    torch.manual_seed(0)
    gradient = torch.randn(shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(gradient, full_matrices=False)
    step = orthogonal(gradient) / max(1, shape[0] / shape[1]) ** 0.5
    inner = U.T @ step @ V.T  # diagonal when the singular vectors are the same
    assert torch.allclose(inner, inner.diagonal().diag(), atol=1e-9)
    assert inner.diagonal()[S / S.norm() > 0.02].sub(1).abs().max() < 0.35
    assert torch.allclose(step, orthogonal(7 * gradient) / max(1, shape[0] / shape[1]) ** 0.5)  # of any scale


def test_muon_takes_the_steps_of_torch():
    """On a matrix: three steps, up to torch's bfloat16; on a vector the step has the length of the rate."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(64, 576)) for _ in range(2))
    vector = nn.Parameter(torch.zeros(64))
    muon = Muon([ours, vector], lr=0.1, momentum=0.9)
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(64, 576)
        theirs.grad, vector.grad = ours.grad.clone(), torch.randn(64)
        before = vector.detach().clone()
        muon.step()
        other.step()
        assert (vector - before).norm().item() == pytest.approx(0.1, rel=1e-5)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_muon_survives_a_gradient_of_zero():
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.zeros(3, 4)
    Muon([p], lr=0.1).step()
    assert torch.equal(p, torch.ones(3, 4))


def test_muon_steps_small_tensors_in_one_thread_and_gives_the_others_back(monkeypatch):
    seen, threads = [], torch.get_num_threads()
    real = muon.muon_steps
    monkeypatch.setattr(muon, "muon_steps", lambda *args: seen.append(torch.get_num_threads()) or real(*args))
    torch.set_num_threads(3)
    try:
        for sizes in ((8, 8), (400, 600)), ((8, 8),):
            parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
            for p in parameters:
                p.grad = torch.randn_like(p)
            Muon(parameters, lr=0.1).step()
        with pytest.raises(RuntimeError), muon.one_thread_for(parameters):
            raise RuntimeError
        assert seen == [3, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_training_learns(trained_protonet):
    folder, metrics = trained_protonet
    assert metrics["test_accuracy"] > 0.85 and metrics["batch_norm"] == "running"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["test_accuracy_5way1shot"] == metrics["test_accuracy"] < metrics["test_accuracy_5way5shot"]
    assert metrics["test_accuracy_20way1shot"] < metrics["test_accuracy_20way5shot"] < 1


def test_evaluation_at_other_n_and_k(trained_protonet):
    folder, metrics = trained_protonet
    base = ["--test", "--checkpoint", str(folder), "--num_test_tasks", "40"]
    one = protonet.main([*base, "--num_classes", "20"])
    five = protonet.main([*base, "--num_classes", "20", "--num_shot", "5"])
    assert one["N"] == 20 and one["test_accuracy"] < metrics["test_accuracy"] < 1
    assert five["K"] == 5 and five["test_accuracy"] > one["test_accuracy"]
    assert protonet.main([*base, "--within_alphabet"])["within_alphabet"]


@pytest.mark.thorough
def test_float32_and_bfloat16_agree(trained_protonet):
    """The same network in both: accuracies within one point, features within 3 % of their size."""
    folder, _ = trained_protonet
    base = ["--test", "--checkpoint", str(folder), "--num_test_tasks", "100"]
    wide, short = (protonet.main([*base, "--dtype", dtype])["test_accuracy"] for dtype in ("float32", "bfloat16"))
    assert abs(wide - short) < 0.01
    encoder, images = Conv4(1, 32), torch.rand(1, 40, 1, 28, 28)
    protonet.experiment.load_best(str(folder), encoder)
    with torch.no_grad():
        wide, short = (embed(encoder, images, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (wide - short).norm() / wide.norm() < 0.03 and not torch.equal(wide, short)


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--train_shot",
            "2",
            "--train_query",
            "3",
            "--jitter",
            "0",
            "--no-rotations",
            "--meta_batch_size",
            "2",
            "--shift",
            "0.2",
            "--views",
            "3",
        ],
        ["--dtype", "float32", "--learning_rate", "1e-2", "--split", "lake", "--image_size", "32"],
        [
            "--num_query",
            "3",
            "--num_shot",
            "2",
            "--patience",
            "1",
            "--within_alphabet",
            "--train_within_alphabet",
            "--encoder",
            "residual",
        ],
        ["--dtype", "bfloat16", "--width", "4", "--views", "1"],  # slow where it is emulated
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    metrics = protonet.main([*SMOKE, "--log_dir", str(tmp_path), *flags])
    assert 0.2 < metrics["test_accuracy"] <= 1
