"""Put the paper's claims to the test: every row of its table, for several seeds.

    bash reproduce.sh                 # seeds 0 to 4, two side by side, at most five hours
    bash reproduce.sh --hours=2       # again: it goes on where it stopped
    bash reproduce.sh --page          # only writes the page from what is there

A seed is a run of its own, out/seed0 and so on, trained with the default settings; rows that are
there are not trained again. What interrupts it loses a step at most. What a finished seed says is
kept in docs/reproduction/seed0.json, and docs/reproduction.md and its figures are written from
these files. A seed that has one is done: remove the file, and out/seed0, to have it trained anew.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.settings import AboveZero, AboveZeroFloat, CommaList, RunSettings, main
from evaluation.claims import AGENTS, RL1, RL2_ALONE, RL2_FROM_SFT2, RL12, SFT2_ALONE, WORKFLOWS
from evaluation.figures import read_figures
from evaluation.reproduction_page import write_page
from evaluation.seed_results import read_results, read_run, write_results
from speed.trees import commit_name

SECONDS_BETWEEN_LOOKS = 0.5  # at the processes
LOG_FILE = "reproduce.log"  # in the folder of a run


@dataclass(kw_only=True)
class ReproductionSettings(RunSettings):
    """The settings of evaluation/reproduction.py."""

    # Seeds to train; each is a run named after it.
    seeds: CommaList = field(default_factory=lambda: ["0", "1", "2", "3", "4"])
    # Stop after so many hours; the same command goes on.
    hours: AboveZeroFloat = 5.0
    # Seeds that are trained side by side, each with its share of the cores.
    side_by_side: AboveZero = 2
    # Train nothing: write the page from the seeds that are kept.
    page: bool = False


# ---- 1. What is trained for a seed ---------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One command of a seed."""

    name: str
    command: tuple[str, ...]  # a script and its options
    folders: tuple[str, ...]  # the stages that it trains; none: it evaluates all of them


ALL_96_STEPS = ("--rl1_steps=0", "--rl2_steps=96")
JOBS = (
    Job("base and SFT", ("train_sft.py",), ("base", "sft1", "sft2", "sft3")),
    Job("RL-1 and RL-2", ("train_rl.py",), ("rl1", "rl2")),
    Job(
        "SFT-2 alone",
        ("train_sft.py", "--stage=sft2", "--start=base", f"--out={SFT2_ALONE}"),
        (SFT2_ALONE,),
    ),
    Job(
        "RL-2 alone",
        ("train_rl.py", "--stage=rl2", "--start=base", f"--out={RL2_ALONE}", *ALL_96_STEPS),
        (RL2_ALONE,),
    ),
    Job(
        "SFT-1&2 + RL-2",
        ("train_rl.py", "--stage=rl2", "--start=sft2", f"--out={RL2_FROM_SFT2}", *ALL_96_STEPS),
        (RL2_FROM_SFT2,),
    ),
    Job("evaluation", ("eval.py", f"--rows={','.join((*WORKFLOWS, *AGENTS))}"), ()),
)


# Rows that practised, and the folders of their stages, one trained from the other.
PRACTICE = {
    RL2_ALONE: (RL2_ALONE,),
    RL1: ("rl1",),
    RL12: ("rl1", "rl2"),
    RL2_FROM_SFT2: (RL2_FROM_SFT2,),
}


def run_name(seed: str, settings: ReproductionSettings) -> str:
    """Return the run of a seed."""
    return f"quick_seed{seed}" if settings.quick else f"seed{seed}"


def is_done(job: Job, root: Path) -> bool:
    """Return whether a job has left all that it makes in the folder of a run."""
    if job.folders:
        return all((root / folder / "config.json").is_file() for folder in job.folders)
    evaluation = root / "eval.json"
    if not evaluation.is_file():
        return False
    if not set(read_figures(evaluation)) >= {*WORKFLOWS, *AGENTS}:
        return False
    stages = [root / folder / "config.json" for other in JOBS for folder in other.folders]
    return all(
        stage.is_file() and stage.stat().st_mtime <= evaluation.stat().st_mtime for stage in stages
    )


