"""A checkpoint with a SentencePiece tokenizer, from SFT to the viewer and one question."""

import json
import re
from pathlib import Path

import pytest
from conftest import CPU, ROOT, read_rows, run_here, strict_json
from sentencepiece_families import FAMILIES, train_sentencepiece, write_tokenizer_config
from small_checkpoint import ONE_HOP, PASSAGES, TINY_COUNTS, TWO_HOPS, save_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import model
from data.sft_data import read_trajectories
from data.trajectory import SYSTEM_PROMPT, Role
from workflows.prompts import CLOSED_BOOK_EXAMPLES, REACT_EXAMPLES

CONFIG = str(ROOT / "config" / "smollm2.py")
TINY = [
    "--model=checkpoint",
    "--train_data=train.jsonl",
    "--eval_data=dev.jsonl",
    "--corpus=passages.jsonl",
    *TINY_COUNTS,
    "--eval_questions=2",
    "--max_len=700",
    "--max_observation=80",
]


def save_task(folder: Path, family: str) -> None:
    """Save a random Llama with the tokenizer of a family, questions and passages."""
    checkpoint = folder / "checkpoint"
    save_checkpoint(checkpoint)
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    trainer_options, tokenizer_config, _ = FAMILIES[family]
    questions = [row["question"] for row in TWO_HOPS + ONE_HOP]
    texts = [REACT_EXAMPLES, CLOSED_BOOK_EXAMPLES, SYSTEM_PROMPT, *PASSAGES, *questions]
    lines = [line for text in texts for line in text.splitlines() if line] * 5
    processor = train_sentencepiece(checkpoint, lines, **{**trainer_options, "vocab_size": 900})
    write_tokenizer_config(checkpoint, tokenizer_config)
    config = LlamaConfig.from_pretrained(checkpoint)
    config.vocab_size = processor.vocab_size()
    LlamaForCausalLM(config).save_pretrained(checkpoint)
    for name in ("train", "dev"):
        rows = "".join(
            json.dumps(row | {"id": f"{name}_{number}"}) + "\n"
            for number, row in enumerate(TWO_HOPS + ONE_HOP)
        )
        (folder / f"{name}.jsonl").write_text(rows)
    passages = [
        {"id": str(number), "contents": contents} for number, contents in enumerate(PASSAGES)
    ]
    rows = "".join(json.dumps(row) + "\n" for row in passages)
    (folder / "passages.jsonl").write_text(rows)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("family", ["Llama 2", "Mistral", "Gemma"])
def test_all_scripts(tmp_path: Path, family: str, backend: str) -> None:
    """Spaces stand where they were written, in data, rollouts, the viewer and answers.

    Guards: a lone space token before every part, and words that run together.
    """
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    save_task(tmp_path, family)
    arguments = [CONFIG, "--run=pieces", f"--backend={backend}"]
    for script in ("train_sft.py", "train_rl.py", "eval.py", "plot.py"):
        more = TINY if script == "train_sft.py" else []
        done = run_here(tmp_path, script, *arguments, *more)
        assert not done.status, (script, done.err[-2000:])
    root = tmp_path / "out" / "pieces"
    codec = model.load(root / "rl2", CPU).codec

    # Each part of a chain is one run of its own text, with the space before it, and no other.
    chains = read_trajectories(root / "data" / "coa.jsonl")
    lone_space = codec.tokenizer.convert_tokens_to_ids("\u2581")
    for chain in chains:
        written = codec.decode(chain.ids)
        assert "".join(codec.pieces(chain.ids)) == written
        assert "  " not in written.partition("<think>")[2]
        assert re.search(r"<begin_search> \w.*?</end_search><search_result> \w", written)
        begins = [
            token
            for token, before, role in zip(
                chain.ids[1:], chain.ids[:-1], chain.role[1:], strict=True
            )
            if before in (codec.think_id, codec.search_id, codec.result_id) and role != Role.PROMPT
        ]
        assert lone_space not in begins
    rollouts = read_rows(root / "rl2" / "rollouts.jsonl")
    for row in rollouts:
        assert row["text"] == codec.decode(row["ids"])
    page = (root / "figures" / "trajectories.html").read_text()
    assert "\u2581" not in page
    rows = strict_json((root / "eval.json").read_text())["rows"]
    assert "SFT-1&2&3+RL-1&2" in rows
    asked = run_here(tmp_path, "autocoa.py", *arguments, "--ask", "Who wrote The Clay Hour?")
    assert not asked.status, asked.err[-2000:]
    assert "Who wrote The Clay Hour?" in asked.out
