"""What a stage leaves on the disk while it is trained: logs that grow, and checkpoints.

out/nano/
    rl2.partial/         log.jsonl, rollouts.jsonl, calls.jsonl
    rl2.checkpoint/24/   weights, optimizer, and how long each log was after 24 steps
    rl2.checkpoint/36/   the same after 36 steps; the last two checkpoints are kept
    rl2.checkpoint/best/16/    weights after 16 steps, which did best on validation questions

A checkpoint knows its files, and the logs up to it, by their checksums. --resume takes the newest
one of which all is as it was saved.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ranks
from common.errors import DiskError
from common.files import (
    CHECKSUMS_FILE,
    append_jsonl,
    checksum,
    damaged_file,
    parse_json,
    sync,
    to_json,
    write_text,
    writing,
)
from common.settings import TrainingSettings
from model import LM

LOG_FILES = ("log.jsonl", "rollouts.jsonl", "calls.jsonl")
LOG_ENDS_FILE = "log_ends.json"  # in a checkpoint
REWARD_FILE = "reward.json"  # beside the best weights
CHECKPOINTS_KEPT = 2
# A kill costs this time at most, or one step ..
SECONDS_BETWEEN_SAVES = 30.0
# .. unless saving would then take more than this share of the time.
SHARE_OF_SAVING = 0.05


def partial_of(folder: Path) -> Path:
    """Return where the logs of an unfinished stage are."""
    return folder.with_name(folder.name + ".partial")


def checkpoint_of(folder: Path) -> Path:
    """Return where the checkpoints of an unfinished stage are."""
    return folder.with_name(folder.name + ".checkpoint")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of an unfinished stage, the oldest first. folder: of the stage."""
    return _saved_in(checkpoint_of(folder))


