"""Feature weights: solutions and derivatives against formulas and differences, aliases, the known behaviour."""

from fewshot.experiment import Diverged

import json
import math

import numpy as np
import pytest
import torch
from conftest import REPO

import feature_weights as fw

D = torch.float64


def settings(*flags):
    """The flags of the first meta-training of a small problem."""
    return fw.trainings(fw.parse_args(["--num_features", "60", "--num_points", "12", "--num_true", "5", *flags]))[0]


def directional_difference(f, c, v, h):
    """Central difference of f at c along v, of fourth order in h."""
    return (8 * (f(c + h * v) - f(c - h * v)) - f(c + 2 * h * v) + f(c - 2 * h * v)) / (12 * h)


# ---------------------------------------------------------------------------------- part (d)


def test_alias_solution_is_the_min_norm_solution():
    c = torch.tensor([[1.0, 2.0], [-0.3, 0.1], [2.0, 0.0]], dtype=D)
    beta = fw.alias_solution(c)
    assert torch.allclose((beta * c).sum(-1), torch.ones(3, dtype=D), atol=1e-12)  # it fits y = phi
    assert torch.allclose(beta[..., None], fw.min_norm(c[:, None, :], torch.ones(3, 1, 1, dtype=D)), atol=1e-12)


def test_alias_gradient_equals_autograd_and_differences_and_keeps_the_norm():
    c = torch.tensor([[1.0, 2.0], [-0.3, 0.1], [0.7, -1.4]], dtype=D, requires_grad=True)
    by_autograd = torch.autograd.grad(fw.alias_loss(c).sum(), c)[0]
    c = c.detach()
    assert torch.allclose(fw.alias_loss(c), 2 * c[:, 1] ** 4 / c.square().sum(-1) ** 2, atol=1e-12)
    assert torch.allclose(fw.alias_gradient(c), by_autograd, atol=1e-10)
    for k in range(2):
        v = torch.eye(2, dtype=D)[k].expand_as(c)
        assert torch.allclose(directional_difference(fw.alias_loss, c, v, 1e-3), by_autograd[:, k], atol=1e-8)
    assert (fw.alias_gradient(c) * c).sum(-1).abs().max() < 1e-12


def test_alias_descent_ends_where_it_should_to_1e_6():
    """Finite steps lengthen c a little, in proportion to the step: three step sizes give the limit of small steps."""
    start = torch.tensor(fw.ALIAS_STARTS, dtype=D)
    norm, sign = start.norm(dim=1), start[:, 0].sign()
    a, b, c = (fw.alias_descent(start, r, r, round(30 / r))[-1] for r in (16e-3, 8e-3, 4e-3))
    drift = [(x[:, 0].abs() - norm) / norm for x in (a, b, c)]
    assert all((x > 0).all() and (x < 0.03).all() for x in drift)
    limit = (a - 6 * b + 8 * c) / 3  # Richardson: removes what is linear and quadratic in the step
    assert (limit[:, 0] - sign * norm).abs().max() < 1e-6 and limit[:, 1].abs().max() < 1e-6
    beta = fw.alias_solution(limit)
    assert (beta[:, 0] - sign / norm).abs().max() < 1e-5 and beta[:, 1].abs().max() < 1e-5


# ------------------------------------------------------------------------------ features and tasks


def test_features_are_orthonormal_and_the_known_functions():
    x = torch.arange(200, dtype=D) / 100 - 1  # this grid integrates products up to frequency 199 exactly
    phi = fw.fourier_features(x, 60)
    assert torch.allclose(phi.T @ phi / 200, torch.eye(60, dtype=D), atol=1e-12)
    one_by_one = [np.ones(200)]
    for k in range(1, 31):
        one_by_one += [np.sqrt(2) * np.sin(np.pi * k * x.numpy()), np.sqrt(2) * np.cos(np.pi * k * x.numpy())]
    assert np.allclose(phi.numpy(), np.stack(one_by_one[:60], axis=1), atol=1e-12)


