"""Properties of all that reads text or files from outside, tried on texts that hypothesis makes up.

A few hundred examples of each, the same ones in every run; ten thousand in the slow suite. What
they have found stands as examples in the tests of each file.
"""

import contextlib
import dataclasses
import functools
import json
import re
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.terminal import printable
from data import passages
from data.autocoa_files import parse_trajectory, read_sft_files, trajectory_text
from data.boxes import answer_in_box, closing_brace
from data.flashrag import read_questions
from data.passages import (
    Passage,
    fit_observation,
    join_passages,
    neutralize,
    nfc,
    on_one_line,
    read_passages,
    split_observation,
    split_passage,
    title_on_line,
)
from data.question_files import read_question_sets
from data.questions import Lookup
from data.scores import (
    ABBREVIATION,
    cover_match,
    exact_match,
    f1,
    find_spelling,
    is_common,
    normalize,
    overlap_match,
)
from data.sft_data import read_trajectories
from data.teacher import find_evidence
from data.trajectory import TAGS, Codec, Part, Role
from data.trajectory_rows import TrajectoryRow
from evaluation.viewer import compare_texts, render_page
from services.bm25 import BM25, UNSPACED, WORD_PATTERN, passage_words, query_words

# ---- what is made up -----------------------------------------------------------------------------
# What texts from outside hold that a reader could stumble over.
PITFALLS = [
    "}",
    "{",
    "\\text{",
    "<",
    "\\",
    "\uff1c\uff54\uff48\uff49\uff4e\uff4b\uff1e",
    "<|im_end|>",
    "[/INST]",
    "\n",
    "\n ",
    "\r\n",
    " 1: ",
    " 2: ",
    '"',
    "e\u0301",
    "\u202e",
    "\u200b",
    "\u2028",
    "\x00",
    "\x1b[2J",
    "\ufeff",
    "\u6771\u4eac\u90fd",
    "\u0e17\u0e35\u0e48",
    "The Who",
    "IN",
    "in the",
    "Title: ",
    " Text: ",
]
# Half a surrogate pair is no text, but JSON can spell it.
HALVES = ["\ud83d", "\udc00"]


def texts(pitfalls: list[str], min_size: int = 0) -> st.SearchStrategy[str]:
    """Return texts of some pitfalls and any letters."""
    pieces = st.sampled_from([*pitfalls, "a", " ", "Mill "]) | st.characters(codec="utf-8")
    return st.lists(pieces, min_size=min_size, max_size=6).map("".join)


TEXT = texts([*PITFALLS, *TAGS.values()])
BROKEN_TEXT = texts([*PITFALLS, *TAGS.values(), *HALVES])
# What a part of a trajectory may be: it says something, and holds no tag.
PLAIN = (
    texts(PITFALLS, min_size=1)
    .map(str.strip)
    .filter(lambda text: text and not any(tag in text for tag in TAGS.values()))
)
# Answers whose braces are in pairs.
ANSWERS = (
    st.lists(st.sampled_from(["a", "B", " ", "5{,}0", "\\frac{1}{2}", "{x{y}}", "{}"]), min_size=1)
    .map("".join)
    .map(str.strip)
    .filter(bool)
)
PASSAGES = st.lists(st.builds(Passage, TEXT, TEXT), min_size=1, max_size=3)
OTHER_JSON = st.sampled_from([None, True, 3, float("inf"), "", [], {}, [3], {"a": 1}, [None], [[]]])


