"""MANN: a network with memory reads a small labelled set and then labels new images.

Santoro et al. 2016, "Meta-learning with memory-augmented neural networks", in the course's form: the
sequence of support images, each with its label, is followed by the queries, whose labels are zeros.
An LSTM has to store which picture bore which label; labels are drawn anew for every task, so the
weights can only learn how to learn. The loss is the cross entropy of the N query predictions alone.

    python hw1.py --num_shot 1 --num_classes 2            about two minutes on two CPU cores
    python hw1.py --num_shot 1 --num_classes 2 --smoke    a complete run in seconds
    python hw1.py --num_shot 1 --num_classes 2 --head recurrent --logit_scale 1 --forget_bias 0 --no-rotations \\
        --schedule constant --learning_rate 1e-3 --clip 0 --train_steps 25000    the course's recipe
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import experiment
from backbone import Conv4
from experiment import TEST_SEED, VAL_SEED, Run, UserError, number, whole
from load_data import EpisodeSampler, deal_tasks, load_dataset, log_episode, refuse_trained_classes

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class MANN(nn.Module):
    """Recurrent layers over the sequence of (image, label) pairs of an episode.

    With the defaults it is the course's network: two LSTM layers, (N + 784) -> hidden_dim -> N.

    recurrent: lstm, gru or rnn; num_layers of them.
    head: "recurrent", the last recurrent layer has N units, its state is the logits; or "linear", it
        has hidden_dim units and a linear layer reads the logits off.
    logit_scale: a recurrent state lies in (-1, 1), too narrow for a confident softmax; the
        recurrent head's logits are multiplied by this.
    forget_bias: added to the LSTM's initial forget-gate bias; at 1 the memory of the support set
        survives to the queries from the first step on (Jozefowicz et al. 2015).
    encoder: "none" feeds the pixels, "conv" 64 features of a strided Conv4 trained along (28x28 images).
    """

    def __init__(
        self,
        num_classes: int,
        samples_per_class: int,
        hidden_dim: int,
        recurrent: str = "lstm",
        num_layers: int = 2,
        head: str = "recurrent",
        logit_scale: float = 1.0,
        forget_bias: float = 0.0,
        encoder: str = "none",
        dim_input: int = 784,
    ):
        super().__init__()
        self.num_classes, self.samples_per_class = num_classes, samples_per_class
        self.encoder = Conv4(dim_input // 784, strided=True) if encoder == "conv" else None
        features = self.encoder.out_features if self.encoder else dim_input
        # Averaged over space, the features of all images are alike at first; this brings out the difference.
        self.standardise = nn.BatchNorm1d(features, affine=False) if self.encoder else None
        last = num_classes if head == "recurrent" else hidden_dim
        sizes = [num_classes + features] + [hidden_dim] * (num_layers - 1) + [last]
        cell = CELLS[recurrent]
        self.layers = nn.ModuleList(
            cell(size, next_size, batch_first=True) for size, next_size in zip(sizes, sizes[1:], strict=False)
        )
        self.readout = nn.Linear(hidden_dim, num_classes) if head == "linear" else None
        for layer, units in zip(self.layers, sizes[1:], strict=True):
            if recurrent == "lstm":
                with torch.no_grad():
                    layer.bias_ih_l0[units : 2 * units] += forget_bias  # gates are ordered i, f, g, o
        self.logit_scale = logit_scale if head == "recurrent" else 1.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[..., 784] pixels to [..., D] features."""
        if self.encoder is None:
            return images
        flat = images.reshape(-1, self.encoder.weight0.shape[1], 28, 28)
        flat = flat.contiguous(memory_format=torch.channels_last)
        norm = "batch" if self.training else "running"
        return self.standardise(self.encoder(flat, norm=norm, momentum=0.1)).view(*images.shape[:-1], -1)

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
        B, _, N, _ = input_images.shape
        features = self.encode(input_images)
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


def learn_a_little(recurrent: str, device: torch.device) -> None:
    """One forward and backward pass of a small recurrent layer: not every processor has these kernels in bfloat16."""
    states, _ = CELLS[recurrent](8, 8, batch_first=True).to(device)(torch.zeros(2, 3, 8, device=device))
    states.sum().backward()


