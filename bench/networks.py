"""Races of one training step of each method beside the plain references of basics/."""

from __future__ import annotations

from fewshot import experiment
from fewshot.learners.conv4 import Conv4
from fewshot.learners.memory import learn_a_little
from fewshot.learners.task_loop import mean_over_tasks
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import Dataset

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import basics.evolution_strategies
import basics.maml
import basics.mann
import basics.meta_lstm
import basics.protonet
import meta_lstm
import profile_costs
import protonet
from attention import CausalAttention, query_loss
from bench.episodes import ListSampler
from bench.machines import seconds_to_accuracy
from bench.race import plain_step, precisions, print_race, race
from external_memory import SequenceLearner
from hw1 import MANN, Recurrent
from maml import MAML, Setting, embed, task_loss


def our_step(model, optimizer, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> None:
    """The step of the train loop of hw1.py and of attention.py."""
    with experiment.autocast(images.device, dtype):
        preds = model(images, labels)
    loss = query_loss(preds.float() if dtype == torch.bfloat16 else preds, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class OverEpisodes(torch.nn.Module):
    """A reader of sequences that is given episodes as hw1.py is: support images with their labels, then the queries."""

    def __init__(self, reader: SequenceLearner):
        super().__init__()
        self.reader = reader

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        told = torch.cat([labels[:, :-1], torch.zeros_like(labels[:, -1:])], dim=1)
        return self.reader(torch.cat([features, told], dim=-1).flatten(1, 2)).view(labels.shape)


def kept_for_backward(call) -> float:
    """Megabytes of all tensors that `call` keeps for its backward pass, each counted once."""
    storages = {}

    def remember(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        call()
    return round(sum(storages.values()) / 1e6, 2)


def products_of_a_step(course: nn.Module, B: int, T: int):
    """A function that does the matrix products that no step on B sequences of length T can do without, and no more.

    For each layer: the input's and the state's share of the gates, forward and backward, on numbers of the right
    shapes. The gradient of the pixels, which oneDNN's LSTM also computes, is not among them.
    """
    layers = []
    for layer in (course.layer1, course.layer2):
        into, back = layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach()  # [4 H, inputs], [4 H, H]
        sizes = (into.shape[1], *back.T.shape)
        layers.append((into, back, *(torch.randn(B * T, n, device=into.device) for n in sizes)))

    def products() -> None:
        for into, back, inputs, states, gates in layers:
            inputs @ into.T
            for _ in range(T):  # one step of the sequence waits for the one before
                states[:B] @ back.T
                gates[:B] @ back
            gates.T @ inputs
            gates.T @ states
        gates @ into  # of the last layer: what the layer before it learns from

    return products


def bench_mann(args, device: torch.device, dataset: Dataset) -> list[dict]:
    sampler = EpisodeSampler(
        dataset, "train", args.num_classes, args.num_shot, 1, args.meta_batch_size, args.random_seed, device
    )
    images, labels = sampler.sample_rows()
    course = basics.mann.MANN(args.num_classes, args.hidden_dim).to(device)
    course_adam = torch.optim.Adam(course.parameters(), 1e-3)

    def course_step() -> None:
        plain_step(course_adam, basics.mann.query_loss(course(images, labels), labels))

    contestants = {"course step": course_step}
    for dtype in precisions(device, probe=lambda: learn_a_little(torch.nn.LSTM, device)):
        ours = MANN(args.num_classes, args.num_shot + 1, args.hidden_dim).to(device)
        adam = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
        step = lambda ours=ours, adam=adam, dtype=dtype: our_step(ours, adam, images, labels, dtype)
        contestants[f"our step, {str(dtype).removeprefix('torch.')}"] = step
    features, kept = torch.rand(*images.shape[:3], 64, device=device), {}  # as an encoder would give them
    N = args.num_classes
    learners = {
        "lstm": MANN(N, args.num_shot + 1, args.hidden_dim, Recurrent(head="linear"), dim_input=64),
        "attention": CausalAttention(64, layers=2),
        "external": OverEpisodes(SequenceLearner(N, args.hidden_dim, dim_input=64)),
    }
    for memory, ours in learners.items():
        ours = ours.to(device)
        adam = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
        step = lambda ours=ours, adam=adam: our_step(ours, adam, features, labels, torch.float32)
        contestants[f"{memory}, 64 features an image"] = step
        kept[memory] = kept_for_backward(step)
    contestants["the step's matrix products alone, float32"] = products_of_a_step(
        course, len(images), images.shape[1] * images.shape[2]
    )
    title = f"mann, B {args.meta_batch_size}, K {args.num_shot}, N {args.num_classes}, hidden {args.hidden_dim}"
    print("  megabytes kept for the backward pass:", kept)
    return [print_race(title, race(contestants, args.repeats), device, megabytes_kept=kept)]


def bench_protonet(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """16 tasks of 5-way 1-shot 15-query: sampling and one training step, at the same network."""
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    plain = basics.protonet.conv4().to(device)
    plain_adam = torch.optim.Adam(plain.parameters(), 1e-3)
    with tempfile.TemporaryDirectory() as root:
        lists = ListSampler(dataset, "train", N, K + Q - 1, args.random_seed, Path(root))

        def one_after_another() -> None:
            losses = []
            for _ in range(B):
                images, labels = (torch.from_numpy(x).to(device) for x in lists.sample_task())
                images, labels = images.view(K + Q, N, 1, 28, 28), labels.argmax(dim=-1)
                support, query = images[:K].transpose(0, 1).flatten(0, 1), images[K:].flatten(0, 1)  # in class order
                losses.append(basics.protonet.episode_loss(plain, support, query, labels[K:].flatten(), N))
            plain_step(plain_adam, torch.stack(losses).mean())

        contestants = {"tasks one after another": one_after_another}
        for dtype in precisions(device):
            encoder = Conv4().to(device, memory_format=torch.channels_last)
            adam = torch.optim.Adam(encoder.parameters(), 1e-3, fused=True)
            sampler = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device)

            def our_step(encoder=encoder, adam=adam, sampler=sampler, dtype=dtype) -> None:
                loss = protonet.episode_loss(encoder, sampler.sample(), N, dtype)
                adam.zero_grad()
                loss.backward()
                adam.step()

            contestants[f"together, {str(dtype).removeprefix('torch.')}"] = our_step
        result = print_race(f"protonet, B {B}, K {K}, N {N}, Q {Q}", race(contestants, args.repeats, warmup=2), device)
    if args.seeds:
        recipes = ["", "--image_size 32 --train_steps 1500"]
        result["to_accuracy"] = [seconds_to_accuracy(args, 0.988, recipe) for recipe in recipes]
    return [result]


def bench_costs(args, device: torch.device, dataset: Dataset | None) -> list[dict]:
    """32 sinusoids, 5 inner steps, MAML and ES (two perturbations a task): one after another, together, and `auto`."""
    B = 4 if args.smoke else 32
    flags = Namespace(
        meta_batch_size=B,
        num_perturbations=2 * B,
        num_shot=10,
        num_query=100,
        inner_steps=5,
        inner_lr=1e-2,
        sigma=1e-3,
        layers=2,
        hidden_dim=args.hidden_dim,
        learning_rate=1e-3,
    )
    results = []
    for method in ("maml", "es"):
        net = basics.evolution_strategies.mlp(flags.layers, flags.hidden_dim).to(device)
        flat = nn.utils.parameters_to_vector(net.parameters()).detach()  # what Evolution Strategies move
        adam = torch.optim.Adam(net.parameters() if method == "maml" else [flat], 1e-3)

        def plain(net=net, flat=flat, adam=adam, method=method) -> None:
            tasks = [basics.evolution_strategies.sinusoid(flags.num_shot, flags.num_query) for _ in range(B)]
            tasks = [tuple(x.to(device) for x in task) for task in tasks]
            inner = {"rate": flags.inner_lr, "steps": flags.inner_steps}
            if method == "maml":
                theta, stacked = dict(net.named_parameters()), zip(*tasks, strict=True)
                plain_step(adam, basics.maml.meta_loss(net, theta, list(stacked), **inner, criterion=F.mse_loss))
            else:
                noise = torch.randn(B, len(flat), device=device)
                flat.grad, _ = basics.evolution_strategies.estimate(net, flat, tasks, noise, flags.sigma, **inner)
                adam.step()

        model, optimizer = profile_costs.start(flags, device)
        chosen, at_once = profile_costs.fastest_engine(flags, method, device)
        contestants = {"one task after another": plain}
        for name, engine, n in (("vmap", "vmap", 0), (f"auto: {chosen}, {at_once} at once", chosen, at_once)):
            contestants[name] = lambda m=model, o=optimizer, k=method, e=engine, n=n: profile_costs.meta_step(
                m, o, flags, k, e, n
            )
        title = f"costs, {profile_costs.LABELS[method]}, B {B}, hidden 2 x {flags.hidden_dim}, 5 inner steps"
        results.append(print_race(title, race(contestants, args.repeats, warmup=2), device))
    return results


def pooled_conv4(num_classes: int, width: int = 64) -> nn.Sequential:
    """`strided_conv4` of basics/maml.py with pooling in place of strides."""
    blocks = []
    for channels in (1, width, width, width):
        blocks += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
        ]
        blocks += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width, num_classes))


