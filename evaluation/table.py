"""The table that eval.py prints: a row each, EM of each question set, and what stands beside it."""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from evaluation.figures import RowFigures, percent_cell


class WorkflowName(StrEnum):
    """Names of the rows in which a script asks the base model.

    They stand here, and not where eval.py says what each row does, since plot.py needs them too
    and would load the models' code with eval.py.
    """

    AT_ONCE = "model only (at once)"
    FROM_MEMORY = "model only"
    RETRIEVE_THEN_READ = "retrieve-then-read"
    ORACLE = "oracle passages"
    REACT = "ReAct workflow"
    REFLEXION = "Reflexion workflow"


NAME_WIDTH = 24
SET_WIDTH = 11
SET_NAME_LETTERS = 10  # of a question set's name, at most

# Columns after those of the question sets: (heading, width).
AVERAGE_COLUMNS = [
    ("avg", 8),
    ("95% interval", 15),
    ("F1", 7),
    ("actions", 9),
    ("known", 7),
    ("unknown", 9),
    ("malformed", 11),
]
JUDGE_COLUMN = ("judge", 7)


def format_table(rows: Mapping[str, RowFigures], sets: Iterable[str]) -> str:
    """Return the table as text.

    sets: names of the question sets, a column each.
    A column "judge" is there where a language model judged a row.
    """
    sets = list(sets)
    columns = list(AVERAGE_COLUMNS)
    if any(row.judge is not None for row in rows.values()):
        columns.append(JUDGE_COLUMN)
    widths = [SET_WIDTH] * len(sets) + [width for _, width in columns]
    headings = [name[:SET_NAME_LETTERS] for name in sets] + [heading for heading, _ in columns]
    lines = [_join("EM", headings, widths)]
    for name, row in rows.items():
        cells = _set_cells(row, sets) + _average_cells(row)
        if JUDGE_COLUMN in columns:
            cells.append(_judge_cell(row))
        lines.append(_join(name, cells, widths))
    return "\n".join(lines)


def _set_cells(row: RowFigures, sets: Iterable[str]) -> list[str]:
    """Return the EM of each set; a row need not be asked all of them."""
    cells = []
    for name in sets:
        em = row.sets[name].em if name in row.sets else None
        cells.append(_number(em, 1))
    return cells


def _average_cells(row: RowFigures) -> list[str]:
    return [
        _number(row.average.em, 1),
        f"{row.em_low:.1f} -{row.em_high:5.1f}",
        _number(row.average.f1, 1),
        _number(row.average.actions, 2),
        _number(row.acting.search_known, 2),
        _number(row.acting.search_unknown, 2),
        percent_cell(row.average.malformed),
    ]


def _judge_cell(row: RowFigures) -> str:
    if row.judge is None:
        return _number(None, 1)
    return _number(row.judge.average, 1)


def _number(value: float | None, decimals: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{decimals}f}"


def _join(name: str, cells: list[str], widths: list[int]) -> str:
    aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return name.ljust(NAME_WIDTH) + "".join(aligned)
