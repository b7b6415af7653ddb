"""What ``nsc merge`` is told: by flags, ``--set``, a YAML file and presets; each goes before what comes after it.

The schema is the fields of ``Job`` and of MergeConfig, with their types: nothing is listed twice.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from nsc.config import MergeConfig, preset_settings
from nsc.errors import NSCError

NEEDED = {"base": "--base", "adapters": "--adapter TASK=PATH", "data": "--data TASK=FILE", "out": "--out"}
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


@dataclass(frozen=True)
class Job:
    """One run of ``nsc merge``: the keys of a file that are no settings, as the flags of the same names take them."""

    base: str
    adapters: dict[str, str]
    data: dict[str, str]
    out: str
    rank: int | None = None
    full: bool = False
    preset: str | None = None


JOB, SETTINGS = get_type_hints(Job), get_type_hints(MergeConfig)


def gather(
    flags: Mapping[str, Any], assignments: Sequence[str] = (), file: Path | None = None
) -> tuple[Job, MergeConfig]:
    """The job and its settings. flags: those given, by the names of the fields.  assignments: "KEY=VALUE", in YAML.

    Flags go before assignments, those before the preset of the flags, that before the file and its own preset; adapters
    and data are put together task by task. Raises NSCError for what is missing, unknown, or of another type.
    """
    told = read_file(file) if file else {}
    assigned = dict(map(read_assignment, assignments))
    settings = _settings_of(told) | _settings_of({**assigned, **flags})
    job = {key: value for source in (told, flags) for key, value in source.items() if key in JOB}
    job |= {key: {**told.get(key, {}), **flags.get(key, {})} for key in ("adapters", "data")}
    missing = [
        f"{key}: give {flag}, or {key}: in the file of --config" for key, flag in NEEDED.items() if not job.get(key)
    ]
    if missing:
        raise NSCError(f"a merge lacks {'; '.join(missing)}")
    return Job(**job), MergeConfig(**settings)


def _settings_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among these values, over those of the preset among them."""
    return preset_settings(source.get("preset")) | {key: value for key, value in source.items() if key in SETTINGS}


def read_file(file: Path) -> dict[str, Any]:
    """The checked values of a YAML file; those under ``settings:``, as in a saved merge.yaml, count like the others.

    Raises NSCError naming the file, and the key that is no key or the value of another type.
    """
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NSCError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(told, dict):
        raise NSCError(f"{file} must hold a mapping of keys to values, such as base: FOLDER")
    if "method" in told and "made" in told:  # a saved merge.yaml, which also says what came out
        told = {key: value for key, value in told.items() if key in {"settings", *JOB, *SETTINGS}}
        told["adapters"] = {task: entry["path"] for task, entry in told["adapters"].items()}
    nested = told.pop("settings", None) or {}
    if not isinstance(nested, dict):
        raise NSCError(f"{file}: settings must be a mapping of settings to values, not {nested!r}")
    return {key: _checked(key, value, JOB | SETTINGS, f"{file}: ") for key, value in {**nested, **told}.items()}


def read_assignment(text: str) -> tuple[str, Any]:
    """A setting and its value from "KEY=VALUE". Raises NSCError as ``read_file`` does."""
    key, equals, value = text.partition("=")
    if not equals:
        raise NSCError(f"--set {text!r} must read KEY=VALUE")
    try:
        return key, _checked(key, yaml.safe_load(value), SETTINGS, "--set ")
    except yaml.YAMLError as error:
        raise NSCError(f"--set {key}: {value!r} is no YAML: {error}") from error


def _checked(key: str, value: Any, schema: Mapping[str, Any], where: str) -> Any:
    if key not in schema:
        close = difflib.get_close_matches(str(key), schema, n=1, cutoff=0.0)
        raise NSCError(f"{where}there is no key {key}; did you mean {close[0]}? There are {', '.join(sorted(schema))}")
    try:
        return typed(value, schema[key])
    except TypeError:
        raise NSCError(f"{where}{key} must be {expected(schema[key])}, not {value!r}") from None


def typed(value: Any, hint: Any) -> Any:
    """A YAML value as a field of type ``hint`` takes it. Raises TypeError for one of another type.

    Lists become tuples and whole numbers floats, as does 1e-3, which YAML 1.1 takes for text.
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
    elif origin is dict and isinstance(value, dict):
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
    if origin is dict:
        return f"a mapping of {expected(parts[0])} to {expected(parts[1])}"
    return WORDS.get(hint, str(hint))
