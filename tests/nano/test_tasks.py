"""The two tasks: the pools of training questions, evaluation's sets, tools and models."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.settings import NewModelSettings, TaskRunSettings
from data.questions import facts_by_id, sixteenth
from data.teacher import find_evidence
from data.trajectory import Codec
from nano.questions import SETS
from tasks import open_task
from tasks.nano import POOLS, NanoTask
from tasks.real import RealTask

PASSAGES = [
    {"id": "0", "contents": '"Silver River"\nA film.'},
    {"id": "1", "contents": '"Eva Moss"\nA star.'},
]
QUESTION = {"id": "dev_0", "question": "Who?", "golden_answers": ["Eva"]}


def write_rows(path: Path, rows: Any) -> Any:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- nano ----------------------------------------------------------------------------------------
def test_pools_are_apart() -> None:
    """Training questions of a run's pools differ; evaluation has its six sets."""
    task = open_task(TaskRunSettings(eval_questions=20))
    assert isinstance(task, NanoTask)
    chains = task.questions("coa", 100)
    thoughts = task.questions("cot", 100)
    pairs = task.questions("act", 100)
    questions = chains + thoughts + pairs
    assert len(questions) == 300
    assert len({question.question for question in questions}) == 300
    assert len({question.id for question in questions}) == 300
    assert {name: len(rows) for name, rows in task.evaluation.items()} == dict.fromkeys(SETS, 20)
    for question in thoughts:
        for fact in question.facts:
            assert fact.head or fact.lookups[0].tool == "calculate"
    assert not any("compose" in question.id for question in chains)
    # Asked for again, a pool is the same.
    assert task.questions("coa", 100) == chains


def test_a_pool_is_a_function_of_seed_and_name() -> None:
    """Whatever was asked before, a pool is the same, and a larger one begins with the smaller.

    Guards: RL-2 alone, or after --resume, trained on other questions than the whole command.
    """
    task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2))
    rl2 = task.questions("rl2", 60)
    other_task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2))
    for pool in ("rl1", "held_out", "coa"):
        other_task.questions(pool, 40)
    assert other_task.questions("rl2", 90)[:60] == rl2
    other_seed = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2, seed=1))
    assert other_seed.questions("rl2", 60) != rl2


def test_pools_of_one_world_own_different_questions() -> None:
    """By a hash of the text, so that two seeds of a pool would not meet another pool either."""
    owners: dict[tuple[str, int], str] = {}
    for name, pool in POOLS.items():
        for part in pool.parts:
            assert owners.setdefault((pool.world, part), name) == name
    task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2))
    for name, pool in POOLS.items():
        parts = {sixteenth(question.question) for question in task.questions(name, 80)}
        assert parts <= set(pool.parts)
        assert len(parts) > len(pool.parts) / 2


def test_a_pool_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how many questions there are, and what to do."""
    monkeypatch.setattr("tasks.nano.MOST_DRAWS", 300)
    task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2))
    with pytest.raises(
        UserError, match=r"no more than about \d+ .*'think'.*--pairs.*--train_scale"
    ):
        task.questions("think", 20_000)
    assert task.questions("rl2", 0) == []


def head_share(questions: Any) -> Any:
    """Return how many questions begin with a fact about a head entity."""
    return sum(question.facts[0].head for question in questions) / len(questions)


def test_pools_begin_at_entities_that_the_model_knows_or_not() -> None:
    """Thoughts are about known entities alone, RL-1 asks about none, and the rest about a few.

    Guards: RL-1 that is rewarded for imagining a search for what it knows.
    """
    task = NanoTask(TaskRunSettings(eval_questions=2))
    shares = {
        pool: head_share(task.questions(pool, 400))
        for pool in ("sample", "coa", "cot", "act", "think", "rl1", "rl2")
    }
    assert shares["cot"] == shares["think"] == 1
    assert shares["rl1"] == 0
    # Of single facts twice as many are; see draw_questions.
    assert 0.02 < shares["coa"] < 0.10
    for pool in ("sample", "act", "rl2"):
        assert 0.08 < shares[pool] < 0.22


def share_found(search: Any, lookups: Any) -> Any:
    """Return how many look-ups find what they need with their first query."""
    observations = search([lookup.queries[0] for lookup in lookups])
    found = [
        find_evidence(lookup, observation.text) != ""
        for lookup, observation in zip(lookups, observations, strict=True)
    ]
    return sum(found) / len(found)


def test_rl_with_the_tool_has_a_world_of_its_own() -> None:
    """What RL-2's questions need is found by RL-2's tool and hardly by SFT's.

    SFT's is a world that the policy has read.
    """
    task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2))
    for pool, own_search, other_search in (
        ("rl1", task.search, task.rl_search),
        ("rl2", task.rl_search, task.search),
    ):
        facts = [fact for question in task.questions(pool, 100) for fact in question.facts]
        lookups = [fact.lookups[0] for fact in facts if not fact.head]
        assert share_found(own_search, lookups) > 0.85
        assert share_found(other_search, lookups) < 0.35


def test_a_new_nano_model() -> None:
    """It has the size that the settings say, and a tokenizer of the nano world."""
    task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2))
    settings = NewModelSettings(device="cpu", vocab_size=600, width=64, layers=1)
    lm = task.new_model(settings)
    config = lm.network.config
    assert (config.hidden_size, config.num_hidden_layers) == (64, 1)
    assert config.vocab_size == len(lm.codec.tokenizer) == 600
    with pytest.raises(UserError, match="auto, cpu, cuda, mps"):
        task.new_model(NewModelSettings(device="gpu"))


def test_practice_is_made_up(codec: Codec) -> None:
    """Three fifths of the chains of thought practise planning, and none of these searches."""
    task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=2))
    chains = task.practice_chains(codec, random.Random(0), 9)
    assert len(chains) == 5
    assert all(codec.search_id not in chain.ids for chain in chains)


# ---- real ----------------------------------------------------------------------------------------
@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a passage file, in a folder where its index may go."""
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path / "passages.jsonl", PASSAGES)


