"""Adapters as files: in PEFT's form, which is read and written, and in mlx_lm's, which is written.

The parameters of an adapter, by the names that the networks give them:

    model.layers.0.self_attn.q_proj.lora_A    (rank, columns)
    model.layers.0.self_attn.q_proj.lora_B    (rows, rank)
    model.embed_tokens.rows                   (tokens, hidden): embeddings of the trained tokens
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from backends.config import LoRAConfig, ModelConfig
from common.errors import UserError
from common.files import hash_file_ends, parse_json, weight_files

CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, int]]


class Adapter(NamedTuple):
    """A low-rank adapter, and its parameters by name."""

    lora: LoRAConfig
    parameters: Arrays


def adapter_shapes(
    config: ModelConfig, lora: LoRAConfig, linears: Iterable[str], embeddings: Iterable[str]
) -> Shapes:
    """Return the shape of each parameter that an adapter of a network has.

    linears, embeddings: names of the network's block matrices and of its embeddings.
    """
    shapes: Shapes = {}
    for name in sorted(linears):
        target = name.split(".")[-1]
        if target in lora.targets:
            rows, columns = config.shape_of(target)
            shapes[f"{name}.lora_A"] = (lora.rank, columns)
            shapes[f"{name}.lora_B"] = (rows, lora.rank)
    for name in embeddings:
        shapes[f"{name}.rows"] = (len(lora.tokens), config.hidden_size)
    return shapes


# ---- PEFT ----------------------------------------------------------------------------------------
def write_peft_adapter(
    folder: Path,
    adapter: Adapter,
    base_folder: Path | None,
    embeddings: Iterable[str],
    trained_on: str,
) -> None:
    """Write an adapter as PEFT does.

    base_folder: where the weights lie that the adapter belongs to; their fingerprint goes with it.
    embeddings: names of the embeddings whose rows are trained.
    trained_on: in which precision the base was kept, which the adapter has learned to go with.
    """
    lora = adapter.lora
    token_indices = {name.split(".")[-1]: lora.tokens for name in embeddings}
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.targets,
        "bias": "none",
        "inference_mode": True,
        "trainable_token_indices": token_indices,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2))
    save_file(
        {_peft_name(name): parameter for name, parameter in adapter.parameters.items()},
        folder / PEFT_WEIGHTS,
        metadata={"format": "pt", "base": _fingerprint(base_folder), "trained_on": trained_on},
    )


def read_peft_adapter(
    folder: Path, base_folder: Path | None, shapes_for: Callable[[LoRAConfig], Shapes]
) -> Adapter:
    """Return the adapter of a PEFT folder.

    shapes_for: gives the shapes that an adapter of this kind has in the network (adapter_shapes).
    Raises UserError where it is no adapter of this network, or one of other weights.
    """
    path = folder / PEFT_WEIGHTS
    try:
        raw = parse_json((folder / CONFIG_FILE).read_text())
        _refuse_other_kinds(raw, folder)
        lora = LoRAConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw["lora_dropout"],
            targets=raw["target_modules"],
            tokens=raw["trainable_token_indices"]["embed_tokens"],
        )
        shapes = shapes_for(lora)
        own_names = {_peft_name(name): name for name in shapes}
        parameters = {own_names.get(name, name): x for name, x in load_file(path).items()}
        fingerprint = _read_metadata(folder).get("base")
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"model: {folder} is not a LoRA adapter: {error!r}") from None

    misfits = [
        name
        for name in sorted(shapes.keys() | parameters.keys())
        if name not in shapes or name not in parameters or parameters[name].shape != shapes[name]
    ]
    if misfits:
        raise _wrong_base(folder, base_folder, f"{misfits[0]} does not fit")
    if fingerprint not in (None, _fingerprint(base_folder)):
        raise _wrong_base(folder, base_folder, "its weights are others")
    return Adapter(lora, parameters)


def find_base_folder(folder: Path) -> Path:
    """Return where the whole weights of a folder lie: itself, or the base of its adapter.

    Raises UserError for a base that is missing.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return folder
    try:
        base_folder = Path(parse_json(path.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"model: {path} can't be read: {error!r}; train this stage again") from None
    if not base_folder.is_dir():
        # The run was moved, and its base lies beside the adapter as before.
        base_folder = folder.parent / base_folder.name
    if not (base_folder / "config.json").is_file():
        raise UserError(
            f"model: {folder} is an adapter for {base_folder}, which is missing; "
            "put it back or train again"
        )
    return base_folder


def read_trained_on(folder: Path) -> str | None:
    """Return in which precision an adapter's base was kept while it was trained, if known."""
    return _read_metadata(folder).get("trained_on")


def _refuse_other_kinds(raw: dict[str, Any], folder: Path) -> None:
    """Raise UserError for what PEFT can do and this project can't."""
    options = ["use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"]
    kinds = [option for option in options if raw.get(option)]
    if raw.get("bias", "none") != "none":
        kinds.append("bias")
    if kinds:
        raise UserError(
            f"model: {folder} is an adapter with {kinds[0]}, which is not read; "
            "merge it into its base with peft, and start from that"
        )


def _wrong_base(folder: Path, base_folder: Path | None, reason: str) -> UserError:
    return UserError(
        f"model: {folder} is an adapter for another base than {base_folder}: {reason}; "
        "train it again, or put its base back"
    )


def _peft_name(name: str) -> str:
    """Return what PEFT calls one of our adapter parameters."""
    if name.endswith(".rows"):
        module = name.removesuffix("rows")
        return f"base_model.model.{module}token_adapter.trainable_tokens_delta"
    return f"base_model.model.{name}.weight"


def _read_metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / PEFT_WEIGHTS, "np") as file:
        return file.metadata() or {}


