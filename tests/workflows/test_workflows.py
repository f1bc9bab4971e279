"""Workflows around a model: ReAct, Reflexion, reading, closed book and answers at once."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU
from scripted_decoder import ScriptedDecoder
from small_checkpoint import save_checkpoint
from tokenizers import processors

import model
import tools
from autocoa import random_stream
from common.settings import RolloutSettings
from data.questions import Question
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from model import LM
from workflows import reflexion as reflexion_module
from workflows import tags, words
from workflows.agent import Answered, roll_out_questions
from workflows.gold import gold_observation
from workflows.prompts import REACT_EXAMPLES
from workflows.react import react
from workflows.reflexion import prefers_no, reflexion
from workflows.style import style_of
from workflows.words import beginning_of_text


def says(text: str) -> Any:
    """Return a tool that says the same to every query."""
    return lambda queries, _=None: [Observation(text)] * len(queries)


def replace_decoder(monkeypatch: pytest.MonkeyPatch, lm: LM, write: Any) -> None:
    """Let `write`, given the row's text so far, say what a row writes instead of the network."""

    class Decoder:
        def __init__(self, prompts: Any) -> None:
            self.rows = [list(prompt) for prompt in prompts]

        def keep(self, rows: Any) -> None:
            self.rows = [list(self.rows[row]) for row in rows]

        def feed(self, sequences: Any) -> None:
            for row, ids in zip(self.rows, sequences, strict=True):
                row += ids

        def decode(
            self,
            stops: Any,
            limits: Any,
            temperature: Any,
            rng: Any = None,
            writing_share: float = 0.0,
        ) -> Any:
            written = []
            for row, limit in zip(self.rows, limits, strict=True):
                ids = write(lm.codec.decode(row))[:limit]
                row += ids
                written.append(ids)
            return written, [[0.0] * len(ids) for ids in written]

    monkeypatch.setattr(lm, "decoder", Decoder, raising=False)


def test_rollouts_come_back_in_the_order_of_their_questions(lm: LM) -> None:
    """They are decoded with others of like length."""
    questions = [
        "Who directed it?",
        "Who?",
        "Who starred in Silver River film of Eva Moss?",
        "A",
        "Who was born in 1950?",
    ]
    settings = RolloutSettings(max_actions=0, batch_rows=2, max_len=60)
    trajectories = roll_out_questions(lm, questions, None, settings)
    for question, trajectory in zip(questions, trajectories, strict=True):
        prompt = lm.codec.prompt(question)
        assert trajectory.ids[: len(prompt)] == prompt
        assert trajectory.role.count(Role.PROMPT) == len(prompt)


def test_a_stream_stays_with_its_question(lm: LM) -> None:
    """Each is answered as it would be alone with its own random numbers.

    The longest question comes first. Guards: streams that stay in place while questions are put in
    the order of their lengths.
    """
    questions = ["Who directed Silver River in 1950?", "Who?", "Who directed it?"]
    settings = RolloutSettings(max_len=60, max_answer=4)
    streams = [random_stream(60, number) for number in range(len(questions))]
    together = roll_out_questions(lm, questions, None, settings, temperature=1.0, streams=streams)
    for question, stream, trajectory in zip(questions, streams, together, strict=True):
        (alone,) = roll_out_questions(
            lm, [question], None, settings, temperature=1.0, streams=[stream]
        )
        assert trajectory.ids == alone.ids


def test_a_workflow_sees_what_fits(lm: LM) -> None:
    """ReAct's observations have at most max_observation tokens, like those of agents."""
    long = "Silver River 1: A film. It was directed by Eva Moss.\n Iron Hill 2: A film."
    settings = RolloutSettings(max_len=400, max_observation=10, max_thought=8)
    ((_, trajectory),) = react(
        lm, ["Who?"], says(long), settings, tags.react_phrases(lm.codec), max_actions=2
    )
    fitted = lm.codec.fit(long, 10)
    assert fitted != long
    assert trajectory.observations
    assert all(observation.text == fitted for observation in trajectory.observations)


