"""Test, validation and unlabelled rows for ``nsc compare``, of adapters laid out as in examples/larger.py.

    python examples/labelled.py --adapters DIR --data DIR --out out/rows [--test 200 --validation 32]

Test rows are the first of ``DATASET_test.jsonl`` after a seeded shuffle, those of the adapters' own scores. Validation
rows and unlabelled ones come from ``DATASET_train.jsonl``, without a row in common, nor any text of the test. Labels of
a regression are standardised as in training.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path


def main() -> None:
    """Write TASK_test.jsonl, TASK_validation.jsonl and TASK_unlabelled.jsonl for every folder of adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--unlabelled", type=int, default=512)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, about in read_about(args.adapters).items():
        test = shuffled(args.data / f"{about['dataset']}_test.jsonl", about)[: args.test]
        asked = {row["text"] for row in test}
        train = shuffled(args.data / f"{about['dataset']}_train.jsonl", about)
        train = [row for row in train if row["text"] not in asked]
        rest = [{"text": row["text"]} for row in train[args.validation :][: args.unlabelled]]
        for kind, rows in {"test": test, "validation": train[: args.validation], "unlabelled": rest}.items():
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            (args.out / f"{name}_{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_about(adapters: Path, names: Iterable[str] | None = None) -> dict[str, dict]:
    """Return what ``metrics.json`` tells of each adapter in these folders below ``adapters``, by default in all."""
    names = names or sorted(path.name for path in adapters.iterdir() if path.is_dir())
    return {name: json.loads((adapters / name / "metrics.json").read_text()) for name in names}


def shuffled(file: Path, about: dict) -> list[dict]:
    """Return text and label of each row, in the seeded order that the adapters' own scores were taken in."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [{"text": text_of(row), "label": label_of(row, about)} for row in rows]


def text_of(row: dict) -> str:
    """Return a row's text as the adapters read it: two texts are joined by a newline."""
    return row["text"] if "text" in row else f"{row['text_a']}\n{row['text_b']}"


def label_of(row: dict, about: dict) -> float:
    """Return a row's class, or its score standardised as in training."""
    if about["metric"] == "accuracy":
        return row["label"]
    return (row["score"] - about["target_mean"]) / about["target_std"]


if __name__ == "__main__":
    main()