def test_points_and_tasks():
    sizes = torch.tensor([1, 4, 3])
    x, there = fw.training_points("grid", 2, sizes)
    assert x.shape == there.shape == (2, 3, 4) and x[1, 1].tolist() == [-1, -0.5, 0, 0.5]
    assert x[0, 2, :3].tolist() == pytest.approx([-1, -1 / 3, 1 / 3]) and there.sum(-1).tolist() == [[1, 4, 3]] * 2
    torch.manual_seed(0)
    x, _ = fw.training_points("random", 1000, torch.tensor([8]))
    assert x.min() >= -1 and x.max() < 1 and len(x.unique()) == 8000
    assert abs(x.mean()) < 5 * math.sqrt(1 / 3 / 8000) and abs(x.square().mean() - 1 / 3) < 5 * 0.3 / math.sqrt(8000)
    alpha = fw.sample_tasks(500, 5, "grid")
    assert alpha.shape == (1, 1, 5, 500) and torch.allclose(alpha.norm(dim=2), torch.ones(1, 1, 500, dtype=D))
    assert (alpha.mean(-1).abs() < 5 / math.sqrt(5 * 500)).all()  # the signs are fair


def frequency(d):
    return (torch.arange(d) + 1) // 2


def test_aliases_are_the_frequencies_that_differ_by_a_multiple_of_the_grid():
    d, S, n = 500, 11, 32  # S: frequencies 0 to 5
    k = frequency(d) % n
    expected = (k <= 5) | (k >= n - 5)
    sine_of_zero = (torch.arange(d) % 2 == 1) & (k == 0)  # sin(32 pi x) is 0 on the grid, so it is nobody's alias
    expected &= ~sine_of_zero & (torch.arange(d) >= S)
    assert torch.equal(fw.alias_mask(d, S, n), expected)
    assert not (fw.alias_mask(d, S, 2 * n) & ~fw.alias_mask(d, S, n)).any()  # why 64 points profit as 32 do
    assert (fw.alias_mask(d, S, n - 1) & ~fw.alias_mask(d, S, n)).sum() > 50  # and 31 do not


# ------------------------------------------------------------------------------- the inner learners


def random_problem(n, d, T=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, d, dtype=D), torch.randn(n, T, dtype=D)


def test_min_norm_fits_with_the_smallest_norm():
    A, y = random_problem(6, 15)
    beta = fw.min_norm(A, y)
    assert torch.allclose(A @ beta, y, atol=1e-10)
    assert torch.allclose(beta, A.T @ torch.linalg.solve(A @ A.T, y), atol=1e-10)  # the homework's formula
    null = torch.linalg.svd(A).Vh[6:].T  # every other solution adds some of the null space
    other = beta + null @ torch.randn(9, 3, dtype=D)
    assert torch.allclose(A @ other, y, atol=1e-10) and (other.norm(dim=0) > beta.norm(dim=0)).all()


@pytest.mark.parametrize("n, used", [(12, 5), (5, 12), (9, 9)])
def test_min_norm_with_weights_zero_is_that_of_the_other_features(n, used):
    A, y = random_problem(n, 15)
    c = (torch.arange(15) < used).double()
    beta = fw.min_norm(A * c, y)
    assert np.allclose(beta[:used], np.linalg.lstsq(A[:, :used].numpy(), y.numpy(), rcond=None)[0], atol=1e-9)
    assert not (beta[used:].abs() > 1e-12).any()


@pytest.mark.parametrize(
    "loss, learner",
    [
        (lambda f, y: (f - y).square().mean(0).sum(), fw.regression_steps),
        (lambda f, y: (1 + (-y * f).exp()).log().mean(0).sum(), fw.logistic_steps),
    ],
)
def test_gradient_steps_equal_a_plain_loop_with_autograd(loss, learner):
    A, y = random_problem(6, 15)
    y = y.sign()
    beta = torch.zeros(15, 3, dtype=D)
    for _ in range(4):
        beta.requires_grad_()
        beta = (beta - 0.05 * torch.autograd.grad(loss(A @ beta, y), beta)[0]).detach()
    assert torch.allclose(learner(A, y, 6, 4, 0.05), beta, atol=1e-12)


def test_many_gradient_steps_end_at_the_min_norm_solution():
    A, y = random_problem(6, 15)
    assert torch.allclose(fw.regression_steps(A, y, 6, 5000, 0.1), fw.min_norm(A, y), atol=1e-9)


