"""Weights in and out: build a network, fill it, save it and copy it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from backends.checkpoint import fitting_weights, read_shards
from backends.config import ModelConfig
from backends.mlx.network import Linear, Transformer
from common.errors import UserError

# Matrices of 4 bits are kept as numbers of this type.
PACKED = mx.uint32


def pick_device(name: str) -> str:
    """Return the device that --device names; "auto" is the Apple GPU where there is one.

    Raises UserError for a device that is not there.
    """
    if name not in ("auto", "cpu"):
        raise UserError(
            f"--device: {name!r} is not one of auto, cpu, the choices of MLX; "
            "or take --backend=torch"
        )
    if name == "auto" and mx.is_available(mx.gpu):
        mx.set_default_device(mx.gpu)
    else:
        mx.set_default_device(mx.cpu)
    return name


def describe_device(network: Transformer) -> str:
    """Return on what a network computes, as a run says it before it begins."""
    return "gpu" if mx.default_device() == mx.gpu else "cpu"


def fast_dtype(device: str) -> str:
    """Return the number type that a device multiplies large matrices fastest in.

    device: as pick_device returns it.
    """
    # MLX has no fast product of bfloat16 on a CPU.
    on_gpu = device == "auto" and mx.is_available(mx.gpu)
    return "bfloat16" if on_gpu else "float32"


def sizes_by_device(device: str) -> dict[str, int]:
    """Return settings whose defaults are too small for a nano model on a device, by name.

    device: as pick_device returns it.
    """
    # None: macOS ends a command that keeps Apple's GPU busy for long.
    return {}


def build(
    config: ModelConfig, device: str = "cpu", dtype: str = "float32", frozen: bool = False
) -> Transformer:
    """Return the network of a config, without its weights.

    frozen: whether its weights will be; they are in dtype then, and never held in more.
    """
    # MLX has no device of a network's own: see pick_device.
    network = Transformer(config, dtype)
    network.eval()
    if frozen:
        network.apply(lambda weight: weight.astype(network.dtype))
    return network


def workspace(network: Transformer) -> int:
    """Return the bytes that the library of matrix products takes for itself.

    cuBLAS takes 32 MiB on compute capability 9, else 8.1 MiB, by its documentation.
    """
    return 0


def peak_memory() -> int | None:
    """Return the most bytes that were in use at once; None where nobody counts them."""
    return mx.get_peak_memory()


def named_parameters(network: Transformer) -> dict[str, mx.array]:
    """Return all parameters by name."""
    return flat(network.parameters())


def flat(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a tree by their dotted names."""
    return dict(tree_flatten(tree))


def parameter_shapes(network: Transformer) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name."""
    return {name: tuple(weight.shape) for name, weight in named_parameters(network).items()}


def load_weights(network: Transformer, folder: str | Path) -> Transformer:
    """Fill a network with the weights of a Hugging Face folder, and return it.

    Raises UserError by parameter name.
    """
    set_weights(network, read_weights(folder), folder)
    return network


def read_weights(folder: str | Path) -> dict[str, mx.array]:
    """Return the weights of a Hugging Face folder, in its own precision.

    Raises UserError for a file that is missing or cut short.
    """
    return read_shards(folder, _load_file)


def _load_file(file: str) -> dict[str, mx.array]:
    weights = mx.load(file)
    assert isinstance(weights, dict)
    return weights


def to_numpy(values: Any) -> np.ndarray:
    """Return a tensor, or an array, as a float32 array."""
    return np.array(_to_array(values).astype(mx.float32))


def _to_array(values: Any) -> mx.array:
    """Return an array of MLX: one that is as it is, since `mx.array` would copy it.

    A checkpoint would be in memory twice.
    """
    if isinstance(values, mx.array):
        return values
    return mx.array(values)


def extend_rows(matrix: Any, new_rows: np.ndarray, replaced: Mapping[int, np.ndarray]) -> mx.array:
    """Return a matrix with rows below it, in its own precision.

    replaced: rows that take the place of others, by their index.
    """
    matrix = _to_array(matrix)
    extended = mx.concatenate([matrix, mx.array(new_rows).astype(matrix.dtype)])
    for index, row in replaced.items():
        extended[index] = mx.array(row)
    return extended


def set_weights(network: Transformer, weights: Mapping[str, Any], source: object) -> None:
    """Fill a network with tensors or NumPy arrays, by name.

    source: where they come from, for messages.
    Raises UserError with the parameter that is missing, not known, packed or of another shape.
    """
    is_tied = network.config.tie_word_embeddings
    fitting = fitting_weights(weights, parameter_shapes(network), is_tied, source)
    parameters = named_parameters(network)
    cast = []
    for name, weight in fitting.items():
        cast.append((name, _to_array(weight).astype(parameters[name].dtype)))
    network.update(tree_unflatten(cast))
    mx.eval(network.parameters())


def save_weights(network: Transformer, folder: str | Path) -> None:
    """Write model.safetensors into a folder."""
    path = Path(folder) / "model.safetensors"
    mx.save_safetensors(str(path), named_parameters(network), metadata={"format": "pt"})


def copy_network(network: Transformer) -> Transformer:
    """Return a network of its own; frozen weights are shared."""
    # Arrays don't change in MLX, so two networks may share them until one is trained.
    copied = Transformer(network.config)
    for module, new in zip(network.modules(), copied.modules(), strict=True):
        # A module is a dict of its arrays and modules, and has all else as attributes.
        arrays = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        dict.update(new, arrays)
        for name, value in vars(module).items():
            vars(new)[name] = set(value) if isinstance(value, set) else value
    return copied


def compute_copy(network: Transformer) -> Transformer:
    """Return a copy to decode with: weights in its compute type, projections of one input fused.

    A token of a few rows is little work, so that fewer calls are faster. Weights that are in that
    type already are shared.
    """
    dtype = network.dtype
    copied = copy_network(network)
    copied.apply(lambda weight: weight if weight.dtype == PACKED else weight.astype(dtype))
    # An adapter and 4 bits belong to one matrix each.
    if not network.lora and network.bits == 16:
        for block in copied.model.layers:
            attention = block.self_attn
            attention._fused = _fuse(attention.q_proj, attention.k_proj, attention.v_proj)
            block.mlp._fused, _ = _fuse(block.mlp.gate_proj, block.mlp.up_proj)
    return copied


def _fuse(*linears: Linear) -> tuple[mx.array, mx.array | None]:
    """Return weight and bias of the linear map whose output is that of several, side by side."""
    weight = mx.concatenate([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if "bias" in linear]
    return weight, mx.concatenate(biases) if biases else None
