"""Figures and the trajectory viewer, from the logs of a run alone: no model is loaded.

    python plot.py                          # reads out/nano, writes out/nano/figures
    python plot.py config/smollm2.py        # the same for a real checkpoint
    python plot.py --run=quick

training.png         loss of the SFT stages; reward, exact match, actions, entropy, malformed share
                     and length over RL
table.png            exact match of each row of the table, with its 95% interval
search.png           when each row acts: how often it searches for facts that the base model knows
                     and does not know, and exact match on both (appendix A)
actions.png          agent models by number of actions: share of the correct answers, and success
                     rate (paper Fig. 3)
world_models.png     when imagination pays: exact match against calls of the tool, and the time to
                     reach one (python -m environments.cost_curve writes what it draws)
trade_offs.png       exact match against how well the policy imagines (SFT-3), what the world model
                     knows (share of the titles), and how often it searches for what is known
                     (price of a call) (python -m environments.trade_offs writes what it draws)
fidelity.png         how often what each model imagines states the asked fact, right or wrong
                     (python world_model.py fidelity writes what it draws)
trajectories.html    what the policy wrote, token by token, coloured by who wrote it

Stages that are not there are left out, and so is a stage that is still training.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
from common.errors import UserError

# isort: split
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from common.files import read_log, write_bytes, write_text
from common.runs import run_folder
from common.settings import RunSettings, main
from data.trajectory_rows import TrajectoryRow
from environments.costs import CURVE_FILE, LATENCIES, CostCurve, RowCost, read_curve
from environments.trades import TRADE_OFFS_FILE, TradeOffs, read_trade_offs
from evaluation.fidelity import ALL, FIDELITY_FILE, GROUPS, FidelityTable, read_fidelity
from evaluation.figures import Estimate, RowFigures, read_figures
from evaluation.table import WorkflowName
from evaluation.viewer import render_page

Rows = list[dict[str, Any]]

# ---- what is drawn -------------------------------------------------------------------------------
SFT_TITLES = {
    "base": "base: pretraining",
    "sft1": "SFT-1: when to act",
    "sft2": "SFT-2: how to act",
    "sft3": "SFT-3: world model",
    "sft2_alone": "SFT-2 alone",
}
RL_TITLES = {
    "rl1": "RL-1, imagined environment",
    "rl2": "RL-2, real environment",
    "rl2_alone": "RL-2 alone",
    "rl2_from_sft2": "SFT-1&2 + RL-2",
}
RL_PANELS = {
    "reward": "Reward of a trajectory",
    "em": "Exact match",
    "actions": "Actions of a trajectory",
    "entropy": "Entropy of the policy, nats a token",
    "malformed": "Malformed trajectories",
    "length": "Tokens of a trajectory",
}
SHARES = ("em", "malformed")  # panels whose figures are shares, shown in percent
WORKFLOW_NAMES = list(WorkflowName)

SFT_SMOOTHING = 11  # steps of the moving mean
RL_SMOOTHING = 5
SPIKE_PERCENTILE = 99  # losses above it may leave the picture
FEW_QUESTIONS = 10  # a success rate over fewer is shown pale
SMALLEST_LABEL = 6  # percent of a bar; a smaller part has no number on it

# ---- colours, after Okabe and Ito: every eye can tell them apart ---------------------------------
GREY = "#8c8c8c"
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
YELLOW = "#e69f00"
DARK = "#222222"
TICKS = "#444444"
PALE = "#f2f2f2"
RL_COLORS = {"rl1": BLUE, "rl2": ORANGE, "rl2_alone": GREEN, "rl2_from_sft2": PURPLE}
KIND_COLORS = {
    "real": ORANGE,
    "auxiliary": YELLOW,
    "internal": PURPLE,
    "distilled": BLUE,
    "mixed": GREEN,
}
LINE_COLORS = (BLUE, ORANGE, GREEN)  # of the lines of a trade-off
SHADES = plt.get_cmap("Blues")
SHARE_SHADES = (0.12, 0.95)  # of no action, and of the most
SUCCESS_SHADES = (0.08, 0.95)  # of a success rate of 0 and of 1
WHITE_INK_FROM = 0.62  # success rate from which on numbers are white

# ---- sizes: figures in inches, bars as a share of the distance between rows ----------------------
WIDTH = 11
TABLE_WIDTH = 7.5
SFT_HEIGHT = 2.7
RL_HEIGHT = 5
TABLE_BAR = 0.64
PAIR_BAR = 0.36
PAIR_OFFSET = 0.2  # of the two bars of a row, up and down from its middle
ACTION_BAR = 0.7
ACTION_BOX = 0.94  # width of a box in the right part of actions.png
CURVE_WIDTH = 14
TRADE_HEIGHT = 3.6
CURVE_MARKER = 11  # diameters of markers, in points
TIME_MARKER = 6
FEWEST_CALLS = 300  # the axis of calls is logarithmic from here on; 0 is at its left edge
POINTS_BELOW_START = 12  # of EM; rows further below lie on the lower edge
CALL_TICKS = (0, 1000, 3000, 10_000, 30_000, 100_000)
THIN = 0.8  # widths of lines, in points
MEDIUM = 1.2
THICK = 1.8
LABEL_GAP = (5, 0)  # of a number after its bar, in points
SMALL_FONT = 8
TINY_FONT = 6.5
ROOM_FOR_LABELS = 1.1  # the x axis ends at so many times its largest value

matplotlib.use("Agg")  # it draws to files and needs no screen
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "xtick.color": TICKS,
        "ytick.color": TICKS,
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
    }
)


@dataclass(kw_only=True)
class PlotSettings(RunSettings):
    """The settings of plot.py."""


# ---- what several figures share ------------------------------------------------------------------
def _set_title(figure: Figure | SubFigure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", weight="bold")


def _label_bar(axes: Axes, text: str, end: float, y: float, **style: Any) -> None:
    """Write a number after a bar."""
    axes.annotate(text, (end, y), LABEL_GAP, textcoords="offset points", va="center", **style)


def _remove_frame(axes: Axes) -> None:
    """Bars with names and numbers on them need no frame."""
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


# ---- training.png --------------------------------------------------------------------------------
def draw_training(logs: Mapping[str, Rows]) -> Figure:
    """Draw the logs of the stages: {stage: rows of its log.jsonl}."""
    sft_stages = [stage for stage in SFT_TITLES if stage in logs]
    rl_stages = [stage for stage in RL_TITLES if stage in logs]
    heights = []
    if sft_stages:
        heights.append(SFT_HEIGHT)
    if rl_stages:
        heights.append(RL_HEIGHT)
    figure = plt.figure(figsize=(WIDTH, sum(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False, hspace=0.04)
    if sft_stages:
        _draw_sft(parts[0, 0], logs, sft_stages)
    if rl_stages:
        _draw_rl(parts[-1, 0], logs, rl_stages)
    return figure


def _draw_sft(part: SubFigure, logs: Mapping[str, Rows], stages: Sequence[str]) -> None:
    _set_title(
        part,
        "Supervised stages: training loss over optimizer steps (each stage has its own loss)",
    )
    all_axes = part.subplots(1, len(stages), squeeze=False)[0]
    for axes, stage in zip(all_axes, stages, strict=True):
        end = _draw_curve(axes, logs[stage], "loss", BLUE, SFT_SMOOTHING)
        axes.annotate(
            f"{end[1]:.2f}",
            end,
            (0, 6),
            textcoords="offset points",
            ha="right",
            color=BLUE,
            weight="bold",
        )
        # The few highest losses may leave the picture: one spike would flatten the rest.
        highest = np.percentile([row["loss"] for row in logs[stage]], SPIKE_PERCENTILE)
        axes.set(title=SFT_TITLES[stage], xlabel="step", ylim=(0, 1.1 * highest))


def _draw_rl(part: SubFigure, logs: Mapping[str, Rows], stages: Sequence[str]) -> None:
    _set_title(part, "Reinforcement learning: what the rollouts of each step looked like")
    # RL-2 goes on where RL-1 ended; the ablations start from another model, at step 0.
    rl1_steps = 0
    if "rl1" in logs:
        rl1_steps = logs["rl1"][-1]["step"] + 1
    all_axes = part.subplots(2, 3, sharex=True)
    for axes, (figure, title) in zip(all_axes.flat, RL_PANELS.items(), strict=True):
        for stage in stages:
            first_step = rl1_steps if stage == "rl2" else 0
            color = RL_COLORS[stage]
            label = RL_TITLES[stage]
            _draw_curve(axes, logs[stage], figure, color, RL_SMOOTHING, first_step, label)
        if rl1_steps and "rl2" in logs:
            _mark_real_environment(axes, rl1_steps)
        if figure in SHARES:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_ylim(bottom=0)
        axes.set(title=title)
    for axes in all_axes[1]:
        axes.set(xlabel="step")
    part.legend(
        *all_axes[0, 0].get_legend_handles_labels(),
        loc="outside lower left",
        ncols=len(stages),
        frameon=False,
    )


def _mark_real_environment(axes: Axes, step: int) -> None:
    """Mark the step from which on a real tool answers."""
    axes.axvline(step - 0.5, color=GREY, linewidth=THIN, linestyle=(0, (4, 3)))
    axes.annotate(
        "real",
        (step, 1),
        (3, -9),
        ("data", "axes fraction"),
        "offset points",
        color=GREY,
        fontsize=SMALL_FONT,
    )


def _draw_curve(
    axes: Axes,
    log: Rows,
    figure: str,
    color: str,
    smoothing: int,
    first_step: int = 0,
    label: str | None = None,
) -> tuple[float, float]:
    """Draw one figure of a log: pale as it is, and on top its moving mean.

    smoothing: steps of the mean; at the ends it is over those that are there.
    Returns the last point of the mean.
    """
    steps = [first_step + row["step"] for row in log]
    values = [row[figure] for row in log]
    window = np.ones(min(smoothing, len(values)))
    counts = np.convolve(np.ones(len(values)), window, "same")
    means = np.convolve(values, window, "same") / counts
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=THIN)
    axes.plot(steps, means, color=color, linewidth=THICK, label=label)
    return steps[-1], means[-1]


# ---- table.png -----------------------------------------------------------------------------------
def draw_table(rows: Mapping[str, RowFigures]) -> Figure:
    """Draw the exact match of each row of eval.json, with its interval."""
    figure, axes = plt.subplots(figsize=(TABLE_WIDTH, 0.9 + 0.36 * len(rows)))
    for y, (name, row) in enumerate(rows.items()):
        em = row.average.em
        axes.barh(y, em, TABLE_BAR, color=_row_color(name), alpha=0.75)
        axes.hlines(y, row.em_low, row.em_high, color=DARK, linewidth=MEDIUM)
        _label_bar(axes, f"{em:.1f}", row.em_high, y)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    highest = max(row.em_high for row in rows.values())
    axes.set_xlim(0, ROOM_FOR_LABELS * highest or 1)
    axes.set_xlabel(
        "exact match, %: average over the question sets; "
        "the line is the 95% interval over questions"
    )
    _set_title(
        figure,
        "Exact match without training for action (grey), after SFT (blue), after RL (orange)",
    )
    _remove_frame(axes)
    return figure


def _row_color(name: str) -> str:
    if name in WORKFLOW_NAMES:
        return GREY
    # A folder that --out names may be called rl..
    if "RL" in name or name.startswith("rl"):
        return ORANGE
    return BLUE


# ---- search.png ----------------------------------------------------------------------------------
def draw_search(rows: Mapping[str, RowFigures]) -> Figure:
    """Draw when each row of eval.json acts, and what comes of it (appendix A)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 1.2 + 0.45 * len(rows)), sharey=True)
    acting = [row.acting for row in rows.values()]
    searched_known = [figures.search_known for figures in acting]
    searched_unknown = [figures.search_unknown for figures in acting]
    _draw_bars(left, searched_known, GREEN, -PAIR_OFFSET, scale=100, label="% of known")
    _draw_bars(left, searched_unknown, PURPLE, PAIR_OFFSET, scale=100, label="% of unknown")
    em_known = [figures.em_known for figures in acting]
    em_unknown = [figures.em_unknown for figures in acting]
    _draw_bars(right, em_known, GREEN, -PAIR_OFFSET, scale=1, label=" EM, known")
    _draw_bars(right, em_unknown, PURPLE, PAIR_OFFSET, scale=1, label=" EM, unknown")
    for axes in (left, right):
        axes.set(xlim=(0, 125), xticks=range(0, 101, 20))
        _remove_frame(axes)
    left.set_yticks(range(len(rows)), list(rows))
    left.invert_yaxis()
    left.set_xlabel("facts that a question needs, searched for, %")
    right.set_xlabel("exact match where all facts are known, and where not, %")
    _set_title(
        figure,
        "When to act: searches for what the base model knows and does not know, "
        "and what comes of it (paper appendix A)",
    )
    return figure


