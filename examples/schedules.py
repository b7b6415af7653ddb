"""Fewer steps, each longer: which schedule ends where the paper's ends, and what it costs.

    python examples/schedules.py --base out/SmolLM2-135M-Instruct

Adam moves a coefficient about lr x steps, so schedules of one product travel equally far. Each row: steps, lr, the
correlation of its coefficients' way with that of the first schedule, the largest difference, mean score, seconds.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from compare import Exam, Scorer
from shares import mean_share
from tasks import TASKS, load, write_unlabelled
from transformers import AutoTokenizer

import nsc
from nsc.bases.base_model import Base
from nsc.bases.loading import load_body

HERE = Path(__file__).parent
DISTANCE = 0.1  # the paper's vision schedule: 1e-3 x 100
STEPS = (100, 50, 20, 10, 5)


def main() -> None:
    """Learn with every schedule, and compare with the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200, help="test rows of each task")
    parser.add_argument("--distance", type=float, default=DISTANCE, help="lr x steps")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of each schedule, the paper's first")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    adapters = {name: HERE / "adapters" / name for name in TASKS}
    data = {name: write_unlabelled(task, folder / f"{name}.jsonl") for name, task in TASKS.items()}
    exams = {name: Exam(task.metric, load(task).test[: args.rows]) for name, task in TASKS.items()}
    model, tokenizer = (
        load_body(Base(str(args.base)), dtype="bfloat16", device="cpu"),
        AutoTokenizer.from_pretrained(args.base),
    )
    first = alone = None
    print("steps        lr  correlation  largest difference  of fine-tuned  seconds", flush=True)
    for steps in args.steps:
        began = time.perf_counter()
        lr = args.distance / steps
        result = nsc.merge(args.base, adapters, data, steps=steps, lr=lr, batch_size=4, max_length=32, progress=False)
        seconds = time.perf_counter() - began
        scorer = Scorer(result, model, tokenizer, exams)
        if first is None:
            first, one_hot = result.coefficients, torch.eye(len(result.tasks))
            each = enumerate(result.tasks)
            alone = {t: scorer.score(one_hot[k].expand_as(first), t)[t] for k, t in each}
        share = mean_share(scorer.score(result.coefficients), alone)
        moved = first != nsc.MergeConfig().start  # those without gradient stay where all began
        ways = torch.stack([first[moved], result.coefficients[moved]])
        print(
            f"{steps:5}{lr:10.4g}{torch.corrcoef(ways)[0, 1]:13.4f}{(ways[0] - ways[1]).abs().max():20.4f}{share:15.1%}"
            f"{seconds:9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
