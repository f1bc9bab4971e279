r"""AutoCoA's SFT files, in and out.

Chains, with or without actions, are jsonl of {"messages": [{"role", "content"} ..]}. Pairs are a
json list of {"conversation": [{"from", "value"}], "chosen": {"from", "value"}, "rejected": {"from",
"value"}}. The one turn of their conversation is the question, <think>, and how both sides begin;
the authors' template cuts it at the last <think>. In these files a trajectory is text:

    <think> .. <begin_search> query </end_search> <search_result> .. </search_result> .. </think>
    .. \boxed{answer}
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import parse_json, read_jsonl, write_jsonl, write_text
from data.batches import Pair
from data.boxes import answer_in_box, closing_brace
from data.instructions import INSTRUCTIONS_END
from data.passages import BYTE_ORDER_MARK
from data.sft_data import SFTData
from data.trajectory import TAGS, Codec, Part, Role, Trajectory

EXPECTED = "AutoCoA's SFT rows, messages or conversation"
CLOSING_TAGS = {TAGS["search"]: TAGS["end_search"], TAGS["result"]: TAGS["end_result"]}
OPENING_TAG = re.compile("|".join(map(re.escape, CLOSING_TAGS)))
# Whose turn it is, by the names that conversations use.
SPEAKERS = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}


# ---- text to parts -------------------------------------------------------------------------------
def parse_trajectory(text: str, whole: bool = True) -> list[Part]:
    """Return the parts of a trajectory in its text form, for Codec.build.

    whole: it must end with an answer; else it is a beginning or a piece.
    Raises ValueError for text that is no trajectory.
    """
    text = text.strip().removeprefix(TAGS["think"])
    thoughts, closed, conclusion = text.rpartition(TAGS["end_think"])
    if not closed:
        thoughts = text
    parts = _parse_thoughts(thoughts)
    _refuse_stray_tags(parts)
    _refuse_unpaired_searches(parts, may_end_with_search=not closed)
    if closed:
        return parts + _parse_answer(conclusion)
    if whole:
        raise ValueError(f"no {TAGS['end_think']}")
    return parts


def _parse_thoughts(text: str) -> list[Part]:
    """Return thoughts, searches and results of a text, in time that grows with its length."""
    parts: list[Part] = []
    end = 0
    never_closed: set[str] = set()
    for opening in OPENING_TAG.finditer(text):
        tag = opening[0]
        if opening.start() < end or tag in never_closed:
            continue
        closing = text.find(CLOSING_TAGS[tag], opening.end())
        if closing < 0:
            # Not looked for again: a text of nothing but opening tags would take hours.
            never_closed.add(tag)
            continue
        thought = text[end : opening.start()].strip()
        if thought:
            parts.append(("think", thought))
        kind = "search" if tag == TAGS["search"] else "result"
        parts.append((kind, text[opening.end() : closing].strip()))
        end = closing + len(CLOSING_TAGS[tag])
    thought = text[end:].strip()
    if thought:
        parts.append(("think", thought))
    return parts


def _refuse_stray_tags(parts: list[Part]) -> None:
    # A thought may speak of the box, which is plain text there.
    tags = [tag for name, tag in TAGS.items() if name != "boxed"]
    for kind, text in parts:
        if kind != "result" and any(tag in text for tag in tags):
            raise ValueError("a tag that is not closed, or in the wrong place")


def _refuse_unpaired_searches(parts: list[Part], may_end_with_search: bool) -> None:
    """Raise ValueError unless every search has its result after it, and every result a search."""
    kinds = [kind for kind, _ in parts]
    if may_end_with_search and kinds and kinds[-1] == "search":
        kinds.pop()
    # An empty kind stands at either end, so that each kind has a neighbour on both sides.
    for before, kind in zip(["", *kinds], [*kinds, ""], strict=True):
        if (before == "search") != (kind == "result"):
            raise ValueError("a search without its result, or a result without a search")


def _parse_answer(text: str) -> list[Part]:
    """Return the parts after the thoughts: a conclusion, if any, and the answer in its box."""
    conclusion, boxed, rest = text.rpartition(TAGS["boxed"])
    answer = answer_in_box(rest)
    if not boxed or closing_brace(rest) == -1 or not answer:
        raise ValueError("no \\boxed{answer}")
    parts: list[Part] = []
    if conclusion.strip():
        parts.append(("conclude", conclusion.strip()))
    parts.append(("answer", answer))
    return parts


# ---- files in ------------------------------------------------------------------------------------
def read_json_rows(path: str | Path, expected: str, setting: str) -> list[tuple[int, Any]]:
    """Return (number, row) of a jsonl file, or of a json file that holds a list.

    expected: what a row should be, for the message.
    setting: the setting that named the file, for the message.
    Raises UserError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        text = text.lstrip(f"{BYTE_ORDER_MARK} \t\r\n")
        if text.startswith("["):
            return list(enumerate(parse_json(text), 1))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; expected {expected}") from None
    return read_jsonl(path, expected, setting)


