"""Which network: sizes, Hugging Face folders, and the choice of a backend. The networks are in model_torch.py (and its twin).

A checkpoint is a Hugging Face folder: config.json, model.safetensors and the tokenizer's files, with Hugging Face's own
parameter names, so weights load and leave without a map.
"""
import hashlib
import importlib.util
import json
import math
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from autocoa import TAGS, Codec
from common import Problem, weight_files

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class LoRA:
    """A low-rank adapter (Hu et al. 2021): which matrices get one, W + alpha / rank * B A; and the tokens whose
    embeddings are trained with it, the tags, which a checkpoint from elsewhere never met."""
    rank: int
    alpha: float
    dropout: float
    targets: list
    tokens: list

    def __post_init__(self):
        self.targets = sorted(self.targets)


@dataclass
class ModelConfig:
    """The part of a Hugging Face config.json that the network needs, under the same names."""
    architectures: list
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # of Llama 3.1 and later
    tie_word_embeddings: bool = True
    attention_bias: bool = False            # of q, k, v and o; Qwen2 has those of q, k and v whatever this says
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def inv_freq(self):
        """Radians a position by which each pair of dimensions turns, (head_dim / 2,). Llama 3.1 slows those whose turn
        is longer than its first training length down by `factor`, leaves the fast ones, and blends between."""
        inv = self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.rope_scaling:
            factor, low, high, length = (self.rope_scaling[k] for k in LLAMA3)
            fast = np.clip((length * inv / (2 * np.pi) - low) / (high - low), 0, 1)      # 1: many turns within the first training length
            inv = inv * (fast + (1 - fast) / factor)
        return inv.astype(np.float32)

    def shape_of(self, linear):
        """(rows, columns) of a block's matrix by its name, q_proj for example."""
        q, kv, h, mlp = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim,
                         self.hidden_size, self.intermediate_size)
        return {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q),
                "gate": (mlp, h), "up": (mlp, h), "down": (h, mlp)}[linear.removesuffix("_proj")]

    @property
    def qkv_bias(self):
        return self.attention_bias or self.architectures[0] == "Qwen2ForCausalLM"

    @property
    def o_bias(self):
        return self.attention_bias and self.architectures[0] != "Qwen2ForCausalLM"

    @property
    def qk_norm(self):
        return self.architectures[0] == "Qwen3ForCausalLM"

    @classmethod
    def from_dict(cls, raw, where):
        """A config.json's content -> ModelConfig. Raises Problem for what this network can't compute."""
        by_type = {v: k for k, v in SUPPORTED.items()}         # a GGUF file names its model_type alone
        arch = (raw.get("architectures") or [by_type.get(raw.get("model_type"), f"of type {raw.get('model_type')}")])[0]
        if arch not in SUPPORTED:
            raise Problem(f"{where}: architecture {arch} is not supported; supported: {', '.join(SUPPORTED)}")
        packed = raw.get("quantization_config") or raw.get("quantization")
        if packed:
            raise Problem(f"{where}: these weights are quantised "
                          f"({packed.get('quant_method') or str(packed.get('bits')) + ' bits'}), which is not read; "
                          "take the checkpoint they were made of, and --bits=4")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if raw.get("use_sliding_window"):
            raise Problem(f"{where}: sliding windows are not supported; take a checkpoint without them")
        lacks = [k for k in LLAMA3 if k not in rope]
        if kind not in ("default", "llama3") or kind == "llama3" and lacks:
            raise Problem(f"{where}: rope scaling "
                          + (f"of type {kind} is not supported; supported: llama3" if kind != "llama3" else f"lacks {lacks[0]}"))
        if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            raise Problem(f"{where}: only silu without biases is supported in the MLP")
        raw = dict(raw, architectures=[arch], rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
                   rope_scaling={k: rope[k] for k in LLAMA3} if kind == "llama3" else None,
                   num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
                   head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                   tie_word_embeddings=raw.get("tie_word_embeddings", False))
        return cls(**{k: raw[k] for k in cls.__dataclass_fields__ if k in raw})

    def to_dict(self):
        rope = {"rope_theta": self.rope_theta, "rope_type": "llama3" if self.rope_scaling else "default", **(self.rope_scaling or {})}
        scaling = {"rope_scaling": rope} if self.rope_scaling else {}           # under this name for mlx_lm
        return {**{k: v for k, v in asdict(self).items() if k != "rope_scaling"}, **scaling, "model_type": SUPPORTED[self.architectures[0]],
                "hidden_act": "silu", "rope_parameters": rope, "torch_dtype": "float32", "use_cache": True}


