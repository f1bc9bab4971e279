"""The benchmark table: each trained stage beside workflows around the base model, on question sets that training never saw.

    python eval.py                                                           # all stages of out/nano
    python eval.py config/smollm2.py --model=FOLDER --data=hotpotqa_dev.jsonl --corpus=passages.jsonl.gz     # any checkpoint, as it is
    python eval.py --compare="SFT-1&2&3+RL-1&2,ReAct workflow" --runs=nano,seed1,seed2               # over the predictions of several seeds

Writes eval.json and predictions.jsonl to out/<run>/ (with --data to out/eval/<model>-<a hash of its path>/), and prints
the table and, as the last line, the JSON. --resume keeps the answers that the same weights gave under the same
settings, of an evaluation that was interrupted or is finished; --rows asks for some rows, and shows the others with the
answers that are there.

What is printed beside EM: F1, actions a question, how often the facts that a question needs were searched for, apart
for those that the base model knows and those that it does not; malformed trajectories. In eval.json also: answers that
had to be forced, cover-EM, the score of the authors' code, the gain over ReAct, questions and right answers by number
of actions (paper Fig. 3), EM where the base model knows all facts and where not (appendix A), calculations that were
done with the calculator, and with --judge what a language model says of the answers. Averages are over the sets, with a
95% bootstrap interval over questions.
"""
import contextlib
import hashlib
import json
import time
from pathlib import Path

import numpy as np

import autocoa
import data
import estimate
import model
import workflows
from chat import Chat, judge
from common import Problem, main, place, read_jsonl, start_folder, write, write_jsonl
from live import FAILED, MISSED
from miniwiki import DIFFERENCE
from train_sft import recall

STAGES = {"SFT-1": "sft1", "SFT-2": "sft2_alone", "SFT-1&2": "sft2", "SFT-1&2&3": "sft3", "RL-2 alone": "rl2_alone",
          "SFT-1&2&3+RL-1": "rl1", "SFT-1&2&3+RL-1&2": "rl2", "SFT-1&2+RL-2": "rl2_from_sft2"}
MADE_FROM = {"sft1": "base", "sft2": "sft1", "sft2_alone": "base", "sft3": "sft2", "rl1": "sft3", "rl2": "rl1",
             "rl2_alone": "base", "rl2_from_sft2": "sft2"}
# rows in which a script asks the base model
WORKFLOWS = ("model only (at once)", "model only", "retrieve-then-read", "oracle passages", "ReAct workflow", "Reflexion workflow")
PERCENT = ("em", "f1", "cover", "overlap", "malformed", "forced")


