"""Masked auto-encoding: patches, masks, what the encoder and the loss may see, frozen features, the run."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.learners.vit import Block, ViT, patchify, sines_and_cosines, unpatchify
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import load_dataset

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import known_dataset, one_line_error
from torch import nn

import mae
import protonet
from mae import MAE, Drawings, agreement, count_visible, masked_error, random_order, targets, unshuffle

HERE = Path(__file__).parents[1]
SMOKE = [
    "--smoke",
    "--dataset",
    "glyphs",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--num_val_tasks",
    "5",
    "--num_test_tasks",
    "5",
    "--whitening_images",
    "40",
]


def small(channels=1, image_size=28):
    torch.manual_seed(0)
    return MAE(channels, 16, image_size, 2, 8, 1).double()


# ------------------------------------------------------------------------------------ patches


@pytest.mark.parametrize("channels, size, patch", [(1, 28, 4), (3, 32, 4), (2, 12, 3)])
def test_patches_and_images_invert_each_other(channels, size, patch):
    images = torch.rand(5, channels, size, size)
    patches = patchify(images, patch)
    assert patches.shape == (5, (size // patch) ** 2, channels * patch**2)
    assert torch.equal(unpatchify(patches, patch, channels), images)
    assert torch.equal(patchify(unpatchify(patches, patch, channels), patch), patches)


def test_patches_are_squares_in_reading_order():
    image = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    patches = patchify(image, 2)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # first row, second square, channel by channel
    assert patches[0, 2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]
    unfolded = nn.functional.unfold(image, 2, stride=2).transpose(1, 2)  # torch's own, of the same order
    assert torch.equal(patches, unfolded)


def test_a_place_is_told_from_every_other_and_by_the_same_waves_in_x_and_y():
    places = sines_and_cosines(7, 16)
    assert places.shape == (49, 16) and torch.cdist(places, places).add(torch.eye(49)).min() > 0.1
    y, x = 3, 5
    rates = torch.tensor([1.0, 0.1, 0.01, 0.001])
    expected = torch.cat([(y * rates).sin(), (y * rates).cos(), (x * rates).sin(), (x * rates).cos()])
    assert torch.allclose(places[7 * y + x], expected, atol=1e-6)


def plain_block(block, x):
    """`Block` of torch's own attention module."""
    width = x.shape[-1]
    attention = nn.MultiheadAttention(width, block.heads, batch_first=True).double()
    attention.in_proj_weight, attention.in_proj_bias = block.qkv.weight, block.qkv.bias
    attention.out_proj.weight, attention.out_proj.bias = block.out.weight, block.out.bias
    y = block.norm1(x)
    x = x + attention(y, y, y)[0]
    return x + block.mlp(block.norm2(x))


def test_block_equals_torch_layers():
    torch.manual_seed(0)
    block, x = Block(16).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    assert torch.allclose(block(x), plain_block(block, x), atol=1e-12)


def test_gradient_of_the_encoder_is_that_of_finite_differences():
    torch.manual_seed(0)
    encoder = ViT(1, 8, 8, depth=1).double()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: encoder(x), images)


# -------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("ratio, visible", [(0.25, 37), (0.5, 25), (0.75, 12), (0.9, 5), (0.99, 1), (0.001, 48)])
def test_mask_ratio_is_exact(ratio, visible):
    """The nearest whole number of 49 patches, for every image, and never all or none."""
    assert count_visible(49, ratio) == visible
    assert ratio in (0.99, 0.001) or abs((49 - visible) / 49 - ratio) <= 0.5001 / 49
    order = random_order(200, 49, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(dim=1).values, torch.arange(49).expand(200, 49))  # each patch once
    shown = torch.zeros(200, 49).scatter_(1, order[:, :visible], 1.0)
    assert (shown.sum(dim=1) == visible).all()


