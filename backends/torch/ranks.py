"""Several processes by torch.distributed, which torchrun has started (common/ranks.py)."""

import atexit
from typing import Any

import torch
from torch import distributed

from backends.torch.adapters import trained_parameters
from backends.torch.network import Transformer
from common import ranks


def join_ranks() -> None:
    """Meet the processes that the backend's launcher has started, once; alone, it does nothing."""
    if ranks.launcher() != "torchrun" or distributed.is_initialized():
        return
    # Values go from CPU to CPU, gradients of a GPU from GPU to GPU.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    ranks.join(distributed.get_rank(), distributed.get_world_size(), _gather)
    # Messages travel by threads, and one that lets go of a value while Python ends aborts the
    # process: half of the shortest scripts ended so.
    atexit.register(distributed.destroy_process_group)


def _gather(value: Any) -> list[Any]:
    values = [None] * ranks.count()
    distributed.all_gather_object(values, value)
    return values


def sum_gradients(network: Transformer, gradients: dict[str, Any]) -> dict[str, Any]:
    """Return the sums of the gradients of all ranks, by name; each had a share of the texts."""
    if ranks.count() == 1:
        return gradients
    parameters = trained_parameters(network)
    flat = []
    for name, weight in parameters.items():
        gradient = gradients[name]
        # A rank may have had no text.
        flat.append(weight.new_zeros(weight.numel()) if gradient is None else gradient.flatten())
    # In one message: a small one takes as long as one of 100,000 numbers.
    total = torch.cat(flat)
    with ranks.talking():
        distributed.all_reduce(total)
    sums = {}
    start = 0
    for name, weight in parameters.items():
        end = start + weight.numel()
        sums[name] = total[start:end].view_as(weight)
        start = end
    return sums
