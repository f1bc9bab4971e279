"""Packing, micro-batches and optimizer steps (data/batches.py, common/batching.py)."""

import random
from typing import Any

import numpy as np
import pytest

from autocoa import nll_loss
from common.batching import deal_by_tokens, fill_by_tokens, group_by_tokens
from data.batches import (
    language_batches,
    learn_observations,
    optimizer_steps,
    pack_texts,
    pair_batches,
)
from data.trajectory import Codec, Role, Trajectory


def learned_row(ids: Any) -> Any:
    """Return a trajectory whose first token is a prompt, and whose others are learned."""
    trajectory = Trajectory()
    trajectory.add(ids[:1], Role.PROMPT, 0)
    trajectory.add(ids[1:], Role.THINK, 1)
    return trajectory


def test_texts_are_packed_one_after_the_other() -> None:
    """Each keeps its mask and the log-probs of sampling; its first token has no parent."""
    long = Trajectory([5, 6, 7], [0, 1, 1], [0, 1, 1], [0.0, -1.0, -2.0])
    short = Trajectory([8], [1], [1], [-0.5])
    batch = pack_texts([long, short])
    assert batch["ids"].tolist() == [5, 6, 7, 8]
    assert batch["mask"].tolist() == [0, 1, 1, 1]
    assert batch["old"].tolist() == [0, -1, -2, -0.5]
    assert batch["depth"].tolist() == [0, 1, 2, 0]
    assert batch["parent"].tolist() == [-1, 0, 1, -1]
    assert batch["end"].tolist() == [3, 3, 3, 4]
    assert batch["parts"] == [(0, 3), (3, 4)]
    assert batch["ids"].dtype == np.int64
    assert batch["mask"].dtype == np.float32


@pytest.mark.parametrize("limit", [1, 50, 400, 10**6])
def test_fill_by_tokens(limit: int) -> None:
    """Each text once, in order; a group ends only where the next text does not fit."""
    rng = random.Random(1)
    lengths = [rng.randrange(1, 90) for _ in range(100)]
    groups = fill_by_tokens(lengths, limit)
    assert [number for group in groups for number in group] == list(range(100))
    sizes = [sum(lengths[number] for number in group) for group in groups]
    for group, size in zip(groups, sizes, strict=True):
        assert len(group) == 1 or size <= limit
    for size, following in zip(sizes, groups[1:], strict=False):
        assert size + lengths[following[0]] > limit
    assert fill_by_tokens([], limit) == []


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_deal_by_tokens(shares: int) -> None:
    """Each text once, in order, and no share has more than a text more than another."""
    lengths = [7, 100, 3, 40, 40, 12, 55]
    dealt = deal_by_tokens(lengths, shares)
    assert sorted(number for share in dealt for number in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in dealt)
    tokens = [sum(lengths[number] for number in share) for share in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("limit", [1, 50, 400, 10**6])
def test_group_by_tokens(limit: int) -> None:
    """Each row once; rows x longest is within the limit, unless one row alone is longer."""
    rng = random.Random(1)
    lengths = [rng.randrange(1, 90) for _ in range(100)]
    lengths += [1, 90, 45]
    groups = group_by_tokens(lengths, limit)
    rows = []
    for group in groups:
        rows += group
    assert sorted(rows) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) == 1 or len(group) * longest <= limit
    assert group_by_tokens([], limit) == []


def test_optimizer_steps() -> None:
    """One epoch: each trajectory once, windows in their order, and steps of batch_tokens.

    Only the last step may hold fewer tokens.
    """
    trajectories = []
    for number in range(300):
        length = 1 + number % 7
        trajectories.append(learned_row([number] * length))
    steps = optimizer_steps(
        trajectories,
        40,
        random.Random(0),
        window=100,
    )
    order = []
    sizes = []
    for step in steps:
        order += [trajectory.ids[0] for trajectory in step]
        sizes.append(sum(len(trajectory.ids) for trajectory in step))
    assert order != sorted(order)
    for start in (0, 100, 200):
        end = start + 100
        window = order[start:end]
        assert sorted(window) == list(range(start, end))
    assert all(40 <= size < 47 for size in sizes[:-1])
    assert 0 < sizes[-1] < 47
    assert len(order) == 300


