"""The losses (autocoa.py) against slow loops over plain floats, their gradients, and what reaches the weights."""
import math
import random

import numpy as np
import pytest
import torch
from conftest import tiny, twin

import autocoa
import model_torch
import train_rl
import train_sft
from autocoa import OBSERVATION, Trajectory
from common import Settings


# ---- slow and obviously right: one token at a time ------------------------------------------------------------------
def slow_nll(logp, b):
    total = 0.0
    for row, mask in zip(logp, b["mask"]):
        for lp, m in zip(row, mask):
            if m:
                total += -lp
    return total / b["norm"]


def slow_contrastive(logp, b):
    def mean_logprob(i):
        picked = [lp for lp, m in zip(logp[i], b["mask"][i]) if m]
        return sum(picked) / len(picked)
    n, total = len(logp) // 2, 0.0
    for i in range(n):
        chosen, rejected = mean_logprob(i), mean_logprob(n + i)
        total += -math.log(1 / (1 + math.exp(-(chosen - rejected)))) - b["alpha"] * chosen
    return total / b["norm"]


def slow_grpo(logp, b):
    total = 0.0
    for i in range(len(logp)):
        advantage = b["advantage"][i][0]
        for t in range(len(logp[i])):
            if not b["mask"][i][t]:
                continue
            ratio = math.exp(logp[i][t] - b["old"][i][t])
            low, high = 1 - b["clip_low"], 1 + b["clip_high"]
            clipped = low if ratio < low else high if ratio > high else ratio
            total += -min(ratio * advantage, clipped * advantage)
            if b["beta"]:
                p_ref, p = math.exp(b["ref"][i][t]), math.exp(logp[i][t])
                total += b["beta"] * (p_ref / p - math.log(p_ref / p) - 1)
    return total / b["norm"]


def example(name):
    """Random log-probs of 4 rows x 7 tokens in float64; ratios of new to old from 0.4 to 2.5, advantages of both signs."""
    rng = np.random.default_rng(7)
    logp = -rng.uniform(0.1, 3.0, (4, 7))
    mask = (rng.random((4, 7)) < 0.6).astype(float)
    mask[:, 0], mask[:, -1] = 0, 1
    b = {"mask": mask, "norm": 11.0}
    if name == "contrastive":
        b |= {"alpha": 0.2}
    if name.startswith("grpo"):
        b |= {"old": logp + rng.uniform(-0.9, 0.9, logp.shape), "advantage": np.array([[0.8], [-0.6], [0.0], [-0.2]]), "clip_low": 0.2,
              "clip_high": 0.28, "beta": 0.5 if name == "grpo with KL" else 0.0, "ref": logp + rng.uniform(-0.5, 0.5, logp.shape)}
    return logp, b


LOSSES = {"nll": (autocoa.nll_loss, slow_nll), "contrastive": (autocoa.contrastive_loss, slow_contrastive),
          "grpo": (autocoa.grpo_loss, slow_grpo), "grpo with KL": (autocoa.grpo_loss, slow_grpo)}


def to_torch(b):
    return {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in b.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_value(name):
    """NumPy and torch give what the loops give."""
    loss, slow = LOSSES[name]
    logp, b = example(name)
    assert loss(np, logp, b) == pytest.approx(slow(logp.tolist(), b), abs=1e-9)
    assert loss(torch, torch.as_tensor(logp), to_torch(b)).item() == pytest.approx(slow(logp.tolist(), b), abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name):
    """Torch's gradient, by token, equals central differences of the loops; 0 where the mask is 0. Guards: a token of the
    environment that carries loss, and clipping on the wrong side of an advantage."""
    loss, slow = LOSSES[name]
    logp, b = example(name)
    x = torch.tensor(logp, requires_grad=True)
    loss(torch, x, to_torch(b)).backward()
    for i, t in np.ndindex(logp.shape):
        up, down = logp.copy(), logp.copy()
        up[i, t] += 1e-6
        down[i, t] -= 1e-6
        assert x.grad[i, t].item() == pytest.approx((slow(up.tolist(), b) - slow(down.tolist(), b)) / 2e-6, abs=1e-6)
    assert not x.grad[torch.as_tensor(b["mask"]) == 0].any()


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.5, 1, 0), (1.27, 1, -1.27), (0.5, 1, -0.5),          # more likely already: stop at 1.28; less likely: always pull up
    (0.5, -1, 0), (0.81, -1, 0.81), (1.5, -1, 1.5)])        # less likely already: stop at 0.8; more likely: always push down
