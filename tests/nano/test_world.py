"""The nano world: the same bytes from a seed, apart in training and evaluation, and hard."""

import itertools
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here

from common.errors import UserError
from common.settings import TaskSettings
from nano.questions import SETS, draw_questions
from nano.world import (
    COMPOSITIONS,
    RELATIONS,
    RELATIONS_OF_TYPE,
    UNSEEN_COMPOSITIONS,
    Entity,
    World,
    measure_hardness,
    value_text,
)
from services.bm25 import BM25
from tools import calculate

SCALE = TaskSettings().train_scale
TRAINING = [
    World(0, "train", SCALE),
    World(1, "train"),
    World(1000, "train"),
    World(1001, "train"),
]
EVALUATION = [World(seed, "eval") for seed in (0, 1, 2)]
EVALUATION_IDS = ["seed 0", "seed 1", "seed 2"]
PRONOUNS = [("It", "Its", "it"), ("He", "His", "him"), ("She", "Her", "her")]


def draw_sets(world: Any, set_names: Any, count: Any, head_share: float = 0.10) -> dict[Any, Any]:
    return {
        name: draw_questions(world, name, count, random.Random(f"{name} of a test"), head_share)
        for name in set_names
    }


EVALUATION_SETS = [draw_sets(world, SETS, 150) for world in EVALUATION]
TRAINING_SETS = [
    draw_sets(world, SETS[:-1], 300, head_share)
    for world, head_share in zip(TRAINING, (0.1, 1.0, 0.1, 1.0), strict=True)
]
WORLDS_AND_SETS = [
    *zip(EVALUATION, EVALUATION_SETS, strict=True),
    *zip(TRAINING, TRAINING_SETS, strict=True),
]


def all_questions(sets: Any) -> list[Any]:
    return [question for questions in sets.values() for question in questions]


def world_facts(question: str) -> list[Any]:
    """Return the facts of a question that stand in articles: all but a calculation."""
    return [fact for fact in question.facts if fact.lookups[0].tool == "search"]


def asks_difference(question: str) -> bool:
    return len(world_facts(question)) < len(question.facts)


def title_of(fact: Any) -> Any:
    return fact.lookups[0].title


def relation_of(fact: Any) -> Any:
    return fact.id.rsplit("|", 1)[1]


def years_of(facts: Any) -> list[Any]:
    return [int(fact.answers[0]) for fact in facts if fact.answers[0].isdigit()]


# ---- from a seed ---------------------------------------------------------------------------------
DIGEST = """
import dataclasses, hashlib, json, random, sys
from nano.questions import SETS, draw_questions
from nano.world import World
world = World(int(sys.argv[1]), "eval")
sets = [draw_questions(world, name, 40, random.Random(5)) for name in SETS]
rows = [[dataclasses.asdict(question) for question in questions] for questions in sets]
text = json.dumps([world.articles, world.passages(), rows])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def digest(seed: int, hash_seed: Any) -> Any:
    """Return a hash of a world's articles and questions, made by another process."""
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, str(seed)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )
    return done.stdout


def test_the_same_bytes_from_a_seed() -> None:
    """Articles and questions, in processes that hash texts differently.

    Guards: an order that comes from a set.
    """
    assert digest(3, 1) == digest(3, 2) == digest(3, 77)


def test_another_seed_another_world() -> None:
    assert len({digest(seed, 0) for seed in range(3)}) == 3
    first, second = EVALUATION[:2]
    same_articles = set(first.articles.values()) & set(second.articles.values())
    assert len(same_articles) < 0.2 * len(first.articles)


def test_scale() -> None:
    """The training world is so many times as large, all of it tail, and as hard to tell apart."""
    large, small = TRAINING[:2]
    assert len(large.members(True)) == len(small.members(True))
    assert len(large.members(False)) == SCALE * len(small.members(False))
    assert len({entity.title for entity in large.entities}) == len(large.entities)


# ---- apart ---------------------------------------------------------------------------------------
def tail_names(world: Any) -> Any:
    tail = world.members(False)
    former_names = {entity.former_name for entity in tail if entity.former_name}
    return {entity.name for entity in tail} | former_names


