"""ZeroSearch's form: a simulator that is told the gold facts, and asked for useful or noisy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scripted_decoder import ScriptedDecoder

from autocoa import rollout
from common.errors import UserError
from common.settings import RolloutSettings
from data.questions import Fact, Lookup, Question
from data.trajectory import Codec, Observation, Provenance
from environments import choice
from environments.choice import prepare_environments
from environments.distilled import Example, Imagined, query_prompt, training_trajectory
from environments.simulator import SimulatorLibrary, hint_of, simulator_examples
from tools import TOOLS, Library, calculate
from train_rl import RLSettings


def question(text: str, answer: str, subject: str) -> Question:
    """Return a question of one fact."""
    lookup = Lookup(ask="director?", queries=[subject], subject=subject, evidence=[answer])
    fact = Fact("f", [text], [answer], f"I recall {answer}.", [lookup])
    return Question("q", text, [answer], facts=[fact])


RIVER = question("Who directed Silver River?", "Eva Moss", "Silver River")
HILL = question("Who directed Iron Hill?", "Ada Falk", "Iron Hill")


class RecordedSimulator:
    """Stands for the network, and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def imagine(self, queries: list[str], hints: list[str]) -> list[Imagined]:
        self.told += zip(queries, hints, strict=True)
        return [Imagined(f"A {hint.split()[0]} film.", [1]) for hint in hints]


def simulator_library(codec: Codec, noise_share: float = 0.0, steps: int = 10) -> Any:
    """Return a library for the two questions, and the stand-in behind its search."""
    simulator = RecordedSimulator()
    questions = {tuple(codec.prompt(one.question)): one for one in (RIVER, HILL)}
    library = Library({"search": lambda queries: pytest.fail("the tool was asked"), **TOOLS})
    simulated: Any = SimulatorLibrary(library, simulator, questions, noise_share, steps)  # type: ignore[arg-type]
    return simulated, simulator


def test_a_simulator_is_told_the_facts_of_the_question_that_it_serves(codec: Codec) -> None:
    """Two rollouts ask the same; each is answered with its own question's facts in view."""
    line = " Hm<begin_search> film</end_search> so</think>\\boxed{ Eva Moss}<eos>"
    decoder = ScriptedDecoder(codec, line, line)
    library, simulator = simulator_library(codec)
    prompts = [codec.prompt(one.question) for one in (RIVER, HILL)]
    trajectories = rollout(decoder, codec, prompts, library, RolloutSettings())
    assert simulator.told == [
        ("film", "useful Who directed Silver River? Eva Moss"),
        ("film", "useful Who directed Iron Hill? Ada Falk"),
    ]
    for trajectory in trajectories:
        assert trajectory.observations == [
            Observation("A useful film.", Provenance.IMAGINED),
        ]


def test_a_simulator_is_told_the_facts_of_validation_questions(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a look at questions that are none of the pool's, which ended the stage."""
    monkeypatch.setattr(choice, "load_world_model", lambda _: RecordedSimulator())
    library = Library({"search": lambda queries: pytest.fail("the tool was asked")})
    task: Any = SimpleNamespace(rl_search=library, questions=lambda pool, count: [RIVER])
    environment = choice.open_environment("rl1", RLSettings(gold_facts=True), task, codec, [HILL])
    line = " Hm<begin_search> film</end_search> so</think>\\boxed{ Ada Falk}<eos>"
    decoder = ScriptedDecoder(codec, line)
    prompts = [codec.prompt(HILL.question)]
    (trajectory,) = rollout(decoder, codec, prompts, environment.search, RolloutSettings())
    assert trajectory.observations == [Observation("A useful film.", Provenance.IMAGINED)]


def test_the_share_of_noise_grows(codec: Codec) -> None:
    """From nothing at the first step to the setting at the last, within three deviations."""
    library, _ = simulator_library(codec, noise_share=0.4, steps=11)
    queries = [f"query {number}" for number in range(2000)]
    for step, share in ((0, 0.0), (5, 0.2), (10, 0.4)):
        library.step = step
        noisy = np.mean([library.kind_of(query) == "noisy" for query in queries])
        assert noisy == pytest.approx(share, abs=3 * np.sqrt(share * (1 - share) / 2000))


def test_the_calculator_of_a_simulated_environment_is_real(codec: Codec) -> None:
    library, simulator = simulator_library(codec)
    assert library(["calculate: 3 + 4"]) == calculate(["3 + 4"])
    assert simulator.told == []


def test_a_simulator_learns_from_the_searches_of_chains(codec: Codec) -> None:
    """One whose observation holds the evidence was useful, the other noisy.

    Chains about other questions are left out.
    """
    chain = codec.build(
        RIVER.question,
        [
            ("search", "Silver"),
            ("result", "Iron Hill 1: A film."),
            ("search", "Silver River"),
            ("result", "Silver River 1: It was directed by Eva Moss."),
            ("answer", "Eva Moss"),
        ],
    )
    assert simulator_examples(codec, [chain], [HILL]) == []
    assert simulator_examples(codec, [chain], [RIVER, HILL]) == [
        Example("Silver", "Iron Hill 1: A film.", hint_of(RIVER, "noisy")),
        Example(
            "Silver River",
            "Silver River 1: It was directed by Eva Moss.",
            hint_of(RIVER, "useful"),
        ),
    ]


def test_the_hint_stands_before_the_query(codec: Codec) -> None:
    """In training as when it is asked, and it carries no loss."""
    example = Example("Silver River", "A film", hint_of(RIVER, "useful"))
    trajectory = training_trajectory(codec, example, 100)
    prompt = query_prompt(codec, "Silver River", hint_of(RIVER, "useful"))
    assert trajectory.ids[: len(prompt)] == prompt
    assert sum(trajectory.mask[: len(prompt)]) == 0
    text = codec.decode(prompt)
    assert "useful Who directed Silver River? Eva Moss<begin_search> Silver River" in text


def test_a_simulator_is_not_mixed_with_the_tool() -> None:
    settings = RLSettings(gold_facts=True, rl1_environment="mixed")
    task: Any = None
    with pytest.raises(UserError, match="--gold_facts: a simulator that is told the facts"):
        prepare_environments(["rl1"], settings, task)


def test_a_budget_is_remembered_by_stages_that_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """RL-2 of a run whose RL-1 mixed under a budget. Guards: a run that could not go on."""
    monkeypatch.setattr(
        "environments.choice.ensure_world_model", lambda _: pytest.fail("no stage needs one")
    )
    task: Any = type("Task", (), {"search": None, "rl_search": None})
    settings = RLSettings(rl1_environment="mixed", max_real_calls=9)
    prepare_environments(["rl2"], settings, task)
