"""The figures of the table (eval.py) by hand, and rollouts that come back in the order of their questions."""
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from test_real import checkpoint
from test_rollout import Script
from tokenizers import processors

import data
import eval as benchmark
import model
import tools
import workflows
from autocoa import ANSWER, OBSERVATION, PROMPT, THINK, Codec, Trajectory
from common import Problem, Settings


def question(name, *facts):
    return {"id": name, "question": "Who?", "golden_answers": ["Eva"], "metadata": {"steps": [{"fact": f, "noun": f.split("|")[1], "subject": f.split("|")[0], "queries": [f.split("|")[0]]} for f in facts]}}


def record(em, *queries, malformed=0.0, forced=0.0, id=None):
    return {"id": id, "question": f"{id}?", "em": em, "f1": em, "cover": em, "overlap": em, "actions": len(queries), "queries": list(queries), "malformed": malformed, "forced": forced}


SETS = {"single": [question("a", "Silver River|director"), question("b", "Iron Hill|mayor")], "chain": [question("c", "Eva Moss|spouse", "Ada Falk|job")]}
RECORDS = {"single": [record(1.0, "silver river film"), record(0.0, malformed=1.0)], "chain": [record(1.0, "Ada Falk", "nothing", forced=1.0)]}


def test_summary_by_hand():
    """The average is over sets, not over questions; search rates are over facts, by whether a query names the subject."""
    row = benchmark.summary(RECORDS, SETS, {"Iron Hill|mayor", "Ada Falk|job"})
    assert (row["single"]["em"], row["chain"]["em"], row["avg"]["em"]) == (50, 100, 75)
    assert (row["single"]["actions"], row["chain"]["actions"], row["avg"]["actions"]) == (0.5, 2, 1.25)
    assert (row["single"]["malformed"], row["avg"]["malformed"]) == (50, 25)
    assert (row["single"]["forced"], row["chain"]["forced"], row["avg"]["forced"]) == (0, 100, 50)
    assert row["avg"]["search_known"] == 0.5            # Ada Falk was searched for, Iron Hill was not
    assert row["avg"]["search_unknown"] == 0.5          # Silver River was, Eva Moss was not


def test_analyses_by_hand():
    """Right answers and success by number of actions (Fig. 3); EM where all facts are known and where not (appendix A); calculations."""
    avg = benchmark.summary(RECORDS, SETS, {"Silver River|director"})["avg"]
    assert avg["by_actions"] == {"0": {"questions": 1, "correct": 0, "success": 0.0, "share": 0.0}, "1": {"questions": 1, "correct": 1, "success": 100.0, "share": 50.0},
                                 "2": {"questions": 1, "correct": 1, "success": 100.0, "share": 50.0}}
    assert (avg["em_known"], avg["em_unknown"], avg["calculated"]) == (100, 50, None)
    sums = {"compare": [question("d", "Eva Moss|birth year", "1993 - 1976|difference")] * 2}
    avg = benchmark.summary({"compare": [record(1.0, "Eva Moss", "calculate: 1993 - 1976"), record(0.0, "Eva Moss")]}, sums, set())["avg"]
    assert avg["calculated"] == 0.5 and avg["search_unknown"] == 1.0           # a calculation is no fact to search for


@pytest.mark.parametrize("known", [set(), {"Silver River|director", "Iron Hill|mayor", "Eva Moss|spouse", "Ada Falk|job"}])
def test_nothing_known_is_still_json(known):
    """A base model that knows none of the facts (or all): the rate of no facts is null. Guards: NaN, which is not JSON."""
    row = benchmark.summary(RECORDS, SETS, known)
    json.dumps(row, allow_nan=False)
    assert "SFT-1" in benchmark.table({"SFT-1": row}, list(SETS))


def test_interval():
    """Near the textbook's: mean +- 1.96 standard errors of the average over sets; none where all agree."""
    rng = np.random.default_rng(1)
    sets = [100.0 * (rng.random(n) < p) for n, p in ((150, 0.9), (150, 0.5), (80, 0.3))]
    low, high = benchmark.interval(sets)
    mean, error = np.mean([x.mean() for x in sets]), np.sqrt(sum(x.var() / len(x) for x in sets)) / 3
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3) and high == pytest.approx(mean + 1.96 * error, abs=0.3)
    assert benchmark.interval([[100.0] * 5, [100.0] * 9]) == [100, 100]


