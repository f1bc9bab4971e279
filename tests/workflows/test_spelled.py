"""An agent that spells its tags: how it is asked, what it reads, and what counts as its answer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from conftest import CPU
from scripted_decoder import ScriptedDecoder
from small_checkpoint import save_checkpoint

import model
from autocoa import Row
from common.errors import UserError
from common.settings import RolloutSettings
from data.instructions import authors_turn
from data.trajectory import TAGS, Observation, Role, Trajectory
from model import LM
from tools import library
from workflows import spelled
from workflows.spelled import (
    SpelledAgent,
    Turn,
    answer_spelled,
    authors_answer,
    authors_prompt,
)

TRIMS = "{% for m in messages %}<s>{{ m.content | trim }}</s>{% endfor %}"
OPENS_THOUGHT = (
    "{% for m in messages %}<s>{{ m.content.split('</think>')[-1] if m.role == 'assistant' else "
    "m.content }}{% endfor %}<s><think>\n"
)
PASSAGES = [{"id": "0", "contents": '"Silver River"\nA film. Its director is Eva Moss.'}]
FOUND = '\n\n<search_result> result 1: "Silver River"\nA film. Its director is Eva Moss.'
SETTINGS = RolloutSettings(max_len=1600, max_observation=60, max_actions=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spelled") / "checkpoint"
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> LM:
    return model.load_pretrained(str(checkpoint), CPU)


@pytest.mark.parametrize("has_thoughts", [False, True])
def test_the_prompt_is_as_transformers_encodes_it(
    checkpoint: Path, tmp_path: Path, has_thoughts: bool
) -> None:
    """With the checkpoint's own tokenizer, which knows no tag, or those of thoughts alone.

    Guards: new tokens in the place of text that a checkpoint was trained on.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = OPENS_THOUGHT if has_thoughts else TRIMS
    if has_thoughts:
        tokenizer.add_tokens(["<think>", "</think>"])
    turns = [{"role": "user", "content": authors_turn("Who wrote The Clay Hour?")}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]

    theirs = set(tokenizer.get_vocab())
    new = [tag for tag in TAGS.values() if tag not in theirs]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": new}, replace_extra_special_tokens=False
    )
    codec = model.Codec(tokenizer)
    assert authors_prompt(codec, "Who wrote The Clay Hour?") == expected


def script(lm: LM, monkeypatch: pytest.MonkeyPatch, *lines: str) -> ScriptedDecoder:
    """Let each row write a line, its tags letter by letter, and end."""
    decoder = ScriptedDecoder(lm.codec, *lines, burst=7)
    decoder.lines = [[*lm.codec.encode_exactly(line), lm.codec.eos_id] for line in lines]
    monkeypatch.setattr(lm, "decoder", decoder, raising=False)
    return decoder


