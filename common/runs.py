"""Run folders: which stages a command trains, from what, and a stage that is being trained.

out/nano/
    settings.json           what the run remembers of its settings (run_record.py)
    base/ sft1/ .. rl2/     a Hugging Face folder for each finished stage, with its logs
    rl2.partial/            logs of the stage that is being trained (stage_files.py)
    rl2.checkpoint/         its weights and optimizer a while ago, for --resume
    data/                   what SFT learns from
"""

import dataclasses
import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import model
from common import ranks
from common.errors import UserError
from common.files import CHECKSUMS_FILE, REPLACED_SUFFIX, write_text
from common.progress import tqdm
from common.run_record import (
    RunRecord,
    StageRecord,
    read_run_record,
    record_file,
    to_remember,
    write_run_record,
)
from common.settings import RunSettings, StageSettings, TrainingSettings
from common.signals import defer_stop, end_deferral, waiting_signal
from common.stage_files import (
    BestWeights,
    Checkpoint,
    StageLog,
    checkpoint_of,
    list_checkpoints,
    partial_of,
)
from model import LM

SFT_STAGES = ("base", "sft1", "sft2", "sft3")
RL_STAGES = ("rl1", "rl2")
STAGE_BEFORE = {"base": "", "sft1": "base", "sft2": "sft1", "sft3": "sft2"}
# Other values of these would make other SFT data.
DATA_SETTINGS = (
    "seed",
    "model",
    "train_data",
    "corpus",
    "sft_files",
    "coa",
    "cot",
    "pairs",
    "train_scale",
    "top_k",
    "max_observation",
    "max_len",
)
DATA_MARK = "pairs.jsonl"  # the last file of SFT's data that is written
DATA_JOURNAL = "answers.jsonl.partial"  # what the base model said, until the data is written
COST_FILE = "cost.json"  # in the folder of a distilled world model, which is no stage


def run_folder(settings: RunSettings) -> Path:
    """Return the folder of a run."""
    return Path("out", settings.run)


# ---- which stages to train -----------------------------------------------------------------------
@dataclass
class StagePlan:
    """The stages that a command trains, and the folders they are trained from and into."""

    root: Path
    todo: list[str]  # stages in order; empty where all are there already
    start: str  # folder whose weights the first of them begins with; "" where there are none yet
    reference: str  # RL: folder of the policy to which KL is measured
    out: str  # folder of the one stage, instead of its own; "" for its own

    @property
    def must_make_data(self) -> bool:
        """Whether there is no SFT data yet, or its base model is trained anew."""
        return "base" in self.todo or not (self.data_folder / DATA_MARK).is_file()

    @property
    def data_folder(self) -> Path:
        """Where SFT's data is."""
        return self.root / "data"

    @property
    def goes_on_after_rl1(self) -> bool:
        """Whether RL-1 is done, so that its weights are RL-2's and not the reference's."""
        return self.start != self.reference

    def folder_of(self, stage: str) -> Path:
        """Return the folder that a stage is written to."""
        return self.root / (self.out or stage)

    def start_folder(self) -> Path:
        """Return the folder that the first stage begins with. Raises UserError: see find_start."""
        return find_start(self.root, self.start, [*SFT_STAGES, "rl1"])

    def reference_folder(self) -> Path:
        """Return the folder of RL's reference. Raises UserError: see find_start."""
        return find_start(self.root, self.reference, [*SFT_STAGES, "rl1"])

    def load_start(self, settings: StageSettings) -> LM:
        """Return the model that the first stage begins with. Raises UserError: see model.load."""
        return model.load(self.start_folder(), settings)

    def load_base(self, lm: LM, settings: StageSettings) -> LM:
        """Return the base model, which SFT's data is made with.

        lm: the model that is trained, which is the base model where that has just been made.
        With --bits=4 too the base is asked as it is, so that an interrupted run makes the same
        data as a whole one.
        """
        if "base" in self.todo:
            return lm
        folder = find_start(self.root, "base", SFT_STAGES)
        return model.load(folder, dataclasses.replace(settings, bits=16))

    def load_reference_and_policy(self, settings: StageSettings) -> tuple[LM, LM]:
        """Return the policy that RL measures KL to, and the one that it trains.

        They begin as the same, unless RL-1 is done and --resume goes on after it.
        """
        reference = model.load(self.reference_folder(), settings)
        # Before the copy, so that policy and reference share a base that only carries adapters.
        reference.begin_stage(settings, settings.seed, self.todo[0])
        if not self.goes_on_after_rl1:
            return reference, reference.copy()
        if settings.lora_merge:
            # RL-1's adapter was merged into weights of its own.
            return reference, self.load_start(settings)
        policy = reference.copy()
        policy.resume(self.start_folder())
        return reference, policy

    def refuse_changed_data(self, settings: StageSettings) -> None:
        """Raise UserError for settings that contradict the SFT data that is there."""
        if not self.must_make_data:
            refuse_changed_data(self.root, settings, DATA_SETTINGS)

    def prepare_folders(self, settings: StageSettings) -> None:
        """Clear what an interrupted command left of the stages, and begin the run's record.

        Call it when nothing can refuse the command any more.
        """
        prepare_stage_folders(settings, [self.out] if self.out else self.todo, self.start)
        if "base" in self.todo and ranks.is_first():
            self._remove_data()
            if begins_run(settings):
                begin_run(settings)

    def _remove_data(self) -> None:
        """Remove the SFT data of another base model, the file by which it is known first."""
        (self.data_folder / DATA_MARK).unlink(missing_ok=True)
        for pattern in ("*.jsonl", DATA_JOURNAL, CHECKSUMS_FILE):
            for file in self.data_folder.glob(pattern):
                file.unlink()


