"""How close imagined observations come to what the tool says: figures, and how they are shown.

It takes texts and numbers, so that no model is loaded to look at them again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from common.files import parse_json, refusing_damage
from data.passages import NOTHING_FOUND, split_observation
from data.scores import f1

FIDELITY_FILE = "fidelity.json"  # in the folder of a run
ENTROPY_GROUPS = 5  # equal parts of the searches, from the surest to the least sure
# Groups of searches (environments/cases.py), in the order in which they are shown.
TRAINING = "training"
HELD_OUT = "held out"
POLICY = "policy"
GROUPS = (TRAINING, HELD_OUT, POLICY)
ALL = "all"  # the split that holds every search of a group


class Statement(StrEnum):
    """What an imagined observation says of the fact that was asked for."""

    RIGHT = "right"  # the right value is stated
    FALSE = "false"  # another value is stated, and not the right one
    NOTHING = "nothing"  # no value is


@dataclass
class FactOutcome:
    """What became of a fact that a search asks for."""

    is_head: bool  # it is about a head entity
    is_found: bool  # the tool's answer states it
    statement: Statement  # what the imagined observation says of it


@dataclass
class Outcome:
    """One imagined observation beside what the tool says."""

    query: str
    real: str
    imagined: str
    entropy: float  # of what was imagined, mean nats a token
    real_nll: float  # negative log-likelihood of what the tool says, nats in all
    real_tokens: int
    fact: FactOutcome | None  # None where nobody knows what the query asks for
    is_seen: bool | None  # whether the model learned from this query; None: it is not recorded

    @property
    def is_exact(self) -> bool:
        """Whether it is the tool's answer to the letter."""
        return self.imagined == self.real


# ---- figures -------------------------------------------------------------------------------------
@dataclass
class EntropyGroup:
    """Searches of which a model is about equally sure."""

    searches: int
    entropy: float  # mean, nats a token
    exact: float  # share written to the letter


@dataclass
class Fidelity:
    """How well one model imagines some searches. Shares are between 0 and 1, None of nothing.

    A fact is asked for where it is known which one the query is about. It is found where the
    tool's answer states it. A falsehood is another value of the asked relation under the asked
    title. It is a confident one where the observation's entropy is no higher than the median of
    the model's right statements in the same group of searches: whoever trusts half of what is
    right by entropy trusts this too.
    """

    searches: int
    exact: float  # written to the letter
    title_right: float  # the first title is the tool's
    nothing_right: float | None  # of the searches that find nothing, those that say so
    word_f1: float  # mean word overlap with the tool's answer
    nll: float  # nats a token of the tool's answer
    entropy: float  # of what was imagined, mean nats a token
    found_facts: int
    fact_right: float | None  # of the facts that are found, those that are stated right
    asked_facts: int
    falsehoods: float | None  # of the facts that are asked for
    confident_falsehoods: float | None
    # Chance that of a found fact that is stated right and one that is not, the latter's
    # observation has the higher entropy; 0.5 is no better than a coin.
    auroc: float | None
    reliability: list[EntropyGroup]


# row (folder of a model) -> group of searches -> split -> figures
FidelityTable = dict[str, dict[str, dict[str, Fidelity]]]


def summarize_splits(outcomes: Sequence[Outcome]) -> dict[str, Fidelity]:
    """Return the figures of one model and group: of all searches, and of its splits.

    The splits are head and tail, of known facts, and seen and unseen queries; none is empty.
    """
    threshold = confident_entropy(outcomes)
    facts = [(outcome, outcome.fact) for outcome in outcomes if outcome.fact is not None]
    splits = {
        ALL: list(outcomes),
        "head": [outcome for outcome, fact in facts if fact.is_head],
        "tail": [outcome for outcome, fact in facts if not fact.is_head],
        "seen": [outcome for outcome in outcomes if outcome.is_seen is True],
        "unseen": [outcome for outcome in outcomes if outcome.is_seen is False],
    }
    return {name: summarize(part, threshold) for name, part in splits.items() if part}


def summarize(outcomes: Sequence[Outcome], threshold: float | None) -> Fidelity:
    """Return the figures of some searches.

    threshold: the entropy up to which a falsehood is a confident one; None: none is.
    """
    facts = [(outcome, outcome.fact) for outcome in outcomes if outcome.fact is not None]
    found = [(outcome, fact) for outcome, fact in facts if fact.is_found]
    is_wrong = np.array([fact.statement != Statement.RIGHT for _, fact in found], dtype=bool)
    falsehoods = [fact.statement == Statement.FALSE for _, fact in facts]
    confident = [
        is_false and threshold is not None and outcome.entropy <= threshold
        for (outcome, _), is_false in zip(facts, falsehoods, strict=True)
    ]
    finds_nothing = [outcome for outcome in outcomes if outcome.real == NOTHING_FOUND]
    return Fidelity(
        searches=len(outcomes),
        exact=_mean([outcome.is_exact for outcome in outcomes]),
        title_right=_mean([_first_title(o.imagined) == _first_title(o.real) for o in outcomes]),
        nothing_right=_mean_if_any([outcome.is_exact for outcome in finds_nothing]),
        word_f1=_mean([f1(outcome.imagined, [outcome.real]) for outcome in outcomes]),
        nll=sum(o.real_nll for o in outcomes) / sum(o.real_tokens for o in outcomes),
        entropy=_mean([outcome.entropy for outcome in outcomes]),
        found_facts=len(found),
        fact_right=_mean_if_any(list(~is_wrong)),
        asked_facts=len(facts),
        falsehoods=_mean_if_any(falsehoods),
        confident_falsehoods=_mean_if_any(confident),
        auroc=auroc(np.array([outcome.entropy for outcome, _ in found]), is_wrong),
        reliability=reliability(outcomes),
    )


