"""The scripts under torchrun and mlx.launch, tiny, start to end (common/ranks.py)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_rows, run_in_shell

TINY = (
    "--run=tiny --width=64 --layers=1 --base_tokens=60000 --train_scale=1 --coa=60 --cot=20"
    " --pairs=20 --epochs=1 --max_len=160 --rl1_steps=4 --rl2_steps=2 --questions=4 --rollouts=3"
    " --eval_questions=2 --world_model_width=64 --world_model_layers=1 --sweep_share=0.02"
    " --world_model_epochs=2 --batch_rows=64"
).split()
SUPERVISED = ("base", "sft2", "sft3", "world_model")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--")
MLX_LAUNCH = (
    str(Path(sys.executable).with_name("mlx.launch")),
    "-n=2",
    f"--python={sys.executable}",
    "--",
)
TIMES = {"seconds", "tokens_per_second"}


def start(cwd: Path, *command: str) -> subprocess.Popen:
    """Begin two processes of a script; the last arguments are its own."""
    arguments = [str(ROOT / part) if part.endswith(".py") else part for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(cwd / "errors", "w") as errors:
        return subprocess.Popen(
            [sys.executable, *TORCHRUN, *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def wait_for_steps(log: Path, steps: int) -> None:
    """Wait until a stage that is being trained has logged some steps."""
    while not log.is_file() or len(log.read_text().splitlines()) < steps:
        time.sleep(0.02)


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """Return the process ids of the ranks, in order."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return sorted(int(line) for line in found.stdout.split())


def assert_logs_agree(alone: Path, together: Path) -> None:
    """Compare the figures of all steps of the supervised stages, but for times."""
    for stage in SUPERVISED:
        rows = read_rows(together / stage / "log.jsonl")
        for row, expected in zip(rows, read_rows(alone / stage / "log.jsonl"), strict=True):
            for name in expected.keys() - TIMES:
                assert row[name] == pytest.approx(expected[name], abs=1e-3), (stage, name)


def train_and_judge(cwd: Path, *launcher: str, options: tuple[str, ...] = ()) -> Path:
    """Run the three scripts, and return the folder of the run."""
    cwd.mkdir()
    for script in ("train_sft.py", "train_rl.py", "eval.py"):
        arguments = [*TINY, *options] if script == "train_sft.py" else ["--run=tiny"]
        done = run_in_shell(cwd, *launcher, str(ROOT / script), *arguments, timeout=900)
        assert done.status == 0, done.err[-2000:]
    return cwd / "out" / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_two_processes_do_what_one_does(tmp_path: Path, backend: str) -> None:
    """Losses, files, and which questions each row answers; under each backend's own launcher."""
    launcher = TORCHRUN if backend == "torch" else MLX_LAUNCH
    options = (f"--backend={backend}",)
    alone = train_and_judge(tmp_path / "alone", options=options)
    together = train_and_judge(tmp_path / "together", *launcher, options=options)
    assert_logs_agree(alone, together)
    files = [
        {str(path.relative_to(root)) for path in root.rglob("*")} for root in (alone, together)
    ]
    assert files[0] == files[1]
    answers = [
        [(row["id"], row["row"]) for row in read_rows(root / "predictions.jsonl")]
        for root in (alone, together)
    ]
    assert answers[0] == answers[1]


def kill_second(launcher: subprocess.Popen) -> None:
    os.kill(workers_of(launcher)[1], signal.SIGKILL)


def stop_all(launcher: subprocess.Popen) -> None:
    launcher.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_two_processes_end_together_and_go_on(tmp_path: Path) -> None:
    """A process that is killed, and Ctrl-C; both end the run within a minute, and it resumes.

    The end has the bytes of a run in one go by two processes.
    """
    whole = train_and_judge(tmp_path / "whole", *TORCHRUN, options=("--backend=torch",))
    cwd = tmp_path / "interrupted"
    cwd.mkdir()
    root = cwd / "out" / "tiny"

    def interrupt(stage: str, end: Callable[[subprocess.Popen], None], *command: str) -> Any:
        launcher = start(cwd, *command)
        wait_for_steps(root / f"{stage}.partial" / "log.jsonl", 2)
        end(launcher)
        assert launcher.wait(60) != 0
        return (cwd / "errors").read_text()

    def go_on(script: str) -> None:
        arguments = (str(ROOT / script), "--run=tiny", "--resume")
        done = run_in_shell(cwd, *TORCHRUN, *arguments, timeout=900)
        assert done.status == 0, done.err[-2000:]

    errors = interrupt("base", kill_second, "train_sft.py", *TINY, "--backend=torch")
    # Rank 0's own line; torchrun too names the signal that ended the other one.
    assert errors.count("\nerror: another process has ended") == 1
    assert "go on with: the same torchrun command and --resume" in errors
    go_on("train_sft.py")

    errors = interrupt("rl1", stop_all, "train_rl.py", "--run=tiny")
    assert errors.count("stopped; what is finished is kept") == 1
    assert list((root / "rl1.checkpoint").iterdir())
    go_on("train_rl.py")
    for stage in (*SUPERVISED, "rl1", "rl2"):
        weights = [folder / stage / "model.safetensors" for folder in (whole, root)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), stage
