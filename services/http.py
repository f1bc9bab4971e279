"""HTTP for services that others use too: requests that take turns, wait when told to, and retry.

Connections, redirects and timeouts are those of `requests`, and urllib3.Retry reads the
Retry-After headers. The loop of tries is our own, since urllib3.Retry works inside the connection
pool, for one request alone, and so can't do what is needed here:

- A Retry-After holds for all threads, and one that is too long ends a request at once; urllib3
  sleeps in the one thread that got it.
- Every try takes its turn among the threads, so that a retry is no second request at once.
- urllib3 is done once the headers are there. A body that is cut or is no JSON, and an error that
  MediaWiki sends with status 200, are seen after it.
- The first retry waits too, and the waits are spread in proportion to their length.
"""

import random
import threading
import time
from typing import Any

import requests
import urllib3
from requests.exceptions import ChunkedEncodingError, ContentDecodingError
from urllib3.exceptions import InvalidHeader

TRIES = 4  # of a request
TIMEOUT = 10.0  # seconds
LONGEST_WAIT = 30.0  # seconds; a request that would have to wait longer fails at once
# Statuses below 500 that pass: request timeout, too early, too many requests.
PASSING_STATUSES = (408, 425, 429)
# How the codes of MediaWiki's errors begin that pass.
PASSING_MEDIAWIKI_ERRORS = (
    "ratelimited",
    "maxlag",
    "readonly",
    "internal_api_error",
    "cirrussearch-too-busy",
    "cirrussearch-regex-too-busy",
    "cirrussearch-backend-error",
)
# Connections that break, bodies that are cut, and what is not JSON (ValueError).
CONNECTION_FAULTS = (
    requests.ConnectionError,
    requests.Timeout,
    ChunkedEncodingError,
    ContentDecodingError,
    ValueError,
)


class PoliteSession:
    """Requests whose answers are JSON, sent by any number of threads.

    At most one request begins in `gap` seconds. Faults that may pass are tried again after a wait
    that doubles: statuses 408, 425, 429 and 5xx, MediaWiki's own words for them, and
    CONNECTION_FAULTS. After a Retry-After no thread sends anything before its time; while that is
    more than LONGEST_WAIT away, requests fail at once.
    """

    def __init__(self, gap: float = 0.1, timeout: float = TIMEOUT) -> None:
        """Open a session.

        gap: seconds between the beginnings of two requests.
        timeout: seconds until a server that says nothing counts as a broken connection.
        """
        self.gap = gap
        self.timeout = timeout
        self.session = requests.Session()
        self.lock = threading.Lock()
        self.next_start = 0.0  # no request begins before this time of the monotonic clock
        self.waited = 0.0  # seconds that threads have waited, added up

    def get(self, url: str, **options: Any) -> requests.Response:
        """Send a GET request (see send)."""
        return self.send("GET", url, **options)

    def send(self, method: str, url: str, **options: Any) -> requests.Response:
        """Send a request and return its answer, whose body is JSON.

        options: those of requests.request.
        Raises requests.RequestException when all tries failed, or a try is of no use.
        """
        attempt = 0
        while True:
            attempt += 1
            self._wait_for_turn(url)
            seconds_asked = 0.0
            try:
                response = self.session.request(method, url, timeout=self.timeout, **options)
                if _is_final(response):
                    return response
            except CONNECTION_FAULTS as error:
                fault = requests.RequestException(f"{type(error).__name__} from {url}")
            else:
                fault = requests.HTTPError(f"{response.status_code} from {url}")
                seconds_asked = retry_after(response.headers.get("Retry-After", ""))
                self._hold_back_all(seconds_asked)
                if seconds_asked > LONGEST_WAIT:
                    raise requests.HTTPError(f"{fault}, and to wait {seconds_asked:.0f} s")
            if attempt >= TRIES:
                raise fault
            self.wait(seconds_asked or _backoff(attempt))

    def wait(self, seconds: float) -> None:
        """Sleep, and count the seconds."""
        with self.lock:
            self.waited += seconds
        time.sleep(seconds)

    def _wait_for_turn(self, url: str) -> None:
        with self.lock:
            start = max(self.next_start, time.monotonic())
            delay = start - time.monotonic()
            if delay > LONGEST_WAIT:
                raise requests.HTTPError(f"{url} said to wait {delay:.0f} s more")
            self.next_start = start + self.gap
        self.wait(max(0.0, start - time.monotonic()))

    def _hold_back_all(self, seconds: float) -> None:
        """Let no thread send anything for some seconds."""
        if seconds:
            with self.lock:
                self.next_start = max(self.next_start, time.monotonic() + seconds)


def _is_final(response: requests.Response) -> bool:
    """Whether a response is an answer, and no fault that passes.

    Raises HTTPError for a refusal and ValueError for a body that is no JSON.
    """
    if response.status_code >= 500 or response.status_code in PASSING_STATUSES:
        return False
    response.raise_for_status()
    body = response.json()
    if not isinstance(body, dict) or not isinstance(body.get("error"), dict):
        return True
    code = str(body["error"].get("code", ""))
    return not code.startswith(PASSING_MEDIAWIKI_ERRORS)


def _backoff(attempt: int) -> float:
    """Return seconds to wait: half a second, one, two .., and by chance up to as much again."""
    return 0.5 * 2 ** (attempt - 1) * (1 + random.random())


def retry_after(header: str) -> float:
    """Return the seconds of a Retry-After header, which may be a date; 0.0 for anything else."""
    try:
        return float(urllib3.Retry().parse_retry_after(header))
    except InvalidHeader:
        return 0.0
