"""Searches whose server answers badly: none is lost without a word, doubled or learned from."""

import json
import random
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import faulty_server
import pytest
from faulty_server import FAULTS, SLOW
from scripted_decoder import ScriptedDecoder
from test_wikipedia import FAILED, RIVER, MediaWiki
from wikipedia import wikipedia as package

from autocoa import rollout
from common.errors import OutageError, UserError
from common.settings import RolloutSettings
from data.trajectory import Codec, Observation
from services import http, outage, retrieval
from services.retrieval import Retriever
from services.wikipedia import Wikipedia
from tools import Library

QUERIES = [f"number {number}" for number in range(12)]


def found(query: str) -> Observation:
    """Return what the server below finds, as an observation."""
    return Observation(f"{query} 1: It is {query}.")


class SearchServer:
    """A retrieval server that answers some of its requests with a fault."""

    def __init__(self) -> None:
        self.address = ""
        self.faults: list[str] = []  # of the next requests, "" for none; then there are none
        self.sent_faults = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.send(self, answer(request["queries"]))

            def do_GET(self) -> None:
                # Where a redirect made a GET of the request.
                server.send(self, b"{}")

            def log_message(self, format: Any, *arguments: Any) -> None:
                pass

        self.handler = Handler

    def send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        fault = self.faults.pop(0) if self.faults else ""
        self.sent_faults += bool(fault)
        faulty_server.send(handler, body, fault)


def answer(queries: list[str]) -> bytes:
    hits = [[{"document": {"contents": f'"{query}"\nIt is {query}.'}}] for query in queries]
    return json.dumps({"result": hits}).encode()


def some_faults(fault: str, count: int) -> list[str]:
    """Return a fault for three in ten of so many requests; the first is answered."""
    dice = random.Random(fault)
    return [""] + [fault if dice.random() < 0.3 else "" for _ in range(count - 1)]


@pytest.fixture
def server(serve: Any, monkeypatch: pytest.MonkeyPatch) -> SearchServer:
    """Return a server that gets one query a request; nobody waits before asking it again."""
    monkeypatch.setattr(retrieval, "BATCH", 1)
    monkeypatch.setattr(retrieval, "TIMEOUT", 0.25)
    monkeypatch.setattr(http.PoliteSession, "wait", lambda session, seconds: None)
    monkeypatch.setattr(outage, "WAITS", (0.0,) * 3)
    server = SearchServer()
    server.address = serve(server.handler)
    return server


