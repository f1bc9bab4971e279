"""Check PyTorch on a GPU: what was expected and what was seen, line by line.

    bash gpu_check.sh                   # CUDA, under ten minutes; out/gpu_check.json
    bash gpu_check.sh --quick           # then the whole story on it too: run.sh --quick, bench.py
    bash gpu_check.sh --backend=mlx     # MLX on Apple silicon: metal_check.py
    python -m speed.gpu_check cpu       # the same checks, tiny, on a CPU

A check that breaks is one line of the report, and the others go on. No GPU has run this yet.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import model
from backends.config import ModelConfig
from backends.decoder import Decoder
from common.errors import run_guarded
from common.memory import logits_bytes, training_bytes
from model import LM
from speed.check_training import (
    CPU_SIZES,
    Place,
    Prompts,
    Sizes,
    compare_decoders,
    compare_with_writing_on_cpu,
    learn_on_4_bits,
    repeat_step,
    resume_on_cpu,
    take_step,
    train_in_all_ways,
)
from speed.findings import Check, Finding, at_most, check_device
from speed.trees import ROOT

GPU_SIZES = Sizes(width=1024, layers=12, texts=32, length=512, decoded=64, skipped_ways=0)
# A tiny agent for bench.py, whose speed counts and not what it has learned.
BENCH_TRAINING = (
    "--base_tokens=60000 --train_scale=1 --coa=60 --cot=20 --pairs=20 --epochs=1 --max_len=160"
).split()


def open_place(device: str, folder: Path) -> Place:
    """Return the place of torch's device "cuda" or "cpu". folder: for checkpoints."""
    on_gpu = device == "cuda"
    sizes = GPU_SIZES if on_gpu else CPU_SIZES
    return Place("torch", device, on_gpu, sizes, folder)


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
        losses.append(take_step(lm, "nll", texts, rate=0.0)["loss"])
    if place.on_gpu:
        torch.set_float32_matmul_precision("high")
    apart = float((logits[0] - logits[1]).abs().max())
    yield at_most("logits, CPU and device: how far apart", apart, 1e-4)
    yield at_most("loss, CPU and device: how far apart", abs(losses[0] - losses[1]), 1e-5)


# ---- 3. Training ---------------------------------------------------------------------------------
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
            _synchronize(place)
            started = time.perf_counter()
            take_step(lm, "nll", texts, 1e-4, optimizer)
            _synchronize(place)
            seconds = time.perf_counter() - started
        name = f"training, {dtype}, products {precision}{', compiled' if compiled else ''}"
        yield Finding(name, "", f"{tokens / seconds:,.0f} tokens/s")
    torch.set_float32_matmul_precision(before)


# ---- 4. Decoding ---------------------------------------------------------------------------------
def time_decoding(place: Place) -> Iterator[Finding]:
    """Time a token in slots that rows share and in fixed ones, with and without cuDNN's attention.

    The backend turns that off, since it plans anew for each length; in fixed slots none changes.
    """
    lm = place.large_network(dtype="bfloat16")
    try:
        for kind, in_fixed_slots in (("shared", False), ("fixed", True)):
            for state, is_on in (("off", False), ("on", True)):
                torch.backends.cuda.enable_cudnn_sdp(is_on)
                seconds = min(_write(place, lm, in_fixed_slots) for _ in range(2))
                rows = place.sizes.texts
                name = f"a token of {rows} rows, {kind} slots, cuDNN's attention {state}"
                yield Finding(name, "", f"{1000 * seconds / place.sizes.decoded:.2f} ms")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(not place.on_gpu)


def count_launches(place: Place) -> Iterator[Finding]:
    """Count what a token of decoding asks of the device, and how often it waits.

    It is what a longer text asks for more than a shorter one. Both begin in a decoder that has read
    its prompts, with the same steps in which kernels are chosen and a graph is recorded.
    """
    lm = place.large_network()
    _write(place, lm, place.on_gpu)
    shorter = place.sizes.decoded // 2
    tokens = place.sizes.decoded - shorter
    before = _count_calls(place, lm, shorter)
    after = _count_calls(place, lm, place.sizes.decoded)
    # CUDA has a graph at each token, and a look at each eighth. A CPU has neither.
    for name, words, limit in (
        ("launches of kernels and graphs", ("LaunchKernel", "GraphLaunch"), 2.0),
        ("waits for the device", ("StreamSynchronize", "DeviceSynchronize"), 0.25),
    ):
        launched = _sum_of(after, words) - _sum_of(before, words)
        yield at_most(f"{name}, a token", launched / tokens, limit)
    operations = _sum_of(after, ("aten::",)) - _sum_of(before, ("aten::",))
    yield Finding("operations of torch, a token", "", f"{operations / tokens:,.3g}")


def _count_calls(place: Place, lm: LM, count: int) -> dict[str, int]:
    """Return how often each call is made while all rows write so many tokens."""
    kinds = [ProfilerActivity.CPU]
    if place.on_gpu:
        kinds.append(ProfilerActivity.CUDA)
    prompts = [text.ids for text in place.texts()]
    decoder = lm.decoder(prompts)
    _synchronize(place)
    with profile(activities=kinds) as profiler:
        decoder.decode([], [count] * len(prompts), 0.0)
        _synchronize(place)
    return {event.key: event.count for event in profiler.key_averages()}


def _sum_of(counts: dict[str, int], words: tuple[str, ...]) -> int:
    """Return how often the calls are made whose names have one of some words."""
    return sum(count for name, count in counts.items() if any(word in name for word in words))