def _draw_bars(
    axes: Axes, values: Sequence[float | None], color: str, offset: float, scale: float, label: str
) -> None:
    """Draw a bar for each row that has a value, with the value in front of a label.

    offset: of the bars from the middle of their rows, up or down.
    scale: 100 for shares, which are drawn in percent.
    """
    for y, value in enumerate(values):
        if value is None:
            continue
        axes.barh(y + offset, scale * value, PAIR_BAR, color=color, alpha=0.8)
        text = f"{scale * value:.0f}{label}"
        _label_bar(axes, text, scale * value, y + offset, fontsize=SMALL_FONT)


# ---- actions.png ---------------------------------------------------------------------------------
def draw_actions(agents: Mapping[str, Rows]) -> Figure:
    """Draw agents by number of actions: {row: its predictions} (paper Fig. 3).

    Both parts share the rows, so that any number of models can be told apart.
    """
    most = max(row["actions"] for predictions in agents.values() for row in predictions)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.5 + 0.5 * len(agents)), sharey=True
    )
    for y, predictions in enumerate(agents.values()):
        actions = [row["actions"] for row in predictions]
        questions = np.bincount(actions, minlength=most + 1)
        correct = np.bincount(actions, [row["em"] for row in predictions], most + 1)
        _draw_shares(left, y, correct)
        _draw_success(right, y, questions, correct)
    left.set_yticks(range(len(agents)), list(agents))
    left.set(
        xlim=(0, 100),
        ylim=(len(agents) - 0.5, -0.5),
        xlabel="% of the row's correct answers; shade: number of actions",
    )
    left.set_title("Share of the correct answers", pad=22)
    left.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.97),
        ncols=most + 2,
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.3,
        handletextpad=0.4,
    )
    right.set_title(f"Success rate (grey: fewer than {FEW_QUESTIONS} questions)", pad=22)
    right.set(xlim=(-0.6, most + 0.6), xticks=range(most + 1), xlabel="number of actions")
    _set_title(figure, "Agent models by the number of actions that they took (paper Fig. 3)")
    _remove_frame(left)
    _remove_frame(right)
    return figure


