"""What models imagine beside what the tool says: searches, stated values, figures, the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here, strict_json, tiny_lm
from small_checkpoint import save_task

from common.errors import UserError
from common.progress import progress_bar
from common.settings import RolloutSettings, TaskRunSettings
from data.questions import Fact, Lookup, Question
from data.sft_data import SFTData, write_sft_data
from data.teacher import write_chains
from data.trajectory import Codec, Observation, Provenance, Role
from environments.cases import (
    AskedFact,
    Case,
    cases_of,
    each_query_once,
    find_asked_fact,
    held_out_cases,
    policy_cases,
    spread,
    training_cases,
)
from environments.distilled import Example, WorldModel, query_prompt, write_examples
from environments.fidelity import (
    Kind,
    case_prompt,
    known_share,
    measure_cases,
    observation_text,
    read_statement,
    rows_to_measure,
)
from environments.simulator import USEFUL, hint_of
from evaluation.fidelity import (
    FactOutcome,
    Fidelity,
    Outcome,
    Statement,
    auroc,
    confident_entropy,
    fidelity_to_json,
    read_fidelity,
    reliability,
    summarize,
    summarize_splits,
    table_heading,
    table_line,
)
from model import LM
from nano.world import RELATIONS, World, read_values, value_text
from tasks.nano import NanoTask
from tasks.real import RealTask

PRONOUNS = [("It", "Its", "it"), ("He", "His", "him"), ("She", "Her", "her")]
SETTINGS = RolloutSettings(max_observation=48)
SILVER = (
    "Silver River 1: A film. Eva Moss directed it.\n Iron Hill 2: A film. Ada Falk directed it."
)


@pytest.fixture(scope="module")
def task() -> NanoTask:
    return NanoTask(TaskRunSettings(train_scale=1, eval_questions=1))


def fact_about(name: str, relation: str = "director", answer: str = "Eva Moss") -> Fact:
    """Return a fact of the nano world that is looked up by a name."""
    noun = RELATIONS[relation].noun
    lookup = Lookup(
        ask=f"{noun} of {name}?",
        queries=[name, f"{name} film"],
        title=name,
        subject=name,
        statement=f"{name} {{n}} says {noun} {answer}.",
    )
    return Fact(f"{name}|{relation}", ["Who?"], [answer], f"I recall {answer}.", [lookup])


def question_about(*facts: Fact) -> Question:
    return Question("q", "Who directed it?", ["Eva Moss"], list(facts))


# ---- stated values -------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [World(0, "train"), World(1, "eval")], ids=["train", "eval"])
def test_every_fact_of_every_article_is_read(world: World) -> None:
    """Guards: a band's city read as its year, and a wording that no pattern knows."""
    for entity in world.entities:
        article = world.articles[entity.title]
        for name, relation in RELATIONS.items():
            if relation.domain != entity.kind:
                continue
            expected = [value_text(entity.facts[name])] if name in entity.facts else []
            assert read_values(article, name) == expected, (article, name)


@pytest.mark.parametrize("name", RELATIONS)
def test_every_wording_is_read(name: str) -> None:
    """Each sentence of a relation, about a thing, a man and a woman."""
    value = "1976" if RELATIONS[name].value_type == "year" else "Jane Slater (actor)"
    for sentence in RELATIONS[name].sentences:
        for subject, possessive, object_ in PRONOUNS:
            for article in ("a", "an"):
                text = sentence.format(
                    value=value, He=subject, His=possessive, him=object_, a=article
                )
                assert read_values(f"A thing. {text} It was once called Ash.", name) == [value]


def test_what_a_network_makes_up_is_read() -> None:
    """Several values, in the order of the sentences; an unfinished sentence states nothing."""
    text = "A film. Eva Moss directed it. Its director is Ada Falk. It was directed by Carl"
    assert read_values(text, "director") == ["Eva Moss", "Ada Falk"]
    assert read_values("Nothing found.", "director") == []


