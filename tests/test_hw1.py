"""The MANN: shapes, what it may and may not see, its loss, its train loop, exact resume."""

from fewshot.tasks.episodes import EpisodeSampler, deal_tasks

import json
import math
import random
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, known_dataset, one_line_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hw1
from hw1 import MANN, Recurrent, evaluate
from load_data import DataGenerator
from studies import warm

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu"]


def episodes(B=3, K=2, N=4, seed=0):
    return EpisodeSampler(known_dataset(), "train", N, K, 1, B, seed).sample_rows()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cell": "gru"},
        {"cell": "rnn"},
        {"num_layers": 1},
        {"num_layers": 3},
        {"head": "linear"},
        {"forget_bias": 1.0},
        {"encoder": "strided"},
        {"encoder": "conv4", "head": "linear", "cell": "gru"},
        {"logit_scale": 5.0},
    ],
)
def test_shapes_and_gradients(options):
    images, labels = episodes()
    before = images.clone(), labels.clone()
    encoder = options.pop("encoder", "none")
    model = MANN(4, 3, 16, Recurrent(**options), encoder)
    preds = model(images, labels)
    assert preds.shape == (3, 3, 4, 4) and preds.dtype == torch.float32
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])  # inputs are not modified
    model.loss_function(preds, labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.forward_alone(images, labels).shape == (3, 4, 4)


def test_default_is_the_courses_network():
    model = MANN(5, 2, 128)
    sizes = [(5 + 784, 128), (128, 5)]
    expected = sum(4 * h * (i + h) + 8 * h for i, h in sizes)  # four gates: weights and two biases
    assert sum(p.numel() for p in model.parameters()) == expected
    assert [type(layer).__name__ for layer in model.layers] == ["LSTM", "LSTM"]


@pytest.mark.parametrize("encoder", ["none", "strided"])
def test_query_labels_cannot_influence_the_predictions(encoder):
    images, labels = episodes()
    model = MANN(4, 3, 16, encoder=encoder).eval()
    other = labels.clone()
    other[:, -1] = torch.rand(3, 4, 4)
    assert torch.equal(model(images, labels), model(images, other))
    assert torch.equal(model.forward_alone(images, labels), model.forward_alone(images, other))
    other = labels.clone()
    other[:, 0] = labels[:, 0].roll(1, dims=-1)
    assert not torch.allclose(model(images, labels)[:, -1], model(images, other)[:, -1], atol=1e-6)


def test_only_the_query_row_counts_in_the_loss():
    _, labels = episodes()
    preds = torch.randn(3, 3, 4, 4, requires_grad=True)
    MANN(4, 3, 8).loss_function(preds, labels).backward()
    assert torch.equal(preds.grad[:, :-1], torch.zeros(3, 2, 4, 4))
    assert (preds.grad[:, -1] != 0).all()


def test_loss_by_hand():
    # Two tasks, N = 2. The right logits lead by log 3 (probability 3/4) in three queries and trail in one.
    lead = math.log(3.0)
    labels = torch.eye(2).expand(2, 2, 2, 2).clone()
    preds = torch.full((2, 2, 2, 2), 7.0)
    preds[:, -1] = lead * torch.eye(2)
    preds[1, -1, 1] = torch.tensor([lead, 0.0])
    expected = (3 * math.log(4 / 3) + math.log(4)) / 4
    assert MANN(2, 2, 8).loss_function(preds, labels).item() == pytest.approx(expected, abs=1e-6)


def test_alone_equals_together_for_the_first_query_only():
    images, labels = episodes(B=6)
    model = MANN(4, 3, 16, Recurrent(num_layers=3, head="linear")).double().eval()
    together = model(images.double(), labels.double())[:, -1]
    alone = model.forward_alone(images.double(), labels.double())
    assert torch.allclose(together[:, 0], alone[:, 0], atol=1e-12)
    assert not torch.allclose(together[:, 1:], alone[:, 1:], atol=1e-6)
    # Asked alone, a query does not depend on what the other queries are.
    swapped = images.clone()
    swapped[:, -1, 1:] = 1.0
    changed = model.forward_alone(swapped.double(), labels.double())
    assert torch.equal(changed[:, 0], alone[:, 0]) and not torch.allclose(changed[:, 1], alone[:, 1])


@pytest.mark.parametrize("N", [2, 5])
@pytest.mark.parametrize("blind", [False, True])
def test_untrained_or_label_blind_model_scores_one_in_n(N, blind):
    sampler = EpisodeSampler(known_dataset(), "test", N, 1, 1, 500, seed=1)
    torch.manual_seed(0)
    model = MANN(N, 2, 16)
    if blind:  # trained, but never shown a label
        for _ in range(30):
            images, labels = sampler.sample_rows()
            preds = model(images, torch.zeros_like(labels))
            loss = model.loss_function(preds, labels)
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= p.grad
                    p.grad = None
        forward = model.forward
        model.forward = lambda images, labels: forward(images, torch.zeros_like(labels))
    tasks = 5000
    accuracy, _ = evaluate(model, sampler, tasks)
    assert len(accuracy) == tasks
    sigma = max(accuracy.std().item() / math.sqrt(tasks), 1e-6)  # one class for all queries: 1/N exactly
    assert abs(accuracy.mean().item() - 1 / N) < 5 * sigma


def test_dealt_tasks_are_proper_episodes():
    images, labels = EpisodeSampler(known_dataset(), "train", 12, 2, 1, 1, seed=5).sample_rows()
    B, N = 3000, 4
    dealt, one_hot = deal_tasks(images, labels, B, N, torch.Generator().manual_seed(1))
    assert dealt.shape == (B, 3, N, 784) and one_hot.shape == (B, 3, N, N)
    assert torch.equal(one_hot[:, :2], torch.eye(N).expand(B, 2, N, N))
    classes, drawings = ((dealt[..., i] * 255).round().long() for i in (0, 1))
    assert torch.equal(classes[:, 0], classes[:, 1]) and (drawings[:, 0] != drawings[:, 1]).all()
    assert torch.equal(classes[:, 0].gather(1, one_hot[:, 2].argmax(-1)), classes[:, 2])
    assert (classes[:, 0].sort(1).values.diff(dim=1) > 0).all()
    counts = classes[:, 0].flatten().bincount()
    counts = counts[counts > 0]
    assert len(counts) == 12 and (counts - B * N / 12).abs().max() < 5 * math.sqrt(B * N / 12)
    order = one_hot[:, 2].argmax(-1)[:, 0].bincount()
    assert (order - B / N).abs().max() < 5 * math.sqrt(B / N)


def test_evaluate_is_the_mean_over_the_fixed_tasks():
    sampler = EpisodeSampler(known_dataset(), "test", 3, 1, 1, 64, seed=9)
    model = MANN(3, 2, 8)
    first, _ = evaluate(model, sampler, 100)
    again, _ = evaluate(model, sampler, 100)
    assert torch.equal(first, again) and len(first) == 100 and model.training
    sampler.reset()
    images, labels = sampler.sample_rows()
    model.eval()
    right = model(images, labels)[:, -1].argmax(-1) == labels[:, -1].argmax(-1)
    assert torch.equal(first[:64], right.float().mean(1))


@pytest.mark.thorough
def test_the_courses_own_loop_learns():
    """Course code that imports only DataGenerator: a DataLoader, an own loop; one-shot memory of flags."""
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(DataGenerator(2, 2, "train", config={"dataset": "glyphs"}), batch_size=64)
    model = MANN(2, 2, 64, Recurrent(head="linear"))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    losses = []
    for step, (images, labels) in enumerate(loader):
        preds = model(images, labels)
        loss = model.loss_function(preds, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 300:
            break
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert sum(losses[-50:]) / 50 < 0.5


# ------------------------------------------------------------------------------ the whole script


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def test_smoke_run_leaves_a_complete_run_folder(tmp_path, monkeypatch, capsys):
    metrics = hw1.main([*SMOKE, "--num_classes", "2", "--log_dir", str(tmp_path), "--run_name", "a"])
    folder = tmp_path / "a"
    names = {p.name for p in folder.iterdir() if not p.name.startswith("events")}
    assert names == {"flags.json", "data.json", "checkpoint.pt", "best.pt", "metrics.json"}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    only_in_file = {"accuracies", "curves", "flags", "versions"}
    assert printed == {k: v for k, v in metrics.items() if k not in only_in_file}
    assert len(metrics["accuracies"]) == metrics["num_test_tasks"] and metrics["flags"]["num_classes"] == 2
    assert [step for step, _ in metrics["curves"]["Accuracy/val"]] == [20, 40]
    for key in (
        "script",
        "dataset",
        "split",
        "N",
        "K",
        "Q",
        "steps",
        "test_accuracy",
        "ci95",
        "num_test_tasks",
        "train_seconds",
        "tasks_per_second",
        "device",
        "seed",
        "test_accuracy_alone",
    ):
        assert key in metrics
    assert metrics["dataset"] == "glyphs" and metrics["steps"] == 40
    logged = events(folder)
    for tag in ("Loss/train", "Loss/test", "Accuracy/test", "Loss/val", "Accuracy/val", "Time/tasks_per_second"):
        assert [e.step for e in logged.Scalars(tag)] == [20, 40]
    assert logged.Tags()["images"] == ["episode"]
    assert "flags/text_summary" in logged.Tags()["tensors"]
    flags = json.loads((folder / "flags.json").read_text())
    assert flags["flags"]["num_classes"] == 2 and flags["versions"]["torch"] == torch.__version__

    again = hw1.main(["--test", "--checkpoint", str(folder)])
    assert again["test_accuracy"] == metrics["test_accuracy"] and again["N"] == 2
    assert hw1.main(["--test", "--checkpoint", str(folder), "--num_shot", "3", "--num_test_tasks", "50"])["K"] == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--recurrent", "gru", "--num_layers", "3", "--hidden_dim", "8"],
        [
            "--recurrent",
            "rnn",
            "--head",
            "recurrent",
            "--logit_scale",
            "1",
            "--forget_bias",
            "0",
            "--schedule",
            "constant",
            "--clip",
            "0",
        ],
        [
            "--encoder",
            "strided",
            "--meta_batch_size",
            "2",
            "--train_steps",
            "2",
            "--eval_freq",
            "2",
            "--num_test_tasks",
            "8",
            "--num_val_tasks",
            "8",
            "--jitter",
            "0.2",
            "--shared_classes",
            "9",
        ],
        ["--fixed_labels", "--no-rotations", "--split", "lake", "--num_shot", "2", "--random_seed", "7"],
        ["--learning_rate", "1e-5", "--patience", "1", "--num_workers", "4", "--image_caching", "False"],
        ["--dtype", "bfloat16", "--image_size", "32", "--num_test_tasks", "10"],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    metrics = hw1.main([*SMOKE, "--num_classes", "2", "--log_dir", str(tmp_path), *flags])
    assert 0 <= metrics["test_accuracy"] <= 1 and math.isfinite(metrics["ci95"])


def test_deterministic_and_seeded(tmp_path):
    def weights(name, seed):
        hw1.main([*SMOKE, "--num_classes", "2", "--log_dir", str(tmp_path), "--run_name", name, "--random_seed", seed])
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["objects"]["model"]

    a, b, c = weights("a", "1"), weights("b", "1"), weights("c", "2")
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


TRAIN = [
    "--dataset",
    "glyphs",
    "--device",
    "cpu",
    "--num_classes",
    "2",
    "--train_steps",
    "240",
    "--eval_freq",
    "30",
    "--hidden_dim",
    "32",
    "--meta_batch_size",
    "16",
    "--num_val_tasks",
    "100",
    "--num_test_tasks",
    "50",
]


@pytest.fixture(scope="module")
def uninterrupted(run_script, work):
    result = run_script("hw1.py", *TRAIN, "--run_name", "whole")
    assert result.returncode == 0, result.stderr
    return work / "runs" / "whole"


def start(work, name):
    return warm.Process(REPO / "hw1.py", *TRAIN, "--run_name", name, cwd=work)


def wait_for(path, process, seconds=3600):
    deadline = time.time() + seconds
    while not path.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)


def assert_same_run(folder, whole):
    """Bit-identical end state, and one clean TensorBoard curve equal to the uninterrupted run's."""
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, whole))
    assert a["step"] == b["step"] == 240
    for k in b["objects"]["model"]:
        assert torch.equal(a["objects"]["model"][k], b["objects"]["model"][k])
    moments = [state["objects"]["optimizer"]["state"] for state in (a, b)]
    for p, q in zip(moments[0].values(), moments[1].values(), strict=True):
        assert all(torch.equal(p[k], q[k]) for k in q)
    assert torch.equal(a["objects"]["sampler"]["generator"], b["objects"]["sampler"]["generator"])
    for tag in ("Loss/train", "Loss/val", "Accuracy/val", "Loss/test", "Accuracy/test"):
        curve, expected = ([(e.step, e.value) for e in events(f).Scalars(tag)] for f in (folder, whole))
        assert curve == expected, tag
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (folder, whole)]
    assert metrics[0]["test_accuracy"] == metrics[1]["test_accuracy"]


