"""MANN: a network with memory reads a small labelled set and then labels new images.

Santoro et al. 2016, "Meta-learning with memory-augmented neural networks", in the course's form: the
sequence of support images, each with its label, is followed by the queries, whose labels are zeros.
An LSTM has to store which picture bore which label; labels are drawn anew for every task, so the
weights can only learn how to learn. The loss is the cross entropy of the N query predictions alone.

    python hw1.py --num_shot 1 --num_classes 2            the default
    python hw1.py --num_shot 1 --num_classes 2 --smoke    a complete run in seconds
    python hw1.py --num_shot 1 --num_classes 2 --head recurrent --logit_scale 1 --forget_bias 0 --no-rotations \\
        --schedule constant --learning_rate 1e-3 --clip 0 --train_steps 25000    the course's recipe

Measured: 1-shot 2-way 96.2 ± 0.6 % (three seeds, 12,000 steps with --jitter 0.1), 7.5 minutes on one Intel Xeon core.
Everything else: docs/hw1.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole
from fewshot.experiment.replay import recorded
from fewshot.learners.memory import ImageReader, features_once, guess, learn_a_little
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler, deal_tasks
from fewshot.tasks.lake import lake_runs

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from load_data import log_episode

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
MOVED = {  # what this script did before, and where it went
    "--memory attention": "attention.py",
    "--memory external": "external_memory.py",
    "--memory lstm": "hw1.py without it",
    "--protocol sequence": "external_memory.py --no_table",
}


class Recurrent(NamedTuple):
    """The layers between the (image, label) pairs and the logits; as they stand, those of the course."""

    cell: str = "lstm"  # lstm, gru or rnn
    num_layers: int = 2
    # recurrent: the last layer has N units, its state is the logits; linear: a linear layer reads them off the state.
    head: str = "recurrent"
    # A state lies in (-1, 1), too narrow for a confident softmax; the recurrent head's logits are multiplied by this.
    logit_scale: float = 1.0
    # Added to the LSTM's initial forget-gate bias; at 1 the support set is still remembered when the queries come,
    # from the first step on (Jozefowicz et al. 2015).
    forget_bias: float = 0.0


class MANN(ImageReader):
    """Recurrent layers over the sequence of (image, label) pairs of an episode.

    With the defaults it is the course's network: two LSTM layers, (N + 784) -> hidden_dim -> N. `encode` gives the D
    numbers of an image: its pixels, or with another `encoder` features that are learned along.
    """

    def __init__(
        self,
        num_classes: int,
        samples_per_class: int,
        hidden_dim: int,
        recurrent: Recurrent = Recurrent(),  # noqa: B008 (it cannot be changed)
        encoder: str = "none",
        dim_input: int = 784,
    ):
        super().__init__(encoder, dim_input)
        self.num_classes, self.samples_per_class = num_classes, samples_per_class
        last = num_classes if recurrent.head == "recurrent" else hidden_dim
        sizes = [num_classes + self.D] + [hidden_dim] * (recurrent.num_layers - 1) + [last]
        cell = CELLS[recurrent.cell]
        self.layers = nn.ModuleList(cell(i, o, batch_first=True) for i, o in zip(sizes, sizes[1:], strict=False))
        self.readout = nn.Linear(hidden_dim, num_classes) if recurrent.head == "linear" else None
        self.logit_scale = recurrent.logit_scale if recurrent.head == "recurrent" else 1.0
        if recurrent.cell == "lstm":
            with torch.no_grad():
                for layer, units in zip(self.layers, sizes[1:], strict=True):
                    layer.bias_ih_l0[units : 2 * units] += recurrent.forget_bias  # gates are ordered i, f, g, o

    def read(self, sequence: torch.Tensor, states: list | None = None) -> tuple[torch.Tensor, list]:
        """Run the recurrent layers over [B, T, D + N]; returns logits [B, T, N] and the final states."""
        states, ends = states or [None] * len(self.layers), []
        for layer, state in zip(self.layers, states, strict=True):
            sequence, end = layer(sequence, state)
            ends.append(end)
        logits = self.readout(sequence) if self.readout else sequence * self.logit_scale
        return logits, ends

    def forward(self, input_images: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """Predictions (logits) for every image of the episodes.

        input_images [B, K+1, N, 784], input_labels one-hot [B, K+1, N, N] -> [B, K+1, N, N]. The
        labels of the last row, the queries, are replaced by zeros; the inputs are not modified.
        """
        return self.classify(self.encode(input_images), input_labels)

    def classify(self, features: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """`forward` for encoded images [B, K+1, N, D]."""
        B, rows, N, _ = features.shape
        labels = torch.cat([input_labels[:, :-1], torch.zeros_like(input_labels[:, -1:])], dim=1)
        pairs = torch.cat([features, labels], dim=-1)  # [B, K+1, N, D + N]
        logits, _ = self.read(pairs.flatten(1, 2))  # [B, (K+1) * N, N]
        return logits.view(B, rows, N, N)

    def forward_alone(self, input_images: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """Query predictions [B, N, N] when each query is the only one after the support set.

        Every query continues from the memory that the support set left, so that no prediction can
        rule out the classes of the other queries.
        """
        return self.classify_alone(self.encode(input_images), input_labels)

    def classify_alone(self, features: torch.Tensor, input_labels: torch.Tensor) -> torch.Tensor:
        """`forward_alone` for encoded images [B, K+1, N, D]."""
        B, _, N, _ = features.shape
        support = torch.cat([features[:, :-1], input_labels[:, :-1]], dim=-1).flatten(1, 2)
        queries = torch.cat([features[:, -1], torch.zeros_like(input_labels[:, -1])], dim=-1)  # [B, N, D + N]
        _, ends = self.read(support)
        copies = []  # of the state [1, B, hidden] for the N queries of each task
        for end in ends:
            state = end if isinstance(end, tuple) else (end,)
            state = tuple(s.repeat_interleave(N, dim=1) for s in state)
            copies.append(state if isinstance(end, tuple) else state[0])
        logits, _ = self.read(queries.reshape(B * N, 1, -1), copies)
        return logits.view(B, N, N)

    def loss_function(self, preds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the N queries of each task; preds and labels are [B, K+1, N, N]."""
        return F.cross_entropy(preds[:, -1].flatten(0, 1), labels[:, -1].flatten(0, 1).argmax(dim=-1))