def test_every_patch_is_masked_equally_often_and_independently():
    n, L, V = 40_000, 9, 3
    order = random_order(n, L, torch.Generator().manual_seed(1))
    shown = torch.zeros(n, L).scatter_(1, order[:, :V], 1.0)
    p, pair = V / L, V * (V - 1) / (L * (L - 1))
    assert (shown.mean(dim=0) - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5
    together = (shown.T @ shown / n)[~torch.eye(L, dtype=torch.bool)]
    assert (together - pair).abs().max() < 5 * (pair * (1 - pair) / n) ** 0.5


def test_unshuffle_on_a_hand_made_example():
    order = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])  # visible: patches 2 and 0, patches 1 and 3
    tokens = torch.tensor([[[20.0], [0.0]], [[11.0], [13.0]]])
    assert unshuffle(tokens, torch.tensor([-1.0]), order)[..., 0].tolist() == [[0, -1, 20, -1], [-1, 11, -1, 13]]


def test_the_encoder_does_not_see_masked_pixels():
    model = small()
    patches = torch.rand(3, 49, 16, dtype=torch.float64)
    order = random_order(3, 49, torch.Generator().manual_seed(0))
    hidden = torch.ones(3, 49, 1, dtype=torch.bool).scatter_(1, order[:, :12, None], False)
    other = torch.where(hidden, torch.rand_like(patches), patches)
    predicted, tokens = model(patches, order, 12)
    predicted_other, tokens_other = model(other, order, 12)
    assert tokens.shape == (3, 12, 16) and predicted.shape == (3, 49, 16)
    assert torch.equal(tokens, tokens_other) and torch.equal(predicted, predicted_other)
    assert not torch.allclose(model(1 - patches, order, 12)[1], tokens, atol=1e-3)
    # And the order in which patches are visible is of no account.
    turned = torch.cat([order[:, :12].flip(1), order[:, 12:].flip(1)], dim=1)
    assert torch.allclose(model(patches, turned, 12)[0], predicted, atol=1e-12)


def test_all_patches_visible_is_the_encoder_without_a_mask():
    model = small()
    patches = torch.rand(2, 49, 16, dtype=torch.float64)
    everything = torch.arange(49).expand(2, 49)
    assert torch.allclose(model.encoder.tokens(patches, everything), model.encoder.tokens(patches), atol=1e-12)
    images = unpatchify(patches, 4, 1)
    assert torch.allclose(model.encoder(images), model.encoder.tokens(patches).mean(1), atol=1e-12)
    assert torch.equal(model.encoder(images, norm="batch", momentum=0.1), model.encoder(images))


# --------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("normalised", [False, True])
def test_the_loss_sees_masked_patches_alone(normalised):
    torch.manual_seed(0)
    predicted = torch.randn(4, 49, 16, dtype=torch.float64, requires_grad=True)
    patches = torch.rand(4, 49, 16, dtype=torch.float64, requires_grad=True)
    order = random_order(4, 49, torch.Generator().manual_seed(0))
    target = targets(patches, normalised)
    loss = masked_error(predicted, target, order, 12)
    loss.backward()
    masked = torch.ones(4, 49, dtype=torch.bool).scatter_(1, order[:, :12], False)
    for gradient in (predicted.grad, patches.grad):
        assert (gradient.abs().sum(-1) > 0).equal(masked)
    by_hand = [(predicted[i, j] - target[i, j]).square() for i in range(4) for j in range(49) if masked[i, j]]
    assert torch.allclose(loss, torch.stack(by_hand).mean(), atol=1e-12)


def test_normalised_targets():
    patches = torch.rand(5, 49, 16, dtype=torch.float64) * 3
    target = targets(patches, True)
    assert target.mean(-1).abs().max() < 1e-12 and (target.var(-1) - 1).abs().max() < 0.05
    assert torch.equal(targets(torch.ones(1, 2, 16), True), torch.zeros(1, 2, 16))  # blank paper stays blank
    assert torch.equal(targets(patches, False), patches)


