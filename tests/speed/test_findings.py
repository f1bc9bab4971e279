"""The report of checks: what breaks, what comes too late, and the table."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import speed.findings as findings_module
from speed.findings import Finding, check_device, end_with_table, run_checks, table_of

NO_PLACE: Any = None


def breaks(place: Any) -> Iterator[Finding]:
    yield Finding("before", "1", "2", passed=False)
    raise RuntimeError("CUDA error: out of luck\nat some place")


def passes(place: Any) -> Iterator[Finding]:
    yield Finding("device", "", "cpu")
    yield Finding("loss", "at most 1", "0.5", passed=True)


def test_a_check_that_breaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a line of the report, after what it found, and the next one goes on."""
    findings = run_checks((breaks, passes), NO_PLACE, tmp_path / "report.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED  before: 2 (expected: 1)"
    assert lines[1] == "FAILED  breaks: RuntimeError: CUDA error: out of luck (expected: no error)"
    assert lines[-2] == "ok      loss: 0.5 (expected: at most 1)"
    assert len(json.loads((tmp_path / "report.json").read_text())) == len(findings) == len(lines)


def test_checks_after_the_end_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table and the last line say so; a check that nobody made has not failed.

    Guards: a script that was promised to end, and a report in which a check is missing.
    """
    report = tmp_path / "report.json"
    findings = run_checks((breaks, passes), NO_PLACE, report, seconds=0)
    assert [finding.verdict for finding in findings] == ["skipped", "skipped"]
    with pytest.raises(SystemExit) as end:
        end_with_table(findings, report)
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == "passes not begun, since the time is over skipped".split()
    assert lines[-1].startswith("0 checks passed, 0 failed, 2 were skipped")


def test_a_check_that_hangs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report has what it found, and the checks after it; nobody waits for it.

    Guards: a promise of ten minutes that holds for one check alone.
    """

    def hangs(place: Any) -> Iterator[Finding]:
        yield Finding("before", "1", "1", passed=True)
        try:
            time.sleep(60)
        except Exception as error:
            yield Finding("sleep", "", str(error), passed=False)

    monkeypatch.setattr(findings_module, "SECONDS_TO_END", 0.3)
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        check_device((hangs, passes), lambda folder: NO_PLACE, tmp_path / "report.json")
    assert time.monotonic() - started < 20
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "skipped hangs: stopped, since the time is over" in lines
    assert lines[-1].startswith("2 checks passed, 0 failed, 1 were skipped")


def test_the_table(tmp_path: Path) -> None:
    """Each finding with what was expected and seen and the verdict, below one another."""
    findings = [*passes(NO_PLACE), Finding("bench.py", "no error", "none", passed=False)]
    assert table_of(findings) == [
        "check     expected   seen  verdict",
        "device               cpu",
        "loss      at most 1  0.5   ok",
        "bench.py  no error   none  FAILED",
    ]
    with pytest.raises(SystemExit) as end:
        end_with_table(findings, tmp_path / "report.json")
    assert end.value.code == 1
