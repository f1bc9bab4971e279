"""What practice costs: calls and seconds up to each measured EM, and the wall time to an EM.

A *raw* call is a rollout's search: five rollouts that ask the same count five. A *distinct* call is
a query that was not asked before. Calls that a world model was distilled from count as both.
`python -m environments.cost_curve` reads these figures from the logs of a run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import parse_json, refusing_damage
from evaluation.figures import Estimate

LATENCIES = (0.0, 0.05, 0.5)  # simulated, in seconds a call
CURVE_FILE = "cost_curve.json"  # in the folder of a run


@dataclass
class Point:
    """What a row has cost up to a step of RL, and the EM that it had there."""

    steps: int  # of all its stages
    raw_calls: float
    distinct_calls: float
    seconds: float  # rollouts, updates and preparation, with the tool as fast as it was
    em: float | None  # percent, on the questions of --eval_every; None where it was not measured


@dataclass
class RunCost:
    """What a row gave and cost in one run."""

    run: str
    em: float  # percent, on all evaluation questions
    raw_calls: float
    distinct_calls: float
    seconds: float
    times: list[float | None]  # seconds to the target EM for each of LATENCIES, with a cache


@dataclass
class RowCost:
    """What a row gave and cost: means over runs, and each run."""

    name: str
    kind: str  # who answers while it practises
    em: Estimate  # percent
    gain_over_start: Estimate  # over SFT-1&2
    gain_over_real: Estimate | None  # over the row that practises with the tool alone
    raw_calls: float
    distinct_calls: float
    seconds: float
    points: list[Point]  # where EM was measured, means over runs
    times: list[float | None]  # seconds to the target EM for each of LATENCIES, with a cache
    times_without_cache: list[float | None]
    runs: list[RunCost]


@dataclass
class CostCurve:
    """The content of cost_curve.json."""

    runs: list[str]
    target_gain: float  # the target EM has so many points more than SFT-1&2
    start_em: float  # of SFT-1&2 on all evaluation questions, percent
    rows: list[RowCost]


# ---- arithmetic ----------------------------------------------------------------------------------
def seconds_with_latency(
    points: Sequence[Point], latency: float, has_cache: bool = True
) -> list[float]:
    """Return the wall time up to each point where a call takes so many seconds.

    Calls are made one after the other.

    has_cache: a cache stands before the tool, so that distinct calls alone take time; else raw
        calls do.
    """
    if has_cache:
        return [point.seconds + latency * point.distinct_calls for point in points]
    return [point.seconds + latency * point.raw_calls for point in points]


def time_to(seconds: Sequence[float], ems: Sequence[float], target: float) -> float | None:
    """Return when a curve of EM first reaches a target, None if never.

    It is a straight line between its points.

    seconds, ems: of each point, in order.
    """
    if not ems:
        return None
    if ems[0] >= target:
        return seconds[0]
    for (start, em), (end, next_em) in pairwise(zip(seconds, ems, strict=True)):
        if next_em >= target:
            share = (target - em) / (next_em - em)
            return start + share * (end - start)
    return None


def times_to(points: Sequence[Point], target: float, has_cache: bool = True) -> list[float | None]:
    """Return the wall time to an EM for each of LATENCIES, in seconds; None if never."""
    measured = measured_points(points)
    ems = [point.em for point in measured if point.em is not None]
    return [
        time_to(seconds_with_latency(measured, latency, has_cache), ems, target)
        for latency in LATENCIES
    ]


def measured_points(points: Sequence[Point]) -> list[Point]:
    """Return the points at which EM was measured."""
    return [point for point in points if point.em is not None]


def mean_points(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the means over runs of measured points.

    Raises UserError where the runs measured at different steps.
    """
    if len({tuple(point.steps for point in points) for points in runs}) > 1:
        raise UserError("--runs: their stages differ in --eval_every or in steps; train them alike")
    return [
        Point(
            steps=points[0].steps,
            raw_calls=mean([point.raw_calls for point in points]),
            distinct_calls=mean([point.distinct_calls for point in points]),
            seconds=mean([point.seconds for point in points]),
            em=mean([point.em for point in points if point.em is not None]),
        )
        for points in zip(*runs, strict=True)
    ]


def mean(values: Sequence[float]) -> float:
    """Return the mean of some numbers."""
    return sum(values) / len(values)


# ---- cost_curve.json -----------------------------------------------------------------------------
def curve_to_json(curve: CostCurve) -> str:
    """Return the text of cost_curve.json."""
    return json.dumps(asdict(curve), indent=1) + "\n"


def read_curve(path: Path) -> CostCurve:
    """Return what a cost_curve.json holds. Raises UserError for another file."""
    refusal = (
        f"{path}: not what environments/cost_curve.py writes; "
        f"make it again with: python -m environments.cost_curve --run={path.parent.name}"
    )
    with refusing_damage(refusal):
        content = parse_json(path.read_text(encoding="utf-8"))
        rows = [_row_from_json(row) for row in content.pop("rows")]
        return CostCurve(**content, rows=rows)


def _row_from_json(values: dict[str, Any]) -> RowCost:
    gain_over_real = None
    if values["gain_over_real"] is not None:
        gain_over_real = Estimate(**values["gain_over_real"])
    nested: dict[str, Any] = {
        "em": Estimate(**values["em"]),
        "gain_over_start": Estimate(**values["gain_over_start"]),
        "gain_over_real": gain_over_real,
        "points": [Point(**point) for point in values["points"]],
        "runs": [RunCost(**run) for run in values["runs"]],
    }
    return RowCost(**(values | nested))
