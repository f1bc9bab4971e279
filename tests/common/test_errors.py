"""How a script ends: signals, locks, readers that leave, terminals, and hostile text."""

import errno
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here, strict_json

import plot
from common.errors import OutageError, UserError, run_guarded
from common.files import only_process, to_json
from common.progress import tqdm
from common.run_record import read_run_record
from common.settings import RunSettings, main
from common.terminal import own_output, printable
from environments.cost_logs import Ledger, stage_points
from environments.costs import read_curve
from environments.distilled import read_cost, read_examples
from environments.trades import read_trade_offs
from evaluation.fidelity import read_fidelity
from evaluation.figures import read_figures

# Scripts whose first import is common.errors.
SCRIPTS = (
    "train_sft.py",
    "train_rl.py",
    "eval.py",
    "autocoa.py",
    "world_model.py",
    "plot.py",
    "tools.py",
    "bench.py",
)


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


@pytest.mark.parametrize("content", ["null", "[1]", '{"tokens": []}', "[" * 200_000, "\xff", "[1"])
def test_damaged_files_of_a_run(content: str, tmp_path: Path) -> None:
    """Whatever became of one, who reads it names it in one line. Guards: tracebacks of each."""
    root = tmp_path / "out" / "a"
    readers: dict[str, Callable[[Path], Any]] = {
        "settings.json": lambda path: read_run_record(str(root)),
        "eval.json": read_figures,
        "fidelity.json": read_fidelity,
        "cost_curve.json": read_curve,
        "trade_offs.json": read_trade_offs,
        "predictions.jsonl": lambda path: plot.read_run(root),
        "rl1/log.jsonl": lambda path: plot.read_run(root),
        "rl1/rollouts.jsonl": plot.read_rollouts,
        "rl1/calls.jsonl": lambda path: stage_points(path.parent, Ledger()),
        "world_model/cost.json": lambda path: read_cost(path.parent),
        "world_model/examples.jsonl": lambda path: read_examples(path.parent),
    }
    for name, read in readers.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=re.escape(path.name)) as refusal:
            read(path)
        assert len(str(refusal.value)) < 500
        path.unlink()


@pytest.mark.parametrize(("can_resume", "way_on"), [(True, "--resume"), (False, "same command")])
def test_a_service_that_stays_down(
    capsys: pytest.CaptureFixture[str], can_resume: bool, way_on: str
) -> None:
    """The line says how this script goes on. Guards: a --resume that a script does not have."""

    def fail() -> None:
        raise OutageError("the server is down")

    with pytest.raises(SystemExit) as end:
        run_guarded(fail, can_resume)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: the server is down; .*{way_on}", line)


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
@pytest.mark.usefixtures("signals_of_a_shell")
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
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "stopped before anything was done\n"


def test_a_reader_that_leaves() -> None:
    """`--help | head -1` ends without a word. Guards: BrokenPipeError after the first line."""
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


@pytest.mark.usefixtures("signals_of_a_shell")
def test_a_terminal_that_is_gone(tmp_path: Path) -> None:
    """SIGHUP comes with it, and work is saved although nothing can be printed any more.

    Guards: an error of writing to the terminal, before the checkpoint was saved; the SIGHUP of the
    terminal's shell, which comes after the terminal's own, taken for a wish to stop at once.
    """
    program = """
import os, sys, time
from common.errors import run_guarded
from common.signals import defer_stop, end_deferral, waiting_signal
def work():
    defer_stop()
    print("ready", flush=True)
    while waiting_signal() is None or not os.path.exists("all_sent"):
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
    # A terminal hands a line over in pieces, and the child must have written all of it.
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(terminal, 100)
    assert line == b"ready\r\n"
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "all_sent").touch()
    assert process.wait(20) == 128 + signal.SIGHUP
    assert (tmp_path / "saved").exists()


# ---- hostile text --------------------------------------------------------------------------------
HOSTILE = "Who?\x1b[2J\x9b1m\r\u202e"
ESCAPED = r"Who?\x1b[2J\x9b1m\r\u202e"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Wer ist \u00c9va?\n\t\u6771\u4eac \U0001f600", None),
        ("\x1b[2J \x9b2J \x00 \r \x7f", r"\x1b[2J \x9b2J \x00 \r \x7f"),
        ("a\u202eb\u2066c\u2028d", r"a\u202eb\u2066c\u2028d"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_printable(text: str, shown: str | None) -> None:
    """What steers a terminal, or turns text around, is spelled out; all else stays (None)."""
    assert printable(text) == (text if shown is None else shown)


def test_nothing_that_is_printed_steers_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a script prints is spelled out; colours of our own are not.

    Its first line repeats the command line, and with it a question.
    """

    def run(settings: RunSettings) -> None:
        print("printed", HOSTILE)
        tqdm.write(f"beside a bar {HOSTILE}")
        print("\x1b[32min colour", file=own_output())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a.py", f"--run={HOSTILE}"])
    main(run, RunSettings, "")
    assert capsys.readouterr().out == (
        f"a.py: run {ESCAPED}, seed 0; set here: run={ESCAPED}\n"
        f"printed {ESCAPED}\nbeside a bar {ESCAPED}\n\x1b[32min colour\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        UserError(f"in one line: {HOSTILE}"),
        OSError(errno.ENOSPC, "no room", HOSTILE),
        AssertionError(HOSTILE),
    ],
)
def test_no_error_steers_a_terminal(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a line, which may hold a server's words, nor the traceback of a bug."""

    def fail() -> None:
        raise error

    try:
        run_guarded(fail)
    except SystemExit:
        pass
    except AssertionError:
        sys.excepthook(AssertionError, error, error.__traceback__)
    printed = capsys.readouterr().err
    assert ESCAPED in printed
    assert not set(printed) & set("\x1b\x9b\r\u202e")


def test_every_script_guards_what_it_prints() -> None:
    """Guards: a script that neither ends with one line nor escapes what it prints."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[!.t]*/*.py")):
        _, is_script, ending = path.read_text().partition('if __name__ == "__main__":')
        assert not is_script or re.search(r"run_guarded\(|\bmain\(\w+, \w+Settings", ending), path
