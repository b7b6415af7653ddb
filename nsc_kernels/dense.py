"""A frozen linear layer that several tasks have fine-tuned whole, merged with one coefficient a task.

    y = base(z) + z D' + e        D = sum_k lam_k (W_k - W0)        e = sum_k lam_k (b_k - b0)

Only ``lam`` trains, and the differences are frozen: with dD = dy' z and de = sum of dy over rows,

    dlam_k = <W_k - W0, dD> + <b_k - b0, de>        dz = base'(dy) + dy D

Nothing is asked of the base layer but to run, so it may be quantised, offloaded or sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nsc_kernels._rows import accumulator_dtype


class MergedDenseLinear(nn.Module):
    """``base`` plus the differences of those P of K tasks that fine-tuned it whole, weighted by ``lam``.

    base: any module mapping (..., d) to (..., m), left as it is.  deltas: (P, m, d).  bias_deltas: (P, m), or None for
    a layer without bias.  present: K flags, P of them set: whose the deltas are.  lam: (K,) coefficients, of which the
    others get no gradient. Raises ValueError when the shapes do not follow one another.
    """

    deltas: Tensor
    bias_deltas: Tensor | None
    tasks: Tensor
    siblings = None  # it reads its input alone

    def __init__(
        self, base: nn.Module, deltas: Tensor, bias_deltas: Tensor | None, present: Sequence[bool], lam: Tensor
    ) -> None:
        super().__init__()
        if deltas.ndim != 3 or sum(present) != len(deltas) or lam.shape != (len(present),):
            raise ValueError(
                f"deltas {tuple(deltas.shape)} must be (P, m, d), P = {sum(present)} the number of tasks present,"
                f" and lam {tuple(lam.shape)} (K,), K = {len(present)}"
            )
        if bias_deltas is not None and bias_deltas.shape != deltas.shape[:2]:
            raise ValueError(f"bias_deltas {tuple(bias_deltas.shape)} must be {tuple(deltas.shape[:2])}, as of deltas")
        self.base = base
        self.lam = lam
        tasks = torch.tensor([k for k, here in enumerate(present) if here], device=deltas.device)
        self.register_buffer("deltas", deltas, persistent=False)
        self.register_buffer("bias_deltas", bias_deltas, persistent=False)
        self.register_buffer("tasks", tasks, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., d) -> (..., m)."""
        with torch.autocast(z.device.type, enabled=False):  # it would round the coefficients
            lam = self.lam.index_select(0, self.tasks)
            weight = weighted_sum(lam, self.deltas).to(z.dtype)
            bias = None if self.bias_deltas is None else weighted_sum(lam, self.bias_deltas).to(z.dtype)
        return self.base(z) + F.linear(z, weight, bias)


def weighted_sum(lam: Tensor, deltas: Tensor) -> Tensor:
    """lam: (P,)  deltas: (P, ...) frozen  ->  (...) in float32 at least, differentiable, once, in ``lam``."""
    return _WeightedSum.apply(lam, deltas)


class _WeightedSum(torch.autograd.Function):
    """One delta at a time: none but ``deltas`` itself is kept, and no more than one is converted."""

    @staticmethod
    def forward(ctx: Any, lam: Tensor, deltas: Tensor) -> Tensor:
        ctx.save_for_backward(deltas)
        ctx.dtype = lam.dtype
        total = torch.zeros(deltas.shape[1:], dtype=accumulator_dtype(deltas), device=deltas.device)
        for coefficient, delta in zip(lam.to(total.dtype), deltas, strict=True):
            total += coefficient * delta.to(total.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (deltas,) = ctx.saved_tensors
        return torch.stack([(delta.to(dout.dtype) * dout).sum() for delta in deltas]).to(ctx.dtype), None