@pytest.mark.parametrize("calls", [0, 1, 6])
def test_a_workflow_calls_as_often_as_an_agent(
    lm: LM, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Calls stop at max_actions, where the model goes on asking; then it must answer.

    Guards: four calls whatever the setting said; an end-of-turn token in answers and queries.
    """
    codec = lm.codec

    def write(text: str) -> Any:
        if text.endswith("\\boxed{"):
            return [*codec.encode("Eva Moss"), codec.eos_id]
        if text.endswith("<begin_search>"):
            return [*codec.encode("Silver River"), codec.eos_id]
        return codec.encode("director of it?")

    replace_decoder(monkeypatch, lm, write)
    queries = []

    def tool(actions: list[str], _: Any = None) -> Any:
        queries.extend(actions)
        return [Observation("Silver River 1: A film.")] * len(actions)

    settings = RolloutSettings(max_actions=calls or 3)
    max_actions = 0 if calls == 0 else None
    phrases = tags.react_phrases(codec)
    ((answer, trajectory),) = react(lm, ["Who?"], tool, settings, phrases, max_actions=max_actions)
    assert answer == "Eva Moss"
    assert trajectory.queries == queries == ["Silver River"] * calls
    assert trajectory.ids.count(codec.boxed_id) == 1


def test_the_lines_of_an_instruct_models_workflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is on a line of its own, also after one that was cut or that ended the turn.

    The answer is what follows `Answer:`. Guards: "the writer ofSearch:"; "The answer is not known
    yet" taken for an answer.
    """
    save_checkpoint(tmp_path / "x")
    lm = model.load_pretrained(str(tmp_path / "x"), CPU)

    def encode(text: str) -> Any:
        return lm.codec.tokenizer.encode(text, add_special_tokens=False)

    turns = iter(
        [
            encode(" The answer is not known yet."),
            [*encode(" The Clay Hour"), lm.codec.eos_id],
            encode(" Orla Venn wrote it. Answer: Orla Venn\n"),
        ]
    )
    replace_decoder(monkeypatch, lm, lambda text: next(turns))
    ((answer, trajectory),) = react(
        lm,
        ["Who wrote The Clay Hour?"],
        says("The Clay Hour 1: A novel."),
        RolloutSettings(max_len=2000),
        words.react_phrases(lm.codec, REACT_EXAMPLES),
    )
    text = lm.codec.decode(trajectory.ids).removeprefix(REACT_EXAMPLES).replace("</s>", "")
    assert text == (
        "Question: Who wrote The Clay Hour?\n"
        "Thought: The answer is not known yet.\n"
        "Search: The Clay Hour\n"
        "Observation: The Clay Hour 1: A novel.\n"
        "Thought: Orla Venn wrote it. Answer: Orla Venn\n"
    )
    assert answer == "Orla Venn"
    assert trajectory.queries == ["The Clay Hour"]

    # A checkpoint whose texts begin with a token of their own.
    begins_texts = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    lm.codec.tokenizer.backend_tokenizer.post_processor = begins_texts
    assert beginning_of_text(lm.codec) == [1]
    assert words.react_phrases(lm.codec, "").prompt("Who?")[:1] == [1]


@pytest.mark.parametrize("has_template", [False, True])
def test_the_style_of_a_model(lm: LM, tmp_path: Path, has_template: bool) -> None:
    """A checkpoint from elsewhere is asked in words, the nano model by tags, also when saved.

    Guards: a base model without a chat template that was asked by tags which it has never seen.
    """
    lm.save(tmp_path / "nano")
    assert style_of(model.load(tmp_path / "nano", CPU).codec) is tags
    save_checkpoint(tmp_path / "x")
    if not has_template:
        (tmp_path / "x" / "chat_template.jinja").unlink()
    adopted = model.load_pretrained(str(tmp_path / "x"), CPU)
    assert adopted.codec.has_chat_template == has_template
    assert style_of(adopted.codec) is words
    adopted.save(tmp_path / "base")
    assert style_of(model.load(tmp_path / "base", CPU).codec) is words


def test_a_workflow_keeps_the_braces_of_an_answer(codec: Codec) -> None:
    """Guards: the fraction whose last brace is lost, so that it does not equal itself."""
    lm: Any = SimpleNamespace(codec=codec, decoder=ScriptedDecoder(codec, " Hm\n \\frac{1}{2}\n"))
    phrases = words.react_phrases(codec, "")
    settings = RolloutSettings(max_len=400)
    ((answer, _),) = react(lm, ["Who?"], None, settings, phrases, max_actions=0)
    assert answer == r"\frac{1}{2}"


@pytest.mark.parametrize("style", [tags, words])
def test_every_end_of_a_text_ends_a_turn(codec: Codec, style: Any) -> None:
    """Guards: an end-of-turn token that the tokenizer does not name, read as a part of answers."""
    codec = Codec(codec.tokenizer, [codec.tokenizer.pad_token_id])
    settings = RolloutSettings(max_len=400)
    lm: Any = SimpleNamespace(codec=codec, decoder=ScriptedDecoder(codec, " Eva<pad> Moss"))
    ((answer, _),) = style.answer_directly(lm, ["Who?"], settings)
    assert answer == "Eva"
    lm.decoder = ScriptedDecoder(codec, " Hm<pad> Eva Moss<pad> it")
    phrases = style.react_phrases(codec, "")
    ((answer, trajectory),) = react(lm, ["Who?"], None, settings, phrases, max_actions=0)
    assert answer == "Eva Moss"
    assert trajectory.ids.count(codec.tokenizer.pad_token_id) == 2


def test_a_workflow_answers_each_row_for_itself(lm: LM) -> None:
    """A question gets the same answer alone and beside one that has no room left.

    Guards: the longest row of a batch ended the loop for all.
    """
    questions = ["Who?", "Who directed it? " * 70, "A"]
    phrases = tags.react_phrases(lm.codec)
    found = {}
    for batch_rows in (1, 3):
        settings = RolloutSettings(
            max_len=420, max_thought=12, max_actions=3, batch_rows=batch_rows
        )
        tool = says("Silver River 1: A film.")
        found[batch_rows] = [
            (answer, trajectory.ids, trajectory.queries)
            for answer, trajectory in react(lm, questions, tool, settings, phrases)
        ]
    assert found[1] == found[3]
    calls = [len(queries) for _, _, queries in found[3]]
    assert calls[0] == 3 > calls[1]


@pytest.mark.parametrize(
    ("gold_ids", "golden", "expected"),
    [
        (["2"], "x", "Iron Hill 1: A town."),
        (["1"], "x", "Iron Hill 1: A band."),
        (["9"], "x", "Iron Hill 1: A band."),
        ([], "x", "Iron Hill 1: A band."),
        ([], "a TOWN", "Iron Hill 1: A town."),
    ],
)
def test_gold_passages(gold_ids: list[Any], golden: str, expected: str) -> None:
    """Of two passages with one title: the one that is marked, else the one with an answer."""
    contents = ['"Iron Hill"\nA band.', '"Eva Moss"\nA judge.', '"Iron Hill"\nA town.']
    passages = [{"id": str(number), "contents": text} for number, text in enumerate(contents)]
    question = Question("1", "Where?", [golden], gold_titles=["Iron Hill"], gold_ids=gold_ids)
    assert gold_observation(question, tools.library(passages, 1)) == expected


# ---- Reflexion -----------------------------------------------------------------------------------
class ScriptedReflexion:
    """Stands for the three things that Reflexion asks a model for."""

    def __init__(self, codec: Codec, tries: Any, wrong: Any) -> None:
        self.codec = codec
        self.tries = tries  # by question: the answers of its tries
        self.wrong = wrong  # by answer: whether the model calls it wrong
        self.calls = []  # (question, lessons so far) of each try

    def react(
        self,
        lm: LM,
        questions: Any,
        search: Any,
        settings: Any,
        phrases: Any,
        description: Any = None,
    ) -> Any:
        answered = []
        for question in questions:
            name, _, lessons = question.partition("?")
            self.calls.append((name, lessons.count("Lesson from try")))
            trajectory = Trajectory()
            trajectory.add(self.codec.encode(f"Question: {name}"), Role.PROMPT, 0)
            trajectory.queries = [f"{name} {len(self.calls)}"]
            trajectory.observations = [Observation(f"of {len(self.calls)}")]
            answered.append(Answered(self.tries[name].pop(0), trajectory))
        return answered

    def complete_lines(
        self, lm: LM, texts: Any, budget: Any, settings: Any, description: Any = None
    ) -> Any:
        for text in texts:
            assert "wrong or not supported" in text.split("answer that was given")[1]
        return [Answered("look again.", Trajectory())] * len(texts)

    def prefers_no(self, lm: LM, texts: Any, settings: Any) -> list[Any]:
        assert all("Yes or No" in text for text in texts)
        return [self.wrong[self._answer_in(text)] for text in texts]

    def _answer_in(self, text: str) -> Any:
        if " is: none\n" in text:
            return ""
        return next(answer for answer in self.wrong if f" is: {answer}\n" in text)


@pytest.fixture
def scripted_reflexion(lm: LM, monkeypatch: pytest.MonkeyPatch) -> Any:
    script = ScriptedReflexion(
        lm.codec,
        tries={"a": ["x", "", "z", "never"], "b": ["right at once"], "c": ["x", "good"]},
        wrong={
            "x": True,
            "": False,
            "z": True,
            "right at once": False,
            "good": False,
            "late": False,
        },
    )
    for name in ("react", "complete_lines", "prefers_no"):
        monkeypatch.setattr(reflexion_module, name, getattr(script, name))
    return script


def test_reflexion_tries_again(lm: LM, scripted_reflexion: Any) -> None:
    """A missing or doubted answer gets a lesson and another try, three at most.

    An answer that the model does not doubt is final. Queries and observations of all tries count.
    """
    answered = reflexion(lm, ["a?", "b?", "c?"], None, RolloutSettings())
    assert [answer for answer, _ in answered] == ["z", "right at once", "good"]
    assert scripted_reflexion.calls == [
        ("a", 0),
        ("b", 0),
        ("c", 0),
        ("a", 1),
        ("c", 1),
        ("a", 2),
    ]
    queries = [trajectory.queries for _, trajectory in answered]
    assert queries == [["a 1", "a 4", "a 6"], ["b 2"], ["c 3", "c 5"]]
    observations = answered[2].trajectory.observations
    assert [observation.text for observation in observations] == ["of 3", "of 5"]


def test_reflexion_begins_with_what_react_said(lm: LM, scripted_reflexion: Any) -> None:
    """ReAct's answer is the first try, where it is there, and is not changed."""
    scripted_reflexion.tries["a"] = ["late"]
    trajectory = Trajectory()
    trajectory.add(lm.codec.encode("Question: a"), Role.PROMPT, 0)
    first_try = [Answered("x", trajectory)]
    ((answer, _),) = reflexion(lm, ["a?"], None, RolloutSettings(), first_try)
    assert answer == "late"
    assert scripted_reflexion.calls == [("a", 1)]
    assert first_try[0].answer == "x"


def test_no_is_read_off_the_next_token(lm: LM) -> None:
    """Yes or No by which is likelier as the next token, whatever is likelier than both.

    Guards: SmolLM2 begins a new line there, which was read as a yes.
    """
    texts = [f"Is it so? {number} Yes or No:" for number in range(12)] + ["Who?"]

    def encode(text: str) -> Any:
        return lm.codec.tokenizer.encode(text, add_special_tokens=False)

    yes, no = encode("Answer: Yes")[-1], encode("Answer: No")[-1]
    assert yes != no
    expected = []
    for text in texts:
        ids = torch.tensor([beginning_of_text(lm.codec) + encode(text)])
        with torch.no_grad():
            logits = lm.network.logits(lm.network(ids))[0, -1]
        expected.append(bool(logits[no] > logits[yes]))
    assert 0 < sum(expected) < len(texts)
    assert prefers_no(lm, texts, RolloutSettings(batch_rows=3)) == expected


def test_the_try_without_its_examples(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model judges is its own try.

    Guards: ReAct's examples left in front where a text begins with BOS, as Llama 3's do.
    """
    tokenizer = copy.deepcopy(lm.codec.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    codec = Codec(tokenizer)
    judged = []

    def no_doubt(lm: LM, texts: Any, settings: Any) -> Any:
        judged.extend(texts)
        return [False] * len(texts)

    monkeypatch.setattr(reflexion_module, "prefers_no", no_doubt)
    text = f"{REACT_EXAMPLES}Question: Who?"
    ids = beginning_of_text(codec) + codec.tokenizer.encode(text, add_special_tokens=False)
    trajectory = Trajectory()
    trajectory.add(ids, Role.PROMPT, 0)
    first_try = [Answered("Eva", trajectory)]
    reflexion(SimpleNamespace(codec=codec), ["Who?"], None, RolloutSettings(), first_try)
    assert beginning_of_text(codec)
    assert judged[0].startswith("Question: Who?\n")


# ---- reading -------------------------------------------------------------------------------------
def observed_text(codec: Codec, trajectory: Trajectory) -> Any:
    tokens = zip(trajectory.ids, trajectory.role, strict=True)
    return codec.decode([token for token, role in tokens if role == Role.OBSERVATION])


def test_reading_several_facts(codec: Codec) -> None:
    """A reader asks for one fact after the other, as it was pretrained to; the last answers.

    Guards: cut at the second ask, and an answer forced there.
    """
    given = (
        "Silver River 1: A film. Eva Moss starred in it."
        "\n Eva Moss 2: A star. She was born in 1950."
    )
    line = (
        " 1 star of Silver River 2 born. 1 star of Silver River? Silver River 1 starred Eva Moss."
        " 2 born of Eva Moss? Eva Moss 2 was born in 1950.</think>\\boxed{ 1950}<eos>"
    )
    lm = SimpleNamespace(codec=codec, decoder=ScriptedDecoder(codec, line))
    question = "When was the star of Silver River born?"
    settings = RolloutSettings(max_len=300)
    ((answer, trajectory),) = tags.answer_from_passages(lm, [question], [given], settings)
    assert answer == "1950"
    assert observed_text(codec, trajectory) == f"<search_result> {given}</search_result>"


def test_a_reader_that_never_ends(codec: Codec) -> None:
    """It is asked for an answer, with room for one."""
    line = " 1 star? it goes on and on" + " and on" * 300
    lm = SimpleNamespace(codec=codec, decoder=ScriptedDecoder(codec, line))
    settings = RolloutSettings(max_len=200)
    given = ["Silver River 1: A film. Eva Moss starred in it."]
    ((_, trajectory),) = tags.answer_from_passages(lm, ["Who?"], given, settings)
    assert len(trajectory.ids) <= 200
    # Two tags ask for the answer, which has the 12 tokens of max_answer.
    assert trajectory.role.count(Role.ANSWER) == 2 + 12


def test_reading_what_is_given(lm: LM) -> None:
    """Each question gets its own passages, whole, after a thought; no search is run."""
    given = ["Silver River 1: A film.", "Iron Hill 1: A film. It was directed by Ada Falk."]
    questions = ["Who directed Silver River?", "Who?"]
    settings = RolloutSettings(max_len=300, max_thought=8)
    answered = tags.answer_from_passages(lm, questions, given, settings)
    for (_, trajectory), passages in zip(answered, given, strict=True):
        assert trajectory.queries == []
        assert trajectory.observations == [Observation(passages, Provenance.REAL)]
        assert observed_text(lm.codec, trajectory) == f"<search_result> {passages}</search_result>"
        assert trajectory.role.index(Role.OBSERVATION) > trajectory.role.index(Role.THINK)


def test_an_answer_at_once(lm: LM) -> None:
    """The box is opened after the question, and what is written in it is the answer."""
    questions = ["Who?", "Who directed Silver River?", "A"]
    codec = lm.codec
    settings = RolloutSettings(batch_rows=2, max_answer=5)
    answered = tags.answer_directly(lm, questions, settings)
    for question, (answer, trajectory) in zip(questions, answered, strict=True):
        prompt = codec.prompt(question)
        assert trajectory.ids[: len(prompt)] == prompt
        assert trajectory.role[-1] == Role.ANSWER
        decoder = lm.decoder([[*prompt, codec.end_think_id, codec.boxed_id]])
        (ids,), _ = decoder.decode([codec.brace_id, codec.eos_id], [5], 0.0)
        written = codec.decode(ids).replace("}", "").replace("<eos>", "").strip()
        assert answer == written


def test_the_seed_of_sampling_is_the_callers(lm: LM) -> None:
    """The same stream of numbers gives the same rollout, another one gives another."""
    settings = RolloutSettings(max_actions=0, max_len=60)
    found = []
    for seed in (0, 0, 1):
        streams = [np.random.default_rng(seed).random(settings.max_len)]
        (trajectory,) = roll_out_questions(
            lm, ["Who?"], None, settings, temperature=1.0, streams=streams
        )
        found.append(trajectory.ids)
    assert found[0] == found[1] != found[2]
