"""The nano world: a small encyclopedia, and questions on it, from a seed.

    python miniwiki.py --seed=7        # print some articles, a question of each set, and the world's measured hardness

Seven types of entity and twenty relations between them. A *head* entity is the same in every world and its article is
in the base model's pretraining text; a *tail* entity belongs to one world. Names are put together from an inventory of
words, cut into three disjoint parts (head, training, evaluation), so an evaluation world shares no tail name with any
training world, whatever the seeds: there an answer can only come from a search.

What makes it hard: names shared by several entities ("Silver River (film)", "Silver River (band)"), distractor articles
that name others, four wordings of each question in evaluation, of which training never shows one, one to four hops, comparisons, and
compositions of relations that training never shows.
"""
import random
import sys
from dataclasses import dataclass, field

from common import Problem

# ---- names: every word is common enough to be one token, so that copying a name is copying two or three tokens -------
FIRST = ("Ada Alan Amy Anna Ben Boris Carl Clara Cora Dana David Diana Edgar Ella Emma Erik Esther Eva Felix Flora Frank "
         "Fred Grace Greta Hans Hazel Henry Hugo Ida Igor Irene Ivan Jack Jane Jonas Julia Karin Kurt Laura Leo Lena Lily "
         "Lucas Mara Maria Martin Max Mila Nina Nora Olga Oscar Otto Paul Peter Petra Rita Robert Rosa Ruth Sam Sara Simon "
         "Sofia Stella Tara Thomas Tina Ursula Vera Victor Walter Wanda Yara").split()
LAST = ("Abbott Adler Archer Baker Barlow Becker Bishop Brandt Brook Burke Carver Chandler Clarke Cole Conrad Cooper Crane "
        "Dalton Draper Duncan Ellis Falk Farmer Fisher Fletcher Foster Fuller Gardner Gibson Glover Grant Hale Hammer Harper "
        "Hart Hayes Hobbs Holt Hooper Hunter Jansen Keller Kemp Kline Lambert Lang Larsen Lowe Marsh Mason Mercer Miller "
        "Moss Nash Norton Palmer Parker Payne Perry Porter Potter Quinn Reed Ritter Rowe Sawyer Sharp Shaw Slater Snow "
        "Stein Stone Sutton Tanner Thorn Turner Vance Vogel Wagner Walsh Ward Weaver Weber Webb West Winter Wolf York").split()
STEM = ("Alder Amber Ash Bell Birch Black Bram Brent Cedar Clay Clover Coal Copper Crow Dal Deer Dun East Eagle Elm Fair "
        "Fern Fox Glen Gold Green Grey Hart Hazel Heath High Holly Iron Ivy Kings Lark Lime Linden Long Maple Marble Mill "
        "Mint Moor North Oak Old Olive Otter Pearl Pine Poplar Queens Raven Red Rock Rose Salt Sand Silver South Spring "
        "Stag Star Stone Swan Thistle Vine West White Willow").split()
CITY = "Bay Bridge Castle Cross Falls Ferry Field Harbor Hill Springs Valley Wells".split()
ADJ = ("Ancient Autumn Bitter Blue Bright Broken Burning Calm Crimson Dark Distant Double Empty Endless Evening Fading Final "
       "First Foreign Forgotten Frozen Gentle Golden Hidden Hollow Hungry Invisible Last Little Lonely Lost Lucky Midnight "
       "Modern Morning Narrow Painted Paper Patient Perfect Quiet Restless Royal Sacred Secret Silent Simple Sleeping Stolen "
       "Strange Summer Sudden Tall Velvet Violet Wild Winding Wooden Yellow Young").split()
NOUN = ("Arrow Ballad Border Candle Canyon Carnival Cathedral Circus Clock Cloud Compass Corridor Crown Dance Desert Diary "
        "Door Dream Engine Feather Fire Flag Forest Garden Ghost Guitar Highway Horizon Hotel Island Journey Kingdom Ladder "
        "Lantern Letter Machine Map Mirror Moon Mountain Ocean Orchard Palace Party Piano Promise Puzzle Rain River Road "
        "Sailor Shadow Ship Signal Station Storm Story Stranger Summit Tiger Tower Train Valley Voyage Wall Whisper Window").split()
