"""The texts that the nano base model is pretrained on, and its tokenizer."""

import itertools
import random
import re
from typing import Any

import pytest

from data.batches import learn_observations
from data.passages import LINE_BREAK
from data.teacher import find_evidence, write_chains
from data.trajectory import Codec, Role, Trajectory
from nano.pretraining import (
    TO_QUERY,
    TO_READ,
    Source,
    copy_titles,
    made_up_chain,
    pretraining_trajectories,
    read_passages,
    skills_at,
)
from nano.questions import draw_former_name_question, draw_questions
from nano.tokenizer import tokenizer_texts, train_tokenizer
from nano.world import COMPOSITIONS, RELATIONS, UNSEEN_COMPOSITIONS, World
from services.bm25 import BM25
from tools import library

WORLD = World(0, "train")
SEARCH = library(WORLD.passages(), 2)


@pytest.fixture(scope="module")
def nano() -> Any:
    return Codec(train_tokenizer(2048, tokenizer_texts(WORLD)))


def learned_texts(codec: Codec, trajectory: Trajectory) -> list[Any]:
    """Return the text of each run of tokens that carry loss."""
    runs = [[]]
    for token, mask in zip(trajectory.ids, trajectory.mask, strict=True):
        if mask:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [codec.decode(run).strip() for run in runs if run]


# ---- the tokenizer -------------------------------------------------------------------------------
def test_a_word_is_one_token_wherever_it_stands(nano: Any) -> None:
    """After a space, after a line break and in a title; and qualifiers are one token each.

    Guards: a passage whose title is spelled with other tokens than the query, because a line break
    stands before it.
    """
    (silver,) = nano.encode("Silver")
    assert nano.encode("x\n Silver River")[-2] == silver
    assert nano.encode("Silver River (film)")[0] == silver
    for qualifier in ("film", "band", "singer", "chef"):
        assert len(nano.encode(f"({qualifier})")) == 1


# ---- all texts -----------------------------------------------------------------------------------
@pytest.mark.parametrize("progress", [0.0, 0.09, 0.1, 0.3, 0.49, 0.5, 0.65, 0.99])
def test_the_shares_of_the_skills(progress: float) -> None:
    """At any time the shares of what is trained add up to one.

    Guards: a row whose start or end leaves a gap, or overlaps with the time after.
    """
    assert sum(skill.share for skill in skills_at(progress)) == pytest.approx(1)


def test_copying_comes_first_and_then_reading(nano: Any) -> None:
    """No text of the first tenth holds a question, and no head article comes in the first half."""
    trajectories = pretraining_trajectories(nano, [WORLD], [SEARCH], random.Random(0), 60_000)
    start = 0
    articles = 0
    for trajectory in trajectories:
        is_article = Role.THINK not in trajectory.role
        if start < 6_000:
            assert "?" not in nano.decode(trajectory.ids)
        if start < 30_000:
            assert not is_article
        articles += is_article
        start += len(trajectory.ids)
    assert articles > 5


def test_no_chain_of_action(nano: Any) -> None:
    """Of the single skills, none both searches and reads or answers after it.

    Guards: a base model that is already an agent.
    """
    rng = random.Random(0)
    trajectories = pretraining_trajectories(nano, [WORLD], [SEARCH], rng, 60_000)
    assert 60_000 <= sum(len(trajectory.ids) for trajectory in trajectories) < 62_000
    kinds = set()
    for trajectory in trajectories:
        searches = nano.search_id in trajectory.ids
        reads = nano.result_id in trajectory.ids
        answers = nano.boxed_id in trajectory.ids
        assert not (searches and (reads or answers))
        kinds.add((searches, reads, answers))
    assert kinds >= {(True, False, False), (False, True, True), (False, False, True)}


def test_observations_carry_no_loss(nano: Any) -> None:
    rng = random.Random(0)
    for trajectory in pretraining_trajectories(nano, [WORLD], [SEARCH], rng, 60_000):
        for mask, role in zip(trajectory.mask, trajectory.role, strict=True):
            assert role != Role.OBSERVATION or mask == 0


def skill_of(prompt: list[int], searches: Any) -> Any:
    """Return the skill that a prompt asks for: "query", "reading", or None for other texts."""
    if TO_QUERY not in prompt and not (TO_READ in prompt and "?" in prompt):
        return None
    return "query" if searches else "reading"


