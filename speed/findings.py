"""What checks of a device find: one line each as they go, a table at the end, and a file.

A check that breaks is one line of the report, and the others go on. When the time is over, those
that have not begun are skipped, and one that goes on is stopped.
"""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_text

# After so many seconds no check is begun, and after so many the last one is stopped, so that all of
# it takes less than ten minutes.
SECONDS_TO_BEGIN = 480.0
SECONDS_TO_END = 580.0
COLUMN_WIDTH = 60  # characters of a column of the table; a longer cell is not cut


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    expected: str  # "" where nothing is known to expect
    seen: str
    passed: bool | None = None  # None where nothing is expected
    skipped: bool = False  # nobody has looked

    @property
    def verdict(self) -> str:
        """One word, "" where nothing is expected."""
        if self.skipped:
            return "skipped"
        return {True: "ok", False: "FAILED", None: ""}[self.passed]


# Yields what it finds on a place, which is whatever the checks of a backend have in common.
Check = Callable[[Any], Iterator[Finding]]


class TimeIsOver(BaseException):
    """Stops a check. It is no Exception, so that no check takes it for a failure of its own."""


def at_most(check: str, value: float, limit: float, unit: str = "") -> Finding:
    """Return the finding that a value is not above a limit."""
    return Finding(check, f"at most {limit:,.3g}{unit}", f"{value:,.3g}{unit}", value <= limit)


def broken(check: str, error: Exception) -> Finding:
    """Return the finding that a check, or a part of it, ended with an error."""
    first_line = (str(error).splitlines() or [""])[0]
    return Finding(check, "no error", f"{type(error).__name__}: {first_line}", False)


def run_checks(
    checks: Sequence[Check], place: Any, report: Path, seconds: float = SECONDS_TO_BEGIN
) -> list[Finding]:
    """Run checks, print each finding and write all of them, as they are made.

    seconds: after so many no check is begun any more.
    """
    findings: list[Finding] = []
    end = time.monotonic() + seconds
    for check in checks:
        for finding in _find(check, place, end):
            findings.append(finding)
            print(line_of(finding), flush=True)
            rows = [asdict(row) for row in findings]
            write_text(report, json.dumps(rows, indent=1) + "\n")
    return findings


def _find(check: Check, place: Any, end: float) -> Iterator[Finding]:
    """Yield what a check finds; an error, of whatever kind, is a finding too."""
    name = check.__name__
    started = time.monotonic()
    if started >= end:
        yield Finding(name, "", "not begun, since the time is over", skipped=True)
        return
    try:
        yield from check(place)
    except Exception as error:
        yield broken(name, error)
    except TimeIsOver:
        yield Finding(name, "", "stopped, since the time is over", skipped=True)
    yield Finding(f"seconds of {name}", "", f"{time.monotonic() - started:.1f}")


def line_of(finding: Finding) -> str:
    """Return a finding as it is printed when it is made."""
    expected = f" (expected: {finding.expected})" if finding.expected else ""
    return f"{finding.verdict:8}{finding.check}: {finding.seen}{expected}"


def table_of(findings: Sequence[Finding]) -> list[str]:
    """Return the lines of a table of all findings."""
    rows = [("check", "expected", "seen", "verdict")]
    rows += [(row.check, row.expected, row.seen, row.verdict) for row in findings]
    widths = [min(COLUMN_WIDTH, max(map(len, column))) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        # A cell that is wider pushes the others of its line to the right, and is not cut.
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def check_device(checks: Sequence[Check], open_place: Callable[[Path], Any], report: Path) -> None:
    """Run all checks, print a table of them, and end the script.

    open_place: returns the place, given a folder for checkpoints.
    """
    report.parent.mkdir(exist_ok=True)
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_END)
    with tempfile.TemporaryDirectory() as folder:
        findings = run_checks(checks, open_place(Path(folder)), report)
    signal.setitimer(signal.ITIMER_REAL, 0)
    end_with_table(findings, report)


def _stop(_number: int, _frame: object) -> None:
    raise TimeIsOver


def end_with_table(findings: Sequence[Finding], report: Path) -> None:
    """Print the table of all checks, and end the script: 1 where a check failed, else 0."""
    failed = sum(finding.passed is False for finding in findings)
    passed = sum(finding.passed is True for finding in findings)
    skipped = sum(finding.skipped for finding in findings)
    print()
    for line in table_of(findings):
        print(line)
    print(f"\n{passed} checks passed, {failed} failed, {skipped} were skipped; see {report}")
    sys.exit(1 if failed else 0)
