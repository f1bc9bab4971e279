r"""The benchmark table: each trained stage beside workflows around the base model.

    python eval.py                           # all stages of out/nano, on questions never trained on
    python eval.py --run=quick --rows="SFT-1&2,ReAct workflow"
    python eval.py config/smollm2.py --model=FOLDER --data=hotpotqa_dev.jsonl \
        --corpus=passages.jsonl.gz           # any checkpoint, as it is
    python eval.py --compare="SFT-1&2&3+RL-1&2,ReAct workflow" --runs=nano,seed1,seed2
                                             # two rows, over the predictions of several seeds

It writes eval.json and predictions.jsonl to out/<run>/, with --data to
out/eval/<model>-<a hash of its path>/. It prints the table and, as the last line, the JSON.
--resume keeps the answers that the same weights gave under the same settings, of an evaluation that
was interrupted or is complete. --rows asks some rows only, and shows the others with what they have
answered of these questions.

Beside EM the table shows F1, actions per question, how often the facts that a question needs were
searched for (apart for those that the base model knows and those that it does not), and malformed
trajectories. eval.json also has: answers that had to be forced, cover-EM, the score of the authors'
code, the gain over ReAct, questions and right answers by number of actions (paper Fig. 3), EM where
the base model knows all facts and where not (appendix A), how many calculations were done with the
calculator, and with --judge what a language model says of the answers. Averages are over the sets,
with a 95% bootstrap interval over questions.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
from common.errors import UserError

# isort: split
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import model
from common import memory, ranks
from common.files import REPLACED_SUFFIX, only_process, to_json, write_text
from common.runs import COST_FILE, find_start, run_folder, settle_by_device
from common.settings import CommaList, main
from data.questions import Question
from data.scores import cover_match, exact_match, f1, overlap_match
from data.trajectory import Observation, Provenance
from evaluation.figures import RowFigures, gain_to_json, row_to_json
from evaluation.predictions import (
    Prediction,
    Predictions,
    ScoredAnswer,
    read_predictions,
    recall_known_facts,
)
from evaluation.statistics import paired_gain, summarize, summarize_verdicts
from evaluation.table import WorkflowName, format_table
from model import LM
from services.chat import Chat
from services.judge import judge
from tasks import Task, open_task
from workflows.agent import Answered, roll_out_questions
from workflows.gold import gold_observation
from workflows.journal import AnswerSettings, provenance_hash
from workflows.prompts import REACT_EXAMPLES
from workflows.react import react
from workflows.reflexion import reflexion
from workflows.spelled import answer_spelled
from workflows.style import is_asked_in_words, style_of


@dataclass(kw_only=True)
class EvalSettings(AnswerSettings):
    """The settings of eval.py."""

    # Question files on which to judge --model as it is, instead of the stages of a run.
    data: CommaList = field(default_factory=list)
    # With --data: ask --model as AutoCoA's authors ask theirs, by their prompt, with spelled tags.
    authors_prompt: bool = False
    # Names of the rows of the table to ask. Empty: all.
    rows: CommaList = field(default_factory=list)
    # Two rows: how much better the first is, over the predictions of --runs.
    compare: CommaList = field(default_factory=list)
    # Runs that --compare pools. Empty: this run.
    runs: CommaList = field(default_factory=list)
    # A language model that judges the answers too: a folder, or the address of an
    # OpenAI-compatible endpoint.
    judge: str = ""
    # Keep the answers that the same weights gave under the same settings.
    resume: bool = False


# ---- 1. How a row is asked -----------------------------------------------------------------------
@dataclass
class EvalContext:
    """What all rows of one evaluation share."""

    task: Task
    settings: EvalSettings
    # Question id -> ReAct's answer, with which Reflexion begins.
    react_answers: dict[str, Answered] = field(default_factory=dict)


def agent(lm: LM, questions: list[Question], context: EvalContext, name: str) -> list[Answered]:
    """Let the model decide by itself when to search: an agent."""
    search = context.task.eval_search
    trajectories = roll_out_questions(lm, texts_of(questions), search, context.settings, name)
    return [Answered(lm.codec.answer(trajectory), trajectory) for trajectory in trajectories]


def spelled_agent(
    lm: LM, questions: list[Question], context: EvalContext, name: str
) -> list[Answered]:
    """Let an agent that spells its tags decide when to search, asked as its authors ask it."""
    settings = context.settings
    search = context.task.eval_search
    return answer_spelled(lm, texts_of(questions), search, settings, settings.seed, name)


def direct_answer(
    lm: LM, questions: list[Question], context: EvalContext, name: str
) -> list[Answered]:
    """Ask for the answer without a thought before it."""
    return style_of(lm.codec).answer_directly(lm, texts_of(questions), context.settings, name)


def closed_book_answer(
    lm: LM, questions: list[Question], context: EvalContext, name: str
) -> list[Answered]:
    """Ask for a thought and the answer, without a tool."""
    return style_of(lm.codec).answer_from_memory(lm, texts_of(questions), context.settings, name)


def retrieve_then_read(
    lm: LM, questions: list[Question], context: EvalContext, name: str
) -> list[Answered]:
    """Search with the question itself, and have the model read what is found."""
    budget = context.settings.max_observation
    found = context.task.eval_search([f"search: {text}" for text in texts_of(questions)])
    passages = [lm.codec.fit(observation.text, budget) for observation in found]
    style = style_of(lm.codec)
    answers = style.answer_from_passages(lm, texts_of(questions), passages, context.settings, name)
    for answer, text, observation in zip(answers, passages, found, strict=True):
        # The workflow was given texts, and does not know of a search that failed.
        answer.trajectory.observations = [Observation(text, observation.provenance)]
    return answers


def oracle_passages(
    lm: LM, questions: list[Question], context: EvalContext, name: str
) -> list[Answered]:
    """Have the model read the passages with the answer, and no others."""
    budget = context.settings.max_len // 2
    search = context.task.eval_search
    passages = [lm.codec.fit(gold_observation(question, search), budget) for question in questions]
    style = style_of(lm.codec)
    return style.answer_from_passages(lm, texts_of(questions), passages, context.settings, name)


def react_workflow(
    lm: LM, questions: list[Question], context: EvalContext, name: str
) -> list[Answered]:
    """Have a script outside the model make it think, then search, then read."""
    search = context.task.eval_search
    texts = texts_of(questions)
    phrases = style_of(lm.codec).react_phrases(lm.codec, REACT_EXAMPLES)
    answers = react(lm, texts, search, context.settings, phrases, description=name)
    for question, answer in zip(questions, answers, strict=True):
        context.react_answers[question.id] = answer
    return answers


def reflexion_workflow(
    lm: LM, questions: list[Question], context: EvalContext, name: str
) -> list[Answered]:
    """Have the model judge its tries by ReAct, and try again with what it learned."""
    first_tries = None
    if all(question.id in context.react_answers for question in questions):
        first_tries = [context.react_answers[question.id] for question in questions]
    search = context.task.eval_search
    texts = texts_of(questions)
    return reflexion(lm, texts, search, context.settings, first_tries, description=name)


def texts_of(questions: list[Question]) -> list[str]:
    """Return what a model is asked."""
    return [question.question for question in questions]


# ---- 2. Which questions a row is asked -----------------------------------------------------------
QuestionSets = dict[str, list[Question]]


def all_questions(base: LM, task: Task) -> QuestionSets:
    """Return all question sets."""
    return task.evaluation


def questions_with_gold_passages(base: LM, task: Task) -> QuestionSets:
    """Return the questions that name the passages with their answer."""
    sets = {}
    for name, questions in task.evaluation.items():
        named = [question for question in questions if gold_observation(question, task.eval_search)]
        if named:
            sets[name] = named
    return sets


def questions_for_instruct_models(base: LM, task: Task) -> QuestionSets:
    """Return all questions where the base model can speak of itself, else none."""
    if is_asked_in_words(base.codec):
        return task.evaluation
    return {}


# ---- 3. The rows ---------------------------------------------------------------------------------
@dataclass
class TableRow:
    """One row of the table: whose weights answer, by which workflow."""

    name: str
    folder: Path  # of the weights; here in the tables, a folder of the run
    workflow: Callable[[LM, list[Question], EvalContext, str], list[Answered]]
    trained_from: Path | None = None  # the folder that a stage begins with
    question_sets: Callable[[LM, Task], QuestionSets] = all_questions

    @property
    def is_agent(self) -> bool:
        """Whether the model decides when to act, not a script around it."""
        return self.workflow is agent


# Batches whose answers are kept together: inside them, new questions begin where others have ended.
BATCHES_AT_A_TIME = 4
BASE = Path("base")
SFT1 = Path("sft1")
SFT2 = Path("sft2")
SFT3 = Path("sft3")
RL1 = Path("rl1")
RL2 = Path("rl2")
SFT2_ALONE = Path("sft2_alone")
RL2_ALONE = Path("rl2_alone")
RL2_FROM_SFT2 = Path("rl2_from_sft2")

# Rows in which a script asks the base model. A new workflow is a function above, a line here and a
# name in evaluation/table.py.
WORKFLOWS = [
    TableRow(WorkflowName.AT_ONCE, BASE, direct_answer),
    TableRow(WorkflowName.FROM_MEMORY, BASE, closed_book_answer),
    TableRow(WorkflowName.RETRIEVE_THEN_READ, BASE, retrieve_then_read),
    TableRow(
        WorkflowName.ORACLE,
        BASE,
        oracle_passages,
        question_sets=questions_with_gold_passages,
    ),
    TableRow(WorkflowName.REACT, BASE, react_workflow),
    TableRow(
        WorkflowName.REFLEXION,
        BASE,
        reflexion_workflow,
        question_sets=questions_for_instruct_models,
    ),
]

# Rows of trained stages, which act by themselves. Those whose folder is missing are left out.
STAGES = [
    TableRow("SFT-1", SFT1, agent, trained_from=BASE),
    TableRow("SFT-2", SFT2_ALONE, agent, trained_from=BASE),
    TableRow("SFT-1&2", SFT2, agent, trained_from=SFT1),
    TableRow("SFT-1&2&3", SFT3, agent, trained_from=SFT2),
    TableRow("RL-2 alone", RL2_ALONE, agent, trained_from=BASE),
    TableRow("SFT-1&2&3+RL-1", RL1, agent, trained_from=SFT3),
    TableRow("SFT-1&2&3+RL-1&2", RL2, agent, trained_from=RL1),
    TableRow("SFT-1&2+RL-2", RL2_FROM_SFT2, agent, trained_from=SFT2),
]


@dataclass
class Table:
    """What one evaluation compares, and where its answers are kept."""

    root: Path
    base: LM
    base_folder: Path
    rows: list[TableRow]


def open_run(settings: EvalSettings) -> Table:
    """Return the rows of a run: workflows around its base model, and each stage that is there.

    A folder that another name was given to with --out is a row by that name.
    """
    root = run_folder(settings)
    stage_folders = [row.folder.name for row in STAGES]
    base_folder = find_start(root, "base", ["base", *stage_folders])
    base = model.load(base_folder, settings)
    own_rows = [
        TableRow(config.parent.name, Path(config.parent.name), agent)
        for config in sorted(root.glob("*/config.json"))
        if config.parent.suffix not in (".partial", ".checkpoint", REPLACED_SUFFIX)
        and not (config.parent / COST_FILE).is_file()
        and config.parent.name not in ["base", *stage_folders]
    ]
    # A folder of --out that is called like a row takes its place.
    rows_by_name = {row.name: row for row in WORKFLOWS + STAGES + own_rows}
    rows = [
        _row_in(root, row)
        for row in rows_by_name.values()
        if (root / row.folder / "config.json").is_file()
    ]
    return Table(root, base, base_folder, rows)


def _row_in(root: Path, row: TableRow) -> TableRow:
    trained_from = None
    if row.trained_from is not None:
        trained_from = root / row.trained_from
    return dataclasses.replace(row, folder=root / row.folder, trained_from=trained_from)


def open_checkpoint(settings: EvalSettings) -> Table:
    """Return the rows of a checkpoint as it is: workflows, and the agent where it is one."""
    if not settings.model:
        raise UserError("--data: it needs --model, the checkpoint to judge")
    base, has_tags = model.load_any(settings.model, settings)
    folder = Path(settings.model)
    rows = [dataclasses.replace(row, folder=folder) for row in WORKFLOWS]
    if settings.authors_prompt:
        refuse_authors_prompt(base, has_tags)
        rows.append(TableRow("agent", folder, spelled_agent))
    elif has_tags:
        rows.append(TableRow("agent", folder, agent))
    # Two runs may have folders of one name.
    path = folder.resolve()
    path_hash = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return Table(Path("out", "eval", f"{path.name}-{path_hash}"), base, folder, rows)


def refuse_authors_prompt(base: LM, has_tags: bool) -> None:
    """Raise UserError where a checkpoint can't be asked by the authors' prompt."""
    if has_tags:
        raise UserError(
            "--authors_prompt: the tags are tokens of this checkpoint, which spells none; "
            "leave it out"
        )
    if not base.codec.has_chat_template:
        raise UserError(
            "--authors_prompt: the authors ask in turns, and this checkpoint has no chat template; "
            "add its chat_template.jinja"
        )


# ---- 4. The evaluation ---------------------------------------------------------------------------
def run(settings: EvalSettings) -> None:
    """Have each row of the table answer its questions, and print the table."""
    if settings.compare:
        compare_rows(settings)
        return
    if settings.authors_prompt and not settings.data:
        raise UserError(
            "--authors_prompt: it asks a checkpoint from elsewhere; name it with --model, and its "
            "questions with --data"
        )
    start = time.time()
    settle_by_device(settings, begins_run=bool(settings.data))
    task = open_task(settings, settings.data)
    table = open_checkpoint(settings) if settings.data else open_run(settings)
    refuse_unknown_rows(settings.rows, table.rows)
    task.leave_out_long_questions(table.base.codec, settings.longest_prompt)
    if not memory.report(table.base, settings, "eval", None):
        return
    with only_process(table.root):
        ask_rows(table, EvalContext(task, settings), start)


def ask_rows(table: Table, context: EvalContext, start: float) -> None:
    """Ask what is missing of each row, print the table and write both files.

    start: when the command began, in seconds.
    """
    task = context.task
    settings = context.settings
    # A judge that can't be reached is refused before the rows take their time.
    chat = None
    if settings.judge and ranks.is_first():
        chat = Chat(settings.judge, settings, "judge", batch_rows=settings.batch_rows)
    known_facts = recall_facts(table, context)
    predictions = open_predictions(table, context)

    answers: Answers = {}
    figures: Figures = {}
    for row in table.rows:
        sets = row.question_sets(table.base, task)
        is_chosen = not settings.rows or row.name in settings.rows
        if not is_chosen:
            # It stands with what it has answered.
            sets = predictions.answered(row.name, sets)
        warn_of_older_stage(row)
        if not sets:
            continue
        ask_what_is_missing(row, sets, table, context, predictions)
        answers[row.name] = predictions.of_row(row.name, sets)
        figures[row.name] = summarize(answers[row.name], sets, known_facts)

    if not ranks.is_first():
        return
    add_gains(figures, answers)
    judge_error = None
    if chat is not None:
        try:
            add_verdicts(chat, figures, answers)
        except UserError as error:
            # The table is worth more than its last column.
            judge_error = error
    predictions.finish(answers)
    print(format_table(figures, task.evaluation))
    if settings.rows:
        print_shorter_rows(figures, settings.rows)
    print(task.eval_search.report())
    result = {
        "rows": {name: row_to_json(row) for name, row in figures.items()},
        "model": str(table.root),
        "seed": settings.seed,
        "seconds": round(time.time() - start, 1),
    }
    write_text(table.root / "eval.json", to_json(result, indent=1))
    print(to_json(result))
    if judge_error is not None:
        raise judge_error


def refuse_unknown_rows(names: Sequence[str], rows: Sequence[TableRow]) -> None:
    """Raise UserError for a name in --rows that no row has."""
    row_names = [row.name for row in rows]
    for name in names:
        if name not in row_names:
            raise UserError(
                f"--rows: there is no row {name!r} here; there are: {', '.join(row_names)}"
            )


def recall_facts(table: Table, context: EvalContext) -> set[str]:
    """Return the facts that the base model knows, of those that evaluation needs."""
    settings = context.settings
    return recall_known_facts(
        table.base,
        [question for questions in context.task.evaluation.values() for question in questions],
        settings,
        path=table.root / "known.json",
        provenance=provenance_hash(table.base_folder, settings),
        may_reuse=settings.resume or bool(settings.rows),
    )


def open_predictions(table: Table, context: EvalContext) -> Predictions:
    """Return the predictions of earlier evaluations that still hold, in all processes the same."""
    settings = context.settings
    sets = list(context.task.evaluation)

    def read_files() -> Predictions:
        provenance = {row.name: provenance_hash(row.folder, settings) for row in table.rows}
        return Predictions(table.root, provenance, settings.resume, settings.rows, sets)

    return ranks.of_first(read_files)


def warn_of_older_stage(row: TableRow) -> None:
    """Print that a stage is older than the folder from which it should come."""
    if row.trained_from is None or not (row.trained_from / "config.json").is_file():
        return
    started = (row.trained_from / "config.json").stat().st_mtime
    if (row.folder / "config.json").stat().st_mtime < started:
        print(
            f"{row.folder} is older than {row.trained_from}, from which it should come: "
            "train it again, or this row compares two runs"
        )


def ask_what_is_missing(
    row: TableRow, sets: QuestionSets, table: Table, context: EvalContext, predictions: Predictions
) -> None:
    """Have a row answer the questions of some sets that it has not answered yet."""
    lm = None
    at_once = BATCHES_AT_A_TIME * context.settings.batch_rows * ranks.count()
    for batch in predictions.batches_to_ask(row.name, sets, at_once):
        if lm is None:
            lm = table.base
            if row.folder != table.base_folder:
                lm = model.load(row.folder, context.settings)
        questions = [question for _, question in batch]
        answers = row.workflow(lm, questions, context, row.name)
        results = [
            score_answer(row, lm, question, answer, context.settings.cache)
            for question, answer in zip(questions, answers, strict=True)
        ]
        predictions.add(row.name, batch, results)


def score_answer(
    row: TableRow, lm: LM, question: Question, answered: Answered, cache: str
) -> ScoredAnswer:
    """Return an answer with its scores."""
    answer, trajectory = answered
    golden = question.golden_answers
    malformed = None
    forced = None
    if row.is_agent:
        malformed = float(not lm.codec.is_well_formed(trajectory))
        forced = float(trajectory.forced)
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": golden,
        "answer": answer,
        "em": exact_match(answer, golden),
        "f1": f1(answer, golden),
        "cover": cover_match(answer, golden),
        "overlap": overlap_match(answer, golden),
        "actions": len(trajectory.queries),
        "queries": trajectory.queries,
        "malformed": malformed,
        "forced": forced,
        "lost": count_lost(trajectory.observations, cache),
        "text": lm.codec.decode(trajectory.ids),
    }


def count_lost(observations: Sequence[Observation], cache: str) -> int:
    """Return how many searches failed.

    One that the cache lacks is lost too; but with --cache=replay that is what was asked for.
    """
    lost = [Provenance.FAILED]
    if cache != "replay":
        lost.append(Provenance.MISSED)
    return sum(observation.provenance in lost for observation in observations)


# ---- 5. Further figures --------------------------------------------------------------------------
Figures = dict[str, RowFigures]  # row -> its figures
Answers = dict[str, dict[str, list[Prediction]]]  # row -> set -> predictions


def add_gains(figures: Figures, answers: Answers) -> None:
    """Add to each row how much more EM it has than the ReAct workflow."""
    if WorkflowName.REACT not in answers:
        return
    for name, row in figures.items():
        row.gain = paired_gain([(answers[name], answers[WorkflowName.REACT])])


def print_shorter_rows(figures: Figures, asked: Sequence[str]) -> None:
    """Say which of the rows that --rows left alone had been asked fewer questions before."""
    most = max((row.questions for name, row in figures.items() if name in asked), default=0)
    shorter = [
        f"{name} ({row.questions:,})"
        for name, row in figures.items()
        if name not in asked and row.questions < most
    ]
    if shorter:
        print(f"rows of fewer questions than the others' {most:,}: {', '.join(shorter)}")


def add_verdicts(chat: Chat, figures: Figures, answers: Answers) -> None:
    """Add to predictions and figures what a language model says of the answers.

    Raises UserError where it can't be asked; then nothing is added.
    """
    verdicts = {
        row: {
            name: judge(chat, [dict(prediction) for prediction in predictions])
            for name, predictions in sets.items()
        }
        for row, sets in answers.items()
    }
    for row, sets in answers.items():
        for name, predictions in sets.items():
            for prediction, verdict in zip(predictions, verdicts[row][name], strict=True):
                prediction["judge"] = verdict
        figures[row].judge = summarize_verdicts(verdicts[row])
    print(chat.report())


def compare_rows(settings: EvalSettings) -> None:
    """Print how much better one row is than another, over the predictions of one or several runs.

    Each question set has the same weight.
    """
    if len(settings.compare) != 2 or len(set(settings.compare)) != 2:
        raise UserError(
            "--compare: two rows are needed, separated by a comma, "
            f"not {','.join(settings.compare)!r}"
        )
    first, second = settings.compare
    run_names = settings.runs or [settings.run]
    runs = []
    for run_name in run_names:
        path = Path("out", run_name, "predictions.jsonl")
        predictions = read_predictions(path, settings.compare, "--runs")
        runs.append((predictions[first], predictions[second]))
    gain = gain_to_json(paired_gain(runs))
    rounded = {name: round(value, 2) for name, value in gain.items()}
    print(to_json({"rows": settings.compare, "runs": run_names, **rounded}))


if __name__ == "__main__":
    # With --data a checkpoint is judged as it is: nothing that a run remembers is about it.
    main(run, EvalSettings, __doc__, begins_run=lambda settings: bool(settings.data))
