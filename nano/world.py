"""The nano world: small encyclopedias, each made from a seed.

An encyclopedia describes people, films, novels, bands, companies, cities and countries, with twenty
relations between them. Each entity has one short article.

    Silver River (film): A film. Eva Moss directed it. It came out in 1976. Its star is Ada Falk.

A *head* entity is the same in every encyclopedia, and its article is in the pretraining text of
the base model. A *tail* entity belongs to one encyclopedia, and no model has seen it before.

Names are made of the words in names.json. The list of all names is cut into three disjoint parts
(head, train, eval). So an evaluation world shares no tail name with any training world, whatever
the seeds, and an answer can only come from a search.

What makes a search hard: several entities share a name, "Silver River (film)" and "Silver River
(band)"; some are asked for by a former name; and distractor articles name other entities.
`python -m nano.show --seed=7` prints some articles and questions, and how hard the world is.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent
NAMES: dict[str, list[str]] = json.loads((FOLDER / "names.json").read_text())
WORDINGS: dict[str, Any] = json.loads((FOLDER / "wordings.json").read_text())

Split = Literal["train", "eval"]

# How many entities of each type a world has, and how many of these are head entities.
SIZES = {
    "person": 350,
    "film": 140,
    "novel": 120,
    "band": 90,
    "company": 80,
    "city": 110,
    "country": 40,
}
HEAD_SIZES = {
    "person": 40,
    "film": 16,
    "novel": 14,
    "band": 10,
    "company": 10,
    "city": 18,
    "country": 12,
}
DISTRACTORS = 90
HEAD_LINK_SHARE = 0.10  # how often a fact of a tail entity points to a head entity
FORMER_NAME_SHARE = 0.20  # of tail people, cities, companies and bands: they had another name once
SHARED_NAME_SHARE = 0.40  # of tail works and people: they take a name that another entity has
NAME_LEAVES_SHARE = 0.7  # how often a name that was shared can't be shared again
MARRIED_SHARE = 0.7  # of people

# Films, novels and bands take their names from one pool, so that they can share them.
NAME_POOL = {"film": "work", "novel": "work", "band": "work"}
# Values that are words, not entities.
WORD_VALUES = {"job": "jobs", "money": "currencies", "tongue": "languages"}


# ---- relations and entities ----------------------------------------------------------------------
@dataclass(frozen=True)
class Relation:
    """A relation between entities of one type and their values, with its wordings.

    In the wordings, {x} stands for the entity. Sentences are about an entity that was named
    already, so that {He}, {His} and {him} stand for it, and {value} for the value ({a} is its
    article).
    """

    domain: str  # the type of the entities that have it
    value_type: str  # a type of entities, "year", or one of WORD_VALUES
    noun: str  # what it is called in a thought: "release year"
    questions: list[str]  # four wordings; evaluation uses all of them
    training_questions: list[str]  # two more, which only training uses
    held_out: str  # one of the four, which training never uses
    phrases: list[str]  # noun phrases, for the inside of a question of several hops
    sentences: list[str]  # wordings in articles

    @property
    def training_wordings(self) -> list[str]:
        """Questions as training asks them."""
        wordings = self.questions + self.training_questions
        return [wording for wording in wordings if wording != self.held_out]

    @property
    def common_wordings(self) -> list[str]:
        """Questions as both training and evaluation ask them."""
        return [wording for wording in self.questions if wording != self.held_out]


# The wording that is held out stands at another place from relation to relation, so that training
# meets each of its words.
RELATIONS = {name: Relation(**row) for name, row in WORDINGS["relations"].items()}
# The names of the relations that each type of entity has.
RELATIONS_OF_TYPE = {
    kind: [name for name, relation in RELATIONS.items() if relation.domain == kind]
    for kind in SIZES
}
# Compositions: the second relation asks about the value of the first.
COMPOSITIONS = [
    (first, second)
    for first in RELATIONS
    for second in RELATIONS
    if RELATIONS[first].value_type == RELATIONS[second].domain
]
# Training holds none of these; the set `compose` holds no others.
UNSEEN_COMPOSITIONS = set(COMPOSITIONS[2::5])


@dataclass(eq=False)
class Entity:
    """One thing of the world: its names, its facts, and how an article speaks of it."""

    kind: str
    name: str
    is_head: bool
    title: str = ""  # the name, with a qualifier where several entities have it
    facts: dict[str, "Entity | str"] = field(default_factory=dict)  # by the name of the relation
    pronouns: tuple[str, str, str] = ("It", "Its", "it")
    former_name: str = ""  # a name that only the text of its article tells

    @property
    def qualifier(self) -> str:
        """What tells it from entities of the same name: a person's job, the type of all else."""
        if self.kind == "person":
            return value_text(self.facts["job"])
        return self.kind

    @property
    def has_qualifier(self) -> bool:
        """Whether its title is more than its name."""
        return self.title != self.name


