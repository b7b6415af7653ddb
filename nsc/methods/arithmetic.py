"""Sums of updates, and of factors.

task arithmetic   D = sum_k w_k D_k,  or their mean over the K tasks
linear            D = (sum_k |w_k s_k|^1/2 B_k) (sum_k sgn(w_k s_k) |w_k s_k|^1/2 A_k),  or a K-th of it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.checks import require_choice
from nsc.methods.protocol import LowRank, Method, Place, Updates


@dataclass(frozen=True)
class SumSettings:
    """agg: "sum", or "mean" over all K tasks, those without this layer too."""

    agg: str = "sum"

    def __post_init__(self) -> None:
        require_choice("agg", self.agg, ("sum", "mean"))

    def share(self, tasks: int) -> float:
        """What the sum over K tasks is multiplied by."""
        return 1 / tasks if self.agg == "mean" else 1.0


def task_arithmetic(updates: Updates, settings: SumSettings) -> LowRank:
    """The sum by concatenation, exact at rank sum_k r_k. https://arxiv.org/abs/2212.04089"""
    B = settings.share(len(updates.tasks)) * torch.cat(updates.weighted(), 1)
    return LowRank(B, torch.cat([a.double() for a in updates.A]))


def sum_matrices(X: Tensor, settings: SumSettings, place: Place) -> Tensor:
    """The same on matrices, for the spaces."""
    return place.weighted(X).sum(0) * settings.share(len(X))


def linear(updates: Updates, settings: SumSettings) -> LowRank:
    """PEFT's "linear": sums of the factors, so that the result has cross terms B_i A_j, and the rank of one adapter.

    Adapters without this layer are left out. Raises NSCError for unequal ranks.
    """
    share, updates = settings.share(len(updates.tasks)), updates.present()
    updates.require_one_rank("linear")
    A, B = torch.stack(updates.A).double(), torch.stack(updates.B).double()
    signed = A.new_tensor(updates.weights) * A.new_tensor(updates.scales)
    root = signed.abs().sqrt()
    return LowRank(share * torch.tensordot(root, B, 1), torch.tensordot(signed.sign() * root, A, 1))


METHODS = {
    "task-arithmetic": Method(
        "the sum of all updates, one scale for all",
        "https://arxiv.org/abs/2212.04089",
        SumSettings,
        on_matrices=sum_matrices,
        on_factors=task_arithmetic,
        spaces=("full", "core", "knots"),
        basis_free=True,
        whole_layers=True,
    ),
    "linear": Method(
        "the product of summed factors, cross terms and all, at one adapter's rank",
        "https://github.com/huggingface/peft",
        SumSettings,
        on_factors=linear,
    ),
}
