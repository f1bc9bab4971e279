"""The report before a run: counts against those of real tensors, and what --dry-run measures."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, run_here, tiny_lm

import backends.torch as torch_backend
import model
from autocoa import nll_loss
from backends.config import ModelConfig, nano_config
from backends.torch import weights
from common import memory, ranks
from common.errors import UserError
from common.settings import ModelSettings
from data.trajectory import Codec
from model import LM
from train_rl import RLSettings
from train_sft import SFTSettings

NANO = nano_config(2048, 0, 1)
# DeepSeek-R1-Distill-Qwen-1.5B.
R1 = ModelConfig(
    architectures=["Qwen2ForCausalLM"],
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=False,
)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHECKPOINTS = {
    "Llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "Llama, tied, no groups": transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True
    ),
    "Llama, biases": transformers.LlamaConfig(
        **SIZES, attention_bias=True, tie_word_embeddings=False
    ),
    "Llama, wide heads": transformers.LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=True),
    "Qwen2, tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "Qwen2, untied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "Qwen3, wide heads": transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
}


# ---- counted from shapes -------------------------------------------------------------------------
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters(name: Any) -> None:
    """As many as the network's arrays hold, and no adapter without a rank."""
    hf_config = CHECKPOINTS[name]
    architecture = type(hf_config).__name__.replace("Config", "ForCausalLM")
    config = ModelConfig.from_dict({**hf_config.to_dict(), "architectures": [architecture]}, name)
    counts = memory.count_parameters(config, ModelSettings())
    shapes = torch_backend.parameter_shapes(torch_backend.build(config))
    assert counts.network == sum(np.prod(shape) for shape in shapes.values())
    assert counts.beside_frozen == 0


def weight_bytes(lm: LM) -> Any:
    """Return the bytes of the weights that a network holds."""
    if lm.backend is not torch_backend:
        return sum(array.nbytes for array in lm.backend.named_parameters(lm.network).values())
    arrays = list(lm.network.parameters())
    for linear in torch_backend.block_linears(lm.network).values():
        if linear.packed is not None:
            arrays += [linear.packed, linear.quant_state.absmax]
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(
    ("values", "muon"),
    [
        ({}, True),
        ({}, False),
        ({"dtype": "bfloat16"}, True),
        ({"lora_rank": 4}, True),
        ({"lora_rank": 4, "dtype": "bfloat16", "lora_targets": ["q_proj"]}, True),
        ({"lora_rank": 4, "bits": 4}, True),
        ({"lora_rank": 4, "bits": 4, "dtype": "bfloat16"}, False),
    ],
)
def test_what_is_held(
    codec: Codec, tmp_path: Path, backend: str, values: dict[str, Any], muon: bool
) -> None:
    """Weights, gradients and the optimizer's state, to the byte."""
    pytest.importorskip(backend)
    if values.get("bits") == 4 and backend == "torch":
        pytest.importorskip("bitsandbytes")
    settings = ModelSettings(device="cpu", backend=backend, **values)
    tiny_lm(codec, width=128).save(tmp_path / "x")
    lm = model.load(tmp_path / "x", settings)
    lm.begin_stage(settings, 0)
    scale_bytes = 4
    if backend == "mlx" and settings.dtype != "bfloat16":
        scale_bytes = 8
    held = memory.training_bytes(lm.network.config, settings, muon, scale_bytes)
    assert held["weights"] == weight_bytes(lm)
    state = lm.backend.Optimizer(lm.network, muon=muon).state()
    assert held["optimizer"] == sum(array.nbytes for name, array in state.items() if name != "step")
    trained = lm.backend.trained_parameters(lm.network).values()
    assert held["gradients"] == 4 * sum(np.prod(parameter.shape) for parameter in trained)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_of_rollouts(codec: Codec, tmp_path: Path, backend: str, dtype: str) -> None:
    """Keys and values of a decoder's rows, and the logits of their next tokens, to the byte."""
    pytest.importorskip(backend)
    settings = ModelSettings(device="cpu", backend=backend, dtype=dtype)
    tiny_lm(codec, architecture="Qwen3ForCausalLM").save(tmp_path / "x")
    lm = model.load(tmp_path / "x", settings)
    # 128 positions fill the cache's blocks; different prompts do not share a row.
    prompts = [[row + 1] * 128 for row in range(3)]
    decoder = lm.decoder(prompts)
    held = sum(cache.keys.nbytes + cache.values.nbytes for cache in decoder.caches)
    config = lm.network.config
    assert memory.cache_bytes(config, settings, rows=3, length=128) == held
    assert memory.logits_bytes(config, 3) == decoder.logits.nbytes


