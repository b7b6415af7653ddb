"""Methods on singular values and directions. They commute with a change of basis, so each runs in the factors' span.

    X_k = U_k diag(S_k) V_k'      U_k, V_k: true directions only, of singular values above the rounding of float32
    polar(U) = P Q'   of  U = P S Q':   the nearest matrix with orthonormal columns

tsv       D = polar([U_1 .. U_K]) diag(S_1 .. S_K) polar([V_1 .. V_K])',   of each task its first directions
cart      D = T + prior sum_k rank_q(X_k - T),   T = mean_k X_k
iso-c     D = mean(S) U V'   of  U diag(S) V' = sum_k X_k
iso-cts   D = mean(S) polar(U) polar(V)',  most directions those of the sum, the others of what they leave of each X_k
svd       D = the nearest matrix of one rank to sum_k w_k D_k

The originals decompose dense updates, in which directions of singular value zero are arbitrary, and TSV and Iso let
them take part. Here they do not; what has no answer without them is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.checks import require_choice, require_fraction
from nsc.errors import NSCError
from nsc.methods.protocol import LayerInfo, LowRank, Method, Updates, decomposed

NULL = 2**-24  # of the largest: a singular value that rounding of factors to float32 can make of zero


@dataclass(frozen=True)
class NoSettings:
    """Settings of ``tsv`` and ``iso-c``: there is nothing to choose."""


@dataclass(frozen=True)
class CartSettings:
    """Settings of ``cart``.

    Attributes:
        ratio: the rank q of what each task keeps of its own, as a fraction of the size.
        prior: the weight of those parts beside the mean; None: 2 in full, 0.1 in another space.
        rounding: of that rank, "down" or "up"; None: down in full, up in another space.
    """

    ratio: float = 0.12
    prior: float | None = None
    rounding: str | None = None

    def __post_init__(self) -> None:
        require_fraction("ratio", self.ratio, above_zero=True)
        require_choice("rounding", self.rounding, (None, "down", "up"))


@dataclass(frozen=True)
class IsoCtsSettings:
    """Settings of ``iso-cts``.

    Attributes:
        common: the fraction of directions that the tasks share; the others are divided between the tasks.
    """

    common: float = 0.8

    def __post_init__(self) -> None:
        require_fraction("common", self.common, above_zero=True)


@dataclass(frozen=True)
class SvdSettings:
    """Settings of ``svd``.

    Attributes:
        rank: of the merged adapter; None: the largest of the layer's adapters.
        split: where singular values go, "sqrt" (to both factors alike) or "B" (all of them, as in PEFT).
    """

    rank: int | None = None
    split: str = "sqrt"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise NSCError(f"rank must be at least 1, not {self.rank}")
        require_choice("split", self.split, ("sqrt", "B"))


def tsv(X: Tensor, settings: NoSettings, layer: LayerInfo) -> Tensor:
    """Merge one layer by TSV-M.

    The tasks that change this layer share its ``layer.size`` directions alike.

    Args:
        X: (K, p, q), without weights.
        settings: none.
        layer: the tasks, their weights and the size.

    Returns:
        (p, q).

    Raises:
        NSCError: if the directions that are kept are linearly dependent.

    Source: https://arxiv.org/abs/2412.00081
    """
    present = [triplets for triplets in map(_triplets, layer.weighted(X)) if len(triplets[1])]
    if not present:
        return torch.zeros_like(X[0])
    share = max(1, layer.size // len(present))
    U, S, V = _concatenated([_leading(triplets, share) for triplets in present])
    return (_polar(U, "tsv", layer) * S) @ _polar(V, "tsv", layer).T


def cart(X: Tensor, settings: CartSettings, layer: LayerInfo) -> Tensor:
    """Merge one layer by CART: the mean, and the low-rank part of each task's difference from it.

    Args:
        X: (K, p, q), without weights.
        settings: the settings.
        layer: the tasks, their weights, the size and the space.

    Returns:
        (p, q).

    Source: https://arxiv.org/abs/2412.12153
    """
    X = layer.weighted(X)
    in_core = layer.space != "full"
    up = settings.rounding == "up" if settings.rounding else in_core
    rank = max(1, (math.ceil if up else math.floor)(settings.ratio * layer.size))
    prior = (0.1 if in_core else 2.0) if settings.prior is None else settings.prior
    mean = X.mean(0)
    U, S, Vh = torch.linalg.svd(X - mean, full_matrices=False)
    return mean + prior * ((U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]).sum(0)


def iso_c(X: Tensor, settings: NoSettings, layer: LayerInfo) -> Tensor:
    """Merge one layer by Iso-C: the sum with equal singular values.

    Args:
        X: (K, p, q), without weights.
        settings: none.
        layer: the tasks and their weights.

    Returns:
        (p, q).

    Raises:
        NSCError: if the sum is singular.

    Source: https://arxiv.org/abs/2502.04959
    """
    return isotropize(layer.weighted(X).sum(0), layer)


def isotropize(matrix: Tensor, layer: LayerInfo) -> Tensor:
    """Set all singular values of a merged matrix to their mean.

    Args:
        matrix: (p, q).
        layer: its name, for the message.

    Returns:
        (p, q).

    Raises:
        NSCError: if the matrix is singular: the mean would go to directions that are arbitrary.

    Source: https://arxiv.org/abs/2502.04959
    """
    U, S, V = _regular_triplets(matrix, layer)
    return S.mean() * U @ V.T


def iso_cts(X: Tensor, settings: IsoCtsSettings, layer: LayerInfo) -> Tensor:
    """Merge one layer by Iso-CTS: the sum's first directions and some of each task's own, with one singular value.

    Args:
        X: (K, p, q), without weights.
        settings: the settings.
        layer: the tasks and their weights.

    Returns:
        (p, q).

    Raises:
        NSCError: if the sum is singular, or the directions are linearly dependent.

    Source: https://arxiv.org/abs/2502.04959
    """
    X = layer.weighted(X)
    merged = _regular_triplets(X.sum(0), layer)
    present = [x for x in X if x.any()]
    own, shared = _divide(len(merged[1]), len(present), settings.common)
    common = _leading(merged, shared)
    rests = [_triplets(x - common[0] @ (common[0].T @ x), torch.linalg.matrix_norm(x, 2)) for x in present]
    U, S, V = _concatenated([common, *(_leading(rest, own) for rest in rests)])
    return S.mean() * _polar(U, "iso-cts", layer) @ _polar(V, "iso-cts", layer).T


def truncated(updates: Updates, settings: SvdSettings) -> LowRank:
    """Truncate the weighted sum to a rank, through QR of its factors; exact where it has no higher rank.

    Args:
        updates: one layer's K updates.
        settings: rank and split.

    Returns:
        The best approximation of that rank.

    Source: https://github.com/huggingface/peft
    """
    U, S, V = _leading(decomposed(updates.weighted_sum()), settings.rank or max(updates.ranks))
    on_B, on_A = (S.sqrt(), S.sqrt()) if settings.split == "sqrt" else (S, torch.ones_like(S))
    return LowRank(U * on_B, (V * on_A).T)


Triplets = tuple[Tensor, Tensor, Tensor]  # U (p, r), S (r,), V (q, r)


def _triplets(matrix: Tensor, largest: Tensor | None = None) -> Triplets:
    """Return the true singular triplets: of values above NULL of the largest one, or of ``largest``."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((NULL * (S[:1] if largest is None else largest) < S).sum())
    return _leading((U, S, Vh.T), rank)


