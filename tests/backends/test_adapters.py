"""Adapters, 4 bits, bfloat16 and gradient checkpointing, in both backends.

They are compared with peft, mlx_lm and bitsandbytes, and with doing without.
"""

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mlx_twin, read_rows, run_here, tiny_lm
from safetensors.torch import load_file
from test_checkpoints import reference_logits, torch_logits
from test_config import IDS
from test_losses import SCRIPT_LOSSES, batches_of, sampled_chains
from transformers import AutoModelForCausalLM

import autocoa
import backends.torch as torch_backend
import model
import train_rl
import train_sft
from common.errors import UserError
from common.files import CHECKSUMS_FILE
from common.settings import ModelSettings, RolloutSettings, read_settings
from data.batches import language_batches, pack_texts
from data.trajectory import Codec, Observation, Trajectory
from model import LM

mx = pytest.importorskip("mlx.core")
mlx_backend = model.choose_backend("mlx")

BACKENDS: dict[str, Any] = {"torch": torch_backend, "mlx": mlx_backend}
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
LORA = {"lora_rank": 8, "lora_alpha": 16.0}
ALL_MATRICES = ModelSettings().lora_targets


def model_settings(backend: str = "torch", **changes: Any) -> Any:
    return ModelSettings(device="cpu", backend=backend, **changes)


def load(folder: Path, backend: str = "torch", **changes: Any) -> Any:
    return model.load(folder, model_settings(backend, **changes))


def logits_of(lm: LM, ids: Any) -> Any:
    if lm.backend is torch_backend:
        return torch_logits(lm.network, ids)
    return np.array(lm.network.logits(lm.network(mx.array(ids))))


def weights_of(lm: LM) -> dict[Any, Any]:
    """Return all parameters as arrays of their own."""
    names = lm.backend.parameter_shapes(lm.network)
    arrays = lm.backend.to_arrays(lm.network, names)
    return {name: weight.copy() for name, weight in arrays.items()}


def trained_of(lm: LM) -> Any:
    """Return the parameters that are trained, as arrays."""
    names = sorted(lm.backend.trained_parameters(lm.network))
    return lm.backend.to_arrays(lm.network, names)


def adapted_lm(
    codec: Codec, folder: Path, backend: str = "torch", tie: bool = True, **changes: Any
) -> Any:
    """Save a network in a folder, and return it loaded with an adapter that is not zero."""
    tiny_lm(codec, noise=0.1, tie_embeddings=tie).save(folder)
    lm = load(folder, backend)
    lm.begin_stage(model_settings(backend, **{**LORA, **changes}), seed=0)
    rng = np.random.default_rng(3)
    noisy = {}
    for name, weight in trained_of(lm).items():
        noisy[name] = weight + 0.1 * rng.standard_normal(weight.shape).astype(np.float32)
    lm.backend.add_adapter(lm.network, lm.network.lora, noisy)
    return lm


class GradientKeeper:
    """An optimizer that keeps the gradients and changes nothing."""

    step_count = 3

    def __init__(self, backend: str, seed: int) -> None:
        self.backend = backend
        self.seed = seed
        self.gradients = {}

    def step(self, gradients: Any, lr: Any, muon_lr: Any) -> None:
        for name, gradient in gradients.items():
            self.gradients[name] = self.backend.to_numpy(gradient)


def loss_and_gradients(lm: LM, name: str, codec: Codec, dropout_seed: int = 0) -> Any:
    """Return the loss of a step, and its gradients as arrays."""
    keeper = GradientKeeper(lm.backend, dropout_seed)
    batches = batches_of(name, sampled_chains(codec), 200)
    figures = lm.backend.train_step(
        lm.network, keeper, SCRIPT_LOSSES[name], batches, 0, 0, max_norm=1e9
    )
    return figures["loss"], keeper.gradients


def assert_close(gradients: Any, others: Any, tolerance: float = 1e-4) -> None:
    assert set(gradients) == set(others)
    for name, gradient in gradients.items():
        largest = np.abs(gradient).max()
        assert np.abs(gradient - others[name]).max() <= tolerance * largest + 1e-8, name


def learn(lm: LM, optimizer: Any, batches: Any, steps: Any, lr: float = 1e-2) -> Any:
    """Take some steps of next-token loss; return the loss of each."""
    losses = []
    for _ in range(steps):
        figures = lm.backend.train_step(lm.network, optimizer, autocoa.nll_loss, batches, lr, 0)
        losses.append(figures["loss"])
    return losses


