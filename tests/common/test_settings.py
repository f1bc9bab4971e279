"""Settings and bad input: one line that names the thing, exit status 2, nothing half-written."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_here, run_in_shell

from autocoa import AskSettings
from common import run_record, runs, settings
from common.errors import UserError
from common.setting_values import Bounds
from common.settings import ModelSettings, StageSettings, main, read_settings
from environments.fidelity_report import FidelitySettings
from eval import EvalSettings
from plot import PlotSettings
from services.teacher import TeacherSettings
from speed.settings import BenchSettings
from train_rl import RLSettings
from train_sft import SFTSettings
from world_model import DistillSettings

SCRIPT_SETTINGS = [
    SFTSettings,
    RLSettings,
    EvalSettings,
    AskSettings,
    DistillSettings,
    FidelitySettings,
    PlotSettings,
    BenchSettings,
    TeacherSettings,
]
ABOVE_ZERO = (
    "vocab_size width layers base_tokens train_scale epochs sft3_epochs batch_tokens micro_tokens "
    "world_model_width world_model_layers world_model_epochs searches questions rollouts "
    "rl_questions temperature minibatches top_k max_actions tries max_len max_answer max_thought "
    "max_observation eval_questions batch_rows repeats hours side_by_side"
).split()


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that reads a command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def read_arguments(
        *arguments: Any, settings_class: Any = SFTSettings, begins_run: Any = None
    ) -> Any:
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, arguments)])
        return read_settings(settings_class, "The doc.", begins_run)

    return read_arguments


# ---- command line --------------------------------------------------------------------------------
@pytest.mark.parametrize("settings_class", SCRIPT_SETTINGS)
def test_defaults_are_the_nano_path(read: Any, settings_class: Any) -> None:
    """Without arguments the values are those in the code: config/nano.py sets no other."""
    assert read(settings_class=settings_class) == settings_class()


def test_each_kind_of_setting(read: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways to write a value, bare flags, lists, and hyphens for underscores."""
    arguments = ["--seed=3", "--lr", "1e-2", "--muon=false", "--quick", "--max-len=99", "--coa=7"]
    sft = read(*arguments, "--train_data=a.jsonl,b.jsonl", "--dry-run", "--run=a", "--run=b")
    assert sft.seed == 3
    assert sft.lr == 0.01
    assert not sft.muon
    assert sft.quick
    assert sft.dry_run
    assert sft.train_data == ["a.jsonl", "b.jsonl"]
    assert sft.max_len == 99
    assert sft.coa == 7
    assert sft.run == "b"
    out = capsys.readouterr().out
    assert out.startswith("train_sft.py: run b, seed 3; set here: ")
    assert "coa=7" in out


def test_an_empty_value(read: Any) -> None:
    """It takes a text or a list back."""
    sft = read("--corpus=", "--train_data=", "--start", "")
    assert (sft.corpus, sft.train_data, sft.start) == ("", [], "")


