"""The rows of the table: which there are, what each is asked, and how its answers are scored."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eval as benchmark
import tools
from common.errors import UserError
from common.files import REPLACED_SUFFIX
from data.questions import Question
from data.trajectory import Observation, Provenance, Role, Trajectory
from eval import STAGES, WORKFLOWS, EvalContext, EvalSettings, TableRow
from evaluation.figures import JudgeFigures, read_figures
from evaluation.table import WorkflowName
from model import LM
from workflows.agent import Answered

PASSAGES = [
    {"id": "0", "contents": '"Iron Hill"\nA town.'},
    {"id": "1", "contents": '"Eva Moss"\nA judge.'},
]
NAMED = Question("0", "What is Iron Hill?", ["a town"], gold_titles=["Iron Hill"])
NOT_NAMED = Question("1", "Who is Eva Moss?", ["a judge"])


def row_named(name: str) -> Any:
    return next(row for row in WORKFLOWS + STAGES if row.name == name)


@pytest.fixture
def task() -> Any:
    evaluation = {"a": [NAMED, NOT_NAMED], "b": [NOT_NAMED]}
    return SimpleNamespace(evaluation=evaluation, eval_search=tools.library(PASSAGES, 1))


@pytest.fixture
def save(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that saves the tiny network as folders of out/nano."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "out" / "nano"

    def save_stages(*names: Any) -> Any:
        lm.save(root / "base")
        for name in names:
            shutil.copytree(root / "base", root / name)
        return root

    return save_stages


# ---- which rows there are ------------------------------------------------------------------------
def test_a_run_has_the_rows_of_its_folders(save: Any) -> None:
    """A folder of --out is a row by its name; what is not complete is none."""
    save("sft2", "sft1", "mine", "rl1.partial", "rl2.checkpoint", f"sft3{REPLACED_SUFFIX}")
    table = benchmark.open_run(EvalSettings(device="cpu"))
    workflow_names = [row.name for row in WORKFLOWS]
    assert [row.name for row in table.rows] == [*workflow_names, "SFT-1", "SFT-1&2", "mine"]
    assert [str(row.folder) for row in table.rows[-4:]] == [
        "out/nano/base",
        "out/nano/sft1",
        "out/nano/sft2",
        "out/nano/mine",
    ]
    assert [row.is_agent for row in table.rows] == [False] * len(WORKFLOWS) + [True] * 3


def test_every_workflow_has_its_name_in_the_table() -> None:
    """Guards: a row that plot.py takes for an agent, since its name is not among these."""
    assert [row.name for row in WORKFLOWS] == list(WorkflowName)


def test_a_folder_that_is_called_like_a_row_takes_its_place(save: Any) -> None:
    """Two rows of one name would mix their answers."""
    save("sft1", "SFT-1")
    table = benchmark.open_run(EvalSettings(device="cpu"))
    agents = [str(row.folder) for row in table.rows if row.is_agent]
    assert agents == ["out/nano/SFT-1"]


def test_a_run_without_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"out/nano/base is missing; make it with: .*train_sft\.py"):
        benchmark.open_run(EvalSettings(device="cpu"))


def test_a_stage_older_than_its_start_is_reported(
    save: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a row would compare two runs; one whose start is gone can't be told."""
    root = save("sft1", "sft2")
    for seconds, stage in enumerate(("base", "sft2", "sft1")):
        os.utime(root / stage / "config.json", (seconds, seconds))
    table = benchmark.open_run(EvalSettings(device="cpu"))
    for row in table.rows:
        benchmark.warn_of_older_stage(row)
    line = capsys.readouterr().out
    assert line.startswith("out/nano/sft2 is older than out/nano/sft1, from which it should come")
    assert line.count("\n") == 1
    shutil.rmtree(root / "sft1")
    benchmark.warn_of_older_stage(table.rows[-1])
    assert capsys.readouterr().out == ""


def test_a_checkpoint_of_this_project_is_an_agent_too(save: Any) -> None:
    """With --data its workflows and the agent have the same weights; --model says which."""
    save()
    table = benchmark.open_checkpoint(EvalSettings(device="cpu", model="out/nano/base"))
    assert [row.name for row in table.rows] == [*(row.name for row in WORKFLOWS), "agent"]
    assert {row.folder for row in table.rows} == {Path("out/nano/base"), table.base_folder}
    assert table.root.parent == Path("out/eval")
    assert table.root.name.startswith("base-")
    with pytest.raises(UserError, match="--data: it needs --model"):
        benchmark.open_checkpoint(EvalSettings())


@pytest.mark.parametrize(
    ("has_tags", "message"),
    [(True, "the tags are tokens of this checkpoint"), (False, "has no chat template")],
)
def test_who_cannot_be_asked_as_the_authors_ask(lm: LM, has_tags: bool, message: str) -> None:
    """A checkpoint whose tags are tokens would never spell one."""
    with pytest.raises(UserError, match=f"--authors_prompt: .*{message}"):
        benchmark.refuse_authors_prompt(lm, has_tags)


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no row 'SFT-9' here; there are: SFT-1, SFT-2, SFT-1&2"):
        benchmark.refuse_unknown_rows(["SFT-1", "SFT-9"], STAGES)


