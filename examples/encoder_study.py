"""Methods by number of tasks and of unlabeled rows: the tables of docs/choosing.md, made on the encoder suite.

    python examples/encoder_suite.py train --data DIR --out out/encoder
    python examples/encoder_study.py --out out/encoder [--tasks 2 4 8] [--rows 4 16 64 256] [--methods ...]

Each cell is one ``nsc.merge`` of the first K tasks of ORDER from so many unlabeled rows a task, written, proven, and
scored by transformers and PEFT alone. What is there already is not made again: OUT/study/results.json.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from encoder_merges import unlabeled
from encoder_suite import MAX_LENGTH, TASKS, Exam, alone_and_quiet, exam_of, score

import nsc

ORDER = ("snli", "trec", "relatedness", "emotion", "scitail", "sst5", "qnli", "sick")
METHODS = {
    "sum": {"method": "task-arithmetic", "search": "match"},
    "tsv": {"method": "tsv", "search": "match"},
    "regmean": {"method": "regmean", "search": "match"},
    "nsc": {"method": "nsc"},
    "match-layer": {"method": "match-layer"},
    "match": {"method": "match"},
    "match-factors": {"method": "match-factors"},
}


def study(out: Path, counts: list[int], sizes: list[int], methods: list[str], dtype: str) -> dict[str, dict]:
    """Make and score every merge that is not there yet, and return all: "K/rows/method" -> shares and seconds."""
    file = out / "study/results.json"
    file.parent.mkdir(exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    exams = {task: exam_of(out, task) for task in ORDER[: max(counts)]}
    for count in counts:
        tasks = {task: exams[task] for task in ORDER[:count]}
        found.setdefault(f"{count}/0/heads alone", shares(out / "base", out, tasks))
        for key, rows, method in ((f"{count}/{n}/{m}", n, m) for n in sizes for m in methods):
            if key in found:
                continue
            folder = file.with_name("merged")
            started = time.perf_counter()
            merge(folder, out, list(tasks), rows, method, dtype)
            seconds = time.perf_counter() - started
            found[key] = shares(folder, out, tasks) | {"seconds": seconds, "dtype": dtype}
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(key, {name: f"{value:.3g}" for name, value in found[key].items() if name != "dtype"}, flush=True)
    return found


def merge(folder: Path, out: Path, tasks: list[str], rows: int, method: str, dtype: str) -> None:
    """Merge these tasks from so many rows of each, and save the adapter in place of an earlier one."""
    adapters = {task: out / "adapters" / task for task in tasks}
    data = {task: unlabeled(out, task, rows) for task in tasks}
    settings = {"max_length": MAX_LENGTH, "dtype": dtype, "progress": False}
    result = nsc.merge(out / "base", adapters, data, **settings, **METHODS[method])
    shutil.rmtree(folder, ignore_errors=True)
    result.save(folder)


def shares(merged: Path, out: Path, exams: dict[str, Exam]) -> dict[str, float]:
    """Score a merge: mean share of fine-tuned, its interval, and the share of the worst task."""
    found = score(merged, out / "base", exams)[1]
    mean = found.pop("mean")
    worst = min(share.value for share in found.values())
    return {"mean": mean.value, "low": mean.low, "high": mean.high, "worst": worst}


def tables(found: dict[str, dict], counts: list[int], sizes: list[int], methods: list[str]) -> str:
    """Return a markdown table for each number of tasks: methods by rows, the interval in brackets."""
    lines = []
    for count in counts:
        alone = found[f"{count}/0/heads alone"]["mean"]
        lines += [f"\n{count} tasks: {', '.join(ORDER[:count])}; heads alone {alone:.1%}\n"]
        lines += [f"| rows a task | {' | '.join(map(str, sizes))} |", "|---" * (1 + len(sizes)) + "|"]
        for method in methods:
            cells = [found.get(f"{count}/{rows}/{method}") for rows in sizes]
            texts = [f"{c['mean']:.1%} ({c['low']:.1%} to {c['high']:.1%})" if c else "" for c in cells]
            lines.append(f"| `{method}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Make the cells asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/encoder"))
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8], help=f"how many of the {len(TASKS)}")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    alone_and_quiet()
    found = study(args.out, args.tasks, args.rows, args.methods, args.dtype)
    print(tables(found, args.tasks, args.rows, args.methods))


if __name__ == "__main__":
    main()
