"""The demo's comparison, NSC and match, on any folder of classification and regression adapters with their data.

    python examples/larger.py --base out/SmolLM2-135M-Instruct --adapters DIR --data DIR [--task NAME ...]

Each adapter folder holds a ``metrics.json`` naming its dataset and metric, and of a regression the mean and deviation
of its labels in training. The data folder holds ``DATASET_train.jsonl`` (read without labels) and
``DATASET_test.jsonl``: objects with ``text``, or with ``text_a`` and ``text_b``, and a label.
"""

import argparse
from pathlib import Path

from compare import compare, text_scorer
from labelled import read_about, shuffled

import nsc

MAX_LENGTH = 96


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
    about = read_about(args.adapters, args.task)
    adapters = {name: args.adapters / name for name in about}
    data = {name: args.data / f"{told['dataset']}_train.jsonl" for name, told in about.items()}
    result = nsc.merge(args.base, adapters, data, steps=args.steps, lr=args.lr, max_length=MAX_LENGTH)
    tests = {name: shuffled(args.data / f"{told['dataset']}_test.jsonl", told) for name, told in about.items()}
    rows = {name: [(row["text"], row["label"]) for row in test[: args.rows]] for name, test in tests.items()}
    matched = nsc.merge(args.base, adapters, data, method="match", max_length=MAX_LENGTH)
    table, _ = compare(text_scorer(result, args.base, rows, MAX_LENGTH), others={"match": matched})
    print(f"\n{table}\n")
    if args.out:
        print(f"proof: {result.save(args.out)}\nproof: {matched.save(args.out.with_name(f'{args.out.name}-match'))}")


if __name__ == "__main__":
    main()
