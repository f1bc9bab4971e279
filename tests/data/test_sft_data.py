"""The SFT data that a run keeps as token ids (data/sft_data.py)."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

import train_sft
from common.errors import UserError
from common.files import CHECKSUMS_FILE
from data.sft_data import (
    SFTData,
    keep_what_fits,
    read_codec,
    read_sft_data,
    read_trajectories,
    write_sft_data,
)
from data.trajectory import Codec, Trajectory


def row_of(length: Any) -> Any:
    """Return a trajectory of so many tokens."""
    return Trajectory([5] * length, [1] * length, [1] * length)


def test_there_and_back(tmp_path: Path, codec: Codec) -> None:
    """The same ids, masks and roles, and pairs as they were."""
    acting = codec.build("Who?", [("search", "A"), ("result", "B"), ("answer", "Eva")])
    thinking = codec.build("Who?", [("think", "Hm"), ("answer", "Eva")])
    pairs = [(acting, thinking), (thinking, acting)]
    write_sft_data(tmp_path, SFTData([acting, acting], [thinking], pairs))
    read = read_sft_data(tmp_path)
    assert [chain.ids for chain in read.chains_of_action] == [acting.ids] * 2
    assert [chain.role for chain in read.chains_of_thought] == [thinking.role]
    assert [[side.mask for side in pair] for pair in read.pairs] == [
        [acting.mask, thinking.mask],
        [thinking.mask, acting.mask],
    ]


@pytest.mark.parametrize(
    "second",
    [
        b'{"ids": [1, 2], "ma',
        b"\xff\xfe",
        b"3",
        b'{"idz": []}',
        b'{"ids": [1, 2], "mask": [1], "role": [1, 1]}',
        b'{"ids": 1, "mask": 1, "role": 1}',
        b"[" * 9000,
    ],
)
def test_a_cut_file_of_a_run(tmp_path: Path, second: bytes) -> None:
    """The line that is cut is named, with the way out."""
    path = tmp_path / "coa.jsonl"
    path.write_bytes(b'{"ids": [1], "mask": [1], "role": [1]}\n' + second)
    message = f"coa.jsonl:2: cut or damaged; remove {tmp_path} and run train_sft.py again"
    with pytest.raises(UserError, match=re.escape(message)):
        read_trajectories(path)


def test_a_pair_of_one_side(tmp_path: Path) -> None:
    """Guards: the last side of a file that was cut after it, left out without a word."""
    write_sft_data(tmp_path, SFTData([row_of(1)], [row_of(1)], [(row_of(2), row_of(3))]))
    path = tmp_path / "pairs.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    (tmp_path / CHECKSUMS_FILE).unlink()
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: cut or damaged"):
        read_sft_data(tmp_path)


@pytest.mark.parametrize("name", ["coa.jsonl", "cot.jsonl", "pairs.jsonl"])
def test_another_number_in_a_file_of_a_run(tmp_path: Path, name: str) -> None:
    """Guards: a flipped bit that makes another token, which would be learned without a word."""
    write_sft_data(tmp_path, SFTData([row_of(1)], [row_of(1)], [(row_of(2), row_of(3))]))
    path = tmp_path / name
    path.write_text(path.read_text().replace("1", "3", 1))
    message = f"{name} is not as it was saved; remove {tmp_path} and run train_sft.py again"
    with pytest.raises(UserError, match=re.escape(message)):
        read_sft_data(tmp_path)


def test_a_file_without_rows(tmp_path: Path) -> None:
    """It is a pool without rows."""
    (tmp_path / "pairs.jsonl").write_text("")
    assert read_trajectories(tmp_path / "pairs.jsonl") == []


def test_a_missing_file_of_a_run(tmp_path: Path) -> None:
    """The message tells the command that makes it."""
    with pytest.raises(UserError, match=r"coa\.jsonl is missing; make it with: python train_sft"):
        read_sft_data(tmp_path)


def test_too_long_trajectories_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """None is cut; how many there are is printed with the setting's name.

    A pair goes with its longer side.
    """
    data = SFTData(
        [row_of(10), row_of(11)],
        [row_of(12), row_of(3)],
        [(row_of(2), row_of(13)), (row_of(10), row_of(4))],
    )
    kept = keep_what_fits(data, 10, "from x.jsonl: ")
    assert [len(chain.ids) for chain in kept.chains_of_action] == [10]
    assert [len(chain.ids) for chain in kept.chains_of_thought] == [3]
    assert [[len(side.ids) for side in pair] for pair in kept.pairs] == [[10, 4]]
    left_out, counts = capsys.readouterr().out.splitlines()
    assert left_out == (
        "3 trajectories are longer than max_len 10 (the longest has 13 tokens) and are left out"
    )
    assert counts == "from x.jsonl: 1 chains of action, 1 chains of thought, 1 pairs"


def test_nothing_is_said_of_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the counts are printed."""
    keep_what_fits(SFTData([row_of(3)]), 10)
    expected = "1 chains of action, 0 chains of thought, 0 pairs\n"
    assert capsys.readouterr().out == expected


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """Guards: a traceback for a file that lies outside a run."""
    with pytest.raises(UserError, match="has no tokenizer; give a file inside out/"):
        read_codec(tmp_path / "base")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("cut")
    with pytest.raises(UserError, match=r"the tokenizer of .*base can't be read"):
        read_codec(tmp_path / "base")


@pytest.mark.parametrize("count", [0, 1, 3, 4, 40])
def test_pairs_are_of_both_directions(codec: Codec, count: int) -> None:
    """As many as asked for, or all there are of the two; an odd number is not cut by one.

    Guards: --pairs=1, which left none.
    """
    acting = [(Trajectory([number]), Trajectory()) for number in range(10)]
    thinking = [(Trajectory([100 + number]), Trajectory()) for number in range(10)]
    drawn = train_sft.draw_pairs(acting, thinking, count, random.Random(0))
    ids = [pair[0].ids[0] for pair in drawn]
    assert len(set(ids)) == len(ids) == min(count, 20)
    assert abs(sum(number < 100 for number in ids) - len(ids) / 2) <= 0.5
