r"""The box of an answer, `\boxed{answer}`: where it ends, and what stands in it.

An answer may hold braces of its own, as `\frac{1}{2}` does, so they are counted. All that reads a
box reads it here, but for workflows/spelled.py, which reads it as the authors' code does.
"""

TEXT = "\\text{"


def closing_brace(text: str) -> int:
    r"""Return the position of the brace that closes what was opened before a text; -1 for none.

    >>> closing_brace(r"\frac{1}{2}} so")
    11
    """
    depth = 1
    for position, letter in enumerate(text):
        if letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
        if depth == 0:
            return position
    return -1


def answer_in_box(text: str) -> str:
    r"""Return the answer at the beginning of a text that follows `\boxed{`.

    A box that is never closed holds all of the text.

    >>> answer_in_box(r" \text{Eva Moss}} she said")
    'Eva Moss'
    """
    answer = _before_closing_brace(text).strip()
    # Reasoning models write \boxed{\text{..}}.
    if answer.startswith(TEXT):
        inside = answer.removeprefix(TEXT)
        # What follows it in the box would be lost.
        if closing_brace(inside) in (-1, len(inside) - 1):
            return _before_closing_brace(inside).strip()
    return answer


def _before_closing_brace(text: str) -> str:
    end = closing_brace(text)
    return text if end == -1 else text[:end]
