"""The 20 official one-shot runs of Lake et al. 2015."""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.images.omniglot import DRAWINGS
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import Dataset

import csv
from pathlib import Path

import torch


class LakeRuns(EpisodeSampler):
    """The 20 official runs of Lake et al. 2015: 20-way 1-shot tasks within an alphabet, 400 trials in all.

    One person has drawn a run's support set, another its 20 queries; `lake_runs.csv` names them and the characters.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str = "cpu"):
        test = {dataset.names[c]: place for place, c in enumerate(dataset.splits["test"])}
        with open(Path(__file__).with_name("lake_runs.csv"), newline="") as file:
            runs = [list(row.values()) for row in csv.DictReader(file)]
        rows, order = [], []
        for _, alphabet, train_drawer, test_drawer, characters, answers in runs:
            names = [f"{alphabet}/character{c}" for c in characters.split()]
            if dataset.name != "omniglot" or not all(name in test for name in names):
                raise UserError("Lake's runs are of Omniglot's evaluation set: use --dataset omniglot --split lake")
            first = torch.tensor([DRAWINGS * test[name] for name in names])
            rows.append(torch.stack([first + int(train_drawer) - 1, first + int(test_drawer) - 1], dim=-1))
            order.append(torch.tensor([int(answer) - 1 for answer in answers.split()]))
        super().__init__(dataset, "test", len(order[0]), 1, 1, len(runs), device=device)
        self.rows, self.order = torch.stack(rows).to(device), torch.stack(order).to(device)

    def draw(self, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the runs [20, 20, 2] and the classes of their items [20, 20]."""
        return self.rows[:batch_size], self.order[:batch_size]


def lake_runs(dataset: Dataset, args, device: torch.device, any_task: bool = False) -> LakeRuns | None:
    """Lake's runs for the report of a run with --split lake; None elsewhere.

    None too for a network that knows another N and K than their 20 and 1, unless it takes `any_task`.
    """
    known = any_task or (args.num_classes, args.num_shot) == (20, 1)
    return LakeRuns(dataset, device) if known and args.split == "lake" and dataset.name == "omniglot" else None
