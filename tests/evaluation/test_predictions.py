"""Answers that an evaluation keeps: which are used again, which are asked again."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import read_rows, tiny_lm
from file_operations import watched

from common.errors import DiskError, UserError
from data.questions import Question
from eval import EvalSettings
from evaluation import predictions as predictions_module
from evaluation.predictions import (
    Predictions,
    question_hash,
    read_predictions,
    recall_known_facts,
)
from model import LM
from workflows.journal import provenance_hash


def question_of(question_id: Any, golden: str = "x") -> Any:
    return Question(question_id, f"{question_id}?", [golden])


def sets_of(*names: Any, count: int = 3) -> dict[Any, Any]:
    """Return question sets whose questions are called after them: a0, a1, .."""
    return {name: [question_of(f"{name}{number}") for number in range(count)] for name in names}


class Answerer:
    """It answers what is missing of a row, and keeps the ids of what it was asked."""

    def __init__(self, lost: Any = ()) -> None:
        self.asked_ids = []
        self.lost = lost

    def answer(self, predictions: Any, row: Any, sets: Any, batch_size: int = 9) -> Any:
        for batch in predictions.batches_to_ask(row, sets, batch_size):
            results = []
            for _, question in batch:
                self.asked_ids.append(question.id)
                result = {
                    "id": question.id,
                    "question": question.question,
                    "em": 1.0,
                    "queries": [],
                    "lost": int(question.id in self.lost),
                }
                results.append(result)
            predictions.add(row, batch, results)
        return predictions.of_row(row, sets)


# ---- interrupted evaluations ---------------------------------------------------------------------
def test_a_line_that_was_cut_is_asked_again(tmp_path: Path) -> None:
    """What is written next must not go on after it."""
    answerer = Answerer()
    sets = sets_of("a", "b")
    first = Predictions(tmp_path, {"ReAct": "w1"}, resume=False)
    answerer.answer(first, "ReAct", sets, batch_size=2)
    first.partial_path.write_text(first.partial_path.read_text()[:-20])
    for _ in range(2):
        resumed = Predictions(tmp_path, {"ReAct": "w1"}, resume=True)
        found = answerer.answer(resumed, "ReAct", sets, batch_size=2)
    assert answerer.asked_ids == ["a0", "a1", "a2", "b0", "b1", "b2", "b2"]
    assert [prediction["id"] for prediction in found["b"]] == ["b0", "b1", "b2"]


def test_a_loss_of_power_leaves_nothing_that_stops_it(tmp_path: Path) -> None:
    """NUL bytes after the last answers: they go, and the answers stay."""
    answerer = Answerer()
    sets = sets_of("a", "b")
    first = Predictions(tmp_path, {"ReAct": "w1"}, resume=False)
    answerer.answer(first, "ReAct", {"a": sets["a"]})
    with open(first.partial_path, "ab") as file:
        file.write(bytes(500))
    for _ in range(2):
        resumed = Predictions(tmp_path, {"ReAct": "w1"}, resume=True)
        answerer.answer(resumed, "ReAct", sets)
    assert answerer.asked_ids == ["a0", "a1", "a2", "b0", "b1", "b2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_evaluation_that_ends_at_each_file_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """By a kill or a full disk: --resume asks again what was not in a file yet, and no more.

    Guards: a kill while predictions.jsonl was written, into a file of the name of the answers so
    far, so that all were asked again.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    Path("out").mkdir()
    sets = sets_of("a", "b")

    def evaluate(name: str) -> list[str]:
        answerer = Answerer()
        predictions = Predictions(Path("out", name), {"ReAct": "w"}, resume=True)
        found = answerer.answer(predictions, "ReAct", sets, batch_size=2)
        predictions.finish({"ReAct": found})
        return answerer.asked_ids

    operations: list[tuple[str, str]] = []
    with watched(lambda operation, path: operations.append((operation, path))):
        assert len(evaluate("whole")) == 6
    expected = Path("out", "whole", "predictions.jsonl").read_bytes()
    assert len(operations) >= 6
    for place, operation in enumerate(operations):
        left = [place]

        def end(operation: str, path: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise error

        with watched(end):
            try:
                evaluate(str(place))
                # A folder that is there already need not be made.
                assert operation[0] == "os.mkdir"
                continue
            except (KeyboardInterrupt, DiskError, OSError):
                pass
        journal = Path("out", str(place), "predictions.jsonl.partial")
        kept = len(read_rows(journal)) if journal.is_file() else 0
        assert len(evaluate(str(place))) == 6 - kept, operation
        assert Path("out", str(place), "predictions.jsonl").read_bytes() == expected
        assert [path.name for path in Path("out", str(place)).iterdir()] == ["predictions.jsonl"]


@pytest.mark.parametrize("weights, lines_left", [("w1", 6), ("w2", 3)])
def test_other_sets_stay_where_the_same_weights_gave_them(
    tmp_path: Path, weights: str, lines_left: int
) -> None:
    """An evaluation on fewer sets keeps what --resume found of the others."""
    sets = sets_of("a", "b")
    first = Predictions(tmp_path, {"ReAct": "w1"}, resume=False)
    first.finish({"ReAct": Answerer().answer(first, "ReAct", sets)})
    second = Predictions(tmp_path, {"ReAct": weights}, resume=True)
    second.finish({"ReAct": Answerer().answer(second, "ReAct", {"a": sets["a"]})})
    assert len(read_rows(tmp_path / "predictions.jsonl")) == lines_left
    assert not second.partial_path.exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"row": }\n',
        '{"row": "A"}\n',
        "[1}\n",
        '{"row": "A", "set": "a", "id": "1", "queries": []}\n',
        '{"row": "A", "set": "a", "id": ["1"], "em": 1.0, "queries": []}\n',
    ],
)
def test_damaged_predictions(tmp_path: Path, line: str) -> None:
    """One line names the file and the line; without --resume nothing of it is read."""
    whole = {"row": "A", "set": "a", "id": "0", "em": 1.0, "queries": []}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(whole) + "\n" + line)
    with pytest.raises(
        UserError, match=r"predictions\.jsonl:2: not a prediction.*remove this line"
    ):
        Predictions(tmp_path, {}, resume=True)
    Predictions(tmp_path, {}, resume=False)


