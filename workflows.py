"""Ways to have questions answered: as an agent (`answers`), by the model alone (`closed_book`, `direct`), or by a
workflow around it (`react`, `reflexion`, `read`). All get the same tool and decode greedily."""
import re
from dataclasses import dataclass

from autocoa import ACTION, ANSWER, OBSERVATION, PROMPT, THINK, Trajectory, exact_match, rollout
from common import progress
from skills import TO_QUERY, TO_READ


def answers(lm, questions, search, s, max_actions=None, desc=None, **sampling):
    """Roll out every question, those of like length together. -> [Trajectory], in order."""
    prompts = [lm.codec.prompt(q["question"]) for q in questions]
    out = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with progress(len(prompts), desc, "question") as bar:
        for at in range(0, len(order), s.batch_rows):
            rows = order[at:at + s.batch_rows]
            done = rollout(lm.decoder, lm.codec, [prompts[i] for i in rows], search, s.max_actions if max_actions is None else max_actions,
                           s.max_len, s.max_answer, s.max_observation, **sampling)
            for i, t in zip(rows, done):
                out[i] = t
            bar.update(len(rows))
    return out


REACT = """Answer the question. Write a thought, then a search; read the observation; when you know the answer, write Answer: and the answer in a few words.

Question: When did The Origin of Species come out?
Thought: I need the year in which The Origin of Species was published.
Search: The Origin of Species
Observation: On the Origin of Species 1: On the Origin of Species is a work of scientific literature by Charles Darwin, published in 1859.
 Charles Darwin 2: Charles Robert Darwin was an English naturalist, known for his contributions to evolutionary biology.
Thought: It was published in 1859. Answer: 1859

Question: In which country was the painter of The Night Watch born?
Thought: I need the painter of The Night Watch.
Search: The Night Watch
Observation: The Night Watch 1: The Night Watch is a 1642 painting by Rembrandt van Rijn.
Thought: Rembrandt van Rijn painted it. I need his place of birth.
Search: Rembrandt van Rijn
Observation: Rembrandt 1: Rembrandt Harmenszoon van Rijn was a Dutch painter, born in Leiden in the Netherlands.
Thought: He was born in Leiden in the Netherlands. Answer: Netherlands

Question: Which river is longer, the Rhine or the Seine?
Thought: I need the length of the Rhine.
Search: Rhine length
Observation: Rhine 1: The Rhine is a river of Europe, with a length of about 1,230 km.
Thought: I need the length of the Seine.
Search: Seine length
Observation: Seine 1: The Seine is a 777 km long river in northern France.
Thought: 1,230 km is more than 777 km. Answer: the Rhine

"""
READ = """Answer the question from the passages, in a few words.

Passages: The Night Watch 1: The Night Watch is a 1642 painting by Rembrandt van Rijn.
 Rembrandt 2: Rembrandt Harmenszoon van Rijn was a Dutch painter, born in Leiden in the Netherlands.
Question: In which country was the painter of The Night Watch born?
Answer: Netherlands

Passages: Charles Darwin 1: Charles Robert Darwin was an English naturalist, known for his contributions to evolutionary biology.
 On the Origin of Species 2: On the Origin of Species is a work of scientific literature by Charles Darwin, published in 1859.
Question: When did The Origin of Species come out?
Answer: 1859

"""
DIRECT = """Answer the question in a few words.

Question: In which country was the painter of The Night Watch born?
Answer: Netherlands

Question: Who wrote The Origin of Species?
Answer: Charles Darwin

"""
JUDGE_OWN = """{tried}

The answer that was given is: {answer}
Do the observations above say that this answers the question? Yes or No:"""
REFLECT = """{tried}

The answer that was given, {answer}, is wrong or not supported. In one sentence, what should be searched for instead?
Next time"""
CLOSED_BOOK = """Answer the question in a few words.

Question: In which country was the painter of The Night Watch born?
Thought: Rembrandt painted it, and he was born in Leiden.
Answer: Netherlands

Question: Who wrote The Origin of Species?
Thought: That is a book on evolution.
Answer: Charles Darwin

"""