FIRM = "Bank Foods Labs Motors Press Records Shipping Steel Studios Textiles".split()
LAND = ("Aldora Bravia Cordova Delmar Estria Feronia Galdia Hestia Ilmar Jorvia Kestra Lumeria Mordia Norvia Ostria Pellia "
        "Quoria Rhodia Solvia Tervia Umbria Valdia Wendia Zandia").split()
SIDE = "Central Eastern Inner Lower New Northern Outer Southern Upper Western".split()
JOBS = ("actor architect banker biologist chef chemist dancer dentist diplomat doctor engineer geologist historian judge "
        "lawyer painter pilot poet politician sculptor singer surgeon teacher violinist").split()
MONEY = "crown dinar dollar ducat florin franc gulden koruna lira mark peso pound rand ruble rupee shilling thaler zloty".split()
TONGUE = ("Aldic Bravic Cordish Delman Estric Feran Galdic Hestic Ilmic Jorvic Kestran Lumeric Mordic Norvic Ostric Pellish "
          "Quoric Rhodic Solvic Tervic").split()

# How many of each type a world holds, and how many of those are head entities (which may only refer to head entities).
SIZES = {"person": 350, "film": 140, "novel": 120, "band": 90, "company": 80, "city": 110, "country": 40}
HEADS = {"person": 40, "film": 16, "novel": 14, "band": 10, "company": 10, "city": 18, "country": 12}
DISTRACTORS = 90
HEAD_LINK = 0.10    # a tail entity's fact points to a head entity this often
FORMER = 0.20       # share of tail people, cities, companies and bands with a former name
SHARED = 0.40       # share of tail works and people that take a name already given to another entity


@dataclass
class Relation:
    """One relation: its domain, the type of its value, the noun for it, and its wordings."""
    domain: str
    value: str
    noun: str
    questions: list     # four wordings, of which the one at `held_out` is kept for evaluation; then two that only training has
    phrases: list       # noun phrases, for the inside of a question of several hops
    sentences: list     # wordings in articles
    held_out: int = 0


