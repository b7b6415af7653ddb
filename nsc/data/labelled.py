"""Labelled rows: what a task is asked, and what is true of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nsc.bases.base_model import IMAGES_AND_TEXT, Base
from nsc.data.images import IMAGE_FIELDS, as_image
from nsc.data.sources import load_hub, place_and_fields, read_rows, read_table, text_of, undecoded
from nsc.errors import DataError, NSCError

LABEL_FIELDS = ("label", "score", "answer", "target", "output")


class Labelled(NamedTuple):
    """Rows of one task: texts or images, and what is true of each: a class, a number, or an answer's text."""

    samples: list[Any]
    labels: list[Any]


def read_labelled(base: Base, source: str | Path | Sequence[tuple[Any, Any]]) -> Labelled:
    """The labelled rows of one task, as texts or as images, by what ``base`` takes.

    source: a JSONL file, a parquet file, ``hub:NAME[:CONFIG[:SPLIT]]``, or pairs of a sample and its label. Append
    ``#field+field:label`` to name the fields; otherwise the usual names are tried, those of ``read_texts`` and
    ``read_images``, and for the label ``label``, ``score``, ``answer``, ``target``, ``output``. Raises DataError,
    naming the row, for one without text or image, or without label.
    """
    images = base.takes == "pixel_values"
    if base.takes == IMAGES_AND_TEXT:
        raise NSCError(f"base {base.id!r} takes images with text, for which there are no metrics here")
    if not isinstance(source, (str, Path)):
        found = [(as_image(x, f"image {i}") if images else str(x), y) for i, (x, y) in enumerate(source, start=1)]
        where = "the given list"
    else:
        where, fields = place_and_fields(str(source))
        *first, last = fields or ("",)
        last, _, label = last.partition(":")
        names = tuple(name for name in (*first, last) if name)
        read = partial(_image, names) if images else partial(_text, names)
        rows = ((row, f"{where} row {number}") for number, row in _rows(where))
        found = [(read(row, place), _label(row, label, place)) for row, place in rows]
    if not found:
        raise DataError(f"{where} holds no labelled row")
    return Labelled(*map(list, zip(*found, strict=True)))


def read_all_labelled(base: Base, sources: Mapping[str, Any], tasks: Collection[str]) -> dict[str, Labelled]:
    """Task -> its labelled rows, in the order of ``tasks``. Raises DataError where those of both do not agree."""
    if set(sources) != set(tasks):
        raise DataError(
            f"labelled rows and adapters must name the same tasks, not {', '.join(sorted(sources))} and"
            f" {', '.join(sorted(tasks))}"
        )
    return {task: read_labelled(base, sources[task]) for task in tasks}


def _rows(place: str) -> Iterable[tuple[int, Any]]:
    path = Path(place)
    if place.startswith("hub:"):
        return enumerate(undecoded(load_hub(place)), start=1)
    if path.suffix == ".jsonl" and path.is_file():
        return read_rows(path)
    if path.suffix == ".parquet" and path.is_file():
        return enumerate(read_table(path), start=1)
    raise DataError(f"labelled data {place} is no JSONL or parquet file that is there, nor hub:NAME:CONFIG:SPLIT")


def _text(names: tuple[str, ...], row: Any, where: str) -> str:
    text = text_of(row, names or None, where)
    if not text.strip():
        raise DataError(f"{where} has no text; remove it")
    return text


def _image(names: tuple[str, ...], row: Any, where: str) -> Any:
    column = next((name for name in names or IMAGE_FIELDS if name in row), None)
    if column is None:
        raise DataError(f"{where} has the fields {', '.join(row)}, not one of images; name it as in FILE#column:label")
    return as_image(row[column], where)


def _label(row: Any, name: str, where: str) -> Any:
    found = next((field for field in ([name] if name else LABEL_FIELDS) if field in row), None)
    if found is None or row[found] is None:
        raise DataError(f"{where} has no {name or 'label'}; name it as in FILE#field:label")
    return row[found]