def _draw_shares(axes: Axes, y: int, correct: np.ndarray) -> None:
    """Draw one bar of 100%: the right answers of a row by number of actions."""
    most = len(correct) - 1
    colors = SHADES(np.linspace(*SHARE_SHADES, most + 1))
    shares = 100 * correct / max(1, correct.sum())
    start = 0
    for count, share in enumerate(shares):
        axes.barh(
            y,
            share,
            ACTION_BAR,
            start,
            color=colors[count],
            edgecolor="white",
            linewidth=THIN,
            label=_legend_label(count, most) if y == 0 else None,
        )
        if share >= SMALLEST_LABEL:
            ink = "white" if count > most / 2 else "black"
            middle = start + share / 2
            axes.text(middle, y, f"{share:.0f}", ha="center", va="center", color=ink)
        start += share


def _legend_label(count: int, most: int) -> str:
    if count == most:
        return f"{count} actions"
    return str(count)


def _draw_success(axes: Axes, y: int, questions: np.ndarray, correct: np.ndarray) -> None:
    """Draw a box for each number of actions: how many of its answers are right."""
    for count, total in enumerate(questions):
        if not total:
            continue
        rate = correct[count] / total
        lowest, highest = SUCCESS_SHADES
        color = SHADES(lowest + (highest - lowest) * rate)
        ink = "white" if rate > WHITE_INK_FROM else "black"
        if total < FEW_QUESTIONS:
            color = PALE
            ink = GREY
        axes.barh(y, ACTION_BOX, ACTION_BAR, count - ACTION_BOX / 2, color=color)
        style = {"ha": "center", "va": "center", "color": ink}
        axes.text(count, y - 0.08, f"{100 * rate:.0f}%", **style)
        axes.text(count, y + 0.2, f"of {total}", fontsize=TINY_FONT, **style)


