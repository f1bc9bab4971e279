"""What the tests share: a tokenizer in which each word is one token, small networks with random weights, and a shell."""
import contextlib
import io
import json
import os
import platform
import runpy
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
platform.machine = lambda: "any"        # tests that don't say which backend they mean, mean torch, on Apple silicon too

import model    # noqa: E402  (after the path is set)
import skills   # noqa: E402
from autocoa import Codec   # noqa: E402

WORDS = """ Who directed it starred in director star of Silver River Iron Hill film a the Eva Moss Ada Falk Carl Hart is was
 Hm I recall so It was directed by. Its star is Not found: yes, no? A B C D x y 1950 1999 and search nothing else."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a minute; left out of the fast suite")


@pytest.fixture(scope="session")
def codec():
    """A nano tokenizer: byte-level, the tags single tokens, every word of WORDS one token."""
    return Codec(skills.nano_tokenizer(600, [WORDS] * 50))


def tiny(codec, seed=0, width=64, arch="LlamaForCausalLM", tie=True, spread=0.0):
    """A random two-layer network for this tokenizer. spread: noise on every weight, so that gains and biases matter too."""
    config = model.nano_config(len(codec.tok), codec.eos, codec.tok.bos_token_id, width, 2)
    config.architectures, config.tie_word_embeddings = [arch], tie
    lm = model.new(config, codec.tok, seed, "cpu")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in lm.model.parameters():
            p.add_(spread * torch.randn_like(p))
    return lm


@pytest.fixture(scope="session")
def lm(codec):
    return tiny(codec, spread=0.1)


def twin(lm):
    """The same network in MLX."""
    import model_mlx
    network = model_mlx.build(lm.model.config)
    model_mlx.put(network, {n: p.detach().numpy() for n, p in lm.model.named_parameters()}, "x")
    return model.LM(network, lm.codec.tok, model_mlx)


def shell(cwd, script, *args, timeout=120, threads="1", **environment):
    """A script of the project, run as a user runs it, in a folder of its own."""
    done = subprocess.run([sys.executable, ROOT / script, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": threads, **environment})
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def run_script(cwd, name, *args):
    """The same in this process, which has loaded torch already: four seconds less for each."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            status = e.code or 0
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def strict(text):
    """JSON as every program reads it: NaN and Infinity are not JSON."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def serve():
    """Start an HTTP server on a free loopback port -> its address; all are stopped at the end."""
    started = []

    def start(handler_or_server):
        server = handler_or_server if isinstance(handler_or_server, ThreadingHTTPServer) else ThreadingHTTPServer(("127.0.0.1", 0), handler_or_server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"
    yield start
    for server in started:
        server.shutdown()
        server.server_close()
