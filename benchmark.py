"""Plain references of each hot path beside ours: speed as a ratio, measured side by side in one run.

    python benchmark.py episodes --num_classes 5     sampling a meta-batch for the MANN
    python benchmark.py mann --num_classes 5         one training step of the MANN
    python benchmark.py protonet --repeats 10        one training step of prototypical networks
    python benchmark.py protonet --seeds 3           also the seconds of training to 98.8 %, of three seeds
    python benchmark.py costs --hidden_dim 128       one outer step of MAML and of Evolution Strategies on sinusoids
    python benchmark.py maml --repeats 5             one meta-gradient of MAML
    python benchmark.py meta_lstm --repeats 10       one training step of the LSTM meta-learner
    python benchmark.py processes                    whole trainings: one thread, two threads, two processes of torchrun
    python benchmark.py busy                        a step of each script alone and beside endless loops
    python benchmark.py gpu --repeats 10             on a GPU: steps replayed, kernel by kernel, and task by task
    python benchmark.py maml --peers                 also MAML by installed peers; protonet and costs as well: peers.py
    python benchmark.py NAME --out results           also into results/speed.json, in place of older figures of NAME

The references (references.py) are written the way papers and course code do it. Both contestants take turns within one
run, after a warm-up; the figures are medians, with the 10th to 90th percentile.
"""

from __future__ import annotations

import experiment
from experiment import UserError

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import meta_lstm
import profile_costs
import protonet
from backbone import Conv4
from hw1 import MANN, learn_a_little
from load_data import Dataset, EpisodeSampler, load_dataset
from maml import MAML, Setting, embed, meta_gradient, task_loss
from references import (
    CourseMANN,
    ListSampler,
    PlainConv4,
    PlainLearner,
    PlainMetaLSTM,
    course_es_step,
    course_maml_step,
    course_step,
    one_sinusoid,
    plain_episode_loss,
    plain_maml_step,
    plain_mlp,
    plain_protonet_step,
    products_of_a_step,
)
from replay import Gradient


def race(contestants: dict, repeats: int, warmup: int = 5) -> dict[str, np.ndarray]:
    """Seconds of each call of each contestant, [repeats], taking turns."""
    seconds = {name: [] for name in contestants}
    for turn in tqdm(range(warmup + repeats), leave=False, disable=None):
        for name, call in contestants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def precisions(device: torch.device, probe=None) -> list[torch.dtype]:
    """The precisions to race: float32, and bfloat16 where the kernels of `probe` exist, be they emulated."""
    return list({torch.float32: 0, experiment.precision(Namespace(dtype="bfloat16"), device, probe): 0})


def print_race(title: str, seconds: dict[str, np.ndarray], device: torch.device, **more) -> dict:
    """Print the medians and their ratio to the first contestant; returns them, and `more` that was measured."""
    print(f"{title}, on {experiment.device_name(device)}")
    reference = np.median(next(iter(seconds.values())))
    result = {"title": title, "device": experiment.device_name(device), **more}
    for name, values in seconds.items():
        low, median, high = np.percentile(values * 1e3, [10, 50, 90])
        ratio = reference * 1e3 / median
        print(f"  {name:34s} {median:8.3f} ms  ({low:.3f} to {high:.3f})  {ratio:6.2f}x")
        result[name] = {"ms": round(median, 4), "ratio": round(ratio, 3)}
    print(json.dumps(result))
    return result


# ----------------------------------------------------------------------------------- episodes


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


# --------------------------------------------------------------------------------------- mann