def test_evaluation_shares_no_tail_name_with_training() -> None:
    """Names, former names and titles, over all types and seeds.

    Guards: an answer that can be learned by heart.
    """
    training_names = set().union(*map(tail_names, TRAINING))
    heads = {entity.name for entity in EVALUATION[0].members(True)}
    training_titles = {title for world in TRAINING for title in world.articles} - heads
    for world in EVALUATION:
        assert len(tail_names(world)) > 500
        assert not tail_names(world) & (training_names | heads)
        assert not (set(world.articles) - heads) & training_titles


def head_facts(world: Any) -> dict[Any, Any]:
    return {
        (entity.title, relation): value_text(value)
        for entity in world.members(True)
        for relation, value in entity.facts.items()
    }


def test_head_facts_are_the_same_everywhere() -> None:
    """What the base model read is true in every world, and leads to head entities only."""
    for world in TRAINING + EVALUATION:
        assert head_facts(world) == head_facts(TRAINING[0])
    for entity in TRAINING[0].members(True):
        for value in entity.facts.values():
            assert not isinstance(value, Entity) or value.is_head


def compositions(question: str) -> Any:
    """Return pairs of relations of which the second is asked of the first's value."""
    return {
        (relation_of(first), relation_of(second))
        for first, second in itertools.pairwise(question.facts)
        if title_of(second) == first.answers[0]
    }


def test_compose_holds_what_training_never_composes() -> None:
    """Each `compose` question is an unseen composition; no training question holds one."""
    assert set(COMPOSITIONS) > UNSEEN_COMPOSITIONS
    assert len(UNSEEN_COMPOSITIONS) >= 5
    for sets in EVALUATION_SETS:
        found = [compositions(question) for question in sets["compose"]]
        assert all(pairs and pairs <= UNSEEN_COMPOSITIONS for pairs in found)
        assert len(set().union(*found)) >= 5
    for sets in TRAINING_SETS:
        found = set().union(*map(compositions, all_questions(sets)))
        assert len(found) >= 20
        assert not found & UNSEEN_COMPOSITIONS


def has_wording(text: str, wording: Any) -> bool:
    """Whether a question has this wording, whatever it asks about."""
    return re.fullmatch("(.+)".join(map(re.escape, wording.split("{x}"))), text) is not None


def used_wordings(sets: Any) -> Any:
    """Return (relation, wording) of the questions that end with one relation."""
    found = set()
    for name in ("single", "typed", "bridge", "chain"):
        for question in sets[name]:
            relation = relation_of(world_facts(question)[-1])
            wordings = RELATIONS[relation].questions + RELATIONS[relation].training_questions
            for wording in wordings:
                if has_wording(question.question, wording):
                    found.add((relation, wording))
    return found


def test_one_wording_is_kept_for_evaluation() -> None:
    """Training never asks for a relation in its kept wording; evaluation uses the first four."""
    held_out = {(name, relation.held_out) for name, relation in RELATIONS.items()}
    for_evaluation = {
        (name, wording) for name, relation in RELATIONS.items() for wording in relation.questions
    }
    only_for_training = {
        (name, wording)
        for name, relation in RELATIONS.items()
        for wording in relation.training_questions
    }
    assert len(held_out) == len(RELATIONS)
    assert len(for_evaluation) == 4 * len(RELATIONS)
    assert len(only_for_training) == 2 * len(RELATIONS)
    assert set().union(*map(used_wordings, EVALUATION_SETS)) == for_evaluation
    in_training = set().union(*map(used_wordings, TRAINING_SETS))
    assert in_training == (for_evaluation | only_for_training) - held_out


def test_the_base_model_is_not_asked_in_the_kept_wording() -> None:
    for sets in TRAINING_SETS + EVALUATION_SETS:
        for question in all_questions(sets):
            for fact in world_facts(question):
                held_out = RELATIONS[relation_of(fact)].held_out
                assert not any(has_wording(wording, held_out) for wording in fact.wordings)


