"""The benchmark: every trained row on the same questions, with the same tool and budgets, as a table and one JSON line.

    python eval.py                          # the models in out/nano, in a world they have never seen
    python eval.py config/smollm2.py        # the same for a real checkpoint

model only           the base model, no tool
ReAct workflow       the base model, and a script that decides: a thought, a search, a thought, a search ..
SFT-1 .. +RL-1&2     agent models after each stage: they decide by themselves

EM and F1 (in eval.json also cover-EM, the score of the authors' code, and the gain in EM over the ReAct workflow with a paired interval); actions a question; of the facts that a question needs, the share that was searched for, apart for those that
the base model knows and those that it does not; malformed trajectories; in eval.json also answers that had to be forced. Averages are over the sets, with a 95% bootstrap
interval over questions.
"""
import json
import time
from pathlib import Path

import numpy as np

import autocoa
import data
import estimate
import model
import workflows
from common import main, place, start_folder, write
from train_sft import recall

ROWS = {"model only": "base", "ReAct workflow": "base", "SFT-1": "sft1", "SFT-2": "sft2_alone", "SFT-1&2": "sft2", "SFT-1&2&3": "sft3",
        "RL-2 alone": "rl2_alone", "SFT-1&2&3+RL-1": "rl1", "SFT-1&2&3+RL-1&2": "rl2", "SFT-1&2+RL-2": "rl2_from_sft2"}

MADE_FROM = {"sft1": "base", "sft2": "sft1", "sft2_alone": "base", "sft3": "sft2", "rl1": "sft3", "rl2": "rl1", "rl2_alone": "base", "rl2_from_sft2": "sft2"}


PERCENT = ("em", "f1", "cover", "overlap", "malformed", "forced")


def run_row(row, lm, questions, task, s):
    """-> a record a question: answer, trajectory and figures."""
    if row == "model only":
        done = [(a, autocoa.Trajectory()) for a in workflows.closed_book(lm, questions, s, workflows.CLOSED_BOOK, desc=row)]
    elif row == "ReAct workflow":
        done = workflows.react(lm, questions, task.eval_search, s, examples=workflows.REACT, desc=row)
    else:
        done = [(lm.codec.answer(t), t) for t in workflows.answers(lm, questions, task.eval_search, s, desc=row)]
    agent = row not in ("model only", "ReAct workflow")
    return [{"id": q["id"], "question": q["question"], "golden_answers": q["golden_answers"], "answer": a, "em": autocoa.exact_match(a, q["golden_answers"]),
             "f1": autocoa.f1(a, q["golden_answers"]), "cover": autocoa.cover_match(a, q["golden_answers"]), "overlap": autocoa.overlap_match(a, q["golden_answers"]), "actions": len(t.queries), "queries": t.queries,
             "malformed": float(agent and not lm.codec.well_formed(t)), "forced": float(agent and t.forced), "text": lm.codec.decode(t.ids)}
            for q, (a, t) in zip(questions, done)]


def searched(q, record, known):
    """For each fact a question needs: (whether the base model knows it, whether a query named its subject). A real question
    is one fact, and any search counts."""
    steps = q["metadata"]["steps"]
    if "holds" in steps[0]:
        return [(steps[0]["fact"] in known, bool(record["queries"]))]
    return [(step["fact"] in known, any(step["subject"].lower() in query.lower() for query in record["queries"])) for step in steps]


def mean(values):
    """None for no values: NaN is not JSON."""
    return float(np.mean(values)) if len(values) else None


def summary(records, by_set, known):
    """Figures of one row: {set: {..}, "avg": {.., "em_low", "em_high"}}; EM, F1 and shares in percent."""
    out, facts = {}, []
    for name, questions in by_set.items():
        rows = records[name]
        out[name] = {k: 100 * mean([r[k] for r in rows]) for k in PERCENT} | {"actions": mean([r["actions"] for r in rows])}
        facts += [f for q, r in zip(questions, rows) for f in searched(q, r, known)]
    avg = {k: mean([v[k] for v in out.values()]) for k in (*PERCENT, "actions")}
    avg["search_known"] = mean([asked for knows, asked in facts if knows])
    avg["search_unknown"] = mean([asked for knows, asked in facts if not knows])
    avg["em_low"], avg["em_high"] = interval([[100 * r["em"] for r in rows] for rows in records.values()])
    return {**out, "avg": avg}


def interval(sets, draws=2000):
    """95% bootstrap interval of the average over sets of the mean over questions; questions are drawn anew in each set."""
    rng = np.random.default_rng(0)
    means = np.zeros(draws)
    for values in sets:
        values = np.array(values)
        means += values[rng.integers(0, len(values), (draws, len(values)))].mean(1) / len(sets)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def paired(records, others, draws=2000):
    """How much more EM one row has than another on the same questions, with a paired 95% bootstrap interval: {"gain", "gain_low", "gain_high"}."""
    gains = [[100 * (r["em"] - o["em"]) for r, o in zip(rows, others[name], strict=True)] for name, rows in records.items()]
    low, high = interval(gains)
    return {"gain": mean([mean(g) for g in gains]), "gain_low": low, "gain_high": high}


def share(value):
    return "-" if value is None else f"{value:.2f}"


def table(rows, sets):
    lines = [f"{'EM':24}" + "".join(f"{n[:10]:>11}" for n in sets) + f"{'avg':>8}{'95% interval':>15}{'F1':>7}{'actions':>9}{'known':>7}{'unknown':>9}{'malformed':>11}"]
    for name, r in rows.items():
        a = r["avg"]
        lines.append(f"{name:24}" + "".join(f"{r[n]['em']:11.1f}" for n in sets) + f"{a['em']:8.1f}{a['em_low']:8.1f} -{a['em_high']:5.1f}{a['f1']:7.1f}"
                     f"{a['actions']:9.2f}{share(a['search_known']):>7}{share(a['search_unknown']):>9}{a['malformed']:10.1f}%")
    return "\n".join(lines)


def run(s):
    start, root, task = time.time(), Path("out", s.run), data.load_task(s)
    questions = [q for rows in task.evaluation.values() for q in rows]
    base = model.load(start_folder(root, "base", ROWS.values()), **place(s))
    if not estimate.show(base, s, "eval"):
        return
    known, _ = recall(base, questions, s)
    rows, predictions = {}, {}
    for row, stage in ROWS.items():
        if not (root / stage / "config.json").is_file():
            continue
        before = root / MADE_FROM.get(stage, stage)
        if (before / "config.json").is_file() and (root / stage / "config.json").stat().st_mtime < (before / "config.json").stat().st_mtime:
            print(f"{root / stage} is older than {before}, from which it should come: train it again, or this row compares two runs")
        records = iter(run_row(row, base if stage == "base" else model.load(root / stage, **place(s)), questions, task, s))
        predictions[row] = {name: [next(records) for _ in qs] for name, qs in task.evaluation.items()}
        rows[row] = summary(predictions[row], task.evaluation, known)
        if "ReAct workflow" in predictions:
            rows[row]["avg"] |= paired(predictions[row], predictions["ReAct workflow"])
    print(table(rows, list(task.evaluation)))
    print(task.eval_search.report())
    write(root / "predictions.jsonl", "".join(json.dumps({"row": row, "set": name, **r}) + "\n"
                                              for row, sets in predictions.items() for name, records in sets.items() for r in records))
    result = {"rows": rows, "model": str(root), "seed": s.seed, "seconds": round(time.time() - start, 1)}
    write(root / "eval.json", json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main(run, __doc__)
