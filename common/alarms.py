"""Alarms: what the log of an RL stage shows of a run that goes wrong, before its reward does.

Each looks at the last few steps beside those before them, in the figures that train_rl.py logs.
"""

from collections.abc import Mapping, Sequence

import numpy as np

RECENT = 3  # steps that are judged
BEFORE = 8  # steps before them that they are judged by
CLIFF = 0.25  # part of its former height at which a figure has fallen off a cliff
LEAST_ENTROPY = 0.02  # nats a token; what was lower before had nowhere to fall
LEAST_SPREAD = 0.02  # of rewards in a group, likewise
LOST_LIKELIHOOD = 0.05  # nats a token that the best rollouts may lose over all steps looked at
MALFORMED_RISE = 0.15  # of a share
SAMPLER_GAP = 0.05  # nats a token between the log-probs of sampling and those of training
FEW_SEARCHES = 0.1  # a rollout
MANY_SEARCHES = 0.95  # part of the budget

# Figures of a step, as log.jsonl has them.
Step = Mapping[str, float | None]


def alarms(steps: Sequence[Step], max_actions: int) -> dict[str, str]:
    """Return what is wrong with the newest steps of a stage: {figure: a line about it}.

    max_actions: the budget of searches of a rollout.
    """
    recent = steps[-RECENT:]
    before = steps[-RECENT - BEFORE : -RECENT]
    found: dict[str, str] = {}
    if len(recent) < RECENT:
        return found
    # The first step of an adapter leaves half of it without a gradient.
    if all(step.get("idle_parameters") for step in recent):
        found["idle_parameters"] = "a parameter gets no gradient"
    gap = _mean(recent, "sampler_gap")
    if gap > SAMPLER_GAP:
        found["sampler_gap"] = f"training and sampling differ by {gap:.3f} nats a token"
    if len(before) < BEFORE:
        return found

    found |= _cliffs(recent, before)
    lost = -sum(step.get("best_change") or 0.0 for step in [*before, *recent])
    if lost > LOST_LIKELIHOOD:
        found["best_change"] = f"the best rollouts lost {lost:.3f} nats a token"
    searches = _mean(recent, "actions")
    if searches < FEW_SEARCHES < CLIFF * _mean(before, "actions"):
        found["actions"] = f"it hardly searches any more: {searches:.2f} times a rollout"
    if searches > MANY_SEARCHES * max_actions:
        found["actions"] = f"it searches as often as it may: {searches:.2f} times a rollout"
    rise = _mean(recent, "malformed") - _mean(before, "malformed")
    if rise > MALFORMED_RISE:
        found["malformed"] = f"the share of malformed rollouts rose by {rise:.2f}"
    return found


def _cliffs(recent: Sequence[Step], before: Sequence[Step]) -> dict[str, str]:
    """Return what has fallen to a small part of its height."""
    found = {}
    for figure, least in (("entropy", LEAST_ENTROPY), ("reward_spread", LEAST_SPREAD)):
        now = _mean(recent, figure)
        then = _mean(before, figure)
        if then > least and now < CLIFF * then:
            found[figure] = f"{figure.replace('_', ' ')} fell from {then:.3f} to {now:.3f}"
    return found


def _mean(steps: Sequence[Step], figure: str) -> float:
    """Return the mean of a figure over the steps that have it; 0 where none has."""
    values = [value for step in steps if (value := step.get(figure)) is not None]
    return float(np.mean(values)) if values else 0.0
