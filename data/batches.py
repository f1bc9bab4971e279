"""Trajectories as arrays: optimizer steps, micro-batches and padding."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.batching import group_by_tokens
from data.trajectory import Provenance, Role, Trajectory

# What a loss reads, by name: arrays of (rows, tokens), and numbers such as "norm". The arrays are
# NumPy's here and the backend's own inside a loss.
Batch = dict[str, Any]
# Two trajectories that go on from one beginning, for SFT-1: (chosen, rejected).
Pair = tuple[Trajectory, Trajectory]


def pad(trajectories: Sequence[Trajectory]) -> Batch:
    """Return trajectories as arrays, padded on the right with zeros.

    "ids" (B, T) int64; "mask" (B, T) float32, which leaves the padding out; "old" (B, T) float32,
    the log-probs of sampling, where the trajectories were sampled.

    >>> pad([Trajectory([5, 6, 7], [0, 1, 1], [0, 1, 1])])["mask"]
    array([[0., 1., 1.]], dtype=float32)
    """
    shape = (len(trajectories), max(len(trajectory.ids) for trajectory in trajectories))
    ids = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.float32)
    old = np.zeros(shape, np.float32)
    for row, trajectory in enumerate(trajectories):
        ids[row, : len(trajectory.ids)] = trajectory.ids
        mask[row, : len(trajectory.mask)] = trajectory.mask
        old[row, : len(trajectory.logprobs)] = trajectory.logprobs
    return {"ids": ids, "mask": mask, "old": old}


def optimizer_steps(
    trajectories: Sequence[Trajectory],
    batch_tokens: int,
    rng: random.Random,
    window: int = 2000,
) -> list[list[Trajectory]]:
    """Return one epoch, cut into optimizer steps of about batch_tokens tokens.

    Trajectories are shuffled inside windows, and the order of the windows is kept. Lengths are
    mixed in a step, so that no step sees one kind of text alone.
    """
    steps: list[list[Trajectory]] = []
    step: list[Trajectory] = []
    tokens_in_step = 0
    for start in range(0, len(trajectories), window):
        part = trajectories[start : start + window]
        for trajectory in rng.sample(part, len(part)):
            step.append(trajectory)
            tokens_in_step += len(trajectory.ids)
            if tokens_in_step >= batch_tokens:
                steps.append(step)
                step = []
                tokens_in_step = 0
    if step:
        steps.append(step)
    return steps


def language_batches(trajectories: Sequence[Trajectory], micro_tokens: int) -> list[Batch]:
    """Return the micro-batches of one optimizer step of next-token loss (SFT-2 and SFT-3).

    "norm" is the sum of the masks of the whole step, so that the losses of micro-batches add up to
    the mean over learned tokens. A first token is predicted from nothing and does not count.
    """
    norm = float(sum(sum(trajectory.mask[1:]) for trajectory in trajectories))
    lengths = [len(trajectory.ids) for trajectory in trajectories]
    batches = []
    for group in group_by_tokens(lengths, micro_tokens):
        batch = pad([trajectories[row] for row in group])
        batch["norm"] = norm
        batches.append(batch)
    return batches


def pair_batches(pairs: Sequence[Pair], micro_tokens: int, alpha: float) -> list[Batch]:
    """Return the micro-batches of one optimizer step of SFT-1.

    Rows: the chosen sides, then the rejected sides of the same pairs.
    alpha: the weight of the loss's auxiliary term.
    """
    norm = float(len(pairs))
    # A pair is two rows, as long as the longer one.
    lengths = [2 * max(len(chosen.ids), len(rejected.ids)) for chosen, rejected in pairs]
    batches = []
    for group in group_by_tokens(lengths, micro_tokens):
        chosen_rows = [pairs[index][0] for index in group]
        rejected_rows = [pairs[index][1] for index in group]
        batch = pad(chosen_rows + rejected_rows)
        batch["alpha"] = alpha
        batch["norm"] = norm
        batches.append(batch)
    return batches


def learn_observations(trajectories: Sequence[Trajectory], weight: float = 1) -> list[Trajectory]:
    """Return the same ids with loss on observations too: SFT-3, where the policy learns the world.

    The masks of the trajectories that are given stay as they are.

    weight: of an observation's token in the loss, which is a weighted mean over tokens.
    """
    return [
        Trajectory(trajectory.ids, _mask_with_observations(trajectory, weight), trajectory.role)
        for trajectory in trajectories
    ]


def _mask_with_observations(trajectory: Trajectory, weight: float) -> list[float]:
    mask = list(trajectory.mask)
    for position, role in enumerate(trajectory.role):
        if role == Role.OBSERVATION:
            mask[position] = weight
    return mask


def real_observation_mask(trajectory: Trajectory) -> list[int]:
    """Return 1 for each token of an observation that the real tool made, and 0 for all others.

    What was imagined, and what a failed search says, is nothing to learn from.
    """
    mask = []
    observation = -1  # the number of the observation that the tokens belong to
    previous_role = Role.PROMPT
    for role in trajectory.role:
        if role == Role.OBSERVATION and previous_role != Role.OBSERVATION:
            observation += 1
        is_real = (
            role == Role.OBSERVATION
            and trajectory.observations[observation].provenance == Provenance.REAL
        )
        mask.append(int(is_real))
        previous_role = role
    return mask