def objects(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return JSON objects with these fields, some of which are missing or of another kind."""
    odd_fields = {name: values | OTHER_JSON for name, values in fields.items()}
    return (
        st.fixed_dictionaries(fields) | st.fixed_dictionaries({}, optional=odd_fields) | OTHER_JSON
    )


QUESTION_ROWS = objects(
    id=BROKEN_TEXT | st.integers(),
    question=BROKEN_TEXT,
    golden_answers=st.lists(BROKEN_TEXT, min_size=1, max_size=2),
    metadata=objects(
        gold_titles=st.lists(BROKEN_TEXT, max_size=2),
        gold_ids=st.lists(BROKEN_TEXT, max_size=1),
        supporting_facts=objects(title=st.lists(BROKEN_TEXT, max_size=1)),
    ),
)
SPEAKERS = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool"])
MESSAGES = st.lists(objects(role=SPEAKERS, content=BROKEN_TEXT), max_size=3)
TURN = objects(**{"from": SPEAKERS, "value": BROKEN_TEXT})
SFT_ROWS = objects(messages=MESSAGES) | objects(
    conversation=st.lists(TURN, max_size=2), chosen=TURN, rejected=TURN
)


@st.composite
def whole_parts(draw: st.DrawFn) -> list[Part]:
    """Return the parts of a whole trajectory: thoughts, actions with observations, an answer."""
    parts: list[Part] = []
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            parts.append(("think", draw(PLAIN)))
        parts.append(("search", draw(PLAIN)))
        parts.append(("result", neutralize(draw(TEXT)).strip()))
    if draw(st.booleans()):
        parts.append(("think", draw(PLAIN)))
    if draw(st.booleans()):
        parts.append(("conclude", draw(PLAIN)))
    return [*parts, ("answer", draw(ANSWERS))]


Try = Callable[..., None]


@pytest.fixture(params=[200, pytest.param(10_000, marks=pytest.mark.slow)])
def holds_for(request: pytest.FixtureRequest) -> Try:
    """Return a function that tries a property on so many examples of some strategies."""

    def try_examples(holds: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
        tried = settings(
            max_examples=request.param,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        tried(given(*strategies)(holds))()

    return try_examples


# ---- scores --------------------------------------------------------------------------------------
def test_scores(holds_for: Try) -> None:
    """Each lies between 0 and 1, and what matches exactly matches by every score."""

    def check(answer: str, golden: list[str]) -> None:
        assert normalize(normalize(answer)) == normalize(answer)
        is_exact = exact_match(answer, golden)
        for score in (f1, cover_match):
            assert is_exact <= score(answer, golden) <= 1
        assert overlap_match(answer, golden) in (0.0, 1.0)
        assert exact_match(answer, [*golden, answer]) == 1

    holds_for(check, TEXT, st.lists(TEXT, min_size=1, max_size=3))


def test_spelling(holds_for: Try) -> None:
    """It is found where scoring would find it, but for names that are told by their capitals."""

    def check(before: str, answer: str, after: str) -> None:
        text = f"{before} {answer} {after}"
        spelling = find_spelling(text, answer)
        searched = normalize(nfc(answer))
        assert spelling in " ".join(nfc(text).split())
        assert f" {searched} " in f" {normalize(spelling)} " or not spelling
        name = nfc(answer).strip(string.punctuation)
        if searched and not is_common(answer) and not ABBREVIATION.fullmatch(name):
            padded = f" {normalize(nfc(text))} "
            assert bool(spelling) == (f" {searched} " in padded)

    holds_for(check, TEXT, TEXT, TEXT)


# ---- text from outside ---------------------------------------------------------------------------
def test_any_text_is_made_harmless(holds_for: Try) -> None:
    """Neutral text holds no tag, whatever becomes of it; printable text steers nothing.

    Both can be encoded, and stay as they are.
    """

    def check(text: str) -> None:
        neutral = neutralize(text)
        neutral.encode()
        assert neutralize(neutral) == neutral
        for form in ("NFC", "NFKC"):
            plain = unicodedata.normalize(form, neutral)
            for opening in (passages.TAG_OPENING, passages.BOX_OPENING, passages.TURN_OPENING):
                assert not opening.search(plain)
        shown = printable(text)
        shown.encode()
        assert printable(shown) == shown
        assert not set(shown) & set("\x00\x1b\r\x9b\u202e\u2066\u2028")

    holds_for(check, BROKEN_TEXT)


def test_any_contents_of_a_passage(holds_for: Try) -> None:
    """Title and text are on one line, and the same in both Unicode forms.

    Words are taken apart in other scripts only, and a query holds all that its passage would.
    """

    def check(contents: str) -> None:
        passage = split_passage(contents)
        for text in passage:
            assert text == on_one_line(text)
        assert split_passage(unicodedata.normalize("NFD", contents)) == passage
        if not UNSPACED.search(nfc(contents)):
            assert passage_words(contents) == query_words(contents) == nfc(contents)
        words = re.findall(WORD_PATTERN, passage_words(contents))
        assert set(words) <= set(re.findall(WORD_PATTERN, query_words(contents)))

    holds_for(check, TEXT)


def test_any_observation(holds_for: Try) -> None:
    """Its passages are read again by number and title, it fits, and quotes stand in a passage."""

    def check(listed: list[Passage], budget: int, evidence: str) -> None:
        observation = neutralize(join_passages(listed))
        read = split_observation(observation)
        assert [passage.number for passage in read] == list(range(1, len(listed) + 1))
        for passage, (title, _) in zip(read, listed, strict=True):
            assert passage.title == title_on_line(title, passage.number)
        fitted = fit_observation(observation, budget, len)
        assert len(fitted) <= budget
        assert fitted == observation or len(observation) > budget
        lookup = Lookup("?", ["x"], title=listed[0].title, evidence=[evidence])
        quote = find_evidence(lookup, observation)
        assert any(quote in on_one_line(passage.text) for passage in read)

    holds_for(check, PASSAGES, st.integers(0, 60), TEXT)


# ---- boxes and trajectories ----------------------------------------------------------------------
def test_answers_in_boxes(holds_for: Try) -> None:
    """An answer with its own braces is read from its box, whatever comes after it."""

    def check(answer: str, rest: str) -> None:
        assert answer_in_box(f" {answer}}}{rest}") == answer
        assert closing_brace(f"{answer}}}{rest}") == len(answer)

    holds_for(check, ANSWERS, TEXT)


def test_whole_trajectories(holds_for: Try, codec: Codec) -> None:
    """Each token has its role and mask, tags are single tokens, the answer is read again.

    Written as text and parsed, the parts are the same.
    """
    tag_ids = {codec.tokenizer.convert_tokens_to_ids(tag) for tag in TAGS.values()}

    def check(question: str, parts: list[Part]) -> None:
        trajectory = codec.build(question, parts)
        assert len(trajectory.ids) == len(trajectory.role) == len(trajectory.mask)
        assert codec.is_well_formed(trajectory)
        assert codec.answer(trajectory) == parts[-1][1]
        decoded = codec.decode(trajectory.ids)
        # The letter U+FFFD itself looks like one that is not finished.
        if "\ufffd" not in decoded:
            assert "".join(codec.pieces(trajectory.ids)) == decoded
        assert trajectory.queries == [text for kind, text in parts if kind == "search"]
        # A tag for the prompt's end, the thoughts' end and the box, four for each action.
        tags = [token for token in trajectory.ids if token in tag_ids]
        assert len(tags) == 3 + 4 * len(trajectory.queries)
        for mask, role in zip(trajectory.mask, trajectory.role, strict=True):
            assert mask == (role not in (Role.PROMPT, Role.OBSERVATION))
        written_question, text = trajectory_text(codec, trajectory)
        assert written_question == question
        assert parse_trajectory(text) == parts

    holds_for(check, PLAIN, whole_parts())


def test_any_text_in_a_trajectory(holds_for: Try, codec: Codec) -> None:
    """It is refused as a trajectory, or its parts can be built.

    As an observation it stands between two tags, in which no token is one; as a query it is read
    again.
    """

    def check(text: str, query: str, whole: bool) -> None:
        with contextlib.suppress(ValueError):
            trajectory = codec.build("Who?", parse_trajectory(text, whole))
            assert codec.is_well_formed(trajectory) or not whole
        first, *inside, last = codec.wrap_observation(text)
        assert (first, last) == (codec.result_id, codec.end_result_id)
        assert not set(inside) & set(codec.tokenizer.all_special_ids)
        assert codec.decode(inside).strip() == text.strip()
        assert codec.last_query(codec.build("Who?", [("search", query)]).ids) == query

    holds_for(check, TEXT, PLAIN, st.booleans())


# ---- files ---------------------------------------------------------------------------------------
def read_or_refuse(read: Callable[[], Any]) -> Any:
    """Return what is read, None where one line says why it is not."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error)
        str(error).encode()
        return None


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines, after a byte order mark."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text("\ufeff" + text, encoding="utf-8")
    return path


def test_any_passage_file(holds_for: Try, tmp_path: Path) -> None:
    """It is read, or one line says what is wrong with it."""
    rows = st.lists(objects(id=BROKEN_TEXT | st.integers(), contents=BROKEN_TEXT), max_size=3)

    def check(rows: list[Any]) -> None:
        read = read_or_refuse(lambda: read_passages(write_lines(tmp_path / "p.jsonl", rows)))
        for row in read or []:
            "".join(split_passage(row["contents"])).encode()

    holds_for(check, rows)


def test_any_bytes(holds_for: Try, tmp_path: Path) -> None:
    """A file of any bytes is read, or one line says what is wrong with it."""
    path = tmp_path / "x.jsonl"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for read in (read_passages, read_questions, read_trajectories):
            read_or_refuse(functools.partial(read, path))

    holds_for(check, st.binary(max_size=20) | TEXT.map(str.encode))


def test_any_question_file(holds_for: Try, tmp_path: Path) -> None:
    """It is read, or one line says what is wrong with it; what is read can be searched for."""

    def check(rows: list[Any]) -> None:
        path = tmp_path / "hotpotqa.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for question in read_or_refuse(lambda: read_questions(path)) or []:
            json.dumps(dataclasses.asdict(question), ensure_ascii=False).encode()
            assert question.golden_answers
            assert all(lookup.queries for lookup in question.lookups)

    holds_for(check, st.lists(QUESTION_ROWS, min_size=1, max_size=2))


@pytest.mark.slow
def test_any_parquet_file(holds_for: Try, tmp_path: Path) -> None:
    """Whatever its columns hold: the same holds for it."""
    path = tmp_path / "x.parquet"
    numbers = st.integers(0, 9)
    answers = TEXT | st.lists(TEXT, max_size=2) | numbers | st.none()
    turn = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT | st.none()})
    columns = {
        "id": TEXT | numbers | st.none(),
        "source_file": TEXT | st.none(),
        "data_source": TEXT | numbers | st.none(),
        "prompt": TEXT | st.lists(turn, max_size=2) | st.none(),
        "reward_model": TEXT | st.fixed_dictionaries({"ground_truth": answers}),
        "extra_info": TEXT | st.fixed_dictionaries({"split": TEXT | numbers}),
        "metadata": TEXT | st.fixed_dictionaries({"gold_titles": answers}),
    }

    def check(row: dict[str, Any]) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        sets = read_or_refuse(lambda: read_question_sets([path], "--data")) or {}
        for name, (question,) in sets.items():
            assert question.id.startswith(f"{name}:")
            assert question.golden_answers
            assert name.isprintable()

    needed = {name: columns.pop(name) for name in ("prompt", "reward_model")}
    holds_for(check, st.fixed_dictionaries(needed, optional=columns))


