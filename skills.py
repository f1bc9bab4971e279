"""What nano's base model is pretrained on (train_sft.py, --stage=base): its tokenizer, documents, single skills."""
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data
import miniwiki
from autocoa import PROMPT, TAGS, THINK, Trajectory
from common import tqdm

TO_QUERY, TO_READ = "Write a query.", "Read the passages."      # how the nano base model is prompted for a single skill


# ---- tokenizer ----------------------------------------------------------------------------------------------------------
def nano_tokenizer(vocab_size, text):
    """A byte-level BPE of the nano world. The words that names are made of come out as single tokens, qualifiers too: " (film)"."""
    tok = Tokenizer(models.BPE())
    words = r" \([a-z]+\)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s"
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<bos>", "<eos>", *TAGS.values()], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                   additional_special_tokens=list(TAGS.values()), clean_up_tokenization_spaces=False)


def nano_text(world):
    """What the nano tokenizer is trained on: articles and questions of a training world."""
    rng = random.Random("text")
    for title, text in world.articles.items():
        yield f" {title}: {text}"
    for name in miniwiki.SETS:
        for q in world.questions(name, 400, rng):
            yield f" {q['question']} {q['metadata']['plan']}"
            for s in q["metadata"]["steps"]:
                yield f" {s['ask']} {s['recall']} {s['called']} 1 says {s['noun']} {s['answer']}. {' '.join(s['queries'])}"
    words = (miniwiki.FIRST + miniwiki.LAST + miniwiki.STEM + miniwiki.CITY + miniwiki.ADJ + miniwiki.NOUN + miniwiki.FIRM + miniwiki.LAND
             + miniwiki.SIDE + miniwiki.JOBS + miniwiki.MONEY + miniwiki.TONGUE + [str(n) for n in [*range(1900, 2000), *range(1, 100)]])
    for word in words + [f"({q})" for q in [*miniwiki.JOBS, *miniwiki.SIZES]]:
        yield f" {word}" * 40
    yield (f" {TO_QUERY} {TO_READ} I recall it. It is so. Not found. In order: 1, 2. 1 is before 2. First is at 1. "
           "Later is at 2. Nothing found. Difference? difference of 2 and 1? calculate: 2 - 1. It is 1.") * 40


# ---- base stage: documents and single skills ----------------------------------------------------------------------------
def base_data(codec, worlds, search, rng, tokens):
    """Pretraining of the nano base model: [Trajectory], in the order of training, about `tokens` tokens in all.

    First copying, then reading (and years in order), each from the easy to the hard: a network of this size finds
    neither when both come at once with the rest (NOTES.md). Then all: head articles; closed-book chains of thought on
    head facts, whose hops grow; and single skills on other worlds: to plan and ask for one fact after the other, to
    write a query, to read what it finds or say that it isn't there, to compare years. Never a chain of thought with an
    action inside. worlds: list of World; search: one search tool for each.
    """
    out, count, bar = [], 0, tqdm(total=tokens, desc="texts to pretrain on", unit="token", leave=False)
    heads = [e for e in worlds[0].entities if e.head]
    while count < tokens:
        done = count / tokens
        i = rng.randrange(len(worlds))
        world, kind = worlds[i], rng.random()
        if done < 0.1 or (done < 0.5 and kind < 0.15):
            t = titles(codec, world, rng)
        elif done < 0.5:
            t = reading(codec, world, rng, (done - 0.1) / 0.4) if kind > 0.2 else order(codec, world, rng)
        elif kind < 0.06:
            e = rng.choice(heads)
            t = Trajectory()
            t.add([codec.tok.bos_token_id], PROMPT, 0)
            t.add(codec.encode(f"{e.title}: {miniwiki.article(e, rng)}") + [codec.eos], PROMPT, 1)
        elif kind < 0.24:
            sets = ["single", "typed", "bridge", "compare", "chain"] if done > 0.65 else ["single", "typed", "single", "bridge"]
            t = data.cot(codec, world.questions(rng.choice(sets), 1, rng, p_head=1.0)[0])
        elif kind < 0.43:
            t = made_up(codec, world, rng, short=0.6)
        elif kind < 0.49:
            t = order(codec, world, rng)
        elif kind < 0.57:
            q, before, steps = midway(world, rng)
            to_query = f"{TO_QUERY} {TO_READ}" if rng.random() < 0.5 else TO_QUERY
            t = codec.build(f"{to_query} {q['question']}", before + [("think", steps[0]["ask"]), ("search", steps[0]["queries"][0])])
        elif kind < 0.82:
            former = rng.random() < 0.15                # a name that is no title: found for sure only when it is asked for as a former name
            q, before, steps = midway(world, rng, former)
            to_read = f"{TO_QUERY} {TO_READ}" if rng.random() < 0.5 else TO_READ
            seen = search[i]([steps[0]["queries"][former and rng.random() < 0.5]])[0]
            evidence = data.found(steps[0], seen)
            after = data.noted(steps[0]) + ([("think", steps[1]["ask"])] if steps[1:] else data.ending(q))
            t = codec.build(f"{to_read} {q['question']}", before + [("think", steps[0]["ask"]), ("result", seen)]
                            + ([("think", evidence)] + after if evidence else [("think", data.MISSING)]))
        else:
            t = reading(codec, world, rng, 1.0)
        out.append(t)
        count += len(t.ids)
        bar.update(len(t.ids))
    bar.close()
    return out


