"""The real path as a user runs it, tiny: a checkpoint of another program, question files and a passage file, start to end.

Checkpoint, questions and passages are made here: a random Llama with a chat template, and sentences invented for the test.
"""
import gzip
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, rows, run_script, strict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import autocoa
import model
import train_sft
import workflows

TOWNS = "Tallow Marrow Ferrin Ostley Brack Dunmere Hallow Pell".split()
PEOPLE = "Orla Venn,Ivo Lark,Nan Sorrel,Tam Birch,Una Quill,Rolf Egan,Edda Moor,Piet Vale".split(",")
BOOKS = "The Clay Hour,The Tin Boat,A Salt Door,The Wax Moon,A Glass Road,The Iron Tide,A Paper Sky,The Stone Bell".split(",")
PASSAGES = ([f'"{b}"\n{b} is a novel. It was written by {p}.' for b, p in zip(BOOKS, PEOPLE)] + [f'"{p}"\n{p} is a writer. {p} grew up in {t}.' for p, t in zip(PEOPLE, TOWNS)])
TWO = [{"id": f"train_{i}", "question": f"Where did the writer of {b} grow up?", "golden_answers": [t], "metadata": {"gold_titles": [b, p]}} for i, (b, p, t) in enumerate(zip(BOOKS, PEOPLE, TOWNS))]
ONE = [{"id": f"train_{i}", "question": f"Who wrote {b}?", "golden_answers": [p]} for i, (b, p) in enumerate(zip(BOOKS, PEOPLE))]
TINY = ("--run=real --coa=12 --cot=4 --pairs=6 --epochs=1 --rl1_steps=1 --rl2_steps=1 --questions=2 --rollouts=2 --rl_questions=4 --eval_questions=3 --max_len=480 "
        "--max_observation=60 --train_data=hotpotqa_train.jsonl,nq_train.jsonl --eval_data=hotpotqa_dev.jsonl,nq_dev.jsonl --corpus=passages.jsonl.gz --model=checkpoint").split()


def checkpoint(folder):
    """A random Llama whose tokenizer has a chat template and no tags, as transformers saves it."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [workflows.REACT, workflows.CLOSED_BOOK, autocoa.SYSTEM, *PASSAGES, *(" " + q["question"] for q in TWO + ONE)]
    tok.train_from_iterator(text * 5, trainers.BpeTrainer(vocab_size=1200, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tok.chat_template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<s>assistant\n"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("user")
    checkpoint(cwd / "checkpoint")
    for name, questions in (("hotpotqa", TWO), ("nq", ONE)):
        for split in ("train", "dev"):
            (cwd / f"{name}_{split}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    lines = "".join(json.dumps({"id": str(i), "contents": x}) + "\n" for i, x in enumerate(PASSAGES))
    (cwd / "passages.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    scripts = {name: run_script(cwd, f"{name}.py", str(ROOT / "config" / "smollm2.py"), *TINY) for name in ("train_sft", "train_rl", "eval")}
    assert [(name, s.status, s.err[-2000:]) for name, s in scripts.items() if s.status] == []
    return SimpleNamespace(cwd=cwd, root=cwd / "out" / "real", **scripts)


def test_chains_on_real_questions(made):
    """The teacher's chains search the passages of the file; two hops where two gold passages are named; nothing is cut."""
    codec = model.load(made.root / "base", "cpu").codec
    chains = train_sft.read_trajectories(made.root / "data" / "coa.jsonl")
    searches = [t.ids.count(codec.search) - codec.prompt("").count(codec.search) for t in chains]
    assert len(chains) >= 10 and {1, 2} <= set(searches)
    for t in chains:
        assert codec.well_formed(t) and codec.answer(t) in TOWNS + PEOPLE
        seen = codec.decode([i for i, r in zip(t.ids, t.role) if r == autocoa.OBSERVATION])
        assert codec.answer(t) in seen


def test_pairs_on_real_questions(made):
    """A checkpoint that solves nothing in a workflow still gets pairs: acting is what the teacher's searches find, and is chosen where recall was wrong."""
    codec = model.load(made.root / "base", "cpu").codec
    flat = train_sft.read_trajectories(made.root / "data" / "pairs.jsonl")
    assert len(flat) == 6
    for chosen, rejected in zip(flat[0::2], flat[1::2], strict=True):
        assert autocoa.ACTION in chosen.role and autocoa.ACTION not in rejected.role
        assert codec.search in [i for i, m in zip(chosen.ids, chosen.mask) if m]


