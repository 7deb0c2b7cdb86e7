"""Omniglot, built-in glyphs and your own folders of images, served as few-shot episodes.

An episode (a task) is N classes with K labelled support images and Q query images each
(Vinyals et al. 2016, "Matching networks for one shot learning"). `load_dataset` gets the images from
`fewshot/images/` and divides the classes; from then on one uint8 array lives on the training
device and a whole meta-batch of B episodes is a few tensor operations (`EpisodeSampler`, every kind of
episode). `DataGenerator` serves the same episodes one at a time through the course's interface.

    python load_data.py                      # what is here, with pictures of an episode and of classes
    python load_data.py --dataset glyphs     # procedurally drawn characters, needs no data
    python load_data.py --dataset folder --data_folder my_images

Everywhere: float32 images in [0, 1], 1 is ink and 0 is paper; colour photographs keep their values.

Everything else: docs/load_data.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.images.preparation import Preparation
from fewshot.tasks.episodes import EpisodeSampler, fixed_tasks
from fewshot.tasks.splits import Dataset, load_dataset

import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

# What `from load_data import ...` offers: the course's interface, and all that a method in one screen needs.
__all__ = ["DataGenerator", "Dataset", "EpisodeSampler", "class_sheet", "episode_figure", "fixed_tasks", "load_dataset"]
__all__ += ["log_episode"]


class DataGenerator(torch.utils.data.IterableDataset):
    """The course's interface: an endless stream of single episodes for a `DataLoader`.

    num_samples_per_class is K + 1; batch_type is train, val or test. `config` may hold data_folder,
    img_size, and also dataset, split, rotations and allow_overlap as the scripts' flags name them. `cache` is kept
    for the course's callers: the packed images are always in memory. Episodes are on `device`
    (leave it on the CPU for a DataLoader with workers).

    The stream follows from torch's seed alone (`torch.manual_seed`): each pass over the loader and
    each worker has an own stream, also with `persistent_workers` and whatever way workers are started.
    """

    def __init__(
        self,
        num_classes: int,
        num_samples_per_class: int,
        batch_type: str,
        config: dict = {},  # noqa: B006 (the course's signature; never changed here)
        device: torch.device = torch.device("cpu"),  # noqa: B008
        cache: bool = True,
    ):
        if batch_type not in ("train", "val", "test"):
            raise UserError(f"batch_type {batch_type!r} is unknown; use train, val or test")
        self.num_classes, self.num_samples_per_class = num_classes, num_samples_per_class
        self.img_size = tuple(config.get("img_size", (28, 28)))
        if len(set(self.img_size)) != 1:
            raise UserError(f"img_size {self.img_size} is not square")
        name, split = config.get("dataset", "auto"), config.get("split", "course")
        allowed = config.get("allow_overlap", False)
        dataset = load_dataset(name, config.get("data_folder"), split, self.img_size[0], allowed)
        self.dim_input, self.dim_output = int(np.prod(dataset.images.shape[1:])), num_classes
        self.device = torch.device(device)
        self.passes = 0  # of this worker process
        seed = int(torch.empty((), dtype=torch.int64).random_())
        rotations = config.get("rotations", False) and batch_type == "train"
        self.sampler = EpisodeSampler(
            dataset, batch_type, num_classes, num_samples_per_class - 1, seed=seed, device=device, rotations=rotations
        )

    def _sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One episode: float32 images [K+1, N, 784] and one-hot float32 labels [K+1, N, N]."""
        images, labels = self.sampler.sample_rows(1)
        return images[0], labels[0]

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        elif self.passes == 0:
            seed = worker.seed  # a fresh base seed of the loader's pass plus the worker's number
        else:  # a persistent worker keeps its seed
            seed = int(np.random.SeedSequence([worker.seed, self.passes]).generate_state(1, np.uint64)[0] >> 1)
        self.passes += worker is not None
        self.sampler.generator.manual_seed(seed)
        while True:
            yield self._sample()


