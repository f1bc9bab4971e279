"""The commands of data/: a trajectory to look at, question sets to fetch, SFT data to export."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
from conftest import read_rows, run_here

from common.errors import UserError
from common.files import write_jsonl
from data.autocoa_files import read_sft_files, write_sft_files
from data.flashrag import read_questions
from data.get import get
from data.instructions import authors_turn
from data.question_files import read_question_sets
from data.questions import Question
from data.sft_data import SFTData, write_sft_data
from data.show import COLORS, PLAIN, colored, show
from data.trajectory import Codec, Role
from workflows.agent import trajectory_row

CHAIN = [("think", "Hm"), ("search", "Eva"), ("result", "Eva 1: x"), ("answer", "Eva")]

# run_here runs the module, which is imported here too, once more as a script.
pytestmark = pytest.mark.filterwarnings("ignore:'data.* found in sys.modules")


def green_texts(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return what was printed in green."""
    return re.findall(r"\x1b\[1;32m(.*?)\x1b\[", capsys.readouterr().out)


# ---- show ----------------------------------------------------------------------------------------
def test_show_a_rollout(codec: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What carries loss is green, all else grey."""
    trajectory = codec.build("Who?", CHAIN)
    row = trajectory_row(codec, Question("0", "Who?", ["Eva"]), trajectory, reward=1.0)
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    show(tmp_path / "a.jsonl", 1)
    expected = [" Hm<begin_search> Eva</end_search>", "</think>\\boxed{ Eva}<eos>"]
    assert green_texts(capsys) == expected
    with pytest.raises(UserError, match="no trajectory 2; it holds 1"):
        show(tmp_path / "a.jsonl", 2)


def test_show_the_sft_data_of_a_run(
    codec: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows hold ids alone, which the run's tokenizer reads."""
    codec.tokenizer.save_pretrained(tmp_path / "base")
    trajectory = codec.build("Who?", CHAIN)
    write_sft_data(tmp_path / "data", SFTData(chains_of_action=[trajectory]))
    show(tmp_path / "data" / "coa.jsonl", 1)
    expected = [" Hm<begin_search> Eva</end_search>", "</think>\\boxed{ Eva}<eos>"]
    assert green_texts(capsys) == expected


def test_show_a_row_of_the_authors(
    codec: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The assistant's turn is green but for its observations."""
    trajectory = codec.build("Who?", CHAIN)
    write_sft_files(codec, tmp_path, SFTData(chains_of_action=[trajectory]))
    show(tmp_path / "coa.jsonl", 1)
    expected = ["<think> Hm<begin_search> Eva</end_search>", "</think>\\boxed{ Eva}"]
    assert green_texts(capsys) == expected


def test_show_both_sides_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The beginning is grey; what is chosen and what is rejected are green, a line each."""
    row = {
        "conversation": [{"from": "human", "value": "Who?<think> Hm"}],
        "chosen": {"from": "gpt", "value": "so"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    show(tmp_path / "pairs.json", 1)
    expected = "\x1b[90mWho?<think> Hm\n\x1b[1;32m+ so\n- no\x1b[0m\n"
    assert capsys.readouterr().out == expected


def test_show_a_file_that_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its escape sequences are spelled out; only those of the colours are printed.

    Guards: an order to write from right to left, which was printed as it is.
    """
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"messages": [{"content": "a \x1b[2J\x9b2J\x85\u202e b"}]})
    )
    show(tmp_path / "x.jsonl", 1)
    expected = "\x1b[1;32ma \\x1b[2J\\x9b2J\\x85\\u202e b\x1b[0m\n"
    assert capsys.readouterr().out == expected
    done = run_here(tmp_path, "data.show", "x.jsonl")
    assert done.out == expected


def test_show_half_a_character(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lone surrogate is spelled out, since a terminal can't show it."""
    (tmp_path / "half.jsonl").write_text('{"messages": [{"content": "half \\ud83d a character"}]}')
    show(tmp_path / "half.jsonl", 1)
    text = capsys.readouterr().out
    assert r"half \ud83d a character" in text
    text.encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[1", "x: not JSON"),
        (b"\xff\xfe[", "x: not JSON"),
        (b'{"ids": [1]', "x:1: not JSON"),
        (b"[3]", "x:1: not a trajectory"),
        (b'{"ids": [1], "tokens": ["a"]}', "x:1: not"),
        (b'{"a": 1}\n', "x:1: not a trajectory"),
        (b'{"messages": []}', "x:1: not"),
        (b'{"messages": [{"content": null}]}', "x:1: not"),
        (b'{"conversation": [], "chosen": 1}', "x:1: not"),
        (b'[{"ids": [1], "tokens": [2], "mask": [1]}]', "x:1: not"),
    ],
)
def test_show_a_file_without_trajectories(tmp_path: Path, content: bytes, message: str) -> None:
    """Guards: a traceback for broken, binary and other files."""
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        show(tmp_path / "x", 1)
    assert "\n" not in str(error.value)