def test_the_home_folder_is_written_out(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: `--model=~/x`, which a shell leaves as it is, taken for the name of a hub's model."""
    monkeypatch.setenv("HOME", "/home/eva")
    sft = read("--model=~/x", "--train_data=~/a.jsonl,b~/c,~/d.jsonl", "--corpus", "~")
    assert sft.model == "/home/eva/x"
    assert sft.train_data == ["/home/eva/a.jsonl", "b~/c", "/home/eva/d.jsonl"]
    assert sft.corpus == "~"


def test_a_value_that_looks_like_an_option(read: Any) -> None:
    """After an equals sign anything may stand, and a question is one value."""
    assert read("--ask=-x=1", settings_class=AskSettings).ask == "-x=1"
    assert read("--ask", "Who is it - Eva?", settings_class=AskSettings).ask == "Who is it - Eva?"


def test_a_config_file_stands_anywhere(read: Any, tmp_path: Path) -> None:
    """Guards: a bare flag that takes the file after it as its value."""
    path = tmp_path / "mine.py"
    path.write_text('run = "mine"\n')
    assert read("--quick", path, "--seed=1").run == "mine"
    assert read("--seed", "1", path, "--dry-run").run == "mine"
    assert read("--train_data=a,b", path).train_data == ["a", "b"]


def test_settings_of_other_scripts_are_read(read: Any) -> None:
    """A run's commands are given the same arguments; each takes its own of them."""
    sft = read("--rl_lr=1e-3", "--judge=http://x", "--questions", "3", "--advantage_std")
    assert not hasattr(sft, "rl_lr")
    assert sft.given["rl_lr"] == 1e-3
    assert sft.given["advantage_std"] is True
    assert read("--rl_lr=1e-3", settings_class=RLSettings).rl_lr == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sed=1"], "unknown setting 'sed'; did you mean 'seed'"),
        (["--sed", "1"], "unknown setting 'sed'; did you mean 'seed'"),
        (["--temprature=1"], "did you mean 'temperature'"),
        (["--zzzz=1"], "unknown setting 'zzzz'; --help lists them"),
        (["--given=1"], "unknown setting 'given'"),
        (["--seed=one"], "--seed: 'one' is not a whole number"),
        (["--seed=1.5"], "--seed: '1.5' is not a whole number"),
        (["--lr=fast"], "--lr: 'fast' is not a number"),
        (["--rl_lr=fast"], "--rl_lr: 'fast' is not a number"),
        (["--muon=perhaps"], "--muon: 'perhaps' is not true or false"),
        (["--seed"], "--seed: no value; write --seed=VALUE"),
        (["--seed", "--lr=1"], "--seed: no value"),
        (["missing.py"], "missing.py: no such config file"),
        (["seed=1"], "seed=1: no such config file"),
        (["-x"], "-x: no such config file"),
        (["--questions=0"], "--questions: 0 is out of range; it must be above 0"),
        (["--seed=-1"], "--seed: -1 is out of range; it must be 0 or more"),
        (["--seed", "-1"], "--seed: -1 is out of range; it must be 0 or more"),
        (["--lora_dropout=1"], "--lora_dropout: 1.0 is out of range; it must be below 1"),
        (["--kl=nan"], "--kl: nan is out of range"),
        (["--temperature=0"], "--temperature: 0.0 is out of range; it must be above 0"),
        (["--temperature=inf"], "--temperature: inf is out of range"),
        (["--lr=inf"], "--lr: inf is out of range"),
        (["--cache=fresh"], "--cache: 'fresh' is not one of live, replay, refresh"),
        (["--dtype=float16"], "--dtype: 'float16' is not one of auto, float32, bfloat16"),
        (["--bits=8"], "--bits: 8 is not one of 4, 16"),
        (["--bits=four"], "--bits: 'four' is not a whole number"),
        (["--real_share=1.5"], "--real_share: 1.5 is out of range; it must be at most 1"),
        (["--rl1_environment=dream"], "'dream' is not one of internal, distilled, real, mixed"),
        (["--mixed_by=chance"], "--mixed_by: 'chance' is not one of schedule, confidence"),
        (["--rl1_pool=coa"], "--rl1_pool: 'coa' is not one of rl1, rl2"),
        (["--sources=sweep,web"], "--sources: 'web' is not one of sweep, logs, cache"),
        (["--lora_targets=q_proj,lm_head"], "--lora_targets: 'lm_head' is not one of q_proj, k_"),
        (["--ask=Who\udcff?"], "--ask=Who\udcff?: not UTF-8 text; write it in a UTF-8 terminal"),
        (["--width=31"], "--width, --world_model_width: 31 is less than a head of attention takes"),
    ],
)
def test_a_wrong_setting(read: Any, arguments: list[str], message: str) -> None:
    """It is named, with the nearest name or the kind of value that is expected."""
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_must_be_above_zero() -> None:
    """Guards: a count that loses its bound, so that 0 of it ends in a traceback."""
    bounds = {
        name: getattr(annotation, "__metadata__", (Bounds(),))[0]
        for name, annotation in settings.all_setting_types().items()
    }
    assert sorted(name for name, bound in bounds.items() if bound.above_zero) == sorted(ABOVE_ZERO)
    assert [name for name, bound in bounds.items() if bound.below_one] == ["lora_dropout"]
    shares = sorted(name for name, bound in bounds.items() if bound.at_most_one)
    assert shares == ["noise_share", "real_share", "sft3_observation_coef", "sweep_share"]


