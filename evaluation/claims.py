"""The paper's seven claims, put to the test on the answers of several seeds.

A claim is one comparison or several. A comparison is a difference in points of exact match, with
its 95% interval over questions, its 95% interval over seeds, and a test. It *holds* where both
intervals lie above what it needs, it *does not* where both lie below, and is *undecided* in
between: questions tell how well a difference is measured, seeds whether training gives it again.
A claim holds where all its comparisons do, and does not where one does not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from evaluation.figures import Gain
from evaluation.predictions import ScoredQuestion
from evaluation.seed_results import SeedResults
from evaluation.statistics import (
    BOOTSTRAP_DRAWS,
    INTERVAL_PERCENTILES,
    SIGN_FLIPS,
    paired_gain,
    sign_flip_p,
)

# Rows of eval.py's table.
WORKFLOWS = ("model only", "ReAct workflow")  # those of the paper's table
SFT1 = "SFT-1"
SFT2_ALONE = "SFT-2"
SFT12 = "SFT-1&2"
SFT123 = "SFT-1&2&3"
RL1 = "SFT-1&2&3+RL-1"
RL12 = "SFT-1&2&3+RL-1&2"
RL2_ALONE = "RL-2 alone"
RL2_FROM_SFT2 = "SFT-1&2+RL-2"  # practises with the real tool alone
AGENTS = (SFT1, SFT2_ALONE, SFT12, SFT123, RL2_ALONE, RL1, RL12, RL2_FROM_SFT2)

LITTLE = 2.0  # points that "costs little" allows
NEAR = 1.5  # points that "comes near" allows
HIGH = 10.0  # points that success may lose where it "stays high"
COLLAPSE = 20.0  # points between what is known and what is not, where a model "collapses"
FEW_ACTIONS = (1, 2)
MANY_ACTIONS = 3  # or more


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    FAILS = "does not"
    UNDECIDED = "undecided"


@dataclass
class Comparison:
    """A difference and its evidence."""

    measure: str  # what is subtracted from what
    needs: float  # points; the intervals have to lie above it
    gain: Gain  # with its interval over questions; NaN where it can't be measured
    p: float  # of a two-sided test against the difference that is needed
    by_seed: Mapping[str, float]  # seed -> points

    @property
    def seed_interval(self) -> tuple[float, float]:
        """The 95% interval over seeds; all numbers where there are not two."""
        return seed_interval([points for points in self.by_seed.values() if np.isfinite(points)])

    @property
    def verdict(self) -> Verdict:
        """Whether it holds. What can't be measured is undecided."""
        seed_low, seed_high = self.seed_interval
        if min(self.gain.low, seed_low) > self.needs:
            return Verdict.HOLDS
        if max(self.gain.high, seed_high) < self.needs:
            return Verdict.FAILS
        return Verdict.UNDECIDED


@dataclass
class Claim:
    """A claim of the paper, and the comparisons that it stands on."""

    number: int
    text: str  # as the paper has it
    comparisons: Sequence[Comparison]  # empty where the rows are not there yet

    @property
    def verdict(self) -> Verdict:
        """Whether all comparisons hold, or one does not."""
        verdicts = [comparison.verdict for comparison in self.comparisons]
        if Verdict.FAILS in verdicts:
            return Verdict.FAILS
        if verdicts and set(verdicts) == {Verdict.HOLDS}:
            return Verdict.HOLDS
        return Verdict.UNDECIDED

    @property
    def weakest(self) -> Comparison:
        """The comparison that decides: the lowest of those that have the claim's verdict."""
        deciding = [item for item in self.comparisons if item.verdict == self.verdict]
        return min(deciding, key=lambda comparison: comparison.gain.points)


def judge_claims(seeds: Sequence[SeedResults]) -> list[Claim]:
    """Return the seven claims, in the paper's order."""
    every_agent = [
        comparison
        for agent in AGENTS
        for workflow in WORKFLOWS
        for comparison in compare(seeds, agent, workflow)
    ]
    return [
        Claim(1, "every agent model beats the workflows", every_agent),
        Claim(2, "SFT-1&2 beats SFT-2 alone", compare(seeds, SFT12, SFT2_ALONE)),
        Claim(3, "SFT-3 costs little", compare(seeds, SFT123, SFT12, needs=-LITTLE)),
        Claim(4, "RL adds to SFT", compare(seeds, RL12, SFT123)),
        Claim(
            5,
            "five sixths imagined, one sixth real comes near all real, at a sixth of its calls",
            compare(seeds, RL12, RL2_FROM_SFT2, needs=-NEAR, note=_share_of_calls(seeds)),
        ),
        Claim(
            6,
            "success stays high as the number of actions grows (Fig. 3)",
            success_with_many_actions(seeds),
        ),
        Claim(
            7,
            "a closed-book model collapses on facts it never saw, and recalls known ones (app. A)",
            collapse_without_tool(seeds),
        ),
    ]