@pytest.mark.parametrize("part", fw.PARTS[1:])
def test_rows_of_zeros_change_no_solution(part):
    args = settings("--part", part)
    A, y = random_problem(6, 60)
    y = fw.labels(y, part)
    c, n = torch.rand(60, dtype=D) + 0.5, torch.tensor(6.0, dtype=D)
    more = [torch.cat([z, torch.zeros(4, z.shape[1], dtype=D)]) for z in (A, y)]
    assert torch.allclose(fw.adapt(c, A, y, n, args), fw.adapt(c, *more, n, args), atol=1e-10)


# -------------------------------------------------------------------------------- the meta-gradient


@pytest.mark.parametrize("points", ["grid", "random"])
@pytest.mark.parametrize("part", fw.PARTS[1:])
@pytest.mark.parametrize("S_only", [False, True])
def test_meta_gradient_equals_finite_differences(part, points, S_only):
    """Also with weights 0 outside S, where the weighted features have lower rank than there are points."""
    args = settings("--part", part, "--points", points)
    torch.manual_seed(1)
    alpha = fw.sample_tasks(4, 5, points)
    x, _ = fw.training_points(points, len(alpha), torch.tensor([12]))
    fresh = 2 * torch.rand(30, dtype=D) - 1
    f = lambda c: fw.meta_loss(c, alpha, x, fresh, args)
    c = torch.rand(60, dtype=D) + 0.5
    v = torch.randn(60, dtype=D)
    if S_only:
        c[5:], v[5:] = 0, 0  # within S: across, the rank changes and the solution jumps
    gradient = torch.autograd.grad(f(c.requires_grad_()), c)[0]
    difference = directional_difference(f, c.detach(), v, 1e-3 if not S_only else 1e-4)
    assert abs(gradient @ v - difference) < 1e-8 * max(1, abs(difference))
    assert S_only or abs(difference) > 1e-4  # there is something to compare


def test_closed_form_on_the_grid_is_the_hand_derived_share():
    """Feature j that looks like g_j times feature s on the grid gets c_j^2 g_j / sum c^2 g^2 of its coefficient."""
    args = settings("--part", "closed_form", "--num_test_tasks", "7")
    torch.manual_seed(2)
    d, S, n = 60, 5, 12
    c = torch.rand(d, dtype=D) + 0.5
    x = fw.training_points("grid", 1, torch.tensor([n]))[0]
    phi = fw.fourier_features(x[0, 0], d)
    alpha = fw.sample_tasks(7, S, "grid")
    learned = torch.zeros(d, 7, dtype=D)
    for s in range(S):
        g = phi[:, s] @ phi / n
        learned += (c.square() * g / (c * g).square().sum())[:, None] * alpha[0, 0, s]
    ours = fw.adapt(c, phi, phi[:, :S] @ alpha[0, 0], torch.tensor(float(n)), args)
    assert torch.allclose(ours, learned, atol=1e-10)


@pytest.mark.parametrize("points", ["grid", "random"])
@pytest.mark.parametrize("part", ["closed_form", "classification"])
def test_test_curve_equals_a_plain_loop(part, points, monkeypatch):
    """One task and one size at a time, numpy's least squares, the mean over a fine grid of test points."""
    args = settings("--part", part, "--points", points, "--num_test_tasks", "6")
    drawn = {}
    for name in ("sample_tasks", "training_points"):
        original = getattr(fw, name)
        keep = lambda *a, name=name, original=original: drawn.setdefault(name, original(*a))
        monkeypatch.setattr(fw, name, keep)
    torch.manual_seed(3)
    c, sizes = torch.rand(60, dtype=D) + 0.5, torch.tensor([3, 12, 20, 7])
    errors = fw.test_curve(c, sizes, args)
    assert errors.shape == (4, 6)
    x = drawn["training_points"][0].expand(6, -1, -1)
    alpha = drawn["sample_tasks"].permute(0, 3, 1, 2).reshape(6, 5)
    test = fw.fourier_features(torch.arange(4000, dtype=D) / 2000 - 1, 60).numpy()
    for i, n in enumerate(sizes.tolist()):
        for t in range(6):
            phi = fw.fourier_features(x[t, i, :n], 60).numpy()
            y, truth = phi[:, :5] @ alpha[t].numpy(), test[:, :5] @ alpha[t].numpy()
            y = np.sign(y) if part == "classification" else y
            prediction = test @ (c.numpy() * np.linalg.lstsq(phi * c.numpy(), y, rcond=None)[0])
            if part == "classification":  # 200 random points there, all here: five standard errors
                wrong = np.mean(np.sign(prediction) != np.sign(truth))
                assert abs(errors[i, t] - wrong) < 5 * math.sqrt(0.25 / 200)
            else:
                assert errors[i, t].item() == pytest.approx(np.mean((prediction - truth) ** 2), abs=1e-9)


