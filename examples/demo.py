"""Merge five real adapters of a real language model by NSC and by match, score both, prove what was written.

    make demo        or, with the packages at hand:        python examples/demo.py [--out out/demo] [--steps 100]

The base is SmolLM2-135M-Instruct out of a PyPI wheel, the adapters lie in ``examples/adapters``, the unlabeled texts
come from PyPI packages. The plain sum gets the best single scale, chosen with the test labels: more than NSC is given.
"""

import argparse
import shutil
import time
from pathlib import Path

from compare import compare, text_scorer
from smollm2 import NAME, prepare_base
from tasks import ADAPTERS, first_test_rows, write_all_unlabelled

import nsc

ROWS, MAX_LENGTH = 200, 32  # rows of each task's 400 test rows, to stay within minutes on two cores


def main() -> None:
    """Prepare the base and the texts, merge, compare, export and prove the export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="results; made anew")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    began = time.perf_counter()
    shutil.rmtree(args.out, ignore_errors=True)
    base = prepare_base(args.out.parent / NAME)
    data = write_all_unlabelled(args.out / "data")
    result = nsc.merge(base, ADAPTERS, data, steps=args.steps, lr=args.lr, batch_size=4, max_length=MAX_LENGTH)
    matched = nsc.merge(base, ADAPTERS, data, method="match", max_length=MAX_LENGTH)
    table, _ = compare(text_scorer(result, base, first_test_rows(ROWS), MAX_LENGTH), others={"match": matched})
    proof = result.save(args.out / "merged")
    print(f"\n{table}\n\nproof: {proof}\nproof: {matched.save(args.out / 'matched')}")
    print(f"merged adapter, report and heat map: {args.out / 'merged'} ({time.perf_counter() - began:.0f} s in all)")


if __name__ == "__main__":
    main()
