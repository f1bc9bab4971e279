"""How a checkpoint is asked: in words, by lines of text, without the turns of a chat.

It has the same functions as workflows/tags.py; workflows/style.py chooses.
"""

import re
from collections.abc import Sequence

from common.settings import RolloutSettings
from data.trajectory import Codec, Observation
from model import LM
from workflows.agent import Answered
from workflows.prompts import (
    CLOSED_BOOK_EXAMPLES,
    DIRECT_EXAMPLES,
    READING_EXAMPLES,
)
from workflows.react import Phrases, react
from workflows.writing import continue_prompts


def react_phrases(codec: Codec, examples: str) -> Phrases:
    """Return how ReAct speaks to the model: lines of text, with examples before the question."""
    line_ends = line_end_ids(codec)
    return Phrases(
        prompt=lambda question: encode_text(codec, f"{examples}Question: {question}\nThought:"),
        thought_ends=line_ends,
        action=codec.encode_exactly("Search:"),
        action_ends=line_ends,
        before_observation=codec.encode_exactly("Observation:"),
        after_observation=codec.encode_exactly("\nThought:"),
        ask_answer=codec.encode_exactly("Answer:"),
        answer_ends=line_ends,
        answer_pattern=re.compile(r"Answer:\s*(.+)"),
        newline=codec.encode_exactly("\n"),
        example_tokens=len(codec.encode_exactly(examples)),
    )


def answer_from_memory(
    lm: LM,
    questions: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer with a thought and without a tool, greedily."""
    phrases = react_phrases(lm.codec, CLOSED_BOOK_EXAMPLES)
    return react(lm, questions, None, settings, phrases, max_actions=0, description=description)


def answer_directly(
    lm: LM,
    questions: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer at once, without a thought, greedily."""
    texts = [f"{DIRECT_EXAMPLES}Question: {question}\nAnswer:" for question in questions]
    return complete_lines(lm, texts, settings.max_answer, settings, description)


def answer_from_passages(
    lm: LM,
    questions: Sequence[str],
    observations: Sequence[str],
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Answer each question from its observation, at once and greedily."""
    texts = [
        f"{READING_EXAMPLES}Passages: {observation}\nQuestion: {question}\nAnswer:"
        for question, observation in zip(questions, observations, strict=True)
    ]
    answered = complete_lines(lm, texts, settings.max_answer, settings, description)
    for (_, trajectory), observation in zip(answered, observations, strict=True):
        trajectory.observations.append(Observation(observation))
    return answered


# ---- lines of text -------------------------------------------------------------------------------
def complete_lines(
    lm: LM,
    texts: Sequence[str],
    budget: int,
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Return what the model writes after each text, to the end of the line."""
    prompts = [encode_text(lm.codec, text) for text in texts]
    stops = line_end_ids(lm.codec)
    written = continue_prompts(lm, prompts, stops, budget, settings, description)
    return [Answered(text.strip(), trajectory) for text, trajectory in written]


def line_end_ids(codec: Codec) -> list[int]:
    """Return every token that holds a line break, and those that end a text.

    A line break is spelled "Ċ" in byte-level vocabularies and <0x0A> in SentencePiece's.
    """
    vocabulary = codec.tokenizer.get_vocab().items()
    line_breaks = [
        token_id
        for token, token_id in vocabulary
        if "Ċ" in token or "\n" in token or token == "<0x0A>"
    ]
    return [*line_breaks, *codec.eos_ids]


def beginning_of_text(codec: Codec) -> list[int]:
    """Return the token that begins a text, for models that were trained with one (Llama 3)."""
    bos = codec.tokenizer.bos_token_id
    return [token for token in codec.tokenizer.encode("") if token == bos]


def encode_text(codec: Codec, text: str) -> list[int]:
    """Return the ids of a whole text for the model to go on with."""
    return beginning_of_text(codec) + codec.encode_beginning(text)
