"""Seconds a step of real models: nsc, the per-task loop, and the floor that no step can undercut, by turns in one run.

nsc runs all tasks in one batch, adapters stacked and whitened, forward cut at the last target, features of a frozen
tower computed once; the loop is baseline.py, with the tower in every step; the floor is the frozen base alone. Weights,
adapters and rows are random: the time does not depend on their values. Beside seconds on the clock, CPU seconds of the
process are recorded: with one thread they are the same on a quiet machine, and say more on a busy one.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from models import CASES, RANK, SMOLLM2, Case, random_body
from pytest_benchmark.fixture import BenchmarkFixture
from race import Race
from timing import CUDA, DEVICE, synchronize
from torch import nn

from nsc.bases.base_model import Base
from nsc.bases.loading import load_body
from nsc.config import MergeConfig
from nsc.performance.profile import find_hardware
from nsc.performance.timing import count_flops, nsc_step
from nsc.performance.trace import profile_step

ROUNDS, WARMUP = 10, 2
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark: BenchmarkFixture, case: Case, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    case, base = case.here(), pytestconfig.getoption("base")
    trained = bool(base) and case.config is SMOLLM2
    model = load_body(Base(base), case.dtype, DEVICE) if trained else random_body(case.config, case.dtype)
    race, config = Race.of(case, model, tmp_path), MergeConfig(tokens_per_pass=case.tokens_per_pass)
    seconds, cpu, peak = timed(benchmark, case, model, race, config)
    busy, profiled, flops = look_inside(model, race, replace(config, graphs=False))
    sheet = find_hardware(torch.device(DEVICE))
    whole = max(seconds["nsc"] if CUDA else profiled, sum(busy.values()))
    benchmark.extra_info |= about(case) | {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mfu": None if isinstance(sheet, str) else flops / seconds["nsc"] / sheet.flops,
        "peak_beyond_weights": peak,
        "split": busy | {"host": whole - sum(busy.values())},
        "split_of": whole,
        "counted_flops": flops,
        "load_average": os.getloadavg()[0],
        "tokens": race.batch.task.numel(),
        "weights": Path(base).name if trained else "random",
    }
    del model, race
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def about(case: Case) -> dict[str, Any]:
    """Return what is recorded of a case and its device."""
    return {
        "kind": "step",
        "model": case.model,
        "launch": "graphs" if CUDA else "eager",
        "device": DEVICE,
        "dtype": case.dtype,
        "cut": case.cut,
        "passes": case.passes,
        "adapters": case.tasks,
        "rank": RANK,
        "modules": "query and value",
        "adapter_values": "random",
    }


def timed(
    benchmark: BenchmarkFixture, case: Case, model: nn.Module, race: Race, config: MergeConfig
) -> tuple[dict[str, float], dict[str, float], int | None]:
    """Time the steps of nsc, the loop and the floor, once nsc and the loop have given the same loss.

    Returns:
        Seconds on the clock and CPU seconds as ``raced`` returns them, and the peak bytes of a step of nsc beyond the
        base's weights, adapters and rows, None on a CPU.
    """
    before = torch.cuda.memory_allocated() if CUDA else 0
    with nsc_step(model, race.stack, race.targets, [race.batch], config) as step:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        warm = [step() for _ in range(WARMUP)]
        synchronize()
        peak = torch.cuda.max_memory_allocated() - before if CUDA else None
        torch.testing.assert_close(warm[0].float(), race.loop_step().float(), rtol=0, atol=LOSS_TOLERANCE[case.dtype])
        seconds, cpu = raced(benchmark, {"nsc": step, "loop": race.loop_step, "floor": race.floor_step}, case)
    return seconds, cpu, peak


def look_inside(model: nn.Module, race: Race, config: MergeConfig) -> tuple[dict[str, float], float, int]:
    """Return the seconds of each part of a step, of a profiled step as a whole, and the step's FLOPs."""
    with nsc_step(model, race.stack, race.targets, [race.batch], config) as step:
        step()
        busy, profiled = profile_step(step, torch.device(DEVICE), 2)
        return busy, profiled, count_flops(step)


def raced(
    benchmark: BenchmarkFixture, steps: dict[str, Callable[[], Any]], case: Case
) -> tuple[dict[str, float], dict[str, float]]:
    """Run these by turns, and return medians on the clock and of CPU seconds, with nsc's ratios to the others."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}

    def timed(name: str) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        steps[name]()
        synchronize()
        took[name].append((time.perf_counter() - start, time.process_time() - cpu))

    def others() -> None:
        timed("loop")
        timed("floor")

    warmup, rounds = (1, 4) if case.cut else (WARMUP, ROUNDS)
    benchmark.pedantic(partial(timed, "nsc"), setup=others, rounds=rounds, warmup_rounds=warmup)
    medians = [{name: median(pair[c] for pair in pairs[warmup:]) for name, pairs in took.items()} for c in (0, 1)]
    for of in medians:
        of |= {"ratio": of["loop"] / of["nsc"], "over_floor": of["nsc"] / of["floor"]}
    return medians[0], medians[1]
