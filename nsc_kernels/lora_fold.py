"""Adapters folded into a weight: what the merged layer is when it is written as one matrix.

    out = W + B diag(c) A
    T = dout A^T (m, R)     dW = dout     dc = sum over rows of T * B     dB = T diag(c)     dA = (B diag(c))^T dout

One pass over W. Into a given buffer the kernel allocates nothing, which is what the weight plan and an export need.

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged weight).
"""

from typing import Any

import torch
from torch import Tensor

from nsc_kernels import _weighted_columns
from nsc_kernels._op import Op, is_traced, refuse_tangents, runs_triton
from nsc_kernels._rows import accumulator_dtype, expect


def lora_fold_reference(weight: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor) -> Tensor:
    """Compute ``lora_fold`` in plain torch.

    Args:
        weight: (m, d).
        lora_B: (m, R), in the dtype of ``weight``.
        c: (R,) in ``accumulator_dtype``.
        lora_A: (R, d), in the dtype of ``weight``.

    Returns:
        (m, d) in the dtype of ``weight``.
    """
    return _weighted_columns.weighted_reference(weight, lora_B, c, lora_A)


def lora_fold_backward_reference(
    dout: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor, to_B: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``lora_fold`` to lora_B and to c in plain torch.

    Args:
        dout: (m, d), the incoming gradient.
        lora_B, c, lora_A: as the forward took them.
        to_B: whether dB is wanted.

    Returns:
        dB (m, R) in the dtype of ``lora_B``, empty if it is not wanted, and dc (R,) in ``accumulator_dtype``.
    """
    return _weighted_columns.weighted_backward_reference(dout, lora_B, c, lora_A, to_B)


_forward_op = Op("nsc::lora_fold", lora_fold_reference, _weighted_columns.launch_weighted)
_backward_op = Op("nsc::lora_fold_backward", lora_fold_backward_reference, _weighted_columns.launch_weighted_backward)


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    return _weighted_columns.gradients(ctx, dout, _backward_op, lambda dout, weighted: weighted.T @ dout)


_forward_op.differentiable(_weighted_columns.save, _backward)


def lora_fold(weight: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``W + B diag(c) A``: all adapters folded into one weight.

    The kernel makes one pass over the weight, and allocates nothing where ``out`` is given.

    Args:
        weight: (m, d) float64, float32, bfloat16 or float16.
        lora_B: (m, R) the adapters' up-projections side by side, in weight's dtype.
        c: (R,) coefficient times LoRA scale of each column of lora_B, any floating dtype.
        lora_A: (R, d) the adapters' down-projections, stacked, in weight's dtype. Autocast casts none of them.
        out: (m, d) a buffer to fill, of weight's dtype and with contiguous rows; it may be ``weight`` itself.

    Returns:
        (m, d) in weight's dtype, summed in float32 (float64 for float64): ``out`` if it is given, else a new tensor,
        differentiable once in weight, lora_B, c and lora_A.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or if a gradient is asked for through ``out``.

    Example:
        >>> W, A, B = torch.randn(48, 64), torch.randn(20, 64), torch.randn(48, 20)
        >>> merged = lora_fold(W, B, torch.full((20,), 0.4), A)  # (48, 64), W + 0.4 B A

    Source: https://arxiv.org/abs/2603.26317, Eq. 5.
    """
    (m, d), r = weight.shape, lora_A.shape[0]
    expect("lora_B", lora_B, (m, r), "one row for each of weight, one column for each row of lora_A", weight)
    expect("lora_A", lora_A, (r, d), "one column for each of weight", weight)
    expect("c", c, (r,), "one weight for each row of lora_A", weight)
    if not weight.dtype == lora_A.dtype == lora_B.dtype:
        raise ValueError(f"weight is {weight.dtype}, lora_A {lora_A.dtype}, lora_B {lora_B.dtype}; convert with .to()")
    args = (weight, lora_B, c.to(accumulator_dtype(weight)), lora_A)
    if out is None:
        return _forward_op(*args)
    _check_out(out, args)
    return _fold_into(out, *args)


def _check_out(out: Tensor, args: tuple[Tensor, ...]) -> None:
    weight = args[0]
    expect("out", out, weight.shape, "the shape of weight", weight)
    if out.dtype != weight.dtype or (out.stride(1) != 1 and out.shape[1] > 1):
        raise ValueError(f"out must be {weight.dtype} with contiguous rows, got {out.dtype} of strides {out.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*args, out)):
        raise ValueError("a fold into out has no gradient; leave out away, or fold under torch.no_grad()")
    refuse_tangents("nsc::lora_fold", (*args, out))


def _fold_into(out: Tensor, *args: Tensor) -> Tensor:
    if is_traced((*args, out)) or not runs_triton(args):
        return out.copy_(_forward_op(*args))
    weight, lora_B, c, lora_A = args
    _weighted_columns.launch_weighted(weight, lora_B, c, lora_A, out)
    torch.autograd.graph.increment_version(out)
    return out