def _relations():
    table = {
        "director": ("film", "person", "director", ["Who directed {x}?", "Who is the director of {x}?", "Name the director of {x}.", "By whom was {x} directed?",
                      "Which person directed {x}?", "Who was behind the camera of {x}?"],
                     ["the director of {x}", "the person who directed {x}"], ["It was directed by {v}.", "{v} directed it.", "Its director is {v}."]),
        "star": ("film", "person", "star", ["Who starred in {x}?", "Who is the star of {x}?", "Name the star of {x}.", "By whom was the main part in {x} played?",
                  "Which person starred in {x}?", "Who played the main part in {x}?"],
                 ["the star of {x}", "the person who starred in {x}"], ["It starred {v}.", "{v} played the main part.", "Its star is {v}."]),
        "film_year": ("film", "year", "release year", ["When was {x} released?", "What is the release year of {x}?", "Name the release year of {x}.", "In which year did {x} come out?",
                       "In which year was {x} released?", "Which year brought {x} to the screen?"],
                      ["the release year of {x}"], ["It was released in {v}.", "It came out in {v}.", "Its release year is {v}."]),
        "author": ("novel", "person", "author", ["Who wrote {x}?", "Who is the author of {x}?", "Name the author of {x}.", "By whom was {x} written?",
                    "Which person wrote {x}?", "From whose pen is {x}?"],
                   ["the author of {x}", "the person who wrote {x}"], ["It was written by {v}.", "{v} wrote it.", "Its author is {v}."]),
        "novel_year": ("novel", "year", "publication year", ["When was {x} published?", "What is the publication year of {x}?", "Name the publication year of {x}.", "In which year did {x} appear?",
                        "In which year was {x} published?", "Which year saw the publication of {x}?"],
                       ["the publication year of {x}"], ["It was published in {v}.", "It appeared in {v}.", "Its publication year is {v}."]),
        "band_city": ("band", "city", "home city", ["Where was {x} formed?", "What is the home city of {x}?", "Name the home city of {x}.", "In which city did {x} start?",
                       "In which city was {x} formed?", "From which city is {x}?"],
                      ["the home city of {x}", "the city where {x} was formed"], ["It was formed in {v}.", "It started in {v}.", "Its home city is {v}."]),
        "singer": ("band", "person", "lead singer", ["Who sings in {x}?", "Who is the lead singer of {x}?", "Name the lead singer of {x}.", "By whom are the songs of {x} sung?",
                    "Which person sings in {x}?", "Who sings the songs of {x}?"],
                   ["the lead singer of {x}", "the person who sings in {x}"], ["{v} sings in it.", "Its songs are sung by {v}.", "Its lead singer is {v}."]),
        "band_year": ("band", "year", "starting year", ["When was {x} formed?", "What is the starting year of {x}?", "Name the starting year of {x}.", "In which year did {x} start?",
                       "In which year was {x} formed?", "Since which year has {x} played?"],
                      ["the starting year of {x}"], ["It was formed in {v}.", "It started in {v}.", "Its starting year is {v}."]),
        "founder": ("company", "person", "founder", ["Who founded {x}?", "Who is the founder of {x}?", "Name the founder of {x}.", "By whom was {x} founded?",
                     "Which person founded {x}?", "Who opened {x}?"],
                    ["the founder of {x}", "the person who founded {x}"], ["It was founded by {v}.", "{v} founded it.", "Its founder is {v}."]),
        "seat": ("company", "city", "headquarters", ["Where is {x} based?", "What is the headquarters of {x}?", "Name the headquarters of {x}.", "In which city is {x} managed?",
                  "In which city is {x} based?", "From which city is {x} managed?"],
                 ["the headquarters of {x}", "the city where {x} is based"], ["It is based in {v}.", "It is managed from {v}.", "Its headquarters is {v}."]),
        "company_year": ("company", "year", "founding year", ["When was {x} founded?", "What is the founding year of {x}?", "Name the founding year of {x}.", "In which year did {x} open?",
                          "In which year was {x} founded?", "Since which year has {x} been open?"],
                         ["the founding year of {x}"], ["It was founded in {v}.", "It opened in {v}.", "Its founding year is {v}."]),
        "birthplace": ("person", "city", "birthplace", ["Where was {x} born?", "What is the birthplace of {x}?", "Name the birthplace of {x}.", "In which city did {x} come into the world?",
                        "In which city was {x} born?", "Which city saw the birth of {x}?"],
                       ["the birthplace of {x}", "the city where {x} was born"], ["{s} was born in {v}.", "{s} came into the world in {v}.", "{p} birthplace is {v}."]),
        "birth_year": ("person", "year", "birth year", ["When was {x} born?", "What is the birth year of {x}?", "Name the birth year of {x}.", "In which year did {x} come into the world?",
                        "In which year was {x} born?", "Which year saw the birth of {x}?"],
                       ["the birth year of {x}"], ["{s} was born in {v}.", "{s} came into the world in {v}.", "{p} birth year is {v}."]),
        "job": ("person", "job", "occupation", ["What does {x} do for a living?", "What is the occupation of {x}?", "Name the occupation of {x}.", "In which job does {x} work?",
                 "As what does {x} work?", "Which job has {x}?"],
                ["the occupation of {x}"], ["{s} is {a} {v} for a living.", "{s} works as {a} {v}.", "{p} occupation is {v}."]),
        "spouse": ("person", "person", "spouse", ["Who married {x}?", "Who is the spouse of {x}?", "Name the spouse of {x}.", "By whom was {x} married?",
                    "To whom is {x} married?", "Which person married {x}?"],
                   ["the spouse of {x}", "the person who married {x}"], ["{s} is married to {v}.", "{v} married {o}.", "{p} spouse is {v}."]),
        "country": ("city", "country", "country", ["Where does {x} lie?", "What is the country of {x}?", "Name the country of {x}.", "In which country can {x} be found?",
                     "In which country does {x} lie?", "Which country is {x} in?"],
                    ["the country of {x}", "the country where {x} lies"], ["It lies in {v}.", "It can be found in {v}.", "Its country is {v}."]),
        "mayor": ("city", "person", "mayor", ["Who governs {x}?", "Who is the mayor of {x}?", "Name the mayor of {x}.", "By whom is {x} governed?",
                   "Which person governs {x}?", "By whom is {x} run?"],
                  ["the mayor of {x}", "the person who governs {x}"], ["It is governed by {v}.", "{v} governs it.", "Its mayor is {v}."]),
        "capital": ("country", "city", "capital", ["Where does the government of {x} sit?", "What is the capital of {x}?", "Name the capital of {x}.", "In which city is {x} governed?",
                     "From which city is {x} governed?", "In which city does the government of {x} sit?"],
                    ["the capital of {x}", "the city where the government of {x} sits"], ["Its government sits in {v}.", "It is governed from {v}.", "Its capital is {v}."]),
        "currency": ("country", "money", "currency", ["What do people pay with in {x}?", "What is the currency of {x}?", "Name the currency of {x}.", "In which money does {x} pay?",
                      "With which money do people pay in {x}?", "Which money is used in {x}?"],
                     ["the currency of {x}"], ["People pay with the {v}.", "The {v} is its money.", "Its currency is the {v}."]),
        "language": ("country", "tongue", "language", ["What do people speak in {x}?", "What is the language of {x}?", "Name the language of {x}.", "In which language does {x} speak?",
                      "Which language do people speak in {x}?", "Which language is spoken in {x}?"],
                     ["the language of {x}"], ["People speak {v}.", "{v} is spoken there.", "Its language is {v}."]),
    }
    # The wording kept for evaluation differs from relation to relation, so that each of its words is met in training.
    return {name: Relation(*row, held_out=i % 4) for i, (name, row) in enumerate(table.items())}