@pytest.fixture
def ids(codec: Codec) -> Any:
    return IDS % len(codec.tokenizer)


# ---- adapters and their files --------------------------------------------------------------------
@on_each_backend
def test_a_new_adapter_changes_nothing(codec: Codec, ids: Any, backend: str) -> None:
    """B starts at zero. Only the adapter is trained, and the embeddings of the tags."""
    lm = tiny_lm(codec, noise=0.1)
    if backend == "mlx":
        lm = mlx_twin(lm)
    before = logits_of(lm, ids)
    targets = ["q_proj", "down_proj"]
    lm.begin_stage(model_settings(backend, lora_rank=4, lora_targets=targets), seed=0)
    np.testing.assert_allclose(logits_of(lm, ids), before, atol=1e-5)
    trained = set(lm.backend.trained_parameters(lm.network))
    in_blocks = {name.split(".", 3)[3] for name in trained if ".layers." in name}
    assert in_blocks == {
        "self_attn.q_proj.lora_A",
        "self_attn.q_proj.lora_B",
        "mlp.down_proj.lora_A",
        "mlp.down_proj.lora_B",
    }
    outside = {name for name in trained if ".layers." not in name}
    assert outside == {"model.embed_tokens.rows"}
    # A is drawn as in the paper's code.
    matrix = weights_of(lm)["model.layers.1.mlp.down_proj.lora_A"]
    assert 0 < np.abs(matrix).max() <= 192**-0.5


def test_a_new_adapter_is_the_same_in_both_backends(codec: Codec) -> None:
    """A is drawn outside of the backends."""
    lm = tiny_lm(codec)
    twin = mlx_twin(lm)
    for one in (lm, twin):
        one.begin_stage(model_settings(lora_rank=4), seed=7)
    expected = trained_of(lm)
    for name, weight in trained_of(twin).items():
        np.testing.assert_array_equal(weight, expected[name])


@on_each_backend
@pytest.mark.parametrize(
    "targets, tie, rank", [(["q_proj", "v_proj"], True, 8), (ALL_MATRICES, False, 4)]
)
def test_a_folder_in_peft_and_mlx_lm(
    codec: Codec, ids: Any, tmp_path: Path, backend: str, targets: Any, tie: bool, rank: int
) -> None:
    """PEFT on the transformers network, mlx_lm and the other backend have the same logits.

    With a rank above and below the number of tags, with a head of its own or not. Merged into the
    weights, transformers alone has them too.
    """
    peft = pytest.importorskip("peft")
    mlx_lm = pytest.importorskip("mlx_lm")
    base = tmp_path / "base"
    folder = tmp_path / "sft"
    lm = adapted_lm(codec, base, backend, tie, lora_targets=targets, lora_rank=rank)
    expected = logits_of(lm, ids)
    assert np.abs(expected - logits_of(load(base, backend), ids)).max() > 0.05
    lm.save(folder)
    weight_files = [path.name for path in folder.glob("*.safetensors")]
    assert weight_files == ["adapter_model.safetensors"]

    plain = AutoModelForCausalLM.from_pretrained(base)
    with_peft = peft.PeftModel.from_pretrained(plain, folder).eval()
    np.testing.assert_allclose(reference_logits(with_peft, ids), expected, atol=1e-4)

    network, _ = mlx_lm.load(str(base), adapter_path=str(folder / "mlx_lm"))
    network.eval()
    np.testing.assert_allclose(np.array(network(mx.array(ids))), expected, atol=1e-4)

    other = load(folder, "mlx" if backend == "torch" else "torch")
    np.testing.assert_allclose(logits_of(other, ids), expected, atol=1e-4)
    assert other.network.lora == lm.network.lora
    assert other.network.lora.targets == sorted(targets)

    lm.backend.merge_adapter(lm.network)
    lm.save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(reference_logits(merged, ids), expected, atol=1e-4)
    assert len(lm.backend.trained_parameters(lm.network)) == len(weights_of(lm))


