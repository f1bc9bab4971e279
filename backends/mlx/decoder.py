"""Decoding: the KV cache, one step of many rows, and the draw of a token.

What rows and slots are, and the loop over steps, is in backends/decoder.py.
"""

from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from backends.decoder import Decoder as SlotDecoder
from backends.decoder import ids_in_block, round_up_to_block
from backends.mlx.network import Transformer
from backends.mlx.weights import compute_copy


class Place(NamedTuple):
    """Where the tokens of one pass go in the cache, and what they see there."""

    slots: mx.array  # (B,), which slots the pass reads in
    is_first_slots: bool  # they are slots 0 to B - 1
    positions: mx.array  # (B, T), one for each token
    visible: int  # queries may look at the first so many positions


class KVCache:
    """Keys and values of one layer, (slots, key and value heads, positions, head_dim) each."""

    def __init__(self, network: Transformer, slots: int) -> None:
        config = network.config
        shape = (slots, config.num_key_value_heads, 0, config.head_dim)
        self.keys = mx.zeros(shape, network.dtype)
        self.values = mx.zeros(shape, network.dtype)

    def select(self, slots: mx.array, used: int) -> None:
        """Keep these slots, in this order, and the first `used` positions."""
        self.keys = self.keys[slots, :, :used]
        self.values = self.values[slots, :, :used]

    def copy_slots(self, sources: mx.array, copies: mx.array) -> None:
        """Copy some slots to others."""
        self.keys[copies] = self.keys[sources]
        self.values[copies] = self.values[sources]

    def grow(self, slots: int, positions: int) -> None:
        """Make room for more slots, and for more positions in each."""
        padding = [(0, slots), (0, 0), (0, positions), (0, 0)]
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
    count = len(new)
    own = state[:count] if place.is_first_slots else state[place.slots]
    positions = mx.broadcast_to(place.positions[:, None, :, None], new.shape)
    own = mx.put_along_axis(own, positions, new, axis=2)
    if place.is_first_slots and count == len(state):
        state = own
    elif place.is_first_slots:
        state[:count] = own
    else:
        state[place.slots] = own
    return state, own[:, :, : place.visible]