def begins_run(settings: StageSettings) -> bool:
    """Whether a command of train_sft.py begins the run anew: nothing that it remembers counts."""
    return not (settings.stage or settings.start or settings.resume)


def plan_sft(settings: StageSettings) -> StagePlan:
    """Return which SFT stages to train; print it where there is none.

    Raises UserError for settings that do not go together.
    """
    if settings.stage not in ("", *SFT_STAGES):
        raise UserError(f"--stage: {settings.stage!r} is not one of {', '.join(SFT_STAGES)}")
    if settings.bits < 16 and not settings.lora_rank:
        raise UserError(
            f"--bits={settings.bits}: weights of {settings.bits} bits can't be trained; "
            "train an adapter on them with --lora_rank=16"
        )
    if (settings.start or settings.out) and not settings.stage:
        raise UserError("--start, --out: they go with one stage; say which with --stage")
    if settings.stage == "base" and settings.out:
        raise UserError(
            "--out: a run has one base, which its data is made with; "
            "give another one a --run of its own"
        )
    if settings.stage:
        start = settings.start or STAGE_BEFORE[settings.stage]
        todo = _one_stage_to_do(settings, start)
    else:
        todo = stages_to_do(settings, SFT_STAGES, "")
        start = STAGE_BEFORE[todo[0]] if todo else ""
    if not todo:
        _end_done(settings, "all stages")
    return _checked(StagePlan(run_folder(settings), todo, start, "", settings.out), settings)


def plan_rl(settings: StageSettings) -> StagePlan:
    """Return which RL stages to train; print it where there is none.

    Raises UserError for settings that do not go together.
    """
    if settings.stage not in ("", *RL_STAGES):
        raise UserError(f"--stage: {settings.stage!r} is not rl1 or rl2")
    if settings.out and not settings.stage:
        raise UserError("--out: it goes with one stage; say which with --stage")
    reference = settings.start or ("rl1" if settings.stage == "rl2" else "sft3")
    start = reference
    if settings.stage:
        todo = _one_stage_to_do(settings, start)
    else:
        todo = stages_to_do(settings, RL_STAGES, start)
        if todo == ["rl2"]:
            start = "rl1"
    if not todo:
        _end_done(settings, "both stages")
    return _checked(StagePlan(run_folder(settings), todo, start, reference, settings.out), settings)


