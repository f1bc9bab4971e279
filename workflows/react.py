"""The ReAct workflow (Yao et al. 2022): a script outside the model makes it think, act, observe.

It runs in the loop of Algorithm 1 (autocoa.run_rows) with a script of its own, so an agent
and a workflow differ in this file alone: here every pause and every call is the script's decision.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autocoa import Row, Search, run_rows
from common.settings import TAG_ROOM, RolloutSettings
from data.boxes import answer_in_box
from data.trajectory import Codec, Observation, Role, Trajectory
from model import LM
from workflows.agent import Answered
from workflows.batches import in_batches

TOO_LONG = "The result is too long to show."
SHORTEST_OBSERVATION = 64  # tokens that must be free for an observation, or no action is begun


@dataclass
class Phrases:
    """How a workflow speaks to a model: ids that it puts in, and ids at which a turn ends."""

    prompt: Callable[[str], list[int]]  # of a question
    thought_ends: list[int]
    action: list[int]  # opens a query
    action_ends: list[int]
    before_observation: list[int]
    after_observation: list[int]
    ask_answer: list[int]  # asks for the final answer
    answer_ends: list[int]
    answer_pattern: re.Pattern[str]  # finds an answer that the model gives in a thought
    newline: list[int] = field(default_factory=list)  # ends a line that did not come to its end
    example_tokens: int = 0  # room for examples, beside the model's own tokens


@dataclass
class Progress:
    """What the workflow remembers of a row: it is the row's `workflow`."""

    turns: int = 0  # observations that it has read
    given: str | None = None  # an observation that it reads instead of searching
    answer: str = ""


class ReAct:
    """A controller for autocoa.run_rows: thought, action, observation, again and again.

    It ends when the model gives an answer in a thought. When its calls or its tokens are spent,
    the model is asked for one. A row that is given an observation reads it instead of acting.
    """

    writing_share = 0.0  # all rows finish their line before the script goes on

    def __init__(
        self,
        codec: Codec,
        settings: RolloutSettings,
        max_actions: int,
        phrases: Phrases,
    ) -> None:
        self.codec = codec
        self.settings = settings
        self.max_actions = max_actions
        self.phrases = phrases
        # The examples do not count as the model's own tokens.
        self.max_len = settings.max_len + phrases.example_tokens
        # An answer may always have to be asked for.
        self.answer_room = len(self.phrases.ask_answer) + settings.max_answer
        # A thought and an answer must still find room after an observation.
        self.room_after_observation = settings.max_thought + self.answer_room + TAG_ROOM

    def start_row(self, question: str, given: str | None) -> Row:
        """Return the row of a question before anything is written."""
        row = Row(Trajectory(), workflow=Progress(given=given))
        row.trajectory.add(self.phrases.prompt(question), Role.PROMPT, 0)
        return row

    def _reads_to_the_end(self, row: Row) -> bool:
        """Whether this row has seen all that it is given, and reads on to its answer."""
        return row.workflow.given is not None and row.workflow.turns == self.max_actions

    def stops(self, row: Row) -> list[int]:
        """Return the ids that end a thought, an action or an answer."""
        if row.state == Role.ACTION:
            return self.phrases.action_ends
        # What ends a thought elsewhere only ends one fact of several here.
        if row.state == Role.ANSWER or self._reads_to_the_end(row):
            return self.phrases.answer_ends
        return self.phrases.thought_ends

    def budget(self, row: Row) -> int:
        """Return how many tokens a thought, an action or an answer may take."""
        room = self.max_len - len(row.trajectory.ids) - 1
        if row.state == Role.ANSWER:
            return min(self.settings.max_answer, room)
        budget = self.settings.max_thought
        if row.state == Role.THINK and self._reads_to_the_end(row):
            budget = self.settings.max_actions * self.settings.max_thought
        return min(budget, room - self.answer_room)

    def continue_row(self, row: Row, ids: list[int], logprobs: list[float], spent: bool) -> None:
        """Add what the model wrote, and put in what the script says next."""
        row.trajectory.add(ids, row.state, 1)
        ends = (*self.codec.eos_ids, self.codec.end_search_id)
        text = self.codec.decode([token for token in ids if token not in ends]).strip()
        if row.state == Role.THINK:
            self._continue_thought(row, text)
        elif row.state == Role.ACTION:
            row.query = text
            row.trajectory.queries.append(text)
        else:
            row.workflow.answer = answer_in_box(text)
            row.finished = True

    def _continue_thought(self, row: Row, thought: str) -> None:
        """End with the answer that a thought gives, or ask for one, or act."""
        answer = self.phrases.answer_pattern.search(thought)
        if answer:
            row.workflow.answer = answer.group(1).strip()
            row.finished = True
        elif self._must_answer(row):
            self._put(row, self.phrases.ask_answer, Role.ANSWER)
        elif row.workflow.given is not None:
            self._put_observation(row, Observation(row.workflow.given))
        else:
            self._put(row, self.phrases.action, Role.ACTION)

    def _must_answer(self, row: Row) -> bool:
        """Whether no call is left, or no room for one more."""
        one_more_turn = (
            len(self.phrases.action)
            + self.settings.max_thought
            + SHORTEST_OBSERVATION
            + self.room_after_observation
        )
        no_room = len(row.trajectory.ids) + one_more_turn > self.max_len
        return row.workflow.turns == self.max_actions or no_room

    def read_observation(self, row: Row, observation: Observation) -> None:
        """Show the model what the tool said."""
        text = self.codec.fit(observation.text, self.settings.max_observation)
        self._put_observation(row, Observation(text, observation.provenance))

    def _put_observation(self, row: Row, observation: Observation) -> None:
        row.trajectory.observations.append(observation)
        ids = self._wrap(observation.text)
        if len(row.trajectory.ids) + len(ids) + self.room_after_observation > self.max_len:
            ids = self._wrap(TOO_LONG)
        self._put(row, ids, Role.OBSERVATION)
        row.state = Role.THINK
        row.workflow.turns += 1

    def _wrap(self, text: str) -> list[int]:
        observation = self.codec.encode(text)
        return self.phrases.before_observation + observation + self.phrases.after_observation

    def _put(self, row: Row, ids: list[int], role: Role) -> None:
        """Add what the script says, on a new line where the model's line did not end."""
        last = row.trajectory.ids[-1]
        if last in self.codec.eos_ids or last not in self.phrases.thought_ends:
            ids = self.phrases.newline + ids
        row.append(ids, role)
        row.state = role


def react(
    lm: LM,
    questions: Sequence[str],
    search: Search | None,
    settings: RolloutSettings,
    phrases: Phrases,
    max_actions: int | None = None,
    description: str | None = None,
    given: Sequence[str] | None = None,
) -> list[Answered]:
    """Answer questions by the ReAct workflow, greedily. Several processes share them.

    phrases: how the model is spoken to (workflows/style.py).
    max_actions: calls of the tool; as many as an agent has where it is not said.
    given: an observation for each question, which the model reads instead of searching.
    """
    if max_actions is None:
        max_actions = settings.max_actions
    controller = ReAct(lm.codec, settings, max_actions, phrases)

    def answer(numbers: list[int], search: Search | None) -> list[Answered]:
        rows = [
            controller.start_row(questions[number], given[number] if given else None)
            for number in numbers
        ]
        decoder = lm.decoder([row.trajectory.ids for row in rows])
        run_rows(controller, decoder, rows, search)
        return [Answered(row.workflow.answer, row.trajectory) for row in rows]

    return in_batches(questions, answer, settings.batch_rows, search, description)
