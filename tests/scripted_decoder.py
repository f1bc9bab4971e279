"""A decoder without a network: each row writes a line that the test has written before."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.trajectory import Codec


class ScriptedDecoder:
    """A decoder whose row i writes the i-th line, whatever it is fed, and fillers after it.

    It keeps what each row has seen. burst: tokens at most of a call that may return early.
    """

    def __init__(self, codec: Codec, *lines: str, burst: int = 1000) -> None:
        self.lines = [codec.tokenizer.encode(line, add_special_tokens=False) for line in lines]
        self.filler = codec.encode("x")
        self.burst = burst
        self.rows: list[dict[str, Any]] = []
        self.first_rows: list[dict[str, Any]] = []  # one for each prompt, also when it is done

    def __call__(self, prompts: Sequence[list[int]]) -> "ScriptedDecoder":
        """Begin with some prompts, as the class of a real decoder does."""
        self.rows = [
            {"line": list(line), "seen": list(prompt), "written": 0, "temperatures": []}
            for line, prompt in zip(self.lines, prompts, strict=True)
        ]
        self.first_rows = self.rows
        return self

    def decode(
        self,
        stops: Sequence[Sequence[int]] | Sequence[int],
        limits: Sequence[int],
        temperature: float | Sequence[float],
        uniforms: Any = None,
        writing_share: float = 0.0,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Write on every row up to a stop or its limit."""
        temperatures = np.broadcast_to(temperature, len(limits)).tolist()
        all_ids = []
        all_logprobs = []
        for number, row in enumerate(self.rows):
            limit = limits[number]
            if writing_share:
                limit = min(limit, self.burst)
            row_stops = stops[number]
            if isinstance(row_stops, int):
                row_stops = stops
            ids: list[int] = []
            while len(ids) < limit and not (ids and ids[-1] in row_stops):
                ids += row["line"][:1] or self.filler
                del row["line"][:1]
            row["seen"] += ids
            row["temperatures"] += [temperatures[number]] * len(ids)
            all_ids.append(ids)
            all_logprobs.append([self._next_logprob(row) for _ in ids])
        return all_ids, all_logprobs

    def _next_logprob(self, row: dict[str, Any]) -> float:
        """Return -0.01, -0.02, .. for the tokens of a row: each log-prob names its token."""
        row["written"] += 1
        return -0.01 * row["written"]

    def keep(self, numbers: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self.rows = [self.rows[number] for number in numbers]

    def feed(self, sequences: Sequence[list[int]]) -> None:
        """Let each row read some ids."""
        for row, ids in zip(self.rows, sequences, strict=True):
            row["seen"] += ids
