"""A disk that refuses any operation of what is written outside the stages.

Stages: test_stage_files.py; predictions: evaluation/test_predictions.py; caches, indexes and
figures: their own tests.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_lm
from file_operations import watched

import tools
from common.errors import run_guarded
from data.questions import Question
from data.sft_data import SFTData, write_sft_data
from data.trajectory import Codec, Trajectory
from eval import EvalSettings
from evaluation import predictions
from evaluation.predictions import recall_known_facts
from services import teacher
from services.teacher import TaughtRows, TeacherSettings


def write_data(codec: Codec, patch: pytest.MonkeyPatch) -> None:
    """Write the data of SFT."""
    chain = Trajectory([1, 2], [0, 1], [0, 1])
    write_sft_data(Path("out", "nano", "data"), SFTData([chain], [chain], [(chain, chain)]))


def ask_base_model(codec: Codec, patch: pytest.MonkeyPatch) -> None:
    """Keep what a base model knows, and what it said until all of that was there."""

    def recall(base: Any, questions: Any, settings: Any, journal: Any) -> Any:
        answers = journal.answers("k", ["Who?", "When?"], lambda texts: texts, "bar")
        return set(answers), {}

    patch.setattr(predictions, "recall", recall)
    settings = EvalSettings(batch_rows=1)
    path = Path("out", "nano", "known.json")
    recall_known_facts(tiny_lm(codec), [Question("0", "Who?", ["A"])], settings, path, "w", True)


def teach(codec: Codec, patch: pytest.MonkeyPatch) -> None:
    """Write the files of a teacher."""
    silent = SimpleNamespace(report=lambda: "")
    rows = TaughtRows({0: {"messages": []}}, {0: {"messages": []}}, {0: {"chosen": {}}})
    patch.setattr(teacher, "read_question_sets", lambda files, setting: {"a": [1, 2]})
    patch.setattr(teacher, "Chat", lambda *arguments, **options: silent)
    patch.setattr(tools, "open_library", lambda *arguments: silent)
    patch.setattr(teacher, "teach", lambda *arguments: rows)
    settings = TeacherSettings(teacher="t", train_data=["q"], corpus="c", out="out/taught", coa=2)
    teacher.run(settings)


def content() -> dict[str, bytes]:
    """Return all files of the folder `out`."""
    return {str(path): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("write", [write_data, ask_base_model, teach])
def test_each_operation_that_is_refused_is_one_line(
    codec: Codec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Codec, pytest.MonkeyPatch], None],
    number: int,
) -> None:
    """It names the file; with room, the same command comes to the same end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    operations: list[tuple[str, str]] = []
    with watched(lambda operation, path: operations.append((operation, path))):
        write(codec, monkeypatch)
    whole = content()
    assert len(operations) > len(whole)

    for place, (operation, path) in enumerate(operations):
        shutil.rmtree("out")
        left = [place]

        def fail(operation: str, path: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(number, os.strerror(number), path)

        capsys.readouterr()
        status = 0
        with watched(fail):
            try:
                run_guarded(lambda: write(codec, monkeypatch))
            except SystemExit as end:
                status = end.code
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        if operation == "os.mkdir" and status == 0:
            # The folder is there already.
            assert lines == []
        else:
            assert status == 2, (operation, path)
            (line,) = lines
            assert f": {os.strerror(number)}; " in line, (path, line)
        write(codec, monkeypatch)
        assert content() == whole, path
