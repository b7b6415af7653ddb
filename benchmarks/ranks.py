"""One of two processes that share a step, started by test_ranks.py: rows a second of one alone, and of both together.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python benchmarks/ranks.py ROUNDS BLOCKS

By turns: rank 0 takes steps on a batch while rank 1 waits, then both take steps on twice the rows. Rank 0 prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import SMOLLM2, Case, random_body, random_rows
from race import random_stack
from transformers import LlamaConfig

from nsc.bases.roles import choose_targets
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.learning.passes import share_out
from nsc.performance.timing import nsc_step, sharing_weights
from nsc.runtime.distributed import join

STEPS = 2  # between two looks at the clock
Took = list[tuple[float, float]]  # seconds on the clock and CPU seconds of a step


def main(rounds: int, blocks: int) -> dict[str, float | int]:
    """Time steps alone and together, and return nothing but on rank 0.

    Returns:
        Seconds of a step alone and together, CPU seconds of this rank likewise, and 2 x alone / together.
    """
    team = join("cpu")
    config = LlamaConfig(**{**SMOLLM2.to_dict(), "num_hidden_layers": blocks, "vocab_size": 1024})
    case = Case("SmolLM2-135M", config, 6, 2, 64, dtype="float32")
    model = random_body(config, case.dtype)
    with tempfile.TemporaryDirectory() as folder:
        stack = random_stack(model, case.tasks, Path(folder))
    twin, targets = sharing_weights(model), choose_targets(model, stack.names)
    double, _ = random_rows(case, model, None)
    single = Batch({k: v[::2] for k, v in double.inputs.items()}, double.task[::2], 2 * double.weight[::2])
    mine = share_out([double], team.size)[team.rank]
    alone: Took = []
    together: Took = []
    with (
        nsc_step(model, stack, targets, [single], MergeConfig()) as own,
        nsc_step(twin, stack, targets, mine, MergeConfig(), team) as shared,
    ):
        for _ in range(rounds + 1):
            team.wait()
            if team.first:
                alone.append(_timed(own))
            team.wait()
            together.append(_timed(shared))
    if not team.first:
        return {}
    (one, cpu_one), (two, cpu_two) = (
        map(median, zip(*took[1:], strict=True)) for took in (alone, together)
    )  # one warm
    return {
        "one": one,
        "two": two,
        "cpu_one": cpu_one,
        "cpu_two": cpu_two,
        "speedup": 2 * one / two,
        "tokens": single.tokens,
    }


def _timed(step: Callable[[], Any]) -> tuple[float, float]:
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - started) / STEPS, (time.process_time() - cpu) / STEPS


if __name__ == "__main__":
    torch.set_num_threads(1)
    if found := main(*map(int, sys.argv[1:])):
        print(json.dumps(found))
