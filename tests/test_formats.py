"""Files of other projects (formats.py): AutoCoA's SFT files in and out, `python data.py show` and `get`."""
import json
import random
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import run_script
from test_real import checkpoint

import data
import formats
import miniwiki
import model
import skills
import tools
from autocoa import ACTION, ANSWER, OBSERVATION, PROMPT, THINK, Codec
from common import Problem

WORLD = miniwiki.World(0, "train")
QUESTIONS = [q for name in data.MIX for q in WORLD.questions(name, 20, random.Random(name))]
# The structure of a released row, in words of our own.
THEIRS = """<think>
Hm, who wrote it? I think I should look.

<begin_search>The Clay Hour author</end_search>

<search_result> result 1: "The Clay Hour"
A novel by Orla Venn, whose {best} friend was Ivo.
result 2: "Clay"
A soil. </search_result>


So it is Orla Venn.
</think>

The author of the novel is Orla Venn.

\\boxed{Orla {the elder} Venn}"""
PROMPT_OF_THEIRS = "You may search the web.\n\nNow, please answer the user's question below: \nWho wrote The Clay Hour?"


@pytest.fixture(scope="module")
def nano():
    return Codec(skills.nano_tokenizer(2048, skills.nano_text(WORLD)))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    checkpoint(folder)
    return model.load_pretrained(str(folder), "cpu").codec


def test_there_and_back(nano, tmp_path):
    """The teacher's chains, chains of thought and pairs as AutoCoA's files and read again: the same ids, roles and masks."""
    coa = [t for _, t in data.teach(nano, QUESTIONS, set(data.facts_of(QUESTIONS[::2])), tools.library(WORLD.passages(), 2))[0]]
    pairs = [pair for side in data.pairs(nano, QUESTIONS, {f: "Eva Moss" for f in data.facts_of(QUESTIONS)}, {q["id"]: True for q in QUESTIONS}) for pair in side]
    acting, thinking = [t for t in coa if t.queries], [data.cot(nano, q) for q in QUESTIONS if q["metadata"]["conclusion"] or len(q["metadata"]["steps"]) == 1]
    assert len(acting) > 40 and len(pairs) > 50 and len(thinking) > 20
    formats.export(nano, tmp_path, acting, thinking, pairs)
    *found, odd = formats.read_sft(nano, [tmp_path / name for name in ("coa.jsonl", "cot.jsonl", "pairs.json")])
    assert odd == []
    for before, after in zip([acting, thinking, [t for p in pairs for t in p]], [*found[:2], [t for p in found[2] for t in p]], strict=True):
        for a, b in zip(before, after, strict=True):
            assert (a.ids, a.role, a.mask) == (b.ids, b.role, b.mask)
    assert {t.ids.index(nano.think) for t in acting} == {t.role.index(THINK) - 1 for t in acting}


