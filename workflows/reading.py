"""Answers from passages that a script has looked up: retrieve-then-read, and an upper bound."""

from collections.abc import Sequence

from common.settings import RolloutSettings
from data.passages import join_passages, neutralize
from data.questions import Question
from data.trajectory import Observation
from model import LM
from services.bm25 import BM25
from tools import Library
from workflows.agent import Answered
from workflows.closed_book import complete_lines
from workflows.prompts import READING_EXAMPLES
from workflows.react import react


def answer_from_passages(
    lm: LM,
    questions: Sequence[str],
    observations: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer each question from its observation, greedily.

    The nano base model first says what it needs, as it has learned to read; an instruct model
    answers at once.
    """
    if not lm.codec.has_chat_template:
        return react(lm, questions, None, settings, 1, description=description, given=observations)
    texts = [
        f"{READING_EXAMPLES}Passages: {observation}\nQuestion: {question}\nAnswer:"
        for question, observation in zip(questions, observations, strict=True)
    ]
    answered = complete_lines(lm, texts, settings.max_answer, settings, description)
    for (_, trajectory), observation in zip(answered, observations, strict=True):
        trajectory.observations.append(Observation(observation))
    return answered


def gold_observation(question: Question, library: Library) -> str:
    """Return the passages that a question's answer comes from, as one observation.

    It is "" where the question does not name them, or where the tool has none to go by. Passages
    are found by their ids where the corpus has those under the gold titles (several passages may
    share one title), else by their titles.
    """
    search = library["search"]
    if not isinstance(search, BM25):
        return ""
    passages = search.find_named(question.gold_ids, question.gold_titles, question.golden_answers)
    return neutralize(join_passages(passages)) if passages else ""
