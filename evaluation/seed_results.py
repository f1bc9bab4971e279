"""What the run of one seed says of the paper's rows, and the small file that keeps it.

The rows of a seed are written to docs/reproduction/seed0.json as they are evaluated. The file
stays with the project: the page is made from these files, and a row that one holds is not trained
again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import parse_json, refusing_damage, to_json, write_text
from environments.cost_logs import CallCount, count_calls
from evaluation.figures import RowFigures, read_figures, row_from_json, row_to_json
from evaluation.predictions import ScoredQuestion, read_predictions
from evaluation.statistics import SetScores


@dataclass
class SeedResults:
    """What the run of one seed says, by the rows of eval.py's table."""

    seed: str
    answers: dict[str, SetScores]  # row -> question set -> its questions with their scores
    figures: dict[str, RowFigures]
    # What the practice of a row asked the tool; rows that did not practise have none.
    calls: dict[str, CallCount] = field(default_factory=dict)
    # The commit that evaluated a row, "" where it is not known.
    commits: dict[str, str] = field(default_factory=dict)

    def add(self, rows: "SeedResults") -> None:
        """Take over the rows of another evaluation of this seed."""
        self.answers |= rows.answers
        self.figures |= rows.figures
        self.calls |= rows.calls
        self.commits |= rows.commits


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
    missing = [row for row in rows if row not in figures]
    if missing:
        raise UserError(f"{root / 'eval.json'}: no row {missing[0]!r}; evaluate this run again")
    for sets in answers.values():
        if any("actions" not in answer for rows_of_set in sets.values() for answer in rows_of_set):
            raise UserError(
                f"{root / 'predictions.jsonl'}: an older version wrote it; evaluate this run again"
            )
    return SeedResults(
        seed=seed,
        answers={**answers},
        figures={row: figures[row] for row in rows},
        calls={row: count_calls(run, practice[row]) for row in rows if row in practice},
        commits=dict.fromkeys(rows, commit),
    )


# ---- the file ------------------------------------------------------------------------------------
def write_results(results: SeedResults, path: Path) -> None:
    """Write the file of a seed: the questions once, and of each row its figures and its answers.

    Raises UserError where its rows answered different questions.
    """
    asked = {row: _questions(sets) for row, sets in results.answers.items()}
    first_row = next(iter(asked))
    for row, questions in asked.items():
        if questions != asked[first_row]:
            raise UserError(
                f"{path}: {row!r} answered other questions than {first_row!r}; "
                "remove the file and the run of this seed, to have all rows made by one version"
            )
    content = {
        "seed": results.seed,
        "questions": asked[first_row],
        "rows": {row: _row_content(results, row) for row in results.answers},
    }
    write_text(path, to_json(content) + "\n")


def _questions(sets: SetScores) -> dict[str, list[list[str]]]:
    """Return the ids and texts of all questions of a row."""
    return {
        name: [[answer["id"], answer["question"]] for answer in answers]
        for name, answers in sets.items()
    }


def _row_content(results: SeedResults, row: str) -> dict[str, Any]:
    sets = results.answers[row]
    content: dict[str, Any] = {
        "commit": results.commits.get(row, ""),
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
    refusal = f"{path}: not the results of a seed; remove it, and its rows are made again"
    with refusing_damage(refusal):
        content = parse_json(path.read_text(encoding="utf-8"))
        rows = content["rows"]
        return SeedResults(
            seed=content["seed"],
            answers={row: _answers(content["questions"], rows[row]) for row in rows},
            figures={row: row_from_json(rows[row]["figures"]) for row in rows},
            calls={row: CallCount(**rows[row]["calls"]) for row in rows if "calls" in rows[row]},
            commits={row: rows[row]["commit"] for row in rows},
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