def test_a_statement_stands_under_the_asked_title(task: NanoTask) -> None:
    """Guards: a value of another passage that passes for the asked one, right or wrong."""
    asked = AskedFact(fact_about("Silver River"), fact_about("Silver River").lookups[0])
    statements = {
        SILVER: Statement.RIGHT,
        SILVER.replace("Eva Moss", "Carl Hart"): Statement.FALSE,
        SILVER.replace("Silver River", "Silver River (film)"): Statement.NOTHING,
        "Iron Hill 1: A film. Eva Moss directed it.": Statement.NOTHING,
        "Silver River 1: A film. Its star is Eva Moss.": Statement.NOTHING,
        "Silver River 1: A film. Ada Falk directed it. Its director is Eva Moss.": Statement.RIGHT,
        "Nothing found.": Statement.NOTHING,
    }
    for observation, statement in statements.items():
        assert read_statement(task, asked, observation) == statement, observation


def test_a_real_question_has_right_statements_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its evidence under the look-up's title is right, and all else says nothing of it."""
    save_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    files = ["nq_dev.jsonl"]
    settings = TaskRunSettings(
        model="checkpoint", train_data=files, eval_data=files, corpus="passages.jsonl"
    )
    task = RealTask(settings)
    (questions,) = task.evaluation.values()
    (question,) = [question for question in questions if "The Clay Hour" in question.question]
    fact = question.facts[0]
    asked = AskedFact(fact, fact.lookups[0])
    right = "The Clay Hour 1: The Clay Hour is a novel. It was written by Orla Venn."
    assert read_statement(task, asked, right) == Statement.RIGHT
    wrong = right.replace("Orla Venn", "Ivo Lark")
    assert read_statement(task, asked, wrong) == Statement.NOTHING


# ---- searches ------------------------------------------------------------------------------------
def test_the_searches_of_a_trajectory(codec: Codec) -> None:
    """Query, answer, context and fact of each; what the calculator says is no search."""
    question = question_about(fact_about("Silver River"), fact_about("Iron Hill"))
    trajectory = codec.build(
        question.question,
        [
            ("think", "director of Silver River?"),
            ("search", "Silver River"),
            ("result", "Silver River 1: A film."),
            ("think", "Not found."),
            ("search", "calculate: 1999 - 1950"),
            ("result", "49"),
            ("search", "search: Iron Hill film"),
            ("result", "Iron Hill 1: A film."),
            ("answer", "Eva Moss"),
        ],
    )
    first, second = cases_of(codec, question, trajectory)
    assert (first.query, first.real) == ("Silver River", "Silver River 1: A film.")
    assert (second.query, second.real) == ("Iron Hill film", "Iron Hill 1: A film.")
    assert [case.asked and case.asked.fact.id for case in (first, second)] == [
        "Silver River|director",
        "Iron Hill|director",
    ]
    for case in (first, second):
        assert case.context == trajectory.ids[: len(case.context)]
        assert case.context[-1] == codec.result_id
        assert trajectory.role[len(case.context) - 1] == Role.OBSERVATION
    assert cases_of(codec, None, trajectory)[0].asked is None


def test_which_fact_a_query_asks_for() -> None:
    """The subject in it; of one subject's facts the one that was thought of last."""
    director = fact_about("Silver River")
    star = fact_about("Silver River", "star", "Ada Falk")
    other = fact_about("Iron Hill")
    question = question_about(director, star, other)

    def asked(query: str, thoughts: str) -> str:
        found = find_asked_fact(question, query, thoughts)
        return found.fact.id if found else ""

    both = "director of Silver River? Eva. star of Silver River?"
    assert asked("silver river prize", "director of Silver River?") == director.id
    assert asked("Silver River", both) == star.id
    assert asked("Silver River", both + " director of Silver River?") == director.id
    assert asked("Iron Hill", both) == other.id
    assert asked("Carl Hart", both) == ""


def test_a_calculation_is_no_fact() -> None:
    """Guards: a search for a year that counts as asking for a difference of years."""
    calculation = Fact("1", ["?"], ["49"], "", [Lookup("?", ["1999 - 1950"], "calculate")])
    assert find_asked_fact(question_about(calculation), "1999 - 1950", "") is None