def _fingerprint(base_folder: Path | None) -> str:
    """Return a hash of the weights in a folder, by which an adapter knows its base."""
    assert base_folder is not None, "save the base before its adapter"
    return hash_file_ends(weight_files(base_folder))


# ---- mlx_lm --------------------------------------------------------------------------------------
def write_mlx_adapter(
    folder: Path, adapter: Adapter, config: ModelConfig, frozen_rows: Arrays
) -> None:
    """Write an adapter as mlx_lm reads it.

    mlx_lm knows no trained tokens. Their change is written as a low-rank change of the
    embeddings, one_hot @ change, whose rank is the number of tokens. mlx_lm has one rank for all
    matrices, so the smaller ones are filled up with zeros.

    frozen_rows: the embeddings of the trained tokens without the adapter, by embedding.
    """
    lora = adapter.lora
    rank = max(lora.rank, len(lora.tokens))
    padding = rank - lora.rank
    scale = lora.alpha / lora.rank
    parameters: Arrays = {}
    for name, parameter in adapter.parameters.items():
        module, _, kind = name.rpartition(".")
        if kind == "lora_A":
            transposed = np.ascontiguousarray(parameter.T)
            parameters[f"{module}.lora_a"] = np.pad(transposed, ((0, 0), (0, padding)))
        elif kind == "lora_B":
            transposed = np.ascontiguousarray(parameter.T)
            parameters[f"{module}.lora_b"] = np.pad(transposed, ((0, padding), (0, 0)))
        else:
            change = (parameter - frozen_rows[module]) / scale
            parameters |= _embedding_change(module, change, lora.tokens, rank, config)

    content = {
        "fine_tune_type": "lora",
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": lora.dropout,
            "keys": sorted({_mlx_key(name) for name in parameters}),
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2))
    save_file(parameters, folder / "adapters.safetensors")


def _embedding_change(
    module: str, change: np.ndarray, tokens: list[int], rank: int, config: ModelConfig
) -> Arrays:
    """Return a change of some tokens' rows as a product of two matrices.

    change: (tokens, hidden).
    """
    one_hot = np.zeros((config.vocab_size, rank), np.float32)
    one_hot[tokens, range(len(tokens))] = 1
    padded_change = np.zeros((rank, config.hidden_size), np.float32)
    padded_change[: len(tokens)] = change
    if module == "lm_head":
        # The head is a linear layer: hidden states come in, logits go out.
        return {
            f"{module}.lora_a": np.ascontiguousarray(padded_change.T),
            f"{module}.lora_b": np.ascontiguousarray(one_hot.T),
        }
    return {f"{module}.lora_a": one_hot, f"{module}.lora_b": padded_change}


def _mlx_key(name: str) -> str:
    """Return how mlx_lm's configuration names the module of a parameter.

    >>> _mlx_key("model.layers.0.self_attn.q_proj.lora_a")
    'self_attn.q_proj'
    """
    module = name.rpartition(".")[0]
    if ".layers." in module:
        return ".".join(module.split(".")[3:])
    return module
