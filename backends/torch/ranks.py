"""Several processes by torch.distributed, which torchrun has started (common/ranks.py)."""

from typing import Any

import torch
from torch import distributed

from backends.torch.adapters import trained_parameters
from backends.torch.network import Transformer
from common import ranks


def join_ranks() -> None:
    """Meet the processes that torchrun has started, once; alone, there is nobody to meet.

    A process that does not come, or stops answering, ends the others after half an hour; one that
    is killed ends them at once.
    """
    if ranks.launcher() != "torchrun" or distributed.is_initialized():
        return
    # Values go from CPU to CPU, gradients of a GPU from GPU to GPU.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    ranks.join(distributed.get_rank(), distributed.get_world_size(), _gather)


def _gather(value: Any) -> list[Any]:
    values = [None] * ranks.count()
    distributed.all_gather_object(values, value)
    return values


def sum_gradients(network: Transformer) -> None:
    """Add up the gradients of all ranks, in place; each had a share of the texts."""
    if ranks.count() == 1:
        return
    parameters = list(trained_parameters(network).values())
    # In one message: a small one takes as long as one of 100,000 numbers.
    flat = torch.cat([_gradient(parameter).flatten() for parameter in parameters])
    with ranks.talking():
        distributed.all_reduce(flat)
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Return a gradient; it is 0 where this rank had no text."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
