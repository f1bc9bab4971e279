"""The paper's claims over seeds: which commands run, what is left, what the page says of them."""

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from made_up_run import MadeUpRun

from common.errors import UserError
from evaluation import reproduction
from evaluation.claims import (
    AGENTS,
    RL2_ALONE,
    RL2_FROM_SFT2,
    RL12,
    SFT2_ALONE,
    SFT12,
    SFT123,
    WORKFLOWS,
    Verdict,
    judge_claims,
    seed_interval,
)
from evaluation.figures import ActingFigures, RowFigures, SetFigures, row_to_json
from evaluation.reproduction import JOBS, ReproductionSettings, run
from evaluation.reproduction_page import NAMES
from evaluation.seed_results import SeedResults, read_results
from evaluation.statistics import sign_flip_p

MEANS = SetFigures(em=0, f1=0, cover=0, overlap=0, malformed=0, forced=0, actions=0)


def answers(scores: Sequence[float], actions: Sequence[int] = ()) -> dict[str, Any]:
    """Return the predictions of one set of questions."""
    rows = []
    for number, score in enumerate(scores):
        row = dict.fromkeys(("em", "f1", "cover", "overlap"), score)
        row |= {"id": str(number), "question": "Who?", "malformed": 0.0, "forced": 0.0}
        rows.append(row | {"actions": actions[number] if actions else 1})
    return {"single": rows}


def figures(known: float | None = None, unknown: float | None = None) -> RowFigures:
    acting = ActingFigures(0.5, 0.9, known, unknown, None)
    return RowFigures({"single": MEANS}, MEANS, acting, 0, 0, by_actions={})


# ---- claims --------------------------------------------------------------------------------------
def test_sign_flips_against_all_of_them() -> None:
    """Against the share of all 2^8 choices of signs whose mean is as large."""
    first = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    second = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    differences = np.subtract(first, second)
    means = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean(np.abs(means) >= abs(differences.sum()))
    p = sign_flip_p([(answers(first), answers(second))])  # type: ignore[list-item]
    assert p == pytest.approx(exact, abs=0.01)


def test_interval_over_seeds() -> None:
    """By hand: 2 +- 4.303 x 1 / sqrt(3), Student's t for two degrees of freedom."""
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((-0.48, 4.48), abs=0.01)
    assert seed_interval([1.0]) == (-np.inf, np.inf)


def test_verdicts() -> None:
    """A claim holds, does not, or is undecided by where its interval lies."""
    right, wrong = [1.0] * 40, [0.0] * 40
    half = [1.0, 0.0] * 20
    few_then_many = [1] * 20 + [3] * 20
    predictions = {
        "model only": answers(wrong),
        # ReAct is right with one action, and never with three; the agent is always.
        "ReAct workflow": answers([1.0] * 20 + [0.0] * 20, few_then_many),
        SFT2_ALONE: answers(right),
        SFT12: answers(half),
        SFT123: answers(half[::-1]),
        RL12: answers(right, few_then_many),
        RL2_FROM_SFT2: answers(right),
    }
    rows = {"model only": figures(known=90.0, unknown=10.0)}
    seeds = [SeedResults(str(seed), "", predictions, rows, {}) for seed in range(2)]
    claims = {claim.number: claim for claim in judge_claims(seeds)}
    verdicts = {number: claim.verdict for number, claim in claims.items()}
    assert verdicts == {
        1: Verdict.UNDECIDED,
        2: Verdict.FAILS,
        3: Verdict.UNDECIDED,
        4: Verdict.HOLDS,
        5: Verdict.HOLDS,
        6: Verdict.HOLDS,
        7: Verdict.HOLDS,
    }
    assert claims[2].gain.points == -50.0
    assert claims[4].by_seed == {"0": 50.0, "1": 50.0}
    assert claims[5].needs == -1.5
    assert claims[6].gain.points == 100.0
    assert (claims[7].gain.points, claims[7].gain.low) == (80.0, 80.0)