def midway(world, rng, former=False):
    """A question, half of them of several facts, at one of its facts: (question, what was said before, given; the facts from here on)."""
    sets = ["single", "typed"] if rng.random() < 0.5 else ["bridge", "compare", "chain"]
    q = world.by_former_name(rng) if former else world.questions(rng.choice(sets), 1, rng, p_head=0.1)[0]
    steps = q["metadata"]["steps"]
    at = rng.randrange(len(steps))
    if at == 0:
        return q, data.opening(q), steps
    before = data.opening(q)
    for s in steps[:at]:        # recalled, or read in a passage
        before += [("think", s["ask"]), ("think", s["recall"] if rng.random() < 0.5 else data.says(s, rng.randint(1, 2)))] + data.noted(s)
    return q, [("given", text) for _, text in before], steps[at:]


def titles(codec, world, rng):
    """Numbered passages that say next to nothing, then their titles and numbers in another order: each word after the first
    can only be copied from above, so this is where heads that copy are found."""
    some = rng.sample(world.groups[False, None], rng.randint(2, 5))
    numbered = list(enumerate(some, 1))
    t = codec.build(TO_READ, [("result", "\n ".join(f"{e.title} {n}:" + ("" if e.kind == "person" else f" A {e.kind}.")
                                                    for n, e in numbered))])
    for n, e in rng.sample(numbered, len(numbered)):
        ids = codec.encode(f"{e.title} {n} says")
        t.add(ids[:1], THINK, 0)
        t.add(ids[1:], THINK, 1)
    return t


def order(codec, world, rng):
    """Years in order; or of two things with their years, which is first or later, or how to calculate what lies between."""
    first, span = rng.choice([(1900, 100), (rng.randint(1900, 1985), 15)])         # years that lie close are the hard ones
    years = [str(y) for y in rng.sample(range(first, first + span), 10 if rng.random() < 0.4 else 2)]
    low, high = min(years), max(years)
    if len(years) > 2:
        return codec.build(f"In order: {', '.join(years)}.", [("think", " is before ".join(sorted(years)) + "."), ("answer", low)])
    things, early = rng.sample(world.groups[False, None], 2), rng.random() < 0.5
    winner = things[years.index(low if early else high)]
    seen = " ".join(f"at {y} {e.name}." for y, e in zip(years, things))
    if rng.random() < 0.4:
        return codec.build(f"Difference? {seen}", [("think", f"difference of {high} and {low}?"), ("search", f"calculate: {high} - {low}")])
    return codec.build(f"{'First' if early else 'Later'}? {seen}",
                       [("think", miniwiki.conclude(years, things, early)), ("answer", winner.name)])


