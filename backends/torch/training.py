"""Log-probabilities of tokens, with and without gradient, and one optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from backends.torch.adapters import trained_parameters
from backends.torch.network import Transformer
from backends.torch.optimizer import Optimizer

# loss(array module, log-probabilities (B, T), batch) -> the loss of a micro-batch
LossFunction = Callable[[Any, Any, Any], Any]


def logprobs(
    network: Transformer, ids: Tensor, mask: Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """Return the log-probability of each token given those before it.

    ids, mask: (B, T) -> (B, T), 0 where mask is 0. The head runs on masked positions only. Column
    t is the log-probability of ids[:, t]; column 0 is always 0.
    temperature: of all tokens, or (B, T), one for each.
    """
    x = network(ids[:, :-1])
    is_wanted = mask[:, 1:] > 0
    if isinstance(temperature, Tensor):
        temperature = temperature[:, 1:][is_wanted][:, None]  # (masked, 1)
    logits = network.logits(x[is_wanted]) / temperature  # (masked, vocab)
    targets = ids[:, 1:][is_wanted]
    picked = -functional.cross_entropy(logits, targets, reduction="none")
    padded = torch.zeros(ids.shape, device=ids.device)
    padded[:, 1:][is_wanted] = picked
    return padded


def score(network: Transformer, batch: Mapping[str, Any], temperature: float = 1.0) -> np.ndarray:
    """Return `logprobs` without gradient, with NumPy arrays in and out."""
    ids = torch.as_tensor(batch["ids"], device=network.device)
    mask = torch.as_tensor(batch["mask"], device=network.device)
    with torch.no_grad():
        return logprobs(network, ids, mask, temperature).cpu().numpy()


def entropies(network: Transformer, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the entropy, in nats, of the distribution that each token was chosen from: (B, T).

    It is 0 where the batch's mask is 0, and at temperature 1.
    """
    ids = torch.as_tensor(batch["ids"], device=network.device)
    is_wanted = torch.as_tensor(batch["mask"], device=network.device)[:, 1:] > 0
    with torch.no_grad():
        x = network(ids[:, :-1])
        log_probabilities = network.logits(x[is_wanted]).log_softmax(-1)  # (masked, vocab)
        measured = -(log_probabilities.exp() * log_probabilities).sum(-1)
        padded = torch.zeros(ids.shape, device=ids.device)
        padded[:, 1:][is_wanted] = measured
    return padded.cpu().numpy()


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
    network.zero_grad(set_to_none=True)
    network.train()
    if network.lora and network.lora.dropout:
        torch.manual_seed(optimizer.seed * 10**6 + optimizer.step_count)
    total = 0.0
    for batch in batches:
        tensors = _to_device(batch, network.device)
        mask = tensors["mask"]
        temperatures: float | Tensor = temperature
        if "observation_mask" in tensors:
            # The auxiliary loss is at temperature 1, and its tokens are none of the policy's.
            observation_mask = tensors["observation_mask"]
            mask = mask + observation_mask
            temperatures = torch.where(observation_mask > 0, 1.0, temperature)
        token_logprobs = logprobs(network, tensors["ids"], mask, temperatures)
        loss = loss_function(torch, token_logprobs, tensors)
        loss.backward()
        total += loss.item()
    network.eval()
    norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm).item()
    if math.isfinite(total) and math.isfinite(norm):
        parameters = trained_parameters(network)
        gradients: dict[str, Any] = {name: weight.grad for name, weight in parameters.items()}
        optimizer.step(gradients, lr, muon_lr)
    return {"loss": total, "grad_norm": norm}


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch whose arrays are tensors; its numbers stay as they are."""
    tensors = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value, device=device)
        tensors[name] = value
    return tensors
