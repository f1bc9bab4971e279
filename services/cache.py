"""A cache of what tools and language models answered, in one SQLite file.

It is no HTTP cache, for two reasons. What is stored is a query with its observation, or a
conversation with its reply: this counts how many real calls a run has cost, whatever requests each
call was made of, and it is the data from which a world model can be distilled. And one query takes
several requests, so that an HTTP cache would hold several answers of it, some of them perhaps older
than others.
"""

import contextlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from common.errors import DiskError
from common.files import file_lock

LOCKED = "wait for the process that holds it"
READ_ONLY = "let it be written to"
# The file is fine, but it can't be used just now, and what can be done about it.
WAYS_OUT = {
    sqlite3.SQLITE_PERM: READ_ONLY,
    sqlite3.SQLITE_BUSY: LOCKED,
    sqlite3.SQLITE_LOCKED: LOCKED,
    sqlite3.SQLITE_READONLY: READ_ONLY,
    sqlite3.SQLITE_IOERR: "make room on that disk, or see to it",
    sqlite3.SQLITE_FULL: "make room on that disk",
    sqlite3.SQLITE_CANTOPEN: READ_ONLY,
}
SECONDS_TO_WAIT = 30  # for other processes that use the file
# What json.loads raises for a row that is no JSON.
DAMAGE = (ValueError, TypeError, RecursionError)


class Cache:
    """What was asked -> what was answered, both anything that JSON holds.

    Several threads and processes may share one file. A file that can't be read is set aside, a
    line says so, and an empty one is begun.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or begin the file; raise DiskError where its folder can't be made."""
        self.path = Path(path)
        self.lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.path.parent}: {error.strerror}; it must be a folder") from None
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._set_aside(error)

    def get(self, *key: Any) -> Any:
        """Return the answer that is kept for a key, None where there is none."""
        rows = self._execute("SELECT said FROM answers WHERE asked = ?", json.dumps(key))
        if not rows:
            return None
        try:
            return json.loads(rows[0][0])
        except DAMAGE:
            # A row that was damaged counts as if it were not there.
            return None

    def items(self) -> list[tuple[list[Any], Any]]:
        """Return each key, as a list, with its answer; rows that are damaged are left out."""
        items = []
        for asked, said in self._execute("SELECT asked, said FROM answers ORDER BY asked"):
            try:
                key = json.loads(asked)
                answer = json.loads(said)
            except DAMAGE:
                continue
            if isinstance(key, list):
                items.append((key, answer))
        return items

    def put(self, *key: Any, answer: Any) -> None:
        """Keep an answer, in place of the one that is kept for this key."""
        self._execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)",
            json.dumps(key),
            json.dumps(answer),
            time.time(),
        )

    def _execute(self, sql: str, *values: Any) -> list[tuple]:
        with self.lock:
            try:
                return self.database.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as error:
                self._set_aside(error)
                return self.database.execute(sql, values).fetchall()

    def _open(self) -> None:
        self.database = sqlite3.connect(
            self.path, timeout=SECONDS_TO_WAIT, check_same_thread=False, isolation_level=None
        )
        self.database.text_factory = lambda raw: raw.decode(errors="replace")
        self._write_ahead()
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS answers (asked TEXT PRIMARY KEY, said TEXT, fetched REAL)"
        )
        # A table of another program has other columns.
        self.database.execute("SELECT asked, said, fetched FROM answers LIMIT 1").fetchall()

    def _write_ahead(self) -> None:
        """Switch to a write-ahead log, with which writers do not wait for readers.

        SQLite does not wait for processes that switch at the same time, so this does.
        """
        end = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                self.database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Rename a file that can't be read, and begin an empty one.

        One process at a time does so; the next one finds the new file and uses it.
        Raises DiskError where nothing is wrong with the file itself.
        """
        # The lower eight bits of an extended code are the kind of error.
        way_out = WAYS_OUT.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if way_out is not None:
            raise DiskError(f"{self.path}: {error}; {way_out}") from None
        self.database.close()
        with file_lock(self.path):
            if self._opens_undamaged():
                return
            self.database.close()
            self._rename_files(error)
            self._open()

    def _opens_undamaged(self) -> bool:
        with contextlib.suppress(sqlite3.DatabaseError):
            self._open()
            # What opens may be damaged further in.
            verdict = self.database.execute("PRAGMA integrity_check(1)").fetchall()
            return verdict == [("ok",)]
        return False

    def _rename_files(self, error: sqlite3.DatabaseError) -> None:
        moment = time.strftime("%Y%m%d-%H%M%S")
        broken_name = f"{self.path.name}.broken-{moment}-{os.getpid()}"
        print(
            f"{self.path} can't be read ({error}): it is now {broken_name}, "
            "and an empty one is begun"
        )
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.rename(self.path.with_name(broken_name + suffix))
