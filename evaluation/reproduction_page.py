"""docs/reproduction.md: the paper's table and claims, from the results of several seeds."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import plot
from common.files import write_text
from evaluation.claims import (
    AGENTS,
    FROM_MEMORY,
    REACT,
    RL1,
    RL2_ALONE,
    RL2_FROM_SFT2,
    RL12,
    SFT1,
    SFT2_ALONE,
    SFT12,
    SFT123,
    Claim,
    Comparison,
    Verdict,
    compare,
    judge_claims,
)
from evaluation.figures import ActingFigures, RowFigures, SetFigures, percent_cell
from evaluation.markdown import gain_text, table_head, table_row
from evaluation.seed_results import SeedResults
from evaluation.statistics import by_actions, em_of, seed_interval

# The paper's average EM of a 7B model over six sets, by the rows of eval.py's table; in its order.
PAPER_EM = {
    FROM_MEMORY: 11.8,
    REACT: 15.2,
    SFT1: 22.7,
    SFT2_ALONE: 29.5,
    SFT12: 32.0,
    SFT123: 31.3,
    RL2_ALONE: 23.7,
    RL1: 31.7,
    RL12: 33.4,
    RL2_FROM_SFT2: 33.9,
}
# The default recipe, and practice with the tool alone.
WAYS_TO_PRACTISE = ((SFT123, RL1, RL12), (SFT12, RL2_FROM_SFT2))
# A row, and one that its practice or its training goes on from.
GAINS = (
    (SFT12, REACT),
    (SFT123, SFT12),
    (RL1, SFT123),
    (RL12, RL1),
    (RL12, SFT12),
    (RL2_FROM_SFT2, SFT12),
)
MOST_SHOWN_COMPARISONS = 2  # of a claim; of more, those that do not hold
MOST_SHOWN_ACTIONS = 4  # columns of the table of actions; the last one is for more as well

HEADER = """# The paper's claims, on nano

`bash reproduce.sh{option}` wrote this page from the runs of {seeds}. It trains every row of the \
paper's table {how}, and evaluates it on {questions} questions a seed, in a world that training \
never saw. What each seed said is kept in `{folder}/`, evaluated by {commits}. The paper's figures \
are of a model of 7 billion parameters on six sets of real questions; they are the shape to \
compare with, not the values.
"""

TABLE_NOTE = """

*Known* facts are those that the seed's base model answers by itself. Claim 7 is about facts that \
its pretraining held, whether it learned them or not.
"""

CLAIMS_NOTE = """

Figures are in points of exact match, but for calls, which are in percent. A comparison holds \
where both intervals lie above what it needs, and does not where both lie below. A claim holds \
where all its comparisons hold; one that does not is enough against it. Claim 1 has sixteen \
comparisons, each agent over each workflow; those are shown that do not hold. The paper's words \
name no numbers: what "little", "near", "a sixth", "high", "recalls" and "collapses" need is this \
project's choice, made before the figures of five seeds were seen.

p is two-sided and over questions alone: how likely so large a difference from what is needed is \
by chance. A verdict asks for more, since the next seed may come out otherwise, so that a \
comparison with a small p may be undecided. Rows are compared question by question (a \
permutation test of signs, or of which row gave which answer). Two comparisons are of different \
questions and so not paired: many actions against few, and seen facts against unseen (a \
permutation test of two groups). What is recalled has a binomial test; calls are counted, not \
drawn.
"""

CALLS_NOTE = """

