"""Steps of RL beside TRL's: both sides ask the same questions and sample to the same limit."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_here, tiny_lm

import workflows.agent
from common.settings import build_settings
from data.questions import Question
from data.trajectory import Codec
from speed import libraries
from speed.libraries import compare_with_libraries, questions_of_timed_steps
from speed.ours import Ours
from speed.pairs import Comparison, Timing
from speed.settings import BenchSettings
from speed.trees import StepRow, Tree


def bench_settings(**given: Any) -> BenchSettings:
    common = {"run": "tiny", "device": "cpu", "dtype": "float32", "max_len": 70, "repeats": 1}
    return build_settings(BenchSettings, {**common, "questions": 2, "rollouts": 2, **given})


@pytest.fixture
def ours(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ours:
    """Return a random network in the folder of a run."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec, noise=0.1)
    folder = Path("out", "tiny", "sft3")
    folder.parent.mkdir(parents=True)
    lm.save(folder)
    return Ours(lm, folder, bench_settings())


def test_both_sides_ask_the_same_questions(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL gets those that train_rl.py asks in the steps that count, and these steps' limit.

    Guards: questions of one step for two, a limit by the last step alone, and a pool with the long
    questions that train_rl.py leaves out.
    """
    asked: list[list[str]] = []
    roll_out_questions = workflows.agent.roll_out_questions

    def answer(lm: Any, texts: list[str], *arguments: Any, **more: Any) -> Any:
        asked.append(texts)
        return roll_out_questions(lm, texts, *arguments, **more)

    monkeypatch.setattr(workflows.agent, "roll_out_questions", answer)
    # Scripts run in this process, which is quicker, and in which questions are seen.
    monkeypatch.setattr(Tree, "_execute", execute_here)
    run_stage = libraries.run_stage
    logs: list[list[StepRow]] = []

    def run_once(name: str, tree: Tree, start: str) -> list[StepRow]:
        if not logs:
            rows = run_stage(name, tree, start)
            for row, tokens in zip(rows, (90.0, 20.0, 41.0), strict=True):
                row.values["policy_tokens"] = tokens
            logs.append(rows)
        return logs[0]

    monkeypatch.setattr(libraries, "run_stage", run_once)
    given_to_trl: list[tuple[list[list[Question]], int]] = []

    def grpo_steps(ours: Ours, steps: list[list[Question]], completion_tokens: int) -> Any:
        given_to_trl.append((steps, completion_tokens))
        return lambda: Timing(1.0, 1, 0.0)

    # TRL need not be installed.
    monkeypatch.setitem(sys.modules, "speed.beside_trl", SimpleNamespace(grpo_steps=grpo_steps))
    installed = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(libraries, "importlib", installed)
    found: list[Comparison] = []
    ours.settings.only = ["rl"]
    compare_with_libraries(ours, found.append)

    ((steps, completion_tokens),) = given_to_trl
    # Of each question two rollouts, and none of the step that does not count.
    repeated = [[text.question for text in step for _ in range(2)] for step in steps]
    assert len(asked) == 3
    assert repeated == asked[1:]
    assert asked[0] not in repeated
    assert completion_tokens == 30
    ((timing, _),) = found[0].pairs
    assert timing.units == 4 * (20 + 41)


def execute_here(tree: Tree, script: str, *arguments: str) -> str:
    """Stand for Tree._execute."""
    done = run_here(tree.folder, script, *arguments)
    assert done.status == 0, done.err
    return done.out


def test_a_small_pool_is_asked_again() -> None:
    """A real run may have fewer questions than the steps ask; train_rl.py begins anew with them."""
    pool = [Question(text, text, []) for text in "abc"]
    steps = questions_of_timed_steps(bench_settings(), pool)
    assert [[question.question for question in step] for step in steps] == [["c", "a"], ["b", "c"]]


def test_trl_asks_each_question_in_its_step(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rollouts end at the limit; tokens and seconds are of both steps, each time anew."""
    pytest.importorskip("trl")
    from speed import beside_trl

    prompts: list[list[str]] = []
    tokenize = beside_trl.Trainer._tokenize_prompts

    def record(trainer: Any, texts: list[str]) -> Any:
        prompts.append(list(texts))
        return tokenize(trainer, texts)

    monkeypatch.setattr(beside_trl.Trainer, "_tokenize_prompts", record)
    steps = [
        [Question(text, f"Who directed {text}?", ["Eva"]) for text in part]
        for part in (["Silver", "Iron"], ["River", "Hill"])
    ]
    make_steps = beside_trl.grpo_steps(ours, steps, completion_tokens=3)
    first = make_steps()
    second = make_steps()
    repeated = [[question.question for question in step for _ in range(2)] for step in steps]
    assert prompts == repeated * 2
    for timing in (first, second):
        # Eight rollouts of one to three tokens.
        assert 8 <= timing.units <= 24
        assert timing.seconds > 0
        assert timing.flops > 0


def test_the_clock_adds_up_the_steps_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between the steps, and the training before, does not count."""
    pytest.importorskip("trl")
    from speed import beside_trl

    times = iter([1.0, 2.0, 10.0, 13.0, 20.0, 25.0])
    monkeypatch.setattr(beside_trl, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = beside_trl.Clock()
    for steps, seconds in ((2, 4.0), (1, 5.0)):
        clock.on_train_begin()
        for _ in range(steps):
            clock.on_step_begin()
            clock.on_step_end()
        assert clock.seconds == seconds


def test_trl_rewards_a_boxed_answer(codec: Codec) -> None:
    """The last box counts, up to the end of the text."""
    from_text = codec.encode
    pytest.importorskip("trl")
    from speed.beside_trl import rewards

    box = codec.boxed_id
    texts = [
        [box, *from_text("Ada Falk"), box, *from_text("Eva Moss"), codec.eos_id, *from_text("x")],
        [box, *from_text("Eva Moss"), box, *from_text("Ada Falk")],
        from_text("Eva Moss"),
    ]
    assert rewards(codec, texts, [["Eva Moss"]] * 3) == [1.0, 0.0, 0.0]


def test_rows_at_once_are_a_part_of_a_step() -> None:
    """All parts are of one size; a row that is longer than the limit goes by itself."""
    pytest.importorskip("trl")
    from speed.beside_trl import rows_at_once

    assert rows_at_once(240, 100, 1600) == 16
    assert rows_at_once(10, 100, 450) == 2
    assert rows_at_once(10, 100, 90) == 1
