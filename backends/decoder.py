"""Batched decoding with a KV cache: many texts grow at once, each at its own pace.

To write the next token a network looks back at the keys and values of all tokens before it. They
do not change, so they are computed once and kept in a cache, in which each text has a slot:

                 positions in the cache
                 0    1    2    3    4    5
    slot 0       Who  made it   ?    .    .      length 4
    slot 1       A    film .    .    .    .      length 2
    slot 2       Who  is   that man  now  ?      length 6

Slot 1 has room after its 2 tokens, and what lies there is never seen: a query at position p sees
the keys at positions 0 to p of its own slot. So no text needs padding on its left, and a short one
takes its next token right after its last one while a long one does the same elsewhere.

**A group of rollouts is a trie.** Rollouts of one question begin as one text, and part only where
the tokens that they draw differ. A rollout is a row here, and rows that are one text so far share
a slot: the network reads it once, each row draws a token with a random number of its own, and
where the draws differ the slot is copied for those that leave it:

    rows 0 1 2 3 4 in slot 0    Who made it ? I
                                  rows 0 1 2 draw "recall", rows 3 and 4 draw "must"
    rows 0 1 2 in slot 0        Who made it ? I recall
    rows 3 4   in slot 1        Who made it ? I must

Nothing is approximated: what a row writes is what it would write alone, but for rounding.

A turn of an agent has three parts: `decode` lets each row write until a stop, `keep` drops the
rows that are done, and `feed` appends what a tool has answered to the others. Where questions wait,
`add` gives the room of those that are done to new rows.

This file has the bookkeeping of rows and slots. The cache itself, the forward pass and the draw of
a token are a framework's own: see decoder.py of each backend.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.batching import group_by_tokens

# Tokens that are read in one pass at most: the values of more of them fall out of a CPU's cache.
# A backend may have another number for a GPU, which is not busy with so few.
TOKENS_AT_ONCE = 2048

# The cache grows by this many positions at a time, so that it is not copied at every token.
CACHE_BLOCK = 64


class SamplingParams(NamedTuple):
    """What rows may write in one call of `decode`, and how they draw it."""

    stops_of_row: Sequence[frozenset[int]]  # for each row the ids that end it
    limits: np.ndarray  # (rows,), tokens
    temperatures: np.ndarray  # (rows,), 0 where a row takes the most likely token
    uniforms: np.ndarray | None  # (rows, most tokens of a row), as in `decode`


class Decoder(ABC):
    """Rows that grow at their own pace on one KV cache; rows that are one text share a slot of it.

    slot: (rows,), where in the cache the tokens of each row are.
    slots: how many slots are in use, 0 to slots - 1.
    logits: (slots or more, vocab), float32, of the token that comes next in each slot.
    tokens_at_once: tokens that are read in one pass at most, which `_open` may raise.
    length: (rows,), tokens of each row that are in the cache.
    pending: a list of ids for each row, which are the row's last ones and not yet in the cache.
        A sampled token is read together with what comes after it, in one pass.
    """

    slot: np.ndarray
    slots: int
    logits: Any
    tokens_at_once: int
    length: np.ndarray
    pending: list[list[int]]

    def __init__(self, network: Any, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts; equal ones are read once, into one slot."""
        rows = len(prompts)
        texts = [tuple(ids) for ids in prompts]
        slot_of_text = {text: slot for slot, text in enumerate(dict.fromkeys(texts))}
        self.slot = np.array([slot_of_text[text] for text in texts])
        self.slots = len(slot_of_text)
        self.length = np.zeros(rows, dtype=np.int64)
        self.pending = [[] for _ in range(rows)]
        self.tokens_at_once = TOKENS_AT_ONCE
        self._open(network, self.slots)
        self.feed([list(ids) for ids in prompts])

    def add(self, count: int) -> None:
        """Add empty rows after the others; they share a slot until they are fed."""
        # What the new slot is a copy of lies beyond the end of that text.
        (slot,) = self._copy(np.zeros(1, dtype=np.int64))
        self.slot = np.append(self.slot, np.full(count, slot))
        self.length = np.append(self.length, np.zeros(count, dtype=np.int64))
        self.pending += [[] for _ in range(count)]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, in this order; a row may be named more than once."""
        self.length = self.length[rows]
        self.slot = self.slot[rows]
        self.pending = [list(self.pending[row]) for row in rows]
        used = np.unique(self.slot)
        if len(used) < self.slots:
            self._select(used, int(self.length.max()))
            self.slots = len(used)
            self.slot = np.searchsorted(used, self.slot)

    def feed(self, sequences: Sequence[list[int]]) -> None:
        """Append ids to each row, one list for each row; a list may be empty.

        Rows of one text that read the same stay one text, and are read once. Slots of like length
        are read together, tokens_at_once tokens in a pass at most.
        """
        unread = [old + new for old, new in zip(self.pending, sequences, strict=True)]
        self.pending = [[] for _ in unread]
        counts = np.array([len(ids) for ids in unread])
        readers = self._split([tuple(ids) for ids in unread])
        readers = readers[counts[readers] > 0]
        for group in group_by_tokens(counts[readers].tolist(), self.tokens_at_once):
            rows = readers[group]
            # Padding on the right: it is written beyond the end of its text, and never seen.
            ids = np.zeros((len(rows), counts[rows].max()), dtype=np.int64)
            for i, row in enumerate(rows):
                ids[i, : counts[row]] = unread[row]
            self._prefill(ids, self.slot[rows], self.length[rows], counts[rows] - 1)
        self.length += counts

    def decode(
        self,
        stops: Sequence[int] | Sequence[Collection[int]],
        limits: Sequence[int],
        temperature: float | Sequence[float],
        uniforms: np.ndarray | None = None,
        writing_share: float = 0.0,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample each row until it has written a stop or reached its limit.

        stops: ids that end a row; or a list of ids for each row.
        limits: how many tokens each row may write, 1 or more.
        temperature: of all rows, or one for each row. At 0 a row takes the most likely token, and
            its log-probabilities are those at temperature 1.
        uniforms: (rows, most tokens of a row), numbers in [0, 1): the one that draws each token. A
            row's tokens depend on its own numbers alone, in every backend, whatever is decoded
            beside it. None where no row samples.
        writing_share: return as soon as no more than this share of the rows is still writing. They
            can go on in the next call.

        Return (ids, log-probabilities), a list each for each row. The last token of a row is
        pending: call `feed` before the next `decode`, with empty lists where nothing is to be read.
        """
        row_count = len(limits)
        stops_of_row = _stops_of_rows(stops, row_count)
        row_limits = np.asarray(limits)
        temperatures = np.broadcast_to(np.asarray(temperature, np.float32), row_count)
        assert uniforms is not None or not temperatures.any(), "sampling needs uniforms"
        # All rows of a slot are drawn at one temperature.
        self._split(temperatures.tolist())

        fewest = int(writing_share * row_count)
        sampling = SamplingParams(stops_of_row, row_limits, temperatures, uniforms)
        all_ids, all_logprobs = self._sample(sampling, fewest)
        return self._collect(all_ids, all_logprobs)

    def _sample(self, sampling: SamplingParams, fewest: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample until no more than `fewest` rows are writing, and read all but their last tokens.

        Return ids and log-probabilities, (rows, steps) each; an id is -1 where a row wrote nothing.
        """
        stops_of_row, limits, temperatures, uniforms = sampling
        step_ids = []
        step_logprobs = []
        running = np.ones(len(limits), dtype=bool)
        for step in range(1, int(limits.max()) + 1):
            # 1. Choose a token in each row. One in a row that does not run is never used.
            numbers = None if uniforms is None else uniforms[:, step - 1]
            ids, logprobs = self._choose(self._max_of_slots(temperatures), numbers)
            step_ids.append(np.where(running, ids, -1))
            step_logprobs.append(logprobs)

            # 2. See which rows go on.
            stopped = [
                token in row_stops
                for token, row_stops in zip(ids.tolist(), stops_of_row, strict=True)
            ]
            running = running & ~np.array(stopped) & (step < limits)
            if running.sum() <= fewest:
                break

            # 3. Rows of one slot part where their tokens differ; then each slot reads its token.
            rows = np.flatnonzero(running)
            self._fork(rows, ids[rows])
            self._append_tokens(rows, ids[rows])

        downloaded = [self._download(logprobs) for logprobs in step_logprobs]
        return np.stack(step_ids, 1), np.stack(downloaded, 1)

    def _append_tokens(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Read a token in each of some rows. rows, ids: (rows that run,)."""
        slots = self.slot[rows]
        tokens = np.zeros(self.slots, dtype=np.int64)
        tokens[slots] = ids
        is_read = np.zeros(self.slots, dtype=bool)
        is_read[slots] = True
        # A slot whose rows have stopped reads a zero beyond its end.
        ends = self._max_of_slots(self.length)
        self._advance(tokens, ends, is_read)
        self.length[rows] += 1

    def _collect(
        self, all_ids: np.ndarray, all_logprobs: np.ndarray
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return what each row wrote; its last token is pending.

        all_ids, all_logprobs: (rows, steps), as `_sample` returns them.
        """
        counts = (all_ids >= 0).sum(1).tolist()
        new_ids = [ids[:count] for ids, count in zip(all_ids.tolist(), counts, strict=True)]
        new_logprobs = [
            logprobs[:count] for logprobs, count in zip(all_logprobs.tolist(), counts, strict=True)
        ]
        self.pending = [old + ids[-1:] for old, ids in zip(self.pending, new_ids, strict=True)]
        return new_ids, new_logprobs

    # ---- rows that share a slot ------------------------------------------------------------------
    def _fork(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Give those of some rows that go on with different ids, (rows,), slots of their own."""
        # A path is a slot and an id, as one number.
        numbers = self.slot[rows] << 32 | ids
        paths, path_of_row = np.unique(numbers, return_inverse=True)
        slots = paths >> 32
        # The paths are sorted, so that those of a slot stand together. The first one stays.
        goes = np.zeros(len(slots), dtype=bool)
        goes[1:] = slots[1:] == slots[:-1]
        leaving = slots[goes]
        slots[goes] = self._copy(leaving)
        self.slot[rows] = slots[path_of_row]

    def _split(self, futures: Sequence[Hashable]) -> np.ndarray:
        """Give rows of one slot that go different ways slots of their own; return a row of each.

        futures: what each row goes on with.
        """
        rows_of_path: dict[tuple[int, int, Hashable], list[int]] = {}
        # What lies beyond a row's end is lost when it reads. So the longest row of a slot stays.
        longest_first = np.argsort(-self.length, kind="stable").tolist()
        for row in longest_first:
            path = (int(self.slot[row]), int(self.length[row]), futures[row])
            rows_of_path.setdefault(path, []).append(row)
        firsts = np.array([rows[0] for rows in rows_of_path.values()])
        _, staying = np.unique(self.slot[firsts], return_index=True)
        going = np.delete(firsts, staying)
        self.slot[going] = self._copy(self.slot[going])
        for rows in rows_of_path.values():
            self.slot[rows] = self.slot[rows[0]]
        return np.sort(firsts)

    def _copy(self, sources: np.ndarray) -> np.ndarray:
        """Copy some slots into new ones; return where the copies are, (sources,)."""
        copies = self.slots + np.arange(len(sources))
        if len(sources):
            self._copy_slots(sources, copies)
            self.slots += len(sources)
        return copies

    def _max_of_slots(self, values: np.ndarray) -> np.ndarray:
        """Return for each slot the highest of the values of its rows: (rows,) -> (slots,)."""
        highest = np.zeros(self.slots, values.dtype)
        np.maximum.at(highest, self.slot, values)
        return highest

    # ---- a framework's own -----------------------------------------------------------------------
    @abstractmethod
    def _open(self, network: Any, slots: int) -> None:
        """Begin with an empty cache and logits of zeros."""

    @abstractmethod
    def _select(self, slots: np.ndarray, used: int) -> None:
        """Keep these slots of cache and logits, and of the cache the first `used` positions."""

    @abstractmethod
    def _copy_slots(self, sources: np.ndarray, copies: np.ndarray) -> None:
        """Copy cache and logits of some slots to others, which may lie beyond the last one."""

    @abstractmethod
    def _prefill(
        self, ids: np.ndarray, slots: np.ndarray, start: np.ndarray, last: np.ndarray
    ) -> None:
        """Read ids (B, T) in some slots (B,), and take the logits at column `last` (B,).

        start: (B,), the position of the first column.
        """

    @abstractmethod
    def _choose(
        self, temperatures: np.ndarray, uniforms: np.ndarray | None
    ) -> tuple[np.ndarray, Any]:
        """Return a token and its log-probability for each row, (rows,) each.

        temperatures: (slots,), 0 where rows take the most likely token.
        uniforms: (rows,), in [0, 1); None where all rows do.
        """

    @abstractmethod
    def _advance(self, tokens: np.ndarray, start: np.ndarray, is_read: np.ndarray) -> None:
        """Read one token in each slot, at position `start`; take the logits of those `is_read`.

        tokens, start, is_read: (slots,).
        """

    @abstractmethod
    def _download(self, values: Any) -> np.ndarray:
        """Return an array of the framework as one of NumPy; wait for it where need be."""


def _stops_of_rows(
    stops: Sequence[int] | Sequence[Collection[int]], rows: int
) -> list[frozenset[int]]:
    """Return the ids that end each row."""
    shared = []
    own = []
    for stop in stops:
        if isinstance(stop, Collection):
            own.append(frozenset(stop))
        else:
            shared.append(stop)
    if not own:
        return [frozenset(shared)] * rows
    if len(own) != rows or shared:
        raise ValueError(f"stops are for {len(own)} rows, and there are {rows}")
    return own


def ids_in_block(vocab_size: int) -> int:
    """Return of how many ids the probabilities are summed together when a token is drawn.

    A power of two, so that there are some 32 to 64 blocks. The ends of more, added up one after
    the other in float32, would end further from 1, in each library at another place.
    """
    return max(64, 1 << (vocab_size // 64).bit_length())


def round_up_to_block(keys: int) -> int:
    """Return the positions of a cache that has room for some keys: whole blocks."""
    return -(-keys // CACHE_BLOCK) * CACHE_BLOCK
