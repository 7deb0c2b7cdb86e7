"""MAML: the meta-gradient against finite differences and a plain loop, Proto-MAML against ProtoNet, every flag."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.learners import outer_loop
from fewshot.learners.conv4 import Conv4
from fewshot.learners.task_loop import mean_over_tasks
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import load_dataset

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import known_dataset
from torch.func import vmap

import maml
from maml import MAML, Setting, evaluate, inner_loop, multi_step_loss, query_logits, task_loss
from protonet import proto_logits

SMOKE = ["--smoke", "--dataset", "glyphs", "--device", "cpu"]
N, K, Q = 3, 2, 2


def learner(head="linear", steps=1, lr=0.05, strided=True, learn=True, per_step_norm=False):
    """A small float64 learner with a head that is not zero, so that every tensor has a gradient."""
    torch.manual_seed(1)
    learner = MAML(Conv4(width=4, strided=strided), N, steps, lr, head, learn, per_step_norm=per_step_norm).double()
    with torch.no_grad():
        for p in learner.theta().values():
            p += 0.3 * torch.randn_like(p)
    return learner


def batch(B=2, seed=0):
    """B tasks of noise with some structure, in float64."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(N).repeat_interleave(K).expand(B, -1)
    centres = torch.rand(B, N, 1, 28, 28, generator=g, dtype=torch.float64)
    query_labels = torch.stack([torch.arange(N).repeat(Q)[torch.randperm(N * Q, generator=g)] for _ in range(B)])
    noise = torch.rand(2, B, N * max(K, Q), 1, 28, 28, generator=g, dtype=torch.float64)
    support = centres.repeat_interleave(K, 1) + noise[0, :, : N * K]
    query = torch.stack([c[y] for c, y in zip(centres, query_labels, strict=True)]) + noise[1, :, : N * Q]
    return support, labels, query, query_labels


def outer_loss(model, tasks, s, weights=(1.0,)):
    theta, sizes = model.theta(), model.step_sizes(len(model.rates))
    return sum(multi_step_loss(theta, sizes, *task, s, weights) for task in zip(*tasks, strict=True)) / len(tasks[0])


