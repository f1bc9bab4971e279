"""What the checks of CUDA and of Metal share: a place, random texts, training and writing.

See gpu_check.py and metal_check.py. Nothing here names a framework.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import model
from autocoa import contrastive_loss, grpo_loss, nll_loss, sequence_loss
from backends.config import nano_config
from backends.decoder import Decoder
from common.settings import ModelSettings
from data.batches import Batch, language_batches, pair_batches
from data.rollout_batch import RolloutBatch
from data.trajectory import Role, Trajectory
from model import LM
from nano.tokenizer import train_tokenizer
from speed.findings import Finding, at_most, broken
from train_rl import RLSettings, update_batches

LORA: dict[str, Any] = {"lora_rank": 8}
CHECKPOINTING: dict[str, Any] = {"checkpointing": True}
STEPS_TO_LEARN = 20  # in which an adapter on 4 bits must halve its loss
STEPS_TO_WRITE = 20  # in which a network learns what it is asked to write

Prompts = list[list[int]]

# SFT's, and those of --loss; grpo and dr_grpo are dapo's function with other weights.
CheckedLoss = Literal["nll", "contrastive", "dapo", "gspo", "reinforce"]
LOSSES: dict[CheckedLoss, Callable[..., Any]] = {
    "nll": nll_loss,
    "contrastive": contrastive_loss,
    "dapo": grpo_loss,
    "gspo": sequence_loss,
    "reinforce": sequence_loss,
}


@dataclass(frozen=True)
class Sizes:
    """How large the networks and texts of the checks are."""

    width: int
    layers: int
    texts: int  # of an optimizer step
    length: int  # tokens of a text
    decoded: int  # tokens that each row writes
    skipped_ways: int  # of training, after each one that is tried


CPU_SIZES = Sizes(width=64, layers=2, texts=4, length=12, decoded=3, skipped_ways=6)


@dataclass
class Place:
    """The device that is checked, and what the checks have in common."""

    backend: str
    device: str  # as --device
    on_gpu: bool
    sizes: Sizes
    folder: Path  # for checkpoints
    tokenizer: Any = field(default_factory=lambda: train_tokenizer(600, [" Who made it?"] * 9))

    def settings(self, **changes: Any) -> ModelSettings:
        """Return settings of this device."""
        values: dict[str, Any] = {"backend": self.backend, "device": self.device, **changes}
        return ModelSettings(**values)

    def network(self, width: int, layers: int, **changes: Any) -> LM:
        """Return a network of seed 0 on this device."""
        config = nano_config(
            len(self.tokenizer), self.tokenizer.eos_token_id, None, width=width, layers=layers
        )
        return model.new(config, self.tokenizer, 0, self.settings(**changes))

    def large_network(self, **changes: Any) -> LM:
        """Return a network that keeps the device busy."""
        return self.network(self.sizes.width, self.sizes.layers, **changes)

    def texts(self) -> list[Trajectory]:
        """Return random texts, of which two and two begin alike."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, len(self.tokenizer), (self.sizes.texts, self.sizes.length))
        shared = self.sizes.length // 2
        ids[1::2, :shared] = ids[0::2, :shared]
        mask = [0] * shared + [1] * (self.sizes.length - shared)
        return [Trajectory(row, list(mask), [int(Role.THINK)] * len(row)) for row in ids.tolist()]

    def compute_here(self) -> None:
        """Let MLX compute on this device again, where a network of the CPU was made last."""
        model.choose_backend(self.backend).pick_device(self.device)


# ---- the checks ----------------------------------------------------------------------------------
def train_in_all_ways(place: Place) -> Iterator[Finding]:
    """Take two steps of each loss, optimizer, adapter and number type: figures stay finite.

    One way that breaks is a finding, and the others go on.
    """
    texts = place.texts()
    dtypes = ("float32", "bfloat16")
    ways = itertools.product(dtypes, ({}, LORA, CHECKPOINTING), LOSSES, (True, False))
    for dtype, changes, loss, muon in list(ways)[:: 1 + place.sizes.skipped_ways]:
        way = ", ".join([loss, "Muon" if muon else "AdamW", dtype, *changes])
        name = f"two steps of {way}"
        try:
            lm = place.network(64, 2, dtype=dtype)
            lm.begin_stage(place.settings(dtype=dtype, **changes), seed=0)
            optimizer = lm.backend.Optimizer(lm.network, muon=muon)
            figures = [take_step(lm, loss, texts, 1e-3, optimizer) for _ in range(2)]
        except Exception as error:
            yield broken(name, error)
            continue
        losses = [row["loss"] for row in figures]
        norms = [row["grad_norm"] for row in figures]
        yield Finding(
            name,
            "finite losses and gradients above 0",
            f"losses {_digits(losses)}, gradients {_digits(norms)}",
            all(map(math.isfinite, losses + norms)) and min(norms) > 0,
        )


