"""Kill training and evaluation again and again, and compare the end with that of one go.

    bash test.sh --kills                         # 25 kills of each task on each backend
    PYTHONPATH=. .venv/bin/python tests/kill_campaign.py torch nano 100

A round trains and evaluates a tiny run in a folder of its own. Each command is killed at some
moment, begun again with --resume, killed again, until it comes to its end. Then every file must be
that of the run in one go, but for times, and nothing may be left beside them. There are three kinds
of kills: SIGKILL at a random moment, SIGKILL before a random file operation, and an end in the
midst of a file's content, where the system ends a process whose file grows beyond a limit.

All is in out/kills/, with a line for each kill in kills.jsonl. A campaign that was interrupted goes
on where it was.
"""

import functools
import importlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from file_operations import watched
from small_checkpoint import save_checkpoint
from small_wikipedia import COPIES, about, book, serve_wikipedia, writer
from tqdm import tqdm

import tasks.nano
from common import stage_files
from common.files import CHECKSUMS_FILE, append_jsonl
from common.runs import COST_FILE
from services.cache import Cache

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_sft.py", "train_rl.py", "eval.py")
# The pools of RL have their default size; all else is tiny.
NANO = (
    "--run=tiny --width=64 --layers=1 --base_tokens=24000 --train_scale=1 --coa=60 --cot=20"
    " --pairs=20 --epochs=1 --max_len=160 --rl1_steps=3 --rl2_steps=3 --questions=3 --rollouts=3"
    " --eval_questions=2 --world_model_width=64 --world_model_layers=1 --sweep_share=0.02"
    " --world_model_epochs=2 --batch_rows=64"
).split()
# A random checkpoint, whose pairs SFT-1 learns from: it recalls nothing that acting finds.
REAL = (
    "--run=tiny --model=checkpoint --train_data=questions.jsonl --eval_data=questions.jsonl"
    " --corpus=passages.jsonl --coa=30 --cot=10 --pairs=40 --epochs=1 --max_len=480"
    " --max_observation=60 --rl1_environment=internal --rl1_steps=3 --rl2_steps=3 --questions=2"
    " --rollouts=2 --eval_questions=3 --batch_rows=64"
).split()
# The same from Wikipedia, whose cache outlives the kills of a round; it must end as in one go.
WIKIPEDIA = [argument.replace("passages.jsonl", "wikipedia") for argument in REAL]
TASKS = {"nano": NANO, "real": REAL, "wikipedia": WIKIPEDIA}
# Figures that are times, in logs and reports.
TIMES = {"seconds", "seconds_rollout", "seconds_update", "tokens_per_second", "step_seconds"}
KILLS_OF_A_SCRIPT = 6  # in a round, about


@dataclass
class Kill:
    """How one command is ended."""

    kind: str  # "moment", "operation" or "content"
    place: float  # seconds, or which file operation
    size: int = 0  # "content": bytes that a file may have from that operation on


@dataclass
class Length:
    """How long a script takes in one go."""

    seconds: float
    operations: int


# ---- one process ---------------------------------------------------------------------------------
def run_in_child(
    body: Callable[[], Any],
    kill: Kill | None = None,
    watcher: Callable[[str, str], None] | None = None,
) -> int:
    """Run something in a process of its own, and kill it; return its status, a signal's below zero.

    The process is forked, so that nothing is imported again.
    watcher: called before each file operation, where nothing is to be killed.
    """
    child = os.fork()
    if child == 0:
        status: Any = 1
        # All forked processes share the lock of tqdm, and one that is killed never gives it back.
        tqdm.set_lock(threading.RLock())
        try:
            # A checkpoint after each step, so that each is met by kills.
            stage_files.SECONDS_BETWEEN_SAVES = 0.0
            stage_files.SHARE_OF_SAVING = 1.0
            with watched(watcher or _killer(kill)):
                body()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if kill is not None and kill.kind == "moment":
        end = threading.Timer(kill.place, os.kill, (child, signal.SIGKILL))
        end.start()
        # The process stays known by its number until it is waited for.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        end.cancel()
        end.join()
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    return os.waitstatus_to_exitcode(status)


def _killer(kill: Kill | None) -> Callable[[str, str], None]:
    """Return what is called before each file operation: it ends the process at its place."""
    left = [kill.place if kill is not None and kill.kind != "moment" else -1]

    def watch(operation: str, path: str) -> None:
        left[0] -= 1
        if left[0] != 0 or kill is None:
            return
        if kill.kind == "operation":
            os.kill(os.getpid(), signal.SIGKILL)
        # Python ignores the signal that comes with a file which is too large.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill.size, kill.size))

    return watch


def choose_kill(rng: random.Random, length: Length, kills: float) -> Kill:
    """Return a kill at a random place, so that a script has about so many."""
    kind = rng.choice(["moment", "operation", "content"])
    share = 2 * rng.random() / kills
    if kind == "moment":
        return Kill(kind, share * length.seconds)
    place = 1 + int(share * length.operations)
    return Kill(kind, place, size=int(2 ** rng.uniform(0, 19)))


