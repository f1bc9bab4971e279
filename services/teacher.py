r"""A language model as teacher: chains for real questions, kept where they end in a golden answer.

    python -m services.teacher config/smollm2.py --teacher=http://127.0.0.1:8000/v1#NAME \
        --train_data=hotpotqa_train.jsonl --corpus=passages.jsonl.gz --coa=500 --out=taught
    python train_sft.py config/smollm2.py \
        --sft_files=taught/coa.jsonl,taught/cot.jsonl,taught/pairs.json ..

--teacher is an OpenAI-compatible endpoint or a local folder (see services/chat.py). A question gets
up to --tries chains of action, at a temperature from the second on. Each of them also gets a chain
of thought, which goes on from the same beginning without the tool. The first of each kind that is
right is kept (rejection sampling). A pair for SFT-1 comes from a try that exactly one of the two
solved. They share all that was thought before the first action, and part there.

The files written are AutoCoA's (see data/autocoa_files.py). What the model and the tool said is
cached, so that a run that was interrupted goes on where it was.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tools
from common.errors import UserError
from common.files import write_jsonl, write_text
from common.settings import AboveZero, ModelSettings, RolloutSettings, TaskRunSettings, main
from data.autocoa_files import parse_trajectory
from data.passages import fit_observation
from data.question_files import read_question_sets
from data.questions import Question
from data.scores import exact_match
from data.trajectory import TAGS, Observation
from services.chat import Chat, Conversation

ACT = """Answer the question. Think in short plain sentences before you answer. \
While you think you may search an encyclopedia: \
write <begin_search> what you look for </end_search> and stop; \
you will be shown what was found, and go on thinking from there. \
Search for every fact that you are not sure of, one at a time, at most {max_actions} times. \
When you know the answer, \
write </think> and then the answer, as short as it can be: \\boxed{{answer}}

Question: {question}"""

THINK = """Answer the question from what you know. Think in short plain sentences, \
then write </think> and the answer, as short as it can be: \\boxed{{answer}}

