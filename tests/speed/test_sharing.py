"""What rollouts of a question share, of all groups and of those that learn."""

from pathlib import Path

import numpy as np
import pytest

from common.settings import build_settings
from data.questions import Question
from data.rollout_batch import RolloutBatch
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from model import LM
from speed.drawing import draw_sharing
from speed.ours import Ours
from speed.settings import BenchSettings
from speed.sharing import HEADING, SharedTokens, Shares, cut_into_groups, line_of, shared_tokens


def text(*ids: int, written: int = 2) -> Trajectory:
    """Return a rollout whose last tokens the policy wrote, each with probability 1 / e."""
    mask = [0] * (len(ids) - written) + [1] * written
    logprobs = [-1.0 * value for value in mask]
    return Trajectory(list(ids), mask, [int(Role.THINK)] * len(ids), logprobs)


def pairs() -> list[Trajectory]:
    """Return two rollouts that are one text, and two that part at the last token."""
    return [text(1, 2, 3, 4), text(1, 2, 3, 4), text(1, 2, 5, 6), text(1, 2, 5, 7)]


def groups(rewards: list[list[float]], rollouts: list[Trajectory]) -> RolloutBatch:
    questions = [Question(str(number), "Who?", ["Eva"]) for number in range(len(rewards))]
    return RolloutBatch(questions, rollouts, np.array(rewards))


def test_shared_tokens_of_groups() -> None:
    """Of 16 tokens 4 are another rollout's too in the first pair, 3 in the second, which learns.

    Of the eight that were written two stand apart: the last ones of the second pair.
    """
    shared = shared_tokens(groups([[1, 1], [1, 0]], pairs()), temperature=0.7)
    assert (shared.temperature, shared.group_size) == (0.7, 2)
    assert (shared.equal_groups, shared.entropy) == (0.5, 1.0)
    assert shared.all_groups == Shares(2, shared=7 / 16, shared_written=3 / 8, apart_written=2 / 8)
    assert shared.learning_groups == Shares(
        1, shared=3 / 8, shared_written=1 / 4, apart_written=2 / 4
    )


def test_a_group_whose_rewards_agree_does_not_learn() -> None:
    """As one group of four it shares more; what two of four have stands apart from the whole."""
    shared = shared_tokens(groups([[1, 1, 1, 1]], pairs()), temperature=1.0)
    assert shared.all_groups == Shares(1, shared=9 / 16, shared_written=3 / 8, apart_written=5 / 8)
    assert shared.learning_groups is None
    assert len(line_of(shared)) < len(HEADING)


def test_a_group_that_lost_a_search_does_not_learn() -> None:
    """As in train_rl.py, whatever its rewards are."""
    rollouts = pairs()
    rollouts[0].observations.append(Observation("", Provenance.FAILED))
    shared = shared_tokens(groups([[1, 0], [1, 0]], rollouts), temperature=1.0)
    assert shared.learning_groups is not None
    assert shared.learning_groups.groups == 1
    assert shared.learning_groups.shared == 3 / 8


def test_rewards_are_those_of_the_runs_rl(codec: Codec, lm: LM, tmp_path: Path) -> None:
    """By its score and its price of a call; each rollout by its own question's answers."""
    given = {"reward": "f1", "call_cost": 0.25}
    ours = Ours(lm, tmp_path, build_settings(BenchSettings, given))
    questions = [
        Question("1", "Who directed it?", ["Eva Moss"]),
        Question("2", "Who starred in it?", ["Ada Falk"]),
    ]
    parts = [("think", "Hm"), ("search", "it"), ("result", "Not found")]
    rollouts = [
        codec.build("Who directed it?", [("answer", "Eva Moss")]),
        codec.build("Who directed it?", [("answer", "Eva")]),
        codec.build("Who directed it?", [*parts, ("answer", "Eva Moss")]),
        codec.build("Who directed it?", [("answer", "Ada Falk")]),
        *[codec.build("Who starred in it?", [("answer", "Ada Falk")]) for _ in range(4)],
    ]
    batch = cut_into_groups(ours, questions, rollouts, 2)
    expected = [[1, 2 / 3], [0.75, 0], [1, 1], [1, 1]]
    np.testing.assert_allclose(batch.rewards, expected)
    assert [question.id for question in batch.questions] == ["1", "1", "2", "2"]
    assert batch.trajectories == rollouts


def test_the_figure_shows_the_share_of_all_tokens() -> None:
    """A line for each group size, by temperature and by entropy."""
    shares = []
    for temperature, size, shared in ((0.5, 2, 0.4), (0.5, 4, 0.6), (1.0, 2, 0.3), (1.0, 4, 0.5)):
        of_all = Shares(9, shared, shared_written=0.0, apart_written=0.0)
        shares.append(SharedTokens(temperature, size, temperature / 10, 0.0, of_all, None))
    by_temperature, by_entropy = draw_sharing(shares).axes
    for axes, places in ((by_temperature, [0.5, 1.0]), (by_entropy, [0.05, 0.1])):
        assert len(axes.lines) == 2
        for line, percent in zip(axes.lines, ([40, 30], [60, 50]), strict=True):
            assert np.asarray(line.get_xdata()).tolist() == pytest.approx(places)
            assert np.asarray(line.get_ydata()).tolist() == pytest.approx(percent)
