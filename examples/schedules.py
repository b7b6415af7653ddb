"""Fewer steps, each longer: which schedule ends where the paper's ends, and what it costs.

    python examples/schedules.py --base out/SmolLM2-135M-Instruct

Adam moves a coefficient about lr x steps, so schedules of one product travel equally far. Each row: steps, lr, the
correlation of its coefficients' way with that of the first schedule, the largest difference, mean score, seconds.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from compare import text_scorer
from shares import mean_share
from tasks import ADAPTERS, first_test_rows, write_all_unlabelled

import nsc

DISTANCE = 0.1  # the paper's vision schedule: 1e-3 x 100
STEPS = (100, 50, 20, 10, 5)
MAX_LENGTH = 32


def main() -> None:
    """Learn with every schedule, and compare each with the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200, help="test rows of each task")
    parser.add_argument("--distance", type=float, default=DISTANCE, help="lr x steps")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of each schedule, the paper's first")
    args = parser.parse_args()
    data = write_all_unlabelled(Path(tempfile.mkdtemp()))
    scorer = None
    print("steps        lr  correlation  largest difference  of fine-tuned  seconds", flush=True)
    for steps in args.steps:
        began = time.perf_counter()
        result = learn(args.base, data, steps, args.distance / steps)
        seconds = time.perf_counter() - began
        if scorer is None:
            first, scorer = result.coefficients, text_scorer(result, args.base, first_test_rows(args.rows), MAX_LENGTH)
            alone = {task: scorer.alone(task) for task in result.tasks}
        share = mean_share(replace(scorer, result=result).score(result.coefficients), alone)
        row = f"{steps:5}{args.distance / steps:10.4g}{likeness(first, result.coefficients)}{share:15.1%}"
        print(f"{row}{seconds:9.0f}", flush=True)


def learn(base: Path, data: dict[str, Path], steps: int, lr: float) -> nsc.MergeResult:
    """Merge the demo's adapters by this schedule."""
    return nsc.merge(base, ADAPTERS, data, steps=steps, lr=lr, batch_size=4, max_length=MAX_LENGTH, progress=False)


def likeness(first: torch.Tensor, other: torch.Tensor) -> str:
    """Return the correlation of the ways that two schedules' coefficients went, and their largest difference."""
    moved = first != nsc.MergeConfig().start  # those without gradient stay where all began
    ways = torch.stack([first[moved], other[moved]])
    return f"{torch.corrcoef(ways)[0, 1]:13.4f}{(ways[0] - ways[1]).abs().max():20.4f}"


if __name__ == "__main__":
    main()
