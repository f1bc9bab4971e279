"""FlashRAG's question files: reading them, and a teacher's plan for a real question.

A line is {"id", "question", "golden_answers": [..], "metadata": {..}}. Of the metadata, the titles
of the passages that hold the answer matter: `gold_titles`, or FlashRAG's `supporting_facts`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_jsonl
from data.passages import nfc
from data.questions import Fact, Lookup, Question
from data.scores import find_spelling, is_common, normalize

SPLITS = ("train", "dev", "test", "validation")
# The question sets whose questions need two passages.
SEVERAL_HOPS = re.compile("hotpot|musique|2wiki|bamboogle", re.I)
# What the tools take for the name of a tool at the beginning of an action.
TOOL_NAME = re.compile(r"\s*[a-z_]+:")


# ---- files ---------------------------------------------------------------------------------------
def name_sets(paths: Sequence[str | Path], setting: str) -> dict[str, str | Path]:
    """Return the name of each question file's set, with its path.

    A set is named by its file. Where that says the split alone, as in FlashRAG's nq/dev.jsonl, or
    two files are called the same, the folder's name comes before it.
    setting: the setting that gave the paths, for the message.
    Raises UserError where two names are the same even so.
    """
    path_of_set: dict[str, str | Path] = {}
    stems = [Path(path).stem for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        name = stem
        if stem in SPLITS or stems.count(stem) > 1:
            name = f"{Path(path).absolute().parent.name}_{stem}"
        if name in path_of_set:
            raise UserError(
                f"{setting}: {path_of_set[name]} and {path} are both the set {name!r}; "
                "give each file once, or rename one"
            )
        path_of_set[name] = path
    return path_of_set


def read_questions(path: str | Path, set_name: str = "") -> list[Question]:
    """Read a FlashRAG question file; each question gets its one fact, with a plan to look it up.

    set_name: what the set is called; else it is named by its file.
    Raises UserError with file:line for a malformed row, and for two rows of one id.
    """
    if not set_name:
        set_name = next(iter(name_sets([path], "train_data, eval_data")))
    expected = 'questions, {"id", "question", "golden_answers"}'
    questions = []
    line_of_id: dict[str, int] = {}
    for number, row in read_jsonl(path, expected, "train_data, eval_data"):
        where = f"{path}:{number}"
        questions.append(parse_question(row, set_name, where))
        # What is found out about one question would pass for the other's.
        first = line_of_id.setdefault(str(row["id"]), number)
        if first != number:
            raise UserError(
                f"{where}: question {row['id']!r} is in line {first} too; "
                "each needs an id of its own"
            )
    return questions


def parse_question(row: Any, set_name: str, where: str) -> Question:
    """Return the question of a row, with its one fact.

    where: the file and line, for the message.
    Raises UserError for a malformed row.
    """
    if not _is_question(row):
        raise UserError(f'{where}: not a question; expected {{"id", "question", "golden_answers"}}')
    golden_answers = _golden_answers(row, where)
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: metadata of question {row['id']!r} must be an object")
    titles = gold_titles(metadata, where)
    ids = metadata.get("gold_ids") or []
    if not isinstance(ids, list) or not all(isinstance(passage_id, str) for passage_id in ids):
        raise UserError(f"{where}: gold_ids of question {row['id']!r} must be a list of texts")
    question = Question(
        # Each set counts from 0, so an id alone could be that of another set's question.
        id=f"{set_name}:{row['id']}",
        question=nfc(row["question"]),
        golden_answers=golden_answers,
        gold_titles=titles,
        gold_ids=ids,
        where=where,
    )
    _refuse_half_characters(question)
    question.facts = [whole_fact(question)]
    return question


def flashrag_row(question: Question, set_name: str) -> dict[str, Any]:
    """Return a question as a row of a question file, of which `parse_question` makes it again."""
    return {
        "id": question.id.removeprefix(f"{set_name}:"),
        "question": question.question,
        "golden_answers": question.golden_answers,
        "metadata": {"gold_titles": question.gold_titles, "gold_ids": question.gold_ids},
    }


def _refuse_half_characters(question: Question) -> None:
    """Raise UserError for a text that can't be encoded, whichever of a question's texts it is."""
    texts = [question.id, question.question, *question.golden_answers]
    texts += question.gold_titles + question.gold_ids
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{question.where}: question {question.id!r} holds half a character (a lone "
            "surrogate); write the file anew as UTF-8"
        ) from None


def _is_question(row: Any) -> bool:
    if not isinstance(row, dict) or "id" not in row:
        return False
    text = row.get("question")
    return isinstance(text, str) and bool(text.strip())


def _golden_answers(row: dict[str, Any], where: str) -> list[str]:
    """Return a row's golden answers in the composed form, without those that say nothing."""
    golden = row.get("golden_answers")
    is_list_of_texts = isinstance(golden, list) and all(isinstance(text, str) for text in golden)
    answers = [nfc(text) for text in golden if text.strip()] if is_list_of_texts else []
    if not answers:
        raise UserError(
            f"{where}: question {row['id']!r} has no answers; "
            "golden_answers must be a list of texts"
        )
    # The scores, which are SQuAD's, read "the" as no answer at all, and count an empty answer as
    # right. Where a question has no other answer it stays.
    scorable = [text for text in answers if normalize(text)]
    return scorable or answers


