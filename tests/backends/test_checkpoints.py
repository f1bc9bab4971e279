"""Folders and files in and out: against transformers and the gguf package."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import CPU, pack_rows, tiny_lm
from safetensors.torch import load_file, save_file
from test_config import IDS, REFERENCE_CONFIGS, llama_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import backends.torch as torch_backend
import model
from backends.config import ModelConfig, nano_config
from common.errors import UserError
from common.files import CHECKSUMS_FILE
from common.settings import ModelSettings
from data.trajectory import TAGS, Codec


def random_checkpoint(name: str, folder: Path | None = None) -> Any:
    """Return a transformers network with noise on every weight, written to a folder if given.

    Fresh biases are 0 and gains are 1: a loader could drop them unseen.
    """
    torch.manual_seed(1)
    # A test that converts a network to another type would change a shared config.
    config = copy.deepcopy(REFERENCE_CONFIGS[name])
    network = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if folder:
        network.save_pretrained(folder)
    return network


def reference_logits(network: Any, ids: Any) -> Any:
    """Return the logits of a transformers network."""
    with torch.no_grad():
        return network(torch.as_tensor(ids)).logits.float().numpy()


def torch_logits(network: Any, ids: Any) -> Any:
    """Return the logits of this project's network in torch."""
    with torch.no_grad():
        return network.logits(network(torch.as_tensor(ids))).numpy()


def read_network(folder: Path) -> Any:
    """Return the torch network of a folder, without its tokenizer."""
    network = torch_backend.build(model.read_config(folder))
    torch_backend.load_weights(network, folder)
    return network


def on_cpu(backend: str) -> Any:
    return ModelSettings(device="cpu", backend=backend)


# ---- weights -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", REFERENCE_CONFIGS)
def test_logits_equal_transformers(name: Any, tmp_path: Path) -> None:
    """A folder that transformers wrote, read by name.

    Guards: rotary layout and base, grouped heads, biases, q/k norms, eps, tied embeddings.
    """
    reference = random_checkpoint(name, tmp_path)
    logits = torch_logits(read_network(tmp_path), IDS)
    np.testing.assert_allclose(logits, reference_logits(reference, IDS), atol=1e-4)


@pytest.mark.parametrize("name", REFERENCE_CONFIGS)
def test_logprobs_equal_transformers(name: Any, tmp_path: Path) -> None:
    """Log-probs at a temperature: column t is of ids[:, t], 0 where masked."""
    reference = random_checkpoint(name, tmp_path)
    mask = (np.random.default_rng(1).random(IDS.shape) < 0.5).astype(np.float32)
    logits = reference_logits(reference, IDS).astype(np.float64) / 0.6
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.zeros(IDS.shape)
    for row, position in np.ndindex(IDS.shape):
        if position and mask[row, position]:
            token = IDS[row, position]
            expected[row, position] = logprobs[row, position - 1, token]
    batch = pack_rows(IDS, mask)
    scores = torch_backend.score(read_network(tmp_path), batch, 0.6)
    np.testing.assert_allclose(scores.reshape(IDS.shape), expected, atol=1e-4)


@pytest.mark.parametrize(
    "architecture, tie",
    [
        ("LlamaForCausalLM", True),
        ("LlamaForCausalLM", False),
        ("Qwen2ForCausalLM", True),
        ("Qwen3ForCausalLM", False),
    ],
)
def test_a_saved_folder_loads_in_transformers(
    codec: Codec, tmp_path: Path, architecture: str, tie: bool
) -> None:
    """Weights and config of LM.save load in transformers, and in this project again."""
    lm = tiny_lm(codec, architecture=architecture, tie_embeddings=tie, noise=0.2)
    folder = tmp_path / "sft1"
    lm.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["sft1"]
    ids = IDS % len(codec.tokenizer)
    expected = torch_logits(lm.network, ids)
    reference, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reference.config.eos_token_id == codec.eos_id
    np.testing.assert_allclose(reference_logits(reference, ids), expected, atol=1e-4)
    np.testing.assert_array_equal(torch_logits(read_network(folder), ids), expected)


def test_saving_again_replaces_the_whole_folder(codec: Codec, tmp_path: Path) -> None:
    """A second save of a stage leaves nothing of the first."""
    folder = tmp_path / "x"
    tiny_lm(codec, seed=1).save(folder)
    (folder / "left.txt").write_text("over")
    lm = tiny_lm(codec, seed=2)
    lm.save(folder)
    assert not (folder / "left.txt").exists()
    loaded = model.load(folder, CPU)
    torch.testing.assert_close(loaded.network.state_dict(), lm.network.state_dict())


