"""Seconds and memory of one merge at LLaMA-3-8B's shapes, by nsc or dense. test_methods.py starts it, afresh on a CPU:

    python benchmarks/merges.py nsc core-ties          python benchmarks/merges.py dense tsv          JSON on stdout

Six adapters of rank 16 on q_proj and v_proj of 32 blocks, random: neither time nor memory depends on the values. Every
layer's update is made once and let go, as an export does. Dense formulations are given the same factors, of one block.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import dense_methods
import torch
from dense_methods import Dense, dense_updates
from timing import CUDA, DEVICE, synchronize

from nsc.methods import Updates
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spec import read_recipe

BLOCKS, TASKS, RANK = 32, 6, 16
SHAPES = {"self_attn.q_proj": (4096, 4096), "self_attn.v_proj": (1024, 4096)}
SMALL = {name: (24, 32) for name in SHAPES}
BUDGET = 5.0 if CUDA else 20.0  # seconds: a method that would take longer for all blocks is measured on one
ROUNDS, ENOUGH = 5, 4.0  # of one block so many, but no more once so many seconds have passed
FORMULATIONS: dict[str, Dense] = {
    "task-arithmetic": dense_methods.task_arithmetic,
    "ties": dense_methods.ties,
    "dare": dense_methods.dare,
    "dare-ties": dense_methods.dare_ties,
    "emr": dense_methods.emr,
    "fr": dense_methods.fr,
    "svd": lambda D: dense_methods.truncated_svd(D, RANK),
    "tsv": dense_methods.tsv,
    "cart": dense_methods.cart,
    "iso-c": dense_methods.iso_c,
    "iso-cts": dense_methods.iso_cts,
    "knots": dense_methods.knots,
}
SPECTRAL = ("tsv", "cart")


def formulation(name: str) -> str | None:
    """Return the name in FORMULATIONS of what a method is measured against, or None.

    Spectral methods in Core Space are measured against themselves in full space; others there, and all in KnOTS and
    CtM, against the SVD of [D_1 .. D_K] with the sum, which is the least that a method in such a basis must do.
    """
    space, _, rest = name.partition("-")
    if space in ("knots", "ctm") or (space == "core" and rest not in SPECTRAL):
        return "knots"
    own = rest if space == "core" else name
    return own if own in FORMULATIONS else None


def updates(blocks: int, shapes: dict[str, tuple[int, int]], rank: int) -> dict[str, Updates]:
    """Return random factors of all layers, on the device."""
    generator = torch.Generator().manual_seed(0)
    tasks = tuple(f"task{k}" for k in range(TASKS))

    def normal(*shape: int) -> tuple[torch.Tensor, ...]:
        return tuple((torch.randn(*shape, generator=generator) * 0.02).to(DEVICE) for _ in tasks)

    return {
        f"layers.{i}.{name}": Updates(name, tasks, normal(rank, d), normal(m, rank), (2.0,) * TASKS, (1.0,) * TASKS)
        for i in range(blocks)
        for name, (m, d) in shapes.items()
    }


def of_nsc(name: str, layers: dict[str, Updates]) -> Callable[[], None]:
    """Return a run of a recipe with its default settings, which makes all updates, one after the other."""
    stack, recipe = stack_of(layers), read_recipe(name)

    def run() -> None:
        combination = Combination(stack, recipe, device=DEVICE)
        for layer in combination.names:
            combination.update(layer)

    return run


def of_dense(name: str, layers: dict[str, Updates]) -> Callable[[], None]:
    """Return the same by a dense formulation."""

    def run() -> None:
        for layer in layers.values():
            FORMULATIONS[name](dense_updates(layer.A, layer.B, layer.scales))

    return run


SIDES = {"nsc": of_nsc, "dense": of_dense}


def measure(
    side: str, name: str, shapes: dict[str, tuple[int, int]] = SHAPES, rank: int = RANK, blocks: int = BLOCKS
) -> dict[str, Any]:
    """Measure one method.

    Without a GPU seconds are CPU seconds, in which other work on the machine is not. The peak is of everything run
    here, beyond the factors; what libraries take when they are first used is not in it.

    Returns:
        Seconds of one block (median), of all blocks if that was measured, the same on the clock, peak bytes, and what
        was measured.
    """
    SIDES[side](name, updates(1, SMALL, 2))()
    layers = updates(blocks if side == "nsc" else 1, shapes, rank)
    held = sum(x.nbytes for layer in layers.values() for x in (*layer.A, *layer.B))
    one, every = (SIDES[side](name, part) for part in (dict(list(layers.items())[: len(shapes)]), layers))
    peak = peak_counter()
    took = [_timed(one)]
    while len(took) < ROUNDS and sum(seconds for seconds, _ in took) < ENOUGH:
        took.append(_timed(one))
    block, clock_block = (median(values) for values in zip(*took, strict=True))
    fits = side == "nsc" and block * blocks <= BUDGET
    whole, clock_whole = _timed(every) if fits else (None, None)
    return {
        "block": block,
        "clock_block": clock_block,
        "rounds": len(took),
        "whole": whole,
        "clock_whole": clock_whole,
        "blocks": blocks,
        "layers": len(layers),
        "peak_bytes": peak(),
        "factor_bytes": held,
        "dtype": "float32",
        "load_average": os.getloadavg()[0],
    }


def _timed(run: Callable[[], None]) -> tuple[float, float]:
    synchronize()
    started, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize()
    clock, cpu = time.perf_counter() - started, time.process_time() - cpu
    return (clock if CUDA else cpu), clock


def peak_counter() -> Callable[[], int | None]:
    """Return a function that gives the most bytes held since now, beyond what is held now.

    It gives None where the system does not count them.
    """
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - held
    if not Path("/proc/self/clear_refs").exists():
        return lambda: None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    resident = _resident_peak()
    return lambda: _resident_peak() - resident


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
