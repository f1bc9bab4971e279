"""Log-probabilities of tokens, with and without gradient, and one optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from backends.torch.adapters import trained_parameters
from backends.torch.network import PackedTexts, Part, Transformer
from backends.torch.optimizer import Optimizer
from backends.torch.ranks import sum_gradients
from common import ranks
from common.batching import tokens_of_logits
from data.batches import nodes_to_learn, predicted_nodes

# loss(array module, log-probabilities (nodes,), batch) -> the loss of a micro-batch
LossFunction = Callable[[Any, Any, Any], Any]


def logprobs(
    network: Transformer,
    batch: Mapping[str, Any],
    node: Tensor,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Return the log-probability of each token of some tries given those before it: (nodes,).

    It is 0 where it is not needed. The head runs on what is needed only.

    batch: as data/batches.py packs it.
    node: (needed,), the numbers of those that are needed; none is a first token.
    temperature: of all tokens, or (needed, 1).
    """
    x = _hidden_states(network, batch)
    states = x[batch["parent"][node]]  # (needed, hidden)
    picked = _pick_in_pieces(network, states, batch["ids"][node], temperature)
    return torch.zeros(batch["ids"].shape, device=node.device).index_put((node,), picked)


def _pick_in_pieces(
    network: Transformer, states: Tensor, ids: Tensor, temperature: float | Tensor
) -> Tensor:
    """Return the log-probabilities of ids after some hidden states, (needed,).

    Logits are by far the largest numbers of a checkpoint with a large vocabulary. Where there are
    many, they are computed piece by piece, and again for their gradient.
    states: (needed, hidden). ids: (needed,). temperature: of all, or (needed, 1).
    """

    def pick(states: Tensor, ids: Tensor, temperature: float | Tensor) -> Tensor:
        logits = network.logits(states)  # (.., vocab)
        # SFT's is 1, and dividing so many numbers by it was 4% of a small network's step.
        if isinstance(temperature, Tensor) or temperature != 1:
            logits = logits / temperature
        return -functional.cross_entropy(logits, ids, reduction="none")

    at_once = tokens_of_logits(network.config.vocab_size)
    if len(ids) <= at_once:
        return pick(states, ids, temperature)
    ids_of_pieces = ids.split(at_once)
    temperatures: Sequence[float | Tensor] = [temperature] * len(ids_of_pieces)
    if isinstance(temperature, Tensor):
        temperatures = temperature.split(at_once)
    pieces = zip(states.split(at_once), ids_of_pieces, temperatures, strict=True)
    picked = [
        checkpoint(pick, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces
    ]
    return torch.cat(picked)


def score(network: Transformer, batch: Mapping[str, Any], temperature: float = 1.0) -> np.ndarray:
    """Return `logprobs` of what the mask marks, without gradient, with NumPy arrays in and out."""
    tensors = _to_device(batch, network.device)
    node = _upload(predicted_nodes(batch, batch["mask"] > 0), network.device)
    with torch.no_grad():
        return logprobs(network, tensors, node, temperature).cpu().numpy()


def entropies(network: Transformer, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the entropy, in nats, of the distribution that each token was chosen from: (nodes,).

    It is 0 where the batch's mask is 0, and at temperature 1.
    """
    tensors = _to_device(batch, network.device)
    parent = tensors["parent"]
    node = _upload(predicted_nodes(batch, batch["mask"] > 0), network.device)
    with torch.no_grad():
        x = _hidden_states(network, tensors)
        measured = torch.zeros(parent.shape, device=network.device)
        # Piece by piece, as in `_pick_in_pieces`.
        for piece in node.split(tokens_of_logits(network.config.vocab_size)):
            log_probabilities = network.logits(x[parent[piece]]).log_softmax(-1)  # (.., vocab)
            measured[piece] = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return measured.cpu().numpy()


def _hidden_states(network: Transformer, batch: Mapping[str, Any]) -> Tensor:
    """Return the hidden state of each node, (nodes, hidden), in which it sees its ancestors."""
    return network(batch["ids"][None], batch["depth"][None], parts=_parts(network, batch))[0]


def _parts(network: Transformer, batch: Mapping[str, Any]) -> list[Part] | PackedTexts:
    """Return which columns of a packed row see each other."""
    if network.attends_to_texts_at_once and all(batch["is_text"]):
        ends = np.array([0] + [end for _, end in batch["parts"]], np.int32)
        longest = int(np.diff(ends).max())
        return PackedTexts(_upload(ends, network.device), longest)
    parts = []
    for (start, end), is_text in zip(batch["parts"], batch["is_text"], strict=True):
        # In a text each token sees all before it, which attention does faster without a mask.
        mask = None
        if not is_text:
            mask = _additive(_ancestors(batch["end"][start:end], start, end), network.dtype)
        parts.append(Part(start, end, mask))
    return parts


def _additive(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as attention adds it to scores: 0 for what is seen, else -inf.

    dtype: of the queries; CUDA's kernels take no other. They also want rows that begin at a
    multiple of 8 numbers, and would copy others in each layer.
    """
    *rest, keys = is_seen.shape
    mask = torch.zeros(*rest, -(-keys // 8) * 8, device=is_seen.device, dtype=dtype)
    return mask[..., :keys].masked_fill_(~is_seen, -torch.inf)


def _ancestors(end: Tensor, start: int, stop: int) -> Tensor:
    """Return which nodes of a trie each of them sees, (1, 1, nodes, nodes) of bool.

    end: (nodes,), as in Trie.
    """
    node = torch.arange(start, stop, device=end.device)
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
    network.zero_grad(set_to_none=True)
    network.train()
    if network.lora and network.lora.dropout:
        step = optimizer.seed * 10**6 + optimizer.step_count
        torch.manual_seed(step * ranks.count() + ranks.rank())
    losses = []
    for batch in batches:
        tensors = _to_device(batch, network.device)
        node, temperatures = nodes_to_learn(batch, temperature)
        token_logprobs = logprobs(
            network,
            tensors,
            _upload(node, network.device),
            _upload(temperatures, network.device),
        )
        loss = loss_function(torch, token_logprobs, tensors)
        loss.backward()
        losses.append(loss.detach())
    network.eval()
    total = sum(ranks.gather(sum(_download(losses))))
    parameters = trained_parameters(network)
    gradients: dict[str, Any] = {name: weight.grad for name, weight in parameters.items()}
    gradients = sum_gradients(network, gradients)
    for name, gradient in gradients.items():
        parameters[name].grad = gradient
    length = nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    moved = [gradient.any() for gradient in gradients.values() if gradient is not None]
    norm, *is_moved = _download([length, *moved])
    idle = len(gradients) - int(sum(is_moved))
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step(gradients, lr, muon_lr)
    return {"loss": total, "grad_norm": norm, "idle_parameters": idle}


def _download(values: Sequence[Tensor]) -> list[float]:
    """Return some numbers of the device; a GPU is waited for once."""
    return torch.stack([value.float() for value in values]).tolist() if values else []


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch whose arrays are tensors; its numbers stay as they are."""
    return {name: _upload(value, device) for name, value in batch.items()}


def _upload(values: Any, device: torch.device) -> Any:
    """Return an array as a tensor of a device, without waiting for what a GPU is busy with.

    Anything else stays as it is.
    """
    if not isinstance(values, np.ndarray):
        return values
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
