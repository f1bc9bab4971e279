"""A group of rollouts is a trie: what is computed once is what would be computed for each alone.

Sampling is compared with rollouts that are decoded one by one, and with a network that reads whole
texts; the update with the textbook's loss, rollout by rollout. In torch and MLX.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mlx_twin, tiny_lm

import backends.torch.network as network_module
from autocoa import (
    IMAGINE,
    contrastive_loss,
    group_advantages,
    grpo_loss,
    next_rows,
    nll_loss,
    open_row,
    random_stream,
    rollout,
    sequence_loss,
)
from common.settings import RolloutSettings
from data.batches import build_trie, learn_observations, pack, pack_texts, pair_batches
from data.questions import Question
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from model import LM
from train_rl import (
    RLSettings,
    RolloutBatch,
    rollouts_that_teach,
    split_minibatches,
    update_batches,
)

SETTINGS = RolloutSettings(max_len=90, max_observation=12, max_actions=3, max_answer=4)
QUESTIONS = ["Who directed Silver River?", "What is it?"]
GROUP = 6


# Up to these places the rollouts of a question draw with the same numbers: two are one text, and
# the others part from them later and later.
PARTINGS = (90, 90, 60, 45, 30, 12)


@pytest.fixture(params=["torch", "mlx"])
def lm(request: pytest.FixtureRequest, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> LM:
    """A random network that searches two or three times, and goes on until it has no room."""
    lm = tiny_lm(codec, seed=3, noise=0.2)
    if request.param == "mlx":
        pytest.importorskip("mlx.core")
        lm = mlx_twin(lm)
    bias = np.zeros(len(codec.tokenizer), np.float32)
    bias[[codec.search_id, codec.end_result_id]] = 6.0
    bias[codec.end_search_id] = 5.0
    bias[[codec.end_think_id, codec.boxed_id, codec.eos_id]] = -5.0
    network = type(lm.network)
    plain_logits = network.logits

    def logits(self: Any, hidden: Any) -> Any:
        plain = plain_logits(self, hidden)
        if request.param == "torch":
            return plain + torch.as_tensor(bias)
        import mlx.core as mx

        return plain + mx.array(bias)

    monkeypatch.setattr(network, "logits", logits)
    return lm


def streams() -> list[np.ndarray]:
    numbers = []
    for question in range(len(QUESTIONS)):
        common = random_stream(SETTINGS.max_len, 7, question, 0)
        for number, parting in enumerate(PARTINGS):
            own = random_stream(SETTINGS.max_len, 7, question, number)
            numbers.append(np.concatenate([common[:parting], own[parting:]]))
    return numbers


def prompts(codec: Codec) -> list[list[int]]:
    return [codec.prompt(question) for question in QUESTIONS for _ in range(GROUP)]


def search(queries: list[str], trajectories: list[Trajectory]) -> list[Observation]:
    """Say something that depends on the query."""
    return [
        Observation(f"A film {len(query) % 3}." * (1 + len(query) % 2), Provenance.REAL)
        for query in queries
    ]


# ---- sampling ------------------------------------------------------------------------------------
@pytest.mark.parametrize("environment", ["tool", "imagined"])
def test_a_rollout_is_what_it_is_alone(lm: LM, environment: str) -> None:
    """Twelve rollouts of two questions together, and each by itself: the same tokens.

    Guards: a fork that copies the wrong slot, or too late; a row that draws with a number of
    another; a waiting row whose slot is written over.
    """
    codec = lm.codec
    tool: Any = search if environment == "tool" else IMAGINE
    everything = prompts(codec)
    numbers = streams()
    together = rollout(lm.decoder, codec, everything, tool, SETTINGS, 0.8, numbers)
    assert_rollouts_share(together)
    for prompt, stream, trajectory in zip(everything, numbers, together, strict=True):
        (alone,) = rollout(lm.decoder, codec, [prompt], tool, SETTINGS, 0.8, [stream])
        assert trajectory.ids == alone.ids
        assert trajectory.role == alone.role
        assert trajectory.mask == alone.mask
        assert trajectory.observations == alone.observations
        np.testing.assert_allclose(trajectory.logprobs, alone.logprobs, atol=1e-4)


def assert_rollouts_share(trajectories: Sequence[Trajectory]) -> None:
    """Most search for different things; pairs part early, after a call, or never."""
    several = [trajectory for trajectory in trajectories if len(set(trajectory.queries)) > 1]
    assert len(several) > len(trajectories) / 2
    one_text = 0
    part_after_a_call = 0
    part_before = 0
    for first, second in itertools.combinations(trajectories, 2):
        parts = [one != other for one, other in zip(first.ids, second.ids, strict=False)]
        common = parts.index(True) if any(parts) else len(parts)
        if first.ids == second.ids:
            one_text += 1
        elif Role.OBSERVATION in first.role[:common]:
            part_after_a_call += 1
        elif common > 10:
            part_before += 1
    assert one_text >= 2
    assert part_after_a_call >= 8
    assert part_before >= 2


@pytest.mark.parametrize("batch_rows", [1, 4, 7])
def test_rows_that_wait_for_room(lm: LM, batch_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rollouts begin where others have ended: the same tokens, and no more rows at a time.

    Guards: a row that begins in the slot of another, or before it has read its prompt.
    """
    numbers = streams()
    together = rollout(lm.decoder, lm.codec, prompts(lm.codec), search, SETTINGS, 0.8, numbers)
    rows_at_a_time: list[int] = []
    whole = lm.backend.Decoder.decode

    def decode(self: Any, stops: Any, limits: Any, *others: Any, **named: Any) -> Any:
        rows_at_a_time.append(len(limits))
        return whole(self, stops, limits, *others, **named)

    monkeypatch.setattr(lm.backend.Decoder, "decode", decode)
    ended: list[int] = []
    settings = dataclasses.replace(SETTINGS, batch_rows=batch_rows)
    in_turn = rollout(
        lm.decoder, lm.codec, prompts(lm.codec), search, settings, 0.8, numbers, ended.append
    )
    assert max(rows_at_a_time) <= batch_rows
    assert sum(ended) == len(numbers)
    for one, other in zip(together, in_turn, strict=True):
        assert one.ids == other.ids
        assert one.role == other.role
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_rows_of_one_prompt_begin_together(codec: Codec) -> None:
    """Where there is room for some of a group alone, it waits; a group that never fits is cut."""
    rows = [open_row(prompt, SETTINGS) for prompt in prompts(codec)]
    waiting = rows[GROUP - 2 :]  # two of the first question, six of the second
    assert len(next_rows(waiting, 7, decoder_is_empty=True)) == 2
    assert len(next_rows(waiting, 1, decoder_is_empty=False)) == 0
    assert len(next_rows(waiting[2:], 6, decoder_is_empty=False)) == 6
    assert len(next_rows(waiting[2:], 3, decoder_is_empty=False)) == 0
    assert len(next_rows(waiting[2:], 4, decoder_is_empty=True)) == 4


