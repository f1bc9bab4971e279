"""verl's question files: the forms in which other projects release them, and what is refused."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from data.instructions import AUTHORS_INSTRUCTIONS, authors_turn
from data.question_files import read_question_sets

# As Search-R1 asks, and ZeroSearch after it; the instructions are shortened.
SEARCH_R1_TURN = "Reason inside <think>. For example, <answer> A </answer>. Question: {}\n"
# Instructions of nobody.
UNKNOWN_TURN = "Use the tools that you are given, as often as you like, and say what is true. " * 2


def authors_row(text: str = "Who?", **changes: Any) -> dict[str, Any]:
    """Return a row as AutoCoA's authors have it."""
    return {
        "_id": text,
        "data_source": "HotpotQA",
        "prompt": [{"role": "user", "content": authors_turn(text)}],
        "ability": "QA",
        "reward_model": {"ground_truth": "Eva", "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        **changes,
    }


def write(path: Path, *rows: Any) -> Path:
    """Write rows as a parquet file."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def read(path: Path) -> Any:
    return read_question_sets([path], "--train_data")


def one_question(path: Path) -> Any:
    """Return the only question of a file."""
    ((question,),) = read(path).values()
    return question


# ---- the forms there are -------------------------------------------------------------------------
def test_the_authors_prompt() -> None:
    """Guards: an editor that strips spaces at the ends of lines; checkpoints saw them."""
    digest = hashlib.sha256(AUTHORS_INSTRUCTIONS.encode()).hexdigest()
    assert digest == "66c6ec4d3f6ef0071bd1fb2d5a5caa74473d4b34240385019a719edac2ac4c0c"


def test_rows_of_autocoa(tmp_path: Path) -> None:
    """The question is what stands after the instructions, whatever it says itself."""
    texts = ["Who directed Silver River?", "Question: who? answer: Eva"]
    rows = [authors_row(text, level="easy") for text in texts]
    path = write(tmp_path / "train.parquet", *rows)
    ((name, questions),) = read(path).items()
    assert name == "HotpotQA_train"
    assert [question.question for question in questions] == texts
    assert [question.id for question in questions] == [f"{name}:{text}" for text in texts]
    assert questions[1].where == f"{path}, row 2"
    assert questions[1].golden_answers == ["Eva"]
    assert questions[1].lookups


def test_rows_of_search_r1(tmp_path: Path) -> None:
    """All answers are read, and the titles of FlashRAG's metadata, so that a teacher can search."""
    row = authors_row(
        id="test_0",
        data_source="hotpotqa",
        prompt=[
            {"role": "system", "content": "Question: none"},
            {"role": "user", "content": SEARCH_R1_TURN.format("Who directed it. Question: when?")},
        ],
        reward_model={"ground_truth": {"target": ["Eva Moss", "Eva"]}},
        metadata={"supporting_facts": {"title": ["B", "A"], "sent_id": [0, 1]}, "level": None},
    )
    question = one_question(write(tmp_path / "test.parquet", row))
    assert question.question == "Who directed it. Question: when?"
    assert question.id == "hotpotqa_train:test_0"
    assert question.golden_answers == ["Eva Moss", "Eva"]
    assert question.gold_titles == ["B", "A"]


def test_rows_of_research(tmp_path: Path) -> None:
    """The prompt is the question alone; without an id a row is called by its number."""
    row = {"prompt": "Who?", "reward_model": {"ground_truth": ["Eva"]}}
    question = one_question(write(tmp_path / "musique.parquet", row))
    assert (question.question, question.id) == ("Who?", "musique:1")
    turn = {**row, "prompt": [{"role": "user", "content": "Who?"}]}
    assert one_question(write(tmp_path / "musique.parquet", turn)).question == "Who?"


def test_a_column_of_questions_comes_first(tmp_path: Path) -> None:
    """In a file with passages after the question, the prompt does not end with it."""
    row = authors_row(question="Who?", prompt=[{"role": "user", "content": "Who? Context: .."}])
    assert one_question(write(tmp_path / "rag.parquet", row)).question == "Who?"


@pytest.mark.parametrize(
    ("ground_truth", "answers"),
    [
        ("Eva", ["Eva"]),
        ("Eva<ans_split>Eva Moss", ["Eva", "Eva Moss"]),
        (["Eva", ""], ["Eva"]),
        ({"target": ["Eva"]}, ["Eva"]),
        ({"target": "Eva", "other": 1}, ["Eva"]),
    ],
)
def test_forms_of_a_ground_truth(tmp_path: Path, ground_truth: Any, answers: list[str]) -> None:
    """A text, several in one, a list, or either under "target"."""
    row = authors_row(reward_model={"ground_truth": ground_truth})
    assert one_question(write(tmp_path / "x.parquet", row)).golden_answers == answers


def test_several_sets_in_one_file(tmp_path: Path) -> None:
    """They are told by their source file, else by their source and split, else by the file."""
    rows = [
        authors_row(source_file="NQ_dev.json"),
        authors_row(source_file="HotpotQA_dev.json"),
        authors_row(source_file="musique/dev.jsonl"),
        authors_row(source_file="2wiki/dev.jsonl"),
        authors_row(source_file=None, data_source="RUC/nq", extra_info={"split": "test"}),
        authors_row(source_file=None, data_source="popqa", extra_info=None),
        authors_row(source_file=None, data_source=None),
    ]
    sets = read(write(tmp_path / "test.parquet", *rows))
    names = ["NQ_dev", "HotpotQA_dev", "musique_dev", "2wiki_dev", "nq_test", "popqa"]
    names.append(f"{tmp_path.name}_test")
    assert [(name, len(questions)) for name, questions in sets.items()] == [(n, 1) for n in names]


def test_two_source_files_of_one_name(tmp_path: Path) -> None:
    """Guards: two sets, read as one. What is no text says nothing."""
    path = write(
        tmp_path / "test.parquet",
        authors_row(source_file="a/nq/dev.json"),
        authors_row(source_file="b/nq/dev.json", _id="2"),
    )
    with pytest.raises(UserError, match=r"'b/nq/dev\.json' and another file, which are"):
        read(path)
    path = write(tmp_path / "list.parquet", authors_row(source_file=["nq"], data_source="nq"))
    assert list(read(path)) == ["nq_train"]


def test_a_row_that_is_there_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is read once, and a line says so. AutoCoA's own test file has one."""
    path = write(tmp_path / "x.parquet", authors_row(), authors_row())
    assert one_question(path).question == "Who?"
    assert capsys.readouterr().out == f"{path}: rows that are there twice are read once: 1\n"


# ---- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [{"role": "user", "content": authors_turn(" ")}]}, "no question"),
        ({"prompt": [{"role": "user", "content": None}]}, "no user's turn in prompt"),
        ({"prompt": [{"role": "system", "content": "Hm"}]}, "no user's turn in prompt"),
        ({"prompt": []}, "no user's turn in prompt"),
        ({"prompt": None}, "no user's turn in prompt"),
        ({"reward_model": None}, r"no answer in reward_model.ground_truth \('None'\)"),
        ({"reward_model": {"ground_truth": None}}, "no answer"),
        ({"reward_model": {"ground_truth": " "}}, "no answer"),
        ({"_id": "Who?", "prompt": [{"role": "user", "content": "When?"}]}, "another question too"),
    ],
)
def test_a_bad_row_names_its_number(tmp_path: Path, changes: Any, message: str) -> None:
    """One line of text, with the file and the row, counted from 1."""
    path = write(tmp_path / "x.parquet", authors_row(), authors_row("What?", **changes))
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, row 2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ground_truth", [[], [None, "Eva"], [1], 1, {"target": [None]}, {"answer": ["Eva"]}]
)
def test_an_odd_ground_truth(tmp_path: Path, ground_truth: Any) -> None:
    """It is shown, with the forms that are read."""
    row = authors_row(reward_model={"ground_truth": ground_truth})
    with pytest.raises(UserError, match=r"x.parquet, row 1: no answer .*; expected a text, a list"):
        read(write(tmp_path / "x.parquet", row))


