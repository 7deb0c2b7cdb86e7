"""Attention: who sees whom, the equations against plain loops, gradients, whole runs."""

from fewshot.learners import memory
from fewshot.tasks.episodes import EpisodeSampler

import json
import math

import imageio.v3 as iio
import pytest
import torch
import torch.nn.functional as F
from conftest import known_dataset, refused_in_one_line, stirred
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import attention as script
from attention import AttentionLearner, CausalAttention, evaluate, large_task_loss, query_loss, visible

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_test_tasks", "20", "--num_val_tasks", "20"]
B, K, N, D = 2, 3, 4, 8
S, T = K * N, (K + 1) * N


def episode(K=K, N=N, seed=0):
    """float64 features [B, K+1, N, D], and labels of which the queries' are shuffled."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, K + 1, N, D, generator=generator, dtype=torch.float64)
    labels = torch.eye(N, dtype=torch.float64).repeat(B, K + 1, 1, 1)
    for b in range(B):
        labels[b, -1] = labels[b, -1][torch.randperm(N, generator=generator)]
    return features, labels


@pytest.fixture
def attention():
    return stirred(CausalAttention(D, layers=2, heads=2))


# ---------------------------------------------------------------------------------- attention


def test_no_output_depends_on_a_later_item_and_no_query_on_another(attention):
    """By gradients: of every output to every feature and label, zero exactly where it must be, and nowhere else."""
    features, labels = (x.requires_grad_() for x in episode())
    logits = attention(features, labels).flatten(1, 2)  # [B, T, N]
    seen = visible(S, N)
    for t in range(T):
        # of the class probabilities, for the logits of labels that an item cannot see are at their floor
        to_features, to_labels = torch.autograd.grad(
            logits[0, t].softmax(-1)[:2].sum(), (features, labels), retain_graph=True
        )
        for gradient in (to_features, to_labels):
            assert (gradient[1] == 0).all()  # another task
            assert (gradient[0].flatten(0, 1)[~seen[t]] == 0).all(), t
        if t > N:  # the first items see less than two classes
            reached = (to_features[0].flatten(0, 1) != 0).any(dim=1)
            assert torch.equal(reached, seen[t]), t
        assert (to_labels[0, -1] == 0).all()  # no query's label, not even an own one
        if t >= S:
            assert (to_labels[0, :-1].flatten(0, 1) != 0).any(dim=1).all()


def test_visible_by_hand():
    expected = [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],  # a query: the support set and itself
        [1, 1, 0, 1],
    ]
    assert torch.equal(visible(2, 2), torch.tensor(expected, dtype=torch.bool))


def test_attention_over_the_keys_sums_to_one_and_falls_on_what_is_visible(attention):
    features, labels = episode()
    weights = attention.look(features, labels)
    assert weights.shape == (B, T, S) and (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(B, T, dtype=torch.float64), atol=1e-12)
    assert (weights[:, ~visible(S, N)[:, :S]] == 0).all() and (weights[:, visible(S, N)[:, :S]] > 0).all()
    probabilities = attention(features, labels).softmax(-1)
    assert torch.allclose(probabilities[:, -1], weights[:, S:] @ labels[:, :-1].flatten(1, 2), atol=1e-9)


def test_together_is_alone(attention):
    """N queries in one pass have the logits that each has when it is asked alone, N times over."""
    features, labels = episode()
    together = attention(features, labels)[:, -1]
    for i in range(N):
        only = features.clone()
        only[:, -1] = features[:, -1, i : i + 1]
        alone = attention(only, labels)[:, -1]
        assert torch.allclose(alone, together[:, i : i + 1].expand_as(alone), atol=1e-12)


def test_permuting(attention):
    features, labels = episode()
    logits = attention(features, labels)
    # The queries change places: so do their logits, and nothing else.
    places = torch.tensor([2, 0, 3, 1])
    moved = features.clone()
    moved[:, -1] = features[:, -1, places]
    again = attention(moved, labels)
    assert torch.allclose(again[:, :-1], logits[:, :-1], atol=1e-12)
    assert torch.allclose(again[:, -1], logits[:, -1, places], atol=1e-12)
    # The labels change their names: the columns of the logits do so too.
    again = attention(features, labels[..., places])
    assert torch.allclose(again, logits[..., places], atol=1e-9)
    # The later half of the support set changes its order: the earlier half does not notice.
    moved, renamed = features.flatten(1, 2).clone(), labels.flatten(1, 2).clone()
    order = torch.cat([torch.arange(S // 2), torch.arange(S // 2, S).flip(0), torch.arange(S, T)])
    again = attention(moved[:, order].view_as(features), renamed[:, order].view_as(labels)).flatten(1, 2)
    assert torch.allclose(again[:, : S // 2], logits.flatten(1, 2)[:, : S // 2], atol=1e-12)


def test_one_look_does_not_know_the_order_of_the_support_set():
    attention = stirred(CausalAttention(D, layers=0))
    features, labels = episode()
    order = torch.cat([torch.randperm(S, generator=torch.Generator().manual_seed(3)), torch.arange(S, T)])
    moved = [x.flatten(1, 2)[:, order].view_as(x) for x in (features, labels)]
    assert torch.allclose(attention(*moved)[:, -1], attention(features, labels)[:, -1], atol=1e-12)


def plain_attention(attention, features, labels):
    """The logits of one task [K+1, N, D] by loops over items, heads and keys."""
    x, y = features.flatten(0, 1), labels.flatten(0, 1)

    def linear(layer, v):
        return layer.weight @ v + layer.bias

    def norm(layer, v):
        return layer.weight * (v - v.mean()) / (v.var(correction=0) + layer.eps).sqrt() + layer.bias

    def may_look(t):
        return [*range(min(t + 1, S))] + [t] * (t >= S)

    for layer in attention.layers:
        d = D // layer.heads
        q, k, v = torch.stack([linear(layer.qkv, norm(layer.norm1, item)) for item in x]).split(D, dim=1)
        after = []
        for t in range(T):
            got = []
            for h in range(layer.heads):
                part = slice(h * d, (h + 1) * d)
                scores = []
                for j in may_look(t):
                    same = float(t < S and j < S and y[t].argmax() == y[j].argmax())
                    scores.append((q[t, part] @ k[j, part]) / math.sqrt(d) + layer.same[h, 0, 0] * same)
                e = torch.stack(scores).exp()
                got.append(sum(w * v[j, part] for w, j in zip(e / e.sum(), may_look(t), strict=True)))
            here = x[t] + linear(layer.out, torch.cat(got))
            inner = F.gelu(linear(layer.mlp[0], norm(layer.norm2, here)))
            after.append(here + linear(layer.mlp[2], inner))
        x = torch.stack(after)
    logits = torch.zeros(T, N, dtype=x.dtype)
    for t in range(T):
        keys = [j for j in may_look(t) if j < S]
        query = linear(attention.query, x[t])
        e = torch.stack([(-(query - linear(attention.key, x[j])).square().sum() / math.sqrt(D)).exp() for j in keys])
        for w, j in zip(e / e.sum(), keys, strict=True):
            logits[t] += w * y[j]
    return (logits + 1e-30).log().view(K + 1, N, N)


def test_attention_against_plain_loops(attention):
    features, labels = episode(seed=5)
    for b, logits in enumerate(attention(features, labels)):
        assert torch.allclose(logits, plain_attention(attention, features[b], labels[b]), atol=1e-9)


def test_at_first_attention_is_the_nearest_neighbour_rule():
    features, labels = episode(K=1)
    nearest = torch.cdist(features[:, -1], features[:, 0]).argmin(-1)
    assert torch.equal(CausalAttention(D, 2, 2).double()(features, labels)[:, -1].argmax(-1), nearest)


def test_finite_differences_of_attention(attention):
    features, labels = episode(K=1, N=3)
    parameters = [p for p in attention.parameters() if p.numel() > 1]

    def loss(*_):
        return F.cross_entropy(attention(features, labels)[:, -1].flatten(0, 1), labels[:, -1].flatten(0, 1).argmax(-1))

    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss(), parameters))
    few = [attention.layers[0].same, attention.layers[1].norm1.weight, attention.key.bias, attention.layers[0].out.bias]
    assert torch.autograd.gradcheck(loss, few)
    assert torch.autograd.gradcheck(lambda f: attention(f, labels)[:, -1], features.requires_grad_())


def test_any_number_of_classes_and_shots(attention):
    for K, N in ((1, 2), (7, 3), (2, 9)):
        assert attention(*episode(K, N)).shape == (B, K + 1, N, N)


def test_far_features_give_finite_logits_and_gradients():
    features, labels = episode(K=1)
    features, labels = (1e3 * features).float().requires_grad_(), labels.float()
    logits = CausalAttention(D, 1, 2)(features, labels)
    F.cross_entropy(logits[:, -1].flatten(0, 1), labels[:, -1].flatten(0, 1).argmax(-1)).backward()
    assert logits.isfinite().all() and features.grad.isfinite().all()


# ------------------------------------------------------------------------------- the learner


def test_a_large_task_changes_places_when_it_has_one_shot():
    """With one shot the loss is the mean of the two questions; its gradient reaches both rows."""
    attention = CausalAttention(D, 1)
    features, labels = (x[:1].float() for x in episode(K=1, N=6))
    there = query_loss(attention(features, labels), labels)
    order = labels[0, 1].argmax(-1).argsort()
    back = torch.stack([features[:, 1, order], features[:, 0]], dim=1)
    in_order = torch.eye(6).expand(1, 2, 6, 6)
    expected = (there + query_loss(attention(back, in_order), in_order)) / 2
    assert large_task_loss(attention, features, labels).item() == pytest.approx(expected.item(), abs=1e-6)
    features, labels = (x[:1].float() for x in episode(K=2, N=6))
    plain = query_loss(attention(features, labels), labels)
    assert large_task_loss(attention, features, labels).item() == pytest.approx(plain.item(), abs=1e-6)


def test_shapes_gradients_and_queries_asked_alone():
    sampler = EpisodeSampler(known_dataset(), "train", 4, 2, 1, 3, seed=0)
    images, labels = sampler.sample_rows()
    model = AttentionLearner(encoder="none")
    before = images.clone(), labels.clone()
    logits = model(images, labels)
    assert logits.shape == (3, 3, 4, 4) and torch.equal(images, before[0]) and torch.equal(labels, before[1])
    query_loss(logits, labels).backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert used == {name for name, _ in model.named_parameters()}
    other = labels.clone()
    other[:, -1] = torch.rand(3, 4, 4)
    assert torch.equal(model(images, other), model(images, labels))  # no query's label is looked at
    swapped = images.clone()
    swapped[:, -1, 1:] = 1.0
    assert torch.allclose(model(swapped, labels)[:, -1, 0], model(images, labels)[:, -1, 0], atol=1e-6)


def test_features_encoded_once_give_the_same_accuracies(monkeypatch):
    sampler = EpisodeSampler(known_dataset(), "test", 4, 2, 1, 25, seed=0)
    model = AttentionLearner(layers=1).eval()
    plain = evaluate(model, sampler, 100)[0]
    assert memory.features_once(model, sampler, 100).shape == (600, 64)
    monkeypatch.setattr(script, "features_once", lambda *_: None)
    assert torch.equal(evaluate(model, sampler, 100)[0], plain)
    assert memory.features_once(model, sampler, 10) is None  # 120 images of 600
    distorted = EpisodeSampler(known_dataset(), "test", 4, 2, 1, 25, seed=0, jitter=0.1)
    assert memory.features_once(model, distorted, 100) is None
    assert memory.features_once(AttentionLearner(encoder="none"), sampler, 100) is None


# ------------------------------------------------------------------------------ the whole script


def run(tmp_path, name, *flags):
    return script.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", name, *flags])


def test_a_smoke_run_leaves_its_figures(tmp_path):
    metrics = run(tmp_path, "a", "--num_classes", "5")
    assert metrics["test_accuracy"] == metrics["test_accuracy_alone"] > 0.5  # it starts at the nearest neighbour
    tags = EventAccumulator(str(tmp_path / "a"), size_guidance={"images": 0}).Reload().Tags()["images"]
    assert sorted(tags) == ["attention", "episode"]
    flags = json.loads((tmp_path / "a" / "flags.json").read_text())["flags"]
    assert flags["encoder"] == "conv4" and flags["shared_classes"] == 20 and flags["encoder_rate"] == 0.1
    more = ["--test", "--checkpoint", str(tmp_path / "a"), "--num_test_tasks", "20"]
    assert script.main([*more, "--num_classes", "9", "--num_shot", "3"])["N"] == 9  # more than it has learned
    assert script.main(more)["test_accuracy"] == metrics["test_accuracy"]
    assert iio.imread(tmp_path / "a" / "attention_glyphs.png").shape[2] == 4


@pytest.mark.parametrize(
    "flags",
    [
        "--encoder none --encoder_rate 0 --shared_classes 0 --num_layers 1",
        "--encoder strided --num_shot 2 --heads 2 --shift 0 --jitter 0 --schedule constant --clip 9",
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    short = ["--train_steps", "2", "--eval_freq", "1", "--meta_batch_size", "2"]
    metrics = run(tmp_path, "a", *flags.split(), *short)
    assert 0 <= metrics["test_accuracy"] <= 1 and math.isfinite(metrics["ci95"])


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    """Stopped in the middle (here by an error in the eighth step) and resumed: the same parameters."""
    whole = run(tmp_path, "whole")
    real, calls = script.nn.utils.clip_grad_norm_, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script.nn.utils, "clip_grad_norm_", fails)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "part")
    resumed = script.main(["--resume", str(tmp_path / "part")])
    states = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "part")]
    assert states[0]["step"] == states[1]["step"] == 10
    objects = [state["objects"] for state in states]
    assert "encoder_optimizer" in objects[0] and "encoder_schedule" in objects[0]
    assert all(torch.equal(objects[1]["model"][k], v) for k, v in objects[0]["model"].items())
    assert torch.equal(objects[0]["sampler"]["generator"], objects[1]["sampler"]["generator"])
    assert resumed["test_accuracy"] == whole["test_accuracy"]


BAD_FLAGS = {
    "--heads 0": "--heads",
    "--heads 3": "--heads 3 does not divide",
    "--encoder none": "--encoder_rate 0.1 needs an encoder",
    "--encoder_rate -1": "--encoder_rate",
    "--image_size 32": "--image_size 32",
    "--num_classes 61": "--shared_classes 60 is less than --num_classes 61",
    "--shift 2": "--shift",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, capsys, tmp_path):
    refused_in_one_line(script.main, ["--log_dir", str(tmp_path), *flags.split()], BAD_FLAGS[flags], capsys)
    assert list(tmp_path.iterdir()) == []


def test_more_heads_are_not_the_runs(tmp_path):
    run(tmp_path, "a", "--train_steps", "2", "--eval_freq", "2")
    for how in (["--test", "--checkpoint"], ["--resume"]):
        with pytest.raises(script.UserError, match="--heads 2 is not the run's 4"):
            script.main([*how, str(tmp_path / "a"), "--heads", "2"])


@pytest.mark.parametrize(("C", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_the_picture_of_attention_is_as_dark_as_the_weights(C, dtype):
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]], dtype=dtype)
    figure = memory.attention_figure(torch.ones(3, C, 28, 28), torch.ones(2, C, 28, 28), weights)
    (axes,) = figure.axes
    labels = ["query", "100 %", "0 %", "0 %", "query", "0 %", "25 %", "75 %"]
    assert [text.get_text() for text in axes.texts] == labels
    shown = axes.images[0].get_array()
    for text, share in zip(axes.texts, [1, 1, 0, 0, 1, 0, 0.25, 0.75], strict=True):
        x, y = text.get_position()
        assert shown[int(y) + 16, int(x)] == pytest.approx(1 - (0.15 + 0.85 * share))  # within the image below its text
