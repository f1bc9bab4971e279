"""A question with its facts: what travels from a question file, or the nano world, to the gradient.

The nano world and question files differ only in what they put here, so nothing that reads a
question has to ask where it came from.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import UserError
from data.passages import nfc

SEARCH = "search"  # the tool that facts are looked up with; other tools compute


@dataclass
class Lookup:
    """One look-up of a fact with a tool: what is thought, asked for, and must turn up."""

    ask: str  # the thought before the action: "director of Silver River?"
    queries: list[str]  # actions to try in order, until one finds what is needed
    tool: str = SEARCH  # the tool that the queries call
    title: str = ""  # the passage that must turn up has this title; empty: any passage will do
    subject: str = ""  # a query that names this looks the fact up; empty: any query does
    statement: str = ""  # what a reader says of passage {n}; empty: quote the evidence
    evidence: list[str] = field(default_factory=list)  # a quoted sentence must hold one of these

    @property
    def is_search(self) -> bool:
        """Whether a fact of the world is looked up, and nothing computed."""
        return self.tool == SEARCH


@dataclass
class Fact:
    """One fact that a question needs: how to ask for it, recall it, and look it up."""

    id: str  # the same fact has the same id in every question
    wordings: list[str]  # questions that ask a model for this fact alone
    answers: list[str]  # its golden answers
    recall: str  # what a model that knows it says: "I recall Eva Moss."
    lookups: list[Lookup]  # all of them are needed; most facts have one
    note: str = ""  # what is said when it is known, in a comparison
    head: bool = False  # whether it is about a head entity, which is in the pretraining text

    @property
    def ask(self) -> str:
        """The thought that asks for this fact."""
        return self.lookups[0].ask


@dataclass
class Question:
    """One question, its golden answers, and the facts that lead to them."""

    id: str
    question: str
    golden_answers: list[str]
    facts: list[Fact] = field(default_factory=list)
    plan: str = ""  # what a chain of several facts begins with
    conclusion: str = ""  # what a comparison says before its answer
    taught_answer: str = ""  # what a taught chain answers; empty: as the evidence spells it
    gold_titles: list[str] = field(default_factory=list)  # titles of the passages with the answer
    gold_ids: list[str] = field(default_factory=list)  # ids of these passages in the corpus
    where: str = ""  # file:line that it was read from; empty: of the nano world

    @property
    def lookups(self) -> list[Lookup]:
        """The look-ups of all facts, in order."""
        return [lookup for fact in self.facts for lookup in fact.lookups]


def sixteenth(question: str) -> int:
    """Return in which of sixteen equal parts of all questions a question lies: 0 to 15.

    It is a hash of the text alone. So pools that own different parts share no question, whatever
    the seed, their sizes, and the order in which they are drawn.
    """
    return hashlib.sha256(nfc(question).encode()).digest()[0] % 16


def short_questions(
    questions: list[Question], prompt_tokens: Callable[[str], int], longest_prompt: int
) -> list[Question]:
    """Return the questions whose prompts are short enough, and print how many are not.

    One of the others would end a run, and late.

    prompt_tokens: measures the prompt of a question's text, in tokens.
    longest_prompt: tokens of a prompt at most.
    Raises UserError where no question is left.
    """
    lengths = [prompt_tokens(question.question) for question in questions]
    long = [number for number, length in enumerate(lengths) if length > longest_prompt]
    if not long:
        return questions
    example = f"{questions[long[0]].where or questions[long[0]].id} ({lengths[long[0]]} tokens)"
    if len(long) == len(questions):
        raise UserError(
            f"max_len: it leaves {max(0, longest_prompt)} tokens for a prompt, and each of the "
            f"{len(questions)} questions takes more, the first at {example}; raise --max_len"
        )
    print(
        f"{len(long)} of {len(questions)} questions have a prompt of more than {longest_prompt} "
        f"tokens and are left out, the first at {example}; raise --max_len to take them in"
    )
    return [
        question
        for question, length in zip(questions, lengths, strict=True)
        if length <= longest_prompt
    ]


def facts_by_id(questions: list[Question]) -> dict[str, Fact]:
    """Return the facts of some questions, each once, in order of first mention."""
    return {fact.id: fact for question in questions for fact in question.facts}
