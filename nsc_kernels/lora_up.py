"""The up-projection of all stacked adapters, each column of u with its own coefficient, added to the base's output.

    out = y + (u * c) B^T
    v = dout B        dy = dout        du = c * v        dc = sum over rows of u * v        dB = dout^T (u * c)

In a merged layer c is lam_k s_k on the segment of adapter k, so dlam_k is s_k times the sum of dc over that segment:
only lam trains, and one pass over dout makes both du and dc. ``u * c`` is never made; dc is summed in a fixed order.

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged model).
"""

import math
from typing import Any

import torch
from torch import Tensor

from nsc_kernels._op import Op
from nsc_kernels._rows import accumulator_dtype, autocast_to, expect, shaped
from nsc_kernels._skinny import expand, shrink_columns


def lora_up_reference(y: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
    """y: (n, m)  u: (n, R)  c: (R,) in ``accumulator_dtype``  lora_B: (m, R)  ->  (n, m) in y's dtype"""
    return torch.addmm(y, (u * c).to(u.dtype), lora_B.T)


def lora_up_backward_reference(dout: Tensor, u: Tensor, c: Tensor, lora_B: Tensor, to_u: bool) -> tuple[Tensor, Tensor]:
    """du (n, R) in u's dtype, empty unless ``to_u``; dc (R,) in ``accumulator_dtype``."""
    v = (dout @ lora_B).to(c.dtype)
    return (v * c).to(u.dtype) if to_u else u.new_empty(0, u.shape[1]), (u * v).sum(0)


def _launch_forward(y: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
    return expand(y, u, lora_B.T, c.contiguous())


def _launch_backward(dout: Tensor, u: Tensor, c: Tensor, lora_B: Tensor, to_u: bool) -> tuple[Tensor, Tensor]:
    return shrink_columns(dout, lora_B.T, u, c, to_u)


_forward_op = Op("nsc::lora_up", lora_up_reference, _launch_forward)
_backward_op = Op("nsc::lora_up_backward", lora_up_backward_reference, _launch_backward)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 4
    u, c, lora_B = ctx.saved_tensors
    to_y, to_u, to_c, to_B = ctx.needs_input_grad
    du = dc = None
    if to_u or to_c:
        du, dc = _backward_op(dout, u, c, lora_B, to_u)
    dB = dout.T @ (u * c).to(u.dtype) if to_B else None
    return dout if to_y else None, du if to_u else None, dc if to_c else None, dB


_forward_op.differentiable(_save, _backward)


def lora_up(y: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
    """``y + (u * c) B^T``: the base layer's output with all adapters added, column j of u weighted by ``c[j]``.

    Args:
        y: (..., m) the output of the base layer; float64, float32, bfloat16 or float16.
        u: (..., R) from ``lora_down``, in y's dtype.
        c: (R,) weights of u's columns: coefficient times LoRA scale, the same along an adapter's segment.
        lora_B: (m, R) the adapters' up-projections side by side, in y's dtype. Under autocast y, u and lora_B are cast
            as by ``F.linear``; c never is.

    Returns:
        (..., m) in y's dtype, summed in float32 (float64 for float64). Differentiable, once, in everything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Source: https://arxiv.org/abs/2603.26317, Eq. 5.
    """
    y, u, lora_B = autocast_to(y, u, lora_B)
    m, r = y.shape[-1], u.shape[-1]
    expect("u", u, (*y.shape[:-1], r), "one row of z @ A.T for each row of y", y)
    expect("c", c, (r,), "one weight for each column of u", y)
    expect("lora_B", lora_B, (m, r), "one row for each column of y, one column for each of u", y)
    if not y.dtype == u.dtype == lora_B.dtype:
        raise ValueError(f"y is {y.dtype}, u {u.dtype}, lora_B {lora_B.dtype}; convert with .to(), or use autocast")
    n = math.prod(y.shape[:-1])
    out = _forward_op(shaped(y, (n, m)), shaped(u, (n, r)), c.to(accumulator_dtype(y)), lora_B)
    return shaped(out, y.shape)
