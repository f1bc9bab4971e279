"""A grid of settings: each combination is trained, evaluated, and a row of one table.

    python train_rl.py --stage=rl2 --sweep="call_cost=0,0.1;kl=0,0.001"
    python train_rl.py --sweep="seed=1,2"

A setting of RL trains the stages of RL again, from where the run's SFT ended, into folders that are
named after it: out/nano/rl2_clip_high=0.2_kl=0. What SFT or a world model learns by makes a run of
its own, from the base model on: the seed does, and train_sft.py's settings do (out/nano_seed=1).

What is trained is not trained again, and an interrupted stage goes on from its checkpoint: the same
command goes on with a sweep. The table is printed and is in out/<run>/sweep_<grid>.md; seeds are
pooled in it.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import model
import train_sft
from common import ranks, runs
from common.errors import DiskError, UserError
from common.files import only_process, write_text
from common.run_record import ONE_COMMAND, RUN_IDENTITY, read_run_record
from common.settings import (
    NanoModelSettings,
    OptimizerSettings,
    StageSettings,
    build_settings,
    read_setting,
)
from common.signals import end_deferral
from common.stage_files import list_checkpoints
from eval import (
    EvalContext,
    EvalSettings,
    Table,
    TableRow,
    agent,
    ask_what_is_missing,
    open_predictions,
)
from evaluation.figures import percent_cell
from evaluation.markdown import em_text, gain_text, table_head, table_row
from evaluation.statistics import SetPredictions, average_figures, em_of, paired_gain
from tasks import open_task
from world_model import DistillSettings

# What SFT or a world model learns by, of the settings that train_rl.py has too.
OF_A_RUN = (
    {"seed", *RUN_IDENTITY}
    | {item.name for item in fields(NanoModelSettings)}
    | {item.name for item in fields(OptimizerSettings)}
    | set(DistillSettings.__annotations__)
) - {"world_model"}
# What depends on the device, and changes nothing but rounding.
SIZES = {"micro_tokens", "batch_rows"}
# What a stage is looked at with, which changes nothing of it.
OF_LOOKS = {"eval_questions", "eval_every"}
LONGEST_NAME = 200  # letters of a table's file; file systems take 255 bytes
# What no grid is over: it says which folders a command reads and writes, and how.
OF_A_COMMAND = {*ONE_COMMAND, "quick"} - {"start"}


# ---- 1. The grid ---------------------------------------------------------------------------------
class Choice(NamedTuple):
    """A setting with one of the values that a grid has for it."""

    name: str
    text: str  # the value as it was written
    value: Any
    makes_a_run: bool  # it is of what SFT or a world model learns by


@dataclass
class Combination:
    """One point of a grid, and what is trained for it."""

    choices: Sequence[Choice]
    sft_settings: train_sft.SFTSettings | None  # None: the run is there
    commands: list[StageSettings]  # of train_rl.py, one after the other

    @property
    def folder(self) -> Path:
        """What is evaluated: where the last stage is."""
        last = self.commands[-1]
        return runs.run_folder(last) / (last.out or last.stage or runs.RL_STAGES[-1])

    @property
    def seed(self) -> str:
        """The seed as it was written; "" where the grid is not over seeds."""
        return next((choice.text for choice in self.choices if choice.name == "seed"), "")

    @property
    def row_name(self) -> tuple[str, ...]:
        """The values of all other settings: seeds are pooled."""
        return tuple(choice.text for choice in self.choices if choice.name != "seed")


def read_grid(text: str, rl_class: type[StageSettings]) -> list[list[Choice]]:
    """Return for each setting of a grid its choices, "kl=0,0.001;rollouts=3,5".

    Raises UserError for what is no such text, and for a name or value that is no setting's.
    """
    rl_names = {item.name for item in fields(rl_class)}
    sft_names = {item.name for item in fields(train_sft.SFTSettings)}
    grid: dict[str, list[Choice]] = {}
    for part in text.split(";"):
        name, equals, values = part.strip().partition("=")
        name = name.replace("-", "_")
        if not equals or not values or name in grid:
            raise UserError(
                f"--sweep: {part.strip()!r} is not one setting with its values; "
                'write --sweep="kl=0,0.001;rollouts=3,5"'
            )
        choices = []
        for value_text in values.split(","):
            value = read_setting(name, value_text.strip())
            makes_a_run = name in OF_A_RUN or name not in rl_names
            choices.append(Choice(name, value_text.strip(), value, makes_a_run))
        if name in OF_A_COMMAND or name not in rl_names | sft_names:
            raise UserError(f"--sweep: {name!r} is no setting that training depends on")
        if any(choice.value == other.value for choice, other in itertools.combinations(choices, 2)):
            raise UserError(f"--sweep: {part.strip()!r} has a value twice; leave one out")
        grid[name] = choices
    return list(grid.values())


def plan(settings: StageSettings, choices: Sequence[Choice]) -> Combination:
    """Return what one combination trains, and where.

    Raises UserError where --stage asks for a stage that a new run can't begin with.
    """
    of_run = [choice for choice in choices if choice.makes_a_run]
    of_rl = [choice for choice in choices if not choice.makes_a_run]
    given = settings.given | {choice.name: choice.value for choice in choices}
    given |= {"run": "_".join([settings.run, *map(_name, of_run)]), "resume": True, "sweep": ""}
    sft_settings = None
    if of_run:
        if settings.stage == "rl2" and settings.start not in runs.SFT_STAGES:
            raise UserError(
                f"--stage=rl2: {of_run[0].name} makes a new run, which has no rl1 to begin with; "
                "leave --stage out, or name a stage of SFT with --start"
            )
        whole = given | {"stage": "", "start": "", "out": ""}
        sft_settings = build_settings(train_sft.SFTSettings, whole)

    suffix = "_".join([*_origin(settings), *map(_name, of_rl)])
    stages: list[dict[str, str]] = [{"stage": settings.stage}]
    if of_rl and settings.stage:
        stages = [{"stage": settings.stage, "out": f"{settings.stage}_{suffix}"}]
    elif of_rl:
        first = f"rl1_{suffix}"
        stages = [
            {"stage": "rl1", "out": first},
            {"stage": "rl2", "out": f"rl2_{suffix}", "start": first},
        ]
    commands = [build_settings(type(settings), given | stage) for stage in stages]
    return Combination(choices, sft_settings, commands)


def _origin(settings: StageSettings) -> list[str]:
    """Return where training begins as a part of a name; nothing for where it does by default."""
    return [_as_name(f"from_{settings.start.strip('/')}")] if settings.start else []


def _name(choice: Choice) -> str:
    """Return a choice as a part of a folder's name."""
    return _as_name(f"{choice.name}={choice.text}")


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.,=+-]", "_", text)