def test_training_and_held_out_searches(codec: Codec, task: NanoTask) -> None:
    """The teacher's searches, each with its fact; of SFT's chains the questions are found again."""
    questions = task.questions("held_out", 6)
    cases = held_out_cases(codec, task, questions, SETTINGS)
    chains, counts = write_chains(codec, questions, set(), task.rl_search, 48)
    expected = [
        query for _, chain in chains for query in chain.queries if not query.startswith("calc")
    ]
    assert [case.query for case in cases] == expected
    assert 6 <= len(expected) <= counts.searches
    for case in cases:
        assert case.asked is not None
        assert case.query in case.asked.lookup.queries
    # One chain's question is not among those that are given.
    again = training_cases(codec, [chain for _, chain in chains], questions[1:])
    assert [case.query for case in again] == expected
    assert [case.asked is None for case in again] == [
        case.question is questions[0] for case in cases
    ]


def test_searches_of_policies(codec: Codec, tmp_path: Path) -> None:
    """What the tool said counts, not what stood there; other worlds and lost searches do not."""
    question = question_about(fact_about("Silver River"))
    rows = []
    for text, query in (("Who directed it?", "Silver River"), ("Who starred?", "Iron Hill")):
        trajectory = codec.build(
            text,
            [
                ("search", query),
                ("result", "imagined"),
                ("search", "lost"),
                ("result", "Search failed."),
                ("answer", "Eva"),
            ],
        )
        rows.append(
            {
                "question": text,
                "golden_answers": ["Eva"],
                "reward": 1.0,
                "text": "",
                "ids": trajectory.ids,
                "role": trajectory.role,
                "mask": trajectory.mask,
                "tokens": [],
            }
        )
    calls = [
        {"query": "Silver River", "text": "A film. <b>", "provenance": "real"},
        {"query": "Silver River", "raw_calls": 2},
        {"query": "Iron Hill", "text": "A band.", "provenance": "real"},
        {"query": "lost", "text": "Search failed.", "provenance": "failed"},
    ]
    (tmp_path / "rl2").mkdir()
    for name, values in (("rollouts", rows), ("calls", calls)):
        text = "".join(json.dumps(value) + "\n" for value in values)
        (tmp_path / "rl2" / f"{name}.jsonl").write_text(text)
    (case,) = policy_cases(codec, tmp_path, [question], SETTINGS)
    assert (case.query, case.real) == ("Silver River", "A film. ‹b>")
    assert case.asked is not None


def test_a_query_counts_once() -> None:
    """The first search of each query; then searches at equal distances."""
    cases = [Case(query, query, [number], None, None) for number, query in enumerate("abacab")]
    assert [case.context for case in each_query_once(cases)] == [[0], [1], [3]]
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]


# ---- figures -------------------------------------------------------------------------------------
def outcome(
    imagined: str,
    entropy: float,
    statement: Statement | None = None,
    real: str = "Silver River 1: A film.",
    is_head: bool = False,
    is_found: bool = True,
    is_seen: bool | None = None,
) -> Outcome:
    """Return an outcome; without a statement nobody knows what it asks for."""
    fact = None if statement is None else FactOutcome(is_head, is_found, statement)
    return Outcome("q", real, imagined, entropy, 6.0, 4, fact, is_seen)


OUTCOMES = [
    outcome("Silver River 1: A film.", 0.1, Statement.RIGHT, is_head=True, is_seen=True),
    outcome("Silver River 1: A band.", 0.3, Statement.RIGHT, is_seen=True),
    outcome("Silver River 1: A film. It", 0.2, Statement.FALSE, is_seen=False),
    outcome("Iron Hill 1: A band.", 0.4, Statement.NOTHING, is_seen=False),
    outcome("Silver River 1: A film.", 0.15, Statement.FALSE, is_found=False, is_seen=False),
    outcome("Nothing found.", 0.5, real="Nothing found.", is_seen=False),
    outcome("Iron Hill 1: A film.", 0.9, Statement.FALSE, real="Nothing found.", is_found=False),
]


