"""What is paid for what: exact match against a second figure, along one setting.

    bash run.sh --world-models                             # trains the rows, once for a seed
    python world_model.py fidelity --rows=FOLDER,FOLDER,.. # how right the models of a run are
    python -m environments.trade_offs                      # of one run
    python -m environments.trade_offs --runs=nano,seed1    # seeds pooled

Three trade-offs, each of lines of stages that differ in one setting:

SFT-3      how well the policy imagines what SFT-3 read about, along the weight of the
           observations' loss and the passes
titles     how well a distilled model knows what policies ask, along the share of the titles
           that it learned
price      how many of the known facts the policy still searches for, along the price of a call

It prints a table in Markdown and writes out/<run>/trade_offs.json, which plot.py draws. Stages that
were not trained or not evaluated are left out, and so are those that `fidelity` has not measured
where it is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from common.run_record import RunRecord, read_run_record
from common.runs import run_folder
from common.settings import CommaList, RunSettings, main
from environments.cost_logs import eval_row
from environments.costs import mean
from environments.trades import (
    TRADE_OFFS_FILE,
    TradeOff,
    TradeOffs,
    TradePoint,
    trade_offs_to_json,
)
from evaluation.fidelity import ALL, FIDELITY_FILE, POLICY, TRAINING, FidelityTable, read_fidelity
from evaluation.figures import RowFigures, read_figures
from evaluation.markdown import em_text, table_head, table_row
from evaluation.predictions import read_predictions
from evaluation.statistics import SetPredictions, em_of


@dataclass(kw_only=True)
class TradeOffSettings(RunSettings):
    """The settings of environments/trade_offs.py."""

    # Runs whose seeds are pooled. Empty: this run.
    runs: CommaList = field(default_factory=list)


# ---- 1. The stages of each trade-off -------------------------------------------------------------
REAL_END = "_real_16"  # of folders whose last steps ask the tool
SFT3_LINES = {
    "one pass": ("sft3", "sft3_1_0.3", "sft3_1_1"),
    "two passes": ("sft3_2_0.1", "sft3_2_0.3", "sft3_paper"),
}
TITLE_LINES = {
    "80 imagined": ("quarter_80", "half_80", "distilled_80"),
    "80 imagined + 16 real": ("quarter_80_real_16", "half_80_real_16", "distilled_80_real_16"),
    "mixed by confidence": ("quarter_confident_96", "half_confident_96", "confident_96"),
}
PRICE_LINES = {
    "80 imagined": ("cost_0", "distilled_80", "cost_0.2", "cost_0.3"),
}


# ---- 2. What a run has left ----------------------------------------------------------------------
@dataclass
class RunResults:
    """What a run says of its stages."""

    record: RunRecord
    figures: dict[str, RowFigures]  # row of eval.json
    predictions: dict[str, SetPredictions]  # row of eval.json -> question set -> predictions
    fidelity: FidelityTable  # empty where it was not measured


def read_results(name: str) -> RunResults:
    """Return what a run says of its stages. Raises UserError where it was not evaluated."""
    root = Path("out", name)
    if not (root / "eval.json").is_file():
        raise UserError(f"{root}: not evaluated yet; make the table with: eval.py --run={name}")
    figures = read_figures(root / "eval.json")
    folders = ["sft2"]
    for lines in (SFT3_LINES, TITLE_LINES, PRICE_LINES):
        for line in lines.values():
            folders += line
    wanted = dict.fromkeys(eval_row(folder) for folder in folders)
    found = [row for row in wanted if row in figures]
    fidelity: FidelityTable = {}
    if (root / FIDELITY_FILE).is_file():
        fidelity = read_fidelity(root / FIDELITY_FILE)
    return RunResults(
        record=read_run_record(name),
        figures=figures,
        predictions={**read_predictions(root / "predictions.jsonl", found, "--runs")},
        fidelity=fidelity,
    )


def surprise(results: RunResults, folder: str) -> float | None:
    """Return how surprising a stage finds what the tool says in SFT's world: nats a token."""
    if folder not in results.fidelity:
        return None
    return results.fidelity[folder][TRAINING][ALL].nll


def practice_settings(results: RunResults, folder: str) -> dict[str, Any]:
    """Return the settings of a stage; of one that real steps end, those of what they go on from."""
    stage = folder.removesuffix(REAL_END)
    return results.record.stages[stage if stage in results.record.stages else folder].settings