def bench_maml(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """One meta-gradient of the same tasks at the same network.

    Beside them the same images forward and backward through one network in one call, without any inner loop: what is
    left when all arrangement of the tasks costs nothing.
    """
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    tasks = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device).sample()
    images = torch.cat([tasks[0], tasks[2]], dim=1).flatten(0, 1)  # support and query of all tasks
    results = []
    for strided in (True, False):
        shared_encoder = Conv4(strided=strided).to(device, memory_format=torch.channels_last)
        for steps in (1, 5):
            for first_order in (False, True):
                encoder = Conv4(strided=strided)
                learner = MAML(encoder, N, steps, 0.4).to(device)
                net = (basics.maml.strided_conv4 if strided else pooled_conv4)(N).to(device)
                contestants = {}
                for dtype in precisions(device):
                    s = Setting(N, strided, first_order=first_order, dtype=dtype)
                    name = str(dtype).removeprefix("torch.")

                    def plain(net=net, steps=steps, s=s):
                        with experiment.autocast(device, s.dtype):
                            theta = dict(net.named_parameters())
                            basics.maml.meta_loss(net, theta, tasks, 0.4, steps, s.first_order).backward()

                    contestants[f"loop over tasks, {name}"] = plain

                    def ours(learner=learner, s=s, steps=steps):
                        theta, sizes = learner.theta(), learner.step_sizes(steps)
                        loss_of = lambda *task: task_loss(theta, sizes, *task, s)
                        mean_over_tasks(loss_of, tasks, learner).backward()

                    contestants[f"maml.py, {name}"] = ours

                    def shared(encoder=shared_encoder, s=s):
                        embed(dict(encoder.named_parameters()), images, s, 0).sum().backward()

                    contestants[f"all images through one network, {name}"] = shared
                network, order = "strided" if strided else "pooled", "first" if first_order else "second"
                title = f"maml, {network}, {steps} steps, {order} order, B {B}, N {N}, K {K}, Q {Q}"
                results.append(print_race(title, race(contestants, args.repeats, warmup=1), device))
    return results


