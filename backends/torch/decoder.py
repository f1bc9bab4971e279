"""Decoding: the KV cache, one step of many rows, and the draw of a token.

What rows and slots are, and the loop over steps, is in backends/decoder.py.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backends.decoder import Decoder as SlotDecoder
from backends.decoder import SamplingParams, ids_in_block, round_up_to_block
from backends.torch.fixed_slots import FixedSlots
from backends.torch.network import Transformer
from backends.torch.weights import compute_copy

# Tokens that CUDA reads in one pass at most; an estimate, not measured yet.
TOKENS_AT_ONCE_ON_CUDA = 16_384


class Place(NamedTuple):
    """Where the tokens of one pass go in the cache, and what they see there."""

    slots: Tensor  # (B,), which slots the pass reads in
    is_first_slots: bool  # they are slots 0 to B - 1
    positions: Tensor  # (B, T), one for each token
    visible: int  # queries may look at the first so many positions


class KVCache:
    """Keys and values of one layer, (slots, key and value heads, positions, head_dim) each."""

    def __init__(self, network: Transformer, slots: int) -> None:
        config = network.config
        shape = (slots, config.num_key_value_heads, 0, config.head_dim)
        self.keys = torch.zeros(shape, device=network.device, dtype=network.dtype)
        self.values = torch.zeros(shape, device=network.device, dtype=network.dtype)

    def select(self, slots: Tensor, used: int) -> None:
        """Keep these slots, in this order, and the first `used` positions."""
        self.keys = self.keys[slots, :, :used]
        self.values = self.values[slots, :, :used]

    def copy_slots(self, sources: Tensor, copies: Tensor) -> None:
        """Copy some slots to others."""
        self.keys[copies] = self.keys[sources]
        self.values[copies] = self.values[sources]

    def grow(self, slots: int, positions: int) -> None:
        """Make room for more slots, and for more positions in each."""
        padding = (0, 0, 0, positions, 0, 0, 0, slots)
        self.keys = functional.pad(self.keys, padding)
        self.values = functional.pad(self.values, padding)

    def write(self, place: Place, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new tokens, and return those of all that queries may see.

        k, v: (B, heads, T, head_dim) -> (B, heads, visible, head_dim).
        """
        # On a CPU scatter_ would turn a whole cache of bfloat16 into float32 and back.
        slots = place.slots[:, None]
        self.keys[slots, :, place.positions] = k.transpose(1, 2)
        self.values[slots, :, place.positions] = v.transpose(1, 2)
        keys = self.keys[:, :, : place.visible]
        values = self.values[:, :, : place.visible]
        if place.is_first_slots:
            # Nothing is copied.
            return keys[: len(k)], values[: len(v)]
        return keys[place.slots], values[place.slots]


