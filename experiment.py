"""What all scripts share and nothing of any method: flags, seeds, the run folder, exact resume, reports.

A library that the scripts call; it never calls back and owns no train loop. A script reads:

    args = parse(parser, argv, smoke={...})
    device = setup(args)                      # seeds, device, torchrun
    run = Run(args, "hw1", dataset.name)      # runs/hw1_omniglot_2way_1shot_seed1_<time>/
    run.track(model=model, optimizer=optimizer, sampler=sampler)
    for step in run.steps():                  # continues after --resume, saves on Ctrl-C
        ...                                   # the method
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped(): ...
            run.evaluated(validation_accuracy, {"Accuracy/val": ...})
    run.load_best(model)
    run.finish(metrics)
"""

from __future__ import annotations

import os

# Read when torch is loaded: threads that wait for work spin before they sleep. See `share_cores`.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ.update({"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"})

import argparse
import ast
import atexit
import contextlib
import ctypes
import errno
import io
import json
import math
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:  # locks of files; Windows has others
    import fcntl
except ImportError:
    fcntl = None

SPIN = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}  # ours, as set above, and not the user's choice
VAL_SEED, TEST_SEED = 1_000_001, 1_000_002  # of the fixed tasks, the same for every method and seed
INIT_FROM = {"metavar": "RUN_DIR", "help": "start from the weights of this run, of whatever method"}  # of --init_from
# What may differ when a run continues
RUN_FLAGS = {"resume", "checkpoint", "test", "device", "num_test_tasks", "report_file", "allow_new_classes"}
WHERE_FLAGS = ("--log_dir", "--run_name", "--out")
NOT_FLAGS = ("command", "git_commit", "resume", "checkpoint", "test", "report_file", "kept")  # of parsed arguments
CURVE_POINTS = 50  # of each curve in metrics.json, at most twice as many
# What metrics.json holds and neither the last line of stdout nor TensorBoard shows: too long to be read.
ONLY_IN_FILE = {"accuracies", "curves", "flags", "versions", "episode", "examples", "errors", "history", "path"}
ONLY_IN_FILE |= {"reconstruction"}
SAVE_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")  # Ctrl-C, kill, a lost connection, two of schedulers
typed_in: Path | None = None  # the script that the flags were typed for; None where a program gave them


class UserError(Exception):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


class Diverged(Exception):
    """The loss is no longer a finite number."""


# -------------------------------------------------------------------------------------- flags


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


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the script's docstring as it stands and each flag's default, where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


DEVICES = ["auto", "cpu", "cuda", "mps"]
SPLITS = ["course", "lake", "vinyals"]


class _Parser(argparse.ArgumentParser):
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
    parser = _Parser(description=doc, formatter_class=_Formatter, allow_abbrev=False)
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


def read_json(path: Path, flag: str, **parts) -> dict:
    """The JSON object in a run folder; UserError names `flag` when there is none that has `parts`, of these types."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        if lacks := [name for name, kind in parts.items() if not isinstance(content.get(name), kind)]:
            raise ValueError(f"it lacks {', '.join(lacks)}")
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {path.parent} is not a run folder ({path.name}: {error})") from None
    return content


def read_flags(folder: Path | str, flag: str, *needed: str) -> dict:
    """What flags.json of a run says: script, dataset, command, and all flags, those `needed` too, under "flags"."""
    saved = read_json(Path(folder) / "flags.json", flag, script=str, dataset=str, command=str, flags=dict)
    if lacks := [name for name in needed if name not in saved["flags"]]:
        raise UserError(f"--{flag} {folder} is not a run folder (flags.json lacks --{lacks[0]})")
    return saved


class _Unbroken(io.FileIO):
    """The raw file below stdout or stderr; what cannot be printed is dropped."""

    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # a terminal that another program made non-blocking
                time.sleep(0.01)
            return written
        except OSError:  # closed, a pipe that nobody reads, a lost terminal, a full disk
            return len(data)


def keep_printing() -> None:
    """From now on no print, progress bar or warning ends the program, whatever becomes of stdout and stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed; /dev/null takes its number, so that no file of the run does
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
            continue
        if hasattr(stream, "reconfigure"):  # a console that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
        below = getattr(stream, "buffer", None)
        raw = getattr(below, "raw", below)
        if stream is not getattr(sys, f"__{name}__") or type(raw) is not io.FileIO:
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        unbroken = _Unbroken(raw.fileno(), "w", closefd=False)
        how = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
        buffer = unbroken if raw is below else io.BufferedWriter(unbroken)  # python -u has no buffer
        setattr(sys, name, io.TextIOWrapper(buffer, **how, write_through=stream.write_through))


