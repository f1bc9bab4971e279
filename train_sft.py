"""Supervised training: the base model (nano only), then the three SFT stages (paper 3.2).

    python train_sft.py                         # nano, 11 to 20 minutes on two cores
    python train_sft.py config/smollm2.py --model=.. --train_data=.. --eval_data=.. --corpus=..

base    nano: pretraining from scratch on head articles and single skills, so that there is a
        reasoning model to begin with; a checkpoint from elsewhere is the base model as it is
sft1    when to act: pairs that part inside the reasoning; one side acts, the other thinks on
sft2    how to act: whole trajectories, observations masked
sft3    the same without the mask, observations at a tenth of the weight: the policy learns what the
        tool would say, and becomes its own world model

Without --stage all are trained anew, or with --resume from where an interrupted run stands.
--stage trains one of them from the stage before; --start and --out name other folders, for
ablations. Each stage leaves a Hugging Face folder with log.jsonl and rollouts.jsonl in
out/<run>/<stage>/.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
from common.errors import UserError

# isort: split
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autocoa import contrastive_loss, nll_loss
from common import memory, ranks, runs
from common.runs import StageRun
from common.settings import (
    AboveZero,
    CommaList,
    NewModelSettings,
    OptimizerSettings,
    PairDirections,
    ShareOrAll,
    StageSettings,
    main,
)
from data.autocoa_files import read_sft_files
from data.batches import (
    Batch,
    Pair,
    language_batches,
    learn_observations,
    optimizer_steps,
    pair_batches,
)
from data.pairs import contrastive_pairs, pairs_in_direction
from data.questions import Question, facts_by_id
from data.scores import exact_match
from data.sft_data import SFTData, keep_what_fits, read_sft_data, write_sft_data
from data.teacher import recall_chain, write_chains
from data.trajectory import Trajectory
from model import LM
from tasks import Task, open_task
from workflows.agent import sample_rows
from workflows.journal import AnswerSettings, Journal, provenance_hash
from workflows.react import react
from workflows.recall import recall
from workflows.style import style_of

WATCHED_PAIRS = 100  # pairs whose log-probs are printed before and after SFT-1
PAIRS_OF_A_STEP = 16  # pairs of an optimizer step of SFT-1, as the authors set it
REACT_CALLS = 4  # calls of the workflow whose outcomes make the pairs of SFT-1
SAMPLES = 20  # greedy trajectories that a stage leaves to be read


# ---- 1. Settings ---------------------------------------------------------------------------------
@dataclass(kw_only=True)
class SFTSettings(StageSettings, AnswerSettings, NewModelSettings, OptimizerSettings):
    """The settings of train_sft.py; the counts are the authors'."""

    # SFT files of AutoCoA's form, jsonl and json, to learn from in place of the teacher's chains.
    sft_files: CommaList = field(default_factory=list)
    # Pairs of SFT-1 at most. They come from twice as many questions, since only a question that
    # exactly one of acting and thinking solves makes a pair.
    pairs: int = 1500
    # Which pairs SFT-1 learns from: act (where acting was right), think (where thinking was), both.
    pair_directions: PairDirections = "both"
    # Questions for chains of action; those that the teacher can't solve make none.
    coa: int = 5000
    # Questions for chains of thought. On the nano path three fifths of them repeat the planning and
    # the relations of pretraining instead, which the other chains would make it forget.
    cot: int = 1000
    # Passes over the chains in SFT-2; SFT-1 goes over its pairs once.
    epochs: AboveZero = 2
    # Passes over the chains in SFT-3.
    sft3_epochs: AboveZero = 1
    # Weight of an observation's token in SFT-3's loss, where the policy's own have 1. The paper's
    # is 1.
    sft3_observation_coef: ShareOrAll = 0.1
    # Weight of the auxiliary term of SFT-1's loss.
    alpha: float = 0.2
    # Learning-rate multiplier of SFT-1.
    sft1_scale: float = 0.1
    # Learning-rate multiplier of SFT-2.
    sft2_scale: float = 0.6
    # Learning-rate multiplier of SFT-3.
    sft3_scale: float = 0.5


# ---- 2. The stages -------------------------------------------------------------------------------
def run(settings: SFTSettings) -> None:
    """Train the stages that the command asks for, in the paper's order."""
    plan = runs.plan_sft(settings)
    if not plan.todo:
        return
    runs.settle_by_device(settings, runs.begins_run(settings))
    refuse_nothing_to_learn(settings, plan)
    task = open_task(settings)
    if "base" in plan.todo:
        lm = task.new_model(settings)
    else:
        lm = plan.load_start(settings)
    task.leave_out_long_questions(lm.codec, settings.longest_prompt)
    plan.refuse_changed_data(settings)
    if "base" not in plan.todo:
        # Before the estimate of memory, which depends on the adapter.
        lm.begin_stage(settings, settings.seed, plan.todo[0])
    if not memory.report(lm, settings, "sft", nll_loss):
        return
    plan.prepare_folders(settings)

    if "base" in plan.todo:  # a reasoning model to begin with
        make_base_model(lm, settings, task, plan.folder_of("base"))

    if plan.must_make_data:
        base = plan.load_base(lm, settings)
        journal = open_journal(plan, settings)
        sft_data = make_data(base, settings, task, journal)
        # The record comes first: a kill between the two has the data made once more.
        runs.record_stage(settings, "data")
        ranks.of_first(lambda: write_sft_data(plan.data_folder, sft_data))
        journal.remove()
    sft_data = read_sft_data(plan.data_folder, runs.command_line("train_sft.py"))
    refuse_no_chains(plan, sft_data)

    if "sft1" in plan.todo:  # when to act
        pairs = pairs_in_direction(sft_data.pairs, settings.pair_directions)
        train_on_pairs(lm, settings, task, plan.folder_of("sft1"), pairs)
    if "sft2" in plan.todo:  # how to act: observations carry no loss
        chains = sft_data.chains
        train_on_chains(lm, settings, task, plan, "sft2", chains)
    if "sft3" in plan.todo:  # a world model: observations are learned too
        chains = learn_observations(sft_data.chains, settings.sft3_observation_coef)
        train_on_chains(lm, settings, task, plan, "sft3", chains)
    print(task.search.report())


def refuse_nothing_to_learn(settings: SFTSettings, plan: runs.StagePlan) -> None:
    """Raise UserError where the counts leave a stage without data, before another is trained."""
    if not plan.must_make_data or settings.sft_files:
        return
    has_chains = settings.coa + settings.cot > 0
    if not has_chains and not settings.pairs:
        raise UserError("--coa, --cot, --pairs: all are 0, which leaves nothing to learn from")
    if not has_chains and {"sft2", "sft3"} & set(plan.todo):
        raise UserError(
            "--coa, --cot: both are 0, which leaves SFT-2 and SFT-3 nothing to learn from; give "
            "one of them, or train SFT-1 alone with --stage=sft1"
        )


def refuse_no_chains(plan: runs.StagePlan, sft_data: SFTData) -> None:
    """Raise UserError where the data has no chain, and a stage is to learn from chains."""
    if not sft_data.chains and {"sft2", "sft3"} & set(plan.todo):
        raise UserError(
            f"{plan.data_folder} holds no chain, so SFT-2 and SFT-3 have nothing to learn from; "
            "remove it, and give the teacher more questions or another --corpus"
        )


def train_on_chains(
    lm: LM,
    settings: SFTSettings,
    task: Task,
    plan: runs.StagePlan,
    name: str,
    chains: Sequence[Trajectory],
) -> None:
    """Train SFT-2 or SFT-3: next-token loss on the tokens that the masks mark. name: sft2, sft3."""
    epochs = settings.epochs if name == "sft2" else settings.sft3_epochs
    lr_scale = settings.sft2_scale if name == "sft2" else settings.sft3_scale
    lm.begin_stage(settings, settings.seed, name)
    rng = random.Random(f"{name} {settings.seed}")
    steps = shuffled_epochs(chains, epochs, settings.batch_tokens, rng)
    with running_stage(lm, settings, task, plan.folder_of(name), len(steps)) as stage_run:
        train_on_texts(stage_run, settings, steps, lr_scale)


def train_on_pairs(
    lm: LM, settings: SFTSettings, task: Task, folder: Path, pairs: Sequence[Pair]
) -> None:
    """Train SFT-1: raise what was right to do against what was wrong, in the same place."""
    lm.begin_stage(settings, settings.seed, "sft1")
    if not pairs:
        print(
            "no question was solved by exactly one of recalling and acting, so there are no "
            f"pairs (--pair_directions={settings.pair_directions}): SFT-1 leaves the model as it is"
        )
    steps = [
        pairs[start : start + PAIRS_OF_A_STEP] for start in range(0, len(pairs), PAIRS_OF_A_STEP)
    ]

    def make_batches(step: Sequence[Pair]) -> list[Batch]:
        return pair_batches(step, settings.micro_tokens, settings.alpha)

    watched = pairs[:WATCHED_PAIRS]
    before = describe_pairs(lm, watched, settings.micro_tokens)
    with running_stage(lm, settings, task, folder, len(steps)) as stage_run:
        lr_scale = settings.sft1_scale
        train_steps(stage_run, settings, steps, contrastive_loss, make_batches, lr_scale)
    after = describe_pairs(lm, watched, settings.micro_tokens)
    if watched:
        print(f"{folder.name}: log-probability of a token: {before}; afterwards {after}")


