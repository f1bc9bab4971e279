"""GRPO in two stages (paper 3.3): practice in an imagined environment, then in the real one.

    python train_rl.py                          # nano: 4 to 10 minutes on two cores
    python train_rl.py config/smollm2.py --model=.. --train_data=.. --eval_data=.. --corpus=..
    python train_rl.py --stage=rl2 --sweep="call_cost=0,0.1;kl=0,0.001"        # a grid, tabulated

Each step: some questions, some rollouts of each; the reward is exact match, less a penalty for a
malformed trajectory and a little for each call; the advantage is the reward less the mean of the
question's rollouts; then one policy-gradient step on the tokens that the policy wrote as policy.
Observations never carry that loss, also where the policy wrote them itself.

Who writes the observations is one setting a stage (environments/environment.py): the policy itself
(`internal`, the paper's RL-1), a separate network that imitates the tool (`distilled`, the default
of RL-1), the tool (`real`), or both (`mixed`). A stage logs how many searches the tool answered.

A stage looks out for what goes wrong before its reward falls (common/alarms.py). --stop_on_alarm
ends it there, with the weights that did best on held-out questions of its pool.

Where this departs from textbook GRPO: advantages are not divided by their standard deviation
(--advantage_std does it); the loss is DAPO's mean over all tokens of a step, not over those of each
trajectory first (--loss); clipping is wider above than below; KL to the policy that RL begins with
is optional (--kl); and groups whose rollouts all got the same reward are skipped, since their
gradient is zero. So are those in which a search failed.

The nano path has a world for SFT and another for RL-2, where nothing that SFT learned by heart is
of use. RL-1 asks RL-2's questions too, and RL-2 goes on behind them. Only a policy that imagines
may do better with the questions of SFT's world (--rl1_pool=rl1): it is the one it has read about.
Those begin at what the model does not know by heart: where it knows, recalling always beats a
search whose result it has to make up, and it would stop searching.
"""

# First, so that Ctrl-C is one line from here on.
from common.errors import UserError, resume_command

# isort: split
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocoa import (
    Search,
    group_advantages,
    grpo_loss,
    k3,
    nll_loss,
    random_stream,
    reward,
    sequence_loss,
)
from common import memory, runs
from common.alarms import alarms
from common.batching import fill_by_tokens, own_micro_batches
from common.runs import StageRun
from common.settings import (
    AboveZero,
    AboveZeroFloat,
    LossName,
    RewardName,
    StageSettings,
    main,
)
from data.batches import (
    Batch,
    build_trie,
    count_nodes,
    pack,
    pack_texts,
    real_observation_mask,
)
from data.questions import Question
from data.scores import exact_match, f1, overlap_match
from data.trajectory import Codec, Trajectory
from environments.choice import (
    EnvironmentSettings,
    open_environment,
    pool_name,
    prepare_environments,
)
from environments.environment import Environment
from environments.fidelity import known_share
from model import LM
from tasks import Task, open_task
from workflows.agent import answer_questions, trajectory_row

WARMUP_STEPS = 3  # steps over which the learning rate rises
EVAL_QUESTIONS = 60  # evaluation questions of each set that --eval_every looks at
WATCHED = 10  # rollouts of a step whose log-probs are watched, at most; a tenth of a small step
HELD_OUT_EVERY = 6  # steps between two looks of --stop_on_alarm at held-out questions
SCORES = {"exact_match": exact_match, "f1": f1, "overlap": overlap_match}  # by --reward


