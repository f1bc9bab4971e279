"""The scripts as a user runs them, tiny, start to end, in a folder of its own."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, read_rows, run_here, run_in_shell, strict_json, tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

import backends.torch as torch_backend
import bench
import model
import train_rl
import train_sft
from common import runs, stage_files
from common.errors import UserError
from common.files import CHECKSUMS_FILE
from common.runs import COST_FILE, DATA_JOURNAL
from common.settings import read_settings
from data.scores import exact_match
from data.sft_data import read_sft_data
from data.trajectory import Role
from environments.distilled import EXAMPLES_FILE, read_examples
from speed import flops, libraries
from speed.against import tree_settings
from speed.settings import BenchSettings
from tasks import open_task
from workflows.journal import Journal

TINY = (
    # Runs of subprocesses and of this process are compared byte by byte, on Apple silicon too.
    "--run=tiny --backend=torch --width=64 --layers=2 --base_tokens=120000 --batch_tokens=2000"
    " --coa=500 --cot=40 --pairs=40 --epochs=2 --max_len=200 --rl1_steps=2 --rl2_steps=2"
    " --questions=6 --rollouts=3 --rl_questions=20 --eval_questions=4"
    " --world_model_width=64 --world_model_layers=2 --sweep_share=0.05 --world_model_epochs=3"
).split()
STAGES = ("base", "sft1", "sft2", "sft3", "rl1", "rl2")
MODEL_FILES = {
    "checksums.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "log.jsonl",
}
SETS = {"single", "typed", "bridge", "compare", "chain", "compose"}
ROWS = [
    "model only (at once)",
    "model only",
    "retrieve-then-read",
    "oracle passages",
    "ReAct workflow",
    "SFT-1",
    "SFT-1&2",
    "SFT-1&2&3",
    "SFT-1&2&3+RL-1",
    "SFT-1&2&3+RL-1&2",
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return one run of everything: its folder, and what each script printed.

    Only the first script is told the settings; the run remembers them for the others.
    """
    cwd = tmp_path_factory.mktemp("user")
    scripts = {"train_sft": run_in_shell(cwd, "train_sft.py", *TINY, timeout=600)}
    for name in ("train_rl", "eval", "plot"):
        scripts[name] = run_in_shell(cwd, f"{name}.py", "--run=tiny", timeout=600)
    failures = [(name, done.err[-2000:]) for name, done in scripts.items() if done.status]
    assert failures == []
    return SimpleNamespace(cwd=cwd, root=cwd / "out" / "tiny", **scripts)


@pytest.fixture
def copied_run(whole_run: Any, tmp_path: Path) -> Any:
    """Return a folder with a copy of the run, to change."""
    shutil.copytree(whole_run.root, tmp_path / "out" / "tiny")
    return SimpleNamespace(cwd=tmp_path, root=tmp_path / "out" / "tiny")


def succeed(cwd: Path, script: str, *arguments: Any) -> Any:
    """Run a script that must succeed, and return what it printed."""
    done = run_here(cwd, script, *arguments)
    assert done.status == 0, done.err
    return done.out


# ---- folders and files ---------------------------------------------------------------------------
def test_nothing_is_left_over(whole_run: Any) -> None:
    """All stages and files, nothing partial, and nothing written elsewhere.

    RL-1 is in a distilled environment, so RL-2 alone has calls of the tool.
    """
    assert [path.name for path in whole_run.cwd.iterdir()] == ["out"]
    expected = {
        *STAGES,
        "world_model",
        "data",
        "eval.json",
        "known.json",
        "predictions.jsonl",
        "figures",
        "settings.json",
    }
    assert {path.name for path in whole_run.root.iterdir()} == expected
    for stage in STAGES:
        files = MODEL_FILES | {"rollouts.jsonl"}
        if stage == "rl2":
            files = files | {"calls.jsonl"}
        assert {path.name for path in (whole_run.root / stage).iterdir()} == files
    files = {path.name for path in (whole_run.root / "world_model").iterdir()}
    assert files == MODEL_FILES | {COST_FILE, EXAMPLES_FILE}
    # In a file a progress bar is a line now and then.
    for script in (whole_run.train_sft, whole_run.train_rl, whole_run.eval):
        assert script.err.count("\r") < 60


def test_a_run_remembers_its_settings(whole_run: Any) -> None:
    """Each stage was trained with what the first command was given, and that is recorded."""
    record = strict_json((whole_run.root / "settings.json").read_text())
    assert record["given"]["coa"] == 500
    supervised = ["base", "data", "sft1", "sft2", "sft3"]
    assert list(record["stages"]) == [*supervised, "world_model", "rl1", "rl2"]
    assert record["stages"]["world_model"]["settings"]["world_model_width"] == 64
    assert record["stages"]["rl1"]["settings"]["questions"] == 6
    assert record["stages"]["rl1"]["settings"]["max_len"] == 200
    assert len(read_rows(whole_run.root / "rl1" / "log.jsonl")) == 2