def test_test_curve_does_not_touch_the_random_stream():
    args = settings("--part", "closed_form", "--num_test_tasks", "3")
    before = torch.get_rng_state()
    fw.test_curve(torch.ones(60, dtype=D), torch.tensor([4]), args)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------- the known behaviour


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    """metrics(part, *flags): of a meta-training at the homework's size, done once."""
    folder, done = tmp_path_factory.mktemp("weights"), {}

    def metrics(part, *flags):
        key = (part, flags)
        if key not in done:
            few = ["--num_test_tasks", "20", "--eval_freq", "100", "--log_dir", str(folder)]
            one = fw.trainings(fw.parse_args(["--part", part, *few, *flags]))[0]
            done[key] = fw.measure(one, fw.experiment.setup(one))
        return done[key]

    return metrics


def test_closed_form_shows_the_known_behaviour(trained):
    metrics = trained("closed_form")
    mean = {name: torch.tensor(errors["mean"]) for name, errors in metrics["errors"].items()}
    at = lambda name, n: mean[name][n - 1].item()
    assert at("ones", 32) == pytest.approx(0.95, abs=0.02) and at("oracle", 32) < 1e-20
    assert at("meta", 32) == pytest.approx(0.31, abs=0.02)
    assert at("meta", 31) == pytest.approx(0.45, abs=0.02) and at("meta", 33) == pytest.approx(0.39, abs=0.02)
    assert (mean["meta"] < mean["ones"]).all()  # at every number of points
    assert metrics["at_most_ones_from"] == 1
    untrained = metrics["untrained_aliases"]  # of the aliases on 31 and 33 points many, of 64 none
    assert untrained["32"] == untrained["64"] == 0 and 0.4 < untrained["31"] < 0.5 and 0.4 < untrained["33"] < 0.5


def test_aliases_lose_their_weight_and_the_others_do_not_move(trained):
    args = fw.parse_args([])
    kinds = fw.groups_of_features(args)
    assert sum(k.int() for k in kinds.values()).eq(1).all()
    history = {name: torch.tensor(rows) for name, rows in trained("closed_form")["history"].items() if name != "steps"}
    low, _, high = 0, 1, 2  # of the weights of a group at each evaluation [evaluations, 3]
    assert history["aliases"][-1, high] < 0.8 and history["S"][-1, low] > 2
    assert (history["others"] - 1).abs().max() < 1e-4
    assert (history["aliases"].diff(dim=0) < 0).all()  # they go down all the time


def test_adam_brings_the_loss_on_the_training_grid_near_zero(trained):
    metrics = trained("closed_form", "--optimizer", "adam", "--train_steps", "200", "--max_points", "33")
    weights = metrics["weights"]
    assert metrics["meta"]["32"] < 1e-3 and metrics["meta"]["31"] > 0.3
    assert max(abs(weights["aliases"]["min"]), abs(weights["aliases"]["max"])) < 0.1
    assert weights["others"]["min"] == pytest.approx(1, abs=1e-6) == weights["others"]["max"]


@pytest.mark.parametrize("steps", ["5", "1"])
def test_gradient_steps_help_too(trained, steps):
    metrics = trained("gradient", "--num_gd_steps", steps, "--learning_rate", "0.3", "--train_steps", "100")
    assert metrics["oracle"]["32"] < 1e-20 and metrics["ones"]["32"] > 0.9 and metrics["meta"]["32"] < 0.7
    assert 1 < metrics["at_most_ones_from"] < 32  # the step is too large for few points


@pytest.mark.parametrize("part", ["classification", "logistic"])
def test_classification_learns_nearly_as_well_as_the_oracle(trained, part):
    metrics = trained(part, "--train_steps", "100", "--max_points", "33")
    assert metrics["ones"]["32"] > 0.4 and metrics["oracle"]["32"] < 0.08 and metrics["meta"]["32"] < 0.2


