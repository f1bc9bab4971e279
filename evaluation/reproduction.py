"""Put the paper's claims to the test: every row of its table, for several seeds.

    bash reproduce.sh                 # seeds 0 to 4, two side by side, at most five hours
    bash reproduce.sh --hours=2       # again: it goes on where it stopped
    bash reproduce.sh --page          # only writes the page from what is kept

A seed is a run of its own, out/seed0 and so on, trained with the default settings. Its rows are
evaluated as soon as they are trained, and kept in docs/reproduction/seed0.json; a row that is kept
is not trained again. What interrupts it loses a step at most. It prints what is left, and writes
docs/reproduction.md and its figures from what is kept. To have a seed trained anew, remove its file
and out/seed0.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run_record import RunRecord, read_run_record, record_file
from common.settings import AboveZero, AboveZeroFloat, CommaList, RunSettings, main
from config.nano import QUICK
from evaluation.claims import (
    RL1,
    RL2_ALONE,
    RL2_FROM_SFT2,
    RL12,
    SFT1,
    SFT2_ALONE,
    SFT12,
    SFT123,
    WORKFLOWS,
)
from evaluation.reproduction_page import write_page
from evaluation.seed_results import SeedResults, read_results, read_run, write_results
from speed.trees import commit_name

SECONDS_BETWEEN_LOOKS = 0.5  # at the processes
LOG_FILE = "reproduce.log"  # in the folder of a run
EVALUATION = "evaluation of "  # the name of a step, before that of its job


@dataclass(kw_only=True)
class ReproductionSettings(RunSettings):
    """The settings of evaluation/reproduction.py."""

    # Seeds to train; each is a run named after it.
    seeds: CommaList = field(default_factory=lambda: ["0", "1", "2", "3", "4"])
    # Stop after so many hours; the same command goes on.
    hours: AboveZeroFloat = 5.0
    # Seeds that are trained side by side, each with its share of the cores.
    side_by_side: AboveZero = 2
    # Train nothing: write the page from what is kept.
    page: bool = False


# ---- 1. What is trained for a seed ---------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """Some stages of a seed, and the rows of the table that they give."""

    name: str
    script: str
    options: tuple[str, ...]
    folders: tuple[str, ...]  # the stages that it trains
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One command of a seed: it trains the stages of a job, or evaluates its rows."""

    name: str
    command: tuple[str, ...]  # a script and its options
    rows: tuple[str, ...] = ()  # that it evaluates


SFT = Job(
    "base and SFT",
    "train_sft.py",
    (),
    folders=("base", "sft1", "sft2", "sft3"),
    rows=(*WORKFLOWS, SFT1, SFT12, SFT123),
)
JOBS = (
    SFT,
    Job("RL-1 and RL-2", "train_rl.py", (), folders=("rl1", "rl2"), rows=(RL1, RL12)),
    Job(
        "SFT-2 alone",
        "train_sft.py",
        ("--stage=sft2", "--start=base", "--out=sft2_alone"),
        folders=("sft2_alone",),
        rows=(SFT2_ALONE,),
    ),
    Job(
        "RL-2 alone",
        "train_rl.py",
        ("--stage=rl2", "--start=base", "--out=rl2_alone", "--rl1_steps=0", "--rl2_steps=96"),
        folders=("rl2_alone",),
        rows=(RL2_ALONE,),
    ),
    Job(
        "SFT-1&2 + RL-2",
        "train_rl.py",
        ("--stage=rl2", "--start=sft2", "--out=rl2_from_sft2", "--rl1_steps=0", "--rl2_steps=96"),
        folders=("rl2_from_sft2",),
        rows=(RL2_FROM_SFT2,),
    ),
)
# Folders that stages make beside their own.
MADE_BESIDE = ("data", "world_model")
# What a run is given by itself: its seed, what --dtype=auto became, and larger sizes on a GPU.
OF_THE_DEVICE = ("seed", "dtype", "micro_tokens", "batch_rows")
# In the short form, too, as many steps as RL-1 and RL-2 have together.
ALL_STEPS = "--rl2_steps=96"
QUICK_STEPS = f"--rl2_steps={QUICK['rl1_steps'] + QUICK['rl2_steps']}"
# Rows that practised, and the folders of their stages, one trained from the other.
PRACTICE = {
    RL2_ALONE: ("rl2_alone",),
    RL1: ("rl1",),
    RL12: ("rl1", "rl2"),
    RL2_FROM_SFT2: ("rl2_from_sft2",),
}


