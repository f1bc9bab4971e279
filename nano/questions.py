"""Questions about a nano world: six sets that mirror the paper's six, from one fact to four.

    single   Who directed Silver River?
    typed    Who directed the film Silver River?            the type tells namesakes apart
    bridge   Where was the director of Silver River born?   two facts
    compare  Who was born first, Eva Moss or Ada Falk?      or how many years lie between
    chain    three or four facts
    compose  two facts, in a composition of relations that training never shows

Each relation has four wordings in evaluation. Training never shows one of them, and has two others.
"""

import random
from dataclasses import dataclass

from common.errors import UserError
from data.questions import Fact, Lookup, Question
from nano.world import (
    RELATIONS,
    UNSEEN_COMPOSITIONS,
    WORDINGS,
    Entity,
    World,
    value_text,
)


@dataclass(frozen=True)
class Comparison:
    """How the years of two things of one type are compared."""

    domain: str  # the type of the things
    relation: str  # the year that is compared
    event: str  # what happened to the second thing: "was {b} born"
    earlier: list[str]  # wordings with {a} and {b} that ask for the earlier
    later: list[str]  # .. and for the later

    def wordings(self, early: bool) -> list[str]:
        """Return the wordings that ask for the earlier or the later of two things."""
        return self.earlier if early else self.later


COMPARISONS = [Comparison(**row) for row in WORDINGS["comparisons"]]
# Two works, bands or companies are compared by the birth years of these people of theirs.
PEOPLE_COMPARED = WORDINGS["comparisons_by_person"]

SETS = ("single", "typed", "bridge", "compare", "chain", "compose")
# Of comparisons, how many ask for the years between.
DIFFERENCE_SHARE = 0.4
# Of questions about an entity with a former name, how many call it by that.
FORMER_NAME_SHARE = 0.6


def draw_questions(
    world: World,
    set_name: str,
    count: int,
    rng: random.Random,
    head_share: float = 0.10,
) -> list[Question]:
    """Return different questions of one set.

    head_share: how many of them start at a head entity. Of single facts it is twice as many,
    since they would otherwise hardly touch what a base model knows.
    Raises UserError where the world has too few.
    """
    texts: set[str] = set()
    questions: list[Question] = []
    for _ in range(1000 + 100 * count):
        if len(questions) == count:
            break
        question = draw_question(world, set_name, rng, head_share)
        if question is not None and question.question not in texts:
            texts.add(question.question)
            question.id = f"{set_name}_{len(questions)}"
            questions.append(question)
    if len(questions) < count:
        raise UserError(
            f"this world has only about {len(questions)} different questions of the set "
            f"{set_name!r}, not {count}; ask for fewer"
        )
    return questions


def draw_former_name_question(world: World, rng: random.Random) -> Question:
    """Return a question about one fact of an entity that is called by its former name."""
    entity = rng.choice([entity for entity in world.entities if entity.former_name])
    relation = rng.choice([name for name in entity.facts if name != "job"])
    text = word_question(world, rng, relation, entity.former_name)
    fact = fact_of(entity, relation, with_qualifier=False, former=True)
    return _question(text, entity.facts[relation], [fact])


def word_question(world: World, rng: random.Random, relation: str, subject: str) -> str:
    """Return a question for a relation of `subject`, worded as the world's split words it."""
    if world.split == "eval":
        wordings = RELATIONS[relation].questions
    else:
        wordings = RELATIONS[relation].training_wordings
    return rng.choice(wordings).format(x=subject)


def mention(entity: Entity, with_qualifier: bool, former: bool = False) -> str:
    """Return how a question names an entity: "Silver River", or "the film Silver River"."""
    if former:
        return entity.former_name
    return f"the {entity.qualifier} {entity.name}" if with_qualifier else entity.name


# ---- facts ---------------------------------------------------------------------------------------
def fact_of(entity: Entity, relation: str, with_qualifier: bool, former: bool = False) -> Fact:
    """Return a fact of an entity, and how to look it up.

    Its first query is what the question's own words suggest. The second is for when that misses:
    a name that no article has for its title is a former one, else the type tells namesakes apart.

    with_qualifier: whether the question says which of several namesakes it means.
    former: whether the question calls the entity by its former name.
    """
    noun = RELATIONS[relation].noun
    answer = value_text(entity.facts[relation])
    full_name = f"{entity.name} {entity.qualifier}"
    if former:
        queries = [entity.former_name, f"once called {entity.former_name}"]
    elif with_qualifier:
        queries = [full_name, f"{full_name} {noun}"]
    else:
        queries = [entity.name, full_name]
    # A reader names the passage by its title, or by the former name that was asked for.
    reader_name = entity.former_name if former else entity.title
    lookup = Lookup(
        ask=f"{noun} of {mention(entity, with_qualifier, former)}?",
        queries=queries,
        title=entity.title,
        subject=entity.former_name if former else entity.name,
        statement=f"{reader_name} {{n}} says {noun} {answer}.",
    )
    unambiguous_name = mention(entity, entity.has_qualifier)
    return Fact(
        id=f"{entity.title}|{relation}",
        wordings=[
            wording.format(x=unambiguous_name) for wording in RELATIONS[relation].common_wordings
        ],
        answers=[answer],
        recall=f"I recall {answer}.",
        lookups=[lookup],
        head=entity.is_head,
    )


