"""Adapters, 4 bits, bfloat16 and gradient checkpointing, in both twins: against peft, mlx_lm, bitsandbytes, and against doing without."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import rows, run_script, tiny, twin
from safetensors.torch import load_file
from test_losses import SCRIPT_LOSSES, batches_of, chains
from test_model import IDS, ours, theirs
from transformers import AutoModelForCausalLM

import autocoa
import eval as benchmark
import model
import model_torch
import train_rl
import train_sft
from common import Problem, Settings, read_settings

mx = pytest.importorskip("mlx.core")
import model_mlx    # noqa: E402

BOTH = {"torch": model_torch, "mlx": model_mlx}


def logits(lm, ids):
    if lm.backend is model_torch:
        return ours(lm.model, ids)
    return np.array(lm.model.logits(lm.model(mx.array(ids))))


def weights(lm):
    own = dict(lm.model.named_parameters()) if lm.backend is model_torch else model_mlx.parameters(lm.model)
    return {n: lm.backend.to_numpy(p).copy() for n, p in own.items()}


def adapted(codec, folder, backend="torch", noise=0.1, tie=True, **settings):
    """A network saved in `folder`, loaded by a backend, with an adapter that is not zero."""
    tiny(codec, spread=0.1, tie=tie).save(folder)
    lm = model.load(folder, "cpu", backend)
    lm.adapt(Settings(**{"lora_rank": 8, "lora_alpha": 16.0, **settings}))
    rng, state = np.random.default_rng(3), lm.backend.arrays(lm.model, sorted(lm.backend.trained(lm.model)))
    lm.backend.adapt(lm.model, lm.model.lora, {n: x + noise * rng.standard_normal(x.shape).astype(np.float32) for n, x in state.items()})
    return lm


@pytest.fixture
def ids(codec):
    return IDS % len(codec.tok)


def test_a_new_adapter_changes_nothing(codec, ids):
    """B starts at zero; A as in the paper's code, the same in both twins; what is trained is the adapter alone, and the embeddings of the tags."""
    for a in (tiny(codec, spread=0.1), twin(tiny(codec, spread=0.1))):
        before = logits(a, ids)
        a.adapt(Settings(lora_rank=4, lora_targets=["q_proj", "down_proj"]))
        np.testing.assert_allclose(logits(a, ids), before, atol=1e-5)
        trained = set(a.backend.trained(a.model))
        assert {n.split(".", 3)[3] for n in trained if ".layers." in n} == {f"{m}.{x}" for m in ("self_attn.q_proj", "mlp.down_proj") for x in ("lora_A", "lora_B")}
        assert {n for n in trained if ".layers." not in n} == {"model.embed_tokens.rows"}
    assert 0 < np.abs(weights(a)["model.layers.1.mlp.down_proj.lora_A"]).max() <= 192 ** -0.5


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("targets, tie, rank", [(["q_proj", "v_proj"], True, 8), (Settings().lora_targets, False, 4)])
def test_a_folder_in_peft_and_mlx_lm(codec, ids, tmp_path, backend, targets, tie, rank):
    """Of a rank above and below the number of tags. Matrices and the tags' embeddings, with a head of their own or not. Kept apart: peft on the transformers model, mlx_lm and the other twin have the same logits. Merged: transformers alone has."""
    peft, mlx_lm = pytest.importorskip("peft"), pytest.importorskip("mlx_lm")
    lm = adapted(codec, tmp_path / "base", backend, tie=tie, lora_targets=targets, lora_rank=rank)
    expected = logits(lm, ids)
    assert np.abs(expected - logits(model.load(tmp_path / "base", "cpu", backend), ids)).max() > 0.05
    lm.save(tmp_path / "sft")
    assert sorted(p.name for p in (tmp_path / "sft").glob("*.safetensors")) == ["adapter_model.safetensors"]
    with_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "sft").eval()
    np.testing.assert_allclose(theirs(with_peft, ids), expected, atol=1e-4)
    network, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "sft" / "mlx_lm"))
    network.eval()
    np.testing.assert_allclose(np.array(network(mx.array(ids))), expected, atol=1e-4)
    other = model.load(tmp_path / "sft", "cpu", *(b for b in BOTH if b != backend))
    np.testing.assert_allclose(logits(other, ids), expected, atol=1e-4)
    assert other.model.lora == lm.model.lora or sorted(targets) == other.model.lora.targets
    lm.backend.merge(lm.model)
    lm.save(tmp_path / "merged")
    np.testing.assert_allclose(theirs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), expected, atol=1e-4)
    assert len(lm.backend.trained(lm.model)) == len(weights(lm))