@pytest.mark.parametrize("stage", [*STAGES, "world_model"])
def test_a_stage_loads_in_transformers(whole_run: Any, stage: Any) -> None:
    """With the same logits and the same tokens as in this project."""
    folder = whole_run.root / stage
    lm = model.load(folder, CPU)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    text = " Who directed it?<think> so<begin_search> Eva</end_search>"
    ids = AutoTokenizer.from_pretrained(folder).encode(text, return_tensors="pt")
    assert lm.codec.search_id in ids
    with torch.no_grad():
        logits = lm.network.logits(lm.network(ids))
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_each_stage_moves_the_weights(whole_run: Any) -> None:
    """Guards: a stage that saves what it was given.

    So small a base model may leave SFT-1 without a pair to learn from.
    """
    weights = {}
    for stage in STAGES:
        network = model.load(whole_run.root / stage, CPU).network
        weights[stage] = network.model.layers[0].mlp.up_proj.weight
    for before, after in itertools.pairwise(STAGES[1:]):
        assert not torch.equal(weights[before], weights[after]), after


# ---- logs and samples ----------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["base", "sft2", "sft3", "world_model"])
def test_logs_of_supervised_stages(whole_run: Any, stage: str) -> None:
    """A line a step, finite figures, and a loss that falls."""
    log = read_rows(whole_run.root / stage / "log.jsonl")
    assert [row["step"] for row in log] == list(range(len(log)))
    assert len(log) > 10
    keys = {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds"}
    for row in log:
        assert keys <= set(row)
        assert all(math.isfinite(value) for value in row.values())
    losses = [row["loss"] for row in log]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("stage", ["rl1", "rl2"])
def test_logs_of_rl(whole_run: Any, stage: str) -> None:
    """What RL is watched by: reward, KL, entropy, lengths, actions, skipped groups, speed."""
    keys = {
        "step",
        "loss",
        "grad_norm",
        "reward",
        "em",
        "kl",
        "entropy",
        "length",
        "actions",
        "malformed",
        "forced",
        "skipped_groups",
        "real_calls",
        "distinct_calls",
        "tokens_per_second",
        "seconds_rollout",
        "seconds_update",
        "seconds",
    }
    log = read_rows(whole_run.root / stage / "log.jsonl")
    assert len(log) == 2
    for row in log:
        assert keys <= set(row)
        assert all(math.isfinite(row[key]) for key in keys)
        assert 0 <= row["skipped_groups"] <= 6
        assert 0 <= row["malformed"] <= 1
        assert row["kl"] >= 0
        assert row["entropy"] > 0


def test_calls_of_the_tool_are_counted(whole_run: Any) -> None:
    """None in RL-1, and in RL-2 those of its rollouts, of which calls.jsonl has each."""
    for row in read_rows(whole_run.root / "rl1" / "log.jsonl"):
        assert (row["real_calls"], row["distinct_calls"]) == (0, 0)
    log = read_rows(whole_run.root / "rl2" / "log.jsonl")
    calls = read_rows(whole_run.root / "rl2" / "calls.jsonl")
    for row in log:
        made = [call for call in calls if call["step"] <= row["step"]]
        assert row["real_calls"] == sum(call["raw_calls"] for call in made)
        assert row["distinct_calls"] == sum("text" in call for call in made)
    # Each rollout's actions are searches here, but for a few that call another tool.
    actions = 18 * sum(row["actions"] for row in log)
    assert 0.8 * actions < log[-1]["real_calls"] <= actions
    assert 0 < log[-1]["distinct_calls"] <= log[-1]["real_calls"]
    line = f"rl2: {log[-1]['real_calls']} searches were answered by the tool, "
    assert f"{line}{log[-1]['distinct_calls']} different ones" in whole_run.train_rl.out


def test_what_a_world_model_cost(whole_run: Any) -> None:
    """Calls of the sweep and of the held-out searches, tokens, and how well it imitates."""
    folder = whole_run.root / "world_model"
    cost = strict_json((folder / COST_FILE).read_text())
    assert cost["sources"] == ["sweep"]
    assert len(read_examples(folder)) == len(read_rows(folder / EXAMPLES_FILE)) == cost["examples"]
    assert cost["calls"] == cost["examples"] + len(cost["held_out"])
    assert f"out/tiny/world_model: {cost['calls']:,} calls of the tool" in whole_run.train_rl.out
    log = read_rows(folder / "log.jsonl")
    # Three passes.
    assert sum(row["tokens"] for row in log) == pytest.approx(3 * cost["tokens"], rel=0.02)
    for call in cost["held_out"]:
        assert call["entropy"] > 0
    exact = [call["is_exact"] for call in cost["held_out"]]
    assert cost["exact_on_held_out"] == pytest.approx(np.mean(exact))
    assert 0 <= cost["exact_on_learned"] <= 1
    assert cost["seconds_of_training"] > 0


def test_a_stage_says_what_a_step_takes(whole_run: Any) -> None:
    """By its first two steps, as they were logged."""
    printed = whole_run.train_sft.out + whole_run.train_rl.out
    for stage in STAGES:
        log = read_rows(whole_run.root / stage / "log.jsonl")
        pattern = (
            rf"^{stage}: ([\d.]+) s a step by the first two, [\d.]+ minutes for the other (\d+)$"
        )
        found = re.findall(pattern, printed, re.M)
        assert [int(left) for _, left in found] == [len(log) - 2] * (len(log) > 1)
        for seconds, _ in found:
            assert float(seconds) == pytest.approx(log[1]["seconds"] / 2, rel=0.2, abs=0.03)


def test_rollouts_are_whole(whole_run: Any) -> None:
    """Samples have ids, roles, masks and tokens of one length; the tokens are the text."""
    acted = 0
    for stage in STAGES:
        samples = read_rows(whole_run.root / stage / "rollouts.jsonl")
        assert samples
        for row in samples:
            length = len(row["ids"])
            assert length == len(row["role"]) == len(row["mask"]) == len(row["tokens"]) <= 200
            assert "".join(row["tokens"]) == row["text"]
            assert row["question"] in row["text"]
            assert row["golden_answers"]
            for mask, role in zip(row["mask"], row["role"], strict=True):
                if role in (Role.PROMPT, Role.OBSERVATION):
                    assert mask == 0
            acted += Role.OBSERVATION in row["role"]
    assert acted > 0
    steps = [row["step"] for row in read_rows(whole_run.root / "rl1" / "rollouts.jsonl")]
    assert steps == [0, 0, 0, 1, 1, 1]


def test_sft_data_is_what_it_says(whole_run: Any) -> None:
    """The kept ids build the teacher's chains: chains of action act, chains of thought do not."""
    codec = model.load(whole_run.root / "base", CPU).codec
    data = read_sft_data(whole_run.root / "data")
    actions = data.chains_of_action
    assert len(actions) > 250
    assert all(codec.is_well_formed(chain) for chain in actions + data.chains_of_thought)
    acting = sum(codec.search_id in chain.ids for chain in actions)
    assert acting > 0.9 * len(actions)
    assert not any(codec.search_id in chain.ids for chain in data.chains_of_thought)
    assert len(data.pairs) <= 40


# ---- evaluation ----------------------------------------------------------------------------------
def test_eval_ends_with_one_json_line(whole_run: Any) -> None:
    """Rows named as in the paper's table, six sets and their average; the file holds the same."""
    result = strict_json(whole_run.eval.out.splitlines()[-1])
    assert set(result) >= {"rows", "model", "seed", "seconds"}
    assert result["seed"] == 0
    assert list(result["rows"]) == ROWS
    for row in result["rows"].values():
        average = row["avg"]
        sets = {name: figures for name, figures in row.items() if name != "avg"}
        assert set(sets) == SETS
        for figure in ("em", "f1"):
            mean = np.mean([figures[figure] for figures in sets.values()])
            assert average[figure] == pytest.approx(mean)
        assert average["em_low"] <= average["em"] <= average["em_high"]
        assert {"actions", "malformed", "search_known", "search_unknown"} <= set(average)
    assert strict_json((whole_run.root / "eval.json").read_text()) == result
    assert "older than" not in whole_run.eval.out
    assert all(name in whole_run.eval.out for name in ROWS)


def test_figures_of_the_table_are_its_predictions(whole_run: Any) -> None:
    """EM and actions again from predictions.jsonl; every row answers the same questions."""
    result = json.loads(whole_run.eval.out.splitlines()[-1])["rows"]
    predictions = read_rows(whole_run.root / "predictions.jsonl")
    questions = {
        row: [record["question"] for record in predictions if record["row"] == row] for row in ROWS
    }
    assert len(questions["model only"]) == 24
    assert all(asked == questions["model only"] for asked in questions.values())
    for row in ROWS:
        for name in ("single", "chain"):
            records = [
                record for record in predictions if (record["row"], record["set"]) == (row, name)
            ]
            scores = [exact_match(record["answer"], record["golden_answers"]) for record in records]
            assert result[row][name]["em"] == pytest.approx(100 * np.mean(scores))
            calls = [len(record["queries"]) for record in records]
            assert result[row][name]["actions"] == pytest.approx(np.mean(calls))


def test_no_composition_of_evaluation_is_learned(whole_run: Any) -> None:
    """The questions of the set `compose` are in none of the chains."""
    codec = model.load(whole_run.root / "base", CPU).codec
    chains = read_sft_data(whole_run.root / "data").chains_of_action
    learned = "\n".join(codec.decode(chain.ids) for chain in chains)
    predictions = read_rows(whole_run.root / "predictions.jsonl")
    composed = {record["question"] for record in predictions if record["set"] == "compose"}
    assert composed
    assert not any(question in learned for question in composed)


def test_seeds_are_pooled(copied_run: Any) -> None:
    """--compare over two runs gives the mean of their gains; a row that is not there is named."""
    out = copied_run.cwd / "out"
    for run in ("a", "b"):
        shutil.copytree(copied_run.root, out / run)
    lines = read_rows(copied_run.root / "predictions.jsonl")
    changed = [{**record, "em": 1.0} if record["row"] == "SFT-1&2" else record for record in lines]
    text = "".join(json.dumps(record) + "\n" for record in changed)
    (out / "b" / "predictions.jsonl").write_text(text)
    printed = succeed(copied_run.cwd, "eval.py", "--compare=SFT-1&2,model only", "--runs=a,b")
    # All sets are of one size.
    em = {
        row: np.mean([record["em"] for record in lines if record["row"] == row])
        for row in ("SFT-1&2", "model only")
    }
    found = strict_json(printed.splitlines()[-1])
    gain = 100 * ((em["SFT-1&2"] + 1) / 2 - em["model only"])
    assert found["gain"] == pytest.approx(gain, abs=0.01)
    assert found["gain_low"] <= found["gain"] <= found["gain_high"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("SFT-1&2,nothing", "no row 'nothing'"),
        ("SFT-1&2,SFT-1&2", "two rows are needed"),
    ],
)
def test_rows_that_cannot_be_compared(whole_run: Any, rows: str, message: str) -> None:
    """One line says why."""
    done = run_here(whole_run.cwd, "eval.py", f"--compare={rows}", "--runs=tiny")
    assert done.status == 2
    assert message in done.err


def test_predictions_that_are_none(copied_run: Any) -> None:
    """The line is named."""
    (copied_run.root / "predictions.jsonl").write_text('{"set": "single"}\n')
    done = run_here(copied_run.cwd, "eval.py", "--compare=SFT-1&2,model only", "--runs=tiny")
    assert done.status == 2
    assert "out/tiny/predictions.jsonl:1: not a prediction" in done.err


def test_a_stage_older_than_its_start_is_said(copied_run: Any) -> None:
    """SFT-3 trained again, RL not: the table would compare two runs, and says so of rl1 alone."""
    later = time.time() + 9
    os.utime(copied_run.root / "sft3" / "config.json", (later, later))
    printed = succeed(copied_run.cwd, "eval.py", "--run=tiny", "--eval_questions=1")
    found = re.findall(r"out/tiny/(\w+) is older than out/tiny/(\w+)", printed)
    assert found == [("rl1", "sft3")]
    # Where there is nothing to compare with, there is no complaint.
    shutil.rmtree(copied_run.root / "sft1")
    succeed(copied_run.cwd, "eval.py", "--run=tiny", "--eval_questions=1")


def test_pictures(whole_run: Any) -> None:
    """Every picture is drawn and printed by its path; the viewer escapes what a model wrote."""
    figures = {path.name: path for path in (whole_run.root / "figures").iterdir()}
    needed = {"training.png", "table.png", "trajectories.html"}
    assert needed <= set(figures) <= {*needed, "search.png", "actions.png"}
    for name, path in figures.items():
        assert path.stat().st_size > 1000
        assert f"out/tiny/figures/{name}" in whole_run.plot.out
        assert path.suffix == ".html" or path.read_bytes()[:4] == b"\x89PNG"
    page = figures["trajectories.html"].read_text()
    assert "&lt;begin_search&gt;" in page
    assert "<begin_search>" not in page
    assert 'class="observation' in page


def test_ask_one_question(whole_run: Any) -> None:
    """`--ask` answers with the last stage that is there; a question can't steer the terminal."""
    question = "Who directed \x1b[2J\u202eSilver River?"
    printed = succeed(whole_run.cwd, "autocoa.py", "--run=tiny", f"--ask={question}")
    assert r"Who directed \x1b[2J\u202eSilver River?<think>" in printed
    assert not set(printed) & {"\x1b", "\u202e"}
    assert "answer:" in printed
    assert "rl2" in printed


# ---- again, and on from where it stopped ---------------------------------------------------------
def test_a_stage_again_is_the_same(copied_run: Any) -> None:
    """The same start and seed: the same losses and weights, in the folder of a sweep.

    It is evaluated and tabulated, and the same command keeps all of it.
    """
    arguments = ["--run=tiny", "--stage=rl1", "--eval_questions=1", "--sweep=kl=0"]
    printed = succeed(copied_run.cwd, "train_rl.py", *arguments)
    # The world model is the one that is there.
    assert "world_model" not in printed
    folders = [copied_run.root / stage for stage in ("rl1", "rl1_kl=0")]
    logs = [read_rows(folder / "log.jsonl") for folder in folders]
    first, again = ([(row["loss"], row["reward"]) for row in log] for log in logs)
    assert first == again
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]

    table = (copied_run.root / "sweep_rl1_kl=0.md").read_text()
    predictions = read_rows(folders[1] / "predictions.jsonl")
    assert len(predictions) == len(SETS)
    em = 100 * np.mean([prediction["em"] for prediction in predictions])
    assert f"| 0 | {em:.1f} (" in table
    saved_at = (folders[1] / "config.json").stat().st_mtime_ns
    printed = succeed(copied_run.cwd, "train_rl.py", *arguments)
    assert "rl1_kl=0: in out/tiny already" in printed
    assert (folders[1] / "config.json").stat().st_mtime_ns == saved_at
    assert (copied_run.root / "sweep_rl1_kl=0.md").read_text() == table


def test_rl2_alone_is_the_rl2_of_the_whole_command(copied_run: Any) -> None:
    """The same bytes, at the default size of the pools.

    Guards: RL-2 asked other questions where RL-1's had not been drawn before its own.
    """
    succeed(copied_run.cwd, "train_rl.py", "--run=tiny", "--rl_questions=4608")
    arguments = ["--run=tiny", "--rl_questions=4608", "--stage=rl2", "--out=again"]
    succeed(copied_run.cwd, "train_rl.py", *arguments)
    for file in ("model.safetensors", "rollouts.jsonl"):
        first, again = (copied_run.root / stage / file for stage in ("rl2", "again"))
        assert first.read_bytes() == again.read_bytes(), file


def test_an_interrupted_run_goes_on(
    whole_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while SFT's data is made, SFT-1 makes the same data from base, and the same weights.

    What the base model has answered is not asked again.
    """
    root = tmp_path / "out" / "tiny"
    shutil.copytree(whole_run.root / "base", root / "base")
    keep = Journal._keep
    asked: list[str] = []

    def keep_and_stop(self: Any, kind: str, questions: list[str], answers: list[str]) -> None:
        keep(self, kind, questions, answers)
        raise KeyboardInterrupt

    def keep_and_note(self: Any, kind: str, questions: list[str], answers: list[str]) -> None:
        keep(self, kind, questions, answers)
        asked.extend(f"{kind}: {question}" for question in questions)

    monkeypatch.setattr(Journal, "_keep", keep_and_stop)
    assert run_here(tmp_path, "train_sft.py", *TINY, "--stage=sft1").status != 0
    (kept,) = read_rows(root / "data" / DATA_JOURNAL)
    assert len(kept["questions"]) == 256
    monkeypatch.setattr(Journal, "_keep", keep_and_note)
    succeed(tmp_path, "train_sft.py", *TINY, "--stage=sft1", "--resume")
    assert not {f"{kept['kind']}: {question}" for question in kept["questions"]} & set(asked)
    assert not (root / "data" / DATA_JOURNAL).exists()
    files = ("data/coa.jsonl", "data/cot.jsonl", "data/pairs.jsonl", "sft1/model.safetensors")
    for file in files:
        assert (root / file).read_bytes() == (whole_run.root / file).read_bytes(), file


@pytest.fixture
def saves_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage save a checkpoint after each step."""
    monkeypatch.setattr(stage_files, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(stage_files, "SHARE_OF_SAVING", 1.0)


@contextlib.contextmanager
def stopped_after(monkeypatch: pytest.MonkeyPatch, steps_kept: int) -> Iterator[None]:
    """Stop a stage after a step; one more is trained and logged, and not kept."""
    save_if_due = runs.Checkpoint.save_if_due

    def stop(self: Any, steps: int) -> None:
        if steps > steps_kept:
            raise KeyboardInterrupt
        save_if_due(self, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Checkpoint, "save_if_due", stop)
        yield


@pytest.mark.parametrize(
    ("script", "settings_class", "stage", "stop_after"),
    [
        (train_sft, train_sft.SFTSettings, "sft2", 7),
        (train_rl, train_rl.RLSettings, "rl1", 1),
        (train_rl, train_rl.RLSettings, "rl2", 1),
    ],
)
def test_a_stage_goes_on_from_its_checkpoint(
    whole_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saves_each_step: None,
    script: Any,
    settings_class: Any,
    stage: str,
    stop_after: int,
) -> None:
    """Stopped inside a stage, --resume ends with the weights, log and rollouts of a whole run."""
    root = tmp_path / "out" / "tiny"
    for name in ("data", "world_model", *STAGES[: STAGES.index(stage)]):
        shutil.copytree(whole_run.root / name, root / name)
    shutil.copy(whole_run.root / "settings.json", root / "settings.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--run=tiny", "--resume"])
    with stopped_after(monkeypatch, stop_after):
        script.run(read_settings(settings_class, "doc"))
    assert not (root / stage).exists()
    partial_log = read_rows(root / f"{stage}.partial" / "log.jsonl")
    assert len(partial_log) == stop_after + 1

    script.run(read_settings(settings_class, "doc"))
    for file in (MODEL_FILES | {"rollouts.jsonl"}) - {"log.jsonl"}:
        assert (root / stage / file).read_bytes() == (whole_run.root / stage / file).read_bytes()
    logs = [read_rows(folder / stage / "log.jsonl") for folder in (root, whole_run.root)]
    resumed, whole = ([(row["step"], row["loss"]) for row in log] for log in logs)
    assert resumed == whole
    assert not list(root.glob("*.checkpoint"))
    assert not list(root.glob("*.partial"))


@pytest.mark.slow
def test_a_mixed_stage_goes_on_with_its_counts(
    copied_run: Any, monkeypatch: pytest.MonkeyPatch, saves_each_step: None
) -> None:
    """Stopped and resumed it ends with the weights, calls and counts of a whole stage.

    By confidence, with a budget, and with a loss on what the tool said.
    """
    monkeypatch.chdir(copied_run.cwd)
    arguments = [
        "--run=tiny",
        "--stage=rl1",
        "--rl1_environment=mixed",
        "--real_share=0.4",
        "--max_real_calls=12",
        "--observation_coef=0.1",
    ]
    succeed(copied_run.cwd, "train_rl.py", *arguments, "--out=whole")
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--out=resumed", "--resume"])
    with stopped_after(monkeypatch, 1):
        train_rl.run(read_settings(train_rl.RLSettings, "doc"))
    train_rl.run(read_settings(train_rl.RLSettings, "doc"))

    whole = copied_run.root / "whole"
    resumed = copied_run.root / "resumed"
    for file in ("model.safetensors", "rollouts.jsonl", "calls.jsonl"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file
    counts = []
    for folder in (whole, resumed):
        log = read_rows(folder / "log.jsonl")
        counts.append([(row["real_calls"], row["distinct_calls"], row["loss"]) for row in log])
    assert counts[0] == counts[1]
    calls = read_rows(whole / "calls.jsonl")
    raw_calls = sum(row["raw_calls"] for row in calls)
    distinct_calls = sum("text" in row for row in calls)
    assert (raw_calls, distinct_calls) == counts[0][-1][:2]
    assert 0 < raw_calls <= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_real_calls=5"], "--max_real_calls: only a mixed environment"),
        (["--rl1_pool=rl1"], "--rl1_pool=rl1: its questions are about SFT's world"),
        (
            ["--seed=5"],
            "--seed: out/tiny/world_model was distilled with 0; repeat that, or have another one "
            "distilled: --world_model=NAME",
        ),
        (["--top_k=1"], "--top_k: out/tiny/world_model was distilled with "),
        (["--sweep_share=0.4"], "--sweep_share: out/tiny/world_model was distilled with "),
        (["--sources=logs"], "--sources: out/tiny/world_model was distilled with ['sweep']"),
        (["--world_model_width=32"], "--world_model_width: out/tiny/world_model was distilled wi"),
        (["--world_model=sft2"], "--world_model: out/tiny/sft2 holds a stage of the run"),
    ],
)
def test_environments_that_are_refused(copied_run: Any, arguments: list[str], message: str) -> None:
    """One line says why, and nothing is trained, written or removed."""
    (copied_run.root / "rl1.checkpoint").mkdir()
    before = sorted(copied_run.cwd.rglob("*"))
    record = (copied_run.root / "settings.json").read_bytes()
    done = run_here(copied_run.cwd, "train_rl.py", "--run=tiny", *arguments)
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert message in line
    assert sorted(copied_run.cwd.rglob("*")) == before
    assert (copied_run.root / "settings.json").read_bytes() == record


def test_a_world_model_of_logged_calls(copied_run: Any) -> None:
    """RL-2's calls are what it learns from; only the searches that calibrate it are made."""
    arguments = ["--run=tiny", "--sources=logs", "--world_model=from_logs"]
    printed = succeed(copied_run.cwd, "world_model.py", "distill", *arguments)
    cost = strict_json((copied_run.root / "from_logs" / COST_FILE).read_text())
    calls = read_rows(copied_run.root / "rl2" / "calls.jsonl")
    assert cost["examples"] == len({call["query"] for call in calls})
    assert cost["calls"] == len(cost["held_out"])
    assert "out/tiny/from_logs" in printed
    # It has another name than the run's own, which stays.
    assert (copied_run.root / "world_model" / COST_FILE).is_file()


@pytest.mark.parametrize(
    ("script", "arguments", "name"),
    [
        ("train_rl.py", ["--stage=rl1"], "rl1"),
        ("train_sft.py", ["--stage=sft2", "--start=base", "--out=sft1"], "sft1"),
    ],
)
def test_resume_of_one_stage(copied_run: Any, script: str, arguments: list[str], name: str) -> None:
    """With --resume a stage that is complete is not trained again."""
    config = copied_run.root / "rl1" / "config.json"
    saved_at = config.stat().st_mtime_ns
    printed = succeed(copied_run.cwd, script, "--run=tiny", *arguments, "--resume")
    assert f"{name}: in out/tiny already" in printed
    assert config.stat().st_mtime_ns == saved_at


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage=sft2", "--coa=7"], "--coa: .*made with another value"),
        (["--stage=sft2", "--max_len=20"], "max_len: .*raise --max_len"),
        (["--stage=base", "--out=base2"], "--out: a run has one base"),
        (
            ["--stage=sft2", "--start=lora", "--lora_rank=8"],
            "--lora_rank=8: .* an adapter with rank 4",
        ),
        (["--stage=sft2", "--seed=5"], "--seed: .*made with another value"),
    ],
)
def test_refusals_come_first(copied_run: Any, arguments: list[str], message: str) -> None:
    """What can be refused is refused before anything is removed."""
    lm = model.load(copied_run.root / "base", CPU)
    lm.begin_stage(train_sft.SFTSettings(device="cpu", lora_rank=4), seed=0)
    lm.save(copied_run.root / "lora")
    (copied_run.root / "sft2.checkpoint").mkdir()
    before = sorted(copied_run.cwd.rglob("*"))
    done = run_here(copied_run.cwd, "train_sft.py", "--run=tiny", *arguments)
    assert done.status == 2
    assert re.search(message, done.err)
    assert sorted(copied_run.cwd.rglob("*")) == before


def test_a_teacher_that_solved_nothing(copied_run: Any) -> None:
    """Guards: stages that learned from no chain, and were saved and judged without a word."""
    for name in ("coa", "cot"):
        (copied_run.root / "data" / f"{name}.jsonl").write_text("")
    (copied_run.root / "data" / CHECKSUMS_FILE).unlink()
    done = run_here(copied_run.cwd, "train_sft.py", "--run=tiny", "--stage=sft2", "--out=x")
    assert done.status == 2
    assert "out/tiny/data holds no chain, so SFT-2 and SFT-3 have nothing to learn" in done.err
    assert not (copied_run.root / "x").exists()


def test_a_checkpoint_of_other_settings(whole_run: Any, tmp_path: Path) -> None:
    """Another optimizer or another network is named, with the way out; the checkpoint stays."""
    lm = model.load(whole_run.root / "base", CPU)
    lm.save(tmp_path / "x", torch_backend.Optimizer(lm.network, muon=True))
    with pytest.raises(UserError, match=r"not this optimizer's state.*or remove"):
        lm.resume(tmp_path / "x", torch_backend.Optimizer(lm.network, muon=False))
    other = tiny_lm(lm.codec, width=96)
    with pytest.raises(UserError, match=r"another network.*or remove"):
        other.resume(tmp_path / "x", torch_backend.Optimizer(other.network))
    assert (tmp_path / "x" / "optimizer.safetensors").is_file()


def test_too_long_trajectories_are_reported(
    whole_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chains over max_len: none is cut, and their number is printed with the setting's name."""
    lm = model.load(whole_run.root / "base", CPU)
    settings = train_sft.SFTSettings(device="cpu", coa=200, cot=10, pairs=10, max_len=90)
    journal = Journal(tmp_path / "answers", "w", resume=False, batch_rows=8)
    data = train_sft.make_data(lm, settings, open_task(settings), journal)
    printed = re.search(r"(\d+)[^,;]* max_len", capsys.readouterr().out)
    assert printed
    assert int(printed[1]) > 100
    kept = data.chains
    assert all(lm.codec.is_well_formed(chain) for chain in kept)
    sides = [side for pair in data.pairs for side in pair]
    assert all(len(trajectory.ids) <= 90 for trajectory in kept + sides)


def test_bench(
    copied_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides run, and greedy decoding gives the same text on both; speed is no matter here."""
    monkeypatch.chdir(copied_run.cwd)
    monkeypatch.setattr(flops, "CPU_SIZES", (64,))
    monkeypatch.setattr(libraries, "SFT_STEPS", 1)
    monkeypatch.setattr(libraries, "SAMPLED_TOKENS", 8)
    arguments = ["--run=tiny", "--questions=2", "--rollouts=1", "--repeats=1"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--only=answer,sampling,agents,sft"])
    bench.compare(read_settings(BenchSettings, "doc"))
    printed = capsys.readouterr().out
    assert "1 of 1 texts are the same" in printed
    (row,) = read_rows(copied_run.root / "bench.jsonl")
    names = ["answer", "sampling", "agents", "sft"]
    assert [comparison["name"] for comparison in row["comparisons"]] == names
    assert (copied_run.root / "figures" / "bench.png").is_file()
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--only=sampling,speed"])
    with pytest.raises(UserError, match="--only: 'speed' is not one of answer"):
        bench.compare(read_settings(BenchSettings, "doc"))


def test_bench_against_a_commit_has_the_runs_settings(
    whole_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both trees get what the run remembers, and what the command says.

    Guards: a copy of the settings that forgets what was given.
    """
    monkeypatch.chdir(whole_run.cwd)
    monkeypatch.setattr(bench, "ceiling_of", lambda ours, dtype: 1.0)
    stages = []
    monkeypatch.setattr(bench, "compare_with_commit", lambda ours, report: stages.append(ours))
    monkeypatch.setattr(sys, "argv", ["x", "--run=tiny", "--questions=2", "--against=HEAD"])
    bench.compare(read_settings(BenchSettings, "doc"))
    assert stages[0].folder.name == "sft3"
    given = tree_settings(stages[0].settings)
    assert (given["questions"], given["max_len"]) == (2, 200)
    assert not {"against", "run"} & set(given)


def test_defaults_are_the_paper_counts() -> None:
    """1,500 pairs; 5,000 + 1,000 trajectories, 2 epochs; 80 + 16 steps of 48 x 5 over 4,608.

    The world model is where the defaults depart: a separate network, and a lighter SFT-3.
    """
    sft = train_sft.SFTSettings()
    assert (sft.pairs, sft.coa, sft.cot, sft.epochs, sft.alpha) == (1500, 5000, 1000, 2, 0.2)
    assert (sft.sft3_epochs, sft.sft3_observation_coef) == (1, 0.1)
    rl = train_rl.RLSettings()
    assert (rl.rl1_steps, rl.rl2_steps, rl.questions, rl.rollouts) == (80, 16, 48, 5)
    assert rl.rl_questions == 4608
    assert (rl.rl1_environment, rl.rl2_environment, rl.rl1_pool) == ("distilled", "real", "rl2")
    assert rl.observation_coef == 0
    assert (rl.loss, rl.reward, sft.pair_directions) == ("dapo", "exact_match", "both")


def test_the_paper_recipe_is_a_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT-3 at full weight for two epochs, and a policy that imagines in RL-1, at no cost."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", str(ROOT / "config" / "paper.py")])
    sft = read_settings(train_sft.SFTSettings, "doc")
    assert (sft.sft3_epochs, sft.sft3_observation_coef) == (2, 1)
    rl = read_settings(train_rl.RLSettings, "doc")
    assert (rl.rl1_environment, rl.rl1_pool, rl.rl1_call_cost) == ("internal", "rl1", 0)


# ---- slow ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_scripts_on_mlx(tmp_path: Path) -> None:
    """All scripts on MLX; what one backend trained the other evaluates to the same answers."""
    pytest.importorskip("mlx.core")
    arguments = [*TINY, "--base_tokens=60000", "--coa=100", "--epochs=1", "--eval_questions=3"]
    for script in ("train_sft", "train_rl", "eval"):
        done = run_in_shell(tmp_path, f"{script}.py", *arguments, "--backend=mlx", timeout=600)
        assert done.status == 0, done.err
    done = run_in_shell(
        tmp_path,
        "bench.py",
        *arguments,
        "--backend=mlx",
        "--questions=2",
        "--rollouts=1",
        "--repeats=1",
        timeout=600,
    )
    assert done.status == 0, done.err
    assert "1 of 1 texts are the same" in done.out
    predictions = tmp_path / "out/tiny/predictions.jsonl"
    answers = [record["answer"] for record in read_rows(predictions)]
    succeed(tmp_path, "eval.py", *arguments, "--backend=torch")
    assert [record["answer"] for record in read_rows(predictions)] == answers
    assert len(answers) == 18 * len(ROWS)


@pytest.mark.slow
def test_both_backends_learn_the_same(tmp_path: Path) -> None:
    """The whole pipeline on each backend, eleven minutes for both with MLX on OpenBLAS.

    Losses fall, the reward of RL-2 rises, and the EM of each row lies within the other's interval
    (a row with no right answer has none). Not asserted: SFT-1, for which so small a base has 32
    pairs with --pairs=400, two steps; and RL-1, whose reward rises within a test at rates alone at
    which it forgets to search.
    """
    arguments = (
        "--run=p --width=64 --layers=2 --base_tokens=1800000 --coa=1200 --cot=60 --pairs=60"
        " --epochs=2 --max_len=200 --rl1_steps=8 --rl2_steps=20 --questions=12 --rollouts=4"
        " --rl_questions=192 --rl_lr=7e-5 --call_cost=0 --eval_questions=40"
        " --rl1_environment=internal --rl1_pool=rl1 --rl1_call_cost=0"
        " --sft3_epochs=2 --sft3_observation_coef=1"
    ).split()
    found = {}
    for backend in ("torch", "mlx"):
        pytest.importorskip(backend)
        cwd = tmp_path / backend
        cwd.mkdir()
        for script in ("train_sft", "train_rl", "eval"):
            done = run_in_shell(
                cwd, f"{script}.py", *arguments, f"--backend={backend}", timeout=1800
            )
            assert done.status == 0, done.err
        root = cwd / "out/p"
        for stage, figure, sign in (
            ("base", "loss", -1),
            ("sft2", "loss", -1),
            ("sft3", "loss", -1),
            ("rl2", "reward", 1),
        ):
            values = [sign * row[figure] for row in read_rows(root / stage / "log.jsonl")]
            quarter = len(values) // 4
            assert np.mean(values[-quarter:]) > np.mean(values[:quarter]), (backend, stage)
        found[backend] = strict_json((root / "eval.json").read_text())["rows"]
    compared = 0
    for row in ROWS:
        in_torch = found["torch"][row]["avg"]
        in_mlx = found["mlx"][row]["avg"]
        if in_torch["em"] and in_mlx["em"]:
            assert in_mlx["em_low"] <= in_torch["em"] <= in_mlx["em_high"], row
            assert in_torch["em_low"] <= in_mlx["em"] <= in_torch["em_high"], row
            compared += 1
    assert compared >= 5
    assert found["mlx"]["SFT-1&2"]["avg"]["em"] > 20 + found["mlx"]["model only"]["avg"]["em"]


@pytest.mark.slow
def test_quick_tells_the_story(tmp_path: Path) -> None:
    """`--quick` end to end, about three minutes on two cores: the method shows, weakly.

    What RL gains is less than the noise of 120 questions.
    """
    for script in ("train_sft", "train_rl", "eval", "plot"):
        done = run_in_shell(tmp_path, f"{script}.py", "--quick", timeout=900, threads="2")
        assert done.status == 0, done.err
    result = strict_json((tmp_path / "out/quick/eval.json").read_text())["rows"]
    assert list(result) == ROWS
    average = {name: row["avg"] for name, row in result.items()}
    assert average["model only"]["em"] < 20
    assert average["SFT-1&2&3"]["em"] > average["ReAct workflow"]["em"] + 10
    last = average["SFT-1&2&3+RL-1&2"]
    assert last["em"] > average["SFT-1&2&3"]["em"] - 5
    assert last["malformed"] < 5
    assert average["SFT-1&2"]["search_unknown"] > 0.8
    assert average["model only"]["actions"] == 0
