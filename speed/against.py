"""Stages of this tree and of another commit in turns, on the same weights, by their own scripts."""

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.runs import run_folder
from speed.flops import TRAINING_PASSES, forward_flops, text_flops
from speed.ours import Ours
from speed.pairs import Comparison, Timing
from speed.settings import BenchSettings
from speed.trees import ROOT, StepRow, Tree, check_out, copy_run, cpu_seconds_of_children

NAMES = ("rl2", "rl1", "sft", "whole")
STEPS = 2  # of RL, after a first one in which memory is got
CHAINS = 120  # lines of each file of SFT data that are learned
RUN = "bench"
WHOLE_RUN = "whole"
# Settings of bench.py that are none of the timed scripts', or that are set here.
OWN_SETTINGS = ("against", "only", "repeats", "other_dtype", "run", "start", "quick")
WHOLE_SCRIPTS = ("train_sft.py", "train_rl.py", "eval.py", "plot.py")


def compare_with_commit(ours: Ours, report: Callable[[Comparison], None]) -> None:
    """Time RL-2, RL-1 and SFT-2, or the whole story, in this tree and in another commit's.

    ours: the stage that RL begins with.
    report: is given each comparison when it is done.
    Raises UserError for a commit that git does not know, and where a script fails.
    """
    settings = ours.settings
    names = settings.only or ["rl2", "rl1", "sft"]
    unknown = set(names) - set(NAMES)
    if unknown:
        raise UserError(f"--only: {min(unknown)!r} is not one of {', '.join(NAMES)}")
    given = tree_settings(settings)
    other_given = dict(given)
    if settings.other_dtype:
        other_given["dtype"] = settings.other_dtype
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        check_out(settings.against, code)
        tree = Tree(ROOT, Path(folder, "ours"), given)
        other = Tree(code, Path(folder, "theirs"), other_given)
        for one in (tree, other):
            one.folder.mkdir()
            if names != ["whole"]:
                stages = dict.fromkeys(["base", "sft1", ours.folder.name])
                copy_run(run_folder(settings), one.folder / "out" / RUN, list(stages), CHAINS)
        for name in names:
            if name == "whole":
                report(_compare_whole(settings, tree, other))
            else:
                report(_compare_stage(name, ours, tree, other))


def tree_settings(settings: BenchSettings) -> dict[str, Any]:
    """Return the settings that a tree's scripts are given: those of the run, and of the command."""
    return {name: value for name, value in settings.given.items() if name not in OWN_SETTINGS}


def _compare_whole(settings: BenchSettings, tree: Tree, other: Tree) -> Comparison:
    """Run all scripts from the first to the last in both trees in turns."""
    pairs = [(whole_story(tree), whole_story(other)) for _ in range(settings.repeats)]
    note = f"CPU seconds; EM of the last row: {last_em(tree)} and {last_em(other)}"
    return Comparison("whole", "run", settings.against, pairs, note)


def _compare_stage(name: str, ours: Ours, tree: Tree, other: Tree) -> Comparison:
    """Train a few steps of a stage in both trees in turns."""
    settings = ours.settings
    start = ours.folder.name
    logs = [
        (run_stage(name, tree, start), run_stage(name, other, start))
        for _ in range(settings.repeats)
    ]
    pairs = [
        (time_stage(name, ours, rows), time_stage(name, ours, others)) for rows, others in logs
    ]
    unit = "token" if name == "sft" else "step"
    comparison = Comparison(name, unit, settings.against, pairs)
    tokens = statistics.median(_tokens_of(rows) / len(rows[1:]) for rows, _ in logs)
    other_tokens = statistics.median(_tokens_of(rows) / len(rows[1:]) for _, rows in logs)
    comparison.note = f"{tokens:,.0f} and {other_tokens:,.0f} tokens a step"
    if unit == "step":
        # The commits may ask other questions, whose rollouts are longer or shorter.
        by_token = [
            (_by_token(timing, rows), _by_token(other_timing, other_rows))
            for (timing, other_timing), (rows, other_rows) in zip(pairs, logs, strict=True)
        ]
        ratio = Comparison(name, "token", settings.against, by_token).ratio
        comparison.note += f"; by the token {ratio.median:.2f}"
    return comparison


def run_stage(name: str, tree: Tree, start: str) -> list[StepRow]:
    """Train a few steps of a stage; return its log. name: rl2, rl1 or sft."""
    if name == "sft":
        return tree.train("train_sft.py", RUN, "--stage=sft2", "--start=sft1", "--epochs=1")
    steps = STEPS + 1
    if name == "rl2":
        stage = ["--stage=rl2", "--rl1_steps=0", f"--rl2_steps={steps}", "--rl2_environment=real"]
    else:
        # Where environments were no setting yet, the policy imagined the world that SFT read about.
        stage = ["--stage=rl1", f"--rl1_steps={steps}", "--rl1_environment=internal"]
        stage += ["--rl1_pool=rl1", "--rl1_call_cost=0"]
    return tree.train("train_rl.py", RUN, f"--start={start}", *stage)


def time_stage(name: str, ours: Ours, rows: Sequence[StepRow]) -> Timing:
    """Return what the steps after the first took; a unit is a step of RL, or a token of SFT.

    A step is all of it, with what is logged about it and what is kept.
    """
    steps = rows[1:]
    if not steps:
        raise UserError("--against: a stage had one step alone; take a run with more SFT data")
    seconds = steps[-1].seconds - rows[0].seconds
    if name == "sft":
        tokens = sum(row.tokens for row in steps)
        # The log has no lengths of single texts, so what tokens look back at is left out.
        flops = TRAINING_PASSES * forward_flops(ours.config, tokens, keys=0, predicted=tokens)
        return Timing(seconds, tokens, flops)
    flops = sum(_rl_flops(ours, row) for row in steps)
    return Timing(seconds, len(steps), flops)


def _rl_flops(ours: Ours, row: StepRow) -> float:
    """Return the operations of a step of RL, by its log: rollouts, and an update on what teaches.

    Tokens that rollouts share count once where the tree computes them once (`shared_tokens`).
    """
    length = round(row.values["length"])
    rollouts = row.tokens / row.values["length"]
    once = text_flops(ours.config, [length], row.values["policy_tokens"]) * rollouts
    distinct = 1 - row.values.get("shared_tokens", 0.0)
    learned = 1 - row.values["skipped_groups"] / ours.settings.questions
    return once * distinct * (1 + TRAINING_PASSES * learned)


def _by_token(timing: Timing, rows: Sequence[StepRow]) -> Timing:
    """Return what some steps took, by a token of their rollouts in place of a step."""
    return dataclasses.replace(timing, units=_tokens_of(rows))


def _tokens_of(rows: Sequence[StepRow]) -> int:
    """Return the tokens of the steps that count: all but the first."""
    return sum(row.tokens for row in rows[1:])


def whole_story(tree: Tree) -> Timing:
    """Run all scripts from the first to the last; return the CPU seconds that they took."""
    before = cpu_seconds_of_children()
    for script in WHOLE_SCRIPTS:
        tree.run(script, WHOLE_RUN, [])
    return Timing(cpu_seconds_of_children() - before, 1, 0.0)


def last_em(tree: Tree) -> str:
    """Return the exact match of the last row of the table that a tree has made, with its 95%."""
    rows = json.loads((tree.folder / "out" / WHOLE_RUN / "eval.json").read_text())["rows"]
    average = list(rows.values())[-1]["avg"]
    return f"{average['em']:.1f} ({average['em_low']:.1f} to {average['em_high']:.1f})"
