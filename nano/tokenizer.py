"""The tokenizer of the nano model: a byte-level BPE in which every word of a name is one token."""

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.questions import Fact
from data.trajectory import TAGS
from nano.pretraining import TO_QUERY, TO_READ
from nano.questions import SETS, draw_questions
from nano.world import NAMES, SIZES, World

if TYPE_CHECKING:
    # It takes seconds to import, which --help need not wait for.
    from transformers import PreTrainedTokenizerFast

# A text is cut here before pairs are merged: qualifiers such as " (film)", words, numbers and
# punctuation, each with the space before it.
PIECES = r" \([a-z]+\)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s"


def train_tokenizer(vocab_size: int, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Return a tokenizer trained on some texts; the tags are single tokens in it."""
    # It takes seconds to import, which --help need not wait for.
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split_pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>", *TAGS.values()],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=list(TAGS.values()),
        clean_up_tokenization_spaces=False,
    )


def tokenizer_texts(world: World) -> Iterator[str]:
    """Yield what the nano tokenizer is trained on: texts of one training world, and all names."""
    rng = random.Random("text")
    for title, article in world.articles.items():
        yield f" {title}: {article}"
    for set_name in SETS:
        for question in draw_questions(world, set_name, 400, rng):
            yield f" {question.question} {question.plan}"
            for fact in question.facts:
                yield _fact_text(fact)
    years = [str(year) for year in range(1900, 2000)]
    small_numbers = [str(number) for number in range(1, 100)]
    qualifiers = [f"({qualifier})" for qualifier in [*NAMES["jobs"], *SIZES]]
    # Often enough that each of these words becomes one token.
    for word in itertools.chain(*NAMES.values(), years, small_numbers, qualifiers):
        yield f" {word}" * 40
    fixed_words = (
        f" {TO_QUERY} {TO_READ} I recall it. It is so. Not found. In order: 1, 2. 1 is before 2. "
        "First is at 1. Later is at 2. Nothing found. Difference? difference of 2 and 1? "
        "calculate: 2 - 1. It is 1."
    )
    yield fixed_words * 40


def _fact_text(fact: Fact) -> str:
    """Return all that chains say of a fact, with passage 1 as the place where it was read."""
    lookup = fact.lookups[0]
    statement = lookup.statement.replace("{n}", "1")
    if not lookup.is_search:
        # No chain says this of a difference, but the tokenizers of all runs were trained on it.
        statement = f" 1 says difference {fact.answers[0]}."
    return f" {lookup.ask} {fact.recall} {statement} {' '.join(lookup.queries)}"
