"""GRPO's step (train_rl.py): what it learns from, with which numbers, and which way it goes."""

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_lm

import backends.torch as torch_backend
import model
import train_rl
from autocoa import IMAGINE, contrastive_loss, grpo_loss
from common import memory
from common.errors import UserError
from data.batches import pad, pair_batches
from data.questions import Question
from data.trajectory import Codec, Observation, Provenance, Trajectory
from model import LM
from tools import Library
from train_rl import RLSettings, RLStage, RolloutBatch

PARTS = [("think", "Hm"), ("search", "Silver River"), ("result", "It was directed by Eva Moss.")]


def question(text: str = "Who directed it?", golden: str = "Eva") -> Any:
    return Question("1", text, [golden])


def sampled(codec: Codec, lm: LM, answers: Any) -> Any:
    """Return trajectories as if they had been sampled from this network at temperature 1."""
    trajectories = []
    for answer in answers:
        trajectory = codec.build("Who directed it?", [*PARTS, ("answer", answer)])
        trajectory.logprobs = torch_backend.score(lm.network, pad([trajectory]))[0].tolist()
        trajectories.append(trajectory)
    return trajectories


def stage(name: str = "rl1", steps: int = 1, number: int = 1) -> Any:
    """Return a stage of the run nano whose pool is one question."""
    return RLStage(
        folder=Path("out", "nano", name),
        steps=steps,
        pool=[question()],
        search=IMAGINE,
        call_cost=0.0,
        rate_scale=1.0,
        seed_number=number,
    )


def replay(monkeypatch: pytest.MonkeyPatch, trajectories: Any, rewards: Any) -> None:
    """Let every step sample these trajectories."""
    batch = RolloutBatch([question()] * len(rewards), trajectories, np.array(rewards))
    monkeypatch.setattr(train_rl, "sample_rollouts", lambda *arguments: batch)


def record_updates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a list that fills with the (trajectories, advantages) of each optimizer step."""
    updates = []
    update_batches = train_rl.update_batches

    def recorded(trajectories: Any, advantages: Any, reference: Any, settings: Any) -> Any:
        updates.append((trajectories, advantages))
        return update_batches(trajectories, advantages, reference, settings)

    monkeypatch.setattr(train_rl, "update_batches", recorded)
    return updates


def test_rewards_and_order_of_a_step(codec: Codec, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts of a question stand together; each is scored by its own question's answers."""
    asked = []

    def answer_questions(
        policy: Any, texts: Any, search: Any, settings: Any, temperature: Any, rng: Any
    ) -> list[Any]:
        asked.extend(texts)
        answers = ("Eva", "Ada", "Eva", "Ada", "Ada", "Eva")
        return [
            codec.build(text, [("answer", answer)])
            for text, answer in zip(texts, answers, strict=True)
        ]

    monkeypatch.setattr(train_rl, "answer_questions", answer_questions)
    two = stage()
    two.pool = [question(), question("Who starred in it?", "Ada")]
    settings = RLSettings(questions=2, rollouts=3)
    batch = train_rl.sample_rollouts(lm, settings, two, 0, np.random.default_rng(0))
    assert asked == ["Who directed it?"] * 3 + ["Who starred in it?"] * 3
    assert batch.rewards.tolist() == [[1, 0, 1], [1, 1, 0]]


