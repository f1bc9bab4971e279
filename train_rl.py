"""GRPO in two stages (paper 3.3): practice in an imagined environment, then in the real one.

    python train_rl.py                          # nano: 8 to 12 minutes on two cores
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
ends it there, with the weights that did best on validation questions of its pool.

Where this departs from textbook GRPO: advantages are not divided by their standard deviation
(--advantage_std does it); the loss is DAPO's mean over all tokens of a step, not over those of each
trajectory first (--loss); clipping is wider above than below; KL to the policy that the command
begins with is optional (--kl); and groups whose rollouts all got the same reward are left out.
Their gradient is zero, but they do not count in the mean either, so that the others weigh more
(DAPO draws new groups in their place). Left out are also groups in which a search failed.

The nano path has a world for SFT and another for RL-2, where nothing that SFT learned by heart is
of use. RL-1 asks RL-2's questions too, and RL-2 goes on after them. --rl1_pool=rl1 asks about
SFT's world instead. It is meant for a policy that imagines, which has read about no other. These
questions begin at facts that the base model does not know: where it knows, recalling always beats
a search whose result the policy makes up, and RL would teach it to stop searching.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
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
    nll_loss,
    random_stream,
    reward,
    sequence_loss,
)
from common import memory, runs
from common.alarms import alarms
from common.batching import own_micro_batches
from common.runs import StageRun
from common.settings import (
    AboveZero,
    AboveZeroFloat,
    LossName,
    RewardName,
    StageSettings,
    main,
)
from data.batches import Batch, Trie, build_trie, pack, real_observation_mask
from data.questions import Question
from data.rollout_batch import RolloutBatch, repeat_questions
from data.scores import exact_match, f1, overlap_match
from data.trajectory import Codec, Trajectory
from environments.choice import (
    EnvironmentSettings,
    open_environment,
    pool_name,
    prepare_environments,
)
from environments.environment import Environment
from evaluation.rl_log import (
    describe_change,
    describe_groups,
    describe_pace,
    describe_rollouts,
    describe_searches,
    first_group,
    summarize,
    watched_rollouts,
)
from model import LM
from tasks import Task, open_task
from workflows.agent import roll_out_questions

WARMUP_STEPS = 3  # steps over which the learning rate rises
EVAL_QUESTIONS = 60  # evaluation questions of each set that --eval_every looks at
VALIDATE_EVERY = 6  # steps between two looks of --stop_on_alarm at validation questions
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
    # Learning-rate multiplier of RL-1; at 1, a policy in an imagined world drifts.
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
    # Evaluate every this many steps, and log the exact match; 0: never. Nothing is chosen by it.
    eval_every: int = 0
    # End a stage when an alarm rings, with the weights that did best on validation questions of its
    # pool; they are asked every 6 steps. No later stage is started.
    stop_on_alarm: bool = False
    # Settings and the values to try, such as "call_cost=0,0.1;kl=0,0.001": each combination is
    # trained into a folder of its own and evaluated, and a table compares them.
    sweep: str = ""


# ---- 2. The stages -------------------------------------------------------------------------------
@dataclass
class RLStage:
    """What a stage of RL asks, who answers, and how it is rewarded."""

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
    validation: list[Question]  # what --stop_on_alarm chooses weights by; empty without it


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
    validation = {stage: validation_questions(task, stage, settings) for stage in plan.todo}
    # --dry-run times a step by the simplest loss.
    if not memory.report(policy, settings, "rl", nll_loss):
        return
    prepare_environments(plan.todo, settings, task)
    plan.prepare_folders(settings)

    for name in plan.todo:
        folder = plan.folder_of(name)
        stage = make_stage(name, folder, settings, task, policy.codec, validation[name])
        is_stopped = train_grpo(policy, reference, settings, stage)
        last = plan.todo[-1]
        if is_stopped and name != last:
            print(f"{last} was not begun; go on with: {resume_command()}")
            return


def make_stage(
    name: str,
    folder: Path,
    settings: RLSettings,
    task: Task,
    codec: Codec,
    validation: list[Question],
) -> RLStage:
    """Return RL-1 or RL-2, with its environment. name: rl1 or rl2."""
    is_first = name == "rl1"
    first_question = 0
    if not is_first and settings.rl1_pool == "rl2":
        # RL-1 has asked the questions before.
        first_question = settings.rl1_steps * settings.questions
    evaluation: list[Question] = []
    for questions in task.evaluation.values():
        evaluation += questions[:EVAL_QUESTIONS]
    return RLStage(
        folder=folder,
        steps=settings.rl1_steps if is_first else settings.rl2_steps,
        pool=task.questions(pool_name(name, settings), settings.rl_questions),
        first_question=first_question,
        environment=open_environment(name, settings, task, codec, validation),
        call_cost=settings.rl1_call_cost if is_first else settings.call_cost,
        rate_scale=settings.rl1_scale if is_first else 1.0,
        seed_number=1 if is_first else 2,
        evaluation=evaluation,
        eval_search=task.eval_search,
        validation=validation,
    )


def train_grpo(policy: LM, reference: LM, settings: RLSettings, stage: RLStage) -> bool:
    """Train one stage of GRPO, and return whether an alarm has stopped it (--stop_on_alarm).

    reference: the policy to which KL is measured.
    Raises UserError where the loss is not finite, before the weights change.
    """
    policy.begin_stage(settings, settings.seed, stage.folder.name)
    optimizer = policy.backend.Optimizer(policy.network, muon=False, seed=settings.seed)
    stage_run = StageRun(policy, optimizer, stage.folder, settings, stage.steps)
    environment = stage.environment
    environment.tool.restore(stage_run.log_files.calls)
    for step in stage_run.steps():
        record: dict[str, Any] = {"step": step}
        record |= validate(policy, settings, stage, stage_run, step)
        environment.begin_step(step)
        started = time.time()

        # 1. Rollouts: several trajectories of each question, and what they are worth.
        batch = sample_rollouts(policy, settings, stage, step)
        sampled = time.time()
        watched = watched_rollouts(batch, settings.micro_tokens, settings.temperature)
        before = watched.logprobs(policy)

        # 2. Update, by what the groups can teach.
        skipped = groups_to_skip(batch)
        record |= update_policy(policy, optimizer, reference, batch, skipped, settings, stage, step)
        updated = time.time()

        # 3. Log: what the step looked like, and its first group to read.
        steps_before = stage_run.log_files.steps
        record |= describe_rollouts(policy.codec, batch)
        record |= describe_change(policy, reference, watched, before)
        record |= describe_groups(skipped, steps_before)
        record |= describe_searches(batch, environment)
        record |= describe_pace(batch, sampled - started, updated - sampled)
        refuse_divergence(record, stage, step)
        if settings.eval_every and (step + 1) % settings.eval_every == 0:
            record["eval_em"] = evaluate(policy, stage, settings)
        ringing = alarms([*steps_before, record], settings.max_actions)
        stage_run.warn(ringing)
        stage_run.log(summarize(record), **record, alarms=list(ringing))
        stage_run.keep_rollouts(first_group(policy.codec, batch, step))
        stage_run.keep_calls(environment.tool.take_rows())
        if ringing and settings.stop_on_alarm:
            stage_run.stop_with_best(step, ringing)
    stage_run.finish()
    print(
        f"{stage.folder.name}: {environment.tool.raw_calls:,} searches were answered by the tool, "
        f"{environment.tool.distinct_calls:,} different ones"
    )
    return stage_run.is_stopped


def evaluate(policy: LM, stage: RLStage, settings: RLSettings) -> float:
    """Return the policy's exact match on evaluation questions, greedily and with their own tool."""
    texts = [question.question for question in stage.evaluation]
    trajectories = roll_out_questions(policy, texts, stage.eval_search, settings)
    scores = [
        exact_match(policy.codec.answer(trajectory), question.golden_answers)
        for trajectory, question in zip(trajectories, stage.evaluation, strict=True)
    ]
    return float(np.mean(scores))


