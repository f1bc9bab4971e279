"""Weights in and out: build a network, fill it, save it and copy it."""

import functools
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backends.checkpoint import fitting_weights, read_shards
from backends.config import ModelConfig
from backends.torch.network import MLP, Attention, Linear, Transformer
from common import ranks
from common.errors import UserError

# Settings of a nano model on a GPU, which is not busy with a CPU's 1,600 tokens and 256 rows. They
# are estimates; no GPU has run them yet.
SIZES_OF_A_GPU = {"micro_tokens": 16_384, "batch_rows": 1024}


def pick_device(name: str) -> str:
    """Return the device that --device names; "auto" is CUDA where there is one, else the CPU.

    Of several processes on one machine each takes a GPU of its own.
    Raises UserError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device: {name!r} is not one of auto, cpu, cuda, mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device=cuda: {_why_no_cuda()}; use --device=cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: there is none here; use --device=cpu")
    if name == "cuda":
        _set_up_cuda()
    if name == "cuda" and ranks.count() > 1:
        _take_own_gpu(int(os.environ["LOCAL_RANK"]))
    return name


@functools.cache
def _set_up_cuda() -> None:
    """Choose how CUDA computes what it can in several ways; once, so that a check may change it."""
    # float32 is multiplied in TF32, with three digits.
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention plans anew for each length, and a decoder has another at every token.
    torch.backends.cuda.enable_cudnn_sdp(False)


def _take_own_gpu(number: int) -> None:
    """Let "cuda" mean this GPU in this process. Raises UserError where there are fewer."""
    gpus = torch.cuda.device_count()
    if number >= gpus:
        raise UserError(
            f"torchrun: there are more processes than GPUs here; take --nproc-per-node={gpus}"
        )
    torch.cuda.set_device(number)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"torch was built for CUDA {torch.version.cuda} and finds no device"


def describe_device(network: Transformer) -> str:
    """Return on what a network computes, as a run says it before it begins."""
    if network.device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(network.device)})"
    if network.device.type == "cpu" and torch.version.cuda and not torch.cuda.is_available():
        return f"cpu ({_why_no_cuda()})"
    return network.device.type


def fast_dtype(device: str) -> str:
    """Return the number type that a device multiplies large matrices fastest in.

    device: as pick_device returns it.
    """
    if device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "mps":
        has_bfloat16 = True
    else:
        # Other CPUs take its numbers apart, which is slower than float32.
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bfloat16" if has_bfloat16 else "float32"


def sizes_by_device(device: str) -> dict[str, int]:
    """Return settings whose defaults are too small for a nano model on a device, by name.

    device: as pick_device returns it.
    """
    return SIZES_OF_A_GPU if device == "cuda" else {}


def build(
    config: ModelConfig, device: str = "cpu", dtype: str = "float32", frozen: bool = False
) -> Transformer:
    """Return the network of a config, without its weights.

    frozen: whether its weights will be; they are in dtype then, and never held in more.
    """
    with torch.device("meta"):
        network = Transformer(config, dtype)
    if frozen:
        network = network.to(network.dtype)
    network = network.to_empty(device=device)
    frequencies = config.inverse_frequencies()
    network.inverse_frequencies = torch.as_tensor(frequencies, device=device)
    return network.eval()


def workspace(network: Transformer) -> int:
    """Return the bytes that the library of matrix products takes for itself.

    cuBLAS takes 32 MiB on compute capability 9, else 8.1 MiB, by its documentation.
    """
    if network.device.type != "cuda":
        return 0
    if torch.cuda.get_device_capability()[0] == 9:
        return 32 << 20
    return 8_519_680


def peak_memory() -> int | None:
    """Return the most bytes that were in use at once; None where nobody counts them."""
    # Without a network on a GPU it is 0.
    peak = torch.cuda.max_memory_allocated()
    return peak if peak > 0 else None


def named_parameters(network: Transformer) -> dict[str, Tensor]:
    """Return all parameters by name."""
    return dict(network.named_parameters())


def parameter_shapes(network: Transformer) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name."""
    return {name: tuple(weight.shape) for name, weight in named_parameters(network).items()}


