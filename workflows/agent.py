"""Questions answered by an agent: the policy itself decides when to call the tool."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from autocoa import Imagine, Search, rollout
from common import ranks
from common.progress import progress_bar
from common.settings import RolloutSettings
from data.questions import Question
from data.scores import exact_match
from data.trajectory import Codec, Trajectory
from data.trajectory_rows import TrajectoryRow
from model import LM


class Answered(NamedTuple):
    """What a workflow, or an agent, answers to one question."""

    answer: str
    trajectory: Trajectory


def roll_out_questions(
    lm: LM,
    questions: Sequence[str],
    search: Search | Imagine | None,
    settings: RolloutSettings,
    description: str | None = None,
    temperature: float = 0.0,
    streams: Sequence[np.ndarray] = (),
) -> list[Trajectory]:
    """Roll out every question, those of like length together, and return them in order.

    Several processes share the questions.
    streams: of random numbers, one for each question; none at temperature 0.
    """
    prompts = [lm.codec.prompt(question) for question in questions]
    shortest_first = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    sorted_prompts = [prompts[number] for number in shortest_first]

    def roll_out(places: list[int], search: Search | Imagine | None) -> list[Trajectory]:
        share = [sorted_prompts[place] for place in places]
        own = [streams[shortest_first[place]] for place in places] if temperature else []
        with progress_bar(len(share), description, "question") as bar:
            return rollout(
                lm.decoder, lm.codec, share, search, settings, temperature, own, bar.update
            )

    done = ranks.split(sorted_prompts, roll_out, search)
    trajectory_of = dict(zip(shortest_first, done, strict=True))
    return [trajectory_of[number] for number in range(len(prompts))]


def sample_rows(
    lm: LM, questions: Sequence[Question], search: Search, settings: RolloutSettings
) -> list[dict[str, Any]]:
    """Return lines of rollouts.jsonl: greedy trajectories to read, with their exact match."""
    rows = []
    texts = [question.question for question in questions]
    trajectories = roll_out_questions(lm, texts, search, settings)
    for question, trajectory in zip(questions, trajectories, strict=True):
        score = exact_match(lm.codec.answer(trajectory), question.golden_answers)
        rows.append(trajectory_row(lm.codec, question, trajectory, score))
    return rows


def trajectory_row(
    codec: Codec,
    question: Question,
    trajectory: Trajectory,
    reward: float,
    step: int | None = None,
) -> dict[str, Any]:
    """Return a line of rollouts.jsonl. step: of RL."""
    row = TrajectoryRow(
        step=step,
        question=question.question,
        golden_answers=question.golden_answers,
        reward=float(reward),
        text=codec.decode(trajectory.ids),
        ids=trajectory.ids,
        role=trajectory.role,
        mask=trajectory.mask,
        tokens=codec.pieces(trajectory.ids),
    )
    return row.to_json()