# ---- 3. Rollouts ---------------------------------------------------------------------------------
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
    trajectories = roll_out_questions(
        policy,
        texts,
        stage.environment.search,
        settings,
        temperature=settings.temperature,
        streams=streams,
    )
    rewards = rewards_of(policy.codec, repeated, trajectories, settings, stage.call_cost)
    shape = (settings.questions, settings.rollouts)
    return RolloutBatch(questions, trajectories, rewards.reshape(shape))


def rewards_of(
    codec: Codec,
    questions: Sequence[Question],
    trajectories: Sequence[Trajectory],
    settings: RLSettings,
    call_cost: float,
) -> np.ndarray:
    """Return the reward of each question's trajectory: (trajectories,).

    call_cost: of the stage, taken off for each call.
    """
    rewards = [
        reward(
            codec,
            trajectory,
            question.golden_answers,
            settings.format_penalty,
            call_cost,
            SCORES[settings.reward],
        )
        for trajectory, question in zip(trajectories, questions, strict=True)
    ]
    return np.array(rewards)


def groups_to_skip(batch: RolloutBatch) -> np.ndarray:
    """Return for each question whether its rollouts teach nothing: (questions,) of bool.

    Equal rewards have no gradient. And nobody knows what a failed search would have found.
    """
    agrees = batch.rewards.max(1) == batch.rewards.min(1)
    return agrees | groups_that_lost(batch)


