"""Answers that an evaluation keeps, and when a later one may use them again.

`predictions.jsonl` holds one answer a line with its scores. Until an evaluation is complete its
answers are in `predictions.jsonl.partial`, where --resume finds them. An answer is used again only
where the same weights gave it, with the same tool, under the same settings (`provenance_hash` in
workflows/journal.py), to the same question with the same golden answers (`question_hash`).
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from common import ranks
from common.errors import UserError
from common.files import (
    append_jsonl,
    parse_json,
    read_jsonl,
    sync,
    write_jsonl,
    write_text,
    writing,
)
from data.questions import Question
from model import LM
from workflows.journal import AnswerSettings, Journal, short_hash
from workflows.recall import recall

QuestionSets = Mapping[str, Sequence[Question]]  # name of a question set -> its questions


class ScoredQuestion(TypedDict):
    """What became of one question: all that a comparison of two rows needs."""

    id: str  # of the question
    question: str
    em: float  # this and the other scores: 0.0 to 1.0
    actions: int


class ScoredAnswer(ScoredQuestion):
    """One answer to a question, with its scores."""

    golden_answers: list[str]
    answer: str
    f1: float
    cover: float
    overlap: float
    queries: list[str]
    # 1.0 where a tag was out of place, or the answer was forced; None for a workflow, as the next.
    malformed: float | None
    forced: float | None  # 1.0 where a budget ran out before an answer
    lost: int  # searches that failed, so that the question is asked again with --resume
    text: str  # of the whole trajectory, tags included


class Prediction(ScoredAnswer):
    """One answer of one row, as it stands in predictions.jsonl."""

    row: str
    set: str
    question_hash: str  # of all in the question that an answer or its score depends on
    provenance_hash: str  # of the weights and settings that made the answer
    # What a language model says: 1.0 right, 0.0 wrong, None where its verdict can't be read.
    judge: NotRequired[float | None]


class SetQuestion(NamedTuple):
    """One question of one set."""

    set_name: str
    question: Question


class PredictionKey(NamedTuple):
    """What tells an answer from all others."""

    row: str
    set_name: str
    question_id: str
    question_hash: str | None
    provenance: str | None


def question_hash(question: Question) -> str:
    """Return a hash of all in a question that an answer, or its score, depends on."""
    return short_hash(
        [question.question, question.golden_answers, question.gold_titles, question.gold_ids]
    )


# ---- what the base model knows -------------------------------------------------------------------
def recall_known_facts(
    base: LM,
    questions: Sequence[Question],
    settings: AnswerSettings,
    path: Path,
    provenance: str,
    may_reuse: bool,
) -> set[str]:
    """Return the ids of the facts that the base model knows, of those that questions need.

    They are kept in a file.

    provenance: the base model's `provenance_hash`.
    may_reuse: take them from the file, where they are of this model and these questions.
    """
    questions_hash = short_hash([question_hash(question) for question in questions])
    journal_path = path.with_name(path.name + ".partial")
    journal = Journal(journal_path, provenance, may_reuse, settings.batch_rows)
    known_facts = _read_known_facts(path, provenance, questions_hash) if may_reuse else None
    if known_facts is None:
        known_facts, _ = recall(base, list(questions), settings, journal)
        row = {
            "provenance_hash": provenance,
            "questions_hash": questions_hash,
            "known": sorted(known_facts),
        }
        if ranks.is_first():
            write_text(path, json.dumps(row))
    journal.remove()
    return known_facts


def _read_known_facts(path: Path, provenance: str, questions_hash: str) -> set[str] | None:
    """Return the facts in a file; None where it is of another model or other questions."""
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text())
        if content["provenance_hash"] != provenance or content["questions_hash"] != questions_hash:
            return None
        return set(content["known"])
    except (ValueError, KeyError, TypeError):
        # The base model is asked again where the file is damaged.
        return None


# ---- predictions ---------------------------------------------------------------------------------
class Predictions:
    """The answers of an evaluation, those of earlier ones that hold, and their two files."""

    def __init__(
        self,
        folder: Path,
        provenance: Mapping[str, str],
        resume: bool,
        rows: Collection[str] = (),
        sets: Collection[str] = (),
    ) -> None:
        """Read what earlier evaluations left in a folder.

        provenance: the `provenance_hash` of each row of the table.
        resume: use earlier answers again. Otherwise the questions are asked again.
        rows, sets: those that are asked; empty: all. The answers of others stay.
        Raises UserError with file:line for a line that is no prediction, where it is needed.
        """
        self.path = folder / "predictions.jsonl"
        self.partial_path = folder / "predictions.jsonl.partial"
        self._provenance = provenance
        self._resume = resume
        self._rows = rows
        self._sets = sets
        self._answers: dict[PredictionKey, Prediction] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._take_over(self.path, _read_lines(self.path))
        lines = _read_lines(self.partial_path)
        lines_left = self._take_over(self.partial_path, lines)
        if lines_left != lines:
            # Its last line was cut, and what is written next must not go on after it; or its
            # questions are asked again.
            write_text(self.partial_path, b"".join(lines_left).decode())

    def _take_over(self, path: Path, lines: Sequence[bytes]) -> list[bytes]:
        """Take over the answers of a file that may be used; return the lines that stay in it."""
        if not (self._resume or self._rows or self._sets):
            return []
        kept = []
        for number, line in enumerate(lines, 1):
            # A line that an interruption cut ends otherwise.
            if not line.endswith(b"}\n"):
                continue
            try:
                prediction = _parse_prediction(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                if self._resume or self._rows:
                    raise UserError(
                        f"{path}:{number}: not a prediction of eval.py; "
                        "remove this line, and --resume asks it again"
                    ) from None
                continue
            is_of_others = self._is_of_others(prediction)
            if not self._resume and not is_of_others:
                continue
            kept.append(line)
            # An answer that was given without what a search would have found is asked again.
            if is_of_others or not prediction.get("lost"):
                self._answers[_stored_key(prediction)] = prediction
        return kept

    def _is_of_others(self, prediction: Prediction) -> bool:
        """Whether a prediction is of a row or a set that this evaluation does not ask."""
        if self._rows and prediction["row"] not in self._rows:
            return True
        return bool(self._sets) and prediction["set"] not in self._sets

    def missing(self, row: str, sets: QuestionSets) -> list[SetQuestion]:
        """Return the questions that a row has not answered yet."""
        return [
            SetQuestion(name, question)
            for name, questions in sets.items()
            for question in questions
            if self._key(row, name, question) not in self._answers
        ]

    def answered(self, row: str, sets: QuestionSets) -> dict[str, list[Question]]:
        """Return the questions that a row answered when it was asked for fewer of each set.

        That is the first so many of each set, as many as of any; nothing where it lacks one of
        them, since an evaluation that was interrupted is no sample.
        """
        missing = {(name, question.id) for name, question in self.missing(row, sets)}
        counts = [
            sum((name, question.id) not in missing for question in questions)
            for name, questions in sets.items()
        ]
        most = max(counts, default=0)
        firsts = {name: list(questions[:most]) for name, questions in sets.items()}
        if not most or self.missing(row, firsts):
            return {}
        return firsts

    def batches_to_ask(
        self, row: str, sets: QuestionSets, batch_size: int
    ) -> list[list[SetQuestion]]:
        """Return the questions that a row has not answered yet, so many at a time."""
        missing = self.missing(row, sets)
        return [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]

    def add(self, row: str, batch: Sequence[SetQuestion], answers: Iterable[ScoredAnswer]) -> None:
        """Keep what a row answered to the questions of a batch, here and in the file.

        Of several processes the first writes it.
        """
        predictions = []
        for (set_name, question), answer in zip(batch, answers, strict=True):
            prediction: Prediction = {
                "row": row,
                "set": set_name,
                **answer,
                "question_hash": question_hash(question),
                "provenance_hash": self._provenance[row],
            }
            self._answers[self._key(row, set_name, question)] = prediction
            predictions.append(prediction)
        if ranks.is_first():
            append_jsonl(self.partial_path, predictions)
            sync(self.partial_path)

    def of_row(self, row: str, sets: QuestionSets) -> dict[str, list[Prediction]]:
        """Return the predictions of one row: {set: those of its questions, in order}."""
        return {
            name: [self._answers[self._key(row, name, question)] for question in questions]
            for name, questions in sets.items()
        }

    def finish(self, rows: Mapping[str, Mapping[str, Sequence[Prediction]]]) -> None:
        """Write predictions.jsonl and remove the partial file; of several processes the first does.

        rows: {row: {set: predictions}} of this evaluation. Earlier answers of other rows, sets and
        questions stay where the weights and settings of their row are still the same.
        """
        if not ranks.is_first():
            return
        current = [
            prediction
            for sets in rows.values()
            for predictions in sets.values()
            for prediction in predictions
        ]
        identities = {_identity(prediction) for prediction in current}
        earlier = [
            prediction
            for prediction in self._answers.values()
            if _identity(prediction) not in identities
            and prediction["row"] in self._provenance
            and prediction.get("provenance_hash") == self._provenance[prediction["row"]]
        ]
        write_jsonl(self.path, current + earlier)
        self.partial_path.unlink(missing_ok=True)

    def _key(self, row: str, set_name: str, question: Question) -> PredictionKey:
        provenance = self._provenance[row]
        return PredictionKey(row, set_name, question.id, question_hash(question), provenance)


def _read_lines(path: Path) -> list[bytes]:
    if not path.is_file():
        return []
    return path.read_bytes().splitlines(keepends=True)


def _parse_prediction(line: bytes) -> Prediction:
    prediction = parse_json(line)
    # Files of versions before 0.3.0 have other names for the hashes.
    for old_name, name in (("asked", "question_hash"), ("made", "provenance_hash")):
        if old_name in prediction:
            prediction[name] = prediction.pop(old_name)
    if not {"row", "set", "id", "em", "queries"} <= prediction.keys():
        raise KeyError
    # A field of another type, such as a list, can't be looked up.
    hash(_stored_key(prediction))
    return prediction


def _stored_key(prediction: Prediction) -> PredictionKey:
    return PredictionKey(
        prediction["row"],
        prediction["set"],
        prediction["id"],
        prediction.get("question_hash"),
        prediction.get("provenance_hash"),
    )


def _identity(prediction: Prediction) -> tuple[str, str, str]:
    return prediction["row"], prediction["set"], prediction["id"]


def read_predictions(
    path: Path, rows: Sequence[str], setting: str
) -> dict[str, dict[str, list[Prediction]]]:
    """Return the predictions of some rows from a file: {row: {set: predictions}}.

    setting: the setting that named the file, for messages.
    Raises UserError for a missing file, with file:line for what is no prediction, and for a row
    that the file lacks.
    """
    found: dict[str, dict[str, list[Prediction]]] = {row: {} for row in rows}
    for number, value in read_jsonl(path, "the predictions that eval.py writes", setting):
        needed = {"row", "set", "id", "question", "em"}
        if not isinstance(value, dict) or not needed <= set(value):
            raise UserError(
                f"{path}:{number}: not a prediction of eval.py (row, set, id, question, em); "
                "evaluate this run again"
            )
        prediction: Any = value
        if prediction["row"] in found:
            found[prediction["row"]].setdefault(prediction["set"], []).append(prediction)
    for row, sets in found.items():
        if not sets:
            raise UserError(f"{path} has no row {row!r}; evaluate it first, or name another")
    return found
