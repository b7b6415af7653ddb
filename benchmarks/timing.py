"""Clocks. Each is pytest-benchmark's ``timer`` as well: read before and after a round, it has moved by what counts.

    benchmark.pedantic(CLOCK.device, args=(function, *inputs), rounds=40)      with the mark benchmark(timer=CLOCK)

so nothing that pytest, Python or a synchronisation adds around the measured piece is in the number.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS, WARMUP = (40, 5) if CUDA else (7, 2)
CACHE_BYTES = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26) if CUDA else 1 << 24
COPY_BYTES = 1 << 30 if CUDA else 1 << 27  # read once and written once: twice that is moved
CYCLES_PER_SECOND = 2e9  # of a GPU, about: how long the device is kept waiting for the host need not be exact
LEAD, MAX_LEAD = 5e-4, 2e-2  # seconds by which the host is ahead at first, and at most
MAX_SETS = 16


class Clock:
    """A sum of the seconds spent in what it was told to run: on the device, on the host, or on the wall."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.lead = LEAD  # twice what the last call took the host
        self.behind = 0
        self._cold: torch.Tensor | None = None

    def __call__(self) -> float:
        return self.seconds

    def device(self, function: Callable[..., Any], *inputs: Any) -> None:
        """Add the time from the start of a call's first kernel to the end of its last, the L2 cache emptied before.

        The device waits until the host has handed in all kernels. A round in which it did not is counted as ``behind``:
        gaps between launches may be in its time. On a CPU, the time of the call is added.

        Raises:
            RuntimeError: if the device says more than passed on the wall, or nothing.
        """
        if not CUDA:
            self.wall(function, *inputs)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._empty_cache()
        torch.cuda.synchronize()
        called = time.perf_counter()
        torch.cuda._sleep(int(self.lead * CYCLES_PER_SECOND))
        begin.record()
        function(*inputs)
        end.record()
        behind = begin.query()
        self.lead = min(max(LEAD, 2 * (time.perf_counter() - called)), MAX_LEAD)
        torch.cuda.synchronize()
        wall, seconds = time.perf_counter() - called, begin.elapsed_time(end) / 1e3
        if not 0 < seconds <= 1.02 * wall:
            raise RuntimeError(f"the device says {seconds} s for what took {wall} s on the wall")
        self.behind += behind
        self.seconds += seconds

    def wall(self, function: Callable[..., Any], *inputs: Any) -> None:
        """Add the time of a call until the device is done with it, the waits inside it included."""
        synchronize()
        called = time.perf_counter()
        function(*inputs)
        synchronize()
        self.seconds += time.perf_counter() - called

    def host(self, calls: int, function: Callable[..., Any], *inputs: Any) -> None:
        """Add what one call takes the host, the device running beside it: the mean of a few, the device idle before."""
        synchronize()
        called = time.perf_counter()
        for _ in range(calls):
            function(*inputs)
        self.seconds += (time.perf_counter() - called) / calls

    def graph(self, replay: Callable[[], None], calls: int) -> None:
        """Add the device time of one call of a CUDA graph that holds a few."""
        before = self.seconds
        self.device(replay)
        self.seconds = before + (self.seconds - before) / calls

    def wake(self, seconds: float = 0.05) -> None:
        """Keep a GPU busy, so that its clocks are up when the first round comes."""
        until = time.perf_counter() + seconds
        while CUDA and time.perf_counter() < until:
            self._empty_cache()
            synchronize()

    def _empty_cache(self) -> None:
        """Read twice what the L2 cache holds: lines that were only read are dropped for nothing later."""
        if self._cold is None:
            self._cold = torch.ones(max(2 * CACHE_BYTES, 1 << 26) // 4, device=DEVICE)
        self._cold.sum()


CLOCK = Clock()


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()


def input_sets(nbytes: int) -> int:
    """Return how many sets of inputs to rotate among, to be three times the cache together, within reason."""
    return min(max(-(-3 * CACHE_BYTES // max(nbytes, 1)), 2), MAX_SETS)


def measure(benchmark: BenchmarkFixture, function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> None:
    """Time ``function`` on the device in rounds, its inputs by turns from ``sets``.

    On a GPU the number of rounds in which the host was behind is recorded.
    """
    turns = itertools.cycle(sets)
    CLOCK.behind, CLOCK.lead = 0, LEAD
    CLOCK.wake()
    benchmark.pedantic(CLOCK.device, setup=lambda: ((function, *next(turns)), {}), rounds=ROUNDS, warmup_rounds=WARMUP)
    if CUDA:
        benchmark.extra_info["rounds_host_behind"] = CLOCK.behind


def peak_bytes(function: Callable[..., Any], *inputs: Any) -> int | None:
    """Return the most bytes that a call holds beside its inputs, outputs included; None on a CPU."""
    if not CUDA:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_gb_per_s(rounds: int = ROUNDS) -> float:
    """Return GB/s of a device copy, bytes read and written, with the clock that times the ops; the median."""
    source, target = torch.randn(2, COPY_BYTES // 4, device=DEVICE)
    clock, seconds = Clock(), []
    clock.wake()
    for _ in range(WARMUP + rounds):
        before = clock()
        clock.device(target.copy_, source)
        seconds.append(clock() - before)
    return 2 * COPY_BYTES / sorted(seconds[WARMUP:])[rounds // 2] / 1e9
