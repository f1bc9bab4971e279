"""verl's question files, in and out: parquet, as AutoCoA, Search-R1, ZeroSearch, ReSearch have it.

Of a row these columns matter; all others are left alone:

    id, _id                      where one is there; else a row is called by its number
    question                     where it is there; else the question is the end of the prompt
    prompt                       chat turns [{"role", "content"} ..], or the question as a text
    reward_model.ground_truth    a text, a list of texts, or {"target": a text or a list}
    source_file, data_source     which set the row belongs to; with data_source extra_info.split
    metadata                     FlashRAG's: gold_titles, gold_ids, supporting_facts

It takes the package pyarrow.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import sync, writing
from common.terminal import printable
from data.flashrag import SPLITS, flashrag_row, parse_question
from data.instructions import authors_turn, question_at_end
from data.passages import on_one_line
from data.questions import Question

SUFFIX = ".parquet"
EXPECTED = "verl's questions: prompt, reward_model.ground_truth"
# A nested name stands for all that begins with it; one that a file lacks is passed over.
COLUMNS = [
    "id",
    "_id",
    "question",
    "prompt",
    "reward_model.ground_truth",
    "source_file",
    "data_source",
    "extra_info.split",
    "metadata.gold_titles",
    "metadata.gold_ids",
    "metadata.supporting_facts",
]
# Between several answers in one text, to the authors' reward.
ANSWER_SEPARATOR = "<ans_split>"
# No two questions begin with so many equal letters, but two prompts do.
LONGEST_SHARED_BEGINNING = 100


def is_parquet(path: str | Path) -> bool:
    """Whether a file is called as parquet files are."""
    return Path(path).suffix.lower() == SUFFIX


# ---- in ------------------------------------------------------------------------------------------
def read_question_sets(path: str | Path, file_name: str, setting: str) -> dict[str, list[Question]]:
    """Read a parquet file; returns the questions of each set in it, by the set's name.

    A row that is there twice is read once.

    file_name: what a set is called where the rows do not say.
    setting: the setting that named the file, for the message.
    Raises UserError with the file and the row, counted from 1, for a malformed one.
    """
    rows = _read_rows(path, setting)
    source_files = _name_source_files(rows, path)
    sets: dict[str, dict[str, Question]] = {}
    repeated = 0
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        set_name = _set_name(row, file_name, source_files)
        question = parse_question(_flashrag_row(row, number, where), set_name, where)
        first = sets.setdefault(set_name, {}).setdefault(question.id, question)
        if first is question:
            continue
        # AutoCoA's own test file holds a question twice.
        repeated += 1
        if (first.question, first.golden_answers) != (question.question, question.golden_answers):
            raise UserError(
                f"{where}: the id of {question.id!r} is that of another question too, "
                f"{first.where}; each needs an id of its own"
            )
    if "question" not in rows[0]:
        texts = {question.question for members in sets.values() for question in members.values()}
        _refuse_unknown_instructions(path, texts)
    if repeated:
        print(f"{path}: rows that are there twice are read once: {repeated}")
    return {name: list(questions.values()) for name, questions in sets.items()}


def _read_rows(path: str | Path, setting: str) -> list[dict[str, Any]]:
    """Return the rows of a file, with the columns that matter. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{setting}: no such file: {path}; expected {EXPECTED}")
    pyarrow = _import_pyarrow(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        rows = file.read(columns=COLUMNS).to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: not a parquet file, or a damaged one ({reason}); copy it again"
        ) from None
    for choices in (("prompt", "question"), ("reward_model",)):
        if not set(choices) & set(names):
            raise UserError(
                f"{path}: there is no column {' or '.join(choices)}; expected {EXPECTED}"
            )
    if not rows:
        raise UserError(f"{path}: empty; expected {EXPECTED}")
    return rows


def _import_pyarrow(path: str | Path) -> Any:
    """Return the package, with its part for parquet. Raises UserError where it is missing."""
    try:
        # Imported here, since all other files are read without it.
        import pyarrow.parquet  # pyrefly: ignore[missing-import]
    except ImportError:
        raise UserError(
            f"{path}: parquet files need the package pyarrow; pip install pyarrow"
        ) from None
    return pyarrow


def _name_source_files(rows: Sequence[Mapping[str, Any]], where: str | Path) -> dict[str, str]:
    """Return the name of the set of each file that rows were made of, by the file's path.

    It is named as a file of its own would be (`name_sets` in data/flashrag.py).
    Raises UserError where two of them have one name.
    """
    found = [row.get("source_file") for row in rows]
    paths = {path: Path(path) for path in found if isinstance(path, str) and Path(path).stem}
    stems = [path.stem for path in paths.values()]
    names: dict[str, str] = {}
    for text, path in paths.items():
        is_told_by_folder = path.stem in SPLITS or stems.count(path.stem) > 1
        parts = [path.parent.name, path.stem] if is_told_by_folder else [path.stem]
        name = "_".join(filter(None, parts))
        if name in names.values():
            raise UserError(
                f"{where}: source_file names {text!r} and another file, which are both the set "
                f"{name!r}; rename one"
            )
        names[text] = name
    return names


