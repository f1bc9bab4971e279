"""Stand-ins for the two that answer searches: the real tool, and a world model."""

from collections.abc import Sequence

import numpy as np

from data.trajectory import Observation, Provenance


class RecordedTool:
    """A search tool that keeps what it was asked, a batch after the other."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.lost: dict[str, Provenance] = {}  # queries whose search fails, and how

    @property
    def asked(self) -> list[str]:
        """All queries, in order."""
        return [query for batch in self.batches for query in batch]

    def __call__(self, queries: list[str]) -> list[Observation]:
        self.batches.append(list(queries))
        observations = []
        for query in queries:
            if query in self.lost:
                observations.append(Observation("The search failed.", self.lost[query]))
            else:
                observations.append(Observation(f"{query} 1: It is real."))
        return observations


class RecordedWorldModel:
    """A world model that is as unsure as a test says."""

    def __init__(self, entropy_of_query: dict[str, float] | None = None) -> None:
        self.entropy_of_query = entropy_of_query or {}
        self.batches: list[list[str]] = []

    def __call__(self, queries: list[str]) -> list[Observation]:
        self.batches.append(list(queries))
        return [
            Observation(f"{query} 1: It is imagined.", Provenance.IMAGINED) for query in queries
        ]

    def entropies(self, queries: Sequence[str]) -> np.ndarray:
        return np.array([self.entropy_of_query[query] for query in queries])


def provenances(observations: Sequence[Observation]) -> str:
    """Return a letter for each observation: r for real, i for imagined, f for failed, .."""
    return "".join(observation.provenance[0] for observation in observations)
