"""Which network: its sizes under Hugging Face's names, and what of a config.json it can compute."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from common.errors import UserError
from common.settings import MatrixName

# Architectures that the networks of both backends compute, with their model_type.
SUPPORTED = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# The matrices of a block; each of them can have an adapter.
MATRICES: tuple[str, ...] = get_args(MatrixName)

# The numbers by which Llama 3.1 and later slow some of their rotary frequencies down.
LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass
class LoRAConfig:
    """Which low-rank adapter a network has: W + alpha / rank * B A (Hu et al. 2021)."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]  # names of the matrices that have one, in the order of the alphabet
    tokens: list[int]  # ids whose embeddings are trained too: the tags, new to a checkpoint

    def __post_init__(self) -> None:
        self.targets = sorted(self.targets)


@dataclass
class ModelConfig:
    """The part of a Hugging Face config.json that the network needs, under the same names."""

    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float] | None = None  # the LLAMA3_ROPE numbers
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # of q, k, v and o; Qwen2 always has those of q, k and v
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    # All ids that end a text, which the file has as eos_token_id: one, or a list. The first is the
    # tokenizer's own.
    eos_token_ids: list[int] = field(default_factory=list)

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias or self.architectures[0] == "Qwen2ForCausalLM"

    @property
    def o_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias and self.architectures[0] != "Qwen2ForCausalLM"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized, head by head."""
        return self.architectures[0] == "Qwen3ForCausalLM"

    def inverse_frequencies(self) -> np.ndarray:
        """Return the radians by which each pair of dimensions turns per position, (head_dim / 2,).

        Llama 3.1 leaves the fast ones, and slows by `factor` those that do not finish a turn
        within the length of its first training. Between the two it blends.
        """
        exponents = -np.arange(0, self.head_dim, 2) / self.head_dim
        frequencies = self.rope_theta**exponents
        if self.rope_scaling:
            factor, low, high, length = (self.rope_scaling[name] for name in LLAMA3_ROPE)
            turns = length * frequencies / (2 * np.pi)
            kept_share = np.clip((turns - low) / (high - low), 0, 1)
            frequencies = frequencies * (kept_share + (1 - kept_share) / factor)
        return frequencies.astype(np.float32)

    def shape_of(self, matrix: str) -> tuple[int, int]:
        """Return (rows, columns) of one of a block's MATRICES."""
        query_size = self.num_attention_heads * self.head_dim
        key_size = self.num_key_value_heads * self.head_dim
        shapes = {
            "q_proj": (query_size, self.hidden_size),
            "k_proj": (key_size, self.hidden_size),
            "v_proj": (key_size, self.hidden_size),
            "o_proj": (self.hidden_size, query_size),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }
        return shapes[matrix]

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: object) -> "ModelConfig":
        """Return the configuration that the content of a config.json describes.

        where: the file, for messages.
        Raises UserError for what this network can't compute.
        """
        architecture = _supported_architecture(raw, where)
        _refuse_quantized_weights(raw, where)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if raw.get("use_sliding_window"):
            raise UserError(
                f"{where}: sliding windows are not supported; take a checkpoint without them"
            )
        rope_scaling = _read_rope_scaling(rope, where)
        if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            raise UserError(f"{where}: only silu without biases is supported in the MLP")

        heads = raw["num_attention_heads"]
        values: dict[str, Any] = {
            **raw,
            "architectures": [architecture],
            # Before transformers 5, rope_theta stood at the top level.
            "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            "rope_scaling": rope_scaling,
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "eos_token_ids": read_token_ids(raw.get("eos_token_id")),
        }
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json, as transformers and mlx_lm read it."""
        content = dataclasses.asdict(self)
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        del content["rope_scaling"]
        if self.rope_scaling:
            rope["rope_type"] = "llama3"
            rope.update(self.rope_scaling)
            # mlx_lm reads it under this name.
            content["rope_scaling"] = rope
        eos_ids = content.pop("eos_token_ids")
        if len(eos_ids) < 2:
            content["eos_token_id"] = eos_ids[0] if eos_ids else None
        else:
            content["eos_token_id"] = eos_ids
        content["model_type"] = SUPPORTED[self.architectures[0]]
        content["hidden_act"] = "silu"
        content["rope_parameters"] = rope
        content["torch_dtype"] = "float32"
        content["use_cache"] = True
        return content


def read_token_ids(value: Any) -> list[int]:
    """Return the ids of an entry such as eos_token_id, which is an id, a list of them or null.

    Raises ValueError for anything else.
    """
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ValueError(f"{value!r} is no token's id")
    return ids


def _supported_architecture(raw: dict[str, Any], where: object) -> str:
    """Return the architecture of a config.json; raise UserError for one that is not supported."""
    if raw.get("architectures"):
        architecture = raw["architectures"][0]
    else:
        # A GGUF file names its model_type alone.
        model_type = str(raw.get("model_type"))
        by_type = {name: architecture for architecture, name in SUPPORTED.items()}
        architecture = by_type.get(model_type, f"of type {model_type}")
    if architecture not in SUPPORTED:
        raise UserError(
            f"{where}: architecture {architecture} is not supported; "
            f"supported: {', '.join(SUPPORTED)}"
        )
    return architecture


def _refuse_quantized_weights(raw: dict[str, Any], where: object) -> None:
    quantization = raw.get("quantization_config") or raw.get("quantization")
    if not quantization:
        return
    method = quantization.get("quant_method") or f"{quantization.get('bits')} bits"
    raise UserError(
        f"{where}: these weights are quantised ({method}), which is not read; "
        "take the checkpoint they were made of, and --bits=4"
    )


def _read_rope_scaling(rope: dict[str, Any], where: object) -> dict[str, float] | None:
    """Return the numbers of Llama 3's rope scaling, None for plain rotary embeddings."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling of type {kind} is not supported; supported: llama3")
    for name in LLAMA3_ROPE:
        if name not in rope:
            raise UserError(f"{where}: rope scaling lacks {name}")
    return {name: rope[name] for name in LLAMA3_ROPE}


def nano_config(
    vocab_size: int, eos: int | None, bos: int | None, width: int = 128, layers: int = 4
) -> ModelConfig:
    """Return the nano model: a Llama of about a million parameters, with biases in attention.

    width: its hidden size, in heads of 32 dimensions. With an even number of heads, two of them
    share a key and a value. What the biases are for: see initial_weights.
    """
    heads = width // 32
    key_value_heads = heads // 2 if heads % 2 == 0 else heads
    return ModelConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=32,
        rope_theta=1000.0,
        attention_bias=True,
        max_position_embeddings=1024,
        bos_token_id=bos,
        eos_token_ids=read_token_ids(eos),
    )
