"""Unlabeled rows -> seeded batches that carry every task at once, each token knowing its task and its weight."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc.batch import Batch
from nsc.data.packing import pack
from nsc.errors import DataError

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


def read_texts(source: str | Path | Sequence[str]) -> list[str]:
    """The texts of one task, without labels.

    source: a JSONL file (objects, or strings), a plain text file (one sample a line), ``hub:NAME[:CONFIG[:SPLIT]]`` (a
    Hub dataset; needs the ``datasets`` extra), or the texts themselves. Append ``#field+field`` to name the fields,
    which are joined by a newline; otherwise the usual names are tried (text, prompt, text_a + text_b, premise +
    hypothesis).

    Raises DataError for a missing or empty source, an unreadable line (by number) or unknown fields.
    """
    if not isinstance(source, (str, Path)):
        return _not_empty([str(text) for text in source], "the given texts")
    place, names = place_and_fields(str(source))
    if place.startswith("hub:"):
        rows = enumerate(load_hub(place), start=1)
        return _not_empty([text_of(row, names, f"{place} row {number}") for number, row in rows], place)
    path = Path(place)
    if not path.is_file():
        raise DataError(f"data file {place} does not exist; give a JSONL or text file, or hub:NAME:CONFIG:SPLIT")
    if path.suffix == ".jsonl":
        return _not_empty(_read_jsonl(path, names), place)
    if path.suffix in (".txt", ".text"):
        return _not_empty([line.strip() for line in _lines(path) if line.strip()], place)
    raise DataError(f"data file {place} is neither .jsonl nor .txt; rename or convert it")


@dataclass(frozen=True)
class TextBatches:
    """Batches as a pure function of the step, the same in every process and after every resume.

    tokens: task -> token ids of each sample.  Task k takes ``batch_size`` samples a step from a permutation of its own,
    reshuffled each time round from (seed, task).  causal, shares_rows, few_shapes: what ``pack`` may do with them.
    """

    tokens: dict[str, list[list[int]]]
    batch_size: int
    pad_id: int
    seed: int = 0
    causal: bool = True  # right padding cannot reach a real token, so the model needs no mask
    shares_rows: bool = False  # the model keeps samples in one row apart
    few_shapes: bool = False  # steps are replayed where their shapes recur
    counted: dict[str, list[slice]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """The batches of one step, on the CPU; their losses add up to the step's."""
        return self.packed([(task, i) for task, row in self.drawn(step).items() for i in row], self.few_shapes)

    def packed(self, picks: Sequence[tuple[str, int]], few_shapes: bool = False) -> list[Batch]:
        """The batches of these samples, each by its task and number."""
        places = list(self.tokens)
        return pack(
            [self.tokens[task][i] for task, i in picks], [places.index(task) for task, _ in picks], self.pad_id,
            causal=self.causal, shares_rows=self.shares_rows, few_shapes=few_shapes,
            counted=[self.counted[task][i] for task, i in picks] if self.counted else None,
        )  # fmt: skip

    def drawn(self, step: int) -> dict[str, list[int]]:
        """Which samples of each task a step takes."""
        return {
            task: draw(len(rows), self.batch_size, step, f"{self.seed}/{task}") for task, rows in self.tokens.items()
        }


def draw(count: int, batch_size: int, step: int, key: str) -> list[int]:
    """Which of ``count`` samples a step takes: the next ones of a permutation, another from ``key`` each time round."""
    if count == 0:
        return []
    drawn = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        turn, index = divmod(position, count)
        drawn.append(_permutation(f"{key}/{turn}", count)[index])
    return drawn


def tokenize(tokenizer: Any, texts: Mapping[str, Sequence[str]], max_length: int) -> dict[str, list[list[int]]]:
    """Token ids of every sample, cut at ``max_length``. Raises DataError naming a sample that has no token."""
    tokens = {}
    for task, rows in texts.items():
        tokens[task] = tokenizer(list(rows), truncation=True, max_length=max_length)["input_ids"] if rows else []
        empty = [i for i, ids in enumerate(tokens[task]) if not ids]
        if empty:
            raise DataError(f"sample {empty[0] + 1} of task {task} has no token; remove empty texts from its data")
    return tokens


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


def _permutation(key: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """What each line of a JSONL file holds, by its number. Raises DataError naming a line that is no JSON."""
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON ({error.msg}); mend or remove that line") from error
    return rows


def _read_jsonl(path: Path, names: tuple[str, ...] | None) -> list[str]:
    rows = read_rows(path)
    return [row if isinstance(row, str) else text_of(row, names, f"{path} line {number}") for number, row in rows]


def _lines(path: Path) -> list[str]:
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


def _not_empty(texts: list[str], where: str) -> list[str]:
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{where} holds no text; every task needs at least one unlabeled sample")
    return texts
