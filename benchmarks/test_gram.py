"""Preparing a merge: the Gram factors of every module and task, and whitening them."""

import pytest
import torch

from nsc_kernels import GramCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def lora_A() -> list[torch.Tensor]:
    """Six rank-16 adapters on 64 modules of width 4096."""
    return [torch.randn(16, 4096, device=DEVICE) / 64 for _ in range(6 * 64)]


def test_factor(benchmark, lora_A):
    assert all(factor.rank == 16 for factor in GramCache().factor(lora_A))
    benchmark.group = "Gram cache, 6 adapters x 64 modules, width 4096"
    benchmark.extra_info["device"] = DEVICE

    def timed():
        GramCache().factor(lora_A)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=10, warmup_rounds=1)