def shapes_only(config: Any, backend: str) -> Any:
    """Return what the report reads of a model that is too large to be made here."""
    return SimpleNamespace(
        network=SimpleNamespace(config=config, dtype="bfloat16"),
        backend=SimpleNamespace(
            NAME=backend,
            workspace=lambda network: 0,
            describe_device=lambda network: "cpu",
        ),
    )


def read_megabytes(line: Any) -> Any:
    """Return {name: MB} of the report's line."""
    parts = line.removeprefix("memory in MB: ").partition(" (")[0]
    megabytes = {}
    for part in parts.split(", "):
        name, _, size = part.rpartition(" ")
        megabytes[name] = float(size.replace(",", ""))
    return megabytes


@pytest.mark.parametrize("kind", ["sft", "rl", "eval"])
@pytest.mark.parametrize("max_len", [1024, 1025])
def test_longer_than_the_checkpoint_has_seen(
    capsys: pytest.CaptureFixture[str], kind: str, max_len: int
) -> None:
    """It is said by every script, before anything is done.

    Guards: positions beyond the checkpoint's own; an evaluation and RL with a larger --max_len.
    """
    settings = SFTSettings(max_len=max_len) if kind == "sft" else RLSettings(max_len=max_len)
    assert memory.report(shapes_only(NANO, "torch"), settings, kind, None)
    line = f"max_len {max_len}: the checkpoint was made for texts of 1024 tokens at most"
    assert (line in capsys.readouterr().out) == (max_len == 1025)


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_a_16_gb_mac(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """R1-Distill-Qwen-1.5B with its preset: what is counted is under two thirds of 16 GB."""
    content = runpy.run_path(str(ROOT / "config" / "r1-distill-1.5b.py"))
    settings_class = SFTSettings if kind == "sft" else RLSettings
    own_names = settings_class.__dataclass_fields__
    values = {name: value for name, value in content.items() if name in own_names}
    settings = settings_class(**values)
    assert settings.bits == 4
    assert memory.report(shapes_only(R1, "mlx"), settings, kind, None)
    parameters, held = capsys.readouterr().out.splitlines()
    assert parameters.startswith("1,777.09 M parameters, ")
    assert parameters.endswith("M trained (rank 16); bfloat16, mlx on cpu")
    assert held.endswith("activations are not counted; --dry-run measures the whole")
    # 4 bits, a scale and an offset for 64, and the vocabulary's two matrices in bfloat16.
    blocks = 28 * (1536 * 1536 * 2 + 256 * 1536 * 2 + 3 * 8960 * 1536)
    megabytes = read_megabytes(held)
    at_least = (blocks * (0.5 + 4 / 64) + 2 * 2 * 151936 * 1536) / 1e6
    assert at_least < megabytes["weights"] < 1.1 * at_least
    assert sum(megabytes.values()) < 10_600


@pytest.mark.parametrize(
    ("kind", "values", "names"),
    [
        ("sft", {}, ["gradients", "optimizer", "copy for rollouts"]),
        ("rl", {}, ["gradients", "optimizer", "reference", "copy for rollouts"]),
        ("eval", {}, ["copy for rollouts"]),
        ("eval", {"dtype": "bfloat16"}, ["copy for rollouts"]),
        ("rl", {"lora_rank": 4}, ["gradients", "optimizer", "reference"]),
    ],
)
def test_what_each_script_holds(
    capsys: pytest.CaptureFixture[str], kind: str, values: dict[str, Any], names: list[str]
) -> None:
    """Each part is named, and evaluation holds the base model beside the stage."""
    settings = RLSettings(**values)
    if kind == "sft":
        settings = SFTSettings(**values)
    assert memory.report(shapes_only(NANO, "torch"), settings, kind, None)
    parameters, held = capsys.readouterr().out.splitlines()
    assert ("all trained" in parameters) == (kind != "eval" and not settings.lora_rank)
    megabytes = read_megabytes(held)
    assert list(megabytes) == ["weights", *names, "KV cache", "logits"]
    if settings.lora_rank:
        return
    whole = 4 * memory.count_parameters(NANO, settings).network / 1e6
    expected = 2 * whole if kind == "eval" else whole
    assert megabytes["weights"] == pytest.approx(expected, abs=0.05)
    # The fused projections: 4 layers of 128, two heads of 32 for keys, gate and up of 384.
    copy = 4 * 4 * (128 * (128 + 64 + 64) + 2 * 128 * 384) / 1e6
    if settings.dtype == "bfloat16":
        copy = (copy + whole) / 2
    assert megabytes["copy for rollouts"] == pytest.approx(copy, abs=0.05)


# ---- measured by --dry-run -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "more", "times"),
    [
        ("train_sft.py", [], ["optimizer step"]),
        ("train_rl.py", [], ["optimizer step", "rollouts", "step of 10 rollouts"]),
        ("eval.py", [], ["rollouts"]),
        ("autocoa.py", ["--ask=Who?", "--start=sft3"], ["rollouts"]),
        ("world_model.py", ["fidelity"], ["rollouts"]),
        (
            "world_model.py",
            ["distill", "--world_model_width=64", "--world_model_layers=2"],
            ["optimizer step"],
        ),
    ],
)
def test_dry_run(
    codec: Codec, tmp_path: Path, script: str, more: list[Any], times: list[str]
) -> None:
    """Each script says parameters, memory and time, and stops.

    Nothing is trained, written or removed, an interrupted run's checkpoints least of all.
    """
    root = tmp_path / "out" / "t"
    for leftover in ("base.checkpoint", "rl1.partial"):
        (root / leftover).mkdir(parents=True)
    for stage in ("base", "sft3"):
        tiny_lm(codec).save(root / stage)
    before = sorted(tmp_path.rglob("*"))
    arguments = [*more, "--run=t", "--dry-run", "--width=64", "--layers=2", "--questions=2"]
    budgets = ["--max_len=100", "--batch_rows=16", "--eval_questions=2"]
    done = run_here(tmp_path, script, *arguments, *budgets)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert " M parameters" in lines[1]
    assert 0.4 < read_megabytes(lines[2])["weights"] < 1.2
    *time_lines, measured = lines[3:-1]
    assert len(time_lines) == len(times)
    for line, words in zip(time_lines, times, strict=True):
        assert line.startswith("time: ")
        assert words in line
    assert measured.startswith("measured: ")
    assert lines[-1] == "nothing was trained or written (--dry-run)"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("kind", "muon"), [("sft", True), ("rl", False)])
