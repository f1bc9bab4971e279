"""Ours beside the libraries that one would take instead: transformers, TRL, mlx_lm."""

import dataclasses
import importlib.util
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Protocol

from common.errors import UserError
from common.runs import run_folder
from data.batches import optimizer_steps
from data.questions import Question
from data.sft_data import read_trajectories
from data.trajectory import Trajectory
from speed.against import RUN, STEPS, run_stage, time_stage, tree_settings
from speed.agents import Generate, time_agents
from speed.ours import Ours
from speed.pairs import Comparison, Timing, count_same_texts, take_turns
from speed.settings import BenchSettings
from speed.trees import ROOT, StepRow, Tree, copy_run
from tasks import Task, open_task

NAMES = ("answer", "sampling", "agents", "sft", "rl")
MLX_NAMES = ("answer", "agents", "sft")
ANSWER_TOKENS = 128
SAMPLED_TOKENS = 130  # of a rollout, at most
SFT_STEPS = 6
ADAPTER_RANK = 8
ADAPTER_ROWS = 16  # texts of an optimizer step of an adapter, all of a middle length
CHAINS = 400  # from which the texts of SFT are taken


class OtherLibrary(Protocol):
    """What every other library is asked for."""

    name: str

    def answer(self, prompt: list[int], count: int) -> Timing:
        """Write so many tokens after one prompt, greedily."""
        ...

    def generation(self) -> Generate:
        """Return a generation of rows that keeps their caches over the calls of the tool."""
        ...


def compare_with_libraries(ours: Ours, report: Callable[[Comparison], None]) -> None:
    """Compare with transformers and TRL, or with mlx_lm where the backend is MLX.

    report: is given each comparison when it is done.
    Raises UserError for a measurement that there is not, or whose library is not installed.
    """
    settings = ours.settings
    is_mlx = ours.lm.backend.NAME == "mlx"
    known = MLX_NAMES if is_mlx else NAMES
    names = settings.only or known
    unknown = set(names) - set(known)
    if unknown:
        raise UserError(f"--only: {min(unknown)!r} is not one of {', '.join(known)}")
    if "rl" in names and importlib.util.find_spec("trl") is None:
        raise UserError(
            "rl: TRL is not installed; pip install -r requirements-bench.txt, "
            "or choose others with --only"
        )
    task = open_task(settings)
    # As train_rl.py leaves them out.
    task.leave_out_long_questions(ours.lm.codec, settings.longest_prompt)
    if is_mlx:
        _compare_with_mlx_lm(ours, task, names, report)
    else:
        _compare_with_transformers(ours, task, names, report)


def _compare_with_transformers(
    ours: Ours, task: Task, names: Sequence[str], report: Callable[[Comparison], None]
) -> None:
    # What names a framework is imported where it is compared with: not every machine has all.
    from speed.beside_transformers import Transformers

    settings = ours.settings
    library = Transformers(ours)
    prompts = different_prompts(ours, task)
    if "answer" in names:
        report(_one_answer(ours, library, prompts[0]))
    if "sampling" in names:
        groups = [
            prompt for prompt in prompts[: settings.questions] for _ in range(settings.rollouts)
        ]
        report(
            take_turns(
                "sampling",
                "token",
                library.name,
                lambda: ours.sample(groups, SAMPLED_TOKENS),
                lambda: library.sample(groups, SAMPLED_TOKENS),
                settings.repeats,
            )
        )
    if "agents" in names:
        report(_agents(ours, library, prompts, task))
    if "sft" in names:
        steps = sft_steps(ours)
        report(
            take_turns(
                "sft",
                "token",
                library.name,
                ours.training(steps, lora_rank=0),
                library.training(steps),
                settings.repeats,
            )
        )
    if "rl" in names:
        _compare_with_trl(ours, task, report)


def _compare_with_mlx_lm(
    ours: Ours, task: Task, names: Sequence[str], report: Callable[[Comparison], None]
) -> None:
    from speed.beside_mlx_lm import MlxLm

    library = MlxLm(ours)
    prompts = different_prompts(ours, task)
    if "answer" in names:
        report(_one_answer(ours, library, prompts[0]))
    if "agents" in names:
        report(_agents(ours, library, prompts, task))
    if "sft" in names:
        steps = [texts_of_middle_length(ours)] * SFT_STEPS
        report(
            take_turns(
                "adapter",
                "token",
                library.name,
                ours.training(steps, ADAPTER_RANK),
                library.training(steps, ADAPTER_RANK),
                ours.settings.repeats,
            )
        )


