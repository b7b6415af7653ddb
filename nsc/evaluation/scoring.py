"""How good a merged model is on labelled rows: each task's metric, by the head that its adapter carries.

    higher is better   100 x metric / metric of the adapter alone        accuracy, pearson, spearman
    lower is better    100 x metric of the adapter alone / metric        rmse, mae, loss, perplexity

A head reads the last token of a causal body and the first one of another. Where adapters carry none, a causal base's
own head says the answer that a row gives: ``loss`` is the cross-entropy of its tokens, ``perplexity`` its exponential.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc.adapters.lora import Adapter
from nsc.adapters.modules_to_save import carried_head, without_body
from nsc.bases import loading, structure
from nsc.bases.base_config import main_input
from nsc.bases.heads import Head, load_generating_head
from nsc.data.images import pixels_by
from nsc.data.labelled import Labelled
from nsc.data.packing import collate
from nsc.data.text import pad_id_of, tokenize, with_answer
from nsc.errors import DataError, NSCError
from nsc.evaluation.metrics import METRICS, OF_NUMBERS, torchmetrics_function
from nsc.runtime.placement import input_device

TOKENS, IMAGES = 4096, 32  # of one forward


class Part(NamedTuple):
    """One forward. inputs: of the body.  rows, places: (n,) the hidden states that the head reads.  truth: (n,)."""

    inputs: dict[str, Tensor]
    rows: Tensor
    places: Tensor
    truth: Tensor


@dataclass(frozen=True)
class Exam:
    """The labelled rows of one task, ready to run.  metric: of METRICS."""

    head: Head
    metric: str
    parts: list[Part]

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""
        return METRICS[self.metric].higher

    def loss(self, model: nn.Module) -> float:
        """Mean cross-entropy over classes or answer tokens; squared error where the head has one output."""
        losses = [_losses(logits, truth) for logits, truth in self._answers(model)]
        return torch.cat(losses).double().mean().item()

    def score(self, model: nn.Module) -> float:
        """The metric; NaN where it is not defined, as the correlation of a constant."""
        of = METRICS[self.metric].of
        if of is None:
            loss = self.loss(model)
            return math.exp(loss) if self.metric == "perplexity" else loss
        logits, truth = (torch.cat(found) for found in zip(*self._answers(model), strict=True))
        return of(logits, truth)

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, C) logits, in float32 at least, and (n,) truth of each forward."""
        device = input_device(model)
        for part in self.parts:
            states = model(**{name: x.to(device) for name, x in part.inputs.items()})[0]
            read = states[part.rows.to(states.device), part.places.to(states.device)]
            logits = self.head.logits(read.to(torch.promote_types(read.dtype, torch.float32)))
            yield logits, part.truth.to(logits.device)


def exams_of(
    base: str, model: nn.Module, adapters: Mapping[str, Adapter], rows: Mapping[str, Labelled], max_length: int,
    metrics: Mapping[str, str] = {},
) -> dict[str, Exam]:  # fmt: skip
    """Task -> its exam, by its adapter's own head or else the base's.

    metrics: task -> one of METRICS; by default accuracy of several outputs, pearson of one, loss of answers. Raises
    NSCError for a head, a label or a metric that do not go together, and without torchmetrics where it is needed.
    """
    vocabulary = None
    exams = {}
    for task, labelled in rows.items():
        adapter = without_body(model, adapters[task])
        carried = bool(adapter.saved)
        if not carried and vocabulary is None:
            vocabulary = Head(*load_generating_head(base, model))
        head = carried_head(adapter) if carried else vocabulary
        assert head is not None
        metric = metrics.get(task, _usual(head) if carried else "loss")
        _require_fit(task, metric, head, labelled.labels, carried)
        exams[task] = Exam(head, metric, _parts(base, model, task, labelled, head, carried, max_length))
    return exams


def _usual(head: Head) -> str:
    return "pearson" if len(head.weight) == 1 else "accuracy"


