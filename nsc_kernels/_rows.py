"""What the torch side of several ops shares: rows, their segments, and the refusals at the public boundary."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nsc_kernels._op import without_autocast
from nsc_kernels._tl import MIN_RATIO


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of them is, else float32: the dtype of sums and of what is made of them."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as ``F.linear`` would take them: in autocast's dtype where it is on, but float64 as it is."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` in this shape; itself where it has it, which spares autograd a step."""
    return x if tuple(x.shape) == tuple(shape) else x.reshape(shape)


def unit_stride(x: Tensor) -> Tensor:
    """``x`` if its last dimension is contiguous, as the kernels need it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_inverses(z: Tensor) -> Tensor:
    """(n, d) -> (n,): 1/|z|; 0 for a zero row, NaN for one that is not finite. Scaled, so that no square overflows."""
    tiny = torch.finfo(z.dtype).tiny
    peak = z.abs().amax(-1, keepdim=True).clamp(tiny, 1 / tiny)
    norm = (z / peak).square().sum(-1).sqrt() * peak.squeeze(-1)
    inverse = torch.where(norm <= 1 / tiny, 1 / norm, math.nan)
    return torch.where(norm < tiny, 0.0, inverse)


def row_segments(
    u: Tensor, adapter: Tensor | None, offsets: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(n, R): the columns that a row is measured by, none in rows of weight 0; (n,): False where no such adapter is."""
    live = u.new_ones(u.shape[0], dtype=torch.bool) if weight is None else weight != 0
    columns = torch.arange(u.shape[1], device=u.device)
    if adapter is None or offsets is None:
        return live[:, None] & (columns >= 0), torch.ones_like(live)
    last = offsets.shape[0] - 2
    known = (adapter >= 0) & (adapter <= last)
    segment = torch.where(known, adapter, 0).long()
    inside = (columns >= offsets[segment, None]) & (columns < offsets[segment + 1, None])
    return inside & (live & known)[:, None], known | ~live


def row_vectors(
    u: Tensor, inverse_norm: Tensor, adapter: Tensor | None, offsets: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """v = u/|z| (n, R), 0 outside a row's segment; where that segment is; (n,) False where no such adapter is."""
    inside, known = row_segments(u, adapter, offsets, weight)
    return torch.where(inside, u * inverse_norm[:, None], 0.0), inside, known


def captured_share(v: Tensor, gram_inverse: Tensor | None, valid: Tensor) -> Tensor:
    """(n,): q/s = v.(G v), clamped to [0, 1]; NaN where it is not finite or not ``valid``."""
    captured = (v * gram_product(v, gram_inverse)).sum(-1)
    return torch.where(captured.isfinite() & valid, captured.clamp(0, 1), math.nan)


def gram_product(v: Tensor, gram_inverse: Tensor | None) -> Tensor:
    """G v of each row of (n, R); v itself where A's rows are orthonormal."""
    return v if gram_inverse is None else v @ gram_inverse


def ratio_value(captured: Tensor, weight: Tensor | None) -> Tensor:
    """sqrt(1 - captured), (n,), or its 0-d weighted sum; rows of weight 0 hold 0 in ``captured``."""
    ratio = (1 - captured).sqrt()
    return ratio if weight is None else (weight * ratio).sum()


def ratio_slope(grad: Tensor, weight: Tensor | None, captured: Tensor) -> Tensor:
    """(n,): g/om of each row, held below ``MIN_RATIO``; 0 for a row of weight 0."""
    row_grad = grad if weight is None else grad * weight
    return row_grad / (1 - captured).sqrt().clamp_min(MIN_RATIO)


@without_autocast
def gram_gradient(slope: Tensor, v: Tensor) -> Tensor:
    """(R, R): -1/2 sum over rows of g/om v v^T; block-diagonal, since v is 0 outside its row's segment."""
    return -0.5 * (v * slope[:, None]).T @ v


def weight_gradient(grad: Tensor, weight: Tensor, captured: Tensor) -> Tensor:
    """(n,): g om; 0 for a row of weight 0, which is not read."""
    return torch.where(weight == 0, 0.0, grad * (1 - captured).sqrt())


def side_gradients(
    needed: Sequence[bool],  # of gram_inverse and of weight
    grad: Tensor,
    u: Tensor,
    inverse_norm: Tensor,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    captured: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a ratio to gram_inverse (R, R) and to weight (n,), those that are needed."""
    dgram = dweight = None
    if needed[0]:
        v, _, _ = row_vectors(u, inverse_norm, adapter, offsets, weight)
        dgram = gram_gradient(ratio_slope(grad, weight, captured), v)
    if needed[1] and weight is not None:
        dweight = weight_gradient(grad, weight, captured)
    return dgram, dweight


def expect(name: str, x: Tensor, shape: Sequence[int], meaning: str, like: Tensor, *, integer: bool = False) -> None:
    """Refuse an argument, naming it, unless it has this shape, the device of ``like`` and the right kind of dtype.

    Raises:
        ValueError: with the remedy. Looks at metadata only, so it never waits for a device.
    """
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but z is on {like.device}; move it there first")
    if integer and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise ValueError(f"{name} must hold integers, got {x.dtype}; convert it with .long()")
    if not integer and not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, {meaning}, got {tuple(x.shape)}")


def expect_beside(
    rows: Sequence[int],
    u: Tensor,
    gram_inverse: Tensor | None,
    adapter: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    like: Tensor,
) -> None:
    """Refuse what does not fit beside these rows; u: (*rows, R), and the rest as ``null_space_ratio`` takes it.

    Raises:
        ValueError: as ``expect``.
    """
    r = u.shape[-1:]
    expect("u", u, (*rows, *r), "one row of z @ A.T for each row of z", like)
    if gram_inverse is not None:
        expect("gram_inverse", gram_inverse, (*r, *r), "square in the columns of u, block-diagonal over adapters", like)
    if weight is not None:
        expect("weight", weight, rows, "one number for each row of z", like)
    expect_segments(adapter, offsets, rows, like)


def expect_segments(adapter: Tensor | None, offsets: Tensor | None, rows: Sequence[int], z: Tensor) -> None:
    """Refuse a row-to-adapter map that is not one integer a row of ``z``, with the adapters' (K + 1,) column offsets.

    Raises:
        ValueError: as ``expect``, and if only one of the two is given.
    """
    if adapter is None and offsets is None:
        return
    if adapter is None or offsets is None:
        raise ValueError("adapter and offsets go together: pass both, or neither for a single adapter")
    expect("adapter", adapter, rows, "one index for each row of z", z, integer=True)
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be (K + 1,) for K >= 1 adapters, 0 first, got shape {tuple(offsets.shape)}")
    expect("offsets", offsets, offsets.shape, "ascending from 0 to the columns of u", z, integer=True)
