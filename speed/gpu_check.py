"""Check PyTorch on a GPU: what was expected and what was seen, line by line.

    bash gpu_check.sh                   # CUDA, some minutes; out/gpu_check.json
    bash gpu_check.sh --quick           # then the whole story on it too: run.sh --quick, bench.py
    python -m speed.gpu_check cpu       # the same checks, tiny, on a CPU

A check that breaks is one line of the report, and the others go on. No GPU has run this yet.
"""

import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import model
from autocoa import contrastive_loss, grpo_loss, nll_loss
from backends.config import nano_config
from common.errors import run_guarded
from common.files import write_text
from common.memory import training_bytes
from common.settings import ModelSettings
from data.batches import Batch, language_batches, pair_batches
from data.trajectory import Role, Trajectory
from model import LM
from nano.tokenizer import train_tokenizer
from train_rl import RLSettings, RolloutBatch, update_batches

LORA: dict[str, Any] = {"lora_rank": 8}
CHECKPOINTING: dict[str, Any] = {"checkpointing": True}
STEPS_TO_LEARN = 20  # in which an adapter on 4 bits must halve its loss


@dataclass(frozen=True)
class Sizes:
    """How large the networks and texts of the checks are."""

    width: int
    layers: int
    texts: int  # of an optimizer step
    length: int  # tokens of a text
    decoded: int  # tokens that each row writes
    skipped_ways: int  # of training, behind each one that is tried


GPU_SIZES = Sizes(width=1024, layers=12, texts=32, length=512, decoded=64, skipped_ways=0)
CPU_SIZES = Sizes(width=64, layers=2, texts=4, length=12, decoded=3, skipped_ways=6)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    expected: str  # "" where nothing is known to expect
    seen: str
    passed: bool | None = None  # None where nothing is expected


