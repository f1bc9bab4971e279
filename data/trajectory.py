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
import json
import re
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data.passages import fit_observation

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


class Codec:
    """A tokenizer and the ids of the tags: text to trajectories and back."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise UserError where the tokenizer lacks the tags."""
        self.tokenizer = tokenizer
        ids = {name: _token_id(tokenizer, tag) for name, tag in TAGS.items()}
        if None in ids.values() or tokenizer.unk_token_id in ids.values():
            raise UserError(
                "model: this tokenizer lacks the tags; run train_sft.py, which adds them"
            )
        self.think_id: int = ids["think"]
        self.end_think_id: int = ids["end_think"]
        self.search_id: int = ids["search"]
        self.end_search_id: int = ids["end_search"]
        self.result_id: int = ids["result"]
        self.end_result_id: int = ids["end_result"]
        self.boxed_id: int = ids["boxed"]
        # The brace that ends an answer is an ordinary token in every byte-level vocabulary.
        self.brace_id: int = _token_id(tokenizer, "}")
        self.eos_id: int = tokenizer.eos_token_id
        self.plain_tokenizer = _without_special_tokens(tokenizer)
        self._encode_cached = functools.lru_cache(100_000)(self.encode_exactly)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained to be asked in words, as instruct models are."""
        return bool(self.tokenizer.chat_template)

    def encode_exactly(self, text: str) -> list[int]:
        """Plain text to ids; the spelling of a tag in it is plain text too."""
        return self.plain_tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, with one leading space."""
        return list(self._encode_cached(" " + text.strip()))

    def decode(self, ids: list[int]) -> str:
        """Ids to text, tags included."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        assert isinstance(text, str), "one list of ids is one text"
        return text

    def fit(self, observation: str, budget: int) -> str:
        """Return an observation of at most `budget` tokens (see fit_observation)."""
        return fit_observation(
            observation, budget, lambda text: len(self.encode_exactly(" " + text.strip()))
        )

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
    def prompt_frame(self) -> tuple[list[int], list[int]]:
        """Return the ids before and after the question in a prompt.

        They are a chat template's turns where the tokenizer has one, then the opening of the
        thought.
        """
        if not self.has_chat_template:
            bos = self.tokenizer.bos_token_id
            return ([] if bos is None else [bos]), [self.think_id]
        messages = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": "QUESTION"},
        ]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str), "tokenize=False gives a text"
        before, _, after = text.rpartition("QUESTION")
        # The template of R1 opens the thought itself.
        after = re.sub(rf"{TAGS['think']}\s*\Z", "", after)
        before_ids = self.tokenizer.encode(before, add_special_tokens=False)
        after_ids = self.tokenizer.encode(after, add_special_tokens=False)
        return before_ids, after_ids + [self.think_id]

    def prompt(self, question: str) -> list[int]:
        """Return the prompt of a question.

        The template's own tags are tags; a tag that is spelled in the question is not.
        """
        before, after = self.prompt_frame()
        if self.has_chat_template:
            return before + self.encode_exactly(question) + after
        return before + self.encode(question) + after

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
            if token in (self.brace_id, self.eos_id):
                ids = ids[:position]
                break
        # Reasoning models write \boxed{\text{..}}.
        return self.decode(ids).strip().removeprefix("\\text{").strip()

    def is_well_formed(self, trajectory: Trajectory) -> bool:
        """Whether the policy closed every step in order and answered by itself.

        The order is (think | action observation)* end-of-thought conclusion answer eos. Roles say
        whose tokens these are, and tags are read from ids, never from text. What the policy
        imagines inside an observation is the environment's, tags too.
        """
        if trajectory.forced:
            return False
        shape = "".join(self._shape_letters(trajectory))
        ordered = re.fullmatch(r"(x*Sx+E\[o*\])*x*Kx*Axx+\$", shape) is not None
        return ordered and trajectory.ids[-2] == self.brace_id

    def _shape_letters(self, trajectory: Trajectory) -> list[str]:
        """Return a letter for each token after the prompt: tags by name, o inside observations."""
        letters = {
            self.end_think_id: "K",
            self.think_id: "!",
            self.search_id: "S",
            self.end_search_id: "E",
            self.result_id: "[",
            self.end_result_id: "]",
            self.boxed_id: "A",
            self.eos_id: "$",
        }
        roles = [Role.PROMPT, *trajectory.role, Role.PROMPT]
        shape = []
        for position, token in enumerate(trajectory.ids):
            before, role, after = roles[position : position + 3]
            if role == Role.PROMPT:
                continue
            inside = before == role == after == Role.OBSERVATION
            shape.append("o" if inside else letters.get(token, "x"))
        return shape


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> Any:
    """Return the id of one token; None, or the id of unknown tokens, where there is none."""
    return tokenizer.convert_tokens_to_ids(token)


def _without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a tokenizer to which the spelling of a tag is plain text.

    It is also ten times as fast as the tokenizer of transformers.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in description["added_tokens"]:
        # Some checkpoints have <think> as a token like any other.
        token["special"] = True
    plain_tokenizer = Tokenizer.from_str(json.dumps(description))
    plain_tokenizer.encode_special_tokens = True
    return plain_tokenizer