@on_each_backend
def test_each_stage_has_directions_of_its_own(codec: Codec, tmp_path: Path, backend: str) -> None:
    """With --lora_merge the next stage begins with another A, the same stage with the same.

    Guards: all stages in one subspace of `rank` dimensions.
    """
    lm = adapted_lm(codec, tmp_path / "base", backend)
    matrices = []
    for stage in ("sft1", "sft2", "sft1"):
        lm.backend.merge_adapter(lm.network)
        lm.begin_stage(model_settings(backend, **LORA), 0, stage)
        matrices.append(weights_of(lm)["model.layers.1.mlp.up_proj.lora_A"])
    assert np.array_equal(matrices[0], matrices[2])
    assert np.abs(matrices[0] - matrices[1]).max() > 0.01


def test_a_run_that_was_moved(codec: Codec, ids: Any, tmp_path: Path) -> None:
    """An adapter finds its base beside itself; where it is nowhere, an error says so."""
    lm = adapted_lm(codec, tmp_path / "run" / "base")
    lm.save(tmp_path / "run" / "sft1")
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    loaded = load(moved / "sft1")
    np.testing.assert_allclose(logits_of(loaded, ids), logits_of(lm, ids), atol=1e-5)
    (moved / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"sft1 is an adapter for .*base, which is missing"):
        load(moved / "sft1")


@on_each_backend
@pytest.mark.parametrize(
    "other, message",
    [
        ({"seed": 1, "noise": 0.1}, "its weights are others"),
        ({"width": 96}, "rows does not fit"),
    ],
)
def test_an_adapter_for_another_base(
    codec: Codec, tmp_path: Path, backend: str, other: dict[str, Any], message: str
) -> None:
    """Other weights of the same shape, and another width, are refused in one line."""
    adapted_lm(codec, tmp_path / "base", backend).save(tmp_path / "sft1")
    tiny_lm(codec, **other).save(tmp_path / "base")
    with pytest.raises(UserError, match=f"adapter for another base than .*base: .*{message}"):
        load(tmp_path / "sft1", backend)


@on_each_backend
def test_a_file_that_is_no_adapter(codec: Codec, tmp_path: Path, backend: str) -> None:
    """An adapter_config.json that lacks what an adapter has is refused in one line."""
    adapted_lm(codec, tmp_path / "base", backend).save(tmp_path / "sft1")
    content = {"base_model_name_or_path": str(tmp_path / "base"), "r": 4}
    (tmp_path / "sft1" / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "sft1" / CHECKSUMS_FILE).unlink()
    with pytest.raises(UserError, match="sft1 is not a LoRA adapter"):
        load(tmp_path / "sft1", backend)


@pytest.mark.parametrize(
    "change, option",
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_an_adapter_of_another_kind(
    codec: Codec, tmp_path: Path, change: dict[str, Any], option: str
) -> None:
    """What PEFT can do and this project can't is refused by name.

    Guards: rank-stabilised adapters that are read at the wrong scale.
    """
    adapted_lm(codec, tmp_path / "base").save(tmp_path / "sft1")
    path = tmp_path / "sft1" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (tmp_path / "sft1" / CHECKSUMS_FILE).unlink()
    message = f"sft1 is an adapter with {option}, which is not read"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "sft1")


def test_an_adapter_of_another_rank(codec: Codec, tmp_path: Path) -> None:
    """A start or a checkpoint with another rank, or with none, is not taken for this run's.

    Guards: a resumed run that went on with another rank than was asked for.
    """
    lm = adapted_lm(codec, tmp_path / "base")
    lm.save(tmp_path / "sft1", torch_backend.Optimizer(lm.network, muon=False))
    rank = lm.network.lora.rank
    other_rank = model_settings(lora_rank=rank + 1)
    message = f"--lora_rank={rank + 1}: what this run starts from has an adapter with rank {rank}"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "sft1").begin_stage(other_rank, seed=0)
    whole = load(tmp_path / "base")
    message = "holds an adapter, and this run trains all weights; repeat the settings"
    with pytest.raises(UserError, match=message):
        whole.resume(tmp_path / "sft1", torch_backend.Optimizer(whole.network, muon=False))
    whole.begin_stage(other_rank, seed=0)
    message = "another kind of adapter than this run's; repeat the settings"
    with pytest.raises(UserError, match=message):
        whole.resume(tmp_path / "sft1", torch_backend.Optimizer(whole.network, muon=False))


