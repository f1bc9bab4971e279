"""A grid of settings: what it trains, what it refuses, and the table of what came of it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common import runs
from common.errors import UserError
from evaluation import sweep as sweeps
from evaluation.statistics import SetPredictions
from evaluation.sweep import sweep
from train_rl import RLSettings


def settings_of(**given: Any) -> RLSettings:
    """Return what a command line with --run=nano and these settings gives."""
    settings = RLSettings(**given)
    settings.given = {"run": "nano", **given}
    return settings


class Trained:
    """Stands for training and evaluation: it keeps what it was asked for and leaves folders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[str] = []
        self.right: dict[str, Sequence[float]] = {}  # folder -> EM of its answers
        self.refused = ""  # a folder whose training fails
        monkeypatch.setattr(sweeps.train_sft, "run", self.train_sft)
        monkeypatch.setattr(sweeps, "evaluate", self.evaluate)

    def train_sft(self, settings: Any) -> None:
        self.commands.append(f"sft {settings.run} seed={settings.seed} alpha={settings.alpha}")

    def train_rl(self, settings: Any) -> None:
        assert settings.resume
        assert not settings.sweep
        folder = settings.out or settings.stage or "rl2"
        self.commands.append(f"rl {settings.run} {settings.stage} {settings.start} {folder}")
        if folder == self.refused:
            raise UserError("loss is nan; lower --rl_lr")
        runs.settle_by_device(settings)
        runs.record_stage(settings, folder)
        Path("out", settings.run, folder).mkdir(parents=True, exist_ok=True)
        (Path("out", settings.run, folder, "config.json")).write_text("{}")

    def evaluate(self, combination: Any) -> SetPredictions:
        em = self.right.get(str(combination.folder), [1.0, 0.0])
        row = {"f1": 0.5, "cover": 0, "overlap": 0, "malformed": 0, "forced": 0, "actions": 2}
        answers: Any = [
            {"id": str(number), "question": "Who?", "em": value, **row}
            for number, value in enumerate(em)
        ]
        return {"single": answers}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    monkeypatch.chdir(tmp_path)
    return Trained(monkeypatch)


def test_a_grid_of_rl_settings(trained: Trained) -> None:
    """Each combination has a folder; without --stage it trains RL-1, then RL-2 from there.

    The same command goes on with it. Guards: --dtype=auto, refused as another than what it became.
    """
    sweep("kl=0,0.1;rollouts=3", settings_of(stage="rl2", start="sft2"), trained.train_rl)
    sweep("clip-high=0.2", settings_of(), trained.train_rl)
    assert trained.commands == [
        "rl nano rl2 sft2 rl2_from_sft2_kl=0_rollouts=3",
        "rl nano rl2 sft2 rl2_from_sft2_kl=0.1_rollouts=3",
        "rl nano rl1  rl1_clip_high=0.2",
        "rl nano rl2 rl1_clip_high=0.2 rl2_clip_high=0.2",
    ]
    record = runs.read_run_record("nano").stages["rl2_from_sft2_kl=0.1_rollouts=3"]
    assert (record.settings["kl"], record.settings["rollouts"]) == (0.1, 3)
    assert record.given["kl"] == 0.1
    sweep("clip-high=0.2", settings_of(), trained.train_rl)
    assert trained.commands[4:] == trained.commands[2:4]


def test_a_grid_over_seeds_trains_whole_runs(trained: Trained, capsys: Any) -> None:
    """So do settings of SFT. A row of the table pools the seeds; the others are paired with it."""
    trained.right = {
        "out/nano_seed=1_alpha=0/rl2_kl=0": [1.0, 0.0, 0.0, 0.0],
        "out/nano_seed=2_alpha=0/rl2_kl=0": [1.0, 1.0, 0.0, 0.0],
        "out/nano_seed=1_alpha=0/rl2_kl=1": [1.0, 1.0, 1.0, 1.0],
        "out/nano_seed=2_alpha=0/rl2_kl=1": [1.0, 1.0, 1.0, 1.0],
    }
    sweep("seed=1,2;alpha=0;kl=0,1", settings_of(), trained.train_rl)
    assert trained.commands[:3] == [
        "sft nano_seed=1_alpha=0 seed=1 alpha=0.0",
        "rl nano_seed=1_alpha=0 rl1  rl1_kl=0",
        "rl nano_seed=1_alpha=0 rl2 rl1_kl=0 rl2_kl=0",
    ]
    table = Path("out/nano/sweep_seed=1,2_alpha=0_kl=0,1.md").read_text()
    assert table.strip() in capsys.readouterr().out
    first, second = table.splitlines()[2:4]
    assert first.startswith("| 0 | 0 | 37.5 (")
    assert first.endswith("|  | 50.0 | 2.00 | 0.0% | 1: 25.0, 2: 50.0 |")
    assert second.startswith("| 0 | 1 | 100.0 (100.0 to 100.0) | +62.5 (")
    # Without another setting of RL the stages have their own names.
    trained.commands.clear()
    sweep("seed=3", settings_of(), trained.train_rl)
    assert trained.commands == ["sft nano_seed=3 seed=3 alpha=0.2", "rl nano_seed=3   rl2"]


