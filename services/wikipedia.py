"""Search on Wikipedia as it is today, through the `wikipedia` package and a cache.

    python tools.py ask wikipedia "The Mill on the Floss"
    python eval.py --corpus=wikipedia --cache=replay ..    # from the cache alone: the same rollouts

Every answer goes into one SQLite file, out/wikipedia.sqlite. `--cache=live` asks Wikipedia for what
the file does not hold. `replay` never asks: a miss is an observation, and is counted. `refresh`
asks for everything again. A search that failed is not kept.
"""

import contextlib
import math
import os
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests

from common import ranks
from common.errors import UserError
from common.progress import tqdm
from data.passages import Passage, join_passages
from data.trajectory import Observation, Provenance
from services.cache import Cache
from services.http import PoliteSession
from services.outage import FAILED_TEXT, Outage

CONTACT = os.environ.get("WIKIPEDIA_CONTACT", "agent training for study; cached and limited")
USER_AGENT = f"autocoa-small/1.0 ({CONTACT}) python-requests/{requests.__version__}"
MISSED_TEXT = "This search is not in the cache."
MAX_REQUESTS_A_PAGE = 12  # the package follows redirects without an end
# What the package, and the library that reads HTML for it, raise on answers that they don't expect.
NONSENSE = (
    ValueError,
    KeyError,
    TypeError,
    AssertionError,
    IndexError,
    AttributeError,
    RecursionError,
)
# How the codes of MediaWiki's errors begin that pass.
PASSING_ERRORS = (
    "ratelimited",
    "maxlag",
    "readonly",
    "internal_api_error",
    "cirrussearch-too-busy",
    "cirrussearch-regex-too-busy",
    "cirrussearch-backend-error",
)


class Wikipedia:
    """A search tool: queries in, observations out, with the lead of each page that is found."""

    def __init__(
        self,
        top_k: int,
        language: str = "en",
        mode: str = "live",
        path: str = "out/wikipedia.sqlite",
        threads: int = 3,
    ) -> None:
        """Set the package up and open the cache.

        top_k: pages of an observation.
        mode: live, replay or refresh (see above).
        path: the file of the cache.
        threads: queries that are asked at the same time.
        Raises UserError for another mode, and for a cache that can't be used.
        """
        # The package is slow to load, and only this tool needs it.
        import wikipedia

        if mode not in ("live", "replay", "refresh"):
            raise UserError(f"--cache: {mode!r} is not one of live, replay, refresh")
        self.package = wikipedia
        self.http = PoliteSession()
        self.requests = _PackageRequests(self.http)
        module: Any = wikipedia.wikipedia
        module.requests = self.requests
        # This also makes the package forget the answers that it kept.
        wikipedia.set_lang(language)
        module.API_URL = module.API_URL.replace("http://", "https://")
        wikipedia.set_user_agent(USER_AGENT)
        if mode != "replay" and "WIKIPEDIA_CONTACT" not in os.environ:
            print(
                "Wikipedia asks programs for an address: put yours into WIKIPEDIA_CONTACT, "
                "or it may refuse"
            )
        # The package gives this warning on a disambiguation page.
        warnings.filterwarnings("ignore", message="No parser was explicitly specified")
        self.top_k = top_k
        self.language = language
        self.mode = mode
        self.threads = threads
        self.cache = Cache(path)
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.outage = Outage(
            self.http,
            "Wikipedia",
            never_answered="is this machine online? --cache=replay searches what was found before",
            way_out=f"what was found is in {self.cache.path}; wait, or take --cache=replay",
        )
        self.refreshed: dict[str, list[Passage]] = {}  # what this run has asked for

    def __call__(self, queries: list[str]) -> list[Observation]:
        """Return an observation for each query; of several processes the first asks.

        Raises UserError where Wikipedia stays down (see services/outage.py).
        """
        return ranks.of_first(lambda: self._ask(queries))

    def _ask(self, queries: list[str]) -> list[Observation]:
        keys = [normalize_query(query) for query in queries]
        results = {key: self._kept_passages(key) for key in dict.fromkeys(keys)}
        missing: dict[str, str] = {}
        for key, query in zip(keys, queries, strict=True):
            if results[key] is None:
                missing[key] = query
        misses = sum(key in missing for key in keys)
        self.counts["hits"] += len(keys) - misses
        self.counts["misses"] += misses
        if self.mode != "replay" and missing:
            answers = self.outage.ask(list(missing.values()), self._search_all)
            results.update(zip(missing, answers, strict=True))
        return [self._observe(results[key]) for key in keys]

    def _kept_passages(self, key: str) -> list[Passage] | None:
        if self.mode == "refresh":
            return self.refreshed.get(key)
        return _read_rows(self.cache.get(key, self.top_k, self.language))

    def cached_observations(self) -> dict[str, str]:
        """Return the observation of every query that the cache holds for this tool's settings."""
        observations = {}
        for key, rows in self.cache.items():
            passages = _read_rows(rows)
            if passages is not None and key[1:] == [self.top_k, self.language]:
                observations[key[0]] = join_passages(passages)
        return observations

    def _search_all(self, queries: list[str]) -> list[list[Passage] | None]:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(
                tqdm(
                    pool.map(self.search_online, queries),
                    desc="Wikipedia",
                    unit="query",
                    total=len(queries),
                    leave=False,
                    delay=2,
                )
            )

    def _observe(self, passages: list[Passage] | None) -> Observation:
        if passages is not None:
            return Observation(join_passages(passages))
        if self.mode == "replay":
            return Observation(MISSED_TEXT, Provenance.MISSED)
        return Observation(FAILED_TEXT, Provenance.FAILED)

    def search_online(self, query: str) -> list[Passage] | None:
        """Ask Wikipedia, and keep what it answers; return None where the search failed.

        While Wikipedia is down, nothing is asked.
        """
        if self.outage.is_down:
            return None
        try:
            passages, is_complete = self._find_passages(query)
        except self.package.exceptions.WikipediaException:
            # Wikipedia does not take this query, which is an answer, and no reason to stop.
            self.outage.count_answer()
            self._count_error()
            return None
        except (requests.RequestException, *NONSENSE) as error:
            self.outage.count_failure(f"{type(error).__name__}: {error}")
            self._count_error()
            return None
        self.outage.count_answer()
        if is_complete:
            # Kept at once, so that it is not lost when another query ends the run.
            key = normalize_query(query)
            self.cache.put(key, self.top_k, self.language, answer=passages)
            self.refreshed[key] = passages
        else:
            self._count_error()
        return passages

    def _find_passages(self, query: str) -> tuple[list[Passage], bool]:
        """Return the passages of a query, and whether all of its pages were understood.

        A page that is not understood is left out; the others are of use, but they are not what
        Wikipedia says of the query. Raises one of NONSENSE where no page is left.
        """
        passages: list[Passage] = []
        nonsense: Exception | None = None
        for title in self.package.search(query[:300], results=self.top_k)[: self.top_k]:
            try:
                passage = self._read_lead(title)
            except NONSENSE as error:
                nonsense = error
                continue
            if passage is not None:
                passages.append(passage)
        if nonsense is not None and not passages:
            raise nonsense
        return passages, nonsense is None

    def _read_lead(self, title: str) -> Passage | None:
        """Return what a page begins with; a name of several things says which.

        None for a page that is missing, or that only leads in a ring.
        Raises one of NONSENSE for an answer that is not understood.
        """
        try:
            with self.requests.limited_to(MAX_REQUESTS_A_PAGE):
                page = self.package.page(title, auto_suggest=False)
                if not isinstance(page.title, str):
                    raise ValueError("a title that is no text")
                return Passage(page.title, " ".join(page.summary.split()))
        except self.package.exceptions.DisambiguationError as error:
            meanings = "; ".join(error.options[:8])
            return Passage(title, f"This name may mean: {meanings}.")
        except (self.package.exceptions.PageError, EndlessRedirects):
            return None

    def _count_error(self) -> None:
        with self.lock:
            self.counts["errors"] += 1

    def report(self) -> str:
        """Return hits and misses of the cache, errors, and seconds waited."""
        errors = f"{self.counts['errors']} errors"
        if self.outage.failures:
            errors += f" ({self.outage.report()})"
        return (
            f"{self.counts['hits']} hits, {self.counts['misses']} misses, {errors}, "
            f"{self.http.waited:.1f} s waited"
        )