# ---- gradients -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_gradients_of_an_adapter(codec: Codec, tmp_path: Path, name: Any) -> None:
    """Each loss has the same gradient for A and B in both backends, and none for anything else."""
    loss, gradients = loss_and_gradients(adapted_lm(codec, tmp_path / "torch"), name, codec)
    twin = adapted_lm(codec, tmp_path / "mlx", "mlx")
    twin_loss, twin_gradients = loss_and_gradients(twin, name, codec)
    assert loss == pytest.approx(twin_loss, rel=2e-6, abs=1e-6)
    assert gradients
    assert all(".lora_" in key or key.endswith(".rows") for key in gradients)
    assert_close(gradients, twin_gradients)


@on_each_backend
@pytest.mark.parametrize("dropout", [None, 0.0, 0.5])
def test_checkpointing_changes_no_gradient(
    codec: Codec, tmp_path: Path, backend: str, dropout: float | None
) -> None:
    """Also with dropout: a block that is computed again drops the same. None: all weights."""
    results = []
    for checkpointing in (False, True):
        if dropout is None:
            tiny_lm(codec, noise=0.1).save(tmp_path / "x")
            lm = load(tmp_path / "x", backend)
            lm.network.recompute = checkpointing
        else:
            changes = {"lora_dropout": dropout, "checkpointing": checkpointing}
            lm = adapted_lm(codec, tmp_path / "x", backend, **changes)
            assert lm.network.recompute == checkpointing
        results.append(loss_and_gradients(lm, "nll", codec))
    (loss, gradients), (again, gradients_again) = results
    assert loss == pytest.approx(again, rel=1e-6)
    assert_close(gradients, gradients_again)


@on_each_backend
@pytest.mark.parametrize("recompute, runs", [(False, 1), (True, 2)])
def test_checkpointing_computes_blocks_again(
    codec: Codec,
    tmp_path: Path,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    recompute: bool,
    runs: int,
) -> None:
    """Each block runs twice in a step. Guards: a switch that switches nothing."""
    tiny_lm(codec).save(tmp_path / "x")
    lm = load(tmp_path / "x", backend)
    lm.network.recompute = recompute
    mlp_class = BACKENDS[backend].MLP
    method = "forward" if backend == "torch" else "__call__"
    original = getattr(mlp_class, method)
    calls = []

    def counted(self: Any, x: Any) -> Any:
        calls.append(1)
        return original(self, x)

    monkeypatch.setattr(mlp_class, method, counted)
    batches = batches_of("nll", sampled_chains(codec), 10**6)
    learn(lm, lm.backend.Optimizer(lm.network), batches, steps=1, lr=0)
    assert len(calls) == runs * len(batches) * lm.network.config.num_hidden_layers


@on_each_backend
def test_dropout(codec: Codec, ids: Any, tmp_path: Path, backend: str) -> None:
    """It is there only while training, and the same in the same step of the same seed.

    Guards: one mask for all seeds.
    """
    lm = adapted_lm(codec, tmp_path / "x", backend, lora_dropout=0.5)
    np.testing.assert_array_equal(logits_of(lm, ids), logits_of(lm, ids))
    without = adapted_lm(codec, tmp_path / "x", backend)
    np.testing.assert_allclose(logits_of(lm, ids), logits_of(without, ids), atol=1e-5)
    loss, _ = loss_and_gradients(lm, "nll", codec)
    assert loss == loss_and_gradients(lm, "nll", codec)[0]
    assert loss != loss_and_gradients(without, "nll", codec)[0]
    assert loss != loss_and_gradients(lm, "nll", codec, dropout_seed=1)[0]


# ---- bfloat16 ------------------------------------------------------------------------------------
def relative_distance(a: Any, b: Any) -> Any:
    return np.linalg.norm(a - b) / np.linalg.norm(a)


@on_each_backend
def test_bfloat16(codec: Codec, ids: Any, tmp_path: Path, backend: str) -> None:
    """Activations take two bytes: logits and gradients are near those of float32, not equal."""
    tiny_lm(codec, noise=0.1).save(tmp_path / "x")
    full = load(tmp_path / "x", backend)
    half = load(tmp_path / "x", backend, dtype="bfloat16")
    tensor = torch.tensor(ids) if backend == "torch" else mx.array(ids)
    assert "bfloat16" in str(half.network(tensor).dtype)
    assert 0 < relative_distance(logits_of(full, ids), logits_of(half, ids)) < 0.05
    loss, gradients = loss_and_gradients(full, "nll", codec)
    half_loss, half_gradients = loss_and_gradients(half, "nll", codec)
    assert loss == pytest.approx(half_loss, rel=0.01)
    assert loss != half_loss
    for name, gradient in gradients.items():
        distance = np.linalg.norm(gradient - half_gradients[name])
        assert distance < 0.2 * np.linalg.norm(gradient) + 1e-6, name


