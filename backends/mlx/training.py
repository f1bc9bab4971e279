"""Log-probabilities of tokens, with and without gradient, and one optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from backends.mlx.adapters import block_linears
from backends.mlx.network import Transformer
from backends.mlx.optimizer import Optimizer
from backends.mlx.weights import flat

# loss(array module, log-probabilities (B, T), batch) -> the loss of a micro-batch
LossFunction = Callable[[Any, Any, Any], Any]


def logprobs(
    network: Transformer, ids: mx.array, mask: mx.array, temperature: float | mx.array = 1.0
) -> mx.array:
    """Return the log-probability of each token given those before it.

    ids, mask: (B, T) -> (B, T), 0 where mask is 0. The head runs on masked positions only. Column
    t is the log-probability of ids[:, t]; column 0 is always 0.
    temperature: of all tokens, or (B, T), one for each.
    """
    x = network(ids[:, :-1])
    rows, columns = np.nonzero(np.array(mask[:, 1:]))
    if not rows.size:
        # Zeros that still depend on the weights, so that there is a gradient.
        return mx.zeros(ids.shape) + 0 * x.sum()
    row = mx.array(rows)
    column = mx.array(columns)
    if isinstance(temperature, mx.array):
        temperature = temperature[row, column + 1][:, None]  # (masked, 1)
    logits = network.logits(x[row, column]) / temperature  # (masked, vocab)
    targets = ids[row, column + 1]
    picked = -nn.losses.cross_entropy(logits, targets)
    return mx.zeros(ids.shape).at[row, column + 1].add(picked)


def score(network: Transformer, batch: Mapping[str, Any], temperature: float = 1.0) -> np.ndarray:
    """Return `logprobs` without gradient, with NumPy arrays in and out."""
    ids = mx.array(batch["ids"])
    mask = mx.array(batch["mask"])
    return np.array(logprobs(network, ids, mask, temperature))


def entropies(network: Transformer, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the entropy, in nats, of the distribution that each token was chosen from: (B, T).

    It is 0 where the batch's mask is 0, and at temperature 1.
    """
    rows, columns = np.nonzero(batch["mask"][:, 1:])
    measured = np.zeros(batch["ids"].shape, np.float32)
    if rows.size:
        ids = mx.array(batch["ids"])
        row = mx.array(rows)
        column = mx.array(columns)
        x = network(ids[:, :-1])
        logits = network.logits(x[row, column])  # (masked, vocab)
        log_sums = mx.logsumexp(logits, axis=-1, keepdims=True)
        log_probabilities = logits - log_sums
        probabilities = mx.exp(log_probabilities)
        values = -(probabilities * log_probabilities).sum(-1)
        measured[rows, columns + 1] = np.array(values)
    return measured


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

    batches: dicts of NumPy arrays and numbers, as the losses of autocoa.py need them.
    temperature: of the tokens in "mask"; those of "observation_mask" are at 1.
    max_norm: a gradient that is longer is cut to this length.

    Return {"loss", "grad_norm"}. Where one of them is not finite, nothing is changed, and the
    caller sees it in these figures.
    """

    def loss_of_batch(arrays: dict[str, Any]) -> mx.array:
        mask = arrays["mask"]
        temperatures: float | mx.array = temperature
        if "observation_mask" in arrays:
            # The auxiliary loss is at temperature 1, and its tokens are none of the policy's.
            observation_mask = arrays["observation_mask"]
            mask = mask + observation_mask
            temperatures = mx.where(observation_mask > 0, 1.0, temperature)
        token_logprobs = logprobs(network, arrays["ids"], mask, temperatures)
        return loss_function(mx, token_logprobs, arrays)

    loss_and_gradient = nn.value_and_grad(network, loss_of_batch)
    network.train()
    total = 0.0
    gradients: dict[str, mx.array] = {}
    for number, batch in enumerate(batches):
        _set_dropout_keys(network, optimizer, number)
        loss, tree = loss_and_gradient(_to_arrays(batch))
        gradients = _add_gradients(gradients, flat(tree))
        # Or this micro-batch's own would be kept beside the sum.
        del tree
        mx.eval(loss, gradients)
        total += float(loss)
    network.eval()
    squares = [gradient.square().sum() for gradient in gradients.values()]
    norm = float(mx.sqrt(sum(squares, mx.array(0.0))))
    if math.isfinite(total) and math.isfinite(norm):
        # MLX is lazy: they are clipped when the optimizer takes a group of them.
        scale = min(1.0, max_norm / (norm + 1e-6))
        gradients = {name: gradient * scale for name, gradient in gradients.items()}
        optimizer.step(gradients, lr, muon_lr)
    # There are buffers of shapes that the next micro-batches will not have.
    mx.clear_cache()
    return {"loss": total, "grad_norm": norm}


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
