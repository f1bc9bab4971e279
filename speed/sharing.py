"""How much of a group of rollouts is shared, by temperature, entropy and size of the group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocoa import random_stream
from common.settings import build_settings
from data.batches import build_trie
from data.questions import Question
from data.rollout_batch import RolloutBatch, repeat_questions
from data.trajectory import Trajectory
from evaluation.rl_log import sampled_logprobs
from speed.ours import Ours
from tasks import Task
from train_rl import RLSettings, groups_to_skip, rewards_of
from workflows.agent import roll_out_questions

TEMPERATURES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5)
# Each divides the last, so that all are cut from one sample.
GROUP_SIZES = (2, 4, 8, 16)


@dataclass
class Shares:
    """What some groups share. A token is one after a certain beginning: a node of the trie."""

    groups: int
    shared: float  # share of all tokens that another rollout has too
    shared_written: float  # the same of the tokens that the policy wrote
    # Of the tokens that the policy wrote, the part that is left where each is counted once, and
    # not at all where the whole group has it.
    apart_written: float


@dataclass
class SharedTokens:
    """What groups of one size share at one temperature."""

    temperature: float
    group_size: int
    entropy: float  # nats a token that the policy wrote, at this temperature
    equal_groups: float  # share of the groups whose rollouts are one text to the end
    all_groups: Shares
    learning_groups: Shares | None  # those whose rewards differ; None where none do


def measure_sharing(ours: Ours, task: Task, report: Callable[[SharedTokens], None]) -> None:
    """Sample groups with the tool at each temperature; report: is given what they share."""
    settings = ours.settings
    questions = task.questions("rl2", settings.questions)
    for temperature in TEMPERATURES:
        rollouts = sample(ours, task, questions, temperature)
        for size in GROUP_SIZES:
            batch = cut_into_groups(ours, questions, rollouts, size)
            report(shared_tokens(batch, temperature))


def sample(
    ours: Ours, task: Task, questions: Sequence[Question], temperature: float
) -> list[Trajectory]:
    """Return rollouts, of each question as many as the largest group has, standing together."""
    settings = ours.settings
    most = GROUP_SIZES[-1]
    texts = [question.question for question in questions for _ in range(most)]
    streams = [
        random_stream(settings.max_len, settings.seed, *divmod(number, most))
        for number in range(len(texts))
    ]
    return roll_out_questions(ours.lm, texts, task.rl_search, settings, None, temperature, streams)


def cut_into_groups(
    ours: Ours, questions: Sequence[Question], rollouts: list[Trajectory], size: int
) -> RolloutBatch:
    """Return rollouts in groups of one size, rewarded as train_rl.py does it in the run's RL-2.

    rollouts: of each question equally many, standing together.
    """
    settings = build_settings(RLSettings, ours.settings.given)
    each = len(rollouts) // len(questions)
    repeated = repeat_questions(questions, each)
    rewards = rewards_of(ours.lm.codec, repeated, rollouts, settings, settings.call_cost)
    of_groups = repeat_questions(questions, each // size)
    return RolloutBatch(of_groups, rollouts, rewards.reshape(-1, size))


def shared_tokens(batch: RolloutBatch, temperature: float) -> SharedTokens:
    """Return what the groups of rollouts share, all of them and those that learn."""
    groups = batch.groups
    skipped = groups_to_skip(batch)
    learning = [group for group, is_skipped in zip(groups, skipped, strict=True) if not is_skipped]
    equal = [all(rollout.ids == group[0].ids for rollout in group) for group in groups]
    logprobs = sampled_logprobs(batch.trajectories)
    return SharedTokens(
        temperature,
        batch.rewards.shape[1],
        # The log-probs of sampled tokens estimate entropy without bias.
        entropy=float(-np.concatenate(logprobs).mean()),
        equal_groups=float(np.mean(equal)),
        all_groups=shares_of(groups),
        learning_groups=shares_of(learning) if learning else None,
    )


def shares_of(groups: Sequence[Sequence[Trajectory]]) -> Shares:
    """Return what groups of rollouts share, as shares of the tokens of all their rollouts."""
    tokens = 0
    nodes = 0
    written = 0.0
    written_nodes = 0.0
    written_apart = 0.0
    for group in groups:
        trie = build_trie(group)
        rollouts_of_node = np.zeros(len(trie.ids))
        for path in trie.paths:
            rollouts_of_node[path] += 1
        tokens += sum(len(rollout.ids) for rollout in group)
        nodes += len(trie.ids)
        written += float((trie.mask * rollouts_of_node).sum())
        written_nodes += float(trie.mask.sum())
        written_apart += float(trie.mask[rollouts_of_node < len(group)].sum())
    return Shares(
        groups=len(groups),
        shared=1 - nodes / tokens,
        shared_written=1 - written_nodes / written,
        apart_written=written_apart / written,
    )


# ---- what is printed -----------------------------------------------------------------------------
SHARES_HEADING = f"{'groups':>10}{'shared':>9}{'of written':>12}{'apart':>8}"
HEADING = (
    "apart: of what the policy wrote, what is distinct and not the whole group's; after it, the "
    "groups whose rewards differ\n"
    f"{'temperature':>11}{'rollouts':>10}{'entropy':>9}{'one text':>10}"
    f"{SHARES_HEADING}{SHARES_HEADING}"
)


def line_of(shared: SharedTokens) -> str:
    """Return a line of the table."""
    line = (
        f"{shared.temperature:11.2f}{shared.group_size:10}{shared.entropy:9.3f}"
        f"{shared.equal_groups:10.1%}{_columns_of(shared.all_groups)}"
    )
    if shared.learning_groups is None:
        return f"{line}{0:10}"
    return line + _columns_of(shared.learning_groups)


def _columns_of(shares: Shares) -> str:
    return (
        f"{shares.groups:10}{shares.shared:9.1%}{shares.shared_written:12.1%}"
        f"{shares.apart_written:8.1%}"
    )
