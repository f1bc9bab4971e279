"""The real tool of a stage of RL: it is asked once for each query, and every call is counted.

A *raw* call is a rollout's search: five rollouts that ask the same count five. A *distinct* one is
asked of the tool itself; its answer is kept, and given again for nothing. So a cache stands before
the tool, and what real practice costs with a cache is the number of distinct calls.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from data.trajectory import Observation, Provenance
from tools import Tool


class CountedTool:
    """A search tool with a memory and two counts."""

    def __init__(self, tool: Tool, budget: int = 0) -> None:
        """Begin with nothing asked. budget: raw calls that may be made; 0: any number."""
        self.tool = tool
        self.budget = budget
        self.step = 0  # the step of RL that asks now
        self.raw_calls = 0
        self.answers: dict[str, Observation] = {}  # query -> what the tool said
        self._new_rows: list[dict[str, Any]] = []

    @property
    def distinct_calls(self) -> int:
        """Queries that the tool itself was asked for."""
        return len(self.answers)

    def calls_left(self) -> int | None:
        """Return how many raw calls the budget still allows, None where there is no budget."""
        if not self.budget:
            return None
        # A resumed stage may have made more than a budget that was lowered since.
        return max(0, self.budget - self.raw_calls)

    def __call__(self, queries: list[str]) -> list[Observation]:
        """Return the observation of each query; each counts as a raw call."""
        left = self.calls_left()
        assert left is None or len(queries) <= left, "who asks must keep to calls_left"
        new = list(dict.fromkeys(query for query in queries if query not in self.answers))
        found = dict(zip(new, self.tool(new), strict=True))
        self.raw_calls += len(queries)
        for query, count in Counter(queries).items():
            self._note_call(query, count, found.get(query))
        # A failed search is no answer: the tool is asked again.
        self.answers.update(
            {query: observation for query, observation in found.items() if not observation.is_lost}
        )
        return [found.get(query) or self.answers[query] for query in queries]

    def _note_call(self, query: str, count: int, new_answer: Observation | None) -> None:
        row: dict[str, Any] = {"step": self.step, "query": query, "raw_calls": count}
        if new_answer is not None:
            row["text"] = new_answer.text
            row["provenance"] = new_answer.provenance
        self._new_rows.append(row)

    def take_rows(self) -> list[dict[str, Any]]:
        """Return the lines of calls.jsonl that were not taken yet.

        A line is {"step", "query", "raw_calls"}; where the tool itself was asked, it also has
        "text" and "provenance", what the tool said.
        """
        rows = self._new_rows
        self._new_rows = []
        return rows

    def restore(self, rows: Sequence[dict[str, Any]]) -> None:
        """Go on from the lines of calls.jsonl that an interrupted stage left."""
        for row in rows:
            self.raw_calls += row["raw_calls"]
            if "text" in row:
                observation = Observation(row["text"], Provenance(row["provenance"]))
                if not observation.is_lost:
                    self.answers[row["query"]] = observation