def difference_of(years: list[str]) -> Fact:
    """Return the years between two years, as a fact that the calculator looks up."""
    low, high = sorted(years)
    answer = str(int(high) - int(low))
    lookup = Lookup(
        ask=f"difference of {high} and {low}?",
        queries=[f"calculate: {high} - {low}"],
        tool="calculate",
        title=answer,
        subject="calculate",
        statement=f"It is {answer}.",
    )
    return Fact(
        id=f"{high} - {low}",
        wordings=[
            f"What is the difference of {high} and {low}?",
            f"How many years lie between {low} and {high}?",
            f"How many years after {low} was {high}?",
        ],
        answers=[answer],
        recall=f"I recall {answer}.",
        lookups=[lookup],
    )


# ---- plans and conclusions -----------------------------------------------------------------------
def plan_and_asks(asks: list[str], parts: int = 1) -> tuple[str, list[str]]:
    """Return the plan that a chain of several facts begins with, and the asks with their numbers.

    A single fact needs no plan. In a plan only the first fact of each part says whose it is, since
    that is all that the question itself names.

    parts: how many things are compared.

    >>> plan, asks = plan_and_asks(["director of Lost Story?", "birth year of Eva Moss?"])
    >>> plan
    '1 director of Lost Story 2 birth year.'
    >>> asks
    ['1 director of Lost Story?', '2 birth year of Eva Moss?']
    """
    if len(asks) == 1:
        return "", asks
    facts_of_part = len(asks) // parts
    starts = [part * facts_of_part for part in range(parts)]
    items = []
    for index, ask in enumerate(asks):
        item = ask.removesuffix("?") if index in starts else ask.partition(" of ")[0]
        items.append(f"{index + 1} {item}")
    numbered_asks = [f"{number} {ask}" for number, ask in enumerate(asks, 1)]
    return " ".join(items) + ".", numbered_asks


def conclude(years: list[str], things: list[Entity], early: bool) -> str:
    """Return how a comparison ends: which thing is the first or the later, by its name.

    "at" stands before a year only where the name follows it. So the end is found by a match with
    the note, not with a passage that says the year.
    """
    low, high = sorted(years)
    word = "First" if early else "Later"
    year = low if early else high
    return f"{low} is before {high}. {word} is at {year} {things[years.index(year)].name}."


def _question(
    text: str,
    answer: Entity | str,
    facts: list[Fact],
    conclusion: str = "",
    parts: int = 1,
) -> Question:
    """Return a question without an id; numbers the asks of its facts."""
    golden = [answer] if isinstance(answer, str) else [answer.name, answer.title]
    golden = list(dict.fromkeys(golden))
    plan, asks = plan_and_asks([fact.ask for fact in facts], parts)
    for fact, ask in zip(facts, asks, strict=True):
        fact.lookups[0].ask = ask
    lookups = [fact.lookups[0] for fact in facts]
    return Question(
        id="",
        question=text[0].upper() + text[1:],
        golden_answers=golden,
        facts=facts,
        plan=plan,
        conclusion=conclusion,
        # A comparison answers with the name that it concludes with, all else with the title read.
        taught_answer=golden[0] if conclusion else golden[-1],
        gold_titles=[lookup.title for lookup in lookups if lookup.is_search],
    )


# ---- the six sets --------------------------------------------------------------------------------
def draw_question(
    world: World, set_name: str, rng: random.Random, head_share: float
) -> Question | None:
    """Return a question of one set without an id, or None where this draw makes none."""
    match set_name:
        case "single":
            return _draw_single(world, rng, head_share, with_qualifier=False)
        case "typed":
            return _draw_single(world, rng, head_share, with_qualifier=True)
        case "bridge":
            return _draw_walk(world, rng, head_share, hops=2, unseen=False)
        case "compare":
            return _draw_comparison(world, rng, head_share)
        case "chain":
            return _draw_walk(world, rng, head_share, hops=rng.choice([3, 3, 4]), unseen=False)
        case "compose":
            return _draw_walk(world, rng, head_share, hops=2, unseen=True)
    raise ValueError(f"no set {set_name!r}; there are {SETS}")


def _draw_start(
    world: World, rng: random.Random, head_share: float, kind: str | None = None
) -> Entity:
    is_head = rng.random() < head_share
    return rng.choice(world.members(is_head, kind))


def _draw_single(
    world: World, rng: random.Random, head_share: float, with_qualifier: bool
) -> Question | None:
    if world.split == "eval":
        # Evaluation asks as entities come.
        entity = _draw_start(world, rng, 2 * head_share)
        relation = rng.choice(list(entity.facts))
    else:
        # Training asks for each relation alike: one that is never asked for is forgotten.
        relation = rng.choice(list(RELATIONS))
        entity = _draw_start(world, rng, 2 * head_share, RELATIONS[relation].domain)
    if relation not in entity.facts:
        return None
    return _question_of_path(world, rng, entity, [relation], with_qualifier)


