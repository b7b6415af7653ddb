"""Every merging method at LLaMA-3-8B's shapes, and with --dense what each takes when every update is dense.

    pytest benchmarks/test_methods.py --benchmark-only --dense          a quarter of an hour on one core

Without a GPU each runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import merges
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from timing import CUDA, Clock

from nsc.recipes.spec import names

HERE = Path(__file__).parent
CLOCK = Clock()


@pytest.mark.parametrize("method", names())
@pytest.mark.benchmark(group="methods", timer=CLOCK)
def test_method(benchmark: BenchmarkFixture, method: str) -> None:
    kept(benchmark, "nsc", method)
    benchmark.extra_info["against"] = merges.formulation(method)


@pytest.mark.parametrize("formulation", merges.FORMULATIONS)
@pytest.mark.benchmark(group="dense methods", timer=CLOCK)
def test_dense(benchmark: BenchmarkFixture, formulation: str, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("dense"):
        pytest.skip("minutes each: asked for with --dense")
    kept(benchmark, "dense", formulation)


def kept(benchmark: BenchmarkFixture, side: str, name: str) -> None:
    """Measure once; the time kept is that of one block."""

    def run() -> None:
        found = merges.measure(side, name) if CUDA else measured_alone(side, name)
        CLOCK.seconds += found["block"]
        benchmark.extra_info |= {"kind": "method", "side": side, "method": name, **found}

    benchmark.pedantic(run, rounds=1)


def measured_alone(side: str, name: str) -> dict[str, Any]:
    """Return what a process of merges.py says."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    command = [sys.executable, str(HERE / "merges.py"), side, name]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
