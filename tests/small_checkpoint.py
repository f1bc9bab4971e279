"""A user's folder for the real path, tiny: a checkpoint, question files and passages.

The checkpoint is a random Llama with a chat template and no tags, as transformers saves it; the
sentences are invented.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.trajectory import SYSTEM_PROMPT
from workflows.prompts import CLOSED_BOOK_EXAMPLES, REACT_EXAMPLES

TOWNS = ["Tallow", "Marrow", "Ferrin", "Ostley", "Brack", "Dunmere", "Hallow", "Pell"]
PEOPLE = [
    "Orla Venn",
    "Ivo Lark",
    "Nan Sorrel",
    "Tam Birch",
    "Una Quill",
    "Rolf Egan",
    "Edda Moor",
    "Piet Vale",
]
BOOKS = [
    "The Clay Hour",
    "The Tin Boat",
    "A Salt Door",
    "The Wax Moon",
    "A Glass Road",
    "The Iron Tide",
    "A Paper Sky",
    "The Stone Bell",
]
PASSAGES = [
    f'"{book}"\n{book} is a novel. It was written by {person}.'
    for book, person in zip(BOOKS, PEOPLE, strict=True)
] + [
    f'"{person}"\n{person} is a writer. {person} grew up in {town}.'
    for person, town in zip(PEOPLE, TOWNS, strict=True)
]
# One look-up each.
ONE_HOP = [
    {"id": f"train_{number}", "question": f"Who wrote {book}?", "golden_answers": [person]}
    for number, (book, person) in enumerate(zip(BOOKS, PEOPLE, strict=True))
]
# Two look-ups each.
TWO_HOPS = [
    {
        "id": f"train_{number}",
        "question": f"Where did the writer of {book} grow up?",
        "golden_answers": [town],
        "metadata": {"gold_titles": [book, person]},
    }
    for number, (book, person, town) in enumerate(zip(BOOKS, PEOPLE, TOWNS, strict=True))
]
# Counts with which all scripts of the real path take seconds.
TINY_COUNTS = [
    "--coa=12",
    "--cot=4",
    "--pairs=6",
    "--epochs=1",
    "--rl1_steps=1",
    "--rl2_steps=1",
    "--questions=2",
    "--rollouts=2",
    "--rl_questions=4",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<s>assistant\n"
)


def save_checkpoint(folder: Path) -> None:
    """Save a random Llama and its tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    questions = [" " + row["question"] for row in TWO_HOPS + ONE_HOP]
    # With the workflows' examples in it, prompts are short enough for the tests' budgets.
    texts = [REACT_EXAMPLES, CLOSED_BOOK_EXAMPLES, SYSTEM_PROMPT, *PASSAGES, *questions]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts * 5, trainer)
    fast_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast_tokenizer.chat_template = CHAT_TEMPLATE
    config = transformers.LlamaConfig(
        vocab_size=len(fast_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast_tokenizer.save_pretrained(folder)


def save_task(folder: Path) -> None:
    """Save the checkpoint, two question files and the passages, as a user has them."""
    save_checkpoint(folder / "checkpoint")
    _save_jsonl(folder / "hotpotqa_dev.jsonl", TWO_HOPS)
    _save_jsonl(folder / "nq_dev.jsonl", ONE_HOP)
    passages = [
        {"id": str(number), "contents": contents} for number, contents in enumerate(PASSAGES)
    ]
    _save_jsonl(folder / "passages.jsonl", passages)


def _save_jsonl(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
