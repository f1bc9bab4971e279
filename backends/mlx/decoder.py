"""Decoding: the KV cache, one step of many rows, and the draw of a token.

What rows are, and the loop over steps, is in backends/decoder.py.
"""

from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from backends.decoder import Decoder as RowDecoder
from backends.decoder import round_up_to_block
from backends.mlx.network import Transformer
from backends.mlx.weights import compute_copy


class Place(NamedTuple):
    """Where the tokens of one pass go in the cache, and what they see there."""

    rows: mx.array | None  # (B,), which rows the pass reads; None: all
    positions: mx.array | None  # (B, T), one for each token; None: the last visible ones
    visible: int  # queries may look at the first so many positions


class KVCache:
    """Keys and values of one layer, (rows, key and value heads, positions, head_dim) each."""

    def __init__(self, network: Transformer, rows: int) -> None:
        config = network.config
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)
        self.keys = mx.zeros(shape, network.dtype)
        self.values = mx.zeros(shape, network.dtype)

    def select(self, rows: mx.array, used: int) -> None:
        """Keep these rows, in this order, and the first `used` positions."""
        self.keys = self.keys[rows, :, :used]
        self.values = self.values[rows, :, :used]

    def grow(self, more: int) -> None:
        """Make room for more positions in each row."""
        padding = [(0, 0), (0, 0), (0, more), (0, 0)]
        self.keys = mx.pad(self.keys, padding)
        self.values = mx.pad(self.values, padding)

    def write(self, place: Place, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store keys and values of new tokens, and return those of all that queries may see.

        k, v: (B, heads, T, head_dim) -> (B, heads, visible, head_dim).
        """
        self.keys, visible_keys = _write(self.keys, place, k)
        self.values, visible_values = _write(self.values, place, v)
        return visible_keys, visible_values


def _write(state: mx.array, place: Place, new: mx.array) -> tuple[mx.array, mx.array]:
    """Return a cache's keys or values with new ones in them, and those that queries may see."""
    if place.positions is None:
        start = place.visible - new.shape[2]
        state[:, :, start : place.visible] = new
        return state, state[:, :, : place.visible]
    own_rows = state
    if place.rows is not None:
        own_rows = state[place.rows]
    positions = place.positions[:, None, :, None]
    positions = mx.broadcast_to(positions, new.shape)
    own_rows = mx.put_along_axis(own_rows, positions, new, axis=2)
    visible = own_rows[:, :, : place.visible]
    if place.rows is None:
        return own_rows, visible
    state[place.rows] = own_rows
    return state, visible


class Decoder(RowDecoder):
    """Rows that grow at their own pace on one KV cache; see backends/decoder.py."""

    network: Transformer
    caches: list[KVCache]  # one for each layer
    logits: mx.array

    LAUNCHES_AHEAD = True

    def _open(self, network: Transformer, rows: int) -> None:
        self.network = compute_copy(network)
        layers = range(network.config.num_hidden_layers)
        self.caches = [KVCache(network, rows) for _ in layers]
        self.logits = mx.zeros((rows, network.config.vocab_size))

    def _select(self, rows: list[int], used: int) -> None:
        index = mx.array(rows)
        for cache in self.caches:
            cache.select(index, used)
        self.logits = self.logits[index]

    def _read(self, ids: np.ndarray, rows: np.ndarray, last: np.ndarray) -> None:
        x = self._forward(mx.array(ids), rows)
        numbers = mx.arange(len(rows))
        last_states = x[numbers, mx.array(last)]  # (B, hidden)
        index = mx.array(rows)
        self.logits[index] = self.network.logits(last_states)
        states = [(cache.keys, cache.values) for cache in self.caches]
        mx.eval(states, self.logits)

    def _forward(self, ids: mx.array, rows: np.ndarray | None = None) -> mx.array:
        """Return the hidden states of ids (B, T) after what some rows hold, (B, T, hidden).

        rows: (B,); None: all rows of the cache.
        """
        index = None
        length = self.length
        if rows is not None:
            index = mx.array(rows)
            length = self.length[rows]
        columns = ids.shape[1]
        visible = int(length.max()) + columns
        self._make_room(visible)
        if index is None and (length == length[0]).all():
            # All rows end at one position: they need no mask.
            start = int(length[0])
            mask = None
            place = Place(None, None, visible)
        else:
            start = mx.array(length)
            positions = start[:, None] + mx.arange(columns)  # (B, T)
            keys = mx.arange(visible)
            is_seen = keys <= positions[..., None]  # (B, T, keys)
            mask = is_seen[:, None]
            place = Place(index, positions, visible)
        writes = [partial(cache.write, place) for cache in self.caches]
        return self.network(ids, start, writes, mask)

    def _make_room(self, positions: int) -> None:
        room = self.caches[0].keys.shape[2]
        if positions > room:
            # Or MLX would keep the memory of each former size, which no later one fits.
            mx.clear_cache()
            for cache in self.caches:
                cache.grow(round_up_to_block(positions) - room)

    def _choose(
        self, greedy: mx.array, divisors: mx.array, uniforms: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        logits = self.logits
        if uniforms is not None:
            logits = logits / divisors
        total = mx.logsumexp(logits, -1, keepdims=True)
        logprobs = logits - total  # (rows, vocab)
        tokens = logprobs.argmax(-1)
        if uniforms is not None:
            drawn = draw(logprobs, uniforms)
            tokens = mx.where(greedy, tokens, drawn)
        picked = mx.take_along_axis(logprobs, tokens[:, None], 1)
        picked = picked[:, 0]
        mx.async_eval(tokens, picked)
        return tokens, picked

    def _advance(self, tokens: mx.array) -> mx.array:
        x = self._forward(tokens[:, None])
        logits = self.network.logits(x[:, 0])
        mx.async_eval(logits)
        return logits

    def _replace_logits(self, running: np.ndarray, next_logits: mx.array) -> None:
        if not running.all():
            goes_on = self._upload(running)[:, None]
            next_logits = mx.where(goes_on, next_logits, self.logits)
        self.logits = next_logits

    def _upload(self, values: np.ndarray) -> mx.array:
        dtype = mx.bool_ if values.dtype == bool else mx.float32
        return mx.array(values, dtype)

    def _download(self, values: mx.array) -> np.ndarray:
        return np.array(values)


def draw(logprobs: mx.array, uniforms: mx.array) -> mx.array:
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
    probabilities = mx.exp(logprobs)
    padding = -vocab_size % 1024
    probabilities = mx.pad(probabilities, [(0, 0), (0, padding)])
    blocks = probabilities.reshape(rows, -1, 1024)  # (rows, blocks, 1024)
    block_sums = blocks.sum(-1)
    block_ends = block_sums.cumsum(-1)  # (rows, blocks)
    total = block_ends[:, -1:]

    # The block in which the cumulative probability passes the target.
    target = mx.minimum(uniforms, below_one) * total
    is_before = block_ends <= target
    block = is_before.sum(-1, keepdims=True)  # (rows, 1)

    # The place inside that block.
    block_starts = mx.pad(block_ends, [(0, 0), (1, 0)])
    block_start = mx.take_along_axis(block_starts, block, 1)
    in_block = mx.take_along_axis(blocks, block[..., None], 1)[:, 0]  # (rows, 1024)
    ends = in_block.cumsum(-1)
    most = below_one * ends[:, -1:]
    target_in_block = mx.minimum(target - block_start, most)
    place = (ends <= target_in_block).sum(-1)
    return block[:, 0] * 1024 + place
