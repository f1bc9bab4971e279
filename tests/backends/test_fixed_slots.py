"""Decoding as a GPU does it, on a CPU: the same tokens as with slots that rows share."""

from typing import Any

import numpy as np
import pytest
from conftest import tiny_lm

import backends.torch as torch_backend
from backends.torch import fixed_slots
from backends.torch.fixed_slots import STEPS_BETWEEN_LOOKS
from data.trajectory import Codec
from model import LM

GROUP = 6
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [30, 31, 32, 33, 34], [11]]


@pytest.fixture
def lm(codec: Codec) -> LM:
    """A network whose draws often agree, so that rows stay together for a while."""
    return tiny_lm(codec, noise=0.2)


def both_ways(lm: LM, use: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return what something gives with shared slots, and with fixed ones."""
    shared = use()
    monkeypatch.setattr(torch_backend.Decoder, "in_fixed_slots", True)
    return shared, use()


@pytest.mark.parametrize("seed", range(4))
def test_turns_of_an_agent(lm: LM, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows write until a stop, some are done, the others read what a tool says, and so on.

    Guards: a slot that another row wrote over, and a cache that is too short for what comes.
    """
    uniforms = np.random.default_rng(seed).random((GROUP * 2, 400))

    def take_turns() -> list[Any]:
        rng = np.random.default_rng(seed)
        rows = list(range(GROUP * 2))
        decoder = lm.decoder([PROMPTS[row % 2 * 3] for row in rows])
        written = []
        place = 0
        while True:
            limits = rng.integers(1, 25, len(rows)).tolist()
            stops = [rng.integers(10, 300, 60).tolist() for _ in rows]
            numbers = uniforms[rows, place : place + 25]
            temperatures = rng.choice([0.0, 0.8], len(rows)).tolist()
            ids, logprobs = decoder.decode(stops, limits, temperatures, numbers)
            written.append((rows, ids, logprobs))
            place += 25
            said = [rng.integers(10, 300, rng.integers(0, 9)).tolist() for _ in rows]
            decoder.feed(said)
            if len(rows) == 2:
                return written
            left = sorted(rng.permutation(len(rows))[: len(rows) - 2].tolist())
            decoder.keep(left)
            rows = [rows[number] for number in left]

    shared, fixed = both_ways(lm, take_turns, monkeypatch)
    for one, other in zip(shared, fixed, strict=True):
        assert one[:2] == other[:2]
        for logprobs, other_logprobs in zip(one[2], other[2], strict=True):
            np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-4)


def test_each_row_has_its_own_stops_limit_and_temperature(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end at once, that stop early and that are greedy, in one call; then they go on.

    Guards: stops of a neighbour, and a position that moves on after a stop.
    """
    uniforms = np.random.default_rng(3).random((len(PROMPTS), 20))
    endless, _ = lm.decoder(PROMPTS).decode([], [20] * len(PROMPTS), 1.0, uniforms)
    stops = [[endless[0][2]], [], [endless[2][11]], [], [endless[4][0]]]

    def write() -> tuple[Any, Any, np.ndarray]:
        decoder = lm.decoder(PROMPTS)
        first, _ = decoder.decode(stops, [20, 13, 20, 1, 20], [1, 1, 0, 1, 1], uniforms)
        decoder.feed([[40], [], [41, 42], [], [40]])
        decoder.keep([4, 3, 0, 2])
        second, _ = decoder.decode([], [9] * 4, 1.0, uniforms[:4])
        decoder.feed([[]] * 4)
        return first, second, np.asarray(decoder.logits)[decoder.slot]

    shared, fixed = both_ways(lm, write, monkeypatch)
    assert shared[0] == fixed[0]
    assert [len(row) for row in shared[0]][:2] == [3, 13]
    assert shared[1] == fixed[1]
    np.testing.assert_allclose(shared[2], fixed[2], atol=1e-4)


def test_the_cache_grows(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has room for some tokens at a time, and not for the longest that a row might write.

    Guards: a cache of whole trajectories at the first word; an id that is no token as a stop.
    """
    monkeypatch.setattr(fixed_slots, "STEPS_OF_A_CACHE", 20)
    limits = [300] * len(PROMPTS)
    stops = [999_999, -1]

    def write() -> tuple[list[list[int]], int]:
        decoder = lm.decoder(PROMPTS)
        ids, _ = decoder.decode(stops, [90] * len(PROMPTS), 0.0)
        early = lm.decoder(PROMPTS)
        early.decode([row[3] for row in ids], limits, 0.0)
        return ids, early.caches[0].keys.shape[2]

    (shared, _), (fixed, room) = both_ways(lm, write, monkeypatch)
    assert shared == fixed
    assert room <= 64


def test_rows_that_still_write_go_on_in_the_next_call(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a writing share, a call ends at the next look; nothing is written twice or left out."""
    limits = [3, 3, 3, 3, 40]
    whole, _ = lm.decoder(PROMPTS).decode([], limits, 0.0)
    monkeypatch.setattr(torch_backend.Decoder, "in_fixed_slots", True)
    decoder = lm.decoder(PROMPTS)
    first, _ = decoder.decode([], limits, 0.0, writing_share=0.25)
    assert len(first[4]) == STEPS_BETWEEN_LOOKS
    decoder.keep([4])
    decoder.feed([[]])
    rest, _ = decoder.decode([], [40 - STEPS_BETWEEN_LOOKS], 0.0)
    assert first[4] + rest[0] == whole[4]
