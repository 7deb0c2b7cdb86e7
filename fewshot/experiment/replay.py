"""A computation recorded once as a CUDA graph and replayed.

On a GPU the steps of small networks wait for the launch of thousands of short kernels, not for arithmetic. A graph
launches all of them at once, and they compute what they computed before. On a CPU nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


def recorded(model: torch.nn.Module, device: torch.device, *generators: torch.Generator) -> Callable:
    """A decorator for a step's forward and backward pass: on a GPU one CUDA graph, elsewhere the function itself.

        @recorded(model, device, sampler.generator)
        def forward_backward() -> torch.Tensor:
            loss = loss_of(model, sampler.sample())
            optimizer.zero_grad()
            loss.backward()
            return loss.detach()

    generators: those that the step draws from. `Gradient` says what the step may do, and what it may take and return.
    """
    return lambda step: Gradient(step, model, device, generators) if can_record(device) else step


def can_record(device: torch.device) -> bool:
    """Only a GPU records, and one process alone: between processes sums would be part of the graph."""
    return device.type == "cuda" and not (dist.is_initialized() and dist.get_world_size() > 1)


class Replayed:
    """`compute(*tensors)`, a list of tensors, recorded on a GPU at its first call with tensors of these shapes.

    It may read other tensors, in place, but must not look at a value. `changed` are tensors that it changes in place
    (running averages), `generators` those it draws from: recording leaves both as they were. What it returns is
    overwritten by the next call.
    """

    def __init__(
        self,
        compute: Callable[..., list],
        device: torch.device,
        changed: Iterable[torch.Tensor] = (),
        generators: Iterable[torch.Generator] = (),
    ):
        self.compute, self.changed, self.generators, self.shapes = compute, list(changed), list(generators), None
        self.records = can_record(device)

    def __call__(self, *inputs: torch.Tensor) -> list:
        if not self.records:
            return self.compute(*inputs)
        shapes = [(x.shape, x.dtype) for x in inputs]
        if shapes != self.shapes:
            self.record(inputs)
            self.shapes = shapes
        if inputs:
            torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.outputs

    def record(self, inputs: tuple[torch.Tensor, ...]) -> None:
        values, states = [x.clone() for x in self.changed], [g.get_state() for g in self.generators]
        self.inputs = [x.detach().clone() for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # in their first calls libraries choose kernels and take memory
                self.compute(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.outputs = self.compute(*self.inputs)
        for x, value in zip(self.changed, values, strict=True):
            x.copy_(value)


class Gradient:
    """Call it once a step, with the step's tensors if `compute` wants any: gradients of `model` are then in `.grad`.

    `compute` runs the forward and the backward pass and returns the loss, or a tuple of tensors that begins with it; a
    parameter that takes no part has no gradient. On a GPU all of this, the draws of `generators` included, is replayed.
    """

    def __init__(self, compute: Callable, model: torch.nn.Module, device: torch.device, generators=()):
        self.of_step = compute
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.replayed = Replayed(self.compute, device, model.buffers(), generators)

    def compute(self, *inputs: torch.Tensor) -> list:
        for p in self.parameters:
            p.grad = None
        found = self.of_step(*inputs)
        return [found, *(p.grad for p in self.parameters)]

    def __call__(self, *inputs: torch.Tensor):
        found, *gradients = self.replayed(*inputs)
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        return found
