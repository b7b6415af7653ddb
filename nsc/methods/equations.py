"""The linear equations of a regression, and their one solver: Cholesky in float64, with a reported condition number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nsc.errors import NSCError

STEPS = 30  # of the power iterations that estimate a condition number


@dataclass(frozen=True)
class Gram:
    """The symmetric matrix diag(beside) + square, or diag(beside) + rows' rows where there are few rows.

    Attributes:
        beside: (p,) float64, added to the diagonal.
        square: (p, p) float64, or None.
        rows: (T, p) float64, or None.
    """

    beside: Tensor
    square: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of(cls, square: Tensor | None = None, rows: Tensor | None = None) -> Gram:
        """Return a matrix with nothing beside it.

        Args:
            square: (p, p), or
            rows: (T, p).

        Returns:
            The matrix.
        """
        part = rows if square is None else square
        assert part is not None
        return cls(part.new_zeros(part.shape[-1]), square, rows)

    @property
    def diagonal(self) -> Tensor:
        """Its diagonal (p,)."""
        if self.square is not None:
            return self.beside + self.square.diagonal()
        return self.beside if self.rows is None else self.beside + self.rows.square().sum(0)

    @property
    def mean_diagonal(self) -> Tensor:
        """The mean of its diagonal, (); 0 of an empty matrix."""
        return self.diagonal.sum() / max(len(self.beside), 1)

    def times(self, factor: float) -> Gram:
        """Multiply the matrix.

        Args:
            factor: at least 0.

        Returns:
            The product.
        """
        square = None if self.square is None else factor * self.square
        return Gram(factor * self.beside, square, None if self.rows is None else math.sqrt(factor) * self.rows)

    def plus(self, diagonal: Tensor | float) -> Gram:
        """Add to the diagonal.

        Args:
            diagonal: (p,), or one number.

        Returns:
            The sum.
        """
        return replace(self, beside=self.beside + diagonal)

    def ridged(self, ridge: float) -> Gram:
        """Add a ridge relative to the mean of the diagonal.

        Args:
            ridge: what that mean is multiplied by.

        Returns:
            The sum.
        """
        return self.plus(ridge * self.mean_diagonal)

    def product(self, X: Tensor) -> Tensor:
        """Multiply from the left.

        Args:
            X: (R, p).

        Returns:
            (R, p).
        """
        beside = X * self.beside
        if self.square is not None:
            return beside + X @ self.square
        return beside if self.rows is None else beside + (X @ self.rows.mT) @ self.rows

    def inverse(self) -> Callable[[Tensor], Tensor] | None:
        """Factor the matrix; one with rows by Woodbury's formula, in as many dimensions as there are rows.

        Returns:
            A function X (R, p) -> X times the inverse; None if the matrix is not positive definite.
        """
        if self.rows is None:
            square = self.beside.diag() if self.square is None else self.square + self.beside.diag()
            lower, info = torch.linalg.cholesky_ex(square)
            return (lambda X: torch.cholesky_solve(X.mT, lower).mT) if info == 0 else None
        if not (self.beside > 0).all():
            return None
        rows, thin = self.rows, self.rows / self.beside
        inner, info = torch.linalg.cholesky_ex(torch.eye(len(rows)).to(rows) + thin @ rows.mT)
        lift = thin.mT  # (p, T)
        return (lambda X: X / self.beside - torch.cholesky_solve((X @ lift).mT, inner).mT @ thin) if info == 0 else None


class Equations(NamedTuple):
    """The merge D = B X basis of one layer, with  X matrix = left.

    Attributes:
        B: (m, R) the stacked B_k with scales and weights, float64.
        left: (R, p) float64.
        matrix: p wide, positive definite.
        basis: (p, d) float64; None for the identity.
    """

    B: Tensor
    left: Tensor
    matrix: Gram
    basis: Tensor | None = None


class Solution(NamedTuple):
    """The solution of a layer's equations.

    Attributes:
        coordinates: X (R, p).
        A: (R, d), X basis.
        condition: estimated condition number of the matrix; 1 where it is empty.
    """

    coordinates: Tensor
    A: Tensor
    condition: float


def solve(equations: Equations, name: str) -> Solution:
    """Solve the equations of one layer.

    Args:
        equations: the equations.
        name: the layer's, for the message.

    Returns:
        The solution.

    Raises:
        NSCError: if the matrix is singular.
    """
    inverse = equations.matrix.inverse()
    condition = _condition(equations.matrix, inverse) if inverse else math.inf
    if inverse is None or not condition < 1 / torch.finfo(torch.float64).eps:
        raise NSCError(
            f"{name}: the equations of this merge are singular. This happens where adapters share directions, as with"
            " VeRA and where one is given twice, or rows leave some untouched. Give a larger ridge, such as --set"
            " ridge=1e-3, or more rows"
        )
    X = inverse(equations.left)
    return Solution(X, X if equations.basis is None else X @ equations.basis, condition)


def _condition(matrix: Gram, inverse: Callable[[Tensor], Tensor]) -> float:
    """Estimate the ratio of the extreme eigenvalues from below, by power iterations with the matrix and its inverse."""
    if not len(matrix.beside):
        return 1.0
    start = torch.linspace(1, 2, len(matrix.beside), dtype=torch.float64).cos()[None].to(matrix.beside)
    large, small = start, start
    for _ in range(STEPS):
        large = matrix.product(large / large.norm())
        small = inverse(small / small.norm())
    return (large.norm() * small.norm()).item()
