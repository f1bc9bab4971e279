"""The figures of the table, by hand."""

import itertools
import json
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from data.questions import Fact, Lookup, Question
from evaluation import statistics
from evaluation.figures import Estimate, JudgeFigures, SuccessFigures, percent_cell, row_to_json
from evaluation.statistics import (
    bootstrap_interval,
    paired_gain,
    summarize,
    summarize_verdicts,
    two_groups_p,
)
from evaluation.table import format_table


def fact_of(fact_id: Any, tool: str = "search") -> Any:
    """Return a fact that is looked up by its subject, which its id begins with."""
    subject = fact_id.split("|")[0]
    lookup = Lookup(ask="", queries=[subject], tool=tool, subject=subject)
    return Fact(fact_id, wordings=[], answers=[], recall="", lookups=[lookup])


def question_of(question_id: Any, *facts: Any) -> Any:
    return Question(question_id, "Who?", ["Eva"], facts=list(facts))


def prediction(
    em: Any, *queries: list[str], malformed: float = 0.0, forced: float = 0.0, id: str = "0"
) -> Any:
    return {
        "id": id,
        "question": f"{id}?",
        "em": em,
        "f1": em,
        "cover": em,
        "overlap": em,
        "actions": len(queries),
        "queries": list(queries),
        "malformed": malformed,
        "forced": forced,
    }


QUESTIONS = {
    "single": [
        question_of("a", fact_of("Silver River|director")),
        question_of("b", fact_of("Iron Hill|mayor")),
    ],
    "chain": [question_of("c", fact_of("Eva Moss|spouse"), fact_of("Ada Falk|job"))],
}
PREDICTIONS = {
    "single": [prediction(1.0, "silver river film"), prediction(0.0, malformed=1.0)],
    "chain": [prediction(1.0, "Ada Falk", "nothing", forced=1.0)],
}
ALL_FACTS = {"Silver River|director", "Iron Hill|mayor", "Eva Moss|spouse", "Ada Falk|job"}


def test_a_workflow_has_no_form() -> None:
    """Guards: 0.0% malformed of a row in which nobody has looked."""
    rows = [prediction(1.0) | {"malformed": None, "forced": None} for _ in range(2)]
    row = summarize({"single": rows}, {"single": QUESTIONS["single"]}, known_facts=set())
    assert (row.average.malformed, row.average.forced) == (None, None)
    assert percent_cell(row.average.malformed) == "-"
    assert percent_cell(2.51) == "2.5%"


# ---- one row -------------------------------------------------------------------------------------
def test_the_average_is_over_sets() -> None:
    """Every set has the same weight, whatever the number of its questions."""
    row = summarize(PREDICTIONS, QUESTIONS, known_facts=set())
    expected = {
        "em": (50, 100, 75),
        "actions": (0.5, 2, 1.25),
        "malformed": (50, 0, 25),
        "forced": (0, 100, 50),
    }
    for figure, values in expected.items():
        columns = (row.sets["single"], row.sets["chain"], row.average)
        assert tuple(getattr(figures, figure) for figures in columns) == values, figure


def test_search_rates_are_over_facts() -> None:
    """A fact was searched for where a query names its subject."""
    acting = summarize(PREDICTIONS, QUESTIONS, {"Iron Hill|mayor", "Ada Falk|job"}).acting
    # Of the known facts Ada Falk was searched for, and Iron Hill was not.
    assert acting.search_known == 0.5
    # Of the others Silver River was, and Eva Moss was not.
    assert acting.search_unknown == 0.5


def test_any_query_counts_where_a_look_up_has_no_subject() -> None:
    """A real question is one fact, however many look-ups it needs."""
    lookups = [Lookup(ask="", queries=["x"]), Lookup(ask="", queries=["y"])]
    fact = Fact("q", wordings=[], answers=[], recall="", lookups=lookups)
    questions = {"real": [question_of("a", fact), question_of("b", fact)]}
    predictions = {"real": [prediction(1.0, "anything"), prediction(0.0)]}
    acting = summarize(predictions, questions, known_facts=set()).acting
    assert acting.search_unknown == 0.5
    assert acting.calculated is None