# ---- 1. Settings ---------------------------------------------------------------------------------
@dataclass(kw_only=True)
class RLSettings(StageSettings, EnvironmentSettings):
    """The settings of train_rl.py; steps, questions and rollouts are the authors'."""

    # Questions of a step.
    questions: AboveZero = 48
    # Rollouts of a question.
    rollouts: AboveZero = 5
    # Temperature of sampling; log-probs in the loss are at the same temperature.
    temperature: AboveZeroFloat = 1.0
    # Learning rate of AdamW, for all weights: Muon would lift the noise of a policy gradient to
    # the size of its signal.
    rl_lr: float = 3e-4
    # RL-1 trains at this part of the rate; at the whole, a policy in an imagined world drifts.
    rl1_scale: float = 0.5
    # Optimizer steps that a batch of rollouts is cut into.
    minibatches: AboveZero = 1
    # What the policy gradient is a mean over: dapo (all tokens of a step), grpo (the tokens of each
    # rollout, then rollouts), dr_grpo (as many tokens as rollouts could have), gspo (rollouts,
    # each clipped as a whole), reinforce (rollouts, with the mean of the others as baseline, never
    # clipped).
    loss: LossName = "dapo"
    # The ratio of new to old probability is clipped below 1 - clip_low ..
    clip_low: float = 0.2
    # .. and above 1 + clip_high.
    clip_high: float = 0.28
    # Weight of the KL penalty (k3) to the policy that this command begins with.
    kl: float = 0.0
    # Divide advantages by the group's standard deviation, as the authors' code does.
    advantage_std: bool = False
    # What an answer earns: exact_match (the paper's), f1 (of words), overlap (the authors' code: an
    # exact match or 70% of the words).
    reward: RewardName = "exact_match"
    # Taken off the reward of a malformed trajectory.
    format_penalty: float = 0.5
    # Taken off the reward for each call in RL-2. 0.25 keeps it from searching for what it knows, at
    # a price in exact match.
    call_cost: float = 0.1
    # Taken off the reward for each call in RL-1.
    rl1_call_cost: float = 0.1
    # Weight of the next-token loss on what the real tool said (ECHO): the policy stays a model of
    # its world while it learns to act. 0: observations teach nothing.
    observation_coef: float = 0.0
    # Steps between two looks at evaluation questions, whose exact match is logged; 0: none. Nothing
    # is chosen by it.
    eval_every: int = 0
    # End a stage when an alarm rings, with the weights that did best on held-out questions of its
    # pool; they are asked every 6 steps. No stage is begun behind it.
    stop_on_alarm: bool = False
    # Settings and the values to try, such as "call_cost=0,0.1;kl=0,0.001": each combination is
    # trained into a folder of its own and evaluated, and a table compares them.
    sweep: str = ""


# ---- 2. The stages -------------------------------------------------------------------------------
@dataclass
class RLStage:
    """All in which the two stages differ."""

    folder: Path
    steps: int
    pool: list[Question]  # questions, taken in turn
    first_question: int  # where in the pool its first step begins
    environment: Environment
    call_cost: float  # taken off the reward for each call
    rate_scale: float  # of the learning rate
    seed_number: int  # (run's seed, this, step) is the seed of what a step draws
    evaluation: list[Question]  # what --eval_every looks at
    eval_search: Search
    held_out: list[Question]  # what --stop_on_alarm chooses weights by; empty without it


