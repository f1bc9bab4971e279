"""Contrastive pairs for SFT-1: when to act (paper 3.2)."""

from collections.abc import Sequence

from common.settings import PairDirections
from data.batches import Pair
from data.questions import Question
from data.scores import exact_match
from data.teacher import opening_parts, recall_parts
from data.trajectory import Codec, Role, Trajectory


def contrastive_pairs(
    codec: Codec,
    questions: list[Question],
    recalled: dict[str, str],
    solved_by_acting: set[str],
) -> tuple[list[Pair], list[Pair]]:
    """Return pairs in which acting is chosen, and pairs in which thinking is chosen.

    The two sides of a pair share what was thought up to one fact, and part there: one looks the
    fact up, the other recalls it. Acting is chosen at the first fact that recall got wrong, where
    acting got the question right. Thinking is chosen at a recalled fact, where recall was right
    throughout and acting got the question wrong.

    recalled: fact id -> what the base model recalls when it is asked for the fact.
    solved_by_acting: ids of the questions that were solved by looking up every fact.
    """
    acting_chosen: list[Pair] = []
    thinking_chosen: list[Pair] = []
    for question in questions:
        wrong_facts = [
            index
            for index, fact in enumerate(question.facts)
            if not exact_match(recalled[fact.id], fact.answers)
        ]
        solved_by_recall = not wrong_facts
        if solved_by_recall == (question.id in solved_by_acting):
            # Both are right or both are wrong: this question does not tell when to act.
            continue
        if solved_by_recall:
            # Any fact would do; taking them in turn spreads the cuts over first and later facts.
            cut = (len(acting_chosen) + len(thinking_chosen)) % len(question.facts)
            acting, thinking = _part_at(codec, question, cut, recalled)
            thinking_chosen.append((thinking, acting))
        else:
            acting, thinking = _part_at(codec, question, wrong_facts[0], recalled)
            acting_chosen.append((acting, thinking))
    return acting_chosen, thinking_chosen


def pairs_in_direction(pairs: Sequence[Pair], directions: PairDirections) -> list[Pair]:
    """Return the pairs whose chosen side acts, those in which it does not, or both."""
    if directions == "both":
        return list(pairs)
    return [pair for pair in pairs if _acts(pair[0]) == (directions == "act")]


def _acts(side: Trajectory) -> bool:
    """Whether a side of a pair acts after what both sides share, which carries no loss."""
    own_roles = {role for role, is_own in zip(side.role, side.mask, strict=True) if is_own}
    return Role.ACTION in own_roles


def _part_at(codec: Codec, question: Question, cut: int, recalled: dict[str, str]) -> Pair:
    """Return the two ways to go on at fact number `cut`: looking it up, and recalling it."""
    prefix = opening_parts(question)
    for fact in question.facts[:cut]:
        prefix += recall_parts(fact)
    fact = question.facts[cut]
    prefix.append(("think", fact.ask))
    action = ("search", fact.lookups[0].queries[0])
    thought = ("think", f"I recall {recalled[fact.id]}.")
    return codec.build_pair(question.question, prefix, [action], [thought])
