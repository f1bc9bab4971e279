"""The network against transformers, folders in and out, the optimizer against torch's own, and a step that fails."""
import importlib.util
import json
import math

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import autocoa
import model
import model_torch
import train_sft
from autocoa import TAGS
from common import Problem, Settings

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
CHECKPOINTS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "Llama, tied, no groups": lambda: transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "Llama, biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False),
    "Llama 3.1, scaled rope": lambda: transformers.LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}),
    "Qwen2, tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "Qwen2, untied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "Qwen3, wide heads": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)}


def random_checkpoint(name, folder=None):
    """A transformers model with noise on every weight (fresh biases are 0 and gains 1: a loader could drop them unseen)."""
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(CHECKPOINTS[name]()).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    if folder:
        network.save_pretrained(folder)
    return network


def theirs(network, ids):
    with torch.no_grad():
        return network(torch.as_tensor(ids)).logits.float().numpy()


def ours(network, ids):
    ids = torch.as_tensor(ids)
    with torch.no_grad():
        return network.logits(network(ids)).numpy()


IDS = np.random.default_rng(0).integers(3, 97, (3, 21))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers(name, tmp_path):
    """A folder that transformers wrote, read by name. Guards: rotary layout and base, grouped heads, biases, q/k norms, eps,
    tied embeddings."""
    reference = random_checkpoint(name, tmp_path)
    network = model_torch.load_weights(model_torch.build(model.read_config(tmp_path)), tmp_path)
    np.testing.assert_allclose(ours(network, IDS), theirs(reference, IDS), atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logprobs_equal_transformers(name, tmp_path):
    """Log-probs by token, at a temperature, from the logits of transformers: column t is of ids[:, t], 0 where masked."""
    reference = random_checkpoint(name, tmp_path)
    network = model_torch.load_weights(model_torch.build(model.read_config(tmp_path)), tmp_path)
    mask = (np.random.default_rng(1).random(IDS.shape) < 0.5).astype(np.float32)
    z = theirs(reference, IDS).astype(np.float64) / 0.6
    z = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = np.zeros(IDS.shape)
    for i, t in np.ndindex(IDS.shape):
        if t and mask[i, t]:
            expected[i, t] = z[i, t - 1, IDS[i, t]]
    np.testing.assert_allclose(model_torch.score(network, {"ids": IDS, "mask": mask}, 0.6), expected, atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_config_comes_back(name):
    """What is written to config.json is read as the same, by this project and by transformers. Guards: rope scaling that a saved folder loses."""
    theirs = CHECKPOINTS[name]()
    ours = model.ModelConfig.from_dict({**theirs.to_dict(), "architectures": [f"{type(theirs).__name__.removesuffix('Config')}ForCausalLM"]}, "x")
    assert model.ModelConfig.from_dict(ours.to_dict(), "x") == ours
    assert type(theirs)(**ours.to_dict()).rope_parameters == theirs.rope_parameters


def test_an_older_config(tmp_path):
    """Before transformers 5, config.json had rope_theta at its top level and no rope_parameters."""
    random_checkpoint("Llama", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("rope_parameters")
    assert model.ModelConfig.from_dict({**raw, "rope_theta": 500.0}, "x").rope_theta == 500.0


@pytest.mark.parametrize("name, arch", [("Llama", "LlamaForCausalLM"), ("Qwen2, tied", "Qwen2ForCausalLM"), ("Qwen3, wide heads", "Qwen3ForCausalLM")])
def test_a_config_without_architectures(name, arch):
    """A GGUF file names its model_type alone."""
    config = model.ModelConfig.from_dict({**CHECKPOINTS[name]().to_dict(), "architectures": None}, "x")
    assert config.architectures == [arch]


@pytest.mark.parametrize("change, message", [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
    ({"architectures": None, "model_type": "gpt2"}, "of type gpt2.*supported"), ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling"), ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope scaling"),
    ({"use_sliding_window": True}, "sliding"), ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"), ({"hidden_act": "gelu"}, "silu"), ({"mlp_bias": True}, "without biases")])
def test_what_the_network_cannot_compute(change, message, tmp_path):
    """Guards: a checkpoint that loads without a word and computes something else."""
    random_checkpoint("Llama", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(Problem, match=message):
        model.ModelConfig.from_dict({**raw, **change}, "config.json")


def test_a_new_network_looks_back(codec):
    """Two heads of the first layer begin by attending one and two tokens back, whatever the tokens are."""
    network = model.new(model.nano_config(len(codec.tok), codec.eos, 1), codec.tok, 3, "cpu").model
    ids, T = torch.as_tensor(IDS), IDS.shape[1]
    at, c = network.model.layers[0].self_attn, network.config
    with torch.no_grad():
        x = network.model.layers[0].input_layernorm(network.model.embed_tokens(ids))
        angle = torch.arange(T)[:, None] * c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        cos, sin = angle.repeat(1, 2).cos(), angle.repeat(1, 2).sin()
        q, k = (model_torch.rotate(p(x).view(3, T, -1, c.head_dim).transpose(1, 2), (cos, sin)) for p in (at.q_proj, at.k_proj))
        k = k.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1)
        scores = (q @ k.mT / c.head_dim ** 0.5).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf).softmax(-1)
    for head, offset in ((0, 1), (1, 2)):
        there = scores[:, head].diagonal(-offset, 1, 2)[:, 3:]
        assert (there > 0.3).all() and (scores[:, head].argmax(-1)[:, 3:] == torch.arange(3, T) - offset).all()


@pytest.mark.parametrize("arch, tie", [("LlamaForCausalLM", True), ("LlamaForCausalLM", False), ("Qwen2ForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_a_saved_folder_loads_in_transformers(codec, tmp_path, arch, tie):
    """Weights and config of LM.save in transformers, and back in this project."""
    lm = tiny(codec, arch=arch, tie=tie, spread=0.2)
    lm.save(tmp_path / "sft1")
    assert [p.name for p in tmp_path.iterdir()] == ["sft1"]
    ids = IDS % len(codec.tok)
    reference, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sft1", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert reference.config.eos_token_id == codec.eos
    np.testing.assert_allclose(theirs(reference, ids), ours(lm.model, ids), atol=1e-4)
    again = model_torch.load_weights(model_torch.build(model.read_config(tmp_path / "sft1")), tmp_path / "sft1")
    np.testing.assert_array_equal(ours(again, ids), ours(lm.model, ids))


def test_the_tokenizer_comes_back(codec, tmp_path):
    """Ids and text after a round trip through the folder, tags included; and `load` pairs them with the weights."""
    tiny(codec).save(tmp_path / "sft1")
    text = " Who directed it?<begin_search> Eva</end_search>\\boxed{ \u00e9\u2028x}<eos>"
    tok = AutoTokenizer.from_pretrained(tmp_path / "sft1")
    assert tok.encode(text) == codec.tok.encode(text) and tok.decode(tok.encode(text)) == text
    again = model.load(tmp_path / "sft1", "cpu").codec
    parts = [("search", "</end_search>"), ("result", "A <eos>"), ("answer", "Eva")]
    assert again.build("Who <think>?", parts).ids == codec.build("Who <think>?", parts).ids


def test_saving_again_replaces_the_whole_folder(codec, tmp_path):
    """A second save of a stage leaves nothing of the first."""
    tiny(codec, seed=1).save(tmp_path / "x")
    (tmp_path / "x" / "left.txt").write_text("over")
    lm = tiny(codec, seed=2)
    lm.save(tmp_path / "x")
    assert not (tmp_path / "x" / "left.txt").exists()
    torch.testing.assert_close(model.load(tmp_path / "x", "cpu").model.state_dict(), lm.model.state_dict())


@pytest.mark.parametrize("spare", [0, 40])
def test_tags_are_added_to_a_checkpoint(codec, tmp_path, spare, monkeypatch):
    """A checkpoint whose tokenizer has no tags (its weights may have spare rows): old tokens keep their logits, a new tag
    starts as the mean of the pieces that spelled it."""
    raw = json.loads(codec.tok.backend_tokenizer.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in TAGS.values()]
    places = {i: f"<unused{i}>" for t, i in raw["model"]["vocab"].items() if t in TAGS.values()}
    raw["model"]["vocab"] = {places.get(i, t): i for t, i in raw["model"]["vocab"].items()}
    (tmp_path / "t.json").write_text(json.dumps(raw))
    tok = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    n = len(tok)
    reference = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**SIZES, "vocab_size": n + spare}, tie_word_embeddings=False)).eval()
    reference.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    lm = model.load_pretrained(str(tmp_path), "cpu")
    ids = IDS % n
    np.testing.assert_allclose(ours(lm.model, ids)[..., :n], theirs(reference, ids)[..., :n], atol=1e-4)
    old = reference.model.embed_tokens.weight
    for tag in TAGS.values():
        i, = lm.codec.tok.encode(tag, add_special_tokens=False)
        assert i >= n
        torch.testing.assert_close(lm.model.model.embed_tokens.weight[i], old[tok.encode(tag, add_special_tokens=False)].mean(0))
    if importlib.util.find_spec("mlx"):
        mlx = model.load_pretrained(str(tmp_path), "cpu", "mlx")
        for name, p in mlx.backend.parameters(mlx.model).items():
            np.testing.assert_allclose(np.array(p), lm.model.get_parameter(name).detach(), atol=1e-7)
    assert lm.codec.decode(lm.codec.build("Who?", [("answer", "Eva")]).ids) == "<bos> Who?<think></think>\\boxed{ Eva}<eos>"
    quantized = []
    monkeypatch.setattr(model_torch, "quantize", lambda network, bits: quantized.append(bits))
    assert model.load_any(str(tmp_path), device="cpu", framework="torch", bits=4)[1] is False and quantized == [4]      # guards: --bits=4 without a word left out
    raw = json.loads((tmp_path / "config.json").read_text())
    for more in (7, -7):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "vocab_size": n + spare + more}))
        with pytest.raises(Problem, match=rf"weight has shape \({n + spare}, 32\), config.json says \({n + spare + more}, 32\)" + "|are not a pair" * (more < 0)):
            model.load_pretrained(str(tmp_path), "cpu")


