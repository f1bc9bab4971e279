"""The figures of a row of the table, and how they stand in eval.json.

EM, F1 and the other scores are in percent; search rates are shares between 0 and 1. A mean over no
values is None, since NaN is not JSON.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import parse_json, refusing_damage


@dataclass
class SetFigures:
    """Means over the questions of one set, or over the sets."""

    em: float  # percent, and so are all but the last
    f1: float
    cover: float  # the answer holds a golden one
    overlap: float  # the score of the authors' code
    malformed: float | None  # None for a workflow, whose text has no form; so is the next
    forced: float | None
    actions: float  # of a question


def percent_cell(percent: float | None) -> str:
    """Return a figure as it stands in a table, "-" for None."""
    return "-" if percent is None else f"{percent:.1f}%"


@dataclass
class ActingFigures:
    """When a row acts, by what the base model knows, and what comes of it (paper appendix A)."""

    search_known: float | None  # share of the known facts that were searched for
    search_unknown: float | None
    em_known: float | None  # EM of the questions whose facts are all known
    em_unknown: float | None
    calculated: float | None  # share of the calculations for which the calculator was called
    em_seen: float | None = None  # EM of the questions whose facts were all in the pretraining
    em_unseen: float | None = None
    questions_seen: int = 0  # questions whose facts were all in the pretraining


@dataclass
class SuccessFigures:
    """The questions that a row answered with one number of actions (paper Fig. 3)."""

    questions: int
    correct: int
    success: float  # percent of these questions
    share: float  # percent of all correct answers of the row


@dataclass
class Estimate:
    """Exact match, or how much more of it a row has than another, with its 95% interval."""

    points: float  # percent, or percentage points of a gain
    low: float
    high: float
    questions: int  # that both rows answered


@dataclass
class JudgeFigures:
    """What a language model says of the answers of a row."""

    by_set: dict[str, float | None]  # percent that it calls right
    average: float | None  # over the sets
    unread: int  # verdicts that were neither yes nor no


@dataclass
class RowFigures:
    """All figures of one row."""

    sets: dict[str, SetFigures]
    average: SetFigures  # over the sets, each with the same weight
    acting: ActingFigures
    em_low: float  # the 95% interval of the average EM
    em_high: float
    by_actions: dict[int, SuccessFigures]  # number of actions -> its questions
    questions: int = 0  # that it answered, of all sets
    gain: Estimate | None = None  # over the ReAct workflow
    judge: JudgeFigures | None = None


def row_to_json(row: RowFigures) -> dict[str, Any]:
    """Return a row as it stands in eval.json: {set: {figure: value}, "avg": {figure: value}}."""
    sets: dict[str, Any] = {name: asdict(figures) for name, figures in row.sets.items()}
    average: dict[str, Any] = asdict(row.average) | asdict(row.acting)
    average["em_low"] = row.em_low
    average["em_high"] = row.em_high
    average["questions"] = row.questions
    average["by_actions"] = {
        str(count): asdict(figures) for count, figures in row.by_actions.items()
    }
    if row.gain is not None:
        average |= gain_to_json(row.gain)
    if row.judge is not None:
        for name, value in row.judge.by_set.items():
            sets[name]["judge"] = value
        average["judge"] = row.judge.average
        average["judge_unread"] = row.judge.unread
    return {**sets, "avg": average}


def gain_to_json(gain: Estimate) -> dict[str, float]:
    """Return a gain as it stands in eval.json, and as --compare prints it."""
    return {
        "gain": gain.points,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "gain_questions": gain.questions,
    }


def row_from_json(values: Mapping[str, Any]) -> RowFigures:
    """Return the row that `row_to_json` wrote. Raises KeyError for a figure that is missing."""
    average = values["avg"]
    set_names = [name for name in values if name != "avg"]
    row = RowFigures(
        sets={name: SetFigures(**_own_figures(SetFigures, values[name])) for name in set_names},
        average=SetFigures(**_own_figures(SetFigures, average)),
        acting=ActingFigures(**_own_figures(ActingFigures, average)),
        em_low=average["em_low"],
        em_high=average["em_high"],
        by_actions={
            int(count): SuccessFigures(**figures)
            for count, figures in average["by_actions"].items()
        },
        questions=average["questions"],
    )
    if "gain" in average:
        row.gain = Estimate(
            average["gain"],
            average["gain_low"],
            average["gain_high"],
            average["gain_questions"],
        )
    if "judge" in average:
        row.judge = JudgeFigures(
            {name: values[name]["judge"] for name in set_names},
            average["judge"],
            average["judge_unread"],
        )
    return row


def _own_figures(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some figures that are fields of a dataclass."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind)}


def read_figures(path: Path) -> dict[str, RowFigures]:
    """Return the rows of an eval.json.

    Raises UserError for a file that eval.py did not write as it does now.
    """
    refusal = f"{path}: not the figures that eval.py writes; evaluate this run again"
    with refusing_damage(refusal):
        rows = parse_json(path.read_text())["rows"]
        return {name: row_from_json(values) for name, values in rows.items()}
