"""Episodes: N classes, K support and Q query images each, a meta-batch at a time."""

from __future__ import annotations

from fewshot.experiment import TEST_SEED, VAL_SEED, UserError
from fewshot.tasks.splits import Dataset, turns

import numpy as np
import torch
import torch.nn.functional as F


def draw_distinct(rows: int, n: int, k: int, generator: torch.Generator, allowed: torch.Tensor | None = None):
    """k distinct integers below n for each row, every ordered choice equally likely: int64 [rows, k].

    `allowed` (bool [rows, n]) restricts each row to some of the integers.
    """
    device = generator.device
    if allowed is None and k * k <= n and device.type == "cpu":
        # Rare repeats: draw with replacement and draw the offending rows again, far fewer random
        # numbers than one key per integer (they are what a meta-batch costs; a GPU would have to wait for the look).
        drawn = torch.randint(n, (rows, k), generator=generator, device=device)
        while k > 1:
            ordered = drawn.sort(dim=1).values
            repeats = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()[:, 0]
            if len(repeats) == 0:
                break
            drawn[repeats] = torch.randint(n, (len(repeats), k), generator=generator, device=device)
        return drawn
    keys = torch.rand(rows, n, generator=generator, device=device)
    if allowed is not None:
        keys = keys.masked_fill_(~allowed, -1.0)
    return keys.topk(k, dim=1).indices