def run(settings: RLSettings) -> None:
    """Train RL-1 and RL-2, or those that the command asks for."""
    if settings.sweep:
        # Here, since it loads train_sft.py and eval.py.
        from evaluation.sweep import sweep

        sweep(settings.sweep, settings, run)
        return
    if settings.rollouts < 2:
        raise UserError("--rollouts: one rollout has no other to be compared with; take 2 or more")
    plan = runs.plan_rl(settings)
    if not plan.todo:
        return
    runs.settle_by_device(settings)
    task = open_task(settings)
    reference, policy = plan.load_reference_and_policy(settings)
    task.leave_out_long_questions(policy.codec, settings.longest_prompt)
    held_out = {stage: held_out_questions(task, stage, settings) for stage in plan.todo}
    # --dry-run times a step by the simplest loss.
    if not memory.report(policy, settings, "rl", nll_loss):
        return
    prepare_environments(plan.todo, settings, task)
    plan.prepare_folders(settings)

    evaluation = [
        question
        for questions in task.evaluation.values()
        for question in questions[:EVAL_QUESTIONS]
    ]
    if "rl1" in plan.todo:
        first = RLStage(
            folder=plan.folder_of("rl1"),
            steps=settings.rl1_steps,
            pool=task.questions(settings.rl1_pool, settings.rl_questions),
            first_question=0,
            environment=open_environment("rl1", settings, task, policy.codec, held_out["rl1"]),
            call_cost=settings.rl1_call_cost,
            rate_scale=settings.rl1_scale,
            seed_number=1,
            evaluation=evaluation,
            eval_search=task.eval_search,
            held_out=held_out["rl1"],
        )
        is_stopped = train_grpo(policy, reference, settings, first)
        if is_stopped and "rl2" in plan.todo:
            print(f"rl2 was not begun; go on with: {resume_command()}")
            return
    if "rl2" in plan.todo:
        asked_before = 0
        if settings.rl1_pool == "rl2":
            asked_before = settings.rl1_steps * settings.questions
        second = RLStage(
            folder=plan.folder_of("rl2"),
            steps=settings.rl2_steps,
            pool=task.questions("rl2", settings.rl_questions),
            first_question=asked_before,
            environment=open_environment("rl2", settings, task, policy.codec, held_out["rl2"]),
            call_cost=settings.call_cost,
            rate_scale=1.0,
            seed_number=2,
            evaluation=evaluation,
            eval_search=task.eval_search,
            held_out=held_out["rl2"],
        )
        train_grpo(policy, reference, settings, second)


def train_grpo(policy: LM, reference: LM, settings: RLSettings, stage: RLStage) -> bool:
    """Train one stage of GRPO, and return whether an alarm has stopped it (--stop_on_alarm).

    reference: the policy to which KL is measured.
    Raises UserError where the loss is not finite, before the weights change.
    """
    policy.begin_stage(settings, settings.seed, stage.folder.name)
    optimizer = policy.backend.Optimizer(policy.network, muon=False, seed=settings.seed)
    progress = StageRun(policy, optimizer, stage.folder, settings, stage.steps)
    environment = stage.environment
    environment.tool.restore(progress.log_files.calls)
    for step in progress.steps():
        held_out = look_at_held_out(policy, settings, stage, progress, step)
        environment.begin_step(step)
        started = time.time()

        # 1. Rollouts: several trajectories of each question, and what they are worth.
        batch = sample_rollouts(policy, settings, stage, step)
        sampled = time.time()
        watched = watched_rollouts(batch)
        before = policy_logprobs(policy, watched.trajectories, settings)

        # 2. Update, by what the groups can teach.
        skipped = groups_to_skip(batch)
        figures = update_policy(policy, optimizer, reference, batch, skipped, settings, stage, step)
        updated = time.time()

        # 3. Log: what the step looked like, and its first group to read.
        row = describe_step(policy.codec, batch)
        row |= describe_change(policy, reference, watched, before, settings)
        refuse_divergence(row, stage, step)
        searches = [
            search
            for trajectory in batch.trajectories
            for search in zip(trajectory.queries, trajectory.observations, strict=False)
        ]
        row["known_exact"] = known_share(searches, environment.known_answers)
        if settings.eval_every and (step + 1) % settings.eval_every == 0:
            row["eval_em"] = evaluate(policy, stage, settings)
        tokens = sum(len(trajectory.ids) for trajectory in batch.trajectories)
        steps_before = progress.log_files.steps
        row["idle_steps"] = count_idle_steps(steps_before, skipped)
        summary = f"reward {row['reward']:.3f}, {row['actions']:.2f} actions"
        if row["idle_steps"]:
            summary += f", no group to learn from for {row['idle_steps']} steps"
        rung = alarms([*steps_before, {**figures, **row}], settings.max_actions)
        progress.warn(rung)
        progress.log(
            f"{summary}, {updated - started:.1f} s",
            step=step,
            **figures,
            **row,
            alarms=list(rung),
            skipped_groups=int(skipped.sum()),
            shared_tokens=share_of_tokens(batch),
            real_calls=environment.tool.raw_calls,
            distinct_calls=environment.tool.distinct_calls,
            tokens=tokens,
            tokens_per_second=tokens / (updated - started),
            seconds_rollout=sampled - started,
            seconds_update=updated - sampled,
            **held_out,
        )
        progress.keep_rollouts(rows_of_first_group(policy.codec, batch, step))
        progress.keep_calls(environment.tool.take_rows())
        if rung and settings.stop_on_alarm:
            progress.stop_with_best(step, rung)
    progress.finish()
    print(
        f"{stage.folder.name}: {environment.tool.raw_calls:,} searches were answered by the tool, "
        f"{environment.tool.distinct_calls:,} different ones"
    )
    return progress.is_stopped