def load_weights(network: Transformer, folder: str | Path) -> Transformer:
    """Fill a network with the weights of a Hugging Face folder, and return it.

    Raises UserError by parameter name.
    """
    set_weights(network, read_weights(folder), folder)
    return network


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face folder, in its own precision.

    Raises UserError for a file that is missing or cut short.
    """
    return read_shards(folder, load_file)


def to_numpy(values: Any) -> np.ndarray:
    """Return a tensor, or an array, as a float32 array."""
    return torch.as_tensor(values).detach().float().cpu().numpy()


def extend_rows(matrix: Any, new_rows: np.ndarray, replaced: Mapping[int, np.ndarray]) -> Tensor:
    """Return a matrix with rows below it, in its own precision.

    replaced: rows that take the place of others, by their index.
    """
    matrix = torch.as_tensor(matrix)
    extended = torch.cat([matrix, torch.as_tensor(new_rows).to(matrix)])
    for index, row in replaced.items():
        extended[index] = torch.as_tensor(row)
    return extended


def set_weights(network: Transformer, weights: Mapping[str, Any], source: object) -> None:
    """Fill a network with tensors or NumPy arrays, by name.

    source: where they come from, for messages.
    Raises UserError with the parameter that is missing, not known, packed or of another shape.
    """
    is_tied = network.config.tie_word_embeddings
    fitting = fitting_weights(weights, parameter_shapes(network), is_tied, source)
    for name, parameter in named_parameters(network).items():
        parameter.data.copy_(torch.as_tensor(fitting[name]))


def save_weights(network: Transformer, folder: str | Path) -> None:
    """Write model.safetensors into a folder."""
    weights = {}
    for name, weight in network.state_dict().items():
        weights[name] = weight.detach().cpu().contiguous()
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def copy_network(network: Transformer) -> Transformer:
    """Return a network of its own; frozen weights are shared."""
    shared = _packed_weights(network)
    shared += [weight for weight in network.parameters() if not weight.requires_grad]
    return deepcopy(network, {id(value): value for value in shared})


def compute_copy(network: Transformer) -> Transformer:
    """Return a copy to decode with: weights in its compute type, projections of one input fused.

    A token of a few rows is little work, so that fewer calls are faster. Weights that are in that
    type already are shared.
    """
    dtype = network.dtype
    copies: dict[int, Any] = {id(value): value for value in _packed_weights(network)}
    # One by one, so that they are never all in four bytes again.
    for weight in network.parameters():
        if weight.dtype == dtype:
            copies[id(weight)] = weight
        else:
            copies[id(weight)] = nn.Parameter(weight.data.to(dtype), requires_grad=False)
    copy = deepcopy(network, copies)
    # An adapter and 4 bits belong to one matrix each.
    if not network.lora and network.bits == 16:
        for module in copy.modules():
            if isinstance(module, Attention):
                module.fused = _fuse(module.q_proj, module.k_proj, module.v_proj)
            elif isinstance(module, MLP):
                module.fused, _ = _fuse(module.gate_proj, module.up_proj)
    return copy


@torch.no_grad()
def _fuse(*linears: Linear) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the linear map whose output is that of several, side by side."""
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    # Its columns lie together in memory: a CPU multiplies a few rows with it in half the time.
    weight = torch.cat(weights).t().contiguous().t()
    return weight, torch.cat(biases) if biases else None


def _packed_weights(network: Transformer) -> list[Any]:
    """Return what holds matrices of 4 bits, which are no parameters."""
    packed = []
    for module in network.modules():
        if isinstance(module, Linear) and module.packed is not None:
            packed += [module.packed, module.quant_state]
    return packed
