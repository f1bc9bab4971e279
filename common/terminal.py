"""What a terminal gets to see: nothing that could steer it.

Questions, passages, what a policy writes and what a server says may hold control characters. All
that a script prints to standard output goes through PrintableOutput, and so do error lines and
tracebacks through `printable`. The colours of our own go around it, by `own_output`.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Generator, Sequence
from typing import Any

# What can steer a terminal, or turn the order of the letters around it: control characters, other
# line ends, bidirectional overrides and isolates, and half a surrogate pair.
UNPRINTABLE = re.compile("[^\n\t\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")


if not sys.stderr.isatty():
    # In a file a progress bar is a line now and then. tqdm reads this when it is imported, by
    # whichever library comes first.
    os.environ.setdefault("TQDM_MININTERVAL", "20")


def printable(text: str) -> str:
    r"""Return a text for a terminal or a page, with what could steer them spelled out.

    >>> printable("Who?\x1b[2J\u202e")
    'Who?\\x1b[2J\\u202e'
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether a command without settings is asked what it does."""
    return len(arguments) == 1 and arguments[0] in ("-h", "--help")


class PrintableOutput:
    """A stream that spells out what could steer a terminal, and is another one otherwise."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text in its printable form."""
        return self.stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_output() -> Generator[None]:
    """Let standard output be printable, on a terminal of any encoding."""
    # A terminal that is not UTF-8 shows what it lacks as escapes.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    output: Any = PrintableOutput(own_output())
    with contextlib.redirect_stdout(output):
        yield


def own_output() -> Any:
    """Return standard output for texts that hold colours, and nothing of others unescaped."""
    if isinstance(sys.stdout, PrintableOutput):
        return sys.stdout.stream
    return sys.stdout
