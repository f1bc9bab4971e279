"""When does imagination pay? What each way to practise gives, and what it costs in real calls.

    bash run.sh --world-models                                  # trains the rows, once for a seed
    python -m environments.cost_curve                           # of one run
    python -m environments.cost_curve --runs=nano,seed1,seed2   # seeds pooled
    python -m environments.cost_curve --clock=quiet             # seconds of a step from another run

It reads the logs and predictions of some runs, prints a table in Markdown and writes
out/<run>/cost_curve.json, which plot.py draws. Rows that were not trained or not evaluated are left
out.

All rows but the paper's in SFT's world practise on the same questions at the same price of a call.
A row's calls are those of its stages and of the world model that it practises in. Its seconds are
those of rollouts and updates, of distilling the world model, and where it starts at SFT-3, of
SFT-3. Times to an EM are read off a line through the looks that --eval_every took: its start, then
every so many steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import UserError
from common.files import write_text
from common.runs import run_folder
from common.settings import CommaList, RunSettings, main
from environments.cost_logs import (
    ALL_REAL,
    CURVE_ROWS,
    CurveRow,
    RunLogs,
    eval_row,
    read_clock,
    read_points,
    read_run,
)
from environments.costs import (
    CURVE_FILE,
    LATENCIES,
    CostCurve,
    RowCost,
    RunCost,
    curve_to_json,
    mean,
    mean_points,
    measured_points,
    times_to,
)
from evaluation.markdown import em_text, gain_text, table_head, table_row
from evaluation.statistics import em_of, paired_gain


@dataclass(kw_only=True)
class CostCurveSettings(RunSettings):
    """The settings of environments/cost_curve.py."""

    # Runs whose seeds are pooled. Empty: this run.
    runs: CommaList = field(default_factory=list)
    # A run whose stages and world models tell what a step of RL takes in each environment, and
    # distilling, for rows that were trained beside other work. Empty: their own logs. What SFT-3
    # takes, their own logs say.
    clock: str = ""
    # Times are those to an EM of so many points more than SFT-1&2 has.
    target_gain: float = 3.0


# ---- 1. Runs pooled ------------------------------------------------------------------------------
def pool_row(runs: Sequence[RunLogs], row: CurveRow, target_gain: float) -> RowCost:
    """Return what a row gave and cost over the runs that have it."""
    points_of_runs = []
    costs = []
    for logs in runs:
        points = read_points(logs, row)
        target = logs.looked_at_em("sft2") + target_gain
        costs.append(
            RunCost(
                run=logs.name,
                em=em_of([logs.final(row)]).points,
                raw_calls=points[-1].raw_calls,
                distinct_calls=points[-1].distinct_calls,
                seconds=points[-1].seconds,
                times=times_to(points, target),
            )
        )
        points_of_runs.append(measured_points(points))
    pooled = mean_points(points_of_runs)
    target = mean([logs.looked_at_em("sft2") for logs in runs]) + target_gain
    start_row = eval_row("sft2")
    real_runs = [logs for logs in runs if logs.has(ALL_REAL)]
    gain_over_real = None
    if real_runs and row != ALL_REAL:
        gain_over_real = paired_gain(
            [(logs.final(row), logs.final(ALL_REAL)) for logs in real_runs]
        )
    return RowCost(
        name=row.name,
        kind=row.kind,
        em=em_of([logs.final(row) for logs in runs]),
        gain_over_start=paired_gain(
            [(logs.final(row), logs.predictions[start_row]) for logs in runs]
        ),
        gain_over_real=gain_over_real,
        raw_calls=mean([cost.raw_calls for cost in costs]),
        distinct_calls=mean([cost.distinct_calls for cost in costs]),
        seconds=mean([cost.seconds for cost in costs]),
        points=pooled,
        times=times_to(pooled, target),
        times_without_cache=times_to(pooled, target, has_cache=False),
        runs=costs,
    )


# ---- 2. The table --------------------------------------------------------------------------------
def format_curve(curve: CostCurve) -> str:
    """Return the table of a cost curve in Markdown."""
    titles = ["", "EM (95%)", "over SFT-1&2", "over all real", "raw calls", "distinct", "minutes"]
    titles += [f"to +{curve.target_gain:g} at {1000 * latency:.0f} ms" for latency in LATENCIES]
    lines = table_head(titles)
    for row in curve.rows:
        cells = [
            row.name,
            em_text(row.em),
            gain_text(row.gain_over_start),
            gain_text(row.gain_over_real) if row.gain_over_real else "",
            f"{row.raw_calls:,.0f}",
            f"{row.distinct_calls:,.0f}",
            f"{row.seconds / 60:.1f}",
        ]
        for latency, time, uncached in zip(
            LATENCIES, row.times, row.times_without_cache, strict=True
        ):
            cells.append(
                _minutes(time) if not latency else f"{_minutes(time)}, {_minutes(uncached)}"
            )
        lines.append(table_row(cells))
    return "\n".join(lines)


def _minutes(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds / 60:.1f}"


# ---- the script ----------------------------------------------------------------------------------
def run(settings: CostCurveSettings) -> None:
    """Print the rows of some runs, and write cost_curve.json."""
    names = settings.runs or [settings.run]
    runs = [read_run(name) for name in names]
    if settings.clock:
        clock = read_clock(settings.clock)
        for logs in runs:
            logs.clock = clock
    rows = []
    for row in CURVE_ROWS:
        trained = [logs for logs in runs if logs.has(row)]
        if trained:
            rows.append(pool_row(trained, row, settings.target_gain))
    if not rows:
        raise UserError(
            f"--runs: {', '.join(names)}: no row is trained and evaluated; "
            "train them with: bash run.sh --world-models"
        )
    start = em_of([logs.predictions[eval_row("sft2")] for logs in runs])
    curve = CostCurve(names, settings.target_gain, start.points, rows)
    print(
        f"{start.questions} questions, {len(names)} runs; SFT-1&2 has {start.points:.1f} "
        f"({start.low:.1f} to {start.high:.1f}). Minutes to {settings.target_gain:g} points more, "
        "where a call takes so many ms: with a cache before the tool, without it.\n"
    )
    print(format_curve(curve))
    write_text(run_folder(settings) / CURVE_FILE, curve_to_json(curve))


if __name__ == "__main__":
    main(run, CostCurveSettings, __doc__)