@dataclass
class Words:
    """How a workflow speaks to a model: ids to put in, and ids at which the model's turn ends."""
    prompt: object          # question -> ids
    thought_ends: list
    act: list               # opens a query
    act_ends: list
    observe: list           # stands before an observation
    observed: list          # and after it
    ask: list               # asks for the final answer
    answer_ends: list
    pattern: str            # finds an answer that the model gives by itself, in the text of a thought
    newline: list = ()      # what stands between lines, where one did not come to its end


def words(codec, examples):
    """The nano base model is prompted by the tags of the single skills it has; an instruct model by lines of text with
    `examples`, as ReAct's own prompts do (Yao et al. 2022)."""
    if not codec.tok.chat_template:
        return Words(
            prompt=lambda q: codec.prompt(f"{TO_QUERY} {TO_READ} {q}"),
            thought_ends=[codec.tok.convert_tokens_to_ids("?"), codec.eos],
            act=[codec.search], act_ends=[codec.end_search, codec.eos],
            observe=[codec.result], observed=[codec.end_result],
            ask=[codec.end_think, codec.boxed], answer_ends=[codec.close, codec.eos],
            pattern=r"\\boxed\{([^}]*)")
    # every token with a line break in it: "Ċ" in byte-level vocabularies, <0x0A> in SentencePiece's
    line = [i for token, i in codec.tok.get_vocab().items() if "Ċ" in token or "\n" in token or token == "<0x0A>"] + [codec.eos]

    def text(x):
        return codec.tok.encode(x, add_special_tokens=False, split_special_tokens=True)
    return Words(
        prompt=lambda q: begin(codec) + text(f"{examples}Question: {q}\nThought:"),
        thought_ends=line,
        act=text("Search:"), act_ends=line,
        observe=text("Observation:"), observed=text("\nThought:"),
        ask=text("Answer:"), answer_ends=line,
        pattern=r"Answer:\s*(.+)", newline=text("\n"))


def begin(codec):
    """The beginning of a text for checkpoints that were trained with one, as Llama 3 was."""
    return [i for i in codec.tok.encode("") if i == codec.tok.bos_token_id]


