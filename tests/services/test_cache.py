"""The cache of answers: shared by processes, set aside when broken (services/cache.py)."""

import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from common.errors import UserError, run_guarded
from services.cache import Cache

NO_DATABASE = b"not a database, but long enough to be taken for one" * 50
FILL = """
import sys
from services.cache import Cache

cache = Cache(sys.argv[1])
for number in range(60):
    cache.put(sys.argv[2], number, answer=[sys.argv[2]])
"""


def test_an_answer_is_kept(tmp_path: Path) -> None:
    """Keys of several parts differ in each part; a second answer takes the place of the first."""
    cache = Cache(tmp_path / "c.sqlite")
    assert cache.get("river", 2, "en") is None
    cache.put("river", 2, "en", answer=[["title", "text"]])
    assert cache.get("river", 2, "en") == [["title", "text"]]
    assert cache.get("river", 3, "en") is None
    cache.put("river", 2, "en", answer=[])
    assert Cache(tmp_path / "c.sqlite").get("river", 2, "en") == []


def test_a_broken_file_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty one is begun, and the broken one stays as it was under another name."""
    path = tmp_path / "c.sqlite"
    path.write_bytes(NO_DATABASE)
    cache = Cache(path)
    assert "can't be read" in capsys.readouterr().out
    (broken,) = tmp_path.glob("c.sqlite.broken-*")
    assert broken.read_bytes() == NO_DATABASE
    cache.put("a", answer=1)
    assert Cache(path).get("a") == 1


def test_a_file_that_is_damaged_further_in_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It opens well, and pages in its middle are no pages.

    Guards: a traceback at the first query that met such a page, in this run and in every other.
    """
    path = tmp_path / "c.sqlite"
    cache = Cache(path)
    for number in range(600):
        cache.put(number, answer="x" * 300)
    cache.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cache.database.close()
    raw = bytearray(path.read_bytes())
    page = 4096
    raw[page * 8 : -page * 4] = b"\xff" * (len(raw) - page * 12)
    path.write_bytes(raw)
    cache = Cache(path)
    assert not list(tmp_path.glob("*.broken*"))
    answers = [cache.get(number) for number in range(600)]
    assert answers.count(None) > 300
    cache.put(1, answer=2)
    assert cache.get(1) == 2
    assert len(list(tmp_path.glob("c.sqlite.broken-*"))) == 1
    assert capsys.readouterr().out.count("can't be read") == 1


def test_two_that_find_one_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second uses the file that the first began, and the broken one stays as it was.

    Guards: a new file that is set aside in turn, over the old one.
    """
    path = tmp_path / "c.sqlite"
    path.write_bytes(NO_DATABASE)
    both_failed = threading.Barrier(2)
    set_aside = Cache._set_aside

    def set_aside_when_both_failed(cache: Any, error: Any) -> None:
        both_failed.wait(timeout=20)
        set_aside(cache, error)

    monkeypatch.setattr(Cache, "_set_aside", set_aside_when_both_failed)
    caches = []
    threads = [threading.Thread(target=lambda: caches.append(Cache(path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = caches
    first.put("a", answer=1)
    assert second.get("a") == 1
    (broken,) = tmp_path.glob("*.broken-*")
    assert broken.read_bytes() == NO_DATABASE
    assert capsys.readouterr().out.count("can't be read") == 1


def test_a_table_of_another_kind_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE answers (x TEXT)")
    assert Cache(path).get("a") is None
    assert list(tmp_path.glob("c.sqlite.broken-*"))


@pytest.mark.parametrize("answer", ['[["t", ', b"\xff\xfe", "[" * 100_000])
def test_a_damaged_row_counts_as_missing(tmp_path: Path, answer: Any) -> None:
    """It may be no JSON, or no text."""
    cache = Cache(tmp_path / "c.sqlite")
    cache.put("a", answer=1)
    cache.database.execute("UPDATE answers SET said = ?", (answer,))
    assert cache.get("a") is None


@pytest.mark.parametrize("damage", ['[["t", ', b"\xff\xfe"])
@pytest.mark.parametrize("column", ["asked", "said"])
def test_all_answers_are_listed(tmp_path: Path, column: str, damage: Any) -> None:
    """Each key with its answer, in the order of the keys; a damaged row is left out."""
    cache = Cache(tmp_path / "c.sqlite")
    assert cache.items() == []
    cache.put("river", 2, "en", answer=[["title", "text"]])
    cache.put("hill", 2, "en", answer=[])
    cache.put("broken", answer=1)
    cache.put("hill", 2, "en", answer=[["z"]])
    cache.database.execute(
        f"UPDATE answers SET {column} = ? WHERE asked = ?", (damage, '["broken"]')
    )
    cache.database.execute("INSERT INTO answers VALUES ('5', '5', 0)")
    assert cache.items() == [
        (["hill", 2, "en"], [["z"]]),
        (["river", 2, "en"], [["title", "text"]]),
    ]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"out: .*must be a folder"):
        Cache(tmp_path / "out" / "c.sqlite")


def test_a_file_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    """Guards: a good file that is set aside because the disk is full or a process holds it."""
    cache = Cache(tmp_path / "c.sqlite")
    cache.put("a", 2, "en", answer=[["t", "x"]])
    cache.database.execute("PRAGMA query_only = ON")
    with pytest.raises(UserError, match=r"c\.sqlite: attempt to write"):
        cache.put("b", 2, "en", answer=[])
    assert cache.get("a", 2, "en") == [["t", "x"]]
    assert not list(tmp_path.glob("*.broken*"))


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line says how to go on, and what was kept stays. Guards: "make it writable"."""
    cache = Cache(tmp_path / "c.sqlite")
    cache.put("a", answer=1)
    cache.database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(SystemExit):
        run_guarded(lambda: cache.put("b", answer="x" * 100_000), can_resume=True)
    pattern = r"error: \S*c\.sqlite: .*full; make room on that disk; go on with: .* --resume\n"
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert cache.get("a") == 1
    assert not list(tmp_path.glob("*.broken*"))


def test_processes_share_a_file(tmp_path: Path) -> None:
    """Writers at the same time lose nothing; in WAL mode they do not wait for readers."""
    path = tmp_path / "c.sqlite"
    processes = [
        subprocess.Popen([sys.executable, "-c", FILL, str(path), str(name)], cwd=ROOT)
        for name in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    cache = Cache(path)
    for name in range(3):
        for number in range(60):
            assert cache.get(str(name), number) == [str(name)]
    assert cache.get("0", 99) is None
    assert cache.database.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
