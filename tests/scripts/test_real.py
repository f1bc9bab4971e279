"""The real path as a user runs it, tiny, start to end.

A checkpoint of another program, question files and a passage file; all of them are made here.
"""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import CPU, ROOT, read_rows, run_here, strict_json
from small_checkpoint import (
    ONE_HOP,
    PASSAGES,
    PEOPLE,
    TINY_COUNTS,
    TOWNS,
    TWO_HOPS,
    save_checkpoint,
)

import model
from data.questions import sixteenth
from data.sft_data import read_trajectories
from data.trajectory import Role
from tasks.real import PARTS

CONFIG = str(ROOT / "config" / "smollm2.py")
TINY = [
    "--run=real",
    "--model=checkpoint",
    # FlashRAG's form, and verl's.
    "--train_data=hotpotqa_train.jsonl,nq_train.parquet",
    "--eval_data=hotpotqa_dev.jsonl,nq_dev.parquet",
    "--corpus=passages.jsonl.gz",
    *TINY_COUNTS,
    "--eval_questions=3",
    "--max_len=480",
    "--max_observation=60",
]
SCRIPTS = ("train_sft", "train_rl", "eval")


def write_rows(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run all scripts in a folder of its own: cwd, root (out/real), and what each printed."""
    cwd = tmp_path_factory.mktemp("user")
    save_checkpoint(cwd / "checkpoint")
    for name, questions in (("hotpotqa", TWO_HOPS), ("nq", ONE_HOP)):
        for split in ("train", "dev"):
            write_rows(cwd / f"{name}_{split}.jsonl", questions)
    lines = [
        json.dumps({"id": str(number), "contents": contents}) + "\n"
        for number, contents in enumerate(PASSAGES)
    ]
    (cwd / "passages.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    for split in ("train", "dev"):
        done = run_here(cwd, "data.export", f"nq_{split}.jsonl", f"nq_{split}.parquet")
        assert done.status == 0, done.err
    scripts = {name: run_here(cwd, f"{name}.py", CONFIG, *TINY) for name in SCRIPTS}
    failed = [(name, done.err[-2000:]) for name, done in scripts.items() if done.status]
    assert failed == []
    return SimpleNamespace(cwd=cwd, root=cwd / "out" / "real", **scripts)


@pytest.fixture(scope="module")
def base_codec(user: Any) -> Any:
    return model.load(user.root / "base", CPU).codec


# ---- training ------------------------------------------------------------------------------------
def test_chains_on_real_questions(user: Any, base_codec: Any) -> None:
    """The teacher's chains search the passages of the file, and answer what they have seen.

    There are two searches where two gold passages are named, and nothing is cut.
    """
    chains = read_trajectories(user.root / "data" / "coa.jsonl")
    searches_of_prompt = base_codec.prompt("").count(base_codec.search_id)
    searches = {chain.ids.count(base_codec.search_id) - searches_of_prompt for chain in chains}
    # Of the questions that fall to SFT, the teacher solves nearly all.
    texts = [row["question"] for row in TWO_HOPS + ONE_HOP]
    own_questions = [text for text in texts if sixteenth(text) in PARTS["sft"]]
    assert len(own_questions) >= 8
    assert len(chains) >= len(own_questions) - 2
    assert {1, 2} <= searches
    for chain in chains:
        answer = base_codec.answer(chain)
        assert base_codec.is_well_formed(chain)
        assert answer in TOWNS + PEOPLE
        observed = [
            token
            for token, role in zip(chain.ids, chain.role, strict=True)
            if role == Role.OBSERVATION
        ]
        assert answer in base_codec.decode(observed)


def test_pairs_on_real_questions(user: Any, base_codec: Any) -> None:
    """A checkpoint that solves nothing in a workflow still gets pairs.

    Acting is what the teacher's searches find, and is chosen where recall was wrong.
    """
    sides = read_trajectories(user.root / "data" / "pairs.jsonl")
    assert len(sides) == 6
    for chosen, rejected in zip(sides[0::2], sides[1::2], strict=True):
        assert Role.ACTION in chosen.role
        assert Role.ACTION not in rejected.role
        learned = [token for token, mask in zip(chosen.ids, chosen.mask, strict=True) if mask]
        assert base_codec.search_id in learned


def test_training_on_files_of_others(user: Any) -> None:
    """The run's own SFT data, as AutoCoA's files, trains to the same weights.

    A row that is no trajectory is counted and named.
    """
    done = run_here(user.cwd, "data.export", "out/real/data", "theirs")
    assert done.status == 0, done.err
    with open(user.cwd / "theirs" / "coa.jsonl", "a") as file:
        file.write('{"messages": []}\n')
    files = ",".join(sorted(f"theirs/{path.name}" for path in (user.cwd / "theirs").iterdir()))
    arguments = [CONFIG, *TINY, "--run=again", f"--sft_files={files}"]
    done = run_here(user.cwd, "train_sft.py", *arguments)
    assert done.status == 0, done.err
    message = "1 rows are no trajectories and are left out, the first at theirs/coa.jsonl:"
    assert message in done.out
    again = user.cwd / "out" / "again"
    for name in ("coa", "cot", "pairs"):
        own_rows = read_rows(user.root / "data" / f"{name}.jsonl")
        assert own_rows == read_rows(again / "data" / f"{name}.jsonl")
    own_weights = (user.root / "sft3" / "model.safetensors").read_bytes()
    assert own_weights == (again / "sft3" / "model.safetensors").read_bytes()


def test_the_last_stage_in_transformers(user: Any) -> None:
    """Other programs read the same weights, tags and chat template."""
    lm = model.load(user.root / "rl2", CPU)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(user.root / "rl2")
    network = transformers.AutoModelForCausalLM.from_pretrained(user.root / "rl2")
    assert tokenizer.chat_template
    prompt = lm.codec.prompt("Who?")
    assert tokenizer.encode(lm.codec.decode(prompt), add_special_tokens=False) == prompt
    ids = torch.tensor([lm.codec.prompt("Who wrote The Clay Hour?")])
    with torch.no_grad():
        logits = lm.network.logits(lm.network(ids))
        torch.testing.assert_close(logits, network(ids).logits, atol=1e-4, rtol=0)


# ---- the table -----------------------------------------------------------------------------------
def test_stages_and_table_of_the_real_path(user: Any) -> None:
    """All stages, both environments, and a row each in the table, by question file."""
    folders = {path.name for path in user.root.iterdir()}
    assert {"base", "sft1", "sft2", "sft3", "rl1", "rl2"} <= folders
    result = strict_json(user.eval.out.splitlines()[-1])
    sets = {name: set(row) - {"avg"} for name, row in result["rows"].items()}
    assert len(sets) == 11
    assert "Reflexion workflow" in sets
    # The questions of the other set do not name their passages.
    assert sets.pop("oracle passages") == {"hotpotqa_dev"}
    assert all(names == {"hotpotqa_dev", "nq_dev"} for names in sets.values())
    assert len(read_rows(user.root / "rl2" / "log.jsonl")) == 1


def judge_checkpoint(user: Any, folder: Path, *arguments: Any) -> Any:
    """Run eval.py on one question file, whatever the checkpoint."""
    settings = [
        "--max_len=480",
        "--max_observation=60",
        "--data=hotpotqa_dev.jsonl",
        "--corpus=passages.jsonl.gz",
        "--eval_questions=3",
        f"--model={folder}",
    ]
    return run_here(user.cwd, "eval.py", CONFIG, *settings, *arguments)


def last_line(done: Any) -> Any:
    assert done.status == 0, done.err
    return strict_json(done.out.splitlines()[-1])["rows"]


@pytest.fixture
def judged(user: Any) -> Any:
    """Judge the last stage as any checkpoint: its table, and the path of its predictions."""
    shutil.rmtree(user.cwd / "out" / "eval", ignore_errors=True)
    table = last_line(judge_checkpoint(user, "out/real/rl2"))
    folder = next((user.cwd / "out" / "eval").glob("rl2-*"))
    return SimpleNamespace(table=table, path=folder / "predictions.jsonl")


def test_a_checkpoint_of_another_program_is_judged(user: Any) -> None:
    """Without training, by its workflows."""
    table = last_line(judge_checkpoint(user, "checkpoint"))
    assert len(table) == 6
    assert "agent" not in table


def test_a_checkpoint_is_asked_as_the_authors_ask(user: Any) -> None:
    """By their preset alone, on their form of file: each of its sets is a column."""
    exported = run_here(
        user.cwd, "data.export", "hotpotqa_dev.jsonl", "nq_dev.jsonl", "test.parquet"
    )
    assert exported.status == 0, exported.err
    preset = str(ROOT / "config" / "autocoa.py")
    settings = ["--data=test.parquet", "--model=checkpoint", "--corpus=passages.jsonl.gz"]
    tiny = ["--eval_questions=1", "--max_len=1200", "--max_observation=60", "--dtype=float32"]
    done = run_here(user.cwd, "eval.py", preset, *settings, *tiny)
    (row,) = last_line(done).items()
    assert row[0] == "agent"
    assert set(row[1]) >= {"hotpotqa_dev", "nq_dev"}
    done = run_here(user.cwd, "eval.py", preset, *settings, *tiny, "--model=out/real/rl2")
    assert done.status == 2
    assert "--authors_prompt: the tags are tokens of this checkpoint" in done.err


def test_a_checkpoint_of_this_project_is_judged(judged: Any) -> None:
    """By its workflows, and as the agent that it is."""
    assert len(judged.table) == 7
    assert "agent" in judged.table


def test_an_evaluation_that_was_cut_goes_on(user: Any, judged: Any) -> None:
    """--resume ends with the same predictions, and then asks nothing again."""
    before = judged.path.read_text()
    lines = before.splitlines(keepends=True)
    partial = judged.path.with_name("predictions.jsonl.partial")
    # It was stopped in the middle of a line.
    partial.write_text("".join(lines[:5]) + lines[5][:40])
    judged.path.write_text("")
    done = judge_checkpoint(user, "out/real/rl2", "--resume")
    assert done.status == 0, done.err
    assert judged.path.read_text() == before
    assert not partial.exists()
    done = judge_checkpoint(user, "out/real/rl2", "--resume")
    assert done.status == 0, done.err
    assert judged.path.read_text() == before
    assert "no call of a tool" in done.out


def test_chosen_rows_leave_the_others(user: Any, judged: Any) -> None:
    """The other rows' answers stay, and are in the table."""
    before = judged.path.read_text()
    done = judge_checkpoint(user, "out/real/rl2", "--rows=agent,model only", "--resume")
    assert last_line(done) == judged.table
    assert sorted(judged.path.read_text().splitlines()) == sorted(before.splitlines())


def test_a_row_that_a_checkpoint_does_not_have(user: Any) -> None:
    done = judge_checkpoint(user, "out/real/rl2", "--rows=SFT-1")
    assert done.status == 2
    assert "no row 'SFT-1' here; there are: model only (at once), model only," in done.err


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--data=hotpotqa_dev.jsonl", "it needs --model"),
        ("--compare=a", "two rows are needed"),
        ("--authors_prompt", "name it with --model, and its questions with --data"),
    ],
)
def test_what_evaluation_needs(user: Any, argument: str, message: str) -> None:
    done = run_here(user.cwd, "eval.py", argument, "--eval_questions=1")
    assert done.status == 2
    assert message in done.err


