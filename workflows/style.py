"""The one place that chooses how a model is asked: in words, or by tags."""

from types import ModuleType

from data.trajectory import Codec
from workflows import tags, words


def style_of(codec: Codec) -> ModuleType:
    """Return workflows.words for a model that was trained to be asked in words, else tags.

    Both have react_phrases, answer_from_memory, answer_directly and answer_from_passages.
    """
    return words if is_asked_in_words(codec) else tags


def is_asked_in_words(codec: Codec) -> bool:
    """Whether the model can be asked anything in words: it has a chat template."""
    return codec.has_chat_template