def reading(codec, world, rng, progress):
    """Two passages and facts read from them, or that a title is not there; only what is said is learned, not what is asked.

    Passages grow from one sentence to whole articles, and are mostly of one type with the same relations: then only the
    title tells them apart, and a value can't be found by its type alone. Films, which name two people, come more often.
    """
    first = rng.choice(world.groups[False, "film" if rng.random() < 0.15 else None])
    alike = rng.random() < 0.6 and progress > 0.1
    some = rng.sample(like(world, first) if alike and rng.random() < 0.5 else world.groups[False, first.kind if alike else None], 2)
    low, high = next(k for until, k in ((0.15, (1, 1)), (0.25, (1, 2)), (0.35, (1, 4)), (0.5, (2, 6)), (2.0, (6, 6))) if progress < until)
    size = rng.randint(low, high)
    relations = rng.sample(list(first.facts), min(size, len(first.facts)))
    lines, steps = [], []
    for n, e in enumerate(some, 1):
        kept = None if size > 3 else [r for r in relations if r in e.facts] or rng.sample(list(e.facts), min(size, len(e.facts)))
        lines.append(f"{e.title} {n}: {miniwiki.article(e, rng, kept)}")
        former = kept is None and e.former != "" and rng.random() < 0.5         # only a whole article tells it
        steps += [miniwiki.step(e, r, e.title != e.name, former) for r in (e.facts if kept is None else kept)]
    observation = "\n ".join(lines)
    steps = rng.sample(steps, min(5, len(steps)))
    if progress > 0.35 and rng.random() < 0.6:
        e = rng.choice([e for e in like(world, some[0]) if e not in some])
        steps.insert(rng.randint(0, len(steps)), miniwiki.step(e, rng.choice(list(e.facts)), e.title != e.name))
    return codec.build(TO_READ, [("result", observation)]
                       + [part for s in steps for part in (("given", s["ask"]), ("think", data.found(s, observation) or data.MISSING))])


def like(world, e):
    """Entities of the same type whose names share a word with this one's; all of the type where those are few."""
    group, words = world.groups[False, e.kind], set(e.name.split())
    close = [x for x in group if not words.isdisjoint(x.name.split())]
    return close if len(close) > 3 else group


def made_up(codec, world, rng, short=0.0):
    """To plan and to ask for one fact after the other, then stop; what is recalled at each is given, not learned. A
    third are comparisons of this world. In the rest the relations need not fit each other, so the next can only be read
    from the question; this share of them, `short`, is the plan alone. Compositions kept for evaluation do not occur."""
    if rng.random() < 0.33:
        return data.cot(codec, world.questions("compare", 1, rng, p_head=0.0)[0], "given")
    path = []
    for _ in range(rng.randint(1, 4)):
        path.append(rng.choice([r for r in miniwiki.RELATIONS if not path or (path[-1], r) not in miniwiki.UNSEEN_PAIRS]))
    said = rng.sample(world.groups[False, None], len(path) + 1)
    names = [miniwiki.mention(e, e.title != e.name) for e in said]
    question = names[0]
    for r in path[:-1]:
        question = rng.choice(miniwiki.RELATIONS[r].phrases).format(x=question)
    question = world.wording(rng, path[-1], question)
    outline, asks = miniwiki.outline([f"{miniwiki.RELATIONS[r].noun} of {name}?" for r, name in zip(path, names)])
    parts = [("think", outline)] if outline else []
    if outline and rng.random() < short:
        return codec.build(question[0].upper() + question[1:], parts)
    for ask, e in zip(asks, said[1:]):
        parts += [("think", ask), ("given", f"I recall {e.title}.")]
    return codec.build(question[0].upper() + question[1:], parts + [("answer", said[-1].title)])