def test_where_a_stage_begins_makes_it_another(trained: Trained) -> None:
    """Guards: rows of a policy from SFT-2, in the table of one from SFT-3."""
    sweep("seed=1", settings_of(stage="rl2", start="sft2"), trained.train_rl)
    with pytest.raises(UserError, match="rl2 was trained with --start=sft2, not sft3"):
        sweep("seed=1", settings_of(stage="rl2", start="sft3"), trained.train_rl)
    sweep("kl=1", settings_of(stage="rl2", start="sft2"), trained.train_rl)
    sweep("kl=1", settings_of(stage="rl2", start="sft3"), trained.train_rl)
    assert len(list(Path("out/nano").glob("sweep_rl2_from_sft?_kl=1.md"))) == 2
    # Guards: a slash in the name of a folder.
    sweep("kl=2", settings_of(stage="rl2", start="sft2/"), trained.train_rl)
    assert trained.commands[-1].endswith(" rl2_from_sft2_kl=2")


def test_a_finished_sweep_on_more_questions(trained: Trained) -> None:
    """What a stage is looked at with does not make it another one."""
    sweep("kl=1", settings_of(stage="rl2"), trained.train_rl)
    sweep("kl=1", settings_of(stage="rl2", eval_questions=9, eval_every=4), trained.train_rl)
    assert len(trained.commands) == 2


def test_one_that_fails_does_not_keep_the_others(trained: Trained, capsys: Any) -> None:
    """It is said, and at the end once more; the table has the others."""
    trained.refused = "rl2_rl_lr=1e9"
    with pytest.raises(UserError, match="out/nano/rl2_rl_lr=1e9: not trained"):
        sweep("rl_lr=1e9,1e-3", settings_of(stage="rl2"), trained.train_rl)
    assert len(trained.commands) == 2
    assert "rl2_rl_lr=1e9: loss is nan; lower --rl_lr" in capsys.readouterr().out
    assert "| 1e-3 | 50.0 (" in Path("out/nano/sweep_rl2_rl_lr=1e9,1e-3.md").read_text()


@pytest.mark.parametrize(
    ("grid", "given", "message"),
    [
        ("clip_hihg=0.2", {}, "unknown setting 'clip_hihg'; did you mean 'clip_high'"),
        ("kl=0;loss=dapo,ppo", {}, "--loss: 'ppo' is not one of dapo"),
        ("kl=0,zero", {}, "--kl: 'zero' is not a number"),
        ("kl=0,0.0", {}, "'kl=0,0.0' has a value twice"),
        ("kl", {}, "'kl' is not one setting with its values"),
        ("kl=0;kl=1", {}, "'kl=1' is not one setting with its values"),
        ("run=a,b", {}, "'run' is no setting that training depends on"),
        ("judge=a,b", {}, "'judge' is no setting that training depends on"),
        ("seed=" + ",".join(map(str, range(99))), {}, "letters would name its table"),
        ("seed=1", {"stage": "rl2"}, "--stage=rl2: seed makes a new run, which has no rl1"),
        ("kl=0,1", {"stage": "rl2", "out": "x"}, "has no --out or --dry_run"),
        ("kl=0,1", {"stop_on_alarm": True}, "--stop_on_alarm: a stage that it ends has none"),
        ("kl=0,1", {"stage": "rl2", "rl2_steps": 7}, "with --rl2_steps=16, not 7; repeat that"),
    ],
)
def test_grids_that_are_refused(
    trained: Trained, grid: str, given: dict[str, Any], message: str
) -> None:
    """In one line, before anything is trained.

    Guards: the last, folders of an earlier sweep with other settings, taken as this one's.
    """
    earlier = settings_of(stage="rl2", out="rl2_kl=1", kl=1.0, resume=True)
    trained.train_rl(earlier)
    assert asdict(earlier)["rl2_steps"] == 16
    trained.commands.clear()
    with pytest.raises(UserError) as error:
        sweep(grid, settings_of(**given), trained.train_rl)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert trained.commands == []