# ---- answers ------------------------------------------------------------------------------------------------------------
def run_row(row, lm, questions, task, s, tries):
    """-> a record a question: answer, trajectory and figures. tries: {id: what ReAct said}, which is Reflexion's first try; filled here."""
    def looked_up(observations, budget):
        return [lm.codec.fit(o, budget) for o in observations]
    if row == "model only (at once)":
        done = workflows.direct(lm, questions, s, desc=row)
    elif row == "model only":
        done = workflows.closed_book(lm, questions, s, workflows.CLOSED_BOOK, desc=row)
    elif row == "retrieve-then-read":
        done = workflows.read(lm, questions, looked_up(task.eval_search([f"search: {q['question']}" for q in questions]), s.max_observation),
                              s, desc=row)
    elif row == "oracle passages":
        done = workflows.read(lm, questions, looked_up([data.gold_passages(q, task.eval_search) for q in questions], s.max_len // 2),
                              s, desc=row)
    elif row == "ReAct workflow":
        done = workflows.react(lm, questions, task.eval_search, s, examples=workflows.REACT, desc=row)
        tries |= {q["id"]: d for q, d in zip(questions, done)}
    elif row == "Reflexion workflow":
        done = workflows.reflexion(lm, questions, task.eval_search, s,
                                   [tries[q["id"]] for q in questions] if all(q["id"] in tries for q in questions) else None,
                                   desc=row)
    else:
        done = [(lm.codec.answer(t), t) for t in workflows.answers(lm, questions, task.eval_search, s, desc=row)]
    agent = row not in WORKFLOWS
    return [{"id": q["id"], "question": q["question"], "golden_answers": q["golden_answers"], "answer": a,
             "em": autocoa.exact_match(a, q["golden_answers"]), "f1": autocoa.f1(a, q["golden_answers"]),
             "cover": autocoa.cover_match(a, q["golden_answers"]), "overlap": autocoa.overlap_match(a, q["golden_answers"]),
             "actions": len(t.queries), "queries": t.queries,
             "malformed": float(agent and not lm.codec.well_formed(t)), "forced": float(agent and t.forced),
             "lost": sum(o == FAILED or o == MISSED and s.cache != "replay" for o in t.observations),
             "text": lm.codec.decode(t.ids)}
            for q, (a, t) in zip(questions, done)]


def asked(row, lm, task):
    """{set: questions} that this row is asked: with oracle passages those that name them, and Reflexion only of a model
    that can speak of itself."""
    if row == "Reflexion workflow" and not lm.codec.tok.chat_template:
        return {}
    if row == "oracle passages":
        named = {name: [q for q in questions if data.gold_passages(q, task.eval_search)] for name, questions in task.evaluation.items()}
        return {name: questions for name, questions in named.items() if questions}
    return task.evaluation


def made_by(folder, s):
    """What an answer depends on, beside its question and row: a hash of the weights, of the passages and of the settings of evaluation."""
    files = sorted(Path(folder).glob("*.safetensors")) or [Path(folder)]
    weights, corpus = [model.tail_hash([f]) if f.is_file() else str(f) for f in files], Path(s.corpus)
    settings = [s.seed, [model.tail_hash([corpus]), corpus.stat().st_size] if corpus.is_file() else s.corpus, s.language, s.cache,
                s.top_k, s.max_actions, s.max_len, s.max_answer, s.max_thought, s.max_observation, s.dtype, s.bits]
    return digest([weights, settings])


def digest(x):
    return hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16]


def question_key(q):
    """Of all in a question that an answer, or its score, depends on."""
    return digest([q["question"], q["golden_answers"], q["metadata"].get("gold_titles"), q["metadata"].get("gold_ids")])


def known_facts(base, task, s, root):
    """What the base model knows of what evaluation asks, kept in known.json. -> set of facts"""
    path, made = root / "known.json", made_by(Path(s.model) if s.data else root / "base", s)
    questions = [q for rows in task.evaluation.values() for q in rows]
    asked = digest([question_key(q) for q in questions])
    if (s.resume or s.rows) and path.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):          # a file that is damaged is made anew
            kept = json.loads(path.read_text())
            if kept["made"] == made and kept["asked"] == asked:
                return set(kept["known"])
    known, _ = recall(base, questions, s)
    write(path, json.dumps({"made": made, "asked": asked, "known": sorted(known)}))
    return known


