"""The k-th largest magnitude of more entries than fit into memory, exactly, in two looks at them.

The bits of a float that is not negative sort as the float does. The first look counts how many entries share each sign,
exponent and first mantissa bits; so it is known which of these bins holds the k-th largest, and how many lie above. The
second look collects that bin, for LoRA updates some thousandth of all, and ends the search in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SHIFT = 15  # of 31 bits of a float32 magnitude: 8 of the exponent and 8 of the mantissa remain
BINS = 1 << 16
Pieces = Callable[[], Iterable[Tensor]]  # each (K, ...), the same ones at every call


def kth_largest(pieces: Pieces, count: Callable[[int], int]) -> Tensor:
    """(K,): the k-th largest |x| among all entries of row k of all pieces, k = ``count``(how many they are).

    Infinity for k = 0, and 0 for a k past all entries. The same value as of a sort, in the widest dtype of the pieces,
    on their device; a NaN counts as larger than everything. Memory: one piece, and the collected bins.
    """
    tops, total = _histogram(pieces)
    wanted = count(total)
    if tops is None or wanted <= 0 or wanted > total:
        return _like(pieces, math.inf if wanted <= 0 else 0.0)
    above = tops.flip(1).cumsum(1)  # entries in the j + 1 highest bins
    place = (above < wanted).sum(1)
    before = torch.where(place > 0, above.gather(1, (place - 1).clamp_min(0)[:, None])[:, 0], 0)
    return _within(pieces, BINS - 1 - place, (wanted - before).tolist())


def _bins(x: Tensor) -> Tensor:
    """The bin of each entry, int32; rounding float64 to float32 keeps the order."""
    return x.abs().float().view(torch.int32).bitwise_right_shift_(SHIFT)


def _histogram(pieces: Pieces) -> tuple[Tensor | None, int]:
    """(K, BINS) int64, and the number of entries of one row."""
    tops, total = None, 0
    for piece in pieces():
        rows = torch.stack([torch.bincount(_bins(x).flatten(), minlength=BINS) for x in piece])
        tops, total = rows if tops is None else tops.add_(rows), total + piece[0].numel()
        del piece  # before the next one is made
    return tops, total


def _within(pieces: Pieces, bins: Tensor, wanted: list[int]) -> Tensor:
    """(K,): of the entries of one bin a row, the ``wanted`` largest; zeros, the smallest, are not even collected."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in wanted]
    for piece in pieces():
        for row, x, which in zip(found, piece, bins, strict=True):
            inside = x[_bins(x) == which].abs()
            row.append(torch.unique(inside[inside > 0], return_counts=True))
        del piece, x
    return torch.stack([_of_counted(row, k) for row, k in zip(found, wanted, strict=True)])


def _of_counted(parts: list[tuple[Tensor, Tensor]], k: int) -> Tensor:
    values, counts = (torch.cat(side) for side in zip(*parts, strict=True))
    values, order = values.sort(descending=True)
    place = (counts[order].cumsum(0) < k).sum()
    return torch.cat([values, values.new_zeros(1)])[place]


def _like(pieces: Pieces, value: float) -> Tensor:
    for piece in pieces():
        return piece.new_full((len(piece),), value)
    return torch.empty(0)
