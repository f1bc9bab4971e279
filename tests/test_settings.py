"""Settings and bad input: one line that names the thing, exit status 2, nothing half-written."""
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script, shell

import common
from common import Problem, Settings, read_settings


@pytest.fixture
def given(monkeypatch, capsys):
    """Read the settings of a command line."""
    def read(*args):
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, args)])
        return read_settings("The doc.")
    return read


def test_defaults_are_the_nano_path(given):
    assert given() == Settings()


def test_each_kind_of_setting(given, capsys):
    """Both ways to write a value, a bare flag, lists, and the order of precedence: the command line wins over the file."""
    s = given("--seed=3", "--lr", "1e-2", "--muon=false", "--quick", "--train_data=a.jsonl,b.jsonl", "--max-len=99", "--coa=7")
    assert (s.seed, s.lr, s.muon, s.quick, s.train_data, s.max_len, s.coa) == (3, 0.01, False, True, ["a.jsonl", "b.jsonl"], 99, 7)
    assert "seed=3" in capsys.readouterr().out


def test_a_config_file(given, tmp_path):
    """Values, then QUICK's where it is asked for, then the command line; a whole number may stand for a float."""
    path = tmp_path / "mine.py"
    path.write_text('"""doc"""\nrun = "mine"\nlr = 1\ncoa = 10\nQUICK = dict(coa=5, cot=2)\n')
    assert (given(path).run, given(path).lr, given(path).coa) == ("mine", 1.0, 10) and type(given(path).lr) is float
    s = given(path, "--quick", "--cot=3")
    assert (s.coa, s.cot) == (5, 3)
    for other in ("nano", "smollm2"):
        assert given(ROOT / "config" / f"{other}.py", "--quick").quick


@pytest.mark.parametrize("args, message", [
    (["--sed=1"], "unknown setting 'sed'; did you mean 'seed'"), (["--temprature=1"], "did you mean 'temperature'"), (["--zzzz=1"], "unknown setting 'zzzz'"),
    (["--seed=one"], "--seed: 'one' is not a whole number"), (["--seed=1.5"], "--seed: '1.5' is not a whole number"), (["--lr=fast"], "--lr: 'fast' is not a number"),
    (["--muon=perhaps"], "--muon: 'perhaps' is not true or false"), (["--seed"], "--seed: no value"), (["missing.py"], "missing.py: no such config file"), (["seed=1"], "seed=1: no such config file"),
    (["--questions=0"], "--questions: 0 is out of range; it must be above 0"), (["--seed=-1"], "--seed: -1 is out of range; it must be 0 or more"), (["--lora_dropout=1"], "--lora_dropout: 1.0 is out of range; it must be below 1"), (["--kl=nan"], "--kl: nan is out"),
    (["--temperature=0"], "--temperature: 0.0 is out"), (["--lr=inf"], "--lr: inf is out")])
def test_a_wrong_setting(given, args, message):
    """Named, with the nearest name or the kind that is expected."""
    with pytest.raises(Problem) as e:
        given(*args)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("line, message", [("sede = 1", "did you mean 'seed'"), ("seed = '1'", "seed must be a whole number"), ("seed = True", "seed must be a whole number"),
                                           ("QUICK = dict(coaa=1)", "did you mean 'coa'"), ("train_data = 'a.jsonl'", "train_data must be a list"),
                                           ("seed = (", "can't be run as Python"), ("seed = zero", "name 'zero' is not defined")])
def test_a_wrong_config_file(given, tmp_path, line, message):
    path = tmp_path / "mine.py"
    path.write_text(line)
    with pytest.raises(Problem) as e:
        given(path)
    assert message in str(e.value) and str(path) in str(e.value)


def test_help_names_every_setting(given, capsys):
    """Each field with its comment and default, from the source. Guards: a setting that --help leaves out."""
    with pytest.raises(SystemExit) as e:
        given("--help")
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith("The doc.")
    lines = {x.split()[0]: x.split("[")[0].split()[1:] for x in out.splitlines() if x.startswith("  --")}
    assert list(lines) == [f"--{f.name}" for f in dataclasses.fields(Settings)]
    assert [name for name, comment in lines.items() if not comment] == []
    assert "--seed" in out and "of everything random [0]" in out and "auxiliary term [0.2]" in out


# ---- the scripts, in an empty folder ----------------------------------------------------------------------------------
def one_line(status, err, cwd):
    """Exit status 2, one line on stderr, no traceback, no output but the index of a corpus that was read. -> that line"""
    assert status == 2, err
    line, = err.splitlines()
    assert line.startswith("error: ") and {p.name for p in (cwd / "out").glob("*")} <= {"index"}
    return line


@pytest.fixture
def failed(tmp_path):
    """The same inside this process."""
    def run(script, *args):
        done = run_script(tmp_path, script, *args)
        return one_line(done.status, done.err, tmp_path)
    return run