@on_each_backend
def test_weights_under_bfloat16(codec: Codec, tmp_path: Path, backend: str) -> None:
    """Weights, gradients and their sum stay float32 in training, and in the folder.

    Guards: a step far below a bfloat16 digit of the weights that is lost.
    """
    tiny_lm(codec, noise=0.1).save(tmp_path / "x")
    lm = load(tmp_path / "x", backend, dtype="bfloat16")
    before = weights_of(lm)
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    learn(lm, optimizer, language_batches(sampled_chains(codec), 200), steps=3, lr=1e-6)
    after = weights_of(lm)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert np.abs(after[name] - before[name]).mean() > 5e-7
    # A digit of a weight of 1 is 4e-3 in bfloat16. Steps of 1e-6 add up all the same.
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    for _ in range(30):
        weights = lm.backend.trained_parameters(lm.network)
        ones = {name: 0 * weight + 1 for name, weight in weights.items()}
        optimizer.step(ones, lr=1e-6, muon_lr=0)
    change = weights_of(lm)["model.norm.weight"] - after["model.norm.weight"]
    np.testing.assert_allclose(change, -30e-6, rtol=0.1)
    number_types = {
        str(weight.dtype).split(".")[-1]
        for weight in lm.backend.trained_parameters(lm.network).values()
    }
    assert number_types == {"float32"}
    lm.save(tmp_path / "y")
    written = load_file(tmp_path / "y" / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.float32}


@on_each_backend
def test_rollouts_in_bfloat16(codec: Codec, tmp_path: Path, backend: str) -> None:
    """Decoding is in bfloat16 too, cache and all; log-probs agree with those of the loss."""
    adapted_lm(codec, tmp_path / "x", backend).save(tmp_path / "y")
    lm = load(tmp_path / "y", backend, dtype="bfloat16")
    prompt = codec.prompt("Who?")
    decoder = lm.decoder([prompt])
    # The weights are cast once, not at each token.
    weights = lm.backend.named_parameters(decoder.network).values()
    assert all("bfloat16" in str(weight.dtype) for weight in weights)
    assert all("bfloat16" in str(cache.keys.dtype) for cache in decoder.caches)

    (trajectory,) = autocoa.rollout(
        lm.decoder,
        codec,
        [prompt],
        lambda actions, _: [Observation("Eva")] * len(actions),
        RolloutSettings(max_len=60),
        temperature=1.0,
        streams=[autocoa.random_stream(60, 0)],
    )
    assert sampler_gaps(lm, [trajectory]).max() < 0.15


