"""The losses against slow loops over plain floats; their gradients, and what reaches weights."""

import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import tiny_lm
from torch.nn import functional
from torch.nn.attention import varlen

import autocoa
import backends.torch as torch_backend
from data.batches import language_batches, learn_observations, pair_batches
from data.questions import Question
from data.rollout_batch import RolloutBatch
from data.trajectory import Codec, Role, Trajectory
from model import LM
from train_rl import RLSettings, update_batches


@dataclass
class Rollout:
    """One text of an example: which nodes of the trie are its tokens, and what it is worth."""

    nodes: list[int]
    advantage: float


# ---- slow and obviously right: one text after the other, one token at a time ---------------------
def slow_nll(logp: Any, batch: Any, rollouts: list[Rollout]) -> Any:
    total = 0.0
    for logprob, is_learned in zip(logp, batch["mask"], strict=True):
        if is_learned:
            total += -logprob
    return total / batch["norm"]


def slow_contrastive(logp: Any, batch: Any, rollouts: list[Rollout]) -> Any:
    def mean_logprob(rollout: Rollout) -> Any:
        picked = [logp[node] for node in rollout.nodes if batch["mask"][node]]
        return sum(picked) / len(picked)

    pairs = len(rollouts) // 2
    total = 0.0
    for pair in range(pairs):
        chosen = mean_logprob(rollouts[pair])
        rejected = mean_logprob(rollouts[pairs + pair])
        sigmoid = 1 / (1 + math.exp(-(chosen - rejected)))
        total += -math.log(sigmoid) - batch["alpha"] * chosen
    return total / batch["norm"]


def slow_grpo(logp: Any, batch: Any, rollouts: list[Rollout]) -> Any:
    low = 1 - batch["clip_low"]
    high = 1 + batch["clip_high"]
    policy = 0.0
    divergence = 0.0
    for rollout in rollouts:
        advantage = rollout.advantage
        for node in rollout.nodes:
            if not batch["mask"][node]:
                continue
            ratio = math.exp(logp[node] - batch["old"][node])
            clipped = min(max(ratio, low), high)
            policy += -min(ratio * advantage, clipped * advantage)
            quotient = math.exp(batch["ref"][node]) / math.exp(logp[node])
            divergence += quotient - math.log(quotient) - 1
    total = policy / batch["norm"] + batch["beta"] * divergence / batch["kl_norm"]
    if batch["observation_coef"]:
        observation = slow_observation_loss(logp, batch, rollouts)
        total += batch["observation_coef"] * observation
    return total


def slow_observation_loss(logp: Any, batch: Any, rollouts: list[Rollout]) -> Any:
    total = 0.0
    for rollout in rollouts:
        for node in rollout.nodes:
            if batch["observation_count"][node]:
                total += -logp[node]
    return total / batch["observation_norm"]


# Two tries of two texts each. The first two begin with nodes 0 to 4, the others with 14 to 17.
EXAMPLE_ROLLOUTS = [
    Rollout([0, 1, 2, 3, 4, 5, 6, 7, 8], 0.8),
    Rollout([14, 15, 16, 17, 18, 19, 20], 0.0),
    Rollout([0, 1, 2, 3, 4, 9, 10, 11, 12, 13], -0.6),
    Rollout([14, 15, 16, 17, 21, 22, 23, 24], -0.2),
]
EXAMPLE_NODES = 25


def over_nodes(rollouts: list[Rollout], values: list[float]) -> np.ndarray:
    """Return for each node the sum of the values of the rollouts that share it."""
    sums = np.zeros(EXAMPLE_NODES)
    for rollout, value in zip(rollouts, values, strict=True):
        for node in rollout.nodes:
            sums[node] += value
    return sums


