"""Unlabeled rows -> seeded batches that carry every task at once, each token knowing its task and its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsc.batch import Batch
from nsc.data.packing import pack
from nsc.data.sampling import draw
from nsc.data.sources import Fields, Kind, read_samples, text_of
from nsc.errors import DataError


def read_texts(source: str | Path | Sequence[str]) -> list[str]:
    """Read the texts of one task, without labels.

    Args:
        source: a JSONL file (objects or strings), a plain text file (one sample per line),
            ``hub:NAME[:CONFIG[:SPLIT]]`` (a Hub dataset; needs the ``datasets`` extra), or the texts themselves. Append
            ``#field+field`` to name the fields, which are joined by a newline; otherwise the usual names are tried
            (text, prompt, text_a + text_b, premise + hypothesis...).

    Returns:
        The texts; blank ones are left out.

    Raises:
        DataError: for a missing or empty source, a line that cannot be read (by number) or unknown fields.
    """
    return read_samples(source, TEXTS)


def _text(row: Any, fields: Fields, where: str, folder: Path) -> str | None:
    text = row if isinstance(row, str) else text_of(row, fields, where)
    return text if text.strip() else None


TEXTS = Kind(
    "text", (".jsonl", ".txt", ".text"), _text, given=lambda value, where: str(value) if str(value).strip() else None
)


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
            [self.tokens[task][i] for task, i in picks],
            [places.index(task) for task, _ in picks],
            self.pad_id,
            causal=self.causal,
            shares_rows=self.shares_rows,
            few_shapes=few_shapes,
            counted=[self.counted[task][i] for task, i in picks] if self.counted else None,
        )

    def drawn(self, step: int) -> dict[str, list[int]]:
        """Which samples of each task a step takes."""
        return {
            task: draw(len(rows), self.batch_size, step, f"{self.seed}/{task}") for task, rows in self.tokens.items()
        }


def tokenize(tokenizer: Any, texts: Mapping[str, Sequence[str]], max_length: int) -> dict[str, list[list[int]]]:
    """Token ids of every sample, cut at ``max_length``. Raises DataError naming a sample that has no token."""
    tokens = {}
    for task, rows in texts.items():
        tokens[task] = tokenizer(list(rows), truncation=True, max_length=max_length)["input_ids"] if rows else []
        empty = [i for i, ids in enumerate(tokens[task]) if not ids]
        if empty:
            raise DataError(f"sample {empty[0] + 1} of task {task} has no token; remove empty texts from its data")
    return tokens


def pad_id_of(tokenizer: Any) -> int:
    """What fills rows up: no matter which token, where it weighs nothing."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def with_answer(prompt: Sequence[int], answer: Sequence[int], positions: str) -> tuple[list[int], slice]:
    """The tokens of a row, and which of them count: at "full" those that computed the answer, at "last" the last."""
    ids = [*prompt, *answer[:-1]]
    return ids, slice(len(prompt) - 1 if positions == "full" else len(ids) - 1, len(ids))