def _one_answer(ours: Ours, library: OtherLibrary, prompt: list[int]) -> Comparison:
    comparison = take_turns(
        "answer",
        "token",
        library.name,
        lambda: ours.answer(prompt, ANSWER_TOKENS),
        lambda: library.answer(prompt, ANSWER_TOKENS),
        ours.settings.repeats,
    )
    comparison.note = count_same_texts(comparison)
    return comparison


def _agents(ours: Ours, library: OtherLibrary, prompts: list[list[int]], task: Task) -> Comparison:
    comparison = take_turns(
        "agents",
        "agent",
        library.name,
        lambda: ours.run_agents(prompts, task.rl_search),
        lambda: time_agents(library.generation(), ours, prompts, task.rl_search),
        ours.settings.repeats,
    )
    comparison.note = count_same_texts(comparison)
    return comparison


def _compare_with_trl(ours: Ours, task: Task, report: Callable[[Comparison], None]) -> None:
    """Compare steps of RL-2 by the token that is sampled; ours are train_rl.py's own.

    Both sides ask the same questions in the same steps. A rollout of theirs ends where one of ours
    does on average over these steps.
    """
    from speed.beside_trl import grpo_steps

    settings = ours.settings
    start = ours.folder.name
    pool = task.questions("rl2", (STEPS + 1) * settings.questions)
    with tempfile.TemporaryDirectory() as folder:
        given = tree_settings(settings) | {"rl_questions": len(pool)}
        tree = Tree(ROOT, Path(folder), given)
        copy_run(run_folder(settings), Path(folder, "out", RUN), [start], chains=0)
        first_rows = run_stage("rl2", tree, start)
        sampled = round(mean(row.values["policy_tokens"] for row in first_rows[1:]))
        report(
            take_turns(
                "rl",
                "token",
                "TRL",
                lambda: _by_sampled_token(ours, run_stage("rl2", tree, start)),
                grpo_steps(ours, questions_of_timed_steps(settings, pool), sampled),
                settings.repeats,
                note=f"theirs without a tool, {sampled} tokens a rollout",
            )
        )


def questions_of_timed_steps(
    settings: BenchSettings, pool: Sequence[Question]
) -> list[list[Question]]:
    """Return the questions of each step of RL-2 that counts, as train_rl.py takes them in turn.

    pool: all that it has. Its first step, which does not count, asks the first of them.
    """
    return [
        [
            pool[(step * settings.questions + number) % len(pool)]
            for number in range(settings.questions)
        ]
        for step in range(1, STEPS + 1)
    ]


def _by_sampled_token(ours: Ours, rows: Sequence[StepRow]) -> Timing:
    """Return what steps of RL-2 took, by their log; a unit is a token that the policy wrote."""
    timing = time_stage("rl2", ours, rows)
    rollouts = ours.settings.questions * ours.settings.rollouts
    sampled = rollouts * sum(row.values["policy_tokens"] for row in rows[1:])
    return dataclasses.replace(timing, units=sampled)


# ---- what both sides get -------------------------------------------------------------------------
def different_prompts(ours: Ours, task: Task) -> list[list[int]]:
    """Return the prompts of as many different questions as a step has rollouts."""
    count = ours.settings.questions * ours.settings.rollouts
    questions = task.questions("rl2", count)
    return [ours.lm.codec.prompt(question.question) for question in questions]


def sft_steps(ours: Ours) -> list[list[Trajectory]]:
    """Return some optimizer steps of SFT-2: chains of a run, lengths mixed."""
    rng = random.Random(ours.settings.seed)
    steps = optimizer_steps(_chains(ours), ours.settings.batch_tokens, rng)
    return steps[:SFT_STEPS]


def texts_of_middle_length(ours: Ours) -> list[Trajectory]:
    """Return the texts of an optimizer step that learns all tokens and has little to pad."""
    chains = sorted(_chains(ours), key=lambda chain: len(chain.ids))
    middle = len(chains) // 2
    half = ADAPTER_ROWS // 2
    texts = chains[max(0, middle - half) : middle + half]
    return [Trajectory(text.ids, [1] * len(text.ids), text.role) for text in texts]


def _chains(ours: Ours) -> list[Trajectory]:
    """Return chains of the run's SFT data. Raises UserError where there is none."""
    folder = run_folder(ours.settings) / "data"
    chains = read_trajectories(folder / "coa.jsonl")[:CHAINS]
    if not chains:
        raise UserError(f"{folder} holds no chains; train with a larger --coa")
    return chains + read_trajectories(folder / "cot.jsonl")[: CHAINS // 5]
