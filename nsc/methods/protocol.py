"""What a merging method is: a pure function of one layer's K updates.

    D_k = s_k B_k A_k,    A_k: (r_k, d)   B_k: (m, r_k)   r_k = 0 where adapter k does not touch the layer
    w_k: the weight of task k in this layer, such as a learned coefficient; 1 by default

A method on *matrices* takes X (K, p, q), the updates as a space shows them, and returns (p, q); so it runs in every
space in which it makes sense. A method on *factors* takes the factors themselves and returns factors. The merge's scale
is outside both: the caller applies it once.

A *regression* also takes what is known of the layer's inputs x on rows of each task, and gives equations, which one
solver solves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods.equations import Equations
from nsc.methods.inputs import InputMoments, Inputs, SpanMoments


class LowRank(NamedTuple):
    """A low-rank update ``B @ A`` of one layer.

    Attributes:
        B: (m, R), float64.
        A: (R, d), float64.
    """

    B: Tensor
    A: Tensor


def decomposed(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of a low-rank update, without forming the dense matrix.

    It takes the QR of both factors and the SVD of what is left, which is R wide at most.

    Args:
        update: B (m, R), A (R, d).

    Returns:
        U (m, r), S (r,) in descending order, V (d, r).
    """
    left, B = torch.linalg.qr(update.B)
    right, A = torch.linalg.qr(update.A.mT)
    U, S, Vh = torch.linalg.svd(B @ A.mT, full_matrices=False)
    return left @ U, S, right @ Vh.mT


class LayerInfo(NamedTuple):
    """What a method may know of a layer besides its K matrices.

    Attributes:
        name: the layer's name, or LAYER.bias for the bias of a layer fine-tuned whole.
        tasks: K names.
        weights: (K,), w_k, which the method itself applies.
        size: what fractions of a rank refer to, min(m, d) of the full layer or min(p, q) of its matrices in a space.
        space: a name in SPACES.
        keep: (K, p, q) bool, the entries to keep, for methods that drop entries at random; None to let them draw.
    """

    name: str
    tasks: tuple[str, ...]
    weights: Tensor
    size: int
    space: str = "full"
    keep: Tensor | None = None

    def weighted(self, X: Tensor) -> Tensor:
        """Multiply each task's matrix by its weight.

        Args:
            X: (K, p, q).

        Returns:
            (K, p, q): w_k X_k, in the dtype of ``X``.
        """
        return X * self.weights.to(X)[:, None, None]


@dataclass(frozen=True)
class Updates:
    """One layer's K updates by their factors, as the adapters hold them: without scales and weights.

    Attributes:
        name: the layer's name.
        tasks: K names.
        A: K factors (r_k, d).
        B: K factors (m, r_k).
        scales: K numbers s_k.
        weights: K numbers w_k.
        moments: what is known of the layer's inputs, for a method that asks for it.
    """

    name: str
    tasks: tuple[str, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    moments: SpanMoments | InputMoments | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The layer's shape (m, d)."""
        return self.B[0].shape[0], self.A[0].shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks r_k of the K adapters."""
        return tuple(len(a) for a in self.A)

    def layer_info(self, size: int | None = None) -> LayerInfo:
        """Describe the layer for a method on matrices.

        Args:
            size: what fractions of a rank refer to; None for min(m, d).

        Returns:
            Name, tasks, weights (float64) and size, in the full space and without a mask.
        """
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return LayerInfo(self.name, self.tasks, weights, size or min(self.shape))

    def scaled(self) -> tuple[Tensor, ...]:
        """Multiply each B_k by its scale, but not by its weight.

        Returns:
            K of s_k B_k (m, r_k), float64.
        """
        return tuple(s * b.double() for s, b in zip(self.scales, self.B, strict=True))

    def weighted(self) -> tuple[Tensor, ...]:
        """Multiply each B_k by its scale and its weight.

        Returns:
            K of w_k s_k B_k (m, r_k), float64.
        """
        return tuple(w * b for w, b in zip(self.weights, self.scaled(), strict=True))

    def weighted_sum(self) -> LowRank:
        """Return sum_k w_k D_k, exactly, by concatenating the factors.

        Returns:
            The sum at rank sum_k r_k.
        """
        return LowRank(torch.cat(self.weighted(), 1), torch.cat([a.double() for a in self.A]))

    def present(self) -> Updates:
        """Leave out the adapters that do not touch the layer.

        Returns:
            The updates of the other adapters, in the same order.
        """
        return Updates(
            self.name,
            tuple(compress(self.tasks, self.ranks)),
            tuple(compress(self.A, self.ranks)),
            tuple(compress(self.B, self.ranks)),
            tuple(compress(self.scales, self.ranks)),
            tuple(compress(self.weights, self.ranks)),
        )

    def require_one_rank(self, method: str) -> None:
        """Refuse unequal ranks, for a method that combines factors entry by entry.

        Args:
            method: its name, for the message.

        Raises:
            NSCError: if the ranks differ; the message lists them by task.
        """
        if len(set(self.ranks)) > 1:
            ranks = ", ".join(f"{task} {rank}" for task, rank in zip(self.tasks, self.ranks, strict=True))
            raise NSCError(
                f"{method} combines factors entry by entry, so ranks must be equal; in {self.name} they are {ranks}."
                " Choose a method that takes any ranks, such as task-arithmetic, svd or core-ties"
            )

    def deltas(self) -> Tensor:
        """Multiply the factors out: the dense updates D_k, without weights.

        Returns:
            (K, m, d) in float32, or in float64 where the factors are float64.
        """
        dtype = torch.promote_types(self.A[0].dtype, torch.float32)
        return torch.stack(
            [(s * b.to(dtype)) @ a.to(dtype) for s, b, a in zip(self.scales, self.B, self.A, strict=True)]
        )


# Every layer's X (K, p, q), one at a time in memory; each call starts again from the first layer.
Matrices = Callable[[], Iterator[tuple[LayerInfo, Tensor]]]


@dataclass(frozen=True)
class Method:
    """One merging method: its function, and everything that the rest of nsc must know about it.

    Attributes:
        line: what it does, in one line for a list.
        source: URL of the paper or the original code.
        settings: frozen dataclass of its settings.
        on_matrices: (X (K, p, q), settings, layer) -> (p, q).
        on_factors: (updates, settings) -> LowRank, used in the full space where the method has it.
        equations: (updates, settings) -> Equations, whose solution is the merge, in the full space alone.
        inputs: what ``equations`` must know of each layer's inputs, for which rows of each task are read.
        survey: (every layer's X, settings) -> settings that know all layers, where one layer depends on the others.
        spaces: names in SPACES in which it can run.
        basis_free: whether the merge is the same in any orthonormal basis, so that the full space runs in the factors'
            span.
        whole_layers: whether it needs no factors and also merges layers that adapters fine-tuned whole.
        takes_masks: whether the caller may give the entries that it keeps.
        regression: whether it is a least-squares fit of the updates, whose best scale is not 1: where rows are given
            and nothing is said of the scale, it is searched by the distance from the experts.
    """

    line: str
    source: str
    settings: type
    on_matrices: Callable[[Tensor, Any, LayerInfo], Tensor] | None = None
    on_factors: Callable[[Updates, Any], LowRank] | None = None
    equations: Callable[[Updates, Any], Equations] | None = None
    inputs: Inputs | None = None
    survey: Callable[[Matrices, Any], Any] | None = None
    spaces: tuple[str, ...] = ("full",)
    basis_free: bool = False
    whole_layers: bool = False
    takes_masks: bool = False
    regression: bool = False
