r"""AutoCoA's SFT files, in and out (data/autocoa_files.py)."""

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data.autocoa_files import parse_trajectory, read_sft_files, write_sft_files
from data.boxes import answer_in_box, closing_brace
from data.pairs import contrastive_pairs
from data.questions import facts_by_id
from data.sft_data import SFTData
from data.teacher import recall_chain, write_chains
from data.trajectory import TAGS, Codec, Role, Trajectory
from nano.questions import draw_questions
from nano.tokenizer import tokenizer_texts, train_tokenizer
from nano.world import World
from tools import library

WORLD = World(0, "train")
QUESTIONS = [
    question
    for name in ("single", "typed", "bridge", "compare", "chain")
    for question in draw_questions(WORLD, name, 20, random.Random(name))
]
# The structure of a released row, in words of our own.
RELEASED_TEXT = """<think>
Hm, who wrote it? I think I should look.

<begin_search>The Clay Hour author</end_search>

<search_result> result 1: "The Clay Hour"
A novel by Orla Venn, whose {best} friend was Ivo.
result 2: "Clay"
A soil. </search_result>


So it is Orla Venn.
</think>

The author of the novel is Orla Venn.

\\boxed{Orla {the elder} Venn}"""
RELEASED_PROMPT = (
    "You may search the web.\n\n"
    "Now, please answer the user's question below: \nWho wrote The Clay Hour?"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<s>assistant\n"
)


@pytest.fixture(scope="module")
def nano() -> Any:
    return Codec(train_tokenizer(2048, tokenizer_texts(WORLD)))


@pytest.fixture(scope="module")
def chat() -> Any:
    """Return the codec of a checkpoint's tokenizer: a chat template, and tags added later."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast_tokenizer.chat_template = CHAT_TEMPLATE
    fast_tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS.values())})
    return Codec(fast_tokenizer)


def columns(trajectories: Any) -> list[Any]:
    """Return ids, roles and masks, to compare."""
    return [(trajectory.ids, trajectory.role, trajectory.mask) for trajectory in trajectories]


def chain_row(text: Any, question: str = "Who?") -> dict[str, Any]:
    """Return a row of AutoCoA's chains."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text},
        ]
    }