def test_a_paired_interval():
    """Two rows that differ on a tenth of the questions, always in one direction: a gain of ten points, whatever the questions' own spread."""
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.5
    def rows(right, which):
        return [record(float(right[i]), id=i) for i in which]
    others = {"a": rows(right, range(200)), "b": rows(right, range(200, 400))}
    wrong = np.flatnonzero(~right)[:40]
    better = right.copy()
    better[wrong] = True
    records = {"a": rows(better, range(200)), "b": rows(better, range(200, 400))[::-1]}        # matched by id, not by place
    found = benchmark.paired([(records, others)])
    assert found["gain"] == pytest.approx(10) and 6.5 < found["gain_low"] < 8.5 and 11.5 < found["gain_high"] < 13.5
    assert benchmark.paired([(others, others)]) == {"gain": 0, "gain_low": 0, "gain_high": 0, "gain_questions": 400}
    assert benchmark.paired([({**records, "c": [record(1.0, id=0)]}, {"a": others["a"], "b": others["b"][:150]})])["gain"] > 0      # over what both answered


def test_runs_on_the_same_questions_are_no_new_questions():
    """Ten copies of one run have the interval of one; three runs with questions of their own have a narrower one."""
    rng = np.random.default_rng(2)
    def run(seed):
        return {"a": [record(float(x), id=f"{seed} {i}") for i, x in enumerate(rng.random(100) < 0.6)]}, {"a": [record(float(x), id=f"{seed} {i}") for i, x in enumerate(rng.random(100) < 0.3)]}
    one, two, three = run(0), run(1), run(2)
    assert benchmark.paired([one] * 10) == pytest.approx(benchmark.paired([one]))
    single, pooled = benchmark.paired([one]), benchmark.paired([one, two, three])
    assert pooled["gain_high"] - pooled["gain_low"] < 0.7 * (single["gain_high"] - single["gain_low"])


def test_a_workflow_sees_what_fits(lm):
    """The ReAct loop's observations have at most max_observation tokens, like those of agents."""
    long = "Silver River 1: A film. It was directed by Eva Moss.\n Iron Hill 2: A film."
    _, t = workflows.react(lm, [{"question": "Who?"}], lambda queries: [long] * len(queries), Settings(max_len=400, max_observation=10, max_thought=8), max_actions=2)[0]
    assert t.observations and all(o == lm.codec.fit(long, 10) != long for o in t.observations)


def script(monkeypatch, lm, says):
    """A decoder that writes what `says` says, given the row's text so far, instead of what the network would."""
    class Decoder:
        def __init__(self, prompts):
            self.rows = [list(p) for p in prompts]

        def keep(self, rows):
            self.rows = [list(self.rows[r]) for r in rows]

        def feed(self, sequences):
            for row, ids in zip(self.rows, sequences, strict=True):
                row += ids

        def decode(self, stops, limits, temperature):
            new = [says(lm.codec.decode(row))[:n] if n else [] for row, n in zip(self.rows, limits, strict=True)]
            self.feed(new)
            return new, None
    monkeypatch.setattr(lm, "decoder", Decoder, raising=False)


def test_a_workflow_calls_as_often_as_an_agent(lm, monkeypatch):
    """max_actions calls, where the model goes on asking; then it is asked for the answer, whose end of turn is no part of it, nor of a query. Guards: four
    calls whatever the setting said; an end-of-turn token left in answers and queries."""
    codec = lm.codec

    def says(text):
        if text.endswith("\\boxed{"):
            return codec.encode("Eva Moss") + [codec.eos]
        return codec.encode("Silver River") + [codec.eos] if text.endswith("<begin_search>") else codec.encode("director of it?")
    script(monkeypatch, lm, says)
    seen = []
    for most in (0, 1, 6):
        (answer, t), = workflows.react(lm, [{"question": "Who?"}], lambda queries: seen.extend(queries) or ["Silver River 1: A film."] * len(queries), Settings(max_actions=most or 3), max_actions=0 if not most else None)
        assert answer == "Eva Moss" and t.queries == ["Silver River"] * most and t.ids.count(codec.boxed) == 1
    assert set(seen) == {"Silver River"}