def test_claims_without_their_rows() -> None:
    """They are left out, and so is a fall of success where nobody acts three times."""
    predictions = {RL12: answers([1.0] * 4), "ReAct workflow": answers([0.0] * 4)}
    (claim,) = judge_claims([SeedResults("0", "", predictions, {}, {})])
    assert (claim.number, claim.measure) == (1, f"{RL12} over ReAct workflow")


# ---- the commands --------------------------------------------------------------------------------
# What stands in for the scripts: it makes the folders that the real ones make.
FAKE = """
import json, os, shutil, sys, time
from pathlib import Path
options = dict(part[2:].partition("=")[::2] for part in sys.argv[1:])
root = Path("out", options["run"])
with Path("calls").open("a") as calls:
    print(sys.argv[0], options.get("out", ""), options["seed"], os.environ["OMP_NUM_THREADS"],
          "resume" in options, file=calls)
if os.environ.get("SLOW") == sys.argv[0]:
    print("begun", flush=True)
    time.sleep(60)
if sys.argv[0] == "eval.py":
    shutil.copytree(Path("out", "made_up"), root, dirs_exist_ok=True)
    for file in ("eval.json", "predictions.jsonl"):
        (root / file).write_text(Path(file).read_text())
else:
    made = {"train_sft.py": ["base", "sft1", "sft2", "sft3"], "train_rl.py": ["rl1", "rl2"]}
    for folder in [options["out"]] if "out" in options else made[sys.argv[0]]:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "config.json").write_text("{}")
    if os.environ.get("FAILING") == options["run"]:
        sys.exit(2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work where the scripts are made up, and so is what eval.py writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduction, "SECONDS_BETWEEN_LOOKS", 0.01)
    for script in ("train_sft.py", "train_rl.py", "eval.py"):
        (tmp_path / script).write_text(FAKE)
    rows = {row: answers([1.0, 0.0] if "SFT" in row else [0.0, 0.0]) for row in AGENTS}
    rows |= {row: answers([0.0, 0.0]) for row in WORKFLOWS}
    table = {"rows": {row: row_to_json(figures(90.0, 10.0)) for row in rows}}
    (tmp_path / "eval.json").write_text(json.dumps(table))
    lines = [
        json.dumps(answer | {"row": row, "set": "single"}) + "\n"
        for row, sets in rows.items()
        for answer in sets["single"]
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(lines))
    practise()
    return tmp_path


def practise() -> None:
    """Make up what the stages of RL leave: a world model of three calls, and six real calls."""
    made_up = MadeUpRun("made_up")
    made_up.add_world_model("world_model", "ab", calls=3)
    made_up.add_stage("rl1", "rl1", "", "distilled", [None], world_model="world_model")
    made_up.add_stage("rl2", "rl2", "", "real", [None], [(0, "a", 2), (0, "c", 1)])
    for folder, start in ((RL2_ALONE, "base"), (RL2_FROM_SFT2, "sft2")):
        made_up.add_stage(folder, "rl2", start, "real", [None], [(0, "a", 12)])
    made_up.write()


def calls(folder: Path) -> list[list[str]]:
    return [line.split(" ") for line in (folder / "calls").read_text().splitlines()]


def test_all_rows_of_two_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command of each seed runs once, in order, with its share of the cores."""
    settings = ReproductionSettings(seeds=["0", "3"])
    run(settings)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    for seed in ("0", "3"):
        of_seed = [call for call in calls(folder) if call[2] == seed]
        assert [call[:2] for call in of_seed] == [
            ["train_sft.py", ""],
            ["train_rl.py", ""],
            ["train_sft.py", "sft2_alone"],
            ["train_rl.py", "rl2_alone"],
            ["train_rl.py", "rl2_from_sft2"],
            ["eval.py", ""],
        ]
        assert {tuple(call[3:]) for call in of_seed} == {(threads, "True")}
    page = (folder / "docs" / "reproduction.md").read_text()
    assert "2 seeds: 0, 3" in page
    row = next(line for line in page.splitlines() if line.startswith("| SFT-1&2 |"))
    assert "50.0, 50.0" in row
    for picture in re.findall(r"\]\(\.\./(pictures/.*?)\)", page):
        assert (folder / picture).is_file()
    assert "left:" not in capsys.readouterr().out

    # a, b and d for the world model, then a twice and c in practice; twelve where all was real.
    assert f"| {NAMES[RL12]} | 0.0 | 6 | 0.50 | 4 |" in page


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    """A finished seed is kept, and asks for nothing even where its folder is gone."""
    settings = ReproductionSettings(seeds=["3"])
    run(settings)
    done = len(calls(folder))
    page = (folder / "docs" / "reproduction.md").read_text()
    shutil.rmtree(folder / "out")
    run(settings)
    assert len(calls(folder)) == done
    assert (folder / "docs" / "reproduction.md").read_text() == page
    kept = folder / "docs" / "reproduction" / "seed3.json"
    results = read_results(kept)
    assert [answer["em"] for answer in results.answers[SFT12]["single"]] == [1.0, 0.0]
    assert results.calls[RL2_FROM_SFT2] == (12, 1)

    kept.write_text('{"seed": "3"}')
    with pytest.raises(UserError, match=r"seed3\.json: not the results of a seed; remove it"):
        run(settings)


