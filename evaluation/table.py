"""The table that eval.py prints: a row each, EM of each question set, and what stands beside it."""

from collections.abc import Iterable, Mapping
from typing import Any

NAME_WIDTH = 24
SET_WIDTH = 11
SET_NAME_LETTERS = 10  # of a question set's name, at most

# Columns behind those of the question sets: (heading, width).
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


def format_table(rows: Mapping[str, dict[str, dict[str, Any]]], sets: Iterable[str]) -> str:
    """Return the table as text.

    rows: the figures of each row, as `statistics.summarize` gives them.
    sets: names of the question sets, a column each.
    A column "judge" is there where a language model judged a row.
    """
    sets = list(sets)
    columns = list(AVERAGE_COLUMNS)
    if any("judge" in figures["avg"] for figures in rows.values()):
        columns.append(JUDGE_COLUMN)
    widths = [SET_WIDTH] * len(sets) + [width for _, width in columns]
    headings = [name[:SET_NAME_LETTERS] for name in sets] + [heading for heading, _ in columns]
    lines = [_join("EM", headings, widths)]
    for name, figures in rows.items():
        cells = [_number(figures.get(set_name, {}).get("em"), 1) for set_name in sets]
        cells += _average_cells(figures["avg"])
        if JUDGE_COLUMN in columns:
            cells.append(_number(figures["avg"].get("judge"), 1))
        lines.append(_join(name, cells, widths))
    return "\n".join(lines)


def _average_cells(average: dict[str, Any]) -> list[str]:
    return [
        _number(average["em"], 1),
        f"{average['em_low']:.1f} -{average['em_high']:5.1f}",
        _number(average["f1"], 1),
        _number(average["actions"], 2),
        _number(average["search_known"], 2),
        _number(average["search_unknown"], 2),
        _number(average["malformed"], 1) + "%",
    ]


def _number(value: float | None, decimals: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{decimals}f}"


def _join(name: str, cells: list[str], widths: list[int]) -> str:
    aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return name.ljust(NAME_WIDTH) + "".join(aligned)
