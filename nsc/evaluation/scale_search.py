"""The one scale of a merge: a coarse grid, then a finer one around its best, by labels or by null-space ratios.

    labels       mean over tasks of  loss_k(scale) / loss_k(0)          loss_k(0): task k's head on the bare base
    null space   mean over tasks and targets of om_k of the merged model's inputs, task k's rows against its own A_k
    match        mean over tasks of the merged model's distance from the expert (nsc.learning.agreement)

What does not depend on the scale is done once: the merge itself, its factors in the model, rows as tokens. A loss is
taken relative to that of the bare base, which is far from 0; relative to the adapter's own, a task that its adapter has
all but solved would decide alone.

Ratios need no labels, but they do not ask what the model says: docs/comparing.md tells how they go with the scale,
and why the range is bounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from nsc.adapters.stack import DenseStack, Stack
from nsc.adapters.surgery import merged_layers, set_coefficients
from nsc.errors import NonFiniteError, NSCError
from nsc.evaluation.scoring import Exam
from nsc.recipes.spec import method_of, split_learned
from nsc.runtime.placement import input_device

Value = Callable[[nn.Module], float]  # of a model with a merge in it; the less the better


@dataclass(frozen=True)
class Grid:
    """The scales of a search.

    Attributes:
        low: lowest scale, above 0.
        high: highest scale of the first grid.
        steps: step of the first grid, then of each finer one around the best scale so far.
        most: the first grid continues upwards while its last scale is the best, but not beyond this; None: not beyond
            ``high``.
        least: half the lowest scale is tried while the lowest is the best, but not below this; None: not below ``low``.
        parabolas: how often the lowest point of a parabola through the best scale and its neighbours is tried last, for
            a value that is smooth in the scale.
    """

    low: float = 0.1
    high: float = 1.5
    steps: tuple[float, ...] = (0.1, 0.01)
    most: float | None = None
    least: float | None = None
    parabolas: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise NSCError(f"the range of scales must be above 0 and ascending, not from {self.low} to {self.high}")
        if not self.steps or min(self.steps) <= 0 or list(self.steps) != sorted(set(self.steps), reverse=True):
            raise NSCError(f"the steps of a search must be above 0, each finer than the one before, not {self.steps}")


MOST, LEAST = 5.0, 0.0125
SMOOTH_STEP = 0.2  # of the distance from the experts, which is smooth in the scale and costs a forward of all rows
MEASURES = {  # minimised
    "labels": "mean loss relative to the bare base's",
    "null-space": "mean null-space ratio",
    "match": "mean distance from the experts, relative to the bare base's",
}
SEARCHES = ("none", *MEASURES)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        scale: the best one.
        curve: every scale tried, in ascending order -> its value.
        seconds: duration of the search in seconds.
        edge: whether the best scale is the lowest or highest of all tried, so that a better one may lie outside.
    """

    scale: float
    curve: dict[float, float]
    seconds: float
    edge: bool

    @property
    def warnings(self) -> list[str]:
        """What a reader must know."""
        outside = "is the last of the range searched; a better one may lie outside"
        return [f"its best scale, {self.scale:g}, {outside}"] if self.edge else []


def default_search(method: str, scaled: bool, rows: bool) -> str:
    """Return how a scale is found where nothing is said of it.

    Args:
        method: [LEARNED+][SPACE-]METHOD, or a key of LEARNED.
        scaled: whether a scale is given.
        rows: whether unlabeled rows are.

    Returns:
        "match" for a regression with rows and without a scale, else "none".

    Raises:
        NSCError: if there is no such method.
    """
    recipe = split_learned(method)[1]
    return "match" if rows and not scaled and recipe and method_of(recipe).regression else "none"


def grid_of(search: str, scales: tuple[float, float] | None = None, steps: tuple[float, ...] = Grid.steps) -> Grid:
    """Return the grid of a search.

    Args:
        search: "labels" or "match", which continue upwards to ``MOST`` while that helps, the latter also downwards to
            ``LEAST``; or "null-space".
        scales: lowest and highest scale, and no others; None for the default range.
        steps: step of each grid, coarse to fine.

    Returns:
        The grid.
    """
    if search == "match" and steps == Grid.steps:
        smooth = Grid(steps=(SMOOTH_STEP,), most=MOST, least=LEAST, parabolas=2)
        return replace(smooth, low=scales[0], high=scales[1], most=None, least=None) if scales else smooth
    if scales:
        return Grid(*scales, steps)
    return Grid(steps=steps, most=None if search == "null-space" else MOST)


