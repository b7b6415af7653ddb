"""The up-projection of all stacked adapters, each column of u with its own coefficient, added to the base's output.

    out = y + (u * c) B^T
    v = dout B        dy = dout        du = c * v        dc = sum over rows of u * v        dB = dout^T (u * c)

In a merged layer c is lam_k s_k on the segment of adapter k, so dlam_k is s_k times the sum of dc over that segment:
only lam trains, and one pass over dout makes both du and dc. ``u * c`` is never made; dc is summed in a fixed order.

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged model).
"""

import math
from typing import Any

from torch import Tensor

from nsc_kernels import _weighted_columns
from nsc_kernels._op import Op
from nsc_kernels._rows import accumulator_dtype, autocast_to, expect, shaped


def lora_up_reference(y: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
    """Compute ``lora_up`` of flat rows in plain torch.

    Args:
        y: (n, m).
        u: (n, R), in the dtype of ``y``.
        c: (R,) in ``accumulator_dtype``.
        lora_B: (m, R), in the dtype of ``y``.

    Returns:
        (n, m) in the dtype of ``y``.
    """
    return _weighted_columns.weighted_reference(y, u, c, lora_B.T)


def lora_up_backward_reference(dout: Tensor, u: Tensor, c: Tensor, lora_B: Tensor, to_u: bool) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``lora_up`` to u and to c in plain torch.

    Args:
        dout: (n, m), the incoming gradient.
        u, c, lora_B: as the forward took them.
        to_u: whether du is wanted.

    Returns:
        du (n, R) in the dtype of ``u``, empty if it is not wanted, and dc (R,) in ``accumulator_dtype``.
    """
    return _weighted_columns.weighted_backward_reference(dout, u, c, lora_B.T, to_u)


def _launch_forward(y: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
    return _weighted_columns.launch_weighted(y, u, c, lora_B.T)


def _launch_backward(dout: Tensor, u: Tensor, c: Tensor, lora_B: Tensor, to_u: bool) -> tuple[Tensor, Tensor]:
    return _weighted_columns.launch_weighted_backward(dout, u, c, lora_B.T, to_u)


_forward_op = Op("nsc::lora_up", lora_up_reference, _launch_forward)
_backward_op = Op("nsc::lora_up_backward", lora_up_backward_reference, _launch_backward)


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    return _weighted_columns.gradients(ctx, dout, _backward_op, lambda dout, weighted: dout.T @ weighted)


_forward_op.differentiable(_weighted_columns.save, _backward)


def lora_up(y: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
    """Return ``y + (u * c) B^T``: the base layer's output with all adapters added, column j of u weighted by ``c[j]``.

    ``u * c`` is never materialised. The backward makes du and dc in one pass over the incoming gradient, and dc is
    summed in a fixed order, so it is the same from run to run.

    Args:
        y: (..., m) the output of the base layer; float64, float32, bfloat16 or float16.
        u: (..., R) from ``lora_down``, in y's dtype.
        c: (R,) weights of u's columns, any floating dtype: coefficient times LoRA scale, the same along an adapter's
            segment.
        lora_B: (m, R) the adapters' up-projections side by side, in y's dtype. Under autocast y, u and lora_B are cast
            as by ``F.linear``; c never is.

    Returns:
        (..., m) in y's dtype, summed in float32 (float64 for float64). Differentiable once in every argument.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.

    Example:
        >>> base, z = torch.nn.Linear(64, 48), torch.randn(32, 64)
        >>> A, B = torch.randn(20, 64), torch.randn(48, 20)  # two adapters, of ranks 4 and 16
        >>> c = torch.tensor([0.4, 0.8]).repeat_interleave(torch.tensor([4, 16]))
        >>> y = lora_up(base(z), lora_down(z, A)[0], c, B)  # (32, 48)

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


def coefficient_gradient(dout: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
    """Return the gradient of ``lora_up`` to c alone, where its output was made in another way.

    Args:
        dout: (..., m), the incoming gradient.
        u: (..., R), in dout's dtype.
        c: (R,) weights of u's columns, any floating dtype.
        lora_B: (m, R), in dout's dtype.

    Returns:
        (R,) in float32 (float64 for float64), summed in a fixed order.

    Source: https://arxiv.org/abs/2603.26317, Eq. 5.
    """
    n = math.prod(dout.shape[:-1])
    rows = shaped(dout, (n, dout.shape[-1])), shaped(u, (n, u.shape[-1]))
    return _backward_op(*rows, c.to(accumulator_dtype(dout)), lora_B, False)[1]
