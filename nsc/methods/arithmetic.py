"""Sums of updates.

task arithmetic   D = sum_k w_k D_k,  or their mean over the K tasks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods.method import LowRank, Method, Place, Updates


@dataclass(frozen=True)
class SumSettings:
    """agg: "sum", or "mean" over all K tasks, those without this layer too."""

    agg: str = "sum"

    def __post_init__(self) -> None:
        if self.agg not in ("sum", "mean"):
            raise NSCError(f"agg must be sum or mean, not {self.agg!r}")


def task_arithmetic(updates: Updates, settings: SumSettings) -> LowRank:
    """The sum by concatenation, exact at rank sum_k r_k. https://arxiv.org/abs/2212.04089"""
    share = 1 / len(updates.tasks) if settings.agg == "mean" else 1.0
    weighted = [share * w * b for w, b in zip(updates.weights, updates.scaled(), strict=True)]
    return LowRank(torch.cat(weighted, 1), torch.cat([a.double() for a in updates.A]))


def sum_matrices(X: Tensor, settings: SumSettings, place: Place) -> Tensor:
    """The same on matrices, for the spaces."""
    total = place.weighted(X).sum(0)
    return total / len(X) if settings.agg == "mean" else total


METHODS = {
    "task-arithmetic": Method(
        "the sum of all updates, one scale for all",
        "https://arxiv.org/abs/2212.04089",
        SumSettings,
        on_matrices=sum_matrices,
        on_factors=task_arithmetic,
        spaces=("full", "core", "knots"),
        spectral=True,
    ),
}