@pytest.mark.parametrize("backend_name", ["torch", "mlx"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "self_attn.k_proj.bias is not one"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "is (missing|not one)"),
        ({"intermediate_size": 40}, r"mlp.*\(48, 32\).*\(40, 32\)"),
        ({"num_hidden_layers": 3}, r"layers.2.* is missing"),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, backend_name: str, change: dict[str, Any], message: str
) -> None:
    """A parameter that is missing, not known or of another shape is named."""
    pytest.importorskip(backend_name)
    backend = model.choose_backend(backend_name)
    random_checkpoint("Qwen2, tied", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    network = backend.build(ModelConfig.from_dict({**raw, **change}, "config.json"))
    with pytest.raises(UserError, match=message):
        backend.load_weights(network, tmp_path)


@pytest.mark.parametrize("backend_name", ["torch", "mlx"])
@pytest.mark.parametrize("number_type", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_packed_weights(tmp_path: Path, backend_name: str, number_type: Any) -> None:
    """Packed weights without a word in config.json are refused by name.

    Guards: bytes of fp8 or int8 that are read as numbers.
    """
    pytest.importorskip(backend_name)
    backend = model.choose_backend(backend_name)
    random_checkpoint("Qwen2, tied", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(number_type)
    save_file(weights, path)
    network = backend.build(model.read_config(tmp_path))
    message = r"layers\.1\.mlp\.up_proj\.weight holds .*int8|float8.* packed weights"
    with pytest.raises(UserError, match=message):
        backend.load_weights(network, tmp_path)


def test_a_tokenizer_that_is_no_text(codec: Codec, tmp_path: Path) -> None:
    """Whoever asks whether a checkpoint has the tags says so. Guards: a traceback of eval.py."""
    tiny_lm(codec).save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"the tokenizer of \S+ can't be read"):
        model.load_any(str(tmp_path), CPU)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", '{"added', "tokenizer of .*x can't be read"),
        ("tokenizer.json", "{}", "tokenizer of .*x can't be read"),
        ("model.safetensors.index.json", '{"weight', "index.json can't be read"),
        ("model.safetensors.index.json", "{}", "index.json can't be read.*weight_map"),
        ("adapter_config.json", "{", "adapter_config.json can't be read"),
        ("adapter_config.json", "{}", "adapter_config.json can't be read.*base_model"),
    ],
)
def test_a_folder_that_was_cut(
    codec: Codec, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    """A file that is missing, cut or empty is one line with its name. Guards: tracebacks."""
    folder = tmp_path / "x"
    tiny_lm(codec).save(folder)
    assert model.load(folder, CPU)
    # By its checksums, any of them would be named as one that is not as it was saved.
    (folder / CHECKSUMS_FILE).unlink()
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        model.load(folder, CPU)
    if content and name == "tokenizer.json":
        with pytest.raises(UserError, match=message):
            model.load_pretrained(str(folder), CPU)


def test_a_whole_file_beside_older_shards(codec: Codec, tmp_path: Path) -> None:
    """As in transformers, model.safetensors is read, and what is left of an older save is not.

    Guards: the older weights, without a word.
    """
    lm = tiny_lm(codec, noise=0.1)
    lm.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    older = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_file(older, tmp_path / "older.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "older.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = IDS % len(codec.tokenizer)
    logits = torch_logits(read_network(tmp_path), ids)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits, reference_logits(reference, ids), atol=1e-4)
    np.testing.assert_array_equal(logits, torch_logits(lm.network, ids))


# ---- tokenizers ----------------------------------------------------------------------------------
def test_the_tokenizer_comes_back(codec: Codec, tmp_path: Path) -> None:
    """Ids and text survive the folder, tags included, and `load` pairs them with the weights."""
    folder = tmp_path / "sft1"
    tiny_lm(codec).save(folder)
    text = " Who directed it?<begin_search> Eva</end_search>\\boxed{ \u00e9\u2028x}<eos>"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    assert tokenizer.encode(text) == codec.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    loaded = model.load(folder, CPU).codec
    parts = [("search", "</end_search>"), ("result", "A <eos>"), ("answer", "Eva")]
    expected = codec.build("Who <think>?", parts).ids
    assert loaded.build("Who <think>?", parts).ids == expected


def test_a_tokenizer_that_does_not_fit(codec: Codec) -> None:
    """A tokenizer with more entries than the network is refused."""
    config = nano_config(len(codec.tokenizer) - 1, 2, 1, 32, 1)
    with pytest.raises(UserError, match=f"tokenizer has {len(codec.tokenizer)} entries"):
        model.new(config, codec.tokenizer, 0, CPU)


# ---- tags ----------------------------------------------------------------------------------------
def tokenizer_without_tags(codec: Codec, path: Path) -> Any:
    """Return the tests' tokenizer with other tokens in the places of the tags."""
    raw = json.loads(codec.tokenizer.backend_tokenizer.to_str())
    tags = set(TAGS.values())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in tags]
    vocabulary = {}
    for token, index in raw["model"]["vocab"].items():
        vocabulary[f"<unused{index}>" if token in tags else token] = index
    raw["model"]["vocab"] = vocabulary
    path.write_text(json.dumps(raw))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(params=[0, 40])