def value_text(value: Entity | str) -> str:
    """Return a value as articles and answers spell it."""
    return value.title if isinstance(value, Entity) else value


def write_article(
    entity: Entity, rng: random.Random, relations: Iterable[str] | None = None
) -> str:
    """Return an article: what the entity is, then its facts in any order and wording.

    relations: names of the facts to tell; None: all of them, and the former name.
    """
    subject, possessive, object_ = entity.pronouns
    sentences = []
    for name in entity.facts if relations is None else relations:
        value = value_text(entity.facts[name])
        sentence = rng.choice(RELATIONS[name].sentences).format(
            value=value,
            He=subject,
            His=possessive,
            him=object_,
            a="an" if value[0] in "aeiou" else "a",
        )
        sentences.append(sentence)
    if entity.former_name and relations is None:
        sentences.append(f"{subject} was once called {entity.former_name}.")
    rng.shuffle(sentences)
    if entity.kind != "person":
        sentences.insert(0, f"A {entity.kind}.")
    return " ".join(sentences)


def _value_pattern(sentence: str, value_type: str) -> re.Pattern[str]:
    """Return what a sentence of a relation looks like, whoever it is about; group 1 is the value.

    A year begins with a digit and nothing else does: "It was formed in .." says both a band's city
    and its year.
    """
    placeholders = {
        "value": r"(\d\S*)" if value_type == "year" else r"(\D.*)",
        "He": "(?:He|She|It)",
        "His": "(?:His|Her|Its)",
        "him": "(?:him|her|it)",
        "a": "an?",
    }
    return re.compile(sentence.replace(".", r"\.").format(**placeholders))


VALUE_PATTERNS = {
    name: [_value_pattern(sentence, relation.value_type) for sentence in relation.sentences]
    for name, relation in RELATIONS.items()
}


def read_values(article: str, relation: str) -> list[str]:
    """Return the values that an article states for a relation, in the order of its sentences.

    A text that a network made up may state none, or several.

    >>> read_values("A film. Eva Moss directed it. It came out in 1976.", "director")
    ['Eva Moss']
    """
    values = []
    for sentence in re.split(r"(?<=\.) ", article):
        for pattern in VALUE_PATTERNS[relation]:
            match = pattern.fullmatch(sentence)
            if match is not None:
                values.append(match[1])
    return values


# ---- names ---------------------------------------------------------------------------------------
def _name_pools() -> dict[str, dict[str, list[str]]]:
    """Return all names by pool and part ("head", "train", "eval"); the same for every seed."""
    words_of_pool = {
        "person": ("first_names", "last_names"),
        "city": ("city_stems", "city_endings"),
        "work": ("work_adjectives", "work_nouns"),
        "company": ("last_names", "company_nouns"),
        "country": ("land_sides", "lands"),
    }
    rng = random.Random("names")
    pools = {}
    for pool, (first_words, second_words) in words_of_pool.items():
        names = [f"{a} {b}" for a in NAMES[first_words] for b in NAMES[second_words]]
        rng.shuffle(names)
        train_start = 12 if pool == "country" else 60
        eval_start = train_start + (len(names) - train_start) * 6 // 10
        pools[pool] = {
            "head": names[:train_start],
            "train": names[train_start:eval_start],
            "eval": names[eval_start:],
        }
    return pools


