"""The report of `world_model.py fidelity`: a table, fidelity.json, a figure and a page to read.

Which searches are asked stands in environments/cases.py, what a model imagines in fidelity.py, and
what is counted in evaluation/fidelity.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import model
from common import memory, runs
from common.errors import UserError
from common.files import write_text
from common.progress import progress_bar
from common.run_record import read_run_record
from common.settings import AboveZero, CommaList, ModelSettings, RolloutSettings, TaskRunSettings
from data.sft_data import read_chains_of_action
from data.trajectory import Codec, Trajectory
from environments.cases import (
    Case,
    each_query_once,
    held_out_cases,
    policy_cases,
    spread,
    training_cases,
)
from environments.examples import calls_of
from environments.fidelity import (
    Kind,
    kind_of_row,
    learned_queries,
    measure_cases,
    policy_codec,
    rows_to_measure,
)
from evaluation.fidelity import (
    ALL,
    FIDELITY_FILE,
    HELD_OUT,
    POLICY,
    TRAINING,
    FidelityTable,
    Outcome,
    fidelity_to_json,
    read_fidelity,
    summarize_splits,
    table_heading,
    table_line,
)
from evaluation.viewer import ShownModel, compare_texts, render_imagined
from plot import draw_fidelity, save_figure
from tasks import Task, open_task

SHOWN_SEARCHES = 20  # of each model on the page of imagined observations


@dataclass(kw_only=True)
class FidelitySettings(TaskRunSettings, ModelSettings, RolloutSettings):
    """The settings of `world_model.py fidelity`."""

    # Folders of the run to measure. Empty: all its world models, then SFT-2, SFT-3, RL-1 and RL-2.
    rows: CommaList = field(default_factory=list)
    # Searches of each group at most. Those of a policy are counted as often as they were made.
    searches: AboveZero = 300


def fidelity(settings: FidelitySettings) -> None:
    """Measure how well the models of a run know what the tool would say."""
    runs.settle_by_device(settings)
    root = runs.run_folder(settings)
    rows = rows_to_measure(settings, settings.rows)
    task = open_task(settings)
    if not memory.report(model.load(root / rows[0], settings), settings, "eval", None):
        return
    chains: list[Trajectory] = []
    if (root / "data" / "coa.jsonl").is_file():
        chains = read_chains_of_action(root)
    codec = policy_codec(root, rows)
    groups = known_searches(codec, chains, task, settings)
    chain_queries = {query for chain in chains for query in calls_of(codec, chain)}

    print(table_heading())
    table = measured_before(root, settings.rows)
    examples: list[ShownModel] = []
    for row in rows:
        lm = model.load(root / row, settings)
        kind = kind_of_row(settings, row)
        learned = chain_queries if kind == Kind.INTERNAL else learned_queries(root / row)
        table[row] = {}
        for group, cases in groups.items():
            # Where SFT has a tool of its own, this is another world than a world model knows.
            is_other_world = group == TRAINING and task.search is not task.rl_search
            if is_other_world and kind == Kind.DISTILLED:
                continue
            with progress_bar(len(cases), f"{row}, {group}", "search") as bar:
                outcomes = measure_cases(lm, kind, cases, learned, task, settings, bar)
            if not outcomes:
                continue
            table[row][group] = summarize_splits(outcomes)
            print(table_line(row, group, table[row][group][ALL]), flush=True)
            if group == HELD_OUT and (kind != Kind.INTERNAL or row == "sft3"):
                examples.append(show_outcomes(f"{row}, searches {group}", outcomes))
    write_text(root / FIDELITY_FILE, fidelity_to_json(table))
    draw_what_was_measured(root, table, examples)


def measured_before(root: Path, rows: Sequence[str]) -> FidelityTable:
    """Return what an earlier command measured of a run's other folders, as they are still.

    rows: those that --rows names; where it names none, all are measured anew.
    Raises UserError where that file is damaged.
    """
    file = root / FIDELITY_FILE
    if not rows or not file.is_file():
        return {}
    measured_at = file.stat().st_mtime
    kept = {}
    for row, figures in read_fidelity(file).items():
        config = root / row / "config.json"
        if config.is_file() and config.stat().st_mtime < measured_at:
            kept[row] = figures
    return kept


def known_searches(
    codec: Codec, chains: Sequence[Trajectory], task: Task, settings: FidelitySettings
) -> dict[str, list[Case]]:
    """Return searches with known answers by group; a run may have none of some groups.

    chains: those of action that SFT learned from.
    Raises UserError where there is none at all.
    """
    root = runs.run_folder(settings)
    count = settings.searches
    records = read_run_record(settings.run).stages.values()
    asked_in_rl = max((record.settings.get("rl_questions", 0) for record in records), default=0)
    # Chains are in the order of their questions, and few questions have none.
    groups = {
        TRAINING: training_cases(codec, chains[:count], task.questions("coa", 2 * count)),
        HELD_OUT: held_out_cases(codec, task, task.questions("held_out", count), settings),
        POLICY: policy_cases(codec, root, task.questions("rl2", asked_in_rl), settings),
    }
    if not any(groups.values()):
        raise UserError(
            f"{root}: there is no search whose answer is known: a teacher finds nothing for "
            "held-out questions, and no chain and no call of RL is kept; give more questions"
        )
    # A teacher's query counts once. A policy's counts as often as it is asked: what matters is how
    # much of its practice is right.
    groups[TRAINING] = each_query_once(groups[TRAINING])
    groups[HELD_OUT] = each_query_once(groups[HELD_OUT])
    return {group: spread(cases, count) for group, cases in groups.items() if cases}


def show_outcomes(title: str, outcomes: Sequence[Outcome]) -> ShownModel:
    """Return some imagined observations for the page."""
    comparisons = [
        compare_texts(outcome.query, outcome.real, outcome.imagined)
        for outcome in spread(outcomes, SHOWN_SEARCHES)
    ]
    return ShownModel(title, comparisons)


def draw_what_was_measured(
    root: Path, table: FidelityTable, examples: Sequence[ShownModel]
) -> None:
    """Write the figure, and the page where there is something to show; print their paths."""
    folder = root / "figures"
    folder.mkdir(exist_ok=True)
    save_figure(draw_fidelity(table), folder / "fidelity.png")
    if not examples:
        return
    write_text(folder / "imagined.html", render_imagined(examples))
    print(folder / "imagined.html")