def test_the_lines_of_an_instruct_models_workflow(tmp_path, monkeypatch):
    """Each step on a line of its own, also behind a thought or a query that was cut at its budget, or that ended the turn; the answer is what follows `Answer:`, and a
    thought that merely speaks of one does not end the run. Guards: "the writer ofSearch:"; "The answer is not known yet" taken for an answer."""
    checkpoint(tmp_path / "x")
    lm = model.load_pretrained(str(tmp_path / "x"), "cpu")

    def text(x):
        return lm.codec.tok.encode(x, add_special_tokens=False)
    turns = iter([text(" The answer is not known yet."), text(" The Clay Hour") + [lm.codec.eos], text(" Orla Venn wrote it. Answer: Orla Venn\n")])
    script(monkeypatch, lm, lambda so_far: next(turns))
    (answer, t), = workflows.react(lm, [{"question": "Who wrote The Clay Hour?"}], lambda queries: ["The Clay Hour 1: A novel."] * len(queries), Settings(max_len=2000), examples=workflows.REACT)
    said = lm.codec.decode(t.ids).removeprefix(workflows.REACT).replace("</s>", "")
    assert said == ("Question: Who wrote The Clay Hour?\nThought: The answer is not known yet.\nSearch: The Clay Hour\nObservation: The Clay Hour 1: A novel.\nThought: Orla Venn wrote it. Answer: Orla Venn\n")
    assert answer == "Orla Venn" and t.queries == ["The Clay Hour"]
    lm.codec.tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert workflows.begin(lm.codec) == [1] and workflows.words(lm.codec, "").prompt("Who?")[:1] == [1]         # a checkpoint whose texts begin with a token


def test_a_workflow_answers_each_row_for_itself(lm):
    """A question answered alone and beside one that has no room left: the same. Guards: the longest row of a batch ended the loop for all."""
    questions = [{"question": "Who?"}, {"question": "Who directed it? " * 70}, {"question": "A"}]
    found = {}
    for rows in (1, 3):
        s = Settings(max_len=420, max_thought=12, max_actions=3, batch_rows=rows)
        found[rows] = workflows.react(lm, questions, lambda queries: ["Silver River 1: A film."] * len(queries), s)
    assert [(a, t.ids, t.queries) for a, t in found[1]] == [(a, t.ids, t.queries) for a, t in found[3]]
    assert len(found[3][0][1].queries) == 3 > len(found[3][1][1].queries)


def test_oracle_passages_by_id():
    """Of two passages with one title the one that is marked; by title where ids are of another corpus: the one that holds an answer."""
    passages = [{"id": str(i), "contents": f'"{title}"\n{text}'} for i, (title, text) in enumerate([("Iron Hill", "A band."), ("Eva Moss", "A judge."), ("Iron Hill", "A town.")])]
    search = tools.library(passages, 1)
    for ids, golden, shown in ((["2"], "x", "Iron Hill 1: A town."), (["1"], "x", "Iron Hill 1: A band."), (["9"], "x", "Iron Hill 1: A band."), ([], "x", "Iron Hill 1: A band."), ([], "a TOWN", "Iron Hill 1: A town.")):
        assert data.gold_passages({"golden_answers": [golden], "metadata": {"gold_ids": ids, "gold_titles": ["Iron Hill"], "steps": []}}, search) == shown


def test_predictions_that_were_cut(tmp_path):
    """A line cut by an interruption is asked again, and what follows does not go on behind it. What --resume found of other sets stays, if the same weights gave it."""
    made, asked = {"ReAct": "w1"}, []

    def answer(questions):
        asked.extend(q["id"] for q in questions)
        return [record(1.0, id=q["id"]) for q in questions]
    sets = {name: [{"id": f"{name}{i}", "question": f"{name}{i}?", "golden_answers": ["x"], "metadata": {}} for i in range(3)] for name in "ab"}
    first = benchmark.Predictions(tmp_path, False)
    first.row("ReAct", sets, "w1", answer, 2)
    first.part.write_text(first.part.read_text()[:-20])
    for _ in range(2):
        second = benchmark.Predictions(tmp_path, True)
        found = second.row("ReAct", sets, "w1", answer, 2)
    assert asked == ["a0", "a1", "a2", "b0", "b1", "b2", "b2"] and [r["id"] for r in found["b"]] == ["b0", "b1", "b2"]
    second.finish({"ReAct": found}, made)
    for weights, left in (("w1", 6), ("w2", 3)):
        third = benchmark.Predictions(tmp_path, True)
        third.finish({"ReAct": third.row("ReAct", {"a": sets["a"]}, weights, answer, 2)}, {"ReAct": weights})
        assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == left