def test_an_evaluation_older_than_a_stage(folder: Path) -> None:
    """It is made again."""
    settings = ReproductionSettings(seeds=["3"])
    run(settings)
    (folder / "docs" / "reproduction" / "seed3.json").unlink()
    newer = folder / "out" / "seed3" / "rl2" / "config.json"
    os.utime(newer, (time.time() + 60,) * 2)
    assert [job.name for job in reproduction.jobs_left("3", settings)] == ["evaluation"]


def test_a_quick_one_leaves_the_page_alone(folder: Path) -> None:
    """Guards: figures of minutes in place of those of hours."""
    run(ReproductionSettings(seeds=["0"], quick=True))
    assert not (folder / "docs").exists()
    assert "one seed: 0" in (folder / "out" / "quick_reproduction.md").read_text()
    assert (folder / "out" / "quick_reproduction" / "reproduction_cost.png").is_file()


def test_a_command_that_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named with its log, and the other seeds are trained to their ends."""
    monkeypatch.setenv("FAILING", "seed0")
    with pytest.raises(UserError, match=r"seed0: base and SFT ended with status 2; see out/seed0/"):
        run(ReproductionSettings(seeds=["0", "1"]))
    assert "1 seed" not in (folder / "docs" / "reproduction.md").read_text()
    assert "one seed: 1" in (folder / "docs" / "reproduction.md").read_text()
    assert re.search("^seed0: left: RL-1 and RL-2, SFT-2 alone", capsys.readouterr().out, re.M)


def test_when_the_time_is_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What runs is asked to save and stop, and what is left is said."""
    monkeypatch.setenv("SLOW", "train_rl.py")
    start = time.monotonic()
    run(ReproductionSettings(seeds=["0"], hours=2 / 3600))
    assert time.monotonic() - start < 30
    lines = capsys.readouterr().out.splitlines()
    names = ", ".join(job.name for job in JOBS[1:])
    assert lines[-1] == f"seed0: left: {names}"
    assert not (folder / "docs" / "reproduction.md").exists()


def test_rows_are_those_of_run_sh() -> None:
    """`bash run.sh --table` trains the same folders from the same starts."""
    script = (ROOT / "run.sh").read_text()
    for job in JOBS[2:5]:
        script_name, *options = job.command
        line = next(line for line in script.splitlines() if f"--out={job.folders[0]}" in line)
        assert f"run {script_name} {' '.join(options)}" == line.strip()
