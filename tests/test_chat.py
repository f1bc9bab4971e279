"""Language models that are asked in words (chat.py), as judge (eval.py) and as teacher (teacher.py): over loopback HTTP, and a local folder."""
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, rows, run_script, strict
from test_real import BOOKS, ONE, PASSAGES, PEOPLE, TOWNS, TWO, checkpoint

import chat
import formats
import live
import teacher
import tools
from common import Problem, Settings


class Endpoint:
    """An OpenAI-compatible endpoint on a loopback port; `say` (messages, ask) -> text, or a whole answer as it is sent, or a status that refuses."""

    def __init__(self, say):
        self.asked = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(dict(ask, path=self.path, key=self.headers.get("Authorization")))
                said = say(ask["messages"], ask)
                body = json.dumps({"error": "use max_completion_tokens" if said == 422 else "maximum context length"} if isinstance(said, int) else said if not isinstance(said, str) else {
                    "choices": [{"message": {"role": "assistant", "content": said}}], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}).encode()
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def endpoint():
    made = []

    def make(say):
        made.append(Endpoint(say))
        return made[-1]
    yield make
    for e in made:
        e.server.shutdown()
        e.server.server_close()


def user(text):
    return [{"role": "user", "content": text}]


def test_an_endpoint_is_asked_once(endpoint, tmp_path, monkeypatch):
    """The protocol, the name behind # (or the paper's judge), the key, the cost; the same question is answered from the cache, another sample of it is not."""
    there = endpoint(lambda messages, ask: messages[-1]["content"].upper())
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    a = chat.Chat(there.url + "#small", Settings(), "judge", tmp_path / "c.sqlite")
    assert a([user(f"q{i}") for i in range(20)], 5, stop=["x"]) == [f"Q{i}" for i in range(20)]
    first = there.asked[0]
    assert (first["path"], first["model"], first["max_tokens"], first["stop"], first["key"]) == ("/v1/chat/completions", "small", 5, ["x"], "Bearer secret")
    assert a.report() == "small: asked 20 times (0 more from the cache), 200 tokens read and 60 written"
    again = chat.Chat(there.url + "#small", Settings(), "judge", tmp_path / "c.sqlite")
    assert again([user("q3"), user("new")], 5, stop=["x"]) == ["Q3", "NEW"] and len(there.asked) == 21
    again([user("q3")], 5, stop=["x"], temperature=0.5, sample=1)
    assert len(there.asked) == 22 and there.asked[-1]["seed"] == 1
    assert chat.Chat(there.url, Settings(), "judge", tmp_path / "c.sqlite").name == "Qwen/Qwen2.5-14B-Instruct"


@pytest.mark.parametrize("said", [{"choices": []}, {"error": "no such model"}, {"choices": [{"message": {"content": 7}}]}, []])
def test_an_endpoint_that_answers_nonsense(endpoint, tmp_path, said):
    """One line with the setting; what was said before stays."""
    there = endpoint(lambda messages, ask: said if messages[-1]["content"] == "bad" else "fine")
    a = chat.Chat(there.url + "#x", Settings(), "judge", tmp_path / "c.sqlite", threads=1)
    with pytest.raises(Problem, match=f"--judge={there.url}#x: not an endpoint that answers"):
        a([user("good"), user("bad")], 5)
    assert chat.Chat(there.url + "#x", Settings(), "judge", tmp_path / "c.sqlite")([user("good")], 5) == ["fine"]
    assert len(there.asked) == 2


@pytest.mark.parametrize("usage", [[10, 3], "many", {"prompt_tokens": "ten"}, {"prompt_tokens": None}])
def test_a_cost_that_is_none(endpoint, tmp_path, usage):
    """What is no count counts nothing. Guards: a traceback, and the answer that was paid for lost."""
    there = endpoint(lambda messages, ask: {"choices": [{"message": {"content": "fine"}}], "usage": usage})
    assert chat.Chat(there.url + "#x", Settings(), "judge", tmp_path / "c.sqlite")([user("a")], 5) == ["fine"]


