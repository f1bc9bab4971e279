"""The checks of MLX on Apple's GPU, at a tiny size on a CPU."""

import json
import sys
from pathlib import Path

import pytest
from conftest import run_here

pytest.importorskip("mlx.core")

from speed.check_training import LOSSES


@pytest.mark.skipif(sys.platform == "darwin", reason="here it would check the GPU, for minutes")
def test_all_checks_pass_without_metal(tmp_path: Path) -> None:
    """One line says that there is no GPU, and the same checks run on the CPU."""
    done = run_here(tmp_path, "speed.metal_check")
    assert done.status == 0, done.out + done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("mlx finds no GPU on this machine")
    assert "20 checks passed, 0 failed, 0 were skipped" in lines[-1]
    rows = json.loads((tmp_path / "out" / "metal_check.json").read_text())
    checked = [row["check"] for row in rows if row["passed"]]
    ways = [name for name in checked if name.startswith("two steps of")]
    assert {name.split()[3].rstrip(",") for name in ways} == set(LOSSES)
    assert {
        "logits, CPU and device: how far apart",
        "--bits=4 learns",
        "texts that CPU and device write greedily alike",
        "a checkpoint goes on, on the CPU",
    } <= set(checked)
    ended = [row for row in rows if row["check"].startswith("seconds of")]
    assert len(ended) == 7
