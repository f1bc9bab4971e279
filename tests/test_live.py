"""Tools that reach out (live.py): Wikipedia over loopback HTTP with its faults, the cache, and what is no retrieval server."""
import json
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import requests
from conftest import ROOT

import live
import tools
from autocoa import rollout
from common import Problem


class Wiki:
    """A MediaWiki in small, with faults: `fault` is what the next answers are (a list of names, used up), `asked` what came in."""

    def __init__(self):
        self.fault, self.asked, self.agents = [], [], set()
        wiki = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                ask = {k: v[0] for k, v in parse_qs(urlparse(self.path).query).items()}
                wiki.asked.append(ask)
                wiki.agents.add(self.headers["User-Agent"])
                fault = wiki.fault.pop(0) if wiki.fault else ""
                if fault == "slow":
                    time.sleep(1.0)
                status = {"429": 429, "503": 503, "loop": 302}.get(fault, 200)
                body = b"<html>Sorry</html>" if fault == "html" else json.dumps(wiki.answer(ask)).encode()
                self.send_response(status)
                if fault == "429":
                    self.send_header("Retry-After", "1")
                if fault == "loop":
                    self.send_header("Location", self.path)
                self.send_header("Content-Length", str(len(body) + 100 * (fault == "cut")))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    pass
                if fault == "cut":
                    self.close_connection = True

            def log_message(self, *_):
                pass
        self.handler = Handler

    def answer(self, ask):
        title = ask.get("titles", "")
        if "srsearch" in ask:
            known = {"nothing": [], "mercury": ["Mercury"], "gone": ["Gone", "Iron Hill"], "old name": ["Old Name"], "ring": ["Ring A"]}
            return {"query": {"search": [{"title": t} for t in known.get(ask["srsearch"].lower(), ["Silver River", "Iron Hill"])[:int(ask["srlimit"])]]}}
        if ask.get("prop") == "revisions":
            return {"query": {"pages": {"7": {"revisions": [{"*": "<ul><li><a>Mercury (planet)</a></li><li><a>Mercury (god)</a></li></ul>"}]}}}}
        if ask.get("prop") == "extracts":
            return {"query": {"pages": {"7": {"extract": f"{title} is a thing.\nIt is so. </search_result>"}}}}
        if title == "Gone":
            return {"query": {"pages": {"-1": {"missing": ""}}}}
        page = {"query": {"pages": {"7": {"title": title, "fullurl": "x"}}}}
        if title in ("Old Name", "Ring A", "Ring B"):
            page["query"]["redirects"] = [{"from": title, "to": {"Old Name": "New Name", "Ring A": "Ring B", "Ring B": "Ring A"}[title]}]
        if title == "Mercury":
            page["query"]["pages"]["7"]["pageprops"] = {"disambiguation": ""}
        return page


@pytest.fixture
def wiki(serve, monkeypatch, tmp_path):
    """-> the small MediaWiki, and a function that makes a live tool on it with its cache in tmp_path."""
    import wikipedia
    there = Wiki()
    address = serve(there.handler)

    def tool(mode="live", top_k=2, **more):
        search = live.Wikipedia(top_k, mode=mode, path=tmp_path / "w.sqlite", **more)
        monkeypatch.setattr(wikipedia.wikipedia, "API_URL", f"{address}/w/api.php")
        search.http.gap = 0.0
        monkeypatch.setattr(search.http, "wait", lambda seconds: setattr(search.http, "waited", search.http.waited + seconds))
        return search
    monkeypatch.setattr(live, "TIMEOUT", 0.3)
    return there, tool


RIVER = "Silver River 1: Silver River is a thing. It is so. </search_result>\n Iron Hill 2: Iron Hill is a thing. It is so. </search_result>"


def test_live_search_and_its_cache(wiki):
    """Titles by search, then leads; asked once, whatever the case; replay never asks; refresh asks again, once."""
    there, tool = wiki
    search = tool()
    assert search(["a river", "A  River", "nothing"]) == [RIVER, RIVER, "Nothing found."] and there.agents == {live.AGENT}
    assert search.report().startswith("0 hits, 3 misses, 0 errors")
    n = len(there.asked)
    assert tool()(["a RIVER", "nothing"]) == [RIVER, "Nothing found."] and len(there.asked) == n
    replay = tool("replay")
    assert replay(["a river", "else"]) == [RIVER, "This search is not in the cache."] and len(there.asked) == n and replay.report().startswith("1 hits, 1 misses")
    assert tool(top_k=1)(["a river"]) == [RIVER.split("\n")[0]] and len(there.asked) > n       # another top_k is another question
    n, refresh = len(there.asked), tool("refresh")
    assert refresh(["a river"]) == refresh(["a river"]) == [RIVER] and len(there.asked) == n + 5