def test_answers_by_number_of_actions() -> None:
    """Questions, right answers, success rate and share of the right answers (paper Fig. 3)."""
    row = summarize(PREDICTIONS, QUESTIONS, known_facts=set())
    assert row.by_actions == {
        0: SuccessFigures(questions=1, correct=0, success=0.0, share=0.0),
        1: SuccessFigures(questions=1, correct=1, success=100.0, share=50.0),
        2: SuccessFigures(questions=1, correct=1, success=100.0, share=50.0),
    }


def test_em_where_all_facts_are_known() -> None:
    """EM apart for questions whose facts the base model all knows, and for others (appendix A)."""
    acting = summarize(PREDICTIONS, QUESTIONS, {"Silver River|director"}).acting
    assert acting.em_known == 100
    assert acting.em_unknown == 50
    assert acting.calculated is None


def test_a_calculation_is_no_fact_to_search_for() -> None:
    """It counts by itself: whether the calculator was called."""
    difference = fact_of("1993 - 1976|difference", tool="calculate")
    question = question_of("d", fact_of("Eva Moss|birth year"), difference)
    predictions = [
        prediction(1.0, "Eva Moss", "calculate: 1993 - 1976"),
        prediction(0.0, "Eva Moss"),
    ]
    row = summarize({"compare": predictions}, {"compare": [question] * 2}, known_facts=set())
    assert row.acting.calculated == 0.5
    assert row.acting.search_unknown == 1.0


@pytest.mark.parametrize("known", [set(), ALL_FACTS])
def test_nothing_known_is_still_json(known: Any) -> None:
    """The rate over no facts is null. Guards: NaN, which is not JSON."""
    row = summarize(PREDICTIONS, QUESTIONS, known)
    json.dumps(row_to_json(row), allow_nan=False)
    assert "SFT-1" in format_table({"SFT-1": row}, list(QUESTIONS))


def test_verdicts_that_cannot_be_read() -> None:
    """They count in no mean; a set without one that can be read has none."""
    figures = summarize_verdicts({"a": [1.0, None, 0.0], "b": [None], "c": [1.0]})
    assert figures == JudgeFigures({"a": 50, "b": None, "c": 100}, average=75, unread=2)


# ---- the table -----------------------------------------------------------------------------------
def test_the_printed_table() -> None:
    """A set that a row is not asked, and a judge who judged another row, leave a dash."""
    whole = summarize(PREDICTIONS, QUESTIONS, known_facts=set())
    whole.judge = JudgeFigures({"single": 100, "chain": 33.34}, average=66.67, unread=0)
    part = summarize({"chain": PREDICTIONS["chain"]}, QUESTIONS, known_facts=ALL_FACTS)
    heading, first, second = format_table({"A": whole, "B": part}, QUESTIONS).splitlines()
    assert heading.split() == (
        "EM single chain avg 95% interval F1 actions known unknown malformed judge".split()
    )
    assert first.split() == ("A 50.0 100.0 75.0 50.0 -100.0 75.0 1.25 - 0.50 25.0% 66.7".split())
    assert second.split() == "B - 100.0 100.0 100.0 -100.0 100.0 2.00 0.50 - 0.0% -".split()
    assert len(heading) == len(first) == len(second)


# ---- intervals -----------------------------------------------------------------------------------
def test_the_interval_is_near_the_textbooks() -> None:
    """The mean +- 1.96 standard errors of the average over sets."""
    rng = np.random.default_rng(1)
    sets = []
    for count, share in ((150, 0.9), (150, 0.5), (80, 0.3)):
        sets.append(100.0 * (rng.random(count) < share))
    low, high = bootstrap_interval(sets)
    mean = np.mean([values.mean() for values in sets])
    error = np.sqrt(sum(values.var() / len(values) for values in sets)) / 3
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3)


def test_the_interval_where_all_agree() -> None:
    assert bootstrap_interval([[100.0] * 5, [100.0] * 9]) == (100, 100)