def test_an_unknown_setting(tmp_path):
    done = shell(tmp_path, "train_rl.py", "--clip_lwo=1")       # as a user runs it
    assert "did you mean 'clip_low'" in one_line(done.status, done.err, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda(failed):
    assert "--device=cuda: there is none here" in failed("train_sft.py", "--device=cuda")


def test_a_script_starts_without_what_it_does_not_use(tmp_path):
    """torch is loaded where it is the backend, and its compiler never. Guards: three seconds at the start of each script."""
    code = ("import sys, eval, train_rl, model; print('torch' in sys.modules); import model_torch; model_torch.build(model.nano_config(100, 0, 1));"
            "print('torch._dynamo' in sys.modules, 'transformers.models.auto' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == ["False"] * 3


@pytest.mark.parametrize("script, args, missing, command", [
    ("train_rl.py", [], "sft3", "train_sft.py"), ("train_rl.py", ["--stage=rl2"], "rl1", "train_rl.py"), ("train_rl.py", ["--stage=rl2", "--start=sft2"], "sft2", "train_sft.py"),
    ("train_sft.py", ["--stage=sft2"], "sft1", "train_sft.py"), ("eval.py", [], "base", "train_sft.py"), ("world_model.py", [], "", "train_sft.py"), ("autocoa.py", ["--ask=Who?"], "", "train_sft.py")])
def test_a_missing_predecessor(failed, script, args, missing, command):
    """The line names the folder and the command that makes it, for this run."""
    line = failed(script, "--run=mine", *args)
    assert f"out/mine/{missing}" in line and f"python {command}" in line and "--run=mine" in line


def test_the_command_that_is_named_makes_it(failed, tmp_path):
    """It repeats the settings that were given, and not what picks a stage. Guards: a real run that is told to train the nano model."""
    (tmp_path / "mine.py").write_text("")
    line = failed("train_rl.py", "mine.py", "--quick", "--stage", "rl2", "--start=sft2", "--run=mine", "--seed", "3")
    assert line.endswith("make it with: python train_sft.py mine.py --quick --run=mine --seed 3")


def test_a_start_that_no_command_makes(failed, tmp_path):
    """Its name is a user's own: the folders that there are, and no command. Guards: the advice to train for nothing."""
    line = failed("train_rl.py", "--run=mine", "--stage=rl2", "--start=nosuch")
    assert "out/mine/nosuch is missing; --start can be one of: nothing yet" in line and "python" not in line
    for name in ("sft3", "sft2_alone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(common.Problem, match="nosuch is missing; --start can be one of: sft2_alone, sft3$"):
        common.start_folder(tmp_path, "nosuch", ["sft3"])


@pytest.mark.parametrize("script, args", [("train_sft.py", ["--out=mine"]), ("train_sft.py", ["--start=base"]), ("train_rl.py", ["--out=mine"])])
def test_a_folder_without_its_stage(failed, script, args):
    """Guards: all stages written over each other in one folder."""
    assert "--stage" in failed(script, *args)


@pytest.mark.parametrize("args", [["tools.py"], ["tools.py", "none.jsonl"], ["miniwiki.py", "seven"], ["miniwiki.py", "--seed=-1"]])
def test_a_tool_by_hand_says_how(tmp_path, args):
    done = run_script(tmp_path, *args)
    line, = done.err.splitlines()
    assert done.status == 2 and f"usage: python {args[0]} " + ("ask CORPUS QUERY .." if args[0] == "tools.py" else "--seed=N; shows") in line


def test_nothing_to_draw(failed):
    assert "python train_sft.py" in failed("plot.py")


def test_an_unknown_device(failed):
    assert "auto, cpu, cuda, mps" in failed("train_sft.py", "--device=gpu")


def test_a_stage_that_is_none(failed):
    assert "base, sft1, sft2, sft3" in failed("train_sft.py", "--stage=sft4")
    assert "rl1 or rl2" in failed("train_rl.py", "--stage=sft4")


@pytest.fixture
def real(tmp_path):
    """Settings of the real path with a tiny question file and corpus."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "1", "question": "Who?", "golden_answers": ["Eva"]}) + "\n")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "1", "contents": '"Eva"\nA star.'}) + "\n")
    return [ROOT / "config" / "smollm2.py", "--train_data=q.jsonl", "--eval_data=q.jsonl", "--corpus=p.jsonl"]


def test_an_unsupported_architecture(tmp_path, failed, real):
    """Said from config.json, before weights are read; with what is supported."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    line = failed("train_sft.py", *real, "--model=gpt2")
    assert "GPT2LMHeadModel" in line and "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in line


@pytest.mark.parametrize("content", ["", '{"architectures": ', '{"architectures": ["LlamaForCausalLM"]}', "[]"])
def test_a_broken_network_folder(tmp_path, failed, real, content):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(content)
    assert "broken/config.json is not a network's configuration" in failed("train_sft.py", *real, "--model=broken")


@pytest.mark.parametrize("change, message", [
    ("--model=none.gguf", "no such file: none.gguf"), ("--train_data=none.jsonl", "no such file: none.jsonl"), ("--corpus=none.jsonl", "no such file: none.jsonl"),
    ("--eval_data=bad.jsonl", "bad.jsonl:2"), ("--corpus=", "corpus")])
def test_real_data_that_is_not_there(tmp_path, failed, real, change, message):
    (tmp_path / "bad.jsonl").write_text((tmp_path / "q.jsonl").read_text() + '{"id": "2", "question": "Who?", "golden_answers": []}\n')
    assert message in failed("train_sft.py", *real, change)


def test_a_problem_is_one_line(monkeypatch, capsys):
    """`main` turns a Problem into a line and exit status 2, and nothing else: other errors keep their traceback."""
    monkeypatch.setattr(sys, "argv", ["x"])

    def problem(s):
        raise Problem("seed: bad")
    with pytest.raises(SystemExit) as e:
        common.main(problem, "doc")
    assert e.value.code == 2 and capsys.readouterr().err == "error: seed: bad\n"
    with pytest.raises(ZeroDivisionError):
        common.main(lambda s: 1 / 0, "doc")
