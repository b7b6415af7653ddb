"""Adapters folded into a weight: what the merged layer is when it is written as one matrix.

    out = W + B diag(c) A
    T = dout A^T (m, R)     dW = dout     dc = sum over rows of T * B     dB = T diag(c)     dA = (B diag(c))^T dout

One pass over W. Into a given buffer the fold allocates nothing, which is what the weight plan and an export need.

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged weight).
"""

from typing import Any

import torch
from torch import Tensor

from nsc_kernels._op import Op, is_traced, runs_triton
from nsc_kernels._rows import accumulator_dtype, expect
from nsc_kernels._skinny import expand, shrink_columns


def lora_fold_reference(weight: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor) -> Tensor:
    """weight: (m, d)  lora_B: (m, R)  c: (R,) in ``accumulator_dtype``  lora_A: (R, d)  ->  (m, d) in weight's dtype"""
    return torch.addmm(weight, (lora_B * c).to(lora_B.dtype), lora_A)


def lora_fold_backward_reference(
    dout: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor, to_B: bool
) -> tuple[Tensor, Tensor]:
    """dB (m, R) in lora_B's dtype, empty unless ``to_B``; dc (R,) in ``accumulator_dtype``."""
    t = (dout @ lora_A.T).to(c.dtype)
    return (t * c).to(lora_B.dtype) if to_B else lora_B.new_empty(0, lora_B.shape[1]), (lora_B * t).sum(0)


def _launch_forward(weight: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor, out: Tensor | None = None) -> Tensor:
    return expand(weight, lora_B, lora_A, c.contiguous(), out=out)


def _launch_backward(dout: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor, to_B: bool) -> tuple[Tensor, Tensor]:
    return shrink_columns(dout, lora_A, lora_B, c, to_B)


_forward_op = Op("nsc::lora_fold", lora_fold_reference, _launch_forward)
_backward_op = Op("nsc::lora_fold_backward", lora_fold_backward_reference, _launch_backward)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 4
    lora_B, c, lora_A = ctx.saved_tensors
    to_weight, to_B, to_c, to_A = ctx.needs_input_grad
    dB = dc = None
    if to_B or to_c:
        dB, dc = _backward_op(dout, lora_B, c, lora_A, to_B)
    dA = (lora_B * c).to(lora_B.dtype).T @ dout if to_A else None
    return dout if to_weight else None, dB if to_B else None, dc if to_c else None, dA


_forward_op.differentiable(_save, _backward)


def lora_fold(weight: Tensor, lora_B: Tensor, c: Tensor, lora_A: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``W + B diag(c) A``: all adapters in one weight.

    Args:
        weight: (m, d) float64, float32, bfloat16 or float16.
        lora_B: (m, R), lora_A: (R, d) the stacked factors, in weight's dtype.
        c: (R,) coefficient times LoRA scale of each column of lora_B.
        out: (m, d) a buffer to fill, of weight's dtype and with contiguous rows; it may be ``weight`` itself.

    Returns:
        (m, d) in weight's dtype, summed in float32 (float64 for float64): ``out`` if it is given, else a new tensor,
        differentiable, once, in everything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a gradient asked for through ``out``.

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


def _fold_into(out: Tensor, *args: Tensor) -> Tensor:
    if is_traced((*args, out)) or not runs_triton(args):
        return out.copy_(_forward_op(*args))
    weight, lora_B, c, lora_A = args
    _launch_forward(weight, lora_B, c, lora_A, out)
    torch.autograd.graph.increment_version(out)
    return out
