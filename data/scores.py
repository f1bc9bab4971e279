"""How an answer is scored against golden answers: exact match, F1, and two looser scores."""

import re
import string
from collections import Counter

DIGITS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine".split())
}
FILLERS = re.compile(r"\b(well|so|basically|actually|literally|simply|just|um|uh)\b")


def normalize(text: str) -> str:
    """Return a text as the SQuAD and HotpotQA scripts compare it.

    Lower case, without punctuation and articles, with single spaces.
    """
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


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
    for gold in map(_without_fillers, golden):
        if plain_answer == gold:
            return 1.0
        words = set(gold.split())
        shared = len(words & set(plain_answer.split()))
        is_part = gold in plain_answer or plain_answer in gold
        if not is_part and shared >= 0.7 * len(words):
            return 1.0
    return 0.0


def _without_fillers(text: str) -> str:
    text = FILLERS.sub(" ", normalize(text))
    return " ".join(DIGITS.get(word, word) for word in text.split())


def f1(answer: str, golden: list[str]) -> float:
    """Return the word-overlap F1, the best over the golden answers."""
    return max(_f1_of_one(answer, gold) for gold in golden)


def _f1_of_one(answer: str, gold: str) -> float:
    words = normalize(answer).split()
    gold_words = normalize(gold).split()
    if words != gold_words and {"yes", "no", "noanswer"} & {" ".join(words), " ".join(gold_words)}:
        # Yes and no are right or wrong, as in HotpotQA's script.
        return 0.0
    shared = sum((Counter(words) & Counter(gold_words)).values())
    if not shared:
        return float(words == gold_words)
    return 2 * shared / (len(words) + len(gold_words))