def gold_titles(metadata: dict[str, Any], where: str) -> list[str]:
    """Return the titles of the passages that a question's answer comes from, each once, composed.

    They stand in `gold_titles`, or else in FlashRAG's `supporting_facts`, which is
    {"title": [..], "sent_id": [..]} or [[title, sentence] ..].
    where: the file and line, for the message.
    Raises UserError for what is neither.
    """
    entries = metadata.get("gold_titles") or metadata.get("supporting_facts") or []
    if isinstance(entries, dict):
        entries = entries.get("title") or []
    titles = []
    if isinstance(entries, list):
        for entry in entries:
            titles.append(entry[0] if isinstance(entry, list) and entry else entry)
    if not isinstance(entries, list) or not all(isinstance(title, str) for title in titles):
        raise UserError(
            f"{where}: gold_titles must be a list of texts, and supporting_facts name titles"
        )
    return list(dict.fromkeys(nfc(title) for title in titles if title.strip()))


# ---- a plan for a real question ------------------------------------------------------------------
def whole_fact(question: Question) -> Fact:
    """Return a real question as one fact: it is recalled as a whole, however it is looked up."""
    return Fact(
        id=question.id,
        wordings=[question.question],
        answers=question.golden_answers,
        recall=f"I recall {question.golden_answers[0]}.",
        lookups=plan_lookups(question),
    )


def plan_lookups(question: Question) -> list[Lookup]:
    """Return a teacher's plan for a real question, from what its gold passages are called.

    Of several hops, by the set's name in the id: a search for each of two titles, in the order in
    which the question names them. The first passage must name the second, and the second must hold
    the answer. But where the answer is yes, no or something that the question names, two things
    are compared, and what each passage begins with is quoted.

    Of one hop: a search for the title, where the question names it.

    A title that nothing names could not be guessed by a policy. It is then the second query, after
    a search with the question itself.
    """
    named_most = sorted(
        dict.fromkeys(question.gold_titles),
        key=lambda title: -_named_share(title, question.question),
    )
    titles = named_most[:2]
    if len(titles) < 2 or not SEVERAL_HOPS.search(question.id):
        # Further gold passages of a question of one hop are alternatives.
        return [_plan_one_hop(question, titles[0] if titles else "")]
    if _compares_two(question):
        # The text "" stands for what a passage begins with.
        return [
            _plan_hop(question, title, evidence=[""], is_named=_is_half_named(title, question))
            for title in titles
        ]
    first, second = titles
    second_without_qualifier = re.sub(r" \(.*?\)", "", second)
    return [
        _plan_hop(
            question,
            first,
            evidence=[second, second_without_qualifier],
            is_named=_is_half_named(first, question),
        ),
        # The first passage names the second, whether or not the question does.
        _plan_hop(question, second, evidence=question.golden_answers, is_named=True),
    ]


def _plan_one_hop(question: Question, title: str) -> Lookup:
    text = question.question
    if title and _named_share(title, text) == 1:
        return _look_for_title(title, [title, text], question.golden_answers)
    queries = [text]
    if title:
        queries.append(title)
    return _search_question(title, queries, question.golden_answers)


def _plan_hop(question: Question, title: str, evidence: list[str], is_named: bool) -> Lookup:
    text = question.question
    if is_named:
        return _look_for_title(title, [title, f"{title} {text}"], evidence)
    return _search_question(title, [text, title], evidence)


def _look_for_title(title: str, queries: list[str], evidence: list[str]) -> Lookup:
    return Lookup(
        ask=f"I look for {title}.",
        queries=[escape_query(query) for query in queries],
        title=title,
        evidence=evidence,
    )


def _search_question(title: str, queries: list[str], evidence: list[str]) -> Lookup:
    return Lookup(
        ask="What do the passages say?",
        queries=[escape_query(query) for query in queries],
        title=title,
        evidence=evidence,
    )


def _named_share(title: str, text: str) -> float:
    """Return the share of a title's words that a question names, without the qualifier's."""
    name = re.sub(r"\(.*?\)", "", title)
    words = normalize(name).split()
    if len(words) == 1 or is_common(name):
        return float(find_spelling(text, name) != "")
    question_words = set(normalize(text).split())
    named_words = [word for word in words if word in question_words]
    return len(named_words) / max(1, len(words))


def _is_half_named(title: str, question: Question) -> bool:
    return _named_share(title, question.question) >= 0.5


def _compares_two(question: Question) -> bool:
    """Whether the answer is yes, no, or something that the question names."""
    return any(
        normalize(answer) in ("yes", "no") or find_spelling(question.question, answer)
        for answer in question.golden_answers
    )


def escape_query(query: str) -> str:
    """Return a query as the model has to write it, so that its beginning is no tool's name.

    >>> escape_query("thor: ragnarok"), escape_query("Thor")
    ('search: thor: ragnarok', 'Thor')
    """
    if TOOL_NAME.match(query):
        return f"search: {query}"
    return query
