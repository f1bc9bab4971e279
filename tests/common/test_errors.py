"""How a script ends: signals, locks, readers that leave, and terminals that are gone."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here, strict_json

from common.errors import UserError
from common.files import only_process, to_json

# Scripts whose first import is common.errors.
SCRIPTS = ("train_sft.py", "eval.py")


def run_python(program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that imports only light files of the project."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("environment", {})}
    return subprocess.run(
        program,
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        **options,
    )


# ---- JSON ----------------------------------------------------------------------------------------
def test_json_has_no_nan() -> None:
    """A number that is not finite is null, however deep it lies; all else is as json writes it."""
    value = {"a": [1.5, float("nan"), {"b": float("-inf")}], "c": (1, "é"), "d": None}
    assert strict_json(to_json(value)) == {"a": [1.5, None, {"b": None}], "c": [1, "é"], "d": None}
    assert to_json({"a": 1}, indent=1) == '{\n "a": 1\n}'


# ---- one process at a time -----------------------------------------------------------------------
def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """Until the first has ended, and a kill ends it too. A folder that stays empty leaves."""
    folder = tmp_path / "out" / "nano"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with only_process(folder):
            os.write(writer, b"locked")
            signal.pause()
    assert os.read(reader, 6) == b"locked"
    with pytest.raises(UserError, match=r"out/nano: another command works in it; wait until it"):
        only_process(folder).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with only_process(folder):
        (folder / "a").write_text("")
    with only_process(folder):
        (folder / "a").unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py"])
def test_a_run_that_is_being_trained(tmp_path: Path, script: str) -> None:
    """One line, and nothing is touched."""
    with only_process(tmp_path / "out" / "a"):
        done = run_here(tmp_path, script, "--run=a")
        assert done.status == 2
        assert done.err == (
            "error: out/a: another command works in it; wait until it ends, or take another --run\n"
        )
        assert list((tmp_path / "out" / "a").iterdir()) == []


# ---- signals and readers -------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_a_script_is_imported(tmp_path: Path, script: str) -> None:
    """Ctrl-C in the first second is one line. Guards: thirty lines of imports."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsum(range(10**7))\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "stopped before anything was done\n"


def test_a_reader_that_leaves() -> None:
    """`--help | head -1` ends without a word. Guards: BrokenPipeError behind the first line."""
    program = "from common.settings import RunSettings, main; main(print, RunSettings, 'A doc.')"
    done = run_python(f'set -o pipefail; "{sys.executable}" -c "{program}" --help | true')
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == ""


def test_a_terminal_that_is_not_utf_8(tmp_path: Path) -> None:
    """What it lacks is shown as an escape."""
    program = "from common.settings import RunSettings, main; main(print, RunSettings, '')"
    done = run_python(
        f'"{sys.executable}" -c "{program}" --run=é',
        cwd=tmp_path,
        environment={"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert r"run \xe9, seed 0" in done.stdout


def test_a_terminal_that_is_gone(tmp_path: Path) -> None:
    """SIGHUP comes with it, and work is saved although nothing can be printed any more.

    Guards: an error of writing to the terminal, before the checkpoint was saved.
    """
    program = """
import sys, time
from common.errors import run_guarded
from common.signals import defer_stop, end_deferral, is_stop_asked
def work():
    defer_stop()
    print("ready", flush=True)
    while not is_stop_asked():
        time.sleep(0.01)
    print("a step", flush=True)
    print("a bar", file=sys.stderr, flush=True)
    open("saved", "w").close()
    end_deferral()
run_guarded(work, can_resume=True)
"""
    terminal, terminal_of_child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=terminal_of_child,
        stderr=terminal_of_child,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    os.close(terminal_of_child)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 128 + signal.SIGHUP
    assert (tmp_path / "saved").exists()
