"""Errors that a user can mend, and how a script ends with one."""

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from common import ranks
from common.signals import Stopped, stopping_on_signals
from common.terminal import printable, printable_output

# What a disk or a folder refuses, and what can be done about it.
WAYS_OUT = {
    # A library that does not say why it could not write: nearly always this is why.
    0: "make room on that disk",
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of a file",
    errno.EROFS: "let it be written to",
    errno.EACCES: "let this user use it",
    errno.EPERM: "let this user use it",
    errno.ENOTDIR: "move the file that is in the place of a folder",
    errno.EEXIST: "move the file that is in the place of a folder",
    errno.EISDIR: "move the folder that is in the place of a file",
    errno.EIO: "see to that disk",
}


class UserError(Exception):
    """Bad input: one line that names the file, line or setting, and the way out."""


class DiskError(UserError):
    """A file that can't be written. What was finished before is kept."""


class OutageError(UserError):
    """A service that stays down. What was finished before is kept."""


def disk_error(error: OSError, path: Path | None = None) -> DiskError:
    """Return the line for what a disk or a folder refuses.

    path: what was written, for an error that does not say it.
    """
    way_out = WAYS_OUT.get(error.errno or 0, "see what became of it")
    name = error.filename or path or "a file that was written"
    return DiskError(f"{name}: {error.strerror or error}; {way_out}")


def resume_command() -> str:
    """Return the command that goes on with what this one has begun."""
    if ranks.launcher():
        return f"the same {ranks.launcher()} command and --resume"
    arguments = list(sys.orig_argv)
    if "--resume" not in arguments:
        arguments.append("--resume")
    return shlex.join(arguments)


def refuse_other_encoding(arguments: Iterable[str]) -> None:
    """Raise UserError for an argument that is not UTF-8, since nothing could encode it again."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{argument}: not UTF-8 text; write it in a UTF-8 terminal, or rename the file"
            ) from None


def run_guarded(run: Callable[[], None], can_resume: bool = False) -> None:
    """Run a script, and end it with one line on stderr where something outside it is wrong.

    The exit status is 2 for a UserError and for a disk that refuses, 128 and its number for a
    signal.

    can_resume: whether the script has --resume, so that the line can say how to go on.
    """
    way_on = ""
    if can_resume:
        way_on = f"; go on with: {resume_command()}"
    try:
        with stopping_on_signals(), printable_output():
            try:
                run()
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has gone, such as `head`. Python would flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (DiskError, ranks.LostRankError) as error:
        _end(f"error: {error}{way_on}", 2)
    except OutageError as error:
        # What keeps answers in a cache goes on by itself.
        _end(f"error: {error}{way_on or '; then run the same command again'}", 2)
    except UserError as error:
        _end(f"error: {error}", 2)
    except OSError as error:
        if error.errno not in WAYS_OUT:
            raise
        _end(f"error: {disk_error(error)}{way_on}", 2)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        if not ranks.is_first():
            # All are stopped together, and the first says it.
            sys.exit(128 + number)
        _end(f"stopped; what is finished is kept{way_on}", 128 + number)


def _end(line: str, status: int) -> None:
    if not ranks.is_first():
        line = f"process {ranks.rank()}: {line}"
    print(printable(line), file=sys.stderr)
    sys.exit(status)