def episode_figure(support, support_labels, query, query_labels, predictions=None):
    """A matplotlib figure of one episode: support rows above the queries, one column a class.

    support [N*K, C, H, W] and query [N*Q, C, H, W] in [0, 1], integer labels. With `predictions`
    (int [N*Q]) each query is titled "predicted (true)" in green when right and red when wrong.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing to close

    columns, (C, H, W) = int(support_labels.max()) + 1, support.shape[1:]
    K, rows_query = len(support) // columns, -(-len(query) // columns)
    high, wide = round(1.3 * H), round(1.15 * W)  # of a tile, its title above the image
    # One picture of all tiles: axes for each would take seconds at 20 ways.
    paper = np.ones(((K + rows_query) * high, columns * wide, C), dtype=np.float32)
    figure = Figure(figsize=(max(columns, 4) * 0.95, (K + rows_query) * 1.1))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")

    def show(row: int, column: int, image, title: str, colour: str) -> None:
        y, x = (row + 1) * high - H, column * wide + (wide - W) // 2
        pixels = image.cpu().permute(1, 2, 0).numpy()
        paper[y : y + H, x : x + W] = 1 - pixels if C == 1 else pixels
        ax.text(x + W / 2, y - 1, title, fontsize=9, color=colour, ha="center", va="bottom")

    for i in range(len(support)):
        c = int(support_labels[i])
        show(i % K, c, support[i], f"class {c}", "black")
    for j in range(len(query)):
        true = int(query_labels[j])
        guess = None if predictions is None else int(predictions[j])
        title = f"query: {true}" if guess is None else f"query: {guess} ({true})"
        colour = "tab:blue" if guess is None else "green" if guess == true else "red"
        show(K + j // columns, j % columns, query[j], title, colour)
    ax.imshow(paper[..., 0] if C == 1 else paper, cmap="gray", vmin=0, vmax=1)
    return figure


def log_episode(run, sampler: EpisodeSampler, guess) -> None:
    """Send a picture of the first task of a sampler's stream, with predictions, to TensorBoard.

    guess(support [1, N*K, C, H, W], support labels [1, N*K], query [1, N*Q, C, H, W]) -> classes [N*Q].
    """
    if not run.writes:
        return
    support, support_labels, query, query_labels = next(sampler.first(1))
    with torch.no_grad():
        guesses = guess(support, support_labels, query)
    shown = 3 * sampler.N
    figure = episode_figure(support[0], support_labels[0], query[0, :shown], query_labels[0, :shown], guesses[:shown])
    run.writer.add_figure("episode", figure, run.step)


def class_sheet(dataset: Dataset, rows: int = 10, columns: int = 10) -> np.ndarray:
    """uint8 picture of `rows` classes, spread over the dataset, by `columns` images each."""
    columns = min(columns, int(dataset.counts.min()))
    chosen = np.linspace(0, len(dataset.names) - 1, rows).astype(int)
    sheet = np.stack([dataset.images[dataset.starts[c] :][:columns] for c in chosen])  # [rows, columns, C, H, W]
    sheet = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * sheet.shape[3], columns * sheet.shape[4], -1)
    paper = 255 - sheet[..., 0] if sheet.shape[-1] == 1 else sheet
    return paper.repeat(2, axis=0).repeat(2, axis=1)


def main(argv=None) -> Dataset:
    """Print what was found; write a picture of one episode and one of some classes to runs/."""
    parser = experiment.Parser(prog="load_data.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", choices=["auto", "omniglot", "glyphs", "folder", "mnist"], default="auto")
    parser.add_argument("--data_folder", help="where the images are")
    parser.add_argument("--split", choices=experiment.SPLITS, default="course")
    parser.add_argument("--image_size", type=int, default=28, help="pixels a side")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    data = load_dataset(args.dataset, args.data_folder, args.split, args.image_size, allow_overlap=True)
    seconds = time.perf_counter() - begin
    print(f"dataset     {data.name}, {data.source}")
    for part, classes in data.splits.items():
        copies = ", and each turned by 90, 180 and 270 degrees" if data.turned else ""
        print(f"{part:11s} {len(classes)} classes, {data.counts[classes].sum()} images{copies}")
    print(f"images      uint8 {list(data.images.shape)}, {data.images.mean() / 255:.3f} ink on average")
    if data.name == "folder":
        print(f"read        {Preparation(data.images.shape[1], data.inverted)}")
    print(f"digest      {data.digest}\ncache file  {data.cache_file}\nloaded in   {seconds:.2f} s")
    part = "train" if len(data.splits["train"]) else "test"
    sampler = EpisodeSampler(data, part, min(5, len(data.splits[part])), 1, 1)
    episode = [tensor[0] for tensor in sampler.sample(1)]
    try:
        Path("runs").mkdir(exist_ok=True)
        episode_figure(*episode).savefig("runs/episode.png", dpi=150)
        iio.imwrite("runs/classes.png", class_sheet(data))
    except OSError as error:
        raise UserError(f"cannot write pictures into runs/ ({error}); start in another working directory") from None
    print("pictures    runs/episode.png, runs/classes.png")
    return data


if __name__ == "__main__":
    experiment.run_script(main)
