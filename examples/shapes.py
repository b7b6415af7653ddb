"""How many shapes the steps of a merge have, how much of them is padding, and how many a graph can replay.

    python examples/shapes.py --base out/SmolLM2-135M-Instruct [--data mnli=mnli.jsonl --data rte=rte.jsonl ...]

Without ``--data``: the texts of the demo. No model is run. A shape is recorded the second time it is met, and replayed
from the third on; ``tight`` are the shapes without graphs, as they would be replayed.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tasks import TASKS, write_unlabelled

from nsc.bases.base_model import Base
from nsc.bases.loading import load_tokenizer
from nsc.batch import Batch
from nsc.data.text import TextBatches, read_texts, tokenize
from nsc.runtime.cuda_graphs import Graphs

STEPS = 500


class Counter:
    """Counts what would be replayed."""

    device = torch.device("cpu")

    def warm_up(self, work):
        """As the eager pass that it is."""
        work()

    def record(self, work):
        """Nothing to replay."""
        return lambda: None

    def forget(self):
        """Nothing is kept."""


def main() -> None:
    """Print a row for each batch size, with tight shapes and with few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", action="append", metavar="TASK=FILE")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    files = dict(pair.split("=", 1) for pair in args.data or []) or {
        name: write_unlabelled(task, folder / f"{name}.jsonl") for name, task in TASKS.items()
    }
    texts = {name: read_texts(file)[:512] for name, file in files.items()}
    tokens = tokenize(load_tokenizer(Base(str(args.base))), texts, args.max_length)
    print("samples a task  shapes          tokens a step  how many  padding, mean and most  passes replayed")
    for batch_size in args.batch_size:
        for few in (False, True):
            batches = TextBatches(tokens, batch_size, 0, shares_rows=True, few_shapes=few)
            print(
                f"{batch_size:14}  {'few  ' if few else 'tight'}  {row([b for s in range(STEPS) for b in batches(s)])}"
            )


def row(batches: list[Batch]) -> str:
    """What these batches have in common."""
    graphs = Graphs(Counter())
    for batch in batches:
        graphs(ignore, batch)
    pads = [(batch.weight == 0).double().mean().item() for batch in batches]
    shapes = {(*batch.inputs, *batch.task.shape) for batch in batches}
    tokens = sum(batch.tokens for batch in batches) / STEPS
    share = graphs.replayed / len(batches)
    return f"{tokens:20.0f}  {len(shapes):9}  {sum(pads) / len(pads):11.1%}  {max(pads):9.1%}  {share:15.1%}"


def ignore(batch: Batch) -> None:
    """The work that is counted."""


if __name__ == "__main__":
    main()
