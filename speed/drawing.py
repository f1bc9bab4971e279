"""The figures of bench.py."""

from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter, StrMethodFormatter

from speed.growth import Curve
from speed.pairs import Comparison
from speed.sharing import SharedTokens

BLUE = "#2f6db3"
GREY = "#888888"
BAR = 0.55


def draw_comparisons(comparisons: Sequence[Comparison]) -> Figure:
    """Draw how many times faster ours is: median, lowest and highest ratio."""
    figure = plt.figure(figsize=(8, 1.2 + 0.5 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for y, comparison in enumerate(comparisons):
        ratio = comparison.ratio
        ends = [[ratio.median - ratio.lowest], [ratio.highest - ratio.median]]
        axes.barh(y, ratio.median, BAR, color=BLUE, xerr=ends, ecolor=GREY, capsize=3)
        axes.text(ratio.highest, y, f"  {ratio.median:.2f}", va="center")
    names = [f"{comparison.name}, beside {comparison.other}" for comparison in comparisons]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xlim(0, 1.15 * max(comparison.ratio.highest for comparison in comparisons))
    axes.set_xlabel("times faster: median of paired ratios, lowest and highest")
    _remove_frame(axes)
    return figure


def draw_growth(curves: Sequence[Curve]) -> Figure:
    """Draw what a unit costs by what grows: medians, and bands from the lowest to the highest."""
    axis_names = list(dict.fromkeys(curve.axis for curve in curves))
    lines = -(-len(axis_names) // 2)
    figure = plt.figure(figsize=(9, 3.4 * lines), layout="constrained")
    parts = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes in parts[len(axis_names) :]:
        axes.set_visible(False)
    for axes, axis in zip(parts, axis_names, strict=False):
        for curve in curves:
            if curve.axis == axis:
                _draw_curve(axes, curve)
        axes.set_xlabel(axis)
        axes.legend(frameon=False)
        _remove_frame(axes)
    return figure


def _draw_curve(axes: Axes, curve: Curve) -> None:
    sizes = [point.size for point in curve.points]
    (line,) = axes.plot(
        sizes,
        [1e3 * point.seconds.median for point in curve.points],
        marker="o",
        label=f"{curve.name}, ms a {curve.unit}",
    )
    axes.fill_between(
        sizes,
        [1e3 * point.seconds.lowest for point in curve.points],
        [1e3 * point.seconds.highest for point in curve.points],
        color=line.get_color(),
        alpha=0.25,
    )
    if sizes[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)


def draw_sharing(shares: Sequence[SharedTokens]) -> Figure:
    """Draw which share of a group's tokens is computed for several rollouts at once."""
    figure = plt.figure(figsize=(9, 3.6), layout="constrained")
    by_temperature, by_entropy = figure.subplots(1, 2, sharey=True)
    for size in dict.fromkeys(share.group_size for share in shares):
        own = [share for share in shares if share.group_size == size]
        percent = [100 * share.all_groups.shared for share in own]
        by_temperature.plot(
            [share.temperature for share in own], percent, marker="o", label=f"{size} rollouts"
        )
        by_entropy.plot([share.entropy for share in own], percent, marker="o")
    by_temperature.set_xlabel("temperature")
    by_entropy.set_xlabel("entropy, nats a token")
    by_temperature.set_ylabel("shared tokens, %")
    by_temperature.set_ylim(0, 100)
    by_temperature.legend(frameon=False)
    for axes in (by_temperature, by_entropy):
        _remove_frame(axes)
    return figure


def _remove_frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


# Figures go into files: no screen is needed.
matplotlib.use("agg")
