"""Search by a retrieval server that speaks Search-R1's protocol.

That is Search-R1's own server, or `python tools.py serve CORPUS PORT`.
"""

from collections import Counter
from typing import Any

import requests

from common.errors import UserError
from data.passages import Passage, join_passages, split_passage
from data.trajectory import Observation
from services.http import PoliteSession

BATCH = 64  # queries that a server gets at once
TIMEOUT = 120.0  # seconds


class Retriever:
    """A search tool: queries in, observations out."""

    def __init__(self, url: str, top_k: int) -> None:
        """Take the address of the server; top_k: passages of an observation."""
        self.url = url
        self.top_k = top_k
        self.http = PoliteSession(gap=0.0, timeout=TIMEOUT)
        self.counts: Counter[str] = Counter()

    def __call__(self, queries: list[str]) -> list[Observation]:
        """Return an observation for each query.

        Raises UserError for a server that can't be reached or answers something else.
        """
        observations = []
        for start in range(0, len(queries), BATCH):
            results = self._retrieve(queries[start : start + BATCH])
            observations += [Observation(join_passages(passages)) for passages in results]
        return observations

    def _retrieve(self, queries: list[str]) -> list[list[Passage]]:
        self.counts["requests"] += 1
        request = {"queries": queries, "topk": self.top_k, "return_scores": True}
        try:
            rows = self.http.send("POST", self.url, json=request).json()["result"]
            results = [[_read_hit(hit) for hit in row] for row in rows]
            if len(results) != len(queries):
                raise ValueError(f"{len(results)} results for {len(queries)} queries")
        except (
            requests.RequestException,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise UserError(
                f"--corpus={self.url}: not a retrieval server that answers "
                f"({type(error).__name__}: {error}); "
                "start one with: python tools.py serve CORPUS 8000"
            ) from None
        return results

    def report(self) -> str:
        """Return the number of requests, and seconds waited."""
        return f"{self.counts['requests']} requests, {self.http.waited:.1f} s waited between tries"


def _read_hit(hit: dict[str, Any]) -> Passage:
    """Return the passage of a hit: with its score beside it, or by itself."""
    document = hit.get("document") or hit
    return split_passage(document["contents"])
