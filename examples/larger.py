"""The demo's comparison on any folder of classification and regression adapters with their data.

    python examples/larger.py --base out/SmolLM2-135M-Instruct --adapters DIR --data DIR [--task NAME ...]

Each adapter folder holds a ``metrics.json`` naming its dataset and metric; the data folder ``DATASET_train.jsonl``
(read without labels) and ``DATASET_test.jsonl``: objects with ``text`` or ``text_a`` and ``text_b``, and a label.
"""

import argparse
import json
import random
from pathlib import Path

from compare import Exam, compare

import nsc


def main() -> None:
    """Merge, compare, and save where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", nargs="+", help="default: every folder of adapters")
    parser.add_argument("--rows", type=int, default=200, help="test rows a task, the first after a seeded shuffle")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = args.task or sorted(path.name for path in args.adapters.iterdir() if path.is_dir())
    about = {name: json.loads((args.adapters / name / "metrics.json").read_text()) for name in names}
    adapters = {name: args.adapters / name for name in names}
    data = {name: args.data / f"{about[name]['dataset']}_train.jsonl" for name in names}
    result = nsc.merge(args.base, adapters, data, steps=args.steps, lr=args.lr, max_length=96)
    exams = {name: read_exam(args.data, about[name], args.rows) for name in names}
    print(f"\n{compare(result, args.base, exams)}\n")
    if args.out:
        print(f"proof: {result.save(args.out)}")


def read_exam(data: Path, about: dict, count: int) -> Exam:
    """The first ``count`` test rows after the shuffle that the adapters' own scores were taken with."""
    rows = [json.loads(line) for line in (data / f"{about['dataset']}_test.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    label = "label" if about["metric"] == "accuracy" else "score"
    texts = [row["text"] if "text" in row else f"{row['text_a']}\n{row['text_b']}" for row in rows]
    labelled = [(text, row[label]) for text, row in zip(texts, rows, strict=True)]
    return Exam(about["metric"], labelled[:count], max_tokens=96)


if __name__ == "__main__":
    main()