NAME_POOLS = _name_pools()


# ---- one encyclopedia ----------------------------------------------------------------------------
class World:
    """One encyclopedia: `entities`, and `articles` by title.

    The same seed and split give the same bytes. Head entities have the same facts in all worlds;
    the wording of their articles is the world's own.
    """

    def __init__(self, seed: int | str, split: Split, scale: int = 1) -> None:
        """Make the world of a seed.

        split: which part of the names its tail entities have.
        scale: the tail is so many times as large as SIZES says.
        """
        self.split = split
        rng = random.Random(f"{split} {seed}")
        heads = _make_entities(random.Random("head"), "head", HEAD_SIZES, heads=[])
        tail_sizes = {kind: (SIZES[kind] - HEAD_SIZES[kind]) * scale for kind in SIZES}
        tail = _make_entities(rng, split, tail_sizes, heads)
        self.entities = heads + tail
        self.by_title = {entity.title: entity for entity in self.entities}
        self._members = {
            (is_head, kind): [entity for entity in part if kind in (None, entity.kind)]
            for is_head, part in ((False, tail), (True, heads))
            for kind in (None, *SIZES)
        }
        self.articles = {entity.title: write_article(entity, rng) for entity in self.entities}
        self._add_distractors(rng, DISTRACTORS * scale)

    def members(self, is_head: bool, kind: str | None = None) -> list[Entity]:
        """Return the head or the tail entities, of one type or (None) of all."""
        return self._members[is_head, kind]

    def passages(self) -> list[dict[str, str]]:
        """Return the articles in FlashRAG's form: [{"id", "contents"}]."""
        return [
            {"id": str(number), "contents": f'"{title}"\n{text}'}
            for number, (title, text) in enumerate(self.articles.items())
        ]

    def _add_distractors(self, rng: random.Random, count: int) -> None:
        """Add articles on prizes, festivals and museums that are named after tail entities."""
        cities = self.members(False, "city")
        for entity in rng.sample(self.members(False), count):
            thing = rng.choice(WORDINGS["distractors"]["things"])
            city = rng.choice(cities).title
            sentences = rng.choice(WORDINGS["distractors"]["sentences"])
            self.articles[f"{entity.name} {thing.title()}"] = sentences.format(
                thing=thing, city=city, title=entity.title
            )


# ---- the entities of a world ---------------------------------------------------------------------
def _make_entities(
    rng: random.Random, part: str, sizes: dict[str, int], heads: list[Entity]
) -> list[Entity]:
    """Return the head or the tail entities of a world, with names, facts and titles.

    part: which part of the names they take.
    sizes: how many to make of each type.
    heads: the head entities, which the tail may point to; empty while these are made.
    """
    names = {
        pool: rng.sample(names_of_part[part], len(names_of_part[part]))
        for pool, names_of_part in NAME_POOLS.items()
    }
    members = _name_entities(rng, names, sizes, is_head=not heads)
    _draw_facts(rng, members, heads)
    _give_namesakes_different_jobs(rng, members["person"])
    _marry(rng, members["person"])
    if heads:
        _give_former_names(rng, members, names)
    entities = [entity for kind in members for entity in members[kind]]
    bearers = Counter(entity.name for entity in entities)
    for entity in entities:
        entity.title = entity.name
        if bearers[entity.name] > 1:
            entity.title = f"{entity.name} ({entity.qualifier})"
    return entities


def _name_entities(
    rng: random.Random, names: dict[str, list[str]], sizes: dict[str, int], is_head: bool
) -> dict[str, list[Entity]]:
    """Return entities by type. They have names and pronouns, and nothing else yet.

    names: new names by pool; they are taken from the end of each list.
    """
    members: dict[str, list[Entity]] = {kind: [] for kind in sizes}
    # Names that another entity may take too, by pool. All names of head entities are their own.
    shareable: dict[str, list[str]] = {"work": [], "person": []}
    for kind, count in sizes.items():
        pool = NAME_POOL.get(kind, kind)
        for _ in range(count):
            name = None
            if not is_head:
                name = _draw_shared_name(rng, kind, shareable.get(pool, []), members[kind])
            if name is None:
                name = names[pool].pop()
                if pool in shareable:
                    shareable[pool].append(name)
            entity = Entity(kind, name, is_head)
            if kind == "person":
                entity.pronouns = rng.choice([("He", "His", "him"), ("She", "Her", "her")])
            members[kind].append(entity)
    return members


