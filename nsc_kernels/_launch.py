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
    """How a kernel that walks over rows is cut into programs.

    Attributes:
        BLOCK_N: rows of a program.
        BLOCK_D: columns of z that it reads at a time.
        BLOCK_R: columns of u that it reads at a time.
        num_warps: warps of a program.
    """

    BLOCK_N: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below ``n``.

    Args:
        n: any integer.

    Returns:
        1 for ``n <= 1``.
    """
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=1024)
def row_blocks(n: int, d: int, r: int) -> RowBlocks:
    """Cut rows into programs.

    A tile has at most ``TILE`` elements, so that a thread's share stays in registers whatever ``d`` is. Narrow rows are
    taken many at a time, unless that would leave multiprocessors idle; few rows are taken in wider strips instead.

    Args:
        n: rows.
        d: their width.
        r: columns of u beside each row.

    Returns:
        The blocks, the same for every call with these sizes.
    """
    width = next_power_of_2(d)
    by_width = max(TILE // width, 4)
    by_count = max(next_power_of_2(n // MIN_PROGRAMS + 1) // 2, 1)
    block_n = min(by_width, by_count, MAX_BLOCK_N)
    block_d = min(width, TILE // block_n)
    num_warps = 4 if block_n * block_d >= 1024 else 2
    return RowBlocks(block_n, block_d, min(next_power_of_2(r), MAX_BLOCK_R), num_warps)


def row_programs(n: int, blocks: RowBlocks) -> int:
    """Return how many programs cover some rows: the grid of a launch.

    Args:
        n: rows.
        blocks: as ``row_blocks`` returns them.

    Returns:
        0 for ``n = 0``, which must not be launched.
    """
    return -(-n // blocks.BLOCK_N)


class ShrinkBlocks(NamedTuple):
    """How ``X W'`` is cut into programs.

    Attributes:
        BLOCK_N: rows of X.
        BLOCK_D: columns that are summed at a time.
        BLOCK_R: rows of W.
        num_warps: warps of a program.
        num_stages: stages of Triton's software pipeline.
    """

    BLOCK_N: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class ExpandBlocks(NamedTuple):
    """How ``U W`` is cut into programs.

    Attributes:
        BLOCK_N: rows of U.
        BLOCK_M: columns of W.
        BLOCK_R: columns of U that are summed at a time.
        num_warps: warps of a program.
        num_stages: stages of Triton's software pipeline.
    """

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1024)
def shrink_blocks(n: int, d: int, r: int, itemsize: int) -> tuple[ShrinkBlocks, int, int]:
    """Cut ``X W'`` into programs, so that no target spills (``make aot``).

    The whole rank goes into one program, up to 512 of it or 256 in float32, so that X is read once; W is read once a
    program, so rows are taken many at a time. Where that leaves multiprocessors idle, d is split, never below
    ``MIN_SPAN`` columns.

    Args:
        n: rows of X.
        d: columns of X.
        r: rows of W.
        itemsize: bytes of an element, 2 or 4.

    Returns:
        The blocks, the number of parts into which d is split, and the columns of each part.
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
    """Cut ``U W`` into programs, so that no target spills (``make aot``).

    Args:
        n: rows of U.
        m: columns of W.
        r: the rank, over which is summed.
        itemsize: bytes of an element, 2 or 4.

    Returns:
        The blocks.
    """
    block_n, block_m = (16 if n <= 16 else 64), min(max(next_power_of_2(m), 16), 128)
    if r % 16:  # rows of u are then not aligned, and loading them takes more registers
        block_m = min(block_m, 64)
    block_r, num_warps = (32, 4) if itemsize == 2 else (16, 8)
    return ExpandBlocks(block_n, block_m, min(max(next_power_of_2(r), 16), block_r), num_warps, 2)


class MomentBlocks(NamedTuple):
    """How ``V' diag(w) U`` is cut into programs.

    Attributes:
        CHUNK: rows that are summed in float32, and passed over together where none counts.
        BLOCK_N: rows that are multiplied at a time.
        BLOCK_R: columns of V, and of U.
        num_warps: warps of a program.
        num_stages: stages of Triton's software pipeline.
    """

    CHUNK: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1024)
def moment_blocks(n: int, r: int, tasks: int, itemsize: int) -> tuple[MomentBlocks, int, int]:
    """Cut ``V' diag(w) U`` of each task into programs, so that no target spills (``make aot``).

    The rows are split until there are about ``2 * FILL`` programs, since each part of them is a whole set of moments
    that has to be added up.

    Args:
        n: rows of U.
        r: columns of U.
        tasks: sets of moments.
        itemsize: bytes of the factors in a product, 2 or 4.

    Returns:
        The blocks, the number of parts into which the rows are split, at least one, and the rows of each part.
    """
    block_n, most, stages = 32 if itemsize == 2 else 16, 32 if r % 16 else 64, 1
    block_r = min(max(next_power_of_2(r), 16), most)
    blocks = MomentBlocks(128, block_n, block_r, 8 if block_r > 16 else 1, stages)
    tiles = -(-r // block_r)
    programs = max(tiles * (tiles + 1) // 2 * tasks, 1)
    parts = max(min(2 * FILL // programs, n // blocks.CHUNK), 1)
    span = max(-(-n // (parts * blocks.CHUNK)), 1) * blocks.CHUNK
    return blocks, max(-(-n // span), 1), span