def test_micro_batches_share_one_normalizer() -> None:
    """It counts the learned tokens of the whole step, without first tokens."""
    rows = [
        learned_row([1, 2, 3]),
        learned_row([1, 2]),
        Trajectory([1, 2], [1, 1], [1, 1]),
    ]
    batches = language_batches(rows, micro_tokens=4)
    assert len(batches) > 1
    assert [batch["norm"] for batch in batches] == [4.0] * len(batches)
    assert sum(len(batch["parts"]) for batch in batches) == 3


def test_pairs_are_chosen_rows_then_rejected_rows() -> None:
    """The n-th chosen and the n-th rejected row are means over the continuations of one pair.

    What a pair begins with stands once. Guards: a mean over the common beginning too.
    """
    pairs = []
    for length in (6, 2, 4, 2):
        chosen = learned_row([length] * length)
        rejected = Trajectory()
        rejected.add([length], Role.PROMPT, 0)
        rejected.add([10 + length] * length, Role.THINK, 1)
        pairs.append((chosen, rejected))
    batches = pair_batches(pairs, micro_tokens=14, alpha=0.2)
    assert len(batches) > 1
    lengths = [6, 2, 4, 2]
    for batch in batches:
        count = len(batch["parts"])
        own = [lengths.pop(0) for _ in range(count)]
        assert batch["path_weights"].shape == (2 * count, len(batch["ids"]))
        # The mean of a row's ids is the one id that its continuation repeats.
        assert (batch["path_weights"] @ batch["ids"]).tolist() == pytest.approx(
            [*own, *[10 + length for length in own]]
        )
        assert (batch["alpha"], batch["norm"]) == (0.2, 4.0)
        assert len(batch["ids"]) == sum(2 * length for length in own)
        assert len(batch["ids"]) <= 14
    assert not lengths


def test_observations_are_learned_by_role(codec: Codec) -> None:
    """SFT-3 learns observations and what SFT-2 learns, whose own masks stay as they were."""
    parts = [("search", "A"), ("result", "B"), ("given", "Hm"), ("answer", "Eva")]
    trajectory = codec.build("Who?", parts)
    mask = list(trajectory.mask)
    (learned,) = learn_observations([trajectory])
    assert trajectory.mask == mask
    assert learned.ids == trajectory.ids
    assert learned.role == trajectory.role
    expected = []
    for old, role in zip(mask, trajectory.role, strict=True):
        expected.append(1 if role == Role.OBSERVATION else old)
    assert learned.mask == expected
    assert expected != mask


@pytest.mark.parametrize("weight", [0.1, 0.5, 0])
def test_a_weight_of_observations(codec: Codec, weight: float) -> None:
    """Observations have it, all other tokens keep their own mask."""
    parts = [("search", "A"), ("result", "B"), ("given", "Hm"), ("answer", "Eva")]
    trajectory = codec.build("Who?", parts)
    (learned,) = learn_observations([trajectory], weight)
    for position, role in enumerate(trajectory.role):
        expected = weight if role == Role.OBSERVATION else trajectory.mask[position]
        assert learned.mask[position] == expected


@pytest.mark.parametrize("weight", [1, 0.1])
def test_the_loss_with_a_weight_is_a_weighted_mean(codec: Codec, weight: float) -> None:
    """Over the tokens of a whole step, whatever the micro-batches. NumPy by hand.

    A weight of 1 is the mean over all learned tokens, as without a weight.
    """
    trajectories = []
    for words in (1, 4, 9):
        parts = [("search", "A"), ("result", "Eva " * words), ("answer", "Eva")]
        trajectories.append(codec.build("Who?", parts))
    rng = np.random.default_rng(0)
    logprob_of_token = -rng.uniform(0.1, 3, len(codec.tokenizer))

    weighted_sum = 0.0
    weights = 0.0
    for trajectory in trajectories:
        for token, role in zip(trajectory.ids, trajectory.role, strict=True):
            if role == Role.PROMPT:
                continue
            token_weight = weight if role == Role.OBSERVATION else 1.0
            weighted_sum += token_weight * -logprob_of_token[token]
            weights += token_weight

    def step_loss(learned: list[Trajectory], micro_tokens: int) -> float:
        batches = language_batches(learned, micro_tokens)
        return sum(nll_loss(np, logprob_of_token[batch["ids"]], batch) for batch in batches)

    learned = learn_observations(trajectories, weight)
    for micro_tokens in (20, 1000):
        loss = step_loss(learned, micro_tokens)
        assert loss == pytest.approx(weighted_sum / weights, rel=1e-6)
    if weight == 1:
        assert step_loss(learn_observations(trajectories), 20) == step_loss(learned, 20)
