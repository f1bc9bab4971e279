"""Which facts a model knows by heart."""

from collections.abc import Sequence

from common.settings import RolloutSettings
from data.questions import Question, facts_by_id
from data.scores import exact_match
from model import LM
from workflows.journal import Journal
from workflows.style import style_of


def recall(
    lm: LM, questions: Sequence[Question], settings: RolloutSettings, journal: Journal
) -> tuple[set[str], dict[str, str]]:
    """Ask the model, without a tool, for every fact that some questions need.

    journal: of what it was asked before.
    Returns the ids of the facts that it answered right in every wording, and for the id of each
    fact its answer to the first wording.
    """
    facts = facts_by_id(list(questions))

    def ask(texts: list[str]) -> list[str]:
        answered = style_of(lm.codec).answer_from_memory(lm, texts, settings, None)
        return [answer for answer, _ in answered]

    def ask_wording(fact_ids: Sequence[str], wording: int) -> list[str]:
        texts = [facts[fact_id].wordings[wording] for fact_id in fact_ids]
        description = f"what the base model knows, wording {wording + 1}"
        return journal.answers("from memory", texts, ask, description)

    first_answers = dict(zip(facts, ask_wording(list(facts), 0), strict=True))
    known = [
        fact_id
        for fact_id, fact in facts.items()
        if exact_match(first_answers[fact_id], fact.answers)
    ]
    most_wordings = max(len(fact.wordings) for fact in facts.values())
    for wording in range(1, most_wordings):
        answers = ask_wording(known, wording)
        known = [
            fact_id
            for fact_id, answer in zip(known, answers, strict=True)
            if exact_match(answer, facts[fact_id].answers)
        ]
    return set(known), first_answers
