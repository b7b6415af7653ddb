"""The null-space ratio of rows whose energy is known already: no pass over them is left to make.

    om = sqrt(1 - q/s)        s = z.z from ``lora_down``,  q = u.h,  u = A z,  h = G u,  G = (A A^T)^-1
    dom/ds = q/(2 om s^2)     dom/du = -1/(om s) h         dom/dG = -1/(2 om s) u u^T

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6. Edges as in ``null_space_ratio``; an energy below the dtype's
smallest normal number (|z| below 1e-19 in float32) counts as that of a zero row, one that is not finite gives NaN.
"""

from typing import Any

import torch
from torch import Tensor

from nsc_kernels import _rows
from nsc_kernels._launch import RowBlocks, row_blocks, row_programs
from nsc_kernels._op import Launch, Op, fresh
from nsc_kernels._tl import (
    energy_inverse_norm,
    program_rows,
    row_captured,
    row_segment,
    row_slope,
    row_weight,
    store_du,
    store_ratio,
    tl,
    triton,
)  # fmt: skip


def ratio_from_energy_reference(
    energy: Tensor,  # (n,) in accumulator_dtype
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,  # (R, R), block-diagonal
    adapter: Tensor | None,  # (n,)
    offsets: Tensor | None,  # (K + 1,)
    weight: Tensor | None,  # (n,)
) -> tuple[Tensor, Tensor]:
    """``ratio_from_energy`` of flat rows in plain torch: the value, (n,) or 0-d with ``weight``, and q/s (n,)."""
    inverse_norm = _inverse_norm(energy, weight)
    v, _, known = _rows.row_vectors(u, inverse_norm, adapter, offsets, weight)
    captured = _rows.captured_share(v, gram_inverse, inverse_norm.isfinite() & known)
    return _rows.ratio_value(captured, weight), captured


def ratio_from_energy_backward_reference(
    grad: Tensor,  # (n,), or 0-d with weight
    energy: Tensor,
    u: Tensor,
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    captured: Tensor,  # (n,): q/s
) -> tuple[Tensor, Tensor]:
    """The gradients to energy (n,) and to u (n, R) in u's dtype."""
    inverse_norm = _inverse_norm(energy, weight)
    slope = _rows.ratio_slope(grad, weight, captured) * inverse_norm
    v, inside, _ = _rows.row_vectors(u, inverse_norm, adapter, offsets, weight)
    du = torch.where(inside, -slope[:, None] * _rows.gram_product(v, gram_inverse), 0.0)
    return 0.5 * slope * captured * inverse_norm, du.to(u.dtype).contiguous()


def _inverse_norm(energy: Tensor, weight: Tensor | None) -> Tensor:
    """(n,): 1/|z|; 0 for a zero row and one of weight 0, NaN for one that is not finite."""
    if weight is not None:
        energy = torch.where(weight == 0, 0.0, energy)
    inverse = torch.where(energy <= torch.finfo(energy.dtype).max, energy.rsqrt(), torch.nan)
    return torch.where(energy < torch.finfo(energy.dtype).tiny, 0.0, inverse)


