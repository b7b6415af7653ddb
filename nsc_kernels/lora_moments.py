"""Second moments of the down-projected rows of each task: what a merge by regression needs of the data.

    u = z A^T    s = z.z    M_k = sum over rows i of task k of  w_i u_i u_i^T    C_k = the same of  w_i v_i u_i^T

v is u of the same rows in another run. u and s come from the one pass over z that ``lora_down`` makes; the moments from
u, which is narrow. It is a statistic: there is no gradient.

Paper: https://arxiv.org/abs/2606.10617 (SSR).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsc_kernels._launch import moment_blocks
from nsc_kernels._op import Launch, Op, fresh
from nsc_kernels._rows import accumulator_dtype, expect, row_operands, shaped, unit_stride
from nsc_kernels._skinny import plan_shrink, run_all
from nsc_kernels._tl import narrow, tile_dot, tl, triton
from nsc_kernels.lora_down import lora_down_reference

SUM_BLOCKS = {"BLOCK_P": 8, "BLOCK_E": 128, "num_warps": 4}


class Moments(NamedTuple):
    """What ``lora_moments`` returns, for K tasks and R columns of u.

    Attributes:
        u: (..., R) the down-projected rows, in the dtype of z.
        energy: (...,) ``|z|^2`` of each row, in ``accumulator_dtype``.
        second: (K, R, R) float64, symmetric: the sums of w u u'.
        cross: (K, R, R) float64, the sums of w v u', or None without ``other``.
    """

    u: Tensor
    energy: Tensor
    second: Tensor
    cross: Tensor | None


def lora_moments_reference(
    z: Tensor,  # (n, d)
    lora_A: Tensor,  # (R, d)
    task: Tensor | None,  # (n,)
    weight: Tensor | None,  # (n,)
    other: Tensor | None,  # (n, R)
    tasks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``lora_moments`` of flat rows in plain torch; each task costs a product over all rows.

    Args:
        z, lora_A: as ``lora_down_reference`` takes them.
        task: int, or None where all rows are of task 0.
        weight: in ``accumulator_dtype``, or None for 1.
        other: v, any floating dtype, or None.
        tasks: K.

    Returns:
        u, energy, and the moments (K, R, R) in float64: second, and cross, which is empty without ``other``.
    """
    u, energy = lora_down_reference(z, lora_A, True)
    share = _shares(u, task, weight, tasks)
    second = _weighted_products(u, u, share).tril()
    cross = second.new_empty(0) if other is None else _weighted_products(other, u, share)
    return u, energy, second + second.tril(-1).mT, cross


def _shares(u: Tensor, task: Tensor | None, weight: Tensor | None, tasks: int) -> Tensor:
    """Return (K, n) float64: the weight of each row in each task, NaN in all of them where its task does not exist."""
    weight = u.new_ones(u.shape[0], dtype=torch.float64) if weight is None else weight.double()
    task = torch.zeros_like(weight, dtype=torch.int64) if task is None else task
    known = (task >= 0) & (task < tasks)
    weight = torch.where(known | (weight == 0), weight, math.nan)
    own = task == torch.arange(tasks, device=u.device)[:, None]
    return torch.where(own | ~known, weight, 0.0)


def _weighted_products(left: Tensor, right: Tensor, share: Tensor) -> Tensor:
    products = []
    for weight in share.unbind(0):
        kept = (weight != 0)[:, None]
        weighted = torch.where(kept, right.double() * weight[:, None], 0.0)
        products.append(torch.where(kept, left.double(), 0.0).T @ weighted)
    return torch.stack(products)


@triton.jit
def row_share(task_ptr, weight_ptr, rows, N, task, K):  # type: ignore[no-untyped-def]
    """Return the weight of some rows in a task: 0 for rows of another, NaN for those whose task does not exist.

    Args:
        task_ptr, weight_ptr: (N,) int and (N,) float32, or None.
        rows: (BLOCK,) int64, also beyond N.
        N, task, K: rows in all, the task, and how many there are.

    Returns:
        (BLOCK,) float32, 0 for a row that does not count.
    """
    counts = rows < N
    b_share = tl.where(counts, 1.0, 0.0)
    if weight_ptr is not None:
        b_share = tl.load(weight_ptr + rows, mask=counts, other=0.0)
        counts = counts & (b_share != 0)
    if task_ptr is not None:
        b_task = tl.load(task_ptr + rows, mask=counts, other=task)
        b_share = tl.where(b_task == task, b_share, 0.0)
        b_share = tl.where((b_task < 0) | (b_task >= K), float("nan"), b_share)
    else:
        b_share = tl.where(task == 0, b_share, 0.0)
    return b_share


