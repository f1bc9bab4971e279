"""The experience of one step of RL: rollouts of some questions, and their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.questions import Question
from data.trajectory import Trajectory


@dataclass
class RolloutBatch:
    """Rollouts of one question, a group, stand together."""

    questions: list[Question]
    trajectories: list[Trajectory]  # questions x rollouts
    rewards: np.ndarray  # (questions, rollouts)

    @property
    def groups(self) -> list[list[Trajectory]]:
        """The rollouts of each question."""
        rollouts = self.rewards.shape[1]
        starts = range(0, len(self.trajectories), rollouts)
        return [self.trajectories[start : start + rollouts] for start in starts]


def repeat_questions(questions: Sequence[Question], rollouts: int) -> list[Question]:
    """Return the question of each trajectory: rollouts of one question stand together."""
    return [question for question in questions for _ in range(rollouts)]
