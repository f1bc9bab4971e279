"""FlashRAG's question files: what is read, what is refused, and the plan for a real question."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data.flashrag import name_sets, plan_lookups, read_questions
from data.questions import Question, short_questions, sixteenth
from tools import library

GOOD = {"id": "dev_0", "question": "Who?", "golden_answers": ["Eva"]}


def write(path: Path, *rows: Any) -> Any:
    """Write rows as JSON lines; a text is written as it is."""
    lines = [
        row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


# ---- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json}\n", "not JSON"),
        ('["a list"]\n', "not a question"),
        ({"id": "1", "golden_answers": ["x"]}, "not a question"),
        ({"question": "Who?", "golden_answers": ["x"]}, "not a question"),
        ({**GOOD, "golden_answers": []}, "'dev_0' has no answers"),
        ({"id": "dev_0", "question": "Who?"}, "has no answers"),
        ({**GOOD, "golden_answers": "Eva"}, "has no answers"),
        ({**GOOD, "golden_answers": [" "]}, "has no answers"),
        ({**GOOD, "golden_answers": [1]}, "has no answers"),
        ({**GOOD, "golden_answers": ["Eva", 1]}, "has no answers"),
        ({**GOOD, "metadata": "text"}, "metadata"),
        ({**GOOD, "metadata": {"gold_titles": [3]}}, "gold_titles"),
        ({**GOOD, "metadata": {"gold_titles": "A"}}, "gold_titles"),
        ({**GOOD, "metadata": {"supporting_facts": {"title": "A"}}}, "supporting_facts"),
        ({**GOOD, "metadata": {"gold_ids": [3]}}, "gold_ids"),
        ({**GOOD, "question": "What?"}, "question 'dev_0' is in line 1 too"),
        ({**GOOD, "question": " "}, "not a question"),
        (json.dumps({**GOOD, "question": "half \ud83d"}) + "\n", "half a character"),
        (json.dumps({**GOOD, "id": "half \ud83d"}) + "\n", "half a character"),
        (json.dumps({**GOOD, "golden_answers": ["half \ud83d"]}) + "\n", "half a character"),
        (
            json.dumps({**GOOD, "metadata": {"gold_titles": ["half \ud83d"]}}) + "\n",
            "half a character",
        ),
        (
            json.dumps({**GOOD, "metadata": {"gold_ids": ["half \ud83d"]}}) + "\n",
            "half a character",
        ),
    ],
)
def test_a_malformed_question_names_its_line(tmp_path: Path, bad: Any, message: str) -> None:
    """One line of text, with the file and the line of the row."""
    path = write(tmp_path / "q.jsonl", GOOD, bad, GOOD)
    with pytest.raises(UserError, match=message) as error:
        read_questions(path)
    assert f"{path}:2:" in str(error.value)
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_missing_and_empty_question_files(tmp_path: Path) -> None:
    """A missing file is named with its setting; an empty one and one in another encoding too."""
    with pytest.raises(UserError, match=r"train_data.*no such file.*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"q\.jsonl: empty"):
        read_questions(write(tmp_path / "q.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"id": "1", "question": "\u00c9va"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl: not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


def test_good_questions(tmp_path: Path) -> None:
    """Unicode as it is, with separators that only look like line ends; metadata may be missing."""
    unicode_question = "Wer ist \u00c9va?\u2028 (\u0085)"
    second = {**GOOD, "id": "dev_1", "question": unicode_question, "metadata": None}
    questions = read_questions(write(tmp_path / "q.jsonl", GOOD, second))
    assert [question.question for question in questions] == ["Who?", unicode_question]
    assert [question.id for question in questions] == ["q:dev_0", "q:dev_1"]
    assert [question.where[-10:] for question in questions] == ["/q.jsonl:1", "/q.jsonl:2"]
    for question in questions:
        (fact,) = question.facts
        assert fact.id == question.id
        assert fact.wordings == [question.question]
        assert fact.answers == ["Eva"]
        assert fact.recall == "I recall Eva."
        assert not fact.head
        assert question.lookups


def test_a_question_that_looks_like_a_call(tmp_path: Path) -> None:
    """A word and a colon at its beginning are no tool's name: the query carries the tool's own.

    Guards: "Unknown tool thor", taught as a miss.
    """
    row = {**GOOD, "question": "thor: ragnarok release date"}
    (question,) = read_questions(write(tmp_path / "nq.jsonl", row))
    queries = question.lookups[0].queries
    assert queries == ["search: thor: ragnarok release date"]
    tools = library([{"id": "0", "contents": '"Thor: Ragnarok"\nReleased in 2017.'}], 1)
    (observation,) = tools(queries)
    assert observation.text == "Thor: Ragnarok 1: Released in 2017."


def test_two_hops_whatever_the_id(tmp_path: Path) -> None:
    """FlashRAG's HotpotQA rows are called train_0, train_1 ..; two gold passages, two searches."""
    row = {
        "id": "train_0",
        "question": "Where did the author of The Clay Hour grow up?",
        "golden_answers": ["Tallow"],
        "metadata": {"gold_titles": ["Orla Venn", "The Clay Hour"]},
    }
    (question,) = read_questions(write(tmp_path / "hotpotqa_train.jsonl", row))
    assert [lookup.title for lookup in question.lookups] == ["The Clay Hour", "Orla Venn"]
    (question,) = read_questions(write(tmp_path / "train_0.jsonl", row), "2wiki")
    assert len(question.lookups) == 2
    (question,) = read_questions(tmp_path / "hotpotqa_train.jsonl", "nq")
    assert len(question.lookups) == 1


