"""Each file operation of this process, so that a test can fail one or be killed at it.

Python tells an audit hook of each open, mkdir, rename, remove and truncate before it is made. What
libraries write without Python (weights, tokenizer.json) is met by a limit on the size of files.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OTHER_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

Watcher = Callable[[str, str], None]  # (operation, path)

# A hook can't be taken out again, so there is one, and it has at most one watcher.
_watchers: list[Watcher] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    is_open = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING_FLAGS
    if not is_open and event not in OTHER_OPERATIONS:
        return
    if not isinstance(arguments[0], str | os.PathLike):
        return
    path = os.fspath(arguments[0])
    if path.startswith("out") or path.startswith(str(Path.cwd() / "out")):
        _watchers[0](event, path)


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call a function before each operation that changes something in the folder `out`."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.clear()
