"""The paper's claims over seeds: which commands run, what is left, what the page says of them."""

import itertools
import json
import math
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

import eval
from common.errors import UserError
from common.settings import main
from environments.cost_logs import CallCount
from evaluation import claims as claims_module
from evaluation import reproduction, reproduction_page
from evaluation.claims import (
    AGENTS,
    RL1,
    RL2_FROM_SFT2,
    RL12,
    SFT2_ALONE,
    SFT12,
    SFT123,
    WORKFLOWS,
    Verdict,
    judge_claims,
    success_with_many_actions,
)
from evaluation.figures import ActingFigures, RowFigures, SetFigures, row_to_json
from evaluation.reproduction import JOBS, PRACTICE, ReproductionSettings, run, steps_left
from evaluation.reproduction_page import draw_figures, format_claims
from evaluation.seed_results import SeedResults, read_results
from evaluation.statistics import one_group_p, seed_interval, sign_flip_p

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
@pytest.mark.parametrize("needs", [0.0, -20.0])
def test_sign_flips_against_all_of_them(needs: float) -> None:
    """Against the share of all 2^8 choices of signs whose mean is as far from what is needed."""
    first = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    second = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    differences = np.subtract(first, second) - needs / 100
    means = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean(np.abs(means) >= abs(differences.sum()) - 1e-9)
    p = sign_flip_p([(answers(first), answers(second))], needs)  # type: ignore[list-item]
    assert p == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("right", [9, 11])
def test_a_share_against_the_binomial_distribution(right: int) -> None:
    """Of 20 answers, against the sum over all numbers of right ones that are as far from 12."""
    share = 0.6
    chances = [math.comb(20, k) * share**k * (1 - share) ** (20 - k) for k in range(21)]
    exact = sum(chances[k] for k in range(21) if abs(k - 12) >= abs(right - 12))
    scores = np.array([1.0] * right + [0.0] * (20 - right))
    assert one_group_p(scores, needs=60.0) == pytest.approx(exact, abs=0.015)
    assert np.isnan(one_group_p(scores[:1], needs=60.0))


def test_interval_over_seeds() -> None:
    """By hand: 2 +- 4.303 x 1 / sqrt(3), Student's t for two degrees of freedom."""
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((-0.48, 4.48), abs=0.01)
    assert seed_interval([1.0]) == (-np.inf, np.inf)


def seed_results(
    seed: int, rows: dict[str, Any], recall: RowFigures | None = None, **calls: Any
) -> SeedResults:
    own_figures = {row: figures() for row in rows}
    if recall is not None:
        own_figures["model only"] = recall
    return SeedResults(str(seed), rows, own_figures, calls.get("calls", {}))


def test_verdicts() -> None:
    """A claim holds, does not, or is undecided by where its intervals lie."""
    right, wrong = [1.0] * 80, [0.0] * 80
    half = [1.0, 0.0] * 40
    few_then_many = [1] * 40 + [3] * 40
    rows = {
        "model only": answers(half),
        # ReAct is right with one action, and never with three; the agent is always.
        "ReAct workflow": answers(right[:40] + wrong[:40], few_then_many),
        SFT2_ALONE: answers(right),
        SFT12: answers(half),
        SFT123: answers(half[::-1]),
        RL12: answers(right, few_then_many),
        RL2_FROM_SFT2: answers(right),
    }
    # Of 80 questions the pretraining held the facts of 48, and it has 38 of these right.
    acting = ActingFigures(0.5, 0.9, None, None, None, 100 * 38 / 48, 6.25, 48)
    recall = RowFigures({}, MEANS, acting, 0, 0, {})
    # 2,000 to distil and 8,000 in practice, of 50,000 with the tool alone.
    calls = {
        RL1: CallCount(2000, 2000),
        RL12: CallCount(10_000, 2100),
        RL2_FROM_SFT2: CallCount(50_000, 2100),
    }
    seeds = [seed_results(seed, rows, recall, calls=calls) for seed in range(2)]
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
    assert claims[2].deciding.gain.points == -50.0
    assert claims[4].deciding.by_seed == {"0": 50.0, "1": 50.0}
    near, saved = claims[5].comparisons
    assert near.needs == -1.5
    assert saved.gain.points == pytest.approx(84.0)
    own, beside_react = claims[6].comparisons
    assert (own.gain.points, beside_react.gain.points) == (0.0, 100.0)
    recalls, collapses = claims[7].comparisons
    assert recalls.gain.points == pytest.approx(100 * 38 / 48)
    assert collapses.gain.points == pytest.approx(100 * (38 / 48 - 2 / 32))

    # One seed says nothing of others.
    assert {claim.verdict for claim in judge_claims(seeds[:1])} == {Verdict.UNDECIDED}
    # A quarter of the calls is no sixth.
    for results in seeds:
        results.calls[RL12] = CallCount(14_500, 2100)
    assert judge_claims(seeds)[4].verdict == Verdict.FAILS


