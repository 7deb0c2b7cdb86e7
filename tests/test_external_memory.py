"""The external memory: the equations against plain loops, gradients, late labels, whole runs."""

from fewshot.learners.memory import accuracy_by_sight, one_step_late
from fewshot.tasks.episodes import EpisodeSampler

import math

import imageio.v3 as iio
import pytest
import torch
from conftest import known_dataset, refused_in_one_line, stirred
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import external_memory as script
from external_memory import ExternalMemory, SequenceLearner, evaluate, least_used

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_test_tasks", "20", "--num_val_tasks", "20"]


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
    after, weights = script.write(table, read_weights, usage, keys, shut)
    assert after.tolist() == [[[0, 1], [30, 40], [4, 5], [10, 20]]]
    assert weights.tolist() == [[[0, 0, 0, 1], [0, 1, 0, 0]]]
    # Gates at one: the keys are added where the heads have just read; the two rows are emptied nevertheless.
    after, weights = script.write(table, read_weights, usage, keys, wide)
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
    got, weights = script.read(table, keys, torch.tensor([[50.0]]))
    assert torch.allclose(got, torch.tensor([[[6.0, 8.0]]]), atol=1e-4) and weights[0, 0].argmax() == 2
    _, flat = script.read(table, keys, torch.tensor([[1.0]]))
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
    model = SequenceLearner(5, 8, table=False)
    accuracies, loss = evaluate(model, sampler, 300)
    again, _ = evaluate(model, sampler, 300)
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
        return logits

    model.forward = answers
    accuracies, _ = evaluate(model, sampler, 100)
    assert (accuracies[:, 1:] == 1).all() and accuracies[:, 0].mean() < 0.5


# ------------------------------------------------------------------------------- the learner


@pytest.mark.parametrize("table, encoder", [(True, "none"), (True, "conv4"), (False, "none"), (False, "strided")])
def test_every_parameter_gets_a_gradient(table, encoder):
    sampler = EpisodeSampler(known_dataset(), "train", 4, 2, 1, 3, seed=0)
    images, labels = sampler.sample_rows()
    model = SequenceLearner(4, 16, table, encoder=encoder)
    sequence, targets, _ = one_step_late(model.encode(images), labels, sampler.generator)
    logits = model(sequence)
    assert logits.shape == (3, 12, 4)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_baseline_is_two_lstm_layers_that_keep_what_they_hold():
    layers = SequenceLearner(5, 16, table=False).layers
    assert [(type(layer).__name__, layer.hidden_size) for layer in layers] == [("LSTM", 16), ("LSTM", 16)]
    for layer in layers:
        assert (layer.bias_ih_l0[16:32] > 0.7).all() and (layer.bias_ih_l0[:16].abs() <= 0.25).all()


# ------------------------------------------------------------------------------ the whole script


def run(tmp_path, name, *flags):
    return script.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", name, *flags])


def pictures(folder):
    return sorted(EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Tags()["images"])


def test_a_smoke_run_leaves_its_figures(tmp_path):
    metrics = run(tmp_path, "e")
    assert len(metrics["accuracy_by_sight"]) == len(metrics["ci95_by_sight"]) == 4
    assert metrics["test_accuracy"] == pytest.approx(sum(metrics["accuracy_by_sight"]) / 4)
    assert pictures(tmp_path / "e") == ["accuracy_by_sight", "memory"]
    again = script.main(["--test", "--checkpoint", str(tmp_path / "e"), "--num_test_tasks", "20"])
    assert again["accuracy_by_sight"] == metrics["accuracy_by_sight"]
    assert iio.imread(tmp_path / "e" / "external_memory_glyphs.png").shape[2] == 4


@pytest.mark.parametrize(
    "flags",
    [
        "--no_table --num_shot 2 --clip 9 --schedule constant",
        "--heads 2 --dtype bfloat16 --shift 0 --jitter 0",
        "--num_shot 1 --encoder conv4",
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    short = ["--train_steps", "2", "--eval_freq", "1", "--meta_batch_size", "2"]
    metrics = run(tmp_path, "a", *flags.split(), *short)
    assert 0 <= metrics["test_accuracy"] <= 1 and math.isfinite(metrics["ci95"])
    assert pictures(tmp_path / "a") == ["accuracy_by_sight", "memory"][: 1 if "--no_table" in flags else 2]


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
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["objects"] for n in ("whole", "part"))
    assert all(torch.equal(b["model"][k], v) for k, v in a["model"].items())
    assert torch.equal(a["sampler"]["generator"], b["sampler"]["generator"])
    assert resumed["test_accuracy"] == whole["test_accuracy"]


BAD_FLAGS = {
    "--heads 0": "--heads",
    "--num_shot 20": "--num_shot 20",
    "--encoder conv4 --image_size 32": "--image_size 32",
    "--shared_classes 10": "--shared_classes",
    "--shift 2": "--shift",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, capsys, tmp_path):
    refused_in_one_line(script.main, ["--log_dir", str(tmp_path), *flags.split()], BAD_FLAGS[flags], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_table_is_none_without(tmp_path):
    run(tmp_path, "a", "--train_steps", "2", "--eval_freq", "2")
    for how in (["--test", "--checkpoint"], ["--resume"]):
        with pytest.raises(script.UserError, match="--no_table True is not the run's False"):
            script.main([*how, str(tmp_path / "a"), "--no_table"])
