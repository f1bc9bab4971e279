"""The scripted teacher: chains of thought from memory, and chains of action with the real tool.

A chain is built of parts (see data.trajectory.Part), fact by fact:

    from memory    director of Silver River? I recall Eva Moss.
    with a tool    director of Silver River? <begin_search> Silver River</end_search>
                   <search_result> Silver River 1: A film. .. </search_result>
                   Silver River 1 says director Eva Moss.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.progress import tqdm
from data.passages import split_observation, title_on_line
from data.questions import Fact, Lookup, Question
from data.scores import find_spelling
from data.trajectory import Codec, Observation, Part, PartKind, Trajectory

NOT_FOUND = "Not found."  # what a reader says of passages that do not hold it

SENTENCE_BREAK = re.compile(r"(?<=[.!?]) (?=[^a-z])")
QUOTE_WORDS = 40  # of a longer sentence, at most so many words are quoted


@dataclass
class TeachingCounts:
    """What the teacher did while it wrote chains of action."""

    searches: int = 0  # calls of a tool
    misses: int = 0  # of them, those that did not find what was needed
    dropped: int = 0  # chains that are not taught


# ---- the parts of a chain ------------------------------------------------------------------------
def opening_parts(question: Question) -> list[Part]:
    """Return how a chain begins: with its plan, where the question has one."""
    if not question.plan:
        return []
    return [("think", question.plan)]


def recall_parts(fact: Fact, recalled: PartKind = "think") -> list[Part]:
    """Return a fact from memory: what is asked, what is recalled, and what follows from it.

    recalled: the kind of part that the memory is; "given" where it is not to be learned.
    """
    return [("think", fact.ask), (recalled, fact.recall), *note_parts(fact)]


def note_parts(fact: Fact) -> list[Part]:
    """Return what is noted once a fact is known: in a comparison, what will be compared."""
    if not fact.note:
        return []
    return [("think", fact.note)]


def closing_parts(question: Question, evidence: str = "") -> list[Part]:
    """Return how a chain ends: a conclusion where the question has one, then the answer.

    evidence: what was quoted last. Where no answer is set for teaching, the question is said once
    more, since its words lie far back, and the answer is spelled as the evidence spells it.
    """
    parts: list[Part] = []
    if question.conclusion:
        parts.append(("think", question.conclusion))
    if question.taught_answer:
        return [*parts, ("answer", question.taught_answer)]
    if evidence:
        parts.append(("think", f"The question was: {question.question}"))
    return [*parts, ("answer", spell_from(evidence, question.golden_answers))]


def spell_from(text: str, golden: list[str]) -> str:
    """Return the shortest golden answer that a text holds, in the text's own spelling.

    The first of all golden answers where the text holds none.

    >>> spell_from("Ash was born in Philadelphia.", ["Philly", "City of Philadelphia",
    ...     "Philadelphia"])
    'Philadelphia'
    """
    for answer in sorted(golden, key=len):
        spelling = find_spelling(text, answer)
        if spelling:
            return spelling
    return golden[0]


# ---- chains of thought ---------------------------------------------------------------------------
def recall_chain(codec: Codec, question: Question, recalled: PartKind = "think") -> Trajectory:
    """Return a chain of thought from memory: every fact is asked for and recalled.

    recalled: "think", or "given" where what is recalled is not to be learned. What a calculator
    gives is never to be learned by heart.
    """
    parts = opening_parts(question)
    for fact in question.facts:
        if fact.lookups[0].tool == "search":
            parts += recall_parts(fact, recalled)
        else:
            parts += recall_parts(fact, "given")
    return codec.build(question.question, parts + closing_parts(question))


# ---- chains of action ----------------------------------------------------------------------------
def write_chains(
    codec: Codec,
    questions: list[Question],
    known: set[str],
    search: Callable[[list[str]], list[Observation]],
    max_observation: int = 128,
) -> tuple[list[tuple[Question, Trajectory]], TeachingCounts]:
    """Write chains of action: recall what the base model knows, and look up the rest.

    For each look-up the queries are run in order until one finds what is needed. A miss stays in
    the chain as a miss. A chain is dropped where a look-up finds nothing, and where a search
    failed, since nobody knows what it would have found.

    known: ids of the facts that the base model answered right when it was asked.
    search: the real tools; all queries are run at once.
    max_observation: tokens of an observation at most, as in rollouts.
    Returns the chains that found all they needed, each with its question, and counts.
    """
    observations = _run_all_queries(codec, questions, known, search, max_observation)
    counts = TeachingCounts()
    chains = []
    for question in tqdm(questions, desc="what the teacher does", unit="question", leave=False):
        parts = _chain_parts(question, known, observations, counts)
        if parts is None:
            counts.dropped += 1
        else:
            chains.append((question, codec.build(question.question, parts)))
    return chains, counts


def _run_all_queries(
    codec: Codec,
    questions: list[Question],
    known: set[str],
    search: Callable[[list[str]], list[Observation]],
    max_observation: int,
) -> dict[str, Observation]:
    """Return the fitted observation of every query that any chain could try."""
    queries = set()
    for question in questions:
        for fact in question.facts:
            if fact.id in known:
                continue
            for lookup in fact.lookups:
                queries.update(lookup.queries)
    ordered = sorted(queries)
    return {
        query: Observation(codec.fit(observation.text, max_observation), observation.provenance)
        for query, observation in zip(ordered, search(ordered), strict=True)
    }


def _chain_parts(
    question: Question,
    known: set[str],
    observations: dict[str, Observation],
    counts: TeachingCounts,
) -> list[Part] | None:
    """Return the parts of a chain of action, None where it must be dropped."""
    parts = opening_parts(question)
    evidence = ""
    for fact in question.facts:
        if fact.id in known:
            parts += recall_parts(fact)
            continue
        for lookup in fact.lookups:
            lookup_parts, evidence = _look_up(lookup, observations, counts)
            if not evidence:
                return None
            parts += lookup_parts
        parts += note_parts(fact)
    if any(kind == "search" and observations[text].is_lost for kind, text in parts):
        return None
    return parts + closing_parts(question, evidence)


def _look_up(
    lookup: Lookup, observations: dict[str, Observation], counts: TeachingCounts
) -> tuple[list[Part], str]:
    """Return the parts of one look-up and the evidence that it found, "" for none."""
    parts: list[Part] = [("think", lookup.ask)]
    for query in lookup.queries:
        observation = observations[query]
        parts += [("search", query), ("result", observation.text)]
        counts.searches += 1
        evidence = find_evidence(lookup, observation.text)
        if evidence:
            parts.append(("think", evidence))
            return parts, evidence
        parts.append(("think", NOT_FOUND))
        counts.misses += 1
    return parts, ""


# ---- reading -------------------------------------------------------------------------------------
def find_evidence(lookup: Lookup, observation: str) -> str:
    """Return what to say of an observation, "" where it does not hold what is looked up.

    It must hold the passage of the look-up's title, where that names one. Then it is the look-up's
    statement with that passage's number, or else a sentence of the passage that holds one of the
    texts in `evidence`; the text "" stands for the passage's first sentence.
    """
    passages = [
        passage
        for passage in split_observation(observation)
        if not lookup.title or passage.title == title_on_line(lookup.title, passage.number)
    ]
    if lookup.statement:
        return state_lookup(lookup, passages[0].number) if passages else ""
    for text in lookup.evidence:
        for passage in passages:
            for quote in _quotes(passage.text):
                if _mentions(quote, text):
                    return quote
    return ""


def state_lookup(lookup: Lookup, number: int) -> str:
    """Return what a reader says who found the look-up's answer in passage `number`."""
    return lookup.statement.replace("{n}", str(number))


def _quotes(text: str) -> Iterator[str]:
    """Yield the sentences of a text; of a long sentence, overlapping pieces of it."""
    half = QUOTE_WORDS // 2
    for sentence in SENTENCE_BREAK.split(text):
        words = sentence.split()
        for start in range(0, max(1, len(words) - half), half):
            yield " ".join(words[start : start + QUOTE_WORDS])


def _mentions(quote: str, text: str) -> bool:
    """Whether a quote spells a text; "" stands for whatever it says."""
    return not text or find_spelling(quote, text) != ""