@torch.no_grad()
def evaluate(model: MANN, sampler: EpisodeSampler, num_tasks: int, alone: bool = False) -> tuple[torch.Tensor, float]:
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], and the mean loss.

    alone: each query is asked alone instead of in one sequence with the others of its task.
    """
    was_training = model.training
    model.eval()
    correct, losses = [], []
    once = features_once(model, sampler, num_tasks)
    together, apart = (model, model.forward_alone) if once is None else (model.classify, model.classify_alone)
    for images, labels in sampler.first(num_tasks, sampler.sample_rows, features=once):
        preds = apart(images, labels)[:, None] if alone else together(images, labels)
        losses.append(model.loss_function(preds, labels).item() * len(labels))
        right = preds[:, -1].argmax(dim=-1) == labels[:, -1].argmax(dim=-1)  # [B, N]
        correct.append(right.float().mean(dim=1).cpu())
    model.train(was_training)
    return torch.cat(correct), sum(losses) / num_tasks


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    typed = " ".join(sys.argv[1:] if argv is None else argv).replace("=", " ") + " "
    for flag, place in MOVED.items():
        if f"{flag} " in typed:
            raise UserError(f"hw1.py {flag} is now {place}; see python {place.split()[0]} --help")
    sizes = {"meta_batch_size": 128, "train_steps": 5000, "num_val_tasks": 2000, "num_test_tasks": 10_000}
    parser, groups = experiment.make_parser(__doc__, without=("--num_query",), num_query=1, rotations=True, **sizes)
    parser.prog = "hw1.py"
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
    add = groups["model"].add_argument
    add("--hidden_dim", type=whole(1, 16384), default=128, help="units of the hidden recurrent layers")
    add("--recurrent", choices=sorted(CELLS), default="lstm", help="kind of recurrent layer")
    add("--num_layers", type=whole(1, 100), default=2, help="recurrent layers")
    add("--head", choices=["linear", "recurrent"], default="linear", help="what makes N logits; the course: recurrent")
    add("--logit_scale", type=number(above=True), default=10.0, help="factor on the recurrent head's states; course: 1")
    add("--forget_bias", type=number(), default=1.0, help="added to the LSTM's forget-gate bias; the course: 0")
    encoder = "reads the images first: a strided Conv4, or the one of protonet.py"
    add("--encoder", choices=["none", "strided", "conv4"], default="none", help=encoder)
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=4e-3, help="of Adam, at its peak; the course: 1e-3")
    add("--schedule", choices=["constant", "linear"], default="linear", help="linear: falls to 0 over the second half")
    shared = "deal the tasks of a step from the images of P classes, each encoded once; 0: no"
    add("--shared_classes", type=whole(0), default=0, metavar="P", help=shared)
    add("--clip", type=number(), default=1.0, help="largest norm of the gradient; 0: no limit, as in the course")
    add = groups["data"].add_argument
    add("--num_workers", type=whole(0), default=0, help="kept for the course's commands: episodes need no workers here")
    add("--image_caching", type=str, default="True", help="kept for the course's commands: images are always in memory")
    add("--jitter", type=number(0, 1), default=0.0, help="random turn (radians), size and slant of training images")
    add("--shift", type=number(0, 1), default=0.0, help="random shift of training images, a share of half their size")
    add("--fixed_labels", action="store_true", help="training characters keep their labels: the memorisation lesson")
    smoke = {"train_steps": 40, "eval_freq": 20, "num_val_tasks": 200, "num_test_tasks": 600, "hidden_dim": 32}
    shapes = "num_classes hidden_dim recurrent num_layers head logit_scale encoder image_size".split()
    falls = "its learning rate falls to zero there (--schedule linear)"
    longer = lambda flags: falls if flags["schedule"] == "linear" else None
    args = experiment.parse(parser, argv, smoke | {"meta_batch_size": 32}, fixed=tuple(shapes), longer=longer)
    if not args.test and 0 < args.shared_classes < args.num_classes:
        raise UserError(f"--shared_classes {args.shared_classes} is less than --num_classes {args.num_classes}")
    if args.encoder != "none" and args.image_size != 28:
        raise UserError(f"--encoder {args.encoder} reads 28x28 images; drop --image_size {args.image_size}")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device, probe=lambda: learn_a_little(CELLS[args.recurrent], device))
    if args.shared_classes and experiment.shard()[1] > 1:
        raise UserError("--shared_classes cannot be split over processes; use 0 or run without torchrun")
    dataset = load_for(args)
    B, N, K, P = args.meta_batch_size, args.num_classes, args.num_shot, args.shared_classes
    flags = ("num_classes", "num_shot", None)
    test = EpisodeSampler(dataset, "test", N, K, 1, 200, TEST_SEED, device, flags=flags)
    runs = lake_runs(dataset, args, device)
    recurrent = Recurrent(args.recurrent, args.num_layers, args.head, args.logit_scale, args.forget_bias)
    model = MANN(N, K + 1, args.hidden_dim, recurrent, args.encoder, dataset.images[0].size)
    model = model.to(device, memory_format=torch.channels_last)
    where = {"dtype": str(dtype).removeprefix("torch."), "device": experiment.device_name(device)}
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        metrics = {"best_step": step} | test_report(model, test, args.num_test_tasks, runs) | where
        return experiment.report(args, "hw1", dataset.name, metrics, digest=dataset.digest)

    train = EpisodeSampler(
        dataset,
        "train",
        P or N,
        K,
        batch_size=1 if P else B,
        seed=args.random_seed,
        device=device,
        rotations=args.rotations,
        fixed_labels=args.fixed_labels,
        jitter=args.jitter,
        shift=args.shift,
        shard=experiment.shard(),
        flags=("shared_classes", *flags[1:]) if P not in (0, N) else flags,
    )
    val = EpisodeSampler(dataset, "val", N, K, 1, 200, VAL_SEED, device, flags=flags)
    experiment.init_from(args, model)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    share = lambda done: min(1.0, 2 * (1 - done / args.train_steps)) if args.schedule == "linear" else 1.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    run = Run(args, "hw1", dataset.name, dataset.digest)
    run.track(model=model, optimizer=optimizer, schedule=schedule, sampler=train)

    @recorded(model, device, train.generator)  # one CUDA graph on a GPU; on a CPU this line does nothing
    def forward_backward() -> torch.Tensor:
        images, labels = train.sample_rows()  # [B, K+1, N, 784], [B, K+1, N, N]; or one task of P classes
        with experiment.autocast(device, dtype):
            features = model.encode(images)
            if P:
                features, labels = deal_tasks(features, labels, B, N, train.generator)
            loss = model.loss_function(model.classify(features, labels).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    for _ in run.steps():
        loss = forward_backward()
        experiment.average_gradients(model)
        if args.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                scalars = {}
                for part, sampler in (("val", val), ("test", test)):  # the homework plots test; it decides nothing
                    accuracies, loss_there = evaluate(model, sampler, args.num_val_tasks)
                    scalars |= {f"Loss/{part}": loss_there, f"Accuracy/{part}": accuracies.mean().item()}
            # The memorisation lesson is about where training ends, so there the last model counts.
            run.evaluated(None if args.fixed_labels else scalars["Accuracy/val"], scalars)
    run.load_best(model)
    metrics = test_report(model, test, args.num_test_tasks, runs) | where
    log_episode(run, test, lambda support, _, query: guess(model, support, query))
    if args.fixed_labels:
        metrics["train_accuracy"] = evaluate(model, train, args.num_val_tasks)[0].mean().item()
    return run.finish(metrics)


def test_report(model: MANN, test: EpisodeSampler, num_tasks: int, runs: EpisodeSampler | None) -> dict:
    """Accuracy on the fixed test tasks (and Lake's `runs`), queries together (the course's way) and alone."""
    accuracies = evaluate(model, test, num_tasks)[0]
    figures = experiment.figures_of("", accuracies)
    figures |= experiment.figures_of("_alone", evaluate(model, test, num_tasks, alone=True)[0])
    for how in ("", "_alone") if runs else ():
        found = evaluate(model, runs, runs.B, alone=how == "_alone")[0]
        figures |= experiment.figures_of(f"_lake_runs{how}", found)
    return figures | {
        "num_test_tasks": num_tasks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
    }


if __name__ == "__main__":
    experiment.run_script(main)
