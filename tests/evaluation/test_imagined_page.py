"""The page that shows imagined observations beside what the tool says."""

from html.parser import HTMLParser
from typing import Any

from evaluation.viewer import Piece, ShownModel, compare_texts, render_imagined

ATTACK = "</pre><script>alert(1)</script><img src=x onerror='alert(1)'>&amp;\""
REAL = "Silver River 1: A film. Eva Moss directed it.\n Iron Hill 2: A band."
IMAGINED = "Silver River 1: A film. Ada Falk directed it."


class Reader(HTMLParser):
    """Collects the names of the tags, and the text inside <pre>, <del> and <ins>."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {"pre": [], "del": [], "ins": []}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "pre":
            self.texts["pre"].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.texts["pre"][-1] += data
            if self.open[-1] != "pre":
                self.texts[self.open[-1]].append(data)


def read_page(*models: ShownModel) -> Reader:
    reader = Reader()
    reader.feed(render_imagined(models))
    return reader


def test_differences_are_marked() -> None:
    """On each side the words that the other lacks, and no others; both texts stay whole."""
    comparison = compare_texts("Silver River", REAL, IMAGINED)
    assert not comparison.is_exact
    assert comparison.imagined == [
        Piece("Silver River 1: A film. ", True),
        Piece("Ada Falk ", False),
        Piece("directed it.", True),
    ]
    reader = read_page(ShownModel("sft3", [comparison]))
    assert reader.texts["pre"] == [REAL, IMAGINED]
    assert reader.texts["del"] == ["Eva Moss ", "Iron Hill 2: A band."]
    assert reader.texts["ins"] == ["Ada Falk "]


def test_an_exact_observation_has_no_marks() -> None:
    """It is said to be exact, and counted."""
    comparison = compare_texts("Silver River", REAL, REAL)
    page = render_imagined([ShownModel("sft3", [comparison])])
    assert comparison.is_exact
    assert "1 of 1 to the letter" in page
    reader = read_page(ShownModel("sft3", [comparison]))
    assert reader.texts["del"] + reader.texts["ins"] == []


def test_the_page_escapes_everything() -> None:
    """Guards: markup in a query, a title or an observation that a browser would obey."""
    model = ShownModel(ATTACK, [compare_texts(ATTACK, ATTACK + " one", ATTACK + " two")])
    reader = read_page(model)
    assert not reader.tags & {"script", "img"}
    assert reader.texts["pre"] == [ATTACK + " one", ATTACK + " two"]
    assert (reader.texts["del"], reader.texts["ins"]) == (["one"], ["two"])


def test_what_steers_a_page_is_spelled_out() -> None:
    """Guards: a text that an override turns around, and NUL, which no page may hold.

    In the query, the title of a model and both observations.
    """
    steering = "a\u202eb\x00c\x1b[2Jd\ud83d"
    comparison = compare_texts(steering, f"{steering} one", f"{steering} two")
    page = render_imagined([ShownModel(steering, [comparison])])
    page.encode()
    assert not set(page) & {"\u202e", "\x00", "\x1b"}
    assert page.count(r"a\u202eb\x00c\x1b[2Jd\ud83d") == 4
