"""A frozen linear layer carrying many LoRA adapters at once, each with its own coefficient.

    y = base(z) + (u * c) B'        u = z A'        c = lam_k s_k on the segment of adapter k

Only ``lam`` trains. With frozen factors autograd keeps ``u`` and the frozen matrices for the backward, nothing else:

    v = dy B        dlam_k = s_k sum over rows and segment k of (u * v)        dz = base'(dy) + (c * v + dL/du) A

That is plan "factors". Plan "weights" makes W = W0 + B diag(c) A in every forward instead, and dc from dW = dy' z:
fewer FLOPs where the ranks add up to more than about a quarter of the width. Both compute the same.

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged model W0 + sum_k lam_k B_k A_k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_kernels.lora_down import lora_fork
from nsc_kernels.lora_fold import lora_fold
from nsc_kernels.lora_up import lora_up


class MergedLoRALinear(nn.Module):
    """``base`` plus K stacked adapters, weighted by ``lam``.

    base: any module mapping (..., d) to (..., m), left as it is.  lora_A: (R, d).  lora_B: (m, R).  ranks: r_k of each
    adapter, R in sum, 0 where an adapter does not touch this layer.  scales: s_k, alpha over r, of each adapter.
    lam: (K,) coefficients; an ``nn.Parameter``, or a row of a larger one.  watch: called in every forward, before the
    base layer runs, with u (..., R) and the energy ``|z|^2`` (...,), for ``ratio_from_energy``.  plan: "factors", or
    "weights", for which base must be an ``nn.Linear``. Raises ValueError when the shapes do not follow one another.
    """

    lora_A: Tensor
    lora_B: Tensor
    spread: Tensor
    offsets: Tensor

    def __init__(
        self,
        base: nn.Module,
        lora_A: Tensor,  # (R, d)
        lora_B: Tensor,  # (m, R)
        ranks: Sequence[int],  # K of them
        scales: Sequence[float],  # K of them
        lam: Tensor,  # (K,)
        watch: Callable[[Tensor, Tensor], None] | None = None,
        plan: str = "factors",
    ) -> None:
        super().__init__()
        _check_shapes(lora_A, lora_B, ranks, scales, lam)
        if plan not in ("factors", "weights"):
            raise ValueError(f"plan must be factors or weights, not {plan!r}")
        if plan == "weights" and type(base) is not nn.Linear:
            raise ValueError(f"plan weights needs an nn.Linear as base, not {type(base).__name__}; use plan factors")
        self.plan = plan
        self.base = base
        self.watch = watch
        self.lam = lam
        offsets = [0, *accumulate(ranks)]
        spread = torch.zeros(len(ranks), offsets[-1], dtype=lam.dtype)
        for k, scale in enumerate(scales):
            spread[k, offsets[k] : offsets[k + 1]] = scale
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.register_buffer("spread", spread.to(lora_A.device), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets, device=lora_A.device), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., d) -> (..., m)."""
        lora_A, lora_B = self.lora_A.to(z.dtype), self.lora_B.to(z.dtype)
        with torch.autocast(z.device.type, enabled=False):  # it would round the coefficients
            c = self.lam @ self.spread  # (R,)
        if self.watch is not None:
            z, u, energy = lora_fork(z, lora_A)
            self.watch(u, energy)  # type: ignore[arg-type]  # it was asked for
        elif self.plan == "factors":
            z, u, _ = lora_fork(z, lora_A, energy=False)
        if self.plan == "factors":
            return lora_up(self.base(z), u, c, lora_B)
        return F.linear(z, lora_fold(self.base.weight, lora_B, c, lora_A), self.base.bias)  # type: ignore[arg-type]


def _check_shapes(lora_A: Tensor, lora_B: Tensor, ranks: Sequence[int], scales: Sequence[float], lam: Tensor) -> None:
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} must be (R, d) and (m, R)")
    if sum(ranks) != lora_A.shape[0]:
        raise ValueError(f"ranks {list(ranks)} add up to {sum(ranks)}, but lora_A has {lora_A.shape[0]} rows")
    if not len(ranks) == len(scales) == lam.numel() or lam.ndim != 1:
        raise ValueError(f"{len(ranks)} ranks, {len(scales)} scales and lam {tuple(lam.shape)} must be of one length K")
