"""HTTP for services that others use too: requests that take turns, wait when told to, and retry.

Connections and redirects are those of `requests`, and urllib3.Retry reads the Retry-After headers.
The loop of tries is our own, since urllib3.Retry works inside the connection pool, for one request
alone, and so can't do what is needed here:

- A Retry-After holds for all threads, and one that is too long ends a request at once; urllib3
  sleeps in the one thread that got it.
- Every try takes its turn among the threads, so that a retry is no second request at once.
- urllib3 is done once the headers are there. A body that is cut or is no JSON, and an error that
  MediaWiki sends with status 200, are seen after it.
- The first retry waits too, and the waits are spread in proportion to their length.

So is the limit of time: the timeouts of `requests` begin anew with every byte that comes, so that
an answer of one byte a second would last for ever.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
import urllib3
from requests.exceptions import ChunkedEncodingError, ContentDecodingError
from urllib3.exceptions import InvalidHeader

from common.files import parse_json
from common.terminal import printable

Value = TypeVar("Value")

LONGEST_MESSAGE = 200  # letters of others' words in a message
TRIES = 4  # of a request
TIMEOUT = 20.0  # seconds for a whole answer, redirects included
LARGEST_BODY = 2**20  # bytes of an answer
PIECE = 2**16  # bytes that are read at once
MOST_REDIRECTS = 5
LONGEST_WAIT = 30.0  # seconds; a request that would have to wait longer fails at once
# Statuses below 500 that pass: request timeout, too early, too many requests. A path that is not
# found is that of a server which is being started again, behind a proxy.
PASSING_STATUSES = (404, 408, 425, 429)
# Connections that break, answers that last too long, bodies that are cut, and a ValueError: what
# is no JSON, or not what was asked for.
PASSING_FAULTS = (
    requests.ConnectionError,
    requests.Timeout,
    TimeoutError,
    ChunkedEncodingError,
    ContentDecodingError,
    urllib3.exceptions.HTTPError,
    ValueError,
)


@dataclass
class Answer:
    """What a server sent."""

    status: int
    retry_after: str  # the header, as it is
    body: bytes  # empty for a status of 400 and above, whose words nobody reads


class PoliteSession:
    """Requests whose answers are JSON, sent by any number of threads.

    At most one request begins in `gap` seconds. Faults that may pass are tried again after a wait
    that doubles: PASSING_STATUSES, 5xx, and PASSING_FAULTS. After a Retry-After no thread sends
    anything before its time; while that is more than LONGEST_WAIT away, requests fail at once.
    """

    def __init__(
        self, gap: float = 0.1, timeout: float = TIMEOUT, largest_body: int = LARGEST_BODY
    ) -> None:
        """Open a session.

        gap: seconds between the beginnings of two requests.
        timeout: seconds that a whole answer may take, from the connection to the last byte.
        largest_body: bytes that an answer may have.
        """
        self.gap = gap
        self.timeout = timeout
        self.largest_body = largest_body
        self.session = requests.Session()
        self.session.max_redirects = MOST_REDIRECTS
        self.has_answered = False  # whether an answer could ever be read
        self.lock = threading.Lock()
        self.next_start = 0.0  # no request begins before this time of the monotonic clock
        self.waited = 0.0  # seconds that threads have waited, added up

    def send(self, method: str, url: str, read: Callable[[Any], Value], **options: Any) -> Value:
        """Send a request, and return what `read` makes of the JSON of its answer.

        read: raises ValueError for an answer that is none; it is then asked for again.
        options: those of requests.request.
        Raises requests.RequestException when all tries failed, or a try is of no use.
        """
        attempt = 0
        while True:
            attempt += 1
            self._wait_for_turn(url)
            seconds_asked = 0.0
            try:
                answer = call_within(self.timeout, lambda: self._fetch(method, url, options))
                if answer.status < 400:
                    value = read(parse_json(answer.body))
                    self.has_answered = True
                    return value
            except PASSING_FAULTS as error:
                fault = requests.RequestException(f"{_describe(error)} from {url}")
            else:
                fault = requests.HTTPError(f"status {answer.status} from {url}")
                if answer.status < 500 and answer.status not in PASSING_STATUSES:
                    raise fault
                seconds_asked = retry_after(answer.retry_after)
                self._hold_back_all(seconds_asked)
                if seconds_asked > LONGEST_WAIT:
                    raise requests.HTTPError(f"{fault}, and to wait {seconds_asked:.0f} s")
            if attempt >= TRIES:
                raise fault
            self.wait(seconds_asked or _backoff(attempt))

    def _fetch(self, method: str, url: str, options: dict[str, Any]) -> Answer:
        """Send one request; raise ValueError or TimeoutError for an answer without an end."""
        end = time.monotonic() + self.timeout
        body = bytearray()
        with self.session.request(
            method, url, timeout=self.timeout, stream=True, **options
        ) as response:
            retry_after_header = response.headers.get("Retry-After", "")
            if response.status_code < 400:
                while piece := response.raw.read1(PIECE, decode_content=True):
                    body += piece
                    if len(body) > self.largest_body:
                        raise ValueError(f"more than {self.largest_body:,} bytes")
                    # Nobody waits for it any more.
                    if time.monotonic() > end:
                        raise TimeoutError
            return Answer(response.status_code, retry_after_header, bytes(body))

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


def call_within(seconds: float, call: Callable[[], Value]) -> Value:
    """Return what a call returns; raise TimeoutError where it takes longer.

    The call then goes on in a thread of its own, which nobody waits for: what it waits for itself,
    such as the headers of an answer that come a letter at a time, can't be ended from outside.
    """
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None


def one_line(text: str) -> str:
    r"""Return the words of others as a part of a message: on one line, and not for long.

    >>> one_line("no such\nmodel \x1b[2J")
    'no such model \\x1b[2J'
    """
    # What is cut off need not be read first: a body may have megabytes.
    beginning = text[: 10 * LONGEST_MESSAGE]
    return printable(" ".join(beginning.split()))[:LONGEST_MESSAGE]


def _describe(fault: Exception) -> str:
    """Return what broke an answer; the words of these two are our own, or Python's."""
    name = type(fault).__name__
    if isinstance(fault, (ValueError, TimeoutError)) and str(fault):
        return f"{name}: {one_line(str(fault))}"
    return name


def _backoff(attempt: int) -> float:
    """Return seconds to wait: half a second, one, two .., and by chance up to as much again."""
    return 0.5 * 2 ** (attempt - 1) * (1 + random.random())


def retry_after(header: str) -> float:
    """Return the seconds of a Retry-After header, which may be a date; 0.0 for anything else."""
    try:
        return float(urllib3.Retry().parse_retry_after(header))
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0
