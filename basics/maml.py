"""MAML: an initialisation from which a few gradient steps learn a new task.

Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks". The inner loop takes
gradient steps on a task's support set, from theta on. The outer loop moves theta so that the queries' loss after these
steps falls; its gradient goes through the steps.

    python -m basics.maml --num_classes 5 --num_shot 1
    91.4 ± 0.5 % (600 tasks), 3.0 minutes on an Intel Xeon with AVX-512 and AMX (results/basics/maml.json)

The same with all that makes it better: maml.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from basics import run
from load_data import EpisodeSampler, load_dataset


def strided_conv4(num_classes: int, width: int = 64) -> nn.Sequential:
    """The paper's network for Omniglot, images [n, 1, 28, 28] -> logits [n, N]; batch norm keeps no averages."""
    blocks = []
    for channels in (1, width, width, width):
        convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)  # batch norm has a bias
        blocks += [convolution, nn.BatchNorm2d(width, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def adapt(net, theta: dict, x, y, rate: float, steps: int, first_order=False, criterion=F.cross_entropy) -> dict:
    """The inner loop (algorithm 1, lines 5 and 6): theta after `steps` gradient steps on the support set x, y."""
    for _ in range(steps):
        loss = criterion(functional_call(net, theta, (x,)), y)
        gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
        theta = {name: p - rate * g for (name, p), g in zip(theta.items(), gradient, strict=True)}
    return theta


def meta_loss(net, theta: dict, tasks, rate: float, steps: int, first_order=False, criterion=F.cross_entropy):
    """The outer loss (algorithm 1, line 8): the mean over tasks of the queries' loss after adaptation."""
    losses = []
    for support, support_labels, query, query_labels in zip(*tasks, strict=True):
        adapted = adapt(net, theta, support, support_labels, rate, steps, first_order, criterion)
        losses.append(criterion(functional_call(net, adapted, (query,)), query_labels))
    return torch.stack(losses).mean()


def evaluate(net, theta: dict, test: EpisodeSampler, num_tasks: int, rate: float, steps: int) -> torch.Tensor:
    """Accuracy of each test task [num_tasks]; batch norm sees all queries of a task at once (transductive)."""
    right = []
    for batch in test.first(num_tasks):
        for support, support_labels, query, query_labels in zip(*batch, strict=True):
            adapted = adapt(net, theta, support, support_labels, rate, steps, first_order=True)
            guesses = functional_call(net, adapted, (query,)).argmax(dim=1)
            right.append((guesses == query_labels).float().mean())
    return torch.stack(right)


def main(num_classes: int = 5, num_shot: int = 1, steps: int = 600, random_seed: int = 1) -> torch.Tensor:
    torch.manual_seed(random_seed)
    N, K, data = num_classes, num_shot, load_dataset()
    train = EpisodeSampler(data, "train", N, K, 5, 16, seed=random_seed, rotations=True)
    test = EpisodeSampler(data, "test", N, K, 15, 2000 // (N * (K + 15)), seed=1_000_002)  # the tasks of all scripts
    net = strided_conv4(N)
    theta, inner = dict(net.named_parameters()), {"rate": 0.4, "steps": 1}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(1, steps + 1):
        tasks = train.sample()  # 16 of them
        loss = meta_loss(net, theta, tasks, **inner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:5d}, loss {loss.item():.3f}", flush=True)
    return evaluate(net, theta, test, 600, **inner)


if __name__ == "__main__":
    run(main)
