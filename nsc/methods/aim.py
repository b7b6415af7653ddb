"""AIM: after any method, columns that read what is large in the base change less.

    D' = D diag(1 - a (1 - omega))        a_i = E|x_i| / max_j E|x_j|,   x: the layer's inputs in the base itself

It is a step after a merge, with the setting ``aim`` = omega of every method that learns nothing: 1 changes nothing,
with 0 the column of the largest input keeps the base's weights. It is exact in factors, as A' = A diag(..).

Source: https://arxiv.org/abs/2502.02421, in whose code omega is 0.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsc.methods.protocol import LowRank


def relaxed(update: LowRank | Tensor, magnitudes: Tensor, omega: float) -> LowRank | Tensor:
    """Relax a merged update towards the base, each column by the magnitude of its input.

    Args:
        update: factors, or dense (m, d).
        magnitudes: (d,) float64, E|x_i|; where all are zero, nothing is relaxed.
        omega: from 0 to 1, what the column of the largest input is multiplied by.

    Returns:
        The update in the same form, and on its device.

    Source: https://arxiv.org/abs/2502.02421
    """
    part = update.A if isinstance(update, LowRank) else update
    shares = magnitudes / magnitudes.max().clamp_min(torch.finfo(magnitudes.dtype).tiny)
    kept = part * (1 - shares * (1 - omega)).to(part)
    return LowRank(update.B, kept) if isinstance(update, LowRank) else kept
