"""What the tests share: a tokenizer of whole words, small random networks, a shell and a server."""

import contextlib
import io
import json
import os
import platform
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
# MLX may multiply float32 in TF32 on a GPU, with three digits: too few to compare the twins.
os.environ["MLX_ENABLE_TF32"] = "0"
torch.set_num_threads(1)
# Tests that don't say which backend they mean, mean torch: on Apple silicon too.
platform.machine = lambda: "any"
# Nor do they depend on whether this CPU has bfloat16, which --dtype=auto would take.
torch.cpu.get_capabilities = dict

import model
from backends.config import nano_config
from common.settings import ModelSettings
from data.batches import Batch, pack_texts
from data.trajectory import Codec, Role, Trajectory
from model import LM
from nano.tokenizer import train_tokenizer

WORDS = (
    " Who directed it starred in director star of Silver River Iron Hill film a the Eva Moss"
    " Ada Falk Carl Hart is was Hm I recall so It was directed by. Its star is Not found:"
    " yes, no? A B C D x y 1950 1999 and search nothing else."
)
CPU = ModelSettings(device="cpu")


@pytest.fixture
def signals_of_a_shell() -> Iterator[None]:
    """SIGINT and SIGHUP as a command in a terminal has them.

    Guards: `nohup bash test.sh &`, which ignores both, and so do its child processes.
    """
    before = {}
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        before[number] = signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# The longest files come first, so that two workers end at about the same time.
LONGEST_FILES = ("test_scripts.py", "test_adapters.py", "test_twins.py", "test_real.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the longest files first, and give slow tests hours instead of minutes."""

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONGEST_FILES:
            return LONGEST_FILES.index(item.path.name)
        return len(LONGEST_FILES)

    items.sort(key=rank)
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.timeout(3 * 3600))


@pytest.fixture(scope="session")
def codec() -> Codec:
    """Return the codec of a byte-level tokenizer in which every word of WORDS is one token."""
    return Codec(train_tokenizer(600, [WORDS] * 50))


def tiny_lm(
    codec: Codec,
    seed: int = 0,
    width: int = 64,
    architecture: str = "LlamaForCausalLM",
    tie_embeddings: bool = True,
    noise: float = 0.0,
) -> LM:
    """Return a random two-layer network for a tokenizer.

    noise: standard deviation of what is added to every weight, so that gains and biases matter.
    """
    config = nano_config(
        len(codec.tokenizer), codec.eos_id, codec.tokenizer.bos_token_id, width, layers=2
    )
    config.architectures = [architecture]
    config.tie_word_embeddings = tie_embeddings
    lm = model.new(config, codec.tokenizer, seed, CPU)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.network.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return lm


@pytest.fixture(scope="session")
def lm(codec: Codec) -> LM:
    """Return a tiny network whose weights are all random."""
    return tiny_lm(codec, noise=0.1)


def mlx_twin(lm: LM) -> LM:
    """Return the same network in MLX."""
    import backends.mlx as mlx_backend

    network = mlx_backend.build(lm.network.config)
    state = {name: weight.detach().numpy() for name, weight in lm.network.named_parameters()}
    mlx_backend.set_weights(network, state, "a test")
    return LM(network, lm.codec.tokenizer, mlx_backend)


def pack_rows(ids: np.ndarray, mask: np.ndarray) -> Batch:
    """Return rows of one length as a batch; what a backend says of its nodes reshapes to them.

    ids, mask: (B, T).
    """
    roles = [int(Role.THINK)] * ids.shape[1]
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return pack_texts([Trajectory(row, row_mask, roles) for row, row_mask in rows])


def run_in_shell(
    cwd: Path, *command: str, timeout: int = 120, threads: str = "1", **environment: str
) -> SimpleNamespace:
    """Run `python` with these arguments as a user does, in a folder of its own.

    A script is named by its file in the project, a module by "-m" and its name.
    """
    arguments = [str(ROOT / command[0]) if command[0].endswith(".py") else command[0], *command[1:]]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
            **environment,
        },
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def run_here(cwd: Path, script: str, *arguments: str | Path) -> SimpleNamespace:
    """Run a script in this process, which has loaded torch already: four seconds less for each.

    script: "train_sft.py", or a module such as "data.show".
    """
    out = io.StringIO()
    err = io.StringIO()
    status: Any = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def read_rows(path: Path) -> list[Any]:
    """Return the values of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def strict_json(text: str) -> Any:
    """Return JSON as every program reads it: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def serve() -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    """Return a function that starts an HTTP server for a handler and returns its address."""
    started: list[ThreadingHTTPServer] = []

    def start(handler: type[BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        # A short poll, or each test would wait half a second for its end.
        run = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        run.start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