Question: {question}"""

GO_ON = "Go on from there to the end, from what you know, without searching."

TURN_TOKENS = 512  # of a turn at most
TEMPERATURE = 0.8  # from the second try on


@dataclass(kw_only=True)
class TeacherSettings(ModelSettings, TaskRunSettings, RolloutSettings):
    """Settings of `python -m services.teacher`."""

    # The language model that writes chains: an OpenAI-compatible endpoint, or a local folder.
    teacher: str = ""
    # Chains of action that a question gets at most, until one is right.
    tries: AboveZero = 4
    # Questions to write chains for, drawn from all of --train_data.
    coa: int = 5000
    # Folder to write to.
    out: str = ""


@dataclass
class Attempt:
    """A chain of action that a teacher writes, turn by turn."""

    conversation: Conversation
    text: str = ""  # the trajectory as text, without <think>
    has_lost_observation: bool = False  # a search failed: nobody knows what it would have found

    @property
    def acts(self) -> bool:
        """Whether the teacher searched."""
        return TAGS["search"] in self.text

    @property
    def beginning(self) -> str:
        """What was thought before the first action; "" where there was none."""
        if not self.acts:
            return ""
        return self.text.partition(TAGS["search"])[0].strip()

    @property
    def first_action(self) -> str:
        """The first action with its tags."""
        query = self.text.partition(TAGS["search"])[2].partition(TAGS["end_search"])[0]
        return TAGS["search"] + query + TAGS["end_search"]

    def add_action(self, reply: str) -> None:
        """Close the action that a reply ends with."""
        self.text += TAGS["end_search"]
        self.conversation.append({"role": "assistant", "content": reply + TAGS["end_search"]})

    def add_observation(self, observation: Observation, budget: int) -> None:
        """Show what the tool said to the last action.

        budget: its tokens at most, at four letters a token, since a teacher has a tokenizer of
        its own.
        """
        text = fit_observation(observation.text, budget, lambda text: len(text) // 4)
        result = f"{TAGS['result']} {text} {TAGS['end_result']}"
        self.text += f"\n{result}\n"
        self.conversation.append({"role": "user", "content": result})
        self.has_lost_observation |= observation.is_lost


def write_chains_of_action(
    chat: Chat,
    questions: list[Question],
    search: Callable[[list[str]], list[Observation]],
    settings: RolloutSettings,
    sample: int,
) -> list[Attempt]:
    """Run Algorithm 1 with a chat model: one turn after the other, until none asks for a search.

    sample: number of the try, from 0 on.
    """
    attempts = []
    for question in questions:
        prompt = ACT.format(question=question.question, max_actions=settings.max_actions)
        attempts.append(Attempt([{"role": "user", "content": prompt}]))

    unfinished = attempts
    for turn in range(settings.max_actions + 1):
        # 1. The teacher thinks, up to an action or the answer.
        replies = chat(
            [attempt.conversation for attempt in unfinished],
            TURN_TOKENS,
            stop=(TAGS["end_search"], TAGS["result"]),
            temperature=_temperature(sample),
            sample=sample,
            description=f"chains of action, turn {turn + 1}",
        )
        acting = []
        queries = []
        for attempt, reply in zip(unfinished, replies, strict=True):
            text = read_turn(reply)
            attempt.text += text
            if turn < settings.max_actions and _ends_in_action(text):
                attempt.add_action(reply)
                acting.append(attempt)
                queries.append(text.rpartition(TAGS["search"])[2].strip())
        if not acting:
            break

        # 2. The tool answers.
        for attempt, observation in zip(acting, search(queries), strict=True):
            attempt.add_observation(observation, settings.max_observation)
        unfinished = acting
    return attempts


def write_chains_of_thought(
    chat: Chat, questions: list[Question], beginnings: list[str], sample: int
) -> list[str]:
    """Return how the teacher goes on from each beginning without the tool.

    beginnings: what it thought before its first action; "" begins anew. They are left out of the
    texts returned.
    """
    conversations = []
    for question, beginning in zip(questions, beginnings, strict=True):
        prompt = THINK.format(question=question.question)
        conversation = [{"role": "user", "content": prompt}]
        if beginning:
            conversation.append({"role": "assistant", "content": beginning})
            conversation.append({"role": "user", "content": GO_ON})
        conversations.append(conversation)
    replies = chat(
        conversations,
        TURN_TOKENS,
        stop=(TAGS["search"],),
        temperature=_temperature(sample),
        sample=sample,
        description="chains of thought",
    )
    return [read_turn(reply) for reply in replies]


def _temperature(sample: int) -> float:
    """Return the temperature of a try: the first is greedy."""
    return TEMPERATURE if sample > 0 else 0.0


def read_turn(reply: str) -> str:
    r"""Return what a reply adds to a trajectory, whose thought is open already.

    A thinking model thinks before it speaks: <think> thought </think> speech. Where its speech is a
    step of ours, which searches or ends the thought by itself, all of it is one thought.

    >>> read_turn("<think>Who? </think>I look. <begin_search> Clay")
    'Who? I look. <begin_search> Clay'
    >>> read_turn("<think>It is Eva.</think>\\boxed{Eva}")
    'It is Eva.</think>\\boxed{Eva}'
    """
    text = _without_opening(reply)
    thought, _, speech = text.partition(TAGS["end_think"])
    before_answer = speech.partition(TAGS["boxed"])[0]
    if TAGS["search"] not in before_answer and TAGS["end_think"] not in before_answer:
        return text
    # A tag that it only thinks about is no action.
    thought = thought.replace(TAGS["search"], "").strip()
    return f"{thought} {_without_opening(speech)}".lstrip()


def _without_opening(reply: str) -> str:
    """Return a reply without the <think> that some models write themselves."""
    return reply.lstrip().removeprefix(TAGS["think"])


def _ends_in_action(text: str) -> bool:
    return TAGS["search"] in text and TAGS["end_think"] not in text


def is_right(text: str, golden_answers: list[str]) -> bool:
    """Whether a text is a whole trajectory that ends in a golden answer."""
    try:
        parts = parse_trajectory(text)
    except ValueError:
        return False
    _, answer = parts[-1]
    return exact_match(answer, golden_answers) == 1.0


@dataclass
class TaughtRows:
    """Rows of AutoCoA's files, by the number of the question that they belong to."""

    chains_of_action: dict[int, dict[str, Any]] = field(default_factory=dict)
    chains_of_thought: dict[int, dict[str, Any]] = field(default_factory=dict)
    pairs: dict[int, dict[str, Any]] = field(default_factory=dict)


