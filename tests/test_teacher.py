"""The teacher (data.py) and the base model's skills (skills.py) on the nano world and on real questions, chains of thought, and contrastive pairs."""
import random
import re

import numpy as np
import pytest

import data
import live
import miniwiki
import skills
import tools
import train_sft
from autocoa import ACTION, OBSERVATION, PROMPT, Codec
from common import Settings
from miniwiki import PAIRS, RELATIONS, UNSEEN_PAIRS

WORLD = miniwiki.World(0, "train")
SEARCH = tools.library(WORLD.passages(), 2)
QUESTIONS = [q for name in data.MIX for q in WORLD.questions(name, 80, random.Random(name))]
FACTS = sorted(data.facts_of(QUESTIONS))
KNOWN = set(random.Random(0).sample(FACTS, len(FACTS) // 2))


@pytest.fixture(scope="module")
def nano():
    return Codec(skills.nano_tokenizer(2048, skills.nano_text(WORLD)))


def segments(codec, t):
    """[(role, text)] of the runs of one role after the prompt."""
    out = []
    for i, r in zip(t.ids, t.role):
        if out and out[-1][0] == r:
            out[-1][1].append(i)
        elif r != PROMPT:
            out.append((r, [i]))
    return [(r, codec.decode(ids).strip()) for r, ids in out]


# ---- the teacher on the nano world --------------------------------------------------------------------------------------
def test_chains_replay(nano):
    """Each query of each chain, asked again of the real tool, gives the same observation, token for token. Guards: a miss
    that is papered over, an observation that is cut or written for the occasion."""
    chains, counts = data.teach(nano, QUESTIONS, KNOWN, SEARCH)
    assert len(chains) + counts["dropped"] == len(QUESTIONS) and len(chains) > 0.9 * len(QUESTIONS)
    for q, t in chains:
        seen = [i for i, r in zip(t.ids, t.role) if r == OBSERVATION]
        again = SEARCH(t.queries)
        assert t.observations == again
        assert seen == [i for o in again for i in [nano.result, *nano.encode(o), nano.end_result]]
        asked = [text.removeprefix("<begin_search>").removesuffix("</end_search>").strip() for r, text in segments(nano, t) if r == ACTION]
        assert asked == t.queries
        assert nano.well_formed(t) and nano.answer(t) in q["golden_answers"]
        assert t.mask == [int(r not in (PROMPT, OBSERVATION)) for r in t.role]
    assert counts["searches"] >= sum(len(t.queries) for _, t in chains)


def test_the_teacher_searches_for_what_is_not_known(nano):
    """Known facts are recalled without a call, unknown ones are searched for; both by what the base model said, not by label."""
    for q, t in data.teach(nano, QUESTIONS, KNOWN, SEARCH)[0]:
        plan = q["metadata"]["steps"]
        for s in plan:
            used = [query for query in s["queries"] if query in t.queries]
            assert bool(used) == (s["fact"] not in KNOWN) or any(query in s2["queries"] for query in used for s2 in plan if s2["fact"] not in KNOWN)
            assert (s["recall"] in nano.decode(t.ids)) >= (s["fact"] in KNOWN)
    everything = data.teach(nano, QUESTIONS, set(FACTS), SEARCH)
    assert all(t.queries == [] for _, t in everything[0]) and everything[1] == {"searches": 0, "misses": 0, "dropped": 0}


def test_a_miss_is_kept_and_reworded(nano):
    """The question names a thing by a former name, which no article has for its title."""
    former = [q for q in QUESTIONS if q["metadata"]["steps"][0]["queries"][1].startswith("once called")]
    chains, counts = data.teach(nano, former, set(), SEARCH)
    missed = [(q, t) for q, t in chains if q["metadata"]["steps"][0]["queries"][1] in t.queries]
    assert len(missed) > 5 and counts["misses"] >= len(missed)
    for q, t in missed:
        first = q["metadata"]["steps"][0]
        words = [text for _, text in segments(nano, t)]
        assert t.queries[:2] == first["queries"]
        assert not any(f"{first['title']} {n}:" in t.observations[0] for n in (1, 2))
        number, = [n for n in (1, 2) if f"{first['title']} {n}:" in t.observations[1]]
        assert words[3] == "Not found." and words[6].startswith(f"{first['subject']} {number} says {first['noun']} {first['answer']}.")


def test_chains_of_thought_have_no_action(nano):
    """CoT that is mixed in: every fact recalled once, no tool, the golden answer."""
    for q in QUESTIONS:
        t = data.cot(nano, q)
        assert t.queries == [] and OBSERVATION not in t.role and nano.well_formed(t)
        assert nano.answer(t) in q["golden_answers"]
        for s in q["metadata"]["steps"]:
            assert nano.decode(t.ids).count(s["ask"] + " " + s["recall"]) == 1
        assert f"<think> {q['metadata']['plan']}".strip() in nano.decode(t.ids)


def test_differences_are_not_learned_by_heart(nano):
    """In a chain of thought what is recalled of facts carries loss, what is recalled of a difference does not, but the answer does."""
    rows = [q for q in QUESTIONS if q["metadata"]["steps"][-1]["noun"] == miniwiki.DIFFERENCE]
    assert len(rows) > 10
    for q in rows:
        learned = " | ".join(nano.decode([i for i, _ in run]).strip() for run in runs(data.cot(nano, q)))
        *steps, last = q["metadata"]["steps"]
        assert all(s["recall"] in learned for s in steps) and last["ask"] in learned and last["recall"] not in learned
        assert learned.endswith(f"</think>\\boxed{{ {last['answer']}}}<eos>")


def test_base_data_holds_no_chain_of_action(nano):
    """Guards: a base model that is already an agent. Of single skills, none both searches and reads or answers after it."""
    texts = skills.base_data(nano, [WORLD], [SEARCH], random.Random(0), 60_000)
    assert 60_000 <= sum(len(t.ids) for t in texts) < 62_000
    kinds = {(nano.search in t.ids, nano.result in t.ids, nano.boxed in t.ids) for t in texts}
    assert kinds >= {(True, False, False), (False, True, True), (False, False, True)}
    assert not any(search and (read or answer) for search, read, answer in kinds)
    assert all(m == 0 for t in texts for m, r in zip(t.mask, t.role) if r == OBSERVATION)


def test_queries_and_readings_behind_other_facts(nano):
    """The skills that a workflow puts together are learned at every fact of a question, with what was said before given: the ask and its query, or the ask,
    what is read and the next ask. Guards: a workflow that can't do two hops because its model has never written a second query."""
    texts = skills.base_data(nano, [WORLD], [SEARCH], random.Random(3), 150_000)
    seen = set()
    for t in texts:
        question, _, text = nano.decode(t.ids).partition("<think>")
        if skills.TO_QUERY in question or skills.TO_READ in question and "?" in question:
            learned = [nano.decode([i for i, _ in run]).strip() for run in runs(t)]
            number, noun = re.match(r"(?:.*\. )?(\d)? ?([a-z ]+) of [^?]+\?", learned[0]).groups()
            kind = "query" if nano.search in t.ids else "reading"
            assert not any("I recall" in x for x in learned)
            if noun == miniwiki.DIFFERENCE:
                seen.add((kind, noun))
                high, low = re.search(r"difference of (\d+) and (\d+)\?", learned[0]).groups()
                assert learned[0].endswith(f"<begin_search> calculate: {high} - {low}</end_search>") if kind == "query" else learned[1].startswith(f"It is {int(high) - int(low)}.")
            else:
                seen.add((kind, number))
                assert learned[0].endswith("</end_search>") if kind == "query" else learned[1].startswith("Not found.") or " says " in learned[1]
    assert seen == {(kind, number) for kind in ("query", "reading") for number in (None, "1", "2", "3", "4", miniwiki.DIFFERENCE)}


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.3, 0.45, 1.0])
def test_reading_says_what_the_passages_say(nano, progress):
    """Each thought names a passage by its number and its title, or the former name that it tells, and then a value that it holds; or says that no
    passage has the title that is asked for; asks carry no loss."""
    rng, sizes, missing, former = random.Random(0), [], 0, 0
    for _ in range(40):
        t = skills.reading(nano, WORLD, rng, progress)
        passages = {line.split(":")[0]: line for line in t.observations[0].split("\n ")}
        assert len(passages) == 2
        sizes += [len(line.split(".")) for line in t.observations[0].split("\n ")]
        text = nano.decode(t.ids)
        learned = [nano.decode([i for i, _ in run]).strip() for run in runs(t)]
        missing += learned.count("Not found.")
        assert 1 <= len(learned) - learned.count("Not found.") <= 5 and learned.count("Not found.") <= 1
        for said in learned:
            if said != "Not found.":
                head, _, value = said.rstrip(".").partition(" says ")
                said_again = next(rel.noun for rel in RELATIONS.values() if value.startswith(rel.noun + " "))
                assert f"{said_again} of" in text[:text.index(said)].rpartition(".")[2]         # what was asked just before
                value = value.removeprefix(said_again + " ")
                passage, = [text for title, text in passages.items() if title[-2:] == head[-2:]]
                assert value and value in passage
                assert passage.startswith(f"{head}:") or f"once called {head[:-2]}." in passage
                former += not passage.startswith(f"{head}:")
    assert (max(sizes) <= 3) == (progress == 0.0)
    assert (10 < missing < 38) if progress > 0.35 else missing == 0
    assert (former > 3) == (progress > 0.25)


