"""GRPO's step (train_rl.py): which trajectories it learns from, with which numbers, and that learning goes the right way."""
import json
import types

import numpy as np
import pytest
from conftest import tiny

import autocoa
import data
import live
import model_torch
import tools
import train_rl
import train_sft
from common import Problem, Settings

PARTS = [("think", "Hm"), ("search", "Silver River"), ("result", "It was directed by Eva Moss.")]


def sampled(codec, lm, answers, question="Who directed it?"):
    """Trajectories as if they had been sampled from this network at temperature 1."""
    out = []
    for answer in answers:
        t = codec.build(question, PARTS + [("answer", answer)])
        t.logprobs = model_torch.score(lm.model, data.pad([t]))[0].tolist()
        out.append(t)
    return out


def test_reward_and_order_of_a_step(codec, lm, monkeypatch):
    """rollouts of a question stand together, row by row; each is scored by its own question's answers."""
    questions = [{"question": "Who directed it?", "golden_answers": ["Eva"]}, {"question": "Who starred in it?", "golden_answers": ["Ada"]}]
    asked = []

    def answers(lm, rows, search, s, **sampling):
        asked.extend(q["question"] for q in rows)
        return [codec.build(q["question"], [("answer", a)]) for q, a in zip(rows, ("Eva", "Ada", "Eva", "Ada", "Ada", "Eva"))]
    monkeypatch.setattr(train_rl.workflows, "answers", answers)
    done, rewards = train_rl.sample(lm, questions, None, Settings(rollouts=3), None)
    assert asked == ["Who directed it?"] * 3 + ["Who starred in it?"] * 3
    assert rewards.tolist() == [[1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("settings, steps, begins", [({}, ("rl1", "rl2"), ["sft3"]), ({"stage": "rl2"}, ("rl2",), ["rl1"]),
                                                     ({"stage": "rl2", "start": "sft2"}, ("rl2",), ["sft2"]), ({"start": "sft2"}, ("rl1", "rl2"), ["sft2"]),
                                                     ({"resume": True}, ("rl2",), ["sft3", "rl1"]), ({"start": "sft2", "resume": True}, ("rl2",), ["sft2", "rl1"])])
def test_the_two_environments(monkeypatch, tmp_path, settings, steps, begins):
    """RL-1 imagines its observations and asks nothing that starts at a known entity; RL-2 has the tool, on a pool of its own. The adapter is made
    before the reference is copied (guards: a second base in memory, which the estimate does not count). The reference is what the command begins with;
    --resume behind RL-1 goes on from that, with the same reference."""
    monkeypatch.chdir(tmp_path)
    for stage in ("sft2", "sft3", "rl1"):
        (tmp_path / "out/nano" / stage).mkdir(parents=True)
        (tmp_path / "out/nano" / stage / "config.json").write_text("{}")
    if settings == {"start": "sft2"}:
        (tmp_path / "out/nano/rl1/config.json").unlink()
    calls, made, loaded = [], [], []
    the_tool = tools.Library({})
    task = types.SimpleNamespace(train=lambda n, pool, p_head=0.1: (n, pool, p_head), rl_search=the_tool)
    monkeypatch.setattr(train_rl.data, "load_task", lambda s: task)
    policy = types.SimpleNamespace(resume=lambda folder: loaded.append(folder.name))
    reference = types.SimpleNamespace(adapt=lambda *a: made.append("adapter"), copy=lambda: made.append("copy") or policy)
    monkeypatch.setattr(train_rl.model, "load", lambda folder, **k: loaded.append(folder.name) or reference)
    monkeypatch.setattr(train_rl, "grpo", lambda lm, to, s, stage, steps, pool, search, rng, scale=1.0: calls.append((lm, to, stage, steps, pool, search, scale)))
    monkeypatch.setattr(train_rl.estimate, "show", lambda *a: True)
    train_rl.run(Settings(rl1_steps=3, rl2_steps=2, questions=4, rl_questions=10, **settings))
    assert calls == [c for c in [(policy, reference, "rl1", 3, (10, "rl1", 0.0), autocoa.IMAGINE, Settings.rl1_scale),
                                 (policy, reference, "rl2", 2, (10, "rl2", 0.1), the_tool, 1.0)] if c[2] in steps]
    assert made == ["adapter", "copy"] and loaded == begins


def test_groups_that_agree_are_skipped_and_counted(codec, tmp_path, monkeypatch):
    """Of three questions, one has rollouts that differ: the step learns from these alone, and the log counts the others."""
    monkeypatch.chdir(tmp_path)
    lm = tiny(codec)
    done = sampled(codec, lm, ["Eva", "Eva", "Eva", "Ada", "Ada", "Ada"])
    rewards = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    monkeypatch.setattr(train_rl, "sample", lambda *a: (done, rewards))
    learned = []
    update = train_rl.update_batches
    monkeypatch.setattr(train_rl, "update_batches", lambda ts, adv, ref, s: learned.append((ts, adv)) or update(ts, adv, ref, s))
    pool = [{"question": "Who directed it?", "golden_answers": ["Eva"]}] * 3
    train_rl.grpo(lm, lm.copy(), Settings(questions=3, rollouts=2, temperature=1.0), "rl1", 1, pool, None, (0, 1))
    (ts, advantages), = learned
    assert {(id(t), a) for t, a in zip(ts, advantages)} == {(id(done[2]), 0.5), (id(done[3]), -0.5)}
    row, = map(json.loads, open("out/nano/rl1/log.jsonl"))
    assert row["skipped_groups"] == 2 and row["reward"] == 0.5 and row["em"] == 0.5
    assert row["kl"] > 0                # to the policy at the start, which must not move along
    assert row["malformed"] == 0 and row["actions"] == 1 and row["length"] == np.mean([len(t.ids) for t in done])
    first = [json.loads(x) for x in open("out/nano/rl1/rollouts.jsonl")]
    assert [r["ids"] for r in first] == [t.ids for t in done[:2]] and first[0]["reward"] == 1


def test_a_group_with_a_failed_search_is_skipped(codec, tmp_path, monkeypatch):
    """What is rewarded behind a search that failed says nothing of the policy."""
    monkeypatch.chdir(tmp_path)
    lm = tiny(codec)
    done = sampled(codec, lm, ["Eva", "Ada", "Eva", "Ada"])
    done[0].observations[0] = live.FAILED
    monkeypatch.setattr(train_rl, "sample", lambda *a: (done, np.array([[1.0, 0.0], [1.0, 0.0]])))
    learned, update = [], train_rl.update_batches
    monkeypatch.setattr(train_rl, "update_batches", lambda ts, adv, ref, s: learned.extend(ts) or update(ts, adv, ref, s))
    pool = [{"question": "Who directed it?", "golden_answers": ["Eva"]}] * 2
    train_rl.grpo(lm, lm.copy(), Settings(questions=2, rollouts=2, temperature=1.0), "rl2", 1, pool, None, (0, 2))
    assert {id(t) for t in learned} == {id(done[2]), id(done[3])}
    assert json.loads(open("out/nano/rl2/log.jsonl").readline())["skipped_groups"] == 1


def test_a_step_without_a_difference_changes_nothing(codec, tmp_path, monkeypatch):
    """All groups agree: no update, not even by the optimizer's momentum."""
    monkeypatch.chdir(tmp_path)
    lm = tiny(codec)
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    monkeypatch.setattr(train_rl, "sample", lambda *a: (sampled(codec, lm, ["Eva", "Ada"]), np.ones((1, 2))))
    train_rl.grpo(lm, lm.copy(), Settings(questions=1, rollouts=2), "rl1", 3, [{"question": "Who?", "golden_answers": ["Eva"]}], None, (0, 1))
    assert all((p == before[n]).all() for n, p in lm.model.named_parameters())


def test_a_bad_loss_stops_rl(codec, tmp_path, monkeypatch):
    """NaN log-probs: the stage ends with an error that names the step, and its folder is not made."""
    monkeypatch.chdir(tmp_path)
    lm = tiny(codec)
    done = sampled(codec, lm, ["Eva", "Ada"])
    done[0].logprobs = [float("nan")] * len(done[0].ids)
    monkeypatch.setattr(train_rl, "sample", lambda *a: (done, np.array([[1.0, 0.0]])))
    with pytest.raises(Problem, match="rl2: loss is nan at step 0"):
        train_rl.grpo(lm, lm.copy(), Settings(questions=1, rollouts=2), "rl2", 1, [{"question": "Who?", "golden_answers": ["Eva"]}], None, (0, 1))
    assert not (tmp_path / "out" / "nano" / "rl2").exists()


def test_batches_carry_each_row_its_own(codec, lm):
    """Sorted by length into micro-batches, each row keeps its old log-probs, advantage and reference; one normalizer for all."""
    ts = sampled(codec, lm, ["Eva " * n for n in (9, 1, 5, 3, 7, 2)])
    advantages = np.arange(6) / 10
    reference = types.SimpleNamespace(backend=model_torch, model=lm.model)
    batches = train_rl.update_batches(ts, advantages, reference, Settings(micro_tokens=70, kl=0.1, temperature=1.0))
    assert len(batches) > 2
    seen = 0
    for b in batches:
        assert b["norm"] == sum(sum(t.mask) for t in ts) and b["beta"] == 0.1
        for ids, mask, old, ref, (advantage,) in zip(b["ids"], b["mask"], b["old"], b["ref"], b["advantage"]):
            t = ts[round(10 * advantage)]
            n = len(t.ids)
            seen += 1
            assert ids[:n].tolist() == t.ids and mask[:n].tolist() == t.mask and not mask[n:].any()
            np.testing.assert_allclose(old[:n], t.logprobs, atol=1e-5)
            np.testing.assert_allclose(ref[:n], np.array(t.logprobs) * t.mask, atol=1e-4)
    assert seen == 6


def logprob(lm, t):
    return model_torch.score(lm.model, data.pad([t]))[0].sum()


def test_grpo_learns_the_right_way(codec):
    """A few steps on one group: the rewarded answer becomes more likely, the other less; KL to the start grows from 0."""
    lm = tiny(codec)
    good, bad = sampled(codec, lm, ["Eva Moss", "Ada Falk"])
    start, before = lm.copy(), (logprob(lm, good), logprob(lm, bad))
    s = Settings(temperature=1.0, kl=0.0)
    assert train_rl.drift(lm, start, [good, bad], s) == pytest.approx(0, abs=1e-6)
    optimizer = model_torch.Optimizer(lm.model)
    for _ in range(5):
        model_torch.train_step(lm.model, optimizer, autocoa.grpo_loss, train_rl.update_batches([good, bad], np.array([0.5, -0.5]), None, s), 1e-3, 2e-3)
    assert logprob(lm, good) > before[0] + 0.1 and logprob(lm, bad) < before[1] - 0.1
    assert train_rl.drift(lm, start, [good, bad], s) > 1e-4


def test_contrastive_learns_the_right_way(codec):
    """SFT-1 on one pair: the gap between chosen and rejected grows, and the chosen side does not fall with it."""
    lm = tiny(codec)
    prefix = [("think", "director of it?")]
    chosen, rejected = codec.build("Who?", prefix + [("search", "it")]), codec.build("Who?", prefix + [("think", "I recall Ada Falk.")])
    shared = len(codec.build("Who?", prefix).ids)
    for t in (chosen, rejected):
        t.mask[:shared] = [0] * shared
    before = logprob(lm, chosen), logprob(lm, rejected)
    optimizer = model_torch.Optimizer(lm.model)
    for _ in range(5):
        model_torch.train_step(lm.model, optimizer, autocoa.contrastive_loss, train_sft.pair_batches([(chosen, rejected)], 1000, 0.2), 1e-3, 2e-3)
    after = logprob(lm, chosen), logprob(lm, rejected)
    assert after[0] > before[0] + 0.1 and after[0] - after[1] > before[0] - before[1] + 0.5