@pytest.mark.parametrize("line", ['{"row": }\n', '{"row": "A"}\n', "[1}\n", '{"row": "A", "set": "a", "id": "1", "queries": []}\n'])
def test_damaged_predictions(tmp_path, line):
    """One line that names the file and the line; without --resume nothing of it is read."""
    (tmp_path / "predictions.jsonl").write_text(json.dumps(dict(record(1.0, id="0"), row="A", set="a")) + "\n" + line)
    with pytest.raises(Problem, match="predictions.jsonl:2: not a prediction.*remove this line"):
        benchmark.Predictions(tmp_path, True)
    benchmark.Predictions(tmp_path, False)


def test_which_answers_are_asked_again(tmp_path):
    """With --resume: those behind a search that failed, and those whose accepted answers changed. With some --rows: those, and the records of others stay."""
    asked = []

    def answer(questions):
        asked.extend(q["id"] for q in questions)
        return [dict(record(1.0, id=q["id"]), lost=int(q["id"] == "1" and len(asked) < 9)) for q in questions]

    def go(golden="x", resume=True, rows=("A", "B"), chosen=()):
        asked.clear()
        sets = {"a": [{"id": str(i), "question": f"{i}?", "golden_answers": [golden if i == 2 else "x"], "metadata": {}} for i in range(3)]}
        p = benchmark.Predictions(tmp_path, resume, chosen)
        p.finish({row: p.row(row, sets, "w", answer, 9) for row in rows}, {"A": "w", "B": "w"})
        return len((tmp_path / "predictions.jsonl").read_text().splitlines())
    assert go(resume=False) == 6 and asked == ["0", "1", "2"] * 2
    assert go() == 6 and asked == ["1", "1"]
    assert go("y") == 6 and asked == ["1", "2"] * 2
    assert go("y", False, ["A"], ["A"]) == 6 and asked == ["0", "1", "2"]       # the record of B that a failed search spoilt stays until B is asked
    assert go("y", True) == 6 and asked == ["1", "1"]
    assert go("y", False, ["A"]) == 3


def test_the_records_of_other_sets_stay(tmp_path):
    """Without --resume the sets that are asked are asked anew, the answers to others stay. Guards: `--data=b.jsonl` removed the hours of `--data=a.jsonl`."""
    asked = []

    def go(name):
        sets = {name: [{"id": f"{name}0", "question": "0?", "golden_answers": ["x"], "metadata": {}}]}
        p = benchmark.Predictions(tmp_path, False, (), sets)
        p.finish({"A": p.row("A", sets, "w", lambda questions: asked.extend(q["id"] for q in questions) or [record(1.0, id=q["id"]) for q in questions], 9)}, {"A": "w"})
        return [json.loads(line)["set"] for line in open(tmp_path / "predictions.jsonl")]
    assert [go("a"), go("b"), go("b")] == [["a"], ["b", "a"], ["b", "a"]] and asked == ["a0", "b0", "b0"]
    (tmp_path / "predictions.jsonl").write_bytes(b'{"row": "\xff"}\n')
    with pytest.raises(Problem, match="predictions.jsonl:1: not a prediction"):
        benchmark.Predictions(tmp_path, True)
    assert go("a") == ["a"]


def test_answers_come_back_in_order(lm):
    """Questions are rolled out by length, a few at a time; each trajectory is its own question's."""
    texts = ["Who directed it?", "Who?", "Who starred in Silver River film of Eva Moss?", "A", "Who was born in 1950?"]
    done = workflows.answers(lm, [{"question": x} for x in texts], None, Settings(batch_rows=2, max_len=60), max_actions=0)
    assert [t.ids[:t.role.index(1)] if 1 in t.role else t.ids[:len(lm.codec.prompt(x))] for x, t in zip(texts, done)] == [lm.codec.prompt(x) for x in texts]


