"""Null-space ratio: the share of each row that its adapter's down-projection cannot see.

    om(z) = |(I - P) z| / |z| = sqrt(1 - q/s)       s = z.z,  q = u.h,  u = A z,  h = G u,  G = (A A^T)^-1
    dom/dz = q/(om s^2) z        dom/du = -1/(om s) h        dom/dG = -1/(2 om s) u u^T

The gradient to z is the direct one; the rest of it flows through u. With A's rows orthonormal (whitened), G = I.
Everything is computed from v = u/|z|, whose square never overflows: q/s = v.(G v).

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6. Edges: q/s is clamped to [0, 1]; gradients divide by at least
``MIN_RATIO``; |z| below the dtype's smallest normal number counts as a zero row, above its inverse as infinite.
"""

import math
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import _rows
from nsc_kernels._launch import RowBlocks, row_blocks, row_programs
from nsc_kernels._op import Launch, Op, fresh
from nsc_kernels._tl import (
    narrow,
    program_rows,
    row_captured,
    row_inverse_norm,
    row_segment,
    row_slope,
    row_weight,
    store_du,
    store_ratio,
    tl,
    triton,
)  # fmt: skip


def null_space_ratio_reference(
    z: Tensor,  # (n, d)
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,  # (R, R), block-diagonal
    adapter: Tensor | None,  # (n,)
    offsets: Tensor | None,  # (K + 1,)
    weight: Tensor | None,  # (n,)
) -> tuple[Tensor, Tensor, Tensor]:
    """``null_space_ratio`` of flat rows in plain torch.

    Returns the value, (n,) or 0-d with ``weight``, and what its backward needs: q/s (n,) and 1/|z| (n,). All in
    ``accumulator_dtype``; ``gram_inverse`` and ``weight`` have that dtype already. Rows of weight 0 count as zero rows.
    """
    z = z.to(_rows.accumulator_dtype(z, u))
    inverse_norm = _rows.row_inverses(z if weight is None else torch.where(weight[:, None] == 0, 0.0, z))
    v, _, known = _rows.row_vectors(u, inverse_norm, adapter, offsets, weight)
    captured = _rows.captured_share(v, gram_inverse, inverse_norm.isfinite() & known)
    return _rows.ratio_value(captured, weight), captured, inverse_norm


def null_space_ratio_backward_reference(
    grad: Tensor,  # (n,), or 0-d with weight
    z: Tensor,
    u: Tensor,
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    captured: Tensor,  # (n,): q/s
    inverse_norm: Tensor,  # (n,): 1/|z|
    to_z: bool,
    to_u: bool,
) -> tuple[Tensor, Tensor]:
    """The direct gradient to z, (n, d) in z's dtype, and the gradient to u, (n, R) in u's dtype; both contiguous.

    to_z, to_u: which of the two are wanted; the other is an empty tensor.
    """
    dz, du = z.new_empty(0), u.new_empty(0)
    slope = (_rows.ratio_slope(grad, weight, captured) * inverse_norm)[:, None]
    if to_z:
        along = slope * captured[:, None]
        dz = torch.where(along == 0, 0.0, along * (z * inverse_norm[:, None])).to(z.dtype)
    if to_u:
        v, inside, _ = _rows.row_vectors(u, inverse_norm, adapter, offsets, weight)
        du = torch.where(inside, -slope * _rows.gram_product(v, gram_inverse), 0.0).to(u.dtype)
    return dz.contiguous(), du.contiguous()