@dataclass
class Place:
    """The device that is checked, and what the checks have in common."""

    device: str
    folder: Path  # for checkpoints
    tokenizer: Any = field(default_factory=lambda: train_tokenizer(600, [" Who made it?"] * 9))

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU that is checked."""
        return self.device == "cuda"

    @property
    def sizes(self) -> Sizes:
        """Sizes that keep the device busy, for seconds."""
        return GPU_SIZES if self.on_gpu else CPU_SIZES

    def settings(self, **changes: Any) -> ModelSettings:
        """Return settings of this device."""
        values: dict[str, Any] = {"backend": "torch", "device": self.device, **changes}
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
        return [
            Trajectory(row, list(mask), [int(Role.THINK)] * len(row), [-6.0] * len(row))
            for row in ids.tolist()
        ]

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()


# ---- 1. The machine ------------------------------------------------------------------------------
def describe_machine(place: Place) -> Iterator[Finding]:
    """Say what is checked."""
    yield Finding("Python, torch", "", f"{platform.python_version()}, {torch.__version__}")
    if not place.on_gpu:
        yield Finding("device", "", "cpu")
        return
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    capability = f"{properties.major}.{properties.minor}"
    yield Finding("device", "", f"{properties.name}, {memory:.0f} GiB, capability {capability}")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    yield Finding("driver, CUDA", "", f"{driver.splitlines()[0]}, {torch.version.cuda}")
    yield Finding("--dtype=auto", "", model.fast_dtype(place.settings()))


# ---- 2. The same values as a CPU -----------------------------------------------------------------
def compare_with_cpu(place: Place) -> Iterator[Finding]:
    """Compare logits and loss of a nano network, with all digits of float32."""
    on_device = place.network(128, 4)
    on_cpu = place.network(128, 4, device="cpu")
    # pick_device has turned TF32 on.
    torch.set_float32_matmul_precision("highest")
    texts = place.texts()
    ids = torch.tensor([text.ids for text in texts])
    logits = []
    losses = []
    for lm in (on_cpu, on_device):
        with torch.no_grad():
            network = lm.network
            logits.append(network.logits(network(ids.to(network.device))).cpu())
        losses.append(_step(lm, "nll", texts, rate=0.0)["loss"])
    if place.on_gpu:
        torch.set_float32_matmul_precision("high")
    yield _at_most("logits, CPU and device", float((logits[0] - logits[1]).abs().max()), 1e-4)
    yield _at_most("loss, CPU and device", abs(losses[0] - losses[1]), 1e-5)


# ---- 3. Training ---------------------------------------------------------------------------------
LOSSES: dict[str, Callable[..., Any]] = {
    "nll": nll_loss,
    "contrastive": contrastive_loss,
    "grpo": grpo_loss,
}


def train_in_all_ways(place: Place) -> Iterator[Finding]:
    """Take two steps of each loss, optimizer, adapter and number type: figures stay finite."""
    texts = place.texts()
    dtypes = ("float32", "bfloat16")
    ways = itertools.product(dtypes, ({}, LORA, CHECKPOINTING), LOSSES, (True, False))
    for dtype, changes, loss, muon in list(ways)[:: 1 + place.sizes.skipped_ways]:
        lm = place.network(64, 2, dtype=dtype)
        lm.begin_stage(place.settings(dtype=dtype, **changes), seed=0)
        optimizer = lm.backend.Optimizer(lm.network, muon=muon)
        figures = [_step(lm, loss, texts, 1e-3, optimizer) for _ in range(2)]
        losses = [row["loss"] for row in figures]
        norms = [row["grad_norm"] for row in figures]
        name = ", ".join([loss, "Muon" if muon else "AdamW", dtype, *changes])
        yield Finding(
            f"two steps of {name}",
            "finite losses and gradients above 0",
            f"losses {_digits(losses)}, gradients {_digits(norms)}",
            all(map(math.isfinite, losses + norms)) and min(norms) > 0,
        )


def repeat_step(place: Place) -> Iterator[Finding]:
    """Take the first step of two runs of one seed."""
    texts = place.texts()
    losses = [_step(place.large_network(), "nll", texts, 1e-3)["loss"] for _ in range(2)]
    yield Finding(
        "step 0 of two runs of one seed",
        "the same loss to the bit",
        f"{losses[0]!r}, {losses[1]!r}",
        losses[0] == losses[1],
    )


def learn_on_4_bits(place: Place) -> Iterator[Finding]:
    """Train an adapter on 4 bits to know some texts by heart (--bits=4)."""
    if not place.on_gpu:
        # bitsandbytes takes seconds to load, and has tests of its own on a CPU.
        return
    settings = place.settings(dtype="bfloat16", bits=4, **LORA)
    lm = place.large_network(dtype="bfloat16")
    lm.begin_stage(settings, seed=0)
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    texts = place.texts()[:2]
    losses = [_step(lm, "nll", texts, 1e-2, optimizer)["loss"] for _ in range(STEPS_TO_LEARN)]
    seen = f"{losses[0]:.2f}, then {losses[-1]:.2f}"
    yield Finding("--bits=4 learns", "half the loss", seen, losses[-1] < losses[0] / 2)


def climb_speed_ladder(place: Place) -> Iterator[Finding]:
    """Time a training step in each number type, and compiled."""
    texts = place.texts()
    tokens = sum(len(text.ids) for text in texts)
    rungs = [("float32", "highest", False), ("float32", "high", False)]
    rungs += [("bfloat16", "high", False)]
    if place.on_gpu:
        rungs += [("bfloat16", "high", True)]
    before = torch.get_float32_matmul_precision()
    for dtype, precision, compiled in rungs:
        lm = place.large_network(dtype=dtype)
        torch.set_float32_matmul_precision(precision)
        if compiled:
            for layer in lm.network.model.layers:
                layer.compile(dynamic=True)
        optimizer = lm.backend.Optimizer(lm.network, muon=False)
        for _ in range(2):
            place.synchronize()
            started = time.perf_counter()
            _step(lm, "nll", texts, 1e-4, optimizer)
            place.synchronize()
            seconds = time.perf_counter() - started
        name = f"training, {dtype}, products {precision}{', compiled' if compiled else ''}"
        yield Finding(name, "", f"{tokens / seconds:,.0f} tokens/s")
    torch.set_float32_matmul_precision(before)


# ---- 4. Decoding ---------------------------------------------------------------------------------
def decode_with_each_attention(place: Place) -> Iterator[Finding]:
    """Time a token with and without cuDNN's attention, which the backend turns off."""
    lm = place.large_network(dtype="bfloat16")
    for is_on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        seconds = min(_decode(place, lm) for _ in range(2))
        name = f"a token of {place.sizes.texts} rows, cuDNN's attention {'on' if is_on else 'off'}"
        yield Finding(name, "", f"{1000 * seconds / place.sizes.decoded:.2f} ms")
    torch.backends.cuda.enable_cudnn_sdp(not place.on_gpu)


