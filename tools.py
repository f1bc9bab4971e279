"""The tool library. A tool is a function from a list of arguments to a list of observations; the library is a dict.

    python tools.py passages.jsonl.gz "who wrote The Mill on the Floss"        # ask the search tool by hand

The model writes its action between <begin_search> and </end_search>: `name: arguments`, or only the arguments, which
means `search`. A name that is not in the library comes back as an observation that says so, never as an exception.
"""
import gzip
import json
import re
import sys
from pathlib import Path

import bm25s
import numpy as np

from common import Problem

ACTION = re.compile(r"\s*([a-z_]+):\s*(.*)", re.S)    # a lower-case name, so that "Alien: Covenant" is a query


class BM25:
    """BM25 over passages in FlashRAG's form, {"id", "contents": "\\"Title\\"\\nText"}, by bm25s.

    The title counts three times: on HotpotQA questions that lifts recall@3 from 0.63 to 0.69.
    """

    def __init__(self, passages, top_k=3, k1=1.5, b=0.75):
        self.top_k = top_k
        pairs = [split_passage(p["contents"]) for p in passages]
        self.all_titles = [t for t, _ in pairs]
        self.texts = [x for _, x in pairs]
        corpus = [f"{t} {t} {t} {x}" for t, x in pairs]
        tokens = bm25s.tokenize(corpus, stopwords=[], show_progress=len(corpus) > 20_000, token_pattern=r"(?u)\b\w+\b")
        self.index = bm25s.BM25(k1=k1, b=b)
        self.index.index(tokens, show_progress=len(corpus) > 20_000)

    def ranked(self, queries):
        """list of str -> (len(queries), top_k) passage numbers, best first; -1 where fewer passages share a word."""
        k = min(self.top_k, len(self.texts))
        tokens = bm25s.tokenize(queries, stopwords=[], show_progress=False, return_ids=False, token_pattern=r"(?u)\b\w+\b")
        known = self.index.vocab_dict
        tokens = [[t for t in q if t in known] for q in tokens]
        out = np.full((len(queries), k), -1)
        full = [i for i, q in enumerate(tokens) if q]
        if full:
            found, scores = self.index.retrieve([tokens[i] for i in full], k=k, show_progress=False)
            out[full] = np.where(scores > 0, found, -1)
        return out

    def titles(self, queries):
        return [[self.all_titles[i] if i >= 0 else "" for i in row] for row in self.ranked(queries)]

    def __call__(self, queries):
        """list of str -> list of observations: the top passages, one a line, as `Title 1: text`, `Title 2: text` ..

        The number lets a reader, and a small network, say which passage it means (see data.found)."""
        return ["\n ".join(f"{self.all_titles[i]} {n}: {self.texts[i]}" for n, i in enumerate(row, 1) if i >= 0) or "Nothing found."
                for row in self.ranked(queries)]


def split_passage(contents):
    """'"Title"\\nText' -> (title, text). Some public pools write the title as `'Title: T Text: body`; both are read."""
    title, _, text = contents.partition("\n")
    title = title.strip().strip('"').strip()
    old = re.match(r"'?Title: (.*?) Text: (.*)", f"{title}\n{text}", re.S)
    if old:
        title, text = old.groups()
    return title.strip(" '\""), " ".join(text.split())


def read_passages(path):
    """A FlashRAG passage file, plain or gzip -> list of {"id", "contents"}. Raises Problem with file:line."""
    path = Path(path)
    if not path.is_file():
        raise Problem(f"corpus: no such file: {path}; give a FlashRAG passage file with --corpus=FILE")
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                try:
                    rows.append(json.loads(line))
                    rows[-1]["contents"].strip()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise Problem(f"{path}:{n}: not a passage; expected one JSON object a line with \"id\" and \"contents\"") from None
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as e:
        raise Problem(f"{path}: can't be read: {e}") from None
    if not rows:
        raise Problem(f"{path}: empty; expected one passage a line")
    return rows


def library(passages, top_k):
    """The environment: a function from action texts to observations, with a search tool over these passages."""
    tools = {"search": BM25(passages, top_k)}
    return lambda actions: run_actions(tools, actions)


def run_actions(tools, actions):
    """Run each action with its tool, all calls of one tool as one batch. list of str -> list of observations."""
    observations = [None] * len(actions)
    batches = {}
    for i, action in enumerate(actions):
        match = ACTION.match(action)
        name, arguments = match.groups() if match else ("search", action.strip())
        if name not in tools:
            observations[i] = f"Unknown tool {name}. Tools: {', '.join(tools)}."
        elif not arguments:
            observations[i] = f"{name} needs an argument."
        else:
            batches.setdefault(name, []).append((i, arguments))
    for name, calls in batches.items():
        for (i, _), observation in zip(calls, tools[name]([a for _, a in calls])):
            observations[i] = observation
    return observations


if __name__ == "__main__":
    if len(sys.argv) < 3 or not Path(sys.argv[1]).is_file():
        print("usage: python tools.py PASSAGES QUERY ..", file=sys.stderr)
        sys.exit(2)
    search = BM25(read_passages(sys.argv[1]))
    print(search([" ".join(sys.argv[2:])])[0])
