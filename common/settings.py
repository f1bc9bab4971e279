"""Settings: typed groups that the scripts are put together from, and how they are read.

Each script has a dataclass of the groups that it needs and of settings of its own. A value comes
from the first of these that has one:

    1. the command line                                      --seed=1
    2. a config file on the command line                     config/smollm2.py
    3. what the run was given before                         out/<run>/settings.json
    4. config/nano.py, where 2 and 3 have nothing to say
    5. the defaults in the code, which are the nano path
"""

import ast
import contextlib
import difflib
import functools
import io
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from common import ranks
from common.errors import UserError, refuse_other_encoding, run_guarded
from common.files import only_process
from common.run_record import (
    RUN_IDENTITY,
    RunRecord,
    read_run_record,
    record_file,
    refuse_another_identity,
)
from common.setting_values import (
    AboveZero,
    AboveZeroFloat,
    CommaList,
    Share,
    ShareOrAll,
    check_value,
    read_value,
)
from common.terminal import own_output

# The types of settings come from here for the scripts too.
__all__ = [
    "AboveZero",
    "AboveZeroFloat",
    "CallSources",
    "ChosenBy",
    "CommaList",
    "EnvironmentName",
    "LossName",
    "MatrixName",
    "ModelSettings",
    "NanoModelSettings",
    "OptimizerSettings",
    "PairDirections",
    "PoolName",
    "RewardName",
    "RolloutSettings",
    "RunSettings",
    "Share",
    "ShareOrAll",
    "StageSettings",
    "TaskRunSettings",
    "TaskSettings",
    "TrainingSettings",
    "build_settings",
    "main",
    "read_setting",
    "read_settings",
]

MatrixName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Who writes the observations while a policy is trained (environments/environment.py).
EnvironmentName = Literal["internal", "distilled", "real", "mixed"]
# How a mixed environment chooses between the tool and the world model (environments/mixed.py).
ChosenBy = Literal["schedule", "confidence"]
# Whose questions RL-1 asks: its own pool, or that of RL-2.
PoolName = Literal["rl1", "rl2"]
# Over what the policy gradient is a mean, and what is clipped (autocoa.py).
LossName = Literal["dapo", "grpo", "dr_grpo", "gspo", "reinforce"]
# What an answer earns (data/scores.py).
RewardName = Literal["exact_match", "f1", "overlap"]
# What the chosen side of SFT-1's pairs does.
PairDirections = Literal["both", "act", "think"]
# Real calls that a world model is distilled from (environments/examples.py).
CallSources = list[Literal["sweep", "logs", "cache"]]


TAG_ROOM = 8  # tokens of a trajectory that are kept free for the tags around a forced answer
# Dimensions of a head in the attention of a nano model.
HEAD_SIZE = 32


@dataclass(kw_only=True)
class RunSettings:
    """Which run it is; every script has these."""

    # Name of the run: all output goes to out/<run>/.
    run: str = "nano"
    # Seed of everything that is random.
    seed: int = 0
    # Take the config file's short form: the same story with weaker numbers.
    quick: bool = False
    # Say how much memory and time a run takes, then stop; nothing is trained or written.
    dry_run: bool = False
    # What the command line, the config file and the run's settings.json set, also for other
    # scripts. It is no option of the command line.
    given: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(kw_only=True)
class ModelSettings:
    """How a network is held, read and trained."""

    # Framework: torch, mlx, or auto, which takes MLX on Apple silicon and torch elsewhere.
    backend: str = "auto"
    # Device: auto or cpu; with torch also cuda or mps.
    device: str = "auto"
    # Number type of activations and frozen weights; weights that are trained stay float32. auto:
    # float32 for nano; for a checkpoint from elsewhere bfloat16 where the device is fast in it. A
    # run keeps the type that it began with.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Bits of the frozen matrices under an adapter. With torch, 4 needs CUDA or a CPU with
    # bitsandbytes.
    bits: Literal[4, 16] = 16
    # Compute each block again in the backward pass: less memory, a third more time.
    checkpointing: bool = False
    # Tokens that go through the network at once in training. Nano on CUDA: 16,384.
    micro_tokens: AboveZero = 1600
    # Rank of a low-rank adapter (LoRA) that is trained instead of all weights; 0: all weights.
    lora_rank: int = 0
    # The adapter's output is scaled by lora_alpha / lora_rank.
    lora_alpha: float = 32.0
    # Dropout on the adapter's input.
    lora_dropout: Share = 0.0
    # Matrices of each block that get an adapter.
    lora_targets: list[MatrixName] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    )
    # Merge the adapter into the weights at the end of each stage, instead of saving a PEFT folder.
    lora_merge: bool = False