@torch.no_grad()
def evaluate(model: MANN, sampler: EpisodeSampler, num_tasks: int, alone: bool = False) -> tuple[torch.Tensor, float]:
    """Accuracy of each of the first `num_tasks` tasks of the sampler's stream [num_tasks], and the mean loss.

    alone: each query is asked alone instead of in one sequence with the others of its task.
    """
    was_training = model.training
    model.eval()
    correct, losses = [], []
    for images, labels in sampler.first(num_tasks, sampler.sample_rows):
        if alone:
            preds = torch.cat([torch.zeros_like(labels[:, :-1]), model.forward_alone(images, labels)[:, None]], dim=1)
        else:
            preds = model(images, labels)
        losses.append(model.loss_function(preds, labels).item() * len(labels))
        right = preds[:, -1].argmax(dim=-1) == labels[:, -1].argmax(dim=-1)  # [B, N]
        correct.append(right.float().mean(dim=1).cpu())
    model.train(was_training)
    return torch.cat(correct), sum(losses) / num_tasks


def guess(model: MANN, support: torch.Tensor, support_labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The classes [N] that the model gives the queries of one task in the layout of `EpisodeSampler.sample`."""
    N = model.num_classes
    images = torch.cat([support.view(1, N, -1, query[0, 0].numel()).transpose(1, 2), query.view(1, 1, N, -1)], dim=1)
    labels = torch.eye(N, device=query.device).expand(1, images.shape[1], N, N)  # the last row is not looked at
    model.eval()
    return model(images, labels)[0, -1].argmax(dim=-1)


def parse_args(argv=None):
    """The flags; combinations that cannot work are refused here."""
    parser, groups = experiment.make_parser(
        __doc__, num_classes=5, num_query=1, meta_batch_size=128, train_steps=6000, eval_freq=100,
        num_val_tasks=2000, num_test_tasks=10_000, rotations=True,
    )  # fmt: skip
    parser.prog = "hw1.py"
    add = groups["model"].add_argument
    add("--hidden_dim", type=whole(1), default=128, help="units of the hidden recurrent layers")
    add("--recurrent", choices=sorted(CELLS), default="lstm", help="kind of recurrent layer")
    add("--num_layers", type=whole(1, 100), default=2, help="recurrent layers")
    add("--head", choices=["linear", "recurrent"], default="linear", help="what makes N logits; the course: recurrent")
    add("--logit_scale", type=number(above=True), default=10.0, help="factor on the recurrent head's states; course: 1")
    add("--forget_bias", type=number(), default=1.0, help="added to the LSTM's forget-gate bias; the course: 0")
    add("--encoder", choices=["none", "conv"], default="none", help="conv reads the images by a Conv4 first")
    add = groups["optimisation"].add_argument
    add("--learning_rate", type=number(above=True), default=4e-3, help="of Adam, at its peak; the course: 1e-3")
    add("--schedule", choices=["constant", "linear"], default="linear", help="linear: falls to 0 over the second half")
    add("--shared_classes", type=whole(0), default=0, metavar="P",
        help="deal the tasks of a step from the images of P classes, each encoded once; 0: no")  # fmt: skip
    add("--clip", type=number(), default=1.0, help="largest norm of the gradient; 0: no limit, as in the course")
    add = groups["data"].add_argument
    add("--num_workers", type=whole(0), default=0, help="kept for the course's commands: episodes need no workers here")
    add("--image_caching", type=str, default="True", help="kept for the course's commands: images are always in memory")
    add("--jitter", type=number(0, 1), default=0.0, help="random turn (radians), size and slant of training images")
    add("--fixed_labels", action="store_true", help="training characters keep their labels: the memorisation lesson")
    smoke = {"train_steps": 40, "eval_freq": 20, "num_val_tasks": 200, "num_test_tasks": 600, "hidden_dim": 32,
             "meta_batch_size": 32}  # fmt: skip
    shapes = ("num_classes", "hidden_dim", "recurrent", "num_layers", "head", "logit_scale", "encoder", "image_size")
    groups["run"].add_argument("--init_from", **experiment.INIT_FROM)
    falls = "its learning rate falls to zero there (--schedule linear)"
    longer = lambda flags: falls if flags["schedule"] == "linear" else None
    args = experiment.parse(parser, argv, smoke, fixed=shapes, longer=longer)
    if args.num_query != 1:
        raise UserError(f"--num_query {args.num_query}: the sequence has one query of each class; drop the flag")
    if args.shared_classes and args.shared_classes < args.num_classes:
        raise UserError(f"--shared_classes {args.shared_classes} is less than --num_classes {args.num_classes}")
    if args.encoder == "conv" and args.image_size != 28:
        raise UserError(f"--encoder conv reads 28x28 images; drop --image_size {args.image_size}")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = experiment.setup(args)
    dtype = experiment.precision(args, device, probe=lambda: learn_a_little(args.recurrent, device))
    if args.shared_classes and experiment.shard()[1] > 1:
        raise UserError("--shared_classes cannot be split over processes; drop it or run without torchrun")
    dataset = load_dataset(args.dataset, args.data_folder, args.split, args.image_size)

    def sampler(part: str, seed: int, B: int, num_classes: int = args.num_classes, **options) -> EpisodeSampler:
        flags = ("num_classes" if num_classes == args.num_classes else "shared_classes", "num_shot", None)
        return EpisodeSampler(dataset, part, num_classes, args.num_shot, 1, B, seed, device, flags=flags, **options)

    B, N, P = args.meta_batch_size, args.num_classes, args.shared_classes
    train = sampler("train", args.random_seed, 1 if P else B, num_classes=P or N, rotations=args.rotations,
                    fixed_labels=args.fixed_labels, jitter=args.jitter, shard=experiment.shard())  # fmt: skip
    val, test = sampler("val", VAL_SEED, 200), sampler("test", TEST_SEED, 200)
    refuse_trained_classes(args, dataset)
    model = MANN(
        args.num_classes, args.num_shot + 1, args.hidden_dim, args.recurrent, args.num_layers, args.head,
        args.logit_scale, args.forget_bias, args.encoder, dim_input=dataset.images[0].size,
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    if args.test:
        step = experiment.load_best(args.checkpoint, model)
        metrics = {"best_step": step} | test_report(args, model, test, dtype, device)
        return experiment.report(args, "hw1", dataset.name, metrics, digest=dataset.digest)

    experiment.init_from(args, model)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    linear = args.schedule == "linear"
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, 2 * (1 - done / args.train_steps)) if linear else 1.0
    )
    run = Run(args, "hw1", dataset.name, dataset.digest)
    run.track(model=model, optimizer=optimizer, schedule=schedule, sampler=train)
    for _ in run.steps():
        images, labels = train.sample_rows()  # [B, K+1, N, 784], [B, K+1, N, N]; or one task of P classes
        with experiment.autocast(device, dtype):
            features = model.encode(images)
            if P:
                features, labels = deal_tasks(features, labels, B, N, train.generator)
            preds = model.classify(features, labels)
        loss = model.loss_function(preds.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        experiment.average_gradients(model)
        if args.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped():
                val_accuracy, val_loss = evaluate(model, val, args.num_val_tasks)
                # The homework plots the test curve; nothing is decided by it.
                test_accuracy, test_loss = evaluate(model, test, args.num_val_tasks)
            val_accuracy, test_accuracy = val_accuracy.mean().item(), test_accuracy.mean().item()
            # The memorisation lesson is about where training ends, so there the last model counts.
            run.evaluated(None if args.fixed_labels else val_accuracy, {
                "Loss/val": val_loss, "Accuracy/val": val_accuracy,
                "Loss/test": test_loss, "Accuracy/test": test_accuracy,
            })  # fmt: skip
    run.load_best(model)
    log_episode(run, test, lambda *task: guess(model, *task))
    metrics = test_report(args, model, test, dtype, device)
    if args.fixed_labels:
        metrics["train_accuracy"] = evaluate(model, train, args.num_val_tasks)[0].mean().item()
    return run.finish(metrics)


def test_report(args, model: MANN, test: EpisodeSampler, dtype: torch.dtype, device: torch.device) -> dict:
    """Accuracy on the fixed test tasks, queries asked together (the course's way) and alone."""
    accuracies = evaluate(model, test, args.num_test_tasks)[0]
    accuracy, ci95 = experiment.mean_and_ci95(accuracies)
    alone, alone_ci95 = experiment.mean_and_ci95(evaluate(model, test, args.num_test_tasks, alone=True)[0])
    return {
        "test_accuracy": accuracy, "ci95": ci95, "num_test_tasks": args.num_test_tasks,
        "test_accuracy_alone": alone, "ci95_alone": alone_ci95,
        "dtype": str(dtype).removeprefix("torch."), "device": experiment.device_name(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
    }  # fmt: skip


if __name__ == "__main__":
    experiment.run_script(main)