def test_bytes_before_the_text_and_blank_lines(tmp_path: Path) -> None:
    """Byte order marks, as where two such files were joined, are no text; lines keep their number.

    Guards: "not JSON" for files of some editors.
    """
    second = json.dumps({**GOOD, "id": "dev_1"})
    path = write(tmp_path / "q.jsonl", "\ufeff", GOOD, "\n\r\n", f"\ufeff{second}\n", " \n")
    questions = read_questions(path)
    assert [question.where for question in questions] == [f"{path}:1", f"{path}:4"]


def test_one_unicode_form(tmp_path: Path) -> None:
    """An accent that is typed as a letter of its own makes no other question, answer or title.

    It lies in the same sixteenth, too, so that no pool of RL holds a question of SFT.
    """
    composed = "Zo\u00eb?"
    decomposed = unicodedata.normalize("NFD", composed)
    rows = [
        {
            "id": str(number),
            "question": text,
            "golden_answers": [text],
            "metadata": {"gold_titles": [text]},
        }
        for number, text in enumerate((composed, decomposed))
    ]
    for question in read_questions(write(tmp_path / "q.jsonl", *rows)):
        assert question.question == composed
        assert question.golden_answers == question.gold_titles == [composed]
    assert sixteenth(decomposed) == sixteenth(composed)


def test_titles_that_say_nothing(tmp_path: Path) -> None:
    """They are left out: no passage is called that."""
    path = write(tmp_path / "q.jsonl", {**GOOD, "metadata": {"gold_titles": ["", " ", "Orla"]}})
    assert read_questions(path)[0].gold_titles == ["Orla"]


@pytest.mark.parametrize(
    "facts",
    [
        {"title": ["Orla Venn", "The Clay Hour", "Orla Venn"], "sent_id": [0, 1, 2]},
        [["Orla Venn", 0], ["The Clay Hour", 1]],
    ],
)
def test_supporting_facts_are_gold_titles(tmp_path: Path, facts: Any) -> None:
    """In both of FlashRAG's forms, each title once."""
    path = write(tmp_path / "q.jsonl", {**GOOD, "metadata": {"supporting_facts": facts}})
    (question,) = read_questions(path)
    assert question.gold_titles == ["Orla Venn", "The Clay Hour"]


def test_answers_that_say_nothing(tmp_path: Path) -> None:
    """They are left out: one of them in a large file must not make the file unusable.

    So is what the scores take for no answer, since it would make an empty answer right. Where
    there is no other answer it stays.
    """
    rows = [
        {**GOOD, "golden_answers": ["The", "Eva", " ", "!!"]},
        {**GOOD, "id": "dev_1", "golden_answers": ["The", " "]},
    ]
    first, second = read_questions(write(tmp_path / "q.jsonl", *rows))
    assert first.golden_answers == ["Eva"]
    assert second.golden_answers == ["The"]


def test_names_of_sets() -> None:
    """The folder's name only where it is needed; the same file twice is refused."""
    paths = ["x/nq_dev.jsonl", "y/train.jsonl", "a/pop.jsonl", "b/pop.jsonl"]
    names = name_sets(paths, "--data")
    assert list(names) == ["nq_dev", "y_train", "a_pop", "b_pop"]
    assert list(names.values()) == paths
    message = "--data: a/dev.jsonl and a/dev.jsonl are both the set 'a_dev'"
    with pytest.raises(UserError, match=re.escape(message)):
        name_sets(["a/dev.jsonl", "a/dev.jsonl"], "--data")


