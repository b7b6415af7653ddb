"""Rounding to a narrow dtype, in the interpreter bit for bit that of torch; on a GPU it is the device's own."""

import os
import subprocess
import sys

import pytest
import torch

from nsc_kernels._op import INTERPRET
from nsc_kernels._tl import narrow, tl, triton


@triton.jit
def narrow_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Write every float of a block to the dtype of the output."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, narrow(tl.load(x_ptr + i), out_ptr.dtype.element_ty))


def every_kind_of_float() -> torch.Tensor:
    """Float32 with every upper half, and lower halves below, at and above the middle: zeros, subnormals, inf, NaN."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    return torch.cat([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)


@pytest.mark.skipif(not INTERPRET, reason="the next test runs it in the interpreter")
def test_narrow_rounds_as_torch():
    x = every_kind_of_float()
    out = torch.empty(len(x), dtype=torch.bfloat16)
    narrow_kernel[(len(x) // 2**14,)](x, out, BLOCK=2**14)
    want = x.bfloat16()
    kept = ~want.isnan()
    assert torch.equal(out.isnan(), ~kept)
    assert torch.equal(out[kept].view(torch.int16), want[kept].view(torch.int16))


@pytest.mark.skipif(INTERPRET, reason="this is the run that it starts")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout
