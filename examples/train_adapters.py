"""Train one LoRA adapter per task of tasks.py on SmolLM2-135M-Instruct: minutes each on one CPU core.

    python examples/smollm2.py BASE
    python examples/train_adapters.py --base BASE --out examples/adapters

The time decides the number of steps, so a faster machine trains better ones.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from smollm2 import NAME
from tasks import TASKS, Row, Split, Task, load
from torch import Tensor
from torch.nn import functional as F
from training import descend, warmed_up
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

import nsc

LEARNING_RATE, BATCH, MAX_LENGTH = 6e-4, 48, 32


def build(base: Path, task: Task) -> PeftModel:
    """Return a classifier with a LoRA: the frozen base in bfloat16, what is trained in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=task.num_labels, dtype=torch.bfloat16)
    # PEFT saves the head ("score") of a SEQ_CLS model with the adapter
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def train(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], minutes: float) -> int:
    """Train for ``minutes``, the learning rate falling to zero over them, and return the number of steps."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": LEARNING_RATE}]
    drawn = shuffled(rows, random.Random(0))

    def loss() -> Tensor:
        texts, labels = next(drawn)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**tokenize(tokenizer, texts)).logits
        return loss_of(task, logits.float(), torch.tensor(labels))

    return descend(task.name, groups, loss, rates_for(minutes), clip=1.0, every=25)


def rates_for(minutes: float) -> Iterator[float]:
    """Yield the share of the learning rate that is due, until the time is over."""
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield warmed_up(progress)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """Return token ids and attention mask of ``texts``, padded on the right."""
    return tokenizer(
        list(texts), padding=True, padding_side="right", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )


def loss_of(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy for classes, or the mean squared error for a number."""
    return F.cross_entropy(logits, labels.long()) if task.metric == "accuracy" else F.mse_loss(logits[:, 0], labels)


def shuffled(rows: list[Row], rng: random.Random) -> Iterator[tuple[list[str], list[float]]]:
    """Yield batches without end, each of texts of similar length, so that little is padding."""
    while True:
        for chunk_start in range(0, len(order := rng.sample(rows, len(rows))), 16 * BATCH):
            chunk = sorted(order[chunk_start : chunk_start + 16 * BATCH], key=lambda row: len(row[0]))
            batches = [tuple(map(list, zip(*chunk[i : i + BATCH], strict=True))) for i in range(0, len(chunk), BATCH)]
            yield from rng.sample(batches, len(batches))


def save(model: PeftModel, out: Path) -> None:
    """Write the adapter, in float16, and nothing else."""
    shutil.rmtree(out, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = NAME
    model.save_pretrained(out, save_embedding_layers=False)  # "auto" would ask the hub for the base
    (out / "README.md").unlink(missing_ok=True)
    weights = out / "adapter_model.safetensors"
    save_file({name: t.half() for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})


def report(base: Path, adapter: Path, task: Task, split: Split) -> dict[str, object]:
    """Return the score of a saved adapter on the test rows beside the floor: what the best constant answer gets."""
    most_common = Counter(label for _, label in split.test).most_common(1)[0][1]
    return {
        "task": task.name,
        "metric": task.metric,
        "value": round(score(base, adapter, task, split.test), 4),
        "floor": round(most_common / len(split.test), 4) if task.metric == "accuracy" else 0.0,
        "n_train": len(split.train),
        "n_test": len(split.test),
        "mean": split.mean,
        "std": split.std,
    }


def score(base: Path, adapter: Path, task: Task, rows: list[Row]) -> float:
    """Return the metric of an adapter on ``rows``, with its base in bfloat16."""
    config = {"dtype": "bfloat16", "device": "cpu", "max_length": MAX_LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        compared = nsc.compare(
            base,
            {task.name: adapter},
            data={},
            test={task.name: rows},
            methods=[],
            out=Path(folder) / "compared",
            metrics={task.name: task.metric},
            config=config,
            progress=False,
        )
    return compared.row("fine-tuned").scores[task.name]


def train_adapter(base: Path, out: Path, task: Task, minutes: float) -> None:
    """Train, score and save the adapter of one task."""
    torch.manual_seed(list(TASKS).index(task.name))  # one seed for all would give every adapter the same row space
    tokenizer, split = AutoTokenizer.from_pretrained(base), load(task)
    model = build(base, task)
    start = time.monotonic()
    steps = train(model, tokenizer, task, split.train, minutes)
    seconds = round(time.monotonic() - start)
    save(model, out / task.name)
    metrics = report(base, out / task.name, task, split) | {"steps": steps, "seconds": seconds}
    (out / task.name / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(metrics, flush=True)


def main() -> None:
    """Train the tasks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder written by smollm2.py")
    parser.add_argument("--out", type=Path, required=True, help="one folder per task is written here")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=5.5, help="per task")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.task:
        train_adapter(args.base, args.out, TASKS[name], args.minutes)


if __name__ == "__main__":
    main()