class Decoder(SlotDecoder):
    """Rows that grow at their own pace on one KV cache; see backends/decoder.py."""

    network: Transformer
    caches: list[KVCache]  # one for each layer
    logits: mx.array

    def _open(self, network: Transformer, slots: int) -> None:
        self.network = compute_copy(network)
        layers = range(network.config.num_hidden_layers)
        self.caches = [KVCache(network, slots) for _ in layers]
        self.logits = mx.zeros((slots, network.config.vocab_size))

    def _select(self, slots: np.ndarray, used: int) -> None:
        index = mx.array(slots)
        for cache in self.caches:
            cache.select(index, used)
        self.logits = self.logits[index]

    def _copy_slots(self, sources: np.ndarray, copies: np.ndarray) -> None:
        needed = int(copies.max()) + 1 - len(self.logits)
        if needed > 0:
            # A quarter more, so that it is not copied whole at every fork.
            more = max(needed, len(self.logits) // 4)
            self.logits = mx.pad(self.logits, [(0, more), (0, 0)])
            for cache in self.caches:
                cache.grow(more, 0)
        source = mx.array(sources)
        copy = mx.array(copies)
        self.logits[copy] = self.logits[source]
        for cache in self.caches:
            cache.copy_slots(source, copy)

    def _prefill(
        self, ids: np.ndarray, slots: np.ndarray, start: np.ndarray, last: np.ndarray
    ) -> None:
        x = self._forward(ids, slots, start)
        numbers = mx.arange(len(slots))
        last_states = x[numbers, mx.array(last)]  # (B, hidden)
        logits = self.network.logits(last_states)
        self.logits[mx.array(slots)] = logits
        states = [(cache.keys, cache.values) for cache in self.caches]
        mx.eval(states, self.logits)

    def _advance(self, tokens: np.ndarray, start: np.ndarray, is_read: np.ndarray) -> None:
        slots = np.arange(self.slots)
        x = self._forward(tokens[:, None], slots, start)
        read = mx.array(slots[is_read])
        self.logits[read] = self.network.logits(x[read, 0])
        mx.async_eval(self.logits)

    def _forward(self, ids: np.ndarray, slots: np.ndarray, start: np.ndarray) -> mx.array:
        """Return the hidden states of ids (B, T), which go into some slots, (B, T, hidden).

        slots, start: (B,).
        """
        columns = ids.shape[1]
        visible = int(start.max()) + columns
        self._make_room(visible)
        positions = mx.array(start[:, None] + np.arange(columns))  # (B, T)
        is_first = slots == np.arange(len(slots))
        place = Place(mx.array(slots), bool(is_first.all()), positions, visible)
        writes = [partial(cache.write, place) for cache in self.caches]
        mask = self._mask(place)
        return self.network(mx.array(ids), positions, writes, mask)

    def _make_room(self, positions: int) -> None:
        room = self.caches[0].keys.shape[2]
        if positions > room:
            # Or MLX would keep the memory of each former size, which no later one fits.
            mx.clear_cache()
            for cache in self.caches:
                cache.grow(0, round_up_to_block(positions) - room)

    def _mask(self, place: Place) -> mx.array:
        """Return which keys each query sees, (B, 1, T, keys) of bool."""
        keys = mx.arange(place.visible)
        is_seen = keys <= place.positions[..., None]  # (B, T, keys)
        return is_seen[:, None]

    def _choose(
        self, temperatures: np.ndarray, uniforms: np.ndarray | None
    ) -> tuple[np.ndarray, mx.array]:
        # Dividing by 1 changes nothing, where dividing by 0 would.
        divisors = np.where(temperatures == 0, 1, temperatures)
        logits = self.logits[: self.slots] / mx.array(divisors)[:, None]
        totals = mx.logsumexp(logits, -1, keepdims=True)
        logprobs = logits - totals  # (slots, vocab)
        slot = mx.array(self.slot)
        is_greedy = temperatures[self.slot] == 0
        if is_greedy.all():
            tokens = logprobs.argmax(-1)[slot]
        else:
            assert uniforms is not None, "sampling needs uniforms"
            numbers = mx.array(uniforms, mx.float32)
            tokens = draw(logprobs, slot, numbers)
            if is_greedy.any():
                likeliest = logprobs.argmax(-1)[slot]
                tokens = mx.where(mx.array(is_greedy), likeliest, tokens)
        picked = logprobs[slot, tokens]
        mx.async_eval(picked)
        return np.array(tokens).astype(np.int64), picked

    def _download(self, values: mx.array) -> np.ndarray:
        return np.array(values)


def draw(logprobs: mx.array, slot: mx.array, uniforms: mx.array) -> mx.array:
    """Return for each row the id at which its slot's cumulative probability passes a number.

    Probabilities are summed in blocks, then inside one block. Summed one after the other in
    float32, 50,000 of them end up to 1e-5 away from 1, in each library at another place, so that
    twins with the same numbers would part. An id of probability 0 is never drawn.

    logprobs: (slots, vocab).
    slot, uniforms: (rows,); the numbers are in [0, 1), and are taken of the slot's total.
    """
    # float32 may round a uniform number up to 1.
    below_one = 1 - 2**-23
    slots, vocab_size = logprobs.shape
    width = ids_in_block(vocab_size)
    padding = -vocab_size % width
    probabilities = mx.pad(mx.exp(logprobs), [(0, 0), (0, padding)])
    blocks = probabilities.reshape(slots, -1, width)  # (slots, blocks, width)
    block_sums = blocks.sum(-1)
    ends = block_sums.cumsum(-1)[slot]  # (rows, blocks)

    # The block in which the cumulative probability passes the target.
    total = ends[:, -1:]
    target = mx.minimum(uniforms[:, None], below_one) * total  # (rows, 1)
    is_before = ends <= target
    block = is_before.sum(-1, keepdims=True)  # (rows, 1)

    # The place inside that block.
    starts = mx.pad(ends, [(0, 0), (1, 0)])
    start = mx.take_along_axis(starts, block, 1)
    own_block = blocks[slot, block[:, 0]]  # (rows, width)
    ends_in_block = own_block.cumsum(-1)
    most = below_one * ends_in_block[:, -1:]
    target_in_block = mx.minimum(target - start, most)
    is_before = ends_in_block <= target_in_block
    first = block[:, 0] * width
    # A GPU adds up in parallel, and the last end may be lower than the one before it.
    return mx.minimum(first + is_before.sum(-1), vocab_size - 1)
