"""Reflexion (Shinn et al. 2023) around ReAct, for instruct models."""

from collections.abc import Sequence

from common.settings import RolloutSettings
from model import LM
from tools import Library
from workflows.agent import Answered
from workflows.batches import in_batches
from workflows.prompts import JUDGE_OWN_ANSWER, REACT_EXAMPLES, REFLECT
from workflows.react import react
from workflows.words import beginning_of_text, complete_lines, encode_text, react_phrases


def reflexion(
    lm: LM,
    questions: Sequence[str],
    search: Library | None,
    settings: RolloutSettings,
    first_try: Sequence[Answered] | None = None,
    max_tries: int = 3,
    description: str | None = None,
) -> list[Answered]:
    """Answer questions by ReAct, and try again what the model itself calls wrong.

    An answer that is missing, or that the model calls wrong, is followed by a sentence on what to
    do better, and by another try with that in mind. Whether it is wrong is never read off the gold
    answer.

    first_try: what `react` has answered already.
    Returns each answer with the trajectory of the last try, and in it the queries and observations
    of all tries.
    """
    phrases = react_phrases(lm.codec, REACT_EXAMPLES)
    if first_try is None:
        first_try = react(lm, questions, search, settings, phrases, description=description)
    answered = list(first_try)
    lessons = [""] * len(questions)
    open_questions = list(range(len(questions)))
    for tries in range(1, max_tries):
        reports = [_report_try(lm, JUDGE_OWN_ANSWER, answered[i]) for i in open_questions]
        doubts = prefers_no(lm, reports, settings)
        open_questions = [
            i
            for i, doubt in zip(open_questions, doubts, strict=True)
            if doubt or not answered[i].answer
        ]
        if not open_questions:
            break
        reports = [_report_try(lm, REFLECT, answered[i]) for i in open_questions]
        reflections = complete_lines(lm, reports, settings.max_thought, settings)
        for i, reflection in zip(open_questions, reflections, strict=True):
            lessons[i] += f"\nLesson from try {tries}: Next time {reflection.answer}"
        texts = [questions[i] + lessons[i] for i in open_questions]
        next_try = react(lm, texts, search, settings, phrases, description=description)
        for i, (answer, trajectory) in zip(open_questions, next_try, strict=True):
            earlier = answered[i].trajectory
            trajectory.queries = earlier.queries + trajectory.queries
            trajectory.observations = earlier.observations + trajectory.observations
            answered[i] = Answered(answer, trajectory)
    return answered


def _report_try(lm: LM, template: str, attempt: Answered) -> str:
    """Return a question about one try, with all that was written in it."""
    ids = attempt.trajectory.ids[len(beginning_of_text(lm.codec)) :]
    # Some tokenizers begin a text with a space.
    text = lm.codec.decode(ids).lstrip().removeprefix(REACT_EXAMPLES).strip()
    return template.format(tried=text, answer=attempt.answer or "none")


def prefers_no(lm: LM, texts: Sequence[str], settings: RolloutSettings) -> list[bool]:
    """Return whether an instruct model would sooner write No than Yes after each text.

    The next token's logits decide: a small model rather begins a new line than to write either,
    and reading its silence as content would leave Reflexion nothing to do.
    """
    yes, no = (_last_token(lm, f"Answer: {word}") for word in ("Yes", "No"))

    def compare(numbers: list[int], search: None) -> list[bool]:
        prompts = [encode_text(lm.codec, texts[number]) for number in numbers]
        logits = lm.backend.to_numpy(lm.decoder(prompts).logits)  # (rows, vocab)
        return (logits[:, no] > logits[:, yes]).tolist()

    return in_batches(texts, compare, settings.batch_rows)


def _last_token(lm: LM, text: str) -> int:
    return lm.codec.tokenizer.encode(text, add_special_tokens=False)[-1]