@pytest.mark.parametrize("settings_class", SCRIPT_SETTINGS)
def test_scripts_are_read_as_python_does(settings_class: Any) -> None:
    """The types in the scripts' source are those of the classes. Guards: a setting left out."""
    types = settings.all_setting_types()
    own_types = settings._setting_types(settings_class)
    assert own_types
    assert {name: types[name] for name in own_types} == own_types


def test_groups_stand_alone() -> None:
    """Functions take the group that they need, so tests make just that."""
    assert ModelSettings(device="cpu").lora_rank == 0
    assert StageSettings(resume=True).given == {}


# ---- config files --------------------------------------------------------------------------------
def test_a_config_file(read: Any, tmp_path: Path) -> None:
    """Its values, then QUICK's where it is asked for, then the command line."""
    path = tmp_path / "mine.py"
    path.write_text('"""doc"""\nrun = "mine"\nlr = 1\ncoa = 10\nQUICK = dict(coa=5, cot=2)\n')
    sft = read(path)
    assert (sft.run, sft.lr, sft.coa) == ("mine", 1.0, 10)
    assert type(sft.lr) is float  # a whole number may stand for it
    sft = read(path, "--quick", "--cot=3")
    assert (sft.coa, sft.cot) == (5, 3)


@pytest.mark.parametrize("name", ["nano", "smollm2", "r1-distill-1.5b"])
def test_the_presets(read: Any, name: str) -> None:
    """They are read without a fault, in their short form too."""
    assert read(ROOT / "config" / f"{name}.py", "--quick").quick


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sede = 1", "unknown setting 'sede'; did you mean 'seed'"),
        ("seed = '1'", "seed must be a whole number, not '1'"),
        ("seed = True", "seed must be a whole number, not True"),
        ("questions = 0", "questions: 0 is out of range; it must be above 0"),
        ("cache = 'fresh'", "cache: 'fresh' is not one of live, replay, refresh"),
        ("QUICK = dict(coaa=1)", "QUICK: unknown setting 'coaa'; did you mean 'coa'"),
        ("train_data = 'a.jsonl'", "train_data must be a list, not 'a.jsonl'"),
        ("seed = (", "can't be run as Python"),
        ("seed = zero", "name 'zero' is not defined"),
    ],
)
def test_a_wrong_config_file(read: Any, tmp_path: Path, line: str, message: str) -> None:
    """The line names the file and the setting."""
    path = tmp_path / "mine.py"
    path.write_text(line)
    with pytest.raises(UserError) as error:
        read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# ---- help ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings_class", SCRIPT_SETTINGS)