RELATIONS = _relations()
OF_TYPE = {kind: [r for r, rel in RELATIONS.items() if rel.domain == kind] for kind in SIZES}
PAIRS = [(a, b) for a in RELATIONS for b in RELATIONS if RELATIONS[a].value == RELATIONS[b].domain]
UNSEEN_PAIRS = set(PAIRS[2::5])      # compositions that only the set `compose` holds
SETS = ("single", "typed", "bridge", "compare", "chain", "compose")


@dataclass
class Entity:
    kind: str
    name: str
    head: bool
    title: str = ""                             # the name, with a qualifier where the name is shared
    facts: dict = field(default_factory=dict)   # relation -> Entity or str
    pronoun: tuple = ("It", "Its", "it")
    former: str = ""                            # a name it once had, which only its article's text tells

    @property
    def qualifier(self):                        # what tells it from its namesakes: the job of a person, the type of all else
        return self.facts["job"] if self.kind == "person" else self.kind


def _names():
    """All names by type, shuffled once and cut into (head, training, evaluation): disjoint for every seed."""
    rng, pools = random.Random("names"), {}
    products = {"person": [f"{a} {b}" for a in FIRST for b in LAST], "city": [f"{a} {b}" for a in STEM for b in CITY],
                "work": [f"{a} {b}" for a in ADJ for b in NOUN], "company": [f"{a} {b}" for a in LAST for b in FIRM],
                "country": [f"{a} {b}" for a in SIDE for b in LAND]}
    for kind, names in products.items():
        rng.shuffle(names)
        h = 60 if kind != "country" else 12
        cut = h + (len(names) - h) * 6 // 10
        pools[kind] = {"head": names[:h], "train": names[h:cut], "eval": names[cut:]}
    return pools


POOLS = _names()


