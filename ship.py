"""Get a trained network of `protonet.py` ready for `predict.py`: the threshold of "none of these", and one file.

A picture is of none of the classes when it is farther from every prototype than pictures of a class are
(`predict.strangeness`). How far that is follows from tasks of validation classes, half of which the support set does
not show: the threshold keeps nine of ten queries of known classes. Test classes then tell once how well it does.

    python ship.py RUN_DIR             writes RUN_DIR/unknown.json, which `predict.py --checkpoint RUN_DIR --unknown` needs
    python ship.py RUN_DIR --ship      also makes it the network that ships: pretrained/protonet.pt, results/shipped.json

Characters are read as predict.py reads drawings: at full size, then cut out around their ink.
Everything else: docs/predict.md.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import experiment
import predict
from experiment import TEST_SEED, VAL_SEED, UserError
from load_data import Dataset, EpisodeSampler, load_dataset, refuse_trained_classes
from predict import Network, strangeness
from protonet import embed, squared_distances

HERE = Path(__file__).resolve().parent
KEPT = 0.9  # of the queries of known classes
FULL_SIZE = 105  # pixels a side of Omniglot's drawings
SETTINGS = [(5, 1), (5, 5), (20, 1), (20, 5)]  # known classes (and as many unknown ones) and shots of the tasks
FLAGS = ("dataset", "inverted", "encoder", "width", "image_size")  # what predict.py needs to know


def prepared(network: Network, dataset: Dataset, part: str) -> Dataset:
    """The pictures of a split as predict.py prepares them, uint8; a folder's are that already."""
    if dataset.name == "folder":
        return dataset
    prepare, size = predict.preparer(network, "dark"), network.flags["image_size"]
    images = np.zeros((len(dataset.images), 1, size, size), np.uint8)
    for c in dataset.splits[part]:
        for i in range(dataset.starts[c], dataset.starts[c] + dataset.counts[c]):
            images[i] = (255 * prepare(255 - dataset.images[i])).round().byte().numpy()  # ink is dark on paper
    return dataset._replace(images=images)


@torch.no_grad()
def known_and_unknown(network: Network, dataset: Dataset, part: str, N: int, K: int, num_tasks: int):
    """Strangeness of queries of known and of unknown classes [num_tasks, N * Q] each, and accuracy of the known [tasks].

    A task has 2N classes with Q = 5 queries; the support set shows K pictures of the first N alone.
    """
    seed = {"val": VAL_SEED, "test": TEST_SEED}[part]
    sampler = EpisodeSampler(dataset, part, 2 * N, K, 5, 20, seed)
    parts = sampler.images.split(500)
    features = [embed(network.encoder, (images / 255).to(network.device)[None], network.dtype)[0] for images in parts]
    known, unknown, right = [], [], []
    for support, _, query, labels in sampler.first(num_tasks, features=torch.cat(features).cpu()):
        centres = support[:, : N * K].unflatten(1, (N, K)).mean(dim=2)
        distances = squared_distances(query, centres)
        order = labels.argsort(dim=1, stable=True)  # the known classes first
        strange = strangeness(distances, torch.full((N,), K)).gather(1, order)
        hit = (distances.argmin(dim=-1) == labels).float().gather(1, order)
        known.append(strange[:, : 5 * N])
        unknown.append(strange[:, 5 * N :])
        right.append(hit[:, : 5 * N].mean(dim=1))
    return torch.cat(known), torch.cat(unknown), torch.cat(right)


def area_under_curve(known: torch.Tensor, unknown: torch.Tensor) -> float:
    """The share of pairs, one query of each kind, in which the unknown one is the stranger; ties count half."""
    both = torch.cat([known.flatten(), unknown.flatten()]).double().numpy()
    _, place, count = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # of ties the mean
    n, m = known.numel(), unknown.numel()
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def rates(known: torch.Tensor, unknown: torch.Tensor, right: torch.Tensor, threshold: float) -> dict:
    """What the threshold does on tasks, each share with its 95 % interval over tasks."""
    found = {"kept_of_known": (known <= threshold).float().mean(dim=1)}
    found |= {"refused_of_unknown": (unknown > threshold).float().mean(dim=1), "accuracy_of_known": right}
    figures = {"area_under_curve": area_under_curve(known, unknown)}
    for name, per_task in found.items():
        figures[name], figures[f"{name}_ci95"] = experiment.mean_and_ci95(per_task)
    return {name: round(value, 4) for name, value in figures.items()}
