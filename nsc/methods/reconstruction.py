"""How near a regression comes to the experts' own updates: from the moments that it was made from, no forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsc.methods.equations import Solution
from nsc.methods.inputs import InputMoments, SpanMoments
from nsc.methods.protocol import Updates
from nsc_kernels import GramCache


class Observed(NamedTuple):
    """What was seen in one layer of z = W A x, with orthonormal rows of every W_k A_k, by task.

    Attributes:
        second: (K, p, p) of z.
        cross: (K, R, p) of A_k x, in the rows of adapter k and zero in others, with z.
        own: (K, R, R) of A_k x.
        basis: (p, d), W A.
    """

    second: Tensor
    cross: Tensor
    own: Tensor
    basis: Tensor


def observed(updates: Updates) -> Observed:
    """Return the moments of u in the coordinates of orthonormal rows.

    Args:
        updates: one layer's K updates, with ``SpanMoments``.

    Returns:
        Moments of each task.
    """
    assert isinstance(updates.moments, SpanMoments)
    whiten, unwhiten, ranks = orthonormal(updates)
    second = whiten @ updates.moments.second @ whiten.mT
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(second.device)
    mine = owner == torch.arange(len(ranks)).to(second.device)[:, None]  # (K, p)
    cross = unwhiten @ (second * mine[:, :, None])
    own = unwhiten @ (second * mine[:, :, None] * mine[:, None]) @ unwhiten.mT
    return Observed(second, cross, own, whiten @ stacked(updates))


def reconstruction(updates: Updates, solution: Solution) -> Tensor:
    """Return how near a merge comes to the experts' own updates on the inputs that it was made from.

    Args:
        updates: one layer's K updates, with moments.
        solution: of their equations.

    Returns:
        (T, 3) float64: E |D x~|^2, E (D x~)'(w_k D_k x) and E |w_k D_k x|^2 of each task, or where only their sum is
        known of all together. At scale c the squared error is c^2, -2 c and 1 times these.
    """
    moments, X, B = updates.moments, solution.coordinates, torch.cat(updates.weighted(), 1)
    if isinstance(moments, InputMoments):
        of_all = moments.second.product(X) @ X.mT, moments.cross @ X.mT, torch.block_diag(*moments.own)
        parts = tuple(part[None] for part in of_all)
    else:
        seen = observed(updates)
        parts = X @ seen.second @ X.mT, seen.cross @ X.mT, seen.own
    gram = B.mT @ B
    return torch.stack([(gram * part.mT).sum((-2, -1)) for part in parts], -1)


def stacked(updates: Updates) -> Tensor:
    """Stack the A_k of a layer.

    Args:
        updates: one layer's K updates.

    Returns:
        (R, d) float64.
    """
    return torch.cat([a.double() for a in updates.A])


def orthonormal(updates: Updates) -> tuple[Tensor, Tensor, list[int]]:
    """Return what gives each A_k orthonormal rows, and what undoes it.

    Args:
        updates: one layer's K updates.

    Returns:
        Block-diagonal W (p, R) and U (R, p), float64, with orthonormal rows of every W_k A_k and U W A = A, and the
        K numbers of these rows, fewer than r_k where A_k is rank-deficient.
    """
    factors = GramCache().factor(updates.A)
    whiten = torch.block_diag(*[f.whiten[: f.rank] for f in factors])
    unwhiten = torch.block_diag(*[f.unwhiten[:, : f.rank] for f in factors])
    return whiten, unwhiten, [f.rank for f in factors]
