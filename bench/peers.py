"""Installed peers beside ours: MAML by higher and by TorchOpt, prototypical networks by easyfsl.

    pip install -r requirements-peers.txt
    python -m bench maml --peers --repeats 5       meta-gradients of 16 tasks, strided and pooled, 1 and 5 steps
    python -m bench protonet --peers --repeats 10  the gradient of 16 tasks
    python -m bench costs --peers --repeats 10     the meta-gradient of 32 sinusoids

Each peer is called as its documentation says, on the network, the tasks and in the arithmetic (float32) of ours.
Before anything is timed its loss and its gradient are compared with ours in float64; a peer that differs by more than
1e-8 is refused. A peer that is not installed is named and left out.
"""

from __future__ import annotations

from fewshot.learners.conv4 import Conv4
from fewshot.learners.task_loop import mean_over_tasks
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import Dataset

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

import maml
import profile_costs
import protonet

TOLERANCE = 1e-8  # of the loss and of the gradient, relative, in float64
SOME = 4  # tasks that are compared

# ------------------------------------------------------------------------------------ the peers
# All: the mean loss of the tasks (support x, y, query x, y, each [B, ...]); its gradient is added to that of `net`.


def by_higher(net: nn.Module, loss_of: Callable, tasks, rate: float, steps: int) -> float:
    """MAML by higher 0.2 (Grefenstette et al. 2019): the inner loop in a context, with the real initial weights."""
    higher, B = import_module("higher"), len(tasks[0])
    optimizer, total = torch.optim.SGD(net.parameters(), rate), 0.0
    for x, y, query_x, query_y in zip(*tasks, strict=True):
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(steps):
                inner.step(loss_of(fast(x), y))
            loss = loss_of(fast(query_x), query_y) / B
            loss.backward()
            total += loss.item()
    return total


def by_torchopt(net: nn.Module, loss_of: Callable, tasks, rate: float, steps: int) -> float:
    """MAML by TorchOpt 0.7 (Ren et al. 2023): a differentiable SGD moves the module, which is then put back."""
    torchopt, B, total = import_module("torchopt"), len(tasks[0]), 0.0
    inner = torchopt.MetaSGD(net, lr=rate)
    start = [(part, torchopt.extract_state_dict(part, by="reference")) for part in (net, inner)]
    for x, y, query_x, query_y in zip(*tasks, strict=True):
        for _ in range(steps):
            inner.step(loss_of(net(x), y))
        loss = loss_of(net(query_x), query_y) / B
        loss.backward()
        total += loss.item()
        for part, state in start:
            torchopt.recover_state_dict(part, state)
    return total


def by_easyfsl(backbone: nn.Module, tasks) -> float:
    """Prototypical networks by easyfsl 1.5 (Bennequin), task by task.

    Its scores are minus the distances. The paper's, and ours, are minus their squares; ours are divided by sqrt(D).
    """
    classifier = import_module(MODULES["easyfsl"]).PrototypicalNetworks(backbone)
    B, total = len(tasks[0]), 0.0
    for support, labels, query, query_labels in zip(*tasks, strict=True):
        classifier.process_support_set(support, labels)
        scores = -classifier(query).square() / classifier.prototypes.shape[1] ** 0.5
        loss = F.cross_entropy(scores, query_labels) / B
        loss.backward()
        total += loss.item()
    return total


INNER_LOOPS = {"higher": by_higher, "torchopt": by_torchopt}
CLASSIFIERS = {"easyfsl": by_easyfsl}
MODULES = {"easyfsl": "easyfsl.methods"}  # what is imported of a peer


def installed(peers: dict[str, Callable]) -> dict[str, Callable]:
    """Those of `peers` that can be imported; prints a line for each other."""
    found = {}
    for name, peer in peers.items():
        try:
            import_module(MODULES.get(name, name))
            found[name] = peer
        except Exception as error:  # an installation that does not fit torch fails in many ways
            print(f"  {name} is left out: {error} (pip install -r requirements-peers.txt)")
    return found


def difference(ours: Callable, theirs: Callable) -> float:
    """How far loss and gradient of two steps are apart together, relative; a step returns (loss, gradient [D])."""
    (loss, gradient), (their_loss, their_gradient) = ours(), theirs()
    # Their sum: of two numbers of which one is nan, max may return the other.
    return abs(loss - their_loss) / abs(loss) + ((gradient - their_gradient).norm() / gradient.norm()).item()