def test_queries_and_readings_after_other_facts(nano: Any) -> None:
    """The skills that a workflow puts together are learned at every fact of a question.

    What was said before is given. What is learned is the ask and its query; or the ask, what is
    read and the next ask. Guards: a workflow that can't do two hops because its model has never
    written a second query.
    """
    rng = random.Random(3)
    found = set()
    for trajectory in pretraining_trajectories(nano, [WORLD], [SEARCH], rng, 150_000):
        prompt = nano.decode(trajectory.ids).partition("<think>")[0]
        skill = skill_of(prompt, nano.search_id in trajectory.ids)
        if skill is None:
            continue
        learned = learned_texts(nano, trajectory)
        assert not any("I recall" in text for text in learned)
        ask = re.match(r"(?:.*\. )?(?P<number>\d)? ?(?P<noun>[a-z ]+) of [^?]+\?", learned[0])
        assert ask
        number = ask["number"]
        noun = ask["noun"]
        if noun == "difference":
            found.add((skill, noun))
            check_difference(skill, learned)
        else:
            found.add((skill, number))
            check_fact(skill, learned)
    places = (None, "1", "2", "3", "4", "difference")
    assert found == {(skill, place) for skill in ("query", "reading") for place in places}


def check_difference(skill: Any, learned: Any) -> None:
    ((high, low),) = re.findall(r"difference of (\d+) and (\d+)\?", learned[0])
    if skill == "query":
        assert learned[0].endswith(f"<begin_search> calculate: {high} - {low}</end_search>")
    else:
        assert learned[1].startswith(f"It is {int(high) - int(low)}.")


def check_fact(skill: Any, learned: Any) -> None:
    if skill == "query":
        assert learned[0].endswith("</end_search>")
    else:
        assert learned[1].startswith("Not found.") or " says " in learned[1]


# ---- reading -------------------------------------------------------------------------------------
@pytest.mark.parametrize("growth", [0.0, 0.2, 0.3, 0.45, 1.0])
def test_reading_says_what_the_passages_say(nano: Any, growth: float) -> None:
    """Each thought answers what was asked just before, by a passage that it names.

    It names the passage by its number and its title, or by the former name that it tells, and then
    a value that the passage holds; or it says that no passage has the title. Asks carry no loss.
    """
    rng = random.Random(0)
    sizes = []
    missing = 0
    former = 0
    for _ in range(40):
        trajectory = read_passages(nano, WORLD, rng, growth)
        passages = trajectory.observations[0].text.split(LINE_BREAK)
        assert len(passages) == 2
        sizes += [len(passage.split(".")) for passage in passages]
        learned = learned_texts(nano, trajectory)
        statements = [text for text in learned if text != "Not found."]
        missing += len(learned) - len(statements)
        assert 1 <= len(statements) <= 5
        assert len(learned) - len(statements) <= 1
        for statement in statements:
            text_before = nano.decode(trajectory.ids).partition(statement)[0]
            name, value = read_statement(statement, text_before)
            (passage,) = [passage for passage in passages if f"{name[-2:]}:" in passage]
            assert value
            assert value in passage
            has_title = passage.startswith(f"{name}:")
            assert has_title or f"once called {name[:-2]}." in passage
            former += not has_title
    assert (max(sizes) <= 3) == (growth == 0.0)
    if growth > 0.35:
        assert 10 < missing < 38
    else:
        assert missing == 0
    assert (former > 3) == (growth > 0.25)


def read_statement(statement: Any, text_before: Any) -> Any:
    """Return the passage's name with its number, and the value, that a reader states.

    Checks that its noun was asked for just before.
    """
    name, _, rest = statement.rstrip(".").partition(" says ")
    nouns = [relation.noun for relation in RELATIONS.values()]
    noun = next(noun for noun in nouns if rest.startswith(f"{noun} "))
    assert f"{noun} of" in text_before.rpartition(".")[2]
    return name, rest.removeprefix(f"{noun} ")


def test_a_former_name_is_found_when_asked_as_one() -> None:
    """The plain query finds the article in about half of the cases, the reworded nearly always."""
    search = BM25(WORLD.passages(), 2)
    rng = random.Random(0)
    questions = [draw_former_name_question(WORLD, rng) for _ in range(100)]
    lookups = [question.lookups[0] for question in questions]
    hits = [0, 0]
    for attempt in (0, 1):
        observations = search([lookup.queries[attempt] for lookup in lookups])
        for lookup, observation in zip(lookups, observations, strict=True):
            hits[attempt] += find_evidence(lookup, observation.text) != ""
    assert 30 < hits[0] < 65
    assert hits[1] > 90


