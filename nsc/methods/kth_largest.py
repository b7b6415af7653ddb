"""The k-th largest magnitude of more entries than fit into memory, exactly, in two passes over them.

The bits of a float that is not negative sort as the float does. The first pass counts how many entries share each
exponent and first mantissa bits; this tells which of these bins holds the k-th largest, and how many entries lie above
it. The second pass collects that bin, for LoRA updates about a thousandth of all entries, and ends the search in it.
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
    """Return the k-th largest magnitude of every row, as a sort of all its entries would give it.

    A NaN counts as larger than everything. Memory: one piece, and the collected bins.

    Args:
        pieces: gives the same pieces (K, ...) at every call; row i of all of them together is row i of the entries.
        count: how many entries a row has -> k.

    Returns:
        (K,) in the widest dtype of the pieces, on their device: infinity for k = 0, 0 for a k past all entries.
    """
    tops, total = _histogram(pieces)
    wanted = count(total)
    if tops is None or wanted <= 0 or wanted > total:
        return _like(pieces, math.inf if wanted <= 0 else 0.0)
    above = tops.flip(1).cumsum(1)  # entries in the j + 1 highest bins
    index = (above < wanted).sum(1)
    before = torch.where(index > 0, above.gather(1, (index - 1).clamp_min(0)[:, None])[:, 0], 0)
    return _within(pieces, BINS - 1 - index, (wanted - before).tolist())


def _bins(x: Tensor) -> Tensor:
    """Return the bin of each entry, int32; rounding float64 to float32 keeps the order."""
    return x.abs().float().view(torch.int32).bitwise_right_shift_(SHIFT)


def _histogram(pieces: Pieces) -> tuple[Tensor | None, int]:
    """Return how many entries of each row are in each bin, (K, BINS) int64, and the number of entries of one row."""
    tops, total = None, 0
    for piece in pieces():
        rows = torch.stack([torch.bincount(_bins(x).flatten(), minlength=BINS) for x in piece])
        tops, total = rows if tops is None else tops.add_(rows), total + piece[0].numel()
        del piece  # before the next one is made
    return tops, total


def _within(pieces: Pieces, bins: Tensor, wanted: list[int]) -> Tensor:
    """Return the ``wanted``-th largest entry of one bin of every row; zeros, the smallest, are not even collected."""
    collected: list[list[tuple[Tensor, Tensor]]] = [[] for _ in wanted]
    for piece in pieces():
        for row, x, which in zip(collected, piece, bins, strict=True):
            inside = x[_bins(x) == which].abs()
            row.append(torch.unique(inside[inside > 0], return_counts=True))
        del piece, x
    return torch.stack([_of_counted(row, k) for row, k in zip(collected, wanted, strict=True)])


def _of_counted(parts: list[tuple[Tensor, Tensor]], k: int) -> Tensor:
    values, counts = (torch.cat(side) for side in zip(*parts, strict=True))
    values, order = values.sort(descending=True)
    index = (counts[order].cumsum(0) < k).sum()
    return torch.cat([values, values.new_zeros(1)])[index]


def _like(pieces: Pieces, value: float) -> Tensor:
    for piece in pieces():
        return piece.new_full((len(piece),), value)
    return torch.empty(0)
