"""Device fragments that the kernels of both null-space ratios share.

A program works on BLOCK_N rows. Names mean the same in every fragment:

    rows                              (BLOCK_N,) int64: the rows of the program
    exists, keep                      (BLOCK_N,) bool: rows below N; those of them that also count
    b_weight, b_inverse, b_captured   (BLOCK_N,) float32: weight, 1/|z| and q/s of each row
    b_slope                           (BLOCK_N,) float32: g/om, where g is the gradient that arrives
    start, stop                       int32: first and past-the-last column of u that belong to a row's adapter

``start`` and ``stop`` are (BLOCK_N,) where every row has its own adapter and (1,) where all rows share one; everything
broadcasts over that. Pointers and strides are those of the kernels, which say what shapes stand behind them.
"""

# mypy: disable-error-code="no-untyped-def"

from nsc_kernels._tl import narrow, tl, triton

SMALLEST_NORM = tl.constexpr(2.0**-126)  # float32's smallest normal number; its inverse is still one
LARGEST_NORM = tl.constexpr(2.0**126)
MIN_RATIO = 1e-4  # gradients of a ratio divide by at least this
_MIN_RATIO = tl.constexpr(MIN_RATIO)
SMALL_ENERGY = tl.constexpr(2.0**-80)  # outside these the squares of a row under- or overflow float32
LARGE_ENERGY = tl.constexpr(2.0**120)
RESCALE = tl.constexpr(2.0**80)