def test_figures_are_those_of_a_count_by_hand() -> None:
    """Of seven searches; the medium right statement has an entropy of 0.2."""
    assert confident_entropy(OUTCOMES) == pytest.approx(0.2)
    figures = summarize(OUTCOMES, 0.2)
    assert figures.searches == 7
    assert figures.exact == pytest.approx(3 / 7)
    assert figures.title_right == pytest.approx(5 / 7)
    assert figures.nothing_right == 1 / 2
    # Twice the shared words over the words of both; "a" is none.
    f1 = [1, 2 * 3 / 8, 2 * 4 / 9, 2 * 1 / 8, 1, 1, 0]
    assert figures.word_f1 == pytest.approx(np.mean(f1))
    assert figures.nll == pytest.approx(42 / 28)
    assert figures.entropy == pytest.approx(2.55 / 7)
    assert (figures.found_facts, figures.fact_right) == (4, 2 / 4)
    assert (figures.asked_facts, figures.falsehoods) == (6, 3 / 6)
    # Entropies 0.2 and 0.15 are no higher than the median; 0.9 is.
    assert figures.confident_falsehoods == pytest.approx(2 / 6)
    # Wrong 0.2 and 0.4 against right 0.1 and 0.3: three of four pairs are in order.
    assert figures.auroc == 3 / 4
    assert summarize(OUTCOMES, None).confident_falsehoods == 0


def test_splits() -> None:
    """By the fact and by the query; the threshold of confidence is that of the whole group."""
    splits = summarize_splits(OUTCOMES)
    sizes = {name: figures.searches for name, figures in splits.items()}
    assert sizes == {"all": 7, "head": 1, "tail": 5, "seen": 2, "unseen": 4}
    assert splits["tail"].confident_falsehoods == pytest.approx(2 / 5)
    assert splits["head"].auroc is None
    assert splits["unseen"].fact_right == 0
    unknown = summarize_splits([outcome("a", 0.1)])
    assert set(unknown) == {"all"}
    assert unknown["all"].fact_right is None
    assert unknown["all"].falsehoods is None


def test_auroc_by_hand() -> None:
    """Pairs in order over all pairs; a tie counts half; against a slow count on random scores."""
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert auroc(np.array([1.0, 1.0, 2.0]), np.array([True, False, False])) == 0.25
    assert auroc(np.array([1.0, 2.0]), np.array([True, True])) is None
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, 40)
    labels = rng.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))


def test_reliability() -> None:
    """Five equal groups by entropy, each with its mean and its share of exact ones."""
    outcomes = [outcome("x", entropy, real="x" if entropy < 5 else "y") for entropy in range(10)]
    groups = reliability(list(reversed(outcomes)))
    assert [group.searches for group in groups] == [2] * 5
    assert [group.entropy for group in groups] == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert [group.exact for group in groups] == [1, 1, 0.5, 0, 0]
    assert len(reliability(outcomes[:3])) == 3


def test_the_table_is_narrow() -> None:
    """Guards: lines that a terminal breaks."""
    figures = summarize(OUTCOMES, 0.2)
    line = table_line("world_model", "held out", figures)
    assert "42.9" in line
    empty = table_line("sft2", "policy", summarize([outcome("a", 0.1)], None))
    assert "-" in empty
    lines = [*table_heading().splitlines(), line, empty]
    assert max(map(len, lines)) < 120
    assert len(lines[-1]) == len(lines[-2]) == len(table_heading().splitlines()[-1])


def test_figures_travel_through_json(tmp_path: Path) -> None:
    """What is written is read again; what is damaged is named."""
    table = {"sft3": {"held out": summarize_splits(OUTCOMES)}}
    path = tmp_path / "fidelity.json"
    path.write_text(fidelity_to_json(table))
    assert read_fidelity(path) == table
    path.write_text('{"sft3": {"held out": {"all": {"searches": 1}}}}')
    with pytest.raises(UserError, match=r"cut or damaged; make it with: python world_model\.py"):
        read_fidelity(path)


