"""A function of one task, for all tasks of a meta-batch.

On a GPU all tasks go through one `vmap`. On a CPU convolutions with other weights for every task are slow when batched:
there each task goes by itself, on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.func import vmap

Batch = tuple[torch.Tensor, ...]  # tensors [B, ...] whose rows are the tasks


def mean_over_tasks(loss_of: Callable, batch: Batch, learner: torch.nn.Module) -> torch.Tensor:
    """The mean of loss_of(*task) over the tasks; backward() adds its gradient to the parameters of `learner`.

    On a CPU a task's gradient is taken here already, so that its graph is freed before the next task's is built.
    """
    if batch[0].is_cuda:
        return vmap(loss_of)(*batch).mean()
    return MeanOverTasks.apply(loss_of, batch, *(p for p in learner.parameters() if p.requires_grad))


class MeanOverTasks(torch.autograd.Function):
    """The mean loss, with the gradients that were found task by task."""

    @staticmethod
    def forward(ctx, loss_of, batch, *parameters):
        def gradient_of(*task):
            loss = loss_of(*task)
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        with torch.enable_grad():
            losses, gradients = zip(*each_task(gradient_of, batch), strict=True)
        # In the tasks' order; None stays None, so that Adam's averages of a head begin with its first gradient.
        of_parameters = zip(*gradients, strict=True)
        ctx.gradients = [None if of[0] is None else sum(of) / len(losses) for of in of_parameters]
        return sum(losses) / len(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_mean):
        return None, None, *(None if gradient is None else gradient * of_mean for gradient in ctx.gradients)


def over_tasks(function: Callable, batch: Batch) -> Batch:
    """What function(*task) returns, a tuple of tensors, stacked over the tasks: [B, ...] each."""
    if batch[0].is_cuda:
        return vmap(function)(*batch)
    return tuple(torch.stack(values) for values in zip(*each_task(function, batch), strict=True))


def each_task(function: Callable, batch: Batch) -> list:
    """[function(*task) for each task], on all CPU cores: one thread a task beats many threads an operation."""
    workers = torch.get_num_threads()
    tasks = list(zip(*batch, strict=True))
    if workers == 1 or len(tasks) == 1:
        return [function(*task) for task in tasks]
    enabled = torch.is_grad_enabled()  # belongs to a thread, as the number of threads of an operation does

    def alone(task):
        torch.set_num_threads(1)
        with torch.set_grad_enabled(enabled):
            return function(*task)

    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(alone, tasks))
    finally:
        torch.set_num_threads(workers)