def _checked(plan: StagePlan, settings: StageSettings) -> StagePlan:
    """Return the plan; raise UserError where --resume meets a checkpoint of another seed."""
    if plan.todo:
        refuse_other_seed(settings, plan.folder_of(plan.todo[0]))
    return plan


def refuse_other_seed(settings: TrainingSettings, folder: Path) -> None:
    """Raise UserError where --resume would go on with a checkpoint of another seed.

    folder: of the stage that goes on.
    """
    record = read_run_record(settings.run).stages.get(folder.name)
    if not settings.resume or record is None or not list_checkpoints(folder):
        return
    begun_with = record.settings["seed"]
    if begun_with != settings.seed:
        raise UserError(
            f"--seed: {checkpoint_of(folder)} was begun with {begun_with}, not {settings.seed}; "
            "repeat that, or leave --resume out to train the stage anew"
        )


def stages_to_do(settings: StageSettings, folders: Sequence[str], start: str) -> list[str]:
    """Return the folders of stages that are still to be trained, in order.

    With --resume, the first stages are left out as long as each is complete, and not older than
    the folder that it was trained from.
    start: the folder that the first stage is trained from; "" for none.
    """
    root = run_folder(settings)
    left = list(folders)
    if not settings.resume:
        return left
    previous = _saved_at(root / start) if start else 0.0
    while left:
        folder = root / left[0]
        is_complete = _is_saved(folder) and not partial_of(folder).exists()
        if not is_complete or _saved_at(folder) < previous:
            break
        previous = _saved_at(folder)
        left.pop(0)
    return left


def prepare_stage_folders(settings: TrainingSettings, stages: Sequence[str], start: str) -> None:
    """Remove what an interrupted command left of some stages.

    With --resume, logs stay. So do the checkpoints of the first stage, where they are newer than
    the folder that the stage is trained from, `start`.
    """
    ranks.of_first(lambda: _remove_interrupted(settings, stages, start))