@pytest.mark.parametrize("environment", ["tool", "imagined"])
def test_each_token_is_the_one_that_its_number_draws(lm: LM, environment: str) -> None:
    """Under a network that reads the whole text, the number lies in the token's interval.

    Guards: a log-prob at another temperature, or of another text that shared the slot.
    """
    temperature = 0.8
    everything = prompts(lm.codec)
    numbers = streams()
    tool: Any = search if environment == "tool" else IMAGINE
    together = rollout(lm.decoder, lm.codec, everything, tool, SETTINGS, temperature, numbers)
    checked = 0
    for stream, trajectory in zip(numbers, together, strict=True):
        batch = pack_texts([trajectory])
        scored = lm.backend.score(lm.network, batch, temperature)
        own = np.array(trajectory.mask) > 0
        np.testing.assert_allclose(scored[own], np.array(trajectory.logprobs)[own], atol=1e-4)
        probabilities = next_probabilities(lm, trajectory.ids, temperature)
        for place in np.flatnonzero(own):
            ends = probabilities[place - 1].cumsum()
            token = trajectory.ids[place]
            start = ends[token] - probabilities[place - 1][token]
            assert start - 1e-5 <= stream[place] <= ends[token] + 1e-5
            checked += 1
    assert checked > 300
    assert_rollouts_share(together)


