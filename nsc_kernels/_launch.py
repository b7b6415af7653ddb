"""Block sizes, warps and grids: pure functions of shape, the same for a launch and for an ahead-of-time compilation."""

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


def shrink_blocks(n: int, d: int, r: int, itemsize: int) -> tuple[ShrinkBlocks, int, int]:
    """Blocks, the number of parts into which d is split, and the columns of each part.

    The whole rank up to 512 goes into one program, so that X is read once. W is read once a program: rows are taken
    many at a time. Where that leaves multiprocessors idle, d is split, never below ``MIN_SPAN`` columns.
    """
    block_r = min(max(next_power_of_2(r), 16), 512)
    block_n = min(max(next_power_of_2(n), 16), max(16384 // block_r, 32) // (itemsize // 2), 128)
    block_d = 64 if block_r <= 128 else 32
    if itemsize == 4:
        block_d //= 2
    num_warps = 8 if block_n * block_r >= 16384 // (itemsize // 2) else 4
    programs = -(-n // block_n)
    splits = max(min(FILL // max(programs, 1), d // MIN_SPAN), 1)
    span = -(-d // (splits * block_d)) * block_d
    return ShrinkBlocks(block_n, block_d, block_r, num_warps, 3), -(-d // span), span


def expand_blocks(n: int, m: int, r: int, itemsize: int) -> ExpandBlocks:
    """Blocks for n rows, m columns and rank r."""
    block_n = min(max(next_power_of_2(n), 16), 128 // (itemsize // 2))
    block_m = min(max(next_power_of_2(m), 16), 128)
    block_r = min(max(next_power_of_2(r), 16), 32)
    num_warps = 8 if block_n * block_m >= 16384 else 4
    return ExpandBlocks(block_n, block_m, block_r, num_warps, 2)