# ---- 3. Rollouts ---------------------------------------------------------------------------------
@dataclass
class RolloutBatch:
    """The experience of one step: rollouts of one question stand together."""

    questions: list[Question]
    trajectories: list[Trajectory]  # questions x rollouts
    rewards: np.ndarray  # (questions, rollouts)


def sample_rollouts(policy: LM, settings: RLSettings, stage: RLStage, step: int) -> RolloutBatch:
    """Roll out some questions of the pool, several times each, and reward the trajectories.

    Each rollout has random numbers of its own, so that what it becomes does not depend on which
    others are decoded beside it.
    """
    first = stage.first_question + step * settings.questions
    questions = [stage.pool[(first + i) % len(stage.pool)] for i in range(settings.questions)]
    repeated = repeat_questions(questions, settings.rollouts)
    texts = [question.question for question in repeated]
    streams = [
        random_stream(settings.max_len, settings.seed, stage.seed_number, step, question, rollout)
        for question in range(settings.questions)
        for rollout in range(settings.rollouts)
    ]
    trajectories = answer_questions(
        policy,
        texts,
        stage.environment.search,
        settings,
        temperature=settings.temperature,
        streams=streams,
    )
    rewards = rewards_of(policy.codec, repeated, trajectories, settings, stage)
    shape = (settings.questions, settings.rollouts)
    return RolloutBatch(questions, trajectories, rewards.reshape(shape))


def rewards_of(
    codec: Codec,
    questions: Sequence[Question],
    trajectories: Sequence[Trajectory],
    settings: RLSettings,
    stage: RLStage,
) -> np.ndarray:
    """Return the reward of each question's trajectory in a stage: (trajectories,)."""
    rewards = [
        reward(
            codec,
            trajectory,
            question.golden_answers,
            settings.format_penalty,
            stage.call_cost,
            SCORES[settings.reward],
        )
        for trajectory, question in zip(trajectories, questions, strict=True)
    ]
    return np.array(rewards)


def repeat_questions(questions: Sequence[Question], rollouts: int) -> list[Question]:
    """Return the question of each trajectory: rollouts of one question stand together."""
    return [question for question in questions for _ in range(rollouts)]


def groups_to_skip(batch: RolloutBatch) -> np.ndarray:
    """Return for each question whether its rollouts teach nothing: (questions,) of bool.

    Equal rewards have no gradient. And nobody knows what a failed search would have found.
    """
    agrees = batch.rewards.max(1) == batch.rewards.min(1)
    return agrees | groups_that_lost(batch)


def groups_that_lost(batch: RolloutBatch) -> np.ndarray:
    """Return for each question whether a search of its rollouts failed: (questions,) of bool."""
    lost = np.array([trajectory.has_lost_observation for trajectory in batch.trajectories])
    has_lost = lost.reshape(batch.rewards.shape)
    return np.any(has_lost, axis=1)


def rollouts_that_teach(
    batch: RolloutBatch, skipped: np.ndarray, settings: RLSettings
) -> np.ndarray:
    """Return which rollouts an update goes over: (questions * rollouts,) of bool.

    Of a group whose rewards agree, the policy's tokens still count for KL, and what the tool said
    for the auxiliary loss. A group that lost a search teaches nothing at all.
    """
    is_whole = ~groups_that_lost(batch).repeat(settings.rollouts)
    if settings.kl:
        return is_whole
    teaches = ~skipped.repeat(settings.rollouts)
    if settings.observation_coef:
        says_something = [any(real_observation_mask(rollout)) for rollout in batch.trajectories]
        teaches = teaches | (np.array(says_something) & is_whole)
    return teaches