def distort(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Turn, scale, slant and shift images [n, C, H, W].

    amounts [n, 4 or 6]: radians, size, slant in x and in y; shift in x and in y, as a share of half an image.
    """
    angle, size, slant_x, slant_y, *shift = amounts.unbind(dim=1)
    cos, sin = (1 + size) * angle.cos(), angle.sin()
    shift_x, shift_y = shift or (torch.zeros_like(angle),) * 2
    affine = torch.stack([cos, slant_x - sin, shift_x, slant_y + sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class EpisodeSampler:
    """Draws meta-batches of B episodes of N classes, K support and Q query images, on one device.

    The packed images of one split live on `device`; a draw is one gather, without a Python loop over
    tasks, classes or images. The generator is the sampler's own: `state_dict` and `load_state_dict`
    continue a stream exactly, `reset` starts it again. Training tasks are drawn on `device`; those of the other
    splits on the CPU, so that a GPU is tested on the very same ones.

    rotations: adds every class turned by 90, 180 and 270 degrees as three more classes. Where the dataset is `turned`
        they are there in any case, in validation and test too.
    within_alphabet: all N classes of a task come from one alphabet, drawn uniformly from those
        that have N classes (Lake et al. 2015).
    one_drawer: the K support images of every class of a task are by the same K people, the queries by others, as in
        the one-shot trials of Lake et al. Image d of each character of an alphabet is by its drawer d.
    fixed_labels: class c always gets the label c mod N, so a network can memorise the labels of the
        training classes instead of learning to learn from the support set.
    jitter: every image is turned (by up to so many radians), scaled and slanted (by up to this share)
        at random, as if another person had drawn it.
    shift: and moved by up to this share of half its size.
    shard: (rank, world) keeps the rank-th of `world` equal slices of every meta-batch; all ranks draw
        the same tasks together, so their union does not depend on `world`.
    flags: what the user sets N, K and Q by, for the words of an error; None where there is no flag.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        num_classes: int,
        num_shot: int,
        num_query: int = 1,
        batch_size: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rotations: bool = False,
        within_alphabet: bool = False,
        one_drawer: bool = False,
        fixed_labels: bool = False,
        jitter: float = 0.0,
        shift: float = 0.0,
        shard: tuple[int, int] = (0, 1),
        flags: tuple[str | None, ...] = ("num_classes", "num_shot", "num_query"),
    ):
        chosen = dataset.splits[split]
        if len(chosen) == 0:
            raise UserError(f"--dataset {dataset.name} has no classes of split '{split}'; it is for tests alone")
        self.N, self.K, self.Q, self.B = num_classes, num_shot, num_query, batch_size
        self.seed, self.shard, self.fixed_labels, self.jitter, self.shift = seed, shard, fixed_labels, jitter, shift
        if batch_size % shard[1]:
            raise UserError(f"--meta_batch_size {batch_size} does not divide over {shard[1]} processes")
        starts, counts = dataset.starts[chosen], dataset.counts[chosen]
        rows = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
        images = torch.from_numpy(dataset.images[rows])
        alphabets = [dataset.names[c].rsplit("/", 1)[0] for c in chosen]
        if rotations or dataset.turned:
            images = turns(images)
            counts = np.tile(counts, 4)
            alphabets = [f"{a} turned {turn}" for turn in range(4) for a in alphabets]
        self.num_available = len(counts)
        smallest = int(counts.argmin())
        n, k, q = (f"--{flag} {v}" if flag else str(v) for flag, v in zip(flags, (self.N, self.K, self.Q), strict=True))
        if self.N > self.num_available:
            raise UserError(f"{n} is more than the {self.num_available} classes of split '{split}'; use fewer")
        if self.K + self.Q > counts[smallest]:
            name = dataset.names[chosen[smallest % len(chosen)]]
            raise UserError(f"{k} plus {q} is more than the {counts[smallest]} images of {name}; use fewer")
        self.images = images.contiguous().to(device)  # uint8 [total, C, H, W]
        drawn_on = device if split == "train" else "cpu"
        self.counts = torch.from_numpy(counts).to(drawn_on)
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        self.most = int(counts.max())
        self.same_count = self.most if len(set(counts.tolist())) == 1 else None
        self.limits = torch.tensor([jitter] * 4 + ([shift] * 2 if shift > 0 else []), device=device)
        if one_drawer and not self.same_count:
            raise UserError(f"tasks of one drawer need as many images of each class; those of split '{split}' differ")
        self.one_drawer = one_drawer
        self.groups = None  # bool [alphabets, classes]
        if within_alphabet:
            members = np.array([[a == b for b in alphabets] for a in dict.fromkeys(alphabets)])
            members = members[members.sum(1) >= self.N]
            if len(members) == 0:
                raise UserError(f"--within_alphabet: no alphabet of split '{split}' has {self.N} characters")
            self.groups = torch.from_numpy(members).to(drawn_on)
        self.labels = torch.arange(self.N, device=device)
        self.one_hot = torch.eye(self.N, device=device)
        self.generator = torch.Generator(drawn_on)
        self.reset()

    def __getstate__(self) -> dict:
        """What pickle and copy take, for workers that do not start as copies of this process: arrays, no tensors."""
        tensors = {k: v for k, v in self.__dict__.items() if isinstance(v, torch.Tensor)}
        arrays = {k: v.cpu().numpy() for k, v in tensors.items()} | {"generator": self.generator.get_state().numpy()}
        devices = {k: v.device for k, v in tensors.items()} | {"generator": self.generator.device}
        return self.__dict__ | arrays | {"devices": devices}

    def __setstate__(self, state: dict) -> None:
        generator, devices = torch.from_numpy(state.pop("generator").copy()), state.pop("devices")
        self.__dict__ |= {k: torch.from_numpy(v.copy()).to(devices[k]) if k in devices else v for k, v in state.items()}
        self.generator = torch.Generator(devices["generator"])
        self.generator.set_state(generator)

    def reset(self) -> None:
        """Start the stream of tasks again from the seed."""
        self.generator.manual_seed(self.seed)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())

    def draw(self, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the images of a meta-batch without touching them.

        Returns int64 rows of `images`, [B, N, K + Q], and the query order, [B, N * Q]: query j of a
        task is the (order[j] mod Q)-th query image of class order[j] div Q.
        """
        B, N, K, Q, g = batch_size or self.B, self.N, self.K, self.Q, self.generator
        device = self.counts.device
        if self.fixed_labels:
            turns = torch.randint(self.num_available // N, (B, N), generator=g, device=device)
            classes = turns * N + self.labels
        elif self.groups is not None:
            allowed = self.groups[torch.randint(len(self.groups), (B,), generator=g, device=device)]
            classes = draw_distinct(B, self.num_available, N, g, allowed)
        else:
            classes = draw_distinct(B, self.num_available, N, g)
        classes = classes.reshape(B * N)
        if self.same_count:
            members = draw_distinct(B * N, self.same_count, K + Q, g)
        else:
            places = torch.arange(self.most, device=device)
            members = draw_distinct(B * N, self.most, K + Q, g, places < self.counts[classes, None])
        rows = (self.starts[classes, None] + members).view(B, N, K + Q)
        if self.one_drawer:  # those that have drawn the first class
            drawers = rows % self.same_count
            rows = rows - drawers + drawers[:, :1]
        order = torch.rand(B, N * Q, generator=g, device=device).argsort(dim=1)
        rank, world = self.shard
        mine = slice(rank * B // world, (rank + 1) * B // world)
        return rows[mine].to(self.images.device), order[mine].to(self.images.device)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 images [B, ..., C, H, W] in [0, 1] of int64 rows [B, ...]."""
        images = self.images.index_select(0, rows.reshape(-1)).to(torch.float32).div_(255)
        if self.jitter > 0 or self.shift > 0:
            rank, world = self.shard
            shape = (world, rows.numel(), len(self.limits))  # all ranks draw for all and use their own
            noise = torch.rand(shape, generator=self.generator, device=rows.device)[rank]
            images = distort(images, self.limits * (2 * noise - 1))
        return images.view(*rows.shape, *self.images.shape[1:])

    def sample(self, batch_size: int | None = None, one_hot: bool = False, features: torch.Tensor | None = None):
        """A meta-batch as (support, support labels, query, query labels).

        support [B, N*K, C, H, W] in class order, query [B, N*Q, C, H, W] shuffled; labels are int64
        [B, N*K] and [B, N*Q], or with `one_hot` float32 [..., N]. With `features` [len(self.images), D] the same tasks
        hold these rows in place of the images.
        """
        rows, order = self.draw(batch_size)
        B, N, K, Q = len(rows), self.N, self.K, self.Q
        gather = self.gather if features is None else features.__getitem__
        support = gather(rows[:, :, :K].reshape(B, N * K))
        query = gather(rows[:, :, K:].reshape(B, N * Q).gather(1, order))
        support_labels = self.labels.repeat_interleave(K).expand(B, N * K)
        query_labels = order.div(Q, rounding_mode="floor")
        if one_hot:
            support_labels, query_labels = self.one_hot[support_labels], self.one_hot[query_labels]
        return support, support_labels, query, query_labels

    def sample_rows(self, batch_size: int | None = None, features: torch.Tensor | None = None):
        """A meta-batch in the course's layout, for Q = 1.

        Returns float32 images [B, K+1, N, C*H*W] and one-hot float32 labels [B, K+1, N, N]. Rows
        0 to K-1 are the support set in class order; row K holds the N queries, shuffled. With `features`
        [len(self.images), D] the same tasks hold these rows in place of the images.
        """
        rows, order = self.draw(batch_size)
        B, N, K = len(rows), self.N, self.K
        rows = torch.cat([rows[:, :, :K].transpose(1, 2), rows[:, :, K].gather(1, order)[:, None]], dim=1)
        labels = torch.cat([self.labels.expand(B, K, N), order[:, None]], dim=1)
        one_hot = self.one_hot.index_select(0, labels.reshape(-1)).view(B, K + 1, N, N)
        return (self.gather if features is None else features.__getitem__)(rows).flatten(3), one_hot

    def first(self, num_tasks: int, sample=None, **options):
        """Start the stream again and yield its meta-batches, the last one cut, until they hold `num_tasks` tasks.

        They are drawn by `sample`, a method that draws (by default `self.sample`), with `options`.
        """
        self.reset()
        sample, done = sample or self.sample, 0
        while done < num_tasks:
            batch = tuple(x[: num_tasks - done] for x in sample(**options))
            done += len(batch[0])
            yield batch


def fixed_tasks(dataset: Dataset, part: str, args, device: torch.device, **options) -> EpisodeSampler:
    """The tasks of validation or test (`part`): the same for every method, seed and processor.

    The size of its meta-batches is part of the stream; it depends on the setting alone: about 2000 images.
    """
    N, K, Q = args.num_classes, args.num_shot, args.num_query
    seed = {"val": VAL_SEED, "test": TEST_SEED}[part]
    return EpisodeSampler(dataset, part, N, K, Q, max(1, 2000 // (N * (K + Q))), seed, device, **options)


def deal_tasks(features: torch.Tensor, labels: torch.Tensor, B: int, N: int, g: torch.Generator):
    """Deal B tasks of N classes from one large episode, so that each of its images is encoded only once.

    features [1, K+1, P, D] and one-hot labels [1, K+1, P, P] of P classes -> [B, K+1, N, D], [B, K+1, N, N].
    """
    in_order = labels[0].argmax(dim=-1).argsort(dim=-1)  # [K+1, P]: the query row is shuffled
    classes = draw_distinct(B, features.shape[2], N, g)  # [B, N]
    order = torch.rand(B, N, generator=g, device=g.device).argsort(dim=1)  # of the queries
    columns = classes.unsqueeze(1).repeat(1, features.shape[1], 1)  # [B, K+1, N]
    columns[:, -1] = classes.gather(1, order)
    places = in_order.expand(B, -1, -1).gather(2, columns)
    rows = torch.arange(features.shape[1], device=g.device)[:, None]
    one_hot = torch.eye(N, device=g.device).repeat(B, features.shape[1], 1, 1)
    one_hot[:, -1] = one_hot[:, 0].gather(1, order[..., None].expand(-1, -1, N))
    return features[0][rows, places], one_hot
