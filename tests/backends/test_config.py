"""Configurations in and out of config.json, and the weights that a new network begins with."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import CPU

import model
from backends.config import ModelConfig, nano_config
from backends.torch import rotate
from common.errors import UserError
from data.trajectory import Codec

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = np.random.default_rng(0).integers(3, 97, (3, 21))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def plain_rope(theta: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def llama_config(**changes: Any) -> Any:
    """Return a small configuration by transformers."""
    return transformers.LlamaConfig(**{**SIZES, **changes})


# One small configuration of each kind that the network computes, by transformers.
REFERENCE_CONFIGS = {
    "Llama": llama_config(tie_word_embeddings=False, rope_parameters=plain_rope(500.0)),
    "Llama, tied, no groups": llama_config(num_key_value_heads=4, tie_word_embeddings=True),
    "Llama, biases": llama_config(attention_bias=True, tie_word_embeddings=False),
    "Llama 3.1, scaled rope": llama_config(
        head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "Qwen2, tied": transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=True, rope_parameters=plain_rope(1e6)
    ),
    "Qwen2, untied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "Qwen3, wide heads": transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
}


def raw_config(name: str, **changes: Any) -> dict[str, Any]:
    """Return the content of a config.json that transformers would write."""
    config = REFERENCE_CONFIGS[name]
    family = type(config).__name__.removesuffix("Config")
    return {**config.to_dict(), "architectures": [f"{family}ForCausalLM"], **changes}


@pytest.mark.parametrize("name", REFERENCE_CONFIGS)
def test_a_config_comes_back(name: Any) -> None:
    """What is written is read as the same by this project and by transformers.

    Guards: rope scaling that a saved folder loses.
    """
    config = ModelConfig.from_dict(raw_config(name), "config.json")
    assert ModelConfig.from_dict(config.to_dict(), "config.json") == config
    reference = REFERENCE_CONFIGS[name]
    assert type(reference)(**config.to_dict()).rope_parameters == reference.rope_parameters


def test_an_older_config() -> None:
    """Before transformers 5, rope_theta stood at the top level, without rope_parameters."""
    raw = raw_config("Llama")
    raw.pop("rope_parameters")
    raw["rope_theta"] = 500.0
    assert ModelConfig.from_dict(raw, "config.json").rope_theta == 500.0


@pytest.mark.parametrize(
    "name, architecture",
    [
        ("Llama", "LlamaForCausalLM"),
        ("Qwen2, tied", "Qwen2ForCausalLM"),
        ("Qwen3, wide heads", "Qwen3ForCausalLM"),
    ],
)
def test_a_config_without_architectures(name: str, architecture: str) -> None:
    """A GGUF file names its model_type alone."""
    config = ModelConfig.from_dict(raw_config(name, architectures=None), "x.gguf")
    assert config.architectures == [architecture]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel.*supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "of type gpt2.*supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope scaling"),
        ({"use_sliding_window": True}, "sliding"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "lacks low_freq_factor",
        ),
        ({"hidden_act": "gelu"}, "silu"),
        ({"mlp_bias": True}, "without biases"),
    ],
)
def test_what_the_network_cannot_compute(change: dict[str, Any], message: str) -> None:
    """Guards: a checkpoint that loads without a word and computes something else."""
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(raw_config("Llama", **change), "config.json")


def attention_of_first_layer(network: Any, ids: Any) -> Any:
    """Return the attention weights of the first layer, (rows, heads, queries, keys)."""
    config = network.config
    layer = network.model.layers[0]
    length = ids.shape[1]
    x = layer.input_layernorm(network.model.embed_tokens(ids))
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angle = torch.arange(length)[:, None] * frequencies
    rope = (angle.repeat(1, 2).cos(), torch.cat((-angle.sin(), angle.sin()), -1))

    def heads(projection: Any) -> Any:
        split = projection(x).view(len(ids), length, -1, config.head_dim)
        return rotate(split.transpose(1, 2), rope)

    queries = heads(layer.self_attn.q_proj)
    keys = heads(layer.self_attn.k_proj)
    group_size = config.num_attention_heads // config.num_key_value_heads
    keys = keys.repeat_interleave(group_size, 1)
    scores = queries @ keys.mT / config.head_dim**0.5
    future = torch.ones(length, length).triu(1) > 0
    return scores.masked_fill(future, -torch.inf).softmax(-1)


@pytest.mark.parametrize("head, offset", [(0, 1), (1, 2)])
def test_a_new_network_looks_back(codec: Codec, head: int, offset: int) -> None:
    """Two heads begin by attending one and two tokens back, whatever the tokens are."""
    config = nano_config(len(codec.tokenizer), codec.eos_id, 1)
    network = model.new(config, codec.tokenizer, 3, CPU).network
    with torch.no_grad():
        attention = attention_of_first_layer(network, torch.as_tensor(IDS))[:, head]
    at_offset = attention.diagonal(-offset, 1, 2)[:, 3:]
    assert (at_offset > 0.3).all()
    expected = torch.arange(3, IDS.shape[1]) - offset
    assert (attention.argmax(-1)[:, 3:] == expected).all()
