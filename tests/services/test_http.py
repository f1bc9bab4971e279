"""Requests that take turns, wait when told to, and retry (services/http.py)."""

import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import requests

from services import http
from services.http import PoliteSession, retry_after

UNREACHABLE = "http://127.0.0.1:1/"


class Server:
    """Answers {}, or says with a 429 to come back after the next of `retry_after_headers`."""

    def __init__(self) -> None:
        self.retry_after_headers = []
        self.arrivals = []  # times of the monotonic clock
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.arrivals.append(time.monotonic())
                if server.retry_after_headers:
                    self.send_response(429)
                    self.send_header("Retry-After", server.retry_after_headers.pop())
                else:
                    self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: Any, *arguments: Any) -> None:
                pass

        self.handler = Handler


def get(session: PoliteSession, address: str) -> Any:
    """Ask for an address, and return whatever JSON comes."""
    return session.send("GET", address, lambda value: value)


def start_all(threads: Any) -> None:
    for thread in threads:
        thread.start()


def join_all(threads: Any) -> None:
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("header, seconds", [("7", 7), ("soon", 0), ("", 0)])
def test_a_retry_after_in_seconds(header: str, seconds: int) -> None:
    assert retry_after(header) == seconds


def test_a_retry_after_that_is_a_date() -> None:
    in_a_minute = time.gmtime(time.time() + 60)
    header = time.strftime("%a, %d %b %Y %H:%M:%S GMT", in_a_minute)
    assert 50 < retry_after(header) <= 61


def test_a_retry_after_holds_for_all_threads(serve: Any) -> None:
    """No thread sends anything before the time that one of them was told."""
    server = Server()
    server.retry_after_headers = ["1"]
    address = serve(server.handler)
    session = PoliteSession(gap=0.05)
    threads = [threading.Thread(target=get, args=(session, address)) for _ in range(3)]
    threads[0].start()
    while not server.arrivals and threads[0].is_alive():
        time.sleep(0.01)
    # The first thread has now read its answer.
    time.sleep(0.05)
    start_all(threads[1:])
    join_all(threads)
    assert len(server.arrivals) == 4
    assert min(server.arrivals[1:]) - server.arrivals[0] >= 0.9


def test_a_long_retry_after_ends_requests_at_once(serve: Any) -> None:
    """Neither the request that was told so, nor the next one, waits for two minutes."""
    server = Server()
    server.retry_after_headers = ["120"]
    address = serve(server.handler)
    session = PoliteSession(gap=0.05)
    with pytest.raises(requests.HTTPError, match=r"429 from .*, and to wait 120 s"):
        get(session, address)
    with pytest.raises(requests.HTTPError, match=r"said to wait 1[12][0-9] s more"):
        get(session, address)
    assert len(server.arrivals) == 1


def test_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are half a second, one, two, each with up to as much again by chance, never the same."""
    waits = []
    session = PoliteSession(gap=0.0)
    monkeypatch.setattr(session, "wait", waits.append)
    for _ in range(2):
        with pytest.raises(requests.RequestException):
            get(session, UNREACHABLE)
    waits = [seconds for seconds in waits if seconds > 0.1]
    assert len(waits) == 6
    assert len(set(waits)) == 6
    for seconds, shortest in zip(waits, [0.5, 1, 2] * 2, strict=True):
        assert shortest <= seconds <= 2 * shortest


def test_a_busy_server_gets_four_tries(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    server.retry_after_headers = ["0"] * 20
    address = serve(server.handler)
    session = PoliteSession(gap=0.0)
    monkeypatch.setattr(session, "wait", lambda seconds: None)
    with pytest.raises(requests.HTTPError, match="429 from "):
        get(session, address)
    assert len(server.arrivals) == 4


def test_at_most_one_request_begins_in_a_gap(serve: Any) -> None:
    """Guards: the rate limit of the wikipedia package, which never waits."""
    server = Server()
    address = serve(server.handler)
    session = PoliteSession(gap=0.05)
    start = time.monotonic()
    threads = [threading.Thread(target=get, args=(session, address)) for _ in range(8)]
    start_all(threads)
    join_all(threads)
    assert time.monotonic() - start >= 0.35
    assert len(server.arrivals) == 8


def test_a_request_in_vain_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TRIES", 1)
    with pytest.raises(requests.RequestException):
        get(PoliteSession(), UNREACHABLE)
