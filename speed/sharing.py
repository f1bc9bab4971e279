"""How much of a group of rollouts is shared, by temperature, entropy and size of the group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocoa import random_stream
from data.batches import build_trie
from data.questions import Question
from data.trajectory import Trajectory
from speed.ours import Ours
from tasks import Task
from workflows.agent import answer_questions

TEMPERATURES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5)
# Each divides the last, so that all are cut from one sample.
GROUP_SIZES = (2, 4, 8, 16)


@dataclass
class SharedTokens:
    """What groups of one size share at one temperature."""

    temperature: float
    group_size: int
    entropy: float  # nats a token that the policy wrote, at this temperature
    shared: float  # share of all tokens that another rollout has too, behind the same beginning
    shared_written: float  # the same of the tokens that the policy wrote
    equal_groups: float  # share of the groups whose rollouts are one text to the end


def measure_sharing(ours: Ours, task: Task, report: Callable[[SharedTokens], None]) -> None:
    """Sample groups with the tool at each temperature; report: is given what they share."""
    settings = ours.settings
    questions = task.questions("rl2", settings.questions)
    for temperature in TEMPERATURES:
        rollouts = sample(ours, task, questions, temperature)
        for size in GROUP_SIZES:
            report(shared_tokens(rollouts, size, temperature))


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
    return answer_questions(ours.lm, texts, task.rl_search, settings, None, temperature, streams)


def shared_tokens(rollouts: Sequence[Trajectory], size: int, temperature: float) -> SharedTokens:
    """Return what rollouts share that stand in groups of one size."""
    tokens = 0
    nodes = 0
    written = 0.0
    written_nodes = 0.0
    equal = []
    for first in range(0, len(rollouts), size):
        group = rollouts[first : first + size]
        trie = build_trie(group)
        tokens += sum(len(rollout.ids) for rollout in group)
        nodes += len(trie.ids)
        written += sum(sum(rollout.mask) for rollout in group)
        written_nodes += float(trie.mask.sum())
        equal.append(all(rollout.ids == group[0].ids for rollout in group))
    logprobs = [np.array(rollout.logprobs)[np.array(rollout.mask) > 0] for rollout in rollouts]
    return SharedTokens(
        temperature,
        size,
        # The log-probs of sampled tokens estimate entropy without bias.
        entropy=float(-np.concatenate(logprobs).mean()),
        shared=1 - nodes / tokens,
        shared_written=1 - written_nodes / written,
        equal_groups=float(np.mean(equal)),
    )


# ---- what is printed -----------------------------------------------------------------------------
HEADING = (
    f"{'temperature':>11}{'rollouts':>10}{'entropy':>9}{'shared':>9}{'of written':>12}"
    f"{'one text':>10}"
)


def line_of(shared: SharedTokens) -> str:
    """Return a line of the table."""
    return (
        f"{shared.temperature:11.2f}{shared.group_size:10}{shared.entropy:9.3f}"
        f"{shared.shared:9.1%}{shared.shared_written:12.1%}{shared.equal_groups:10.1%}"
    )
