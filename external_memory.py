"""An LSTM with a table beside it, that writes down what it sees and looks it up again: images in one long sequence.

Santoro et al. 2016, "Meta-learning with memory-augmented neural networks", in the protocol of the paper: 50 images of 5
characters in a shuffled order, the label of each told with the next image. The network writes over the least used rows
of its table and reads rows by likeness (eqs. 2 to 8). What counts is the accuracy at the second, third, ..., tenth
sight of a character.

    python external_memory.py               5 characters, 10 images of each
    python external_memory.py --no_table    the paper's baseline: two LSTM layers on the same sequences
    python external_memory.py --smoke       a complete run in seconds

Measured: 80.9 ± 0.4 % at the second and 92.4 ± 0.2 % at the tenth sight (one seed), 7.6 minutes on an NVIDIA H100.
Everything else: docs/external_memory.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole
from fewshot.experiment.replay import recorded
from fewshot.learners.memory import (
    ImageReader,
    accuracy_by_sight,
    features_once,
    learn_a_little,
    memory_figure,
    one_step_late,
    sights_figure,
)
from fewshot.tasks.data_of_run import load_for
from fewshot.tasks.episodes import EpisodeSampler

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------- the table


def least_used(usage: torch.Tensor, n: int) -> torch.Tensor:
    """One-hot weights [B, n, R] of the n least used of R rows, usage [B, R] (Santoro et al., eq. 6).

    Of rows used alike the first comes first. Row i of the answer is for head i, so that the heads do not write over
    each other; their sum is the paper's w^lu.
    """
    return F.one_hot(usage.argsort(dim=-1, stable=True)[:, :n], usage.shape[-1]).to(usage.dtype)


def write(memory, read_weights, usage, keys, gate):
    """The memory after a step's write, and the write weights [B, H, R] (Santoro et al., eqs. 6 to 8).

    memory [B, R, W]; read_weights [B, H, R] and usage [B, R] of the step before; keys [B, H, W]; gate [B, H, 1] is
    sigma(alpha): 1 writes where the head has just read, 0 to the least used row. These rows are emptied first.
    """
    least = least_used(usage, keys.shape[1])
    weights = gate * read_weights + (1 - gate) * least  # eq. 7
    kept = 1 - least.sum(dim=1)
    return memory * kept[..., None] + weights.mT @ keys, weights  # eq. 8


def read(memory, keys, sharpness):
    """What H heads read [B, H, W], and their read weights [B, H, R] (Santoro et al., eqs. 2 to 4)."""
    similarity = F.normalize(keys, dim=-1, eps=1e-6) @ F.normalize(memory, dim=-1, eps=1e-6).mT  # eq. 2
    weights = (sharpness * similarity).softmax(dim=-1)  # eq. 3
    return weights @ memory, weights  # eq. 4


class ExternalMemory(nn.Module):
    """An LSTM with a table of R rows of W numbers that it writes to and reads from by H heads at every step.

    Called as nn.LSTM(batch_first=True) is, with its state [1, B, ...] extended by the table, the read weights and the
    usage. `units` is the size of an output: the controller's state and what was read. `decay` is gamma of eq. 5.
    sharpness: the cosines of eq. 3 lie in [-1, 1], and over 128 rows their softmax is almost flat; as in the neural
    Turing machine a learned factor sharpens it, from this value on. The paper: 1, not learned.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int = 200,
        rows: int = 128,
        width: int = 40,
        heads: int = 4,
        decay: float = 0.95,
        sharpness: float = 10.0,
    ):
        super().__init__()
        self.rows, self.width, self.heads, self.decay = rows, width, heads, decay
        self.units = hidden + heads * width
        self.into, self.back = nn.Linear(inputs, 4 * hidden), nn.Linear(self.units, 4 * hidden, bias=False)
        self.keys = nn.Linear(hidden, heads * width)
        self.gate = nn.Linear(hidden, heads)
        self.sharpness = nn.Parameter(torch.full((heads, 1), float(sharpness)))

    def start(self, B: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state before the first item: everything zero."""
        hidden = self.keys.in_features
        shapes = [(hidden,), (hidden,), (self.rows, self.width), (self.heads, self.rows), (self.rows,)]
        return tuple(like.new_zeros(1, B, *shape) for shape in shapes)

    def forward(self, sequence: torch.Tensor, state=None, trace: list | None = None):
        """sequence [B, T, inputs] -> outputs [B, T, units] and the state.

        trace: a list to which each step appends its read and write weights, [B, H, R] each.
        """
        h, c, memory, weights, usage = (s[0] for s in state or self.start(len(sequence), sequence))
        got = weights @ memory  # what the step before has read
        outputs = []
        for gates in self.into(sequence).unbind(dim=1):  # the images' share of the LSTM's gates, all at once
            i, f, g, o = (gates + self.back(torch.cat([h, got.flatten(1)], dim=-1))).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            keys = self.keys(h).tanh().unflatten(-1, (self.heads, self.width))
            memory, written = write(memory, weights, usage, keys, self.gate(h).sigmoid()[..., None])
            got, weights = read(memory, keys, self.sharpness)
            usage = (self.decay * usage + weights.sum(dim=1) + written.sum(dim=1)).detach()  # eq. 5, only ranked
            outputs.append(torch.cat([h, got.flatten(1)], dim=-1))
            if trace is not None:
                trace.append((weights, written))
        return torch.stack(outputs, dim=1), tuple(s[None] for s in (h, c, memory, weights, usage))


# -------------------------------------------------------------------------------- the learner


class SequenceLearner(ImageReader):
    """Reads a sequence of (image, label of the image before) pairs and names every image.

    table: an LSTM of hidden_dim units with an external memory; without, two LSTM layers of hidden_dim units.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int = 200,
        table: bool = True,
        heads: int = 4,
        encoder: str = "none",
        dim_input: int = 784,
    ):
        super().__init__(encoder, dim_input)
        inputs = num_classes + self.D
        if table:
            layers = [ExternalMemory(inputs, hidden_dim, heads=heads)]
        else:
            layers = [nn.LSTM(size, hidden_dim, batch_first=True) for size in (inputs, hidden_dim)]
        self.layers = nn.ModuleList(layers)
        self.readout = nn.Linear(layers[0].units if table else hidden_dim, num_classes)
        if not table:
            with torch.no_grad():  # gates are ordered i, f, g, o: at first the cells keep what they hold
                for layer in layers:
                    layer.bias_ih_l0[hidden_dim : 2 * hidden_dim] += 1

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, N] for encoded images with the label of the image before, [B, T, D + N]."""
        for layer in self.layers:
            sequence, _ = layer(sequence)
        return self.readout(sequence)


@torch.no_grad()
def evaluate(model: SequenceLearner, sampler: EpisodeSampler, num_tasks: int) -> tuple[torch.Tensor, float]:
    """Accuracy [num_tasks, K+1] at the first, second, ... sight of a class, and the mean loss."""
    was_training = model.training
    model.eval()
    once, right, losses = features_once(model, sampler, num_tasks), [], []
    for images, labels in sampler.first(num_tasks, sampler.sample_rows, features=once):
        features = model.encode(images) if once is None else images
        sequence, targets, sights = one_step_late(features, labels, sampler.generator)
        logits = model(sequence)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() * len(labels))
        right.append(accuracy_by_sight((logits.argmax(dim=-1) == targets).float(), sights, sampler.K + 1).cpu())
    model.train(was_training)
    return torch.cat(right), sum(losses) / num_tasks


@torch.no_grad()
def look(model: SequenceLearner, sampler: EpisodeSampler):
    """A matplotlib figure of what the heads read and write in the sampler's first sequence; None without a table."""
    if not isinstance(model.layers[0], ExternalMemory):
        return None
    images, labels = next(sampler.first(1, sampler.sample_rows))
    model.eval()
    return memory_figure(model.layers[0], one_step_late(model.encode(images), labels, sampler.generator)[0])


