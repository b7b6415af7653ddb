"""What one call of an op takes the host, and what its kernels take in a CUDA graph, where the host is out of the way.

On a machine without a GPU the kernels are left out: ops prepare their launch and do not launch. ``registered`` and
``reference`` then both run the reference; their difference is the price of torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from doors import OPS, arguments, call, captured, doors, launches_of, run_all, without_kernels
from pytest_benchmark.fixture import BenchmarkFixture
from timing import CLOCK, CUDA

FORWARD, BOTH = "forward", "forward + backward"
CALLS = 20  # in one round
ROUNDS, WARMUP = 100, 5
WAYS = ["public", "op", "registered", *(["launch", "graph"] if CUDA else ["reference"])]
pytestmark = pytest.mark.benchmark(timer=CLOCK, disable_gc=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [FORWARD, BOTH])
@pytest.mark.parametrize("op", OPS)
def test_overhead(benchmark: BenchmarkFixture, op: str, step: str, way: str) -> None:
    left_out = not CUDA and way in ("public", "op")
    benchmark.group = f"host time of one call, {op} {step}"
    benchmark.extra_info |= {
        "kind": "overhead",
        "op": op,
        "step": step,
        "way": way,
        "calls": CALLS,
        "dtype": "bfloat16",
        "measures": "device time a call" if way == "graph" else f"host time a call{', no kernel' if left_out else ''}",
    }
    with without_kernels() if left_out else nullcontext():
        benchmark.pedantic(*timed(op, step, way), rounds=ROUNDS, warmup_rounds=WARMUP)


def timed(op: str, step: str, way: str) -> tuple[Callable, tuple[Any, ...]]:
    """Return what pytest-benchmark is to call, and with what."""
    args = arguments(op, gradient=step == BOTH)
    function = call(doors(op).get(way, doors(op)["op"]), args)
    if way == "graph":
        return CLOCK.graph, (captured(function, CALLS), CALLS)
    if way == "launch":
        launches = launches_of(function)
        return CLOCK.host, (CALLS, run_all, launches)
    return CLOCK.host, (CALLS, function)