# ---- reproduction_cost.png -----------------------------------------------------------------------
@dataclass
class PracticeCost:
    """What a way to practise gives, and what it asks the tool."""

    em: Estimate  # percent
    raw_calls: float
    distinct_calls: float


def draw_practice_costs(chains: Sequence[Mapping[str, PracticeCost]]) -> Figure:
    """Draw exact match against the calls that practice took.

    chains: each a way to practise: row -> what it gives and has asked so far, in order.
    """
    figure, axes = plt.subplots(figsize=(TABLE_WIDTH, 4.2))
    most_calls = FEWEST_CALLS
    # Names of the first chain stand above its points, those of the second below.
    for chain, color, height in zip(chains, (ORANGE, BLUE), (7, -13), strict=True):
        calls = [row.raw_calls for row in chain.values()]
        most_calls = max(most_calls, *calls)
        em = [row.em.points for row in chain.values()]
        axes.plot(calls, em, ":", color=color, linewidth=MEDIUM)
        axes.plot(calls, em, "o", color=color, markersize=TIME_MARKER)
        for name, row in chain.items():
            axes.vlines(row.raw_calls, row.em.low, row.em.high, color=color, linewidth=THIN)
            axes.annotate(
                name,
                (row.raw_calls, row.em.points),
                (6, height),
                textcoords="offset points",
                color=color,
                fontsize=SMALL_FONT,
            )
    _scale_calls(axes, most_calls)
    # Names stand at the right of their points.
    axes.set_xlim(right=6 * most_calls)
    axes.set_xlabel("searches that the tool answered (raw), those of distillation too")
    axes.set_ylabel("exact match, %")
    _remove_frame(axes)
    _set_title(figure, "What practice gives and asks; vertical lines: 95% interval over questions")
    return figure