@dataclass(kw_only=True)
class TaskSettings:
    """Which model, questions and tool; without a model, the nano path makes all of them."""

    # Model to begin with: a Hugging Face folder, a hub id or a GGUF file. Empty: the nano model.
    model: str = ""
    # Question files to learn from: FlashRAG's .jsonl, or verl's .parquet.
    train_data: CommaList = field(default_factory=list)
    # Question files to be evaluated on, likewise.
    eval_data: CommaList = field(default_factory=list)
    # Where to search: a FlashRAG passage file (.jsonl or .jsonl.gz), "wikipedia", "leads", or the
    # http address of a retrieval server.
    corpus: str = ""
    # Cache of --corpus=wikipedia: live asks for what it lacks, replay never asks, refresh asks for
    # everything.
    cache: Literal["live", "replay", "refresh"] = "live"
    # Language of --corpus=wikipedia.
    language: str = "en"
    # Size of the nano training world: too large to learn by heart, so that reading is learned.
    train_scale: AboveZero = 4
    # Passages of an observation.
    top_k: AboveZero = 2
    # Questions of each evaluation set.
    eval_questions: AboveZero = 150


@dataclass(kw_only=True)
class TaskRunSettings(RunSettings, TaskSettings):
    """What a task is opened with: its data, and the seed of what is drawn."""


@dataclass(kw_only=True)
class NanoModelSettings:
    """The nano model and its pretraining."""

    # Vocabulary of the nano tokenizer.
    vocab_size: AboveZero = 2048
    # Hidden size.
    width: AboveZero = 128
    # Transformer blocks.
    layers: AboveZero = 4
    # Tokens of pretraining.
    base_tokens: AboveZero = 2_700_000

    def __post_init__(self) -> None:
        """Raise UserError for a network that is narrower than one head of its attention."""
        if self.width < HEAD_SIZE:
            raise UserError(
                f"--width, --world_model_width: {self.width} is less than a head of attention "
                f"takes; give {HEAD_SIZE} or more"
            )


@dataclass(kw_only=True)
class NewModelSettings(ModelSettings, NanoModelSettings):
    """How the model that a run begins with is held, and how large it is where it is new."""


@dataclass(kw_only=True)
class OptimizerSettings(ModelSettings):
    """How supervised training changes the weights."""

    # Train the matrices by Muon; false trains all weights by AdamW, as pretrained models were.
    muon: bool = True
    # Tokens of an optimizer step.
    batch_tokens: AboveZero = 2000
    # Learning rate of AdamW in nano's base stage and of its world model; SFT takes parts of it.
    lr: float = 6e-3
    # Learning rate of Muon, likewise.
    muon_lr: float = 1e-2


