"""The figures of a row, as eval.json keeps them."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from evaluation.figures import (
    ActingFigures,
    Estimate,
    JudgeFigures,
    RowFigures,
    SetFigures,
    SuccessFigures,
    read_figures,
    row_from_json,
    row_to_json,
)

SET_KEYS = ["em", "f1", "cover", "overlap", "malformed", "forced", "actions"]
AVERAGE_KEYS = [
    *SET_KEYS,
    "search_known",
    "search_unknown",
    "em_known",
    "em_unknown",
    "calculated",
    "em_seen",
    "em_unseen",
    "questions_seen",
    "em_low",
    "em_high",
    "questions",
    "by_actions",
]
GAIN_KEYS = ["gain", "gain_low", "gain_high", "gain_questions"]


def row_of(gain: Any = None, judge: Any = None) -> Any:
    return RowFigures(
        sets={
            "nq": SetFigures(50.0, 60.0, 70.0, 80.0, 5.0, 4.0, 1.5),
            "hotpotqa": SetFigures(30.0, 40.0, 50.0, 60.0, 3.0, 2.0, 2.5),
        },
        average=SetFigures(40.0, 50.0, 60.0, 70.0, 4.0, 3.0, 2.0),
        acting=ActingFigures(0.25, 0.75, None, 30.0, None, 90.0, 10.0, 2),
        em_low=35.0,
        em_high=45.0,
        by_actions={
            2: SuccessFigures(questions=4, correct=1, success=25.0, share=50.0),
            10: SuccessFigures(questions=1, correct=1, success=100.0, share=50.0),
        },
        questions=5,
        gain=gain,
        judge=judge,
    )


GAIN = Estimate(points=4.0, low=1.0, high=7.0, questions=5)
JUDGE = JudgeFigures({"nq": 55.0, "hotpotqa": None}, average=55.0, unread=3)


def test_a_row_in_eval_json() -> None:
    """Its sets, then "avg": the keys that other programs read, in their order."""
    values = row_to_json(row_of())
    assert list(values) == ["nq", "hotpotqa", "avg"]
    assert list(values["nq"]) == SET_KEYS
    assert list(values["nq"].values()) == [50.0, 60.0, 70.0, 80.0, 5.0, 4.0, 1.5]
    assert list(values["avg"]) == AVERAGE_KEYS
    assert values["avg"]["em"] == 40.0
    assert values["avg"]["search_unknown"] == 0.75
    assert (values["avg"]["em_low"], values["avg"]["em_high"]) == (35.0, 45.0)
    success = {"questions": 4, "correct": 1, "success": 25.0, "share": 50.0}
    assert list(values["avg"]["by_actions"]) == ["2", "10"]
    assert values["avg"]["by_actions"]["2"] == success


def test_a_row_with_a_gain_and_a_judge() -> None:
    """They are there only where they were measured. A judge adds to the sets too."""
    values = row_to_json(row_of(GAIN, JUDGE))
    average = values["avg"]
    assert list(average) == [*AVERAGE_KEYS, *GAIN_KEYS, "judge", "judge_unread"]
    assert [average[key] for key in GAIN_KEYS] == [4.0, 1.0, 7.0, 5]
    assert (average["judge"], average["judge_unread"]) == (55.0, 3)
    assert list(values["nq"]) == [*SET_KEYS, "judge"]
    assert (values["nq"]["judge"], values["hotpotqa"]["judge"]) == (55.0, None)


@pytest.mark.parametrize("gain", [None, GAIN])
@pytest.mark.parametrize("judge", [None, JUDGE])
def test_a_row_is_read_as_it_was(gain: Any, judge: Any) -> None:
    row = row_of(gain, judge)
    assert row_from_json(json.loads(json.dumps(row_to_json(row)))) == row


@pytest.mark.parametrize("text", ['{"rows"', "[]", "{}", '{"rows": {"A": {"avg": {"em": 1.0}}}}'])
def test_a_file_that_holds_other_figures(tmp_path: Path, text: str) -> None:
    """One line says what to do. Guards: a traceback for a damaged or old file."""
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match=r"eval\.json: not the figures .*; evaluate this run again"):
        read_figures(tmp_path / "eval.json")
