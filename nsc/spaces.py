"""Spaces that methods of matrices run in: a layer's updates as K matrices, and the way back.

full    X_k = D_k
core    X_k = U' D_k V,  U, V: singular vectors of the stacked B and A     D = U X V'
knots   X_k = U' D_k,    U: left singular vectors of [D_1 .. D_K]          D = U X
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nsc.methods.method import LowRank, Place, Updates


@dataclass(frozen=True)
class View:
    """A layer's updates in a space.

    X: (K, p, q), without weights.  place: for the method.  lift: (p, q) -> the update of the layer.
    """

    X: Tensor
    place: Place
    lift: Callable[[Tensor], Tensor | LowRank]


def full(updates: Updates) -> View:
    """The dense updates themselves; (m, d) stays dense."""
    return View(updates.deltas(), updates.place(), lambda D: D)


SPACES: dict[str, Callable[[Updates], View]] = {"full": full}