def normalize_query(query: str) -> str:
    """Return a query without its case, width and spaces: queries that differ in these are one."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split())


def _read_rows(rows: Any) -> list[Passage] | None:
    """Return the passages that a row of the cache holds, None for one that holds anything else."""
    if not isinstance(rows, list):
        return None
    for row in rows:
        is_pair = isinstance(row, list) and len(row) == 2
        if not is_pair or not all(isinstance(text, str) for text in row):
            return None
    return [Passage(title, text) for title, text in rows]


@dataclass
class _Answer:
    """What the package reads of a response."""

    value: dict[str, Any]

    def json(self) -> dict[str, Any]:
        return self.value


def _refuse_passing_errors(answer: Any) -> _Answer:
    """Return an answer of MediaWiki; raise ValueError for nonsense, and errors that pass."""
    if not isinstance(answer, dict):
        raise ValueError("no answer of MediaWiki")
    error = answer.get("error")
    if isinstance(error, dict):
        code = str(error.get("code", ""))
        if code.startswith(PASSING_ERRORS):
            raise ValueError(code)
    return _Answer(answer)


class EndlessRedirects(requests.RequestException):
    """Pages that send one on and on, as the wikipedia package follows them."""


class _PackageRequests:
    """What the package gets in place of the module `requests`.

    The module has no timeouts and no retries, and the package's own rate limit rounds its waits
    down to nothing.
    """

    def __init__(self, session: PoliteSession) -> None:
        self.session = session
        self.thread = threading.local()  # .requests_left: those that a thread may still send

    def get(self, url: str, **options: Any) -> _Answer:
        """Send a request; raise EndlessRedirects where this thread may send no more."""
        self.thread.requests_left = getattr(self.thread, "requests_left", math.inf) - 1
        if self.thread.requests_left < 0:
            raise EndlessRedirects(f"pages of {url} that send one on and on")
        return self.session.send("GET", url, _refuse_passing_errors, **options)

    @contextlib.contextmanager
    def limited_to(self, count: int) -> Generator[None]:
        """Let this thread send so many requests at most inside the block."""
        self.thread.requests_left = count
        try:
            yield
        finally:
            self.thread.requests_left = math.inf