def _leading(triplets: Triplets, count: int) -> Triplets:
    U, S, V = triplets
    return U[:, :count], S[:count], V[:, :count]


def _concatenated(parts: list[Triplets]) -> Triplets:
    U, S, V = (torch.cat(side, -1) for side in zip(*parts, strict=True))
    return U, S, V


def _regular_triplets(matrix: Tensor, layer: LayerInfo) -> Triplets:
    """Return the singular triplets of a matrix of full rank or of zeros; refuse others."""
    triplets = _triplets(matrix)
    rank, size = len(triplets[1]), min(matrix.shape)
    if 0 < rank < size:
        raise NSCError(
            f"{layer.name}: the merged matrix is singular (rank {rank} of {size}), so its singular values cannot all be"
            " set to their mean: it would go to arbitrary directions. This happens where adapters share a factor, as"
            " with VeRA, where one is given twice or with weight 0, and after trimming. Leave isotropize out, or take"
            " task-arithmetic or cart"
        )
    return triplets


def _polar(columns: Tensor, method: str, layer: LayerInfo) -> Tensor:
    """Return the nearest matrix with orthonormal columns; refuse dependent ones."""
    P, S, Qh = torch.linalg.svd(columns, full_matrices=False)
    if len(S) and (len(S) < columns.shape[1] or S[-1] <= NULL * S[0]):
        raise NSCError(
            f"{layer.name}: {method} makes the {columns.shape[1]} singular directions of all adapters orthogonal, but"
            " they are linearly dependent, so the result is arbitrary. This happens where adapters share a factor, as"
            " with VeRA, and where one is given twice. Leave out the one given twice, or take cart or ties"
        )
    return P @ Qh


def _divide(size: int, tasks: int, fraction: float) -> tuple[int, int]:
    """Return how many directions each task has of its own, and how many are common."""
    own = round((size - int(size * fraction)) / max(tasks, 1))
    own = min(own, size // max(tasks, 1))
    return own, size - own * tasks


METHODS = {
    "svd": Method(
        "the sum of all updates, cut to one rank",
        "https://github.com/huggingface/peft",
        SvdSettings,
        on_factors=truncated,
    ),
    "tsv": Method(
        "TSV-M: every task's first singular directions, made orthogonal to each other",
        "https://arxiv.org/abs/2412.00081",
        NoSettings,
        on_matrices=tsv,
        spaces=("full", "core", "ctm"),
        basis_free=True,
    ),
    "cart": Method(
        "the mean, and of each task's difference from it the part of low rank",
        "https://arxiv.org/abs/2412.12153",
        CartSettings,
        on_matrices=cart,
        spaces=("full", "core", "ctm"),
        basis_free=True,
    ),
    "iso-c": Method(
        "the sum with equal singular values",
        "https://arxiv.org/abs/2502.04959",
        NoSettings,
        on_matrices=iso_c,
        basis_free=True,
    ),
    "iso-cts": Method(
        "the sum's first directions and some of each task's own, with equal singular values",
        "https://arxiv.org/abs/2502.04959",
        IsoCtsSettings,
        on_matrices=iso_cts,
        basis_free=True,
    ),
}