def test_the_same_cache_and_seed_give_the_same_rollouts(wiki, lm):
    """Sampled with live answers, and again from the cache alone: token for token, and nothing is asked."""
    there, tool = wiki

    def sample(search):
        return rollout(lm.decoder, lm.codec, [lm.codec.prompt("Who directed it?")] * 100, tools.Library({"search": search}), max_len=300, temperature=3.0, rng=np.random.default_rng(0))
    live_ones, n = sample(tool()), len(there.asked)
    again = sample(tool("replay"))
    assert sum(len(t.queries) for t in live_ones) > 5 and len(there.asked) == n > 5
    assert [(t.ids, t.role, t.observations) for t in live_ones] == [(t.ids, t.role, t.observations) for t in again]


def test_pages_that_are_not_plain(wiki):
    """A disambiguation page says what it may mean, a redirect gives the page it leads to, a missing page and a ring of redirects give nothing."""
    there, tool = wiki
    assert tool()(["ring"]) == ["Nothing found."] and len(there.asked) < 20         # not hundreds of requests, until Python gives up
    assert tool()(["mercury", "old name", "gone", "ring"]) == [
        "Mercury 1: This name may mean: Mercury (planet); Mercury (god).", "New Name 1: New Name is a thing. It is so. </search_result>", RIVER.split("\n ")[1].replace("2:", "1:"), "Nothing found."]


@pytest.mark.parametrize("fault", ["429", "503", "slow", "cut", "html"])
def test_a_fault_is_tried_again(wiki, fault):
    there, tool = wiki
    there.fault = [fault, "", fault]
    search = tool(threads=1)
    assert search(["a river"]) == [RIVER] and search.counts["errors"] == 0 and len(there.asked) == 7
    assert search.http.waited >= (2 if fault == "429" else 1)


@pytest.mark.parametrize("after", [1, 3])
def test_a_page_that_http_sends_round_is_a_fault(wiki, after):
    """Not a missing page: the search found it. An HTTP redirect loop behind the search, on the first page or the second, fails the search and is not kept.
    Guards: an answer without that page, kept for good."""
    there, tool = wiki
    there.fault = [""] * after + ["loop"] * 31
    search = tool(threads=1)
    assert search(["a river"]) == [live.FAILED] and search.counts["errors"] == 1
    there.fault = []
    assert tool("replay")(["a river"]) == [live.MISSED] and tool()(["a river"]) == [RIVER]


@pytest.mark.parametrize("fault", ["503", "html", "loop"])
def test_a_fault_that_stays(wiki, fault):
    """An observation, counted, not kept in the cache; in the end a Problem, with what was found kept."""
    there, tool = wiki
    search = tool(threads=1)
    assert search(["a river"]) == [RIVER]
    there.fault = [fault] * 40
    assert search(["b river"]) == [live.FAILED] and search.counts["errors"] == 1 and "1 errors" in search.report()
    there.fault = []
    assert search(["b river"]) == [RIVER]
    there.fault = [fault] * 400
    with pytest.raises(Problem, match="8 searches in a row failed.*--cache=replay"):
        search([f"{i} river" for i in range(20)])
    there.fault = []
    assert tool("replay")(["b river"]) == [RIVER]


def test_what_is_not_understood_loses_nothing(wiki, monkeypatch):
    """Pages as an empty list, a null text: that page is left out, the other stays, and the answer is not kept, since it is not what Wikipedia says; nothing understood is a
    search that failed. What was found is kept at once, also when a later query ends the run."""
    there, tool = wiki
    plain = there.answer

    def odd(ask):
        if ask.get("titles") == "Silver River":
            return {"query": {"pages": []}} if ask.get("prop") != "extracts" else {"query": {"pages": {"7": {"extract": None}}}}
        if ask.get("srsearch") == "boom":
            raise KeyboardInterrupt
        return plain(ask)
    monkeypatch.setattr(there, "answer", odd)
    search = tool(threads=1)
    hill = "Iron Hill 1: Iron Hill is a thing. It is so. </search_result>"
    assert search(["a river"]) == [hill] and search.counts["errors"] == 1
    assert tool("replay")(["a river"]) == [live.MISSED]
    monkeypatch.setattr(there, "answer", plain)
    monkeypatch.setattr(search, "ask", lambda query, ask=search.ask: (_ for _ in ()).throw(KeyboardInterrupt) if query == "boom" else ask(query))
    with pytest.raises(KeyboardInterrupt):
        search(["b river", "boom"])
    assert tool("replay")(["b river", "a river"]) == [RIVER, live.MISSED]
    monkeypatch.setattr(there, "answer", lambda ask: {"query": {"pages": []}} if "titles" in ask else plain(ask))
    assert tool()(["c river"]) == [live.FAILED] and tool("replay")(["c river"]) == [live.MISSED]


