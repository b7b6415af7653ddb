"""Spaces that methods on matrices run in: a layer's updates as K matrices, and the way back.

full    X_k = D_k
core    X_k = U' D_k V,  U, V: singular vectors of the stacked B and A     D = U X V'
knots   X_k = U' D_k,    U: left singular vectors of [D_1 .. D_K]          D = U X
ctm     X_k = U' D_k V,  U, V: r columns each, with sum_k c_k^2 |X_k|^2 as large as can be     D = U X V'

Source: Core Space https://arxiv.org/abs/2509.17786, KnOTS https://arxiv.org/abs/2410.19735, Compress then Merge
https://arxiv.org/abs/2606.03723.

All come from the QR of the tall factors and the SVD of what is left of them, which is R = sum_k r_k wide; nothing as
wide as the layer is decomposed. All of it is float64; directions whose singular value is within its rounding are left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.methods.protocol import LayerInfo, LowRank, Updates

SWEEPS = 20  # of the alternating iteration that fits the directions of ``ctm``


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
    return _padded(updates, *_coordinates(updates), "core")


def ctm(updates: Updates, rank: int | None = None, beta: float = 0.25) -> View:
    """Compress the updates to r directions that they share, before they are merged: the merge has rank r at most.

    The directions are the Tucker-2 decomposition of [c_1 D_1 .. c_K D_K], by alternating least squares from the
    leading singular vectors of all c_k D_k side by side. c_k = beta + (1 - beta) |D|/|D_k|, with the mean norm |D| of
    the updates that are not zero, keeps a large update from having all directions.

    Args:
        updates: one layer's K updates.
        rank: r; None for the largest rank of the layer's adapters.
        beta: 1 fits the updates as they are, 0 as if they had equal norms.

    Returns:
        X (K, p, q) float64, with p = min(m, r, R), q = min(d, r, R); rows and columns that nothing lies in are zero.

    Source: https://arxiv.org/abs/2606.03723
    """
    U, X, V = _coordinates(updates)
    norms = X.flatten(1).norm(dim=1)[:, None, None]
    mean = norms.sum() / (norms > 0).sum().clamp_min(1)
    fitted = X * torch.where(norms > 0, beta + (1 - beta) * mean / norms, 0)
    r = rank or max(updates.ranks)
    left, right = _leading(fitted, r), _leading(fitted.mT, r)
    for _ in range(SWEEPS):
        left = _leading(fitted @ right, r)
        right = _leading(fitted.mT @ left, r)
    return _padded(updates, U @ left, left.T @ X @ right, V @ right, "ctm", r)


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


def _coordinates(updates: Updates) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, p), X (K, p, q) and V (d, q) of Core Space, without rows and columns of zeros: D_k = U X_k V'."""
    U, B = _left(torch.cat(updates.scaled(), 1))
    V, A = _left(torch.cat([a.double() for a in updates.A]).T)
    ranks = list(updates.ranks)
    return U, torch.stack([b @ a.T for b, a in zip(B.split(ranks, 1), A.split(ranks, 1), strict=True)]), V


def _padded(updates: Updates, U: Tensor, X: Tensor, V: Tensor, space: str, rank: int | None = None) -> View:
    """Show X (K, p, q) with rows and columns of zeros where the layer has fewer directions than R, or ``rank``."""
    (m, d), (p, q) = updates.shape, X.shape[1:]
    most = min(sum(updates.ranks), rank or sum(updates.ranks))
    height, width = min(m, most), min(d, most)
    padded = torch.nn.functional.pad(X, (0, width - q, 0, height - p))
    layer = updates.layer_info(min(height, width))._replace(space=space)
    return View(padded, layer, lambda M: LowRank(U @ M[:p, :q], V.T))


def _leading(X: Tensor, count: int) -> Tensor:
    """Return the leading left singular vectors (p, count) of [X_1 .. X_K], through the QR of its transpose."""
    square = torch.linalg.qr(X.mT.flatten(0, 1), mode="r").R.mT
    return torch.linalg.svd(square, full_matrices=False).U[:, :count]


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


SPACES: dict[str, Callable[..., View]] = {"full": full, "core": core, "knots": knots, "ctm": ctm}
