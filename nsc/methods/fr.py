"""FR-Merging: filter every update in the frequency domain, then add.

    D = sum_k w_k a_k Re ifft2(w * fft2(D_k)),    w(u, v) = [d <= lo] + [lo <= d <= hi]
    d = |(u, v) - (floor(H/2), floor(W/2))|,  lo = floor(min(H, W) / 10),  hi = ratio min(H, W), or ratio max(H, W)

Source: https://arxiv.org/abs/2411.16815, as its code does it. The transform is not shifted, so the middle of (u, v) is
the *highest* frequency: what lies farther from it than hi is removed, that is the lowest frequencies, the mean among
them. How much that is depends on the shape: 0.02 % of the bins of 768 x 768 at ratio 0.7, but 68 % of 1024 x 4096. Bins
at d = lo exactly count twice. a_k is 1, or with ``align`` the largest mean magnitude of the filtered updates over that
of task k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.checks import require_choice, require_fraction
from nsc.methods.protocol import LayerInfo, Method


@dataclass(frozen=True)
class FrSettings:
    """Settings of ``fr``.

    Attributes:
        ratio: hi over the side.
        align: whether all tasks get the same mean magnitude.
        side: "min" or "max" of H and W, for hi; lo takes the smaller one in either of the original's forms.
    """

    ratio: float = 0.7
    align: bool = False
    side: str = "min"

    def __post_init__(self) -> None:
        require_fraction("ratio", self.ratio, above_zero=True)
        require_choice("side", self.side, ("min", "max"))


def fr(X: Tensor, settings: FrSettings, layer: LayerInfo) -> Tensor:
    """Merge one layer by FR.

    Args:
        X: (K, H, W), without weights.
        settings: the settings.
        layer: the tasks and their weights.

    Returns:
        (H, W).

    Source: https://arxiv.org/abs/2411.16815
    """
    H, W = X.shape[1:]
    mask = band(H, W, settings).to(X)
    total, means = torch.zeros_like(X[0]), X.new_zeros(len(X))
    for k, weight in enumerate(layer.weights.to(X)):
        update = filtered(X[k], mask)
        means[k] = update.abs().mean() if settings.align else 1
        total += update.mul_(weight / means[k].masked_fill(means[k] == 0, 1))
    return total.mul_(means.max())


def filtered(x: Tensor, mask: Tensor) -> Tensor:
    """Multiply an update by a mask in the frequency domain.

    Args:
        x: (H, W), real.
        mask: (H, W // 2 + 1), for the frequencies of ``rfft2``.

    Returns:
        (H, W).
    """
    return torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=tuple(x.shape))


def band(H: int, W: int, settings: FrSettings) -> Tensor:
    """Return the mask w for ``rfft2``.

    It is the mean of w at a frequency and at its negative, which is what Re leaves of w on a real x.

    Args:
        H: rows of the update.
        W: its columns.
        settings: ratio and side.

    Returns:
        (H, W // 2 + 1), float64: 0, 0.5, 1, 1.5 or 2.
    """
    side = min(H, W) if settings.side == "min" else max(H, W)
    u, v = torch.arange(H, dtype=torch.float64)[:, None], torch.arange(W, dtype=torch.float64)
    distance = ((u - H // 2).square() + (v - W // 2).square()).sqrt()
    low, high = min(H, W) // 10, settings.ratio * side
    w = (distance <= low).double() + ((distance >= low) & (distance <= high)).double()
    negative = w.roll((-1, -1), (0, 1)).flip(0, 1)
    return ((w + negative) / 2)[:, : W // 2 + 1]


METHODS = {
    "fr": Method(
        "updates without their lowest frequencies, added",
        "https://arxiv.org/abs/2411.16815",
        FrSettings,
        on_matrices=fr,
    ),
}
