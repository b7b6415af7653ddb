"""Device fragments that every kernel may use, and the one place that knows whether Triton is installed."""

# mypy: disable-error-code="no-untyped-def"

import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # the kernels are then plain functions that nobody calls
    HAS_TRITON = False
    triton = SimpleNamespace(jit=lambda fn=None, **_: fn if fn is not None else lambda inner: inner)
    tl = SimpleNamespace(constexpr=lambda value: value)

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def program_rows(N, BLOCK_N: tl.constexpr):
    """Return the rows of this program and which of them exist.

    Args:
        N: the number of rows in all.
        BLOCK_N: the number of rows a program.

    Returns:
        (BLOCK_N,) int64, since row times stride passes 2^31, and (BLOCK_N,) bool: whether each is below N.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, rows < N


@triton.jit
def tile_dot(b_x, b_w, b_sum):
    """Return ``b_sum + b_x b_w`` in float32, with full float32 products (no TF32).

    Triton's interpreter multiplies the bits of bfloat16, so there both tiles are converted to float32 first.

    Args:
        b_x: (BLOCK_N, BLOCK) tile, any floating dtype.
        b_w: (BLOCK, BLOCK_M) tile, in the dtype of ``b_x``.
        b_sum: (BLOCK_N, BLOCK_M) float32.

    Returns:
        (BLOCK_N, BLOCK_M) float32.
    """
    if _INTERPRET:
        return tl.dot(b_x.to(tl.float32), b_w.to(tl.float32), b_sum)
    else:
        return tl.dot(b_x, b_w, b_sum, input_precision="ieee")


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """Return a tile in another dtype, rounded to nearest even.

    Triton's interpreter truncates to bfloat16, and makes numbers of its own of subnormal ones, so there the bits are
    rounded as integers.

    Args:
        b_x: a tile of any shape.
        dtype: the dtype of the result.

    Returns:
        The tile in ``dtype``.
    """
    if _INTERPRET and dtype == tl.bfloat16:
        b_wide = b_x.to(tl.float32)
        bits = b_wide.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(b_wide == b_wide, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)
