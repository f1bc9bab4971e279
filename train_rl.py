"""GRPO in two stages: in the environment that the policy imagines, then in the real one (paper 3.3).

    python train_rl.py                       # nano: 80 steps imagined, 16 steps real, 4 to 10 minutes on two cores
    python train_rl.py config/smollm2.py --model=.. --train_data=.. --eval_data=.. --corpus=..       # what train_sft.py was given

Each step: `questions` questions x `rollouts` trajectories; reward = exact match, less a penalty for a malformed
trajectory; advantage = reward - mean of the question's rollouts; one policy-gradient step (clipped from the second of --minibatches
on) on the tokens that the policy wrote as policy. Observations never carry loss, in both stages, although in RL-1 the policy wrote them too.

Where this departs from textbook GRPO: no division by the standard deviation (--advantage_std), the mean is over all
tokens of the step and not per trajectory, clipping is wider above than below, KL to the policy that RL begins with is
optional (--kl), and groups whose rollouts all got the same reward are skipped, since their gradient is zero; so are those in
which a search failed.

The nano path has a world for each kind of RL. RL-1 imagines the world that SFT-3 read about, and its questions start at
what the model does not know by heart: where it knows, recalling always beats a search whose result it has to make up,
and it would stop searching. RL-2 asks the tool about another world, where nothing that SFT learned by heart is of use;
each call costs a little (--call_cost).
"""
import math
import time
from pathlib import Path

import numpy as np
import autocoa
import data
import estimate
import model
import workflows
from common import Log, Problem, by_tokens, main, place, start_folder, tqdm
from live import FAILED, MISSED
from train_sft import STAGES, Checkpoint, clear, to_do


def sample(lm, questions, search, s, rng):
    """One step's experience: -> trajectories and rewards (questions, rollouts)."""
    rows = [q for q in questions for _ in range(s.rollouts)]
    done = workflows.answers(lm, rows, search, s, temperature=s.temperature, rng=rng)
    cost = 0.0 if search is autocoa.IMAGINE else s.call_cost
    rewards = [autocoa.reward(lm.codec, t, q["golden_answers"], s.format_penalty, cost) for t, q in zip(done, rows)]
    return done, np.array(rewards).reshape(len(questions), s.rollouts)


def update_batches(trajectories, advantages, reference, s):
    """Micro-batches for the loss, with old log-probs, advantages and the reference's log-probs riding along.

    trajectories: of groups that do not agree; advantages: one for each. The normalizer is the step's number of policy tokens.
    """
    norm = float(sum(sum(t.mask) for t in trajectories))
    batches = []
    for group in by_tokens([len(t.ids) for t in trajectories], s.micro_tokens):
        b = data.pad([trajectories[i] for i in group])
        b["advantage"] = np.array([[advantages[i]] for i in group], np.float32)
        if s.kl:
            b["ref"] = reference.backend.score(reference.model, b, s.temperature)
        batches.append(dict(b, clip_low=s.clip_low, clip_high=s.clip_high, beta=s.kl, norm=norm))
    return batches