def read_sft_files(codec: Codec, paths: Sequence[str | Path]) -> tuple[SFTData, list[str]]:
    """Read AutoCoA's SFT files.

    Returns the trajectories, and a message for each row that is no trajectory.
    Raises UserError for a file of another kind.
    """
    # A teacher may have kept no chain of a kind, and left an empty file for it.
    paths_to_read = [
        path for path in paths if not Path(path).is_file() or Path(path).stat().st_size
    ]
    if not paths_to_read:
        raise UserError(f"{', '.join(map(str, paths))}: empty; expected {EXPECTED}")
    data = SFTData()
    refusals = []
    for path in paths_to_read:
        for number, row in read_json_rows(path, EXPECTED, "sft_files"):
            try:
                _add_row(codec, row, data, f"{path}:{number}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                refusals.append(f"{path}:{number}: {error}")
    return data, refusals


def _add_row(codec: Codec, row: Any, data: SFTData, where: str) -> None:
    if "messages" in row:
        trajectory = _read_chain(codec, row)
        if trajectory.queries:
            data.chains_of_action.append(trajectory)
        else:
            data.chains_of_thought.append(trajectory)
    elif "chosen" in row:
        data.pairs.append(_read_pair(codec, row))
    else:
        raise UserError(
            f"{where}: neither messages nor chosen and rejected; expected AutoCoA's SFT rows"
        )


def _read_chain(codec: Codec, row: dict[str, Any]) -> Trajectory:
    turns = _turns(row, "messages", "role", "content")
    speakers = [speaker for speaker, _ in turns]
    if speakers != ["user", "assistant"]:
        # Of a longer conversation, the later questions may mean nothing by themselves.
        raise ValueError(f"not a question and its trajectory: the turns are {speakers[:5]}")
    (_, user_text), (_, assistant_text) = turns
    return codec.build(_question_of(user_text), parse_trajectory(assistant_text))


def _read_pair(codec: Codec, row: dict[str, Any]) -> Pair:
    turns = _turns(row, "conversation", "from", "value")
    speakers = [speaker for speaker, _ in turns]
    if speakers != ["user"]:
        raise ValueError(f"not a question alone: the turns of its conversation are {speakers[:5]}")
    _, user_text = turns[0]
    question, opened, beginning = user_text.rpartition(TAGS["think"])
    if not opened:
        # No beginning is shared: all that is there is the question.
        question = beginning
        beginning = ""
    pair = codec.build_pair(
        _question_of(question),
        parse_trajectory(beginning, whole=False),
        _read_side(row, "chosen"),
        _read_side(row, "rejected"),
    )
    if any(1 not in side.mask for side in pair):
        raise ValueError("an empty side")
    return pair


def _read_side(row: dict[str, Any], name: str) -> list[Part]:
    try:
        content = row[name]["value"]
    except (KeyError, TypeError):
        raise ValueError(f"{name} is not a turn with a value") from None
    return parse_trajectory(_plain_text(content), whole=False)


def _turns(row: dict[str, Any], key: str, speaker_key: str, text_key: str) -> list[tuple[str, str]]:
    """Return (speaker, text) of a conversation's turns, the system's left out.

    A speaker of another name stays as it is called. Raises ValueError for what is no conversation.
    """
    turns: list[tuple[str, str]] = []
    try:
        for turn in row[key]:
            speaker = SPEAKERS.get(turn[speaker_key], turn[speaker_key])
            if speaker != "system":
                turns.append((speaker, _plain_text(turn[text_key])))
    except (KeyError, TypeError):
        raise ValueError(
            f"{key} is not a list of turns with {speaker_key} and {text_key}"
        ) from None
    return turns


def _plain_text(content: Any) -> str:
    """Return the text of a turn, which may stand in pieces: [{"type": "text", "text"} ..].

    Raises ValueError for what is no text.
    """
    pieces = content if isinstance(content, list) else [{"text": content}]
    try:
        text = "".join(piece["text"] for piece in pieces)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate)") from None
    except (KeyError, TypeError):
        raise ValueError("a turn without a text") from None
    return text