def by_id(scores: Any, numbers: Any) -> list[Any]:
    return [prediction(float(scores[number]), id=str(number)) for number in numbers]


@pytest.fixture
def two_rows() -> Any:
    """Return a row, and one that is right on 40 more of the same 400 questions."""
    rng = np.random.default_rng(0)
    correct = rng.random(400) < 0.5
    better = correct.copy()
    better[np.flatnonzero(~correct)[:40]] = True
    worse_row = {"a": by_id(correct, range(200)), "b": by_id(correct, range(200, 400))}
    # Predictions are matched by id, not by place.
    better_row = {"a": by_id(better, range(200)), "b": by_id(better, range(200, 400))[::-1]}
    return worse_row, better_row


def test_a_paired_interval(two_rows: Any) -> None:
    """A gain of ten points on the same questions, whatever the spread between questions."""
    worse_row, better_row = two_rows
    found = paired_gain([(better_row, worse_row)])
    assert found.points == pytest.approx(10)
    assert 6.5 < found.low < 8.5
    assert 11.5 < found.high < 13.5


def test_a_row_gains_nothing_over_itself(two_rows: Any) -> None:
    row, _ = two_rows
    assert paired_gain([(row, row)]) == Estimate(points=0, low=0, high=0, questions=400)


def test_a_gain_over_what_both_answered(two_rows: Any) -> None:
    """Questions that one of the rows was not asked do not count."""
    worse_row, better_row = two_rows
    longer_row = {**better_row, "c": [prediction(1.0, id="0")]}
    shorter_row = {"a": worse_row["a"], "b": worse_row["b"][:150]}
    found = paired_gain([(longer_row, shorter_row)])
    assert found.points > 0
    assert found.questions == 350


def test_rows_without_a_question_in_common(two_rows: Any) -> None:
    with pytest.raises(UserError, match="--compare: the two rows answered no question in common"):
        paired_gain([(two_rows[0], {"c": [prediction(1.0)]})])


def test_runs_on_the_same_questions_are_no_new_questions() -> None:
    """Ten copies of a run have its interval; runs with questions of their own a narrower one."""
    rng = np.random.default_rng(2)

    def run_of(seed: int) -> Any:
        rows = []
        for share in (0.6, 0.3):
            scores = rng.random(100) < share
            predictions = [
                prediction(float(score), id=f"{seed} {number}")
                for number, score in enumerate(scores)
            ]
            rows.append({"a": predictions})
        return rows[0], rows[1]

    runs = [run_of(seed) for seed in range(3)]
    single = paired_gain(runs[:1])
    assert astuple(paired_gain(runs[:1] * 10)) == pytest.approx(astuple(single))
    pooled = paired_gain(runs)
    assert pooled.high - pooled.low < 0.7 * (single.high - single.low)


def test_two_groups_against_all_permutations() -> None:
    """Whether one group has 20 points more than another, against all 70 ways to split eight."""
    first, second = np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 1, 0])
    values = np.concatenate([first - 0.2, second])

    def distance(is_first: np.ndarray) -> float:
        groups = values[is_first], values[~is_first]
        error = np.sqrt(sum(group.var(ddof=1) / 4 for group in groups))
        return abs(groups[0].mean() - groups[1].mean()) / error

    distances = [
        distance(np.isin(np.arange(8), chosen)) for chosen in itertools.combinations(range(8), 4)
    ]
    exact = np.mean(np.array(distances) >= distance(np.arange(8) < 4) - 1e-9)
    assert two_groups_p(first, second, 20) == pytest.approx(exact, abs=0.03)


def test_two_groups_of_different_size_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the difference is just what is needed, p is below .1 in about a tenth of the draws.

    Guards: it was in half of them, where differences were not divided by their errors.
    """
    monkeypatch.setattr(statistics, "BOOTSTRAP_DRAWS", 200)
    rng = np.random.default_rng(0)
    below = 0
    for _ in range(100):
        many = (rng.random(100) < 0.88).astype(float)
        few = (rng.random(2000) < 0.98).astype(float)
        below += two_groups_p(many, few, -10) < 0.1
    assert below < 25