def pair_row(beginning: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """Return a row of AutoCoA's pairs."""
    return {
        "conversation": [{"from": "human", "value": beginning}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def write_rows(path: Path, *rows: Any) -> Any:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- there and back ------------------------------------------------------------------------------
def test_there_and_back(nano: Any, tmp_path: Path) -> None:
    """Chains and pairs as AutoCoA's files and read again: the same ids, roles and masks."""
    known = set(facts_by_id(QUESTIONS[::2]))
    chains, _ = write_chains(nano, QUESTIONS, known, library(WORLD.passages(), 2))
    recalled = dict.fromkeys(facts_by_id(QUESTIONS), "Eva Moss")
    all_ids = {question.id for question in QUESTIONS}
    acting_chosen, thinking_chosen = contrastive_pairs(nano, QUESTIONS, recalled, all_ids)
    data = SFTData(
        [chain for _, chain in chains if chain.queries],
        [
            recall_chain(nano, question)
            for question in QUESTIONS
            if question.conclusion or len(question.facts) == 1
        ],
        acting_chosen + thinking_chosen,
    )
    assert len(data.chains_of_action) > 40
    assert len(data.chains_of_thought) > 20
    assert len(data.pairs) > 50
    write_sft_files(nano, tmp_path, data)
    paths = [tmp_path / name for name in ("coa.jsonl", "cot.jsonl", "pairs.json")]
    read, refusals = read_sft_files(nano, paths)
    assert refusals == []
    assert columns(read.chains_of_action) == columns(data.chains_of_action)
    assert columns(read.chains_of_thought) == columns(data.chains_of_thought)
    assert [columns(pair) for pair in read.pairs] == [columns(pair) for pair in data.pairs]
    for chain in data.chains_of_action:
        assert chain.ids.index(nano.think_id) == chain.role.index(Role.THINK) - 1


def test_only_what_is_there_is_written(nano: Any, tmp_path: Path) -> None:
    """No empty file, which would be no file of AutoCoA's."""
    chain = nano.build("Who?", [("think", "Hm"), ("answer", "Eva")])
    write_sft_files(nano, tmp_path, SFTData(chains_of_thought=[chain]))
    assert [path.name for path in tmp_path.iterdir()] == ["cot.jsonl"]


def test_pairs_of_others_there_and_back(chat: Any, tmp_path: Path) -> None:
    """Pairs that share nothing, and sides that hold an observation or end the turn.

    They are written as they were read. Guards: the chosen side in the conversation too, and its
    observation lost.
    """
    chosen = (
        " I look.<begin_search> Clay</end_search><search_result> A soil.</search_result>"
        " So.</think>\\boxed{ Orla}"
    )
    rows = [
        pair_row("Who?<think>", chosen, " I know.</think>\\boxed{ Ivo}"),
        pair_row("Who?<think> Hm.", chosen, " I know."),
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    data, refusals = read_sft_files(chat, [tmp_path / "x.json"])
    write_sft_files(chat, tmp_path, data)
    assert refusals == []
    assert json.loads((tmp_path / "pairs.json").read_text()) == rows


# ---- rows as the authors released them -----------------------------------------------------------
def test_a_released_row(chat: Any, tmp_path: Path) -> None:
    """The authors' instructions make room for ours, and observations carry no loss.

    What is said before the box does, and braces inside the box stay.
    """
    path = write_rows(tmp_path / "x.jsonl", chain_row(RELEASED_TEXT, RELEASED_PROMPT))
    data, refusals = read_sft_files(chat, [path])
    assert refusals == []
    assert (data.chains_of_thought, data.pairs) == ([], [])
    (chain,) = data.chains_of_action
    start = chain.role.index(Role.THINK)
    assert chain.ids[:start] == chat.prompt("Who wrote The Clay Hour?")
    assert set(chain.role[:start]) == {Role.PROMPT}
    assert chain.queries == ["The Clay Hour author"]
    assert "{best} friend" in chain.observations[0].text
    text_of_role = {}
    for role in Role:
        tokens = zip(chain.ids, chain.role, strict=True)
        text_of_role[role] = chat.decode([token for token, whose in tokens if whose == role])
    assert text_of_role[Role.ACTION] == "<begin_search> The Clay Hour author</end_search>"
    assert text_of_role[Role.OBSERVATION].endswith("A soil.</search_result>")
    assert text_of_role[Role.ANSWER] == "\\boxed{ Orla {the elder} Venn}</s>"
    conclusion = "</think> The author of the novel is Orla Venn."
    assert text_of_role[Role.THINK].endswith(conclusion)
    for mask, role in zip(chain.mask, chain.role, strict=True):
        assert mask == (0 if role in (Role.PROMPT, Role.OBSERVATION) else 1)
    assert chat.is_well_formed(chain)


def learned_text(codec: Codec, trajectory: Trajectory) -> Any:
    """Return the text of the tokens that carry loss."""
    tokens = zip(trajectory.ids, trajectory.mask, strict=True)
    return codec.decode([token for token, mask in tokens if mask]).strip()


def test_a_released_pair_with_a_shared_beginning(chat: Any, tmp_path: Path) -> None:
    """It stands after <think> in the human's turn, and may hold a search.

    Only the two ends are learned. Guards: the beginning taken for a part of the question.
    """
    beginning, _, _ = RELEASED_TEXT.partition("So it is")
    action = "<begin_search>Orla</end_search>"
    row = pair_row(f"{RELEASED_PROMPT}\n{beginning}", "So it is Orla.", action)
    (tmp_path / "x.json").write_text(json.dumps([row]))
    data, refusals = read_sft_files(chat, [tmp_path / "x.json"])
    assert refusals == []
    ((chosen, rejected),) = data.pairs
    assert learned_text(chat, chosen) == "So it is Orla."
    assert learned_text(chat, rejected) == "<begin_search> Orla</end_search>"
    prompt = chat.prompt("Who wrote The Clay Hour?")
    for side in (chosen, rejected):
        assert side.ids[: side.role.index(Role.THINK)] == prompt
        assert side.queries[0] == "The Clay Hour author"
        assert Role.OBSERVATION in side.role
        assert side.mask.index(1) > len(prompt)
    check_shared_beginning(chosen, rejected)


def test_a_released_pair_without_a_shared_beginning(chat: Any, tmp_path: Path) -> None:
    """Both sides are learned from their first thought on, without the observation."""
    row = pair_row(RELEASED_PROMPT, RELEASED_TEXT, "<think>I know.</think> \\boxed{Ivo}")
    (tmp_path / "x.json").write_text(json.dumps([row]))
    data, refusals = read_sft_files(chat, [tmp_path / "x.json"])
    assert refusals == []
    ((chosen, rejected),) = data.pairs
    assert learned_text(chat, chosen).startswith("Hm, who wrote it?")
    assert "A soil" not in learned_text(chat, chosen)
    assert learned_text(chat, rejected) == "I know.</think>\\boxed{ Ivo}</s>"
    check_shared_beginning(chosen, rejected)


def check_shared_beginning(chosen: Any, rejected: Any) -> None:
    """Check that two sides are the same up to where the first of them is learned."""
    first = min(chosen.mask.index(1), rejected.mask.index(1))
    assert chosen.ids[:first] == rejected.ids[:first]


def test_a_thought_may_speak_of_the_box(nano: Any) -> None:
    """It is plain text there, and the answer is the box after the thought.

    Guards: rows of reasoning models, left out as tags in the wrong place.
    """
    text = "<think>It goes into \\boxed{}. It is Eva.</think>\n\\boxed{Eva}"
    trajectory = nano.build("Who?", parse_trajectory(text))
    assert nano.answer(trajectory) == "Eva"
    assert nano.is_well_formed(trajectory)
    assert trajectory.ids.count(nano.boxed_id) == 1
    assert "boxed{}" in nano.decode(trajectory.ids)


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        (r" \frac{1}{2}}", r"\frac{1}{2}"),
        ("5{,}000} and {so} on}", "5{,}000"),
        ("{x}}", "{x}"),
        (r"\text{Eva {x} Moss}}", "Eva {x} Moss"),
        (r"\text{Eva} and \text{Ada}}", r"\text{Eva} and \text{Ada}"),
        ("Eva Moss", "Eva Moss"),
        (r"\text{Eva", "Eva"),
        ("}", ""),
    ],
)
def test_an_answer_in_a_box(box: str, answer: str) -> None:
    r"""Its braces are counted, and a box that is not closed holds all; \text is no answer's own.

    Guards: an answer cut at its first brace, which was wrong against itself.
    """
    assert answer_in_box(box) == answer
    if closing_brace(box) == -1 or not answer:
        return
    parts = parse_trajectory(f"<think>Hm</think>\\boxed{{{box}")
    assert parts == [("think", "Hm"), ("answer", answer)]


# ---- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>Hm", "no </think>"),
        ("<think>Hm</think> Eva", r"no \\boxed"),
        ("<think>Hm</think> \\boxed{Eva", r"no \\boxed"),
        ("<think>Hm</think> \\boxed{ }", r"no \\boxed"),
        (
            "<think><begin_search>x</end_search> so</think>\\boxed{Eva}",
            "without its result",
        ),
        (
            "<think>a <begin_search>x</end_search></think>\\boxed{Eva}",
            "without its result",
        ),
        (
            "<think><search_result>x</search_result></think>\\boxed{Eva}",
            "without its result",
        ),
        ("<think>a <begin_search> b</think>\\boxed{Eva}", "not closed"),
        ("<think>a</think> b</think>\\boxed{Eva}", "in the wrong place"),
        (
            "<think>I may <begin_search> it. <begin_search>x</end_search>"
            "<search_result>y</search_result> so</think>\\boxed{Eva}",
            "not closed",
        ),
        (None, "a turn without a text"),
        ("<think>half \ud83d</think>\\boxed{Eva}", "half a character"),
        ("", "no </think>"),
    ],
)
def test_rows_that_are_no_trajectories(
    nano: Any, tmp_path: Path, text: str | None, reason: str
) -> None:
    """They are left out and named by file and line; the others stay."""
    good = chain_row("<think>Hm</think>\\boxed{Eva}")
    path = write_rows(tmp_path / "x.jsonl", good, chain_row(text), good)
    # The teacher writes an empty file where it kept no chain of a kind.
    empty = write_rows(tmp_path / "none.jsonl")
    data, refusals = read_sft_files(nano, [empty, path])
    assert len(data.chains_of_thought) == 2
    assert (data.chains_of_action, data.pairs) == ([], [])
    (refusal,) = refusals
    assert re.search(rf"x\.jsonl:2: .*({reason})", refusal)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "not iterable"),
        ({"messages": 3}, "messages is not a list of turns with role and content"),
        ({"messages": [{"role": "user", "content": "Who?"}]}, r"the turns are \['user'\]"),
        ({"messages": [{"role": 3, "content": "Who?"}]}, r"the turns are \[3\]"),
        ({**pair_row("Who?", " a", " b"), "conversation": []}, "not a question alone"),
        ({**pair_row("Who?", " a", " b"), "chosen": {}}, "chosen is not a turn with a value"),
        (pair_row("Who?", " a", None), "a turn without a text"),
        (pair_row("Who?", "half \ud83d", "b"), "half a character"),
        (pair_row("Who?", "", " b"), "an empty side"),
        (pair_row(" <think> Hm", " a", " b"), "an empty question"),
        (chain_row("<think>Hm</think>\\boxed{Eva}", " "), "an empty question"),
    ],
)
def test_rows_of_another_shape(nano: Any, tmp_path: Path, row: Any, reason: str) -> None:
    """A list, a number or half of a row is named by its line, too."""
    data, refusals = read_sft_files(nano, [write_rows(tmp_path / "x.jsonl", row)])
    assert data == SFTData()
    (refusal,) = refusals
    assert re.search(rf"x\.jsonl:1: .*{reason}", refusal)