def table_file(settings: StageSettings, grid: Sequence[Sequence[Choice]]) -> Path:
    """Return where the table of a grid is; another grid has another one.

    Raises UserError for a grid that is too long for the name of a file.
    """
    parts = ["sweep", *filter(None, [settings.stage]), *_origin(settings)]
    for choices in grid:
        values = ",".join(choice.text for choice in choices)
        parts.append(_as_name(f"{choices[0].name}={values}"))
    name = f"{'_'.join(parts)}.md"
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"--sweep: {len(name)} letters would name its table; give fewer values at a time"
        )
    return runs.run_folder(settings) / name


def refuse_other_settings(settings: StageSettings, stages: Sequence[str]) -> None:
    """Raise UserError where a stage that would be kept was trained with other settings."""
    record = read_run_record(settings.run)
    # Where a stage began is of its command, and yet makes it another one.
    ignored = ({*ONE_COMMAND} - {"start"}) | SIZES | OF_LOOKS
    for stage in stages:
        folder = runs.run_folder(settings) / stage
        is_there = (folder / "config.json").is_file() or list_checkpoints(folder)
        if stage not in record.stages or not is_there:
            continue
        # The stage was recorded with the type that --dtype=auto became.
        runs.settle_by_device(settings)
        trained_with = record.stages[stage].settings
        for name, value in asdict(settings).items():
            if name in ignored or name not in trained_with:
                continue
            if trained_with[name] == value:
                continue
            raise UserError(
                f"--sweep: {folder} was trained with --{name}={trained_with[name]}, not {value}; "
                "repeat that, or remove the folder and its checkpoint"
            )


# ---- 2. Training and evaluation ------------------------------------------------------------------
def sweep(grid_text: str, settings: StageSettings, train: Callable[[Any], None]) -> None:
    """Train and evaluate each combination of a grid, and write the table.

    A combination that fails does not keep the others from being trained.

    grid_text: what --sweep was given.
    train: train_rl.py's own `run`.
    Raises UserError for a grid that can't be trained, before anything is, and at the end for the
    combinations that failed.
    """
    _refuse_settings(settings)
    grid = read_grid(grid_text, type(settings))
    path = table_file(settings, grid)
    combinations = [plan(settings, choices) for choices in itertools.product(*grid)]
    for combination in combinations:
        if combination.sft_settings is not None:
            refuse_other_settings(combination.sft_settings, runs.SFT_STAGES)
        for command in combination.commands:
            stages = [command.out or command.stage] if command.stage else runs.RL_STAGES
            refuse_other_settings(command, stages)

    table = SweepTable([choices[0].name for choices in grid if choices[0].name != "seed"])
    failed = []
    for number, combination in enumerate(combinations, 1):
        print(f"sweep: {number} of {len(combinations)}: {combination.folder}", flush=True)
        try:
            answers = train_and_evaluate(combination, train)
        except DiskError:
            raise
        except UserError as error:
            # A stage that failed has left signals waiting for the end of its step.
            end_deferral()
            print(f"{combination.folder}: {error}")
            failed.append(str(combination.folder))
            continue
        table.add(combination, answers)

    if table.rows:
        print(f"{table.to_markdown()}\n\n{path}")
        if ranks.is_first():
            write_text(path, table.to_markdown() + "\n")
    if failed:
        raise UserError(
            f"--sweep: {', '.join(failed)}: not trained, for the reasons above; "
            "the same command tries them again"
        )


