"""How an answer is scored against golden answers: exact match, F1, and two looser scores.

Scoring forgets the case and the punctuation of two answers. That is too much where a longer text
is searched for an answer: "IN" and "The Who" would be found in any text. `find_spelling` looks
closer.
"""

import re
import string
from collections import Counter

from data.passages import nfc

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
ARTICLES = re.compile(r"\b(a|an|the)\b", re.I)
YES_OR_NO = ("yes", "no", "noanswer")
FILLERS = re.compile(r"\b(well|so|basically|actually|literally|simply|just|um|uh)\b")
# Words of any text. A name of one or two of them is told from them by its capitals alone.
FUNCTION_WORDS = frozenset(
    "about above after again all also am an and any are as at be because been before being below "
    "between but by can could did do does down during each few for from further had has have "
    "he her here hers him his how i if in into is it its just may me might more most must my no "
    "nor not now of off on once only or other our ours out over own same shall she should so "
    "some such than that their them then there these they this those through to too under until "
    "up us very was we were what when where which while who whom whose why will with would yes "
    "you your yours".split()
)
SENTENCE_END = re.compile(r"[.!?][\"')]*$")
ABBREVIATION = re.compile("[A-Z]{2,3}")  # such as a country's code


def normalize(text: str) -> str:
    """Return a text as the SQuAD and HotpotQA scripts compare it.

    Lower case, without punctuation and articles, with single spaces.
    """
    return _without_punctuation(text.lower())


def _without_punctuation(text: str) -> str:
    """Return a text without punctuation and articles, in the case it has."""
    letters = [letter for letter in text if letter not in string.punctuation]
    words = ARTICLES.sub(" ", "".join(letters)).split()
    return " ".join(words)


# ---- an answer inside a text ---------------------------------------------------------------------
def is_common(name: str) -> bool:
    """Whether a name's words stand in any text: one or two function words, "The Who" or "It"."""
    words = normalize(name).split()
    return len(words) in (1, 2) and FUNCTION_WORDS.issuperset(words)


def find_spelling(text: str, answer: str) -> str:
    """Return the words of a text that spell an answer, "" where none do.

    They are the same words in scoring, and where case tells a name from other words, they have its
    capitals too: a short abbreviation is not spelled in lower case, so that "pan" is no "PAN". One
    or two function words must be spelled as the answer spells them, with a capital that is not a
    sentence's first letter.

    >>> find_spelling("It is in the north of India.", "IN")
    ''
    >>> find_spelling("He played for the Who.", "The Who")
    'Who'
    """
    text = nfc(text)
    answer = nfc(answer)
    plain_answer = normalize(answer)
    if not plain_answer or f" {plain_answer} " not in f" {normalize(text)} ":
        return ""
    words = text.split()
    plain_words: list[str] = []
    positions: list[int] = []  # of the word that each plain word comes from
    for position, word in enumerate(words):
        pieces = normalize(word).split()
        plain_words += pieces
        positions += [position] * len(pieces)
    searched = plain_answer.split()
    for start in range(len(plain_words) - len(searched) + 1):
        end = start + len(searched)
        if plain_words[start:end] != searched:
            continue
        first = positions[start]
        last = positions[end - 1]
        if _names_the_same(words, first, last, answer):
            return " ".join(words[first : last + 1]).strip(string.punctuation)
    return ""


def _names_the_same(words: list[str], first: int, last: int, answer: str) -> bool:
    """Whether words that are an answer in scoring also have its capitals, where it needs them."""
    name = _without_punctuation(answer)
    spelling = _without_punctuation(" ".join(words[first : last + 1]))
    if not is_common(name):
        # Nothing is in capitals in some people's questions.
        text_has_capitals = any(word != word.lower() for word in words)
        return not (ABBREVIATION.fullmatch(name) and text_has_capitals and spelling.islower())
    if spelling != name:
        return False
    if name.isupper() and len(name) > 1:
        return True
    begins_sentence = first == 0 or SENTENCE_END.search(words[first - 1])
    capitals = spelling[1:] if begins_sentence else spelling
    return capitals != capitals.lower()


# ---- scores --------------------------------------------------------------------------------------
def exact_match(answer: str, golden: list[str]) -> float:
    """Return 1.0 where the answer is one of the golden ones, as the paper's reward does (3.3)."""
    return float(normalize(answer) in [normalize(gold) for gold in golden])


def cover_match(answer: str, golden: list[str]) -> float:
    """Return 1.0 where the answer, which may say more, spells a golden one (cover-EM)."""
    if exact_match(answer, golden):
        return 1.0
    words = normalize(answer).split()
    for gold in golden:
        # Yes and no are said in their own right. NO is Norway's code.
        if gold.lower() in YES_OR_NO and not gold.isupper() and gold.lower() in words:
            return 1.0
        if find_spelling(answer, gold):
            return 1.0
    return 0.0


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
