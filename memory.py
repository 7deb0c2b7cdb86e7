"""What a black-box learner can remember with, beside the LSTM in hw1.py: attention, or an external memory.

`CausalAttention` keeps every support item and looks back at all of them (Mishra et al. 2018, "A simple neural attentive
meta-learner", SNAIL; Vaswani et al. 2017). `ExternalMemory` is an LSTM that writes to a table of rows, always over the
least used ones, and reads from it by likeness (Santoro et al. 2016, "Meta-learning with memory-augmented neural
networks", eqs. 2 to 8); `one_step_late` makes the sequences of their paper. Nothing here knows of flags or training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------- attention


def visible(S: int, N: int, device=None) -> torch.Tensor:
    """Who may look at whom, bool [S + N, S + N]: row t is the item that looks.

    A support item sees the support items up to itself; each of the N queries sees the support set and itself, so that N
    queries in one pass are asked as if each were alone.
    """
    seen = torch.ones(S + N, S + N, dtype=torch.bool, device=device).tril()
    seen[S:, S:] = torch.eye(N, dtype=torch.bool, device=device)
    return seen


def attend(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys (last axis) that `seen` allows; each row sums to one (Vaswani et al., eq. 1)."""
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


class AttentionLayer(nn.Module):
    """Items look at other items and take over what they find: multi-head attention, then two linear layers.

    Labels enter by comparison: `same` is added to a head's score where the two items bear the same label, so that a
    head can gather the images of a class or pass them over. No label has a name, and permuting the labels permutes
    nothing. The last linear maps start at zero: at first the layer hands on what it gets.
    """

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.same = nn.Parameter(torch.zeros(heads, 1, 1))
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        for last in (self.out, self.mlp[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: torch.Tensor, same: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Items x [B, T, D]; same [B, T, T] is 1 where labels agree; seen [T, T]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        weights = attend(q @ k.mT / q.shape[-1] ** 0.5 + self.same * same[:, None], seen)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    """Attention layers over the support set and the queries, then one look back that reads the labels off.

    The last look (SNAIL's read; Vinyals et al. 2016, eq. 1) gives the class of an item as the share of its attention
    that falls on each label, p(c) = sum over support items j of a_j [y_j = c]. Scores are negative squared distances of
    learned projections, which start as the identity: training starts at the nearest-neighbour rule. Any number of
    classes and shots can be asked of one network.
    """

    def __init__(self, D: int, layers: int = 1, heads: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(D, heads) for _ in range(layers))
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)
        for linear in (self.query, self.key):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def look(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Attention weights [B, T, S] of all T = (K+1) N items over the S = K N support items; rows sum to one."""
        rows, N, D = features.shape[1:]
        S = (rows - 1) * N
        x, y = features.flatten(1, 2), labels[:, :-1].flatten(1, 2)  # [B, T, D], [B, S, N]
        same = F.pad(y @ y.mT, (0, N, 0, N))  # queries have no labels
        seen = visible(S, N, x.device)
        for layer in self.layers:
            x = layer(x, same, seen)
        q, k = self.query(x), self.key(x[:, :S])
        # -|q - k|^2 without |q|^2, which the softmax does not see; over sqrt(D) lest it be saturated at first.
        return attend((2 * q @ k.mT - k.square().sum(dim=-1)[:, None]) / D**0.5, seen[:, :S])

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [B, K+1, N, N] for features [B, K+1, N, D] and one-hot labels [B, K+1, N, N].

        The labels of the last row, the queries, are not looked at. A support item sees its own label.
        """
        shares = self.look(features, labels) @ labels[:, :-1].flatten(1, 2)  # [B, T, N]
        return torch.log(shares + 1e-30).view(labels.shape)


# ---------------------------------------------------------------------------- external memory


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


def memory_figure(memory: ExternalMemory, sequence: torch.Tensor):
    """A matplotlib figure of the weights with which the first task of a sequence [B, T, D + N] is read and written.

    A row is a row of the memory, a column a step of time; the heads are added up.
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
