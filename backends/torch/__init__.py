"""The network in PyTorch: all that the rest of the project uses of it.

The twins have the same names, so that either can be the backend.
"""

from backends.torch.adapters import (
    add_adapter,
    block_linears,
    embeddings,
    merge_adapter,
    quantize,
    to_arrays,
    trained_parameters,
)
from backends.torch.decoder import Decoder, draw
from backends.torch.network import (
    MLP,
    Attention,
    Block,
    Embedding,
    Linear,
    RMSNorm,
    Transformer,
    Trunk,
    rotate,
)
from backends.torch.optimizer import Optimizer, orthogonalize
from backends.torch.ranks import join_ranks
from backends.torch.training import LossFunction, entropies, logprobs, score, train_step
from backends.torch.weights import (
    build,
    compute_copy,
    copy_network,
    describe_device,
    extend_rows,
    fast_dtype,
    load_weights,
    named_parameters,
    parameter_shapes,
    peak_memory,
    pick_device,
    read_weights,
    save_weights,
    set_weights,
    sizes_by_device,
    to_numpy,
    workspace,
)

NAME = "torch"

__all__ = [
    "MLP",
    "NAME",
    "Attention",
    "Block",
    "Decoder",
    "Embedding",
    "Linear",
    "LossFunction",
    "Optimizer",
    "RMSNorm",
    "Transformer",
    "Trunk",
    "add_adapter",
    "block_linears",
    "build",
    "compute_copy",
    "copy_network",
    "describe_device",
    "draw",
    "embeddings",
    "entropies",
    "extend_rows",
    "fast_dtype",
    "join_ranks",
    "load_weights",
    "logprobs",
    "merge_adapter",
    "named_parameters",
    "orthogonalize",
    "parameter_shapes",
    "peak_memory",
    "pick_device",
    "quantize",
    "read_weights",
    "rotate",
    "save_weights",
    "score",
    "set_weights",
    "sizes_by_device",
    "to_arrays",
    "to_numpy",
    "train_step",
    "trained_parameters",
    "workspace",
]
