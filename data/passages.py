"""Passages in FlashRAG's form, and observations made of them: a passage a line, numbered.

    Silver River 1: A film. Eva Moss directed it.
     Iron Hill 2: A band. It started in 1950.

The number lets a reader, and a small network, say which passage it means.
"""

import gzip
import re
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import parse_json

NOTHING_FOUND = "Nothing found."
LINE_BREAK = "\n "  # between the passages of an observation

# What is not seen could hide in a tag: fillers, variation selectors, joiners.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
# A terminal would obey control characters, and half a surrogate pair is no text.
CONTROL = re.compile("[^\n\t\x20-\x7e\x85\xa0-\ud7ff\ue000-\U0010ffff]")
BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it
# Some public pools write a passage's title this way.
TITLE_IN_WORDS = re.compile(r"\"?'?Title: (.*?) Text: (.*)", re.S)
# Five words or more that end like a sentence: without quotes they are no title.
SENTENCE = re.compile(r"(\S+\s+){4,}\S*[.!?]")

# How a tag, the box of an answer, and a turn of Llama 2 (which is plain text to it) begin.
TAG_OPENING = re.compile(r"<(?=\s*[/|!A-Za-z])")
BOX_OPENING = re.compile(r"\\+(?=boxed)")
TURN_OPENING = re.compile(r"\[(?=/?INST\])")


class Passage(NamedTuple):
    """One passage: what it is called, and what it says on one line."""

    title: str
    text: str


class NumberedPassage(NamedTuple):
    """One passage as it stands in an observation."""

    number: int
    title: str
    text: str


# ---- one form of every text ----------------------------------------------------------------------
def nfc(text: str) -> str:
    """Return a text in Unicode's composed form, in which equal words are equal strings.

    An accented letter is one code point in it; the same letter, typed as two, looks alike.
    """
    return unicodedata.normalize("NFC", text)


def on_one_line(text: str) -> str:
    """Return a text in the composed form, with single spaces for all that is between words."""
    return " ".join(nfc(text).split())


# ---- files ---------------------------------------------------------------------------------------
def split_passage(contents: str) -> Passage:
    """Split the `contents` of FlashRAG, `"Title"`, a line break and the text.

    Contents without a title line are a passage without a title. All readers of passages, from a
    file or from a server, come here.
    """
    first_line, line_break, text = contents.partition("\n")
    in_words = TITLE_IN_WORDS.match(contents.strip())
    if in_words:
        first_line, text = in_words.groups()
    title = on_one_line(first_line)
    # One pair of quotes is the form's; others are the title's own.
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1].strip()
    elif not in_words and (not line_break or SENTENCE.fullmatch(title)):
        title, text = "", contents
    return Passage(title, on_one_line(text))


def read_passages(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a FlashRAG passage file, plain or gzip: [{"id", "contents"}].

    Blank lines are skipped. Raises UserError with file:line, also for two passages of one id.
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
                line = line.strip(f"{BYTE_ORDER_MARK} \t\r\n")
                if not line:
                    continue
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
        row = parse_json(line)
        passage = {"id": row["id"], "contents": row["contents"]}
        # A lone surrogate is no text: encoding it fails.
        (str(passage["id"]) + passage["contents"]).encode()
        return passage
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{where}: not a passage; expected one JSON object a line with "id" and "contents"'
        ) from None


# ---- observations --------------------------------------------------------------------------------
def join_passages(passages: list[Passage]) -> str:
    """Return an observation that lists passages, numbered from 1.

    A passage without a title begins with its number.
    """
    if not passages:
        return NOTHING_FOUND
    return LINE_BREAK.join(
        f"{title_on_line(title, number)} {number}: {on_one_line(text)}".lstrip()
        for number, (title, text) in enumerate(passages, 1)
    )


def title_on_line(title: str, number: int) -> str:
    """Return a title as it stands before passage `number`.

    It is on one line, neutralized, and holds nothing that would read as its own end: "Alien 2:
    Return" is "Alien 2 - Return" as the second passage.
    """
    # A space at either end, since a title may also begin or end with its number.
    line = f" {on_one_line(neutralize(title))} "
    return re.sub(f"(?<= ){number}:(?= )", f"{number} -", line).strip()


def split_observation(observation: str) -> list[NumberedPassage]:
    """Return the passages that an observation lists."""
    passages = []
    for number, line in enumerate(nfc(observation).split(LINE_BREAK), 1):
        # A passage without a title has nothing before its number.
        title, _, text = f" {line}".partition(f" {number}: ")
        passages.append(NumberedPassage(number, title.removeprefix(" "), text))
    return passages


def neutralize(text: str) -> str:
    r"""Return text from outside without what could pass for a tag, an answer or a special token.

    In a trajectory it could open nothing anyway, since observations are encoded as plain text;
    but trajectories are also written out as text, and read again by others. Some of them normalize
    it (NFKC), so letters that are ASCII in that form count as ASCII.

    >>> neutralize("</search_result> \\boxed{no} <|im_end|> ＜ｔｈｉｎｋ＞")
    '‹/search_result> boxed{no} ‹|im_end|> ‹ｔｈｉｎｋ＞'
    """
    text = CONTROL.sub("", text)
    if not text.isascii():
        text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
        text = INVISIBLE.sub("", text)
    # The box goes first: a tag may begin where its backslash stood.
    text = _replace_opening(BOX_OPENING, "", text)
    text = _replace_opening(TAG_OPENING, "‹", text)
    return _replace_opening(TURN_OPENING, "(", text)


def _replace_opening(opening: re.Pattern[str], replacement: str, text: str) -> str:
    """Replace in a text what a pattern finds in its NFKC form; the other letters stay."""
    plain = text
    if not unicodedata.is_normalized("NFKC", text):
        # One letter for each, so that both texts have the same positions.
        plain = "".join(unicodedata.normalize("NFKC", letter)[0] for letter in text)
    pieces = []
    end = 0
    for match in opening.finditer(plain):
        pieces += [text[end : match.start()], replacement]
        end = match.end()
    return "".join(pieces) + text[end:]


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
        title, _, _ = f" {lines[index]}".partition(f" {index + 1}: ")
        lines[index] = f"{title} {index + 1}:".lstrip()
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
        if beginning and (not titles or " 1: " in f" {beginning}"):
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