def _remove_interrupted(settings: TrainingSettings, stages: Sequence[str], start: str) -> None:
    root = run_folder(settings)
    remove_leftovers(root)
    for index, stage in enumerate(stages):
        checkpoints = list_checkpoints(root / stage)
        is_kept = (
            settings.resume
            and index == 0
            and bool(checkpoints)
            and (not start or _saved_at(root / start) <= _saved_at(checkpoints[-1]))
        )
        if not is_kept:
            shutil.rmtree(checkpoint_of(root / stage), ignore_errors=True)
        if not settings.resume:
            shutil.rmtree(partial_of(root / stage), ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove what stages have outlived, where a command was killed after its last save."""
    for leftover in [*root.glob("*.checkpoint"), *root.glob("*" + REPLACED_SUFFIX)]:
        stage = leftover.with_suffix("")
        if _is_saved(stage) and not partial_of(stage).exists():
            shutil.rmtree(leftover)
    data_folder = root / "data"
    if (data_folder / DATA_MARK).is_file():
        (data_folder / DATA_JOURNAL).unlink(missing_ok=True)


def find_start(root: Path, start: str, stages: Sequence[str]) -> Path:
    """Return the folder to begin with.

    stages: folders that a command makes.
    Raises UserError where it is not there: with that command, or with the folders that there are.
    """
    folder = root / start
    if _is_saved(folder):
        return folder
    if start in stages:
        script = "train_rl.py" if start.startswith("rl") else "train_sft.py"
        raise UserError(f"{folder} is missing; make it with: {command_line(script)}")
    folders = [path.parent for path in root.glob("*/config.json")]
    stages_there = sorted(path.name for path in folders if not (path / COST_FILE).is_file())
    found = ", ".join(stages_there) or "nothing yet"
    raise UserError(f"{folder} is missing; --start can be one of: {found}")


def command_line(script: str) -> str:
    """Return the command that runs a script on the same run: all its stages, the same settings."""
    one_command = ("--stage", "--start", "--out", "--ask", "--dry_run", "--dry-run")
    kept = []
    is_value = False
    for argument in sys.argv[1:]:
        if is_value:
            is_value = False
            continue
        option, equals, _ = argument.partition("=")
        if option not in one_command:
            kept.append(argument)
        elif not equals and not option.startswith("--dry"):
            is_value = True
    return shlex.join(["python", script, *kept])


def _one_stage_to_do(settings: StageSettings, start: str) -> list[str]:
    folders = stages_to_do(settings, [settings.out or settings.stage], start)
    return [settings.stage] if folders else []


def _end_done(settings: StageSettings, all_stages: str) -> None:
    """Say that nothing is left to be trained."""
    if not settings.dry_run and ranks.is_first():
        remove_leftovers(run_folder(settings))
    name = settings.out or settings.stage or all_stages
    print(f"{name}: in {run_folder(settings)} already")


def _is_saved(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _saved_at(folder: Path) -> float:
    """Return when a network was saved, infinity where there is none."""
    if not _is_saved(folder):
        return math.inf
    return (folder / "config.json").stat().st_mtime


# ---- what the run remembers ----------------------------------------------------------------------
def begin_run(settings: RunSettings) -> None:
    """Write a new settings.json: what this command was given, and no stages."""
    write_run_record(settings.run, RunRecord(to_remember(settings.given)))


def record_stage(settings: RunSettings, stage: str) -> None:
    """Record the settings that a stage is trained with, and make it the newest of the run."""
    if not ranks.is_first():
        return
    record = read_run_record(settings.run)
    if not record_file(settings.run).is_file():
        record.given = to_remember(settings.given)
    values = asdict(settings)
    del values["given"]
    record.stages.pop(stage, None)
    given = to_remember(settings.given)
    record.stages[stage] = StageRecord(given, values, type(settings).__name__)
    write_run_record(settings.run, record)


def refuse_changed_data(root: Path, settings: RunSettings, names: Sequence[str]) -> None:
    """Raise UserError where the SFT data that is there was made with other settings."""
    record = read_run_record(settings.run)
    if "data" not in record.stages:
        return
    made_with = record.stages["data"].settings
    for name in names:
        if name in made_with and made_with[name] != getattr(settings, name):
            raise UserError(
                f"--{name}: {root / 'data'} was made with another value (see "
                f"{record_file(settings.run).name}); repeat that, or remove the folder to have "
                "the data made anew"
            )


def settle_by_device(settings: Any, begins_run: bool = False) -> None:
    """Replace --dtype=auto by a type, and on a GPU nano's sizes by larger ones, if none are given.

    What the run was made with comes first; a new run takes what suits its model and device. What is
    chosen is part of what the run is given, so that resume and later scripts keep it.
    settings: those of a script, of the groups TaskRunSettings and ModelSettings.
    begins_run: what a former run of this name was made with does not count.
    Raises UserError for a backend or a device that is not there.
    """
    made_with = {} if begins_run else read_run_record(settings.run).made_with()
    if settings.dtype == "auto":
        # Runs of version 0.2.0 were given none, but their stages have one.
        dtype = made_with.get("dtype", "auto")
        if dtype == "auto":
            # A nano model is slower in bfloat16.
            dtype = model.fast_dtype(settings) if settings.model else "float32"
        settings.dtype = dtype
        settings.given["dtype"] = dtype
    if settings.model:
        # How much of it fits into a GPU is its config's to say.
        return
    for name, size in model.sizes_by_device(settings).items():
        if hasattr(settings, name) and name not in settings.given:
            settings.given[name] = made_with.get(name, size)
            setattr(settings, name, settings.given[name])


# ---- a stage under way ---------------------------------------------------------------------------
class StageRun:
    """A stage that is being trained: its progress bar, log, checkpoints and settings.

    A signal that asks the command to end waits until a step is done and saved (signals.py).

    stage = StageRun(lm, optimizer, folder, settings, total)
    for step in stage.steps():
        ..
        stage.log("loss 0.123", step=step, loss=loss)
    stage.finish()
    """

    def __init__(
        self, lm: LM, optimizer: Any, folder: Path, settings: TrainingSettings, total: int
    ) -> None:
        """Go on from the checkpoint that is there. total: steps of the whole stage."""
        defer_stop()
        record_stage(settings, folder.name)
        self.lm = lm
        self.optimizer = optimizer
        self.name = folder.name
        self.total = total
        self.is_stopped = False  # whether the stage ends before its last step
        self.checkpoint = Checkpoint(lm, optimizer, folder, settings)
        self.log_files = StageLog(folder, self.checkpoint.log_ends)
        self.best_weights = BestWeights(lm, folder, self.checkpoint.steps_done)
        self.bar = tqdm(
            desc=folder.name,
            unit="step",
            smoothing=0.1,
            initial=self.checkpoint.steps_done,
            total=total,
        )

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left; when one is done, save a checkpoint if it is due."""
        with self.bar:
            for step in range(self.checkpoint.steps_done, self.total):
                yield step
                if self.is_stopped:
                    return
                self.checkpoint.save_if_due(step + 1)
                signal = waiting_signal()
                if signal is not None:
                    self.checkpoint.save(step + 1)
                    # Who ends before it is saved ends the process that saves it.
                    ranks.wait()
                    end_deferral(signal)
                report_pace(self.bar, step)
                self.bar.update()

    def log(self, summary: str, **figures: Any) -> None:
        """Write the figures of a step, and show a summary beside the bar."""
        self.log_files.write(**figures)
        self.bar.set_postfix_str(summary)

    def warn(self, alarms: Mapping[str, str]) -> None:
        """Print the alarms that did not ring a step ago. alarms: {name: a line}."""
        steps = self.log_files.steps
        ringing = steps[-1].get("alarms", []) if steps else []
        for name, line in alarms.items():
            if name not in ringing:
                with self.bar.external_write_mode():
                    print(f"{self.name}: alarm: {line}", flush=True)

    def stop_with_best(self, step: int, alarms: Mapping[str, str]) -> None:
        """Let this step be the last, and go back to the best weights on validation questions.

        alarms: why, {name: a line}.
        """
        self.is_stopped = True
        best = self.best_weights.load()
        with self.bar.external_write_mode():
            print(
                f"{self.name}: stopped by an alarm at step {step} ({'; '.join(alarms.values())}); "
                f"it ends with the weights after {best.steps} steps, whose held-out reward of "
                f"{best.reward:.3f} was the best",
                flush=True,
            )

    def keep_rollouts(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write some trajectories to be read."""
        self.log_files.append("rollouts.jsonl", rows)

    def keep_calls(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write what a step asked of the real tool (environments/counted.py)."""
        if rows:
            self.log_files.append("calls.jsonl", rows)

    def keep_text(self, name: str, text: str) -> None:
        """Write a file beside the stage's logs."""
        if ranks.is_first():
            write_text(self.log_files.folder / name, text)

    def finish(self) -> None:
        """Save the finished stage."""
        self.checkpoint.finish()
        # Others may read it next.
        ranks.wait()
        end_deferral()


def report_pace(bar: tqdm, step: int) -> None:
    """Print seconds per step and the time left, once, after two steps.

    step: the step that is done.
    """
    if step != bar.initial + 1:
        return
    assert bar.total is not None
    seconds = bar.format_dict["elapsed"] / 2
    left = int(bar.total) - step - 1
    with bar.external_write_mode():
        print(
            f"{bar.desc}: {seconds:.2f} s a step by the first two, "
            f"{left * seconds / 60:.1f} minutes for the other {left}",
            flush=True,
        )