@pytest.mark.parametrize("backend", BOTH)
def test_each_stage_has_directions_of_its_own(codec, tmp_path, backend):
    """With --lora_merge an adapter of the next stage begins with another A, and that of the same stage with the same. Guards: all stages in one subspace of `rank` dimensions."""
    lm, s, seen = adapted(codec, tmp_path / "base", backend), Settings(lora_rank=8, lora_alpha=16.0), []
    for stage in ("sft1", "sft2", "sft1"):
        lm.backend.merge(lm.model)
        lm.adapt(s, stage)
        seen.append(weights(lm)["model.layers.1.mlp.up_proj.lora_A"])
    assert np.array_equal(seen[0], seen[2]) and np.abs(seen[0] - seen[1]).max() > 0.01


def test_a_run_that_was_moved(codec, ids, tmp_path):
    """An adapter finds its base beside itself; where it is nowhere, that is said."""
    lm = adapted(codec, tmp_path / "run" / "base")
    lm.save(tmp_path / "run" / "sft1")
    (tmp_path / "run").rename(tmp_path / "moved")
    np.testing.assert_allclose(logits(model.load(tmp_path / "moved" / "sft1", "cpu", "torch"), ids), logits(lm, ids), atol=1e-5)
    (tmp_path / "moved" / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(Problem, match="sft1 is an adapter for .*base, which is missing"):
        model.load(tmp_path / "moved" / "sft1", "cpu", "torch")


@pytest.mark.parametrize("backend", BOTH)
def test_an_adapter_for_another_base(codec, tmp_path, backend):
    """Other weights of the same shape, another width, a file that is none: one line, in both twins."""
    lm = adapted(codec, tmp_path / "base", backend)
    lm.save(tmp_path / "sft1")
    for other, message in ((tiny(codec, seed=1, spread=0.1), "its weights are others"), (tiny(codec, width=96), "rows does not fit")):
        other.save(tmp_path / "base")
        with pytest.raises(Problem, match=f"adapter for another base than .*base: .*{message}"):
            model.load(tmp_path / "sft1", "cpu", backend)
    (tmp_path / "sft1" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base"), "r": 4}))
    with pytest.raises(Problem, match="sft1 is not a LoRA adapter"):
        model.load(tmp_path / "sft1", "cpu", backend)


def test_an_adapter_of_another_kind(codec, tmp_path):
    """What PEFT can do and this can't is refused by name; a checkpoint or a start with another rank, or without an adapter, is not taken for this run's. Guards:
    rank-stabilised adapters read at the wrong scale; a resumed run that went on with another rank than was asked for."""
    lm = adapted(codec, tmp_path / "base", "torch")
    lm.save(tmp_path / "sft1", model_torch.Optimizer(lm.model, muon=False))
    path = tmp_path / "sft1" / "adapter_config.json"
    own = path.read_text()
    for change, named in ((dict(use_rslora=True), "use_rslora"), (dict(use_dora=True), "use_dora"), (dict(rank_pattern={"q_proj": 2}), "rank_pattern"), (dict(bias="all"), "bias")):
        path.write_text(json.dumps({**json.loads(own), **change}))
        with pytest.raises(Problem, match=f"sft1 is an adapter with {named}, which is not read"):
            model.load(tmp_path / "sft1", "cpu", "torch")
    path.write_text(own)
    rank = lm.model.lora.rank
    with pytest.raises(Problem, match=f"--lora_rank={rank + 1}: what this run starts from has an adapter with rank {rank}"):
        model.load(tmp_path / "sft1", "cpu", "torch").adapt(Settings(lora_rank=rank + 1))
    whole = model.load(tmp_path / "base", "cpu", "torch")
    with pytest.raises(Problem, match="holds an adapter, and this run trains all weights; repeat the settings"):
        whole.resume(tmp_path / "sft1", model_torch.Optimizer(whole.model, muon=False))
    whole.adapt(Settings(lora_rank=rank + 1))
    with pytest.raises(Problem, match="another kind of adapter than this run's; repeat the settings"):
        whole.resume(tmp_path / "sft1", model_torch.Optimizer(whole.model, muon=False))


def gradients(lm, name, codec, dropout_seed=0):
    class Keep:
        step_count, seed = 3, dropout_seed

        def step(self, grads, lr, muon_lr):
            self.grads = {n: lm.backend.to_numpy(g) for n, g in grads.items()}
    keep = Keep()
    figures = lm.backend.train_step(lm.model, keep, SCRIPT_LOSSES[name], batches_of(name, chains(codec), 200), 0, 0, max_norm=1e9)
    return figures["loss"], keep.grads


def near(a, b, tolerance=1e-4):
    assert set(a) == set(b)
    for n in a:
        assert np.abs(a[n] - b[n]).max() <= tolerance * np.abs(a[n]).max() + 1e-8, n


@pytest.mark.parametrize("name", SCRIPT_LOSSES)
def test_gradients_of_an_adapter(codec, tmp_path, name):
    """Each loss: the same gradient for A and B in both twins, none for anything else."""
    (loss, a), (other, b) = (gradients(adapted(codec, tmp_path / x, x), name, codec) for x in BOTH)
    assert loss == pytest.approx(other, rel=2e-6, abs=1e-6)
    assert a and all(".lora_" in n or n.endswith(".rows") for n in a)
    near(a, b)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(codec, tmp_path, backend, dropout):
    """Also with dropout: a block that is computed again drops the same. All weights or an adapter."""
    for settings in (dict(lora_dropout=dropout), dict(lora_rank=0)):
        found = []
        for checkpointing in (False, True):
            lm = adapted(codec, tmp_path / "x", backend, **settings, checkpointing=checkpointing) if settings.get("lora_rank", 1) else model.load(tmp_path / "x", "cpu", backend)
            lm.model.recompute = checkpointing
            found.append(gradients(lm, "nll", codec))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        near(found[0][1], found[1][1])


@pytest.mark.parametrize("backend", BOTH)
def test_checkpointing_computes_blocks_again(codec, tmp_path, backend, monkeypatch):
    """Each block runs twice in a step: guards a switch that switches nothing."""
    tiny(codec).save(tmp_path / "x")
    lm, calls = model.load(tmp_path / "x", "cpu", backend), []
    kind = BOTH[backend].MLP
    method = "forward" if backend == "torch" else "__call__"
    whole = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, x: calls.append(1) or whole(self, x))
    for recompute, expected in ((False, 1), (True, 2)):
        lm.model.recompute, calls[:] = recompute, []
        batches = batches_of("nll", chains(codec), 10 ** 6)
        lm.backend.train_step(lm.model, lm.backend.Optimizer(lm.model), SCRIPT_LOSSES["nll"], batches, 0, 0)
        assert len(calls) == expected * len(batches) * lm.model.config.num_hidden_layers


@pytest.mark.parametrize("backend", BOTH)
def test_dropout(codec, ids, tmp_path, backend):
    """Only while training; the same in the same step of the same --seed, another under another (guards: one mask for all seeds)."""
    lm = adapted(codec, tmp_path / "x", backend, lora_dropout=0.5)
    np.testing.assert_array_equal(logits(lm, ids), logits(lm, ids))
    still = adapted(codec, tmp_path / "x", backend)
    np.testing.assert_allclose(logits(lm, ids), logits(still, ids), atol=1e-5)
    a, b = gradients(lm, "nll", codec), gradients(lm, "nll", codec)
    assert a[0] == b[0] != gradients(still, "nll", codec)[0]
    assert a[0] != gradients(lm, "nll", codec, 1)[0]


@pytest.mark.parametrize("backend", BOTH)
def test_bfloat16(codec, ids, tmp_path, backend):
    """Activations in two bytes: logits and gradients near those of float32 and not equal; weights, gradients and their sum stay float32, so
    that a step far below a bfloat16 digit of the weights is not lost."""
    tiny(codec, spread=0.1).save(tmp_path / "x")
    full, half = (model.load(tmp_path / "x", "cpu", backend, dtype) for dtype in ("float32", "bfloat16"))
    assert "bfloat16" in str(half.model(torch.tensor(ids) if backend == "torch" else mx.array(ids)).dtype)
    assert 0 < np.linalg.norm(logits(full, ids) - logits(half, ids)) < 0.05 * np.linalg.norm(logits(full, ids))
    (loss, a), (other, b) = gradients(full, "nll", codec), gradients(half, "nll", codec)
    assert loss == pytest.approx(other, rel=0.01) and loss != other
    for n in a:
        assert np.linalg.norm(a[n] - b[n]) < 0.2 * np.linalg.norm(a[n]) + 1e-6, n
    before = weights(half)
    optimizer, batches = half.backend.Optimizer(half.model, muon=False), train_sft.language_batches(chains(codec), 200)
    for _ in range(3):
        half.backend.train_step(half.model, optimizer, autocoa.nll_loss, batches, 1e-6, 0)
    after = weights(half)
    assert all(before[n].dtype == np.float32 and np.abs(after[n] - before[n]).mean() > 5e-7 for n in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"))
    half.save(tmp_path / "y")
    assert {p.dtype for p in load_file(tmp_path / "y" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("backend", BOTH)
def test_rollouts_in_bfloat16(codec, tmp_path, backend):
    """Decoding is in bfloat16 too, cache and all, and log-probs agree with those that the loss computes."""
    lm = adapted(codec, tmp_path / "x", backend)
    lm.save(tmp_path / "y")
    lm = model.load(tmp_path / "y", "cpu", backend, "bfloat16")
    dec = lm.decoder([codec.prompt("Who?")])
    own = dec.model.parameters() if backend == "torch" else model_mlx.parameters(dec.model).values()
    assert "bfloat16" in str(dec.k[0].dtype) and all("bfloat16" in str(p.dtype) for p in own)       # cast once, not at each token
    t, = autocoa.rollout(lm.decoder, codec, [codec.prompt("Who?")], lambda q: ["Eva"] * len(q), max_len=60, temperature=1.0, rng=np.random.default_rng(0))
    batch = {"ids": np.array([t.ids]), "mask": np.array([t.mask], np.float32)}
    policy = np.array(t.mask) > 0
    np.testing.assert_allclose(np.array(t.logprobs)[policy], lm.backend.score(lm.model, batch)[0][policy], atol=0.15)


@pytest.mark.parametrize("backend", BOTH)
def test_4_bits(codec, ids, tmp_path, backend):
    """Logits are those of transformers with the matrices of the blocks rounded by bitsandbytes, or in MLX by groups of 64; an adapter learns on
    them, is saved, loaded, copied and merged."""
    def rounded(p):
        if backend == "torch":
            bnb = pytest.importorskip("bitsandbytes.functional")
            return bnb.dequantize_4bit(*bnb.quantize_4bit(p, quant_type="nf4", blocksize=64))
        return torch.tensor(np.array(mx.dequantize(*mx.quantize(mx.array(p.numpy()), 64, 4), 64, 4)))
    reference = tiny(codec, spread=0.1)
    reference.save(tmp_path / "x")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        for n, p in network.named_parameters():
            if "proj.weight" in n:
                p.copy_(rounded(p))
    lm = model.load(tmp_path / "x", "cpu", backend, bits=4)
    np.testing.assert_allclose(logits(lm, ids), theirs(network, ids), atol=1e-4)
    assert np.abs(logits(lm, ids) - logits(reference, ids)).max() > 0.01
    with pytest.raises(Problem, match="can't be trained; train an adapter on them with --lora_rank=16"):
        lm.adapt(Settings())
    lm.adapt(Settings(lora_rank=4))
    optimizer, losses = lm.backend.Optimizer(lm.model, muon=False), []
    for _ in range(12):
        losses.append(lm.backend.train_step(lm.model, optimizer, autocoa.nll_loss, train_sft.language_batches(chains(codec), 500), 1e-2, 0)["loss"])
    assert losses[-1] < 0.7 * losses[0]
    lm.save(tmp_path / "sft")
    again = model.load(tmp_path / "sft", "cpu", backend, bits=4)
    np.testing.assert_allclose(logits(again, ids), logits(lm, ids), atol=1e-4)
    other = again.copy()
    np.testing.assert_allclose(logits(other, ids), logits(lm, ids), atol=1e-4)
    learned = logits(lm, ids)
    lm.backend.merge(lm.model)
    np.testing.assert_allclose(logits(lm, ids), learned, atol=1e-3)


def test_4_bits_that_can_not_be(codec, tmp_path, monkeypatch):
    """No adapter to train, said before a base stage is made; rows that MLX can't cut into groups; bitsandbytes that is not installed; a checkpoint that is quantised already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_sft, "make_base", lambda *a: pytest.fail("the base stage was begun"))
    with pytest.raises(Problem, match="--bits=4: weights of 4 bits can't be trained.*--lora_rank=16"):
        train_sft.run(Settings(bits=4, vocab_size=600, width=32, layers=1))
    assert not list(tmp_path.iterdir())
    tiny(codec, width=96).save(tmp_path / "x")
    with pytest.raises(Problem, match="--bits=4: rows of model.layers.* have \\d+ weights, MLX wants a multiple of 64"):
        model.load(tmp_path / "x", "cpu", "mlx", bits=4)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(Problem, match="needs bitsandbytes; pip install bitsandbytes"):
        model.load(tmp_path / "x", "cpu", "torch", bits=4)
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    for packed in ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {"quantization": {"bits": 4, "group_size": 64}}):
        (tmp_path / "x" / "config.json").write_text(json.dumps({**raw, **packed}))
        for b in BOTH:
            with pytest.raises(Problem, match="quantised \\((awq|4 bits)\\).*--bits=4"):
                model.load_pretrained(str(tmp_path / "x"), "cpu", b)


@pytest.mark.parametrize("backend", BOTH)
def test_a_copy_stands_still(codec, ids, tmp_path, backend):
    """The reference of the KL: the policy learns, the copy does not."""
    lm = adapted(codec, tmp_path / "x", backend)
    reference, before = lm.copy(), logits(lm, ids)
    lm.backend.train_step(lm.model, lm.backend.Optimizer(lm.model, muon=False), autocoa.nll_loss, train_sft.language_batches(chains(codec), 500), 1e-2, 0)
    np.testing.assert_array_equal(logits(reference, ids), before)
    assert np.abs(logits(lm, ids) - before).max() > 0.01


@pytest.mark.parametrize("first, second", [("torch", "torch"), ("mlx", "mlx"), ("torch", "mlx"), ("mlx", "torch")])
def test_an_adapter_goes_on(codec, tmp_path, first, second):
    """Six steps are three, a checkpoint, and three more from it, in the same backend or the other. Guards: an optimizer that goes on with the matrices that the checkpoint replaced."""
    batches = train_sft.language_batches(chains(codec), 500)

    def learn(lm, optimizer):
        for _ in range(3):
            lm.backend.train_step(lm.model, optimizer, autocoa.nll_loss, batches, 1e-2, 0)
    whole, half = (adapted(codec, tmp_path / "x", first) for _ in range(2))
    optimizer = whole.backend.Optimizer(whole.model, muon=False)
    learn(whole, optimizer), learn(whole, optimizer)
    optimizer = half.backend.Optimizer(half.model, muon=False)
    learn(half, optimizer)
    half.save(tmp_path / "half", optimizer)
    again = model.load(tmp_path / "x", "cpu", second)
    again.adapt(Settings(lora_rank=8, lora_alpha=16.0))
    optimizer = again.backend.Optimizer(again.model, muon=False)        # made before the checkpoint is read, as the stages do
    assert again.resume(tmp_path / "half", optimizer) == 3
    learn(again, optimizer)
    names = list(whole.backend.trained(whole.model))
    ours, theirs = (lm.backend.arrays(lm.model, names) for lm in (again, whole))
    for n in names:
        np.testing.assert_allclose(ours[n], theirs[n], atol=1e-5 if first == second else 1e-4, err_msg=n)


TINY = ("--run=t --width=64 --layers=2 --base_tokens=60000 --coa=60 --cot=10 --pairs=8 --epochs=1 --max_len=200 --rl1_steps=1 --rl2_steps=1 --questions=3 "
        "--rollouts=2 --rl_questions=6 --eval_questions=1").split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model and its SFT data, made once."""
    cwd = tmp_path_factory.mktemp("base")
    done = run_script(cwd, "train_sft.py", *TINY, "--backend=torch", "--stage=base")
    assert done.status == 0, done.err
    return cwd / "out"


@pytest.mark.parametrize("backend, merge, more", [("torch", False, "--dtype=bfloat16 --checkpointing"), ("torch", True, ""),
                                                  pytest.param("mlx", False, "--bits=4 --dtype=bfloat16 --checkpointing", marks=pytest.mark.slow),
                                                  pytest.param("mlx", True, "", marks=pytest.mark.slow)])
def test_the_scripts_with_an_adapter(base, tmp_path, monkeypatch, capsys, backend, merge, more):
    """SFT-1 to SFT-3 and both stages of RL on an adapter; the base does not move; eval and --ask read it. RL-2 again, after --resume, is the same, on the reference's base."""
    args = [*TINY, "--lora_rank=2", f"--backend={backend}", f"--lora_merge={merge}", *more.split()]
    shutil.copytree(base, tmp_path / "out")
    monkeypatch.chdir(tmp_path)

    def run(script, *others):
        monkeypatch.setattr(sys, "argv", ["x", *args, *others])
        script(read_settings("x"))
    stages, adapt = [], model.LM.adapt
    monkeypatch.setattr(model.LM, "adapt", lambda lm, s, stage="": stages.append(stage) or adapt(lm, s, stage))
    run(train_sft.run, "--resume")          # behind the base model
    run(train_rl.run)
    assert [stage for stage in dict.fromkeys(stages) if stage] == ["sft1", "sft2", "sft3", "rl1", "rl2"]
    run(benchmark.run)
    root = tmp_path / "out" / "t"
    assert all((root / stage / ("model" if merge else "adapter_model")).with_suffix(".safetensors").is_file() for stage in ("sft1", "sft2", "sft3", "rl1", "rl2"))
    if not merge:
        assert {json.loads((root / stage / "adapter_config.json").read_text())["base_model_name_or_path"] for stage in ("sft2", "rl2")} == {"out/t/base"}
    a, b = (model.load(root / stage, "cpu", backend, bits=4 if "bits" in more else 16) for stage in ("sft1", "sft2"))
    assert any(not np.array_equal(x, weights(b)[n]) for n, x in weights(a).items())
    assert len(rows(root / "predictions.jsonl")) == 6 * 10
    capsys.readouterr()
    run(autocoa.ask, "--ask=Who?")
    assert "rl2" in capsys.readouterr().out
    before, grpo, shared = load_file(root / "rl2" / f"{'' if merge else 'adapter_'}model.safetensors"), train_rl.grpo, []
    shutil.rmtree(root / "rl2")

    def watch(lm, reference, *others):
        shared.append(lm.model.model.layers[0].mlp.up_proj.weight is reference.model.model.layers[0].mlp.up_proj.weight)
        return grpo(lm, reference, *others)
    monkeypatch.setattr(train_rl, "grpo", watch)
    run(train_rl.run, "--resume")
    after = load_file(root / "rl2" / f"{'' if merge else 'adapter_'}model.safetensors")
    assert all(torch.equal(x, after[n]) for n, x in before.items()) and shared == [not merge]


@pytest.mark.parametrize("backend", BOTH)
def test_a_frozen_base_is_read_in_its_own_type(codec, ids, tmp_path, backend):
    """Weights that only carry an adapter never take four bytes, and the network is the same. Guards: 7 GB for 1.5 billion parameters on the way to 4 bits."""
    lm = adapted(codec, tmp_path / "base", backend)
    lm.save(tmp_path / "sft1")
    for folder in ("base", "sft1"):
        a, b = (model.load(tmp_path / folder, "cpu", backend, "bfloat16", frozen=frozen) for frozen in (False, True))
        b.adapt(Settings(lora_rank=8, lora_alpha=16.0))
        a.adapt(Settings(lora_rank=8, lora_alpha=16.0))
        np.testing.assert_array_equal(logits(a, ids), logits(b, ids))
    made = lm.backend.build(lm.model.config, "cpu", "bfloat16", frozen=True)
    own = dict(made.named_parameters()) if backend == "torch" else model_mlx.parameters(made)
    assert {str(p.dtype).split(".")[-1] for p in own.values()} == {"bfloat16"}