def run_name(seed: str, settings: ReproductionSettings) -> str:
    """Return the run of a seed."""
    return f"quick_seed{seed}" if settings.quick else f"seed{seed}"


def results_folder(settings: ReproductionSettings) -> Path:
    """Return where finished rows are kept; the page is beside it."""
    if settings.quick:
        return Path("out", "quick_reproduction")
    return Path("docs", "reproduction")


def results_file(seed: str, settings: ReproductionSettings) -> Path:
    """Return the file that keeps what a seed says."""
    return results_folder(settings) / f"seed{seed}.json"


def kept_rows(seed: str, settings: ReproductionSettings) -> set[str]:
    """Return the rows of a seed that need not be made again."""
    file = results_file(seed, settings)
    return set(read_results(file).answers) if file.is_file() else set()


def steps_left(seed: str, settings: ReproductionSettings) -> list[Step]:
    """Return the commands of a seed that are left.

    The stages of SFT are trained for the other rows too, where their folders are gone.
    """
    root = Path("out", run_name(seed, settings))
    kept = kept_rows(seed, settings)
    jobs = [job for job in JOBS if not kept.issuperset(job.rows)]
    steps = []
    for job in JOBS:
        is_trained = all((root / folder / "config.json").is_file() for folder in job.folders)
        if not is_trained and (job in jobs or (jobs and job is SFT)):
            steps.append(Step(job.name, (job.script, *job.options)))
        if job in jobs:
            command = ("eval.py", f"--rows={','.join(job.rows)}")
            steps.append(Step(f"{EVALUATION}{job.name}", command, job.rows))
    return steps


def keep_rows(seed: str, rows: Sequence[str], settings: ReproductionSettings) -> None:
    """Add rows that are evaluated to the file of a seed."""
    file = results_file(seed, settings)
    found = read_run(seed, run_name(seed, settings), commit_name(), rows, PRACTICE)
    results = read_results(file) if file.is_file() else SeedResults(seed, {}, {})
    results.add(found)
    write_results(results, file)


def refuse_other_settings(seed: str, settings: ReproductionSettings) -> None:
    """Raise UserError where a seed's rows were not trained with the default settings."""
    if settings.quick:
        return
    name = run_name(seed, settings)
    given = _given_otherwise(read_run_record(name))
    if given:
        options = ", ".join(f"--{name}={value}" for name, value in given.items())
        raise UserError(
            f"{record_file(name)}: this run was given {options}, and the paper's rows are trained "
            f"with the default settings; rename or remove {record_file(name).parent}"
        )


def _given_otherwise(record: RunRecord) -> dict[str, Any]:
    """Return what a run was given, or its stages of the table, beside what their jobs give."""
    given = dict(record.given)
    for job in JOBS:
        own = {option.removeprefix("--").partition("=")[0] for option in job.options}
        for folder in (*job.folders, *MADE_BESIDE):
            stage = record.stages.get(folder)
            if stage is not None:
                given |= {name: value for name, value in stage.given.items() if name not in own}
    return {name: value for name, value in given.items() if name not in OF_THE_DEVICE}


# ---- 2. Seeds side by side -----------------------------------------------------------------------
@dataclass
class Lane:
    """A seed that is being trained."""

    seed: str
    steps: list[Step]  # those that are left; the first one runs
    process: subprocess.Popen[bytes]


def train_seeds(settings: ReproductionSettings) -> None:
    """Train and evaluate what is left, until all is done or the time is over.

    Raises UserError for the seeds whose commands failed, when all others are done.
    """
    deadline = time.monotonic() + 3600 * settings.hours
    waiting = [seed for seed in settings.seeds if steps_left(seed, settings)]
    for seed in waiting:
        refuse_other_settings(seed, settings)
    lanes: list[Lane] = []
    failed: list[str] = []
    try:
        while (waiting or lanes) and time.monotonic() < deadline:
            while waiting and len(lanes) < settings.side_by_side:
                seed = waiting.pop(0)
                steps = steps_left(seed, settings)
                lanes.append(Lane(seed, steps, begin(steps[0], seed, settings)))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            lanes = [lane for lane in lanes if goes_on(lane, settings, failed)]
    finally:
        stop([lane.process for lane in lanes])
    if failed:
        raise UserError(f"{'; '.join(failed)}; the same command tries again")


