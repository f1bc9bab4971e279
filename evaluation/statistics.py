"""How the figures of a row are counted: means over sets, intervals, the analyses of the paper."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from data.questions import Question
from evaluation.figures import (
    ActingFigures,
    Estimate,
    JudgeFigures,
    RowFigures,
    SetFigures,
    SuccessFigures,
)
from evaluation.predictions import Prediction, ScoredQuestion

BOOTSTRAP_DRAWS = 2000
SIGN_FLIPS = 10_000
INTERVAL_PERCENTILES = (2.5, 97.5)  # 95% of the draws lie between them

# A question is the same in two rows or runs where its id and its text are.
QuestionId = tuple[str, str]
SetPredictions = Mapping[str, Sequence[Prediction]]  # question set -> its predictions
SetScores = Mapping[str, Sequence[ScoredQuestion]]  # the same, without what no comparison needs


class FactUse(NamedTuple):
    """What became of one fact that a question needs."""

    known: bool  # the base model knows it
    searched: bool  # a query named its subject


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _percent(values: Sequence[float]) -> float:
    return 100 * _mean(values)


def _mean_if_any(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _percent_if_any(values: Iterable[float | None]) -> float | None:
    mean = _mean_if_any(values)
    return None if mean is None else 100 * mean


# ---- one row of the table ------------------------------------------------------------------------
def summarize(
    predictions: SetPredictions, questions: Mapping[str, Sequence[Question]], known_facts: set[str]
) -> RowFigures:
    """Return the figures of one row.

    predictions: of each set, in the order of its questions.
    known_facts: ids of the facts that the base model knows.
    """
    sets = {name: _set_figures(rows) for name, rows in predictions.items()}
    scores = [[100 * row["em"] for row in rows] for rows in predictions.values()]
    low, high = bootstrap_interval(scores)
    return RowFigures(
        sets=sets,
        average=_average(list(sets.values())),
        acting=_when_it_acts(predictions, questions, known_facts),
        em_low=low,
        em_high=high,
        by_actions=by_actions([row for rows in predictions.values() for row in rows]),
        questions=sum(map(len, predictions.values())),
    )


def _set_figures(rows: Sequence[Prediction]) -> SetFigures:
    return SetFigures(
        em=_percent([row["em"] for row in rows]),
        f1=_percent([row["f1"] for row in rows]),
        cover=_percent([row["cover"] for row in rows]),
        overlap=_percent([row["overlap"] for row in rows]),
        malformed=_percent_if_any(row["malformed"] for row in rows),
        forced=_percent_if_any(row["forced"] for row in rows),
        actions=_mean([row["actions"] for row in rows]),
    )


def _average(sets: Sequence[SetFigures]) -> SetFigures:
    return SetFigures(
        em=_mean([figures.em for figures in sets]),
        f1=_mean([figures.f1 for figures in sets]),
        cover=_mean([figures.cover for figures in sets]),
        overlap=_mean([figures.overlap for figures in sets]),
        malformed=_mean_if_any(figures.malformed for figures in sets),
        forced=_mean_if_any(figures.forced for figures in sets),
        actions=_mean([figures.actions for figures in sets]),
    )


def average_figures(runs: Iterable[SetPredictions]) -> SetFigures:
    """Return the figures of a row over the sets of one or several runs; all sets weigh the same."""
    return _average([_set_figures(rows) for sets in runs for rows in sets.values()])


def _when_it_acts(
    predictions: SetPredictions, questions: Mapping[str, Sequence[Question]], known_facts: set[str]
) -> ActingFigures:
    """Return search rates and EM, apart for what the base model knows and does not (appendix A)."""
    facts: list[FactUse] = []
    calculations: list[bool] = []
    em_known: list[float] = []
    em_unknown: list[float] = []
    em_seen: list[float] = []
    em_unseen: list[float] = []
    for name, rows in predictions.items():
        for question, row in zip(questions[name], rows, strict=True):
            facts += fact_uses(question, row["queries"], known_facts)
            calculations += calculation_uses(question, row["queries"])
            if all(fact.id in known_facts for fact in question.facts):
                em_known.append(row["em"])
            else:
                em_unknown.append(row["em"])
            if question.facts and all(fact.head for fact in question.facts):
                em_seen.append(row["em"])
            else:
                em_unseen.append(row["em"])
    return ActingFigures(
        search_known=_mean_if_any([fact.searched for fact in facts if fact.known]),
        search_unknown=_mean_if_any([fact.searched for fact in facts if not fact.known]),
        em_known=_percent_if_any(em_known),
        em_unknown=_percent_if_any(em_unknown),
        calculated=_mean_if_any(calculations),
        em_seen=_percent_if_any(em_seen),
        em_unseen=_percent_if_any(em_unseen),
        questions_seen=len(em_seen),
    )


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


def by_actions(predictions: Sequence[ScoredQuestion]) -> dict[int, SuccessFigures]:
    """Return how questions were answered, by the number of actions (paper Fig. 3)."""
    correct = sum(row["em"] for row in predictions)
    figures = {}
    for count in sorted({row["actions"] for row in predictions}):
        scores = [row["em"] for row in predictions if row["actions"] == count]
        share = 100 * sum(scores) / correct if correct else 0.0
        figures[count] = SuccessFigures(
            questions=len(scores),
            correct=int(sum(scores)),
            success=_percent(scores),
            share=share,
        )
    return figures


def summarize_verdicts(verdicts: Mapping[str, Sequence[float | None]]) -> JudgeFigures:
    """Return what a judge says of a row.

    verdicts: of each set one for each answer; None where it can't be read, which counts in no mean.
    """
    by_set = {}
    unread = 0
    for name, values in verdicts.items():
        readable = [verdict for verdict in values if verdict is not None]
        by_set[name] = _percent_if_any(readable)
        unread += len(values) - len(readable)
    judged_sets = [value for value in by_set.values() if value is not None]
    return JudgeFigures(by_set, _mean_if_any(judged_sets), unread)


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
    runs: Sequence[tuple[SetScores, SetScores]], draws: int = BOOTSTRAP_DRAWS
) -> Estimate:
    """Return how much more EM one row has than another, with a paired 95% bootstrap interval.

    Only questions that both rows answered count. A question that several runs share is drawn as
    one: more seeds on the same questions say more of chance in training, and nothing of other
    questions.

    runs: of each run the predictions of the two rows.
    Raises UserError where the rows share no question.
    """
    sets = _paired_differences(runs)
    low, high = bootstrap_interval(sets, draws)
    points = _mean([_mean(values) for values in sets])
    return Estimate(points, low, high, questions=sum(map(len, sets)))


def sign_flip_p(
    runs: Sequence[tuple[SetScores, SetScores]], needs: float = 0, draws: int = SIGN_FLIPS
) -> float:
    """Return the two-sided p-value of a gain, where the true gain would be `needs` points.

    Where it is, what each question's difference has beyond it could as well have the other sign
    (Fisher's permutation test for pairs). The questions are those of `paired_gain`.
    """
    sets = [[value - needs for value in values] for values in _paired_differences(runs)]
    rng = np.random.default_rng(0)
    flipped = np.zeros(draws)
    for values in sets:
        signs = rng.choice((-1.0, 1.0), (draws, len(values)))
        flipped += (signs * np.array(values)).mean(1) / len(sets)
    gain = abs(_mean([_mean(values) for values in sets]))
    # The gain itself is one of the draws, so that p is never 0.
    as_large = int((np.abs(flipped) >= gain - 1e-9).sum())
    return (as_large + 1) / (draws + 1)


def _paired_differences(
    runs: Sequence[tuple[SetScores, SetScores]],
) -> list[list[float]]:
    """Return for each set the differences of the questions that both rows answered, in points.

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
    return [[float(np.mean(values)) for values in by_id.values()] for by_id in gains.values()]


def bootstrap_figure(questions: int, figure: Callable[[np.ndarray], float]) -> Estimate:
    """Return a figure of some questions with its 95% bootstrap interval over them.

    figure: that of the questions with these numbers. NaN where it can't be measured.
    """
    points = figure(np.arange(questions))
    if np.isnan(points):
        return Estimate(np.nan, np.nan, np.nan, questions)
    rng = np.random.default_rng(0)
    drawn = [figure(rng.integers(0, questions, questions)) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.nanpercentile(drawn, INTERVAL_PERCENTILES)
    return Estimate(points, float(low), float(high), questions)


def two_groups_p(first: np.ndarray, second: np.ndarray, needs: float = 0) -> float:
    """Return how likely a difference of means as far from `needs` points is by chance: two-sided.

    A permutation test: where the first group has just `needs` points more, an answer less those
    points could as well be of the other group. The difference is divided by its standard error
    (Welch's), or groups of different size and spread would not be held to the same level.

    first, second: (answers,) each, 0 or 1. Without two answers in both it is NaN.
    """
    size = len(first)
    if min(size, len(second)) < 2:
        return np.nan
    rng = np.random.default_rng(0)
    values = np.concatenate([first - needs / 100, second])
    distance = _welch_distance(values, size)
    as_large = 0
    for _ in range(BOOTSTRAP_DRAWS):
        as_large += _welch_distance(rng.permutation(values), size) >= distance - 1e-9
    return (as_large + 1) / (BOOTSTRAP_DRAWS + 1)


def one_group_p(scores: np.ndarray, needs: float) -> float:
    """Return how likely a share as far from `needs` percent is by chance: two-sided, binomial.

    scores: (answers,), 0 or 1. Without two of them it is NaN.
    """
    count = len(scores)
    if count < 2:
        return np.nan
    share = needs / 100
    draws = np.random.default_rng(0).binomial(count, share, SIGN_FLIPS) / count
    as_far = int((np.abs(draws - share) >= abs(scores.mean() - share) - 1e-9).sum())
    return (as_far + 1) / (SIGN_FLIPS + 1)


def _welch_distance(values: np.ndarray, size: int) -> float:
    """Return by how many standard errors the mean of the first `size` values is another."""
    first, second = values[:size], values[size:]
    variance = first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second)
    difference = abs(first.mean() - second.mean())
    if variance == 0:
        return np.inf if difference > 1e-9 else 0.0
    return float(difference / np.sqrt(variance))


# Student's t at 97.5% for 1, 2, .. degrees of freedom; the last one serves for more.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a mean over seeds (Student's t); all numbers for one seed."""
    count = len(values)
    if count < 2:
        return -np.inf, np.inf
    t = STUDENT_T[min(count - 1, len(STUDENT_T)) - 1]
    half = t * float(np.std(values, ddof=1)) / count**0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


def em_of(runs: Sequence[SetScores]) -> Estimate:
    """Return the exact match over runs, in percent, with its interval.

    It is computed as the gain over a row that has no answer right, which has the same interval.
    """
    pairs = []
    for predictions in runs:
        wrong: dict[str, Any] = {
            name: [{**row, "em": 0.0} for row in rows] for name, rows in predictions.items()
        }
        pairs.append((predictions, wrong))
    return paired_gain(pairs)


def _question_id(row: ScoredQuestion) -> QuestionId:
    return row["id"], row["question"]
