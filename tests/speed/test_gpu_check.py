"""The checks of a GPU, at a tiny size on a CPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from speed import gpu_check
from speed.gpu_check import CHECKS, Finding, Place, run_checks


def test_all_checks_pass_on_a_cpu(tmp_path: Path) -> None:
    """The script that runs on a GPU is the same, so that what breaks it is found here."""
    findings = run_checks("cpu", tmp_path / "report.json")
    assert [finding for finding in findings if finding.passed is False] == []
    checked = [finding.check for finding in findings if finding.passed]
    # One in seven of 36.
    assert len([name for name in checked if name.startswith("two steps of")]) == 6
    assert {"loss, CPU and device", "a checkpoint goes on, on the CPU"} <= set(checked)
    assert len(json.loads((tmp_path / "report.json").read_text())) == len(findings)
    ended = [finding for finding in findings if finding.check.startswith("seconds of")]
    assert len(ended) == len(CHECKS)


def test_a_check_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a line of the report, behind what it found, and the next one goes on."""

    def breaks(place: Place) -> Iterator[Finding]:
        yield Finding("before", "1", "2", passed=False)
        raise RuntimeError("CUDA error: out of luck\nat some place")

    monkeypatch.setattr(gpu_check, "CHECKS", (breaks, gpu_check.describe_machine))
    run_checks("cpu", tmp_path / "report.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED  before: 2 (expected: 1)"
    assert lines[1] == "FAILED  breaks: RuntimeError: CUDA error: out of luck (expected: no error)"
    assert lines[-2] == "        device: cpu"
