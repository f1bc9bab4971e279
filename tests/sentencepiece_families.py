"""Tokenizers as those of Llama 2, TinyLlama, Mistral and Gemma, which SentencePiece has trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer

LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token }}[INST] <<SYS>>\n"
    "{{ m.content }}\n<</SYS>>\n\n{% else %}{{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
TINYLLAMA_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "<|assistant|>\n"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system turn') }}{% endif %}[INST] {{ m.content }} [/INST]{% endfor %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system turn') }}{% endif %}<start_of_turn>{{ m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)
GEMMA_PIECES = {
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "user_defined_symbols": "<mask>,<start_of_turn>,<end_of_turn>",
}
# Options of the trainer, and tokenizer_config.json; the last entry is whether there is a
# tokenizer.json too, as Llama 2 and its children have it.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "Llama 2": ({}, {"legacy": True, "chat_template": LLAMA2_TEMPLATE}, False),
    "Llama 2, tokenizer.json": ({}, {"legacy": True, "chat_template": LLAMA2_TEMPLATE}, True),
    "TinyLlama": ({}, {"legacy": True, "chat_template": TINYLLAMA_TEMPLATE}, True),
    "Mistral": ({}, {"legacy": False, "chat_template": MISTRAL_TEMPLATE}, False),
    "Gemma": (
        GEMMA_PIECES,
        {
            "tokenizer_class": "GemmaTokenizer",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "chat_template": GEMMA_TEMPLATE,
        },
        False,
    ),
    "unigram": ({"model_type": "unigram"}, {}, False),
    "tokenizer.model alone": ({}, {}, False),
}


def train_sentencepiece(folder: Path, texts: Sequence[str], **options: Any) -> Any:
    """Write a tokenizer.model, as Llama 2's was trained, and return what reads it."""
    standard = {
        "model_type": "bpe",
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "character_coverage": 1.0,
        # Text is kept as it is.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        **{**standard, **options},
    )
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


def write_llama2_tokenizer_json(folder: Path) -> None:
    """Write a tokenizer.json that puts a space before the text after every special token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    raw["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def write_tokenizer_config(folder: Path, content: dict[str, Any]) -> None:
    """Write the tokenizer_config.json of a family."""
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    text = json.dumps({**names, "add_bos_token": True, **content})
    (folder / "tokenizer_config.json").write_text(text)