def grpo(lm, reference, s, stage, steps, pool, search, seed, scale=1.0):
    """One stage of GRPO on a pool of questions. reference: the policy that KL is measured to; search: a tool, or
    autocoa.IMAGINE; seed: two numbers for what is random; scale: of the learning rate."""
    lm.adapt(s, stage)
    optimizer = lm.backend.Optimizer(lm.model, False, s.seed)
    checkpoint = Checkpoint(lm, optimizer, Path("out", s.run, stage), s)
    log = Log(checkpoint.folder, done=checkpoint.done)
    bar = tqdm(range(checkpoint.done, steps), desc=stage, unit="step", smoothing=0.1, initial=checkpoint.done, total=steps)
    for step in bar:
        t0, rng = time.time(), np.random.default_rng([*seed, step])
        questions = [pool[(step * s.questions + i) % len(pool)] for i in range(s.questions)]
        done, rewards = sample(lm, questions, search, s, rng)
        t1 = time.time()
        advantages = autocoa.group_advantages(rewards, s.advantage_std)
        failed = np.array([not {FAILED, MISSED}.isdisjoint(t.observations) for t in done]).reshape(rewards.shape).any(1)
        skipped = failed | (rewards.max(1) == rewards.min(1))           # nobody knows what a failed search would have found
        learn = np.flatnonzero(~skipped.repeat(s.rollouts))
        figures = {"loss": 0.0, "grad_norm": 0.0}
        for part in np.array_split(rng.permutation(learn), min(s.minibatches, len(learn))) if len(learn) else []:
            batches = update_batches([done[i] for i in part], advantages.ravel()[part], reference, s)
            rate = scale * min(1.0, (step + 1) / 3)
            figures = lm.backend.train_step(lm.model, optimizer, autocoa.grpo_loss, batches, s.rl_lr * rate, 0.0, s.temperature)
            if not math.isfinite(figures["loss"] + figures["grad_norm"]):
                raise Problem(f"{stage}: loss is {figures['loss']} at step {step}; the stage before is kept; lower --rl_lr")
        t2 = time.time()
        row = describe(lm.codec, done, rewards, questions, s.rollouts)
        tokens = sum(len(t.ids) for t in done)
        log.write(step=step, **figures, **row, skipped_groups=int(skipped.sum()),
                  kl=drift(lm, reference, done[::max(1, len(done) // 10)], s), tokens=tokens,
                  tokens_per_second=tokens / (t2 - t0), seconds_rollout=t1 - t0, seconds_update=t2 - t1)
        bar.set_postfix_str(f"reward {row['reward']:.3f}, {row['actions']:.2f} actions, {t2 - t0:.1f} s")
        estimate.after_two(bar, step)
        log.append("rollouts.jsonl", [workflows.trajectory_row(lm.codec, questions[0], t, r, step=step)
                                      for t, r in zip(done[:s.rollouts], rewards[0])])
        checkpoint.after(step + 1)
    checkpoint.finish()


def drift(lm, reference, some, s):
    """KL from the reference (k3), of the policy's own tokens in a few trajectories: watched even where --kl is 0."""
    total = count = 0.0
    for group in by_tokens([len(t.ids) for t in some], s.micro_tokens):
        b = data.pad([some[i] for i in group])
        b["ref"] = reference.backend.score(reference.model, b, s.temperature)
        total += float((autocoa.k3(np, lm.backend.score(lm.model, b, s.temperature), b) * b["mask"]).sum())
        count += float(b["mask"].sum())
    return total / count


def describe(codec, done, rewards, questions, rollouts):
    """What one step looked like, for the log."""
    policy = np.concatenate([np.array(t.logprobs)[np.array(t.mask) > 0] for t in done])
    golden = [q["golden_answers"] for q in questions for _ in range(rollouts)]
    return {"reward": float(rewards.mean()), "em": float(np.mean([autocoa.exact_match(codec.answer(t), g) for t, g in zip(done, golden)])),
            "entropy": float(-policy.mean()),       # of the sampled tokens: an estimate without bias
            "length": float(np.mean([len(t.ids) for t in done])), "policy_tokens": float(np.mean([sum(t.mask) for t in done])),
            "actions": float(np.mean([len(t.queries) for t in done])), "forced": float(np.mean([t.forced for t in done])),
            "malformed": float(np.mean([not codec.well_formed(t) for t in done]))}


def run(s):
    if s.stage not in ("", "rl1", "rl2"):
        raise Problem(f"--stage: {s.stage!r} is not rl1 or rl2")
    if s.out and not s.stage:
        raise Problem("--out: it goes with one stage; say which with --stage")
    root, task = Path("out", s.run), data.load_task(s)
    start = s.start or ("rl1" if s.stage == "rl2" else "sft3")
    todo = to_do(s, ["rl1", "rl2"], start)
    if s.stage:
        todo = [s.stage] if to_do(s, [s.out or s.stage], start) else []
    if not todo:
        return print(f"{s.out or s.stage or 'both stages'}: in {root} already")
    reference = model.load(start_folder(root, start, [*STAGES, "rl1"]), **place(s))
    reference.adapt(s, todo[0])             # before it is copied, so that policy and reference share a base that only carries adapters
    going_on = todo == ["rl2"] and not s.stage              # --resume, and RL-1 is done
    # a separate adapter shares the reference's base; merged weights have to be loaded
    lm = model.load(root / "rl1", **place(s)) if going_on and s.lora_merge else reference.copy()
    if going_on and not s.lora_merge:
        lm.resume(root / "rl1")
    if not estimate.show(lm, s, "rl"):
        return
    clear(s, [s.out] if s.out else todo, "rl1" if going_on else start)
    if "rl1" in todo:       # the policy is its own search engine
        grpo(lm, reference, s, s.out or "rl1", s.rl1_steps, task.train(s.rl_questions, "rl1", p_head=0.0),
             autocoa.IMAGINE, (s.seed, 1), s.rl1_scale)
    if "rl2" in todo:       # the tool answers
        grpo(lm, reference, s, s.out or "rl2", s.rl2_steps, task.train(s.rl_questions, "rl2"), task.rl_search, (s.seed, 2))
        print(task.rl_search.report())


if __name__ == "__main__":
    main(run, __doc__)
