"""How many products a text takes, and how many the machine can do.

What is counted is what a side has to compute: each token once, with what it looks back at. Padding
does not count, so it lowers the GFLOP/s that a side achieves. Nor do what is cheap beside products:
norms, rotations, the softmax, the optimizer.
"""

import math
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from backends.config import ModelConfig
from data.batches import Trie

# A training step reads each token once, and computes two products for each of the first pass to
# get the gradients of inputs and of weights. Frozen weights under an adapter get none.
TRAINING_PASSES = 3
ADAPTER_PASSES = 2
TRIES = 4  # of each size, of which the fastest is the ceiling
# Seconds of a product after which no larger one is tried: with MLX on Linux it would take minutes.
SLOW_PRODUCT = 0.02
CPU_SIZES = (512, 2048)  # rows and columns of the matrices of the ceiling
GPU_SIZES = (4096, 8192)


def forward_flops(config: ModelConfig, tokens: float, keys: float, predicted: float) -> float:
    """Return the floating-point operations of one pass.

    tokens: that are read.
    keys: that they look back at, themselves included, in all.
    predicted: of them, those after which a distribution is computed.
    """
    heads = config.num_attention_heads
    width = config.head_dim
    attention_weights = config.hidden_size * width * 2 * (heads + config.num_key_value_heads)
    mlp_weights = 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers
    # A product with a matrix is a multiplication and an addition for each weight.
    in_matrices = 2 * tokens * layers * (attention_weights + mlp_weights)
    # Scores, then the sum of values.
    in_attention = 4 * keys * layers * heads * width
    in_head = 2 * predicted * config.hidden_size * config.vocab_size
    return in_matrices + in_attention + in_head


def text_flops(config: ModelConfig, lengths: Sequence[int], predicted: float) -> float:
    """Return the operations of reading whole texts, one by one. lengths: tokens of each."""
    tokens = np.array(lengths, float)
    keys = tokens * (tokens + 1) / 2
    return forward_flops(config, tokens.sum(), keys.sum(), predicted)


def trie_flops(config: ModelConfig, tries: Sequence[Trie], predicted: float) -> float:
    """Return the operations of reading texts as tries: what they begin with together once."""
    nodes = sum(len(trie.ids) for trie in tries)
    keys = sum(float((trie.depth + 1).sum()) for trie in tries)
    return forward_flops(config, nodes, keys, predicted)


def measure_ceiling(backend: ModuleType, dtype: str, device: str) -> float:
    """Return the GFLOP/s of a large product of two matrices: the most that a network can reach."""
    product = _mlx_product if backend.NAME == "mlx" else _torch_product
    rates = []
    for size in CPU_SIZES if device == "cpu" else GPU_SIZES:
        multiply = product(size, dtype, device)
        fastest = math.inf
        for _ in range(TRIES):
            start = time.perf_counter()
            multiply()
            fastest = min(fastest, time.perf_counter() - start)
        rates.append(2 * size**3 / fastest / 1e9)
        if fastest > SLOW_PRODUCT:
            break
    return max(rates)


def _torch_product(size: int, dtype: str, device: str) -> Callable[[], Any]:
    # A machine may have one of the two frameworks alone.
    import torch

    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    # Reading a number waits for a GPU.
    return lambda: (matrix @ matrix)[0, 0].item()


def _mlx_product(size: int, dtype: str, device: str) -> Callable[[], Any]:
    from mlx import core as mx

    matrix = mx.ones((size, size), getattr(mx, dtype))
    return lambda: mx.eval(matrix @ matrix)