def test_steps_take_questions_in_turn(
    codec: Codec, lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step goes on where the one before it ended, and begins again at the end of the pool."""
    asked = []

    def answer_questions(
        policy: Any, texts: Any, search: Any, settings: Any, temperature: Any, rng: Any
    ) -> list[Any]:
        asked.append(list(texts))
        return [codec.build(text, [("answer", "Eva")]) for text in texts]

    monkeypatch.setattr(train_rl, "answer_questions", answer_questions)
    three = stage()
    three.pool = [question(text) for text in ("A?", "B?", "C?")]
    for step in range(2):
        train_rl.sample_rollouts(
            lm, RLSettings(questions=2, rollouts=1), three, step, np.random.default_rng(0)
        )
    assert asked == [["A?", "B?"], ["C?", "A?"]]


class RecordedRun:
    """Stands for all that train_rl.run calls, and keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []  # of the reference, in order
        self.loaded: list[str] = []  # folders that weights were read from
        self.stages: list[RLStage] = []
        self.tool = Library({})
        self.policy = types.SimpleNamespace(resume=lambda folder: self.load(folder, None))
        self.reference = types.SimpleNamespace(
            begin_stage=lambda *arguments: self.events.append("adapter"), copy=self.copy
        )
        monkeypatch.setattr(train_rl, "open_task", lambda settings: self)
        monkeypatch.setattr(model, "load", self.load)
        monkeypatch.setattr(train_rl, "train_grpo", self.train_grpo)
        monkeypatch.setattr(memory, "report", lambda *arguments: True)

    @property
    def rl_search(self) -> Library:
        return self.tool

    def questions(self, pool: str, count: int) -> Any:
        return pool, count

    def load(self, folder: Path, settings: Any) -> Any:
        self.loaded.append(folder.name)
        return self.reference

    def copy(self) -> Any:
        self.events.append("copy")
        return self.policy

    def train_grpo(self, policy: Any, reference: Any, settings: Any, stage: RLStage) -> None:
        assert (policy, reference) == (self.policy, self.reference)
        self.stages.append(stage)


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
def test_the_two_environments(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given: dict[str, Any],
    stages: list[str],
    loaded: list[str],
) -> None:
    """RL-1 imagines, RL-2 has the tool; each has questions of its own.

    The adapter is made before the reference is copied (guards: a second base in memory). The
    reference is what the command begins with; --resume after RL-1 goes on from RL-1 with the same
    reference.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("sft2", "sft3", "rl1"):
        (tmp_path / "out/nano" / name).mkdir(parents=True)
        (tmp_path / "out/nano" / name / "config.json").write_text("{}")
    if given == {"start": "sft2"}:
        (tmp_path / "out/nano/rl1/config.json").unlink()
    recorded = RecordedRun(monkeypatch)
    settings = RLSettings(rl1_steps=3, rl2_steps=2, questions=4, rl_questions=10, **given)
    train_rl.run(settings)

    assert [stage.folder.name for stage in recorded.stages] == stages
    assert recorded.events == ["adapter", "copy"]
    assert recorded.loaded == loaded
    for stage in recorded.stages:
        if stage.folder.name == "rl1":
            assert (stage.steps, stage.search, stage.call_cost) == (3, IMAGINE, 0.0)
            assert stage.pool == ("rl1", 10)
            assert stage.rate_scale == settings.rl1_scale
        else:
            assert (stage.steps, stage.search) == (2, recorded.tool)
            assert stage.call_cost == settings.call_cost
            assert stage.pool == ("rl2", 10)
            assert stage.rate_scale == 1.0


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


@pytest.mark.parametrize("provenance", [Provenance.FAILED, Provenance.MISSED])
def test_a_group_with_a_lost_search_is_skipped(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provenance: Any
) -> None:
    """What is rewarded behind a search that failed says nothing of the policy."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm(codec)
    trajectories = sampled(codec, lm, ["Eva", "Ada", "Eva", "Ada"])
    trajectories[0].observations[0] = Observation("The search failed.", provenance)
    replay(monkeypatch, trajectories, [[1.0, 0.0], [1.0, 0.0]])
    updates = record_updates(monkeypatch)
    settings = RLSettings(questions=2, rollouts=2)
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


def test_batches_carry_each_row_its_own(codec: Codec, lm: LM) -> None:
    """Sorted into micro-batches, each row keeps its log-probs, advantage and reference."""
    trajectories = sampled(codec, lm, ["Eva " * count for count in (9, 1, 5, 3, 7, 2)])
    advantages = np.arange(6) / 10
    settings = RLSettings(micro_tokens=70, kl=0.1)
    batches = train_rl.update_batches(trajectories, advantages, lm, settings)
    assert len(batches) > 2
    rows = 0
    for batch in batches:
        assert batch["norm"] == sum(sum(trajectory.mask) for trajectory in trajectories)
        assert batch["beta"] == 0.1
        for row in range(len(batch["ids"])):
            trajectory = trajectories[round(10 * batch["advantage"][row, 0])]
            length = len(trajectory.ids)
            assert batch["ids"][row, :length].tolist() == trajectory.ids
            assert batch["mask"][row, :length].tolist() == trajectory.mask
            assert not batch["mask"][row, length:].any()
            sampled_at = np.array(trajectory.logprobs)
            np.testing.assert_allclose(batch["old"][row, :length], sampled_at, atol=1e-5)
            of_policy = sampled_at * trajectory.mask
            np.testing.assert_allclose(batch["ref"][row, :length], of_policy, atol=1e-4)
            rows += 1
    assert rows == 6


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


def logprob(lm: LM, trajectory: Trajectory) -> Any:
    return torch_backend.score(lm.network, pad([trajectory]))[0].sum()


def test_grpo_learns_the_right_way(codec: Codec) -> None:
    """The rewarded answer becomes more likely, the other less; KL to the start grows from 0."""
    lm = tiny_lm(codec)
    good, bad = sampled(codec, lm, ["Eva Moss", "Ada Falk"])
    start = lm.copy()
    good_before = logprob(lm, good)
    bad_before = logprob(lm, bad)
    settings = RLSettings()
    assert train_rl.drift(lm, start, [good, bad], settings) == pytest.approx(0, abs=1e-6)
    optimizer = torch_backend.Optimizer(lm.network)
    batches = train_rl.update_batches([good, bad], np.array([0.5, -0.5]), start, settings)
    for _ in range(5):
        torch_backend.train_step(lm.network, optimizer, grpo_loss, batches, 1e-3, 2e-3)
    assert logprob(lm, good) > good_before + 0.1
    assert logprob(lm, bad) < bad_before - 0.1
    assert train_rl.drift(lm, start, [good, bad], settings) > 1e-4


def test_contrastive_learns_the_right_way(codec: Codec) -> None:
    """SFT-1 on one pair: the gap grows, and the chosen side does not fall with the rejected."""
    lm = tiny_lm(codec)
    prefix = [("think", "director of it?")]
    chosen, rejected = codec.build_pair(
        "Who?", prefix, [("search", "it")], [("think", "I recall Ada Falk.")]
    )
    chosen_before = logprob(lm, chosen)
    gap_before = chosen_before - logprob(lm, rejected)
    optimizer = torch_backend.Optimizer(lm.network)
    batches = pair_batches([(chosen, rejected)], 1000, 0.2)
    for _ in range(5):
        torch_backend.train_step(lm.network, optimizer, contrastive_loss, batches, 1e-3, 2e-3)
    assert logprob(lm, chosen) > chosen_before + 0.1
    assert logprob(lm, chosen) - logprob(lm, rejected) > gap_before + 0.5
