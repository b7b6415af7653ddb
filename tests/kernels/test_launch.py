"""Block sizes as pure functions of shape, and the package on a machine that has neither GPU nor Triton."""

import itertools
import math
import subprocess
import sys

import pytest

from nsc_kernels._launch import (
    MAX_BLOCK_N,
    MAX_BLOCK_R,
    TILE,
    expand_blocks,
    moment_blocks,
    next_power_of_2,
    row_blocks,
    row_programs,
    shrink_blocks,
)

SIZES = list(itertools.product((0, 1, 3, 130, 4096, 3_000_000), (1, 7, 64, 768, 4096, 16384), (0, 1, 16, 96, 512)))


def test_next_power_of_2():
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 1024, 2048]


@pytest.mark.parametrize(("n", "d", "r"), SIZES)
def test_row_blocks(n, d, r):
    """Powers of two, a tile that stays in registers, no wider than the row needs, and every row covered once."""
    blocks = row_blocks(n, d, r)
    assert all(size == next_power_of_2(size) for size in blocks)
    assert blocks.BLOCK_N <= MAX_BLOCK_N and blocks.BLOCK_R <= MAX_BLOCK_R
    assert blocks.BLOCK_N * blocks.BLOCK_D <= TILE
    assert d > blocks.BLOCK_D // 2 and max(r, 1) > blocks.BLOCK_R // 2
    programs = row_programs(n, blocks)
    assert programs * blocks.BLOCK_N >= n > (programs - 1) * blocks.BLOCK_N


def test_row_blocks_fill_the_device():
    """Few rows are spread over programs; many narrow ones share them; a wide row keeps a wide strip."""
    assert row_blocks(200, 4096, 96).BLOCK_N == 1
    assert row_programs(4096, row_blocks(4096, 64, 16)) >= 256
    assert row_blocks(1_000_000, 64, 16).BLOCK_N == MAX_BLOCK_N
    assert row_blocks(1_000_000, 16384, 16) == row_blocks(1_000_000, 4096, 16) == (4, 512, 16, 4)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("n", "d", "r"), SIZES)
def test_shrink_blocks(n, d, r, itemsize):
    """Tiles that a matrix unit takes, every column of d in one part exactly, and the rank in one program."""
    blocks, splits, span = shrink_blocks(n, d, r, itemsize)
    assert all(size == next_power_of_2(size) for size in blocks[:4]) and min(blocks[:3]) >= 16
    assert span % blocks.BLOCK_D == 0 and splits * span >= d > (splits - 1) * span
    assert min(r, 512 if itemsize == 2 else 256) <= blocks.BLOCK_R
    assert blocks.BLOCK_N * blocks.BLOCK_R <= 16384  # sums that stay in registers


def test_shrink_blocks_fill_the_device():
    """Few rows split d over the multiprocessors; many rows never do, since parts have to be added up."""
    assert shrink_blocks(8, 4096, 96, 2)[1] == 16
    assert 64 <= math.prod(programs(4096, 4096, 96)) <= 264
    assert shrink_blocks(100_000, 16384, 96, 2)[1] == 1


def programs(n, d, r):
    blocks, splits, _ = shrink_blocks(n, d, r, 2)
    return -(-n // blocks.BLOCK_N), splits


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("n", "m", "r"), SIZES)
def test_expand_blocks(n, m, r, itemsize):
    blocks = expand_blocks(n, m, r, itemsize)
    assert all(size == next_power_of_2(size) for size in blocks[:4]) and min(blocks[:3]) >= 16
    assert blocks.BLOCK_N * blocks.BLOCK_M <= 8192


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tasks", [1, 8, 300])
@pytest.mark.parametrize(("n", "r"), sorted({(n, r) for n, _, r in SIZES}))
def test_moment_blocks(n, r, tasks, itemsize):
    """Tiles that a matrix unit takes, every row in one part exactly, and parts that end between two chunks."""
    blocks, parts, span = moment_blocks(n, r, tasks, itemsize)
    assert all(size == next_power_of_2(size) for size in blocks) and min(blocks[:3]) >= 16
    assert blocks.CHUNK % blocks.BLOCK_N == 0 == span % blocks.CHUNK
    assert parts * span >= n > (parts - 1) * span or parts == 1 > n
    assert max(r, 16) > blocks.BLOCK_R // 2


def test_moment_blocks_fill_the_device():
    """Rows are split where tiles and tasks are few, and parts, each a set of moments, never take much memory."""
    assert moment_blocks(65536, 96, 1, 2)[1] == 86
    assert moment_blocks(1_000_000, 512, 20, 2)[1] == 1
    assert moment_blocks(8, 96, 6, 2)[1:] == (1, 128)
    assert max(moment_blocks(n, r, 1, 2)[1] * r * r for n, _, r in SIZES) * 8 <= 16 << 20


def test_without_triton():
    """The reference serves where Triton is not installed, and compiling ahead of time says what is missing."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from nsc_kernels import aot, _tl
from nsc_kernels.null_space_ratio import null_space_ratio
assert not _tl.HAS_TRITON
z = torch.eye(3, requires_grad=True)
value = null_space_ratio(z, z[:, :1])
value.sum().backward()
assert value.tolist() == [0, 1, 1]
try:
    aot.compile_for(aot.ratio_launches(8, 8, 8, torch.float32, gram=False, routed=False)[0], "sm_90")
except RuntimeError as error:
    assert "Triton installed" in str(error)
else:
    raise AssertionError("compiled without Triton")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
