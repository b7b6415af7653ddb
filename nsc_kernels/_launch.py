"""Block sizes, warps and grids: pure functions of shape, the same for a launch and for an ahead-of-time compilation."""

from typing import NamedTuple

TILE = 2048  # elements of a (BLOCK_N, BLOCK_D) tile: 16 a thread; 4096 spills on gfx942
MAX_BLOCK_N = 32
MAX_BLOCK_R = 32
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
