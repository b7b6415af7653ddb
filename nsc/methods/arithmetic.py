"""Sums of updates, and products of summed factors.

task arithmetic   D = sum_k w_k D_k,  or their mean over the K tasks
linear            D = (sum_k |w_k s_k|^1/2 B_k) (sum_k sgn(w_k s_k) |w_k s_k|^1/2 A_k),  or a K-th of it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.checks import require_choice
from nsc.methods.protocol import LayerInfo, LowRank, Method, Updates


@dataclass(frozen=True)
class SumSettings:
    """Settings of ``task-arithmetic`` and ``linear``.

    Attributes:
        agg: "sum", or "mean" over all K tasks, including those without this layer.
    """

    agg: str = "sum"

    def __post_init__(self) -> None:
        require_choice("agg", self.agg, ("sum", "mean"))

    def share(self, tasks: int) -> float:
        """Return what the sum over tasks is multiplied by.

        Args:
            tasks: K.

        Returns:
            1/K for a mean, else 1.
        """
        return 1 / tasks if self.agg == "mean" else 1.0


def task_arithmetic(updates: Updates, settings: SumSettings) -> LowRank:
    """Add the updates by concatenating their factors, which is exact.

    Args:
        updates: one layer's K updates.
        settings: sum or mean.

    Returns:
        The sum or mean at rank sum_k r_k.

    Source: https://arxiv.org/abs/2212.04089
    """
    total = updates.weighted_sum()
    return LowRank(settings.share(len(updates.tasks)) * total.B, total.A)


def sum_matrices(X: Tensor, settings: SumSettings, layer: LayerInfo) -> Tensor:
    """Add the updates as matrices, for task arithmetic in a space.

    Args:
        X: (K, p, q), without weights.
        settings: sum or mean.
        layer: the tasks and their weights.

    Returns:
        (p, q): the weighted sum or mean.

    Source: https://arxiv.org/abs/2212.04089
    """
    return layer.weighted(X).sum(0) * settings.share(len(X))


def linear(updates: Updates, settings: SumSettings) -> LowRank:
    """Add the factors, as PEFT's "linear" does; the product has cross terms B_i A_j.

    Adapters without this layer are left out of the sums, but count in a mean.

    Args:
        updates: one layer's K updates, of equal ranks.
        settings: sum or mean.

    Returns:
        The product of the sums, at the rank of one adapter.

    Raises:
        NSCError: if ranks differ.

    Source: https://github.com/huggingface/peft
    """
    share, updates = settings.share(len(updates.tasks)), updates.present()
    updates.require_one_rank("linear")
    A, B = torch.stack(updates.A).double(), torch.stack(updates.B).double()
    signed = A.new_tensor(updates.weights) * A.new_tensor(updates.scales)
    root = signed.abs().sqrt()  # half of each scale goes into either factor
    return LowRank(share * torch.tensordot(root, B, 1), torch.tensordot(signed.sign() * root, A, 1))


METHODS = {
    "task-arithmetic": Method(
        "the sum of all updates, one scale for all",
        "https://arxiv.org/abs/2212.04089",
        SumSettings,
        on_matrices=sum_matrices,
        on_factors=task_arithmetic,
        spaces=("full", "core", "knots", "ctm"),
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
