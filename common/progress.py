"""Progress bars, by tqdm."""

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