def gradients(model, tasks, s, weights=(1.0,), steps=None):
    """The meta-gradient of maml.py, as {parameter: tensor}."""
    model.zero_grad()
    theta, sizes = model.theta(), model.step_sizes(len(model.rates) if steps is None else steps)
    mean_over_tasks(lambda *task: multi_step_loss(theta, sizes, *task, s, weights), tasks, model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


CASES = [
    (1, "linear", {}),
    (3, "linear", {}),
    (1, "proto", {}),
    (3, "proto", {}),
    (2, "linear", {"batch_norm": "support"}),
    (2, "proto", {"freeze_body": True}),
    (2, "linear", {"strided": False}),
    (2, "linear", {"sphere": True}),
    (2, "linear", {"sphere": True, "batch_norm": "support"}),
    (3, "linear", {"per_step_norm": True}),
    (2, "linear", {"per_step_norm": True, "sphere": True, "strided": False, "batch_norm": "support"}),
]


@pytest.mark.parametrize("steps, head, options", CASES)
def test_the_meta_gradient_equals_finite_differences(steps, head, options):
    """Central differences of the outer loss along random directions, inner rates included; relative error < 1e-6."""
    per_step_norm = options.get("per_step_norm", False)
    s = Setting(N, head=head, dtype=torch.float64, **options)
    model, tasks = learner(head, steps, strided=s.strided, per_step_norm=per_step_norm), batch()
    if per_step_norm:
        torch.nn.init.normal_(model.shifts, std=0.1)
    weights = maml.multi_step_weights(steps, 0.1)
    assert sum(weights) == pytest.approx(1) and len(weights) == steps
    gradient = gradients(model, tasks, s, weights)
    parameters = dict(model.named_parameters())
    g = torch.Generator().manual_seed(5)
    for _ in range(3):
        directions = {k: torch.randn(p.shape, generator=g, dtype=torch.float64) for k, p in parameters.items()}
        slope, eps = sum((gradient[k] * d).sum() for k, d in directions.items()), 1e-7  # few ReLUs switch
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                for k, p in parameters.items():
                    p += sign * eps * directions[k]
                values.append(outer_loss(model, tasks, s, weights))
                for k, p in parameters.items():
                    p -= sign * eps * directions[k]
        assert abs((values[0] - values[1]) / (2 * eps) - slope) < 1e-6 * abs(slope)


def test_one_vmap_equals_the_tasks_one_by_one():
    """The two ways in which mean_over_tasks goes over tasks: the GPU's and the CPU's, with any number of threads."""
    others = {"head": "proto", "strided": False}, {"batch_norm": "support"}, {"sphere": True}
    for options in ({}, {"first_order": True}, *others):
        s = Setting(N, dtype=torch.float64, **options)
        model, tasks = learner(s.head, 2, strided=s.strided), batch(3)
        one_by_one = gradients(model, tasks, s)
        theta, sizes = model.theta(), model.step_sizes(2)
        loss = vmap(lambda *t, s=s, theta=theta, sizes=sizes: task_loss(theta, sizes, *t, s))(*tasks).mean()
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert torch.allclose(one_by_one[name], p.grad, rtol=0, atol=1e-10), (name, options)


def test_threads_change_nothing():
    s, model, tasks = Setting(N, dtype=torch.float64), learner(steps=2), batch(5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gradients(model, tasks, s))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize("what", ["rates", "shifts"])
@pytest.mark.parametrize("first_order", [False, True])
def test_what_is_learned_per_step_has_the_gradient_of_finite_differences(what, first_order):
    """Entry by entry for rates; for scales and shifts of some filters. First order too, where the rates' is exact.

    With first order the gradients of the inner steps are constants: the derivative by the last step's rate, and by the
    last step's shift, is then still exact, which is compared.
    """
    s = Setting(N, dtype=torch.float64, first_order=first_order, per_step_norm=True)
    model, tasks = learner(steps=3, per_step_norm=True), batch()
    torch.nn.init.normal_(model.shifts, std=0.1)
    found, tensor = gradients(model, tasks, s)[what], getattr(model, what)
    assert found.shape == tensor.shape and found.abs().max() > 1e-6
    steps = [2] if first_order else [0, 1, 2]
    places = [
        (i, *rest) for i in steps for rest in ([(j,) for j in range(14)] if what == "rates" else [(0, 1), (5, 3)])
    ]
    for place in places:
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                tensor[place] += sign * 1e-6
                values.append(outer_loss(model, tasks, s))
                tensor[place] -= sign * 1e-6
        assert found[place].item() == pytest.approx(((values[0] - values[1]) / 2e-6).item(), rel=1e-4, abs=1e-8), place


def test_per_step_norms_of_zero_change_nothing_and_others_do():
    """Bit for bit: the adapted parameters and the gradient of all that is learned without the flag."""
    tasks, settings = batch(), [Setting(N, dtype=torch.float64, per_step_norm=own) for own in (False, True)]
    plain, own = models = learner(steps=2), learner(steps=2, per_step_norm=True)
    assert "shifts" not in plain.state_dict() and own.shifts.shape == (2, 8, 4)
    a, b = (gradients(model, tasks, s) for model, s in zip(models, settings, strict=True))
    assert b.pop("shifts").abs().max() > 1e-6 and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    torch.nn.init.constant_(own.shifts, 0.5)
    path, moved = (
        inner_loop(model.theta(), model.step_sizes(3), tasks[0][0], tasks[1][0], s)
        for model, s in zip(models, settings, strict=True)
    )
    assert torch.equal(path[0]["gamma1"], moved[0]["gamma1"]) and set(path[0]) == set(moved[0])
    # The first step starts from the same parameters: it differs by the shift; the third, untrained, adds none.
    assert torch.allclose(moved[1]["beta3"] - path[1]["beta3"], torch.full((4,), 0.5, dtype=torch.float64), atol=1e-12)
    assert "gamma0+" not in own.step_sizes(3)[2] and "gamma0+" in own.step_sizes(3)[1]


def test_muon_steps_are_orthogonal_and_leave_the_unused_head_of_the_warm_up(tmp_path):
    flags = ["--optimizer", "muon", "--learning_rate", "0.05", "--train_steps", "4", "--eval_freq", "2", "--width", "8"]
    flags += ["--num_test_tasks", "4", "--num_val_tasks", "4", "--num_query", "2", "--schedule", "constant"]
    small = [*SMOKE, *flags, "--log_dir", str(tmp_path)]
    maml.main([*small, "--run_name", "whole", "--warmup_steps", "2"])
    warm = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["objects"]
    assert warm["model"]["head_weight"].abs().max() > 0  # two steps of MAML have moved it
    first = [*small, "--warmup_steps", "0", "--train_steps", "1", "--eval_freq", "1"]
    maml.main([*first, "--run_name", "one"])
    torch.manual_seed(1)
    begin = Conv4(width=8, strided=True).weight2
    after = torch.load(tmp_path / "one" / "checkpoint.pt", weights_only=True)["objects"]["model"]["encoder.weight2"]
    lengths = torch.linalg.svdvals((after - begin.detach()).flatten(1)) / 0.05
    assert lengths.min() > 0.5 and lengths.max() < 1.3  # Adam's step has one large singular value


def test_beside_muon_adam_learns_what_the_inner_steps_have_of_their_own(tmp_path):
    flags = [*SMOKE, "--optimizer", "muon", "--learning_rate", "0.05", "--learn_inner_lrs", "--per_step_norm"]
    flags += ["--inner_steps", "2", "--warmup_steps", "0", "--schedule", "constant", "--width", "8", "--num_query", "2"]
    flags += ["--num_test_tasks", "4", "--num_val_tasks", "4", "--eval_freq", "1", "--log_dir", str(tmp_path)]
    saved = lambda name: torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["objects"]
    maml.main([*flags, "--train_steps", "1", "--run_name", "first"])
    first = saved("first")["model"]
    moved = {name: (first[name] - before).abs() for name, before in (("rates", 0.4), ("shifts", 0.0))}
    moved["rates"][:, -2] = (first["rates"][:, -2] - 5 / 8**0.5).abs()  # of the head's weight, N / sqrt(D)
    used = {name: change[change > 0] for name, change in moved.items()}
    for change in used.values():  # Adam's first step has the length of its rate, unless the gradient is tiny
        assert len(change) > 10 and change.max() < 1.001 * outer_loop.STEPS_RATE < 1.01 * change.median()
    maml.main([*flags, "--train_steps", "4", "--run_name", "whole"])
    maml.main(["--resume", str(tmp_path / "first"), "--train_steps", "4"])
    assert all(map(torch.equal, saved("first")["model"].values(), saved("whole")["model"].values()))


def test_first_order_is_the_gradient_at_the_adapted_parameters():
    model, tasks = learner(steps=2, learn=False), batch(1)
    s = Setting(N, first_order=True, dtype=torch.float64)
    first = gradients(model, tasks, s)
    support, labels, query, query_labels = (x[0] for x in tasks)
    end = inner_loop(model.theta(), model.step_sizes(2), support, labels, s)[-1]
    end = {k: p.detach().requires_grad_() for k, p in end.items()}
    there = torch.autograd.grad(F.cross_entropy(query_logits(end, support, query, s), query_labels), list(end.values()))
    second = gradients(model, tasks, s._replace(first_order=False))
    for (name, _), g in zip(end.items(), there, strict=True):
        mine = name if name.startswith("head") else f"encoder.{name}"
        assert torch.allclose(first[mine], g, rtol=0, atol=1e-12), name
        assert (first[mine] - second[mine]).norm() > 1e-3 * second[mine].norm(), name  # the second order is there


@pytest.mark.parametrize("batch_norm", ["transductive", "support"])
def test_without_inner_steps_proto_maml_is_protonet(batch_norm):
    """Logits equal -||f - c||^2 up to a constant of each query."""
    s, model = Setting(N, head="proto", batch_norm=batch_norm, dtype=torch.float64), learner("proto", 0)
    support, labels, query, _ = (x[0] for x in batch(1))
    (theta,) = inner_loop(model.theta(), [], support, labels, s)
    logits = query_logits(theta, support, query, s)
    if batch_norm == "support":
        features = maml.embed(theta, torch.cat([support, query]), s, len(support))
    else:
        features = torch.cat([maml.embed(theta, x, s, n) for x, n in ((support, len(support)), (query, 0))])
    theirs = proto_logits(features[None, : len(support)], features[None, len(support) :], N)[0]
    difference = logits - theirs
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-10)
    assert difference.std() > 0  # it is a constant of the query, not zero


