"""Several processes that work on one run together: which one this is, and how they share the work.

    torchrun --nproc-per-node 2 train_rl.py            # docs/processes.md

Each process is a *rank*, and all run the same script with the same seeds. What takes time they
divide: each rolls out its share of the questions, and computes gradients on its share of the texts.
Then they tell each other what came out, so that all hold the same again. What costs little, such as
rewards and the optimizer's step, each does for itself. Rank 0 alone writes, prints, and asks
services outside. Without a launcher there is one rank, and all of this changes nothing.

How a message goes from rank to rank is the framework's matter (backends/*/ranks.py).
"""

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

Value = TypeVar("Value")


class LostRankError(Exception):
    """Another process has ended before its work was done."""


def launcher() -> str:
    """Return what has started several processes, "" where this one is alone."""
    if "MLX_RANK" in os.environ:
        return "mlx.launch"
    return "torchrun" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


@dataclass
class _Group:
    """The processes of this run, as this one knows them."""

    rank: int
    count: int  # 1 until the backend has met the others
    gather: Callable[[Any], list[Any]]


# Before the processes have met, a launcher has already said which rank each is.
_RANK_VARIABLES = {"torchrun": "RANK", "mlx.launch": "MLX_RANK", "": ""}
_group = _Group(
    rank=int(os.environ.get(_RANK_VARIABLES[launcher()], "0")),
    count=1,
    gather=lambda value: [value],
)


def join(rank: int, count: int, gather: Callable[[Any], list[Any]]) -> None:
    """Take part from here on. gather: carries a value of each rank to all of them."""
    _group.rank = rank
    _group.count = count
    _group.gather = gather


def rank() -> int:
    """Return the number of this process."""
    return _group.rank


def count() -> int:
    """Return how many processes there are."""
    return _group.count


def is_first() -> bool:
    """Return whether this process is the one that writes, prints and asks."""
    return _group.rank == 0


@contextlib.contextmanager
def talking() -> Generator[None]:
    """Raise LostRankError for what the frameworks raise where another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"another process has ended, so that this one can't go on: {error}"
        ) from None


@contextlib.contextmanager
def only_first_prints() -> Generator[None]:
    """Let what other ranks than the first print go to nowhere; not how an error ends them."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


# ---- all ranks call these together ---------------------------------------------------------------
def gather(value: Value) -> list[Value]:
    """Return the value of each rank, in the order of the ranks."""
    with talking():
        return _group.gather(value)


def wait() -> None:
    """Wait until all ranks have come this far."""
    gather(None)


def of_first(function: Callable[[], Value]) -> Value:
    """Return in all ranks what a function returns in the first, which alone runs it.

    It runs when all have come this far, so that none still reads what it changes, and no rank goes
    on before its end. What it raises, all raise.
    """
    if count() == 1:
        return function()
    wait()
    value: Any = None
    error: Exception | None = None
    if is_first():
        try:
            value = function()
        except Exception as raised:
            error = raised
    value, error = gather((value, error))[0]
    if error is not None:
        raise error
    return value


def split(
    items: Sequence[Any],
    compute: Callable[[list[int], Any], list[Value]],
    search: Any = None,
) -> list[Value]:
    """Return a result for each item, in order; each rank computes those of its share.

    Equal neighbours stay in one share: while rollouts of a question agree they are computed once.

    compute: (numbers of some items, search) -> a result for each of them.
    search: what they ask meanwhile, see SharedSearch; also "imagine" or None, as in a rollout.
    """
    if count() == 1:
        return compute(list(range(len(items))), search)
    shares = _deal(items)
    if callable(search):
        shared = SharedSearch(search)
        results = compute(shares[rank()], shared)
        shared.finish()
    else:
        results = compute(shares[rank()], search)
    result_of = {
        number: result
        for share, part in zip(shares, gather(results), strict=True)
        for number, result in zip(share, part, strict=True)
    }
    return [result_of[number] for number in range(len(items))]


def _deal(items: Sequence[Any]) -> list[list[int]]:
    """Return the numbers of the items of each rank; runs of equal ones are dealt in turn."""
    runs = [list(run) for _, run in groupby(range(len(items)), key=lambda number: items[number])]
    return [
        [number for run in runs[first :: count()] for number in run] for first in range(count())
    ]


class SharedSearch:
    """A search that all ranks make together, while each works on its own share.

    The first search of each rank is made with the first of all others, and so on; a rank that has
    no more searches helps with those of the others until the end. All queries are searched by all
    ranks: so each holds the memory, the counts and what is left of a budget as one process would.
    """

    def __init__(self, search: Callable[..., list[Any]]) -> None:
        """Share a search: (queries, their trajectories) -> observations."""
        self.search = search

    def __call__(self, queries: list[str], trajectories: Sequence[Any]) -> list[Any]:
        """Return the observation of each query of this rank."""
        observations = self._search_together((queries, list(trajectories)))
        assert observations is not None, "this rank has asked"
        return observations

    def finish(self) -> None:
        """Search with the others until none of them asks any more."""
        while self._search_together(None) is not None:
            pass

    def _search_together(self, own: tuple[list[str], list[Any]] | None) -> list[Any] | None:
        """Return the observations of this rank's queries, None where no rank asks any more.

        own: queries and trajectories of this rank, None where it has no more.
        """
        all_calls = gather(own)
        if not any(all_calls):
            return None
        queries: list[str] = []
        trajectories: list[Any] = []
        start = 0
        for number, calls in enumerate(all_calls):
            if number == rank():
                start = len(queries)
            if calls is not None:
                queries += calls[0]
                trajectories += calls[1]
        observations = self.search(queries, trajectories)
        own_count = len(own[0]) if own is not None else 0
        return observations[start : start + own_count]