@pytest.mark.parametrize(
    ("speakers", "is_read"),
    [
        (["user", "assistant"], True),
        (["system", "user", "assistant"], True),
        (["developer", "user", "assistant"], True),
        (["user", "assistant", "user", "assistant"], False),
        (["assistant", "user"], False),
        (["user", "user", "assistant"], False),
        (["user", "assistant", "tool"], False),
    ],
)
def test_conversations(nano: Any, tmp_path: Path, speakers: list[str], is_read: bool) -> None:
    """A question and its trajectory are read; a row with more is left out, and counted.

    Guards: all but two turns lost without a word, and a trajectory taken for the question.
    """
    texts = {"assistant": "<think>Hm</think>\\boxed{Eva}", "user": "Who?"}
    messages = [
        {"role": speaker, "content": texts.get(speaker, "Be brief.")} for speaker in speakers
    ]
    data, refusals = read_sft_files(
        nano, [write_rows(tmp_path / "x.jsonl", {"messages": messages})]
    )
    if is_read:
        (chain,) = data.chains_of_thought
        assert chain.ids == nano.build("Who?", [("think", "Hm"), ("answer", "Eva")]).ids
        assert refusals == []
    else:
        assert data == SFTData()
        (refusal,) = refusals
        assert f"x.jsonl:1: not a question and its trajectory: the turns are {speakers}" in refusal