def test_any_sft_file(holds_for: Try, tmp_path: Path, codec: Codec) -> None:
    """Each of its rows is read or left out with one line, or one line refuses the file."""
    path = tmp_path / "x.json"

    def check(rows: list[Any]) -> None:
        path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
        result = read_or_refuse(lambda: read_sft_files(codec, [path]))
        if result is None:
            return
        data, refusals = result
        read = len(data.chains_of_action) + len(data.chains_of_thought) + len(data.pairs)
        assert read + len(refusals) == len(rows)
        for refusal in refusals:
            refusal.encode()
            assert "\n" not in refusal

    holds_for(check, st.lists(SFT_ROWS, max_size=3))


def test_any_trajectory_file(holds_for: Try, tmp_path: Path) -> None:
    """It is read, with a mask and a role for each token, or one line says what is wrong with it."""
    columns = st.lists(st.integers(0, 4), max_size=3)
    path = tmp_path / "coa.jsonl"

    def check(row: Any) -> None:
        path.write_text(json.dumps(row))
        for trajectory in read_or_refuse(lambda: read_trajectories(path)) or []:
            assert len(trajectory.ids) == len(trajectory.mask) == len(trajectory.role)

    holds_for(check, objects(ids=columns, mask=columns, role=columns))


def test_rows_of_rollouts(holds_for: Try) -> None:
    """A row is the same as JSON, and its page holds nothing that steers it."""

    def check(text: str, tokens: list[str], step: int | None) -> None:
        row = TrajectoryRow(
            step=step,
            question=text,
            golden_answers=[text],
            reward=0.5,
            text=text,
            ids=[5] * len(tokens),
            role=[1] * len(tokens),
            mask=[1] * len(tokens),
            tokens=tokens,
        )
        assert TrajectoryRow.from_json(row.to_json()) == row
        page = render_page({text: [row]})
        page.encode()
        assert not set(page) & set("\x00\x1b\u202e")

    holds_for(check, BROKEN_TEXT, st.lists(BROKEN_TEXT, max_size=3), st.none() | st.integers())


def test_compared_texts(holds_for: Try) -> None:
    """The pieces of each side are the whole text, but for spaces before the first word."""

    def check(real: str, imagined: str) -> None:
        comparison = compare_texts("?", real, imagined)
        for pieces, text in ((comparison.real, real), (comparison.imagined, imagined)):
            assert "".join(piece.text for piece in pieces) == text.lstrip()

    holds_for(check, TEXT, TEXT)


# ---- search --------------------------------------------------------------------------------------
def test_any_passages_are_searched(holds_for: Try) -> None:
    """Whatever is in them: each is found by its own contents, in either Unicode form."""

    def check(texts: list[str]) -> None:
        rows = [{"id": str(number), "contents": text} for number, text in enumerate(texts)]
        try:
            search = BM25(rows, 1)
        except UserError:
            # No word is in any of them.
            return
        for form in ("NFC", "NFD"):
            queries = [unicodedata.normalize(form, text) for text in texts]
            for query, observation in zip(queries, search(queries), strict=True):
                has_word = any(letter.isalnum() for letter in nfc(query))
                assert (observation.text != passages.NOTHING_FOUND) == has_word

    holds_for(check, st.lists(TEXT, min_size=1, max_size=3))
