"""Checkpoints in files: configuration, tokenizer and weights, and the tags that are added to them.

A checkpoint is a Hugging Face folder: config.json, model.safetensors (or shards) and the
tokenizer's files, with Hugging Face's parameter names, so weights load and leave without a map.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.adapter_files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from backends.config import ModelConfig, read_token_ids
from common.errors import UserError
from common.files import parse_json
from data.trajectory import TAGS, Codec

if TYPE_CHECKING:
    # It takes seconds to import, which --help need not wait for.
    from transformers import PreTrainedTokenizerFast

# What is left out of a download: weights in forms that are not read. All else comes along, since
# tokenizers and templates take on new files from year to year.
UNREAD_WEIGHTS = [
    "*.bin",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.mlmodel",
    "*.msgpack",
    "*.npz",
    "*.onnx",
    "*.onnx_data*",
    "*.ot",
    "*.pt",
    "*.pth",
    "*.tflite",
    "consolidated*.safetensors",
    "original/*",
]

# Texts that a tokenizer must give back as they were: accents, numbers, line breaks, spaces, and the
# tags as plain text.
ROUND_TRIPS = (
    " Zo\u00eb Eva",
    " 1,234.50 km\u00b2",
    " one\n two  three",
    f" {{ {' '.join(TAGS.values())} }}",
)


@dataclass
class SourceCheckpoint:
    """What a checkpoint from elsewhere holds."""

    source: str  # where it was read, for messages
    config: ModelConfig
    weights: dict[str, Any]  # tensors of the backend, or NumPy arrays, by parameter name
    tokenizer: "PreTrainedTokenizerFast"


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
        return ModelConfig.from_dict(parse_json(path.read_text()), path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model: {path} is not a network's configuration: {error!r}; "
            "give a complete Hugging Face folder"
        ) from None


def read_tokenizer(folder: str | Path, gguf_file: str = "") -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a folder.

    tokenizer.json is read as it was saved: AutoTokenizer may rebuild it by model type. Other
    forms (sentencepiece's tokenizer.model, a GGUF file of the folder) go through AutoTokenizer,
    and become what a tokenizer.json holds.
    Raises UserError for files that are cut short or of another kind.
    """
    # It takes seconds to import, which --help need not wait for.
    from transformers import PreTrainedTokenizerFast

    try:
        if not gguf_file and (Path(folder) / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # This one takes another second and loads torch.
        from transformers import AutoTokenizer

        options = {"gguf_file": gguf_file} if gguf_file else {}
        converted: Any = AutoTokenizer.from_pretrained(folder, **options)
        return PreTrainedTokenizerFast(
            tokenizer_object=converted.backend_tokenizer,
            chat_template=converted.chat_template,
            **converted.special_tokens_map,
        )
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
            source = name if path.is_dir() else _download(name)
            refuse_adapter(source)
            config = read_config(source)
            tokenizer = read_tokenizer(source)
            weights = backend.read_weights(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model: {name} can't be read: {str(error).splitlines()[0]}") from None
    _settle_end_of_text(config, tokenizer, source)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model: the tokenizer of {source} has {len(tokenizer)} entries, "
            f"its weights {config.vocab_size}; they are not a pair"
        )
    return SourceCheckpoint(source, config, weights, tokenizer)


def _download(hub_id: str) -> str:
    """Return the folder of a model from the hub.

    Raises UserError for what is no folder and no model of the hub either.
    """
    # It takes seconds to import, which --help need not wait for.
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(hub_id, ignore_patterns=UNREAD_WEIGHTS)
    # The client's errors, those of the connection among them, have no common kind.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model: there is no folder {hub_id}, and the hub does not give it ({reason}); "
            f"{_path_hint(hub_id)}"
        ) from None


def _path_hint(name: str) -> str:
    if name.startswith("~"):
        return "the shell leaves ~ as it is there, so write $HOME"
    return "give the path of a Hugging Face folder or of a GGUF file, or a hub id"


def refuse_adapter(folder: str | Path) -> None:
    """Raise UserError for the folder of an adapter, which is no model by itself."""
    path = Path(folder) / ADAPTER_CONFIG_FILE
    if not path.is_file():
        return
    try:
        base = parse_json(path.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = "its base"
    raise UserError(
        f"model: {folder} holds an adapter for {base}, not a model; merge them with peft "
        "(merge_and_unload, then save_pretrained), and give the folder of that"
    )


def _settle_end_of_text(
    config: ModelConfig, tokenizer: "PreTrainedTokenizerFast", source: str
) -> None:
    """Name in the configuration every token that ends a text, the tokenizer's own first.

    As in transformers, generation_config.json comes before config.json. A tokenizer that names
    none takes that of config.json.
    Raises UserError where nothing names one.
    """
    ids = _generation_eos_ids(Path(source) / "generation_config.json") or config.eos_token_ids
    if tokenizer.eos_token_id is None:
        named = [token_id for token_id in config.eos_token_ids or ids if token_id < len(tokenizer)]
        if not named:
            raise UserError(
                f"model: {source} names no token that ends a text; set eos_token in its "
                "tokenizer_config.json, or eos_token_id in its config.json"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(named[0])
    bos_id = config.bos_token_id
    # A tokenizer may begin texts with a token that it does not name.
    if tokenizer.bos_token_id is None and bos_id is not None and bos_id in tokenizer.encode(""):
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(bos_id)
    config.bos_token_id = tokenizer.bos_token_id
    own_id = tokenizer.eos_token_id
    assert isinstance(own_id, int), "it has been named above, if it was not before"
    config.eos_token_ids = list(dict.fromkeys([own_id, *ids]))


def _generation_eos_ids(path: Path) -> list[int]:
    """Return the ids that end a text by a generation_config.json; none where there is no file."""
    if not path.is_file():
        return []
    try:
        return read_token_ids(parse_json(path.read_text()).get("eos_token_id"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"model: {path} can't be read: {error}; copy it again") from None


def _read_gguf(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the configuration and weights of a GGUF file, which transformers reads with torch."""
    if not path.is_file():
        raise UserError(f"model: no such file: {path}; {_path_hint(str(path))}")
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
    refuse_lossy_tokenizer(Codec(tokenizer), checkpoint.source)

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


def refuse_lossy_tokenizer(codec: Codec, source: str) -> None:
    """Raise UserError for a tokenizer that changes a text, or a template that can't be filled in.

    Golden answers could not be written with the one, and no prompt be made with the other.
    """
    for text in ROUND_TRIPS:
        decoded = codec.decode(codec.encode_exactly(text))
        if decoded != text:
            raise UserError(
                f"model: the tokenizer of {source} gives {text!r} back as {decoded!r}; take a "
                "checkpoint whose tokenizer keeps case, accents, spaces and line breaks"
            )
    codec.prompt("")
