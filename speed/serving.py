"""Load on a retrieval server: many clients that ask one query after the other.

    python -m speed.serving PASSAGES QUESTIONS [CLIENTS SECONDS]     # 64 clients for 10 seconds

PASSAGES is a FlashRAG passage file, which `tools.py serve` serves in a process of its own, and
QUESTIONS a FlashRAG question file, whose questions are the queries. The last line is JSON: requests
a second, the median and the 99th percentile of their seconds, requests that failed, and the bytes
of memory that the server has after a tenth of the time and at its end. The clients take a part of
the same cores.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
from common.errors import UserError, run_guarded

# isort: split
import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from common.files import to_json
from data.question_files import read_question_sets

ROOT = Path(__file__).resolve().parent.parent
FAULTS = (OSError, http.client.HTTPException)


@dataclass
class Load:
    """What the clients have measured; each thread appends."""

    end: float  # of the monotonic clock
    seconds: list[float] = field(default_factory=list)  # of each request that was answered
    failures: list[str] = field(default_factory=list)  # of each request that was not


@contextlib.contextmanager
def serving(passages: str) -> Generator[tuple[str, int]]:
    """Serve a passage file; yield the server's address and the number of its process."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools.py"), "serve", passages, "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            _, mark, address = line.strip().partition("--corpus=")
            if mark:
                yield address, process.pid
                return
        raise UserError(f"{passages}: could not be served")
    finally:
        process.terminate()
        process.wait()


def ask_on(load: Load, address: str, queries: Sequence[str]) -> None:
    """Ask one query after the other over one connection, until the load ends."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    number = 0
    while time.monotonic() < load.end:
        body = json.dumps({"queries": [queries[number % len(queries)]], "topk": 3})
        number += 1
        started = time.monotonic()
        try:
            connection.request("POST", parts.path, body)
            response = connection.getresponse()
            found = json.loads(response.read())
        except (*FAULTS, ValueError) as error:
            load.failures.append(repr(error))
            connection.close()
            time.sleep(0.1)
            continue
        if response.status == 200 and len(found["result"]) == 1:
            load.seconds.append(time.monotonic() - started)
        else:
            load.failures.append(f"status {response.status}")
    connection.close()


def resident_bytes(process: int) -> int:
    """Return the memory that a process holds, in bytes."""
    command = ["ps", "-o", "rss=", "-p", str(process)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def measure(
    passages: str, queries: Sequence[str], clients: int, seconds: float
) -> dict[str, float | int | list[str]]:
    """Serve a passage file, let clients ask it for some seconds, and return the figures."""
    with serving(passages) as (address, process):
        load = Load(time.monotonic() + seconds)
        threads = []
        for client in range(clients):
            # Each begins with another query.
            own = [*queries[client:], *queries[:client]]
            thread = threading.Thread(target=ask_on, args=(load, address, own), daemon=True)
            threads.append(thread)
        for thread in threads:
            thread.start()
        time.sleep(seconds / 10)
        first_bytes = resident_bytes(process)
        for thread in threads:
            thread.join()
        last_bytes = resident_bytes(process)
    if not load.seconds:
        raise UserError(f"{passages}: no request was answered: {load.failures[:1]}")
    return {
        "clients": clients,
        "requests": len(load.seconds),
        "requests_per_second": round(len(load.seconds) / seconds, 1),
        "seconds_p50": round(float(np.quantile(load.seconds, 0.5)), 4),
        "seconds_p99": round(float(np.quantile(load.seconds, 0.99)), 4),
        "failures": len(load.failures),
        "first_failures": load.failures[:3],
        "bytes_after_a_tenth": first_bytes,
        "bytes_at_the_end": last_bytes,
    }


def main() -> None:
    """Read the command line, and print the figures."""
    words = sys.argv[1:]
    if len(words) not in (2, 4):
        raise UserError("usage: python -m speed.serving PASSAGES QUESTIONS [CLIENTS SECONDS]")
    clients, seconds = words[2:] or ("64", "10")
    if not (clients.isdecimal() and seconds.isdecimal() and int(clients) and int(seconds)):
        raise UserError(f"{clients}, {seconds}: CLIENTS and SECONDS are whole numbers above 0")
    question_sets = read_question_sets([words[1]], "QUESTIONS")
    texts = [question.question for members in question_sets.values() for question in members]
    print(to_json(measure(words[0], texts, int(clients), float(seconds))))


if __name__ == "__main__":
    run_guarded(main)