def test_a_rollout_is_that_of_the_slow_way(lm: LM) -> None:
    """Written again without cache, slots and blocks: the whole text is read for each token.

    What stands between the policy's tokens, which the tool said, is taken from the rollout.
    """
    temperature = 0.8
    numbers = streams()[:GROUP]
    together = rollout(
        lm.decoder, lm.codec, prompts(lm.codec)[:GROUP], search, SETTINGS, temperature, numbers
    )
    for stream, trajectory in zip(numbers, together, strict=True):
        ids: list[int] = []
        for token, mask in zip(trajectory.ids, trajectory.mask, strict=True):
            if not mask:
                ids.append(token)
                continue
            ends = next_probabilities(lm, ids, temperature)[-1].cumsum()
            ids.append(int((ends <= stream[len(ids)]).sum()))
        assert ids == trajectory.ids


def next_probabilities(lm: LM, ids: list[int], temperature: float) -> np.ndarray:
    """Return the distribution after each place of a text, (places, vocab), in float64."""
    if lm.backend.NAME == "torch":
        with torch.no_grad():
            logits = lm.network.logits(lm.network(torch.tensor([ids])))[0].numpy()
    else:
        import mlx.core as mx

        logits = np.array(lm.network.logits(lm.network(mx.array([ids])))[0])
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    return np.exp(scaled) / np.exp(scaled).sum(-1, keepdims=True)


def test_one_text_is_read_once(lm: LM) -> None:
    """As many slots as different texts: forks make new ones, and dropped rows give theirs back."""
    decoder = lm.decoder([[5, 6, 7]] * 4 + [[8, 9]])
    assert decoder.slots == 2
    uniforms = np.tile([[0.01], [0.01], [0.5], [0.99], [0.5]], (1, 3))
    ids, _ = decoder.decode([], [3] * 5, 1.0, uniforms)
    assert ids[0] == ids[1]
    assert len({tuple(row) for row in ids[:4]}) == 3
    decoder.feed([[], [], [], [], []])
    assert decoder.slots == 4
    decoder.feed([[20], [21], [20], [20], [20]])
    assert decoder.slots == 5
    decoder.keep([0, 4, 0])
    assert decoder.slots == 2
    assert decoder.slot.tolist() == [0, 1, 0]


def test_a_fork_leaves_the_others_as_they_are(lm: LM) -> None:
    """Rows that stop one after the other in a slot go on from their own ends."""
    decoder = lm.decoder([[5, 6, 7]] * 3)
    uniforms = np.full((3, 4), 0.3)
    ids, _ = decoder.decode([], [1, 2, 4], 1.0, uniforms)
    assert [len(row) for row in ids] == [1, 2, 4]
    assert ids[1] == ids[2][:2]
    decoder.feed([[30], [31, 32], []])
    texts = [[5, 6, 7, *ids[0], 30], [5, 6, 7, *ids[1], 31, 32], [5, 6, 7, *ids[2]]]
    for row, text in enumerate(texts):
        alone = lm.decoder([text])
        expected = np.asarray(alone.logits)[0]
        found = np.asarray(decoder.logits)[decoder.slot[row]]
        np.testing.assert_allclose(found, expected, atol=1e-4)


# ---- tries ---------------------------------------------------------------------------------------
def text(*ids: int, mask: Sequence[float] | None = None) -> Trajectory:
    """Return a text of which all but the first token is learned."""
    learned = [0.0] + [1.0] * (len(ids) - 1) if mask is None else list(mask)
    return Trajectory(list(ids), learned, [Role.THINK] * len(ids))


def test_a_trie_by_hand() -> None:
    """The one of the docstring, with a text that is given twice and one that ends early."""
    trie = build_trie(
        [text(1, 2, 3, 4, 5, 7, 8), text(1, 2, 3, 4, 5, 6), text(1, 2, 3), text(1, 2, 3, 4, 5, 6)]
    )
    assert trie.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert trie.depth.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    assert trie.parent.tolist() == [-1, 0, 1, 2, 3, 4, 4, 6]
    assert trie.end.tolist() == [8, 8, 8, 8, 8, 6, 8, 8]
    assert [path.tolist() for path in trie.paths] == [
        [0, 1, 2, 3, 4, 6, 7],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2],
        [0, 1, 2, 3, 4, 5],
    ]


def test_a_node_is_one_id_in_one_role_with_one_mask() -> None:
    """Guards: what a policy imagined and what the tool said, in the same words, as one node."""
    learned = text(1, 2, 3)
    masked = text(1, 2, 3, mask=[0, 0, 1])
    observed = Trajectory([1, 2, 3], [0, 1, 1], [Role.THINK, Role.OBSERVATION, Role.THINK])
    assert len(build_trie([learned, masked, observed]).ids) == 7
    assert len(build_trie([learned, learned]).ids) == 3


