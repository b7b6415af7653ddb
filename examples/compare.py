"""A merge against its adapters alone and against their plain sum at its best single scale, task by task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from shares import SCALES, Scores, best_sum, format_table
from torch import Tensor, nn

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.bases.loading import load
from nsc.data.labelled import read_all_labelled
from nsc.evaluation.scoring import exams_of


class Exam(Protocol):
    """The labelled rows of one task, such as ``nsc.evaluation.scoring.Exam``."""

    metric: str

    def score(self, model: nn.Module) -> float:
        """Return the metric of the task's head on what ``model`` makes of the rows."""


@dataclass(frozen=True)
class Scorer:
    """The body of a base, into which a merge is put with any coefficients.

    Attributes:
        result: the merge.
        model: the body, as it is without the merge.
        exams: task -> what scores it, in the order of the tasks.
    """

    result: nsc.MergeResult
    model: nn.Module
    exams: Mapping[str, Exam]

    def score(self, coefficients: Tensor) -> Scores:
        """Return the score of each task with these coefficients, (M, K), in the model."""
        with merged_layers(self.model, self.result.stack, coefficients):
            return {task: exam.score(self.model) for task, exam in self.exams.items()}

    def score_other(self, other: nsc.MergeResult) -> Scores:
        """Return the score of each task with another merge of the same adapters in the model."""
        with merged_layers(self.model, *other.merged.in_model()):
            return {task: exam.score(self.model) for task, exam in self.exams.items()}

    def alone(self, task: str) -> float:
        """Return the score of a task with its adapter alone in the model."""
        one_hot = torch.eye(len(self.result.tasks))[self.result.tasks.index(task)]
        with merged_layers(self.model, self.result.stack, one_hot.expand_as(self.result.coefficients)):
            return self.exams[task].score(self.model)


def text_scorer(
    result: nsc.MergeResult, base: Path, rows: Mapping[str, Sequence[tuple[str, float]]], max_length: int
) -> Scorer:
    """Load the base in bfloat16, with an exam for the labelled rows of each task of a merge.

    A row is a text and its label. A head with several outputs is scored by its accuracy, one with a single output by
    the Pearson correlation.
    """
    loaded = load(Base(str(base)), dtype="bfloat16", device="cpu")
    labelled = read_all_labelled(loaded, rows, result.tasks)
    return Scorer(result, loaded.model, exams_of(loaded, result.adapters, labelled, max_length))


def compare(
    scorer: Scorer, scales: Sequence[float] = SCALES, others: Mapping[str, nsc.MergeResult] = {}
) -> tuple[str, Scores]:
    """Score each adapter alone, the heads on the bare base, plain sums, the merge, and other merges by their names.

    Returns:
        The table, with the plain sum at the scale that is best on these very rows, and the scores of the merge.
    """
    like = scorer.result.coefficients
    alone: Scores = {}
    for task in scorer.result.tasks:
        alone[task] = scorer.alone(task)
        print(f"{task} alone: {alone[task]:.3f}", flush=True)
    bare = scorer.score(torch.zeros_like(like))
    name, best = best_sum(lambda scale: scorer.score(torch.full_like(like, scale)), alone, scales)
    merged = scorer.score(like)
    merges = {"heads alone": bare, name: best, "NSC": merged}
    merges |= {name: scorer.score_other(other) for name, other in others.items()}
    return format_table(alone, merges, {task: exam.metric for task, exam in scorer.exams.items()}), merged
