"""What a step of RL looked like, and what its update changed: the figures of log.jsonl.

Nothing in here changes what is trained.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocoa import k3
from common.batching import fill_by_tokens
from data.batches import count_nodes, pack_texts
from data.rollout_batch import RolloutBatch, repeat_questions
from data.scores import exact_match
from data.trajectory import Codec, Trajectory
from environments.environment import Environment
from environments.fidelity import known_share
from model import LM
from workflows.agent import trajectory_row

WATCHED = 10  # rollouts of a step whose log-probs are watched, at most; a tenth of a small step


# ---- the rollouts of a step ----------------------------------------------------------------------
def describe_rollouts(codec: Codec, batch: RolloutBatch) -> dict[str, float]:
    """Return what the rollouts of one step looked like: means over its trajectories."""
    trajectories = batch.trajectories
    logprobs = np.concatenate(sampled_logprobs(trajectories))
    repeated = repeat_questions(batch.questions, batch.rewards.shape[1])
    scores = [
        exact_match(codec.answer(trajectory), question.golden_answers)
        for trajectory, question in zip(trajectories, repeated, strict=True)
    ]

    def mean(values: list[Any]) -> float:
        return float(np.mean(values))

    return {
        "reward": float(batch.rewards.mean()),
        "reward_spread": float(batch.rewards.std(1).mean()),
        "em": mean(scores),
        # The log-probs of sampled tokens estimate entropy without bias.
        "entropy": float(-logprobs.mean()),
        "length": mean([len(trajectory.ids) for trajectory in trajectories]),
        "policy_tokens": mean([sum(trajectory.mask) for trajectory in trajectories]),
        "actions": mean([len(trajectory.queries) for trajectory in trajectories]),
        "forced": mean([trajectory.forced for trajectory in trajectories]),
        "malformed": mean([not codec.is_well_formed(trajectory) for trajectory in trajectories]),
        "shared_tokens": shared_token_fraction(batch),
    }


def shared_token_fraction(batch: RolloutBatch) -> float:
    """Return the fraction of a step's tokens in a prefix that another rollout has too.

    They are computed once with that one, in sampling and in the update (docs/trie.md).
    """
    tokens = sum(len(trajectory.ids) for trajectory in batch.trajectories)
    nodes = sum(count_nodes(group) for group in batch.groups)
    return 1 - nodes / tokens


def describe_groups(
    skipped: np.ndarray, steps_before: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return how many groups teach nothing, and for how many steps in a row none has.

    skipped: (questions,), groups that are skipped.
    steps_before: the log of the stage.
    """
    return {
        "skipped_groups": int(skipped.sum()),
        "idle_steps": count_idle_steps(steps_before, skipped),
    }


def count_idle_steps(steps_before: Sequence[Mapping[str, Any]], skipped: np.ndarray) -> int:
    """Return how many steps in a row, up to this one, had no group whose rewards teach anything."""
    if not skipped.all():
        return 0
    return 1 + (steps_before[-1].get("idle_steps", 0) if steps_before else 0)


def describe_searches(batch: RolloutBatch, environment: Environment) -> dict[str, float | None]:
    """Return how often the tool has answered so far, and how well known answers were imagined."""
    searches = [
        search
        for trajectory in batch.trajectories
        for search in zip(trajectory.queries, trajectory.observations, strict=False)
    ]
    return {
        "known_exact": known_share(searches, environment.known_answers),
        "real_calls": environment.tool.raw_calls,
        "distinct_calls": environment.tool.distinct_calls,
    }


def describe_pace(
    batch: RolloutBatch, seconds_rollout: float, seconds_update: float
) -> dict[str, float]:
    """Return how long the two parts of a step took, and tokens a second."""
    tokens = sum(len(trajectory.ids) for trajectory in batch.trajectories)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / (seconds_rollout + seconds_update),
        "seconds_rollout": seconds_rollout,
        "seconds_update": seconds_update,
    }


def summarize(record: Mapping[str, Any]) -> str:
    """Return what stands beside the progress bar. record: the figures of a step."""
    summary = f"reward {record['reward']:.3f}, {record['actions']:.2f} actions"
    if record["idle_steps"]:
        summary += f", no group to learn from for {record['idle_steps']} steps"
    seconds = record["seconds_rollout"] + record["seconds_update"]
    return f"{summary}, {seconds:.1f} s"


