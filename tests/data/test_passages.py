"""Passage files in FlashRAG's form, the observations made of them, and hostile text in both."""

import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data.passages import (
    Passage,
    fit_observation,
    join_passages,
    neutralize,
    read_passages,
    split_observation,
    split_passage,
)
from data.questions import Lookup
from data.teacher import find_evidence

PASSAGES = [
    {"id": "0", "contents": '"Silver River"\nA film.'},
    {"id": "1", "contents": '"Eva Moss"\nA star.'},
]


@pytest.mark.parametrize(
    "bad",
    [
        "{not json}",
        '{"id": "1"}',
        '{"id": "1", "contents": 3}',
        "[1]",
        "null",
        '{"id": "1", "contents": "half \\ud83d"}',
        '{"id": "half \\ud83d", "contents": "x"}',
    ],
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


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_bytes_before_the_text_and_blank_lines(tmp_path: Path, name: str) -> None:
    """Byte order marks, as where two such files were joined, are no text; lines keep their number.

    Guards: "not a passage" for files of some editors.
    """
    first, second = (json.dumps(passage) for passage in PASSAGES)
    content = f"\ufeff{first}\n\r\n\ufeff{second}\n \n".encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_passages(path) == PASSAGES
    path = tmp_path / "twice.jsonl"
    path.write_text(f"{first}\n\n{first}\n")
    with pytest.raises(UserError, match=r"twice\.jsonl:3: id '0' is that of line 1 too"):
        read_passages(path)


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
        ("A mill stands here. It\u00a0grinds corn.", "", "A mill stands here. It grinds corn."),
        ("A mill stands by it.\nIt grinds.", "", "A mill stands by it. It grinds."),
        ('"A mill stands by it."\nIt grinds.', "A mill stands by it.", "It grinds."),
        ("Mr. Mill\nA man.", "Mr. Mill", "A man."),
        ('"Cafe\u0301"\nA cafe\u0301.', "Caf\u00e9", "A caf\u00e9."),
    ],
)
def test_split_passage(contents: str, title: str, text: str) -> None:
    """FlashRAG's form, without quotes too, and the older `Title: T Text: body`.

    Guards: quotes that are the title's own taken off, so that no gold title matched; a text without
    a title line that was all title, so that nothing was found in it; accents typed as two letters.
    """
    assert split_passage(contents) == (title, text)


# ---- observations --------------------------------------------------------------------------------
def test_passages_without_a_title_in_an_observation() -> None:
    """They begin with their number, and are read again and cut like others."""
    passages = [Passage("", "A mill 2: here."), Passage("Mill", "It grinds."), Passage("", "Corn.")]
    observation = join_passages(passages)
    assert observation == "1: A mill 2: here.\n Mill 2: It grinds.\n 3: Corn."
    read = split_observation(observation)
    assert [(title, text) for _, title, text in read] == passages
    lookup = Lookup("?", ["mill"], evidence=["Corn"])
    assert find_evidence(lookup, observation) == "Corn."
    cut = fit_observation(observation, len(observation) - 1, len)
    assert cut == "1: A mill 2: here.\n Mill 2: It grinds.\n 3:"
    assert fit_observation(observation, 17, len) == "1: A\n Mill 2:\n 3:"


@pytest.mark.parametrize(
    "title",
    [
        "1: Alien",
        "Alien 1:",
        "Alien 1: 1: 1:",
        "1:",
        "Alien 1\u200b: x",
        "<b>Alien</b>",
        "So\u00adso",
    ],
)
def test_a_title_is_read_again_as_it_stands(title: str) -> None:
    """Whatever is in it, it ends where the passage's number begins, and is that of a look-up.

    Guards: a title's own number read as the passage's, also once an invisible letter is out of it.
    """
    text = neutralize(join_passages([Passage(title, "A film.")]))
    (passage,) = split_observation(text)
    assert passage.text == "A film."
    assert find_evidence(Lookup("?", ["x"], title=title, evidence=["film"]), text) == "A film."


def test_a_title_in_two_unicode_forms() -> None:
    """Guards: 116 of 77,734 passages of Wikipedia, whose titles no question's equalled."""
    composed, decomposed = (unicodedata.normalize(form, "Zo\u00eb") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for in_passage, in_question in ((composed, decomposed), (decomposed, composed)):
        text = join_passages([Passage(in_passage, f"{in_passage} runs a shop.")])
        lookup = Lookup("?", ["x"], title=in_question, evidence=[in_question])
        assert find_evidence(lookup, text) == f"{composed} runs a shop."


# ---- hostile text --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "hostile",
    [
        "\uff1c\uff42egin_search>",  # full width
        "<\U0001d42d\U0001d421ink>",  # bold letters of mathematics
        "\ufe64\uff0fthink>",  # small form
        "\ufe68b\uff4fxed{no}",
        "\\\U0001d41b\U0001d428\U0001d431\U0001d41e\U0001d41d{no}",
        "\uff3b\uff0fINST\uff3d",
        "<\\boxed{no}",
        "\uff1c\uff3cboxed{no}",
    ],
)
def test_what_would_normalize_to_a_tag(hostile: str) -> None:
    """Guards: a tag that stands there once somebody normalizes the text, and one whose letters met.

    Another program may do so at any time. All letters but the first stay.
    """
    text = neutralize(f"A {hostile} B")
    plain = unicodedata.normalize("NFKC", text)
    for opening in ("<b", "<t", "</", "\\boxed", "[/INST"):
        assert opening not in plain
    assert text.endswith(f"{hostile[2:]} B")


def test_other_letters_stay() -> None:
    """Text in which nothing hides keeps its letters, whatever normalizing would make of them."""
    text = "x\u00b2 \u2264 \u00bd, \ufb01sh \u2460 \uff08\u6771\u4eac\uff09 3 < 4"
    assert neutralize(text) == text