def test_a_query_that_is_refused_stops_nothing(wiki, monkeypatch):
    """MediaWiki's own error on a query is an observation, however often; one that passes is tried again."""
    there, tool = wiki
    plain, troubled = there.answer, ["ratelimited", "maxlag", "cirrussearch-too-busy-error"]

    def answer(ask):
        if "insource" in ask.get("srsearch", ""):
            return {"error": {"code": "cirrussearch-parse-error", "info": "no"}}
        return {"error": {"code": troubled.pop(), "info": "wait"}} if troubled and "srsearch" in ask else plain(ask)
    monkeypatch.setattr(there, "answer", answer)
    search = tool(threads=1)
    assert search(["a river"]) == [RIVER] and not troubled
    assert search([f"insource:/{i}[/" for i in range(12)] + ["b river"]) == [live.FAILED] * 12 + [RIVER] and search.counts["errors"] == 12


def test_retry_after_holds_for_all(serve, monkeypatch):
    """No thread asks before the time that one of them was told, in seconds or as a date; told to wait for long, a request fails at once."""
    assert live.retry_after("7") == 7 and live.retry_after("soon") == live.retry_after("") == 0
    assert 50 < live.retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 61
    at, told = [], ["1"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            at.append(time.monotonic())
            self.send_response(429 if told else 200)
            if told:
                self.send_header("Retry-After", told.pop())
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass
    address, polite = serve(Handler), live.Polite(gap=0.05)
    threads = [threading.Thread(target=polite.get, args=(address,)) for _ in range(3)]
    threads[0].start()
    while not at:
        time.sleep(0.01)
    time.sleep(0.05)
    [t.start() for t in threads[1:]], [t.join() for t in threads]
    assert len(at) == 4 and min(at[1:]) - at[0] >= 0.9
    told.append("120")
    with pytest.raises(requests.HTTPError, match="to wait 120 s"):
        polite.get(address)
    with pytest.raises(requests.HTTPError, match="to wait 1[12][0-9] s more"):       # nor does the next one ask before its time
        polite.get(address)
    assert len(at) == 5


def test_waits_double(serve, monkeypatch):
    """Half a second, one, two, each with up to as much again by chance, never the same."""
    waits, polite = [], live.Polite(gap=0.0)
    monkeypatch.setattr(polite, "wait", lambda seconds: waits.append(seconds) if seconds else None)
    for _ in range(2):
        with pytest.raises(requests.RequestException):
            polite.get("http://127.0.0.1:1/")
    waits = [w for w in waits if w > 0.1]
    assert len(waits) == 6 and len(set(waits)) == 6
    assert all(low <= w <= 2 * low for w, low in zip(waits, [0.5, 1, 2] * 2))


def test_failures_now_and_then(wiki):
    """Only failures in a row stop a run."""
    there, tool = wiki
    search = tool(threads=1)
    for n in range(3):
        there.fault = ["html"] * 5 * live.TRIES
        assert search([f"{n}{i} river" for i in range(6)]) == [live.FAILED] * 5 + [RIVER]
    assert search.counts["errors"] == 15


def test_at_most_one_request_in_a_while(serve):
    """Guards: the package's own rate limit, which never waits."""
    there = Wiki()
    address, polite = serve(there.handler), live.Polite(gap=0.05)
    start = time.monotonic()
    threads = [threading.Thread(target=polite.get, args=(address,), kwargs={"params": {"srsearch": "x", "srlimit": 1}}) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert time.monotonic() - start >= 0.35 and len(there.asked) == 8
    with pytest.raises(requests.RequestException):
        live.TRIES, tries = 1, live.TRIES
        try:
            polite.get("http://127.0.0.1:1/")
        finally:
            live.TRIES = tries


def test_a_broken_cache_is_set_aside(wiki, tmp_path, capsys):
    there, tool = wiki
    (tmp_path / "w.sqlite").write_bytes(b"not a database, but long enough to be taken for one" * 50)
    assert tool()(["a river"]) == [RIVER] and "can't be read" in capsys.readouterr().out
    aside, = tmp_path.glob("w.sqlite.broken-*")
    assert aside.read_bytes().startswith(b"not a database") and tool("replay")(["a river"]) == [RIVER]


def test_a_cache_damaged_further_in_is_set_aside(tmp_path, capsys):
    """It opens well, and pages in its middle are no pages. Guards: a traceback at the first query that met one, in this run and every other."""
    cache = live.Cache(tmp_path / "c.sqlite")
    for i in range(600):
        cache.put(i, said="x" * 300)
    cache.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cache.db.close()
    raw = bytearray((tmp_path / "c.sqlite").read_bytes())
    raw[4096 * 8:-4096 * 4] = b"\xff" * (len(raw) - 4096 * 12)
    (tmp_path / "c.sqlite").write_bytes(raw)
    cache = live.Cache(tmp_path / "c.sqlite")
    assert not list(tmp_path.glob("*.broken*")) and [cache.get(i) for i in range(600)].count(None) > 300
    cache.put(1, said=2)
    assert cache.get(1) == 2 and len(list(tmp_path.glob("c.sqlite.broken-*"))) == 1 and capsys.readouterr().out.count("can't be read") == 1


def test_two_find_the_same_broken_cache(tmp_path, capsys):
    """The second uses what the first began, and the broken one stays as it was. Guards: a new file that is set aside in turn, over the old one."""
    path = tmp_path / "w.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 50)
    first, second = live.Cache.__new__(live.Cache), live.Cache.__new__(live.Cache)
    for cache in (first, second):
        cache.path, cache.lock = path, threading.Lock()
        with pytest.raises(sqlite3.DatabaseError) as error:
            cache.open()
    first.set_aside(error.value)
    first.put("a", said=1)
    second.set_aside(error.value)
    aside, = tmp_path.glob("*.broken-*")
    assert aside.read_bytes().startswith(b"not a database") and second.get("a") == 1 and capsys.readouterr().out.count("can't be read") == 1


def test_a_cache_of_another_kind_and_a_damaged_row(tmp_path):
    """A table with other columns is set aside; a row that is no JSON, or no text, is as if it were not there; out being a file is said."""
    with sqlite3.connect(tmp_path / "o.sqlite") as db:
        db.execute("CREATE TABLE answers (x TEXT)")
    assert live.Cache(tmp_path / "o.sqlite").get("a") is None and list(tmp_path.glob("o.sqlite.broken-*"))
    cache = live.Cache(tmp_path / "c.sqlite")
    for said in ('[["t", ', b"\xff\xfe"):
        cache.put("a", said=1)
        cache.run("UPDATE answers SET said = ?", said)
        assert cache.get("a") is None
    (tmp_path / "out").write_text("")
    with pytest.raises(Problem, match="out: .*must be a folder"):
        live.Cache(tmp_path / "out" / "c.sqlite")


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path):
    """Guards: a good file that is set aside because the disk is full or another process holds it."""
    cache = live.Cache(tmp_path / "c.sqlite")
    cache.put("a", 2, "en", said=[["t", "x"]])
    cache.db.execute("PRAGMA query_only = ON")
    with pytest.raises(Problem, match="c.sqlite: attempt to write"):
        cache.put("b", 2, "en", said=[])
    assert cache.get("a", 2, "en") == [["t", "x"]] and not list(tmp_path.glob("*.broken*"))


FILL = "import sys, live; c = live.Cache(sys.argv[1]); [c.put(sys.argv[2], i, said=[sys.argv[2]]) for i in range(60)]"


def test_processes_share_a_cache(tmp_path):
    """Writers at the same time lose nothing, and the file is in WAL mode, so that they do not wait for readers."""
    running = [subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path / "c.sqlite"), str(n)], cwd=ROOT) for n in range(3)]
    assert [p.wait(60) for p in running] == [0, 0, 0]
    cache = live.Cache(tmp_path / "c.sqlite")
    assert all(cache.get(str(n), i) == [str(n)] for n in range(3) for i in range(60)) and cache.get("0", 99) is None
    assert cache.run("PRAGMA journal_mode") == [("wal",)]


def test_a_server_that_answers_nonsense(serve, monkeypatch):
    there = Wiki()
    there.handler.do_POST = there.handler.do_GET
    with pytest.raises(Problem, match="not a retrieval server that answers.*tools.py serve"):
        live.Retriever(serve(there.handler), 2)(["x"])
    monkeypatch.setattr(live, "TRIES", 1)
    with pytest.raises(Problem, match="--corpus=http://127.0.0.1:1/retrieve"):
        live.Retriever("http://127.0.0.1:1/retrieve", 2)(["x"])
