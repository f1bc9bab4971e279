"""Several processes by mx.distributed, which mlx.launch has started (common/ranks.py)."""

import pickle
from typing import Any

import mlx.core as mx
import numpy as np

from backends.mlx.adapters import trained_parameters
from backends.mlx.network import Transformer
from common import ranks


def join_ranks() -> None:
    """Meet the processes that the backend's launcher has started, once; alone, it does nothing."""
    if ranks.launcher() != "mlx.launch" or ranks.count() > 1:
        return
    group = mx.distributed.init(strict=True)
    ranks.join(group.rank(), group.size(), _gather)


def _gather(value: Any) -> list[Any]:
    message = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.array(mx.distributed.all_gather(mx.array([message.size])))
    # All messages of one gathering have one length.
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: message.size] = message
    rows = np.array(mx.distributed.all_gather(mx.array(padded)[None]))
    return [
        pickle.loads(row[:size].tobytes())  # from the ranks of this run alone
        for row, size in zip(rows, sizes, strict=True)
    ]


def sum_gradients(network: Transformer, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the sums of the gradients of all ranks, by name; each had a share of the texts."""
    if ranks.count() == 1:
        return gradients
    parameters = trained_parameters(network)
    if not gradients:
        # A rank may have had no text.
        gradients = {name: mx.zeros_like(weight) for name, weight in parameters.items()}
    # In one message: a small one takes as long as one of 100,000 numbers.
    total = mx.concatenate([gradients[name].flatten() for name in parameters])
    with ranks.talking():
        total = mx.distributed.all_sum(total)
        mx.eval(total)
    sums = {}
    start = 0
    for name, weight in parameters.items():
        end = start + weight.size
        sums[name] = total[start:end].reshape(weight.shape)
        start = end
    return sums
