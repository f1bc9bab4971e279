"""The decoder of both twins: cached against uncached, batched against single, sampled against the softmax."""
import numpy as np
import pytest
import torch
from conftest import tiny, twin

import model
from common import AT_ONCE

GENERATOR = np.random.default_rng(5)
PROMPTS = [GENERATOR.integers(10, 300, n).tolist() for n in (3, 11, 1, 7)]


def uncached(lm, ids):
    """Logits after the last of some ids, by a whole forward pass of the torch twin."""
    with torch.no_grad():
        x = lm.torch.model(torch.tensor([ids]))
        return lm.torch.model.logits(x)[0, -1].numpy()


def greedy(lm, ids, stops, limit):
    """Greedy decoding the slow way: the whole sequence again for every token."""
    out = []
    while len(out) < limit and not (out and out[-1] in stops):
        out.append(int(uncached(lm, ids + out).argmax()))
    return out


def decoding(backend, lm):
    """The network as that backend has it; `torch`: as torch has it, to compare with."""
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    it = lm if backend == "torch" else twin(lm)
    it.torch = lm
    return it


@pytest.fixture(params=["torch", "mlx"])
def lm(request, codec):
    return decoding(request.param, tiny(codec, spread=0.1))


@pytest.fixture(params=["one head", "two heads", "Qwen3, grouped"])
def shape(request, codec):
    if request.param == "Qwen3, grouped":
        lm = tiny(codec, arch="Qwen3ForCausalLM", spread=0.1)
        lm.model.config.num_key_value_heads = 1
        return model.new(lm.model.config, codec.tok, 3, "cpu")
    return tiny(codec, width=32 if request.param == "one head" else 64, spread=0.1)


@pytest.fixture(params=["torch", "mlx"])
def net(request, shape):
    return decoding(request.param, shape)


def test_cached_equals_uncached(net):
    """Feeds of other lengths for each row, none for some; decoding in between; rows dropped, doubled and put in another
    order: after each, the next-token logits are those of the row's whole text. Guards: a wrong position, a key of another
    row, of padding or of a stopped row, a sampled token that never enters the cache."""
    dec = net.decoder(PROMPTS)
    rows = [list(p) for p in PROMPTS]

    def check():
        for row, logits in zip(rows, np.asarray(dec.logits)):
            np.testing.assert_allclose(logits, uncached(net, row), atol=1e-4)

    def feed(parts):
        dec.feed([list(p) for p in parts])
        for row, p in zip(rows, parts):
            row += p

    check()
    feed([[20, 21], [], list(range(22, 90)), [27]])       # beyond a block of the cache
    check()
    ids, _ = dec.decode([], [4, 1, 0, 6], 0.0)
    assert [len(x) for x in ids] == [4, 1, 0, 6]
    for row, new in zip(rows, ids):
        row += new
    dec.keep([3, 0, 0, 2])
    rows = [list(rows[i]) for i in (3, 0, 0, 2)]
    feed([[30], [31, 32], [33, 34, 35], []])
    check()
    assert dec.length.tolist() == [len(r) for r in rows]


def test_batched_equals_single(net):
    """Greedy, sixteen rows of different length and different limits: token for token what the slow loop gives for each alone."""
    prompts = PROMPTS + [GENERATOR.integers(10, 300, n).tolist() for n in range(2, 14)]
    stops, limits = [40, 41, 42], [12, 5, 20, 1] + [3] * 12
    dec = net.decoder(prompts)
    ids, _ = dec.decode(stops, limits, 0.0)
    assert ids == [greedy(net, p, stops, n) for p, n in zip(prompts, limits)]
    dec.feed([[9]] * 16)
    more, _ = dec.decode(stops, [6] * 16, 0.0)
    assert more == [greedy(net, p + new + [9], stops, 6) for p, new in zip(prompts, ids)]


def test_stops_end_a_row_and_are_kept(lm):
    """The stop id is the last of its row; the other rows go on."""
    free, _ = lm.decoder(PROMPTS).decode([], [8] * 4, 0.0)
    stop = free[1][3]
    ids, logps = lm.decoder(PROMPTS).decode([stop], [8] * 4, 0.0)
    for new, whole, lp in zip(ids, free, logps):
        assert new == (whole[:whole.index(stop) + 1] if stop in whole else whole)
        assert len(lp) == len(new)


def test_leaving_early_and_going_on(lm):
    """With `leave`, decoding may stop while some rows still write; with what they write in the next call they have written the same."""
    whole, _ = lm.decoder(PROMPTS).decode([], [3, 3, 3, 20], 0.0)
    dec = lm.decoder(PROMPTS)
    first, _ = dec.decode([], [3, 3, 3, 20], 0.0, leave=0.25)
    assert [len(x) for x in first] == [3, 3, 3, 3]
    dec.keep([3])
    dec.feed([[]])
    rest, _ = dec.decode([], [17], 0.0, leave=0.25)
    assert first[3] + rest[0] == whole[3]