def test_a_released_row(chat, tmp_path):
    """The authors' structure: their instructions make room for ours, observations carry no loss, what is said before the box does, braces inside it stay."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": PROMPT_OF_THEIRS}, {"role": "assistant", "content": THEIRS}]}) + "\n")
    (t,), cot, pairs, odd = formats.read_sft(chat, [tmp_path / "x.jsonl"])
    assert (cot, pairs, odd) == ([], [], [])
    start = t.role.index(THINK)
    assert t.ids[:start] == chat.prompt("Who wrote The Clay Hour?") and set(t.role[:start]) == {PROMPT}
    assert t.queries == ["The Clay Hour author"] and "{best} friend" in t.observations[0]
    by_role = {r: chat.decode([i for i, x in zip(t.ids, t.role) if x == r]) for r in (ACTION, OBSERVATION, ANSWER, THINK)}
    assert by_role[ACTION] == "<begin_search> The Clay Hour author</end_search>" and by_role[OBSERVATION].endswith("A soil.</search_result>")
    assert by_role[ANSWER] == "\\boxed{ Orla {the elder} Venn}</s>" and by_role[THINK].endswith("</think> The author of the novel is Orla Venn.")
    assert t.mask == [int(r not in (PROMPT, OBSERVATION)) for r in t.role]
    assert chat.well_formed(t)


def test_a_released_pair(chat, tmp_path):
    """With a shared beginning behind <think> in the human's turn, where their template looks for it and which may hold a search, and without; only the two ends
    are learned. Guards: the beginning taken for a part of the question."""
    began, _, _ = THEIRS.partition("So it is")
    human = {"from": "human", "value": PROMPT_OF_THEIRS}
    rows = [{"conversation": [{"from": "human", "value": PROMPT_OF_THEIRS + began}], "chosen": {"from": "gpt", "value": "So it is Orla."}, "rejected": {"from": "gpt", "value": "<begin_search>Orla</end_search>"}},
            {"conversation": [human], "chosen": {"from": "gpt", "value": THEIRS}, "rejected": {"from": "gpt", "value": "<think>I know.</think> \\boxed{Ivo}"}}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    _, _, pairs, odd = formats.read_sft(chat, [tmp_path / "x.json"])
    assert odd == [] and len(pairs) == 2
    learned = [[chat.decode([i for i, m in zip(t.ids, t.mask) if m]).strip() for t in pair] for pair in pairs]
    assert learned[0] == ["So it is Orla.", "<begin_search> Orla</end_search>"] and learned[1][1] == "I know.</think>\\boxed{ Ivo}</s>"
    assert "A soil" not in learned[1][0] and learned[1][0].startswith("Hm, who wrote it?")
    for t in pairs[0]:
        assert t.ids[:t.role.index(THINK)] == chat.prompt("Who wrote The Clay Hour?") and t.queries[0] == "The Clay Hour author" and OBSERVATION in t.role
    for a, b in pairs:
        first = min(a.mask.index(1), b.mask.index(1))
        assert a.ids[:first] == b.ids[:first] and pairs[0][0].mask.index(1) > len(chat.prompt("Who wrote The Clay Hour?"))


def test_pairs_of_others_there_and_back(chat, tmp_path):
    """Pairs that share nothing, and sides that hold an observation or end the turn, are written as they were read. Guards: the chosen side in the conversation too, and
    its observation lost."""
    human = {"from": "human", "value": "Who?<think>"}
    whole = "<think> I look.<begin_search> Clay</end_search><search_result> A soil.</search_result> So.</think>\\boxed{ Orla}"
    rows = [{"conversation": [human], "chosen": {"from": "gpt", "value": whole.removeprefix("<think>")}, "rejected": {"from": "gpt", "value": " I know.</think>\\boxed{ Ivo}"}},
            {"conversation": [{"from": "human", "value": "Who?<think> Hm."}], "chosen": {"from": "gpt", "value": whole.removeprefix("<think>")}, "rejected": {"from": "gpt", "value": " I know."}}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    _, _, pairs, odd = formats.read_sft(chat, [tmp_path / "x.json"])
    formats.export(chat, tmp_path, [], [], pairs)
    assert odd == [] and json.loads((tmp_path / "pairs.json").read_text()) == rows


def test_a_thought_may_speak_of_the_box(nano):
    """It is plain text there; the answer is the box behind the thought. Guards: rows of reasoning models, left out as tags in the wrong place."""
    t = nano.build("Who?", formats.parts_of("<think>It goes into \\boxed{}. It is Eva.</think>\n\\boxed{Eva}"))
    assert nano.answer(t) == "Eva" and nano.well_formed(t) and t.ids.count(nano.boxed) == 1 and "boxed{}" in nano.decode(t.ids)


@pytest.mark.parametrize("said, why", [("<think>Hm", "no </think>"), ("<think>Hm</think> Eva", "no .boxed"), ("<think>Hm</think> \\boxed{Eva", "no .boxed"), ("<think>Hm</think> \\boxed{ }", "no .boxed"),
                                       ("<think><begin_search>x</end_search> so</think>\\boxed{Eva}", "without its result"), ("<think>a <begin_search>x</end_search></think>\\boxed{Eva}", "without its result"), ("<think><search_result>x</search_result></think>\\boxed{Eva}", "without its result"),
                                       ("<think>a <begin_search> b</think>\\boxed{Eva}", "not closed"),
                                       ("<think>I may <begin_search> it. <begin_search>x</end_search><search_result>y</search_result> so</think>\\boxed{Eva}", "not closed"), (None, "AttributeError|no attribute"), ("", "no </think>")])
def test_rows_that_are_no_trajectories(nano, tmp_path, said, why):
    """Left out, counted, and named by file and line; the others stay."""
    good = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<think>Hm</think>\\boxed{Eva}"}]}
    bad = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": said}]}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, (good, bad, good))) + "\n")
    (tmp_path / "none.jsonl").write_text("")        # as teacher.py writes it where it kept no chain of a kind
    coa, cot, pairs, odd = formats.read_sft(nano, [tmp_path / "none.jsonl", tmp_path / "x.jsonl"])
    assert len(cot) == 2 and not coa + pairs and len(odd) == 1
    assert re.search(f"x.jsonl:2: .*({why})", odd[0])


@pytest.mark.parametrize("content, message", [('{"question": "Who?"}\n', "x.jsonl:1: neither messages"), ("[1", "not JSON"), ("", "x.jsonl: empty"), ("no", "x.jsonl:1: not JSON"), ("[" * 9000, "x.jsonl: not JSON"), ('{"a": ' + "[" * 9000, "x.jsonl:1: not JSON")])
def test_files_that_are_none(nano, tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(Problem, match=message):
        formats.read_sft(nano, [tmp_path / "x.jsonl"])
    with pytest.raises(Problem, match="no such file"):
        formats.read_sft(nano, [tmp_path / "y.jsonl"])


def test_show(nano, tmp_path, capsys):
    """What carries loss is green, all else grey: of a row with ids, and of AutoCoA's text."""
    t = nano.build("Who?", [("think", "Hm"), ("search", "Eva"), ("result", "Eva 1: x"), ("answer", "Eva")])
    row = {"ids": t.ids, "mask": t.mask, "role": t.role, "tokens": [nano.decode([i]) for i in t.ids]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    formats.show(tmp_path / "a.jsonl", 1)
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[", capsys.readouterr().out)
    assert green == [" Hm<begin_search> Eva</end_search>", "</think>\\boxed{ Eva}<eos>"]
    formats.export(nano, tmp_path, [t], [], [])
    formats.show(tmp_path / "coa.jsonl", 1)
    assert re.findall(r"\x1b\[1;32m(.*?)\x1b\[", capsys.readouterr().out) == ["<think> Hm<begin_search> Eva</end_search>", "</think>\\boxed{ Eva}"]
    (tmp_path / "half.jsonl").write_text('{"messages": [{"content": "half \\ud83d a character"}]}')
    formats.show(tmp_path / "half.jsonl", 1)
    capsys.readouterr().out.encode()
    with pytest.raises(Problem, match="no trajectory 2; it holds 1"):
        formats.show(tmp_path / "a.jsonl", 2)


@pytest.mark.parametrize("content, message", [(b"[1", "x: not JSON"), (b"\xff\xfe[", "x: not JSON"), (b'{"ids": [1]', "x:1: not JSON"), (b"[3]", "x:1: not a trajectory"), (b'{"ids": [1], "tokens": ["a"]}', "x:1: not"),
                                              (b'{"a": 1}\n', "x:1: not a trajectory"), (b'{"messages": []}', "x:1: not"), (b'{"messages": [{"content": null}]}', "x:1: not"), (b'{"conversation": [], "chosen": 1}', "x:1: not"),
                                              (b'[{"ids": [1], "tokens": [2], "mask": [1]}]', "x:1: not")])
def test_show_of_what_is_none(tmp_path, content, message):
    """Guards: a traceback for broken, binary and other files."""
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Problem, match=message) as e:
        formats.show(tmp_path / "x", 1)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("second", [b'{"ids": [1, 2], "ma', b"\xff\xfe", b"3", b'{"idz": []}'])
def test_a_cut_file_of_a_run(tmp_path, second):
    """The SFT data of a run names the line that is cut and the way out; a file without rows is a pool without rows."""
    (tmp_path / "coa.jsonl").write_bytes(b'{"ids": [1], "mask": [1], "role": [1]}\n' + second)
    with pytest.raises(Problem, match=f"coa.jsonl:2: cut or damaged; remove {tmp_path} and run train_sft.py again"):
        formats.read_trajectories(tmp_path / "coa.jsonl")
    (tmp_path / "pairs.jsonl").write_text("")
    assert formats.read_trajectories(tmp_path / "pairs.jsonl") == []


def test_get(tmp_path, monkeypatch):
    """FlashRAG's rows, with the titles of the supporting facts as gold titles, so that the teacher knows what to search for. The package is replaced: this test
    is offline."""
    rows = [{"id": "dev_0", "question": "Who?", "golden_answers": ["Eva"], "metadata": {"supporting_facts": {"title": ["A", "B", "A"], "sent_id": [0, 1, 2]}}},
            {"id": "dev_1", "question": "Where?", "golden_answers": ["Iron Hill"], "metadata": None}]
    rows[0]["metadata"]["type"] = "bridge"

    def load_dataset(name, part):
        if part == "nq":
            raise ConnectionError("offline\nand more")
        assert (name, part) == ("RUC-NLPIR/FlashRAG_datasets", "2wikimultihopqa")
        return {"dev": rows}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    formats.get("2wiki", tmp_path)
    first, second = data.read_questions(tmp_path / "2wiki_dev.jsonl")
    assert [s["title"] for s in first["metadata"]["steps"]] == ["A", "B"] or first["metadata"]["gold_titles"] == ["A", "B"]
    assert second["golden_answers"] == ["Iron Hill"] and first["metadata"]["type"] == "bridge"         # what else the set says stays
    with pytest.raises(Problem, match=r"nq can't be fetched \(ConnectionError: offline\)"):
        formats.get("nq", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Problem, match="pip install datasets"):
        formats.get("nq", tmp_path)


@pytest.mark.parametrize("args", [[], ["show"], ["look", "x"], ["export", "x"], ["show", "nothing.jsonl"], ["show", "x", "y"], ["get", "squad"]])
def test_bad_commands(tmp_path, args):
    done = run_script(tmp_path, "data.py", *args)
    assert done.status == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
