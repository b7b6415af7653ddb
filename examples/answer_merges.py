"""Merges of the suite of generated answers by every kind of method: a table of docs/results.md, "Generated answers".

    python examples/answer_suite.py --data DIR --out out/answers
    python examples/answer_merges.py --out out/answers [NAME ...]

Each row is one ``nsc.merge``, written to OUT/merged/NAME and proven, and scored on the greedy answers of transformers
and PEFT alone (``answer_suite.py``). A row that is there already is only scored. The unlabeled rows are prompts that no
expert was trained on. Labels are read by the rows called labels: their scale is the one of SCALES at which the
answers to the validation rows, 32 a task, score best.
"""

import argparse
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from answer_suite import BARE, EXPERT, MAX_LENGTH, MAX_NEW_TOKENS, TASKS, answering, kept_answers, scores_of
from encoder_merges import make_each, unlabeled
from encoder_suite import alone_and_quiet, interval, samples_of
from torch import Tensor

import nsc

SCALES = {"task-arithmetic": (0.3, 0.5, 0.7, 0.9), "tsv": (0.6, 0.9, 1.2, 1.5)}


class Merge(NamedTuple):
    """One row: the arguments of ``nsc.merge``, unlabeled rows a task, and whether labels choose its scale."""

    arguments: dict[str, Any]
    rows: int = 128
    labels: bool = False


MERGES = {
    "sum-labels": Merge({"method": "task-arithmetic"}, 0, labels=True),
    "tsv-labels": Merge({"method": "tsv"}, 0, labels=True),
    "sum-match": Merge({"method": "task-arithmetic", "search": "match"}, 32),
    "tsv-match": Merge({"method": "tsv", "search": "match"}, 32),
    "nsc": Merge({"method": "nsc", "steps": 50, "lr": 3e-3}),  # the fast preset
    "match-layer": Merge({"method": "match-layer", "steps": 60}),
    "match": Merge({"method": "match", "steps": 120}),
    "factors-16": Merge({"method": "match-factors", "factor_rank": 16, "steps": 160}),
}


def merge(name: str, out: Path, tasks: list[str]) -> float:
    """Merge and save one row, and return the seconds that the merge took, without saving and proof."""
    row = MERGES[name]
    rows = {task: unlabeled(out, task, row.rows) for task in tasks} if row.rows else None
    started = time.perf_counter()
    scale = {"scale": best_scale(name, out, tasks)} if row.labels else {}
    result = merged(out, tasks, rows, **row.arguments, **scale)
    seconds = time.perf_counter() - started
    result.save(out / "merged" / name)
    return seconds


def merged(out: Path, tasks: list[str], rows: Mapping[str, list[str]] | None, **arguments: Any) -> nsc.MergeResult:
    """Merge the experts on the base in bfloat16."""
    adapters = {task: out / "adapters" / task for task in tasks}
    arguments = {"dtype": "bfloat16", "progress": False} | arguments
    if rows:
        arguments |= {"max_length": MAX_LENGTH, "max_new_tokens": MAX_NEW_TOKENS}
    return nsc.merge(out / "base", adapters, rows, **arguments)


def best_scale(name: str, out: Path, tasks: list[str]) -> float:
    """Return the scale of a method at which its answers to the validation rows score best, as a mean over tasks."""
    arguments = MERGES[name].arguments
    tried = {}
    for scale in SCALES[arguments["method"]]:
        folder = out / "merged" / f"{name}-{scale:g}"
        if not folder.exists():
            merged(out, tasks, None, **arguments, scale=scale).save(folder)
        model = partial(answering, out / "base", folder)
        said = {task: kept_answers(out, folder.name, task, model, "validation") for task in tasks}
        means = [scores_of(out, task, answers, "validation").mean() for task, answers in said.items()]
        tried[scale] = torch.stack(means).mean().item()
    print(f"{name}: {', '.join(f'{scale:g} {value:.3f}' for scale, value in tried.items())}", flush=True)
    return max(tried, key=tried.__getitem__)


def scores(name: str, out: Path, tasks: list[str]) -> dict[str, Tensor]:
    """Return task -> score (1 + RESAMPLES,) of a row's answers, on the test rows and on resamples that rows share."""
    reached = {}
    for task in tasks:
        adapter = {EXPERT: out / "adapters" / task, BARE: None}.get(name, out / "merged" / name)
        answers = kept_answers(out, name, task, partial(answering, out / "base", adapter))
        score = scores_of(out, task, answers)
        reached[task] = score[samples_of(len(score))].mean(-1)
    return reached


def table(out: Path, tasks: list[str], seconds: Mapping[str, float]) -> str:
    """Return a markdown table of the merges that are there: scores, mean share of fine-tuned, interval, seconds."""
    expert = scores(EXPERT, out, tasks)
    heads = ["merge", "unlabeled rows a task", *(f"{task}, {TASKS[task].metric}" for task in tasks)]
    heads += ["mean of fine-tuned", "95 % interval", "s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in {EXPERT: Merge({}, 0), BARE: Merge({}, 0), **MERGES}.items():
        if name in MERGES and not (out / "merged" / name).exists():
            continue
        reached = scores(name, out, tasks)
        mean = interval(torch.stack([reached[task] / expert[task] for task in tasks]).mean(0))
        cells = [
            name,
            "0, and 32 labels" if row.labels else f"{row.rows}",
            *(f"{reached[task][0].item():.3f}" for task in tasks),
            f"**{mean.value:.1%}**",
            f"{mean.low:.1%} to {mean.high:.1%}" if name != EXPERT else "",
            f"{seconds[name]:.0f}" if name in seconds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Make the rows named on the command line, or all, and print the table of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/answers"))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MERGES)}")
    args = parser.parse_args()
    alone_and_quiet()
    seconds = make_each(args.out, args.names or MERGES, lambda name: merge(name, args.out, args.task))
    print(table(args.out, args.task, seconds))


if __name__ == "__main__":
    main()
