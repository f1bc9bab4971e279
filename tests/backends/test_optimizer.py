"""The optimizer against torch's own AdamW and Muon, its state, and a step that fails."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, mlx_twin, tiny_lm

import autocoa
import backends.torch as torch_backend
import model
from common.errors import UserError
from common.settings import ModelSettings
from data.batches import language_batches
from data.trajectory import Codec
from model import LM
from train_sft import SFTSettings, running_stage, train_steps


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_orthogonalize(shape: Any, backend: str) -> None:
    """Against the SVD: singular vectors stay, singular values come near 1.

    Muon's five steps leave them in about 0.7 to 1.2. A matrix of zeros stays one. Guards: 0 / 0,
    and weights that are nan.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 50.0])
    matrices = torch.randn((3, *shape), generator=generator) * sizes[:, None, None]
    stack = torch.cat((matrices, torch.zeros(1, *shape)))
    if backend == "mlx":
        mx = pytest.importorskip("mlx.core")
        mlx_backend = model.choose_backend("mlx")
        orthogonal = torch.tensor(np.array(mlx_backend.orthogonalize(mx.array(stack.numpy()))))
    else:
        orthogonal = torch_backend.orthogonalize(stack)
    assert not orthogonal[3].any()
    for matrix, result in zip(matrices, orthogonal[:3], strict=True):
        u, singular_values, vh = torch.linalg.svd(matrix, full_matrices=False)
        in_singular_basis = u.T @ result @ vh.T
        diagonal = in_singular_basis.diagonal()
        is_large = singular_values > 0.05 * singular_values[0]
        assert (diagonal[is_large] > 0.5).all()
        assert (diagonal[is_large] < 1.3).all()
        assert (in_singular_basis - diagonal.diag()).abs().max() < 0.02