# ---- world_models.png ----------------------------------------------------------------------------
def draw_world_models(curve: CostCurve) -> Figure:
    """Draw what each way to practise gives, against what it costs in calls and in time.

    A row has its number in all three parts, and its name beside the last.
    """
    height = 2 + 0.3 * len(curve.rows)
    figure = plt.figure(figsize=(CURVE_WIDTH, height))
    raw, distinct, times = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    distinct.sharey(raw)
    lowest_em = curve.start_em - POINTS_BELOW_START
    for number, row in enumerate(curve.rows, 1):
        color = KIND_COLORS[row.kind]
        raw_calls = [run.raw_calls for run in row.runs]
        _draw_em(raw, number, row, row.raw_calls, raw_calls, color, lowest_em)
        distinct_calls = [run.distinct_calls for run in row.runs]
        _draw_em(distinct, number, row, row.distinct_calls, distinct_calls, color, lowest_em)
        _draw_times(times, number, row, color)
    _set_call_axes(raw, distinct, curve)
    _set_time_axes(times, curve)
    questions = max(row.em.questions for row in curve.rows)
    runs = "1 run" if len(curve.runs) == 1 else f"{len(curve.runs)} runs"
    _set_title(
        figure,
        f"What practice gives and costs: {questions:,} questions, {runs}. "
        "Vertical lines: 95% interval; horizontal ones: from the lowest to the highest run",
    )
    return figure


