"""Questions in, trajectories out: the teacher of SFT, contrastive pairs, a run's questions and tools, batches.

Its commands, `python data.py get|show|export`, are those of formats.py.
"""
import random
import re
import string
import sys
from dataclasses import dataclass

import numpy as np

import formats
import miniwiki
import tools
from autocoa import Trajectory, exact_match, normalize
from common import Problem, guarded, tqdm
from live import FAILED, MISSED

MISSING = "Not found."      # what a reader says of passages that do not hold it


# ---- chains of thought -------------------------------------------------------------------------------------------------
def cot(codec, q, recalled="think"):
    """A chain of thought from memory: the plan, then what is asked and what is recalled ("given": not to be learned),
    for each fact. Differences are not to be learned by heart."""
    return codec.build(q["question"], opening(q)
                       + [part for s in recalled_steps(q)
                          for part in told(s, "given" if s.get("noun") == miniwiki.DIFFERENCE else recalled)]
                       + ending(q))


def recalled_steps(q):
    """The steps of a question that are recalled one by one. A real question is one fact, whatever is searched for on the way."""
    steps = q["metadata"]["steps"]
    return steps[:1] if "holds" in steps[0] else steps


def told(s, recalled="think"):
    """A fact from memory: what is asked, what is recalled, and what follows from it."""
    return [("think", s["ask"]), (recalled, s["recall"])] + noted(s)


def noted(s):
    return [("think", s["note"])] if s.get("note") else []


def opening(q):
    """A question of several facts begins with its plan, where it has one."""
    plan = q["metadata"].get("plan")
    return [("think", plan)] if plan else []


def ending(q, evidence=""):
    """A comparison ends with a conclusion and the bare name that it says, all else of the nano world with the
    title that was read; a real question, said again where its words lie far back, with the answer as the evidence
    spells it."""
    conclusion, golden = q["metadata"].get("conclusion"), q["golden_answers"]
    if "holds" in q["metadata"]["steps"][-1]:
        return [("think", f"The question was: {q['question']}")] * (evidence != "") + [("answer", spelled(evidence, golden))]
    return [("think", conclusion), ("answer", golden[0])] if conclusion else [("answer", golden[-1])]


def spelled(text, golden):
    """The shortest of the golden answers that a text holds, in the text's own spelling; the first of all where it holds none.

    >>> spelled("Ash was born in Philadelphia, then the capital.", ["Philly", "City of Philadelphia", "Philadelphia"])
    'Philadelphia'
    """
    words = text.split()
    for answer in (g for g in sorted(golden, key=len) if normalize(g)):
        for size in range(1, len(answer.split()) + 2):                          # the shortest piece, so without an article before it
            for i in range(len(words) - size + 1):
                piece = " ".join(words[i:i + size]).strip(string.punctuation)
                if normalize(piece) == normalize(answer):
                    return piece
    return golden[0]


# ---- the teacher --------------------------------------------------------------------------------------------------------
def teach(codec, questions, known, search, max_observation=128):
    """Chains of action by a scripted teacher: recall what the base model knows, search for the rest, reword on a miss.

    It follows `metadata.steps`, one fact a step (see miniwiki.step, real_steps): what is asked, queries to try in
    order, what must turn up, what to say then. known: the facts that the base model answered right when it was asked.
    Searches run with the real tool, batched; a miss stays in the chain as a miss, a search that failed drops the chain.
    Returns (question, Trajectory) of the plans that found all they needed, and counts.
    """
    asked = sorted({text for q in questions for s in q["metadata"]["steps"] if s["fact"] not in known for text in s["queries"]})
    seen = {query: codec.fit(observation, max_observation) for query, observation in zip(asked, search(asked))}
    out, counts = [], {"searches": 0, "misses": 0, "dropped": 0}
    for q in tqdm(questions, desc="what the teacher does", unit="question", leave=False):
        parts, evidence, steps = opening(q), "", q["metadata"]["steps"]
        for s in recalled_steps(q) if steps[0]["fact"] in known else steps:
            if s["fact"] in known:
                parts += told(s)
                continue
            parts.append(("think", s["ask"]))
            for query in s["queries"]:
                parts += [("search", query), ("result", seen[query])]
                counts["searches"] += 1
                evidence = found(s, seen[query])
                if evidence:
                    parts += [("think", evidence)] + noted(s)
                    break
                parts.append(("think", MISSING))
                counts["misses"] += 1
            else:
                counts["dropped"] += 1
                break
        else:
            if ("result", FAILED) in parts or ("result", MISSED) in parts:      # nobody knows what it would have found
                counts["dropped"] += 1
            else:
                out.append((q, codec.build(q["question"], parts + ending(q, evidence))))
    return out, counts