def test_roles_in_colours(codec: Codec) -> None:
    """A step of a trajectory is a line in the colour of its role; the text is all there."""
    text = colored(codec, codec.build("Who?", CHAIN))
    lines = text.split("\n")
    assert lines[0].removeprefix(PLAIN).startswith(COLORS[Role.PROMPT])
    for role in (Role.ACTION, Role.OBSERVATION, Role.ANSWER):
        assert sum(line.startswith(COLORS[role]) for line in lines) == 1
    assert text.endswith(PLAIN)
    without_colours = re.sub(r"\x1b\[[\d;]*m", "", text).replace("\n", "")
    assert without_colours == codec.decode(codec.build("Who?", CHAIN).ids)
    hostile = colored(codec, codec.build("Who\x1b[2J?", CHAIN))
    assert r"Who\x1b[2J?" in hostile


# ---- get -----------------------------------------------------------------------------------------
def fake_datasets(rows: Any) -> Any:
    """Return a package `datasets` that holds one set, and is offline for others."""

    def load_dataset(name: str, part: Any) -> dict[str, Any]:
        if part == "nq":
            raise ConnectionError("offline\nand more")
        assert (name, part) == ("RUC-NLPIR/FlashRAG_datasets", "2wikimultihopqa")
        return {"dev": rows}

    return SimpleNamespace(load_dataset=load_dataset)


def test_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashRAG's rows are written with the titles of their supporting facts as gold titles."""
    supporting_facts = {"title": ["A", "B", "A"], "sent_id": [0, 1, 2]}
    rows = [
        {
            "id": "dev_0",
            "question": "Who?",
            "golden_answers": ["Eva"],
            "metadata": {"supporting_facts": supporting_facts, "type": "bridge"},
        },
        {
            "id": "dev_1",
            "question": "Where?",
            "golden_answers": ["Iron Hill"],
            "metadata": None,
        },
    ]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows))
    get("2wiki", tmp_path)
    first, second = read_questions(tmp_path / "2wiki_dev.jsonl")
    assert first.gold_titles == ["A", "B"]
    assert second.gold_titles == []
    assert second.golden_answers == ["Iron Hill"]
    # What else the set says stays.
    assert read_rows(tmp_path / "2wiki_dev.jsonl")[0]["metadata"]["type"] == "bridge"


def test_get_keeps_answers_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a text in place of a list, taken apart into answers of a letter each."""
    row = {"id": "dev_0", "question": "Who?", "golden_answers": "Eva", "metadata": None}
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([row]))
    get("2wiki", tmp_path)
    with pytest.raises(UserError, match="golden_answers must be a list of texts"):
        read_questions(tmp_path / "2wiki_dev.jsonl")


def test_get_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says why, and what to do."""
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([]))
    with pytest.raises(UserError, match=r"nq can't be fetched \(ConnectionError: offline\)"):
        get("nq", tmp_path)


def test_get_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the package."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        get("nq", tmp_path)


# ---- export --------------------------------------------------------------------------------------
def test_export(codec: Codec, tmp_path: Path) -> None:
    """The SFT data of a run as AutoCoA's files is read again as the same trajectories."""
    chain_of_action = codec.build("Who?", CHAIN)
    chain_of_thought = codec.build("Who?", [("think", "Hm"), ("answer", "Eva")])
    pair = codec.build_pair("Who?", [("think", "Hm")], [("search", "Eva")], [("think", "I recall")])
    data = SFTData([chain_of_action], [chain_of_thought], [pair])
    write_sft_data(tmp_path / "out/real/data", data)
    codec.tokenizer.save_pretrained(tmp_path / "out/real/base")

    done = run_here(tmp_path, "data.export", "out/real/data", "theirs")
    assert done.status == 0, done.err
    assert done.out == "theirs: 1 chains of action, 1 chains of thought, 1 pairs\n"

    names = ("coa.jsonl", "cot.jsonl", "pairs.json")
    paths = [tmp_path / "theirs" / name for name in names]
    again, odd_rows = read_sft_files(codec, paths)
    assert odd_rows == []
    assert again.chains_of_action[0].ids == chain_of_action.ids
    assert again.chains_of_action[0].mask == chain_of_action.mask
    assert again.chains_of_thought[0].ids == chain_of_thought.ids
    assert [side.ids for side in again.pairs[0]] == [side.ids for side in pair]
    assert [side.mask for side in again.pairs[0]] == [side.mask for side in pair]