def _saved_in(folder: Path) -> list[Path]:
    """Return the networks in a folder whose names are numbers of steps, the oldest first."""
    found = [
        path
        for path in folder.glob("*")
        if path.name.isdecimal() and (path / "config.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name))


def _save_with_file(
    lm: LM, path: Path, name: str, text: str, optimizer: Any = None, steps: int | None = None
) -> None:
    """Save a network with one more file, which its checksums cover.

    Raises DiskError where the disk refuses; then half a folder takes no room.
    """
    partial = partial_of(path)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write_text(partial / name, text)
        lm.save(path, optimizer, steps)
    except DiskError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# ---- logs ----------------------------------------------------------------------------------------
@dataclass
class LogEnd:
    """How far a log went when a checkpoint was saved."""

    size: int  # bytes
    sha256: str  # of these bytes


def read_log_ends(checkpoint: Path) -> dict[str, LogEnd]:
    """Return how far each log went when a checkpoint was saved."""
    content = parse_json((checkpoint / LOG_ENDS_FILE).read_text(encoding="utf-8"))
    return {name: LogEnd(**end) for name, end in content.items()}


class StageLog:
    """JSON lines of a stage: log.jsonl, a line a step; rollouts.jsonl; in RL also calls.jsonl.

    They are in <folder>.partial until the stage is complete and LM.save takes them along.
    """

    steps: list[dict[str, Any]]  # the lines of log.jsonl so far
    calls: list[dict[str, Any]]  # the lines of calls.jsonl that a resumed stage begins with

    def __init__(self, folder: Path, ends: Mapping[str, LogEnd] | None = None) -> None:
        """Cut the logs off where they ended when the checkpoint was saved, and remove all else.

        ends: of the checkpoint that a stage goes on from; none where it begins.
        """
        self.folder = partial_of(folder)
        ranks.of_first(lambda: self._cut_off(ends or {}))
        self.steps = self._read("log.jsonl")
        self.calls = self._read("calls.jsonl")
        seconds_before = self.steps[-1]["seconds"] if self.steps else 0.0
        self.started = time.time() - seconds_before

    def _cut_off(self, ends: Mapping[str, LogEnd]) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in ends:
                    path.unlink()
            for name, end in ends.items():
                os.truncate(self.folder / name, end.size)
        append_jsonl(self.folder / "log.jsonl", [])

    def write(self, **figures: Any) -> None:
        """Append the figures of one step, and the seconds since the stage began.

        A figure that is not finite is null.
        """
        figures["seconds"] = time.time() - self.started
        rounded = {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in figures.items()
        }
        self.append("log.jsonl", [rounded])
        self.steps.append(rounded)

    def append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows to one of the files."""
        if ranks.is_first():
            append_jsonl(self.folder / name, rows)

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.is_file():
            return []
        return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- checkpoints ---------------------------------------------------------------------------------
class Checkpoint:
    """Weights and optimizer of an unfinished stage, saved now and then in <folder>.checkpoint."""

    steps_done: int  # steps up to the checkpoint that --resume goes on from; 0 without one
    log_ends: dict[str, LogEnd] | None  # of that checkpoint

    def __init__(self, lm: LM, optimizer: Any, folder: Path, settings: TrainingSettings) -> None:
        """Read the newest whole checkpoint into the network and its optimizer."""
        self.lm = lm
        self.optimizer = optimizer
        self.folder = folder
        self.merges_adapter = settings.lora_merge
        self.path = checkpoint_of(folder)
        self.steps_done = 0
        self.log_ends = None
        newest = ranks.of_first(self._newest_whole)
        if newest is not None:
            steps_done = lm.resume(newest, optimizer)
            assert steps_done is not None, "resume counts steps where it is given an optimizer"
            self.steps_done = steps_done
            self.log_ends = read_log_ends(newest)
        self.steps_saved = self.steps_done
        self.seconds_of_saving = 0.0
        self.saved_at = time.monotonic()

    def _newest_whole(self) -> Path | None:
        """Return the newest checkpoint of which all is as it was saved, and remove newer ones."""
        for path in reversed(list_checkpoints(self.folder)):
            fault = damaged_file(path) or self._damaged_log(path)
            if fault is None:
                return path
            print(f"{fault} is not as it was saved: {path} is left out, for the state before it")
            shutil.rmtree(path)
        return None

    def _damaged_log(self, checkpoint: Path) -> Path | None:
        """Return the first log that was changed before its end in a checkpoint."""
        for file in (CHECKSUMS_FILE, LOG_ENDS_FILE):
            if not (checkpoint / file).is_file():
                return checkpoint / file
        for name, end in read_log_ends(checkpoint).items():
            log = partial_of(self.folder) / name
            if not log.is_file() or checksum(log, end.size) != end.sha256:
                return log
        return None

    def save_if_due(self, steps: int) -> None:
        """Save after a step, if the last time is long enough ago. steps: how many are done."""
        wait = max(SECONDS_BETWEEN_SAVES, self.seconds_of_saving * (1 / SHARE_OF_SAVING - 1))
        if time.monotonic() - self.saved_at >= wait:
            self.save(steps)

    def save(self, steps: int) -> None:
        """Save the state after a step, and keep the one before it; the first process does.

        Raises DiskError where the disk refuses; then half a checkpoint takes no room.
        """
        if steps == self.steps_saved or not ranks.is_first():
            return
        started = time.monotonic()
        log_ends = self._log_ends_to_json()
        path = self.path / str(steps)
        _save_with_file(self.lm, path, LOG_ENDS_FILE, log_ends, self.optimizer, steps)
        for old in list_checkpoints(self.folder)[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old)
        self.steps_saved = steps
        self.saved_at = time.monotonic()
        self.seconds_of_saving = self.saved_at - started

    def _log_ends_to_json(self) -> str:
        ends = {}
        for name in LOG_FILES:
            log = partial_of(self.folder) / name
            if log.is_file():
                sync(log)
                ends[name] = asdict(LogEnd(log.stat().st_size, checksum(log)))
        return to_json(ends)

    def finish(self) -> None:
        """Save the finished stage, and remove its checkpoints."""
        if self.merges_adapter and self.lm.network.lora:
            self.lm.backend.merge_adapter(self.lm.network)
        self.lm.save(self.folder)
        if ranks.is_first():
            shutil.rmtree(self.path, ignore_errors=True)


# ---- the best weights ----------------------------------------------------------------------------
@dataclass
class Best:
    """Which weights of a stage did best on validation questions."""

    steps: int  # of the stage, after which they were measured
    reward: float  # mean of these questions


class BestWeights:
    """The weights of an unfinished stage that did best on validation questions.

    Weights that were the best once stay in <folder>.checkpoint/best/<steps> as long as one of the
    stage's checkpoints is older than what has replaced them: a stage that goes on from there needs
    them.
    """

    best: Best | None  # None before anything was measured

    def __init__(self, lm: LM, folder: Path, steps_done: int) -> None:
        """Find the best of the steps that are done, and remove what else is there.

        steps_done: the steps after which a stage goes on; what came later is measured again.
        """
        self.lm = lm
        self.folder = folder
        self.path = checkpoint_of(folder) / "best"
        self.best = ranks.of_first(lambda: self._find_best(steps_done))

    def _find_best(self, steps_done: int) -> Best | None:
        best = None
        for path in self.path.glob("*"):
            if not path.name.isdecimal() or int(path.name) >= steps_done:
                shutil.rmtree(path)
        for path in _saved_in(self.path):
            fault = damaged_file(path)
            if not (path / CHECKSUMS_FILE).is_file():
                fault = path / CHECKSUMS_FILE
            if fault is not None:
                print(f"{fault} is not as it was saved: {path} is left out")
                shutil.rmtree(path)
                continue
            # A later one was better than all before it.
            content = parse_json((path / REWARD_FILE).read_text(encoding="utf-8"))
            best = Best(int(path.name), content["reward"])
        return best

    def keep_if_best(self, steps: int, reward: float) -> None:
        """Save the weights as they are now, unless others had as high a reward; the first process.

        steps: of the stage that are done. Raises DiskError where the disk refuses.
        """
        if self.best is not None and reward <= self.best.reward:
            return
        self.best = Best(steps, reward)
        if not ranks.is_first():
            return
        text = to_json({"reward": reward})
        _save_with_file(self.lm, self.path / str(steps), REWARD_FILE, text)
        checkpoints = list_checkpoints(self.folder)
        oldest = int(checkpoints[0].name) if checkpoints else 0
        before_all_checkpoints = [path for path in _saved_in(self.path) if int(path.name) < oldest]
        for path in before_all_checkpoints[:-1]:
            shutil.rmtree(path)

    def load(self) -> Best:
        """Read the best weights into the network, and return which they are.

        Raises UserError where they are not as they were saved.
        """
        assert self.best is not None, "weights are measured before a stage ends with the best"
        # Of several processes the first has to have saved them, and removes them next.
        ranks.wait()
        self.lm.resume(self.path / str(self.best.steps))
        ranks.wait()
        return self.best