def untagged(request: pytest.FixtureRequest, codec: Codec, tmp_path: Path) -> Any:
    """Return a checkpoint without tags, in tmp_path; its weights may have spare rows."""
    tokenizer = tokenizer_without_tags(codec, tmp_path / "tokens.json")
    size = len(tokenizer) + request.param
    config = llama_config(vocab_size=size, tie_word_embeddings=False)
    network = AutoModelForCausalLM.from_config(config).eval()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return network, tokenizer


def test_tags_are_added_to_a_checkpoint(untagged: Any, tmp_path: Path) -> None:
    """Old tokens keep their logits; a new tag starts as the mean of the pieces that spelled it."""
    reference, tokenizer = untagged
    count = len(tokenizer)
    lm = model.load_pretrained(str(tmp_path), CPU)
    ids = IDS % count
    logits = torch_logits(lm.network, ids)[..., :count]
    np.testing.assert_allclose(logits, reference_logits(reference, ids)[..., :count], atol=1e-4)
    embeddings = lm.network.model.embed_tokens.weight
    for tag in TAGS.values():
        (tag_id,) = lm.codec.tokenizer.encode(tag, add_special_tokens=False)
        assert tag_id >= count
        pieces = tokenizer.encode(tag, add_special_tokens=False)
        expected = reference.model.embed_tokens.weight[pieces].mean(0)
        torch.testing.assert_close(embeddings[tag_id], expected)
    written = lm.codec.decode(lm.codec.build("Who?", [("answer", "Eva")]).ids)
    assert written == "<bos> Who?<think></think>\\boxed{ Eva}<eos>"
    if importlib.util.find_spec("mlx"):
        twin = model.load_pretrained(str(tmp_path), on_cpu("mlx"))
        names = [name for name, _ in lm.network.named_parameters()]
        for name, weight in twin.backend.to_arrays(twin.network, names).items():
            expected = lm.network.get_parameter(name).detach()
            np.testing.assert_allclose(weight, expected, atol=1e-7)


def test_4_bits_of_a_checkpoint_without_tags(
    untagged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: --bits=4 that was left out without a word."""
    quantized = []
    monkeypatch.setattr(torch_backend, "quantize", lambda network, bits: quantized.append(bits))
    settings = ModelSettings(device="cpu", backend="torch", bits=4)
    _, has_tags = model.load_any(str(tmp_path), settings)
    assert not has_tags
    assert quantized == [4]


@pytest.mark.parametrize("more", [7, -7])
def test_embeddings_that_config_json_does_not_know(
    untagged: Any, tmp_path: Path, more: int
) -> None:
    """Another vocab_size in config.json than the weights have is named, with both shapes."""
    reference, _ = untagged
    size = reference.config.vocab_size
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["vocab_size"] = size + more
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = rf"weight has shape \({size}, 32\), config.json says \({size + more}, 32\)"
    if more < 0:
        # Without spare rows, the tokenizer is too large already.
        message += "|are not a pair"
    with pytest.raises(UserError, match=message):
        model.load_pretrained(str(tmp_path), CPU)


# ---- GGUF ----------------------------------------------------------------------------------------
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensor(name: str, weight: Any) -> Any:
    """Return a parameter as GGUF has it: its name, and its order of rotary pairs."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight", weight
    if name == "model.norm.weight":
        return "output_norm.weight", weight
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    if part.endswith(("q_proj", "k_proj")):
        # 4 heads of 16 dimensions: halves become neighbours.
        weight = weight.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight", weight


def write_gguf(path: Path, network: Any, vocabulary: Any, merges: Any, eos: Any) -> None:
    """Write a Llama of 2 layers and 64 dimensions as the gguf package does."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    for parameter_name, parameter in network.named_parameters():
        name, weight = gguf_tensor(parameter_name, parameter.detach().numpy())
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("backend_name", ["torch", "mlx"])
def test_a_gguf_file(codec: Codec, tmp_path: Path, backend_name: str) -> None:
    """The logits of a network that the gguf package wrote, in both backends."""
    pytest.importorskip(backend_name)
    vocabulary = sorted(codec.tokenizer.get_vocab(), key=codec.tokenizer.get_vocab().get)
    vocabulary += ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    tokenizer_description = json.loads(codec.tokenizer.backend_tokenizer.to_str())
    merges = [" ".join(merge) for merge in tokenizer_description["model"]["merges"]]
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    write_gguf(tmp_path / "x.gguf", reference, vocabulary, merges, codec.eos_id)
    lm = model.load_pretrained(str(tmp_path / "x.gguf"), on_cpu(backend_name))
    lm.save(tmp_path / "y")
    network = model.load(tmp_path / "y", on_cpu("torch")).network
    np.testing.assert_allclose(
        torch_logits(network, IDS), reference_logits(reference, IDS), atol=1e-4
    )
