"""How many shapes the steps of a merge have, how much of them is padding, and how many a graph can replay.

    python examples/shapes.py --base out/SmolLM2-135M-Instruct [--data mnli=mnli.jsonl --data rte=rte.jsonl ...]

Without ``--data``: the texts of the demo. No model is run. A shape is recorded the second time it is met, and replayed
from the third on; ``tight`` are the shapes without graphs, as they would be replayed.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tasks import write_all_unlabelled

from nsc.bases.base_model import Base
from nsc.bases.loading import load_tokenizer
from nsc.batch import Batch
from nsc.data.text import TextBatches, read_texts, tokenize
from nsc.runtime.cuda_graphs import Graphs

STEPS = 500


class Counter:
    """A device on which nothing runs: graphs of it count what would be replayed."""

    device = torch.device("cpu")

    def warm_up(self, work):
        """Do the work, as a pass without graphs does."""
        work()

    def record(self, work):
        """Return a replay of nothing."""
        return lambda: None

    def forget(self):
        """Forget nothing: nothing is kept."""


def main() -> None:
    """Print a row for each batch size, with tight shapes and with few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", action="append", metavar="TASK=FILE")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in args.data or [])
    files = given or write_all_unlabelled(Path(tempfile.mkdtemp()))
    texts = {name: read_texts(file)[:512] for name, file in files.items()}
    tokens = tokenize(load_tokenizer(Base(str(args.base))), texts, args.max_length)
    print("samples a task  shapes          tokens a step  how many  padding, mean and most  passes replayed")
    for batch_size in args.batch_size:
        for few in (False, True):
            batches = TextBatches(tokens, batch_size, 0, shares_rows=True, few_shapes=few)
            drawn = [batch for step in range(STEPS) for batch in batches(step)]
            print(f"{batch_size:14}  {'few  ' if few else 'tight'}  {row(drawn)}")


def row(batches: list[Batch]) -> str:
    """Return what these batches have in common, as a line of the table."""
    graphs = Graphs(Counter())
    for batch in batches:
        graphs(ignore, batch)
    pads = [(batch.weight == 0).double().mean().item() for batch in batches]
    shapes = {(*batch.inputs, *batch.task.shape) for batch in batches}
    tokens = sum(batch.tokens for batch in batches) / STEPS
    share = graphs.replayed / len(batches)
    return f"{tokens:20.0f}  {len(shapes):9}  {sum(pads) / len(pads):11.1%}  {max(pads):9.1%}  {share:15.1%}"


def ignore(batch: Batch) -> None:
    """Stand for the work that is counted."""


if __name__ == "__main__":
    main()