def repeat_step(place: Place) -> Iterator[Finding]:
    """Take the first step of two runs of one seed, and compare the weights after it.

    The loss is that before the step, so that it says nothing of the backward pass and the
    optimizer. A GPU may add gradients up in another order each time, and AdamW's first step goes
    the whole way for the least of them: so weights may differ there, by a small part of the step.
    """
    texts = place.texts()
    start = _weights(place.large_network())
    figures = []
    ends = []
    for _ in range(2):
        lm = place.large_network()
        figures.append(take_step(lm, "nll", texts, 1e-3))
        ends.append(_weights(lm))
    moved = _distance(start, ends[0])
    apart = _distance(*ends)
    losses = [row["loss"] for row in figures]
    norms = [row["grad_norm"] for row in figures]
    norms_apart = abs(norms[0] - norms[1]) / norms[0]
    name = "step 0 of two runs of one seed"
    yield Finding(
        f"{name}: loss",
        "the same to the bit",
        f"{losses[0]!r}, {losses[1]!r}",
        losses[0] == losses[1],
    )
    on_gpu = place.on_gpu
    yield Finding(
        f"{name}: length of the gradient",
        "at most 1e-05 of it apart" if on_gpu else "the same to the bit",
        f"{norms_apart:.2g} of it apart",
        norms_apart <= (1e-5 if on_gpu else 0.0),
    )
    yield Finding(
        f"{name}: weights after it",
        "moved, and at most 5% of the way apart" if on_gpu else "moved, the same to the bit",
        f"moved {moved:.3g}, {apart / moved if moved else math.nan:.2%} of it apart",
        moved > 0 and apart <= (0.05 * moved if on_gpu else 0.0),
    )


def resume_on_cpu(place: Place) -> Iterator[Finding]:
    """Go on with a checkpoint of the device on a CPU."""
    texts = place.texts()
    lm = place.network(64, 2)
    optimizer = lm.backend.Optimizer(lm.network, muon=True)
    take_step(lm, "nll", texts, 1e-3, optimizer)
    lm.save(place.folder / "checkpoint", optimizer)
    saved = _weights(lm)
    resumed = model.load(place.folder / "checkpoint", place.settings(device="cpu"))
    optimizer = resumed.backend.Optimizer(resumed.network, muon=True)
    steps = resumed.resume(place.folder / "checkpoint", optimizer)
    is_same = _distance(saved, _weights(resumed)) == 0
    loss = take_step(resumed, "nll", texts, 1e-3, optimizer)["loss"]
    place.compute_here()
    yield Finding(
        "a checkpoint goes on, on the CPU",
        "1 step done, the same weights, a finite loss",
        f"{steps} done, weights {'the same' if is_same else 'differ'}, loss {loss:.3f}",
        steps == 1 and is_same and math.isfinite(loss),
    )


def learn_on_4_bits(place: Place) -> Iterator[Finding]:
    """Train an adapter on 4 bits to know some texts by heart (--bits=4)."""
    if place.backend == "torch" and not place.on_gpu:
        # bitsandbytes takes seconds to load, and has tests of its own on a CPU.
        return
    settings = place.settings(dtype="bfloat16", bits=4, **LORA)
    lm = place.large_network(dtype="bfloat16")
    lm.begin_stage(settings, seed=0)
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    texts = place.texts()[:2]
    losses = [take_step(lm, "nll", texts, 2e-3, optimizer)["loss"] for _ in range(STEPS_TO_LEARN)]
    seen = f"{losses[0]:.2f}, then {losses[-1]:.2f}"
    yield Finding("--bits=4 learns", "half the loss", seen, losses[-1] < losses[0] / 2)