# ---- hard ----------------------------------------------------------------------------------------
def test_types_relations_and_wordings() -> None:
    """At least 6 types, 12 relations, and 3 wordings in articles and (one more kept) in questions.

    Each wording of an article is really used.
    """
    assert len(RELATIONS_OF_TYPE) >= 6
    assert all(RELATIONS_OF_TYPE.values())
    assert len(RELATIONS) >= 12
    text = " ".join(EVALUATION[0].articles.values())
    patterns = {
        "value": r"[^.]+",
        "He": "(He|She)",
        "His": "(His|Her)",
        "him": "(him|her)",
        "a": "an?",
    }
    for name, relation in RELATIONS.items():
        assert len(set(relation.sentences)) >= 3
        assert len(set(relation.questions)) >= 4
        assert relation.held_out in relation.questions
        for sentence in relation.sentences:
            pattern = re.escape(sentence)
            for slot, values in patterns.items():
                pattern = pattern.replace(re.escape("{" + slot + "}"), values)
            assert re.search(pattern, text), (name, sentence)


@pytest.mark.parametrize("world", EVALUATION, ids=EVALUATION_IDS)
def test_hardness(world: Any) -> None:
    """Counted by hand: articles, shared names, and how often a bare name finds its article."""
    assert len(world.articles) >= 1000
    tail = [entity for entity in world.entities if not entity.is_head]
    assert len({entity.kind for entity in tail}) >= 6
    assert len({relation for entity in tail for relation in entity.facts}) >= 12
    bearers = Counter(entity.name for entity in tail)
    shared = sum(count > 1 for count in bearers.values()) / len(bearers)
    assert shared >= 0.15
    found = BM25(world.passages(), top_k=1).titles([entity.name for entity in tail])
    hits = [titles[0] == entity.title for titles, entity in zip(found, tail, strict=True)]
    bare_top1 = sum(hits) / len(tail)
    assert bare_top1 <= 0.85
    assert measure_hardness(world, BM25(world.passages(), top_k=2).titles) == {
        "types": len(RELATIONS_OF_TYPE),
        "relations": len(RELATIONS),
        "articles": len(world.articles),
        "shared": pytest.approx(shared),
        "bare_top1": pytest.approx(bare_top1),
    }


@pytest.mark.parametrize("sets", EVALUATION_SETS, ids=EVALUATION_IDS)
def test_half_of_the_questions_need_two_unknown_facts(sets: Any) -> None:
    """Over all six sets; facts of tail entities are those that no model can know."""
    unknown_facts = [
        len({fact.id for fact in world_facts(question) if not fact.head})
        for question in all_questions(sets)
    ]
    assert len(unknown_facts) == 900
    assert sum(count >= 2 for count in unknown_facts) >= 0.5 * len(unknown_facts)
    # Some need none, so that there is something to learn about when to act.
    assert unknown_facts.count(0) > 20


# ---- right ---------------------------------------------------------------------------------------
def spellings(fact: Any) -> list[Any]:
    """Return all sentences in which an article may tell a fact."""
    return [
        sentence.format(value=fact.answers[0], He=subject, His=possessive, him=object_, a=article)
        for sentence in RELATIONS[relation_of(fact)].sentences
        for subject, possessive, object_ in PRONOUNS
        for article in ("a", "an")
    ]


@pytest.mark.parametrize("world, sets", WORLDS_AND_SETS)
def test_every_fact_is_written_in_its_article(world: Any, sets: Any) -> None:
    """A fact stands in the article that it names, in one of its relation's wordings."""
    for question in all_questions(sets):
        for fact in world_facts(question):
            article = world.articles[title_of(fact)]
            assert any(sentence in article for sentence in spellings(fact))
            assert len(fact.answers) == 1
            assert fact.answers[0] in fact.recall


@pytest.mark.parametrize("world, sets", WORLDS_AND_SETS)
def test_facts_lead_to_the_golden_answer(world: Any, sets: Any) -> None:
    """The last answer, the winner of a comparison or what lies between is golden."""
    for question in all_questions(sets):
        facts = world_facts(question)
        if asks_difference(question):
            first, second = years_of(facts)
            assert question.golden_answers == [str(abs(first - second))]
        elif question.conclusion:
            assert any(answer in world.by_title for answer in question.golden_answers)
            assert question.golden_answers[0] in question.question
        else:
            assert facts[-1].answers[0] in question.golden_answers
            answers = [fact.answers[0] for fact in facts[:-1]]
            assert answers == [title_of(fact) for fact in facts[1:]]