def test_random_tries_hold_their_texts() -> None:
    """Each path spells its text; a node sees those before it on its own paths, and no other."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        texts = [text(*rng.integers(0, 2, rng.integers(1, 9)).tolist()) for _ in range(6)]
        trie = build_trie(texts)
        assert len(trie.ids) == len(
            {tuple(one.ids[: end + 1]) for one in texts for end in range(len(one.ids))}
        )
        nodes = np.arange(len(trie.ids))
        sees = (nodes[None] <= nodes[:, None]) & (nodes[:, None] < trie.end[None])
        for one, path in zip(texts, trie.paths, strict=True):
            assert trie.ids[path].tolist() == one.ids
            assert trie.depth[path].tolist() == list(range(len(one.ids)))
            for place, node in enumerate(path):
                assert np.flatnonzero(sees[node]).tolist() == path[: place + 1].tolist()


# ---- the update ----------------------------------------------------------------------------------
def group_batch(lm: LM, temperature: float) -> RolloutBatch:
    """Two groups of four that part early, late, or not at all; one is alike in reward.

    The log-ratio of each token is between -0.7 and 0.7 under the network.
    """
    rng = np.random.default_rng(3)
    trajectories = []
    for question in QUESTIONS:
        common = rng.integers(20, 300, 5).tolist()
        for number in range(4):
            trajectory = Trajectory()
            trajectory.add(lm.codec.prompt(question), Role.PROMPT, 0)
            own = common[: 2 + number % 3] + rng.integers(20, 300, number % 3).tolist()
            trajectory.add(own, Role.THINK, 1)
            trajectory.add(common[:3], Role.OBSERVATION, 0)
            trajectory.observations.append(Observation("", Provenance.REAL))
            trajectory.add(common[3:], Role.ANSWER, 1)
            trajectories.append(trajectory)
    # What is one text was sampled once: its log-probs are one number.
    trie = build_trie(trajectories)
    log_ratio = rng.uniform(-0.7, 0.7, len(trie.ids))
    sampled = np.zeros(len(trie.ids))
    for trajectory, path in zip(trajectories, trie.paths, strict=True):
        scored = lm.backend.score(lm.network, pack_texts([trajectory]), temperature)
        sampled[path] = scored - log_ratio[path]
    for trajectory, path in zip(trajectories, trie.paths, strict=True):
        trajectory.logprobs = (sampled * (trie.mask > 0))[path].tolist()
    questions = [Question(str(n), text, ["Eva"], []) for n, text in enumerate(QUESTIONS)]
    rewards = np.array([[1.0, 0.0, 0.9, 0.0], [0.5, 0.5, 0.5, 0.5]])
    return RolloutBatch(questions, trajectories, rewards)


def textbook_advantages(rewards: np.ndarray, settings: RLSettings) -> np.ndarray:
    """Return the advantage of each rollout, one by one: (questions, rollouts)."""
    advantages = np.zeros(rewards.shape)
    for question, group in enumerate(rewards):
        for number, reward in enumerate(group):
            baseline = group
            if settings.loss == "reinforce":
                baseline = np.delete(group, number)
            advantages[question, number] = reward - baseline.mean()
        if settings.advantage_std:
            advantages[question] /= statistics.stdev(group) + 1e-6
    return advantages


def mean_of(values: list[torch.Tensor], loss: str, max_len: int) -> torch.Tensor:
    """Return the mean that a loss takes over the tokens of some rollouts, (tokens,) each."""
    if loss == "dapo":
        return torch.cat(values).mean()
    if loss == "dr_grpo":
        return torch.cat(values).sum() / (len(values) * max_len)
    if loss == "reinforce":
        return torch.stack([value.sum() for value in values]).mean()
    return torch.stack([value.mean() for value in values]).mean()


@dataclasses.dataclass
class TextbookStep:
    """What an optimizer step is by the papers. Ratios are of tokens, with gspo of rollouts."""

    loss: torch.Tensor
    clipped_above: int  # ratios of a positive advantage above 1 + clip_high
    clipped_below: int  # ratios of a negative advantage below 1 - clip_low


def textbook_step(
    lm: LM,
    batch: RolloutBatch,
    rows: np.ndarray,
    advantages: np.ndarray,
    settings: RLSettings,
    reference: LM,
) -> TextbookStep:
    """Compute the loss of a step on some rollouts, one by one, by the formulas of the papers."""
    policy: list[torch.Tensor] = []
    kl: list[torch.Tensor] = []
    observed: list[torch.Tensor] = []
    clipped_above = 0
    clipped_below = 0
    for row in rows:
        trajectory = batch.trajectories[row]
        ids = torch.tensor([trajectory.ids])
        logits = lm.network.logits(lm.network(ids))[0]
        with torch.no_grad():
            reference_logits = reference.network.logits(reference.network(ids))[0]
        tokens = ids[0, 1:, None]
        role = torch.tensor(trajectory.role)[1:]
        own = torch.tensor(trajectory.mask)[1:] > 0
        observed.append(-logits.log_softmax(-1)[:-1].gather(1, tokens)[role == Role.OBSERVATION, 0])
        scaled = (logits / settings.temperature).log_softmax(-1)
        logp = scaled[:-1].gather(1, tokens)[own, 0]
        scaled = (reference_logits / settings.temperature).log_softmax(-1)
        difference = scaled[:-1].gather(1, tokens)[own, 0] - logp
        kl.append(torch.exp(difference) - difference - 1)
        if row >= 4:  # the second group is skipped
            continue
        log_ratio = logp - torch.tensor(trajectory.logprobs)[1:][own]
        advantage = advantages.ravel()[row]
        if settings.loss == "reinforce":
            policy.append(-advantage * torch.exp(log_ratio.sum())[None])
            continue
        ratio = torch.exp(log_ratio.mean()[None] if settings.loss == "gspo" else log_ratio)
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        policy.append(-torch.minimum(ratio * advantage, clipped * advantage))
        if advantage > 0:
            clipped_above += int((ratio > 1 + settings.clip_high).sum())
        else:
            clipped_below += int((ratio < 1 - settings.clip_low).sum())
    loss = mean_of(policy, settings.loss, settings.max_len)
    loss = loss + settings.kl * mean_of(kl, settings.loss, settings.max_len)
    loss = loss + settings.observation_coef * torch.cat(observed).mean()
    return TextbookStep(loss, clipped_above, clipped_below)


class PlainSGD:
    """An optimizer that takes the learning rate times the gradient off the weights."""

    seed = 0
    step_count = 0

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.gradients: dict[str, np.ndarray] = {}  # of the last step

    def step(self, gradients: dict[str, Any], lr: float, muon_lr: float) -> None:
        backend = self.lm.backend
        self.gradients = {name: backend.to_numpy(value) for name, value in gradients.items()}
        weights = weights_of(self.lm)
        for name, gradient in self.gradients.items():
            weights[name] = weights[name] - lr * gradient
        backend.set_weights(self.lm.network, weights, "a test")


def weights_of(lm: LM) -> dict[str, np.ndarray]:
    """Return copies of all weights, by name."""
    arrays = lm.backend.to_arrays(lm.network, lm.backend.named_parameters(lm.network))
    return {name: array.copy() for name, array in arrays.items()}


def begin_stage(lm: LM, settings: RLSettings) -> None:
    """Prepare a network for training. Both matrices of an adapter are random.

    A new adapter's B is zero, and then the gradient of its A is zero too.
    """
    lm.begin_stage(settings, seed=0)
    weights = weights_of(lm)
    rng = np.random.default_rng(0)
    for name in sorted(weights):
        if name.endswith("lora_B"):
            weights[name] = 0.02 * rng.standard_normal(weights[name].shape)
    lm.backend.set_weights(lm.network, weights, "a test")


def assert_within(
    bound: float, arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    """Compare by name; no number may be further off than the bound, however large it is."""
    assert set(arrays) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"minibatches": 2},
        {"advantage_std": True},
        {"clip_low": 0.3, "clip_high": 0.05},
        {"clip_low": 0.05, "clip_high": 0.5},
        {"checkpointing": True},
        {"lora_rank": 16},
        {"lora_rank": 16, "kl": 0.1, "micro_tokens": 1},
        {"observation_coef": 0.2},
        {"kl": 0.1, "observation_coef": 0.5, "micro_tokens": 1},
        {"kl": 0.1, "observation_coef": 0.5, "minibatches": 3},
        {"loss": "grpo", "micro_tokens": 1},
        {"loss": "grpo", "kl": 0.3},
        {"loss": "grpo", "minibatches": 2, "advantage_std": True},
        {"loss": "grpo", "observation_coef": 0.2, "checkpointing": True},
        {"loss": "dr_grpo", "max_len": 20, "kl": 0.3},
        {"loss": "dr_grpo", "max_len": 20, "observation_coef": 0.2, "minibatches": 2},
        {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "micro_tokens": 1},
        {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "kl": 0.3},
        {"loss": "gspo", "clip_low": 0.02, "clip_high": 0.03, "minibatches": 2},
        {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "observation_coef": 0.2},
        {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "lora_rank": 16},
        {"loss": "reinforce", "kl": 0.03},
        {"loss": "reinforce", "micro_tokens": 1},
        {"loss": "reinforce", "advantage_std": True},
        {"loss": "reinforce", "observation_coef": 0.2, "checkpointing": True},
    ],
    ids=str,
)
def test_an_update_is_the_textbooks(codec: Codec, backend: str, given: Any) -> None:
    """Loss, gradients and weights of an update on tries are those of rollouts one by one.

    In one micro-batch or many, in one optimizer step or more, of plain SGD: Adam makes whole steps
    of what is rounding. The ratios are clipped on both sides. Guards: a shared token that counts
    once, or not; a parent that is the token before it in the row; a normaliser of nodes in place of
    tokens; KL that skipped groups lose; a rollout's length, or its ratio, taken over other
    rollouts' nodes.
    """
    textbook = tiny_lm(codec, noise=0.02)
    reference = tiny_lm(codec, seed=1, noise=0.02)
    lm = textbook.copy()
    its_reference = reference
    if backend == "mlx":
        pytest.importorskip("mlx.core")
        lm = mlx_twin(textbook)
        its_reference = mlx_twin(reference)
    settings = RLSettings(
        questions=2, rollouts=4, temperature=0.9, **{"micro_tokens": 10_000, **given}
    )
    for one in (textbook, lm):
        begin_stage(one, settings)
    batch = group_batch(textbook, settings.temperature)
    advantages = group_advantages(
        batch.rewards, settings.advantage_std, leave_one_out=settings.loss == "reinforce"
    )
    expected_advantages = textbook_advantages(batch.rewards, settings)
    skipped = np.array([False, True])
    learned = np.flatnonzero(rollouts_that_teach(batch, skipped, settings))
    parts = split_minibatches(learned, settings.minibatches, np.random.default_rng(0))
    assert len(parts) == settings.minibatches

    loss = sequence_loss if settings.loss in ("gspo", "reinforce") else grpo_loss
    bound = 1e-5
    if backend == "mlx" and settings.loss == "reinforce":
        # A rollout's ratio is e to a sum over its tokens, whose rounding adds up: to 4.1e-5 here.
        bound = 1e-4
    # A whole gradient at once; where another step follows, less, or its loss would be in the tens.
    rate = 1.0 if settings.minibatches == 1 else 1e-3
    optimizer = PlainSGD(lm)
    trained = textbook.backend.trained_parameters(textbook.network)
    textbook_optimizer = torch.optim.SGD(trained.values(), lr=rate)
    before = weights_of(textbook)
    nodes = 0
    clipped_above = 0
    clipped_below = 0
    for rows in parts:
        batches = update_batches(batch, rows, advantages, skipped, its_reference, settings)
        figures = lm.backend.train_step(
            lm.network, optimizer, loss, batches, rate, 0.0, settings.temperature, max_norm=1e9
        )
        expected = textbook_step(textbook, batch, rows, expected_advantages, settings, reference)
        textbook_optimizer.zero_grad()
        expected.loss.backward()
        assert figures["loss"] == pytest.approx(expected.loss.item(), rel=0, abs=bound)
        gradients = {name: weight.grad.numpy() for name, weight in trained.items()}
        assert_within(bound, optimizer.gradients, gradients)
        textbook_optimizer.step()
        assert_within(bound, weights_of(lm), weights_of(textbook))
        nodes += sum(len(part["ids"]) for part in batches)
        clipped_above += expected.clipped_above
        clipped_below += expected.clipped_below
    after = weights_of(textbook)
    assert max(np.abs(after[name] - before[name]).max() for name in trained) > 1e-4
    assert nodes < sum(len(batch.trajectories[row].ids) for row in learned)
    if settings.loss != "reinforce":
        assert clipped_above > 0
        assert clipped_below > 0


def test_pairs_of_sft_1_are_two_texts(lm: LM) -> None:
    """The loss on a pair's trie is the paper's formula on two texts, each read by itself."""
    rng = np.random.default_rng(2)
    alpha = 0.3
    pairs = []
    expected = 0.0
    for shared, chosen, rejected in ((3, 4, 2), (5, 1, 6), (2, 3, 3)):
        beginning = rng.integers(20, 300, shared).tolist()
        sides = []
        scores = []
        for length in (chosen, rejected):
            ids = beginning + rng.integers(20, 300, length).tolist()
            mask = [0.0] * shared + [1.0] * length
            sides.append(text(*ids, mask=mask))
            probabilities = next_probabilities(lm, ids, 1.0)
            places = np.arange(shared, shared + length)
            scores.append(np.log(probabilities[places - 1, np.array(ids)[places]]).mean())
        pairs.append((sides[0], sides[1]))
        gap = scores[0] - scores[1]
        expected += np.log1p(np.exp(-gap)) - alpha * scores[0]
    total = 0.0
    for batch in pair_batches(pairs, 12, alpha):
        logp = lm.backend.score(lm.network, batch)
        total += float(contrastive_loss(np, logp, batch))
    assert total == pytest.approx(expected / len(pairs), abs=1e-5)


def test_attention_as_on_cuda(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each query head gets keys of its own, tries and prompts have the same figures."""
    lm = tiny_lm(codec, noise=0.1)
    assert lm.network.config.num_key_value_heads < lm.network.config.num_attention_heads
    batch = group_batch(lm, 1.0)
    packed = pack([build_trie(batch.trajectories[:4]), build_trie(batch.trajectories[4:5])])
    prompts_of_batch = [trajectory.ids[:9] for trajectory in batch.trajectories]
    figures = []
    calls = []
    for is_cuda in (False, True):

        def repeats_keys(q: Any, mask: Any, answer: bool = is_cuda) -> bool:
            calls.append(mask is None)
            return answer

        monkeypatch.setattr(network_module, "_repeats_keys", repeats_keys)
        scores = lm.backend.score(lm.network, packed)
        figures.append((scores, np.asarray(lm.decoder(prompts_of_batch).logits)))
    np.testing.assert_allclose(figures[1][0], figures[0][0], atol=1e-5)
    np.testing.assert_allclose(figures[1][1], figures[0][1], atol=1e-5)
    # With masks and without, as in tries and in texts.
    assert set(calls) == {True, False}