def example(name: str) -> Any:
    """Return random log-probs of 25 nodes in float64, their batch, and the texts that share them.

    Ratios of new to old go from 0.4 to 2.5, and advantages have both signs, on one node too.
    """
    rng = np.random.default_rng(7)
    rollouts = EXAMPLE_ROLLOUTS
    logp = -rng.uniform(0.1, 3.0, EXAMPLE_NODES)
    mask = (rng.random(EXAMPLE_NODES) < 0.6).astype(float)
    mask[[0, 14]] = 0
    mask[[4, 8, 13, 17, 20, 24]] = 1
    batch = {"mask": mask, "norm": 11.0}
    if name == "contrastive":
        batch["alpha"] = 0.2
        batch["path_weights"] = np.zeros((len(rollouts), EXAMPLE_NODES))
        for row, rollout in enumerate(rollouts):
            learned = [node for node in rollout.nodes if mask[node]]
            batch["path_weights"][row, learned] = 1 / len(learned)
    if name.startswith("grpo"):
        batch["old"] = logp + rng.uniform(-0.9, 0.9, logp.shape)
        batch["positive"] = over_nodes(rollouts, [max(one.advantage, 0) for one in rollouts])
        batch["negative"] = over_nodes(rollouts, [min(one.advantage, 0) for one in rollouts])
        batch["clip_low"] = 0.2
        batch["clip_high"] = 0.28
        batch["beta"] = 0.5 if name == "grpo with KL" else 0.0
        batch["ref"] = logp + rng.uniform(-0.5, 0.5, logp.shape)
        batch["count"] = over_nodes(rollouts, [1, 1, 1, 1])
        batch["kl_norm"] = 13.0
        batch["observation_coef"] = 0.0
    if "observations" in name:
        # None of the policy's tokens, and no first token.
        is_observed = (rng.random(mask.shape) < 0.7) & (mask == 0)
        is_observed[[0, 14]] = False
        batch["observation_count"] = is_observed * over_nodes(rollouts, [1, 1, 1, 1])
        batch["observation_norm"] = 5.0
        batch["observation_coef"] = 0.3
    return logp, batch, rollouts


LOSSES = {
    "nll": (autocoa.nll_loss, slow_nll),
    "contrastive": (autocoa.contrastive_loss, slow_contrastive),
    "grpo": (autocoa.grpo_loss, slow_grpo),
    "grpo with KL": (autocoa.grpo_loss, slow_grpo),
    "grpo with observations": (autocoa.grpo_loss, slow_grpo),
    "observations": (autocoa.observation_loss, slow_observation_loss),
}


def to_torch(batch: Any) -> Any:
    """Return a batch whose arrays are tensors."""
    tensors = dict(batch)
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            tensors[name] = torch.as_tensor(value)
    return tensors


@pytest.mark.parametrize("name", LOSSES)
def test_value(name: Any) -> None:
    """NumPy and torch give what the loops give."""
    loss, slow_loss = LOSSES[name]
    logp, batch, rollouts = example(name)
    expected = slow_loss(logp.tolist(), batch, rollouts)
    assert loss(np, logp, batch) == pytest.approx(expected, abs=1e-9)
    in_torch = loss(torch, torch.as_tensor(logp), to_torch(batch))
    assert in_torch.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: Any) -> None:
    """Torch's gradient, by token, equals central differences of the loops; 0 where the mask is 0.

    Guards: a token of the environment that carries loss, clipping on the wrong side of an
    advantage, and a token that texts share which counts once.
    """
    loss, slow_loss = LOSSES[name]
    logp, batch, rollouts = example(name)
    tensor = torch.tensor(logp, requires_grad=True)
    loss(torch, tensor, to_torch(batch)).backward()
    gradient = tensor.grad
    assert gradient is not None

    def moved(index: Any, step: Any) -> Any:
        other = logp.copy()
        other[index] += step
        return slow_loss(other.tolist(), batch, rollouts)

    for index in np.ndindex(logp.shape):
        slope = (moved(index, 1e-6) - moved(index, -1e-6)) / 2e-6
        assert gradient[index].item() == pytest.approx(slope, abs=1e-6)
    is_learned = batch["mask"] > 0
    if name == "observations":
        is_learned = np.zeros_like(is_learned)
    if "observation_count" in batch:
        is_learned = is_learned | (batch["observation_count"] > 0)
    assert is_learned.any()
    assert not gradient[torch.as_tensor(~is_learned)].any()


# ---- beside TRL ----------------------------------------------------------------------------------
# What TRL 1.16 computes for the batch below, by (loss, beta): GRPOTrainer._compute_loss with
# epsilon 0.2, epsilon_high 0.28 and max_completion_length 10, for gspo with loss_type "grpo" and
# one importance weight a sequence; RLOOTrainer._compute_loss without clipping.
TRL_VALUES = {
    ("dapo", 0.0): 0.1573859923224768,
    ("grpo", 0.0): -0.017645917214833107,
    ("dr_grpo", 0.0): 0.055085097312866885,
    ("gspo", 0.0): -0.03320348354345984,
    ("dapo", 0.1): 0.16300067326863926,
    ("grpo", 0.1): -0.011891293446160162,
    ("dr_grpo", 0.1): 0.05705023564402374,
    ("gspo", 0.1): -0.027448859774786893,
    ("reinforce", 0.0): 0.004655336223602424,
}


