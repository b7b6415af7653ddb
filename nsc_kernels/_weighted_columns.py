"""The product that ``lora_up`` and ``lora_fold`` share: U W with a weight for each column of U, added to Y.

    out = Y + (U * c) W        Y, out (n, m)    U (n, R)    c (R,)    W (R, m)
    V = dout W^T    dY = dout    dU = c * V    dc = sum over rows of U * V    dW = (U * c)^T dout

``lora_up`` takes the rows u for U and B^T for W; ``lora_fold`` takes B for U and A for W. dU and dc come from one pass
over dout. U * c is rounded to the dtype of U, c and dc have ``accumulator_dtype``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsc_kernels._skinny import expand, plan_shrink, run_all


def weighted_reference(y: Tensor, u: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """Compute Y + (U * c) W in plain torch.

    Args:
        y: (n, m).
        u: (n, R).
        c: (R,).
        w: (R, m).

    Returns:
        (n, m) in the dtype of ``y``.
    """
    return torch.addmm(y, _weighted(u, c), w)


def weighted_backward_reference(dout: Tensor, u: Tensor, c: Tensor, w: Tensor, to_u: bool) -> tuple[Tensor, Tensor]:
    """Compute dU and dc in plain torch.

    Args:
        dout: (n, m), the incoming gradient.
        u, c, w: as the forward took them.
        to_u: whether dU is wanted.

    Returns:
        dU (n, R) in the dtype of ``u``, or (0, R) if it is not wanted, and dc (R,) in the dtype of ``c``.
    """
    v = (dout @ w.T).to(c.dtype)
    return (v * c).to(u.dtype) if to_u else u.new_empty(0, u.shape[1]), (u * v).sum(0)


def launch_weighted(y: Tensor, u: Tensor, c: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """Run the expand kernel for Y + (U * c) W.

    Args:
        y, u, c, w: as ``weighted_reference`` takes them, c in float32.
        out: (n, m) with contiguous rows, a buffer to fill.

    Returns:
        ``out``, or a new (n, m) tensor.
    """
    return expand(y, u, w, c.contiguous(), out=out)


def launch_weighted_backward(dout: Tensor, u: Tensor, c: Tensor, w: Tensor, to_u: bool) -> tuple[Tensor, Tensor]:
    """Run the shrink kernel for dU and dc, in one pass over ``dout``.

    Args:
        dout, u, c, w, to_u: as ``weighted_backward_reference`` takes them, c in float32.

    Returns:
        What ``weighted_backward_reference`` returns.
    """
    launches, (du, _, dc) = plan_shrink(dout, w, u, c.contiguous(), values=to_u)
    run_all(launches)
    return du, dc.sum(0)  # type: ignore[union-attr]  # u is given


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keep U, c and W for the backward, each in the form in which the op takes it.

    Args:
        ctx: autograd's context of the op.
        inputs: Y, U, c and W or its transpose.
        output: not needed.
    """
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:])


def gradients(
    ctx: Any, dout: Tensor | None, backward_op: Callable, w_gradient: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all four arguments.

    Args:
        ctx: autograd's context of the op, filled by ``save``.
        dout: the incoming gradient, (n, m), or None.
        backward_op: the op's backward: (dout, U, c, W or its transpose, to_u) -> dU, dc.
        w_gradient: (dout, U * c) -> the gradient of W or of its transpose.

    Returns:
        dY, dU, dc and what ``w_gradient`` returns, each None where it is not needed.
    """
    if dout is None:
        return (None,) * 4
    u, c, w = ctx.saved_tensors
    to_y, to_u, to_c, to_w = ctx.needs_input_grad
    du = dc = None
    if to_u or to_c:
        du, dc = backward_op(dout, u, c, w, to_u)
    dw = w_gradient(dout, _weighted(u, c)) if to_w else None
    return dout if to_y else None, du if to_u else None, dc if to_c else None, dw


def _weighted(u: Tensor, c: Tensor) -> Tensor:
    return (u * c).to(u.dtype)