@triton.jit
def row_energy(z_ptr, z_stride, rows, keep, b_scale, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the sum of ``(scale * z)^2`` over each row.

    Args:
        z_ptr, z_stride: (N, D), any floating dtype.
        rows, keep: the rows, and those that are read.
        b_scale: (BLOCK_N,) float32, a factor for each row.
        D, BLOCK_N, BLOCK_D: sizes; a row is read BLOCK_D columns at a time.

    Returns:
        (BLOCK_N,) float32; 0 for a row that is not read.
    """
    b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        mask = keep[:, None] & (cols < D)[None, :]
        b_z = tl.load(z_ptr + (rows * z_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        b_z *= b_scale[:, None]
        b_sum += b_z * b_z
    return tl.sum(b_sum, 1)


@triton.jit
def row_inverse_norm(z_ptr, z_stride, rows, keep, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return 1/|z| of each row, reading the rows a second time only if their squares leave float32.

    Args:
        z_ptr, z_stride: (N, D), any floating dtype.
        rows, keep: the rows, and those that are read.
        D, BLOCK_N, BLOCK_D: sizes.

    Returns:
        (BLOCK_N,) float32; 0 for a zero row or one that does not count, NaN for a row that is not finite.
    """
    b_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    b_energy = row_energy(z_ptr, z_stride, rows, keep, b_scale, D, BLOCK_N, BLOCK_D)
    too_large = b_energy > LARGE_ENERGY
    too_small = keep & (b_energy < SMALL_ENERGY)
    if tl.max((too_large | too_small).to(tl.int32), 0) > 0:
        b_scale = tl.where(too_large, 1.0 / RESCALE, tl.where(too_small, RESCALE, 1.0))
        b_energy = row_energy(z_ptr, z_stride, rows, keep, b_scale, D, BLOCK_N, BLOCK_D)
    b_norm = tl.sqrt(b_energy) / b_scale
    b_inverse = tl.where(b_norm <= LARGEST_NORM, 1.0 / b_norm, float("nan"))
    return tl.where(b_norm < SMALLEST_NORM, 0.0, b_inverse)


@triton.jit
def energy_inverse_norm(energy_ptr, rows, keep):
    """Return 1/|z| of each row from its energy ``|z|^2``.

    Args:
        energy_ptr: (N,) float32.
        rows, keep: the rows, and those that are read.

    Returns:
        (BLOCK_N,) float32; 0 for a zero row or one that does not count, NaN for a row that is not finite.
    """
    b_energy = tl.load(energy_ptr + rows, mask=keep, other=0.0)
    b_inverse = tl.where(b_energy < float("inf"), tl.rsqrt(b_energy), float("nan"))
    return tl.where(b_energy < SMALLEST_NORM, 0.0, b_inverse)


@triton.jit
def row_segment(adapter_ptr, offsets_ptr, rows, keep, K, R):
    """Return which columns of u belong to each row's adapter.

    Args:
        adapter_ptr: (N,) int, or None where one adapter serves all rows.
        offsets_ptr: (K + 1,) int, with ``adapter_ptr``.
        rows, keep: the rows, and those that are read.
        K, R: the number of adapters, and of columns of u.

    Returns:
        ``start`` and ``stop``, and whether the adapter of a row exists.
    """
    if adapter_ptr is None:
        start = tl.zeros((1,), tl.int32)
        stop = start + R
        known = start == 0
    else:
        adapter = tl.load(adapter_ptr + rows, mask=keep, other=0).to(tl.int64)
        known = (adapter >= 0) & (adapter < K)
        start = tl.load(offsets_ptr + adapter, mask=keep & known, other=0).to(tl.int32)
        stop = tl.load(offsets_ptr + adapter + 1, mask=keep & known, other=0).to(tl.int32)
        stop = tl.minimum(stop, R)
    return start, stop, known


@triton.jit
def row_gram_product(
    u_ptr,
    u_stride,
    gram_inverse_ptr,
    rows,
    keep,
    b_inverse,
    start,
    stop,
    cols,  # (BLOCK_N or 1, BLOCK_R)
    inside,  # (BLOCK_N or 1, BLOCK_R)
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return v = u/|z| and G v at some columns of u.

    Args:
        u_ptr, u_stride: (N, R), any floating dtype.
        gram_inverse_ptr: G, (R, R) float32, or None for the identity.
        rows, keep, b_inverse: the rows, those that are read, and 1/|z|.
        start, stop: the segment of each row, over which the product with G sums.
        cols, inside: the columns that are wanted, and which of them are in the row's segment.
        R, BLOCK_N, BLOCK_R: sizes.

    Returns:
        Two (BLOCK_N, BLOCK_R) float32 tiles, 0 outside the segment.
    """
    u_rows = u_ptr + rows * u_stride
    b_u = tl.load(u_rows[:, None] + cols, mask=keep[:, None] & inside, other=0.0).to(tl.float32)
    b_u *= b_inverse[:, None]
    if gram_inverse_ptr is None:
        b_h = b_u
    else:
        b_h = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        touched = tl.max(inside.to(tl.int32), 1) > 0
        for j in range(0, tl.max(tl.where(touched, stop - start, 0), 0)):
            k = tl.minimum(start + j, stop - 1)
            b_uk = tl.load(u_rows + k, mask=keep & (start + j < stop), other=0.0).to(tl.float32) * b_inverse
            b_g = tl.load(gram_inverse_ptr + k[:, None] * R + cols, mask=inside, other=0.0)
            b_h += b_uk[:, None] * b_g
    return b_u, b_h


@triton.jit
def row_captured(
    u_ptr,
    u_stride,
    gram_inverse_ptr,
    rows,
    keep,
    b_inverse,
    start,
    stop,
    known,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return q/s = v.(G v) of each row, clamped to [0, 1].

    Args:
        u_ptr, u_stride: (N, R), any floating dtype.
        gram_inverse_ptr: G, (R, R) float32, or None for the identity.
        rows, keep, b_inverse: the rows, those that are read, and 1/|z|.
        start, stop, known: as ``row_segment`` returns them.
        R, BLOCK_N, BLOCK_R: sizes.

    Returns:
        (BLOCK_N,) float32; NaN where the row is not finite or its adapter does not exist.
    """
    b_captured = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, tl.max(stop - start, 0), BLOCK_R):
        cols = (start + first)[:, None] + tl.arange(0, BLOCK_R)[None, :]
        inside = cols < stop[:, None]
        b_u, b_h = row_gram_product(
            u_ptr, u_stride, gram_inverse_ptr, rows, keep, b_inverse, start, stop, cols, inside, R, BLOCK_N, BLOCK_R
        )
        b_captured += tl.sum(b_u * b_h, 1)
    valid = (tl.abs(b_captured) < float("inf")) & (b_inverse == b_inverse) & known
    return tl.where(valid, tl.minimum(tl.maximum(b_captured, 0.0), 1.0), float("nan"))


@triton.jit
def row_weight(weight_ptr, rows, exists):
    """Return the weight of each row, and which rows count.

    Args:
        weight_ptr: (N,) float32, or None for weights of 1.
        rows, exists: the rows of the program.

    Returns:
        ``b_weight`` and ``keep``: the rows that exist with a weight other than 0.
    """
    b_weight = exists.to(tl.float32)
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + rows, mask=exists, other=0.0)
    return b_weight, exists & (b_weight != 0)


