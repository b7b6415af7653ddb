"""Merges of the encoder suite by every kind of method: the table of docs/results.md, "Matching the experts".

    python examples/encoder_suite.py train --data DIR --out out/encoder
    python examples/encoder_merges.py --out out/encoder [NAME ...]

Each row is one ``nsc.merge``, written to OUT/merged/NAME and proven, and then scored by transformers and PEFT alone
(``encoder_suite.py score``). A row that is there already is only scored. The unlabeled rows are those that no expert
was trained on; labels are read by the rows whose scale is searched by them, 64 a task.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from encoder_suite import MAX_LENGTH, TASKS, alone_and_quiet, exam_of, score

import nsc

RECORD = "seconds.json"


class Merge(NamedTuple):
    """One row: the arguments of ``nsc.merge``, unlabeled rows a task, and whether the whole model is written."""

    arguments: dict[str, Any]
    rows: int = 256
    full: bool = False


LABELS = {"search": "labels"}
FACTORS_16 = {"method": "match-factors", "factor_rank": 16, "steps": 480}
MERGES = {
    "sum-labels": Merge({"method": "task-arithmetic", **LABELS}, 0),
    "tsv-labels": Merge({"method": "tsv", **LABELS}, 0),
    "ties-labels": Merge({"method": "ties", **LABELS}, 0, full=True),
    "core-ties-labels": Merge({"method": "core-ties", **LABELS}, 0),
    "adamerging": Merge({"method": "adamerging"}),
    "regmean-labels": Merge({"method": "regmean", **LABELS}, 64),
    "nsc": Merge({"method": "nsc"}),
    "nsc-stop": Merge({"method": "nsc", "stop": "match", "max_drift": None}),
    "sum-match": Merge({"method": "task-arithmetic", "search": "match"}, 64),
    "tsv-match": Merge({"method": "tsv", "search": "match"}, 64),
    "ties-match": Merge({"method": "ties", "search": "match"}, 64, full=True),
    "ssr-match": Merge({"method": "ssr", "search": "match"}, 64),
    "regmean-match": Merge({"method": "regmean", "search": "match"}, 64),
    "zero-interference-match": Merge({"method": "zero-interference", "search": "match"}, 64),
    "regmean": Merge({"method": "regmean", "search": "none"}),
    "regmean-below": Merge({"method": "regmean++", "search": "none"}),
    "iteris": Merge({"method": "iteris", "rounds": 3, "search": "none"}),
    "featcal": Merge({"method": "featcal"}),
    "match-layer": Merge({"method": "match-layer"}),
    "match-layer-borrowing": Merge({"method": "match-layer", "borrow_rows": 256}),
    "match-layer-from-regmean": Merge({"method": "match-layer", "start_from": "regmean"}),
    "match": Merge({"method": "match"}),
    "match-borrowing": Merge({"method": "match", "borrow_rows": 256}),
    "match-from-ssr": Merge({"method": "match", "start_from": "ssr"}),
    "match-64": Merge({"method": "match"}, 64),
    "match-64-own-rows": Merge({"method": "match", "borrow_rows": 0}, 64),
    "match-16": Merge({"method": "match"}, 16),
    "match-16-own-rows": Merge({"method": "match", "borrow_rows": 0}, 16),
    "match-4": Merge({"method": "match"}, 4),
    "match-layer-16": Merge({"method": "match-layer"}, 16),
    "factors-32": Merge({"method": "match-factors", "factor_rank": 32}),
    "factors-32-borrowing": Merge({"method": "match-factors", "factor_rank": 32, "borrow_rows": 256}),
    "factors-32-from-ssr": Merge({"method": "match-factors", "factor_rank": 32, "start_from": "ssr"}),
    "factors-32-16": Merge({"method": "match-factors", "factor_rank": 32}, 16),
    "factors-16-1024": Merge({"method": "match-factors", "factor_rank": 16, "steps": 480}, 1024),
    "factors-16-1024-borrowing": Merge(
        {"method": "match-factors", "factor_rank": 16, "steps": 480, "borrow_rows": 1024}, 1024
    ),
    "auto": Merge({"method": "auto"}),
}


def merge(name: str, out: Path, tasks: list[str], dtype: str) -> float:
    """Merge and save one row, and return the seconds that the merge took, without saving and proof."""
    row = MERGES[name]
    adapters = {task: out / "adapters" / task for task in tasks}
    labelled = {task: out / f"validation/{task}.jsonl" for task in tasks}
    arguments = row.arguments | ({"validation": labelled} if row.arguments.get("search") == "labels" else {})
    rows = {task: unlabeled(out, task, row.rows) for task in tasks} if row.rows else None
    started = time.perf_counter()
    result = nsc.merge(out / "base", adapters, rows, max_length=MAX_LENGTH, dtype=dtype, progress=False, **arguments)
    seconds = time.perf_counter() - started
    result.save(out / "merged" / name, full=row.full)
    return seconds


def unlabeled(out: Path, task: str, count: int) -> list[str]:
    """Return the first ``count`` texts of a task that no expert was trained on."""
    lines = (out / f"unlabeled/{task}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["text"] for line in lines]


def make_each(out: Path, names: Iterable[str], make: Callable[[str], float]) -> dict[str, float]:
    """Make the merges that are not there yet, and return the seconds of each, kept in OUT/merged/seconds.json."""
    file = out / "merged" / RECORD
    file.parent.mkdir(parents=True, exist_ok=True)
    seconds = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        if not (out / "merged" / name).exists():
            seconds[name] = make(name)
            file.write_text(json.dumps(seconds, indent=1) + "\n")
            print(f"{name}: {seconds[name]:.1f} s", flush=True)
    return seconds


def table(out: Path, tasks: list[str], seconds: Mapping[str, float]) -> str:
    """Return a markdown table of the merges that are there: share of fine-tuned, interval, worst task, seconds."""
    exams = {task: exam_of(out, task) for task in tasks}
    heads = ("merge", "unlabeled rows a task", "mean of fine-tuned", "95 % interval", "worst task", "s")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in {"heads alone": Merge({}, 0), **MERGES}.items():
        folder = out / "base" if name == "heads alone" else out / "merged" / name
        if not folder.exists():
            continue
        shares = score(folder, out / "base", exams)[1]
        mean = shares.pop("mean")
        worst = min(shares, key=lambda task: shares[task].value)
        cells = [
            name,
            f"{row.rows}" + (", and 64 labels" if row.arguments.get("search") == "labels" else ""),
            f"**{mean.value:.1%}**",
            f"{mean.low:.1%} to {mean.high:.1%}",
            f"{worst} {shares[worst].value:.1%}",
            f"{seconds[name]:.0f}" if name in seconds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Make the rows named on the command line, or all, and print the table of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/encoder"))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtype", default="float32", help="of the base while merging; scores are in float32")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MERGES)}")
    args = parser.parse_args()
    alone_and_quiet()
    seconds = make_each(args.out, args.names or MERGES, lambda name: merge(name, args.out, args.task, args.dtype))
    print(table(args.out, args.task, seconds))


if __name__ == "__main__":
    main()
