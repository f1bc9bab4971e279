"""Run folders: which stages are left, logs, checkpoints, and what settings.json remembers."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import read_rows, tiny_lm

import backends.torch as torch_backend
import model
from common import runs
from common.errors import UserError
from common.progress import tqdm
from common.run_record import StageRecord, read_run_record
from common.runs import StageRun
from common.settings import ModelSettings, StageSettings
from common.stage_files import Checkpoint
from data.trajectory import Codec
from train_sft import SFTSettings


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return out/nano of an empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out" / "nano"


def save_at(folder: Path, time: Any) -> None:
    """Leave what a saved network is known by, with a time of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (time, time))


def names(root: Path, pattern: Any) -> list[Any]:
    return [path.name for path in root.glob(pattern)]


# ---- which stages to train -----------------------------------------------------------------------
def test_resume_keeps_one_run_together(root: Path) -> None:
    """What is complete and in order is kept.

    A stage older than the one before it, or one that was begun again, belongs to another run; so
    does a checkpoint, once all is trained anew without --resume, or where it is older than what
    its stage is made from. Guards: `--stage=sft1`, made anew, then --resume went on with an SFT-2
    on the old one.
    """
    sft_stages = list(runs.SFT_STAGES)
    resumed = StageSettings(resume=True)
    for time, stage in enumerate(sft_stages, 1):
        save_at(root / stage, time)
    assert runs.stages_to_do(resumed, sft_stages, "") == []
    assert runs.stages_to_do(resumed, ["rl1", "rl2"], "sft3") == ["rl1", "rl2"]

    save_at(root / "sft1", 9)
    assert runs.stages_to_do(resumed, sft_stages, "") == ["sft2", "sft3"]

    (root / "sft1.partial").mkdir()
    (root / "sft2.checkpoint").mkdir()
    assert runs.stages_to_do(resumed, sft_stages, "") == ["sft1", "sft2", "sft3"]
    assert (root / "sft2.checkpoint").is_dir()
    # What it starts from is not there: that is said later, by name.
    assert runs.stages_to_do(resumed, ["sft2"], "none") == ["sft2"]
    assert runs.stages_to_do(StageSettings(), sft_stages, "") == sft_stages
    assert (root / "sft2.checkpoint").is_dir()


@pytest.mark.parametrize(
    ("checkpoint", "time", "left"),
    [
        ("sft2.checkpoint/7", 8, []),  # older than the sft1 that it is made from
        ("sft2.checkpoint/7", 10, ["sft2.checkpoint"]),
        ("sft3.checkpoint/7", 10, []),  # of a stage that is not the first to train
    ],
)
def test_resume_keeps_the_checkpoint_of_its_first_stage(
    root: Path, checkpoint: str, time: int, left: list[Any]
) -> None:
    """Its logs stay too, and those of stages that are not trained."""
    save_at(root / "sft1", 9)
    save_at(root / checkpoint, time)
    (root / "sft1.partial").mkdir()
    (root / "sft2.partial").mkdir()
    runs.prepare_stage_folders(StageSettings(resume=True), ["sft2", "sft3"], "sft1")
    assert names(root, "*.checkpoint*") == left
    assert sorted(names(root, "*.partial")) == ["sft1.partial", "sft2.partial"]


@pytest.mark.parametrize("arguments", [{"stage": "sft2", "resume": True}, {"stage": "sft3"}])
def test_what_outlived_its_stage_is_removed(root: Path, arguments: dict[str, Any]) -> None:
    """A kill after the last save of a stage; also where nothing is left to train.

    Guards: the checkpoint of a finished stage that stayed for good. What a user keeps stays.
    """
    for time, stage in enumerate(runs.SFT_STAGES, 1):
        save_at(root / stage, time)
    save_at(root / "sft2.checkpoint" / "9", 9)
    save_at(root / "sft1.replaced", 9)
    save_at(root / "sft1.old", 9)
    settings = StageSettings(**arguments)
    plan = runs.plan_sft(settings)
    if plan.todo:
        plan.prepare_folders(settings)
    assert names(root, "*.*") == ["sft1.old"]


def test_without_resume_nothing_is_left_over(root: Path) -> None:
    """The finished stages stay until new ones take their place."""
    save_at(root / "sft3", 4)
    for stage in runs.SFT_STAGES:
        save_at(root / f"{stage}.checkpoint" / "5", 5)
        (root / f"{stage}.partial").mkdir()
    runs.prepare_stage_folders(StageSettings(), runs.SFT_STAGES, "")
    assert names(root, "*") == ["sft3"]


