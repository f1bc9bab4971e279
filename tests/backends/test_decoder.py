"""The decoder of both twins.

Cached against uncached, batched against single, sampled against the softmax.
"""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, mlx_twin, tiny_lm

import model
from backends.decoder import TOKENS_AT_ONCE
from backends.torch.decoder import KVCache, Place
from data.batches import pack_texts
from data.trajectory import Codec, Role, Trajectory
from model import LM

GENERATOR = np.random.default_rng(5)


def random_prompts(*lengths: Any) -> list[Any]:
    return [GENERATOR.integers(10, 300, length).tolist() for length in lengths]


PROMPTS = random_prompts(3, 11, 1, 7)


def uncached_logits(lm: LM, ids: Any) -> Any:
    """Return the logits after the last of some ids, by a whole forward pass in torch."""
    network = lm.torch_network
    with torch.no_grad():
        x = network(torch.tensor([ids]))
        return network.logits(x)[0, -1].numpy()


def greedy(lm: LM, ids: Any, stops: Any, limit: Any) -> Any:
    """Decode the slow way: the whole sequence again for every token."""
    new = []
    while len(new) < limit:
        logits = uncached_logits(lm, ids + new)
        new.append(int(logits.argmax()))
        if new[-1] in stops:
            break
    return new


def assert_logits_are_those_of(lm: LM, decoder: Any, texts: Any) -> None:
    for logits, ids in zip(logits_of_rows(decoder), texts, strict=True):
        expected = uncached_logits(lm, ids)
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def logits_of_rows(decoder: Any) -> np.ndarray:
    """Return the logits of what comes next in each row, (rows, vocab)."""
    return np.asarray(decoder.logits)[decoder.slot]


def write(
    lm: LM, prompts: Any, tokens: Any, stops: Any = (), temperature: float = 0.0, seed: int = 0
) -> Any:
    """Decode after each prompt, and return the ids."""
    limits = [tokens] * len(prompts)
    uniforms = np.random.default_rng(seed).random((len(prompts), tokens))
    ids, _ = lm.decoder(prompts).decode(stops, limits, temperature, uniforms)
    return ids


def in_backend(backend: str, torch_lm: Any) -> Any:
    """Return a network as a backend has it, with the torch network to compare with."""
    lm = torch_lm
    if backend == "mlx":
        pytest.importorskip("mlx.core")
        lm = mlx_twin(torch_lm)
    return SimpleNamespace(
        torch_network=torch_lm.network,
        network=lm.network,
        backend=lm.backend,
        decoder=lm.decoder,
    )


@pytest.fixture(params=["torch", "mlx"])
def lm(request: pytest.FixtureRequest, codec: Codec) -> Any:
    return in_backend(request.param, tiny_lm(codec, noise=0.1))


@pytest.fixture(params=["one head", "two heads", "Qwen3, grouped"])
def torch_lm(request: pytest.FixtureRequest, codec: Codec) -> Any:
    if request.param == "one head":
        return tiny_lm(codec, width=32, noise=0.1)
    if request.param == "two heads":
        return tiny_lm(codec, width=64, noise=0.1)
    config = tiny_lm(codec, architecture="Qwen3ForCausalLM", noise=0.1).network.config
    config.num_key_value_heads = 1
    return model.new(config, codec.tokenizer, 3, CPU)


@pytest.fixture(params=["torch", "mlx"])
def each_lm(request: pytest.FixtureRequest, torch_lm: Any) -> Any:
    """Every kind of attention in each backend."""
    return in_backend(request.param, torch_lm)


def record_passes(monkeypatch: pytest.MonkeyPatch, lm: LM) -> Any:
    """Return a list that gets the shape of what each forward pass of a decoder reads."""
    shapes = []
    forward = lm.backend.Decoder._forward

    def recorded(self: Any, ids: Any, slots: Any, start: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, slots, start)

    monkeypatch.setattr(lm.backend.Decoder, "_forward", recorded)
    return shapes


def test_cached_equals_uncached(each_lm: Any) -> None:
    """After each change the next-token logits are those of the row's whole text.

    Feeds of another length for each row, none for some; decoding in between; rows dropped, doubled
    and put in another order. Guards: a wrong position, a key of another row, of padding or of a
    stopped row, a sampled token that never enters the cache.
    """
    decoder = each_lm.decoder(PROMPTS)
    texts = [list(prompt) for prompt in PROMPTS]

    def feed(parts: Any) -> None:
        decoder.feed([list(part) for part in parts])
        for text, part in zip(texts, parts, strict=True):
            text += part

    assert_logits_are_those_of(each_lm, decoder, texts)
    beyond_a_block = list(range(22, 90))
    feed([[20, 21], [], beyond_a_block, [27]])
    assert_logits_are_those_of(each_lm, decoder, texts)
    new_ids, _ = decoder.decode([], [4, 1, 2, 6], 0.0)
    assert lengths(new_ids) == [4, 1, 2, 6]
    for text, new in zip(texts, new_ids, strict=True):
        text += new
    order = [3, 0, 0, 2]
    decoder.keep(order)
    texts = [list(texts[row]) for row in order]
    feed([[30], [31, 32], [33, 34, 35], []])
    assert_logits_are_those_of(each_lm, decoder, texts)
    assert decoder.length.tolist() == [len(text) for text in texts]