def test_clipping_by_hand(ratio, advantage, slope):
    """One token: d loss / d logp is -ratio x advantage where the policy may still move that way, else 0. The high side is wider."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True, dtype=torch.float64)
    b = {"mask": np.ones((1, 1)), "old": np.zeros((1, 1)), "advantage": np.array([[float(advantage)]]), "clip_low": 0.2, "clip_high": 0.28, "beta": 0.0, "norm": 1.0}
    autocoa.grpo_loss(torch, logp, to_torch(b)).backward()
    assert logp.grad.item() == pytest.approx(slope)


def test_k3_is_an_estimate_of_the_divergence():
    """Drawn from the policy, k3's mean is KL(policy || reference) of the whole distribution, and no sample is negative."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    tokens = rng.choice(5, 200_000, p=p)
    estimate = autocoa.k3(np, np.log(p)[tokens], {"ref": np.log(q)[tokens], "mask": np.ones(len(tokens))})
    assert estimate.min() >= 0
    assert estimate.mean() == pytest.approx((p * np.log(p / q)).sum(), rel=0.02)


# ---- what reaches the weights ---------------------------------------------------------------------------------------
class Keep:
    """In place of an optimizer: leaves the weights, so that the gradient can be read."""

    def step(self, grads, lr, muon_lr):
        pass


def gradient(network, loss_fn, batches):
    figures = model_torch.train_step(network, Keep(), loss_fn, batches, 0, 0, max_norm=math.inf)
    return figures["loss"], {n: p.grad.clone() for n, p in network.named_parameters()}


def chains(codec):
    """Six chains of several lengths, with an observation each, and as if they had been sampled."""
    rng, out = random.Random(3), []
    for n in (1, 9, 2, 7, 3, 12):
        t = codec.build("Who directed it?", [("think", "Hm"), ("search", "Silver River"), ("result", "a film of " + "Eva Moss " * n), ("answer", "Ada Falk")])
        t.logprobs = [-rng.uniform(0, 3) * m for m in t.mask]
        out.append(t)
    return out


def batches_of(name, ts, micro_tokens):
    """The scripts' own micro-batches for each loss."""
    if name == "nll":
        return train_sft.language_batches(ts, micro_tokens)
    if name == "contrastive":
        return train_sft.pair_batches(list(zip(ts[0::2], ts[1::2])), micro_tokens, alpha=0.2)
    s = Settings(micro_tokens=micro_tokens, temperature=1.0, kl=0.0, clip_low=5.0, clip_high=5.0)
    return train_rl.update_batches(ts, np.array([0.5, -0.5, 0.25, -0.25, 1.0, -1.0]), None, s)


SCRIPT_LOSSES = {"nll": autocoa.nll_loss, "contrastive": autocoa.contrastive_loss, "grpo": autocoa.grpo_loss}


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_each_loss_moves_each_parameter(codec, name, arch, muon):
    """Guards: a loss that does not reach some weight, and a weight that the optimizer leaves out."""
    lm = tiny(codec, arch=arch, tie=arch == "LlamaForCausalLM", spread=0.1)
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    figures = model_torch.train_step(lm.model, model_torch.Optimizer(lm.model, muon=muon), SCRIPT_LOSSES[name], batches_of(name, chains(codec), 500), 1e-3, 1e-2)
    assert math.isfinite(figures["loss"]) and figures["grad_norm"] > 0
    assert [n for n, p in lm.model.named_parameters() if not p.grad.any() or torch.equal(p, before[n])] == []