def run_script(main) -> None:
    """Run `main()`; what the user can mend becomes one line on stderr and exit code 2."""
    keep_printing()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except PermissionError as error:
        print(
            f"error: no access to {error.filename} ({error.strerror}); name another or change its mode", file=sys.stderr
        )
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # on a CPU torch has no class of its own for this
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        too_large = "can't allocate memory", "out of memory", "size calculation overflowed"
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in too_large):
            raise
        remedy = "use smaller tasks, a smaller --meta_batch_size or a smaller network"
        print(f"error: not enough memory ({reason[:120]}); {remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        for path in list(LOCKS):
            release(path.parent)


# ------------------------------------------------------------------- device, seeds, processes


def setup(args) -> torch.device:
    """Seed every generator, choose the device and, under torchrun, join the other processes."""
    random.seed(args.random_seed)
    np.random.seed(args.random_seed % 2**32)
    torch.manual_seed(args.random_seed)
    torch.backends.cudnn.deterministic = True
    keep_freed_memory()
    # Numbers below 1e-38 count as zero: where gates are saturated, gradients are full of them, and each costs a hundred
    # cycles (a step of the MANN on large pictures took twelve times as long). Threads inherit it from this one.
    torch.set_flush_denormal(True)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu or auto")
    if args.device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch finds no Apple GPU here; use --device cpu or auto")
        return torch.device("mps")
    gpu = args.device != "cpu" and torch.cuda.is_available()
    if started_by_torchrun() and not dist.is_initialized():
        one_each = gpu and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        try:
            dist.init_process_group("nccl" if one_each else "gloo")  # NCCL refuses processes that share a GPU
        except (RuntimeError, ValueError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UserError(f"cannot join the other processes ({reason}); {UNSET_RANK}") from error
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if not gpu:
        share_cores()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


UNSET_RANK = "start by torchrun, or unset RANK and WORLD_SIZE to train in one process"


def started_by_torchrun() -> bool:
    """Whether the environment names this process and the others; single variables are left over and mean nothing."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if not rank or not size:
        return False
    if not rank.isdecimal() or not size.isdecimal() or int(rank) >= int(size):
        raise UserError(f"RANK={rank} and WORLD_SIZE={size} in the environment are no processes; {UNSET_RANK}")
    lacks = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacks and int(size) > 1:
        raise UserError(f"the environment has WORLD_SIZE={size} but no {' and '.join(lacks)}; {UNSET_RANK}")
    return not lacks


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the tensors of the next step (Linux; nothing happens elsewhere).

    glibc gives blocks above 32 MB back to the system when they are freed; each step then waits for the system to zero
    the same pages anew, which took half of the time of a large step on two cores.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def share_cores(seconds: float = 0.5) -> None:
    """From now on let waiting threads spin while the computer is idle, and sleep while others need its cores.

    Awake, a thread takes up its next piece of work at once, but holds a core meanwhile: beside one busy process a step
    of spinning threads takes two to four times as long. libgomp spins GOMP_SPINCOUNT times, and no more than 1,000
    while it has more threads than there are cores (its manual, "GOMP_SPINCOUNT"). So a thread of ours looks every few
    `seconds` at what other processes take, and where that is too much, another one owns idle threads: "more". Figures
    do not depend on it. On other systems than Linux, or where the user has said how to wait, nothing happens.
    """
    spins = all(os.environ.get(name) == value for name, value in SPIN.items())
    threads = torch.get_num_threads()
    watched = any(thread.name == "share_cores" for thread in threading.enumerate())
    if threads == 1 or not spins or watched or busy_seconds() is None:
        return

    def doze(awake: threading.Event) -> None:
        torch.ones(2**20).add_(1)  # large enough for a team of this thread's own, which then lies idle
        awake.wait()

    def watch() -> None:
        awake, dozing, begin, busy, own = None, None, time.monotonic(), busy_seconds(), time.process_time()
        while not over.wait(seconds):
            now = time.monotonic(), busy_seconds(), time.process_time()
            others = (now[1] - busy - (now[2] - own)) / (now[0] - begin)  # the cores that other processes took
            begin, busy, own = now
            crowded = others > os.cpu_count() - threads + 0.25
            if crowded and not dozing:
                awake = threading.Event()
                dozing = threading.Thread(target=doze, args=(awake,), name="doze", daemon=True)
                dozing.start()
            elif dozing and not crowded:
                awake.set()
                dozing = None
        if dozing:
            awake.set()
            dozing.join()

    def end() -> None:  # Python must not end while a thread is inside torch
        over.set()
        watcher.join()

    over = threading.Event()
    watcher = threading.Thread(target=watch, name="share_cores", daemon=True)
    watcher.start()
    atexit.register(end)


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the computer started; None where no file tells."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, _, _, interrupts, soft = map(int, line.split()[1:8])
        return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def shard() -> tuple[int, int]:
    """(rank, number of processes) of this process; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(model: torch.nn.Module) -> None:
    """Replace each gradient by its mean over all processes: one all-reduce of one flat vector."""
    if shard()[1] == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= shard()[1]
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def precision(args, device: torch.device, probe=None) -> torch.dtype:
    """What --dtype means here: auto is bfloat16 where the processor computes in it and `probe` works, else float32.

    probe: computes a piece of the network under bfloat16 and raises RuntimeError where a kernel is missing; then even
    --dtype bfloat16 becomes float32, with a note.
    """
    if args.dtype == "float32" or (args.dtype == "auto" and not fast_in_bfloat16(device)):
        return torch.float32
    try:
        if probe is not None:
            with torch.random.fork_rng(devices=[]), torch.autocast(device.type, torch.bfloat16):
                probe()  # its random numbers are not missing afterwards
    except RuntimeError:
        if args.dtype == "bfloat16":
            print("note: this processor cannot compute the network in bfloat16; going on in float32", file=sys.stderr)
        return torch.float32
    return torch.bfloat16


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    # The capability is what torch may use: ATEN_CPU_CAPABILITY=avx2 makes it that of an older processor.
    allowed = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return allowed and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(device: torch.device, dtype: torch.dtype):
    """The context of a forward pass: bfloat16 where `dtype` is, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def mean_and_ci95(per_task) -> tuple[float, float]:
    """Mean of the tasks' accuracies and the half-width of its 95 % interval (normal, 1.96 standard errors)."""
    values = torch.as_tensor(per_task, dtype=torch.float64)
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def figures_of(name: str, per_task) -> dict[str, float]:
    """Their mean and its interval, as metrics.json names them: test_accuracyNAME and ci95NAME."""
    return dict(zip((f"test_accuracy{name}", f"ci95{name}"), mean_and_ci95(per_task), strict=True))


# ----------------------------------------------------------------------------- the run folder


def write_atomically(path: Path, write, flag: str = "--log_dir") -> None:
    """Call write(file) on a temporary file and move it to `path`; the old file survives a failure.

    flag: what chooses another place, for the words of the error.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path} ({error}); free some space or choose another {flag}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # there only after a failure, of whatever kind


def write_beside(checkpoint: str, name: str, write) -> None:
    """write_atomically into a tested run's folder; where nothing can be written there the test is worth no less."""
    with contextlib.suppress(UserError):
        write_atomically(Path(checkpoint) / name, write)


def write_json(path: Path, content: dict) -> None:
    """Indented, but innermost lists each on one line."""
    text = json.dumps(content, indent=2)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text)
    write_atomically(path, lambda out: out.write((text + "\n").encode()))


def load_checkpoint(path: Path, parts: tuple[str, ...] = ("model", "step")) -> dict:
    """A checkpoint's content; nothing pickled in it is executed. UserError when it cannot be read or lacks `parts`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the run has saved nothing yet, start a new one") from None
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it readable or use another run") from None
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason}); use another run") from error
    whole = isinstance(content, dict) and content.keys() >= set(parts)
    if not whole or not all(isinstance(content.get(part, {}), dict) for part in ("model", "objects", "rng")):
        raise UserError(f"{path} is not a checkpoint that these scripts have written; use another run")
    return content


def load_state(target, state: dict, path: Path) -> None:
    """target.load_state_dict(state), with one line when the checkpoint is of another model."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is of another model ({reason}); give the run's own flags") from error


