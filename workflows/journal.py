"""Answers that are kept while more are asked, so that a kill costs those of one batch."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from common import ranks
from common.files import append_jsonl, hash_file_ends, parse_json, sync, writing
from common.progress import progress_bar
from common.settings import ModelSettings, RolloutSettings, TaskRunSettings


@dataclass(kw_only=True)
class AnswerSettings(TaskRunSettings, ModelSettings, RolloutSettings):
    """The settings that an answer may depend on."""


def short_hash(value: Any) -> str:
    """Return a hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def provenance_hash(folder: Path, settings: AnswerSettings) -> str:
    """Return a hash of the weights in a folder, of the passages, and of the settings.

    An answer depends on these, beside its question and its row.
    """
    weight_files = sorted(folder.glob("*.safetensors")) or [folder]
    weights = [hash_file_ends([path]) if path.is_file() else str(path) for path in weight_files]
    corpus_file = Path(settings.corpus)
    corpus: Any = settings.corpus
    if corpus_file.is_file():
        corpus = [hash_file_ends([corpus_file]), corpus_file.stat().st_size]
    values = [
        settings.seed,
        corpus,
        settings.language,
        settings.cache,
        settings.top_k,
        settings.max_actions,
        settings.max_len,
        settings.max_answer,
        settings.max_thought,
        settings.max_observation,
        settings.dtype,
        settings.bits,
    ]
    return short_hash([weights, values])


class Line(TypedDict):
    """A line of a journal: a batch, which is there whole or not at all.

    So those that follow have the same members as in one go, and not even a rounding differs.
    """

    provenance_hash: str  # of all that the answers depend on
    kind: str  # of the questions: one text may be asked in several ways
    questions: list[str]
    answers: list[str]


class Journal:
    """The answers of a computation that takes minutes, in a file until its result is written."""

    def __init__(self, path: Path, provenance: Any, resume: bool, batch_rows: int) -> None:
        """Read what an interrupted command has left.

        provenance: all that the answers depend on; those of another one are asked again.
        resume: use the answers that are there.
        batch_rows: questions that one process answers at once.
        """
        self.path = path
        self._at_once = batch_rows * ranks.count()
        self._provenance_hash = short_hash([provenance, self._at_once])
        self._answers: dict[tuple[str, str], str] = ranks.of_first(lambda: self._read(resume))

    def answers(
        self,
        kind: str,
        questions: Sequence[str],
        ask: Callable[[list[str]], list[str]],
        description: str,
    ) -> list[str]:
        """Return the answers to some questions; only those that are not there yet are asked.

        ask: questions -> their answers, together in all processes.
        """
        missing = [question for question in questions if (kind, question) not in self._answers]
        missing = list(dict.fromkeys(missing))
        with progress_bar(len(missing), description, "question") as bar:
            for start in range(0, len(missing), self._at_once):
                batch = missing[start : start + self._at_once]
                self._keep(kind, batch, ask(batch))
                bar.update(len(batch))
        return [self._answers[kind, question] for question in questions]

    def remove(self) -> None:
        """Remove the file, when the result is written; of several processes the first does."""
        if ranks.is_first():
            self.path.unlink(missing_ok=True)

    def _keep(self, kind: str, questions: list[str], answers: list[str]) -> None:
        for question, answer in zip(questions, answers, strict=True):
            self._answers[kind, question] = answer
        line = Line(
            provenance_hash=self._provenance_hash, kind=kind, questions=questions, answers=answers
        )
        if ranks.is_first():
            append_jsonl(self.path, [line])
            sync(self.path)

    def _read(self, resume: bool) -> dict[tuple[str, str], str]:
        """Return the answers up to the first line that does not hold; the file keeps these."""
        answers: dict[tuple[str, str], str] = {}
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        size = 0  # of the lines that hold
        for line in lines if resume else []:
            row = _parse(line)
            if row is None or row["provenance_hash"] != self._provenance_hash:
                break
            size += len(line)
            for question, answer in zip(row["questions"], row["answers"], strict=True):
                answers[row["kind"], question] = answer
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if lines:
                # Cut off where they end: what is written next must not go on after half a line.
                os.truncate(self.path, size)
        return answers


def _parse(line: bytes) -> Line | None:
    """Return a line, None for one that an interruption cut, or that is damaged."""
    if not line.endswith(b"}\n"):
        return None
    try:
        row = parse_json(line)
        texts = [row["provenance_hash"], row["kind"], *row["questions"], *row["answers"]]
        is_whole = len(row["questions"]) == len(row["answers"])
    except (ValueError, KeyError, TypeError):
        return None
    return row if is_whole and all(isinstance(text, str) for text in texts) else None
