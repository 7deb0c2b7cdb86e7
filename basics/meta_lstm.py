"""The LSTM meta-learner: a learned update rule whose cell state is the parameters of another network, the learner.

Ravi and Larochelle 2017, "Optimization as a model for few-shot learning". The learner is trained on a task's support
set, but not by gradient descent: an LSTM reads gradient and loss at each parameter and decides how much of it to forget
and how far to step. This rule and the parameters to start from are learned from the queries' loss.

    python -m basics.meta_lstm --num_classes 5 --num_shot 1
    86.1 ± 0.7 % (600 tasks), 4.0 minutes on an Intel Xeon with AVX-512 and AMX (results/basics/meta_lstm.json)
"""

import torch
import torch.nn.functional as F
from torch import nn

from basics import run
from load_data import EpisodeSampler, load_dataset


def make_learner(num_classes: int) -> nn.Sequential:
    blocks = []
    for channels in (1, 32, 32, 32):
        norm = nn.BatchNorm2d(32, eps=1e-3, track_running_stats=False)  # of the images of a call (transductive)
        blocks += [nn.Conv2d(channels, 32, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, num_classes))


def predict(learner: nn.Module, theta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Logits [n, N] of images [n, 1, 28, 28] by the learner with the parameters theta [P, 1]."""
    parts = zip(learner.named_parameters(), theta.split([p.numel() for p in learner.parameters()]), strict=True)
    return torch.func.functional_call(learner, {name: part.view_as(p) for (name, p), part in parts}, (images,))


def preprocess(x: torch.Tensor) -> torch.Tensor:
    """[n, 1] -> [n, 2] of ordinary size: (log|x| / 10, sign x), or (-1, e^10 x) of a tiny x (section 3.4)."""
    size = x.abs().log() / 10
    return torch.cat([size.clamp(min=-1), torch.where(size >= -1, x.sign(), x * torch.e**10)], dim=1)


class MetaLSTM(nn.Module):
    def __init__(self, theta0: torch.Tensor):
        super().__init__()
        self.lstm, self.forget, self.input = nn.LSTMCell(4, 20), nn.Linear(22, 1), nn.Linear(22, 1)
        nn.init.constant_(self.forget.bias, 4.5)  # at first it forgets little and takes small steps
        nn.init.constant_(self.input.bias, -4.5)
        self.theta0 = nn.Parameter(theta0)

    def forward(self, theta: torch.Tensor, grad: torch.Tensor, loss: torch.Tensor, memory, f, i) -> tuple:
        """One update of theta [P, 1] by its gradient [P, 1] and the loss [1, 1]; all coordinates share one LSTM."""
        h, c = self.lstm(torch.cat([preprocess(grad), preprocess(loss).expand(len(grad), 2)], dim=1), memory)
        f = torch.sigmoid(self.forget(torch.cat([h, theta, f], dim=1)))  # section 3.2
        i = torch.sigmoid(self.input(torch.cat([h, theta, i], dim=1)))
        return f * theta - i * grad, (h, c), f, i  # eq. 2


def query_logits(rule: MetaLSTM, learner: nn.Module, support, labels, query, updates: int = 5) -> torch.Tensor:
    """Logits of one task's queries after the updates (algorithm 1, lines 4 to 12); gradients count as constants."""
    theta, *state = rule.theta0, None, torch.zeros_like(rule.theta0), torch.zeros_like(rule.theta0)
    for _ in range(updates):
        point = theta.detach().requires_grad_()
        loss = F.cross_entropy(predict(learner, point, support), labels)
        (grad,) = torch.autograd.grad(loss, point)
        theta, *state = rule(theta, grad, loss.detach().view(1, 1), *state)
    return predict(learner, theta, query)


def main(num_classes: int = 5, num_shot: int = 1, steps: int = 800, random_seed: int = 1) -> torch.Tensor:
    torch.manual_seed(random_seed)
    N, K, data = num_classes, num_shot, load_dataset()
    train = EpisodeSampler(data, "train", N, K, 15, seed=random_seed, rotations=True)
    test = EpisodeSampler(data, "test", N, K, 15, 2000 // (N * (K + 15)), seed=1_000_002)  # the tasks of all scripts
    learner = make_learner(N)
    rule = MetaLSTM(nn.utils.parameters_to_vector(learner.parameters()).detach()[:, None])
    optimizer = torch.optim.Adam(rule.parameters(), 3e-3)
    for step in range(1, steps + 1):
        support, labels, query, query_labels = (x[0] for x in train.sample())  # one task
        loss = F.cross_entropy(query_logits(rule, learner, support, labels, query), query_labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rule.parameters(), 0.25)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:5d}, loss {loss.item():.3f}", flush=True)
    rule.requires_grad_(False)
    tasks = (task for batch in test.first(600) for task in zip(*batch, strict=True))
    right = [query_logits(rule, learner, *task).argmax(dim=1) == query_labels for *task, query_labels in tasks]
    return torch.stack(right).float().mean(dim=1)


if __name__ == "__main__":
    run(main)