def test_seeds_that_disagree_decide_nothing() -> None:
    """Guards: a verdict by questions alone, of which many make any two runs differ."""
    seeds = []
    for seed, right in enumerate((400, 480, 395, 500, 398)):
        before = answers([1.0] * 400 + [0.0] * 500)
        after = answers([1.0] * right + [0.0] * (900 - right))
        seeds.append(seed_results(seed, {SFT123: before, RL12: after}))
    (comparison,) = judge_claims(seeds)[3].comparisons
    assert comparison.gain.low > 0
    assert comparison.seed_interval[0] < 0
    assert comparison.verdict == Verdict.UNDECIDED


def test_one_agent_that_loses_is_enough() -> None:
    """Claim 1 is about every agent, and names the one that decides."""
    rows = {
        "model only": answers([0.0] * 40),
        "ReAct workflow": answers([1.0, 0.0] * 20),
        "SFT-1": answers([1.0, 0.0] * 18 + [0.0] * 4),
        "RL-2 alone": answers([0.0] * 40),
        SFT12: answers([1.0] * 40),
    }
    claim = judge_claims([seed_results(seed, rows) for seed in range(2)])[0]
    assert claim.verdict == Verdict.FAILS
    assert claim.deciding.measure == "RL-2 alone over ReAct workflow"
    # The page has all that stand against it, the worst first, and none of those that hold.
    page = format_claims([claim])
    shown = re.findall(r"\| ([^|]*) over ([^|]*): (\S+) \(", page)
    assert shown == [
        ("RL-2 alone", "ReAct workflow", "-50.0"),
        ("SFT-1", "ReAct workflow", "-5.0"),
        ("RL-2 alone", "model only", "+0.0"),
    ]
    # Without it, those that are there hold or not; but not all are there.
    del rows["RL-2 alone"], rows["SFT-1"]
    claim = judge_claims([seed_results(seed, rows) for seed in range(2)])[0]
    assert {comparison.verdict for comparison in claim.comparisons} == {Verdict.HOLDS}
    assert claim.verdict == Verdict.UNDECIDED
    assert "| rows are missing |" in format_claims([claim])


