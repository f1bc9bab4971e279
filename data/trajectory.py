r"""What a trajectory is: token ids with a role and a mask each, and how text becomes one.

A trajectory is one sequence of token ids. Its parts were written by different hands, and each
token carries that with it from the moment it is made:

    Who directed Silver River? <think> director of Silver River?
    |------------- PROMPT -----------| |--------- THINK ---------|
    <begin_search> Silver River</end_search>
    |--------------- ACTION ---------------|
    <search_result> Silver River 1: A film. .. </search_result>
    |---------------------- OBSERVATION ----------------------|
    Silver River 1 says director Eva Moss.</think>\boxed{ Eva Moss}<eos>
    |----------------- THINK ---------------------||------ ANSWER ------|

Tags are single tokens and observations are encoded as plain text, so no retrieved text can open
or close one.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, Literal

from common.errors import UserError
from data.boxes import answer_in_box
from data.passages import fit_observation
from data.plain_tokenizer import make_plain_tokenizer

if TYPE_CHECKING:
    # It takes seconds to import, which --help need not wait for.
    from transformers import PreTrainedTokenizerFast

TAGS = {
    "think": "<think>",
    "end_think": "</think>",
    "search": "<begin_search>",
    "end_search": "</end_search>",
    "result": "<search_result>",
    "end_result": "</search_result>",
    "boxed": "\\boxed{",
}

SYSTEM_PROMPT = (
    "Think step by step. When you need a fact, search: write <begin_search> query </end_search> "
    "and read the <search_result>. Then give the answer as \\boxed{answer}."
)

# Stands in a chat template where the question will be.
PLACEHOLDER = "QUESTION"

# The kinds of a part: "given" is a thought that is not learned, "conclude" is said between the
# thoughts and the answer.
PartKind = Literal["think", "given", "search", "result", "conclude", "answer"]
# A part of a trajectory as text.
Part = tuple[PartKind, str]


class Role(IntEnum):
    """Whose token it is, and in which kind of step."""

    PROMPT = 0
    THINK = 1
    ACTION = 2
    OBSERVATION = 3
    ANSWER = 4


class Provenance(StrEnum):
    """Where an observation comes from."""

    REAL = "real"  # a tool answered
    IMAGINED = "imagined"  # the policy wrote it
    FAILED = "failed"  # the tool could not be reached
    MISSED = "missed"  # a cache that may not ask did not hold it


@dataclass
class Observation:
    """What the environment says to one action."""

    text: str
    provenance: Provenance = Provenance.REAL

    @property
    def is_lost(self) -> bool:
        """Whether nobody knows what the tool would have said."""
        return self.provenance in (Provenance.FAILED, Provenance.MISSED)


@dataclass
class Trajectory:
    """One rollout or taught chain; ids, mask, role and logprobs have one entry a token."""

    ids: list[int] = field(default_factory=list)
    # How much a token counts in the loss, 0 or 1; in a rollout 1 says that it is the policy's own.
    # SFT-3 may give observations a weight between them.
    mask: list[float] = field(default_factory=list)
    role: list[int] = field(default_factory=list)  # a Role each
    logprobs: list[float] = field(default_factory=list)  # of sampled tokens; 0.0 for all others
    queries: list[str] = field(default_factory=list)  # text of each action that was run
    observations: list[Observation] = field(default_factory=list)
    forced: bool = False  # a budget ran out, and the answer tag was appended for it

    def add(
        self, ids: list[int], role: Role, mask: int, logprobs: list[float] | None = None
    ) -> None:
        """Append tokens that one hand wrote in one step."""
        self.ids += ids
        self.role += [role] * len(ids)
        self.mask += [mask] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs

    @property
    def has_lost_observation(self) -> bool:
        """Whether a search failed, so that nobody knows what it would have found."""
        return any(observation.is_lost for observation in self.observations)


# The shape of a trajectory, a letter for each token: S and E open and close an action, [ and ] an
# observation; K closes the thoughts, A opens the answer; $ ends the text; o is inside an
# observation, x anything else that the policy wrote; and ! a second <think>, which fits nowhere.
WELL_FORMED = re.compile(
    r"""
    ( x* S x+ E    # a thought, then an action that is not empty
      \[ o* \] )*  # its observation
    x* K           # the last thought
    x* A           # the conclusion
    x x+           # the answer, and the brace that closes its box
    \$
    """,
    re.VERBOSE,
)


class Codec:
    """A tokenizer and the ids of the tags: text to trajectories and back.

    A text inside a trajectory is encoded as its letters alone: no tag is read in it, and no space
    is put before it. Every space stands where it was written, and decoding gives the text back.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", eos_ids: Iterable[int] = ()) -> None:
        """Raise UserError where the tokenizer lacks the tags, or a token that this form needs.

        eos_ids: all ids at which the model may end a text; its tokenizer's own is always one.
        """
        self.tokenizer = tokenizer
        ids = {name: _token_id(tokenizer, tag) for name, tag in TAGS.items()}
        if None in ids.values() or tokenizer.unk_token_id in ids.values():
            raise UserError(
                "model: this tokenizer lacks the tags; run train_sft.py, which adds them"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model: nothing says which token ends a text; name it as eos_token in "
                "tokenizer_config.json, or as eos_token_id in config.json"
            )
        self.think_id: int = ids["think"]
        self.end_think_id: int = ids["end_think"]
        self.search_id: int = ids["search"]
        self.end_search_id: int = ids["end_search"]
        self.result_id: int = ids["result"]
        self.end_result_id: int = ids["end_result"]
        self.boxed_id: int = ids["boxed"]
        # The one that is learned; a model from elsewhere may end a text with others too.
        self.eos_id: int = tokenizer.eos_token_id
        self.eos_ids: list[int] = list(dict.fromkeys([self.eos_id, *eos_ids]))
        self.special_tokens: dict[str, int] = tokenizer.get_added_vocab()
        self.plain_tokenizer = make_plain_tokenizer(tokenizer)
        self._encode_cached = functools.lru_cache(100_000)(self.encode_exactly)
        brace_ids = self.encode_exactly("}")
        if len(brace_ids) != 1 or brace_ids[0] == tokenizer.unk_token_id:
            raise UserError(
                "model: its tokenizer has no token for a closing brace, with which answers end; "
                "take another checkpoint"
            )
        self.brace_id: int = brace_ids[0]
        # Llama 2's tokenizer puts a space of its own after every special token, Llama 3's does
        # not.
        after_token = tokenizer.encode(f"{TAGS['think']}x", add_special_tokens=False)[1:]
        self.begins_anew_after_tokens = after_token != self.encode_exactly("x")

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained to be asked in turns, as instruct models are."""
        return bool(self.tokenizer.chat_template)

    @property
    def was_pretrained_with_tags(self) -> bool:
        """Whether the tags are words that the model began with, as the nano model did.

        To a checkpoint from elsewhere they were added: its vocabulary proper lacks them.
        """
        vocabulary = self.tokenizer.backend_tokenizer.model
        return vocabulary.token_to_id(TAGS["search"]) is not None

    def encode_exactly(self, text: str) -> list[int]:
        """Plain text to ids; the spelling of a tag in it is plain text too."""
        return self.plain_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_beginning(self, text: str) -> list[int]:
        """Plain text to ids as a text begins: some tokenizers put a space of their own there."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, with one leading space."""
        return list(self._encode_cached(" " + text.strip()))

    def decode(self, ids: list[int]) -> str:
        """Ids to text, tags included; a space at the beginning stays."""
        return self.plain_tokenizer.decode(ids, skip_special_tokens=False)

    def fit(self, observation: str, budget: int) -> str:
        """Return an observation of at most `budget` tokens (see fit_observation)."""

        def size(text: str) -> int:
            # The same observation comes again and again; its beginnings would fill the cache.
            if text == observation:
                return len(self.encode(text))
            return len(self.encode_exactly(" " + text.strip()))

        return fit_observation(observation, budget, size)

    def pieces(self, ids: list[int]) -> list[str]:
        """Return each id as text; a letter that several ids spell stands at the last of them."""
        pieces = []
        unfinished: list[int] = []
        for count, token in enumerate(ids, 1):
            unfinished.append(token)
            text = self.decode(unfinished)
            if not text.endswith("\ufffd") or len(unfinished) == 4 or count == len(ids):
                pieces.append(text)
                unfinished = []
            else:
                pieces.append("")
        return pieces

    # ---- prompts ---------------------------------------------------------------------------------
    def prompt(self, question: str) -> list[int]:
        """Return the prompt of a question, which ends with an opened thought.

        The template's own tags are tags; a tag that is spelled in the question is not.
        """
        if self.has_chat_template:
            before, after = self._question_frame()
            return [*self.encode_template([before, question, after]), self.think_id]
        before_ids, after_ids = self.prompt_frame()
        return before_ids + self.encode(question) + after_ids

    def prompt_frame(self) -> tuple[list[int], list[int]]:
        """Return the ids before and after the question in a prompt.

        They are a chat template's turns where the tokenizer has one, then the opening of the
        thought.
        """
        if not self.has_chat_template:
            bos = self.tokenizer.bos_token_id
            return ([] if bos is None else [bos]), [self.think_id]
        before, after = self._question_frame()
        after_ids = self.encode_template([after], begins_text=False)
        return self.encode_template([before]), [*after_ids, self.think_id]

    def _question_frame(self) -> tuple[str, str]:
        """Return the text of a chat template before and after the question.

        Raises UserError for a template that can't be filled in.
        """
        instructions = {"role": "system", "content": SYSTEM_PROMPT}
        try:
            text = self.render_chat([instructions, {"role": "user", "content": PLACEHOLDER}])
        except UserError:
            text = ""
        if SYSTEM_PROMPT not in text:
            # Some templates refuse a system turn, and some leave it out.
            turn = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{PLACEHOLDER}"}
            text = self.render_chat([turn])
        before, placeholder, after = text.rpartition(PLACEHOLDER)
        if not placeholder:
            raise UserError("model: its chat template leaves the user's turn out; mend it")
        # The template of R1 opens the thought itself.
        return before, re.sub(rf"{TAGS['think']}\s*\Z", "", after)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Return what the chat template makes of a conversation, up to the assistant's turn.

        messages: each with "role" and "content".
        Raises UserError for a template that fails, or that refuses these turns.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        # A template is a program of others: it can fail in any way.
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"model: its chat template fails on the turns {roles}: {reason}; mend "
                "chat_template.jinja, or chat_template in tokenizer_config.json"
            ) from None
        assert isinstance(text, str), "tokenize=False gives a text"
        return text

    def encode_template(self, pieces: Sequence[str], begins_text: bool = True) -> list[int]:
        """Return the ids of a template that is filled in.

        The template's own special tokens are tokens; one that is spelled in what fills it is plain
        text. All else is as transformers encodes the whole.

        pieces: texts of the template and what fills it, in turns; the template begins.
        begins_text: whether nothing stands before them.
        """
        ids: list[int] = []
        run = ""  # the text since the last special token
        begins_run = begins_text
        for number, piece in enumerate(pieces):
            is_template = number % 2 == 0
            parts = self._split_at_special_tokens(piece) if is_template else [piece]
            run += parts[0]
            for token, text in zip(parts[1::2], parts[2::2], strict=True):
                ids += self.encode_beginning(run) if begins_run else self.encode_exactly(run)
                ids.append(self.special_tokens[token])
                begins_run = self.begins_anew_after_tokens
                run = text
        return ids + (self.encode_beginning(run) if begins_run else self.encode_exactly(run))

    def _split_at_special_tokens(self, text: str) -> list[str]:
        """Return texts and the special tokens between them, in turns; a text begins and ends."""
        tokens = [token for token in self.special_tokens if token in text]
        if not tokens:
            return [text]
        # Where one begins like another, the longer one is meant.
        tokens.sort(key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, tokens))})", text)

    # ---- text to trajectories --------------------------------------------------------------------
    def build(self, question: str, parts: list[Part]) -> Trajectory:
        """Return the trajectory of a question and parts, as a teacher writes it.

        Raises ValueError for a part of no known kind.

        >>> codec.build("Who?", [("think", "Hm."), ("answer", "Eva")]).mask  # 1: learned
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
        """
        trajectory = Trajectory()
        trajectory.add(self.prompt(question), Role.PROMPT, 0)
        has_conclusion = any(kind == "conclude" for kind, _ in parts)
        for kind, text in parts:
            if kind == "think":
                trajectory.add(self.encode(text), Role.THINK, 1)
            elif kind == "given":
                trajectory.add(self.encode(text), Role.THINK, 0)
            elif kind == "search":
                action = [self.search_id, *self.encode(text), self.end_search_id]
                trajectory.add(action, Role.ACTION, 1)
                trajectory.queries.append(text)
            elif kind == "result":
                trajectory.add(self.wrap_observation(text), Role.OBSERVATION, 0)
                trajectory.observations.append(Observation(text))
            elif kind == "conclude":
                trajectory.add([self.end_think_id, *self.encode(text)], Role.THINK, 1)
            elif kind == "answer":
                if not has_conclusion:
                    trajectory.add([self.end_think_id], Role.THINK, 1)
                answer = [self.boxed_id, *self.encode(text), self.brace_id, self.eos_id]
                trajectory.add(answer, Role.ANSWER, 1)
            else:
                raise ValueError(f"no kind of part: {kind!r}")
        return trajectory

    def wrap_observation(self, text: str) -> list[int]:
        """Return the ids of an observation between its tags."""
        return [self.result_id, *self.encode(text), self.end_result_id]

    def build_pair(
        self, question: str, prefix: list[Part], first: list[Part], second: list[Part]
    ) -> tuple[Trajectory, Trajectory]:
        """Return two trajectories that go on from one beginning, which carries no loss."""
        shared = len(self.build(question, prefix).ids)
        pair = (self.build(question, prefix + first), self.build(question, prefix + second))
        for trajectory in pair:
            trajectory.mask[:shared] = [0] * shared
        return pair

    # ---- trajectories to text --------------------------------------------------------------------
    def last_query(self, ids: list[int]) -> str:
        """Return the text of the action that these ids end with."""
        start = len(ids) - ids[::-1].index(self.search_id)
        return self.decode(ids[start:-1]).strip()

    def answer(self, trajectory: Trajectory) -> str:
        """Return the text in the last box of a trajectory, "" where there is none."""
        boxes = [
            position
            for position, (token, role) in enumerate(
                zip(trajectory.ids, trajectory.role, strict=True)
            )
            if token == self.boxed_id and role == Role.ANSWER
        ]
        if not boxes:
            return ""
        ids = trajectory.ids[boxes[-1] + 1 :]
        for position, token in enumerate(ids):
            if token in self.eos_ids:
                ids = ids[:position]
                break
        return answer_in_box(self.decode(ids))

    def is_well_formed(self, trajectory: Trajectory) -> bool:
        """Whether the policy closed every step in order and answered by itself.

        The order is (think | action observation)* end-of-thought conclusion answer eos. Roles say
        whose tokens these are, and tags are read from ids, never from text. What the policy
        imagines inside an observation is the environment's, tags too.
        """
        if trajectory.forced:
            return False
        is_ordered = WELL_FORMED.fullmatch(self._shape(trajectory)) is not None
        return is_ordered and trajectory.ids[-2] == self.brace_id

    def _shape(self, trajectory: Trajectory) -> str:
        """Return a letter for each token after the prompt, as WELL_FORMED has them."""
        letters = {
            self.end_think_id: "K",
            self.think_id: "!",
            self.search_id: "S",
            self.end_search_id: "E",
            self.result_id: "[",
            self.end_result_id: "]",
            self.boxed_id: "A",
        } | dict.fromkeys(self.eos_ids, "$")
        is_observation = [role == Role.OBSERVATION for role in trajectory.role]
        previous_is_observation = [False, *is_observation]
        next_is_observation = [*is_observation[1:], False]
        shape = []
        for position, (token, role) in enumerate(zip(trajectory.ids, trajectory.role, strict=True)):
            if role == Role.PROMPT:
                continue
            inside = (
                previous_is_observation[position]
                and is_observation[position]
                and next_is_observation[position]
            )
            shape.append("o" if inside else letters.get(token, "x"))
        return "".join(shape)


def _token_id(tokenizer: "PreTrainedTokenizerFast", token: str) -> Any:
    """Return the id of one token; None, or the id of unknown tokens, where there is none."""
    return tokenizer.convert_tokens_to_ids(token)
