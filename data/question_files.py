"""Question files of either form: FlashRAG's jsonl and verl's parquet."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from data import verl
from data.flashrag import name_sets, read_questions
from data.questions import Question


def read_question_sets(paths: Sequence[str | Path], setting: str) -> dict[str, list[Question]]:
    """Return the questions of each set in some files, by the set's name, in order.

    A jsonl file is one set, called like the file. A parquet file may hold several, which its rows
    name.

    setting: the setting that gave the paths, for the message.
    Raises UserError for a malformed file, and for two files with a set of one name.
    """
    question_sets: dict[str, list[Question]] = {}
    path_of_set: dict[str, str | Path] = {}
    for file_name, path in name_sets(paths, setting).items():
        if verl.is_parquet(path):
            file_sets = verl.read_question_sets(path, file_name, setting)
        else:
            file_sets = {file_name: read_questions(path, file_name)}
        for set_name, questions in file_sets.items():
            if set_name in question_sets:
                raise UserError(
                    f"{setting}: {path_of_set[set_name]} and {path} both hold the set "
                    f"{set_name!r}; give one of them"
                )
            question_sets[set_name] = questions
            path_of_set[set_name] = path
    return question_sets
