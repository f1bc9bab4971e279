"""A step as a GPU makes it, shown without one: devices, number types and downloads.

The network is on torch's device "meta", which knows shapes and no values. A download raises there,
but for the few that a step is meant to make, which are replaced. Torch lets some operations of
"meta" take a tensor of the CPU too, such as a product of matrices; OneDevice refuses them all.

Not on fake tensors of CUDA (FakeTensorMode): where torch is built without CUDA, as for these tests,
x[None] of one raises "PyTorch is not linked with support for cuda devices".
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autocoa
import backends.torch as torch_backend
from backends.torch import training
from backends.torch.decoder import Decoder
from backends.torch.fixed_slots import STEPS_BETWEEN_LOOKS
from backends.torch.network import Transformer, _attend
from common.settings import LossName
from data.batches import Batch, language_batches, pair_batches
from data.questions import Question
from data.rollout_batch import RolloutBatch
from data.trajectory import Codec, Trajectory
from model import LM
from train_rl import RLSettings, update_batches

DTYPES = ("float32", "bfloat16")


class OneDevice(TorchDispatchMode):
    """Raise for each operation whose tensors are on two devices, but for a copy between them.

    A number, a tensor without dimensions, may be anywhere: CUDA takes one of the CPU too.
    """

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        tensors = [
            value
            for value in tree_leaves((arguments, options))
            if isinstance(value, torch.Tensor) and value.dim() > 0
        ]
        devices = sorted({tensor.device.type for tensor in tensors})
        if len(devices) > 1 and operation is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{operation} on {' and '.join(devices)}")
        return operation(*arguments, **options)


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    """Let each test of this file raise where devices are mixed."""
    with OneDevice():
        yield


@pytest.fixture
def texts(codec: Codec) -> list[Trajectory]:
    """Return four chains that begin alike."""
    return [
        codec.build("Who directed it?", [("think", "I recall Eva Moss." * count), ("answer", "A")])
        for count in (4, 1, 5, 2)
    ]


@pytest.fixture(autouse=True)
def one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention refuse a mask that is not of its queries' type, as CUDA's kernels do."""
    attend = functional.scaled_dot_product_attention

    def attend_in_one_type(
        q: torch.Tensor, k: Any, v: Any, attn_mask: Any = None, **options: Any
    ) -> Any:
        if attn_mask is not None and attn_mask.dtype != q.dtype:
            raise RuntimeError(f"a mask of {attn_mask.dtype} beside queries of {q.dtype}")
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend_in_one_type)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let downloads be ones; return how many values each had."""
    made: list[int] = []

    def numbers(values: Any) -> list[float]:
        made.append(len(values))
        return [1.0] * len(values)

    def array(self: Any, values: torch.Tensor) -> np.ndarray:
        made.append(values.numel())
        return np.ones(tuple(values.shape), dtype=np.int64)

    monkeypatch.setattr(training, "_download", numbers)
    monkeypatch.setattr(Decoder, "_download", array)
    return made


def elsewhere(lm: LM, dtype: str) -> Transformer:
    """Return a network of the same shape on a device that has no values."""
    return torch_backend.build(lm.network.config, "meta", dtype)


def rl_batches(lm: LM, texts: list[Trajectory], loss: LossName) -> list[Batch]:
    """Return the tries of a group for --loss, with KL and an auxiliary loss."""
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
    batch = RolloutBatch([Question("1", "", ["A"])], texts, rewards)
    advantages = autocoa.group_advantages(rewards)
    settings = RLSettings(loss=loss, kl=0.1, observation_coef=0.1, micro_tokens=60)
    return update_batches(batch, np.arange(4), advantages, np.array([False]), lm, settings)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.inference_mode])
def test_a_product_on_two_devices_is_found(grad: Any) -> None:
    """The two forms of a product that torch itself lets pass, with gradients and as in decoding.

    Guards: a weight or a mask that stays on the CPU, and checks above that find nothing.
    """
    on_device = torch.ones(2, 2, device="meta")
    on_cpu = torch.ones(2, 2)
    with grad():
        assert (on_device @ on_device + torch.tensor(1.0)).device.type == "meta"
        with pytest.raises(RuntimeError, match="on cpu and meta"):
            on_device @ on_cpu
        with pytest.raises(RuntimeError, match="on cpu and meta"):
            torch.nn.functional.linear(on_cpu, on_device)


def test_a_mask_of_another_type_is_found() -> None:
    """Guards: checks below that find nothing."""
    heads = torch.ones(1, 1, 2, 8, device="meta", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="beside queries of"):
        _attend(heads, heads, heads, torch.zeros(1, 1, 2, 2, device="meta"))


@pytest.mark.parametrize("loss", ["nll", "pairs", "dapo", "gspo", "reinforce"])
@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step(
    lm: LM,
    texts: list[Trajectory],
    downloads: list[int],
    loss: str,
    muon: bool,
    recompute: bool,
    dtype: str,
) -> None:
    """Forward, loss, backward and optimizer; two downloads, however many micro-batches there are.

    Guards: a wait for each parameter, and for each trie; a mask in float32 beside queries in
    bfloat16, which a CPU takes and CUDA does not.
    """
    functions = {
        "nll": (autocoa.nll_loss, language_batches(texts, 60)),
        "pairs": (
            autocoa.contrastive_loss,
            pair_batches([(texts[0], texts[1]), (texts[2], texts[3])], 60, alpha=0.2),
        ),
        "dapo": (autocoa.grpo_loss, rl_batches(lm, texts, "dapo")),
        "gspo": (autocoa.sequence_loss, rl_batches(lm, texts, "gspo")),
        "reinforce": (autocoa.sequence_loss, rl_batches(lm, texts, "reinforce")),
    }
    function, batches = functions[loss]
    network = elsewhere(lm, dtype)
    network.recompute = recompute
    optimizer = torch_backend.Optimizer(network, muon)
    torch_backend.train_step(network, optimizer, function, batches, 1e-3, 1e-2)
    assert downloads == [len(batches), 1 + len(list(network.parameters()))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_and_entropies(
    lm: LM,
    texts: list[Trajectory],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """What RL, KL and world models measure without gradient: a download for each batch."""
    downloaded = []

    def download(tensor: torch.Tensor) -> torch.Tensor:
        downloaded.append(tensor.device.type)
        return torch.ones(tensor.shape)

    batches = rl_batches(lm, texts, "dapo")
    monkeypatch.setattr(torch.Tensor, "cpu", download)
    network = elsewhere(lm, dtype)
    for batch in batches:
        training.score(network, batch)
        training.entropies(network, batch)
    assert downloaded == ["meta"] * 2 * len(batches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder(
    lm: LM,
    texts: list[Trajectory],
    downloads: list[int],
    dtype: str,
) -> None:
    """Prompts, draws, forks, what a tool says, and rows that are done; a download a step."""
    decoder = Decoder(elsewhere(lm, dtype), [text.ids for text in texts])
    rows = len(texts)
    decoder.decode([], [3] * rows, 1.0, np.full((rows, 3), 0.5))
    # The tokens of each step, then the log-probabilities of all.
    assert downloads == [rows] * 6
    decoder.feed([[5, 6], [7], [], []])
    decoder.keep([0, 0, 2])
    decoder.decode([], [2] * 3, 0.0)
    assert decoder.logits.device.type == "meta"


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_slots(
    lm: LM,
    texts: list[Trajectory],
    downloads: list[int],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """As a GPU decodes: a look each eight steps, then ids and log-probabilities at once."""
    monkeypatch.setattr(Decoder, "in_fixed_slots", True)
    decoder = Decoder(elsewhere(lm, dtype), [text.ids for text in texts])
    rows = len(texts)
    steps = 2 * STEPS_BETWEEN_LOOKS
    decoder.decode([7], [steps] * rows, 1.0, np.full((rows, steps), 0.5))
    # The ones that stand for downloads say that a row still writes.
    assert downloads == [1, 1, rows * steps, rows * steps]
    assert decoder.logits.device.type == "meta"
