"""What experts say about samples, in the places where a batch has those samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsc.batch import Expected


class Output(NamedTuple):
    """What an expert says about one sample, in P places.

    Attributes:
        spans: the tokens of the sample that its head reads in each place: the first, and the one after the last.
        values: (P, C) in at least float32.
        ids: (P, C) int64, which outputs of the head ``values`` are; None for all of them, in order.
    """

    spans: Sequence[tuple[int, int]]
    values: Tensor
    ids: Tensor | None = None


def expected(
    rows: Sequence[Sequence[int]],
    starts: Mapping[int, int],
    tasks: Sequence[int],
    outputs: Sequence[Output],
    counts: Tensor,
    shape: tuple[int, int],
) -> Expected:
    """Put the outputs of samples where a batch has them; each sample weighs the same within its task.

    Args:
        rows: numbers of the samples in each row of the batch, from the left.
        starts: number of a sample -> the token of its row at which it starts.
        tasks: task of each sample.
        outputs: of each sample.
        counts: (K,) samples of each task, also in other batches whose losses are added.
        shape: rows of the batch, and places of each, at least as many as the fullest row has.

    Returns:
        What the batch holds.
    """
    filled = [[(i, j) for i in row for j in range(len(outputs[i].spans))] for row in rows]
    wide = max(output.values.shape[1] for output in outputs)
    dtype = outputs[0].values.dtype
    start, stop, task = torch.zeros(3, *shape, dtype=torch.int64)
    weight, values = torch.zeros(shape, dtype=dtype), torch.zeros(*shape, wide, dtype=dtype)
    ids = torch.zeros(*shape, wide, dtype=torch.int64) if any(o.ids is not None for o in outputs) else None
    for r, row in enumerate(filled):
        for p, (i, j) in enumerate(row):
            output, first = outputs[i], starts[i]
            start[r, p], stop[r, p] = first + output.spans[j][0], first + output.spans[j][1]
            task[r, p], weight[r, p] = tasks[i], 1 / (int(counts[tasks[i]]) * len(output.spans))
            values[r, p, : output.values.shape[1]] = output.values[j]
            if ids is not None and output.ids is not None:
                ids[r, p, : output.ids.shape[1]] = output.ids[j]
    return Expected(start, stop, task, weight, values, ids)
