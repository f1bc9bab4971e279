"""Search by a retrieval server that speaks Search-R1's protocol.

That is Search-R1's own server, or `python tools.py serve CORPUS PORT`.
"""

from collections import Counter
from typing import Any

import requests

from common import ranks
from data.passages import Passage, join_passages, split_passage
from data.trajectory import Observation, Provenance
from services.http import PoliteSession
from services.outage import FAILED_TEXT, Outage

BATCH = 64  # queries that a server gets at once
TIMEOUT = 120.0  # seconds for the answer to them
LARGEST_BODY = 2**24  # bytes of it
LONGEST_QUERY = 2000  # letters that are sent of a query
LONGEST_PASSAGE = 100_000  # letters; what is longer is a book, and no passage


class Retriever:
    """A search tool: queries in, observations out."""

    def __init__(self, url: str, top_k: int) -> None:
        """Take the address of the server; top_k: passages of an observation."""
        self.url = url
        self.top_k = top_k
        self.http = PoliteSession(gap=0.0, timeout=TIMEOUT, largest_body=LARGEST_BODY)
        self.counts: Counter[str] = Counter()
        self.outage = Outage(
            self.http,
            f"--corpus={url}",
            never_answered="not a retrieval server that answers; "
            "start one with: python tools.py serve CORPUS 8000",
            way_out="start the server again",
        )

    def __call__(self, queries: list[str]) -> list[Observation]:
        """Return an observation for each query; one that failed says so.

        Of several processes the first asks.
        Raises UserError for a server that never answered, or stays down (see services/outage.py).
        """
        return ranks.of_first(lambda: self._ask(queries))

    def _ask(self, queries: list[str]) -> list[Observation]:
        self.counts["queries"] += len(queries)
        answers = self.outage.ask(queries, self._search_all)
        self.counts["lost"] += answers.count(None)
        return [_observe(passages) for passages in answers]

    def _search_all(self, queries: list[str]) -> list[list[Passage] | None]:
        answers: list[list[Passage] | None] = []
        for start in range(0, len(queries), BATCH):
            answers += self._retrieve(queries[start : start + BATCH])
        return answers

    def _retrieve(self, queries: list[str]) -> list[list[Passage] | None]:
        """Return the passages of each query of one request, None for each that failed."""
        if self.outage.is_down:
            return [None] * len(queries)

        self.counts["requests"] += 1
        request = {
            "queries": [query[:LONGEST_QUERY] for query in queries],
            "topk": self.top_k,
            "return_scores": True,
        }
        try:
            answers = self.http.send(
                "POST",
                self.url,
                lambda answer: self._read_answer(answer, len(queries)),
                json=request,
            )
        except requests.RequestException as error:
            self.outage.count_failure(str(error))
            return [None] * len(queries)
        self.outage.count_answer()
        return answers

    def _read_answer(self, answer: Any, count: int) -> list[list[Passage] | None]:
        """Return the passages of `count` queries; raise ValueError for what is no answer."""
        if not isinstance(answer, dict) or not isinstance(answer.get("result"), list):
            raise ValueError('no answer with a list "result"')
        rows = answer["result"]
        if len(rows) != count:
            # They could be the results of any of them.
            raise ValueError(f"{len(rows)} results for {count} queries")
        answers = [self._read_row(row) for row in rows]
        if all(passages is None for passages in answers):
            raise ValueError('no result is a list of {"document": {"contents": text}}')
        return answers

    def _read_row(self, row: Any) -> list[Passage] | None:
        """Return the passages of one query, None where one of them can't be read.

        The others would not be what the server says to the query.
        """
        if not isinstance(row, list):
            return None
        passages = [_read_hit(hit) for hit in row[: self.top_k]]
        readable = [passage for passage in passages if passage is not None]
        return readable if len(readable) == len(passages) else None

    def report(self) -> str:
        """Return the number of requests, the share of searches lost, and seconds waited."""
        share = self.counts["lost"] / max(1, self.counts["queries"])
        return (
            f"{self.counts['requests']:,} requests, {self.outage.report()}; "
            f"{self.counts['lost']:,} searches lost ({share:.1%}), "
            f"{self.http.waited:.1f} s waited between tries"
        )


def _observe(passages: list[Passage] | None) -> Observation:
    if passages is None:
        return Observation(FAILED_TEXT, Provenance.FAILED)
    return Observation(join_passages(passages))


def _read_hit(hit: Any) -> Passage | None:
    """Return the passage of a hit, with its score beside it or by itself; None for another form."""
    document = hit.get("document", hit) if isinstance(hit, dict) else None
    contents = document.get("contents") if isinstance(document, dict) else None
    if not isinstance(contents, str) or len(contents) > LONGEST_PASSAGE:
        return None
    return split_passage(contents)
