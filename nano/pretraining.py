"""What the nano base model is pretrained on: documents, chains of thought, and single skills.

The base model stands for a reasoning model that has never used a tool. So no text here is a chain
of thought with an action inside it: a workflow has to put the single skills together.

The table SKILLS, at the end, says when each skill is trained, and how often.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.progress import tqdm
from data.passages import LINE_BREAK
from data.questions import Fact, Question
from data.teacher import (
    NOT_FOUND,
    closing_parts,
    find_evidence,
    note_parts,
    opening_parts,
    recall_chain,
    state_lookup,
)
from data.trajectory import Codec, Observation, Part, Role, Trajectory
from nano.questions import (
    conclude,
    draw_former_name_question,
    draw_questions,
    fact_of,
    mention,
    plan_and_asks,
    word_question,
)
from nano.world import RELATIONS, UNSEEN_COMPOSITIONS, Entity, World, write_article

Search = Callable[[list[str]], list[Observation]]

# How the base model is prompted for a single skill.
TO_QUERY = "Write a query."
TO_READ = "Read the passages."

# Progress of pretraining, from 0 to 1.
READING_START = 0.1  # from here on passages are read, first short ones
MIXTURE_START = 0.5  # from here on all skills are trained together
LONG_CHAINS_START = 0.65  # from here on chains of thought have up to four facts


@dataclass(frozen=True)
class Source:
    """What a text is made from."""

    codec: Codec
    world: World
    search: Search  # the search tool of this world
    progress: float  # how much of pretraining is done, from 0 to 1


@dataclass(frozen=True)
class Skill:
    """A skill of the base model, and when it is trained."""

    share: float  # how many of the texts between start and end train it
    start: float  # progress of pretraining at which it begins
    end: float  # .. and at which it ends
    make: Callable[[Source, random.Random], Trajectory]  # returns one text


# ---- what the base model knows -------------------------------------------------------------------
def tell_head_article(source: Source, rng: random.Random) -> Trajectory:
    """Return an article about a head entity; these are the same in every world."""
    codec = source.codec
    entity = rng.choice(source.world.members(True))
    trajectory = Trajectory()
    trajectory.add([codec.tokenizer.bos_token_id], Role.PROMPT, 0)
    text = f"{entity.title}: {write_article(entity, rng)}"
    trajectory.add([*codec.encode(text), codec.eos_id], Role.PROMPT, 1)
    return trajectory


def recall_head_facts(source: Source, rng: random.Random) -> Trajectory:
    """Return a closed-book chain of thought about head facts, first a short one."""
    if source.progress > LONG_CHAINS_START:
        sets = ["single", "typed", "bridge", "compare", "chain"]
    else:
        sets = ["single", "typed", "single", "bridge"]
    question = _draw_one(source.world, rng.choice(sets), rng, head_share=1.0)
    return recall_chain(source.codec, question)


def _draw_one(world: World, set_name: str, rng: random.Random, head_share: float) -> Question:
    return draw_questions(world, set_name, 1, rng, head_share)[0]


# ---- to plan and to ask --------------------------------------------------------------------------
def practise_planning(source: Source, rng: random.Random) -> Trajectory:
    """Return a made-up chain of thought; many end after the plan."""
    return made_up_chain(source.codec, source.world, rng, plan_only_share=0.6)


def made_up_chain(
    codec: Codec, world: World, rng: random.Random, plan_only_share: float = 0.0
) -> Trajectory:
    """Return a chain that plans, asks for one fact after the other, and stops.

    What is recalled at each fact is given, not learned. A third of the chains are comparisons of
    this world. In the rest the relations need not fit each other, so that the next one can only be
    read from the question. Compositions that are kept for evaluation do not occur.

    plan_only_share: of the rest, how many end after the plan.
    """
    if rng.random() < 0.33:
        question = _draw_one(world, "compare", rng, head_share=0.0)
        return recall_chain(codec, question, "given")
    path = _draw_path(rng, rng.randint(1, 4))
    entities = rng.sample(world.members(False), len(path) + 1)
    names = [mention(entity, entity.has_qualifier) for entity in entities]
    subject = names[0]
    for relation in path[:-1]:
        subject = rng.choice(RELATIONS[relation].phrases).format(x=subject)
    question = word_question(world, rng, path[-1], subject)
    question = question[0].upper() + question[1:]
    asks = [
        f"{RELATIONS[relation].noun} of {name}?"
        for relation, name in zip(path, names[:-1], strict=True)
    ]
    plan, asks = plan_and_asks(asks)
    parts: list[Part] = []
    if plan:
        parts.append(("think", plan))
        if rng.random() < plan_only_share:
            return codec.build(question, parts)
    for ask, entity in zip(asks, entities[1:], strict=True):
        parts += [("think", ask), ("given", f"I recall {entity.title}.")]
    return codec.build(question, [*parts, ("answer", entities[-1].title)])


def _draw_path(rng: random.Random, hops: int) -> list[str]:
    """Return relations of which no two neighbours are a composition kept for evaluation."""
    path: list[str] = []
    for _ in range(hops):
        options = [
            relation
            for relation in RELATIONS
            if not path or (path[-1], relation) not in UNSEEN_COMPOSITIONS
        ]
        path.append(rng.choice(options))
    return path


# ---- to write a query, and to read what it finds -------------------------------------------------
def write_query(source: Source, rng: random.Random) -> Trajectory:
    """Return a question at one of its facts, what is asked, and a query for it."""
    question, said_before, facts = _question_midway(source.world, rng)
    # Half of the prompts are the ReAct workflow's, which asks for both skills.
    prompt = f"{TO_QUERY} {TO_READ}" if rng.random() < 0.5 else TO_QUERY
    lookup = facts[0].lookups[0]
    parts: list[Part] = [*said_before, ("think", lookup.ask), ("search", lookup.queries[0])]
    return source.codec.build(f"{prompt} {question.question}", parts)


def read_result(source: Source, rng: random.Random) -> Trajectory:
    """Return a question at one of its facts, what a search finds, and what a reader says of it.

    Where the answer was found, the reader goes on to the next fact or to the end.
    """
    # A former name is no title: it is found for sure only when it is asked for as a former name.
    former = rng.random() < 0.15
    question, said_before, facts = _question_midway(source.world, rng, former)
    prompt = f"{TO_QUERY} {TO_READ}" if rng.random() < 0.5 else TO_READ
    lookup = facts[0].lookups[0]
    query = lookup.queries[0]
    if former and rng.random() < 0.5:
        query = lookup.queries[1]
    observation = source.search([query])[0].text
    parts: list[Part] = [*said_before, ("think", lookup.ask), ("result", observation)]
    evidence = find_evidence(lookup, observation)
    if not evidence:
        parts.append(("think", NOT_FOUND))
    else:
        parts += [("think", evidence), *note_parts(facts[0])]
        if len(facts) > 1:
            parts.append(("think", facts[1].ask))
        else:
            parts += closing_parts(question)
    return source.codec.build(f"{prompt} {question.question}", parts)


def _question_midway(
    world: World, rng: random.Random, former: bool = False
) -> tuple[Question, list[Part], list[Fact]]:
    """Return a question at one of its facts: what was said before, and the facts from there on.

    What was said before is given, not learned, but for the plan at the first fact. Half of the
    questions have several facts.

    former: whether to ask for one fact of an entity that is called by its former name.
    """
    if rng.random() < 0.5:
        sets = ["single", "typed"]
    else:
        sets = ["bridge", "compare", "chain"]
    if former:
        question = draw_former_name_question(world, rng)
    else:
        question = _draw_one(world, rng.choice(sets), rng, head_share=0.1)
    position = rng.randrange(len(question.facts))
    said_before = opening_parts(question)
    if position == 0:
        return question, said_before, question.facts
    for fact in question.facts[:position]:
        # It was recalled, or read in a passage.
        if rng.random() < 0.5:
            statement = fact.recall
        else:
            statement = state_lookup(fact.lookups[0], rng.randint(1, 2))
        said_before += [("think", fact.ask), ("think", statement), *note_parts(fact)]
    given: list[Part] = [("given", text) for _, text in said_before]
    return question, given, question.facts[position:]


# ---- to copy, to order and to read ---------------------------------------------------------------
def copy_titles(source: Source, rng: random.Random) -> Trajectory:
    """Return numbered passages that say next to nothing, then their titles in another order.

    Each word of a title after the first can only be copied from above. So this is where the
    network finds attention heads that copy.
    """
    codec = source.codec
    entities = rng.sample(source.world.members(False), rng.randint(2, 5))
    numbered = list(enumerate(entities, 1))
    lines = []
    for number, entity in numbered:
        text = "" if entity.kind == "person" else f" A {entity.kind}."
        lines.append(f"{entity.title} {number}:{text}")
    trajectory = codec.build(TO_READ, [("result", LINE_BREAK.join(lines))])
    for number, entity in rng.sample(numbered, len(numbered)):
        ids = codec.encode(f"{entity.title} {number} says")
        trajectory.add(ids[:1], Role.THINK, 0)
        trajectory.add(ids[1:], Role.THINK, 1)
    return trajectory


def order_years(source: Source, rng: random.Random) -> Trajectory:
    """Return ten years to put in order, or two things with their years to compare.

    A comparison asks which is the first or the later, or how to calculate the years between.
    """
    codec = source.codec
    # Years that lie close to each other are the hard ones.
    first_year, span = rng.choice([(1900, 100), (rng.randint(1900, 1985), 15)])
    count = 10 if rng.random() < 0.4 else 2
    years = [str(year) for year in rng.sample(range(first_year, first_year + span), count)]
    low = min(years)
    high = max(years)
    if count > 2:
        in_order = " is before ".join(sorted(years)) + "."
        return codec.build(f"In order: {', '.join(years)}.", [("think", in_order), ("answer", low)])
    things = rng.sample(source.world.members(False), 2)
    early = rng.random() < 0.5
    winner = things[years.index(low if early else high)]
    notes = " ".join(f"at {year} {thing.name}." for year, thing in zip(years, things, strict=True))
    if rng.random() < 0.4:
        ask = f"difference of {high} and {low}?"
        action = f"calculate: {high} - {low}"
        return codec.build(f"Difference? {notes}", [("think", ask), ("search", action)])
    conclusion = conclude(years, things, early)
    return codec.build(
        f"{'First' if early else 'Later'}? {notes}",
        [("think", conclusion), ("answer", winner.name)],
    )


def read_growing_passages(source: Source, rng: random.Random) -> Trajectory:
    """Return what read_passages does, with passages that grow until the mixture starts."""
    growth = (source.progress - READING_START) / (MIXTURE_START - READING_START)
    return read_passages(source.codec, source.world, rng, growth)


def read_articles(source: Source, rng: random.Random) -> Trajectory:
    """Return what read_passages does, with whole articles."""
    return read_passages(source.codec, source.world, rng, growth=1.0)


def read_passages(codec: Codec, world: World, rng: random.Random, growth: float) -> Trajectory:
    """Return two passages and facts that are read from them, or a title that is not there.

    Only what is said is learned, not what is asked. Most passages are about entities of one type
    with the same relations: then only the title tells them apart, and a value can't be found by its
    type alone. Films, which name two people, come more often.

    growth: how far the passages have grown, from 0, one sentence, to 1, whole articles.
    """
    first, entities = _draw_entities_to_read(world, rng, growth)
    fewest, most = _sentences_to_read(growth)
    size = rng.randint(fewest, most)
    shared_relations = rng.sample(list(first.facts), min(size, len(first.facts)))
    lines = []
    facts: list[Fact] = []
    for number, entity in enumerate(entities, 1):
        # An article is whole where more than three sentences are due.
        relations = None
        if size <= 3:
            relations = _relations_to_tell(rng, entity, shared_relations, size)
        lines.append(f"{entity.title} {number}: {write_article(entity, rng, relations)}")
        # Only a whole article tells the former name.
        former = relations is None and entity.former_name != "" and rng.random() < 0.5
        for relation in entity.facts if relations is None else relations:
            facts.append(fact_of(entity, relation, entity.has_qualifier, former))
    facts = rng.sample(facts, min(5, len(facts)))
    if growth > 0.35 and rng.random() < 0.6:
        _insert_missing_fact(facts, world, rng, entities)
    observation = LINE_BREAK.join(lines)
    parts: list[Part] = [("result", observation)]
    for fact in facts:
        statement = find_evidence(fact.lookups[0], observation) or NOT_FOUND
        parts += [("given", fact.ask), ("think", statement)]
    return codec.build(TO_READ, parts)


def _draw_entities_to_read(
    world: World, rng: random.Random, growth: float
) -> tuple[Entity, list[Entity]]:
    """Return an entity, and the two to read about.

    Most often these are of its type, and then half the time their names are like its name.
    """
    kind = "film" if rng.random() < 0.15 else None
    first = rng.choice(world.members(False, kind))
    same_type = rng.random() < 0.6 and growth > 0.1
    if same_type and rng.random() < 0.5:
        candidates = _similar_entities(world, first)
    else:
        candidates = world.members(False, first.kind if same_type else None)
    return first, rng.sample(candidates, 2)


def _sentences_to_read(growth: float) -> tuple[int, int]:
    """Return the fewest and the most sentences of a passage; six are a whole article."""
    if growth < 0.15:
        return 1, 1
    if growth < 0.25:
        return 1, 2
    if growth < 0.35:
        return 1, 4
    if growth < 0.5:
        return 2, 6
    return 6, 6


def _relations_to_tell(
    rng: random.Random, entity: Entity, shared_relations: list[str], count: int
) -> list[str]:
    """Return those of the shared relations that an entity has, or else some of its own."""
    relations = [relation for relation in shared_relations if relation in entity.facts]
    if relations:
        return relations
    own_relations = list(entity.facts)
    return rng.sample(own_relations, min(count, len(own_relations)))


def _insert_missing_fact(
    facts: list[Fact], world: World, rng: random.Random, entities: list[Entity]
) -> None:
    """Ask somewhere for another entity, whose name is like that of the first passage."""
    others = [entity for entity in _similar_entities(world, entities[0]) if entity not in entities]
    entity = rng.choice(others)
    position = rng.randint(0, len(facts))
    relation = rng.choice(list(entity.facts))
    facts.insert(position, fact_of(entity, relation, entity.has_qualifier))


def _similar_entities(world: World, entity: Entity) -> list[Entity]:
    """Return tail entities of the same type whose names share a word with this one's.

    All tail entities of the type where there are no more than three of these.
    """
    members = world.members(False, entity.kind)
    words = set(entity.name.split())
    similar = [member for member in members if not words.isdisjoint(member.name.split())]
    return similar if len(similar) > 3 else members


# ---- when each skill is trained ------------------------------------------------------------------
# A network of this size learns neither to copy nor to read when these come at once with the rest.
SKILLS = (
    # First it copies.
    Skill(share=1.00, start=0.0, end=READING_START, make=copy_titles),
    # Then it reads, from the easy to the hard.
    Skill(share=0.15, start=READING_START, end=MIXTURE_START, make=copy_titles),
    Skill(share=0.05, start=READING_START, end=MIXTURE_START, make=order_years),
    Skill(share=0.80, start=READING_START, end=MIXTURE_START, make=read_growing_passages),
    # At last come all skills but copying.
    Skill(share=0.06, start=MIXTURE_START, end=1.0, make=tell_head_article),
    Skill(share=0.18, start=MIXTURE_START, end=1.0, make=recall_head_facts),
    Skill(share=0.19, start=MIXTURE_START, end=1.0, make=practise_planning),
    Skill(share=0.06, start=MIXTURE_START, end=1.0, make=order_years),
    Skill(share=0.08, start=MIXTURE_START, end=1.0, make=write_query),
    Skill(share=0.25, start=MIXTURE_START, end=1.0, make=read_result),
    Skill(share=0.18, start=MIXTURE_START, end=1.0, make=read_articles),
)


def skills_at(progress: float) -> list[Skill]:
    """Return the skills that are trained at this progress of pretraining."""
    return [skill for skill in SKILLS if skill.start <= progress < skill.end]


def pretraining_trajectories(
    codec: Codec,
    worlds: Sequence[World],
    searches: Sequence[Search],
    rng: random.Random,
    tokens: int,
) -> list[Trajectory]:
    """Return the pretraining texts of the nano base model, in the order of training.

    For each text a world is drawn, and a skill by the shares of those that are trained then.

    searches: the search tool of each world.
    tokens: how many tokens the texts have in all, or a few more.
    """
    trajectories: list[Trajectory] = []
    count = 0
    bar = tqdm(total=tokens, desc="texts to pretrain on", unit="token", leave=False)
    while count < tokens:
        progress = count / tokens
        index = rng.randrange(len(worlds))
        source = Source(codec, worlds[index], searches[index], progress)
        skills = skills_at(progress)
        shares = [skill.share for skill in skills]
        (skill,) = rng.choices(skills, shares)
        trajectory = skill.make(source, rng)
        trajectories.append(trajectory)
        count += len(trajectory.ids)
        bar.update(len(trajectory.ids))
    bar.close()
    return trajectories