def test_plan_of_sft(root: Path) -> None:
    """All stages, one of them, or those that are left; from the stage before, or from --start."""
    plan = runs.plan_sft(StageSettings())
    assert (plan.todo, plan.start) == (["base", "sft1", "sft2", "sft3"], "")
    assert plan.must_make_data

    plan = runs.plan_sft(StageSettings(stage="sft2"))
    assert (plan.todo, plan.start) == (["sft2"], "sft1")
    assert plan.folder_of("sft2") == root.relative_to(root.parent.parent) / "sft2"

    plan = runs.plan_sft(StageSettings(stage="sft2", start="base", out="alone"))
    assert (plan.todo, plan.start) == (["sft2"], "base")
    assert plan.folder_of("sft2").name == "alone"

    save_at(root / "base", 1)
    save_at(root / "sft1", 2)
    plan = runs.plan_sft(StageSettings(resume=True))
    assert (plan.todo, plan.start) == (["sft2", "sft3"], "sft1")
    assert plan.start_folder().name == "sft1"


def test_plan_of_rl(root: Path) -> None:
    """RL-1 and RL-2 from SFT-3, RL-2 alone from RL-1; KL is measured to what a command starts from.

    Only --resume may find RL-1 done: then RL-2 goes on from it, and the reference is still SFT-3.
    """
    plan = runs.plan_rl(StageSettings())
    assert (plan.todo, plan.start, plan.reference) == (["rl1", "rl2"], "sft3", "sft3")
    assert not plan.goes_on_after_rl1

    plan = runs.plan_rl(StageSettings(stage="rl2"))
    assert (plan.todo, plan.start, plan.reference) == (["rl2"], "rl1", "rl1")

    plan = runs.plan_rl(StageSettings(start="sft2"))
    assert (plan.todo, plan.start, plan.reference) == (["rl1", "rl2"], "sft2", "sft2")

    save_at(root / "sft3", 1)
    save_at(root / "rl1", 2)
    plan = runs.plan_rl(StageSettings(resume=True))
    assert (plan.todo, plan.start, plan.reference) == (["rl2"], "rl1", "sft3")
    assert plan.goes_on_after_rl1
    assert plan.reference_folder().name == "sft3"


@pytest.mark.parametrize(
    ("plan", "values", "line"),
    [
        (runs.plan_sft, {}, "all stages: in out/nano already"),
        (runs.plan_sft, {"stage": "sft2"}, "sft2: in out/nano already"),
        (runs.plan_sft, {"stage": "sft2", "out": "sft3"}, "sft3: in out/nano already"),
        (runs.plan_rl, {}, "both stages: in out/nano already"),
    ],
)
def test_nothing_to_do(
    root: Path, capsys: pytest.CaptureFixture[str], plan: Any, values: dict[str, Any], line: str
) -> None:
    """It is said, by the name of the folder."""
    for time, stage in enumerate((*runs.SFT_STAGES, *runs.RL_STAGES), 1):
        save_at(root / stage, time)
    assert plan(StageSettings(resume=True, **values)).todo == []
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("plan", "values", "message"),
    [
        (runs.plan_sft, {"stage": "rl1"}, "--stage: 'rl1' is not one of base, sft1, sft2, sft3"),
        (runs.plan_sft, {"bits": 4}, "--bits=4: weights of 4 bits can't be trained"),
        (runs.plan_sft, {"start": "base"}, "--start, --out: they go with one stage"),
        (runs.plan_sft, {"out": "x"}, "--start, --out: they go with one stage"),
        (runs.plan_sft, {"stage": "base", "out": "x"}, "--out: a run has one base"),
        (runs.plan_rl, {"stage": "sft1"}, "--stage: 'sft1' is not rl1 or rl2"),
        (runs.plan_rl, {"out": "x"}, "--out: it goes with one stage"),
    ],
)
def test_settings_that_do_not_go_together(
    root: Path, plan: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan(StageSettings(**values))


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--run=a", "--seed", "3"], "python train_sft.py --run=a --seed 3"),
        (["--stage", "rl2", "--start=x", "a.py"], "python train_sft.py a.py"),
        (["--dry-run", "a.py", "--out", "x"], "python train_sft.py a.py"),
        (["--ask=Who?", "--quick"], "python train_sft.py --quick"),
    ],
)
def test_the_command_for_the_same_run(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], command: str
) -> None:
    """It has the settings that were given, without those that pick a stage."""
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    assert runs.command_line("train_sft.py") == command


