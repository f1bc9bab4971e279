"""Trajectories as arrays: tries, optimizer steps and micro-batches."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.batching import own_micro_batches
from data.trajectory import Provenance, Role, Trajectory

# What a loss reads, by name: arrays of (nodes,), and numbers such as "norm". The arrays are NumPy's
# here and the backend's own inside a loss.
Batch = dict[str, Any]
# Two trajectories that go on from one beginning, for SFT-1: (chosen, rejected).
Pair = tuple[Trajectory, Trajectory]


# ---- texts as tries ------------------------------------------------------------------------------
@dataclass
class Trie:
    """Some texts as a tree: what they begin with together stands once (docs/trie.md).

    A node is a token after a certain beginning. Nodes stand in depth-first order, so that what lies
    below a node follows it, up to its `end`:

        Who made it ? I recall Eva.         0 Who  1 made  2 it  3 ?  4 I  5 recall  6 Eva.
        Who made it ? I must search         7 must  8 search

    Node 4 ends at 9, node 5 at 7; the parent of node 7 is 4. All arrays are (nodes,).
    """

    ids: np.ndarray
    depth: np.ndarray  # the token's place in its texts
    parent: np.ndarray  # the node before it, -1 for a first token
    end: np.ndarray  # the first node after all that lies below it
    mask: np.ndarray  # of the loss, float32
    old: np.ndarray  # log-probability when it was sampled, float32; 0 where it was not
    paths: list[np.ndarray]  # of each text, the nodes of its tokens


def build_trie(texts: Sequence[Trajectory]) -> Trie:
    """Return some texts as a trie; a node is one where id, role, mask and all before agree."""
    tokens = _tokens_of(texts)
    ids: list[int] = []
    parent: list[int] = []
    depth: list[int] = []
    mask: list[float] = []
    old: list[float] = []
    end: list[int] = []
    paths: dict[int, list[int]] = {}
    path: list[int] = []  # of the text before
    before: list[tuple[int, int, float]] = []
    # In this order a text shares more with the one before it than with any other that is done.
    for number in sorted(range(len(texts)), key=lambda number: tokens[number]):
        shared = _length_of_common_beginning(before, tokens[number])
        for node in path[shared:]:
            end[node] = len(ids)
        path = path[:shared]
        text = texts[number]
        length = len(text.ids)
        new_nodes = range(len(ids), len(ids) + length - shared)
        last = path[-1] if path else -1
        parent += [last, *new_nodes][: len(new_nodes)]
        ids += text.ids[shared:]
        depth += range(shared, length)
        mask += text.mask[shared:]
        old += (text.logprobs or [0.0] * length)[shared:]
        end += [0] * len(new_nodes)
        path += new_nodes
        paths[number] = list(path)
        before = tokens[number]
    for node in path:
        end[node] = len(ids)
    return Trie(
        ids=np.array(ids, np.int64),
        depth=np.array(depth, np.int64),
        parent=np.array(parent, np.int64),
        end=np.array(end, np.int64),
        mask=np.array(mask, np.float32),
        old=np.array(old, np.float32),
        paths=[np.array(paths[number]) for number in range(len(texts))],
    )


def count_nodes(texts: Sequence[Trajectory]) -> int:
    """Return how many nodes the trie of some texts has."""
    nodes = 0
    before: list[tuple[int, int, float]] = []
    for tokens in sorted(_tokens_of(texts)):
        nodes += len(tokens) - _length_of_common_beginning(before, tokens)
        before = tokens
    return nodes


def _tokens_of(texts: Sequence[Trajectory]) -> list[list[tuple[int, int, float]]]:
    """Return of each text what makes its tokens the same as another's."""
    return [list(zip(text.ids, text.role, text.mask, strict=True)) for text in texts]


def _length_of_common_beginning(first: Sequence[Any], second: Sequence[Any]) -> int:
    length = 0
    for mine, other in zip(first, second, strict=False):
        if mine != other:
            break
        length += 1
    return length


def pack(tries: Sequence[Trie]) -> Batch:
    """Return tries one after the other, without padding: what the networks are trained on.

    "ids", "depth", "parent", "end", "mask", "old": (nodes,), as in Trie, and counted through.
    "parts": (start, end) of each trie; a token sees its own ancestors alone.
    "is_text": of each trie, whether it is one text, in which a token sees all before it.

    >>> pack([build_trie([Trajectory([5, 6, 7], [0, 1, 1], [0, 1, 1])])])["mask"]
    array([0., 1., 1.], dtype=float32)
    """
    starts = np.cumsum([0] + [len(trie.ids) for trie in tries]).tolist()
    parents = [
        np.where(trie.parent < 0, -1, trie.parent + start)
        for trie, start in zip(tries, starts, strict=False)
    ]
    ends = [trie.end + start for trie, start in zip(tries, starts, strict=False)]
    return {
        "ids": np.concatenate([trie.ids for trie in tries]),
        "depth": np.concatenate([trie.depth for trie in tries]),
        "parent": np.concatenate(parents),
        "end": np.concatenate(ends),
        "mask": np.concatenate([trie.mask for trie in tries]),
        "old": np.concatenate([trie.old for trie in tries]),
        "parts": list(pairwise(starts)),
        "is_text": [bool((trie.end == len(trie.ids)).all()) for trie in tries],
    }


