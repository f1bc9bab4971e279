"""The weights of a new network, from which heads that copy are found several times sooner.

Keys resemble queries and outputs the transpose of values, so that a token looks for itself and
what is seen is repeated (mimetic initialization, Trockman and Kolter 2023). Two heads of the first
layer begin by looking one and two tokens back.
"""

import math

import numpy as np

from backends.config import ModelConfig

EMBEDDING_SCALE = 0.2  # standard deviation; large, so that a copied token wins early
QUERY_KEY_CORRELATION = 0.7  # how much a query matrix begins as its key matrix
COPY_STRENGTH = 0.35  # an output matrix begins as this much of its value matrix, transposed
LOOK_BACK_BIAS = 5.0  # size of the biases by which heads look back
LOOK_BACK_DIMENSIONS = 8  # the first ones of a head, which turn fastest
LOOK_BACK_WEIGHTS = 0.1  # the weights of these heads begin this much smaller


def initial_weights(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], seed: int = 0
) -> dict[str, np.ndarray]:
    """Return a float32 array for each parameter, the same in each backend.

    shapes: parameters by name, in the network's own names.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        weights[name] = _draw(config, name, shape, rng)
    for layer in range(config.num_hidden_layers):
        _correlate_attention(config, weights, f"model.layers.{layer}.self_attn")
    if config.qkv_bias:
        _look_back(config, weights, "model.layers.0.self_attn")
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def _draw(
    config: ModelConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Return random matrices, biases of 0 and gains of 1."""
    if len(shape) == 1:
        return np.zeros(shape) if name.endswith("bias") else np.ones(shape)
    if "embed" in name:
        return rng.normal(0, EMBEDDING_SCALE, shape)
    scale = shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        # What is added to the residual stream starts small, so that depth does not raise its
        # variance (GPT-2).
        scale = scale / math.sqrt(2 * config.num_hidden_layers)
    return rng.normal(0, scale, shape)


def _correlate_attention(config: ModelConfig, weights: dict[str, np.ndarray], prefix: str) -> None:
    """Make the queries of a block like its keys, and its output the transpose of its values."""
    query_name = f"{prefix}.q_proj.weight"
    keys = _for_each_query_head(config, weights[f"{prefix}.k_proj.weight"])
    values = _for_each_query_head(config, weights[f"{prefix}.v_proj.weight"])
    # Together, the two shares keep the variance of the queries.
    independence = math.sqrt(1 - QUERY_KEY_CORRELATION**2)
    weights[query_name] = QUERY_KEY_CORRELATION * keys + independence * weights[query_name]
    weights[f"{prefix}.o_proj.weight"] = COPY_STRENGTH * values.T


def _for_each_query_head(config: ModelConfig, matrix: np.ndarray) -> np.ndarray:
    """Repeat each key or value head for the query heads that share it: (query size, hidden)."""
    heads = matrix.reshape(-1, config.head_dim, config.hidden_size)
    repeated = heads.repeat(_heads_per_key(config), 0)
    return repeated.reshape(-1, config.hidden_size)


def _look_back(config: ModelConfig, weights: dict[str, np.ndarray], prefix: str) -> None:
    """Make the first head attend one token back and the second one two, by their biases."""
    # Rotary embeddings turn the key's bias onto the query's at the distance that is looked back.
    key_bias = np.zeros(config.head_dim)
    key_bias[:LOOK_BACK_DIMENSIONS] = LOOK_BACK_BIAS
    for head in range(min(2, config.num_attention_heads)):
        rows = _head_rows(config, head)
        weights[f"{prefix}.q_proj.bias"][rows] = _rotate_back(config, key_bias, head + 1)
        weights[f"{prefix}.q_proj.weight"][rows] *= LOOK_BACK_WEIGHTS
        key_head = head // _heads_per_key(config)
        key_rows = _head_rows(config, key_head)
        weights[f"{prefix}.k_proj.bias"][key_rows] = key_bias
        # Heads that share a key make it smaller once.
        if head % _heads_per_key(config) == 0:
            weights[f"{prefix}.k_proj.weight"][key_rows] *= LOOK_BACK_WEIGHTS


def _rotate_back(config: ModelConfig, vector: np.ndarray, positions: int) -> np.ndarray:
    """Undo the rotary embedding of some positions; the two halves of a head are its pairs."""
    angle = positions * config.inverse_frequencies()
    cosine = np.cos(angle)
    sine = np.sin(angle)
    first, second = np.split(vector, 2)
    return np.concatenate(
        [
            first * cosine + second * sine,
            second * cosine - first * sine,
        ]
    )


def _heads_per_key(config: ModelConfig) -> int:
    """Return how many query heads share a key and a value."""
    return config.num_attention_heads // config.num_key_value_heads


def _head_rows(config: ModelConfig, head: int) -> slice:
    """Return the rows of a projection that belong to one head."""
    first_row = head * config.head_dim
    return slice(first_row, first_row + config.head_dim)


def initial_adapter(
    shapes: dict[str, tuple[int, int]], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return the matrices of a new adapter, which changes nothing yet.

    A is drawn as in the code of Hu et al. (2021), and B is zero.

    shapes: adapter parameters by name; only those of A and B are made.
    """
    parameters = {}
    for name, shape in shapes.items():
        if name.endswith("lora_A"):
            parameters[name] = rng.uniform(-1, 1, shape) * shape[1] ** -0.5
        elif name.endswith("lora_B"):
            parameters[name] = np.zeros(shape)
    return parameters