def _set_name(row: Mapping[str, Any], file_name: str, source_files: Mapping[str, str]) -> str:
    """Return the name of a row's set: of its source file, of its source and split, of the file.

    source_files: the names of the sets of source files.
    """
    source_file = row.get("source_file")
    source = row.get("data_source")
    name = file_name
    if isinstance(source_file, str) and source_file in source_files:
        name = source_files[source_file]
    elif isinstance(source, str) and Path(source).name:
        split = (row.get("extra_info") or {}).get("split")
        # Of one source there are a file to learn from and a file to be judged on.
        name = f"{Path(source).name}_{split}" if split else Path(source).name
    # It heads a column of a table.
    return printable(on_one_line(name))


def _flashrag_row(row: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
    """Return a row as FlashRAG has it. Raises UserError."""
    ids = [row[name] for name in ("id", "_id") if row.get(name) is not None]
    return {
        "id": ids[0] if ids else number,
        "question": _question_text(row, where),
        "golden_answers": _golden_answers(row, where),
        "metadata": row.get("metadata"),
    }


def _question_text(row: Mapping[str, Any], where: str) -> str:
    question = row.get("question")
    if question is None:
        question = question_at_end(_user_text(row.get("prompt"), where))
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: no question; expected one at the end of the user's turn")
    return question.strip()


def _user_text(prompt: Any, where: str) -> str:
    """Return the text of the user's last turn; a prompt may be that text alone."""
    if isinstance(prompt, str):
        return prompt
    turns = prompt if isinstance(prompt, list) else []
    texts = [
        turn.get("content")
        for turn in turns
        if isinstance(turn, dict) and turn.get("role") == "user"
    ]
    if not texts or not isinstance(texts[-1], str):
        raise UserError(
            f"{where}: no user's turn in prompt; expected "
            '[{"role": "user", "content": a text} ..], or a text'
        )
    return texts[-1]


def _golden_answers(row: Mapping[str, Any], where: str) -> list[str]:
    """Return the golden answers of a row, whatever the form of its ground truth."""
    ground_truth = (row.get("reward_model") or {}).get("ground_truth")
    answers = ground_truth
    if isinstance(answers, dict):
        answers = answers.get("target")
    if isinstance(answers, str):
        answers = answers.split(ANSWER_SEPARATOR)
    is_list_of_texts = isinstance(answers, list) and all(isinstance(text, str) for text in answers)
    if not is_list_of_texts or not "".join(answers).strip():
        raise UserError(
            f"{where}: no answer in reward_model.ground_truth ({str(ground_truth)[:60]!r}); "
            'expected a text, a list of texts, or {"target": ..}'
        )
    return answers


def _refuse_unknown_instructions(path: str | Path, texts: Collection[str]) -> None:
    """Raise UserError where what was read as questions are prompts with unknown instructions.

    texts: the questions that stand at the end of a prompt, each once.
    """
    if len(texts) < 2:
        return
    # What the first and the last in alphabetical order share, all share.
    pairs = zip(min(texts), max(texts), strict=False)
    shared = [letter for letter, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if len(shared) >= LONGEST_SHARED_BEGINNING:
        beginning = "".join(shared[:40])
        raise UserError(
            f"{path}: each prompt begins with {beginning!r}.., and nothing says where its "
            'question begins; write "Question:" before it, or give a column question'
        )


# ---- out -----------------------------------------------------------------------------------------
def write_question_sets(path: Path, question_sets: Mapping[str, Sequence[Question]]) -> None:
    """Write questions as AutoCoA's authors release theirs, with their prompt.

    Their reward splits the ground truth of training as a text; their evaluation script takes that
    of tests as a list.

    The file is whole or not there. Raises UserError where pyarrow is not installed, and for sets to
    learn from beside others.
    """
    pyarrow = _import_pyarrow(path)
    are_tests = {not name.endswith("train") for name in question_sets}
    if len(are_tests) > 1:
        raise UserError(
            f"{path}: a file holds sets to learn from or sets to be judged on, not both; "
            f"of {', '.join(question_sets)} write those called train to another file"
        )
    rows = [
        _verl_row(question, set_name, number, are_tests == {True})
        for set_name, questions in question_sets.items()
        for number, question in enumerate(questions)
    ]
    new_path = path.with_name(path.name + ".new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), new_path)
        sync(new_path)
        new_path.rename(path)
        sync(path.parent)


def _verl_row(question: Question, set_name: str, number: int, is_test: bool) -> dict[str, Any]:
    source, _, split = set_name.rpartition("_")
    if split not in SPLITS:
        source, split = set_name, ""
    row = flashrag_row(question, set_name)
    answers = question.golden_answers
    return {
        "id": row["id"],
        "source_file": f"{set_name}.jsonl",
        # By this a trainer chooses its reward.
        "data_source": source,
        "prompt": [{"role": "user", "content": authors_turn(question.question)}],
        "ability": "QA",
        "reward_model": {
            "ground_truth": answers if is_test else ANSWER_SEPARATOR.join(answers),
            "style": "rule",
        },
        "extra_info": {"index": number, "split": split},
        "metadata": row["metadata"],
    }
