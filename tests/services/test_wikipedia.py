"""The live search on Wikipedia, over loopback HTTP with its faults (services/wikipedia.py)."""

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import faulty_server
import pytest
import wikipedia

from autocoa import random_stream, rollout
from common.errors import OutageError, UserError
from common.settings import RolloutSettings
from data.trajectory import Observation, Provenance
from model import LM
from services import outage
from services.http import TRIES
from services.wikipedia import USER_AGENT, Wikipedia
from tools import Library

RIVER = Observation(
    "Silver River 1: Silver River is a thing. It is so. </search_result>\n "
    "Iron Hill 2: Iron Hill is a thing. It is so. </search_result>"
)
HILL = Observation("Iron Hill 1: Iron Hill is a thing. It is so. </search_result>")
NOTHING = Observation("Nothing found.")
FAILED = Observation("The search failed.", Provenance.FAILED)
MISSED = Observation("This search is not in the cache.", Provenance.MISSED)

# What the small MediaWiki finds; any other search finds the river and the hill.
SEARCH_RESULTS = {
    "nothing": [],
    "mercury": ["Mercury"],
    "gone": ["Gone", "Iron Hill"],
    "old name": ["Old Name"],
    "ring": ["Ring A"],
}
REDIRECTS = {"Old Name": "New Name", "Ring A": "Ring B", "Ring B": "Ring A"}
MEANINGS = "<ul><li><a>Mercury (planet)</a></li><li><a>Mercury (god)</a></li></ul>"


class MediaWiki:
    """A MediaWiki in small, with faults."""

    def __init__(self) -> None:
        self.faults = []  # faults of the next answers, by name (faulty_server.py)
        self.requests = []  # parameters of what came in
        self.agents = set()
        self.address = ""
        wiki = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parameters = parse_qs(urlparse(self.path).query)
                request = {name: values[0] for name, values in parameters.items()}
                wiki.requests.append(request)
                wiki.agents.add(self.headers["User-Agent"])
                fault = wiki.faults.pop(0) if wiki.faults else ""
                faulty_server.send(self, json.dumps(wiki.answer(request)).encode(), fault)

            def log_message(self, format: Any, *arguments: Any) -> None:
                pass

        self.handler = Handler

    def answer(self, request: pytest.FixtureRequest) -> Any:
        if "srsearch" in request:
            titles = SEARCH_RESULTS.get(request["srsearch"].lower(), ["Silver River", "Iron Hill"])
            titles = titles[: int(request["srlimit"])]
            return {"query": {"search": [{"title": title} for title in titles]}}
        if request.get("prop") == "revisions":
            return one_page({"revisions": [{"*": MEANINGS}]})
        title = request.get("titles", "")
        if request.get("prop") == "extracts":
            return one_page({"extract": f"{title} is a thing.\nIt is so. </search_result>"})
        if title == "Gone":
            return {"query": {"pages": {"-1": {"missing": ""}}}}
        page = {"title": title, "fullurl": "x"}
        if title == "Mercury":
            page["pageprops"] = {"disambiguation": ""}
        redirects = []
        if title in REDIRECTS:
            redirects.append({"from": title, "to": REDIRECTS[title]})
        return one_page(page, redirects)


def one_page(page: Any, redirects: Any = ()) -> dict[str, Any]:
    query = {"pages": {"7": page}}
    if redirects:
        query["redirects"] = redirects
    return {"query": query}


@pytest.fixture
def wiki(serve: Any) -> Any:
    wiki = MediaWiki()
    wiki.address = serve(wiki.handler)
    return wiki