def _set_call_axes(raw: Axes, distinct: Axes, curve: CostCurve) -> None:
    """Scale and describe the two parts of EM against calls."""
    most_calls = max(max(row.raw_calls for row in curve.rows), FEWEST_CALLS)
    for axes in (raw, distinct):
        axes.axhline(curve.start_em, color=GREY, linewidth=THIN, linestyle=(0, (4, 3)))
        _scale_calls(axes, most_calls)
    raw.annotate(
        "SFT-1&2",
        (0, curve.start_em),
        (2, 3),
        textcoords="offset points",
        color=GREY,
        fontsize=SMALL_FONT,
    )
    raw.set(
        title="Searches that the tool answered (raw)",
        xlabel="calls, those of distillation too",
        ylabel="exact match after practice, %",
    )
    distinct.set(title="Different searches (distinct)", xlabel="calls with a cache before the tool")


def _scale_calls(axes: Axes, most_calls: float) -> None:
    """Give room to no call, and to numbers of calls that differ a hundredfold."""
    axes.set_xscale("symlog", linthresh=FEWEST_CALLS, linscale=0.5)
    axes.set_xticks(CALL_TICKS, [f"{calls:,}" for calls in CALL_TICKS])
    axes.set_xlim(-FEWEST_CALLS / 5, 1.5 * most_calls)


def _set_time_axes(times: Axes, curve: CostCurve) -> None:
    """Scale and describe the part of times, in which the rows have their names."""
    milliseconds = ", ".join(f"{1000 * latency:.0f}" for latency in LATENCIES)
    times.set_xscale("log")
    times.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    times.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    times.xaxis.set_minor_locator(NullLocator())
    names = [f"{row.name}   {number}" for number, row in enumerate(curve.rows, 1)]
    times.set_yticks(range(1, len(curve.rows) + 1), names)
    times.set_ylim(len(curve.rows) + 0.6, 0.4)
    times.set(
        title=f"Minutes until SFT-1&2 + {curve.target_gain:g} points",
        xlabel=f"at {milliseconds} ms a call (light to dark); |: a run",
    )
    _remove_frame(times)


def _draw_em(
    axes: Axes,
    number: int,
    row: RowCost,
    calls: float,
    calls_of_runs: list[float],
    color: str,
    lowest_em: float,
) -> None:
    """Draw the exact match of a row against its calls, as a disc with the row's number.

    lowest_em: a row below it lies on the lower edge, with its figure beside it.
    """
    em = row.em.points
    if em < lowest_em:
        axes.annotate(
            f"{em:.0f}%",
            (calls, lowest_em),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=SMALL_FONT,
        )
        em = lowest_em
    else:
        axes.vlines(calls, row.em.low, row.em.high, color=color, linewidth=THIN, zorder=1)
    lowest = min(calls_of_runs)
    axes.hlines(em, lowest, max(calls_of_runs), color=color, linewidth=THIN, zorder=1)
    axes.plot(calls, em, "o", color=color, markersize=CURVE_MARKER, clip_on=False)
    axes.text(
        calls,
        em,
        str(number),
        ha="center",
        va="center_baseline",
        color="white",
        fontsize=TINY_FONT,
        weight="bold",
    )