# ---- what a row is asked -------------------------------------------------------------------------
def test_oracle_passages_are_for_questions_that_name_them(lm: LM, task: Any) -> None:
    sets = row_named("oracle passages").question_sets(lm, task)
    assert sets == {"a": [NAMED]}


def test_reflexion_is_for_models_that_can_speak_of_themselves(lm: LM, task: Any) -> None:
    """A nano model was never asked in words."""
    row = row_named("Reflexion workflow")
    assert row.question_sets(lm, task) == {}
    chat_model: Any = SimpleNamespace(codec=SimpleNamespace(has_chat_template=True))
    assert row.question_sets(chat_model, task) == task.evaluation


def test_reflexion_begins_with_what_react_answered(
    lm: LM, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ReAct is not asked again, unless this evaluation took its answers from an earlier one."""
    answers = [Answered("a town", Trajectory()), Answered("", Trajectory())]
    first_tries = []

    def reflexion(
        lm: LM, questions: Any, search: Any, settings: Any, first_try: Any = None, **more: Any
    ) -> Any:
        first_tries.append(first_try)
        return answers

    monkeypatch.setattr(benchmark, "react", lambda *arguments, **more: answers)
    monkeypatch.setattr(benchmark, "reflexion", reflexion)
    context = EvalContext(task, EvalSettings())
    questions = [NAMED, NOT_NAMED]
    row_named("Reflexion workflow").workflow(lm, questions, context, "Reflexion")
    row_named(WorkflowName.REACT).workflow(lm, questions, context, "ReAct")
    row_named("Reflexion workflow").workflow(lm, questions[1:], context, "Reflexion")
    assert first_tries == [None, answers[1:]]


# ---- how answers are scored ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "cache, provenance, lost",
    [
        ("live", Provenance.FAILED, 1),
        ("live", Provenance.MISSED, 1),
        ("replay", Provenance.FAILED, 1),
        ("replay", Provenance.MISSED, 0),
        ("live", Provenance.REAL, 0),
    ],
)
def test_a_failed_search_is_lost(cache: str, provenance: Any, lost: int) -> None:
    """Whatever it says: a passage that reads like a failure is none."""
    observations = [Observation("The search failed.", provenance), Observation("Iron Hill 1:")]
    assert benchmark.count_lost(observations, cache) == lost


def test_retrieve_then_read_loses_what_its_search_loses(lm: LM, task: Any) -> None:
    """The observation fits the budget, and keeps where it comes from."""

    def search(actions: list[str]) -> list[Any]:
        return [Observation("The search failed.", Provenance.FAILED) for _ in actions]

    task.eval_search = search
    context = EvalContext(task, EvalSettings(max_len=300, max_thought=8))
    row = row_named("retrieve-then-read")
    answers = row.workflow(lm, [NAMED, NOT_NAMED], context, row.name)
    lost = [benchmark.count_lost(answer.trajectory.observations, "live") for answer in answers]
    assert lost == [1, 1]
    record = benchmark.score_answer(row, lm, NAMED, answers[0], "live")
    assert record["lost"] == 1


def test_a_workflow_is_never_malformed(lm: LM) -> None:
    """A script closes its tags, so that nobody asks whether it did; an agent has to by itself."""
    trajectory = Trajectory(forced=True)
    trajectory.add(lm.codec.prompt("Who?"), Role.PROMPT, 0)
    trajectory.queries = ["Iron Hill"]
    found = {}
    for name in (WorkflowName.REACT, "SFT-1"):
        answered = Answered("The town", trajectory)
        found[name] = benchmark.score_answer(row_named(name), lm, NAMED, answered, "live")
    workflow = found[WorkflowName.REACT]
    assert (workflow["malformed"], workflow["forced"]) == (None, None)
    assert (found["SFT-1"]["malformed"], found["SFT-1"]["forced"]) == (1.0, 1.0)
    record = found["SFT-1"]
    assert (record["em"], record["f1"], record["cover"]) == (1.0, 1.0, 1.0)
    assert (record["actions"], record["queries"]) == (1, ["Iron Hill"])
    assert record["text"] == lm.codec.decode(trajectory.ids)


def test_only_what_is_missing_is_asked(
    lm: LM, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's network is loaded where a question is left, and asked some batches at a time."""
    monkeypatch.setattr(benchmark, "BATCHES_AT_A_TIME", 1)
    batches = []

    def workflow(lm: LM, questions: Any, context: Any, name: str) -> list[Any]:
        batches.append([question.id for question in questions])
        return [Answered("a town", Trajectory()) for _ in questions]

    row = TableRow("mine", Path("base"), workflow)
    table = benchmark.Table(tmp_path, lm, Path("base"), [row])
    context = EvalContext(task, EvalSettings(batch_rows=2))
    for resume in (False, True):
        context.settings.resume = resume
        predictions = benchmark.open_predictions(table, context)
        benchmark.ask_what_is_missing(row, task.evaluation, table, context, predictions)
        answers = predictions.of_row("mine", task.evaluation)
        predictions.finish({"mine": answers})
    assert batches == [["0", "1"], ["1"]]
    assert [answer["em"] for answer in answers["a"]] == [1.0, 0.0]
    # The network of another folder, which is not there, would be loaded here.
    row.folder = Path("nosuch")
    benchmark.ask_what_is_missing(row, {}, table, context, predictions)


def test_rows_that_are_not_asked_stand_with_what_they_have(
    lm: LM, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Workflows on few questions, then agents on many: both are in the table, which says so."""
    monkeypatch.setattr(benchmark, "recall_facts", lambda table, context: set())
    task.eval_search.report = lambda: ""

    def answer(lm: LM, questions: Any, context: Any, name: str) -> list[Any]:
        return [Answered("a town", Trajectory()) for _ in questions]

    rows = [TableRow(name, Path("base"), answer) for name in ("few", "many", "none")]
    table = benchmark.Table(tmp_path, lm, Path("base"), rows)
    task.evaluation = {"a": [NAMED], "b": [NOT_NAMED]}
    benchmark.ask_rows(table, EvalContext(task, EvalSettings(rows=["few"])), start=0)
    assert "rows of fewer" not in capsys.readouterr().out
    task.evaluation = {"a": [NAMED, NOT_NAMED], "b": [NOT_NAMED]}
    benchmark.ask_rows(table, EvalContext(task, EvalSettings(rows=["many"])), start=0)
    assert "rows of fewer questions than the others' 3: few (2)" in capsys.readouterr().out
    figures = read_figures(tmp_path / "eval.json")
    em_of_a = {name: row.sets["a"].em for name, row in figures.items()}
    assert em_of_a == {"few": 100.0, "many": 50.0}
    assert [row.questions for row in figures.values()] == [2, 3]

    # A row that was interrupted is no sample.
    path = tmp_path / "predictions.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if "many" in line]
    path.write_text("".join(line for line in lines if '"set": "a"' in line))
    benchmark.ask_rows(table, EvalContext(task, EvalSettings(rows=["none"])), start=0)
    assert list(read_figures(tmp_path / "eval.json")) == ["none"]


# ---- further figures -----------------------------------------------------------------------------
class Judge:
    """It can read the answer "yes" and "no", and is out of reach for "fail"."""

    def report(self) -> str:
        return "the judge was asked"


def judge(chat: Any, records: Any) -> list[Any]:
    verdicts = {"yes": 1.0, "no": 0.0, "hm": None}
    answers = [record["answer"] for record in records]
    if "fail" in answers:
        raise UserError("out of reach")
    return [verdicts[answer] for answer in answers]


def test_verdicts_of_a_judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Averages are over the sets, and over the verdicts that can be read."""
    monkeypatch.setattr(benchmark, "judge", judge)
    answers: Any = {"A": {"a": [{"answer": "yes"}, {"answer": "hm"}], "b": [{"answer": "no"}]}}
    figures: Any = {"A": SimpleNamespace(judge=None)}
    chat: Any = Judge()
    benchmark.add_verdicts(chat, figures, answers)
    assert [answer["judge"] for answer in answers["A"]["a"]] == [1.0, None]
    by_set = {"a": 100, "b": 0}
    assert figures["A"].judge == JudgeFigures(by_set, average=50, unread=1)
    assert capsys.readouterr().out == "the judge was asked\n"


def test_a_judge_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not half of the rows with verdicts, half without."""
    monkeypatch.setattr(benchmark, "judge", judge)
    answers: Any = {"A": {"a": [{"answer": "yes"}]}, "B": {"a": [{"answer": "fail"}]}}
    figures: Any = {"A": SimpleNamespace(judge=None), "B": SimpleNamespace(judge=None)}
    chat: Any = Judge()
    with pytest.raises(UserError, match="out of reach"):
        benchmark.add_verdicts(chat, figures, answers)
    assert answers["A"]["a"] == [{"answer": "yes"}]
    assert figures["A"].judge is None


def test_runs_are_pooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--compare: the mean of the gains of two runs, each set with the same weight."""
    monkeypatch.chdir(tmp_path)
    for run, better in (("s0", 1.0), ("s1", 0.0)):
        rows = [("A", "a", better), ("B", "a", 0.0), ("A", "b", 1.0), ("B", "b", 1.0)]
        lines = [
            json.dumps({"row": row, "set": name, "id": "0", "question": "0?", "em": em}) + "\n"
            for row, name, em in rows
        ]
        path = tmp_path / "out" / run / "predictions.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(lines))
    benchmark.compare_rows(EvalSettings(compare=["A", "B"], runs=["s0", "s1"]))
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["runs"]) == (["A", "B"], ["s0", "s1"])
    assert (found["gain"], found["gain_questions"]) == (25.0, 2)


@pytest.mark.parametrize("names", [["A"], ["A", "A"], ["A", "B", "C"]])
def test_two_rows_are_compared(names: list[str]) -> None:
    with pytest.raises(UserError, match="two rows are needed, separated by a comma, not '"):
        benchmark.compare_rows(EvalSettings(compare=names))
