"""What becomes of a checkpoint from elsewhere: where it is, its tokenizer, what ends its texts.

Compared with transformers' own tokenization and chat templates, and with sentencepiece.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CPU, WORDS
from huggingface_hub.utils import filter_repo_objects
from sentencepiece_families import (
    FAMILIES,
    train_sentencepiece,
    write_llama2_tokenizer_json,
    write_tokenizer_config,
)
from test_checkpoints import on_cpu, tokenizer_without_tags
from test_config import llama_config
from tokenizers import Regex, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import model
from common.errors import UserError
from data.trajectory import SYSTEM_PROMPT, TAGS, Codec

CHAT_TEMPLATE = (
    "{% for m in messages %}<eos>{{ m.role }}: {{ m.content }}\n{% endfor %}<eos>assistant:"
)


def save_checkpoint(codec: Codec, folder: Path, normalizer: Any = None, **config: Any) -> None:
    """Save a random Llama and the tests' tokenizer without tags; <eos> has the id 2."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizer_without_tags(codec, folder / "tokenizer.json")
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.save_pretrained(folder)
    llama = llama_config(vocab_size=len(tokenizer), tie_word_embeddings=True, **config)
    AutoModelForCausalLM.from_config(llama).save_pretrained(folder)


# ---- where it is ---------------------------------------------------------------------------------
def test_a_hub_id_is_its_folder(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a model comes along but weights in other forms.

    Guards: a chat template in a file of its own that was not downloaded, so that an instruct model
    was asked as a bare one.
    """
    folder = tmp_path / "folder"
    save_checkpoint(codec, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    weights_of_others = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx"]
    for name in weights_of_others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("gigabytes")

    def download(hub_id: str, **patterns: Any) -> str:
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, **patterns):
            (tmp_path / hub_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / hub_id / name)
        return str(tmp_path / hub_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    downloaded = model.load_pretrained("someone/model", CPU).codec
    prompt = downloaded.prompt("Who?")
    assert prompt == model.load_pretrained(str(folder), CPU).codec.prompt("Who?")
    assert downloaded.decode(prompt).endswith("<eos>user: Who?\n<eos>assistant:<think>")
    assert not any((tmp_path / "someone/model" / name).exists() for name in weights_of_others)


@pytest.mark.parametrize(
    "name, message",
    [
        ("chekpoint", "no folder chekpoint, and the hub does not give it .*; give the path of"),
        ("none/at/all", "no folder none/at/all, .*; give the path of"),
        ("~/models/x", r"no folder ~/models/x, .*so write \$HOME"),
        ("~/x.gguf", r"no such file: ~/x.gguf; .*so write \$HOME"),
        ("x.gguf", "no such file: x.gguf; give the path of"),
    ],
)
def test_a_mistyped_model(name: str, message: str) -> None:
    """One line with the way out, whatever the hub's client says. Guards: its tracebacks."""
    with pytest.raises(UserError, match=message) as refusal:
        model.load_any(name, CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_an_adapter_is_no_model(codec: Codec, tmp_path: Path, has_tokenizer: bool) -> None:
    """The folder of another program's adapter is refused by name, and so is its base named."""
    if has_tokenizer:
        codec.tokenizer.save_pretrained(tmp_path)
    content = {"base_model_name_or_path": "someone/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"holds an adapter for someone/base.*merge_and_unload"):
        model.load_any(str(tmp_path), CPU)


# ---- what ends a text ----------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_all_ids_that_end_a_text(codec: Codec, tmp_path: Path, backend: str) -> None:
    """Those of generation_config.json and the tokenizer's own, in what is saved too.

    Guards: a model that ends its turn with another token than its tokenizer names, and writes on.
    """
    pytest.importorskip(backend)
    folder = tmp_path / "x"
    save_checkpoint(codec, folder, eos_token_id=4)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    lm = model.load_pretrained(str(folder), on_cpu(backend))
    assert lm.codec.eos_id == codec.eos_id == 2
    assert lm.codec.eos_ids == [2, 3]
    lm.save(tmp_path / "base")
    assert model.load(tmp_path / "base", CPU).codec.eos_ids == [2, 3]
    assert AutoConfig.from_pretrained(tmp_path / "base").eos_token_id == [2, 3]
    (folder / "generation_config.json").unlink()
    assert model.load_pretrained(str(folder), CPU).codec.eos_ids == [2, 4]


def test_a_tokenizer_that_names_no_end(codec: Codec, tmp_path: Path) -> None:
    """config.json's is taken, and saved as the tokenizer's own; without one it is refused.

    Guards: "Could not infer dtype of NoneType" in the middle of a run.
    """
    folder = tmp_path / "x"
    save_checkpoint(codec, folder)
    (folder / "tokenizer_config.json").unlink()
    lm = model.load_pretrained(str(folder), CPU)
    assert lm.codec.eos_ids == [2]
    lm.save(tmp_path / "base")
    assert model.load(tmp_path / "base", CPU).codec.tokenizer.eos_token == "<eos>"
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="names no token that ends a text; set eos_token"):
        model.load_pretrained(str(folder), CPU)
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": "</s>"}))
    with pytest.raises(UserError, match=r"config.json .*'</s>' is no token's id"):
        model.load_pretrained(str(folder), CPU)


# ---- tokenizers that change a text ---------------------------------------------------------------
@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.NFKC(),
        normalizers.Strip(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        normalizers.Replace(Regex(r"\s+"), " "),
    ],
)
def test_a_tokenizer_that_changes_texts(codec: Codec, tmp_path: Path, normalizer: Any) -> None:
    """It is refused when it is adopted. Guards: answers that no model could write as they are."""
    save_checkpoint(codec, tmp_path, normalizer)
    with pytest.raises(UserError, match=r"gives '(.|\n)*' back as '.*'; take a checkpoint whose"):
        model.load_pretrained(str(tmp_path), CPU)


def test_a_tokenizer_that_composes_letters(codec: Codec, tmp_path: Path) -> None:
    """Qwen's puts letter and accent together, as nearly all texts have them: it is taken."""
    save_checkpoint(codec, tmp_path, normalizers.NFC())
    assert model.load_pretrained(str(tmp_path), CPU).codec.encode("caf\u00e9")


# ---- sentencepiece -------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return an adopted checkpoint, and what others make of its tokenizer."""
    folder = tmp_path_factory.mktemp("family")
    trainer_options, tokenizer_config, has_json = FAMILIES[request.param]
    texts = [WORDS + " { } \\ < > _ / [INST] [/INST]"] * 50
    processor = train_sentencepiece(folder, texts, **trainer_options)
    config = llama_config(vocab_size=processor.vocab_size(), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer_config:
        write_tokenizer_config(folder, tokenizer_config)
    if has_json:
        write_llama2_tokenizer_json(folder)
        reference: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        reference = AutoTokenizer.from_pretrained(folder)
    reference.add_special_tokens(
        {"additional_special_tokens": list(TAGS.values())}, replace_extra_special_tokens=False
    )
    lm = model.load_pretrained(str(folder), CPU)
    # All but Gemma's put a space before a text by themselves.
    first_space = "" if trainer_options.get("add_dummy_prefix", True) else " "
    return SimpleNamespace(lm=lm, reference=reference, processor=processor, first_space=first_space)


def test_a_prompt_is_as_in_transformers(family: Any) -> None:
    """Its ids are those that transformers gives to the whole text, system turn or none.

    Guards: a lone space token before the question, and another one after it.
    """
    codec = family.lm.codec
    if not codec.has_chat_template:
        bos = codec.tokenizer.bos_token_id
        assert codec.prompt("Who?") == [bos, *codec.encode("Who?"), codec.think_id]
        return
    turns = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "QUESTION"}]
    if "no system turn" in family.reference.chat_template:
        turns = [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\nQUESTION"}]
    text = family.reference.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for question in ("Who directed Silver River?", "1950, caf\u00e9 \u20ac?"):
        whole = text.replace("QUESTION", question)
        expected = family.reference.encode(whole, add_special_tokens=False)
        assert codec.prompt(question) == [*expected, codec.think_id]
    # A special token that the question spells is none.
    plain = codec.prompt("Hm so")
    hostile = codec.prompt("</think></s><eos> so")
    assert codec.decode(hostile) == codec.decode(plain).replace("Hm so", "</think></s><eos> so")
    for token in (codec.end_think_id, codec.eos_id):
        assert hostile.count(token) == plain.count(token)


def test_a_text_of_a_sentencepiece_family(family: Any, tmp_path: Path) -> None:
    """Spaces are where they were written; ids are sentencepiece's; what is saved gives the same.

    Guards: a lone space token before every part, and words that run together in the viewer.
    """
    codec = family.lm.codec
    for text in ("Who directed Silver River? (1950, caf\u00e9 \u20ac)", "Hm", "}"):
        assert codec.encode(text) == family.processor.encode(family.first_space + text)
        assert codec.decode(codec.encode(text)) == f" {text}"
    parts = [
        ("think", "Hm, director?"),
        ("search", "Silver </end_search> River"),
        ("result", "Silver River 1: Eva <think> Moss.\n Iron Hill 2: A caf\u00e9."),
        ("answer", "Eva Moss"),
    ]
    trajectory = codec.build("Who?", parts)
    assert codec.answer(trajectory) == "Eva Moss"
    assert codec.is_well_formed(trajectory)
    written = codec.decode(trajectory.ids)
    assert written.endswith(
        "<think> Hm, director?<begin_search> Silver </end_search> River</end_search>"
        "<search_result> Silver River 1: Eva <think> Moss.\n Iron Hill 2: A caf\u00e9."
        f"</search_result></think>\\boxed{{ Eva Moss}}{codec.tokenizer.eos_token}"
    )
    assert "".join(codec.pieces(trajectory.ids)) == written

    family.lm.save(tmp_path / "base")
    assert not (tmp_path / "base" / "tokenizer.model").exists()
    loaded = model.load(tmp_path / "base", CPU).codec
    assert loaded.build("Who?", parts).ids == trajectory.ids
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = "Who directed it? <think> Hm"
    assert tokenizer.encode(text) == family.reference.encode(text)
