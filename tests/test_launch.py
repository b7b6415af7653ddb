"""Block sizes as pure functions of shape, and the package on a machine that has neither GPU nor Triton."""

import itertools
import subprocess
import sys

import pytest

from nsc_kernels._launch import MAX_BLOCK_N, MAX_BLOCK_R, TILE, next_power_of_2, row_blocks, row_programs

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
    aot.compile_for(next(aot.launches())[1], "sm_90")
except RuntimeError as error:
    assert "Triton installed" in str(error)
else:
    raise AssertionError("compiled without Triton")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
