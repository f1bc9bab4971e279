"""Batched decoding with a KV cache: many texts grow at once, each at its own pace.

To write the next token a network looks back at the keys and values of all tokens before it. They
do not change, so they are computed once and kept in a cache. Texts that are written together are
the rows of one cache:

                 positions in the cache
                 0    1    2    3    4    5
    row 0        Who  made it   ?    .    .      length 4
    row 1        A    film .    .    .    .      length 2
    row 2        Who  is   that man  now  ?      length 6

Row 1 has room after its 2 tokens, and what lies there is never seen: a query at position p sees
the keys at positions 0 to p of its own row. So no row needs padding on its left, and a short row
takes its next token right after its last one while a long row does the same elsewhere.

A turn of an agent has three parts: `decode` lets each row write until a stop, `keep` drops the
rows that are done, and `feed` appends what a tool has answered to the others.

This file has the bookkeeping of rows. The cache itself, the forward pass and the draw of a token
are a framework's own: see decoder.py of each backend.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from common.batching import group_by_tokens

# Tokens that are read in one pass at most: the values of more of them fall out of a CPU's cache.
TOKENS_AT_ONCE = 2048

# The cache grows by this many positions at a time, so that it is not copied at every token.
CACHE_BLOCK = 64


class Decoder(ABC):
    """Rows that grow at their own pace on one KV cache.

    logits: (rows, vocab), float32, of the token that comes next in each row.
    length: (rows,), tokens of each row that are in the cache.
    pending: a list of ids for each row, which are the row's last ones and not yet in the cache.
        A sampled token is read together with what comes after it, in one pass.
    """

    logits: Any
    length: np.ndarray
    pending: list[list[int]]

    # Whether the next step is launched before the tokens of this one have been looked at. It keeps
    # a lazy framework busy; an eager one would only compute a step too many at the end.
    LAUNCHES_AHEAD = False

    def __init__(self, network: Any, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts; equal ones are read once, and then share no storage."""
        row_of_prompt: dict[tuple[int, ...], int] = {}
        order = [row_of_prompt.setdefault(tuple(ids), len(row_of_prompt)) for ids in prompts]
        rows = len(row_of_prompt)
        self.length = np.zeros(rows, dtype=np.int64)
        self.pending = [[] for _ in range(rows)]
        self._open(network, rows)
        self.feed([list(ids) for ids in row_of_prompt])
        self.keep(order)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, in this order; a row may be named more than once."""
        if rows == list(range(len(self.length))):
            return
        self.length = self.length[rows]
        self.pending = [list(self.pending[row]) for row in rows]
        self._select(rows, int(self.length.max()))

    def feed(self, sequences: Sequence[list[int]]) -> None:
        """Append ids to each row, one list for each row; a list may be empty.

        Rows of like length are read together, TOKENS_AT_ONCE tokens in a pass at most.
        """
        unread = [old + new for old, new in zip(self.pending, sequences, strict=True)]
        self.pending = [[] for _ in unread]
        counts = np.array([len(ids) for ids in unread])
        fed = np.flatnonzero(counts)
        for group in group_by_tokens(counts[fed].tolist(), TOKENS_AT_ONCE):
            rows = fed[group]
            # Padding on the right: it is written beyond the end of its row, and never seen.
            ids = np.zeros((len(rows), counts[rows].max()), dtype=np.int64)
            for i, row in enumerate(rows):
                ids[i, : counts[row]] = unread[row]
            self._read(ids, rows, counts[rows] - 1)
        self.length += counts

    def decode(
        self,
        stops: Sequence[int] | Sequence[Collection[int]],
        limits: Sequence[int],
        temperature: float | Sequence[float],
        rng: np.random.Generator | None = None,
        writing_share: float = 0.0,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample each row until it has written a stop or reached its limit.

        stops: ids that end a row; or a list of ids for each row.
        limits: how many tokens each row may write; a row with 0 waits.
        temperature: of all rows, or one for each row. At 0 a row takes the most likely token, and
            its log-probabilities are those at temperature 1.
        rng: where a row samples, one uniform number is drawn for each row and step, so that every
            backend draws the same tokens.
        writing_share: return as soon as no more than this share of the rows is still writing. They
            can go on in the next call.

        Return (ids, log-probabilities), a list each for each row. The last token of a row is
        pending: call `feed` before the next `decode`, with empty lists where nothing is to be read.
        """
        row_count = len(limits)
        most_steps = max(limits)
        if most_steps == 0:
            return [[] for _ in limits], [[] for _ in limits]
        stops_of_row = _stops_of_rows(stops, row_count)
        row_limits = np.asarray(limits)
        row_temperatures = np.broadcast_to(temperature, row_count)
        is_greedy = row_temperatures == 0
        greedy = self._upload(is_greedy)
        # Dividing by 1 changes nothing, where dividing by 0 would.
        divisors = self._upload(np.where(is_greedy, 1.0, row_temperatures)[:, None])

        step_ids = []
        step_logprobs = []
        running = row_limits > 0
        for step in range(1, most_steps + 1):
            # 1. Choose a token in each row. One in a row that does not run is never used.
            uniforms = None
            if not is_greedy.all():
                assert rng is not None, "sampling needs an rng"
                uniforms = self._upload(rng.random((row_count, 1)))
            chosen, logprobs = self._choose(greedy, divisors, uniforms)

            # 2. Launch the forward pass on these tokens, before they are looked at here.
            next_logits = None
            if self.LAUNCHES_AHEAD and step < most_steps:
                next_logits = self._advance(chosen)

            # 3. Note them, and which rows go on.
            ids = self._download(chosen).astype(np.int64)
            step_ids.append(np.where(running, ids, -1))
            step_logprobs.append(logprobs)
            stopped = [
                token in row_stops
                for token, row_stops in zip(ids.tolist(), stops_of_row, strict=True)
            ]
            running = running & ~np.array(stopped) & (step < row_limits)
            if running.sum() <= writing_share * row_count:
                break

            # 4. Rows that run have one token more. The others wrote theirs beyond their length.
            if next_logits is None:
                next_logits = self._advance(chosen)
            self._replace_logits(running, next_logits)
            self.length += running

        all_ids = np.stack(step_ids, 1)
        all_logprobs = np.stack([self._download(logprobs) for logprobs in step_logprobs], 1)
        counts = (all_ids >= 0).sum(1).tolist()
        new_ids = []
        new_logprobs = []
        for row, count in enumerate(counts):
            new_ids.append(all_ids[row, :count].tolist())
            new_logprobs.append(all_logprobs[row, :count].tolist())
            self.pending[row] = self.pending[row] + new_ids[row][-1:]
        return new_ids, new_logprobs

    # ---- a framework's own -----------------------------------------------------------------------
    @abstractmethod
    def _open(self, network: Any, rows: int) -> None:
        """Begin with an empty cache and logits of zeros."""

    @abstractmethod
    def _select(self, rows: list[int], used: int) -> None:
        """Keep these rows of cache and logits, and of the cache the first `used` positions."""

    @abstractmethod
    def _read(self, ids: np.ndarray, rows: np.ndarray, last: np.ndarray) -> None:
        """Read ids (B, T) after some rows (B,), and take the logits at column `last` (B,)."""

    @abstractmethod
    def _choose(self, greedy: Any, divisors: Any, uniforms: Any | None) -> tuple[Any, Any]:
        """Return a token and its log-probability for each row, (rows,) each.

        greedy: (rows,), whether a row takes its most likely token.
        divisors: (rows, 1), of the logits.
        uniforms: (rows, 1), in [0, 1); None where all rows are greedy.
        """

    @abstractmethod
    def _advance(self, tokens: Any) -> Any:
        """Read one token (rows,) after each row, and return the logits (rows, vocab)."""

    @abstractmethod
    def _replace_logits(self, running: np.ndarray, next_logits: Any) -> None:
        """Take the next logits in rows that run, and leave those of the others."""

    @abstractmethod
    def _upload(self, values: np.ndarray) -> Any:
        """Return a NumPy array as one of the framework; numbers become float32."""

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


def round_up_to_block(keys: int) -> int:
    """Return the positions of a cache that has room for some keys: whole blocks."""
    return -(-keys // CACHE_BLOCK) * CACHE_BLOCK