def known_by_model(results: RunResults, folder: str) -> float | None:
    """Return the share of policies' searches that a stage's world model answers to the letter."""
    world_model = practice_settings(results, folder)["world_model"]
    groups = results.fidelity.get(world_model, {})
    if POLICY not in groups:
        return None
    return 100 * groups[POLICY][ALL].exact


def searched_known(results: RunResults, folder: str) -> float | None:
    """Return the share of the known facts that a stage searches for, percent."""
    share = results.figures[eval_row(folder)].acting.search_known
    return None if share is None else 100 * share


# ---- 3. The trade-offs ---------------------------------------------------------------------------
def measure(runs: Sequence[RunResults]) -> list[TradeOff]:
    """Return the trade-offs of which a stage is there."""
    trade_offs = [
        TradeOff(
            title="SFT-3: weight of the observations' loss",
            x_title="tool's words in SFT's world, nats a token",
            lines=read_lines(runs, SFT3_LINES, "sft3_observation_coef", surprise),
        ),
        TradeOff(
            title="Distillation: share of the titles",
            x_title="policies' searches answered to the letter, %",
            lines=read_lines(runs, TITLE_LINES, "sweep_share", known_by_model),
        ),
        TradeOff(
            title="RL: price of a call, in rewards",
            x_title="known facts searched for, %",
            lines=read_lines(runs, PRICE_LINES, "rl1_call_cost", searched_known),
        ),
    ]
    return [trade_off for trade_off in trade_offs if any(trade_off.lines.values())]


def read_lines(
    runs: Sequence[RunResults],
    lines: Mapping[str, Sequence[str]],
    setting: str,
    second_figure: Callable[[RunResults, str], float | None],
) -> dict[str, list[TradePoint]]:
    """Return the points of some lines, each pooled over the runs that have it.

    setting: whose value a point is labelled with.
    """
    return {
        name: [
            point
            for folder in folders
            if (point := pool_point(runs, folder, setting, second_figure)) is not None
        ]
        for name, folders in lines.items()
    }


def pool_point(
    runs: Sequence[RunResults],
    folder: str,
    setting: str,
    second_figure: Callable[[RunResults, str], float | None],
) -> TradePoint | None:
    """Return one stage as a point, None where no run has it."""
    xs = []
    predictions = []
    label = ""
    for results in runs:
        row = eval_row(folder)
        if folder not in results.record.stages or row not in results.predictions:
            continue
        x = second_figure(results, folder)
        value = practice_settings(results, folder).get(setting)
        # Stages of older versions may lack the setting.
        if x is None or value is None:
            continue
        label = f"{value:g}"
        xs.append(x)
        predictions.append(results.predictions[row])
    if not xs:
        return None
    return TradePoint(folder, label, mean(xs), em_of(predictions))


# ---- 4. The table --------------------------------------------------------------------------------
def format_trade_off(trade_off: TradeOff) -> str:
    """Return the table of one trade-off in Markdown."""
    lines = table_head([trade_off.title, "", "EM (95%)", trade_off.x_title])
    for name, points in trade_off.lines.items():
        for point in points:
            lines.append(table_row([name, point.label, em_text(point.em), f"{point.x:.2f}"]))
    return "\n".join(lines)


# ---- the script ----------------------------------------------------------------------------------
def run(settings: TradeOffSettings) -> None:
    """Print the trade-offs of some runs, and write trade_offs.json."""
    names = settings.runs or [settings.run]
    runs = [read_results(name) for name in names]
    start_row = eval_row("sft2")
    starts = [
        results.predictions[start_row] for results in runs if start_row in results.predictions
    ]
    trade_offs = measure(runs)
    if not trade_offs or not starts:
        raise UserError(
            f"--runs: {', '.join(names)}: no stage of a trade-off is trained and evaluated, or "
            "SFT-1&2 is not; train them with: bash run.sh --world-models"
        )
    for trade_off in trade_offs:
        print(format_trade_off(trade_off) + "\n")
    content = TradeOffs(names, em_of(starts).points, trade_offs)
    write_text(run_folder(settings) / TRADE_OFFS_FILE, trade_offs_to_json(content))


if __name__ == "__main__":
    main(run, TradeOffSettings, __doc__)
