"""Spaces that methods on matrices run in: a layer's updates as K matrices, and the way back.

full    X_k = D_k
core    X_k = U' D_k V,  U, V: singular vectors of the stacked B and A     D = U X V'
knots   X_k = U' D_k,    U: left singular vectors of [D_1 .. D_K]          D = U X

Source: Core Space https://arxiv.org/abs/2509.17786, KnOTS https://arxiv.org/abs/2410.19735.

Both come from the QR of the tall factors and the SVD of what is left of them, which is R = sum_k r_k wide; nothing as
wide as the layer is decomposed. All of it is float64; directions whose singular value is within its rounding are left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.methods.protocol import LayerInfo, LowRank, Updates


@dataclass(frozen=True)
class View:
    """A layer's updates in a space.

    Attributes:
        X: (K, p, q), without weights.
        layer: what the method may know of the layer.
        lift: a merged matrix (p, q) -> the layer's update, dense (m, d) or factors.
    """

    X: Tensor
    layer: LayerInfo
    lift: Callable[[Tensor], Tensor | LowRank]


def full(updates: Updates) -> View:
    """Show the dense updates themselves; a merged matrix stays dense.

    Args:
        updates: one layer's K updates.

    Returns:
        X (K, m, d) in float32, or in float64 where the factors are float64.
    """
    return View(updates.deltas(), updates.layer_info(), lambda D: D)


def core(updates: Updates) -> View:
    """Show the updates in Core Space, rows and columns by decreasing singular value.

    Where the stacks have fewer directions, the last rows and columns are zero: fractions refer to the whole core, as in
    the original, but nothing lies in the arbitrary directions of singular value zero.

    Args:
        updates: one layer's K updates.

    Returns:
        X (K, p, q) float64, with p = min(m, R), q = min(d, R).

    Source: https://arxiv.org/abs/2509.17786
    """
    U, B = _left(torch.cat(updates.scaled(), 1))
    V, A = _left(torch.cat([a.double() for a in updates.A]).T)
    ranks = list(updates.ranks)
    X = torch.stack([b @ a.T for b, a in zip(B.split(ranks, 1), A.split(ranks, 1), strict=True)])
    (m, d), R, (p, q) = updates.shape, sum(ranks), X.shape[1:]
    height, width = min(m, R), min(d, R)
    padded = torch.nn.functional.pad(X, (0, width - q, 0, height - p))
    layer = updates.layer_info(min(height, width))._replace(space="core")
    return View(padded, layer, lambda M: LowRank(U @ M[:p, :q], V.T))


def knots(updates: Updates) -> View:
    """Show the updates in the space of KnOTS, rows by decreasing singular value.

    Args:
        updates: one layer's K updates.

    Returns:
        X (K, p, d) float64, with p the rank of [D_1 .. D_K].

    Source: https://arxiv.org/abs/2410.19735
    """
    Q, R = torch.linalg.qr(torch.cat(updates.scaled(), 1))
    A = [a.double() for a in updates.A]
    parts = R.split(list(updates.ranks), 1)
    # A_k = L_k Q_k: the rows of Q_k are orthonormal, so [D_1 .. D_K] has the left singular vectors of Q [R_k L_k]
    U = _directions(torch.cat([r @ torch.linalg.qr(a.T, mode="r").R.T for r, a in zip(parts, A, strict=True)], 1))
    X = torch.stack([(U.T @ r) @ a for r, a in zip(parts, A, strict=True)])
    layer = updates.layer_info(min(X.shape[1:]))._replace(space="knots")
    return View(X, layer, lambda M: LowRank(Q @ U, M))


def _left(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors U (n, p) of a stack (n, R), and U' stack (p, R)."""
    Q, R = torch.linalg.qr(tall)
    U = _directions(R)
    return Q @ U, U.T @ R


def _directions(matrix: Tensor) -> Tensor:
    """Return the left singular vectors whose singular value is not zero, by decreasing value."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    floor = S[:1] * max(matrix.shape) * torch.finfo(S.dtype).eps
    return U[:, : int((floor < S).sum())]


SPACES: dict[str, Callable[[Updates], View]] = {"full": full, "core": core, "knots": knots}