def found(s, observation):
    """What to say of an observation, "" where it does not hold what the step needs: the passage of that title (where the
    step names one) and, for a real question, a sentence with one of the texts in s["holds"] ("": the first). In the nano world it is the
    passage's title (or the former name that was asked for) and number, what is asked again, then the answer: each a plain match, since a
    question of several facts speaks of several relations."""
    passages = [(n, line.partition(f" {n}: ")) for n, line in enumerate(observation.split("\n "), 1)]
    passages = [(n, text) for n, (title, _, text) in passages if not s["title"] or title == tools.shown(s["title"], n)]
    if "holds" not in s:
        return says(s, passages[0][0]) if passages else ""
    for text in s["holds"]:
        wanted = f" {normalize(text)} " if text else ""
        for _, passage in passages:
            for sentence in re.split(r"(?<=[.!?]) (?=[^a-z])", passage):
                if wanted in f" {normalize(sentence)} ":
                    words, n = sentence.split(), 40         # of a long sentence, 40 words that still hold it
                    for at in range(0, max(1, len(words) - n // 2), n // 2):
                        if wanted in f" {normalize(' '.join(words[at:at + n]))} ":
                            return " ".join(words[at:at + n])
    return ""


def says(s, n):
    if s["noun"] == miniwiki.DIFFERENCE:
        return f"It is {s['answer']}."
    return f"{s['called']} {n} says {s['noun']} {s['answer']}."


def facts_of(questions):
    """fact -> the wordings in which to ask for it, and its golden answers; of all steps of some questions."""
    return {s["fact"]: (s["wordings"], s["answers"]) for q in questions for s in q["metadata"]["steps"]}


def pairs(codec, questions, recalled, acted):
    """CoT+A pairs for SFT-1, cut where acting and thinking part: ([(chosen acts, rejected)], [(chosen thinks, rejected)]).

    recalled: fact -> what the base model recalls when asked. acted: the ids of questions that acting at every step solved
    (the base model in a workflow, or the teacher's searches). Acting is chosen at the first fact that recall got wrong, where acting
    got the question right; thinking is chosen at a recalled fact where recall was right throughout and acting went wrong.
    """
    acts, thinks = [], []
    for q in questions:
        steps = recalled_steps(q)
        wrong = [i for i, s in enumerate(steps) if not exact_match(recalled[s["fact"]], s["answers"])]
        if bool(wrong) != (q["id"] in acted):
            continue                                    # both right or both wrong: nothing to learn about when
        cut = wrong[0] if wrong else len(acts + thinks) % len(steps)
        s = steps[cut]
        prefix = opening(q) + [part for before in steps[:cut] for part in told(before)] + [("think", s["ask"])]
        act, think = codec.pair(q["question"], prefix, [[("search", s["queries"][0])], [("think", f"I recall {recalled[s['fact']]}.")]])
        if wrong:
            acts.append((act, think))
        else:
            thinks.append((think, act))
    return acts, thinks


# ---- the task: questions, and the tools that answer them ------------------------------------------------------------
@dataclass
class Task:
    train: object           # (n, pool, p_head=..) -> n questions to learn from
    evaluation: dict        # set -> questions to be judged on
    search: object          # the search tool of SFT
    rl_search: object       # of RL with the tool
    eval_search: object     # and of evaluation
    world: object = None    # the nano world of SFT


MIX = {"single": 0.1, "typed": 0.1, "bridge": 0.3, "compare": 0.2, "chain": 0.3}     # of training questions; no `compose`
# for pairs where acting was right: simpler, since the ReAct workflow must solve them
MIX_ACT = {"single": 0.3, "typed": 0.3, "bridge": 0.2, "compare": 0.1, "chain": 0.1}


def nano_task(s):
    """SFT and imagined RL on one world; RL with the tool on another, where what SFT learned by heart is of no use, as it will be of
    none in evaluation, on a third that training never sees."""
    world, other, unseen = (miniwiki.World(s.seed, "train", s.train_scale), miniwiki.World(f"{s.seed} rl", "train"),
                            miniwiki.World(s.seed, "eval"))
    taken, drawn = set(), {}

    def train(n, pool, p_head=0.10):
        """No two pools of one script share a question; a pool is the same whenever a script asks for it."""
        if pool in drawn:
            return drawn[pool]
        rng, out = random.Random(f"{pool} {s.seed}"), []
        for name, share in (MIX_ACT if pool == "act" else MIX).items():
            rows = (other if pool == "rl2" else world).questions(name, round(n * share), rng, p_head, taken)
            out += [dict(q, id=f"{pool}_{q['id']}") for q in rows]
        if n and not out:
            raise Problem(f"{n} training questions are too few for one of any kind; "
                          "ask for more (--rl_questions, --coa; of bench.py --questions)")
        rng.shuffle(out)
        drawn[pool] = out
        return out
    rng = random.Random(f"evaluation {s.seed}")
    sets = {name: unseen.questions(name, s.eval_questions, rng) for name in miniwiki.SETS}
    return Task(train, sets, *(tools.library(w.passages(), s.top_k) for w in (world, other, unseen)), world)


def gold_passages(q, search):
    """The passages that a question's answer comes from, as one observation; "" where the question does not name them,
    or where the tool has none to go by. By metadata.gold_ids where the corpus has those under the gold titles (several
    passages may share one title), else by title."""
    titles = (q["metadata"].get("gold_titles")
              or [s["title"] for s in q["metadata"]["steps"] if "holds" not in s and s["noun"] != miniwiki.DIFFERENCE])
    found = (search["search"].named(q["metadata"].get("gold_ids") or [], titles, q["golden_answers"])
             if isinstance(search["search"], tools.BM25) else [])
    return tools.neutral(tools.listed(found)) if found else ""


def load_task(s):
    """The nano task; real questions where the settings name a model; or only those of --data."""
    if not s.model:
        return nano_task(s)
    if not (s.corpus and (s.data or s.train_data and s.eval_data)):
        raise Problem("train_data, eval_data, corpus: a run with --model needs all three; see config/smollm2.py"
                      + "; eval.py alone can do with --data and --corpus" * (not s.train_data))
    pool = ([q for name, path in formats.set_names(s.train_data, "--train_data").items() for q in read_questions(path, name)]
            if not s.data else [])
    sets = {name: read_questions(path, name) for name, path in formats.set_names(s.data or s.eval_data, "--data, --eval_data").items()}
    search = tools.open_library(s)

    def train(n, pool_name, p_head=0.0):
        """n questions, the sets mixed; RL begins behind those of SFT's chains, and all begin again at the end."""
        at = {"sample": 0, "coa": 0, "cot": 0, "act": 0, "think": 0, "rl1": s.coa, "rl2": s.coa + s.rl1_steps * s.questions}[pool_name]
        order = random.Random(s.seed).sample(range(len(pool)), len(pool))
        return [pool[order[(at + i) % len(pool)]] for i in range(min(n, len(pool)))]
    # a set's sample does not depend on which other sets are asked
    sets = {name: random.Random(f"evaluation {s.seed} {name}").sample(rows, min(s.eval_questions, len(rows)))
            for name, rows in sets.items()}
    return Task(train, sets, search, search, search)


def read_questions(path, name=""):
    """A FlashRAG question file -> rows with `metadata.steps`, of the set `name`. Raises Problem with file:line for a malformed row."""
    out, name = formats.question_rows(path), name or next(iter(formats.set_names([path], "train_data, eval_data")))
    for q in out:
        q["metadata"]["steps"] = real_steps(q, name)
        q["id"] = f"{name}:{q['id']}"                           # each data set counts from 0
        for step in q["metadata"]["steps"]:
            step |= {"fact": q["id"], "queries": [called(query) for query in step["queries"]]}
    return out


def real_steps(q, source=""):
    """A teacher's plan for a real question, from what its gold passages name.

    Of several hops: a search for each of two titles, in the order in which the question names them; the first passage
    must name the second, the second must hold the answer; but where the answer is yes, no or something that the
    question names, two things are compared, and what each passage begins with is noted. Of one hop: a search for the
    title, where the question names it. A title that nothing names is the rewording of a search with the
    question itself. source: the set's name, which tells the sets of several hops.
    """
    question, golden = q["question"], q["golden_answers"]
    said = set(normalize(question).split())

    def overlap(title):
        words = normalize(re.sub(r"\(.*?\)", "", title)).split()
        return sum(w in said for w in words) / max(1, len(words))
    titles = sorted(dict.fromkeys(q["metadata"].get("gold_titles") or []), key=lambda t: -overlap(t))[:2]
    fact = {"fact": str(q["id"]), "wordings": [question], "answers": golden, "recall": f"I recall {golden[0]}.", "head": False}
    if len(titles) < 2 or not re.search("hotpot|musique|2wiki|bamboogle", f"{source} {q['id']}", re.I):
        title = titles[0] if titles else ""             # further gold passages of a single-hop question are alternatives
        if title and overlap(title) == 1:
            return [dict(fact, ask=f"I look for {title}.", title=title, subject=title, queries=[title, question], holds=golden)]
        return [dict(fact, ask="What do the passages say?", title=title, subject=question, queries=[question] + titles[:1], holds=golden)]
    compared = any(f" {normalize(g)} " in f" {normalize(question)} " or normalize(g) in ("yes", "no") for g in golden)
    steps = []
    for i, title in enumerate(titles):
        holds = [""] if compared else golden if i else [titles[1], re.sub(r" \(.*?\)", "", titles[1])]
        if overlap(title) >= 0.5 or i and not compared:         # the question names it, or the first passage
            way = dict(ask=f"I look for {title}.", subject=title, queries=[title, f"{title} {question}"])
        else:
            way = dict(ask="What do the passages say?", subject=question, queries=[question, title])
        steps.append(dict(fact, title=title, holds=holds, **way))
    return steps


def called(query):
    """A query as the model has to write it, with the tool's name where a word and a colon at its beginning would be taken for one.

    >>> called("thor: ragnarok"), called("Thor")
    ('search: thor: ragnarok', 'Thor')
    """
    return f"search: {query}" if tools.ACTION.match(query) else query


# ---- batches ------------------------------------------------------------------------------------------------------------
def pad(trajectories):
    """-> {"ids": (B, T) int64, "mask": (B, T) float32, "old": (B, T) float32}, padded on the right with zeros, which the mask
    leaves out. "old" are the log-probs of sampling, where the trajectories were sampled.

    >>> pad([Trajectory([5, 6, 7], [0, 1, 1], [0, 1, 1])])["mask"]
    array([[0., 1., 1.]], dtype=float32)
    """
    B, T = len(trajectories), max(len(t.ids) for t in trajectories)
    out = {"ids": np.zeros((B, T), np.int64), "mask": np.zeros((B, T), np.float32), "old": np.zeros((B, T), np.float32)}
    for i, t in enumerate(trajectories):
        for key, values in (("ids", t.ids), ("mask", t.mask), ("old", t.logprobs)):
            out[key][i, :len(values)] = values
    return out


def steps_of(trajectories, batch_tokens, rng, window=2000):
    """One epoch: shuffled inside windows (the order of the windows is kept), cut into optimizer steps of about
    batch_tokens. Lengths are mixed in a step, so that no step sees one kind of text alone. -> list of lists"""
    out, now, count = [], [], 0
    for w in range(0, len(trajectories), window):
        part = trajectories[w:w + window]
        for t in rng.sample(part, len(part)):
            now.append(t)
            count += len(t.ids)
            if count >= batch_tokens:
                out.append(now)
                now, count = [], 0
    return out + [now] if now else out


if __name__ == "__main__":
    guarded(lambda: formats.main(sys.argv[1:]))