def nano_config(vocab_size, eos, bos, width=128, layers=4):
    """The nano model: a Llama of about a million parameters, with biases in attention (see initial_weights)."""
    heads = width // 32
    return ModelConfig(["LlamaForCausalLM"], vocab_size, width, 3 * width, layers,
                       heads, heads // 2 if heads % 2 == 0 else heads, 32, rope_theta=1000.0, attention_bias=True,
                       max_position_embeddings=1024, bos_token_id=bos, eos_token_id=eos)


def initial_weights(c, shapes, seed=0, alike=0.7, repeat=0.35, gain=5.0, dims=8):
    """Weights from which heads that copy are found several times sooner (NOTES.md).
    {name: shape} -> {name: float32 array}, the same in each backend.

    Keys resemble queries and outputs the transpose of values, so that a token looks for itself and what is seen is repeated
    (mimetic initialization, Trockman and Kolter 2023). Where attention has biases, those of two heads of the first
    layer make them look one and two tokens back: the bias of the query is that of the key, turned by the offset, in the
    `dims` dimensions that turn fastest.
    """
    rng, w = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes.items()):
        if len(shape) == 2:
            # residual branches start small, so that depth does not raise the variance (GPT-2);
            # embeddings large, so that a copied token wins early
            deep = math.sqrt(2 * c.num_hidden_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            w[name] = rng.normal(0, 0.2 if "embed" in name else shape[1] ** -0.5 / deep, shape)
        else:
            w[name] = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
    shared = c.num_attention_heads // c.num_key_value_heads             # query heads that share a key and a value
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}.self_attn."
        k, v = (w[f"{at}{x}_proj.weight"].reshape(-1, c.head_dim, c.hidden_size).repeat(shared, 0).reshape(-1, c.hidden_size) for x in "kv")
        w[at + "q_proj.weight"] = alike * k + math.sqrt(1 - alike ** 2) * w[at + "q_proj.weight"]
        w[at + "o_proj.weight"] = repeat * v.T
    at = "model.layers.0.self_attn."
    for head, offset in enumerate((1, 2)[:c.num_attention_heads] if c.qkv_bias else ()):
        angle = offset * c.inv_freq()
        key = (np.arange(c.head_dim) < dims) * gain
        a, b = np.split(key, 2)
        rows, kv_rows = (slice(i * c.head_dim, (i + 1) * c.head_dim) for i in (head, head // shared))
        # the query's bias is the key's, rotated back by `offset` positions
        w[at + "q_proj.bias"][rows] = np.concatenate([a * np.cos(angle) + b * np.sin(angle),
                                                      b * np.cos(angle) - a * np.sin(angle)])
        w[at + "q_proj.weight"][rows] *= 0.1
        w[at + "k_proj.bias"][kv_rows] = key
        if head % shared == 0:
            w[at + "k_proj.weight"][kv_rows] *= 0.1
    return {name: x.astype(np.float32) for name, x in w.items()}


def read_config(folder):
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise Problem(f"model: {folder} has no config.json; give a Hugging Face folder, a GGUF file or a hub id")
    try:
        return ModelConfig.from_dict(json.loads(path.read_text()), path)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Problem(f"model: {path} is not a network's configuration: {e!r}; give a complete Hugging Face folder") from None


def backend(name="auto"):
    """The one place that chooses a framework:
    auto takes MLX on Apple silicon, else torch, or the one that is installed. Raises Problem for one that is not."""
    if name == "auto":
        apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
        name = "mlx" if importlib.util.find_spec("mlx") and (apple or not importlib.util.find_spec("torch")) else "torch"
    if name not in ("torch", "mlx"):
        raise Problem(f"--backend: {name!r} is not one of auto, torch, mlx")
    package = "'mlx[cpu]'" if name == "mlx" and sys.platform == "linux" else name
    if importlib.util.find_spec(name) is None:
        raise Problem(f"--backend={name}: {name} is not installed; pip install {package}, "
                      f"or take --backend={'mlx' if name == 'torch' else 'torch'}")
    try:
        if name == "mlx":
            import model_mlx as twin
        else:
            import model_torch as twin
    except ImportError as e:
        raise Problem(f"--backend={name}: {name} is installed but can't be imported ({e}); "
                      f"pip install --force-reinstall {package}") from None
    return twin


class LM:
    """A network with its tokenizer: what the scripts pass around."""

    def __init__(self, model, tok, backend):
        self.backend, self.model, self.codec = backend, model, Codec(tok)
        self.folder = None          # where the whole weights lie: these, or those that an adapter belongs to
        if len(tok) > model.config.vocab_size:
            raise Problem(f"model: the tokenizer has {len(tok)} entries, the network {model.config.vocab_size}; they are not a pair")

    def decoder(self, prompts):
        return self.backend.Decoder(self.model, prompts)

    def save(self, folder, optimizer=None, done=None):
        """Write a Hugging Face folder, or that of an adapter, with the optimizer's state where one is given, and beside it
        how many steps of a stage are done: of RL's, some make several optimizer steps and some none. All or nothing: the
        files lie beside it until they are complete."""
        folder = Path(folder)
        parts = folder.with_name(folder.name + ".partial")
        parts.mkdir(parents=True, exist_ok=True)
        self.codec.tok.save_pretrained(parts)
        (parts / "config.json").write_text(json.dumps(self.model.config.to_dict(), indent=2))
        if self.model.lora:
            self.save_adapter(parts)
        else:
            self.backend.save_weights(self.model, parts)
            self.folder = folder
        if optimizer:
            steps = {} if done is None else {"done": np.array([done])}
            save_file(optimizer.state() | steps, parts / "optimizer.safetensors")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)          # to remove it takes time, in which there would be neither
        parts.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def save_adapter(self, folder):
        """PEFT's files, and in mlx_lm/ the same for that library, to which trained tokens are a low-rank change of the
        embeddings like another; of a rank that is at least their number, where need be with rows of zeros."""
        lora, state, scale = (self.model.lora, self.backend.arrays(self.model, self.backend.trained(self.model)),
                              self.model.lora.alpha / self.model.lora.rank)
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.folder),
            "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
            "target_modules": lora.targets, "bias": "none", "inference_mode": True,
            "trainable_token_indices": {name.split(".")[-1]: lora.tokens for name in self.backend.embeddings(self.model)}}, indent=2))
        save_file({peft_name(n): x for n, x in state.items()}, folder / "adapter_model.safetensors",
                  metadata={"format": "pt", "base": fingerprint(self.folder), "trained_on": self.base_bits()})
        there, known, rank = folder / "mlx_lm", {}, max(lora.rank, len(lora.tokens))
        there.mkdir(exist_ok=True)
        for n, x in state.items():
            if n.endswith(".rows"):         # W + scale * one_hot @ change
                name, c = n.removesuffix(".rows"), self.model.config
                one_hot, change = np.zeros((c.vocab_size, rank), np.float32), np.zeros((rank, c.hidden_size), np.float32)
                one_hot[lora.tokens, range(len(lora.tokens))] = 1
                change[:len(lora.tokens)] = (x - self.frozen_rows(lora)[name]) / scale
                a, b = (change.T, one_hot.T) if name == "lm_head" else (one_hot, change)
                known |= {f"{name}.lora_a": np.ascontiguousarray(a), f"{name}.lora_b": np.ascontiguousarray(b)}
            elif n.endswith("lora_A"):
                known[n.replace("lora_A", "lora_a")] = np.pad(np.ascontiguousarray(x.T), ((0, 0), (0, rank - lora.rank)))
            else:
                known[n.replace("lora_B", "lora_b")] = np.pad(np.ascontiguousarray(x.T), ((0, rank - lora.rank), (0, 0)))
        keys = sorted({".".join(n.split(".")[3:5]) if ".layers." in n else n.rpartition(".")[0] for n in known})
        (there / "adapter_config.json").write_text(json.dumps({
            "fine_tune_type": "lora", "num_layers": self.model.config.num_hidden_layers,
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": lora.dropout, "keys": keys}}, indent=2))
        save_file(known, there / "adapters.safetensors")

    def base_bits(self):
        """How the base of an adapter is kept, which the adapter has learned to go with."""
        return ("16 bits or more" if self.model.bits == 16
                else "MLX's 4 bits" if self.backend.__name__ == "model_mlx" else "bitsandbytes' 4 bits (NF4)")

    def adapter_shapes(self, lora):
        """{name: shape} of an adapter of this network: A is (rank, in), B (out, rank), embeddings' rows (tokens, hidden)."""
        out = {}
        for name in sorted(self.backend.linears(self.model)):
            if (target := name.split(".")[-1]) in lora.targets:
                rows, columns = self.model.config.shape_of(target)
                out |= {name + ".lora_A": (lora.rank, columns), name + ".lora_B": (rows, lora.rank)}
        return out | {f"{name}.rows": (len(lora.tokens), self.model.config.hidden_size) for name in self.backend.embeddings(self.model)}

    def frozen_rows(self, lora):
        """{name: (tokens, hidden)}: what the embeddings of the trained tokens are without the adapter."""
        own = self.backend.arrays(self.model, [f"{name}.weight" for name in self.backend.embeddings(self.model)])
        return {name.removesuffix(".weight"): x[lora.tokens] for name, x in own.items()}

    def adapt(self, s, stage=""):
        """Before a stage: an adapter of --lora_rank, if that is set and the network has none, on a base of --bits; and --checkpointing.
        stage: its name, so that with --lora_merge each stage's adapter begins with an A of its own."""
        self.model.recompute = s.checkpointing
        tags = sorted(self.codec.tok.convert_tokens_to_ids(list(TAGS.values())))
        lora, state = LoRA(s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets, tags), {}
        if s.lora_rank and not self.model.lora:
            if s.bits < 16 and self.model.bits == 16:
                self.backend.quantize(self.model, s.bits)
            rng = np.random.default_rng([s.seed, *stage.encode()])
            for name, shape in self.adapter_shapes(lora).items():
                state[name] = rng.uniform(-1, 1, shape) * shape[1] ** -0.5 if name.endswith("lora_A") else np.zeros(shape)
            state |= {f"{name}.rows": x for name, x in self.frozen_rows(lora).items()}
            self.backend.adapt(self.model, lora, state)
        elif s.lora_rank:
            for name in ("rank", "alpha", "dropout", "targets"):
                there, wanted = getattr(self.model.lora, name), getattr(lora, name)
                if there != wanted:
                    raise Problem(f"--lora_{name}={wanted}: what this run starts from has an adapter with {name} {there}; "
                                  "repeat that, or begin at a stage without an adapter")
        elif self.model.bits < 16 and not self.model.lora:
            raise Problem(f"--bits={self.model.bits}: weights of {self.model.bits} bits can't be trained; "
                          "train an adapter on them with --lora_rank=16")

    def resume(self, folder, optimizer=None):
        """The weights and, where one is given, the optimizer's state that `save` wrote, by either backend.
        -> how many steps of the stage were done (the optimizer's own count where `save` was given none); None without an optimizer.
        Raises Problem where they are of another network or optimizer."""
        def other(what):
            return Problem(f"{folder} holds {what}; repeat the settings it was begun with, or remove it")
        if read_config(folder) != self.model.config:
            raise other("another network than this run's")
        if (folder / "adapter_config.json").is_file() != bool(self.model.lora):
            raise other("all weights, and this run trains an adapter" if self.model.lora else "an adapter, and this run trains all weights")
        if self.model.lora:
            lora, state = read_adapter(folder, self)
            if lora != self.model.lora:
                raise other("another kind of adapter than this run's")
            self.backend.adapt(self.model, lora, state)
        else:
            self.backend.load_weights(self.model, folder)
        if not optimizer:
            return None
        try:
            state = load_file(folder / "optimizer.safetensors")
            done = state.pop("done", state.get("step"))
            optimizer.load_state(state)
        except (KeyError, OSError, SafetensorError) as e:
            raise Problem(f"{folder / 'optimizer.safetensors'} is not this optimizer's state: {e}; "
                          f"repeat the settings it was begun with, or remove {folder}") from None
        return int(done[0])

    def copy(self):
        other = LM(self.backend.copy(self.model), self.codec.tok, self.backend)
        other.folder = self.folder
        return other


def fingerprint(folder):
    """Of the weights in a folder, by which an adapter knows its base."""
    return tail_hash(weight_files(folder))


def tail_hash(files, tail=1 << 24):
    """Of the last megabytes of each file."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - tail))
            digest.update(f.read())
    return digest.hexdigest()[:16]


def peft_name(name):
    """Our name of an adapter's parameter -> PEFT's."""
    return "base_model.model." + (name.removesuffix("rows") + "token_adapter.trainable_tokens_delta"
                                  if name.endswith(".rows") else name + ".weight")


def read_adapter(folder, lm):
    """A PEFT folder -> LoRA and {name: array}. Raises Problem where it is not one of this network."""
    path = Path(folder) / "adapter_model.safetensors"
    try:
        raw = json.loads((Path(folder) / "adapter_config.json").read_text())
        odd = ([k for k in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if raw.get(k)]
               + ["bias"] * (raw.get("bias", "none") != "none"))
        if odd:
            raise Problem(f"model: {folder} is an adapter with {odd[0]}, which is not read; "
                          "merge it into its base with peft, and start from that")
        tokens = raw["trainable_token_indices"]
        lora = LoRA(raw["r"], raw["lora_alpha"], raw["lora_dropout"], raw["target_modules"], tokens["embed_tokens"])
        ours = {peft_name(n): n for n in lm.adapter_shapes(lora)}
        state = {ours.get(k, k): x for k, x in load_file(path).items()}
        with safe_open(path, "np") as f:
            base = (f.metadata() or {}).get("base")
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as e:
        raise Problem(f"model: {folder} is not a LoRA adapter: {e!r}") from None
    expected = lm.adapter_shapes(lora)
    odd = sorted(n for n in expected.keys() | state.keys() if n not in expected or n not in state or state[n].shape != expected[n])
    if odd or base not in (None, fingerprint(lm.folder)):
        what = f"{odd[0]} does not fit" if odd else "its weights are others"
        raise Problem(f"model: {folder} is an adapter for another base than {lm.folder}: {what}; train it again, or put its base back")
    return lora, state


def read_tokenizer(kind, name, **options):
    """By a class of transformers. Raises Problem for files that are cut short or of another kind."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as e:          # tokenizers raises nothing narrower
        raise Problem(f"model: the tokenizer of {name} can't be read: {type(e).__name__}: "
                      f"{(str(e).splitlines() or [''])[0]}; copy tokenizer.json again") from None


def new(config, tok, seed, device="auto", framework="auto", dtype="float32"):
    """A new network, ready to learn."""
    b = backend(framework)
    network = b.build(config, b.pick_device(device), dtype)
    b.put(network, initial_weights(config, b.shapes(network), seed), "initial weights")
    return LM(network, tok, b)


def load(folder, device="auto", framework="auto", dtype="float32", bits=16, frozen=False):
    """A folder that `LM.save` wrote -> LM.
    bits: 4 to keep the blocks' matrices in 4 bits; frozen: only an adapter will be trained.
    Raises Problem for an adapter whose base is not there."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise Problem(f"{folder} is missing")
    b, whole = backend(framework), folder
    if (folder / "adapter_config.json").is_file():
        try:
            whole = Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError) as e:
            raise Problem(f"model: {folder / 'adapter_config.json'} can't be read: {e!r}; train this stage again") from None
        whole = whole if whole.is_dir() else folder.parent / whole.name            # of a run that was moved
        if not (whole / "config.json").is_file():
            raise Problem(f"model: {folder} is an adapter for {whole}, which is missing; put it back or train again")
    network = b.load_weights(b.build(read_config(whole), b.pick_device(device), dtype, frozen), whole)
    if not (folder / "tokenizer.json").is_file():
        raise Problem(f"model: {folder / 'tokenizer.json'} is missing; copy it from another stage of the run, or train this one again")
    # as it was saved; AutoTokenizer may rebuild it by model type
    lm = LM(network, read_tokenizer(PreTrainedTokenizerFast, folder), b)
    lm.folder, adapter = whole, None
    if whole != folder:
        adapter = read_adapter(folder, lm)
    if bits < 16:
        b.quantize(network, bits)
    if adapter:
        b.adapt(network, *adapter)
        with safe_open(folder / "adapter_model.safetensors", "np") as f:
            if (trained_on := (f.metadata() or {}).get("trained_on", lm.base_bits())) != lm.base_bits():
                print(f"{folder} was trained on a base of {trained_on}, and goes onto one of {lm.base_bits()} now: "
                      "not quite the same network (--bits, --backend)")
    return lm


def load_pretrained(name, device="auto", framework="auto", dtype="float32", frozen=False):
    """A checkpoint from elsewhere: Hugging Face folder, hub id or GGUF file -> LM. frozen: only an adapter will be trained.

    The tags become new tokens; their embeddings start as the mean of the pieces that spelled them. A GGUF file is read
    by transformers, with torch.
    """
    b, path, options = backend(framework), Path(name), {}
    try:
        if path.suffix == ".gguf":
            config, state = read_gguf(path)
            name, options = str(path.parent), {"gguf_file": path.name}
        else:
            if not path.is_dir():
                name = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
            config, state = read_config(name), b.read_weights(name)
        if options or not (Path(name) / "tokenizer.json").is_file():
            from transformers import AutoTokenizer as kind      # not above: it takes a second, and torch with it
        else:
            kind = PreTrainedTokenizerFast                      # as it was saved; AutoTokenizer may rebuild it by model type
        tok = read_tokenizer(kind, name, **options)
    except (OSError, ValueError) as e:
        raise Problem(f"model: {name} can't be read: {str(e).splitlines()[0]}") from None
    if len(tok) > config.vocab_size:
        raise Problem(f"model: the tokenizer of {name} has {len(tok)} entries, its weights {config.vocab_size}; they are not a pair")
    pieces = [tok.encode(t, add_special_tokens=False) for t in TAGS.values()]
    missing = [t for t in TAGS.values() if t not in tok.get_vocab()]
    tok.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    config.eos_token_id, config.bos_token_id = tok.eos_token_id, tok.bos_token_id
    declared = (config.vocab_size, config.hidden_size)
    config.vocab_size = max(config.vocab_size, len(tok))
    for key in {"model.embed_tokens.weight", "lm_head.weight"} & set(state):
        old = b.to_numpy(state[key])
        if old.shape != declared:
            raise Problem(f"model: {name}: {key} has shape {old.shape}, config.json says {declared}")
        rows = {tok.convert_tokens_to_ids(tag): old[spelled].mean(0) for tag, spelled in zip(TAGS.values(), pieces) if tag in missing}
        more = np.tile(old.mean(0), (config.vocab_size - len(old), 1))
        del old         # before the next one: of 150,000 tokens they take a gigabyte
        state[key] = b.with_rows(state[key], more, rows)
    network = b.build(config, b.pick_device(device), dtype, frozen)
    b.put(network, state, name)
    return LM(network, tok, b)


def load_any(name, **place):
    """-> (LM, whether it has the tags): a folder that `LM.save` wrote, or a checkpoint from elsewhere."""
    path = Path(name) / "tokenizer.json"
    tagged = path.is_file() and f'"{TAGS["search"]}"' in path.read_text()
    if tagged:
        return load(name, **place), True
    bits = place.pop("bits", 16)
    lm = load_pretrained(name, **place)
    if bits < 16:
        lm.backend.quantize(lm.model, bits)
    return lm, False


def read_gguf(path):
    """-> ModelConfig and {name: array}, by transformers, which computes the weights from the file's with torch."""
    if not path.is_file():
        raise Problem(f"model: no such file: {path}")
    if importlib.util.find_spec("torch") is None:
        raise Problem("model: reading a GGUF file needs torch, once; pip install torch, or give a Hugging Face folder")
    from transformers import AutoConfig, AutoModelForCausalLM
    config = ModelConfig.from_dict(AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict(), path)
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    return config, {k: x.numpy() for k, x in source.state_dict().items()}
