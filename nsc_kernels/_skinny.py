"""The two products that every LoRA op is made of: one side is the rank, so both are bound by the wide operand's bytes.

    shrink   V = X W'                     X (n, d), W (R, d)               lora_down; backward of lora_up, lora_fold
             |x|^2 of each row, or c * V and the sum over rows of U * V, in the same pass over X
    expand   Y + (U * c) W + 2 e * Z      Y, Z (n, m), U (n, R), W (R, m)  lora_up, lora_fold; backward of lora_down

W may be a transposed view. Sums are float32; where there are few rows ``shrink`` splits d and a second kernel adds the
parts in a fixed order, so results do not change from run to run.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_kernels._launch import expand_blocks, shrink_blocks
from nsc_kernels._op import Launch, fresh
from nsc_kernels._rows import unit_stride
from nsc_kernels._tl import narrow, program_rows, tile_dot, tl, triton


@triton.jit(do_not_specialize=["N"])
def shrink_kernel(
    x_ptr,
    w_ptr,
    c_ptr,
    u_ptr,
    out_ptr,
    energy_ptr,
    dc_ptr,
    N,
    D,
    R,
    SPAN,
    x_stride,
    w_stride,
    w_step,
    u_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write V = X W' or c * V over one part of d, with |x|^2 and the sum over rows of U * V where they are wanted.

    The grid is (blocks of N, parts of d, blocks of R).

    Args:
        x_ptr, w_ptr: (N, D) and (R, D), any floating dtype but float64.
        c_ptr: (R,) float32, or None for V itself.
        u_ptr: (N, R), or None.
        out_ptr: (parts, N, R), or None.
        energy_ptr: (parts, N) float32, or None.
        dc_ptr: (blocks of N, parts, R) float32, or None: the sums of U * V over the rows of each block.
        N, D, R, BLOCK_N, BLOCK_D, BLOCK_R: sizes.
        SPAN: columns of a part.
        x_stride, w_stride, w_step, u_stride: strides of rows, and of W's columns, in elements.
    """
    rows, exists = program_rows(N, BLOCK_N)
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rank = (r < R)[None, :]
    b_v = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    b_energy = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(split * SPAN, tl.minimum(split * SPAN + SPAN, D), BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_row = cols < D
        b_x = tl.load(
            x_ptr + (rows * x_stride)[:, None] + cols[None, :], mask=exists[:, None] & in_row[None, :], other=0.0
        )
        b_w = tl.load(
            w_ptr + (r * w_stride)[None, :] + (cols * w_step)[:, None], mask=in_rank & in_row[:, None], other=0.0
        )
        b_v = tile_dot(b_x, b_w, b_v)
        if energy_ptr is not None:
            b_x = b_x.to(tl.float32)
            b_energy += tl.sum(b_x * b_x, 1)
    part = split * N + rows  # int64
    mask = exists[:, None] & in_rank
    if dc_ptr is not None:
        b_u = tl.load(u_ptr + (rows * u_stride)[:, None] + r[None, :], mask=mask, other=0.0).to(tl.float32)
        b_dc = tl.sum(tl.where(mask, b_u * b_v, 0.0), 0)
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split
        tl.store(dc_ptr + program * R + r, b_dc, mask=r < R)
    if out_ptr is not None:
        if c_ptr is not None:
            b_v *= tl.load(c_ptr + r, mask=r < R, other=0.0)[None, :]
        tl.store(out_ptr + (part * R)[:, None] + r[None, :], narrow(b_v, out_ptr.dtype.element_ty), mask=mask)
    if energy_ptr is not None:  # noqa: SIM102
        if tl.program_id(2) == 0:
            tl.store(energy_ptr + part, b_energy, mask=exists)


@triton.jit(do_not_specialize=["N", "SPLITS"])
def sum_parts_kernel(
    parts_ptr, energies_ptr, out_ptr, energy_ptr, N, R, SPLITS, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Add up the parts that ``shrink_kernel`` wrote, in a fixed order.

    The grid is (blocks of N, blocks of R).

    Args:
        parts_ptr: (SPLITS, N, R) float32.
        energies_ptr: (SPLITS, N) float32, with ``energy_ptr``.
        out_ptr: (N, R).
        energy_ptr: (N,) float32, or None.
        N, R, SPLITS, BLOCK_N, BLOCK_R: sizes.
    """
    rows, exists = program_rows(N, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = exists[:, None] & (r < R)[None, :]
    b_sum = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    b_energy = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(0, SPLITS):
        part = split * N + rows
        b_sum += tl.load(parts_ptr + (part * R)[:, None] + r[None, :], mask=mask, other=0.0)
        if energy_ptr is not None:
            b_energy += tl.load(energies_ptr + part, mask=exists, other=0.0)
    tl.store(out_ptr + (rows * R)[:, None] + r[None, :], narrow(b_sum, out_ptr.dtype.element_ty), mask=mask)
    if energy_ptr is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(energy_ptr + rows, b_energy, mask=exists)


@triton.jit(do_not_specialize=["N"])
def expand_kernel(
    y_ptr,
    u_ptr,
    c_ptr,
    w_ptr,
    z_ptr,
    e_ptr,
    out_ptr,
    N,
    R,
    M,
    y_stride,
    u_stride,
    w_stride,
    w_step,
    z_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write every element of Y + (U * c) W + 2 e * Z.

    The grid is (blocks of N, blocks of M). The wide tiles are loaded first, so that the program waits for them once.

    Args:
        y_ptr: (N, M), or None for 0.
        u_ptr, w_ptr: (N, R) and (R, M), any floating dtype but float64.
        c_ptr: (R,) float32, or None for 1.
        z_ptr, e_ptr: (N, M) and (N,) float32, or both None; rows of Z where e is 0 are not read.
        out_ptr: (N, M).
        N, R, M, BLOCK_N, BLOCK_M, BLOCK_R: sizes.
        y_stride, u_stride, w_stride, w_step, z_stride, out_stride: strides of rows, and of W's columns, in elements.
    """
    rows, exists = program_rows(N, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = cols < M
    mask = exists[:, None] & in_row[None, :]
    b_out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if y_ptr is not None:
        b_out += tl.load(y_ptr + (rows * y_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if e_ptr is not None:
        b_e = 2.0 * tl.load(e_ptr + rows, mask=exists, other=0.0)
        b_z = tl.load(z_ptr + (rows * z_stride)[:, None] + cols[None, :], mask=mask & (b_e != 0)[:, None], other=0.0)
        b_out += b_e[:, None] * b_z.to(tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        in_rank = r < R
        b_u = tl.load(
            u_ptr + (rows * u_stride)[:, None] + r[None, :], mask=exists[:, None] & in_rank[None, :], other=0.0
        )
        if c_ptr is not None:
            b_c = tl.load(c_ptr + r, mask=in_rank, other=0.0)
            b_u = narrow(b_u.to(tl.float32) * b_c[None, :], b_u.dtype)
        b_w = tl.load(
            w_ptr + (r * w_stride)[:, None] + (cols * w_step)[None, :],
            mask=in_rank[:, None] & in_row[None, :],
            other=0.0,
        )
        b_out = tile_dot(b_u, b_w, b_out)
    tl.store(out_ptr + (rows * out_stride)[:, None] + cols[None, :], narrow(b_out, out_ptr.dtype.element_ty), mask=mask)


def plan_shrink(
    x: Tensor,  # (n, d)
    w: Tensor,  # (R, d)
    u: Tensor | None = None,  # (n, R): sum over rows of u * v is wanted
    c: Tensor | None = None,  # (R,) float32
    *,
    values: bool = True,
    energy: bool = False,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor | None]]:
    """Prepare the launches of ``shrink``; with meta tensors, for a compilation ahead of time.

    Args:
        x, w: the factors of V = X W', any strides.
        u: given if the sum over rows of U * V is wanted.
        c: given if c * V is wanted instead of V.
        values: whether V or c * V is wanted at all.
        energy: whether ``|x|^2`` is wanted.

    Returns:
        The launches, one or two, and what they fill: V or c * V (n, R) in the dtype of ``x``, ``|x|^2`` (n,) float32,
        each empty if it is not wanted, and None or (parts, R) float32, which add up to the sum of U * V.
    """
    x, (n, d), r = unit_stride(x), x.shape, w.shape[0]
    blocks, splits, span = shrink_blocks(n, d, r, x.element_size())
    grid = (-(-n // blocks.BLOCK_N), splits, max(-(-r // blocks.BLOCK_R), 1))
    out = fresh(x, (n, r) if values else (0, r))
    row_energy = fresh(x, n if energy else 0, torch.float32)
    dc = None if u is None else fresh(x, (grid[0] * splits, r), torch.float32)
    split = splits > 1
    parts = fresh(x, (splits, n, r), torch.float32) if split and values else out
    energies = fresh(x, (splits, n), torch.float32) if split and energy else row_energy
    args: dict[str, Any] = {"x_ptr": x, "w_ptr": w, "c_ptr": c, "u_ptr": u, "out_ptr": parts if values else None}
    args |= {"energy_ptr": energies if energy else None, "dc_ptr": dc}
    args |= {"N": n, "D": d, "R": r, "SPAN": span, "x_stride": x.stride(0), "w_stride": w.stride(0)}
    args |= {"w_step": w.stride(1), "u_stride": 0 if u is None else u.stride(0)}
    launches = [Launch(shrink_kernel, grid, args, blocks._asdict())]
    if split and values:
        launches.append(_plan_sum(parts, energies if energy else None, out, row_energy))
    return launches, (out, row_energy, dc)


def _plan_sum(parts: Tensor, energies: Tensor | None, out: Tensor, row_energy: Tensor) -> Launch:
    splits, n, r = parts.shape
    settings = {"BLOCK_N": 4, "BLOCK_R": 128, "num_warps": 4}
    grid = (-(-n // settings["BLOCK_N"]), max(-(-r // settings["BLOCK_R"]), 1))
    args: dict[str, Any] = {"parts_ptr": parts, "energies_ptr": energies, "out_ptr": out, "N": n, "R": r}
    args |= {"SPLITS": splits, "energy_ptr": None if energies is None else row_energy}
    return Launch(sum_parts_kernel, grid, args, settings)


def plan_expand(
    y: Tensor | None,  # (n, m)
    u: Tensor,  # (n, R)
    w: Tensor,  # (R, m)
    c: Tensor | None = None,  # (R,) float32
    e: Tensor | None = None,  # (n,) float32
    z: Tensor | None = None,  # (n, m), with e
    out: Tensor | None = None,  # (n, m), unit stride along m
) -> tuple[list[Launch], Tensor]:
    """Prepare the launch of ``expand``; with meta tensors, for a compilation ahead of time.

    Args:
        y: added to the product, or None.
        u, w: the factors, any strides.
        c: weights of the columns of u, or None for 1.
        e, z: given together, to add 2 e z.
        out: a buffer to fill, or None for a new tensor.

    Returns:
        The launch, in a list, and the (n, m) tensor that it fills, in the dtype of ``w`` or of ``out``.
    """
    u, (n, r), m = unit_stride(u), u.shape, w.shape[1]
    y, z = (None if x is None else unit_stride(x) for x in (y, z))
    out = fresh(w, (n, m)) if out is None else out
    blocks = expand_blocks(n, m, r, w.element_size())
    args: dict[str, Any] = {"y_ptr": y, "u_ptr": u, "c_ptr": c, "w_ptr": w, "z_ptr": z, "e_ptr": e, "out_ptr": out}
    args |= {"N": n, "R": r, "M": m, "y_stride": 0 if y is None else y.stride(0), "u_stride": u.stride(0)}
    args |= {"w_stride": w.stride(0), "w_step": w.stride(1), "z_stride": 0 if z is None else z.stride(0)}
    args |= {"out_stride": out.stride(0)}
    grid = (-(-n // blocks.BLOCK_N), -(-m // blocks.BLOCK_M))
    return [Launch(expand_kernel, grid, args, blocks._asdict())], out


def expand(*args: Any, **kwargs: Any) -> Tensor:
    """Compute y + (u * c) w + 2 e z by ``expand_kernel``.

    Args:
        args, kwargs: as ``plan_expand`` takes them.

    Returns:
        (n, m), in ``out`` or a new tensor.
    """
    launches, out = plan_expand(*args, **kwargs)
    run_all(launches)
    return out


def run_all(launches: Sequence[Launch]) -> None:
    """Run launches one after the other, on the current stream.

    Args:
        launches: as ``plan_shrink`` and ``plan_expand`` return them.
    """
    for launch in launches:
        launch.run()