def test_batched_equals_single(each_lm: Any) -> None:
    """Sixteen rows of different length and limits write what the slow loop gives for each alone."""
    prompts = PROMPTS + random_prompts(*range(2, 14))
    stops = [40, 41, 42]
    limits = [12, 5, 20, 1] + [3] * 12
    decoder = each_lm.decoder(prompts)
    first, _ = decoder.decode(stops, limits, 0.0)
    for prompt, limit, new in zip(prompts, limits, first, strict=True):
        assert new == greedy(each_lm, prompt, stops, limit)
    decoder.feed([[9]] * 16)
    second, _ = decoder.decode(stops, [6] * 16, 0.0)
    for prompt, before, new in zip(prompts, first, second, strict=True):
        text = prompt + before + [9]
        assert new == greedy(each_lm, text, stops, 6)


def up_to(stop: Any, ids: Any) -> Any:
    """Return ids up to their first stop, which is kept."""
    if stop not in ids:
        return ids
    return ids[: ids.index(stop) + 1]


def lengths(rows: Any) -> list[Any]:
    return [len(row) for row in rows]


def test_stops_end_a_row_and_are_kept(lm: LM) -> None:
    """The stop id is the last of its row; the other rows go on."""
    endless = write(lm, PROMPTS, 8)
    stop = endless[1][3]
    decoder = lm.decoder(PROMPTS)
    ids, logprobs = decoder.decode([stop], [8] * 4, 0.0)
    assert ids == [up_to(stop, row) for row in endless]
    assert lengths(logprobs) == lengths(ids)


def test_each_row_has_its_stops(lm: LM) -> None:
    """A list of ids for each row ends that row alone; the same list for all is that list.

    Guards: a workflow whose rows wait for other words, and stop at those of their neighbours.
    """
    prompts = [PROMPTS[1]] * 4
    text = write(lm, prompts, 8)[0]
    early = text[3]
    late = text[5]
    stops = [
        [late],
        [],
        [early, late],
        [text[0]],
    ]
    ids = write(lm, prompts, 8, stops)
    assert ids[0] == up_to(late, text)
    assert ids[1] == text
    assert ids[2] == up_to(early, up_to(late, text))
    assert ids[3] == text[:1]
    stops = [40, early]
    shared = write(lm, PROMPTS, 8, stops)
    repeated = write(lm, PROMPTS, 8, [stops] * 4)
    assert shared == repeated


def test_stops_for_another_number_of_rows(lm: LM) -> None:
    """Guards: rows without stops, or stops that went to the wrong row."""
    with pytest.raises(ValueError, match="stops are for 2 rows, and there are 4"):
        write(lm, PROMPTS, 8, stops=[[40], [41]])


def test_leaving_early_and_going_on(lm: LM) -> None:
    """With a writing share, decoding stops while some rows still write; the next call goes on."""
    limits = [3, 3, 3, 20]
    decoder = lm.decoder(PROMPTS)
    whole, _ = decoder.decode([], limits, 0.0)
    decoder = lm.decoder(PROMPTS)
    first, _ = decoder.decode([], limits, 0.0, writing_share=0.25)
    assert lengths(first) == [3, 3, 3, 3]
    decoder.keep([3])
    decoder.feed([[]])
    rest, _ = decoder.decode([], [17], 0.0, writing_share=0.25)
    assert first[3] + rest[0] == whole[3]