def predicted_nodes(batch: Mapping[str, Any], is_needed: np.ndarray) -> np.ndarray:
    """Return the numbers of some nodes, (needed,), but for first tokens: nothing predicts those.

    is_needed: (nodes,) of bool.
    """
    return np.flatnonzero(is_needed & (batch["parent"] >= 0))


def nodes_to_learn(
    batch: Mapping[str, Any], temperature: float
) -> tuple[np.ndarray, float | np.ndarray]:
    """Return the nodes whose log-probabilities a loss needs, (needed,), and their temperature.

    The temperature is one for all, or (needed, 1): an auxiliary loss on observations is at 1, and
    its tokens are none of the policy's.
    """
    is_needed = batch["mask"] > 0
    if "observation_count" not in batch:
        return predicted_nodes(batch, is_needed), temperature
    is_observed = batch["observation_count"] > 0
    node = predicted_nodes(batch, is_needed | is_observed)
    temperatures = np.where(is_observed[node], 1.0, temperature)
    return node, temperatures[:, None].astype(np.float32)


def pack_texts(texts: Sequence[Trajectory]) -> Batch:
    """Return texts one after the other, each a trie of its own."""
    return pack([build_trie([text]) for text in texts])


# ---- optimizer steps and micro-batches -----------------------------------------------------------
def optimizer_steps(
    trajectories: Sequence[Trajectory],
    batch_tokens: int,
    rng: random.Random,
    window: int = 2000,
) -> list[list[Trajectory]]:
    """Return one epoch, cut into optimizer steps of about batch_tokens tokens.

    Trajectories are shuffled inside windows, and the order of the windows is kept. Lengths are
    mixed in a step, so that no step sees one kind of text alone.
    """
    steps: list[list[Trajectory]] = []
    step: list[Trajectory] = []
    tokens_in_step = 0
    for start in range(0, len(trajectories), window):
        part = trajectories[start : start + window]
        for trajectory in rng.sample(part, len(part)):
            step.append(trajectory)
            tokens_in_step += len(trajectory.ids)
            if tokens_in_step >= batch_tokens:
                steps.append(step)
                step = []
                tokens_in_step = 0
    if step:
        steps.append(step)
    return steps


def language_batches(trajectories: Sequence[Trajectory], micro_tokens: int) -> list[Batch]:
    """Return the micro-batches of one optimizer step of next-token loss (SFT-2 and SFT-3).

    Of several processes each gets those of its share.

    "norm" is the sum of the masks of the whole step, so that the losses of micro-batches add up to
    the mean over learned tokens. A first token is predicted from nothing and does not count.
    """
    norm = float(sum(sum(trajectory.mask[1:]) for trajectory in trajectories))
    lengths = [len(trajectory.ids) for trajectory in trajectories]
    batches = []
    for group in own_micro_batches(lengths, micro_tokens):
        batch = pack_texts([trajectories[row] for row in group])
        batch["norm"] = norm
        batches.append(batch)
    return batches


def pair_batches(pairs: Sequence[Pair], micro_tokens: int, alpha: float) -> list[Batch]:
    """Return the micro-batches of one optimizer step of SFT-1. A pair is a trie of two texts.

    Of several processes each gets those of its share.

    "path_weights": (2 n, nodes), which means over nodes are the chosen sides' scores, then the
    rejected ones' of the same pairs.
    alpha: the weight of the loss's auxiliary term.
    """
    norm = float(len(pairs))
    tries = [build_trie(pair) for pair in pairs]
    batches = []
    for group in own_micro_batches([len(trie.ids) for trie in tries], micro_tokens):
        batch = pack([tries[index] for index in group])
        weights = np.zeros((2 * len(group), len(batch["ids"])), np.float32)
        for number, index in enumerate(group):
            start = batch["parts"][number][0]
            for row, path in zip((number, len(group) + number), tries[index].paths, strict=True):
                weights[row, start + path] = tries[index].mask[path]
        batch["path_weights"] = weights / weights.sum(1, keepdims=True)
        batch["alpha"] = alpha
        batch["norm"] = norm
        batches.append(batch)
    return batches


def learn_observations(trajectories: Sequence[Trajectory], weight: float = 1) -> list[Trajectory]:
    """Return the same ids with loss on observations too: SFT-3, where the policy learns the world.

    The masks of the trajectories that are given stay as they are.

    weight: of an observation's token in the loss, which is a weighted mean over tokens.
    """
    return [
        Trajectory(trajectory.ids, _mask_with_observations(trajectory, weight), trajectory.role)
        for trajectory in trajectories
    ]


def _mask_with_observations(trajectory: Trajectory, weight: float) -> list[float]:
    mask = list(trajectory.mask)
    for position, role in enumerate(trajectory.role):
        if role == Role.OBSERVATION:
            mask[position] = weight
    return mask


def real_observation_mask(trajectory: Trajectory) -> list[int]:
    """Return 1 for each token of an observation that the real tool made, and 0 for all others.

    What was imagined, and what a failed search says, is nothing to learn from.
    """
    mask = []
    observation = -1  # the number of the observation that the tokens belong to
    previous_role = Role.PROMPT
    for role in trajectory.role:
        if role == Role.OBSERVATION and previous_role != Role.OBSERVATION:
            observation += 1
        is_real = (
            role == Role.OBSERVATION
            and trajectory.observations[observation].provenance == Provenance.REAL
        )
        mask.append(int(is_real))
        previous_role = role
    return mask