@pytest.mark.parametrize("sphere", [False, True])
def test_the_warm_up_head_is_one_inner_step_from_zero(sphere):
    """At a rate of N / sqrt(D) for the weights; the bias and the body do not move from a zero head."""
    s = Setting(N, strided=False, dtype=torch.float64, sphere=sphere)
    model = MAML(Conv4(width=4), N, 1, 0.4, head_lr=N / 4**0.5).double()
    support, labels, _, _ = (x[0] for x in batch(1))
    after = inner_loop(model.theta(), model.step_sizes(1), support, labels, s)[-1]
    (made,) = inner_loop(model.theta(), [], support, labels, s._replace(head="one_step"))
    assert made["head_weight"].abs().max() > 0.05
    for name in after:
        assert torch.allclose(after[name], made[name], atol=1e-12), name


@pytest.mark.parametrize("head", ["proto", "one_step"])
def test_the_warm_up_asks_in_both_directions(head):
    """Its loss is the mean of the loss without inner steps of a task and of the task with exchanged roles."""
    s, theta = Setting(N, head=head, dtype=torch.float64), learner("proto", 0).theta()
    sampler = EpisodeSampler(known_dataset(), "train", N, 1, 1, 1, seed=4)
    support, labels, query, query_labels = (x[0] for x in sampler.sample())
    support, query = (x.double() + torch.rand_like(x, dtype=torch.float64) for x in (support, query))
    forth = maml.task_loss(theta, [], support, labels, query, query_labels, s)
    back = maml.task_loss(theta, [], query[query_labels.argsort()], labels, support, labels, s)
    found = maml.warmup_loss(theta, support, labels, query, query_labels, s)
    assert torch.allclose(found, (forth + back) / 2, atol=1e-12) and (forth - back).abs() > 1e-6


