"""GRPO's step (train_rl.py): what it learns from, with which numbers, and which way it goes."""

import itertools
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_rows, tiny_lm
from processes import in_processes

import backends.torch as torch_backend
import model
import train_rl
import train_sft
from autocoa import IMAGINE, contrastive_loss, grpo_loss, nll_loss, random_stream
from common import memory, runs
from common.errors import UserError
from data.batches import language_batches, pack_texts, pair_batches, real_observation_mask
from data.questions import Question
from data.rollout_batch import RolloutBatch
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from environments import choice
from environments.environment import Environment, internal_environment, scheduled_environment
from evaluation import rl_log
from model import LM
from tools import Library
from train_rl import RLSettings, RLStage

PARTS = [("think", "Hm"), ("search", "Silver River"), ("result", "It was directed by Eva Moss.")]


def question(text: str = "Who directed it?", golden: str = "Eva") -> Any:
    return Question("1", text, [golden])


def sampled(codec: Codec, lm: LM, answers: Any) -> Any:
    """Return trajectories as if they had been sampled from this network at temperature 1."""
    trajectories = []
    for answer in answers:
        trajectory = codec.build("Who directed it?", [*PARTS, ("answer", answer)])
        trajectory.logprobs = torch_backend.score(lm.network, pack_texts([trajectory])).tolist()
        trajectories.append(trajectory)
    return trajectories


def find_nothing(queries: list[str]) -> list[Observation]:
    """Stand for the real tool."""
    return [Observation("Nothing found.") for _ in queries]


def find_in_sfts_world(queries: list[str]) -> list[Observation]:
    """Stand for the tool of another world."""
    return find_nothing(queries)


def stage(name: str = "rl1", steps: int = 1, number: int = 1) -> Any:
    """Return a stage of the run nano whose pool is one question."""
    return RLStage(
        folder=Path("out", "nano", name),
        steps=steps,
        pool=[question()],
        first_question=0,
        environment=internal_environment(Library({"search": find_nothing})),
        call_cost=0.0,
        rate_scale=1.0,
        seed_number=number,
        evaluation=[],
        eval_search=Library({"search": find_nothing}),
        validation=[question("Who starred in it?", "Ada")],
    )


def replay(monkeypatch: pytest.MonkeyPatch, trajectories: Any, rewards: Any) -> None:
    """Let every step sample these trajectories."""
    batch = RolloutBatch([question()] * len(rewards), trajectories, np.array(rewards))
    monkeypatch.setattr(train_rl, "sample_rollouts", lambda *arguments: batch)


def record_updates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a list that fills with the (trajectories, advantages) of each optimizer step."""
    updates = []
    update_batches = train_rl.update_batches

    def recorded(batch: Any, rows: Any, advantages: Any, *others: Any) -> Any:
        learned = [batch.trajectories[row] for row in rows]
        updates.append((learned, advantages.ravel()[rows].tolist()))
        return update_batches(batch, rows, advantages, *others)

    monkeypatch.setattr(train_rl, "update_batches", recorded)
    return updates


def test_rewards_and_order_of_a_step(codec: Codec, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts of a question stand together; each is scored by its own question's answers."""
    asked = []

    def roll_out_questions(
        policy: Any, texts: Any, search: Any, settings: Any, temperature: Any, streams: Any
    ) -> list[Any]:
        asked.extend(texts)
        answers = ("Eva", "Ada", "Eva", "Ada", "Ada", "Eva")
        return [
            codec.build(text, [("answer", answer)])
            for text, answer in zip(texts, answers, strict=True)
        ]

    monkeypatch.setattr(train_rl, "roll_out_questions", roll_out_questions)
    two = stage()
    two.pool = [question(), question("Who starred in it?", "Ada")]
    settings = RLSettings(questions=2, rollouts=3)
    batch = train_rl.sample_rollouts(lm, settings, two, 0)
    assert asked == ["Who directed it?"] * 3 + ["Who starred in it?"] * 3
    assert batch.rewards.tolist() == [[1, 0, 1], [1, 1, 0]]