def react(lm, questions, search, s, max_actions=None, examples="", desc=None, given=None):
    """The ReAct workflow: a script outside the model makes it think, then act, then observe, again and again, until it
    gives an answer in a thought, or its calls (as many as an agent has, s.max_actions) or its tokens (s.max_len, beside
    the examples) are spent; then it is asked for one. Greedy. -> [(answer, Trajectory)]
    given: an observation for each question, which the model gets whatever it would search for, and from which it then
    reads all that it asks for."""
    codec, w = lm.codec, words(lm.codec, examples)
    calls = s.max_actions if max_actions is None else max_actions
    longest = s.max_len + len(codec.tok.encode(examples, add_special_tokens=False))
    tail = s.max_thought + len(w.ask) + s.max_answer + 8            # what must still find room after an observation
    out = [Trajectory() for _ in questions]
    found = [None] * len(questions)
    with progress(len(questions), desc, "question") as bar:
        for at in range(0, len(questions), s.batch_rows):
            live = list(range(at, min(at + s.batch_rows, len(questions))))
            for i in live:
                out[i].add(w.prompt(questions[i]["question"]), PROMPT, 0)
            dec = lm.decoder([out[i].ids for i in live])

            def write(rows, stops, role, budget):
                """Let the model write on these rows of the decoder -> {row: its text, without what ended it}."""
                spare = 1 if role == ANSWER else 1 + len(w.ask) + s.max_answer          # for the answer that may have to be asked for
                room = [max(1, min(budget, longest - len(out[i].ids) - spare)) if row in rows else 0 for row, i in enumerate(live)]
                ids, _ = dec.decode(stops, room, 0.0)
                for i, new in zip(live, ids):
                    out[i].add(new, role, 1)
                return {row: codec.decode([token for token in ids[row] if token not in (codec.eos, codec.end_search)]).strip()
                        for row in rows}

            def put(sequences, role):
                sequences = [list(w.newline) * (bool(ids) and out[i].ids[-1] not in w.thought_ends[:-1]) + ids
                             for i, ids in zip(live, sequences)]
                for i, ids in zip(live, sequences):
                    out[i].add(ids, role, 0)
                dec.feed(sequences)

            for turn in range(calls + 1):
                if given and turn == calls:         # what ends a thought elsewhere is the next fact to read here
                    ends, budget = w.answer_ends, s.max_actions * s.max_thought
                else:
                    ends, budget = w.thought_ends, s.max_thought
                for row, thought in write(range(len(live)), ends, THINK, budget).items():
                    if match := re.search(w.pattern, thought):
                        found[live[row]] = match.group(1).strip()
                asking = [row for row, i in enumerate(live) if found[i] is None]
                last = [row for row in asking
                        if turn == calls or len(out[live[row]].ids) + len(w.act) + s.max_thought + 64 + tail > longest]
                if last:
                    put([w.ask if row in last else [] for row in range(len(live))], ANSWER)
                    for row, text in write(last, w.answer_ends, ANSWER, s.max_answer).items():
                        found[live[row]] = text.replace("}", "").strip()
                rows = [row for row in asking if row not in last]
                live = [live[row] for row in rows]
                if not live:
                    break
                dec.keep(rows)
                if given:
                    told = [given[i] for i in live]
                else:
                    put([list(w.act) for _ in live], ACTION)
                    queries = list(write(range(len(live)), w.act_ends, ACTION, s.max_thought).values())
                    told = [codec.fit(observation, s.max_observation) for observation in search(queries)]
                    for i, query in zip(live, queries):
                        out[i].queries.append(query)
                seen = []
                for i, observation in zip(live, told):
                    ids = w.observe + codec.encode(observation) + w.observed
                    if len(out[i].ids) + len(ids) + tail > longest:
                        ids = w.observe + codec.encode("The result is too long to show.") + w.observed
                    out[i].observations.append(observation)
                    seen.append(ids)
                put(seen, OBSERVATION)
            bar.update(min(s.batch_rows, len(questions) - at))
    return list(zip(found, out))


def closed_book(lm, questions, s, examples="", desc=None):
    """What the model answers by itself, without a tool: an instruct model by lines of text, the nano model by its own
    chain of thought. Greedy. -> [(answer, Trajectory)]"""
    if not lm.codec.tok.chat_template:
        return [(lm.codec.answer(t), t) for t in answers(lm, questions, None, s, max_actions=0, desc=desc)]
    return react(lm, questions, None, s, max_actions=0, examples=examples, desc=desc)


def direct(lm, questions, s, desc=None):
    """The answer at once, without a chain of thought, as a chatbot gives it. Greedy. -> [(answer, Trajectory)]"""
    codec = lm.codec
    if codec.tok.chat_template:
        return complete(lm, [f"{DIRECT}Question: {q['question']}\nAnswer:" for q in questions], s.max_answer, s, desc)
    prompts = [codec.prompt(q["question"]) + [codec.end_think, codec.boxed] for q in questions]
    return [(text.replace("}", "").strip(), t) for text, t in written(lm, prompts, [codec.close, codec.eos], s.max_answer, s, desc)]


def plain(codec, texts):
    """Texts as an instruct model goes on with them, no chat around. -> [ids]"""
    return [begin(codec) + codec.tok.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]


def complete(lm, texts, budget, s, desc=None):
    """What an instruct model writes behind each text, to the end of the line. Greedy. -> [(text, Trajectory)]"""
    return [(text.strip(), t) for text, t in written(lm, plain(lm.codec, texts), words(lm.codec, "").answer_ends, budget, s, desc)]


