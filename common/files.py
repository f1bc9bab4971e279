"""Files that are whole or not there, and JSON lines whose faults are named by file and line."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line; the file is whole or not there."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: str | Path, expected: str, setting: str) -> list[tuple[int, Any]]:
    """Return (line number, value) for each line of a jsonl file.

    expected: what a line should hold, for the message.
    setting: the setting that named the file, for the message.
    Raises UserError with file:line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{setting}: no such file: {path}; expected {expected}")
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text: {error}; expected {expected}, one a line"
        ) from None
    if not text:
        raise UserError(f"{path}: empty; expected {expected}, one a line")
    rows = []
    # str.splitlines would also cut at U+2028, which a JSON text may hold.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number}: not JSON; expected {expected}, one a line") from None
    return rows


@contextlib.contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Let one process at a time in, of those that ask for the same path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def weight_files(folder: str | Path) -> list[Path]:
    """Return the .safetensors files of a Hugging Face folder, by its index where it has one.

    Raises UserError for one that is missing.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model: {index} can't be read: {error!r}; copy it again") from None
    for name in names:
        if (folder / name).is_file():
            continue
        if index.is_file():
            hint = f", one of the {len(names)} files that {index.name} names; copy it again"
        else:
            hint = "; give a folder with .safetensors weights"
        raise UserError(f"model: {folder / name} is missing{hint}")
    return [folder / name for name in names]


def hash_file_ends(files: Iterable[Path], tail_bytes: int = 1 << 24) -> str:
    """Return a short hash of the last megabytes of some files: weights know each other by it."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - tail_bytes))
            digest.update(file.read())
    return digest.hexdigest()[:16]
