"""Device fragments that several kernels share, and the one place that knows whether Triton is installed.

Rows of a program: ``rows`` (BLOCK_N,) int64, ``keep`` (BLOCK_N,) which of them count. Segments: ``start`` and ``stop``
are (BLOCK_N,) where every row has its own adapter and (1,) where all share one; everything broadcasts over that.
"""

# mypy: disable-error-code="no-untyped-def"

import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # the kernels below are then plain functions that nobody calls
    HAS_TRITON = False
    triton = SimpleNamespace(jit=lambda fn=None, **_: fn if fn is not None else lambda inner: inner)
    tl = SimpleNamespace(constexpr=lambda value: value)

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRET = tl.constexpr(INTERPRET)
SMALLEST_NORM = tl.constexpr(2.0**-126)  # float32's smallest normal number; its inverse is still one
LARGEST_NORM = tl.constexpr(2.0**126)
MIN_RATIO = 1e-4  # gradients of a ratio divide by at least this
_MIN_RATIO = tl.constexpr(MIN_RATIO)
SMALL_ENERGY = tl.constexpr(2.0**-80)  # outside these the squares of a row under- or overflow float32
LARGE_ENERGY = tl.constexpr(2.0**120)
RESCALE = tl.constexpr(2.0**80)


@triton.jit
def program_rows(N, BLOCK_N: tl.constexpr):
    """The rows of this program in int64, since row times stride passes 2^31, and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, rows < N


@triton.jit
def row_energy(z_ptr, z_stride, rows, keep, b_scale, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_N,) float32: the sum of (scale z)^2 over each row."""
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
    """(BLOCK_N,) float32: 1/|z|; 0 for a zero row, NaN for one that is not finite. Reads twice only if squares fail."""
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
    """(BLOCK_N,) float32: 1/|z| from |z|^2; 0 for a zero row and one that does not count, NaN for one not finite."""
    b_energy = tl.load(energy_ptr + rows, mask=keep, other=0.0)
    b_inverse = tl.where(b_energy < float("inf"), tl.rsqrt(b_energy), float("nan"))
    return tl.where(b_energy < SMALLEST_NORM, 0.0, b_inverse)


@triton.jit
def row_segment(adapter_ptr, offsets_ptr, rows, keep, K, R):
    """First and past-the-last column of each row's adapter, and whether there is such an adapter."""
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
    b_inverse,  # (BLOCK_N,): 1/|z|
    start,
    stop,
    cols,  # (BLOCK_N or 1, BLOCK_R): columns of u
    inside,  # (BLOCK_N or 1, BLOCK_R): which of them are in the row's segment
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(BLOCK_N, BLOCK_R) u/|z| and G u/|z| at ``cols``, 0 outside; without a Gram inverse G is the identity."""
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
    u_ptr, u_stride, gram_inverse_ptr, rows, keep, b_inverse, start, stop, known, R,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N,) q/s = v.(G v), clamped to [0, 1]; NaN where the row is not finite or has no such adapter."""
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
    """(BLOCK_N,) weights, 1 without any; which rows count: those whose weight is not 0."""
    b_weight = exists.to(tl.float32)
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + rows, mask=exists, other=0.0)
    return b_weight, exists & (b_weight != 0)


@triton.jit
def store_ratio(value_ptr, captured_ptr, b_captured, b_weight, rows, exists, keep, REDUCE: tl.constexpr):
    """captured, and sqrt(1 - captured): a value a row, or one weighted sum a program."""
    b_ratio = tl.sqrt(1.0 - b_captured)
    tl.store(captured_ptr + rows, b_captured, mask=exists)
    if REDUCE:
        tl.store(value_ptr + tl.program_id(0), tl.sum(tl.where(keep, b_weight * b_ratio, 0.0), 0))
    else:
        tl.store(value_ptr + rows, b_ratio, mask=exists)


@triton.jit
def row_slope(grad_ptr, grad_stride, b_weight, b_captured, rows, exists):
    """(BLOCK_N,): g/om, held below ``MIN_RATIO``."""
    b_grad = tl.load(grad_ptr + rows * grad_stride, mask=exists, other=0.0) * b_weight
    b_ratio = tl.sqrt(1.0 - b_captured)
    return b_grad / tl.where(b_ratio < _MIN_RATIO, _MIN_RATIO, b_ratio)  # a maximum would swallow NaN


@triton.jit
def store_du(
    du_ptr, u_ptr, u_stride, gram_inverse_ptr, b_slope, b_inverse, rows, exists, start, stop, R,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """du = -(g/(om |z|)) G v inside the row's segment, 0 elsewhere; every element is written."""
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


@triton.jit
def tile_dot(b_x, b_w, b_sum):
    """b_sum + b_x b_w in float32. Triton's interpreter multiplies the bits of bfloat16, so there it gets float32."""
    if _INTERPRET:
        return tl.dot(b_x.to(tl.float32), b_w.to(tl.float32), b_sum)
    else:
        return tl.dot(b_x, b_w, b_sum, input_precision="ieee")


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """``b_x`` in ``dtype``, rounded to nearest even; Triton's interpreter cuts bfloat16 off, so it is rounded first."""
    if _INTERPRET and dtype == tl.bfloat16:
        bits = b_x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        b_x = tl.where(b_x == b_x, rounded, b_x)
    return b_x.to(dtype)