def random_gradients(lm: LM, steps: int = 4) -> Iterator[Any]:
    """Yield steps in which every parameter has a random gradient: {name: gradient}."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        gradients = {}
        for name, parameter in lm.network.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradients[name] = parameter.grad
        yield gradients


def weights_after_steps(lm: LM, optimizer: Any, lr: Any, muon_lr: Any) -> Any:
    """Return the weights after steps of an optimizer of this project."""
    for gradients in random_gradients(lm):
        optimizer.step(gradients, lr, muon_lr)
    return weights_of(lm)


def weights_after_reference_steps(lm: LM, optimizer: Any) -> Any:
    """Return the weights after the same steps of an optimizer of torch."""
    for _ in random_gradients(lm):
        optimizer.step()
    return weights_of(lm)


def weights_of(lm: LM) -> dict[Any, Any]:
    return {name: weight.detach().clone() for name, weight in lm.network.named_parameters()}


def test_adamw_equals_torch(codec: Codec) -> None:
    """Bias correction and epsilon as in torch.optim.AdamW."""
    lm = tiny_lm(codec)
    optimizer = torch_backend.Optimizer(lm.network, muon=False)
    weights = weights_after_steps(lm, optimizer, lr=1e-2, muon_lr=99.0)
    other = tiny_lm(codec)
    reference = torch.optim.AdamW(
        other.network.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0
    )
    expected = weights_after_reference_steps(other, reference)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)


def test_adamw_of_all_parameters_equals_one_by_one(codec: Codec) -> None:
    """The calls for all parameters at once give the bits of a plain loop over them.

    Guards: a call whose form adds up or rounds in another way, so that seeded runs part.
    """
    lm = tiny_lm(codec)
    other = tiny_lm(codec)
    optimizer = torch_backend.Optimizer(lm.network, muon=False)
    first = {name: torch.zeros_like(weight) for name, weight in weights_of(other).items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights_of(other).items()}
    for step, gradients in enumerate(random_gradients(lm), start=1):
        optimizer.step(gradients, lr=1e-2, muon_lr=99.0, beta1=0.9, beta2=0.98, eps=1e-8)
        with torch.no_grad():
            for name, weight in other.network.named_parameters():
                gradient = gradients[name]
                first[name].lerp_(gradient, 1 - 0.9)
                second[name].mul_(0.98).addcmul_(gradient, gradient, value=1 - 0.98)
                spread = (second[name] / (1 - 0.98**step)).sqrt() + 1e-8
                weight.addcdiv_(first[name], spread, value=-1e-2 / (1 - 0.9**step))
        weights = weights_of(lm)
        for name, weight in other.network.named_parameters():
            assert torch.equal(weights[name], weight), (name, step)
            assert torch.equal(optimizer.second_moments[name], second[name]), (name, step)


def test_muon_equals_torch(codec: Codec) -> None:
    """The matrices of the blocks move as by torch.optim.Muon; the rest does not move.

    Torch iterates in bfloat16, so that it is a percent off.
    """
    lm = tiny_lm(codec)
    start = weights_of(lm)
    optimizer = torch_backend.Optimizer(lm.network)
    weights = weights_after_steps(lm, optimizer, lr=0.0, muon_lr=1e-2)
    other = tiny_lm(codec)
    parameters = other.network.named_parameters()
    matrices = [weight for name, weight in parameters if name.endswith("proj.weight")]
    reference = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, momentum=0.95)
    expected = weights_after_reference_steps(other, reference)
    for name, weight in start.items():
        change = weights[name] - weight
        expected_change = expected[name] - weight
        assert (change - expected_change).norm() <= 0.03 * expected_change.norm(), name
        assert bool(change.any()) == name.endswith("proj.weight"), name


def test_muon_equals_torch_step_by_step(codec: Codec) -> None:
    """Each step of Muon in MLX goes torch.optim.Muon's way too, from the same momentum.

    Guards: a momentum without Nesterov's look ahead, which four steps together may hide.
    """
    mx = pytest.importorskip("mlx.core")
    torch_lm = tiny_lm(codec)
    lm = mlx_twin(torch_lm)
    optimizer = lm.backend.Optimizer(lm.network)
    parameters = dict(torch_lm.network.named_parameters())
    names = [name for name in parameters if name.endswith("proj.weight")]
    matrices = [parameters[name] for name in names]
    reference = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, momentum=0.95)
    for gradients in random_gradients(torch_lm):
        before = lm.backend.to_arrays(lm.network, names)
        expected_before = {name: parameters[name].detach().clone() for name in names}
        mlx_gradients = {name: mx.array(value.numpy()) for name, value in gradients.items()}
        optimizer.step(mlx_gradients, 0.0, 1e-2)
        reference.step()
        after = lm.backend.to_arrays(lm.network, names)
        for name in names:
            change = after[name] - before[name]
            expected = (parameters[name].detach() - expected_before[name]).numpy()
            difference = np.linalg.norm(change - expected)
            assert difference <= 0.03 * np.linalg.norm(expected), name


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_state_of_another_optimizer(lm: LM, backend: str) -> None:
    """Muon does not take AdamW's moments, nor the other way round, nor those of another shape.

    Guards: second moments that are left lying without a word.
    """
    if backend == "mlx":
        pytest.importorskip("mlx.core")
        lm = mlx_twin(lm)

    def optimizer(muon: Any) -> Any:
        return lm.backend.Optimizer(lm.network, muon=muon)

    for muon in (True, False):
        with pytest.raises(KeyError, match=r"v\.model\.layers"):
            optimizer(muon).load_state(optimizer(not muon).state())
    state = optimizer(muon=True).state()
    name = next(name for name in state if name.startswith("m.") and state[name].ndim == 2)
    state[name] = state[name][:1]
    with pytest.raises(KeyError, match=name):
        optimizer(muon=True).load_state(state)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_state_goes_on(codec: Codec, backend: str) -> None:
    """An optimizer that takes another's state makes the same next step."""
    lm = tiny_lm(codec, noise=0.1)
    if backend == "mlx":
        pytest.importorskip("mlx.core")
        lm = mlx_twin(lm)
    batches = language_batches([codec.build("Who?", [("answer", "Eva")])], 100)

    def step(network: Any, optimizer: Any) -> None:
        lm.backend.train_step(network, optimizer, autocoa.nll_loss, batches, 1e-2, 1e-2)

    optimizer = lm.backend.Optimizer(lm.network)
    step(lm.network, optimizer)
    other = lm.copy()
    other_optimizer = lm.backend.Optimizer(other.network)
    other_optimizer.load_state(optimizer.state())
    assert other_optimizer.step_count == 1
    step(lm.network, optimizer)
    step(other.network, other_optimizer)
    names = list(lm.backend.trained_parameters(lm.network))
    weights = lm.backend.to_arrays(lm.network, names)
    other_weights = lm.backend.to_arrays(other.network, names)
    for name in names:
        np.testing.assert_array_equal(weights[name], other_weights[name])


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_leaves_weights_and_optimizer(
    codec: Codec, tmp_path: Path, bad: Any, backend: str
) -> None:
    """Guards: one NaN micro-batch among good ones ruins the checkpoint."""
    pytest.importorskip(backend)
    tiny_lm(codec).save(tmp_path / "x")
    lm = model.load(tmp_path / "x", ModelSettings(device=CPU.device, backend=backend))
    names = list(lm.backend.trained_parameters(lm.network))
    before = lm.backend.to_arrays(lm.network, names)
    optimizer = lm.backend.Optimizer(lm.network)
    chain = codec.build("Who?", [("answer", "Eva")])
    batches = language_batches([chain, chain], 1)
    batches[1]["norm"] = bad if math.isnan(bad) else 0.0
    figures = lm.backend.train_step(lm.network, optimizer, autocoa.nll_loss, batches, 1e-2, 1e-2)
    assert not math.isfinite(figures["loss"])
    assert optimizer.step_count == 0
    after = lm.backend.to_arrays(lm.network, names)
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])


def test_a_bad_loss_stops_the_stage(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clear error that names stage and step, before the folder of the stage is there.

    So the last good checkpoint still counts.
    """
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sft2"
    steps = [[codec.build("Who?", [("answer", "Eva")])]] * 3

    def bad_loss(xp: Any, logp: Any, batch: Any) -> Any:
        return math.nan * autocoa.nll_loss(xp, logp, batch)

    def make_batches(step: Any) -> Any:
        return language_batches(step, 1000)

    no_task: Any = None
    settings = SFTSettings()
    with (
        pytest.raises(UserError, match="sft2: loss is nan at step 0"),
        running_stage(tiny_lm(codec), settings, no_task, folder, len(steps)) as stage,
    ):
        train_steps(stage, settings, steps, bad_loss, make_batches)
    assert not folder.exists()
