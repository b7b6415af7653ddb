"""The null-space ratio of rows whose energy is known already: no pass over them is left to make.

    om = sqrt(1 - q/s)        s = z.z from ``lora_down``,  q = u.h,  u = A z,  h = G u,  G = (A A^T)^-1
    dom/ds = q/(2 om s^2)     dom/du = -1/(om s) h         dom/dG = -1/(2 om s) u u^T

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6. Edges as in ``null_space_ratio``; an energy below the dtype's
smallest normal number (|z| below 1e-19 in float32) counts as that of a zero row, one that is not finite gives NaN.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import _ratio
from nsc_kernels._launch import row_blocks, row_programs
from nsc_kernels._op import Launch, Op, fresh
from nsc_kernels._ratio_tl import (
    energy_inverse_norm,
    row_captured,
    row_segment,
    row_slope,
    row_weight,
    store_du,
    store_ratio,
)
from nsc_kernels._rows import accumulator_dtype, expect
from nsc_kernels._tl import program_rows, tl, triton


def ratio_from_energy_reference(
    energy: Tensor,  # (n,)
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,  # (R, R), block-diagonal
    adapter: Tensor | None,  # (n,)
    offsets: Tensor | None,  # (K + 1,)
    weight: Tensor | None,  # (n,)
) -> tuple[Tensor, Tensor]:
    """Compute ``ratio_from_energy`` of flat rows in plain torch.

    Args:
        energy, gram_inverse, weight: in ``accumulator_dtype``. Rows of weight 0 count as zero rows.
        u: any floating dtype.
        adapter, offsets: int.

    Returns:
        The value, (n,) or 0-d with ``weight``, and q/s (n,), both in ``accumulator_dtype``.
    """
    return _ratio.ratio_of_rows(_inverse_norm(energy, weight), u, gram_inverse, adapter, offsets, weight)


def ratio_from_energy_backward_reference(
    grad: Tensor,  # (n,), or 0-d with weight
    energy: Tensor,  # (n,)
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,  # (R, R)
    adapter: Tensor | None,  # (n,)
    offsets: Tensor | None,  # (K + 1,)
    weight: Tensor | None,  # (n,)
    captured: Tensor,  # (n,): q/s
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``ratio_from_energy`` to energy and to u in plain torch.

    Args:
        grad: the incoming gradient, in ``accumulator_dtype``.
        energy, u, gram_inverse, adapter, offsets, weight: as the forward took them.
        captured: as the forward returned it.

    Returns:
        (n,) in ``accumulator_dtype``, and (n, R) in u's dtype.
    """
    inverse_norm = _inverse_norm(energy, weight)
    slope = _ratio.ratio_slope(grad, weight, captured) * inverse_norm
    du = _ratio.u_gradient(slope, inverse_norm, u, gram_inverse, adapter, offsets, weight)
    return 0.5 * slope * captured * inverse_norm, du


def _inverse_norm(energy: Tensor, weight: Tensor | None) -> Tensor:
    """Return 1/|z| (n,): 0 for a zero row and one of weight 0, NaN for one that is not finite."""
    if weight is not None:
        energy = torch.where(weight == 0, 0.0, energy)
    inverse = torch.where(energy <= torch.finfo(energy.dtype).max, energy.rsqrt(), torch.nan)
    return torch.where(energy < torch.finfo(energy.dtype).tiny, 0.0, inverse)


