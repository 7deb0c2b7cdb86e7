"""Get a trained network of `protonet.py` ready for `predict.py`: the threshold of "none of these", and one file.

A picture is of none of the classes when it is farther from every prototype than pictures of a class are
(`predict.strangeness`). How far that is follows from tasks of validation classes, half of which the support set does
not show: the threshold keeps nine of ten queries of known classes. Test classes then tell once how well it does.

    python -m bench ship RUN_DIR          writes RUN_DIR/unknown.json, for `predict.py --checkpoint RUN_DIR --unknown`
    python -m bench ship RUN_DIR --ship   makes it the network that ships: pretrained/protonet.pt, results/shipped.json

Characters are read as predict.py reads drawings: at full size, then cut out around their ink.
Everything else: docs/predict.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, VAL_SEED, UserError
from fewshot.learners.conv4 import prototypes
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler
from fewshot.tasks.splits import Dataset

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import predict
from bench import export
from predict import Network, strangeness
from protonet import embed_split, squared_distances

RESULT = Path(__file__).resolve().parent.parent / "results" / "shipped.json"
KEPT = 0.9  # of the queries of known classes
FULL_SIZE = 105  # pixels a side of Omniglot's drawings
QUERIES = 5  # of each class
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


def tasks_of(dataset: Dataset, part: str, N: int, K: int) -> EpisodeSampler:
    """Fixed tasks of 2N classes, of which the support set will show the first N."""
    return EpisodeSampler(dataset, part, 2 * N, K, QUERIES, 20, {"val": VAL_SEED, "test": TEST_SEED}[part])


def known_and_unknown(features: torch.Tensor, sampler: EpisodeSampler, num_tasks: int):
    """Strangeness of queries of known and of unknown classes, [tasks, N * Q] each; accuracy of the known ones [tasks].

    features: those of all pictures of the sampler's split, as `embed_split` gives them.
    """
    N, K, known, unknown, right = sampler.N // 2, sampler.K, [], [], []
    for support, _, query, labels in sampler.first(num_tasks, features=features):
        distances = squared_distances(query, prototypes(support[:, : N * K], N))
        order = labels.argsort(dim=1, stable=True)  # the known classes first
        strange = strangeness(distances, torch.full((N,), K)).gather(1, order)
        hit = (distances.argmin(dim=-1) == labels).float().gather(1, order)
        known.append(strange[:, : QUERIES * N])
        unknown.append(strange[:, QUERIES * N :])
        right.append(hit[:, : QUERIES * N].mean(dim=1))
    return torch.cat(known), torch.cat(unknown), torch.cat(right)


def area_under_curve(known: torch.Tensor, unknown: torch.Tensor) -> float:
    """The share of pairs, one query of each kind, in which the unknown one is the stranger; ties count half."""
    both = torch.cat([known.flatten(), unknown.flatten()]).double().numpy()
    _, place, count = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # of ties the mean
    n, m = known.numel(), unknown.numel()
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def rates(known: torch.Tensor, unknown: torch.Tensor, right: torch.Tensor, threshold: float) -> dict:
    """What the threshold does on tasks, each share with its 95 % interval over tasks.

    refused_at_kept is beside it the share of unknown queries that is refused where exactly KEPT of these known ones
    are kept: what the strangeness tells, apart from how well the threshold of other classes fits.
    """
    share = lambda which: which.float().mean(dim=1)
    found = {"kept_of_known": share(known <= threshold), "refused_of_unknown": share(unknown > threshold)}
    found |= {"refused_at_kept": share(unknown > known.quantile(KEPT)), "accuracy_of_known": right}
    figures = {"area_under_curve": area_under_curve(known, unknown)}
    for name, per_task in found.items():
        figures[name], figures[f"{name}_ci95"] = experiment.mean_and_ci95(per_task)
    return {name: round(value, 4) for name, value in figures.items()}


def settings_for(dataset: Dataset, part: str) -> list[tuple[int, int]]:
    """Those of SETTINGS for which a split has enough classes and pictures."""
    counts = dataset.counts[dataset.splits[part]]
    return [(N, K) for N, K in SETTINGS if 2 * N <= len(counts) and K + QUERIES <= counts.min()]


def measure(network: Network, dataset: Dataset, num_tasks: int) -> dict:
    """The threshold, set on validation classes, and what it does there and on test classes."""
    found, threshold = {}, None
    for part in ("val", "test"):
        images, settings = prepared(network, dataset, part), settings_for(dataset, part)
        if not settings:
            need = f"{2 * SETTINGS[0][0]} classes of split '{part}' with {SETTINGS[0][1] + QUERIES} pictures each"
            raise UserError(f"--data_folder: a threshold takes {need}; {dataset.source} has fewer")
        samplers = {f"{N}way{K}shot": tasks_of(images, part, N, K) for N, K in settings}
        features = embed_split(network.encoder, next(iter(samplers.values())), network.dtype)  # once for all
        tasks = {name: known_and_unknown(features, sampler, num_tasks) for name, sampler in samplers.items()}
        if threshold is None:  # of the validation classes: every setting counts the same
            known = torch.cat([known.flatten()[: num_tasks * QUERIES * 5] for known, _, _ in tasks.values()])
            threshold = round(float(known.quantile(KEPT)), 4)
        found[part] = {name: rates(*task, threshold) for name, task in tasks.items()}
    return {"threshold": threshold, "kept": KEPT, "num_tasks": num_tasks} | found


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    parser = experiment.Parser(
        prog="-m bench ship", description=__doc__, formatter_class=experiment.Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", metavar="RUN_DIR", help="a run of protonet.py")
    add("--ship", action="store_true", help="make it the network that predict.py takes without --checkpoint")
    add("--data_folder", help="where the run's images are (default: where the run found them)")
    add("--num_tasks", type=experiment.whole(2), default=600, help="fixed tasks of each setting, of both splits")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = parse_args(argv)
    network = predict.load_network(Namespace(checkpoint=args.checkpoint, device="cpu", dtype="float32"))
    run, flags = Path(args.checkpoint), network.flags
    saved = experiment.read_flags(run, "checkpoint")
    size = FULL_SIZE if flags["dataset"] == "omniglot" else flags["image_size"]
    where = {"data_folder": args.data_folder or flags["data_folder"], "image_size": size}
    dataset = load_for(Namespace(**flags | where, checkpoint=args.checkpoint))
    result = measure(network, dataset, args.num_tasks) | {
        "command": f"python -m bench ship RUN_DIR{' --ship' * args.ship}",
        "trained_by": saved["command"],
        "dataset": dataset.name,
        "dataset_digest": dataset.digest,
        "seed": flags["random_seed"],
        "git_commit": experiment.git_commit(),
        "versions": experiment.versions(),
        "processor": experiment.processor(),
    }
    experiment.write_json(run / "unknown.json", result)
    written = [run / "unknown.json"]
    if args.ship:
        model = {name: value.float().contiguous() for name, value in network.encoder.state_dict().items()}
        content = {"flags": {name: flags[name] for name in FLAGS}, "model": model}
        content["unknown"] = json.loads(json.dumps(result))  # torch's version is a class of its own, which is not data
        predict.SHIPPED.parent.mkdir(exist_ok=True)
        experiment.write_atomically(predict.SHIPPED, lambda out: torch.save(content, out))
        result |= {"bytes": predict.SHIPPED.stat().st_size}
        page = predict.SHIPPED.with_name("page.html")
        export.write_page(predict.load_network(Namespace(checkpoint=None, device="cpu", dtype="float32")), page)
        experiment.write_json(RESULT, result)
        written += [predict.SHIPPED, page, RESULT]
    print(f"written: {', '.join(map(str, written))}")
    return result


if __name__ == "__main__":
    experiment.run_script(main)