PARSING = threading.Lock()


def parse_python(text: str) -> ast.Module:
    """The syntax tree of a program, from one thread at a time: Python 3.11 miscounts when two parse at once.

    It then raises SystemError (python/cpython#106905).
    """
    with PARSING:
        return ast.parse(text)


def git_commit() -> str | None:
    """Commit of the code, with a + when it holds more than that commit; None outside a repository of its own.

    A copy of the package that another repository ignores or does not track has no commit. Variables such as GIT_DIR,
    which name another repository, are ignored. A module beside this file that was imported and never added is more.
    """
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG_")}

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, check=True, env=env)
        return os.fsdecode(done.stdout).strip()

    files = [str(getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    mine = {f for f in files if f.startswith(f"{here}{os.sep}") and "site-packages" not in f}
    mine = {Path(f).relative_to(here).as_posix() for f in mine}
    try:
        added = set(git("ls-files", "-z", "--", Path(__file__).name, *mine).split("\0"))
        if Path(__file__).name not in added:
            return None
        commit = git("rev-parse", "--short=12", "HEAD")
        # What a run writes into results/ is no change of the code.
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!results") or mine - added
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


RUN_STATE = ("step", "best", "best_step", "stale", "seconds", "cpu_seconds", "loss_sum", "loss_count", "curves")


def flags_of(args) -> dict:
    """The flags of parsed arguments, without what belongs to one call of the script."""
    return {k: v for k, v in vars(args).items() if k not in NOT_FLAGS}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


LOCKS: dict[Path, object] = {}  # of run folders, held until this process ends


def hold(folder: Path) -> None:
    """Take the lock of a run folder; UserError when another process trains that run. The system frees it at our end."""
    path = folder.resolve() / ".lock"
    if path in LOCKS:
        return
    try:
        file = open(path, "a")
    except OSError:
        return  # a folder that cannot be written to will say so when it must be
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            file.close()
            raise UserError(f"--resume {folder}: another process is training this run; wait for its end") from None
        print(f"note: no locks on this file system ({error.strerror}); start {folder} only once", file=sys.stderr)
    LOCKS[path] = file
    atexit.register(release, folder)


def release(folder: Path) -> None:
    """Give up the lock of a run folder, and remove its file."""
    file = LOCKS.pop(folder.resolve() / ".lock", None)
    if file:
        with contextlib.suppress(OSError):
            Path(file.name).unlink(missing_ok=True)
        file.close()


def resume_command(script: str, folder: Path) -> str:
    """What to type to continue a run."""
    own = typed_in if typed_in and typed_in.suffix == ".py" else Path(__file__).with_name(f"{script}.py")
    words = ["python", str(own), "--resume", str(folder)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


class Run:
    """One run folder, and all state that shapes the future of the run.

    The folder holds flags.json, TensorBoard events, checkpoint.pt (latest), best.pt (best on
    validation) and metrics.json; every file is replaced atomically. Under torchrun only rank 0
    writes. `digest` is the dataset's, for metrics.json.
    """

    def __init__(self, args, script: str, dataset: str, digest: str | None = None):
        self.args, self.script, self.dataset, self.digest = args, script, dataset, digest
        self.writes = shard()[0] == 0
        self.step, self.best, self.best_step, self.stale = 0, -math.inf, 0, 0
        self.seconds, self._clock = 0.0, None
        self.cpu_seconds, self._cpu_clock = 0.0, 0.0
        self.curves: dict[str, list] = {}  # tag -> [[step, value], ...] of losses and accuracies
        self.loss_sum, self.loss_count = 0.0, 0
        self.tracked: dict = {}
        if args.resume:
            self.folder = Path(args.resume)
            saved = read_flags(self.folder, "resume")
            before = saved["dataset"]
            if before != dataset:  # say, `auto` found Omniglot then and not now
                raise UserError(f"--resume {self.folder} trained on {before}, but the data found now is {dataset}")
            if self.writes:
                hold(self.folder)
                if "train_steps" in saved["flags"] and args.train_steps > saved["flags"]["train_steps"]:
                    saved["flags"]["train_steps"], saved["command"] = args.train_steps, args.command
                    write_json(self.folder / "flags.json", saved)
        else:
            self.folder = self._new_folder()
        self.writer = None

    def _new_folder(self) -> Path:
        a = self.args
        task = f"_{a.num_classes}way_{a.num_shot}shot" if hasattr(a, "num_shot") else ""
        split = f"_{a.split}" if getattr(a, "split", "course") != "course" else ""
        name = a.run_name or (
            f"{self.script}_{self.dataset}{split}{task}_seed{a.random_seed}_{time.strftime('%Y%m%d-%H%M%S')}"
        )
        folder = Path(a.log_dir) / name
        if self.writes:
            for attempt in range(1, 100):
                try:
                    folder.mkdir(parents=True)
                    break
                except FileExistsError:
                    if a.run_name or attempt == 99:
                        raise UserError(f"{folder} exists; use --resume {folder} or another --run_name") from None
                    folder = Path(a.log_dir) / f"{name}_{attempt + 1}"  # started in the same second
                except OSError as error:
                    raise UserError(f"cannot create {folder} ({error}); choose another --log_dir") from None
            hold(folder)
            saved = {"script": self.script, "dataset": self.dataset, "command": a.command, "flags": flags_of(a)}
            write_json(folder / "flags.json", saved | {"versions": versions(), "git_commit": a.git_commit})
            for file, content in getattr(a, "kept", {}).items():  # what is known of the data
                write_atomically(folder / file, lambda out, content=content: out.write(content))
        if shard()[1] > 1:
            shared = [folder]
            dist.broadcast_object_list(shared)
            folder = shared[0]
        return folder

    def track(self, **objects) -> None:
        """Name everything with a state_dict that checkpoints must hold; restores it after --resume."""
        self.tracked = objects
        if self.args.resume:
            path = self.folder / "checkpoint.pt"
            try:
                self._restore(load_checkpoint(path, ("objects", "rng", *RUN_STATE)), path)
            except UserError:
                raise
            except Exception as error:  # many kinds, of content that save() has not written
                reason = (str(error).splitlines() or [""])[0][:80]
                raise UserError(f"{path} is damaged ({type(error).__name__}: {reason}); use another run") from error
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, not needed to fail early

            # purge_step makes TensorBoard drop what was logged after the checkpoint.
            purge = self.step + 1 if self.args.resume else None
            self.writer = SummaryWriter(str(self.folder), purge_step=purge)
            if not self.args.resume:
                self.writer.add_text("flags", markdown_table({k: v for k, v in vars(self.args).items() if k != "kept"}))

    def _restore(self, state: dict, path: Path) -> None:
        """The state that `save` has kept in the file `path`."""
        if set(state["objects"]) != set(self.tracked):
            raise UserError(f"{path} is a checkpoint of another script; use another run")
        saved_on, now_on = ("cuda" if on else "cpu" for on in (state["rng"]["cuda"], torch.cuda.is_initialized()))
        if saved_on != now_on:
            streams = f"the random streams of --device {saved_on}, which --device {now_on} cannot continue"
            raise UserError(f"--resume {self.folder} has {streams}; use --device {saved_on}")
        for name, target in self.tracked.items():
            load_state(target, state["objects"][name], path)
        for name in RUN_STATE:
            setattr(self, name, state[name])
        torch.set_rng_state(state["rng"]["torch"])
        version, internal, gauss = state["rng"]["python"]
        random.setstate((version, tuple(internal), gauss))
        if torch.cuda.is_available() and state["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])

    def save(self) -> None:
        """Replace checkpoint.pt by the state of now."""
        if not self.writes:
            return
        self.writer.flush()  # what TensorBoard shows up to this step survives with it
        state = {name: getattr(self, name) for name in RUN_STATE}
        state["loss_sum"] = float(state["loss_sum"])
        state["objects"] = {name: target.state_dict() for name, target in self.tracked.items()}
        state["rng"] = {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": []}
        if torch.cuda.is_initialized():
            state["rng"]["cuda"] = torch.cuda.get_rng_state_all()
        write_atomically(self.folder / "checkpoint.pt", lambda out: torch.save(state, out))

    def steps(self):
        """Yield the numbers of the steps still to do; on Ctrl-C and the other signals of SAVE_ON save and leave."""
        a, caught = self.args, []

        def remember(signum, frame):
            if signum in caught and signum in (signal.SIGINT, signal.SIGTERM):
                raise KeyboardInterrupt  # asked twice: do not wait for the end of the step
            caught.append(signum)

        previous = {}
        asking = [getattr(signal, name) for name in SAVE_ON if hasattr(signal, name)]  # Windows has two of them
        # What nohup ignores stays ignored; of Ctrl-C a shell's background jobs are told to, yet `kill -INT` is meant.
        asking = [s for s in asking if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
        with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
            for s in asking:
                previous[s] = signal.signal(s, remember)
        quiet = not (self.writes and sys.stdout and sys.stdout.isatty())
        self._bar = bar = tqdm(total=a.train_steps, initial=self.step, unit="step", disable=quiet)
        try:
            while self.step < a.train_steps and not self.out_of_patience():
                self._clock, self._cpu_clock = time.perf_counter(), time.process_time()
                self.step += 1
                yield self.step
                self._tick()
                bar.update()
                if caught:
                    self.save()
                    resume = resume_command(self.script, self.folder)
                    print(f"interrupted at step {self.step}; continue with: {resume}", file=sys.stderr)
                    sys.exit(128 + caught[0])
        finally:
            bar.close()
            for s, handler in previous.items():
                signal.signal(s, handler or signal.SIG_DFL)

    def _tick(self) -> None:
        """Add the time since the last call to the training seconds."""
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self.cpu_seconds, self._cpu_clock = self.cpu_seconds + cpu_now - self._cpu_clock, cpu_now

    def out_of_patience(self) -> bool:
        return 0 < getattr(self.args, "patience", 0) <= self.stale

    def record(self, loss: torch.Tensor) -> None:
        """Add a step's loss to the mean that the next evaluation logs; no synchronisation here."""
        self.loss_sum = self.loss_sum + loss.detach()
        self.loss_count += 1
        if not loss.is_cuda:
            self.stop_if_diverged()

    def stop_if_diverged(self) -> None:
        """Diverged when a loss since the last evaluation was not finite; what that evaluation saved stays."""
        if not math.isfinite(self.loss_sum):
            path = self.folder / "checkpoint.pt"
            good = f"the last good checkpoint is {path}" if path.exists() else "nothing was saved before"
            raise Diverged(f"the loss is {float(self.loss_sum)} at step {self.step}; lower the learning rate; {good}")

    def time_to_evaluate(self) -> bool:
        return self.step % self.args.eval_freq == 0 or self.step == self.args.train_steps

    @contextlib.contextmanager
    def clock_stopped(self):
        """Keep an evaluation out of the training seconds."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        begin, cpu_begin = time.perf_counter(), time.process_time()
        yield
        self._clock += time.perf_counter() - begin
        self._cpu_clock += time.process_time() - cpu_begin

    def evaluated(self, val_accuracy: float | None, scalars: dict, choose: bool = True) -> None:
        """Log a step's evaluation, keep the best model and save; Diverged when the loss is not finite.

        Without a validation accuracy (None) nothing is chosen: the latest model is kept as best.pt. With choose=False
        (a warm-up, which is not yet the method) no model is kept and --patience does not count.
        """
        self.stop_if_diverged()
        loss = float(self.loss_sum) / max(self.loss_count, 1)
        self.loss_sum, self.loss_count = 0.0, 0
        self._tick()
        tasks_per_second = self.step * self.args.meta_batch_size / max(self.seconds, 1e-9)
        for tag, value in {"Loss/train": loss, **scalars}.items():
            if tag.startswith(("Loss/", "Accuracy/")):
                self.curves.setdefault(tag, []).append([self.step, float(f"{value:.5g}")])
        if self.writes:
            for tag, value in {"Loss/train": loss, "Time/tasks_per_second": tasks_per_second, **scalars}.items():
                self.writer.add_scalar(tag, value, self.step)
            main = {k: v for k, v in {"Loss/train": loss, **scalars}.items() if k.startswith(("Loss", "Accuracy"))}
            self._bar.write(f"step {self.step}  " + "  ".join(f"{tag} {value:.4f}" for tag, value in main.items()))
        if choose and (val_accuracy is None or val_accuracy > self.best):
            self.best_step, self.stale = self.step, 0
            self.best = self.best if val_accuracy is None else val_accuracy
            if self.writes:
                best = {"step": self.step, "val_accuracy": val_accuracy, "model": self.tracked["model"].state_dict()}
                write_atomically(self.folder / "best.pt", lambda out: torch.save(best, out))
        elif choose:
            self.stale += 1
        self.save()

    def load_best(self, model: torch.nn.Module) -> int:
        """Load the model that was best on validation; returns its step."""
        if shard()[1] > 1:
            dist.barrier()  # rank 0 has written it
        return load_best(self.folder, model)

    def finish(self, metrics: dict) -> dict:
        """Write metrics.json and print it as the last line of stdout; returns the whole of it."""
        rate = self.step * self.args.meta_batch_size / max(self.seconds, 1e-9)
        trained = {"steps": self.step, "best_step": self.best_step}
        if math.isfinite(self.best):
            trained["val_accuracy"] = self.best
        trained |= {"train_seconds": round(self.seconds, 2), "train_cpu_seconds": round(self.cpu_seconds, 2)}
        trained |= {"tasks_per_second": round(rate, 1), "processes": shard()[1]}
        if self.writes:
            shown = {k: v for k, v in (trained | metrics).items() if k not in ONLY_IN_FILE}
            self.writer.add_text("metrics", markdown_table(shown), self.step)
            self.writer.close()
            release(self.folder)
        metrics = trained | metrics | {"curves": {tag: thinned(curve) for tag, curve in self.curves.items()}}
        return report(self.args, self.script, self.dataset, metrics, self.folder / "metrics.json", self.digest)


def thinned(curve: list) -> list:
    """Every second, third, ... point of a long curve, the last one among them."""
    keep_each = max(1, len(curve) // CURVE_POINTS)
    first = (len(curve) - 1) % keep_each
    return curve[first::keep_each]


def markdown_table(values: dict) -> str:
    """Names and values as the table that TensorBoard's text page shows."""
    return "|name|value|\n|-|-|\n" + "".join(f"|{k}|{v}|\n" for k, v in sorted(values.items()))


def report(args, script: str, dataset: str, metrics: dict, path: Path | None = None, digest: str | None = None):
    """Complete the metrics by all that a result must tell, write them to `path` and print them as one line of JSON.

    Added are the setting, every flag, the command, the commit, versions, processor and the dataset's digest. The line
    leaves out what only the file needs. Where --out names a file it holds them too.
    """
    setting = {"script": script, "dataset": dataset}
    names = {"split": "split", "N": "num_classes", "K": "num_shot", "Q": "num_query"}
    setting |= {name: getattr(args, flag) for name, flag in names.items() if hasattr(args, flag)}
    metrics = setting | metrics | {"seed": args.random_seed, "command": args.command, "git_commit": args.git_commit}
    metrics |= {"flags": flags_of(args), "versions": versions(), "processor": processor(), "dataset_digest": digest}
    if shard()[0] == 0:
        for file in filter(None, (path, getattr(args, "report_file", None))):
            write_json(file, metrics)
        print(json.dumps({k: v for k, v in metrics.items() if k not in ONLY_IN_FILE}))
    return metrics


def processor() -> str:
    """Name of the processor and the widest instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    kind = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if fast_in_bfloat16(torch.device("cpu")) else "")
    return f"{name}, {kind}"


def init_from(args, model: torch.nn.Module) -> None:
    """Start `model` from the weights of the run --init_from: its whole model, or where only that fits an `encoder`.

    For scripts that offer the flag: add_argument("--init_from", **INIT_FROM). Nothing is loaded where --resume or
    --checkpoint names weights of the run's own.
    """
    if not args.init_from or args.resume or args.checkpoint:
        return
    path = Path(args.init_from) / "best.pt"
    if not path.exists():
        raise UserError(f"--init_from {args.init_from} has no best.pt; name the folder of a trained run")
    state = load_checkpoint(path)["model"]
    parts: dict[str, dict] = {}  # "", "pretrained.", ... -> the state of the encoder there
    for name, value in state.items():
        before, found, after = name.partition("encoder.")
        if found:
            parts.setdefault(before, {})[after] = value
    encoder = getattr(model, "encoder", None)
    for part in parts.values():
        if set(part) == set(model.state_dict()):  # an encoder from a run that has more
            return load_state(model, part, path)
    if isinstance(encoder, torch.nn.Module) and set(state) == set(encoder.state_dict()):
        return load_state(encoder, state, path)  # from a run that is nothing but an encoder
    load_state(model, state, path)


def load_best(folder: Path | str, model: torch.nn.Module) -> int:
    """Load `folder`/best.pt into `model`; returns the training step it is from."""
    path = Path(folder) / "best.pt"
    best = load_checkpoint(path)
    load_state(model, best["model"], path)
    return best["step"]


def peak_megabytes(device: torch.device) -> float:
    """Most memory so far: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def device_name(device: torch.device) -> str:
    """For reports: the GPU's name, or the CPU threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
