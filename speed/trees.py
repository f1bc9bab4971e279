"""This tree and another commit's, each with its own scripts, run by the same Python.

What is asked of a tree is what has not changed since the project's first versions: the names of
its scripts and settings, stage folders and SFT data in out/<run>, and `seconds` and `tokens` in
log.jsonl. A setting that a script does not know yet is not given to it.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# Settings that name files: a tree is run in a folder of its own.
FILES = ("model", "train_data", "eval_data", "corpus", "sft_files")
TIMED = "timed"  # the folder that a timed stage is written to
PAGES = (":!docs", ":!pictures", ":!*.md")  # to git: not these
DATA_FILES = ("coa.jsonl", "cot.jsonl", "pairs.jsonl")


@dataclass
class StepRow:
    """A line of a stage's log: what one step took."""

    seconds: float  # since the stage began
    tokens: int
    values: dict[str, Any]  # the whole line


@dataclass
class Tree:
    """The code of one commit, and a folder with runs in which it is timed."""

    code: Path
    folder: Path
    given: Mapping[str, Any]  # settings, by name
    known: dict[str, str] = field(default_factory=dict)  # the help of each script

    def run(self, script: str, run: str, arguments: Sequence[str]) -> None:
        """Run a script on one of the folder's runs. Raises UserError where it fails.

        arguments: "--name=value" each.
        """
        given = [f"--{name}={_as_text(name, value)}" for name, value in self.given.items()]
        own = [text for text in (*given, *arguments) if self._knows(script, text)]
        self._execute(script, f"--run={run}", *own)

    def _knows(self, script: str, argument: str) -> bool:
        if script not in self.known:
            self.known[script] = self._execute(script, "--help")
        name = argument.partition("=")[0]
        words = self.known[script].replace(",", " ").split()
        return name in words or name.replace("_", "-") in words

    def _execute(self, script: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(self.code / script), *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            # Help is not wrapped.
            env={**os.environ, "COLUMNS": "400"},
        )
        if done.returncode:
            last_lines = " ".join(done.stderr.strip().splitlines()[-3:])
            raise UserError(f"{self.code / script} {' '.join(arguments)}: {last_lines}")
        return done.stdout

    def train(self, script: str, run: str, *arguments: str) -> list[StepRow]:
        """Train one stage of a run into a folder of its own; return its log."""
        root = self.folder / "out" / run
        for leftover in root.glob(f"{TIMED}*"):
            shutil.rmtree(leftover)
        self.run(script, run, [*arguments, f"--out={TIMED}"])
        lines = (root / TIMED / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [StepRow(row["seconds"], row["tokens"], row) for row in rows]


def _as_text(name: str, value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    texts = [str(value) for value in values]
    if name in FILES:
        texts = [str(Path(text).resolve()) if Path(text).exists() else text for text in texts]
    return ",".join(texts)


def copy_run(root: Path, folder: Path, stages: Sequence[str], chains: int) -> None:
    """Copy stages of a run, and a part of its SFT data, to where a tree is timed.

    Its settings.json stays behind: what a tree remembers of a run has changed, so a tree is given
    all settings.
    chains: lines of each data file that are kept; 0: no data is needed.
    Raises UserError where a stage is missing.
    """
    for stage in stages:
        if not (root / stage / "config.json").is_file():
            raise UserError(f"{root / stage} is missing; train the stages of this run first")
        shutil.copytree(root / stage, folder / stage)
    if not chains:
        return
    (folder / "data").mkdir()
    for name in DATA_FILES:
        with open(root / "data" / name) as file:
            kept = [line for line, _ in zip(file, range(chains), strict=False)]
        (folder / "data" / name).write_text("".join(kept))


def check_out(commit: str, folder: Path) -> None:
    """Write the files of another commit into a folder; git itself does not remember it.

    Raises UserError where git does not know the commit.
    """
    archive = _git("archive", "--format=tar", commit)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if done.returncode:
        last_line = done.stderr.decode().strip().splitlines()[-1]
        raise UserError(f"--against: git {' '.join(arguments)}: {last_line}")
    return done.stdout


def commit_name() -> str:
    """Return the commit of this tree, with a plus where not pages alone were changed.

    It is "" without git.
    """
    with contextlib.suppress(UserError, OSError):
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *PAGES)
        commit = _git("rev-parse", "--short", "HEAD").decode().strip()
        return commit + ("+" if changed else "")
    return ""


def cpu_seconds_of_children() -> float:
    """Return the CPU seconds of all programs that this one has run to their ends."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