def test_a_step_is_timed_with_its_own_optimizer(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, kind: str, muon: bool
) -> None:
    """RL has AdamW for all. Guards: seconds of Muon's iteration in the time of an RL step."""
    optimizers = []
    optimizer_class = torch_backend.Optimizer

    def make_optimizer(network: Any, muon: Any) -> Any:
        optimizers.append(muon)
        return optimizer_class(network, muon)

    monkeypatch.setattr(torch_backend, "Optimizer", make_optimizer)
    sizes = {"micro_tokens": 300, "max_len": 100, "batch_rows": 4}
    if kind == "sft":
        settings = SFTSettings(dry_run=True, batch_tokens=300, **sizes)
    else:
        settings = RLSettings(dry_run=True, questions=1, rollouts=2, **sizes)
    assert not memory.report(tiny_lm(codec), settings, kind, nll_loss)
    assert optimizers == [muon]


def test_the_rollouts_of_a_question_are_one_micro_batch(
    capsys: pytest.CaptureFixture[str], codec: Codec
) -> None:
    """Guards: the logits of one rollout counted, where a trie of five is never cut."""
    settings = RLSettings(rollouts=5, max_len=100, micro_tokens=200, kl=0.1)
    memory.report(tiny_lm(codec), settings, "rl", nll_loss)
    assert "micro-batches of up to 500 tokens" in capsys.readouterr().out


def test_measuring_leaves_the_weights(codec: Codec) -> None:
    """Guards: a run that begins with what its report trained."""
    lm = tiny_lm(codec)
    before = {name: weight.clone() for name, weight in lm.network.named_parameters()}
    settings = SFTSettings(batch_tokens=600, micro_tokens=300, max_len=100)
    workload = memory._workload(settings, "sft")
    assert memory.measure_step(lm, settings, workload, nll_loss) > 0
    for name, weight in lm.network.named_parameters():
        assert torch.equal(weight, before[name])
    assert not lm.network.lora


