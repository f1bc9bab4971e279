"""Answers that are kept while more are asked (workflows/journal.py)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import read_rows

from train_sft import SFTSettings, open_journal
from workflows.journal import Journal

QUESTIONS = ["Who?", "When?", "Where?", "Who?", "Why?"]


class Model:
    """Answers questions, until it is interrupted."""

    def __init__(self, calls: int | None = None) -> None:
        """calls: after so many it is interrupted."""
        self.calls_left = calls
        self.asked: list[list[str]] = []

    def __call__(self, questions: list[str]) -> list[str]:
        if self.calls_left == 0:
            raise KeyboardInterrupt
        if self.calls_left is not None:
            self.calls_left -= 1
        self.asked.append(questions)
        return [f"{question} Eva" for question in questions]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "answers.partial"


def ask(path: Path, model: Model, made: str = "w", resume: bool = True, kind: str = "k") -> None:
    """Ask all questions, two at a time, and check the answers."""
    journal = Journal(path, made, resume, batch_rows=2)
    answers = journal.answers(kind, QUESTIONS, model, "bar")
    assert answers == [f"{question} Eva" for question in QUESTIONS]


def interrupt(path: Path) -> None:
    """Leave the answers of one batch."""
    with pytest.raises(KeyboardInterrupt):
        ask(path, Model(calls=1))


def test_an_interruption_costs_one_batch(path: Path) -> None:
    """And nothing is asked twice. The file goes when the result is written."""
    interrupt(path)
    model = Model()
    ask(path, model)
    assert model.asked == [["Where?", "Why?"]]
    assert [row["questions"] for row in read_rows(path)] == [["Who?", "When?"], ["Where?", "Why?"]]
    ask(path, Model(calls=0))
    Journal(path, "w", True, 2).remove()
    assert list(path.parent.iterdir()) == []


def test_what_does_not_hold_is_asked_again(path: Path) -> None:
    """Answers of other weights, of another kind, and all without --resume."""
    for made, resume, kind in (("other", True, "k"), ("w", True, "other"), ("w", False, "k")):
        interrupt(path)
        model = Model()
        ask(path, model, made, resume, kind)
        assert model.asked == [["Who?", "When?"], ["Where?", "Why?"]]
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        b'{"provenance_hash": "w", "kind": "k", "ques',
        b"\xff\n",
        b"3\n",
        b"{}\n",
        b'{"provenance_hash": "w", "kind": "k", "questions": ["a"], "answers": []}\n',
        b'{"provenance_hash": "w", "kind": "k", "questions": ["a"], "answers": [1]}\n',
    ],
)
def test_a_damaged_line_is_asked_again(path: Path, damage: bytes) -> None:
    """In batches of the same members, so that not even a rounding differs.

    Guards: a line that is written after one that was cut.
    """
    ask(path, Model())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage)
    model = Model()
    ask(path, model)
    assert model.asked == [["Where?", "Why?"]]
    assert path.read_bytes() == b"".join(lines)


def test_batches_of_another_size_are_other_answers(path: Path) -> None:
    """They may differ by a rounding."""
    interrupt(path)
    model = Model()
    Journal(path, "w", resume=True, batch_rows=3).answers("k", QUESTIONS, model, "bar")
    assert model.asked == [["Who?", "When?", "Where?"], ["Why?"]]


def test_answers_of_another_training_world(tmp_path: Path) -> None:
    """Guards: pairs whose actions searched in a world that the run no longer has."""
    plan: Any = SimpleNamespace(todo=[], root=tmp_path, data_folder=tmp_path / "data")
    for train_scale, asked in ((4, 2), (4, 0), (2, 2)):
        settings = SFTSettings(resume=True, train_scale=train_scale, batch_rows=2)
        model = Model()
        open_journal(plan, settings).answers("acting", QUESTIONS, model, "bar")
        assert len(model.asked) == asked