@on_each_backend
def test_forks_in_bfloat16(codec: Codec, tmp_path: Path, backend: str) -> None:
    """Twelve rollouts that share slots and part: the trainer's log-probs are near the sampler's.

    Guards: a fork whose copy is of another type, or of another place.
    """
    tiny_lm(codec, noise=0.05).save(tmp_path / "x")
    lm = load(tmp_path / "x", backend, dtype="bfloat16")
    prompts = [codec.prompt(question) for question in ("Who?", "What is it?") for _ in range(6)]
    together = autocoa.rollout(
        lm.decoder,
        codec,
        prompts,
        lambda actions, _: [Observation("Eva")] * len(actions),
        RolloutSettings(max_len=60),
        temperature=0.7,
        streams=[autocoa.random_stream(60, number % 6 // 2) for number in range(12)],
    )
    assert 2 < len({tuple(trajectory.ids) for trajectory in together}) < 12
    gaps = sampler_gaps(lm, together, 0.7)
    assert len(gaps) > 100
    assert gaps.max() < 0.6
    assert gaps.mean() < 0.03


def sampler_gaps(lm: LM, trajectories: list[Trajectory], temperature: float = 1.0) -> Any:
    """Return how far the log-probs of the loss are from the decoder's: (tokens of the policy,)."""
    gaps = []
    for trajectory in trajectories:
        scores = lm.backend.score(lm.network, pack_texts([trajectory]), temperature)
        policy = np.array(trajectory.mask) > 0
        gaps.append(np.abs(np.array(trajectory.logprobs) - scores)[policy])
    return np.concatenate(gaps)


def test_bfloat16_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without a product for it would be slower; so would MLX on any CPU."""
    for feature, dtype in (
        ("avx2", "float32"),
        ("avx512f", "float32"),
        ("avx512_bf16", "bfloat16"),
        ("amx_bf16", "bfloat16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=feature: {name: True})
        assert model.fast_dtype(model_settings("torch")) == dtype
    assert model.fast_dtype(model_settings("mlx")) == "float32"


def test_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal has it, and CUDA where the GPU computes in it."""
    for is_supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, answer=is_supported: answer and not including_emulation,
        )
        assert BACKENDS["torch"].fast_dtype("cuda") == dtype
    assert BACKENDS["torch"].fast_dtype("mps") == "bfloat16"
    monkeypatch.setattr(mx, "is_available", lambda device: device == mx.gpu)
    assert BACKENDS["mlx"].fast_dtype("auto") == "bfloat16"
    assert BACKENDS["mlx"].fast_dtype("cpu") == "float32"


# ---- 4 bits --------------------------------------------------------------------------------------
def rounded_to_4_bits(weight: Any, backend: str) -> Any:
    """Return a matrix as bitsandbytes' NF4, or MLX's groups of 64, leave it."""
    if backend == "torch":
        functional = pytest.importorskip("bitsandbytes.functional")
        packed = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        return functional.dequantize_4bit(*packed)
    packed = mx.quantize(mx.array(weight.numpy()), 64, 4)
    return torch.tensor(np.array(mx.dequantize(*packed, 64, 4)))


@on_each_backend
def test_logits_in_4_bits(codec: Codec, ids: Any, tmp_path: Path, backend: str) -> None:
    """They are those of transformers with the blocks' matrices rounded."""
    whole = tiny_lm(codec, noise=0.1)
    whole.save(tmp_path / "x")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "proj.weight" in name:
                parameter.copy_(rounded_to_4_bits(parameter, backend))
    lm = load(tmp_path / "x", backend, bits=4)
    np.testing.assert_allclose(logits_of(lm, ids), reference_logits(reference, ids), atol=1e-4)
    assert np.abs(logits_of(lm, ids) - logits_of(whole, ids)).max() > 0.01


@on_each_backend
def test_an_adapter_on_4_bits(codec: Codec, ids: Any, tmp_path: Path, backend: str) -> None:
    """An adapter learns on them, and is saved, loaded, copied and merged."""
    tiny_lm(codec, noise=0.1).save(tmp_path / "x")
    lm = load(tmp_path / "x", backend, bits=4)
    with pytest.raises(UserError, match="can't be trained; train an adapter on them with --lora"):
        lm.begin_stage(model_settings(backend), seed=0)
    lm.begin_stage(model_settings(backend, lora_rank=4), seed=0)
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    losses = learn(lm, optimizer, language_batches(sampled_chains(codec), 500), steps=12)
    assert losses[-1] < 0.7 * losses[0]
    learned = logits_of(lm, ids)
    lm.save(tmp_path / "sft")
    loaded = load(tmp_path / "sft", backend, bits=4)
    np.testing.assert_allclose(logits_of(loaded, ids), learned, atol=1e-4)
    np.testing.assert_allclose(logits_of(loaded.copy(), ids), learned, atol=1e-4)
    lm.backend.merge_adapter(lm.network)
    np.testing.assert_allclose(logits_of(lm, ids), learned, atol=1e-3)


def test_an_adapter_goes_onto_another_precision(
    codec: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading says so where the base is kept in other bits than the adapter was trained on."""
    adapted_lm(codec, tmp_path / "base").save(tmp_path / "sft1")
    load(tmp_path / "sft1")
    assert capsys.readouterr().out == ""
    load(tmp_path / "sft1", bits=4)
    message = "sft1 was trained on a base of 16 bits or more, and goes onto one of bitsandbytes'"
    assert message in capsys.readouterr().out


def test_4_bits_without_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before a base stage is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train_sft, "make_base_model", lambda *_: pytest.fail("the base stage was begun")
    )
    settings = train_sft.SFTSettings(bits=4, vocab_size=600, width=32, layers=1)
    with pytest.raises(UserError, match=r"--bits=4: weights of 4 bits can't be trained.*=16"):
        train_sft.run(settings)
    assert not list(tmp_path.iterdir())


def test_4_bits_that_can_not_be(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that MLX can't cut into groups, and bitsandbytes that is not installed."""
    tiny_lm(codec, width=96).save(tmp_path / "x")
    message = "--bits=4: rows of model.layers.* have \\d+ weights, MLX wants a multiple of 64"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x", "mlx", bits=4)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match="needs bitsandbytes; pip install bitsandbytes"):
        load(tmp_path / "x", bits=4)


@on_each_backend
@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization": {"bits": 4, "group_size": 64}},
    ],
)
def test_a_checkpoint_that_is_quantised_already(
    codec: Codec, tmp_path: Path, backend: str, change: dict[str, Any]
) -> None:
    """It is refused in one line."""
    tiny_lm(codec).save(tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"quantised \((awq|4 bits)\).*--bits=4"):
        model.load_pretrained(str(tmp_path / "x"), model_settings(backend))


