"""Attention and the external memory: who sees whom, the equations against plain loops, gradients, whole runs."""

import json
import math

import imageio.v3 as iio
import pytest
import torch
import torch.nn.functional as F
from conftest import known_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hw1
import memory
from hw1 import MANN, evaluate, evaluate_sights, large_task_loss
from load_data import EpisodeSampler
from memory import CausalAttention, ExternalMemory, accuracy_by_sight, least_used, one_step_late, visible

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_test_tasks", "20", "--num_val_tasks", "20"]
B, K, N, D = 2, 3, 4, 8
S, T = K * N, (K + 1) * N


def stirred(module, scale=0.3, seed=0):
    """The module in float64, no parameter at a special value: zero-started layers would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


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


# ---------------------------------------------------------------------------- external memory


def tiny(inputs=5, **options):
    return stirred(ExternalMemory(inputs, hidden=6, rows=7, width=3, heads=2, **options))


def plain_memory(m, sequence):
    """Outputs of one sequence [T, inputs], equation by equation, in loops over heads and rows."""
    R, W, H, hidden = m.rows, m.width, m.heads, m.keys.in_features
    table = [[0.0] * W for _ in range(R)]
    w_r, w_u = [[0.0] * R for _ in range(H)], [0.0] * R
    r, h, c = [0.0] * (H * W), torch.zeros(hidden).double(), torch.zeros(hidden).double()
    outputs, traces = [], []
    for x in sequence:
        past = torch.cat([h, torch.tensor(r, dtype=torch.float64)])
        gates = m.into.weight @ x + m.into.bias + m.back.weight @ past
        i, f, g, o = gates.split(hidden)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        k = (m.keys.weight @ h + m.keys.bias).tanh().view(H, W).tolist()
        alpha = (m.gate.weight @ h + m.gate.bias).tolist()
        order = sorted(range(R), key=lambda row: (w_u[row], row))[:H]  # eq. 6
        w_w = [[0.0] * R for _ in range(H)]
        for head in range(H):
            sigma = 1 / (1 + math.exp(-alpha[head]))
            for row in range(R):
                w_w[head][row] = sigma * w_r[head][row] + (1 - sigma) * float(row == order[head])  # eq. 7
        for row in order:
            table[row] = [0.0] * W
        for row in range(R):
            for j in range(W):
                table[row][j] += sum(w_w[head][row] * k[head][j] for head in range(H))  # eq. 8
        r = []
        for head in range(H):
            cosines = []
            for row in range(R):  # eq. 2
                lengths = max(math.hypot(*k[head]), 1e-6) * max(math.hypot(*table[row]), 1e-6)
                cosines.append(sum(a * b for a, b in zip(k[head], table[row], strict=True)) / lengths)
            e = [math.exp(m.sharpness[head].item() * value) for value in cosines]
            w_r[head] = [value / sum(e) for value in e]  # eq. 3
            r += [sum(w_r[head][row] * table[row][j] for row in range(R)) for j in range(W)]  # eq. 4
        for row in range(R):  # eq. 5
            w_u[row] = m.decay * w_u[row] + sum(w_r[head][row] + w_w[head][row] for head in range(H))
        outputs.append(torch.cat([h, torch.tensor(r, dtype=torch.float64)]))
        traces.append((torch.tensor(w_r), torch.tensor(w_w)))
    return torch.stack(outputs), traces


@torch.no_grad()
def test_memory_equations_against_a_plain_loop():
    m, trace = tiny(), []
    sequence = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs, _ = m(sequence, trace=trace)
    for b in range(2):
        expected, weights = plain_memory(m, sequence[b])
        assert torch.allclose(outputs[b], expected, atol=1e-10)
        for (read, written), (expected_read, expected_written) in zip(trace, weights, strict=True):
            assert torch.allclose(read[b].float(), expected_read, atol=1e-6)
            assert torch.allclose(written[b].float(), expected_written, atol=1e-6)


def test_a_sequence_in_two_parts_is_the_sequence():
    m = tiny()
    sequence = torch.randn(3, 9, 5, dtype=torch.float64)
    whole, end = m(sequence)
    first, state = m(sequence[:, :4])
    second, again = m(sequence[:, 4:], state)
    # Products of other sizes may be summed in another order.
    assert torch.allclose(torch.cat([first, second], dim=1), whole, rtol=1e-10, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(end, again, strict=True))
    assert whole.shape == (3, 9, m.units) and all(s.shape[:2] == (1, 3) for s in end)


def test_least_used_by_hand():
    usage = torch.tensor([[3.0, 0.0, 2.0, 0.0, 1.0], [0.5, 0.4, 0.3, 0.2, 0.1]])
    rows = least_used(usage, 3).argmax(-1)
    assert rows.tolist() == [[1, 3, 4], [4, 3, 2]]  # of two unused rows the first comes first


def test_writes_go_to_the_least_used_rows_of_a_hand_made_sequence():
    """Gates at zero: each head writes its key over the least used row, where the row before held something else."""
    usage = torch.tensor([[0.9, 0.1, 0.8, 0.0]])
    table = torch.arange(8.0).view(1, 4, 2)
    keys = torch.tensor([[[10.0, 20.0], [30.0, 40.0]]])
    read_weights = torch.full((1, 2, 4), 0.25)
    shut, wide = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    after, weights = memory.write(table, read_weights, usage, keys, shut)
    assert after.tolist() == [[[0, 1], [30, 40], [4, 5], [10, 20]]]
    assert weights.tolist() == [[[0, 0, 0, 1], [0, 1, 0, 0]]]
    # Gates at one: the keys are added where the heads have just read; the two rows are emptied nevertheless.
    after, weights = memory.write(table, read_weights, usage, keys, wide)
    assert torch.equal(weights, read_weights)
    assert after.tolist() == [[[10, 16], [10, 15], [14, 20], [10, 15]]]


def test_used_rows_survive_and_usage_fades():
    """Seven rows, two heads that only write: steps 1 to 3 fill six rows, step 4 takes the seventh and the oldest."""
    m = tiny(decay=0.5)
    with torch.no_grad():
        m.gate.weight.zero_(), m.gate.bias.fill_(-50.0)
        m.sharpness.zero_()  # reads are even: the usage ranks by writes alone
        trace = []
        m(torch.randn(1, 4, 5, dtype=torch.float64), trace=trace)
    assert [written[0].argmax(-1).tolist() for _, written in trace] == [[0, 1], [2, 3], [4, 5], [6, 0]]


def test_what_is_read_is_what_was_written():
    """One row holds the key alone: a sharp read of that key gives the row back."""
    keys = torch.tensor([[[3.0, 4.0]]])
    table = torch.zeros(1, 5, 2)
    table[0, 2] = torch.tensor([6.0, 8.0])
    got, weights = memory.read(table, keys, torch.tensor([[50.0]]))
    assert torch.allclose(got, torch.tensor([[[6.0, 8.0]]]), atol=1e-4) and weights[0, 0].argmax() == 2
    _, flat = memory.read(table, keys, torch.tensor([[1.0]]))
    assert weights.sum().item() == pytest.approx(1) and flat[0, 0, 2].item() == pytest.approx(math.e / (math.e + 4))


def test_finite_differences_of_the_memory():
    m = stirred(ExternalMemory(3, hidden=4, rows=5, width=2, heads=2), scale=0.5)
    sequence = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: m(s)[0], sequence)
    parameters = list(m.parameters())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(m(sequence)[0].square().sum(), parameters))
    assert torch.autograd.gradcheck(lambda *_: m(sequence.detach())[0], parameters)


def test_the_memory_sees_no_later_item():
    m = tiny()
    sequence = torch.randn(1, 6, 5, dtype=torch.float64, requires_grad=True)
    outputs, _ = m(sequence)
    for t in range(6):
        (gradient,) = torch.autograd.grad(outputs[0, t].sum(), sequence, retain_graph=True)
        assert ((gradient[0] != 0).any(dim=1) == (torch.arange(6) <= t)).all()


# --------------------------------------------------------------- sequences with late labels


def test_late_labels_by_their_images():
    """Images that say their class: each stands beside the label of the one before, sights count up."""
    sampler = EpisodeSampler(known_dataset(), "train", 5, 9, 1, 40, seed=3)
    images, labels = sampler.sample_rows()
    sequence, targets, sights = one_step_late(images, labels, sampler.generator)
    assert sequence.shape == (40, 50, 784 + 5) and targets.shape == sights.shape == (40, 50)
    assert (sequence[:, 0, 784:] == 0).all()
    assert torch.equal(sequence[:, 1:, 784:].argmax(-1), targets[:, :-1]) and (sequence[:, 1:, 784:].sum(-1) == 1).all()
    classes = (sequence[..., 0] * 255).round().long()
    for b in range(40):
        pairs = set(zip(classes[b].tolist(), targets[b].tolist(), strict=True))
        assert len(pairs) == 5 == len({c for c, _ in pairs}) == len({y for _, y in pairs})  # one label a class
        seen = [0] * 5
        for y, sight in zip(targets[b].tolist(), sights[b].tolist(), strict=True):
            assert sight == seen[y]
            seen[y] += 1
        assert seen == [10] * 5
    assert (targets[:, 0].bincount(minlength=5) > 0).all()  # shuffled
    images_of = sequence[..., :2].mul(255).round().long()
    assert all(len({tuple(x) for x in row.tolist()}) == 50 for row in images_of)  # no image twice


def test_accuracy_by_sight_by_hand():
    sights = torch.tensor([[0, 0, 1, 1, 2, 2]])
    right = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0, 1.0]])
    assert accuracy_by_sight(right, sights, 3).tolist() == [[0.0, 0.5, 1.0]]


def test_evaluation_by_sight_knows_guessing_from_knowing():
    sampler = EpisodeSampler(known_dataset(), "test", 5, 3, 1, 50, seed=9)
    torch.manual_seed(0)
    model = MANN(5, 4, 8, head="linear")
    accuracies, loss = evaluate_sights(model, sampler, 300)
    again, _ = evaluate_sights(model, sampler, 300)
    assert accuracies.shape == (300, 4) and torch.equal(accuracies, again) and model.training
    assert loss == pytest.approx(math.log(5), abs=0.1)
    assert (accuracies.mean(0) - 0.2).abs().max() < 5 * 0.4 / math.sqrt(300 * 5)

    def answers(sequence):  # knows a class by its first pixel once its label was told
        logits = torch.zeros(*sequence.shape[:2], 5)
        for b, row in enumerate(sequence):
            told = {}
            for t, item in enumerate(row):
                if t:
                    told[row[t - 1, 0].item()] = item[784:]
                if item[0].item() in told:
                    logits[b, t] = told[item[0].item()]
        return logits, []

    model.read = answers
    accuracies, _ = evaluate_sights(model, sampler, 100)
    assert (accuracies[:, 1:] == 1).all() and accuracies[:, 0].mean() < 0.5


# -------------------------------------------------------------------------------- in hw1.py


def test_a_large_task_changes_places_when_it_has_one_shot():
    """With one shot the loss is the mean of the two questions; its gradient reaches both rows."""
    model = MANN(6, 2, 8, memory="attention", num_layers=1, dim_input=D)
    features, labels = (x[:1].float() for x in episode(K=1, N=6))
    there = model.loss_function(model.classify(features, labels), labels)
    order = labels[0, 1].argmax(-1).argsort()
    back = torch.stack([features[:, 1, order], features[:, 0]], dim=1)
    in_order = torch.eye(6).expand(1, 2, 6, 6)
    expected = (there + model.loss_function(model.classify(back, in_order), in_order)) / 2
    assert large_task_loss(model, features, labels).item() == pytest.approx(expected.item(), abs=1e-6)
    features, labels = (x[:1].float() for x in episode(K=2, N=6))
    plain = model.loss_function(model.classify(features, labels), labels)
    assert large_task_loss(model, features, labels).item() == pytest.approx(plain.item(), abs=1e-6)


@pytest.mark.parametrize("kind, options", [("attention", {}), ("external", {}), ("external", {"encoder": "conv4"})])
def test_shapes_gradients_and_alone(kind, options):
    sampler = EpisodeSampler(known_dataset(), "train", 4, 2, 1, 3, seed=0)
    images, labels = sampler.sample_rows()
    model = MANN(4, 3, 16, memory=kind, **options)
    before = images.clone(), labels.clone()
    preds = model(images, labels)
    assert preds.shape == (3, 3, 4, 4) and torch.equal(images, before[0]) and torch.equal(labels, before[1])
    model.loss_function(preds, labels).backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert used == {name for name, _ in model.named_parameters()}
    model.eval()
    together, alone = model(images, labels)[:, -1], model.forward_alone(images, labels)
    assert alone.shape == (3, 4, 4) and torch.allclose(together[:, 0], alone[:, 0], atol=1e-5)
    assert torch.allclose(together, alone, atol=1e-5) == (kind == "attention")
    other = labels.clone()
    other[:, -1] = torch.rand(3, 4, 4)
    assert torch.equal(model(images, other), model(images, labels))  # no query's label is looked at
    swapped = images.clone()
    swapped[:, -1, 1:] = 1.0
    assert torch.allclose(model.forward_alone(swapped, labels)[:, 0], alone[:, 0], atol=1e-6)


def test_features_encoded_once_give_the_same_accuracies(monkeypatch):
    sampler = EpisodeSampler(known_dataset(), "test", 4, 2, 1, 25, seed=0)
    model = MANN(4, 3, 16, encoder="conv4", memory="attention", num_layers=1).eval()
    plain = [evaluate(model, sampler, 100, alone)[0] for alone in (False, True)]
    assert hw1.features_once(model, sampler, 100).shape == (600, 64)
    monkeypatch.setattr(hw1, "features_once", lambda *_: None)
    slow = [evaluate(model, sampler, 100, alone)[0] for alone in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(plain, slow, strict=True))
    monkeypatch.undo()
    assert hw1.features_once(model, sampler, 10) is None  # 120 images of 600
    distorted = EpisodeSampler(known_dataset(), "test", 4, 2, 1, 25, seed=0, jitter=0.1)
    assert hw1.features_once(model, distorted, 100) is None
    assert hw1.features_once(MANN(4, 3, 16), sampler, 100) is None


def run(tmp_path, name, *flags):
    return hw1.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", name, *flags])


def pictures(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Tags()["images"]


def test_smoke_runs_leave_their_figures(tmp_path):
    metrics = run(tmp_path, "a", "--memory", "attention", "--num_classes", "5")
    assert metrics["test_accuracy"] == metrics["test_accuracy_alone"] > 0.5  # it starts at the nearest neighbour
    assert sorted(pictures(tmp_path / "a")) == ["attention", "episode"]
    flags = json.loads((tmp_path / "a" / "flags.json").read_text())["flags"]
    assert flags["encoder"] == "conv4" and flags["shared_classes"] == 20 and flags["encoder_rate"] == 0.1
    more = ["--memory", "attention", "--test", "--checkpoint", str(tmp_path / "a"), "--num_test_tasks", "20"]
    assert hw1.main([*more, "--num_classes", "9", "--num_shot", "3"])["N"] == 9  # more than it has learned
    assert hw1.main(more)["test_accuracy"] == metrics["test_accuracy"]
    assert iio.imread(tmp_path / "a" / "attention_glyphs.png").shape[2] == 4

    metrics = run(tmp_path, "e", "--memory", "external")
    assert len(metrics["accuracy_by_sight"]) == len(metrics["ci95_by_sight"]) == 4
    assert metrics["test_accuracy"] == pytest.approx(sum(metrics["accuracy_by_sight"]) / 4)
    assert sorted(pictures(tmp_path / "e")) == ["accuracy_by_sight", "memory"]
    again = hw1.main(["--memory", "external", "--test", "--checkpoint", str(tmp_path / "e"), "--num_test_tasks", "20"])
    assert again["accuracy_by_sight"] == metrics["accuracy_by_sight"]
    assert iio.imread(tmp_path / "e" / "external_glyphs.png").shape[2] == 4


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--memory",
            "attention",
            "--encoder",
            "none",
            "--encoder_rate",
            "0",
            "--shared_classes",
            "0",
            "--num_layers",
            "1",
        ],
        [
            "--memory",
            "attention",
            "--encoder",
            "strided",
            "--num_shot",
            "2",
            "--heads",
            "2",
            "--shift",
            "0",
            "--jitter",
            "0",
        ],
        [
            "--memory",
            "external",
            "--protocol",
            "support",
            "--num_shot",
            "1",
            "--encoder",
            "conv4",
            "--shared_classes",
            "6",
        ],
        ["--protocol", "sequence", "--num_shot", "2", "--heads", "1"],
        ["--memory", "external", "--heads", "2", "--dtype", "bfloat16"],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    short = ["--train_steps", "2", "--eval_freq", "1", "--meta_batch_size", "2"]
    metrics = hw1.main([*SMOKE, "--log_dir", str(tmp_path), *flags, *short])
    assert 0 <= metrics["test_accuracy"] <= 1 and math.isfinite(metrics["ci95"])


@pytest.mark.parametrize("kind", ["attention", "external"])
def test_resume_is_bit_exact(kind, tmp_path, monkeypatch):
    """Stopped in the middle (here by an error after the fifth step's checkpoint) and resumed: the same parameters."""
    run(tmp_path, "whole", "--memory", kind)
    real, calls = hw1.nn.utils.clip_grad_norm_, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(hw1.nn.utils, "clip_grad_norm_", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "part", "--memory", kind)
    monkeypatch.setattr(hw1.nn.utils, "clip_grad_norm_", real)
    resumed = hw1.main(["--resume", str(tmp_path / "part")])
    states = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "part")]
    assert states[0]["step"] == states[1]["step"] == 10
    objects = [state["objects"] for state in states]
    assert ("encoder_optimizer" in objects[0]) == (kind == "attention")
    assert all(torch.equal(objects[1]["model"][k], v) for k, v in objects[0]["model"].items())
    assert torch.equal(objects[0]["sampler"]["generator"], objects[1]["sampler"]["generator"])
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert resumed["test_accuracy"] == whole["test_accuracy"]


BAD_FLAGS = {
    "--memory elephant": "--memory",
    "--memory": "--memory",
    "--heads 0": "--heads",
    "--memory attention --heads 3": "--heads 3 does not divide",
    "--memory attention --protocol sequence": "--protocol sequence",
    "--protocol sequence --shared_classes 10": "--protocol sequence",
    "--encoder_rate 0.1": "--encoder_rate 0.1 needs an encoder",
    "--encoder_rate -1 --encoder strided": "--encoder_rate",
    "--memory attention --image_size 32": "--image_size 32",
    "--memory attention --num_classes 61": "--shared_classes 60 is less than --num_classes 61",
    "--memory external --num_shot 20": "--num_shot 20",
    "--shift 2": "--shift",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        hw1.experiment.run_script(lambda: hw1.main(["--dataset", "glyphs", "--log_dir", str(tmp_path), *flags.split()]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and BAD_FLAGS[flags] in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_another_memorys(tmp_path, capsys):
    run(tmp_path, "a", "--memory", "attention")
    for flags in (["--memory", "external", "--test", "--checkpoint"], ["--memory", "external", "--resume"]):
        with pytest.raises(hw1.UserError, match="--memory external is not the run's attention"):
            hw1.main([*flags, str(tmp_path / "a")])


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
