r"""An agent that spells its tags: a checkpoint of AutoCoA's own code, asked as its authors ask.

They train on text, so what are tokens of their own here are several tokens of the checkpoint there:

    (instructions) Who directed Silver River? <think> I should look that up.
    <begin_search> Silver River </end_search>

    <search_result> result 1: "Silver River" .. </search_result>

    It was Eva Moss. </think> The director is \boxed{Eva Moss}

It runs in the loop of Algorithm 1 (autocoa.run_rows), and pauses wherever a tag may have ended.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from autocoa import Row, Search, open_row, random_stream, run_rows
from common.settings import RolloutSettings
from data.instructions import AUTHORS_INSTRUCTIONS, authors_turn
from data.passages import split_observation
from data.trajectory import PLACEHOLDER, TAGS, Codec, Observation, Role, Trajectory
from model import LM
from workflows.agent import Answered
from workflows.batches import in_batches

TEMPERATURE = 0.6  # the authors draw one answer to each question
ACTION = re.compile(f"{re.escape(TAGS['search'])}(.*?){re.escape(TAGS['end_search'])}", re.S)
LIMIT_REACHED = "Reach the limit of search times."
# Tokens that the authors let a model write before its first result, after one, and at the limit.
FIRST_TURN = 2048
LATER_TURN = 1024
LAST_TURN = 2048
# Up to the first closing brace, whatever stands in the box; see data/boxes.py for a better one.
BOX = re.compile(r"\\boxed{([^}]*)}")
THINK_TAGS = TAGS["think"] + TAGS["end_think"]  # as the instructions mention them
# Before an answer that stands in no box.
ANSWER_PHRASE = re.compile(
    r"(?:The answer is|Therefore,|Thus,|So,|In conclusion,|Hence,)[:\s]+([^.]+)", re.I
)


# ---- text in, text out ---------------------------------------------------------------------------
def authors_prompt(codec: Codec, question: str) -> list[int]:
    """Return the ids of the chat that the authors ask a question in, with its tags spelled.

    Raises UserError for a chat template that can't be filled in.
    """
    text = codec.render_chat([{"role": "user", "content": authors_turn(PLACEHOLDER)}])
    before, _, after = text.rpartition(PLACEHOLDER)
    opening = before.removesuffix(AUTHORS_INSTRUCTIONS)
    pieces = [opening, AUTHORS_INSTRUCTIONS + question, after]
    if TAGS["end_think"] in codec.tokenizer.chat_template:
        # To a reasoning model, the tags of thoughts are tokens of its own.
        head, _, tail = AUTHORS_INSTRUCTIONS.partition(THINK_TAGS)
        pieces = [opening, head, THINK_TAGS, tail + question, after]
    return codec.encode_template(pieces)


def authors_answer(text: str) -> str:
    """Return the answer that the authors' code reads in what a model wrote, "" where none is.

    It stands after the thoughts, in the last box that is closed; else after a phrase such as "The
    answer is", or it is the last whole sentence. Who searches after the thoughts has not answered.
    """
    _, closed, conclusion = text.rpartition(TAGS["end_think"])
    if not closed or TAGS["search"] in conclusion:
        return ""
    boxes = BOX.findall(conclusion)
    if boxes:
        return boxes[-1].strip()
    phrase = ANSWER_PHRASE.search(conclusion)
    if phrase:
        return phrase[1].strip()
    sentences = conclusion.strip().split(".")
    return sentences[-2 if len(sentences) > 1 else -1].strip()


def authors_result(observation: str) -> str:
    """Return what a search found, as the authors show it to the model."""
    passages = [
        f'result {passage.number}: "{passage.title}"\n{passage.text}'
        for passage in split_observation(observation)
    ]
    return f"\n\n{TAGS['result']} " + "\n".join(passages) + f" {TAGS['end_result']}\n\n\n\n"


# ---- the agent -----------------------------------------------------------------------------------
@dataclass
class Turn:
    """What a row writes between two results: it is the row's `workflow`."""

    start: int  # tokens of the row before it
    most_tokens: int
    may_search: bool = True
    # Letters after the tag that ended it, of the tag's last token: some have ">" and line breaks.
    after_tag: str = ""


