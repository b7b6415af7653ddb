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
    """A frozen linear layer plus the differences of those P of K tasks that fine-tuned it whole, weighted by ``lam``.

    Only ``lam`` trains. The differences are buffers that are left out of the state dict. The weighted sum is formed in
    float32 at least, also under autocast, and cast to the dtype of z.

    Attributes:
        deltas: (P, m, d), buffer.
        bias_deltas: (P, m), buffer, or None.
        tasks: (P,) int, buffer: which of the K tasks each difference belongs to.
        siblings: always None; the layer shares its input with no other.

    Args:
        base: any module mapping (..., d) to (..., m), left as it is; it may be quantised, offloaded or sharded.
        deltas: (P, m, d), W_k - W0 of the tasks that have one.
        bias_deltas: (P, m), b_k - b0 of the same tasks, or None for a layer without bias.
        present: K flags, P of them True: the tasks that have a difference.
        lam: (K,) coefficients; those of the other tasks get no gradient.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> base, lam = torch.nn.Linear(64, 3), torch.nn.Parameter(torch.full((2,), 0.5))
        >>> layer = MergedDenseLinear(base, torch.randn(1, 3, 64), torch.randn(1, 3), (False, True), lam)
        >>> layer(torch.randn(32, 64)).sum().backward()  # lam.grad[0] == 0
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
        """Return the output of the merged layer.

        Args:
            z: (..., d), any floating dtype that the base takes.

        Returns:
            (..., m) in the dtype of the base's output. Differentiable in z and ``lam``.
        """
        with torch.autocast(z.device.type, enabled=False):  # it would round the coefficients
            lam = self.lam.index_select(0, self.tasks)
            weight = weighted_sum(lam, self.deltas).to(z.dtype)
            bias = None if self.bias_deltas is None else weighted_sum(lam, self.bias_deltas).to(z.dtype)
        return self.base(z) + F.linear(z, weight, bias)


def weighted_sum(lam: Tensor, deltas: Tensor) -> Tensor:
    """Return the sum of ``lam[k] * deltas[k]``, converting no more than one delta at a time.

    Args:
        lam: (P,) coefficients.
        deltas: (P, ...), frozen, any floating dtype.

    Returns:
        (...) in float32 (float64 for float64). Differentiable once in ``lam``.
    """
    return _WeightedSum.apply(lam, deltas)


class _WeightedSum(torch.autograd.Function):
    """A weighted sum that keeps nothing but ``deltas`` itself for the backward."""

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