def test_success_with_more_actions_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rises by hand; their p against all ways to swap the two answers of six questions."""
    monkeypatch.setattr(claims_module, "FEWEST_ANSWERS", 1)
    agent_em = np.array([1.0, 1, 0, 1, 0, 1])
    react_em = np.array([1.0, 1, 1, 0, 0, 0])
    actions = [1, 1, 2, 3, 3, 4]
    rows = {
        RL12: answers(agent_em.tolist(), actions),
        "ReAct workflow": answers(react_em.tolist(), actions),
    }
    own, beside_react = success_with_many_actions([seed_results(0, rows)])
    assert own.gain.points == pytest.approx(0.0)  # 2 of 3 before and after
    assert beside_react.gain.points == pytest.approx(100.0)  # ReAct's fall from 3 of 3 to none
    differences = []
    for swaps in itertools.product((False, True), repeat=6):
        one, other = np.where(swaps, react_em, agent_em), np.where(swaps, agent_em, react_em)
        differences.append(
            (one[3:].mean() - one[:3].mean()) - (other[3:].mean() - other[:3].mean())
        )
    exact = np.mean(np.abs(differences) >= 1 - 1e-9)
    assert beside_react.p == pytest.approx(exact, abs=0.03)


def test_few_answers_decide_nothing() -> None:
    """Guards: a single right answer with three actions, by which Fig. 3 held."""
    rows = {
        RL12: answers([1.0] * 41, [1] * 40 + [3]),
        "ReAct workflow": answers([1.0] * 40 + [0.0], [1] * 40 + [3]),
    }
    claim = judge_claims([seed_results(seed, rows) for seed in range(2)])[5]
    assert {comparison.verdict for comparison in claim.comparisons} == {Verdict.UNDECIDED}


def test_claims_that_cannot_be_measured() -> None:
    """They stay on the list, undecided. Guards: a claim that is gone from the page."""
    rows = {RL12: answers([1.0] * 4), "ReAct workflow": answers([0.0] * 4)}
    claims = judge_claims([seed_results(seed, rows) for seed in range(2)])
    assert [claim.number for claim in claims] == [1, 2, 3, 4, 5, 6, 7]
    assert claims[0].deciding.measure == f"{RL12} over ReAct workflow"
    assert not claims[1].comparisons
    # Nobody acts three times.
    assert [item.verdict for item in claims[5].comparisons] == [Verdict.UNDECIDED] * 2
    assert claims[5].verdict == claims[1].verdict == Verdict.UNDECIDED
    page = format_claims(claims)
    assert page.count("| rows are missing |") == 6
    assert page.count("not measured") > 2
    assert "nan" not in page and "inf" not in page


# ---- the commands --------------------------------------------------------------------------------
# What stands in for the scripts: it makes the folders that the real ones make.
FAKE = """
import json, os, shutil, sys, time
from pathlib import Path
options = dict(part[2:].partition("=")[::2] for part in sys.argv[1:])
root = Path("out", options["run"])
with Path("calls").open("a") as calls:
    made = options.get("out", options.get("rows", ""))
    print(sys.argv[0], made, options["seed"], os.environ["OMP_NUM_THREADS"],
          "resume" in options, *[options[name] for name in ("rl2_steps",) if "quick" in options
          and name in options], sep="\t", file=calls)
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
    # Drawing takes most of the time; two tests do it.
    monkeypatch.setattr(reproduction_page, "draw_figures", lambda *_: "")
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
    for folder, start in (("rl2_alone", "base"), ("rl2_from_sft2", "sft2")):
        made_up.add_stage(folder, "rl2", start, "real", [None], [(0, "a", 12)])
    made_up.write()


def calls(folder: Path) -> list[list[str]]:
    return [line.split("\t") for line in (folder / "calls").read_text().splitlines()]


# What each command of a seed is, in order: a script, and the folder or the rows that it makes.
COMMANDS = [
    ["train_sft.py", ""],
    ["eval.py", "model only,ReAct workflow,SFT-1,SFT-1&2,SFT-1&2&3"],
    ["train_rl.py", ""],
    ["eval.py", "SFT-1&2&3+RL-1,SFT-1&2&3+RL-1&2"],
    ["train_sft.py", "sft2_alone"],
    ["eval.py", "SFT-2"],
    ["train_rl.py", "rl2_alone"],
    ["eval.py", "RL-2 alone"],
    ["train_rl.py", "rl2_from_sft2"],
    ["eval.py", "SFT-1&2+RL-2"],
]


