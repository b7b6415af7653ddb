"""``nsc.apply``: a recorded merge again, without learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from nsc.adapters.lora import fingerprint, read_adapters
from nsc.adapters.matching import Matched, beside, in_new_names, match_adapters
from nsc.adapters.modules_to_save import BaseLayers, dense_stacks, split_saved
from nsc.adapters.stack import by_rank, stack_adapters
from nsc.bases.base_model import Base
from nsc.config import START
from nsc.errors import NSCError
from nsc.export.description import REMEDY
from nsc.export.record import UNVERIFIED, Record, prefix_of_merge
from nsc.export.result import MergeResult
from nsc.export.sharing import hub_id
from nsc.merging.report_builder import describe_recipe, describe_stack, kept_by_tasks
from nsc.paths import absolute, states_of_sources
from nsc.recipes.combination import Combination
from nsc.recipes.updates import FixedFactors, WeightedSum, as_lora
from nsc.runtime.placement import one_device


def replay(result: MergeResult) -> MergeResult:
    """Repeat the recorded recipe, where the record has one.

    Args:
        result: the weighted sum of the recorded adapters.

    Returns:
        The merge by the recipe, or ``result`` itself without one.
    """
    record = result.record
    recipe = record.recipe
    if recipe is not None:
        report = describe_recipe(result.report, recipe)
        result = replace(result, report=replace(report, searched=record.searched, fitted=record.fitted))
    if record.factors:
        return replace(result, fixed=_recorded(result))
    if recipe is None:
        return result
    device = one_device(record.settings.get("device", "auto"))
    combination = Combination(
        result.stack, recipe, record.coefficients, record.masks, device, magnitudes=record.magnitudes
    )
    return replace(result, combination=combination)


def _recorded(result: MergeResult) -> FixedFactors:
    """The merge by the recorded factors; layers without any are the sum by coefficients."""
    record, stack = result.record, result.stack
    coefficients = torch.zeros(stack.owned.shape) if record.coefficients is None else record.coefficients
    if lost := [name for name in stack.modules if name not in record.factors]:
        raise NSCError(f"the record holds no factors of {lost[0]}; it is damaged, merge again")
    return FixedFactors(record.factors, WeightedSum(stack, coefficients))


def apply(
    folder: str | Path, *, adapters: Mapping[str, str | Path] | None = None, base: str | Path | None = None
) -> MergeResult:
    """Repeat a recorded merge without learning; the base's weights are read only to save the full model.

    Args:
        folder: folder of the earlier merge.
        adapters: task -> where its adapter lies now, if it moved.
        base: where the base lies now, if it moved.

    Returns:
        The merge in memory.

    Raises:
        NSCError: if an adapter is not the one that was merged, or the record is damaged.
    """
    record = Record.read(Path(folder))
    moved = dict(adapters or {})
    unknown = sorted(set(moved) - set(record.adapters))
    if unknown:
        raise NSCError(f"the record has no task {', '.join(unknown)}; it has {', '.join(record.adapters)}")
    record = replace(record, base=absolute(base) if base else record.base)
    places = {task: str(moved.get(task, entry["path"])) for task, entry in record.adapters.items()}
    if lost := [t for t, place in places.items() if not (t in moved or Path(place).exists() or hub_id(place))]:
        raise NSCError(
            f"the record says only that adapter {lost[0]} was called {places[lost[0]]!r}; say where it lies, by"
            f" --adapter {lost[0]}=PATH or adapters={{...}}"
        )
    sources = states_of_sources(record.base, *places.values())
    read = read_adapters(places)
    for task, adapter in read.items():
        if fingerprint(adapter) != record.adapters[task]["fingerprint"]:
            raise NSCError(
                f"adapter {task} at {adapter.path} is not the one that was merged: its weights or scale have changed"
                " since; find the original, or merge again"
            )
    moved_to = {task: {**entry, "path": str(read[task].path.resolve())} for task, entry in record.adapters.items()}
    record = replace(record, adapters=moved_to)
    read = in_new_names(Base(record.base), read, record.modules)
    matches = match_adapters(read, record.modules)
    if (prefix := prefix_of_merge(matches)) != record.prefix:
        raise NSCError(f"the record's prefix is {record.prefix!r}, but that of its adapters {prefix!r}; {REMEDY}")
    body = BaseLayers(record.modules, record.dense)
    read, whole = split_saved(read, matches, body, record.settings.get("keep_modules", ()))
    stack = stack_adapters(read, matches, record.modules, dense_stacks(Base(record.base), whole))
    if record.start_factors:
        stack = beside(Matched(read, matches, record.modules, stack), START, as_lora(record.start_factors)).stack
    stack = by_rank(stack) if record.settings.get("granularity") == "rank" else stack
    lam = record.coefficients
    if lam is not None and lam.shape != stack.owned.shape:
        raise NSCError(
            f"{folder} records coefficients {tuple(lam.shape)}, but these adapters take"
            f" {tuple(stack.owned.shape)}; it is damaged; merge again"
        )
    report = describe_stack(record.base, stack, lam, record.start, record.method)
    warnings = report.warnings + ([] if record.verified else [f"{folder}: {UNVERIFIED}"])
    report = replace(report, started=record.started, warnings=warnings, heads=kept_by_tasks(read))
    return replay(MergeResult(lam, report, record, read, stack, sources=sources))
