"""How an answer is scored against golden answers: exact match, F1, and two looser scores."""

import re
import string
from collections import Counter

DIGITS = {
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
}
ARTICLES = re.compile(r"\b(a|an|the)\b")
YES_OR_NO = ("yes", "no", "noanswer")
FILLERS = re.compile(r"\b(well|so|basically|actually|literally|simply|just|um|uh)\b")


def normalize(text: str) -> str:
    """Return a text as the SQuAD and HotpotQA scripts compare it.

    Lower case, without punctuation and articles, with single spaces.
    """
    letters = [letter for letter in text.lower() if letter not in string.punctuation]
    words = ARTICLES.sub(" ", "".join(letters)).split()
    return " ".join(words)


def exact_match(answer: str, golden: list[str]) -> float:
    """Return 1.0 where the answer is one of the golden ones, as the paper's reward does (3.3)."""
    return float(normalize(answer) in [normalize(gold) for gold in golden])


def cover_match(answer: str, golden: list[str]) -> float:
    """Return 1.0 where the answer, which may say more, holds a golden one (cover-EM)."""
    padded = f" {normalize(answer)} "
    return float(any(f" {normalize(gold)} " in padded for gold in golden))


def overlap_match(answer: str, golden: list[str]) -> float:
    """Return the score of the authors' code: an exact match, or 70% of a golden answer's words.

    An answer that merely holds the golden one, or is a part of it, does not count. Numbers below
    ten are digits to it, and words that say nothing are left out.
    """
    plain_answer = _without_fillers(answer)
    answer_words = set(plain_answer.split())
    for text in golden:
        gold = _without_fillers(text)
        if plain_answer == gold:
            return 1.0
        if gold in plain_answer or plain_answer in gold:
            continue
        gold_words = set(gold.split())
        shared = len(gold_words & answer_words)
        if shared >= 0.7 * len(gold_words):
            return 1.0
    return 0.0


def _without_fillers(text: str) -> str:
    text = FILLERS.sub(" ", normalize(text))
    return " ".join(DIGITS.get(word, word) for word in text.split())


def f1(answer: str, golden: list[str]) -> float:
    """Return the word-overlap F1, the best over the golden answers."""
    return max(_f1_of_one(answer, gold) for gold in golden)


def _f1_of_one(answer: str, gold: str) -> float:
    answer = normalize(answer)
    gold = normalize(gold)
    if answer == gold:
        return 1.0
    # Yes and no are right or wrong, as in HotpotQA's script.
    if answer in YES_OR_NO or gold in YES_OR_NO:
        return 0.0
    words = answer.split()
    gold_words = gold.split()
    shared = sum((Counter(words) & Counter(gold_words)).values())
    if shared == 0:
        return 0.0
    return 2 * shared / (len(words) + len(gold_words))