def first_group(codec: Codec, batch: RolloutBatch, step: int) -> list[dict[str, Any]]:
    """Return the rollouts of the step's first question for rollouts.jsonl."""
    return [
        trajectory_row(codec, batch.questions[0], trajectory, value, step=step)
        for trajectory, value in zip(batch.groups[0], batch.rewards[0], strict=True)
    ]


# ---- what an update changes ----------------------------------------------------------------------
@dataclass
class Watched:
    """A few rollouts of a step, whose log-probs are looked at before and after its update."""

    trajectories: list[Trajectory]
    is_best: np.ndarray  # (trajectories,) of bool, as best_rollouts has it
    micro_tokens: int  # tokens that a network reads at once
    temperature: float  # of the log-probs

    def logprobs(self, lm: LM) -> list[np.ndarray]:
        """Return those of the policy's tokens under a model, (tokens,) for each trajectory."""
        return policy_logprobs(lm, self.trajectories, self.micro_tokens, self.temperature)


def watched_rollouts(batch: RolloutBatch, micro_tokens: int, temperature: float) -> Watched:
    """Return some rollouts of a step, evenly over it.

    Each is read three times, which takes long where a real checkpoint has steps of thirty.
    """
    rollouts = len(batch.trajectories)
    count = min(WATCHED, math.ceil(rollouts / 10))
    some = slice(None, None, rollouts // count)
    return Watched(batch.trajectories[some], best_rollouts(batch)[some], micro_tokens, temperature)


def describe_change(
    policy: LM, reference: LM, watched: Watched, before: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """Return what an update has changed, nats a token: means over the watched rollouts.

    before: log-probs of training before the update, of the policy's tokens, by trajectory.
    """
    after = watched.logprobs(policy)
    return {
        "kl": mean_kl(after, watched.logprobs(reference)),
        "sampler_gap": sampler_gap(sampled_logprobs(watched.trajectories), before),
        "best_change": mean_change(watched.is_best, before, after),
    }


def policy_logprobs(
    lm: LM, trajectories: Sequence[Trajectory], micro_tokens: int, temperature: float
) -> list[np.ndarray]:
    """Return for each trajectory the log-probs of the policy's tokens under a model: (tokens,)."""
    logprobs = []
    lengths = [len(trajectory.ids) for trajectory in trajectories]
    for rows in fill_by_tokens(lengths, micro_tokens):
        batch = pack_texts([trajectories[row] for row in rows])
        scored = lm.backend.score(lm.network, batch, temperature)
        is_own = batch["mask"] > 0
        logprobs += [scored[start:end][is_own[start:end]] for start, end in batch["parts"]]
    return logprobs


def sampled_logprobs(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """Return for each trajectory the log-probs of the policy's tokens when sampled: (tokens,)."""
    return [
        np.array(trajectory.logprobs)[np.array(trajectory.mask) > 0] for trajectory in trajectories
    ]


def mean_kl(policy: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Return KL to the reference (k3), nats a token: watched even where --kl is 0.

    policy, reference: log-probs of the same tokens, by trajectory.
    """
    return float(k3(np, np.concatenate(reference) - np.concatenate(policy)).mean())


def sampler_gap(sampled: Sequence[np.ndarray], scored: Sequence[np.ndarray]) -> float:
    """Return how far log-probs of sampling are from those of training: mean, nats a token.

    sampled, scored: of the policy's tokens, by trajectory; those of training before the update.
    """
    return float(np.abs(np.concatenate(scored) - np.concatenate(sampled)).mean())


def best_rollouts(batch: RolloutBatch) -> np.ndarray:
    """Return which rollouts have the best reward of a group that differs: (rollouts,) of bool."""
    best = batch.rewards == batch.rewards.max(1, keepdims=True)
    return (best & ~best.all(1, keepdims=True)).ravel()


def mean_change(
    selected: np.ndarray, before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> float | None:
    """Return by how much an update made some trajectories more likely: mean, nats a token.

    selected: (trajectories,) of bool; None is returned where it holds for none.
    before, after: log-probs of the same tokens, by trajectory.
    """
    changes = [
        new - old for is_one, old, new in zip(selected, before, after, strict=True) if is_one
    ]
    return float(np.concatenate(changes).mean()) if changes else None
