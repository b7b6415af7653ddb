"""The torch side that both null-space ratios share: segments, values, slopes, launch arguments and refusals.

After the rows (z, or their energy) and ``u``, both ops take the same four arguments:

    gram_inverse   (R, R), block-diagonal, in ``accumulator_dtype``, or None for the identity
    adapter        (n,) int, the adapter of each row, or None for a single adapter
    offsets        (K + 1,) int, with ``adapter``: adapter k owns the columns ``offsets[k]:offsets[k + 1]`` of u
    weight         (n,) in ``accumulator_dtype``, or None
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_kernels._op import without_autocast
from nsc_kernels._ratio_tl import MIN_RATIO
from nsc_kernels._rows import expect, unit_stride


def ratio_of_rows(
    inverse_norm: Tensor,  # (n,)
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the ratio om = sqrt(1 - q/s) of flat rows, and q/s = v.(G v) for the backward.

    Args:
        inverse_norm: 1/|z| of each row.
        u: ``z A^T``.
        gram_inverse, adapter, offsets, weight: as above.

    Returns:
        om (n,), or with ``weight`` the 0-d sum of weight * om; and q/s (n,), clamped to [0, 1], NaN where it is not
        finite or the adapter does not exist, 0 for a row of weight 0.
    """
    v, _, known = _row_vectors(inverse_norm, u, adapter, offsets, weight)
    captured = (v * _gram_product(v, gram_inverse)).sum(-1)
    valid = captured.isfinite() & inverse_norm.isfinite() & known
    captured = torch.where(valid, captured.clamp(0, 1), math.nan)
    ratio = (1 - captured).sqrt()
    return ratio if weight is None else (weight * ratio).sum(), captured


def ratio_slope(grad: Tensor, weight: Tensor | None, captured: Tensor) -> Tensor:
    """Return g/om of each row, where om counts as at least ``MIN_RATIO``.

    Args:
        grad: the incoming gradient, (n,), or 0-d with ``weight``.
        weight: (n,) or None.
        captured: q/s, (n,).

    Returns:
        (n,); 0 for a row of weight 0.
    """
    row_grad = grad if weight is None else grad * weight
    return row_grad / (1 - captured).sqrt().clamp_min(MIN_RATIO)


