"""Files of questions and passages, the pools of a run, the search tool, and batches (data.py, tools.py)."""
import gzip
import json
import math
import random
import re

import numpy as np
import pytest

import data
import formats
import miniwiki
import tools
from autocoa import Trajectory
from common import Problem, Settings, by_tokens

# ---- files ----------------------------------------------------------------------------------------------------------
PASSAGES = [{"id": "0", "contents": '"Silver River"\nA film.'}, {"id": "1", "contents": '"Eva Moss"\nA star.'}]
GOOD = {"id": "dev_0", "question": "Who?", "golden_answers": ["Eva"]}


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("bad, message", [
    ("{not json}\n", "not JSON"), ("\n", "not JSON"), ('["a list"]\n', "not a question"), ({"id": "1", "golden_answers": ["x"]}, "not a question"),
    ({"question": "Who?", "golden_answers": ["x"]}, "not a question"), ({**GOOD, "golden_answers": []}, "'dev_0' has no answers"), ({"id": "dev_0", "question": "Who?"}, "has no answers"),
    ({**GOOD, "golden_answers": "Eva"}, "has no answers"), ({**GOOD, "golden_answers": [" "]}, "has no answers"), ({**GOOD, "golden_answers": [1]}, "has no answers"),
    ({**GOOD, "metadata": "text"}, "metadata"), ({**GOOD, "metadata": {"gold_titles": [3]}}, "gold_titles"), ({**GOOD, "metadata": {"supporting_facts": {"title": "A"}}}, "supporting_facts"),
    ({**GOOD, "question": "What?"}, "question 'dev_0' is in line 1 too"), ({**GOOD, "question": " "}, "not a question")])
def test_a_malformed_question_names_its_line(tmp_path, bad, message):
    path = write(tmp_path / "q.jsonl", GOOD, bad, GOOD)
    with pytest.raises(Problem, match=message) as e:
        data.read_questions(path)
    assert f"{path}:2:" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("read, setting", [(data.read_questions, "train_data"), (tools.read_passages, "corpus")])