def test_steps_take_questions_in_turn(
    codec: Codec, lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step goes on where the one before it ended, and begins again at the end of the pool."""
    asked = []

    def roll_out_questions(
        policy: Any, texts: Any, search: Any, settings: Any, temperature: Any, streams: Any
    ) -> list[Any]:
        asked.append(list(texts))
        return [codec.build(text, [("answer", "Eva")]) for text in texts]

    monkeypatch.setattr(train_rl, "roll_out_questions", roll_out_questions)
    three = stage()
    three.pool = [question(text) for text in ("A?", "B?", "C?")]
    for step in range(2):
        train_rl.sample_rollouts(lm, RLSettings(questions=2, rollouts=1), three, step)
    assert asked == [["A?", "B?"], ["C?", "A?"]]


def test_a_stage_goes_on_after_the_questions_of_the_one_before(
    codec: Codec, lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an RL-2 that asks again what RL-1 has asked of the same pool."""
    asked = []

    def roll_out_questions(
        policy: Any, texts: Any, search: Any, settings: Any, temperature: Any, streams: Any
    ) -> list[Any]:
        asked.append(list(texts))
        return [codec.build(text, [("answer", "Eva")]) for text in texts]

    monkeypatch.setattr(train_rl, "roll_out_questions", roll_out_questions)
    second = stage("rl2", number=2)
    second.pool = [question(text) for text in ("A?", "B?", "C?", "D?", "E?")]
    second.first_question = 3
    for step in range(2):
        train_rl.sample_rollouts(lm, RLSettings(questions=2, rollouts=1), second, step)
    assert asked == [["D?", "E?"], ["A?", "B?"]]


def test_each_rollout_has_a_random_stream_of_its_own(
    codec: Codec, lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of its seed, stage, step, question and rollout, and no two are the same.

    Guards: groups that are one text, a step that draws what the one before it drew, and RL-2 what
    RL-1 drew.
    """
    given: list[np.ndarray] = []

    def roll_out_questions(
        policy: Any, texts: Any, search: Any, settings: Any, temperature: Any, streams: Any
    ) -> list[Any]:
        given.extend(streams)
        return [codec.build(text, [("answer", "Eva")]) for text in texts]

    monkeypatch.setattr(train_rl, "roll_out_questions", roll_out_questions)
    expected = []
    for seed, number, step in itertools.product((0, 1), (1, 2), (0, 1, 2)):
        settings = RLSettings(questions=2, rollouts=3, max_len=90, seed=seed)
        train_rl.sample_rollouts(lm, settings, stage(number=number), step)
        expected += [
            random_stream(90, seed, number, step, question, rollout)
            for question in range(2)
            for rollout in range(3)
        ]
    np.testing.assert_array_equal(given, expected)
    assert len({stream.tobytes() for stream in given}) == 2 * 2 * 3 * 2 * 3


def imagine(queries: list[str]) -> list[Observation]:
    """Stand for a world model."""
    return [Observation("A film.", Provenance.IMAGINED) for _ in queries]


class RecordedRun:
    """Stands for all that train_rl.run calls, and keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []  # of the reference, in order
        self.loaded: list[str] = []  # folders that weights were read from
        self.stages: list[RLStage] = []
        self.distilled = 0  # how often a world model was asked for
        self.is_stopped = False  # whether an alarm stops each stage
        self.search = Library({"search": find_in_sfts_world})
        self.rl_search = Library({"search": find_nothing})
        self.eval_search = Library({"search": find_nothing})
        self.evaluation = {"single": [question(f"{number}?") for number in range(70)]}
        self.policy = types.SimpleNamespace(
            resume=lambda folder: self.load(folder, None),
            codec=types.SimpleNamespace(fit=lambda text, budget: text[:budget]),
        )
        self.reference = types.SimpleNamespace(
            begin_stage=lambda *arguments: self.events.append("adapter"), copy=self.copy
        )
        monkeypatch.setattr(train_rl, "open_task", lambda settings: self)
        monkeypatch.setattr(model, "load", self.load)
        monkeypatch.setattr(train_rl, "train_grpo", self.train_grpo)
        monkeypatch.setattr(memory, "report", lambda *arguments: True)
        monkeypatch.setattr(choice, "ensure_world_model", self.ensure_world_model)
        monkeypatch.setattr(choice, "load_world_model", lambda settings: imagine)
        monkeypatch.setattr(choice, "held_out_entropies", lambda settings: [0.0, 1.0])
        monkeypatch.setattr(choice, "read_examples", lambda folder: {"A": "A 1: A film."})
        monkeypatch.setattr(choice, "read_chains_of_action", lambda root: [])

    def ensure_world_model(self, settings: RLSettings) -> None:
        self.distilled += 1

    def leave_out_long_questions(self, codec: Any, longest_prompt: int) -> None:
        assert codec is self.policy.codec
        assert longest_prompt == RLSettings().longest_prompt

    def questions(self, pool: str, count: int) -> Any:
        return pool, count

    def load(self, folder: Path, settings: Any) -> Any:
        self.loaded.append(folder.name)
        return self.reference

    def copy(self) -> Any:
        self.events.append("copy")
        return self.policy

    def train_grpo(self, policy: Any, reference: Any, settings: Any, stage: RLStage) -> bool:
        assert (policy, reference) == (self.policy, self.reference)
        self.stages.append(stage)
        return self.is_stopped


@pytest.fixture
def trained_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return out/nano of an empty folder, in which SFT and RL-1 are done."""
    monkeypatch.chdir(tmp_path)
    for name in ("sft2", "sft3", "rl1"):
        (tmp_path / "out/nano" / name).mkdir(parents=True)
        (tmp_path / "out/nano" / name / "config.json").write_text("{}")
    return tmp_path / "out" / "nano"


@pytest.mark.parametrize(
    ("given", "stages", "loaded"),
    [
        ({}, ["rl1", "rl2"], ["sft3"]),
        ({"stage": "rl2"}, ["rl2"], ["rl1"]),
        ({"stage": "rl2", "start": "sft2"}, ["rl2"], ["sft2"]),
        ({"start": "sft2"}, ["rl1", "rl2"], ["sft2"]),
        ({"resume": True}, ["rl2"], ["sft3", "rl1"]),
        ({"start": "sft2", "resume": True}, ["rl2"], ["sft2", "rl1"]),
    ],
)
def test_the_two_stages(
    trained_folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    stages: list[str],
    loaded: list[str],
) -> None:
    """RL-1 asks a world model and RL-2 the tool, of one pool in which RL-2 goes on after RL-1.

    The adapter is made before the reference is copied (guards: a second base in memory). The
    reference is what the command begins with; --resume after RL-1 goes on from RL-1 with the same
    reference. A world model is made where a stage needs one, and nowhere else.
    """
    if given == {"start": "sft2"}:
        (trained_folders / "rl1" / "config.json").unlink()
    recorded = RecordedRun(monkeypatch)
    settings = RLSettings(
        rl1_steps=3, rl2_steps=2, questions=4, rl_questions=10, call_cost=0.2, **given
    )
    train_rl.run(settings)

    assert [stage.folder.name for stage in recorded.stages] == stages
    assert recorded.events == ["adapter", "copy"]
    assert recorded.loaded == loaded
    assert recorded.distilled == ("rl1" in stages)
    for stage in recorded.stages:
        assert stage.pool == ("rl2", 10)
        assert len(stage.evaluation) == train_rl.EVAL_QUESTIONS
        assert stage.eval_search is recorded.eval_search
        provenances = {
            observation.provenance for observation in stage.environment.search(["A", "B"])
        }
        if stage.folder.name == "rl1":
            assert (stage.steps, stage.first_question, stage.call_cost) == (3, 0, 0.1)
            assert provenances == {Provenance.IMAGINED}
            assert stage.environment.known_answers == {"A": "A 1: A film."}
            assert stage.environment.tool.raw_calls == 0
            assert stage.rate_scale == settings.rl1_scale
            assert stage.seed_number == 1
        else:
            assert (stage.steps, stage.first_question, stage.call_cost) == (2, 12, 0.2)
            assert provenances == {Provenance.REAL}
            assert stage.environment.known_answers == {}
            assert stage.environment.tool.raw_calls == 2
            assert stage.rate_scale == 1.0
            # It draws other numbers than RL-1.
            assert stage.seed_number == 2


def test_the_paper_recipe_imagines_about_its_own_world(
    trained_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With RL-1's own pool the policy imagines, RL-2's pool begins at its start, no world model."""
    recorded = RecordedRun(monkeypatch)
    train_rl.run(RLSettings(rl1_environment="internal", rl1_pool="rl1", rl_questions=10))
    first, second = recorded.stages
    assert first.environment.search == IMAGINE
    assert first.pool == ("rl1", 10)
    assert second.pool == ("rl2", 10)
    assert second.first_question == 0
    assert recorded.distilled == 0


@pytest.mark.parametrize("pool", ["rl1", "rl2"])
def test_a_real_environment_is_of_the_world_that_is_asked_about(
    trained_folders: Path, monkeypatch: pytest.MonkeyPatch, pool: Any
) -> None:
    """RL-1's own questions are about SFT's world. Guards: questions that no search can answer."""
    recorded = RecordedRun(monkeypatch)
    train_rl.run(RLSettings(stage="rl1", rl1_environment="real", rl1_pool=pool))
    (first,) = recorded.stages
    first.environment.search(["A"])
    worlds = {"rl1": recorded.search, "rl2": recorded.rl_search}
    assert first.environment.tool.tool is worlds[pool]["search"]


@pytest.mark.parametrize(
    ("given", "is_same_tool", "message"),
    [
        ({"max_real_calls": 9}, False, "--max_real_calls: only a mixed environment"),
        ({"rl1_pool": "rl1"}, False, "--rl1_pool=rl1: .* imitates the tool of RL-2's"),
        (
            {"rl1_pool": "rl1", "rl1_environment": "mixed"},
            False,
            "--rl1_pool=rl1: .*take --rl1_pool=rl2",
        ),
        ({"rl1_pool": "rl1"}, True, ""),
        ({"rl1_pool": "rl1", "rl1_environment": "internal"}, False, ""),
        ({"rl1_pool": "rl1", "rl1_environment": "real"}, False, ""),
        ({"max_real_calls": 9, "rl1_environment": "mixed"}, False, ""),
        ({"max_real_calls": 9, "rl2_environment": "mixed"}, False, ""),
        ({"gold_facts": True, "rl2_environment": "mixed"}, False, "--gold_facts: .*not mixed"),
    ],
)
def test_settings_that_contradict_the_environments(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], is_same_tool: bool, message: str
) -> None:
    """Refused with the way out; a real run has one tool, and may ask RL-1's own pool anywhere."""
    search = Library({"search": find_nothing})
    rl_search = search if is_same_tool else Library({"search": find_nothing})
    task: Any = types.SimpleNamespace(search=search, rl_search=rl_search)
    distilled = []
    monkeypatch.setattr(choice, "ensure_world_model", distilled.append)
    settings = RLSettings(**given)
    if not message:
        choice.prepare_environments(["rl1", "rl2"], settings, task)
        return
    with pytest.raises(UserError, match=message) as error:
        choice.prepare_environments(["rl1", "rl2"], settings, task)
    assert "\n" not in str(error.value)
    assert distilled == []


def test_a_stage_that_is_not_trained_contradicts_nothing(
    trained_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RL-2 alone in the tool's environment, whatever RL-1 would be."""
    recorded = RecordedRun(monkeypatch)
    train_rl.run(RLSettings(stage="rl2", rl1_pool="rl1"))
    assert [stage.folder.name for stage in recorded.stages] == ["rl2"]
    assert recorded.distilled == 0


def test_a_refused_command_distills_nothing(
    trained_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: minutes of a world model before a contradiction is said, and folders removed."""
    recorded = RecordedRun(monkeypatch)
    (trained_folders / "rl1.checkpoint").mkdir()
    with pytest.raises(UserError, match="--max_real_calls"):
        train_rl.run(RLSettings(max_real_calls=3))
    assert recorded.distilled == 0
    assert recorded.stages == []
    assert (trained_folders / "rl1.checkpoint").is_dir()


def test_groups_that_agree_are_skipped_and_counted(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three groups one differs: the step learns from it alone, and the log counts the others."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    trajectories = sampled(codec, lm, ["Eva", "Eva", "Eva", "Ada", "Ada", "Ada"])
    replay(monkeypatch, trajectories, [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    updates = record_updates(monkeypatch)
    train_rl.train_grpo(lm, lm.copy(), RLSettings(questions=3, rollouts=2), stage())
    ((learned, advantages),) = updates
    found = {
        (id(trajectory), advantage)
        for trajectory, advantage in zip(learned, advantages, strict=True)
    }
    assert found == {(id(trajectories[2]), 0.5), (id(trajectories[3]), -0.5)}

    folder = tmp_path / "out/nano/rl1"
    (row,) = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert row["skipped_groups"] == 2
    assert row["reward"] == row["em"] == 0.5
    # KL is to the policy at the start, which must not move along.
    assert row["kl"] > 0
    assert row["malformed"] == 0
    assert row["actions"] == 1
    assert row["length"] == np.mean([len(trajectory.ids) for trajectory in trajectories])
    kept = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [row["ids"] for row in kept] == [trajectory.ids for trajectory in trajectories[:2]]
    assert kept[0]["reward"] == 1


@pytest.mark.parametrize(
    "provenance, given",
    [
        (Provenance.FAILED, {}),
        (Provenance.MISSED, {}),
        (Provenance.FAILED, {"kl": 0.1}),
        (Provenance.FAILED, {"observation_coef": 0.1}),
    ],
)
def test_a_group_with_a_lost_search_is_skipped(
    codec: Codec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    provenance: Any,
    given: dict[str, float],
) -> None:
    """What is rewarded after a search that failed says nothing of the policy.

    Guards: its tokens in the penalty and in the auxiliary loss, which skipped groups may be in.
    """
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    trajectories = sampled(codec, lm, ["Eva", "Ada", "Eva", "Ada"])
    trajectories[0].observations[0] = Observation("The search failed.", provenance)
    replay(monkeypatch, trajectories, [[1.0, 0.0], [1.0, 0.0]])
    updates = record_updates(monkeypatch)
    settings = RLSettings(questions=2, rollouts=2, **given)
    train_rl.train_grpo(lm, lm.copy(), settings, stage("rl2", number=2))
    ((learned, _),) = updates
    assert {id(trajectory) for trajectory in learned} == {
        id(trajectories[2]),
        id(trajectories[3]),
    }
    log = (tmp_path / "out/nano/rl2/log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["skipped_groups"] == 1


def test_a_step_without_a_difference_changes_nothing(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All groups agree: no update, not even by the optimizer's momentum."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    before = {name: weight.clone() for name, weight in lm.network.named_parameters()}
    replay(monkeypatch, sampled(codec, lm, ["Eva", "Ada"]), [[1.0, 1.0]])
    settings = RLSettings(questions=1, rollouts=2)
    train_rl.train_grpo(lm, lm.copy(), settings, stage(steps=3))
    for name, weight in lm.network.named_parameters():
        assert (weight == before[name]).all()


def test_a_bad_loss_stops_rl(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN log-probs: an error names the step, and the stage's folder is not made."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    trajectories = sampled(codec, lm, ["Eva", "Ada"])
    trajectories[0].logprobs = [float("nan")] * len(trajectories[0].ids)
    replay(monkeypatch, trajectories, [[1.0, 0.0]])
    settings = RLSettings(questions=1, rollouts=2)
    with pytest.raises(UserError, match="rl2: loss is nan at step 0"):
        train_rl.train_grpo(lm, lm.copy(), settings, stage("rl2", number=2))
    assert not (tmp_path / "out/nano/rl2").exists()


def batches_of(
    trajectories: list[Trajectory],
    advantages: list[float],
    skipped: list[bool],
    reference: LM,
    settings: RLSettings,
) -> list[Any]:
    """Return an update on one rollout of each question, so that no two share a token."""
    count = len(trajectories)
    batch = RolloutBatch([question()] * count, trajectories, np.zeros((count, 1)))
    column = np.array(advantages)[:, None]
    return train_rl.update_batches(
        batch, np.arange(count), column, np.array(skipped), reference, settings
    )


def test_a_policy_that_diverges_stops_rl(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is finite, its weights are not any more: it is said, and nothing is saved.

    Guards: a ruined policy that is saved, evaluated, and called a success.
    """
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    replay(monkeypatch, sampled(codec, lm, ["Eva", "Ada"]), [[1.0, 0.0]])
    settings = RLSettings(questions=1, rollouts=2, rl_lr=1e30)
    with pytest.raises(UserError, match=r"rl2: kl is nan at step 0; .*lower --rl_lr"):
        train_rl.train_grpo(lm, lm.copy(), settings, stage("rl2", steps=3, number=2))
    assert not (tmp_path / "out/nano/rl2").exists()


def test_steps_without_a_group_to_learn_from_are_said(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log of each step: how many in a row had nothing to teach."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    replay(monkeypatch, sampled(codec, lm, ["Eva", "Eva"]), [[1.0, 1.0]])
    train_rl.train_grpo(lm, lm.copy(), RLSettings(questions=1, rollouts=2), stage(steps=3))
    log = read_rows(tmp_path / "out/nano/rl1/log.jsonl")
    assert [row["idle_steps"] for row in log] == [1, 2, 3]
    # The two rollouts are one text.
    assert [row["shared_tokens"] for row in log] == [0.5] * 3


def test_idle_steps_are_counted_over_a_checkpoint() -> None:
    """From the log, so that a resumed stage goes on counting; one group that teaches ends it."""
    log = [{"idle_steps": 0}, {"idle_steps": 1}]
    assert rl_log.count_idle_steps(log, np.array([True, True])) == 2
    assert rl_log.count_idle_steps(log, np.array([True, False])) == 0
    assert rl_log.count_idle_steps([], np.array([True])) == 1


def test_what_is_watched_of_a_step(codec: Codec, tmp_path: Path, monkeypatch: Any) -> None:
    """Sampled elsewhere by a tenth of a nat: the gap says so, and rings when it has lasted.

    The better rollout becomes more likely; the spread is that of the rewards.
    """
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    trajectories = sampled(codec, lm, ["Eva", "Ada"])
    for trajectory in trajectories:
        trajectory.logprobs = [value - 0.1 * (value != 0) for value in trajectory.logprobs]
    replay(monkeypatch, trajectories, [[1.0, 0.0]])
    settings = RLSettings(questions=1, rollouts=2, rl_lr=1e-3)
    train_rl.train_grpo(lm, lm.copy(), settings, stage(steps=4))
    log = read_rows(tmp_path / "out/nano/rl1/log.jsonl")
    assert log[0]["sampler_gap"] == pytest.approx(0.1, abs=1e-4)
    assert log[0]["best_change"] > 0
    assert log[0]["reward_spread"] == 0.5
    assert [row["idle_parameters"] for row in log] == [0] * 4
    assert [row["alarms"] for row in log] == [[], [], ["sampler_gap"], ["sampler_gap"]]


@pytest.mark.parametrize(("questions", "rollouts", "count"), [(1, 2, 1), (5, 6, 3), (48, 5, 10)])
def test_a_tenth_of_a_small_step_is_watched(questions: int, rollouts: int, count: int) -> None:
    """Log-probs of ten of thirty rollouts were read three times, for a real model for long."""
    trajectories = [Trajectory() for _ in range(questions * rollouts)]
    batch = RolloutBatch([], trajectories, np.zeros((questions, rollouts)))
    watched = rl_log.watched_rollouts(batch, micro_tokens=1, temperature=1.0)
    assert len(watched.trajectories) == count
    assert len(watched.is_best) == count


def test_an_alarm_is_printed_when_it_begins(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Once, with its stage, however long it rings."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    replay(monkeypatch, sampled(codec, lm, ["Eva", "Ada"]), [[1.0, 0.0]])
    monkeypatch.setattr(train_rl, "alarms", lambda steps, most: {"entropy": "it fell"})
    train_rl.train_grpo(lm, lm.copy(), RLSettings(questions=1, rollouts=2), stage(steps=3))
    assert capsys.readouterr().out.count("rl1: alarm: it fell") == 1


def test_one_rollout_of_a_question_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no other to be compared with: all its advantages are 0."""
    with pytest.raises(UserError, match=r"--rollouts: .*take 2 or more"):
        train_rl.run(RLSettings(rollouts=1))


def test_batches_carry_each_rollout_its_own(codec: Codec, lm: LM) -> None:
    """In its micro-batch, each rollout keeps its log-probs, advantage and reference."""
    trajectories = sampled(codec, lm, ["Eva " * count for count in (9, 1, 5, 3, 7, 2)])
    advantages = [0.5, -0.1, 0.2, -0.3, 0.4, -0.2]
    settings = RLSettings(micro_tokens=70, kl=0.1)
    batches = batches_of(trajectories, advantages, [False] * 6, lm, settings)
    assert len(batches) > 2
    number = 0
    for batch in batches:
        policy_tokens = sum(sum(trajectory.mask) for trajectory in trajectories)
        assert batch["norm"] == batch["kl_norm"] == policy_tokens
        assert batch["beta"] == 0.1
        assert batch["observation_coef"] == 0
        assert "observation_count" not in batch
        for start, end in batch["parts"]:
            trajectory = trajectories[number]
            sampled_at = np.array(trajectory.logprobs)
            assert batch["ids"][start:end].tolist() == trajectory.ids
            assert batch["mask"][start:end].tolist() == trajectory.mask
            assert set(batch["count"][start:end]) == {1}
            assert set(batch["positive"][start:end]) == {np.float32(max(0, advantages[number]))}
            assert set(batch["negative"][start:end]) == {np.float32(min(0, advantages[number]))}
            np.testing.assert_allclose(batch["old"][start:end], sampled_at, atol=1e-5)
            of_policy = sampled_at * trajectory.mask
            np.testing.assert_allclose(batch["ref"][start:end], of_policy, atol=1e-4)
            number += 1
    assert number == 6


def test_a_minibatch_splits_groups_as_rows(codec: Codec, lm: LM) -> None:
    """The rollouts of a question that are in one minibatch are one trie."""
    trajectories = sampled(codec, lm, ["Eva", "Ada", "Eva", "Carl"])
    batch = RolloutBatch([question()] * 2, trajectories, np.zeros((2, 2)))
    advantages = np.array([[0.5, -0.5], [0.3, -0.3]])
    (packed,) = train_rl.update_batches(
        batch, np.array([3, 0, 2]), advantages, np.zeros(2, bool), lm, RLSettings()
    )
    first, second = packed["parts"]
    assert packed["ids"][: first[1]].tolist() == trajectories[0].ids
    # "Eva" and "Carl" stand after one beginning.
    assert second[1] - second[0] == len(trajectories[2].ids) + 3
    assert packed["norm"] == sum(sum(trajectories[row].mask) for row in (0, 2, 3))
    shared = packed["mask"][second[0] : second[1]] * packed["positive"][second[0] : second[1]]
    assert sorted(set(shared.tolist())) == pytest.approx([0.0, 0.3])


# ---- what the real tool said -------------------------------------------------------------------
def observed(codec: Codec, *provenances: Provenance) -> Trajectory:
    """Return a trajectory with an observation of each provenance."""
    parts: list[Any] = []
    for number in range(len(provenances)):
        parts += [("think", "Hm"), ("search", "Silver River"), ("result", f"Eva Moss {number}")]
    trajectory = codec.build("Who directed it?", [*parts, ("answer", "Eva")])
    trajectory.logprobs = [-0.5 * is_learned for is_learned in trajectory.mask]
    for observation, provenance in zip(trajectory.observations, provenances, strict=True):
        observation.provenance = provenance
    return trajectory


def tokens_of_observation(codec: Codec, trajectory: Trajectory, number: int) -> list[int]:
    """Return the positions of an observation, its tags included, found by the tags alone."""
    starts = [i for i, token in enumerate(trajectory.ids) if token == codec.result_id]
    ends = [i for i, token in enumerate(trajectory.ids) if token == codec.end_result_id]
    return list(range(starts[number], ends[number] + 1))


def test_only_what_the_tool_said_is_learned(codec: Codec) -> None:
    """What was imagined, and what a failed search says, is nothing to learn from."""
    trajectory = observed(
        codec,
        Provenance.IMAGINED,
        Provenance.REAL,
        Provenance.FAILED,
        Provenance.REAL,
        Provenance.MISSED,
    )
    expected = np.zeros(len(trajectory.ids))
    expected[tokens_of_observation(codec, trajectory, 1)] = 1
    expected[tokens_of_observation(codec, trajectory, 3)] = 1
    assert real_observation_mask(trajectory) == expected.tolist()


def test_an_observation_that_no_token_shows_is_not_learned(codec: Codec) -> None:
    """The last one did not fit: the mask is of the others, each by its own provenance."""
    trajectory = observed(codec, Provenance.REAL, Provenance.IMAGINED)
    trajectory.queries.append("Iron Hill")
    trajectory.observations.append(Observation("A band."))
    expected = np.zeros(len(trajectory.ids))
    expected[tokens_of_observation(codec, trajectory, 0)] = 1
    assert real_observation_mask(trajectory) == expected.tolist()


def test_skipped_groups_teach_their_observations_alone(codec: Codec, lm: LM) -> None:
    """Their policy tokens carry no loss and are not counted; each normaliser counts its own."""
    trajectories = [
        observed(codec, Provenance.REAL),
        observed(codec, Provenance.IMAGINED, Provenance.REAL),
        observed(codec, Provenance.IMAGINED),
    ]
    settings = RLSettings(observation_coef=0.1, micro_tokens=40)
    batches = batches_of(trajectories, [0.0, 0.2, 0.0], [True, False, True], lm, settings)
    assert len(batches) > 1
    number = 0
    for batch in batches:
        assert batch["norm"] == sum(trajectories[1].mask)
        real = [real_observation_mask(trajectory) for trajectory in trajectories]
        assert batch["observation_norm"] == sum(map(sum, real))
        assert batch["observation_coef"] == 0.1
        for start, end in batch["parts"]:
            trajectory = trajectories[number]
            expected = trajectory.mask if number == 1 else [0] * len(trajectory.ids)
            assert batch["mask"][start:end].tolist() == expected
            assert batch["observation_count"][start:end].tolist() == real[number]
            number += 1
    assert number == 3


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_kl_is_of_all_groups(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl: float
) -> None:
    """Where all groups agree, the penalty still draws the policy back; without it nothing moves.

    Guards: groups skipped "since their gradient is zero", which that of KL is not.
    """
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    reference = tiny_lm(codec, seed=1)
    trajectories = sampled(codec, lm, ["Eva", "Ada"])
    replay(monkeypatch, trajectories, [[1.0, 1.0]])
    settings = RLSettings(questions=1, rollouts=2, kl=kl, rl_lr=1e-3)
    before = drift(lm, reference, trajectories, settings)
    train_rl.train_grpo(lm, reference, settings, stage(steps=4))
    after = drift(lm, reference, trajectories, settings)
    if kl:
        assert after < before - 0.01
    else:
        assert after == before


def test_all_groups_are_learned_from_where_observations_are(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that agrees still makes what the tool said more likely; without the loss it doesn't.

    The answers of that group are as likely as before, but for what observations teach by the way.
    """
    monkeypatch.chdir(tmp_path)
    gains = []
    for observation_coef in (0.0, 1.0):
        lm = tiny_lm(codec)
        trajectories = sampled(codec, lm, ["Eva", "Ada"])
        observation = pack_texts(trajectories[:1])
        observation["mask"] = np.array(
            [float(role == Role.OBSERVATION) for role in trajectories[0].role], np.float32
        )
        before = torch_backend.score(lm.network, observation).sum()
        replay(monkeypatch, trajectories, [[1.0, 1.0]])
        updates = record_updates(monkeypatch)
        settings = RLSettings(
            questions=1, rollouts=2, observation_coef=observation_coef, rl_lr=1e-3
        )
        train_rl.train_grpo(lm, lm.copy(), settings, stage(steps=4))
        gains.append(torch_backend.score(lm.network, observation).sum() - before)
        assert len(updates) == (4 if observation_coef else 0)
    assert gains[0] == 0
    assert gains[1] > 0.1


def test_without_the_coefficient_a_step_is_the_plain_policy_gradient(codec: Codec) -> None:
    """Byte for byte the weights of a loss that knows of no observations and of no KL."""
    lm = tiny_lm(codec, noise=0.1)
    plain = lm.copy()
    trajectories = sampled(codec, lm, ["Eva", "Ada", "Eva Moss", "Carl Hart"])
    batches = batches_of(trajectories, [0.5, -0.5, 1.0, -1.0], [False] * 4, lm, RLSettings())

    def plain_loss(xp: Any, logp: Any, batch: Any) -> Any:
        ratio = xp.exp((logp - batch["old"]) * batch["mask"])
        raised = xp.clip(ratio, None, 1 + batch["clip_high"])
        lowered = xp.clip(ratio, 1 - batch["clip_low"], None)
        gain = batch["positive"] * raised + batch["negative"] * lowered
        return -(gain * batch["mask"]).sum() / batch["norm"]

    trie = {"ids", "depth", "parent", "end", "parts", "is_text", "mask", "old"}
    plain_keys = trie | {"positive", "negative", "clip_low", "clip_high", "norm"}
    plain_batches = [{key: batch[key] for key in plain_keys} for batch in batches]
    for one, loss, its_batches in (
        (lm, grpo_loss, batches),
        (plain, plain_loss, plain_batches),
    ):
        optimizer = torch_backend.Optimizer(one.network)
        for _ in range(3):
            torch_backend.train_step(one.network, optimizer, loss, its_batches, 1e-3, 1e-3)
    expected = dict(plain.network.named_parameters())
    for name, weight in lm.network.named_parameters():
        assert (weight == expected[name]).all(), name


# ---- over a checkpoint, and after an alarm ------------------------------------------------------
@pytest.fixture(scope="module")
def searching_policy(codec: Codec) -> LM:
    """Return a tiny network that has learned a little to search and to answer."""
    lm = tiny_lm(codec)
    chain = codec.build("Who directed it?", [*PARTS, ("answer", "Eva")])
    optimizer = torch_backend.Optimizer(lm.network)
    for _ in range(25):
        batches = language_batches([chain], 1000)
        torch_backend.train_step(lm.network, optimizer, nll_loss, batches, 3e-3, 1e-2)
    return lm


def train_mixed(
    policy: LM, name: str, budget: int, steps_kept: int = 0, steps: int = 4
) -> list[Any]:
    """Train some steps of a mixed stage, and return its log.

    steps_kept: stop after these steps and one more, and go on from the checkpoint; 0: in one go.
    """
    settings = RLSettings(questions=2, rollouts=4, max_len=90, resume=True, rl_lr=1e-3)

    def train() -> None:
        mixed = stage(name, steps=steps)
        tools = Library({"search": find_nothing})
        world: Any = imagine
        mixed.environment = scheduled_environment(tools, world, 0.4, 4, budget)
        train_rl.train_grpo(policy.copy(), policy, settings, mixed)

    def stop(checkpoint: Any, steps: int) -> None:
        if steps > steps_kept:
            raise KeyboardInterrupt
        checkpoint.save(steps)

    if steps_kept:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs.Checkpoint, "save_if_due", stop)
            train()
        assert Path("out", "nano", f"{name}.checkpoint", str(steps_kept)).is_dir()
    train()
    return read_rows(Path("out", "nano", name, "log.jsonl"))


def test_a_budget_holds_over_a_checkpoint(
    searching_policy: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixed stage that is stopped and resumed is the whole one: weights, calls and counts.

    The budget is spent after the interruption, in both. Guards: a budget that begins anew with
    --resume, and calls of the step that is made again, counted twice.
    """
    monkeypatch.chdir(tmp_path)
    calls_of_free_stage = [
        row["real_calls"] for row in train_mixed(searching_policy, "free", budget=0)
    ]
    assert 0 < calls_of_free_stage[0] < calls_of_free_stage[1] < calls_of_free_stage[2]
    budget = calls_of_free_stage[1] + 1
    logs = [
        train_mixed(searching_policy, "whole", budget),
        train_mixed(searching_policy, "resumed", budget, steps_kept=2),
    ]
    counts = [[(row["real_calls"], row["distinct_calls"]) for row in log] for log in logs]
    assert counts[0] == counts[1]
    first = calls_of_free_stage[0]
    assert [real for real, _ in counts[0]] == [first, budget - 1, budget, budget]
    for file in ("model.safetensors", "calls.jsonl", "rollouts.jsonl"):
        whole, resumed = (tmp_path / "out/nano" / name / file for name in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes(), file
    calls = read_rows(tmp_path / "out/nano/resumed/calls.jsonl")
    assert sum(call["raw_calls"] for call in calls) == budget


@pytest.mark.slow
def test_memory_of_a_thousand_steps(
    searching_policy: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays as it is after the first steps, but for the log's lines and noise.

    Guards: a cache, a graph or a memo that grows with each step.
    """
    monkeypatch.chdir(tmp_path)
    sizes = []
    save_if_due = runs.Checkpoint.save_if_due

    def measured(checkpoint: Any, steps: int) -> None:
        save_if_due(checkpoint, steps)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    monkeypatch.setattr(runs.Checkpoint, "save_if_due", measured)
    train_mixed(searching_policy, "long", budget=0, steps=1000)
    assert len(sizes) == 1000
    # Medians of a hundred steps, in MiB.
    assert np.median(sizes[900:]) - np.median(sizes[100:200]) < 8


def test_a_stage_of_two_processes_is_that_of_one(
    searching_policy: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rollouts, calls and figures; and a budget is spent, but never exceeded.

    Guards: a process with a memory, a count or a budget of its own.
    """
    monkeypatch.chdir(tmp_path)
    alone = train_mixed(searching_policy, "alone", budget=0, steps=2)
    budget = alone[0]["real_calls"] + 1

    def work() -> Any:
        train_mixed(searching_policy, "together", budget=0, steps=2)
        return train_mixed(searching_policy, "bounded", budget, steps=2)

    bounded, _ = in_processes(work)
    assert bounded[-1]["real_calls"] == budget
    together = read_rows(Path("out", "nano", "together", "log.jsonl"))
    for row, expected in zip(together, alone, strict=True):
        for name, value in expected.items():
            if "second" not in name:
                assert row[name] == pytest.approx(value, abs=1e-5), name
    rollouts = [Path("out", "nano", name, "rollouts.jsonl") for name in ("alone", "together")]
    assert rollouts[0].read_bytes() == rollouts[1].read_bytes()


def rig_alarm(codec: Codec, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step learn from two rollouts that are written here, and an alarm ring at step 2.

    By the held-out reward, which is looked at in each step, the weights after one step are best.
    """
    replay(monkeypatch, sampled(codec, lm, ["Eva", "Ada"]), [[1.0, 0.0]])
    validation_rewards = [0.1, 0.5, 0.3]
    steps_looked_at = []
    begin_validation = Environment.begin_validation

    def begin(environment: Environment, step: int) -> None:
        steps_looked_at.append(step)
        begin_validation(environment, step)

    def rewards_of(*arguments: Any) -> Any:
        return np.array([validation_rewards[steps_looked_at[-1]]])

    def alarms(steps: Any, max_actions: int) -> dict[str, str]:
        return {"entropy": "entropy fell"} if len(steps) > 2 else {}

    monkeypatch.setattr(Environment, "begin_validation", begin)
    monkeypatch.setattr(train_rl, "rewards_of", rewards_of)
    monkeypatch.setattr(train_rl, "alarms", alarms)
    monkeypatch.setattr(train_rl, "VALIDATE_EVERY", 1)


def train_real(policy: LM, name: str, steps: int = 3, stop_on_alarm: bool = False) -> list[Any]:
    """Train a stage whose tool may answer two searches, and return its log."""
    settings = RLSettings(questions=1, rollouts=2, max_len=90, rl_lr=1e-3, resume=True)
    settings.stop_on_alarm = stop_on_alarm
    real = stage(name, steps)
    world: Any = imagine
    tools = Library({"search": find_nothing})
    real.environment = scheduled_environment(tools, world, 1.0, steps=1, max_real_calls=2)
    is_stopped = train_rl.train_grpo(policy.copy(), policy, settings, real)
    assert is_stopped == stop_on_alarm
    return read_rows(Path("out", "nano", name, "log.jsonl"))


def test_an_alarm_ends_a_stage_with_the_best_weights(
    codec: Codec, searching_policy: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """They are those of a stage of one step; without the flag the same alarm ends nothing.

    So it is over a kill after the alarm, when steps are made again whose weights were kept. The
    searches on validation questions are counted, and keep to the budget.
    """
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "out" / "nano"
    rig_alarm(codec, searching_policy, monkeypatch)
    train_real(searching_policy, "one_step", steps=1)
    free = train_real(searching_policy, "free", steps=4)
    assert [row["alarms"] for row in free] == [[], [], ["entropy"], ["entropy"]]
    assert not any("validation_reward" in row for row in free)
    assert free[-1]["real_calls"] == 0
    assert "stopped" not in capsys.readouterr().out

    whole = train_real(searching_policy, "whole", steps=4, stop_on_alarm=True)
    line = (
        "whole: stopped by an alarm at step 2 (entropy fell); it ends with the weights after "
        "1 steps, whose held-out reward of 0.500 was the best"
    )
    assert line in capsys.readouterr().out.splitlines()
    assert [row["validation_reward"] for row in whole] == [0.1, 0.5, 0.3]
    assert [row["real_calls"] for row in whole] == [1, 2, 2]
    assert [row["loss"] for row in whole] == [row["loss"] for row in free[:3]]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Checkpoint, "save_if_due", save_after_first_step)
        patch.setattr(runs.Checkpoint, "finish", stop_here)
        train_real(searching_policy, "resumed", steps=4, stop_on_alarm=True)
    assert (root / "resumed.checkpoint" / "best" / "1").is_dir()
    train_real(searching_policy, "resumed", steps=4, stop_on_alarm=True)
    for file in ("model.safetensors", "calls.jsonl", "rollouts.jsonl"):
        content = (root / "whole" / file).read_bytes()
        assert (root / "resumed" / file).read_bytes() == content, file
    weights = {
        name: (root / name / "model.safetensors").read_bytes()
        for name in ("one_step", "whole", "free")
    }
    assert weights["whole"] == weights["one_step"]
    assert weights["whole"] != weights["free"]


def save_after_first_step(checkpoint: Any, steps: int) -> None:
    """Stand for Checkpoint.save_if_due where the first step alone took half a minute."""
    if steps == 1:
        checkpoint.save(steps)


def stop_here(checkpoint: Any) -> None:
    """Stand for Checkpoint.finish, and a kill before it."""
    raise KeyboardInterrupt


def test_no_stage_is_begun_after_an_alarm(
    trained_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The command ends well, and says how to go on."""
    recorded = RecordedRun(monkeypatch)
    recorded.is_stopped = True
    monkeypatch.setattr(sys, "orig_argv", ["python", "train_rl.py", "--stop_on_alarm"])
    train_rl.run(RLSettings())
    assert [stage.folder.name for stage in recorded.stages] == ["rl1"]
    line = "rl2 was not begun; go on with: python train_rl.py --stop_on_alarm --resume"
    assert line in capsys.readouterr().out.splitlines()


def test_validation_questions_are_asked_by_no_step() -> None:
    """They stand after the pool's questions; one whose words a step asks too is left out."""
    texts = ["A?", "B?", "C?", "B?", "D?", "E?"]
    pool = [question(text) for text in texts]
    asked = []

    def questions(name: str, count: int) -> Any:
        asked.append(name)
        return pool[:count]

    task: Any = types.SimpleNamespace(questions=questions)
    settings = RLSettings(questions=2, rollouts=3, rl_questions=3, rl1_pool="rl1")
    assert train_rl.validation_questions(task, "rl1", settings) == []
    assert asked == []
    settings.stop_on_alarm = True
    assert train_rl.validation_questions(task, "rl1", settings) == pool[4:]
    assert train_rl.validation_questions(task, "rl2", settings) == pool[4:]
    assert asked == ["rl1", "rl2"]
    settings.rl_questions = 4
    with pytest.raises(UserError, match=r"--stop_on_alarm: pool 'rl2'.*take --rl_questions=3"):
        train_rl.validation_questions(task, "rl2", settings)


@pytest.mark.parametrize(("minibatches", "sizes"), [(1, [7]), (3, [3, 2, 2]), (9, [1] * 7)])
def test_minibatches_hold_each_row_once(minibatches: int, sizes: Any) -> None:
    """As many as there are rows at most; every row is in one of them."""
    rows = np.arange(10, 17)
    parts = train_rl.split_minibatches(rows, minibatches, np.random.default_rng(0))
    assert [len(part) for part in parts] == sizes
    assert sorted(np.concatenate(parts)) == list(rows)


def test_no_rows_are_no_minibatch() -> None:
    """Where all groups agree there is no optimizer step."""
    assert train_rl.split_minibatches(np.array([]), 2, np.random.default_rng(0)) == []


def drift(lm: LM, reference: LM, trajectories: list[Trajectory], settings: RLSettings) -> float:
    policy, other = (
        rl_log.policy_logprobs(one, trajectories, settings.micro_tokens, settings.temperature)
        for one in (lm, reference)
    )
    return rl_log.mean_kl(policy, other)


def logprob(lm: LM, trajectory: Trajectory) -> Any:
    return torch_backend.score(lm.network, pack_texts([trajectory])).sum()


def test_grpo_learns_the_right_way(codec: Codec) -> None:
    """The rewarded answer becomes more likely, the other less; KL to the start grows from 0."""
    lm = tiny_lm(codec)
    good, bad = sampled(codec, lm, ["Eva Moss", "Ada Falk"])
    start = lm.copy()
    good_before = logprob(lm, good)
    bad_before = logprob(lm, bad)
    settings = RLSettings()
    assert drift(lm, start, [good, bad], settings) == pytest.approx(0, abs=1e-6)
    optimizer = torch_backend.Optimizer(lm.network)
    batches = batches_of([good, bad], [0.5, -0.5], [False] * 2, start, settings)
    for _ in range(5):
        torch_backend.train_step(lm.network, optimizer, grpo_loss, batches, 1e-3, 2e-3)
    assert logprob(lm, good) > good_before + 0.1
    assert logprob(lm, bad) < bad_before - 0.1
    assert drift(lm, start, [good, bad], settings) > 1e-4


def test_contrastive_learns_the_right_way(codec: Codec) -> None:
    """SFT-1 on one pair: the gap grows, and the chosen side does not fall with the rejected.

    What SFT-1 prints of pairs is a mean over them of the mean over the tokens of a side.
    """
    lm = tiny_lm(codec)
    prefix = [("think", "director of it?")]
    chosen, rejected = codec.build_pair(
        "Who?", prefix, [("search", "it")], [("think", "I recall Ada Falk.")]
    )
    chosen_before = logprob(lm, chosen)
    gap_before = chosen_before - logprob(lm, rejected)
    a_token = [logprob(lm, side) / sum(side.mask) for side in (chosen, rejected)]
    printed = f"chosen {a_token[0]:.3f}, rejected {a_token[1]:.3f}"
    assert train_sft.describe_pairs(lm, [(chosen, rejected)] * 3, micro_tokens=1) == printed
    optimizer = torch_backend.Optimizer(lm.network)
    batches = pair_batches([(chosen, rejected)], 1000, 0.2)
    for _ in range(5):
        torch_backend.train_step(lm.network, optimizer, contrastive_loss, batches, 1e-3, 2e-3)
    assert logprob(lm, chosen) > chosen_before + 0.1
    assert logprob(lm, chosen) - logprob(lm, rejected) > gap_before + 0.5