def test_an_action_that_is_spelled(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool answers where it ends; at the last call it is told so, and goes on to an answer."""
    first = "Hm > 1 <begin_search> Silver River</end_search>"
    second = "So <begin_search>Eva</end_search>"
    answer = "It is Eva.</think> It is \\boxed{Eva Moss}"
    decoder = script(lm, monkeypatch, first + second + answer)
    search = library(PASSAGES, 1)
    ((found, trajectory),) = answer_spelled(lm, ["Who?"], search, SETTINGS, seed=0)
    assert found == "Eva Moss"
    assert trajectory.queries == ["Silver River"]
    (row,) = decoder.first_rows
    prompt = authors_prompt(lm.codec, "Who?")
    assert lm.codec.decode(row["seen"][len(prompt) :]) == (
        f"{first}{FOUND} </search_result>\n\n\n\n"
        f"{second}\n\n<search_result> Reach the limit of search times. </search_result>\n\n"
        f"{answer}</s>"
    )
    assert trajectory.ids == row["seen"]
    assert set(row["temperatures"]) == {0.6}
    shown = [
        token
        for token, role in zip(trajectory.ids, trajectory.role, strict=True)
        if role == Role.OBSERVATION
    ]
    assert lm.codec.decode(shown).count("search_result>") == 4


def test_after_the_limit_nothing_is_searched(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes then is taken as it is, another call too, and it is told once."""
    action = "<begin_search>Eva</end_search>"
    rest = f" Well. {action} It is Eva.</think> \\boxed{{Eva Moss}}"
    script(lm, monkeypatch, action + action + rest)
    ((found, trajectory),) = answer_spelled(lm, ["Who?"], library(PASSAGES, 1), SETTINGS, seed=0)
    assert (found, trajectory.queries) == ("Eva Moss", ["Eva"])
    text = lm.codec.decode(trajectory.ids)
    assert text.count("Reach the limit") == 1
    assert text.endswith(f"{rest}</s>")


class LetterCodec:
    """A token for each letter, and one for ">" and two line breaks, as Qwen's tokenizers have."""

    END = 1_000_000
    eos_ids = (0,)

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(get_vocab=lambda: {">": ord(">"), ">\n\n": self.END})

    def encode_exactly(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(">\n\n" if token == self.END else chr(token) for token in ids)

    def fit(self, text: str, limit: int) -> str:
        return text


def test_line_breaks_in_the_token_that_ends_a_tag() -> None:
    """Guards: four before a result, where the authors, who cut after the tag, write two."""
    codec: Any = LetterCodec()
    agent = SpelledAgent(codec, SETTINGS)
    row = Row(Trajectory(), workflow=Turn(0, 2048))
    action = "<begin_search>Silver River</end_search"
    ids = [*codec.encode_exactly(action), codec.END]
    agent.continue_row(row, ids, [0.0] * len(ids), spent=False)
    assert row.query == "Silver River"
    agent.read_observation(row, Observation("no passage"))
    text = codec.decode(row.trajectory.ids)
    assert text.startswith(f"{action}>\n\n<search_result>")


def test_an_empty_query_is_none(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is searched for, nor is what the turn asks after it."""
    line = "<begin_search> </end_search> Hm <begin_search>Eva</end_search></think> \\boxed{Eva}"
    script(lm, monkeypatch, line)
    ((found, trajectory),) = answer_spelled(lm, ["Who?"], library(PASSAGES, 1), SETTINGS, seed=0)
    assert (found, trajectory.queries) == ("Eva", [])


def test_turns_have_lengths_of_their_own(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that is not over by then ends the row, wherever the whole budget is."""
    monkeypatch.setattr(spelled, "FIRST_TURN", 60)
    monkeypatch.setattr(spelled, "LATER_TURN", 20)
    action = "<begin_search>Eva</end_search>"
    script(lm, monkeypatch, "so " * 300, action + "so " * 300)
    search = library(PASSAGES, 1)
    (_, long), (_, later) = answer_spelled(lm, ["Who?"] * 2, search, SETTINGS, seed=0)
    assert long.role.count(Role.THINK) == 60
    action_length = len(lm.codec.encode_exactly(action))
    assert later.role.count(Role.THINK) == action_length + 20


def test_what_ends_a_row(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own end, a result without room, and no room at all; each row is its own.

    What looks like a call after the thoughts is none.
    """
    action = "<begin_search>Silver River</end_search>"
    script(lm, monkeypatch, "</think> Eva.", "so " * 80 + action, "so " * 300, f"</think> {action}")
    length = len(authors_prompt(lm.codec, "Who?"))
    settings = RolloutSettings(max_len=length + 200, max_observation=150)
    search = library([{"id": "0", "contents": f'"Silver River"\n{"Eva Moss. " * 40}'}], 1)
    answers = answer_spelled(lm, ["Who?"] * 4, search, settings, seed=0)
    assert [answer for answer, _ in answers] == ["Eva", "", "", ""]
    assert [len(trajectory.queries) for _, trajectory in answers] == [0, 1, 0, 0]
    assert max(len(trajectory.ids) for _, trajectory in answers) <= settings.max_len
    with pytest.raises(UserError, match=r"max_len: \d+ leaves no room for a prompt"):
        answer_spelled(lm, ["Who?"], search, RolloutSettings(max_len=length), seed=0)


def test_sampling_depends_on_seed_and_question(lm: LM) -> None:
    """Not on what is asked beside it. Guards: an evaluation that goes on with other answers."""
    length = len(authors_prompt(lm.codec, "Who wrote it?"))
    settings = RolloutSettings(max_len=length + 22)

    def texts(questions: list[str], seed: int) -> list[str]:
        answers = answer_spelled(lm, questions, library(PASSAGES, 1), settings, seed)
        return [json.dumps(trajectory.ids) for _, trajectory in answers]

    both = texts(["Who wrote it?", "Where?"], 0)
    assert texts(["Where?"], 0) == both[1:]
    assert texts(["Where?"], 1) != both[1:]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Hm</think> \\boxed{A} or \\boxed{Eva Moss}.", "Eva Moss"),
        ("Hm</think> \\boxed{\\text{Eva} Moss}.", "\\text{Eva"),
        ("Hm</think> \\boxed{Eva Moss} and \\boxed{x", "Eva Moss"),
        ("Hm</think>She is it. So \\boxed{Eva Moss", "She is it"),
        ("\\boxed{A}</think> So the answer is Eva Moss. Yes.", "Eva Moss"),
        ("Hm</think> Thus, Eva Moss. Yes.", "Eva Moss"),
        ("Hm</think>\n\nShe is it. Eva Moss.", "Eva Moss"),
        ("Hm</think>Eva Moss", "Eva Moss"),
        ("Hm</think>", ""),
        ("Hm \\boxed{Eva}", ""),
        ("Hm</think><begin_search>x</end_search> \\boxed{Eva}", ""),
    ],
)
def test_the_answer_that_the_authors_read(text: str, answer: str) -> None:
    """The last box after the thoughts, a phrase, or the last whole sentence.

    A box ends at its first brace and counts only where it is closed, as in their code.
    """
    assert authors_answer(text) == answer
