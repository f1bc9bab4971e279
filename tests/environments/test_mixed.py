"""A world model and the tool together (environments/mixed.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from recorded_tools import RecordedTool, RecordedWorldModel, provenances

from data.trajectory import Provenance
from environments.counted import CountedTool
from environments.mixed import Confidence, MixedSearch, Schedule, entropy_threshold

QUERIES = [f"query {number}" for number in range(2000)]


class Mixed:
    """A mixed search, and the stand-ins that it asks."""

    def __init__(self, choose: Any, budget: int = 0) -> None:
        self.tool = RecordedTool()
        self.world_model = RecordedWorldModel()
        self.counted = CountedTool(self.tool, budget)
        stand_in: Any = self.world_model
        self.search = MixedSearch(self.counted, stand_in, choose)


def choose_all(queries: list[str]) -> list[bool]:
    return [True] * len(queries)


def choose_capitals(queries: list[str]) -> list[bool]:
    return [query.isupper() for query in queries]


# ---- the budget ----------------------------------------------------------------------------------
def test_each_observation_says_who_made_it() -> None:
    """Text and provenance of the chosen queries are the tool's, of all others the model's."""
    mixed = Mixed(choose_capitals)
    observations = mixed.search(["A", "b", "C", "d", "A"])
    assert provenances(observations) == "ririr"
    for observation in observations:
        assert observation.text.endswith(f"It is {observation.provenance}.")
    assert [observation.text[0] for observation in observations] == ["A", "b", "C", "d", "A"]
    assert mixed.tool.asked == ["A", "C"]
    assert (mixed.counted.raw_calls, mixed.counted.distinct_calls) == (3, 2)


def test_a_budget_is_spent_in_the_order_of_the_queries() -> None:
    """Over several batches; when it is spent the world model answers alone."""
    mixed = Mixed(choose_capitals, budget=4)
    assert provenances(mixed.search(["A", "b", "B", "C"])) == "rirr"
    assert provenances(mixed.search(["d", "A", "B", "C"])) == "irii"
    assert mixed.counted.raw_calls == 4
    assert provenances(mixed.search(["A", "B"])) == "ii"
    assert mixed.counted.raw_calls == 4
    assert mixed.tool.asked == ["A", "B", "C"]


@pytest.mark.parametrize("budget", [1, 7, 50])
def test_a_budget_is_never_exceeded(budget: int) -> None:
    """And it is spent whole where there is enough to ask."""
    mixed = Mixed(choose_all, budget)
    rng = np.random.default_rng(0)
    for _ in range(20):
        mixed.search(rng.choice(QUERIES[:10], rng.integers(0, 9)).tolist())
        assert mixed.counted.raw_calls <= budget
    assert mixed.counted.raw_calls == budget


def test_a_search_that_fails_in_a_mixed_environment_is_lost() -> None:
    """What the world model says does not take its place: the tool was to answer."""
    mixed = Mixed(choose_all)
    mixed.tool.lost = {"A": Provenance.FAILED}
    assert provenances(mixed.search(["A", "B"])) == "fr"


# ---- by schedule ---------------------------------------------------------------------------------
@pytest.mark.parametrize("real_share", [0.1, 1 / 6, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 21])
def test_the_share_rises_from_nothing(real_share: float, steps: int) -> None:
    """Evenly over the steps, and its mean is what the setting says, of one step too."""
    schedule = Schedule(real_share, steps)
    shares = []
    for step in range(steps):
        schedule.step = step
        shares.append(schedule.share())
    assert np.mean(shares) == pytest.approx(real_share)
    np.testing.assert_allclose(np.diff(shares), 2 * real_share / steps)
    assert shares[0] == pytest.approx(real_share / steps)


@pytest.mark.parametrize("step", [0, 5, 9])
def test_a_schedule_chooses_its_share_of_the_queries(step: int) -> None:
    """Of 2,000 different queries, within three standard deviations."""
    schedule = Schedule(0.25, steps=10)
    schedule.step = step
    share = 0.05 * (step + 0.5)
    deviation = np.sqrt(share * (1 - share) / len(QUERIES))
    assert np.mean(schedule(QUERIES)) == pytest.approx(share, abs=3 * deviation)


@pytest.mark.parametrize("real_share", [0.0, 0.2, 0.5, 0.6, 1.0])
def test_a_schedule_keeps_its_mean(real_share: float) -> None:
    """It never falls. Guards: a share above a half, of which the mean fell short."""
    schedule = Schedule(real_share, steps=10)
    shares = []
    for step in range(10):
        schedule.step = step
        shares.append(schedule.share())
    assert np.mean(shares) == pytest.approx(real_share)
    assert shares == sorted(shares)
    assert min(shares) >= 0
    assert max(shares) <= 1


def test_a_query_keeps_its_answer_within_a_step() -> None:
    """Rollouts of one question are told the same, whatever they are asked beside it.

    In another step other queries are chosen. Guards: always the same ones.
    """
    schedule = Schedule(0.25, steps=10)
    schedule.step = 5
    chosen = schedule(QUERIES)
    assert schedule(QUERIES[::-1]) == chosen[::-1]
    assert [schedule([query])[0] for query in QUERIES] == chosen
    schedule.step = 6
    other = schedule(QUERIES)
    both = np.mean(np.array(chosen) & np.array(other))
    assert both == pytest.approx(0.275 * 0.325, abs=0.02)


# ---- by confidence -------------------------------------------------------------------------------
def test_the_tool_answers_what_the_model_is_unsure_of() -> None:
    """Exactly the queries above the threshold; one that is just as unsure is the model's."""
    world_model = RecordedWorldModel({"A": 0.1, "B": 0.3, "C": 0.2, "D": 0.9})
    stand_in: Any = world_model
    confidence = Confidence(stand_in, 0.2)
    assert confidence(["A", "B", "C", "D", "B"]) == [False, True, False, True, True]
    tool = RecordedTool()
    search = MixedSearch(CountedTool(tool), stand_in, confidence)
    assert provenances(search(["D", "C", "B", "A"])) == "riri"
    assert tool.asked == ["D", "B"]


def count_above(values: Sequence[float], threshold: float) -> int:
    return sum(value > threshold for value in values)


@pytest.mark.parametrize(("real_share", "above"), [(0.25, 25), (0.1, 10), (0.5, 50), (0.0, 0)])
def test_a_threshold_has_its_share_above_it(real_share: float, above: int) -> None:
    """It is the quantile of the held-out entropies, whatever their order."""
    rng = np.random.default_rng(0)
    entropies = rng.exponential(size=100).tolist()
    threshold = entropy_threshold(entropies, real_share)
    assert count_above(entropies, threshold) == above
    assert entropy_threshold(sorted(entropies), real_share) == threshold


def test_a_quantile_by_hand() -> None:
    """Between two values it lies as far as the share says."""
    assert entropy_threshold([4.0, 1.0, 3.0, 2.0, 5.0], 0.25) == 4.0
    assert entropy_threshold([1.0, 3.0], 0.25) == pytest.approx(2.5)