# ---------------------------------------------------------------------------------------- the script


def test_smoke_of_all_parts(tmp_path, capsys):
    results_dir = tmp_path / "results"
    results_dir.mkdir()
    (results_dir / "features.json").write_text('{"kept": 1}')
    flags = ["--smoke", "--log_dir", str(tmp_path), "--run_name", "s", "--out", str(results_dir)]
    results = fw.main(flags)
    names = {
        "alias",
        "closed_form",
        "closed_form_adam",
        "gradient_5_steps",
        "gradient_1_steps",
        "classification",
        "logistic_10_steps",
    }
    assert set(results) == names
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed.keys() == results.keys() and printed["closed_form"]["meta"] == results["closed_form"]["meta"]
    assert json.loads((results_dir / "features.json").read_text()) == {"kept": 1} | results
    for name in names:
        assert json.loads((tmp_path / f"s_{name}" / "metrics.json").read_text()) == results[name]
    # A part alone gives what it gives among all.
    alone = fw.main(["--smoke", "--log_dir", str(tmp_path), "--part", "classification"])["classification"]
    assert alone["meta"] == results["classification"]["meta"]


def test_tensorboard_gets_weights_and_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fw.main(["--smoke", "--part", "gradient", "--num_gd_steps", "1", "--log_dir", str(tmp_path), "--run_name", "run"])
    events = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    assert {"Loss/train", "Loss/test"} <= set(events["scalars"])
    assert {f"Weights/{k}" for k in ("S", "aliases", "others")} <= set(events["histograms"])


@pytest.mark.parametrize("points", ["grid", "random"])
def test_a_resumed_run_is_bit_identical(points, tmp_path, monkeypatch):
    flags = ["--smoke", "--part", "closed_form", "--optimizer", "adam", "--points", points, "--log_dir", str(tmp_path)]
    flags += ["--train_steps", "30"]
    whole = fw.main([*flags, "--run_name", "whole"])
    original, calls = fw.meta_loss, []

    def break_at_25(*args):
        calls.append(0)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(fw, "meta_loss", break_at_25)
    with pytest.raises(KeyboardInterrupt):
        fw.main([*flags, "--run_name", "broken"])
    monkeypatch.setattr(fw, "meta_loss", original)
    resumed = fw.main(["--resume", str(tmp_path / "broken")])
    (name,) = whole
    assert resumed[name]["meta"] == whole[name]["meta"] and resumed[name]["weights"] == whole[name]["weights"]
    a, b = (torch.load(tmp_path / x / "checkpoint.pt")["objects"]["model"] for x in ("whole", "broken"))
    assert torch.equal(a["c"], b["c"]) and torch.equal(a["history"], b["history"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_true", "600"], ["--num_true 600", "--num_features 500"]),
        (["--num_points", "65"], ["--num_points 65", "--max_points"]),
        (["--part", "nothing"], ["--part"]),
        (["--num_gd_steps", "0"], ["--num_gd_steps", "1 or more"]),
        (["--inner_lr", "0"], ["--inner_lr"]),
        (["--out", "nowhere"], ["--out nowhere"]),
        (["--dataset", "glyphs"], ["--dataset"]),
        (["--resume", "nowhere"], ["--resume nowhere"]),
    ],
)
def test_bad_flags_get_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        fw.experiment.run_script(lambda: fw.main(flags))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and all(w in err for w in words), err


def test_the_script_itself(run_script, tmp_path):
    done = run_script("feature_weights.py", "--part", "alias", "--alias_steps", "50", "--log_dir", tmp_path)
    assert done.returncode == 0 and "start (1.0, 1.0), norm 1.414214" in done.stdout, done.stderr


def test_a_diverged_run_says_so(tmp_path):
    with pytest.raises(Diverged, match="lower --learning_rate"):
        fw.main(["--smoke", "--part", "gradient", "--learning_rate", "1e30", "--log_dir", str(tmp_path)])


def test_committed_figures_are_there_and_light():
    for part in fw.PARTS:
        assert 10_000 < (REPO / "results" / "feature_weights" / f"{part}.png").stat().st_size < 150_000