@pytest.mark.parametrize("world, sets", WORLDS_AND_SETS)
def test_what_a_teacher_and_an_oracle_need(world: Any, sets: Any) -> None:
    """A chain teaches the conclusion's name or the title read; gold are all titles looked up."""
    for question in all_questions(sets):
        if question.conclusion:
            assert question.conclusion.endswith(f" {question.taught_answer}.")
        else:
            assert question.taught_answer == question.facts[-1].answers[0]
        assert question.taught_answer in question.golden_answers
        assert question.gold_titles == [title_of(fact) for fact in world_facts(question)]
        assert set(question.gold_titles) <= set(world.articles)


@pytest.mark.parametrize(
    "world, sets", zip(EVALUATION, EVALUATION_SETS, strict=True), ids=EVALUATION_IDS
)
def test_a_question_means_one_thing(world: Any, sets: Any) -> None:
    """It says which entity it means, of those that share a name and have what is asked for."""
    told_apart = 0
    for question in all_questions(sets):
        fact = question.facts[0]
        entity = world.by_title[title_of(fact)]
        namesakes = [
            other
            for other in world.entities
            if other.name == entity.name and relation_of(fact) in other.facts
        ]
        assert len({other.qualifier for other in namesakes}) == len(namesakes)
        if len(namesakes) == 1:
            continue
        told_apart += 1
        mention = f"the {entity.qualifier} {entity.name}".lower()
        by_former_name = entity.former_name and entity.former_name in question.question
        assert by_former_name or mention in question.question.lower()
    assert told_apart > 10


