"""Preparing a merge: the Gram factors of every module and task, until the device is done with them."""

import pytest
import torch
from timing import CLOCK, DEVICE, peak_bytes

from nsc_kernels import GramCache

TASKS, MODULES, RANK, WIDTH = 6, 64, 16, 4096
pytestmark = pytest.mark.benchmark(timer=CLOCK)


@pytest.fixture(scope="module")
def lora_A() -> list[torch.Tensor]:
    """Return six rank-16 adapters on 64 modules of width 4096."""
    return [torch.randn(RANK, WIDTH, device=DEVICE) / 64 for _ in range(TASKS * MODULES)]


def test_factor(benchmark, lora_A):
    for factor, a in zip(GramCache().factor(lora_A), lora_A, strict=True):
        product = factor.inverse @ (a.double() @ a.double().T)
        torch.testing.assert_close(product.cpu(), torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-9)
    benchmark.group = f"Gram cache, {TASKS} adapters x {MODULES} modules, width {WIDTH}"
    work = TASKS * MODULES * RANK * WIDTH
    benchmark.extra_info |= {
        "kind": "gram",
        "dtype": "float32",
        "bytes": 4 * work,
        "flops": 2 * RANK * work,
        "peak_bytes": peak_bytes(factor_all, lora_A),
    }
    benchmark.pedantic(CLOCK.wall, args=(factor_all, lora_A), rounds=10, warmup_rounds=1)


def factor_all(lora_A: list[torch.Tensor]) -> None:
    """Factor all of them with a cache that has seen none."""
    GramCache().factor(lora_A)
