"""Every method in one screen of plain PyTorch: what bench/ races and the tests compare the fast scripts with.

Each file has a function `main`, whose keyword arguments are its flags and which returns a figure of each test task.
"""

import argparse
import inspect
import sys
import time
from pathlib import Path

from load_data import experiment


def run(main) -> None:
    """Call `main` with the flags of the command line; what the user can mend becomes one line and exit code 2."""
    experiment.run_script(lambda: measure(main))


def measure(main) -> None:
    """Call `main`, print the mean of its figures and keep them in --json FILE."""
    module = sys.modules[main.__module__]
    name = module.__spec__.name  # basics.maml
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=module.__doc__.split("\n")[0])
    for flag, about in inspect.signature(main).parameters.items():
        parser.add_argument(f"--{flag}", type=experiment.whole(1), default=about.default, help="default %(default)s")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep figures, flags and time in this file")
    flags = vars(parser.parse_args())
    file = flags.pop("json")
    if file and not file.parent.is_dir():
        raise experiment.UserError(f"--json {file} is in no folder that exists; make {file.parent} first")
    begin = time.process_time()
    figures = main(**flags)
    minutes = (time.process_time() - begin) / 60
    mean, ci95 = experiment.mean_and_ci95(figures)
    print(f"mean of {len(figures)} test tasks {mean:.4f} ± {ci95:.4f}, {minutes:.1f} minutes of processor time")
    if file:
        typed = " ".join(f"--{flag} {value}" for flag, value in flags.items())
        told = {"script": name, "command": f"python -m {name} {typed}", "git_commit": experiment.git_commit()}
        told |= {"flags": flags, "seed": flags["random_seed"], "processor": experiment.processor()}
        told |= {"versions": experiment.versions(), "mean": mean, "ci95": ci95, "num_test_tasks": len(figures)}
        told |= {"processor_minutes": minutes, "figures": [round(figure, 5) for figure in figures.tolist()]}
        experiment.write_json(file, told)
