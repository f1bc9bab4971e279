"""What the run of one seed says of the paper's rows, and the small file that keeps it.

A finished seed is written to docs/reproduction/seed0.json, which stays with the project: the page
is made from these files, and a seed that has one is not trained again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import parse_json, refusing_damage, to_json, write_text
from environments.cost_logs import CallCount, count_calls
from evaluation.figures import RowFigures, read_figures, row_from_json, row_to_json
from evaluation.predictions import ScoredQuestion, read_predictions
from evaluation.statistics import SetScores


@dataclass
class SeedResults:
    """What the run of one seed says."""

    seed: str
    commit: str  # of the code that trained and evaluated it, "" where it is not known
    answers: Mapping[str, SetScores]  # row -> question set -> what became of its questions
    figures: Mapping[str, RowFigures]  # row of eval.json
    calls: Mapping[str, CallCount]  # row -> what its practice asked the tool


def read_run(
    seed: str, run: str, commit: str, rows: Sequence[str], practice: Mapping[str, Sequence[str]]
) -> SeedResults:
    """Return what a run says of some rows.

    practice: the rows that practised -> the folders of their stages, one trained from the other.
    Raises UserError for files that can't be read, and for a row that they lack.
    """
    root = Path("out", run)
    answers = read_predictions(root / "predictions.jsonl", rows, "--seeds")
    figures = read_figures(root / "eval.json")
    return SeedResults(
        seed=seed,
        commit=commit,
        answers={**answers},
        figures={row: figures[row] for row in rows},
        calls={row: count_calls(run, stages) for row, stages in practice.items()},
    )


# ---- the file ------------------------------------------------------------------------------------
def write_results(results: SeedResults, path: Path) -> None:
    """Write the file of a seed: the questions once, and of each row its figures and its answers."""
    first_row = next(iter(results.answers.values()))
    content = {
        "seed": results.seed,
        "commit": results.commit,
        "questions": {
            name: [[answer["id"], answer["question"]] for answer in answers]
            for name, answers in first_row.items()
        },
        "rows": {row: _row_content(results, row) for row in results.answers},
    }
    write_text(path, to_json(content) + "\n")


def _row_content(results: SeedResults, row: str) -> dict[str, Any]:
    sets = results.answers[row]
    content: dict[str, Any] = {
        "figures": row_to_json(results.figures[row]),
        "em": {name: [int(answer["em"]) for answer in answers] for name, answers in sets.items()},
        "actions": {
            name: [answer["actions"] for answer in answers] for name, answers in sets.items()
        },
    }
    if row in results.calls:
        content["calls"] = results.calls[row]._asdict()
    return content


def read_results(path: Path) -> SeedResults:
    """Return what the file of a seed holds. Raises UserError for another file."""
    refusal = f"{path}: not the results of a seed; remove it, and the seed is trained again"
    with refusing_damage(refusal):
        content = parse_json(path.read_text(encoding="utf-8"))
        rows = content["rows"]
        return SeedResults(
            seed=content["seed"],
            commit=content["commit"],
            answers={row: _answers(content["questions"], rows[row]) for row in rows},
            figures={row: row_from_json(rows[row]["figures"]) for row in rows},
            calls={row: CallCount(**rows[row]["calls"]) for row in rows if "calls" in rows[row]},
        )


def _answers(
    questions: Mapping[str, Sequence[Sequence[str]]], row: Mapping[str, Any]
) -> dict[str, list[ScoredQuestion]]:
    """Return the answers of a row, each with its question."""
    return {
        name: [
            ScoredQuestion(id=question_id, question=question, em=em, actions=actions)
            for (question_id, question), em, actions in zip(
                asked, row["em"][name], row["actions"][name], strict=True
            )
        ]
        for name, asked in questions.items()
    }
