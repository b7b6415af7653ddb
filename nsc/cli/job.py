"""One run of ``nsc merge``, from flags, ``--set``, a YAML file and presets, of which each overrides those after it.

The schema is the fields of ``Job``, and those of the settings of the method, with their types: nothing is listed twice.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from nsc.checks import expected, typed
from nsc.config import MergeConfig, learned_settings, preset_settings
from nsc.errors import NSCError, clipped, reading
from nsc.evaluation.scale_search import default_search
from nsc.export.description import REMEDY, REQUIRED, with_own_places
from nsc.export.record import COEFFICIENTS
from nsc.merging.tuning import refuse_search
from nsc.plain_yaml import parse_yaml
from nsc.recipes.spec import OF_BASE, Recipe, read_settings, settings_of, split_learned

NEEDED = {"base": "--base", "adapters": "--adapter TASK=PATH", "data": "--data TASK=FILE", "out": "--out"}


@dataclass(frozen=True)
class Job:
    """One run of ``nsc merge``: everything that is no setting of the method.

    Attributes:
        base: folder or Hub id.
        adapters: task -> PEFT folder or Hub id.
        data: task -> where its unlabeled rows are.
        out: new folder.
        rank: rank the written adapter is truncated to; None for exact factors.
        full: whether the whole model is written.
        ragged: whether each module of the adapter keeps its own rank.
        base_id: name of the base on the Hub.
        programs: those that the adapter is for.
        preset: one of PRESETS.
        method: name of a method.
        coefficients: folder of an earlier merge, whose coefficients weight the method.
        search: how the scale is found: "labels", "null-space", "match" or "none"; None for the method's default.
        validation: task -> where the labelled rows of a search are.
        scales: lowest and highest scale of a search.
        over: a setting of the method and the values that a search tries, as "KEY=V1,V2".
        recipe: the method with its settings; None for the sum by learned coefficients.
    """

    base: str
    adapters: dict[str, str]
    data: dict[str, str]
    out: str
    rank: int | None = None
    full: bool = False
    ragged: bool = False
    base_id: str | None = None
    programs: tuple[str, ...] = ()
    preset: str | None = None
    method: str = "nsc"
    coefficients: str | None = None
    search: str | None = None
    validation: dict[str, str] = field(default_factory=dict)
    scales: tuple[float, float] | None = None
    over: str | None = None
    recipe: Recipe | None = None

    @property
    def learns(self) -> bool:
        """Whether coefficients are learned, so that data are needed."""
        return self.recipe is None or self.recipe.learned is not None

    @property
    def values(self) -> dict[str, list[Any]] | None:
        """The setting that a search tries, and its values. Raises NSCError where they are none of the method's."""
        if self.over is None:
            return None
        key, _, values = self.over.partition("=")
        return {key: [read_assignment(f"{key}={value}", self.method)[1] for value in values.split(",")]}


JOB = {key: kind for key, kind in get_type_hints(Job).items() if key != "recipe"}
SETTINGS = settings_of("nsc")


@dataclass(frozen=True)
class FileContent:
    """What a YAML file says.

    Attributes:
        job: keys of ``Job`` -> values.
        settings: settings of its method.
    """

    job: dict[str, Any]
    settings: dict[str, Any]


def gather(
    flags: Mapping[str, Any], assignments: Sequence[str] = (), file: Path | None = None
) -> tuple[Job, MergeConfig]:
    """Put together one run of ``nsc merge`` and its settings.

    Flags override assignments, which override the preset of the flags, which overrides the file, which overrides its
    own preset. A scale or a search among the flags overrides either in the file. Adapters and rows are merged task by
    task.

    Args:
        flags: those on the command line, by the names of fields of ``Job`` or settings.
        assignments: "KEY=VALUE" texts, with values in YAML.
        file: YAML file.

    Returns:
        The job, and the settings of learning.

    Raises:
        NSCError: for what is missing, unknown, of the wrong type, or no setting of the method.
    """
    told = read_file(file, flags.get("method")) if file else FileContent({}, {})
    _settle_scale(told, flags, assignments)
    method = flags.get("method") or told.job.get("method", "nsc")
    learned, kinds = split_learned(method)[0], job_of(method)
    job = {key: value for source in (told.job, flags) for key, value in source.items() if key in kinds}
    job |= {key: {**told.job.get(key, {}), **flags.get(key, {})} for key in ("adapters", "data", "validation")}
    assigned = dict(read_assignment(text, method) for text in assignments)
    given = {key: value for key, value in flags.items() if key not in kinds}
    presets = [source.get("preset") if "preset" in kinds else None for source in (told.job, flags)]
    if any(presets) and not learned:
        raise NSCError(f"method {method} learns nothing, so it takes no preset; leave it out")
    said = preset_settings(presets[0]) | told.settings | preset_settings(presets[1]) | assigned | given
    search = job.get("search")
    search = default_search(method, "scale" in said, bool(job["data"])) if search is None else search
    recipe, settings = read_settings(method, said, search != "none")
    needs_rows = learned or search in ("null-space", "match") or (recipe and recipe.needs_rows)
    missing = [
        f"{key}: give {flag}, or {key}: in the file of --config"
        for key, flag in NEEDED.items()
        if not job.get(key) and (needs_rows or key != "data")
    ]
    if missing:
        raise NSCError(f"a merge needs {'; '.join(missing)}")
    config = MergeConfig(**{**(learned_settings(learned, settings) if learned else {}), **settings})
    refuse_search(search, method, "scale" in said, job["data"], job["validation"], job.get("scales"))
    if config.granularity == "factors" and config.factor_rank is None and job.get("rank"):
        config = replace(config, factor_rank=job.pop("rank"))  # the rank that is fitted is the rank that is written
    return Job(**job, recipe=recipe), config