class Predictions:
    """Records of an evaluation, in <folder>/predictions.jsonl; until all are there in predictions.jsonl.partial, so
    that --resume finds them.

    rows, sets: those that are asked (none: all). Without resume they are asked anew; the records of others stay.
    """

    def __init__(self, folder, resume, rows=(), sets=()):
        self.path, self.part, self.known = folder / "predictions.jsonl", folder / "predictions.jsonl.partial", {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.part):
            lines, kept = path.read_bytes().splitlines(keepends=True) if path.is_file() else [], []
            for n, line in enumerate(lines if resume or rows or sets else [], 1):
                try:
                    if not line.endswith(b"}\n"):
                        continue
                    r = json.loads(line)
                    if not {"row", "set", "id", "em", "queries"} <= r.keys():
                        raise KeyError
                    stays = rows and r["row"] not in rows or sets and r["set"] not in sets
                    if resume or stays:
                        kept.append(line)
                        # an answer behind a search that failed is asked again
                        if stays or not r.get("lost"):
                            self.known[r["row"], r["set"], r["id"], r.get("asked"), r.get("made")] = r
                except (ValueError, KeyError, TypeError, AttributeError):
                    if resume or rows:
                        raise Problem(f"{path}:{n}: not a prediction of eval.py; remove this line, and --resume asks it again") from None
            # the last was cut, and what is written next must not go on behind it; or all is asked anew
            if path == self.part and kept != lines:
                write(path, b"".join(kept).decode())

    def missing(self, row, sets, made):
        """[(set, question)] that this row is still to be asked."""
        return [(name, q) for name, questions in sets.items() for q in questions if self.key(row, name, q, made) not in self.known]

    def key(self, row, name, q, made):
        return row, name, q["id"], question_key(q), made

    def row(self, row, sets, made, answer, piece):
        """{set: records} of one row, asking `answer` (questions -> records) for those that are not there yet, `piece` at a time."""
        missing = self.missing(row, sets, made)
        for at in range(0, len(missing), piece):
            part = missing[at:at + piece]
            with open(self.part, "a", encoding="utf-8") as f:
                for (name, q), r in zip(part, answer([q for _, q in part]), strict=True):
                    self.known[self.key(row, name, q, made)] = r = {"row": row, "set": name, **r, "asked": question_key(q), "made": made}
                    f.write(json.dumps(r) + "\n")
        return {name: [self.known[self.key(row, name, q, made)] for q in questions] for name, questions in sets.items()}

    def finish(self, rows, made):
        """rows: {row: {set: records}}. What was there of other rows and questions stays, where the same weights and
        settings gave it (made: {row: what made_by says})."""
        now = [r for sets in rows.values() for records in sets.values() for r in records]
        there = {(r["row"], r["set"], r["id"]) for r in now}
        kept = [r for r in self.known.values() if (r["row"], r["set"], r["id"]) not in there and r.get("made") == made.get(r["row"])]
        write_jsonl(self.path, now + kept)
        self.part.unlink(missing_ok=True)


# ---- figures ------------------------------------------------------------------------------------------------------------
def searched(q, record, known):
    """For each fact a question needs: (whether the base model knows it, whether a query named its subject). A real question
    is one fact, and any search counts. Calculations are no facts."""
    steps = q["metadata"]["steps"]
    if "holds" in steps[0]:
        return [(steps[0]["fact"] in known, bool(record["queries"]))]
    return [(step["fact"] in known, any(step["subject"].lower() in query.lower() for query in record["queries"]))
            for step in steps if step["noun"] != DIFFERENCE]


def mean(values):
    """None for no values: NaN is not JSON."""
    return float(np.mean(values)) if len(values) else None


def percent(values):
    return None if not len(values) else 100 * mean(values)


def summary(records, sets, known):
    """Figures of one row over {set: records} and {set: questions}: {set: {..}, "avg": {.., "em_low", "em_high"}};
    EM, F1 and shares in percent."""
    out, facts, sums, sure = {}, [], [], {True: [], False: []}
    for name, rows in records.items():
        out[name] = {k: percent([r[k] for r in rows]) for k in PERCENT} | {"actions": mean([r["actions"] for r in rows])}
        for q, r in zip(sets[name], rows, strict=True):
            facts += searched(q, r, known)
            sure[all(step["fact"] in known for step in q["metadata"]["steps"])].append(r["em"])
            sums += [any(query.startswith("calculate") for query in r["queries"])
                     for step in q["metadata"]["steps"] if step.get("noun") == DIFFERENCE]
    avg = {k: mean([v[k] for v in out.values()]) for k in (*PERCENT, "actions")}
    avg["search_known"] = mean([asked for knows, asked in facts if knows])
    avg["search_unknown"] = mean([asked for knows, asked in facts if not knows])
    avg["em_known"], avg["em_unknown"], avg["calculated"] = percent(sure[True]), percent(sure[False]), mean(sums)
    avg["em_low"], avg["em_high"] = interval([[100 * r["em"] for r in rows] for rows in records.values()])
    avg["by_actions"] = by_actions([r for rows in records.values() for r in rows])
    return {**out, "avg": avg}


