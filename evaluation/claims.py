"""The paper's seven claims, put to the test on the predictions of several seeds.

A claim is a difference in points of exact match, with its 95% interval over questions and a paired
test, and the same difference seed by seed. It *holds* where the whole interval lies above what it
needs, it *does not* where the whole interval lies below, and is *undecided* in between.
"""

from collections.abc import Sequence
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
    paired_gain,
    sign_flip_p,
)

WORKFLOWS = ("model only", "ReAct workflow")  # those of the paper's table
SFT1 = "SFT-1"
SFT2_ALONE = "sft2_alone"
SFT12 = "SFT-1&2"
SFT123 = "SFT-1&2&3"
RL1 = "SFT-1&2&3+RL-1"
RL12 = "SFT-1&2&3+RL-1&2"
RL2_ALONE = "rl2_alone"
RL2_FROM_SFT2 = "rl2_from_sft2"  # practises with the real tool alone
AGENTS = (SFT1, SFT2_ALONE, SFT12, SFT123, RL2_ALONE, RL1, RL12, RL2_FROM_SFT2)

LITTLE = 2.0  # points that "costs little" allows
NEAR = 1.5  # points that "comes near" allows
FEW_ACTIONS = (1, 2)
MANY_ACTIONS = 3  # or more


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    FAILS = "does not"
    UNDECIDED = "undecided"


@dataclass
class Claim:
    """A claim and its evidence."""

    number: int
    text: str  # as the paper has it
    measure: str  # what is subtracted from what
    needs: float  # points; the interval has to lie above it
    gain: Gain
    p: float | None  # of a paired test against no difference, two-sided; None where nothing pairs
    by_seed: dict[str, float]  # seed -> points

    @property
    def verdict(self) -> Verdict:
        """Whether it holds."""
        if self.gain.low > self.needs:
            return Verdict.HOLDS
        if self.gain.high < self.needs:
            return Verdict.FAILS
        return Verdict.UNDECIDED


def judge_claims(seeds: Sequence[SeedResults]) -> list[Claim]:
    """Return the claims of which the rows are there, in the paper's order."""
    comparisons = [
        _every_agent_beats_workflows(seeds),
        _compare(seeds, 2, "SFT-1&2 beats SFT-2 alone", SFT12, SFT2_ALONE),
        _compare(seeds, 3, "SFT-3 costs little", SFT123, SFT12, needs=-LITTLE),
        _compare(seeds, 4, "RL adds to SFT", RL12, SFT123),
        _compare(
            seeds,
            5,
            "five sixths imagined, one sixth real comes near all real",
            RL12,
            RL2_FROM_SFT2,
            needs=-NEAR,
        ),
        _success_with_many_actions(seeds),
        _collapse_without_tool(seeds),
    ]
    return [claim for claim in comparisons if claim is not None]


# ---- differences of two rows ---------------------------------------------------------------------
def _compare(
    seeds: Sequence[SeedResults], number: int, text: str, first: str, second: str, needs: float = 0
) -> Claim | None:
    """Return the claim that one row is better than another, None where no seed has both."""
    pairs = {
        results.seed: (results.answers[first], results.answers[second])
        for results in seeds
        if first in results.answers and second in results.answers
    }
    if not pairs:
        return None
    return Claim(
        number=number,
        text=text,
        measure=f"{first} over {second}",
        needs=needs,
        gain=paired_gain(list(pairs.values())),
        p=sign_flip_p(list(pairs.values())),
        by_seed={seed: paired_gain([pair]).points for seed, pair in pairs.items()},
    )


def _every_agent_beats_workflows(seeds: Sequence[SeedResults]) -> Claim | None:
    """Return the weakest of all comparisons of an agent with a workflow."""
    claims = []
    for agent in AGENTS:
        for workflow in WORKFLOWS:
            claim = _compare(seeds, 1, "every agent model beats the workflows", agent, workflow)
            if claim is not None:
                claims.append(claim)
    return min(claims, key=lambda claim: claim.gain.low, default=None)


# ---- by the number of actions (paper Fig. 3) -----------------------------------------------------
class Success(NamedTuple):
    """Answers of a row, one number each."""

    em: np.ndarray  # (answers,)
    actions: np.ndarray  # (answers,)

    def fall(self) -> float:
        """Return success with few actions less success with many, in points; NaN without both."""
        few = self.em[np.isin(self.actions, FEW_ACTIONS)]
        many = self.em[self.actions >= MANY_ACTIONS]
        if not len(few) or not len(many):
            return np.nan
        return 100 * float(few.mean() - many.mean())

    def draw(self, rng: np.random.Generator) -> "Success":
        """Return as many answers, drawn anew."""
        rows = rng.integers(0, len(self.em), len(self.em))
        return Success(self.em[rows], self.actions[rows])


def _success_with_many_actions(seeds: Sequence[SeedResults]) -> Claim | None:
    """Return the claim that success falls less with more actions than the ReAct workflow's."""
    rows = (RL12, WORKFLOWS[-1])
    complete = [results for results in seeds if all(row in results.answers for row in rows)]
    if not complete:
        return None
    agent, workflow = (
        _success([answer for results in complete for answer in _answers(results, row)])
        for row in rows
    )
    points = workflow.fall() - agent.fall()
    if np.isnan(points):
        return None
    rng = np.random.default_rng(0)
    drawn = [workflow.draw(rng).fall() - agent.draw(rng).fall() for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.nanpercentile(drawn, INTERVAL_PERCENTILES)
    by_seed = {}
    for results in complete:
        agent_of_seed, workflow_of_seed = (_success(_answers(results, row)) for row in rows)
        by_seed[results.seed] = workflow_of_seed.fall() - agent_of_seed.fall()
    return Claim(
        number=6,
        text="success stays high as the number of actions grows (Fig. 3)",
        measure=(
            f"fall of success from {FEW_ACTIONS[0]} or {FEW_ACTIONS[1]} actions to {MANY_ACTIONS} "
            f"or more: the ReAct workflow's less that of {RL12}"
        ),
        needs=0,
        gain=Gain(points, float(low), float(high), questions=len(agent.em)),
        p=None,
        by_seed=by_seed,
    )


def _answers(results: SeedResults, row: str) -> list[ScoredQuestion]:
    return [answer for answers in results.answers[row].values() for answer in answers]


def _success(answers: Sequence[ScoredQuestion]) -> Success:
    em = np.array([answer["em"] for answer in answers])
    return Success(em, np.array([answer["actions"] for answer in answers]))


# ---- known and unknown facts (paper appendix A) --------------------------------------------------
def _collapse_without_tool(seeds: Sequence[SeedResults]) -> Claim | None:
    """Return the claim that a model without a tool answers what it knows, and little else."""
    by_seed = {}
    questions = 0
    for results in seeds:
        row = WORKFLOWS[0]
        if row not in results.figures:
            continue
        acting = results.figures[row].acting
        if acting.em_known is None or acting.em_unknown is None:
            continue
        by_seed[results.seed] = acting.em_known - acting.em_unknown
        questions += len(_answers(results, row))
    if not by_seed:
        return None
    values = list(by_seed.values())
    low, high = seed_interval(values)
    return Claim(
        number=7,
        text="a closed-book model collapses on facts it never saw, and recalls known ones (app. A)",
        measure="model only: questions of known facts over questions with an unknown one "
        "(interval over seeds)",
        needs=0,
        gain=Gain(float(np.mean(values)), low, high, questions),
        p=None,
        by_seed=by_seed,
    )


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
