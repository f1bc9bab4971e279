"""A language model as judge of answers: does an answer mean the same as a golden one?"""

import re
from typing import Any

from data.trajectory import TAGS
from services.chat import Chat

INSTRUCTIONS = """Question: {question}
Accepted answers: {golden}
Given answer: {answer}

Does the given answer mean the same as one of the accepted answers? \
Other words are fine; another or a missing fact is not. Reply with one word, yes or no."""

MAX_LETTERS = 300  # of an answer; a longer one says too much to be one
BUDGET = 8  # tokens of a verdict
THINKING_BUDGET = 2048  # tokens of a verdict with the thought before it


def judge(chat: Chat, records: list[dict[str, Any]]) -> list[float | None]:
    """Return 1.0 or 0.0 for each record, or None where the verdict can't be read.

    records: each with "question", "golden_answers" and "answer". An empty answer is wrong, and
    the judge is not asked about it.
    """
    answered = [row for row, record in enumerate(records) if record["answer"].strip()]
    conversations = [[{"role": "user", "content": _instructions(records[row])}] for row in answered]
    replies = chat(conversations, BUDGET, description="judging")
    # A thinking model has not begun to answer by then.
    thinking = [number for number, reply in enumerate(replies) if _is_unfinished_thought(reply)]
    thoughtful_replies = chat(
        [conversations[number] for number in thinking],
        THINKING_BUDGET,
        description="judging with thought" if thinking else None,
    )
    for number, reply in zip(thinking, thoughtful_replies, strict=True):
        replies[number] = reply
    verdicts: list[float | None] = [0.0] * len(records)
    for row, reply in zip(answered, replies, strict=True):
        verdicts[row] = _read_verdict(reply)
    return verdicts


def _instructions(record: dict[str, Any]) -> str:
    return INSTRUCTIONS.format(
        question=record["question"],
        golden="; ".join(record["golden_answers"]),
        answer=" ".join(record["answer"].split())[:MAX_LETTERS],
    )


def _is_unfinished_thought(reply: str) -> bool:
    return reply.lstrip().startswith(TAGS["think"]) and TAGS["end_think"] not in reply


def _read_verdict(reply: str) -> float | None:
    r"""Return 1.0 for yes and 0.0 for no, in any dress; what is neither is not guessed.

    >>> [_read_verdict(reply) for reply in ("Yes.", " **no**, because", "Nobody")]
    [1.0, 0.0, None]
    >>> _read_verdict("<think>No film of hers.</think>Yes.")
    1.0
    """
    verdict = reply.rpartition(TAGS["end_think"])[2]
    found = re.match(r"\W*(yes|no)\b", verdict, re.IGNORECASE)
    if not found:
        return None
    return float(found[1].lower() == "yes")
