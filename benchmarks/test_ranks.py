"""What a second process adds: rows a second of two that share a step of twice the rows, against one alone, by turns.

Gloo on one machine, a thread for each process, SmolLM2-135M's shapes with fewer blocks. Meaningful on a quiet machine
with two cores; both share its memory's bandwidth.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from timing import CUDA

ROUNDS, BLOCKS = 8, 10  # of 30
HERE = Path(__file__).parent


@pytest.mark.skipif(CUDA, reason="measures processes on a CPU")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.benchmark(group="ranks")
def test_two_processes(benchmark: BenchmarkFixture) -> None:
    found: dict[str, Any] = {}
    benchmark.pedantic(lambda: found.update(run_two(ROUNDS, BLOCKS)), rounds=1)
    benchmark.extra_info |= found | {
        "kind": "ranks",
        "model": "SmolLM2-135M",
        "cut": f"{BLOCKS} of 30 blocks, a vocabulary of 1024",
        "dtype": "float32",
        "load_average": os.getloadavg()[0],
    }


def run_two(rounds: int, blocks: int) -> dict[str, Any]:
    """Return what the first of two processes of ranks.py says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "ranks.py"), str(rounds), str(blocks)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "PYTHONPATH": path, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(err for _, err in told))
    return json.loads(told[0][0].splitlines()[-1])
