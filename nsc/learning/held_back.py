"""Rows held out of learning, by which the step that is kept is chosen, without labels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.learning.agreement import Agreement
from nsc.learning.passes import on_each
from nsc.runtime.distributed import ALONE, Team
from nsc.runtime.placement import input_device
from nsc.runtime.sharding import shards_of

SHARE, LEAST, MOST = 0.1, 4, 128  # of a task's rows, and rows
FEW = 16  # rows of a task below which matching is known to overfit


@dataclass(frozen=True)
class HeldBack:
    """Held-out rows of all tasks.

    Attributes:
        agreement: how far the merged model is from the experts.
        batches: the rows in passes, with what the experts say about them.
        team: the processes that share them; all of them must measure the same models in the same order.
    """

    agreement: Agreement
    batches: Sequence[Batch]
    team: Team = ALONE

    @torch.no_grad()
    def distances(self, model: nn.Module) -> list[float]:
        """Measure a model, with whatever merge is in it.

        Args:
            model: the body.

        Returns:
            Each task's distance from its expert, relative to the bare base's; 0 for a task without rows.
        """
        device, dtype = input_device(model), next(model.parameters()).dtype

        def measure(batch: Batch) -> tuple[Tensor]:
            batch = batch.to(device)
            return (self.agreement.by_task(model(**batch.arguments(dtype))[0], batch).double(),)

        parts = on_each(self.batches, measure, self.team, shards_of(model))
        total = torch.zeros(len(self.agreement.heads), dtype=torch.float64, device=parts[0][0].device)
        for (part,) in parts:
            total += part
        return total.tolist()

    def __call__(self, model: nn.Module) -> float:
        """Return the mean distance over tasks with rows.

        Args:
            model: the body, with whatever merge is in it.

        Returns:
            1 for a merge that knows as little as the bare base, 0 for one that says what the experts say.
        """
        return sum(self.distances(model)) / sum(head is not None for head in self.agreement.heads)


class Chosen(list[Any]):
    """Some rows of a task, which know their numbers among all of its rows.

    Args:
        rows: rows of a task, of which some may have been chosen before.
        order: the numbers of those that are taken.

    Attributes:
        numbers: of each, among all rows of the task.
    """

    def __init__(self, rows: Sequence[Any], order: Sequence[int]) -> None:
        super().__init__(rows[i] for i in order)
        self.numbers = [number_of(rows, i) for i in order]


def number_of(rows: Sequence[Any], i: int) -> int:
    """Return which row of a task one of these is.

    Args:
        rows: rows of the task, all or chosen.
        i: place among these.

    Returns:
        Its number among all rows of the task, from 0.
    """
    return rows.numbers[i] if isinstance(rows, Chosen) else i


def some_of(rows: Sequence[Any], most: int, key: str) -> list[Any]:
    """Choose rows at random.

    Args:
        rows: rows of a task.
        most: how many, at most.
        key: seed of the choice.

    Returns:
        The chosen ones in their own order.
    """
    order = list(range(len(rows)))
    random.Random(key).shuffle(order)
    return Chosen(rows, sorted(order[:most]))


def hold_back(
    samples: Mapping[str, Sequence[Any]], seed: int
) -> tuple[dict[str, list[Any]], dict[str, list[Any]], list[str]]:
    """Hold back a tenth of each task's rows, at least four and at most 128, but never more than half of them.

    Args:
        samples: task -> its rows.
        seed: seed of the choice.

    Returns:
        Task -> rows to learn from, task -> rows held back, and warnings. A single row is in both.
    """
    learned: dict[str, list[Any]] = {}
    held: dict[str, list[Any]] = {}
    warnings = []
    for task, rows in samples.items():
        order = list(range(len(rows)))
        random.Random(f"{seed}/{task}/held").shuffle(order)
        size = min(max(LEAST, int(len(rows) * SHARE)), MOST, len(rows) // 2)
        learned[task] = Chosen(rows, sorted(order[size:]))
        held[task] = Chosen(rows, sorted(order[:size] if size else order))
        if 0 < len(rows) < FEW:
            warnings.append(
                f"task {task} has {len(rows)} unlabeled rows; matching overfits to fewer than {FEW}: give more rows, or"
                " merge by nsc"
            )
    return learned, held, warnings
