"""Plain references of each hot path beside ours: speed as a ratio, measured side by side in one run.

    python -m bench episodes --num_classes 5      sampling a meta-batch for the MANN
    python -m bench mann --num_classes 5          one training step of the MANN
    python -m bench protonet --repeats 10         one training step of prototypical networks
    python -m bench protonet --seeds 3            also the seconds of training to 98.8 %, of three seeds
    python -m bench costs --hidden_dim 128        one outer step of MAML and of Evolution Strategies on sinusoids
    python -m bench maml --repeats 5              one meta-gradient of MAML
    python -m bench meta_lstm --repeats 10        one training step of the LSTM meta-learner
    python -m bench processes                     whole trainings: one thread, two threads, two processes of torchrun
    python -m bench busy                          a step of each script alone and beside endless loops
    python -m bench gpu --repeats 10              on a GPU: steps replayed, kernel by kernel, and task by task
    python -m bench maml --peers                  also MAML by installed peers; protonet and costs as well (peers.py)
    python -m bench NAME --out results            also into results/speed.json, in place of older figures of NAME

The references (basics/) are written the way papers and course code do it. Both contestants take turns within one
run, after a warm-up; the figures are medians, with the 10th to 90th percentile.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.tasks.splits import Dataset, load_dataset

import json
import sys
from pathlib import Path

import torch

from bench import episodes, machines, networks
from bench.race import print_race, race


def bench_peers(args, device: torch.device, dataset: Dataset | None) -> list[dict]:
    """Ours beside installed peers, which have shown that they compute the same."""
    from bench import peers

    races = peers.RACES[args.benchmark](args, device, dataset)
    return [print_race(title, race(contestants, args.repeats, warmup=2), device) for title, contestants in races]


# Every function bench_NAME of these rooms is the race NAME.
FOUND = [found for room in (episodes, networks, machines) for found in vars(room).items()]
BENCHMARKS = {name.removeprefix("bench_"): function for name, function in FOUND if name.startswith("bench_")}


def keep(results: list[dict], args, path: Path) -> None:
    """Write `results` into the JSON file `path`, each in place of an older one of this title and processor."""
    come_from = {"command": args.command, "git_commit": args.git_commit, "processor": experiment.processor()}
    come_from["versions"] = experiment.versions()
    races = json.loads(path.read_text()) if path.exists() else []
    kept = {(race["title"], race["processor"]): race for race in races + [race | come_from for race in results]}
    experiment.write_json(path, [kept[name] for name in sorted(kept)])


def main(argv=None) -> list[dict]:
    parser, groups = experiment.make_parser(__doc__, ("--out", "--allow_overlap", "--allow_new_classes"))
    parser.prog = "-m bench"
    parser.add_argument("benchmark", choices=list(BENCHMARKS), help="what to measure")
    units = experiment.whole(1, 16384)
    groups["model"].add_argument("--hidden_dim", type=units, default=128, help="units: mann, costs")
    groups["run"].add_argument("--repeats", type=experiment.whole(1), default=100, help="timed turns")
    once = "for meta_lstm: episodes that go through the cell together"
    groups["run"].add_argument("--tasks_at_once", type=experiment.whole(1), default=4, help=once)
    seeds = "for protonet: trainings that are timed until validation passes 98.8 %%"
    groups["run"].add_argument("--seeds", type=experiment.whole(0), default=0, help=seeds)
    installed = "for maml, protonet and costs: also race installed peers (requirements-peers.txt)"
    groups["run"].add_argument("--peers", action="store_true", help=installed)
    groups["run"].add_argument("--out", metavar="DIR", help="keep the figures in DIR/speed.json, as results/ does")
    named = argv or sys.argv
    parser.set_defaults(meta_batch_size=128 if {"episodes", "mann"} & set(named) else 4 if "meta_lstm" in named else 16)
    args = experiment.parse(parser, argv, smoke={"repeats": 1})
    if args.out and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is not a folder; name one that exists")
    if args.peers and args.benchmark not in ("maml", "protonet", "costs"):
        raise UserError(f"--peers: there is no peer of {args.benchmark}; drop it, or choose maml, protonet or costs")
    device = experiment.setup(args)
    # Sinusoids need no images.
    dataset = None if args.benchmark == "costs" else load_dataset(args.dataset, args.data_folder, args.split)
    results = BENCHMARKS[args.benchmark](args, device, dataset)
    if args.peers:
        results += bench_peers(args, device, dataset)
    if args.out:
        keep(results, args, Path(args.out) / "speed.json")
    return results