# ---- writing -------------------------------------------------------------------------------------
def compare_with_writing_on_cpu(place: Place) -> Iterator[Finding]:
    """Write the same texts on the CPU and on the device."""
    folder = learn_to_write(place)

    def on_cpu(prompts: Prompts) -> Decoder:
        return model.load(folder, place.settings(device="cpu")).decoder(prompts)

    def on_device(prompts: Prompts) -> Decoder:
        return model.load(folder, place.settings()).decoder(prompts)

    yield from compare_decoders(place, "CPU and device", [on_cpu, on_device])


def learn_to_write(place: Place) -> Path:
    """Return the folder of a network that has learned the texts.

    A new network would repeat its last token, whatever attention reads.
    """
    texts = place.texts()
    learner = place.network(128, 4, device="cpu")
    optimizer = learner.backend.Optimizer(learner.network, muon=False)
    for _ in range(STEPS_TO_WRITE):
        take_step(learner, "nll", texts, 3e-3, optimizer)
    folder = place.folder / "writer"
    learner.save(folder)
    place.compute_here()
    return folder


def compare_decoders(
    place: Place, names: str, openers: Sequence[Callable[[Prompts], Decoder]]
) -> Iterator[Finding]:
    """Let two decoders write second halves of texts, greedily and by the same random numbers.

    names: of the two, as the report has them.
    openers: each returns a decoder that has read the first halves.
    """
    texts = place.texts()
    half = place.sizes.length // 2
    prompts = [text.ids[:half] for text in texts]
    limits = [place.sizes.length - half] * len(texts)
    uniforms = np.random.default_rng(0).random((len(texts), place.sizes.length))
    for name, temperature in (("write greedily", 0.0), ("sample", 1.0)):
        written = []
        logprobs = []
        for open_decoder in openers:
            ids, logprobs_of_ids = open_decoder(prompts).decode([], limits, temperature, uniforms)
            written.append(ids)
            logprobs.append(np.array(logprobs_of_ids))
        same = sum(one == other for one, other in zip(*written, strict=True))
        yield Finding(
            f"texts that {names} {name} alike",
            f"all {len(texts)}",
            str(same),
            same == len(texts),
        )
        apart = float(np.abs(logprobs[0] - logprobs[1]).max())
        yield at_most(f"log-probabilities of what {names} {name}: how far apart", apart, 1e-4)


# ---- what they share -----------------------------------------------------------------------------
def take_step(
    lm: LM, loss: CheckedLoss, texts: list[Trajectory], rate: float, optimizer: Any = None
) -> dict[str, float]:
    """Take an optimizer step; return its figures."""
    if optimizer is None:
        optimizer = lm.backend.Optimizer(lm.network, muon=False)
    batches = _batches(lm, loss, texts)
    return lm.backend.train_step(lm.network, optimizer, LOSSES[loss], batches, rate, rate)


def _batches(lm: LM, loss: CheckedLoss, texts: list[Trajectory]) -> list[Batch]:
    """Return the micro-batches of a step as the scripts make them."""
    micro_tokens = sum(len(text.ids) for text in texts)
    if loss == "nll":
        return language_batches(texts, micro_tokens)
    if loss == "contrastive":
        return pair_batches(list(zip(texts[0::2], texts[1::2], strict=True)), micro_tokens, 0.2)
    groups = len(texts) // 2
    advantages = np.tile([1.0, -1.0], (groups, 1))
    batch = RolloutBatch([], texts, advantages)
    settings = RLSettings(loss=loss, micro_tokens=micro_tokens, rollouts=2)
    no_reference: Any = None
    rows = np.arange(len(texts))
    skipped = np.zeros(groups, bool)
    batches = update_batches(batch, rows, advantages, skipped, no_reference, settings)
    for packed in batches:
        # As if the policy had written the texts just now: the product of a text's ratios is 1.
        packed["old"] = lm.backend.score(lm.network, packed)
    return batches


def _weights(lm: LM) -> dict[str, np.ndarray]:
    """Return a copy of all weights that are trained, by name."""
    names = list(lm.backend.trained_parameters(lm.network))
    arrays = lm.backend.to_arrays(lm.network, names)
    return {name: np.array(weight) for name, weight in arrays.items()}


def _distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return how far apart two sets of weights are."""
    squares = [np.square(weight - other[name]).sum() for name, weight in one.items()]
    return math.sqrt(sum(squares))


def _digits(values: list[float]) -> str:
    return " and ".join(f"{value:.3g}" for value in values)