@pytest.mark.parametrize("batch_norm", ["transductive", "support"])
def test_on_the_sphere_one_step_from_a_zero_head_compares_distances(batch_norm):
    """With one shot: its logits are those of distances to the prototypes, up to scale and a constant of each query."""
    s = Setting(N, strided=False, dtype=torch.float64, sphere=True, batch_norm=batch_norm)
    model = MAML(Conv4(width=4), N, 1, 0.4, head_lr=N / 4**0.5).double()
    support, _, query, _ = (x[0] for x in batch(1))
    support, labels = support[::K], torch.arange(N)
    theta = inner_loop(model.theta(), model.step_sizes(1), support, labels, s)[-1]
    logits = query_logits(theta, support, query, s)
    if batch_norm == "support":
        both = maml.embed(theta, torch.cat([support, query]), s, N)
        centres, features = both[:N], both[N:]
    else:
        centres, features = (maml.embed(theta, x, s, len(x)) for x in (support, query))
    assert torch.allclose(centres.square().sum(-1), torch.tensor(4.0, dtype=torch.float64), rtol=1e-2)
    assert centres.min() < 0 and features.min() < 0  # centred: what comes out of the last ReLU is not negative
    difference = logits + torch.cdist(features, centres).square() / 2 / 4**0.5
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-2)
    assert difference.std() > 0


def test_a_zero_head_is_adapted_but_not_meta_learned():
    s, tasks = Setting(N, dtype=torch.float64, first_order=True, strided=False), batch(2)
    model = MAML(Conv4(width=4), N, 2, 0.4, zero_head=True).double()
    found = gradients(model, tasks, s)
    assert "head_weight" not in found and found["encoder.weight0"].abs().max() > 0
    before, *_, after = inner_loop(model.theta(), model.step_sizes(2), tasks[0][0], tasks[1][0], s)
    assert before["head_weight"].abs().max() == 0 and after["head_weight"].abs().max() > 0


