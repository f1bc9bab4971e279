"""A retrieval server over a BM25 index, which speaks Search-R1's protocol.

POST /retrieve {"queries": ["..", ..], "topk": 3, "return_scores": true} is answered with
{"result": [[{"document": {"id": .., "contents": ..}, "score": 1.5}, ..], ..]}, a list for each
query; without return_scores the documents stand in the lists by themselves. A request that is none,
or asks for too much, gets a status 4xx and {"error": the reason}.
"""

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.files import parse_json
from services.bm25 import BM25

EXPECTED = (
    'expected POST /retrieve {"queries": [texts], "topk": a number, "return_scores": true or false}'
)
# A request may ask for so much. Search-R1 sends the queries of all its rollouts at once.
LARGEST_BODY = 2**22  # bytes
MOST_QUERIES = 2048
LONGEST_QUERY = 2000  # letters
LARGEST_TOP_K = 100
MOST_PASSAGES = 10_000  # queries x topk
SECONDS = 30.0  # that the head of a request may take, and its body too
SECONDS_IN_LINE = 30.0  # within which the last query of a request must have its turn
BATCH = 64  # queries that are searched for at once; no request keeps others waiting for longer


class RefusedRequestError(Exception):
    """A request that is not answered: a status of HTTP, and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(eq=False)
class Search:
    """A request, or a part of one, and what was found; two that ask the same are not one."""

    queries: list[str]
    top_k: int
    return_scores: bool
    results: list[str] = field(default_factory=list)  # JSON for each query, once it is found


class Connection(H11Protocol):
    """A connection of uvicorn's, which is closed where the head of a request does not come.

    By itself uvicorn waits for ever for it, and a process may hold so many connections alone.
    """

    head_timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Stop waiting when a request has begun."""
        super().data_received(data)
        if self._is_answering():
            self.head_timer.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request, if it is not here already."""
        super().on_response_complete()
        self.head_timer.cancel()
        if not self._is_answering():
            self.head_timer = self.loop.call_later(SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self.head_timer.cancel()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class RetrievalServer:
    """A server that listens from the start, and answers while `run` runs."""

    def __init__(self, search: BM25, port: int, host: str = "127.0.0.1") -> None:
        """Take a port; 0 takes one that is free.

        Raises OSError for a port that is in use, and OverflowError for a number that is none.
        """
        self.search = search
        # The passages are read by seeking in one file, so one thread searches at a time. Whoever
        # has its turn also searches for those who wait, since many queries at once cost less each.
        self.turn = asyncio.Lock()
        self.waiting: list[Search] = []
        self.socket = socket.create_server((host, port))
        self.address = f"http://{host}:{self.socket.getsockname()[1]}/retrieve"
        app = Starlette(
            routes=[
                Route("/retrieve", self._retrieve, methods=["POST"]),
                Route("/retrieve/", self._retrieve, methods=["POST"]),
                Route("/{path:path}", _refuse_path, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(
            app, http=Connection, log_level="warning", access_log=False, lifespan="off"
        )
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        """Print the address and answer requests, until `stop` is called or Ctrl-C pressed."""
        print(
            f"serving {len(self.search.passages):,} passages: --corpus={self.address}", flush=True
        )
        self.server.run(sockets=[self.socket])

    def stop(self) -> None:
        """Let `run` return, once the requests under way are answered."""
        self.server.should_exit = True

    async def _retrieve(self, request: Request) -> Response:
        try:
            body = await _read_body(request)
            results = await self._find(_read_request(body, self.search.top_k))
        except RefusedRequestError as refusal:
            return _refuse(refusal.status, refusal.reason)
        except ClientDisconnect:
            # Nobody reads this.
            return _refuse(400, "the request was cut")
        return _json_response(f'{{"result": [{", ".join(results)}]}}')

    async def _find(self, request: Search) -> list[str]:
        """Return the results of a request, as JSON for each query."""
        end = time.monotonic() + SECONDS_IN_LINE
        results: list[str] = []
        for start in range(0, len(request.queries), BATCH):
            queries = request.queries[start : start + BATCH]
            part = Search(queries, request.top_k, request.return_scores)
            self.waiting.append(part)
            async with self.turn:
                if part in self.waiting and time.monotonic() > end:
                    self.waiting.remove(part)
                    raise RefusedRequestError(503, "too many requests at once; try again later")
                if part in self.waiting:
                    await run_in_threadpool(self._search_for, self._take_batch(part))
            if not part.results:
                raise RefusedRequestError(500, "the search broke off")
            results += part.results
        return results

    def _take_batch(self, first: Search) -> list[Search]:
        """Take from those who wait: the first, and others that want as many passages as it."""
        batch = [first]
        room = BATCH - len(first.queries)
        for other in self.waiting:
            if other is not first and other.top_k == first.top_k and len(other.queries) <= room:
                batch.append(other)
                room -= len(other.queries)
        self.waiting = [search for search in self.waiting if search not in batch]
        return batch

    def _search_for(self, batch: list[Search]) -> None:
        """Find the results of searches with one top_k."""
        queries = [query for search in batch for query in search.queries]
        numbers, scores = self.search.ranked(queries, batch[0].top_k)
        row = 0
        for search in batch:
            for _ in search.queries:
                hits = self._hits(numbers[row], scores[row], search.return_scores)
                # As ASCII alone, so that any text can be sent.
                search.results.append(json.dumps(hits))
                row += 1

    def _hits(self, numbers: Any, scores: Any, return_scores: bool) -> list[Any]:
        """Return the documents of one query, with their scores where they are asked for."""
        hits: list[Any] = []
        for number, score in zip(numbers, scores, strict=True):
            if number < 0:
                continue
            document = self.search.passages[int(number)]
            if return_scores:
                hits.append({"document": document, "score": float(score)})
            else:
                hits.append(document)
        return hits


async def _read_body(request: Request) -> bytes:
    """Return the body; raise RefusedRequestError for one that is too large, or comes too slowly."""
    too_large = RefusedRequestError(413, f"a request may have {LARGEST_BODY:,} bytes")
    if int(request.headers.get("content-length", "0")) > LARGEST_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > LARGEST_BODY:
                    raise too_large
    except TimeoutError:
        raise RefusedRequestError(408, f"not here within {SECONDS:.0f} s") from None
    return bytes(body)


def _read_request(body: bytes, default_top_k: int) -> Search:
    """Parse the body of a request; raise RefusedRequestError for one that is none, or too much."""
    try:
        request = parse_json(body)
        queries = request["queries"]
        top_k = request.get("topk")
        return_scores = bool(request.get("return_scores", False))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RefusedRequestError(422, EXPECTED) from None
    if top_k is None:
        top_k = default_top_k
    # True and False are no numbers, though Python counts them as integers.
    if type(top_k) is not int or top_k < 1:
        raise RefusedRequestError(422, EXPECTED)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RefusedRequestError(422, EXPECTED)
    limits = (
        (len(queries), MOST_QUERIES, "queries"),
        (max(map(len, queries), default=0), LONGEST_QUERY, "letters of a query"),
        (top_k, LARGEST_TOP_K, "topk"),
        (len(queries) * top_k, MOST_PASSAGES, "queries x topk"),
    )
    for value, limit, name in limits:
        if value > limit:
            raise RefusedRequestError(422, f"{name}: {value:,}, and at most {limit:,} are answered")
    return Search(queries, top_k, return_scores)


async def _refuse_path(request: Request) -> Response:
    """Answer a request to another path."""
    return _refuse(422, EXPECTED)


def _refuse(status: int, reason: str) -> Response:
    return _json_response(json.dumps({"error": reason}), status)


def _json_response(text: str, status: int = 200) -> Response:
    return Response(text, status_code=status, media_type="application/json")
