"""Checks of settings and arguments: values against the type, the range or the choices of what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from nsc.errors import NSCError, clipped

WORDS = {
    Any: "any value",
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    NoneType: "null",
}


def typed(value: Any, hint: Any) -> Any:
    """Return a value from YAML or a caller as a field of type ``hint`` holds it.

    Lists become tuples where the type is a tuple. Whole numbers become floats where the type is float, and so does
    "1e-3", which YAML 1.1 reads as text.

    Args:
        value: any plain value.
        hint: the field's type: a plain type, Any, or a union, tuple, list, dict or Mapping of such types.

    Returns:
        The value, converted.

    Raises:
        TypeError: if the value does not fit the type; ``expected`` says in words what would.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in parts:
            with suppress(TypeError):
                return typed(value, part)
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(map(typed, value, kinds))
    elif origin is list and isinstance(value, (list, tuple)):
        return [typed(item, parts[0]) for item in value]
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return {typed(k, parts[0]): typed(v, parts[1]) for k, v in value.items()}
    elif hint is float and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    elif hint is int and isinstance(value, Integral) and not isinstance(value, bool):  # those of NumPy, too
        if abs(int(value)) < 2**63:
            return int(value)
    elif hint is Any or type(value) is hint:
        return value
    raise TypeError


def expected(hint: Any) -> str:
    """Describe a type in words, for messages.

    Args:
        hint: a type that ``typed`` takes.

    Returns:
        Such as "a whole number or null", or "a list of text".
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(expected, parts))
    if origin is tuple:
        kinds = [part for part in parts if part is not Ellipsis]
        return f"a list of {'' if len(kinds) == 1 else f'{len(kinds)}: '}{', '.join(map(expected, kinds))}"
    if origin is list:
        return f"a list of {expected(parts[0])}"
    if origin in (dict, Mapping):
        return f"a mapping of {expected(parts[0])} to {expected(parts[1])}"
    return WORDS.get(hint, str(hint))


def require_choice(name: str, value: str | None, choices: Iterable[str | None]) -> None:
    """Refuse a value that is not among the choices.

    Args:
        name: what the value is for.
        value: what was given.
        choices: what may be given; None among them stands for "not given", and the message does not list it.

    Raises:
        NSCError: if ``value`` is none of them; the message lists the choices.
    """
    allowed = list(choices)
    if value not in allowed:
        words = [choice for choice in allowed if choice is not None]
        raise NSCError(f"{name} must be one of {', '.join(words)}, not {clipped(str(value))}")


def require_positive(values: Mapping[str, float]) -> None:
    """Refuse numbers that are not above 0.

    Args:
        values: name -> number.

    Raises:
        NSCError: if a number is 0, negative or NaN; the message names the first one.
    """
    for name, value in values.items():
        if not value > 0:
            raise NSCError(f"{name} must be more than 0, not {value:g}")


def require_fraction(name: str, value: float, above_zero: bool = False, below_one: bool = False) -> None:
    """Refuse a number that is not a fraction, such as a percentage.

    Args:
        name: the setting.
        value: what was given.
        above_zero: whether 0 is refused too.
        below_one: whether 1 is refused too.

    Raises:
        NSCError: if the value is NaN or out of the range; the message names the setting, the range and the remedy.
    """
    if not 0 <= value <= 1 or (above_zero and value == 0) or (below_one and value == 1):
        span = f"{'above 0' if above_zero else 'at least 0'} and {'below 1' if below_one else 'at most 1'}"
        raise NSCError(f"{name} must be a fraction {span}, not {value}; percent is not taken: give 0.2 for 20 %")