# ---- comparisons ---------------------------------------------------------------------------------
def compared_titles(question: str) -> Any:
    """Return the titles of the two things that a question compares."""
    facts = world_facts(question)
    return title_of(facts[0]), title_of(facts[len(facts) // 2])


def test_comparisons_by_hand() -> None:
    """The winner is worked out again from the years and the words of the question."""
    questions = [question for question in EVALUATION_SETS[0]["compare"] if question.conclusion]
    for question in questions:
        years = years_of(question.facts)
        assert len(years) == 2
        assert years[0] != years[1]
        early = re.search(r"\b(first|earlier)\b", question.question) is not None
        assert early != (re.search(r"\blater\b", question.question) is not None)
        titles = compared_titles(question)
        year = min(years) if early else max(years)
        winner = titles[years.index(year)]
        assert winner in question.golden_answers
        names = [title.split(" (")[0] for title in titles]
        assert names[0] != names[1]
        winner_name = winner.split(" (")[0]
        assert question.golden_answers[0] == winner_name
        notes = [fact.note for fact in question.facts if fact.answers[0].isdigit()]
        assert notes == [f"at {years[0]} {names[0]}.", f"at {years[1]} {names[1]}."]
        statement = f"{'First' if early else 'Later'} is at {year} {winner_name}."
        assert question.conclusion == f"{min(years)} is before {max(years)}. {statement}"
    assert {len(question.facts) for question in questions} == {2, 4}


@pytest.mark.parametrize("sets", [EVALUATION_SETS[0], TRAINING_SETS[0]], ids=["eval", "train"])
def test_how_often_a_difference_is_asked(sets: Any) -> None:
    """Two in five comparisons ask it, in all three forms."""
    questions = [question for question in sets["compare"] if asks_difference(question)]
    assert 0.3 < len(questions) / len(sets["compare"]) < 0.5
    assert {difference_form(question) for question in questions} == {
        "after",
        "before",
        "lie between",
    }


def difference_form(question: str) -> Any:
    (form,) = re.findall("^How many years (after|before|lie between)", question.question)
    return form


@pytest.mark.parametrize("sets", [EVALUATION_SETS[0], TRAINING_SETS[0]], ids=["eval", "train"])
def test_differences_by_hand(sets: Any) -> None:
    """Of "How many years after A was B founded?", A is the older one.

    The years stand in the notes of the facts, and the last look-up is for the calculator. The plan
    says nothing of what it is asked.
    """
    for question in filter(asks_difference, sets["compare"]):
        *facts, last = question.facts
        years = years_of(facts)
        # The two things, in the order in which they are named.
        subjects = [facts[0].lookups[0].subject, facts[len(facts) // 2].lookups[0].subject]
        positions = [question.question.find(subject) for subject in subjects]
        assert 0 < positions[0] < positions[1]
        noted_names = [fact.note.split(" ", 2)[2] for fact in facts if fact.note]
        assert noted_names == [f"{subject}." for subject in subjects]
        if difference_form(question) != "lie between":
            assert (difference_form(question) == "after") == (years[0] < years[1])
        high, low = max(years), min(years)
        assert last.lookups[0].tool == "calculate"
        assert last.lookups[0].queries == [f"calculate: {high} - {low}"]
        assert last.lookups[0].statement == f"It is {last.answers[0]}."
        assert calculate([f"{high} - {low}"])[0].text == last.answers[0]
        assert last.answers == question.golden_answers
        number = len(facts) + 1
        assert last.ask == f"{number} difference of {high} and {low}?"
        assert question.plan.endswith(f" {number} difference.")


# ---- plans and sets ------------------------------------------------------------------------------
def plan_items(question: str) -> Any:
    """Return the items of a plan without their numbers, and without a difference at the end."""
    number = len(world_facts(question)) + 1
    plan = question.plan.rstrip(".").removesuffix(f" {number} difference")
    return re.split(r"(?:^| )\d ", plan)[1:]


def test_a_plan_names_each_fact_and_what_the_question_names() -> None:
    """It says "1 director of Lost Story 2 birth year." before the asks of those numbers.

    A single fact has no plan. Guards: an answer that slips into a plan, which a reader could then
    read off instead of searching.
    """
    for question in all_questions(EVALUATION_SETS[0]):
        facts = world_facts(question)
        if len(facts) == 1:
            assert question.plan == ""
            assert not facts[0].ask[0].isdigit()
            continue
        items = plan_items(question)
        nouns = [RELATIONS[relation_of(fact)].noun for fact in facts]
        assert [item.split(" of ")[0] for item in items] == nouns
        named = [index for index, item in enumerate(items) if " of " in item]
        is_comparison = question.conclusion or asks_difference(question)
        assert named == ([0, len(facts) // 2] if is_comparison else [0])
        for index in named:
            assert items[index].split(" of ")[1].lower() in question.question.lower()
        asks = [fact.ask.split(" of ")[0] for fact in facts]
        assert asks == [f"{number} {noun}" for number, noun in enumerate(nouns, 1)]
        assert not any(fact.answers[0] in question.plan for fact in facts)


def test_training_asks_for_every_relation() -> None:
    """Guards: SFT forgets how to read a relation that its questions hardly ever ask for.

    Those of countries are such relations, since there are few countries.
    """
    world = World(5, "train", scale=4)
    questions = draw_questions(world, "single", 1000, random.Random(0))
    count = Counter(relation_of(question.facts[0]) for question in questions)
    assert set(count) == set(RELATIONS)
    assert min(count.values()) >= 15


def test_sets_have_their_hops() -> None:
    """One fact; two; two or four (compared); three or four; two, unseen."""
    hops_of_set = {
        "single": {1},
        "typed": {1},
        "bridge": {2},
        "compare": {2, 4},
        "chain": {3, 4},
        "compose": {2},
    }
    for sets in EVALUATION_SETS + TRAINING_SETS:
        for name, questions in sets.items():
            hops = {len(world_facts(question)) for question in questions}
            assert hops == hops_of_set[name]
        texts = [question.question for question in all_questions(sets)]
        assert len(set(texts)) >= 0.98 * len(texts)


def test_more_questions_than_there_are() -> None:
    """Guards: the generator looks for ever for a question that it has not asked yet."""
    message = "different questions of the set 'single', not 2000"
    with pytest.raises(UserError, match=message):
        draw_questions(World(0, "train"), "single", 2000, random.Random(0), head_share=1.0)


# ---- the command ---------------------------------------------------------------------------------
def test_a_world_is_shown(tmp_path: Path) -> None:
    done = run_here(tmp_path, "nano.show", "--seed=3")
    assert done.status == 0, done.err
    world = World(3, "eval")
    assert list(world.articles)[120] in done.out
    assert all(f"\n{name}: " in done.out for name in SETS)
    assert "'bare_top1': 0." in done.out