def groups_that_lost(batch: RolloutBatch) -> np.ndarray:
    """Return for each question whether a search of its rollouts failed: (questions,) of bool."""
    lost = np.array([trajectory.has_lost_observation for trajectory in batch.trajectories])
    return np.any(lost.reshape(batch.rewards.shape), axis=1)


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


# ---- 4. Validation questions: what --stop_on_alarm goes back to ----------------------------------
def validation_questions(task: Task, stage: str, settings: RLSettings) -> list[Question]:
    """Return questions of a stage's pool that no step asks; none without --stop_on_alarm.

    They are those after the first --rl_questions, which the steps draw from; there are half as many
    as a step has rollouts. Questions of evaluation are not used: to choose weights by them would
    make the exact match that is reported too high.

    Raises UserError where the pool has too few.
    """
    if not settings.stop_on_alarm:
        return []
    pool = pool_name(stage, settings)
    count = settings.questions * settings.rollouts // 2
    questions = task.questions(pool, settings.rl_questions + count)
    asked = {question.question for question in questions[: settings.rl_questions]}
    spare = questions[settings.rl_questions :]
    validation = [question for question in spare if question.question not in asked]
    if len(spare) < count or not validation:
        way_out = "give more --train_data"
        if len(questions) > count:
            way_out += f", or take --rl_questions={len(questions) - count}"
        raise UserError(
            f"--stop_on_alarm: pool {pool!r} has {len(questions)} questions, which leaves "
            f"{len(validation)} of {count} that no step asks; {way_out}"
        )
    return validation