def test_a_step_is_timed_on_as_many_tokens_as_it_has(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of --micro_tokens, as many as make an optimizer step."""
    shapes = []

    def train_step(
        network: Any, optimizer: Any, loss: Any, batches: Any, lr: Any, muon_lr: Any
    ) -> None:
        shapes.append([(len(batch["parts"]), len(batch["ids"])) for batch in batches])
        assert loss is nll_loss
        assert (lr, muon_lr) == (0.0, 0.0)

    monkeypatch.setattr(torch_backend, "train_step", train_step)
    settings = SFTSettings(batch_tokens=600, micro_tokens=200, max_len=100)
    memory.measure_step(tiny_lm(codec), settings, memory._workload(settings, "sft"), nll_loss)
    assert shapes == [[(2, 200)] * 3] * 2


@pytest.mark.parametrize("count", [None, 123_000_000])
def test_the_most_that_was_held(
    codec: Codec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: int | None,
) -> None:
    """By the backend's own count where it has one, else what the process holds.

    PyTorch on a CPU does not count. The process' own figure has the framework in it.
    """
    monkeypatch.setattr(torch_backend, "peak_memory", lambda: count)
    settings = RLSettings(dry_run=True, max_len=64, batch_rows=2)
    assert not memory.report(tiny_lm(codec), settings, "eval", None)
    line = capsys.readouterr().out.splitlines()[-2]
    if count:
        assert line == "measured: 123 MB held at most, by torch's own count"
        return
    assert line.startswith("measured: ")
    assert line.endswith(" of them before the first step")
    resident, before = re.findall(r"([\d,]+) (?:MB of resident memory at most|of them)", line)
    assert 100 < int(before.replace(",", "")) <= int(resident.replace(",", ""))


def test_resident_memory_grows_with_what_is_held() -> None:
    """It is counted in bytes. Guards: KiB of Linux that are printed as bytes."""
    before = memory._resident_memory()
    arrays = [np.ones(before // 8 + (1 << 24))]
    assert memory._resident_memory() > before + (1 << 26)
    del arrays


def test_a_run_says_where_it_computes(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a GPU that torch does not find, and hours on a CPU that nobody asked for."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "torch was built for CUDA 13.0 and finds no device"
    assert lm.backend.pick_device("auto") == "cpu"
    assert lm.backend.describe_device(lm.network) == f"cpu ({reason})"
    with pytest.raises(UserError, match=f"--device=cuda: {reason}; use --device=cpu"):
        lm.backend.pick_device("cuda")


def test_gradients_of_several_processes(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are held twice while the processes add them up."""
    held = []
    for processes in (1, 2, 8):
        monkeypatch.setattr(ranks, "count", lambda count=processes: count)
        held.append(
            memory.training_bytes(lm.network.config, ModelSettings(), False, 0)["gradients"]
        )
    assert held == [held[0], 2 * held[0], 2 * held[0]]


def test_cuda_is_set_up(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is on, and the attention that plans anew for each length is off; that is done once.

    Guards: a check that compares in all digits, and whose next network turns TF32 on again.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    precision = torch.get_float32_matmul_precision()
    weights._set_up_cuda.cache_clear()
    try:
        assert lm.backend.pick_device("auto") == "cuda"
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        torch.set_float32_matmul_precision("highest")
        lm.backend.pick_device("cuda")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        weights._set_up_cuda.cache_clear()
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_on_cuda(capsys: pytest.CaptureFixture[str], codec: Codec) -> None:
    """The allocator's own count is at least all that is held through a step."""
    lm = model.new(NANO, codec.tokenizer, 0, ModelSettings(device="cuda"))
    settings = SFTSettings(dry_run=True, batch_tokens=1600, max_len=200, device="cuda")
    assert not memory.report(lm, settings, "sft", nll_loss)
    lines = capsys.readouterr().out.splitlines()
    megabytes = read_megabytes(lines[1])
    held = sum(megabytes[name] for name in ("weights", "gradients", "optimizer"))
    (peak,) = re.findall(r"measured: ([\d,]+) MB held at most, by torch's own count", lines[-2])
    assert int(peak.replace(",", "")) > held


def test_peak_of_mlx(capsys: pytest.CaptureFixture[str], codec: Codec, tmp_path: Path) -> None:
    """MLX counts by itself, on the CPU too."""
    pytest.importorskip("mlx")
    tiny_lm(codec).save(tmp_path / "x")
    lm = model.load(tmp_path / "x", ModelSettings(device="cpu", backend="mlx"))
    settings = SFTSettings(dry_run=True, batch_tokens=400, micro_tokens=400, max_len=100)
    assert not memory.report(lm, settings, "sft", nll_loss)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"measured: [\d,]+ MB held at most, by mlx's own count", lines[-2])
