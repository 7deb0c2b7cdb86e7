"""The race of drawing episodes: the course's loader in its fastest state beside ours."""

from __future__ import annotations

from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import Dataset

import os
import random
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.race import print_race, race


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


def bench_episodes(args, device: torch.device, dataset: Dataset) -> list[dict]:
    B, K, N = args.meta_batch_size, args.num_shot, args.num_classes
    sampler = EpisodeSampler(dataset, "train", N, K, 1, B, args.random_seed, device)

    with tempfile.TemporaryDirectory() as root:
        plain = ListSampler(dataset, "train", N, K, args.random_seed, Path(root))

        def course(list_folders: bool):
            plain.list_folders = list_folders
            return [x.to(device) for x in plain.sample(B)]

        contestants = {
            "course loader, images in memory": lambda: course(True),
            "the same with folders listed once": lambda: course(False),
            "EpisodeSampler": sampler.sample_rows,
        }
        return [print_race(f"episodes, B {B}, K {K}, N {N}", race(contestants, args.repeats), device)]
