"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: a command ends where nothing is lost, with one line.

A signal raises Stopped at once, but for a stage that is being trained: that ends when its step is
done and saved. A second signal ends it at once too, but a second SIGHUP does nothing: a terminal
that closes sends one, and its shell sends another.
"""

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Generator
from dataclasses import dataclass
from traceback import format_exception
from types import FrameType, TracebackType

from common import ranks
from common.terminal import printable

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        """number: of the signal."""
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _Request:
    """Whether a signal waits for the end of a step, and which one came. Signals have no owner."""

    is_deferred: bool = False
    number: int | None = None


_request = _Request()


@contextlib.contextmanager
def stopping_on_signals() -> Generator[None]:
    """Let the signals raise Stopped, but for those that this process was told to ignore (nohup)."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _receive)
    try:
        yield
    finally:
        _request.is_deferred = False
        _request.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


def defer_stop() -> None:
    """Let a signal wait from here on, until end_deferral."""
    _request.is_deferred = True


def waiting_signal() -> int | None:
    """Return the number of the signal that waits, None where there is none.

    Of several processes it is enough that one has received it: they end after the same step.
    """
    numbers = [number for number in ranks.gather(_request.number) if number is not None]
    return numbers[0] if numbers else None


def end_deferral(number: int | None = None) -> None:
    """Raise Stopped if a signal waits; from here on one raises it at once.

    number: of one that waits in another process.
    """
    _request.is_deferred = False
    number = number or _request.number
    if number is not None:
        raise Stopped(number)


def _receive(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _leave_terminal()
    if not _request.is_deferred or _request.number is not None:
        raise Stopped(number)
    _request.number = number
    if not ranks.is_first():
        return
    name = signal.Signals(number).name
    line = f"\n{name}: stopping as soon as this step is saved; a second signal stops at once\n"
    # print() may be what the signal has interrupted, and can't be entered twice.
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


def _leave_terminal() -> None:
    """Write to nowhere what would go to a terminal that is gone, which would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _end_import(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Say in one line that Ctrl-C came before a script had begun."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything was done", file=sys.stderr)
    else:
        sys.stderr.write(printable("".join(format_exception(kind, error, traceback))))


# Scripts import this file before the libraries that take seconds.
sys.excepthook = _end_import
