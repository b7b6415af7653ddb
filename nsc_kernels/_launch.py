"""Block sizes, warps and grids: pure functions of shape, the same for a launch and for an ahead-of-time compilation."""

from functools import lru_cache
from typing import NamedTuple

TILE = 2048  # elements of a (BLOCK_N, BLOCK_D) tile: 16 a thread; 4096 spills on gfx942
MAX_BLOCK_N = 32
MAX_BLOCK_R = 32
FILL = 132  # programs that a split of d aims at: the multiprocessors of an H100
MIN_SPAN = 256  # columns of d in one part, at least
MIN_PROGRAMS = 256  # enough to occupy every multiprocessor of a large GPU about twice


class RowBlocks(NamedTuple):
    """How a kernel that walks over rows is cut: the constexpr block sizes and the warps of one program."""

    BLOCK_N: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    """The least power of two not below ``n``; 1 for ``n <= 1``."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=1024)
def row_blocks(n: int, d: int, r: int) -> RowBlocks:
    """Cut ``n`` rows of width ``d``, with ``r`` columns of ``u`` beside each, into programs.

    A tile has at most ``TILE`` elements, so that a thread's share stays in registers whatever ``d`` is. Narrow rows are
    taken many at a time, unless that would leave multiprocessors idle; few rows are taken in wider strips instead.
    """
    width = next_power_of_2(d)
    by_width = max(TILE // width, 4)
    by_count = max(next_power_of_2(n // MIN_PROGRAMS + 1) // 2, 1)
    block_n = min(by_width, by_count, MAX_BLOCK_N)
    block_d = min(width, TILE // block_n)
    num_warps = 4 if block_n * block_d >= 1024 else 2
    return RowBlocks(block_n, block_d, min(next_power_of_2(r), MAX_BLOCK_R), num_warps)


def row_programs(n: int, blocks: RowBlocks) -> int:
    """The grid: how many programs cover ``n`` rows. 0 for ``n = 0``, which must not be launched."""
    return -(-n // blocks.BLOCK_N)


class ShrinkBlocks(NamedTuple):
    """Blocks of ``X W'``: BLOCK_N rows of X by BLOCK_R rows of W, summed BLOCK_D at a time."""

    BLOCK_N: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class ExpandBlocks(NamedTuple):
    """Blocks of ``U W``: BLOCK_N rows by BLOCK_M columns, summed over BLOCK_R of the rank at a time."""

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1024)
def shrink_blocks(n: int, d: int, r: int, itemsize: int) -> tuple[ShrinkBlocks, int, int]:
    """Blocks, the number of parts into which d is split, and the columns of each part.

    Chosen so that no target spills (``make aot``). The whole rank goes into one program, in float32 up to 256 of it, so
    that X is read once; W is read once a program, so rows are taken many at a time. Where that leaves multiprocessors
    idle, d is split, never below ``MIN_SPAN`` columns.
    """
    block_r = min(max(next_power_of_2(r), 16), 512 if itemsize == 2 else 256)
    if itemsize == 2:
        most, block_d, num_warps, stages = {512: (32, 32, 8, 2), 256: (32, 64, 8, 2)}.get(block_r, (128, 64, 8, 3))
    else:
        most, block_d, num_warps, stages = {256: (16, 32, 8, 2)}.get(block_r, (32, 16, 4, 3))
    block_n = min(16 if n <= 16 else 64 if n <= 64 else 128, most)
    if block_n * block_r < 2048:
        num_warps = 4
    programs = -(-n // block_n)
    splits = max(min(FILL // max(programs, 1), d // MIN_SPAN), 1)
    span = -(-d // (splits * block_d)) * block_d
    return ShrinkBlocks(block_n, block_d, block_r, num_warps, stages), -(-d // span), span


@lru_cache(maxsize=1024)
def expand_blocks(n: int, m: int, r: int, itemsize: int) -> ExpandBlocks:
    """Blocks for n rows, m columns and rank r; chosen so that no target spills (``make aot``)."""
    block_n, block_m = (16 if n <= 16 else 64), min(max(next_power_of_2(m), 16), 128)
    if r % 16:  # rows of u are then not aligned, and loading them takes registers
        block_m = min(block_m, 64)
    block_r, num_warps = (32, 4) if itemsize == 2 else (16, 8)
    return ExpandBlocks(block_n, block_m, min(max(next_power_of_2(r), 16), block_r), num_warps, 2)