def runs(t):
    """The runs of tokens that carry loss, as [(id, role)]."""
    out = [[]]
    for i, m, r in zip(t.ids, t.mask, t.role):
        if m:
            out[-1].append((i, r))
        elif out[-1]:
            out.append([])
    return [x for x in out if x]


def test_plans_never_hold_a_composition_of_evaluation(nano):
    """A chain of made-up facts plans and asks for them inside out, as the question nests them; what is recalled carries no loss. No pair of relations
    that is kept for evaluation follows one another, while pairs that no encyclopedia has do. Guards: `compose` seen in pretraining."""
    nouns, rng, pairs, compared = {rel.noun: r for r, rel in RELATIONS.items()} | {miniwiki.DIFFERENCE: miniwiki.DIFFERENCE}, random.Random(0), set(), 0
    noun_of = {r: noun for noun, r in nouns.items()}
    for _ in range(600):
        t = skills.made_up(nano, WORLD, rng)
        text = nano.decode(t.ids).split("<think>")[1].strip()
        path = [nouns[noun] for noun in re.findall(r"(?:^|\. )(?:\d )?\b([a-z ]+?) of [^?.]+\?", text)]
        assert 1 <= len(path) <= 4 + (path[-1] == miniwiki.DIFFERENCE) and text.count("I recall") == len(path)
        learned = [nano.decode([i for i, _ in run]).strip() for run in runs(t)]
        plan, _, first = learned[0].rpartition(". ")
        assert re.findall(r"\d ([a-z ]+?)(?= of | \d |$)", plan) == ([noun_of[r] for r in path] if len(path) > 1 else [])
        assert [re.sub(r"^(at \d{4} [^.]+\. )?\d ", "", x).split(" of ")[0] for x in [first, *learned[1:-1]]] == [noun_of[r] for r in path]
        if path[-1] == miniwiki.DIFFERENCE:
            continue
        if " is at 1" in text:
            compared += 1
            assert re.search(r"(First|Later) is at (\d+) (.+)\.</think>\\boxed\{ \3\}", text)
        else:
            assert learned[-1].startswith("</think>")
        pairs |= set(zip(path, path[1:])) if " is at 1" not in text else set()
    assert not pairs & UNSEEN_PAIRS and pairs - set(PAIRS) and len(pairs) > 150 and compared > 100