class SpelledAgent:
    """A controller for autocoa.run_rows: the loop of the authors' vllm_rollout_coa.py."""

    writing_share = 0.6  # as the Agent's

    def __init__(self, codec: Codec, settings: RolloutSettings) -> None:
        self.codec = codec
        self.settings = settings
        vocabulary = codec.tokenizer.get_vocab().items()
        tag_ends = [token_id for token, token_id in vocabulary if ">" in token]
        self.stop_ids = [*tag_ends, *codec.eos_ids]

    def start_row(self, question: str, seed: int) -> Row:
        """Return the row of a question before anything is written.

        Raises UserError for a prompt that leaves no room for an answer.
        """
        row = open_row(authors_prompt(self.codec, question), self.settings)
        row.workflow = Turn(len(row.trajectory.ids), FIRST_TURN)
        row.stream = random_stream(self.settings.max_len, seed, zlib.crc32(question.encode()))
        return row

    def stops(self, row: Row) -> list[int]:
        """Pause wherever a tag may have ended, as long as one counts."""
        return self.stop_ids if row.workflow.may_search else self.codec.eos_ids

    def budget(self, row: Row) -> int:
        """Return how many tokens are left of its turn, and in all; there is no forced answer."""
        end = min(self.settings.max_len, row.workflow.start + row.workflow.most_tokens)
        return end - len(row.trajectory.ids)

    def continue_row(self, row: Row, ids: list[int], logprobs: list[float], spent: bool) -> None:
        """Add what the model wrote, and search where an action has ended."""
        row.trajectory.add(ids, Role.THINK, 1, logprobs)
        turn = row.workflow
        action = None
        written = ""
        if turn.may_search:
            written = self.codec.decode(row.trajectory.ids[turn.start :])
            action = ACTION.search(written.partition(TAGS["end_think"])[0])
        query = action[1].strip() if action is not None else ""
        if action is None or not query:
            if action is not None:
                # An empty query is none, and hides what the turn might still search for.
                turn.may_search = False
            row.finished = spent or row.trajectory.ids[-1] in self.codec.eos_ids
            return
        turn.after_tag = written[action.end() :]
        if len(row.trajectory.queries) == self.settings.max_actions:
            limit = f"\n\n{TAGS['result']} {LIMIT_REACHED} {TAGS['end_result']}\n\n"
            self._put(row, limit, LAST_TURN, may_search=False)
        else:
            row.query = query
            row.trajectory.queries.append(query)

    def read_observation(self, row: Row, observation: Observation) -> None:
        """Show the model what the tool said."""
        text = self.codec.fit(observation.text, self.settings.max_observation)
        row.trajectory.observations.append(Observation(text, observation.provenance))
        self._put(row, authors_result(text), LATER_TURN)

    def _put(self, row: Row, result: str, most_tokens: int, may_search: bool = True) -> None:
        """Add a result and begin a turn, or end a row that has no room for it and another word."""
        # Line breaks that stand there already are not written twice.
        ids = self.codec.encode_exactly(result.removeprefix(row.workflow.after_tag))
        if len(row.trajectory.ids) + len(ids) >= self.settings.max_len:
            row.finished = True
            return
        row.append(ids, Role.OBSERVATION)
        row.workflow = Turn(len(row.trajectory.ids), most_tokens, may_search)


def answer_spelled(
    lm: LM,
    questions: Sequence[str],
    search: Search,
    settings: RolloutSettings,
    seed: int,
    description: str | None = None,
) -> list[Answered]:
    """Answer questions as the authors have their models answer. Several processes share them.

    seed: with the question, of the random numbers that its tokens are drawn by.
    Raises UserError for a prompt that leaves no room for an answer.
    """
    controller = SpelledAgent(lm.codec, settings)

    def answer(numbers: list[int], search: Search) -> list[Answered]:
        rows = [controller.start_row(questions[number], seed) for number in numbers]
        decoder = lm.decoder([row.trajectory.ids for row in rows])
        run_rows(controller, decoder, rows, search, TEMPERATURE)
        return [_read_answer(lm.codec, row.trajectory) for row in rows]

    return in_batches(questions, answer, settings.batch_rows, search, description)


def _read_answer(codec: Codec, trajectory: Trajectory) -> Answered:
    written = [
        token
        for token, role in zip(trajectory.ids, trajectory.role, strict=True)
        if role != Role.PROMPT and token not in codec.eos_ids
    ]
    return Answered(authors_answer(codec.decode(written)), trajectory)
