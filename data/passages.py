"""Passages in FlashRAG's form, and observations made of them: a passage a line, numbered.

    Silver River 1: A film. Eva Moss directed it.
     Iron Hill 2: A band. It started in 1950.

The number lets a reader, and a small network, say which passage it means.
"""

import gzip
import json
import re
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError

NOTHING_FOUND = "Nothing found."
LINE_BREAK = "\n "  # between the passages of an observation

# What is not seen could hide in a tag: fillers, variation selectors, joiners.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
# A terminal would obey control characters, and half a surrogate pair is no text.
CONTROL = re.compile("[^\n\t\x20-\x7e\x85\xa0-\ud7ff\ue000-\U0010ffff]")
# Some public pools write a passage's title this way.
TITLE_IN_WORDS = re.compile(r"\"?'?Title: (.*?) Text: (.*)", re.S)


class Passage(NamedTuple):
    """One passage: what it is called, and what it says on one line."""

    title: str
    text: str


class NumberedPassage(NamedTuple):
    """One passage as it stands in an observation."""

    number: int
    title: str
    text: str


def split_passage(contents: str) -> Passage:
    """Split the `contents` of FlashRAG, `"Title"`, a line break and the text."""
    title, _, text = contents.partition("\n")
    in_words = TITLE_IN_WORDS.match(contents.strip())
    if in_words:
        title, text = in_words.groups()
    title = title.strip()
    # One pair of quotes is the form's; others are the title's own.
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1].strip()
    return Passage(title, " ".join(text.split()))


def read_passages(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a FlashRAG passage file, plain or gzip: [{"id", "contents"}].

    Raises UserError with file:line, also for two passages of one id.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"corpus: no such file: {path}; give a FlashRAG passage file with --corpus=FILE, "
            "or wikipedia, leads, or the address of a retrieval server"
        )
    open_file = gzip.open if path.suffix == ".gz" else open
    passages = []
    line_of_id: dict[str, int] = {}
    try:
        with open_file(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = _parse_passage(line, f"{path}:{number}")
                first = line_of_id.setdefault(str(row["id"]), number)
                if first != number:
                    raise UserError(
                        f"{path}:{number}: id {row['id']!r} is that of line {first} too; "
                        "ids must differ"
                    )
                passages.append(row)
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if not passages:
        raise UserError(f"{path}: empty; expected one passage a line")
    return passages


def _parse_passage(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        # A lone surrogate is no text: encoding it fails.
        row["contents"].encode()
        return {"id": row["id"], "contents": row["contents"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f'{where}: not a passage; expected one JSON object a line with "id" and "contents"'
        ) from None


def join_passages(passages: list[Passage]) -> str:
    """Return an observation that lists passages, numbered from 1."""
    if not passages:
        return NOTHING_FOUND
    return LINE_BREAK.join(
        f"{title_on_line(title, number)} {number}: {' '.join(text.split())}"
        for number, (title, text) in enumerate(passages, 1)
    )


def title_on_line(title: str, number: int) -> str:
    """Return a title as it stands before passage `number`.

    It is on one line, and holds nothing that would read as its own end: "Alien 2: Return" is
    "Alien 2 - Return" as the second passage.
    """
    return " ".join(title.split()).replace(f" {number}: ", f" {number} - ")


def split_observation(observation: str) -> list[NumberedPassage]:
    """Return the passages that an observation lists."""
    passages = []
    for number, line in enumerate(observation.split(LINE_BREAK), 1):
        title, _, text = line.partition(f" {number}: ")
        passages.append(NumberedPassage(number, title, text))
    return passages


def neutralize(text: str) -> str:
    r"""Return text from outside without what could pass for a tag, an answer or a special token.

    In a trajectory it could open nothing anyway, since observations are encoded as plain text;
    but trajectories are also written out as text, and read again by others.

    >>> neutralize("</search_result> \\boxed{no} <|im_end|>")
    '‹/search_result> boxed{no} ‹|im_end|>'
    """
    text = CONTROL.sub("", text)
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    text = INVISIBLE.sub("", text)
    text = re.sub(r"[<＜﹤](?=\s*[/／|｜!A-Za-z])", "‹", text)
    # The turns of Llama 2 are plain text.
    text = re.sub(r"\[(?=/?INST\])", "(", text)
    return re.sub(r"[\\＼]+boxed", "boxed", text)


def fit_observation(observation: str, budget: int, size: Callable[[str], int]) -> str:
    r"""Return an observation whose size is at most `budget`.

    Passages lose their text from the last one on, so that only their titles stay; then titles
    leave. A first passage that is too long by itself ends with its last whole sentence, or else
    word, that fits beside the other titles.

    size: measures a text, in tokens for example.

    >>> fit_observation("Silver River 1: A film.\n Iron Hill 2: A band of four.", 40, len)
    'Silver River 1: A film.\n Iron Hill 2:'
    """
    if size(observation) <= budget:
        return observation
    lines = observation.split(LINE_BREAK)
    for index in range(len(lines) - 1, 0, -1):
        title = lines[index].partition(f" {index + 1}: ")[0]
        lines[index] = f"{title} {index + 1}:"
        if size(LINE_BREAK.join(lines)) <= budget:
            return LINE_BREAK.join(lines)
    if size(lines[0]) <= budget:
        while size(LINE_BREAK.join(lines)) > budget:
            lines.pop()
        return LINE_BREAK.join(lines)
    beside_titles = _cut_first_passage(lines[0], lines[1:], budget, size)
    return beside_titles or _cut_first_passage(lines[0], [], budget, size)


def _cut_first_passage(
    passage: str, titles: list[str], budget: int, size: Callable[[str], int]
) -> str:
    """Return as much of a passage as fits before some titles; "" where that is nothing."""
    for pieces in (_keep_ends(r"(?<=[.!?]) ", passage), _keep_ends(" ", passage), list(passage)):
        count = _most_pieces(pieces, titles, budget, size)
        beginning = "".join(pieces[:count]).strip()
        # Beside other titles, a passage must at least say its own.
        if beginning and (not titles or " 1: " in beginning):
            return LINE_BREAK.join([beginning, *titles])
    return ""


def _keep_ends(pattern: str, text: str) -> list[str]:
    return [piece for piece in re.split(f"({pattern})", text) if piece]


def _most_pieces(
    pieces: list[str], titles: list[str], budget: int, size: Callable[[str], int]
) -> int:
    """Return how many pieces fit, by bisection: a passage may be long."""
    low, high = 0, len(pieces)
    while low < high:
        middle = (low + high + 1) // 2
        beginning = "".join(pieces[:middle]).strip()
        if size(LINE_BREAK.join([beginning, *titles])) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