def test_stages_and_table_of_the_real_path(made):
    """All stages, both environments, and a row each in the table, by question file."""
    assert {"base", "sft1", "sft2", "sft3", "rl1", "rl2"} <= {p.name for p in made.root.iterdir()}
    result = strict(made.eval.out.splitlines()[-1])
    sets = {name: set(row) - {"avg"} for name, row in result["rows"].items()}
    assert len(sets) == 11 and sets.pop("oracle passages") == {"hotpotqa_dev"}             # the other set's questions do not name theirs
    assert all(names == {"hotpotqa_dev", "nq_dev"} for names in sets.values()) and "Reflexion workflow" in sets
    assert len(rows(made.root / "rl2" / "log.jsonl")) == 1


def test_training_on_files_of_others(made):
    """The run's own SFT data, exported as AutoCoA's files and read with --sft_files, trains to the same weights; a row that is none is counted and named."""
    done = run_script(made.cwd, "data.py", "export", "out/real/data", "theirs")
    assert done.status == 0, done.err
    with open(made.cwd / "theirs" / "coa.jsonl", "a") as f:
        f.write('{"messages": []}\n')
    args = [str(ROOT / "config" / "smollm2.py"), *TINY, "--run=again", "--sft_files=" + ",".join(sorted(f"theirs/{p.name}" for p in (made.cwd / "theirs").iterdir()))]
    done = run_script(made.cwd, "train_sft.py", *args)
    assert done.status == 0, done.err
    assert "1 rows are no trajectories and are left out, the first at theirs/coa.jsonl:" in done.out
    for name in ("coa", "cot", "pairs"):
        assert rows(made.root / "data" / f"{name}.jsonl") == rows(made.cwd / "out/again/data" / f"{name}.jsonl")
    assert (made.cwd / "out/again/sft3/model.safetensors").read_bytes() == (made.root / "sft3/model.safetensors").read_bytes()


def test_any_checkpoint_is_judged(made):
    """`--model --data --corpus`, without training: a checkpoint of another program by its workflows, one of this project also as the agent that it is. --resume asks
    nothing again, and an evaluation that was cut goes on."""
    args = [str(ROOT / "config" / "smollm2.py"), "--max_len=480", "--max_observation=60", "--data=hotpotqa_dev.jsonl", "--corpus=passages.jsonl.gz", "--eval_questions=3"]
    for folder, name, agent in (("checkpoint", "checkpoint", 0), ("out/real/rl2", "rl2", 1)):
        done = run_script(made.cwd, "eval.py", *args, f"--model={folder}")
        assert done.status == 0, done.err
        result = strict(done.out.splitlines()[-1])["rows"]
        assert len(result) == 6 + agent and ("agent" in result) == agent
    path = next((made.cwd / "out" / "eval").glob("rl2-*")) / "predictions.jsonl"
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    path.with_name("predictions.jsonl.partial").write_text("".join(lines[:5]) + lines[5][:40])          # stopped in the middle of a line
    path.write_text("")
    again = run_script(made.cwd, "eval.py", *args, "--model=out/real/rl2", "--resume")
    assert again.status == 0 and path.read_text() == before and not path.with_name("predictions.jsonl.partial").exists()
    again = run_script(made.cwd, "eval.py", *args, "--model=out/real/rl2", "--resume")
    assert again.status == 0 and path.read_text() == before and "no call of a tool" in again.out        # all answers were there
    again = run_script(made.cwd, "eval.py", *args, "--model=out/real/rl2", "--rows=agent,model only", "--resume")
    assert again.status == 0 and strict(again.out.splitlines()[-1])["rows"] == result           # the other rows' answers stay, and are in the table
    assert sorted(path.read_text().splitlines()) == sorted(before.splitlines())
    done = run_script(made.cwd, "eval.py", *args, "--model=out/real/rl2", "--rows=SFT-1")
    assert done.status == 2 and "no row 'SFT-1' here; there are: model only (at once), model only," in done.err
    for words, message in ((["--data=hotpotqa_dev.jsonl"], "it needs --model"), (["--compare=a"], "two rows are needed")):
        done = run_script(made.cwd, "eval.py", *words, "--eval_questions=1")
        assert done.status == 2 and message in done.err


def test_the_last_stage_in_transformers(made):
    """The chat tokenizer with its template and the tags, and the weights, as other programs read them."""
    lm, tok = model.load(made.root / "rl2", "cpu"), transformers.AutoTokenizer.from_pretrained(made.root / "rl2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.root / "rl2")
    assert tok.chat_template and tok.encode(lm.codec.decode(lm.codec.prompt("Who?")), add_special_tokens=False) == lm.codec.prompt("Who?")
    ids = torch.tensor([lm.codec.prompt("Who wrote The Clay Hour?")])
    with torch.no_grad():
        torch.testing.assert_close(lm.model.logits(lm.model(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
