"""Check MLX on Apple's GPU: what was expected and what was seen, line by line.

    bash gpu_check.sh --backend=mlx     # Metal, under ten minutes; out/metal_check.json
    python -m speed.metal_check cpu     # the same checks, tiny, on a CPU

Where MLX finds no GPU, it says so and takes the CPU. A check that breaks is one line of the report,
and the others go on. Nobody has tried this on Apple silicon yet: what it sees there is unknown.
"""

import os
import platform
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

import model
from common.errors import run_guarded
from speed.check_training import (
    CPU_SIZES,
    Place,
    Sizes,
    compare_with_writing_on_cpu,
    learn_on_4_bits,
    repeat_step,
    resume_on_cpu,
    take_step,
    train_in_all_ways,
)
from speed.findings import Check, Finding, at_most, check_device

# Smaller than CUDA's: macOS ends a command that keeps the GPU busy for too long.
GPU_SIZES = Sizes(width=512, layers=4, texts=8, length=128, decoded=64, skipped_ways=0)


def open_place(device: str, folder: Path) -> Place:
    """Return the place of MLX's device "auto" or "cpu". folder: for checkpoints."""
    on_gpu = device == "auto" and mx.is_available(mx.gpu)
    sizes = GPU_SIZES if on_gpu else CPU_SIZES
    return Place("mlx", device, on_gpu, sizes, folder)


# ---- 1. The machine ------------------------------------------------------------------------------
def describe_machine(place: Place) -> Iterator[Finding]:
    """Say what is checked."""
    yield Finding("Python, mlx", "", f"{platform.python_version()}, {version('mlx')}")
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    yield Finding("system", "", f"{system}, {platform.machine()}")
    if not place.on_gpu:
        yield Finding("device", "", "cpu")
        return
    properties = mx.device_info()
    memory = int(properties["memory_size"]) / 2**30
    yield Finding("device", "", f"{properties['device_name']}, {memory:.0f} GiB")
    yield Finding("--dtype=auto", "", model.fast_dtype(place.settings()))


# ---- 2. The same values as a CPU -----------------------------------------------------------------
def compare_with_cpu(place: Place) -> Iterator[Finding]:
    """Compare logits and loss of a nano network on the CPU's stream and on the GPU's."""
    texts = place.texts()
    ids = np.array([text.ids for text in texts])
    logits = []
    losses = []
    for device in ("cpu", place.device):
        lm = place.network(128, 4, device=device)
        states = lm.network(mx.array(ids))
        logits.append(np.array(lm.network.logits(states)))
        losses.append(take_step(lm, "nll", texts, rate=0.0)["loss"])
    apart = float(np.abs(logits[0] - logits[1]).max())
    yield at_most("logits, CPU and device: how far apart", apart, 1e-4)
    yield at_most("loss, CPU and device: how far apart", abs(losses[0] - losses[1]), 1e-5)


# ---- the report ----------------------------------------------------------------------------------
CHECKS: tuple[Check, ...] = (
    describe_machine,
    compare_with_cpu,
    train_in_all_ways,
    learn_on_4_bits,
    compare_with_writing_on_cpu,
    repeat_step,
    resume_on_cpu,
)


def main() -> None:
    """Check Apple's GPU, or the CPU where there is none or it is named; exit 1 for a failure."""
    # With three digits, which newer GPUs would take, nothing could be compared with a CPU. MLX
    # reads this at its first product.
    os.environ["MLX_ENABLE_TF32"] = "0"
    device = (sys.argv[1:] or ["auto"])[0]
    model.choose_backend("mlx").pick_device(device)
    if device == "auto" and not mx.is_available(mx.gpu):
        print("mlx finds no GPU on this machine: these are the same checks, tiny, on its CPU")
    check_device(CHECKS, partial(open_place, device), Path("out", "metal_check.json"))


if __name__ == "__main__":
    run_guarded(main)
