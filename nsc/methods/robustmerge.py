"""RobustMerge: factors are trimmed to their largest entries, and the columns of B make up for what A lost.

    trim(X) keeps |x| >= the int(|X| (1 - density))-th smallest of a matrix
    g_k[i] = |A_k[i, :]|_1 / |trim(A_k)[i, :]|_1,   raised to adapter k's int(r gain_quantile)-th smallest, from 0
    A = fuse sum_k trim(A_k)      B[:, i] = fuse sum_k g_k[i] trim(w_k s_k B_k)[:, i] / sum_k g_k[i]      D = B A

Source: https://arxiv.org/abs/2502.17159, and its code https://github.com/AuroraZengfh/RobustMerge, whose only scale is
the first adapter's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.checks import require_fraction
from nsc.methods.protocol import LowRank, Method, Updates
from nsc.methods.ties import trimmed


@dataclass(frozen=True)
class RobustMergeSettings:
    """Settings of ``robustmerge``.

    Attributes:
        density: the fraction of each factor's entries that is kept.
        gain_quantile: the quantile of an adapter's gains to which smaller ones are raised.
        fuse: what both merged factors are multiplied by.
    """

    density: float = 0.2
    gain_quantile: float = 0.8
    fuse: float = 2.0

    def __post_init__(self) -> None:
        require_fraction("density", self.density, above_zero=True)
        require_fraction("gain_quantile", self.gain_quantile, below_one=True)


def robustmerge(updates: Updates, settings: RobustMergeSettings) -> LowRank:
    """Merge one layer by RobustMerge: A is summed and B averaged. Adapters without this layer are left out.

    Where trimming leaves nothing of a row of A_k, the original divides by 0 and all of D is NaN. Here such a row's gain
    is 0, raised like other small ones; where no adapter has a gain, the column of B is 0, as is the row of A.

    Args:
        updates: one layer's K updates, of equal ranks.
        settings: the settings.

    Returns:
        The merged update, at the rank of one adapter.

    Raises:
        NSCError: if ranks differ.

    Source: https://arxiv.org/abs/2502.17159
    """
    updates = updates.present()
    updates.require_one_rank("robustmerge")
    A, B = torch.stack([a.double() for a in updates.A]), torch.stack(updates.weighted())
    kept = trim(A, settings.density)
    left = kept.abs().sum(2)
    gain = torch.where(left > 0, A.abs().sum(2) / left, 0)
    least = gain.sort(1).values[:, int(gain.shape[1] * settings.gain_quantile), None]
    gain = gain.maximum(least)
    total = gain.sum(0)
    shares = torch.where(total > 0, gain / total, 0)
    merged = (shares[:, None] * trim(B, settings.density)).sum(0)
    return LowRank(settings.fuse * merged, settings.fuse * kept.sum(0))


def trim(X: Tensor, density: float) -> Tensor:
    """Keep the entries of each matrix from the int(p q (1 - density))-th smallest in magnitude on.

    Args:
        X: (K, p, q).
        density: the fraction of entries that is kept.

    Returns:
        (K, p, q), 0 where an entry is smaller; entries as large as that one are all kept.
    """
    index = int(X[0].numel() * (1 - density))
    return trimmed(X, X.abs().flatten(1).kthvalue(index).values if index else None)


METHODS = {
    "robustmerge": Method(
        "trimmed factors, A summed and B averaged by what trimming took from A",
        "https://arxiv.org/abs/2502.17159",
        RobustMergeSettings,
        on_factors=robustmerge,
    ),
}
