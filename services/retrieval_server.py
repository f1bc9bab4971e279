"""A retrieval server over a BM25 index, which speaks Search-R1's protocol.

POST /retrieve {"queries": ["..", ..], "topk": 3, "return_scores": true} is answered with
{"result": [[{"document": {"id": .., "contents": ..}, "score": 1.5}, ..], ..]}, a list for each
query; without return_scores the documents stand in the lists by themselves.
"""

import json
import socket
import threading
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.bm25 import BM25

EXPECTED = (
    'expected POST /retrieve {"queries": [texts], "topk": a number, "return_scores": true or false}'
)


class RetrievalRequest(NamedTuple):
    """What a client asks for."""

    queries: list[str]
    top_k: int
    return_scores: bool


class RetrievalServer:
    """A server that listens from the start, and answers while `run` runs."""

    def __init__(self, search: BM25, port: int, host: str = "127.0.0.1") -> None:
        """Take a port; 0 takes one that is free.

        Raises OSError for a port that is in use, and OverflowError for a number that is none.
        """
        self.search = search
        self.search_lock = threading.Lock()
        self.socket = socket.create_server((host, port))
        self.address = f"http://{host}:{self.socket.getsockname()[1]}/retrieve"
        app = Starlette(
            routes=[
                Route("/retrieve", self._retrieve, methods=["POST"]),
                Route("/retrieve/", self._retrieve, methods=["POST"]),
                Route("/{path:path}", _refuse, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
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
            retrieval = _read_request(await request.body(), self.search.top_k)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return await _refuse(request)
        result = await run_in_threadpool(self._find_documents, retrieval)
        return _json_response({"result": result})

    def _find_documents(self, request: RetrievalRequest) -> list[list[Any]]:
        result: list[list[Any]] = []
        if not request.queries:
            return result
        # The passages are read by seeking in one file, so one search at a time.
        with self.search_lock:
            numbers, scores = self.search.ranked(request.queries, request.top_k)
            for row_numbers, row_scores in zip(numbers, scores, strict=True):
                hits: list[Any] = []
                for number, score in zip(row_numbers, row_scores, strict=True):
                    if number < 0:
                        continue
                    document = self.search.passages[int(number)]
                    if request.return_scores:
                        hits.append({"document": document, "score": float(score)})
                    else:
                        hits.append(document)
                result.append(hits)
        return result


def _read_request(body: bytes, default_top_k: int) -> RetrievalRequest:
    """Parse the body of a request; any of several errors says that it is none."""
    request = json.loads(body)
    queries = request["queries"]
    top_k = request.get("topk")
    if top_k is None:
        top_k = default_top_k
    # True and False are no numbers, though Python counts them as integers.
    if type(top_k) is not int or top_k < 1:
        raise ValueError("topk")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("queries")
    return RetrievalRequest(queries, top_k, bool(request.get("return_scores", False)))


async def _refuse(request: Request) -> Response:
    """Answer a request that is none: to another path, or with something else in it."""
    return _json_response({"error": EXPECTED}, status=422)


def _json_response(content: dict[str, Any], status: int = 200) -> Response:
    """Return a JSON answer of ASCII alone, so that any text can be sent."""
    return Response(json.dumps(content), status_code=status, media_type="application/json")