@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_micro_batches_add_up(codec, lm, name):
    """Loss and gradient of a step do not depend on how it is cut. Guards: a normalizer of the micro-batch."""
    ts = chains(codec)
    one, many = batches_of(name, ts, 10 ** 6), batches_of(name, ts, 60)
    assert len(many) > max(2, len(one))
    (loss1, grad1), (loss2, grad2) = gradient(lm.model, SCRIPT_LOSSES[name], one), gradient(lm.model, SCRIPT_LOSSES[name], many)
    assert loss1 == pytest.approx(loss2, abs=1e-5)
    for n in grad1:
        torch.testing.assert_close(grad1[n], grad2[n], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_gradient_is_the_slope_of_the_loss(codec, name):
    """Along its own gradient the loss of the whole network rises as fast as the gradient is long. Guards: a detached path."""
    lm = tiny(codec, spread=0.1)
    batches = batches_of(name, chains(codec), 500)
    _, grad = gradient(lm.model, SCRIPT_LOSSES[name], batches)
    length = math.sqrt(sum(g.square().sum().item() for g in grad.values()))

    def moved(step):
        double = model_torch.copy(lm.model)
        with torch.no_grad():
            for n, p in double.named_parameters():
                p.add_(grad[n], alpha=step / length)
        return gradient(double, SCRIPT_LOSSES[name], batches)[0]
    assert (moved(0.003) - moved(-0.003)) / 0.006 == pytest.approx(length, rel=0.02)


def ends_in_observation(codec, text):
    t = codec.build("Who directed it?", [("think", "Hm"), ("search", "Silver River"), ("result", text)])
    t.logprobs = [-0.5 * m for m in t.mask]
    return t


@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_observations_carry_no_loss(codec, lm, name):
    """A trajectory that ends in an observation: nothing follows that it could be context of, so other tokens in it change
    nothing. Unmasked, as in SFT-3, they do."""
    def step(text, view=lambda ts: ts):
        return gradient(lm.model, SCRIPT_LOSSES[name], batches_of(name, view([ends_in_observation(codec, text)] * 6), 10 ** 6))
    (loss1, grad1), (loss2, grad2) = step("Eva Moss is a star"), step("Ada Falk was the director")
    assert loss1 == loss2
    for n in grad1:
        torch.testing.assert_close(grad1[n], grad2[n], atol=0, rtol=0)
    if name == "nll":
        assert step("Eva Moss is a star", train_sft.unmask)[0] != pytest.approx(step("Ada Falk was the director", train_sft.unmask)[0], abs=1e-3)


def test_unmask_by_role(codec):
    """SFT-3 learns all but the prompt; SFT-2's own masks stay as they were."""
    t, = chains(codec)[:1]
    mask = list(t.mask)
    wide, = train_sft.unmask([t])
    assert t.mask == mask and wide.ids == t.ids and wide.role == t.role
    assert [m for m, r in zip(wide.mask, t.role) if r == OBSERVATION] == [1] * t.role.count(OBSERVATION)
    assert [m for m, r in zip(wide.mask, t.role) if r != OBSERVATION] == [m for m, r in zip(mask, t.role) if r != OBSERVATION]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_padding_carries_no_loss(codec, lm, backend):
    """A short row beside a long one has the log-probs that it has alone; its padding has none. (Rows are padded on the right; nothing here needs it on the left.)"""
    pytest.importorskip(backend)
    lm = lm if backend == "torch" else twin(lm)
    short, long = Trajectory([1, 5, 6, 7], [0, 1, 1, 1], [0, 1, 1, 1]), chains(codec)[-1]
    alone, beside = (lm.backend.score(lm.model, train_sft.data.pad(ts)) for ts in ([short], [short, long]))
    np.testing.assert_allclose(beside[0, :4], alone[0], atol=1e-5)
    assert not beside[0, 4:].any() and not beside[:, 0].any()