class Decoder(SlotDecoder):
    """Rows that grow at their own pace on one KV cache; see backends/decoder.py."""

    network: Transformer
    caches: list[KVCache]  # one for each layer
    logits: Tensor
    # Whether rows write in slots of their own, without waiting for the CPU (fixed_slots.py).
    in_fixed_slots: bool = False

    @torch.inference_mode()
    def _open(self, network: Transformer, slots: int) -> None:
        self.network = compute_copy(network)
        if network.device.type == "cuda":
            self.tokens_at_once = TOKENS_AT_ONCE_ON_CUDA
            self.in_fixed_slots = True
        layers = range(network.config.num_hidden_layers)
        self.caches = [KVCache(network, slots) for _ in layers]
        self.logits = torch.zeros(slots, network.config.vocab_size, device=network.device)

    @torch.inference_mode()
    def _select(self, slots: np.ndarray, used: int) -> None:
        index = self._index(slots)
        # Layer by layer, or there would be two whole caches for a moment.
        for cache in self.caches:
            cache.select(index, used)
        self.logits = self.logits[index]

    @torch.inference_mode()
    def _copy_slots(self, sources: np.ndarray, copies: np.ndarray) -> None:
        needed = int(copies.max()) + 1 - len(self.logits)
        if needed > 0:
            # A quarter more, so that it is not copied whole at every fork.
            more = max(needed, len(self.logits) // 4)
            self.logits = functional.pad(self.logits, (0, 0, 0, more))
            for cache in self.caches:
                cache.grow(more, 0)
        source = self._index(sources)
        copy = self._index(copies)
        self.logits[copy] = self.logits[source]
        for cache in self.caches:
            cache.copy_slots(source, copy)

    @torch.inference_mode()
    def _prefill(
        self, ids: np.ndarray, slots: np.ndarray, start: np.ndarray, last: np.ndarray
    ) -> None:
        x = self._forward(ids, slots, start)
        numbers = np.arange(len(slots))
        last_states = x[numbers, last]  # (B, hidden)
        logits = self.network.logits(last_states)
        self.logits[self._index(slots)] = logits

    @torch.inference_mode()
    def _advance(self, tokens: np.ndarray, start: np.ndarray, is_read: np.ndarray) -> None:
        slots = np.arange(self.slots)
        x = self._forward(tokens[:, None], slots, start)
        read = self._index(slots[is_read])
        self.logits[read] = self.network.logits(x[read, 0])

    def _forward(self, ids: np.ndarray, slots: np.ndarray, start: np.ndarray) -> Tensor:
        """Return the hidden states of ids (B, T), which go into some slots, (B, T, hidden).

        slots, start: (B,).
        """
        columns = ids.shape[1]
        visible = int(start.max()) + columns
        self._make_room(visible)
        positions = self._index(start[:, None] + np.arange(columns))  # (B, T)
        is_first = slots == np.arange(len(slots))
        place = Place(self._index(slots), bool(is_first.all()), positions, visible)
        return self._forward_at(place, self._index(ids))

    def _forward_at(self, place: Place, ids: Tensor) -> Tensor:
        writes = [partial(cache.write, place) for cache in self.caches]
        mask = self._mask(place)
        return self.network(ids, place.positions, writes, mask)

    def _make_room(self, positions: int) -> None:
        room = self.caches[0].keys.shape[2]
        if positions > room:
            for cache in self.caches:
                cache.grow(0, round_up_to_block(positions) - room)

    def _mask(self, place: Place) -> Tensor:
        """Return which keys each query sees, (B, 1, T, keys): 0 for those, else -inf."""
        device = self.network.device
        keys = torch.arange(place.visible, device=device)
        is_future = keys > place.positions[..., None]  # (B, T, keys)
        mask = torch.zeros(is_future.shape, device=device, dtype=self.network.dtype)
        return mask.masked_fill_(is_future, -torch.inf)[:, None]

    @torch.inference_mode()
    def _choose(
        self, temperatures: np.ndarray, uniforms: np.ndarray | None
    ) -> tuple[np.ndarray, Tensor]:
        # Dividing by 1 changes nothing, where dividing by 0 would.
        divisors = np.where(temperatures == 0, 1, temperatures)
        logits = self.logits[: self.slots] / self._index(divisors)[:, None]
        logprobs = logits.log_softmax(-1)  # (slots, vocab)
        slot = self._index(self.slot)
        is_greedy = temperatures[self.slot] == 0
        if is_greedy.all():
            tokens = logprobs.argmax(-1)[slot]
        else:
            assert uniforms is not None, "sampling needs uniforms"
            numbers = self._index(uniforms.astype(np.float32))
            tokens = draw(logprobs, slot, numbers)
            if is_greedy.any():
                likeliest = logprobs.argmax(-1)[slot]
                tokens = torch.where(self._index(is_greedy), likeliest, tokens)
        return self._download(tokens), logprobs[slot, tokens]

    # ---- on a GPU --------------------------------------------------------------------------------
    @torch.inference_mode()
    def _sample(self, sampling: SamplingParams, fewest: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.in_fixed_slots:
            return super()._sample(sampling, fewest)
        self._give_rows_own_slots()
        state = FixedSlots(self.network, sampling, self.length)

        def step() -> None:
            state.step(self.logits, draw, self._read_in_all_slots)

        steps = state.run(step, fewest, self._make_room, self._download)
        ids = self._download(state.ids[:, :steps])
        logprobs = self._download(state.logprobs[:, :steps])
        # The last token of a row that still writes is read too; `feed` reads it at the same place.
        self.length += np.maximum((ids >= 0).sum(1) - 1, 0)
        return ids, logprobs

    def _give_rows_own_slots(self) -> None:
        """Let row r have slot r."""
        rows = np.arange(len(self.slot))
        self._split(rows.tolist())
        if not np.array_equal(self.slot, rows) or len(self.logits) > len(rows):
            self._select(self.slot, int(self.length.max()))
            self.slot = rows

    def _read_in_all_slots(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read a token in each slot; return the logits after it, (slots, vocab).

        tokens, positions: (slots,). Queries look at the whole cache, so that no shape changes.
        """
        slots = torch.arange(len(tokens), device=tokens.device)
        room = self.caches[0].keys.shape[2]
        x = self._forward_at(Place(slots, True, positions[:, None], room), tokens[:, None])
        return self.network.logits(x[:, 0])

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=self.network.device)

    def _download(self, values: Tensor) -> np.ndarray:
        return values.cpu().numpy()


def draw(logprobs: Tensor, slot: Tensor, uniforms: Tensor) -> Tensor:
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
    probabilities = functional.pad(logprobs.exp(), (0, padding))
    blocks = probabilities.view(slots, -1, width)  # (slots, blocks, width)
    block_sums = blocks.sum(-1)
    ends = block_sums.cumsum(-1)[slot]  # (rows, blocks)

    # The block in which the cumulative probability passes the target.
    total = ends[:, -1:]
    target = uniforms[:, None].clamp(max=below_one) * total  # (rows, 1)
    is_before = ends <= target
    block = is_before.sum(-1, keepdim=True)  # (rows, 1)

    # The place inside that block.
    starts = functional.pad(ends, (1, 0))
    start = starts.gather(1, block)
    own_block = blocks[slot, block[:, 0]]  # (rows, width)
    ends_in_block = own_block.cumsum(-1)
    most = below_one * ends_in_block[:, -1:]
    target_in_block = torch.minimum(target - start, most)
    is_before = ends_in_block <= target_in_block
    first = block[:, 0] * width
    # A GPU adds up in parallel, and the last end may be lower than the one before it.
    return (first + is_before.sum(-1)).clamp(max=vocab_size - 1)
