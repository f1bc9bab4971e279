"""A language model as judge of answers, alone and in the table of eval.py."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, ROOT, read_rows, run_here, strict_json
from fake_endpoint import FakeEndpoint
from small_checkpoint import save_task

from services.chat import Chat
from services.judge import judge


def record(answer: str) -> dict[str, Any]:
    return {"question": "Who?", "golden_answers": ["Eva", "Eva Moss"], "answer": answer}


def test_verdicts(serve: Any, tmp_path: Path) -> None:
    """Yes and no in any dress are read; what is neither is not guessed."""
    words = {"a": "Yes.", "b": " **no**, because", "c": "It may be.", "d": "Nobody", "e": "YES"}

    def rule(request: pytest.FixtureRequest) -> Any:
        prompt = request["messages"][0]["content"]
        return words[re.findall(r"Given answer: (.)", prompt)[0]]

    endpoint = FakeEndpoint(serve, rule)
    chat = Chat(endpoint.url + "#x", CPU, "judge", tmp_path / "c.sqlite")
    verdicts = judge(chat, [record(answer) for answer in "abcde"])
    assert verdicts == [1.0, 0.0, None, None, 1.0]
    assert "Accepted answers: Eva; Eva Moss\n" in endpoint.requests[0]["messages"][0]["content"]


def test_an_empty_answer(serve: Any, tmp_path: Path) -> None:
    """It is wrong, and the judge is not asked; verdicts stay with their records."""
    endpoint = FakeEndpoint(serve, lambda request: "yes")
    chat = Chat(endpoint.url + "#x", CPU, "judge", tmp_path / "c.sqlite")
    assert judge(chat, [record("a"), record(""), record("b"), record(" ")]) == [1.0, 0.0, 1.0, 0.0]
    assert len(endpoint.requests) == 2


def test_a_judge_that_thinks(serve: Any, tmp_path: Path) -> None:
    """It is asked again, with room for its thought, which says nothing about the verdict.

    Guards: verdicts of which none could be read.
    """

    def rule(request: Any) -> str:
        if request["max_tokens"] < 100:
            return "<think>No doubt,"
        return "<think>No doubt, it is her.</think>\n\n**Yes**"

    endpoint = FakeEndpoint(serve, rule)
    chat = Chat(endpoint.url + "#x", CPU, "judge", tmp_path / "c.sqlite")
    assert judge(chat, [record("a"), record("b")]) == [1.0, 1.0]
    assert len(endpoint.requests) == 4


# ---- in the table --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cwd = tmp_path_factory.mktemp("user")
    save_task(cwd)
    return cwd


def evaluate(folder: Path, *arguments: Any) -> Any:
    return run_here(
        folder,
        "eval.py",
        ROOT / "config" / "smollm2.py",
        "--model=checkpoint",
        "--data=nq_dev.jsonl",
        "--corpus=passages.jsonl",
        "--max_len=480",
        "--max_observation=60",
        *arguments,
    )


def read_predictions(folder: Path) -> Any:
    return read_rows(next((folder / "out/eval").glob("checkpoint-*/predictions.jsonl")))


def test_eval_with_a_judge(serve: Any, folder: Path) -> None:
    """The table has the share of yes among the verdicts that could be read, and their number."""
    replies = itertools.cycle(["yes", "no", "perhaps"])
    endpoint = FakeEndpoint(serve, lambda request: next(replies))
    done = evaluate(folder, "--eval_questions=6", f"--judge={endpoint.url}#x")
    assert done.status == 0, done.err
    assert "  judge" in done.out
    assert "x: asked" in done.out

    figures_of_row = strict_json(done.out.splitlines()[-1])["rows"]
    predictions = read_predictions(folder)
    for row, figures in figures_of_row.items():
        verdicts = [prediction["judge"] for prediction in predictions if prediction["row"] == row]
        readable = [verdict for verdict in verdicts if verdict is not None]
        share = 100 * sum(readable) / len(readable)
        assert figures["avg"]["judge_unread"] == len(verdicts) - len(readable)
        assert figures["nq_dev"]["judge"] == pytest.approx(share)
    unread = sum(figures["avg"]["judge_unread"] for figures in figures_of_row.values())
    assert unread > 3


def test_a_judge_that_fails_leaves_the_table(
    serve: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are answered, shown and kept; then the judge's error ends the run.

    Guards: it cost the whole table.
    """
    monkeypatch.setattr("services.endpoint.FIRST_WAIT", 0.0)
    endpoint = FakeEndpoint(serve, lambda request: {"choices": []})
    done = evaluate(
        folder,
        "--run=other",
        "--eval_questions=2",
        "--rows=model only,ReAct workflow",
        f"--judge={endpoint.url}#x",
    )
    assert done.status == 2
    assert "not an endpoint that answers" in done.err
    figures_of_row = strict_json(done.out.splitlines()[-1])["rows"]
    predictions = read_predictions(folder)
    for row in ("model only", "ReAct workflow"):
        assert row in figures_of_row
        assert sum(prediction["row"] == row for prediction in predictions) >= 2