def _draw_walk(
    world: World, rng: random.Random, head_share: float, hops: int, unseen: bool
) -> Question | None:
    """Walk from fact to fact.

    unseen: whether to step by the compositions that are kept for evaluation, or by all others.
    """
    start = _draw_start(world, rng, head_share)
    entity = start
    path: list[str] = []
    for hop in range(hops):
        is_last = hop == hops - 1
        options = [
            relation
            for relation, value in entity.facts.items()
            if (is_last or isinstance(value, Entity))
            and (hop == 0 or ((path[-1], relation) in UNSEEN_COMPOSITIONS) == unseen)
        ]
        if not options:
            return None
        path.append(rng.choice(options))
        value = entity.facts[path[-1]]
        if isinstance(value, Entity):
            entity = value
    return _question_of_path(world, rng, start, path)


def _question_of_path(
    world: World,
    rng: random.Random,
    start: Entity,
    path: list[str],
    with_qualifier: bool = False,
) -> Question | None:
    """Return the question that asks for the end of a path of relations.

    None where what tells a person from namesakes, the job, would give the answer away.
    """
    former = bool(start.former_name) and rng.random() < FORMER_NAME_SHARE
    if former:
        with_qualifier = False
    elif not with_qualifier and start.has_qualifier:
        # A job is not implied by what is asked for, so people are always told apart.
        with_qualifier = start.kind == "person" or rng.random() < 0.5
    text = mention(start, with_qualifier, former)
    facts = []
    value: Entity | str = start
    for hop, relation in enumerate(path):
        assert isinstance(value, Entity)
        entity = value
        entity_with_qualifier = with_qualifier if hop == 0 else entity.has_qualifier
        if relation == "job" and (entity.has_qualifier or entity_with_qualifier):
            return None
        facts.append(fact_of(entity, relation, entity_with_qualifier, former and hop == 0))
        if hop < len(path) - 1:
            text = rng.choice(RELATIONS[relation].phrases).format(x=text)
        value = entity.facts[relation]
    return _question(word_question(world, rng, path[-1], text), value, facts)


# ---- comparisons ---------------------------------------------------------------------------------
def _draw_comparison(world: World, rng: random.Random, head_share: float) -> Question | None:
    """Return a question that compares the years of two things, or of people that they lead to."""
    comparison = rng.choice(COMPARISONS)
    kind = comparison.domain
    bridge: str | None = None
    if kind == "person":
        bridge = rng.choice([None, None, *PEOPLE_COMPARED["relations"]])
    if bridge is not None:
        kind = RELATIONS[bridge].domain
    things = [_draw_start(world, rng, head_share, kind) for _ in range(2)]
    facts: list[Fact] = []
    years: list[str] = []
    for thing in things:
        facts += _facts_to_year(thing, bridge, comparison.relation)
        years += facts[-1].answers
        facts[-1].note = f"at {years[-1]} {thing.name}."
    if things[0].name == things[1].name or years[0] == years[1]:
        return None
    early = rng.random() < 0.5
    wording = rng.choice(comparison.wordings(early))
    if bridge is not None:
        wording = rng.choice(PEOPLE_COMPARED["earlier" if early else "later"])
        wording = wording.replace("{kind}", kind).replace("{noun}", RELATIONS[bridge].noun)
    names = [mention(thing, thing.has_qualifier) for thing in things]
    if rng.random() < DIFFERENCE_SHARE:
        if bridge is not None:
            names = [f"the {RELATIONS[bridge].noun} of {name}" for name in names]
        text = _word_difference(rng, comparison, years).format(a=names[0], b=names[1])
        difference = difference_of(years)
        return _question(text, difference.answers[0], [*facts, difference], parts=2)
    text = wording.format(a=names[0], b=names[1])
    year = min(years) if early else max(years)
    winner = things[years.index(year)]
    return _question(text, winner, facts, conclude(years, things, early), parts=2)


def _facts_to_year(thing: Entity, bridge: str | None, relation: str) -> list[Fact]:
    """Return the facts that lead from a thing to a year, by way of a person where there is one."""
    if bridge is None:
        return [fact_of(thing, relation, thing.has_qualifier)]
    person = thing.facts[bridge]
    assert isinstance(person, Entity)
    return [
        fact_of(thing, bridge, thing.has_qualifier),
        fact_of(person, relation, person.has_qualifier),
    ]


def _word_difference(rng: random.Random, comparison: Comparison, years: list[str]) -> str:
    """Return a wording that asks for the years between, with {a} and {b} for the two things."""
    wording = rng.choice(WORDINGS["differences"])
    wording = wording.replace("{order}", "after" if years[0] < years[1] else "before")
    wording = wording.replace("{event}", comparison.event)
    return wording.replace("{noun}", RELATIONS[comparison.relation].noun)
