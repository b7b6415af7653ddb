"""The down-projection of all stacked adapters, and the energy of each row, in one pass over the rows.

    u = z A^T           s = z.z
    dz = du A + 2 ds z  dA = du^T z

``lora_fork`` also hands z on, so that its backward adds both terms to the gradient that comes back from the base layer
in one pass: dz = dz_base + du A + 2 ds z. With ds = g q / (2 om s^2) that is the backward of the merged layer.

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6 (u = A z is all that the null-space ratio needs of A).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsc_kernels._op import Op, is_traced
from nsc_kernels._rows import accumulator_dtype, row_operands, shaped
from nsc_kernels._skinny import expand, plan_shrink, run_all


def lora_down_reference(z: Tensor, lora_A: Tensor, energy: bool) -> tuple[Tensor, Tensor]:
    """Compute ``lora_down`` of flat rows in plain torch.

    Args:
        z: (n, d).
        lora_A: (R, d), in the dtype of ``z``.
        energy: whether the energy is wanted.

    Returns:
        u (n, R) in the dtype of ``z``, and ``|z|^2`` (n,) in ``accumulator_dtype``, or (0,) if it is not wanted.
    """
    u = F.linear(z, lora_A)
    if not energy:
        return u, z.new_empty(0, dtype=accumulator_dtype(z))
    return u, z.to(accumulator_dtype(z)).square().sum(-1)


def lora_down_backward_reference(
    dz_base: Tensor | None,  # (n, d)
    du: Tensor | None,  # (n, R)
    de: Tensor | None,  # (n,)
    z: Tensor | None,  # (n, d), with de
    lora_A: Tensor,  # (R, d)
) -> Tensor:
    """Compute dz = dz_base + du A + 2 de z in plain torch.

    Args:
        dz_base: the gradient that comes back from the base layer, or None.
        du: the gradient to u, or None.
        de: the gradient to the energy, or None. At least one of the three is given.
        z: the rows, needed with ``de``; those where ``de`` is 0 are not read.
        lora_A: as the forward took it.

    Returns:
        (n, d) in the dtype of ``lora_A``: the sum of the terms that are given.
    """
    dtype = accumulator_dtype(lora_A)
    total = torch.zeros((), dtype=dtype, device=lora_A.device)
    if du is not None and dz_base is not None:
        total = torch.addmm(dz_base, du, lora_A)
    elif du is not None:
        total = du @ lora_A
    elif dz_base is not None:
        total = dz_base
    if de is not None and z is not None:
        total = total.to(dtype) + torch.where(de == 0, 0.0, 2 * de)[:, None] * torch.where((de == 0)[:, None], 0.0, z)
    return total.to(lora_A.dtype).contiguous()


def _launch_forward(z: Tensor, lora_A: Tensor, energy: bool) -> tuple[Tensor, Tensor]:
    launches, (u, row_energy, _) = plan_shrink(z, lora_A, energy=energy)
    run_all(launches)
    return u, row_energy


def _launch_backward(
    dz_base: Tensor | None, du: Tensor | None, de: Tensor | None, z: Tensor | None, lora_A: Tensor
) -> Tensor:
    rows = next(x for x in (du, de, dz_base) if x is not None)
    u = lora_A.new_empty(rows.shape[0], 0) if du is None else du
    e = None if de is None else de.contiguous()
    return expand(dz_base, u, lora_A[: u.shape[1]], e=e, z=None if de is None else z)


_forward_op = Op("nsc::lora_down", lora_down_reference, _launch_forward)
_backward_op = Op("nsc::lora_down_backward", lora_down_backward_reference, _launch_backward)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, lora_A, energy = inputs
    ctx.set_materialize_grads(False)
    ctx.energy = energy
    ctx.save_for_backward(z if energy or ctx.needs_input_grad[1] else None, lora_A)


def _gradients(ctx: Any, dz_base: Tensor | None, du: Tensor | None, de: Tensor | None) -> tuple:
    z, lora_A = ctx.saved_tensors
    de = de if ctx.energy else None
    dz = dz_base
    if ctx.needs_input_grad[0] and not (du is None and de is None):
        dz = _backward_op(dz_base, du, de, z, lora_A)
    return dz, du.T @ z if du is not None and ctx.needs_input_grad[1] else None, None


def _backward(ctx: Any, du: Tensor | None, de: Tensor | None) -> tuple:
    return _gradients(ctx, None, du, de)


_forward_op.differentiable(_save, _backward)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, lora_A: Tensor, energy: bool) -> tuple[Tensor, Tensor, Tensor]:
        _save(ctx, (z, lora_A, energy), ())
        return z.view_as(z), *_forward_op.direct(z, lora_A, energy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, du: Tensor | None, de: Tensor | None) -> tuple:
        return _gradients(ctx, dz, du, de)


def lora_down(z: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``u = z A^T`` for all adapters and the energy ``|z|^2`` of each row, from one pass over z.

    Args:
        z: (..., d) rows that enter the linear layer; float64, float32, bfloat16 or float16.
        lora_A: (R, d) the adapters' down-projections, stacked, in z's dtype. Under autocast both are cast as by
            ``F.linear``, and the energy is that of the cast rows.

    Returns:
        u (..., R) in that dtype, summed in float32 (float64 for float64), and the energy (...,) in float32 (float64 for
        float64): infinite beyond |z| = 1.8e19, 0 below 1e-23. Both differentiable once in z and lora_A; the backward
        makes dz = du A + 2 de z in one pass.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.

    Example:
        >>> z, A = torch.randn(32, 64, requires_grad=True), torch.randn(8, 64)
        >>> u, energy = lora_down(z, A)  # (32, 8), (32,)

    Source: https://arxiv.org/abs/2603.26317, Eq. 3.
    """
    z, lora_A = row_operands(z, lora_A)
    n, r = math.prod(z.shape[:-1]), lora_A.shape[0]
    u, energy = _forward_op(shaped(z, (n, z.shape[-1])), lora_A, True)
    return shaped(u, (*z.shape[:-1], r)), shaped(energy, z.shape[:-1])