def bench_meta_lstm(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """B episodes of training: one at a time, as the re-implementations do, against all together."""
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    updates, momentum = (12, 0.9) if K == 1 else (8, 0.95)
    learner = basics.meta_lstm.make_learner(N).to(device)
    meta = basics.meta_lstm.MetaLSTM(nn.utils.parameters_to_vector(learner.parameters()).detach()[:, None]).to(device)
    adam = torch.optim.Adam(meta.parameters(), 1e-3)
    sampler = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device)

    def one_at_a_time() -> None:
        for *task, query_labels in zip(*sampler.sample(), strict=True):
            loss = F.cross_entropy(basics.meta_lstm.query_logits(meta, learner, *task, updates), query_labels)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(meta.parameters(), 0.25)
            adam.step()

    contestants = {"one episode at a time": one_at_a_time}
    sizes, inner = meta_lstm.Learner(1, 28, N), meta_lstm.Inner(updates, N * K, momentum)
    for dtype in precisions(device):
        for share in (1.0, 0.1):
            rule = meta_lstm.MetaLSTM(sizes.initial(), share).to(device)
            ours = torch.optim.Adam(rule.parameters(), 1e-3, fused=True)

            def together(rule=rule, ours=ours, dtype=dtype) -> None:
                ours.zero_grad()
                for tasks in meta_lstm.in_parts(sampler.sample(), args.tasks_at_once):
                    losses, _ = meta_lstm.query_losses(rule, sizes, tasks, inner, dtype=dtype)
                    (losses.sum() / B).backward()
                nn.utils.clip_grad_norm_(rule.parameters(), 0.25)
                ours.step()

            name = str(dtype).removeprefix("torch.")
            contestants[f"together, {name}" + (f", trained share {share}" if share < 1 else "")] = together
    title = f"meta_lstm, {B} episodes, N {N}, K {K}, Q {Q}, {updates} updates"
    return [print_race(title, race(contestants, args.repeats, warmup=1), device)]
