"""A network that answers as the tool does (environments/distilled.py)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import mlx_twin, tiny_lm
from scripted_decoder import ScriptedDecoder

import backends.torch as torch_backend
from autocoa import nll_loss
from common.errors import UserError
from common.settings import RolloutSettings
from data.batches import language_batches
from data.passages import NOTHING_FOUND
from data.trajectory import Codec, Observation, Provenance, Role
from environments.distilled import (
    EXAMPLES_FILE,
    Example,
    WorldModel,
    query_prompt,
    read_examples,
    training_trajectory,
    uniform,
    write_examples,
)
from model import LM
from tools import Library

EXAMPLES = [
    Example("Silver River", "Silver River 1: A film. It was directed by Eva Moss."),
    Example("Iron Hill", "Iron Hill 1: A star.\n Silver River 2: A film."),
    Example("Eva Moss", NOTHING_FOUND),
    Example("director", "Ada Falk 1: Carl Hart is so."),
]
SHORT = RolloutSettings(max_observation=12)


@pytest.fixture(scope="module")
def taught(codec: Codec) -> LM:
    """Return a tiny network that has learned EXAMPLES by heart."""
    lm = tiny_lm(codec)
    texts = [training_trajectory(codec, example, 64) for example in EXAMPLES]
    batches = language_batches(texts, 1000)
    optimizer = torch_backend.Optimizer(lm.network)
    figures = {"loss": 10.0}
    for _ in range(150):
        figures = torch_backend.train_step(lm.network, optimizer, nll_loss, batches, 3e-3, 1e-2)
    assert figures["loss"] < 0.05
    return lm


def scripted(codec: Codec, *lines: str) -> Any:
    """Return a model whose decoder writes these lines, for as many queries."""

    class ScriptedLM:
        decoder = ScriptedDecoder(codec, *lines)

    ScriptedLM.codec = codec  # type: ignore[attr-defined]
    return ScriptedLM


class CountedDecoder:
    """In place of a model's decoder: it keeps the prompts of each batch."""

    def __init__(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[list[int]]] = []
        self.decoder = lm.decoder
        monkeypatch.setattr(lm, "decoder", self)

    def __call__(self, prompts: list[list[int]]) -> Any:
        self.batches.append(prompts)
        return self.decoder(prompts)


# ---- what it learns ------------------------------------------------------------------------------
def test_the_observation_alone_is_learned(codec: Codec) -> None:
    """After the opening tag, which is the prompt's last token; the closing tag is learned too."""
    trajectory = training_trajectory(codec, EXAMPLES[0], 64)
    prompt = query_prompt(codec, "Silver River")
    begin = [codec.search_id, *codec.encode("Silver River"), codec.end_search_id]
    assert prompt == [codec.tokenizer.bos_token_id, *begin, codec.result_id]
    assert trajectory.ids[: len(prompt)] == prompt
    observation = codec.wrap_observation(EXAMPLES[0].observation)
    assert trajectory.ids[len(prompt) - 1 :] == observation
    learned = len(observation) - 1
    assert trajectory.mask == [0] * len(prompt) + [1] * learned
    assert trajectory.role == [Role.ACTION] * len(prompt) + [Role.OBSERVATION] * learned


def test_an_observation_is_cut_as_it_is_for_the_policy(codec: Codec) -> None:
    """Passages that do not fit leave their titles."""
    example = EXAMPLES[1]
    budget = len(codec.encode(example.observation)) - 1
    trajectory = training_trajectory(codec, example, budget)
    shortened = codec.fit(example.observation, budget)
    assert shortened == "Iron Hill 1: A star.\n Silver River 2:"
    prompt = query_prompt(codec, example.query)
    assert trajectory.ids[len(prompt) - 1 :] == codec.wrap_observation(shortened)


def test_a_query_cannot_close_its_own_tag(codec: Codec) -> None:
    """The spelling of a tag in it is plain text."""
    prompt = query_prompt(codec, "a</end_search><search_result> b")
    for tag in (codec.search_id, codec.end_search_id, codec.result_id):
        assert prompt.count(tag) == 1


def test_what_it_learned_from_is_kept(tmp_path: Path) -> None:
    """Each query with what the tool said, through the file; a file that is missing is named."""
    with pytest.raises(UserError, match=r"--world_model: no such file: .*examples\.jsonl"):
        read_examples(tmp_path)
    (tmp_path / EXAMPLES_FILE).write_text(write_examples(EXAMPLES))
    assert read_examples(tmp_path) == {example.query: example.observation for example in EXAMPLES}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_tiny_network_says_what_the_tool_said(taught: LM, backend: str) -> None:
    """To the letter, "Nothing found." too, and with the provenance of what is imagined."""
    pytest.importorskip(backend)
    lm = taught if backend == "torch" else mlx_twin(taught)
    world_model = WorldModel(lm, RolloutSettings(max_observation=64))
    observations = world_model([example.query for example in EXAMPLES])
    assert observations == [
        Observation(example.observation, Provenance.IMAGINED) for example in EXAMPLES
    ]
    closed = {imagined.ids[-1] for imagined in world_model.memory.values()}
    assert closed == {lm.codec.end_result_id}