def _question_of(user_text: str) -> str:
    """Return the question of a user's turn, without the authors' instructions before it.

    Our system prompt takes their place.
    Raises ValueError where it is empty.
    """
    question = user_text.rpartition(INSTRUCTIONS_END)[2].strip()
    if not question:
        raise ValueError("an empty question")
    return question


# ---- files out -----------------------------------------------------------------------------------
def trajectory_text(codec: Codec, trajectory: Trajectory) -> tuple[str, str]:
    """Return a trajectory as text: the question, and what the assistant says."""
    start = next(position for position, role in enumerate(trajectory.role) if role != Role.PROMPT)
    before, after = codec.prompt_frame()
    prompt = codec.decode(trajectory.ids[:start])
    question = prompt.removeprefix(codec.decode(before)).removesuffix(codec.decode(after))
    return question.strip(), TAGS["think"] + _decode_without_eos(codec, trajectory.ids[start:])


def _decode_without_eos(codec: Codec, ids: list[int]) -> str:
    return codec.decode([token for token in ids if token not in codec.eos_ids])


def write_sft_files(codec: Codec, folder: Path, data: SFTData) -> None:
    """Write AutoCoA's files into a folder: coa.jsonl, cot.jsonl, pairs.json, the non-empty ones."""
    _write_chains(codec, folder / "coa.jsonl", data.chains_of_action)
    _write_chains(codec, folder / "cot.jsonl", data.chains_of_thought)
    if data.pairs:
        rows = [_pair_row(codec, pair) for pair in data.pairs]
        write_text(folder / "pairs.json", json.dumps(rows, indent=1))


def _write_chains(codec: Codec, path: Path, chains: Iterable[Trajectory]) -> None:
    rows = []
    for trajectory in chains:
        question, assistant_text = trajectory_text(codec, trajectory)
        user_turn = {"role": "user", "content": question}
        assistant_turn = {"role": "assistant", "content": assistant_text}
        rows.append({"messages": [user_turn, assistant_turn]})
    if rows:
        write_jsonl(path, rows)


def _pair_row(codec: Codec, pair: Pair) -> dict[str, Any]:
    # The sides part where the first of them carries loss; an observation after that has mask 0,
    # but belongs to its side.
    part = min(side.mask.index(1) for side in pair)
    chosen, rejected = (_decode_without_eos(codec, side.ids[part:]) for side in pair)
    question, assistant_text = trajectory_text(codec, pair[0])
    beginning = assistant_text.removesuffix(chosen)
    return {
        "conversation": [{"from": "human", "value": question + beginning}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }
