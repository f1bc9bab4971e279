"""This tree beside another commit; the scripts of both are a few lines in a git repository."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import read_rows

from common.errors import UserError
from common.settings import build_settings
from model import LM
from speed import against, trees
from speed.against import CHAINS, compare_with_commit
from speed.ours import Ours
from speed.pairs import Comparison
from speed.settings import BenchSettings
from speed.trees import StepRow, Tree

# A script of either side. It says what it was given, and logs steps or makes a table. The names
# in capitals are written above it.
SCRIPT = """
import json, pathlib, sys, time

if "--help" in sys.argv:
    print(KNOWN)
    sys.exit()
name = pathlib.Path(sys.argv[0]).name
given = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
root = pathlib.Path("out", given["run"])
chains = root / "data" / "coa.jsonl"
lines = len(chains.read_text().splitlines()) if chains.is_file() else 0
with open(CALLS, "a") as calls:
    print(json.dumps({"side": SIDE, "script": name, "given": given, "chains": lines}), file=calls)
if "start" in given:
    assert (root / given["start"] / "config.json").is_file()
    folder = root / given["out"]
    folder.mkdir()
    for step in range(3):
        row = {"seconds": 50 + step * SECONDS, "tokens": TOKENS, "length": 10.0}
        row |= {"policy_tokens": 5.0, "skipped_groups": 0}
        with open(folder / "log.jsonl", "a") as log:
            print(json.dumps(row), file=log)
if name == "eval.py":
    root.mkdir(parents=True, exist_ok=True)
    average = {"em": EM, "em_low": EM - 2, "em_high": EM + 3}
    rows = {"model only": {"avg": {"em": 1.0}}, "the last": {"avg": average}}
    (root / "eval.json").write_text(json.dumps({"rows": rows}))
while time.process_time() < CPU_SECONDS:
    pass
"""
KNOWN = (
    "--run --stage --start --out --rl1_steps --rl2_steps --rl2_environment --temperature --dtype"
)


def write_scripts(folder: Path, **values: Any) -> None:
    """Write all scripts of one side."""
    text = "".join(f"{name.upper()} = {value!r}\n" for name, value in values.items()) + SCRIPT
    for name in ("train_sft.py", "train_rl.py", "eval.py", "plot.py"):
        (folder / name).write_text(text)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file in which the scripts of both sides say what they were given.

    The commit's steps take twice as long as this tree's for four times as many tokens.
    """
    monkeypatch.chdir(tmp_path)
    calls = tmp_path / "calls.jsonl"
    code = tmp_path / "code"
    code.mkdir()
    common = {"known": KNOWN, "calls": str(calls)}
    write_scripts(code, side="theirs", seconds=4, tokens=400, em=30.0, cpu_seconds=0.2, **common)
    for arguments in ("init --quiet", "add .", "commit --quiet --message=First"):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", code, *identity, *arguments.split()], check=True)
    # What is changed here is measured as it is, and this tree knows one setting more.
    common["known"] += " --call_cost"
    write_scripts(code, side="ours", seconds=2, tokens=100, em=40.0, cpu_seconds=0.0, **common)
    monkeypatch.setattr(trees, "ROOT", code)
    monkeypatch.setattr(against, "ROOT", code)
    for stage in ("base", "sft1", "sft3"):
        folder = tmp_path / "out" / "tiny" / stage
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "out" / "tiny" / "data").mkdir()
    for name in trees.DATA_FILES:
        (tmp_path / "out" / "tiny" / "data" / name).write_text("{}\n" * (CHAINS + 5))
    return calls


def compare(lm: LM, **given: Any) -> list[Comparison]:
    """Compare a tiny run with the commit."""
    given = {"run": "tiny", "against": "HEAD", "repeats": 2, "questions": 2, **given}
    settings = build_settings(BenchSettings, given)
    found: list[Comparison] = []
    compare_with_commit(Ours(lm, Path("out", "tiny", "sft3"), settings), found.append)
    return found


def given_to(calls: Iterable[Any], side: str, **wanted: str) -> list[dict[str, str]]:
    """Return what a side's scripts were given, in the calls that were given what is wanted."""
    return [
        call["given"]
        for call in calls
        if call["side"] == side and call["given"].items() >= wanted.items()
    ]


def test_stages_of_two_commits(lm: LM, calls: Path) -> None:
    """Each side runs its own scripts in turns, on the stage that is timed and a part of its data.

    Guards: a setting that the commit does not know, the other side's number type given to both, and
    the same scripts on both sides.
    """
    rl2, rl1, sft = compare(lm, temperature=0.5, call_cost=0.2, other_dtype="bfloat16")
    assert [rl2.name, rl1.name, sft.name] == ["rl2", "rl1", "sft"]
    # By the step theirs takes twice as long, by the token half as long.
    assert [one.ratio.median for one in (rl2, rl1, sft)] == [2.0, 2.0, 0.5]
    assert rl2.note == "100 and 400 tokens a step; by the token 0.50"
    assert sft.note == "100 and 400 tokens a step"
    made = read_rows(calls)
    assert [call["side"] for call in made] == ["ours", "theirs"] * 6
    common = {"run": "bench", "out": "timed", "temperature": "0.5"}
    stage = {"stage": "rl2", "start": "sft3", "rl1_steps": "0", "rl2_steps": "3"}
    ours = common | stage | {"rl2_environment": "real", "call_cost": "0.2"}
    theirs = common | stage | {"rl2_environment": "real", "dtype": "bfloat16"}
    assert given_to(made, "ours", stage="rl2") == [ours] * 2
    assert given_to(made, "theirs", stage="rl2") == [theirs] * 2
    (first, _) = given_to(made, "theirs", stage="rl1")
    assert (first["start"], first["rl1_steps"]) == ("sft3", "3")
    (first, _) = given_to(made, "theirs", stage="sft2")
    assert first["start"] == "sft1"
    assert [call["script"] for call in made] == ["train_rl.py"] * 8 + ["train_sft.py"] * 4
    assert {call["chains"] for call in made} == {CHAINS}


def test_the_whole_story_of_two_commits(lm: LM, calls: Path) -> None:
    """All scripts of each side, from nothing, by their CPU seconds and their last row's EM."""
    (whole,) = compare(lm, only=["whole"], repeats=1)
    made = read_rows(calls)
    scripts = ["train_sft.py", "train_rl.py", "eval.py", "plot.py"]
    assert [call["script"] for call in made] == scripts * 2
    assert [call["side"] for call in made] == ["ours"] * 4 + ["theirs"] * 4
    assert {call["given"]["run"] for call in made} == {"whole"}
    assert {call["chains"] for call in made} == {0}
    ((ours, theirs),) = whole.pairs
    # Each of theirs works for 0.2 seconds.
    assert 0 < ours.seconds < 0.8 < theirs.seconds
    assert (
        whole.note == "CPU seconds; EM of the last row: 40.0 (38.0 to 43.0) and 30.0 (28.0 to 33.0)"
    )


def test_an_unknown_name_is_refused(lm: LM, calls: Path) -> None:
    with pytest.raises(UserError, match="--only: 'rl3' is not one of rl2, rl1, sft, whole"):
        compare(lm, only=["rl2", "rl3"])
    assert not calls.exists()


def test_by_the_token_is_a_median_over_pairs(
    lm: LM, monkeypatch: pytest.MonkeyPatch, calls: Path
) -> None:
    """The other side's rollouts grow from pair to pair, and so do its seconds.

    Guards: the ratio of one pair by the tokens of another.
    """
    # (seconds of a step, tokens of a step) of each run.
    steps = {"ours": [(1, 100)] * 3, "theirs": [(1, 100), (4, 200), (9, 300)]}

    def run_stage(name: str, tree: Tree, start: str) -> list[StepRow]:
        seconds, tokens = steps[tree.folder.name].pop(0)
        values = {"length": 10.0, "policy_tokens": 5.0, "skipped_groups": 0}
        return [StepRow(7.0 + seconds * step, tokens, values) for step in range(3)]

    monkeypatch.setattr(against, "run_stage", run_stage)
    (rl2,) = compare(lm, only=["rl2"], repeats=3)
    assert vars(rl2.ratio) == {"median": 4.0, "lowest": 1.0, "highest": 9.0}
    # Of the pairs it is 1, 2 and 3. By the last pair's tokens it would be 1.33.
    assert rl2.note == "100 and 200 tokens a step; by the token 2.00"