def test_a_text_in_pieces(nano: Any, tmp_path: Path) -> None:
    """It is put together; a piece that is no text leaves the row out."""
    pieces = [{"type": "text", "text": "<think>Hm</think>"}, {"text": "\\boxed{Eva}"}]
    rows = [chain_row(pieces), chain_row([*pieces, {"type": "image_url"}])]
    data, refusals = read_sft_files(nano, [write_rows(tmp_path / "x.jsonl", *rows)])
    assert [nano.answer(chain) for chain in data.chains_of_thought] == ["Eva"]
    assert refusals == [f"{tmp_path}/x.jsonl:2: a turn without a text"]


def test_bytes_before_a_list(nano: Any, tmp_path: Path) -> None:
    """Guards: "not JSON" for pairs that an editor saved with a byte order mark."""
    path = tmp_path / "x.json"
    path.write_text("\ufeff\n" + json.dumps([pair_row("Who?", " a", " b")]), encoding="utf-8")
    data, refusals = read_sft_files(nano, [path])
    assert len(data.pairs) == 1
    assert refusals == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "Who?"}\n', r"x\.jsonl:1: neither messages"),
        ("[1", "not JSON"),
        ("", r"x\.jsonl: empty"),
        ("no", r"x\.jsonl:1: not JSON"),
        ("[" * 9000, r"x\.jsonl: not JSON"),
        ('{"a": ' + "[" * 9000, r"x\.jsonl:1: not JSON"),
    ],
)
def test_files_that_are_none(nano: Any, tmp_path: Path, content: str, message: str) -> None:
    """One line that names the file, and the line where there is one."""
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_sft_files(nano, [tmp_path / "x.jsonl"])


def test_a_missing_file(nano: Any, tmp_path: Path) -> None:
    """It is refused, also beside one that is there."""
    path = write_rows(tmp_path / "x.jsonl", chain_row("<think>Hm</think>\\boxed{Eva}"))
    with pytest.raises(UserError, match="no such file"):
        read_sft_files(nano, [path, tmp_path / "y.jsonl"])


def test_tags_that_nothing_closes_are_read_at_once() -> None:
    """20,000 opening tags. Guards: a reader that looks for the end of each anew, for hours."""
    tags = TAGS["search"] * 10_000 + TAGS["result"] * 10_000
    started = time.perf_counter()
    with pytest.raises(ValueError, match="tag"):
        parse_trajectory(f"<think>{tags}</think>\\boxed{{Eva}}")
    assert time.perf_counter() - started < 10
