"""Sources of rows: given in Python, in files, on the Hub; one table of file types, and how a kind of sample is read.

A new type of file is one reader and one line of FILE_TYPES; which kinds of samples come in it, their ``Kind`` says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from nsc.errors import DataError, clipped, one_line
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
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
Source = str | Path | Sequence[Any]
Fields = tuple[str, ...] | None  # those that a source names; None for the usual ones
Columns = Callable[[Sequence[str], str], list[str]]  # columns of a table, its place -> those that are read
Rows = Iterator[tuple[str, Any]]  # where a row is from, for errors, and what it holds


class Kind(NamedTuple):
    """One kind of sample, and how it is read.

    Attributes:
        name: what a sample is called in errors, such as "text".
        types: keys of FILE_TYPES.
        of_row: row, named fields, place of the row, folder of its file -> sample; None leaves the row out.
        given: value given in Python, its place -> sample.
        columns: columns of a table, named fields, place -> the columns that are read; None reads all.
    """

    name: str
    types: tuple[str, ...]
    of_row: Callable[[Any, Fields, str, Path], Any]
    given: Callable[[Any, str], Any]
    columns: Callable[[Sequence[str], Fields, str], list[str]] | None = None


def read_samples(source: Source, kind: Kind) -> list[Any]:
    """Read all samples of one task.

    Args:
        source: file or folder, ``hub:NAME[:CONFIG[:SPLIT]]``, or the samples themselves; ``#field+field`` behind a file
            or dataset names the fields.
        kind: what a sample is.

    Returns:
        The samples, in the order of the source.

    Raises:
        DataError: if the source does not exist, is of another type, cannot be read or holds no sample.
    """
    if not isinstance(source, (str, Path)):
        place = "the given list"
        samples = [kind.given(value, f"{kind.name} {number}") for number, value in enumerate(source, start=1)]
    else:
        place, fields = place_and_fields(str(source))
        folder = Path(place).parent
        samples = [kind.of_row(row, fields, where, folder) for where, row in rows_of(place, fields, kind)]
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        raise DataError(f"{place} holds no {kind.name}; every task needs at least one")
    return samples


def rows_of(place: str, fields: Fields, kind: Kind) -> Rows:
    """Yield the rows of a file, a folder or a dataset.

    Args:
        place: path, or ``hub:NAME[:CONFIG[:SPLIT]]``.
        fields: those that the source names.
        kind: which types are taken, and which columns are read.

    Yields:
        Where a row is from, and what it holds.

    Raises:
        DataError: if there is no such place, or it is of a type that holds no such samples.
    """
    choose = kind.columns
    columns = (lambda there, where: choose(there, fields, where)) if choose else None
    if place.startswith("hub:"):
        yield from _read_hub(place, columns)
        return
    path = Path(place)
    taken = " nor ".join(kind.types)
    if not os.path.exists(path):
        listed = ", ".join(kind.types)
        raise DataError(
            f"data {clipped(place)} does not exist; each {kind.name} is read from {listed} or hub:NAME:CONFIG:SPLIT"
        )
    type_ = FOLDER if path.is_dir() else path.suffix
    if type_ not in kind.types:
        raise DataError(
            f"data {place} is neither {taken}, from which each {kind.name} is read; convert it or choose another"
        )
    yield from FILE_TYPES[type_](path, columns)


def _read_jsonl(path: Path, columns: Columns | None) -> Rows:
    """What each line of a JSONL file holds."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # also of a number of 5000 digits, or a deep line
                cause = getattr(error, "msg", None) or one_line(error)
                raise DataError(f"{path} line {number} is not JSON ({cause}); mend or remove that line") from error


def _read_text(path: Path, columns: Columns | None) -> Rows:
    """Each line of a plain text file."""
    for number, line in enumerate(_lines(path), start=1):
        yield f"{path} line {number}", line.strip()


def _read_parquet(path: Path, columns: Columns | None) -> Rows:
    """The rows of a parquet file, images as they are stored, with no more than a batch of them in memory."""
    parquet = optional_module("pyarrow.parquet")
    with naming_errors(str(path)):
        file = parquet.ParquetFile(path)
    chosen = columns(file.schema_arrow.names, str(path)) if columns else None
    with naming_errors(str(path)):
        rows = (row for part in file.iter_batches(columns=chosen) for row in part.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path} row {number}", row


def _read_folder(path: Path, columns: Columns | None) -> Rows:
    """Every image file in a folder and below it, by name."""
    for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
        yield str(file), file


FOLDER = "a folder"
FILE_TYPES: dict[str, Callable[[Path, Columns | None], Rows]] = {  # by suffix
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
    ".text": _read_text,
    ".parquet": _read_parquet,
    FOLDER: _read_folder,
}


