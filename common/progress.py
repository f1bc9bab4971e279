"""Progress bars, by tqdm."""

import os
import sys

if not sys.stderr.isatty():
    # In a file a bar is a line now and then. tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_MININTERVAL", "20")
from tqdm import tqdm

__all__ = ["progress_bar", "tqdm"]


def progress_bar(total: int, description: str | None, unit: str) -> tqdm:
    """Return a tqdm bar that leaves nothing behind; it is silent where it has no description."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=description is None,
        leave=False,
        smoothing=0.1,
    )
