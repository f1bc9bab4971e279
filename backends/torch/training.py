"""Log-probabilities of tokens, with and without gradient, and one optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from backends.torch.adapters import trained_parameters
from backends.torch.network import Part, Transformer
from backends.torch.optimizer import Optimizer
from backends.torch.ranks import sum_gradients
from common import ranks

# loss(array module, log-probabilities (nodes,), batch) -> the loss of a micro-batch
LossFunction = Callable[[Any, Any, Any], Any]


def logprobs(
    network: Transformer,
    batch: Mapping[str, Any],
    needed: Tensor,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Return the log-probability of each token of some tries given those before it: (nodes,).

    It is 0 where it is not needed, and for first tokens. The head runs on what is needed only.

    batch: as data/batches.py packs it.
    needed: (nodes,) of bool.
    temperature: of all tokens, or (nodes,), one for each.
    """
    x = _hidden_states(network, batch)
    node = torch.nonzero(needed & (batch["parent"] >= 0))[:, 0]
    if isinstance(temperature, Tensor):
        temperature = temperature[node][:, None]  # (needed, 1)
    logits = network.logits(x[batch["parent"][node]]) / temperature  # (needed, vocab)
    picked = -functional.cross_entropy(logits, batch["ids"][node], reduction="none")
    return torch.zeros(needed.shape, device=needed.device).index_put((node,), picked)


def score(network: Transformer, batch: Mapping[str, Any], temperature: float = 1.0) -> np.ndarray:
    """Return `logprobs` of what the mask marks, without gradient, with NumPy arrays in and out."""
    tensors = _to_device(batch, network.device)
    with torch.no_grad():
        return logprobs(network, tensors, tensors["mask"] > 0, temperature).cpu().numpy()


def entropies(network: Transformer, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the entropy, in nats, of the distribution that each token was chosen from: (nodes,).

    It is 0 where the batch's mask is 0, and at temperature 1.
    """
    tensors = _to_device(batch, network.device)
    parent = tensors["parent"]
    node = torch.nonzero((tensors["mask"] > 0) & (parent >= 0))[:, 0]
    with torch.no_grad():
        x = _hidden_states(network, tensors)
        log_probabilities = network.logits(x[parent[node]]).log_softmax(-1)  # (needed, vocab)
        measured = torch.zeros(parent.shape, device=network.device)
        measured[node] = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return measured.cpu().numpy()


def _hidden_states(network: Transformer, batch: Mapping[str, Any]) -> Tensor:
    """Return the hidden state of each node, (nodes, hidden), in which it sees its ancestors."""
    parts = [
        Part(start, end, _ancestors(batch["end"], start, end)) for start, end in batch["parts"]
    ]
    return network(batch["ids"][None], batch["depth"][None], parts=parts)[0]


def _ancestors(end: Tensor, start: int, stop: int) -> Tensor | None:
    """Return which nodes of a trie each of them sees, (1, 1, nodes, nodes): 0, else -inf.

    end: (all nodes,), as in Trie. None where the trie is one text, in which each sees all before.
    """
    end = end[start:stop]
    if bool((end == stop).all()):
        return None
    node = torch.arange(start, stop, device=end.device)
    is_seen = (node[None] <= node[:, None]) & (node[:, None] < end[None])  # (query, key)
    mask = torch.zeros(is_seen.shape, device=end.device)
    return mask.masked_fill_(~is_seen, -torch.inf)[None, None]


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
    total = 0.0
    for batch in batches:
        tensors = _to_device(batch, network.device)
        needed = tensors["mask"] > 0
        temperatures: float | Tensor = temperature
        if "observation_count" in tensors:
            # The auxiliary loss is at temperature 1, and its tokens are none of the policy's.
            is_observed = tensors["observation_count"] > 0
            needed = needed | is_observed
            temperatures = torch.where(is_observed, 1.0, temperature)
        token_logprobs = logprobs(network, tensors, needed, temperatures)
        loss = loss_function(torch, token_logprobs, tensors)
        loss.backward()
        total += loss.item()
    network.eval()
    total = sum(ranks.gather(total))
    parameters = trained_parameters(network)
    gradients: dict[str, Any] = {name: weight.grad for name, weight in parameters.items()}
    gradients = sum_gradients(network, gradients)
    for name, gradient in gradients.items():
        parameters[name].grad = gradient
    norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm).item()
    idle = [grad for grad in gradients.values() if grad is None or not bool(grad.any())]
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step(gradients, lr, muon_lr)
    return {"loss": total, "grad_norm": norm, "idle_parameters": len(idle)}


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch whose arrays are tensors; its numbers stay as they are."""
    tensors = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value, device=device)
        tensors[name] = value
    return tensors