def test_all_rows_of_two_seeds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command of each seed runs once, in order, with its share of the cores."""
    monkeypatch.setattr(reproduction_page, "draw_figures", draw_figures)
    settings = ReproductionSettings(seeds=["0", "3"])
    run(settings)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    for seed in ("0", "3"):
        of_seed = [call for call in calls(folder) if call[2] == seed]
        assert [call[:2] for call in of_seed] == COMMANDS
        assert {tuple(call[3:]) for call in of_seed} == {(threads, "True")}
    page = (folder / "docs" / "reproduction.md").read_text()
    assert "2 seeds: 0, 3" in page
    row = next(line for line in page.splitlines() if line.startswith("| SFT-1&2 |"))
    assert "0: 50.0, 3: 50.0" in row
    pictures = re.findall(r"\]\(\.\./(pictures/.*?)\)", page)
    assert len(pictures) == 4
    for picture in pictures:
        assert (folder / picture).is_file()
    assert "left:" not in capsys.readouterr().out
    # a, b and d for the world model, then a twice and c in practice; twelve where all was real.
    assert f"| {RL12} | 50.0 | 6 | 0.50 | 4 |" in page
    assert "distilling left out: +75.0 (does not hold)" in page
    assert "| EM, % | single |" in page


def test_what_is_done_is_not_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished seed is kept, asks for nothing even where its folder is gone, and says why."""
    settings = ReproductionSettings(seeds=["3"])
    run(settings)
    assert "kept in docs/reproduction;" not in capsys.readouterr().out
    done = len(calls(folder))
    page = (folder / "docs" / "reproduction.md").read_text()
    shutil.rmtree(folder / "out")
    run(settings)
    line, *_ = capsys.readouterr().out.splitlines()
    assert line == (
        "seeds 3: all rows are kept in docs/reproduction; to train one anew, remove its file there "
        "and out/seedN, or give --seeds others"
    )
    assert len(calls(folder)) == done
    assert (folder / "docs" / "reproduction.md").read_text() == page
    kept = folder / "docs" / "reproduction" / "seed3.json"
    results = read_results(kept)
    assert [answer["em"] for answer in results.answers[SFT12]["single"]] == [1.0, 0.0]
    assert results.calls[RL2_FROM_SFT2] == (12, 1)

    kept.write_text('{"seed": "3"}')
    with pytest.raises(UserError, match=r"seed3\.json: not the results of a seed; remove it"):
        run(settings)


def test_the_page_is_of_all_that_is_kept(folder: Path) -> None:
    """Guards: a page of five seeds, written over by that of the one asked for last."""
    for seed in ("10", "9"):
        run(ReproductionSettings(seeds=[seed]))
    assert "2 seeds: 9, 10" in (folder / "docs" / "reproduction.md").read_text()


def test_a_row_that_is_missing(folder: Path) -> None:
    """It alone is made again, and for it the stages of SFT where their folders are gone."""
    settings = ReproductionSettings(seeds=["3"])
    run(settings)
    file = folder / "docs" / "reproduction" / "seed3.json"
    content = json.loads(file.read_text())
    del content["rows"]["SFT-2"]
    file.write_text(json.dumps(content))
    evaluation = "evaluation of SFT-2 alone"
    assert [step.name for step in steps_left("3", settings)] == [evaluation]
    shutil.rmtree(folder / "out" / "seed3")
    names = ["base and SFT", "SFT-2 alone", evaluation]
    assert [step.name for step in steps_left("3", settings)] == names
    run(settings)
    assert set(read_results(file).answers) == {*WORKFLOWS, *AGENTS}


def test_rows_of_two_versions(folder: Path) -> None:
    """Guards: rows that answered different questions, compared question by question."""
    settings = ReproductionSettings(seeds=["3"])
    run(settings)
    file = folder / "docs" / "reproduction" / "seed3.json"
    content = json.loads(file.read_text())
    content["questions"]["single"][0][1] = "Which?"
    del content["rows"]["SFT-2"]
    file.write_text(json.dumps(content))
    settings.seeds.append("4")
    with pytest.raises(UserError, match=r"seed3\.json: 'SFT-2' answered other questions than"):
        run(settings)
    # The other seed went on to its end.
    assert set(read_results(file.with_name("seed4.json")).answers) == {*WORKFLOWS, *AGENTS}