def count_launches(place: Place) -> Iterator[Finding]:
    """Count what a token of decoding asks of the device, and how often it waits."""
    lm = place.large_network()
    kinds = [ProfilerActivity.CPU]
    if place.on_gpu:
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        _decode(place, lm)
    counts = {event.key: event.count for event in profiler.key_averages()}
    for name, words in (
        ("launches of kernels and graphs", ("LaunchKernel", "GraphLaunch")),
        ("waits for the device", ("StreamSynchronize", "DeviceSynchronize")),
        ("operations of torch", ("aten::",)),
    ):
        found = sum(count for key, count in counts.items() if any(word in key for word in words))
        yield Finding(f"{name}, a token", "", f"{found / place.sizes.decoded:.0f}")


def compare_fixed_slots(place: Place) -> Iterator[Finding]:
    """Decode in slots that rows share, and in fixed ones, as a GPU does (fixed_slots.py)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    lm = place.large_network()
    written = []
    for in_fixed_slots in (False, True):
        for _ in range(2):
            ids, seconds = _write(place, lm, in_fixed_slots)
        written.append(ids)
        name = f"a token of {place.sizes.texts} rows, {'fixed' if in_fixed_slots else 'shared'}"
        yield Finding(f"{name} slots", "", f"{1000 * seconds / place.sizes.decoded:.2f} ms")
    torch.set_float32_matmul_precision(before)
    same = sum(a == b for a, b in zip(*written, strict=True))
    yield Finding(
        "texts that both ways write alike",
        f"all {place.sizes.texts}",
        str(same),
        same == place.sizes.texts,
    )


# ---- 5. Memory and files -------------------------------------------------------------------------
def compare_memory(place: Place) -> Iterator[Finding]:
    """Hold what is counted before a run against CUDA's own count."""
    if not place.on_gpu:
        return
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lm = place.large_network()
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    for _ in range(3):
        _step(lm, "nll", place.texts(), 1e-4, optimizer)
    counted = sum(training_bytes(lm.network.config, place.settings(), False, 4).values())
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    reserved = torch.cuda.memory_reserved()
    yield Finding(
        "weights, gradients and optimizer, in MB",
        f"{counted / 1e6:,.0f} by the estimate, within 10%",
        f"{held / 1e6:,.0f}; {peak / 1e6:,.0f} at most, with activations",
        abs(held / counted - 1) < 0.1,
    )
    yield Finding(
        "reserved over the most that was allocated",
        "at most 1.3",
        f"{reserved / (peak + before):.2f}",
        reserved / (peak + before) <= 1.3,
    )


def resume_on_cpu(place: Place) -> Iterator[Finding]:
    """Go on with a checkpoint of the device on a CPU."""
    texts = place.texts()
    lm = place.network(64, 2)
    optimizer = lm.backend.Optimizer(lm.network, muon=True)
    _step(lm, "nll", texts, 1e-3, optimizer)
    lm.save(place.folder / "checkpoint", optimizer)
    resumed = model.load(place.folder / "checkpoint", place.settings(device="cpu"))
    optimizer = resumed.backend.Optimizer(resumed.network, muon=True)
    steps = resumed.resume(place.folder / "checkpoint", optimizer)
    same = all(
        torch.equal(weight.cpu(), other)
        for weight, other in zip(lm.network.parameters(), resumed.network.parameters(), strict=True)
    )
    loss = _step(resumed, "nll", texts, 1e-3, optimizer)["loss"]
    yield Finding(
        "a checkpoint goes on, on the CPU",
        "1 step done, the same weights, a finite loss",
        f"{steps} done, weights {'the same' if same else 'differ'}, loss {loss:.3f}",
        steps == 1 and same and math.isfinite(loss),
    )


# ---- what the checks share -----------------------------------------------------------------------
def _step(
    lm: LM, loss: str, texts: list[Trajectory], rate: float, optimizer: Any = None
) -> dict[str, float]:
    """Take an optimizer step; return its figures."""
    if optimizer is None:
        optimizer = lm.backend.Optimizer(lm.network, muon=False)
    batches = _batches(loss, texts)
    return lm.backend.train_step(lm.network, optimizer, LOSSES[loss], batches, rate, rate)


