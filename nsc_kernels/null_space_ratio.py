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

from nsc_kernels._launch import RowBlocks, row_blocks, row_programs
from nsc_kernels._op import Launch, triton_backed, without_autocast
from nsc_kernels._rows import accumulator_dtype, expect, expect_segments, row_inverses, row_segments, unit_stride
from nsc_kernels._tl import program_rows, row_gram_product, row_inverse_norm, row_segment, tl, triton

MIN_RATIO = 1e-4
_MIN_RATIO = tl.constexpr(MIN_RATIO)


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
    z = z.to(accumulator_dtype(z, u))
    inverse_norm = row_inverses(z if weight is None else torch.where(weight[:, None] == 0, 0.0, z))
    inside, known = row_segments(u, adapter, offsets, weight)
    v = torch.where(inside, u * inverse_norm[:, None], 0.0)
    captured = (v * (v if gram_inverse is None else v @ gram_inverse)).sum(-1)
    valid = captured.isfinite() & inverse_norm.isfinite() & known
    captured = torch.where(valid, captured.clamp(0, 1), math.nan)
    ratio = (1 - captured).sqrt()
    return ratio if weight is None else (weight * ratio).sum(), captured, inverse_norm


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
) -> tuple[Tensor, Tensor]:
    """The direct gradient to z, (n, d) in z's dtype, and the gradient to u, (n, R) in u's dtype; both contiguous."""
    slope = (_slope(grad, weight, captured) * inverse_norm)[:, None]
    along = slope * captured[:, None]
    dz = torch.where(along == 0, 0.0, along * (z * inverse_norm[:, None]))
    inside, _ = row_segments(u, adapter, offsets, weight)
    v = torch.where(inside, u * inverse_norm[:, None], 0.0)
    du = torch.where(inside, -slope * (v if gram_inverse is None else v @ gram_inverse), 0.0)
    return dz.to(z.dtype).contiguous(), du.to(u.dtype).contiguous()


def _slope(grad: Tensor, weight: Tensor | None, captured: Tensor) -> Tensor:
    """(n,): g/om of each row, held below ``MIN_RATIO``; 0 for a row of weight 0."""
    row_grad = grad if weight is None else grad * weight
    return row_grad / (1 - captured).sqrt().clamp_min(MIN_RATIO)


@triton.jit(do_not_specialize=["N"])
def null_space_ratio_kernel(  # type: ignore[no-untyped-def]
    z_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr, value_ptr, captured_ptr, inverse_norm_ptr,
    N, D, R, K, z_stride, u_stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """value: (N,), or with weight one partial sum a program; captured, inverse_norm: (N,). All float32."""
    rows, exists = program_rows(N, BLOCK_N)
    keep = exists
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + rows, mask=exists, other=0.0)
        keep = b_weight != 0
    b_inverse = row_inverse_norm(z_ptr, z_stride, rows, keep, D, BLOCK_N, BLOCK_D)
    start, stop, known = row_segment(adapter_ptr, offsets_ptr, rows, keep, K, R)
    b_captured = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, tl.max(stop - start, 0), BLOCK_R):
        cols = (start + first)[:, None] + tl.arange(0, BLOCK_R)[None, :]
        inside = cols < stop[:, None]
        b_u, b_h = row_gram_product(
            u_ptr, u_stride, gram_inverse_ptr, rows, keep, b_inverse, start, stop, cols, inside, R, BLOCK_N, BLOCK_R
        )
        b_captured += tl.sum(b_u * b_h, 1)
    valid = (tl.abs(b_captured) < float("inf")) & (b_inverse == b_inverse) & known
    b_captured = tl.where(valid, tl.minimum(tl.maximum(b_captured, 0.0), 1.0), float("nan"))
    b_ratio = tl.sqrt(1.0 - b_captured)
    tl.store(captured_ptr + rows, b_captured, mask=exists)
    tl.store(inverse_norm_ptr + rows, b_inverse, mask=exists)
    if weight_ptr is None:
        tl.store(value_ptr + rows, b_ratio, mask=exists)
    else:
        tl.store(value_ptr + tl.program_id(0), tl.sum(tl.where(keep, b_weight * b_ratio, 0.0), 0))