# ---- what a model imagines -----------------------------------------------------------------------
def measure(lm: LM, kind: Kind, cases: list[Case], task: NanoTask, seen: Any = None) -> Any:
    with progress_bar(len(cases), None, "search") as bar:
        return measure_cases(lm, kind, cases, seen, task, SETTINGS, bar)


def test_a_world_model_is_measured_as_it_answers(lm: LM, task: NanoTask) -> None:
    """Texts and entropies are those of the tool that RL asks; seen queries are told apart."""
    fact = fact_about("Silver River")
    queries = ["Silver River", "Iron Hill", "Eva Moss film"]
    cases = [
        Case(query, "Iron Hill 1: A film.", [], None, AskedFact(fact, fact.lookups[0]))
        for query in queries
    ]
    outcomes = measure(lm, Kind.DISTILLED, cases, task, {"Iron Hill"})
    world_model = WorldModel(lm, SETTINGS)
    assert [o.imagined for o in outcomes] == [answer.text for answer in world_model(queries)]
    entropies = [o.entropy for o in outcomes]
    np.testing.assert_allclose(entropies, world_model.entropies(queries), rtol=1e-5)
    assert [o.is_seen for o in outcomes] == [False, True, False]
    assert all(o.fact is not None and not o.fact.is_found for o in outcomes)


def test_a_policy_is_measured_inside_its_trajectory(lm: LM, task: NanoTask) -> None:
    """The likelihood of the tool's words, against a forward pass over context and words."""
    codec = lm.codec
    question = question_about(fact_about("Silver River"))
    real = "Silver River 1: A film."
    trajectory = codec.build(
        "Who directed it?", [("think", "Hm"), ("search", "Silver River"), ("result", real)]
    )
    cases = cases_of(codec, question, trajectory)
    (measured,) = measure(lm, Kind.INTERNAL, cases, task)
    with torch.no_grad():
        ids = torch.tensor([trajectory.ids])
        logprobs = lm.network.logits(lm.network(ids)).log_softmax(-1)[0]
    start = len(cases[0].context)
    nll = -sum(float(logprobs[i - 1, ids[0, i]]) for i in range(start, len(trajectory.ids)))
    assert measured.real_nll == pytest.approx(nll, rel=1e-4)
    assert measured.real_tokens == len(trajectory.ids) - start
    assert measured.is_seen is None
    stops = [codec.end_result_id, codec.eos_id]
    written, _ = lm.decoder([cases[0].context]).decode(stops, [49], 0.0)
    assert measured.imagined == observation_text(codec, written[0])


def test_what_each_kind_sees(codec: Codec, lm: LM, task: NanoTask) -> None:
    """The trajectory, the query, or the query and the gold facts of a question that is known."""
    question = question_about(fact_about("Silver River"))
    case = Case("Iron Hill", "x", [1, 2, 3], question, None)
    assert case_prompt(codec, Kind.INTERNAL, case) == [1, 2, 3]
    assert case_prompt(codec, Kind.DISTILLED, case) == query_prompt(codec, "Iron Hill")
    told = query_prompt(codec, "Iron Hill", hint_of(question, USEFUL))
    assert case_prompt(codec, Kind.SIMULATOR, case) == told
    unknown = Case("Iron Hill", "x", [1, 2, 3], None, None)
    assert len(measure(lm, Kind.SIMULATOR, [case, unknown], task)) == 1


def test_an_empty_observation_finds_nothing(codec: Codec) -> None:
    """As a policy reads it."""
    assert observation_text(codec, [codec.end_result_id]) == "Nothing found."
    ids = [*codec.encode("A film"), codec.eos_id]
    assert observation_text(codec, ids) == "A film"


