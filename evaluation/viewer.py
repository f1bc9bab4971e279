"""The viewers: a page of trajectories, coloured by who wrote them, and one of imagined texts.

All texts in it come from a model or a corpus, so the template escapes everything that it is given,
and spells out what would steer a page, such as an order to write from right to left.
"""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from common.terminal import printable
from data.trajectory import Role
from data.trajectory_rows import TrajectoryRow

TRAJECTORIES_OF_A_STAGE = 20  # shown of those that a stage kept
ROLE_NAMES = [role.name.lower() for role in Role]

TEMPLATE = "viewer.html.jinja"
IMAGINED_TEMPLATE = "imagined.html.jinja"
WORD = re.compile(r"\S+\s*")  # a word with the space after it

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=lambda value: printable(value) if isinstance(value, str) else value,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass
class Span:
    """Tokens in a row that have one role and one mask."""

    role: str
    is_policy: bool  # mask 1: the policy wrote them as policy
    text: str


@dataclass
class ShownTrajectory:
    """One trajectory as the page shows it."""

    question: str
    facts: str  # a line below the question
    spans: list[Span]


@dataclass
class ShownStage:
    """One stage as the page shows it."""

    title: str
    kept: int  # trajectories in its rollouts.jsonl
    trajectories: list[ShownTrajectory]


def render_page(rollouts: Mapping[str, Sequence[TrajectoryRow]]) -> str:
    """Return the page as HTML.

    rollouts: title of a stage -> rows of its rollouts.jsonl.
    """
    stages = [
        ShownStage(title, len(rows), [_show(row) for row in _spread(rows)])
        for title, rows in rollouts.items()
    ]
    return TEMPLATES.get_template(TEMPLATE).render(roles=ROLE_NAMES, stages=stages)


def _spread(rows: Sequence[TrajectoryRow]) -> list[TrajectoryRow]:
    """Return rows from the first to the last, at equal distances, so that all steps are seen."""
    positions = np.linspace(0, len(rows) - 1, TRAJECTORIES_OF_A_STAGE).round().astype(int)
    return [rows[position] for position in np.unique(positions)]


def _show(row: TrajectoryRow) -> ShownTrajectory:
    facts = [
        f"gold: {' / '.join(row.golden_answers)}",
        f"reward {row.reward:g}",
        f"{len(row.tokens)} tokens",
    ]
    if row.step is not None:
        facts.insert(0, f"step {row.step}")
    return ShownTrajectory(row.question, " · ".join(facts), _spans(row))


def _spans(row: TrajectoryRow) -> list[Span]:
    spans = []
    tokens = zip(row.role, row.mask, row.tokens, strict=True)
    for (role, mask), group in itertools.groupby(tokens, lambda token: token[:2]):
        text = "".join(piece for _, _, piece in group)
        spans.append(Span(ROLE_NAMES[role], bool(mask), text))
    return spans


# ---- imagined observations -----------------------------------------------------------------------
@dataclass
class Piece:
    """Words in a row that two texts share, or that only one of them has."""

    text: str
    is_shared: bool


@dataclass
class Comparison:
    """One imagined observation beside what the tool says."""

    query: str
    is_exact: bool
    real: list[Piece]
    imagined: list[Piece]


@dataclass
class ShownModel:
    """What one model imagines, as the page shows it."""

    title: str
    comparisons: list[Comparison]


def render_imagined(models: Sequence[ShownModel]) -> str:
    """Return the page of imagined observations as HTML."""
    return TEMPLATES.get_template(IMAGINED_TEMPLATE).render(models=models)


def compare_texts(query: str, real: str, imagined: str) -> Comparison:
    """Return two observations, word by word, with what only one of them has apart."""
    real_words = WORD.findall(real)
    imagined_words = WORD.findall(imagined)
    # Spaces make no difference. In short texts no word is too common to be matched (autojunk).
    matcher = difflib.SequenceMatcher(
        None,
        [word.strip() for word in real_words],
        [word.strip() for word in imagined_words],
        autojunk=False,
    )
    comparison = Comparison(query, imagined == real, [], [])
    for tag, real_start, real_end, start, end in matcher.get_opcodes():
        is_shared = tag == "equal"
        if real_start < real_end:
            text = "".join(real_words[real_start:real_end])
            comparison.real.append(Piece(text, is_shared))
        if start < end:
            text = "".join(imagined_words[start:end])
            comparison.imagined.append(Piece(text, is_shared))
    return comparison