def test_what_is_given_is_never_learned(nano):
    """Made-up facts are given in a plan's chain, with SFT-3's eyes too; its observations are learned there, its prompt is not. Guards: SFT-3
    that learns to recall what is made up."""
    rng = random.Random(1)
    for t in [skills.made_up(nano, WORLD, rng) for _ in range(20)] + [t for _, t in data.teach(nano, QUESTIONS[:20], KNOWN, SEARCH)[0]]:
        seen, = train_sft.unmask([t])
        assert seen.ids == t.ids and all(m == 0 for m, r in zip(seen.mask, t.role) if r == PROMPT)
        assert [m for m, r in zip(seen.mask, t.role) if r != OBSERVATION] == [m for m, r in zip(t.mask, t.role) if r != OBSERVATION]
        assert all(m == 1 for m, r in zip(seen.mask, t.role) if r == OBSERVATION)


def test_rl_with_the_tool_has_a_world_of_its_own():
    """What RL-2's questions need is found by RL-2's tool and hardly by SFT's, which would be a world that the policy has read."""
    task = data.nano_task(Settings(train_scale=1, eval_questions=2))
    for pool, tool, other in (("rl1", task.search, task.rl_search), ("rl2", task.rl_search, task.search)):
        steps = [s for q in task.train(100, pool) for s in q["metadata"]["steps"] if not s["head"]]
        mine, others = (np.mean([bool(data.found(s, seen)) for s, seen in zip(steps, search([s["queries"][0] for s in steps]))]) for search in (tool, other))
        assert mine > 0.85 and others < 0.35