# --------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    sizes = {"meta_batch_size": 128, "train_steps": 4000, "eval_freq": 500, "num_shot": 9}
    sizes |= {"num_val_tasks": 400, "num_test_tasks": 10_000}
    parser, groups = experiment.make_parser(__doc__, without=("--num_query",), num_query=1, rotations=True, **sizes)
    parser.prog = "external_memory.py"
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
    add = groups["model"].add_argument
    add("--no_table", action="store_true", help="no external memory: two LSTM layers, the baseline")
    add("--heads", type=whole(1, 64), default=4, help="that read and write the table")
    add("--hidden_dim", type=whole(1, 16384), default=200, help="units of the LSTM, or of each of the two")
    encoder = "reads the images first: a strided Conv4, or the one of protonet.py"
    add("--encoder", choices=["none", "strided", "conv4"], default="none", help=encoder)
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=3e-3, help="of Adam, at its peak")
    add("--schedule", choices=["constant", "linear"], default="linear", help="linear: falls to 0 over the second half")
    add("--clip", type=number(above=True), default=1.0, help="largest norm of the gradient")
    add = groups["data"].add_argument
    add("--jitter", type=number(0, 1), default=0.1, help="random turn (radians), size and slant of training images")
    add("--shift", type=number(0, 1), default=0.1, help="random shift of training images, a share of half their size")
    smoke = {"train_steps": 10, "eval_freq": 5, "num_val_tasks": 40, "num_test_tasks": 120, "meta_batch_size": 4}
    smoke |= {"num_shot": 3, "hidden_dim": 32}
    shapes = ("num_classes", "no_table", "heads", "hidden_dim", "encoder", "image_size")
    falls = "its learning rate falls to zero there (--schedule linear)"
    longer = lambda flags: falls if flags["schedule"] == "linear" else None
    args = experiment.parse(parser, argv, smoke, fixed=shapes, longer=longer)
    if args.encoder != "none" and args.image_size != 28:
        raise UserError(f"--encoder {args.encoder} reads 28x28 images; drop --image_size {args.image_size}")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device, probe=lambda: learn_a_little(nn.LSTM, device))
    dataset = load_for(args)
    N, K = args.num_classes, args.num_shot  # K+1 images of each class are in a sequence
    flags = ("num_classes", "num_shot", None)
    test = EpisodeSampler(dataset, "test", N, K, 1, 200, TEST_SEED, device, flags=flags)
    pixels = dataset.images[0].size
    model = SequenceLearner(N, args.hidden_dim, not args.no_table, args.heads, args.encoder, pixels)
    model = model.to(device, memory_format=torch.channels_last)
    where = {"dtype": str(dtype).removeprefix("torch."), "device": experiment.device_name(device)}
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        metrics = {"best_step": step} | test_report(model, test, args.num_test_tasks) | where
        if figure := look(model, test):
            name = f"external_memory_{dataset.name}.png"
            experiment.write_beside(args.checkpoint, name, lambda out: figure.savefig(out, format="png"))
        return experiment.report(args, "external_memory", dataset.name, metrics, digest=dataset.digest)

    train = EpisodeSampler(
        dataset,
        "train",
        N,
        K,
        batch_size=args.meta_batch_size,
        seed=args.random_seed,
        device=device,
        rotations=args.rotations,
        jitter=args.jitter,
        shift=args.shift,
        shard=experiment.shard(),
        flags=flags,
    )
    val = EpisodeSampler(dataset, "val", N, K, 1, 200, VAL_SEED, device, flags=flags)
    experiment.init_from(args, model)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    share = lambda done: min(1.0, 2 * (1 - done / args.train_steps)) if args.schedule == "linear" else 1.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    run = Run(args, "external_memory", dataset.name, dataset.digest)
    run.track(model=model, optimizer=optimizer, schedule=schedule, sampler=train)

    @recorded(model, device, train.generator)  # one CUDA graph on a GPU; on a CPU this line does nothing
    def forward_backward() -> torch.Tensor:
        images, labels = train.sample_rows()  # [B, K+1, N, 784], [B, K+1, N, N]
        with experiment.autocast(device, dtype):
            sequence, targets, _ = one_step_late(model.encode(images), labels, train.generator)
            loss = F.cross_entropy(model(sequence).float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    for _ in run.steps():
        loss = forward_backward()
        experiment.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                scalars = {}
                for part, sampler in (("val", val), ("test", test)):  # over all sights; test decides nothing
                    accuracies, loss_there = evaluate(model, sampler, args.num_val_tasks)
                    scalars |= {f"Loss/{part}": loss_there, f"Accuracy/{part}": accuracies.mean().item()}
            run.evaluated(scalars["Accuracy/val"], scalars)
    run.load_best(model)
    metrics = test_report(model, test, args.num_test_tasks) | where
    if run.writes:
        by_sight = sights_figure(torch.tensor(metrics["accuracy_by_sight"]), N)
        run.writer.add_figure("accuracy_by_sight", by_sight, run.step)
        if figure := look(model, test):
            run.writer.add_figure("memory", figure, run.step)
    return run.finish(metrics)


def test_report(model: SequenceLearner, test: EpisodeSampler, num_tasks: int) -> dict:
    """Accuracy on the fixed test sequences: at the first, second, ... sight of a class, and of all."""
    accuracies = evaluate(model, test, num_tasks)[0]
    by_sight = [experiment.mean_and_ci95(column) for column in accuracies.unbind(dim=1)]
    return experiment.figures_of("", accuracies.mean(dim=1)) | {
        "num_test_tasks": num_tasks,
        "accuracy_by_sight": [mean for mean, _ in by_sight],
        "ci95_by_sight": [ci95 for _, ci95 in by_sight],
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracies": [round(a, 4) for a in accuracies.mean(dim=1).tolist()],
    }


if __name__ == "__main__":
    experiment.run_script(main)