# ---- which answers are asked again ---------------------------------------------------------------
@pytest.fixture
def evaluate(tmp_path: Path) -> Any:
    """Return a function that evaluates rows on three questions; "1" is lost the first time.

    It returns the ids that were asked, and the number of lines in the file.
    """

    def run(
        golden: str = "x",
        resume: bool = True,
        rows: Any = ("A", "B"),
        chosen: Any = (),
        lost: Any = (),
    ) -> Any:
        sets = {"a": [question_of("0"), question_of("1"), question_of("2", golden)]}
        answerer = Answerer(lost)
        predictions = Predictions(tmp_path, {"A": "w", "B": "w"}, resume, chosen)
        predictions.finish({row: answerer.answer(predictions, row, sets) for row in rows})
        return answerer.asked_ids, len(read_rows(tmp_path / "predictions.jsonl"))

    asked_ids, lines = run(resume=False, lost=["1"])
    assert asked_ids == ["0", "1", "2", "0", "1", "2"]
    assert lines == 6
    return run


def test_answers_after_a_failed_search_are_asked_again(evaluate: Any) -> None:
    assert evaluate() == (["1", "1"], 6)


def test_questions_whose_golden_answers_changed_are_asked_again(evaluate: Any) -> None:
    evaluate()
    assert evaluate("y") == (["2", "2"], 6)


def test_chosen_rows_are_asked_again(evaluate: Any) -> None:
    """The records of other rows stay, also one that a failed search spoilt, until it is asked."""
    assert evaluate(resume=False, rows=["A"], chosen=["A"]) == (["0", "1", "2"], 6)
    assert evaluate() == (["1"], 6)


def test_without_resume_and_rows_all_is_asked_again(evaluate: Any) -> None:
    assert evaluate(resume=False, rows=["A"]) == (["0", "1", "2"], 3)


def test_answers_with_the_old_names_of_their_hashes_stay(tmp_path: Path) -> None:
    """Guards: a new name in the file, by which hours of kept answers were lost."""
    answerer = Answerer()
    sets = sets_of("a", count=1)

    def evaluate_again() -> None:
        predictions = Predictions(tmp_path, {"A": "w"}, resume=True, sets=sets)
        predictions.finish({"A": answerer.answer(predictions, "A", sets)})

    evaluate_again()
    path = tmp_path / "predictions.jsonl"
    text = path.read_text()
    path.write_text(text.replace("question_hash", "asked").replace("provenance_hash", "made"))
    evaluate_again()
    assert answerer.asked_ids == ["a0"]
    assert path.read_text() == text