@triton.jit(do_not_specialize=["N"])
def ratio_from_energy_kernel(  # type: ignore[no-untyped-def]
    energy_ptr,
    u_ptr,
    gram_inverse_ptr,
    adapter_ptr,
    offsets_ptr,
    weight_ptr,
    value_ptr,
    captured_ptr,
    N,
    R,
    K,
    u_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write the ratio of BLOCK_N rows, or their weighted sum, and q/s for the backward.

    Args:
        energy_ptr: (N,) float32.
        u_ptr: (N, R), any floating dtype but float64.
        gram_inverse_ptr: (R, R) float32 or None.
        adapter_ptr, offsets_ptr: (N,) and (K + 1,) int, or both None.
        weight_ptr: (N,) float32 or None.
        value_ptr: (N,) float32, or with ``weight_ptr`` one partial sum a program.
        captured_ptr: q/s, (N,) float32.
        N, R, K, u_stride, BLOCK_N, BLOCK_R: sizes, and the row stride of u in elements.
    """
    rows, exists = program_rows(N, BLOCK_N)
    b_weight, keep = row_weight(weight_ptr, rows, exists)
    start, stop, known = row_segment(adapter_ptr, offsets_ptr, rows, keep, K, R)
    b_inverse = energy_inverse_norm(energy_ptr, rows, keep)
    b_captured = row_captured(
        u_ptr, u_stride, gram_inverse_ptr, rows, keep, b_inverse, start, stop, known, R, BLOCK_N, BLOCK_R
    )
    store_ratio(value_ptr, captured_ptr, b_captured, b_weight, rows, exists, keep, weight_ptr is not None)


@triton.jit(do_not_specialize=["N"])
def ratio_from_energy_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    energy_ptr,
    u_ptr,
    gram_inverse_ptr,
    adapter_ptr,
    offsets_ptr,
    weight_ptr,
    captured_ptr,
    de_ptr,
    du_ptr,
    N,
    R,
    K,
    grad_stride,
    u_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write every element of the gradients to energy and to u for BLOCK_N rows.

    Args:
        grad_ptr: (N,) float32, or one element with ``grad_stride`` 0 where one gradient serves all rows.
        energy_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr: as in the forward.
        captured_ptr: q/s, as the forward wrote it.
        de_ptr, du_ptr: (N,) float32 and (N, R), contiguous.
        N, R, K, grad_stride, u_stride, BLOCK_N, BLOCK_R: sizes and strides in elements.
    """
    rows, exists = program_rows(N, BLOCK_N)
    b_weight, keep = row_weight(weight_ptr, rows, exists)
    b_captured = tl.load(captured_ptr + rows, mask=exists, other=0.0)
    b_inverse = energy_inverse_norm(energy_ptr, rows, keep)
    b_slope = row_slope(grad_ptr, grad_stride, b_weight, b_captured, rows, exists)
    tl.store(de_ptr + rows, 0.5 * b_slope * b_captured * b_inverse * b_inverse, mask=exists)
    start, stop, _known = row_segment(adapter_ptr, offsets_ptr, rows, exists & (b_slope != 0), K, R)
    store_du(
        du_ptr, u_ptr, u_stride, gram_inverse_ptr, b_slope, b_inverse, rows, exists, start, stop, R, BLOCK_N, BLOCK_R
    )


def plan_forward(energy: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """Prepare the forward launch; with meta tensors, for a compilation ahead of time.

    Args:
        energy, u, given: the arguments of the reference.

    Returns:
        The launch, and the tensors that it fills: value ((n,), or partial sums with a weight) and q/s (n,).
    """
    args, blocks, programs = _shared_args(energy, u, *given)
    value = fresh(u, len(u) if given[-1] is None else programs, torch.float32)
    captured = fresh(u, len(u), torch.float32)
    args |= {"value_ptr": value, "captured_ptr": captured}
    return Launch(ratio_from_energy_kernel, (programs,), args, blocks), (value, captured)


def plan_backward(grad: Tensor, energy: Tensor, u: Tensor, *rest: Any) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """Prepare the backward launch; with meta tensors, for a compilation ahead of time.

    Args:
        grad, energy, u, rest: the arguments of the backward reference.

    Returns:
        The launch, and the gradients that it fills: to energy (n,) float32 and to u (n, R).
    """
    *given, captured = rest
    args, blocks, programs = _shared_args(energy, u, *given)
    de, du = fresh(u, len(u), torch.float32), fresh(u, u.shape)
    args |= _ratio.backward_args(grad, captured) | {"de_ptr": de, "du_ptr": du}
    return Launch(ratio_from_energy_backward_kernel, (programs,), args, blocks), (de, du)


def _shared_args(energy: Tensor, u: Tensor, *given: Tensor | None) -> tuple[dict[str, Any], dict[str, int], int]:
    """Return the arguments of both kernels, their block sizes and warps, and the number of programs."""
    n, r = u.shape
    blocks = row_blocks(n, max(r, 1), r)
    settings = {name: size for name, size in blocks._asdict().items() if name != "BLOCK_D"}
    return _ratio.launch_args(u, *given) | {"energy_ptr": energy.contiguous()}, settings, row_programs(n, blocks)


_forward_op = Op("nsc::ratio_from_energy", ratio_from_energy_reference, partial(_ratio.launch_forward, plan_forward))
_backward_op = Op(
    "nsc::ratio_from_energy_backward",
    ratio_from_energy_backward_reference,
    partial(_ratio.launch_backward, plan_backward),
)


def _backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks it once
    energy, u, _, adapter, offsets, weight, captured = saved
    de, du = _backward_op(grad, *saved)
    dgram, dweight = _ratio.side_gradients(
        ctx, grad, u, adapter, offsets, weight, captured, lambda: _inverse_norm(energy, weight)
    )
    return de, du, dgram, None, None, dweight


_forward_op.differentiable(_ratio.save, _backward)


def ratio_from_energy(
    energy: Tensor,  # (...,)
    u: Tensor,  # (..., R)
    gram_inverse: Tensor | None = None,  # (R, R)
    *,
    adapter: Tensor | None = None,  # (...,) int
    offsets: Tensor | None = None,  # (K + 1,) int
    weight: Tensor | None = None,  # (...,)
) -> Tensor:
    """Return ``null_space_ratio`` of rows z given by their energy ``|z|^2``: om = sqrt(1 - u_k^T G_k u_k / energy).

    ``lora_down`` and ``lora_fork`` return u and the energy from one pass over z, so this needs no further pass. Edges
    are those of ``null_space_ratio``, but in float32 |z| below 1e-19 counts as a zero row and above 1.8e19 gives NaN,
    since its energy is then 0 or infinite.

    Args:
        energy: (...,) ``|z|^2`` of each row, in float32 (float64 for float64).
        u: (..., R), any floating dtype: ``z @ A.T`` for all adapters stacked, R the sum of their ranks.
        gram_inverse: (R, R) block-diagonal ``(A_k A_k^T)^-1``, symmetric; None where each A_k has orthonormal rows.
        adapter: (...,) int, the adapter that each row is measured against, as for ``null_space_ratio``.
        offsets: (K + 1,) int: adapter k owns columns ``offsets[k]:offsets[k + 1]`` of u.
        weight: (...,) row weights; a row of weight 0 is not read and has no gradient.

    Returns:
        om (...,), or with ``weight`` the 0-d sum of weight * om; float64 if energy or u is, else float32; sums are
        accumulated in the same dtype. Differentiable once in energy, u, gram_inverse and weight; z gets its gradient
        through energy and u.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together. Values are not looked at.

    Example:
        >>> z, A = torch.randn(32, 64), torch.randn(8, 64)
        >>> u, energy = lora_down(z, A)
        >>> om = ratio_from_energy(energy, u, gram_inverse(A))  # (32,)

    Source: https://arxiv.org/abs/2603.26317, Eq. 3 and 6.
    """
    rows = energy.shape
    if u.dim() == 0 or energy.dim() != u.dim() - 1:
        raise ValueError(f"energy must have one number for each row of u {tuple(u.shape)}, got {tuple(rows)}")
    expect("energy", energy, rows, "|z|^2 of each row of u", u)
    _ratio.expect_beside(rows, u, gram_inverse, adapter, offsets, weight, u)
    dtype = accumulator_dtype(energy, u)
    given = _ratio.flattened(dtype, gram_inverse, adapter, offsets, weight)
    value, _ = _forward_op(energy.reshape(-1).to(dtype), u.reshape(energy.numel(), u.shape[-1]), *given)
    return value.reshape(rows) if weight is None else value
