"""The retrieval server and its client: Search-R1's protocol (services/retrieval*.py)."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT

from common.errors import UserError
from services import http
from services.bm25 import BM25, open_index
from services.retrieval import Retriever
from services.retrieval_server import EXPECTED, RetrievalServer

PASSAGES = [
    {"id": "p0", "contents": '"Silver River"\nA film by Eva Moss.'},
    {"id": "p1", "contents": '"Iron Hill"\nA band from Alder Bay.'},
    {"id": "p2", "contents": '"Eva Moss"\nA painter who directed Silver River.'},
]


@pytest.fixture
def serve_index() -> Iterator[Any]:
    """Return a function that serves an index in a thread and returns its address."""
    servers = []

    def start(index: Any) -> Any:
        server = RetrievalServer(index, port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server.address

    yield start
    for server, thread in servers:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def retrieve(address: Any, **request: pytest.FixtureRequest) -> Any:
    return requests.post(address, json=request, timeout=20)


def test_server_and_client(serve_index: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The client gets from the server what the index itself says."""
    index = BM25(PASSAGES, 2)
    address = serve_index(index)
    queries = ["Silver River", "who is Eva Moss", "zebra"]
    scored = retrieve(address, queries=queries, topk=1, return_scores=True).json()["result"]
    ids = [[hit["document"]["id"] for hit in row] for row in scored]
    assert ids == [["p0"], ["p2"], []]
    assert scored[0][0]["score"] > 0
    plain = retrieve(address, queries=queries, topk=1).json()["result"]
    assert plain == [[hit["document"] for hit in row] for row in scored]
    assert plain[0] == [PASSAGES[0]]
    assert len(retrieve(address, queries=["Eva Moss"]).json()["result"][0]) == 2
    assert retrieve(address, queries=[]).json() == {"result": []}
    assert Retriever(address, 2)(queries) == index(queries)
    assert capsys.readouterr().out == f"serving 3 passages: --corpus={address}\n"


@pytest.mark.parametrize(
    "bad_request",
    [
        {"topk": 1},
        {"queries": ["x"], "topk": "many"},
        {"queries": ["x"], "topk": 0},
        {"queries": ["x"], "topk": True},
        {"queries": "x"},
        {"queries": {"x": 1}},
        {"queries": [1]},
        ["x"],
        None,
    ],
)
def test_a_bad_request_is_refused(serve_index: Any, bad_request: Any) -> None:
    """The answer says what is expected."""
    address = serve_index(BM25(PASSAGES, 2))
    answer = requests.post(address, data=json.dumps(bad_request), timeout=20)
    assert answer.status_code == 422
    assert answer.json() == {"error": EXPECTED}


def test_what_is_no_json_and_another_path_are_refused(serve_index: Any) -> None:
    address = serve_index(BM25(PASSAGES, 2))
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        assert requests.post(address, data=body, timeout=20).status_code == 422
    request = {"queries": ["x"]}
    other = address.replace("/retrieve", "/search")
    assert requests.post(other, json=request, timeout=20).json() == {"error": EXPECTED}
    assert requests.post(f"{address}/", json=request, timeout=20).status_code == 200


def test_many_queries_go_in_pieces(serve_index: Any) -> None:
    """Guards: one request with thousands of queries, which no server answers in time."""
    sizes = []

    class CountingBM25(BM25):
        def ranked(self, queries: list[str], top_k: Any = None) -> Any:
            sizes.append(len(queries))
            return super().ranked(queries, top_k)

    client = Retriever(serve_index(CountingBM25(PASSAGES, 1)), 1)
    observations = client(["Iron Hill"] * 150)
    texts = [observation.text for observation in observations]
    assert texts == ["Iron Hill 1: A band from Alder Bay."] * 150
    assert sizes == [64, 64, 22]
    assert client.report().startswith("3 requests")


def test_the_server_answers_many_at_once(serve_index: Any, tmp_path: Path) -> None:
    """Each client gets its own passages.

    Guards: threads that seek in one file of passages, and read each other's.
    """
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for number in range(400):
            words = f"w{number} " * (number % 50 + 1)
            passage = {"id": str(number), "contents": f'"Number {number}"\nall {words}'}
            file.write(json.dumps(passage) + "\n")
    address = serve_index(open_index(path, 1, tmp_path))
    request = {"queries": ["all"] * 10, "topk": 200}
    expected = retrieve(address, **request).json()
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(retrieve(address, **request).json()))
        for _ in range(8)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(expected["result"][0]) == 200
    assert answers == [expected] * 8


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    """The line with the address comes once the server listens; Ctrl-C ends it in good order."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools.py"), "serve", str(path), "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("index of 3 passages made")
    announcement, _, address = process.stdout.readline().strip().partition("--corpus=")
    assert announcement == "serving 3 passages: "
    assert retrieve(address, queries=["Iron Hill"], topk=1).json() == {"result": [[PASSAGES[1]]]}
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.strip() == "stopped; what is finished is kept"


def test_a_server_that_answers_nonsense(serve: Any) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"query": {}}')

        def log_message(self, format: Any, *arguments: Any) -> None:
            pass

    with pytest.raises(UserError, match=r"not a retrieval server that answers.*tools\.py serve"):
        Retriever(serve(Handler), 2)(["x"])


def test_a_server_that_answers_too_little(serve: Any) -> None:
    """Results for fewer queries than were asked could be those of any of them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"result": [[]]}')

        def log_message(self, format: Any, *arguments: Any) -> None:
            pass

    with pytest.raises(UserError, match="1 results for 2 queries"):
        Retriever(serve(Handler), 2)(["x", "y"])


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TRIES", 1)
    with pytest.raises(UserError, match=r"--corpus=http://127\.0\.0\.1:1/retrieve"):
        Retriever("http://127.0.0.1:1/retrieve", 2)(["x"])
