"""Log-probabilities of tokens, with and without gradient, and one optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.nn.utils import checkpoint

from backends.mlx.adapters import block_linears
from backends.mlx.network import Part, Transformer
from backends.mlx.optimizer import Optimizer
from backends.mlx.ranks import sum_gradients
from backends.mlx.weights import flat
from common import ranks
from common.batching import tokens_of_logits
from data.batches import nodes_to_learn, predicted_nodes

# loss(array module, log-probabilities (nodes,), batch) -> the loss of a micro-batch
LossFunction = Callable[[Any, Any, Any], Any]


def logprobs(
    network: Transformer,
    batch: Mapping[str, Any],
    node: mx.array,
    temperature: float | mx.array = 1.0,
) -> mx.array:
    """Return the log-probability of each token of some tries given those before it: (nodes,).

    It is 0 where it is not needed. The head runs on what is needed only.

    batch: as data/batches.py packs it.
    node: (needed,), the numbers of those that are needed; none is a first token.
    temperature: of all tokens, or (needed, 1).
    """
    x = _hidden_states(network, batch)
    zeros = mx.zeros(batch["ids"].shape)
    if not node.size:
        # Zeros that still depend on the weights, so that there is a gradient.
        return zeros + 0 * x.sum()
    states = x[batch["parent"][node]]  # (needed, hidden)
    picked = _pick_in_pieces(network, states, batch["ids"][node], temperature)
    return zeros.at[node].add(picked)


def _pick_in_pieces(
    network: Transformer, states: mx.array, ids: mx.array, temperature: float | mx.array
) -> mx.array:
    """Return the log-probabilities of ids after some hidden states, (needed,).

    Logits are by far the largest numbers of a checkpoint with a large vocabulary. Where there are
    many, they are computed piece by piece, and again for their gradient.
    states: (needed, hidden). ids: (needed,). temperature: of all, or (needed, 1).
    """

    def pick(states: mx.array, ids: mx.array, temperature: float | mx.array) -> mx.array:
        logits = network.logits(states)  # (.., vocab)
        if isinstance(temperature, mx.array) or temperature != 1:
            logits = logits / temperature
        return -nn.losses.cross_entropy(logits, ids)

    at_once = tokens_of_logits(network.config.vocab_size)
    if ids.size <= at_once:
        return pick(states, ids, temperature)
    picked = []
    for start in range(0, ids.size, at_once):
        piece = slice(start, start + at_once)
        own = temperature[piece] if isinstance(temperature, mx.array) else temperature
        # Ids have no gradient, so they are no arguments of what is computed again.
        pick_again = checkpoint(
            network.head, lambda x, piece=piece, own=own: pick(x, ids[piece], own)
        )
        picked.append(pick_again(states[piece]))
    return mx.concatenate(picked)


def score(network: Transformer, batch: Mapping[str, Any], temperature: float = 1.0) -> np.ndarray:
    """Return `logprobs` of what the mask marks, without gradient, with NumPy arrays in and out."""
    node = mx.array(predicted_nodes(batch, batch["mask"] > 0))
    return np.array(logprobs(network, _to_arrays(batch), node, temperature))


def entropies(network: Transformer, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the entropy, in nats, of the distribution that each token was chosen from: (nodes,).

    It is 0 where the batch's mask is 0, and at temperature 1.
    """
    arrays = _to_arrays(batch)
    measured = mx.zeros(arrays["mask"].shape)
    node = mx.array(predicted_nodes(batch, batch["mask"] > 0))
    x = _hidden_states(network, arrays)
    at_once = tokens_of_logits(network.config.vocab_size)
    # Piece by piece, as in `_pick_in_pieces`.
    for start in range(0, node.size, at_once):
        piece = node[start : start + at_once]
        logits = network.logits(x[arrays["parent"][piece]])  # (.., vocab)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        measured[piece] = -(mx.exp(log_probabilities) * log_probabilities).sum(-1)
        # Or all pieces would be computed at the end, beside each other.
        mx.eval(measured)
    return np.array(measured)


