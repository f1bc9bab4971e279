"""Two sides that do the same work in turns, and how much faster the one is."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass
class Timing:
    """What one side took once."""

    seconds: float
    units: float  # tokens, steps or rollouts that it made in them
    # Of the products that it can't do without: padding does not count. 0: not counted.
    flops: float
    texts: list[list[int]] = field(default_factory=list)  # ids; none where it trained

    @property
    def seconds_per_unit(self) -> float:
        """Seconds that a token, a step or a rollout took."""
        return self.seconds / self.units


@dataclass
class Spread:
    """The middle and the ends of some figures."""

    median: float
    lowest: float
    highest: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median, the lowest and the highest of some figures."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass
class Comparison:
    """Some pairs of runs of two sides, which took turns."""

    name: str
    unit: str  # what is counted: "token", "step", ..
    other: str  # the other side: a library or a commit
    pairs: list[tuple[Timing, Timing]]  # ours and theirs
    note: str = ""

    @property
    def ratio(self) -> Spread:
        """How much longer the other side takes for a unit: of each pair, then over the pairs.

        What slows the machine down for a while slows both sides of a pair, and cancels out.
        """
        ratios = [their.seconds_per_unit / our.seconds_per_unit for our, their in self.pairs]
        return spread(ratios)

    def sides(self) -> tuple[list[Timing], list[Timing]]:
        """Return all runs of ours, and all of theirs."""
        return [our for our, _ in self.pairs], [their for _, their in self.pairs]


def take_turns(
    name: str,
    unit: str,
    other: str,
    ours: Callable[[], Timing],
    theirs: Callable[[], Timing],
    repeats: int,
    note: str = "",
) -> Comparison:
    """Run both sides in turns: ours, theirs, ours, .. after one turn that does not count.

    In the first turn memory is got, caches are filled and kernels are chosen.
    """
    ours()
    theirs()
    return Comparison(name, unit, other, [(ours(), theirs()) for _ in range(repeats)], note)


def count_same_texts(comparison: Comparison) -> str:
    """Return how many texts both sides wrote alike in the last turn, as a note."""
    our, their = comparison.pairs[-1]
    same = sum(a == b for a, b in zip(our.texts, their.texts, strict=True))
    return f"{same} of {len(our.texts)} texts are the same"


class Ceilings(NamedTuple):
    """GFLOP/s of a large matrix product in the number type of each side."""

    ours: float
    theirs: float


# ---- what is printed -----------------------------------------------------------------------------
HEADING = (
    f"{'':12}{'beside':18}{'unit':>8}{'ours':>11}{'theirs':>11}"
    f"{'times faster':>21}{'GFLOP/s: ours':>16}{'theirs':>15}"
)


def line_of(comparison: Comparison, ceilings: Ceilings) -> str:
    """Return a comparison as a line of the table, with each side's share of its ceiling."""
    ours, theirs = comparison.sides()
    ratio = comparison.ratio
    range_of_ratios = f"{ratio.median:.2f} ({ratio.lowest:.2f}-{ratio.highest:.2f})"
    our_share = _share(ours, ceilings.ours)
    their_share = _share(theirs, ceilings.theirs)
    return (
        f"{comparison.name:12}{comparison.other:18}{comparison.unit:>8}"
        f"{with_unit(_median_seconds(ours)):>11}{with_unit(_median_seconds(theirs)):>11}"
        f"{range_of_ratios:>21}{our_share:>16}{their_share:>15}  {comparison.note}"
    )


def to_json(comparison: Comparison, ceilings: Ceilings) -> dict[str, Any]:
    """Return a comparison as it stands in bench.jsonl; ratios above 1: ours is faster."""
    ours, theirs = comparison.sides()
    return {
        "name": comparison.name,
        "unit": comparison.unit,
        "beside": comparison.other,
        "ratio": vars(comparison.ratio),
        "ours": _side_to_json(ours, ceilings.ours),
        "theirs": _side_to_json(theirs, ceilings.theirs),
        "note": comparison.note,
    }


def _side_to_json(timings: Sequence[Timing], ceiling: float) -> dict[str, Any]:
    gflops = gflops_of(timings)
    return {
        "seconds_per_unit": vars(spread([timing.seconds_per_unit for timing in timings])),
        "units": statistics.median(timing.units for timing in timings),
        "gflops": gflops,
        "share_of_ceiling": gflops / ceiling,
    }


def gflops_of(timings: Sequence[Timing]) -> float:
    """Return 10^9 floating-point operations a second, the median of some runs."""
    return statistics.median(timing.flops / timing.seconds for timing in timings) / 1e9


def _median_seconds(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.seconds_per_unit for timing in timings)


def _share(timings: Sequence[Timing], ceiling: float) -> str:
    gflops = gflops_of(timings)
    if not gflops:
        return "-"
    return f"{gflops:.1f} ({gflops / ceiling:.0%})"


def with_unit(seconds: float) -> str:
    """Return a time with three digits.

    >>> with_unit(0.00004567), with_unit(0.012), with_unit(3.4)
    ('45.7 us', '12 ms', '3.4 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"
