"""Errors that a user can mend, and how a script ends with one."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: one line that names the file, line or setting, and the way out."""


def run_guarded(run: Callable[[], None]) -> None:
    """Run a script; print a UserError as one line on stderr and exit with status 2."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept", file=sys.stderr)
        sys.exit(130)
