"""The paper's seven claims, put to the test on the answers of several seeds.

A claim is one comparison or several. A comparison is a difference, in points of exact match for
the most part, with its 95% interval over questions, its 95% interval over seeds, and a test. It
*holds* where both intervals lie above what it needs, *does not* where both lie below, and is
*undecided* in between. The first interval says how well these runs are measured; the second also
has what chance in training does, and that each seed has a world and questions of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from evaluation.figures import Estimate
from evaluation.predictions import ScoredQuestion
from evaluation.seed_results import SeedResults
from evaluation.statistics import (
    BOOTSTRAP_DRAWS,
    bootstrap_figure,
    one_group_p,
    paired_gain,
    seed_interval,
    sign_flip_p,
    two_groups_p,
)
from evaluation.table import WorkflowName

# Rows of eval.py's table.
REACT = str(WorkflowName.REACT)
FROM_MEMORY = str(WorkflowName.FROM_MEMORY)
WORKFLOWS = (FROM_MEMORY, REACT)  # those of the paper's table
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
SAVED_CALLS = 80.0  # percent of the calls that practice at "a sixth" of them saves at least
HIGH = 10.0  # points that success may lose where it "stays high"
RECALLED = 50.0  # percent of what it has seen that a model "recalls"
COLLAPSE = 20.0  # points between what it has seen and what not, where a model "collapses"
FEW_ACTIONS = (1, 2)
MANY_ACTIONS = 3  # or more
FEWEST_ANSWERS = 30  # of a group of answers whose success is compared


class Verdict(StrEnum):
    """What became of a claim, or of one of its comparisons."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"


@dataclass
class Comparison:
    """A difference and its evidence."""

    measure: str  # what is subtracted from what
    needs: float  # points; the intervals have to lie above it
    gain: Estimate  # with its interval over questions; NaN where it can't be measured
    p: float  # of a two-sided test against the difference that is needed; NaN without one
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
    comparisons: Sequence[Comparison]
    is_complete: bool  # whether all rows are there that it is about

    @property
    def verdict(self) -> Verdict:
        """Whether all comparisons hold, or one does not."""
        verdicts = [comparison.verdict for comparison in self.comparisons]
        if Verdict.FAILS in verdicts:
            return Verdict.FAILS
        if self.is_complete and all(verdict == Verdict.HOLDS for verdict in verdicts):
            return Verdict.HOLDS
        return Verdict.UNDECIDED

    @property
    def deciding(self) -> Comparison:
        """The lowest comparison that has the claim's verdict, or of all where none has it."""
        same = [item for item in self.comparisons if item.verdict == self.verdict]
        return min(same or self.comparisons, key=lambda comparison: comparison.gain.points)


def judge_claims(seeds: Sequence[SeedResults]) -> list[Claim]:
    """Return the seven claims, in the paper's order."""
    every_agent = [
        comparison
        for agent in AGENTS
        for workflow in WORKFLOWS
        for comparison in compare(seeds, agent, workflow)
    ]
    near_all_real = [
        *compare(seeds, RL12, RL2_FROM_SFT2, needs=-NEAR),
        *saved_calls(seeds),
    ]
    parts = [
        ("every agent model beats the workflows", every_agent, len(AGENTS) * len(WORKFLOWS)),
        ("SFT-1&2 beats SFT-2 alone", compare(seeds, SFT12, SFT2_ALONE), 1),
        ("SFT-3 costs little", compare(seeds, SFT123, SFT12, needs=-LITTLE), 1),
        ("RL adds to SFT", compare(seeds, RL12, SFT123), 1),
        (
            "five sixths imagined, one sixth real comes near all real, at a sixth of its calls",
            near_all_real,
            2,
        ),
        (
            "success stays high as the number of actions grows (Fig. 3)",
            success_with_many_actions(seeds),
            2,
        ),
        (
            "a closed-book model collapses on facts it never saw, and recalls known ones (app. A)",
            recall_without_tool(seeds),
            2,
        ),
    ]
    return [
        Claim(number, text, comparisons, is_complete=len(comparisons) == expected)
        for number, (text, comparisons, expected) in enumerate(parts, 1)
    ]


# ---- differences of two rows ---------------------------------------------------------------------
def compare(
    seeds: Sequence[SeedResults], first: str, second: str, needs: float = 0
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
        measure=f"{first} over {second}",
        needs=needs,
        gain=paired_gain(list(pairs.values())),
        p=sign_flip_p(list(pairs.values()), needs),
        by_seed={seed: paired_gain([pair]).points for seed, pair in pairs.items()},
    )
    return [comparison]


def saved_calls(seeds: Sequence[SeedResults]) -> list[Comparison]:
    """Return which share of the calls of practice with the tool alone the default recipe saves.

    Calls that the world model was distilled from are RL-1's, which asks for nothing else. The paper
    has none, so they are left out here.
    """
    by_seed = {}
    for results in seeds:
        calls = results.calls
        if not {RL1, RL12, RL2_FROM_SFT2} <= calls.keys() or not calls[RL2_FROM_SFT2].raw:
            continue
        practised = calls[RL12].raw - calls[RL1].raw
        by_seed[results.seed] = 100 * (1 - practised / calls[RL2_FROM_SFT2].raw)
    if not by_seed:
        return []
    points = float(np.mean(list(by_seed.values())))
    comparison = Comparison(
        measure=f"% of the calls of {RL2_FROM_SFT2} that {RL12} saves, distilling left out",
        needs=SAVED_CALLS,
        # They are counted, not drawn.
        gain=Estimate(points, points, points, questions=0),
        p=np.nan,
        by_seed=by_seed,
    )
    return [comparison]