# Two questions with two rollouts each, which begin alike, and the rewards of these.
TRL_ROLLOUTS = ([1, 2, 3], [1, 2, 4, 5, 6], [7, 8], [7, 9, 2, 3])
TRL_REWARDS = np.array([[1.0, 0.0], [0.5, -0.5]])


def trl_logprobs(ids: Any, place: Any) -> tuple[Any, Any, Any]:
    """Return made-up log-probabilities of tokens: old, new, and by the policy before.

    place: of each token in its rollout, from 0.
    """
    old = -0.5 - 0.1 * ids
    new = old + 0.4 * np.sin(3 * ids + 2 * place)
    reference = old - 0.3 * np.cos(ids + place)
    return old, new, reference


@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx.core"])
@pytest.mark.parametrize(("name", "beta"), TRL_VALUES)
def test_losses_are_trls(name: Any, beta: float, framework: str) -> None:
    """TRL's values, in each framework.

    Guards: a length, a number of rollouts or a clipping that is another than theirs.
    """
    xp = pytest.importorskip(framework)
    as_array = xp.as_tensor if framework == "torch" else xp.array
    chains = []
    for ids in TRL_ROLLOUTS:
        chain = Trajectory()
        chain.add([50], Role.PROMPT, 0)
        old, _, _ = trl_logprobs(np.array(ids), np.arange(len(ids)))
        chain.add(list(ids), Role.THINK, 1, old.tolist())
        chains.append(chain)

    def score(network: Any, batch: Any, temperature: float) -> Any:
        _, _, reference = trl_logprobs(batch["ids"], batch["depth"] - 1)
        return reference

    reference: Any = SimpleNamespace(backend=SimpleNamespace(score=score), network=None)
    settings = RLSettings(loss=name, kl=beta, max_len=10, rollouts=2, micro_tokens=1)
    batches = update_batches(
        RolloutBatch([], chains, TRL_REWARDS),
        np.arange(4),
        autocoa.group_advantages(TRL_REWARDS, leave_one_out=name == "reinforce"),
        np.zeros(2, bool),
        reference,
        settings,
    )
    assert len(batches) == 2
    loss = autocoa.grpo_loss
    if name in ("gspo", "reinforce"):
        loss = autocoa.sequence_loss
    total = 0.0
    for batch in batches:
        _, new, _ = trl_logprobs(batch["ids"], batch["depth"] - 1)
        arrays = dict(batch)
        for key, value in batch.items():
            if isinstance(value, np.ndarray):
                arrays[key] = as_array(value)
        total += float(loss(xp, as_array(new.astype(np.float32)), arrays))
    assert total == pytest.approx(TRL_VALUES[name, beta], abs=1e-6)


