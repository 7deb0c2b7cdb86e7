"""Plain references of the hot paths, written the way papers and course code do it; benchmark.py races them.

The tests compare our fast paths with some of them in float64.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from load_data import Dataset

# ---------------------------------------------------------------------------------------- episodes


class ListSampler:
    """The course's loader in its fastest state: every image already decoded and held in memory.

    Each task draws class folders, lists them (`list_folders`, as the course's code does every time),
    draws files of each, looks every file up, stacks, shuffles the queries and is then stacked with the
    other tasks, as a DataLoader would. The folders hold empty files; no image is read from them.
    """

    def __init__(self, dataset: Dataset, split: str, num_classes: int, num_shot: int, seed: int, root: Path):
        self.N, self.K, self.list_folders = num_classes, num_shot, True
        self.random = random.Random(seed)
        self.memory, self.files = {}, {}
        for c in dataset.splits[split].tolist():
            folder = root / f"character{c:04d}"
            folder.mkdir()
            for i in range(dataset.counts[c]):
                path = folder / f"{i:04d}.png"
                path.touch()
                image = dataset.images[dataset.starts[c] + i]
                self.memory[str(path)] = image.reshape(-1).astype(np.float32) / 255
            self.files[str(folder)] = os.listdir(folder)
        self.folders = list(self.files)

    def sample_task(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 images [K+1, N, 784] and one-hot labels [K+1, N, N]."""
        N, K = self.N, self.K
        images = [[None] * N for _ in range(K + 1)]
        labels = np.zeros((K + 1, N, N), dtype=np.float32)
        for label, folder in enumerate(self.random.sample(self.folders, N)):
            files = os.listdir(folder) if self.list_folders else self.files[folder]
            for row, file in enumerate(self.random.sample(files, K + 1)):
                images[row][label] = self.memory[os.path.join(folder, file)]
                labels[row, label, label] = 1
        order = self.random.sample(range(N), N)
        images[K] = [images[K][i] for i in order]
        labels[K] = labels[K][order]
        return np.stack([np.stack(row) for row in images]), labels

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        tasks = [self.sample_task() for _ in range(batch_size)]
        images = torch.stack([torch.from_numpy(images) for images, _ in tasks])
        return images, torch.stack([torch.from_numpy(labels) for _, labels in tasks])


# -------------------------------------------------------------------------------------------- MANN


class CourseMANN(nn.Module):
    """The course's network: two LSTM layers, (N + 784) -> hidden -> N."""

    def __init__(self, num_classes: int, hidden_dim: int):
        super().__init__()
        self.layer1 = nn.LSTM(num_classes + 784, hidden_dim, batch_first=True)
        self.layer2 = nn.LSTM(hidden_dim, num_classes, batch_first=True)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        B, rows, N, _ = images.shape
        known = labels.clone()
        known[:, -1] = 0
        sequence = torch.cat([images, known], dim=-1).reshape(B, rows * N, -1)
        hidden, _ = self.layer1(sequence)
        out, _ = self.layer2(hidden)
        return out.reshape(B, rows, N, N)


def course_step(model: CourseMANN, optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Forward, cross entropy on the query row, backward, Adam."""
    preds = model(images, labels)
    loss = F.cross_entropy(preds[:, -1].reshape(-1, preds.shape[-1]), labels[:, -1].reshape(-1, preds.shape[-1]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def products_of_a_step(course: CourseMANN, B: int, T: int):
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


# --------------------------------------------------------------------------- prototypical networks


class PlainConv4(nn.Sequential):
    """The encoder as papers draw it: four times convolution, batch norm, ReLU, pooling; the bias stays."""

    def __init__(self, channels: int = 1, width: int = 64):
        blocks = []
        for i in range(4):
            convolution = nn.Conv2d(channels if i == 0 else width, width, 3, padding=1)
            blocks += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*blocks, nn.Flatten())


def plain_protonet_step(encoder: nn.Module, optimizer, tasks: list) -> float:
    """Tasks one after another: embed the support set, embed the queries, distances, cross entropy."""
    losses = []
    for support, support_labels, query, query_labels in tasks:
        embedded, centres = encoder(support), []
        for c in range(int(support_labels.max()) + 1):
            centres.append(embedded[support_labels == c].mean(dim=0))
        distances = torch.cdist(encoder(query), torch.stack(centres)) ** 2
        losses.append(F.cross_entropy(-distances, query_labels))
    loss = torch.stack(losses).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


# ------------------------------------------------------------------------------------------- costs


def one_sinusoid(K: int, Q: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """One task as course code draws it, by numpy: support x, y [K, 1] and query x, y [Q, 1]."""
    amplitude, phase = np.random.uniform(0.5, 1), np.random.uniform(0, 2 * np.pi)
    bias = np.random.uniform(-0.3, 0.3)
    task = []
    for x in (np.random.uniform(0, 2 * np.pi, K), np.linspace(0, 2 * np.pi, Q)):
        y = amplitude * np.sin(x + phase) + bias
        task += [torch.tensor(v, dtype=torch.float32, device=device).reshape(-1, 1) for v in (x, y)]
    return tuple(task)


def plain_mlp(layers: int, hidden: int) -> nn.Sequential:
    blocks = [nn.Linear(1, hidden), nn.ReLU()]
    for _ in range(layers - 1):
        blocks += [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Linear(hidden, 1))


def course_maml_step(net: nn.Sequential, optimizer, tasks, steps: int, rate: float) -> float:
    """Task after task: adapt with a graph through every inner step, then one backward pass to the initialisation."""
    names, total = [name for name, _ in net.named_parameters()], 0.0
    optimizer.zero_grad()
    for x, y, query_x, query_y in tasks:
        fast = list(net.parameters())
        for _ in range(steps):
            loss = F.mse_loss(torch.func.functional_call(net, dict(zip(names, fast, strict=True)), (x,)), y)
            gradients = torch.autograd.grad(loss, fast, create_graph=True)
            fast = [w - rate * g for w, g in zip(fast, gradients, strict=True)]
        prediction = torch.func.functional_call(net, dict(zip(names, fast, strict=True)), (query_x,))
        loss = F.mse_loss(prediction, query_y) / len(tasks)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def course_es_step(net: nn.Sequential, optimizer, tasks, steps: int, rate: float, sigma: float) -> float:
    """Task after task: fine-tune a perturbed network, the opposite one, and add their difference times the noise."""
    start = {name: value.clone() for name, value in net.state_dict().items()}
    estimate, total = {name: torch.zeros_like(value) for name, value in start.items()}, 0.0
    for x, y, query_x, query_y in tasks:
        noise, losses = {name: torch.randn_like(value) for name, value in start.items()}, []
        for sign in (1, -1):
            net.load_state_dict({name: value + sign * sigma * noise[name] for name, value in start.items()})
            inner = torch.optim.SGD(net.parameters(), rate)
            for _ in range(steps):
                inner.zero_grad()
                F.mse_loss(net(x), y).backward()
                inner.step()
            with torch.no_grad():
                losses.append(F.mse_loss(net(query_x), query_y).item())
        for name, value in noise.items():
            estimate[name] += (losses[0] - losses[1]) / (2 * sigma * len(tasks)) * value
        total += sum(losses) / 2 / len(tasks)
    net.load_state_dict(start)
    for name, parameter in net.named_parameters():
        parameter.grad = estimate[name]
    optimizer.step()
    return total


# -------------------------------------------------------------------------------------------- MAML


def plain_maml_step(theta: dict, tasks, inner_lr: float, steps: int, first_order, strided, sphere=False) -> None:
    """One task after another, create_graph for the second order, in the usual way; adds to the gradients of theta."""

    def network(p, images):
        x = images
        for i in range(4):
            x = F.conv2d(x, p[f"weight{i}"], stride=2 if strided else 1, padding=1)
            x = F.relu(F.batch_norm(x, None, None, p[f"gamma{i}"], p[f"beta{i}"], training=True))
            x = x if strided else F.max_pool2d(x, 2)
        x = x.mean(dim=(2, 3)) if strided else x.flatten(1)
        if sphere:
            x = x - x.mean(dim=0)
            x = x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return F.linear(x, p["head_weight"], p["head_bias"])

    total = 0
    for support, support_labels, query, query_labels in zip(*tasks, strict=True):
        adapted = dict(theta)
        for _ in range(steps):
            loss = F.cross_entropy(network(adapted, support), support_labels)
            gradient = torch.autograd.grad(loss, list(adapted.values()), create_graph=not first_order)
            adapted = {k: p - inner_lr * g for (k, p), g in zip(adapted.items(), gradient, strict=True)}
        total = total + F.cross_entropy(network(adapted, query), query_labels)
    (total / len(tasks[0])).backward()


# --------------------------------------------------------------------------- the LSTM meta-learner


class PlainLearner(nn.Sequential):
    """The learner as a network of torch's own layers."""

    def __init__(self, num_classes: int, momentum: float):
        blocks = []
        for i in range(4):
            norm = nn.BatchNorm2d(32, eps=1e-3, momentum=momentum)
            blocks += [nn.Conv2d(1 if i == 0 else 32, 32, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(32, num_classes))

    def reset_statistics(self) -> None:
        for m in self:
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()

    def copy_from(self, flat: torch.Tensor) -> None:
        """Overwrite the parameters by the flat vector."""
        at = 0
        for p in self.parameters():
            p.data.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()

    def transplant(self, flat: torch.Tensor) -> None:
        """Put slices of the flat vector in the parameters' places, so that gradients flow into it."""
        at = 0
        for m in self:
            for name in ("weight", "bias"):
                old = getattr(m, name, None)
                if old is not None:
                    m._parameters.pop(name, None)
                    setattr(m, name, flat[at : at + old.numel()].view_as(old))
                    at += old.numel()


class PlainMetaLSTM(nn.Module):
    """The meta-learner on one episode: torch's LSTM cell over coordinates, then the cell of the parameters."""

    def __init__(self, theta0: torch.Tensor):
        super().__init__()
        self.layer1 = nn.LSTMCell(4, 20)
        self.w_forget, self.w_input = (nn.Parameter(0.02 * torch.rand(22, 1) - 0.01) for _ in range(2))
        self.b_forget, self.b_input = nn.Parameter(torch.tensor([4.5])), nn.Parameter(torch.tensor([-4.5]))
        self.theta0 = nn.Parameter(theta0[:, None])

    def forward(self, x: torch.Tensor, grad: torch.Tensor, state: tuple | None) -> tuple:
        if state is None:
            hidden, gate = x.new_zeros(len(x), 20), x.new_zeros(len(x), 1)
            state = (hidden, hidden, gate, gate, self.theta0)
        h, c, forget, input, theta = state
        h, c = self.layer1(x, (h, c))
        forget = torch.sigmoid(torch.cat([h, theta, forget], dim=1) @ self.w_forget + self.b_forget)
        input = torch.sigmoid(torch.cat([h, theta, input], dim=1) @ self.w_input + self.b_input)
        return h, c, forget, input, forget * theta - input * grad[:, None]


def plain_preprocess(x: torch.Tensor) -> torch.Tensor:
    """[n] -> [n, 2] by masks, as the re-implementations write it."""
    large = (x.abs() >= np.exp(-10)).to(x.dtype)
    size = large * torch.log(x.abs() + 1e-8) / 10 - (1 - large)
    return torch.stack([size, large * torch.sign(x) + (1 - large) * np.exp(10) * x], dim=1)


def plain_episode_loss(meta: PlainMetaLSTM, learner: PlainLearner, copy: PlainLearner, episode, updates: int):
    """Query loss of one episode: `learner` gives the gradients, `copy` carries the graph to the meta-learner."""
    support, labels, query, query_labels = episode
    learner.reset_statistics()
    copy.reset_statistics()
    theta, state = meta.theta0, None
    for _ in range(updates):
        learner.copy_from(theta.detach())
        learner.zero_grad()
        loss = F.cross_entropy(learner(support), labels)
        loss.backward()
        grad = torch.cat([p.grad.reshape(-1) for p in learner.parameters()])
        loss_inputs = plain_preprocess(loss.detach()[None]).expand(len(grad), 2)
        state = meta(torch.cat([plain_preprocess(grad), loss_inputs], dim=1), grad, state)
        theta = state[-1]
    copy.transplant(theta[:, 0])
    return F.cross_entropy(copy(query), query_labels)