def jobs_left(seed: str, settings: ReproductionSettings) -> list[Job]:
    """Return the jobs of a seed that are not done."""
    if results_file(seed, settings).is_file():
        return []
    root = Path("out", run_name(seed, settings))
    return [job for job in JOBS if not is_done(job, root)]


def results_folder(settings: ReproductionSettings) -> Path:
    """Return where finished seeds are kept; the page is beside it."""
    if settings.quick:
        return Path("out", "quick_reproduction")
    return Path("docs", "reproduction")


def results_file(seed: str, settings: ReproductionSettings) -> Path:
    """Return the file that keeps what a finished seed says."""
    return results_folder(settings) / f"seed{seed}.json"


def keep_finished(settings: ReproductionSettings) -> None:
    """Write the file of each seed that is done and has none."""
    for seed in settings.seeds:
        file = results_file(seed, settings)
        if not file.is_file() and not jobs_left(seed, settings):
            rows = (*WORKFLOWS, *AGENTS)
            results = read_run(seed, run_name(seed, settings), commit_name(), rows, PRACTICE)
            write_results(results, file)


# ---- 2. Seeds side by side -----------------------------------------------------------------------
@dataclass
class Lane:
    """A seed that is being trained."""

    seed: str
    jobs: list[Job]  # those that are left; the first one runs
    process: subprocess.Popen[bytes]


def train_seeds(settings: ReproductionSettings) -> None:
    """Train and evaluate what is left, until all is done or the time is over.

    Raises UserError for the seeds whose commands failed, when all others are done.
    """
    deadline = time.monotonic() + 3600 * settings.hours
    waiting = [seed for seed in settings.seeds if jobs_left(seed, settings)]
    lanes: list[Lane] = []
    failed: list[str] = []
    try:
        while (waiting or lanes) and time.monotonic() < deadline:
            while waiting and len(lanes) < settings.side_by_side:
                seed = waiting.pop(0)
                jobs = jobs_left(seed, settings)
                lanes.append(Lane(seed, jobs, begin(jobs[0], seed, settings)))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            lanes = [lane for lane in lanes if goes_on(lane, settings, failed)]
    finally:
        stop([lane.process for lane in lanes])
    if failed:
        raise UserError(f"{'; '.join(failed)}; the same command tries again")


def begin(job: Job, seed: str, settings: ReproductionSettings) -> "subprocess.Popen[bytes]":
    """Start the command of a job, with its share of the cores; its output goes to a file."""
    name = run_name(seed, settings)
    root = Path("out", name)
    root.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // settings.side_by_side)
    command = [sys.executable, *job.command, f"--run={name}", f"--seed={seed}", "--resume"]
    if settings.quick:
        command.append("--quick")
    print(f"{time.strftime('%H:%M')} {name}: {job.name}", flush=True)
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
    """Begin the next job of a seed where one has ended; return whether any runs.

    failed: gets a line where a command has failed.
    """
    status = lane.process.poll()
    if status is None:
        return True
    job = lane.jobs.pop(0)
    root = Path("out", run_name(lane.seed, settings))
    if status or not is_done(job, root):
        failed.append(f"{root.name}: {job.name} ended with status {status}; see {root / LOG_FILE}")
        return False
    if not lane.jobs:
        return False
    lane.process = begin(lane.jobs[0], lane.seed, settings)
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
    try:
        if not settings.page and not settings.dry_run:
            train_seeds(settings)
    finally:
        if not settings.dry_run:
            keep_finished(settings)
            files = [results_file(seed, settings) for seed in settings.seeds]
            kept = [read_results(file) for file in files if file.is_file()]
            if kept:
                folder = results_folder(settings)
                pictures = folder if settings.quick else Path("pictures")
                page = folder.with_suffix(".md")
                write_page(kept, page, pictures)
                print(f"{page}: written from the seeds kept in {folder}")
        for seed in settings.seeds:
            left = jobs_left(seed, settings)
            if left:
                names = ", ".join(job.name for job in left)
                print(f"{run_name(seed, settings)}: left: {names}")


if __name__ == "__main__":
    main(run, ReproductionSettings, __doc__)