def lora_fork(z: Tensor, lora_A: Tensor, *, energy: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``lora_down`` returns, and z itself to be given to the base layer.

    The values are the same. In the backward the gradients through the base, through u and through the energy are added
    in one pass, dz = dz_base + du A + 2 de z, where autograd would make a tensor of each.

    Args:
        z: (..., d) rows that enter the linear layer; float64, float32, bfloat16 or float16.
        lora_A: (R, d) the adapters' down-projections, stacked, in z's dtype.
        energy: whether the energy is wanted. Without it z is kept for the backward only if lora_A trains.

    Returns:
        z (..., d), cast if autocast casts it; u (..., R); the energy (...,), or None if it is not wanted.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.

    Example:
        >>> base, A, B = torch.nn.Linear(64, 48), torch.randn(8, 64), torch.randn(48, 8)
        >>> z, u, energy = lora_fork(torch.randn(32, 64, requires_grad=True), A)
        >>> y = lora_up(base(z), u, torch.full((8,), 0.4), B)  # (32, 48)

    Source: https://arxiv.org/abs/2603.26317, Eq. 3.
    """
    z, lora_A = row_operands(z, lora_A)
    rows, shape = shaped(z, (math.prod(z.shape[:-1]), z.shape[-1])), z.shape
    if is_traced((z, lora_A)) or not (torch.is_grad_enabled() and z.requires_grad):
        u, row_energy = _forward_op(rows, lora_A, energy)
    else:
        rows, u, row_energy = _Fork.apply(rows, lora_A, energy)
        z = shaped(rows, shape)
    return z, shaped(u, (*shape[:-1], lora_A.shape[0])), shaped(row_energy, shape[:-1]) if energy else None