def test_reflexion_by_script(lm, monkeypatch):
    """A try without an answer, or that the model calls wrong, is followed by its own sentence and another try with all lessons so far, three at most; one that it does not is final, whatever the
    gold answer says. Queries of all tries count."""
    tries = {"a": ["x", "", "z", "never"], "b": ["right at once"], "c": ["x", "good"]}
    seen, wrong = [], {"x": True, "": False, "z": True, "right at once": False, "good": False, "late": False}

    def react(lm, questions, search, s, examples="", desc=None):
        out = []
        for q in questions:
            name, _, lessons = q["question"].partition("?")
            seen.append((name, lessons.count("Lesson from try")))
            t = Trajectory()
            t.add(lm.codec.encode(f"Question: {name}"), PROMPT, 0)
            t.queries, t.observations = [f"{name} {len(seen)}"], [f"of {len(seen)}"]
            out.append((tries[name].pop(0), t))
        return out

    def complete(lm, texts, budget, s, desc=None):
        assert all("wrong or not supported" in text.split("answer that was given")[1] for text in texts)
        return [("look again.", None)] * len(texts)

    def says_no(lm, texts, s):
        assert all("Yes or No" in text for text in texts)
        return [wrong["" if " is: none\n" in text else next(k for k in wrong if f" is: {k}\n" in text)] for text in texts]
    monkeypatch.setattr(workflows, "react", react)
    monkeypatch.setattr(workflows, "complete", complete)
    monkeypatch.setattr(workflows, "says_no", says_no)
    done = workflows.reflexion(lm, [{"question": f"{name}?", "golden_answers": ["none of these"]} for name in "abc"], None, Settings())
    assert [answer for answer, _ in done] == ["z", "right at once", "good"]
    assert seen == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    tries["a"], first = ["late"], [("x", done[0][1])]         # ReAct's answer is the first try, where it is there
    assert workflows.reflexion(lm, [{"question": "a?", "golden_answers": []}], None, Settings(), first)[0][0] == "late" and seen[6:] == [("a", 1)] and first[0][0] == "x"
    assert [t.queries for _, t in done] == [["a 1", "a 4", "a 6"], ["b 2"], ["c 3", "c 5"]] and done[2][1].observations == ["of 3", "of 5"]       # a failed search of any try is seen


def test_no_is_read_off_the_next_token(lm):
    """Yes or No by which is likelier as the next token, whatever is likelier than both: SmolLM2 begins a new line there, which was read as a yes."""
    texts = [f"Is it so? {n} Yes or No:" for n in range(12)] + ["Who?"]
    yes, no = (lm.codec.tok.encode(f"Answer: {w}", add_special_tokens=False)[-1] for w in ("Yes", "No"))
    assert yes != no
    expected = []
    for text in texts:
        ids = torch.tensor([workflows.begin(lm.codec) + lm.codec.tok.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            z = lm.model.logits(lm.model(ids))[0, -1]
        expected.append(bool(z[no] > z[yes]))
    assert workflows.says_no(lm, texts, Settings(batch_rows=3)) == expected and 0 < sum(expected) < len(texts)


def test_the_try_without_its_examples(lm, monkeypatch):
    """What the model judges is its own try. Guards: ReAct's examples left in front of it where a text begins with BOS, as Llama 3's do."""
    tok = copy.deepcopy(lm.codec.tok)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tok.bos_token_id)])
    there, judged = SimpleNamespace(codec=Codec(tok)), []
    t = Trajectory()
    t.add(workflows.begin(there.codec) + there.codec.tok.encode(f"{workflows.REACT}Question: Who?", add_special_tokens=False), PROMPT, 0)
    monkeypatch.setattr(workflows, "says_no", lambda lm, texts, s: judged.extend(texts) or [False] * len(texts))
    workflows.reflexion(there, [{"question": "Who?"}], None, Settings(), [("Eva", t)])
    assert workflows.begin(there.codec) and judged[0].startswith("Question: Who?\n")


