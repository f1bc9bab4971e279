"""The folder of a run that was never trained: logs, calls, costs and an evaluation, made up."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.figures import ActingFigures, RowFigures, SetFigures, row_to_json


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class MadeUpRun:
    """The folder of a run in which each step of RL takes 10 s of rollouts and 5 s of update."""

    def __init__(self, name: str) -> None:
        self.root = Path("out", name)
        self.stages: dict[str, Any] = {}
        self.scores: dict[str, list[float]] = {}  # row of eval.json -> EM of its questions
        self.search_known: dict[str, float] = {}  # row -> share of the known facts searched for

    def add_world_model(self, folder: str, learned: str, calls: int) -> None:
        """Add one that learned from some queries, a letter each, and asked for d in addition.

        calls: how many calls of the tool were made for it.
        """
        cost = {
            "calls": calls,
            "tokens": 10 * len(learned),
            "seconds_of_calls": 1.0,
            "seconds_of_training": 2.0,
            "held_out": [{"query": "d"}],
        }
        write_rows(self.root / folder / "cost.json", [cost])
        rows = [{"query": query, "observation": "A film."} for query in learned]
        write_rows(self.root / folder / "examples.jsonl", rows)
        self.record(folder, {"world_model_epochs": 2})

    def add_stage(
        self,
        folder: str,
        stage: str,
        start: str,
        environment: str,
        ems: list[float | None],
        calls: Sequence[tuple[int, str, int]] = (),
        world_model: str = "",
    ) -> None:
        """Add a stage of RL. ems: after each step; calls: (step, query, raw calls)."""
        log = []
        for step, em in enumerate(ems):
            row = {"step": step, "seconds_rollout": 10.0, "seconds_update": 5.0}
            log.append(row if em is None else row | {"eval_em": em})
        write_rows(self.root / folder / "log.jsonl", log)
        if calls:
            rows = [
                {"step": step, "query": query, "raw_calls": raw_calls}
                for step, query, raw_calls in calls
            ]
            write_rows(self.root / folder / "calls.jsonl", rows)
        environments = {"rl1_environment": "real", "rl2_environment": "real"}
        environments["mixed_by"] = "schedule"
        environments[f"{stage}_environment"] = environment
        self.record(
            folder, {"stage": stage, "start": start, "world_model": world_model, **environments}
        )

    def record(self, folder: str, settings: dict[str, Any]) -> None:
        """Remember a stage and the settings that it was trained with."""
        self.stages[folder] = {"given": {}, "settings": settings, "settings_class": "RLSettings"}

    def write(self) -> None:
        """Write what the run remembers, and its evaluation by self.scores."""
        record = {"given": {}, "stages": self.stages}
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "settings.json").write_text(json.dumps(record))
        means = SetFigures(em=0, f1=0, cover=0, overlap=0, malformed=0, forced=0, actions=0)
        rows = {}
        for row in self.scores:
            acting = ActingFigures(self.search_known.get(row), None, None, None, None)
            figures = RowFigures({"single": means}, means, acting, 0, 0, by_actions={})
            rows[row] = row_to_json(figures)
        (self.root / "eval.json").write_text(json.dumps({"rows": rows}))
        predictions = [
            {"row": row, "set": "single", "id": str(number), "question": "Who?", "em": score}
            for row, scores in self.scores.items()
            for number, score in enumerate(scores)
        ]
        write_rows(self.root / "predictions.jsonl", predictions)