# ---- differences of two rows ---------------------------------------------------------------------
def compare(
    seeds: Sequence[SeedResults], first: str, second: str, needs: float = 0, note: str = ""
) -> list[Comparison]:
    """Return how much better one row is than another; nothing where no seed has both."""
    pairs = {
        results.seed: (results.answers[first], results.answers[second])
        for results in seeds
        if first in results.answers and second in results.answers
    }
    if not pairs:
        return []
    comparison = Comparison(
        measure=f"{first} over {second}{note}",
        needs=needs,
        gain=paired_gain(list(pairs.values())),
        p=sign_flip_p(list(pairs.values()), needs),
        by_seed={seed: paired_gain([pair]).points for seed, pair in pairs.items()},
    )
    return [comparison]


def _share_of_calls(seeds: Sequence[SeedResults]) -> str:
    """Return how many of the calls of practice with the tool alone the default recipe made."""
    counted = [results.calls for results in seeds if {RL12, RL2_FROM_SFT2} <= results.calls.keys()]
    all_real = sum(calls[RL2_FROM_SFT2].raw for calls in counted)
    if not all_real:
        return ""
    share = sum(calls[RL12].raw for calls in counted) / all_real
    return f", with {share:.2f} of its raw calls"


# ---- by the number of actions (paper Fig. 3) -----------------------------------------------------
class Success(NamedTuple):
    """Answers of a row, one number each."""

    em: np.ndarray  # (answers,), 0 or 1
    actions: np.ndarray  # (answers,)

    def rise(self) -> float:
        """Return success with many actions less success with few, in points; NaN without both."""
        few = self.em[np.isin(self.actions, FEW_ACTIONS)]
        many = self.em[self.actions >= MANY_ACTIONS]
        if not len(few) or not len(many):
            return np.nan
        return 100 * float(many.mean() - few.mean())

    def rows(self, numbers: np.ndarray) -> "Success":
        """Return some of the answers."""
        return Success(self.em[numbers], self.actions[numbers])


def success_with_many_actions(seeds: Sequence[SeedResults]) -> list[Comparison]:
    """Return that success falls by little with more actions, and less than the ReAct workflow's."""
    react = WORKFLOWS[-1]
    complete = [results for results in seeds if {RL12, react} <= results.answers.keys()]
    if not complete:
        return []
    # Both rows answered the same questions, in the same order.
    agents = {results.seed: _success(results, RL12) for results in complete}
    workflows = {results.seed: _success(results, react) for results in complete}
    agent = _join(list(agents.values()))
    workflow = _join(list(workflows.values()))
    few, many = (
        agent.em[np.isin(agent.actions, FEW_ACTIONS)],
        agent.em[agent.actions >= MANY_ACTIONS],
    )
    own = Comparison(
        measure=f"{RL12}: answers with {MANY_ACTIONS} actions or more over those with "
        f"{FEW_ACTIONS[0]} or {FEW_ACTIONS[1]}",
        needs=-HIGH,
        gain=_bootstrap(len(agent.em), lambda numbers: agent.rows(numbers).rise()),
        p=two_groups_p(many, few, -HIGH),
        by_seed={seed: success.rise() for seed, success in agents.items()},
    )

    def difference(numbers: np.ndarray) -> float:
        return agent.rows(numbers).rise() - workflow.rows(numbers).rise()

    beside_react = Comparison(
        measure=f"the same, over the same of the {react}",
        needs=0,
        gain=_bootstrap(len(agent.em), difference),
        p=_swap_p(agent, workflow),
        by_seed={seed: agents[seed].rise() - workflows[seed].rise() for seed in agents},
    )
    return [own, beside_react]


def _success(results: SeedResults, row: str) -> Success:
    answers = _answers(results, row)
    em = np.array([answer["em"] for answer in answers])
    return Success(em, np.array([answer["actions"] for answer in answers]))


def _answers(results: SeedResults, row: str) -> list[ScoredQuestion]:
    return [answer for answers in results.answers[row].values() for answer in answers]


def _join(parts: Sequence[Success]) -> Success:
    em = np.concatenate([part.em for part in parts])
    return Success(em, np.concatenate([part.actions for part in parts]))