def test_a_former_name_is_found_when_asked_as_one():
    """The plain query finds the article in about half of the cases, the reworded one nearly always."""
    search, rng = tools.BM25(WORLD.passages(), 2), random.Random(0)
    steps = [WORLD.by_former_name(rng)["metadata"]["steps"][0] for _ in range(100)]
    first, second = ([bool(data.found(s, seen)) for s, seen in zip(steps, search([s["queries"][n] for s in steps]))] for n in (0, 1))
    assert 30 < sum(first) < 65 and sum(second) > 90


def test_a_word_is_one_token_wherever_it_stands(nano):
    """After a space, after a line break, in a title; and what tells namesakes apart is one token. Guards: a passage whose title is spelled
    with other tokens than the query because a line break stands before it."""
    one, = nano.encode("Silver")
    assert nano.encode("x\n Silver River")[-2] == one == nano.encode("Silver River (film)")[0]
    assert all(len(nano.encode(f"({q})")) == 1 for q in ("film", "band", "singer", "chef"))


def test_titles_can_only_be_copied(nano):
    """The first word of each title is given, the others and its number carry loss, and all stand in the passages."""
    t = skills.titles(nano, WORLD, random.Random(1))
    given = [line.split(":")[0] for line in t.observations[0].split("\n ")]
    tail = nano.decode(t.ids[t.ids.index(nano.end_result) + 1:]).strip()
    assert sorted(x.strip() for x in tail.split(" says") if x) == sorted(given)
    assert all(title.split(" ", 1)[1] + " says" in [nano.decode([i for i, _ in run]).strip() for run in runs(t)] for title in given)


# ---- pairs of SFT-1 -----------------------------------------------------------------------------------------------------
def test_pairs_of_both_directions(nano):
    """Acting is chosen where recall was wrong and acting right, thinking where recall was right and acting wrong; nothing is
    learned where both agree. The sides share a prefix without loss and part at its end."""
    recalled = {f: data.facts_of(QUESTIONS)[f][1][0] if f in KNOWN else "Nobody" for f in FACTS}
    acted = {q["id"] for q in QUESTIONS if random.Random(q["id"]).random() < 0.5}
    by_recall = {q["id"]: all(s["fact"] in KNOWN for s in q["metadata"]["steps"]) for q in QUESTIONS}
    acts, thinks = data.pairs(nano, QUESTIONS, recalled, acted)
    assert len(acts) == sum(q["id"] in acted and not by_recall[q["id"]] for q in QUESTIONS) > 10
    assert len(thinks) == sum(by_recall[q["id"]] and q["id"] not in acted for q in QUESTIONS) > 10
    for pairs, chosen_acts in ((acts, True), (thinks, False)):
        for chosen, rejected in pairs:
            cut = chosen.mask.index(1)
            assert chosen.ids[:cut] == rejected.ids[:cut] and chosen.ids[cut] != rejected.ids[cut]
            for t in (chosen, rejected):
                assert t.mask == [0] * cut + [1] * (len(t.ids) - cut) and nano.search not in t.ids[:cut]
            assert (chosen.ids[cut] == nano.search, rejected.ids[cut] == nano.search) == (chosen_acts, not chosen_acts)
            assert nano.end_search == (chosen if chosen_acts else rejected).ids[-1]
            thought = nano.decode((rejected if chosen_acts else chosen).ids[cut:])
            assert thought.startswith(" I recall") and ("Nobody" in thought) == chosen_acts


# ---- real questions: a corpus made for this test ----------------------------------------------------------------------
CORPUS = [('"Orla Venn"', "Orla Venn (born 1931) was a potter. She grew up in Tallow. Her kiln burned in 1960."),
          ('"The Clay Hour"', "The Clay Hour is a novel. It was written by Orla Venn. Critics were kind."),
          ('"Tallow (town)"', "Tallow is a small town. It lies in Marrow County, by the sea."),
          ('"Marrow County"', "Marrow County has four towns and one bridge."),
          ('"Clay pipe"', "A clay pipe is a pipe made of clay. Its hour of fame has passed.")]
