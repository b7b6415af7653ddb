"""Forward and backward of one frozen linear layer: bare, with six adapters by this project, and by PEFT."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from correct import SEED, TOLERANCE, error, results
from layers import PROVIDERS, Layer, exact_layer, layer_work
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import PREFILL, SIX, TWENTY, Shape
from timing import CLOCK, CUDA, DEVICE, input_sets, measure, peak_bytes
from torch import Tensor

DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPES = [
    PREFILL,
    Shape("LLaMA-3-8B", "decode of 8", 8, 4096, 4096, SIX),
    Shape("LLaMA-3-70B", "prefill of 4096", 4096, 8192, 8192, SIX),
    Shape("ViT-B/16", "32 x 197", 6304, 768, 768, TWENTY),
]
CPU_SHAPES = [
    Shape("LLaMA-3-8B", "prefill of 64", 64, 4096, 4096, SIX),
    Shape("ViT-B/16", "1 x 197", 197, 768, 768, TWENTY),
]
pytestmark = pytest.mark.benchmark(timer=CLOCK)


@lru_cache(maxsize=1)
def prepared(shape: Shape) -> tuple[Layer, list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Return a layer, pairs (z, dy) to rotate among, and y, dz, dlam of the first pair in float64."""
    torch.manual_seed(SEED)
    layer = Layer(shape, DTYPE, DEVICE)
    widths, count = (shape.d, shape.m), input_sets(shape.n * (shape.d + shape.m) * DTYPE.itemsize)
    sets = [tuple(torch.randn(shape.n, w, dtype=DTYPE, device=DEVICE) for w in widths) for _ in range(count)]
    return layer, sets, exact_layer(layer, *sets[0])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES if CUDA else CPU_SHAPES, ids=lambda shape: shape.name)
def test_layer(benchmark: BenchmarkFixture, copy_gb_per_s: float, shape: Shape, provider: str) -> None:
    layer, sets, want = prepared(shape)
    step = PROVIDERS[provider](layer)
    off = None
    if provider != "bare":
        off = error(results(step, sets[0]), want)
        if not off <= TOLERANCE[DTYPE]:
            pytest.fail(f"{provider} is wrong by {off}, more than {TOLERANCE[DTYPE]}: no number")
    moved, flops = layer_work(shape, DTYPE.itemsize, adapters=provider != "bare")
    benchmark.group = f"layer, {shape.name}"
    benchmark.extra_info |= {
        "kind": "layer",
        "provider": provider,
        "shape": shape.name,
        "n": shape.n,
        "d": shape.d,
        "m": shape.m,
        "ranks": f"{len(shape.ranks)} x {shape.own}",
        "dtype": str(DTYPE).removeprefix("torch."),
        "error": off,
        "saved_bytes": step.saved_bytes(*sets[0]),
        "peak_bytes": peak_bytes(step, *sets[0]),
        "seed": SEED,
        "input_sets": len(sets),
        "bytes": moved,
        "flops": flops,
        "copy_gb_per_s": copy_gb_per_s,
    }
    measure(benchmark, step, sets)
