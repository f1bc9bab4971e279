"""What stands before the question in the prompts of other projects' data files.

The instructions of AutoCoA's authors are `autocoa_prompt.txt`, as they stand in each row of their
RL questions (github.com/ADaM-BJTU/AutoCoA, MIT licence).
"""

import re
from pathlib import Path

# The authors' instructions end with this.
INSTRUCTIONS_END = "answer the user's question below:"
# The instructions of Search-R1 and of those who followed it, such as ZeroSearch.
QUESTION_LABEL = re.compile(r"(?:\A|[.\n])\s*Question:")

AUTHORS_INSTRUCTIONS = Path(__file__).with_name("autocoa_prompt.txt").read_text(encoding="utf-8")


def authors_turn(question: str) -> str:
    """Return the user's turn in which AutoCoA's authors ask a question."""
    return f"{AUTHORS_INSTRUCTIONS}{question}\n\n"


def question_at_end(user_text: str) -> str:
    """Return the question of a user's turn, without the instructions before it.

    It stands after the authors' instructions, or after "Question:" as in Search-R1's prompt; else
    it is the whole turn, as in ReSearch's files. What a question says itself is not searched: the
    first of these ends the instructions.

    >>> question_at_end("Search first, then answer. Question: Who directed Silver River? ")
    'Who directed Silver River?'
    """
    _, found, question = user_text.partition(INSTRUCTIONS_END)
    if found:
        return question.strip()
    label = QUESTION_LABEL.search(user_text)
    if label:
        return user_text[label.end() :].strip()
    return user_text.strip()