class World:
    """One encyclopedia: `articles` (title -> text), `entities`, and questions drawn from it.

    split: "train" or "eval", the part of the inventory that tail names come from. The same (seed, split) gives the same
    bytes. Article wording is part of the world; head *facts* are the same in all worlds. scale: how many times the tail
    is larger than SIZES says.
    """

    def __init__(self, seed, split, scale=1):
        self.split = split
        self.rng = random.Random(f"{split} {seed}")
        self.entities = _people_and_things(random.Random("head"), "head", HEADS)
        sizes = {k: (SIZES[k] - HEADS[k]) * scale for k in SIZES}
        self.entities += _people_and_things(self.rng, split, sizes, self.entities)
        self.by_title = {e.title: e for e in self.entities}
        self.groups = {(head, kind): [e for e in self.entities if e.head == head and kind in (None, e.kind)]
                       for head in (False, True) for kind in (None, *SIZES)}
        self.articles = {e.title: article(e, self.rng) for e in self.entities}
        self._distract(DISTRACTORS * scale)

    def _distract(self, n):
        tail = [e for e in self.entities if not e.head]
        cities = [e for e in tail if e.kind == "city"]
        for e in self.rng.sample(tail, n):
            thing = self.rng.choice(["prize", "festival", "museum"])
            city = self.rng.choice(cities).title
            self.articles[f"{e.name} {thing.title()}"] = self.rng.choice([
                f"A {thing} in {city}. It is named after {e.title}.", f"It honors {e.title}. It is a {thing} in {city}."])

    def passages(self):
        """[{"id", "contents"}]: the articles in FlashRAG's form."""
        return [{"id": str(i), "contents": f'"{title}"\n{text}'} for i, (title, text) in enumerate(self.articles.items())]

    # ---- questions ---------------------------------------------------------------------------------------------------
    def questions(self, which, n, rng, p_head=0.10, taken=None):
        """n different questions of one set, as FlashRAG rows; p_head of them start at a head entity (twice that for the
        single hops, which would else hardly touch what a base model knows). `metadata.plan` is what a chain of several
        facts begins with, `metadata.steps` what a teacher follows, one fact a step: what is asked, queries to try in
        order, the title that must turn up, the answer, what to say when it is recalled, and wordings in which to ask a
        model whether it knows this fact."""
        rows, seen, tries = [], set() if taken is None else taken, 0     # taken: question texts not to ask again; grows
        while len(rows) < n:
            tries += 1
            if tries > 1000 + 100 * n:
                raise Problem(f"this world has only about {len(rows)} different questions of the set {which!r}, not {n}; ask for fewer")
            row = getattr(self, f"_{which}")(rng, p_head)
            if row and row["question"] not in seen:
                seen.add(row["question"])
                rows.append({"id": f"{which}_{len(rows)}", **row})
        return rows

    def by_former_name(self, rng):
        """A single hop from an entity that is called by a name it once had."""
        e = rng.choice([e for e in self.entities if e.former])
        relation = rng.choice([r for r in e.facts if r != "job"])
        return row(self.wording(rng, relation, e.former), e.facts[relation], [step(e, relation, False, True)])

    def _start(self, rng, p_head, kind=None):
        return rng.choice(self.groups[rng.random() < p_head, kind])

    def wording(self, rng, relation, x):
        rel = RELATIONS[relation]
        options = range(4) if self.split == "eval" else [i for i in range(len(rel.questions)) if i != rel.held_out]
        return rel.questions[rng.choice(options)].format(x=x)

    def _single(self, rng, p_head, typed=False):
        # Training asks for each relation alike: one that is never asked for is forgotten (NOTES.md). Evaluation asks as entities come.
        if self.split == "eval":
            e = self._start(rng, 2 * p_head)
            relation = rng.choice(list(e.facts))
        else:
            relation = rng.choice(list(RELATIONS))
            e = self._start(rng, 2 * p_head, RELATIONS[relation].domain)
        return self._path(rng, e, [relation], typed) if relation in e.facts else None

    def _typed(self, rng, p_head):
        return self._single(rng, p_head, typed=True)

    def _bridge(self, rng, p_head):
        return self._walk(rng, p_head, 2, unseen=False)

    def _compose(self, rng, p_head):
        return self._walk(rng, p_head, 2, unseen=True)

    def _chain(self, rng, p_head):
        return self._walk(rng, p_head, rng.choice([3, 3, 4]), unseen=False)

    def _walk(self, rng, p_head, hops, unseen):
        start = e = self._start(rng, p_head)
        path = []
        for i in range(hops):
            options = [r for r, v in e.facts.items() if (i == hops - 1 or isinstance(v, Entity))
                       and (i == 0 or ((path[-1], r) in UNSEEN_PAIRS) == unseen)]
            if not options:
                return None
            path.append(rng.choice(options))
            e = e.facts[path[-1]]
        return self._path(rng, start, path)

    def _path(self, rng, start, path, typed=False):
        # A shared name is always told apart for people (a job is not implied by a relation), else in half of the cases.
        shared = start.title != start.name
        former = bool(start.former) and rng.random() < 0.6
        typed = not former and (typed or (shared and (start.kind == "person" or rng.random() < 0.5)))
        x, e, steps = mention(start, typed, former), start, []
        for i, r in enumerate(path):
            if r == "job" and (e.title != e.name or (i == 0 and typed)):
                return None                     # the way to tell this person from others would give the answer away
            steps.append(step(e, r, typed if i == 0 else e.title != e.name, former and i == 0))
            if i < len(path) - 1:
                x = rng.choice(RELATIONS[r].phrases).format(x=x)
            e = e.facts[r]
        return row(self.wording(rng, path[-1], x), e, steps)

    def _compare(self, rng, p_head):
        kind, relation, verb, forms = rng.choice(COMPARISONS)
        bridge = rng.choice([None, None, "director", "author", "singer", "founder"]) if kind == "person" else None
        first_kind = RELATIONS[bridge].domain if bridge else kind
        a, b = (self._start(rng, p_head, first_kind) for _ in range(2))
        steps, years = [], []
        for e in (a, b):
            typed_e = e.title != e.name
            subject = e
            if bridge:
                steps.append(step(e, bridge, typed_e))
                subject = e.facts[bridge]
                typed_e = subject.title != subject.name
            steps.append(step(subject, relation, typed_e))
            years.append(subject.facts[relation])
            steps[-1]["note"] = f"at {years[-1]} {e.name}."
        if a is b or years[0] == years[1] or a.name == b.name:
            return None
        early = rng.random() < 0.5
        form = rng.choice(forms[0 if early else 1])
        if bridge:
            form = rng.choice([["Which {k} has the {n} who was born first, {a} or {b}?",
                                "Of {a} and {b}, which has the {n} with the earlier birth year?"],
                               ["Which {k} has the {n} who was born later, {a} or {b}?",
                                "Of {a} and {b}, which has the {n} with the later birth year?"]][not early])
            form = form.replace("{k}", first_kind).replace("{n}", RELATIONS[bridge].noun)
        winner = (a, b)[(years[0] < years[1]) != early]
        said = [mention(e, e.title != e.name) for e in (a, b)]
        if rng.random() < APART:
            noun = RELATIONS[relation].noun
            said = [f"the {RELATIONS[bridge].noun} of {x}" if bridge else x for x in said]
            form = rng.choice([f"How many years {'after' if years[0] < years[1] else 'before'} {{a}} {verb}?",
                               f"How many years lie between the {noun} of {{a}} and the {noun} of {{b}}?"])
            return row(form.format(a=said[0], b=said[1]), difference(years)["answer"], steps + [difference(years)], parts=2)
        return row(form.format(a=said[0], b=said[1]), winner, steps, conclude(years, (a, b), early), parts=2)