def _batches(loss: str, texts: list[Trajectory]) -> list[Batch]:
    """Return the micro-batches of a step as the scripts make them."""
    micro_tokens = sum(len(text.ids) for text in texts)
    if loss == "nll":
        return language_batches(texts, micro_tokens)
    if loss == "contrastive":
        return pair_batches(list(zip(texts[0::2], texts[1::2], strict=True)), micro_tokens, 0.2)
    groups = len(texts) // 2
    advantages = np.tile([1.0, -1.0], (groups, 1))
    batch = RolloutBatch([], texts, advantages)
    settings = RLSettings(micro_tokens=micro_tokens, rollouts=2)
    no_reference: Any = None
    rows = np.arange(len(texts))
    skipped = np.zeros(groups, bool)
    return update_batches(batch, rows, advantages, skipped, no_reference, settings)


def _decode(place: Place, lm: LM) -> float:
    """Return the seconds in which all rows write some tokens, each another text."""
    _, seconds = _write(place, lm, place.on_gpu)
    return seconds


def _write(place: Place, lm: LM, in_fixed_slots: bool) -> tuple[list[list[int]], float]:
    """Return what rows write greedily behind different texts, and the seconds that it took."""
    prompts = [text.ids for text in place.texts()]
    decoder = lm.decoder(prompts)
    decoder.in_fixed_slots = in_fixed_slots
    place.synchronize()
    started = time.perf_counter()
    ids, _ = decoder.decode([], [place.sizes.decoded] * len(prompts), 0.0)
    place.synchronize()
    return ids, time.perf_counter() - started


def _digits(values: list[float]) -> str:
    return " and ".join(f"{value:.3g}" for value in values)


def _at_most(check: str, value: float, limit: float) -> Finding:
    return Finding(check, f"at most {limit:g} apart", f"{value:.2g}", value <= limit)


# ---- the report ----------------------------------------------------------------------------------
CHECKS: tuple[Callable[[Place], Iterator[Finding]], ...] = (
    describe_machine,
    compare_with_cpu,
    train_in_all_ways,
    repeat_step,
    resume_on_cpu,
    learn_on_4_bits,
    compare_memory,
    decode_with_each_attention,
    compare_fixed_slots,
    count_launches,
    climb_speed_ladder,
)


def run_checks(device: str, report: Path) -> list[Finding]:
    """Run all checks, print each finding and write all of them, as they are made."""
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(device, Path(folder))
        for check in CHECKS:
            for finding in _until_it_breaks(check, place):
                findings.append(finding)
                print(line_of(finding), flush=True)
                rows = [asdict(row) for row in findings]
                write_text(report, json.dumps(rows, indent=1) + "\n")
    return findings


def _until_it_breaks(
    check: Callable[[Place], Iterator[Finding]], place: Place
) -> Iterator[Finding]:
    """Yield what a check finds; an error, of whatever kind, is a finding too."""
    started = time.perf_counter()
    try:
        yield from check(place)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        yield Finding(check.__name__, "no error", f"{type(error).__name__}: {first_line}", False)
    seconds = time.perf_counter() - started
    yield Finding(f"seconds of {check.__name__}", "", f"{seconds:.1f}")


def line_of(finding: Finding) -> str:
    """Return a finding as a line of the table."""
    mark = {True: "ok", False: "FAILED", None: ""}[finding.passed]
    expected = f" (expected: {finding.expected})" if finding.expected else ""
    return f"{mark:8}{finding.check}: {finding.seen}{expected}"


def main() -> None:
    """Check the device that is named, CUDA by itself; exit 1 where a check failed."""
    device = (sys.argv[1:] or ["cuda"])[0]
    model.choose_backend("torch").pick_device(device)
    report = Path("out", "gpu_check.json")
    report.parent.mkdir(exist_ok=True)
    findings = run_checks(device, report)
    failed = [finding for finding in findings if finding.passed is False]
    passed = sum(finding.passed is True for finding in findings)
    print(f"\n{passed} checks passed, {len(failed)} failed; all of them are in {report}")
    for finding in failed:
        print(line_of(finding))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_guarded(main)
