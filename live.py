"""Tools that reach out: Wikipedia as it is today, through the `wikipedia` package and a cache, and a retrieval server.

    python tools.py ask wikipedia "The Mill on the Floss"
    python eval.py config/smollm2.py --corpus=wikipedia --cache=replay ..       # only what the cache holds: the same rollouts again

Every answer of the live tool goes into one SQLite file, out/wikipedia.sqlite. `--cache=live` asks for what is
not in it, `replay` never asks (a miss is an observation, and is counted), `refresh` asks for everything anew.
What fails is not kept.
"""
import contextlib
import json
import math
import os
import random
import sqlite3
import threading
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path

import requests

from common import Problem, alone, tqdm
from tools import listed

AGENT = (f"autocoa-small/1.0 ({os.environ.get('WIKIPEDIA_CONTACT', 'agent training for study; cached and limited')}) "
         f"python-requests/{requests.__version__}")
FAILED, MISSED = "The search failed.", "This search is not in the cache."       # observations that say nothing of the question
TRIES, TIMEOUT, GIVE_UP = 4, 10.0, 8        # of a request; seconds; failed queries in a row before the run stops
# MediaWiki's errors that pass
TRANSIENT = ("ratelimited", "maxlag", "readonly", "internal_api_error", "cirrussearch-too-busy",
             "cirrussearch-regex-too-busy", "cirrussearch-backend-error")
# what the package raises on answers that it does not expect
NONSENSE = (ValueError, KeyError, TypeError, AssertionError, IndexError, AttributeError)
BATCH = 64                                  # queries that a retrieval server gets at once
BUSY = (3, 5, 6, 8, 10, 13, 14)             # SQLite's codes for a file that is locked, read-only, or on a full or failing disk


class SentOn(requests.RequestException):
    """Pages that send one on and on, as the wikipedia package follows them."""


class Polite:
    """In place of `requests` for the wikipedia package, which has no timeouts, no retries, and whose rate limit rounds
    its waits down to nothing.

    At most one request begins in `gap` seconds, whatever the threads. 408, 425, 429 and 5xx, MediaWiki's own words for
    them, broken connections, cut bodies and what is not JSON are tried again after a wait that doubles, with jitter;
    after a Retry-After no thread asks before its time, and while that is more than `longest` seconds away requests fail
    at once. tries: at one that answers, busy (0: TRIES, as at one that does not). Raises requests.RequestException when
    all was in vain.
    """

    def __init__(self, gap=0.1, longest=30.0, timeout=None, tries=0):
        self.tries, self.timeout, self.gap, self.longest, self.lock, self.next, self.waited = (
            tries, timeout, gap, longest, threading.Lock(), 0.0, 0.0)
        self.session, self.thread = requests.Session(), threading.local()       # thread.left: requests that this thread may still make

    def wait(self, seconds):
        with self.lock:
            self.waited += seconds
        time.sleep(seconds)

    def get(self, url, **more):
        return self.send("GET", url, **more)

    def send(self, method, url, **more):
        self.thread.left = getattr(self.thread, "left", math.inf) - 1
        if self.thread.left < 0:
            raise SentOn(f"pages of {url} that send one on and on")
        for i in range(self.tries or TRIES):
            with self.lock:
                at = max(self.next, time.monotonic())
                if at - time.monotonic() > self.longest:
                    raise requests.HTTPError(f"{url} said to wait {at - time.monotonic():.0f} s more")
                self.next = at + self.gap
            self.wait(max(0.0, at - time.monotonic()))
            pause = 0.5 * 2 ** i * (1 + random.random())
            try:
                answer = self.session.request(method, url, timeout=self.timeout or TIMEOUT, **more)
                if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                    answer.raise_for_status()
                    said = answer.json()
                    trouble = said["error"].get("code", "") if isinstance(said, dict) and isinstance(said.get("error"), dict) else ""
                    if not str(trouble).startswith(TRANSIENT):
                        return answer
                error, last = requests.HTTPError(f"{answer.status_code} from {url}"), self.tries or TRIES
                told = retry_after(answer.headers.get("Retry-After", ""))
                if told:
                    with self.lock:
                        self.next = max(self.next, time.monotonic() + told)
                    pause = told
                if told > self.longest:
                    raise requests.HTTPError(f"{error}, and to wait {told:.0f} s")
            except (requests.TooManyRedirects, requests.HTTPError):
                raise
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
                    requests.exceptions.ContentDecodingError, ValueError) as e:
                # one that is not there at all is not waited for longer
                error, last = requests.RequestException(f"{type(e).__name__} from {url}"), TRIES
            if i + 1 >= last:
                break
            self.wait(min(pause, self.longest))
        raise error


def retry_after(text):
    """The header's seconds or date -> seconds, 0 for none."""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