# ---- 4. Held-out questions: what --stop_on_alarm goes back to ------------------------------------
def held_out_questions(task: Task, stage: str, settings: RLSettings) -> list[Question]:
    """Return questions of a stage's pool that no step asks; none without --stop_on_alarm.

    They stand behind the --rl_questions that the steps take theirs from, half as many as a step has
    rollouts. Those of evaluation are no choice: their exact match would say how well weights do
    that were chosen by them.

    Raises UserError where the pool has too few.
    """
    if not settings.stop_on_alarm:
        return []
    pool = pool_name(stage, settings)
    count = settings.questions * settings.rollouts // 2
    questions = task.questions(pool, settings.rl_questions + count)
    asked = {question.question for question in questions[: settings.rl_questions]}
    behind = questions[settings.rl_questions :]
    held_out = [question for question in behind if question.question not in asked]
    if len(behind) < count or not held_out:
        way_out = "give more --train_data"
        if len(questions) > count:
            way_out += f", or take --rl_questions={len(questions) - count}"
        raise UserError(
            f"--stop_on_alarm: pool {pool!r} has {len(questions)} questions, which leaves "
            f"{len(held_out)} of {count} that no step asks; {way_out}"
        )
    return held_out


def look_at_held_out(
    policy: LM, settings: RLSettings, stage: RLStage, progress: StageRun, step: int
) -> dict[str, float]:
    """Measure the weights before some steps, keep the best, and return what the log says of it.

    The policy answers greedily and in the stage's environment, so that what it asks of the tool
    counts as all calls do.
    """
    is_due = step % HELD_OUT_EVERY == 0 or progress.best_weights.best is None
    if not (settings.stop_on_alarm and is_due):
        return {}
    environment = stage.environment
    environment.begin_held_out(step)
    texts = [question.question for question in stage.held_out]
    trajectories = answer_questions(policy, texts, environment.search, settings)
    rewards = rewards_of(policy.codec, stage.held_out, trajectories, settings, stage)
    held_out_reward = float(rewards.mean())
    progress.best_weights.keep_if_best(step, held_out_reward)
    return {"held_out_reward": held_out_reward}


# ---- 5. The update -------------------------------------------------------------------------------
def update_policy(
    policy: LM,
    optimizer: Any,
    reference: LM,
    batch: RolloutBatch,
    skipped: np.ndarray,
    settings: RLSettings,
    stage: RLStage,
    step: int,
) -> dict[str, float]:
    """Make a policy-gradient step for each minibatch; return the figures of the last one.

    They are 0 where nothing is learned.
    skipped: (questions,), groups of which the policy gradient is not taken.
    Raises UserError where a figure is not finite.
    """
    advantages = group_advantages(
        batch.rewards, settings.advantage_std, leave_one_out=settings.loss == "reinforce"
    )
    advantages[skipped] = 0
    learned = np.flatnonzero(rollouts_that_teach(batch, skipped, settings))
    rng = np.random.default_rng([settings.seed, stage.seed_number, step])
    figures = {"loss": 0.0, "grad_norm": 0.0, "idle_parameters": 0}
    for rows in split_minibatches(learned, settings.minibatches, rng):
        batches = update_batches(batch, rows, advantages, skipped, reference, settings)
        figures = policy.backend.train_step(
            policy.network,
            optimizer,
            sequence_loss if is_of_sequences(settings.loss) else grpo_loss,
            batches,
            lr=learning_rate(settings, stage, step),
            muon_lr=0.0,
            temperature=settings.temperature,
        )
        refuse_divergence(figures, stage, step)
    return figures


