"""How good a merged model is on labelled rows: each task's metric, by the head that its adapter carries.

    higher is better   100 x metric / metric of the adapter alone        accuracy, pearson, spearman
    lower is better    100 x metric of the adapter alone / metric        rmse, mae, loss, perplexity

A head reads the tokens that its class of transformers pools. Where adapters carry none, a causal base's own head
says the answer that a row gives: ``loss`` is the cross-entropy of its tokens, ``perplexity`` its exponential.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc.adapters.lora import Adapter
from nsc.adapters.modules_to_save import without_body
from nsc.bases import loading, structure
from nsc.bases.base_model import Base
from nsc.bases.heads import load_generating_head
from nsc.bases.task_head import TaskHead, load_task_head, vocabulary_head
from nsc.batch import Batch
from nsc.data.expected import Output, expected
from nsc.data.images import collate_images, pixels_by
from nsc.data.labelled import Labelled
from nsc.data.packing import collate
from nsc.data.text import pad_id_of, tokenize, with_answer
from nsc.errors import DataError, NSCError
from nsc.evaluation.metrics import METRICS, OF_NUMBERS, torchmetrics_function
from nsc.learning.agreement import outputs_of
from nsc.learning.teachers import spans_of
from nsc.runtime.placement import input_device

TOKENS, IMAGES = 4096, 32  # of one forward


class Part(NamedTuple):
    """One forward of labelled rows.

    Attributes:
        batch: rows on the CPU, with the places that a head reads.
        truth: (n,) the class, number or token that is true in each of them.
    """

    batch: Batch
    truth: Tensor


@dataclass(frozen=True)
class Exam:
    """The labelled rows of one task, ready to run.

    Attributes:
        head: the head that reads hidden states.
        metric: one of METRICS.
        parts: one for each forward.
    """

    head: TaskHead
    metric: str
    parts: list[Part]

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""
        return METRICS[self.metric].higher

    def loss(self, model: nn.Module) -> float:
        """Return the mean loss on the labelled rows.

        Args:
            model: body of the base, carrying a merge or not.

        Returns:
            Cross-entropy over classes or answer tokens, in nats; squared error where the head has one output.
        """
        losses = [_losses(logits, truth) for logits, truth in self._answers(model)]
        return torch.cat(losses).double().mean().item()

    def score(self, model: nn.Module) -> float:
        """Return the metric on the labelled rows.

        Args:
            model: body of the base, carrying a merge or not.

        Returns:
            The metric; NaN where it is not defined, such as the correlation of a constant.
        """
        of = METRICS[self.metric].of
        if of is None:
            loss = self.loss(model)
            return math.exp(loss) if self.metric == "perplexity" else loss
        logits, truth = (torch.cat(part) for part in zip(*self._answers(model), strict=True))
        return of(logits, truth)

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, C) logits, in float32 at least, and (n,) truth of each forward."""
        device, dtype = input_device(model), next(model.parameters()).dtype
        for part in self.parts:
            batch = part.batch.to(device)
            outputs = outputs_of(self.head, model(**batch.arguments(dtype))[0], batch)
            assert part.batch.expected is not None
            there = (part.batch.expected.weight > 0).flatten().to(outputs.device)
            yield outputs[there], part.truth.to(outputs.device)


def exams_of(
    base: Base,
    adapters: Mapping[str, Adapter],
    rows: Mapping[str, Labelled],
    max_length: int,
    metrics: Mapping[str, str] = {},
) -> dict[str, Exam]:
    """Prepare the labelled rows of every task for its adapter's own head, or else for the base's.

    Args:
        base: with weights.
        adapters: task -> adapter.
        rows: task -> labelled rows.
        max_length: tokens of a sample, at most.
        metrics: task -> one of METRICS; by default accuracy for several outputs, pearson for one, loss for answers.

    Returns:
        Task -> its exam.

    Raises:
        NSCError: for a head, label or metric that do not go together, and without torchmetrics where it is needed.
    """
    vocabulary: TaskHead | None = None
    exams = {}
    for task, labelled in rows.items():
        adapter = without_body(base.model, adapters[task])
        carried = bool(adapter.saved)
        if not carried and vocabulary is None:
            vocabulary = vocabulary_head(load_generating_head(base))
        head = load_task_head(base, adapter.saved, task) if carried else vocabulary
        assert head is not None
        metric = metrics.get(task, _usual(head) if carried else "loss")
        _require_fit(task, metric, head, labelled.labels, carried)
        exams[task] = Exam(head, metric, _parts(base, task, labelled, head, carried, max_length))
    return exams