def test_packed_texts_are_apart(lm: LM, codec: Codec) -> None:
    """Texts that are packed have the log-probs that each has alone, whatever stands beside it."""
    rng = np.random.default_rng(1)
    texts = [text(*rng.integers(20, 300, length).tolist()) for length in (1, 2, 9, 4)]
    packed = pack_texts(texts)
    together = lm.backend.score(lm.network, packed)
    entropies = lm.backend.entropies(lm.network, packed)
    for one, (start, end) in zip(texts, packed["parts"], strict=True):
        batch = pack_texts([one])
        np.testing.assert_allclose(
            together[start:end], lm.backend.score(lm.network, batch), atol=1e-5
        )
        expected = lm.backend.entropies(lm.network, batch)
        np.testing.assert_allclose(entropies[start:end], expected, atol=1e-5)
    assert together[packed["parent"] < 0].tolist() == [0.0] * 4


def test_weights_of_observations_travel_with_nodes(codec: Codec) -> None:
    """SFT-3's weight of a tenth is on the packed mask, and nothing else."""
    trajectory = Trajectory([5, 6, 7], [0, 1, 0], [Role.PROMPT, Role.ACTION, Role.OBSERVATION])
    (seen,) = learn_observations([trajectory], 0.1)
    assert pack([build_trie([seen])])["mask"].tolist() == pytest.approx([0, 1, 0.1])
    logp = np.array([0.0, -2.0, -3.0])
    batch = {"mask": np.array([0, 1, 0.1]), "norm": 1.1}
    assert nll_loss(np, logp, batch) == pytest.approx(2.3 / 1.1)