def test_anil_adapts_the_head_alone_and_maml_everything():
    tasks, model = batch(1), learner()
    for freeze_body in (True, False):
        s = Setting(N, freeze_body=freeze_body, dtype=torch.float64)
        before, after = inner_loop(model.theta(), model.step_sizes(1), tasks[0][0], tasks[1][0], s)
        for name in before:
            assert torch.equal(before[name], after[name]) == (freeze_body and not name.startswith("head")), name


@pytest.mark.parametrize("sphere", [False, True])
def test_queries_influence_each_other_only_in_the_transductive_mode(sphere):
    model, tasks = learner(), batch(1)
    support, labels, query, _ = (x[0] for x in tasks)
    changed = query.clone()
    changed[-1] = 1 - changed[-1]
    for mode, same in (("support", True), ("transductive", False)):
        s = Setting(N, batch_norm=mode, dtype=torch.float64, sphere=sphere)
        theta = inner_loop(model.theta(), model.step_sizes(1), support, labels, s)[-1]
        a, b = (query_logits(theta, support, x, s)[:-1] for x in (query, changed))
        assert torch.allclose(a, b, atol=1e-12) == same


@pytest.mark.parametrize("head_is_zero", [True, False])
def test_before_adaptation_the_linear_head_scores_one_in_n(head_is_zero):
    """5 sigma over 600 tasks; the labels of a task are dealt at random, so a fixed head cannot know them."""
    torch.manual_seed(0)
    model = MAML(Conv4(width=4, strided=True), 5, 1, 0.4)
    if not head_is_zero:
        torch.nn.init.normal_(model.head_weight)
    sampler = EpisodeSampler(known_dataset(), "test", 5, 1, 3, 50, seed=2)
    found = evaluate(model, sampler, 600, Setting(5), 1)
    before = found["query"][:, 0]
    assert before.shape == (600,)
    if head_is_zero:
        assert before.tolist() == pytest.approx([0.2] * 600)
    else:
        assert abs(before.mean() - 0.2) < 5 * before.std() / 600**0.5 and before.std() > 0


@pytest.mark.parametrize("mode, other", [("transductive", "support"), ("support", "transductive")])
def test_one_inner_loop_is_asked_in_both_modes_of_batch_norm(mode, other):
    sampler = EpisodeSampler(load_dataset("glyphs"), "test", N, K, 8, 4, seed=2)
    model = learner("proto", steps=2).float()
    found = evaluate(model, sampler, 6, Setting(N, head="proto", batch_norm=mode), 2, both=True)
    alone = evaluate(model, sampler, 6, Setting(N, head="proto", batch_norm=other), 2)
    assert torch.equal(found["other"], alone["query"][:, -1]) and "other" not in alone
    assert not torch.equal(found["other"], found["query"][:, -1])


@pytest.mark.parametrize("head, freeze_body", [("linear", False), ("linear", True), ("proto", False)])
def test_how_far_each_layer_moves_is_the_norm_of_its_update(head, freeze_body):
    """Against a direct computation with numpy in float64, task by task; the body of ANIL stays where it is."""
    s, model = Setting(N, head=head, freeze_body=freeze_body, dtype=torch.float64), learner(head, steps=2)
    sampler = EpisodeSampler(known_dataset(), "test", N, K, Q, 4, seed=2)
    sampler.gather = lambda rows: EpisodeSampler.gather(sampler, rows).double()
    found = evaluate(model, sampler, 6, s, 2)["moved"]
    assert found.shape == (6, 5) and not found.requires_grad
    tasks = [task for batch in sampler.first(6) for task in zip(*batch, strict=True)]
    for task, mine in zip(tasks, found.tolist(), strict=True):
        path = inner_loop(model.theta(), model.step_sizes(2), task[0], task[1], s)
        before, after = ({k: p.detach().numpy() for k, p in path[i].items()} for i in (0, -1))
        for layer, value in zip(maml.LAYERS, mine, strict=True):
            names = ["head_weight", "head_bias"]
            if layer != "head":
                names = [f"{part}{maml.LAYERS.index(layer)}" for part in ("weight", "gamma", "beta")]
            old, new = (np.concatenate([tensors[k].ravel() for k in names]) for tensors in (before, after))
            assert value == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-12), layer
            assert (value > 0) == (layer == "head" or not freeze_body)


