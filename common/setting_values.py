"""What the value of a setting may be: types, ranges and choices, and the errors that name them."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from common.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """What a number must be, beside finite and not negative."""

    above_zero: bool = False
    below_one: bool = False
    at_most_one: bool = False


# Every number of the settings is 0 or more; these say what else it must be.
AboveZero = Annotated[int, Bounds(above_zero=True)]
AboveZeroFloat = Annotated[float, Bounds(above_zero=True)]
Share = Annotated[float, Bounds(below_one=True)]
ShareOrAll = Annotated[float, Bounds(at_most_one=True)]

# A list is written with commas between its values: --train_data=hotpotqa.jsonl,nq.jsonl
CommaList = list[str]

TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
}
TRUTH_VALUES = {"true": True, "1": True, "false": False, "0": False}


def read_value(name: str, annotation: Any, text: str) -> Any:
    """Return the value of a setting that was written as text on the command line.

    annotation: the type of the setting, as its dataclass has it.
    Raises UserError for a text that is no such value.
    """
    plain_type = _plain_type(annotation)
    try:
        if plain_type is bool:
            value = TRUTH_VALUES[text.lower()]
        elif plain_type is list:
            value = [part for part in text.split(",") if part]
        else:
            value = plain_type(text)
    except (ValueError, KeyError):
        raise UserError(f"--{name}: {text!r} is not {TYPE_NAMES[plain_type]}") from None
    _refuse_other_values(f"--{name}", annotation, value)
    return value


def check_value(name: str, annotation: Any, value: Any, place: str) -> Any:
    """Return the value of a setting that a file holds; a whole number may stand for a float.

    place: the file, for the message.
    Raises UserError for a value of another type, out of range or not among the choices.
    """
    plain_type = _plain_type(annotation)
    if plain_type is float and type(value) is int:
        value = float(value)
    if type(value) is not plain_type:
        raise UserError(f"{place}: {name} must be {TYPE_NAMES[plain_type]}, not {value!r}")
    _refuse_other_values(f"{place}: {name}", annotation, value)
    return value


def _plain_type(annotation: Any) -> type:
    """Return bool, int, float, str or list."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0])
    return get_origin(annotation) or annotation


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values that a setting, or each value of a list, is one of; () where all are."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return ()


def _refuse_other_values(label: str, annotation: Any, value: Any) -> None:
    """Raise UserError for a value of the right type that is out of range or no choice."""
    choices = _choices(annotation)
    values = value if isinstance(value, list) else [value]
    for chosen in values:
        if choices and chosen not in choices:
            names = ", ".join(str(choice) for choice in choices)
            raise UserError(f"{label}: {chosen!r} is not one of {names}")
    if type(value) not in (int, float):
        return
    bounds = Bounds()
    if get_origin(annotation) is Annotated:
        bounds = get_args(annotation)[1]
    if bounds.above_zero and not (value > 0 and math.isfinite(value)):
        raise UserError(f"{label}: {value} is out of range; it must be above 0")
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"{label}: {value} is out of range; it must be 0 or more")
    if bounds.below_one and value >= 1:
        raise UserError(f"{label}: {value} is out of range; it must be below 1")
    if bounds.at_most_one and value > 1:
        raise UserError(f"{label}: {value} is out of range; it must be at most 1")