def test_agreement_by_hand():
    torch.manual_seed(0)
    z = torch.randn(6, 4, dtype=torch.float64)  # three images, views 3 apart
    unit = z / z.norm(dim=1, keepdim=True)
    total = 0
    for i in range(6):
        likeness = [torch.exp(unit[i] @ unit[j] / 0.1) for j in range(6)]
        total -= torch.log(likeness[(i + 3) % 6] / sum(likeness[j] for j in range(6) if j != i))
    assert torch.allclose(agreement(z), total / 6, atol=1e-12)
    same, other = torch.eye(8)[:4].repeat(2, 1), torch.eye(8)
    assert agreement(same) < 1e-3 < agreement(other)


def test_training_completes_a_picture():
    """One image of bars, many masks: the network learns to draw the hidden bars."""
    torch.manual_seed(0)
    model = MAE(1, 32, 28, 1, 32, 1)
    bars = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    bars[..., ::6], bars[..., 10:13, :] = 255, 255
    train = Drawings(bars, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    errors = []
    for _ in range(120):
        images, order = train.draw(16)
        patches = patchify(images, 4)
        loss = masked_error(model(patches, order, 12)[0], patches, order, 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert np.mean(errors[-10:]) < 0.1 * errors[0]


# ----------------------------------------------------------------------------------- drawings


def test_drawings_are_pictures_of_the_set_and_shards_partition_them():
    data = known_dataset(num_classes=6)
    images = torch.from_numpy(data.images)
    plain, _ = Drawings(images, 3).draw(8, 2)
    assert torch.equal(plain[:8], plain[8:]) and plain.shape == (16, 1, 28, 28)  # undistorted copies are equal
    known = {tuple(image[0, 0, :2].tolist()) for image in images}
    assert all(tuple((image[0, 0, :2] * 255).round().int().tolist()) in known for image in plain)
    options = {"jitter": 0.1, "shift": 0.1, "bend": 0.1}
    whole = Drawings(images, 3, **options)
    parts = [Drawings(images, 3, **options, shard=(rank, 4)) for rank in range(4)]
    for _ in range(2):
        drawn, order = (x.unflatten(0, (2, 8)) for x in whole.draw(8, 2))
        pieces = [[x.unflatten(0, (2, 2)) for x in part.draw(8, 2)] for part in parts]
        assert torch.allclose(drawn, torch.cat([image for image, _ in pieces], dim=1), atol=1e-6)
        assert torch.equal(order, torch.cat([order for _, order in pieces], dim=1))
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)  # two distortions of the same pictures


def test_bending_moves_ink_as_told():
    image = torch.zeros(1, 1, 28, 28)
    image[..., 12:16, 12:16] = 1
    moves = torch.zeros(1, 2, 4, 4)
    assert torch.allclose(mae.bend(image, moves), image, atol=1e-5)
    moves[:, 0] = 4 / 14  # the grid reads 4 pixels further right: ink moves 4 pixels to the left
    assert torch.allclose(mae.bend(image, moves), image.roll(-4, dims=3), atol=1e-3)


# ---------------------------------------------------------------------------- frozen features


def test_whitening_removes_what_copies_differ_in():
    """Copies differ in a known, loud direction; pictures in all: afterwards the copies differ equally in all."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randn(500, 6, generator=g)
    noise = 0.1 * torch.randn(4, 500, 6, generator=g)
    noise[..., 0] *= 100
    copies = pictures + noise + 7
    centre, matrix = mae.whitening(copies, ridge=0.0)
    z = (copies - centre) @ matrix
    apart = (z - z.mean(dim=0)).flatten(0, 1)
    assert torch.allclose(apart.T @ apart / (len(apart) - 500), torch.eye(6), atol=1e-4)
    assert torch.allclose(centre, copies.mean(dim=(0, 1)), atol=1e-5)
    assert torch.allclose(mae.unit(copies[0], centre, matrix).norm(dim=1), torch.ones(500), atol=1e-5)
    centre, matrix = mae.whitening(pictures.expand(3, -1, -1))  # nothing to remove: directions stay what they are
    plain = nn.functional.normalize(pictures - pictures.mean(dim=0), dim=1)
    assert torch.allclose(mae.unit(pictures, centre, matrix), plain, atol=1e-4)


def test_known_features_are_labelled_right_and_blind_ones_are_not():
    data = known_dataset()
    sampler = EpisodeSampler(data, "test", 5, 1, 3, 4, seed=1)
    classes = torch.arange(30).repeat_interleave(20)
    told, blind = torch.eye(30)[classes], torch.zeros(600, 2)
    told = told + 0.01 * torch.randn(600, 30)
    for head in (mae.nearest, mae.ridge):
        assert mae.task_accuracy(told, sampler, 10, head).tolist() == [1.0] * 10
        assert abs(mae.task_accuracy(blind, sampler, 60, head).mean() - 0.2) < 0.08
    assert mae.probe(told, 5, 20).tolist() == [1.0] * 150
    assert mae.probe(torch.randn(600, 30), 5, 20).mean() < 0.2


def test_ridge_head_is_the_minimum_of_its_objective():
    """Against the normal equations of the other form: W = (X'X + I)^-1 X'Y; and the nearest mean by hand."""
    torch.manual_seed(0)
    support, query = torch.randn(2, 6, 7, dtype=torch.float64), torch.randn(2, 9, 7, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2]).expand(2, 6)
    X, Q = (nn.functional.pad(x, (0, 1), value=1.0) for x in (support, query))
    W = torch.linalg.solve(X.mT @ X + torch.eye(8), X.mT @ nn.functional.one_hot(labels, 3).double())
    assert torch.allclose(mae.ridge(support, labels, query, 3), Q @ W, atol=1e-10)
    means = torch.stack([support[:, 2 * c : 2 * c + 2].mean(dim=1) for c in range(3)], dim=1)
    distances = (query[:, :, None] - means[:, None]).norm(dim=-1)
    assert torch.allclose(mae.nearest(support, labels, query, 3), -distances, atol=1e-10)


@pytest.mark.thorough
def test_ridge_head_on_several_threads():
    """Of the default's size, on two threads, in a process of its own: there torch's batched LU went wrong or hung."""
    code = """
from fewshot import experiment
import torch, mae
torch.manual_seed(0)
torch.set_num_threads(2)
labels = torch.arange(5).expand(8, 5)
for D in (192, 256):
    support, query = torch.randn(8, 5, D), torch.randn(8, 25, D)
    for _ in range(5):
        found = mae.ridge(support, labels, query, 5)
    parts = zip(support.double().split(1), labels.split(1), query.double().split(1))
    truth = torch.cat([mae.ridge(*part, 5) for part in parts])
    assert (found - truth).abs().max() < 1e-4
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=3600)
    assert done.stdout == "the same\n", done.stderr


def test_pictures_are_in_the_samplers_order():
    data = known_dataset(split={"train": np.array([7, 2]), "val": np.array([1]), "test": np.array([9, 4, 0])})
    for part in ("train", "test"):
        sampler = EpisodeSampler(data, part, 2, 1, 1)
        assert torch.equal(mae.pictures(data, part, "cpu"), sampler.images)


def test_quarters_on_a_hand_made_example():
    tokens = torch.arange(16.0).view(1, 16, 1)  # 4 x 4 places
    assert mae.quarters(tokens).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_features_do_not_depend_on_other_images_or_labels():
    torch.manual_seed(0)
    encoder, images = ViT(1, 16, 28, 1), torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8)
    whole = mae.embed(encoder, images, torch.float32, 3, (0.1, 0.1, 0.1), seed=2)
    assert whole.shape == (3, 8, 64)
    assert torch.allclose(whole[0, :3], mae.embed(encoder, images[:3], torch.float32)[0], atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)