@dataclass(kw_only=True)
class RolloutSettings:
    """Budgets of a rollout, in training and in evaluation."""

    # Calls of the tool.
    max_actions: AboveZero = 6
    # Tokens of a trajectory, observations included.
    max_len: AboveZero = 512
    # Tokens of a forced answer.
    max_answer: AboveZero = 12
    # Tokens of an observation, imagined or real; passages that do not fit leave their titles.
    max_observation: AboveZero = 128
    # Tokens that a workflow lets the model write at a time.
    max_thought: AboveZero = 48
    # Rollouts that are decoded together. Nano on CUDA: 1,024.
    batch_rows: AboveZero = 256

    @property
    def forced_answer_room(self) -> int:
        """Tokens that are kept free for a forced answer and its tags."""
        return self.max_answer + TAG_ROOM

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt at most: one more has to be left before a forced answer."""
        return self.max_len - self.forced_answer_room - 1


@dataclass(kw_only=True)
class TrainingSettings(RunSettings, ModelSettings):
    """How training is kept, so that an interrupted command can go on."""

    # Go on with an interrupted run: finished stages stay, an unfinished one continues from its
    # checkpoint.
    resume: bool = False


@dataclass(kw_only=True)
class StageSettings(TrainingSettings):
    """Which stages of a run to train, from which folder into which."""

    # Train this stage only: base, sft1, sft2, sft3; rl1, rl2. Empty: all of the script's stages.
    stage: str = ""
    # Begin with this folder of the run instead of the stage before.
    start: str = ""
    # Write into this folder of the run instead of the stage's own.
    out: str = ""


# ---- reading -------------------------------------------------------------------------------------
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "config" / "nano.py"
GROUPS = (
    TaskRunSettings,
    ModelSettings,
    NanoModelSettings,
    OptimizerSettings,
    RolloutSettings,
    StageSettings,
)
# The files in which scripts add settings of their own, in dataclasses named ..Settings.
SCRIPTS = (
    "autocoa.py",
    "train_sft.py",
    "train_rl.py",
    "world_model.py",
    "environments/choice.py",
    "environments/fidelity_report.py",
    "eval.py",
    "environments/cost_curve.py",
    "environments/trade_offs.py",
    "evaluation/reproduction.py",
    "plot.py",
    "speed/settings.py",
    "services/teacher.py",
)

# The types that a script's own settings may have, by their names in its source.
TYPES_OF_SCRIPTS: dict[str, Any] = {
    "AboveZero": AboveZero,
    "AboveZeroFloat": AboveZeroFloat,
    "CallSources": CallSources,
    "ChosenBy": ChosenBy,
    "CommaList": CommaList,
    "EnvironmentName": EnvironmentName,
    "LossName": LossName,
    "PairDirections": PairDirections,
    "PoolName": PoolName,
    "RewardName": RewardName,
    "Share": Share,
    "ShareOrAll": ShareOrAll,
    "bool": bool,
    "float": float,
    "int": int,
    "str": str,
}

AnySettings = TypeVar("AnySettings", bound=RunSettings)


def main(
    run: Callable[[AnySettings], Any],
    settings_class: type[AnySettings],
    doc: str,
    begins_run: Callable[[AnySettings], bool] | None = None,
) -> None:
    """Run a script with its settings; what is wrong is one line on stderr (run_guarded).

    The last three arguments are those of read_settings. A script that trains has its run folder
    for itself.
    """

    def run_with_settings() -> None:
        with ranks.only_first_prints():
            read_and_run()

    def read_and_run() -> None:
        settings = read_settings(settings_class, doc, begins_run)
        if isinstance(settings, TrainingSettings) and not settings.dry_run:
            with only_process(Path("out", settings.run)):
                run(settings)
        else:
            run(settings)

    run_guarded(run_with_settings, can_resume=hasattr(settings_class, "resume"))


def read_settings(
    settings_class: type[AnySettings],
    doc: str,
    begins_run: Callable[[AnySettings], bool] | None = None,
) -> AnySettings:
    """Return a script's settings: [config file] [--key=value ..] and what the run remembers.

    doc: what --help prints above the settings.
    begins_run: whether a command with these settings begins a run, or does not read its folder;
        then it takes nothing that is remembered. None: every command goes on with a run.
    Raises UserError for a setting that is unknown, of another type or out of range, and for one
    that contradicts what the run was made with.
    """
    if "-h" in sys.argv or "--help" in sys.argv:
        _print_help(settings_class, doc)
        sys.exit(0)
    refuse_other_encoding(sys.argv[1:])
    types = all_setting_types() | _setting_types(settings_class)
    command_line, paths = _read_command_line(sys.argv[1:], types)
    config = _read_config_files(paths or [str(DEFAULT_CONFIG)], types)
    given = config.with_quick(command_line, {}) | command_line
    run = given.setdefault("run", RunSettings.run)
    settings = build_settings(settings_class, given)
    if begins_run is None or not begins_run(settings):
        record = read_run_record(run)
        refuse_another_identity(run, record, command_line)
        remembered = _check_values(
            record.given | _given_to_stage(record, settings), types, str(record_file(run))
        )
        given = _with_remembered(command_line, config, bool(paths), remembered)
        settings = build_settings(settings_class, given | {"run": run})
    set_here = ", ".join(f"{name}={value}" for name, value in command_line.items())
    note = f"; set here: {set_here}" if set_here else ""
    print(f"{Path(sys.argv[0]).name}: run {run}, seed {settings.seed}{note}", flush=True)
    return settings


def _with_remembered(
    command_line: dict[str, Any],
    config: "_ConfigFiles",
    names_config: bool,
    remembered: dict[str, Any],
) -> dict[str, Any]:
    """Return what is given; a named config file wins over what the run remembers."""
    if names_config:
        # A config file names a model to begin with, but this run has its own.
        identity = {name: remembered[name] for name in RUN_IDENTITY if name in remembered}
        from_config = config.with_quick(command_line, remembered)
        return remembered | from_config | identity | command_line
    if not remembered:
        return config.with_quick(command_line, remembered) | command_line
    if command_line.get("quick") and not remembered.get("quick"):
        raise UserError(
            "--quick: this run was not begun with it; name the config file whose short form is "
            "meant, such as config/nano.py"
        )
    return remembered | command_line


def build_settings(settings_class: type[AnySettings], given: dict[str, Any]) -> AnySettings:
    """Return a script's settings, with its own of what is given, which is checked already."""
    own = {name: value for name, value in given.items() if name in _setting_types(settings_class)}
    settings = settings_class(**own)
    settings.given = given
    return settings