def test_a_head_of_zeros_has_no_relative_update(tmp_path):
    flags = ["--zero_head", "--first_order", "--train_steps", "2", "--warmup_steps", "1", "--eval_freq", "2"]
    flags += ["--num_test_tasks", "2", "--num_val_tasks", "2", "--num_query", "2", "--log_dir", str(tmp_path)]
    metrics = maml.main([*SMOKE, *flags])
    moved = metrics["update_norm_per_layer"]
    assert list(moved) == list(maml.LAYERS) and moved["head"] is None
    json.dumps(metrics, allow_nan=False)


def test_evaluation_keeps_no_graph_and_later_steps_repeat_the_last_rate():
    model = learner(steps=2)
    with torch.no_grad():
        model.rates.copy_(torch.arange(model.rates.numel()).view_as(model.rates))
    rates = model.step_sizes(4)
    assert [r["head_bias"].item() for r in rates] == [len(model.names) - 1] + [2 * len(model.names) - 1] * 3
    sampler = EpisodeSampler(known_dataset(), "test", N, K, Q, 4, seed=2)
    found = evaluate(model.float(), sampler, 6, Setting(N), 3)
    assert found["query"].shape == found["support"].shape == (6, 4)
    assert not found["query"].requires_grad and not found["support"].requires_grad


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--first_order",
            "--head",
            "proto",
            "--inner_steps",
            "0",
            "--jitter",
            "0",
            "--test_inner_steps",
            "2",
            "--schedule",
            "constant",
            "--train_classes",
            "7",
            "--features",
            "sphere",
        ],
        [
            "--freeze_body",
            "--learn_inner_lrs",
            "--inner_steps",
            "2",
            "--multi_step_loss",
            "--num_classes",
            "3",
            "--features",
            "plain",
        ],
        ["--per_step_norm", "--learn_inner_lrs", "--inner_steps", "2", "--multi_step_loss", "--test_inner_steps", "3"],
        ["--optimizer", "muon", "--learning_rate", "0.05", "--warmup_steps", "0"],
        ["--optimizer", "muon", "--per_step_norm", "--learn_inner_lrs", "--inner_steps", "2"],
        ["--batch_norm", "support", "--encoder", "conv4", "--clip", "0", "--num_shot", "2", "--dtype", "float32"],
        ["--inner_lr", "0.1", "--learning_rate", "1e-2", "--train_query", "1", "--num_query", "4", "--no-rotations"],
        [
            "--split",
            "lake",
            "--first_order",
            "--zero_head",
            "--num_test_tasks",
            "2",
            "--width",
            "8",
            "--patience",
            "1",
            "--dtype",
            "bfloat16",
        ],
    ],
)
def test_every_flag_in_a_smoke_run(flags, tmp_path):
    base = [
        "--train_steps",
        "4",
        "--warmup_steps",
        "1",
        "--eval_freq",
        "4",
        "--num_test_tasks",
        "4",
        "--num_val_tasks",
        "4",
        "--num_query",
        "3",
    ]
    metrics = maml.main([*SMOKE, *base, "--log_dir", str(tmp_path), "--run_name", "a", *flags])
    assert 0 < metrics["test_accuracy"] == metrics[f"test_accuracy_{metrics['batch_norm']}"] <= 1
    again = maml.main(["--test", "--checkpoint", str(tmp_path / "a")])
    assert again["test_accuracy"] == metrics["test_accuracy"]