def describe_pairs(lm: LM, pairs: Sequence[Pair], micro_tokens: int) -> str:
    """Return how likely the two sides of some pairs are, in nats a token.

    It shows what the auxiliary term of the loss is for: without it both fall together where the
    learning rate is high.
    """
    scores = np.zeros(2)  # of all chosen sides, of all rejected ones
    for batch in pair_batches(pairs, micro_tokens, alpha=0.0):
        sides = batch["path_weights"] @ lm.backend.score(lm.network, batch)  # (2 n,)
        scores += sides.reshape(2, -1).sum(1)
    # Of several processes each has scored its share.
    chosen, rejected = np.sum(ranks.gather(scores), axis=0) / max(1, len(pairs))
    return f"chosen {chosen:.3f}, rejected {rejected:.3f}"


def make_base_model(lm: LM, settings: SFTSettings, task: Task, folder: Path) -> None:
    """Pretrain the base model (nano), or take a checkpoint from elsewhere as it is."""
    rng = random.Random(f"base {settings.seed}")
    texts = task.pretraining_texts(lm.codec, rng, settings.base_tokens)
    if not texts:
        runs.record_stage(settings, folder.name)
        lm.save(folder)
        return
    steps = optimizer_steps(texts, settings.batch_tokens, rng)
    with running_stage(lm, settings, task, folder, len(steps)) as stage_run:
        train_on_texts(stage_run, settings, steps)


