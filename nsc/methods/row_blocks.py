"""Element-wise work on K large matrices, some rows at a time: what lies between X and the result stays small.

On a CPU the blocks stay in its cache, which makes them faster than whole matrices too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nsc.methods.protocol import Matrices, Place

CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 27  # entries of all K together


def row_blocks(X: Tensor) -> tuple[Tensor, ...]:
    """Views of X (K, p, q) by rows: (K, b, q) each."""
    limit = CPU_BLOCK if X.device.type == "cpu" else GPU_BLOCK
    return X.split(max(1, limit // max(1, X[:, :1].numel())), dim=1)


def streamed(matrices: Matrices) -> Iterator[tuple[Place, Tensor]]:
    """The same by blocks of rows; a layer is let go before the next one is made if its last block is."""
    for place, X in matrices():
        blocks = iter(row_blocks(X))
        del X
        yield from ((place, block) for block in blocks)


def by_rows(function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    """(p, q): ``function``, which sees no further than one entry of the K, on the blocks of X (K, p, q)."""
    return torch.cat([function(block) for block in row_blocks(X)])
