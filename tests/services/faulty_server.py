"""Bad answers of an HTTP server, by name: each is sent in the place of a good one."""

import contextlib
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler

# Bodies that come with status 200 and the right length.
BODIES = {
    "empty": b"",
    "null": b"null",
    "text": b'"Nothing found."',
    "number": b"1e999",
    "list": b"[1, 2]",
    "no object inside": b'{"result": null, "query": null}',
    "wrong types": b'{"result": [[7], ["x"]], "query": {"search": [7], "pages": [7]}}',
    "too few": b'{"result": []}',
    "too many": b'{"result": [[], []]}',
    "half a character": b'{"result": "\xc3"}',
    "Latin-1": '{"result": "Ada Müller"}'.encode("latin-1"),
    "nested": b"[" * 200_000,
    "long number": b"9" * 10_000,
    "html": b"<html>Sorry</html>",
    "terminal": b"\x1b]0;x\x07\x1b[31m",
    "huge": b'{"result": "' + b"x" * 10_000_000,
}
STATUSES = {"400": 400, "401": 401, "404": 404, "429": 429, "500": 500, "503": 503, "999": 999}
# Faults that only end with the client's limit of time.
SLOW = ("slow", "drip", "dripping headers")
OTHERS = (
    "cut JSON",
    "too short",
    "too long",
    "reset",
    "redirect to itself",
    "redirect elsewhere",
    "broken gzip",
    "no HTTP",
)
FAULTS = (*BODIES, *STATUSES, *OTHERS, *SLOW)


def send(handler: BaseHTTPRequestHandler, body: bytes, fault: str = "") -> None:
    """Answer a request with a body, or with a fault in its place.

    A client that has waited for long enough is gone, which is no error.
    """
    with contextlib.suppress(OSError):
        _send(handler, body, fault)


def _send(handler: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
    # Whoever is confused by one answer gets the next over another connection.
    handler.close_connection = True
    if fault == "no HTTP":
        handler.wfile.write(b"\x1b[31m 200 fine\r\n\r\n" + body)
    elif fault == "dripping headers":
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        _drip(handler)
    elif fault == "slow":
        time.sleep(1.0)
        _send_parts(handler, 200, {}, body)
    elif fault == "drip":
        _send_parts(handler, 200, {"Content-Length": "1000"}, b"")
        _drip(handler)
    elif fault == "reset":
        _send_parts(handler, 200, {"Content-Length": str(len(body))}, body[: len(body) // 2])
        # Closing with this option sends a reset.
        option = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        handler.connection.close()
    else:
        _send_parts(handler, *_whole_answer(handler, body, fault))


def _whole_answer(
    handler: BaseHTTPRequestHandler, body: bytes, fault: str
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of an answer that is sent at once."""
    headers = {"Content-Length": str(len(body))}
    if fault in BODIES:
        return 200, {"Content-Length": str(len(BODIES[fault]))}, BODIES[fault]
    if fault in STATUSES:
        if fault == "429":
            headers["Retry-After"] = "1"
        return STATUSES[fault], headers, body
    if fault == "cut JSON":
        return 200, {}, body[:-1]
    if fault == "too short":
        return 200, {"Content-Length": str(len(body) + 100)}, body
    if fault == "too long":
        return 200, {"Content-Length": str(len(body) - 1)}, body
    if fault == "redirect to itself":
        return 302, {"Location": handler.path, "Content-Length": "0"}, b""
    if fault == "redirect elsewhere":
        return 302, {"Location": "file:///etc/hostname", "Content-Length": "0"}, b""
    if fault == "broken gzip":
        return 200, headers | {"Content-Encoding": "gzip"}, body
    assert not fault, fault
    return 200, headers, body


def _send_parts(
    handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()


def _drip(handler: BaseHTTPRequestHandler) -> None:
    """Send a letter now and then, so that no timeout between two of them ends the answer."""
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