def _bootstrap(questions: int, measure: Callable[[np.ndarray], float]) -> Gain:
    """Return a figure of some questions with its 95% interval over them.

    measure: the figure of the questions with these numbers.
    """
    rng = np.random.default_rng(0)
    points = measure(np.arange(questions))
    if np.isnan(points):
        return Gain(np.nan, np.nan, np.nan, questions)
    drawn = [measure(rng.integers(0, questions, questions)) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.nanpercentile(drawn, INTERVAL_PERCENTILES)
    return Gain(points, float(low), float(high), questions)


def _swap_p(first: Success, second: Success) -> float:
    """Return how likely so large a difference of rises is where the two rows are equals.

    Where they are, each question's two answers could as well be the other way round.
    """
    gain = abs(first.rise() - second.rise())
    rng = np.random.default_rng(0)
    as_large = 0
    for _ in range(BOOTSTRAP_DRAWS):
        swaps = rng.random(len(first.em)) < 0.5
        one = Success(*(np.where(swaps, b, a) for a, b in zip(first, second, strict=True)))
        other = Success(*(np.where(swaps, a, b) for a, b in zip(first, second, strict=True)))
        as_large += abs(one.rise() - other.rise()) >= gain - 1e-9
    return (as_large + 1) / (BOOTSTRAP_DRAWS + 1)


def two_groups_p(first: np.ndarray, second: np.ndarray, needs: float = 0) -> float:
    """Return how likely a difference of means as far from `needs` is by chance: two-sided.

    A permutation test: where the first group has just `needs` points more, an answer less those
    points could as well be of the other group.

    first, second: (answers,) each, 0 or 1. Without answers in both it is NaN.
    """
    if not len(first) or not len(second):
        return np.nan
    rng = np.random.default_rng(0)
    values = np.concatenate([first - needs / 100, second])
    gain = abs(values[: len(first)].mean() - values[len(first) :].mean())
    as_large = 0
    for _ in range(SIGN_FLIPS):
        rng.shuffle(values)
        drawn = abs(values[: len(first)].mean() - values[len(first) :].mean())
        as_large += drawn >= gain - 1e-9
    return (as_large + 1) / (SIGN_FLIPS + 1)


# ---- known and unknown facts (paper appendix A) --------------------------------------------------
class Recall(NamedTuple):
    """Answers from memory: to questions whose facts are all known, and to the others."""

    known: np.ndarray  # (questions,), 0 or 1
    unknown: np.ndarray  # (other questions,)

    def difference(self) -> float:
        """Return EM on the first less EM on the others, in points; NaN without both."""
        if not len(self.known) or not len(self.unknown):
            return np.nan
        return 100 * float(self.known.mean() - self.unknown.mean())


def collapse_without_tool(seeds: Sequence[SeedResults]) -> list[Comparison]:
    """Return that a model without a tool answers what it knows, and little else."""
    row = WORKFLOWS[0]
    recalls = {results.seed: _recall(results, row) for results in seeds if row in results.answers}
    if not recalls:
        return []
    known = np.concatenate([recall.known for recall in recalls.values()])
    unknown = np.concatenate([recall.unknown for recall in recalls.values()])

    def difference(numbers: np.ndarray) -> float:
        is_known = numbers < len(known)
        drawn_known = known[numbers[is_known]]
        drawn_unknown = unknown[numbers[~is_known] - len(known)]
        return Recall(drawn_known, drawn_unknown).difference()

    comparison = Comparison(
        measure=f"{row}: questions of known facts over questions with an unknown one",
        needs=COLLAPSE,
        gain=_bootstrap(len(known) + len(unknown), difference),
        p=two_groups_p(known, unknown, COLLAPSE),
        by_seed={seed: recall.difference() for seed, recall in recalls.items()},
    )
    return [comparison]


def _recall(results: SeedResults, row: str) -> Recall:
    """Return what a row answered, from the counts that its figures hold."""
    acting = results.figures[row].acting
    count = acting.questions_known
    other_count = len(_answers(results, row)) - count
    return Recall(
        known=_ones_and_zeros(acting.em_known, count),
        unknown=_ones_and_zeros(acting.em_unknown, other_count),
    )


def _ones_and_zeros(em: float | None, count: int) -> np.ndarray:
    """Return so many answers of 0 and 1 with this exact match in percent, (count,)."""
    right = 0 if em is None else round(em / 100 * count)
    return (np.arange(count) < right).astype(float)


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