def learning_rate(settings: RLSettings, stage: RLStage, step: int) -> float:
    """Return the learning rate of a step: it rises over the first ones."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return settings.rl_lr * (stage.rate_scale * warmup)


def split_minibatches(
    rows: np.ndarray, minibatches: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the rows in random order, cut into an optimizer step's each."""
    if not len(rows):
        return []
    return np.array_split(rng.permutation(rows), min(minibatches, len(rows)))


def token_weight(loss: LossName, length: int, max_len: int) -> tuple[float, float]:
    """Return what each of the policy's tokens of a rollout counts, and the rollout in `norm`.

    In gspo the weight is that of a token in its rollout's log-ratio, and in reinforce too.

    length: of the policy's tokens of the rollout.
    Sources: arXiv 2503.14476 (dapo), 2402.03300 (grpo), 2503.20783 (dr_grpo), 2507.18071 (gspo),
    2402.14740 (reinforce).
    """
    if loss == "dapo":
        return 1.0, length
    if loss == "dr_grpo":
        return 1.0, max_len
    if loss == "reinforce":
        return 1.0, 1.0
    return 1 / length, 1.0


def is_of_sequences(loss: LossName) -> bool:
    """Return whether a loss has one ratio for a whole rollout, and not one for each token."""
    return loss in ("gspo", "reinforce")


