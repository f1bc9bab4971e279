"""A mixed environment: a world model answers, and for some queries the real tool.

By schedule, a share of the queries goes to the tool, which grows over the steps of the stage. By
confidence, the world model writes first, and where it is unsure of what it has written the tool's
answer takes its place.
"""

from collections.abc import Callable

import numpy as np

from data.trajectory import Observation
from environments.counted import CountedTool
from environments.distilled import WorldModel, uniform

# Queries -> for each whether the tool should answer it.
Choose = Callable[[list[str]], list[bool]]


class MixedSearch:
    """A search tool: queries in, observations out, each imagined or real."""

    def __init__(self, tool: CountedTool, world_model: WorldModel, choose: Choose) -> None:
        """Mix a tool and a world model. choose: which queries the tool should answer."""
        self.tool = tool
        self.world_model = world_model
        self.choose = choose

    def __call__(self, queries: list[str]) -> list[Observation]:
        """Return the observation of each query.

        The tool's budget is spent in the order of the queries; when it is, the world model answers
        alone.
        """
        observations = self.world_model(queries)
        chosen = [row for row, is_chosen in enumerate(self.choose(queries)) if is_chosen]
        chosen = chosen[: self.tool.calls_left()]
        answers = self.tool([queries[row] for row in chosen])
        for row, answer in zip(chosen, answers, strict=True):
            observations[row] = answer
        return observations


class Schedule:
    """Chooses a share of the queries, which rises evenly over the steps of a stage."""

    def __init__(self, real_share: float, steps: int) -> None:
        """Begin at step 0. real_share: the mean share over the stage."""
        self.real_share = real_share
        self.steps = steps
        self.step = 0

    def share(self) -> float:
        """Return the share of this step: it rises as far as the mean lets it, between 0 and 1."""
        lowest = max(0.0, 2 * self.real_share - 1)
        highest = min(1.0, 2 * self.real_share)
        progress = (self.step + 0.5) / self.steps
        return lowest + (highest - lowest) * progress

    def __call__(self, queries: list[str]) -> list[bool]:
        """Return which queries the tool should answer; within a step a query keeps its answer."""
        share = self.share()
        return [uniform(f"{self.step} {query}") < share for query in queries]


class Confidence:
    """Chooses the queries of which a world model is less sure than a threshold says."""

    def __init__(self, world_model: WorldModel, threshold: float) -> None:
        """Set the threshold: mean entropy of an observation, in nats a token."""
        self.world_model = world_model
        self.threshold = threshold

    def __call__(self, queries: list[str]) -> list[bool]:
        """Return which queries the tool should answer."""
        return [bool(unsure) for unsure in self.world_model.entropies(queries) > self.threshold]


def entropy_threshold(held_out_entropies: list[float], real_share: float) -> float:
    """Return the entropy above which a share of held-out queries lies."""
    return float(np.quantile(held_out_entropies, 1 - real_share))