def _given_to_stage(record: RunRecord, settings: RunSettings) -> dict[str, Any]:
    """Return what was given to the stage that --resume goes on with: that of --stage, or the last.

    A stage that was written into a folder of another name goes on only where it is named.
    """
    if not getattr(settings, "resume", False):
        return {}
    folder = getattr(settings, "out", "") or getattr(settings, "stage", "")
    given: dict[str, Any] = {}
    for name, stage in record.stages.items():
        if stage.settings_class != type(settings).__name__:
            continue
        if name == folder or (not folder and not stage.settings.get("out")):
            given = stage.given
    return given


# ---- the settings there are ----------------------------------------------------------------------
@functools.cache
def all_setting_types() -> dict[str, Any]:
    """Return the type of every setting of every script.

    The scripts' files are read, not imported: they import this file.
    """
    types: dict[str, Any] = {}
    for group in GROUPS:
        types |= _setting_types(group)
    for script in SCRIPTS:
        tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
        for statement in tree.body:
            if isinstance(statement, ast.ClassDef) and statement.name.endswith("Settings"):
                types |= _annotations(statement)
    return types


def read_setting(name: str, text: str) -> Any:
    """Return the value of a setting of any script, as the command line would read it.

    Raises UserError for a name that no script has, and for a text that is no value of it.
    """
    types = all_setting_types()
    _refuse_unknown_name(name, types, f"--{name}")
    return read_value(name, types[name], text)


def _annotations(class_definition: ast.ClassDef) -> dict[str, Any]:
    """Return the type of each field in the source of a dataclass.

    Raises KeyError for a type that is not in TYPES_OF_SCRIPTS.
    """
    types = {}
    for statement in class_definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            types[statement.target.id] = TYPES_OF_SCRIPTS[ast.unparse(statement.annotation)]
    return types


@functools.cache
def _setting_types(settings_class: type) -> dict[str, Any]:
    """Return the type of each setting of a dataclass, with its bounds."""
    annotations = get_type_hints(settings_class, include_extras=True)
    return {item.name: annotations[item.name] for item in fields(settings_class) if item.init}


