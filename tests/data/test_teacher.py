"""The scripted teacher and the pairs of SFT-1: on the nano world, and on real questions."""

import itertools
import random
from typing import Any

import pytest

from data.flashrag import whole_fact
from data.pairs import contrastive_pairs, pairs_in_direction
from data.questions import Lookup, Question, facts_by_id
from data.teacher import (
    NOT_FOUND,
    TeachingCounts,
    find_evidence,
    recall_chain,
    spell_from,
    write_chains,
)
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from nano.questions import draw_questions
from nano.tokenizer import tokenizer_texts, train_tokenizer
from nano.world import World
from tools import library

WORLD = World(0, "train")
SEARCH = library(WORLD.passages(), 2)
QUESTIONS = [
    question
    for name in ("single", "typed", "bridge", "compare", "chain")
    for question in draw_questions(WORLD, name, 80, random.Random(name))
]
FACTS = facts_by_id(QUESTIONS)
KNOWN = set(random.Random(0).sample(sorted(FACTS), len(FACTS) // 2))


@pytest.fixture(scope="module")
def nano() -> Any:
    return Codec(train_tokenizer(2048, tokenizer_texts(WORLD)))


def segments(codec: Codec, trajectory: Trajectory) -> Any:
    """Return (role, text) of the runs of one role after the prompt."""
    found = []
    tokens = zip(trajectory.ids, trajectory.role, strict=True)
    for role, run in itertools.groupby(tokens, key=lambda token: token[1]):
        if role != Role.PROMPT:
            found.append((role, codec.decode([token for token, _ in run]).strip()))
    return found


def segment_texts(codec: Codec, trajectory: Trajectory) -> list[Any]:
    """Return the texts of the runs of one role after the prompt."""
    return [text for _, text in segments(codec, trajectory)]


def learned_texts(codec: Codec, trajectory: Trajectory) -> list[Any]:
    """Return the text of each run of tokens that carry loss."""
    tokens = zip(trajectory.ids, trajectory.mask, strict=True)
    return [
        codec.decode([token for token, _ in run]).strip()
        for mask, run in itertools.groupby(tokens, key=lambda token: token[1])
        if mask
    ]


def observation_texts(trajectory: Trajectory) -> list[Any]:
    """Return the texts of a trajectory's observations."""
    return [observation.text for observation in trajectory.observations]


# ---- the teacher on the nano world ---------------------------------------------------------------
def test_chains_replay(nano: Any) -> None:
    """Each query of each chain, asked again, gives the same observation, token for token.

    Guards: a miss that is papered over, and an observation that is cut or made up.
    """
    chains, counts = write_chains(nano, QUESTIONS, KNOWN, SEARCH)
    assert len(chains) + counts.dropped == len(QUESTIONS)
    assert len(chains) > 0.9 * len(QUESTIONS)
    for _, chain in chains:
        again = SEARCH(chain.queries)
        assert chain.observations == again
        observation_ids = [
            token
            for token, role in zip(chain.ids, chain.role, strict=True)
            if role == Role.OBSERVATION
        ]
        assert observation_ids == [
            token for observation in again for token in nano.wrap_observation(observation.text)
        ]
        actions = [text for role, text in segments(nano, chain) if role == Role.ACTION]
        queries = [
            action.removeprefix("<begin_search>").removesuffix("</end_search>").strip()
            for action in actions
        ]
        assert queries == chain.queries
    assert counts.searches >= sum(len(chain.queries) for _, chain in chains)


def test_chains_answer_in_form(nano: Any) -> None:
    """Every chain ends in a golden answer, and all that the policy would write carries loss."""
    for question, chain in write_chains(nano, QUESTIONS, KNOWN, SEARCH)[0]:
        assert nano.is_well_formed(chain)
        assert nano.answer(chain) in question.golden_answers
        for mask, role in zip(chain.mask, chain.role, strict=True):
            assert mask == (0 if role in (Role.PROMPT, Role.OBSERVATION) else 1)


def test_the_teacher_searches_for_what_is_not_known(nano: Any) -> None:
    """Known facts are recalled without a call, unknown ones are searched for.

    It goes by what the base model said, not by whether a fact is about a head entity.
    """
    for question, chain in write_chains(nano, QUESTIONS, KNOWN, SEARCH)[0]:
        text = nano.decode(chain.ids)
        queries_of_unknown = {
            query
            for fact in question.facts
            if fact.id not in KNOWN
            for query in fact.lookups[0].queries
        }
        # Facts of one entity share a query, so a known fact's query may be another's.
        assert set(chain.queries) <= queries_of_unknown
        for fact in question.facts:
            if fact.id in KNOWN:
                assert fact.recall in text
            else:
                assert set(fact.lookups[0].queries) & set(chain.queries)


def test_nothing_is_searched_for_when_all_is_known(nano: Any) -> None:
    """The tool is not called at all."""
    chains, counts = write_chains(nano, QUESTIONS, set(FACTS), SEARCH)
    assert all(chain.queries == [] for _, chain in chains)
    assert counts == TeachingCounts(searches=0, misses=0, dropped=0)


def test_a_miss_is_kept_and_reworded(nano: Any) -> None:
    """The question names a thing by a former name, which no article has for its title."""
    former = [
        question
        for question in QUESTIONS
        if question.lookups[0].queries[-1].startswith("once called")
    ]
    chains, counts = write_chains(nano, former, set(), SEARCH)
    missed = [
        (question, chain)
        for question, chain in chains
        if question.lookups[0].queries[1] in chain.queries
    ]
    assert len(missed) > 5
    assert counts.misses >= len(missed)
    for question, chain in missed:
        first = question.lookups[0]
        assert chain.queries[:2] == first.queries
        texts = observation_texts(chain)
        assert not any(f"{first.title} {number}:" in texts[0] for number in (1, 2))
        (number,) = [number for number in (1, 2) if f"{first.title} {number}:" in texts[1]]
        noun = first.ask.removeprefix("1 ").partition(" of ")[0]
        answer = question.facts[0].answers[0]
        words = segment_texts(nano, chain)
        assert words[3] == NOT_FOUND == "Not found."
        assert words[6].startswith(f"{first.subject} {number} says {noun} {answer}.")


def test_a_comparison_notes_what_it_read(nano: Any) -> None:
    """Both notes stand after what was read, before the conclusion."""
    compared = [question for question in QUESTIONS if question.conclusion]
    assert len(compared) > 20
    for question, chain in write_chains(nano, compared, set(), SEARCH)[0]:
        thoughts, _, rest = nano.decode(chain.ids).partition(question.conclusion)
        notes = [fact.note for fact in question.facts if fact.note]
        assert len(notes) == 2
        assert all(thoughts.count(note) == 1 for note in notes)
        assert thoughts.endswith(f" {notes[1]} ")
        assert rest.startswith("</think>")


def test_chains_of_thought_have_no_action(nano: Any) -> None:
    """Every fact is recalled once, no tool is called, and the answer is a golden one."""
    for question in QUESTIONS:
        chain = recall_chain(nano, question)
        text = nano.decode(chain.ids)
        assert chain.queries == []
        assert Role.OBSERVATION not in chain.role
        assert nano.is_well_formed(chain)
        assert nano.answer(chain) in question.golden_answers
        for fact in question.facts:
            assert text.count(f"{fact.ask} {fact.recall}") == 1
        assert f"<think> {question.plan}".strip() in text


def test_differences_are_not_learned_by_heart(nano: Any) -> None:
    """What is recalled of facts carries loss. What is recalled of a difference does not.

    The answer does, in a chain of thought.
    """
    differences = [question for question in QUESTIONS if question.lookups[-1].tool == "calculate"]
    assert len(differences) > 10
    for question in differences:
        learned = " | ".join(learned_texts(nano, recall_chain(nano, question)))
        *facts, difference = question.facts
        assert all(fact.recall in learned for fact in facts)
        assert difference.ask in learned
        assert difference.recall not in learned
        assert learned.endswith(f"</think>\\boxed{{ {difference.answers[0]}}}<eos>")


def test_what_is_given_carries_no_loss(nano: Any) -> None:
    """In a chain whose memories are given, only the plan, what is asked and the end are learned."""
    for question in QUESTIONS[::20]:
        learned = " | ".join(learned_texts(nano, recall_chain(nano, question, "given")))
        assert all(fact.ask in learned for fact in question.facts)
        assert "I recall" not in learned


# ---- pairs of SFT-1 ------------------------------------------------------------------------------
def draw_outcomes() -> Any:
    """Return what the base model recalls, and which questions acting solved: a random half."""
    recalled = {}
    for fact_id, fact in FACTS.items():
        recalled[fact_id] = fact.answers[0] if fact_id in KNOWN else "Nobody"
    solved_by_acting = {
        question.id for question in QUESTIONS if random.Random(question.id).random() < 0.5
    }
    return recalled, solved_by_acting


def test_pairs_of_both_directions(nano: Any) -> None:
    """Acting is chosen where recall was wrong and acting right, thinking the other way round.

    Nothing is learned where both agree. Those of one direction can be had alone.
    """
    recalled, solved_by_acting = draw_outcomes()
    acting_right = 0
    thinking_right = 0
    for question in QUESTIONS:
        is_recalled = all(fact.id in KNOWN for fact in question.facts)
        is_acted = question.id in solved_by_acting
        if is_acted and not is_recalled:
            acting_right += 1
        if is_recalled and not is_acted:
            thinking_right += 1
    acting_chosen, thinking_chosen = contrastive_pairs(nano, QUESTIONS, recalled, solved_by_acting)
    assert len(acting_chosen) == acting_right > 10
    assert len(thinking_chosen) == thinking_right > 10
    for chosen, rejected in acting_chosen:
        check_sides(nano, acting=chosen, thinking=rejected, recall_is_right=False)
    for chosen, rejected in thinking_chosen:
        check_sides(nano, acting=rejected, thinking=chosen, recall_is_right=True)
    pairs = thinking_chosen + acting_chosen
    assert pairs_in_direction(pairs, "act") == acting_chosen
    assert pairs_in_direction(pairs, "think") == thinking_chosen
    assert pairs_in_direction(pairs, "both") == pairs


def check_sides(codec: Codec, acting: Any, thinking: Any, recall_is_right: Any) -> None:
    """Check that two sides share a beginning without loss, and part at its end."""
    cut = acting.mask.index(1)
    assert acting.ids[:cut] == thinking.ids[:cut]
    assert codec.search_id not in acting.ids[:cut]
    for side in (acting, thinking):
        assert side.mask == [0] * cut + [1] * (len(side.ids) - cut)
    assert acting.ids[cut] == codec.search_id
    assert acting.ids[-1] == codec.end_search_id
    thought = codec.decode(thinking.ids[cut:])
    assert thought.startswith(" I recall")
    assert ("Nobody" in thought) != recall_is_right


def test_acting_is_chosen_at_the_first_fact_that_is_wrong(nano: Any) -> None:
    """What comes before it is recalled, and it is what both sides ask for."""
    recalled, solved_by_acting = draw_outcomes()
    acting_chosen, _ = contrastive_pairs(nano, QUESTIONS, recalled, solved_by_acting)
    wrong = [
        question
        for question in QUESTIONS
        if question.id in solved_by_acting and not all(fact.id in KNOWN for fact in question.facts)
    ]
    for question, (chosen, _) in zip(wrong, acting_chosen, strict=True):
        first = next(fact for fact in question.facts if fact.id not in KNOWN)
        beginning = nano.decode(chosen.ids[: chosen.mask.index(1)])
        assert beginning.endswith(f" {first.ask}")
        assert beginning.count("I recall") == question.facts.index(first)
        assert chosen.queries == first.lookups[0].queries[:1]


# ---- real questions: a corpus made for this test -------------------------------------------------
CORPUS = {
    "Orla Venn": (
        "Orla Venn (born 1931) was a potter. She grew up in Tallow. Her kiln burned in 1960."
    ),
    "The Clay Hour": ("The Clay Hour is a novel. It was written by Orla Venn. Critics were kind."),
    "Tallow (town)": "Tallow is a small town. It lies in Marrow County, by the sea.",
    "Marrow County": "Marrow County has four towns and one bridge.",
    "Clay pipe": "A clay pipe is a pipe made of clay. Its hour of fame has passed.",
}
PASSAGES = [{"id": title, "contents": f'"{title}"\n{text}'} for title, text in CORPUS.items()]


def real_question(text: str, golden: Any, titles: Any = (), question_id: str = "hotpotqa_1") -> Any:
    """Return a real question with its plan."""
    question = Question(question_id, text, golden, gold_titles=list(titles))
    question.facts = [whole_fact(question)]
    return question


def bridge_question() -> Any:
    """Return a question of two hops, whose second title only the first passage names."""
    return real_question(
        "Where did the author of The Clay Hour grow up?",
        ["Tallow"],
        ["Orla Venn", "The Clay Hour"],
    )


def write_chain(codec: Codec, question: str, top_k: int = 1) -> Any:
    """Return the one chain of a question, and the counts."""
    chains, counts = write_chains(codec, [question], set(), library(PASSAGES, top_k))
    (chain,) = [chain for _, chain in chains]
    return chain, counts


def test_the_teacher_sees_what_fits(nano: Any) -> None:
    """Observations in chains have at most max_observation tokens, as in rollouts.

    What was cut away is nothing the teacher can read.
    """
    search = library(PASSAGES, 2)
    (whole,) = write_chains(nano, [bridge_question()], set(), search, 128)[0]
    lengths = [len(nano.encode(text)) for text in observation_texts(whole[1])]
    budget = max(lengths) - 1
    (fitted,) = write_chains(nano, [bridge_question()], set(), search, budget)[0]
    assert all(len(nano.encode(text)) <= budget for text in observation_texts(fitted[1]))
    assert write_chains(nano, [bridge_question()], set(), search, 4)[0] == []


def test_a_real_bridge(nano: Any) -> None:
    """First the passage that the question names, then the one that it leads to.

    What is said of each is the passage's own sentence, with the next title and then the answer.
    """
    chain, counts = write_chain(nano, bridge_question())
    assert chain.queries == ["The Clay Hour", "Orla Venn"]
    assert counts.misses == 0
    words = segment_texts(nano, chain)
    assert words[3].startswith("It was written by Orla Venn.")
    assert words[6].startswith("She grew up in Tallow.")
    assert nano.answer(chain) == "Tallow"
    assert nano.is_well_formed(chain)


def test_a_real_question_that_is_known(nano: Any) -> None:
    """It is one fact, however many searches it takes, so it is recalled once.

    Guards: the answer recalled for the first hop, and again for a title that nothing named.
    """
    question = bridge_question()
    known = {question.facts[0].id}
    ((_, chain),) = write_chains(nano, [question], known, library(PASSAGES, 1))[0]
    for trajectory in (recall_chain(nano, question), chain):
        text = nano.decode(trajectory.ids)
        assert text.count("I recall Tallow.") == 1
        assert "Orla" not in text
        assert not trajectory.queries
        assert nano.answer(trajectory) == "Tallow"


def test_pairs_of_a_real_question_part_at_its_beginning(nano: Any) -> None:
    """The second pair would be cut at a second fact, if there were one."""
    question = bridge_question()
    recalled = {question.facts[0].id: "Tallow"}
    _, thinking_chosen = contrastive_pairs(nano, [question] * 2, recalled, set())
    (_, acting) = thinking_chosen[1]
    assert acting.queries == ["The Clay Hour"]
    assert "recall" not in nano.decode(acting.ids)


def test_a_real_miss_is_kept(nano: Any) -> None:
    """The question's own words find another passage; the miss stays, and the title is tried."""
    question = real_question(
        "What does the pipe of clay of fame lie near in the county?",
        ["Marrow County"],
        ["Tallow (town)"],
        "nq_1",
    )
    chain, counts = write_chain(nano, question)
    assert chain.queries == [question.question, "Tallow (town)"]
    assert counts == TeachingCounts(searches=2, misses=1, dropped=0)
    words = segment_texts(nano, chain)
    assert chain.observations[0].text.startswith("Clay pipe 1:")
    assert words[3] == "Not found."
    assert words[6].startswith("It lies in Marrow County, by the sea.")


@pytest.mark.parametrize(
    ("text", "golden"),
    [
        ("Are Orla Venn and Tallow (town) both people?", "no"),
        ("Which is a person, Orla Venn or Tallow?", "Orla Venn"),
    ],
)
def test_two_things_compared(nano: Any, text: str, golden: str) -> None:
    """Yes, no and one of two that the question names are in no passage.

    What each passage begins with is quoted, and the chain answers. Guards: such questions were
    dropped, so a policy never answered them.
    """
    question = real_question(text, [golden], ["Orla Venn", "Tallow (town)"])
    chain, counts = write_chain(nano, question)
    assert counts.dropped == 0
    assert set(chain.queries) == {"Orla Venn", "Tallow (town)"}
    assert nano.answer(chain) == golden
    own_words = " ".join(
        segment for role, segment in segments(nano, chain) if role != Role.OBSERVATION
    )
    for observation in observation_texts(chain):
        first_sentence = observation.partition(" 1: ")[2].split(". ")[0]
        assert first_sentence in own_words


def test_the_answer_as_the_evidence_spells_it(nano: Any) -> None:
    """Of several golden answers the one that was read, and the question once more before it.

    Guards: the last alias was taught, which no passage held, so that a policy learned to say other
    words than it had read.
    """
    golden = ["the Tallow Borough", "TALLOW", "Tallowtown"]
    question = real_question("Where did Orla Venn grow up?", golden, ["Orla Venn"], "nq_1")
    chain, _ = write_chain(nano, question)
    assert nano.answer(chain) == "Tallow"
    end_of_thoughts = " The question was: Where did Orla Venn grow up?</think>"
    assert segment_texts(nano, chain)[3].endswith(end_of_thoughts)


@pytest.mark.parametrize(
    ("text", "golden", "spelling"),
    [
        ("He saw the U.S. and (Philadelphia), PA.", ["philadelphia, pa", "US"], "U.S"),
        ("In the Hague.", ["a hague"], "Hague"),
        ("Nothing.", ["no", "yes"], "no"),
    ],
)
def test_spelling(text: str, golden: list[str], spelling: str) -> None:
    """The shortest answer that stands there, without an article; else the first of all."""
    assert spell_from(text, golden) == spelling


@pytest.mark.parametrize(
    ("contents", "golden", "taught"),
    [
        ("Ivo Hart lived in a hut. He was born in India.", ["India", "IN", "IND"], ["India"]),
        (
            "Ivo Hart wrote to us. He is from the United States.",
            ["US", "United States"],
            ["United States"],
        ),
        ("It is said that Ivo Hart was poor.", ["Italy", "IT"], []),
    ],
)
def test_golden_answers_that_are_common_words(
    nano: Any, contents: str, golden: list[str], taught: list[str]
) -> None:
    """Guards: "in" and "It" taught as countries, with any sentence for evidence."""
    question = real_question("Where was Ivo Hart born?", golden, ["Ivo Hart"], "popqa_1")
    passages = [{"id": "0", "contents": f'"Ivo Hart"\n{contents}'}]
    chains, _ = write_chains(nano, [question], set(), library(passages, 1))
    assert [nano.answer(chain) for _, chain in chains] == taught


def test_a_corpus_without_titles(nano: Any) -> None:
    """Its passages are quoted like others. Guards: a text that was all title, and no chain."""
    question = real_question("Who built the mill of Alder Bay?", ["Nora Finch"], [], "nq_1")
    passages = [{"id": "0", "contents": "The mill of Alder Bay was built by Nora Finch in 1871."}]
    ((_, chain),), _ = write_chains(nano, [question], set(), library(passages, 1))
    assert observation_texts(chain) == [f"1: {passages[0]['contents']}"]
    assert nano.answer(chain) == "Nora Finch"


@pytest.mark.parametrize("golden", ["Tallowby", "the moon"])
def test_a_chain_without_its_answer_is_dropped(nano: Any, golden: str) -> None:
    """The right passage comes back without the golden answer: a chain would be made up."""
    question = real_question("Where did Orla Venn grow up?", [golden], ["Orla Venn"], "nq_2")
    chains, counts = write_chains(nano, [question], set(), library(PASSAGES, 1))
    assert chains == []
    assert counts.dropped == 1


def test_a_question_that_finds_nothing_is_dropped(nano: Any) -> None:
    """It is searched for once, since no title is known."""
    question = real_question("Zork?", ["Tallow"], [], "nq_3")
    chains, counts = write_chains(nano, [question], set(), library(PASSAGES, 1))
    assert chains == []
    assert counts == TeachingCounts(searches=1, misses=1, dropped=1)


@pytest.mark.parametrize(
    ("first_observation", "kept"),
    [
        (Observation("Nothing here."), 1),
        (Observation("The search failed.", Provenance.FAILED), 0),
        (Observation("This search is not in the cache.", Provenance.MISSED), 0),
    ],
)
def test_a_chain_after_a_failed_search_is_dropped(
    nano: Any, first_observation: Any, kept: int
) -> None:
    """Wikipedia did not answer: that it holds nothing of the title would be made up.

    Guards: a failure taught as a miss, with another wording that finds it.
    """
    tools = library(PASSAGES, 1)

    def search(queries: list[str]) -> list[Any]:
        observations = dict(zip(queries, tools(queries), strict=True))
        observations["Orla Venn"] = first_observation
        return [observations[query] for query in queries]

    question = real_question("Where did Orla Venn grow up?", ["Tallow"], ["Orla Venn"], "nq_5")
    chains, counts = write_chains(nano, [question], set(), search)
    assert len(chains) == kept
    assert counts == TeachingCounts(searches=2, misses=1, dropped=1 - kept)


# ---- evidence ------------------------------------------------------------------------------------
def evidence_in(text: str, evidence: Any, title: str = "A") -> Any:
    """Return the evidence found in the second of two passages called A."""
    lookup = Lookup("?", ["A"], title=title, evidence=evidence)
    return find_evidence(lookup, f"A: 1 1: A cat, a hat, The Hague, Tallow.\n A 2: {text}")


def test_evidence_holds_the_answer_as_whole_words() -> None:
    """In the passage of the title alone, whatever the case and the punctuation."""
    sentence = "He was born in The Hague!"
    assert evidence_in(f"He likes cats. {sentence}", ["Hague"]) == sentence
    assert evidence_in("Scattered.", ["cat"]) == ""
    assert evidence_in("Nothing.", ["cat"]) == ""
    assert evidence_in("A cat.", ["cat"], title="B") == ""
    assert evidence_in("Nothing.", ["cat"], title="") == "A cat, a hat, The Hague, Tallow."


def test_evidence_of_a_long_sentence() -> None:
    """The part of it that is quoted still holds the answer."""
    quote = evidence_in("Very " * 60 + "old is Tallow.", ["Tallow"])
    assert "Tallow" in quote
    assert len(quote.split()) <= 40


def test_the_first_sentence_stands_for_no_text() -> None:
    """Of two things compared, what a passage begins with is quoted."""
    assert evidence_in("A small town. It is old.", [""]) == "A small town."