@triton.jit(do_not_specialize=["N"])
def null_space_ratio_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, z_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr, captured_ptr, inverse_norm_ptr,
    dz_ptr, du_ptr, N, D, R, K, grad_stride, z_stride, u_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz: (N, D), du: (N, R), every element written; grad_stride is 0 where one gradient serves all rows."""
    rows, exists = program_rows(N, BLOCK_N)
    b_grad = tl.load(grad_ptr + rows * grad_stride, mask=exists, other=0.0)
    if weight_ptr is not None:
        b_grad *= tl.load(weight_ptr + rows, mask=exists, other=0.0)
    b_captured = tl.load(captured_ptr + rows, mask=exists, other=0.0)
    b_inverse = tl.load(inverse_norm_ptr + rows, mask=exists, other=0.0)
    b_ratio = tl.sqrt(1.0 - b_captured)
    b_slope = b_grad / tl.where(b_ratio < _MIN_RATIO, _MIN_RATIO, b_ratio) * b_inverse
    b_along = b_slope * b_captured
    read = exists & (b_along != 0)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_row = (cols < D)[None, :]
        b_z = tl.load(z_ptr + (rows * z_stride)[:, None] + cols[None, :], mask=read[:, None] & in_row, other=0.0)
        b_dz = b_along[:, None] * (b_z.to(tl.float32) * b_inverse[:, None])
        b_dz = b_dz.to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + (rows * D)[:, None] + cols[None, :], b_dz, mask=exists[:, None] & in_row)
    keep = exists & (b_slope != 0)
    start, stop, _known = row_segment(adapter_ptr, offsets_ptr, rows, keep, K, R)
    for first in range(0, R, BLOCK_R):
        cols = (first + tl.arange(0, BLOCK_R))[None, :]
        inside = (cols >= start[:, None]) & (cols < stop[:, None])
        _b_u, b_h = row_gram_product(
            u_ptr, u_stride, gram_inverse_ptr, rows, keep, b_inverse, start, stop, cols, inside, R, BLOCK_N, BLOCK_R
        )
        b_du = tl.where(keep[:, None] & inside, -b_slope[:, None] * b_h, 0.0).to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + (rows * R)[:, None] + cols, b_du, mask=exists[:, None] & (cols < R))


def plan_forward(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The forward launch and what it fills; arguments of the reference. With meta tensors, to compile ahead of time."""
    args, blocks = _shared_args(z, u, *given)
    n, weighted = z.shape[0], given[-1] is not None
    programs = row_programs(n, blocks)
    value, captured, inverse_norm = (
        torch.empty(size, dtype=torch.float32, device=z.device) for size in (programs if weighted else n, n, n)
    )
    args |= {"value_ptr": value, "captured_ptr": captured, "inverse_norm_ptr": inverse_norm}
    return Launch(null_space_ratio_kernel, programs, args, blocks._asdict()), (value, captured, inverse_norm)


def plan_backward(grad: Tensor, z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The backward launch and the gradients it fills; arguments of the backward reference."""
    captured, inverse_norm = given[-2:]
    args, blocks = _shared_args(z, u, *given[:-2])
    dz, du = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (z, u))
    args |= {"grad_ptr": grad, "grad_stride": grad.stride(0) if grad.dim() else 0}
    args |= {"captured_ptr": captured, "inverse_norm_ptr": inverse_norm, "dz_ptr": dz, "du_ptr": du}
    programs = row_programs(z.shape[0], blocks)
    return Launch(null_space_ratio_backward_kernel, programs, args, blocks._asdict()), (dz, du)


def _shared_args(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[dict[str, Any], RowBlocks]:
    z, u = unit_stride(z), unit_stride(u)
    gram_inverse, adapter, offsets, weight = (x if x is None else x.contiguous() for x in given)
    args: dict[str, Any] = {"z_ptr": z, "u_ptr": u, "gram_inverse_ptr": gram_inverse, "weight_ptr": weight}
    args |= {"adapter_ptr": adapter, "offsets_ptr": offsets, "K": 0 if offsets is None else offsets.shape[0] - 1}
    args |= {"N": z.shape[0], "D": z.shape[1], "R": u.shape[1], "z_stride": z.stride(0), "u_stride": u.stride(0)}
    return args, row_blocks(z.shape[0], z.shape[1], u.shape[1])


def _launch_forward(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    launch, (value, captured, inverse_norm) = plan_forward(z, u, *given)
    launch.run()
    return value if given[-1] is None else value.sum(), captured, inverse_norm


def _launch_backward(grad: Tensor, z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    launch, gradients = plan_backward(grad, z, u, *given)
    launch.run()
    return gradients


_forward_op = triton_backed("nsc::null_space_ratio", null_space_ratio_reference, _launch_forward)
_backward_op = triton_backed("nsc::null_space_ratio_backward", null_space_ratio_backward_reference, _launch_backward)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, captured, inverse_norm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(captured, inverse_norm)
    ctx.save_for_backward(*inputs, captured, inverse_norm)


def _backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    z, u, gram_inverse, adapter, offsets, weight, captured, inverse_norm = ctx.saved_tensors
    dz, du = _backward_op(grad, z, u, gram_inverse, adapter, offsets, weight, captured, inverse_norm)
    dgram = dweight = None
    if ctx.needs_input_grad[2]:
        inside, _ = row_segments(u, adapter, offsets, weight)
        dgram = _gram_gradient(_slope(grad, weight, captured), u, inside, inverse_norm)
    if ctx.needs_input_grad[5]:
        dweight = torch.where(weight == 0, 0.0, grad * (1 - captured).sqrt())
    return dz, du, dgram, None, None, dweight


@without_autocast
def _gram_gradient(slope: Tensor, u: Tensor, inside: Tensor, inverse_norm: Tensor) -> Tensor:
    """(R, R): -1/2 sum over rows of g/om v v^T; block-diagonal, since v is 0 outside its row's segment."""
    v = torch.where(inside, u * inverse_norm[:, None], 0.0)
    return -0.5 * (v * slope[:, None]).T @ v


_forward_op.register_autograd(_backward, setup_context=_save)


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
    _check(z, u, gram_inverse, adapter, offsets, weight)
    dtype = accumulator_dtype(z, u)
    rows = z.shape[:-1]
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


def _check(
    z: Tensor,
    u: Tensor,
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
) -> None:
    if z.dim() == 0 or z.shape[-1] == 0:
        raise ValueError(f"z must be (..., d) with d >= 1, got shape {tuple(z.shape)}")
    rows, r = z.shape[:-1], u.shape[-1:]
    expect("z", z, z.shape, "rows of width d", z)
    expect("u", u, (*rows, *r), "one row of z @ A.T for each row of z", z)
    if gram_inverse is not None:
        expect("gram_inverse", gram_inverse, (*r, *r), "square in the columns of u, block-diagonal over adapters", z)
    if weight is not None:
        expect("weight", weight, rows, "one number for each row of z", z)
    expect_segments(adapter, offsets, z)
