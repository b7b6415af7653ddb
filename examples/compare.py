"""A merge against its adapters alone and against their plain sum at its best single scale, task by task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluate import score
from shares import SCALES, Scores, format_table, mean_share
from tasks import Row
from torch import Tensor, nn
from transformers import AutoTokenizer

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.bases.loading import load_body


@dataclass(frozen=True)
class Exam:
    """Labelled rows of one task. metric: "accuracy" or "pearson"."""

    metric: str
    rows: list[Row]
    max_tokens: int = 32


@dataclass(frozen=True)
class Scorer:
    """Scores the tasks of a merge with any coefficients in the model."""

    result: nsc.MergeResult
    model: nn.Module
    tokenizer: Any
    exams: Mapping[str, Exam]

    def score(self, coefficients: Tensor, *tasks: str) -> Scores:
        """coefficients: (M, K), tasks: all if none is named -> score of each."""
        scores = {}
        with merged_layers(self.model, self.result.stack, coefficients):
            for task in tasks or self.exams:
                exam, head = self.exams[task], self.result.adapters[task].saved["score.weight"]
                rows, tokens = exam.rows, exam.max_tokens
                scores[task] = score(self.model, self.tokenizer, exam.metric, rows, head, max_tokens=tokens)
        return scores


def compare(result: nsc.MergeResult, base: Path, exams: Mapping[str, Exam]) -> str:
    """The table: fine-tuned, the heads on the bare base, the plain sum at the scale best on these very rows, NSC."""
    model = load_body(Base(str(base)), dtype="bfloat16", device="cpu")
    scorer = Scorer(result, model, AutoTokenizer.from_pretrained(base), exams)
    like, one_hot = result.coefficients, torch.eye(len(result.tasks))
    alone: Scores = {}
    for k, task in enumerate(result.tasks):
        alone |= scorer.score(one_hot[k].expand_as(like), task)
        print(f"{task} alone: {alone[task]:.3f}", flush=True)
    bare = scorer.score(torch.zeros_like(like))
    sums = {}
    for scale in SCALES:
        sums[scale] = scorer.score(torch.full_like(like, scale))
        print(f"plain sum x {scale:g}: {mean_share(sums[scale], alone):.1%} of fine-tuned", flush=True)
    best = max(SCALES, key=lambda scale: mean_share(sums[scale], alone))
    merges = {"heads alone": bare, f"sum x {best:g}": sums[best], "NSC": scorer.score(like)}
    return format_table(alone, merges, {task: exam.metric for task, exam in exams.items()})