def test_one_conversation_that_is_refused(endpoint, tmp_path):
    """A null (a reasoning model that thought to its budget's end) is no text; a 400 costs that conversation alone, and is not kept; an endpoint that refuses all ends the
    run, with its own words. A stop that an endpoint takes no notice of cuts all the same."""
    def say(messages, ask):
        text = messages[-1]["content"]
        return {"choices": [{"message": {"content": None}}]} if text == "null" else 400 if text == "long" else "fine </s> more"
    there = endpoint(say)
    a = chat.Chat(there.url + "#x", Settings(), "judge", tmp_path / "c.sqlite", threads=1)
    assert a([user("good"), user("null"), user("long"), user("well")], 5, stop=["</s>"]) == ["fine ", "", "", "fine "]
    assert "1 refused" in a.report() and a.counts["asked"] == 3
    a([user("long")], 5, stop=["</s>"])
    assert len(there.asked) == 5
    with pytest.raises(Problem, match="maximum context"):
        chat.Chat(there.url + "#x", Settings(), "judge", tmp_path / "other.sqlite", threads=1)([user("long")] * 9, 5)


def test_what_other_threads_were_told_is_kept(endpoint, tmp_path):
    """One thread gets nonsense while another waits for its answer. Guards: that answer, which was paid for, was thrown away."""
    failed = threading.Event()

    def say(messages, ask):
        if messages[-1]["content"] == "bad":
            return {"choices": []}
        failed.wait(5)
        return "fine"
    there = endpoint(say)
    a = chat.Chat(there.url + "#x", Settings(), "judge", tmp_path / "c.sqlite", threads=2)
    threading.Timer(0.5, failed.set).start()
    with pytest.raises(Problem, match="not an endpoint that answers"):
        a([user("bad"), user("good")], 5)
    assert a([user("good")], 5) == ["fine"] and len(there.asked) == 2


def test_an_endpoint_that_is_down(tmp_path, monkeypatch):
    monkeypatch.setattr(live.Polite, "wait", lambda self, seconds: None)
    with pytest.raises(Problem, match="--teacher=http://127.0.0.1:9/v1#x: not an endpoint"):
        chat.Chat("http://127.0.0.1:9/v1#x", Settings(), "teacher", tmp_path / "c.sqlite")([user("q")], 5)


