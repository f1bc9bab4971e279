"""The one place that chooses how a model is asked: in words, or by tags."""

from types import ModuleType

from data.trajectory import Codec
from workflows import tags, words


def style_of(codec: Codec) -> ModuleType:
    """Return workflows.words for a model that was pretrained on words, else tags.

    Both have react_phrases, answer_from_memory, answer_directly and answer_from_passages.
    """
    return words if is_asked_in_words(codec) else tags


def is_asked_in_words(codec: Codec) -> bool:
    """Whether the model goes on with lines of text, as every checkpoint from elsewhere does.

    The nano model was pretrained with the tags, and understands nothing else.
    """
    return codec.has_chat_template or not codec.was_pretrained_with_tags