def test_equal_prompts_share_a_prefill(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of rollouts reads its question once; the rows then grow apart.

    Guards: a prefill for each rollout, and storage that rows share.
    """
    shapes = record_passes(monkeypatch, lm)
    prompts = [PROMPTS[row] for row in (1, 0, 1, 1)]
    decoder = lm.decoder(prompts)
    assert shapes == [(2, 11)]
    fed = [[50], [51], [52], [53, 54]]
    decoder.feed(fed)
    texts = [prompt + ids for prompt, ids in zip(prompts, fed, strict=True)]
    assert_logits_are_those_of(lm, decoder, texts)


def test_reading_goes_by_pieces(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most TOKENS_AT_ONCE tokens in a pass, rows of like length together, each reads its own.

    Guards: a row that is padded to another's observation.
    """
    decoder = lm.decoder(PROMPTS[:1] * 40)
    shapes = record_passes(monkeypatch, lm)
    fed = []
    for row in range(40):
        length = 1 if row % 2 else 90 + row
        fed.append([50 + row] * length)
    decoder.feed(fed)
    assert len(shapes) > 2
    assert all(rows * longest <= TOKENS_AT_ONCE for rows, longest in shapes)
    assert (20, 1) in shapes
    assert sum(rows for rows, _ in shapes) == 40
    logits = logits_of_rows(decoder)
    for row in (0, 1, 38, 39):
        expected = uncached_logits(lm, PROMPTS[0] + fed[row])
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
def test_logprobs_while_sampling_equal_score(each_lm: Any, temperature: float) -> None:
    """What `decode` notes for each token is what `score` says of the finished sequence.

    At that temperature (greedy: 1), over two turns with an observation between. Guards: a ratio in
    GRPO that is not 1 on the policy's own samples.
    """
    rng = np.random.default_rng(0)
    observation = [60, 61, 62]
    decoder = each_lm.decoder(PROMPTS)
    first, first_logprobs = decoder.decode([], [5, 9, 2, 7], temperature, rng.random((4, 9)))
    decoder.feed([observation] * 4)
    second, second_logprobs = decoder.decode([], [4] * 4, temperature, rng.random((4, 4)))
    for row, prompt in enumerate(PROMPTS):
        trajectory = Trajectory()
        trajectory.add(prompt, Role.PROMPT, 0)
        trajectory.add(first[row], Role.THINK, 1, first_logprobs[row])
        trajectory.add(observation, Role.OBSERVATION, 0)
        trajectory.add(second[row], Role.THINK, 1, second_logprobs[row])
        batch = pack_texts([trajectory])
        scores = each_lm.backend.score(each_lm.network, batch, temperature or 1.0)
        np.testing.assert_allclose(trajectory.logprobs, scores, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_sampling_follows_the_softmax(codec: Codec, backend: str, temperature: float) -> None:
    """Frequencies of 20,000 draws of one token are those of softmax(logits / temperature).

    Within five standard deviations, for each token.
    """
    lm = in_backend(backend, tiny_lm(codec, noise=0.3))
    draws = 20_000
    ids = write(lm, [PROMPTS[0]] * draws, 1, temperature=temperature)
    logits = uncached_logits(lm, PROMPTS[0]).astype(np.float64)
    logits = logits / temperature
    weights = np.exp(logits - logits.max())
    expected = weights / weights.sum()
    counts = np.bincount(np.ravel(ids), minlength=len(expected))
    difference = np.abs(counts / draws - expected)
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (expected > 0.02).sum() >= 5
    assert (difference <= 5 * deviation + 1 / draws).all()


def test_each_row_has_its_temperature(lm: LM) -> None:
    """A row at 0 is greedy beside one that samples, which draws what it would beside any other."""
    prompt = PROMPTS[0]
    decoder = lm.decoder([prompt] * 3)
    uniforms = np.random.default_rng(0).random((3, 8))
    temperatures = [0.0, 1.5, 0.0]
    ids, logprobs = decoder.decode([], [8] * 3, temperatures, uniforms)
    all_sampled = write(lm, [prompt] * 3, 8, temperature=1.5)
    assert ids[0] == ids[2] == greedy(lm, prompt, [], 8)
    assert ids[1] == all_sampled[1]
    assert ids[1] != ids[0]
    decoder = lm.decoder([prompt])
    _, alone = decoder.decode([], [8], 0.0)
    assert logprobs[0] == pytest.approx(alone[0], abs=1e-5)


def test_sampling_is_repeatable_and_rows_differ(lm: LM) -> None:
    """One seed, one text; equal prompts get draws of their own."""
    prompts = [PROMPTS[0]] * 6
    first = write(lm, prompts, 10, temperature=1.0, seed=0)
    again = write(lm, prompts, 10, temperature=1.0, seed=0)
    other = write(lm, prompts, 10, temperature=1.0, seed=1)
    assert first == again
    assert first != other
    assert len({tuple(ids) for ids in first}) == 6


def test_a_row_may_fill_the_cache(each_lm: Any) -> None:
    """The last slot belongs to the row that reaches it.

    Guards: padding of shorter rows, or a stopped row, written over it.
    """
    decoder = each_lm.decoder(PROMPTS)
    fed = [
        [70] * 13,
        [71],
        [72],
        [73] * 8,
    ]
    decoder.feed(fed)
    texts = [prompt + ids for prompt, ids in zip(PROMPTS, fed, strict=True)]
    assert decoder.length.tolist() == [16, 12, 2, 15]
    assert_logits_are_those_of(each_lm, decoder, texts)
    limits = [1, 4, 6, 1]
    new_ids, _ = decoder.decode([], limits, 0.0)
    for text, limit, new in zip(texts, limits, new_ids, strict=True):
        assert new == greedy(each_lm, text, [], limit)


def test_a_token_in_bfloat16_is_written_without_reading_the_cache() -> None:
    """scatter_ turned the whole cache into float32 and back: 31 ms a layer, in place of 12 us."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        config = SimpleNamespace(num_key_value_heads=3, head_dim=64)
        network: Any = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=dtype)
        cache = KVCache(network, slots=64)
        cache.grow(0, positions=1024)
        token = torch.ones(64, 3, 1, 64, dtype=dtype)
        place = Place(torch.arange(64), True, torch.full((64, 1), 7), 8)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            keys, _ = cache.write(place, token, token)
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
        assert keys[:, :, 7].eq(1).all()
        assert cache.keys.sum() == token.sum()
    assert seconds[torch.bfloat16] < 20 * seconds[torch.float32]