def test_the_records_of_other_sets_stay(tmp_path: Path) -> None:
    """Guards: `--data=b.jsonl` removed the hours of `--data=a.jsonl`."""
    answerer = Answerer()

    def evaluate_set(name: str) -> list[Any]:
        sets = sets_of(name, count=1)
        predictions = Predictions(tmp_path, {"A": "w"}, resume=False, sets=sets)
        predictions.finish({"A": answerer.answer(predictions, "A", sets)})
        return [row["set"] for row in read_rows(tmp_path / "predictions.jsonl")]

    assert evaluate_set("a") == ["a"]
    assert evaluate_set("b") == ["b", "a"]
    assert evaluate_set("b") == ["b", "a"]
    assert answerer.asked_ids == ["a0", "b0", "b0"]
    (tmp_path / "predictions.jsonl").write_bytes(b'{"row": "\xff"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl:1: not a prediction"):
        Predictions(tmp_path, {"A": "w"}, resume=True)
    assert evaluate_set("a") == ["a"]


# ---- what an answer depends on -------------------------------------------------------------------
@pytest.fixture
def folder(lm: LM, tmp_path: Path) -> str:
    lm.save(tmp_path / "a")
    return tmp_path / "a"


def test_other_settings_make_another_key(folder: Path) -> None:
    """The run's name does not, nor what is no setting of an answer."""
    key = provenance_hash(folder, EvalSettings())
    assert key == provenance_hash(folder, EvalSettings(run="other", judge="x", resume=True))
    changed = [
        EvalSettings(top_k=5),
        EvalSettings(max_observation=9),
        EvalSettings(seed=1),
        EvalSettings(corpus="leads"),
        EvalSettings(max_actions=1),
        EvalSettings(bits=4),
    ]
    assert len({key, *(provenance_hash(folder, settings) for settings in changed)}) == 7


def test_other_passages_make_another_key(folder: Path, tmp_path: Path) -> None:
    """At the same path; also a large file that lost its beginning."""
    corpus = tmp_path / "corpus.jsonl"
    keys = set()
    spaces = " " * (1 << 24)
    for text in ("one", "two", "a first line" + spaces, spaces):
        corpus.write_text(text)
        keys.add(provenance_hash(folder, EvalSettings(corpus=str(corpus))))
    assert len(keys) == 4


def test_other_weights_make_another_key(lm: LM, folder: Path, tmp_path: Path) -> None:
    tiny_lm(lm.codec, seed=5).save(tmp_path / "b")
    key = provenance_hash(folder, EvalSettings())
    assert provenance_hash(tmp_path / "b", EvalSettings()) != key


def test_a_question_is_another_where_its_score_would_be() -> None:
    key = question_hash(question_of("0"))
    assert key == question_hash(Question("other", "0?", ["x"], plan="A plan."))
    changed = [
        Question("0", "1?", ["x"]),
        Question("0", "0?", ["y"]),
        Question("0", "0?", ["x"], gold_titles=["Eva Moss"]),
        Question("0", "0?", ["x"], gold_ids=["7"]),
    ]
    assert len({key, *map(question_hash, changed)}) == 5


# ---- what the base model knows -------------------------------------------------------------------
def test_known_facts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used again for the same model and questions; a damaged file is made again."""
    recalled = []

    def recall(base: Any, questions: Any, settings: Any, journal: Any) -> Any:
        recalled.append([question.id for question in questions])
        return {"b", "a"}, {}

    monkeypatch.setattr(predictions_module, "recall", recall)
    path = tmp_path / "known.json"
    base: Any = None

    def recall_again(provenance: str = "w", count: int = 1, may_reuse: bool = True) -> Any:
        questions = sets_of("q", count=count)["q"]
        return recall_known_facts(base, questions, EvalSettings(), path, provenance, may_reuse)

    assert recall_again() == {"a", "b"}
    assert recall_again() == {"a", "b"}
    assert len(recalled) == 1
    recall_again(may_reuse=False)
    assert len(recalled) == 2
    recall_again(provenance="other weights")
    assert len(recalled) == 3
    recall_again(provenance="other weights", count=2)
    assert recalled[3:] == [["q0", "q1"]]
    path.write_text('{"provenance_hash": "other weights"')
    assert recall_again(provenance="other weights", count=2) == {"a", "b"}
    assert len(recalled) == 5


# ---- predictions of several runs -----------------------------------------------------------------
def test_predictions_are_read_by_row_and_set(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [
        {"row": row, "set": name, "id": "0", "question": "0?", "em": 1.0}
        for row in ("A", "B", "C")
        for name in ("a", "b")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_predictions(path, ["A", "C"], "--runs")
    assert found == {"A": {"a": [rows[0]], "b": [rows[1]]}, "C": {"a": [rows[4]], "b": [rows[5]]}}
    with pytest.raises(UserError, match="has no row 'D'; evaluate it first, or name another"):
        read_predictions(path, ["A", "D"], "--runs")
    path.write_text('{"row": "A"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl:1: not a prediction of eval.py"):
        read_predictions(path, ["A"], "--runs")
