"""Merges by another method: of adapters alone, with coefficients as weights, or of what was learned just before.

Nothing is learned here and no weight of the base is read: names and shapes come from its config, until the proof. Only
of layers that adapters fine-tuned whole the base's own are needed, to take differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from nsc.adapters.lora import Adapter, base_warnings, fingerprint, read_adapters
from nsc.adapters.matching import match_to_base
from nsc.adapters.stack import Stack
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.errors import NSCError
from nsc.export.record import UNVERIFIED, Record
from nsc.export.result import MergeResult
from nsc.merging.report_builder import describe_recipe, describe_stack, kept_by_tasks
from nsc.recipes.combination import Combination
from nsc.recipes.spec import Recipe, config_fields, write_settings
from nsc.runtime.placement import one_device

Weights = str | Path | Tensor | None  # of a method: (M, K), or the folder of an earlier merge
Masks = Mapping[str, Tensor] | None


def combine(
    base: Base,
    adapters: Mapping[str, str | Path],
    recipe: Recipe,
    config: MergeConfig,
    coefficients: Weights,
    masks: Masks,
    searches: bool,
    say: Callable[[str], None],
) -> MergeResult:
    """Merge adapters by a method that learns nothing; arguments are those of ``nsc.merge``.

    No layer is worked on before it is asked for.

    Args:
        base: the base; its weights need not be loaded.
        adapters: task -> PEFT folder or Hub id.
        recipe: the method with its settings.
        config: settings, of which only those of the base are used.
        coefficients: weights of the method, or None.
        masks: layer -> (K, m, d) bool, or None.
        searches: whether the scale will be searched.
        say: prints a line.

    Returns:
        The merge in memory.

    Raises:
        NSCError: a subclass, for what does not go together.
    """
    _require_no_learning(recipe, config, config_fields(recipe.full_name, searches, recipe.aim is not None))
    read = read_adapters(adapters)
    matched = match_to_base(base, read, config.keep_modules)
    stack = matched.stack
    taken, start, warnings = _weights(coefficients, stack, read)
    combination = Combination(stack, recipe, taken, masks, one_device(config.device))
    say(f"base {base.id}: {len(stack.names)} modules of {len(read)} adapters, merged by {recipe.label}")
    report = describe_recipe(describe_stack(base.id, stack, taken, start, recipe.label), recipe)
    warnings = report.warnings + warnings + base_warnings(base.id, read)
    report = replace(report, warnings=warnings, heads=kept_by_tasks(matched.adapters))
    record = Record.of(
        base.id, recipe.label, matched, read, taken, replace(config, start=start), recipe, masks=combination.masks
    )
    return MergeResult(taken, report, record, matched.adapters, stack, combination=combination, with_base=True)


def combine_learned(result: MergeResult, recipe: Recipe, config: MergeConfig, masks: Masks) -> MergeResult:
    """Merge the same adapters by ``recipe``, weighted by the coefficients that were just learned.

    Args:
        result: the learned merge.
        recipe: the method with its settings.
        config: the settings of learning.
        masks: layer -> (K, m, d) bool, or None.

    Returns:
        The merge in memory.
    """
    device = one_device(config.device)
    combination = Combination(result.stack, recipe, result.coefficients, masks, device)
    settings = write_settings(recipe, config)
    record = replace(result.record, method=recipe.label, settings=settings, masks=combination.masks)
    return replace(
        result, report=describe_recipe(result.report, recipe), record=record, combination=combination, with_base=True
    )


def require_weights_of_tasks(recipe: Recipe, granularity: str) -> None:
    """Refuse to learn coefficients that could not be the weights of a layer and task.

    Args:
        recipe: the recipe that takes the weights.
        granularity: granularity of the learned coefficients.

    Raises:
        NSCError: for granularity "rank".
    """
    if granularity in ("rank", "factors"):
        raise NSCError(
            f"{recipe.label} takes one weight per layer and task, which granularity {granularity} does not learn; learn"
            " by layer or task"
        )


def _weights(
    coefficients: Weights, stack: Stack, adapters: Mapping[str, Adapter]
) -> tuple[Tensor | None, float, list[str]]:
    """(M, K) of this stack, where they started, and what should be known about them."""
    if coefficients is None:
        return None, 1.0, []
    if isinstance(coefficients, Tensor):
        return coefficients, coefficients.mean().item(), []
    record = Record.read(Path(coefficients))
    where = f"the coefficients of {coefficients}"
    if record.coefficients is None:
        raise NSCError(
            f"{where} do not exist: that merge, by {record.method}, learned none; give the folder of a merge by nsc"
        )
    if record.started:
        raise NSCError(
            f"{where} are beside a merge that was started from, so they weight no adapter alone; learn them without"
            " start_from"
        )
    if record.settings.get("granularity") == "rank":
        raise NSCError(f"{where} belong to rank rows, not to layers and tasks; learn by layer or task")
    columns = {task: _column(task, fingerprint(adapter), record, where) for task, adapter in adapters.items()}
    if lost := sorted(set(record.adapters) - set(columns.values())):
        raise NSCError(f"{where} also belong to {lost[0]}, which is not merged here; learn them for these adapters")
    if strange := sorted(set(stack.names) ^ set(record.modules)):
        raise NSCError(f"{where} belong to other layers: {strange[0]} is not in both; learn them for these adapters")
    rows, tasks = list(record.modules), list(record.adapters)
    taken = record.coefficients[[rows.index(name) for name in stack.names]]
    taken = taken[:, [tasks.index(task) for task in columns.values()]]
    other = [t for t, old in columns.items() if record.adapters[old]["fingerprint"] != fingerprint(adapters[t])]
    warnings = [f"{where} were learned for another adapter of the same name: {', '.join(other)}"] if other else []
    warnings += [] if record.verified else [f"{coefficients}: {UNVERIFIED}"]
    return taken, record.start, warnings


def _column(task: str, mark: str, record: Record, where: str) -> str:
    """The task of the record that is this adapter's, by its fingerprint or else by name."""
    same = [old for old, entry in record.adapters.items() if entry["fingerprint"] == mark]
    if task in same or (not same and task in record.adapters):
        return task
    if not same:
        raise NSCError(f"{where} have none for adapter {task}, only for {', '.join(record.adapters)}")
    return same[0]


def _require_no_learning(recipe: Recipe, config: MergeConfig, allowed: Sequence[str]) -> None:
    plain = MergeConfig().to_dict()
    set_there = [key for key, value in config.to_dict().items() if value != plain[key] and key not in allowed]
    if set_there:
        raise NSCError(
            f"method {recipe.label} learns nothing, so it takes no {set_there[0]}; of MergeConfig it takes only"
            f" {', '.join(allowed)}"
        )