def _refuse_unknown_name(name: str, types: dict[str, Any], place: str) -> None:
    """Raise UserError for a name that no script has, with the nearest one."""
    if name in types:
        return
    nearest = difflib.get_close_matches(name, types, 1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "--help lists them"
    raise UserError(f"{place}: unknown setting {name!r}; {hint}")


def _check_values(values: dict[str, Any], types: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the values that a file holds. Raises UserError for what is no setting or value."""
    checked = {}
    for name, value in values.items():
        _refuse_unknown_name(name, types, place)
        checked[name] = check_value(name, types[name], value, place)
    return checked


# ---- config files --------------------------------------------------------------------------------
@dataclass
class _ConfigFiles:
    """What config files set; the later one wins."""

    values: dict[str, Any] = field(default_factory=dict)
    quick_values: dict[str, Any] = field(default_factory=dict)

    def with_quick(
        self, command_line: dict[str, Any], remembered: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the values, in their short form where --quick was given, now or before."""
        for values in (command_line, self.values, remembered):
            if "quick" in values:
                return self.values | (self.quick_values if values["quick"] else {})
        return dict(self.values)


def _read_config_files(paths: list[str], types: dict[str, Any]) -> _ConfigFiles:
    """Run config files and return what they set. Raises UserError."""
    config = _ConfigFiles()
    for path in paths:
        if not path.endswith(".py") or not Path(path).is_file():
            raise UserError(
                f"{path}: no such config file; give one of config/*.py, and settings as --key=value"
            )
        try:
            content = runpy.run_path(path)
        except Exception as error:
            raise UserError(f"{path}: can't be run as Python: {error}") from None
        if "QUICK" in content:
            config.quick_values = _check_values(content.pop("QUICK"), types, f"{path}: QUICK")
        values = {name: value for name, value in content.items() if not name.startswith("_")}
        config.values |= _check_values(values, types, path)
    return config


# ---- command line --------------------------------------------------------------------------------
def _read_command_line(
    arguments: list[str], types: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that are given on the command line, and the config files among them.

    Settings of all scripts are read, since a run's commands are given the same ones.
    """
    # tyro is slow to import, and much that imports the groups reads no command line.
    import tyro

    options = make_dataclass(
        "Options", [(name, _option(name, annotation), None) for name, annotation in types.items()]
    )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            found, others = tyro.cli(
                options, args=_complete_flags(arguments, types), return_unknown_args=True
            )
    except SystemExit:
        # tyro takes every text, so all that it can refuse is an option without one.
        option = re.findall(r"--[\w-]+", complaint.getvalue())[0]
        raise UserError(f"{option}: no value; write {option}=VALUE") from None
    paths = []
    for argument in others:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            _refuse_unknown_name(name, types, f"--{name}")
        paths.append(argument)
    given = {name: value for name, value in vars(found).items() if value is not None}
    return given, paths


def _option(name: str, annotation: Any) -> Any:
    """Return a setting as tyro reads it from a command line; None where it is not given."""
    # tyro is slow to import.
    from tyro.constructors import PrimitiveConstructorSpec

    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar="VALUE",
        instance_from_str=lambda texts: read_value(name, annotation, _expand_home(texts[0])),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    return Annotated[Any, spec]


def _expand_home(text: str) -> str:
    """Write out the home folder, which a shell leaves as ~ after an equals sign."""
    return re.sub(r"(^|,)~(?=/)", lambda found: found[1] + str(Path.home()), text)


def _complete_flags(arguments: list[str], types: dict[str, Any]) -> list[str]:
    """Write a bare flag with its value, so that a config file after it is not read as one."""
    complete = []
    for argument in arguments:
        name = argument.removeprefix("--").replace("-", "_")
        if argument.startswith("--") and types.get(name) is bool:
            argument += "=true"
        complete.append(argument)
    return complete


def _print_help(settings_class: type, doc: str) -> None:
    """Print the doc, then each setting of a script with its comment and default."""
    # tyro is slow to import.
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def comma_list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type_origin is not list:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="A,B,..",
            instance_from_str=lambda texts: texts[0].split(","),
            is_instance=lambda value: isinstance(value, list),
            str_from_instance=lambda values: [",".join(values)],
        )

    print(doc.strip() + "\n")
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(own_output()):
        tyro.cli(
            settings_class,
            args=["--help"],
            description="",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
            registry=registry,
        )
