"""How a model is asked that knows the tags and no words: the nano base model and its stages.

It has the same functions as workflows/words.py; workflows/style.py chooses.
"""

import dataclasses
import re
from collections.abc import Sequence

from common.settings import RolloutSettings
from data.boxes import answer_in_box
from data.trajectory import Codec
from model import LM
from nano.pretraining import TO_QUERY, TO_READ
from workflows.agent import Answered, roll_out_questions
from workflows.react import Phrases, react
from workflows.writing import continue_prompts


def react_phrases(codec: Codec, examples: str = "") -> Phrases:
    """Return how ReAct speaks to the model: by the tags of the single skills that it has.

    examples: of these only the length counts, so that a model that can't be shown examples has as
    much room for its own tokens as one that can.
    """
    question_mark = codec.tokenizer.convert_tokens_to_ids("?")
    assert isinstance(question_mark, int), "a byte-level vocabulary has every character"
    return Phrases(
        prompt=lambda question: codec.prompt(f"{TO_QUERY} {TO_READ} {question}"),
        thought_ends=[question_mark, *codec.eos_ids],
        action=[codec.search_id],
        action_ends=[codec.end_search_id, *codec.eos_ids],
        before_observation=[codec.result_id],
        after_observation=[codec.end_result_id],
        ask_answer=[codec.end_think_id, codec.boxed_id],
        answer_ends=[codec.brace_id, *codec.eos_ids],
        answer_pattern=re.compile(r"\\boxed\{([^}]*)"),
        example_tokens=len(codec.encode_exactly(examples)),
    )


def answer_from_memory(
    lm: LM,
    questions: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer as an agent does, with a chain of thought, but without a tool; greedily."""
    without_tool = dataclasses.replace(settings, max_actions=0)
    trajectories = roll_out_questions(lm, questions, None, without_tool, description)
    return [Answered(lm.codec.answer(trajectory), trajectory) for trajectory in trajectories]


def answer_directly(
    lm: LM,
    questions: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer at once, without a thought, greedily: the box is opened for the model."""
    codec = lm.codec
    prompts = [
        [*codec.prompt(question), codec.end_think_id, codec.boxed_id] for question in questions
    ]
    stops = [codec.brace_id, *codec.eos_ids]
    written = continue_prompts(lm, prompts, stops, settings.max_answer, settings, description)
    return [Answered(answer_in_box(text), trajectory) for text, trajectory in written]


def answer_from_passages(
    lm: LM,
    questions: Sequence[str],
    observations: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer each question from its observation, greedily.

    The model first says what it needs, as it has learned to read.
    """
    phrases = react_phrases(lm.codec)
    return react(
        lm, questions, None, settings, phrases, 1, description=description, given=observations
    )
