"""Merges that unlabeled rows are needed for without learning: the updates of a regression, and the weights of AIM.

The base is loaded, rows are read, layers are solved or their inputs measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.data.modalities import example_of, feed_of
from nsc.data.sources import Source, place_of, read_data
from nsc.errors import NSCError
from nsc.evaluation.solving import Findings, found_on, magnitudes_on
from nsc.export.result import MergeResult
from nsc.methods import LowRank
from nsc.recipes.combination import Combination
from nsc.recipes.spec import Recipe
from nsc.recipes.updates import FixedFactors
from nsc.runtime.distributed import join


def find_updates(
    result: MergeResult, data: Mapping[str, Source], config: MergeConfig, say: Callable[[str], None]
) -> tuple[MergeResult, Findings]:
    """Find the updates of a merge whose method needs rows.

    Args:
        result: the merge, whose base may or may not be in memory.
        data: task -> unlabeled rows.
        config: settings of the base and of the rows.
        say: prints a line.

    Returns:
        The merge with its updates and its base in memory; and what is told of them.

    Raises:
        NSCError: a subclass, for rows that do not go with the adapters, or equations without a solution.
    """
    assert result.combination is not None
    base, samples = _read(result, data, config)
    started, findings = time.perf_counter(), Findings(result.combination)
    found = found_on(base, findings, samples, config, join(config.device))
    say(f"{len(found)} layers solved from rows in {time.perf_counter() - started:.1f} s")
    combination = result.combination.with_found(found)
    return _with_base(result, base, combination, data, config), findings


def find_magnitudes(result: MergeResult, data: Mapping[str, Source], config: MergeConfig) -> MergeResult:
    """Measure the base's inputs for a merge that AIM follows.

    Args:
        result: the merge, whose base may or may not be in memory.
        data: task -> unlabeled rows.
        config: settings of the base and of the rows.

    Returns:
        The merge with what was measured, also in its record, and its base in memory.

    Raises:
        NSCError: a subclass, for rows that do not go with the adapters.
    """
    assert result.combination is not None
    base, samples = _read(result, data, config)
    magnitudes = magnitudes_on(base, result.by_layer, samples, config)
    combination = result.combination.with_magnitudes(magnitudes)
    result = replace(result, record=replace(result.record, magnitudes=magnitudes))
    return _with_base(result, base, combination, data, config)


def settled(result: MergeResult, findings: Findings) -> MergeResult:
    """Keep the factors of a merge whose method needs rows: they are in its record, to be made without rows again.

    Args:
        result: the merge, at the scale that it has in the end.
        findings: what is told of it.

    Returns:
        The merge by fixed factors.
    """
    assert result.combination is not None
    combination = result.combination
    factors = {name: update for name in combination.names if isinstance(update := combination.update(name), LowRank)}
    fixed = FixedFactors(factors, combination)
    told = findings.to_dict(combination.recipe.scale)
    record = replace(result.record, factors=fixed.factors, fitted=told)
    return replace(result, fixed=fixed, record=record, report=replace(result.report, fitted=told))


def refuse_without_rows(recipe: Recipe, data: Mapping[str, Source], config: MergeConfig) -> None:
    """Refuse a method that needs rows where there are none, or where the base is not one that can read them.

    Args:
        recipe: the method with its settings.
        data: task -> unlabeled rows.
        config: settings of the base.

    Raises:
        NSCError: naming the remedy.
    """
    if not data:
        what = f"method {recipe.label} is made from" if recipe.method.inputs else "aim is measured on"
        raise NSCError(f"{what} unlabeled rows: give --data TASK=FILE for each task")
    if config.shard or (config.device_map and join(config.device).size > 1):
        raise NSCError(
            f"method {recipe.label} runs the experts on a whole base in each process: leave out shard, and give"
            " device_map to one process alone"
        )


def _read(result: MergeResult, data: Mapping[str, Source], config: MergeConfig) -> tuple[Base, dict[str, Any]]:
    """The base with its weights, and the rows of each task."""
    base = Base(result.record.base, result.model)
    samples = read_data(data, result.adapters, feed_of(base).read, config.unseen)
    if result.model:
        return base, samples
    return loading.load(base, config.dtype, config.device, config.weights, config.device_map), samples


def _with_base(
    result: MergeResult, base: Base, combination: Combination, data: Mapping[str, Source], config: MergeConfig
) -> MergeResult:
    """The merge as it is now, with the base in memory if it is whole, and where the rows were in its record."""
    record = replace(result.record, data={task: place_of(source) for task, source in data.items()})
    batch = result.batch or example_of(base)
    return replace(
        result, combination=combination, record=record, model=base.model if config.whole_base else None, batch=batch
    )
