"""What a run remembers of its settings: out/<run>/settings.json.

    {"given": {"seed": 1, ..},               what the command that began the run set
     "stages": {"sft1": {"given": {..},      what the command that trained the stage set
                         "settings": {..},   every setting it was trained with
                         "settings_class": "SFTSettings"}, ..}}

Later commands take what is given from here, so that they need --run alone.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import parse_json, write_text

# What belongs to one command: later commands of the run do not repeat it.
ONE_COMMAND = (
    "run",
    "stage",
    "start",
    "out",
    "resume",
    "sweep",
    "dry_run",
    "ask",
    "cache",
    "data",
    "authors_prompt",
    "rows",
    "compare",
    "runs",
    "clock",
    "judge",
    "teacher",
    "tries",
)

# What makes the network of a run: with another value it is another run's.
RUN_IDENTITY = ("model", "vocab_size", "width", "layers")


@dataclass
class StageRecord:
    """The settings that a stage was trained with."""

    given: dict[str, Any]  # what its command set: command line, config file, and the run's own
    settings: dict[str, Any]  # every setting of its script, defaults too
    settings_class: str  # name of the dataclass that the script reads its settings into


@dataclass
class RunRecord:
    """The content of a run's settings.json; stages in the order in which they were begun."""

    given: dict[str, Any] = field(default_factory=dict)  # what the command that began the run set
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def made_with(self) -> dict[str, Any]:
        """Return the last recorded value of each setting."""
        settings = dict(self.given)
        for stage in self.stages.values():
            settings |= stage.settings
        return settings


def record_file(run: str) -> Path:
    """Return where a run remembers its settings."""
    return Path("out", run, "settings.json")


def read_run_record(run: str) -> RunRecord:
    """Return what a run remembers, nothing for a run that has no settings.json.

    Raises UserError for a file that can't be read.
    """
    path = record_file(run)
    if not path.is_file():
        return RunRecord()
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        stages = {name: StageRecord(**stage) for name, stage in content["stages"].items()}
        return RunRecord(dict(content["given"]), stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not the settings of a run: {error!r}; "
            "remove it, and give all settings on the command line again"
        ) from None


def write_run_record(run: str, record: RunRecord) -> None:
    """Write a run's settings.json; it is whole or not there."""
    write_text(record_file(run), json.dumps(asdict(record), indent=1) + "\n")


def to_remember(given: dict[str, Any]) -> dict[str, Any]:
    """Return what later commands take from what one was given."""
    return {name: value for name, value in given.items() if name not in ONE_COMMAND}


def refuse_another_identity(run: str, record: RunRecord, given: dict[str, Any]) -> None:
    """Raise UserError for a setting that would make this run's network another one."""
    made_with = record.made_with()
    for name in RUN_IDENTITY:
        if name not in given or name not in made_with:
            continue
        if given[name] != made_with[name]:
            raise UserError(
                f"--{name}: run {run!r} was made with {made_with[name]!r}, not {given[name]!r} "
                f"(see {record_file(run)}); leave it out, or name another run with --run"
            )