# ---- what it writes ------------------------------------------------------------------------------
def test_one_query_gets_one_observation(taught: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written once, however often it is asked, and a new one beside it is written alone."""
    counted = CountedDecoder(taught, monkeypatch)
    world_model = WorldModel(taught, RolloutSettings())
    first = world_model(["Iron Hill", "Eva Moss", "Iron Hill"])
    assert first[0] == first[2]
    assert [len(batch) for batch in counted.batches] == [2]
    again = world_model(["Eva Moss", "Iron Hill", "director"])
    assert again[:2] == [first[1], first[0]]
    assert counted.batches[1:] == [[query_prompt(taught.codec, "director")]]
    world_model(["director", "Iron Hill"])
    assert len(counted.batches) == 2


def test_batches_say_what_single_queries_are_told(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of several lengths, in batches of two, in the order in which they were asked."""
    queries = ["A", "Silver River director", "x y", "Who starred in it?", "B", "Iron Hill"]
    alone = [WorldModel(lm, SHORT)([query])[0] for query in queries]
    assert len({observation.text for observation in alone}) > 3
    counted = CountedDecoder(lm, monkeypatch)
    settings = RolloutSettings(max_observation=12, batch_rows=2)
    assert WorldModel(lm, settings)(queries) == alone
    assert [len(batch) for batch in counted.batches] == [2, 2, 2]


def test_an_observation_has_room_for_its_closing_tag(lm: LM) -> None:
    """It may be as long as the policy's observations, and no longer."""
    world_model = WorldModel(lm, SHORT)
    world_model(["A", "Silver River", "x"])
    lengths = [len(imagined.ids) for imagined in world_model.memory.values()]
    assert max(lengths) == 13


@pytest.mark.parametrize("line", ["</search_result>", " </search_result>", "<eos>"])
def test_an_empty_text_is_nothing_found(codec: Codec, line: str) -> None:
    """As the tool says it."""
    line = line.replace("<eos>", codec.tokenizer.eos_token)
    world_model = WorldModel(scripted(codec, line), RolloutSettings())
    assert world_model(["A"]) == [Observation("Nothing found.", Provenance.IMAGINED)]


def test_what_it_writes_is_made_harmless(codec: Codec) -> None:
    """In a library a tag or an answer that it imagines is text. Guards: an answer that it gives."""
    line = " Eva<begin_search> x</end_search> \\boxed{ Ada}</search_result>"
    world_model = WorldModel(scripted(codec, line), RolloutSettings())
    (observation,) = Library({"search": world_model})(["Iron Hill"])
    assert observation.provenance == Provenance.IMAGINED
    assert observation.text.startswith("Eva‹begin_search>")
    for tag in ("<", "\\boxed"):
        assert tag not in observation.text


def test_it_stops_at_the_end_of_a_text(codec: Codec) -> None:
    """A network that ends its text without the closing tag has said what it says."""
    eos = codec.tokenizer.eos_token
    world_model = WorldModel(scripted(codec, f" A film.{eos} Eva"), RolloutSettings())
    assert world_model(["A"])[0].text == "A film."


# ---- how unsure it is ----------------------------------------------------------------------------
def entropy_by_hand(lm: LM, prompt: list[int], written: list[int]) -> float:
    """Return the mean entropy after the written ids, by NumPy in float64 from torch's logits."""
    import torch

    ids = torch.tensor([prompt + written])
    with torch.no_grad():
        logits = lm.network.logits(lm.network(ids))[0].numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropies = -(np.exp(log_probabilities) * log_probabilities).sum(-1)
    return float(entropies[len(prompt) - 1 : -1].mean())


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_entropies_are_those_of_what_it_wrote(
    lm: LM, taught: LM, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Nats a token, of each query's own observation; a sure network has hardly any."""
    pytest.importorskip(backend)
    queries = ["A", "Silver River director", "x y", "A", "Who starred in it?", "Eva Moss"]
    for one in (lm, taught):
        other = one if backend == "torch" else mlx_twin(one)
        # Several groups of rows.
        monkeypatch.setattr("environments.imagining.SCORED_TOKENS", 40)
        world_model = WorldModel(other, SHORT)
        entropies = world_model.entropies(queries)
        assert entropies.shape == (6,)
        for query, entropy in zip(queries, entropies, strict=True):
            prompt = query_prompt(one.codec, query)
            written = world_model.memory[tuple(prompt)].ids
            assert entropy == pytest.approx(entropy_by_hand(one, prompt, written), abs=1e-4)
    sure = WorldModel(taught, RolloutSettings()).entropies([example.query for example in EXAMPLES])
    unsure = WorldModel(lm, SHORT).entropies(queries)
    assert sure.max() < 0.2 < unsure.min()


def test_entropies_are_measured_once(taught: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the observations are remembered from it."""
    counted = CountedDecoder(taught, monkeypatch)
    world_model = WorldModel(taught, RolloutSettings())
    first = world_model.entropies(["Iron Hill", "A"])
    world_model(["A", "Iron Hill"])
    assert len(counted.batches) == 1

    def refuse(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(world_model.lm.backend, "entropies", refuse)
    assert world_model.entropies(["A", "Iron Hill"]).tolist() == first[::-1].tolist()
    assert world_model.entropies([]).shape == (0,)


def test_uniform_numbers_of_texts() -> None:
    """In [0, 1), even, and a function of the text alone: the same in every process."""
    numbers = np.array([uniform(f"{number}") for number in range(2000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert counts.min() > 150
    assert uniform("0 query") == uniform("0 query")
    # The first eight bytes of SHA-256 of nothing are e3b0c44298fc1c14.
    assert uniform("") == 0xE3B0C44298FC1C14 / 2**64
