"""Files that are whole or not there, checksums, locks, and JSON lines named by file and line."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from common import ranks
from common.errors import UserError, disk_error

REPLACED_SUFFIX = ".replaced"  # of a folder for a moment, while another takes its place
CHECKSUMS_FILE = "checksums.json"  # of a saved network: {file: its SHA-256}


# ---- writing -------------------------------------------------------------------------------------
def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON. A number that is not finite becomes null: NaN is no JSON."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Raise UserError for what a disk refuses while a file or folder is written."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from None
    # The libraries that write weights and tokenizers have errors of their own for it.
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise disk_error(OSError(int(number[1]), os.strerror(int(number[1]))), path) from None
        if str(error).startswith(("[write]", "[save_safetensors]")):
            raise disk_error(OSError(0, str(error)), path) from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text as a file; see write_bytes."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or not there at all, also after a loss of power."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new_path = path.with_name(path.name + ".new")
        try:
            with open(new_path, "wb") as file:
                file.write(content)
            sync(new_path)
            new_path.rename(path)
        except OSError:
            # Half a file would only take room.
            new_path.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line; the file is whole or not there."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Add one JSON value a line to a file. An interruption may cut the last one."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(folder: Path, new_folder: Path) -> None:
    """Put a new folder in the place of one that may be there already, and sync their names."""
    replaced = folder.with_name(folder.name + REPLACED_SUFFIX)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        # Removing it first would take time, in which there is neither.
        folder.rename(replaced)
    new_folder.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# ---- checksums -----------------------------------------------------------------------------------
def write_checksums(folder: Path) -> None:
    """Write CHECKSUMS_FILE: of all files of a folder but logs, which are on the disk then."""
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".jsonl" and path.name != CHECKSUMS_FILE:
            sync(path)
            checksums[str(path.relative_to(folder))] = checksum(path)
    write_text(folder / CHECKSUMS_FILE, to_json(checksums, indent=1))


def checksum(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of a file. size: of its first bytes alone."""
    with open(path, "rb") as file:
        if size is not None:
            return hashlib.sha256(file.read(size)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_file(folder: Path) -> Path | None:
    """Return the first file of a folder that is not as it was saved, None where all are.

    A folder without checksums is from elsewhere, and taken as it is.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return None
    try:
        checksums = parse_json(path.read_text(encoding="utf-8"))
        for name, expected in checksums.items():
            file = folder / name
            if not file.is_file() or checksum(file) != expected:
                return file
    except (ValueError, AttributeError):
        return path
    return None


def refuse_damage(folder: Path, remedy: str) -> None:
    """Raise UserError for a file of a saved network that is not as it was saved."""
    file = damaged_file(folder)
    if file is not None:
        raise UserError(
            f"{file} is not as it was saved; {remedy}, or remove {folder / CHECKSUMS_FILE} if you "
            "have changed it yourself"
        )


# ---- reading -------------------------------------------------------------------------------------
def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; raise ValueError for what is none, however it fails."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_jsonl(path: str | Path, expected: str, setting: str) -> list[tuple[int, Any]]:
    """Return (line number, value) for each line of a jsonl file; blank ones are none.

    A byte order mark, which some editors write, is no text: not even in the middle, where files
    were joined.

    expected: what a line should hold, for the message.
    setting: the setting that named the file, for the message.
    Raises UserError with file:line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{setting}: no such file: {path}; expected {expected}")
    try:
        text = path.read_text(encoding="utf-8").replace("\ufeff", "")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text: {error}; expected {expected}, one a line"
        ) from None
    if not text.strip():
        raise UserError(f"{path}: empty; expected {expected}, one a line")
    rows = []
    # str.splitlines would also cut at U+2028, which a JSON text may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, parse_json(line)))
        except ValueError:
            raise UserError(f"{path}:{number}: not JSON; expected {expected}, one a line") from None
    return rows


@contextlib.contextmanager
def refusing_damage(refusal: str) -> Generator[None]:
    """Raise UserError with one line where a JSON file of this project is not as it was written.

    The body reads the file and takes its values apart.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(refusal) from None


def read_log(path: Path, setting: str, *fields: str) -> list[dict[str, Any]]:
    """Return the lines of a file that this project wrote: objects with these fields at least.

    setting: as in read_jsonl. Raises UserError with file:line.
    """
    rows = []
    for number, row in read_jsonl(path, "a log", setting):
        if not isinstance(row, dict) or not row.keys() >= set(fields):
            expected = ", ".join(fields) or "an object"
            raise UserError(f"{path}:{number}: not a line of this log; expected {expected}")
        rows.append(row)
    return rows


# ---- locks ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Let one process at a time in, of those that ask for the same path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def only_process(folder: Path) -> Generator[None]:
    """Refuse a folder to all other processes that ask for it. A kill ends the lock too.

    The folder is made where it is missing, and leaves if nothing was written into it. Processes
    that work together have it as one.
    Raises UserError where another process has it.
    """
    if not ranks.is_first():
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another command works in it; wait until it ends, or take another --run"
        ) from None
    try:
        yield
    finally:
        for path in (folder, folder.parent):
            with contextlib.suppress(OSError):
                path.rmdir()
        os.close(descriptor)


# ---- weights -------------------------------------------------------------------------------------
def weight_files(folder: str | Path) -> list[Path]:
    """Return the .safetensors files of a Hugging Face folder.

    As in transformers, a whole model.safetensors comes before an index of shards, which may be left
    from an earlier save.
    Raises UserError for one that is missing.
    """
    folder = Path(folder)
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise UserError(f"model: {whole} is missing; give a folder with .safetensors weights")
    try:
        names = sorted(set(parse_json(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model: {index} can't be read: {error!r}; copy it again") from None
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"model: {folder / name} is missing, one of the {len(names)} files that "
                f"{index.name} names; copy it again"
            )
    return [folder / name for name in names]


def hash_file_ends(files: Iterable[Path], tail_bytes: int = 1 << 24) -> str:
    """Return a short hash of the last megabytes of some files: weights know each other by it."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - tail_bytes))
            digest.update(file.read())
    return digest.hexdigest()[:16]