def teach(
    chat: Chat,
    questions: list[Question],
    search: Callable[[list[str]], list[Observation]],
    settings: TeacherSettings,
) -> TaughtRows:
    """Sample chains and keep the first of each kind that is right (rejection sampling)."""
    rows = TaughtRows()
    unsolved = list(range(len(questions)))
    for sample in range(settings.tries):
        # 1. The same beginning with the tool and without it.
        batch = [questions[number] for number in unsolved]
        attempts = write_chains_of_action(chat, batch, search, settings, sample)
        beginnings = [attempt.beginning for attempt in attempts]
        thoughts = write_chains_of_thought(chat, batch, beginnings, sample)

        # 2. What is right is kept.
        for number, attempt, thought in zip(unsolved, attempts, thoughts, strict=True):
            if not attempt.has_lost_observation:
                _keep_what_is_right(rows, number, questions[number], attempt, thought)

        # 3. A question without a chain of action is tried again.
        unsolved = [number for number in unsolved if number not in rows.chains_of_action]
        if not unsolved:
            break
    return rows


def _keep_what_is_right(
    rows: TaughtRows, number: int, question: Question, attempt: Attempt, thought: str
) -> None:
    """Keep the chains and the pair of one try; the first of each kind stays."""
    chain_of_thought = f"{attempt.beginning} {thought}"
    solved_by_acting = is_right(attempt.text, question.golden_answers)
    solved_by_thinking = is_right(chain_of_thought, question.golden_answers)
    if solved_by_acting:
        chains = rows.chains_of_action if attempt.acts else rows.chains_of_thought
        chains.setdefault(number, _chain_row(question, attempt.text))
    if solved_by_thinking:
        rows.chains_of_thought.setdefault(number, _chain_row(question, chain_of_thought))

    # The thought in the action's place: one line of it, up to the end of all thinking.
    first_line = thought.strip().partition("\n")[0]
    next_thought = first_line.partition(TAGS["end_think"])[0].strip()
    if not attempt.acts or solved_by_acting == solved_by_thinking or not next_thought:
        return
    if solved_by_acting:
        pair = _pair_row(question, attempt.beginning, attempt.first_action, next_thought)
    else:
        pair = _pair_row(question, attempt.beginning, next_thought, attempt.first_action)
    rows.pairs.setdefault(number, pair)


def _chain_row(question: Question, text: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question.question},
            {"role": "assistant", "content": TAGS["think"] + text},
        ]
    }


def _pair_row(question: Question, beginning: str, chosen: str, rejected: str) -> dict[str, Any]:
    prompt = question.question + TAGS["think"] + beginning
    return {
        "conversation": [{"from": "human", "value": prompt}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def _in_order(rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in the order of their questions."""
    return [rows[number] for number in sorted(rows)]


def run(settings: TeacherSettings) -> None:
    """Write coa.jsonl, cot.jsonl and pairs.json."""
    if not (settings.teacher and settings.train_data and settings.corpus and settings.out):
        raise UserError(
            "--teacher, --train_data, --corpus, --out: services.teacher needs all four: "
            "a model, question files, where to search, and a folder to write to"
        )
    if settings.dry_run:
        raise UserError("--dry-run: services.teacher has no estimate; try it with --coa=2")
    # The sample is drawn from all files, not from the first.
    question_sets = read_question_sets(settings.train_data, "--train_data")
    questions = [question for members in question_sets.values() for question in members]
    count = min(settings.coa, len(questions))
    questions = random.Random(settings.seed).sample(questions, count)

    chat = Chat(settings.teacher, settings, "teacher", batch_rows=settings.batch_rows)
    search = tools.open_library(settings.corpus, settings.top_k, settings.language, settings.cache)
    rows = teach(chat, questions, search, settings)

    folder = Path(settings.out)
    chains_of_action = _in_order(rows.chains_of_action)
    chains_of_thought = _in_order(rows.chains_of_thought)
    pairs = _in_order(rows.pairs)
    write_jsonl(folder / "coa.jsonl", chains_of_action)
    write_jsonl(folder / "cot.jsonl", chains_of_thought)
    write_text(folder / "pairs.json", json.dumps(pairs, indent=1))
    print(
        f"{folder}: {len(chains_of_action)} chains of action, {len(chains_of_thought)} chains of "
        f"thought and {len(pairs)} pairs, of {len(questions)} questions"
    )
    print(chat.report())
    print(search.report())


if __name__ == "__main__":
    # Chains belong to no run, so no run's remembered settings are read.
    main(run, TeacherSettings, __doc__, begins_run=lambda settings: True)
