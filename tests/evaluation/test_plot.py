"""The figures and the trajectory viewer, from the logs of a run that the tests make up."""

import dataclasses
import html
import json
import random
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here

import plot
from common.errors import DiskError, UserError
from data.trajectory import Role
from data.trajectory_rows import TrajectoryRow
from environments.costs import CURVE_FILE, CostCurve, RowCost, RunCost, curve_to_json
from environments.trades import (
    TRADE_OFFS_FILE,
    TradeOff,
    TradeOffs,
    TradePoint,
    trade_offs_to_json,
)
from evaluation.figures import ActingFigures, Estimate, RowFigures, SetFigures, row_to_json
from evaluation.viewer import ROLE_NAMES, TRAJECTORIES_OF_A_STAGE, render_page
from plot import PlotSettings

FIGURES = ["training.png", "table.png", "search.png", "actions.png", "trajectories.html"]
PNG = b"\x89PNG"
ATTACK = "</span><script>alert(1)</script><img src=x onerror='alert(1)'>&amp;\""


def write_rows(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row_of(em: float = 50.0, em_high: float = 55.0, **acting: Any) -> Any:
    """Return the figures of a row; acting: those of its ActingFigures that differ."""
    means = SetFigures(em, f1=60, cover=60, overlap=60, malformed=0, forced=0, actions=1)
    figures = {
        "search_known": 0.2,
        "search_unknown": 0.9,
        "em_known": 80.0,
        "em_unknown": 30.0,
        "calculated": None,
    }
    return RowFigures(
        sets={"nq": means},
        average=means,
        acting=ActingFigures(**(figures | acting)),
        em_low=45.0,
        em_high=em_high,
        by_actions={},
    )


def trajectory_row(**changes: Any) -> Any:
    """Return a row of rollouts.jsonl with every role in it."""
    row = TrajectoryRow(
        question="Who directed it?",
        golden_answers=["Eva Moss", "E. Moss"],
        reward=0.5,
        text="Who?<think> hm<begin_search> Iron Hill 1950}",
        ids=list(range(8)),
        role=[
            Role.PROMPT,
            Role.PROMPT,
            Role.THINK,
            Role.ACTION,
            Role.ACTION,
            Role.OBSERVATION,
            Role.ANSWER,
            Role.ANSWER,
        ],
        mask=[0, 0, 1, 1, 1, 0, 1, 0],
        tokens=["Who?", "<think>", " hm", "<begin_search>", " Iron", " Hill", " 1950", "}"],
    )
    return dataclasses.replace(row, **changes)


def write_logs(root: Path) -> None:
    """Write logs of two SFT stages and two RL stages, with rollouts."""
    rng = random.Random(0)
    for stage in ("sft2", "sft3"):
        log = [{"step": step, "loss": 3 - step / 20 + rng.random()} for step in range(30)]
        write_rows(root / stage / "log.jsonl", log)
    for stage in ("rl1", "rl2"):
        log = [
            {"step": step, **{figure: rng.random() for figure in plot.RL_PANELS}}
            for step in range(8)
        ]
        write_rows(root / stage / "log.jsonl", log)
    write_rows(root / "sft2" / "rollouts.jsonl", [trajectory_row().to_json()] * 3)


def write_table(root: Path, table: Any) -> None:
    rows = {name: row_to_json(row) for name, row in table.items()}
    (root / "eval.json").write_text(json.dumps({"rows": rows}))


def write_evaluation(root: Path) -> None:
    """Write eval.json and predictions.jsonl of a workflow and two agents."""
    table = {
        "model only": row_of(search_known=None, em_known=None),
        "SFT-1&2": row_of(),
        "SFT-1&2&3+RL-1&2": row_of(em=60.0, em_high=66.0),
    }
    write_table(root, table)
    rng = random.Random(0)
    predictions = [
        {"row": row, "actions": rng.randrange(4), "em": float(rng.random() < 0.5)}
        for row in table
        for _ in range(40)
    ]
    write_rows(root / "predictions.jsonl", predictions)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the folder of a run, which holds nothing yet."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "nano"
    folder.mkdir(parents=True)
    return folder


def drawn(root: Path) -> Any:
    return sorted(path.name for path in (root / "figures").iterdir())


# ---- the script ----------------------------------------------------------------------------------
def test_every_figure_is_drawn(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is printed by its path."""
    write_logs(root)
    write_evaluation(root)
    plot.run(PlotSettings())
    assert capsys.readouterr().out.splitlines() == [f"out/nano/figures/{name}" for name in FIGURES]
    assert drawn(root) == sorted(FIGURES)
    for path in (root / "figures").iterdir():
        assert path.stat().st_size > 1000
        assert path.suffix == ".html" or path.read_bytes().startswith(PNG)


def test_what_is_not_there_is_left_out(root: Path) -> None:
    """A stage that is still training, one of 0 steps, and an evaluation that was never made."""
    write_logs(root)
    for stage in ("rl1", "rl2", "sft3"):
        (root / stage).rename(root / f"{stage}.partial")
    write_rows(root / "sft1" / "log.jsonl", [])
    plot.run(PlotSettings())
    assert drawn(root) == ["training.png", "trajectories.html"]


def test_an_evaluation_alone(root: Path) -> None:
    """Without facts to search for there is nothing to say of when a row acts."""
    write_table(root, {"model only": row_of(search_known=None, search_unknown=None)})
    plot.run(PlotSettings())
    assert drawn(root) == ["table.png"]


def test_rl_alone(root: Path) -> None:
    """RL without supervised stages; rollouts without tokens can't be shown."""
    write_logs(root)
    for stage in ("sft2", "sft3"):
        (root / stage).rename(root / f"{stage}.partial")
    write_rows(root / "rl1" / "rollouts.jsonl", [{"text": "of an older version"}])
    plot.run(PlotSettings())
    assert drawn(root) == ["training.png"]


def test_nothing_to_draw(root: Path) -> None:
    with pytest.raises(UserError, match=r"no finished stage .* python train_sft\.py"):
        plot.run(PlotSettings())


def test_nothing_to_draw_as_a_user_sees_it(tmp_path: Path) -> None:
    """One line that says which commands make something to draw."""
    done = run_here(tmp_path, "plot.py")
    assert done.status == 2
    assert "python train_sft.py" in done.err
    assert "Traceback" not in done.err


def test_a_figure_on_a_full_disk(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and half a figure takes no room."""
    write_logs(root)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskError, match=r"figures/training\.png: File too large; raise the"):
            plot.run(PlotSettings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert drawn(root) == []


def test_plot_does_not_load_what_answers_questions(tmp_path: Path) -> None:
    """It needs the names of the workflows alone. Guards: seconds before the first figure."""
    code = "import sys, plot; print({'eval', 'autocoa', 'workflows.react'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


# ---- the figures ---------------------------------------------------------------------------------
def test_the_moving_mean(root: Path) -> None:
    """Over the steps that are there at the ends; RL-2 goes on where RL-1 ended."""
    log = [{"step": step, "loss": float(step**2)} for step in range(5)]
    axes: Any = plot.plt.figure().subplots()
    end = plot._draw_curve(axes, log, "loss", plot.BLUE, smoothing=3, first_step=10)
    raw, smooth = axes.get_lines()
    assert list(raw.get_xdata()) == [10, 11, 12, 13, 14]
    assert list(raw.get_ydata()) == [0, 1, 4, 9, 16]
    assert smooth.get_ydata() == pytest.approx([0.5, 5 / 3, 14 / 3, 29 / 3, 12.5])
    assert end == pytest.approx((14, 12.5))


def test_rl2_is_drawn_after_rl1() -> None:
    """The ablations start from another model, at step 0."""
    log = [{"step": step, **dict.fromkeys(plot.RL_PANELS, 0.5)} for step in range(4)]
    stages = ["rl1", "rl2", "rl2_alone"]
    figure: Any = plot.draw_training(dict.fromkeys(stages, log))
    first_steps = {}
    for line in figure.subfigs[0].axes[0].get_lines():
        first_steps[line.get_label()] = line.get_xdata()[0]
    assert [first_steps[plot.RL_TITLES[stage]] for stage in stages] == [0, 4, 0]


def test_the_colors_of_the_table() -> None:
    """Grey without training for action, blue after SFT, orange after RL."""
    colors = {
        "ReAct workflow": plot.GREY,
        "SFT-1&2&3": plot.BLUE,
        "SFT-1&2&3+RL-1": plot.ORANGE,
        "rl_mine": plot.ORANGE,
        "mine": plot.BLUE,
    }
    for name, color in colors.items():
        assert plot._row_color(name) == color


def test_bars_of_what_is_known_and_unknown() -> None:
    """Rates are in percent, as EM is; a row without known facts has no bar for them."""
    rows = {"A": row_of(), "B": row_of(search_known=None)}
    figure: Any = plot.draw_search(rows)
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [20.0, 90.0, 90.0]
    assert [bar.get_width() for bar in right.patches] == [80.0, 80.0, 30.0, 30.0]
    assert left.texts[0].get_text() == "20% of known"
    assert right.texts[0].get_text() == "80 EM, known"


def test_shares_and_success_by_actions() -> None:
    """Of 30 answers with one action half are right, of 5 with none all: those are pale."""
    rows = [{"actions": 0, "em": 1.0}] * 5 + [{"actions": 1, "em": 1.0}] * 15
    rows += [{"actions": 1, "em": 0.0}] * 15
    figure: Any = plot.draw_actions({"SFT-1": rows})
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [25.0, 75.0]
    texts = [text.get_text() for text in right.texts]
    assert texts == ["100%", "of 5", "50%", "of 30"]
    pale = plot.matplotlib.colors.to_rgba(plot.PALE)
    assert [bar.get_facecolor() == pale for bar in right.patches] == [True, False]


def cost_row(name: str, kind: str, raw_calls: float, times: list[float | None]) -> RowCost:
    """Return a row of the cost curve with an EM of 80%, and one run in which all calls doubled."""
    gain = Estimate(80.0, 78.0, 82.0, questions=60)
    run = RunCost("seed1", 80.0, 2 * raw_calls, raw_calls, 600.0, times)
    return RowCost(
        name,
        kind,
        gain,
        gain_over_start=gain,
        gain_over_real=None,
        raw_calls=raw_calls,
        distinct_calls=raw_calls / 2,
        seconds=600.0,
        points=[],
        times=times,
        times_without_cache=times,
        runs=[run],
    )


def test_what_practice_gives_and_costs(root: Path) -> None:
    """EM against both counts of calls, none too; minutes to the target, or that it is not reached.

    cost_curve.json is drawn where it is there.
    """
    rows = [
        cost_row("all real", "real", 40_000, [600.0, 660.0, 1200.0]),
        cost_row("internal", "internal", 0, [None, None, None]),
    ]
    curve = CostCurve(["seed0", "seed1"], target_gain=3.0, start_em=75.0, rows=rows)
    figure: Any = plot.draw_world_models(curve)
    raw, distinct, times = figure.axes
    discs = [line for line in raw.get_lines() if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in discs] == [
        (40_000, 80.0),
        (0, 80.0),
    ]
    assert [text.get_text() for text in distinct.texts] == ["1", "2"]
    left, right = raw.get_xlim()
    assert left < 0 < 80_000 > right > 40_000
    dots = [line.get_xdata()[0] for line in times.get_lines() if line.get_marker() == "o"]
    assert dots == [10.0, 11.0, 20.0]
    assert [text.get_text() for text in times.texts] == ["not reached"]
    assert "60 questions, 2 runs" in figure.get_suptitle()

    write_logs(root)
    (root / CURVE_FILE).write_text(curve_to_json(curve))
    plot.run(PlotSettings())
    assert "world_models.png" in drawn(root)


def test_what_is_paid_for_what(root: Path) -> None:
    """A part for each setting that was turned: a line of points, each with its value beside it.

    trade_offs.json is drawn where it is there.
    """
    gain = Estimate(80.0, 78.0, 82.0, questions=60)
    lines = {
        "one pass": [
            TradePoint("sft3", "0.1", 60.0, gain),
            TradePoint("sft3_1_1", "1", 70.0, gain),
        ],
        "two passes": [],
    }
    content = TradeOffs(["nano"], 75.0, [TradeOff("SFT-3", "right titles, %", lines)])
    figure: Any = plot.draw_trade_offs(content)
    (axes,) = figure.axes
    (line, _) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert list(line.get_xdata()) == [60.0, 70.0]
    assert list(line.get_ydata()) == [80.0, 80.0]
    assert [text.get_text() for text in axes.texts] == ["0.1", "1"]

    write_logs(root)
    (root / TRADE_OFFS_FILE).write_text(trade_offs_to_json(content))
    plot.run(PlotSettings())
    assert "trade_offs.png" in drawn(root)


# ---- the viewer ----------------------------------------------------------------------------------
class Page(HTMLParser):
    """The tags of a page, and the text of each span with its class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = []
        self.attributes = []
        self.spans = []
        self.is_in_span = False
        self.feed(text)

    def handle_starttag(self, tag: Any, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.is_in_span = tag == "span"
        if self.is_in_span:
            self.spans.append((dict(attrs)["class"], ""))

    def handle_endtag(self, tag: Any) -> None:
        self.is_in_span = False

    def handle_data(self, data: Any) -> None:
        if self.is_in_span:
            name, text = self.spans[-1]
            self.spans[-1] = (name, text + data)


def test_the_page_shows_roles() -> None:
    """Tokens of one role and mask are one span, pale where the policy did not write them."""
    page = Page(render_page({"SFT-2": [trajectory_row()]}))
    spans = page.spans[len(ROLE_NAMES) + 1 :]
    assert [(name, text.strip()) for name, text in spans] == [
        ("prompt free", "Who?<think>"),
        ("think", "hm"),
        ("action", "<begin_search> Iron"),
        ("observation free", "Hill"),
        ("answer", "1950"),
        ("answer free", "}"),
    ]
    assert [name for name, _ in page.spans[: len(ROLE_NAMES)]] == ROLE_NAMES


def test_white_space_is_kept() -> None:
    """A trajectory is shown as it was written, line breaks too, with nothing between its spans."""
    row = trajectory_row(tokens=["a\n", " b", "\n\n", "c", "d", "e ", " f", "g"])
    page = render_page({"SFT-2": [row]})
    trajectory = re.search(r"<pre>(.*)</pre>", page, re.S)
    assert trajectory is not None
    text = html.unescape(re.sub(r"<[^>]*>", "", trajectory[1]))
    assert text == "".join(row.tokens)


def test_everything_is_escaped() -> None:
    """Whatever a model or a corpus wrote is text on the page, and opens no tag."""
    plain = Page(render_page({"SFT-2": [trajectory_row()]}))
    row = trajectory_row(
        question=ATTACK,
        golden_answers=[ATTACK],
        tokens=[ATTACK] * 8,
    )
    text = render_page({"SFT-2": [row]})
    page = Page(text)
    assert page.tags == plain.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert page.spans[-1][1] == ATTACK


def test_the_page_loads_and_runs_nothing() -> None:
    """The policy line would forbid scripts even if the escaping were wrong."""
    text = render_page({"SFT-2": [trajectory_row()]})
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]


def test_trajectories_of_all_steps_are_shown() -> None:
    """Of many, some at equal distances, the first and the last among them."""
    rows = [trajectory_row(question=f"Who {number}?", step=number) for number in range(95)]
    text = render_page({"RL-1": rows, "SFT-2": rows[:3]})
    assert text.count("<article>") == TRAJECTORIES_OF_A_STAGE + 3
    for words in ("Who 0?", "step 0 ·", "Who 94?", "step 94 ·", "20 of 95 kept", "3 of 3 kept"):
        assert words in text
    facts = "gold: Eva Moss / E. Moss · reward 0.5 · 8 tokens"
    assert f"step 94 · {facts}" in text
    assert f'<p class="facts">{facts}</p>' in render_page({"SFT-2": [trajectory_row()]})