def test_equal_prompts_share_a_prefill(lm, monkeypatch):
    """A group of rollouts reads its question once; the rows then grow apart. Guards: rollouts x prefill, and shared storage."""
    seen = []
    Decoder = lm.backend.Decoder
    forward = Decoder._forward
    monkeypatch.setattr(Decoder, "_forward", lambda self, ids, *rows: seen.append(tuple(ids.shape)) or forward(self, ids, *rows))
    dec = lm.decoder([PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    assert seen == [(2, 11)]
    dec.feed([[50], [51], [52], [53, 54]])
    for logits, ids in zip(np.asarray(dec.logits), (PROMPTS[1] + [50], PROMPTS[0] + [51], PROMPTS[1] + [52], PROMPTS[1] + [53, 54])):
        np.testing.assert_allclose(logits, uncached(lm, ids), atol=1e-4)


def test_reading_goes_by_pieces(lm, monkeypatch):
    """At most AT_ONCE tokens in a pass, rows of like length together, and each row reads its own. Guards: a row padded to another's observation; an estimate
    that counts on less than is read at once."""
    seen, forward = [], lm.backend.Decoder._forward
    dec = lm.decoder(PROMPTS[:1] * 40)
    monkeypatch.setattr(lm.backend.Decoder, "_forward", lambda self, ids, *rows: seen.append(tuple(ids.shape)) or forward(self, ids, *rows))
    fed = [[50 + i] * (1 if i % 2 else 90 + i) for i in range(40)]
    dec.feed(fed)
    assert len(seen) > 2 and all(rows * longest <= AT_ONCE for rows, longest in seen) and (20, 1) in seen and sum(rows for rows, _ in seen) == 40
    for i in (0, 1, 38, 39):
        np.testing.assert_allclose(np.asarray(dec.logits)[i], uncached(lm, PROMPTS[0] + fed[i]), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
def test_logprobs_while_sampling_equal_score(net, temperature):
    """What `decode` notes for each token is what `score` says of the finished sequence at that temperature (greedy: 1); over
    two turns with an observation between. Guards: a ratio in GRPO that is not 1 on the policy's own samples."""
    rng = np.random.default_rng(0)
    dec = net.decoder(PROMPTS)
    first, logps1 = dec.decode([], [5, 9, 2, 7], temperature, rng)
    dec.feed([[60, 61, 62]] * 4)
    second, logps2 = dec.decode([], [4] * 4, temperature, rng)
    for row in range(4):
        ids = PROMPTS[row] + first[row] + [60, 61, 62] + second[row]
        noted = [0] * len(PROMPTS[row]) + logps1[row] + [0] * 3 + logps2[row]
        mask = np.array([[0] * len(PROMPTS[row]) + [1] * len(first[row]) + [0] * 3 + [1] * 4], np.float32)
        np.testing.assert_allclose(noted, net.backend.score(net.model, {"ids": np.array([ids]), "mask": mask}, temperature or 1.0)[0], atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_sampling_follows_the_softmax(codec, backend, temperature):
    """20,000 draws of one token: frequencies within five standard deviations of softmax(logits / temperature), for each token."""
    lm = decoding(backend, tiny(codec, spread=0.3))
    n = 20_000
    dec = lm.decoder([PROMPTS[0]] * n)
    ids, _ = dec.decode([], [1] * n, temperature, np.random.default_rng(0))
    z = uncached(lm, PROMPTS[0]).astype(np.float64) / temperature
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    seen = np.bincount(np.ravel(ids), minlength=len(p)) / n
    assert (p > 0.02).sum() >= 5
    assert (np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1 / n).all()


def test_each_row_has_its_temperature(lm):
    """A row at 0 is greedy beside one that samples; the one that samples draws what it would draw beside any other."""
    prompts = [PROMPTS[0]] * 3
    ids, logps = lm.decoder(prompts).decode([], [8] * 3, [0.0, 1.5, 0.0], np.random.default_rng(0))
    all_sampled, _ = lm.decoder(prompts).decode([], [8] * 3, 1.5, np.random.default_rng(0))
    assert ids[0] == ids[2] == greedy(lm, PROMPTS[0], [], 8) != ids[1] == all_sampled[1]
    assert logps[0] == pytest.approx(lm.decoder(prompts[:1]).decode([], [8], 0.0)[1][0], abs=1e-5)


def test_sampling_is_repeatable_and_rows_differ(lm):
    """One seed, one text; equal prompts get draws of their own."""
    def draw(seed):
        return lm.decoder([PROMPTS[0]] * 6).decode([], [10] * 6, 1.0, np.random.default_rng(seed))[0]
    assert draw(0) == draw(0) != draw(1)
    assert len(set(map(tuple, draw(0)))) == 6


def test_a_row_may_fill_the_cache(net):
    """The last slot belongs to the row that reaches it. Guards: padding of shorter rows, or a stopped row, written over it."""
    dec = net.decoder(PROMPTS)
    dec.feed([[70] * 13, [71], [72], [73] * 8])
    assert dec.length.tolist() == [16, 12, 2, 15]
    for logits, ids in zip(np.asarray(dec.logits), (PROMPTS[0] + [70] * 13, PROMPTS[1] + [71], PROMPTS[2] + [72], PROMPTS[3] + [73] * 8)):
        np.testing.assert_allclose(logits, uncached(net, ids), atol=1e-4)
    ids, _ = dec.decode([], [0, 4, 6, 1], 0.0)
    assert ids == [[], greedy(net, PROMPTS[1] + [71], [], 4), greedy(net, PROMPTS[2] + [72], [], 6), greedy(net, PROMPTS[3] + [73] * 8, [], 1)]