def our_step(model: MANN, optimizer, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> None:
    """The step of hw1.py's train loop."""
    with experiment.autocast(images.device, dtype):
        preds = model(images, labels)
    loss = model.loss_function(preds.float() if dtype == torch.bfloat16 else preds, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def kept_for_backward(call) -> float:
    """Megabytes of all tensors that `call` keeps for its backward pass, each counted once."""
    storages = {}

    def remember(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        call()
    return round(sum(storages.values()) / 1e6, 2)


def bench_mann(args, device: torch.device, dataset: Dataset) -> list[dict]:
    sampler = EpisodeSampler(
        dataset, "train", args.num_classes, args.num_shot, 1, args.meta_batch_size, args.random_seed, device
    )
    images, labels = sampler.sample_rows()
    course = CourseMANN(args.num_classes, args.hidden_dim).to(device)
    course_adam = torch.optim.Adam(course.parameters(), 1e-3)
    contestants = {"course step": lambda: course_step(course, course_adam, images, labels)}
    for dtype in precisions(device, probe=lambda: learn_a_little("lstm", device)):
        ours = MANN(args.num_classes, args.num_shot + 1, args.hidden_dim).to(device)
        adam = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
        step = lambda ours=ours, adam=adam, dtype=dtype: our_step(ours, adam, images, labels, dtype)
        contestants[f"our step, {str(dtype).removeprefix('torch.')}"] = step
    features, kept = torch.rand(*images.shape[:3], 64, device=device), {}  # as an encoder would give them
    for memory in ("lstm", "attention", "external"):
        ours = MANN(
            args.num_classes, args.num_shot + 1, args.hidden_dim, head="linear", dim_input=64, memory=memory
        ).to(device)
        adam = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
        step = lambda ours=ours, adam=adam: our_step(ours, adam, features, labels, torch.float32)
        contestants[f"{memory}, 64 features an image"] = step
        kept[memory] = kept_for_backward(step)
    contestants["the step's matrix products alone, float32"] = products_of_a_step(
        course, len(images), images.shape[1] * images.shape[2]
    )
    title = f"mann, B {args.meta_batch_size}, K {args.num_shot}, N {args.num_classes}, hidden {args.hidden_dim}"
    print("  megabytes kept for the backward pass:", kept)
    return [print_race(title, race(contestants, args.repeats), device, megabytes_kept=kept)]


# ----------------------------------------------------------------------------------- protonet


def bench_protonet(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """16 tasks of 5-way 1-shot 15-query: sampling and one training step, at the same network."""
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    plain = PlainConv4().to(device)
    plain_adam = torch.optim.Adam(plain.parameters(), 1e-3)
    with tempfile.TemporaryDirectory() as root:
        lists = ListSampler(dataset, "train", N, K + Q - 1, args.random_seed, Path(root))

        def plain_step() -> None:
            tasks = []
            for _ in range(B):
                images, labels = (torch.from_numpy(x).to(device) for x in lists.sample_task())
                images, labels = images.view(K + Q, N, 1, 28, 28), labels.argmax(dim=-1)
                support, query = images[:K].flatten(0, 1), images[K:].flatten(0, 1)
                tasks.append((support, labels[:K].flatten(), query, labels[K:].flatten()))
            plain_protonet_step(plain, plain_adam, tasks)

        contestants = {"tasks one after another": plain_step}
        for dtype in precisions(device):
            encoder = Conv4().to(device, memory_format=torch.channels_last)
            adam = torch.optim.Adam(encoder.parameters(), 1e-3, fused=True)
            sampler = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device)

            def our_step(encoder=encoder, adam=adam, sampler=sampler, dtype=dtype) -> None:
                loss = protonet.episode_loss(encoder, sampler.sample(), N, dtype)
                adam.zero_grad()
                loss.backward()
                adam.step()

            contestants[f"together, {str(dtype).removeprefix('torch.')}"] = our_step
        result = print_race(f"protonet, B {B}, K {K}, N {N}, Q {Q}", race(contestants, args.repeats, warmup=2), device)
    if args.seeds:
        recipes = ["", "--image_size 32 --train_steps 1500"]
        result["to_accuracy"] = [seconds_to_accuracy(args, 0.988, recipe) for recipe in recipes]
    return [result]


def seconds_to_accuracy(args, target: float, recipe: str = "") -> dict:
    """Seconds of training from scratch until protonet.py's validation accuracy (5-way 1-shot) first passes `target`.

    recipe: its flags. Validated every 100 steps on 2,000 tasks; the time of evaluations does not count.
    """
    found = {"recipe": recipe, "target": target, "seconds": [], "test_accuracy": []}
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
            metrics = protonet.main(
                [
                    *recipe.split(),
                    "--random_seed",
                    str(seed),
                    "--eval_freq",
                    "100",
                    "--num_val_tasks",
                    "2000",
                    "--log_dir",
                    root,
                    "--run_name",
                    "run",
                    "--device",
                    args.device,
                    "--dtype",
                    args.dtype,
                    "--dataset",
                    args.dataset,
                    *(["--data_folder", args.data_folder] if args.data_folder else []),
                    *(["--smoke"] if args.smoke else []),
                ]
            )
            validation = metrics["curves"]["Accuracy/val"]
        passed = [step for step, accuracy in validation if accuracy > target]
        each = metrics["train_seconds"] / metrics["steps"]
        found["seconds"].append(round(passed[0] * each, 1) if passed else None)
        found["test_accuracy"].append(round(metrics["test_accuracy"], 4))
    print(f"protonet.py {recipe}: seconds of training to {target:.1%} on validation tasks, by seed: {found['seconds']}")
    print(json.dumps(found))
    return found


# -------------------------------------------------------------------------------------- costs


def bench_costs(args, device: torch.device, dataset: Dataset | None) -> list[dict]:
    """32 sinusoids, 5 inner steps, MAML and ES (two perturbations a task): one after another, together, and `auto`."""
    B = 4 if args.smoke else 32
    flags = Namespace(
        meta_batch_size=B,
        num_perturbations=2 * B,
        num_shot=10,
        num_query=100,
        inner_steps=5,
        inner_lr=1e-2,
        sigma=1e-3,
        layers=2,
        hidden_dim=args.hidden_dim,
        learning_rate=1e-3,
    )
    results = []
    for method in ("maml", "es"):
        net = plain_mlp(flags.layers, flags.hidden_dim).to(device)
        adam = torch.optim.Adam(net.parameters(), 1e-3)

        def plain(net=net, adam=adam, method=method) -> None:
            tasks = [one_sinusoid(flags.num_shot, flags.num_query, device) for _ in range(B)]
            if method == "maml":
                course_maml_step(net, adam, tasks, flags.inner_steps, flags.inner_lr)
            else:
                course_es_step(net, adam, tasks, flags.inner_steps, flags.inner_lr, flags.sigma)

        model, optimizer = profile_costs.start(flags, device)
        chosen, at_once = profile_costs.fastest_engine(flags, method, device)
        contestants = {"one task after another": plain}
        for name, engine, n in (("vmap", "vmap", 0), (f"auto: {chosen}, {at_once} at once", chosen, at_once)):
            contestants[name] = lambda m=model, o=optimizer, k=method, e=engine, n=n: profile_costs.meta_step(
                m, o, flags, k, e, n
            )
        title = f"costs, {profile_costs.LABELS[method]}, B {B}, hidden 2 x {flags.hidden_dim}, 5 inner steps"
        results.append(print_race(title, race(contestants, args.repeats, warmup=2), device))
    return results


# --------------------------------------------------------------------------------------- maml


def bench_maml(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """One meta-gradient of the same tasks at the same network.

    Beside them the same images forward and backward through one network in one call, without any inner loop: what is
    left when all arrangement of the tasks costs nothing.
    """
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    tasks = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device).sample()
    images = torch.cat([tasks[0], tasks[2]], dim=1).flatten(0, 1)  # support and query of all tasks
    results = []
    for strided in (True, False):
        shared_encoder = Conv4(strided=strided).to(device, memory_format=torch.channels_last)
        for steps in (1, 5):
            for first_order in (False, True):
                encoder = Conv4(strided=strided)
                learner = MAML(encoder, N, steps, 0.4).to(device)
                contestants = {}
                for dtype in precisions(device):
                    s = Setting(N, strided, first_order=first_order, dtype=dtype)
                    name = str(dtype).removeprefix("torch.")

                    def plain(learner=learner, steps=steps, s=s):
                        with experiment.autocast(device, s.dtype):
                            plain_maml_step(learner.theta(), tasks, 0.4, steps, s.first_order, s.strided)

                    contestants[f"loop over tasks, {name}"] = plain

                    def ours(learner=learner, s=s, steps=steps):
                        theta, sizes = learner.theta(), learner.step_sizes(steps)
                        meta_gradient(learner, tasks, lambda *task: task_loss(theta, sizes, *task, s, [1.0]))

                    contestants[f"maml.py, {name}"] = ours

                    def shared(encoder=shared_encoder, s=s):
                        embed(dict(encoder.named_parameters()), images, s, 0).sum().backward()

                    contestants[f"all images through one network, {name}"] = shared
                network, order = "strided" if strided else "pooled", "first" if first_order else "second"
                title = f"maml, {network}, {steps} steps, {order} order, B {B}, N {N}, K {K}, Q {Q}"
                results.append(print_race(title, race(contestants, args.repeats, warmup=1), device))
    return results


# ---------------------------------------------------------------------------------------- gpu


def bench_gpu(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """Forward and backward pass as train loops replay them, beside the same launched kernel by kernel and by task."""
    if device.type != "cuda":
        raise UserError(
            "benchmark.py gpu measures what a GPU replays, and there is none here; choose another benchmark"
        )
    dtype, results = experiment.precision(args, device), []
    of_tasks = lambda *shape, **more: EpisodeSampler(dataset, "train", *shape, args.random_seed, device, **more)

    def compare(title: str, step, model: nn.Module, sampler: EpisodeSampler, others: dict) -> None:
        gradient = Gradient(step, model, device, [sampler.generator])
        contestants = others | {"kernel by kernel": step, "replayed": gradient}
        results.append(print_race(title, race(contestants, args.repeats, warmup=2), device))

    for B in (16, 32, 100):
        learner, s = MAML(Conv4(strided=True), 5, 1, 0.4).to(device), Setting(5, dtype=dtype)
        sampler = of_tasks(5, 1, 15, B)

        def by_task(learner=learner, sampler=sampler):
            with experiment.autocast(device, dtype):
                plain_maml_step(learner.theta(), sampler.sample(), 0.4, 1, False, True)

        def together(learner=learner, sampler=sampler, s=s):
            theta, sizes = learner.theta(), learner.step_sizes(1)
            return meta_gradient(learner, sampler.sample(), lambda *task: task_loss(theta, sizes, *task, s, [1.0]))

        compare(
            f"gpu, maml, strided, 1 step, second order, B {B}", together, learner, sampler, {"task by task": by_task}
        )
    encoder = Conv4().to(device, memory_format=torch.channels_last)
    sampler = of_tasks(60, 1, 1, 1, rotations=True, jitter=0.1, shift=0.1)

    def of_protonet() -> torch.Tensor:
        loss = protonet.episode_loss(encoder, sampler.sample(), 60, dtype)
        loss.backward()
        return loss.detach()

    compare("gpu, protonet, 60 classes", of_protonet, encoder, sampler, {})
    model, rows = MANN(2, 2, 128).to(device), of_tasks(2, 1, 1, 128, rotations=True)

    def of_mann() -> torch.Tensor:
        images, labels = rows.sample_rows()
        with experiment.autocast(device, dtype):
            loss = model.loss_function(model(images, labels).float(), labels)
        loss.backward()
        return loss.detach()

    compare("gpu, mann, B 128, K 1, N 2", of_mann, model, rows, {})
    return results


# ---------------------------------------------------------------------------------- meta-LSTM


def bench_meta_lstm(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """B episodes of training: one at a time, as the re-implementations do, against all together."""
    B, K, N, Q = args.meta_batch_size, args.num_shot, args.num_classes, args.num_query
    updates, momentum = (12, 0.9) if K == 1 else (8, 0.95)
    learner, copy = (PlainLearner(N, momentum).to(device) for _ in range(2))
    meta = PlainMetaLSTM(nn.utils.parameters_to_vector(learner.parameters()).detach()).to(device)
    adam = torch.optim.Adam(meta.parameters(), 1e-3)
    sampler = EpisodeSampler(dataset, "train", N, K, Q, B, args.random_seed, device)

    def one_at_a_time() -> None:
        for episode in zip(*sampler.sample(), strict=True):
            loss = plain_episode_loss(meta, learner, copy, episode, updates)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(meta.parameters(), 0.25)
            adam.step()

    contestants = {"one episode at a time, two copies": one_at_a_time}
    sizes, inner = meta_lstm.Learner(1, 28, N), meta_lstm.Inner(updates, N * K, momentum)
    for dtype in precisions(device):
        for share in (1.0, 0.1):
            rule = meta_lstm.MetaLSTM(sizes.initial(), share).to(device)
            ours = torch.optim.Adam(rule.parameters(), 1e-3, fused=True)

            def together(rule=rule, ours=ours, dtype=dtype) -> None:
                ours.zero_grad()
                meta_lstm.meta_gradient(rule, sizes, sampler.sample(), inner, dtype, tasks_at_once=args.tasks_at_once)
                nn.utils.clip_grad_norm_(rule.parameters(), 0.25)
                ours.step()

            name = str(dtype).removeprefix("torch.")
            contestants[f"together, {name}" + (f", trained share {share}" if share < 1 else "")] = together
    title = f"meta_lstm, {B} episodes, N {N}, K {K}, Q {Q}, {updates} updates"
    return [print_race(title, race(contestants, args.repeats, warmup=1), device)]


# ---------------------------------------------------------------------------------- processes

TRAININGS = (
    "hw1.py --num_shot 1 --num_classes 5 --train_steps 300 --eval_freq 300 --num_test_tasks 8",
    "maml.py --warmup_steps 0 --train_steps 60 --eval_freq 60 --num_val_tasks 4 --num_test_tasks 8",
    "protonet.py --meta_batch_size 2 --train_steps 100 --eval_freq 100 --num_test_tasks 8",
)


def bench_processes(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """Training tasks a second of whole runs: in one process with one and two threads, and in two by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ways = {
        "one process, one thread": ([sys.executable], "1"),
        "one process, two threads": ([sys.executable], "2"),
        "two processes of torchrun": (torchrun, "1"),
    }
    results = []
    for training in TRAININGS:
        script, *flags = training.split()
        result = {"title": training, "device": "cuda" if device.type == "cuda" else "cpu"}
        print(training)
        for name, (start, threads) in ways.items():
            rate = train(args, [*start, str(Path(__file__).with_name(script)), *flags], OMP_NUM_THREADS=threads)
            print(f"  {name:34s} {rate:8.1f} tasks a second")
            result[name] = {"tasks_per_second": rate}
        print(json.dumps(result))
        results.append(result)
    return results


def train(args, command: list[str], figure: str = "tasks_per_second", **environment: str) -> float:
    """Training tasks a second, or milliseconds of a step, of `command`, a script and its flags, in its own process."""
    with tempfile.TemporaryDirectory() as root:
        where = ["--log_dir", root, "--run_name", "run", "--device", args.device, "--dataset", args.dataset]
        where += ["--data_folder", args.data_folder] if args.data_folder else []
        where += ["--smoke"] if args.smoke else []
        subprocess.run([*command, *where], check=True, capture_output=True, env=os.environ | environment)
        found = experiment.read_json(Path(root) / "run" / "metrics.json", "log_dir")
        return 1e3 * found["train_seconds"] / found["steps"] if figure == "step_ms" else found[figure]


# --------------------------------------------------------------------------------------- busy

BUSY = (  # a few seconds each
    "hw1.py --num_shot 1 --num_classes 5 --train_steps 150 --eval_freq 150 --num_val_tasks 8 --num_test_tasks 8",
    "protonet.py --train_steps 40 --eval_freq 40 --num_val_tasks 8 --num_test_tasks 8 --views 1",
    "maml.py --warmup_steps 20 --train_steps 40 --eval_freq 40 --num_val_tasks 4 --num_test_tasks 8",
    "meta_lstm.py --train_steps 6 --eval_freq 6 --num_val_tasks 4 --num_test_tasks 4",
    "transfer.py --train_steps 60 --finetune_steps 20 --eval_freq 60 --num_test_tasks 8",
    "mae.py --train_steps 8 --eval_freq 8 --num_val_tasks 8 --num_test_tasks 8 --views 1 --whitening_images 50",
)


def bench_busy(args, device: torch.device, dataset: Dataset) -> list[dict]:
    """A training step on all cores, alone and beside one and two endless loops: threads that always spin, and ours.

    Milliseconds of a step; the ratio is to the idle computer with threads that spin as long as libgomp's do by itself.
    """
    cores, results = str(os.cpu_count()), []
    # One spin more than ours is the user's own wish, and so nobody looks after it (`experiment.share_cores`).
    policies = {"spinning": experiment.SPIN | {"GOMP_SPINCOUNT": "300001"}, "ours": experiment.SPIN}
    for training in BUSY:
        script, *flags = training.split()
        result, alone = {"title": f"busy, {training}", "device": "cpu"}, None
        print(training)
        for loops in (0, 1, 2):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
            try:
                for name, policy in policies.items():
                    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
                    ms = train(args, command, "step_ms", OMP_NUM_THREADS=cores, **policy)
                    alone = alone or ms
                    result[f"{loops} loops, {name}"] = {"ms": round(ms, 2), "ratio": round(alone / ms, 3)}
                    print(f"  {loops} loops, threads {name:10s} {ms:8.1f} ms a step, {ms / alone:5.2f} times the first")
            finally:
                for loop in busy:
                    loop.kill()
                    loop.wait()
        print(json.dumps(result))
        results.append(result)
    return results


# -------------------------------------------------------------------------------------- peers


def bench_peers(args, device: torch.device, dataset: Dataset | None) -> list[dict]:
    """Ours beside installed peers, which have shown that they compute the same."""
    import peers

    races = peers.RACES[args.benchmark](args, device, dataset)
    return [print_race(title, race(contestants, args.repeats, warmup=2), device) for title, contestants in races]


BENCHMARKS = {
    "episodes": bench_episodes,
    "mann": bench_mann,
    "protonet": bench_protonet,
    "maml": bench_maml,
    "meta_lstm": bench_meta_lstm,
    "costs": bench_costs,
    "processes": bench_processes,
    "busy": bench_busy,
    "gpu": bench_gpu,
}


def keep(results: list[dict], args, path: Path) -> None:
    """Write `results` into the JSON file `path`, each in place of an older one of this title and processor."""
    come_from = {"command": args.command, "git_commit": args.git_commit, "processor": experiment.processor()}
    come_from["versions"] = experiment.versions()
    races = json.loads(path.read_text()) if path.exists() else []
    kept = {(race["title"], race["processor"]): race for race in races + [race | come_from for race in results]}
    experiment.write_json(path, [kept[name] for name in sorted(kept)])


def main(argv=None) -> list[dict]:
    parser, groups = experiment.make_parser(__doc__, ("--out", "--allow_overlap", "--allow_new_classes"))
    parser.prog = "benchmark.py"
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


if __name__ == "__main__":
    experiment.run_script(main)