def test_bad_files(tmp_path: Path) -> None:
    """One line for each: missing, of something else, cut, without rows or without a column."""
    path = tmp_path / "x.parquet"
    with pytest.raises(UserError, match=r"--train_data: no such file: .*x\.parquet; expected verl"):
        read(path)
    for content in (b"", b'{"id": 1}', write(path, authors_row()).read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.parquet: not a parquet file, or a damaged one"):
            read(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([authors_row()])[:0], path)
    with pytest.raises(UserError, match=r"x\.parquet: empty"):
        read(path)
    for column, missing in (("prompt", "prompt or question"), ("reward_model", "reward_model")):
        row = authors_row()
        del row[column]
        with pytest.raises(UserError, match=rf"x\.parquet: there is no column {missing}"):
            read(write(path, row))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install, and for which file."""
    path = write(tmp_path / "x.parquet", authors_row())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"x\.parquet: .* pip install pyarrow"):
        read(path)


def test_instructions_that_nobody_knows(tmp_path: Path) -> None:
    """Guards: prompts of another project, taken for questions whole."""
    rows = [authors_row(prompt=UNKNOWN_TURN + text, _id=text) for text in ("Who?", "When?")]
    with pytest.raises(UserError, match=r'each prompt begins with .*; write "Question:" before it'):
        read(write(tmp_path / "x.parquet", *rows))
    rows = [{**row, "question": f"{UNKNOWN_TURN}{row['_id']}"} for row in rows]
    assert len(read(write(tmp_path / "x.parquet", *rows))["HotpotQA_train"]) == 2


def test_one_set_in_two_files(tmp_path: Path) -> None:
    """Guards: answers to one file's questions that pass for those to the other's."""
    paths = [write(tmp_path / f"{name}.parquet", authors_row()) for name in ("a", "b")]
    message = f"--eval_data: {paths[0]} and {paths[1]} both hold the set 'HotpotQA_train'"
    with pytest.raises(UserError, match=re.escape(message)):
        read_question_sets(paths, "--eval_data")
