"""What a merging method is: a pure function of one layer's K updates, and what it may know beside them.

    D_k = s_k B_k A_k,    A_k: (r_k, d)   B_k: (m, r_k)   r_k = 0 where adapter k does not touch the layer
    w_k: the weight of task k in this layer, such as a learned coefficient; 1 by default

A method of *matrices* takes X (K, p, q), the updates as a space shows them, and gives (p, q); so it runs in every space
in which it makes sense. A method of *factors* takes the factors themselves and gives factors. The merge's own scale is
outside both, applied once by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nsc.errors import NSCError

Part = TypeVar("Part")


class LowRank(NamedTuple):
    """An update ``B @ A``: B (m, R), A (R, d), both float64."""

    B: Tensor
    A: Tensor


def decomposed(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), V (d, r) of the SVD of an update: QR of both factors, SVD of what is left, R wide at most."""
    left, B = torch.linalg.qr(update.B)
    right, A = torch.linalg.qr(update.A.mT)
    U, S, Vh = torch.linalg.svd(B @ A.mT, full_matrices=False)
    return left @ U, S, right @ Vh.mT


class Place(NamedTuple):
    """Where K matrices come from.

    name: of the layer.  tasks: K names.  weights: (K,) w_k, which the method itself applies.  size: min(m, d) of the
    full layer, or min(p, q) of a core: what fractions of a rank are taken of.  space: of SPACES.  keep: (K, p, q) bool,
    what a method that drops entries at random is to keep, where the caller says so.
    """

    name: str
    tasks: tuple[str, ...]
    weights: Tensor
    size: int
    space: str = "full"
    keep: Tensor | None = None

    def weighted(self, X: Tensor) -> Tensor:
        """(K, p, q) -> w_k X_k."""
        return X * self.weights.to(X)[:, None, None]


@dataclass(frozen=True)
class Updates:
    """One layer's K updates by their factors, as the adapters hold them; scales and weights are not in them.

    A: K of (r_k, d).  B: K of (m, r_k).  scales: s_k.  weights: w_k.
    """

    name: str
    tasks: tuple[str, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d) of the layer."""
        return self.B[0].shape[0], self.A[0].shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_k."""
        return tuple(len(a) for a in self.A)

    def place(self, size: int | None = None) -> Place:
        """For the matrices of this layer, or of its core of ``size``."""
        return Place(self.name, self.tasks, torch.tensor(self.weights, dtype=torch.float64), size or min(self.shape))

    def scaled(self) -> tuple[Tensor, ...]:
        """K of s_k B_k (m, r_k), float64: the scale is in them, once; the weight is not."""
        return tuple(s * b.double() for s, b in zip(self.scales, self.B, strict=True))

    def weighted(self) -> tuple[Tensor, ...]:
        """K of w_k s_k B_k (m, r_k), float64."""
        return tuple(w * b for w, b in zip(self.weights, self.scaled(), strict=True))

    def present(self) -> Updates:
        """Without the adapters that do not touch the layer."""
        here = [k for k, rank in enumerate(self.ranks) if rank]

        def of(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(parts[k] for k in here)

        return Updates(self.name, of(self.tasks), of(self.A), of(self.B), of(self.scales), of(self.weights))

    def require_one_rank(self, method: str) -> None:
        """Raises NSCError where ranks differ, for a method that combines factors entry by entry."""
        if len(set(self.ranks)) > 1:
            ranks = ", ".join(f"{task} {rank}" for task, rank in zip(self.tasks, self.ranks, strict=True))
            raise NSCError(
                f"{method} combines factors entry by entry, so ranks must be equal; in {self.name} they are {ranks}."
                " Choose a method that takes any ranks, such as task-arithmetic, svd or core-ties"
            )

    def deltas(self) -> Tensor:
        """(K, m, d): D_k, without weights, in float32, or float64 where the factors are."""
        dtype = torch.promote_types(self.A[0].dtype, torch.float32)
        return torch.stack(
            [(s * b.to(dtype)) @ a.to(dtype) for s, b, a in zip(self.scales, self.B, self.A, strict=True)]
        )


Matrices = Callable[[], Iterator[tuple[Place, Tensor]]]  # every layer's X, one at a time, anew at every call


@dataclass(frozen=True)
class Method:
    """One merging method.

    line: what it does, for a list.  source: where it is from.  settings: a frozen dataclass of what can be chosen.
    on_matrices: X (K, p, q), settings, place -> (p, q).  on_factors: updates, settings -> LowRank, instead.  survey:
    where one layer depends on all others: every layer's X, settings -> settings that know of them.  spaces: in which it
    can run.  basis_free: whether a change of orthonormal basis goes through it, so that in full space it runs in the
    factors' span.  whole_layers: whether it also merges layers that adapters fine-tuned whole, which have no factors.
    takes_masks: whether the caller may say which entries it keeps.
    """

    line: str
    source: str
    settings: type
    on_matrices: Callable[[Tensor, Any, Place], Tensor] | None = None
    on_factors: Callable[[Updates, Any], LowRank] | None = None
    survey: Callable[[Matrices, Any], Any] | None = None
    spaces: tuple[str, ...] = ("full",)
    basis_free: bool = False
    whole_layers: bool = False
    takes_masks: bool = False