# ---- questions that are too long -----------------------------------------------------------------
def test_questions_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out and counted, with the place of the first, before anything is trained.

    Guards: one long question of a file, which ended a run after its first stage.
    """
    rows = [{**GOOD, "id": str(size), "question": "x" * size} for size in (3, 9, 4, 8)]
    questions = read_questions(write(tmp_path / "q.jsonl", *rows))
    kept = short_questions(questions, len, 4)
    assert [len(question.question) for question in kept] == [3, 4]
    assert capsys.readouterr().out == (
        "2 of 4 questions have a prompt of more than 4 tokens and are left out, the first at "
        f"{tmp_path}/q.jsonl:2 (9 tokens); raise --max_len to take them in\n"
    )
    assert short_questions(questions, len, 9) == questions
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"max_len: .*q\.jsonl:1 \(3 tokens\); raise --max_len"):
        short_questions(questions, len, 2)


# ---- the plan ------------------------------------------------------------------------------------
def plan(text: str, golden: Any, titles: Any, question_id: str = "hotpotqa_1") -> Any:
    """Return the look-ups that are planned for a question."""
    return plan_lookups(Question(question_id, text, golden, gold_titles=titles))


def test_the_named_title_comes_first() -> None:
    """Of two gold passages the one that the question names leads to the other."""
    first, second = plan(
        "Where did the author of The Clay Hour grow up?",
        ["Tallow"],
        ["Orla Venn", "The Clay Hour"],
    )
    assert [first.queries[0], second.queries[0]] == ["The Clay Hour", "Orla Venn"]
    assert first.evidence == ["Orla Venn", "Orla Venn"]
    assert second.evidence == ["Tallow"]


def test_a_query_that_the_policy_can_derive() -> None:
    """Where neither title is in the question, it is asked itself and the title is the rewording.

    Guards: 53 of 600 questions of HotpotQA, whose first query was a name from the gold titles.
    """
    question = "Which county has the town of the potter of 1931?"
    first, second = plan(question, ["Marrow County"], ["Orla Venn", "Tallow (town)"])
    assert first.queries == [question, "Orla Venn"]
    assert "Orla" not in first.ask + first.subject
    # The first passage names it.
    assert second.queries[0] == "Tallow (town)"


def test_a_shared_of_names_nothing() -> None:
    """A title is not named by one of its small words."""
    question = "Who is the mother of the director of a film?"
    lookups = plan(question, ["Eva"], ["House of Clay", "Son of Hart"])
    assert lookups[0].queries[0] == question


@pytest.mark.parametrize(
    ("question", "title", "is_named"),
    [
        ("Who said it was a novel?", "It (novel)", False),
        ("Who wrote the novel It?", "It (novel)", True),
        ("A man who sang what?", "The Who", False),
        ("Did she tell us so?", "US", False),
        ("Who owned the pan of Tallow?", "PAN", False),
        ("who wrote the clay hour", "The Clay Hour", True),
    ],
)
def test_a_title_that_is_a_common_word(question: str, title: str, is_named: bool) -> None:
    """It is named by its capitals. Guards: "It" and "US" read in any question."""
    (lookup,) = plan(question, ["Ivo"], [title], "nq_1")
    assert (lookup.queries[0] == title) == is_named


def test_an_answer_that_is_a_common_word_compares_nothing() -> None:
    """Guards: any question that "tells us" taken for one that names its answer, "US"."""
    question = "Where did the author of The Clay Hour, who tells us of it, grow up?"
    _, second = plan(question, ["US"], ["Orla Venn", "The Clay Hour"])
    assert second.evidence == ["US"]


def test_one_hop() -> None:
    """The title is searched for where the question names it; further titles are alternatives."""
    question = "Who wrote The Clay Hour?"
    titles = ["The Clay Hour", "Orla Venn"]
    (named,) = plan(question, ["Orla Venn"], titles, "nq_1")
    assert (named.title, named.queries) == ("The Clay Hour", ["The Clay Hour", question])
    (unnamed,) = plan(question, ["Orla Venn"], ["Orla Venn"], "nq_1")
    assert (unnamed.title, unnamed.queries) == ("Orla Venn", [question, "Orla Venn"])
    (untitled,) = plan(question, ["Orla Venn"], [], "nq_1")
    assert (untitled.title, untitled.queries) == ("", [question])
