"""An OpenAI-compatible endpoint on a loopback port, for the tests of what asks one."""

import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any


@dataclass
class Failure:
    """A status that is no success."""

    status: int
    error: Any = "maximum context length"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Garbage:
    """A success whose body is no JSON, as a proxy's page is."""

    body: str = "<html>"


class FakeEndpoint:
    """Answers each request by a rule, and keeps what came in."""

    def __init__(self, serve: Any, rule: Any) -> None:
        """Start the endpoint.

        serve: the fixture of conftest.py.
        rule: request -> the text of a reply, a whole answer as it is sent, a Failure or Garbage.
        """
        self.requests = []  # bodies of the requests
        self.paths = []
        self.keys = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.paths.append(self.path)
                outer.keys.append(self.headers.get("Authorization"))
                self.answer(rule(request))

            def answer(self, reply: Any) -> None:
                status = 200
                headers = {}
                answer = None if isinstance(reply, Garbage) else reply
                if isinstance(reply, Failure):
                    status = reply.status
                    headers = reply.headers
                    answer = {"error": reply.error}
                elif isinstance(reply, str):
                    answer = {
                        "choices": [{"message": {"role": "assistant", "content": reply}}],
                        "usage": {"prompt_tokens": 10, "completion_tokens": 3},
                    }
                body = json.dumps(answer, indent=1).encode()
                if isinstance(reply, Garbage):
                    body = reply.body.encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: Any, *args: Any) -> None:
                pass

        self.url = serve(Handler) + "/v1"


def user(text: str) -> list[dict[str, Any]]:
    """Return a conversation of one turn."""
    return [{"role": "user", "content": text}]
