"""What a model answers by itself: at once, or with a thought; and which facts it knows."""

import dataclasses
from collections.abc import Sequence

from common.progress import progress_bar
from common.settings import RolloutSettings
from data.questions import Question, facts_by_id
from data.scores import exact_match
from data.trajectory import Role, Trajectory
from model import LM
from workflows.agent import Answered, answer_questions
from workflows.prompts import CLOSED_BOOK_EXAMPLES, DIRECT_EXAMPLES
from workflows.react import encode_text, line_end_ids, react


def closed_book(
    lm: LM,
    questions: Sequence[str],
    settings: RolloutSettings,
    examples: str = "",
    description: str | None = None,
) -> list[Answered]:
    """Answer with a chain of thought and without a tool, greedily.

    An instruct model thinks in lines of text behind `examples`, any other as an agent does.
    """
    if lm.codec.has_chat_template:
        return react(lm, questions, None, settings, 0, examples, description)
    without_tool = dataclasses.replace(settings, max_actions=0)
    trajectories = answer_questions(lm, questions, None, without_tool, description)
    return [Answered(lm.codec.answer(trajectory), trajectory) for trajectory in trajectories]


def answer_directly(
    lm: LM,
    questions: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer at once, without a chain of thought, greedily."""
    codec = lm.codec
    if codec.has_chat_template:
        texts = [f"{DIRECT_EXAMPLES}Question: {question}\nAnswer:" for question in questions]
        return complete_lines(lm, texts, settings.max_answer, settings, description)
    prompts = [
        [*codec.prompt(question), codec.end_think_id, codec.boxed_id] for question in questions
    ]
    stops = [codec.brace_id, codec.eos_id]
    written = continue_prompts(lm, prompts, stops, settings.max_answer, settings, description)
    return [Answered(text.replace("}", "").strip(), trajectory) for text, trajectory in written]


def complete_lines(
    lm: LM,
    texts: Sequence[str],
    budget: int,
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Return what an instruct model writes behind each text, to the end of the line."""
    prompts = [encode_text(lm.codec, text) for text in texts]
    stops = line_end_ids(lm.codec)
    written = continue_prompts(lm, prompts, stops, budget, settings, description)
    return [Answered(text.strip(), trajectory) for text, trajectory in written]


def continue_prompts(
    lm: LM,
    prompts: Sequence[list[int]],
    stops: list[int],
    budget: int,
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Return what the model writes behind each prompt: up to a stop id, or `budget` tokens."""
    answered = []
    with progress_bar(len(prompts), description, "question") as bar:
        for start in range(0, len(prompts), settings.batch_rows):
            batch = list(prompts[start : start + settings.batch_rows])
            ids, _ = lm.decoder(batch).decode(stops, [budget] * len(batch), 0.0)
            for prompt, new_ids in zip(batch, ids, strict=True):
                trajectory = Trajectory()
                trajectory.add(list(prompt), Role.PROMPT, 0)
                trajectory.add(new_ids, Role.ANSWER, 1)
                words = [token for token in new_ids if token != lm.codec.eos_id]
                answered.append(Answered(lm.codec.decode(words), trajectory))
            bar.update(len(batch))
    return answered


def recall(
    lm: LM, questions: Sequence[Question], settings: RolloutSettings
) -> tuple[set[str], dict[str, str]]:
    """Ask the model, without a tool, for every fact that some questions need.

    Returns the ids of the facts that it answered right in every wording, and for the id of each
    fact its answer to the first wording.
    """
    facts = facts_by_id(list(questions))

    def ask_wording(fact_ids: Sequence[str], wording: int) -> list[str]:
        texts = [facts[fact_id].wordings[wording] for fact_id in fact_ids]
        description = f"what the base model knows, wording {wording + 1}"
        answered = closed_book(lm, texts, settings, CLOSED_BOOK_EXAMPLES, description)
        return [answer for answer, _ in answered]

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
