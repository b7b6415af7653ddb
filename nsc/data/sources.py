"""What a merge is given: adapters and unlabeled data, by task, and the base that they were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nsc.errors import DataError
from nsc.paths import absolute

TEXT_FIELDS = (
    ("text",),
    ("prompt",),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question", "context"),
    ("instruction", "input"),
    ("instruction",),
    ("sentence",),
    ("question",),
)
Source = str | Path | Sequence[Any]


def read_data(
    data: Mapping[str, Source], adapters: Collection[str], read: Callable[[Source], list[Any]],
    unseen: Collection[str] = (),
) -> dict[str, list[Any]]:  # fmt: skip
    """Task -> samples, by ``read``; none for an unseen one.

    Raises DataError where the tasks of both do not agree, or an unseen one is no adapter's or has data.
    """
    missing, extra = sorted(set(adapters) - set(data) - set(unseen)), sorted(set(data) - set(adapters))
    if missing or extra:
        raise DataError(
            f"data and adapters must name the same tasks: no data for {', '.join(missing) or 'none'},"
            f" no adapter for {', '.join(extra) or 'none'}; an adapter without data must be named as unseen"
        )
    if strange := sorted(set(unseen) & set(data) | set(unseen) - set(adapters)):
        raise DataError(f"unseen names {', '.join(strange)}, which must be adapters, and without data")
    if not set(adapters) - set(unseen):
        raise DataError("every task is unseen, so there is nothing to learn from; give data for one at least")
    return {task: [] if task in unseen else read(data[task]) for task in adapters}


def place_of(source: Source) -> str:
    """Where rows came from, for a record."""
    return absolute(source) if isinstance(source, (str, Path)) else f"{len(source)} samples given in Python"


def place_and_fields(source: str) -> tuple[str, tuple[str, ...] | None]:
    """``FILE#field+field`` in two. A number sign within the path itself stays there."""
    place, _, fields = source.rpartition("#")
    if not place or "/" in fields or Path(source).exists():
        return source, None
    return place, tuple(fields.split("+")) if fields else None


def load_hub(spec: str) -> Any:
    """The rows of ``hub:NAME[:CONFIG[:SPLIT]]``. Raises DataError without the ``datasets`` extra, or if it fails."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{spec} needs the datasets library: pip install 'nsc-merging[datasets]'") from error
    _, name, *rest = spec.split(":")
    config, split = (rest[0] or None if rest else None), (rest[1] if len(rest) > 1 else "train")
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # the library raises dozens of kinds for one thing: it could not be loaded
        raise DataError(f"Hub dataset {name!r} (config {config}, split {split}) cannot be loaded: {error}") from error


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """What each line of a JSONL file holds, by its number. Raises DataError naming a line that is no JSON."""
    rows = []
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON ({error.msg}); mend or remove that line") from error
    return rows


def lines_of(path: Path) -> list[str]:
    """By newlines alone: ``splitlines`` would also break at U+2028 and others, which JSON strings may hold."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error


def text_of(row: Any, names: tuple[str, ...] | None, where: str) -> str:
    """The fields ``names`` of a row, or the usual ones, joined. Raises DataError, naming it, if they are not there."""
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}; each line must be an object or a string")
    chosen = names or next((fields for fields in TEXT_FIELDS if all(f in row for f in fields)), None)
    if chosen is None or any(f not in row for f in chosen):
        raise DataError(
            f"{where} has the fields {', '.join(row)}, not the expected text; name them as in FILE#field+field"
        )
    nested = [f for f in chosen if not isinstance(row[f], (str, int, float, type(None)))]
    if nested:
        raise DataError(f"{where}: field {nested[0]} holds a {type(row[nested[0]]).__name__}, not text")
    return "\n".join(str(row[f]) for f in chosen if row[f] is not None)


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, images as they are stored. Raises DataError if it cannot be read."""
    parquet = optional_module("pyarrow.parquet")
    with naming_errors(str(path)):
        file = parquet.ParquetFile(path)
    return (row for part in file.iter_batches() for row in part.to_pylist())


def undecoded(rows: Any) -> Any:
    """A Hub dataset whose images are files: decoded when they are used."""
    for name, feature in rows.features.items():
        if hasattr(feature, "decode"):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Errors of the libraries inside as a DataError that names what could not be read."""
    try:
        yield
    except Exception as error:  # Pillow raises SyntaxError for a broken PNG, struct's own error for others, and more
        raise DataError(f"{name} cannot be read ({error}); mend or remove it") from error


def optional_module(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"images need {module.partition('.')[0]}: pip install 'nsc-merging[images]'") from error
