"""Several processes that work together, as torchrun starts them, but forked from a test.

So nothing is imported again: two of them take half a second instead of six.
"""

import os
import pickle
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

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
    children = [_start(work, rank, count, port) for rank in range(count)]
    try:
        contents = [_read(child.pipe) for child in children]
    except BaseException:
        for child in children:
            os.kill(child.number, signal.SIGKILL)
        raise
    finally:
        for child in children:
            os.waitpid(child.number, 0)
    results = [pickle.loads(content) if content else DeadProcess() for content in contents]
    for result in results:
        assert not isinstance(result, _Failure), result.traceback
    return results


@dataclass
class _Child:
    number: int  # of the process
    pipe: int  # where its result can be read


class _Failure:
    def __init__(self, text: str) -> None:
        self.traceback = text


def _start(work: Callable[[], Any], rank: int, count: int, port: int) -> _Child:
    """Begin the work in a child."""
    reader, writer = os.pipe()
    number = os.fork()
    if number:
        os.close(writer)
        return _Child(number, reader)
    # All forked processes share the lock of tqdm, and one that is killed never gives it back.
    tqdm.set_lock(threading.RLock())
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
    try:
        with open(writer, "wb") as pipe:
            pickle.dump(result, pipe)
    finally:
        os._exit(0)


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as pipe:
        return pipe.read()