@pytest.mark.parametrize(
    "facts",
    [
        {"title": ["Orla Venn", "The Clay Hour", "Orla Venn"], "sent_id": [0, 1, 2]},
        [["Orla Venn", 0], ["The Clay Hour", 1]],
    ],
)
def test_flashrags_own_layout(tmp_path: Path, corpus: Any, facts: Any) -> None:
    """hotpotqa/dev.jsonl beside nq/dev.jsonl are two sets, each named by its folder.

    The name says which set is of several hops, and the supporting facts of raw rows are its gold
    passages. Guards: the second dev.jsonl in the place of the first.
    """
    two_hops = {
        **QUESTION,
        "question": "Where did the author of The Clay Hour grow up?",
        "metadata": {"supporting_facts": facts},
    }
    files = [
        write_rows(tmp_path / "hotpotqa" / "dev.jsonl", [two_hops]),
        write_rows(tmp_path / "nq" / "dev.jsonl", [QUESTION]),
    ]
    task = open_task(TaskRunSettings(model="x", corpus=corpus), question_files=files)
    assert isinstance(task, RealTask)
    (hotpotqa,) = task.evaluation["hotpotqa_dev"]
    (nq,) = task.evaluation["nq_dev"]
    assert [lookup.title for lookup in hotpotqa.lookups] == ["The Clay Hour", "Orla Venn"]
    assert hotpotqa.id == "hotpotqa_dev:dev_0"
    assert nq.id == "nq_dev:dev_0"
    assert task.questions("coa", 5) == []


def test_data_sets_may_use_the_same_ids(tmp_path: Path, corpus: Any) -> None:
    """FlashRAG numbers each set from train_0 on.

    Guards: what is known of one question passes for another's.
    """
    # Both questions fall to SFT's pools.
    first = {**QUESTION, "question": "Which?"}
    second = {**QUESTION, "question": "What?", "golden_answers": ["Ada"]}
    nq = write_rows(tmp_path / "nq.jsonl", [first])
    triviaqa = write_rows(tmp_path / "triviaqa.jsonl", [second])
    settings = TaskRunSettings(model="x", train_data=[nq, triviaqa], eval_data=[nq], corpus=corpus)
    questions = open_task(settings).questions("coa", 2)
    assert len(facts_by_id(questions)) == 2
    assert len({question.id for question in questions}) == 2


def real_task(tmp_path: Path, corpus: Any, **settings: Any) -> Any:
    """Return a task of a hundred training questions and ten of each of two evaluation sets."""
    rows = [{**QUESTION, "id": str(number), "question": f"Who {number}?"} for number in range(100)]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows[:60]) for name in ("nq", "popqa")]
    train_file = write_rows(tmp_path / "train.jsonl", rows)
    return RealTask(
        TaskRunSettings(
            model="x", train_data=[train_file], eval_data=files, corpus=corpus, **settings
        )
    )


def test_real_pools_are_apart(tmp_path: Path, corpus: Any) -> None:
    """SFT, RL-1 and RL-2 own different questions; each is shuffled, and cut by its size alone."""
    task = real_task(tmp_path, corpus)
    pools = {name: task.questions(name, 100) for name in ("coa", "rl1", "rl2", "held_out")}
    ids = [question.id for pool in pools.values() for question in pool]
    assert len(ids) == len(set(ids)) == 100
    assert len(pools["coa"]) > len(pools["rl2"]) > len(pools["held_out"]) > 0
    assert task.questions("cot", 100) == pools["coa"]
    assert task.questions("rl2", 5) == pools["rl2"][:5]
    in_file_order = sorted(pools["rl2"], key=lambda question: int(question.id.rpartition(":")[2]))
    assert pools["rl2"] != in_file_order