# ---- copies and going on -------------------------------------------------------------------------
@on_each_backend
def test_a_copy_stands_still(codec: Codec, ids: Any, tmp_path: Path, backend: str) -> None:
    """The reference of the KL: the policy learns, the copy does not."""
    lm = adapted_lm(codec, tmp_path / "x", backend)
    reference = lm.copy()
    before = logits_of(lm, ids)
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    learn(lm, optimizer, language_batches(sampled_chains(codec), 500), steps=1)
    np.testing.assert_array_equal(logits_of(reference, ids), before)
    assert np.abs(logits_of(lm, ids) - before).max() > 0.01


@pytest.mark.parametrize(
    "first, second", [("torch", "torch"), ("mlx", "mlx"), ("torch", "mlx"), ("mlx", "torch")]
)
def test_an_adapter_goes_on(codec: Codec, tmp_path: Path, first: str, second: str) -> None:
    """Six steps are three, a checkpoint, and three more from it, in either backend.

    Guards: an optimizer that goes on with the matrices that the checkpoint replaced.
    """
    batches = language_batches(sampled_chains(codec), 500)
    whole = adapted_lm(codec, tmp_path / "x", first)
    learn(whole, whole.backend.Optimizer(whole.network, muon=False), batches, steps=6)

    half = adapted_lm(codec, tmp_path / "x", first)
    optimizer = half.backend.Optimizer(half.network, muon=False)
    learn(half, optimizer, batches, steps=3)
    half.save(tmp_path / "half", optimizer)

    resumed = load(tmp_path / "x", second)
    resumed.begin_stage(model_settings(second, **LORA), seed=0)
    # It is made before the checkpoint is read, as the stages do.
    optimizer = resumed.backend.Optimizer(resumed.network, muon=False)
    assert resumed.resume(tmp_path / "half", optimizer) == 3
    learn(resumed, optimizer, batches, steps=3)
    tolerance = 1e-5 if first == second else 1e-4
    expected = trained_of(whole)
    for name, weight in trained_of(resumed).items():
        np.testing.assert_allclose(weight, expected[name], atol=tolerance, err_msg=name)


@on_each_backend
@pytest.mark.parametrize("folder", ["base", "sft1"])
def test_a_frozen_base_is_the_same_network(
    codec: Codec, ids: Any, tmp_path: Path, backend: str, folder: str
) -> None:
    """Weights that only carry an adapter are read in their own type; the logits are the same."""
    adapted_lm(codec, tmp_path / "base", backend).save(tmp_path / "sft1")
    whole = load(tmp_path / folder, backend, dtype="bfloat16")
    frozen = load(tmp_path / folder, backend, dtype="bfloat16", **LORA)
    for lm in (whole, frozen):
        lm.begin_stage(model_settings(backend, **LORA), seed=0)
    np.testing.assert_array_equal(logits_of(whole, ids), logits_of(frozen, ids))


@on_each_backend
def test_a_frozen_base_never_takes_four_bytes(codec: Codec, backend: str) -> None:
    """Guards: 7 GB for 1.5 billion parameters on the way to 4 bits."""
    config = tiny_lm(codec).network.config
    network = BACKENDS[backend].build(config, "cpu", "bfloat16", frozen=True)
    weights = BACKENDS[backend].named_parameters(network).values()
    assert {str(weight.dtype).split(".")[-1] for weight in weights} == {"bfloat16"}