def by_actions(records):
    """Paper Fig. 3: for each number of actions how many questions were answered with it, how many of them right, and in
    percent the success rate and the share of all right answers."""
    correct = sum(r["em"] for r in records)
    out = {}
    for n in sorted({r["actions"] for r in records}):
        right = [r["em"] for r in records if r["actions"] == n]
        out[str(n)] = {"questions": len(right), "correct": int(sum(right)), "success": percent(right),
                       "share": 100 * sum(right) / correct if correct else 0.0}
    return out


def interval(sets, draws=2000):
    """95% bootstrap interval of the average over sets of the mean over questions; questions are drawn anew in each set."""
    rng = np.random.default_rng(0)
    means = np.zeros(draws)
    for values in sets:
        values = np.array(values)
        means += values[rng.integers(0, len(values), (draws, len(values)))].mean(1) / len(sets)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def paired(runs, draws=2000):
    """How much more EM one row has than another on the questions that both answered, with a paired 95% bootstrap
    interval: {"gain", "gain_low", "gain_high", "gain_questions"}.

    runs: of each run the records of the two rows, ({set: records}, {set: records}). A question that several runs share
    is drawn as one: more seeds on the same questions say more of chance in training, nothing of other questions.
    """
    gains = {}
    for records, others in runs:
        for name, rows in records.items():
            other = {(r["id"], r["question"]): r["em"] for r in others.get(name, ())}
            for r in rows:
                if (key := (r["id"], r["question"])) in other:
                    gains.setdefault(name, {}).setdefault(key, []).append(100 * (r["em"] - other[key]))
    if not gains:
        raise Problem("--compare: the two rows answered no question in common; "
                      "evaluate both on the same files, with one --seed and --eval_questions")
    sets = [[mean(g) for g in questions.values()] for questions in gains.values()]
    low, high = interval(sets, draws)
    return {"gain": mean([mean(g) for g in sets]), "gain_low": low, "gain_high": high, "gain_questions": sum(map(len, sets))}


def compare(s):
    """--compare: two rows over the predictions of one or several runs, each set with the same weight."""
    if len(set(s.compare)) != 2 or len(s.compare) != 2:
        raise Problem(f"--compare: two rows are needed, separated by a comma, not {','.join(s.compare)!r}")
    runs = []
    for run in s.runs or [s.run]:
        path, found = Path("out", run, "predictions.jsonl"), {row: {} for row in s.compare}
        for n, r in read_jsonl(path, "the predictions that eval.py writes", "--runs"):
            if not isinstance(r, dict) or not {"row", "set", "id", "question", "em"} <= set(r):
                raise Problem(f"{path}:{n}: not a prediction of eval.py (row, set, id, question, em); evaluate this run again")
            if r["row"] in found:
                found[r["row"]].setdefault(r["set"], []).append(r)
        if lacks := [row for row in s.compare if not found[row]]:
            raise Problem(f"--compare: {path} has no row {lacks[0]!r}; evaluate it first, or name another")
        runs.append(tuple(found.values()))
    print(json.dumps({"rows": s.compare, "runs": s.runs or [s.run], **{k: round(v, 2) for k, v in paired(runs).items()}}))


# ---- the table ----------------------------------------------------------------------------------------------------------
def share(value):
    return "-" if value is None else f"{value:.2f}"


def table(rows, sets):
    judged = any("judge" in r["avg"] for r in rows.values())
    lines = [f"{'EM':24}" + "".join(f"{n[:10]:>11}" for n in sets)
             + f"{'avg':>8}{'95% interval':>15}{'F1':>7}{'actions':>9}{'known':>7}{'unknown':>9}{'malformed':>11}"
             + (f"{'judge':>7}" if judged else "")]
    for name, r in rows.items():
        a = r["avg"]
        lines.append(f"{name:24}" + "".join(f"{r[n]['em']:11.1f}" if n in r else f"{'-':>11}" for n in sets)
                     + f"{a['em']:8.1f}{a['em_low']:8.1f} -{a['em_high']:5.1f}{a['f1']:7.1f}{a['actions']:9.2f}"
                     f"{share(a['search_known']):>7}{share(a['search_unknown']):>9}{a['malformed']:10.1f}%"
                     + ("" if not judged else f"{'-':>7}" if a.get("judge") is None else f"{a['judge']:7.1f}"))
    return "\n".join(lines)