def update_batches(
    batch: RolloutBatch,
    rows: np.ndarray,
    advantages: np.ndarray,
    skipped: np.ndarray,
    reference: LM,
    settings: RLSettings,
) -> list[Batch]:
    """Return the micro-batches of one optimizer step of --loss: the rollouts of a question are one
    trie. Of several processes each gets those of its share.

    rows: numbers of the rollouts that this step learns from.
    advantages: (questions, rollouts); 0 in groups that are skipped.
    skipped: (questions,), groups of which the policy gradient is not taken.
    "norm" is what --loss divides by, for dapo the number of the policy's tokens of all these
    rollouts, but for skipped ones; "kl_norm" counts them too.
    """
    rollouts = batch.rewards.shape[1]
    rows_of_question: dict[int, list[int]] = {}
    for row in sorted(rows.tolist()):
        rows_of_question.setdefault(row // rollouts, []).append(row)
    groups = list(rows_of_question.values())
    tries = [build_trie([batch.trajectories[row] for row in group]) for group in groups]
    weights: dict[int, float] = {}  # row -> of each of its tokens
    norms: dict[int, float] = {}
    for row in rows.tolist():
        length = int(sum(batch.trajectories[row].mask))
        weights[row], norms[row] = token_weight(settings.loss, length, settings.max_len)
    norm = sum(value for row, value in norms.items() if not skipped[row // rollouts])
    observed = {row: real_observation_mask(batch.trajectories[row]) for row in rows.tolist()}

    batches = []
    for members in own_micro_batches([len(trie.ids) for trie in tries], settings.micro_tokens):
        packed = pack([tries[member] for member in members])
        # The nodes of each rollout in it, by the rollout's row.
        paths = {
            row: start + path
            for member, (start, _) in zip(members, packed["parts"], strict=True)
            for row, path in zip(groups[member], tries[member].paths, strict=True)
        }
        zeros = np.zeros(len(packed["ids"]), np.float32)
        sums = {name: zeros.copy() for name in ("positive", "negative", "count")}
        observation_count = zeros.copy()
        for row, path in paths.items():
            advantage = advantages.ravel()[row]
            sums["positive"][path] += max(advantage, 0.0) * weights[row]
            sums["negative"][path] += min(advantage, 0.0) * weights[row]
            sums["count"][path] += weights[row]
            observation_count[path] += observed[row]
        packed |= sums
        packed["norm"] = max(float(norm), 1.0)
        packed["clip_low"] = settings.clip_low
        packed["clip_high"] = settings.clip_high
        if is_of_sequences(settings.loss):
            packed["rows"] = np.stack([zeros] * len(paths))
            for number, (row, path) in enumerate(paths.items()):
                packed["rows"][number, path] = weights[row]
            packed["advantages"] = advantages.ravel()[list(paths)].astype(np.float32)
        if settings.loss == "reinforce":
            # It is never clipped.
            packed["clip_low"] = 1.0
            packed["clip_high"] = math.inf
        packed["beta"] = settings.kl
        if settings.kl:
            packed["ref"] = reference.backend.score(reference.network, packed, settings.temperature)
            packed["kl_norm"] = max(float(sum(norms.values())), 1.0)
        else:
            # Nothing is learned at nodes whose advantages are all 0: they are context.
            packed["mask"] *= (sums["positive"] > 0) | (sums["negative"] < 0)
        packed["observation_coef"] = settings.observation_coef
        if settings.observation_coef:
            packed["observation_count"] = observation_count
            packed["observation_norm"] = max(float(sum(map(sum, observed.values()))), 1.0)
        batches.append(packed)
    return batches


def refuse_divergence(figures: Mapping[str, float | None], stage: RLStage, step: int) -> None:
    """Raise UserError where one of the figures of a step is not a finite number."""
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"{stage.folder.name}: {name} is {value} at step {step}; the stage before and the "
                "last checkpoint are kept; lower --rl_lr"
            )


# ---- 6. What is logged ---------------------------------------------------------------------------
def count_idle_steps(steps_before: Sequence[Mapping[str, Any]], skipped: np.ndarray) -> int:
    """Return how many steps in a row, up to this one, had no group whose rewards teach anything.

    steps_before: the log of the stage. skipped: (questions,), groups that are skipped.
    """
    if not skipped.all():
        return 0
    return 1 + (steps_before[-1].get("idle_steps", 0) if steps_before else 0)


def share_of_tokens(batch: RolloutBatch) -> float:
    """Return how many of a step's tokens are the same as another rollout's, and behind the same.

    They are computed once with that one, in sampling and in the update (docs/trie.md).
    """
    rollouts = batch.rewards.shape[1]
    tokens = 0
    nodes = 0
    for start in range(0, len(batch.trajectories), rollouts):
        group = batch.trajectories[start : start + rollouts]
        tokens += sum(len(trajectory.ids) for trajectory in group)
        nodes += count_nodes(group)
    return 1 - nodes / tokens


def policy_logprobs(
    lm: LM, trajectories: Sequence[Trajectory], settings: RLSettings
) -> list[np.ndarray]:
    """Return for each trajectory the log-probs of the policy's tokens under a model: (tokens,)."""
    logprobs = []
    lengths = [len(trajectory.ids) for trajectory in trajectories]
    for group in fill_by_tokens(lengths, settings.micro_tokens):
        batch = pack_texts([trajectories[row] for row in group])
        scored = lm.backend.score(lm.network, batch, settings.temperature)
        is_own = batch["mask"] > 0
        logprobs += [scored[start:end][is_own[start:end]] for start, end in batch["parts"]]
    return logprobs


def drift(policy: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Return KL to the reference (k3), nats a token: watched even where --kl is 0.

    policy, reference: log-probs of the same tokens, by trajectory.
    """
    batch = {"ref": np.concatenate(reference), "mask": 1.0}
    return float(k3(np, np.concatenate(policy), batch).mean())


def sampled_logprobs(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """Return for each trajectory the log-probs of the policy's tokens when sampled: (tokens,)."""
    return [
        np.array(trajectory.logprobs)[np.array(trajectory.mask) > 0] for trajectory in trajectories
    ]


@dataclass
class Watched:
    """A few rollouts of a step, whose log-probs are looked at before and after its update."""

    trajectories: list[Trajectory]
    is_correct: np.ndarray  # (trajectories,) of bool, as correct_rollouts has it


def watched_rollouts(batch: RolloutBatch) -> Watched:
    """Return some rollouts, evenly over the step.

    Each is read three times, which takes long where a real checkpoint has steps of thirty.
    """
    rollouts = len(batch.trajectories)
    count = min(WATCHED, math.ceil(rollouts / 10))
    some = slice(None, None, rollouts // count)
    return Watched(batch.trajectories[some], correct_rollouts(batch)[some])


def describe_change(
    policy: LM,
    reference: LM,
    watched: Watched,
    before: Sequence[np.ndarray],
    settings: RLSettings,
) -> dict[str, float | None]:
    """Return what an update has changed, nats a token: means over the watched rollouts.

    before: log-probs of training before the update, of the policy's tokens, by trajectory.
    """
    after = policy_logprobs(policy, watched.trajectories, settings)
    of_reference = policy_logprobs(reference, watched.trajectories, settings)
    return {
        "kl": drift(after, of_reference),
        "sampler_gap": sampler_gap(sampled_logprobs(watched.trajectories), before),
        "correct_change": mean_change(watched.is_correct, before, after),
    }


def sampler_gap(sampled: Sequence[np.ndarray], scored: Sequence[np.ndarray]) -> float:
    """Return how far log-probs of sampling are from those of training: mean, nats a token.

    sampled, scored: of the policy's tokens, by trajectory; those of training before the update.
    """
    return float(np.abs(np.concatenate(scored) - np.concatenate(sampled)).mean())


def correct_rollouts(batch: RolloutBatch) -> np.ndarray:
    """Return which rollouts have the best reward of a group that differs: (rollouts,) of bool."""
    best = batch.rewards == batch.rewards.max(1, keepdims=True)
    return (best & ~best.all(1, keepdims=True)).ravel()


def mean_change(
    is_meant: np.ndarray, before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> float | None:
    """Return by how much an update made some trajectories more likely: mean, nats a token.

    is_meant: (trajectories,) of bool; None is returned where it holds for none.
    before, after: log-probs of the same tokens, by trajectory.
    """
    changes = [
        new - old for is_one, old, new in zip(is_meant, before, after, strict=True) if is_one
    ]
    return float(np.concatenate(changes).mean()) if changes else None


def describe_step(codec: Codec, batch: RolloutBatch) -> dict[str, float | None]:
    """Return what the rollouts of one step looked like: means over its trajectories."""
    trajectories = batch.trajectories
    logprobs = np.concatenate(sampled_logprobs(trajectories))
    repeated = repeat_questions(batch.questions, batch.rewards.shape[1])
    scores = [
        exact_match(codec.answer(trajectory), question.golden_answers)
        for trajectory, question in zip(trajectories, repeated, strict=True)
    ]

    def mean(values: list[Any]) -> float:
        return float(np.mean(values))

    return {
        "reward": float(batch.rewards.mean()),
        "reward_spread": float(batch.rewards.std(1).mean()),
        "em": mean(scores),
        # The log-probs of sampled tokens estimate entropy without bias.
        "entropy": float(-logprobs.mean()),
        "length": mean([len(trajectory.ids) for trajectory in trajectories]),
        "policy_tokens": mean([sum(trajectory.mask) for trajectory in trajectories]),
        "actions": mean([len(trajectory.queries) for trajectory in trajectories]),
        "forced": mean([trajectory.forced for trajectory in trajectories]),
        "malformed": mean([not codec.is_well_formed(trajectory) for trajectory in trajectories]),
    }


def evaluate(policy: LM, stage: RLStage, settings: RLSettings) -> float:
    """Return the policy's exact match on evaluation questions, greedily and with their own tool."""
    texts = [question.question for question in stage.evaluation]
    trajectories = answer_questions(policy, texts, stage.eval_search, settings)
    scores = [
        exact_match(policy.codec.answer(trajectory), question.golden_answers)
        for trajectory, question in zip(trajectories, stage.evaluation, strict=True)
    ]
    return float(np.mean(scores))


def rows_of_first_group(codec: Codec, batch: RolloutBatch, step: int) -> list[dict[str, Any]]:
    """Return the rollouts of the step's first question for rollouts.jsonl."""
    rewards = batch.rewards[0]
    group = batch.trajectories[: len(rewards)]
    return [
        trajectory_row(codec, batch.questions[0], trajectory, value, step=step)
        for trajectory, value in zip(group, rewards, strict=True)
    ]


if __name__ == "__main__":
    main(run, RLSettings, __doc__)