APART = 0.4     # of comparisons ask how many years lie between
COMPARISONS = [
    ("person", "birth_year", "was {b} born", [["Who was born first, {a} or {b}?", "Of {a} and {b}, who has the earlier birth year?"],
                              ["Who was born later, {a} or {b}?", "Of {a} and {b}, who has the later birth year?"]]),
    ("film", "film_year", "did {b} come out", [["Which came out first, {a} or {b}?", "Of {a} and {b}, which has the earlier release year?"],
                           ["Which came out later, {a} or {b}?", "Of {a} and {b}, which has the later release year?"]]),
    ("novel", "novel_year", "did {b} appear", [["Which appeared first, {a} or {b}?", "Of {a} and {b}, which has the earlier publication year?"],
                             ["Which appeared later, {a} or {b}?", "Of {a} and {b}, which has the later publication year?"]]),
    ("company", "company_year", "was {b} founded", [["Which was founded first, {a} or {b}?", "Of {a} and {b}, which has the earlier founding year?"],
                                 ["Which was founded later, {a} or {b}?", "Of {a} and {b}, which has the later founding year?"]]),
]


DIFFERENCE = "difference"      # the noun of a step that is no fact of the world, but a calculation


def mention(e, typed, former=False):
    """How a question names an entity: "Silver River", or "the film Silver River" where it is told apart, or a former name."""
    if former:
        return e.former
    return f"the {e.qualifier} {e.name}" if typed else e.name


