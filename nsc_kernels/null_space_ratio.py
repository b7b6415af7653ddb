"""Null-space ratio: the share of each row that its adapter's down-projection cannot see.

    om(z) = |(I - P) z| / |z| = sqrt(1 - q/s)       s = z.z,  q = u.h,  u = A z,  h = G u,  G = (A A^T)^-1
    dom/dz = q/(om s^2) z        dom/du = -1/(om s) h        dom/dG = -1/(2 om s) u u^T

The gradient to z is the direct one; the rest of it flows through u. With A's rows orthonormal (whitened), G = I.
Everything is computed from v = u/|z|, whose square never overflows: q/s = v.(G v).

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6. Edges: q/s is clamped to [0, 1]; gradients divide by at least
``MIN_RATIO``; |z| below the dtype's smallest normal number counts as a zero row, above its inverse as infinite.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import _ratio
from nsc_kernels._launch import row_blocks, row_programs
from nsc_kernels._op import Launch, Op, fresh
from nsc_kernels._ratio_tl import (
    row_captured,
    row_inverse_norm,
    row_segment,
    row_slope,
    row_weight,
    store_du,
    store_ratio,
)
from nsc_kernels._rows import accumulator_dtype, expect, unit_stride
from nsc_kernels._tl import narrow, program_rows, tl, triton


def null_space_ratio_reference(
    z: Tensor,  # (n, d)
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,  # (R, R), block-diagonal
    adapter: Tensor | None,  # (n,)
    offsets: Tensor | None,  # (K + 1,)
    weight: Tensor | None,  # (n,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``null_space_ratio`` of flat rows in plain torch.

    Args:
        z, u: any floating dtype.
        gram_inverse, weight: in ``accumulator_dtype``. Rows of weight 0 count as zero rows.
        adapter, offsets: int.

    Returns:
        The value, (n,) or 0-d with ``weight``, and what the backward needs: q/s (n,) and 1/|z| (n,), all in
        ``accumulator_dtype``.
    """
    inverse_norm = _inverse_norm(z.to(accumulator_dtype(z, u)), weight)
    value, captured = _ratio.ratio_of_rows(inverse_norm, u, gram_inverse, adapter, offsets, weight)
    return value, captured, inverse_norm