def validate(
    policy: LM, settings: RLSettings, stage: RLStage, stage_run: StageRun, step: int
) -> dict[str, float]:
    """Measure the weights before some steps, keep the best, and return what the log says of it.

    The policy answers greedily and in the stage's environment, so that what it asks of the tool
    counts as all calls do.
    """
    is_due = step % VALIDATE_EVERY == 0 or stage_run.best_weights.best is None
    if not (settings.stop_on_alarm and is_due):
        return {}
    environment = stage.environment
    environment.begin_validation(step)
    texts = [question.question for question in stage.validation]
    trajectories = roll_out_questions(policy, texts, environment.search, settings)
    rewards = rewards_of(policy.codec, stage.validation, trajectories, settings, stage.call_cost)
    validation_reward = float(rewards.mean())
    stage_run.best_weights.keep_if_best(step, validation_reward)
    return {"validation_reward": validation_reward}


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
    for rollouts in split_minibatches(learned, settings.minibatches, rng):
        batches = update_batches(batch, rollouts, advantages, skipped, reference, settings)
        figures = policy.backend.train_step(
            policy.network,
            optimizer,
            sequence_loss if has_sequence_ratio(settings.loss) else grpo_loss,
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
    rollouts: np.ndarray, minibatches: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return numbers of rollouts in random order, cut into an optimizer step's each."""
    if not len(rollouts):
        return []
    return np.array_split(rng.permutation(rollouts), min(minibatches, len(rollouts)))


def token_weight(loss: LossName, length: int, max_len: int) -> tuple[float, float]:
    """Return what a rollout's tokens weigh in the loss, and what the rollout adds to its divisor.

    The loss is a sum of weighted gains, divided by what all rollouts of the step add together:

    loss        a token's weight    added to the divisor
    dapo        1                   length: a mean over all tokens
    grpo        1 / length          1: a mean over rollouts of means over their tokens
    dr_grpo     1                   max_len
    gspo        1 / length          1; weights are of log-ratios, whose mean makes the ratio
    reinforce   1                   1; of log-ratios, whose sum makes it

    length: how many tokens of the rollout are the policy's.
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


def has_sequence_ratio(loss: LossName) -> bool:
    """Return whether a loss has one ratio for a whole rollout, and not one for each token."""
    return loss in ("gspo", "reinforce")


def update_batches(
    batch: RolloutBatch,
    rollouts: np.ndarray,
    advantages: np.ndarray,
    skipped: np.ndarray,
    reference: LM,
    settings: RLSettings,
) -> list[Batch]:
    """Return the micro-batches of one optimizer step of --loss: the rollouts of a question are one
    trie. Of several processes each gets those of its share.

    rollouts: numbers of those that this step learns from.
    advantages: (questions, rollouts); 0 in groups that are skipped.
    skipped: (questions,), groups of which the policy gradient is not taken.
    """
    groups = same_question(rollouts, batch.rewards.shape[1])
    tries = [build_trie([batch.trajectories[i] for i in group]) for group in groups]
    step = StepWeights(batch, rollouts, advantages, skipped, settings)
    batches = []
    for members in own_micro_batches([len(trie.ids) for trie in tries], settings.micro_tokens):
        packed = pack([tries[member] for member in members])
        nodes = len(packed["ids"])
        paths = rollout_paths(packed, members, groups, tries)
        packed |= step.advantage_sums(paths, nodes)
        packed |= clip_range(settings)
        if has_sequence_ratio(settings.loss):
            packed |= step.sequence_weights(paths, nodes)
        packed |= step.observation_weights(paths, nodes)
        packed["beta"] = settings.kl
        if settings.kl:
            packed["ref"] = reference.backend.score(reference.network, packed, settings.temperature)
            packed["kl_norm"] = step.kl_norm
        else:
            # Nothing is learned at nodes whose advantages are all 0: they are context.
            packed["mask"] *= (packed["positive"] > 0) | (packed["negative"] < 0)
        batches.append(packed)
    return batches


def same_question(rollouts: np.ndarray, group_size: int) -> list[list[int]]:
    """Return numbers of rollouts, in order, those of one question together."""
    groups: dict[int, list[int]] = {}
    for rollout in sorted(rollouts.tolist()):
        groups.setdefault(rollout // group_size, []).append(rollout)
    return list(groups.values())


def rollout_paths(
    packed: Batch, members: Sequence[int], groups: Sequence[list[int]], tries: Sequence[Trie]
) -> dict[int, np.ndarray]:
    """Return the nodes of each rollout in a micro-batch, by the rollout's number.

    members: numbers of the groups in it.
    """
    paths = {}
    for member, (start, _) in zip(members, packed["parts"], strict=True):
        for rollout, path in zip(groups[member], tries[member].paths, strict=True):
            paths[rollout] = start + path
    return paths


def clip_range(settings: RLSettings) -> Batch:
    """Return how far below and above 1 a ratio may go."""
    if settings.loss == "reinforce":
        # It is never clipped.
        return {"clip_low": 1.0, "clip_high": math.inf}
    return {"clip_low": settings.clip_low, "clip_high": settings.clip_high}


class StepWeights:
    """What the rollouts of one optimizer step weigh in its loss.

    advantages: (rollouts of the step,), of each.
    weights: by a rollout's number, what each of its tokens weighs.
    norm: what the policy gradient divides by: the sum of the shares (token_weight) of all rollouts
        but those of skipped groups; for dapo the number of their tokens.
    kl_norm: what KL divides by: the same sum with skipped groups.
    observed: by a rollout's number, for each token 1 where the real tool said it.
    observation_norm: how many of these there are.
    """

    def __init__(
        self,
        batch: RolloutBatch,
        rollouts: np.ndarray,
        advantages: np.ndarray,
        skipped: np.ndarray,
        settings: RLSettings,
    ) -> None:
        """Weigh some rollouts; the arguments are those of update_batches."""
        group_size = batch.rewards.shape[1]
        self.advantages = advantages.ravel()
        self.observation_coef = settings.observation_coef
        self.weights: dict[int, float] = {}
        self.observed: dict[int, list[int]] = {}
        norm = 0.0
        kl_norm = 0.0
        for rollout in rollouts.tolist():
            trajectory = batch.trajectories[rollout]
            length = sum(trajectory.mask)
            weight, share = token_weight(settings.loss, length, settings.max_len)
            self.weights[rollout] = weight
            self.observed[rollout] = real_observation_mask(trajectory)
            kl_norm += share
            if not skipped[rollout // group_size]:
                norm += share
        self.norm = max(norm, 1.0)
        self.kl_norm = max(kl_norm, 1.0)
        self.observation_norm = max(float(sum(map(sum, self.observed.values()))), 1.0)

    def advantage_sums(self, paths: Mapping[int, np.ndarray], nodes: int) -> Batch:
        """Return for each node what grpo_loss and its KL read, summed over the rollouts there."""
        positive = np.zeros(nodes, np.float32)
        negative = np.zeros(nodes, np.float32)
        count = np.zeros(nodes, np.float32)
        for rollout, path in paths.items():
            weight = self.weights[rollout]
            advantage = self.advantages[rollout]
            positive[path] += max(advantage, 0.0) * weight
            negative[path] += min(advantage, 0.0) * weight
            count[path] += weight
        return {"positive": positive, "negative": negative, "count": count, "norm": self.norm}

    def sequence_weights(self, paths: Mapping[int, np.ndarray], nodes: int) -> Batch:
        """Return for each rollout what sequence_loss reads."""
        path_weights = np.zeros((len(paths), nodes), np.float32)
        for number, (rollout, path) in enumerate(paths.items()):
            path_weights[number, path] = self.weights[rollout]
        advantages = self.advantages[list(paths)].astype(np.float32)
        return {"path_weights": path_weights, "advantages": advantages}

    def observation_weights(self, paths: Mapping[int, np.ndarray], nodes: int) -> Batch:
        """Return for each node what observation_loss reads, where it has a weight."""
        if not self.observation_coef:
            return {"observation_coef": 0.0}
        count = np.zeros(nodes, np.float32)
        for rollout, path in paths.items():
            count[path] += self.observed[rollout]
        return {
            "observation_coef": self.observation_coef,
            "observation_count": count,
            "observation_norm": self.observation_norm,
        }


def refuse_divergence(figures: Mapping[str, float | None], stage: RLStage, step: int) -> None:
    """Raise UserError where one of the figures of a step is not a finite number."""
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"{stage.folder.name}: {name} is {value} at step {step}; the stage before and the "
                "last checkpoint are kept; lower --rl_lr"
            )


if __name__ == "__main__":
    main(run, RLSettings, __doc__)