def step(e, relation, typed, former=False):
    """One fact of a question. Queries: what the question's own words suggest, then what to try when that misses: a name
    that no article has for its title is a former one; else the type tells namesakes apart. `called` is how a reader names the passage: by
    its title, or by the former name that was asked for. `note`: what to say when all is known of one of two things that are compared."""
    value = e.facts[relation]
    answer = value.title if isinstance(value, Entity) else value
    rel, full = RELATIONS[relation], f"{e.name} {e.qualifier}"
    reword = f"once called {e.former}" if former else f"{full} {rel.noun}" if typed else full
    asked = [w for i, w in enumerate(rel.questions[:4]) if i != rel.held_out]
    return {"ask": f"{rel.noun} of {mention(e, typed, former)}?", "noun": rel.noun, "note": "",
            "title": e.title, "called": e.former if former else e.title, "head": e.head,
            "queries": [full if typed else mention(e, False, former), reword],
            "recall": f"I recall {answer}.", "answer": answer, "answers": [answer],
            "subject": e.former if former else e.name, "fact": f"{e.title}|{relation}",
            "wordings": [w.format(x=mention(e, e.title != e.name)) for w in asked]}


def difference(years):
    """The last step of a question that asks how many years lie between: one for the calculator.
    Like a fact it can be recalled, or looked up."""
    low, high = sorted(years)
    answer = str(int(high) - int(low))
    return {"ask": f"difference of {high} and {low}?", "noun": DIFFERENCE, "note": "",
            "title": answer, "called": "", "head": False, "queries": [f"calculate: {high} - {low}"],
            "recall": f"I recall {answer}.", "answer": answer, "answers": [answer],
            "subject": "calculate", "fact": f"{high} - {low}",
            "wordings": [f"What is the difference of {high} and {low}?", f"How many years lie between {low} and {high}?",
                         f"How many years after {low} was {high}?"]}


def conclude(years, things, early):
    """How a comparison ends: which thing is the first or the later, by its name in the question. "at" stands before a year only where
    the name follows it: the end is found by a match with the note, not with a passage that says the year."""
    low, high = sorted(years)
    word, year = ("First", low) if early else ("Later", high)
    return f"{low} is before {high}. {word} is at {year} {things[years.index(year)].name}."