# ---- retrieval servers ---------------------------------------------------------------------------
@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_answer_of_a_retrieval_server(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """It costs that search at most, also where it is the very first answer.

    Guards: one 404 or null that ended a run; an answer that came for ever; a RecursionError.
    """
    monkeypatch.setattr(http, "TRIES", 1)
    search = Retriever(server.address, 1)
    server.faults = [fault]
    assert search(QUERIES[:3]) == [FAILED, found("number 1"), found("number 2")]
    assert "1 searches lost (33.3%)" in search.report()


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_answers_in_rollouts(
    server: SearchServer, codec: Codec, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Of three bad answers in ten, every rollout is there once, and those that lost one say so."""
    monkeypatch.setattr(http, "TRIES", 1)
    count = 6 if fault in SLOW else 12
    check_rollouts(server, codec, some_faults(fault, count), count)
    assert server.sent_faults > 0


@pytest.mark.slow
def test_a_thousand_questions_with_all_faults(
    server: SearchServer, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three in ten answers are bad, of all kinds in turns, and each request gets its four tries."""
    faults = [fault for fault in FAULTS if not fault.startswith("redirect")] * 200
    dice = random.Random(0)
    server_faults = [fault if dice.random() < 0.3 else "" for fault in faults]
    check_rollouts(server, codec, server_faults, 1000)


def check_rollouts(server: SearchServer, codec: Codec, faults: list[str], count: int) -> None:
    """Roll out questions that search for their own number each, and look at what they were told."""
    queries = [f"number {number}" for number in range(count)]
    lines = [
        f"<begin_search> {query}</end_search> so</think>\\boxed{{ yes}}<eos>" for query in queries
    ]
    prompts = [codec.prompt(query) for query in queries]
    search = Retriever(server.address, 1)
    server.faults = faults
    trajectories = rollout(
        ScriptedDecoder(codec, *lines),
        codec,
        prompts,
        Library({"search": search}),
        RolloutSettings(max_len=200, batch_rows=count),
    )
    assert len(trajectories) == count
    lost = 0
    for query, prompt, trajectory in zip(queries, prompts, trajectories, strict=True):
        assert trajectory.ids[: len(prompt)] == prompt
        assert trajectory.queries == [query]
        assert trajectory.observations in ([found(query)], [FAILED])
        assert trajectory.has_lost_observation == (trajectory.observations == [FAILED])
        lost += trajectory.has_lost_observation
    assert f"{lost} searches lost ({lost / count:.1%})" in search.report()


def test_a_bad_answer_is_tried_again(server: SearchServer) -> None:
    """With its four tries, a search gets over three bad answers of any kind."""
    search = Retriever(server.address, 1)
    server.faults = ["404", "null", "nested"]
    assert search(["number 1"]) == [found("number 1")]
    assert "0 searches lost" in search.report()


def test_an_outage_is_waited_for(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From eight failures in a row on the tool waits, says so, and asks again for what failed.

    So a server that is started again costs no search of that call.
    """
    monkeypatch.setattr(http, "TRIES", 1)
    search = Retriever(server.address, 1)
    search(["number 0"])
    server.faults = ["503"] * 10
    assert search(QUERIES) == [found(query) for query in QUERIES]
    out = capsys.readouterr().out
    assert out.count("8 failures in a row, the last one: status 503") == 1
    assert out.count("asking again in 0 s") == 3
    assert "10 failed" in search.report()
    assert "0 searches lost" in search.report()


def test_an_outage_that_stays_ends_the_run(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how to go on; in the end no more is asked than is needed to know."""
    monkeypatch.setattr(http, "TRIES", 1)
    search = Retriever(server.address, 1)
    search(["number 0"])
    server.faults = ["503"] * 100
    with pytest.raises(OutageError, match=r"--corpus=.*11 failures in a row.*the server again"):
        search(QUERIES)
    assert server.sent_faults == 11


@pytest.mark.parametrize("fault", ["404", "html", "wrong types"])
def test_a_server_that_never_answered(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """It is no retrieval server, and not waited for; the message names the command of one."""
    monkeypatch.setattr(http, "TRIES", 1)
    server.faults = [fault] * 100
    with pytest.raises(UserError, match=r"not a retrieval server that answers.*tools\.py serve"):
        Retriever(server.address, 1)(QUERIES)
    assert server.sent_faults == 3


@pytest.mark.parametrize(
    "row",
    [
        7,
        {"document": {}},
        [7],
        [{"document": None}],
        [{"document": {"contents": None}}],
        [{"document": {"contents": "x" * 200_000}}],
    ],
)
def test_a_result_that_cannot_be_read(serve: Any, monkeypatch: Any, row: Any) -> None:
    """It fails its own query; those beside it in the request are answered."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            good = [{"contents": '"number 1"\nIt is number 1.'}] * 9
            faulty_server.send(self, json.dumps({"result": [good, row]}).encode())

        def log_message(self, format: Any, *arguments: Any) -> None:
            pass

    # More hits than were asked for are left out.
    assert Retriever(serve(Handler), 1)(["number 1", "x"]) == [found("number 1"), FAILED]


def test_a_passage_without_a_title(serve: Any) -> None:
    """It begins with its number. Guards: a text that passed for a title."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            hits = [[{"document": {"contents": "It stands by the sea."}}]]
            faulty_server.send(self, json.dumps({"result": hits}).encode())

        def log_message(self, format: Any, *arguments: Any) -> None:
            pass

    assert Retriever(serve(Handler), 1)(["x"]) == [Observation("1: It stands by the sea.")]


# ---- Wikipedia -----------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_answers_of_wikipedia(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    """Of three bad answers in ten, the cache holds what a search without faults says, or nothing.

    Guards: an answer that lacks the page which came as 200,000 brackets, kept for good.
    """
    wiki = MediaWiki()
    monkeypatch.setattr(http, "TRIES", 2)
    monkeypatch.setattr(outage, "WAITS", (0.0,) * 3)
    monkeypatch.setattr(http.PoliteSession, "wait", lambda session, seconds: None)
    search = Wikipedia(2, path=str(tmp_path / "w.sqlite"), threads=1)
    search.http.gap = 0.0
    search.http.timeout = 0.25
    monkeypatch.setattr(package, "API_URL", serve(wiki.handler) + "/w/api.php")
    queries = QUERIES[: 2 if fault in SLOW else 8]

    wiki.faults = some_faults(fault, 40)
    observations = search(queries)
    for observation in observations:
        assert observation.is_lost or observation.text in parts_of(RIVER.text)
    kept = search.cached_observations()
    assert set(kept.values()) <= {RIVER.text}
    for query, observation in zip(queries, observations, strict=True):
        assert (query in kept) == (observation == RIVER)
    assert f"{len(queries) - len(kept)} errors" in search.report()

    # What was not kept is asked for again, and then it is right.
    wiki.faults = []
    assert search(queries) == [RIVER] * len(queries)


def parts_of(observation: str) -> set[str]:
    """Return the texts of an observation of two passages, one of which may be missing."""
    first, second = observation.split("\n ")
    return {observation, first, re.sub(r" 2: ", " 1: ", second)}