def _refuse_settings(settings: StageSettings) -> None:
    """Raise UserError for what goes with one training alone."""
    if settings.out or settings.dry_run:
        raise UserError("--sweep: it names its folders by itself, and has no --out or --dry_run")
    if settings.given.get("stop_on_alarm") and not settings.stage:
        raise UserError(
            "--stop_on_alarm: a stage that it ends has none after it, and a sweep needs both; "
            "name one with --stage"
        )


def train_and_evaluate(combination: Combination, train: Callable[[Any], None]) -> SetPredictions:
    """Train what a combination lacks, and return its answers to the evaluation's questions."""
    if combination.sft_settings is None:
        # The command has locked its own run already.
        for command in combination.commands:
            train(command)
        return evaluate(combination)
    with only_process(runs.run_folder(combination.sft_settings)):
        train_sft.run(combination.sft_settings)
        for command in combination.commands:
            train(command)
        return evaluate(combination)


def evaluate(combination: Combination) -> SetPredictions:
    """Return the answers of what a combination trained; they are kept in its folder."""
    settings = build_settings(EvalSettings, combination.commands[-1].given)
    folder = combination.folder
    runs.settle_by_device(settings)
    lm = model.load(folder, settings)
    task = open_task(settings)
    task.leave_out_long_questions(lm.codec, settings.longest_prompt)
    row = TableRow(folder.name, folder, agent)
    table = Table(folder, lm, folder, [row])
    context = EvalContext(task, settings)
    predictions = open_predictions(table, context)
    ask_what_is_missing(row, task.evaluation, table, context, predictions)
    answers = predictions.of_row(row.name, task.evaluation)
    predictions.finish({row.name: answers})
    return answers


# ---- 3. The table --------------------------------------------------------------------------------
@dataclass
class SweepTable:
    """The answers of all combinations, a row for each but for the seeds, which are pooled."""

    names: list[str]  # of the settings
    # Values of the settings -> seed -> answers.
    rows: dict[tuple[str, ...], dict[str, SetPredictions]] = field(default_factory=dict)

    def add(self, combination: Combination, answers: SetPredictions) -> None:
        """Add what a combination answered."""
        self.rows.setdefault(combination.row_name, {})[combination.seed] = answers

    def to_markdown(self) -> str:
        """Return EM, what it is over the first row, and what else a row shows."""
        titles = [*self.names, "EM (95%)", "over the first row", "F1", "actions", "malformed"]
        has_seeds = any("" not in by_seed for by_seed in self.rows.values())
        if has_seeds:
            titles.append("EM by seed")
        lines = table_head(titles)
        first = next(iter(self.rows.values()))
        for values, by_seed in self.rows.items():
            answers = list(by_seed.values())
            em = em_of(answers)
            figures = average_figures(answers)
            cells = [
                *values,
                em_text(em),
                _gain(by_seed, first),
                f"{figures.f1:.1f}",
                f"{figures.actions:.2f}",
                percent_cell(figures.malformed),
            ]
            if has_seeds:
                by_seed_em = [f"{seed}: {em_of([one]).points:.1f}" for seed, one in by_seed.items()]
                cells.append(", ".join(by_seed_em))
            lines.append(table_row(cells))
        questions = em_of(list(first.values())).questions
        lines.append(
            f"\nEM in percent with its interval over {questions} questions; the difference to the "
            "first row is paired."
        )
        return "\n".join(lines)


def _gain(by_seed: dict[str, SetPredictions], first: dict[str, SetPredictions]) -> str:
    """Return how much more EM a row has than the first one, over the seeds that both have."""
    pairs = [(answers, first[seed]) for seed, answers in by_seed.items() if seed in first]
    if by_seed is first or not pairs:
        return ""
    return gain_text(paired_gain(pairs))
