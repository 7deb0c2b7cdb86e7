"""What the learners that read labelled images in a sequence share: hw1.py, attention.py and external_memory.py.

An encoder that reads the images first, the queries of one task, sequences with late labels and their accuracy, and
pictures of what is remembered. Nothing here knows of flags or training.
"""

from __future__ import annotations

from fewshot.learners.conv4 import Conv4

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------ reading images


class ImageReader(nn.Module):
    """A learner that reads its images as pixels, or as the features of an encoder that is trained along.

    encoder: "none" leaves the pixels, "strided" gives 64 features of a strided Conv4 (28x28 images), "conv4" those of
        the Conv4 of protonet.py.
    `D` is the number of features of an image.
    """

    def __init__(self, encoder: str = "none", dim_input: int = 784):
        super().__init__()
        self.encoder = None if encoder == "none" else Conv4(dim_input // 784, strided=encoder == "strided")
        self.D = self.encoder.out_features if self.encoder else dim_input
        # Averaged over space, the features of all images are alike at first; this brings out the difference.
        self.standardise = nn.BatchNorm1d(self.D, affine=False) if encoder == "strided" else nn.Identity()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[..., 784] pixels to [..., D] features."""
        if self.encoder is None:
            return images
        flat = images.reshape(-1, self.encoder.weight0.shape[1], 28, 28)
        flat = flat.contiguous(memory_format=torch.channels_last)
        norm = "batch" if self.training else "running"
        return self.standardise(self.encoder(flat, norm=norm, momentum=0.1)).view(*images.shape[:-1], -1)


def features_once(model: ImageReader, sampler, num_tasks: int) -> torch.Tensor | None:
    """Features [images, D] of the sampler's split, where its tasks would encode more images than it has; else None."""
    few = num_tasks * sampler.N * (sampler.K + 1) < len(sampler.images)
    if model.encoder is None or few or sampler.jitter or sampler.shift:
        return None
    return torch.cat([model.encode(part.flatten(1).float() / 255) for part in sampler.images.split(1000)])


def guess(model: nn.Module, support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The classes [N] that a model of rows gives the queries of one task.

    support [1, N*K, C, H, W] in class order, query [1, N, C, H, W]. `model` takes images and labels as rows, as
    `EpisodeSampler.sample_rows` gives them.
    """
    N = query.shape[1]
    images = torch.cat([support.view(1, N, -1, query[0, 0].numel()).transpose(1, 2), query.view(1, 1, N, -1)], dim=1)
    labels = torch.eye(N, device=query.device).expand(1, images.shape[1], N, N)  # the last row is not looked at
    model.eval()
    return model(images, labels)[0, -1].argmax(dim=-1)


def learn_a_little(cell: type[nn.RNNBase], device: torch.device) -> None:
    """One forward and backward pass of a small recurrent layer: not every processor has these kernels in bfloat16."""
    states, _ = cell(8, 8, batch_first=True).to(device)(torch.zeros(2, 3, 8, device=device))
    states.sum().backward()


# --------------------------------------------------------------- sequences with late labels


def one_step_late(features: torch.Tensor, labels: torch.Tensor, generator: torch.Generator):
    """All images of a task in one shuffled sequence, each beside the label of the one before (Santoro et al., fig. 1).

    features [B, R, N, D] and one-hot labels [B, R, N, N]: R images of each of N classes -> sequence [B, T, D + N] with
    T = R N, targets int64 [B, T], and int64 sights [B, T], how often the class was seen before in the sequence.
    """
    B, R, N, _ = features.shape
    order = torch.rand(B, R * N, generator=generator, device=generator.device).argsort(dim=1)[..., None]
    order = order.to(features.device)
    features = features.flatten(1, 2)
    features = features.gather(1, order.expand_as(features))
    one_hot = labels.flatten(1, 2)
    one_hot = one_hot.gather(1, order.expand_as(one_hot))
    targets = one_hot.argmax(dim=-1)
    sights = one_hot.long().cumsum(dim=1).gather(2, targets[..., None])[..., 0] - 1
    late = F.pad(one_hot[:, :-1], (0, 0, 1, 0))  # nothing is told at the first image
    return torch.cat([features, late], dim=-1), targets, sights


def accuracy_by_sight(right: torch.Tensor, sights: torch.Tensor, R: int) -> torch.Tensor:
    """Mean over the classes of right [B, T] (0 or 1) at their first, second, ..., R-th sight: [B, R]."""
    return (F.one_hot(sights, R).to(right.dtype) * right[..., None]).sum(dim=1) * R / sights.shape[1]


# ----------------------------------------------------------------------------------- pictures


def attention_figure(support: torch.Tensor, query: torch.Tensor, weights: torch.Tensor, S_max: int = 25):
    """A matplotlib figure of where each query looks: one row a query, one column a support image, paler is less.

    support [S, C, H, W] in class order and query [Q, C, H, W] in [0, 1]; weights [Q, S]. At most `S_max` columns and as
    many rows.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing to close

    support, query, weights = support[:S_max].cpu(), query[:S_max].cpu(), weights[:S_max, :S_max].float().cpu()
    (Q, S), (H, W) = weights.shape, support.shape[-2:]
    shares = torch.cat([torch.ones(Q, 1), weights], dim=1)
    ink = torch.cat([query[:, None], support.expand(Q, *support.shape)], dim=1).mean(dim=2)  # [Q, S + 1, H, W]
    # One image on one pair of axes: matplotlib lays out 25 x 26 pairs far more slowly.
    top, gap = H // 3, W // 14 + 1
    cells = F.pad(ink * (0.15 + 0.85 * shares)[..., None, None], (0, gap, top, 0))
    figure = Figure(figsize=(0.75 * (S + 1), 0.9 * Q))
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    ax.imshow(1 - cells.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    for i, j in torch.cartesian_prod(torch.arange(Q), torch.arange(S + 1)).tolist():
        label = f"{100 * shares[i, j]:.0f} %" if j else "query"
        ax.text(j * (W + gap) + W / 2, i * (H + top) + top - 2, label, fontsize=8, ha="center")
    ax.axis("off")
    return figure


def memory_figure(memory: nn.Module, sequence: torch.Tensor):
    """A matplotlib figure of the weights with which the first task of a sequence [B, T, D + N] is read and written.

    A row is a row of the memory, a column a step of time; the heads are added up. `memory` is an `ExternalMemory`.
    """
    from matplotlib.figure import Figure

    trace: list = []
    memory(sequence[:1], trace=trace)
    figure = Figure(figsize=(8, 6), layout="constrained")
    for ax, which, name in zip(figure.subplots(2, 1), zip(*trace, strict=True), ("read", "write"), strict=True):
        weights = torch.stack([w[0].detach().sum(dim=0).cpu() for w in which], dim=1)  # [R, T]
        drawn = ax.imshow(weights.numpy(), aspect="auto", cmap="magma", interpolation="nearest")
        figure.colorbar(drawn, ax=ax)
        ax.set(title=f"{name} weights", xlabel="image of the sequence", ylabel="row of the memory")
    return figure


def sights_figure(accuracy: torch.Tensor, N: int):
    """A matplotlib figure of the accuracy [R] at the first, second, ... sight of a class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    ax = figure.subplots()
    ax.plot(range(1, len(accuracy) + 1), 100 * accuracy.cpu().numpy(), marker="o")
    ax.axhline(100 / N, color="grey", linestyle=":", label="guessing")
    ax.set(xlabel="sight of a character", ylabel="accuracy in %", ylim=(0, 101))
    ax.legend()
    return figure
