"""Values from YAML or a caller, against the type of the field that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

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
