"""What an index of so many made-up passages costs; their words are drawn by Zipf's law."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from services.bm25 import open_index

INDEX_QUERIES = 200
PASSAGE_WORDS = 85
TITLE_WORDS = 3
QUERY_WORDS = 12
VOCABULARY = 500_000
ZIPF_EXPONENT = 1.2


def index_cost(passages: int) -> None:
    """Print seconds to build and to load an index, ms a query, bytes on disk and peak memory."""
    rng = np.random.default_rng(passages)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        start = time.time()
        _write_passages(path, passages, rng)
        write_seconds = time.time() - start
        start = time.time()
        open_index(path, 3, folder)
        build_seconds = time.time() - start
        start = time.time()
        index = open_index(path, 3, folder)
        load_seconds = time.time() - start
        queries = [" ".join(_draw_words(rng, QUERY_WORDS)) for _ in range(INDEX_QUERIES)]
        start = time.time()
        index(queries)
        query_ms = 1000 * (time.time() - start) / INDEX_QUERIES
        index_files = [file for file in Path(folder, "index").rglob("*") if file.is_file()]
        index_bytes = sum(file.stat().st_size for file in index_files)
    print(
        f"{passages:,} passages (made in {write_seconds:.0f} s): built in {build_seconds:.1f} s, "
        f"loaded in {load_seconds:.2f} s, {query_ms:.2f} ms a query, "
        f"{index_bytes / 1e6:,.0f} MB on disk, {_peak_memory_gb():,.1f} GB of memory at most",
        flush=True,
    )


def _write_passages(path: Path, count: int, rng: np.random.Generator) -> None:
    with open(path, "w") as file:
        for number in range(count):
            words = _draw_words(rng, PASSAGE_WORDS)
            title = " ".join(words[:TITLE_WORDS])
            text = " ".join(words[TITLE_WORDS:])
            passage = {"id": str(number), "contents": f'"{title}"\n{text}'}
            file.write(json.dumps(passage) + "\n")


def _draw_words(rng: np.random.Generator, count: int) -> list[str]:
    numbers = np.minimum(rng.zipf(ZIPF_EXPONENT, count), VOCABULARY)
    return [f"w{number}" for number in numbers]


def _peak_memory_gb() -> float:
    """Return the most memory that this process had; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak / 1e9
    return peak / 1e6


def index_command(arguments: Sequence[str]) -> None:
    """Run `python bench.py index N ..`."""
    if not arguments or not all(text.isdecimal() for text in arguments):
        raise UserError("usage: python bench.py index PASSAGES ..")
    for text in arguments:
        index_cost(int(text))
