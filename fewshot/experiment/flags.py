"""Flags: declared once, checked when they are parsed, restored from a saved run."""

from __future__ import annotations

from fewshot.experiment.errors import UserError
from fewshot.experiment.files import git_commit, read_flags

import argparse
import math
import os
import shlex
import sys
from pathlib import Path

INIT_FROM = {"metavar": "RUN_DIR", "help": "start from the weights of this run, of whatever method"}  # of --init_from
# What may differ when a run continues
RUN_FLAGS = {"resume", "checkpoint", "test", "device", "num_test_tasks", "report_file", "allow_new_classes"}
WHERE_FLAGS = ("--log_dir", "--run_name", "--out")
NOT_FLAGS = ("command", "git_commit", "resume", "checkpoint", "test", "report_file", "kept")  # of parsed arguments
typed_in: Path | None = None  # the script that the flags were typed for; None where a program gave them


def whole(low: int, high: int | None = None):
    """An argparse type: an integer of at least `low`, and at most `high`."""

    def parse_whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= (high or 2**31 - 1):
            raise argparse.ArgumentTypeError(f"{text} is out of range; use {low} {f'to {high}' if high else 'or more'}")
        return value

    return parse_whole


def new_file(text: str) -> Path:
    """An argparse type: a file that can be written, in a folder that is there."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be a file; name one in a folder that exists")
    return path


def number(low: float = 0.0, high: float = math.inf, above: bool = False):
    """An argparse type: a finite number in [low, high], or in (low, high] with `above`."""

    def parse_number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low <= value <= high) or math.isinf(value) or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is out of range; use {low:g} to {high:g}")
        return value

    return parse_number


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the script's docstring as it stands and each flag's default, where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


DEVICES = ["auto", "cpu", "cuda", "mps"]
SPLITS = ["course", "lake", "vinyals"]


class Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        """A leading ~ is the home folder also where the shell leaves it: in --flag=~/x and in quotes."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([at_home(word) for word in words], namespace)

    def error(self, message):
        """One line instead of argparse's usage text."""
        raise UserError(f"{message} (see python {self.prog} --help)")