def begin(step: Step, seed: str, settings: ReproductionSettings) -> "subprocess.Popen[bytes]":
    """Start the command of a step, with its share of the cores; its output goes to a file."""
    name = run_name(seed, settings)
    root = Path("out", name)
    root.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // settings.side_by_side)
    command = [sys.executable, *step.command, f"--run={name}", f"--seed={seed}", "--resume"]
    if settings.quick:
        command = [QUICK_STEPS if part == ALL_STEPS else part for part in command]
        command.append("--quick")
    print(f"{time.strftime('%H:%M')} {name}: {step.name}", flush=True)
    with (root / LOG_FILE).open("ab") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            # Ctrl-C comes to this process alone, which then ends the others.
            start_new_session=True,
        )


def goes_on(lane: Lane, settings: ReproductionSettings, failed: list[str]) -> bool:
    """Keep rows that are evaluated and begin the next step of a seed; return whether any runs.

    failed: gets a line where a command has failed.
    """
    status = lane.process.poll()
    if status is None:
        return True
    step = lane.steps.pop(0)
    name = run_name(lane.seed, settings)
    if status:
        log = Path("out", name, LOG_FILE)
        failed.append(f"{name}: {step.name} ended with status {status}; see {log}")
        return False
    if step.rows:
        try:
            keep_rows(lane.seed, step.rows, settings)
        except UserError as error:
            # The other seeds go on.
            failed.append(str(error))
            return False
    if not lane.steps:
        return False
    lane.process = begin(lane.steps[0], lane.seed, settings)
    return True


def stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Let commands save what they have done, and wait until they have."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


# ---- the script ----------------------------------------------------------------------------------
def run(settings: ReproductionSettings) -> None:
    """Train what is left, write the page, and print what is left still."""
    refuse_settings_of_others(settings)
    if not settings.page:
        print_what_is_kept(settings)
    try:
        if not settings.page and not settings.dry_run:
            train_seeds(settings)
    finally:
        if not settings.dry_run:
            write_page_of_all(settings)
        for seed in settings.seeds:
            left = steps_left(seed, settings)
            if left:
                print(f"{run_name(seed, settings)}: left: {', '.join(names_of(left))}")


def print_what_is_kept(settings: ReproductionSettings) -> None:
    """Say which seeds have nothing left to train; all five come with a clone."""
    done = [seed for seed in settings.seeds if not steps_left(seed, settings)]
    if done:
        print(
            f"seeds {', '.join(done)}: all rows are kept in {results_folder(settings)}; to train "
            f"one anew, remove its file there and {Path('out', run_name('N', settings))}, or give "
            "--seeds others"
        )


def names_of(steps: Sequence[Step]) -> list[str]:
    """Return the names of steps. What is to be trained will be evaluated, and is named once."""
    trainings = [step.name for step in steps if not step.rows]
    evaluations = [
        step.name
        for step in steps
        if step.rows and step.name.removeprefix(EVALUATION) not in trainings
    ]
    return trainings + evaluations


def write_page_of_all(settings: ReproductionSettings) -> None:
    """Write the page from all seeds that are kept, those too that were not asked for now."""
    folder = results_folder(settings)
    results = [read_results(file) for file in folder.glob("seed*.json")]
    if not results:
        return
    results.sort(key=lambda one: int(one.seed))
    pictures = folder if settings.quick else Path("pictures")
    page = folder.with_suffix(".md")
    write_page(results, page, pictures, settings.quick)
    print(f"{page}: written from what is kept in {folder}")


def refuse_settings_of_others(settings: ReproductionSettings) -> None:
    """Raise UserError for what are no seeds, and for a setting that nothing is trained with."""
    are_numbers = all(seed.isdecimal() and seed == str(int(seed)) for seed in settings.seeds)
    if not are_numbers or len(set(settings.seeds)) < len(settings.seeds):
        raise UserError(f"--seeds: {','.join(settings.seeds)!r} are not different whole numbers")
    own = {item.name for item in fields(ReproductionSettings)} - {"run", "seed"}
    short_form = QUICK if settings.quick else {"run": RunSettings.run}
    for name, value in settings.given.items():
        if name not in own and short_form.get(name) != value:
            raise UserError(
                f"--{name}: not used here; all rows are trained with the default settings, "
                "into runs named after their seeds (--seeds)"
            )


if __name__ == "__main__":
    # Each seed is a run of its own; the one that --run names by default has nothing to say here.
    main(run, ReproductionSettings, __doc__, begins_run=lambda settings: True)