def test_too_few_real_questions_for_a_pool(tmp_path: Path, corpus: Any) -> None:
    """One line says so. Guards: a stage of no questions, which fails at its first step."""
    train_file = write_rows(tmp_path / "train.jsonl", [QUESTION])
    settings = TaskRunSettings(
        model="x", train_data=[train_file], eval_data=[train_file], corpus=corpus
    )
    pools = ("coa", "rl1", "rl2", "held_out")
    empty = []
    for pool in pools:
        try:
            assert len(RealTask(settings).questions(pool, 3)) == 1
        except UserError as error:
            assert "train_data: of 1 questions none falls to" in str(error)
            empty.append(pool)
    assert len(empty) == 3


def test_a_sample_of_evaluation(tmp_path: Path, corpus: Any) -> None:
    """Each set's sample is its own: another for another set, the same whatever else is asked.

    A larger one begins with the smaller. Guards: rows of 20 and of 100 questions with none shared.
    """
    task = real_task(tmp_path, corpus, eval_questions=4)
    numbers = {
        name: [question.question for question in questions]
        for name, questions in task.evaluation.items()
    }
    assert len(numbers["nq"]) == len(numbers["popqa"]) == 4
    assert numbers["nq"] != numbers["popqa"]
    files = [str(tmp_path / "popqa.jsonl")]
    settings = TaskRunSettings(model="x", corpus=corpus, eval_questions=4)
    alone = RealTask(settings, question_files=files)
    assert alone.evaluation["popqa"] == task.evaluation["popqa"]
    larger = RealTask(
        TaskRunSettings(model="x", corpus=corpus, eval_questions=50), question_files=files
    )
    assert larger.evaluation["popqa"][:4] == alone.evaluation["popqa"]


def test_a_real_task_has_one_tool_and_trains_no_base(
    tmp_path: Path, corpus: Any, codec: Codec
) -> None:
    task = real_task(tmp_path, corpus)
    assert task.search is task.rl_search is task.eval_search
    assert task.search(["Silver River"])[0].text == "Silver River 1: A film."
    assert task.practice_chains(codec, random.Random(0), 5) == []
    assert task.pretraining_texts(codec, random.Random(0), 1000) == []
    assert not task.base_model_acts


def test_a_real_model_on_a_device_that_is_not_there(tmp_path: Path, corpus: Any) -> None:
    """It is refused before the checkpoint is looked for."""
    task = real_task(tmp_path, corpus)
    with pytest.raises(UserError, match="auto, cpu, cuda, mps"):
        task.new_model(NewModelSettings(device="gpu"))
    with pytest.raises(UserError, match="x"):
        task.new_model(NewModelSettings(device="cpu"))


@pytest.mark.parametrize("missing", ["train_data", "eval_data", "corpus"])
def test_settings_that_a_real_run_needs(missing: str) -> None:
    settings = TaskRunSettings(model="x", train_data=["a"], eval_data=["b"], corpus="c")
    setattr(settings, missing, [] if missing != "corpus" else "")
    with pytest.raises(UserError, match="a run with --model needs all three") as error:
        open_task(settings)
    assert ("eval.py alone can do with --data" in str(error.value)) == (missing == "train_data")


def test_long_questions_are_left_out_everywhere(
    tmp_path: Path, corpus: Any, codec: Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the pools and of evaluation, with their file and line; pools keep their order.

    Guards: one long question, at which SFT ended after its first stage, and RL and evaluation in
    their midst.
    """
    rows = [{**QUESTION, "id": str(n), "question": f"Which {'very ' * n}?"} for n in range(40)]
    file = write_rows(tmp_path / "nq.jsonl", rows)
    task = open_task(TaskRunSettings(model="x", train_data=[file], eval_data=[file], corpus=corpus))
    pools = {name: task.questions(name, 99) for name in ("coa", "rl1", "rl2")}
    longest = len(codec.prompt(rows[20]["question"]))
    task.leave_out_long_questions(codec, longest)
    assert f"{file}:22 " in capsys.readouterr().out
    for name, before in pools.items():
        kept = {question.id for question in task.questions(name, 99)}
        assert kept == {q.id for q in before if len(codec.prompt(q.question)) <= longest}
    assert len(task.evaluation["nq"]) == 21
    with pytest.raises(UserError, match="max_len: it leaves 1 tokens"):
        task.leave_out_long_questions(codec, 1)


def test_a_nano_pool_has_no_long_questions(codec: Codec) -> None:
    """What is drawn from then on is short enough, in evaluation and in every pool."""
    task = NanoTask(TaskRunSettings(train_scale=1, eval_questions=20))
    lengths = sorted(len(codec.prompt(q.question)) for q in task.questions("rl2", 30))
    longest = lengths[15]
    task.leave_out_long_questions(codec, longest)
    questions = task.questions("rl2", 30) + [q for qs in task.evaluation.values() for q in qs]
    assert max(len(codec.prompt(question.question)) for question in questions) <= longest
