"""A distilled world model: a separate network that answers queries as the search tool does.

It is a tool like any other: action texts in, observations out, with the provenance IMAGINED. It
reads a query between the tags of a trajectory and writes the observation, greedily:

    <begin_search> Silver River</end_search><search_result> Silver River 1: A film. ..
    |----------------- mask 0 -----------------------------||---- mask 1, what it learns --

What it writes is read as text and encoded anew as an observation, as a tool's words are.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import parse_json, read_log
from common.runs import COST_FILE
from common.settings import RolloutSettings
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from environments.imagining import imagine, observation_text, sum_over_continuations
from model import LM

EXAMPLES_FILE = "examples.jsonl"  # in its folder: the calls that it learned from
# If it learned no more queries than this, all are answered when it is loaded: in full batches a
# query takes a tenth of the time.
ANSWERED_AT_ONCE = 4096


@dataclass
class Example:
    """One real call: a query, and what the tool said."""

    query: str
    observation: str
    hint: str = ""  # what a simulator is told beside the query (simulator.py)


@dataclass
class Imagined:
    """What a world model writes after one prompt."""

    text: str
    ids: list[int]  # as the network wrote it, the closing tag included
    entropy: float | None = None  # mean over these ids, in nats; None until it is measured


def write_examples(examples: Sequence[Example]) -> str:
    """Return the text of EXAMPLES_FILE, a call a line."""
    lines = [
        json.dumps({"query": example.query, "observation": example.observation})
        for example in examples
    ]
    return "".join(line + "\n" for line in lines)


def read_examples(folder: Path) -> dict[str, str]:
    """Return the calls that a world model learned from: query -> what the tool said.

    Raises UserError for a file that is missing or damaged.
    """
    rows = read_log(folder / EXAMPLES_FILE, "--world_model", "query", "observation")
    return {row["query"]: row["observation"] for row in rows}


def read_cost(folder: Path) -> dict[str, Any]:
    """Return what a world model cost, by the fields of world_model.py's Cost.

    Raises UserError for a file that is damaged.
    """
    path = folder / COST_FILE
    try:
        cost = parse_json(path.read_bytes())
        cost["calls"], cost["held_out"], cost["seconds_of_calls"], cost["seconds_of_training"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; remove {folder} to have it distilled again") from None
    return cost


class WorldModel:
    """A search tool that imagines: queries in, observations out."""

    def __init__(self, lm: LM, settings: RolloutSettings) -> None:
        """Begin with an empty memory."""
        self.lm = lm
        self.settings = settings
        # One prompt gets one observation, as one query does from a tool.
        self.memory: dict[tuple[int, ...], Imagined] = {}

    def __call__(self, queries: list[str]) -> list[Observation]:
        """Return the observation of each query; a new one is written, the others are remembered."""
        return [
            Observation(imagined.text, Provenance.IMAGINED) for imagined in self.imagine(queries)
        ]

    def entropies(self, queries: Sequence[str], hints: Sequence[str] = ()) -> np.ndarray:
        """Return how unsure it is of each query's observation: (queries,), nats a token.

        It is the mean, over the tokens of the observation, of the entropy of the distribution that
        each was chosen from.
        """
        self.imagine(queries, hints)
        prompts = self._prompts(queries, hints)
        self._measure_entropies(
            [prompt for prompt in dict.fromkeys(prompts) if self.memory[prompt].entropy is None]
        )
        return np.array([self.memory[prompt].entropy for prompt in prompts], dtype=float)

    def imagine(self, queries: Sequence[str], hints: Sequence[str] = ()) -> list[Imagined]:
        """Return what it writes to each query.

        hints: what it is told beside each query; none where it is told nothing.
        """
        prompts = self._prompts(queries, hints)
        self._write([prompt for prompt in dict.fromkeys(prompts) if prompt not in self.memory])
        return [self.memory[prompt] for prompt in prompts]

    def _prompts(self, queries: Sequence[str], hints: Sequence[str]) -> list[tuple[int, ...]]:
        told = list(hints) or [""] * len(queries)
        return [
            tuple(query_prompt(self.lm.codec, query, hint))
            for query, hint in zip(queries, told, strict=True)
        ]

    def _write(self, prompts: list[tuple[int, ...]]) -> None:
        """Write the observations of new prompts."""
        for prompt, ids in zip(prompts, imagine(self.lm, prompts, self.settings), strict=True):
            self.memory[prompt] = Imagined(observation_text(self.lm.codec, ids), ids)

    def _measure_entropies(self, prompts: list[tuple[int, ...]]) -> None:
        written = [self.memory[prompt].ids for prompt in prompts]
        sums = sum_over_continuations(self.lm, self.lm.backend.entropies, prompts, written)
        for prompt, total in zip(prompts, sums, strict=True):
            self.memory[prompt].entropy = total / len(self.memory[prompt].ids)


def query_prompt(codec: Codec, query: str, hint: str = "") -> list[int]:
    """Return the ids after which a world model writes the observation of a query.

    hint: what a simulator is told before the query.
    """
    bos = codec.tokenizer.bos_token_id
    beginning = [] if bos is None else [bos]
    if hint:
        beginning += codec.encode(hint)
    action = [codec.search_id, *codec.encode(query), codec.end_search_id]
    return [*beginning, *action, codec.result_id]


def training_trajectory(codec: Codec, example: Example, max_observation: int) -> Trajectory:
    """Return a real call as a world model learns it: the observation alone carries loss.

    max_observation: tokens of it; what does not fit is cut as it is for the policy.
    """
    trajectory = Trajectory()
    trajectory.add(query_prompt(codec, example.query, example.hint), Role.ACTION, 0)
    observation = codec.wrap_observation(codec.fit(example.observation, max_observation))
    # The opening tag is the last id of the prompt.
    trajectory.add(observation[1:], Role.OBSERVATION, 1)
    return trajectory


def uniform(text: str) -> float:
    """Return a number in [0, 1) that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
