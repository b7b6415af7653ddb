"""The linear equations of a regression, and their one solver: Cholesky in float64, with a reported condition number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsc.errors import NSCError

STEPS = 30  # of the power iterations that estimate a condition number


class Equations(NamedTuple):
    """The merge D = B X basis of one layer, with  X matrix = left.

    Attributes:
        B: (m, R) the stacked B_k with scales and weights, float64.
        left: (R, p) float64.
        matrix: (p, p) float64, symmetric and positive definite.
        basis: (p, d) float64; None for the identity.
    """

    B: Tensor
    left: Tensor
    matrix: Tensor
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


def ridged(matrix: Tensor, ridge: float) -> Tensor:
    """Add a ridge relative to the mean of the diagonal.

    Args:
        matrix: (p, p).
        ridge: what that mean is multiplied by.

    Returns:
        (p, p).
    """
    return matrix + ridge * mean_diagonal(matrix) * torch.eye(len(matrix)).to(matrix)


def mean_diagonal(matrix: Tensor) -> Tensor:
    """Return the mean of a diagonal.

    Args:
        matrix: (p, p).

    Returns:
        (), 0 where there is none.
    """
    return matrix.diagonal().sum() / max(len(matrix), 1)


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
    lower, info = torch.linalg.cholesky_ex(equations.matrix)
    condition = _condition(equations.matrix, lower) if info == 0 else float("inf")
    if not condition < 1 / torch.finfo(torch.float64).eps:
        raise NSCError(
            f"{name}: the equations of this merge are singular: its adapters share directions, or its rows leave some"
            " untouched. Give a larger ridge, such as --set ridge=1e-3, or more rows"
        )
    X = torch.cholesky_solve(equations.left.mT, lower).mT
    return Solution(X, X if equations.basis is None else X @ equations.basis, condition)


def _condition(matrix: Tensor, lower: Tensor) -> float:
    """Estimate the ratio of the extreme eigenvalues from below, by power iterations with the matrix and its inverse."""
    if not len(matrix):
        return 1.0
    start = torch.linspace(1, 2, len(matrix), dtype=torch.float64).cos()[:, None].to(matrix)
    large, small = start, start
    for _ in range(STEPS):
        large = matrix @ (large / large.norm())
        small = torch.cholesky_solve(small / small.norm(), lower)
    return (large.norm() * small.norm()).item()