A *raw* call is a rollout's search: five rollouts that ask the same count five. A *distinct* call \
is a query that was not asked before. Both include the calls that a world model was distilled from.
"""


# ---- 1. Seeds pooled -----------------------------------------------------------------------------
def pool_row(seeds: Sequence[SeedResults], row: str) -> RowFigures:
    """Return the figures of a row over the seeds that have it."""
    having = [results for results in seeds if row in results.answers]
    answers = [results.answers[row] for results in having]
    em = em_of(answers)
    averages = [results.figures[row].average for results in having]
    acting = [results.figures[row].acting for results in having]
    flat = [one for sets in answers for rows in sets.values() for one in rows]
    return RowFigures(
        sets={},
        average=SetFigures(
            *(_mean([getattr(one, name) for one in averages]) for name in vars(averages[0]))
        ),
        acting=ActingFigures(
            search_known=_mean_if_any([one.search_known for one in acting]),
            search_unknown=_mean_if_any([one.search_unknown for one in acting]),
            em_known=_mean_if_any([one.em_known for one in acting]),
            em_unknown=_mean_if_any([one.em_unknown for one in acting]),
            calculated=_mean_if_any([one.calculated for one in acting]),
        ),
        em_low=em.low,
        em_high=em.high,
        by_actions=by_actions(flat),
    )


def pool_calls(seeds: Sequence[SeedResults]) -> dict[str, plot.PracticeCost]:
    """Return what each row that practised gave and asked, over the seeds that have it."""
    costs = {}
    for row in PAPER_EM:
        having = [results for results in seeds if row in results.calls]
        if having:
            costs[row] = plot.PracticeCost(
                em=em_of([results.answers[row] for results in having]),
                raw_calls=_mean([results.calls[row].raw for results in having]),
                distinct_calls=_mean([results.calls[row].distinct for results in having]),
            )
    return costs


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean_if_any(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return _mean(found) if found else None


# ---- 2. The page ---------------------------------------------------------------------------------
def write_page(seeds: Sequence[SeedResults], page: Path, pictures: Path, quick: bool) -> None:
    """Write the page, and its figures into the folder of pictures.

    quick: it is of the short form.
    """
    rows = [row for row in PAPER_EM if any(row in results.answers for results in seeds)]
    pooled = {row: pool_row(seeds, row) for row in rows}
    costs = pool_calls(seeds)
    names = ", ".join(results.seed for results in seeds)
    first_row = next(iter(seeds[0].answers.values()))
    commits = {commit for results in seeds for commit in results.commits.values() if commit}
    header = HEADER.format(
        seeds=f"seed {names}" if len(seeds) == 1 else f"{len(seeds)} seeds: {names}",
        questions=sum(len(answers) for answers in first_row.values()),
        commits=", ".join(f"commit {commit}" for commit in sorted(commits)) or "no known commit",
        folder=page.stem,
        option=" --quick" if quick else "",
        how="in the short form" if quick else "with the default settings",
    )
    parts = [
        header,
        "## The table\n\n" + format_rows(seeds, pooled),
        "## The claims\n\n" + format_claims(judge_claims(seeds)),
        "## What each stage gives\n\n" + format_gains(seeds),
        "## By question set\n\n" + format_sets(seeds, rows),
        "## Success by the number of actions (Fig. 3)\n\n" + format_actions(pooled),
        "## What practice asked the tool\n\n" + format_calls(costs),
        draw_figures(seeds, pooled, page, pictures),
    ]
    write_text(page, "\n".join(parts))


def format_rows(seeds: Sequence[SeedResults], pooled: Mapping[str, RowFigures]) -> str:
    """Return the table: EM over questions and over seeds, searches, and the paper's EM."""
    titles = [
        "",
        "EM (95% over questions)",
        "95% over seeds",
        "by seed",
        "searches for known / unknown facts",
        "malformed",
        "paper's EM",
    ]
    lines = table_head(titles)
    for row, figures in pooled.items():
        by_seed = {
            results.seed: em_of([results.answers[row]]).points
            for results in seeds
            if row in results.answers
        }
        acting = figures.acting
        lines.append(
            table_row(
                [
                    row,
                    f"{figures.average.em:.1f} ({figures.em_low:.1f} to {figures.em_high:.1f})",
                    _interval(*seed_interval(list(by_seed.values()))),
                    ", ".join(f"{seed}: {em:.1f}" for seed, em in by_seed.items()),
                    f"{_share(acting.search_known)} / {_share(acting.search_unknown)}",
                    percent_cell(figures.average.malformed),
                    f"{PAPER_EM[row]}",
                ]
            )
        )
    return "\n".join(lines) + TABLE_NOTE


def format_sets(seeds: Sequence[SeedResults], rows: Sequence[str]) -> str:
    """Return the exact match of each row on each question set, a mean over seeds."""
    sets = list(next(iter(seeds[0].figures.values())).sets)
    lines = table_head(["EM, %", *sets])
    for row in rows:
        by_seed = [results.figures[row].sets for results in seeds if row in results.figures]
        means = [_mean([figures[name].em for figures in by_seed]) for name in sets]
        lines.append(table_row([row, *(f"{em:.1f}" for em in means)]))
    return "\n".join(lines) + "\n"


def format_claims(claims: Sequence[Claim]) -> str:
    """Return the claims with their verdicts: difference, intervals, test, and each seed's."""
    titles = ["claim", "verdict", "measured", "95% over questions", "95% over seeds"]
    titles += ["needs", "p", "by seed"]
    lines = table_head(titles)
    for claim in claims:
        name = f"{claim.number}. {claim.text}"
        verdict = f"**{claim.verdict}**"
        shown = list(claim.comparisons)
        if len(shown) > MOST_SHOWN_COMPARISONS:
            not_holding = [item for item in shown if item.verdict != Verdict.HOLDS]
            shown = sorted(not_holding, key=lambda item: item.gain.points) or [claim.deciding]
        for comparison in shown:
            lines.append(table_row([name, verdict, *comparison_cells(comparison)]))
            name = ""
            verdict = ""
        if not claim.is_complete:
            lines.append(table_row([name, verdict, "rows are missing", "", "", "", "", ""]))
    return "\n".join(lines) + CLAIMS_NOTE


