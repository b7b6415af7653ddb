"""Labelled rows: what a task is asked, and what is true of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nsc.bases.base_model import IMAGES_AND_TEXT, Base
from nsc.data.images import IMAGE_FIELDS, as_image
from nsc.data.sources import Fields, Kind, read_samples, require_unicode, text_of
from nsc.errors import DataError, NSCError

LABEL_FIELDS = ("label", "score", "answer", "target", "output")


class Labelled(NamedTuple):
    """The labelled rows of one task.

    Attributes:
        samples: texts or images.
        labels: what is true of each: a class, a number, or an answer's text.
    """

    samples: list[Any]
    labels: list[Any]


def read_labelled(base: Base, source: str | Path | Sequence[tuple[Any, Any]]) -> Labelled:
    """Read the labelled rows of one task, as texts or as images, by what the base takes.

    Args:
        base: its config decides how samples are read.
        source: a JSONL file, a parquet file, ``hub:NAME[:CONFIG[:SPLIT]]``, or pairs of a sample and its label. Append
            ``#field+field:label`` to name the fields; otherwise the usual names are tried, those of ``read_texts`` and
            ``read_images``, and for the label ``label``, ``score``, ``answer``, ``target``, ``output``.

    Returns:
        The rows, in the order of the source.

    Raises:
        DataError: naming the row, for one without text, image or label.
        NSCError: for a base that takes images with text.
    """
    if base.takes == IMAGES_AND_TEXT:
        raise NSCError(f"base {base.id!r} takes images with text, for which there are no metrics here")
    images = base.takes == "pixel_values"
    kind = Kind("labelled row", (".jsonl", ".parquet"), partial(_labelled, images), partial(_given, images))
    return Labelled(*map(list, zip(*read_samples(source, kind), strict=True)))


def read_all_labelled(base: Base, sources: Mapping[str, Any], tasks: Collection[str]) -> dict[str, Labelled]:
    """Read the labelled rows of every task.

    Args:
        base: its config decides how samples are read.
        sources: task -> what ``read_labelled`` takes.
        tasks: names of the adapters.

    Returns:
        Task -> its labelled rows, in the order of ``tasks``.

    Raises:
        DataError: if sources and adapters name different tasks.
    """
    if set(sources) != set(tasks):
        raise DataError(
            f"labelled rows and adapters must name the same tasks, not {', '.join(sorted(sources))} and"
            f" {', '.join(sorted(tasks))}"
        )
    return {task: read_labelled(base, sources[task]) for task in tasks}


def _labelled(images: bool, row: Any, fields: Fields, where: str, folder: Path) -> tuple[Any, Any]:
    """Sample and label of a row; the last of the fields may be followed by a colon and the label's."""
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}; each row must be an object with a label")
    *first, last = fields or ("",)
    last, _, label = last.partition(":")
    names = tuple(name for name in (*first, last) if name)
    return (_image if images else _text)(names, row, where), _label(row, label, where)


def _given(images: bool, pair: tuple[Any, Any], where: str) -> tuple[Any, Any]:
    sample, label = pair
    return as_image(sample, where) if images else str(sample), label


def _text(names: tuple[str, ...], row: Any, where: str) -> str:
    text = require_unicode(text_of(row, names or None, where), where)
    if not text.strip():
        raise DataError(f"{where} has no text; remove it")
    return text


def _image(names: tuple[str, ...], row: Any, where: str) -> Any:
    column = next((name for name in names or IMAGE_FIELDS if name in row), None)
    if column is None:
        raise DataError(f"{where} has the fields {', '.join(row)}, not one of images; name it as in FILE#column:label")
    return as_image(row[column], where)


def _label(row: Any, name: str, where: str) -> Any:
    field = next((field for field in ([name] if name else LABEL_FIELDS) if field in row), None)
    if field is None or row[field] is None:
        raise DataError(f"{where} has no {name or 'label'}; name it as in FILE#field:label")
    return row[field]