@contextmanager
def running_stage(
    lm: LM, settings: SFTSettings, task: Task, folder: Path, steps: int
) -> Iterator[StageRun]:
    """Begin a stage of some optimizer steps; afterwards leave trajectories to be read, and save."""
    lm.network.recompute = settings.checkpointing
    optimizer = lm.backend.Optimizer(lm.network, muon=settings.muon, seed=settings.seed)
    stage_run = StageRun(lm, optimizer, folder, settings, steps)
    yield stage_run
    samples = task.questions("sample", SAMPLES)[: settings.batch_rows // 4]
    stage_run.keep_rollouts(sample_rows(lm, samples, task.search, settings))
    stage_run.finish()


# ---- 3. The loop that all supervised training shares ---------------------------------------------
def shuffled_epochs(
    texts: Sequence[Trajectory], epochs: int, batch_tokens: int, rng: random.Random
) -> list[list[Trajectory]]:
    """Return the optimizer steps of some epochs, in each of which the texts are shuffled anew."""
    steps = []
    for _ in range(epochs):
        shuffled = rng.sample(texts, len(texts))
        steps += optimizer_steps(shuffled, batch_tokens, rng)
    return steps


def train_on_texts(
    stage_run: StageRun,
    settings: OptimizerSettings,
    steps: Sequence[Sequence[Trajectory]],
    lr_scale: float = 1.0,
) -> None:
    """Train by the next-token loss on the tokens that the masks mark; see train_steps."""

    def make_batches(texts: Sequence[Trajectory]) -> list[Batch]:
        return language_batches(texts, settings.micro_tokens)

    train_steps(stage_run, settings, steps, nll_loss, make_batches, lr_scale)


def train_steps(
    stage_run: StageRun,
    settings: OptimizerSettings,
    steps: Sequence[Sequence[Any]],
    loss: Callable[..., Any],
    make_batches: Callable[[Sequence[Any]], list[Batch]],
    lr_scale: float = 1.0,
) -> None:
    """Train on some optimizer steps, each a list of items for make_batches.

    lr_scale: a multiplier of the stage's learning rates.
    Raises UserError where the loss is not finite, before the weights change.
    """
    lm = stage_run.lm
    mean_loss: float | None = None
    for step in stage_run.steps():
        started = time.time()
        factor = learning_rate_factor(step, len(steps), lr_scale)
        batches = make_batches(steps[step])
        figures = lm.backend.train_step(
            lm.network,
            stage_run.optimizer,
            loss,
            batches,
            lr=settings.lr * factor,
            muon_lr=settings.muon_lr * factor,
        )
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            raise UserError(
                f"{stage_run.name}: loss is {figures['loss']} at step {step}; the stage before is "
                "kept; lower --lr and --muon_lr"
            )
        mean_loss = moving_mean(mean_loss, figures["loss"])
        tokens = sum(ranks.gather(sum(len(batch["ids"]) for batch in batches)))
        speed = tokens / (time.time() - started)
        stage_run.log(
            f"loss {mean_loss:.3f}, {speed:,.0f} tok/s",
            step=step,
            **figures,
            lr=settings.lr * factor,
            tokens=tokens,
            tokens_per_second=speed,
        )


def learning_rate_factor(step: int, steps: int, lr_scale: float) -> float:
    """Return a step's multiplier of the learning rate: up over 5% of the steps, down to a tenth."""
    warmup = min(1.0, (step + 1) / (0.05 * steps + 1))
    return lr_scale * warmup * (1 - 0.9 * step / steps)


def moving_mean(mean: float | None, value: float) -> float:
    """Return an exponential moving mean, which the progress bar shows."""
    return value if mean is None else 0.95 * mean + 0.05 * value


# ---- 4. The data of SFT --------------------------------------------------------------------------
def open_journal(plan: runs.StagePlan, settings: SFTSettings) -> Journal:
    """Return the base model's answers that an interrupted command has left."""
    base_folder = plan.folder_of("base") if "base" in plan.todo else plan.root / "base"
    return Journal(
        plan.data_folder / runs.DATA_JOURNAL,
        # Pairs come from searches in the training world.
        [provenance_hash(base_folder, settings), settings.train_scale],
        settings.resume,
        settings.batch_rows,
    )


def make_data(base: LM, settings: SFTSettings, task: Task, journal: Journal) -> SFTData:
    """Make what SFT learns from: a teacher's chains, and pairs from measured outcomes.

    The base model is asked for every fact that the questions need. The teacher recalls what it
    knows and searches for the rest with the real tool.

    journal: of the base model's answers.
    """
    if settings.sft_files:
        sft_data, problems = read_sft_files(base.codec, settings.sft_files)
        if problems:
            print(
                f"{len(problems)} rows are no trajectories and are left out, "
                f"the first at {problems[0]}"
            )
        return keep_what_fits(sft_data, settings.max_len, f"from {', '.join(settings.sft_files)}: ")

    rng = random.Random(f"sft {settings.seed}")
    # Without these the nano model forgets the relations that its chains never combine.
    practice = task.practice_chains(base.codec, rng, settings.cot)
    action_questions = task.questions("coa", settings.coa)
    thought_count = settings.cot - len(practice)
    thought_questions = task.questions("cot", thought_count)
    pair_questions = _without_repeats(
        task.questions("act", settings.pairs) + task.questions("think", settings.pairs)
    )

    # What the base model knows decides what the teacher recalls and what it looks up.
    asked = action_questions + thought_questions + pair_questions
    known, recalled = recall(base, asked, settings, journal)
    chains, counts = write_chains(
        base.codec, action_questions, known, task.search, settings.max_observation
    )
    thoughts = [
        recall_chain(base.codec, question)
        for question in thought_questions
        if all(fact.id in known for fact in question.facts)
    ]

    # A pair comes from a question that exactly one of acting and thinking solves.
    solved = solved_by_acting(base, pair_questions, settings, task, journal)
    acting_right, thinking_right = contrastive_pairs(base.codec, pair_questions, recalled, solved)
    pairs = draw_pairs(acting_right, thinking_right, settings.pairs, rng)

    facts = facts_by_id(action_questions)
    source = (
        f"base model knows {len(known & set(facts))} of {len(facts)} facts; "
        f"{counts.searches} searches, {counts.misses} missed, {counts.dropped} chains dropped; "
        f"of {len(acting_right)} pairs where acting was right and {len(thinking_right)} where "
        "thinking was: "
    )
    sft_data = SFTData([chain for _, chain in chains], practice + thoughts, pairs)
    return keep_what_fits(sft_data, settings.max_len, source)


def draw_pairs(
    acting_right: Sequence[Pair], thinking_right: Sequence[Pair], count: int, rng: random.Random
) -> list[Pair]:
    """Return some pairs, at most `count`: half of each direction, where there are enough."""
    half = (count + 1) // 2
    pairs = rng.sample(acting_right, min(half, len(acting_right)))
    pairs += rng.sample(thinking_right, min(half, len(thinking_right)))
    rng.shuffle(pairs)
    return pairs[:count]


def _without_repeats(questions: Sequence[Question]) -> list[Question]:
    return list({question.id: question for question in questions}.values())


def solved_by_acting(
    base: LM, questions: list[Question], settings: SFTSettings, task: Task, journal: Journal
) -> set[str]:
    """Return the ids of the questions that acting at every step solves.

    journal: of the base model's answers.
    """
    if not task.base_model_acts:
        # A small checkpoint's ReAct hardly solves anything, so the teacher's searches decide.
        chains, _ = write_chains(
            base.codec, questions, set(), task.search, settings.max_observation
        )
        return {question.id for question, _ in chains}
    phrases = style_of(base.codec).react_phrases(base.codec, examples="")

    def ask(texts: list[str]) -> list[str]:
        answered = react(base, texts, task.search, settings, phrases, max_actions=REACT_CALLS)
        return [answer for answer, _ in answered]

    texts = [question.question for question in questions]
    answers = journal.answers("acting", texts, ask, "where acting and thinking part")
    return {
        question.id
        for question, answer in zip(questions, answers, strict=True)
        if exact_match(answer, question.golden_answers)
    }


if __name__ == "__main__":
    main(run, SFTSettings, __doc__, begins_run=runs.begins_run)