def test_reading_several_facts(codec):
    """From passages that are given a reader asks for one fact after the other, as it was pretrained to; the last answers. Guards: cut at the second ask, and an answer forced there."""
    def reader(*lines):
        script = Script(codec, *lines)
        return SimpleNamespace(codec=codec, decoder=script), script
    given = "Silver River 1: A film. Eva Moss starred in it.\n Eva Moss 2: A star. She was born in 1950."
    lm, _ = reader(" 1 star of Silver River 2 born. 1 star of Silver River? Silver River 1 starred Eva Moss. 2 born of Eva Moss? Eva Moss 2 was born in 1950.</think>\\boxed{ 1950}<eos>")
    (answer, t), = workflows.read(lm, [{"question": "When was the star of Silver River born?"}], [given], Settings(max_len=300))
    assert answer == "1950" and [codec.decode([i for i, r in zip(t.ids, t.role) if r == OBSERVATION])] == [f"<search_result> {given}</search_result>"]
    lm, script = reader(" 1 star? it goes on and on" + " and on" * 300)
    (answer, t), = workflows.read(lm, [{"question": "Who?"}], [given], Settings(max_len=200))
    assert len(t.ids) <= 200 and sum(r == ANSWER for r in t.role) == 2 + 12         # and one that never ends is asked, with room for an answer


def test_reading_what_is_given(lm):
    """Each question gets its own passages, whole, and no search is run; a workflow's thought comes first, as the base model has learned to read."""
    given = ["Silver River 1: A film.", "Iron Hill 1: A film. It was directed by Ada Falk."]
    done = workflows.read(lm, [{"question": "Who directed Silver River?"}, {"question": "Who?"}], given, Settings(max_len=300, max_thought=8))
    assert [t.observations for _, t in done] == [[given[0]], [given[1]]] and all(t.queries == [] for _, t in done)
    for (_, t), o in zip(done, given):
        seen = [i for i, r in zip(t.ids, t.role) if r == OBSERVATION]
        assert seen == [lm.codec.result, *lm.codec.encode(o), lm.codec.end_result] and t.role.index(OBSERVATION) > t.role.index(THINK)


def test_an_answer_at_once(lm):
    """No thought: the box is opened behind the question, and what the model writes in it is the answer."""
    questions = [{"question": "Who?"}, {"question": "Who directed Silver River?"}, {"question": "A"}]
    answers = workflows.direct(lm, questions, Settings(batch_rows=2, max_answer=5))
    for q, (answer, t) in zip(questions, answers, strict=True):
        assert t.ids[:len(lm.codec.prompt(q["question"]))] == lm.codec.prompt(q["question"]) and t.role[-1] == ANSWER
        dec = lm.decoder([lm.codec.prompt(q["question"]) + [lm.codec.end_think, lm.codec.boxed]])
        (ids,), _ = dec.decode([lm.codec.close, lm.codec.eos], [5], 0.0)
        assert answer == lm.codec.decode(ids).replace("}", "").replace("<eos>", "").strip()


def test_what_an_answer_depends_on(lm, tmp_path):
    """Weights and settings of evaluation make another key, the run's name does not: --resume mixes nothing."""
    lm.save(tmp_path / "a")
    key = benchmark.made_by(tmp_path / "a", Settings())
    assert key == benchmark.made_by(tmp_path / "a", Settings(run="other", rl_lr=1.0, resume=True))
    for change in (dict(top_k=5), dict(max_observation=9), dict(seed=1), dict(corpus="leads"), dict(max_actions=1), dict(bits=4)):
        assert benchmark.made_by(tmp_path / "a", Settings(**change)) != key
    corpus, keys = tmp_path / "corpus.jsonl", set()
    for text in ("one", "two", "a first line" + " " * (1 << 24), " " * (1 << 24)):         # the same path, other passages; a large file that lost its beginning
        corpus.write_text(text)
        keys.add(benchmark.made_by(tmp_path / "a", Settings(corpus=str(corpus))))
    assert len(keys) == 4
    tiny(lm.codec, seed=5).save(tmp_path / "b")
    assert benchmark.made_by(tmp_path / "b", Settings()) != key