def test_a_tokenizer_that_does_not_fit(codec):
    config = model.nano_config(len(codec.tok) - 1, 2, 1, 32, 1)
    with pytest.raises(Problem, match=f"tokenizer has {len(codec.tok)} entries"):
        model.new(config, codec.tok, 0, "cpu")


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_weights_that_do_not_fit(tmp_path, backend):
    """Named by parameter: one that is missing, one of another shape, packed ones without a word in config.json (guards: bytes of fp8 or int8 read as numbers)."""
    pytest.importorskip(backend)
    b = model.backend(backend)
    random_checkpoint("Qwen2, tied", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"architectures": ["LlamaForCausalLM"]}, "self_attn.k_proj.bias is not one"), ({"architectures": ["Qwen3ForCausalLM"]}, "is (missing|not one)"),
                            ({"intermediate_size": 40}, r"mlp.*\(48, 32\).*\(40, 32\)"), ({"num_hidden_layers": 3}, r"layers.2.* is missing")):
        network = b.build(model.ModelConfig.from_dict({**raw, **change}, "x"))
        with pytest.raises(Problem, match=message):
            b.load_weights(network, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for kind in (torch.float8_e4m3fn, torch.int8, torch.uint8):
        save_file({n: p.to(kind) if n.endswith("1.mlp.up_proj.weight") else p for n, p in whole.items()}, tmp_path / "model.safetensors")
        with pytest.raises(Problem, match=r"layers\.1\.mlp\.up_proj\.weight holds .*int8|float8.* packed weights"):
            b.load_weights(b.build(model.read_config(tmp_path)), tmp_path)


def test_a_folder_that_was_cut(codec, tmp_path):
    """A cut or empty index of shards, a tokenizer or an adapter's file that is missing or cut: one line with the file's name. Guards: tracebacks."""
    lm = tiny(codec)
    lm.save(tmp_path / "x")
    for name, content, message in (("tokenizer.json", None, "tokenizer.json is missing"), ("tokenizer.json", '{"added', "tokenizer of .*x can't be read"), ("tokenizer.json", "{}", "tokenizer of .*x can't be read"),
                                   ("model.safetensors.index.json", '{"weight', "index.json can't be read"),
                                   ("model.safetensors.index.json", "{}", "index.json can't be read.*weight_map"), ("adapter_config.json", "{", "adapter_config.json can't be read"),
                                   ("adapter_config.json", "{}", "adapter_config.json can't be read.*base_model")):
        path = tmp_path / "x" / name
        path.write_text(content) if content is not None else path.unlink()
        with pytest.raises(Problem, match=message):
            model.load(tmp_path / "x", "cpu")
        if content and name == "tokenizer.json":
            with pytest.raises(Problem, match=message):
                model.load_pretrained(str(tmp_path / "x"), "cpu")
        lm.save(tmp_path / "x")
    assert model.load(tmp_path / "x", "cpu")


# ---- optimizer and train step -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_orthogonalize(shape, backend):
    """Against the SVD: singular vectors stay, singular values come near 1 (Muon's five steps leave them in about 0.7 to 1.2).
    A matrix of zeros stays one (guards: 0 / 0, and weights that are nan)."""
    mx = pytest.importorskip("mlx.core") if backend == "mlx" else None
    x = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    x = torch.cat((x, torch.zeros(1, *shape)))
    y = torch.tensor(np.array(model.backend("mlx").orthogonalize(mx.array(x.numpy())))) if mx else model_torch.orthogonalize(x)
    assert not y[3].any()
    for a, b in zip(x[:3], y):
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        inner = u.T @ b @ vh.T
        large = s > 0.05 * s[0]
        assert ((inner.diagonal()[large] > 0.5) & (inner.diagonal()[large] < 1.3)).all()
        assert (inner - inner.diagonal().diag()).abs().max() < 0.02


def stepped(lm, optimizer, step, n=4):
    """n steps on random gradients, the same for both optimizers."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        for p in lm.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        step(optimizer)
    return {k: p.detach().clone() for k, p in lm.model.named_parameters()}


def grads(lm):
    return {n: p.grad for n, p in lm.model.named_parameters()}


def test_adamw_equals_torch(codec):
    """Bias correction and epsilon as in torch.optim.AdamW."""
    a, b = tiny(codec), tiny(codec)
    mine = stepped(a, model_torch.Optimizer(a.model, muon=False), lambda o: o.step(grads(a), 1e-2, 99.0))
    other = stepped(b, torch.optim.AdamW(b.model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0), lambda o: o.step())
    for n in mine:
        torch.testing.assert_close(mine[n], other[n], atol=1e-5, rtol=1e-4)


def test_muon_equals_torch(codec):
    """The matrices of the blocks move as by torch.optim.Muon (which iterates in bfloat16: a percent off); embeddings do not."""
    a, b = tiny(codec), tiny(codec)
    start = {n: p.detach().clone() for n, p in a.model.named_parameters()}
    mine = stepped(a, model_torch.Optimizer(a.model), lambda o: o.step(grads(a), 0.0, 1e-2))
    matrices = [p for n, p in b.model.named_parameters() if n.endswith("proj.weight")]
    other = stepped(b, torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, momentum=0.95), lambda o: o.step())
    for n, p in start.items():
        x, y = mine[n] - p, other[n] - p
        assert (x - y).norm() <= 0.03 * y.norm()
        assert bool(x.any()) == n.endswith("proj.weight")


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_leaves_weights_and_optimizer(codec, tmp_path, bad, backend):
    """Guards: one NaN micro-batch among good ones ruins the checkpoint."""
    pytest.importorskip(backend)
    tiny(codec).save(tmp_path / "x")
    lm = model.load(tmp_path / "x", "cpu", backend)
    names = list(lm.backend.trained(lm.model))
    before, optimizer = lm.backend.arrays(lm.model, names), lm.backend.Optimizer(lm.model)
    batches = train_sft.language_batches([codec.build("Who?", [("answer", "Eva")])] * 2, 1)
    batches[1]["norm"] = bad if math.isnan(bad) else 0.0
    figures = lm.backend.train_step(lm.model, optimizer, autocoa.nll_loss, batches, 1e-2, 1e-2)
    assert not math.isfinite(figures["loss"]) and optimizer.step_count == 0
    assert all(np.array_equal(x, before[n]) for n, x in lm.backend.arrays(lm.model, names).items())


def test_a_bad_loss_stops_the_stage(codec, tmp_path, monkeypatch):
    """A clear error that names stage and step; the folder of the stage is not there, so its last good checkpoint still counts."""
    monkeypatch.chdir(tmp_path)
    lm = tiny(codec)
    steps = [[codec.build("Who?", [("answer", "Eva")])]] * 3
    with pytest.raises(Problem, match="sft2: loss is nan at step 0"):
        train_sft.train(lm, Settings(), None, "sft2", steps, lambda xp, logp, b: math.nan * autocoa.nll_loss(xp, logp, b), lambda b: train_sft.language_batches(b, 1000))
    assert not (tmp_path / "out" / "nano" / "sft2").exists()


PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_gguf_file(codec, tmp_path, backend):
    """Written by the gguf package, with its names and its order of rotary pairs: the logits of the network it holds, in both twins."""
    pytest.importorskip(backend)
    vocab = [t for t, _ in sorted(codec.tok.get_vocab().items(), key=lambda x: x[1])] + ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(vocab), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True)).eval()
    w = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in dict(context_length=128, embedding_length=64, block_count=2, feed_forward_length=96, head_count=4, head_count_kv=4, layer_norm_rms_eps=1e-6, rope_freq_base=10000.0,
                           vocab_size=len(vocab), tokenizer_model="gpt2", token_list=vocab, token_types=[1] * len(vocab), bos_token_id=1, eos_token_id=codec.eos,
                           token_merges=[" ".join(m) for m in json.loads(codec.tok.backend_tokenizer.to_str())["model"]["merges"]]).items():
        getattr(w, f"add_{key}")(value)
    for name, p in reference.named_parameters():
        x = p.detach().numpy()
        if ".layers." in name:
            _, _, i, part = name.removesuffix(".weight").split(".", 3)
            if part.endswith(("q_proj", "k_proj")):
                x = x.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
            name = f"blk.{i}.{PARTS[part]}.weight"
        w.add_tensor({"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name, name), np.ascontiguousarray(x))
    for write in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        write()
    lm = model.load_pretrained(str(tmp_path / "x.gguf"), "cpu", backend)
    lm.save(tmp_path / "y")
    np.testing.assert_allclose(ours(model.load(tmp_path / "y", "cpu", "torch").model, IDS), theirs(reference, IDS), atol=1e-4)
