"""A language model as teacher: chains of action and of thought for real questions, kept where they end in a gold answer.

    python teacher.py config/smollm2.py --teacher=http://127.0.0.1:8000/v1#NAME --train_data=hotpotqa_train.jsonl --corpus=passages.jsonl.gz --coa=500 --out=taught
    python train_sft.py config/smollm2.py --sft_files=taught/coa.jsonl,taught/cot.jsonl,taught/pairs.json ..

--teacher is an OpenAI-compatible endpoint or a local folder (chat.py). A question gets up to --tries chains of action,
at a temperature from the second on; and for each a chain of thought that goes on from the same beginning without the
tool. The first of each that is right is kept (rejection sampling). A pair for SFT-1 comes from a try that exactly one
of the two solved: they share all that was thought before the first action, where they part.

Written are AutoCoA's files (formats.py). What the model said and what the tool said are cached, so a run that was
interrupted goes on where it was.
"""
import json
import random
from pathlib import Path

import data
import formats
import tools
from autocoa import TAGS, exact_match, fit
from chat import Chat
from common import Problem, main, write, write_jsonl
from live import FAILED, MISSED

COA = """Answer the question. Think in short plain sentences before you answer. While you think you may search an encyclopedia: write <begin_search> what you look for </end_search> and stop; \
you will be shown what was found, and go on thinking from there. Search for every fact that you are not sure of, one at a time, at most {most} times. When you know the answer, \
write </think> and then the answer, as short as it can be: \\boxed{{answer}}

Question: {question}"""
COT = """Answer the question from what you know. Think in short plain sentences, then write </think> and the answer, as short as it can be: \\boxed{{answer}}

Question: {question}"""
GO_ON = "Go on from there to the end, from what you know, without searching."
LENGTH, TEMPERATURE = 512, 0.8         # tokens of a turn; temperature from the second try on


def chains_of_action(chat, questions, search, s, sample):
    """Algorithm 1 with a chat model: one turn after the other until no search is asked for. -> texts"""
    talks = [[{"role": "user", "content": COA.format(question=q["question"], most=s.max_actions)}] for q in questions]
    texts, live = [""] * len(questions), list(range(len(questions)))
    for turn in range(s.max_actions + 1):
        said = chat([talks[i] for i in live], LENGTH, (TAGS["end_search"], TAGS["result"]), TEMPERATURE * (sample > 0), sample,
                    desc=f"chains of action, turn {turn + 1}")
        calls = []
        for i, text in zip(live, said):
            texts[i] += text.lstrip().removeprefix(TAGS["think"])
            if TAGS["search"] in text and TAGS["end_think"] not in text and turn < s.max_actions:
                texts[i] += TAGS["end_search"]
                calls.append((i, text, text.rpartition(TAGS["search"])[2].strip()))
        if not calls:
            break
        for (i, text, _), observation in zip(calls, search([query for _, _, query in calls])):
            # four letters a token: the endpoint's tokenizer is not ours
            result = f"{TAGS['result']} {fit(observation, s.max_observation, lambda x: len(x) // 4)} {TAGS['end_result']}"
            texts[i] += f"\n{result}\n"
            talks[i] += [{"role": "assistant", "content": text + TAGS["end_search"]}, {"role": "user", "content": result}]
        live = [i for i, _, _ in calls]
    return texts


def chains_of_thought(chat, questions, beginnings, s, sample):
    """What the model makes of each beginning without the tool. -> texts, the beginnings left out"""
    talks = [[{"role": "user", "content": COT.format(question=q["question"])}]
             + ([{"role": "assistant", "content": b}, {"role": "user", "content": GO_ON}] if b else [])
             for q, b in zip(questions, beginnings)]
    return [text.lstrip().removeprefix(TAGS["think"])
            for text in chat(talks, LENGTH, (TAGS["search"],), TEMPERATURE * (sample > 0), sample, desc="chains of thought")]


def right(text, q):
    """Whether a text is a whole trajectory that ends in a gold answer."""
    try:
        return exact_match(formats.parts_of(text)[-1][1], q["golden_answers"]) == 1
    except ValueError:
        return False


def teach(chat, questions, search, s):
    """-> AutoCoA's rows: coa, cot, pairs."""
    coa, cot, pairs, live = {}, {}, {}, list(range(len(questions)))
    for sample in range(s.tries):
        asked = [questions[i] for i in live]
        acted = chains_of_action(chat, asked, search, s, sample)
        begun = [text.partition(TAGS["search"])[0].strip() if TAGS["search"] in text else "" for text in acted]
        thought = chains_of_thought(chat, asked, begun, s, sample)
        for i, q, act, begin, think in zip(live, asked, acted, begun, thought):
            if f"{TAGS['result']} {FAILED} " in act or f"{TAGS['result']} {MISSED} " in act:
                continue                # nobody knows what the search would have found
            acts = TAGS["search"] in act
            solved = right(act, q), right(f"{begin} {think}", q)
            if solved[0]:
                (coa if acts else cot).setdefault(i, act)
            if solved[1]:
                cot.setdefault(i, f"{begin} {think}")
            # the thought that stands in the action's place
            instead = think.strip().partition("\n")[0].partition(TAGS["end_think"])[0].strip()
            if acts and solved[0] != solved[1] and instead:
                query = act.partition(TAGS["search"])[2].partition(TAGS["end_search"])[0]
                sides = TAGS["search"] + query + TAGS["end_search"], instead
                pairs.setdefault(i, (q, begin, *(sides if solved[0] else sides[::-1])))
        live = [i for i in live if i not in coa]
        if not live:
            break

    def messages(kept):
        return [{"messages": [{"role": "user", "content": questions[i]["question"]},
                              {"role": "assistant", "content": TAGS["think"] + text}]}
                for i, text in sorted(kept.items())]
    return messages(coa), messages(cot), [
        {"conversation": [{"from": "human", "value": q["question"] + TAGS["think"] + begin}],
         "chosen": {"from": "gpt", "value": chosen}, "rejected": {"from": "gpt", "value": rejected}}
        for _, (q, begin, chosen, rejected) in sorted(pairs.items())]


def run(s):
    if not (s.teacher and s.train_data and s.corpus and s.out):
        raise Problem("--teacher, --train_data, --corpus, --out: teacher.py needs all four: "
                      "a model, question files, where to search, and a folder to write to")
    if s.dry_run:
        raise Problem("--dry-run: teacher.py has no estimate; try it with --coa=2")
    questions = [q for path in s.train_data for q in data.read_questions(path)]
    questions = random.Random(s.seed).sample(questions, min(s.coa, len(questions)))         # of all files, not of the first
    chat, search, folder = Chat(s.teacher, s, "teacher"), tools.open_library(s), Path(s.out)
    coa, cot, pairs = teach(chat, questions, search, s)
    for name, rows in (("coa", coa), ("cot", cot)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    write(folder / "pairs.json", json.dumps(pairs, indent=1))
    print(f"{folder}: {len(coa)} chains of action, {len(cot)} chains of thought and {len(pairs)} pairs, "
          f"of {len(questions)} questions\n{chat.report()}\n{search.report()}")


if __name__ == "__main__":
    main(run, __doc__)