def _hidden_states(network: Transformer, batch: Mapping[str, Any]) -> mx.array:
    """Return the hidden state of each node, (nodes, hidden), in which it sees its ancestors."""
    parts = []
    for (start, end), is_text in zip(batch["parts"], batch["is_text"], strict=True):
        # In a text each token sees all before it, which attention does faster without a mask.
        mask = None if is_text else _ancestors(batch["end"][start:end], start, end)
        parts.append(Part(start, end, mask))
    return network(batch["ids"][None], batch["depth"][None], parts=parts)[0]


def _ancestors(end: mx.array, start: int, stop: int) -> mx.array:
    """Return which nodes of a trie each of them sees, (1, 1, nodes, nodes) of bool.

    end: (nodes,), as in Trie.
    """
    node = mx.arange(start, stop)
    is_seen = (node[None] <= node[:, None]) & (node[:, None] < end[None])  # (query, key)
    return is_seen[None, None]


def train_step(
    network: Transformer,
    optimizer: Optimizer,
    loss_function: LossFunction,
    batches: Sequence[Mapping[str, Any]],
    lr: float,
    muon_lr: float,
    temperature: float = 1.0,
    max_norm: float = 1.0,
) -> dict[str, float]:
    """Make one optimizer step over micro-batches, whose losses and gradients are summed.

    batches: dicts of NumPy arrays and numbers, as the losses of autocoa.py need them; those of this
        process, where several have a share of the step.
    temperature: of the tokens in "mask"; those of "observation_count" are at 1.
    max_norm: a gradient that is longer is cut to this length.

    Return {"loss", "grad_norm", "idle_parameters"}; the last counts parameters whose gradient is 0.
    Where loss or gradient is not finite, nothing is changed, and the caller sees it in the figures.
    """

    def loss_of_batch(batch: Mapping[str, Any]) -> mx.array:
        arrays = _to_arrays(batch)
        node, temperatures = nodes_to_learn(batch, temperature)
        if isinstance(temperatures, np.ndarray):
            temperatures = mx.array(temperatures)
        return loss_function(mx, logprobs(network, arrays, mx.array(node), temperatures), arrays)

    loss_and_gradient = nn.value_and_grad(network, loss_of_batch)
    network.train()
    total = 0.0
    gradients: dict[str, mx.array] = {}
    for number, batch in enumerate(batches):
        _set_dropout_keys(network, optimizer, number * ranks.count() + ranks.rank())
        loss, tree = loss_and_gradient(batch)
        gradients = _add_gradients(gradients, flat(tree))
        # Or this micro-batch's own would be kept beside the sum.
        del tree
        mx.eval(loss, gradients)
        total += float(loss)
    network.eval()
    total = sum(ranks.gather(total))
    gradients = sum_gradients(network, gradients)
    squares = [gradient.square().sum() for gradient in gradients.values()]
    norm = float(mx.sqrt(sum(squares, mx.array(0.0))))
    idle = int((mx.stack(squares) == 0).sum())
    if math.isfinite(total) and math.isfinite(norm):
        # MLX is lazy: they are clipped when the optimizer takes a group of them.
        scale = min(1.0, max_norm / (norm + 1e-6))
        gradients = {name: gradient * scale for name, gradient in gradients.items()}
        optimizer.step(gradients, lr, muon_lr)
    # There are buffers of shapes that the next micro-batches will not have.
    mx.clear_cache()
    return {"loss": total, "grad_norm": norm, "idle_parameters": idle}


def _add_gradients(total: dict[str, mx.array], more: dict[str, mx.array]) -> dict[str, mx.array]:
    if not total:
        return more
    return {name: total[name] + gradient for name, gradient in more.items()}


def _set_dropout_keys(network: Transformer, optimizer: Optimizer, micro_batch: int) -> None:
    """Give each linear map the key of its dropout in this micro-batch."""
    if not network.lora or not network.lora.dropout:
        return
    step = optimizer.seed * 10**6 + optimizer.step_count
    for index, linear in enumerate(block_linears(network).values()):
        key = (step * 1000 + micro_batch) * 1000 + index
        linear._dropout_key = mx.random.key(key % 2**63)


def _to_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose arrays are MLX's; its numbers stay as they are."""
    arrays = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            value = mx.array(value)
        arrays[name] = value
    return arrays
