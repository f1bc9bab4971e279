"""The retrieval server and its client: Search-R1's protocol (services/retrieval*.py)."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT

from common.errors import UserError
from services import http, retrieval, retrieval_server
from services.bm25 import BM25, open_index
from services.retrieval import Retriever
from services.retrieval_server import EXPECTED, RetrievalServer
from speed.serving import resident_bytes

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
    request = {"queries": ["all"] * 10, "topk": 100}
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
    assert len(expected["result"][0]) == 100
    assert answers == [expected] * 8


@pytest.mark.usefixtures("signals_of_a_shell")
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


# ---- too much, too slow --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "queries, top_k, reason",
    [
        (["x"], 77_734, "topk: 77,734, and at most 100 are answered"),
        (["x"] * 3000, 3, "queries: 3,000, and at most 2,048 are answered"),
        (["x"] * 200, 80, "queries x topk: 16,000, and at most 10,000 are answered"),
        (["x" * 2001], 3, "letters of a query: 2,001, and at most 2,000 are answered"),
    ],
)
def test_a_request_for_too_much_is_refused(
    serve_index: Any, queries: list[str], top_k: int, reason: str
) -> None:
    """Guards: one request for all passages, which took a minute and a gigabyte."""
    answer = retrieve(serve_index(BM25(PASSAGES, 2)), queries=queries, topk=top_k)
    assert answer.status_code == 422
    assert answer.json() == {"error": reason}


def send_bytes(address: str, *pieces: bytes) -> bytes:
    """Send the pieces of a request as they are, and return the answer."""
    host, port = address.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while not answer.endswith((b"}", b"received.")):
            answer += connection.recv(65536)
    return answer


@pytest.mark.parametrize(
    "length, body",
    [(10**18, b"{}"), (5_000_000, b"{}"), (None, b"1000000\r\n" + b" " * (2**22 + 1))],
)
def test_a_body_that_is_too_large(serve_index: Any, length: Any, body: bytes) -> None:
    """It is refused by its length, or else, sent in chunks, once it is too long."""
    header = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    head = f"POST /retrieve HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode()
    answer = send_bytes(serve_index(BM25(PASSAGES, 2)), head, body)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.endswith(b'{"error": "a request may have 4,194,304 bytes"}')


def test_a_length_beyond_all_bounds(serve_index: Any) -> None:
    """Guards: a traceback in place of an answer."""
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000000000000\r\n\r\n"
    assert send_bytes(serve_index(BM25(PASSAGES, 2)), head).startswith(b"HTTP/1.1 400 ")


def test_a_slow_client(serve_index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not come is waited for a while; others are answered meanwhile."""
    monkeypatch.setattr(retrieval_server, "SECONDS", 1.0)
    address = serve_index(BM25(PASSAGES, 2))
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(send_bytes(address, head, b"{")))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    assert retrieve(address, queries=["Iron Hill"], topk=1).json() == {"result": [[PASSAGES[1]]]}
    assert not answers
    for thread in threads:
        thread.join()
    assert len(answers) == 50
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "before", [b"", b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"]
)
def test_a_head_that_does_not_come(
    serve_index: Any, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    """The connection is closed, also after a request that was answered.

    Guards: clients that say nothing, who in time hold all connections that a process may have.
    """
    monkeypatch.setattr(retrieval_server, "SECONDS", 1.0)
    host, port = serve_index(BM25(PASSAGES, 2)).split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(before)
        answer = b""
        while before and not answer.endswith(b'"}'):
            answer += connection.recv(65536)
        connection.sendall(b"POST /retr")
        assert connection.recv(65536) == b""


def test_a_server_that_is_behind(serve_index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has waited for too long is refused, before it takes time of its own."""
    monkeypatch.setattr(retrieval_server, "SECONDS_IN_LINE", -1.0)
    answer = retrieve(serve_index(BM25(PASSAGES, 2)), queries=["Iron Hill"])
    assert answer.status_code == 503
    assert answer.json() == {"error": "too many requests at once; try again later"}


def test_a_client_that_goes_away(serve_index: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """It leaves no traceback behind."""
    address = serve_index(BM25(PASSAGES, 2))
    host, port = address.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert retrieve(address, queries=["x"]).status_code == 200
    assert capfd.readouterr().err == ""


def test_requests_that_wait_are_searched_for_together(serve_index: Any) -> None:
    """Each gets its own results, with or without scores, and those of another topk wait."""
    sizes = []

    class SlowBM25(BM25):
        def ranked(self, queries: list[str], top_k: Any = None) -> Any:
            sizes.append((len(queries), top_k))
            time.sleep(0.2)
            return super().ranked(queries, top_k)

    address = serve_index(SlowBM25(PASSAGES, 1))
    titles = ["Silver River", "Iron Hill"] * 10
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        answers[number] = retrieve(
            address, queries=[titles[number]], topk=1 + number // 15, return_scores=number % 3 == 0
        ).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) < 10
    assert sum(count for count, _ in sizes) == 20
    assert {top_k for _, top_k in sizes} == {1, 2}
    for number, answer in answers.items():
        hit = answer["result"][0][0]
        document = hit["document"] if number % 3 == 0 else hit
        assert document == PASSAGES[number % 2]


def test_many_clients_at_once(serve_index: Any) -> None:
    """Guards: resets of connections, where only five could wait to be accepted."""
    address = serve_index(BM25(PASSAGES, 1))
    start = threading.Barrier(128)
    statuses = []

    def ask() -> None:
        start.wait()
        statuses.append(retrieve(address, queries=["Iron Hill"]).status_code)

    threads = [threading.Thread(target=ask) for _ in range(128)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 128


@pytest.mark.slow
def test_serving_for_long(tmp_path: Path) -> None:
    """The server's memory stays as it is; SERVE_SECONDS says for how long it is asked."""
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for number in range(20_000):
            contents = f'"Number {number}"\nIt is w{number % 997} and w{number % 1009}, of many.'
            file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools.py"), "serve", str(path), "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    address = process.stdout.readline().strip().partition("--corpus=")[2]
    end = time.monotonic() + float(os.environ.get("SERVE_SECONDS", "60"))
    sizes = []
    try:
        while time.monotonic() < end:
            for number in range(40):
                queries = [f"w{number} of many"] * (number % 70)
                assert retrieve(address, queries=queries, topk=50).status_code == 200
                assert retrieve(address, queries=queries, topk=101).status_code == 422
            sizes.append(resident_bytes(process.pid))
    finally:
        process.terminate()
        process.wait(20)
    # The first round maps the index and fills the pools of threads.
    assert max(sizes) - sizes[1] < 8 * 2**20


# ---- the client ----------------------------------------------------------------------------------
def test_the_client_keeps_to_what_the_server_takes(serve_index: Any) -> None:
    """A query is sent up to the longest that our server answers; the largest request fits too."""
    assert retrieval.LONGEST_QUERY == retrieval_server.LONGEST_QUERY
    client = Retriever(serve_index(BM25(PASSAGES, 1)), retrieval_server.LARGEST_TOP_K)
    longest = "Iron Hill " + "\u4e2d" * 5000
    observations = client([longest] * retrieval.BATCH)
    assert [observation.is_lost for observation in observations] == [False] * retrieval.BATCH


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TRIES", 1)
    search = Retriever("http://127.0.0.1:1/retrieve", 2)
    search(["x"])
    search(["x"])
    with pytest.raises(UserError, match=r"--corpus=http://127\.0\.0\.1:1/retrieve"):
        search(["x"])