def format_gains(seeds: Sequence[SeedResults]) -> str:
    """Return what each stage gives over another, paired by question."""
    titles = ["", "over", "points (95% over questions)", "95% over seeds", "p", "by seed"]
    lines = table_head(titles)
    for first, second in GAINS:
        for comparison in compare(seeds, first, second):
            by_seed = [f"{seed}: {_points(points)}" for seed, points in comparison.by_seed.items()]
            lines.append(
                table_row(
                    [
                        first,
                        second,
                        gain_text(comparison.gain),
                        _interval(*comparison.seed_interval),
                        f"{comparison.p:.4f}",
                        ", ".join(by_seed),
                    ]
                )
            )
    return "\n".join(lines) + "\n"


def comparison_cells(comparison: Comparison) -> list[str]:
    """Return what the table says of a comparison."""
    gain = comparison.gain
    over_questions = "-"
    over_seeds = "-"
    if np.isfinite(gain.points):
        if gain.low < gain.high:
            over_questions = _interval(gain.low, gain.high)
        over_seeds = _interval(*comparison.seed_interval)
    by_seed = [f"{seed}: {_points(points)}" for seed, points in comparison.by_seed.items()]
    return [
        f"{comparison.measure}: {_points(gain.points)} ({comparison.verdict})",
        over_questions,
        over_seeds,
        f"above {comparison.needs:g}",
        f"{comparison.p:.4f}" if np.isfinite(comparison.p) else "-",
        ", ".join(by_seed),
    ]


def _points(points: float) -> str:
    return f"{points:+.1f}" if np.isfinite(points) else "not measured"


def format_actions(pooled: Mapping[str, RowFigures]) -> str:
    """Return the success rate of each row by the number of actions."""
    counts = range(MOST_SHOWN_ACTIONS + 1)
    titles = ["success, % (answers)", *(str(count) for count in counts)]
    titles[-1] += " or more"
    lines = table_head(titles)
    for row, figures in pooled.items():
        cells = [row]
        for count in counts:
            groups = [
                group
                for actions, group in figures.by_actions.items()
                if actions == count or (count == MOST_SHOWN_ACTIONS and actions > count)
            ]
            answers = sum(group.questions for group in groups)
            correct = sum(group.correct for group in groups)
            cells.append(f"{100 * correct / answers:.0f} ({answers})" if answers else "")
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def format_calls(costs: Mapping[str, plot.PracticeCost]) -> str:
    """Return the table of what each way to practise asked, a seed."""
    titles = ["", "EM", "calls (raw)", "of those of all real", "different ones (distinct)"]
    lines = table_head(titles)
    all_real = costs[RL2_FROM_SFT2].raw_calls if RL2_FROM_SFT2 in costs else 0
    for row, cost in costs.items():
        lines.append(
            table_row(
                [
                    row,
                    f"{cost.em.points:.1f}",
                    f"{cost.raw_calls:,.0f}",
                    f"{cost.raw_calls / all_real:.2f}" if all_real else "-",
                    f"{cost.distinct_calls:,.0f}",
                ]
            )
        )
    return "\n".join(lines) + CALLS_NOTE


def draw_figures(
    seeds: Sequence[SeedResults],
    pooled: Mapping[str, RowFigures],
    page: Path,
    pictures: Path,
) -> str:
    """Draw the pooled rows, and return the part of the page that shows the figures."""
    acting: dict[str, list[dict[str, Any]]] = {
        row: [
            dict(answer)
            for results in seeds
            for answers in results.answers.get(row, {}).values()
            for answer in answers
        ]
        for row in (REACT, *AGENTS)
        if row in pooled
    }
    figures = {
        "reproduction_table.png": ("Exact match", plot.draw_table(pooled)),
        "reproduction_search.png": ("Known and unknown facts", plot.draw_search(pooled)),
    }
    if acting:
        figures["reproduction_actions.png"] = ("By number of actions", plot.draw_actions(acting))
    ways = [_chain(seeds, rows) for rows in WAYS_TO_PRACTISE]
    if all(ways):
        figure = plot.draw_practice_costs(ways)
        figures["reproduction_cost.png"] = ("Exact match against calls of practice", figure)
    lines = ["## Figures\n"]
    for file, (title, figure) in figures.items():
        plot.save_figure(figure, pictures / file)
        lines.append(f"![{title}]({os.path.relpath(pictures / file, page.parent)})\n")
    return "\n".join(lines)


def _chain(seeds: Sequence[SeedResults], rows: Sequence[str]) -> dict[str, plot.PracticeCost]:
    """Return a way to practise, from the row it begins with, over the seeds that have all of it."""
    complete = [results for results in seeds if results.answers.keys() >= set(rows)]
    if not complete:
        return {}
    start, *practised = rows
    answers = [results.answers[start] for results in complete]
    chain = {start: plot.PracticeCost(em_of(answers), raw_calls=0, distinct_calls=0)}
    costs = pool_calls(complete)
    return chain | {row: costs[row] for row in practised}


def _interval(low: float, high: float) -> str:
    if not np.isfinite(low):
        return "-"
    return f"{low:.1f} to {high:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
