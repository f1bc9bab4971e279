"""What is trained: all weights, or a low-rank adapter on frozen weights of 16 or 4 bits."""

from collections.abc import Iterable, Mapping

import mlx.core as mx
import numpy as np
from mlx import nn

from backends.config import LoRAConfig
from backends.mlx.network import Embedding, Linear, Transformer
from backends.mlx.weights import PACKED, flat, named_parameters, to_numpy
from common.errors import UserError


def trained_parameters(network: Transformer) -> dict[str, mx.array]:
    """Return the parameters that training changes, by name."""
    return flat(network.trainable_parameters())


def block_linears(network: Transformer) -> dict[str, Linear]:
    """Return the linear maps of the blocks, by name."""
    linears = {}
    for name, module in network.named_modules():
        if isinstance(module, Linear) and ".layers." in name:
            linears[name] = module
    return linears


def embeddings(network: Transformer) -> dict[str, Embedding]:
    """Return the embedding of the tokens, and the head where it is another, by name."""
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, Embedding)}


def to_arrays(network: Transformer, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return some parameters as float32 arrays, by name."""
    parameters = named_parameters(network)
    return {name: to_numpy(parameters[name]) for name in names}


def quantize(network: Transformer, bits: int = 4) -> None:
    """Keep 4 bits of each weight in the blocks' matrices.

    They are affine, in groups of 64.
    Raises UserError where rows can't be cut into such groups.
    """
    network.bits = bits
    for name, linear in block_linears(network).items():
        columns = linear.weight.shape[1]
        if columns % 64:
            raise UserError(
                f"--bits=4: rows of {name} have {columns} weights, MLX wants a multiple of 64; "
                "take --bits=16"
            )
        linear.weight = linear.weight.astype(network.dtype)
    nn.quantize(network, 64, bits, class_predicate=_is_block_linear)
    mx.eval(network.parameters())


def _is_block_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, Linear) and ".layers." in name


def add_adapter(network: Transformer, lora: LoRAConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Freeze the network and give it an adapter.

    weights: arrays by name: lora_A (rank, columns) and lora_B (rows, rank) of the linear maps that
        have an adapter, and the rows (tokens, hidden) of the embeddings.
    """
    network.lora = lora
    dtype = network.dtype
    network.apply(lambda weight: weight if weight.dtype == PACKED else weight.astype(dtype))
    network.freeze()
    for name, linear in block_linears(network).items():
        if name.split(".")[-1] in lora.targets:
            linear.scale = lora.alpha / lora.rank
            linear.dropout = lora.dropout
            linear["lora_A"] = mx.array(weights[f"{name}.lora_A"], mx.float32)
            linear["lora_B"] = mx.array(weights[f"{name}.lora_B"], mx.float32)
            linear.unfreeze(keys=["lora_A", "lora_B"], recurse=False)
    for name, embedding in embeddings(network).items():
        embedding.train_rows(lora.tokens, weights[f"{name}.rows"])
    mx.eval(network.parameters())


def merge_adapter(network: Transformer) -> None:
    """Add the adapter to the weights, which are float32 and trained again."""
    for linear in block_linears(network).values():
        if "scales" in linear:
            scales = linear.pop("scales")
            biases = linear.pop("biases")
            linear.weight = mx.dequantize(linear.weight, scales, biases, 64, 4)
        if "lora_A" in linear:
            lora_b = linear.pop("lora_B")
            lora_a = linear.pop("lora_A")
            weight = linear.weight.astype(mx.float32)
            linear.weight = weight + linear.scale * lora_b @ lora_a
    for embedding in embeddings(network).values():
        if "rows" in embedding:
            embedding.weight = embedding.weight.astype(mx.float32)
            embedding.weight[embedding._tokens] = embedding.pop("rows")
    network.apply(lambda weight: weight.astype(mx.float32))
    network.unfreeze()
    network.lora = None
    network.bits = 16
    mx.eval(network.parameters())
