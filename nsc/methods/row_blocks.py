"""Element-wise work on K large matrices, some rows at a time, so that intermediate results stay small.

On a CPU the blocks stay in its cache, which also makes them faster than whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nsc.methods.protocol import LayerInfo, Matrices

CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 27  # entries of all K together


def row_blocks(X: Tensor) -> tuple[Tensor, ...]:
    """Split K matrices into blocks of rows.

    Args:
        X: (K, p, q).

    Returns:
        Views (K, b, q) of ``X``.
    """
    limit = CPU_BLOCK if X.device.type == "cpu" else GPU_BLOCK
    return X.split(max(1, limit // max(1, X[:, :1].numel())), dim=1)


def streamed(matrices: Matrices) -> Iterator[tuple[LayerInfo, Tensor]]:
    """Go through all layers by blocks of rows.

    A layer is freed before the next one is made, provided that the caller drops its last block.

    Args:
        matrices: every layer's X (K, p, q).

    Yields:
        The layer, and (K, b, q): a block of its rows.
    """
    for layer, X in matrices():
        blocks = iter(row_blocks(X))
        del X
        yield from ((layer, block) for block in blocks)


def by_rows(function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    """Apply an element-wise function to K matrices, block by block.

    Args:
        function: (K, b, q) -> (b, q), where each entry depends on the K entries at its place alone.
        X: (K, p, q).

    Returns:
        (p, q).
    """
    return torch.cat([function(block) for block in row_blocks(X)])