# ---- by the number of actions (paper Fig. 3) -----------------------------------------------------
class Success(NamedTuple):
    """Answers of a row, one number each."""

    em: np.ndarray  # (answers,), 0 or 1
    actions: np.ndarray  # (answers,)

    def with_few(self) -> np.ndarray:
        """Return the exact match of the answers with one or two actions."""
        return self.em[np.isin(self.actions, FEW_ACTIONS)]

    def with_many(self) -> np.ndarray:
        """Return the exact match of the answers with more."""
        return self.em[self.actions >= MANY_ACTIONS]

    def rise(self) -> float:
        """Return success with many actions less success with few, in points.

        It is NaN where either are too few answers.
        """
        return _difference(self.with_many(), self.with_few())

    def of(self, numbers: np.ndarray) -> "Success":
        """Return some of the answers."""
        return Success(self.em[numbers], self.actions[numbers])


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return the difference of two groups' exact match in points; NaN for few answers."""
    if min(len(first), len(second)) < FEWEST_ANSWERS:
        return np.nan
    return 100 * float(first.mean() - second.mean())


def success_with_many_actions(seeds: Sequence[SeedResults]) -> list[Comparison]:
    """Return that success falls by little with more actions, and less than the ReAct workflow's."""
    complete = [results for results in seeds if {RL12, REACT} <= results.answers.keys()]
    if not complete:
        return []
    # Both rows answered the same questions, in the same order.
    agents = {results.seed: _success(results, RL12) for results in complete}
    workflows = {results.seed: _success(results, REACT) for results in complete}
    agent = _join(list(agents.values()))
    workflow = _join(list(workflows.values()))
    answers = len(agent.em)
    own = Comparison(
        measure=f"{RL12}: answers with {MANY_ACTIONS} actions or more over those with "
        f"{FEW_ACTIONS[0]} or {FEW_ACTIONS[1]}",
        needs=-HIGH,
        gain=bootstrap_figure(answers, lambda numbers: agent.of(numbers).rise()),
        p=two_groups_p(agent.with_many(), agent.with_few(), -HIGH),
        by_seed={seed: success.rise() for seed, success in agents.items()},
    )
    beside_react = Comparison(
        measure=f"the same, over the same of the {REACT}",
        needs=0,
        gain=bootstrap_figure(
            answers, lambda numbers: agent.of(numbers).rise() - workflow.of(numbers).rise()
        ),
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


def _swap_p(first: Success, second: Success) -> float:
    """Return how likely so large a difference of rises is where the two rows are equals.

    Where they are, each question's two answers could as well be the other way round.
    """
    difference = abs(first.rise() - second.rise())
    if np.isnan(difference):
        return np.nan
    rng = np.random.default_rng(0)
    as_large = 0
    for _ in range(BOOTSTRAP_DRAWS):
        swaps = rng.random(len(first.em)) < 0.5
        one = Success(*(np.where(swaps, b, a) for a, b in zip(first, second, strict=True)))
        other = Success(*(np.where(swaps, a, b) for a, b in zip(first, second, strict=True)))
        as_large += abs(one.rise() - other.rise()) >= difference - 1e-9
    return (as_large + 1) / (BOOTSTRAP_DRAWS + 1)


# ---- facts of the pretraining and others (paper appendix A) --------------------------------------
def recall_without_tool(seeds: Sequence[SeedResults]) -> list[Comparison]:
    """Return that a model without a tool answers what its pretraining held, and little else."""
    complete = [results for results in seeds if FROM_MEMORY in results.answers]
    if not complete:
        return []
    seen_of = {results.seed: _answers_to(results, is_seen=True) for results in complete}
    unseen_of = {results.seed: _answers_to(results, is_seen=False) for results in complete}
    seen = np.concatenate(list(seen_of.values()))
    unseen = np.concatenate(list(unseen_of.values()))
    none = np.zeros(FEWEST_ANSWERS)

    def difference(numbers: np.ndarray) -> float:
        is_seen = numbers < len(seen)
        return _difference(seen[numbers[is_seen]], unseen[numbers[~is_seen] - len(seen)])

    recalls = Comparison(
        measure=f"{FROM_MEMORY}: questions whose facts were all in the pretraining",
        needs=RECALLED,
        gain=bootstrap_figure(len(seen), lambda numbers: _difference(seen[numbers], none)),
        p=one_group_p(seen, RECALLED),
        by_seed={seed: _difference(answers, none) for seed, answers in seen_of.items()},
    )
    collapses = Comparison(
        measure="these, over questions with a fact that was not",
        needs=COLLAPSE,
        gain=bootstrap_figure(len(seen) + len(unseen), difference),
        p=two_groups_p(seen, unseen, COLLAPSE),
        by_seed={seed: _difference(seen_of[seed], unseen_of[seed]) for seed in seen_of},
    )
    return [recalls, collapses]


def _answers_to(results: SeedResults, is_seen: bool) -> np.ndarray:
    """Return what the model without a tool answered, (questions,) of 0 and 1, of either kind.

    They are made again from the counts that the row's figures hold.
    """
    acting = results.figures[FROM_MEMORY].acting
    count = acting.questions_seen
    em = acting.em_seen
    if not is_seen:
        count = len(_answers(results, FROM_MEMORY)) - count
        em = acting.em_unseen
    right = 0 if em is None else round(em / 100 * count)
    return (np.arange(count) < right).astype(float)
