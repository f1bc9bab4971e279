"""Several processes that work together, as torchrun starts them, but forked from a test.

So nothing is imported again: two of them take half a second instead of six.
"""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import backends.torch as torch_backend

Value = TypeVar("Value")


class DeadProcess:
    """What is left of a process that ended without a result."""


def in_processes(work: Callable[[], Value], count: int = 2) -> list[Any]:
    """Return what some work returns in each process, or DeadProcess.

    Raises AssertionError with the traceback of what one of them raised.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes = [_start(work, rank, count, port) for rank in range(count)]
    contents = [_read(pipe) for pipe in pipes]
    for _ in pipes:
        os.wait()
    results = [pickle.loads(content) if content else DeadProcess() for content in contents]
    for result in results:
        assert not isinstance(result, _Failure), result.traceback
    return results


class _Failure:
    def __init__(self, text: str) -> None:
        self.traceback = text


def _start(work: Callable[[], Any], rank: int, count: int, port: int) -> int:
    """Begin the work in a child; return where its result can be read."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return reader
    try:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        torch_backend.join_ranks()
        result: Any = work()
    except BaseException:
        result = _Failure(traceback.format_exc())
    with open(writer, "wb") as pipe:
        pickle.dump(result, pipe)
    os._exit(0)


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as pipe:
        return pipe.read()
