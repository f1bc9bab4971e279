"""Tables in Markdown: their lines, and how a gain is written."""

from collections.abc import Sequence

from evaluation.figures import Estimate


def table_row(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return "| " + " | ".join(cells) + " |"


def table_head(titles: Sequence[str]) -> list[str]:
    """Return the two lines with which a table begins."""
    return [table_row(titles), table_row(["---"] * len(titles))]


def gain_text(gain: Estimate) -> str:
    """Return a gain in points with its interval, signs included."""
    return f"{gain.points:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"


def em_text(em: Estimate) -> str:
    """Return an exact match in percent with its interval."""
    return f"{em.points:.1f} ({em.low:.1f} to {em.high:.1f})"
