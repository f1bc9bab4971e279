"""Exact match beside a second figure, against numbers that are counted by hand."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from made_up_run import MadeUpRun

from common.errors import UserError
from environments.trade_offs import PRICE_LINES, SFT3_LINES, TITLE_LINES, TradeOffSettings, run
from environments.trades import read_trade_offs, trade_offs_to_json
from evaluation.fidelity import (
    FIDELITY_FILE,
    HELD_OUT,
    POLICY,
    TRAINING,
    FidelityTable,
    Outcome,
    fidelity_to_json,
    summarize_splits,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imagined(right: int, wrong: int, nats: float = 1.0) -> dict[str, Any]:
    """Return the figures of a model that writes some observations right, and some wrong.

    nats: of the four tokens of each real observation.
    """
    outcomes = [
        Outcome(
            "a", "A 1: B.", "A 1: B." if number < right else "C 1: D.", 0.5, nats, 4, None, None
        )
        for number in range(right + wrong)
    ]
    return summarize_splits(outcomes)


def made_up_run(name: str, sft3_is_right: list[float]) -> None:
    """Write a run in which SFT-3 was trained with two weights, and RL at two prices."""
    made_up = MadeUpRun(name)
    made_up.scores = {"SFT-1&2": [1.0, 0.0], "SFT-1&2&3": sft3_is_right, "sft3_1_1": [0.0, 0.0]}
    for row, weight in (("sft3", 0.1), ("sft3_1_1", 1.0)):
        made_up.record(row, {"sft3_observation_coef": weight})
    for row, price, searched in (("distilled_80", 0.1, 0.9), ("cost_0.3", 0.3, 0.25)):
        made_up.record(row, {"rl1_call_cost": price, "world_model": "world_model_half"})
        made_up.scores[row] = [1.0, 1.0]
        made_up.search_known[row] = searched
    # The real steps after it know nothing of the world model.
    made_up.record("half_80", {"sweep_share": 0.5, "world_model": "world_model_half"})
    made_up.record("half_80_real_16", {"sweep_share": 1.0, "world_model": "world_model"})
    made_up.scores["half_80_real_16"] = [1.0, 0.0]
    made_up.write()
    table: FidelityTable = {
        "sft3": {TRAINING: imagined(3, 1)},
        "sft3_1_1": {TRAINING: imagined(4, 0, nats=2.0)},
        "world_model_half": {HELD_OUT: imagined(1, 3), POLICY: imagined(2, 3)},
    }
    (made_up.root / FIDELITY_FILE).write_text(fidelity_to_json(table))


def test_points_of_two_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EM and the second figure are means over the runs; a point has the value of its setting."""
    made_up_run("seed0", [1.0, 1.0])
    made_up_run("seed1", [1.0, 0.0])
    run(TradeOffSettings(run="seed0", runs=["seed0", "seed1"]))
    path = folder / "out" / "seed0" / "trade_offs.json"
    content = read_trade_offs(path)
    assert trade_offs_to_json(content) == path.read_text()
    assert content.start_em == 50.0
    sft3, titles, price = content.trade_offs
    points = [(point.label, point.x, point.em.points) for point in sft3.lines["one pass"]]
    assert points == [("0.1", 0.25, 75.0), ("1", 0.5, 0.0)]
    points = [(point.label, point.x, point.em.points) for point in price.lines["80 imagined"]]
    assert points == [("0.1", 90.0, 100.0), ("0.3", 25.0, 100.0)]
    (half,) = titles.lines["80 imagined + 16 real"]
    assert (half.label, half.x, half.em.points) == ("0.5", 40.0, 50.0)
    lines = capsys.readouterr().out.splitlines()
    assert "| 80 imagined | 0.3 | 100.0 (100.0 to 100.0) | 25.00 |" in lines


def test_a_stage_that_fidelity_has_not_measured(folder: Path) -> None:
    """It is left out where its fidelity is drawn, and kept where it is not."""
    made_up_run("nano", [1.0, 1.0])
    (folder / "out" / "nano" / FIDELITY_FILE).unlink()
    run(TradeOffSettings())
    content = read_trade_offs(folder / "out" / "nano" / "trade_offs.json")
    assert [list(trade_off.lines) for trade_off in content.trade_offs] == [list(PRICE_LINES)]


def test_a_run_without_points(folder: Path) -> None:
    """Each is one line that says what to do."""
    with pytest.raises(UserError, match=r"eval\.py --run=nano"):
        run(TradeOffSettings())
    made_up = MadeUpRun("nano")
    made_up.scores = {"SFT-1&2": [1.0]}
    made_up.write()
    with pytest.raises(UserError, match=r"run\.sh --world-models"):
        run(TradeOffSettings())


def test_run_sh_trains_the_points() -> None:
    """Each folder of a line is one that run.sh trains, or that the default recipe has.

    Guards: a point that nothing trains, which is left out without a word.
    """
    script = (ROOT / "run.sh").read_text()
    for lines in (SFT3_LINES, TITLE_LINES, PRICE_LINES):
        for folders in lines.values():
            for name in folders:
                stem, _, value = name.rpartition("_")
                in_a_loop = stem in ("sft3_1", "sft3_2", "cost") and f" {value}" in script
                assert name == "sft3" or in_a_loop or f"--out={name}" in script, name
