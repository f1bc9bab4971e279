"""Figures of the table: averages, their bootstrap intervals, and the analyses of the paper.

EM, F1 and the other scores are in percent; search rates are shares between 0 and 1. A mean over no
values is None, since NaN is not JSON.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from data.questions import Question
from evaluation.predictions import Prediction

# Figures of a prediction whose mean is shown in percent.
PERCENT = ("em", "f1", "cover", "overlap", "malformed", "forced")
BOOTSTRAP_DRAWS = 2000
INTERVAL_PERCENTILES = (2.5, 97.5)  # 95% of the draws lie between them

# A question is the same in two rows or runs where its id and its text are.
QuestionId = tuple[str, str]
SetPredictions = Mapping[str, Sequence[Prediction]]  # question set -> its predictions


class FactUse(NamedTuple):
    """What became of one fact that a question needs."""

    known: bool  # the base model knows it
    searched: bool  # a query named its subject


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None for no values."""
    if not len(values):
        return None
    return float(np.mean(values))


def percent(values: Sequence[float]) -> float | None:
    """Return the mean of shares in percent, None for no values."""
    if not len(values):
        return None
    return 100 * float(np.mean(values))


# ---- one row of the table ------------------------------------------------------------------------
def summarize(
    predictions: SetPredictions, questions: Mapping[str, Sequence[Question]], known_facts: set[str]
) -> dict[str, dict[str, Any]]:
    """Return the figures of one row: {set: {figure: value}, "avg": {figure: value}}.

    predictions: of each set, in the order of its questions.
    known_facts: ids of the facts that the base model knows.
    """
    by_set: dict[str, dict[str, Any]] = {}
    for name, rows in predictions.items():
        by_set[name] = {key: percent([row[key] for row in rows]) for key in PERCENT}
        by_set[name]["actions"] = mean([row["actions"] for row in rows])
    average: dict[str, Any] = {
        key: mean([figures[key] for figures in by_set.values()]) for key in (*PERCENT, "actions")
    }
    average |= _when_it_acts(predictions, questions, known_facts)
    scores = [[100 * row["em"] for row in rows] for rows in predictions.values()]
    low, high = bootstrap_interval(scores)
    average["em_low"] = low
    average["em_high"] = high
    average["by_actions"] = by_actions([row for rows in predictions.values() for row in rows])
    return {**by_set, "avg": average}


def _when_it_acts(
    predictions: SetPredictions, questions: Mapping[str, Sequence[Question]], known_facts: set[str]
) -> dict[str, float | None]:
    """Return search rates and EM, apart for what the base model knows and does not (appendix A)."""
    facts: list[FactUse] = []
    calculations: list[bool] = []
    em_known: list[float] = []
    em_unknown: list[float] = []
    for name, rows in predictions.items():
        for question, row in zip(questions[name], rows, strict=True):
            facts += fact_uses(question, row["queries"], known_facts)
            calculations += calculation_uses(question, row["queries"])
            if all(fact.id in known_facts for fact in question.facts):
                em_known.append(row["em"])
            else:
                em_unknown.append(row["em"])
    return {
        "search_known": mean([fact.searched for fact in facts if fact.known]),
        "search_unknown": mean([fact.searched for fact in facts if not fact.known]),
        "em_known": percent(em_known),
        "em_unknown": percent(em_unknown),
        "calculated": mean(calculations),
    }


def fact_uses(question: Question, queries: Sequence[str], known_facts: set[str]) -> list[FactUse]:
    """Return what became of each fact that a question needs.

    A calculation is no fact. Where a look-up has no subject, any query counts.
    """
    uses = []
    for fact in question.facts:
        lookup = fact.lookups[0]
        if lookup.tool != "search":
            continue
        subject = lookup.subject.lower()
        searched = any(subject in query.lower() for query in queries)
        uses.append(FactUse(fact.id in known_facts, searched))
    return uses


def calculation_uses(question: Question, queries: Sequence[str]) -> list[bool]:
    """Return for each calculation that a question needs whether the calculator was called."""
    return [
        any(query.startswith(lookup.tool) for query in queries)
        for lookup in question.lookups
        if lookup.tool != "search"
    ]


def by_actions(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Return how questions were answered, by the number of actions (paper Fig. 3).

    For each number: questions, how many of them are right, the success rate in percent, and the
    share of all right answers in percent.
    """
    correct = sum(row["em"] for row in predictions)
    figures = {}
    for count in sorted({row["actions"] for row in predictions}):
        scores = [row["em"] for row in predictions if row["actions"] == count]
        share = 100 * sum(scores) / correct if correct else 0.0
        figures[str(count)] = {
            "questions": len(scores),
            "correct": int(sum(scores)),
            "success": percent(scores),
            "share": share,
        }
    return figures


# ---- intervals -----------------------------------------------------------------------------------
def bootstrap_interval(
    sets: Iterable[Sequence[float] | np.ndarray], draws: int = BOOTSTRAP_DRAWS
) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the average over sets of the mean over questions.

    sets: of each set a value for each question. Questions are drawn again in each set by itself.
    """
    sets = list(sets)
    rng = np.random.default_rng(0)
    averages = np.zeros(draws)
    for values in sets:
        scores = np.array(values)
        rows = rng.integers(0, len(scores), (draws, len(scores)))
        averages += scores[rows].mean(1) / len(sets)
    low, high = np.percentile(averages, INTERVAL_PERCENTILES)
    return float(low), float(high)


def paired_gain(
    runs: Sequence[tuple[SetPredictions, SetPredictions]], draws: int = BOOTSTRAP_DRAWS
) -> dict[str, float]:
    """Return how much more EM one row has than another, with a paired 95% bootstrap interval.

    Only questions that both rows answered count: {"gain", "gain_low", "gain_high",
    "gain_questions"}. A question that several runs share is drawn as one: more seeds on the same
    questions say more of chance in training, and nothing of other questions.

    runs: of each run the predictions of the two rows.
    Raises UserError where the rows share no question.
    """
    gains: dict[str, dict[QuestionId, list[float]]] = {}
    for first, second in runs:
        for name, rows in first.items():
            other_scores = {_question_id(row): row["em"] for row in second.get(name, ())}
            for row in rows:
                question = _question_id(row)
                if question not in other_scores:
                    continue
                gain = 100 * (row["em"] - other_scores[question])
                gains.setdefault(name, {}).setdefault(question, []).append(gain)
    if not gains:
        raise UserError(
            "--compare: the two rows answered no question in common; "
            "evaluate both on the same files, with one --seed and --eval_questions"
        )
    sets = [[float(np.mean(values)) for values in by_id.values()] for by_id in gains.values()]
    low, high = bootstrap_interval(sets, draws)
    return {
        "gain": float(np.mean([np.mean(values) for values in sets])),
        "gain_low": low,
        "gain_high": high,
        "gain_questions": sum(map(len, sets)),
    }


def _question_id(row: Prediction) -> QuestionId:
    return row["id"], row["question"]