def u_gradient(
    slope: Tensor,  # (n,)
    inverse_norm: Tensor,  # (n,)
    u: Tensor,  # (n, R)
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Return the gradient of a ratio to u: -slope G v inside a row's segment, 0 elsewhere.

    Args:
        slope: g/(om |z|) of each row.
        inverse_norm: 1/|z| of each row.
        u: ``z A^T``.
        gram_inverse, adapter, offsets, weight: as above.

    Returns:
        (n, R) in u's dtype, contiguous.
    """
    v, inside, _ = _row_vectors(inverse_norm, u, adapter, offsets, weight)
    return torch.where(inside, -slope[:, None] * _gram_product(v, gram_inverse), 0.0).to(u.dtype).contiguous()


def side_gradients(
    ctx: Any,
    grad: Tensor,  # (n,), or 0-d with weight
    u: Tensor,  # (n, R)
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    captured: Tensor,  # (n,)
    inverse_norm: Callable[[], Tensor],  # -> (n,)
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a ratio to gram_inverse and to weight.

    Args:
        ctx: autograd's context of the op, which knows which of the two are needed.
        grad: the incoming gradient.
        u, adapter, offsets, weight: the op's arguments.
        captured: q/s, as the forward returned it.
        inverse_norm: returns 1/|z| of each row; called only where it is needed.

    Returns:
        (R, R) and (n,), each None where it is not needed.
    """
    dgram = dweight = None
    if ctx.needs_input_grad[2]:
        v, _, _ = _row_vectors(inverse_norm(), u, adapter, offsets, weight)
        dgram = _gram_gradient(ratio_slope(grad, weight, captured), v)
    if ctx.needs_input_grad[5] and weight is not None:
        dweight = torch.where(weight == 0, 0.0, grad * (1 - captured).sqrt())  # a row of weight 0 is not read
    return dgram, dweight


def _row_vectors(
    inverse_norm: Tensor, u: Tensor, adapter: Tensor | None, offsets: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v = u/|z| (n, R), 0 outside each row's segment, and what ``_row_segments`` returns."""
    inside, known = _row_segments(u, adapter, offsets, weight)
    return torch.where(inside, u * inverse_norm[:, None], 0.0), inside, known


def _row_segments(
    u: Tensor, adapter: Tensor | None, offsets: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (n, R): the columns that measure each row, none for weight 0; and (n,): whether its adapter exists.

    A row of weight 0 needs no adapter.
    """
    live = u.new_ones(u.shape[0], dtype=torch.bool) if weight is None else weight != 0
    columns = torch.arange(u.shape[1], device=u.device)
    if adapter is None or offsets is None:
        return live[:, None] & (columns >= 0), torch.ones_like(live)
    last = offsets.shape[0] - 2
    known = (adapter >= 0) & (adapter <= last)
    segment = torch.where(known, adapter, 0).long()
    inside = (columns >= offsets[segment, None]) & (columns < offsets[segment + 1, None])
    return inside & (live & known)[:, None], known | ~live


def _gram_product(v: Tensor, gram_inverse: Tensor | None) -> Tensor:
    """Return G v for each row of v (n, R); v itself where A's rows are orthonormal."""
    return v if gram_inverse is None else v @ gram_inverse


@without_autocast
def _gram_gradient(slope: Tensor, v: Tensor) -> Tensor:
    """Return -1/2 times the sum over rows of g/om v v^T: block-diagonal, since v is 0 outside its row's segment."""
    return -0.5 * (v * slope[:, None]).T @ v


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the backward of a ratio needs: the inputs, and all outputs but the value.

    Args:
        ctx: autograd's context of the op.
        inputs: the op's arguments.
        output: the value, and what only the backward uses: q/s and perhaps 1/|z|.
    """
    _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(*inputs, *saved)


def launch_args(
    u: Tensor, gram_inverse: Tensor | None, adapter: Tensor | None, offsets: Tensor | None, weight: Tensor | None
) -> dict[str, Any]:
    """Return the arguments that all four ratio kernels take.

    Args:
        u: (n, R).
        gram_inverse, adapter, offsets, weight: as above.

    Returns:
        Parameter of the kernel -> argument.
    """
    u = unit_stride(u)
    gram_inverse, adapter, offsets, weight = (
        x if x is None else x.contiguous() for x in (gram_inverse, adapter, offsets, weight)
    )
    args: dict[str, Any] = {"u_ptr": u, "gram_inverse_ptr": gram_inverse, "adapter_ptr": adapter}
    args |= {"offsets_ptr": offsets, "weight_ptr": weight, "u_stride": u.stride(0)}
    return args | {"N": u.shape[0], "R": u.shape[1], "K": 0 if offsets is None else offsets.shape[0] - 1}


def backward_args(grad: Tensor, captured: Tensor) -> dict[str, Any]:
    """Return the arguments that both backward kernels take besides ``launch_args``.

    Args:
        grad: the incoming gradient: (n,), or 0-d where one gradient serves all rows.
        captured: q/s, (n,).

    Returns:
        Parameter of the kernel -> argument.
    """
    return {"grad_ptr": grad, "grad_stride": grad.stride(0) if grad.dim() else 0, "captured_ptr": captured}


def launch_forward(plan: Callable, *args: Tensor | None) -> tuple[Tensor, ...]:
    """Run the forward kernel of a ratio and add up the programs' weighted sums.

    Args:
        plan: ``plan_forward`` of the op.
        args: the arguments of its reference; the last one is the weight.

    Returns:
        What the reference returns.
    """
    launch, (value, *saved) = plan(*args)
    launch.run()
    return (value if args[-1] is None else value.sum(), *saved)


def launch_backward(plan: Callable, *args: Any) -> tuple[Tensor, ...]:
    """Run the backward kernel of a ratio.

    Args:
        plan: ``plan_backward`` of the op.
        args: the arguments of its backward reference.

    Returns:
        What the backward reference returns.
    """
    launch, gradients = plan(*args)
    launch.run()
    return gradients


def expect_beside(
    rows: Sequence[int],
    u: Tensor,
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    like: Tensor,
) -> None:
    """Refuse arguments that do not fit beside the rows of a ratio.

    Args:
        rows: the shape of the rows, without their width.
        u: must be (*rows, R).
        gram_inverse, adapter, offsets, weight: as ``null_space_ratio`` takes them.
        like: a tensor on the device where all must be.

    Raises:
        ValueError: as ``expect``, and if only one of ``adapter`` and ``offsets`` is given.
    """
    r = u.shape[-1:]
    expect("u", u, (*rows, *r), "one row of z @ A.T for each row of z", like)
    if gram_inverse is not None:
        expect("gram_inverse", gram_inverse, (*r, *r), "square in the columns of u, block-diagonal over adapters", like)
    if weight is not None:
        expect("weight", weight, rows, "one number for each row of z", like)
    if adapter is None and offsets is None:
        return
    if adapter is None or offsets is None:
        raise ValueError("adapter and offsets go together: pass both, or neither for a single adapter")
    expect("adapter", adapter, rows, "one index for each row of z", like, integer=True)
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be (K + 1,) for K >= 1 adapters, 0 first, got shape {tuple(offsets.shape)}")
    expect("offsets", offsets, offsets.shape, "ascending from 0 to the columns of u", like, integer=True)


def flattened(
    dtype: torch.dtype,
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the arguments after u as the registered ops take them.

    Args:
        dtype: ``accumulator_dtype`` of the call.
        gram_inverse, adapter, offsets, weight: as ``null_space_ratio`` takes them.

    Returns:
        The four, with one dimension of rows, gram_inverse and weight in ``dtype``.
    """
    return (
        None if gram_inverse is None else gram_inverse.to(dtype),
        None if adapter is None else adapter.reshape(-1),
        offsets,
        None if weight is None else weight.reshape(-1).to(dtype),
    )