@triton.jit
def store_ratio(value_ptr, captured_ptr, b_captured, b_weight, rows, exists, keep, REDUCE: tl.constexpr):
    """Write q/s, and om = sqrt(1 - q/s) for each row or as one weighted sum a program.

    Args:
        value_ptr: (N,) float32, or with REDUCE one element a program.
        captured_ptr: (N,) float32.
        b_captured, b_weight, rows, exists, keep: the rows of the program.
        REDUCE: whether the weighted sum is wanted.
    """
    b_ratio = tl.sqrt(1.0 - b_captured)
    tl.store(captured_ptr + rows, b_captured, mask=exists)
    if REDUCE:
        tl.store(value_ptr + tl.program_id(0), tl.sum(tl.where(keep, b_weight * b_ratio, 0.0), 0))
    else:
        tl.store(value_ptr + rows, b_ratio, mask=exists)


@triton.jit
def row_slope(grad_ptr, grad_stride, b_weight, b_captured, rows, exists):
    """Return g/om of each row, where om counts as at least ``MIN_RATIO``.

    Args:
        grad_ptr, grad_stride: (N,) float32, or one element with stride 0.
        b_weight, b_captured, rows, exists: the rows of the program; g is the gradient times the weight.

    Returns:
        ``b_slope``, (BLOCK_N,) float32.
    """
    b_grad = tl.load(grad_ptr + rows * grad_stride, mask=exists, other=0.0) * b_weight
    b_ratio = tl.sqrt(1.0 - b_captured)
    return b_grad / tl.where(b_ratio < _MIN_RATIO, _MIN_RATIO, b_ratio)  # a maximum would swallow NaN


@triton.jit
def store_du(
    du_ptr,
    u_ptr,
    u_stride,
    gram_inverse_ptr,
    b_slope,
    b_inverse,
    rows,
    exists,
    start,
    stop,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write du = -(g/(om |z|)) G v inside each row's segment and 0 elsewhere, so that every element is written.

    Args:
        du_ptr: (N, R), contiguous.
        u_ptr, u_stride: (N, R), any floating dtype.
        gram_inverse_ptr: G, (R, R) float32, or None for the identity.
        b_slope, b_inverse, rows, exists, start, stop: the rows of the program and their segments.
        R, BLOCK_N, BLOCK_R: sizes.
    """
    keep = exists & (b_slope != 0)
    for first in range(0, R, BLOCK_R):
        cols = (first + tl.arange(0, BLOCK_R))[None, :]
        inside = (cols >= start[:, None]) & (cols < stop[:, None])
        _b_u, b_h = row_gram_product(
            u_ptr, u_stride, gram_inverse_ptr, rows, keep, b_inverse, start, stop, cols, inside, R, BLOCK_N, BLOCK_R
        )
        b_du = tl.where(keep[:, None] & inside, -(b_slope * b_inverse)[:, None] * b_h, 0.0)
        tl.store(
            du_ptr + (rows * R)[:, None] + cols,
            narrow(b_du, du_ptr.dtype.element_ty),
            mask=exists[:, None] & (cols < R),
        )