PASSAGES = [{"id": str(i), "contents": f"{title}\n{text}"} for i, (title, text) in enumerate(CORPUS)]


def real(question, golden, titles=(), name="hotpotqa_1", **more):
    q = {"id": name, "question": question, "golden_answers": golden, "metadata": {"gold_titles": list(titles), **more}}
    q["metadata"]["steps"] = data.real_steps(q)
    return q


def taught(codec, q, top_k=1):
    chains, counts = data.teach(codec, [q], set(), tools.library(PASSAGES, top_k))
    return (chains[0][1] if chains else None), counts


def test_the_teacher_sees_what_fits(nano):
    """Observations in chains have at most max_observation tokens, as in rollouts; and what was cut away is nothing the teacher can read."""
    q = real("Where did the author of The Clay Hour grow up?", ["Tallow"], ["Orla Venn", "The Clay Hour"])
    whole, _ = data.teach(nano, [q], set(), tools.library(PASSAGES, 2), 128)
    longest = max(len(nano.encode(o)) for o in whole[0][1].observations)
    fitted, _ = data.teach(nano, [q], set(), tools.library(PASSAGES, 2), longest - 1)
    assert all(len(nano.encode(o)) < longest for _, t in fitted for o in t.observations)
    assert data.teach(nano, [q], set(), tools.library(PASSAGES, 2), 4)[0] == []


def test_a_real_bridge(nano):
    """First the passage that the question names, then the one that it leads to; what is said of each is the passage's own
    sentence that holds the next title, then the answer."""
    q = real("Where did the author of The Clay Hour grow up?", ["Tallow"], ["Orla Venn", "The Clay Hour"])
    t, counts = taught(nano, q)
    assert t.queries == ["The Clay Hour", "Orla Venn"] and counts["misses"] == 0
    words = [text for _, text in segments(nano, t)]
    assert words[3].startswith("It was written by Orla Venn.") and words[6].startswith("She grew up in Tallow.")
    assert nano.answer(t) == "Tallow" and nano.well_formed(t)


def test_a_real_question_that_is_known(nano):
    """It is one fact, however many searches it takes, so it is recalled once. Guards: the answer recalled for the first hop, and again for a title that nothing named."""
    q = real("Where did the author of The Clay Hour grow up?", ["Tallow"], ["Orla Venn", "The Clay Hour"])
    fact = q["metadata"]["steps"][0]["fact"]
    (_, known), = data.teach(nano, [q], {fact}, tools.library(PASSAGES, 1))[0]
    for t in (data.cot(nano, q), known):
        text = nano.decode(t.ids)
        assert text.count("I recall Tallow.") == 1 and "Orla" not in text and not t.queries and nano.answer(t) == "Tallow"
    (_, acting), = data.pairs(nano, [q] * 2, {fact: "Tallow"}, set())[1][1:]        # the second's cut is the second step, if it has one
    assert acting.queries == ["The Clay Hour"] and "recall" not in nano.decode(acting.ids)


def test_a_real_miss_is_kept(nano):
    """The question's own words find another passage; the miss stays, and the title is tried."""
    q = real("What does the pipe of clay of fame lie near in the county?", ["Marrow County"], ["Tallow (town)"], "nq_1")
    t, counts = taught(nano, q)
    assert t.queries == [q["question"], "Tallow (town)"] and counts == {"searches": 2, "misses": 1, "dropped": 0}
    words = [text for _, text in segments(nano, t)]
    assert t.observations[0].startswith("Clay pipe 1:") and words[3] == "Not found." and words[6].startswith("It lies in Marrow County, by the sea.")


def test_two_things_compared(nano):
    """Yes, no and one of two that the question names are in no passage: what each passage begins with is noted, and the chain answers. Guards: such
    questions were dropped, so a policy never answered them."""
    for question, golden in (("Are Orla Venn and Tallow (town) both people?", "no"), ("Which is a person, Orla Venn or Tallow?", "Orla Venn")):
        t, counts = taught(nano, real(question, [golden], ["Orla Venn", "Tallow (town)"]))
        assert counts["dropped"] == 0 and set(t.queries) == {"Orla Venn", "Tallow (town)"} and nano.answer(t) == golden
        first = [o.partition(" 1: ")[2].split(". ")[0] for o in t.observations]
        said = " ".join(text for _, text in segments(nano, t) if not text.startswith("<search_result>"))
        assert all(f in said for f in first)