# ------------------------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    """A smoke run."""
    folder = tmp_path_factory.mktemp("mae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        metrics = mae.main([*SMOKE, "--log_dir", str(folder), "--run_name", "small"])
    return folder / "small", metrics


def test_the_run_reports_all_figures(trained):
    folder, metrics = trained
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    for name in ("test_accuracy", "test_accuracy_untrained", "test_accuracy_linear", "val_accuracy"):
        assert (
            0.2 < metrics[name] <= 1
            and metrics[name.replace("test_accuracy", "ci95").replace("val_accuracy", "val_ci95")] >= 0
        )
    assert 0 <= metrics["probe_accuracy"] < 1 and metrics["test_error"] > 0 and metrics["labels_used"] == "none"
    assert len(metrics["accuracies"]) == 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {"Loss/train", "Loss/val", "Accuracy/val"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Images("reconstruction")] == [10, 20]


@pytest.mark.thorough
def test_a_saved_run_tests_the_same_and_at_other_n(trained):
    folder, metrics = trained
    base = ["--test", "--checkpoint", str(folder)]
    assert mae.main(base)["accuracies"] == metrics["accuracies"]
    assert (folder / "reconstruction_glyphs.png").read_bytes() == base64.b64decode(metrics["reconstruction"])
    assert mae.main([*base, "--num_classes", "20"])["test_accuracy"] < metrics["test_accuracy"]


def test_no_label_is_used_in_training(trained, monkeypatch, tmp_path):
    """With the characters of the training drawings shuffled among each other the network is the same, bit for bit."""
    folder, _ = trained
    real = mae.load_for

    def shuffled(*args):
        data = real(*args)
        order = np.random.default_rng(0).permutation(len(data.names))
        return data._replace(names=[data.names[i] for i in order])

    monkeypatch.setattr(mae, "load_for", shuffled)
    mae.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", "a"])
    a, b = (torch.load(f / "best.pt", weights_only=True)["model"] for f in (folder, tmp_path / "a"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_reconstruction_keeps_visible_pixels():
    args = mae.parse_args([*SMOKE])
    model = mae.make_model(args, 1)
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    error, masked, completed = mae.reconstruct(args, model, images, torch.float32)
    true = images.float() / 255
    shown = (patchify(masked, 4) == patchify(true, 4)).all(-1)
    assert error > 0 and (shown.sum(1) >= 25).all()  # an empty patch may be all grey
    assert torch.equal(patchify(completed, 4)[shown], patchify(true, 4)[shown])
    assert not torch.allclose(completed, true, atol=0.1)


def test_the_sheet_of_reconstructions_shows_the_pictures_black_on_white():
    args = mae.parse_args([*SMOKE])
    data = load_dataset("glyphs")
    for repeat in (1, 3):  # grey and coloured
        many = data._replace(images=np.repeat(data.images, repeat, axis=1))
        model = mae.make_model(args, repeat)
        sheet = mae.reconstruction(args, model, many, torch.float32, torch.device("cpu"))
        assert sheet.shape == (3 * 30, 12 * 30, repeat) and sheet.dtype == np.uint8
        first = many.images[many.starts[many.splits["test"][0]]].transpose(1, 2, 0)  # [H, W, C]
        assert np.array_equal(sheet[1:29, 1:29], first if repeat == 3 else 255 - first)
        hidden = (sheet[31:59] == 127) | (sheet[31:59] == 128)
        assert 0.3 < hidden.mean() < 0.5 and (sheet[60:] != 127).mean() > 0.9  # half, but for the margins


def test_resume_is_bit_exact(trained, tmp_path, monkeypatch):
    folder, metrics = trained
    real = experiment.Run.save

    def save(run):
        real(run)
        if run.step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "save", save)
        mae.main([*SMOKE, "--log_dir", str(tmp_path), "--run_name", "stopped"])
    again = mae.main(["--resume", str(tmp_path / "stopped")])
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True)["objects"] for f in (folder, tmp_path / "stopped"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert torch.equal(a["sampler"]["generator"], b["sampler"]["generator"])
    assert again["accuracies"] == metrics["accuracies"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            [
                "--no-normalise",
                "--no-rotations",
                "--mask_ratio",
                "0.75",
                "--contrast",
                "0",
                "--depth",
                "2",
                "--split",
                "lake",
            ],
            marks=pytest.mark.thorough,
        ),
        [
            "--decoder_depth",
            "2",
            "--decoder_width",
            "8",
            "--jitter",
            "0",
            "--shift",
            "0",
            "--bend",
            "0",
            "--views",
            "1",
            "--image_size",
            "32",
            "--num_shot",
            "2",
            "--num_query",
            "3",
            "--held_out",
            "8",
            "--learning_rate",
            "1e-3",
        ],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    metrics = mae.main([*SMOKE, "--train_steps", "4", "--eval_freq", "4", "--log_dir", str(tmp_path), *flags])
    assert 0.2 <= metrics["test_accuracy"] <= 1


def test_bad_flags_get_one_line(run_script):
    for flags, words in (
        (["--width", "20"], "--width 20"),
        (["--decoder_width", "12"], "--decoder_width 12"),
        (["--image_size", "30"], "--image_size 30"),
        (["--mask_ratio", "0"], "out of range"),
        (["--patience", "1"], "--patience"),
    ):
        with pytest.raises(UserError, match=words):
            mae.parse_args([*SMOKE, *flags])
    one_line_error(run_script("mae.py", "--mask_ratio", "1"), "--mask_ratio", "out of range")


# --------------------------------------------------------------------- with labels, from the weights


VIT = [
    "--smoke",
    "--dataset",
    "glyphs",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--views",
    "1",
    "--encoder",
    "vit",
    "--width",
    "16",
    "--train_steps",
    "2",
    "--eval_freq",
    "2",
]


@pytest.mark.thorough
def test_protonet_starts_from_the_encoder(tmp_path):
    deep = ["--depth", "4", "--train_steps", "2", "--eval_freq", "2", "--views", "1", "--log_dir", str(tmp_path)]
    mae.main([*SMOKE, *deep, "--run_name", "mae"])
    weights = torch.load(tmp_path / "mae" / "best.pt", weights_only=True)["model"]
    args = protonet.parse_args([*VIT, "--init_from", str(tmp_path / "mae")])
    encoder = protonet.make_encoder(args, 1)
    experiment.init_from(args, encoder)
    state = encoder.state_dict()
    assert len(state) > 50 and all(torch.equal(value, weights[f"encoder.{k}"]) for k, value in state.items())
    run = ["--log_dir", str(tmp_path), "--run_name", "proto", "--train_characters", "50"]
    metrics = protonet.main([*VIT, "--init_from", str(tmp_path / "mae"), *run])
    again = protonet.main(["--test", "--checkpoint", str(tmp_path / "proto")])  # its own weights, not the first ones
    assert again["accuracies"] == metrics["accuracies"]
    scratch = protonet.make_encoder(protonet.parse_args(VIT), 1)
    from_itself = protonet.parse_args([*VIT, "--init_from", str(tmp_path / "proto")])
    experiment.init_from(from_itself, scratch)  # a run of the same method
    best = torch.load(tmp_path / "proto" / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, best[k]) for k, value in scratch.state_dict().items())
    with pytest.raises(UserError, match="another model"):
        protonet.main(["--smoke", "--dataset", "glyphs", "--init_from", str(tmp_path / "mae")])
    with pytest.raises(UserError, match="--init_from .*nowhere is not a run folder"):
        protonet.main([*VIT, "--init_from", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--width 12: --encoder vit takes a multiple of 8"):
        protonet.parse_args([*VIT, "--width", "12"])
