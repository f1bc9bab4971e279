"""The passages that an answer comes from, for a workflow that reads them alone."""

from data.passages import join_passages, neutralize
from data.questions import SEARCH, Question
from services.bm25 import BM25
from tools import Library


def gold_observation(question: Question, library: Library) -> str:
    """Return the passages that a question's answer comes from, as one observation.

    It is "" where the question does not name them, or where the tool has none to go by. Passages
    are found by their ids where the corpus has those under the gold titles (several passages may
    share one title), else by their titles.
    """
    search = library[SEARCH]
    if not isinstance(search, BM25):
        return ""
    passages = search.find_named(question.gold_ids, question.gold_titles, question.golden_answers)
    return neutralize(join_passages(passages)) if passages else ""