@triton.jit(do_not_specialize=["N"])
def null_space_ratio_kernel(  # type: ignore[no-untyped-def]
    z_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr, value_ptr, captured_ptr, inverse_norm_ptr,
    N, D, R, K, z_stride, u_stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """value: (N,), or with weight one partial sum a program; captured, inverse_norm: (N,). All float32."""
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
    grad_ptr, z_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr, captured_ptr, inverse_norm_ptr,
    dz_ptr, du_ptr, N, D, R, K, grad_stride, z_stride, u_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz: (N, D), du: (N, R), every element written; grad_stride is 0 where one gradient serves all rows."""
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
            du_ptr, u_ptr, u_stride, gram_inverse_ptr, b_slope, b_inverse, rows, exists, start, stop, R,
            BLOCK_N, BLOCK_R,
        )  # fmt: skip


def plan_forward(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The forward launch and what it fills; arguments of the reference. With meta tensors, to compile ahead of time."""
    args, blocks = _shared_args(z, u, *given)
    n, programs = z.shape[0], row_programs(z.shape[0], blocks)
    value, captured, inverse_norm = (
        fresh(z, size, torch.float32) for size in (n if given[-1] is None else programs, n, n)
    )
    args |= {"value_ptr": value, "captured_ptr": captured, "inverse_norm_ptr": inverse_norm}
    return Launch(null_space_ratio_kernel, (programs,), args, blocks._asdict()), (value, captured, inverse_norm)


def plan_backward(
    grad: Tensor,
    z: Tensor,
    u: Tensor,
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    captured: Tensor,
    inverse_norm: Tensor,
    to_z: bool,
    to_u: bool,
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The backward launch and the gradients it fills; arguments of the backward reference."""
    args, blocks = _shared_args(z, u, gram_inverse, adapter, offsets, weight)
    dz, du = fresh(z, z.shape if to_z else 0), fresh(u, u.shape if to_u else 0)
    args |= {"grad_ptr": grad, "grad_stride": grad.stride(0) if grad.dim() else 0}
    args |= {"captured_ptr": captured, "inverse_norm_ptr": inverse_norm}
    args |= {"dz_ptr": dz if to_z else None, "du_ptr": du if to_u else None}
    programs = row_programs(z.shape[0], blocks)
    return Launch(null_space_ratio_backward_kernel, (programs,), args, blocks._asdict()), (dz, du)


def _shared_args(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[dict[str, Any], RowBlocks]:
    z, u = _rows.unit_stride(z), _rows.unit_stride(u)
    gram_inverse, adapter, offsets, weight = (x if x is None else x.contiguous() for x in given)
    args: dict[str, Any] = {"z_ptr": z, "u_ptr": u, "gram_inverse_ptr": gram_inverse, "weight_ptr": weight}
    args |= {"adapter_ptr": adapter, "offsets_ptr": offsets, "K": 0 if offsets is None else offsets.shape[0] - 1}
    args |= {"N": z.shape[0], "D": z.shape[1], "R": u.shape[1], "z_stride": z.stride(0), "u_stride": u.stride(0)}
    return args, row_blocks(z.shape[0], z.shape[1], u.shape[1])


def _launch_forward(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    launch, (value, captured, inverse_norm) = plan_forward(z, u, *given)
    launch.run()
    return value if given[-1] is None else value.sum(), captured, inverse_norm


def _launch_backward(*args: Any) -> tuple[Tensor, Tensor]:
    launch, gradients = plan_backward(*args)
    launch.run()
    return gradients


_forward_op = Op("nsc::null_space_ratio", null_space_ratio_reference, _launch_forward)
_backward_op = Op("nsc::null_space_ratio_backward", null_space_ratio_backward_reference, _launch_backward)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, captured, inverse_norm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(captured, inverse_norm)
    ctx.save_for_backward(*inputs, captured, inverse_norm)


def _backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks it once
    _, u, _, adapter, offsets, weight, captured, inverse_norm = saved
    wanted = ctx.needs_input_grad[:2]
    dz, du = _backward_op(grad, *saved, *wanted)
    needed = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
    dgram, dweight = _rows.side_gradients(needed, grad, u, inverse_norm, adapter, offsets, weight, captured)
    return dz if wanted[0] else None, du if wanted[1] else None, dgram, None, None, dweight


_forward_op.differentiable(_save, _backward)


def null_space_ratio(
    z: Tensor,  # (..., d)
    u: Tensor,  # (..., R)
    gram_inverse: Tensor | None = None,  # (R, R)
    *,
    adapter: Tensor | None = None,  # (...,) int
    offsets: Tensor | None = None,  # (K + 1,) int
    weight: Tensor | None = None,  # (...,)
) -> Tensor:
    """The share of each row's length that its adapter does not see: om = sqrt(1 - u_k^T G_k u_k / z.z), in [0, 1].

    Args:
        z: (..., d) rows that enter the linear, of any floating dtype.
        u: (..., R) ``z @ A.T`` for all adapters stacked, R the sum of their ranks.
        gram_inverse: (R, R) block-diagonal ``(A_k A_k^T)^-1``, symmetric; None where each A_k has orthonormal rows.
        adapter: (...,) int, the adapter that each row is measured against; None means one adapter of rank R. A row
            whose adapter is not in ``[0, K)`` gives NaN.
        offsets: (K + 1,) int, ascending to R: adapter k owns columns ``offsets[k]:offsets[k + 1]`` of u. Ranks may
            differ; rank 0 gives om = 1 and no gradient.
        weight: (...,) row weights. A row of weight 0 is not read: whatever it holds, it adds 0 and all its gradients
            are 0, that of its weight included.

    Returns:
        om (...,), or with ``weight`` the 0-d sum of weight * om; float64 if z or u is, else float32, also under
        autocast. Differentiable once in z (the direct part; the rest flows through u), u, gram_inverse and weight.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together. Values are not looked at.

    Source: https://arxiv.org/abs/2603.26317, Eq. 3 and 6.
    """
    rows = z.shape[:-1]
    if z.dim() == 0 or z.shape[-1] == 0:
        raise ValueError(f"z must be (..., d) with d >= 1, got shape {tuple(z.shape)}")
    _rows.expect("z", z, z.shape, "rows of width d", z)
    _rows.expect_beside(rows, u, gram_inverse, adapter, offsets, weight, z)
    dtype = _rows.accumulator_dtype(z, u)
    n = math.prod(rows)
    value, _, _ = _forward_op(
        z.reshape(n, z.shape[-1]),
        u.reshape(n, u.shape[-1]),
        None if gram_inverse is None else gram_inverse.to(dtype),
        None if adapter is None else adapter.reshape(n),
        offsets,
        None if weight is None else weight.reshape(n).to(dtype),
    )
    return value.reshape(rows) if weight is None else value
