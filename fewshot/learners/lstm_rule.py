"""An LSTM over coordinates, for a learned update rule: every parameter of a learner is read by the same small LSTM.

The LSTM is most of what an episode costs. Its step is written out by hand, and the vector of parameters is cut into
tiles whose state fits in the processor's cache; a tile is also what the LSTM is trained on, or not (`trained_share`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 20  # units
P_SCALE = 10.0  # p of the pre-processing
TILE = 1024  # parameters whose state fits in the processor's cache

Memory = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # tiles, h, c: those trained on first, then the others


def preprocess(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two inputs of ordinary size for each number of any size (section 3.4 and appendix of the paper).

    (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x); p = 10.
    """
    big = x.abs() >= math.exp(-P_SCALE)
    size = x.abs().clamp(min=math.exp(-P_SCALE)).log() / P_SCALE
    return torch.where(big, size, -torch.ones_like(x)), torch.where(big, x.sign(), x * math.exp(P_SCALE))


class LSTMCell(torch.autograd.Function):
    """One step of an LSTM with the parameters of nn.LSTMCell (gates i, f, g, o), coordinates last.

    inputs [R, n, W], h and c [R, H, W] -> new h and c. Written out because it is most of what an episode
    costs: one matrix product and one sigmoid for all gates (tanh z = 2 sigmoid(2z) - 1), everything else
    in place, and no gradient for inputs that are constants.
    """

    @staticmethod
    def forward(ctx, inputs, h, c, weight_ih, weight_hh, bias):
        H = h.shape[1]
        scale = torch.ones_like(bias)
        scale[2 * H : 3 * H] = 2  # of g's argument, for the tanh
        weight = (torch.cat([weight_ih, bias[:, None], weight_hh], dim=1) * scale[:, None]).to(h.dtype)
        inputs = torch.cat([inputs.to(h.dtype), torch.ones_like(h[:, :1]), h], dim=1)  # [R, n + 1 + H, W]
        gates = torch.matmul(weight, inputs).sigmoid_()  # [R, 4H, W]
        i, f, s, o = gates.chunk(4, dim=1)
        new_c = (f * c).addcmul_(i, s, value=2).sub_(i)  # g = 2s - 1
        new_h = torch.mul(new_c, 2).sigmoid_().mul_(2).sub_(1).mul_(o)
        ctx.save_for_backward(weight, inputs, gates, c, new_c, scale)
        return new_h, new_c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h, grad_c):
        weight, inputs, gates, c, new_c, scale = ctx.saved_tensors
        H = c.shape[1]
        i, f, s, o = gates.chunk(4, dim=1)
        tanh_c = torch.mul(new_c, 2).sigmoid_().mul_(2).sub_(1)
        grad_c = tanh_c.square().neg_().add_(1).mul_(o).mul_(grad_h).add_(grad_c)  # through h as well
        grad = gates.square().neg_().add_(gates)  # sigmoid' of all gates; then times what each multiplies
        grad_i, grad_f, grad_s, grad_o = grad.chunk(4, dim=1)
        grad_o.mul_(tanh_c).mul_(grad_h)
        grad_f.mul_(c).mul_(grad_c)
        grad_s.mul_(i).mul_(grad_c).mul_(2)
        grad_i.mul_(tanh_c.copy_(s).mul_(2).sub_(1)).mul_(grad_c)
        n = inputs.shape[1] - H - 1
        grad_weight = torch.bmm(grad, inputs.transpose(1, 2)).sum(dim=0, dtype=scale.dtype) * scale[:, None]
        first = 0 if ctx.needs_input_grad[0] else n + 1
        grad_inputs = torch.matmul(weight[:, first:].t().contiguous(), grad)
        return (
            None if first else grad_inputs[:, :n],
            grad_inputs[:, -H:],
            grad_c.mul_(f),
            grad_weight[:, :n],
            grad_weight[:, n + 1 :],
            grad_weight[:, n],
        )


def small(*shape: int) -> nn.Parameter:
    """A weight uniform in (-0.01, 0.01)."""
    return nn.Parameter(0.02 * torch.rand(shape) - 0.01)


class CoordinateLSTM(nn.Module):
    """An LSTM that reads the gradient and the loss of every parameter of B learners, coordinate by coordinate.

    trained_share < 1: it runs on all coordinates, but only a random share of the tiles, drawn for each meta-batch,
    takes part in its backward pass, weighted up so that the expected gradient is the same.
    """

    def __init__(self, trained_share: float = 1.0):
        super().__init__()
        self.weight_ih, self.weight_hh = small(4 * HIDDEN, 4), small(4 * HIDDEN, HIDDEN)
        self.bias_ih, self.bias_hh = small(4 * HIDDEN), small(4 * HIDDEN)
        self.trained_share = trained_share

    def draw_tiles(self, P: int, B: int) -> list[torch.Tensor]:
        """The tiles of B vectors of P parameters: all, or in training those that the LSTM is trained on and others."""
        tiles, device = -(-P // TILE), self.weight_ih.device
        if self.trained_share == 1 or not torch.is_grad_enabled():
            return [torch.arange(B * tiles, device=device)]
        trained = max(1, round(self.trained_share * B * tiles))
        return [part.to(device) for part in torch.randperm(B * tiles).tensor_split([trained])]

    def empty_memory(self, like: torch.Tensor, dtype: torch.dtype, tiles: list[torch.Tensor]) -> Memory:
        """h = c = 0 for each of the tiles."""
        memory = []
        for part in tiles:
            zeros = like.new_zeros(len(part), HIDDEN, TILE, dtype=dtype)
            memory.append((part, zeros, zeros))
        return memory

    def read(self, grad: torch.Tensor, loss: torch.Tensor, memory: Memory, weight: torch.Tensor):
        """W h for every coordinate, [B, 2, P], and the new memory; gradient [B, P] of whole tiles (`pad`), loss [B].

        W: the first HIDDEN columns of `weight` [2, HIDDEN or more].
        """
        B, P = grad.shape
        rows = lambda x: x.reshape(B * P // TILE, TILE)
        inputs = [rows(x) for x in preprocess(grad)] + [rows(x[:, None].expand(B, P)) for x in preprocess(loss)]
        inputs = torch.stack(inputs, dim=1)  # [B * tiles, 4, TILE]
        weights = (self.weight_ih, self.weight_hh, self.bias_ih + self.bias_hh)
        whole_vector, total = len(memory) == 1, len(inputs)
        after, of_h = [], []
        for k, (part, h, c) in enumerate(memory):
            with torch.set_grad_enabled(k == 0 and torch.is_grad_enabled()):
                h, c = LSTMCell.apply(inputs if whole_vector else inputs[part], h, c, *weights)
            after.append((part, h, c))
            if k == 0 and not whole_vector:  # the same value, its gradient weighted up
                h = h.detach() + (h - h.detach()) * (total / len(part))
            of_h.append(torch.matmul(weight[:, :HIDDEN].to(h.dtype), h))  # [tiles, 2, TILE]
        if whole_vector:
            (of_h,) = of_h
        else:
            of_h = torch.cat(of_h)[torch.cat([part for part, _, _ in memory]).argsort()]
        return of_h.to(grad.dtype).view(B, -1, 2, TILE).transpose(1, 2).reshape(B, 2, P), after


def pad(theta: torch.Tensor) -> torch.Tensor:
    """A vector [P] padded to whole tiles; a padded parameter stays 0 and has no gradient."""
    return F.pad(theta, (0, -len(theta) % TILE))
