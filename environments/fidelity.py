"""How far a model can stand for the search tool: what it imagines, beside what the tool says.

The policy imagines inside its trajectory, as in an internal environment; a distilled world model
sees the query alone, and a simulator the gold facts too. What is counted stands in
evaluation/fidelity.py, and the searches in environments/cases.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from pathlib import Path

import numpy as np

from common import runs
from common.errors import UserError
from common.progress import tqdm
from common.run_record import read_run_record
from common.runs import COST_FILE
from common.settings import RolloutSettings, RunSettings
from data.scores import exact_match
from data.sft_data import read_codec
from data.trajectory import Codec, Observation, Provenance
from environments.cases import AskedFact, Case
from environments.distilled import (
    EXAMPLES_FILE,
    query_prompt,
    read_examples,
)
from environments.imagining import imagine, observation_text, sum_over_continuations
from environments.simulator import USEFUL, hint_of
from evaluation.fidelity import FactOutcome, Outcome, Statement
from model import LM
from tasks import Task
from tools import split_action

# Stages that are measured: the first was never trained on observations.
INTERNAL_ROWS = ("sft2", "sft3", "rl1", "rl2")


# ---- the models of a run -------------------------------------------------------------------------
class Kind(Enum):
    """What a model sees when it imagines."""

    INTERNAL = auto()  # the trajectory up to the search
    DISTILLED = auto()  # the query
    SIMULATOR = auto()  # the query, and the gold facts of the question


def rows_to_measure(settings: RunSettings, wanted: list[str]) -> list[str]:
    """Return the folders of a run whose models are measured.

    wanted: those that are asked for. None: all world models, and the stages that are trained.
    Raises UserError for one that is missing, and where there is none.
    """
    root = runs.run_folder(settings)
    for row in wanted:
        if not (root / row / "config.json").is_file():
            found = ", ".join(sorted(path.parent.name for path in root.glob("*/config.json")))
            raise UserError(f"--rows: {root / row} is missing; there are: {found or 'none yet'}")
    if wanted:
        return wanted
    world_models = sorted(path.parent.name for path in root.glob(f"*/{COST_FILE}"))
    rows = world_models + list(INTERNAL_ROWS)
    rows = [row for row in rows if (root / row / "config.json").is_file()]
    if not rows:
        runs.find_start(root, "sft3", INTERNAL_ROWS)
    return rows


def policy_codec(root: Path, rows: Sequence[str]) -> Codec:
    """Return the codec of the policies of a run, whose tokens its trajectories are."""
    folders = [root / name for name in (*INTERNAL_ROWS, *rows)]
    return read_codec(next(folder for folder in folders if (folder / "config.json").is_file()))


def kind_of_row(settings: RunSettings, row: str) -> Kind:
    """Return what the model of a folder sees when it imagines."""
    if not (runs.run_folder(settings) / row / COST_FILE).is_file():
        return Kind.INTERNAL
    record = read_run_record(settings.run).stages.get(row)
    if record is not None and record.settings.get("gold_facts"):
        return Kind.SIMULATOR
    return Kind.DISTILLED


def learned_queries(folder: Path) -> set[str] | None:
    """Return the queries that a world model learned from; None for a stage, which is none."""
    return set(read_examples(folder)) if (folder / EXAMPLES_FILE).is_file() else None


# ---- what a model imagines -----------------------------------------------------------------------
def measure_cases(
    lm: LM,
    kind: Kind,
    cases: Sequence[Case],
    learned: set[str] | None,
    task: Task,
    settings: RolloutSettings,
    bar: tqdm,
) -> list[Outcome]:
    """Let a model imagine what the tool says to each search, greedily, and compare.

    A simulator is told the gold facts, so it is asked only where they are known.

    learned: the queries that it learned from; None where they are not recorded.
    """
    codec = lm.codec
    if kind == Kind.SIMULATOR:
        cases = [case for case in cases if case.question is not None]
    prompts = [case_prompt(codec, kind, case) for case in cases]
    written = imagine(lm, prompts, settings, bar)
    real = [codec.wrap_observation(case.real)[1:] for case in cases]
    entropies = sum_over_continuations(lm, lm.backend.entropies, prompts, written)
    log_likelihoods = sum_over_continuations(lm, lm.backend.score, prompts, real)
    outcomes = []
    for row, case in enumerate(cases):
        imagined = observation_text(codec, written[row])
        outcomes.append(
            Outcome(
                query=case.query,
                real=case.real,
                imagined=imagined,
                entropy=entropies[row] / len(written[row]),
                real_nll=-log_likelihoods[row],
                real_tokens=len(real[row]),
                fact=_fact_outcome(task, case, imagined),
                is_seen=None if learned is None else case.query in learned,
            )
        )
    return outcomes


def case_prompt(codec: Codec, kind: Kind, case: Case) -> list[int]:
    """Return the ids after which a model of a kind imagines what the tool says."""
    if kind == Kind.INTERNAL:
        return case.context
    hint = ""
    if kind == Kind.SIMULATOR and case.question is not None:
        hint = hint_of(case.question, USEFUL)
    return query_prompt(codec, case.query, hint)


def _fact_outcome(task: Task, case: Case, imagined: str) -> FactOutcome | None:
    if case.asked is None:
        return None
    real = read_statement(task, case.asked, case.real)
    statement = read_statement(task, case.asked, imagined)
    return FactOutcome(case.asked.fact.head, real == Statement.RIGHT, statement)


def read_statement(task: Task, asked: AskedFact, observation: str) -> Statement:
    """Return what an observation says of a fact; a right value among several counts as right."""
    values = task.stated_values(asked.fact, asked.lookup, observation)
    if any(exact_match(value, asked.fact.answers) for value in values):
        return Statement.RIGHT
    return Statement.FALSE if values else Statement.NOTHING


# ---- while RL runs -------------------------------------------------------------------------------
def known_share(
    searches: Iterable[tuple[str, Observation]], answers: Mapping[str, str]
) -> float | None:
    """Return how many imagined observations are the tool's to the letter, None of none known.

    Those alone count whose query the tool has answered before, so that it costs no call.

    searches: (action, observation) pairs of some rollouts.
    answers: query -> what the tool says, as far as a policy reads it.
    """
    is_exact = []
    for action, observation in searches:
        name, query = split_action(action)
        is_imagined = observation.provenance == Provenance.IMAGINED
        if name == "search" and is_imagined and query in answers:
            is_exact.append(observation.text == answers[query])
    return float(np.mean(is_exact)) if is_exact else None
