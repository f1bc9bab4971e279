"""The rows of the cost curve, and what each has spent up to each step, from the logs of a run.

A row is a chain of RL stages. Its calls are those of its stages, and those that the world models
were distilled with in which they practise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import read_log
from common.run_record import RunRecord, read_run_record, record_file
from common.runs import COST_FILE
from environments.costs import Point, mean
from environments.distilled import read_cost
from environments.fidelity import learned_queries
from evaluation.figures import read_figures
from evaluation.predictions import read_predictions
from evaluation.statistics import SetPredictions

# Folders that have another name as rows of eval.json.
ROW_NAMES = {"sft2": "SFT-1&2", "sft3": "SFT-1&2&3", "rl2": "SFT-1&2&3+RL-1&2"}
# Folders from which practice begins.
STARTS = ("sft2", "sft3", "sft3_paper")
LOOKED_AT = 60  # questions of each set that --eval_every looks at: EVAL_QUESTIONS of train_rl.py


# ---- 1. The rows ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class CurveRow:
    """One way to practise: stages that were trained one from the other."""

    name: str
    kind: str  # who answers for the most part, which colours the row in the figure
    stages: tuple[str, ...]  # folders of the run, as run.sh --world-models trains them


ALL_REAL = CurveRow("all real", "real", ("real_96",))
CURVE_ROWS = (
    ALL_REAL,
    CurveRow("16 real, no more", "real", ("real_16",)),
    CurveRow("all real + observation loss", "auxiliary", ("auxiliary_96",)),
    CurveRow("internal 80 + real 16", "internal", ("internal_80", "internal_80_real_16")),
    CurveRow(
        "internal 80 in SFT's world + real 16",
        "internal",
        ("internal_sft_80", "internal_sft_80_real_16"),
    ),
    CurveRow("default recipe: SFT-3, distilled 80 + real 16", "distilled", ("rl1", "rl2")),
    CurveRow("distilled 80 + real 16", "distilled", ("distilled_80", "distilled_80_real_16")),
    CurveRow("distilled 96", "distilled", ("distilled_80", "distilled_96")),
    CurveRow("half of the titles 80 + real 16", "distilled", ("half_80", "half_80_real_16")),
    CurveRow("a quarter 80 + real 16", "distilled", ("quarter_80", "quarter_80_real_16")),
    CurveRow("real 16 + 80 in their logs", "distilled", ("real_16", "logs_80")),
    CurveRow("told the facts 80 + real 16", "distilled", ("told_80", "told_80_real_16")),
    CurveRow("mixed by schedule", "mixed", ("scheduled_96",)),
    CurveRow("mixed by confidence", "mixed", ("confident_96",)),
    CurveRow("half, by confidence", "mixed", ("half_confident_96",)),
    CurveRow("half, by confidence, half real", "mixed", ("half_confident_half_96",)),
    CurveRow("a quarter, by confidence", "mixed", ("quarter_confident_96",)),
    CurveRow("real 16 + 80 in logs, by confidence", "mixed", ("real_16", "logs_confident_80")),
)


# ---- 2. What a run has left ----------------------------------------------------------------------
@dataclass
class Distillation:
    """What it cost to make a world model."""

    calls: int  # of the tool, made for it
    learned: set[str]  # queries that it learned from, in a sweep or in logs
    held_out: set[str]  # queries that calibrate it
    seconds: float  # of its calls and of its training
    tokens: int  # that it was trained on, over all passes


class CallCount(NamedTuple):
    """What practice asked the tool."""

    raw: int
    distinct: int


@dataclass
class Clock:
    """What practice takes on a machine that has nothing else to do, in seconds."""

    run: str
    of_step: dict[str, float]  # environment, see environment_of -> a step of RL
    of_token: float  # distilling a world model, for each token of each pass


@dataclass
class RunLogs:
    """What a run says of its rows."""

    name: str
    root: Path
    record: RunRecord
    predictions: dict[str, SetPredictions]  # row of eval.json -> question set -> predictions
    distillations: dict[str, Distillation]  # folder of a world model -> its cost
    clock: Clock | None = None  # tells seconds in place of the logs

    def has(self, row: CurveRow) -> bool:
        """Whether a row was trained and evaluated."""
        return eval_row(row.stages[-1]) in self.predictions and all(
            stage in self.record.stages and (self.root / stage / "log.jsonl").is_file()
            for stage in row.stages
        )

    def final(self, row: CurveRow) -> SetPredictions:
        """Return the predictions of a row when all its stages were done."""
        return self.predictions[eval_row(row.stages[-1])]

    def looked_at_em(self, start: str) -> float:
        """Return the EM of a start folder on the questions that --eval_every looks at, percent."""
        predictions = self.predictions[eval_row(start)]
        scores = [row["em"] for rows in predictions.values() for row in rows[:LOOKED_AT]]
        return 100 * mean(scores)


def eval_row(folder: str) -> str:
    """Return the name of a folder as a row of eval.json."""
    return ROW_NAMES.get(folder, folder)


def read_run(name: str) -> RunLogs:
    """Return what a run says of its rows. Raises UserError where it was not evaluated."""
    root = Path("out", name)
    if not (root / "eval.json").is_file():
        raise UserError(f"{root}: not evaluated yet; make the table with: eval.py --run={name}")
    evaluated = read_figures(root / "eval.json")
    folders = [*STARTS, *(row.stages[-1] for row in CURVE_ROWS)]
    wanted = dict.fromkeys(eval_row(folder) for folder in folders)
    found = [row for row in wanted if row in evaluated]
    if eval_row("sft2") not in found:
        raise UserError(f"{root / 'eval.json'}: no row SFT-1&2, from which practice begins")
    record = read_run_record(name)
    return RunLogs(
        name=name,
        root=root,
        record=record,
        predictions={**read_predictions(root / "predictions.jsonl", found, "--runs")},
        distillations=read_distillations(root, record),
    )


def read_distillations(root: Path, record: RunRecord) -> dict[str, Distillation]:
    """Return what each world model of a run cost, by its folder."""
    distillations = {}
    for folder in record.stages:
        path = root / folder / COST_FILE
        if not path.is_file():
            continue
        cost = read_cost(root / folder)
        learned = learned_queries(root / folder)
        if record.stages[folder].settings.get("gold_facts"):
            # A simulator learns from SFT's searches, which cost nothing new.
            learned = set()
        if learned is None:
            raise UserError(
                f"{path.parent}: an older version made it, which did not keep its queries; "
                "remove the folder to have the world model distilled again"
            )
        distillations[folder] = Distillation(
            calls=cost["calls"],
            learned=learned,
            held_out={call["query"] for call in cost["held_out"]},
            seconds=cost["seconds_of_calls"] + cost["seconds_of_training"],
            tokens=cost["tokens"] * record.stages[folder].settings["world_model_epochs"],
        )
    return distillations


def read_clock(name: str) -> Clock:
    """Return what practice took in a run: the median of the steps in each environment.

    The first step of a stage gets memory and does not count.
    Raises UserError where the run has no world model, or no stage of RL of two steps.
    """
    root = Path("out", name)
    record = read_run_record(name)
    seconds_in: dict[str, list[float]] = {}
    for folder, stage in record.stages.items():
        path = root / folder / "log.jsonl"
        if stage.settings_class != "RLSettings" or not path.is_file():
            continue
        seconds = seconds_in.setdefault(environment_of(folder, stage.settings), [])
        for row in read_rows(path, "seconds_rollout", "seconds_update")[1:]:
            seconds.append(row["seconds_rollout"] + row["seconds_update"])
    of_step = {name: median(seconds) for name, seconds in seconds_in.items() if seconds}
    distillations = read_distillations(root, record).values()
    if not of_step or not distillations:
        raise UserError(f"--clock={name}: it needs a world model, and stages of RL of two steps")
    tokens = sum(distillation.tokens for distillation in distillations)
    seconds_of_all = sum(distillation.seconds for distillation in distillations)
    return Clock(name, of_step, seconds_of_all / tokens)


def environment_of(folder: str, settings: Mapping[str, Any]) -> str:
    """Return where a stage of RL practised, and whether it learned observations beside it."""
    name = settings[f"{settings['stage'] or folder}_environment"]
    if name == "mixed":
        name += f" by {settings['mixed_by']}"
    return f"{name} + observation loss" if settings.get("observation_coef") else name


def world_model_of(folder: str, settings: Mapping[str, Any]) -> str:
    """Return the folder of the world model that a stage of RL practised in, "" for none.

    folder: of the stage. A command that trains both stages names neither of them.
    """
    stage = settings["stage"] or folder
    environment = settings[f"{stage}_environment"]
    if environment in ("distilled", "mixed"):
        return settings["world_model"]
    return ""


# ---- 3. The points of a row ----------------------------------------------------------------------
@dataclass
class Ledger:
    """What a row has spent so far."""

    steps: int = 0
    raw_calls: int = 0
    queries: set[str] = field(default_factory=set)
    seconds: float = 0.0
    paid: set[str] = field(default_factory=set)  # folders of world models

    def pay_for(
        self, world_model: str, distillations: Mapping[str, Distillation], clock: Clock | None
    ) -> None:
        """Add what a world model cost, once; "" is none."""
        if world_model and world_model not in self.paid:
            self.add_distillation(distillations[world_model], clock)
            self.paid.add(world_model)

    def add_distillation(self, distillation: Distillation, clock: Clock | None) -> None:
        """Add what a world model cost.

        One that learned from logs asked for nothing but its held-out queries. Where the logs held
        more than this row had asked, the queries of other rows are charged too, as one call each.
        """
        new_queries = (distillation.learned | distillation.held_out) - self.queries
        self.raw_calls += max(distillation.calls, len(new_queries))
        self.queries |= new_queries
        if clock is None:
            self.seconds += distillation.seconds
        else:
            self.seconds += clock.of_token * distillation.tokens

    def point(self, em: float | None) -> Point:
        """Return what was spent up to now, beside the EM that is measured now."""
        return Point(self.steps, self.raw_calls, len(self.queries), self.seconds, em)


def read_points(logs: RunLogs, row: CurveRow) -> list[Point]:
    """Return a point for each step of a row, and one where each of its stages begins.

    A world model is paid for when the first stage begins that practises in it.
    """
    # Without --start, RL-1 begins at SFT-3.
    start = logs.record.stages[row.stages[0]].settings["start"] or "sft3"
    em: float | None = logs.looked_at_em(start)
    ledger = Ledger()
    if start != "sft2":
        ledger.seconds += read_rows(logs.root / start / "log.jsonl", "seconds")[-1]["seconds"]
    points = []
    for stage in row.stages:
        world_model = world_model_of(stage, logs.record.stages[stage].settings)
        ledger.pay_for(world_model, logs.distillations, logs.clock)
        points.append(ledger.point(em))
        points += stage_points(logs.root / stage, ledger, seconds_of_step(logs, stage))
        em = points[-1].em
    return points


def count_calls(run: str, stages: Sequence[str]) -> CallCount:
    """Return what stages of a run, trained one from the other, asked the tool in practice.

    The calls that their world models were distilled from are counted too.
    Raises UserError where the run does not remember a stage, or lacks its logs.
    """
    root = Path("out", run)
    record = read_run_record(run)
    distillations = read_distillations(root, record)
    ledger = Ledger()
    for stage in stages:
        if stage not in record.stages:
            raise UserError(
                f"{record_file(run)}: the run does not remember how {stage} was trained; "
                "remove the folder of that stage, and train it again"
            )
        world_model = world_model_of(stage, record.stages[stage].settings)
        ledger.pay_for(world_model, distillations, clock=None)
        stage_points(root / stage, ledger)
    return CallCount(ledger.raw_calls, len(ledger.queries))


def seconds_of_step(logs: RunLogs, stage: str) -> float | None:
    """Return what the clock says of a stage's steps, None without one.

    Raises UserError where the clock has no stage in this one's environment.
    """
    if logs.clock is None:
        return None
    environment = environment_of(stage, logs.record.stages[stage].settings)
    if environment not in logs.clock.of_step:
        raise UserError(f"--clock={logs.clock.run}: no stage there practised in: {environment}")
    return logs.clock.of_step[environment]


def stage_points(folder: Path, ledger: Ledger, seconds: float | None = None) -> list[Point]:
    """Return a point for each step of a stage, and add to the ledger what it spent.

    seconds: of a step; None: those that the log has.
    """
    calls: dict[int, list[dict[str, Any]]] = {}
    if (folder / "calls.jsonl").is_file():
        for call in read_rows(folder / "calls.jsonl", "step", "query", "raw_calls"):
            calls.setdefault(call["step"], []).append(call)
    points = []
    for step in read_rows(folder / "log.jsonl", "step", "seconds_rollout", "seconds_update"):
        ledger.steps += 1
        if seconds is None:
            ledger.seconds += step["seconds_rollout"] + step["seconds_update"]
        else:
            ledger.seconds += seconds
        for call in calls.get(step["step"], []):
            ledger.raw_calls += call["raw_calls"]
            ledger.queries.add(call["query"])
        em = step.get("eval_em")
        points.append(ledger.point(None if em is None else 100 * em))
    return points


def read_rows(path: Path, *fields: str) -> list[dict[str, Any]]:
    """Return the rows of a log, which have these fields."""
    return read_log(path, "--runs", *fields)
