"""Tools that reach out: Wikipedia as it is today, through the `wikipedia` package and a cache, and a retrieval server.

    python tools.py ask wikipedia "The Mill on the Floss"
    python eval.py config/smollm2.py --corpus=wikipedia --cache=replay ..       # only what the cache holds: the same rollouts again

Every answer of the live tool goes into one SQLite file, out/wikipedia.sqlite. `--cache=live` asks for what is not in it, `replay` never asks (a miss
is an observation, and is counted), `refresh` asks for everything anew. What fails is not kept.
"""
import json
import random
import sqlite3
import threading
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from common import Problem, tqdm
from tools import listed

AGENT = "autocoa-small/1.0 (agent training for study; requests are cached and limited)"
FAILED = "The search failed."
TRIES, TIMEOUT, GIVE_UP = 4, 10.0, 8        # of a request; seconds; failed queries in a row before the run stops


class Polite:
    """In place of `requests` for the wikipedia package, which has no timeouts, no retries, and whose rate limit rounds its waits down to nothing.

    At most one request begins in `gap` seconds, whatever the threads. 429 and 5xx, broken connections, cut bodies and what is not JSON are tried again, after
    what Retry-After says or a wait that doubles, with jitter. Raises requests.RequestException when that was in vain.
    """

    def __init__(self, gap=0.1, longest=30.0, timeout=None):
        self.timeout, self.gap, self.longest, self.lock, self.next, self.waited = timeout, gap, longest, threading.Lock(), 0.0, 0.0
        self.session = requests.Session()

    def wait(self, seconds):
        self.waited += seconds
        time.sleep(seconds)

    def get(self, url, **more):
        return self.send("GET", url, **more)

    def send(self, method, url, **more):
        for i in range(TRIES):
            with self.lock:
                at = max(self.next, time.monotonic())
                self.next = at + self.gap
            self.wait(max(0.0, at - time.monotonic()))
            pause = 0.5 * 2 ** i * (1 + random.random())
            try:
                answer = self.session.request(method, url, timeout=self.timeout or TIMEOUT, **more)
                if answer.status_code in (429, 500, 502, 503, 504):
                    if answer.headers.get("Retry-After", "").isdecimal():
                        pause = float(answer.headers["Retry-After"]) + random.random()
                    error = requests.HTTPError(f"{answer.status_code} from {url}")
                else:
                    answer.raise_for_status()
                    answer.json()
                    return answer
            except requests.TooManyRedirects:
                raise
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError, ValueError) as e:
                error = requests.RequestException(f"{type(e).__name__} from {url}")
            if i < TRIES - 1:
                self.wait(min(pause, self.longest))
        raise error