def test_help_names_every_setting(
    read: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings_class: Any,
) -> None:
    """Each with its comment and default. Guards: a setting that --help leaves out or can't say."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as end:
        read("--help", settings_class=settings_class)
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert out.startswith("The doc.")
    # A setting begins a line, after the frame.
    _, *entries = re.split(r"\n\W* --(?=\w)", out)
    comments = {}
    for entry in entries:
        words = re.findall(r"[^\s│|]+", entry.partition("(default:")[0])
        # The name and what kind of value it takes; the comment is after them.
        comments[words[0]] = words[2:]
    fields = [item.name for item in dataclasses.fields(settings_class) if item.init]
    assert sorted(comments) == sorted(fields)
    assert [name for name, comment in comments.items() if len(comment) < 2] == []


@pytest.mark.parametrize(
    "script",
    ["autocoa", "bench", "eval", "plot", "tools", "train_rl", "train_sft", "world_model"]
    + ["data.export", "data.get", "data.show", "nano.show"],
)
def test_help_of_each_command(script: str, tmp_path: Path) -> None:
    """It begins with the first line of its file. test_layout.py sees to it that it is quick."""
    file = ROOT / f"{script.replace('.', '/')}.py"
    done = run_here(tmp_path, script if "." in script else f"{script}.py", "--help")
    assert (done.status, done.err) == (0, "")
    title = file.read_text().splitlines()[0]
    assert done.out.startswith(title.lstrip('r"').split(":")[0])


def test_help_has_comments_and_defaults(
    read: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from the source, so that help and code can't part."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        read("-h", settings_class=RLSettings)
    out = capsys.readouterr().out
    assert "Seed of everything that is random. (default: 0)" in out
    assert "Rollouts of a question. (default: 5)" in out


# ---- what a run remembers ------------------------------------------------------------------------
def begin(read: Any, *arguments: Any) -> Any:
    """Begin a run as train_sft.py does, and record a stage of it."""
    sft = read(*arguments, begins_run=runs.begins_run)
    runs.begin_run(sft)
    runs.record_stage(sft, "base")
    return sft


def test_a_run_needs_its_name_alone(read: Any) -> None:
    """What the run was begun with is taken by every later script, its own settings of it."""
    begin(read, "--run=mine", "--seed=4", "--max_len=99", "--rl_lr=1e-3", "--width=64")
    rl = read("--run=mine", settings_class=RLSettings)
    assert (rl.run, rl.seed, rl.max_len, rl.rl_lr) == ("mine", 4, 99, 1e-3)
    assert read("--run=mine", settings_class=EvalSettings).max_len == 99
    assert read("--run=other", settings_class=EvalSettings).max_len == 512


def test_a_quick_run_needs_its_name_alone(read: Any) -> None:
    """Its short form is remembered, by its values."""
    begin(read, "--quick", "--rl_lr=1e-5")
    for arguments in (["--run=quick"], ["--quick"]):
        rl = read(*arguments, settings_class=RLSettings)
        assert rl.run == "quick"
        assert rl.quick
        assert rl.rl1_steps == 2
        assert rl.rl_lr == 1e-5  # not config/nano.py's, which is below what is remembered


def test_the_order_of_what_sets_a_value(read: Any, tmp_path: Path) -> None:
    """Remembered values yield to a config file that is named, and both to the command line."""
    path = tmp_path / "mine.py"
    path.write_text("coa = 2\ncot = 2\nQUICK = dict(epochs=9)\n")
    begin(read, "--coa=1", "--cot=1", "--pairs=1")
    sft = read(path, "--cot=3", "--stage=sft2", begins_run=runs.begins_run)
    assert (sft.coa, sft.cot, sft.pairs, sft.epochs) == (2, 3, 1, 2)


def test_a_run_remembers_its_short_form_for_a_config_file(read: Any, tmp_path: Path) -> None:
    """Guards: a quick run that goes on with the whole form of its own config file."""
    path = tmp_path / "mine.py"
    path.write_text('run = "mine"\nepochs = 5\nQUICK = dict(epochs=1)\n')
    begin(read, path, "--quick")
    assert read(path, "--stage=sft2").epochs == 1


def test_a_command_that_begins_a_run_takes_nothing(read: Any) -> None:
    """Training anew is training with what is said now."""
    begin(read, "--coa=1", "--seed=5")
    sft = read(begins_run=runs.begins_run)
    assert (sft.coa, sft.seed) == (5000, 0)
    for argument in ("--stage=sft1", "--resume", "--start=base"):
        assert read(argument, begins_run=runs.begins_run).coa == 1


def test_what_belongs_to_one_command_is_not_remembered(read: Any) -> None:
    """Guards: a whole run that trains one stage because an earlier command did."""
    sft = read("--run=mine", "--resume", "--stage=sft2", "--start=base", "--out=x", "--lr=1")
    runs.record_stage(sft, "x")
    record = run_record.read_run_record("mine")
    assert record.given == {"lr": 1.0}
    assert record.stages["x"].given == {"lr": 1.0}
    assert record.stages["x"].settings["out"] == "x"
    assert record.stages["x"].settings_class == "SFTSettings"


def test_resume_takes_what_its_stage_was_given(read: Any) -> None:
    """An interrupted stage goes on with its own settings; without --resume they are the run's."""
    begin(read, "--rl_lr=1e-3")
    rl = read("--rl_lr=1e-4", "--questions=3", settings_class=RLSettings)
    runs.record_stage(rl, "rl1")
    again = read("--resume", settings_class=RLSettings)
    assert (again.rl_lr, again.questions) == (1e-4, 3)
    assert read(settings_class=RLSettings).rl_lr == 1e-3
    assert read("--resume", settings_class=SFTSettings).given["rl_lr"] == 1e-3


def test_resume_of_a_named_stage_takes_that_stage(read: Any) -> None:
    """A stage in a folder of another name is gone on with only where it is named."""
    begin(read)
    runs.record_stage(read("--lr=1"), "sft2")
    ablation = ["--stage=sft2", "--start=base", "--out=alone"]
    runs.record_stage(read(*ablation, "--lr=2"), "alone")
    assert read("--resume").lr == 1
    assert read("--resume", *ablation).lr == 2
    assert read("--resume", "--stage=sft2").lr == 1
    assert read("--resume", "--stage=sft2", "--lr=3").lr == 3