def _losses(logits: Tensor, truth: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return (logits[:, 0] - truth).square()
    return F.cross_entropy(logits, truth.long(), reduction="none")


def _require_fit(task: str, metric: str, head: Head, labels: Sequence[Any], carried: bool) -> None:
    if metric not in METRICS:
        raise NSCError(f"there is no metric {metric} (task {task}); there are {', '.join(METRICS)}")
    outputs = len(head.weight)
    if METRICS[metric].of and not carried:
        raise NSCError(f"task {task}: {metric} needs an adapter with a head; of answers there are loss and perplexity")
    if (metric in OF_NUMBERS and outputs != 1) or (metric == "accuracy" and outputs == 1):
        raise NSCError(f"task {task}: {metric} does not go with a head of {outputs} outputs; choose another metric")
    if METRICS[metric].of:
        torchmetrics_function("accuracy")  # before anything is run
    for number, label in enumerate(labels, start=1):
        if not carried and not isinstance(label, str):
            raise DataError(f"task {task}, labelled row {number}: the answer {label!r} is no text")
        if carried and (isinstance(label, (str, bool)) or not isinstance(label, (int, float))):
            raise DataError(f"task {task}, labelled row {number}: the label {label!r} is no number")
        if carried and outputs > 1 and not (label == int(label) and 0 <= label < outputs):
            raise DataError(f"task {task}, labelled row {number}: class {label!r} of a head of {outputs} outputs")


def _parts(
    base: str, model: nn.Module, task: str, rows: Labelled, head: Head, carried: bool, max_length: int
) -> list[Part]:
    if main_input(base) == "pixel_values":
        return _image_parts(base, model, rows)
    tokenizer, causal = loading.load_tokenizer(base), structure.is_causal(model)
    tokens = tokenize(tokenizer, {task: rows.samples}, max_length)[task]
    if carried:
        reads = [[len(ids) - 1] if causal else [0] for ids in tokens]
        truth: list[list[Any]] = [[label] for label in rows.labels]
    else:
        truth = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in rows.labels]
        if empty := [i for i, ids in enumerate(truth, start=1) if not ids]:
            raise DataError(f"task {task}, labelled row {empty[0]}: the answer has no token")
        pairs = [with_answer(ids, answer, "full") for ids, answer in zip(tokens, truth, strict=True)]
        tokens, reads = [ids for ids, _ in pairs], [list(range(*at.indices(len(ids)))) for ids, at in pairs]
    pad_id = pad_id_of(tokenizer)
    return [
        _part(collate([tokens[i] for i in alike], [0] * len(alike), pad_id, causal).inputs,
              [reads[i] for i in alike], [truth[i] for i in alike])
        for alike in _by_length([len(ids) for ids in tokens])
    ]  # fmt: skip


def _image_parts(base: str, model: nn.Module, rows: Labelled) -> list[Part]:
    pixels = pixels_by(loading.load_image_processor(base), next(model.parameters()).dtype)
    parts = []
    for at in range(0, len(rows.samples), IMAGES):
        images, labels = rows.samples[at : at + IMAGES], rows.labels[at : at + IMAGES]
        inputs = {"pixel_values": torch.stack([pixels(image) for image in images])}
        parts.append(_part(inputs, [[0]] * len(images), [[label] for label in labels]))
    return parts


def _part(inputs: dict[str, Tensor], reads: list[list[int]], truth: list[list[Any]]) -> Part:
    rows = torch.tensor([r for r, places in enumerate(reads) for _ in places])
    places = torch.tensor([place for found in reads for place in found])
    return Part(inputs, rows, places, torch.tensor([float(value) for found in truth for value in found]))


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of samples of like lengths, in groups of at most TOKENS tokens with their padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = []
    while order:
        rows = max(1, TOKENS // lengths[order[0]])
        groups.append(order[:rows])
        order = order[rows:]
    return groups
