"""Who writes the observations of a stage (environments/environment.py)."""

from typing import Any

import pytest
from recorded_tools import RecordedTool, RecordedWorldModel, provenances

from autocoa import IMAGINE
from data.trajectory import Provenance
from environments.environment import (
    Environment,
    confident_environment,
    distilled_environment,
    internal_environment,
    real_environment,
    scheduled_environment,
)
from tools import Library, calculate

SUM = "calculate: 2 + 3"


def open_environment(name: str, budget: int = 0) -> Environment:
    """Return an environment by name, around a library with a recorded tool and the calculator."""
    library = Library({"search": RecordedTool(), "calculate": calculate})
    stand_in: Any = RecordedWorldModel({"A": 0.1, "B": 0.9, "C": 0.8})
    if name == "internal":
        return internal_environment(library)
    if name == "real":
        return real_environment(library)
    if name == "distilled":
        return distilled_environment(library, stand_in)
    if name == "scheduled":
        # So many steps that there is next to nothing for the tool at the first.
        return scheduled_environment(library, stand_in, 0.5, steps=1000, max_real_calls=budget)
    return confident_environment(library, stand_in, threshold=0.5, max_real_calls=budget)


def search(environment: Environment, *actions: str) -> Any:
    """Return the observations of some actions of an environment that has a search."""
    assert environment.search != IMAGINE
    found: Any = environment.search
    return found(list(actions), [])


@pytest.mark.parametrize(
    ("name", "searched", "calls"),
    [("distilled", "iii", 0), ("real", "rrr", 3), ("confident", "irr", 2), ("scheduled", "iii", 0)],
)
def test_who_answers_a_search(name: str, searched: str, calls: int) -> None:
    """The world model, the tool or both; only what the tool answers is counted."""
    environment = open_environment(name)
    assert provenances(search(environment, "A", "B", "C")) == searched
    assert environment.tool.raw_calls == calls
    recorded: Any = environment.tool.tool
    assert len(recorded.asked) == calls


@pytest.mark.parametrize("name", ["distilled", "real", "confident", "scheduled"])
def test_the_calculator_is_real_and_is_not_counted(name: str) -> None:
    """Whoever searches, it computes. Guards: a world model that is asked for a sum."""
    environment = open_environment(name)
    observations = search(environment, SUM, "A", SUM)
    assert [observation.text for observation in observations[::2]] == ["5", "5"]
    assert provenances(observations[::2]) == "rr"
    assert environment.tool.raw_calls == (1 if name == "real" else 0)


def test_the_policy_imagines_by_itself() -> None:
    """Nobody is asked, and nothing is counted."""
    environment = open_environment("internal")
    assert environment.search == IMAGINE
    assert (environment.tool.raw_calls, environment.tool.distinct_calls) == (0, 0)


def test_the_library_of_the_task_stays_as_it_is() -> None:
    """Guards: an evaluation, or another stage, that is answered by a world model."""
    tool = RecordedTool()
    library = Library({"search": tool, "calculate": calculate})
    stand_in: Any = RecordedWorldModel()
    for environment in (
        distilled_environment(library, stand_in),
        real_environment(library),
        scheduled_environment(library, stand_in, 0.5, steps=3, max_real_calls=0),
    ):
        environment.begin_step(2)
        search(environment, "A", SUM)
        assert library["search"] is tool
        assert not library.counts


def test_steps_move_the_schedule() -> None:
    """From the world model alone to the tool alone; calls are logged with their step."""
    environment = open_environment("scheduled")
    shares = []
    for step in (0, 500, 999):
        environment.begin_step(step)
        observations = search(environment, *[f"{number}" for number in range(100)])
        shares.append(provenances(observations).count("r"))
    assert shares[0] == 0
    assert 35 < shares[1] < 65
    assert shares[2] == 100
    steps = [row["step"] for row in environment.tool.take_rows()]
    assert steps == [500] * shares[1] + [999] * 100


def test_validation_questions_meet_the_first_step() -> None:
    """So that a later look at them is no harder. Their calls are logged with the step."""
    environment = open_environment("scheduled")
    environment.begin_validation(999)
    assert provenances(search(environment, "A")) == "i"
    environment.begin_step(999)
    search(environment, "A")
    (row,) = environment.tool.take_rows()
    assert row["step"] == environment.tool.step == 999


def test_a_budget_of_a_mixed_environment() -> None:
    """It holds over steps, in both kinds."""
    confident = open_environment("confident", budget=3)
    for step in range(3):
        confident.begin_step(step)
        search(confident, "A", "B", "C")
    assert confident.tool.raw_calls == 3
    scheduled = open_environment("scheduled", budget=3)
    for step in (0, 500, 999):
        scheduled.begin_step(step)
        search(scheduled, "A", "B", "C", "A", "B")
    assert scheduled.tool.raw_calls == 3


def test_a_failed_search_stays_one() -> None:
    """Its provenance goes through the library, so that its group is skipped."""
    environment = open_environment("real")
    recorded: Any = environment.tool.tool
    recorded.lost = {"A": Provenance.FAILED}
    assert provenances(search(environment, "A", "B")) == "fr"