@pytest.mark.parametrize("argument", ["--width=64", "--layers=2", "--vocab_size=600"])
@pytest.mark.parametrize("settings_class", [RLSettings, EvalSettings])
def test_another_run_of_the_same_name(read: Any, argument: str, settings_class: Any) -> None:
    """A run has one network; the line names both values and the way out."""
    begin(read)
    name, _, value = argument[2:].partition("=")
    with pytest.raises(UserError) as error:
        read(argument, settings_class=settings_class)
    message = str(error.value)
    assert message.startswith(f"--{name}: run 'nano' was made with {getattr(SFTSettings(), name)}")
    assert f"not {value}" in message
    assert "out/nano/settings.json" in message
    assert "--run" in message
    same = f"--{name}={getattr(SFTSettings(), name)}"
    assert read(same, settings_class=settings_class).given[name] == getattr(SFTSettings(), name)


def test_another_seed_of_a_stage(read: Any) -> None:
    """Other random numbers on the same network are an ablation, and no contradiction."""
    begin(read)
    assert read("--seed=1", settings_class=RLSettings).seed == 1
    assert read(settings_class=RLSettings).seed == 0


def test_another_model_in_a_config_file(read: Any) -> None:
    """A config file names a model to begin with; a run that has begun keeps its own.

    Guards: a config file that was refused when it was named again, as run.sh names it.
    """
    config = ROOT / "config" / "smollm2.py"
    begin(read, config, "--model=mine")
    assert read("--run=smollm2").model == "mine"
    assert read(config, settings_class=EvalSettings).model == "mine"
    with pytest.raises(UserError, match="--model: run 'smollm2' was made with 'mine', not 'x'"):
        read(config, "--model=x", settings_class=EvalSettings)


def test_what_one_evaluation_is_asked_is_not_remembered(read: Any) -> None:
    """Guards: a run whose every evaluation judges one checkpoint because the first did."""
    one_command = ["--data=a.jsonl", "--rows=x", "--judge=x", "--cache=refresh", "--tries=2"]
    begin(read, *one_command, "--max_len=99")
    evaluation = read(settings_class=EvalSettings)
    assert (evaluation.data, evaluation.rows, evaluation.judge) == ([], [], "")
    assert (evaluation.cache, evaluation.max_len) == ("live", 99)


def test_quick_of_a_run_that_is_not(read: Any) -> None:
    """A real run's short form is in a config file, which has to be named."""
    begin(read, "--model=mine", "--run=mine")
    with pytest.raises(UserError, match="--quick: this run was not begun with it; name the conf"):
        read("--run=mine", "--quick", settings_class=RLSettings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not the settings of a run"),
        ("[]", "not the settings of a run"),
        ('{"given": {}}', "not the settings of a run"),
        ('{"given": {}, "stages": {"base": {"x": 1}}}', "not the settings of a run"),
        ('{"given": {"sede": 1}, "stages": {}}', "unknown setting 'sede'; did you mean 'seed'"),
        ('{"given": {"seed": "1"}, "stages": {}}', "seed must be a whole number, not '1'"),
        ('{"given": {"top_k": 0}, "stages": {}}', "top_k: 0 is out of range"),
    ],
)
def test_wrong_remembered_settings(read: Any, tmp_path: Path, content: str, message: str) -> None:
    """They are checked like any others, and the line names the file."""
    (tmp_path / "out" / "nano").mkdir(parents=True)
    (tmp_path / "out" / "nano" / "settings.json").write_text(content)
    with pytest.raises(UserError) as error:
        read()
    assert f"out/nano/settings.json: {message}" in str(error.value)
    assert "\n" not in str(error.value)


# ---- the scripts, in an empty folder -------------------------------------------------------------
def check_one_line(done: Any, cwd: Path) -> Any:
    """Return the one line of an error: exit status 2, no traceback, nothing written.

    The index of a corpus that was read may stay.
    """
    assert done.status == 2, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert {path.name for path in (cwd / "out").glob("*")} <= {"index"}
    return line