class Cache:
    """What was asked -> what was said, both anything that JSON holds, in one SQLite file that several processes may share. A file that can't be read is set aside, and that is said."""

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.open()
        except sqlite3.DatabaseError as e:
            self.set_aside(e)

    def open(self):
        self.db = sqlite3.connect(self.path, timeout=30, check_same_thread=False, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (asked TEXT PRIMARY KEY, said TEXT, fetched REAL)")

    def set_aside(self, error):
        if isinstance(error, sqlite3.OperationalError):         # locked, read-only, a full disk: nothing is wrong with what it holds
            raise Problem(f"{self.path}: {error}; make it writable, or wait for the process that holds it") from None
        self.db.close()
        aside = self.path.with_name(f"{self.path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{self.path} can't be read ({error}): it is now {aside.name}, and an empty one is begun")
        for end in ("-wal", "-shm"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)
        self.path.rename(aside)
        self.open()

    def run(self, sql, *values):
        with self.lock:
            try:
                return self.db.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as e:
                self.set_aside(e)
                return self.db.execute(sql, values).fetchall()

    def get(self, *key):
        found = self.run("SELECT said FROM answers WHERE asked = ?", json.dumps(key))
        return json.loads(found[0][0]) if found else None

    def put(self, *key, said):
        self.run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", json.dumps(key), json.dumps(said), time.time())


def normal(query):
    """Queries that differ in case, width or spaces alone are one."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split())


class Wikipedia:
    """Search on the live Wikipedia: titles by its search, then the lead of each page. Called with queries; at most `threads` at a time."""

    def __init__(self, top_k, language="en", mode="live", path="out/wikipedia.sqlite", threads=3):
        import wikipedia
        if mode not in ("live", "replay", "refresh"):
            raise Problem(f"--cache: {mode!r} is not one of live, replay, refresh")
        self.package, self.http = wikipedia, Polite()
        wikipedia.wikipedia.requests = self.http
        wikipedia.set_lang(language)            # and forget what the package itself kept
        wikipedia.wikipedia.API_URL = wikipedia.wikipedia.API_URL.replace("http://", "https://")
        wikipedia.set_user_agent(AGENT)
        wikipedia.set_rate_limiting(True)
        warnings.filterwarnings("ignore", message="No parser was explicitly specified")     # of the package, on a disambiguation page
        self.top_k, self.language, self.mode, self.cache, self.threads = top_k, language, mode, Cache(path), threads
        self.counts, self.failed, self.fresh = Counter(), 0, {}

    def __call__(self, queries):
        """list of str -> list of observations."""
        keys, said = [normal(q) for q in queries], {}
        for key in dict.fromkeys(keys):
            said[key] = self.fresh.get(key) if self.mode == "refresh" else self.cache.get(key, self.top_k, self.language)
        asked = {key: q for key, q in zip(keys, queries) if said[key] is None}
        self.counts["hits"] += sum(key not in asked for key in keys)
        self.counts["misses"] += sum(key in asked for key in keys)
        if self.mode != "replay" and asked:
            with ThreadPoolExecutor(self.threads) as pool:
                answers = pool.map(self.ask, asked.values())
                for key, passages in zip(asked, tqdm(answers, desc="Wikipedia", unit="query", total=len(asked), leave=False, delay=2)):
                    said[key] = passages
                    if passages is not None:
                        self.cache.put(key, self.top_k, self.language, said=passages)
                        self.fresh[key] = passages
        lost = "This search is not in the cache." if self.mode == "replay" else FAILED
        return [lost if said[key] is None else listed(said[key]) for key in keys]

    def ask(self, query):
        """-> [(title, lead)], None where it failed. Raises Problem when nothing works any more."""
        try:
            titles = self.package.search(query[:300], results=self.top_k)
            passages = [p for p in map(self.lead, titles) if p]
            self.failed = 0
            return passages
        except (requests.RequestException, self.package.exceptions.WikipediaException, ValueError, KeyError, TypeError, AssertionError, IndexError) as e:
            self.counts["errors"] += 1
            self.failed += 1
            if self.failed >= GIVE_UP:
                raise Problem(f"Wikipedia: {GIVE_UP} searches in a row failed, the last with: {e}; what was found is in {self.cache.path}; go on later with --resume, or with --cache=replay") from None

    def lead(self, title):
        """-> (title, text); a page that means several says which; None for a page that is missing, or that only sends one on and on."""
        try:
            page = self.package.page(title, auto_suggest=False)
            return page.title, " ".join(page.summary.split())
        except self.package.exceptions.DisambiguationError as e:
            return title, "This name may mean: " + "; ".join(e.options[:8]) + "."
        except (self.package.exceptions.PageError, RecursionError):
            return None

    def report(self):
        return f"{self.counts['hits']} hits, {self.counts['misses']} misses, {self.counts['errors']} errors, {self.http.waited:.1f} s waited"


class Retriever:
    """A retrieval server that speaks Search-R1's protocol: Search-R1's own, FlashRAG's, or `python tools.py serve`."""

    def __init__(self, url, top_k):
        self.url, self.top_k, self.http, self.counts = url, top_k, Polite(gap=0.0), Counter()

    def __call__(self, queries):
        from tools import split_passage
        ask = {"queries": list(queries), "topk": self.top_k, "return_scores": True}
        try:
            rows = self.http.send("POST", self.url, json=ask).json()["result"]
            found = [[split_passage((hit.get("document") or hit)["contents"]) for hit in row] for row in rows]
            if len(found) != len(ask["queries"]):
                raise ValueError(f"{len(found)} results for {len(ask['queries'])} queries")
        except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as e:
            raise Problem(f"--corpus={self.url}: not a retrieval server that answers ({type(e).__name__}: {e}); start one with: python tools.py serve CORPUS 8000") from None
        return [listed(row) for row in found]