def _draw_times(axes: Axes, y: int, row: RowCost, color: str) -> None:
    """Draw the time that a row takes to the target EM: a dot for each latency, a tick for a run."""
    minutes = [time / 60 for time in row.times if time is not None]
    if not minutes:
        axes.text(
            0.02,
            y,
            "not reached",
            transform=axes.get_yaxis_transform(),
            va="center",
            color=GREY,
            fontsize=SMALL_FONT,
        )
        return
    axes.hlines(y, min(minutes), max(minutes), color=color, linewidth=THIN, alpha=0.5)
    for run in row.runs:
        minutes_of_run = [time / 60 for time in run.times if time is not None]
        axes.plot(minutes_of_run, [y] * len(minutes_of_run), "|", color=DARK, alpha=0.5)
    for time, opacity in zip(minutes, np.linspace(0.3, 1, len(minutes)), strict=True):
        axes.plot(time, y, "o", color=color, markersize=TIME_MARKER, alpha=opacity)


# ---- trade_offs.png ------------------------------------------------------------------------------
def draw_trade_offs(content: TradeOffs) -> Figure:
    """Draw exact match against a second figure, a part for each setting that was turned."""
    trade_offs = content.trade_offs
    figure, all_axes = plt.subplots(
        1, len(trade_offs), figsize=(WIDTH, TRADE_HEIGHT), squeeze=False
    )
    for axes, trade_off in zip(all_axes[0], trade_offs, strict=True):
        axes.axhline(content.start_em, color=GREY, linewidth=THIN, linestyle=(0, (4, 3)))
        for color, (name, points) in zip(LINE_COLORS, trade_off.lines.items(), strict=False):
            xs = [point.x for point in points]
            ems = [point.em.points for point in points]
            axes.plot(xs, ems, "o-", color=color, linewidth=MEDIUM, label=name)
            for point in points:
                axes.vlines(point.x, point.em.low, point.em.high, color=color, linewidth=THIN)
                axes.annotate(
                    point.label,
                    (point.x, point.em.points),
                    (4, 4),
                    textcoords="offset points",
                    fontsize=SMALL_FONT,
                    color=color,
                )
        axes.set(title=trade_off.title, xlabel=trade_off.x_title)
        if len(trade_off.lines) > 1:
            axes.legend(frameon=False)
    all_axes[0, 0].set_ylabel("exact match, %")
    runs = "1 run" if len(content.runs) == 1 else f"up to {len(content.runs)} runs"
    _set_title(figure, f"What is paid for what ({runs}; bars: 95% interval; dashed: SFT-1&2)")
    return figure


# ---- fidelity.png --------------------------------------------------------------------------------
def draw_fidelity(table: FidelityTable) -> Figure:
    """Draw how often each model states the asked fact right, and another value of it instead."""
    groups = [group for group in GROUPS if any(group in splits for splits in table.values())]
    height = 1.3 + 0.5 * len(table)
    figure, all_axes = plt.subplots(
        1, max(1, len(groups)), figsize=(WIDTH, height), sharey=True, squeeze=False
    )
    for axes, group in zip(all_axes[0], groups, strict=False):
        by_row = [splits[group][ALL] if group in splits else None for splits in table.values()]
        measured = [fidelity for fidelity in by_row if fidelity is not None]
        right = [fidelity.fact_right if fidelity else None for fidelity in by_row]
        false = [fidelity.falsehoods if fidelity else None for fidelity in by_row]
        _draw_bars(axes, right, GREEN, -PAIR_OFFSET, scale=100, label="% right")
        _draw_bars(axes, false, ORANGE, PAIR_OFFSET, scale=100, label="% false")
        axes.set(xlim=(0, 125), xticks=range(0, 101, 20), xlabel="%")
        searches = max(fidelity.searches for fidelity in measured)
        facts = max(fidelity.asked_facts for fidelity in measured)
        axes.set_title(f"{group}: {searches} searches, {facts} known facts")
        _remove_frame(axes)
    all_axes[0, 0].set_yticks(range(len(table)), list(table))
    all_axes[0, 0].set_ylim(len(table) - 0.5, -0.5)
    _set_title(
        figure,
        "Asked facts in imagined observations: stated right, where the tool states them (green); "
        "another value stated (orange)",
    )
    return figure


