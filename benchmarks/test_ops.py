"""Every pass of every op, by every provider, on the same inputs: ``pytest benchmarks/test_ops.py --benchmark-only``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from cases import PASSES, Inputs, Pass, providers
from correct import SEED, TOLERANCE, error, exact, results
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import SHAPES, Shape
from timing import CLOCK, CUDA, DEVICE, input_sets, measure, peak_bytes
from torch import Tensor

DTYPE = torch.bfloat16 if CUDA else torch.float32
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def all_cases() -> Iterator[Any]:
    """Yield (pass, shape, provider), the providers of one pass and shape in a row: they share their inputs."""
    for work in PASSES:
        for shape in weights(SHAPES) if work.op == "lora_fold" else SHAPES:
            for name, function in providers(work, shape).items():
                yield pytest.param(work, shape, name, function, id=f"{work}-{shape.name}-{name}")


def weights(shapes: list[Shape]) -> list[Shape]:
    """Return one shape for each model: a fold has no rows."""
    return list({shape.model: replace(shape, rows="one weight", n=0) for shape in reversed(shapes)}.values())[::-1]


@lru_cache(maxsize=1)
def prepared(work: Pass, shape: Shape) -> tuple[list[Inputs], list[Tensor]]:
    """Return sets of inputs to rotate among, and what the first must give, in float64."""
    torch.manual_seed(SEED)
    sets = [work.inputs(shape, DTYPE, DEVICE) for _ in range(input_sets(work.moved(shape, DTYPE.itemsize)))]
    want = work.reference(*exact(sets[0]))
    return sets, [want] if isinstance(want, Tensor) else list(want)


@pytest.mark.parametrize(("work", "shape", "provider", "function"), all_cases())
def test_op(
    benchmark: BenchmarkFixture, copy_gb_per_s: float, work: Pass, shape: Shape, provider: str, function: Callable
) -> None:
    sets, want = prepared(work, shape)
    off = error(results(function, sets[0]), expected(provider, want))
    if not off <= TOLERANCE[DTYPE]:
        pytest.fail(f"{work} by {provider} is wrong by {off}, more than {TOLERANCE[DTYPE]}: no number")
    benchmark.group = f"{work}, {shape.name}"
    benchmark.extra_info |= {
        "kind": "op",
        "op": work.op,
        "variant": work.variant,
        "step": work.step,
        "shape": shape.name,
        "provider": provider,
        "n": shape.n,
        "d": shape.d,
        "m": shape.m,
        "ranks": f"{len(shape.ranks)} x {shape.own}",
        "dtype": str(DTYPE).removeprefix("torch."),
        "bytes": work.moved(shape, DTYPE.itemsize),
        "flops": work.flops(shape),
        "copy_gb_per_s": copy_gb_per_s,
        "peak_bytes": peak_bytes(function, *sets[0]),
        "error": off,
        "seed": SEED,
        "input_sets": len(sets),
    }
    measure(benchmark, function, sets)


def expected(provider: str, want: list[Tensor]) -> list[Tensor]:
    """Return what this provider gives of u and the energy.

    The two of ``lora_down`` that are no op give less, or the norm instead.
    """
    return {"linear": want[:1], "linear + norm": [want[0], want[-1].sqrt()]}.get(provider, want)