def test_the_answer_as_the_evidence_spells_it(nano):
    """Of several golden answers the one that was read, without an article, and the question once more before it. Guards: the last alias was taught, which
    no passage held, so that a policy learned to say other words than it had read."""
    q = real("Where did Orla Venn grow up?", ["the Tallow Borough", "TALLOW", "Tallowtown"], ["Orla Venn"], "nq_1")
    t, _ = taught(nano, q)
    assert nano.answer(t) == "Tallow" and [text for _, text in segments(nano, t)][3].endswith(" The question was: Where did Orla Venn grow up?</think>")
    assert data.spelled("He saw the U.S. and (Philadelphia), PA.", ["philadelphia, pa", "US"]) == "U.S"
    assert data.spelled("In the Hague.", ["a hague"]) == "Hague" and data.spelled("Nothing.", ["no", "yes"]) == "no"


def test_a_chain_without_its_answer_is_dropped(nano):
    """The right passage comes back and does not hold the golden answer: no chain, since it would be made up."""
    for golden in (["Tallowby"], ["the moon"]):
        t, counts = taught(nano, real("Where did Orla Venn grow up?", golden, ["Orla Venn"], "nq_2"))
        assert t is None and counts["dropped"] == 1
    t, counts = taught(nano, real("Zork?", ["Tallow"], [], "nq_3"))
    assert t is None and counts == {"searches": 1, "misses": 1, "dropped": 1}


def test_a_chain_behind_a_failed_search_is_dropped(nano):
    """Wikipedia did not answer: that it holds nothing of the title would be made up. Guards: a failure taught as a miss, with another wording that finds it."""
    q = real("Where did Orla Venn grow up?", ["Tallow"], ["Orla Venn"], "nq_5")
    search = tools.library(PASSAGES, 1)
    for said, kept in (("Nothing here.", 1), (live.FAILED, 0), (live.MISSED, 0)):
        chains, counts = data.teach(nano, [q], set(), lambda queries, said=said: [said if query == "Orla Venn" else o for query, o in zip(queries, search(queries))])
        assert len(chains) == kept and counts == {"searches": 2, "misses": 1, "dropped": 1 - kept}


def test_a_query_that_the_policy_can_derive(nano):
    """Neither title is in the question: it is asked itself, and the title is the rewording. Guards: 53 of 600 questions of HotpotQA, whose first query was a name from the gold titles."""
    q = real("Which county has the town of the potter of 1931?", ["Marrow County"], ["Orla Venn", "Tallow (town)"])
    first, second = q["metadata"]["steps"]
    assert first["queries"] == [q["question"], "Orla Venn"] and "Orla" not in first["ask"] + first["subject"]
    assert second["queries"][0] == "Tallow (town)"              # which the first passage names
    of_alone = real("Who is the mother of the director of a film?", ["Eva"], ["House of Clay", "Son of Hart"])
    assert of_alone["metadata"]["steps"][0]["queries"][0] == of_alone["question"]        # a shared "of" names nothing
    named = real("Where did the author of The Clay Hour grow up?", ["Tallow"], ["Orla Venn", "The Clay Hour"])
    assert [s["queries"][0] for s in named["metadata"]["steps"]] == ["The Clay Hour", "Orla Venn"]


def test_evidence_holds_the_answer(nano):
    """The answer counts as whole words after normalisation, and is still in the sentence that the chain quotes, however long."""
    def found(text, holds):
        return data.found({"title": "A", "holds": holds}, f"A: 1 1: A cat, a hat, The Hague, Tallow.\n A 2: {text}")
    assert found("He likes cats. He was born in The Hague!", ["Hague"]) == "He was born in The Hague!"
    assert found("Scattered.", ["cat"]) == found("Nothing.", ["cat"]) == data.found({"title": "B", "holds": ["cat"]}, "A 1: A cat.") == ""
    assert "Tallow" in found("Very " * 60 + "old is Tallow.", ["Tallow"])