@triton.jit(do_not_specialize=["N"])
def ratio_from_energy_kernel(  # type: ignore[no-untyped-def]
    energy_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr, value_ptr, captured_ptr,
    N, R, K, u_stride, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """value: (N,), or with weight one partial sum a program; captured: (N,). All float32."""
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
    grad_ptr, energy_ptr, u_ptr, gram_inverse_ptr, adapter_ptr, offsets_ptr, weight_ptr, captured_ptr, de_ptr, du_ptr,
    N, R, K, grad_stride, u_stride, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """de: (N,) float32, du: (N, R), every element written; grad_stride is 0 where one gradient serves all rows."""
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
    """The forward launch and what it fills; arguments of the reference. With meta tensors, to compile ahead of time."""
    args, settings = _shared_args(energy, u, *given)
    n, programs = u.shape[0], row_programs(u.shape[0], RowBlocks(**settings))
    value = fresh(u, n if given[-1] is None else programs, torch.float32)
    captured = fresh(u, n, torch.float32)
    args |= {"value_ptr": value, "captured_ptr": captured}
    return _launch(ratio_from_energy_kernel, programs, args, settings), (value, captured)


def plan_backward(
    grad: Tensor, energy: Tensor, u: Tensor, *given: Tensor | None
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The backward launch and the gradients it fills; arguments of the backward reference."""
    args, settings = _shared_args(energy, u, *given[:-1])
    de, du = fresh(u, u.shape[0], torch.float32), fresh(u, u.shape)
    args |= {"grad_ptr": grad, "grad_stride": grad.stride(0) if grad.dim() else 0}
    args |= {"captured_ptr": given[-1], "de_ptr": de, "du_ptr": du}
    programs = row_programs(u.shape[0], RowBlocks(**settings))
    return _launch(ratio_from_energy_backward_kernel, programs, args, settings), (de, du)


def _shared_args(energy: Tensor, u: Tensor, *given: Tensor | None) -> tuple[dict[str, Any], dict[str, int]]:
    u = _rows.unit_stride(u)
    gram_inverse, adapter, offsets, weight = (x if x is None else x.contiguous() for x in given)
    args: dict[str, Any] = {"energy_ptr": energy.contiguous(), "u_ptr": u, "gram_inverse_ptr": gram_inverse}
    args |= {"weight_ptr": weight, "adapter_ptr": adapter, "offsets_ptr": offsets, "u_stride": u.stride(0)}
    args |= {"N": u.shape[0], "R": u.shape[1], "K": 0 if offsets is None else offsets.shape[0] - 1}
    return args, row_blocks(u.shape[0], max(u.shape[1], 1), u.shape[1])._asdict()


def _launch(kernel: Any, programs: int, args: dict[str, Any], settings: dict[str, int]) -> Launch:
    return Launch(kernel, (programs,), args, {k: v for k, v in settings.items() if k != "BLOCK_D"})


def _launch_forward(energy: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    launch, (value, captured) = plan_forward(energy, u, *given)
    launch.run()
    return value if given[-1] is None else value.sum(), captured


def _launch_backward(*args: Any) -> tuple[Tensor, Tensor]:
    launch, gradients = plan_backward(*args)
    launch.run()
    return gradients


_forward_op = Op("nsc::ratio_from_energy", ratio_from_energy_reference, _launch_forward)
_backward_op = Op("nsc::ratio_from_energy_backward", ratio_from_energy_backward_reference, _launch_backward)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks it once
    energy, u, _, adapter, offsets, weight, captured = saved
    de, du = _backward_op(grad, *saved)
    dgram = dweight = None
    needed = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
    if any(needed):
        inverse_norm = _inverse_norm(energy, weight)
        dgram, dweight = _rows.side_gradients(needed, grad, u, inverse_norm, adapter, offsets, weight, captured)
    return de, du, dgram, None, None, dweight


_forward_op.differentiable(_save, _backward)


def ratio_from_energy(
    energy: Tensor,  # (...,)
    u: Tensor,  # (..., R)
    gram_inverse: Tensor | None = None,  # (R, R)
    *,
    adapter: Tensor | None = None,  # (...,) int
    offsets: Tensor | None = None,  # (K + 1,) int
    weight: Tensor | None = None,  # (...,)
) -> Tensor:
    """``null_space_ratio`` of rows z given by their energy ``|z|^2``, as ``lora_down`` and ``lora_fork`` return it.

    Args:
        energy: (...,) ``|z|^2`` of each row, in float32 (float64 for float64).
        u, gram_inverse, adapter, offsets, weight: as for ``null_space_ratio``.

    Returns:
        om (...,), or with ``weight`` the 0-d sum of weight * om; float64 if energy or u is, else float32.
        Differentiable once in energy, u, gram_inverse and weight; z gets its gradient through energy and u.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together. Values are not looked at.

    Source: https://arxiv.org/abs/2603.26317, Eq. 3 and 6.
    """
    rows = energy.shape
    if u.dim() == 0 or energy.dim() != u.dim() - 1:
        raise ValueError(f"energy must have one number for each row of u {tuple(u.shape)}, got {tuple(rows)}")
    _rows.expect("energy", energy, rows, "|z|^2 of each row of u", u)
    _rows.expect_beside(rows, u, gram_inverse, adapter, offsets, weight, u)
    dtype = _rows.accumulator_dtype(energy, u)
    value, _ = _forward_op(
        energy.reshape(-1).to(dtype),
        u.reshape(energy.numel(), u.shape[-1]),
        None if gram_inverse is None else gram_inverse.to(dtype),
        None if adapter is None else adapter.reshape(-1),
        offsets,
        None if weight is None else weight.reshape(-1).to(dtype),
    )
    return value.reshape(rows) if weight is None else value