def test_verdicts(endpoint, tmp_path):
    """Yes and no in any dress; what is neither is not guessed; an empty answer is wrong unasked."""
    words = {"a": "Yes.", "b": " **no**, because", "c": "It may be.", "d": "Nobody", "e": "YES"}
    there = endpoint(lambda messages, ask: words[re.search(r"Given answer: (.)", messages[0]["content"])[1]])
    records = [{"question": "Who?", "golden_answers": ["Eva", "Eva Moss"], "answer": x} for x in ("a", "b", "", "c", "d", "e", " ")]
    assert chat.judge(chat.Chat(there.url + "#x", Settings(), "judge", tmp_path / "c.sqlite"), records) == [1.0, 0.0, 0.0, None, None, 1.0, 0.0]
    assert len(there.asked) == 5 and "Accepted answers: Eva; Eva Moss\n" in there.asked[0]["messages"][0]["content"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, question files and passages, as a user has them."""
    cwd = tmp_path_factory.mktemp("user")
    checkpoint(cwd / "checkpoint")
    for name, questions in (("hotpotqa", TWO), ("nq", ONE)):
        (cwd / f"{name}_dev.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (cwd / "passages.jsonl").write_text("".join(json.dumps({"id": str(i), "contents": x}) + "\n" for i, x in enumerate(PASSAGES)))
    return cwd


def test_eval_with_a_judge(endpoint, folder):
    """A column of the table and a figure of every row: the share of yes among the verdicts that could be read; the others are counted."""
    turn = iter(range(10_000))
    there = endpoint(lambda messages, ask: ("yes", "no", "perhaps")[next(turn) % 3])
    done = run_script(folder, "eval.py", str(ROOT / "config" / "smollm2.py"), "--model=checkpoint", "--data=nq_dev.jsonl", "--corpus=passages.jsonl", "--max_len=480", "--max_observation=60",
                 "--eval_questions=6", f"--judge={there.url}#x")
    assert done.status == 0, done.err
    result = strict(done.out.splitlines()[-1])["rows"]
    records = rows(next((folder / "out/eval").glob("checkpoint-*/predictions.jsonl")))
    for row, figures in result.items():
        verdicts = [r["judge"] for r in records if r["row"] == row]
        read = [v for v in verdicts if v is not None]
        assert figures["avg"]["judge_unread"] == len(verdicts) - len(read) and figures["nq_dev"]["judge"] == pytest.approx(100 * sum(read) / len(read))
    assert sum(f["avg"]["judge_unread"] for f in result.values()) > 3 and "  judge" in done.out and "x: asked" in done.out


def test_a_judge_that_fails_leaves_the_table(endpoint, folder):
    """The rows are answered, shown and kept, then the judge's trouble ends the run. Guards: it cost the whole table."""
    there = endpoint(lambda messages, ask: {"choices": []})
    done = run_script(folder, "eval.py", str(ROOT / "config" / "smollm2.py"), "--run=other", "--model=checkpoint", "--data=nq_dev.jsonl", "--corpus=passages.jsonl", "--max_len=480", "--max_observation=60",
                 "--eval_questions=2", "--rows=model only,ReAct workflow", f"--judge={there.url}#x")
    assert done.status == 2 and "not an endpoint that answers" in done.err
    result = strict(done.out.splitlines()[-1])["rows"]
    records = rows(next((folder / "out/eval").glob("checkpoint-*/predictions.jsonl")))
    assert {"model only", "ReAct workflow"} <= set(result) and all(sum(r["row"] == row for r in records) >= 2 for row in ("model only", "ReAct workflow"))


def test_a_local_folder(folder, tmp_path):
    """Decoded here, by the chat template, cut at a stop; a model without a template is refused."""
    s = Settings(batch_rows=2)
    a = chat.Chat(str(folder / "checkpoint"), s, "teacher", tmp_path / "c.sqlite")
    texts = a([user(f"Who wrote {b}?") for b in BOOKS[:3]], 12)
    tok = a.lm.codec.tok
    prompt = tok.apply_chat_template(user(f"Who wrote {BOOKS[2]}?"), tokenize=False, add_generation_prompt=True)
    ids, _ = a.lm.decoder([tok.encode(prompt, add_special_tokens=False)]).decode([tok.eos_token_id], [12], 0.0)
    assert texts[2] == tok.decode([i for i in ids[0] if i != tok.eos_token_id]) and len(texts[2]) > 3
    part = texts[2][len(texts[2]) // 2:][:2]
    assert a([user(f"Who wrote {BOOKS[2]}?")], 12, stop=[part]) == [texts[2].split(part)[0]]
    assert a([user("x")], 12, temperature=1.0, sample=1) != a([user("x")], 12, temperature=1.0, sample=2) and a.counts["asked"] == 6
    done = run_script(folder, "teacher.py", "--teacher=checkpoint", "--train_data=nq_dev.jsonl", "--corpus=passages.jsonl", "--out=t", "--coa=2", "--tries=1", "--batch_rows=8")
    assert done.status == 0 and "0 chains of action" in done.out, done.err          # a random model solves nothing, and that is no error


def scholar(messages, ask):
    """A teacher by rule: it knows the writers of the first four books by heart; with the tool it finds everything but what the seventh book's writer did."""
    question = re.search(r"Question: (.*)", messages[0]["content"])[1]
    book = next(i for i, b in enumerate(BOOKS) if b in question)
    town, found = "grow up" in question, " ".join(m["content"] for m in messages[1:] if "search_result" in m["content"] and m["role"] == "user")
    if "Go on" in messages[-1]["content"] or "<begin_search>" not in messages[0]["content"]:        # without the tool
        return f"I think it was {PEOPLE[book]}.</think> \\boxed{{{TOWNS[book] if town else PEOPLE[book]}}}" if book < 4 else "Perhaps Ada.\nOr not.</think>\\boxed{Ada}"
    if book == 6 or book == 3 and ask["temperature"] == 0:
        return f"I look. <begin_search> {BOOKS[book]}" if len(messages) < 3 else "Nothing.</think>\\boxed{nobody}"
    if BOOKS[book] not in found:
        return f"<think>I need the writer of {BOOKS[book]}. <begin_search> {BOOKS[book]}"
    if town and TOWNS[book] not in found:
        return f"It was {PEOPLE[book]}. <begin_search> {PEOPLE[book]}"
    return f"So I know.</think>\n\\boxed{{{TOWNS[book] if town else PEOPLE[book]}}}"


def test_a_model_as_teacher(endpoint, folder, monkeypatch):
    """Rejection sampling against the gold answer, one and two searches with the real tool, pairs of both directions from questions that exactly one way solved,
    with a beginning in common; what comes out trains. A second run asks nothing."""
    there = endpoint(scholar)
    args = [f"--teacher={there.url}#x", "--train_data=nq_dev.jsonl,hotpotqa_dev.jsonl", "--corpus=passages.jsonl", "--out=taught", "--tries=2", "--top_k=1", "--coa=100"]
    done = run_script(folder, "teacher.py", *args)
    assert done.status == 0, done.err
    coa, cot = rows(folder / "taught/coa.jsonl"), rows(folder / "taught/cot.jsonl")
    pairs = json.loads((folder / "taught/pairs.json").read_text())
    assert len(coa) == 14 and len(cot) == 8                                          # all but the seventh book; the four that are known by heart
    searches = {r["messages"][0]["content"]: r["messages"][1]["content"].count("<begin_search>") for r in coa}
    assert set(searches.values()) == {1, 2} and all((n == 2) == ("grow up" in q) for q, n in searches.items())
    assert all("\n<search_result> " in r["messages"][1]["content"] and "1: " in r["messages"][1]["content"] for r in coa)
    acting = [p for p in pairs if p["chosen"]["value"].startswith("<begin_search>")]
    assert len(acting) == 6 and len(pairs) == 8                                      # books 5, 6 and 8; book 4, where the first try with the tool went wrong
    assert {p["rejected"]["value"] for p in acting} == {"Perhaps Ada."} and all("<think>" in p["conversation"][0]["value"] and "I need the writer" in p["conversation"][0]["value"].rpartition("<think>")[2] for p in acting)
    assert {p["rejected"]["value"] for p in pairs if p not in acting} == {f"<begin_search> {BOOKS[3]}</end_search>"}
    assert "of 16 questions" in done.out and re.search(r"x: asked \d+ times \(0 more from the cache\), \d+0 tokens read", done.out)
    n = len(there.asked)
    again = run_script(folder, "teacher.py", *args)
    assert again.status == 0 and len(there.asked) == n and rows(folder / "taught/coa.jsonl") == coa
    import model
    codec = model.load_pretrained(str(folder / "checkpoint"), "cpu").codec
    *found, odd = formats.read_sft(codec, [folder / "taught" / name for name in ("coa.jsonl", "cot.jsonl", "pairs.json")])
    assert [len(x) for x in found] == [14, 8, 8] and odd == [] and all(codec.well_formed(t) for t in found[0] + found[1])


def test_an_endpoint_of_reasoning_models(endpoint, tmp_path):
    """It knows the budget as max_completion_tokens alone: asked again by that name, once. A seed goes along only where something is drawn."""
    def say(messages, ask):
        return 422 if "max_tokens" in ask else "yes"
    there = endpoint(say)
    asker = chat.Chat(there.url + "#o", Settings(), "judge", tmp_path / "c.sqlite", threads=1)
    assert asker([user("a"), user("b")], 7) == ["yes", "yes"]
    assert ["max_tokens" in a for a in there.asked] == [True, False, False] and there.asked[-1]["max_completion_tokens"] == 7 and "seed" not in there.asked[-1]
    asker([user("a")], 7, temperature=0.5, sample=3)
    assert there.asked[-1]["seed"] == 3


def test_a_pair_whose_thought_ends_at_once(endpoint, tmp_path):
    """The thought in the action's place is that up to its end or the end of its line. Guards: a side that ends in </think> without an answer, which training leaves out; a beginning said
    twice, where the turn began with white space; and
    where the thought ended with the beginning there is nothing to put in the action's place."""
    search = tools.library([{"id": "0", "contents": '"Clay"\nBy Eva.'}], 1)
    thoughts = {"Who?": "It was Ada.</think>\n\\boxed{Ada}", "What?": "</think>\\boxed{Ada}"}

    def say(messages, ask):
        question = re.search(r"Question: (.*)", messages[0]["content"])[1]
        if "<begin_search>" not in messages[0]["content"]:
            return thoughts[question]
        return "\nI look.\n<begin_search> Clay" if len(messages) < 3 else "So.</think>\\boxed{Eva}"
    there = endpoint(say)
    s = Settings(tries=1)
    _, _, pairs = teacher.teach(chat.Chat(there.url + "#x", s, "teacher", tmp_path / "c.sqlite"), [{"question": q, "golden_answers": ["Eva"]} for q in thoughts], search, s)
    assert [(p["conversation"][0]["value"], p["chosen"]["value"], p["rejected"]["value"]) for p in pairs] == [("Who?<think>I look.", "<begin_search> Clay</end_search>", "It was Ada.")]


def test_a_teacher_takes_of_all_files(endpoint, folder):
    """--coa questions, drawn from all files by --seed. Guards: those of the first file alone."""
    asked = set()

    def say(messages, ask):
        asked.add("grow up" in messages[0]["content"])
        return scholar(messages, ask)
    there = endpoint(say)
    done = run_script(folder, "teacher.py", f"--teacher={there.url}#y", "--train_data=nq_dev.jsonl,hotpotqa_dev.jsonl", "--corpus=passages.jsonl", "--out=mixed", "--tries=1", "--coa=8")
    assert done.status == 0 and "of 8 questions" in done.out and asked == {True, False}, done.err


@pytest.mark.parametrize("said", [live.FAILED, live.MISSED])
def test_a_teacher_behind_a_failed_search(endpoint, tmp_path, said):
    """No chain and no pair comes from it, whatever it answers."""
    there = endpoint(lambda messages, ask: "I look. <begin_search> Clay" if "<begin_search>" in messages[0]["content"] and len(messages) < 3 else
                     "So.</think>\\boxed{Eva}" if len(messages) > 2 and "<search_result>" in messages[2]["content"] else "Ada.</think>\\boxed{Ada}")
    asker, question = chat.Chat(there.url + "#x", Settings(), "teacher", tmp_path / "c.sqlite"), {"question": "Who?", "golden_answers": ["Eva"]}
    found, lost = (teacher.teach(asker, [question], lambda queries, o=o: [o] * len(queries), Settings(tries=1)) for o in ("Clay 1: By Eva.", said))
    assert [len(rows) for rows in found] == [1, 0, 1] and lost == ([], [], [])


def test_white_space_before_the_thought(endpoint, tmp_path):
    """Guards: a row with <think> twice, which training refused, of a question that then counted as solved."""
    there = endpoint(lambda messages, ask: "\n<think>It is Eva.</think>\\boxed{Eva}")
    found = [row for rows in teacher.teach(chat.Chat(there.url + "#x", Settings(), "teacher", tmp_path / "c.sqlite"),
                                              [{"question": "Who?", "golden_answers": ["Eva"]}], None, Settings(tries=1))[:2] for row in rows]
    assert found and all(formats.parts_of(row["messages"][1]["content"]) == [("think", "It is Eva."), ("answer", "Eva")] for row in found)


def test_a_teacher_that_never_stops(endpoint, tmp_path):
    """Searches end after max_actions, whatever it writes, and a text that is no trajectory is not kept."""
    there = endpoint(lambda messages, ask: "More. <begin_search> more")
    search = tools.library([{"id": "0", "contents": '"More"\nAnd more.'}], 1)
    s = Settings(max_actions=3, tries=1)
    text, = teacher.chains_of_action(chat.Chat(there.url + "#x", s, "teacher", tmp_path / "c.sqlite"), [{"question": "Who?"}], search, s, 0)
    assert text.count("</end_search>") == 3 and len(there.asked) == 4 and not teacher.right(text, {"golden_answers": ["x"]})


def test_tags_in_a_message_are_text(folder, tmp_path):
    """The template's tags are tags, those that a passage spells are not. Guards: an observation that ends the turn and speaks for the user."""
    a = chat.Chat(str(folder / "checkpoint"), Settings(), "teacher", tmp_path / "c.sqlite")
    tok, talk = a.lm.codec.tok, [*user("Who?</s> <begin_search>"), {"role": "assistant", "content": "Hm."}]
    ids = a.prompt(talk)
    assert tok.decode(ids) == tok.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert ids.count(tok.eos_token_id) == 2 and a.lm.codec.search not in ids


def test_other_weights_are_another_model(folder, tmp_path):
    """The cache knows a folder by its weights: elsewhere it is the same model, and other weights at its place are another. Guards: the former teacher's
    answers given as the new one's."""
    from safetensors.numpy import load_file, save_file
    here, there = tmp_path / "a", tmp_path / "b"
    for path in (here, there):
        shutil.copytree(folder / "checkpoint", path)
    first = chat.Chat(str(here), Settings(), "teacher", tmp_path / "c.sqlite")
    text = first([user("x")], 5)
    moved = chat.Chat(str(there), Settings(), "teacher", tmp_path / "c.sqlite")
    assert moved([user("x")], 5) == text and moved.counts["asked"] == 0
    save_file({name: -x for name, x in load_file(here / "model.safetensors").items()}, here / "model.safetensors", metadata={"format": "pt"})
    other = chat.Chat(str(here), Settings(), "teacher", tmp_path / "c.sqlite")
    other([user("x")], 5)
    assert other.counts["asked"] == 1


@pytest.mark.parametrize("args", [[], ["--teacher=x"], ["--teacher=x", "--train_data=a", "--corpus=b"]])
def test_what_a_teacher_needs(tmp_path, args):
    done = run_script(tmp_path, "teacher.py", *args)
    assert done.status == 2 and "needs all four" in done.err
