"""A Wikipedia in small on loopback, which knows who wrote some books (small_checkpoint.py)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import wikipedia
from small_checkpoint import BOOKS, PEOPLE

from services.http import PoliteSession

COPIES = 48  # books whose names differ by a number


def book(number: int) -> str:
    """Return the title of a book."""
    return f"{BOOKS[number % 8]} {number}"


def writer(number: int) -> str:
    """Return who wrote a book."""
    return f"{PEOPLE[number % 8]} {number}"


def about(number: int) -> str:
    """Return what is said of a book."""
    return f"{book(number)} is a novel. It was written by {writer(number)}."


def serve_wikipedia() -> None:
    """Let the tool ask a server of this process, which answers until the process ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # In capitals, so that the tool does not ask for encryption.
    address = f"HTTP://127.0.0.1:{server.server_address[1]}/w/api.php"
    wikipedia.set_lang = lambda language: setattr(wikipedia.wikipedia, "API_URL", address)
    PoliteSession.__init__.__defaults__ = (0.0, *PoliteSession.__init__.__defaults__[1:])


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        parameters = parse_qs(urlparse(self.path).query)
        request = {name: values[0] for name, values in parameters.items()}
        body = json.dumps(_answer(request)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: Any, *arguments: Any) -> None:
        pass


def _answer(request: dict[str, str]) -> dict[str, Any]:
    """Return what MediaWiki answers to the requests of the package `wikipedia`."""
    titles = [book(number) for number in range(COPIES)]
    if "srsearch" in request:
        words = request["srsearch"].lower()
        named = [title for title in titles if words.endswith(title.lower())]
        found = (named or titles)[: int(request["srlimit"])]
        return {"query": {"search": [{"title": title} for title in found]}}
    title = request["titles"]
    page: dict[str, Any] = {"title": title, "fullurl": "x"}
    if request.get("prop") == "extracts":
        page = {"extract": about(titles.index(title))}
    return {"query": {"pages": {"7": page}}}
