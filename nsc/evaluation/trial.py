"""One base with its adapters, in which every method of a comparison is made, searched, scored and undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsc.adapters.matching import Fitted
from nsc.adapters.stack import Stack, by_rank, whitened
from nsc.adapters.surgery import merged_layers
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.errors import NSCError
from nsc.evaluation.scale_search import Grid, Value, require_finite, search_scale
from nsc.evaluation.scoring import Exam
from nsc.evaluation.table import ALONE, Row, scored
from nsc.learning.entropy import entropy_of
from nsc.learning.generation import batches_of
from nsc.learning.loop import learn
from nsc.learning.ratios import NullSpaceRatio
from nsc.recipes.combination import Combination, as_one
from nsc.recipes.spec import Recipe, with_scale
from nsc.runtime.memory import PeakMemory
from nsc.runtime.placement import input_device


class Planned(NamedTuple):
    """A method with everything chosen. config: where it learns.  recipe: where it merges.  searched: its scale is."""

    config: MergeConfig | None
    recipe: Recipe | None
    searched: bool


@dataclass
class Stage:
    """What all methods share. learned: coefficients, seconds and memory of a learning method, once it has run."""

    base: str
    model: nn.Module
    fitted: Fitted
    samples: Mapping[str, Sequence[Any]]
    config: MergeConfig
    say: Callable[[str], Any]
    value: Value | None = None
    grid: Grid = field(default_factory=Grid)
    learned: dict[str, tuple[Tensor, float, int | None]] = field(default_factory=dict)

    @property
    def stack(self) -> Stack:
        """The adapters."""
        return self.fitted.stack

    def null_space(self) -> NullSpaceRatio:
        """Of the rows that a merge is evaluated on before and after."""
        rows = self._batches(self.config)[1]
        return NullSpaceRatio(self.stack, self.fitted.targets, rows, input_device(self.model))

    def coefficients(self, name: str, config: MergeConfig) -> tuple[Tensor, float, int | None]:
        """What ``name`` learns, in how many seconds and bytes; learned once."""
        if name not in self.learned:
            peak, started = PeakMemory(input_device(self.model)), time.perf_counter()
            lam = self._learn(config)
            self.learned[name] = lam, time.perf_counter() - started, peak.growth()
        return self.learned[name]

    def _learn(self, config: MergeConfig) -> Tensor:
        read, stack = self.fitted.adapters, self.stack
        stack = by_rank(stack) if config.granularity == "rank" else stack
        batches = self._batches(config)[0]
        entropy = None
        if config.objective != "null-space":
            entropy = entropy_of(self.base, self.model, read, config.positions, config.unseen, config.reduction)
        return learn(
            self.model, whitened(stack), self.fitted.targets, batches, config, progress=False, entropy=entropy
        ).coefficients

    def _batches(self, config: MergeConfig) -> tuple[Any, list[Batch]]:
        return batches_of(self.base, self.model, self.stack, self.fitted.targets, self.samples, config)


def row_of(name: str, stage: Stage, exams: Mapping[str, Exam], planned: Planned | None, alone: Row | None) -> Row:
    """One row of the table. planned: of a method.  alone: the row of the adapters by themselves, once it is there."""
    metrics = {task: exam.metric for task, exam in exams.items()}
    if planned is None:
        scores = _alone(stage, exams) if name == ALONE else {t: exam.score(stage.model) for t, exam in exams.items()}
        return scored(Row(name), scores, alone.scores if alone else scores, metrics)
    assert alone is not None
    try:
        row, stack, lam = _merge(name, stage, planned)
        dtype = torch.promote_types(next(stage.model.parameters()).dtype, torch.float32)
        with merged_layers(stage.model, stack, lam.to(input_device(stage.model), dtype)):
            scores = {task: exam.score(stage.model) for task, exam in exams.items()}
    except NSCError as error:
        return Row(name, refused=" ".join(str(error).split()))
    return scored(row, scores, alone.scores, metrics)


def _alone(stage: Stage, exams: Mapping[str, Exam]) -> dict[str, float]:
    """Each adapter in the model by itself, on its own rows."""
    scores, device = {}, input_device(stage.model)
    for k, task in enumerate(stage.stack.tasks):
        one = torch.eye(len(stage.stack.tasks), device=device)[k].expand(len(stage.stack.names), -1)
        with merged_layers(stage.model, stage.stack, one):
            scores[task] = exams[task].score(stage.model)
        stage.say(f"{task} alone: {exams[task].metric} {scores[task]:.3f}")
    return scores


def _merge(name: str, stage: Stage, planned: Planned) -> tuple[Row, Stack, Tensor]:
    """The row without scores, and what to put into the model with which coefficients."""
    row, lam, memory = Row(name), None, 0
    if planned.config:
        lam, seconds, grown = stage.coefficients(name.partition("+")[0], planned.config)
        row, memory = replace(row, optimisation=seconds, memory=grown), grown or 0
    if planned.recipe is None:
        assert lam is not None and planned.config is not None
        return row, by_rank(stage.stack) if planned.config.granularity == "rank" else stage.stack, lam
    peak, started = PeakMemory(input_device(stage.model)), time.perf_counter()
    one = with_scale(planned.recipe, 1.0)
    merged = as_one(Combination(stage.stack, one, lam, device=input_device(stage.model)))
    require_finite(merged)
    row, scale = replace(row, preparation=time.perf_counter() - started), planned.recipe.scale
    if planned.searched:
        assert stage.value is not None
        found = search_scale(stage.model, merged, stage.value, stage.grid)
        row, scale = replace(row, search=found.seconds, curve=found.curve, notes=tuple(found.warnings)), found.scale
    grown = peak.growth()
    row = replace(row, scale=scale, memory=None if grown is None else max(grown, memory))
    return row, merged, torch.full((len(merged.names), 1), scale)