def run(s):
    if s.compare:
        return compare(s)
    start, task = time.time(), data.load_task(s)
    if s.data:
        if not s.model:
            raise Problem("--data: it needs --model, the checkpoint to judge")
        path = Path(s.model).resolve()
        # two runs may have folders of one name
        root = Path("out", "eval", f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}")
        base, tagged = model.load_any(s.model, **place(s))
        if not tagged and not base.codec.tok.chat_template:
            raise Problem(f"--model={s.model}: no chat template, so no workflow can ask it in words; "
                          "take an instruct model, or one that train_sft.py made")
        todo = [(row, Path(s.model)) for row in WORKFLOWS] + [("agent", Path(s.model))] * tagged
    else:
        root = Path("out", s.run)
        base = model.load(start_folder(root, "base", ("base", *STAGES.values())), **place(s))
        own = {p.parent.name: p.parent.name for p in sorted(root.glob("*/config.json"))
               if p.parent.suffix not in (".partial", ".checkpoint", ".old") and p.parent.name not in ("base", *STAGES.values())}       # of --out
        todo = ([(row, root / "base") for row in WORKFLOWS]
                + [(row, root / stage) for row, stage in (STAGES | own).items() if (root / stage / "config.json").is_file()])
    if odd := [row for row in s.rows if row not in dict(todo)]:
        raise Problem(f"--rows: there is no row {odd[0]!r} here; there are: {', '.join(dict(todo))}")
    if not estimate.show(base, s, "eval"):
        return
    chat = Chat(s.judge, s, "judge") if s.judge else None           # before the rows: one that is not there costs no time
    made = {row: made_by(folder, s) for row, folder in todo}
    known, predictions, answers, rows, tries = known_facts(base, task, s, root), Predictions(root, s.resume, s.rows, task.evaluation), {}, {}, {}
    for row, folder in todo:
        sets, lm = asked(row, base, task), None
        if s.rows and row not in s.rows and predictions.missing(row, sets, made[row]):
            continue
        before = root / MADE_FROM.get(folder.name, folder.name) / "config.json"
        if before.is_file() and (folder / "config.json").stat().st_mtime < before.stat().st_mtime:
            print(f"{folder} is older than {before.parent}, from which it should come: train it again, or this row compares two runs")

        def answer(questions):
            nonlocal lm
            lm = lm or (base if row in WORKFLOWS or s.data else model.load(folder, **place(s)))
            return run_row(row, lm, questions, task, s, tries)
        if sets:
            answers[row] = predictions.row(row, sets, made[row], answer, s.batch_rows)
            rows[row] = summary(answers[row], sets, known)
    for row in rows if "ReAct workflow" in answers else ():
        rows[row]["avg"] |= paired([(answers[row], answers["ReAct workflow"])])
    trouble = None
    try:
        if chat:
            judged(chat, answers, rows)
    except Problem as e:        # the table is worth more than its last column
        trouble = e
    predictions.finish(answers, made)
    print(table(rows, list(task.evaluation)))
    print(task.eval_search.report())
    result = {"rows": rows, "model": str(root), "seed": s.seed, "seconds": round(time.time() - start, 1)}
    write(root / "eval.json", json.dumps(result, indent=1))
    print(json.dumps(result))
    if trouble:
        raise trouble


def judged(chat, answers, rows):
    """What a language model says of the answers, into the records and the rows' figures."""
    verdicts = {row: {name: judge(chat, records) for name, records in sets.items()} for row, sets in answers.items()}
    for row, sets in answers.items():
        for name, records in sets.items():
            for r, verdict in zip(records, verdicts[row][name]):
                r["judge"] = verdict
            rows[row][name]["judge"] = percent([v for v in verdicts[row][name] if v is not None])
        rows[row]["avg"]["judge"] = mean([rows[row][name]["judge"] for name in sets if rows[row][name]["judge"] is not None])
        rows[row]["avg"]["judge_unread"] = sum(v is None for vs in verdicts[row].values() for v in vs)
    print(chat.report())


if __name__ == "__main__":
    main(run, __doc__)
