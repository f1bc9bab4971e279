"""Alarms of RL: each rings on a trace that has its fault, and none on a healthy one."""

import numpy as np
import pytest

from common.alarms import alarms

HEALTHY = {
    "entropy": 0.3,
    "reward_spread": 0.2,
    "best_change": 0.002,
    "actions": 2.4,
    "malformed": 0.02,
    "sampler_gap": 1e-6,
    "idle_parameters": 0,
}


def trace(steps: int = 30, **fault: list[float]) -> list[dict[str, float | None]]:
    """Return a noisy healthy log; a fault replaces the last values of a figure."""
    rng = np.random.default_rng(0)
    log: list[dict[str, float | None]] = [
        {name: value * rng.uniform(0.7, 1.3) for name, value in HEALTHY.items()}
        for _ in range(steps)
    ]
    for name, values in fault.items():
        for step, value in zip(log[-len(values) :], values, strict=True):
            step[name] = value
    return log


def test_a_healthy_trace_is_silent() -> None:
    """At every step, also the first ones, and where a figure is missing."""
    log = trace()
    log[20]["best_change"] = None
    log[0]["idle_parameters"] = 3
    log[10].clear()
    for end in range(len(log) + 1):
        assert alarms(log[:end], max_actions=6) == {}


def test_learning_is_no_fault() -> None:
    """Entropy and spread sink slowly, searches rise: what a good run looks like."""
    log = trace(60)
    for number, step in enumerate(log):
        step["entropy"] = 0.3 * 0.97**number
        step["reward_spread"] = 0.2 * 0.98**number
        step["actions"] = 1 + number / 40
    for end in range(len(log) + 1):
        assert alarms(log[:end], max_actions=6) == {}


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"entropy": [0.05, 0.03, 0.01]}, "entropy fell from"),
        ({"reward_spread": [0.0, 0.0, 0.0]}, "reward spread fell"),
        ({"best_change": [-0.008] * 11}, "the best rollouts lost 0.088 nats"),
        ({"actions": [0.1, 0.0, 0.0]}, "it hardly searches any more"),
        ({"actions": [6.0, 6.0, 5.9]}, "it searches as often as it may"),
        ({"malformed": [0.2, 0.3, 0.4]}, "the share of malformed rollouts rose"),
        ({"sampler_gap": [0.1, 0.1, 0.1]}, "training and sampling differ by 0.100"),
        ({"idle_parameters": [1, 2, 1]}, "a parameter gets no gradient"),
    ],
)
def test_a_fault_rings_alone(fault: dict[str, list[float]], line: str) -> None:
    """The alarm of this fault, and no other."""
    found = alarms(trace(**fault), max_actions=6)
    assert list(found) == list(fault)
    assert line in found.popitem()[1]