def compare_ways_to_write(place: Place) -> Iterator[Finding]:
    """Write on the CPU and on the device, there in slots that rows share and in fixed ones.

    Fixed slots are how a GPU decodes (fixed_slots.py).
    """
    # pick_device has turned TF32 on.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield from compare_with_writing_on_cpu(place)
    lm = model.load(place.folder / "writer", place.settings())

    def open_decoder(in_fixed_slots: bool, prompts: Prompts) -> Decoder:
        decoder = lm.decoder(prompts)
        decoder.in_fixed_slots = in_fixed_slots
        return decoder

    openers = [partial(open_decoder, in_fixed_slots) for in_fixed_slots in (False, True)]
    yield from compare_decoders(place, "shared and fixed slots", openers)
    torch.set_float32_matmul_precision(before)


# ---- 5. Memory -----------------------------------------------------------------------------------
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
        take_step(lm, "nll", place.texts(), 1e-4, optimizer)
    counted = sum(training_bytes(lm.network.config, place.settings(), False, 4).values())
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    reserved = torch.cuda.memory_reserved()
    yield Finding(
        "weights, gradients and optimizer",
        f"{counted / 1e6:,.0f} MB by the estimate, within 10%",
        f"{held / 1e6:,.0f} MB",
        abs(held / counted - 1) < 0.1,
    )
    tokens = sum(len(text.ids) for text in place.texts())
    limit = counted + activation_bytes(lm.network.config, tokens)
    yield at_most("the most that was allocated", peak / 1e9, limit / 1e9, " GB")
    yield at_most("reserved over the most that was allocated", reserved / (peak + before), 1.3)


def activation_bytes(config: ModelConfig, tokens: int) -> int:
    """Return the bytes at most of a step in float32, beside what training_bytes counts.

    A layer keeps for its gradient what goes into and out of its two norms, queries, keys and values
    with what attention makes of them, and four arrays of the feed-forward network. The layer that
    is at work holds as much again. Of logits there are six: divided by the temperature, as
    log-probabilities, and the gradients.
    """
    query_size = config.shape_of("q_proj")[0]
    key_size = config.shape_of("k_proj")[0]
    feed_forward = config.shape_of("gate_proj")[0]
    of_layer = 4 * config.hidden_size + 5 * query_size + 2 * key_size + 4 * feed_forward
    layers = config.num_hidden_layers + 1
    return 4 * tokens * layers * of_layer + 6 * logits_bytes(config, tokens)


# ---- 6. Beside a library -------------------------------------------------------------------------
def compare_with_transformers(place: Place) -> Iterator[Finding]:
    """Train a tiny agent on the device, and run bench.py on it, in processes of their own."""
    if not place.on_gpu:
        # It is slow on a CPU, where a test runs it by itself.
        return
    yield from run_bench(place, [], ["--only=answer,sampling,agents,sft", "--repeats=3"])


def run_bench(place: Place, training: list[str], options: list[str]) -> Iterator[Finding]:
    """Train an agent and run bench.py on it; yield how many times as fast as a library ours is.

    training: more settings of the agent. options: of bench.py.
    """
    _run_script(place, "train_sft.py", f"--device={place.device}", *BENCH_TRAINING, *training)
    _run_script(place, "bench.py", "--start=sft3", *options)
    measured = json.loads((place.folder / "out" / "bench" / "bench.jsonl").read_text())
    for row in measured["comparisons"]:
        ratio = row["ratio"]
        yield Finding(
            f"bench.py: {row['name']}, times as fast as {row['beside']}",
            "",
            f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})",
        )


def _run_script(place: Place, script: str, *options: str) -> None:
    """Run a script of the project; its run lies in the place's folder.

    Raises RuntimeError with its last line of errors.
    """
    done = subprocess.run(
        [sys.executable, ROOT / script, "--run=bench", "--backend=torch", *options],
        cwd=place.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last_line = (done.stderr.splitlines() or [""])[-1]
        raise RuntimeError(f"{script}: {last_line}")


# ---- what the checks share -----------------------------------------------------------------------
def _write(place: Place, lm: LM, in_fixed_slots: bool) -> float:
    """Return the seconds in which rows write greedily, each after another text."""
    prompts = [text.ids for text in place.texts()]
    decoder = lm.decoder(prompts)
    decoder.in_fixed_slots = in_fixed_slots
    _synchronize(place)
    started = time.perf_counter()
    decoder.decode([], [place.sizes.decoded] * len(prompts), 0.0)
    _synchronize(place)
    return time.perf_counter() - started


def _synchronize(place: Place) -> None:
    """Wait until the device has done what it was told."""
    if place.on_gpu:
        torch.cuda.synchronize()


# ---- the report ----------------------------------------------------------------------------------
CHECKS: tuple[Check, ...] = (
    describe_machine,
    compare_with_cpu,
    train_in_all_ways,
    repeat_step,
    resume_on_cpu,
    learn_on_4_bits,
    compare_memory,
    compare_ways_to_write,
    count_launches,
    time_decoding,
    climb_speed_ladder,
    compare_with_transformers,
)


def main() -> None:
    """Check the device that is named, CUDA by itself; exit 1 where a check failed."""
    device = (sys.argv[1:] or ["cuda"])[0]
    model.choose_backend("torch").pick_device(device)
    check_device(CHECKS, partial(open_place, device), Path("out", "gpu_check.json"))


if __name__ == "__main__":
    run_guarded(main)