def admitted(title: str, ours: Callable, peers: dict[str, Callable]) -> list[str]:
    """Names of the peers that compute what ours computes; prints a line for each that is refused.

    ours and each peer: a step in float64 as `difference` takes it.
    """
    names = []
    for name, theirs in peers.items():
        apart = difference(ours, theirs)
        if apart <= TOLERANCE:  # false for nan
            names.append(name)
        else:
            print(f"  {name} is refused: its loss or gradient differs from ours by {apart:.1e} ({title})")
    return names


def gradients(module: nn.Module) -> torch.Tensor:
    """The gradients of all parameters in one vector, zero where there is none; forgets them."""
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])
    module.zero_grad()
    return found


def timed(step: Callable, module: nn.Module) -> Callable:
    """The step as it is raced: from no gradient to a new one."""

    def run() -> None:
        module.zero_grad()
        step()

    return run


# ------------------------------------------------------------------------------------ the races
# Each yields (title, name -> step) of a race that at least one peer takes part in; ours comes first.


class Network(nn.Module):
    """The network of maml.py with the parameters `theta` as a module, which is what peers adapt."""

    def __init__(self, theta: maml.Parameters, s: maml.Setting):
        super().__init__()
        self.s, self.names = s, list(theta)
        for name, p in theta.items():
            self.register_parameter(name, nn.Parameter(p.detach().clone()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return maml.classify({name: getattr(self, name) for name in self.names}, images, self.s, 0)


def races_of_maml(args, device: torch.device, dataset: Dataset) -> Iterator[tuple[str, dict]]:
    """Meta-gradients of second order, in the strided network of the paper's recipe and the pooled one of ours.

    Features and head are those of the recipes: plain and strided, or pooled and on a sphere.
    """
    B, K, N, Q, rate = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query, 0.4
    tasks = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device).sample()
    peers = installed(INNER_LOOPS)
    for strided in (True, False):
        for steps in (1, 5):
            title = f"peers, maml, {'strided' if strided else 'pooled'}, {steps} steps, B {B}, N {N}, K {K}, Q {Q}"
            s = maml.Setting(N, strided, sphere=not strided)
            learner = maml.MAML(Conv4(dataset.images.shape[1], strided=strided), N, steps, rate).to(device)

            def ours(tasks=tasks, learner=learner, s=s, steps=steps) -> float:
                theta, sizes = learner.theta(), learner.step_sizes(steps)
                loss = mean_over_tasks(lambda *task: maml.task_loss(theta, sizes, *task, s), tasks, learner)
                loss.backward()
                return loss.item()

            some, double = in_double(tasks), copy.deepcopy(learner).double()
            with torch.no_grad():
                double.rates.fill_(rate)  # 0.4 in float32 is another number
                double.head_weight.normal_(std=0.1)  # one of zeros would hide how the gradient enters the body

            def theirs(peer, theta, tasks, s=s, steps=steps):
                net = Network(theta, s)
                return net, partial(peer, net, F.cross_entropy, tasks, rate, steps)

            # rates is a parameter too, but has no gradient
            of_theta = lambda double=double: torch.cat([p.grad.flatten() for p in double.theta().values()])
            ours_twice = lambda some=some, d=double, g=of_theta, o=ours: (d.zero_grad(), o(some, d), g())[1:]
            checked = {}
            for name, peer in peers.items():
                net, step = theirs(peer, double.theta(), some)
                checked[name] = lambda net=net, step=step: (step(), gradients(net))
            contestants = {"ours": timed(ours, learner)}
            for name in admitted(title, ours_twice, checked):
                net, step = theirs(peers[name], learner.theta(), tasks)
                contestants[name] = timed(step, net)
            if len(contestants) > 1:
                yield title, contestants


class Backbone(nn.Module):
    """An encoder whose batch norm is `norm`, whatever the caller of it wants."""

    def __init__(self, encoder: nn.Module, norm: str):
        super().__init__()
        self.encoder, self.norm = encoder, norm

    def forward(self, images: torch.Tensor, **_) -> torch.Tensor:
        return self.encoder(images, norm=self.norm, momentum=0.1 if self.norm == "batch" else 0.0)


def races_of_protonet(args, device: torch.device, dataset: Dataset) -> Iterator[tuple[str, dict]]:
    """Gradients of the tasks of a meta-batch.

    easyfsl embeds support set and queries of each task in calls of their own, and so with statistics of their own;
    ours are of the whole meta-batch. They are compared with running averages and raced as they train.
    """
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    tasks = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device).sample()
    title, encoder = f"peers, protonet, B {B}, N {N}, K {K}, Q {Q}", Conv4(dataset.images.shape[1])
    encoder = encoder.to(device, memory_format=torch.channels_last)
    peers = installed(CLASSIFIERS)

    def ours(backbone: nn.Module, tasks) -> float:
        loss = protonet.episode_loss(backbone, tasks, N, torch.float32)
        loss.backward()
        return loss.item()

    some, double = in_double(tasks), Backbone(copy.deepcopy(encoder).double(), "running")
    of = lambda step: lambda: (step(double, some), gradients(double))
    names = admitted(title, of(ours), {name: of(peer) for name, peer in peers.items()})
    contestants = {}
    for name, step in {"ours": ours, **{name: peers[name] for name in names}}.items():
        backbone = Backbone(copy.deepcopy(encoder), "batch")
        contestants[name] = timed(partial(step, backbone, tasks), backbone)
    if names:
        yield title, contestants