def confident_entropy(outcomes: Sequence[Outcome]) -> float | None:
    """Return the median entropy of the observations that state a fact right, None for no such."""
    entropies = [
        outcome.entropy
        for outcome in outcomes
        if outcome.fact is not None and outcome.fact.statement == Statement.RIGHT
    ]
    return float(np.median(entropies)) if entropies else None


def auroc(scores: np.ndarray, is_positive: np.ndarray) -> float | None:
    """Return how often a positive has a higher score than a negative; a tie counts half.

    scores, is_positive: (cases,). None where there are no positives, or nothing else.
    """
    positives = scores[is_positive][:, None]
    negatives = scores[~is_positive][None, :]
    if not positives.size or not negatives.size:
        return None
    return float((positives > negatives).mean() + 0.5 * (positives == negatives).mean())


def reliability(outcomes: Sequence[Outcome]) -> list[EntropyGroup]:
    """Return equal groups of searches, the surest first: is what it is sure of more often exact?"""
    by_entropy = sorted(outcomes, key=lambda outcome: outcome.entropy)
    groups = []
    for rows in np.array_split(np.arange(len(by_entropy)), ENTROPY_GROUPS):
        members = [by_entropy[row] for row in rows]
        if members:
            entropy = _mean([outcome.entropy for outcome in members])
            exact = _mean([outcome.is_exact for outcome in members])
            groups.append(EntropyGroup(len(members), entropy, exact))
    return groups


def _first_title(observation: str) -> str:
    return split_observation(observation)[0].title


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean_if_any(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None


# ---- the table -----------------------------------------------------------------------------------
ROW_WIDTH = 20  # of world_model_quarter, and a space
GROUP_WIDTH = 10
COLUMNS = [
    ("searches", 9),
    ("exact", 7),
    ("title", 7),
    ("nothing", 8),
    ("facts", 7),
    ("right", 7),
    ("false", 7),
    ("sure", 7),
    ("F1", 7),
    ("nll", 7),
    ("entropy", 9),
    ("AUROC", 7),
]
LEGEND = (
    "of searches, %: exact to the letter, first title right, 'Nothing found.' where that is so;\n"
    "of facts asked for, %: stated right (where the tool states them), another value stated, and\n"
    "that with an entropy below the median of right statements; AUROC: entropy against wrong facts"
)


def table_heading() -> str:
    """Return what the columns mean, and their names."""
    names = "".join(name.rjust(width) for name, width in COLUMNS)
    return f"{LEGEND}\n{'':{ROW_WIDTH + GROUP_WIDTH}}{names}"


def table_line(row: str, group: str, fidelity: Fidelity) -> str:
    """Return one line of the table."""
    cells = [
        str(fidelity.searches),
        _percent(fidelity.exact),
        _percent(fidelity.title_right),
        _percent(fidelity.nothing_right),
        str(fidelity.asked_facts),
        _percent(fidelity.fact_right),
        _percent(fidelity.falsehoods),
        _percent(fidelity.confident_falsehoods),
        _number(fidelity.word_f1),
        _number(fidelity.nll),
        _number(fidelity.entropy),
        _number(fidelity.auroc),
    ]
    aligned = [cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)]
    return row.ljust(ROW_WIDTH) + group.ljust(GROUP_WIDTH) + "".join(aligned)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# ---- fidelity.json -------------------------------------------------------------------------------
def fidelity_to_json(table: FidelityTable) -> str:
    """Return the text of fidelity.json: {row: {group: {split: figures}}}."""
    rows = {
        row: {
            group: {split: asdict(fidelity) for split, fidelity in splits.items()}
            for group, splits in groups.items()
        }
        for row, groups in table.items()
    }
    return json.dumps(rows, indent=1, allow_nan=False)


def read_fidelity(path: Path) -> FidelityTable:
    """Read fidelity.json. Raises UserError where it is not that file."""
    refusal = f"{path}: cut or damaged; make it with: python world_model.py fidelity"
    with refusing_damage(refusal):
        rows = parse_json(path.read_text(encoding="utf-8"))
        return {
            row: {
                group: {split: _fidelity_from_json(values) for split, values in splits.items()}
                for group, splits in groups.items()
            }
            for row, groups in rows.items()
        }


def _fidelity_from_json(values: Mapping[str, Any]) -> Fidelity:
    figures = dict(values)
    figures["reliability"] = [EntropyGroup(**group) for group in values["reliability"]]
    return Fidelity(**figures)