# ---- the script ----------------------------------------------------------------------------------
@dataclass
class RunLogs:
    """What a run has left; each part may be empty."""

    training: dict[str, Rows]  # stage -> rows of its log.jsonl
    rollouts: dict[str, list[TrajectoryRow]]  # title of a stage -> its rollouts.jsonl
    table: dict[str, RowFigures]  # rows of eval.json
    agents: dict[str, Rows]  # row of an agent -> its predictions


def read_run(root: Path) -> RunLogs:
    """Return what a run has left.

    Raises UserError where there is nothing to draw.
    """
    logs = RunLogs({}, {}, {}, {})
    for stage, title in (SFT_TITLES | RL_TITLES).items():
        steps = read_rows(root / stage / "log.jsonl", "step")
        if steps:
            logs.training[stage] = steps
        shown = read_rollouts(root / stage / "rollouts.jsonl")
        if shown:
            logs.rollouts[title] = shown
    if (root / "eval.json").is_file():
        logs.table = read_figures(root / "eval.json")
    for row in read_rows(root / "predictions.jsonl", "row", "em", "actions"):
        # In a workflow a script acts, not the model.
        if row["row"] not in WORKFLOW_NAMES:
            logs.agents.setdefault(row["row"], []).append(row)
    if not (logs.training or logs.rollouts or logs.table or logs.agents):
        scripts = ("train_sft.py", "train_rl.py", "eval.py")
        commands = ", then ".join(f"python {script} --run={root.name}" for script in scripts)
        raise UserError(
            f"{root}: no finished stage and no evaluation to draw; make them with: {commands}"
        )
    return logs


def read_rows(path: Path, *fields: str) -> Rows:
    """Return the rows of a log with these fields; none where it is missing or empty (0 steps)."""
    if not path.is_file() or not path.stat().st_size:
        return []
    return read_log(path, "plot.py", *fields)


def read_rollouts(path: Path) -> list[TrajectoryRow]:
    """Return the rollouts that can be shown: those of older versions lack the text of tokens.

    Raises UserError for a damaged file.
    """
    rollouts = []
    for number, row in enumerate(read_rows(path), 1):
        if "tokens" not in row:
            continue
        try:
            rollouts.append(TrajectoryRow.from_json(row))
        except KeyError as missing:
            raise UserError(
                f"{path}:{number}: a rollout without {missing}; train the stage again"
            ) from None
    return rollouts


def run(settings: PlotSettings) -> None:
    """Draw what a run has left, and print the path of each figure."""
    root = run_folder(settings)
    logs = read_run(root)
    folder = root / "figures"
    folder.mkdir(exist_ok=True)
    if logs.training:
        save_figure(draw_training(logs.training), folder / "training.png")
    if logs.table:
        save_figure(draw_table(logs.table), folder / "table.png")
    rows_with_facts = {name: row for name, row in logs.table.items() if _needs_facts(row)}
    if rows_with_facts:
        save_figure(draw_search(rows_with_facts), folder / "search.png")
    if logs.agents:
        save_figure(draw_actions(logs.agents), folder / "actions.png")
    if (root / FIDELITY_FILE).is_file():
        save_figure(draw_fidelity(read_fidelity(root / FIDELITY_FILE)), folder / "fidelity.png")
    if (root / CURVE_FILE).is_file():
        save_figure(draw_world_models(read_curve(root / CURVE_FILE)), folder / "world_models.png")
    if (root / TRADE_OFFS_FILE).is_file():
        save_figure(
            draw_trade_offs(read_trade_offs(root / TRADE_OFFS_FILE)), folder / "trade_offs.png"
        )
    if logs.rollouts:
        write_text(folder / "trajectories.html", render_page(logs.rollouts))
        print(folder / "trajectories.html")


def _needs_facts(row: RowFigures) -> bool:
    """Whether a row was asked for facts that could be searched for."""
    return row.acting.search_known is not None or row.acting.search_unknown is not None


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, print its path, and forget it. Raises DiskError."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    plt.close(figure)
    write_bytes(path, content.getvalue())
    print(path)


if __name__ == "__main__":
    main(run, PlotSettings, __doc__)
