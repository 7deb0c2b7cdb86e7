"""One run folder: its steps, checkpoints, curves and final report."""

from __future__ import annotations

from fewshot.experiment import flags
from fewshot.experiment.console import keep_printing
from fewshot.experiment.device import processor, shard, versions
from fewshot.experiment.errors import Diverged, UserError
from fewshot.experiment.files import (
    LOCKS,
    hold,
    load_checkpoint,
    load_state,
    read_flags,
    release,
    write_atomically,
    write_json,
)
from fewshot.experiment.flags import flags_of

import contextlib
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

VAL_SEED, TEST_SEED = 1_000_001, 1_000_002  # of the fixed tasks, the same for every method and seed
CURVE_POINTS = 50  # of each curve in metrics.json, at most twice as many
# What metrics.json holds and neither the last line of stdout nor TensorBoard shows: too long to be read.
ONLY_IN_FILE = {"accuracies", "curves", "flags", "versions", "episode", "examples", "errors", "history", "path"}
ONLY_IN_FILE |= {"reconstruction"}
SAVE_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")  # Ctrl-C, kill, a lost connection, two of schedulers


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


def mean_and_ci95(per_task) -> tuple[float, float]:
    """Mean of the tasks' accuracies and the half-width of its 95 % interval (normal, 1.96 standard errors)."""
    values = torch.as_tensor(per_task, dtype=torch.float64)
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def figures_of(name: str, per_task) -> dict[str, float]:
    """Their mean and its interval, as metrics.json names them: test_accuracyNAME and ci95NAME."""
    return dict(zip((f"test_accuracy{name}", f"ci95{name}"), mean_and_ci95(per_task), strict=True))


RUN_STATE = ("step", "best", "best_step", "stale", "seconds", "cpu_seconds", "loss_sum", "loss_count", "curves")


def resume_command(script: str, folder: Path) -> str:
    """What to type to continue a run."""
    top, typed = Path(__file__).resolve().parents[2], flags.typed_in
    own = typed if typed and typed.suffix == ".py" else top / f"{script}.py"
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
                    write_json(self.folder / "flags.json", saved, "--log_dir")
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
            content = saved | {"versions": versions(), "git_commit": a.git_commit}
            write_json(folder / "flags.json", content, "--log_dir")
            for file, content in getattr(a, "kept", {}).items():  # what is known of the data
                write_atomically(folder / file, lambda out, content=content: out.write(content), "--log_dir")
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
        write_atomically(self.folder / "checkpoint.pt", lambda out: torch.save(state, out), "--log_dir")

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
                write_atomically(self.folder / "best.pt", lambda out: torch.save(best, out), "--log_dir")
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
