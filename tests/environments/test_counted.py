"""The real tool with its memory and its counts (environments/counted.py)."""

import json

import pytest
from recorded_tools import RecordedTool, provenances

from data.trajectory import Observation, Provenance
from environments.counted import CountedTool


def test_rollouts_that_share_a_query() -> None:
    """Five of them count five raw calls and one distinct one, and the tool is asked once."""
    tool = RecordedTool()
    counted = CountedTool(tool)
    observations = counted(["river"] * 5)
    assert observations == [Observation("river 1: It is real.")] * 5
    assert (counted.raw_calls, counted.distinct_calls) == (5, 1)
    assert tool.batches == [["river"]]


def test_an_answer_is_given_again_for_nothing() -> None:
    """Queries of later steps too; the order of the queries is that of the answers."""
    tool = RecordedTool()
    counted = CountedTool(tool)
    counted(["river", "hill"])
    observations = counted(["moor", "hill", "moor", "river"])
    assert [observation.text[:4] for observation in observations] == [
        "moor",
        "hill",
        "moor",
        "rive",
    ]
    assert tool.asked == ["river", "hill", "moor"]
    assert (counted.raw_calls, counted.distinct_calls) == (6, 3)


@pytest.mark.parametrize("provenance", [Provenance.FAILED, Provenance.MISSED])
def test_a_search_that_failed_is_asked_again(provenance: Provenance) -> None:
    """It is an observation of all rollouts that share it, counts as calls, and is not kept."""
    tool = RecordedTool()
    tool.lost = {"river": provenance}
    counted = CountedTool(tool)
    observations = counted(["river", "hill", "river"])
    assert [observation.provenance for observation in observations] == [
        provenance,
        Provenance.REAL,
        provenance,
    ]
    assert (counted.raw_calls, counted.distinct_calls) == (3, 1)
    tool.lost = {}
    assert provenances(counted(["river"])) == "r"
    assert tool.batches == [["river", "hill"], ["river"]]
    assert (counted.raw_calls, counted.distinct_calls) == (4, 2)


def test_lines_of_calls() -> None:
    """A line a query of a batch; what the tool said stands where the tool itself was asked."""
    tool = RecordedTool()
    tool.lost = {"hill": Provenance.FAILED}
    counted = CountedTool(tool)
    counted(["river", "hill", "river"])
    counted.step = 1
    counted(["river"])
    rows = counted.take_rows()
    assert rows == [
        {
            "step": 0,
            "query": "river",
            "raw_calls": 2,
            "text": "river 1: It is real.",
            "provenance": "real",
        },
        {
            "step": 0,
            "query": "hill",
            "raw_calls": 1,
            "text": "The search failed.",
            "provenance": "failed",
        },
        {"step": 1, "query": "river", "raw_calls": 1},
    ]
    assert counted.take_rows() == []


def test_a_stage_goes_on_from_its_lines() -> None:
    """Through JSON: the same counts, nothing is asked again but what failed, and no line twice."""
    tool = RecordedTool()
    tool.lost = {"hill": Provenance.FAILED}
    counted = CountedTool(tool, budget=9)
    counted(["river", "hill", "river"])
    counted(["moor"])
    rows = json.loads(json.dumps(counted.take_rows()))

    other_tool = RecordedTool()
    restored = CountedTool(other_tool, budget=9)
    restored.restore(rows)
    assert (restored.raw_calls, restored.distinct_calls) == (4, 2)
    assert restored.calls_left() == 5
    assert restored.take_rows() == []
    assert restored(["river", "moor"]) == counted(["river", "moor"])
    assert other_tool.asked == []
    restored(["hill"])
    assert other_tool.asked == ["hill"]


def test_a_budget_is_of_raw_calls() -> None:
    """Answers that are given again use it up as well; who asks for more is refused."""
    tool = RecordedTool()
    counted = CountedTool(tool, budget=3)
    assert counted.calls_left() == 3
    counted(["river", "river"])
    assert counted.calls_left() == 1
    with pytest.raises(AssertionError):
        counted(["river", "hill"])
    counted(["hill"])
    assert counted.calls_left() == 0
    assert tool.asked == ["river", "hill"]


def test_without_a_budget_nothing_is_left_to_count() -> None:
    assert CountedTool(RecordedTool()).calls_left() is None


def test_a_budget_that_was_lowered_leaves_nothing() -> None:
    """--resume with a lower --max_real_calls.

    Guards: a count below zero, by which a mixed environment chose from behind, and was refused.
    """
    counted = CountedTool(RecordedTool(), budget=3)
    counted.restore([{"step": 0, "query": "river", "raw_calls": 5}])
    assert counted.calls_left() == 0