@pytest.mark.parametrize("more", [[], ["--lora_rank=2"]])
def test_a_world_model_of_a_checkpoint(user: Any, tmp_path: Path, more: list[str]) -> None:
    """It goes on from the run's base, whole or as an adapter, and answers in RL-1.

    SFT has the same tool as RL here, so that the searches of its chains are logged calls.
    """
    shutil.copytree(user.cwd, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "out" / "real"
    arguments = ["--run=real", "--world_model_epochs=1", "--world_model=small", *more]
    done = run_here(tmp_path, "world_model.py", "distill", *arguments, "--sources=logs,sweep")
    assert done.status == 0, done.err
    cost = strict_json((root / "small" / "cost.json").read_text())
    assert cost["sources"] == ["logs", "sweep"]
    learned = {row["query"] for row in read_rows(root / "small" / "examples.jsonl")}
    # The sweep asks for titles; what the teacher asked besides are questions.
    assert set(PEOPLE) <= learned
    assert any(query.endswith("?") for query in learned)
    weights = "adapter_model.safetensors" if more else "model.safetensors"
    assert (root / "small" / weights).is_file()

    stage = ["--stage=rl1", "--start=base", "--out=imagined", "--rl1_environment=distilled"]
    done = run_here(tmp_path, "train_rl.py", *arguments, *stage, "--rl1_pool=rl2")
    assert done.status == 0, done.err
    (step,) = read_rows(root / "imagined" / "log.jsonl")
    assert step["real_calls"] == 0