def test_export_questions(tmp_path: Path) -> None:
    """Question files as one file of verl's are read again as the same sets."""
    row = {"id": "dev_0", "question": "Question: who?", "golden_answers": ["Eva", "Eva Moss"]}
    hotpotqa = tmp_path / "hotpotqa_dev.jsonl"
    metadata = {"gold_titles": ["B", "A"], "gold_ids": ["7"]}
    write_jsonl(hotpotqa, [{**row, "metadata": metadata}, {**row, "id": "dev_1"}])
    mine = tmp_path / "mine.jsonl"
    write_jsonl(mine, [row])
    done = run_here(tmp_path, "data.export", hotpotqa, mine, "theirs/test.parquet")
    assert done.status == 0, done.err
    assert done.out == "theirs/test.parquet: hotpotqa_dev 2, mine 1 questions\n"

    path = tmp_path / "theirs" / "test.parquet"
    assert list(path.parent.iterdir()) == [path]
    before = read_question_sets([hotpotqa, mine], "--data")
    after = read_question_sets([path], "--data")
    for questions in [*before.values(), *after.values()]:
        for question in questions:
            question.where = ""
    assert after == before
    # As a trainer of theirs reads it.
    theirs = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["data_source"] for row in theirs] == ["hotpotqa", "hotpotqa", "mine"]
    assert theirs[0]["prompt"] == [{"role": "user", "content": authors_turn("Question: who?")}]
    assert theirs[0]["reward_model"]["ground_truth"] == ["Eva", "Eva Moss"]

    # And back, a file for each set.
    done = run_here(tmp_path, "data.export", path, "ours")
    assert done.out == "ours/hotpotqa_dev.jsonl: 2 questions\nours/mine.jsonl: 1 questions\n"
    again = read_question_sets(
        [tmp_path / "ours" / name for name in ("hotpotqa_dev.jsonl", "mine.jsonl")], "--data"
    )
    for questions in again.values():
        for question in questions:
            question.where = ""
    assert again == before
    done = run_here(tmp_path, "data.export", path, "ours")
    assert "ours/hotpotqa_dev.jsonl: it is there already" in done.err
    done = run_here(tmp_path, "data.export", path, "v1.0")
    assert (tmp_path / "v1.0" / "mine.jsonl").is_file(), done.err
    done = run_here(tmp_path, "data.export", path, "ours.jsonl")
    assert "ours.jsonl: a folder is needed" in done.err


def test_export_questions_to_learn_from(tmp_path: Path) -> None:
    """Their reward splits a text; their evaluation script takes a list, so a file has one form."""
    row = {"id": "0", "question": "Who?", "golden_answers": ["Eva", "Eva Moss"]}
    for name in ("nq_train", "nq_dev"):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    done = run_here(tmp_path, "data.export", "nq_train.jsonl", "train.parquet")
    assert done.status == 0, done.err
    (theirs,) = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert theirs["reward_model"]["ground_truth"] == "Eva<ans_split>Eva Moss"
    assert theirs["data_source"] == "nq"
    (questions,) = read_question_sets([tmp_path / "train.parquet"], "--data").values()
    assert questions[0].golden_answers == ["Eva", "Eva Moss"]
    done = run_here(tmp_path, "data.export", "nq_train.jsonl", "nq_dev.jsonl", "both.parquet")
    assert done.status == 2
    assert "of nq_train, nq_dev write those called train to another file" in done.err


def test_export_a_set_that_names_no_file(tmp_path: Path) -> None:
    """Guards: a split called "../x", written outside the folder."""
    row = {"prompt": "Who?", "reward_model": {"ground_truth": ["Eva"]}, "data_source": "nq"}
    table = pyarrow.Table.from_pylist([{**row, "extra_info": {"split": "../../up"}}])
    pyarrow.parquet.write_table(table, tmp_path / "odd.parquet")
    done = run_here(tmp_path, "data.export", "odd.parquet", "a/b")
    assert done.status == 2
    assert "the set 'nq_../../up' can't be the name of a file" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["odd.parquet"]


# ---- command lines -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "module, arguments",
    [
        ("data.show", []),
        ("data.show", ["nothing.jsonl"]),
        ("data.show", ["x", "y"]),
        ("data.show", ["x", "1", "2"]),
        ("data.get", []),
        ("data.get", ["squad"]),
        ("data.get", ["nq", "x", "y"]),
        ("data.export", []),
        ("data.export", ["x"]),
        ("data.export", ["x", "y"]),
        ("data.export", ["x", "y", "z"]),
        ("data.export", ["x.jsonl", "y.parquet"]),
        ("data.export", ["x.parquet", "y"]),
    ],
)
def test_bad_commands(tmp_path: Path, module: str, arguments: list[Any]) -> None:
    """One line on stderr and status 2."""
    done = run_here(tmp_path, module, *arguments)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
