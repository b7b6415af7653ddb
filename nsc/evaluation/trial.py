"""One base with its adapters, in which every method of a comparison is made, searched, scored and undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsc.adapters.matching import Matched
from nsc.adapters.stack import Stack
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.errors import NSCError, one_line
from nsc.evaluation.scale_search import Grid, Value, require_finite, search_scale
from nsc.evaluation.scoring import Exam
from nsc.evaluation.solving import completed_on
from nsc.evaluation.start import find_start, started
from nsc.evaluation.table import ALONE, Row, scored
from nsc.learning.held_back import HeldBack
from nsc.learning.loop import Learned
from nsc.learning.preparation import Problem, distance_from_experts, evaluation_ratio, prepare
from nsc.learning.ratios import NullSpaceRatio
from nsc.recipes.combination import Combination, as_one
from nsc.recipes.merged_factors import factors_to_fit
from nsc.recipes.spec import Recipe, with_scale
from nsc.recipes.updates import fitted
from nsc.runtime.memory import PeakMemory
from nsc.runtime.placement import input_device


class Planned(NamedTuple):
    """A method of a comparison with everything chosen.

    Attributes:
        config: how it learns; None where it does not.
        recipe: how it merges; None for the sum by learned coefficients.
        searched: whether its scale is searched.
    """

    config: MergeConfig | None
    recipe: Recipe | None
    searched: bool


class ScaleSearch(NamedTuple):
    """How the scales of a comparison are found.

    Attributes:
        value: function of a model that carries a merge, which is minimised.
        grid: the scales that are tried.
    """

    value: Value
    grid: Grid


@dataclass(frozen=True)
class Stage:
    """What all methods of a comparison share.

    Attributes:
        base: with weights.
        matched: the adapters on it.
        samples: task -> unlabeled rows; empty where no method needs any.
        config: what the comparison says of all learning.
        say: prints a line.
        learned: method -> what it learned, on which adapters, seconds and bytes, once it has.
    """

    base: Base
    matched: Matched
    samples: Mapping[str, Sequence[Any]]
    config: MergeConfig
    say: Callable[[str], Any]
    learned: dict[str, tuple[Learned, Stack, float, int | None]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The body, into which each merge is put in turn."""
        return self.base.model

    @property
    def stack(self) -> Stack:
        """The adapters, with a coefficient for each layer and task."""
        return self.matched.stack

    def problem(self, config: MergeConfig) -> Problem:
        """Return what is learned from the rows by these settings.

        Args:
            config: settings of a learning method.

        Returns:
            A problem on the shared base.
        """
        config = find_start(config)
        matched, samples, _ = started(self.base, self.matched, self.samples, config)
        return prepare(self.base, matched, samples, config, factors_to_fit(matched.stack, config))

    def null_space(self) -> NullSpaceRatio:
        """Return the null-space ratio of the rows that a merge is evaluated on before and after.

        Returns:
            A function of the model.
        """
        return evaluation_ratio(self.base, self.stack, self.samples, self.config)

    def match(self) -> HeldBack:
        """Return the distance from the experts on some of the unlabeled rows.

        Returns:
            A function of the model.
        """
        held = distance_from_experts(self.base, self.matched.adapters, self.stack, self.samples, self.config)
        if by_states := held.agreement.by_states(self.stack.tasks):
            self.say(f"without an output, compared by pooled states: {', '.join(by_states)}")
        return held

    def combination(self, recipe: Recipe, coefficients: Tensor | None) -> Combination:
        """Return what a recipe makes of the adapters, from the rows where it needs them.

        Args:
            recipe: the recipe.
            coefficients: weights of each layer, or None.

        Returns:
            The combination.
        """
        made = Combination(self.stack, recipe, coefficients, device=input_device(self.model))
        return completed_on(self.base, made, self.samples, self.config)

    def learn(self, name: str, config: MergeConfig) -> tuple[Learned, Stack, float, int | None]:
        """Learn what ``name`` learns, once.

        Args:
            name: one of LEARNED.
            config: its settings.

        Returns:
            What was learned, the adapters that it is of, seconds, and the bytes by which memory grew, None where that
            is unknown.
        """
        if name not in self.learned:
            peak, began = PeakMemory(input_device(self.model)), time.perf_counter()
            problem = self.problem(config)
            learned = problem.learn(progress=False)
            self.learned[name] = learned, problem.stack, time.perf_counter() - began, peak.growth()
        return self.learned[name]


def row_of(
    name: str,
    stage: Stage,
    exams: Mapping[str, Exam],
    planned: Planned | None = None,
    alone: Row | None = None,
    search: ScaleSearch | None = None,
) -> Row:
    """Make one merge, score it, and leave the base as it was.

    Args:
        name: ALONE, BARE, or a method.
        stage: what all rows share.
        exams: task -> its labelled rows.
        planned: the method with its settings; None for ALONE and BARE.
        alone: the row of the adapters by themselves, once it is there.
        search: how the scale is searched, if the method's is.

    Returns:
        The row of the table; one that says why, where the method refuses.
    """
    metrics = {task: exam.metric for task, exam in exams.items()}
    if planned is None:
        scores = _alone(stage, exams) if name == ALONE else {t: exam.score(stage.model) for t, exam in exams.items()}
        return scored(Row(name), scores, alone.scores if alone else scores, metrics)
    assert alone is not None
    try:
        row, stack, lam = _merge(name, stage, planned, search)
        dtype = torch.promote_types(next(stage.model.parameters()).dtype, torch.float32)
        with merged_layers(stage.model, stack, lam.to(input_device(stage.model), dtype)):
            scores = {task: exam.score(stage.model) for task, exam in exams.items()}
    except NSCError as error:
        return Row(name, refused=one_line(error))
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


def _merge(name: str, stage: Stage, planned: Planned, search: ScaleSearch | None) -> tuple[Row, Stack, Tensor]:
    """The row without scores, and what to put into the model with which coefficients."""
    row, lam, memory = Row(name), None, 0
    if planned.config:
        learned, stack, seconds, grown = stage.learn(name.partition("+")[0], planned.config)
        row, memory, lam = replace(row, optimisation=seconds, memory=grown), grown or 0, learned.coefficients
        if planned.recipe is None:
            if learned.factors:
                return row, *fitted(stack, learned.factors).in_model()
            return row, stack, lam
    assert planned.recipe is not None
    peak, started = PeakMemory(input_device(stage.model)), time.perf_counter()
    one = with_scale(planned.recipe, 1.0)
    merged = as_one(stage.combination(one, lam))
    require_finite(merged)
    row, scale = replace(row, preparation=time.perf_counter() - started), planned.recipe.scale
    if planned.searched:
        assert search is not None
        best = search_scale(stage.model, merged, search.value, search.grid)
        row, scale = replace(row, search=best.seconds, curve=best.curve, notes=tuple(best.warnings)), best.scale
    grown = peak.growth()
    row = replace(row, scale=scale, memory=None if grown is None else max(grown, memory))
    return row, merged, torch.full((len(merged.names), 1), scale)
