"""MANN: a network with memory reads a small labelled set and then labels new images.

Santoro et al. 2016, "Meta-learning with memory-augmented neural networks", in the course's form. A task is a
sequence of images, each beside its label; N queries follow, beside zeros. Labels are drawn anew for every task, so no
weight can know them: the LSTM has to remember which picture bore which label.

    python -m basics.mann --num_classes 2 --num_shot 1
    93.1 ± 0.4 % (10,000 tasks), 1.8 minutes on an Intel Xeon with AVX-512 and AMX (results/basics/mann.json)

The same with all that makes it better: hw1.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from basics import run
from load_data import EpisodeSampler, load_dataset


class MANN(nn.Module):
    """Two LSTM layers, (784 + N) -> hidden_dim -> N; the states of the second are the logits."""

    def __init__(self, num_classes: int, hidden_dim: int = 128):
        super().__init__()
        self.layer1 = nn.LSTM(784 + num_classes, hidden_dim, batch_first=True)
        self.layer2 = nn.LSTM(hidden_dim, num_classes, batch_first=True)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [B, K+1, N, N] of images [B, K+1, N, 784] and one-hot labels [B, K+1, N, N]; the last row asks."""
        B, rows, N, _ = images.shape
        known = labels.clone()
        known[:, -1] = 0  # nobody tells the labels of the queries
        sequence = torch.cat([images, known], dim=-1)  # [B, K+1, N, 784 + N]
        hidden, _ = self.layer1(sequence.reshape(B, rows * N, -1))  # [B, (K+1) N, hidden_dim]
        logits, _ = self.layer2(hidden)  # [B, (K+1) N, N]
        return logits.reshape(B, rows, N, N)


def query_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the queries alone; logits and one-hot labels [B, K+1, N, N]."""
    return F.cross_entropy(logits[:, -1].flatten(0, 1), labels[:, -1].flatten(0, 1))


@torch.no_grad()
def evaluate(model: MANN, test: EpisodeSampler, num_tasks: int) -> torch.Tensor:
    """Accuracy of each test task [num_tasks]."""
    right = []
    for images, labels in test.first(num_tasks, test.sample_rows):
        guesses = model(images, labels)[:, -1].argmax(dim=-1)  # [B, N]
        right.append((guesses == labels[:, -1].argmax(dim=-1)).float().mean(dim=1))
    return torch.cat(right)


def main(num_classes: int = 2, num_shot: int = 1, steps: int = 8000, random_seed: int = 1) -> torch.Tensor:
    torch.manual_seed(random_seed)
    N, K, data = num_classes, num_shot, load_dataset()
    train = EpisodeSampler(data, "train", N, K, 1, 128, seed=random_seed, rotations=True)
    test = EpisodeSampler(data, "test", N, K, 1, 2000 // (N * (K + 1)), seed=1_000_002)  # the tasks of all scripts
    model = MANN(N)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(1, steps + 1):
        images, labels = train.sample_rows()  # 128 tasks
        loss = query_loss(model(images, labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(
                f"step {step:5d}, loss {loss.item():.3f}, test accuracy {evaluate(model, test, 600).mean():.1%}",
                flush=True,
            )
    return evaluate(model, test, 10_000)


if __name__ == "__main__":
    run(main)