def run_script(folder: Path, script: str, arguments: list[str]) -> None:
    """Run a script in a folder, with what it prints in a file there."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


# ---- what is left --------------------------------------------------------------------------------
def without_times(value: Any) -> Any:
    """Return a value of a log or a report without what depends on the clock."""
    if isinstance(value, dict):
        return {
            name: without_times(item)
            for name, item in value.items()
            if not (name in TIMES or name.startswith("seconds_of"))
        }
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def content_of(path: Path) -> Any:
    """Return a file's content, as far as a run in one go has the same."""
    if path.name == "log.jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name in (COST_FILE, "eval.json"):
        return without_times(json.loads(path.read_text()))
    if path.name == CHECKSUMS_FILE:
        return {
            name: value for name, value in json.loads(path.read_text()).items() if name != COST_FILE
        }
    if path.name == "settings.json":
        record = json.loads(path.read_text())
        for stage in record["stages"].values():
            stage["settings"].pop("resume")
            stage["given"].pop("resume", None)
        return record
    return path.read_bytes()


def differences(whole: Path, killed: Path) -> list[str]:
    """Return the files in which two runs differ, or that only one of them has."""
    names = {
        path.relative_to(root)
        for root in (whole, killed)
        for path in root.rglob("*")
        if path.is_file()
    }
    found = []
    for name in sorted(names):
        if not (whole / name).is_file():
            found.append(f"{name} is left over")
        elif not (killed / name).is_file():
            found.append(f"{name} is missing")
        elif content_of(whole / name) != content_of(killed / name):
            found.append(f"{name} differs")
    return found


def cached(folder: Path) -> list[Any]:
    """Return what the cache of Wikipedia holds."""
    return Cache(folder / "out" / "wikipedia.sqlite").items()


# ---- a campaign ----------------------------------------------------------------------------------
def prepare(folder: Path, task: str) -> None:
    """Make the folder in which a run's commands are given."""
    folder.mkdir(parents=True)
    if task == "nano":
        return
    save_checkpoint(folder / "checkpoint")
    questions = []
    passages = []
    for number in range(COPIES):
        question = {"id": str(number), "question": f"Who wrote {book(number)}?"}
        questions.append({**question, "golden_answers": [writer(number)]})
        contents = f'"{book(number)}"\n{about(number)}'
        passages.append({"id": str(number), "contents": contents})
    append_jsonl(folder / "questions.jsonl", questions)
    append_jsonl(folder / "passages.jsonl", passages)


def run_whole(folder: Path, arguments: list[str], task: str) -> dict[str, Length]:
    """Run all scripts in one go, and return how long each takes."""
    lengths_file = folder / "lengths.json"
    if not lengths_file.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder, task)
        lengths = {}
        for script in SCRIPTS:
            started = time.monotonic()
            operations = folder / f"{script}.operations"
            status = run_in_child(
                functools.partial(run_script, folder, script, arguments),
                watcher=functools.partial(_note, operations),
            )
            assert status == 0, (folder / "output.txt").read_text()[-3000:]
            count = len(operations.read_text().splitlines())
            lengths[script] = asdict(Length(time.monotonic() - started, count))
        lengths_file.write_text(json.dumps(lengths))
    return {
        script: Length(**length) for script, length in json.loads(lengths_file.read_text()).items()
    }


def _note(log: Path, operation: str, path: str) -> None:
    with open(log, "a") as file:
        file.write(f"{operation} {path}\n")


def campaign(folder: Path, backend: str, task: str, kills: int) -> None:
    """Kill a task's scripts until there are enough kills, and compare the end of each round.

    Raises AssertionError for a round whose end is another than that of the run in one go.
    """
    arguments = [*TASKS[task], f"--backend={backend}"]
    lengths = run_whole(folder / "whole", arguments, task)
    log = folder / "kills.jsonl"
    made = len(log.read_text().splitlines()) if log.is_file() else 0
    while made < kills:
        round_folder = folder / "killed"
        if not round_folder.is_dir():
            prepare(round_folder, task)
        for script in SCRIPTS:
            rng = random.Random(f"{backend} {task} {made} {script}")
            while True:
                # Once there are enough, the round comes to its end.
                kill = (
                    choose_kill(rng, lengths[script], KILLS_OF_A_SCRIPT) if made < kills else None
                )
                body = functools.partial(run_script, round_folder, script, [*arguments, "--resume"])
                status = run_in_child(body, kill)
                if status == 0:
                    break
                assert status < 0, (round_folder / "output.txt").read_text()[-3000:]
                append_jsonl(log, [{"script": script, **asdict(kill or Kill("", 0))}])
                made += 1
        found = differences(folder / "whole" / "out" / "tiny", round_folder / "out" / "tiny")
        if task == "wikipedia":
            assert cached(folder / "whole")
            if cached(folder / "whole") != cached(round_folder):
                found.append("the cache differs")
        assert not found, f"{round_folder}: {found}"
        shutil.rmtree(round_folder)
        print(f"{backend}, {task}: {made} kills, and every end was that of a run in one go")


def hurry() -> None:
    """Import once, and make the worlds once, for all processes that are forked from this one."""
    for script in SCRIPTS:
        importlib.import_module(script.removesuffix(".py"))
    tasks.nano.PRETRAINING_SEEDS = range(1000, 1002)
    tasks.nano.World = functools.cache(tasks.nano.World)
    for world in [
        (0, "train", 1),
        ("0 rl", "train"),
        (0, "eval"),
        (1000, "train"),
        (1001, "train"),
    ]:
        tasks.nano.World(*world)


def main(words: list[str]) -> None:
    """Run the campaigns that are asked for: [backend task kills], or all of them."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    asked = [(backend, task, "25") for backend in ("torch", "mlx") for task in TASKS]
    if words:
        backend, task, kills = words
        asked = [(backend, task, kills)]
    hurry()
    serve_wikipedia()
    for backend, task, kills in asked:
        campaign(ROOT / "out" / "kills" / f"{backend}-{task}", backend, task, int(kills))


if __name__ == "__main__":
    main(sys.argv[1:])
