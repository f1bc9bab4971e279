"""Checkpoints in files: configuration, tokenizer and weights, and the tags that are added to them.

A checkpoint is a Hugging Face folder: config.json, model.safetensors (or shards) and the
tokenizer's files, with Hugging Face's parameter names, so weights load and leave without a map.
"""

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast

from backends.config import ModelConfig
from common.errors import UserError
from data.trajectory import TAGS

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass
class SourceCheckpoint:
    """What a checkpoint from elsewhere holds."""

    source: str  # where it was read, for messages
    config: ModelConfig
    weights: dict[str, Any]  # tensors of the backend, or NumPy arrays, by parameter name
    tokenizer: PreTrainedTokenizerFast


# ---- reading -------------------------------------------------------------------------------------
def read_config(folder: str | Path) -> ModelConfig:
    """Return the configuration of a Hugging Face folder.

    Raises UserError where there is none, or one that this network can't compute.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"model: {folder} has no config.json; "
            "give a Hugging Face folder, a GGUF file or a hub id"
        )
    try:
        return ModelConfig.from_dict(json.loads(path.read_text()), path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model: {path} is not a network's configuration: {error!r}; "
            "give a complete Hugging Face folder"
        ) from None


def read_tokenizer(folder: str | Path, gguf_file: str = "") -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder.

    tokenizer.json is read as it was saved: AutoTokenizer may rebuild it by model type. Other
    forms (sentencepiece's tokenizer.model, a GGUF file of the folder) go through AutoTokenizer.
    Raises UserError for files that are cut short or of another kind.
    """
    tokenizer_class: Any = PreTrainedTokenizerFast
    options = {}
    if gguf_file or not (Path(folder) / "tokenizer.json").is_file():
        # Not imported above, since it takes a second and loads torch.
        from transformers import AutoTokenizer

        tokenizer_class = AutoTokenizer
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        return tokenizer_class.from_pretrained(folder, **options)
    # tokenizers raises nothing narrower.
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"model: the tokenizer of {folder} can't be read: {type(error).__name__}: "
            f"{first_line}; copy its files again"
        ) from None


def read_checkpoint(name: str, backend: ModuleType) -> SourceCheckpoint:
    """Read a Hugging Face folder, a hub id or a GGUF file.

    Raises UserError for what can't be read.
    """
    path = Path(name)
    try:
        if path.suffix == ".gguf":
            source = str(path.parent)
            config, weights = _read_gguf(path)
            tokenizer = read_tokenizer(source, gguf_file=path.name)
        else:
            source = name
            if not path.is_dir():
                source = snapshot_download(name, allow_patterns=HUB_FILES)
            config = read_config(source)
            weights = backend.read_weights(source)
            tokenizer = read_tokenizer(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model: {name} can't be read: {str(error).splitlines()[0]}") from None
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model: the tokenizer of {source} has {len(tokenizer)} entries, "
            f"its weights {config.vocab_size}; they are not a pair"
        )
    return SourceCheckpoint(source, config, weights, tokenizer)


def _read_gguf(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the configuration and weights of a GGUF file, which transformers reads with torch."""
    if not path.is_file():
        raise UserError(f"model: no such file: {path}")
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "model: reading a GGUF file needs torch, once; "
            "pip install torch, or give a Hugging Face folder"
        )
    # Not imported above, since it takes seconds and loads torch.
    from transformers import AutoConfig, AutoModelForCausalLM

    raw_config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config = ModelConfig.from_dict(raw_config.to_dict(), path)
    network = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    )
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return config, weights


# ---- tags ----------------------------------------------------------------------------------------
def add_tags(checkpoint: SourceCheckpoint, backend: ModuleType) -> None:
    """Make each tag that a checkpoint lacks a new token.

    Its embedding starts as the mean of those of the pieces that spelled it. Changes tokenizer,
    configuration and weights. Raises UserError for embeddings that are not as config.json says.
    """
    tokenizer = checkpoint.tokenizer
    config = checkpoint.config
    vocabulary = tokenizer.get_vocab()
    new_tags = [tag for tag in TAGS.values() if tag not in vocabulary]
    # Spell them before they are tokens.
    pieces = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in new_tags}
    tokenizer.add_special_tokens(
        {"additional_special_tokens": new_tags}, replace_extra_special_tokens=False
    )
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id

    declared_shape = (config.vocab_size, config.hidden_size)
    # Some checkpoints have spare rows, which the tags may take.
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in checkpoint.weights:
            continue
        matrix = backend.to_numpy(checkpoint.weights[name])
        if matrix.shape != declared_shape:
            raise UserError(
                f"model: {checkpoint.source}: {name} has shape {matrix.shape}, "
                f"config.json says {declared_shape}"
            )
        tag_rows = {}
        for tag, spelling in pieces.items():
            tag_rows[tokenizer.convert_tokens_to_ids(tag)] = matrix[spelling].mean(0)
        new_rows = np.tile(matrix.mean(0), (config.vocab_size - len(matrix), 1))
        # Free it before the next one is read: with 150,000 tokens it takes a gigabyte.
        del matrix
        checkpoint.weights[name] = backend.extend_rows(checkpoint.weights[name], new_rows, tag_rows)


# ---- writing -------------------------------------------------------------------------------------
def replace_folder(folder: Path, new_folder: Path) -> None:
    """Put a new folder in the place of one that may be there already."""
    old_folder = folder.with_name(folder.name + ".old")
    shutil.rmtree(old_folder, ignore_errors=True)
    if folder.exists():
        # Removing it first would take time, in which there is neither.
        folder.rename(old_folder)
    new_folder.rename(folder)
    shutil.rmtree(old_folder, ignore_errors=True)