@pytest.mark.parametrize(("name", "beta"), TRL_VALUES)
def test_values_are_those_of_trl(name: str, beta: float) -> None:
    """TRL itself, where it is installed (requirements-bench.txt), still gives TRL_VALUES."""
    pytest.importorskip("trl")
    from trl import GRPOTrainer, RLOOTrainer  # pyrefly: ignore[missing-import]

    def pad(rows: Any) -> Any:
        tensors = [torch.as_tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    ids = [np.array(row) for row in TRL_ROLLOUTS]
    logprobs = [trl_logprobs(row, np.arange(len(row))) for row in ids]
    old, new, reference = (pad(rows) for rows in zip(*logprobs, strict=True))
    mask = pad([np.ones_like(row) for row in ids])
    rewards = torch.as_tensor(TRL_REWARDS)
    # Less the mean of the group, or less that of the others.
    advantages = rewards - rewards.mean(1, keepdim=True)
    trainer = GRPOTrainer
    if name == "reinforce":
        advantages = rewards - rewards.flip(1)
        trainer = RLOOTrainer
    unclipped = name == "reinforce"
    state = MagicMock(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        loss_type="grpo" if name == "gspo" else name,
        beta=beta,
        epsilon_low=1e9 if unclipped else 0.2,
        epsilon_high=1e9 if unclipped else 0.28,
        max_completion_length=10,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
    state.model.training = False
    state.args.delta = None
    state.args.use_bias_correction_kl = False
    state.accelerator.num_processes = 1
    state.accelerator.gather = lambda values: values
    state.accelerator.reduce = lambda values, reduction: values
    state._get_per_token_logps_and_entropies.return_value = (new, torch.zeros_like(new), None)
    prompts = torch.full((4, 1), 50)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": pad(ids),
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    value = trainer._compute_loss(state, None, inputs)
    assert value.item() == pytest.approx(TRL_VALUES[name, beta], abs=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, slope",
    [
        # More likely already: stop at 1.28; less likely: always pull up.
        (1.5, 1, 0),
        (1.27, 1, -1.27),
        (0.5, 1, -0.5),
        # Less likely already: stop at 0.8; more likely: always push down.
        (0.5, -1, 0),
        (0.81, -1, 0.81),
        (1.5, -1, 1.5),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: int, slope: float) -> None:
    """For one token d loss / d logp is -ratio x advantage where the policy may still move that way.

    Else it is 0. The high side is wider.
    """
    logp = torch.tensor([math.log(ratio)], requires_grad=True, dtype=torch.float64)
    batch = {
        "mask": np.ones(1),
        "old": np.zeros(1),
        "positive": np.array([max(advantage, 0.0)]),
        "negative": np.array([min(advantage, 0.0)]),
        "clip_low": 0.2,
        "clip_high": 0.28,
        "beta": 0.0,
        "norm": 1.0,
        "observation_coef": 0.0,
    }
    autocoa.grpo_loss(torch, logp, to_torch(batch)).backward()
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(slope)


def test_k3_is_an_estimate_of_the_divergence() -> None:
    """Drawn from the policy, k3's mean is KL(policy || reference) of the whole distribution.

    No sample of it is negative.
    """
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(5))
    reference = rng.dirichlet(np.ones(5))
    tokens = rng.choice(5, 200_000, p=policy)
    estimate = autocoa.k3(np, np.log(reference / policy)[tokens])
    divergence = (policy * np.log(policy / reference)).sum()
    assert estimate.min() >= 0
    assert estimate.mean() == pytest.approx(divergence, rel=0.02)


# ---- what reaches the weights --------------------------------------------------------------------
class FrozenOptimizer:
    """In place of an optimizer: it leaves the weights, so that the gradient can be read."""

    def step(self, gradients: Any, lr: Any, muon_lr: Any) -> None:
        pass


def loss_and_gradient(network: Any, loss: Any, batches: Any) -> Any:
    optimizer: Any = FrozenOptimizer()
    figures = torch_backend.train_step(network, optimizer, loss, batches, 0, 0, max_norm=math.inf)
    gradient = {name: weight.grad.clone() for name, weight in network.named_parameters()}
    return figures["loss"], gradient


def sampled_chains(codec: Codec) -> Any:
    """Return six chains of several lengths, with an observation each, as if they were sampled.

    They are one text up to the middle of their observations, where their log-probs agree.
    """
    rng = random.Random(3)
    old = [-rng.uniform(0, 3) for _ in range(200)]
    chains = []
    for words in (1, 9, 2, 7, 3, 12):
        parts = [
            ("think", "Hm"),
            ("search", "Silver River"),
            ("result", "a film of " + "Eva Moss " * words),
            ("answer", "Ada Falk"),
        ]
        chain = codec.build("Who directed it?", parts)
        chain.logprobs = [
            logprob * is_learned for logprob, is_learned in zip(old, chain.mask, strict=False)
        ]
        chains.append(chain)
    return chains


# Of two rollouts of three questions each: the sums of those that share a token are not 0.
ADVANTAGES = np.array([[0.5, -0.3], [0.25, -0.4], [1.0, -0.8]])


def rl_batches(chains: Any, settings: RLSettings, reference: Any) -> Any:
    """Return RL's own micro-batches of six chains, none of which is skipped."""
    questions = [Question(str(number), "Who?", ["Ada Falk"], []) for number in range(3)]
    batch = RolloutBatch(questions, chains, rewards=ADVANTAGES)
    none_skipped = np.zeros(3, bool)
    return update_batches(batch, np.arange(6), ADVANTAGES, none_skipped, reference, settings)


def batches_of(name: str, chains: Any, micro_tokens: Any) -> Any:
    """Return the scripts' own micro-batches for each loss."""
    if name == "nll":
        return language_batches(chains, micro_tokens)
    if name == "contrastive":
        pairs = list(zip(chains[0::2], chains[1::2], strict=True))
        return pair_batches(pairs, micro_tokens, alpha=0.2)
    settings = RLSettings(
        rollouts=2,
        micro_tokens=micro_tokens,
        temperature=1.0,
        kl=0.0,
        clip_low=5.0,
        clip_high=5.0,
    )
    if name == "grpo with observations":
        settings.observation_coef = 0.5
    no_reference: Any = None
    return rl_batches(chains, settings, no_reference)


SCRIPT_LOSSES = {
    "nll": autocoa.nll_loss,
    "contrastive": autocoa.contrastive_loss,
    "grpo": autocoa.grpo_loss,
    "grpo with observations": autocoa.grpo_loss,
}


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_each_loss_moves_each_parameter(
    codec: Codec, name: Any, architecture: str, muon: bool
) -> None:
    """Guards: a loss that does not reach some weight, a weight that the optimizer leaves out."""
    is_tied = architecture == "LlamaForCausalLM"
    lm = tiny_lm(codec, architecture=architecture, tie_embeddings=is_tied, noise=0.1)
    parameters = dict(lm.network.named_parameters())
    before = {weight_name: weight.clone() for weight_name, weight in parameters.items()}
    optimizer = torch_backend.Optimizer(lm.network, muon=muon)
    batches = batches_of(name, sampled_chains(codec), 500)
    figures = torch_backend.train_step(
        lm.network, optimizer, SCRIPT_LOSSES[name], batches, 1e-3, 1e-2
    )
    assert math.isfinite(figures["loss"])
    assert figures["grad_norm"] > 0
    for weight_name, weight in parameters.items():
        assert weight.grad.any(), weight_name
        assert not torch.equal(weight, before[weight_name]), weight_name


@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_micro_batches_add_up(codec: Codec, lm: LM, name: Any) -> None:
    """Loss and gradient of a step do not depend on how it is cut.

    Guards: a normalizer of the micro-batch.
    """
    chains = sampled_chains(codec)
    few = batches_of(name, chains, 10**6)
    many = batches_of(name, chains, 60)
    assert len(many) > max(2, len(few))
    loss, gradient = loss_and_gradient(lm.network, SCRIPT_LOSSES[name], few)
    other_loss, other_gradient = loss_and_gradient(lm.network, SCRIPT_LOSSES[name], many)
    assert loss == pytest.approx(other_loss, abs=1e-5)
    torch.testing.assert_close(gradient, other_gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_texts_in_one_call_of_attention(
    codec: Codec, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA does in one call for all texts of a row, as a call for each of them.

    FlashAttention runs on CUDA alone, so this is its contract, text by text.
    Guards: ends that are off by a text, other axes, and a row of tries that loses its masks.
    """
    calls: list[int] = []

    def slow_varlen_attn(
        q: Any, k: Any, v: Any, ends: Any, key_ends: Any, longest: int, longest_key: int, **how: Any
    ) -> Any:
        assert how == {"window_size": (-1, 0), "enable_gqa": True}
        assert (ends == key_ends).all()
        assert ends.dtype == torch.int32
        starts_and_ends = list(zip(ends.tolist(), ends.tolist()[1:], strict=False))
        assert longest == longest_key == max(end - start for start, end in starts_and_ends)
        calls.append(len(starts_and_ends))
        read = []
        for start, end in starts_and_ends:
            heads = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            y = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            read.append(y[0].transpose(0, 1))
        return torch.cat(read)

    lm = tiny_lm(codec, architecture=architecture, noise=0.1)
    expected = {}
    for name in ("nll", "contrastive"):
        batches = batches_of(name, sampled_chains(codec), 500)
        expected[name] = loss_and_gradient(lm.network, SCRIPT_LOSSES[name], batches)
    monkeypatch.setattr(torch_backend.Transformer, "attends_to_texts_at_once", True)
    monkeypatch.setattr(varlen, "varlen_attn", slow_varlen_attn)
    for name, (loss, gradient) in expected.items():
        batches = batches_of(name, sampled_chains(codec), 500)
        other_loss, other_gradient = loss_and_gradient(lm.network, SCRIPT_LOSSES[name], batches)
        assert loss == pytest.approx(other_loss, abs=1e-5)
        torch.testing.assert_close(gradient, other_gradient, atol=1e-5, rtol=1e-3)
    # Once a layer; pairs are tries, which need their masks.
    assert calls == [6] * lm.network.config.num_hidden_layers


@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_gradient_is_the_slope_of_the_loss(codec: Codec, name: Any) -> None:
    """Along its own gradient the loss of the whole network rises as fast as the gradient is long.

    Guards: a detached path.
    """
    lm = tiny_lm(codec, noise=0.1)
    loss = SCRIPT_LOSSES[name]
    batches = batches_of(name, sampled_chains(codec), 500)
    _, gradient = loss_and_gradient(lm.network, loss, batches)
    length = math.sqrt(sum(part.square().sum().item() for part in gradient.values()))

    def loss_at(step: Any) -> Any:
        moved = torch_backend.copy_network(lm.network)
        with torch.no_grad():
            for weight_name, weight in moved.named_parameters():
                weight.add_(gradient[weight_name], alpha=step / length)
        value, _ = loss_and_gradient(moved, loss, batches)
        return value

    slope = (loss_at(0.003) - loss_at(-0.003)) / 0.006
    assert slope == pytest.approx(length, rel=0.02)


def chain_that_ends_in_observation(codec: Codec, text: str) -> Any:
    parts = [("think", "Hm"), ("search", "Silver River"), ("result", text)]
    chain = codec.build("Who directed it?", parts)
    chain.logprobs = [-0.5 * is_learned for is_learned in chain.mask]
    return chain


@pytest.mark.parametrize("name", ["nll", "contrastive", "grpo"])
def test_observations_carry_no_loss(codec: Codec, lm: LM, name: Any) -> None:
    """Other tokens in an observation at the end of a trajectory change nothing.

    Nothing follows that it could be context of. Learned, as in SFT-3, they do.
    """

    def step(text: str, learns_observations: bool = False) -> Any:
        chains = [chain_that_ends_in_observation(codec, text)] * 6
        if learns_observations:
            chains = learn_observations(chains)
        return loss_and_gradient(lm.network, SCRIPT_LOSSES[name], batches_of(name, chains, 10**6))

    text = "Eva Moss is a star"
    other_text = "Ada Falk was the director"
    loss, gradient = step(text)
    other_loss, other_gradient = step(other_text)
    assert loss == other_loss
    torch.testing.assert_close(gradient, other_gradient, atol=0, rtol=0)
    if name == "nll":
        learned, _ = step(text, learns_observations=True)
        other_learned, _ = step(other_text, learns_observations=True)
        assert learned != pytest.approx(other_learned, abs=1e-3)


def test_observations_are_learned_beside_the_policy(codec: Codec, lm: LM) -> None:
    """With a coefficient, a step of RL adds the next-token loss of what the tool said.

    It is the difference to the step without, and the gradients add up likewise.
    """
    chains = sampled_chains(codec)
    plain, plain_gradient = loss_and_gradient(
        lm.network, autocoa.grpo_loss, batches_of("grpo", chains, 500)
    )
    both, both_gradient = loss_and_gradient(
        lm.network, autocoa.grpo_loss, batches_of("grpo with observations", chains, 500)
    )
    observed = []
    for chain in chains:
        mask = [float(role == Role.OBSERVATION) for role in chain.role]
        observed.append(Trajectory(chain.ids, mask, chain.role))
    observation, observation_gradient = loss_and_gradient(
        lm.network, autocoa.nll_loss, language_batches(observed, 500)
    )
    assert observation > 1
    assert both == pytest.approx(plain + 0.5 * observation, abs=1e-5)
    expected = {
        name: plain_gradient[name] + 0.5 * part for name, part in observation_gradient.items()
    }
    torch.testing.assert_close(both_gradient, expected, atol=1e-5, rtol=1e-3)


def test_observations_are_learned_by_role(codec: Codec) -> None:
    """SFT-3 learns all but the prompt; SFT-2's own masks stay as they were."""
    chain = sampled_chains(codec)[0]
    mask = list(chain.mask)
    (learned,) = learn_observations([chain])
    assert chain.mask == mask
    assert learned.ids == chain.ids
    assert learned.role == chain.role
    assert Role.OBSERVATION in chain.role
    for position, role in enumerate(chain.role):
        expected = 1 if role == Role.OBSERVATION else mask[position]
        assert learned.mask[position] == expected