def test_a_seed_that_was_trained_otherwise(folder: Path) -> None:
    """Guards: rows of --kl=0.1 on a page that says "default settings"."""
    record = {"given": {"seed": 3, "dtype": "float32", "kl": 0.1}, "stages": {}}
    path = folder / "out" / "seed3" / "settings.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"seed3/settings\.json: this run was given --kl=0\.1, and"):
        run(ReproductionSettings(seeds=["3"]))
    assert not (folder / "calls").exists()

    # What a GPU makes of the defaults, and a stage that is none of the table's.
    given = {"seed": 3, "dtype": "float32", "micro_tokens": 16384, "batch_rows": 1024}
    ablation = {"given": {"alpha": 0.0}, "settings": {}, "settings_class": "SFTSettings"}
    path.write_text(json.dumps({"given": given, "stages": {"sft1_alpha_0": ablation}}))
    run(ReproductionSettings(seeds=["3"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds=0,0"], "--seeds: '0,0' are not different whole numbers"),
        (["--seeds=a"], "--seeds: 'a' are not different whole numbers"),
        (["--seeds=0,00"], "--seeds: '0,00' are not different whole numbers"),
        (["--quick", "--kl=0.1"], "--kl: not used here"),
        (["--seed=7"], "--seed: not used here"),
        (["--kl=0.001"], "--kl: not used here"),
        (["--run=mine"], "--run: not used here"),
    ],
)
def test_settings_that_would_change_nothing(
    options: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["reproduction.py", *options])
    with pytest.raises(SystemExit) as end:
        main(run, ReproductionSettings, "", begins_run=lambda settings: True)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "calls").exists()


def test_a_quick_one_leaves_the_page_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: figures of minutes in place of those of hours."""
    monkeypatch.setattr(reproduction_page, "draw_figures", draw_figures)
    run(ReproductionSettings(seeds=["0"], quick=True))
    assert not (folder / "docs").exists()
    page = (folder / "out" / "quick_reproduction.md").read_text()
    assert "`bash reproduce.sh --quick` wrote this page from the runs of seed 0. " in page
    assert "kept in `quick_reproduction/`" in page
    assert (folder / "out" / "quick_reproduction" / "reproduction_cost.png").is_file()
    assert {call[-1] for call in calls(folder) if call[0] == "train_rl.py" and call[1]} == {"5"}


def test_a_command_that_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named with its log, and the other seeds are trained to their ends."""
    monkeypatch.setenv("FAILING", "seed0")
    with pytest.raises(UserError, match=r"seed0: base and SFT ended with status 2; see out/seed0/"):
        run(ReproductionSettings(seeds=["0", "1"]))
    assert "the runs of seed 1." in (folder / "docs" / "reproduction.md").read_text()
    line = "^seed0: left: RL-1 and RL-2, SFT-2 alone, .*, evaluation of base and SFT$"
    assert re.search(line, capsys.readouterr().out, re.M)


def test_when_the_time_is_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What runs is asked to save and stop, what is left is said, and finished rows are kept."""
    monkeypatch.setenv("SLOW", "train_rl.py")
    start = time.monotonic()
    run(ReproductionSettings(seeds=["0"], hours=3 / 3600))
    assert time.monotonic() - start < 30
    lines = capsys.readouterr().out.splitlines()
    names = ", ".join(job.name for job in JOBS[1:])
    assert lines[-1] == f"seed0: left: {names}"
    page = (folder / "docs" / "reproduction.md").read_text()
    assert "| SFT-1&2 |" in page
    assert "| 4. RL adds to SFT | **undecided** | rows are missing |" in page


def test_rows_are_those_of_run_sh() -> None:
    """`bash run.sh --table` trains the same folders from the same starts."""
    script = (ROOT / "run.sh").read_text()
    for job in JOBS[2:5]:
        line = next(line for line in script.splitlines() if f"--out={job.folders[0]}" in line)
        assert f"run {job.script} {' '.join(job.options)}" == line.strip()


def test_rows_are_those_of_eval() -> None:
    """Guards: a row by a name that eval.py does not know, at the end of an hour of training."""
    folders = {row.name: str(row.folder) for row in (*eval.WORKFLOWS, *eval.STAGES)}
    assert {*WORKFLOWS, *AGENTS} <= folders.keys()
    for job in JOBS:
        own_folders = {folders[row] for row in job.rows}
        assert own_folders <= set(job.folders)
    assert {folders[row]: stages[-1] for row, stages in PRACTICE.items()} == {
        folders[row]: folders[row] for row in PRACTICE
    }
    assert {row for job in JOBS for row in job.rows} == {*WORKFLOWS, *AGENTS}