class Cache:
    """What was asked -> what was said, both anything that JSON holds, in one SQLite file that several processes may share.
    A file that can't be read is set aside, and that is said."""

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Problem(f"{self.path.parent}: {e.strerror}; it must be a folder") from None
        try:
            self.open()
        except sqlite3.DatabaseError as e:
            self.set_aside(e)

    def open(self):
        self.db = sqlite3.connect(self.path, timeout=30, check_same_thread=False, isolation_level=None)
        self.db.text_factory = lambda raw: raw.decode(errors="replace")
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (asked TEXT PRIMARY KEY, said TEXT, fetched REAL)")
        self.db.execute("SELECT asked, said, fetched FROM answers LIMIT 1").fetchall()

    def set_aside(self, error):
        """One process at a time; whoever comes second finds the new file and uses it."""
        if getattr(error, "sqlite_errorcode", 0) & 255 in BUSY:         # nothing is wrong with what it holds
            raise Problem(f"{self.path}: {error}; make it writable, or wait for the process that holds it") from None
        self.db.close()
        with alone(self.path):
            with contextlib.suppress(sqlite3.DatabaseError):        # what opens may be damaged further in
                self.open()
                if self.db.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]:
                    return
            self.db.close()
            aside = self.path.with_name(f"{self.path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
            print(f"{self.path} can't be read ({error}): it is now {aside.name}, and an empty one is begun")
            for end in ("", "-wal", "-shm"):
                if (part := self.path.with_name(self.path.name + end)).exists():
                    part.rename(aside.with_name(aside.name + end))
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
        try:
            return json.loads(found[0][0]) if found else None
        except (ValueError, TypeError):         # a row that was damaged: as if it were not there
            return None

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
        if mode != "replay" and "WIKIPEDIA_CONTACT" not in os.environ:
            print("Wikipedia asks programs for an address: put yours into WIKIPEDIA_CONTACT, or it may refuse")
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
        lost = MISSED if self.mode == "replay" else FAILED
        return [lost if said[key] is None else listed(said[key]) for key in keys]

    def ask(self, query):
        """-> [(title, lead)], None where it failed. Raises Problem when nothing works any more."""
        try:
            self.http.thread.left = math.inf
            titles = self.package.search(query[:300], results=self.top_k)
            passages, odd = [], None
            for title in titles:
                try:
                    passages += [p for p in [self.lead(title)] if p]
                except NONSENSE as e:           # the others are of use, but this is not what Wikipedia says of the query: it is not kept
                    odd = e
            if odd and not passages:
                raise odd
            with self.http.lock:
                self.failed = 0
                self.counts["errors"] += bool(odd)
            if not odd:
                # here, so that it is kept whatever becomes of the others
                self.cache.put(normal(query), self.top_k, self.language, said=passages)
                self.fresh[normal(query)] = passages
            return passages
        except self.package.exceptions.WikipediaException:          # it does not take this query: no reason to stop
            with self.http.lock:
                self.counts["errors"] += 1
        except (requests.RequestException, *NONSENSE) as e:
            with self.http.lock:
                self.counts["errors"] += 1
                self.failed += 1
                many = self.failed >= GIVE_UP
            if many:
                raise Problem(f"Wikipedia: {GIVE_UP} searches in a row failed, the last with: {e}; what was found is in "
                              f"{self.cache.path}; go on later with --resume, or with --cache=replay") from None

    def lead(self, title):
        """-> (title, text); a page that means several says which; None for a page that is missing or that only sends
        one on and on. Raises one of NONSENSE for what is not understood."""
        self.http.thread.left = 12
        try:
            page = self.package.page(title, auto_suggest=False)
            return page.title, " ".join(page.summary.split())
        except self.package.exceptions.DisambiguationError as e:
            return title, "This name may mean: " + "; ".join(e.options[:8]) + "."
        except (self.package.exceptions.PageError, SentOn, RecursionError):
            return None
        finally:
            self.http.thread.left = math.inf

    def report(self):
        return (f"{self.counts['hits']} hits, {self.counts['misses']} misses, {self.counts['errors']} errors, "
                f"{self.http.waited:.1f} s waited")


class Retriever:
    """A retrieval server that speaks Search-R1's /retrieve: its own, or `python tools.py serve`."""

    def __init__(self, url, top_k):
        self.url, self.top_k, self.http, self.counts = url, top_k, Polite(gap=0.0, timeout=120.0), Counter()

    def __call__(self, queries):
        return [observation for at in range(0, len(queries), BATCH) for observation in self.ask(queries[at:at + BATCH])]

    def ask(self, queries):
        from tools import split_passage
        self.counts["requests"] += 1
        try:
            rows = self.http.send("POST", self.url,
                                  json={"queries": list(queries), "topk": self.top_k, "return_scores": True}).json()["result"]
            found = [[split_passage((hit.get("document") or hit)["contents"]) for hit in row] for row in rows]
            if len(found) != len(queries):
                raise ValueError(f"{len(found)} results for {len(queries)} queries")
        except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as e:
            raise Problem(f"--corpus={self.url}: not a retrieval server that answers ({type(e).__name__}: {e}); "
                          "start one with: python tools.py serve CORPUS 8000") from None
        return [listed(row) for row in found]

    def report(self):
        return f"{self.counts['requests']} requests, {self.http.waited:.1f} s waited between tries"
