"""A line of rollouts.jsonl: a trajectory with all that is needed to show it to a person."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class TrajectoryRow:
    """One trajectory that a stage kept; the last four lists have one entry a token."""

    step: int | None = None  # of RL; None in SFT, where the line has no step
    question: str
    golden_answers: list[str]
    reward: float
    text: str  # of the whole trajectory, tags included
    ids: list[int]
    role: list[int]  # a Role each
    mask: list[float]  # 1: the policy's own
    tokens: list[str]  # the text of each

    def to_json(self) -> dict[str, Any]:
        """Return the row as it stands in the file, its keys in the order of the fields."""
        values = dict(vars(self))
        if self.step is None:
            del values["step"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrajectoryRow":
        """Return the row of a line. Raises KeyError for a field that is missing."""
        return cls(
            step=values.get("step"),
            question=values["question"],
            golden_answers=values["golden_answers"],
            reward=values["reward"],
            text=values["text"],
            ids=values["ids"],
            role=values["role"],
            mask=values["mask"],
            tokens=values["tokens"],
        )