def search(value: Callable[[float], float], grid: Grid = Grid()) -> SearchResult:
    """Find the scale with the least value on the grids.

    Args:
        value: function of a scale that is minimised; NaN or infinity where it has no value.
        grid: the scales to try.

    Returns:
        The best scale, and everything that was tried.

    Raises:
        NSCError: if no scale has a finite value.
    """
    started, first = time.perf_counter(), grid.steps[0]
    curve = {scale: value(scale) for scale in _scales(grid.low, grid.high, first)}
    while (last := max(curve)) == _best(curve) and last + first <= (grid.most or grid.high):
        curve[round(last + first, 10)] = value(round(last + first, 10))
    while (lowest := min(curve)) == _best(curve) and lowest / 2 >= (grid.least or grid.low):
        curve[lowest / 2] = value(lowest / 2)
    for coarse, fine in pairwise(grid.steps):
        best = _best(curve)
        reach, top = coarse - fine, max(grid.high, *curve)
        around = _scales(max(grid.low, best - reach), min(top, best + reach), fine)
        curve |= {scale: value(scale) for scale in around if scale not in curve}
    for _ in range(grid.parabolas):
        vertex = _vertex(curve)
        if vertex is None or vertex in curve:
            break
        curve[vertex] = value(vertex)
    best = _best(curve)
    if not math.isfinite(curve[best]):
        raise NSCError(f"no scale from {grid.low:g} to {grid.high:g} gives a finite loss; the merge overflows")
    curve = dict(sorted(curve.items()))
    return SearchResult(best, curve, time.perf_counter() - started, len(curve) > 1 and best in (min(curve), max(curve)))


def _scales(low: float, high: float, step: float) -> list[float]:
    return [round(low + j * step, 10) for j in range(math.floor((high - low) / step + 1e-9) + 1)]


def _vertex(curve: Mapping[float, float]) -> float | None:
    """The lowest point, to two digits, of the parabola through the best scale and its neighbours; None at an end."""
    scales = sorted(curve)
    at = scales.index(_best(curve))
    if not 0 < at < len(scales) - 1:
        return None
    (a, b, c), (x, y, z) = scales[at - 1 : at + 2], (curve[s] for s in scales[at - 1 : at + 2])
    left, right = (b - a) * (y - z), (b - c) * (y - x)
    if not math.isfinite(left + right) or left == right:
        return None
    return round(b - ((b - a) * left - (b - c) * right) / (2 * (left - right)), 2)


def _best(curve: Mapping[float, float]) -> float:
    """The smallest scale of the least finite value."""
    return min(sorted(curve), key=lambda scale: curve[scale] if math.isfinite(curve[scale]) else math.inf)


def search_scale(model: nn.Module, merged: Stack, value: Value, grid: Grid = Grid()) -> SearchResult:
    """Find the scale at which a merge has the least value in ``model``, which is left as it was.

    Args:
        model: body of the base, with weights.
        merged: the merge at scale 1, as ``as_one`` makes it.
        value: function of a model that carries a merge, which is minimised.
        grid: the scales to try.

    Returns:
        The best scale, and everything that was tried.

    Raises:
        NSCError: if no scale has a finite value.
    """
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    lam = torch.ones(len(merged.names), 1, dtype=dtype, device=input_device(model))
    with torch.no_grad(), merged_layers(model, merged, lam) as layers:

        def at(scale: float) -> float:
            set_coefficients(layers, lam * scale)
            return value(model)

        return search(at, grid)


def require_finite(merged: Stack) -> None:
    """Refuse a merge that is not finite and so cannot be put into a model.

    Args:
        merged: the merge, as ``as_one`` makes it.

    Raises:
        NonFiniteError: naming the layer.
    """
    for name in merged.names:
        layer = merged.layer(name)
        parts = (layer.deltas,) if isinstance(layer, DenseStack) else (layer.A, layer.B)
        if not all(part.isfinite().all() for part in parts):
            raise NonFiniteError(f"its update of {name} is not finite")


class LabelledLoss:
    """The mean over tasks of the loss on labelled rows, each relative to that of the bare base.

    Args:
        model: body of the base, as it is.
        exams: task -> its labelled rows.
    """

    def __init__(self, model: nn.Module, exams: Mapping[str, Exam]) -> None:
        """Measure the losses of the bare base."""
        self.exams = exams
        self.bare = {task: exam.loss(model) or 1.0 for task, exam in exams.items()}

    def __call__(self, model: nn.Module) -> float:
        """Return the mean relative loss of a model.

        Args:
            model: body of the base, carrying a merge.

        Returns:
            1 for a merge no better than the bare base.
        """
        shares = [exam.loss(model) / self.bare[task] for task, exam in self.exams.items()]
        return sum(shares) / len(shares)
