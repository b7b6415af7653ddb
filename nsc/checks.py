"""Values from YAML or a caller, against the type of the field that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from nsc.errors import NSCError

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def typed(value: Any, hint: Any) -> Any:
    """A YAML value as a field of type ``hint`` takes it. Raises TypeError for one of another type.

    Lists become tuples where those are meant, and whole numbers floats, as does 1e-3, which YAML 1.1 takes for text.
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
        with suppress(ValueError):
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def expected(hint: Any) -> str:
    """A type in words."""
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


def choice(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    """``choices[value]``. Raises NSCError listing them."""
    if value not in choices:
        raise NSCError(f"{name} {value!r} is unknown; give one of {', '.join(choices)}")
    return choices[value]


def require_positive(values: Mapping[str, float]) -> None:
    """Raises NSCError naming the first that is not."""
    for name, value in values.items():
        if not value > 0:
            raise NSCError(f"{name} must be more than 0, not {value:g}")


def require_fraction(name: str, value: float, zero: bool) -> None:
    """Raise NSCError unless 0 < value <= 1, or 0 <= value < 1 where ``zero`` is the neutral value."""
    if not (0 <= value < 1 if zero else 0 < value <= 1):
        span = "at least 0 and below 1" if zero else "above 0 and at most 1"
        raise NSCError(f"{name} is a fraction {span}, not {value}; percent is not taken: give 0.2 for 20 %")


def require_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    """Raise NSCError unless ``value`` is one of them."""
    if value not in choices:
        words = [str(choice) for choice in choices if choice is not None]
        raise NSCError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, not {value!r}")