def written(lm, prompts, stops, budget, s, desc=None):
    """What the model writes behind each prompt (ids): to one of the stops, or for `budget` tokens. Greedy. -> [(text, Trajectory)]"""
    out = []
    with progress(len(prompts), desc, "question") as bar:
        for at in range(0, len(prompts), s.batch_rows):
            rows = prompts[at:at + s.batch_rows]
            ids, _ = lm.decoder(rows).decode(stops, [budget] * len(rows), 0.0)
            for prompt, new in zip(rows, ids):
                t = Trajectory()
                t.add(list(prompt), PROMPT, 0)
                t.add(new, ANSWER, 1)
                out.append((lm.codec.decode([token for token in new if token != lm.codec.eos]), t))
            bar.update(len(rows))
    return out


def read(lm, questions, observations, s, desc=None):
    """Answers from passages that a script has looked up: retrieve-then-read, or with the gold ones an upper bound of
    reading. The nano base model first says what it needs, as it has learned to read; an instruct model answers at once.
    -> [(answer, Trajectory)]"""
    if not lm.codec.tok.chat_template:
        return react(lm, questions, None, s, max_actions=1, desc=desc, given=observations)
    texts = [f"{READ}Passages: {o}\nQuestion: {q['question']}\nAnswer:" for q, o in zip(questions, observations)]
    done = complete(lm, texts, s.max_answer, s, desc)
    for (_, t), o in zip(done, observations):
        t.observations.append(o)
    return done


def says_no(lm, texts, s):
    """Whether an instruct model would sooner write No than Yes behind each text. -> [bool]

    By its next token's logits: a small model rather begins a new line than to write either, and reading silence as
    content would leave Reflexion nothing to do.
    """
    yes, no = (lm.codec.tok.encode(f"Answer: {word}", add_special_tokens=False)[-1] for word in ("Yes", "No"))
    out = []
    for at in range(0, len(texts), s.batch_rows):
        logits = lm.backend.to_numpy(lm.decoder(plain(lm.codec, texts[at:at + s.batch_rows])).logits)      # (rows, vocab)
        out += (logits[:, no] > logits[:, yes]).tolist()
    return out


def reflexion(lm, questions, search, s, first=None, trials=3, desc=None):
    """Reflexion (Shinn et al. 2023) around ReAct, for instruct models: an answer that is missing, or that the model
    itself calls wrong, is followed by a sentence on what to do better, and by another try with that in mind. Whether it
    is wrong is never read off the gold answer. first: what `react` said already. -> [(answer, Trajectory of the last
    try, with the queries and observations of all)]"""
    out, lessons = list(first or react(lm, questions, search, s, examples=REACT, desc=desc)), [""] * len(questions)
    live = list(range(len(questions)))
    for trial in range(1, trials):
        def about(text):
            return [text.format(tried=lm.codec.decode(out[i][1].ids[len(begin(lm.codec)):]).removeprefix(REACT).strip(),
                                answer=out[i][0] or "none") for i in live]
        live = [i for i, no in zip(live, says_no(lm, about(JUDGE_OWN), s)) if no or not out[i][0]]
        if not live:
            break
        for i, (lesson, _) in zip(live, complete(lm, about(REFLECT), s.max_thought, s)):
            lessons[i] += f"\nLesson from try {trial}: Next time {lesson}"
        again = react(lm, [{"question": questions[i]["question"] + lessons[i]} for i in live], search, s, examples=REACT, desc=desc)
        for i, (answer, t) in zip(live, again):
            t.queries, t.observations = out[i][1].queries + t.queries, out[i][1].observations + t.observations
            out[i] = answer, t
    return out


def sampled(lm, questions, search, s):
    """Trajectories for the eye: a row of rollouts.jsonl each, with what the viewer needs."""
    done = answers(lm, questions, search, s)
    return [trajectory_row(lm.codec, q, t, exact_match(lm.codec.answer(t), q["golden_answers"])) for q, t in zip(questions, done)]


def trajectory_row(codec, q, t, reward, **more):
    return {**more, "question": q["question"], "golden_answers": q["golden_answers"], "reward": float(reward), "text": codec.decode(t.ids),
            "ids": t.ids, "role": t.role, "mask": t.mask, "tokens": codec.pieces(t.ids)}