def test_titles_can_only_be_copied(nano: Any) -> None:
    """The first word of each title is given; the others and its number carry loss."""
    source = Source(nano, WORLD, SEARCH, progress=0.0)
    trajectory = copy_titles(source, random.Random(1))
    lines = trajectory.observations[0].text.split(LINE_BREAK)
    numbered_titles = [line.split(":")[0] for line in lines]
    after = trajectory.ids.index(nano.end_result_id) + 1
    copies = nano.decode(trajectory.ids[after:]).split(" says")
    assert sorted(copy.strip() for copy in copies if copy) == sorted(numbered_titles)
    learned = learned_texts(nano, trajectory)
    for title in numbered_titles:
        assert title.split(" ", 1)[1] + " says" in learned


# ---- made-up chains ------------------------------------------------------------------------------
RELATION_OF_NOUN = {relation.noun: name for name, relation in RELATIONS.items()}


def test_plans_and_asks_follow_the_question(nano: Any) -> None:
    """A made-up chain plans and asks for its facts inside out, as the question nests them.

    What is recalled is given, not learned.
    """
    rng = random.Random(0)
    comparisons = 0
    for _ in range(600):
        trajectory = made_up_chain(nano, WORLD, rng)
        text = nano.decode(trajectory.ids).split("<think>")[1].strip()
        nouns = asked_nouns(text)
        asks_difference = nouns[-1] == "difference"
        assert 1 <= len(nouns) <= 4 + asks_difference
        assert text.count("I recall") == len(nouns)
        learned = learned_texts(nano, trajectory)
        plan, _, first_ask = learned[0].rpartition(". ")
        planned = re.findall(r"\d ([a-z ]+?)(?= of | \d |$)", plan)
        assert planned == (nouns if len(nouns) > 1 else [])
        asks = [first_ask, *learned[1:-1]]
        assert [learned_noun(ask) for ask in asks] == nouns
        if " is at 1" in text:
            comparisons += 1
            assert re.search(r"(First|Later) is at (\d+) (.+)\.</think>\\boxed\{ \3\}", text)
        elif not asks_difference:
            assert learned[-1].startswith("</think>")
    assert comparisons > 100


def asked_nouns(text: str) -> Any:
    """Return what a chain asks for, in order."""
    return re.findall(r"(?:^|\. )(?:\d )?\b([a-z ]+?) of [^?.]+\?", text)


def learned_noun(ask: Any) -> Any:
    """Return what an ask is about, without its number and a note before it."""
    return re.sub(r"^(at \d{4} [^.]+\. )?\d ", "", ask).split(" of ")[0]


def test_plans_never_hold_a_composition_of_evaluation(nano: Any) -> None:
    """No composition that is kept for evaluation is asked for, while many that no world has are.

    Guards: `compose` seen in pretraining.
    """
    rng = random.Random(0)
    pairs = set()
    for _ in range(600):
        trajectory = made_up_chain(nano, WORLD, rng)
        text = nano.decode(trajectory.ids).split("<think>")[1].strip()
        nouns = asked_nouns(text)
        is_comparison = " is at 1" in text or nouns[-1] == "difference"
        if not is_comparison:
            path = [RELATION_OF_NOUN[noun] for noun in nouns]
            pairs |= set(itertools.pairwise(path))
    assert not pairs & UNSEEN_COMPOSITIONS
    assert pairs - set(COMPOSITIONS)
    assert len(pairs) > 150


def test_what_is_given_is_never_learned(nano: Any) -> None:
    """SFT-3 learns the observations of a chain, but neither its prompt nor made-up facts.

    Guards: SFT-3 that learns to recall what is made up.
    """
    rng = random.Random(1)
    questions = draw_questions(WORLD, "bridge", 20, rng)
    known = {question.facts[0].id for question in questions}
    chains, _ = write_chains(nano, questions, known, SEARCH)
    trajectories = [made_up_chain(nano, WORLD, rng) for _ in range(20)]
    trajectories += [trajectory for _, trajectory in chains]
    for trajectory in trajectories:
        (learning,) = learn_observations([trajectory])
        assert learning.ids == trajectory.ids
        for role, before, after in zip(
            trajectory.role, trajectory.mask, learning.mask, strict=True
        ):
            if role == Role.PROMPT:
                assert after == 0
            assert after == (1 if role == Role.OBSERVATION else before)
