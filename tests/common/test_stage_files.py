"""Logs and checkpoints of a stage under way: damage, full disks, signals, and going on."""

import errno
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import read_rows, strict_json, tiny_lm
from file_operations import watched
from kill_campaign import Length, choose_kill, run_in_child
from tqdm import tqdm

import model
from common import runs, stage_files
from common.errors import UserError, run_guarded
from common.files import CHECKSUMS_FILE
from common.run_record import read_run_record
from common.runs import StageRun
from common.settings import StageSettings
from common.signals import Stopped, stopping_on_signals
from common.stage_files import Best, BestWeights, Checkpoint, StageLog, list_checkpoints
from data.trajectory import Codec
from model import LM

STEPS = 4


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return out/nano of an empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return Path("out", "nano")


@pytest.fixture
def saves_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage save a checkpoint after each step, without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(stage_files, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(stage_files, "SHARE_OF_SAVING", 1.0)


def train(codec: Codec, act: Callable[[int], None] | None = None, total: int = STEPS) -> list[int]:
    """Train the steps of a stage that are left, as a script does, and return them.

    Each step adds its number to a weight, so that a step that is left out or made twice shows.
    act: called in the middle of each step.
    """
    settings = StageSettings(resume=True)
    lm = tiny_lm(codec)
    optimizer = lm.backend.Optimizer(lm.network, False)
    runs.prepare_stage_folders(settings, ["sft1"], "")
    stage = StageRun(lm, optimizer, Path("out", "nano", "sft1"), settings, total)
    steps = []
    for step in stage.steps():
        lm.network.model.norm.weight.data[0] += step
        optimizer.step_count += 2
        if act is not None:
            act(step)
        stage.log(f"step {step}", step=step, loss=1 / (step + 1))
        stage.keep_rollouts([{"step": step}])
        stage.keep_calls([{"step": step, "query": "A"}, {"step": step, "query": "B"}])
        steps.append(step)
    stage.keep_text("cost.json", "{}")
    stage.finish()
    return steps


def stop_at(step_to_stop_at: int) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == step_to_stop_at:
            raise KeyboardInterrupt

    return act


def content(root: Path) -> dict[str, Any]:
    """Return all that a run holds, but for times: the bytes of each file, and the log's rows."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if path.name == "log.jsonl":
            found[str(path)] = [(row["step"], row["loss"]) for row in read_rows(path)]
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


@pytest.fixture
def whole(root: Path, codec: Codec) -> dict[str, Any]:
    """Return what a stage in one go leaves; the folder is empty again."""
    train(codec)
    found = content(root)
    shutil.rmtree("out")
    return found


# ---- logs ----------------------------------------------------------------------------------------
def test_a_stage_goes_on_from_its_checkpoint(
    root: Path, codec: Codec, whole: Any, saves_each_step: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step after the last checkpoint is made again, and is in each log once."""
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        train(codec, act=stop_at(3))
    assert list(read_run_record("nano").stages) == ["sft1"]
    assert [path.name for path in list_checkpoints(root / "sft1")] == ["2", "3"]
    log = root / "sft1.partial" / "log.jsonl"
    seconds = read_rows(log)[-1]["seconds"]
    # A loss of power leaves such things after the end of a file.
    for name in stage_files.LOG_FILES:
        with open(root / "sft1.partial" / name, "ab") as file:
            file.write(b'{"step": 3, "lo' + bytes(40))
    assert train(codec) == [3]
    assert content(root) == whole
    assert read_rows(root / "sft1" / "log.jsonl")[-1]["seconds"] >= seconds


def test_a_log_is_json_also_where_a_figure_is_not_finite(tmp_path: Path) -> None:
    """Guards: NaN in a log, which no other program reads."""
    log = StageLog(tmp_path / "rl1")
    log.write(step=0, loss=1 / 3, em=float("nan"), tokens=5)
    log.append("rollouts.jsonl", [{"reward": [float("inf"), 1.0]}])
    row = strict_json((log.folder / "log.jsonl").read_text())
    assert (row["loss"], row["em"], row["tokens"]) == (0.333333, None, 5)
    assert strict_json((log.folder / "rollouts.jsonl").read_text()) == {"reward": [None, 1.0]}


def test_a_stage_that_begins_has_no_old_logs(root: Path, codec: Codec) -> None:
    """Nor files of a save that was interrupted."""
    partial = root / "sft1.partial"
    (partial / "mlx_lm").mkdir(parents=True)
    for name in ("log.jsonl", "calls.jsonl", "model.safetensors"):
        (partial / name).write_text('{"step": 0}\n')
    assert StageLog(root / "sft1").calls == []
    assert [(path.name, path.read_text()) for path in partial.iterdir()] == [("log.jsonl", "")]


# ---- checkpoints ---------------------------------------------------------------------------------
def test_a_kill_costs_half_a_minute_and_saving_a_twentieth(
    root: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the test's: two seconds a step, and saving takes none, or four of them.

    Guards: `--save_minutes` of 10, so that a run of minutes had no checkpoint.
    """
    lm = tiny_lm(codec)
    optimizer = lm.backend.Optimizer(lm.network, False)
    now = [0.0]
    monkeypatch.setattr(stage_files.time, "monotonic", lambda: now[0])

    def moments_of_saves(seconds_of_saving: float) -> list[float]:
        moments: list[float] = []

        def save(*arguments: Any) -> None:
            moments.append(now[0])
            now[0] += seconds_of_saving

        now[0] = 0.0
        monkeypatch.setattr(LM, "save", save)
        checkpoint = Checkpoint(lm, optimizer, root / "sft1", StageSettings())
        for step in range(200):
            now[0] += 2
            checkpoint.save_if_due(step + 1)
        return moments

    assert moments_of_saves(0.0) == list(range(30, 401, 30))
    seldom = moments_of_saves(4.0)
    assert seldom[0] == 30
    waits = [after - before - 4 for before, after in itertools.pairwise(seldom)]
    assert all(0.045 < 4 / (4 + wait) <= 0.05 for wait in waits)


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


@pytest.mark.parametrize(
    ("damage", "file", "goes_on_at"),
    [
        (flip_a_byte, "checkpoint/3/model.safetensors", 2),
        (flip_a_byte, "checkpoint/3/optimizer.safetensors", 2),
        (flip_a_byte, "checkpoint/3/tokenizer.json", 2),
        (flip_a_byte, f"checkpoint/3/{CHECKSUMS_FILE}", 2),
        (cut, "checkpoint/3/optimizer.safetensors", 2),
        (Path.unlink, f"checkpoint/3/{CHECKSUMS_FILE}", 2),
        (Path.unlink, "checkpoint/3/log_ends.json", 2),
        # Its end is of the third step, so that the checkpoint before still has its logs.
        (cut, "partial/rollouts.jsonl", 2),
        (Path.unlink, "partial/calls.jsonl", 0),
    ],
)
def test_a_damaged_checkpoint_is_left_out(
    root: Path,
    codec: Codec,
    whole: Any,
    saves_each_step: None,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    file: str,
    goes_on_at: int,
) -> None:
    """It is named, the state before it is taken, and the end is that of a stage in one go.

    Guards: one flipped byte of an optimizer, which was trained on without a word.
    """
    with pytest.raises(KeyboardInterrupt):
        train(codec, act=stop_at(3))
    damage(root / f"sft1.{file}")
    capsys.readouterr()
    assert train(codec)[0] == goes_on_at
    (line, *_) = capsys.readouterr().out.splitlines()
    pattern = rf"out/nano/sft1\.{file} is not as it was saved: out/nano/sft1\.checkpoint/3 is left"
    assert re.match(pattern.replace(CHECKSUMS_FILE, r"\w+\.\w+"), line)
    assert content(root) == whole


@pytest.mark.parametrize("steps", [4, 1])
def test_steps_are_not_optimizer_steps(codec: Codec, tmp_path: Path, steps: int) -> None:
    """A checkpoint counts the steps of its stage.

    RL's make several optimizer steps, or none where all groups agree. Guards: steps that --resume
    left out or made again.
    """
    settings = StageSettings(resume=True)
    lm = tiny_lm(codec)
    optimizer = lm.backend.Optimizer(lm.network, False)
    optimizer.step_count = 2
    Checkpoint(lm, optimizer, tmp_path / "rl1", settings).save(steps)
    again = lm.backend.Optimizer(lm.network, False)
    assert Checkpoint(lm, again, tmp_path / "rl1", settings).steps_done == steps
    assert again.step_count == 2


def test_the_start_of_a_stage_is_checked_too(root: Path, codec: Codec) -> None:
    """The way out is said; a folder from elsewhere has no checksums, and is taken as it is.

    All that load a stage come here. Guards: --ask, world models and adapters' bases, which did not.
    """
    tiny_lm(codec).save(root / "base")
    flip_a_byte(root / "base" / "model.safetensors")
    settings = StageSettings(device="cpu")
    pattern = r"base/model\.safetensors is not as it was saved; train this stage again, or remove"
    with pytest.raises(UserError, match=pattern):
        model.load(root / "base", settings)
    (root / "sft1").mkdir()
    shutil.copy(root / "base" / "config.json", root / "sft1")
    adapter = {"base_model_name_or_path": str(root / "base")}
    (root / "sft1" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match=r"base/model\.safetensors is not .*; train this run again"):
        model.load(root / "sft1", settings)
    (root / "base" / CHECKSUMS_FILE).unlink()
    model.load(root / "base", settings)


# ---- the best weights ----------------------------------------------------------------------------
def test_each_checkpoint_has_its_best_weights(codec: Codec, tmp_path: Path) -> None:
    """The stage may go on from any that is kept; what was best before all of them goes.

    Weights of a step that is made again, those that are damaged, and half of a save are left out.
    """
    lm = tiny_lm(codec)
    folder = tmp_path / "rl1"
    kept = folder.with_name("rl1.checkpoint") / "best"
    checkpoint = Checkpoint(lm, lm.backend.Optimizer(lm.network), folder, StageSettings())
    best_weights = BestWeights(lm, folder, 0)
    assert best_weights.best is None
    # The best change in steps 0, 2, 4, 6; the checkpoints after 3 and 5 steps stay.
    for step, reward in enumerate([0.1, 0.1, 0.2, 0.0, 0.3, 0.3, 0.4]):
        lm.network.model.norm.weight.data[0] = step
        best_weights.keep_if_best(step, reward)
        if step in (2, 4):
            checkpoint.save(step + 1)
    assert best_weights.best == Best(6, 0.4)
    assert sorted(path.name for path in kept.iterdir()) == ["2", "4", "6"]

    shutil.copytree(kept / "4", kept / "7.partial")
    again = BestWeights(lm, folder, 6)
    assert sorted(path.name for path in kept.iterdir()) == ["2", "4"]
    assert again.load() == Best(4, 0.3)
    assert lm.network.model.norm.weight.data[0] == 4
    flip_a_byte(kept / "4" / "model.safetensors")
    with pytest.raises(UserError, match=r"best/4/model.safetensors is not as it was saved"):
        again.load()
    assert BestWeights(lm, folder, 6).best == Best(2, 0.2)
    (kept / "2" / CHECKSUMS_FILE).unlink()
    assert BestWeights(lm, folder, 6).best is None


# ---- a disk that refuses -------------------------------------------------------------------------
def run_as_script(
    codec: Codec, capsys: pytest.CaptureFixture[str], total: int = STEPS
) -> list[str]:
    """Train as a script does; return the lines of its error, none where it came to its end."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "orig_argv", ["python", "train_sft.py", "--run=a b"])
        try:
            run_guarded(lambda: train(codec, total=total) and None, can_resume=True)
        except SystemExit as end:
            assert end.code == 2
            return [
                line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
            ]
    return []


def first_of_each_kind(operations: list[tuple[str, str]]) -> list[int]:
    """Return where each operation is made on each file for the first time, whatever its step."""
    places: dict[tuple[str, str], int] = {}
    for number, (operation, path) in enumerate(operations):
        places.setdefault((operation, re.sub(r"/\d+", "/N", path)), number)
    return list(places.values())


@pytest.mark.parametrize(
    ("numbers", "steps"),
    [
        # One kind of error or the other for each kind of operation ..
        ([errno.ENOSPC, errno.EROFS], 2),
        # .. and each for every operation.
        pytest.param([errno.ENOSPC], STEPS, marks=pytest.mark.slow),
        pytest.param([errno.EROFS], STEPS, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_refuses_at_each_operation(
    root: Path,
    codec: Codec,
    saves_each_step: None,
    capsys: pytest.CaptureFixture[str],
    numbers: list[int],
    steps: int,
) -> None:
    """One line names a file and --resume, and then the end is that of a stage in one go.

    Guards: tracebacks of twenty lines, and half a checkpoint that was taken for a whole one.
    """
    operations: list[tuple[str, str]] = []
    with watched(lambda operation, path: operations.append((operation, path))):
        train(codec, total=steps)
    whole = content(root)
    failing = list(range(len(operations)))
    if len(numbers) > 1:
        failing = first_of_each_kind(operations)
    assert len(failing) >= 25
    for place in failing:
        shutil.rmtree("out")
        number = numbers[place % len(numbers)]
        left = [place]

        def fail(operation: str, path: str, number: int = number, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(number, os.strerror(number), path)

        with watched(fail):
            lines = run_as_script(codec, capsys, steps)
        if lines:
            (line,) = lines
            pattern = rf"error: out\S*: {os.strerror(number)}; .*; go on with: "
            assert re.match(pattern, line), (operations[place], line)
            assert line.endswith("python train_sft.py '--run=a b' --resume")
            train(codec, total=steps)
        assert content(root) == whole, operations[place]


@pytest.mark.parametrize("size", [300, 20_000, 60_000, 200_000])
def test_a_file_that_can_not_grow(
    root: Path,
    codec: Codec,
    whole: Any,
    saves_each_step: None,
    capsys: pytest.CaptureFixture[str],
    size: int,
) -> None:
    """In the midst of a file, also of one that a library writes: their errors differ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        (line,) = run_as_script(codec, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.match(r"error: out/nano/\S*: File too large; raise the limit", line)
    assert list(root.rglob("*.new")) == []
    train(codec)
    assert content(root) == whole


@pytest.mark.parametrize("place", ["out", "out/nano", "out/nano/sft1.partial"])
def test_a_file_in_the_place_of_a_folder(
    root: Path, codec: Codec, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """It is named, with what can be done."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("")
    (line,) = run_as_script(codec, capsys)
    assert re.match(rf"error: {place}.*move the file that is in the place of a folder", line)


def test_a_full_disk(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, saves_each_step: Any
) -> None:
    """A disk of half a megabyte: one line, and with room the stage comes to its end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no tmpfs can be mounted here")
    try:
        monkeypatch.chdir(disk)
        (line,) = run_as_script(codec, capsys)
        assert re.match(r"error: out\S*: No space left on device; make room on that disk; go", line)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert run_as_script(codec, capsys) == []
        assert sorted(path.name for path in Path("out/nano").iterdir()) == ["settings.json", "sft1"]
    finally:
        monkeypatch.chdir(tmp_path)
        subprocess.run(["umount", str(disk)], check=True)


# ---- kills ---------------------------------------------------------------------------------------
def test_a_stage_that_is_killed_again_and_again(root: Path, codec: Codec, whole: Any) -> None:
    """The short form of tests/kill_campaign.py: at moments, at file operations, within a file."""
    rng = random.Random("kills")
    kills = 0
    while kills < 12:
        kill = choose_kill(rng, Length(seconds=0.3, operations=90), kills=1.5)
        status = run_in_child(lambda: train(codec), kill)
        kills += status < 0
        if status == 0:
            assert content(root) == whole, kill
            shutil.rmtree("out")
        else:
            assert -status in (signal.SIGKILL, signal.SIGXFSZ), kill
    train(codec)
    assert content(root) == whole


def test_a_kill_beside_a_progress_bar() -> None:
    """The next child process draws its own bar.

    Guards: a lock that tqdm shares among processes, which waits for ever for one that was killed.
    """

    def hold_the_lock() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    def draw() -> None:
        signal.alarm(20)
        tqdm(total=1, file=io.StringIO()).close()

    tqdm.get_lock()
    assert run_in_child(hold_the_lock) == -signal.SIGKILL
    assert run_in_child(draw) == 0


# ---- signals -------------------------------------------------------------------------------------
@pytest.mark.usefixtures("signals_of_a_shell")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_step(
    root: Path, codec: Codec, whole: Any, capfd: Any, number: int
) -> None:
    """The step is finished and saved, and the line says how to go on.

    Guards: SIGTERM without a checkpoint, which cost up to ten minutes.
    """

    def act(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as end:
        run_guarded(lambda: train(codec, act=act) and None, can_resume=True)
    assert end.value.code == 128 + number
    error = capfd.readouterr().err
    name = signal.Signals(number).name
    assert f"{name}: stopping as soon as this step is saved; a second signal" in error
    assert re.search(r"^stopped; what is finished is kept; go on with: .* --resume$", error, re.M)
    assert [path.name for path in list_checkpoints(root / "sft1")] == ["2"]
    assert train(codec) == [2, 3]
    assert content(root) == whole


def test_a_second_signal_does_not_wait(root: Path, codec: Codec) -> None:
    """The first was kept for the end of the step, which may be far."""

    def act(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the step went on")

    with stopping_on_signals(), pytest.raises(Stopped):
        train(codec, act=act)


def test_a_signal_that_is_ignored_stays_ignored(root: Path, codec: Codec) -> None:
    """Guards: `nohup`, which ignores SIGHUP for its command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals():
            steps = train(codec, act=lambda step: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps == list(range(STEPS))
