"""bench.py growth and bench.py sharing, tiny, start to end."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import strict_json, tiny_lm

import bench
from data.questions import Question
from data.trajectory import Codec, Observation
from speed import flops, growth, sharing
from speed.drawing import draw_growth
from speed.growth import Curve, Point
from speed.pairs import Spread
from tools import Library

QUESTIONS = [
    Question("1", "Who directed Silver River?", ["Eva Moss"]),
    Question("2", "Who starred in Iron Hill?", ["Ada Falk"]),
]
ARGUMENTS = ["--run=tiny", "--start=sft3", "--device=cpu", "--max_len=60", "--repeats=1"]


@pytest.fixture
def tiny_run(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run whose SFT-3 is a random network, with a task of two questions."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "out" / "tiny"
    root.mkdir(parents=True)
    tiny_lm(codec, noise=0.1).save(root / "sft3")

    def find(queries: list[str]) -> list[Observation]:
        return [Observation("It was directed by Eva Moss.") for _ in queries]

    task = SimpleNamespace(
        questions=lambda pool, count: QUESTIONS[:count], rl_search=Library({"search": find})
    )
    monkeypatch.setattr(bench, "open_task", lambda settings: task)
    monkeypatch.setattr(flops, "CPU_SIZES", (64,))
    return root


def run_bench(word: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", word, *ARGUMENTS, *arguments])
    bench.command(sys.argv)


def test_sharing(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Groups of two and of four at each temperature, printed, kept and drawn.

    Guards: the same random numbers for all rollouts, which would be one text.
    """
    monkeypatch.setattr(sharing, "TEMPERATURES", (0.5, 1.0))
    monkeypatch.setattr(sharing, "GROUP_SIZES", (2, 4))
    run_bench("sharing", monkeypatch, "--questions=2")
    printed = capsys.readouterr().out.splitlines()
    (line,) = (tiny_run / "bench.jsonl").read_text().splitlines()
    assert line in printed
    row = strict_json(line)
    assert (row["run"], row["stage"], row["backend"]) == ("tiny", "sft3", "torch")
    measured = [(shared["temperature"], shared["group_size"]) for shared in row["sharing"]]
    assert measured == [(0.5, 2), (0.5, 4), (1.0, 2), (1.0, 4)]
    assert [shared["all_groups"]["groups"] for shared in row["sharing"]] == [4, 2, 4, 2]
    for shared in row["sharing"]:
        # Prompts are shared, and a random network hardly writes the same twice.
        assert 0 < shared["all_groups"]["shared"] < 1
        assert shared["all_groups"]["apart_written"] > 0.5
        assert shared["entropy"] > 0
    assert (tiny_run / "figures" / "sharing.png").is_file()


def test_growth(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A point of each curve for each size, printed, kept and drawn.

    Guards: an update that is of another number of rollouts than was sampled.
    """
    sizes = {"ROWS": (1, 2), "CONTEXTS": (4, 8), "ACTIONS": (0, 1), "GROUP_SIZES": (2, 3)}
    counts = {
        "TRAINED_TOKENS": 8,
        "DECODED_TOKENS": 2,
        "THOUGHT_TOKENS": 2,
        "AGENT_ROWS": 2,
        "GROUP_QUESTIONS": 2,
    }
    for name, value in (sizes | counts).items():
        monkeypatch.setattr(growth, name, value)
    rollouts: list[int] = []
    trained: list[int] = []
    sample_groups = growth.sample_groups
    train_without_effect = growth.train_without_effect

    def sample(*arguments: object) -> object:
        timing, tries = sample_groups(*arguments)
        assert len(tries) == len(QUESTIONS)
        rollouts.append(sum(len(trie.paths) for trie in tries))
        assert timing.units == rollouts[-1]
        return timing, tries

    def train(ours: object, batches: list[dict[str, np.ndarray]]) -> float:
        trained.append(len(batches))
        return train_without_effect(ours, batches)

    monkeypatch.setattr(growth, "sample_groups", sample)
    monkeypatch.setattr(growth, "train_without_effect", train)
    run_bench("growth", monkeypatch)
    capsys.readouterr()
    (line,) = (tiny_run / "bench.jsonl").read_text().splitlines()
    curves = {curve["name"]: curve for curve in strict_json(line)["curves"]}
    measured = {
        name: [point["size"] for point in curve["points"]] for name, curve in curves.items()
    }
    assert measured == {
        "rows": [1, 2],
        "context: decoding": [4, 8],
        "context: training": [4, 8],
        "actions": [0, 1],
        "group: sampling": [2, 3],
        "group: update": [2, 3],
    }
    # Of two questions, each size twice: the first run gets memory. Then the same for the update.
    assert rollouts == [4, 4, 6, 6] * 2
    assert trained[-4:] == [2, 2, 2, 2]
    for curve in curves.values():
        for point in curve["points"]:
            assert point["seconds"]["median"] > 0
            assert point["gflops"] > 0
    assert (tiny_run / "figures" / "growth.png").is_file()


def test_the_figure_of_growth_has_a_part_for_each_axis() -> None:
    """Curves over the same axis stand together; times are in milliseconds a unit."""

    def curve(name: str, axis: str, *seconds: float) -> Curve:
        points = [
            Point(number, Spread(value, value / 2, value * 2), 1.0)
            for number, value in enumerate(seconds, start=1)
        ]
        return Curve(name, axis, "token", points)

    curves = [
        curve("rows", "rows", 0.25, 0.5),
        curve("context: decoding", "tokens of context", 1.0, 2.0),
        curve("context: training", "tokens of context", 3.0, 4.0),
    ]
    rows, context = [axes for axes in draw_growth(curves).axes if axes.get_visible()]
    drawn = {
        line.get_label(): np.asarray(line.get_ydata()).tolist()
        for axes in (rows, context)
        for line in axes.lines
    }
    assert drawn == {
        "rows, ms a token": [250, 500],
        "context: decoding, ms a token": [1000, 2000],
        "context: training, ms a token": [3000, 4000],
    }
    assert (rows.get_xlabel(), context.get_xlabel()) == ("rows", "tokens of context")
    assert len(context.lines) == 2