def _settle_scale(told: FileContent, flags: Mapping[str, Any], assignments: Sequence[str]) -> None:
    """Remove from a file its scale where the flags search one, and its search where they give a scale."""
    if flags.get("search", "none") != "none":
        told.settings.pop("scale", None)
    elif "scale" in {*flags, *(text.partition("=")[0] for text in assignments)}:
        for key in ("search", "validation", "scales"):
            told.job.pop(key, None)


def job_of(method: str) -> dict[str, Any]:
    """Return the keys of a job with this method.

    A method's own ``rank`` replaces that of the written adapter; its own ``preset``, where nothing is learned, those of
    learning.

    Args:
        method: name of a method.

    Returns:
        Key -> type.
    """
    learned, own = split_learned(method)[0], settings_of(method)
    return {key: kind for key, kind in JOB.items() if key not in own or (learned and key != "rank")}


def read_file(file: Path, method: str | None = None) -> FileContent:
    """Read and check a YAML file; keys under ``settings:``, as in a saved merge.yaml, count like those beside it.

    Args:
        file: YAML, written by hand or by an earlier merge.
        method: overrides the file's own; of a saved merge by another method only base, adapters and data are taken.

    Returns:
        Its job and settings.

    Raises:
        NSCError: naming the file, and a key that does not exist or a value of the wrong type.
    """
    with reading(str(file), "mend it", fault="cannot be read as YAML"):
        told = parse_yaml(file.read_text(encoding="utf-8"))
    if not isinstance(told, dict):
        raise NSCError(f"{file} must hold a mapping of keys to values, such as base: FOLDER")
    if "method" in told and "made" in told:  # a saved merge.yaml, which also says what came out
        told = _of_record(with_own_places(told, file.parent), file, method)
    nested = told.pop("settings", None) or {}
    if not isinstance(nested, dict):
        raise NSCError(f"{file}: settings must be a mapping of settings to values, not {clipped(repr(nested))}")
    method = method or str(told.get("method", "nsc"))
    of_job, kinds = job_of(method), settings_of(method)
    job = {key: _checked(key, value, of_job, f"{file}: ") for key, value in told.items() if key in of_job}
    rest = {**nested, **{key: value for key, value in told.items() if key not in of_job}}
    where = f"{file}: " if method == "nsc" else f"{file}: of method {method}, "
    return FileContent(job, {key: _checked(key, value, kinds, where, of_job) for key, value in rest.items()})


def _of_record(told: Mapping[str, Any], file: Path, method: str | None) -> dict[str, Any]:
    """Of a saved merge.yaml, what says the same merge again; by another method, on the same base and adapters."""
    for key in ("adapters", "settings", "method", "base", "data"):
        try:
            told = {**told, key: typed(told[key], REQUIRED[key])}
        except (KeyError, TypeError):
            raise NSCError(f"{file}: {key} must be {expected(REQUIRED[key])}; {REMEDY}") from None
    kept = {key: value for key, value in told.items() if key in {"settings", *JOB} and value is not None}
    kept["adapters"] = {task: entry.get("path", "") for task, entry in told["adapters"].items()}
    learned, _ = split_learned(kept["method"])
    if method not in (None, kept["method"]):
        of_any = {key: value for key, value in kept["settings"].items() if key in OF_BASE}
        return {key: kept[key] for key in ("base", "adapters", "data")} | {"settings": of_any}
    if told.get("masks"):
        raise NSCError(
            f"{file} records a merge whose masks were given in Python; repeat it with nsc apply {file.parent}"
        )
    if not learned and (file.parent / COEFFICIENTS).exists():
        kept["coefficients"] = str(file.parent)
    return kept


def read_assignment(text: str, method: str = "nsc") -> tuple[str, Any]:
    """Read one setting of a method.

    Args:
        text: "KEY=VALUE", with the value in YAML.
        method: name of a method.

    Returns:
        The key and its checked value.

    Raises:
        NSCError: as ``read_file`` does.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise NSCError(f"--set {text!r} must read KEY=VALUE")
    where = "--set " if method == "nsc" else f"--set of method {method}, "
    return key, _checked(key, assigned(key, value), settings_of(method), where)


def assigned(key: str, value: str) -> Any:
    """Read the value of a ``--set`` option.

    Args:
        key: what is set.
        value: YAML.

    Returns:
        A plain value.

    Raises:
        NSCError: if it is no such YAML.
    """
    with reading(f"--set {key}: {clipped(value, 60)!r}", "mend or quote it", fault="is not valid YAML"):
        return parse_yaml(value)


def _checked(key: str, value: Any, schema: Mapping[str, Any], where: str, more: Mapping[str, Any] | None = None) -> Any:
    """more: keys that there are elsewhere, for the message."""
    if key not in schema:
        there = sorted({*schema, *(more or {})})
        close = difflib.get_close_matches(str(key)[:60], there, n=1, cutoff=0.0)
        raise NSCError(
            f"{where}unknown key {clipped(str(key), 60)}; did you mean {close[0]}? Known keys: {', '.join(there)}"
        )
    try:
        return typed(value, schema[key])
    except TypeError:
        raise NSCError(f"{where}{key} must be {expected(schema[key])}, not {clipped(repr(value))}") from None
