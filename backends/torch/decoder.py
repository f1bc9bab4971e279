"""Decoding: the KV cache, one step of many rows, and the draw of a token.

What rows are, and the loop over steps, is in backends/decoder.py.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backends.decoder import Decoder as RowDecoder
from backends.decoder import round_up_to_block
from backends.torch.network import Transformer
from backends.torch.weights import compute_copy


class Place(NamedTuple):
    """Where the tokens of one pass go in the cache, and what they see there."""

    rows: Tensor  # (B,), which rows the pass reads
    is_every_row: bool
    positions: Tensor  # (B, T), one for each token
    visible: int  # queries may look at the first so many positions


class KVCache:
    """Keys and values of one layer, (rows, key and value heads, positions, head_dim) each."""

    def __init__(self, network: Transformer, rows: int) -> None:
        config = network.config
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)
        self.keys = torch.zeros(shape, device=network.device, dtype=network.dtype)
        self.values = torch.zeros(shape, device=network.device, dtype=network.dtype)

    def select(self, rows: Tensor, used: int) -> None:
        """Keep these rows, in this order, and the first `used` positions."""
        self.keys = self.keys[rows, :, :used]
        self.values = self.values[rows, :, :used]

    def grow(self, more: int) -> None:
        """Make room for more positions in each row."""
        padding = (0, 0, 0, more)
        self.keys = functional.pad(self.keys, padding)
        self.values = functional.pad(self.values, padding)

    def write(self, place: Place, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new tokens, and return those of all that queries may see.

        k, v: (B, heads, T, head_dim) -> (B, heads, visible, head_dim).
        """
        rows = place.rows[:, None]
        self.keys[rows, :, place.positions] = k.transpose(1, 2)
        self.values[rows, :, place.positions] = v.transpose(1, 2)
        visible_keys = self.keys[:, :, : place.visible]
        visible_values = self.values[:, :, : place.visible]
        if place.is_every_row:
            return visible_keys, visible_values
        return visible_keys[place.rows], visible_values[place.rows]


class Decoder(RowDecoder):
    """Rows that grow at their own pace on one KV cache; see backends/decoder.py."""

    network: Transformer
    caches: list[KVCache]  # one for each layer
    logits: Tensor

    def _open(self, network: Transformer, rows: int) -> None:
        self.network = compute_copy(network)
        layers = range(network.config.num_hidden_layers)
        self.caches = [KVCache(network, rows) for _ in layers]
        self.logits = torch.zeros(rows, network.config.vocab_size, device=network.device)

    def _select(self, rows: list[int], used: int) -> None:
        index = torch.as_tensor(rows, device=self.network.device)
        # Layer by layer, or there would be two whole caches for a moment.
        for cache in self.caches:
            cache.select(index, used)
        self.logits = self.logits[index]

    @torch.no_grad()
    def _read(self, ids: np.ndarray, rows: np.ndarray, last: np.ndarray) -> None:
        tokens = torch.as_tensor(ids, device=self.network.device)
        x = self._forward(tokens, rows)
        numbers = np.arange(len(rows))
        last_states = x[numbers, last]  # (B, hidden)
        self.logits[rows] = self.network.logits(last_states)

    def _forward(self, ids: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """Return the hidden states of ids (B, T) after what some rows hold, (B, T, hidden).

        rows: (B,); None: all rows of the cache.
        """
        is_every_row = rows is None
        if rows is None:
            rows = np.arange(len(self.length))
        device = ids.device
        columns = ids.shape[1]
        visible = int(self.length[rows].max()) + columns
        self._make_room(visible)
        start = torch.as_tensor(self.length[rows], device=device)
        offsets = torch.arange(columns, device=device)
        positions = start[:, None] + offsets  # (B, T)
        index = torch.as_tensor(rows, device=device)
        place = Place(index, is_every_row, positions, visible)
        writes = [partial(cache.write, place) for cache in self.caches]
        return self.network(ids, start, writes, self._mask(place))

    def _make_room(self, positions: int) -> None:
        room = self.caches[0].keys.shape[2]
        if positions > room:
            for cache in self.caches:
                cache.grow(round_up_to_block(positions) - room)

    def _mask(self, place: Place) -> Tensor:
        """Return which keys each query sees, (B, 1, T, keys): 0 for those, else -inf."""
        device = self.network.device
        keys = torch.arange(place.visible, device=device)
        is_future = keys > place.positions[..., None]  # (B, T, keys)
        mask = torch.zeros(is_future.shape, device=device, dtype=self.network.dtype)
        return mask.masked_fill_(is_future, -torch.inf)[:, None]

    @torch.no_grad()
    def _choose(
        self, greedy: Tensor, divisors: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = self.logits / divisors
        logprobs = logits.log_softmax(-1)  # (rows, vocab)
        tokens = logprobs.argmax(-1)
        if uniforms is not None:
            drawn = draw(logprobs, uniforms)
            tokens = torch.where(greedy, tokens, drawn)
        picked = logprobs.gather(1, tokens[:, None])
        return tokens, picked[:, 0]

    @torch.no_grad()
    def _advance(self, tokens: Tensor) -> Tensor:
        x = self._forward(tokens[:, None])
        return self.network.logits(x[:, 0])

    def _replace_logits(self, running: np.ndarray, next_logits: Tensor) -> None:
        goes_on = self._upload(running)
        self.logits = torch.where(goes_on[:, None], next_logits, self.logits)

    def _upload(self, values: np.ndarray) -> Tensor:
        dtype = torch.bool if values.dtype == bool else torch.float32
        return torch.as_tensor(values, device=self.network.device, dtype=dtype)

    def _download(self, values: Tensor) -> np.ndarray:
        return values.cpu().numpy()


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the id at which each row's cumulative probability passes `uniforms` of its total.

    Probabilities are summed in blocks of 1024, then inside one block. Summed one after the other
    in float32, 50,000 of them end up to 1e-5 away from 1, in each library at another place, so that
    twins with the same uniforms would part. An id of probability 0 is never drawn.

    logprobs: (rows, vocab).
    uniforms: (rows, 1), in [0, 1).
    """
    # float32 may round a uniform number up to 1.
    below_one = 1 - 2**-23
    rows, vocab_size = logprobs.shape
    probabilities = logprobs.exp()
    padding = -vocab_size % 1024
    probabilities = functional.pad(probabilities, (0, padding))
    blocks = probabilities.view(rows, -1, 1024)  # (rows, blocks, 1024)
    block_sums = blocks.sum(-1)
    block_ends = block_sums.cumsum(-1)  # (rows, blocks)
    total = block_ends[:, -1:]

    # The block in which the cumulative probability passes the target.
    target = uniforms.clamp(max=below_one) * total
    is_before = block_ends <= target
    block = is_before.sum(-1, keepdim=True)  # (rows, 1)

    # The place inside that block.
    block_starts = functional.pad(block_ends, (1, 0))
    block_start = block_starts.gather(1, block)
    in_block = blocks.take_along_dim(block[..., None], 1)[:, 0]  # (rows, 1024)
    ends = in_block.cumsum(-1)
    most = below_one * ends[:, -1:]
    target_in_block = torch.minimum(target - block_start, most)
    place = (ends <= target_in_block).sum(-1)
    first = block[:, 0] * 1024
    return first + place