@pytest.fixture
def failed(tmp_path: Path) -> Any:
    """Return a function that runs a script in this process, and returns its one-line error."""

    def run(script: str, *arguments: Any) -> Any:
        return check_one_line(run_here(tmp_path, script, *arguments), tmp_path)

    return run


def test_an_unknown_setting(tmp_path: Path) -> None:
    """As a user runs it."""
    done = run_in_shell(tmp_path, "train_rl.py", "--clip_lwo=1")
    assert "did you mean 'clip_low'" in check_one_line(done, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda(failed: Any) -> None:
    assert "; use --device=cpu" in failed("train_sft.py", "--device=cuda")


def test_a_script_starts_without_what_it_does_not_use() -> None:
    """PyTorch is loaded where it is the backend, and its compiler never.

    Guards: three seconds at the start of each script.
    """
    code = """
import sys
import eval, train_rl
from backends.config import nano_config
print("torch" in sys.modules)
import backends.torch
backends.torch.build(nano_config(100, 0, 1))
print("torch._dynamo" in sys.modules)
print("transformers.models.auto" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"] * 3


def test_settings_are_cheap_to_import() -> None:
    """What imports a group needs no framework and no parser of command lines."""
    code = "import sys, common.settings; print({'torch', 'tyro', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("script", "arguments", "missing", "command"),
    [
        ("train_rl.py", [], "sft3", "train_sft.py"),
        ("train_rl.py", ["--stage=rl2"], "rl1", "train_rl.py"),
        ("train_rl.py", ["--stage=rl2", "--start=sft2"], "sft2", "train_sft.py"),
        ("train_sft.py", ["--stage=sft2"], "sft1", "train_sft.py"),
        ("eval.py", [], "base", "train_sft.py"),
        ("world_model.py", ["fidelity"], "", "train_sft.py"),
        ("autocoa.py", ["--ask=Who?"], "", "train_sft.py"),
    ],
)
def test_a_missing_predecessor(
    failed: Any, script: str, arguments: list[Any], missing: str, command: str
) -> None:
    """The line names the folder and the command that makes it, for this run."""
    line = failed(script, *arguments, "--run=mine")
    assert str(Path("out", "mine", missing)) in line
    assert f"python {command}" in line
    assert "--run=mine" in line


def test_the_command_that_is_named_makes_it(failed: Any, tmp_path: Path) -> None:
    """It repeats the settings that were given, and not what picks a stage.

    Guards: a real run that is told to train the nano model.
    """
    (tmp_path / "mine.py").write_text("")
    picks = ["--stage", "rl2", "--start=sft2"]
    line = failed("train_rl.py", "mine.py", "--quick", *picks, "--run=mine", "--seed", "3")
    assert line.endswith("make it with: python train_sft.py mine.py --quick --run=mine --seed 3")


def test_a_start_that_no_command_makes(failed: Any, tmp_path: Path) -> None:
    """Its name is a user's own: the line has the folders that there are, and no command.

    Guards: the advice to train for nothing.
    """
    line = failed("train_rl.py", "--run=mine", "--stage=rl2", "--start=nosuch")
    assert "out/mine/nosuch is missing; --start can be one of: nothing yet" in line
    assert "python" not in line
    for name in ("sft3", "sft2_alone", "world_model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    # A world model is nothing to begin with.
    (tmp_path / "world_model" / "cost.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"nosuch is missing; --start can be one of: sft2_al.*sft3$"
    ):
        runs.find_start(tmp_path, "nosuch", ["sft3"])


@pytest.mark.parametrize(
    ("script", "argument"),
    [("train_sft.py", "--out=mine"), ("train_sft.py", "--start=base"), ("train_rl.py", "--out=x")],
)
def test_a_folder_without_its_stage(failed: Any, script: str, argument: str) -> None:
    """Guards: all stages written over each other in one folder."""
    assert "--stage" in failed(script, argument)


@pytest.mark.parametrize(
    ("command", "arguments", "usage"),
    [
        ("tools.py", [], "usage: python tools.py ask CORPUS QUERY .."),
        ("tools.py", ["none.jsonl"], "usage: python tools.py ask CORPUS QUERY .."),
        ("world_model.py", [], "usage: python world_model.py distill  or  python world_model.py f"),
        ("world_model.py", ["--run=x"], "usage: python world_model.py distill  or  python world_m"),
        ("nano.show", ["seven"], "usage: python -m nano.show --seed=N; shows"),
        ("nano.show", ["--seed=-1"], "usage: python -m nano.show --seed=N; shows"),
    ],
)
def test_a_tool_by_hand_says_how(
    tmp_path: Path, command: str, arguments: list[Any], usage: str
) -> None:
    """A command that is written wrong prints its usage."""
    done = run_here(tmp_path, command, *arguments)
    (line,) = done.err.splitlines()
    assert done.status == 2
    assert usage in line


@pytest.mark.parametrize("script", ["plot.py", "train_rl.py", "eval.py"])
def test_the_command_that_is_named_is_of_the_same_run(failed: Any, script: str) -> None:
    """Guards: advice that would train another run than the one that was asked for."""
    assert "python train_sft.py --run=mine" in failed(script, "--run=mine")


def test_export_names_the_run_that_lacks_its_data(failed: Any, tmp_path: Path) -> None:
    line = failed("data.export", str(tmp_path / "mine" / "data"), "taught")
    assert line.endswith("make it with: python train_sft.py --run=mine")


def test_an_unknown_device(failed: Any) -> None:
    assert "auto, cpu, cuda, mps" in failed("train_sft.py", "--device=gpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coa=0", "--cot=0", "--pairs=0"], "--coa, --cot, --pairs: all are 0, which leaves"),
        (["--coa=0", "--cot=0"], "--coa, --cot: both are 0, which leaves SFT-2 and SFT-3 nothing"),
    ],
)
def test_sizes_that_leave_nothing_to_learn(
    failed: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """Refused before the base model is trained, and no folder is left. Guards: tracebacks."""
    assert re.search(message, failed("train_sft.py", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_is_none(failed: Any) -> None:
    assert "base, sft1, sft2, sft3" in failed("train_sft.py", "--stage=sft4")
    assert "rl1 or rl2" in failed("train_rl.py", "--stage=sft4")


@pytest.fixture
def real(tmp_path: Path) -> list[Any]:
    """Return arguments of the real path, with a tiny question file and corpus."""
    question = {"id": "1", "question": "Who?", "golden_answers": ["Eva"]}
    passage = {"id": "1", "contents": '"Eva"\nA star.'}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "p.jsonl").write_text(json.dumps(passage) + "\n")
    config = ROOT / "config" / "smollm2.py"
    return [config, "--train_data=q.jsonl", "--eval_data=q.jsonl", "--corpus=p.jsonl"]


def test_an_unsupported_architecture(tmp_path: Path, failed: Any, real: Any) -> None:
    """It is said from config.json, before weights are read, with what is supported."""
    (tmp_path / "gpt2").mkdir()
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    line = failed("train_sft.py", *real, "--model=gpt2")
    assert "GPT2LMHeadModel" in line
    assert "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in line


@pytest.mark.parametrize(
    "content", ["", '{"architectures": ', '{"architectures": ["LlamaForCausalLM"]}', "[]"]
)
def test_a_broken_network_folder(tmp_path: Path, failed: Any, real: Any, content: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(content)
    line = failed("train_sft.py", *real, "--model=broken")
    assert "broken/config.json is not a network's configuration" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model=none.gguf", "no such file: none.gguf"),
        ("--train_data=none.jsonl", "no such file: none.jsonl"),
        ("--corpus=none.jsonl", "no such file: none.jsonl"),
        ("--eval_data=bad.jsonl", "bad.jsonl:2"),
        ("--corpus=", "corpus"),
    ],
)
def test_real_data_that_is_not_there(
    tmp_path: Path, failed: Any, real: Any, change: str, message: str
) -> None:
    bad = '{"id": "2", "question": "Who?", "golden_answers": []}\n'
    (tmp_path / "bad.jsonl").write_text((tmp_path / "q.jsonl").read_text() + bad)
    assert message in failed("train_sft.py", *real, change)


def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` makes a line and exit status 2 of a UserError; other errors keep their traceback."""
    monkeypatch.setattr(sys, "argv", ["x"])

    def refuse(sft: Any) -> None:
        raise UserError("seed: bad")

    def fail(sft: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as end:
        main(refuse, SFTSettings, "doc")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: seed: bad\n"
    with pytest.raises(ZeroDivisionError):
        main(fail, SFTSettings, "doc")