def at_home(word: str) -> str:
    """A word of the command line, PATH or --flag=PATH, with the home folder instead of a leading ~."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{os.path.expanduser(value)}"


def make_parser(doc: str, without: tuple[str, ...] = (), **defaults) -> tuple[argparse.ArgumentParser, dict]:
    """The common flags but those in `without`, with a script's own `defaults`; the parser and its groups by name."""
    parser = Parser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    groups = {name: parser.add_argument_group(name) for name in ("run", "data", "model", "optimisation", "evaluation")}

    def adder(group: str):
        return lambda flag, **kwargs: None if flag in without else groups[group].add_argument(flag, **kwargs)

    add = adder("run")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one; mps (Apple) is untested")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="precision of the forward pass")
    add("--random_seed", type=whole(0), default=1, help="fixes everything on one device")
    add("--log_dir", default="runs", help="folder of all run folders")
    add("--run_name", help="name of the run folder (default: made of the setting and the time)")
    add("--resume", metavar="RUN_DIR", help="continue this run where its last checkpoint stands")
    add("--test", action="store_true", help="only test the run named by --checkpoint")
    add("--checkpoint", metavar="RUN_DIR", help="the run whose best.pt is used")
    report = "also write the whole report to this file; without it that of --test is only printed"
    add("--out", dest="report_file", metavar="FILE", type=new_file, help=report)
    add("--smoke", action="store_true", help="a complete tiny run in under 20 seconds")
    add = adder("data")
    sets = ["auto", "omniglot", "glyphs", "folder", "mnist"]
    add("--dataset", choices=sets, default="auto", help="auto: Omniglot or glyphs; mnist: only with --test")
    add("--data_folder", help="where the images are (default: $OMNIGLOT_DIR, then ./data, then a download; $MNIST_DIR)")
    splits = "1100/100/423 characters; Lake's by alphabet; or 1028/172/423 with their turns as classes, in tests too"
    add("--split", choices=SPLITS, default="course", help=splits)
    add("--image_size", type=whole(28, 1024), default=28, help="pixels a side")
    twice = "go on where a folder has the same pictures in training and in test"
    add("--allow_overlap", action="store_true", help=twice)
    new = "a run whose folder has more classes now keeps its parts, and the new ones are test classes"
    add("--allow_new_classes", action="store_true", help=new)
    add("--num_classes", type=whole(2), default=5, metavar="N", help="classes in a task (way)")
    add("--num_shot", type=whole(1), default=1, metavar="K", help="support images of each class (shot)")
    add("--num_query", type=whole(1), default=15, metavar="Q", help="query images of each class")
    turned = "turned training characters as further classes"
    add("--rotations", action=argparse.BooleanOptionalAction, default=False, help=turned)
    add = adder("optimisation")
    add("--meta_batch_size", type=whole(1), default=16, metavar="B", help="tasks in a training step")
    add("--train_steps", type=whole(1), default=1000, help="training steps")
    add = adder("evaluation")
    add("--eval_freq", type=whole(1), default=100, help="steps between evaluations")
    add("--patience", type=whole(0), default=0, help="stop after this many evaluations without a better one; 0: never")
    add("--num_val_tasks", type=whole(2), default=600, help="fixed tasks of each evaluation in training")
    add("--num_test_tasks", type=whole(2), default=600, help="fixed test tasks of the final report")
    parser.set_defaults(**defaults)
    return parser, groups


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, smoke: dict, fixed: tuple[str, ...] = (), longer=None
):
    """Parse `argv`; `--smoke` and a saved run change the defaults, never what was typed.

    With --resume every flag but RUN_FLAGS must be the run's own, with --checkpoint those in `fixed`
    (what shapes the model). A run may be resumed with more --train_steps where longer(its flags) is None; otherwise
    that is the reason why not, say, a learning rate that falls to zero at its end.
    """
    first = parser.parse_args(argv)
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    typed = {a.dest: getattr(first, a.dest) for a in parser._actions if words & set(a.option_strings)}
    if typed.get("smoke"):
        parser.set_defaults(**smoke)
    saved_run = typed.get("resume") or typed.get("checkpoint")
    if typed.get("resume") and typed.get("checkpoint"):
        raise UserError("--resume and --checkpoint exclude each other; --resume trains on, --checkpoint is for --test")
    if typed.get("test") and not typed.get("checkpoint"):
        raise UserError("--test needs --checkpoint RUN_DIR, the run to test")
    if typed.get("checkpoint") and not typed.get("test"):
        offered = any(action.dest == "init_from" for action in parser._actions)
        others = "--resume RUN_DIR or --init_from RUN_DIR" if offered else "--resume RUN_DIR"
        raise UserError(f"--checkpoint needs --test; to train on use {others}")
    if saved_run:
        saved = read_flags(saved_run, "resume" if typed.get("resume") else "checkpoint")
        if saved["script"] != parser.prog.removesuffix(".py"):
            raise UserError(f"{saved_run} is a run of {saved['script']}.py, not of {parser.prog}; name another")
        known = {action.dest for action in parser._actions} - RUN_FLAGS | {"num_test_tasks"}
        if typed.get("resume") or saved["flags"].get("device") == "cpu":  # random streams and rounding are a device's
            known.add("device")
        flags = {name: value for name, value in saved["flags"].items() if name in known}
        for name, value in typed.items():
            bound = name not in RUN_FLAGS if typed.get("resume") else name in fixed
            if typed.get("resume") and name == "train_steps" and value > flags.get(name, math.inf):
                reason = longer(flags) if longer else "its schedule ends there"
                if reason:
                    remedy = "a run that starts from its weights (--init_from) can be longer"
                    raise UserError(f"--train_steps {value}: the run ends after {flags[name]}, for {reason}; {remedy}")
                flags[name], saved["command"] = value, f"{saved['command']} --train_steps {value}"
            elif bound and value != flags.get(name):
                raise UserError(f"--{name} {value} is not the run's {flags.get(name)}; drop it or start a new run")
        if typed.get("dataset", flags.get("dataset")) != flags.get("dataset"):
            flags["data_folder"] = None  # that of the run is of its own dataset
        parser.set_defaults(**flags)
    args = parser.parse_args(argv)
    if getattr(args, "split", None) == "vinyals" and hasattr(args, "rotations"):
        if "--no-rotations" in words:
            raise UserError("--no-rotations with --split vinyals: the turns of a character are classes there; drop one")
        args.rotations = True
    if getattr(args, "dataset", None) == "mnist" and not args.test:
        raise UserError("--dataset mnist is for --test --checkpoint RUN_DIR, of a run that trained on other classes")
    global typed_in
    typed_in = Path(sys.argv[0]) if argv is None else None
    args.git_commit = git_commit()  # of the code that runs, whatever happens to the files meanwhile
    args.command = newcomers_command(parser.prog, sys.argv[1:] if argv is None else argv)
    if typed.get("resume"):
        args.command = saved["command"]
    return args


def newcomers_command(script: str, argv: list[str]) -> str:
    """The command that gets the same figures elsewhere: without the flags that only say where files go."""
    kept, words = [], iter(argv)
    for word in words:
        if word in WHERE_FLAGS:
            next(words, None)  # its value
        elif not word.startswith(tuple(f"{flag}=" for flag in WHERE_FLAGS)):
            kept.append(word)
    return " ".join(["python", script, *map(shlex.quote, kept)])


def flags_of(args) -> dict:
    """The flags of parsed arguments, without what belongs to one call of the script."""
    return {k: v for k, v in vars(args).items() if k not in NOT_FLAGS}