@triton.jit(do_not_specialize=["N"])
def moments_kernel(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    task_ptr,
    weight_ptr,
    parts_ptr,
    N,
    R,
    K,
    SPAN,
    left_stride,
    right_stride,
    SYMMETRIC: tl.constexpr,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write one tile of the sum of w v u' over the rows of one task in one part of N.

    The grid is (tiles of R by R, K, parts of N). Sums are float32 within CHUNK rows, and float64 over these. A chunk
    without a row of the task is passed over.

    Args:
        left_ptr, right_ptr: v and u, (N, R), any floating dtype but float64.
        task_ptr, weight_ptr: (N,) int and (N,) float32, or None.
        parts_ptr: (parts, K, R, R) float64.
        N, R, K, CHUNK, BLOCK_N, BLOCK_R: sizes.
        SPAN: rows of a part, a multiple of CHUNK.
        left_stride, right_stride: strides of rows in elements.
        SYMMETRIC: whether v is u, and tiles above the diagonal are left out.
        PIECES: terms into which w u is split, in the dtype of v; 0 for products in float32.
    """
    tiles = tl.cdiv(R, BLOCK_R)
    row_tile, column_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if SYMMETRIC and column_tile > row_tile:
        return
    task, part = tl.program_id(1), tl.program_id(2)
    left, right = row_tile * BLOCK_R + tl.arange(0, BLOCK_R), column_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    b_total = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    rows = tl.arange(0, BLOCK_N)
    start = part.to(tl.int64) * SPAN
    for first in range(start, tl.minimum(start + SPAN, N), CHUNK):
        b_chunk = row_share(task_ptr, weight_ptr, first + tl.arange(0, CHUNK), N, task, K)
        if tl.max((b_chunk != 0).to(tl.int32), 0) > 0:
            b_sum = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
            for inner in range(first, tl.minimum(first + CHUNK, N), BLOCK_N):
                b_share = row_share(task_ptr, weight_ptr, inner + rows, N, task, K)
                counts = b_share != 0
                b_left = tl.load(
                    left_ptr + inner * left_stride + (rows * left_stride)[None, :] + left[:, None],
                    mask=counts[None, :] & (left < R)[:, None],
                    other=0.0,
                )
                b_right = tl.load(
                    right_ptr + inner * right_stride + (rows * right_stride)[:, None] + right[None, :],
                    mask=counts[:, None] & (right < R)[None, :],
                    other=0.0,
                )
                b_rest = b_right.to(tl.float32) * b_share[:, None]
                if PIECES == 0:
                    b_sum = tile_dot(b_left.to(tl.float32), b_rest, b_sum)
                for _ in tl.static_range(PIECES):
                    b_piece = narrow(b_rest, b_left.dtype)
                    b_sum = tile_dot(b_left, b_piece, b_sum)
                    b_rest -= b_piece.to(tl.float32)
            b_total += b_sum.to(tl.float64)
    entries = ((part.to(tl.int64) * K + task) * R + left)[:, None] * R + right[None, :]
    tl.store(parts_ptr + entries, b_total, mask=(left < R)[:, None] & (right < R)[None, :])


@triton.jit(do_not_specialize=["PARTS"])
def sum_moments_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, out_ptr, R, K, PARTS, SYMMETRIC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Add up the parts that ``moments_kernel`` wrote, in a fixed order.

    The grid is (blocks of R * R entries, K).

    Args:
        parts_ptr, out_ptr: (PARTS, K, R, R) and (K, R, R) float64.
        R, K, PARTS, BLOCK_P, BLOCK_E: sizes.
        SYMMETRIC: whether only entries on and below the diagonal were written.
    """
    entries = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row, column = entries // R, entries % R
    if SYMMETRIC:
        row, column = tl.maximum(row, column), tl.minimum(row, column)
    exists = entries < R * R
    task = tl.program_id(1).to(tl.int64)
    b_sum = tl.zeros((BLOCK_E,), tl.float64)
    for first in range(0, PARTS, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        places = ((parts * K + task) * R)[:, None] * R + (row * R + column)[None, :]
        mask = (parts < PARTS)[:, None] & exists[None, :]
        b_sum += tl.sum(tl.load(parts_ptr + places, mask=mask, other=0.0), 0)
    tl.store(out_ptr + task * (R * R) + entries, b_sum, mask=exists)


def plan_moments(
    left: Tensor | None,  # (n, R)
    u: Tensor,  # (n, R)
    task: Tensor | None,  # (n,)
    weight: Tensor | None,  # (n,)
    tasks: int,
) -> tuple[list[Launch], Tensor]:
    """Prepare the launches that sum w v u' over the rows of each task; also with meta tensors.

    Args:
        left: v, or None where it is u.
        u, task, weight, tasks: as the reference has them.

    Returns:
        Two launches, and the (K, R, R) float64 tensor that they fill.
    """
    symmetric, (n, r) = left is None, u.shape
    right = unit_stride(u)
    left = right if left is None else unit_stride(left)
    pieces = _pieces(left, right, weight)
    blocks, parts, span = moment_blocks(n, r, tasks, right.element_size() if pieces else 4)
    sums = fresh(u, (parts, tasks, r, r), torch.float64)
    out = fresh(u, (tasks, r, r), torch.float64)
    task, weight = (None if x is None else x.contiguous() for x in (task, weight))
    args: dict[str, Any] = {"left_ptr": left, "right_ptr": right, "task_ptr": task, "weight_ptr": weight}
    args |= {"parts_ptr": sums, "N": n, "R": r, "K": tasks, "SPAN": span}
    args |= {"left_stride": left.stride(0), "right_stride": right.stride(0)}
    settings = blocks._asdict() | {"SYMMETRIC": symmetric, "PIECES": pieces}
    grid = ((-(-r // blocks.BLOCK_R)) ** 2, tasks, parts)
    total = {"parts_ptr": sums, "out_ptr": out, "R": r, "K": tasks, "PARTS": parts}
    total_grid = (-(-r * r // SUM_BLOCKS["BLOCK_E"]), tasks)
    launches = [
        Launch(moments_kernel, grid, args, settings),
        Launch(sum_moments_kernel, total_grid, total, SUM_BLOCKS | {"SYMMETRIC": symmetric}),
    ]
    return launches, out


def _pieces(left: Tensor, right: Tensor, weight: Tensor | None) -> int:
    """Return how many terms in the dtype of v and u add up to w u exactly; 0 where products must be in float32.

    A float32 number is the sum of three of bfloat16, so that matrix units multiply weighted rows without rounding them.
    """
    if left.dtype != right.dtype or right.dtype == torch.float32:
        return 0
    if weight is None:
        return 1
    return 3 if right.dtype == torch.bfloat16 else 0


def _launch(
    z: Tensor, lora_A: Tensor, task: Tensor | None, weight: Tensor | None, other: Tensor | None, tasks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launches, (u, energy, _) = plan_shrink(z, lora_A, energy=True)
    of_second, second = plan_moments(None, u, task, weight, tasks)
    launches += of_second
    cross = fresh(u, 0, torch.float64)
    if other is not None:
        of_cross, cross = plan_moments(other, u, task, weight, tasks)
        launches += of_cross
    run_all(launches)
    return u, energy, second, cross


_forward_op = Op("nsc::lora_moments", lora_moments_reference, _launch)


def lora_moments(
    z: Tensor,  # (..., d)
    lora_A: Tensor,  # (R, d)
    *,
    task: Tensor | None = None,  # (...,) int
    tasks: int = 1,
    weight: Tensor | None = None,  # (...,)
    other: Tensor | None = None,  # (..., R)
) -> Moments:
    """Return u and energy as ``lora_down`` does, and for each task the second moments of u, from one pass over z.

    The moments are sums, so those of batches add up. Results are constants to autograd, forward and backward: nothing
    is kept for a gradient, none flows to any argument, and a backward from the results alone is a RuntimeError.

    Args:
        z: (..., d) rows that enter the linear layer; float64, float32, bfloat16 or float16.
        lora_A: (R, d) the adapters' down-projections, stacked, in z's dtype. Under autocast both are cast as by
            ``F.linear``, and all results are those of the cast rows.
        task: (...,) int, the task of each row, from 0 to ``tasks - 1``; None means that all rows are of task 0. A row
            of another task turns the moments of every task into NaN. Rows may lie in any order; it is fastest where
            those of a task lie together.
        tasks: K, how many tasks there are; one without rows has moments of 0.
        weight: (...,) weight of each row in the sums, any floating dtype; None means 1. A row of weight 0 does not
            count, whatever its z, its task and its ``other`` hold.
        other: (..., R) v, which is u of the same rows in another run, any floating dtype; None if no cross moments are
            wanted.

    Returns:
        ``Moments``: u (..., R) in z's dtype, rounded from float32; the energy (...,) in float32 (float64 for float64);
        second (K, R, R) and cross (K, R, R) or None, of u as it is returned, both float64: sums in float32 over at
        most 128 rows, added up in float64 in an order that depends on the shapes alone, so that runs do not differ.
        Without Triton, and where an argument is float64, the moments are summed in float64 throughout.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or ``tasks`` is below 1.

    Example:
        >>> z, A = torch.randn(32, 64), torch.randn(8, 64)
        >>> moments = lora_moments(z, A, task=torch.arange(32) % 2, tasks=2)
        >>> moments.second.shape  # of each task, with moments.u (32, 8) and moments.energy (32,)
        torch.Size([2, 8, 8])

    Source: https://arxiv.org/abs/2606.10617.
    """
    z, lora_A = row_operands(z.detach(), lora_A.detach())
    rows, r = z.shape[:-1], lora_A.shape[0]
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}; give the number of tasks that rows may belong to")
    if task is not None:
        expect("task", task, rows, "one task for each row of z", z, integer=True)
    if weight is not None:
        expect("weight", weight, rows, "one weight for each row of z", z)
        weight = weight.detach().to(accumulator_dtype(z)).reshape(-1)
    if other is not None:
        expect("other", other, (*rows, r), "u of the same rows, one column for each row of lora_A", z)
        other = other.detach().reshape(math.prod(rows), r)
    flat = (shaped(z, (math.prod(rows), z.shape[-1])), lora_A, None if task is None else task.reshape(-1))
    u, energy, second, cross = _forward_op(*flat, weight, other, tasks)
    return Moments(shaped(u, (*rows, r)), shaped(energy, rows), second, None if other is None else cross)