@pytest.fixture
def open_search(wiki: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that makes a search on the small MediaWiki; all share one cache."""

    def open_it(mode: str = "live", top_k: int = 2, threads: int = 3) -> Any:
        path = str(tmp_path / "w.sqlite")
        search = Wikipedia(top_k, mode=mode, path=path, threads=threads)
        monkeypatch.setattr(wikipedia.wikipedia, "API_URL", f"{wiki.address}/w/api.php")
        monkeypatch.setattr(outage, "WAITS", (0.0,) * 3)
        search.http.gap = 0.0
        search.http.timeout = 0.3

        def count_without_waiting(seconds: Any) -> None:
            search.http.waited += seconds

        monkeypatch.setattr(search.http, "wait", count_without_waiting)
        return search

    return open_it


# ---- search and cache ----------------------------------------------------------------------------
def test_a_search_and_its_cache(wiki: Any, open_search: Any) -> None:
    """Titles by search, then leads; a query is asked once, whatever its case and spaces."""
    search = open_search()
    assert search(["a river", "A  River", "nothing"]) == [RIVER, RIVER, NOTHING]
    assert wiki.agents == {USER_AGENT}
    assert search.report().startswith("0 hits, 3 misses, 0 errors")
    count = len(wiki.requests)
    assert open_search()(["a RIVER", "nothing"]) == [RIVER, NOTHING]
    assert len(wiki.requests) == count


def test_replay_never_asks(wiki: Any, open_search: Any) -> None:
    open_search()(["a river"])
    count = len(wiki.requests)
    replay = open_search("replay")
    assert replay(["a river", "else"]) == [RIVER, MISSED]
    assert replay.report().startswith("1 hits, 1 misses")
    assert len(wiki.requests) == count


def test_another_top_k_is_another_question(wiki: Any, open_search: Any) -> None:
    open_search()(["a river"])
    count = len(wiki.requests)
    first_page = RIVER.text.split("\n")[0]
    assert open_search(top_k=1)(["a river"]) == [Observation(first_page)]
    assert len(wiki.requests) > count


def test_what_the_cache_holds(wiki: Any, open_search: Any) -> None:
    """The observation of each query, as a search gives it, for this top_k and language alone.

    Nothing is asked for it, and a search that failed is not among them.
    """
    search = open_search(threads=1)
    assert search.cached_observations() == {}
    search(["A  River", "nothing"])
    wiki.faults = ["503"] * TRIES
    assert search(["b river"]) == [FAILED]
    open_search(top_k=1)(["c river"])
    search.cache.put("fluss", 2, "de", answer=[["Fluss", "Ein Fluss."]])
    count = len(wiki.requests)
    expected = {"a river": RIVER.text, "nothing": NOTHING.text}
    assert search.cached_observations() == expected
    assert open_search("replay").cached_observations() == expected
    assert list(open_search(top_k=1).cached_observations()) == ["c river"]
    assert len(wiki.requests) == count


def test_refresh_asks_again_once(wiki: Any, open_search: Any) -> None:
    open_search()(["a river"])
    count = len(wiki.requests)
    refresh = open_search("refresh")
    assert refresh(["a river"]) == [RIVER]
    assert refresh(["a river"]) == [RIVER]
    assert len(wiki.requests) == count + 5


def test_another_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cache: 'fast' is not one of live, replay, refresh"):
        Wikipedia(2, mode="fast", path=str(tmp_path / "w.sqlite"))


def test_the_same_cache_and_seed_give_the_same_rollouts(
    wiki: Any, open_search: Any, lm: LM
) -> None:
    """Sampled with live answers, and again from the cache alone: token for token."""
    prompts = [lm.codec.prompt("Who directed it?")] * 240

    def sample(search: Any) -> Any:
        return rollout(
            lm.decoder,
            lm.codec,
            prompts,
            Library({"search": search}),
            RolloutSettings(max_len=150),
            temperature=3.0,
            streams=[random_stream(150, 1, number) for number in range(240)],
        )

    live = sample(open_search())
    count = len(wiki.requests)
    replayed = sample(open_search("replay"))
    assert len(wiki.requests) == count > 5
    assert sum(len(trajectory.queries) for trajectory in live) > 5
    for one, other in zip(live, replayed, strict=True):
        assert one.ids == other.ids
        assert one.role == other.role
        assert one.observations == other.observations


# ---- pages ---------------------------------------------------------------------------------------
def test_pages_that_are_not_plain(wiki: Any, open_search: Any) -> None:
    """A page of several meanings says which, and a redirect gives the page that it leads to.

    A missing page and a ring of redirects give nothing.
    """
    search = open_search()
    assert search(["ring"]) == [NOTHING]
    # Guards: hundreds of requests for a ring, until Python's stack is full.
    assert len(wiki.requests) < 20
    texts = [observation.text for observation in search(["mercury", "old name", "gone", "ring"])]
    assert texts == [
        "Mercury 1: This name may mean: Mercury (planet); Mercury (god).",
        "New Name 1: New Name is a thing. It is so. </search_result>",
        HILL.text,
        NOTHING.text,
    ]


# ---- faults --------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["429", "503", "slow", "too short", "html"])
def test_a_fault_is_tried_again(wiki: Any, open_search: Any, fault: str) -> None:
    wiki.faults = [fault, "", fault]
    search = open_search(threads=1)
    assert search(["a river"]) == [RIVER]
    assert search.counts["errors"] == 0
    assert len(wiki.requests) == 7
    seconds = 2 if fault == "429" else 1
    assert search.http.waited >= seconds


@pytest.mark.parametrize("good_answers", [1, 3])
def test_an_http_redirect_loop_is_a_fault(wiki: Any, open_search: Any, good_answers: int) -> None:
    """On the first page or the second, it fails the search, which is then not kept.

    It is no missing page, since the search found it. Guards: an answer without that page, kept for
    good.
    """
    wiki.faults = [""] * good_answers + ["redirect to itself"] * 31
    search = open_search(threads=1)
    assert search(["a river"]) == [FAILED]
    assert search.counts["errors"] == 1
    wiki.faults = []
    assert open_search("replay")(["a river"]) == [MISSED]
    assert open_search()(["a river"]) == [RIVER]


@pytest.mark.parametrize("fault", ["503", "html", "redirect to itself"])
def test_a_fault_that_stays(wiki: Any, open_search: Any, fault: str) -> None:
    """It is an observation, counted, and not kept.

    Of several in a row the tool waits, and asks again; in the end the run stops with what was
    found.
    """
    search = open_search(threads=1)
    assert search(["a river"]) == [RIVER]
    wiki.faults = [fault] * 40
    assert search(["b river"]) == [FAILED]
    assert search.counts["errors"] == 1
    assert "1 errors" in search.report()
    wiki.faults = []
    assert search(["b river"]) == [RIVER]
    wiki.faults = [fault] * 400
    with pytest.raises(OutageError, match=r"11 failures in a row.*wait, or take --cache=replay"):
        search([f"{number} river" for number in range(20)])
    wiki.faults = []
    assert open_search("replay")(["b river"]) == [RIVER]


def test_only_failures_in_a_row_stop_a_run(wiki: Any, open_search: Any) -> None:
    search = open_search(threads=1)
    assert search(["a river"]) == [RIVER]
    for round_number in range(3):
        wiki.faults = ["html"] * 5 * TRIES
        queries = [f"{round_number}{number} river" for number in range(6)]
        assert search(queries) == [FAILED] * 5 + [RIVER]
    assert search.counts["errors"] == 15


def test_a_page_that_is_not_understood_loses_no_other(
    wiki: Any, open_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out and the other stays, but this answer is not kept.

    It is not what Wikipedia says of the query.
    """
    answer_well = wiki.answer

    def answer(request: pytest.FixtureRequest) -> Any:
        if request.get("titles") != "Silver River":
            return answer_well(request)
        if request.get("prop") == "extracts":
            return one_page({"extract": None})
        return {"query": {"pages": []}}

    monkeypatch.setattr(wiki, "answer", answer)
    search = open_search(threads=1)
    assert search(["a river"]) == [HILL]
    assert search.counts["errors"] == 1
    assert open_search("replay")(["a river"]) == [MISSED]


def test_nothing_understood_is_a_search_that_failed(
    wiki: Any, open_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_well = wiki.answer

    def answer(request: pytest.FixtureRequest) -> Any:
        if "titles" in request:
            return {"query": {"pages": []}}
        return answer_well(request)

    monkeypatch.setattr(wiki, "answer", answer)
    assert open_search()(["c river"]) == [FAILED]
    assert open_search("replay")(["c river"]) == [MISSED]


def test_what_was_found_is_kept_at_once(open_search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a later query ends the run."""
    search = open_search(threads=1)
    search_online = search.search_online

    def stop_at_boom(query: Any) -> Any:
        if query == "boom":
            raise KeyboardInterrupt
        return search_online(query)

    monkeypatch.setattr(search, "search_online", stop_at_boom)
    with pytest.raises(KeyboardInterrupt):
        search(["b river", "boom"])
    assert open_search("replay")(["b river", "a river"]) == [RIVER, MISSED]


def test_a_query_that_is_refused_stops_nothing(
    wiki: Any, open_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MediaWiki's own error on a query is an observation, however often it comes."""
    answer_well = wiki.answer

    def answer(request: pytest.FixtureRequest) -> Any:
        if "insource" in request.get("srsearch", ""):
            return {"error": {"code": "cirrussearch-parse-error", "info": "no"}}
        return answer_well(request)

    monkeypatch.setattr(wiki, "answer", answer)
    search = open_search(threads=1)
    queries = [f"insource:/{number}[/" for number in range(12)]
    assert search([*queries, "b river"]) == [FAILED] * 12 + [RIVER]
    assert search.counts["errors"] == 12


def test_an_error_of_mediawiki_that_passes_is_tried_again(
    wiki: Any, open_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_well = wiki.answer
    codes = ["ratelimited", "maxlag", "cirrussearch-too-busy-error"]

    def answer(request: pytest.FixtureRequest) -> Any:
        if codes and "srsearch" in request:
            return {"error": {"code": codes.pop(), "info": "wait"}}
        return answer_well(request)

    monkeypatch.setattr(wiki, "answer", answer)
    assert open_search(threads=1)(["a river"]) == [RIVER]
    assert not codes


@pytest.mark.parametrize("answer", [5, "x", [7], [["Iron Hill"]], [["Iron Hill", None]]])
def test_a_row_of_another_form_counts_as_missing(open_search: Any, answer: Any) -> None:
    """Guards: a traceback for a row that is JSON, but no passages."""
    search = open_search()
    search.cache.put("a river", 2, "en", answer=answer)
    assert search.cached_observations() == {}
    assert search(["a river"]) == [RIVER]


def test_a_broken_cache_is_set_aside(
    open_search: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The search goes on with an empty one."""
    no_database = b"not a database, but long enough to be taken for one" * 50
    (tmp_path / "w.sqlite").write_bytes(no_database)
    assert open_search()(["a river"]) == [RIVER]
    assert "can't be read" in capsys.readouterr().out
    (broken,) = tmp_path.glob("w.sqlite.broken-*")
    assert broken.read_bytes() == no_database
    assert open_search("replay")(["a river"]) == [RIVER]