# ---- while RL runs -------------------------------------------------------------------------------
def test_the_short_form_counts_known_queries_alone() -> None:
    """Imagined, a search, and answered before; the name of the tool may stand before a query."""
    answers = {"Silver River": "A film.", "Iron Hill": "A band."}

    def imagined(text: str) -> Observation:
        return Observation(text, Provenance.IMAGINED)

    searches = [
        ("Silver River", imagined("A film.")),
        ("search: Iron Hill", imagined("A film.")),
        ("Iron Hill", imagined("A band.")),
        ("Eva Moss", imagined("A person.")),
        ("calculate: 1 + 1", imagined("3")),
        ("Silver River", Observation("A film.")),
    ]
    assert known_share(searches, answers) == pytest.approx(2 / 3)
    assert known_share(searches[3:], answers) is None


# ---- the command ---------------------------------------------------------------------------------
@pytest.fixture
def small_run(codec: Codec, task: NanoTask, tmp_path: Path) -> Path:
    """Return a folder with a run of random networks: SFT-2, SFT-3 and a world model."""
    root = tmp_path / "out" / "small"
    for number, name in enumerate(("sft2", "sft3", "world_model")):
        tiny_lm(codec, seed=number, noise=0.1).save(root / name)
    (root / "world_model" / "cost.json").write_text("{}")
    held_out = task.questions("held_out", 4)
    queries = [question.lookups[0].queries[0] for question in held_out[:2]]
    examples = write_examples([Example(query, "A film.") for query in queries])
    (root / "world_model" / "examples.jsonl").write_text(examples)
    chains, _ = write_chains(codec, task.questions("coa", 4), set(), task.search, 48)
    write_sft_data(root / "data", SFTData(chains_of_action=[chain for _, chain in chains]))
    return tmp_path


ARGUMENTS = (
    "--run=small",
    "--device=cpu",
    "--train_scale=1",
    "--eval_questions=1",
    "--searches=4",
    "--max_observation=48",
)


def test_the_command(small_run: Path) -> None:
    """A line for each model and group, all figures in JSON, a figure, and a page."""
    done = run_here(small_run, "world_model.py", "fidelity", *ARGUMENTS)
    assert done.status == 0, done.err
    root = small_run / "out" / "small"
    table = strict_json((root / "fidelity.json").read_text())
    assert list(table) == ["world_model", "sft2", "sft3"]
    # A distilled world model knows another world than that of SFT; no policy was trained here.
    groups = [list(table[row]) for row in table]
    assert groups == [["held out"], ["training", "held out"], ["training", "held out"]]
    for row in table:
        for group in table[row]:
            assert table[row][group]["all"]["searches"] == 4
            assert table[row][group]["all"]["asked_facts"] == 4
            assert any(line.startswith(f"{row:20}{group:10}") for line in done.out.splitlines())
    assert table["world_model"]["held out"]["seen"]["searches"] >= 1
    assert table["sft3"]["training"]["seen"]["searches"] == 4
    assert set(Fidelity.__dataclass_fields__) == set(table["sft2"]["training"]["all"])
    assert (root / "figures" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    page = (root / "figures" / "imagined.html").read_text()
    assert page.count("<article>") == 2 * 4
    assert "sft2" not in page


def test_rows_that_are_named(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only these are measured, and others keep what was measured before.

    One that is missing is refused with those that there are.
    """
    file = small_run / "out" / "small" / "fidelity.json"
    done = run_here(small_run, "world_model.py", "fidelity", *ARGUMENTS, "--rows=sft2")
    assert done.status == 0, done.err
    table = strict_json(file.read_text())
    assert list(table) == ["sft2"]
    file.write_text(json.dumps({"sft3": table["sft2"], "sft2": {}, "gone": {}}))
    done = run_here(small_run, "world_model.py", "fidelity", *ARGUMENTS, "--rows=sft2")
    assert done.status == 0, done.err
    assert strict_json(file.read_text()) == {"sft3": table["sft2"], "sft2": table["sft2"]}
    done = run_here(small_run, "world_model.py", "fidelity", *ARGUMENTS, "--rows=sft2,rl9")
    assert done.status == 2
    assert "--rows: out/small/rl9 is missing; there are: sft2, sft3, world_model" in done.err
    monkeypatch.chdir(small_run)
    with pytest.raises(UserError, match=r"sft3 is missing; make it with: python train_sft\.py"):
        rows_to_measure(TaskRunSettings(run="other"), [])