def test_fixed_labels_keep_the_last_model_and_report_the_training_tasks(tmp_path):
    flags = [
        "--fixed_labels",
        "--num_test_tasks",
        "4",
        "--num_val_tasks",
        "4",
        "--num_query",
        "3",
        "--eval_freq",
        "2",
        "--warmup_steps",
        "0",
        "--train_steps",
        "4",
    ]
    metrics = maml.main([*SMOKE, *flags, "--log_dir", str(tmp_path)])
    assert metrics["best_step"] == 4 and 0 <= metrics["train_accuracy"] <= 1
    assert abs(metrics["train_accuracy_before"] - 0.2) < 0.2


def test_training_learns_the_glyphs(tmp_path):
    flags = ["--train_steps", "150", "--eval_freq", "150", "--num_test_tasks", "100", "--learning_rate", "5e-3"]
    metrics = maml.main([*SMOKE, *flags, "--head", "proto", "--first_order", "--log_dir", str(tmp_path)])
    assert metrics["test_accuracy"] > 0.5 and abs(metrics["support_accuracy_per_step"][-1] - 1) < 0.1


def test_curves_and_metrics_tell_before_from_after(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    maml.main(
        [
            *SMOKE,
            "--log_dir",
            str(tmp_path),
            "--run_name",
            "a",
            "--learn_inner_lrs",
            "--train_steps",
            "2",
            "--warmup_steps",
            "0",
            "--eval_freq",
            "1",
        ]
    )
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    wanted = {
        "Loss/train",
        "Loss/test",
        "Accuracy/test",
        "Accuracy/val",
        "Adaptation/support_before",
        "Gradient/norm",
        "Adaptation/support_after",
        "Adaptation/query_after_0_steps",
        "Adaptation/query_after_1_steps",
        "Rates/weight0_step1",
        "Memory/peak_MB",
        "Time/tasks_per_second",
    }
    assert wanted <= set(events.Tags()["scalars"])
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert len(metrics["query_accuracy_per_step"]) == 2 and metrics["peak_memory_MB"] > 0
    assert {"test_accuracy_support", "test_accuracy_transductive", "accuracy_before_adaptation"} <= set(metrics)


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    base = [
        *SMOKE,
        "--num_test_tasks",
        "4",
        "--num_val_tasks",
        "4",
        "--learn_inner_lrs",
        "--train_steps",
        "6",
        "--eval_freq",
        "2",
        "--warmup_steps",
        "3",
    ]
    maml.main([*base, "--log_dir", str(tmp_path), "--run_name", "whole"])
    real = experiment.Run.save

    def save(run):
        real(run)
        if run.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "save", save)
        maml.main([*base, "--log_dir", str(tmp_path), "--run_name", "stopped"])
    maml.main(["--resume", str(tmp_path / "stopped")])
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["objects"] for n in ("whole", "stopped"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert torch.equal(a["sampler"]["generator"], b["sampler"]["generator"])


def test_a_diverging_inner_loop_ends_with_one_line(run_script, tmp_path):
    """1e6 at the first step: nothing is saved. Resuming is the user's way on where something was.

    Features on the sphere stay finite at any rate, so that nothing overflows there.
    """
    flags = ["--warmup_steps", "0", "--inner_lr", "1e6", "--head_lr", "1e6", "--inner_steps", "5"]
    flags += ["--features", "plain"]
    result = run_script("maml.py", *SMOKE, *flags, "--log_dir", tmp_path)
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: the loss is ") and "lower the learning rate" in line
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_contradictory_flags():
    for flags, message in (
        (["--inner_steps", "0"], "--inner_steps 0 with --head linear"),
        (["--inner_steps", "0", "--head", "proto", "--learn_inner_lrs"], "--learn_inner_lrs needs"),
        (["--warmup_steps", "20"], "--warmup_steps 20 must be less than --train_steps 20"),
        (["--inner_lr", "nan"], "--inner_lr"),
        (["--fixed_labels", "--head", "proto"], "--fixed_labels with --head proto"),
        (["--freeze_body", "--per_step_norm"], "--per_step_norm needs"),
    ):
        with pytest.raises(UserError, match=message):
            maml.parse_args([*SMOKE, *flags])