def _usual(head: TaskHead) -> str:
    return "pearson" if head.outputs == 1 else "accuracy"


def _losses(logits: Tensor, truth: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return (logits[:, 0] - truth).square()
    return F.cross_entropy(logits, truth.long(), reduction="none")


def _require_fit(task: str, metric: str, head: TaskHead, labels: Sequence[Any], carried: bool) -> None:
    if metric not in METRICS:
        raise NSCError(f"unknown metric {metric} (task {task}); known metrics: {', '.join(METRICS)}")
    outputs = head.outputs
    if METRICS[metric].of and not carried:
        raise NSCError(f"task {task}: {metric} needs an adapter with a head; answers are scored by loss or perplexity")
    if (metric in OF_NUMBERS and outputs != 1) or (metric == "accuracy" and outputs == 1):
        raise NSCError(f"task {task}: {metric} does not fit a head with {outputs} outputs; choose another metric")
    if METRICS[metric].of:
        torchmetrics_function("accuracy")  # before anything is run
    for number, label in enumerate(labels, start=1):
        if not carried and not isinstance(label, str):
            raise DataError(f"task {task}, labelled row {number}: the answer {label!r} is not a text")
        if carried and (isinstance(label, (str, bool)) or not isinstance(label, (int, float))):
            raise DataError(f"task {task}, labelled row {number}: the label {label!r} is not a number")
        if carried and outputs > 1 and not (label == int(label) and 0 <= label < outputs):
            raise DataError(f"task {task}, labelled row {number}: class {label!r}, but the head has {outputs} outputs")


def _parts(base: Base, task: str, rows: Labelled, head: TaskHead, carried: bool, max_length: int) -> list[Part]:
    if base.takes == "pixel_values":
        return _image_parts(base, rows)
    tokenizer, causal = loading.load_tokenizer(base), structure.is_causal(base.model)
    tokens = tokenize(tokenizer, {task: rows.samples}, max_length)[task]
    if carried:
        reads = [spans_of(head, slice(0, len(ids))) for ids in tokens]
        truth: list[list[Any]] = [[label] for label in rows.labels]
    else:
        truth = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in rows.labels]
        if empty := [i for i, ids in enumerate(truth, start=1) if not ids]:
            raise DataError(f"task {task}, labelled row {empty[0]}: the answer has no token")
        pairs = [with_answer(ids, answer, "full") for ids, answer in zip(tokens, truth, strict=True)]
        tokens, reads = [ids for ids, _ in pairs], [spans_of(head, at) for _, at in pairs]
    pad_id = pad_id_of(tokenizer)
    return [
        _part(
            collate([tokens[i] for i in alike], [0] * len(alike), pad_id, causal),
            [reads[i] for i in alike],
            [truth[i] for i in alike],
        )
        for alike in _by_length([len(ids) for ids in tokens])
    ]


def _image_parts(base: Base, rows: Labelled) -> list[Part]:
    pixels = pixels_by(loading.load_image_processor(base), next(base.model.parameters()).dtype)
    parts = []
    for at in range(0, len(rows.samples), IMAGES):
        images, labels = rows.samples[at : at + IMAGES], rows.labels[at : at + IMAGES]
        batch = collate_images([pixels(image) for image in images], [0] * len(images), 1)
        parts.append(_part(batch, [[(0, 1)]] * len(images), [[label] for label in labels]))
    return parts


def _part(batch: Batch, reads: list[list[tuple[int, int]]], truth: list[list[Any]]) -> Part:
    """reads: spans of tokens of each row."""
    outputs = [Output(spans, torch.zeros(len(spans), 1)) for spans in reads]
    rows, starts = [[i] for i in range(len(reads))], dict.fromkeys(range(len(reads)), 0)
    shape = len(reads), max(map(len, reads))
    places = expected(rows, starts, [0] * len(reads), outputs, torch.tensor([len(reads)]), shape)
    return Part(replace(batch, expected=places), torch.tensor([float(value) for row in truth for value in row]))


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of samples of like lengths, in groups of at most TOKENS tokens with their padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = []
    while order:
        rows = max(1, TOKENS // lengths[order[0]])
        groups.append(order[:rows])
        order = order[rows:]
    return groups
