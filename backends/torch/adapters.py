"""What is trained: all weights, or a low-rank adapter on frozen weights of 16 or 4 bits."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from backends.config import LoRAConfig
from backends.torch.network import Embedding, Linear, Transformer
from backends.torch.weights import named_parameters, to_numpy
from common.errors import UserError


def trained_parameters(network: Transformer) -> dict[str, Tensor]:
    """Return the parameters that training changes, by name."""
    parameters = named_parameters(network).items()
    return {name: weight for name, weight in parameters if weight.requires_grad}


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

    They are in NF4, in blocks of 64, by bitsandbytes (QLoRA, Dettmers et al. 2023).
    Raises UserError where that is not installed.
    """
    # It takes seconds to load, and only --bits=4 needs it.
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        raise UserError(
            "--bits=4: with torch it needs bitsandbytes; pip install bitsandbytes"
        ) from None
    network.bits = bits
    for linear in block_linears(network).values():
        weight = linear.weight.data.to(network.dtype)
        linear.packed, linear.quant_state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        # pyrefly: ignore[bad-assignment]
        linear.weight = None


def add_adapter(network: Transformer, lora: LoRAConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Freeze the network and give it an adapter.

    weights: arrays by name: lora_A (rank, columns) and lora_B (rows, rank) of the linear maps that
        have an adapter, and the rows (tokens, hidden) of the embeddings.
    """
    network.lora = lora
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(network.dtype)
    for name, linear in block_linears(network).items():
        if name.split(".")[-1] in lora.targets:
            linear.scale = lora.alpha / lora.rank
            linear.dropout = lora.dropout
            linear.lora_A = _new_parameter(network, weights[f"{name}.lora_A"])
            linear.lora_B = _new_parameter(network, weights[f"{name}.lora_B"])
    for name, embedding in embeddings(network).items():
        embedding.train_rows(lora.tokens, weights[f"{name}.rows"])


def _new_parameter(network: Transformer, values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float32, device=network.device))


def merge_adapter(network: Transformer) -> None:
    """Add the adapter to the weights, which are float32 and trained again."""
    for linear in block_linears(network).values():
        weight = _unpacked_weight(linear).float()
        if linear.lora_A is not None and linear.lora_B is not None:
            weight = weight + linear.scale * linear.lora_B.data @ linear.lora_A.data
            linear.lora_A = None
            linear.lora_B = None
        linear.weight = nn.Parameter(weight)
    for embedding in embeddings(network).values():
        if embedding.rows is not None:
            weight = embedding.weight.data.float()
            embedding.weight.data = weight.index_copy(0, embedding.tokens, embedding.rows.data)
            embedding.rows = None
    for parameter in network.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    network.lora = None
    network.bits = 16


def _unpacked_weight(linear: Linear) -> Tensor:
    """Return a matrix, and leave no 4 bits of it."""
    if linear.packed is None:
        return linear.weight.data
    # It takes seconds to load, and only --bits=4 needs it.
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(linear.packed, linear.quant_state)
    linear.packed = None
    linear.quant_state = None
    return weight.data
