"""Fetch FlashRAG's copy of a question set, one file a split.

    python -m data.get hotpotqa [FOLDER]        # hotpotqa_train.jsonl, hotpotqa_dev.jsonl ..

It takes the package `datasets`. Where the set marks its supporting facts, each question gets the
titles of its gold passages, so that the teacher knows what to search for.
"""

import sys
from pathlib import Path
from typing import Any

from common.errors import UserError, run_guarded
from common.files import write_jsonl
from common.terminal import asks_for_help
from data.flashrag import gold_titles

USAGE = "usage: python -m data.get SET [FOLDER]"
# What FlashRAG calls the sets.
FLASHRAG_NAMES = {
    "hotpotqa": "hotpotqa",
    "nq": "nq",
    "triviaqa": "triviaqa",
    "popqa": "popqa",
    "2wiki": "2wikimultihopqa",
    "musique": "musique",
    "bamboogle": "bamboogle",
}


def get(name: str, folder: str | Path = ".") -> None:
    """Write the question files of one set into a folder.

    Raises UserError for an unknown set, and where it can't be fetched.
    """
    if name not in FLASHRAG_NAMES:
        raise UserError(f"data.get: {name!r} is not one of {', '.join(FLASHRAG_NAMES)}")
    for split, rows in _fetch(name).items():
        path = Path(folder, f"{name}_{split}.jsonl")
        questions = [_question_row(row, name) for row in rows]
        write_jsonl(path, questions)
        print(f"{path}: {len(questions):,} questions")


def _fetch(name: str) -> Any:
    """Return the set's splits by name, each an iterable of rows."""
    try:
        # Imported here: nothing else needs the package, and it may be missing.
        from datasets import load_dataset  # pyrefly: ignore[missing-import]
    except ImportError:
        raise UserError(
            "data.get: it needs the package datasets; pip install datasets, "
            "or give question files of your own"
        ) from None
    try:
        return load_dataset("RUC-NLPIR/FlashRAG_datasets", FLASHRAG_NAMES[name])
    except Exception as error:
        # Each way of being offline raises an error of its own.
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"data.get: {name} can't be fetched ({type(error).__name__}: {reason}); "
            "try again online, or give question files of your own"
        ) from None


def _question_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    metadata = dict(row.get("metadata") or {})
    metadata["gold_titles"] = gold_titles(metadata, f"data.get: {name}, {row['id']}")
    return {
        "id": row["id"],
        "question": row["question"],
        "golden_answers": row["golden_answers"],
        "metadata": metadata,
    }


def main(arguments: list[str]) -> None:
    """Run the command. Raises UserError for bad arguments."""
    if asks_for_help(arguments):
        print(__doc__)
        return
    if not 1 <= len(arguments) <= 2:
        raise UserError(USAGE)
    get(*arguments)


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
