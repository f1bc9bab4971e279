"""Passage files in FlashRAG's form: what is read and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data.passages import read_passages, split_passage

PASSAGES = [
    {"id": "0", "contents": '"Silver River"\nA film.'},
    {"id": "1", "contents": '"Eva Moss"\nA star.'},
]


@pytest.mark.parametrize(
    "bad",
    ["{not json}", "", '{"id": "1"}', '{"id": "1", "contents": 3}', "[1]", "null"],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_malformed_passage_names_its_line(tmp_path: Path, bad: str, name: str) -> None:
    """In a plain file and in one that is compressed."""
    path = tmp_path / name
    content = f"{json.dumps(PASSAGES[0])}\n{bad}\n".encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match="not a passage") as error:
        read_passages(path)
    assert f"{path}:2:" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"plain text\n", gzip.compress(json.dumps(PASSAGES[0]).encode() * 100)[:60]],
    # The bytes hold the time at which they were made, and two workers must name the tests alike.
    ids=["not compressed", "cut"],
)
def test_a_broken_gzip_file(tmp_path: Path, content: Any) -> None:
    """Guards: a traceback for a corpus that is no gzip file, or half of one."""
    (tmp_path / "p.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.jsonl\.gz"):
        read_passages(tmp_path / "p.jsonl.gz")


def test_missing_and_empty_passage_files(tmp_path: Path) -> None:
    """A missing file is named with its setting; an empty one and one in another encoding too."""
    with pytest.raises(UserError, match=r"corpus.*no such file.*none\.jsonl"):
        read_passages(tmp_path / "none.jsonl")
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"p\.jsonl: empty"):
        read_passages(path)
    path.write_bytes('{"id": "1", "contents": "\u00c9va"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"p\.jsonl: can't be read"):
        read_passages(path)


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Silver River"\nIt is\na film.', "Silver River", "It is a film."),
        ("Silver River\nIt is.", "Silver River", "It is."),
        ('"A "B" C"\nx', 'A "B" C', "x"),
        ("'Title: Silver River Text: It is.", "Silver River", "It is."),
        ("Title: Silver River Text: It\nis.", "Silver River", "It is."),
        ('"Silver River"', "Silver River", ""),
        ('"Made for Walkin\'"\nA song.', "Made for Walkin'", "A song."),
        ('""Weird Al" Yankovic"\nx', '"Weird Al" Yankovic', "x"),
        ('""Heroes""\nx', '"Heroes"', "x"),
    ],
)
def test_split_passage(contents: str, title: str, text: str) -> None:
    """FlashRAG's form, without quotes too, and the older `Title: T Text: body`.

    Guards: quotes that are the title's own taken off, so that no gold title matched.
    """
    assert split_passage(contents) == (title, text)
