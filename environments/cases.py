"""Searches whose answers are known, on which models that imagine the search tool are measured.

A search is a query, what the tool says to it, and the trajectory before it. Three groups of them
are told apart:

training   a teacher's chains of SFT, which SFT-3 has read: about another world than RL-2's
held out   a teacher's chains for questions about RL-2's world that no stage asks
policy     what policies asked themselves while they were trained with the real tool
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from common.files import read_log
from common.settings import RolloutSettings
from data.passages import neutralize
from data.questions import Fact, Lookup, Question
from data.teacher import write_chains
from data.trajectory import Codec, Provenance, Role, Trajectory
from data.trajectory_rows import TrajectoryRow
from environments.examples import parts_by_role
from environments.simulator import prompt_of, questions_by_prompt
from tasks import Task
from tools import split_action

Item = TypeVar("Item")


class AskedFact(NamedTuple):
    """The fact that a search asks for, and the look-up of it that the search makes."""

    fact: Fact
    lookup: Lookup


@dataclass
class Case:
    """One search whose answer is known."""

    query: str
    real: str  # what the tool says, as far as a policy reads it
    context: list[int]  # ids of the trajectory up to the opened observation
    question: Question | None  # that the trajectory answers; None where nobody knows
    asked: AskedFact | None  # likewise


# ---- from trajectories ---------------------------------------------------------------------------
def cases_of(codec: Codec, question: Question | None, trajectory: Trajectory) -> list[Case]:
    """Return the searches of a trajectory whose observations the real tool made.

    question: the one that it answers; without it nobody knows what a search asks for.
    """
    cases = []
    before: list[int] = []
    thoughts: list[int] = []
    name, query = "", ""
    for role, ids in parts_by_role(trajectory):
        if role == Role.THINK:
            thoughts += ids
        elif role == Role.ACTION:
            name, query = split_action(codec.last_query(ids))
        elif role == Role.OBSERVATION and name == "search":
            real = codec.decode(ids[1:-1]).strip()
            asked = find_asked_fact(question, query, codec.decode(thoughts)) if question else None
            cases.append(Case(query, real, before + ids[:1], question, asked))
        before = before + ids
    return cases


def find_asked_fact(question: Question, query: str, thoughts: str) -> AskedFact | None:
    """Return which fact of a question a query asks for, None where it names none of them.

    It must be one of the look-up's own queries, or name its subject. Where several look-ups fit,
    the one that was thought of last is meant.

    thoughts: what was thought before the query.
    """
    candidates = []
    for fact in question.facts:
        for lookup in fact.lookups:
            subject = lookup.subject or lookup.title
            names_subject = bool(subject) and subject.lower() in query.lower()
            if lookup.is_search and (names_subject or query in lookup.queries):
                candidates.append(AskedFact(fact, lookup))

    def rank(asked: AskedFact) -> tuple[bool, int, int]:
        lookup = asked.lookup
        return query in lookup.queries, len(lookup.subject), thoughts.rfind(lookup.ask)

    return max(candidates, key=rank, default=None)


# ---- the three groups ----------------------------------------------------------------------------
def training_cases(
    codec: Codec, chains: Iterable[Trajectory], questions: Sequence[Question]
) -> list[Case]:
    """Return the searches of chains that SFT learned from.

    questions: those that the chains may answer.
    """
    question_of_prompt = questions_by_prompt(codec, questions)
    cases = []
    for chain in chains:
        cases += cases_of(codec, question_of_prompt.get(prompt_of(chain)), chain)
    return cases


def held_out_cases(
    codec: Codec, task: Task, questions: list[Question], settings: RolloutSettings
) -> list[Case]:
    """Return the searches of a teacher who looks up every fact in RL-2's world."""
    nothing_known: set[str] = set()
    chains, _ = write_chains(
        codec, questions, nothing_known, task.rl_search, settings.max_observation
    )
    return [case for question, chain in chains for case in cases_of(codec, question, chain)]


def policy_cases(
    codec: Codec, root: Path, questions: Sequence[Question], settings: RolloutSettings
) -> list[Case]:
    """Return the searches of the rollouts of a run whose answers its real tool has given.

    root: folder of the run; stages of RL keep both, in rollouts.jsonl and calls.jsonl.
    questions: those of RL-2's pool. A rollout of another question is about another world.
    """
    question_of_text = {question.question: question for question in questions}
    cases = []
    for path in sorted(root.glob("*/calls.jsonl")):
        answers = {
            row["query"]: codec.fit(neutralize(row["text"]), settings.max_observation)
            for row in read_log(path, "--run", "query")
            if row.get("provenance") == Provenance.REAL
        }
        for values in read_log(path.with_name("rollouts.jsonl"), "--run", "tokens"):
            row = TrajectoryRow.from_json(values)
            question = question_of_text.get(row.question)
            if question is None:
                continue
            trajectory = Trajectory(row.ids, row.mask, row.role)
            for case in cases_of(codec, question, trajectory):
                # In a mixed environment a world model may have answered at this place.
                if case.query in answers:
                    cases.append(replace(case, real=answers[case.query]))
    return cases


def each_query_once(cases: Iterable[Case]) -> list[Case]:
    """Return the first search of each query."""
    first_of_query: dict[str, Case] = {}
    for case in cases:
        first_of_query.setdefault(case.query, case)
    return list(first_of_query.values())


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items at most, at equal distances from the first to the last."""
    if len(items) <= count:
        return list(items)
    positions = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[position] for position in positions]