def test_kill_and_resume_is_bit_exact(run_script, work, uninterrupted):
    process = start(work, "killed")
    folder = work / "runs" / "killed"
    wait_for(folder / "checkpoint.pt", process)
    time.sleep(random.random() * 0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run_script("hw1.py", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_saves_between_evaluations(run_script, work, uninterrupted, sent, code):
    name = f"interrupted{code}"
    process = start(work, name)
    folder = work / "runs" / name
    wait_for(folder / "checkpoint.pt", process)
    process.send_signal(sent)
    _, err = process.communicate(timeout=3600)
    if process.returncode != 0:  # it may have finished first
        assert process.returncode == code and "continue with: python " in err and "hw1.py --resume" in err, err
        assert "Traceback" not in err
    result = run_script("hw1.py", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, uninterrupted)


def test_resume_refuses_other_flags_and_other_runs(run_script, work, uninterrupted, tmp_path):
    one_line_error(run_script("hw1.py", "--resume", uninterrupted, "--hidden_dim", "64"), "--hidden_dim 64", "32")
    one_line_error(run_script("hw1.py", "--resume", tmp_path), "--resume", "not a run folder")
    result = run_script("hw1.py", "--test", "--checkpoint", uninterrupted, "--num_classes", "3")
    one_line_error(result, "--num_classes 3 is not the run's 2")


BAD_FLAGS = {
    "--num_classes 1": "--num_classes",
    "--num_shot 0": "--num_shot",
    "--num_shot x": "not a whole number",
    "--num_shot 20": "--num_shot 20 plus 1 is more than the 20 images",
    "--num_classes 500": "--num_classes 500 is more than the 423 classes of split 'test'",
    "--learning_rate nan": "--learning_rate",
    "--learning_rate -1": "--learning_rate",
    "--learning_rate 0": "--learning_rate",
    "--jitter 2": "--jitter",
    "--shared_classes 3": "--shared_classes 3 is less than --num_classes 5",
    "--clip inf": "--clip",
    "--hidden_dim 0": "--hidden_dim",
    "--train_steps 1.5": "--train_steps",
    "--train_steps 0": "--train_steps",
    "--num_test_tasks 1": "--num_test_tasks",
    "--recurrent transformer": "--recurrent",
    "--nonsense": "--nonsense",
    "--encoder strided --image_size 64": "--image_size 64",
    "--memory attention --encoder_rate 0.1": "hw1.py --memory attention is now attention.py",
    "--memory=external": "hw1.py --memory external is now external_memory.py",
    "--protocol sequence --num_shot 9": "hw1.py --protocol sequence is now external_memory.py --no_table",
    "--memory lstm": "hw1.py without it",
    "--test": "--checkpoint",
    "--resume a --checkpoint b": "exclude",
    "--resume nowhere": "--resume nowhere",
    "--dataset folder": "--data_folder",
    "--dataset omniglot --data_folder nowhere": "--data_folder nowhere",
    "--device cuda": "no GPU",
    "--log_dir /proc/none": "--log_dir",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, work, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before = set(work.rglob("*"))
    dataset = [] if "--dataset" in flags else ["--dataset", "glyphs"]
    with pytest.raises(SystemExit) as stop:
        hw1.experiment.run_script(lambda: hw1.main([*dataset, *flags.split()]))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD_FLAGS[flags] in err, err
    assert set(work.rglob("*")) - before <= {work / "data", *work.glob("data/*")}


def test_diverged_run_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    real, calls = F.cross_entropy, []

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 40 else 1.0)

    monkeypatch.setattr(hw1.F, "cross_entropy", breaks)
    with pytest.raises(SystemExit) as stop:
        flags = [*SMOKE, "--num_classes", "2", "--log_dir", str(tmp_path), "--run_name", "nan", "--eval_freq", "10"]
        hw1.experiment.run_script(lambda: hw1.main(flags))
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "the loss is nan at step" in err and "checkpoint.pt" in err
    state = torch.load(tmp_path / "nan" / "checkpoint.pt", weights_only=True)
    assert all(v.isfinite().all() for v in state["objects"]["model"].values())


def test_averaged_gradient_equals_the_whole_batchs(monkeypatch):
    """The arithmetic of torchrun in one process, in float64: mean of the shards' gradients."""
    torch.manual_seed(0)
    model = MANN(3, 2, 8).double()

    def gradient(shard):
        images, labels = EpisodeSampler(known_dataset(), "train", 3, 1, 1, 8, seed=2, shard=shard).sample_rows()
        loss = model.loss_function(model(images.double(), labels.double()).double(), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    whole = gradient((0, 1))
    parts = [gradient((rank, 4)) for rank in range(4)]
    assert whole.abs().max() > 1e-3
    assert torch.allclose(whole, sum(parts) / 4, atol=1e-8)