def null_space_ratio_backward_reference(
    grad: Tensor,  # (n,), or 0-d with weight
    z: Tensor,  # (n, d)
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,  # (R, R)
    adapter: Tensor | None,  # (n,)
    offsets: Tensor | None,  # (K + 1,)
    weight: Tensor | None,  # (n,)
    captured: Tensor,  # (n,): q/s
    inverse_norm: Tensor,  # (n,): 1/|z|
    to_z: bool,
    to_u: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``null_space_ratio`` to z (the direct part) and to u in plain torch.

    Args:
        grad: the incoming gradient, in ``accumulator_dtype``.
        z, u, gram_inverse, adapter, offsets, weight: as the forward took them.
        captured, inverse_norm: as the forward returned them.
        to_z, to_u: which of the two gradients are wanted.

    Returns:
        dz (n, d) in z's dtype and du (n, R) in u's dtype, both contiguous; one that is not wanted is empty.
    """
    dz, du = z.new_empty(0), u.new_empty(0)
    slope = _ratio.ratio_slope(grad, weight, captured) * inverse_norm
    if to_z:
        along = (slope * captured)[:, None]
        dz = torch.where(along == 0, 0.0, along * (z * inverse_norm[:, None])).to(z.dtype).contiguous()
    if to_u:
        du = _ratio.u_gradient(slope, inverse_norm, u, gram_inverse, adapter, offsets, weight)
    return dz, du


def _inverse_norm(z: Tensor, weight: Tensor | None) -> Tensor:
    """Return 1/|z| (n,), scaled so that no square overflows: 0 for zero rows and weight 0, NaN if not finite."""
    if weight is not None:
        z = torch.where(weight[:, None] == 0, 0.0, z)
    tiny = torch.finfo(z.dtype).tiny
    peak = z.abs().amax(-1, keepdim=True).clamp(tiny, 1 / tiny)
    norm = (z / peak).square().sum(-1).sqrt() * peak.squeeze(-1)
    inverse = torch.where(norm <= 1 / tiny, 1 / norm, math.nan)
    return torch.where(norm < tiny, 0.0, inverse)


@triton.jit(do_not_specialize=["N"])
def null_space_ratio_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    u_ptr,
    gram_inverse_ptr,
    adapter_ptr,
    offsets_ptr,
    weight_ptr,
    value_ptr,
    captured_ptr,
    inverse_norm_ptr,
    N,
    D,
    R,
    K,
    z_stride,
    u_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write the ratio of BLOCK_N rows, or their weighted sum, and what the backward needs.

    Args:
        z_ptr, u_ptr: (N, D) and (N, R), any floating dtype but float64.
        gram_inverse_ptr: (R, R) float32 or None.
        adapter_ptr, offsets_ptr: (N,) and (K + 1,) int, or both None.
        weight_ptr: (N,) float32 or None.
        value_ptr: (N,) float32, or with ``weight_ptr`` one partial sum a program.
        captured_ptr, inverse_norm_ptr: (N,) float32: q/s and 1/|z|.
        N, D, R, K, z_stride, u_stride, BLOCK_N, BLOCK_D, BLOCK_R: sizes and row strides in elements.
    """
    rows, exists = program_rows(N, BLOCK_N)
    b_weight, keep = row_weight(weight_ptr, rows, exists)
    start, stop, known = row_segment(adapter_ptr, offsets_ptr, rows, keep, K, R)
    b_inverse = row_inverse_norm(z_ptr, z_stride, rows, keep, D, BLOCK_N, BLOCK_D)
    b_captured = row_captured(
        u_ptr, u_stride, gram_inverse_ptr, rows, keep, b_inverse, start, stop, known, R, BLOCK_N, BLOCK_R
    )
    tl.store(inverse_norm_ptr + rows, b_inverse, mask=exists)
    store_ratio(value_ptr, captured_ptr, b_captured, b_weight, rows, exists, keep, weight_ptr is not None)


@triton.jit(do_not_specialize=["N"])
def null_space_ratio_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    z_ptr,
    u_ptr,
    gram_inverse_ptr,
    adapter_ptr,
    offsets_ptr,
    weight_ptr,
    captured_ptr,
    inverse_norm_ptr,
    dz_ptr,
    du_ptr,
    N,
    D,
    R,
    K,
    grad_stride,
    z_stride,
    u_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write every element of dz and du for BLOCK_N rows.

    Args:
        grad_ptr: (N,) float32, or one element with ``grad_stride`` 0 where one gradient serves all rows.
        z_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr: as in the forward.
        captured_ptr, inverse_norm_ptr: as the forward wrote them.
        dz_ptr, du_ptr: (N, D) and (N, R), contiguous; None for one that is not wanted.
        N, D, R, K, grad_stride, z_stride, u_stride, BLOCK_N, BLOCK_D, BLOCK_R: sizes and row strides in elements.
    """
    rows, exists = program_rows(N, BLOCK_N)
    b_weight, _keep = row_weight(weight_ptr, rows, exists)
    b_captured = tl.load(captured_ptr + rows, mask=exists, other=0.0)
    b_inverse = tl.load(inverse_norm_ptr + rows, mask=exists, other=0.0)
    b_slope = row_slope(grad_ptr, grad_stride, b_weight, b_captured, rows, exists)
    if dz_ptr is not None:
        b_along = b_slope * b_inverse * b_captured
        read = exists & (b_along != 0)
        for first in range(0, D, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            in_row = (cols < D)[None, :]
            b_z = tl.load(z_ptr + (rows * z_stride)[:, None] + cols[None, :], mask=read[:, None] & in_row, other=0.0)
            b_dz = b_along[:, None] * (b_z.to(tl.float32) * b_inverse[:, None])
            b_dz = narrow(b_dz, dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + (rows * D)[:, None] + cols[None, :], b_dz, mask=exists[:, None] & in_row)
    if du_ptr is not None:
        start, stop, _known = row_segment(adapter_ptr, offsets_ptr, rows, exists & (b_slope != 0), K, R)
        store_du(
            du_ptr,
            u_ptr,
            u_stride,
            gram_inverse_ptr,
            b_slope,
            b_inverse,
            rows,
            exists,
            start,
            stop,
            R,
            BLOCK_N,
            BLOCK_R,
        )


def plan_forward(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """Prepare the forward launch; with meta tensors, for a compilation ahead of time.

    Args:
        z, u, given: the arguments of the reference.

    Returns:
        The launch, and the tensors that it fills: value ((n,), or partial sums with a weight), q/s (n,), 1/|z| (n,).
    """
    args, blocks, programs = _shared_args(z, u, *given)
    value, captured, inverse_norm = (
        fresh(z, size, torch.float32) for size in (len(z) if given[-1] is None else programs, len(z), len(z))
    )
    args |= {"value_ptr": value, "captured_ptr": captured, "inverse_norm_ptr": inverse_norm}
    return Launch(null_space_ratio_kernel, (programs,), args, blocks), (value, captured, inverse_norm)


def plan_backward(grad: Tensor, z: Tensor, u: Tensor, *rest: Any) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """Prepare the backward launch; with meta tensors, for a compilation ahead of time.

    Args:
        grad, z, u, rest: the arguments of the backward reference.

    Returns:
        The launch, and the gradients that it fills: to z (n, d) and to u (n, R), empty where not wanted.
    """
    *given, captured, inverse_norm, to_z, to_u = rest
    args, blocks, programs = _shared_args(z, u, *given)
    dz, du = fresh(z, z.shape if to_z else 0), fresh(u, u.shape if to_u else 0)
    args |= _ratio.backward_args(grad, captured) | {"inverse_norm_ptr": inverse_norm}
    args |= {"dz_ptr": dz if to_z else None, "du_ptr": du if to_u else None}
    return Launch(null_space_ratio_backward_kernel, (programs,), args, blocks), (dz, du)


def _shared_args(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[dict[str, Any], dict[str, int], int]:
    """Return the arguments of both kernels, their block sizes and warps, and the number of programs."""
    z, (n, d) = unit_stride(z), z.shape
    blocks = row_blocks(n, d, u.shape[1])
    args = _ratio.launch_args(u, *given) | {"z_ptr": z, "D": d, "z_stride": z.stride(0)}
    return args, blocks._asdict(), row_programs(n, blocks)


_forward_op = Op("nsc::null_space_ratio", null_space_ratio_reference, partial(_ratio.launch_forward, plan_forward))
_backward_op = Op(
    "nsc::null_space_ratio_backward",
    null_space_ratio_backward_reference,
    partial(_ratio.launch_backward, plan_backward),
)


def _backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks it once
    _, u, _, adapter, offsets, weight, captured, inverse_norm = saved
    to_z, to_u = ctx.needs_input_grad[:2]
    dz, du = _backward_op(grad, *saved, to_z, to_u)
    dgram, dweight = _ratio.side_gradients(ctx, grad, u, adapter, offsets, weight, captured, lambda: inverse_norm)
    return dz if to_z else None, du if to_u else None, dgram, None, None, dweight


_forward_op.differentiable(_ratio.save, _backward)


def null_space_ratio(
    z: Tensor,  # (..., d)
    u: Tensor,  # (..., R)
    gram_inverse: Tensor | None = None,  # (R, R)
    *,
    adapter: Tensor | None = None,  # (...,) int
    offsets: Tensor | None = None,  # (K + 1,) int
    weight: Tensor | None = None,  # (...,)
) -> Tensor:
    """Return the share of each row's length that its adapter does not see: om = sqrt(1 - u_k^T G_k u_k / z.z).

    The ratio lies in [0, 1]: 0 for a row inside the row space of A_k, 1 for a row orthogonal to it. It does not depend
    on the scale of z or on any invertible mixing of A_k's rows. A zero row has om = 1 and no gradient; a row that is
    not finite gives NaN. Where om < 1e-4 the gradient is that of om = 1e-4.

    Args:
        z: (..., d), any floating dtype: the rows that enter the linear layer.
        u: (..., R), any floating dtype: ``z @ A.T`` for all adapters stacked, R the sum of their ranks.
        gram_inverse: (R, R) block-diagonal ``(A_k A_k^T)^-1``, symmetric; None where each A_k has orthonormal rows.
        adapter: (...,) int, the adapter that each row is measured against; None means one adapter of rank R. A row
            whose adapter is not in ``[0, K)`` gives NaN.
        offsets: (K + 1,) int, ascending from 0 to R: adapter k owns columns ``offsets[k]:offsets[k + 1]`` of u. Ranks
            may differ; rank 0 gives om = 1 and no gradient.
        weight: (...,) row weights. A row of weight 0 is not read: whatever it holds, it adds 0 and all its gradients
            are 0, that of its weight included.

    Returns:
        om (...,), or with ``weight`` the 0-d sum of weight * om; float64 if z or u is, else float32, also under
        autocast; sums are accumulated in the same dtype. Differentiable once in z (the direct part; the rest flows
        through u), u, gram_inverse and weight.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together. Values are not looked at.

    Example:
        >>> z, A = torch.randn(32, 64), torch.randn(8, 64)
        >>> om = null_space_ratio(z, z @ A.T, gram_inverse(A))  # (32,)

    Source: https://arxiv.org/abs/2603.26317, Eq. 3 and 6.
    """
    rows = z.shape[:-1]
    if z.dim() == 0 or z.shape[-1] == 0:
        raise ValueError(f"z must be (..., d) with d >= 1, got shape {tuple(z.shape)}")
    expect("z", z, z.shape, "rows of width d", z)
    _ratio.expect_beside(rows, u, gram_inverse, adapter, offsets, weight, z)
    given = _ratio.flattened(accumulator_dtype(z, u), gram_inverse, adapter, offsets, weight)
    n = math.prod(rows)
    value, _, _ = _forward_op(z.reshape(n, z.shape[-1]), u.reshape(n, u.shape[-1]), *given)
    return value.reshape(rows) if weight is None else value