def _draw_shared_name(
    rng: random.Random, kind: str, shareable: list[str], members: list[Entity]
) -> str | None:
    """Return a name that another entity has, or None where a new one is due."""
    if not shareable or rng.random() >= SHARED_NAME_SHARE:
        return None
    name = rng.choice(shareable)
    if kind != "person" and any(entity.name == name for entity in members):
        # Two films of one name could not be told apart by their type.
        return None
    if rng.random() < NAME_LEAVES_SHARE:
        # So two or three entities have a name, rarely more.
        shareable.remove(name)
    return name


def _draw_facts(rng: random.Random, members: dict[str, list[Entity]], heads: list[Entity]) -> None:
    for kind, entities in members.items():
        for entity in entities:
            for name in RELATIONS_OF_TYPE[kind]:
                # Two people marry at once, later.
                if name != "spouse":
                    value_type = RELATIONS[name].value_type
                    entity.facts[name] = _draw_value(rng, value_type, members, heads)


def _draw_value(
    rng: random.Random, value_type: str, members: dict[str, list[Entity]], heads: list[Entity]
) -> Entity | str:
    if value_type == "year":
        return str(rng.randint(1900, 1999))
    if value_type in WORD_VALUES:
        return rng.choice(NAMES[WORD_VALUES[value_type]])
    if heads and rng.random() < HEAD_LINK_SHARE:
        return rng.choice([entity for entity in heads if entity.kind == value_type])
    return rng.choice(members[value_type])


def _give_namesakes_different_jobs(rng: random.Random, people: list[Entity]) -> None:
    """Draw other jobs where people of one name share one: the job tells them apart."""
    jobs_of_name: dict[str, set[Entity | str]] = {}
    for person in people:
        jobs = jobs_of_name.setdefault(person.name, set())
        while person.facts["job"] in jobs:
            person.facts["job"] = rng.choice(NAMES["jobs"])
        jobs.add(person.facts["job"])


def _marry(rng: random.Random, people: list[Entity]) -> None:
    singles = rng.sample(people, len(people))
    for first, second in zip(singles[0::2], singles[1::2], strict=False):
        if rng.random() < MARRIED_SHARE:
            first.facts["spouse"] = second
            second.facts["spouse"] = first


def _give_former_names(
    rng: random.Random, members: dict[str, list[Entity]], names: dict[str, list[str]]
) -> None:
    for kind in ("person", "city", "company", "band"):
        for entity in members[kind]:
            if rng.random() < FORMER_NAME_SHARE:
                entity.former_name = names[NAME_POOL.get(kind, kind)].pop()


# ---- how hard it is ------------------------------------------------------------------------------
def measure_hardness(
    world: World, search: Callable[[list[str]], list[list[str]]]
) -> dict[str, float]:
    """Return figures of what makes a world hard.

    search: queries -> the titles that each finds, best first.
    types, relations, articles: how many there are.
    shared: the share of tail names that several entities have.
    bare_top1: how often a search for a tail entity's bare name finds its own article first.
    """
    tail = world.members(False)
    bearers = Counter(entity.name for entity in tail)
    found = search([entity.name for entity in tail])
    hits = [titles[0] == entity.title for entity, titles in zip(tail, found, strict=True)]
    shared = [count > 1 for count in bearers.values()]
    return {
        "types": len({entity.kind for entity in tail}),
        "relations": len(RELATIONS),
        "articles": len(world.articles),
        "shared": sum(shared) / len(shared),
        "bare_top1": sum(hits) / len(hits),
    }
