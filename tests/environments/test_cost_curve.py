"""The cost curve: calls, seconds and times, against numbers that are counted by hand."""

import re
from pathlib import Path

import pytest
from conftest import ROOT
from made_up_run import MadeUpRun, write_rows

import train_rl
from common.errors import UserError
from environments import cost_logs
from environments.cost_curve import CostCurveSettings, run
from environments.cost_logs import (
    ALL_REAL,
    CURVE_ROWS,
    LOOKED_AT,
    Clock,
    CurveRow,
    read_clock,
    read_points,
    read_run,
)
from environments.costs import (
    LATENCIES,
    Point,
    curve_to_json,
    mean_points,
    measured_points,
    read_curve,
    seconds_with_latency,
    time_to,
    times_to,
)

ROWS = {row.stages[-1]: row for row in CURVE_ROWS}
PAPER = ROWS["internal_80_real_16"]
DISTILLED = ROWS["distilled_80_real_16"]
LOGS = ROWS["logs_80"]
HALF_MIXED = ROWS["half_confident_96"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_up_run(name: str) -> MadeUpRun:
    """Return a run with three rows; SFT-1&2 is right on one of four questions."""
    made_up = MadeUpRun(name)
    made_up.scores = {"SFT-1&2": [1.0, 0.0, 0.0, 0.0], "SFT-1&2&3": [0.0, 0.0, 0.0, 0.0]}
    calls = [(0, "a", 3), (0, "e", 2), (1, "e", 1), (1, "f", 1)]
    made_up.add_stage("real_96", "rl2", "sft2", "real", [None, 0.5], calls)
    made_up.scores["real_96"] = [1.0, 1.0, 0.0, 0.0]

    made_up.add_world_model("world_model", learned="abc", calls=4)
    made_up.add_stage(
        "distilled_80", "rl1", "sft2", "distilled", [None, 0.5], world_model="world_model"
    )
    made_up.add_stage("distilled_80_real_16", "rl2", "distilled_80", "real", [None, 0.75], calls)
    made_up.scores["distilled_80_real_16"] = [1.0, 1.0, 1.0, 0.0]

    write_rows(made_up.root / "sft3" / "log.jsonl", [{"seconds": 7.0}, {"seconds": 20.0}])
    made_up.add_stage("internal_80", "rl1", "sft3", "internal", [None, 0.25])
    made_up.add_stage("internal_80_real_16", "rl2", "internal_80", "real", [None, 0.25], calls)
    made_up.scores["internal_80_real_16"] = [1.0, 0.0, 0.0, 0.0]
    return made_up


def points_of(row: CurveRow) -> list[Point]:
    return measured_points(read_points(read_run("seed0"), row))


# ---- what a row has spent ------------------------------------------------------------------------
def test_calls_of_all_stages_and_of_distillation(folder: Path) -> None:
    """Distilling comes before the first step; what it asked is not asked for anew with a cache."""
    made_up_run("seed0").write()
    assert points_of(DISTILLED) == [
        Point(steps=0, raw_calls=4, distinct_calls=4, seconds=3.0, em=25.0),
        Point(steps=2, raw_calls=4, distinct_calls=4, seconds=33.0, em=50.0),
        # The second stage begins where the first ended.
        Point(steps=2, raw_calls=4, distinct_calls=4, seconds=33.0, em=50.0),
        Point(steps=4, raw_calls=11, distinct_calls=6, seconds=63.0, em=75.0),
    ]


def test_practice_with_the_tool_alone(folder: Path) -> None:
    """Raw calls are rollouts' searches: three that ask the same count three."""
    made_up_run("seed0").write()
    points = read_points(read_run("seed0"), ALL_REAL)
    assert points == [
        Point(steps=0, raw_calls=0, distinct_calls=0, seconds=0.0, em=25.0),
        Point(steps=1, raw_calls=5, distinct_calls=2, seconds=15.0, em=None),
        Point(steps=2, raw_calls=7, distinct_calls=3, seconds=30.0, em=50.0),
    ]


def test_a_world_model_is_paid_for_once(folder: Path) -> None:
    """Guards: two stages in one world model that count what it cost twice."""
    made_up = made_up_run("seed0")
    made_up.add_stage(
        "distilled_96", "rl2", "distilled_80", "distilled", [0.5], world_model="world_model"
    )
    made_up.scores["distilled_96"] = [1.0, 0.0, 0.0, 0.0]
    made_up.write()
    assert points_of(ROWS["distilled_96"])[-1] == Point(3, 4, 4, 48.0, 50.0)


def test_the_papers_row_starts_at_sft3_and_pays_for_it(folder: Path) -> None:
    """Guards: an imagination that is had for nothing, or that starts at SFT-1&2's EM."""
    made_up_run("seed0").write()
    points = points_of(PAPER)
    assert points[0] == Point(steps=0, raw_calls=0, distinct_calls=0, seconds=20.0, em=0.0)
    assert points[-1] == Point(steps=4, raw_calls=7, distinct_calls=3, seconds=80.0, em=25.0)


def test_the_stages_of_the_default_command(folder: Path) -> None:
    """It trains both and names neither. Guards: a KeyError on every run of the default recipe."""
    made_up = made_up_run("seed0")
    made_up.add_stage("rl1", "rl1", "sft2", "distilled", [0.5], world_model="world_model")
    made_up.add_stage("rl2", "rl2", "sft2", "real", [0.5], [(0, "a", 2)])
    for stage in ("rl1", "rl2"):
        made_up.stages[stage]["settings"]["stage"] = ""
    made_up.scores["rl2"] = [1.0, 0.0, 0.0, 0.0]
    made_up.write()
    assert points_of(ROWS["rl2"])[-1] == Point(2, 6, 4, 33.0, 50.0)


def test_a_mixed_environment_needs_its_own_world_model(folder: Path) -> None:
    """It pays for the one that its settings name, and its own calls."""
    made_up = made_up_run("seed0")
    made_up.add_world_model("world_model_half", learned="abc", calls=4)
    made_up.add_stage(
        "half_confident_96", "rl2", "sft2", "mixed", [0.5], [(0, "z", 2)], "world_model_half"
    )
    made_up.scores["half_confident_96"] = [1.0, 0.0, 0.0, 0.0]
    made_up.write()
    assert points_of(HALF_MIXED)[-1] == Point(1, 6, 5, 18.0, 50.0)


@pytest.mark.parametrize(("learned", "calls_of_others"), [("ae", 0), ("aexyz", 3)])
def test_a_world_model_of_logs(folder: Path, learned: str, calls_of_others: int) -> None:
    """It costs the row's own calls; those that it learned from other rows' logs are charged."""
    made_up = made_up_run("seed0")
    made_up.add_stage("real_16", "rl2", "sft2", "real", [None], [(0, "a", 3), (0, "e", 2)])
    made_up.add_world_model("world_model_logs", learned, calls=1)
    made_up.add_stage("logs_80", "rl1", "real_16", "distilled", [0.5], (), "world_model_logs")
    made_up.scores["logs_80"] = [1.0, 0.0, 0.0, 0.0]
    made_up.write()
    points = read_points(read_run("seed0"), LOGS)
    # It is paid for when the second stage begins.
    assert [point.raw_calls for point in points[:2]] == [0, 5]
    assert points[-1] == Point(2, 6 + calls_of_others, 3 + calls_of_others, 33.0, 50.0)


def test_seconds_of_another_run(folder: Path) -> None:
    """The clock's median step over all stages of an environment, and its seconds a token."""
    made_up_run("seed0").write()
    quiet = MadeUpRun("quiet")
    quiet.add_world_model("world_model", learned="ab", calls=3)
    quiet.add_stage("a", "rl1", "sft2", "distilled", [None] * 4, world_model="world_model")
    quiet.add_stage("b", "rl2", "sft2", "real", [None] * 2)
    quiet.add_stage("c", "rl2", "sft2", "mixed", [None] * 2, world_model="world_model")
    quiet.add_stage("d", "rl2", "sft2", "real", [None] * 3)
    all_seconds = {
        "a": [9.0, 2.0, 1.0, 8.0],
        "b": [9.0, 4.0],
        "c": [9.0, 7.0],
        "d": [9.0, 6.0, 8.0],
    }
    for name, seconds in all_seconds.items():
        rows = [{"seconds_rollout": value, "seconds_update": 0.5} for value in seconds]
        write_rows(quiet.root / name / "log.jsonl", rows)
    quiet.write()
    clock = read_clock("quiet")
    of_step = {"distilled": 2.5, "real": 6.5, "mixed by schedule": 7.5}
    # Three seconds for twice twenty tokens.
    assert clock == Clock("quiet", of_step, 0.075)
    logs = read_run("seed0")
    logs.clock = clock
    points = measured_points(read_points(logs, DISTILLED))
    before = 0.075 * logs.distillations["world_model"].tokens
    assert [point.seconds - before for point in points] == [0, 5, 5, 18]
    clock.of_step.pop("real")
    with pytest.raises(UserError, match="--clock=quiet: no stage there practised in: real"):
        read_points(logs, DISTILLED)


def test_a_world_model_that_did_not_keep_its_queries(folder: Path) -> None:
    """Guards: distinct calls that are counted twice since nobody knows what was asked before."""
    made_up = made_up_run("seed0")
    made_up.write()
    (made_up.root / "world_model" / "examples.jsonl").unlink()
    with pytest.raises(UserError, match=r"world_model: .* did not keep its queries"):
        read_run("seed0")


def test_the_start_is_measured_on_the_questions_of_the_curve(folder: Path) -> None:
    """Those that --eval_every looks at: the first of each set."""
    made_up = made_up_run("seed0")
    made_up.scores["SFT-1&2"] = [1.0] * LOOKED_AT + [0.0] * 40
    made_up.write()
    assert points_of(ALL_REAL)[0].em == 100.0
    assert train_rl.EVAL_QUESTIONS == LOOKED_AT


# ---- times ---------------------------------------------------------------------------------------
def test_latency_is_paid_for_each_call() -> None:
    """With a cache for each different query, without one for each search of a rollout."""
    points = [Point(0, 10, 4, 1.0, 20.0), Point(16, 110, 24, 61.0, 40.0)]
    assert seconds_with_latency(points, 0.5) == [3.0, 73.0]
    assert seconds_with_latency(points, 0.5, has_cache=False) == [6.0, 116.0]
    # 30% is half of the way.
    assert LATENCIES == (0.0, 0.05, 0.5)
    assert times_to(points, 30.0) == pytest.approx([31.0, 31.7, 38.0])
    assert times_to(points, 30.0, has_cache=False) == pytest.approx([31.0, 34.0, 61.0])


def test_the_first_time_that_a_curve_reaches_an_em() -> None:
    """Linear between points; a curve that falls again has reached it; one may begin above it."""
    seconds = [0.0, 10.0, 20.0, 40.0]
    ems = [50.0, 60.0, 55.0, 75.0]
    assert time_to(seconds, ems, 58.0) == pytest.approx(8.0)
    assert time_to(seconds, ems, 60.0) == pytest.approx(10.0)
    assert time_to(seconds, ems, 65.0) == pytest.approx(30.0)
    assert time_to(seconds, ems, 45.0) == 0.0
    assert time_to(seconds, ems, 75.1) is None
    assert time_to([], [], 1.0) is None


def test_runs_that_were_looked_at_alike_are_pooled() -> None:
    first = [Point(0, 0, 0, 0.0, 20.0), Point(16, 100, 10, 60.0, 40.0)]
    second = [Point(0, 0, 0, 0.0, 30.0), Point(16, 200, 30, 80.0, 60.0)]
    assert mean_points([first, second]) == [
        Point(0, 0, 0, 0.0, 25.0),
        Point(16, 150, 20, 70.0, 50.0),
    ]
    with pytest.raises(UserError, match="--eval_every"):
        mean_points([first, second[:1]])


# ---- the script ----------------------------------------------------------------------------------
def test_the_table_of_two_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that a run lacks are left out; plot.py reads what is written."""
    made_up_run("seed0").write()
    other = made_up_run("seed1")
    other.scores["real_96"] = [1.0, 1.0, 1.0, 1.0]
    del other.scores["internal_80_real_16"]
    other.write()
    run(CostCurveSettings(run="seed0", runs=["seed0", "seed1"], target_gain=25.0))
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = {line[0].removeprefix("| "): line for line in lines[2:]}
    assert list(cells) == [ALL_REAL.name, PAPER.name, DISTILLED.name]
    # Both runs are right on 2 questions, one on the other 2 as well: 75% of 4 questions.
    assert cells[ALL_REAL.name][1].startswith("75.0 (")
    assert cells[ALL_REAL.name][2].startswith("+50.0 (")
    assert cells[PAPER.name][3].startswith("-25.0 (")
    # The target of 50% is reached at the end of the first stage, 33 s and 4 calls in.
    assert [cell.rstrip(" |") for cell in cells[DISTILLED.name][4:]] == [
        "11",
        "6",
        "1.1",
        "0.6",
        "0.6, 0.6",
        "0.6, 0.6",
    ]
    assert cells[PAPER.name][-1] == "never, never |"

    curve = read_curve(Path("out", "seed0", "cost_curve.json"))
    assert curve_to_json(curve) == Path("out", "seed0", "cost_curve.json").read_text()
    assert [len(row.runs) for row in curve.rows] == [2, 1, 2]
    assert curve.start_em == 25.0
    assert curve.rows[2].times == pytest.approx([33.0, 33.2, 35.0])


def test_a_run_without_rows(folder: Path) -> None:
    """Each is one line that says what to do."""
    with pytest.raises(UserError, match=r"eval\.py --run=nano"):
        run(CostCurveSettings())
    made_up = MadeUpRun("nano")
    made_up.scores = {"SFT-1&2": [1.0]}
    made_up.write()
    with pytest.raises(UserError, match=r"run\.sh --world-models"):
        run(CostCurveSettings())
    Path("out", "nano", "cost_curve.json").write_text("{}")
    with pytest.raises(UserError, match=r"python -m environments\.cost_curve --run=nano"):
        read_curve(Path("out", "nano", "cost_curve.json"))


def test_run_sh_trains_the_rows() -> None:
    """Guards: a row of the table that no command trains, or from another folder than it says."""
    commands = re.sub(r"\\\n\s*", "", (ROOT / "run.sh").read_text())
    # What train_rl.py trains without a word.
    starts = {"rl1": "sft3", "rl2": "rl1"}
    for line in commands.splitlines():
        # Those in a loop are points of trade-offs, and no rows here.
        if line.strip().startswith("practise ") and "$price" not in line:
            options = dict(re.findall(r"--(start|out)=(\w+)", line))
            starts[options["out"]] = options["start"]
    assert set(starts) == {stage for row in CURVE_ROWS for stage in row.stages}
    for row in CURVE_ROWS:
        assert starts[row.stages[0]] in cost_logs.STARTS
        assert [starts[stage] for stage in row.stages[1:]] == list(row.stages[:-1])