def test_missing_and_empty_files(tmp_path, read, setting):
    with pytest.raises(Problem, match=f"{setting}.*no such file.*none.jsonl"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(Problem, match="q.jsonl: empty"):
        read(write(tmp_path / "q.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"id": "1", "contents": "\u00c9va"}'.encode("latin-1"))
    with pytest.raises(Problem, match="latin.jsonl: (not UTF-8|can't be read)"):
        read(tmp_path / "latin.jsonl")


def test_good_questions(tmp_path):
    """Unicode as it is, with the separators that only look like line ends; metadata may be missing."""
    rows = [GOOD, {**GOOD, "id": "dev_1", "question": "Wer ist \u00c9va?\u2028 (\u0085)", "metadata": None}]
    questions = data.read_questions(write(tmp_path / "q.jsonl", *rows))
    assert [q["question"] for q in questions] == [r["question"] for r in rows]
    assert all(q["metadata"]["steps"] for q in questions)


def test_a_question_that_looks_like_a_call(tmp_path):
    """A word and a colon at its beginning are no tool's name: the query carries the tool's own. Guards: "Unknown tool thor", taught as a miss."""
    q, = data.read_questions(write(tmp_path / "nq.jsonl", {**GOOD, "question": "thor: ragnarok release date"}))
    assert q["metadata"]["steps"][0]["queries"] == ["search: thor: ragnarok release date"]
    library = tools.library([{"id": "0", "contents": '"Thor: Ragnarok"\nReleased in 2017.'}], 1)
    assert library(q["metadata"]["steps"][0]["queries"]) == ["Thor: Ragnarok 1: Released in 2017."]


def test_two_hops_whatever_the_id(tmp_path):
    """FlashRAG's HotpotQA rows are called train_0, train_1 ..: the plan for two gold passages is two searches all the same."""
    row = {"id": "train_0", "question": "Where did the author of The Clay Hour grow up?", "golden_answers": ["Tallow"], "metadata": {"gold_titles": ["Orla Venn", "The Clay Hour"]}}
    q, = data.read_questions(write(tmp_path / "hotpotqa_train.jsonl", row))
    assert [s["title"] for s in q["metadata"]["steps"]] == ["The Clay Hour", "Orla Venn"]


@pytest.mark.parametrize("facts", [{"title": ["Orla Venn", "The Clay Hour", "Orla Venn"], "sent_id": [0, 1, 2]}, [["Orla Venn", 0], ["The Clay Hour", 1]]])
def test_flashrags_own_layout(tmp_path, monkeypatch, facts):
    """hotpotqa/dev.jsonl beside nq/dev.jsonl: two sets, each named by its folder, which says which is of several hops; the supporting facts of raw rows are its
    gold passages. Guards: the second dev.jsonl in the place of the first."""
    monkeypatch.chdir(tmp_path)         # where the index goes
    for folder in ("hotpotqa", "nq"):
        (tmp_path / folder).mkdir()
    two = {**GOOD, "question": "Where did the author of The Clay Hour grow up?", "metadata": {"supporting_facts": facts}}
    paths = [str(write(tmp_path / "hotpotqa" / "dev.jsonl", two)), str(write(tmp_path / "nq" / "dev.jsonl", GOOD))]
    task = data.load_task(Settings(model="x", data=paths, corpus=str(write(tmp_path / "p.jsonl", *PASSAGES))))
    (a,), (b,) = task.evaluation["hotpotqa_dev"], task.evaluation["nq_dev"]
    assert [s["title"] for s in a["metadata"]["steps"]] == ["The Clay Hour", "Orla Venn"] and a["id"] == "hotpotqa_dev:dev_0" and b["id"] == "nq_dev:dev_0"


def test_a_blank_among_the_accepted_answers(tmp_path):
    """It is left out: one of them in a large file must not make the file unusable. So is what the scores take for no answer: it would make an empty one right."""
    q, = data.read_questions(write(tmp_path / "q.jsonl", {**GOOD, "golden_answers": ["The", "Eva", " ", "!!"]}))
    assert q["golden_answers"] == ["Eva"]


def test_names_of_sets():
    """The folder's name only where it is needed; the same file twice is refused."""
    assert list(formats.set_names(["x/nq_dev.jsonl", "y/train.jsonl", "a/pop.jsonl", "b/pop.jsonl"], "--data")) == ["nq_dev", "y_train", "a_pop", "b_pop"]
    with pytest.raises(Problem, match="--data: a/dev.jsonl and a/dev.jsonl are both the set 'a_dev'"):
        formats.set_names(["a/dev.jsonl", "a/dev.jsonl"], "--data")


def test_data_sets_may_use_the_same_ids(tmp_path, monkeypatch):
    """FlashRAG numbers each set from train_0 on. Guards: what is known of one question passes for another's."""
    monkeypatch.chdir(tmp_path)
    a, b = write(tmp_path / "nq.jsonl", GOOD), write(tmp_path / "triviaqa.jsonl", {**GOOD, "question": "What?", "golden_answers": ["Ada"]})
    task = data.load_task(Settings(model="x", train_data=[str(a), str(b)], eval_data=[str(a)], corpus=str(write(tmp_path / "p.jsonl", *PASSAGES))))
    questions = task.train(2, "coa")
    assert len(data.facts_of(questions)) == 2 and len({q["id"] for q in questions}) == 2


@pytest.mark.parametrize("bad", ["{not json}\n", "\n", {"id": "1"}, {"id": "1", "contents": 3}, "[1]\n", "null\n"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_malformed_passage_names_its_line(tmp_path, bad, name):
    path = write(tmp_path / name, PASSAGES[0], bad)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(Problem, match="not a passage") as e:
        tools.read_passages(path)
    assert f"{path}:2:" in str(e.value)


def test_a_broken_gzip_file(tmp_path):
    """Guards: a traceback for a corpus that is no gzip file, or half of one."""
    for content in (b"plain text\n", gzip.compress(json.dumps(PASSAGES[0]).encode() * 100)[:60]):
        (tmp_path / "p.jsonl.gz").write_bytes(content)
        with pytest.raises(Problem, match="p.jsonl.gz"):
            tools.read_passages(tmp_path / "p.jsonl.gz")


@pytest.mark.parametrize("contents, title, text", [
    ('"Silver River"\nIt is\na film.', "Silver River", "It is a film."), ("Silver River\nIt is.", "Silver River", "It is."), ('"A "B" C"\nx', 'A "B" C', "x"),
    ("'Title: Silver River Text: It is.", "Silver River", "It is."), ("Title: Silver River Text: It\nis.", "Silver River", "It is."), ('"Silver River"', "Silver River", ""),
    ('"Made for Walkin\'"\nA song.', "Made for Walkin'", "A song."), ('""Weird Al" Yankovic"\nx', '"Weird Al" Yankovic', "x"), ('""Heroes""\nx', '"Heroes"', "x")])
def test_split_passage(contents, title, text):
    """FlashRAG's form, without quotes too, and the older `Title: T Text: body`. Guards: quotes that are the title's own taken off, so that no gold title matched."""
    assert tools.split_passage(contents) == (title, text)


def test_pools_are_apart():
    """Training questions of the pools of a run differ, and evaluation's come from another world."""
    task = data.load_task(Settings(eval_questions=20))
    pools = [task.train(100, "coa"), task.train(100, "cot", p_head=1.0), task.train(100, "act")]
    texts = [q["question"] for pool in pools for q in pool]
    assert len(set(texts)) == len(texts) == 300
    assert len({q["id"] for pool in pools for q in pool}) == 300
    assert {name: len(rows) for name, rows in task.evaluation.items()} == dict.fromkeys(miniwiki.SETS, 20)
    assert all(s["head"] or s["noun"] == miniwiki.DIFFERENCE for q in pools[1] for s in q["metadata"]["steps"])
    assert not any(q["id"].startswith("compose") for q in pools[0])


# ---- the search tool ------------------------------------------------------------------------------------------------
def test_bm25_by_hand():
    """Scores by the formula (Lucene's idf; k1 1.5, b 0.75; the title three times) rank three passages as the tool does."""
    passages = ['"Silver River"\nA film. It was directed by Eva Moss.', '"Eva Moss"\nShe was born in Iron Hill near the Silver River.', '"Iron Hill"\nIt lies by a river of silver.']
    docs = [re.findall(r"\w+", f"{t} {t} {t} {x}".lower()) for t, x in (p.replace('"', "").split("\n") for p in passages)]
    mean = sum(map(len, docs)) / 3

    def score(query, doc):
        total = 0.0
        for w in re.findall(r"\w+", query.lower()):
            n, tf = sum(w in d for d in docs), doc.count(w)
            total += math.log(1 + (3 - n + 0.5) / (n + 0.5)) * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(doc) / mean))
        return total
    tool = tools.BM25([{"id": str(i), "contents": p} for i, p in enumerate(passages)], top_k=3)
    for query in ("Silver River", "eva moss born", "Iron", "who directed the film", "river of silver"):
        scores = [score(query, d) for d in docs]
        order = [i for i in sorted(range(3), key=lambda i: -scores[i]) if scores[i] > 0]
        assert [i for i in tool.ranked([query])[0][0] if i >= 0] == order
    assert tool(["zebra", "Iron Hill"]) == ["Nothing found.", "\n ".join(
        ["Iron Hill 1: It lies by a river of silver.", "Eva Moss 2: She was born in Iron Hill near the Silver River."])]


# ---- batches --------------------------------------------------------------------------------------------------------
def test_pad():
    b = data.pad([Trajectory([5, 6, 7], [0, 1, 1], [0, 1, 1]), Trajectory([8], [1], [1])])
    assert b["ids"].tolist() == [[5, 6, 7], [8, 0, 0]] and b["mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert b["ids"].dtype == np.int64 and b["mask"].dtype == np.float32
    assert data.pad([Trajectory([5], [1], [1], [-0.5]), Trajectory([5, 6], [1, 1], [1, 1], [-1.0, -2.0])])["old"].tolist() == [[-0.5, 0], [-1, -2]]


@pytest.mark.parametrize("limit", [1, 50, 400, 10 ** 6])
def test_by_tokens(limit):
    """Each index once; rows x longest within the limit, unless one row alone is longer."""
    lengths = [random.Random(1).randrange(1, 90) for _ in range(100)] + [1, 90, 45]
    groups = by_tokens(lengths, limit)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= limit for g in groups)
    assert by_tokens([], limit) == []


def test_steps_of():
    """One epoch: each trajectory once, steps of at least batch_tokens but for the last, windows in their order."""
    ts = [Trajectory([i] * (1 + i % 7), [1] * (1 + i % 7), [1] * (1 + i % 7)) for i in range(300)]
    steps = data.steps_of(ts, 40, random.Random(0), window=100)
    order = [t.ids[0] for step in steps for t in step]
    assert sorted(order) == list(range(300)) and order != sorted(order)
    assert [sorted(order[i:i + 100]) for i in (0, 100, 200)] == [list(range(i, i + 100)) for i in (0, 100, 200)]
    sizes = [sum(len(t.ids) for t in step) for step in steps]
    assert all(40 <= n < 47 for n in sizes[:-1]) and 0 < sizes[-1] < 47