@pytest.fixture
def begin(root: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that begins a command on a run whose stages are there, without a report."""
    for time, stage in enumerate(runs.SFT_STAGES, 1):
        save_at(root / stage, time)
    (root / "data").mkdir()
    (root / "data" / "pairs.jsonl").write_text("")
    (root / "sft2.checkpoint").mkdir()
    (root / "sft2.partial").mkdir()

    def begin_command(**values: Any) -> None:
        settings = StageSettings(**values)
        settings.given = dict(values)
        plan = runs.plan_sft(settings)
        plan.refuse_changed_data(settings)
        plan.prepare_folders(settings)

    return begin_command


def test_a_command_clears_its_way(root: Path, begin: Any) -> None:
    """A new run begins with its settings, one stage leaves those of the others."""
    begin(stage="sft1")
    assert (root / "sft2.checkpoint").is_dir()
    assert not (root / "settings.json").exists()
    begin(micro_tokens=99)
    assert not (root / "sft2.checkpoint").exists()
    assert read_run_record("nano").given == {"micro_tokens": 99}


def test_the_data_of_another_base_model_goes_first(root: Path, begin: Any) -> None:
    """Guards: a kill after a new base model, and SFT went on with the data of the old one."""
    for name in ("coa.jsonl", "cot.jsonl"):
        (root / "data" / name).write_text("")
    begin()
    assert list((root / "data").iterdir()) == []


def test_a_checkpoint_of_another_seed(root: Path, begin: Any) -> None:
    """--resume may not go on with other random numbers than the checkpoint was begun with."""
    runs.record_stage(StageSettings(seed=3), "sft2")
    save_at(root / "sft2.checkpoint" / "9", 9)
    with pytest.raises(UserError, match=r"--seed: out/nano/sft2\.checkpoint was begun with 3, not"):
        begin(stage="sft2", resume=True)
    assert runs.plan_sft(StageSettings(stage="sft2", resume=True, seed=3)).todo == ["sft2"]
    begin(stage="sft2")


def test_refusals_come_first(root: Path, begin: Any) -> None:
    """What can be refused is refused before anything is removed."""
    runs.record_stage(StageSettings(), "data")
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=r"--seed: out/nano/data was made with another value"):
        begin(stage="sft2", seed=4)
    assert sorted(root.rglob("*")) == before


# ---- settings.json -------------------------------------------------------------------------------
def test_the_record_of_a_run(root: Path) -> None:
    """What the first command was given, and each stage with all its settings, the last one last."""
    settings = StageSettings(seed=3)
    settings.given = {"seed": 3, "rl_lr": 1.0, "run": "nano"}
    runs.begin_run(settings)
    runs.record_stage(settings, "base")
    runs.record_stage(settings, "sft1")
    settings = StageSettings(seed=3, lora_rank=4)
    settings.given = {"seed": 3, "lora_rank": 4, "stage": "base"}
    runs.record_stage(settings, "base")
    content = json.loads((root / "settings.json").read_text())
    assert content["given"] == {"seed": 3, "rl_lr": 1.0}
    assert list(content["stages"]) == ["sft1", "base"]
    record = StageRecord(**content["stages"]["base"])
    assert record.given == {"seed": 3, "lora_rank": 4}
    assert record.settings["lora_rank"] == 4
    assert record.settings["micro_tokens"] == 1600
    assert "given" not in record.settings
    assert record.settings_class == "StageSettings"


def test_a_stage_of_a_run_without_a_record(root: Path) -> None:
    """The first command that trains in a folder is what the run remembers."""
    settings = StageSettings(stage="base")
    settings.given = {"stage": "base", "width": 64}
    runs.record_stage(settings, "base")
    assert read_run_record("nano").given == {"width": 64}


def test_a_run_keeps_its_number_type(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: --dtype=auto that takes another type where a run goes on, on another machine."""
    fast = "bfloat16"
    monkeypatch.setattr(model, "fast_dtype", lambda settings: fast)

    def settle(begins_run: bool = False, **given: str) -> str:
        settings = SFTSettings(**given)
        settings.given = dict(given)
        runs.settle_by_device(settings, begins_run)
        runs.record_stage(settings, "base")
        return settings.dtype

    assert settle() == "float32"
    assert settle(begins_run=True, model="x") == "bfloat16"
    fast = "float32"
    assert settle(model="x") == "bfloat16"
    assert read_run_record("nano").stages["base"].given["dtype"] == "bfloat16"
    assert settle(begins_run=True, model="x") == "float32"
    assert settle(model="x", dtype="bfloat16") == "bfloat16"


def test_sizes_of_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's sizes where nobody gave others; the run keeps them, wherever it goes on."""
    sizes = {"micro_tokens": 4096, "batch_rows": 512}
    monkeypatch.setattr(model, "sizes_by_device", lambda settings: sizes)

    def settle(**given: int) -> tuple[int, int]:
        settings = SFTSettings(**given)
        settings.given = {**read_run_record("nano").given, **given}
        for name, value in settings.given.items():
            setattr(settings, name, value)
        runs.settle_by_device(settings)
        runs.record_stage(settings, "base")
        return settings.micro_tokens, settings.batch_rows

    assert settle(batch_rows=64) == (4096, 64)
    sizes = {}
    assert settle() == (4096, 64)
    sizes = {"micro_tokens": 8192}
    assert settle() == (4096, 64)
    other = SFTSettings(model="x")
    runs.settle_by_device(other)
    assert other.micro_tokens == SFTSettings().micro_tokens
    monkeypatch.undo()
    assert model.sizes_by_device(SFTSettings(device="cpu")) == {}


def test_data_of_other_settings(root: Path) -> None:
    """The line names the setting and the way out; data without a record is taken as it is."""
    folder = root.relative_to(root.parent.parent)
    runs.refuse_changed_data(folder, StageSettings(seed=1), ["seed"])
    runs.record_stage(StageSettings(), "data")
    runs.refuse_changed_data(folder, StageSettings(), ["seed"])
    runs.refuse_changed_data(folder, StageSettings(dtype="bfloat16"), ["seed"])
    with pytest.raises(UserError) as error:
        runs.refuse_changed_data(folder, StageSettings(seed=1), ["dtype", "seed"])
    assert str(error.value) == (
        "--seed: out/nano/data was made with another value (see settings.json); repeat that, or "
        "remove the folder to have the data made anew"
    )


# ---- a stage under way ---------------------------------------------------------------------------
def test_what_a_stage_leaves_beside_its_weights(root: Path, codec: Codec) -> None:
    """Calls where the tool was asked, and texts of its own; they are there when it is complete."""
    lm = tiny_lm(codec)
    optimizer = lm.backend.Optimizer(lm.network, False)
    stage = StageRun(lm, optimizer, root / "rl2", StageSettings(), 2)
    for step in stage.steps():
        stage.keep_calls([])
        stage.log("", step=step)
    assert not (root / "rl2.partial" / "calls.jsonl").exists()
    stage.keep_calls([{"step": 1, "query": "A"}])
    stage.keep_text("cost.json", "{}")
    stage.finish()
    assert read_rows(root / "rl2" / "calls.jsonl") == [{"step": 1, "query": "A"}]
    assert (root / "rl2" / "cost.json").read_text() == "{}"
    assert names(root, "rl2*") == ["rl2"]


@pytest.mark.parametrize("merges", [False, True])
def test_a_finished_stage_merges_its_adapter(codec: Codec, tmp_path: Path, merges: bool) -> None:
    """Where it is asked to; else the folder is an adapter's."""
    tiny_lm(codec).save(tmp_path / "base")
    settings = StageSettings(lora_rank=2, lora_merge=merges)
    lm = tiny_lm(codec)
    lm.folder = tmp_path / "base"
    lm.begin_stage(settings, 0)
    optimizer = lm.backend.Optimizer(lm.network, False)
    Checkpoint(lm, optimizer, tmp_path / "sft1", settings).finish()
    assert (tmp_path / "sft1" / "model.safetensors").is_file() == merges
    assert (tmp_path / "sft1" / "adapter_config.json").is_file() != merges


def test_a_checkpoint_of_other_settings(codec: Codec, tmp_path: Path) -> None:
    """Another optimizer or another network: the line has the way out, and the checkpoint stays."""
    lm = tiny_lm(codec)
    lm.save(tmp_path / "x", torch_backend.Optimizer(lm.network, muon=True))
    with pytest.raises(UserError, match=r"not this optimizer's state.*or remove"):
        lm.resume(tmp_path / "x", torch_backend.Optimizer(lm.network, muon=False))
    other = tiny_lm(codec, width=96)
    with pytest.raises(UserError, match=r"another network.*or remove"):
        other.resume(tmp_path / "x", torch_backend.Optimizer(other.network))
    assert (tmp_path / "x" / "config.json").is_file()


def test_pace_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """After the second step that this command makes, by the bar's own clock."""
    bar = tqdm(desc="rl1", total=12, initial=3)
    bar.start_t -= 8
    for step in range(3, 12):
        runs.report_pace(bar, step)
    assert re.fullmatch(
        r"rl1: 4\.0\d s a step by the first two, 0\.\d minutes for the other 7\n",
        capsys.readouterr().out,
    )


def test_a_checkpoint_takes_the_group_it_needs() -> None:
    """Guards: a stage's settings that do not say how its network is trained."""
    assert isinstance(StageSettings(), ModelSettings)
