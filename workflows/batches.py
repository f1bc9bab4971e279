"""Many questions, a batch at a time; several processes share them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from common import ranks
from common.progress import progress_bar

Value = TypeVar("Value")


def in_batches(
    items: Sequence[Any],
    answer_batch: Callable[[list[int], Any], list[Value]],
    batch_rows: int,
    search: Any = None,
    description: str | None = None,
) -> list[Value]:
    """Return a result for each item, in order.

    items: what is asked; equal neighbours are answered by one process.
    answer_batch: (the numbers of a batch's items, search) -> a result for each.
    batch_rows: items of a batch at most.
    description: of the progress bar; none where it is not said.
    """

    def answer_share(share: list[int], search: Any) -> list[Value]:
        results: list[Value] = []
        with progress_bar(len(share), description, "question") as bar:
            for start in range(0, len(share), batch_rows):
                batch = share[start : start + batch_rows]
                results += answer_batch(batch, search)
                bar.update(len(batch))
        return results

    return ranks.split(items, answer_share, search)