def _read_hub(spec: str, columns: Columns | None) -> Rows:
    """The rows of ``hub:NAME[:CONFIG[:SPLIT]]``; images are decoded when they are used."""
    rows = _undecoded(load_hub(spec))
    chosen = columns(rows.column_names, spec) if columns else None
    for number, row in enumerate(rows, start=1):
        yield f"{spec} row {number}", {name: row[name] for name in chosen} if chosen else row


def load_hub(spec: str) -> Any:
    """Load a dataset from the Hub.

    Args:
        spec: ``hub:NAME[:CONFIG[:SPLIT]]``; the split is "train" by default.

    Returns:
        What ``datasets.load_dataset`` returns.

    Raises:
        DataError: if the ``datasets`` extra is not installed, or the dataset cannot be loaded.
    """
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


def _undecoded(rows: Any) -> Any:
    """A Hub dataset whose images stay files."""
    for name, feature in getattr(rows, "features", {}).items():
        if hasattr(feature, "decode"):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def place_and_fields(source: str) -> tuple[str, Fields]:
    """Split ``FILE#field+field``; a number sign within the path itself stays there.

    Args:
        source: as a user gives it.

    Returns:
        The place, and the fields that it names.
    """
    place, _, fields = source.rpartition("#")
    if not place or "/" in fields or os.path.exists(source):
        return source, None
    return place, tuple(fields.split("+")) if fields else None


def text_of(row: Any, names: tuple[str, ...] | None, where: str) -> str:
    """Return the text of a row: its fields, joined by newlines.

    Args:
        row: JSON object.
        names: fields; None for the usual ones, TEXT_FIELDS.
        where: place of the row, for errors.

    Returns:
        The text.

    Raises:
        DataError: naming the row, if it has no such fields, or they hold no text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}; each line must be an object or a string")
    chosen = names or next((fields for fields in TEXT_FIELDS if all(f in row for f in fields)), None)
    if chosen is None or any(f not in row for f in chosen):
        raise DataError(
            f"{where} has the fields {clipped(', '.join(row))}, not the expected text; name them as in FILE#field+field"
        )
    nested = [f for f in chosen if not isinstance(row[f], (str, int, float, type(None)))]
    if nested:
        raise DataError(f"{where}: field {nested[0]} holds a {type(row[nested[0]]).__name__}, not text")
    return "\n".join(str(row[f]) for f in chosen if row[f] is not None)


def require_unicode(text: str, where: str) -> str:
    """Refuse a text that no tokenizer takes.

    Args:
        text: any text.
        where: place of the row, for errors.

    Returns:
        The text itself.

    Raises:
        DataError: naming the row, if half of a surrogate pair is in it.
    """
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(f"{where} holds half of a surrogate pair, which is no character; mend or remove that row")
    return text


def read_data(
    data: Mapping[str, Source],
    adapters: Collection[str],
    read: Callable[[Source], list[Any]],
    unseen: Collection[str] = (),
) -> dict[str, list[Any]]:
    """Read the unlabeled rows of every task.

    Args:
        data: task -> source.
        adapters: names of the tasks.
        read: source -> samples.
        unseen: tasks without data.

    Returns:
        Task -> samples, none for an unseen task.

    Raises:
        DataError: if the tasks of data and adapters differ, or an unseen task has data or no adapter.
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
    """Return where rows came from, for a record.

    Args:
        source: as a user gives it.

    Returns:
        An absolute path, a dataset, or how many samples were given in Python.
    """
    return absolute(source) if isinstance(source, (str, Path)) else f"{len(source)} samples given in Python"


def _lines(path: Path) -> Iterator[str]:
    """One at a time, by newlines alone: ``splitlines`` would also break at U+2028 and others, which JSON may hold."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise DataError(f"{path} line {number} holds a NUL byte, so it is no text in UTF-8; convert it")
                yield line.removesuffix("\n")
    except UnicodeDecodeError:
        try:
            path.read_bytes().decode("utf-8-sig")  # which counts bytes from the start of the file
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}); give a file that can") from error


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Turn errors of the libraries inside into a DataError that names what could not be read.

    Args:
        name: of the file or row.

    Yields:
        Nothing.

    Raises:
        DataError: for any error inside.
    """
    try:
        yield
    except Exception as error:  # Pillow raises SyntaxError for a broken PNG, struct's own error for others, and more
        raise DataError(f"{name} cannot be read ({one_line(error)}); mend or remove it") from error


def optional_module(module: str) -> Any:
    """Import a module of the ``images`` extra: Pillow or pyarrow.

    Args:
        module: by its full name.

    Returns:
        The module.

    Raises:
        DataError: if it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise DataError(f"this source needs {library}: pip install 'nsc-merging[images]'") from error
