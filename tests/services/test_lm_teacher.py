"""A language model as teacher: what it is asked, what is kept of it, and that it trains."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, read_rows, run_here
from fake_endpoint import FakeEndpoint
from small_checkpoint import BOOKS, PEOPLE, TOWNS, save_task

import model
import tools
from data.autocoa_files import parse_trajectory, read_sft_files
from data.questions import Question
from data.trajectory import Observation, Provenance
from services.chat import Chat
from services.teacher import TeacherSettings, is_right, teach, write_chains_of_action

# run_here runs the module, which is imported here too, once more as a script.
pytestmark = pytest.mark.filterwarnings("ignore:'services.teacher' found in sys.modules")

ONE_TRY = TeacherSettings(device="cpu", tries=1)


def question(text: str = "Who?") -> Any:
    return Question(id=text, question=text, golden_answers=["Eva"])


def may_search(request: pytest.FixtureRequest) -> bool:
    """Whether the teacher was asked for a chain of action."""
    return "<begin_search>" in request["messages"][0]["content"]


def asked_question(request: pytest.FixtureRequest) -> Any:
    return re.findall(r"Question: (.*)", request["messages"][0]["content"])[0]


def assistant_text(row: Any) -> Any:
    return row["messages"][1]["content"]


@pytest.fixture
def chat_by_rule(serve: Any, tmp_path: Path) -> Any:
    """Return a function: rule -> a chat with an endpoint that answers by it."""

    def start(rule: Any) -> Any:
        endpoint = FakeEndpoint(serve, rule)
        return Chat(endpoint.url + "#x", CPU, "teacher", tmp_path / "c.sqlite"), endpoint

    return start


# ---- the command ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cwd = tmp_path_factory.mktemp("user")
    save_task(cwd)
    return cwd


def scholar(request: pytest.FixtureRequest) -> str:
    """Answer as a teacher by rule.

    It knows the writers of the first four books by heart. With the tool it finds everything but
    what the writer of the seventh book did, and fails with the fourth at its first try.
    """
    messages = request["messages"]
    text = asked_question(request)
    book = next(number for number, title in enumerate(BOOKS) if title in text)
    asks_for_town = "grow up" in text
    answer = TOWNS[book] if asks_for_town else PEOPLE[book]
    found = " ".join(
        message["content"]
        for message in messages[1:]
        if message["role"] == "user" and "search_result" in message["content"]
    )
    goes_on = "Go on" in messages[-1]["content"]
    if goes_on or not may_search(request):
        if book < 4:
            return f"I think it was {PEOPLE[book]}.</think> \\boxed{{{answer}}}"
        return "Perhaps Ada.\nOr not.</think>\\boxed{Ada}"
    first_try = request["temperature"] == 0
    if book == 6 or (book == 3 and first_try):
        if len(messages) < 3:
            return f"I look. <begin_search> {BOOKS[book]}"
        return "Nothing.</think>\\boxed{nobody}"
    if BOOKS[book] not in found:
        return f"<think>I need the writer of {BOOKS[book]}. <begin_search> {BOOKS[book]}"
    if asks_for_town and TOWNS[book] not in found:
        return f"It was {PEOPLE[book]}. <begin_search> {PEOPLE[book]}"
    return f"So I know.</think>\n\\boxed{{{answer}}}"


def run_teacher(folder: Path, endpoint: Any, name: str, *arguments: Any) -> Any:
    """Run the command with a model of this name, for which the cache holds no replies yet."""
    return run_here(
        folder,
        "services.teacher",
        f"--teacher={endpoint.url}#{name}",
        f"--out={name}",
        "--train_data=nq_dev.jsonl,hotpotqa_dev.jsonl",
        "--corpus=passages.jsonl",
        *arguments,
    )


def read_files(folder: Path) -> Any:
    """Return the rows of chains of action, chains of thought and pairs."""
    pairs = json.loads((folder / "pairs.json").read_text())
    return read_rows(folder / "coa.jsonl"), read_rows(folder / "cot.jsonl"), pairs


def test_a_model_as_teacher(serve: Any, folder: Path) -> None:
    """Chains that end in the golden answer are kept; what comes out trains."""
    endpoint = FakeEndpoint(serve, scholar)
    done = run_teacher(folder, endpoint, "taught", "--tries=2", "--top_k=1", "--coa=100")
    assert done.status == 0, done.err
    assert "of 16 questions" in done.out
    assert re.search(
        r"taught: asked \d+ times \(0 more from the cache\), \d+0 tokens read", done.out
    )

    # All but the seventh book by acting; the four that are known by heart by thinking.
    chains_of_action, chains_of_thought, _ = read_files(folder / "taught")
    assert len(chains_of_action) == 14
    assert len(chains_of_thought) == 8
    searches = {}
    for row in chains_of_action:
        text = assistant_text(row)
        searches[row["messages"][0]["content"]] = text.count("<begin_search>")
        assert "\n<search_result> " in text
        assert "1: " in text
    assert set(searches.values()) == {1, 2}
    for text, count in searches.items():
        assert (count == 2) == ("grow up" in text)

    codec = model.load_pretrained(str(folder / "checkpoint"), CPU).codec
    paths = [folder / "taught" / name for name in ("coa.jsonl", "cot.jsonl", "pairs.json")]
    data, odd_rows = read_sft_files(codec, paths)
    assert odd_rows == []
    assert len(data.chains_of_action) == 14
    assert len(data.chains_of_thought) == 8
    assert len(data.pairs) == 8
    for trajectory in data.chains:
        assert codec.is_well_formed(trajectory)


def test_pairs_of_both_directions(serve: Any, folder: Path) -> None:
    """They come from questions that exactly one way solved, and their sides begin alike."""
    endpoint = FakeEndpoint(serve, scholar)
    done = run_teacher(folder, endpoint, "pairs", "--tries=2", "--top_k=1", "--coa=100")
    assert done.status == 0, done.err
    _, _, pairs = read_files(folder / "pairs")
    acting = [pair for pair in pairs if pair["chosen"]["value"].startswith("<begin_search>")]
    thinking = [pair for pair in pairs if pair not in acting]

    # Books 5, 6 and 8.
    assert len(acting) == 6
    for pair in acting:
        beginning = pair["conversation"][0]["value"].rpartition("<think>")[2]
        assert "I need the writer" in beginning
        assert pair["rejected"]["value"] == "Perhaps Ada."
    # Book 4, where the first try with the tool went wrong.
    assert len(thinking) == 2
    for pair in thinking:
        assert pair["rejected"]["value"] == f"<begin_search> {BOOKS[3]}</end_search>"


def test_a_second_run_asks_nothing(serve: Any, folder: Path) -> None:
    """All replies come from the cache, and the files are the same."""
    endpoint = FakeEndpoint(serve, scholar)
    arguments = ["again", "--tries=2", "--top_k=1", "--coa=100"]
    assert run_teacher(folder, endpoint, *arguments).status == 0
    first_files = read_files(folder / "again")
    first_requests = len(endpoint.requests)
    assert run_teacher(folder, endpoint, *arguments).status == 0
    assert len(endpoint.requests) == first_requests > 0
    assert read_files(folder / "again") == first_files


def test_questions_of_all_files(serve: Any, folder: Path) -> None:
    """--coa questions are drawn from all files by --seed. Guards: those of the first file alone."""
    endpoint = FakeEndpoint(serve, scholar)
    done = run_teacher(folder, endpoint, "mixed", "--tries=1", "--coa=8")
    assert done.status == 0, done.err
    assert "of 8 questions" in done.out
    kinds = {"grow up" in asked_question(request) for request in endpoint.requests}
    assert kinds == {True, False}


def test_a_local_folder_as_teacher(folder: Path) -> None:
    """A random model solves nothing, and that is no error."""
    done = run_here(
        folder,
        "services.teacher",
        "--teacher=checkpoint",
        "--train_data=nq_dev.jsonl",
        "--corpus=passages.jsonl",
        "--out=local",
        "--coa=2",
        "--tries=1",
        "--batch_rows=8",
    )
    assert done.status == 0, done.err
    assert "0 chains of action" in done.out


@pytest.mark.parametrize(
    "arguments", [[], ["--teacher=x"], ["--teacher=x", "--train_data=a", "--corpus=b"]]
)
def test_what_a_teacher_needs(tmp_path: Path, arguments: list[Any]) -> None:
    """One line names the four settings."""
    done = run_here(tmp_path, "services.teacher", *arguments)
    assert done.status == 2
    assert "needs all four" in done.err


def test_a_teacher_has_no_estimate(tmp_path: Path) -> None:
    """--dry-run is refused, with what to do instead."""
    needed = ["--teacher=x", "--train_data=a", "--corpus=b", "--out=c"]
    done = run_here(tmp_path, "services.teacher", *needed, "--dry_run")
    assert done.status == 2
    assert "--coa=2" in done.err


# ---- what is kept --------------------------------------------------------------------------------
def test_a_pair_whose_thought_ends_at_once(chat_by_rule: Any) -> None:
    """The thought in the action's place ends with its line, or with all thinking.

    Guards: a side that ends in </think> without an answer, which training leaves out; a beginning
    that is said twice, where the turn began with white space. Where the thought ended with the
    beginning, there is nothing to put in the action's place, and no pair.
    """
    thoughts = {"Who?": "It was Ada.</think>\n\\boxed{Ada}", "What?": "</think>\\boxed{Ada}"}

    def rule(request: pytest.FixtureRequest) -> Any:
        if not may_search(request):
            return thoughts[asked_question(request)]
        if len(request["messages"]) < 3:
            return "\nI look.\n<begin_search> Clay"
        return "So.</think>\\boxed{Eva}"

    chat, _ = chat_by_rule(rule)
    search = tools.library([{"id": "0", "contents": '"Clay"\nBy Eva.'}], 1)
    rows = teach(chat, [question(text) for text in thoughts], search, ONE_TRY)
    (pair,) = rows.pairs.values()
    assert pair["conversation"][0]["value"] == "Who?<think>I look."
    assert pair["chosen"]["value"] == "<begin_search> Clay</end_search>"
    assert pair["rejected"]["value"] == "It was Ada."


def eva_searcher(request: pytest.FixtureRequest) -> str:
    """Find Eva by searching, and say Ada without."""
    messages = request["messages"]
    if may_search(request) and len(messages) < 3:
        return "I look. <begin_search> Clay"
    if len(messages) > 2 and "<search_result>" in messages[2]["content"]:
        return "So.</think>\\boxed{Eva}"
    return "Ada.</think>\\boxed{Ada}"


def test_a_search_that_answers(chat_by_rule: Any) -> None:
    """It gives a chain of action and a pair: what the next test must not find."""
    chat, _ = chat_by_rule(eva_searcher)
    rows = teach(chat, [question()], lambda queries: [Observation("Clay 1: By Eva.")], ONE_TRY)
    assert len(rows.chains_of_action) == 1
    assert len(rows.chains_of_thought) == 0
    assert len(rows.pairs) == 1


@pytest.mark.parametrize(
    "observation",
    [
        Observation("The search failed.", Provenance.FAILED),
        Observation("This search is not in the cache.", Provenance.MISSED),
    ],
)
def test_a_search_that_failed(chat_by_rule: Any, observation: Any) -> None:
    """No chain and no pair comes from it, whatever the teacher answers."""
    chat, endpoint = chat_by_rule(eva_searcher)
    rows = teach(chat, [question()], lambda queries: [observation], ONE_TRY)
    assert not rows.chains_of_action
    assert not rows.chains_of_thought
    assert not rows.pairs
    assert observation.text in endpoint.requests[1]["messages"][2]["content"]


def test_white_space_before_the_thought(chat_by_rule: Any) -> None:
    """Guards: a row with <think> twice, which training refused, of a solved question."""
    chat, _ = chat_by_rule(lambda request: "\n<think>It is Eva.</think>\\boxed{Eva}")
    rows = teach(chat, [question()], lambda queries: [], ONE_TRY)
    chains = [*rows.chains_of_action.values(), *rows.chains_of_thought.values()]
    assert chains
    for row in chains:
        parts = parse_trajectory(assistant_text(row))
        assert parts == [("think", "It is Eva."), ("answer", "Eva")]


def test_a_teacher_that_thinks_before_it_speaks(chat_by_rule: Any) -> None:
    """Its thought and its speech are one thought of a chain, whose tags it may have mentioned.

    Guards: no chain at all, since every turn held an end of thinking.
    """

    def rule(request: Any) -> Any:
        if not may_search(request):
            return "<think>Ada?</think>It may be Ada.</think>\\boxed{Ada}"
        if len(request["messages"]) < 3:
            return "<think>Shall I <begin_search>? Yes.</think>\n\nI look. <begin_search> Clay"
        return "<think>So it is Eva.</think>\\boxed{Eva}"

    chat, _ = chat_by_rule(rule)
    search = tools.library([{"id": "0", "contents": '"Clay"\nBy Eva.'}], 1)
    rows = teach(chat, [question()], search, ONE_TRY)
    (chain,) = rows.chains_of_action.values()
    assert parse_trajectory(assistant_text(chain)) == [
        ("think", "Shall I ? Yes. I look."),
        ("search", "Clay"),
        ("result", "Clay 1: By Eva."),
        ("think", "So it is Eva."),
        ("answer", "Eva"),
    ]
    (pair,) = rows.pairs.values()
    assert pair["rejected"]["value"] == "Ada? It may be Ada."


def test_a_teacher_that_never_stops(chat_by_rule: Any) -> None:
    """Searches end after max_actions, and a text that is no trajectory is not kept."""
    chat, endpoint = chat_by_rule(lambda request: "More. <begin_search> more")
    search = tools.library([{"id": "0", "contents": '"More"\nAnd more.'}], 1)
    settings = TeacherSettings(device="cpu", max_actions=3, tries=1)
    (attempt,) = write_chains_of_action(chat, [question()], search, settings, sample=0)
    assert attempt.text.count("</end_search>") == 3
    assert len(endpoint.requests) == 4
    assert not is_right(attempt.text, ["x"])


def test_observations_fit_a_budget(chat_by_rule: Any) -> None:
    """A long passage is cut at four letters a token, in the chain and in what the teacher reads."""
    chat, endpoint = chat_by_rule(eva_searcher)
    long_passage = Observation("Clay 1: By Eva. " + "It is long. " * 100)
    settings = TeacherSettings(device="cpu", max_observation=20)
    (attempt,) = write_chains_of_action(
        chat, [question()], lambda queries: [long_passage], settings, sample=0
    )
    shown = endpoint.requests[1]["messages"][2]["content"]
    assert "By Eva." in shown
    assert len(shown) < 80 + len("<search_result>  </search_result>") + 4
    assert shown in attempt.text