def outline(asks, parts=1):
    """What is asked, fact by fact -> (the plan that a chain of several facts begins with, the same asks with their numbers in it).
    A plan names what the question names: where each of its `parts` starts. A single fact needs none.

    >>> outline(["director of Lost Story?", "birth year of Eva Moss?"])
    ('1 director of Lost Story 2 birth year.', ['1 director of Lost Story?', '2 birth year of Eva Moss?'])
    """
    if len(asks) == 1:
        return "", asks
    starts = [i * (len(asks) // parts) for i in range(parts)]
    items = [ask[:-1] if i in starts else ask.partition(" of ")[0] for i, ask in enumerate(asks)]
    return " ".join(f"{n} {item}" for n, item in enumerate(items, 1)) + ".", [f"{n} {ask}" for n, ask in enumerate(asks, 1)]


def row(question, answer, steps, conclusion="", parts=1):
    golden = [answer] if isinstance(answer, str) else list(dict.fromkeys([answer.name, answer.title]))
    plan, asks = outline([s["ask"] for s in steps], parts)
    return {"question": question[0].upper() + question[1:], "golden_answers": golden,
            "metadata": {"plan": plan, "steps": [dict(s, ask=ask) for s, ask in zip(steps, asks)], "conclusion": conclusion}}


def article(e, rng, relations=None):
    """One article: what it is, then each fact (or only those of `relations`) in one of its wordings, in any order."""
    s, p, o = e.pronoun
    lines = []
    for r in e.facts if relations is None else relations:
        v = e.facts[r]
        value = v.title if isinstance(v, Entity) else v
        lines.append(rng.choice(RELATIONS[r].sentences).format(
            v=value, s=s, p=p, o=o, a="an" if value[0] in "aeiou" else "a"))
    if e.former and relations is None:
        lines.append(f"{s} was once called {e.former}.")
    rng.shuffle(lines)
    return " ".join(([] if e.kind == "person" else [f"A {e.kind}."]) + lines)


def _people_and_things(rng, split, sizes, head=None):
    """The entities of one part of the world, with names, facts and titles. head: what the tail may point to."""
    pools = {k: rng.sample(v[split], len(v[split])) for k, v in POOLS.items()}
    made, used = {k: [] for k in sizes}, {"work": [], "person": []}
    for kind, n in sizes.items():
        pool = "work" if kind in ("film", "novel", "band") else kind
        for i in range(n):
            share = head is not None and used.get(pool) and rng.random() < SHARED
            name = rng.choice(used[pool]) if share else pools[pool].pop()
            if share and kind != "person" and any(e.name == name for e in made[kind]):
                share, name = False, pools[pool].pop()      # two films of one name could not be told apart by their type
            if share and rng.random() < 0.7:
                used[pool].remove(name)                     # two or three bear it, rarely more
            elif not share and pool in used:
                used[pool].append(name)
            made[kind].append(Entity(kind, name, head is None, pronoun=rng.choice([("He", "His", "him"), ("She", "Her", "her")])
                              if kind == "person" else ("It", "Its", "it")))

    def pick(kind):
        if head is not None and rng.random() < HEAD_LINK:
            return rng.choice([e for e in head if e.kind == kind])
        return rng.choice(made[kind])

    values = {"year": lambda: str(rng.randint(1900, 1999)), "job": lambda: rng.choice(JOBS),
              "money": lambda: rng.choice(MONEY), "tongue": lambda: rng.choice(TONGUE)}
    for kind, members in made.items():
        for e in members:
            for r in OF_TYPE[kind]:
                if r != "spouse":
                    e.facts[r] = values[RELATIONS[r].value]() if RELATIONS[r].value in values else pick(RELATIONS[r].value)
    jobs = {}
    for e in made["person"]:                    # namesakes have different jobs
        while e.facts["job"] in jobs.setdefault(e.name, []):
            e.facts["job"] = rng.choice(JOBS)
        jobs[e.name].append(e.facts["job"])
    singles = rng.sample(made["person"], len(made["person"]))
    for a, b in zip(singles[0::2], singles[1::2]):
        if rng.random() < 0.7:
            a.facts["spouse"], b.facts["spouse"] = b, a
    for kind in ("person", "city", "company", "band") if head is not None else ():
        for e in made[kind]:
            if rng.random() < FORMER:
                e.former = pools["work" if kind == "band" else kind].pop()
    everyone = [e for members in made.values() for e in members]
    count = {}
    for e in everyone:
        count[e.name] = count.get(e.name, 0) + 1
    for e in everyone:
        e.title = f"{e.name} ({e.qualifier})" if count[e.name] > 1 else e.name
    return everyone


def hardness(world, search):
    """What makes a world hard, measured. search: list of queries -> list of lists of titles, best first.

    Returns entity types, relations, articles, `shared` (share of tail names that several entities bear) and `bare_top1`
    (how often a search for an entity's bare name puts its own article first).
    """
    tail = [e for e in world.entities if not e.head]
    count = {}
    for e in tail:
        count[e.name] = count.get(e.name, 0) + 1
    hits = [titles[0] == e.title for e, titles in zip(tail, search([e.name for e in tail]))]
    return {"types": len({e.kind for e in tail}), "relations": len(RELATIONS), "articles": len(world.articles),
            "shared": sum(c > 1 for c in count.values()) / len(count), "bare_top1": sum(hits) / len(hits)}


if __name__ == "__main__":
    from tools import BM25
    text = (sys.argv[1:] or ["--seed=0"])[0].removeprefix("--seed=")
    if not text.isdecimal():
        print("usage: python miniwiki.py --seed=N; shows articles and questions of that seed's evaluation world [0]", file=sys.stderr)
        sys.exit(2)
    seed = int(text)
    world = World(seed, "eval")
    for title in list(world.articles)[120:900:130]:
        print(f"{title}\n    {world.articles[title]}")
    for name in SETS:
        q = world.questions(name, 1, random.Random(seed))[0]
        print(f"\n{name}: {q['question']} -> {q['golden_answers'][0]}")
        for s in q["metadata"]["steps"]:
            print(f"    {s['ask']} search: {s['queries'][0]} -> {s['answer']}")
    print(hardness(world, BM25(world.passages(), top_k=2).titles))