# ---- the scripts ---------------------------------------------------------------------------------
TINY = (
    "--run=t --width=64 --layers=2 --base_tokens=60000 --coa=60 --cot=10 --pairs=8 --epochs=1"
    " --max_len=200 --rl1_steps=1 --rl2_steps=1 --questions=3 --rollouts=2 --rl_questions=6"
    " --eval_questions=1 --world_model_width=64 --world_model_layers=2 --sweep_share=0.02"
    " --world_model_epochs=1"
).split()
STAGES = ["sft1", "sft2", "sft3", "rl1", "rl2"]


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a run folder with a base model and its SFT data, made once."""
    folder = tmp_path_factory.mktemp("base")
    done = run_here(folder, "train_sft.py", *TINY, "--backend=torch", "--stage=base")
    assert done.status == 0, done.err
    return folder / "out"


@pytest.fixture
def begun_stages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the names of the stages that are begun from here on, each once."""
    stages = []
    original = model.LM.begin_stage

    @functools.wraps(original)
    def watched(lm: LM, settings: Any, seed: int, stage: str = "") -> Any:
        if stage and stage not in stages:
            stages.append(stage)
        return original(lm, settings, seed, stage)

    monkeypatch.setattr(model.LM, "begin_stage", watched)
    return stages


def run_rl(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any) -> None:
    """Train RL in this process, through the module, so that a test can watch it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *arguments])
    train_rl.run(read_settings(train_rl.RLSettings, "x"))


@pytest.mark.parametrize(
    "backend, merge, more",
    [
        ("torch", False, "--dtype=bfloat16 --checkpointing --rl1_environment=internal"),
        ("torch", True, ""),
        pytest.param(
            "mlx", False, "--bits=4 --dtype=bfloat16 --checkpointing", marks=pytest.mark.slow
        ),
        pytest.param("mlx", True, "", marks=pytest.mark.slow),
    ],
)
def test_the_scripts_with_an_adapter(
    base_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begun_stages: Any,
    backend: str,
    merge: bool,
    more: str,
) -> None:
    """SFT-1 to SFT-3 and both stages of RL train an adapter; eval and --ask read it.

    RL-2 once more, with --resume, is the same, on the reference's base.
    """
    arguments = [*TINY, "--lora_rank=2", f"--backend={backend}", f"--lora_merge={merge}"]
    arguments += more.split()
    shutil.copytree(base_run, tmp_path / "out")
    root = tmp_path / "out" / "t"
    weights_name = "model.safetensors" if merge else "adapter_model.safetensors"

    def run(script: str, *others: Any) -> Any:
        done = run_here(tmp_path, script, *arguments, *others)
        assert done.status == 0, done.err
        return done.out

    run("train_sft.py", "--resume")  # after the base model
    run("train_rl.py")
    assert begun_stages == STAGES
    assert all((root / stage / weights_name).is_file() for stage in STAGES)
    # A new network has nothing that an adapter could go onto.
    has_world_model = (root / "world_model" / "model.safetensors").is_file()
    assert has_world_model == ("internal" not in more)
    if not merge:
        for stage in ("sft2", "rl2"):
            content = json.loads((root / stage / "adapter_config.json").read_text())
            assert content["base_model_name_or_path"] == "out/t/base"
    bits = 4 if "--bits=4" in more else 16
    monkeypatch.chdir(tmp_path)
    before = weights_of(load(root / "sft1", backend, bits=bits))
    after = weights_of(load(root / "sft2", backend, bits=bits))
    assert any(not np.array_equal(weight, after[name]) for name, weight in before.items())

    run("eval.py")
    assert len(read_rows(root / "predictions.jsonl")) == 6 * 10
    assert "rl2" in run("autocoa.py", "--ask=Who?")

    expected = load_file(root / "rl2" / weights_name)
    shutil.rmtree(root / "rl2")
    shared_bases = []
    original = train_rl.train_grpo

    def watched(policy: Any, reference: Any, *others: Any) -> Any:
        matrices = [lm.network.model.layers[0].mlp.up_proj.weight for lm in (policy, reference)]
        shared_bases.append(matrices[0] is matrices[1])
        return original(policy, reference, *others)

    monkeypatch.setattr(train_rl, "train_grpo", watched)
    run_rl(tmp_path, monkeypatch, [*arguments, "--resume"])
    resumed = load_file(root / "rl2" / weights_name)
    assert all(torch.equal(weight, resumed[name]) for name, weight in expected.items())
    assert shared_bases == [not merge]
