"""The runs behind every table and figure of the source documents, and the ledger of their results.

    python reproduce.py status                     which results stand, and which the code has left behind
    python reproduce.py all --scale smoke          everything in its smallest form, to see that it works
    python reproduce.py all --scale cpu --jobs 2   what is due of what two CPU cores can do in some hours
    python reproduce.py all --scale full           the papers' lengths, for a GPU
    python reproduce.py maml                       one method: hw1, attention, protonet, transfer, maml, meta_lstm, ...
    python reproduce.py report                     the tables, pictures and documents from the results

Each run is a script of this package in a process of its own, `--jobs` at a time; what was interrupted is resumed; what
fails is named and makes the exit code 1. Results go to `--out` (results/, or a folder of runs/ for smoke), a JSON file
a run: METHOD/CASE_seedS.json. The recipes of a method lie in studies/METHOD.py.

A result belongs to what the code computes, not to how it is spelled. `status` says of each result: measured (by this
very code), confirmed (the code was changed since, its pulse is equal: see studies/pulse.py), drifted (the pulse
differs, and in which step and quantity) or missing. Only the last two are due. Where a pulse cannot be taken the state
is an error, and the exit code 1.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError, whole

import os
import sys
from pathlib import Path

from studies.ledger import HERE, Ledger, cases_of, make_jobs, studies
from studies.runner import run_all
from studies.status import print_status, status

ONCE = {  # parts of the documents before each method had its own
    "mann": ("hw1", "attention", "external_memory"),
    "comparison": ("transfer", "protonet", "maml"),
    "costs": ("profile_costs",),
    "features": ("feature_weights",),
}


def parse_args(argv=None):
    parser = experiment.Parser(
        prog="reproduce.py", description=__doc__, formatter_class=experiment.Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    what = ["status", *studies(), "all"]
    add("what", choices=[*what, *ONCE], metavar="{" + ",".join(what) + "}", help="which method, or what is due of all")
    add("--scale", choices=["smoke", "cpu", "full"], default="cpu", help="how long the runs train")
    add("--jobs", type=whole(1), help="runs at a time, which share the CPU cores (default: 1; of status: all cores)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of all runs")
    add("--dataset", choices=["auto", "omniglot", "glyphs"], default="auto", help="auto: Omniglot; smoke: or glyphs")
    folder = "folder of miniImageNet with train/, val/ and test/: adds its four settings to meta_lstm"
    add("--mini_imagenet", metavar="DIR", help=folder)
    some = "only runs whose name, like maml/anil_seed1, holds one of these texts, separated by commas"
    add("--only", default="", metavar="TEXTS", help=some)
    add("--out", help="folder of the results (default: results, or runs/reproduce_smoke)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv[1:] if argv[:1] == ["run"] else argv)
    args.methods = ONCE.get(args.what, (args.what,))
    args.out = Path(args.out or ("runs/reproduce_smoke" if args.scale == "smoke" else HERE / "results"))
    args.jobs = args.jobs or (os.cpu_count() or 1 if args.what == "status" else 1)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder; name another")
    if args.mini_imagenet and not (Path(args.mini_imagenet) / "train").is_dir():
        raise UserError(
            f"--mini_imagenet {args.mini_imagenet} has no train/; name the folder that holds train/, val/ and test/"
        )
    return args


def main(argv=None) -> dict | list[str]:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        from studies import report  # draws: no other word needs matplotlib

        return report.main(argv[1:])
    args = parse_args(argv)
    if args.what in ONCE:
        print(f"{args.what} is now {', '.join(args.methods)}", file=sys.stderr)
    runs = args.out / "runs" if args.scale == "smoke" else Path("runs") / f"reproduce_{args.scale}"
    methods = ("all",) if args.what == "status" else args.methods
    cases = [case for method in methods for case in cases_of(method, args.mini_imagenet)]
    every = "seed" if args.what == "status" else ""  # what waits for --only counts too
    jobs = make_jobs(cases, args.scale, args.device, args.dataset, args.only or every)
    if not jobs:
        raise UserError(f"--only {args.only}: no run of {args.what} has this in its name")
    if args.what == "status":  # what three hours do not hold is not due before it was measured once
        ledger = Ledger(args.out).entries
        waiting = [job.name for job in jobs if job.case.beyond and job.name not in ledger]
        found = status([job for job in jobs if job.name not in waiting], args.out, args.jobs)
        if waiting:
            print(f"waiting to be named by --only: {', '.join(waiting)}")
        print_status(found)
        if any(state == "error" for state, _ in found.values()):
            sys.exit(1)
        return found
    found = status(jobs, args.out, args.jobs)
    due = [job for job in jobs if found[job.name][0] in ("drifted", "missing")]
    unclear = [f"{name}: {why}" for name, (state, why) in found.items() if state == "error"]
    print(f"{len(jobs) - len(due) - len(unclear)} of {len(jobs)} runs are done already")
    drifted = {job.name for job in due if found[job.name][0] == "drifted"}
    failures = unclear + run_all(due, drifted, args.out, runs, args.jobs)
    print(f"results: {args.out}; tables and pictures: python reproduce.py report --results {args.out}")
    if failures:
        print("\n".join(f"error: {failure}" for failure in failures), file=sys.stderr)
        sys.exit(1)
    return failures


if __name__ == "__main__":
    experiment.run_script(main)