def layers_of(model: profile_costs.Initialisation) -> nn.Sequential:
    """The network of profile_costs.py in torch's own layers."""
    blocks = []
    for weight, bias in model():
        linear = nn.Linear(*weight.shape, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight.T), linear.bias.copy_(bias[0])
        blocks += [linear, nn.ReLU()]
    return nn.Sequential(*blocks[:-1])


def as_one_vector(net: nn.Sequential) -> torch.Tensor:
    """The gradients of its layers in the order of `Initialisation.theta`; forgets them."""
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    found = torch.cat([part for layer in linears for part in (layer.weight.grad.T.flatten(), layer.bias.grad)])
    net.zero_grad()
    return found


def races_of_costs(args, device: torch.device, dataset: Dataset | None) -> Iterator[tuple[str, dict]]:
    """The meta-gradient of MAML on sinusoids at the setting of profile_costs.py; ours by its fastest engine here."""
    tiny = ["--meta_batch_size", "4"] if args.smoke else []
    flags: Namespace = profile_costs.parse_args(["--hidden_dim", str(args.hidden_dim), *tiny])
    B, steps, rate = flags.meta_batch_size, flags.inner_steps, flags.inner_lr
    title = f"peers, costs, MAML, B {B}, hidden {flags.layers} x {flags.hidden_dim}, {steps} inner steps"
    peers = installed(INNER_LOOPS)
    engine, at_once = profile_costs.fastest_engine(flags, "maml", device) if peers else ("vmap", B)
    model = profile_costs.Initialisation(flags.layers, flags.hidden_dim).to(device)
    tasks = profile_costs.sample_tasks(B, flags.num_shot, flags.num_query, device)

    def ours(model: nn.Module, tasks) -> float:
        return profile_costs.maml_gradient(model, tasks, rate, steps, at_once, "maml", engine).item()

    some, double = in_double(tasks), copy.deepcopy(model).double()

    def theirs(peer: Callable) -> tuple[float, torch.Tensor]:
        net = layers_of(double)
        return peer(net, F.mse_loss, some, rate, steps), as_one_vector(net)

    checked = {name: partial(theirs, peer) for name, peer in peers.items()}
    contestants = {"ours": timed(partial(ours, model, tasks), model)}
    for name in admitted(title, lambda: (ours(double, some), gradients(double)), checked):
        net = layers_of(model)
        contestants[name] = timed(partial(peers[name], net, F.mse_loss, tasks, rate, steps), net)
    if len(contestants) > 1:
        yield title, contestants


def in_double(tasks) -> list[torch.Tensor]:
    """The first few of the tasks in float64; labels stay whole numbers."""
    return [x[:SOME].double() if x.is_floating_point() else x[:SOME] for x in tasks]


RACES = {"maml": races_of_maml, "protonet": races_of_protonet, "costs": races_of_costs}
