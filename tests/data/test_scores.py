"""Scores, rewards and advantages against values worked out by hand or by the official scripts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import autocoa
from data.scores import cover_match, exact_match, f1, find_spelling, normalize, overlap_match
from data.trajectory import Codec

OFFICIAL_SCORES = Path(__file__).with_name("official_scores.json")
TWO_ACTIONS = [
    ("search", "A"),
    ("result", "B"),
    ("search", "C"),
    ("result", "D"),
    ("answer", "Eva Moss"),
]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Eva-Moss!", "evamoss"),
        ("An A.B. of a the", "ab of"),
        ("", ""),
        ("  Iron\nHill ", "iron hill"),
        ("Theatre", "theatre"),
        ("\u00c9va", "\u00e9va"),
    ],
)
def test_normalize(text: str, plain: str) -> None:
    """SQuAD's order: lower case, punctuation away, articles as whole words, single spaces.

    Punctuation is taken away, not replaced by a space.
    """
    assert normalize(text) == plain


def test_scores_of_the_official_scripts() -> None:
    """200 pairs written by hand, with what HotpotQA's and SQuAD 2.0's scripts give for them.

    They hold articles, punctuation, unicode, numbers, aliases, yes and no, and empty answers. The
    two scripts differ on 21: HotpotQA's counts for yes and no, SQuAD's for what is empty.
    """
    rows = json.loads(OFFICIAL_SCORES.read_text())
    differences = 0
    for answer, golden, em, hotpot_f1, squad_f1 in rows:
        assert exact_match(answer, golden) == em, (answer, golden)
        has_empty_text = any(not normalize(text) for text in (answer, *golden))
        expected = squad_f1 if has_empty_text else hotpot_f1
        assert f1(answer, golden) == pytest.approx(expected, abs=1e-6), (answer, golden)
        if hotpot_f1 != squad_f1:
            differences += 1
    assert len(rows) == 200
    assert differences == 21


@pytest.mark.parametrize(
    ("answer", "golden", "expected_em", "expected_f1"),
    [
        ("the Eva Moss.", ["Eva Moss"], 1, 1),
        ("Eva", ["Eva Moss"], 0, 2 / 3),
        ("Eva Moss", ["Ada", "Moss"], 0, 2 / 3),
        ("Moss", ["Ada", "Moss"], 1, 1),
        ("", ["Eva"], 0, 0),
        ("Ada Falk", ["Eva Moss"], 0, 0),
        ("yes yes no", ["yes"], 0, 0),
        ("No.", ["no"], 1, 1),
        ("Eva Moss", ["yes", "Eva"], 0, 2 / 3),
        ("Eva Eva", ["Eva Moss Eva"], 0, 0.8),
    ],
)
def test_exact_match_and_f1(
    answer: str, golden: list[str], expected_em: int, expected_f1: float
) -> None:
    """Precision and recall of the words, each counted as often as it stands in both texts.

    The best golden answer counts.
    """
    assert exact_match(answer, golden) == expected_em
    assert f1(answer, golden) == pytest.approx(expected_f1)


TEN_WORDS = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("answer", "golden", "cover", "overlap"),
    [
        ("the Eva Moss.", ["Eva Moss"], 1, 1),
        ("It was Eva Moss who did", ["Eva Moss"], 1, 0),
        ("Evan Moss", ["Eva"], 0, 0),
        ("Moss", ["Eva Moss"], 0, 0),
        ("", ["Eva"], 0, 0),
        ("Moss Eva", ["Eva Moss"], 0, 1),
        ("one two x three four five six seven", [TEN_WORDS], 0, 1),
        ("one two x three four five six", [TEN_WORDS], 0, 0),
        ("Ada", ["Eva", "Ada"], 1, 1),
        ("just two albums", ["2 albums"], 0, 1),
        ("It is said in the north", ["Italy", "IT", "IN"], 0, 0),
        ("it", ["IT"], 1, 1),
        ("No, they are not", ["no"], 1, 0),
        ("There is no such town", ["Norway", "NO"], 0, 0),
        ("born in the US", ["United States", "US"], 1, 0),
    ],
)
def test_cover_and_overlap(answer: str, golden: list[Any], cover: int, overlap: int) -> None:
    """Cover: the golden words one for one inside the answer. Overlap: 70% of the golden words.

    Overlap gives nothing for one text inside the other, as in the authors' code. Guards: an
    abbreviation that any longer answer covered, since scoring forgets capitals.
    """
    assert cover_match(answer, golden) == cover
    assert overlap_match(answer, golden) == overlap


@pytest.mark.parametrize(
    ("text", "answer", "spelling"),
    [
        ("He was born in India.", "India", "India"),
        ("He was born in India.", "IN", ""),
        ("In India he was born.", "IN", ""),
        ("Her diary tells us of (the U.S.), too.", "US", "U.S"),
        ("Her diary tells us of it.", "U.S.", ""),
        ("It is said to be so. It is.", "It", ""),
        ('He left. "Yes." It rained.', "It", ""),
        ("They filmed It in Maine.", "It", "It"),
        ("He sang for the Who.", "The Who", "Who"),
        ("A man who sang.", "The Who", ""),
        ("Who sang?", "The Who", ""),
        ("So he did. Up came the sun.", "Up", ""),
        ("who directed this is us", "This Is Us", "this is us"),
        ("Tallow for a penny a pan.", "PAN", ""),
        ("The Pan of myth.", "PAN", "Pan"),
        ("who made the pan", "PAN", "pan"),
        ("He went to Rome.", "ROME", "Rome"),
        ("Alder-Bay - the bay, of course", "alderbay bay", "Alder-Bay - the bay"),
        ("a cafe\u0301", "Caf\u00e9", "caf\u00e9"),
        ("Anything.", "the", ""),
        ("", "x", ""),
    ],
)
def test_an_answer_inside_a_text(text: str, answer: str, spelling: str) -> None:
    """The words that spell it, whatever case and punctuation, but with the capitals of a name.

    Guards: golden answers such as IN, US and The Who, found in any text and taught as "in".
    """
    assert find_spelling(text, answer) == spelling


def test_reward(codec: Codec) -> None:
    """Exact match, less the penalty for a malformed trajectory, less the cost of each call."""
    good = codec.build("Who?", TWO_ACTIONS)
    malformed = codec.build("Who?", TWO_ACTIONS)
    for column in (malformed.ids, malformed.mask, malformed.role, malformed.logprobs):
        # The end-of-text token is missing.
        column.pop()
    assert autocoa.reward(codec, good, ["Eva Moss"]) == 1
    assert autocoa.reward(codec, good, ["Ada"]) == 0
    penalized = autocoa.reward(codec, malformed, ["Eva Moss"], format_penalty=0.3)
    assert penalized == pytest.approx(0.7)
    assert autocoa.reward(codec, malformed, ["Ada"]) == -0.5
    two_calls = autocoa.reward(codec, good, ["Eva Moss"], call_cost=0.1)
    assert two_calls == pytest.approx(0.8)
    # Another score in place of the exact match; the penalties are the same.
    assert autocoa.reward(codec, good, ["Eva"], score=f1) == pytest.approx(2 / 3)
    penalized = autocoa.reward(codec, malformed, ["Ada Eva Moss Falk"], 0.3, score=overlap_match)
    assert penalized == -0.3
    assert autocoa.reward(codec, good, ["Moss, Eva"], score=overlap_match) == 1


def test_group_advantages() -> None:
    """The reward less the mean of its question's group, or of the others in it; or over the spread.

    Guards: a population deviation, where the authors' code (verl's) and TRL have a sample's.
    """
    rewards = np.array([[1.0, 0.0, 0.0, -0.5], [1.0, 1.0, 1.0, 1.0]])
    by_hand = np.array([0.875, -0.125, -0.125, -0.625])
    nothing = np.zeros(4)
    np.testing.assert_allclose(autocoa.group_advantages(rewards), [by_hand, nothing])
    deviation = ((0.875**2 + 2 * 0.125**2 + 0.625**2) / 3) ** 0.5
    np.testing.assert_allclose(
        autocoa.group_advantages(rewards, divide_by_std=True),
        [by_hand / deviation, nothing],
        atol=1e-5,
    )
    others = np.array([-0.5 / 3, 0.5 / 3, 0.5 / 3, 1 / 3])
    np.testing.assert_allclose(
        autocoa.group_advantages(rewards, leave_one_out=True), [rewards[0] - others, nothing]
    )
